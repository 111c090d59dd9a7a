"""Prove: check on the user's own data what the project promises.

`resume`: a training run that is killed at random times ends with the same weights as one that is not. `tokens`:
documents of a shards folder, tokenized again from their sources in blocks of another size, get the same ids.
"""

import hashlib
import json
import math
import random
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_cli import SCHEMA_VERSION, cleanup, files, registry
from shortcut_cli.config import reading, writing
from shortcut_cli.config.schema import Recipe
from shortcut_cli.data import inputs
from shortcut_cli.data.documents import Document, Source
from shortcut_cli.data.shards import SPLITS, Shards, Split, read_lines, source_paths_file
from shortcut_cli.errors import CheckFailed, Rejected, ShortcutError, UsageError
from shortcut_cli.events import Part, Progress, Report
from shortcut_cli.kept.inputs import is_number
from shortcut_cli.tokenizers.base import Tokenizer
from shortcut_cli.training import checkpoint, conditions, run_log

POLL_S = 0.2
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
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", "choose another --out")
    files.make_folder(folder)
    # The recipe's shards folder may be relative to the current folder.
    with conditions.threads(resolved.train.threads):
        here = conditions.now(device)
    shards = f"data.shards={files.place(resolved.data.shards).resolve()}"
    tree = reading.with_settings(resolved, [shards, f"train.threads={here['threads']}"])
    files.write(folder / "recipe.toml", writing.dump(tree))
    watched = partial(_watched, steps=resolved.train.steps, report=report)
    report(Part(task="prove resume", number=1, total=kills + 2, text="training without interruption"))
    began = time.monotonic()
    with watched(folder / "whole"):
        _finish(_start(folder, "whole", device))
    seconds = time.monotonic() - began
    generator, resumed_at = random.Random(seed), list[int]()  # noqa: S311
    names = ["killed-1"]
    while len(resumed_at) < kills:
        part = f"training until kill {len(resumed_at) + 1} of {kills}"
        report(Part(task="prove resume", number=len(resumed_at) + 2, total=kills + 2, text=part))
        training = _start(folder, names[-1], device)
        try:
            with watched(folder / names[-1]):
                training.wait(generator.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            training.kill()
            training.communicate()
            resumed_at.append(_saved_step(folder / names[-1]))
        else:
            _finish(training)
            names.append(f"killed-{len(names) + 1}")
    report(Part(task="prove resume", number=kills + 2, total=kills + 2, text="training to the end"))
    with watched(folder / names[-1]):
        _finish(_start(folder, names[-1], device))
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


def _start(folder: Path, name: str, device: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "shortcut_cli", "train", "--recipe", str(folder / "recipe.toml")]
    command += ["--out", str(folder / name), "--device", device]
    return cleanup.start(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@contextmanager
def _watched(run: Path, steps: int, report: Report) -> Iterator[None]:
    """Report the log of the training that another process does in this block."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_S):
            line = run_log.newest(run)
            if line and 0 < line["step"] <= steps:
                loss = line["loss"]
                report(Progress("train", line["step"], steps, "steps", loss=loss, loss_unit="nats per token"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
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
