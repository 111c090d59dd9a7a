"""Files of tensors, numbers and strings that can be read without running code, with a checksum of all their bytes.

`torch.save` writes them, so `torch.load` opens them; the SHA-256 of the file is the comment of its zip directory. The
checksum is no signature: who has changed a file can compute it again. So files are read here by `zip_directory` and
`pickle_program`, never by an unpickler, and their tensors are mapped from the file, not copied. PyTorch is imported
inside the functions: a wrong path is reported without the seconds that this import takes.
"""

import hashlib
import math
import mmap
import os
import pickle
import platform
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from shortcut_cli import __version__, files
from shortcut_cli.config import writing
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.training import pickle_program, zip_directory
from shortcut_cli.training.pickle_program import Described, Storage
from shortcut_cli.training.zip_directory import Malformed

if TYPE_CHECKING:
    import torch

WRITERS = {
    "run.pt": "`shortcut train` writes run.pt into its run folder",
    "resume.pt": "`shortcut train` and `shortcut codec train` write it into their run folders",
    "codec.pt": "`shortcut codec train` writes codec.pt into its run folder",
}
DTYPES = {dtype for dtype, _ in pickle_program.DTYPES.values()}
SEAL = b"shortcut sha256 "  # then the checksum in hexadecimal: the end of every file
SEAL_BYTES = len(SEAL) + 64
SHOWN = 200  # characters of a value that is shown
LONGEST_LINE = 1000  # characters of a line of a message, which may hold a path
MOST_LINES = 5  # of a message
MOST_SHOWN = 100  # scores and versions
MOST_RECIPE_VALUES = 1000
MOST_LISTED = 10_000  # names of weights


def versions() -> dict[str, str]:
    """The versions that a run was made with."""
    import torch

    return {"shortcut": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def save(path: Path, content: dict[str, Any], previous: Path | None = None) -> str:
    """Write a file, complete or not at all, with the SHA-256 of all its bytes at its end, which is returned.

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
    return digest


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


@dataclass(frozen=True)
class Later:
    """A tensor of a file that is made when it is written, and given up after that."""

    shape: tuple[int, ...]
    dtype: "torch.dtype"
    make: "Callable[[], torch.Tensor]"


class _Filling:
    """Stands before PyTorch's writer, which gets storages one after the other, and fills those of `Later` in turn.

    Until then such a storage is memory that nobody has touched, so that it takes none, and after that it takes none
    again. They are filled in the order in which they have got their places: each may be made by several processes,
    which all have to make the same one. PyTorch 2.6 writes the storage 10 before the storage 2: it is held until then,
    or all between would have to be made, and kept.
    """

    def __init__(self) -> None:
        self.writer: Any = None
        self.waiting: dict[int, tuple[Later, torch.Tensor]] = {}  # by the address of the storage
        self.rooms: dict[int, mmap.mmap] = {}
        self.held: dict[str, tuple[Any, int]] = {}  # storages that come too early, by the names of their records
        self.written = 0  # storages

    def place(self, later: Later) -> "torch.Tensor":
        """A tensor whose values come when it is written."""
        import torch

        if not math.prod(later.shape):
            return later.make()
        room = mmap.mmap(-1, math.prod(later.shape) * later.dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        tensor = torch.frombuffer(room, dtype=later.dtype).view(later.shape)
        self.waiting[tensor.data_ptr()], self.rooms[tensor.data_ptr()] = (later, tensor), room
        return tensor

    def write_record(self, name: str, content: Any, size: int) -> None:
        """What PyTorch calls for each record of the file."""
        if not name.startswith("data/"):
            self.writer.write_record(name, content, size)
            return
        self.held[name] = content, size
        while (following := f"data/{self.written}") in self.held:
            self._write_storage(following, *self.held.pop(following))
            self.written += 1

    def _write_storage(self, name: str, content: Any, size: int) -> None:
        address = content.data_ptr()
        while address in self.waiting:
            later, tensor = self.waiting.pop(next(iter(self.waiting)))
            tensor.copy_(later.make())
        self.writer.write_record(name, content, size)
        if address in self.rooms:
            self.rooms[address].madvise(mmap.MADV_DONTNEED)


def _plain(value: Any, place: "Callable[[Later], torch.Tensor]") -> Any:
    """The value with all tensors contiguous and without gradients: `load` reads no others.

    Equal strings are one object, also those that PyTorch itself uses. It writes an object once and then refers to it,
    so the bytes would depend on which strings are the same object: others in a run that was resumed than in one that
    was not.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return value.detach().contiguous()
    if isinstance(value, Later):
        return place(value)
    if isinstance(value, dict):
        return {_plain(name, place): _plain(item, place) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item, place) for item in value)
    return sys.intern(str(value)) if isinstance(value, str) else value


