"""Prepare: files -> a shards folder whose bytes depend on the files, the recipe and the tokenizer alone.

Survey in worker processes (which documents are there?), then the splits, then what the tokenizer learns from the
training split, then one pass that writes ids in a canonical order. What a survey staged on disk survives a kill.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shortcut_cli import files, inputs, registry, splits, workers
from shortcut_cli.errors import Rejected, TooManyRejects, UsageError
from shortcut_cli.recipe import Recipe, differences
from shortcut_cli.shards import FolderWriter, noted_paths, read_manifest
from shortcut_cli.tokenizers.base import Assign, Document, Source, Tokenizer

Report = Callable[..., None]


@dataclass
class Reject:
    """A file, or a variant of one, that is not used."""

    source: str
    sha256: str | None
    reason: str
    variant: str = ""

    def line(self) -> dict[str, Any]:
        """What rejects.jsonl says of it."""
        variant = {"variant": self.variant} if self.variant else {}
        return {"source": self.source, "sha256": self.sha256, **variant, "reason": self.reason}


def too_many(rejected: int, inputs_: int, limit: str) -> bool:
    """Whether more files were rejected than `limit` ("3" files, or "1%" of all) allows.

    Raises UsageError where the limit is neither.
    """
    text, percent = limit.removesuffix("%").strip(), limit.endswith("%")
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not math.isfinite(number) or number < 0 or (not percent and number != int(number)):
        raise UsageError(f"--max-bad {limit} is neither a number of files nor a percentage", "for example 3 or 1%")
    return rejected > (inputs_ * number / 100 if percent else number)


def prepare(
    recipe: Recipe, paths: Iterable[str], folder: Path, *, n_workers: int, max_bad: str, report: Report
) -> dict[str, Any]:
    """Tokenize the files behind `paths` into a shards folder.

    Returns the manifest, with "worked" telling whether there was anything to do, "ignored", the number of files that
    were passed over for their suffix, and "tokens_per_s". The folder is complete also where too many were rejected.

    Raises UsageError where nothing can be read or the folder holds something else, TooManyRejects as said.
    """
    too_many(0, 1, max_bad)
    paths = list(paths)
    tokenizer: Tokenizer = registry.load(registry.TOKENIZERS, recipe.tokenizer.name)(recipe.tokenizer)
    found = inputs.find(paths, tokenizer.suffixes)
    if not found.files and not found.rejects:
        raise UsageError(f"no {' '.join(tokenizer.suffixes)} files in {' '.join(map(str, paths))}")
    _check_ours(folder)
    began = time.monotonic()
    with files.held(folder, "shortcut prepare"):
        hashed, rejects = _hash(found, n_workers, report)
        request = _request(recipe, hashed)
        manifest = _already(folder, request)
        summary: dict[str, Any] = {"worked": manifest is None, "ignored": found.ignored}
        if manifest is None:
            job = _Job(recipe, tokenizer, folder, n_workers, report)
            job.rejects += rejects
            manifest = job.run(hashed, request)
            tokens = sum(split["tokens"] for split in manifest["splits"].values())
            summary["tokens_per_s"] = round(tokens / (time.monotonic() - began), 1)
        _note_paths(manifest, paths, report)
    if too_many(manifest["rejected"], manifest["inputs"], max_bad):
        raise TooManyRejects(
            f"{manifest['rejected']} of {manifest['inputs']} files were rejected, more than --max-bad {max_bad}",
            f"the rest is complete in {folder}; the reasons stand in {folder / 'rejects.jsonl'}",
        )
    return manifest | summary


def _note_paths(manifest: dict[str, Any], paths: list[str], report: Report) -> None:
    """Remember in the cache where the sources lie, for `shortcut prove tokens`."""
    note = noted_paths(manifest)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        files.write(note, json.dumps([os.path.abspath(path) for path in paths]))
    except OSError as error:
        report("note", text=f"`shortcut prove tokens` will have to be told the paths: {note}: {error.strerror}")


def _check_ours(folder: Path) -> None:
    """Refuse a folder that holds anything but an unfinished or finished preparation."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", "choose another --out")
    ours = (".lock", ".partial", ".staging", "manifest.json")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).exists() for name in ours):
        raise UsageError(f"{folder} is not empty and is not a shards folder", "choose another --out")


@dataclass(frozen=True)
class Input:
    """A file with its hash, and the other files that hold the same bytes."""

    relative: str
    path: Path
    sha256: str
    duplicates: tuple[str, ...] = ()


