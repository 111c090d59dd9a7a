"""What every tokenizer offers: files to ids, ids to files, and a fingerprint of everything that changes the ids.

Preparation calls a tokenizer in three steps:

1. `scan`, in worker processes: reads a source file once and yields its documents and the records that can't be used,
   or raises `Rejected`. If reading is the expensive part (audio, midi), it also writes the ids to the staged file;
   `stage` may do so for a `group` of sources at once;
2. `fit`, once, on the documents of the training split only, if there is something to learn;
3. `encode`: the ids of each document, in blocks, in order.

A tokenizer does not decide which split a document belongs to: it calls the `Assign` function that it is given.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from shortcut_cli.config.schema import Config
from shortcut_cli.data.documents import Assign, Chunk, Document, RejectedRecord, Source
from shortcut_cli.errors import Rejected


@dataclass(frozen=True)
class Classes:
    """One way to sort tokens into classes: their names, and the class of each token, -1 for none."""

    names: list[str]
    of: np.ndarray  # (T,) index into names


@dataclass(frozen=True)
class Excerpt:
    """What T consecutive ids represent, positioned along the token axis."""

    texts: list[str] | None = None  # of each token
    notes: np.ndarray | None = None  # (N, 4): token at which it begins, token at which it ends, pitch, velocity
    note_beats: np.ndarray | None = None  # (N, 2): beat at which it begins, beat at which it ends
    token_beats: np.ndarray | None = None  # (T,): beat at which the note begins that a token belongs to
    samples: np.ndarray | None = None  # of sound, from the first token to the last
    rate_hz: int = 0


class Constraint:
    """Follows one sample and restricts its next id, so that the sample decodes to a file that is not empty.

    This base class allows every id.
    """

    needed = 1  # ids still needed for a file that is not empty

    def allowed(self, left: int) -> np.ndarray | None:  # noqa: ARG002
        """Which ids may come next if `left` ids remain to be sampled: bool (vocabulary,), or None for all."""
        return None

    def push(self, token: int) -> None:
        """Advance by the id that was sampled."""


@dataclass(frozen=True)
class Written:
    """A file that continues a prompt. The units are natural ones and seconds, beats, characters: what a domain has."""

    units: dict[str, float]  # of the whole file
    begins: dict[str, float]  # where in the file the new part begins
    left_out: dict[str, float]  # how much of the prompt is not in the file, from its beginning


NO_LIMIT: Mapping[str, float] = MappingProxyType({})


class TextStream:
    """The text of ids that come one by one; what it has given out is never changed by later ids."""

    def push(self, token: int) -> str:
        """The text that is certain by now, and was not before."""
        raise NotImplementedError

    def end(self) -> str:
        """The rest."""
        return ""


class Tokenizer(ABC):
    """Files of one domain <-> ids in range(vocabulary). Constructing one is cheap; weights load on first use."""

    Options: ClassVar[type[Config]]
    unit: ClassVar[str]  # the natural unit of the domain: "byte", "note", "second"
    suffixes: ClassVar[tuple[str, ...]]  # of the files that it reads, lower case
    extension: ClassVar[str]  # of the files that it writes
    is_text: ClassVar[bool] = False  # whether its files are text, which can be given and shown without a file
    seam: ClassVar[dict[str, str | float]] = {}  # how a prompt's file is joined to what continues it, if not by ids
    block_scale: float = 1.0  # factor on the size of the blocks that are read and computed at once; ids don't change

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Number of ids, EOS included."""

    @property
    @abstractmethod
    def eos(self) -> int:
        """The id that ends every document."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hex SHA-256 of everything that changes the ids of a given file; if `needs_fit`, only after `fit`."""

    @property
    def stride(self) -> int:
        """Ids that belong together (the codebooks of an audio frame); documents are cut only between such groups."""
        return 1

    @property
    def variants(self) -> list[str]:
        """Names of the augmented forms in which training documents are added."""
        return []

    @property
    def needs_fit(self) -> bool:
        """Whether `fit` has to be called before `encode`."""
        return False

    @property
    def description(self) -> dict[str, str | int | float]:
        """What the manifest records about this tokenizer: library versions, how it was trained."""
        return {}

    @property
    @abstractmethod
    def depends_on(self) -> dict[str, str | int]:
        """What the ids depend on besides the options and the files: formats, versions, hashes of files in options."""

    @abstractmethod
    def scan(self, source: Source) -> Iterator[Document | RejectedRecord]:
        """Read a source to its end and yield its documents in order; write `source.staged` if `encode` needs it.

        A record that can't be used is yielded as a RejectedRecord, an empty one as a document of size 0.

        Raises Rejected with the reason if the file can't be used.
        """

    def documents(self, source: Source) -> Iterator[Document]:
        """The documents of a scan, without the records that can't be used."""
        return (found for found in self.scan(source) if isinstance(found, Document))

    def group(self, sources: Sequence[Source], n_workers: int) -> Iterator[Sequence[int]]:
        """Divide a scan among `n_workers` processes; each group is passed to `stage` before its sources are scanned.

        Yields the places of the sources of each group. There are at least as many as workers, or sources.
        """
        del n_workers
        return ([place] for place in range(len(sources)))

    def stage(self, sources: Sequence[Source]) -> None:
        """Write the staged files of several sources at once, if that is faster; `scan` writes any that are missing."""
        del sources

    def fit(self, sources: Sequence[Source], assign: Assign) -> str | None:
        """Learn from the parts that `assign` gives to "train", in bounded memory; may return a note for the user."""
        raise NotImplementedError

    @abstractmethod
    def encode(self, source: Source, assign: Assign, threads: int) -> Iterator[Chunk]:
        """The ids of every chunk of every document of a scanned source, in order."""

    @abstractmethod
    def prompt(self, path: Path, limit: Mapping[str, float] = NO_LIMIT) -> np.ndarray:
        """The ids of one file, int64 (T,), without EOS. Raises Rejected if it can't be read.

        limit: {"tokens": N} or {"seconds": S} that will be used of it; the ids may end some way beyond that.
        """

    def whole(self, count: int) -> int:
        """The most ids, up to `count`, with which a prompt may end: those of whole frames, in sound."""
        return count

    def first(self, ids: np.ndarray, seconds: float) -> int:
        """How many of a file's ids, int64 (T,), are in its first `seconds`.

        Raises Rejected if the domain has no seconds, or the file has fewer.
        """
        del ids, seconds
        raise Rejected("has no seconds, only tokens")

    @abstractmethod
    def decode(self, ids: Sequence[int], path: Path) -> dict[str, float]:
        """Write the file that `ids` encode to `path` and return its natural units.

        Ids from the first EOS on are ignored.
        """

    @abstractmethod
    def decode_after(
        self, ids: Sequence[int], path: Path, count: int, *, recorded: Path | None = None, only_new: bool = False
    ) -> Written:
        """`decode` of ids, the first `count` of which are those of a prompt.

        recorded: the file that they were encoded from; if `seam` is not empty, it is kept as it was recorded. None: the
        whole is decoded from ids. only_new: write only what follows the prompt.
        """

    def stream(self) -> TextStream:
        """The text of a file's ids, bit by bit; only if `is_text`."""
        raise NotImplementedError

    @abstractmethod
    def classes(self, ids: np.ndarray) -> dict[str, Classes]:
        """Ways to sort consecutive ids (T,), from anywhere in a document, into classes, by name."""

    @abstractmethod
    def excerpt(self, ids: np.ndarray) -> Excerpt:
        """What consecutive ids (T,) represent."""

    def constraint(self) -> Constraint:
        """A new constraint for a sample that starts from nothing."""
        return Constraint()

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the files that `load` needs into an existing folder; the same bytes every time."""

    @classmethod
    @abstractmethod
    def load(cls, options: Config, folder: Path) -> "Tokenizer":
        """The tokenizer that `save` wrote. Raises CheckFailed if the files are not such a tokenizer's."""


def before_eos(ids: Sequence[int], eos: int) -> list[int]:
    """The ids before the first EOS."""
    found = list(ids)
    return found[: found.index(eos)] if eos in found else found


def shared(one: str, other: str) -> int:
    """How many characters two texts have in common from their beginning."""
    return next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
