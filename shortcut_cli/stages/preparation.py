"""Prepare: files -> a shards folder whose bytes depend only on the files, the recipe and the tokenizer.

Worker processes scan the files for documents; documents are assigned to splits; the tokenizer learns from the training
split, if it needs to; then one pass writes all ids in a canonical order. What a scan has staged survives a kill.

The scan can be divided into tasks, on machines that share the folder (`prepare_part`): each takes the files whose names
fall to it and leaves what it found by the hash of their bytes, so that `prepare` only puts it together.
"""

import copy
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from shortcut_cli import __version__, cleanup, files, registry
from shortcut_cli.config.schema import Recipe
from shortcut_cli.config.writing import differences
from shortcut_cli.data import duplicates, executors, inputs, objects, splits, workers
from shortcut_cli.data.assembly import PartWriter, ShardMaker, laid_out
from shortcut_cli.data.documents import Assign, Document, Source, check_unchanged
from shortcut_cli.data.given import PREFERRED, Given, check_filled
from shortcut_cli.data.hashes import Hashes
from shortcut_cli.data.shards import (
    PREPARE,
    FolderWriter,
    check_free,
    is_shards,
    read_lines,
    read_manifest,
    source_paths_file,
)
from shortcut_cli.errors import (
    Missing,
    Rejected,
    ShortcutError,
    TooManyRejects,
    Unfinished,
    UsageError,
    unreadable,
)
from shortcut_cli.events import Note, Progress, Report
from shortcut_cli.formatting import to_json
from shortcut_cli.tokenizers.base import Tokenizer
from shortcut_cli.tokenizers.encoding import Item, PartEncoder, encoded, parts
from shortcut_cli.tokenizers.scanning import Scanned, Scanner, rejected_records

HASHED = 1 << 14  # files that are given to threads at once
PART_SIZE = 1 << 24  # bytes of text, or tokens, that a process encodes at once if the write pass is divided
WORTH_PARTS = 8  # from this many on, starting processes here costs little beside them
WRITE_TIMES = 16  # a part has many files, but no more than this much of the work of the largest that is allowed
# What --max-bad judges: in words, and the manifest's counts of rejected ones and of all.
JUDGED = (("files", "rejected", "inputs"), ("records", "records_rejected", "records"))


@dataclass
class Reject:
    """A file, or a variant of one, that is not used."""

    source: str
    sha256: str | None
    reason: str
    variant: str = ""
    bad: bool = True  # the file is at fault, which is for --max-bad to judge; False: it was not wanted
    passing: bool = False  # the reason may pass: the next preparation tries again

    def line(self) -> dict[str, Any]:
        """Its line in rejects.jsonl."""
        variant = {"variant": self.variant} if self.variant else {}
        passing = {"passing": True} if self.passing else {}
        return {"source": self.source, "sha256": self.sha256, **variant, "reason": self.reason, **passing}


def prepare(
    recipe: Recipe,
    paths: Iterable[str],
    folder: Path,
    *,
    n_workers: int,
    max_bad: str,
    report: Report,
    merge: bool = False,
    executor: str = "local",
    ray_address: str = "",
) -> dict[str, Any]:
    """Tokenize the files behind `paths` into a shards folder.

    merge: scan nothing that tasks were to scan. executor: where files are scanned, see `data/executors.py`.

    Returns the manifest, and with it "worked", whether there was anything to do, "ignored", the number of files ignored
    because of their suffix, and, if there was, "tokens_per_s".

    Raises UsageError if no files are found, the folder holds something else or data.splits leaves a split empty,
    TooManyRejects if more files or records were rejected than `max_bad` allows (the folder is complete all the same),
    or all files; Unfinished if a file was rejected for a reason that may pass. The manifest counts those as
    "unfinished", and the next preparation tries them again. Missing if `merge` finds files that no task has scanned.
    """
    options: dict[str, Any] = {"n_workers": n_workers, "max_bad": max_bad, "report": report, "merge": merge}
    if executor != "local":
        options["execute"] = executors.named(executor, folder=folder / ".staging" / "jobs", ray_address=ray_address)
    manifest = _prepare(recipe, _tokenizer(recipe), _kind(recipe), paths, folder, **options)
    if rejected := _rejected(folder, manifest):
        counts, *first = rejected
        report(Note(text="\n".join([f"{counts} were rejected; {folder / 'rejects.jsonl'} has all reasons", *first])))
    if manifest.get("unfinished"):
        raise Unfinished(manifest["unfinished"], map(described, islice(_passing(folder), 3)))
    return manifest


