"""Prove: check on the user's own data what the project promises.

`resume`: a training run that is killed at random times ends with the same weights as one that is not. `tokens`:
documents of a shards folder, tokenized again from their sources in blocks of another size, get the same ids.
"""

import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_cli import SCHEMA_VERSION, cleanup, files, registry
from shortcut_cli.compare import watching
from shortcut_cli.config import reading, writing
from shortcut_cli.config.schema import Recipe
from shortcut_cli.data import inputs
from shortcut_cli.data.documents import Document, Source
from shortcut_cli.data.shards import SPLITS, Shards, Split, read_lines, source_paths_file
from shortcut_cli.errors import CheckFailed, Rejected, ShortcutError, UsageError
from shortcut_cli.events import Part, Progress, Report, Whole
from shortcut_cli.kept.inputs import is_number
from shortcut_cli.tokenizers.base import Tokenizer
from shortcut_cli.training import checkpoint, conditions, run_log

POLL_S = 0.2
KILLED = 0.5  # of a training, that is done until a kill on average
SCALES = (0.4, 3.7, 30.0)  # factors on the size of the blocks in which `tokens` reads and computes


def weights_sha256(path: Path) -> str:
    """Hex SHA-256 of the weights in a checkpoint: their names, dtypes, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.load(path)["model"].items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def resume(resolved: Recipe, folder: Path, *, kills: int, seed: int, device: str, report: Report) -> dict[str, Any]:
    """Train into FOLDER/whole, then again into FOLDER/killed-1, with SIGKILL at `kills` random times.

    If that run ends before it was killed often enough, it is followed by killed-2, and so on. seed: of the kill times.
    All of them compute with the same number of threads, since the weights depend on it.

    Returns the hashes of the weights, whether weights and logs are equal, the steps at which killed runs resumed, and
    under which conditions.

    Raises UsageError if the folder is not empty, ShortcutError if a training run fails on its own.
    """
    files.check_empty(folder)
    files.make_folder(folder)
    # The recipe's shards folder may be relative to the current folder.
    with conditions.threads(resolved.train.threads):
        here = conditions.now(device)
    shards = f"data.shards={files.place(resolved.data.shards).resolve()}"
    tree = reading.with_settings(resolved, [shards, f"train.threads={here['threads']}"])
    files.write(folder / "recipe.toml", writing.dump(tree))
    ahead = _Ahead(kills, report)
    ahead.begin("training without interruption")
    with ahead.watched() as told:
        _finish(_start(folder, "whole", device, told))
    ahead.seconds = time.monotonic() - ahead.began
    generator, resumed_at = random.Random(seed), list[int]()  # noqa: S311
    names = ["killed-1"]
    while len(resumed_at) < kills:
        ahead.begin(f"training until kill {len(resumed_at) + 1} of {kills}", over=len(resumed_at) + 1)
        with ahead.watched() as told:
            training = _start(folder, names[-1], device, told)
            try:
                training.wait(generator.uniform(0, ahead.seconds))
            except subprocess.TimeoutExpired:
                training.kill()
                training.communicate()
                resumed_at.append(_saved_step(folder / names[-1]))
                continue
        _finish(training)
        names.append(f"killed-{len(names) + 1}")
    ahead.begin("training to the end", over=kills + 1)
    with ahead.watched() as told:
        _finish(_start(folder, names[-1], device, told))
    whole, *killed = (weights_sha256(folder / name / "resume.pt") for name in ("whole", *names))
    best = {weights_sha256(folder / name / "run.pt") for name in ("whole", *names)}
    log, *logs = (_log(folder / name) for name in ("whole", *names))
    return {
        "schema_version": SCHEMA_VERSION,
        "kills": len(resumed_at),
        "resumed_at_steps": resumed_at,
        "uninterrupted_sha256": whole,
        "killed_sha256": killed,
        "equal_weights": set(killed) == {whole} and len(best) == 1,
        "equal_logs": all(other == log for other in logs),
        "conditions": conditions.told(here),
    }


def _start(folder: Path, name: str, device: str, told: int) -> "subprocess.Popen[str]":
    """Start `shortcut train`, which tells in an open file how far it is."""
    command = [sys.executable, "-m", "shortcut_cli", "train", "--recipe", str(folder / "recipe.toml")]
    command += ["--out", str(folder / name), "--device", device, "--no-report"]
    environment = os.environ | {watching.FILE: str(told)}
    return cleanup.start(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, pass_fds=[told]
    )


class _Ahead:
    """How far `resume` is: a training, then half a one until each kill, on average, and at most one to the end."""

    def __init__(self, kills: int, report: Report) -> None:
        self.report, self.kills = report, kills
        self.seconds = 0.0  # that the uninterrupted training took; 0: not known yet
        self.over = 0  # parts
        self.began = 0.0
        self.first: tuple[float, float] | None = None  # what was told first of that training: share, seconds spent

    def begin(self, text: str, over: int = 0) -> None:
        """A part begins."""
        self.over, self.began = over, time.monotonic()
        self.report(Part("prove resume", over + 1, self.kills + 2, text, self.whole(0.0, 0.0)))

    def whole(self, share: float, spent: float) -> Whole:
        """How far it is all in all. share: of the steps of this training; spent: seconds in this part."""
        seconds = self.seconds or self._expected(share, spent)
        done = share if self.over in (0, self.kills + 1) else min(KILLED, spent / self.seconds)
        done += min(self.over, 1) + KILLED * max(0, self.over - 1)
        every = 2 + KILLED * self.kills
        return Whole(done / every, self.over, (every - done) * seconds if seconds else None)

    def _expected(self, share: float, spent: float) -> float:
        """How long the first training takes: until its first step, and the steps; 0: not known yet."""
        if spent and not self.first:
            self.first = share, spent
        at, since = self.first or (0.0, 0.0)
        return since + (spent - since) / (share - at) if share > at else 0.0

    @contextmanager
    def watched(self) -> Iterator[int]:
        """Report what another process tells in this block; yields the number of the file in which it does."""
        ended = threading.Event()

        def watch(number: int) -> None:
            while not ended.wait(POLL_S):
                if event := watching.newest(number):
                    whole = self.whole(event.done / event.total, time.monotonic() - self.began)
                    self.report(replace(event, whole=whole))

        with tempfile.TemporaryFile() as told:
            watcher = threading.Thread(target=watch, args=(told.fileno(),), daemon=True)
            watcher.start()
            try:
                yield told.fileno()
            finally:
                ended.set()
                watcher.join()


def _finish(training: "subprocess.Popen[str]") -> None:
    _, errors = training.communicate()
    if training.returncode:
        raise ShortcutError(f"training failed with exit code {training.returncode}\n{errors[-2000:]}")


def _saved_step(run: Path) -> int:
    """The step of the newest saved state in a run folder; 0 if there is none yet."""
    steps = [checkpoint.load(path)["step"] for path in run.glob("resume*.pt")]
    return max(steps, default=0)


def _log(run: Path) -> list[dict[str, Any]]:
    """The lines of a log without their times."""
    return [{key: value for key, value in line.items() if key != "seconds"} for line in run_log.read_log(run)]


def tokens(folder: Path, paths: list[str], *, count: int, seed: int, report: Report) -> dict[str, Any]:
    """Tokenize `count` random sources of a shards folder again, in blocks of other sizes, and compare the ids.

    paths: what was prepared; if empty, the paths that `prepare` remembered in the cache.

    Returns how much was compared and which sources differ.

    Raises UsageError if the sources are unknown or missing, ShortcutError if the documents of a source have changed.
    """
    opened = Shards(folder)
    kept = reading.validate(_recipe_of(opened), f"{folder}/manifest.json")
    kind = registry.load(registry.TOKENIZERS, opened.tokenizer["name"])
    sources = _sources(opened, kind.suffixes, paths)
    wanted = _choose(folder, count, seed)
    cut = opened.manifest.get("split") == "contiguous"
    if cut and getattr(kept.tokenizer, "bpe", 0):
        raise UsageError(
            "`prove tokens` does not support a contiguous split with tokenizer.bpe: "
            "the ids do not show where documents were cut"
        )
    splits = {name: opened.split(name) for name in SPLITS}
    drops = opened.manifest["request"].get("data", {}).get("duplicates") == "drop"
    dropped: dict[str, Path] | None = {} if drops else None
    read, compared, different = 0, 0, []
    with files.temporary_folder() as scratch:
        for done, ((name, variant), records) in enumerate(sorted(_records(folder, wanted).items()), 1):
            tokenizer: Tokenizer = kind.load(kept.tokenizer, folder / "tokenizer")
            tokenizer.block_scale = SCALES[done % len(SCALES)]
            if name not in sources:
                raise UsageError(f"{name} is in none of the paths", "name the paths that were prepared")
            unread = deque(records)
            for sha256, path in sorted({files.sha256(path): path for path in sources[name]}.items()):
                source = Source(path, name, sha256, scratch / f"{done}.ids", variant)
                if len(sources[name]) > 1 and not _is_next(tokenizer, source, unread, drops=drops):
                    continue
                left = len(unread)
                try:
                    for record, found in _again(tokenizer, source, unread, cut=cut, dropped=dropped):
                        ids = _stored(splits[record["split"]], record)
                        compared += len(ids)
                        if not np.array_equal(ids, np.append(found, tokenizer.eos)):
                            different.append(f"{name} {variant}".strip())
                except Rejected as reason:
                    raise _changed(path, f": it {reason}") from reason
                read += len(unread) < left
            if unread:
                raise _changed(path)
            report(Progress(task="prove", done=done, total=len(wanted), unit="sources"))
    _check_dropped(folder, dropped or {})
    return {
        "schema_version": SCHEMA_VERSION,
        "sources": read,
        "tokens": compared,
        "block_scales": list(SCALES),
        "different": sorted(set(different)),
    }


def _recipe_of(opened: Shards) -> dict[str, Any]:
    """A recipe with the tokenizer of a shards folder; the rest of it does not matter here."""
    request = opened.manifest["request"]
    return reading.read("text-tiny").model_dump() | {"tokenizer": request.get("tokenizer")}


def _sources(opened: Shards, suffixes: tuple[str, ...], paths: list[str]) -> dict[str, list[Path]]:
    """The files by their names in documents.jsonl, of which two have the same if they are below different roots."""
    remembered = source_paths_file(opened.manifest)
    if not paths and not remembered.is_file():
        raise UsageError(
            f"the sources of {opened.folder} are not known on this machine",
            "name the paths: shortcut prove tokens DIR PATH...",
        )
    found = inputs.find(paths or _remembered(remembered), suffixes)
    named: dict[str, list[Path]] = {}
    for name, path in found.files:
        named.setdefault(name, []).append(path)
    return named


def _remembered(path: Path) -> list[str]:
    """The paths that `prepare` remembered in the cache. Raises CheckFailed if the file is damaged."""
    hint = "name the paths: shortcut prove tokens DIR PATH..."
    try:
        found = json.loads(files.content(path))
    except (ValueError, RecursionError) as error:
        raise CheckFailed(f"{path} is damaged: {error}", hint) from error
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise CheckFailed(f"{path} is damaged: it holds no paths", hint)
    return found


def _choose(folder: Path, count: int, seed: int) -> set[tuple[str, str]]:
    """At most `count` random sources, each with its variant."""
    every = {(record["source"], record.get("variant", "")) for record in _documents(folder)}
    return set(random.Random(seed).sample(sorted(every), min(count, len(every))))  # noqa: S311


def _records(folder: Path, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The lines of documents.jsonl for the wanted sources, in order."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in wanted}
    for record in _documents(folder):
        key = (record["source"], record.get("variant", ""))
        if key in wanted:
            found[key].append(record)
    return found


def _is_next(tokenizer: Tokenizer, source: Source, unread: deque[dict[str, Any]], *, drops: bool) -> bool:
    """Whether the next record can be of this source, of several with one name.

    The others were rejected, or have the same bytes as one with another name. drops: whether duplicates were dropped,
    so that any source may have no record.
    """
    try:
        first = next((document for document in tokenizer.documents(source) if document.size), None)
    except Rejected:
        return False
    return drops or bool(first and unread and unread[0]["sha256"] == first.sha256)


def _documents(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of documents.jsonl. Raises CheckFailed if one of them is damaged."""
    return read_lines(folder / "documents.jsonl", _is_record)


