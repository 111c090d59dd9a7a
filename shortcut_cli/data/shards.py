"""Shards: Megatron-LM's indexed dataset, with a manifest that is written last.

For each split, a folder holds `SPLIT-00000.bin`, the ids of its documents one after the other (little-endian uint16, or
int32 if the vocabulary needs it), and `SPLIT-00000.idx`, which says where each begins:

    magic      9 bytes  MMIDIDX and two zeros
    version    uint64   1
    dtype      uint8    8 = uint16, 4 = int32
    sequences  uint64   n
    documents  uint64   d + 1
    lengths    int32    n, tokens in each sequence
    pointers   int64    n, byte offset of each sequence in the .bin
    documents  int64    d + 1, index of the first sequence of each document, and n

(megatron/core/datasets/indexed_dataset.py.) A document is one sequence, or several if it is longer than
SEQUENCE_TOKENS, since lengths are int32. The folder also holds tokenizer/, documents.jsonl, rejects.jsonl and
manifest.json. A folder without a manifest is incomplete, and nothing reads it.
"""

import hashlib
import json
import os
import re
import shutil
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from shortcut_cli import files, registry
from shortcut_cli.data.documents import add_account
from shortcut_cli.errors import CheckFailed, UsageError, in_short
from shortcut_cli.formatting import to_json

FORMAT = 1
MANIFEST = "manifest.json"
PREVIOUS = "manifest.previous.json"  # in .partial: the manifest that another takes the place of
MOST_BYTES = 64_000_000  # of a manifest, and of a line in one of the lists
REJECT_KEYS = {"source", "sha256", "reason"}  # of each line of rejects.jsonl
PREPARE = "shortcut prepare"  # what marks a shards folder
SPLITS = registry.SPLITS
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, npt.DTypeLike] = {8: "<u2", 4: "<i4"}
UINT16_VOCABULARY = 65500  # Megatron's own limit for uint16 (DType.optimal_dtype)
SEQUENCE_TOKENS = 2**30
OWN_MANIFEST = re.compile(r'\{\s*"format": \d+,\s*"request": \{')  # its beginning
SHARD_FILE = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.(bin|idx)")

Ids = npt.NDArray[np.int64]


class SplitWriter:
    """Writes the documents of one split in the order they are added; keeps 8 bytes per document in memory."""

    def __init__(self, folder: Path, split: str, vocabulary: int, shard_tokens: int) -> None:
        self.folder = folder
        self.split = split
        self.code = dtype_code(vocabulary)
        self.shard_tokens = shard_tokens
        self.shard = -1
        self.tokens = 0
        self.lengths, self.documents = array("i"), array("q")
        self.hashes: dict[str, str] = {}
        self._open_next()

    def add(self, blocks: Iterable[npt.NDArray[Any]], eos: int) -> tuple[int, int, int]:
        """Append a document: its blocks of ids, then EOS. Returns (shard, offset in tokens, tokens).

        A document that is larger than what is left of a shard opens the next; one larger than any shard has its own.
        """
        start, before = self.tokens, self.digest.copy()
        for block in chain(blocks, [np.array([eos])]):
            if start and self.tokens + len(block) > self.shard_tokens:
                self._move(start, before)
                start = 0
            self._write(block)
        self.lengths.extend(sequences(self.tokens - start))
        self.documents.append(len(self.lengths))
        return self.shard, start, self.tokens - start

    def _move(self, start: int, digest: "hashlib._Hash") -> None:
        """Move the ids from `start` on into the next shard. digest: of the ids before them."""
        full, position = self.stream, start * np.dtype(DTYPES[self.code]).itemsize
        full.flush()
        lengths, documents, shard, tokens = self.lengths, self.documents, self.shard, self.tokens - start
        self._open_next()
        with open(full.name, "rb") as moved:
            moved.seek(position)
            while block := moved.read(files.BLOCK_BYTES):
                self.digest.update(block)
                self.stream.write(block)
        full.truncate(position)
        self._finish(full, shard, digest, lengths, documents)
        self.tokens = tokens

    def close(self) -> None:
        """Finish the last shard."""
        self._close_shard()

    def _write(self, ids: npt.NDArray[Any]) -> None:
        content = ids.astype(DTYPES[self.code]).tobytes()
        self.digest.update(content)
        with files.naming(self.folder):
            self.stream.write(content)
        self.tokens += len(ids)

    def _open_next(self) -> None:
        self.shard += 1
        self.stream = open(self.folder / f"{self.split}-{self.shard:05d}.bin", "wb")  # noqa: SIM115
        self.digest = hashlib.sha256()
        self.tokens = 0
        self.lengths = array("i")
        self.documents = array("q", [0])

    def _close_shard(self) -> None:
        self._finish(self.stream, self.shard, self.digest, self.lengths, self.documents)

    def _finish(
        self,
        stream: BinaryIO,
        shard: int,
        digest: "hashlib._Hash",
        lengths: "array[int]",
        documents: "array[int]",
    ) -> None:
        stream.flush()
        os.fsync(stream.fileno())
        stream.close()
        name = f"{self.split}-{shard:05d}"
        self.hashes[f"{name}.bin"] = digest.hexdigest()
        files.write(self.folder / f"{name}.idx", index(self.code, lengths, documents))


