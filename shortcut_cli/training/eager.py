"""Optimizers that do not load torch's compiler.

Methods of torch.optim import `torch._dynamo` when they are first called, to say that they are not to be compiled: over
a second of CPU time at the start of a training that compiles nothing.
"""

from collections.abc import Callable
from typing import Any

import torch


def _plain(method: Callable[..., Any]) -> Any:
    """A method without what wraps it."""
    return getattr(method, "__wrapped__", method)


class Optimizer(torch.optim.Optimizer):
    """The base of optimizers, as torch's."""

    add_param_group = _plain(torch.optim.Optimizer.add_param_group)
    load_state_dict = _plain(torch.optim.Optimizer.load_state_dict)
    state_dict = _plain(torch.optim.Optimizer.state_dict)
    zero_grad = _plain(torch.optim.Optimizer.zero_grad)


class AdamW(Optimizer, torch.optim.AdamW):
    """AdamW, as torch's."""

    step = torch.no_grad()(_plain(torch.optim.AdamW.step))
