"""The optimizer: AdamW in parameter groups, Muon for matrices, the rate of each step, and an EMA of the weights."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from shortcut_cli.config.schema import ScheduleConfig, TrainConfig
from shortcut_cli.training import eager, sharded
from shortcut_cli.training.muon import Muon

ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")
MUON_STATE = ("momentum",)
FIRST_MOMENTUM = 0.85  # of Muon, before its warm-up (Jordan et al. 2024, modded-nanogpt)
OF_THE_STEP = {"lr", "momentum"}  # settings that `Optimizer.step` sets anew


def adamw(
    model: nn.Module,
    config: ScheduleConfig,
    routers: Sequence[str] = (),
    router_lr: float = 1.0,
    others: Collection[str] = (),
    decays: Mapping[str, bool] | None = None,
    rates: Mapping[str, float] | None = None,
) -> eager.AdamW:
    """AdamW with weight decay on matrices only, fused (CPU and CUDA support that).

    routers: name endings of parameters that get no weight decay and `router_lr` times the learning rate. others: names
    of parameters that another optimizer updates. decays: by name endings, whether parameters decay that otherwise would
    or would not. rates: by name endings, factors of the learning rate that a parameter would have.
    """
    groups: dict[tuple[bool, float | None], list[nn.Parameter]] = {(True, None): [], (False, None): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in others:
            routes = name.endswith(tuple(routers))
            decay = _of_ending(decays or {}, name, parameter.dim() >= 2 and not routes)
            scale = _of_ending(rates or {}, name, 1.0) * (router_lr if routes else 1.0)
            groups.setdefault((decay, scale if routes or scale != 1 else None), []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": config.weight_decay if decay else 0.0}
        | ({} if scale is None else {"scale": scale})
        for (decay, scale), parameters in groups.items()
    ]
    return eager.AdamW(settings, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


Value = TypeVar("Value")


def _of_ending(values: Mapping[str, Value], name: str, default: Value) -> Value:
    """The value of the ending that `name` has."""
    return next((value for ending, value in values.items() if name.endswith(ending)), default)


def muon(model: nn.Module, config: TrainConfig, matrices: Mapping[str, int]) -> Muon:
    """Muon for `matrices`: how many matrices, one below the other, each weight of these names holds."""
    groups: dict[tuple[int, ...], dict[str, Any]] = {}
    for name, parts in matrices.items():
        weight = model.get_parameter(name)
        group = groups.setdefault((parts, *weight.shape), {"params": [], "parts": parts, "scale": config.matrix_lr})
        group["params"].append(weight)
    return Muon(list(groups.values()), config.lr * config.matrix_lr, config.momentum, config.weight_decay)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group to `rate` times the group's scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("scale", 1.0)


def momentum(step: int, config: TrainConfig) -> float:
    """Muon's momentum at step `step`, counted from 0: it rises linearly, from `FIRST_MOMENTUM` or less."""
    if step >= config.momentum_warmup:
        return config.momentum
    first = min(FIRST_MOMENTUM, config.momentum)
    return first + (config.momentum - first) * step / config.momentum_warmup


def learning_rate(step: int, config: ScheduleConfig) -> float:
    """Learning rate of step `step`, counted from 0: linear warm-up, then the schedule down to min_lr * lr."""
    if config.schedule_steps:  # the rate at its end holds from there on
        step = min(step, config.schedule_steps - 1)
        config = config.model_copy(update={"steps": config.schedule_steps, "schedule_steps": 0})
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    floor = config.min_lr
    progress = (step - config.warmup) / max(1, config.steps - 1 - config.warmup)  # 0 .. 1
    if config.schedule == "cosine":
        return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    if config.schedule == "wsd":
        # Warmup-stable-decay (Hu et al. 2024, arXiv 2404.06395), linear over the last `decay` of all steps (Hagele et
        # al. 2024, arXiv 2405.18392), but not from before the end of the warm-up, where the rate would jump.
        falling = min(round(config.decay * config.steps), config.steps - config.warmup)
        left = (config.steps - 1 - step) / max(1, falling)
        return config.lr * (floor + (1 - floor) * min(1.0, left))
    return config.lr


