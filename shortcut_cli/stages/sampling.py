"""Sample: run.pt -> files of its domain that open in other programs, each with a .json that says how it was made."""

import glob
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shortcut_cli import SCHEMA_VERSION, cleanup, files
from shortcut_cli.config.schema import MOST_THREADS, SampleConfig
from shortcut_cli.errors import CheckFailed, Rejected, UsageError
from shortcut_cli.events import Progress, Report
from shortcut_cli.formatting import to_json
from shortcut_cli.inference.decoding import prepared
from shortcut_cli.inference.generate import generate
from shortcut_cli.inference.runs import Run
from shortcut_cli.kept.inputs import read
from shortcut_cli.models.transformer import Decoder
from shortcut_cli.tokenizers.base import Constraint, Tokenizer
from shortcut_cli.training import conditions

MOST_ROWS = 256  # samples that are drawn at once
MOST_BYTES = 768 << 20  # that their caches and logits take


def stem(seed: int, number: int) -> str:
    """The file name of a sample, without its extension."""
    return f"sample-{seed}-{number:03d}"


def sidecar_path(made: Path) -> Path:
    """The .json that belongs to a sample."""
    return made.with_suffix(made.suffix + ".json")


def sample_path(sidecar: Path) -> Path:
    """The sample that a .json belongs to."""
    return sidecar.with_suffix("")


def is_sidecar(path: Path) -> bool:
    """Whether a .json is one that we wrote for a sample, which may be gone."""
    try:
        return (read(path) or {}).keys() >= {"checkpoint_sha256", "sampler", "number"}
    except CheckFailed:
        return False


def sample(
    run: Run,
    folder: Path,
    config: SampleConfig,
    *,
    prompt: Path | None,
    device: str,
    report: Report,
    only: int | None = None,
    have: Collection[Path] = (),
) -> list[Path]:
    """Write `config.n` samples, each with a .json beside it; returns the paths of the samples.

    The .json is written last, and has a temporary name before its sample is there: so a sample without it that a killed
    process left is known, and takes nobody's place.

    prompt: a file of the domain that every sample continues; it becomes part of each sample. only: the number of the
    one sample to write; all are drawn even so, since the last bits of what a model computes for a row can depend on the
    other rows. have: samples that are there, made from the same, and are not written again.

    Raises UsageError if a file would be overwritten, the prompt can't be read, or `config.tokens` is too small.
    """
    tokenizer = run.tokenizer()
    start = [tokenizer.eos]
    if prompt is not None:
        start += prompt_ids(tokenizer, prompt).tolist()
    have, numbers = {*have}, range(config.n) if only is None else range(only, only + 1)

    def place(number: int) -> Path:
        return folder / f"{stem(config.seed, number)}{tokenizer.extension}"

    there = {*os.listdir(folder)} if folder.is_dir() else set()
    for number in numbers if there else ():
        path = place(number)
        sidecar_there = sidecar_path(path).name in there and not is_sidecar(sidecar_path(path))
        if path not in have and ((path.name in there and not files.unfinished(sidecar_path(path))) or sidecar_there):
            taken = sidecar_path(path) if path.name not in there else path
            raise UsageError(f"{taken} exists already", "choose another --seed or --out")
    needed = _followed(tokenizer, start, 1)[0].needed
    if config.tokens < needed:
        raise UsageError(
            f"{config.tokens} tokens are too few for a file that is not empty",
            f"--tokens {needed}, or more",
        )
    files.make_folder(folder)
    checkpoint_hash = files.sha256(run.path)
    size = batch_rows(run.model)
    for first in range(0, config.n, size):
        batch = [place(number) for number in range(first, min(first + size, config.n))]
        unwritten = {path for number, path in enumerate(batch, first) if number in numbers and path not in have}
        if not unwritten:
            continue
        with prepared(run.model, len(batch), config.precision):
            made = generate(
                run.model,
                torch.tensor([start] * len(batch), device=device),
                config.tokens,
                config=config,
                eos=tokenizer.eos,
                constraints=_followed(tokenizer, start, len(batch)),
                progress=lambda done: report(Progress(task="sample", done=done, total=config.tokens, unit="tokens")),
                first=first,
            )
        report(Progress(task="sample", done=config.tokens, total=config.tokens, unit="tokens"))  # they can end early
        for number, (path, ids) in enumerate(zip(batch, made.ids, strict=True)):
            if path not in unwritten:
                continue
            whole = start[1:] + ids
            sidecar: dict[str, Any] = {
                "schema_version": SCHEMA_VERSION,
                "checkpoint": os.path.relpath(run.path, folder),
                "checkpoint_sha256": checkpoint_hash,
                "model": run.recipe.model.name,
                "sampler": config.model_dump(),
                "number": first + number,
                "device": device,
                "conditions": conditions.now(device),
                "prompt": os.path.relpath(prompt, folder) if prompt else None,
                "prompt_sha256": files.sha256(prompt) if prompt else None,
                "prompt_tokens": len(start) - 1,
                "tokens": len(ids),
                "ended": bool(ids) and ids[-1] == tokenizer.eos,
                "forced_steps": made.forced[number],
            }
            _write(tokenizer, whole, path, sidecar)
    return [place(number) for number in numbers]


