"""`train.shard = "fsdp"`: each process keeps its part of every weight, of its gradient and of the optimizer's state.

FSDP2 of PyTorch. A layer's weights are put together while it computes, and dropped again. If there are several nodes,
weights are divided within each, and gradients are averaged over them (HSDP). No process has the whole weights at the
start: a model is made with `unallocated` matrices, and `divide` gives memory to one layer after the other. run.pt stays
what it is without this: the parts are put together to write it. The state of a run is in `training.parts`.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shortcut_cli.errors import Unavailable
from shortcut_cli.models.transformer import Decoder
from shortcut_cli.training import tensor_file

OTHER_WAYS_IN = ("delta", "read")  # methods of layers that architectures call in place of `forward`


class _Unallocated(TorchFunctionMode):
    """New tensors of two and more axes get no memory; vectors do, with their values."""

    MADE = (torch.empty, torch.zeros, torch.ones, torch.full)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func in self.MADE:
            found = func(*args, **given | {"device": "meta"})
            if found.dim() > 1:
                return found
        return func(*args, **given)


@contextmanager
def unallocated() -> Iterator[None]:
    """A model that is made in this block has no memory for its matrices, until `divide` gives it some."""
    with _Unallocated():
        yield


def check(device: str) -> None:
    """Raise Unavailable if PyTorch can't divide weights on a device: 2.6 can only on GPUs."""
    if device.partition(":")[0] == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):  # which FSDP2 calls
        raise Unavailable(
            f'train.shard = "fsdp" does not work on CPUs with PyTorch {torch.__version__}',
            'a later PyTorch, or train.shard = "none"',
        )


def divide(model: Decoder, device: str, group: Any, timeout_s: float, start: Callable[[str, Tensor], None]) -> None:
    """Divide the weights of an unallocated model, in place, over all processes, which are `group`.

    The memory for the whole of a layer is there until it is divided, and no longer. timeout_s: how long `group` waits.
    start: gives a matrix, which it gets with its name, its first values.

    Weights and gradients travel in fp32, but for those of `narrow`.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = _mesh(device, group, timeout_s)
    names = {weight: name for name, weight in model.named_parameters()}
    in_blocks = set(model.blocks.modules())
    _allocate([module for module in model.modules() if module not in in_blocks], names, device, start)
    with torch.no_grad():
        model.init_extra()
    blocks: Iterable[nn.Module] = model.blocks
    for block in blocks:
        _allocate(block.modules(), names, device, start)
        fully_shard(block, mesh=mesh)
        for name in OTHER_WAYS_IN:
            if hasattr(block, name):
                register_fsdp_forward_method(block, name)
    fully_shard(model, mesh=mesh)  # what is not in layers


def narrow(model: Decoder) -> None:
    """Send the matrices of a divided model in bf16, half of the bytes, where the others need them.

    For a model that multiplies them in bf16: it would round them itself, so that its losses and gradients stay the
    same, to the bit. PyTorch's MixedPrecisionPolicy would round all weights of a layer, norms and mixes over depth too.
    Gradients are added up in fp32.
    """
    for name, weight in model.named_parameters():
        if name in model.matrices():
            _Narrow().put_on(weight)


class _Narrow:
    """What FSDP2 asks a part of a weight about how to put the whole together, its "all-gather extension"."""

    def put_on(self, weight: nn.Parameter) -> None:
        """FSDP2 asks the tensor itself that a weight's part is in, of which `to_local` gives a view."""
        whole: Any = weight
        self.part: Tensor = whole._local_tensor
        hooks: Any = self.part
        hooks.fsdp_pre_all_gather, hooks.fsdp_post_all_gather = self.sent, self.received

    def sent(
        self, mesh: Any, size: torch.Size, _stride: Any, _module: nn.Module, _policy: Any
    ) -> tuple[tuple[Tensor], torch.Size]:
        """What this process sends: its part, (ceil(rows / processes), columns), with zeros where it has fewer rows."""
        missing = -(-size[0] // mesh.size()) - len(self.part)
        part = self.part.detach().bfloat16()
        return (torch.nn.functional.pad(part, (0, 0, 0, missing)) if missing else part,), size

    def received(
        self, outputs: tuple[Tensor], size: torch.Size, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor]] | None:
        """The whole weight in fp32, in `out` if that is given, from what all have sent."""
        whole = outputs[0][: size[0]]
        if out is None:
            made = whole.to(dtype)
            return made, (made,)
        with torch.no_grad():
            out.copy_(whole)
        return None


