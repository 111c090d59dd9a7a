"""run.pt and resume.pt: one file holds everything that evaluation and sampling need.

Both are a dictionary of tensors, numbers and strings, which `tensor_file` reads; no code is pickled into them.
resume.pt has the fields of a run.pt at the last step, plus the optimizer's state.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shortcut_cli.config.schema import binding
from shortcut_cli.errors import CheckFailed
from shortcut_cli.training import tensor_file

FORMAT = 1
FIELDS = {
    "format": int,
    "recipe": dict,
    "model": dict,
    "vocabulary": int,
    "tokenizer": dict,
    "shards": str,
    "step": int,
    "scores": dict,
    "versions": dict,
}


def made_from(recipe: Mapping[str, Any], shards: str) -> dict[str, Any]:
    """Everything that determines the weights of a run: part of its recipe, and the checksum of its shards."""
    return binding(recipe) | {"shards": shards}


def pack_folder(folder: Path) -> dict[str, torch.Tensor]:
    """The files directly in a folder as uint8 tensors, by name."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: torch.from_numpy(np.fromfile(path, np.uint8)) for path in paths}


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint with its checksum, complete or not at all.

    previous: path to which an existing file at `path` is moved.
    """
    missing = FIELDS.keys() - content.keys()
    assert not missing, f"checkpoint without {missing}"
    tensor_file.save(path, content, previous)


def load(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Read a checkpoint, verifying its checksum and running no code from it.

    Raises UsageError if the file is not a checkpoint, CheckFailed if it is damaged or has another format.
    """
    content = tensor_file.load(path, "run.pt", device)
    if not isinstance(content, dict) or not content.keys() >= FIELDS.keys():
        raise CheckFailed(f"{path} is a PyTorch file, but not a run.pt")
    tensor_file.check_format(path, content["format"], FORMAT)
    packed = content["tokenizer"] if isinstance(content["tokenizer"], dict) else {}
    kinds = all(isinstance(content[name], kind) for name, kind in FIELDS.items())
    if not (
        kinds
        and content["vocabulary"] > 0
        and isinstance(packed.get("fingerprint"), str)
        and tensor_file.are_tensors(packed.get("files"), torch.uint8)
        and tensor_file.are_tensors(content["model"])
        and tensor_file.are_shown(content)
        and tensor_file.is_recipe(content["recipe"], "model", "name")
        and "validation" in content["scores"]
    ):
        raise CheckFailed(f"{path} is not a run.pt: its fields have the wrong types")
    return content
