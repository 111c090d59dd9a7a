"""run.pt and resume.pt: one file that is enough to evaluate and to sample anywhere.

A dictionary of tensors, numbers and strings, read with `weights_only=True`; no code is pickled into it.
resume.pt is a run.pt of the last step with the optimiser's state beside it.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shortcut_cli import recipe, registry, sealed
from shortcut_cli.errors import CheckFailed
from shortcut_cli.recipe import Recipe
from shortcut_cli.tokenizers.base import Tokenizer

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


def pack_folder(folder: Path) -> dict[str, torch.Tensor]:
    """The files of a flat folder as uint8 tensors, by name."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: torch.from_numpy(np.fromfile(path, np.uint8)) for path in paths}


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint, sealed, complete or absent. previous: where the file at `path` is kept."""
    missing = FIELDS.keys() - content.keys()
    assert not missing, f"checkpoint without {missing}"
    sealed.save(path, content, previous)


def load(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Read a checkpoint without running any code that it may hold, every byte checked.

    Raises UsageError where the file is not a checkpoint at all, CheckFailed where it is damaged or too new.
    """
    content = sealed.load(path, "run.pt", device)
    if not isinstance(content, dict) or not content.keys() >= FIELDS.keys():
        raise CheckFailed(f"{path} is a PyTorch file, but not a run.pt")
    if content["format"] != FORMAT:
        raise CheckFailed(f"{path} has format {content['format']!r}; this version reads {FORMAT}", "update shortcut")
    packed = content["tokenizer"] if isinstance(content["tokenizer"], dict) else {}
    kinds = all(isinstance(content[name], kind) for name, kind in FIELDS.items())
    if not (
        kinds
        and isinstance(packed.get("fingerprint"), str)
        and sealed.are_tensors(packed.get("files"), torch.uint8)
        and sealed.are_tensors(content["model"])
    ):
        raise CheckFailed(f"{path} is not a run.pt: its fields are of other types")
    return content


@dataclass(frozen=True)
class Run:
    """A checkpoint, ready to use."""

    path: Path
    recipe: Recipe
    model: Any  # an architecture of the registry, in eval mode
    content: dict[str, Any]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the run was trained with, from the files inside the checkpoint."""
        kind = registry.load(registry.TOKENIZERS, self.recipe.tokenizer.name)
        with tempfile.TemporaryDirectory(prefix="shortcut-") as folder:
            for name, content in self.content["tokenizer"]["files"].items():
                if Path(name).name != name or name in ("", "..") or "\0" in name:
                    raise CheckFailed(f"{self.path} holds a tokenizer file with the path {name!r}")
                (Path(folder) / name).write_bytes(content.cpu().numpy().tobytes())
            tokenizer: Tokenizer = kind.load(self.recipe.tokenizer, Path(folder))
        expected = self.content["tokenizer"]["fingerprint"]
        if tokenizer.fingerprint != expected:
            raise CheckFailed(
                f"{self.path} was trained with tokenizer {expected[:12]}, this installation makes of its files "
                f"{tokenizer.fingerprint[:12]}",
                "install the versions that `shortcut inspect` shows for the run",
            )
        return tokenizer


def open_run(path: Path, device: str) -> Run:
    """Read a checkpoint and build its model on a device, in eval mode.

    Raises what `load` raises, and CheckFailed where recipe and weights do not belong together.
    """
    content = load(path, device)
    resolved = recipe.validate(content["recipe"], str(path))
    kind = registry.load(registry.MODELS, resolved.model.name)
    with torch.device("meta"):  # shapes alone, so that no recipe can ask for more memory than its weights take
        expected = _shapes(kind(resolved.model, content["vocabulary"]).state_dict())
    changes = recipe.differences(expected, _shapes(content["model"]))
    if changes:
        raise CheckFailed(f"{path}: the weights are not those of its recipe\n" + "\n".join(changes[:5]))
    model = kind(resolved.model, content["vocabulary"])
    model.load_state_dict(content["model"])
    return Run(path, resolved, model.to(device).eval(), content)


def _shapes(weights: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}