@torch.no_grad()
def _allocate(
    modules: Iterable[nn.Module], names: dict[nn.Parameter, str], device: str, start: Callable[[str, Tensor], None]
) -> None:
    """Give the weights of modules memory and first values on a device; weights that are tied stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in modules:
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight not in made:
                values = torch.empty_like(weight, device=device) if weight.is_meta else weight.to(device)
                made[weight] = nn.Parameter(values)
            setattr(module, name, made[weight])
        for name, values in list(module.named_buffers(recurse=False)):
            setattr(module, name, values.to(device))
    for weight, new in made.items():  # once it is the model's: some first values depend on which weight it is
        if weight.is_meta:
            start(names[weight], new)


def _mesh(device: str, group: Any, timeout_s: float) -> Any:
    """All processes, which wait as long as `group` does; (nodes, processes of each) if both are several.

    Nodes with different numbers of processes have no such grid: then weights are divided over all processes.
    """
    from torch.distributed.device_mesh import DeviceMesh

    count, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    kind = device.partition(":")[0]
    sizes = torch.zeros(count, dtype=torch.int64, device=device)
    sizes[dist.get_rank()] = local
    dist.all_reduce(sizes, group=group)  # else some of them might take the other way
    if not bool((sizes == local).all()) or not (1 < local < count and count % local == 0):
        return DeviceMesh.from_group(group, kind)
    ranks = torch.arange(count).view(-1, local)
    patience = timedelta(seconds=timeout_s)
    groups: list[Any] = [  # those of this process
        dist.new_subgroups_by_enumeration(each.tolist(), timeout=patience)[0] for each in (ranks.T, ranks)
    ]
    return DeviceMesh.from_group(groups, kind, ranks, mesh_dim_names=("nodes", "processes"))


def is_part(value: object) -> bool:
    """Whether this is a tensor of which each process has a part."""
    return hasattr(value, "full_tensor")


def later(value: Any, keep: bool) -> Any:
    """Content of a file, whose tensors are put together one after the other while `tensor_file.save` writes it.

    All processes call this. keep: whether this is the one that writes; the others take part, and have done so after it.
    """
    if isinstance(value, dict):
        return {key: later(each, keep) for key, each in value.items()}
    if isinstance(value, list):
        return [later(each, keep) for each in value]
    if not is_part(value):
        return value
    if keep:
        return tensor_file.Later(tuple(value.shape), value.dtype, lambda: value.full_tensor().detach())
    value.full_tensor()
    return None


def part(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, divided as `like` is, if that is; all processes have it, so nothing is sent."""
    if not is_part(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    place: Any = like
    value = value.to(place.device)
    return distribute_tensor(value, place.device_mesh, place.placements, src_data_rank=None)


def local(value: Tensor) -> Tensor:
    """This process' part of a tensor, which shares its memory; the tensor, if it is not divided."""
    place: Any = value
    found: Tensor = place.to_local() if is_part(value) else value
    return found


def assembled(part: Tensor, like: Tensor) -> Tensor:
    """This process' part of a tensor that is divided as `like` is -> the whole; all processes call this."""
    if not is_part(like):
        return part
    from torch.distributed.tensor import DTensor

    place: Any = like
    found: Any = DTensor.from_local(
        part, place.device_mesh, place.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    result: Tensor = found.full_tensor()
    return result
