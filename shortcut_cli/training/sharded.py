"""`train.shard = "fsdp"`: each process keeps its part of every weight, of its gradient and of the optimizer's state.

FSDP2 of PyTorch. A layer's weights are put together while it computes, and dropped again. If there are several nodes,
weights are divided within each, and gradients are averaged over them (HSDP). Files stay what they are without it: the
parts are put together to write one, and divided after it is read.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

OTHER_WAYS_IN = ("delta", "read")  # methods of layers that architectures call in place of `forward`


def divide(model: nn.Module, device: str, group: Any) -> None:
    """Divide the weights of a model, in place, one layer after the other, over all processes, which are `group`.

    Weights and gradients travel in fp32, and are rounded where they are multiplied, as without this: so what is fp32
    in a layer, such as norms and static mixes, stays that.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = _mesh(device, group)
    blocks: Iterable[nn.Module] = model.blocks  # type: ignore[assignment]
    for block in blocks:
        fully_shard(block, mesh=mesh)
        for name in OTHER_WAYS_IN:
            if hasattr(block, name):
                register_fsdp_forward_method(block, name)
    fully_shard(model, mesh=mesh)  # what is not in layers


def _mesh(device: str, group: Any) -> Any:
    """All processes, which wait as long as `group` does; (nodes, processes of each) if there are several nodes."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    count, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    kind = device.partition(":")[0]
    if 0 < local < count and count % local == 0:
        return init_device_mesh(kind, (count // local, local), mesh_dim_names=("nodes", "processes"))
    return DeviceMesh.from_group(group, kind)


def is_part(value: object) -> bool:
    """Whether this is a tensor of which each process has a part."""
    return hasattr(value, "full_tensor")


def whole(value: Any, keep: bool) -> Any:
    """A tensor, or tables and lists of them, put together on the CPU; all processes call this. keep: else no data."""
    if isinstance(value, dict):
        return {key: whole(each, keep) for key, each in value.items()}
    if isinstance(value, list):
        return [whole(each, keep) for each in value]
    if not is_part(value):
        return value
    found = value.full_tensor()
    return found.detach().cpu() if keep else found.new_empty(0)


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
