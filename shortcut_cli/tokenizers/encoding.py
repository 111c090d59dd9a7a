"""Scanned sources -> ids and their lines of documents.jsonl: one after the other, or a part of them in a file."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from shortcut_cli.data.assembly import PartWriter
from shortcut_cli.data.documents import Assign, Source
from shortcut_cli.tokenizers.base import Tokenizer


@dataclass(frozen=True)
class Item:
    """A source whose ids are wanted."""

    source: Source
    assign: Assign
    equal: tuple[str, ...] = ()  # names of files with the same bytes
    empty: int = 0  # empty records


@dataclass(frozen=True)
class Encoded:
    """The ids of a chunk, without EOS, and what is said of it."""

    split: str
    ids: Iterator[np.ndarray]  # blocks in order; must be exhausted before the next chunk
    units: dict[str, float]
    record: dict[str, Any]


def encoded(tokenizer: Tokenizer, item: Item, threads: int) -> Iterator[Encoded]:
    """All chunks of a source. Raises Rejected if it has changed since it was scanned."""
    source = item.source
    same = {"duplicates": list(item.equal)} if item.equal else {}
    variant = {"variant": source.variant} if source.variant else {}
    before = None
    # What belongs to no document is in the account of the first that is written.
    left = {"records_empty": item.empty} if item.empty else {}
    for chunk in tokenizer.encode(source, item.assign, threads):
        document = chunk.document
        # A document that is cut has several lines; its account is in the first.
        found = left | document.account if document is not before else {}
        before, left = document, {}
        record = {"source": source.relative, "sha256": document.sha256, **variant, **same}
        more: dict[str, Any] = {"line": document.line, "account": found}
        record |= {name: value for name, value in more.items() if value}
        yield Encoded(chunk.split, chunk.ids, chunk.units, record)


@dataclass(frozen=True)
class PartEncoder:
    """Writes the ids of some sources into files of a part, in a worker process."""

    tokenizer: Tokenizer
    writer: PartWriter

    def __call__(self, part: tuple[int, list[Item]]) -> None:
        """part: its number, and its items, in order. Raises Rejected if a source has changed since it was scanned."""
        number, items = part
        eos = np.array([self.tokenizer.eos])
        with self.writer.writing(number) as add:
            for item in items:
                for one in encoded(self.tokenizer, item, 1):
                    add(one.split, chain(one.ids, [eos]), one.units, one.record)


def parts(sizes: npt.NDArray[Any], size: int) -> list[tuple[int, int]]:
    """(first, after the last) of the items of each part, in order; parts have just over `size` bytes or tokens."""
    ends, found, first = np.cumsum(sizes, dtype=np.int64), list[tuple[int, int]](), 0
    while first < len(ends):
        before = int(ends[first - 1]) if first else 0
        last = min(int(ends.searchsorted(before + size)) + 1, len(ends))
        found.append((first, last))
        first = last
    return found
