"""Prove: run what the project promises, on the user's own data, and compare.

`resume`: a training that is killed at random moments ends in the weights of one that is not. `tokens`: documents of a
shards folder, tokenized again from their sources in blocks of another size, give the same ids.
"""

import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_cli import checkpoint, files, inputs, loop, recipe, registry
from shortcut_cli.errors import ShortcutError, UsageError
from shortcut_cli.recipe import Recipe
from shortcut_cli.shards import Shards, Split, noted_paths
from shortcut_cli.tokenizers.base import Document, Source, Tokenizer

Report = Callable[..., None]
SCALES = (0.4, 3.7, 30.0)  # of the blocks in which `tokens` reads and computes


def weights_sha256(path: Path) -> str:
    """Hex SHA-256 of the weights in a checkpoint: names, types, shapes and bytes, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.load(path)["model"].items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def resume(resolved: Recipe, folder: Path, *, kills: int, seed: int, device: str, report: Report) -> dict[str, Any]:
    """Train into FOLDER/whole, then again with SIGKILL at `kills` random moments into FOLDER/killed-1.

    Where that run comes to its end before it was killed often enough, killed-2 follows, and so on.

    Returns the hashes of the weights, whether weights and logs agree, and the steps from which the killed runs went on.

    Raises UsageError where the folder is not empty, ShortcutError where a training fails by itself.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", "choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    # The recipe's folder of shards may be relative to where this process is.
    tree = recipe.with_settings(resolved, [f"data.shards={Path(resolved.data.shards).resolve()}"])
    files.write(folder / "recipe.toml", recipe.dump(tree))
    report("note", text="training without interruption")
    began = time.monotonic()
    _finish(_start(folder, "whole", device))
    seconds = time.monotonic() - began
    moments, went_on = random.Random(seed), list[int]()  # noqa: S311
    names = ["killed-1"]
    while len(went_on) < kills:
        training = _start(folder, names[-1], device)
        try:
            training.wait(moments.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            training.kill()
            training.communicate()
            went_on.append(_saved_step(folder / names[-1]))
            report("progress", task="kill", done=len(went_on), total=kills, unit="kills")
        else:
            _finish(training)
            names.append(f"killed-{len(names) + 1}")
    _finish(_start(folder, names[-1], device))
    whole, *killed = (weights_sha256(folder / name / "resume.pt") for name in ("whole", *names))
    best = {weights_sha256(folder / name / "run.pt") for name in ("whole", *names)}
    log, *logs = (_log(folder / name) for name in ("whole", *names))
    return {
        "schema_version": 1,
        "kills": len(went_on),
        "went_on_at_steps": went_on,
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
        raise ShortcutError(f"the training ended with exit code {training.returncode}\n{errors[-2000:]}")


def _saved_step(run: Path) -> int:
    """The step of the newest state in a run folder; 0 where there is none yet."""
    steps = [checkpoint.load(path)["step"] for path in run.glob("resume*.pt")]
    return max(steps, default=0)


def _log(run: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in loop.read_log(run)]


def tokens(folder: Path, paths: list[str], *, count: int, seed: int, report: Report) -> dict[str, Any]:
    """Tokenize the documents of `count` random sources of a shards folder again, in other blocks, and compare the ids.

    paths: what was prepared; where it is empty, what `prepare` noted in the cache.

    Returns how much was compared and which documents differ.

    Raises UsageError where the sources are not known or not there, ShortcutError where a source has other bytes.
    """
    opened = Shards(folder)
    kept = recipe.validate(_recipe_of(opened), f"{folder}/manifest.json")
    kind = registry.load(registry.TOKENIZERS, opened.tokenizer["name"])
    sources = _sources(opened, kind.suffixes, paths)
    wanted = _choose(folder, count, seed)
    cut = opened.manifest["split"] == "contiguous"
    if cut and getattr(kept.tokenizer, "bpe", 0):
        raise UsageError("pieces of a contiguous split with tokenizer.bpe can't be cut again: ids do not say where")
    splits = {name: opened.split(name) for name in ("train", "val", "test")}
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
                if not np.array_equal(ids, np.append(found, tokenizer.end)):
                    different.append(f"{name} {variant}".strip())
            report("progress", task="prove", done=done, total=len(wanted), unit="sources")
    return {
        "schema_version": 1,
        "sources": len(wanted),
        "tokens": compared,
        "block_scales": list(SCALES),
        "different": sorted(set(different)),
    }


def _recipe_of(opened: Shards) -> dict[str, Any]:
    """A recipe with the tokenizer of a shards folder; the rest does not matter here."""
    request = opened.manifest["request"]
    return recipe.read("text-tiny").model_dump() | {"tokenizer": request["tokenizer"]}


def _sources(opened: Shards, suffixes: tuple[str, ...], paths: list[str]) -> dict[str, Path]:
    note = noted_paths(opened.manifest)
    if not paths and not note.is_file():
        raise UsageError(
            f"it is not known here what {opened.folder} was prepared from",
            "name the paths: shortcut prove tokens DIR PATH...",
        )
    found = inputs.find(paths or json.loads(note.read_text(encoding="utf-8")), suffixes)
    return dict(found.files)


def _choose(folder: Path, count: int, seed: int) -> set[tuple[str, str]]:
    """Random sources, each with its variant, `count` at most."""
    with open(folder / "documents.jsonl", encoding="utf-8") as stream:
        every = {(record["source"], record.get("variant", "")) for record in map(json.loads, stream)}
    return set(random.Random(seed).sample(sorted(every), min(count, len(every))))  # noqa: S311


def _records(folder: Path, wanted: set[tuple[str, str]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The lines of documents.jsonl about the wanted sources, in order."""
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
    """Each record of a source with the ids that it gets now; `cut` where a document can have several records."""
    size = sum(document.size for document in tokenizer.survey(source))
    unread = iter(records)

    def assign(document: Document) -> list[tuple[str, int]]:
        parts: list[tuple[str, int]] = []
        while sum(size for _, size in parts) < document.size:
            record = next(unread, None)
            if record is None or record["sha256"] != document.sha256:
                raise ShortcutError(f"{source.path} has other documents than when it was prepared")
            amount = int(record["units"]["byte"]) if tokenizer.unit == "byte" else record["tokens"] - 1
            parts.append((record["split"], amount if cut else document.size))
        return parts

    pieces = tokenizer.encode(replace(source, size=size), assign, 2)
    for record, piece in zip(records, pieces, strict=True):
        yield record, np.concatenate([np.zeros(0, np.int64), *piece.ids])


def _stored(split: Split, record: dict[str, Any]) -> np.ndarray:
    before = sum(len(shard.ids) for shard in islice(split.shards, record["shard"]))
    return split.read(before + record["offset"], record["tokens"])
