"""Which document belongs to which split: by its hash, by cutting the corpus in three, or as its source is split.

By the hash of its content, so that equal documents never end up in different splits, and so that adding files moves no
other document (except to fill a split that would be empty).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from shortcut_cli.data.documents import Assign, Document, RejectedRecord
from shortcut_cli.data.duplicates import Dropped, Offsets
from shortcut_cli.data.shards import SPLITS

ENOUGH = len(SPLITS)  # distinct documents needed to fill every split


def split_of(sha256: str, val: float, test: float) -> str:
    """The split of a document, from the first 64 bits of its hash as a number in [0, 1)."""
    place = int(sha256[:16], 16) / 2.0**64
    return "val" if place < val else "test" if place < val + test else "train"


@dataclass
class Tally:
    """Counts over a set of documents, in constant memory. Tallies of parts can be merged in any order."""

    val: float
    test: float
    documents: int = 0
    size: int = 0
    records: int = 0  # of .jsonl files: documents, rejected and empty ones
    records_rejected: int = 0
    records_empty: int = 0
    smallest: dict[str, set[str]] = field(default_factory=lambda: {name: set() for name in SPLITS})

    def add(self, found: Document | RejectedRecord) -> None:
        """Count one document or record; an empty record is not a document."""
        if isinstance(found, RejectedRecord):
            self.records += 1
            self.records_rejected += 1
            return
        self.records += bool(found.line)
        if not found.size:
            self.records_empty += 1
            return
        self.documents += 1
        self.size += found.size
        self._note(split_of(found.sha256, self.val, self.test), {found.sha256})

    def merge(self, other: "Tally") -> None:
        """Count the documents of another tally."""
        self.documents += other.documents
        self.size += other.size
        self.records += other.records
        self.records_rejected += other.records_rejected
        self.records_empty += other.records_empty
        for split, hashes in other.smallest.items():
            self._note(split, hashes)

    def _note(self, split: str, hashes: set[str]) -> None:
        # `exceptions` needs only the three smallest distinct hashes of each split.
        self.smallest[split] = set(sorted(self.smallest[split] | hashes)[:ENOUGH])

    @property
    def distinct(self) -> int:
        """Number of distinct documents, counted up to three per split."""
        return sum(len(hashes) for hashes in self.smallest.values())

    def exceptions(self) -> dict[str, str]:
        """hash -> split for the documents that fill a split that would be empty.

        An empty split gets the smallest hash of the split that has the most to give.
        """
        left = {split: sorted(hashes) for split, hashes in self.smallest.items()}
        moved: dict[str, str] = {}
        for split in SPLITS:
            if not left[split]:
                donor = max(SPLITS, key=lambda name: len(left[name]))
                digest = left[donor].pop(0)
                moved[digest] = split
                left[split].append(digest)
        return moved


class Division:
    """Divides documents among splits, see `Assign`. It can be given to another process, a part of the corpus at a time.

    The functions below make one.
    """

    def __call__(self, document: Document) -> list[tuple[str, int]]:
        """(split, size) for each part of a document."""
        raise NotImplementedError

    def within(self, start: int, end: int) -> "Division":
        """One that does the same with the documents between two offsets of the corpus, and knows no others."""
        del start, end
        return self


@dataclass(frozen=True)
class _ByDocument(Division):
    moved: dict[str, str]
    val: float
    test: float

    def __call__(self, document: Document) -> list[tuple[str, int]]:
        split = self.moved.get(document.sha256) or split_of(document.sha256, self.val, self.test)
        return [(split, document.size)]


def by_document(tally: Tally) -> Division:
    """Whole documents, by the hash of their content."""
    return _ByDocument(tally.exceptions(), tally.val, tally.test)


@dataclass(frozen=True)
class _Contiguous(Division):
    bounds: tuple[tuple[str, int, int], ...]

    def __call__(self, document: Document) -> list[tuple[str, int]]:
        begin, end = document.offset, document.offset + document.size
        overlaps = ((split, min(end, high) - max(begin, low)) for split, low, high in self.bounds)
        return [(split, size) for split, size in overlaps if size > 0]


def contiguous(tally: Tally) -> Division:
    """The first part of the corpus for train, then val, then test."""
    second = tally.size - round(tally.size * tally.test)
    first = second - round(tally.size * tally.val)
    return _Contiguous((("train", 0, first), ("val", first, second), ("test", second, tally.size)))


@dataclass(frozen=True)
class _AsGiven(Division):
    starts: Sequence[int] | Offsets
    names: Sequence[str]

    def __call__(self, document: Document) -> list[tuple[str, int]]:
        return [(self.names[bisect_right(self.starts, document.offset) - 1], document.size)]

    def within(self, start: int, end: int) -> Division:
        first, last = max(0, bisect_right(self.starts, start) - 1), bisect_left(self.starts, end)
        return _AsGiven(self.starts[first:last], self.names[first:last])


def as_given(starts: Sequence[int] | Offsets, names: Sequence[str]) -> Division:
    """Whole documents, each in the split of its source: starts[i] is where source i begins, names[i] its split."""
    return _AsGiven(starts, names)


@dataclass(frozen=True)
class AllIn(Division):
    """Every document, whole, in one split."""

    split: str

    def __call__(self, document: Document) -> list[tuple[str, int]]:
        """One part."""
        return [(self.split, document.size)]


@dataclass(frozen=True)
class _Without(Division):
    dropped: Dropped
    assign: Assign

    def __call__(self, document: Document) -> list[tuple[str, int]]:
        if not document.size or self.dropped.holds(document.offset):
            return []
        before = self.dropped.before(document.offset)
        return self.assign(replace(document, offset=document.offset - before) if before else document)

    def within(self, start: int, end: int) -> Division:
        assert isinstance(self.assign, Division), self.assign
        rest = self.assign.within(start - self.dropped.before(start), end - self.dropped.before(end))
        return _Without(self.dropped.between(start, end), rest)


def without(dropped: Dropped, assign: Assign) -> Division:
    """What `assign` does with the corpus that is left without empty records and dropped documents."""
    return _Without(dropped, assign)
