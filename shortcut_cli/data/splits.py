"""Which document belongs to which split: by its hash, by cutting the corpus in three, or as its source is split.

By the hash of its content, so that equal documents never end up in different splits, and so that adding files moves no
other document (except to fill a split that would be empty).
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from shortcut_cli.data.documents import Assign, Document, RejectedRecord
from shortcut_cli.data.duplicates import Dropped
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


def by_document(tally: Tally) -> Assign:
    """Whole documents, by the hash of their content."""
    moved = tally.exceptions()

    def assign(document: Document) -> list[tuple[str, int]]:
        split = moved.get(document.sha256) or split_of(document.sha256, tally.val, tally.test)
        return [(split, document.size)]

    return assign


def contiguous(tally: Tally) -> Assign:
    """The first part of the corpus for train, then val, then test."""
    second = tally.size - round(tally.size * tally.test)
    first = second - round(tally.size * tally.val)
    bounds = (("train", 0, first), ("val", first, second), ("test", second, tally.size))

    def assign(document: Document) -> list[tuple[str, int]]:
        begin, end = document.offset, document.offset + document.size
        overlaps = ((split, min(end, high) - max(begin, low)) for split, low, high in bounds)
        return [(split, size) for split, size in overlaps if size > 0]

    return assign


def as_given(starts: Sequence[int], names: Sequence[str]) -> Assign:
    """Whole documents, each in the split of its source: starts[i] is where source i begins, names[i] its split."""

    def assign(document: Document) -> list[tuple[str, int]]:
        return [(names[bisect_right(starts, document.offset) - 1], document.size)]

    return assign


def without(dropped: Dropped, assign: Assign) -> Assign:
    """What `assign` does with the corpus that is left without empty records and dropped documents."""

    def assign_the_rest(document: Document) -> list[tuple[str, int]]:
        if not document.size or dropped.holds(document.offset):
            return []
        before = dropped.before(document.offset)
        return assign(replace(document, offset=document.offset - before) if before else document)

    return assign_the_rest
