"""FLAC (RFC 9639): how many samples its last frame says there are.

The number in the first block may be 0, "unknown", which libsndfile does not read to the end, or false.
"""

from functools import cache
from typing import NamedTuple

from shortcut_cli.data.sound_stream import MID_FRAME, Blocks, Stream, begin, tag_bytes
from shortcut_cli.errors import Rejected

MAGIC = b"fLaC"
FIRST_BLOCKS = (b"\x00\x00\x00\x22", b"\x80\x00\x00\x22")  # headers of the first block, of 34 bytes
INFO_BYTES = 42  # the magic, the header of the first block, and that block
UNKNOWN = (1 << 36) - 1  # the bits of the number of samples
TAIL_BYTES = 1 << 16
LONGEST_BYTES = 1 << 26  # more than two frames have


class Head(NamedTuple):
    """The header of a frame. first: number of its first sample in the file."""

    place: int
    first: int
    samples: int


def streams(file: Blocks) -> list[Stream]:
    """The streams in a FLAC file: one, or several if files were joined. Raises Rejected if the first block is none."""
    end = file.size
    while end > 128 and file.at(end - 128, 3) == b"TAG":
        end -= 128
    starts = [place := begin(file)]
    while (place := file.find(MAGIC, _behind_blocks(file, place), end)) > 0:
        if file.at(place, 8)[4:] in FIRST_BLOCKS:
            starts.append(place)
    ends = [*starts[1:], end]
    return [_stream(file, *bounds, alone=len(starts) == 1) for bounds in zip(starts, ends, strict=True)]


def _behind_blocks(file: Blocks, start: int) -> int:
    """Where the frames of a stream begin: its blocks can hold anything, even a FLAC file. Next byte: not a stream."""
    if file.at(start + 4, 4) not in FIRST_BLOCKS:
        return start + 1
    place, last = start + 4, False
    while not last and len(head := file.at(place, 4)) == 4:
        place, last = place + 4 + int.from_bytes(head[1:], "big"), head[0] >= 0x80
    return place


def _stream(file: Blocks, start: int, end: int, *, alone: bool) -> Stream:
    info = file.at(start, INFO_BYTES)
    rate_hz = int.from_bytes(info[18:21], "big") >> 4
    if len(info) < INFO_BYTES or not rate_hz:
        raise Rejected("is a FLAC file whose first block is cut off or not true")
    promised = int.from_bytes(info[18:26], "big") & UNKNOWN
    head = _last_head(file, start, end, int.from_bytes(info[10:12], "big"))
    present = promised_there = 0
    if head is not None:
        promised_there = head.first + head.samples
        present = promised_there if _whole(file, head, end) else head.first
    if alone and promised == present:
        return Stream((), present / rate_hz, present / rate_hz)
    fields = int.from_bytes(info[18:26], "big") & ~UNKNOWN | present
    parts = (info[:18] + fields.to_bytes(8, "big") + info[26:], (start + INFO_BYTES, end))
    mark = MID_FRAME if not promised and present < promised_there else ""
    return Stream(parts, max(promised, promised_there) / rate_hz, present / rate_hz, mark)


def _last_head(file: Blocks, start: int, end: int, block: int) -> Head | None:
    """The header of the last frame: the last that follows on from another one; None if there is none."""
    size = TAIL_BYTES
    while True:
        first = max(start + INFO_BYTES, end - size)
        found = _heads(file.at(first, end - first), first, block)
        ends = {head.first + head.samples for head in found} | {0}
        for head in reversed(found):
            if head.first in ends:
                return head
        if first == start + INFO_BYTES or size > LONGEST_BYTES:
            return None
        size *= 4


def _heads(data: bytes, first: int, block: int) -> list[Head]:
    found, at = [], -1
    while (at := data.find(b"\xff", at + 1)) >= 0:
        if at + 1 < len(data) and data[at + 1] & 0xFE == 0xF8:
            head = _head(data[at : at + 16], first + at, block)
            if head is not None:
                found.append(head)
    return found


def _head(data: bytes, place: int, block: int) -> Head | None:
    """The frame header at the start of some bytes (RFC 9639, 9.1); None if its checksum is another."""
    if len(data) < 6 or data[2] >> 4 == 0 or data[2] & 15 == 15 or data[3] >> 4 > 10 or data[3] & 1:
        return None
    ones = next((bit for bit in range(8) if not data[4] >> (7 - bit) & 1), 8)
    extra = max(0, ones - 1)
    if ones in (1, 8) or len(data) < 5 + extra:
        return None
    number = data[4] & (0x7F >> ones)
    for byte in data[5 : 5 + extra]:
        number = number << 6 | byte & 0x3F
    at, code = 5 + extra, data[2] >> 4
    count = {6: 1, 7: 2}.get(code, 0)
    rate = {12: 1, 13: 2, 14: 2}.get(data[2] & 15, 0)
    if len(data) <= at + count + rate or crc(data[: at + count + rate], 8, 0x07) != data[at + count + rate]:
        return None
    samples = int.from_bytes(data[at : at + count], "big") + 1
    if code < 6:
        samples = 192 if code == 1 else 576 << (code - 2)
    elif code > 7:
        samples = 256 << (code - 8)
    return Head(place, number if data[1] & 1 else number * block, samples)


def _whole(file: Blocks, head: Head, end: int) -> bool:
    """Whether a frame ends with its checksum, at the end of the file or before a tag or zeros."""
    data = file.at(head.place, end - head.place)
    if tag_bytes(file, end, file.size) or not crc(data, 16, 0x8005):
        return True
    return not crc(data.rstrip(b"\0"), 16, 0x8005) or not crc(data[: data.rfind(b"APETAGEX")], 16, 0x8005)


def crc(data: bytes, bits: int, polynomial: int) -> int:
    """The cyclic redundancy check of some bytes, neither reflected nor inverted."""
    value, mask, table = 0, (1 << bits) - 1, _table(bits, polynomial)
    for byte in data:
        value = value << 8 & mask ^ table[value >> (bits - 8) ^ byte]
    return value


@cache
def _table(bits: int, polynomial: int) -> list[int]:
    """The checks of all single bytes."""
    values = [byte << (bits - 8) for byte in range(256)]
    for _ in range(8):
        values = [
            (value << 1 ^ polynomial if value >> (bits - 1) else value << 1) & (1 << bits) - 1 for value in values
        ]
    return values
