"""Attention to several sources as one causal attention each, merged by their log-sum-exp.

One softmax over all sources and visible times equals the attention of each source, weighted by exp(lse_m - LSE), where
lse_m is the log of the sum of exp(score) over source m and LSE that over all (Milakov and Gimelshein 2018). The weights
are the share of the attention that each source gets: the depth weights.

Backward: with P = exp(score - LSE) of the merged softmax and D = rowsum(grad * out), both of the merged output, the
gradient of one source needs nothing of the others (the identity that ring attention rests on, Liu et al. 2023). So each
source's own fused backward is called with the merged output and LSE.
"""

from typing import Any

import torch
from torch import Tensor

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of q (B, H, T, d) to M sources: k, v (B, H, T, M, d).

    Returns the output (B, H, T, d) and the weights of the sources, fp32 (B, H, M, T), which carry no gradient. On a CPU
    by its fused kernel; elsewhere by a plain computation with (B, H, M, T, T) scores.
    """
    if q.device.type == "cpu":
        out, weights = _Merge.apply(q, k, v)
        return out, weights
    return plain(q, k, v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same by the formula: one softmax over all sources and visible times."""
    times = q.shape[2]
    scores = torch.einsum("bhid,bhjmd->bhimj", q.float(), k.float()) * q.shape[-1] ** -0.5
    hidden = torch.ones(times, times, dtype=torch.bool, device=q.device).triu(1)
    shares = scores.masked_fill(hidden[:, None], -torch.inf).flatten(-2).softmax(-1).view_as(scores)
    out = torch.einsum("bhimj,bhjmd->bhid", shares.type_as(v), v)
    return out, shares.detach().sum(-1).transpose(2, 3)


class _Merge(torch.autograd.Function):
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