def _hash(found: inputs.Found, threads: int, report: Report) -> tuple[list[Input], list[Reject]]:
    """Hash every file; keep equal ones once, under their first name."""
    rejects = [Reject(relative, None, reason) for relative, reason in found.rejects]
    by_hash: dict[str, list[tuple[str, Path]]] = {}

    def digest(path: Path) -> str | OSError:
        try:
            return files.sha256(path)
        except OSError as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        results = pool.map(digest, (path for _, path in found.files))
        for done, ((relative, path), result) in enumerate(zip(found.files, results, strict=True), 1):
            if isinstance(result, OSError):
                rejects.append(Reject(relative, None, f"can't be read: {result.strerror}"))
            else:
                by_hash.setdefault(result, []).append((relative, path))
            report("progress", task="read", done=done, total=len(found.files), unit="files")
    kept = [Input(*same[0], sha, tuple(relative for relative, _ in same[1:])) for sha, same in by_hash.items()]
    return sorted(kept, key=lambda file: (file.relative, file.sha256)), rejects


def _request(recipe: Recipe, hashed: list[Input]) -> dict[str, Any]:
    """All that was asked for, to tell a repeated command from another one."""
    lines = [json.dumps([file.relative, file.sha256, *file.duplicates]) for file in hashed]
    data = recipe.data.model_dump(exclude={"shards", "file_timeout_s", "file_memory_mb"})
    content = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    inputs_ = {"files": sum(1 + len(file.duplicates) for file in hashed), "sha256": content}
    return {"data": data, "tokenizer": recipe.tokenizer.model_dump(), "inputs": inputs_}