def _is_record(record: dict[str, Any]) -> bool:
    """Whether a line is what `FolderWriter.add` writes."""
    return (
        all(isinstance(record.get(key), str) for key in ("source", "sha256", "split"))
        and all(type(record.get(key)) is int and record[key] >= 0 for key in ("shard", "offset", "tokens"))
        and isinstance(record.get("variant", ""), str)
        and isinstance(record.get("units"), dict)
        and all(is_number(amount) and math.isfinite(amount) for amount in record["units"].values())
        and record["split"] in SPLITS
    )


def _again(
    tokenizer: Tokenizer,
    source: Source,
    unread: deque[dict[str, Any]],
    *,
    cut: bool,
    dropped: dict[str, Path] | None,
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Each record of a source with the ids that it gets now; it is taken from `unread`, where others may follow.

    cut: whether a document can have several records. dropped: gets the hashes of documents without a record, with their
    source; None if every document has to have one.
    """
    size = sum(document.size for document in tokenizer.documents(source))
    taken = deque[dict[str, Any]]()

    def assign(document: Document) -> list[tuple[str, int]]:
        if not document.size:
            return []
        if dropped is not None and (not unread or unread[0]["sha256"] != document.sha256):
            dropped[document.sha256] = source.path
            return []
        parts: list[tuple[str, int]] = []
        while sum(size for _, size in parts) < document.size:
            record = unread.popleft() if unread else None
            if record is None or record["sha256"] != document.sha256:
                raise _changed(source.path)
            amount = int(record["units"].get("byte", 0)) if tokenizer.unit == "byte" else record["tokens"] - 1
            parts.append((record["split"], amount if cut else document.size))
            taken.append(record)
        return parts

    for chunk in tokenizer.encode(replace(source, size=size), assign, 2):
        yield taken.popleft(), np.concatenate([np.zeros(0, np.int64), *chunk.ids])
    if taken:
        raise _changed(source.path)


def _changed(path: Path, how: str = "") -> ShortcutError:
    return ShortcutError(f"the documents of {path} have changed since it was prepared{how}")


def _check_dropped(folder: Path, dropped: dict[str, Path]) -> None:
    """Raises ShortcutError if a document was not dropped as a duplicate: no line of documents.jsonl has its hash."""
    if dropped:
        for record in _documents(folder):
            dropped.pop(record["sha256"], None)
    for path in dropped.values():
        raise _changed(path)


def _stored(split: Split, record: dict[str, Any]) -> np.ndarray:
    """The ids of a record, as they are in the shards."""
    start = sum(len(shard.ids) for shard in split.shards[: record["shard"]]) + record["offset"]
    if record["shard"] >= len(split.shards) or start + record["tokens"] > split.tokens:
        raise CheckFailed(f"documents.jsonl is damaged: {record['source']} ends behind the {split.name} split")
    return split.read(start, record["tokens"])
