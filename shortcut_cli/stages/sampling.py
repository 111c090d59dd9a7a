"""Sample: run.pt -> files of its domain that open in other programs, each with a .json that says where it came from."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shortcut_cli import files
from shortcut_cli.checkpoint import Run
from shortcut_cli.errors import CheckFailed, Rejected, UsageError
from shortcut_cli.generate import generate
from shortcut_cli.recipe import SampleKeys

Report = Callable[..., None]


def sample(
    run: Run,
    folder: Path,
    keys: SampleKeys,
    *,
    prompt: Path | None,
    device: str,
    report: Report,
    only: int | None = None,
) -> list[Path]:
    """Write `keys.n` samples and a .json beside each; returns the paths of the samples.

    prompt: a file of the domain that every sample continues; it is part of what is written. only: the number of the
    one sample that is written; all are drawn, since what a model computes for a row can depend on the others in its
    last bit.

    Raises UsageError where a file would be overwritten, or the prompt can't be read.
    """
    tokenizer = run.tokenizer()
    start = [tokenizer.end]
    if prompt is not None:
        start += prompt_ids(tokenizer, prompt).tolist()
    names = [folder / f"sample-{keys.seed}-{number:03d}{tokenizer.extension}" for number in range(keys.n)]
    wanted = names if only is None else [names[only]]
    taken = [path for path in wanted if path.exists()]
    if taken:
        raise UsageError(f"{taken[0]} exists already", "choose another --seed or --out")
    guides = [tokenizer.guide() for _ in names]
    for guide in guides:
        for token in start[1:]:
            guide.push(token)
    if keys.tokens < guides[0].least:
        raise UsageError(
            f"{keys.tokens} tokens can't hold anything that is heard or read", f"--tokens {guides[0].least}, or more"
        )
    folder.mkdir(parents=True, exist_ok=True)
    made = generate(
        run.model,
        torch.tensor([start] * keys.n, device=device),
        keys.tokens,
        keys=keys,
        end=tokenizer.end,
        guides=guides,
        progress=lambda done: report("progress", task="sample", done=done, total=keys.tokens, unit="tokens"),
    )
    checkpoint_hash = files.sha256(run.path)
    for number, (path, ids) in enumerate(zip(names, made.ids, strict=True)):
        if path not in wanted:
            continue
        whole = start[1:] + ids
        units = tokenizer.decode(whole, path)
        sidecar = {
            "schema_version": 1,
            "checkpoint": os.path.relpath(run.path, folder),
            "checkpoint_sha256": checkpoint_hash,
            "model": run.recipe.model.name,
            "sampler": keys.model_dump(),
            "number": number,
            "device": device,
            "prompt": os.path.relpath(prompt, folder) if prompt else None,
            "prompt_sha256": files.sha256(prompt) if prompt else None,
            "prompt_tokens": len(start) - 1,
            "tokens": len(ids),
            "ended": bool(ids) and ids[-1] == tokenizer.end,
            "forced_steps": made.forced[number],
            "units": units,
        }
        files.write(path.with_suffix(path.suffix + ".json"), json.dumps(sidecar, indent=1) + "\n")
    return wanted


@dataclass(frozen=True)
class Like:
    """What a sample's .json says of how to make it again."""

    checkpoint: Path
    prompt: Path | None
    settings: list[str]  # of the sampler, as for `recipe.with_settings`
    number: int
    device: str


def like(sidecar: Path, checkpoint: Path | None, prompt: Path | None) -> Like:
    """Read a sample's .json. checkpoint, prompt: where these are now, if they were moved.

    Raises UsageError where the file or what it names is not there, CheckFailed where that has other bytes.
    """
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
        sums = content["checkpoint_sha256"], content["prompt_sha256"]
        named = sidecar.parent / content["checkpoint"], content["prompt"] and sidecar.parent / content["prompt"]
        settings = [f"sample.{key}={value}" for key, value in content["sampler"].items()]
        number, device = int(content["number"]), str(content["device"])
        found = Like(checkpoint or named[0], prompt or named[1], settings, number, device)
    except OSError as error:
        raise UsageError(f"{sidecar} can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckFailed(f"{sidecar} is not the .json of a sample: {error!r}") from error
    for path, expected, flag in ((found.checkpoint, sums[0], "--ckpt"), (found.prompt, sums[1], "--prompt")):
        if path is None:
            continue
        if not path.is_file():
            raise UsageError(f"{path}, which {sidecar} names, does not exist", f"say where it is now with {flag}")
        if files.sha256(path) != expected:
            raise CheckFailed(f"{path} is not the file that {sidecar} was made with", f"name that one with {flag}")
    return found


def prompt_ids(tokenizer: Any, prompt: Path) -> np.ndarray:
    """The ids of a prompt file. Raises UsageError with the reason where it can't be read."""
    if not prompt.is_file():
        raise UsageError(f"prompt {prompt} does not exist")
    try:
        ids: np.ndarray = tokenizer.prompt(prompt)
    except Rejected as reason:
        raise UsageError(f"prompt {prompt} can't be used: {reason}") from reason
    return ids
