"""run.pt and resume.pt: one file that is enough to evaluate and to sample anywhere.

A dictionary of tensors, numbers and strings, read with `weights_only=True`; no code is pickled into it.
resume.pt is a run.pt of the last step with the optimiser's state beside it.
"""

import hashlib
import os
import pickle
import pickletools
import platform
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from shortcut_cli import __version__, files, recipe, registry
from shortcut_cli.errors import CheckFailed, UsageError
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
SEAL = b"shortcut sha256 "
SEAL_BYTES = len(SEAL) + 64
PICKLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}  # and the storages of the element types
UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError),
    *(AssertionError, UnicodeDecodeError, OverflowError, MemoryError),
)


def pack_folder(folder: Path) -> dict[str, torch.Tensor]:
    """The files of a flat folder as uint8 tensors, by name."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: torch.from_numpy(np.fromfile(path, np.uint8)) for path in paths}


def versions() -> dict[str, str]:
    """What a run was made with."""
    return {"shortcut": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write a checkpoint, complete or absent, with the SHA-256 of all its bytes at its end.

    The sum is the comment of the zip file that PyTorch writes. previous: where the file at `path` is kept.
    """
    missing = FIELDS.keys() - content.keys()
    assert not missing, f"checkpoint without {missing}"
    with files.writing(path, previous) as stream:
        _save(content, stream)
        # The last two bytes of a zip file without a comment are the comment's length.
        stream.seek(-2, os.SEEK_END)
        stream.write(SEAL_BYTES.to_bytes(2, "little"))
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.write(SEAL + digest.encode())


class _Noting:
    """Passes writes on and keeps the error of one that failed, which PyTorch replaces by a RuntimeError."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self.stream.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.stream.flush()


def _save(content: dict[str, Any], stream: IO[bytes]) -> None:
    noting = _Noting(stream)
    try:
        torch.save(content, noting)  # type: ignore[arg-type]
    except RuntimeError as error:
        if noting.error:
            raise noting.error from error
        raise


def _check_seal(path: Path) -> None:
    """Raise CheckFailed where a byte of the file is not as it was written."""
    with open(path, "rb") as stream:
        left = max(0, path.stat().st_size - SEAL_BYTES)
        digest = hashlib.sha256()
        while left:
            block = stream.read(min(files.BLOCK_BYTES, left))
            digest.update(block)
            left -= len(block)
        seal = stream.read()
    if seal[: len(SEAL)] != SEAL:
        raise CheckFailed(f"{path} can't be read: it is cut off, or no file that `shortcut train` wrote")
    if seal != SEAL + digest.hexdigest().encode():
        raise CheckFailed(f"{path} can't be read: its bytes were changed after it was written")


def _check_harmless(path: Path) -> None:
    """Raise CheckFailed where reading could run code, or ask for more memory than the file has bytes.

    PyTorch's own restricted unpickler allows more than a checkpoint needs; `bytearray` of any length, for one.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
                    raise CheckFailed(f"{path} can't be read: {entry.filename} is not stored as PyTorch does it")
            (program,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            for operation, argument, _ in pickletools.genops(archive.read(program)):
                allowed = argument in PICKLED or str(argument).endswith("Storage")
                if operation.name in ("STACK_GLOBAL", "INST", "OBJ") or (operation.name == "GLOBAL" and not allowed):
                    raise CheckFailed(f"{path} can't be read: it asks for {argument or operation.name}")
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError) as error:
        raise CheckFailed(f"{path} can't be read: {error}") from error


def load(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Read a checkpoint without running any code that it may hold, every byte checked.

    Raises UsageError where the file is not a checkpoint at all, CheckFailed where it is damaged or too new.
    """
    if not path.is_file():
        raise UsageError(f"checkpoint {path} does not exist", "`shortcut train` writes run.pt into its run folder")
    with open(path, "rb") as stream:
        if stream.read(2) != b"PK":
            raise UsageError(f"{path} is not a run.pt", "`shortcut train` writes run.pt into its run folder")
    _check_seal(path)
    _check_harmless(path)
    try:
        # Mapped storages can't grow, so a tensor that claims more than the file holds is an error.
        content = torch.load(path, map_location=device, weights_only=True, mmap=True)
    except UNREADABLE as error:
        raise CheckFailed(f"{path} can't be read: {(str(error) or repr(error)).splitlines()[0]}") from error
    if not isinstance(content, dict) or not content.keys() >= FIELDS.keys():
        raise CheckFailed(f"{path} is a PyTorch file, but not a run.pt")
    if content["format"] != FORMAT:
        raise CheckFailed(f"{path} has format {content['format']!r}; this version reads {FORMAT}", "update shortcut")
    packed = content["tokenizer"] if isinstance(content["tokenizer"], dict) else {}
    kinds = all(isinstance(content[name], kind) for name, kind in FIELDS.items())
    if not (
        kinds
        and isinstance(packed.get("fingerprint"), str)
        and _are_tensors(packed.get("files"), torch.uint8)
        and _are_tensors(content["model"], None)
    ):
        raise CheckFailed(f"{path} is not a run.pt: its fields are of other types")
    return content


def _are_tensors(found: Any, dtype: torch.dtype | None) -> bool:
    """Whether `found` is a dictionary of named tensors that hold every element they claim."""
    return isinstance(found, dict) and all(
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and tensor.is_contiguous()
        and dtype in (None, tensor.dtype)
        for name, tensor in found.items()
    )


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