def dtype_code(vocabulary: int) -> int:
    """The code in an .idx file of the type in which ids of a vocabulary are kept."""
    return 8 if vocabulary < UINT16_VOCABULARY else 4


def sequences(tokens: int) -> list[int]:
    """The lengths of the sequences that a document is kept as."""
    return [min(SEQUENCE_TOKENS, tokens - first) for first in range(0, tokens, SEQUENCE_TOKENS)]


def index(code: int, lengths: "array[int]", documents: "array[int]") -> bytes:
    """The bytes of an .idx file for sequences of these lengths and documents that start at these sequences."""
    sizes = np.asarray(lengths, dtype=np.int64)
    pointers = np.zeros(len(sizes), np.int64)
    np.cumsum(sizes[:-1] * np.dtype(DTYPES[code]).itemsize, out=pointers[1:])
    return b"".join(
        (
            HEADER.pack(MAGIC, 1, code, len(sizes), len(documents)),
            sizes.astype("<i4").tobytes(),
            pointers.astype("<i8").tobytes(),
            np.asarray(documents).astype("<i8").tobytes(),
        )
    )


class FolderWriter:
    """Writes a shards folder: everything goes to FOLDER/.partial until `finish` moves it into place."""

    def __init__(self, folder: Path, vocabulary: int, shard_tokens: int, *, eos: int) -> None:
        self.folder = folder
        self.partial = folder / ".partial"
        self.eos = eos
        discard(folder)
        files.make_folder(self.partial / "tokenizer")
        self.splits = {name: SplitWriter(self.partial, name, vocabulary, shard_tokens) for name in SPLITS}
        self.counts: dict[str, dict[str, Any]] = {name: {"documents": 0, "tokens": 0, "units": {}} for name in SPLITS}
        self.account: dict[str, float] = {}  # of all documents but variants
        self.hashes: dict[str, str] = {}  # of .bin files that others have written
        self.documents = open(self.partial / "documents.jsonl", "w", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> "FolderWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self.splits.values():
            writer.stream.close()
        self.documents.close()
        discard(self.folder)  # of no use any more if `finish` did not end

    def add(
        self, split: str, blocks: Iterable[npt.NDArray[Any]], units: dict[str, float], record: dict[str, Any]
    ) -> int:
        """Append a document to a split, with a line in documents.jsonl; returns its number of tokens, EOS included.

        An "account" in the record is added to the manifest's.
        """
        shard, offset, tokens = self.splits[split].add(blocks, self.eos)
        self.place(split, shard, offset, tokens, units, record)
        return tokens

    def place(
        self, split: str, shard: int, offset: int, tokens: int, units: dict[str, float], record: dict[str, Any]
    ) -> None:
        """List and count a document that is at this place, or will be."""
        place = {"split": split, "shard": shard, "offset": offset, "tokens": tokens, "units": units}
        self.documents.write(to_json(record | place) + "\n")
        if "variant" not in record:
            add_account(self.account, record.get("account", {}))
        count = self.counts[split]
        count["documents"] += 1
        count["tokens"] += tokens
        for unit, amount in units.items():
            count["units"][unit] = count["units"].get(unit, 0) + amount

    def leave_shards(self) -> None:
        """Write no shards, since others do; they put the hashes of the .bin files into `hashes`."""
        for writer in self.splits.values():
            writer.stream.close()
        self.splits = {}

    def finish(self, rejects: Iterable[dict[str, Any]], fields: dict[str, Any]) -> dict[str, Any]:
        """Move everything into place, the manifest last; returns it.

        The tokenizer's files must have been saved to `partial`/tokenizer. The manifest is in `partial` before anything
        moves, and so is the one that it takes the place of: whatever kills the process, what is ours is known.

        Raises UsageError if something that is not ours is in the way.
        """
        for writer in self.splits.values():
            writer.close()
        self.documents.flush()
        os.fsync(self.documents.fileno())
        self.documents.close()
        with files.writing(self.partial / "rejects.jsonl") as stream:
            stream.writelines((to_json(line) + "\n").encode() for line in rejects)
        for writer in self.splits.values():
            self.hashes |= writer.hashes
        listed = {}
        for path in sorted(path for path in self.partial.rglob("*") if path.is_file()):
            name = path.relative_to(self.partial).as_posix()
            listed[name] = {"bytes": path.stat().st_size, "sha256": self.hashes.get(name) or files.sha256(path)}
        manifest = {"format": FORMAT, **fields, "splits": self.counts, "account": self.account, "files": listed}
        manifest["checksum"] = _checksum(manifest)
        check_free(self.folder)
        files.write(self.partial / MANIFEST, to_json(manifest, indent=1) + "\n")
        if (self.folder / MANIFEST).exists():  # of an unfinished preparation
            os.replace(self.folder / MANIFEST, self.partial / PREVIOUS)
            _remove_own(self.folder, self.partial / PREVIOUS)
        for path in self.partial.iterdir():
            if path.name not in (MANIFEST, PREVIOUS):
                os.replace(path, self.folder / path.name)
        files.sync_folder(self.folder)
        os.replace(self.partial / MANIFEST, self.folder / MANIFEST)
        files.sync_folder(self.folder)
        return manifest


def check_free(folder: Path) -> None:
    """Raise UsageError, with names, if files that we did not write have the names of those that make up shards.

    Ours is what a manifest lists and has the bytes that it says: one in the folder, or those that a preparation left
    that was killed while it moved its files. A rejects.jsonl without a manifest is known by its lines.
    """
    manifests = (folder / MANIFEST, *(folder / ".partial" / name for name in (MANIFEST, PREVIOUS)))
    lists = [_listed(path) for path in manifests]
    names = [path.name for path in folder.iterdir() if SHARD_FILE.fullmatch(path.name)]
    names += [name for name in ("documents.jsonl", "tokenizer") if os.path.lexists(folder / name)]
    if (folder / "tokenizer").is_dir() and not (folder / "tokenizer").is_symlink():
        names.remove("tokenizer")
        names += [path.relative_to(folder).as_posix() for path in (folder / "tokenizer").rglob("*")]
    if os.path.lexists(folder / "rejects.jsonl") and not is_list_of_rejects(folder / "rejects.jsonl"):
        names.append("rejects.jsonl")
    foreign = sorted(name for name in names if not any(_is_own(folder, name, entries) for entries in lists))
    if foreign:
        more = f" and {len(foreign) - 5:,} more" if len(foreign) > 5 else ""
        raise UsageError(
            f"{folder} holds files that shortcut may not have written: {', '.join(foreign[:5])}{more}",
            "move them away, or choose another --out",
        )


def discard(folder: Path) -> None:
    """Remove what a preparation left that did not end: .partial, and what it had moved out of there."""
    if not (folder / MANIFEST).exists():
        for name in (PREVIOUS, MANIFEST):
            _remove_own(folder, folder / ".partial" / name)
    shutil.rmtree(folder / ".partial", ignore_errors=True)


def _remove_own(folder: Path, manifest: Path) -> None:
    """Remove the files that a manifest lists, if they have the bytes that it says."""
    entries = _listed(manifest)
    for name in entries:
        if _is_own(folder, name, entries):
            (folder / name).unlink()
    with suppress(OSError):  # there is none, or something is in it
        (folder / "tokenizer").rmdir()


def _listed(manifest: Path) -> dict[str, Any]:
    """The files of a manifest; none if it is missing or damaged."""
    if not manifest.is_file():
        return {}
    try:
        return _read(manifest)["files"]  # type: ignore[no-any-return]
    except CheckFailed:
        return {}


def _is_own(folder: Path, name: str, entries: dict[str, Any]) -> bool:
    """Whether a file is one of those that a manifest lists, unaltered."""
    path = folder / name
    if name not in entries or path.is_symlink() or path.parent.is_symlink() or not path.is_file():
        return False
    size, sha256 = entries[name]["bytes"], entries[name]["sha256"]
    return bool(path.stat().st_size == size and files.sha256(path) == sha256)


def is_list_of_rejects(path: Path, keys: set[str] = REJECT_KEYS) -> bool:
    """Whether a file is a rejects.jsonl of ours: each line has these keys."""
    try:
        return not path.is_symlink() and all(read_lines(path, lambda line: line.keys() >= keys))
    except (OSError, CheckFailed):
        return False


def _checksum(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a shards folder.

    Raises UsageError if there is none, CheckFailed if it is damaged or from a future version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        known = files.owner(folder) == PREPARE
        state = (
            "is incomplete (it has no manifest.json)" if known else "is not a shards folder (it has no manifest.json)"
        )
        raise UsageError(f"{folder} {state}", "`shortcut prepare audio|midi|text PATH... --out DIR` makes one")
    return _read(path)


def _read(path: Path) -> dict[str, Any]:
    """A manifest. Raises CheckFailed if it is damaged or from a future version."""
    try:
        manifest = json.loads(files.content(path, MOST_BYTES))
        found = manifest["format"], manifest["checksum"]
        expected = _checksum(manifest)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise CheckFailed(f"{path} is damaged: {in_short(error)}", "prepare the folder again") from error
    if found[0] != FORMAT:
        raise CheckFailed(f"{path} has format {found[0]!r}; this version reads {FORMAT}", "update shortcut")
    if found[1] != expected:
        raise CheckFailed(f"{path} was changed after it was written", "prepare the folder again")
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckFailed(f"{path} is damaged: {where}: {first['msg']}", "prepare the folder again") from error
    assert isinstance(manifest, dict)
    return manifest


def is_shards(folder: Path) -> bool:
    """Whether a folder without a marker holds shards: a manifest of ours, whole or not."""
    try:
        with files.regular(folder / MANIFEST) as stream:
            return OWN_MANIFEST.match(stream.read(100).decode(errors="replace")) is not None
    except OSError:
        return False


def _inside(name: str) -> str:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or not parts.name or "\0" in name:
        raise ValueError("points outside the folder")
    return name


Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]


class _File(BaseModel):
    bytes: Count
    sha256: str


class _Split(BaseModel):
    documents: Count
    tokens: Count
    units: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class _Splits(BaseModel):
    train: _Split
    val: _Split
    test: _Split


class _Tokenizer(BaseModel):
    name: str
    fingerprint: str
    vocabulary: Annotated[int, Field(ge=1, le=2**31)]
    end: Count
    unit: str

    @model_validator(mode="after")
    def _end_is_an_id(self) -> "_Tokenizer":
        if self.end >= self.vocabulary:
            raise ValueError("its end is not in its vocabulary")
        return self


class _Request(BaseModel):
    tokenizer: dict[str, Any] = {}
    data: dict[str, Any] = {}


class _Manifest(BaseModel):
    """The fields of a manifest that readers rely on; there are others."""

    files: dict[Annotated[str, AfterValidator(_inside)], _File]
    splits: _Splits
    tokenizer: _Tokenizer
    request: _Request
    split: str = ""
    inputs: Count = 0
    duplicates: Count = 0
    documents_duplicated: Count = 0
    rejected: Count = 0
    outside_splits: Count = 0
    records: Count = 0
    records_rejected: Count = 0
    unfinished: Count = 0
    account: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}


