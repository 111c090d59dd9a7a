"""What scans found: in columns, and kept by the hash of a source's bytes, so that no other process scans it again."""

import base64
import hashlib
import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_cli import files
from shortcut_cli.data import duplicates, splits
from shortcut_cli.data.columns import Numbers, Places
from shortcut_cli.data.documents import RejectedRecord, Source
from shortcut_cli.data.shards import SPLITS
from shortcut_cli.errors import Rejected
from shortcut_cli.tokenizers.base import Tokenizer

COUNTS = ("documents", "size", "records", "records_rejected", "records_empty")  # of a tally, in the order of its fields
HASH_BYTES = 32


@dataclass(slots=True)
class Scanned:
    """What a scan found in one source. The numbers are of its tally."""

    documents: int
    size: int
    records: int
    records_rejected: int
    records_empty: int
    smallest: bytes  # for each hash that the tally keeps, the number of its split, and the hash
    keys: bytes = b""  # of its documents, see `duplicates.key`; empty if duplicates are kept

    @classmethod
    def of(cls, tally: splits.Tally, keys: bytes) -> "Scanned":
        """What a tally says."""
        pairs = [(number, sha) for number, split in enumerate(SPLITS) for sha in sorted(tally.smallest[split])]
        smallest = b"".join(bytes([number]) + bytes.fromhex(sha) for number, sha in pairs)
        return cls(**{name: getattr(tally, name) for name in COUNTS}, smallest=smallest, keys=keys)

    def tally(self, val: float, test: float) -> splits.Tally:
        """The tally that it was made of. val, test: shares of the splits."""
        found = splits.Tally(val, test, *(getattr(self, name) for name in COUNTS))
        for place in range(0, len(self.smallest), HASH_BYTES + 1):
            sha256 = self.smallest[place + 1 : place + 1 + HASH_BYTES].hex()
            found.smallest[SPLITS[self.smallest[place]]].add(sha256)
        return found

    @property
    def only(self) -> str:
        """The hash of its document, if it has but one."""
        assert self.documents == 1, self.documents
        return self.smallest[1:].hex()


class Scans:
    """What scans found in the sources of a sequence: of those that were rejected, or not yet scanned, nothing.

    Takes about 15 bytes for each, if it has few documents, and 24 for each document while duplicates are sought.
    """

    def __init__(self, count: int, total: splits.Tally | None = None, *, only: bool = False) -> None:
        """total: the tally of all documents; None if only their sizes count. only: keep the hash of a document."""
        self.total = total
        self.found = np.zeros(count, bool)
        self.documents, self.size = Numbers(count), Numbers(count)
        self.records_rejected, self.records_empty = Numbers(count), Numbers(count)
        self.keys, self.first = bytearray(), Numbers(count)  # of documents, and which of them is the first of a source
        self.hashes = bytearray(HASH_BYTES * count) if only else None

    def put(self, number: int, scanned: Scanned) -> None:
        """What was found in a source, by its number."""
        self.found[number] = True
        self.size[number] = scanned.size
        if self.total is None:
            return
        self.total.merge(scanned.tally(self.total.val, self.total.test))
        for name in ("documents", "records_rejected", "records_empty"):
            getattr(self, name)[number] = getattr(scanned, name)
        self.first[number] = len(self.keys) // duplicates.KEY.itemsize
        self.keys += scanned.keys
        if self.hashes is not None and scanned.documents == 1:
            self.hashes[HASH_BYTES * number : HASH_BYTES * (number + 1)] = bytes.fromhex(scanned.only)

    def only(self, number: int) -> str:
        """The hash of a source's document, if it has but one."""
        assert self.hashes is not None
        assert self.documents[number] == 1, number
        return self.hashes[HASH_BYTES * number : HASH_BYTES * (number + 1)].hex()

    def starts(self) -> Places:
        """Where each source begins in the corpus, if they follow each other."""
        sizes = self.size.values
        found = np.cumsum(sizes, dtype=np.int64)
        found -= sizes
        return found

    def dropped(self, starts: Places, numbers: Places) -> duplicates.Dropped:
        """The documents to drop of sources in order of preference; after this, their keys are gone."""
        counts = self.documents.values[numbers]
        keys = duplicates.in_order(self.keys, self.first.values[numbers], counts)
        self.keys, self.first = bytearray(), Numbers(0)
        return duplicates.find(starts[numbers], counts, keys)