def restore(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], names: Collection[str] = ADAMW_STATE) -> None:
    """Load what `state_dict` of an equal optimizer returned; names: of the parts of each parameter's state.

    Raises ValueError if it is of another one. (PyTorch would take any settings, and states of any shape.)
    """
    for own, kept in zip(optimizer.state_dict()["param_groups"], saved["param_groups"], strict=True):
        different = sorted(name for name in own.keys() & kept.keys() - OF_THE_STEP if own[name] != kept[name])
        if different:
            raise ValueError(f"the optimizer has another {different[0]}")
    optimizer.load_state_dict(dict(saved))
    for parameter, state in optimizer.state.items():
        if state.keys() != set(names):
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
        weights = model.state_dict()
        torch._foreach_lerp_(list(self.weights.values()), [weights[name].float() for name in self.weights], 1 - decay)


class Optimizer:
    """AdamW, and Muon if asked, with gradient clipping, a schedule and, if `config.ema` is set, an EMA of weights."""

    def __init__(
        self,
        model: nn.Module,
        config: ScheduleConfig,
        routers: Sequence[str] = (),
        router_lr: float = 1.0,
        matrices: Mapping[str, int] | None = None,
        decays: Mapping[str, bool] | None = None,
        rates: Mapping[str, float] | None = None,
    ) -> None:
        """matrices: those for Muon, as in `muon`; if there are any, the config is a TrainConfig. The rest: `adamw`."""
        self.model, self.config = model, config
        self.adamw = adamw(model, config, routers, router_lr, matrices or {}, decays, rates)
        self.muon = muon(model, config, matrices) if matrices and isinstance(config, TrainConfig) else None
        self.ema = EMA(model, config.ema) if config.ema else None

    def clip(self) -> Tensor:
        """Clip the gradient to norm `config.clip` (0: no limit); returns its norm before clipping, on the device."""
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        return sharded.assembled(sharded.local(norm), norm)

    def step(self, number: int) -> None:
        """Update the weights and the EMA at step `number`, counted from 0, and clear the gradient."""
        rate = learning_rate(number, self.config)
        if self.muon and isinstance(self.config, TrainConfig):
            for group in self.muon.param_groups:
                group["momentum"] = momentum(number, self.config)
        for optimizer in filter(None, (self.adamw, self.muon)):
            set_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update(self.model, number)

    def weights(self) -> dict[str, Tensor]:
        """The weights to validate and to keep: the EMA's, or the model's own if there is no EMA."""
        return self.ema.weights if self.ema else self.model.state_dict()

    def allocate(self) -> None:
        """Make room for the state that a step leaves, to be read into: all zeros."""
        for optimizer, names in ((self.adamw, ADAMW_STATE), (self.muon, MUON_STATE)):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]] if optimizer else []
            for weight in weights:
                assert optimizer
                optimizer.state[weight] = {
                    name: torch.zeros((), device=weight.device) if name == "step" else torch.zeros_like(weight)
                    for name in names
                }

    def state(self) -> dict[str, Any]:
        """The part of resume.pt that `load_state` restores."""
        state = {"optimizer": self.adamw.state_dict(), "average": self.ema.weights if self.ema else None}
        return state | ({"muon": self.muon.state_dict()} if self.muon else {})

    def load_state(self, content: Mapping[str, Any], device: str) -> None:
        """Restore what `state` returned, the EMA on `device`. Raises ValueError if it is of another model."""
        restore(self.adamw, content["optimizer"])
        if self.muon:
            restore(self.muon, content["muon"], MUON_STATE)
        if self.ema:
            found = {name: weight.to(device) for name, weight in content["average"].items()}
            own = self.ema.weights
            if {name: weight.shape for name, weight in found.items()} != {name: w.shape for name, w in own.items()}:
                raise ValueError("the averaged weights are of another model")
            self.ema.weights = found