def source_paths_file(manifest: dict[str, Any]) -> Path:
    """The file in this machine's cache that lists the paths a shards folder was made from.

    The folder itself does not list them, since its bytes must not depend on the location of its sources.
    """
    return files.cache_folder() / "sources" / f"{manifest['checksum']}.json"


@dataclass(frozen=True)
class Shard:
    """One .bin/.idx pair, memory-mapped."""

    ids: npt.NDArray[Any]  # (tokens,) uint16 or int32
    lengths: npt.NDArray[np.int32]  # tokens of each sequence
    documents: npt.NDArray[np.int64]  # first sequence of each document, then the number of sequences


def read_shard(stem: Path) -> Shard:
    """Open STEM.bin and STEM.idx; every size in the index is checked against the files before it is used.

    Raises CheckFailed if the two do not belong together.
    """
    idx, data = stem.with_name(stem.name + ".idx"), stem.with_name(stem.name + ".bin")
    try:
        size, content = data.stat().st_size, np.memmap(idx, np.uint8, "r")
    except (OSError, ValueError) as error:
        raise CheckFailed(f"{stem}.bin and .idx can't be read: {error}", "prepare the folder again") from error
    if len(content) < HEADER.size:
        raise CheckFailed(f"{idx} is cut off: {len(content)} bytes")
    magic, version, code, sequences, documents = HEADER.unpack(content[: HEADER.size].tobytes())
    if magic != MAGIC or version != 1 or code not in DTYPES:
        raise CheckFailed(f"{idx} is not a Megatron index of version 1 with uint16 or int32 tokens")
    if len(content) != HEADER.size + 12 * sequences + 8 * documents:
        raise CheckFailed(
            f"{idx} has {len(content)} bytes, which does not fit {sequences} sequences, {documents} documents"
        )
    dtype = np.dtype(DTYPES[code])
    lengths = np.frombuffer(content, "<i4", sequences, HEADER.size)
    starts = np.frombuffer(content, "<i8", documents, HEADER.size + 12 * sequences)
    if (lengths < 0).any() or int(lengths.sum(dtype=np.int64)) * dtype.itemsize != size:
        raise CheckFailed(f"{data} has {size} bytes, {idx.name} describes a different size")
    ordered = documents > 0 and starts[0] == 0 and starts[-1] == sequences and (np.diff(starts) >= 0).all()
    if not ordered:
        raise CheckFailed(f"{idx} has document indices out of order")
    ids = np.memmap(data, dtype, "r") if size else np.zeros(0, dtype)
    return Shard(ids, lengths, starts)


