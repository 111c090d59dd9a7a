"""Ogg (RFC 3533): its links, one behind the other, and what the granule positions of their pages say.

libsndfile reads the first link only, takes a link that ends in mid-page for an empty one, and plays what is before or
behind a page that is missing in its place.
"""

import struct
import zlib
from dataclasses import dataclass, field

from shortcut_cli.data.sound_stream import Blocks, Part, Stream, add
from shortcut_cli.errors import Rejected

HEAD_BYTES = 27
BEGINS, ENDS = 2, 4  # flags of a page
NOT_MARKED = "is truncated: its last page is not marked as the end"


@dataclass
class Page:
    """One page. granule: position in samples at its end, -1 if no packet ends in it."""

    start: int
    flags: int
    granule: int
    serial: int
    number: int
    lacing: bytes

    @property
    def body(self) -> int:
        """Where its packets begin."""
        return self.start + HEAD_BYTES + len(self.lacing)

    @property
    def end(self) -> int:
        """Where it ends, or would if it were whole."""
        return self.body + sum(self.lacing)


@dataclass
class Codec:
    """What the first packet of a stream says. rate_hz: of granule positions."""

    rate_hz: int
    longest: int  # samples that a packet can have
    skip: int = 0  # samples at the start that are not played
    form: str = ""  # what libsndfile may not know


@dataclass
class _Link:
    """The pages of one link."""

    codecs: dict[int, Codec] = field(default_factory=dict)  # of its streams of sound, by serial number
    others: set[int] = field(default_factory=set)
    parts: list[Part] = field(default_factory=list)
    pages: int = 0
    packets: int = 0  # up to the end of the first page with a position
    first: int = 0  # the first position
    last: int = 0
    promised: int = 0
    ended: bool = False
    following: int = 0  # number of the next page
    gap: int = 0  # pages that are missing before the next position
    missing: int = 0  # all of them
    lost: int = 0  # samples in them

    @property
    def codec(self) -> Codec:
        return next(iter(self.codecs.values()))


def streams(file: Blocks) -> list[Stream]:
    """The streams of sound in an Ogg file. Raises Rejected if it has none, or a link has two at a time."""
    links: list[_Link] = []
    position, whole = 0, True
    while position < file.size:
        page = _page(file, position)
        if page is None:
            found = file.find(b"OggS", position + 1, file.size)
            whole = False
            if found < 0:
                break
            position = found
            continue
        _take(file, links, page)
        position = page.end
    links = [link for link in links if link.codecs]
    if not links:
        raise Rejected("is an Ogg file without Vorbis, Opus, FLAC or Speex in it")
    if any(len(link.codecs) > 1 for link in links):
        raise Rejected("is an Ogg file with several streams of sound at a time")
    alone = whole and len(links) == 1 and not links[0].others
    return [_stream(link, alone and position == file.size) for link in links]


def _page(file: Blocks, position: int) -> Page | None:
    head = file.at(position, HEAD_BYTES + 255)
    if head[:4] != b"OggS" or len(head) < HEAD_BYTES or len(head) < HEAD_BYTES + head[26]:
        return None
    granule, serial, number = struct.unpack("<qII", head[6:22])
    return Page(position, head[5], granule, serial, number, head[HEAD_BYTES : HEAD_BYTES + head[26]])


def _take(file: Blocks, links: list[_Link], page: Page) -> None:
    """Add a page to its link."""
    if page.flags & BEGINS:
        if not links or links[-1].pages:
            links.append(_Link())
        codec = _codec(file.at(page.body, min(80, sum(page.lacing))))
        if codec is None:
            links[-1].others.add(page.serial)
        else:
            links[-1].codecs[page.serial] = codec
    if not links or page.serial not in links[-1].codecs:
        return
    link = links[-1]
    link.pages += not page.flags & BEGINS
    link.promised = max(link.promised, page.granule)
    if page.end > file.size:
        link.ended = False
        if cut := _whole_packets(file, page):
            link.parts.append(cut)
        return
    add(link.parts, page.start, page.end)
    link.ended = bool(page.flags & ENDS)
    if not _is_true(file, page):
        return  # which libogg passes over
    link.gap += max(0, page.number - link.following)
    link.following = page.number + 1
    if page.granule > 0:
        # How long each of these pages is, nothing says: they are taken for equal.
        link.lost += max(0, page.granule - link.last) * link.gap // (link.gap + 1)
        link.missing, link.gap = link.missing + link.gap, 0
        link.last = max(link.last, page.granule)
    if not link.first and page.granule:
        link.packets += sum(size < 255 for size in page.lacing)
        link.first = max(0, page.granule)


def _codec(packet: bytes) -> Codec | None:
    """What the first packet of a stream says; None if it is not one of sound."""
    if packet[:7] == b"\x01vorbis" and len(packet) >= 30:
        return Codec(int.from_bytes(packet[12:16], "little"), 1 << (packet[28] >> 4) >> 1)
    if packet[:8] == b"OpusHead" and len(packet) >= 19:
        return Codec(48_000, 5760, int.from_bytes(packet[10:12], "little"))
    if packet[:5] == b"\x7fFLAC" and len(packet) >= 30:
        return Codec(int.from_bytes(packet[27:30], "big") >> 4, 65_535, form="FLAC in Ogg")
    if packet[:8] == b"Speex   " and len(packet) >= 60:
        frame, frames = struct.unpack("<I", packet[56:60])[0], packet[64:68]
        return Codec(int.from_bytes(packet[36:40], "little"), frame * max(1, int.from_bytes(frames, "little")))
    return None


def _whole_packets(file: Blocks, page: Page) -> bytes:
    """A page with the packets that are whole in a page that is cut off; nothing if there is none."""
    kept = size = 0
    for number, part in enumerate(page.lacing, 1):
        size += part
        if page.body + size > file.size:
            break
        if part < 255:
            kept = number
    if not kept:
        return b""
    head = bytearray(file.at(page.start, HEAD_BYTES))
    head[22:26], head[26] = bytes(4), kept
    found = bytes(head) + page.lacing[:kept] + file.at(page.body, sum(page.lacing[:kept]))
    return found[:22] + struct.pack("<I", checksum(found)) + found[26:]


def _is_true(file: Blocks, page: Page) -> bool:
    """Whether a page has its checksum, which is that of the page with zeros in its place."""
    data = file.at(page.start, page.end - page.start)
    return checksum(data[:22] + bytes(4) + data[26:]) == int.from_bytes(data[22:26], "little")


REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def checksum(page: bytes) -> int:
    """CRC-32 with Ogg's polynomial, which is zlib's with all bits in reverse order, from 0 and not inverted."""
    found = zlib.crc32(page.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{found:032b}"[::-1], 2)


def _stream(link: _Link, alone: bool) -> Stream:
    codec = link.codec
    if not codec.rate_hz:
        raise Rejected("is an Ogg file with a sampling rate of 0 Hz")
    # A recording of a broadcast does not begin at 0. How long its first page is, only its packets know.
    longest = link.packets * codec.longest
    start = link.first if link.first > longest else codec.skip
    promised, present = (max(0, position - start) / codec.rate_hz for position in (link.promised, link.last))
    mark = "" if link.ended else NOT_MARKED
    if link.missing:
        mark = f"is damaged: {link.missing} of {link.following:,} pages are missing or not true"
    lost = link.lost / codec.rate_hz
    added = lost + longest / codec.rate_hz * (start == link.first)
    parts = () if alone and link.ended else tuple(link.parts)
    return Stream(parts, promised, max(0.0, present - lost), mark, added_s=added, form=codec.form)
