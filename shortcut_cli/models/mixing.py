"""Reads over depth, at each position for itself: weighted sums of states that lower layers left.

On a CPU such reads take the time of passing over memory, not of arithmetic. `States` keeps the states of a token side
by side, so that a read is one small matrix product a token, and adds up the gradient of a state once, over all reads,
where autograd would do so after each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shortcut_cli.models.blocks import on_cpu


def weighted_sum(weights: Tensor, states: Sequence[Tensor]) -> Tensor:
    """Sum of weights[i] * states[i]: weights (N,), (N, B, T), or (N, B, T, 1); N states (B, T, D) -> (B, T, D).

    Weights are fp32, and so is the sum; nothing is stacked.
    """
    assert len(weights) == len(states), (weights.shape, len(states))
    if weights.dim() == 3:
        weights = weights.unsqueeze(-1)
    if torch.compiler.is_compiling():
        total = states[0] * weights[0]
        for weight, state in zip(weights[1:], states[1:], strict=True):
            total = total + state * weight
        return total
    summed: Tensor = _Sum.apply(weights.float(), *states)
    return summed


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
            same = (state.type_as(grad) for state in states)  # under autocast they are narrower
            by_weight = torch.stack([torch.linalg.vecdot(grad, state).unsqueeze(-1) for state in same])
        return by_weight, *grads


class States:
    """What lower layers left, (B, T, D) each, and reads over all of it; `most` rows at most, reads of `streams` in all.

    A model takes back what `put` returns, and goes on with that.
    """

    def __init__(self, most: int, streams: int, like: Tensor) -> None:
        self.rows: list[Tensor] = []
        self.handles: list[Tensor] = []  # tie a read to the rows below it in autograd's graph
        self.spans: list[_Span] = []
        buffered = on_cpu(like) and like.dtype != torch.bfloat16
        self.store = _Store(most, streams, like) if buffered else None

    def put(self, x: Tensor) -> Tensor:
        """Another state."""
        self.rows.append(x)
        return x if self.store is None else self._keep(self.store, None)

    def replace(self, x: Tensor) -> Tensor:
        """Another state instead of the last one."""
        before, self.rows[-1] = self.rows[-1], x
        if self.store is None:
            return x
        self.spans.pop().end = self.store.read
        self.handles.pop()
        return self._keep(self.store, before)

    def _keep(self, store: "_Store", before: Tensor | None) -> Tensor:
        row = len(self.rows) - 1
        self.spans.append(_Span(row, store.read))
        self.rows[row], handle = _Put.apply(self.rows[row], before, store, self.spans[-1])
        self.handles.append(handle)
        return self.rows[row]

    def mix(self, weights: Tensor) -> list[Tensor]:
        """C sums over the n states there are: weights (B, T, C, n) -> (B, T, D) each."""
        assert weights.shape[-1] == len(self.rows), (weights.shape, len(self.rows))
        if self.store is None:
            return [weighted_sum(weight, self.rows) for weight in weights.permute(2, 3, 0, 1)]
        y: Tensor = _Mix.apply(weights, self.store, *self.handles)
        self.store.read += weights.shape[2]
        return list(y.unbind(2))


class _Store:
    """The memory of States, of which no tensor leads into autograd's graph, since that leads here."""

    def __init__(self, most: int, streams: int, like: Tensor) -> None:
        batch, times, width = like.shape
        self.states = like.new_empty((batch * times, most, width))
        self.streams, self.read = streams, 0  # rows of gradient in all, and those of the reads so far
        self.grads: Tensor | None = None  # (B T, streams, D)
        self.weights: dict[int, Tensor] = {}  # (B T, C, n) of each read by its first row of gradient, from backward on


@dataclass
class _Span:
    """The reads that a state is in."""

    row: int
    start: int
    end: int | None = None  # None: all that follow


