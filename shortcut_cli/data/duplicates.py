"""Equal documents: which of them are dropped, found over all sources from 24 bytes per document."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shortcut_cli.data.documents import Document

# The first 128 bits of the hash, and the size: where the documents of a source begin follows from their sizes.
KEY = np.dtype([("low", "<u8"), ("high", "<u8"), ("size", "<i8")])
BLOCK = 1 << 18  # documents that are dealt with at once
SOURCES = 1 << 14  # whose keys are moved at once
PARTS = 16  # looked through one after the other, by the last bits of the hash, to save memory

Offsets = npt.NDArray[np.int64]


def key(document: Document) -> bytes:
    """The 24 bytes that stand for a document."""
    return bytes.fromhex(document.sha256[:32]) + document.size.to_bytes(8, "little")


@dataclass(frozen=True)
class Dropped:
    """The documents that are left out of a corpus because an equal one is kept."""

    offsets: Offsets = field(default_factory=lambda: np.zeros(0, np.int64))  # (n,) where each begins, ascending
    sizes: Offsets = field(default_factory=lambda: np.zeros(1, np.int64))  # (n + 1,) sum of the sizes before each

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self.offsets)

    @property
    def size(self) -> int:
        """The sum of their sizes."""
        return int(self.sizes[-1])

    def befores(self, offsets: Offsets) -> Offsets:
        """`before` of many offsets."""
        found: Offsets = self.sizes[self.offsets.searchsorted(offsets)]
        return found

    def holds(self, offset: int) -> bool:
        """Whether the document that begins at this offset of the corpus is one of them."""
        place = self._place(offset)
        return place < self.documents and int(self.offsets[place]) == offset

    def before(self, offset: int) -> int:
        """The sum of the sizes of those that begin before this offset of the corpus."""
        return int(self.sizes[self._place(offset)])

    def within(self, start: int, size: int) -> int:
        """The sum of the sizes of those that begin in a part of the corpus."""
        return self.before(start + size) - self.before(start)

    def between(self, start: int, end: int) -> "Dropped":
        """Those that begin in a part of the corpus, for which it says the same."""
        first, last = self._place(start), self._place(end)
        return Dropped(self.offsets[first:last], self.sizes[first : last + 1])

    def _place(self, offset: int) -> int:
        return int(self.offsets.searchsorted(offset))


def in_order(content: bytearray, firsts: npt.NDArray[Any], counts: npt.NDArray[Any]) -> npt.NDArray[np.void]:
    """Keys, source after source. content: all keys. firsts, counts: of each source, its first key and their number."""
    keys = np.frombuffer(content, KEY)
    ends = np.cumsum(counts, dtype=np.int64)
    if len(ends) == 0 or (int(ends[-1]) == len(keys) and (firsts == ends - counts).all()):
        return keys[: int(ends[-1]) if len(ends) else 0]
    found = np.empty(int(ends[-1]), KEY)
    for done in range(0, len(counts), SOURCES):
        some, begin = counts[done : done + SOURCES], int(ends[done - 1]) if done else 0
        moves = firsts[done : done + SOURCES].astype(np.int64) - (ends[done : done + SOURCES] - some)
        end = int(ends[min(done + SOURCES, len(ends)) - 1])
        found[begin:end] = keys[np.repeat(moves, some) + np.arange(begin, end)]
    return found


def find(starts: Offsets, counts: npt.NDArray[Any], keys: npt.NDArray[np.void]) -> Dropped:
    """All documents but the first of each group of equal ones.

    starts, counts: of each source, in the order of preference, where it begins in the corpus and how many documents it
    has. keys: of all documents in this order; they are changed.

    Takes up to 50 bytes per document while equal ones are sought, if most are equal; then 16 per document that is
    dropped.
    """
    repeated = _repeated(keys)
    if not len(repeated):
        return Dropped()
    ends = np.cumsum(counts, dtype=np.int64)
    sizes = keys["size"][repeated]
    up_to = np.cumsum(keys["size"], out=keys["size"])  # in the order of preference
    firsts = ends - counts
    offsets = np.empty(len(repeated), np.int64)
    for done in range(0, len(repeated), BLOCK):  # each step below makes an array of its own
        block = repeated[done : done + BLOCK]
        source = np.searchsorted(ends, block, side="right")
        first = firsts[source]  # the first document of its source
        began = np.where(first > 0, up_to[first - 1], 0)
        offsets[done : done + BLOCK] = starts[source] + up_to[block] - sizes[done : done + BLOCK] - began
    del keys, up_to, repeated
    order = np.argsort(offsets)
    return Dropped(offsets[order], np.concatenate([[0], np.cumsum(sizes[order])]))


def _repeated(keys: npt.NDArray[np.void]) -> npt.NDArray[np.int64]:
    """The places of all keys with an equal one before them, ascending."""
    last_bits = keys.view(np.uint8).reshape(-1, KEY.itemsize)[:, 15] % PARTS
    found = []
    for part in range(PARTS):
        (mine,) = np.nonzero(last_bits == part)
        order = mine[np.lexsort((keys["low"][mine], keys["high"][mine]))]  # stable: the first of equal ones stays first
        del mine
        same = np.ones(max(0, len(order) - 1), bool)
        for half in ("low", "high"):
            sorted_half = keys[half][order]
            same &= sorted_half[1:] == sorted_half[:-1]
            del sorted_half
        found.append(order[1:][same])
        del order
    places = np.concatenate(found)
    places.sort()
    return places
