"""Reads over depth, at each position for itself: weighted sums of states that lower layers left."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def weighted_sum(weights: Tensor, states: Sequence[Tensor]) -> Tensor:
    """Sum of weights[i] * states[i]: weights (N,), (N, B, T), or (N, B, T, 1); N states (B, T, D) -> (B, T, D).

    Weights are fp32, and so is the sum; nothing is stacked.
    """
    assert len(weights) == len(states), (weights.shape, len(states))
    if weights.dim() == 3:
        weights = weights.unsqueeze(-1)
    total: Tensor = _Sum.apply(weights.float(), *states)
    return total


class _Sum(torch.autograd.Function):
    """One pass over each state forward, and two backward: its gradient, and that of its weight."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *states: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *states)
        total = states[0] * weights[0]
        for weight, state in zip(weights[1:], states[1:], strict=True):
            total.addcmul_(state, weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, *states = ctx.saved_tensors
        grads = [grad * weight if ctx.needs_input_grad[i + 1] else None for i, weight in enumerate(weights)]
        if not ctx.needs_input_grad[0]:
            return None, *grads
        if weights.dim() == 1:
            by_weight = torch.stack([torch.dot(grad.flatten(), state.flatten()) for state in states])
        else:
            by_weight = torch.stack([torch.linalg.vecdot(grad, state).unsqueeze(-1) for state in states])
        return by_weight, *grads


def softmax_read(query: Tensor, sources: Sequence[Tensor], eps: float) -> Tensor:
    """AttnRes (Kimi Team 2026, arXiv 2603.15031): sum of softmax_i(query . RMSNorm(v_i)) v_i over N sources v_i.

    query: (D,), the layer's pseudo-query times the weight of the norm; sources (B, T, D) each -> (B, T, D).
    """
    scores = torch.stack([_score(query, source, eps) for source in sources])  # (N, B, T)
    return weighted_sum(scores.softmax(0), sources)


def _score(query: Tensor, source: Tensor, eps: float) -> Tensor:
    """query . source / rms(source), fp32 (B, T)."""
    wide = source.float()
    mean = torch.linalg.vecdot(wide, wide) / wide.shape[-1]
    return (wide @ query) * torch.rsqrt(mean + eps)
