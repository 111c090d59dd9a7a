"""Files with their hashes: of those that have the same bytes one is kept, and the names of the others with it."""

from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from shortcut_cli.data.columns import Rows, repeated
from shortcut_cli.data.given import PREFERRED
from shortcut_cli.data.inputs import Files

HASH_BYTES = 32


@dataclass(frozen=True, slots=True)
class Input:
    """A file with its hash, and the other files that have the same bytes."""

    relative: str
    path: Path
    sha256: str
    duplicates: tuple[str, ...] = ()
    split: str = ""  # the one that data.splits gives it to


class Inputs(Rows[Input]):
    """Files with their hashes, each of different bytes once, sorted by name and hash.

    Takes 36 bytes for each file beside what `Files` takes, and 12 more for one that has the bytes of another.
    """

    def __init__(
        self,
        found: Files,
        hashes: bytearray,
        unread: Collection[int] = (),
        splits: Sequence[str] | None = None,
    ) -> None:
        """Of equal files the first is kept.

        hashes: HASH_BYTES for each file. unread: places of those that have none. splits: of each file, by which it is
        sought in test, then val, then train.
        """
        self.files, self.hashes, self.splits = found, hashes, splits
        left = np.ones(len(found), bool)
        left[list(unread)] = False
        firsts, others = array("I"), array("I")
        for places in repeated(hashes, HASH_BYTES):
            same = [place for place in places if left[place]]
            if splits is not None:
                same.sort(key=lambda place: PREFERRED.index(splits[place]))
            for other in same[1:]:
                firsts.append(same[0])
                others.append(other)
                left[other] = False
        order = np.argsort(firsts, kind="stable")
        self.firsts, self.others = np.array(firsts, np.uint32)[order], np.array(others, np.uint32)[order]
        self.places = np.flatnonzero(left).astype(np.uint32)
        if len(found.roots) > 1:  # else no two have the same name
            first = 0
            for _, group in groupby(self.places.tolist(), found.names.encoded):
                many = sorted(group, key=self._hash)
                self.places[first : first + len(many)] = many
                first += len(many)

    def _hash(self, place: int) -> bytes:
        return bytes(self.hashes[HASH_BYTES * place : HASH_BYTES * (place + 1)])

    def __len__(self) -> int:
        return len(self.places)

    def row(self, number: int) -> Input:
        """A file that is kept."""
        place = int(self.places[number])
        relative, path = self.files[place]
        return Input(relative, path, self._hash(place).hex(), self._duplicates(place), self.split(number))

    def split(self, number: int) -> str:
        """The split of a file that is kept; empty if no splits are given."""
        return self.splits[int(self.places[number])] if self.splits is not None else ""

    def _duplicates(self, place: int) -> tuple[str, ...]:
        if not len(self.firsts):
            return ()
        first, last = self.firsts.searchsorted(place), self.firsts.searchsorted(place, "right")
        return tuple(self.files.names[other] for other in self.others[first:last].tolist())

    def of(self, hashes: Collection[str]) -> Iterator[tuple[int, Input]]:
        """(number, file) of those that are kept and have these hashes."""
        wanted = {bytes.fromhex(each) for each in hashes}
        if wanted:
            places = enumerate(self.places.tolist())
            yield from ((number, self.row(number)) for number, place in places if self._hash(place) in wanted)

    def without(self, numbers: Iterable[int]) -> "Inputs":
        """The same without some of those that are kept."""
        found = Inputs.__new__(Inputs)
        vars(found).update(vars(self))
        found.places = np.delete(self.places, list(numbers))
        return found

    @property
    def equal(self) -> int:
        """How many files are not kept, since they have the bytes of another."""
        return len(self.others)