@dataclass(frozen=True)
class Scanner:
    """Scans groups of sources, in a worker process. What it finds depends on these fields and the sources' bytes."""

    tokenizer: Tokenizer
    val: float  # shares of the splits, for the tally
    test: float
    drop: bool  # whether duplicates will be dropped
    keep: bool = False  # leave each result beside the staged file, for another process to `kept`

    def __call__(self, group: list[Source]) -> list[Scanned | Rejected]:
        """For each source what was found, or why it can't be used."""
        if len(group) > 1:
            self.tokenizer.stage(group)
        return [self._scan(source) for source in group]

    def _scan(self, source: Source) -> Scanned | Rejected:
        if self.keep and (before := self.kept(source)) is not None:  # this is a second try
            return before
        try:
            result: Scanned | Rejected = self._found(source)
        except Rejected as reason:
            result = reason
        if self.keep:
            self.leave(source, result)
        return result

    def _found(self, source: Source) -> Scanned:
        """Scan a source; records that can't be used are listed in a file, since there may be very many."""
        tally, keys = splits.Tally(self.val, self.test), bytearray()
        with ExitStack() as stack:
            stream = None
            for found in self.tokenizer.scan(source):
                tally.add(found)
                if isinstance(found, RejectedRecord):
                    stream = stream or stack.enter_context(open(rejected_records(source), "w", encoding="utf-8"))
                    line = {"sha256": source.sha256, "line": found.line, "reason": found.reason}
                    stream.write(json.dumps(line) + "\n")
                elif self.drop and found.size:
                    keys += duplicates.key(found)
        if not tally.documents:
            raise Rejected("is empty")
        return Scanned.of(tally, bytes(keys))

    def leave(self, source: Source, result: Scanned | Rejected) -> None:
        """Keep a result, unless its reason may pass."""
        if isinstance(result, Rejected):
            if result.passing:
                return
            found: dict[str, Any] = {"reason": str(result)}
        else:
            numbers = [getattr(result, name) for name in COUNTS]
            texts = [base64.b64encode(each).decode() for each in (result.smallest, result.keys)]
            found = {"found": [*numbers, *texts], "listed": _listed(source)}
        body = json.dumps([self._settings, found])
        # Whoever reads it has the checksum, so that it need not reach the disk at once.
        files.write(_place(source), json.dumps([body, _checksum(body)]), durable=False)

    def kept(self, source: Source) -> Scanned | Rejected | None:
        """The result that a process has left for these bytes and settings; None if there is none, or not all of it."""
        try:
            body, expected = json.loads(files.content(_place(source)))
            if _checksum(body) != expected:
                return None
        except (OSError, ValueError, TypeError, AttributeError):
            return None
        settings, found = json.loads(body)
        if settings != self._settings:
            return None
        if "reason" in found:
            return Rejected(found["reason"])
        if found["listed"] != _listed(source):
            return None
        *numbers, smallest, keys = found["found"]
        counts = dict(zip(COUNTS, numbers, strict=True))
        return Scanned(**counts, smallest=base64.b64decode(smallest), keys=base64.b64decode(keys))

    @property
    def _settings(self) -> list[Any]:
        return [self.val, self.test, self.drop]


def rejected_records(source: Source) -> Path:
    """Where the scan lists the records of a source that can't be used: lines of rejects.jsonl without its name."""
    return source.staged.with_name(source.staged.name + ".rejects.jsonl")


def _place(source: Source) -> Path:
    return source.staged.with_name(source.staged.name + ".scan")


def _listed(source: Source) -> str:
    """The hash of the list of rejected records; empty if there is none."""
    path = rejected_records(source)
    return files.sha256(path) if os.path.lexists(path) else ""


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
