"""The optimizer: AdamW in parameter groups, the learning rate of each step, and an EMA of the weights."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shortcut_cli.config.schema import ScheduleConfig


def adamw(
    model: nn.Module, config: ScheduleConfig, routers: Sequence[str] = (), router_lr: float = 1.0
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, fused (CPU and CUDA support that).

    routers: name endings of parameters that get no weight decay and `router_lr` times the learning rate.
    """
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "rest": [], "routers": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "routers" if name.endswith(tuple(routers)) else "matrices" if parameter.dim() >= 2 else "rest"
            groups[kind].append(parameter)
    settings = [
        {"params": groups["matrices"], "weight_decay": config.weight_decay},
        {"params": groups["rest"], "weight_decay": 0.0},
    ]
    if groups["routers"]:
        settings.append({"params": groups["routers"], "weight_decay": 0.0, "scale": router_lr})
    return torch.optim.AdamW(settings, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group to `rate` times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def learning_rate(step: int, config: ScheduleConfig) -> float:
    """Learning rate of step `step`, counted from 0: linear warm-up, then the schedule down to min_lr * lr."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    floor = config.min_lr
    progress = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)  # 0 .. 1
    if config.schedule == "cosine":
        return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    if config.schedule == "wsd":
        # Warmup-stable-decay: linear over the last `decay` of all steps (Hu et al. 2024, arXiv 2404.06395).
        left = (config.steps - 1 - step) / max(1, round(config.decay * config.steps))
        return config.lr * (floor + (1 - floor) * min(1.0, left))
    return config.lr


def restore(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Load what `state_dict` of an equal Adam or AdamW returned.

    Raises ValueError if it is of another one. (PyTorch would take any settings, and states of any shape.)
    """
    for own, kept in zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True):
        different = sorted(name for name in own.keys() & kept.keys() - {"lr"} if own[name] != kept[name])
        if different:
            raise ValueError(f"the optimizer has another {different[0]}")
    optimizer.load_state_dict(dict(saved))
    for parameter, state in optimizer.state.items():
        if state.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError("the optimizer lacks a part of its state")
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.shape not in (parameter.shape, torch.Size(())):
                raise ValueError(f"the optimizer's {name} has another shape than its parameter")


class EMA:
    """An exponential moving average of a model's weights, fp32, by name."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {
            name: weight.detach().clone().float() for name, weight in model.state_dict().items()
        }

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the weights that the model has after step `step`, counted from 0.

        The decay is smaller during the first steps, so that the initial weights are soon forgotten.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in model.state_dict().items():
            self.weights[name].lerp_(weight.float(), 1 - decay)


class Optimizer:
    """AdamW with gradient clipping, a learning-rate schedule and, if `config.ema` is set, an EMA of the weights."""

    def __init__(
        self, model: nn.Module, config: ScheduleConfig, routers: Sequence[str] = (), router_lr: float = 1.0
    ) -> None:
        self.model, self.config = model, config
        self.adamw = adamw(model, config, routers, router_lr)
        self.ema = EMA(model, config.ema) if config.ema else None

    def clip(self) -> float:
        """Clip the gradient to norm `config.clip` (0: no limit); returns its norm before clipping."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf).item()

    def step(self, number: int) -> None:
        """Update the weights and the EMA at step `number`, counted from 0, and clear the gradient."""
        set_rate(self.adamw, learning_rate(number, self.config))
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.model, number)

    def weights(self) -> dict[str, Tensor]:
        """The weights to validate and to keep: the EMA's, or the model's own if there is no EMA."""
        return self.ema.weights if self.ema else self.model.state_dict()

    def state(self) -> dict[str, Any]:
        """The part of resume.pt that `load_state` restores."""
        return {"optimizer": self.adamw.state_dict(), "average": self.ema.weights if self.ema else None}

    def load_state(self, content: Mapping[str, Any], device: str) -> None:
        """Restore what `state` returned, the EMA on `device`. Raises ValueError if it is of another model."""
        restore(self.adamw, content["optimizer"])
        if self.ema:
            found = {name: weight.to(device) for name, weight in content["average"].items()}
            own = self.ema.weights
            if {name: weight.shape for name, weight in found.items()} != {name: w.shape for name, w in own.items()}:
                raise ValueError("the averaged weights are of another model")
            self.ema.weights = found