class _Put(torch.autograd.Function):
    """Copies a state to its row; backward sums its gradient over all reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Tensor | None, store: _Store, span: _Span) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.store, ctx.span = store, span
        ctx.save_for_backward(before)
        ctx.shape = x.shape
        store.states[:, span.row] = x.flatten(0, 1)
        return x, x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        store, span = ctx.store, ctx.span
        (before,) = ctx.saved_tensors
        end = store.read if span.end is None else span.end
        weights = [
            weight[:, :, span.row] for first, weight in sorted(store.weights.items()) if span.start <= first < end
        ]
        if before is not None:
            store.states[:, span.row] = before.flatten(0, 1)
        if not weights:
            return grad, None, None, None
        assert sum(weight.shape[1] for weight in weights) == end - span.start, "a read that led nowhere"
        joined = torch.cat(weights, 1).unsqueeze(1)  # (B T, 1, K)
        total = _product(joined, store.grads[:, span.start : end]).view(ctx.shape)
        return total if grad is None else total.add_(grad), None, None, None


class _Mix(torch.autograd.Function):
    """One small matrix product a token; backward gives the gradient of the weights, and leaves that of the states."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, store: _Store, *handles: Tensor) -> Tensor:
        del handles
        flat = weights.detach().flatten(0, 1).to(store.states.dtype)  # (B T, C, n)
        ctx.store, ctx.first = store, store.read
        ctx.save_for_backward(flat)
        return _product(flat, store.states[:, : flat.shape[2]]).view(*weights.shape[:3], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        store = ctx.store
        (weights,) = ctx.saved_tensors  # (B T, C, n)
        tokens, streams, count = weights.shape
        flat = grad.reshape(tokens, streams, -1)
        if store.grads is None:
            store.grads = flat.new_empty((tokens, store.streams, flat.shape[2]))
        store.grads[:, ctx.first : ctx.first + streams] = flat
        store.weights[ctx.first] = weights
        by_weight = torch.bmm(flat, store.states[:, :count].transpose(1, 2))
        return by_weight.view(*grad.shape[:2], streams, count), None, *(None,) * count


def _product(weights: Tensor, rows: Tensor) -> Tensor:
    """(N, C, n) by (N, n, D); with one row torch's batched product takes eight times as long as its multiplication."""
    return weights.transpose(1, 2) * rows if weights.shape[1:] == (1, 1) else torch.bmm(weights, rows)


def depth_scores(x: Tensor, queries: Tensor, eps: float) -> Tensor:
    """queries . RMSNorm(x), the norm without weights: x (B, T, D), queries (L, D) -> (B, T, L), fp32."""
    return fork_scores(x, queries, eps)[1]


def fork_scores(x: Tensor, queries: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x itself, and its `depth_scores`. The gradient of that x is added to where it lies: nothing else may need it."""
    if not on_cpu(x) or x.dtype == torch.bfloat16:
        wide = x.float()
        return x, (wide @ queries.t()) * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    x, scores = _Scores.apply(x, queries, eps)
    return x, scores


class _Scores(torch.autograd.Function):
    """With s = r q . x and r = 1 / rms(x), ds / dx = r q - s r^2 x / D."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, queries: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        scores = (x @ queries.t()).mul_(scale)
        ctx.save_for_backward(x, queries, scale, scores)
        return x, scores

    @staticmethod
    def backward(ctx: Any, stream: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return stream, None, None
        x, queries, scale, scores = ctx.saved_tensors
        slope = grad * scale  # (B, T, L)
        own = torch.linalg.vecdot(slope, scores).unsqueeze(-1).mul_(scale).div_(-x.shape[-1])
        flat = slope.flatten(0, -2)
        if stream is None:
            stream = slope @ queries
        else:
            stream.view(-1, stream.shape[-1]).addmm_(flat, queries)
        return stream.addcmul_(x, own), flat.t() @ x.flatten(0, -2), None


def fork_read(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, T, n, D) itself, and its sum over n by weights (B, T, n); the gradient of that x as in `fork_scores`."""
    if not on_cpu(x) or x.dtype == torch.bfloat16:
        return x, (weights.unsqueeze(-2) @ x).squeeze(-2).type_as(x)
    x, read = _Read.apply(x, weights)
    return x, read


class _Read(torch.autograd.Function):
    """One row by n a token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weights)
        return x, (weights.unsqueeze(-2) @ x).squeeze(-2)

    @staticmethod
    def backward(ctx: Any, stream: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return stream, None
        x, weights = ctx.saved_tensors
        by_weight = (grad.unsqueeze(-2) @ x.mT).squeeze(-2)
        rows, columns = grad.unsqueeze(-2), weights.unsqueeze(-1)
        return rows * columns if stream is None else stream.addcmul_(rows, columns), by_weight
