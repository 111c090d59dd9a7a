"""Whether and how the passes of a run are compiled: torch.compile."""

import importlib.util
import os
import shutil

import torch
from torch import nn

from shortcut_cli import files
from shortcut_cli.config.schema import TrainConfig

PAYS = 2_000  # steps; on an H200 what compilation takes had come back after 1,300 to 1,400 (docs/gpu.md)
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def choose(config: TrainConfig, device: str, processes: int) -> bool:
    """What train.compile says; "auto" is yes where it was measured to pay.

    That is in runs of PAYS steps or more, by one process, on a GPU for which this machine can compile: torch.compile
    needs Triton, which knows GPUs from compute capability 7.0 on, and a C compiler. On a CPU a step in bf16 is not
    faster, one in fp32 of most architectures by a tenth or less. It follows from the steps that are planned, not from
    those that are left, so that a run that goes on is computed as before.
    """
    if config.compile != "auto":
        return config.compile
    return device.startswith("cuda") and processes == 1 and config.steps >= PAYS and _can_compile(device)


def _can_compile(device: str) -> bool:
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    return bool(importlib.util.find_spec("triton") and compiler and torch.cuda.get_device_capability(device) >= (7, 0))


def compiled(loss: nn.Module, device: str, adds: bool) -> nn.Module:
    """The loss compiled with its model: by itself it reads and writes all logits several times.

    On a GPU the kernels of a pass are replayed as one CUDA graph: those of a small model take less time than their
    launches. But not if the gradients of several passes or processes are added up (`adds`): the next pass would
    overwrite them (https://github.com/pytorch/pytorch/issues/169545).

    What is compiled lies in this package's cache, if $TORCHINDUCTOR_CACHE_DIR names no other folder.
    """
    os.environ.setdefault(CACHE_VARIABLE, str(files.cache_folder() / "compiled"))
    graphs = device.startswith("cuda") and not adds
    return torch.compile(loss, mode="reduce-overhead" if graphs else None)  # type: ignore[return-value]
