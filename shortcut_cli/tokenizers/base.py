"""What every tokenizer offers: files to ids, ids to files, and a fingerprint of all that changes the ids.

Preparation asks a tokenizer for three things, in this order:

1. `survey`, in worker processes: read a source file once, say which documents it holds, or raise `Rejected`.
   A tokenizer for which reading is the costly part (audio, midi) writes what it found to the staged file, and may
   do so for a `group` of sources at once (`stage`);
2. `fit`, once, on the documents of the training split alone, where there is something to learn;
3. `encode`: the ids of each document, in blocks, in order.

Which document belongs to which split is not a tokenizer's business: it asks the `Assign` function that it is given.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np

from shortcut_cli.recipe import Keys


@dataclass(frozen=True, slots=True)
class Source:
    """One input file, or one variant of it (a transposition, say)."""

    path: Path  # where it lies
    relative: str  # path below the folder that was named on the command line
    sha256: str  # of the file's bytes
    staged: Path  # what `survey` may write and `encode` then reads
    variant: str = ""  # one of the tokenizer's `variants`
    size: int = 0  # sum of the sizes of its documents; known after the survey
    start: int = 0  # sum of the sizes of the sources before it; known after the survey


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a source file: the unit that is assigned to a split and ends with the end id."""

    sha256: str  # of its content; equal documents have equal hashes
    offset: int  # where it starts in the corpus, in the measure of `size`: its source's `start` included
    size: int  # bytes for text, tokens elsewhere; what a contiguous split cuts
    units: dict[str, float] = field(default_factory=dict)  # natural units of the whole document


@dataclass(frozen=True, slots=True)
class Piece:
    """The ids of a document, or of the part of it that one split gets."""

    document: Document
    split: str
    units: dict[str, float]  # natural units of this piece
    ids: Iterator[np.ndarray]  # blocks, in order; without the end id; to be exhausted before the next piece


Assign = Callable[[Document], list[tuple[str, int]]]
"""Divides a document: (split, size) for each part in order; the sizes sum to the document's size."""


@dataclass(frozen=True)
class Classes:
    """One way to sort tokens: the names of its classes, and the class of each token, -1 for none."""

    names: list[str]
    of: np.ndarray  # (T,)


@dataclass(frozen=True)
class Excerpt:
    """What a row of T ids stands for, along the axis of its tokens."""

    texts: list[str] | None = None  # of each token
    notes: np.ndarray | None = None  # (N, 4): token at which it begins, token at which it ends, pitch, velocity
    samples: np.ndarray | None = None  # of sound, from the first token to the last
    rate_hz: int = 0


class Guide:
    """Follows one sample and says which ids may come next, so that it decodes to a file with something in it.

    This one allows everything.
    """

    least = 1  # ids that are still needed for a file with something in it

    def allowed(self, left: int) -> np.ndarray | None:  # noqa: ARG002
        """Which ids may come next where `left` of them are still to come: bool (vocabulary,), or None for all."""
        return None

    def push(self, token: int) -> None:
        """Take over the next id."""


class Tokenizer(ABC):
    """Files of one domain <-> ids in range(vocabulary). Constructing one is cheap; weights load on first use."""

    Options: ClassVar[type[Keys]]
    unit: ClassVar[str]  # the natural unit of the domain: "byte", "note", "second"
    suffixes: ClassVar[tuple[str, ...]]  # of the files that it reads, lower case
    extension: ClassVar[str]  # of the files that it writes
    block_scale: float = 1.0  # size of the blocks that are read and computed at once, of the usual; ids don't change

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Number of ids, the end id included."""

    @property
    @abstractmethod
    def end(self) -> int:
        """The id that ends every document."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hex SHA-256 of everything that changes the ids of a given file; after `fit` where there is one."""

    @property
    def stride(self) -> int:
        """Ids that belong together (the codebooks of an audio frame); a document is cut only between them."""
        return 1

    @property
    def variants(self) -> list[str]:
        """Names of augmented forms in which training documents are added; empty where there are none."""
        return []

    @property
    def needs_fit(self) -> bool:
        """Whether `fit` has to be called before `encode`."""
        return False

    @property
    def description(self) -> dict[str, str | int | float]:
        """What the manifest says of this tokenizer: library versions, how it was trained."""
        return {}

    @abstractmethod
    def survey(self, source: Source) -> Iterator[Document]:
        """Read a source to its end and yield its documents in order; write `source.staged` where `encode` needs it.

        Raises Rejected with the reason where the file can't be used.
        """

    def group(self, sources: Sequence[Source], n_workers: int) -> list[list[Source]]:
        """How a survey by so many processes divides the sources: `stage` gets each group before their surveys."""
        del n_workers
        return [[source] for source in sources]

    def stage(self, sources: Sequence[Source]) -> None:
        """Write the staged files of several sources at once, where that is faster; `survey` writes those left out."""
        del sources

    def fit(self, sources: Sequence[Source], assign: Assign) -> str | None:
        """Learn from the parts that `assign` gives to "train", in bounded memory; returns what the user should know."""
        raise NotImplementedError

    @abstractmethod
    def encode(self, source: Source, assign: Assign, threads: int) -> Iterator[Piece]:
        """The ids of every piece of every document of a surveyed source, in order."""

    @abstractmethod
    def prompt(self, path: Path) -> np.ndarray:
        """The ids of one file, int64 (T,), without an end id. Raises Rejected where it can't be read."""

    @abstractmethod
    def decode(self, ids: Sequence[int], path: Path) -> dict[str, float]:
        """Write the file that `ids` stand for to `path` and return its natural units.

        Ids from the first end id on are ignored.
        """

    @abstractmethod
    def classes(self, ids: np.ndarray) -> dict[str, Classes]:
        """Ways to sort the tokens of a row of ids (T,), from anywhere in a document, by name."""

    @abstractmethod
    def excerpt(self, ids: np.ndarray) -> Excerpt:
        """What a row of ids (T,) stands for."""

    def guide(self) -> Guide:
        """The guide of a sample from its beginning on."""
        return Guide()

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the files that `load` needs into an existing folder; the same bytes every time."""

    @classmethod
    @abstractmethod
    def load(cls, options: Keys, folder: Path) -> "Tokenizer":
        """The tokenizer that `save` wrote. Raises CheckFailed where the files are not its."""
