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
from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shortcut_cli import __version__, cleanup, files, registry
from shortcut_cli.config.schema import Recipe
from shortcut_cli.config.writing import differences
from shortcut_cli.data import duplicates, executors, inputs, objects, splits, workers
from shortcut_cli.data.assembly import PartWriter, ShardMaker, laid_out
from shortcut_cli.data.columns import Places, Rows
from shortcut_cli.data.documents import Assign, Document, Source, check_unchanged
from shortcut_cli.data.given import PREFERRED, Given, check_filled
from shortcut_cli.data.hashed import HASH_BYTES, Input, Inputs
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
from shortcut_cli.tokenizers.scanning import Scanned, Scanner, Scans, rejected_records

HASHED = 1 << 12  # files that are given to threads at once
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
    mine = np.array([at for at, name in enumerate(found.files.names) if _task_of(name, task[1]) == task[0]], np.int64)
    found.files, assigned = found.files.taken(mine), assigned and [assigned[at] for at in mine]
    found.rejects.clear()  # `prepare` finds them too
    with files.held(folder, PREPARE, known=is_shards, shared=True), _removed(fetched):
        result = {"task": "/".join(map(str, task)), "files": total, "mine": len(mine), "rejected": 0}
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
) -> tuple[inputs.Found, list[str] | None, list[Reject]]:
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
    assigned, outside = _assigned(recipe, found) if kind == "given" else (None, [])
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


