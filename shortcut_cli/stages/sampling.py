"""Sample: run.pt -> files of its domain that open in other programs, each with a .json that says where it came from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shortcut_cli import files
from shortcut_cli.checkpoint import Run
from shortcut_cli.errors import Rejected, UsageError
from shortcut_cli.generate import generate
from shortcut_cli.recipe import SampleKeys

Report = Callable[..., None]


def sample(run: Run, folder: Path, keys: SampleKeys, *, prompt: Path | None, device: str, report: Report) -> list[Path]:
    """Write `keys.n` samples and a .json beside each; returns the paths of the samples.

    prompt: a file of the domain that every sample continues; it is part of what is written.

    Raises UsageError where a file would be overwritten, or the prompt can't be read.
    """
    tokenizer = run.tokenizer()
    start = [tokenizer.end]
    if prompt is not None:
        start += prompt_ids(tokenizer, prompt).tolist()
    names = [folder / f"sample-{keys.seed}-{number:03d}{tokenizer.extension}" for number in range(keys.n)]
    taken = [path for path in names if path.exists()]
    if taken:
        raise UsageError(f"{taken[0]} exists already", "choose another --seed or --out")
    folder.mkdir(parents=True, exist_ok=True)
    made = generate(
        run.model,
        torch.tensor([start] * keys.n, device=device),
        keys.tokens,
        keys=keys,
        end=tokenizer.end,
        allowed=lambda ids: tokenizer.allowed(ids[1:]),
        progress=lambda done: report("progress", task="sample", done=done, total=keys.tokens, unit="tokens"),
    )
    checkpoint_hash = files.sha256(run.path)
    for number, (path, ids) in enumerate(zip(names, made.ids, strict=True)):
        whole = start[1:] + ids
        units = tokenizer.decode(whole, path)
        sidecar = {
            "schema_version": 1,
            "checkpoint_sha256": checkpoint_hash,
            "model": run.recipe.model.name,
            "sampler": keys.model_dump(),
            "number": number,
            "prompt_sha256": files.sha256(prompt) if prompt else None,
            "prompt_tokens": len(start) - 1,
            "tokens": len(ids),
            "ended": bool(ids) and ids[-1] == tokenizer.end,
            "forced_steps": made.forced[number],
            "units": units,
        }
        files.write(path.with_suffix(path.suffix + ".json"), json.dumps(sidecar, indent=1) + "\n")
    return names


def prompt_ids(tokenizer: Any, prompt: Path) -> np.ndarray:
    """The ids of a prompt file. Raises UsageError with the reason where it can't be read."""
    if not prompt.is_file():
        raise UsageError(f"prompt {prompt} does not exist")
    try:
        ids: np.ndarray = tokenizer.prompt(prompt)
    except Rejected as reason:
        raise UsageError(f"prompt {prompt} can't be used: {reason}") from reason
    return ids
