"""What a source file contains: documents, and the chunk of each that a split gets."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shortcut_cli import files
from shortcut_cli.errors import Rejected, unreadable


@dataclass(frozen=True, slots=True)
class Source:
    """One input file, or one variant of it (a transposition, say)."""

    path: Path
    relative: str  # path below the folder that was named on the command line
    sha256: str  # of the file's bytes
    staged: Path  # a file that `scan` may write for `encode` to read
    variant: str = ""  # one of the tokenizer's `variants`
    size: int = 0  # sum of the sizes of its documents; known after the scan
    start: int = 0  # sum of the sizes of the sources before it; known after the scan


def check_unchanged(path: Path, sha256: str) -> None:
    """Raise Rejected, which is passing, if a file has other bytes than when it was hashed. sha256: empty for any bytes.

    What reads a file calls this once it is done, and before it rejects the file, which may be half rewritten.
    """
    try:
        changed = sha256 and files.sha256(path) != sha256
    except OSError as error:  # whatever it is, it could be read then
        raise Rejected(str(unreadable(error)), passing=True) from error
    if changed:
        raise Rejected("changed while it was being prepared", passing=True)


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a source file: the unit that is assigned to a split and ends with EOS."""

    sha256: str  # of its content; equal documents have equal hashes
    offset: int  # where it starts in the corpus, in the unit of `size`; includes the `start` of its source
    size: int  # bytes for text, otherwise tokens; a contiguous split cuts by it; 0: an empty record, which is left out
    units: dict[str, float] = field(default_factory=dict)  # natural units of the whole document
    account: dict[str, float] = field(default_factory=dict)  # what the ids do not carry, see `add_account`
    line: int = 0  # of its source, from 1, if it is a record


@dataclass(frozen=True, slots=True)
class RejectedRecord:
    """A record of a source that can't be used; the rest of the source is kept."""

    line: int  # of the source, from 1
    reason: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """The ids of a document, or of the part of it that one split gets."""

    document: Document
    split: str
    units: dict[str, float]  # natural units of this chunk
    ids: Iterator[np.ndarray]  # blocks in order, without EOS; must be exhausted before the next chunk


def add_account(total: dict[str, float], account: Mapping[str, float]) -> None:
    """Add the account of a document to the total of several: names that end in "_max" take the larger, others the sum.

    An account counts what a tokenizer changes on the way from a file to ids; names carry their unit.
    """
    for name, amount in account.items():
        before = total.get(name, 0)
        total[name] = max(before, amount) if name.endswith("_max") else before + amount


Assign = Callable[[Document], list[tuple[str, int]]]
"""Divides a document: (split, size) for each part in order; the sizes add up to the document's size.

A document that is left out (a duplicate, an empty record) has no parts.
"""
