"""Files of tensors, numbers and strings that can be read without running code, with a checksum of all their bytes.

Each holds a dictionary that PyTorch writes, and reads with `weights_only=True`; its SHA-256 is the comment of the zip
file. PyTorch is imported inside the functions: a wrong path is reported without the seconds that this import takes.
"""

import hashlib
import os
import pickle
import pickletools
import platform
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from shortcut_cli import __version__, files
from shortcut_cli.config import writing
from shortcut_cli.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    import torch

WRITERS = {
    "run.pt": "`shortcut train` writes run.pt into its run folder",
    "resume.pt": "`shortcut train` and `shortcut codec train` write it into their run folders",
    "codec.pt": "`shortcut codec train` writes codec.pt into its run folder",
}
SEAL = b"shortcut sha256 "  # then the checksum in hexadecimal: the end of every file
SEAL_BYTES = len(SEAL) + 64
# What the pickle may import, besides the storage class of each dtype.
PICKLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError),
    *(AssertionError, UnicodeDecodeError, OverflowError, MemoryError),
)


def versions() -> dict[str, str]:
    """The versions that a run was made with."""
    import torch

    return {"shortcut": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write a file, complete or not at all, with the SHA-256 of all its bytes at its end.

    The checksum is the comment of the zip file that PyTorch writes.

    previous: path to which an existing file at `path` is moved.
    """
    with files.writing(path, previous) as stream:
        _save(content, stream)
        # The last two bytes of a zip file without a comment are the comment's length.
        stream.seek(-2, os.SEEK_END)
        stream.write(SEAL_BYTES.to_bytes(2, "little"))
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        stream.write(SEAL + digest.encode())


class _Stream:
    """Forwards writes and remembers an OSError, which PyTorch would replace with a RuntimeError."""

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
    import torch

    checked = _Stream(stream)
    try:
        torch.save(content, checked)  # type: ignore[arg-type]
    except RuntimeError as error:
        if checked.error:
            raise checked.error from error
        raise


def _check_seal(path: Path) -> None:
    """Raise CheckFailed if any byte of the file differs from what was written."""
    with open(path, "rb") as stream:
        left = max(0, path.stat().st_size - SEAL_BYTES)
        digest = hashlib.sha256()
        while left:
            block = stream.read(min(files.BLOCK_BYTES, left))
            digest.update(block)
            left -= len(block)
        seal = stream.read()
    if seal[: len(SEAL)] != SEAL:
        raise CheckFailed(f"{path} can't be read: it is truncated, or was not written by `shortcut`")
    if seal != SEAL + digest.hexdigest().encode():
        raise CheckFailed(f"{path} can't be read: its bytes have changed since it was written")


def _check_harmless(path: Path) -> None:
    """Raise CheckFailed if reading could run code or allocate more memory than the file has bytes.

    PyTorch's restricted unpickler allows more than a checkpoint needs, for example a `bytearray` of any length.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
                    raise CheckFailed(f"{path} can't be read: {entry.filename} is not stored as PyTorch stores it")
            (program,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            for operation, argument, _ in pickletools.genops(archive.read(program)):
                allowed = argument in PICKLED or str(argument).endswith("Storage")
                if operation.name in ("STACK_GLOBAL", "INST", "OBJ") or (operation.name == "GLOBAL" and not allowed):
                    raise CheckFailed(f"{path} can't be read: it asks for {argument or operation.name}")
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError) as error:
        raise CheckFailed(f"{path} can't be read: {error}") from error


def is_sealed(path: Path) -> bool:
    """Whether a file ends with a checksum as `save` writes it; the checksum itself is not verified."""
    with open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - SEAL_BYTES))
        return stream.read(len(SEAL)) == SEAL


def recognise(path: Path, name: str) -> None:
    """Raise UsageError if there is no file at `path`, or not one of PyTorch's.

    name: what such a file is called, a key of WRITERS.
    """
    if not path.is_file():
        raise UsageError(f"{name} {path} does not exist", WRITERS[name])
    with open(path, "rb") as stream:
        if stream.read(2) != b"PK":
            raise UsageError(f"{path} is not a {name}", WRITERS[name])


def load(path: Path, name: str, device: str = "cpu") -> Any:
    """Read what `save` wrote, verifying its checksum and running no code from it.

    Raises what `recognise` raises, and CheckFailed if the file is damaged.
    """
    recognise(path, name)
    _check_seal(path)
    _check_harmless(path)
    import torch

    try:
        # Memory-mapped storages can't grow, so a tensor that claims more than the file holds is an error.
        return torch.load(path, map_location=device, weights_only=True, mmap=True)
    except UNREADABLE as error:
        raise CheckFailed(f"{path} can't be read: {(str(error) or repr(error)).splitlines()[0]}") from error


def are_tensors(found: Any, dtype: "torch.dtype | None" = None) -> bool:
    """Whether `found` is a dictionary of named tensors, all of `dtype` if one is given.

    Tensors must be contiguous: one that is not can claim more elements than the file holds.
    """
    import torch

    return isinstance(found, dict) and all(
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and tensor.is_contiguous()
        and dtype in (None, tensor.dtype)
        for name, tensor in found.items()
    )


def check_shapes(
    path: Path,
    weights: dict[str, "torch.Tensor"],
    build: "Callable[[], torch.nn.Module]",
    unsaved: tuple[str, ...] = (),
) -> None:
    """Raise CheckFailed if the weights read from `path` differ in name or shape from those of the network they are for.

    build: makes that network; called on the meta device, so that a recipe can't ask for more memory than its weights
    take. unsaved: name endings of weights that the file need not have.
    """
    import torch

    def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.endswith(unsaved)}

    with torch.device("meta"):
        expected = build().state_dict()
    changes = writing.differences(shapes(expected), shapes(weights))
    if changes:
        raise CheckFailed(f"{path}: the weights do not match its recipe\n" + "\n".join(changes[:5]))
