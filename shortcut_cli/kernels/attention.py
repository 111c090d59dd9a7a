"""Attention to several sources as one causal attention each, merged by their log-sum-exp.

One softmax over all sources and visible times equals the attention of each source, weighted by exp(lse_m - LSE), where
lse_m is the log of the sum of exp(score) over source m and LSE that over all (Milakov and Gimelshein 2018). The weights
are the share of the attention that each source gets: the depth weights.

Backward: with P = exp(score - LSE) of the merged softmax and D = rowsum(grad * out), both of the merged output, the
gradient of one source needs nothing from the others (the identity behind ring attention, Liu et al. 2023). So each
source's own fused backward is called with the merged output and LSE.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_sources(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of q (B, H, T, d) to M sources: k, v (B, H, T, M, d).

    Returns the output (B, H, T, d) and the weights of the sources, fp32 (B, H, M, T), which carry no gradient. A CPU
    has a fused kernel for it; other devices run the plain version.
    """
    # Only the device decides. The kernel's operations are torch's own: torch.compile calls them as they are, and they
    # take the bf16 of autocast. The plain version would write all scores to memory.
    if q.device.type != "cpu":
        return plain_attend_sources(q, k, v)
    out, weights = _AttendSources.apply(q, k, v)
    return out, weights


def plain_attend_sources(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same by its formula, one softmax over all sources and visible times, with scores (B, H, T, M, T)."""
    times = q.shape[2]
    scores = torch.einsum("bhid,bhjmd->bhimj", q.float(), k.float()) * q.shape[-1] ** -0.5
    hidden = torch.ones(times, times, dtype=torch.bool, device=q.device).triu(1)
    shares = scores.masked_fill(hidden[:, None], -torch.inf).flatten(-2).softmax(-1).view_as(scores)
    out = torch.einsum("bhimj,bhjmd->bhid", shares.type_as(v), v)
    return out, shares.detach().sum(-1).transpose(2, 3)


def distances(q: Tensor, k: Tensor) -> Tensor:
    """How far back in time, in tokens, causal attention reads each source on average, fp32 (B, H, M, T).

    q: (B, H, T, d), k: (B, H, T, M, d). Attention to values that are times gives the mean time of the keys.
    """
    times = torch.arange(q.shape[2], device=q.device, dtype=torch.float32)
    values = times[:, None].expand(q.shape)
    q, k = q.float(), k.float()
    means = [
        F.scaled_dot_product_attention(q, k[:, :, :, m], values, is_causal=True)[..., 0] for m in range(k.shape[3])
    ]
    return times - torch.stack(means, 2)


class _AttendSources(torch.autograd.Function):
    """A fused attention for each source, merged; backward as above."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        parts = [flash(q, k[:, :, :, m], v[:, :, :, m], 0.0, True) for m in range(k.shape[3])]
        sums = torch.stack([lse for _, lse in parts], 2)  # (B, H, M, T)
        total = sums.logsumexp(2)  # (B, H, T)
        weights = (sums - total[:, :, None]).exp()
        out = torch.zeros_like(q, dtype=weights.dtype)
        for m, (part, _) in enumerate(parts):
            out += weights[:, :, m, :, None] * part
        out = out.type_as(q)
        ctx.save_for_backward(q, k, v, out, total)
        ctx.mark_non_differentiable(weights)
        return out, weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, total = ctx.saved_tensors
        grad_q, grads_k, grads_v = torch.zeros_like(q), [], []
        for m in range(k.shape[3]):
            part_q, part_k, part_v = flash_backward(
                grad.contiguous(), q, k[:, :, :, m], v[:, :, :, m], out, total, 0.0, True
            )
            grad_q += part_q
            grads_k.append(part_k)
            grads_v.append(part_v)
        return grad_q, torch.stack(grads_k, 3), torch.stack(grads_v, 3)


def attend_with_depth(q: Tensor, k: Tensor, v: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One softmax over times and depth: the last T of S times see k, v (B, H, S, d) up to themselves, and N more.

    q: (B, H, T, d); keys, values: N times (B, H, T, d), seen only at their own time. Returns (B, H, T, d). A CPU has a
    fused kernel for whole windows, S = T.
    """
    # Only the device and the shape decide, as in `attend_sources`.
    if q.device.type != "cpu" or q.shape[2] != k.shape[2]:
        return plain_attend_with_depth(q, k, v, keys, values)
    out: Tensor = _AttendWithDepth.apply(q, k, v, len(keys), *keys, *values)
    return out


def plain_attend_with_depth(q: Tensor, k: Tensor, v: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """The same by its formula."""
    scale, late = q.shape[-1] ** -0.5, k.shape[2] - q.shape[2]
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(late + 1)
    times = (q.float() @ k.float().mT * scale).masked_fill(hidden, -torch.inf)
    depth = torch.stack([(q.float() * key.float()).sum(-1) for key in keys], -1) * scale  # (B, H, T, N)
    shares = torch.cat((times, depth), -1).softmax(-1).type_as(v)
    out: Tensor = shares[..., : k.shape[2]] @ v
    for number, value in enumerate(values):
        out = out + shares[..., k.shape[2] + number, None] * value
    return out


class _AttendWithDepth(torch.autograd.Function):
    """Fused attention over times, merged with the few depth keys by their log-sum-exps; backward as above."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, count: int, *below: Tensor) -> Tensor:
        keys, values = below[:count], below[count:]
        out, lse = flash(q, k, v, 0.0, True)
        scores = torch.stack([(q * key).sum(-1).float() for key in keys]) * q.shape[-1] ** -0.5  # (N, B, H, T)
        total = torch.logaddexp(lse, scores.logsumexp(0))
        shares = (scores - total).exp()
        y: Tensor = out * (lse - total).exp().unsqueeze(-1)
        for share, value in zip(shares, values, strict=True):
            y.addcmul_(share.unsqueeze(-1), value)
        y = y.type_as(q)
        ctx.save_for_backward(q, k, v, y, total, shares, *below)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, total, shares, *below = ctx.saved_tensors
        keys, values = below[: len(shares)], below[len(shares) :]
        grad_q, grad_k, grad_v = flash_backward(grad.contiguous(), q, k, v, y, total, 0.0, True)
        inner = torch.linalg.vecdot(grad, y)  # (B, H, T)
        grads_k, grads_v = [], []
        for share, key, value in zip(shares, keys, values, strict=True):
            by_score = (share * (torch.linalg.vecdot(grad, value) - inner) * q.shape[-1] ** -0.5).unsqueeze(-1)
            grad_q = torch.addcmul(grad_q, by_score, key)
            grads_k.append(by_score * q)
            grads_v.append(share.unsqueeze(-1) * grad)
        return grad_q, grad_k, grad_v, None, *grads_k, *grads_v
