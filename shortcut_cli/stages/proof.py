"""Prove: check on the user's own data what the project promises.

`resume`: a training run that is killed at random times ends with the same weights as one that is not. `tokens`:
documents of a shards folder, tokenized again from their sources in blocks of another size, get the same ids.
"""

import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_cli import SCHEMA_VERSION, files, registry
from shortcut_cli.config import reading, writing
from shortcut_cli.config.schema import Recipe
from shortcut_cli.data import inputs
from shortcut_cli.data.documents import Document, Source
from shortcut_cli.data.shards import SPLITS, Shards, Split, source_paths_file
from shortcut_cli.errors import ShortcutError, UsageError
from shortcut_cli.events import Note, Progress, Report
from shortcut_cli.tokenizers.base import Tokenizer
from shortcut_cli.training import checkpoint, run_log

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

    Returns the hashes of the weights, whether weights and logs are equal, and the steps at which killed runs resumed.

    Raises UsageError if the folder is not empty, ShortcutError if a training run fails on its own.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", "choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    # The recipe's shards folder may be relative to the current folder.
    tree = reading.with_settings(resolved, [f"data.shards={Path(resolved.data.shards).resolve()}"])
    files.write(folder / "recipe.toml", writing.dump(tree))
    report(Note(text="training without interruption"))
    began = time.monotonic()
    _finish(_start(folder, "whole", device))
    seconds = time.monotonic() - began
    generator, resumed_at = random.Random(seed), list[int]()  # noqa: S311
    names = ["killed-1"]
    while len(resumed_at) < kills:
        training = _start(folder, names[-1], device)
        try:
            training.wait(generator.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            training.kill()
            training.communicate()
            resumed_at.append(_saved_step(folder / names[-1]))
            report(Progress(task="kill", done=len(resumed_at), total=kills, unit="kills"))
        else:
            _finish(training)
            names.append(f"killed-{len(names) + 1}")
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
    }


def _start(folder: Path, name: str, device: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "shortcut_cli", "train", "--recipe", str(folder / "recipe.toml")]
    command += ["--out", str(folder / name), "--device", device]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # noqa: S603


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
    cut = opened.manifest["split"] == "contiguous"
    if cut and getattr(kept.tokenizer, "bpe", 0):
        raise UsageError(
            "`prove tokens` does not support a contiguous split with tokenizer.bpe: "
            "the ids do not show where documents were cut"
        )
    splits = {name: opened.split(name) for name in SPLITS}
    compared, different = 0, []
    with tempfile.TemporaryDirectory(prefix="shortcut-") as scratch:
        for done, ((name, variant), records) in enumerate(sorted(_records(folder, wanted).items()), 1):
            tokenizer: Tokenizer = kind.load(kept.tokenizer, folder / "tokenizer")
            tokenizer.block_scale = SCALES[done % len(SCALES)]
            if name not in sources:
                raise UsageError(f"{name} is in none of the paths", "name the paths that were prepared")
            source = Source(sources[name], name, files.sha256(sources[name]), Path(scratch) / f"{done}.ids", variant)
            for record, found in _again(tokenizer, source, records, cut=cut):
                ids = _stored(splits[record["split"]], record)
                compared += len(ids)
                if not np.array_equal(ids, np.append(found, tokenizer.eos)):
                    different.append(f"{name} {variant}".strip())
            report(Progress(task="prove", done=done, total=len(wanted), unit="sources"))
    return {
        "schema_version": SCHEMA_VERSION,
        "sources": len(wanted),
        "tokens": compared,
        "block_scales": list(SCALES),
        "different": sorted(set(different)),
    }


def _recipe_of(opened: Shards) -> dict[str, Any]:
    """A recipe with the tokenizer of a shards folder; the rest of it does not matter here."""
    request = opened.manifest["request"]
    return reading.read("text-tiny").model_dump() | {"tokenizer": request["tokenizer"]}


def _sources(opened: Shards, suffixes: tuple[str, ...], paths: list[str]) -> dict[str, Path]:
    remembered = source_paths_file(opened.manifest)
    if not paths and not remembered.is_file():
        raise UsageError(
            f"the sources of {opened.folder} are not known on this machine",
            "name the paths: shortcut prove tokens DIR PATH...",
        )
    found = inputs.find(paths or json.loads(remembered.read_text(encoding="utf-8")), suffixes)
    return dict(found.files)


def _choose(folder: Path, count: int, seed: int) -> set[tuple[str, str]]:
    """At most `count` random sources, each with its variant."""
    with open(folder / "documents.jsonl", encoding="utf-8") as stream:
        every = {(record["source"], record.get("variant", "")) for record in map(json.loads, stream)}
    return set(random.Random(seed).sample(sorted(every), min(count, len(every))))  # noqa: S311


def _records(folder: Path, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The lines of documents.jsonl for the wanted sources, in order."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {key: [] for key in wanted}
    with open(folder / "documents.jsonl", encoding="utf-8") as stream:
        for record in map(json.loads, stream):
            key = (record["source"], record.get("variant", ""))
            if key in wanted:
                found[key].append(record)
    return found


def _again(
    tokenizer: Tokenizer, source: Source, records: list[dict[str, Any]], *, cut: bool
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Each record of a source with the ids that it gets now. cut: whether a document can have several records."""
    size = sum(document.size for document in tokenizer.scan(source))
    unread = iter(records)

    def assign(document: Document) -> list[tuple[str, int]]:
        parts: list[tuple[str, int]] = []
        while sum(size for _, size in parts) < document.size:
            record = next(unread, None)
            if record is None or record["sha256"] != document.sha256:
                raise ShortcutError(f"the documents of {source.path} have changed since it was prepared")
            amount = int(record["units"]["byte"]) if tokenizer.unit == "byte" else record["tokens"] - 1
            parts.append((record["split"], amount if cut else document.size))
        return parts

    chunks = tokenizer.encode(replace(source, size=size), assign, 2)
    for record, chunk in zip(records, chunks, strict=True):
        yield record, np.concatenate([np.zeros(0, np.int64), *chunk.ids])


def _stored(split: Split, record: dict[str, Any]) -> np.ndarray:
    """The ids of a record, as they are in the shards."""
    before = sum(len(shard.ids) for shard in islice(split.shards, record["shard"]))
    return split.read(before + record["offset"], record["tokens"])