def _ignored(names: Sequence[str]) -> str:
    """Which files were ignored because of their suffix: how many of each suffix, and the first three."""
    counts = Counter(os.path.splitext(name)[1].lower() or "without suffix" for name in names)
    suffixes = ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(5))
    more = f" and {len(counts) - 5} other suffixes" if len(counts) > 5 else ""
    return (
        f"ignored because of their suffix: {suffixes}{more} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    )


def _assigned(recipe: Recipe, found: inputs.Found) -> tuple[list[str], list[Reject]]:
    """The split of each file that data.splits names, and the files that it does not, which are left out of `found`."""
    lists, every = recipe.data.splits, found.files
    given = Given({"train": lists.train, "val": lists.val, "test": lists.test}, lists.table)
    assigned = [given.split_of(name, every.named(at)) for at, name in enumerate(every.names)]
    check_filled(assigned, "no file")
    outside = [
        Reject(name, None, "is in none of data.splits", bad=False)
        for name, split in zip(every.names, assigned, strict=True)
        if not split
    ]
    found.files = every.taken(np.array([at for at, split in enumerate(assigned) if split], np.int64))
    return [split for split in assigned if split], outside


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


def _hash(
    found: inputs.Found,
    threads: int,
    report: Report,
    assigned: Sequence[str] | None,
    hashes: Hashes,
) -> tuple[Inputs, list[Reject]]:
    """Hash every file; equal files are kept once, under the first of their names.

    assigned: the split of each file, if they come with the corpus; then the first is sought in test, val, then train.
    hashes: those that are known already. Objects are fetched, unless a task has kept them.
    """
    rejects = [Reject(relative, None, reason, passing=relative in found.passing) for relative, reason in found.rejects]
    listed, digests, unread = found.files, bytearray(HASH_BYTES * len(found.files)), list[int]()

    def digest(place: int) -> str | Rejected:
        (name, path), wanted = listed[place], listed.object(place)
        try:
            return hashes.fetched(wanted, path) if wanted else hashes.sha256(name, path)
        except Rejected as reason:
            return reason
        except OSError as error:
            if wanted:
                raise  # it is the disk that is full, not an input that can't be read
            return unreadable(error)

    with ThreadPoolExecutor(max(threads, objects.THREADS) if found.remote else threads) as pool:
        blocks = (range(len(listed))[first : first + HASHED] for first in range(0, len(listed), HASHED))
        results = chain.from_iterable(pool.map(digest, block) for block in blocks)  # each waits in a future of its own
        for place, result in enumerate(results):
            if isinstance(result, Rejected):
                rejects.append(Reject(listed.names[place], None, str(result), passing=result.passing))
                unread.append(place)
            else:
                digests[HASH_BYTES * place : HASH_BYTES * (place + 1)] = bytes.fromhex(result)
            report(Progress(task="read", done=place + 1, total=len(listed), unit="files"))
    return Inputs(listed, digests, unread, assigned), rejects


def _request(recipe: Recipe, tokenizer: Tokenizer, hashed: Iterable[Input]) -> dict[str, Any]:
    """Everything that was asked for, to tell whether a command is the same as an earlier one."""
    digest, count = hashlib.sha256(), 0
    for number, file in enumerate(hashed):
        line = json.dumps([file.relative, file.sha256, *file.duplicates]) + file.split
        digest.update(("\n" * (number > 0) + line).encode())
        count += 1 + len(file.duplicates)
    data = recipe.data.model_dump(exclude={"shards", "file_timeout_s", "file_memory_mb"})
    return {
        "data": data,
        "tokenizer": recipe.tokenizer.model_dump(),
        "depends_on": tokenizer.depends_on,
        "inputs": {"files": count, "sha256": digest.hexdigest()},
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


Make = Callable[[Input, str], Source]  # of a file and a variant


class Some(Rows[Source]):
    """Some sources of a sequence."""

    def __init__(self, sources: Sequence[Source], numbers: Sequence[int]) -> None:
        self.sources, self.numbers = sources, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def row(self, place: int) -> Source:
        """One of them."""
        return self.sources[self.numbers[place]]


class Sources(Rows[Source]):
    """Sources of files, with their sizes and their places in the corpus if they were scanned."""

    def __init__(self, hashed: Inputs, make: Make, numbers: Places, scans: Scans | None = None) -> None:
        """numbers: of the files, and of their scans."""
        self.inputs, self.make, self.numbers = hashed, make, numbers
        self.found = scans
        self.starts = scans.starts() if scans else np.zeros(0, np.int64)

    @property
    def scans(self) -> Scans:
        """What was found in all files."""
        assert self.found is not None
        return self.found

    def __len__(self) -> int:
        return len(self.numbers)

    def row(self, place: int) -> Source:
        """The source of a file."""
        number = int(self.numbers[place])
        source = self.make(self.inputs[number], "")
        return replace(source, size=self.found.size[number], start=int(self.starts[number])) if self.found else source

    def only(self, numbers: Places) -> "Sources":
        """Those of some of the files."""
        found = copy.copy(self)
        found.numbers = numbers
        return found


class Variants(Rows[Source]):
    """The augmented forms of files, all those of a file after each other."""

    def __init__(self, hashed: Inputs, make: Make, numbers: Places, names: list[str]) -> None:
        """numbers: of the files. names: of the forms."""
        self.inputs, self.make, self.numbers, self.names = hashed, make, numbers, names

    def __len__(self) -> int:
        return len(self.numbers) * len(self.names)

    def row(self, place: int) -> Source:
        """A form of a file."""
        file, form = divmod(place, len(self.names))
        return self.make(self.inputs[int(self.numbers[file])], self.names[form])


class Work(Rows[Item]):
    """All that is written, in order: sources, and after each its augmented forms, which are for the training split."""

    def __init__(self, sources: Sources, assign: Assign, names: list[str], train: Places, scans: Scans) -> None:
        """names: of the forms. train: places of the sources that have them. scans: of `Variants`."""
        self.sources, self.assign, self.names, self.scans = sources, assign, sorted(names), scans
        # If there are forms: a source and the number of a form by name, or 0, in one number.
        self.step, self.entries = len(names) + 1, np.zeros(0, np.int64)
        if len(train):
            files, forms = np.divmod(np.flatnonzero(scans.found), len(names))
            ranks = np.array([1 + self.names.index(name) for name in names])
            alone = np.arange(len(sources)) * self.step
            self.entries = np.sort(np.concatenate([alone, train[files] * self.step + ranks[forms]]))
        self.train, self.forms = train, [names.index(name) for name in self.names]

    def __len__(self) -> int:
        return len(self.entries) if len(self.train) else len(self.sources)

    def _form(self, place: int, rank: int) -> int:
        """The number of the scan of a form."""
        return int(self.train.searchsorted(place)) * len(self.names) + self.forms[rank - 1]

    def sizes(self) -> npt.NDArray[Any]:
        """The size of each."""
        if not len(self.train):
            sizes: npt.NDArray[Any] = self.sources.scans.size.values[self.sources.numbers]
            return sizes
        places, ranks = np.divmod(self.entries, self.step)
        found: Places = self.sources.scans.size.values[self.sources.numbers[places]].astype(np.int64)
        for at in np.flatnonzero(ranks).tolist():
            found[at] = self.scans.size[self._form(int(places[at]), int(ranks[at]))]
        return found

    def row(self, at: int) -> Item:
        """A source or a form, with the names of the files that have its bytes."""
        place, rank = divmod(int(self.entries[at]), self.step) if len(self.train) else (at, 0)
        number = int(self.sources.numbers[place])
        file = self.sources.inputs[number]
        source, assign = self.sources[place], self.assign
        if rank:
            form = self.sources.make(file, self.names[rank - 1])
            source, assign = replace(form, size=self.scans.size[self._form(place, rank)]), splits.AllIn("train")
        return Item(source, assign, file.duplicates, self.sources.scans.records_empty[number])


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

    def run(self, hashed: Inputs, request: dict[str, Any]) -> dict[str, Any]:
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
                    left, changed = left.without(found), [*changed, *found.values()]
                    first = next(iter(found.values()))
                    self.report(Note(text=f"{first.source} {first.reason}; preparing the other files again"))
                    self._begin(changed)
        except (UsageError, TooManyRejects):
            lines = self._reject_lines(hashed, [])
            files.write(self.folder / "rejects.jsonl", "".join(to_json(line) + "\n" for line in lines))
            raise
        finally:
            with suppress(OSError):  # there is something in them
                self.staging.rmdir()
                self.staging.parent.rmdir()

    def scan_part(self, hashed: Inputs) -> None:
        """Scan files, and the variants of those that the training split gets if no split is empty; keep the results."""
        self.scanner = replace(self.scanner, keep=True)
        sources = self._sources(hashed)
        scans = self._scan(sources, "scan", self._tally())
        if self.kind != "contiguous" and self.tokenizer.variants:
            train = [number for number in np.flatnonzero(scans.found).tolist() if self._trains(hashed, scans, number)]
            self._scan(self._variants_of(sources, np.array(train, np.int64)), "augment")

    def _trains(self, hashed: Inputs, scans: Scans, number: int) -> bool:
        """Whether the training split gets a source, as far as its name or hash tells."""
        if self.kind == "given":
            return hashed.split(number) == "train"
        return splits.split_of(scans.only(number), *self._shares) == "train"

    @property
    def _shares(self) -> tuple[float, float]:
        return self.recipe.data.val, self.recipe.data.test

    def _tally(self) -> splits.Tally:
        return splits.Tally(*self._shares)

    def _changed(self, hashed: Inputs) -> dict[int, Reject]:
        """The files whose bytes are not those any more that were hashed, by their numbers."""

        def check(number: int) -> Reject | None:
            file = hashed[number]
            try:
                check_unchanged(file.path, file.sha256)
            except Rejected as reason:
                return Reject(file.relative, file.sha256, str(reason), passing=True)
            return None

        with ThreadPoolExecutor(self.n_workers) as pool:
            blocks = (range(len(hashed))[first : first + HASHED] for first in range(0, len(hashed), HASHED))
            checked = enumerate(chain.from_iterable(pool.map(check, block) for block in blocks))
            return {number: reject for number, reject in checked if reject}

    def _run(self, hashed: Inputs, left: Inputs, request: dict[str, Any]) -> dict[str, Any]:
        """One try. hashed: all files; left: those to be used."""
        total = self._tally()
        scans = self._scan(self._sources(left), "scan", total)
        if not total.documents:
            raise _all_rejected([reject for reject in self.rejects if reject.bad], self._rejects_path)
        everything = self._sources(left, scans)
        scanned = self._without_duplicates(everything)
        assign = self._assign(scanned, replace(total, size=total.size - self.dropped.size))
        if self.tokenizer.needs_fit:
            self.report(Note(text="training the tokenizer on the training split"))
            note = self.tokenizer.fit(scanned, assign)
            if note:
                self.report(Note(text=note))
        work = Work(scanned, assign, *self._variants(scanned, assign))
        vocabulary, eos = self.tokenizer.vocabulary, self.tokenizer.eos
        with FolderWriter(self.folder, vocabulary, self.recipe.data.shard_tokens, eos=eos) as writer:
            self._write(writer, work)
            fields = {"request": request, "split": self.kind, **self._manifest_fields(hashed, total)}
            bad = everything.only(np.flatnonzero(scans.records_rejected.values))
            manifest = writer.finish(self._reject_lines(hashed, bad), fields)
        if not manifest["unfinished"]:
            shutil.rmtree(self.folder / ".staging", ignore_errors=True)  # it may be a link to another disk
        self._say_if_uneven(manifest)
        return manifest

    def fails_again(self, hashed: Inputs) -> bool:
        """Whether all files that an earlier preparation could not read because of the machine still can't be read.

        Then its folder is what another preparation of the same files would write, too.
        """
        before, lines = len(self.rejects), list(_passing(self.folder))
        unread = {line["source"] for line in lines if not line["sha256"]}
        if unread != {reject.source for reject in self.rejects if reject.passing}:
            return False  # what could not be hashed then is gone or rejected now
        lines = [line for line in lines if line["sha256"]]
        known = {file.sha256: file for _, file in hashed.of({line["sha256"] for line in lines})}
        if any(line["sha256"] not in known for line in lines):
            return False
        wanted = [self._source(known[line["sha256"]], line.get("variant", "")) for line in lines]
        read = self._scan(wanted, "try again").found.any()
        again = self.rejects[before:]
        del self.rejects[before:]
        return not read and all(reject.passing for reject in again)

    def _without_duplicates(self, everything: "Sources") -> "Sources":
        """Find the documents to drop; returns the sources without those that hold no others."""
        if self.recipe.data.duplicates == "keep":
            return everything
        order, starts, sizes = everything.numbers, everything.starts, everything.scans.size.values
        if self.kind == "given":
            ranks = np.array([PREFERRED.index(everything.inputs.split(number)) for number in order.tolist()], np.uint8)
            order = order[np.argsort(ranks, kind="stable")]
        self.dropped = everything.scans.dropped(starts, order)
        if not self.dropped.documents:
            return everything
        begins = starts[everything.numbers]
        ends = begins + sizes[everything.numbers]
        left = self.dropped.befores(ends) - self.dropped.befores(begins) < ends - begins
        for source in everything.only(everything.numbers[~left]):
            check_unchanged(source.path, source.sha256)  # nobody reads it again
            reason = "all of its documents are duplicates of others"
            self.rejects.append(Reject(source.relative, source.sha256, reason, bad=False))
        return everything.only(everything.numbers[left])

    def _assign(self, scanned: "Sources", total: splits.Tally) -> Assign:
        """How documents are divided; total: of all that are left. Sets `kind` to the kind of split that it comes to."""
        if self.kind == "documents" and total.distinct < splits.ENOUGH:
            self.report(Note(text="fewer than three different documents: the corpus is cut into train, val and test"))
            self.kind = "contiguous"
        if self.kind == "contiguous":
            assign = splits.contiguous(total)
        elif self.kind == "given":
            begins = scanned.starts[scanned.numbers]
            given = [scanned.inputs.split(number) for number in scanned.numbers.tolist()]
            check_filled(given, "no document that can be used")
            assign = splits.as_given(begins - self.dropped.befores(begins), given)
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

    def _sources(self, hashed: Inputs, scans: Scans | None = None) -> "Sources":
        """Sources of files: all, or those in which a scan has found something."""
        numbers = np.arange(len(hashed)) if scans is None else np.flatnonzero(scans.found)
        return Sources(hashed, self._source, numbers, scans)

    def _scan(
        self, sources: Sequence[Source], task: str, total: splits.Tally | None = None, own: Collection[str] = ()
    ) -> Scans:
        """Scan in worker processes what no other process has; rejected sources are recorded.

        total: see `Scans`. own: hashes of sources whose scans were nobody else's to leave.
        """
        scans = Scans(len(sources), total, only=bool(total and self.tokenizer.variants))
        rejected, done = dict[int, Rejected](), 0

        def note(number: int, result: Scanned | Rejected) -> None:
            nonlocal done
            done += 1
            if isinstance(result, Rejected):
                rejected[number] = result
            else:
                scans.put(number, result)

        missing = array("Q")
        staged = any(self.staging.iterdir())
        for number, source in enumerate(sources):
            if staged and (result := self.scanner.kept(source)) is not None:
                note(number, result)
            else:
                missing.append(number)
        if self.merge:
            _check_none([n for n in missing if sources[n].sha256 not in own], sources)
        at_once, groups = deque[Sequence[int]](), Some(sources, missing)
        every: Iterable[Sequence[int]] = self.tokenizer.group(groups, self.n_workers)
        while True:
            broken = list[int]()
            jobs = _noted(groups, every, at_once)
            for group, results in self._in_workers(jobs, len(groups)):
                numbers = at_once.popleft()
                if isinstance(results, Rejected):
                    if len(group) > 1:
                        broken += numbers  # one of them crashed the process; scanning each on its own will tell which
                        continue
                    if self.scanner.keep:
                        self.scanner.leave(group[0], results)
                for number, result in zip(
                    numbers, [results] if isinstance(results, Rejected) else results, strict=True
                ):
                    note(number, result)
                self.report(Progress(task=task, done=done, total=len(sources), unit="files"))
            if not broken:
                break
            groups, every = Some(sources, broken), ([place] for place in range(len(broken)))
        for number in sorted(rejected):
            source, reason = sources[number], rejected[number]
            text, passing = str(reason), reason.passing
            self.rejects.append(Reject(source.relative, source.sha256, text, source.variant, passing=passing))
        return scans

    def _in_workers(self, groups: Iterable[list[Source]], most: int) -> Iterator[tuple[list[Source], Any]]:
        if not most:
            return iter(())
        return (self.execute or workers.in_order)(
            self.scanner,
            groups,
            (),
            workers=min(self.n_workers, most),
            timeout_s=self.recipe.data.file_timeout_s,
            memory_mb=self.recipe.data.file_memory_mb,
        )

    @property
    def _rejects_path(self) -> Path | None:
        """Where a user finds the reasons; None if the folder is a temporary one."""
        return None if self.kind == "test" else self.folder / "rejects.jsonl"

    def _variants(self, scanned: "Sources", assign: Assign) -> tuple[list[str], Places, Scans]:
        """The augmented forms of the training documents, scanned: their names, see `Work`."""
        names = self.tokenizer.variants
        if not names:
            return [], np.zeros(0, np.int64), Scans(0)
        if self.kind == "contiguous":
            raise UsageError("augmentation needs at least three different files and data.split = 'documents'")
        scans = scanned.scans
        train, moved = array("q"), set[str]()
        for place, source in enumerate(scanned):
            number = int(scanned.numbers[place])
            if assign(Document(scans.only(number), source.start, source.size)) == [("train", source.size)]:
                train.append(place)
                # A document that fills a split that would be empty has variants that no task could know of.
                if self.kind != "given" and not self._trains(scanned.inputs, scans, number):
                    moved.add(source.sha256)
        chosen = np.array(train, np.int64)
        return names, chosen, self._scan(self._variants_of(scanned, chosen), "augment", own=moved)

    def _variants_of(self, sources: "Sources", places: Places) -> "Variants":
        return Variants(sources.inputs, self._source, sources.numbers[places], self.tokenizer.variants)

    def _write(self, writer: FolderWriter, work: "Work") -> None:
        """Write all ids."""
        divided = parts(work.sizes(), PART_SIZE) if self.n_workers > 1 or self.execute else []
        if len(divided) > (1 if self.execute else WORTH_PARTS):
            self._assemble(writer, work, divided)
        else:
            for done, item in enumerate(work, 1):
                for one in encoded(self.tokenizer, item, self.n_workers):
                    writer.add(one.split, one.ids, one.units, one.record)
                self.report(Progress(task="write", done=done, total=len(work), unit="files"))
        self.tokenizer.save(writer.partial / "tokenizer")

    def _assemble(self, writer: FolderWriter, work: "Work", divided: list[tuple[int, int]]) -> None:
        """Write all ids in worker processes: parts of the corpus first, then shards."""
        writer.leave_shards()
        made = PartWriter(writer.partial / "parts", self.tokenizer.vocabulary)
        files.make_folder(made.folder)
        jobs = ((number, _within(work[first:last])) for number, (first, last) in enumerate(divided))
        done = 0
        for (_, items), result in self._writing(PartEncoder(self.tokenizer, made), jobs, len(divided)):
            if isinstance(result, Rejected):
                raise result
            done += len(items)
            self.report(Progress(task="write", done=done, total=len(work), unit="files"))
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

    def _manifest_fields(self, hashed: Inputs, total: splits.Tally) -> dict[str, Any]:
        """What the manifest says about the tokenizer, the files and their documents."""
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
            "inputs": len(hashed) + hashed.equal + unread,
            "duplicates": hashed.equal,
            "documents_duplicated": self.dropped.documents,
            "rejected": sum(reject.bad and not reject.variant for reject in self.rejects),
            "unfinished": sum(reject.passing for reject in self.rejects),
            "outside_splits": sum(reject.sha256 is None and not reject.bad for reject in self.rejects),
            "variants_rejected": sum(bool(reject.variant) for reject in self.rejects),
            "records": total.records,
            "records_rejected": total.records_rejected,
        }

    def _reject_lines(self, hashed: Inputs, bad: Iterable[Source]) -> Iterator[dict[str, Any]]:
        """The lines of rejects.jsonl: files, records (of the sources `bad`), variants, files that were not wanted."""
        rejected = hashed.of({reject.sha256 for reject in self.rejects if reject.sha256})
        equal = {file.sha256: list(file.duplicates) for _, file in rejected if file.duplicates}
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


def _noted(sources: Some, groups: Iterable[Sequence[int]], at_once: deque[Sequence[int]]) -> Iterator[list[Source]]:
    """The sources of each group of places, once the numbers of its sources are appended to `at_once`."""
    for places in groups:
        at_once.append([sources.numbers[place] for place in places])
        yield [sources[place] for place in places]


def _check_none(missing: list[int], sources: Sequence[Source]) -> None:
    """Raise Missing, with the first three names, if there are scans that no task has left."""
    if missing:
        first = [sources[number] for number in missing[:3]]
        names = "".join(f"\n  {one.relative}{' ' + one.variant if one.variant else ''}" for one in first)
        raise Missing(
            f"no task has scanned {len(missing):,} of {len(sources):,} files{names}",
            "run the tasks that were killed again, or leave out --merge: then this process scans them",
        )


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
