"""Rotary positions (Su et al. 2021): pairs of channels are turned by an angle that grows with time."""

from typing import Any

import torch
from torch import Tensor


def rope_freqs(context: int, head_width: int, base: float) -> Tensor:
    """Cosine and sine of t base^(-2k/d) for time t and pair k (eq. 34), fp32 (context, head_width / 2, 2).

    In eager mode they are read as complex numbers. torch.compile has no kernels for those, not even to slice them.
    """
    if torch.get_default_device().type == "meta":  # only the shape; numbers would import torch's compiler, 2 s
        return torch.empty(context, head_width // 2, 2)
    frequencies = base ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.outer(torch.arange(context, dtype=torch.float64), frequencies)
    return torch.stack((angles.cos(), angles.sin()), -1).float()


def rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """Turn neighbouring pairs of channels by the angles of their time: x (B, T, ..., d), freqs (T, d / 2, 2)."""
    # Only torch.compile decides: it has no kernels for complex numbers. Elsewhere the turn is in fp32 on all devices,
    # under autocast too.
    if torch.compiler.is_compiling():
        return plain_rotate(x, freqs)
    return torch.view_as_real(_pairs(x) * _over_heads(x, torch.view_as_complex(freqs))).flatten(-2).type_as(x)


def plain_rotate(x: Tensor, freqs: Tensor) -> Tensor:
    """The same in real numbers."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (_over_heads(x, part) for part in freqs.unbind(-1))
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(x)


def _over_heads(x: Tensor, freqs: Tensor) -> Tensor:
    """freqs (T, d / 2) in a shape that broadcasts over x (B, T, ..., d)."""
    return freqs.reshape(-1, *(1,) * (x.dim() - 3), freqs.shape[-1])


def _pairs(x: Tensor) -> Tensor:
    """(..., d) as complex64 (..., d / 2); the same memory if x is fp32 and its channels are contiguous."""
    x = x.float()
    return torch.view_as_complex((x if x.stride(-1) == 1 else x.contiguous()).unflatten(-1, (-1, 2)))


def qkv_heads(qkv: Tensor, freqs: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """One projection (B, T, 3 D) -> queries, keys (both turned) and values, (B, H, T, d) each; freqs (T, d / 2, 2)."""
    if torch.compiler.is_compiling():  # as in `rotate`
        return plain_qkv_heads(qkv, freqs, heads)
    turns = torch.view_as_complex(freqs)
    if not torch.is_grad_enabled():
        return _turned(qkv, turns, heads)
    q, k, v = _Heads.apply(qkv, turns, heads)
    return q, k, v


def plain_qkv_heads(qkv: Tensor, freqs: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same, each of the three for itself."""
    q, k, v = (y.unflatten(-1, (heads, -1)) for y in qkv.chunk(3, -1))  # (B, T, H, d)
    return plain_rotate(q, freqs).transpose(1, 2), plain_rotate(k, freqs).transpose(1, 2), v.transpose(1, 2)


def _turned(qkv: Tensor, turns: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys are written head by head, the layout that attention reads fastest."""
    batch, times = qkv.shape[:2]
    shape = (batch, times, 3, heads, -1)
    pairs = torch.view_as_complex(qkv.float().view(*shape, 2)[..., :2, :, :, :]).permute(2, 0, 3, 1, 4)
    turned = pairs.new_empty(pairs.shape)  # (2, B, H, T, d / 2)
    torch.mul(pairs, turns, out=turned)
    q, k = torch.view_as_real(turned).flatten(-2).type_as(qkv).unbind()
    return q, k, qkv.view(shape)[:, :, 2].transpose(1, 2)


class _Heads(torch.autograd.Function):
    """Backward turns back, and writes all three gradients into one tensor, that of the projection."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, turns: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(turns)
        return _turned(qkv, turns, heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        heads = grads[0].shape[1]
        q, k, v = (grad.transpose(1, 2).flatten(-2) for grad in grads)  # (B, T, D)
        back = ctx.saved_tensors[0].conj().repeat(1, heads)  # one long row per time is faster than a short one per head
        grad = q.new_empty(*q.shape[:2], 3, q.shape[-1], dtype=torch.float32)
        torch.mul(_pairs(q), back, out=_pairs(grad[:, :, 0]))
        torch.mul(_pairs(k), back, out=_pairs(grad[:, :, 1]))
        grad[:, :, 2] = v
        return grad.flatten(2).type_as(q), None, None
