"""Columns of tables that have a row for every file of a corpus: values side by side, no Python object for each."""

import heapq
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

Row = TypeVar("Row")
Places = npt.NDArray[np.int64]

RUN = 1 << 14  # texts that are sorted at once, as Python objects


class Rows(Sequence[Row]):
    """A sequence whose elements are made whenever they are asked for."""

    def row(self, place: int) -> Row:
        """The element at a place from 0 to below the length."""
        raise NotImplementedError

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self.row(each) for each in range(*place.indices(len(self)))]
        return self.row(range(len(self))[place])

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))


class Texts(Rows[str]):
    """Texts, as the bytes of one block. The order of these bytes is that of their characters."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.block, self.ends = bytearray(), array("Q")
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Add a text, which may have surrogates, as names of files do."""
        self._append(text.encode(errors="surrogatepass"))

    def _append(self, text: bytes) -> None:
        self.block += text
        self.ends.append(len(self.block))

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, place: int) -> str:
        """A text."""
        return self.encoded(place).decode(errors="surrogatepass")

    def encoded(self, place: int) -> bytes:
        """The bytes of a text."""
        return bytes(self.block[self.ends[place - 1] if place else 0 : self.ends[place]])

    def order(self) -> Places:
        """The places of the texts in ascending order; equal ones stay in theirs."""

        def run(first: int) -> Iterator[tuple[bytes, int]]:
            texts = [(self.encoded(place), place) for place in range(first, min(first + RUN, len(self)))]
            sorted_ = np.array([place for _, place in sorted(texts)], np.int64)
            return ((self.encoded(place), place) for place in map(int, sorted_))

        runs = [run(first) for first in range(0, len(self), RUN)]
        return np.fromiter((place for _, place in heapq.merge(*runs)), np.int64, len(self))

    def taken(self, places: Iterable[int]) -> "Texts":
        """Some of the texts, in the order of `places`."""
        found = Texts()
        for place in places:
            found._append(self.encoded(place))
        return found


class Numbers:
    """Whole numbers from 0 on, all of them in as many bytes as the largest needs."""

    def __init__(self, count: int) -> None:
        self.values: npt.NDArray[Any] = np.zeros(count, np.uint8)
        self.most = 255

    def __setitem__(self, place: int, value: int) -> None:
        if value > self.most:
            self.values = self.values.astype(np.min_scalar_type(value) if value < 1 << 32 else np.int64)
            self.most = int(np.iinfo(self.values.dtype).max)
        self.values[place] = value

    def __getitem__(self, place: int) -> int:
        return int(self.values[place])


def repeated(keys: bytes | bytearray, size: int) -> Iterator[list[int]]:
    """The places of each group of equal keys, ascending. keys: all of them, one after the other, `size` bytes each.

    Takes about 28 bytes for each key: their first eight are sorted, which tell nearly all of them apart.
    """
    assert size % 8 == 0, size
    words = np.frombuffer(keys, "<u8").reshape(-1, size // 8)
    first = np.ascontiguousarray(words[:, 0])
    order = np.argsort(first, kind="stable")
    first = first[order]
    (same,) = np.nonzero(first[1:] == first[:-1])
    del first
    if not len(same):
        return
    begins = same[np.concatenate([[True], np.diff(same) > 1])]
    ends = same[np.concatenate([np.diff(same) > 1, [True]])] + 2
    for begin, end in zip(map(int, begins), map(int, ends), strict=True):
        by_key: dict[bytes, list[int]] = {}
        for place in order[begin:end].tolist():
            by_key.setdefault(bytes(keys[place * size : (place + 1) * size]), []).append(place)
        yield from (places for places in by_key.values() if len(places) > 1)
