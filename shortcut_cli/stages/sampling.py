"""Sample: run.pt -> files of its domain that open in other programs, each with a .json that says how it was made."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from shortcut_cli import SCHEMA_VERSION, files
from shortcut_cli.config.schema import SampleConfig
from shortcut_cli.errors import CheckFailed, Rejected, UsageError
from shortcut_cli.events import Progress, Report
from shortcut_cli.inference.generate import generate
from shortcut_cli.inference.runs import Run
from shortcut_cli.tokenizers.base import Tokenizer


def stem(seed: int, number: int) -> str:
    """The file name of a sample, without its extension."""
    return f"sample-{seed}-{number:03d}"


def sidecar_path(made: Path) -> Path:
    """The .json that belongs to a sample."""
    return made.with_suffix(made.suffix + ".json")


def sample_path(sidecar: Path) -> Path:
    """The sample that a .json belongs to."""
    return sidecar.with_suffix("")


def sample(
    run: Run,
    folder: Path,
    config: SampleConfig,
    *,
    prompt: Path | None,
    device: str,
    report: Report,
    only: int | None = None,
) -> list[Path]:
    """Write `config.n` samples, each with a .json beside it; returns the paths of the samples.

    prompt: a file of the domain that every sample continues; it becomes part of each sample. only: the number of the
    one sample to write; all are drawn even so, since the last bits of what a model computes for a row can depend on the
    other rows.

    Raises UsageError if a file would be overwritten, the prompt can't be read, or `config.tokens` is too small.
    """
    tokenizer = run.tokenizer()
    start = [tokenizer.eos]
    if prompt is not None:
        start += prompt_ids(tokenizer, prompt).tolist()
    names = [folder / f"{stem(config.seed, number)}{tokenizer.extension}" for number in range(config.n)]
    wanted = names if only is None else [names[only]]
    taken = [path for path in wanted if path.exists()]
    if taken:
        raise UsageError(f"{taken[0]} exists already", "choose another --seed or --out")
    constraints = [tokenizer.constraint() for _ in names]
    for constraint in constraints:
        for token in start[1:]:
            constraint.push(token)
    if config.tokens < constraints[0].needed:
        raise UsageError(
            f"{config.tokens} tokens are too few for a file that is not empty",
            f"--tokens {constraints[0].needed}, or more",
        )
    folder.mkdir(parents=True, exist_ok=True)
    made = generate(
        run.model,
        torch.tensor([start] * config.n, device=device),
        config.tokens,
        config=config,
        eos=tokenizer.eos,
        constraints=constraints,
        progress=lambda done: report(Progress(task="sample", done=done, total=config.tokens, unit="tokens")),
    )
    checkpoint_hash = files.sha256(run.path)
    for number, (path, ids) in enumerate(zip(names, made.ids, strict=True)):
        if path not in wanted:
            continue
        whole = start[1:] + ids
        units = tokenizer.decode(whole, path)
        sidecar = {
            "schema_version": SCHEMA_VERSION,
            "checkpoint": os.path.relpath(run.path, folder),
            "checkpoint_sha256": checkpoint_hash,
            "model": run.recipe.model.name,
            "sampler": config.model_dump(),
            "number": number,
            "device": device,
            "prompt": os.path.relpath(prompt, folder) if prompt else None,
            "prompt_sha256": files.sha256(prompt) if prompt else None,
            "prompt_tokens": len(start) - 1,
            "tokens": len(ids),
            "ended": bool(ids) and ids[-1] == tokenizer.eos,
            "forced_steps": made.forced[number],
            "units": units,
        }
        files.write(sidecar_path(path), json.dumps(sidecar, indent=1) + "\n")
    return wanted


@dataclass(frozen=True)
class Like:
    """How to make a sample again, from its .json."""

    checkpoint: Path
    prompt: Path | None
    settings: list[str]  # of the sampler, as `reading.with_settings` takes them
    number: int
    device: str


def like(sidecar: Path, checkpoint: Path | None, prompt: Path | None) -> Like:
    """Read a sample's .json. checkpoint, prompt: where these are now, if they have moved.

    Raises UsageError if the .json or a file that it names is missing, CheckFailed if it is damaged or such a file has
    changed.
    """
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
        hashes = content["checkpoint_sha256"], content["prompt_sha256"]
        named = sidecar.parent / content["checkpoint"], content["prompt"] and sidecar.parent / content["prompt"]
        settings = [f"sample.{key}={value}" for key, value in content["sampler"].items()]
        number, device = int(content["number"]), str(content["device"])
        found = Like(checkpoint or named[0], prompt or named[1], settings, number, device)
    except OSError as error:
        raise UsageError(f"{sidecar} can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
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
        raise UsageError(f"prompt {prompt} does not exist")
    try:
        ids: np.ndarray = tokenizer.prompt(prompt)
    except Rejected as reason:
        raise UsageError(f"prompt {prompt} can't be used: {reason}") from reason
    return ids
