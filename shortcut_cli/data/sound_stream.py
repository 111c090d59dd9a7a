"""The streams of sound in a file, as `sound_wav`, `sound_flac`, `sound_ogg` and `sound_mpeg` find them."""

import bisect
import io
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

BLOCK_BYTES = 1 << 20
TOLERANCE_S = 0.1  # of sound that may be missing, or be more than a file says, in all formats
MID_FRAME = "is truncated: it ends in the middle of a frame"
Part = tuple[int, int] | bytes


@dataclass(frozen=True)
class Stream:
    """One stream of sound; a file can hold several, one after the other.

    parts: what libsndfile is to read, in order: ranges (start, end) of the file, or bytes in the place of a header that
    is missing or false. Empty: the file as it is.
    """

    parts: tuple[Part, ...]
    promised_s: float  # length by what the file says of itself, in seconds
    present_s: float  # length by the frames, pages or bytes that are there
    mark: str = ""  # a sign of damage other than its length
    loud: bool = False  # its decoder writes to stderr
    added_s: float = 0.0  # what its decoder may add: gaps that it fills, a first page of unknown length
    form: str = ""  # what libsndfile may not know

    @property
    def missing_s(self) -> float:
        """Seconds that the file speaks of and does not have."""
        return max(0.0, self.promised_s - self.present_s)


class Blocks:
    """Random access to a file, read in blocks, so that memory stays flat."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.size = stream.seek(0, io.SEEK_END)
        self.first, self.block = 0, b""

    def at(self, position: int, count: int) -> bytes:
        """`count` bytes from `position` on, or fewer at the end of the file."""
        offset = position - self.first
        if offset < 0 or offset + count > len(self.block):
            self.stream.seek(position)
            self.block = self.stream.read(max(count, BLOCK_BYTES))
            self.first, offset = position, 0
        return self.block[offset : offset + count]

    def find(self, wanted: bytes, start: int, end: int) -> int:
        """The first position of `wanted` in a range of the file; -1 if it is not there."""
        while start < end:
            block = self.at(start, min(BLOCK_BYTES, end - start))
            place = block.find(wanted)
            if place >= 0:
                return start + place
            if len(block) < len(wanted) or start + len(block) >= end:
                break
            start += len(block) - len(wanted) + 1
        return -1


class Spliced(io.RawIOBase):
    """A file made of parts of another, to be read."""

    def __init__(self, stream: BinaryIO, parts: Sequence[Part]) -> None:
        self.stream, self.parts = stream, parts
        sizes = [len(part) if isinstance(part, bytes) else part[1] - part[0] for part in parts]
        self.starts = [0, *itertools.accumulate(sizes)]
        self.position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As in any file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.starts[-1]}[whence]
        self.position = max(0, base + offset)
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """As in any file: fills the buffer, unless the end comes first."""
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and self.position < self.starts[-1]:
            number = bisect.bisect_right(self.starts, self.position) - 1
            inside = self.position - self.starts[number]
            wanted = min(len(view) - done, self.starts[number + 1] - self.position)
            found = self._read(self.parts[number], inside, wanted)
            if not found:
                break
            view[done : done + len(found)] = found
            done += len(found)
            self.position += len(found)
        return done

    def _read(self, part: Part, inside: int, count: int) -> bytes:
        if isinstance(part, bytes):
            return part[inside : inside + count]
        self.stream.seek(part[0] + inside)
        return self.stream.read(count)


def add(parts: list[Part], start: int, end: int) -> None:
    """Add a range, joined with the last one if that ends where it begins."""
    if parts and isinstance(parts[-1], tuple) and parts[-1][1] == start:
        start = parts[-1][0]
        parts.pop()
    parts.append((start, end))


def tag_bytes(file: Blocks, position: int, end: int) -> int:
    """Size of the ID3v2, ID3v1 or APE tag that begins at a position; 0 if none does."""
    head = file.at(position, 32)
    if head[:3] == b"ID3" and len(head) >= 10 and max(head[6:10]) < 0x80:
        a, b, c, d = head[6:10]
        return 10 + (a << 21 | b << 14 | c << 7 | d) + (10 if head[5] & 0x10 else 0)
    if head[:3] == b"TAG" and end - position >= 128:
        return 128
    if head[:8] == b"APETAGEX" and len(head) == 32:
        size, _, flags = struct.unpack("<III", head[12:24])
        return 32 + size if flags >> 29 & 1 else 0
    return 0


def begin(file: Blocks) -> int:
    """Where the file begins, behind ID3v2 tags."""
    position = 0
    while file.at(position, 3) == b"ID3" and (size := tag_bytes(file, position, file.size)):
        position += size
    return position
