"""Documents out of shards, decoded to files, for pages to show; kept in the cache, since decoding takes a while."""

import hashlib
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from shortcut_cli import __version__, files, registry
from shortcut_cli.config import reading
from shortcut_cli.data import shards
from shortcut_cli.data.shards import Shards
from shortcut_cli.errors import CheckFailed
from shortcut_cli.formatting import to_json
from shortcut_cli.tokenizers.base import Tokenizer

MOST_KEPT = 64  # files in the cache


class Documents:
    """The documents of one split of a shards folder. Opening raises what `Shards` and its `split` do."""

    def __init__(self, folder: Path, split: str) -> None:
        self.shards = Shards(folder)
        self.name = split
        self.split = self.shards.split(split)
        self.lengths = [int(tokens) for tokens in self.split.document_tokens()]  # with EOS
        self._tokenizer: Tokenizer | None = None

    @property
    def domain(self) -> str:
        """The name of the tokenizer: audio, midi or text."""
        return str(self.shards.tokenizer["name"])

    def like(self, tokens: int, used: Mapping[int, int]) -> int | None:
        """A document of at least so many tokens, the first of those that were used least; else the longest.

        used: how often each document was.
        """
        if not self.lengths:
            return None
        enough = [index for index, length in enumerate(self.lengths) if length > tokens]
        longest = max(range(len(self.lengths)), key=lambda index: self.lengths[index])
        return min(enough, key=lambda index: used.get(index, 0)) if enough else longest

    def called(self, index: int) -> str:
        """The file that a document is from, with the line if the file has several, and how it was changed.

        Raises CheckFailed if documents.jsonl does not list it, OSError if it can't be read.
        """
        if len(self._lines) != len(self.lengths):
            raise CheckFailed(
                f"{self._list} lists {len(self._lines):,} documents of {self.name}, of which there are "
                f"{len(self.lengths):,}",
                "prepare the folder again",
            )
        found = shards.document_at(self._list, self._lines[index])
        line, variant = found.get("line"), found.get("variant")
        return f"{found['source']}{f', line {line}' if line else ''}{f', {variant}' if variant else ''}"

    @property
    def _list(self) -> Path:
        return self.shards.folder / "documents.jsonl"

    @cached_property
    def _lines(self) -> list[int]:
        return shards.document_lines(self._list, self.name)

    def start(self, index: int, tokens: int, turn: int) -> int:
        """Where in a document the excerpt of so many tokens begins that is shown at its turn, one after another.

        Of sound, with a whole frame.
        """
        length, frame = self.lengths[index] - 1, max(1, int(self.shards.tokenizer["stride"]))
        return turn % max(1, length // max(1, tokens)) * tokens // frame * frame

    def file(self, index: int, tokens: int, start: int = 0) -> Path:
        """A file with `tokens` of a document, in the cache.

        Raises a ShortcutError if the tokenizer can't be loaded, OSError if the cache can't be written.
        """
        kind = registry.load(registry.TOKENIZERS, self.domain)
        key = [__version__, self.shards.manifest["checksum"], self.name, index, tokens, *([start] if start else [])]
        name = hashlib.sha256(to_json(key).encode()).hexdigest()[:32]
        folder = files.cache_folder() / "documents"
        path: Path = folder / f"{name}{kind.extension}"
        if not path.is_file():
            files.make_folder(folder)
            _make_room(folder)
            ids = self.split.read(sum(self.lengths[:index]), min(start + tokens, self.lengths[index])).tolist()
            if start:  # with what holds there: tempo and meter of music, a codec's past
                self.tokenizer.decode_after(ids, path, start, only_new=True)
            else:
                self.tokenizer.decode(ids, path)
        os.utime(path)
        return path

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the shards folder."""
        if self._tokenizer is None:
            kind = registry.load(registry.TOKENIZERS, self.domain)
            loaded: Tokenizer = kind.load(_options(self.shards), self.shards.folder / "tokenizer")
            self._tokenizer = loaded
        return self._tokenizer


def _options(opened: Shards) -> Any:
    """[tokenizer] that the shards were made with. Raises UsageError if this version does not know it."""
    made = opened.manifest["request"].get("tokenizer", {})
    content = reading.read("text-tiny").model_dump() | {"tokenizer": made}  # the rest of it does not matter here
    return reading.validate(content, f"{opened.folder}/manifest.json").tokenizer


def _make_room(folder: Path) -> None:
    """Remove the files that were not used for the longest time."""
    there = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    for path in there[: max(0, len(there) - MOST_KEPT + 1)]:
        path.unlink(missing_ok=True)
