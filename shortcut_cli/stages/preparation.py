"""Prepare: files -> a shards folder whose bytes depend only on the files, the recipe and the tokenizer.

Files are listed and hashed here, and tokenized by `tokenization` unless that was done before. The scan can be divided
into tasks, on machines that share the folder (`prepare_part`): each takes the files whose names fall to it and leaves
what it found by the hash of their bytes, so that `prepare` only puts it together.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_cli import cleanup, files, registry
from shortcut_cli.config.schema import Recipe
from shortcut_cli.config.writing import differences
from shortcut_cli.data import executors, inputs, objects
from shortcut_cli.data.given import Given, check_filled
from shortcut_cli.data.hashed import HASH_BYTES, Input, Inputs
from shortcut_cli.data.hashes import Hashes, in_threads
from shortcut_cli.data.rejects import Reject, check_rejects, described, passing_rejects, rejects_summary
from shortcut_cli.data.shards import (
    PREPARE,
    check_free,
    is_shards,
    read_manifest,
    source_paths_file,
)
from shortcut_cli.errors import (
    Rejected,
    Unfinished,
    UsageError,
    unreadable,
)
from shortcut_cli.events import Note, Progress, Report
from shortcut_cli.tokenizers.base import Tokenizer
from shortcut_cli.tokenizers.tokenization import Tokenization


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
    if rejected := rejects_summary(folder, manifest):
        counts, *first = rejected
        report(Note(text="\n".join([f"{counts} were rejected; {folder / 'rejects.jsonl'} has all reasons", *first])))
    if manifest.get("unfinished"):
        raise Unfinished(manifest["unfinished"], map(described, islice(passing_rejects(folder), 3)))
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
        preparation = Tokenization(recipe, tokenizer, kind, folder, rejects, n_workers=n_workers, report=report)
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
            preparation = Tokenization(recipe, tokenizer, kind, folder, rejects + outside, **options)
            if manifest is None or not preparation.fails_again(hashed):
                summary["worked"], manifest = True, preparation.run(hashed, request)
        if summary["worked"]:
            tokens = sum(split["tokens"] for split in manifest["splits"].values())
            summary["tokens_per_s"] = round(tokens / (time.monotonic() - began), 1)
        _remember_paths(manifest, paths, report)
    check_rejects(folder, manifest, max_bad, kept=kind != "test")
    return manifest | summary


def _found(
    recipe: Recipe, tokenizer: Tokenizer, kind: str, paths: list[str], folder: Path, fetched: Path, report: Report
) -> tuple[inputs.Found, list[str] | None, list[Reject]]:
    """The files behind `paths`; if splits come with them, the split of each, and those that are in none.

    fetched: the folder that objects will be fetched to.
    """
    found = inputs.find(paths, tokenizer.suffixes, out=folder, fetched=fetched)
    if not found.files and not found.rejects:
        raise found.none(tokenizer.suffixes, paths, folder)
    if found.outputs:
        report(Note(text=f"left out, since shortcut has written it: {', '.join(found.outputs)}"))
    if found.ignored:
        report(Note(text=found.ignored_in_words()))
    assigned, outside = _assigned(recipe, found, report) if kind == "given" else (None, [])
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


def _assigned(recipe: Recipe, found: inputs.Found, report: Report) -> tuple[list[str], list[Reject]]:
    """The split of each file that data.splits names, and the files that it does not, which are left out of `found`."""
    lists, every = recipe.data.splits, found.files
    given = Given({"train": lists.train, "val": lists.val, "test": lists.test}, lists.table)
    if given.others:
        names = ", ".join(sorted(map(repr, given.others))[:5])
        report(Note(text=f"files of {lists.table} are left out whose split is none of train, val and test: {names}"))
    assigned = [given.split_of(name, every.named(at)) for at, name in enumerate(every.names)]
    check_filled(assigned, "no file")
    outside = [
        Reject(name, None, "is in none of data.splits", bad=False)
        for name, split in zip(every.names, assigned, strict=True)
        if not split
    ]
    found.files = every.taken(np.array([at for at, split in enumerate(assigned) if split], np.int64))
    return [split for split in assigned if split], outside


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
        for place, result in enumerate(in_threads(pool, digest, len(listed))):
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
