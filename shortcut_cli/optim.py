"""AdamW in two groups, and the learning rate of each step."""

import math
from collections.abc import Sequence

import torch

from shortcut_cli.recipe import ScheduleKeys


def adamw(
    model: torch.nn.Module, keys: ScheduleKeys, routers: Sequence[str] = (), router_lr: float = 1.0
) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone, fused where the device has it (CPU and CUDA do).

    routers: parameters, by the end of their names, that get no weight decay and `router_lr` times the learning rate.
    """
    groups: dict[str, list[torch.nn.Parameter]] = {"matrices": [], "rest": [], "routers": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "routers" if name.endswith(tuple(routers)) else "matrices" if parameter.dim() >= 2 else "rest"
            groups[kind].append(parameter)
    settings = [
        {"params": groups["matrices"], "weight_decay": keys.weight_decay},
        {"params": groups["rest"], "weight_decay": 0.0},
    ]
    if groups["routers"]:
        settings.append({"params": groups["routers"], "weight_decay": 0.0, "scale": router_lr})
    return torch.optim.AdamW(settings, lr=keys.lr, betas=(keys.beta1, keys.beta2), fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def learning_rate(step: int, keys: ScheduleKeys) -> float:
    """Learning rate of step `step`, counted from 0: linear warm-up, then the schedule down to min_lr * lr."""
    if step < keys.warmup:
        return keys.lr * (step + 1) / keys.warmup
    floor = keys.min_lr
    progress = (step - keys.warmup) / max(1, keys.steps - 1 - keys.warmup)  # 0 .. 1
    if keys.schedule == "cosine":
        return keys.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    if keys.schedule == "wsd":
        # Stable, then linear over the last `decay` of all steps (Hu et al. 2024, arXiv 2404.06395).
        left = (keys.steps - 1 - step) / max(1, round(keys.decay * keys.steps))
        return keys.lr * (floor + (1 - floor) * min(1.0, left))
    return keys.lr


class Average:
    """An exponential moving average of a model's weights, fp32, by name."""

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: weight.detach().clone().float() for name, weight in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        """Move the average towards the weights that the model has after step `step`, counted from 0.

        The first steps count for less than `decay` would have them do, so that the initial weights are soon forgotten.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in model.state_dict().items():
            self.weights[name].lerp_(weight.float(), 1 - decay)
