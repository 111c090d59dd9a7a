"""Prepare: files -> a shards folder whose bytes depend only on the files, the recipe and the tokenizer.

Worker processes scan the files for documents; documents are assigned to splits; the tokenizer learns from the training
split, if it needs to; then one pass writes all ids in a canonical order. What a scan has staged survives a kill.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shortcut_cli import files, registry
from shortcut_cli.config.schema import Recipe
from shortcut_cli.config.writing import differences
from shortcut_cli.data import inputs, splits, workers
from shortcut_cli.data.documents import Assign, Document, Source
from shortcut_cli.data.shards import FolderWriter, read_manifest, source_paths_file
from shortcut_cli.errors import Rejected, TooManyRejects, UsageError
from shortcut_cli.events import Note, Progress, Report
from shortcut_cli.tokenizers.base import Tokenizer


@dataclass
class Reject:
    """A file, or a variant of one, that can't be used."""

    source: str
    sha256: str | None
    reason: str
    variant: str = ""

    def line(self) -> dict[str, Any]:
        """Its line in rejects.jsonl."""
        variant = {"variant": self.variant} if self.variant else {}
        return {"source": self.source, "sha256": self.sha256, **variant, "reason": self.reason}


def too_many(rejected: int, total: int, limit: str) -> bool:
    """Whether more of the `total` files were rejected than `limit` ("3" files, or "1%" of all) allows.

    Raises UsageError if the limit is neither.
    """
    text, percent = limit.removesuffix("%").strip(), limit.endswith("%")
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not math.isfinite(number) or number < 0 or (not percent and number != int(number)):
        raise UsageError(f"--max-bad {limit} is neither a number of files nor a percentage", "for example 3 or 1%")
    return rejected > (total * number / 100 if percent else number)


def prepare(
    recipe: Recipe, paths: Iterable[str], folder: Path, *, n_workers: int, max_bad: str, report: Report
) -> dict[str, Any]:
    """Tokenize the files behind `paths` into a shards folder.

    Returns the manifest, and with it "worked", whether there was anything to do, "ignored", the number of files ignored
    because of their suffix, and, if there was, "tokens_per_s".

    Raises UsageError if no files are found or the folder holds something else, TooManyRejects if more files were
    rejected than `max_bad` allows (the folder is complete all the same) or all of them.
    """
    too_many(0, 1, max_bad)
    paths = list(paths)
    tokenizer: Tokenizer = registry.load(registry.TOKENIZERS, recipe.tokenizer.name)(recipe.tokenizer)
    found = inputs.find(paths, tokenizer.suffixes)
    if not found.files and not found.rejects:
        raise UsageError(f"no {' '.join(tokenizer.suffixes)} files in {' '.join(map(str, paths))}")
    _check_folder(folder)
    began = time.monotonic()
    with files.held(folder, "shortcut prepare"):
        hashed, rejects = _hash(found, n_workers, report)
        request = _request(recipe, hashed)
        manifest = _finished(folder, request)
        summary: dict[str, Any] = {"worked": manifest is None, "ignored": found.ignored}
        if manifest is None:
            preparation = _Preparation(recipe, tokenizer, folder, rejects, n_workers=n_workers, report=report)
            manifest = preparation.run(hashed, request)
            tokens = sum(split["tokens"] for split in manifest["splits"].values())
            summary["tokens_per_s"] = round(tokens / (time.monotonic() - began), 1)
        _remember_paths(manifest, paths, report)
    if too_many(manifest["rejected"], manifest["inputs"], max_bad):
        raise TooManyRejects(
            f"{manifest['rejected']} of {manifest['inputs']} files were rejected, more than --max-bad {max_bad}",
            f"the rest is complete in {folder}; {folder / 'rejects.jsonl'} has the reasons",
        )
    return manifest | summary


def _remember_paths(manifest: dict[str, Any], paths: list[str], report: Report) -> None:
    """Remember in the cache where the sources are, for `shortcut prove tokens`."""
    path = source_paths_file(manifest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, json.dumps([os.path.abspath(each) for each in paths]))
    except OSError as error:
        report(Note(text=f"`shortcut prove tokens` will need the paths as arguments: {path}: {error.strerror}"))