def _save(content: dict[str, Any], stream: IO[bytes]) -> None:
    import torch

    checked, filling = _Stream(stream), _Filling()
    plain = _plain(content, filling.place)
    try:
        if not filling.waiting:
            torch.save(plain, checked)  # type: ignore[arg-type]
            return
        # What torch.save does, whose writer can't be reached otherwise.
        within: Any = torch.serialization
        with within._open_zipfile_writer(checked) as filling.writer:
            within._save(plain, filling, pickle, within.DEFAULT_PROTOCOL, False)
        assert not filling.held, filling.held.keys()
    except RuntimeError as error:
        if checked.error:
            raise checked.error from error
        raise


def _check_seal(path: Path, stream: IO[bytes], size: int) -> None:
    """Raise CheckFailed if any byte of the file differs from what was written."""
    left = max(0, size - SEAL_BYTES)
    digest = hashlib.sha256()
    while left and (block := stream.read(min(files.BLOCK_BYTES, left))):
        digest.update(block)
        left -= len(block)
    seal = stream.read(SEAL_BYTES)
    if seal[: len(SEAL)] != SEAL:
        raise CheckFailed(f"{path} can't be read: it is truncated, or was not written by `shortcut`")
    if seal != SEAL + digest.hexdigest().encode():
        raise CheckFailed(f"{path} can't be read: its bytes have changed since it was written")


def is_sealed(path: Path) -> bool:
    """Whether a file ends with a checksum as `save` writes it; the checksum itself is not verified."""
    with files.regular(path) as stream:
        stream.seek(max(0, path.stat().st_size - SEAL_BYTES))
        return stream.read(len(SEAL)) == SEAL


def sealed_digest(path: Path) -> str:
    """The checksum at the end of a file that `save` wrote, in hexadecimal; it is not verified."""
    with files.regular(path) as stream:
        stream.seek(-64, os.SEEK_END)
        return stream.read().decode("ascii", "replace")


def recognise(path: Path, name: str) -> None:
    """Raise UsageError if there is no file at `path`, or not one of PyTorch's, CheckFailed if it is empty or damaged.

    name: what such a file is called, a key of WRITERS.
    """
    if not path.is_file():
        if path.name == name and path.parent.is_dir() and not os.path.lexists(path):
            raise UsageError(f"the folder {str(path.parent)!r} has no {name}", WRITERS[name])
        raise UsageError(f"{path} {'is no regular file' if path.exists() else 'does not exist'}", WRITERS[name])
    with files.regular(path) as stream:
        head = stream.read(2)
    if head in (b"", bytes(2)):  # as a power cut leaves a file
        raise CheckFailed(f"{path} can't be read: it {'begins with zeros' if head else 'is empty'}")
    if head != b"PK":
        if is_sealed(path):
            raise CheckFailed(f"{path} is damaged: it ends as a checkpoint, but does not begin as one")
        raise UsageError(f"{path} is not a {name}", WRITERS[name])


