"""run.pt and resume.pt: one file holds everything that evaluation and sampling need.

Both are a dictionary of tensors, numbers and strings, which `tensor_file` reads; no code is pickled into them.
resume.pt has the fields of a run.pt at the last step, plus the optimizer's state. PyTorch is imported inside the
functions that need it: what a checkpoint says of itself is read without.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortcut_cli.config.schema import binding
from shortcut_cli.errors import CheckFailed
from shortcut_cli.training import parts, tensor_file

if TYPE_CHECKING:
    import torch

FORMAT = 1
# Of keys and tables that earlier versions did not have: what these versions did.
BEFORE: dict[str, dict[str, Any]] = {
    "model": {"qk_norm": False, "init": "gpt2"},
    "model.shortcut": {"map_norm": False},
    "model.depth_attention": {"values": "raw"},
    "train": {"optimizer": "adamw", "schedule": "cosine", "min_lr": 0.1, "decay": 0.2},
}
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


HASH = re.compile("[0-9a-f]{64}")
MOST_ANCESTORS = 100
LINEAGE = {  # of a run that began with the weights of another: its fields, see `training.lineage`
    "init_from": str,
    "ancestors": list,
    "step": int,
    "model": str,
    "shards": str,
    "tokenizer": str,
    "taken": list,
    "initialised": list,
    "unused": list,
    "differs": list,
}


def made_from(recipe: Mapping[str, Any], shards: str, lineage: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything that determines the weights of a run: part of its recipe, its shards' checksum, its first weights.

    lineage: of a run that began with the weights of another checkpoint, which is named by its SHA-256.
    """
    return binding(recipe) | {"shards": shards} | ({"init_from": lineage["init_from"]} if lineage else {})


def pack_folder(folder: Path) -> "dict[str, torch.Tensor]":
    """The files directly in a folder as uint8 tensors, by name."""
    import numpy as np
    import torch

    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: torch.from_numpy(np.fromfile(path, np.uint8)) for path in paths}


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint with its checksum, complete or not at all.

    previous: path to which an existing file at `path` is moved.
    """
    missing = FIELDS.keys() - content.keys()
    assert not missing, f"checkpoint without {missing}"
    tensor_file.save(path, content, previous)


def load(path: Path, device: str = "cpu", *, apart: bool = False, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Read a checkpoint, verifying its checksum and running no code from it; its recipe has the keys of `BEFORE`.

    apart: if its tensors are in the files of several processes (`training.parts`), leave them there. share: which of
    these files are verified, as `parts.check` says; they are in the field `opened` then.

    Raises UsageError if the file is not a checkpoint, CheckFailed if it is damaged or has another format.
    """
    content: dict[str, Any] = tensor_file.load(
        path, "resume.pt" if path.name.startswith("resume.") else "run.pt", device
    )
    check(path, content)
    for section, values in BEFORE.items():
        table: Any = content["recipe"]
        for name in section.split("."):
            table = table.setdefault(name, {}) if isinstance(table, dict) else None
        if isinstance(table, dict):
            for key, value in values.items():
                table.setdefault(key, value)
    if "parts" in content:
        found = parts.check(path, content, share)
        return content | {"opened": found} if apart else parts.whole(path.parent, content, device)
    return content


def check(path: Path, content: Any) -> None:
    """Raise CheckFailed if what was read from `path`, tensors or only their descriptions, is no checkpoint."""
    if not isinstance(content, dict) or not content.keys() >= FIELDS.keys():
        raise CheckFailed(f"{path} is a PyTorch file, but not a run.pt")
    tensor_file.check_format(path, content["format"], FORMAT)
    packed = content["tokenizer"] if isinstance(content["tokenizer"], dict) else {}
    kinds = all(isinstance(content[name], kind) for name, kind in FIELDS.items())
    if not (
        kinds
        and content["vocabulary"] > 0
        and isinstance(packed.get("fingerprint"), str)
        and tensor_file.are_tensors(packed.get("files"), "uint8")
        and tensor_file.are_tensors(content["model"])
        and tensor_file.are_shown(content)
        and tensor_file.is_recipe(content["recipe"], "model", "name")
        and "validation" in content["scores"]
        and _is_lineage(content.get("lineage", {}), set(content["model"]))
    ):
        raise CheckFailed(f"{path} is not a run.pt: its fields have the wrong types")


def _is_lineage(found: Any, names: set[Any]) -> bool:
    """Whether `found` is empty, or says where the first weights of a model with weights of these names came from."""
    if not isinstance(found, dict) or not found:
        return found == {}
    texts = ("init_from", "model", "shards", "tokenizer")
    return (
        found.keys() == LINEAGE.keys()
        and all(isinstance(found[key], kind) for key, kind in LINEAGE.items())
        and all(len(found[key]) <= tensor_file.SHOWN for key in texts)
        and len(found["ancestors"]) <= MOST_ANCESTORS
        and all(isinstance(each, str) and HASH.fullmatch(each) for each in (found["init_from"], *found["ancestors"]))
        and all(len(found[key]) <= tensor_file.MOST_LISTED for key in ("unused", "differs"))
        and all(
            isinstance(words, str) and len(words) <= tensor_file.SHOWN for words in found["unused"] + found["differs"]
        )
        and all(isinstance(name, str) and name in names for key in ("taken", "initialised") for name in found[key])
    )
