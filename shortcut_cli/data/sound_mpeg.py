"""MPEG audio, layers I to III: what its frames hold, whatever a header says.

libmpg123 believes a Xing or VBRI header, and without one multiplies the size of the file by the bit rate of the first
frame. So frames are counted here, which takes a look at four bytes of each (ISO/IEC 11172-3, 2.4.1.3), and files whose
header is missing or false are given a true one.
"""

import re
import struct
from functools import cache
from typing import NamedTuple

from shortcut_cli.data.sound_stream import (
    BLOCK_BYTES,
    MID_FRAME,
    TOLERANCE_S,
    Blocks,
    Part,
    Stream,
    add,
    begin,
    tag_bytes,
)

HEAD_BYTES = 1 << 16  # the first frame is searched for here
RATES_HZ = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}  # by version bits
KBPS = {  # by MPEG-1 or later, and layer
    (True, 1): (0, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (True, 2): (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (0, 32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (False, 3): (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
TAGS = frozenset((b"Xing", b"Info"))
VBRI_AT = 36
DELAY = 529  # samples that every layer III decoder adds and libmpg123 drops


class Kind(NamedTuple):
    """What stays the same from frame to frame."""

    version: int
    layer: int
    rate_hz: int
    mono: bool
    samples: int  # of a frame


_kind = cache(Kind)  # equal kinds are one object, which compares faster


class Frame(NamedTuple):
    """A frame's header."""

    size: int  # in bytes
    kind: Kind
    tag: int  # where a Xing header would begin


def frame(word: bytes) -> Frame | None:
    """The frame that begins with these four bytes; None if none does, or one of a free bit rate."""
    if len(word) < 4 or word[0] != 0xFF or word[1] < 0xE0:
        return None
    version, layer = word[1] >> 3 & 3, 4 - (word[1] >> 1 & 3)
    kbps, rate, padding = word[2] >> 4, word[2] >> 2 & 3, word[2] >> 1 & 1
    if version == 1 or layer == 4 or kbps in (0, 15) or rate == 3:
        return None
    first, rate_hz = version == 3, RATES_HZ[version][rate]
    bits = KBPS[first, layer][kbps] * 1000
    mono = word[3] >> 6 == 3
    samples = 384 if layer == 1 else 1152 if first or layer == 2 else 576
    size = (12 * bits // rate_hz + padding) * 4 if layer == 1 else samples // 8 * bits // rate_hz + padding
    side = (17 if mono else 32) if first else (9 if mono else 17)
    return Frame(size, _kind(version, layer, rate_hz, mono, samples), 4 + side)


class _Run:
    """Frames of one kind in a row, apart from tags between them."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.parts: list[Part] = []
        self.frames = self.bytes = self.lost = 0  # lost: bytes between frames that are neither frames nor tags
        self.cut = False  # its last frame is cut off
        self.since = 0  # frames behind the latest header
        self.promise: int | None = None  # frames by that header
        self.short = 0  # frames that headers promise and that are not there
        self.unpromised = False  # no header says how many frames its end has
        self.headers = 0
        self.believed = False  # whether libmpg123 believes the first header
        self.trimmed = DELAY  # samples of silence that libmpg123 drops at both ends

    def close(self) -> None:
        """A header's part ends here."""
        self.short += max(0, (self.promise or 0) - self.since)
        self.unpromised = not self.promise
        self.since, self.promise = 0, None

    def exact(self) -> bool:
        """Whether its only header is true and believed."""
        return self.believed and self.headers == 1 and self.promise == self.frames and not (self.lost or self.cut)


def streams(file: Blocks, start: int | None = None, end: int | None = None) -> list[Stream]:
    """The streams of MPEG audio in a file, or between two of its bytes; none if there are no frames.

    A new one begins if rate or channels change.
    """
    walk = _Walk(file, begin(file) if start is None else start, file.size if end is None else end)
    walk.run()
    alone = len(walk.runs) == 1 and start is None
    return [_stream(file, run, alone) for run in walk.runs]


class _Walk:
    """Goes from frame to frame."""

    def __init__(self, file: Blocks, start: int, end: int) -> None:
        self.file, self.position, self.end = file, start, end
        self.known: dict[bytes, Frame | None] = {}
        self.runs: list[_Run] = []

    def run(self) -> None:
        """Find the runs of frames."""
        while (place := self._search()) >= 0:
            if self.runs:
                self.runs[-1].lost += place - self.position
            self.position = place
            while self._run_of_frames():
                pass
        for run in self.runs:
            if not run.exact():
                run.close()

    def _search(self) -> int:
        """The next position of two frames of one kind in a row; -1 if there is none. Passes over tags."""
        while size := tag_bytes(self.file, self.position, self.end):
            self.position += size
        start = self.position
        if self._is_frame(start):
            return start
        limit = self.end if self.runs else min(self.end, start + HEAD_BYTES)
        while start < limit:
            block = self.file.at(start, min(BLOCK_BYTES, self.end - start))
            for match in re.finditer(rb"\xff[\xe2-\xff]", block):
                place = start + match.start()
                if place < limit and self._is_frame(place, self.runs[-1].kind if self.runs else None):
                    return place
            start += max(1, len(block) - 1)
        return -1

    def _is_frame(self, place: int, like: Kind | None = None) -> bool:
        """Whether two frames of one kind begin here. like: of its version and layer, which any noise seldom is."""
        one = frame(self.file.at(place, 4))
        if one is None or (like and like[:2] != one.kind[:2]):
            return False
        after = place + one.size
        if after == self.end or tag_bytes(self.file, after, self.end):
            return True
        two = frame(self.file.at(after, 4))
        return two is not None and two.kind[:3] == one.kind[:3]

    def _run_of_frames(self) -> bool:
        """Take the frames of one kind from here on; False if what follows is not a frame."""
        one = frame(self.file.at(self.position, 4)) if self.position + 4 <= self.end else None
        if one is None:
            return False
        if not self.runs or self.runs[-1].kind != one.kind:
            self.runs.append(_Run(one.kind))
        run = self.runs[-1]
        if self._header(run, one):
            return True
        start = self.position
        count, last = self._frames(one.kind)
        if self.position > self.end:
            run.cut, count, self.position = True, count - 1, self.end
            add(run.parts, start, last)
            run.bytes += last - start
        else:
            add(run.parts, start, self.position)
            run.bytes += self.position - start
        run.frames += count
        run.since += count
        return self.position < self.end

    def _frames(self, kind: Kind) -> tuple[int, int]:
        """Pass over frames of a kind; returns their number, and where the last one begins."""
        count, last, known = 0, self.position, self.known
        while self.position + 4 <= self.end:
            data = self.file.at(self.position, min(BLOCK_BYTES, self.end - self.position))
            # A header and the tag behind it may cross the end of a block, except of the last.
            at, limit = 0, len(data) - (4 if self.position + len(data) >= self.end else 64)
            while at <= limit:
                word = data[at : at + 4]
                one = known.get(word)
                if one is None:
                    one = known[word] = frame(word)
                if one is None or one.kind is not kind:
                    self.position += at
                    return count, last
                if data[at + one.tag : at + one.tag + 4] in TAGS or data[at + VBRI_AT : at + VBRI_AT + 4] == b"VBRI":
                    self.position += at
                    return count, last
                last = self.position + at
                count += 1
                at += one.size
            self.position += at
        return count, last

    def _header(self, run: _Run, one: Frame) -> bool:
        """Whether the frame here is a Xing or VBRI header, which holds no sound; then it is read."""
        data = self.file.at(self.position, min(256, self.end - self.position))
        if data[one.tag : one.tag + 4] in TAGS:
            promise, trimmed = _xing(data[one.tag :])
            run.believed = run.believed or not run.headers
        elif data[VBRI_AT : VBRI_AT + 4] == b"VBRI":
            promise, trimmed = int.from_bytes(data[VBRI_AT + 14 : VBRI_AT + 18], "big"), None
        else:
            return False
        run.close()
        run.headers += 1
        run.promise = promise
        if trimmed is not None and run.headers == 1:
            run.trimmed = trimmed
        self.position = min(self.position + one.size, self.end)
        return True


def _xing(data: bytes) -> tuple[int | None, int | None]:
    """The number of frames in a Xing header, and the samples of delay and padding in the LAME header behind it."""
    flags = int.from_bytes(data[4:8], "big")
    promise = int.from_bytes(data[8:12], "big") if flags & 1 else None
    lame = 8 + 4 * (flags & 1) + 4 * (flags >> 1 & 1) + 100 * (flags >> 2 & 1) + 4 * (flags >> 3 & 1)
    if len(data) < lame + 24 or not data[lame]:
        return promise, None
    both = int.from_bytes(data[lame + 21 : lame + 24], "big")
    return promise, (both >> 12) + (both & 0xFFF)


def _stream(file: Blocks, run: _Run, alone: bool) -> Stream:
    kind, parts = run.kind, tuple(run.parts)
    true = run.exact() or (kind.layer < 3 and len(parts) == 1 and not run.cut)
    direct = (alone and true) or not run.frames
    trimmed = 0 if kind.layer < 3 else run.trimmed if direct else DELAY
    samples = max(0, run.frames * kind.samples - trimmed)
    lost = run.lost * samples // run.bytes if run.bytes else 0
    missing = max(run.short, run.cut) * kind.samples
    if run.short and run.headers == 1:
        missing -= run.trimmed - trimmed  # the end that was to be dropped is not there to be dropped
    promised_s, present_s = (samples + max(0, missing) + lost) / kind.rate_hz, samples / kind.rate_hz
    mark = MID_FRAME if run.cut and run.unpromised else ""
    if lost > TOLERANCE_S * kind.rate_hz:
        mark = f"is damaged: {run.lost:,} bytes between its frames belong to none"
    if direct:
        parts = ()
    elif kind.layer == 3:
        parts = (_true_header(file, run), *parts)
    return Stream(parts, promised_s, present_s, mark, loud=True)


def _true_header(file: Blocks, run: _Run) -> bytes:
    """A Xing header with the number of frames and bytes that are there."""
    assert isinstance(run.parts[0], tuple), run.parts
    word = bytearray(file.at(run.parts[0][0], 4))
    word[1] |= 1  # no checksum
    word[2] = 0xE0 | word[2] & 0x0C  # the largest frame, without padding
    one = frame(bytes(word))
    assert one is not None, word
    size = one.size + run.bytes
    head = bytes(word).ljust(one.tag, b"\0") + b"Xing" + struct.pack(">III", 3, run.frames, size)
    return head.ljust(one.size, b"\0")
