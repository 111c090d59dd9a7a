"""Which document belongs to which split: by the hash of its content, or by cutting the corpus into three parts.

By content, so that equal documents never end up in different splits, and so that adding files moves no other document
(except to fill a split that would be empty).
"""

from dataclasses import dataclass, field

from shortcut_cli.data.documents import Assign, Document
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
    smallest: dict[str, set[str]] = field(default_factory=lambda: {name: set() for name in SPLITS})

    def add(self, document: Document) -> None:
        """Count one document."""
        self.documents += 1
        self.size += document.size
        self._note(split_of(document.sha256, self.val, self.test), {document.sha256})

    def merge(self, other: "Tally") -> None:
        """Count the documents of another tally."""
        self.documents += other.documents
        self.size += other.size
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
