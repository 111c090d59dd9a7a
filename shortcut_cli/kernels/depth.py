"""Reads over depth, at each position for itself: weighted sums of the states that lower layers left.

On a CPU such a read takes the time of its passes over memory, not of its arithmetic. `States` keeps the states of a
token side by side, so that a read is one small matrix product per token. It sums the gradient of a state once, over
all reads; autograd would add to it after each.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shortcut_cli.kernels.cpu import EPSILON, on_cpu_above_bf16


def weighted_sum(weights: Tensor, states: Sequence[Tensor]) -> Tensor:
    """Sum of weights[i] * states[i]: weights (N,), (N, B, T), or (N, B, T, 1); N states (B, T, D) -> (B, T, D).

    Weights are fp32, and so is the sum; nothing is stacked.
    """
    assert len(weights) == len(states), (weights.shape, len(states))
    # Only torch.compile decides, which fuses the plain version itself: elementwise products and sums run on all
    # devices, and autocast leaves them alone.
    if torch.compiler.is_compiling():
        return plain_weighted_sum(weights, states)
    summed: Tensor = _WeightedSum.apply(_columns(weights).float(), *states)
    return summed


def plain_weighted_sum(weights: Tensor, states: Sequence[Tensor]) -> Tensor:
    """The same by torch's own products and sums."""
    first, *others = _columns(weights)
    total: Tensor = states[0] * first
    for weight, state in zip(others, states[1:], strict=True):
        total = total + state * weight
    return total


def _columns(weights: Tensor) -> Tensor:
    """Weights in a shape that broadcasts over a state: (N,) or (N, B, T, 1)."""
    return weights.unsqueeze(-1) if weights.dim() == 3 else weights


class _WeightedSum(torch.autograd.Function):
    """One pass over each state forward, and two backward: for its gradient, and for that of its weight."""

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
    """What lower layers left, (B, T, D) each, and reads over all of it.

    most: rows at most. streams: sums that all reads together make. A model continues with what `put` and `replace`
    return, not with what it gave them. Without a buffer (`store` is None) the reads are plain weighted sums.

    With a buffer, a read takes no rows as inputs but a handle of each, an empty tensor from `put`, so that autograd
    knows what the read depends on. All _Mix.backward of the reads of a row therefore run before the row's
    _Put.backward. Each stores its gradient and its weights; then _Put.backward sums the gradient of its row over the
    reads in its range, in one product. After `replace` the buffer holds the new row. Its _Put.backward, which follows
    the reads of the new row, restores the old one: the reads before `replace`, from which the new row was made and
    whose backward therefore comes later, need it for the gradients of their weights.
    """

    def __init__(self, most: int, streams: int, like: Tensor) -> None:
        self.rows: list[Tensor] = []
        self.handles: list[Tensor] = []  # tie a read to the rows below it in autograd's graph
        self.ranges: list[_ReadRange] = []
        self.store = _Store(most, streams, like) if on_cpu_above_bf16(like) else None

    def put(self, x: Tensor) -> Tensor:
        """Add a state."""
        self.rows.append(x)
        return x if self.store is None else self._keep(self.store, None)

    def replace(self, x: Tensor) -> Tensor:
        """Put a state in the place of the last one; earlier reads keep what they read."""
        before, self.rows[-1] = self.rows[-1], x
        if self.store is None:
            return x
        self.ranges.pop().end = self.store.reads_so_far
        self.handles.pop()
        return self._keep(self.store, before)

    def _keep(self, store: "_Store", before: Tensor | None) -> Tensor:
        row = len(self.rows) - 1
        self.ranges.append(_ReadRange(row, store.reads_so_far))
        self.rows[row], handle = _Put.apply(self.rows[row], before, store, self.ranges[-1])
        self.handles.append(handle)
        return self.rows[row]

    def mix(self, weights: Tensor) -> list[Tensor]:
        """C sums over the n states so far: weights (B, T, C, n) -> C times (B, T, D)."""
        assert weights.shape[-1] == len(self.rows), (weights.shape, len(self.rows))
        if self.store is None:
            return [weighted_sum(weight, self.rows) for weight in weights.permute(2, 3, 0, 1)]
        y: Tensor = _Mix.apply(weights, self.store, *self.handles)
        self.store.reads_so_far += weights.shape[2]
        return list(y.unbind(2))


