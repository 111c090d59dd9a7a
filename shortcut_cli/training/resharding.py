"""torch.distributed.checkpoint for `training.parts`: each process writes its part, and reads what its part now is.

PyTorch plans who writes what, so that what several have is written once, and which parts of files make up those of
another number of processes. Its own files are described by a pickle, which could run code; so ours are written and read
by `Writer` and `Reader`, and that plan is kept as a plain table.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future as Done

from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.training import parts, sharded, tensor_file
from shortcut_cli.training.parallel import SHARED, Left, Processes

Commit = Callable[[dict[str, Any]], None]


class Writer(StorageWriter):
    """Writes the tensors of this process into a file, and their table, in the leading process, by `commit`."""

    def __init__(self, folder: Path, step: int, rank: int, same: Mapping[str, str], commit: Commit) -> None:
        self.folder, self.step, self.rank, self.same, self.commit = folder, step, rank, dict(same), commit
        self.place = ""

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept between two saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed before the plan."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan of this process, as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Called in the leading process: which folder all write to."""
        self.place = parts.free(self.folder, self.step).name
        return [replace(plan, storage_data=self.place) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Done[list[WriteResult]]:
        """Write what falls to this process."""
        place, name = self.folder / plan.storage_data, f"{self.rank}.pt"
        if not place.is_dir():
            raise UsageError(f"process {self.rank} does not see {place}, which the first process has made", SHARED)
        digest, content = "", {}
        for item in plan.items:
            found = planner.resolve_data(item)
            assert isinstance(found, Tensor), item
            found = found.detach()
            row = item.index.offset[0] if item.index.offset else 0
            # A part may lie in a larger, padded buffer, which would be written with it.
            whole = found.untyped_storage().nbytes() == found.nbytes
            content[parts.key(item.index.fqn, row)] = found if whole else found.clone()
        if content:
            digest = tensor_file.save(place / name, content)
        done: Done[list[WriteResult]] = Done()
        done.set_result([WriteResult(item.index, 0, (name, digest)) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called in the leading process when all have written."""
        written = {(each.index.fqn, each.index.offset): each.storage_data for result in results for each in result}
        tensors = {}
        for name, found in metadata.state_dict_metadata.items():
            assert isinstance(found, TensorStorageMetadata), name
            chunks = []
            for chunk in found.chunks:
                # FSDP2 divides rows.
                assert list(chunk.sizes[1:]) == list(found.size[1:]), (name, chunk)
                file, _ = written[name, chunk.offsets]
                chunks.append([*((chunk.offsets[0], chunk.sizes[0]) if found.size else (0, 1)), file])
            dtype = str(found.properties.dtype).removeprefix("torch.")
            tensors[name] = parts.entry(dtype, list(found.size), chunks)
        files = dict(written.values())
        self.commit({"folder": self.place, "files": dict(sorted(files.items())), "tensors": tensors, "same": self.same})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """There are no such ids."""
        del checkpoint_id
        return False


class Reader(StorageReader):
    """Reads the parts of files that this process needs."""

    def __init__(self, folder: Path, table: Mapping[str, Any], opened: Mapping[str, dict[str, Tensor]]) -> None:
        self.folder, self.table, self.opened = folder, table, opened

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept between two loads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The table, as PyTorch has it."""
        del args, kwargs
        found: dict[str, Any] = {}
        for name, (dtype, shape, chunks) in self.table["tensors"].items():
            rest = shape[1:]
            places = [
                ChunkStorageMetadata(
                    torch.Size([row, *(0 for _ in rest)] if shape else []), torch.Size([rows, *rest] if shape else [])
                )
                for row, rows, _ in chunks
            ]
            properties = TensorProperties(dtype=getattr(torch, dtype))
            found[name] = TensorStorageMetadata(properties, torch.Size(shape), places)
        return Metadata(found)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed before the plan."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan of this process, as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans, as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Done[None]:
        """Copy what is planned into the tensors of this process."""
        where = {(name, row): file for name, (_, _, chunks) in self.table["tensors"].items() for row, _, file in chunks}
        asked = []
        for item in plan.items:
            row = item.storage_index.offset[0] if item.storage_index.offset else 0
            asked.append((item, parts.key(item.storage_index.fqn, row), where[item.storage_index.fqn, row]))
        found = parts.opened(self.folder, self.table, {file for _, _, file in asked}, self.opened)
        for item, key, file in asked:
            part = found[file][key]
            for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                part = part.narrow(axis, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Done[None] = Done()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """There are no such ids."""
        del checkpoint_id
        return False


def named_once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors without those that are others under a second name, and the first names of these."""
    first: dict[int, str] = {}
    once, same = {}, {}
    for name, tensor in tensors.items():
        kept = first.setdefault(sharded.local(tensor).untyped_storage().data_ptr(), name)
        if kept == name:
            once[name] = tensor
        else:
            same[name] = kept
    return once, same


def save(folder: Path, content: Mapping[str, Any], processes: Processes, commit: Commit) -> Any:
    """Begin to write the state of all processes, which all call this.

    Tensors may change as soon as this returns; nothing else of the content may, before it is written. commit: called in
    the leading process with the content of resume.pt, once all parts are written. Returns a future.
    """
    head, tensors = parts.split(content)
    once, same = named_once(tensors)
    writer = Writer(folder, content["step"], processes.rank, same, lambda table: commit(head | {"parts": table}))
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    return state_dict_saver.async_save(once, storage_writer=writer, planner=planner, process_group=processes.states)


def wait(saving: "Future[Any]", rank: int) -> None:
    """Wait until a state is written. Raises what went wrong in this process, or Left for another one's error."""
    with _told(rank):
        saving.result()


def load(folder: Path, content: Mapping[str, Any], own: Mapping[str, Any], processes: Processes) -> dict[str, Any]:
    """Read the tensors of a state into `own`, the content of a resume.pt of this process, in place; all call this.

    content: of the resume.pt in the folder, whose tensors are in parts, or whole. Returns it with `own`'s tensors.
    Raises CheckFailed if it has others.
    """
    _, tensors = parts.split(own)
    if sizes(content) != _shapes(tensors):
        raise CheckFailed(f"{folder / 'resume.pt'} is not a state of this run: its tensors are others")
    if "parts" in content:
        once = {name: tensors[name] for name in content["parts"]["tensors"]}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with _told(processes.rank):
            reader = Reader(folder, content["parts"], content["opened"])
            state_dict_loader.load(once, storage_reader=reader, planner=planner, process_group=processes.states)
    else:
        for name, whole in parts.split(content)[1].items():
            sharded.local(tensors[name]).copy_(sharded.local(sharded.part(whole, tensors[name])))
    return parts.joined({name: value for name, value in content.items() if name not in ("parts", "opened")}, tensors)


def check(content: Mapping[str, Any], model: nn.Module) -> None:
    """Raise ValueError if a state is not of a model of these weights, whose values do not count."""
    found = sizes(content)
    for name, weight in model.state_dict().items():
        if found.get(f"model.{name}") != tuple(weight.shape):
            raise ValueError(f"its {name} has another shape, or is missing")


def sizes(content: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a state, by name."""
    return parts.sizes(content["parts"]) if "parts" in content else _shapes(parts.split(content)[1])


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@contextmanager
def _told(rank: int) -> Iterator[None]:
    """Raises the error of this process, of those that PyTorch has collected from all; Left if it has none."""
    try:
        yield
    except CheckpointException as error:
        own = error.failures.get(rank)
        if own:
            raise own[0] from error
        raise Left("another process could not read or write its part of the state") from error
