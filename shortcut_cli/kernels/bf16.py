"""Products in bf16 on a CPU, twice as fast where it has instructions for them; all else stays in fp32.

Autocast would run attention in bf16 too, for which torch's fused kernel is slower than in fp32, and sums over depth.
Here a product alone rounds what it multiplies, and returns fp32: norms, softmax, rotary positions, sums over depth and
the residual stream are those of fp32, and so are weights and gradients. A weight is rounded once in each forward pass;
kept in bf16 beside the fp32 weights, it would be rounded as often, after each step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 128  # queries whose scores are computed at once
MOST_TIMES = 1024  # up to which attention keeps its weights for the backward pass, 2 bytes for each visible pair


class _Products:
    wanted = False  # not a context variable, which torch.compile can't read


@contextmanager
def products(wanted: bool = True) -> Iterator[None]:
    """In this block, `linear` and causal attention on a CPU multiply in bf16."""
    before, _Products.wanted = _Products.wanted, wanted
    try:
        yield
    finally:
        _Products.wanted = before


def active() -> bool:
    """Whether this is in such a block."""
    return _Products.wanted


def native() -> bool:
    """Whether this CPU has instructions for it; others compute it by those of fp32, and more slowly."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def wanted(x: Tensor) -> bool:
    """Whether to multiply x in bf16."""
    return _Products.wanted and x.device.type == "cpu"


def product(x: Tensor, weight: Tensor, narrow: bool) -> Tensor:
    """F.linear(x, weight) in bf16: x (..., in), weight (out, in) -> (..., out), fp32, or bf16 if `narrow`."""
    if torch.compiler.is_compiling():
        return plain_product(x, weight, narrow)
    y: Tensor = _Product.apply(x, weight, narrow)
    return y


def plain_product(x: Tensor, weight: Tensor, narrow: bool) -> Tensor:
    """The same by torch's own product."""
    y = F.linear(x.bfloat16(), weight.bfloat16())
    return y if narrow else y.float()


class _Product(torch.autograd.Function):
    """Backward multiplies in bf16 too; autograd would keep what it multiplies in fp32 as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, narrow: bool) -> Tensor:
        flat, rounded = x.reshape(-1, x.shape[-1]).bfloat16(), weight.bfloat16()
        ctx.save_for_backward(flat, rounded)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, weight.dtype)
        y = (flat @ rounded.t()).view(*x.shape[:-1], -1)
        return y if narrow else y.float()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        flat, rounded = ctx.saved_tensors
        of_x, of_weight = ctx.dtypes
        grad = grad.reshape(-1, grad.shape[-1]).bfloat16()
        by_x = (grad @ rounded).view(ctx.shape).to(of_x) if ctx.needs_input_grad[0] else None
        by_weight = (grad.t() @ flat).to(of_weight) if ctx.needs_input_grad[1] else None
        return by_x, by_weight, None


def can_attend(q: Tensor) -> bool:
    """Whether `attend` is the kernel for whole windows of these queries (B, H, T, d)."""
    return wanted(q) and q.shape[2] <= MOST_TIMES and not torch.compiler.is_compiling()


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention: q (B, H, T, d); k, v (B, H, T M, d), M keys for each time, time-major.

    Returns the output (B, H, T, d) and the weights of the M sources, fp32 (B, H, M, T), which carry no gradient.
    Queries, keys, values, scores and weights are rounded to bf16; the softmax is computed in fp32.
    """
    y, weights = _Attend.apply(q, k, v)
    return y, weights


class _Attend(torch.autograd.Function):
    """A block of queries against all keys that one of them sees: faster than torch's fused kernel in bf16 or fp32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        (*batch, times, width), sources = q.shape, k.shape[2] // q.shape[2]
        ctx.shapes, ctx.scale = (q.shape, k.shape), width**-0.5
        q, k, v = (x.bfloat16().reshape(-1, *x.shape[2:]) for x in (q * ctx.scale, k, v))
        hidden = torch.full((BLOCK, BLOCK), -torch.inf, dtype=q.dtype).triu(1).repeat_interleave(sources, 1)
        out, by_source, shares = torch.empty_like(q), [], []
        for first in range(0, times, BLOCK):
            end = min(first + BLOCK, times)
            scores = torch.bmm(q[:, first:end], k[:, : end * sources].mT)
            scores[:, :, first * sources :].add_(hidden[: end - first, : (end - first) * sources])
            shares.append(scores.softmax(-1))
            out[:, first:end] = torch.bmm(shares[-1], v[:, : end * sources])
            by_source.append(_by_source(shares[-1], sources))
        ctx.save_for_backward(q, k, v, *shares)
        weights = torch.cat(by_source, 1).view(*batch, times, sources).transpose(2, 3)
        ctx.mark_non_differentiable(weights)
        return out.view(ctx.shapes[0]).float(), weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *shares = ctx.saved_tensors
        grad = grad.bfloat16().reshape(q.shape)
        grad_q = torch.empty_like(q)
        grad_k, grad_v = (torch.zeros(k.shape) for _ in range(2))  # fp32: sums over the blocks
        for number, share in enumerate(shares):
            rows, keys = slice(number * BLOCK, number * BLOCK + share.shape[1]), slice(share.shape[2])
            by_share = torch.bmm(grad[:, rows], v[:, keys].mT)
            by_score = torch._softmax_backward_data(by_share, share, -1, share.dtype)
            grad_q[:, rows] = torch.bmm(by_score, k[:, keys])
            grad_k[:, keys] += torch.bmm(by_score.mT, q[:, rows])
            grad_v[:, keys] += torch.bmm(share.mT, grad[:, rows])
        of_q, of_k = ctx.shapes
        return grad_q.view(of_q).float().mul_(ctx.scale), grad_k.view(of_k), grad_v.view(of_k)


def _by_source(shares: Tensor, sources: int) -> Tensor:
    """The sum of attention weights (N, T, S M) over times, fp32 (N, T, M)."""
    if sources == 1:
        return shares.new_ones((*shares.shape[:2], 1), dtype=torch.float32)
    summed: Tensor = shares.unflatten(-1, (-1, sources)).sum(2, dtype=torch.float32)
    return summed
