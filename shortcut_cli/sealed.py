"""Files of tensors, numbers and strings that run no code when they are read, with a sum of all their bytes.

A dictionary, written by PyTorch and read with `weights_only=True`. Its SHA-256 is the comment of the zip file. PyTorch
is imported where it is used, so that a path with a slip in it is told from a file before that has taken its seconds.
"""

import hashlib
import os
import pickle
import pickletools
import platform
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from shortcut_cli import __version__, files
from shortcut_cli.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    import torch

WRITERS = {
    "run.pt": "`shortcut train` writes run.pt into its run folder",
    "resume.pt": "`shortcut train` and `shortcut codec train` write it into their run folders",
    "codec.pt": "`shortcut codec train` writes codec.pt into its run folder",
}
SEAL = b"shortcut sha256 "
SEAL_BYTES = len(SEAL) + 64
PICKLED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}  # and the storages of the element types
UNREADABLE = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError),
    *(AssertionError, UnicodeDecodeError, OverflowError, MemoryError),
)


def versions() -> dict[str, str]:
    """What a run was made with."""
    import torch

    return {"shortcut": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> None:
    """Write a file, complete or absent, with the SHA-256 of all its bytes at its end.

    The sum is the comment of the zip file that PyTorch writes. previous: where the file at `path` is kept.
    """
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
    import torch

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
        raise CheckFailed(f"{path} can't be read: it is cut off, or no file that `shortcut` wrote")
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


def is_sealed(path: Path) -> bool:
    """Whether a file ends as `save` ends one; says nothing of its other bytes."""
    with open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - SEAL_BYTES))
        return stream.read(len(SEAL)) == SEAL


def recognise(path: Path, name: str) -> None:
    """Raise UsageError where a path is no file of ours at all. name: what such files are called, for the messages."""
    if not path.is_file():
        raise UsageError(f"{name} {path} does not exist", WRITERS[name])
    with open(path, "rb") as stream:
        if stream.read(2) != b"PK":
            raise UsageError(f"{path} is not a {name}", WRITERS[name])


def load(path: Path, name: str, device: str = "cpu") -> Any:
    """Read what `save` wrote, every byte checked, without running any code that it may hold.

    Raises what `recognise` raises, CheckFailed where the file is damaged.
    """
    recognise(path, name)
    _check_seal(path)
    _check_harmless(path)
    import torch

    try:
        # Mapped storages can't grow, so a tensor that claims more than the file holds is an error.
        return torch.load(path, map_location=device, weights_only=True, mmap=True)
    except UNREADABLE as error:
        raise CheckFailed(f"{path} can't be read: {(str(error) or repr(error)).splitlines()[0]}") from error


def are_tensors(found: Any, dtype: "torch.dtype | None" = None) -> bool:
    """Whether `found` is a dictionary of named tensors that hold every element they claim."""
    import torch

    return isinstance(found, dict) and all(
        isinstance(name, str)
        and isinstance(tensor, torch.Tensor)
        and tensor.is_contiguous()
        and dtype in (None, tensor.dtype)
        for name, tensor in found.items()
    )