def load(path: Path, name: str, device: str = "cpu") -> Any:
    """Read what `save` wrote: verify its checksum, and map its tensors from the file, or move them to another device.

    No code of the file is run, and until all of it is checked, memory grows only with the size of its data.pkl. An
    OrderedDict is read as a dictionary. Changing a tensor does not change the file.

    Raises what `recognise` raises, and CheckFailed if the file is damaged or not as `save` writes it.
    """
    return _opened(path, name, lambda value, content, stored: _filled(value, content, stored, device))


def describe(path: Path, name: str) -> Any:
    """As `load`, with a `pickle_program.Described` for each tensor, so that PyTorch is not imported."""
    return _opened(path, name, lambda value, *_: value)


def _opened(path: Path, name: str, made: Callable[..., Any]) -> Any:
    recognise(path, name)
    with files.regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        _check_seal(path, stream, size)
        try:
            return made(*_read(stream, size, SEAL_BYTES))
        except Malformed as error:
            raise CheckFailed(f"{path} can't be read: {error}") from error


def load_unsealed(path: Path) -> Any:
    """As `load`, for a file of `torch.save` that has no checksum of the whole; the CRC-32 of each record is verified.

    Raises Malformed if the file is damaged, or holds anything but tensors, numbers, strings and containers.
    """
    with files.regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if not size:
            raise Malformed("it is empty")
        return _filled(*_read(stream, size, 0), "cpu")


def _read(stream: IO[bytes], size: int, comment: int) -> tuple[Any, mmap.mmap, dict[str, zip_directory.Record]]:
    """The value that a file describes, its bytes, and the records of its storages by key. Raises Malformed."""
    content = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY)
    view = memoryview(content)
    records = zip_directory.records(view, comment)
    if not comment:
        for name, record in records.items():
            if zlib.crc32(record.of(view)) != record.crc:
                raise Malformed(f"the bytes of {name} have changed since it was written")
    order = records.get("byteorder")  # which PyTorch writes since 2.1
    if order and order.of(view) != sys.byteorder.encode():
        found = bytes(order.of(view)[:6]).decode(errors="replace")
        raise Malformed(f"its byte order is {found!r}, that of this machine is {sys.byteorder!r}")
    stored = {name.removeprefix("data/"): record for name, record in records.items() if name.startswith("data/")}
    sizes = {key: record.size for key, record in stored.items()}
    return pickle_program.read(records["data.pkl"].of(view), sizes), content, stored


def _filled(value: Any, content: mmap.mmap, stored: Mapping[str, zip_directory.Record], device: str) -> Any:
    """The value that a program describes, its tensors mapped from the file. Raises Malformed."""
    storages: dict[Storage, torch.Tensor] = {}

    def filled(item: Any) -> Any:
        if isinstance(item, Described):
            storage = item.storage
            if storage not in storages:
                storages[storage] = _mapped(content, stored[storage.key].start, storage).to(device)
            part = storages[storage][item.first : item.first + math.prod(item.shape)]
            return part.view(item.shape)
        if isinstance(item, dict):
            return {name: filled(part) for name, part in item.items()}
        return type(item)(map(filled, item)) if isinstance(item, list | tuple) else item

    return filled(value)


def _mapped(content: mmap.mmap, start: int, storage: Storage) -> "torch.Tensor":
    """The elements of a storage, as a tensor of one axis. Raises Malformed if they can't be mapped."""
    import torch

    dtype = getattr(torch, storage.dtype)
    if not storage.elements:
        return torch.empty(0, dtype=dtype)
    if start % storage.element_bytes:
        raise Malformed(f"data/{storage.key} is not aligned as PyTorch aligns it")
    found = torch.frombuffer(content, dtype=dtype, count=storage.elements, offset=start)
    if dtype == torch.bool and found.view(torch.uint8).max() > 1:
        raise Malformed(f"data/{storage.key} has truth values that are neither 0 nor 1")
    return found


def shortened(text: str) -> str:
    """The first lines of a text about the content of a file, cut to a length that a screen can show."""
    return "\n".join(line[:LONGEST_LINE] for line in text.splitlines()[:MOST_LINES])