def batch_rows(model: Decoder) -> int:
    """How many samples are drawn at once: as many as have room, for their caches and for logits of a whole context."""
    config, vocabulary = model.config, model.head.weight.shape[0]
    return max(1, min(MOST_ROWS, MOST_BYTES // (config.context * (model.cache_bytes_per_token() + 4 * vocabulary))))


def _followed(tokenizer: Tokenizer, start: list[int], count: int) -> list[Constraint]:
    """Constraints that have followed the ids that every sample begins with."""
    constraints = [tokenizer.constraint() for _ in range(count)]
    for constraint in constraints:
        for token in start[1:]:
            constraint.push(token)
    return constraints


def _write(tokenizer: Tokenizer, ids: list[int], path: Path, sidecar: dict[str, Any]) -> None:
    """Write a sample, then its .json, or neither. sidecar: its content, but for the units and the hash."""
    with cleanup.due(lambda: path.unlink(missing_ok=True)), files.writing(sidecar_path(path)) as stream:
        try:
            units = tokenizer.decode(ids, path)
            stream.write((to_json(sidecar | {"units": units, "sha256": files.sha256(path)}, indent=1) + "\n").encode())
            stream.flush()
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    files.sweep(path.parent, f"{glob.escape(path.name)}.")


@dataclass(frozen=True)
class Like:
    """How to make a sample again, from its .json."""

    checkpoint: Path
    prompt: Path | None
    settings: list[str]  # of the sampler, as `reading.with_settings` takes them
    number: int
    device: str
    conditions: dict[str, Any]  # empty if an earlier version made the sample

    @property
    def threads(self) -> int:
        """The number of threads that made the sample; 0 if it is not known."""
        count = self.conditions.get("threads")
        return count if type(count) is int and 0 < count <= MOST_THREADS else 0


def like(sidecar: Path, checkpoint: Path | None, prompt: Path | None) -> Like:
    """Read a sample's .json. checkpoint, prompt: where these are now, if they have moved.

    Raises UsageError if the .json or a file that it names is missing, CheckFailed if it is damaged or such a file has
    changed.
    """
    if sidecar.is_dir():
        raise UsageError(f"{sidecar} can't be read: it is a folder")
    try:
        content = read(sidecar)
    except CheckFailed as error:
        raise CheckFailed(f"{sidecar} is not the .json of a sample: {error.message}") from error
    if content is None:
        raise UsageError(f"{sidecar} can't be read: there is no such file")
    try:
        hashes = content["checkpoint_sha256"], content["prompt_sha256"]
        given = content["prompt"]
        named = sidecar.parent / content["checkpoint"], None if given is None else sidecar.parent / given
        settings = [f"sample.{key}={value}" for key, value in content["sampler"].items()]
        number, device = int(content["number"]), str(content["device"])
        made = content.get("conditions")
        made = made if isinstance(made, dict) else {}
        found = Like(checkpoint or named[0], prompt or named[1], settings, number, device, made)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckFailed(f"{sidecar} is not the .json of a sample: {error!r}") from error
    for path, expected, flag in ((found.checkpoint, hashes[0], "--ckpt"), (found.prompt, hashes[1], "--prompt")):
        if path is None:
            continue
        if not path.is_file():
            raise UsageError(f"{path}, which {sidecar} names, does not exist", f"give its new path with {flag}")
        if files.sha256(path) != expected:
            raise CheckFailed(f"{path} is not the file that {sidecar} was made with", f"give that file with {flag}")
    return found


def prompt_ids(tokenizer: Tokenizer, prompt: Path) -> np.ndarray:
    """The ids of a prompt file. Raises UsageError with the reason if it can't be read."""
    if not prompt.is_file():
        raise UsageError(f"prompt {prompt} {'is not a file' if prompt.exists() else 'does not exist'}")
    try:
        ids: np.ndarray = tokenizer.prompt(prompt)
    except Rejected as reason:
        raise UsageError(f"prompt {prompt} can't be used: {reason}") from reason
    return ids