class Split:
    """All documents of one split as one sequence of ids, read on demand."""

    def __init__(self, folder: Path, name: str, manifest: dict[str, Any]) -> None:
        self.name = name
        self.units: dict[str, float] = manifest["splits"][name]["units"]
        mine = [file for file in manifest["files"] if file.startswith(f"{name}-") and file.endswith(".bin")]
        stems = sorted(file.removesuffix(".bin") for file in mine)
        for stem in stems:
            for ending in (".bin", ".idx"):
                _check_size(folder, stem + ending, manifest)
        self.files = [folder / f"{stem}.bin" for stem in stems]
        self.vocabulary = int(manifest["tokenizer"]["vocabulary"])
        self.shards = [read_shard(folder / stem) for stem in stems]
        self.ends = np.cumsum([len(shard.ids) for shard in self.shards], dtype=np.int64)
        self.tokens = int(self.ends[-1]) if stems else 0
        expected = manifest["splits"][name]["tokens"]
        if self.tokens != expected:
            raise CheckFailed(f"{folder}: {name} has {self.tokens} tokens, the manifest says {expected}")

    def read(self, start: int, length: int) -> Ids:
        """Ids start .. start + length of the split, int64 (length,), across shards if necessary.

        Raises CheckFailed if one of them is not in the vocabulary.
        """
        assert 0 <= start <= start + length <= self.tokens, (start, length, self.tokens)
        out = np.empty(length, np.int64)
        shard = int(np.searchsorted(self.ends, start, side="right"))
        done = 0
        while done < length:
            ids = self.shards[shard].ids
            begin = start + done - (int(self.ends[shard]) - len(ids))
            part = ids[begin : begin + length - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        if length and out.view(np.uint64).max() >= self.vocabulary:  # negative ones are the largest of all
            raise self._foreign(start, out)
        return out

    def _foreign(self, start: int, ids: Ids) -> CheckFailed:
        """The error for ids, from token `start` on, of which one is not in the vocabulary."""
        first = int((ids.view(np.uint64) >= self.vocabulary).argmax())
        shard = int(np.searchsorted(self.ends, start + first, side="right"))
        place = start + first - (int(self.ends[shard]) - len(self.shards[shard].ids))
        return CheckFailed(
            f"{self.files[shard]} is damaged: its token {place:,} is {ids[first]:,}, but there are only "
            f"{self.vocabulary:,} different ids",
            "prepare the folder again",
        )

    def document_tokens(self) -> Ids:
        """Tokens of each document, EOS included, int64 (documents,)."""
        sums = []
        for shard in self.shards:
            cumulative = np.concatenate([[0], np.cumsum(shard.lengths, dtype=np.int64)])
            sums.append(np.diff(cumulative[shard.documents]))
        return np.concatenate(sums) if sums else np.zeros(0, np.int64)


class Shards:
    """A complete shards folder. Opening it checks the manifest; opening a split checks its sizes and indices."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.tokenizer: dict[str, Any] = self.manifest["tokenizer"]

    def split(self, name: str) -> Split:
        """Open one split."""
        return Split(self.folder, name, self.manifest)


def read_lines(path: Path, is_whole: Callable[[Any], bool]) -> Iterator[dict[str, Any]]:
    """The lines of documents.jsonl or rejects.jsonl.

    Raises CheckFailed, with its number, at a line that is not JSON or not `is_whole`.
    """
    with files.regular(path) as stream:
        for number, text in enumerate(iter(lambda: stream.readline(MOST_BYTES + 1), b""), 1):
            try:
                line = json.loads(text) if len(text) <= MOST_BYTES else None
            except (ValueError, RecursionError):
                line = None
            if not isinstance(line, dict) or not is_whole(line):
                raise CheckFailed(f"{path} is damaged: line {number:,} can't be read", "prepare the folder again")
            yield line


def document_lines(path: Path, split: str) -> list[int]:
    """Where the line of each document of a split begins in documents.jsonl, in bytes."""
    mark, found, place = f'"split": {json.dumps(split)}'.encode(), [], 0  # in a name its quotes would be escaped
    with files.regular(path) as stream:
        for text in iter(lambda: stream.readline(MOST_BYTES + 1), b""):
            if mark in text:
                found.append(place)
            place += len(text)
    return found


def document_at(path: Path, place: int) -> dict[str, Any]:
    """The line of a document that begins at a place. Raises CheckFailed if it is none."""
    with files.regular(path) as stream:
        stream.seek(place)
        try:
            line = json.loads(stream.readline(MOST_BYTES))
        except (ValueError, RecursionError):
            line = None
    if not isinstance(line, dict) or not isinstance(line.get("source"), str):
        raise CheckFailed(f"{path} is damaged: its line at byte {place:,} can't be read", "prepare the folder again")
    return line


def warning(folder: Path, manifest: dict[str, Any]) -> str:
    """A line for whoever uses an unfinished preparation; empty if it is finished."""
    missing = manifest.get("unfinished", 0)
    return f"{folder} is unfinished: it lacks {missing:,} files; `shortcut prepare` tries them again" if missing else ""


def _check_size(folder: Path, name: str, manifest: dict[str, Any]) -> None:
    path = folder / name
    expected = manifest["files"].get(name, {}).get("bytes")
    if expected is None or not path.is_file():
        raise CheckFailed(f"{path} is missing", "prepare the folder again")
    if path.stat().st_size != expected:
        raise CheckFailed(
            f"{path} has {path.stat().st_size} bytes, the manifest says {expected}", "prepare the folder again"
        )


def verify(folder: Path) -> Iterator[str]:
    """Compare every file of a shards folder with the manifest, byte for byte; yields a line for each that differs."""
    manifest = read_manifest(folder)
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for name, entry in manifest["files"].items():
        path = folder / name
        if name not in present:
            yield f"{name} is missing"
        elif path.stat().st_size != entry["bytes"]:
            yield f"{name} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}"
        elif files.sha256(path) != entry["sha256"]:
            yield f"{name} has changed since it was written"
    staged = {name for name in present if name.startswith(".staging/") and manifest.get("unfinished")}
    for name in sorted(present - staged - manifest["files"].keys() - {MANIFEST, files.MARKER, files.PAGE, ".lock"}):
        yield f"{name} does not belong to the folder"
