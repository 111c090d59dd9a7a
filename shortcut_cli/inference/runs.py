"""Opening a checkpoint: its model in eval mode, and its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortcut_cli import files, registry
from shortcut_cli.config import reading
from shortcut_cli.config.schema import Recipe
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.models.transformer import Decoder
from shortcut_cli.tokenizers.base import Tokenizer
from shortcut_cli.training import checkpoint, precision, tensor_file


@dataclass(frozen=True)
class Run:
    """An opened checkpoint."""

    path: Path
    recipe: Recipe
    model: Decoder  # in eval mode
    content: dict[str, Any]  # of the file, see training.checkpoint
    precision: str = "fp32"  # in which it was trained, and is evaluated

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the run was trained with, built from the files in the checkpoint.

        Raises CheckFailed if one of them has an unsafe name, or if the tokenizer has another fingerprint.
        """
        kind = registry.load(registry.TOKENIZERS, self.recipe.tokenizer.name)
        with files.temporary_folder() as folder:
            for name, content in self.content["tokenizer"]["files"].items():
                if Path(name).name != name or name in ("", "..") or "\0" in name:
                    raise CheckFailed(f"{self.path} holds a tokenizer file with the path {name!r}")
                (folder / name).write_bytes(content.cpu().numpy().tobytes())
            tokenizer: Tokenizer = kind.load(self.recipe.tokenizer, folder)
        if tokenizer.vocabulary != self.content["vocabulary"]:
            raise CheckFailed(
                f"{self.path} is damaged: its tokenizer has {tokenizer.vocabulary} ids, its model "
                f"{self.content['vocabulary']}"
            )
        expected = self.content["tokenizer"]["fingerprint"]
        if tokenizer.fingerprint != expected:
            raise CheckFailed(
                f"{self.path} was trained with tokenizer {expected[:12]}, but its files give tokenizer "
                f"{tokenizer.fingerprint[:12]} in this installation",
                "install the versions that `shortcut inspect` shows for the run",
            )
        return tokenizer


def open_run(path: Path, device: str) -> Run:
    """Read a checkpoint and build its model on a device, in eval mode.

    Raises what `checkpoint.load` raises, and CheckFailed if recipe and weights do not match.
    """
    content = checkpoint.load(path, device)
    try:
        trained_in = precision.of(content)
    except ValueError as error:
        raise CheckFailed(f"{path} is not a run.pt of this version: it names {error}") from error
    try:
        resolved = reading.validate(content["recipe"], str(path))
    except UsageError as error:
        raise CheckFailed(tensor_file.shortened(error.message), error.hint) from error
    kind: type[Decoder] = registry.load(registry.MODELS, resolved.model.name)
    layers = resolved.model.layers
    tensor_file.check_shapes(path, content["model"], lambda: kind(resolved.model, content["vocabulary"]), layers)
    model = kind(resolved.model, content["vocabulary"])
    model.load_state_dict(content["model"])
    return Run(path, resolved, model.to(device).eval(), content, trained_in)
