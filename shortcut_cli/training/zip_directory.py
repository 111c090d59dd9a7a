"""The records of a zip file, as `torch.save` lays them out.

A general zip reader forgives much, so two readers may find two contents in one file. This one forgives nothing: records
are stored as they are, follow each other from the first byte of the file to its directory, and are described equally in
both places where a zip file describes them. Layout: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.7 to 4.3.16 and 4.5.3.
"""

import re
import struct
from dataclasses import dataclass

LOCAL = struct.Struct("<4s5H3L2H")  # before each record
CENTRAL = struct.Struct("<4s6H3L5H2L")  # in the directory
END = struct.Struct("<4s4H2LH")  # of the file; a comment follows
LOCATOR = struct.Struct("<4sLQL")  # of END64
END64 = struct.Struct("<4sQ2H2L4Q")
FLAGS = 0x0808  # those that `torch.save` sets: sizes behind the record (0x8), names in UTF-8 (0x800)
SIZES_BEHIND = 0x0008
IN_64_BITS = 0xFFFFFFFF  # stands for a number in the extra field
NAMES = re.compile(
    r"data\.pkl|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id|data/(0|[1-9]\d{0,8})",
    re.ASCII,
)


class Malformed(Exception):
    """The file is not one that `torch.save` writes; the text says why."""


@dataclass(frozen=True)
class Record:
    """Where the bytes of a record are in the file, and their CRC-32."""

    start: int
    size: int
    crc: int

    def of(self, view: memoryview) -> memoryview:
        """Its bytes in `view`, the whole file."""
        return view[self.start : self.start + self.size]


@dataclass(frozen=True)
class _Entry:
    """A record as the directory describes it."""

    name: bytes
    flags: int
    crc: int
    size: int
    start: int  # of what the file has before the record


def records(view: memoryview, comment: int) -> dict[str, Record]:
    """The records of a PyTorch file by name, without the folder that they all share.

    view: the whole file. comment: length of the comment at its end, in bytes.

    Raises Malformed if anything in the file is not as `torch.save` writes it.
    """
    if bytes(view[:2]) != b"PK":
        raise Malformed("it is not a zip file, which `torch.save` writes since PyTorch 1.6")
    found: dict[str, Record] = {}
    place, folders = 0, set()
    entries, directory = _directory(view, comment)
    for entry in entries:
        folder, name = _split(entry.name)
        folders.add(folder)
        if entry.start != place:
            raise Malformed(f"{name} does not begin where the record before it ends")
        if name in found or len(folders) > 1:
            raise Malformed(f"its records are not named once each, in one folder: {name}")
        found[name], place = _record(view, entry, directory)
    if place != directory:
        raise Malformed("there is something between its records and their directory")
    if missing := {"data.pkl", "version"} - found.keys():
        raise Malformed(f"it has no {', '.join(sorted(missing))}")
    return found


def _split(name: bytes) -> tuple[str, str]:
    """The folder and the rest of a record's name."""
    try:
        folder, _, rest = name.decode().partition("/")
    except UnicodeDecodeError:
        raise Malformed("the name of a record is not UTF-8") from None
    if not folder or not NAMES.fullmatch(rest):
        raise Malformed(f"{name[:100].decode(errors='replace')!r} is not a record of a PyTorch file")
    return folder, rest


def _unpack(kind: struct.Struct, signature: bytes, view: memoryview, place: int) -> tuple[int, ...]:
    """The numbers of a header, without its signature."""
    if place < 0 or place + kind.size > len(view):
        raise Malformed("it is truncated")
    found, *numbers = kind.unpack_from(view, place)
    if found != signature:
        raise Malformed(f"there is no header at byte {place:,}")
    return tuple(numbers)


def _directory(view: memoryview, comment: int) -> tuple[list[_Entry], int]:
    """The entries of the directory, and where it begins."""
    end = len(view) - comment - END.size
    disk, first_disk, here, count, size, start, length = _unpack(END, b"PK\x05\x06", view, end)
    if (disk, first_disk, length) != (0, 0, comment) or here != count:
        raise Malformed("its end is not that of a PyTorch file")
    before = end - LOCATOR.size - END64.size
    if before >= 0 and bytes(view[before : before + 4]) == b"PK\x06\x06":
        count, size, start = _end64(view, before, (count, size, start))
        end = before
    if start + size != end:
        raise Malformed("its directory is not where its end says")
    return _entries(view, start, end, count), start