def _already(folder: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest where the same was prepared before; None where nothing was. Raises UsageError where it differs."""
    if not (folder / "manifest.json").exists():
        return None
    manifest = read_manifest(folder)
    changes = differences(manifest.get("request", {}), request)
    if changes:
        raise UsageError(
            f"{folder} was prepared from something else\n" + "\n".join(f"  {line}" for line in changes),
            "choose another --out, or remove the folder",
        )
    return manifest


def _survey(tokenizer: Tokenizer, val: float, test: float, group: list[Source]) -> list[splits.Tally | Rejected]:
    """In a worker process: read sources to their ends, or say why one can't be used."""
    if len(group) > 1:
        tokenizer.stage(group)
    found: list[splits.Tally | Rejected] = []
    for source in group:
        tally = splits.Tally(val, test)
        try:
            for document in tokenizer.survey(source):
                tally.add(document)
        except Rejected as reason:
            found.append(reason)
        else:
            found.append(tally)
    return found


class _Job:
    """One preparation: what its steps share."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, folder: Path, n_workers: int, report: Report) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.folder = folder
        self.n_workers = n_workers
        self.report = report
        self.rejects: list[Reject] = []
        key = json.dumps([recipe.tokenizer.model_dump(), tokenizer.description], sort_keys=True)
        self.staging = folder / ".staging" / hashlib.sha256(key.encode()).hexdigest()[:16]
        self.staging.mkdir(parents=True, exist_ok=True)

    def run(self, hashed: list[Input], request: dict[str, Any]) -> dict[str, Any]:
        """Survey, divide, fit, write; returns the manifest."""
        surveyed = self._survey([self._source(file) for file in hashed], "survey")
        total = self._add_up(surveyed)
        sources = _line_up(surveyed)
        cut = self.recipe.data.split == "contiguous" or total.different < splits.ENOUGH
        assign = splits.contiguous(total) if cut else splits.by_document(total)
        if self.tokenizer.needs_fit:
            self.report("note", text="training the tokenizer on the training split")
            remark = self.tokenizer.fit(sources, assign)
            if remark:
                self.report("note", text=remark)
        work = [(source, assign) for source in sources] + self._variants(surveyed, assign, cut)
        work.sort(key=lambda item: (item[0].relative, item[0].sha256, item[0].variant))
        duplicates = {file.sha256: list(file.duplicates) for file in hashed if file.duplicates}
        vocabulary, end = self.tokenizer.vocabulary, self.tokenizer.end
        with FolderWriter(self.folder, vocabulary, self.recipe.data.shard_tokens, end=end) as writer:
            self._write(writer, work, duplicates)
            fields = {"request": request, "split": "contiguous" if cut else "documents", **self._fields(hashed)}
            manifest = writer.finish(self._reject_lines(duplicates), fields)
        shutil.rmtree(self.folder / ".staging")
        return manifest

    def _source(self, file: Input, variant: str = "") -> Source:
        name = f"{file.sha256}{'.' + variant if variant else ''}.ids"
        return Source(file.path, file.relative, file.sha256, self.staging / name, variant)

    def _survey(self, sources: list[Source], task: str) -> list[tuple[Source, splits.Tally]]:
        """Survey in worker processes; sources that are rejected are noted and left out."""
        found: dict[Source, splits.Tally | Rejected] = {}
        groups = self.tokenizer.group(sources, self.n_workers)
        while groups:
            broken: list[Source] = []
            for group, results in self._in_workers(groups):
                if isinstance(results, Rejected) and len(group) > 1:
                    broken += group  # one of them took the process with it: which one, they show alone
                    continue
                found |= zip(group, [results] if isinstance(results, Rejected) else results, strict=True)
                self.report("progress", task=task, done=len(found), total=len(sources), unit="files")
            groups = [[source] for source in broken]
        kept: list[tuple[Source, splits.Tally]] = []
        for source in sources:
            result = found[source]
            if isinstance(result, Rejected):
                self.rejects.append(Reject(source.relative, source.sha256, str(result), source.variant))
            else:
                kept.append((source, result))
        return kept

    def _in_workers(self, groups: list[list[Source]]) -> Iterator[tuple[list[Source], Any]]:
        data = self.recipe.data
        return workers.in_order(
            _survey,
            groups,
            (self.tokenizer, data.val, data.test),
            workers=max(1, min(self.n_workers, len(groups))),
            timeout_s=data.file_timeout_s,
            memory_mb=data.file_memory_mb,
        )

    def _add_up(self, surveyed: list[tuple[Source, splits.Tally]]) -> splits.Tally:
        total = splits.Tally(self.recipe.data.val, self.recipe.data.test)
        for _, tally in surveyed:
            total.merge(tally)
        if not total.documents:
            raise _nothing_left(self.rejects)
        return total

    def _variants(
        self, surveyed: list[tuple[Source, splits.Tally]], assign: Assign, cut: bool
    ) -> list[tuple[Source, Assign]]:
        """The augmented forms of the training documents, surveyed, all for the training split."""
        names = self.tokenizer.variants
        if not names:
            return []
        if cut:
            raise UsageError("augmentation needs at least three different files and data.split = 'documents'")
        train = [source for source, tally in surveyed if _is_train(source, tally, assign)]
        wanted = [
            self._source(Input(source.relative, source.path, source.sha256), name) for source in train for name in names
        ]
        kept = self._survey(wanted, "augment")
        return [(replace(source, size=tally.size), _all_train) for source, tally in kept]

    def _write(self, writer: FolderWriter, work: list[tuple[Source, Assign]], duplicates: dict[str, list[str]]) -> None:
        for done, (source, assign) in enumerate(work, 1):
            same = {"duplicates": duplicates[source.sha256]} if source.sha256 in duplicates else {}
            variant = {"variant": source.variant} if source.variant else {}
            for piece in self.tokenizer.encode(source, assign, self.n_workers):
                record = {"source": source.relative, "sha256": piece.document.sha256, **variant, **same}
                writer.add(piece.split, piece.ids, piece.units, record)
            self.report("progress", task="write", done=done, total=len(work), unit="files")
        self.tokenizer.save(writer.partial / "tokenizer")

    def _fields(self, hashed: list[Input]) -> dict[str, Any]:
        rejected = [reject for reject in self.rejects if not reject.variant]
        duplicates = sum(len(file.duplicates) for file in hashed)
        unread = sum(reject.sha256 is None for reject in rejected)
        return {
            "tokenizer": {
                "name": self.recipe.tokenizer.name,
                "fingerprint": self.tokenizer.fingerprint,
                "vocabulary": self.tokenizer.vocabulary,
                "end": self.tokenizer.end,
                "stride": self.tokenizer.stride,
                "unit": self.tokenizer.unit,
                **self.tokenizer.description,
            },
            "inputs": len(hashed) + duplicates + unread,
            "duplicates": duplicates,
            "rejected": len(rejected),
            "variants_rejected": len(self.rejects) - len(rejected),
        }

    def _reject_lines(self, duplicates: dict[str, list[str]]) -> list[dict[str, Any]]:
        lines = [reject.line() for reject in self.rejects]
        for line in lines:
            if "variant" not in line and line["sha256"] in duplicates:
                line["duplicates"] = duplicates[line["sha256"]]
        return sorted(lines, key=json.dumps)


def _line_up(surveyed: list[tuple[Source, splits.Tally]]) -> list[Source]:
    """The sources with their sizes and places in the corpus."""
    sources, start = [], 0
    for source, tally in surveyed:
        sources.append(replace(source, size=tally.size, start=start))
        start += tally.size
    return sources


def _is_train(source: Source, tally: splits.Tally, assign: Assign) -> bool:
    # Only tokenizers whose sources are one document each have variants.
    assert tally.documents == 1, (source.relative, tally.documents)
    (digest,) = (sha for hashes in tally.smallest.values() for sha in hashes)
    return assign(Document(digest, 0, tally.size)) == [("train", tally.size)]


def _all_train(document: Document) -> list[tuple[str, int]]:
    return [("train", document.size)]


def _nothing_left(rejects: list[Reject]) -> TooManyRejects:
    shown = [f"  {reject.source}: {reject.reason}" for reject in rejects[:10]]
    more = [f"  and {len(rejects) - 10} more"] if len(rejects) > 10 else []
    return TooManyRejects(f"all {len(rejects)} files were rejected\n" + "\n".join(shown + more))
