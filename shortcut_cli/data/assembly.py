"""Shards that many processes write: each encodes a part of the corpus; then places are known, and each writes shards.

The result is what one `shards.FolderWriter` would have written. A part has for each split a file of ids, EOS included,
and a list of its documents; a shard is made of whole ranges of such files.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shortcut_cli import files
from shortcut_cli.data.shards import DTYPES, SPLITS, dtype_code, index, sequences

Add = Callable[[str, Iterable[npt.NDArray[Any]], dict[str, float], dict[str, Any]], None]


@dataclass(frozen=True)
class PartWriter:
    """Where the files of parts are, and how they are written."""

    folder: Path
    vocabulary: int

    def ids(self, number: int, split: str) -> Path:
        """The ids of a part that a split gets."""
        return self.folder / f"{number:06d}.{split}"

    def documents(self, number: int) -> Path:
        """The documents of a part: lines of split, tokens, units and record."""
        return self.folder / f"{number:06d}.jsonl"

    @contextmanager
    def writing(self, number: int) -> Iterator[Add]:
        """A function that appends a document to a part, which is there, whole, after the block."""
        dtype = DTYPES[dtype_code(self.vocabulary)]
        with ExitStack() as stack:
            listed = stack.enter_context(files.writing(self.documents(number), durable=False))
            streams = {
                split: stack.enter_context(files.writing(self.ids(number, split), durable=False)) for split in SPLITS
            }

            def add(
                split: str, blocks: Iterable[npt.NDArray[Any]], units: dict[str, float], record: dict[str, Any]
            ) -> None:
                tokens = 0
                for block in blocks:
                    streams[split].write(block.astype(dtype).tobytes())
                    tokens += len(block)
                listed.write(json.dumps([split, tokens, units, record]).encode() + b"\n")

            yield add


@dataclass
class Shard:
    """What a shard is made of."""

    split: str
    number: int
    lengths: "array[int]" = field(default_factory=lambda: array("i"))  # see `shards.index`
    documents: "array[int]" = field(default_factory=lambda: array("q", [0]))
    ranges: list[list[int]] = field(default_factory=list)  # part, first token and token after the last in its file
    tokens: int = 0

    @property
    def name(self) -> str:
        """Of its files, without their endings."""
        return f"{self.split}-{self.number:05d}"

    def add(self, part: int, first: int, tokens: int) -> int:
        """Append a document; returns where it begins."""
        start = self.tokens
        if self.ranges and self.ranges[-1][0] == part and self.ranges[-1][2] == first:
            self.ranges[-1][2] = first + tokens
        else:
            self.ranges.append([part, first, first + tokens])
        self.lengths.extend(sequences(tokens))
        self.documents.append(len(self.lengths))
        self.tokens += tokens
        return start


def laid_out(
    writer: PartWriter, parts: int, shard_tokens: int, place: Callable[[str, int, int, int, Any, Any], None]
) -> Iterator[Shard]:
    """The shards that parts make up, each once it is full, and the rest at the end.

    place: told of every document in order: its split, shard, offset, tokens, units and record.
    """
    now = {split: Shard(split, 0) for split in SPLITS}
    for part in range(parts):
        done = dict.fromkeys(SPLITS, 0)
        with open(writer.documents(part), "rb") as stream:
            for line in stream:
                split, tokens, units, record = json.loads(line)
                shard = now[split]
                if shard.tokens and shard.tokens + tokens > shard_tokens:
                    yield shard
                    shard = now[split] = Shard(split, shard.number + 1)
                offset = shard.add(part, done[split], tokens)
                done[split] += tokens
                place(split, shard.number, offset, tokens, units, record)
    yield from now.values()


@dataclass(frozen=True)
class ShardMaker:
    """Writes shards, in a worker process."""

    folder: Path
    writer: PartWriter

    def __call__(self, shard: Shard) -> str:
        """Write the .bin and the .idx of a shard; returns the hash of the .bin."""
        code, digest = dtype_code(self.writer.vocabulary), hashlib.sha256()
        size = np.dtype(DTYPES[code]).itemsize
        with files.writing(self.folder / f"{shard.name}.bin") as out:
            for part, first, last in shard.ranges:
                for block in _read(self.writer.ids(part, shard.split), first * size, last * size):
                    digest.update(block)
                    out.write(block)
        files.write(self.folder / f"{shard.name}.idx", index(code, shard.lengths, shard.documents))
        return digest.hexdigest()


def _read(path: Path, first: int, last: int) -> Iterator[bytes]:
    """The bytes of a file from `first` to before `last`."""
    with open(path, "rb") as stream:
        stream.seek(first)
        while first < last:
            block = stream.read(min(files.BLOCK_BYTES, last - first))
            assert block, (path, first, last)
            first += len(block)
            yield block