def _end64(view: memoryview, place: int, narrow: tuple[int, int, int]) -> tuple[int, int, int]:
    """Count, size and start of the directory in 64 bits, which must agree with those in 16 and 32 bits."""
    length, _, _, disk, first_disk, here, *wide = _unpack(END64, b"PK\x06\x06", view, place)
    located = _unpack(LOCATOR, b"PK\x06\x07", view, place + END64.size)
    if (length, disk, first_disk, here) != (END64.size - 12, 0, 0, wide[0]) or located != (0, place, 1):
        raise Malformed("its end is not that of a PyTorch file")
    if narrow != (min(wide[0], 0xFFFF), min(wide[1], IN_64_BITS), min(wide[2], IN_64_BITS)):
        raise Malformed("its two ends describe two directories")
    return wide[0], wide[1], wide[2]


def _entries(view: memoryview, place: int, end: int, count: int) -> list[_Entry]:
    entries = []
    while place < end:
        numbers = _unpack(CENTRAL, b"PK\x01\x02", view, place)
        _, _, flags, method, _, _, crc, packed, size, *lengths, disk, _, _, start = numbers
        name, extra, comment = lengths
        place += CENTRAL.size
        if place + name + extra > end:
            raise Malformed("its directory is truncated")
        text = bytes(view[place : place + name])
        packed, size, start = _wide((size, packed, start), view[place + name : place + name + extra])
        if method or packed != size or flags & ~FLAGS or comment or disk:
            raise Malformed(f"{text[:100].decode(errors='replace')} is not stored as PyTorch stores it")
        entries.append(_Entry(text, flags, crc, size, start))
        place += name + extra
    if place != end or len(entries) != count:
        raise Malformed("its directory does not have the length that its end says")
    return entries


def _wide(numbers: tuple[int, int, int], extra: memoryview) -> tuple[int, int, int]:
    """Packed size, size and start of an entry: those that need 64 bits are in its extra field (4.5.3)."""
    needed = sum(number == IN_64_BITS for number in numbers)
    expected = struct.pack("<2H", 1, 8 * needed) if needed else b""
    if len(extra) != len(expected) + 8 * needed or extra[: len(expected)] != expected:
        raise Malformed("an entry of its directory has an extra field that PyTorch does not write")
    wide = iter(struct.unpack_from(f"<{needed}Q", extra, len(expected)))
    size, packed, start = (next(wide) if number == IN_64_BITS else number for number in numbers)
    if needed and max(size, packed, start) < IN_64_BITS:
        raise Malformed("an entry of its directory has an extra field that PyTorch does not write")
    return packed, size, start


def _record(view: memoryview, entry: _Entry, directory: int) -> tuple[Record, int]:
    """The record of an entry, and where the next one begins; what stands before and behind it must agree."""
    shown = entry.name.decode()
    header = _unpack(LOCAL, b"PK\x03\x04", view, entry.start)
    _, flags, method, _, _, crc, packed, size, name, extra = header
    start = entry.start + LOCAL.size + name + extra
    end = start + entry.size
    named = view[entry.start + LOCAL.size :][:name] == entry.name
    if not named or (flags, method) != (entry.flags, 0) or end > directory:
        raise Malformed(f"{shown} is not stored as PyTorch stores it")
    narrow = min(entry.size, IN_64_BITS)
    sizes = {(entry.crc, narrow, narrow)}
    if flags & SIZES_BEHIND:
        sizes |= {(0, 0, 0), (0, IN_64_BITS, IN_64_BITS)}
        end = _behind(view, end, entry)
    if (crc, packed, size) not in sizes or end > directory:
        raise Malformed(f"{shown} is not stored as PyTorch stores it")
    return Record(start, entry.size, entry.crc), end


def _behind(view: memoryview, place: int, entry: _Entry) -> int:
    """Check what stands behind a record, its CRC-32 and sizes in 32 or 64 bits (4.3.9); returns where that ends."""
    for layout in ("<4sLLL", "<4sLQQ"):
        size = struct.calcsize(layout)
        fits = entry.size < IN_64_BITS or layout.endswith("Q")
        if fits and view[place : place + size] == struct.pack(layout, b"PK\x07\x08", entry.crc, entry.size, entry.size):
            return place + size
    raise Malformed(f"{entry.name.decode()} is not stored as PyTorch stores it")