def _check_folder(folder: Path) -> None:
    """Raises UsageError if the folder holds anything but a finished or unfinished preparation."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", "choose another --out")
    ours = (".lock", ".partial", ".staging", "manifest.json")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).exists() for name in ours):
        raise UsageError(f"{folder} is not empty and is not a shards folder", "choose another --out")


@dataclass(frozen=True)
class Input:
    """A file with its hash, and the other files that have the same bytes."""

    relative: str
    path: Path
    sha256: str
    duplicates: tuple[str, ...] = ()


def _hash(found: inputs.Found, threads: int, report: Report) -> tuple[list[Input], list[Reject]]:
    """Hash every file; equal files are kept once, under the first of their names."""
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
            report(Progress(task="read", done=done, total=len(found.files), unit="files"))
    kept = [Input(*same[0], sha, tuple(relative for relative, _ in same[1:])) for sha, same in by_hash.items()]
    return sorted(kept, key=lambda file: (file.relative, file.sha256)), rejects


def _request(recipe: Recipe, hashed: list[Input]) -> dict[str, Any]:
    """Everything that was asked for, to tell whether a command is the same as an earlier one."""
    lines = [json.dumps([file.relative, file.sha256, *file.duplicates]) for file in hashed]
    data = recipe.data.model_dump(exclude={"shards", "file_timeout_s", "file_memory_mb"})
    sha256 = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    count = sum(1 + len(file.duplicates) for file in hashed)
    return {
        "data": data,
        "tokenizer": recipe.tokenizer.model_dump(),
        "inputs": {"files": count, "sha256": sha256},
    }


def _finished(folder: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the same preparation if it is finished, else None. Raises UsageError if it was another one."""
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


def _scan_group(tokenizer: Tokenizer, val: float, test: float, group: list[Source]) -> list[splits.Tally | Rejected]:
    """In a worker process: scan sources; the result for each is the tally of its documents, or why it can't be used."""
    if len(group) > 1:
        tokenizer.stage(group)
    found: list[splits.Tally | Rejected] = []
    for source in group:
        tally = splits.Tally(val, test)
        try:
            for document in tokenizer.scan(source):
                tally.add(document)
        except Rejected as reason:
            found.append(reason)
        else:
            found.append(tally)
    return found