def prepare_part(
    recipe: Recipe, paths: Iterable[str], folder: Path, *, task: tuple[int, int], n_workers: int, report: Report
) -> dict[str, Any]:
    """Scan the files that fall to one of several tasks, and leave what was found in the folder for `prepare`.

    task: its number, from 1, and how many there are. Any number of them may run at once, on any machines that see the
    same files and the same folder, be killed, and run again.

    Returns "files", how many there are, "mine", and how many of mine are "rejected". Raises UsageError as `prepare`
    does; Unfinished if a file was rejected for a reason that may pass: the same task tries it again.
    """
    tokenizer, kind = _tokenizer(recipe), _kind(recipe)
    fetched = folder / ".staging" / f"fetched-{task[0]}-of-{task[1]}"
    found, assigned, _ = _found(recipe, tokenizer, kind, list(paths), folder, fetched, report)
    total, number = len(found.files), f"{task[0]}-of-{task[1]}"
    found.files[:] = [one for one in found.files if _task_of(one[0], task[1]) == task[0]]
    found.rejects.clear()  # `prepare` finds them too
    with files.held(folder, PREPARE, known=is_shards, shared=True), _removed(fetched):
        result = {"task": "/".join(map(str, task)), "files": total, "mine": len(found.files), "rejected": 0}
        if _is_complete(folder, recipe, tokenizer):
            return result | {"worked": False}
        if found.remote:
            files.make_folder(fetched)
        hashes = Hashes(folder / ".staging" / "hashes", keep=True)
        hashed, rejects = _hash(found, n_workers, report, assigned, hashes)
        hashes.save(number)
        preparation = _Preparation(recipe, tokenizer, kind, folder, rejects, n_workers=n_workers, report=report)
        preparation.scan_part(hashed)
    bad = [reject.line() for reject in preparation.rejects]
    passing = [line for line in bad if line.get("passing")]
    if passing:
        raise Unfinished(len(passing), map(described, passing[:3]))
    return result | {"worked": True, "rejected": len(bad)}


def _task_of(relative: str, tasks: int) -> int:
    """Which of the tasks, from 1, a file falls to: by its name alone, so that all agree without talking."""
    name = relative.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.sha256(name).digest()[:8]) % tasks + 1


def _is_complete(folder: Path, recipe: Recipe, tokenizer: Tokenizer) -> bool:
    """Whether a folder has the shards that a task is for. Raises UsageError if it has others."""
    if not (folder / "manifest.json").exists():
        return False
    found = read_manifest(folder)
    request = _request(recipe, tokenizer, []) | {"inputs": found.get("request", {}).get("inputs")}
    return _finished(folder, request) is not None and not found.get("unfinished")


def _tokenizer(recipe: Recipe) -> Tokenizer:
    made: Tokenizer = registry.load(registry.TOKENIZERS, recipe.tokenizer.name)(recipe.tokenizer)
    return made


def _kind(recipe: Recipe) -> str:
    return "given" if recipe.data.splits else recipe.data.split


def tokenize(
    recipe: Recipe,
    tokenizer: Tokenizer,
    paths: Iterable[str],
    folder: Path,
    *,
    n_workers: int,
    max_bad: str,
    report: Report,
) -> dict[str, Any]:
    """Tokenize the files behind `paths` with a tokenizer that needs no `fit`, all of them into the split "test".

    Writes a shards folder as `prepare` does, whose other splits are empty; nothing is augmented. Of `recipe`, the
    sections [tokenizer], which the tokenizer was made from, and [data] without its splits are used.

    Returns what `prepare` returns, and raises what it raises.
    """
    assert not tokenizer.needs_fit, "the tokenizer is not trained"
    return _prepare(recipe, tokenizer, "test", paths, folder, n_workers=n_workers, max_bad=max_bad, report=report)


def _prepare(
    recipe: Recipe,
    tokenizer: Tokenizer,
    kind: str,
    paths: Iterable[str],
    folder: Path,
    *,
    n_workers: int,
    max_bad: str,
    report: Report,
    merge: bool = False,
    execute: executors.Executor | None = None,
) -> dict[str, Any]:
    """What `prepare` and `tokenize` do. kind: data.split, or "test" for all documents in that split."""
    inputs.too_many([], max_bad)  # raises UsageError before any work if it is neither a number nor a percentage
    paths = list(paths)
    fetched = folder / ".staging" / "fetched"
    found, assigned, outside = _found(recipe, tokenizer, kind, paths, folder, fetched, report)
    began = time.monotonic()
    with files.held(folder, PREPARE, known=is_shards), _removed(fetched):
        if found.remote:
            files.make_folder(fetched)
        hashed, rejects = _hash(found, n_workers, report, assigned, Hashes(folder / ".staging" / "hashes"))
        request = _request(recipe, tokenizer, hashed)
        if kind == "test":
            request |= {"all_in": "test", "fingerprint": tokenizer.fingerprint}
        manifest = _finished(folder, request)
        summary: dict[str, Any] = {"worked": False, "ignored": len(found.ignored)}
        if manifest is None or manifest.get("unfinished"):
            check_free(folder)
            options: dict[str, Any] = {"n_workers": n_workers, "report": report, "merge": merge, "execute": execute}
            preparation = _Preparation(recipe, tokenizer, kind, folder, rejects + outside, **options)
            if manifest is None or not preparation.fails_again(hashed):
                summary["worked"], manifest = True, preparation.run(hashed, request)
        if summary["worked"]:
            tokens = sum(split["tokens"] for split in manifest["splits"].values())
            summary["tokens_per_s"] = round(tokens / (time.monotonic() - began), 1)
        _remember_paths(manifest, paths, report)
    _check_rejects(folder, manifest, max_bad, kept=kind != "test")
    return manifest | summary