class _Store:
    """The memory of States. Autograd's graph leads here, so that no tensor here may lead back into the graph."""

    def __init__(self, most: int, streams: int, like: Tensor) -> None:
        batch, times, width = like.shape
        self.states = like.new_empty((batch * times, most, width))
        self.streams, self.reads_so_far = streams, 0  # rows of gradient in all, and those of the reads so far
        self.grads: Tensor | None = None  # (B T, streams, D)
        self.weights: dict[int, Tensor] = {}  # in backward: of each read, by its first row of gradient, (B T, C, n)


@dataclass
class _ReadRange:
    """The reads that a state is in, by their rows of gradient."""

    row: int
    start: int
    end: int | None = None  # None: all that follow


class _Put(torch.autograd.Function):
    """Copies a state to its row; backward sums its gradient over all reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Tensor | None, store: _Store, reads: _ReadRange) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.store, ctx.reads = store, reads
        ctx.save_for_backward(before)
        ctx.shape = x.shape
        store.states[:, reads.row] = x.flatten(0, 1)
        return x, x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        store, reads = ctx.store, ctx.reads
        (before,) = ctx.saved_tensors
        end = store.reads_so_far if reads.end is None else reads.end
        weights = [
            weight[:, :, reads.row] for first, weight in sorted(store.weights.items()) if reads.start <= first < end
        ]
        if before is not None:
            store.states[:, reads.row] = before.flatten(0, 1)
        if not weights:
            return grad, None, None, None
        assert sum(weight.shape[1] for weight in weights) == end - reads.start, "a mix was never used"
        joined = torch.cat(weights, 1).unsqueeze(1)  # (B T, 1, K)
        total = _product(joined, store.grads[:, reads.start : end]).view(ctx.shape)
        return total if grad is None else total.add_(grad), None, None, None


class _Mix(torch.autograd.Function):
    """One small matrix product per token; backward returns the weights' gradient and stores that of the states."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, store: _Store, *handles: Tensor) -> Tensor:
        del handles
        flat = weights.detach().flatten(0, 1).to(store.states.dtype)  # (B T, C, n)
        ctx.store, ctx.first = store, store.reads_so_far
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


def unrounded(x: Tensor) -> AbstractContextManager[None] | torch.autocast:
    """A context in which products on the device of x are not in bf16 by autocast: what weighs states is in fp32."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _product(weights: Tensor, rows: Tensor) -> Tensor:
    """(N, C, n) by (N, n, D); of one row by one, torch's batched product is far slower than a multiplication."""
    return weights.transpose(1, 2) * rows if weights.shape[1:] == (1, 1) else torch.bmm(weights, rows)


def fork_scores(x: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, T, D) itself, and queries . RMSNorm(x), the norm without weights: queries (L, D) -> (B, T, L) fp32.

    x gets one gradient for both, added in place to that of the x returned: nothing else may need that one.
    """
    if not on_cpu_above_bf16(x):
        return plain_fork_scores(x, queries)
    x, scores = _ForkScores.apply(x, queries)
    return x, scores


def plain_fork_scores(x: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """The same by its formula, in fp32."""
    wide = x.float()
    with unrounded(x):
        return x, (wide @ queries.t()) * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)


class _ForkScores(torch.autograd.Function):
    """With s = r q . x and r = 1 / rms(x), ds / dx = r q - s r^2 x / D."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().mul_(1 / x.shape[-1]).add_(EPSILON).rsqrt_()
        scores = (x @ queries.t()).mul_(scale)
        ctx.save_for_backward(x, queries, scale, scores)
        return x, scores

    @staticmethod
    def backward(ctx: Any, stream: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return stream, None
        x, queries, scale, scores = ctx.saved_tensors
        slope = grad * scale  # (B, T, L)
        own = torch.linalg.vecdot(slope, scores).unsqueeze(-1).mul_(scale).div_(-x.shape[-1])
        flat = slope.flatten(0, -2)
        if stream is None:
            stream = slope @ queries
        else:
            stream.view(-1, stream.shape[-1]).addmm_(flat, queries)
        return stream.addcmul_(x, own), flat.t() @ x.flatten(0, -2)


def fork_read(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """x (B, T, n, D) itself, and its sum over n by weights (B, T, n); one gradient for both, as in `fork_scores`."""
    if not on_cpu_above_bf16(x):
        return plain_fork_read(x, weights)
    x, read = _ForkRead.apply(x, weights)
    return x, read


def plain_fork_read(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same by torch's own product, in fp32."""
    with unrounded(x):
        return x, (weights.unsqueeze(-2).float() @ x.float()).squeeze(-2).type_as(x)


class _ForkRead(torch.autograd.Function):
    """One row by n per token; backward adds the gradient of the sum to that of x in place."""

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