def values(found: Any) -> int:
    """How many values a tree of dictionaries and lists has, these themselves included."""
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else ()
    return 1 + sum(map(values, parts))


def check_format(path: Path, found: Any, expected: int) -> None:
    """Raise CheckFailed if the field `format` of a file is not the one that this version reads."""
    if type(found) is not int or found != expected:
        raise CheckFailed(f"{path} has format {repr(found)[:SHOWN]}; this version reads {expected}", "update shortcut")


def are_shown(content: Mapping[str, Any]) -> bool:
    """Whether recipe, scores and versions of a file are short enough, and of the types, to be shown."""
    scores, versions = content["scores"], content["versions"]
    return (
        values(content["recipe"]) <= MOST_RECIPE_VALUES
        and values([scores, versions]) <= MOST_SHOWN
        and all(isinstance(name, str) and isinstance(score, int | float) for name, score in scores.items())
        and all(isinstance(part, str) for item in versions.items() for part in item)
        and max((len(part) for part in (*scores, *versions, *versions.values())), default=0) <= SHOWN
    )


def is_recipe(tree: Mapping[Any, Any], section: str, key: str) -> bool:
    """Whether a tree has the form of a recipe: sections with plain values, `key` of `section` naming the network.

    That is what `schema.binding` needs. Which other keys there are, `reading.validate` checks.
    """

    def is_plain(value: Any, depth: int = 0) -> bool:
        if depth > pickle_program.DEEPEST:
            return False
        if isinstance(value, dict):
            return all(isinstance(name, str) and is_plain(item, depth + 1) for name, item in value.items())
        if isinstance(value, list):
            return all(is_plain(item, depth + 1) for item in value)
        return value is None or isinstance(value, str | int | float)

    whole = is_plain(tree) and all(isinstance(table, dict) for table in tree.values())
    codec = section == "codec"
    return whole and codec == ("codec" in tree) and isinstance(tree.get(section, {}).get(key), str)


def are_tensors(found: Any, dtype: str = "") -> bool:
    """Whether `found` is a dictionary of named tensors, or of their descriptions, all of `dtype` if one is named."""
    return isinstance(found, dict) and all(
        isinstance(name, str) and _dtype(tensor) in ((dtype,) if dtype else DTYPES) for name, tensor in found.items()
    )


def _dtype(found: Any) -> str:
    """The name of the dtype of a tensor or of its description; empty if it is neither."""
    if isinstance(found, Described):
        return found.storage.dtype
    torch = sys.modules.get("torch")  # there is no tensor without it
    return str(found.dtype).removeprefix("torch.") if torch and isinstance(found, torch.Tensor) else ""


def check_shapes(
    path: Path,
    weights: dict[str, "torch.Tensor"],
    build: "Callable[[], torch.nn.Module]",
    blocks: int,
    unsaved: tuple[str, ...] = (),
) -> None:
    """Raise CheckFailed if the weights read from `path` differ in name or shape from those of the network they are for.

    build: makes that network; called on the meta device, so that a recipe can't ask for more memory than its weights
    take. blocks: how many blocks it has at least, each with weights of its own: they cost time and memory even on that
    device, and config/schema.py bounds their number. unsaved: name endings of weights that the file need not have.
    """
    import torch

    if blocks > len(weights):
        raise CheckFailed(f"{path}: its recipe asks for {blocks:,} blocks, but it has {len(weights):,} weights")

    def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.endswith(unsaved)}

    try:
        with torch.device("meta"):
            expected = build().state_dict()
    except (UsageError, RuntimeError, ValueError, OverflowError, TypeError) as error:
        raise CheckFailed(f"{path}: its recipe describes no network: {shortened(str(error))}") from error
    changes = writing.differences(shapes(expected), shapes(weights))
    if changes:
        raise CheckFailed(f"{path}: the weights do not match its recipe\n" + shortened("\n".join(changes)))
