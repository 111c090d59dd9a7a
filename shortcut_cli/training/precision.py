"""In which precision a run multiplies matrices: chosen once, kept in its files, in training, validation and scoring.

Weights, gradients and the optimizer's state are fp32 in any case.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from shortcut_cli.config.schema import Recipe
from shortcut_cli.kernels import bf16


def choose(resolved: Recipe, device: str) -> str:
    """ "fp32" or "bf16": what train.precision says.

    "auto" is bf16 on CUDA and on a CPU with instructions for it: there a step is faster at every width that was tried,
    and the loss is that of fp32 within the noise of seeds (benchmarks/precision.py; docs/experiments.md).
    """
    wanted = resolved.train.precision
    if wanted != "auto":
        return wanted
    kind = device.partition(":")[0]
    return "bf16" if kind == "cuda" or (kind == "cpu" and bf16.native()) else "fp32"


def of(content: Mapping[str, Any]) -> str:
    """The precision that the run of a run.pt or resume.pt has; of files that name none, the one that it had.

    Raises ValueError if it is none of ours.
    """
    wanted = content.get("precision") or content["recipe"]["train"].get("precision", "auto")
    if wanted == "auto":  # an earlier version: bf16 on a GPU only
        made = content.get("conditions")
        last = made[-1] if isinstance(made, list) and made else {}
        wanted = "fp32" if not isinstance(last, Mapping) or last.get("device", "cpu") == "cpu" else "bf16"
    if wanted not in ("fp32", "bf16"):
        raise ValueError(f"a precision of {wanted!r}")
    return str(wanted)


def products(precision: str, device: str) -> AbstractContextManager[None] | torch.autocast:
    """A context in which models on a device multiply in a precision."""
    kind = device.partition(":")[0]
    if kind == "cpu":
        return bf16.products(precision == "bf16")
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16")
