"""WAV (RIFF, RIFX, RF64, BW64), AIFF and NIST SPHERE: the size of the data beside what is there.

libsndfile cuts the data at the end of the file without a word, and reads none if a recorder was killed before it wrote
the size.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from shortcut_cli.data import sound_mpeg
from shortcut_cli.data.sound_stream import BLOCK_BYTES, TOLERANCE_S, Blocks, Part, Stream, tag_bytes
from shortcut_cli.errors import Rejected

RIFFS = (b"RIFF", b"RIFX", b"RF64", b"BW64")
SAMPLES = {1, 3, 6, 7}  # format tags: integers, floats, A-law, mu-law; a block is a frame of samples
ADPCM = {2, 0x11}  # Microsoft's and IMA's
MP3 = 0x55
EXTENSIBLE = 0xFFFE
Order = Literal["big", "little"]


@dataclass(frozen=True)
class Chunk:
    """A chunk. start, end: of what it holds, by its header."""

    name: bytes
    start: int
    end: int

    @property
    def size(self) -> int:
        """Of what it holds, in bytes."""
        return self.end - self.start


def is_endless(size: int) -> bool:
    """Whether a size is that of a writer who did not know it: 0xFFFFFFFF of ffmpeg, 0x7FFFF000 of sox, or near them."""
    return 0x7FFFF000 <= size <= 0x80000000 or size > 0xFFFFFF00


def streams(file: Blocks, start: int) -> list[Stream]:
    """The streams in a WAV file that begins at a byte: one, or several if files were joined.

    Raises Rejected if one has no data.
    """
    found: list[Stream] = []
    while file.at(start, 4) in RIFFS and file.at(start + 8, 4) == b"WAVE":
        more, start = _wave(file, start)
        found += more
    return found


def _wave(file: Blocks, start: int) -> tuple[list[Stream], int]:
    """The streams in the RIFF form that begins at a byte (several if it holds MP3), and where the next form begins."""
    order: Order = "big" if file.at(start, 4) == b"RIFX" else "little"
    chunks = list(_chunks(file, start + 12, order))
    named = _named(chunks)
    head = file.at(named[b"fmt "].start, min(40, named[b"fmt "].size))
    if not int.from_bytes(head[4:8], order):
        raise Rejected("is a WAV file with a sampling rate of 0 Hz")
    last = chunks[-1]
    after = min(file.size, last.end + last.size % 2)
    size, there = _sizes(file, start, order, named, last)
    if size is None:
        after = file.size
    tag, data = int.from_bytes(head[:2], order), named[b"data"]
    if tag == MP3 and (found := sound_mpeg.streams(file, data.start, data.start + there)):
        return _lengthened(found, (size or there) / there), after
    per_s = _bytes_per_s(head, order)
    rest = _unexplained(file, after)
    mark = f"is damaged: {rest:,} bytes behind its sound belong to nothing" if rest > TOLERANCE_S * per_s else ""
    parts: tuple[Part, ...] = () if start == 0 and after == file.size else ((start, after),)
    if file.at(start, 4) == b"BW64":  # the later name of RF64, which libsndfile does not know
        parts = (b"RF64", (start + 4, after))
    if size is None:
        magic = b"RIFX" if order == "big" else b"RIFF"
        parts = (magic + b"\xff" * 4, (start + 8, data.start - 4), b"\xff" * 4, (data.start, file.size))
    promised_s, present_s = (amount / per_s if per_s else 0.0 for amount in (size or there, there))
    one = Stream(parts, promised_s, present_s, mark, form=f"WAV with format tag 0x{tag:04X}")
    return [one], file.size if rest else after


def _named(chunks: list[Chunk]) -> dict[bytes, Chunk]:
    """The first chunk of each name. Raises Rejected if the two that matter are not there, in their order."""
    named = {chunk.name: chunk for chunk in reversed(chunks)}
    for name in (b"fmt ", b"data"):
        if name not in named:
            raise Rejected(f"is a WAV file without a chunk '{name.decode().strip()}'")
    if named[b"fmt "].start > named[b"data"].start:
        raise Rejected("is a WAV file whose chunk 'fmt' comes behind its data")
    return named


def _sizes(file: Blocks, start: int, order: Order, named: dict[bytes, Chunk], last: Chunk) -> tuple[int | None, int]:
    """Bytes of data by the header, None if whoever wrote it did not know, and bytes that are there."""
    data = named[b"data"]
    size, there = data.size, file.size - data.start
    if is_endless(size) and b"ds64" in named and file.at(start, 4) in RIFFS[2:]:
        size = int.from_bytes(file.at(named[b"ds64"].start + 8, 8), order)
    if data == last and there > 0 and (is_endless(size) or size == 0):
        return None, there
    return size, max(0, min(size, there))


def _lengthened(streams: list[Stream], factor: float) -> list[Stream]:
    """Streams that a header promises to be this much longer."""
    extra_s = (factor - 1) * sum(one.present_s for one in streams)
    return [replace(streams[0], promised_s=streams[0].promised_s + extra_s), *streams[1:]]


def _chunks(file: Blocks, start: int, order: Order) -> Iterator[Chunk]:
    """The chunks from a byte on, up to the end, or what is not a chunk or another form."""
    while _is_name(head := file.at(start, 8)):
        chunk = Chunk(head[:4], start + 8, start + 8 + int.from_bytes(head[4:], order))
        yield chunk
        # Some writers leave out the byte that fills up an odd size.
        start = chunk.end + chunk.size % 2
        if chunk.size % 2 and not _is_name(file.at(start, 8)) and _is_name(file.at(chunk.end, 8)):
            start = chunk.end


def _is_name(head: bytes) -> bool:
    return len(head) == 8 and all(0x20 <= byte < 0x7F for byte in head[:4]) and head[:4] not in RIFFS


def _bytes_per_s(head: bytes, order: Order) -> float:
    """Bytes of data for each second, by the chunk 'fmt'; 0 if it does not say."""
    tag, channels, rate_hz, per_s, block, bits, _, samples, _, subformat = struct.unpack(
        f"{'>' if order == 'big' else '<'}HHIIHHHHIH", head.ljust(26, b"\0")[:26]
    )
    if tag == EXTENSIBLE:
        tag = subformat
    if tag in SAMPLES:
        return float(rate_hz * (block or channels * -(-bits // 8)))
    if tag in ADPCM and samples:
        return float(rate_hz * block / samples)
    return float(per_s)


def _unexplained(file: Blocks, start: int) -> int:
    """Bytes behind the last chunk that are neither tags nor zeros nor another form."""
    while size := tag_bytes(file, start, file.size):
        start += size
    if start >= file.size or file.at(start, 4) in RIFFS:
        return 0
    place = start
    while block := file.at(place, BLOCK_BYTES):
        if any(block):
            return file.size - start
        place += len(block)
    return 0


def aiff(file: Blocks, start: int) -> list[Stream]:
    """The stream in an AIFF or AIFC file that begins at a byte."""
    named = {chunk.name: chunk for chunk in reversed(list(_chunks(file, start + 12, "big")))}
    if b"COMM" not in named or b"SSND" not in named:
        raise Rejected("is an AIFF file without a chunk 'COMM' or 'SSND'")
    head, data = file.at(named[b"COMM"].start, 22), named[b"SSND"]
    channels, frames, bits = (int.from_bytes(head[a:b]) for a, b in ((0, 2), (2, 6), (6, 8)))
    exponent, mantissa = int.from_bytes(head[8:10]), int.from_bytes(head[10:18])
    if exponent > 16383 + 31:
        raise Rejected("is an AIFF file with a sampling rate of more than 32 bits")
    rate_hz = mantissa * 2.0 ** (exponent - 16383 - 63)
    if not rate_hz:
        raise Rejected("is an AIFF file with a sampling rate of 0 Hz")
    if head[18:22] == b"ima4":
        frames *= 64  # which a packet has, and the header counts packets
    present = frames
    if file.at(start + 8, 4) == b"AIFF" or head[18:22] in (b"NONE", b"sowt"):
        block = channels * -(-bits // 8) or 1
        present = min(frames, (min(data.end, file.size) - data.start - 8) // block)
    parts = ((start, file.size),) if start else ()
    return [Stream(parts, frames / rate_hz, present / rate_hz)]


def sphere(file: Blocks) -> list[Stream]:
    """The stream in a NIST SPHERE file, which speech corpora such as TIMIT name .wav."""
    size = file.at(8, 8).strip()
    text = file.at(0, int(size)) if size.isdigit() else b""
    fields = dict(re.findall(rb"^(\w+) -i (\d{1,18})\s*$", text, re.MULTILINE))
    if b"shorten" in text:
        raise Rejected("is a NIST SPHERE file compressed with Shorten, which libsndfile can't read")
    names = (b"sample_rate", b"sample_count", b"channel_count", b"sample_n_bytes")
    rate_hz, frames, channels, width = (int(fields.get(name, -1)) for name in names)
    if frames < 0 or min(rate_hz, channels, width) <= 0:
        raise Rejected("is a NIST SPHERE file whose header is cut off or not true")
    present = max(0, file.size - len(text)) // (channels * width)
    return [Stream((), frames / rate_hz, min(frames, present) / rate_hz, form="NIST SPHERE")]
