"""run.pt and resume.pt: one file that is enough to evaluate and to sample anywhere.

A dictionary of tensors, numbers and strings, read with `weights_only=True`; no code is pickled into it.
resume.pt is a run.pt of the last step with the optimiser's state beside it.
"""

import pickle
import platform
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shortcut_cli import __version__, files, recipe, registry
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.recipe import Recipe
from shortcut_cli.tokenizers.base import Tokenizer

FORMAT = 1
FIELDS = {"format", "recipe", "model", "vocabulary", "tokenizer", "shards", "step", "scores", "versions"}


def pack_folder(folder: Path) -> dict[str, torch.Tensor]:
    """The files of a flat folder as uint8 tensors, by name."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: torch.from_numpy(np.fromfile(path, np.uint8)) for path in paths}


def versions() -> dict[str, str]:
    """What a run was made with."""
    return {"shortcut": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint, complete or absent."""
    missing = FIELDS - content.keys()
    assert not missing, f"checkpoint without {missing}"
    with files.writing(path) as stream:
        torch.save(content, stream)


def load(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Read a checkpoint without running any code that it may hold.

    Raises UsageError where the file is not a checkpoint at all, CheckFailed where it is damaged or too new.
    """
    if not path.is_file():
        raise UsageError(f"checkpoint {path} does not exist", "`shortcut train` writes run.pt into its run folder")
    if not zipfile.is_zipfile(path):
        raise UsageError(f"{path} is not a run.pt", "`shortcut train` writes run.pt into its run folder")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckFailed(f"{path} can't be read: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not content.keys() >= FIELDS:
        raise CheckFailed(f"{path} is a PyTorch file, but not a run.pt")
    if content["format"] != FORMAT:
        raise CheckFailed(f"{path} has format {content['format']!r}; this version reads {FORMAT}", "update shortcut")
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
                if Path(name).name != name:
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
    model = registry.load(registry.MODELS, resolved.model.name)(resolved.model, content["vocabulary"], 0)
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise CheckFailed(f"{path}: the weights are not those of its recipe: {error}") from error
    return Run(path, resolved, model.to(device).eval(), content)