def _found(
    recipe: Recipe, tokenizer: Tokenizer, kind: str, paths: list[str], folder: Path, fetched: Path, report: Report
) -> tuple[inputs.Found, dict[Path, str], list[Reject]]:
    """The files behind `paths`; if splits come with them, the split of each, and those that are in none.

    fetched: the folder that objects will be fetched to.
    """
    found = inputs.find(paths, tokenizer.suffixes, out=folder, fetched=fetched)
    if found.outputs:
        report(Note(text=f"left out, since shortcut has written it: {', '.join(found.outputs)}"))
    if not found.files and not found.rejects:
        raise UsageError(f"no {' '.join(tokenizer.suffixes)} files in {' '.join(map(str, paths))}")
    if found.ignored:
        report(Note(text=_ignored(found.ignored)))
    assigned, outside = _assigned(recipe, found) if kind == "given" else ({}, [])
    return found, assigned, outside


@contextmanager
def _removed(folder: Path) -> Iterator[None]:
    """A folder for what is fetched in this block, which is removed with all it holds, as is what a kill has left."""

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # there is none, or something else is in it
            folder.parent.rmdir()

    with cleanup.due(remove):
        try:
            yield
        finally:
            remove()


def _ignored(names: list[str]) -> str:
    """Which files were ignored because of their suffix: how many of each suffix, and the first three."""
    counts = Counter(os.path.splitext(name)[1].lower() or "without suffix" for name in names)
    suffixes = ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(5))
    more = f" and {len(counts) - 5} other suffixes" if len(counts) > 5 else ""
    return (
        f"ignored because of their suffix: {suffixes}{more} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    )


def _assigned(recipe: Recipe, found: inputs.Found) -> tuple[dict[Path, str], list[Reject]]:
    """The split of each file that data.splits names, and the files that it does not, which are left out of `found`."""
    lists = recipe.data.splits
    given = Given({"train": lists.train, "val": lists.val, "test": lists.test}, lists.table)
    assigned = {path: given.split_of(relative, found.named(path)) for relative, path in found.files}
    check_filled(assigned.values(), "no file")
    outside = [
        Reject(relative, None, "is in none of data.splits", bad=False)
        for relative, path in found.files
        if not assigned[path]
    ]
    found.files[:] = [(relative, path) for relative, path in found.files if assigned[path]]
    return assigned, outside


def _check_rejects(folder: Path, manifest: dict[str, Any], max_bad: str, *, kept: bool) -> None:
    """Raises TooManyRejects, with the first three reasons, if more was rejected than `max_bad` allows.

    kept: whether the user finds the folder afterwards.
    """
    if not inputs.too_many([(manifest[bad], manifest[total]) for _, bad, total in JUDGED], max_bad):
        return
    counts, *first = _rejected(folder, manifest)
    where = f"the rest is complete in {folder}; {folder / 'rejects.jsonl'} has all reasons; " if kept else ""
    passing = (
        f"; {manifest['unfinished']:,} are the machine's fault: {Unfinished.again}"
        if manifest.get("unfinished")
        else ""
    )
    raise TooManyRejects(
        "\n".join([f"{counts} were rejected, more than --max-bad {max_bad}", *first]),
        f"{where}--max-bad allows more{passing}",
    )


def _rejected(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """How many files and records were rejected, and the first three reasons, a line each; nothing if none were.

    Raises CheckFailed if rejects.jsonl is damaged.
    """
    counts = [f"{manifest[bad]:,} of {manifest[total]:,} {what}" for what, bad, total in JUDGED if manifest[bad]]
    if not counts:
        return []
    return [" and ".join(counts), *(f"  {described(line)}" for line in islice(_listed(folder), 3))]


def _passing(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a folder's rejects.jsonl whose reasons may pass. Raises CheckFailed if it is damaged."""
    return (line for line in _listed(folder) if line.get("passing"))


def _listed(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a folder's rejects.jsonl. Raises CheckFailed if it is damaged."""
    return read_lines(folder / "rejects.jsonl", _is_reject)


def _is_reject(line: dict[str, Any]) -> bool:
    """Whether a line has what is used of it."""
    known = isinstance(line.get("sha256"), str | None)
    return known and all(isinstance(line.get(key), str) for key in ("source", "reason"))


def described(reject: dict[str, Any]) -> str:
    """A line of rejects.jsonl in words: which file or record, and why."""
    where = f"{reject['source']}, line {reject['line']}" if "line" in reject else reject["source"]
    return f"{where}: {reject['reason']}"


def _remember_paths(manifest: dict[str, Any], paths: list[str], report: Report) -> None:
    """Remember in the cache where the sources are, for `shortcut prove tokens`."""
    path = source_paths_file(manifest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(
            path, json.dumps([each if files.is_url(each) else os.path.abspath(files.place(each)) for each in paths])
        )
    except OSError as error:
        report(Note(text=f"`shortcut prove tokens` will need the paths as arguments: {path}: {error.strerror}"))


@dataclass(frozen=True, slots=True)
class Input:
    """A file with its hash, and the other files that have the same bytes."""

    relative: str
    path: Path
    sha256: str
    duplicates: tuple[str, ...] = ()
    split: str = ""  # the one that data.splits gives it to


def _hash(
    found: inputs.Found,
    threads: int,
    report: Report,
    assigned: Mapping[Path, str] | None = None,
    hashes: Hashes | None = None,
) -> tuple[list[Input], list[Reject]]:
    """Hash every file; equal files are kept once, under the first of their names.

    assigned: the split of each path, if they come with the corpus; then the first is sought in test, val, then train.
    hashes: those that are known already.
    """
    rejects = [Reject(relative, None, reason, passing=relative in found.passing) for relative, reason in found.rejects]
    by_hash: dict[str, list[tuple[str, Path]]] = {}

    def digest(one: tuple[str, Path]) -> str | Rejected:
        relative, path = one
        try:
            return found.sha256(path) if hashes is None or path in found.remote else hashes.sha256(relative, path)
        except Rejected as reason:
            return reason
        except OSError as error:
            if path in found.remote:
                raise  # it is the disk that is full, not an input that can't be read
            return unreadable(error)

    with ThreadPoolExecutor(max(threads, objects.THREADS) if found.remote else threads) as pool:
        blocks = (found.files[first : first + HASHED] for first in range(0, len(found.files), HASHED))
        results = chain.from_iterable(pool.map(digest, block) for block in blocks)  # each waits in a future of its own
        for done, ((relative, path), result) in enumerate(zip(found.files, results, strict=True), 1):
            if isinstance(result, Rejected):
                rejects.append(Reject(relative, None, str(result), passing=result.passing))
            else:
                by_hash.setdefault(result, []).append((relative, path))
            report(Progress(task="read", done=done, total=len(found.files), unit="files"))
    kept = []
    for sha, same in by_hash.items():
        if assigned:
            same.sort(key=lambda one: PREFERRED.index(assigned[one[1]]))
        (relative, path), *others = same
        split = assigned[path] if assigned else ""
        kept.append(Input(relative, path, sha, tuple(name for name, _ in others), split))
    return sorted(kept, key=lambda file: (file.relative, file.sha256)), rejects


def _request(recipe: Recipe, tokenizer: Tokenizer, hashed: list[Input]) -> dict[str, Any]:
    """Everything that was asked for, to tell whether a command is the same as an earlier one."""
    lines = [json.dumps([file.relative, file.sha256, *file.duplicates]) + file.split for file in hashed]
    data = recipe.data.model_dump(exclude={"shards", "file_timeout_s", "file_memory_mb"})
    sha256 = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    count = sum(1 + len(file.duplicates) for file in hashed)
    return {
        "data": data,
        "tokenizer": recipe.tokenizer.model_dump(),
        "depends_on": tokenizer.depends_on,
        "inputs": {"files": count, "sha256": sha256},
    }


def _finished(folder: Path, request: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the same preparation, else None. Raises UsageError if it was another one.

    None too if it is unfinished and the files are not the same: one that could not be read may be readable now.
    """
    if not (folder / "manifest.json").exists():
        return None
    manifest = read_manifest(folder)
    changes = differences(manifest.get("request", {}), request)
    if manifest.get("unfinished") and all(change.startswith("inputs.") for change in changes):
        return None if changes else manifest
    if changes:
        raise UsageError(
            f"{folder} was prepared from something else\n" + "\n".join(f"  {line}" for line in changes),
            "choose another --out, or remove the folder",
        )
    return manifest


class _Preparation:
    """The steps of one preparation."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: Tokenizer,
        kind: str,
        folder: Path,
        rejects: list[Reject],
        *,
        n_workers: int,
        report: Report,
        merge: bool = False,
        execute: executors.Executor | None = None,
    ) -> None:
        self.recipe = recipe
        self.execute = execute
        self.merge = merge
        self.folder = folder
        self.n_workers = n_workers
        self.report = report
        self.given = tokenizer, kind, rejects
        self._begin([])
        key = json.dumps([__version__, recipe.tokenizer.model_dump(), tokenizer.depends_on], sort_keys=True)
        self.staging = folder / ".staging" / hashlib.sha256(key.encode()).hexdigest()[:16]
        files.make_folder(self.staging)
        data = recipe.data
        self.scanner = Scanner(tokenizer, data.val, data.test, data.duplicates == "drop", keep=execute is not None)

    def _begin(self, changed: list[Reject]) -> None:
        """Forget what an earlier try found. changed: files that must not be used any more."""
        tokenizer, self.kind, rejects = self.given
        self.tokenizer = copy.copy(tokenizer) if tokenizer.needs_fit else tokenizer  # `fit` changes it
        self.rejects = [*rejects, *changed]
        self.dropped = duplicates.Dropped()

    def run(self, hashed: list[Input], request: dict[str, Any]) -> dict[str, Any]:
        """Scan, drop duplicates, split, fit and write; returns the manifest.

        If a file could be scanned, and has changed when it is read again, splits and vocabulary have seen what it was.
        So all is done again without it, and it is a reject that may pass: what is written is what a preparation of the
        other files writes.

        If that fails because of the files, rejects.jsonl is there even so, beside no manifest.
        """
        left, changed = hashed, list[Reject]()
        try:
            while True:
                try:
                    return self._run(hashed, left, request)
                except Rejected as reason:
                    found = self._changed(left)
                    if not found:
                        raise ShortcutError(f"a file {reason}", "run the same command again") from reason
                    names = {reject.sha256 for reject in found}
                    left, changed = [file for file in left if file.sha256 not in names], changed + found
                    self.report(Note(text=f"{found[0].source} {found[0].reason}; preparing the other files again"))
                    self._begin(changed)
        except (UsageError, TooManyRejects):
            equal = {file.sha256: list(file.duplicates) for file in hashed if file.duplicates}
            lines = self._reject_lines(equal, [])
            files.write(self.folder / "rejects.jsonl", "".join(to_json(line) + "\n" for line in lines))
            raise
        finally:
            with suppress(OSError):  # there is something in them
                self.staging.rmdir()
                self.staging.parent.rmdir()

    def scan_part(self, hashed: list[Input]) -> None:
        """Scan files, and the variants of those that the training split gets if no split is empty; keep the results."""
        self.scanner = replace(self.scanner, keep=True)
        names = {file.sha256: file.split for file in hashed}
        scanned = self._scan([self._source(file) for file in hashed], "scan")
        if self.kind != "contiguous":
            train = [source for source, one in scanned if self._trains(source, one, names)]
            self._scan(self._variants_of(train), "augment")

    def _trains(self, source: Source, one: Scanned, names: Mapping[str, str]) -> bool:
        """Whether the training split gets a source, as far as its name or hash tells. names: as in `_assign`."""
        if not self.tokenizer.variants:
            return False
        split = names[source.sha256] if self.kind == "given" else splits.split_of(one.only, *self._shares)
        return split == "train"

    @property
    def _shares(self) -> tuple[float, float]:
        return self.recipe.data.val, self.recipe.data.test

    def _changed(self, hashed: list[Input]) -> list[Reject]:
        """The files whose bytes are not those any more that were hashed."""

        def check(file: Input) -> Reject | None:
            try:
                check_unchanged(file.path, file.sha256)
            except Rejected as reason:
                return Reject(file.relative, file.sha256, str(reason), passing=True)
            return None

        with ThreadPoolExecutor(self.n_workers) as pool:
            return [reject for reject in pool.map(check, hashed) if reject]

    def _run(self, hashed: list[Input], left: list[Input], request: dict[str, Any]) -> dict[str, Any]:
        """One try. hashed: all files; left: those to be used."""
        names = {file.sha256: file.split for file in left if file.split}
        everything = _with_places(self._scan([self._source(file) for file in left], "scan"))
        total = self._total(everything)
        scanned = self._without_duplicates(everything, names)
        assign = self._assign(scanned, replace(total, size=total.size - self.dropped.size), names)
        sources = [source for source, _ in scanned]
        if self.tokenizer.needs_fit:
            self.report(Note(text="training the tokenizer on the training split"))
            note = self.tokenizer.fit(sources, assign)
            if note:
                self.report(Note(text=note))
        work = [(source, assign) for source in sources] + self._variants(scanned, assign)
        work.sort(key=lambda item: (item[0].relative, item[0].sha256, item[0].variant))
        equal = {file.sha256: list(file.duplicates) for file in hashed if file.duplicates}
        empty = {source.sha256: one.records_empty for source, one in scanned if one.records_empty}
        vocabulary, eos = self.tokenizer.vocabulary, self.tokenizer.eos
        with FolderWriter(self.folder, vocabulary, self.recipe.data.shard_tokens, eos=eos) as writer:
            self._write(writer, work, equal, empty)
            fields = {"request": request, "split": self.kind, **self._manifest_fields(hashed, total)}
            bad = [source for source, one in everything if one.records_rejected]
            manifest = writer.finish(self._reject_lines(equal, bad), fields)
        if not manifest["unfinished"]:
            shutil.rmtree(self.folder / ".staging", ignore_errors=True)  # it may be a link to another disk
        self._say_if_uneven(manifest)
        return manifest

    def fails_again(self, hashed: list[Input]) -> bool:
        """Whether all files that an earlier preparation could not read because of the machine still can't be read.

        Then its folder is what another preparation of the same files would write, too.
        """
        files_by_hash, before = {file.sha256: file for file in hashed}, len(self.rejects)
        lines = list(_passing(self.folder))
        unread = {line["source"] for line in lines if not line["sha256"]}
        if unread != {reject.source for reject in self.rejects if reject.passing}:
            return False  # what could not be hashed then is gone or rejected now
        lines = [line for line in lines if line["sha256"]]
        if any(line["sha256"] not in files_by_hash for line in lines):
            return False
        wanted = [self._source(files_by_hash[line["sha256"]], line.get("variant", "")) for line in lines]
        read = self._scan(wanted, "try again")
        again = self.rejects[before:]
        del self.rejects[before:]
        return not read and all(reject.passing for reject in again)

    def _without_duplicates(
        self, scanned: list[tuple[Source, Scanned]], names: Mapping[str, str]
    ) -> list[tuple[Source, Scanned]]:
        """Find the documents to drop; returns the sources without those that hold no others.

        names: the split of each source, by its hash, if the splits come with the corpus.
        """
        if self.recipe.data.duplicates == "keep":
            return scanned
        if self.kind == "given":
            order = sorted(scanned, key=lambda one: PREFERRED.index(names[one[0].sha256]))
        else:
            order = scanned
        self.dropped = duplicates.find((source.start, one.keys) for source, one in order)
        kept = []
        for source, one in scanned:
            one.keys = b""
            if self.dropped.within(source.start, source.size) < source.size:
                kept.append((source, one))
            else:
                check_unchanged(source.path, source.sha256)  # nobody reads it again
                reason = "all of its documents are duplicates of others"
                self.rejects.append(Reject(source.relative, source.sha256, reason, bad=False))
        return kept

    def _assign(self, scanned: list[tuple[Source, Scanned]], total: splits.Tally, names: Mapping[str, str]) -> Assign:
        """How documents are divided; total: of all that are left. Sets `kind` to the kind of split that it comes to."""
        if self.kind == "documents" and total.distinct < splits.ENOUGH:
            self.report(Note(text="fewer than three different documents: the corpus is cut into train, val and test"))
            self.kind = "contiguous"
        if self.kind == "contiguous":
            assign = splits.contiguous(total)
        elif self.kind == "given":
            starts = [source.start - self.dropped.before(source.start) for source, _ in scanned]
            given = [names[source.sha256] for source, _ in scanned]
            check_filled(given, "no document that can be used")
            assign = splits.as_given(starts, given)
        else:
            assign = splits.by_document(total) if self.kind == "documents" else splits.AllIn("test")
        return splits.without(self.dropped, assign)

    def _say_if_uneven(self, manifest: dict[str, Any]) -> None:
        """Say if a split is empty, or larger than the training split."""
        if self.kind == "test":
            return
        tokens = {name: split["tokens"] for name, split in manifest["splits"].items()}
        for name in ("val", "test"):
            if not tokens[name]:
                self.report(Note(text=f"the {name} split is empty"))
            elif tokens[name] > tokens["train"]:
                sizes = f"{tokens[name]:,} tokens, train has {tokens['train']:,}"
                self.report(Note(text=f"the {name} split is larger than the training split: {sizes}"))

    def _source(self, file: Input, variant: str = "") -> Source:
        # The suffix says how the bytes are read.
        suffix = max(filter(file.relative.lower().endswith, self.tokenizer.suffixes), key=len, default="")
        name = f"{file.sha256}{suffix}{'.' + variant if variant else ''}.ids"
        return Source(file.path, file.relative, file.sha256, self.staging / name, variant)

    def _scan(self, sources: list[Source], task: str, own: Collection[str] = ()) -> list[tuple[Source, Scanned]]:
        """Scan in worker processes what no other process has; rejected sources are recorded and left out.

        own: hashes of sources whose scans were nobody else's to leave.
        """
        found = {source: result for source in sources if (result := self.scanner.kept(source)) is not None}
        missing = [source for source in sources if source not in found]
        if self.merge:
            _check_none([source for source in missing if source.sha256 not in own], len(sources))
        groups = self.tokenizer.group(missing, self.n_workers)
        while groups:
            broken: list[Source] = []
            for group, results in self._in_workers(groups):
                if isinstance(results, Rejected):
                    if len(group) > 1:
                        broken += group  # one of them crashed the process; scanning each on its own will tell which
                        continue
                    if self.scanner.keep:
                        self.scanner.leave(group[0], results)
                found |= zip(group, [results] if isinstance(results, Rejected) else results, strict=True)
                self.report(Progress(task=task, done=len(found), total=len(sources), unit="files"))
            groups = [[source] for source in broken]
        kept: list[tuple[Source, Scanned]] = []
        for source in sources:
            result = found[source]
            if isinstance(result, Rejected):
                reason, passing = str(result), result.passing
                self.rejects.append(Reject(source.relative, source.sha256, reason, source.variant, passing=passing))
            else:
                kept.append((source, result))
        return kept

    def _in_workers(self, groups: list[list[Source]]) -> Iterator[tuple[list[Source], Any]]:
        return (self.execute or workers.in_order)(
            self.scanner,
            groups,
            (),
            workers=max(1, min(self.n_workers, len(groups))),
            timeout_s=self.recipe.data.file_timeout_s,
            memory_mb=self.recipe.data.file_memory_mb,
        )

    @property
    def _rejects_path(self) -> Path | None:
        """Where a user finds the reasons; None if the folder is a temporary one."""
        return None if self.kind == "test" else self.folder / "rejects.jsonl"

    def _total(self, scanned: list[tuple[Source, Scanned]]) -> splits.Tally:
        """The tally of all documents. Raises TooManyRejects if there are none."""
        total = splits.Tally(self.recipe.data.val, self.recipe.data.test)
        for _, one in scanned:
            total.merge(one.tally(total.val, total.test))
        if not total.documents:
            raise _all_rejected([reject for reject in self.rejects if reject.bad], self._rejects_path)
        return total

    def _variants(self, scanned: list[tuple[Source, Scanned]], assign: Assign) -> list[tuple[Source, Assign]]:
        """The augmented forms of the training documents, scanned, all of them for the training split."""
        names = self.tokenizer.variants
        if not names:
            return []
        if self.kind == "contiguous":
            raise UsageError("augmentation needs at least three different files and data.split = 'documents'")
        train = [source for source, one in scanned if _is_train(source, one, assign)]
        given = self.kind == "given"
        # A document that fills a split that would be empty has variants that no task could know of.
        moved = set() if given else {s.sha256 for s, one in scanned if not self._trains(s, one, {})}
        kept = self._scan(self._variants_of(train), "augment", own=moved)
        return [(replace(source, size=one.size), splits.AllIn("train")) for source, one in kept]

    def _variants_of(self, sources: list[Source]) -> list[Source]:
        files_ = [Input(source.relative, source.path, source.sha256) for source in sources]
        return [self._source(file, name) for file in files_ for name in self.tokenizer.variants]

    def _write(
        self,
        writer: FolderWriter,
        work: list[tuple[Source, Assign]],
        equal: dict[str, list[str]],
        empty: dict[str, int],
    ) -> None:
        """Write all ids. equal, empty: by the hash of a source, its equal files and how many empty records it has."""
        items = [
            Item(source, assign, tuple(equal.get(source.sha256, ())), empty.get(source.sha256, 0))
            for source, assign in work
        ]
        divided = list(parts(items, PART_SIZE)) if self.n_workers > 1 or self.execute else []
        if len(divided) > (1 if self.execute else WORTH_PARTS):
            self._assemble(writer, divided)
        else:
            for done, item in enumerate(items, 1):
                for one in encoded(self.tokenizer, item, self.n_workers):
                    writer.add(one.split, one.ids, one.units, one.record)
                self.report(Progress(task="write", done=done, total=len(items), unit="files"))
        self.tokenizer.save(writer.partial / "tokenizer")

    def _assemble(self, writer: FolderWriter, divided: list[tuple[int, list[Item]]]) -> None:
        """Write all ids in worker processes: parts of the corpus first, then shards."""
        writer.leave_shards()
        made = PartWriter(writer.partial / "parts", self.tokenizer.vocabulary)
        files.make_folder(made.folder)
        jobs = ((number, _within(items)) for number, items in divided)
        done, total = 0, sum(len(items) for _, items in divided)
        for (_, items), result in self._writing(PartEncoder(self.tokenizer, made), jobs, len(divided)):
            if isinstance(result, Rejected):
                raise result
            done += len(items)
            self.report(Progress(task="write", done=done, total=total, unit="files"))
        shards = laid_out(made, len(divided), self.recipe.data.shard_tokens, writer.place)
        for shard, result in self._writing(ShardMaker(writer.partial, made), shards, len(divided)):
            if isinstance(result, Rejected):
                raise ShortcutError(f"{shard.name}.bin could not be written: {result}", "run the same command again")
            writer.hashes[f"{shard.name}.bin"] = result
        shutil.rmtree(made.folder)

    def _writing(self, work: Callable[..., Any], jobs: Iterable[Any], most: int) -> Iterator[tuple[Any, Any]]:
        data = self.recipe.data
        return (self.execute or workers.in_order)(
            work,
            jobs,
            (),
            workers=min(self.n_workers, most),
            timeout_s=WRITE_TIMES * data.file_timeout_s,
            memory_mb=data.file_memory_mb,
        )

    def _manifest_fields(self, hashed: list[Input], total: splits.Tally) -> dict[str, Any]:
        """What the manifest says about the tokenizer, the files and their documents."""
        equal = sum(len(file.duplicates) for file in hashed)
        unread = sum(reject.sha256 is None for reject in self.rejects)
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
            "inputs": len(hashed) + equal + unread,
            "duplicates": equal,
            "documents_duplicated": self.dropped.documents,
            "rejected": sum(reject.bad and not reject.variant for reject in self.rejects),
            "unfinished": sum(reject.passing for reject in self.rejects),
            "outside_splits": sum(reject.sha256 is None and not reject.bad for reject in self.rejects),
            "variants_rejected": sum(bool(reject.variant) for reject in self.rejects),
            "records": total.records,
            "records_rejected": total.records_rejected,
        }

    def _reject_lines(self, equal: dict[str, list[str]], bad: list[Source]) -> Iterator[dict[str, Any]]:
        """The lines of rejects.jsonl: files, records (of the sources `bad`), variants, files that were not wanted."""
        yield from self._file_lines(equal, lambda reject: reject.bad and not reject.variant)
        for source in bad:
            with open(rejected_records(source), encoding="utf-8") as stream:
                yield from ({"source": source.relative, **json.loads(line)} for line in stream)
        yield from self._file_lines(equal, lambda reject: bool(reject.variant))
        yield from self._file_lines(equal, lambda reject: not reject.bad)

    def _file_lines(self, equal: dict[str, list[str]], wanted: Callable[[Reject], bool]) -> list[dict[str, Any]]:
        lines = [reject.line() for reject in self.rejects if wanted(reject)]
        for line in lines:
            if "variant" not in line and line["sha256"] in equal:
                line["duplicates"] = equal[line["sha256"]]
        return sorted(lines, key=json.dumps)


def _check_none(missing: list[Source], total: int) -> None:
    """Raise Missing, with the first three names, if there are scans that no task has left."""
    if missing:
        names = "".join(f"\n  {one.relative}{' ' + one.variant if one.variant else ''}" for one in missing[:3])
        raise Missing(
            f"no task has scanned {len(missing):,} of {total:,} files{names}",
            "run the tasks that were killed again, or leave out --merge: then this process scans them",
        )


def _with_places(scanned: list[tuple[Source, Scanned]]) -> list[tuple[Source, Scanned]]:
    """The sources with their sizes and their places in the corpus."""
    start = 0
    for place, (source, one) in enumerate(scanned):  # in place: there may be very many
        scanned[place] = replace(source, size=one.size, start=start), one
        start += one.size
    return scanned


def _is_train(source: Source, one: Scanned, assign: Assign) -> bool:
    size = one.size
    return assign(Document(one.only, source.start, size)) == [("train", size)]


def _within(items: list[Item]) -> list[Item]:
    """Consecutive items whose assignment knows no other documents, so that it is small enough for another process."""
    own = [item.source for item in items if not isinstance(item.assign, splits.AllIn)]
    if not own:
        return items
    division = next(item.assign for item in items if item.source is own[0])
    assert isinstance(division, splits.Division), division
    known = division.within(own[0].start, own[-1].start + own[-1].size)
    return [item if isinstance(item.assign, splits.AllIn) else replace(item, assign=known) for item in items]


def _all_rejected(rejects: list[Reject], path: Path | None = None) -> TooManyRejects:
    shown = [f"  {reject.source}: {reject.reason}" for reject in rejects[:10]]
    more = [f"  and {len(rejects) - 10} more"] if len(rejects) > 10 else []
    hint = f"{path} has all reasons" if path else ""
    return TooManyRejects(f"all {len(rejects)} files were rejected\n" + "\n".join(shown + more), hint)