class _Preparation:
    """The steps of one preparation."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Tokenizer,
        folder: Path,
        rejects: list[Reject],
        *,
        n_workers: int,
        report: Report,
    ) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.folder = folder
        self.rejects = rejects
        self.n_workers = n_workers
        self.report = report
        key = json.dumps([recipe.tokenizer.model_dump(), tokenizer.description], sort_keys=True)
        self.staging = folder / ".staging" / hashlib.sha256(key.encode()).hexdigest()[:16]
        self.staging.mkdir(parents=True, exist_ok=True)

    def run(self, hashed: list[Input], request: dict[str, Any]) -> dict[str, Any]:
        """Scan, split, fit and write; returns the manifest."""
        scanned = self._scan([self._source(file) for file in hashed], "scan")
        total = self._total(scanned)
        sources = _with_places(scanned)
        cut = self.recipe.data.split == "contiguous" or total.distinct < splits.ENOUGH
        assign = splits.contiguous(total) if cut else splits.by_document(total)
        if self.tokenizer.needs_fit:
            self.report(Note(text="training the tokenizer on the training split"))
            note = self.tokenizer.fit(sources, assign)
            if note:
                self.report(Note(text=note))
        work = [(source, assign) for source in sources] + self._variants(scanned, assign, cut)
        work.sort(key=lambda item: (item[0].relative, item[0].sha256, item[0].variant))
        duplicates = {file.sha256: list(file.duplicates) for file in hashed if file.duplicates}
        vocabulary, eos = self.tokenizer.vocabulary, self.tokenizer.eos
        with FolderWriter(self.folder, vocabulary, self.recipe.data.shard_tokens, eos=eos) as writer:
            self._write(writer, work, duplicates)
            fields = {
                "request": request,
                "split": "contiguous" if cut else "documents",
                **self._manifest_fields(hashed),
            }
            manifest = writer.finish(self._reject_lines(duplicates), fields)
        shutil.rmtree(self.folder / ".staging")
        return manifest

    def _source(self, file: Input, variant: str = "") -> Source:
        name = f"{file.sha256}{'.' + variant if variant else ''}.ids"
        return Source(file.path, file.relative, file.sha256, self.staging / name, variant)

    def _scan(self, sources: list[Source], task: str) -> list[tuple[Source, splits.Tally]]:
        """Scan in worker processes; rejected sources are recorded and left out."""
        found: dict[Source, splits.Tally | Rejected] = {}
        groups = self.tokenizer.group(sources, self.n_workers)
        while groups:
            broken: list[Source] = []
            for group, results in self._in_workers(groups):
                if isinstance(results, Rejected) and len(group) > 1:
                    broken += group  # one of them crashed the process; scanning each on its own will tell which
                    continue
                found |= zip(group, [results] if isinstance(results, Rejected) else results, strict=True)
                self.report(Progress(task=task, done=len(found), total=len(sources), unit="files"))
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
            _scan_group,
            groups,
            (self.tokenizer, data.val, data.test),
            workers=max(1, min(self.n_workers, len(groups))),
            timeout_s=data.file_timeout_s,
            memory_mb=data.file_memory_mb,
        )

    def _total(self, scanned: list[tuple[Source, splits.Tally]]) -> splits.Tally:
        """The tally of all documents. Raises TooManyRejects if there are none."""
        total = splits.Tally(self.recipe.data.val, self.recipe.data.test)
        for _, tally in scanned:
            total.merge(tally)
        if not total.documents:
            raise _all_rejected(self.rejects)
        return total

    def _variants(
        self, scanned: list[tuple[Source, splits.Tally]], assign: Assign, cut: bool
    ) -> list[tuple[Source, Assign]]:
        """The augmented forms of the training documents, scanned, all of them for the training split."""
        names = self.tokenizer.variants
        if not names:
            return []
        if cut:
            raise UsageError("augmentation needs at least three different files and data.split = 'documents'")
        train = [source for source, tally in scanned if _is_train(source, tally, assign)]
        wanted = [
            self._source(Input(source.relative, source.path, source.sha256), name) for source in train for name in names
        ]
        kept = self._scan(wanted, "augment")
        return [(replace(source, size=tally.size), _all_train) for source, tally in kept]

    def _write(self, writer: FolderWriter, work: list[tuple[Source, Assign]], duplicates: dict[str, list[str]]) -> None:
        for done, (source, assign) in enumerate(work, 1):
            same = {"duplicates": duplicates[source.sha256]} if source.sha256 in duplicates else {}
            variant = {"variant": source.variant} if source.variant else {}
            before = None
            for chunk in self.tokenizer.encode(source, assign, self.n_workers):
                # A document that is cut has several lines; its account is in the first.
                first = chunk.document is not before
                account = {"account": chunk.document.account} if first and chunk.document.account else {}
                before = chunk.document
                record = {"source": source.relative, "sha256": chunk.document.sha256, **variant, **same, **account}
                writer.add(chunk.split, chunk.ids, chunk.units, record)
            self.report(Progress(task="write", done=done, total=len(work), unit="files"))
        self.tokenizer.save(writer.partial / "tokenizer")

    def _manifest_fields(self, hashed: list[Input]) -> dict[str, Any]:
        """What the manifest says about the tokenizer and the files."""
        rejected = [reject for reject in self.rejects if not reject.variant]
        duplicates = sum(len(file.duplicates) for file in hashed)
        unread = sum(reject.sha256 is None for reject in rejected)
        return {
            "tokenizer": {
                "name": self.recipe.tokenizer.name,
                "fingerprint": self.tokenizer.fingerprint,
                "vocabulary": self.tokenizer.vocabulary,
                "end": self.tokenizer.eos,
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


def _with_places(scanned: list[tuple[Source, splits.Tally]]) -> list[Source]:
    """The sources with their sizes and their places in the corpus."""
    sources, start = [], 0
    for source, tally in scanned:
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


def _all_rejected(rejects: list[Reject]) -> TooManyRejects:
    shown = [f"  {reject.source}: {reject.reason}" for reject in rejects[:10]]
    more = [f"  and {len(rejects) - 10} more"] if len(rejects) > 10 else []
    return TooManyRejects(f"all {len(rejects)} files were rejected\n" + "\n".join(shown + more))
