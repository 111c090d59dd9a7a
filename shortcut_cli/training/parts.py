"""The state of a run whose weights are divided over processes: a small resume.pt, and beside it a file of each process.

That resume.pt has the fields of any other, but its tensors of one and more axes are empty. Its table `parts` says where
they are:

folder      beside resume.pt, state-STEP
files       each file in it, with the checksum at its end
tensors     by the name of a tensor: its dtype, its shape, and [first row, rows, file] of each part, in order
same        names of tensors that are others under a second name, such as tied weights

resume.pt is put into place last, and only after that folders are removed that neither it nor resume.prev.pt names. So
a process that is killed while it saves leaves the state before. All files are read as every other one of ours, by
`tensor_file`: no code in them is run. Who writes and reads which part, `training.resharding` says.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortcut_cli import files
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.training import tensor_file

if TYPE_CHECKING:
    from torch import Tensor

SECTIONS = ("model", "average", "optimizer", "muon")  # fields of a resume.pt with tensors that are divided
FOLDER = re.compile(r"state-\d{1,18}(-\d{1,6})?")
FILE = re.compile(r"\d{1,9}\.pt")
KEYS = {"folder": str, "files": dict, "tensors": dict, "same": dict}


def key(name: str, row: int) -> str:
    """The name in a file of the part of a tensor that begins with this row."""
    return f"{name}@{row}"


def split(content: Mapping[str, Any]) -> tuple[dict[str, Any], "dict[str, Tensor]"]:
    """The content of a resume.pt without its large tensors, and these by name."""
    tensors: dict[str, Tensor] = {}
    head = {name: _split(value, name, tensors) if name in SECTIONS else value for name, value in content.items()}
    return head, tensors


def _split(value: Any, name: str, tensors: "dict[str, Tensor]") -> Any:
    import torch

    if isinstance(value, dict):
        return {part: _split(each, f"{name}.{part}", tensors) for part, each in value.items()}
    if isinstance(value, torch.Tensor):
        if not value.dim():  # all processes have it: in a part, each of them would have to read that of another
            return value.detach().clone()  # it may change while the state is written
        tensors[name] = value
        return torch.empty(0, dtype=value.dtype)
    return value


def joined(head: Mapping[str, Any], tensors: "Mapping[str, Tensor]") -> dict[str, Any]:
    """What `split` was given."""
    return {name: _joined(value, name, tensors) if name in SECTIONS else value for name, value in head.items()}


def _joined(value: Any, name: str, tensors: "Mapping[str, Tensor]") -> Any:
    import torch

    if isinstance(value, dict):
        return {part: _joined(each, f"{name}.{part}", tensors) for part, each in value.items()}
    return tensors.get(name, value) if isinstance(value, torch.Tensor) else value


def check(path: Path, content: Mapping[str, Any], share: tuple[int, int] = (0, 1)) -> dict[str, "dict[str, Tensor]"]:
    """Raise CheckFailed if the table of a resume.pt, read from `path`, is none, or a file that it names is not there.

    share: (rank, processes) that verify the bytes of these files together: each those whose numbers fall to it. They
    are the ones that it wrote, and will read, if there are as many as then. Returns them as `opened` does.
    """
    if not _is_table(content["parts"], content):
        raise CheckFailed(f"{path} is not a resume.pt: its parts have the wrong types")
    rank, count = share
    mine = {name for name in content["parts"]["files"] if int(name.partition(".")[0]) % count == rank}
    return opened(path.parent, content["parts"], mine)


def _is_table(table: Any, content: Mapping[str, Any]) -> bool:
    if not isinstance(table, dict) or table.keys() != KEYS.keys():
        return False
    names, same = table["tensors"], table["same"]
    if not all(isinstance(table[name], kind) for name, kind in KEYS.items()):
        return False
    return (
        FOLDER.fullmatch(table["folder"]) is not None
        and all(isinstance(name, str) and FILE.fullmatch(name) is not None for name in table["files"])
        and all(isinstance(digest, str) for digest in table["files"].values())
        and all(_is_tensor(entry, table["files"]) for entry in names.values())
        and all(isinstance(first, str) and first in names for first in same.values())
        and {*names, *same} == split(content)[1].keys()
    )


def _is_tensor(entry: Any, named: Mapping[str, Any]) -> bool:
    """Whether an entry of the table describes a tensor, whose parts follow each other without a gap."""
    if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str)):
        return False
    if entry[0] not in tensor_file.DTYPES:
        return False
    _, shape, chunks = entry
    if not _are_numbers(shape) or not isinstance(chunks, list) or not chunks:
        return False
    row = 0
    for chunk in chunks:
        if not (isinstance(chunk, list) and len(chunk) == 3 and _are_numbers(chunk[:2]) and chunk[0] == row):
            return False
        if not isinstance(chunk[2], str) or chunk[2] not in named:
            return False
        row += chunk[1]
    return row == (shape[0] if shape else 1)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def opened(
    folder: Path,
    table: Mapping[str, Any],
    wanted: set[str] | None = None,
    before: "Mapping[str, dict[str, Tensor]] | None" = None,
) -> dict[str, "dict[str, Tensor]"]:
    """The tensors of each file, mapped, not copied. wanted: names of files, instead of all.

    before: files that this process has opened; their bytes are not verified again.

    Raises CheckFailed if a file is missing or damaged, of another state, or lacks a part that the table names.
    """
    place = folder / table["folder"]
    found = {}
    for name, digest in table["files"].items():
        if before and name in before:
            found[name] = before[name]
        elif wanted is None or name in wanted:
            try:
                found[name] = tensor_file.load(place / name, "resume.pt")
            except UsageError as error:
                raise CheckFailed(error.message) from error
            if tensor_file.sealed_digest(place / name) != digest or not tensor_file.are_tensors(found[name]):
                raise CheckFailed(f"{place / name} is not of the state that {folder / 'resume.pt'} names")
    for name, (dtype, shape, chunks) in table["tensors"].items():
        for row, rows, file in chunks:
            part = found[file].get(key(name, row)) if file in found else None
            if file in found and (
                part is None
                or str(part.dtype) != f"torch.{dtype}"
                or list(part.shape) != [rows, *shape[1:]][: len(shape)]
            ):
                raise CheckFailed(f"{place / file} lacks a part of {name}")
    return found


def whole(folder: Path, content: Mapping[str, Any], device: str = "cpu") -> dict[str, Any]:
    """The content of a resume.pt with its tensors put together."""
    import torch

    table = content["parts"]
    found = opened(folder, table)
    tensors = {}
    for name, (_, _, chunks) in table["tensors"].items():
        parts = [found[file][key(name, row)] for row, _, file in chunks]
        tensors[name] = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(device)
    tensors |= {name: tensors[first] for name, first in table["same"].items()}
    return joined({name: value for name, value in content.items() if name != "parts"}, tensors)


def sizes(table: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    found = {name: tuple(shape) for name, (_, shape, _) in table["tensors"].items()}
    return found | {name: found[first] for name, first in table["same"].items()}


def entry(dtype: str, shape: list[int], chunks: list[list[Any]]) -> list[Any]:
    """An entry of the table. chunks: [first row, rows, file] in any order; those without a row are left out."""
    kept = sorted(chunk for chunk in chunks if chunk[1]) if math.prod(shape) else chunks[:1]
    return [dtype, shape, kept]


def free(folder: Path, step: int) -> Path:
    """A new folder for the state of a step. There is one of that name if the state that it belongs to is damaged."""
    for number in range(1, 1_000_000):
        place = folder / (f"state-{step}-{number}" if number > 1 else f"state-{step}")
        try:
            place.mkdir()
        except FileExistsError:
            continue
        files.sync_folder(folder)
        return place
    raise CheckFailed(f"{folder} has a million states of step {step}")


def sweep(folder: Path, *states: str) -> None:
    """Remove what processes that were killed, or earlier states, have left; states: files whose states are kept.

    Only our own files are removed. Nothing is, if one of these states can't be read.
    """
    places = [place for place in folder.glob("state-*") if FOLDER.fullmatch(place.name) and place.is_dir()]
    if not places:
        return
    kept = set()
    for path in (folder / name for name in states):
        if path.exists():
            try:
                table = tensor_file.describe(path, "resume.pt").get("parts")
            except (CheckFailed, UsageError):
                return
            kept |= {table["folder"]} if isinstance(table, dict) and "folder" in table else set()
    for place in places:
        if place.name not in kept and not place.is_symlink():
            _remove(place)


def _remove(place: Path) -> None:
    for path in place.iterdir():
        if FILE.fullmatch(path.name) or (path.name.startswith(".") and path.name.endswith(".tmp")):
            path.unlink()
    if not any(place.iterdir()):
        place.rmdir()
