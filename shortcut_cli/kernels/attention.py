"""Attention to several sources as one causal attention each, merged by their log-sum-exp.

One softmax over all sources and visible times equals the attention of each source, weighted by exp(lse_m - LSE), where
lse_m is the log of the sum of exp(score) over source m and LSE that over all (Milakov and Gimelshein 2018). The weights
are the share of the attention that each source gets: the depth weights.

Backward: with P = exp(score - LSE) of the merged softmax and D = rowsum(grad * out), both of the merged output, the
gradient of one source needs nothing from the others (the identity behind ring attention, Liu et al. 2023). So each
source's own fused backward is called with the merged output and LSE, as torch's context parallelism does.

The kernels are those that F.scaled_dot_product_attention chooses from, which does not return the LSE. A mask rules out
the flash kernels of a GPU: with one, F.scaled_dot_product_attention takes the memory-efficient kernel or writes all
scores to memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shortcut_cli.kernels import bf16

aten = torch.ops.aten
MOST_HEAD_WIDTH = 256  # of the flash kernel
ALIGNED = 32  # the memory-efficient kernel pads the LSE to a multiple of this many times


def kernel_for(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The fused kernel for causal attention of these (B, H, T, d) each: "cpu", "flash", "efficient"; "" if none is."""
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type != "cuda":
        return ""
    if torch.compiler.is_compiling():  # which can't trace the questions below; flash is the one that was measured
        return "flash" if q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] <= MOST_HEAD_WIDTH else ""
    parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, False)
    if torch.backends.cuda.can_use_flash_attention(parameters):
        return "flash"
    return "efficient" if torch.backends.cuda.can_use_efficient_attention(parameters) else ""


def fused(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[Any]]:
    """Causal attention (B, H, T, d): the output, LSE (B, H, T) fp32, and what else `fused_backward` needs."""
    if kernel == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        return out, lse, []
    if kernel == "flash":
        out, lse, *lengths, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        return out, lse, [*lengths, 0.0, True, seed, offset]
    out, lse, *random = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)
    return out, lse[..., : q.shape[2]], random


def fused_backward(
    kernel: str, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rest: list[Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, given those of `out`; rest: from `fused`."""
    grad, lse = grad.contiguous(), lse.contiguous()
    if kernel == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, out, lse, 0.0, True)
    elif kernel == "flash":
        grads = aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, out, lse, *rest)
    else:
        padded = F.pad(lse, (0, -lse.shape[2] % ALIGNED), value=torch.inf)
        wanted = [True, True, True, False]  # the last: of a bias
        backward = aten._scaled_dot_product_efficient_attention_backward
        grads = backward(grad, q, k, v, None, out, padded, *rest, 0.0, wanted, True)
    return grads[0], grads[1], grads[2]


def attend_sources(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of q (B, H, T, d) to M sources: k, v (B, H, T, M, d).

    Returns the output (B, H, T, d) and the weights of the sources, fp32 (B, H, M, T), which carry no gradient. CPUs
    and CUDA have fused kernels for it; other devices run the plain version.
    """
    if bf16.can_attend(q):
        return bf16.attend(q, k.flatten(2, 3), v.flatten(2, 3))
    # The kernels' operations are torch's own: torch.compile calls them as they are, and they take the bf16 of autocast.
    # The plain version would write all scores to memory.
    kernel = kernel_for(q, k[:, :, :, 0], v[:, :, :, 0])
    if not kernel:
        return plain_attend_sources(q, k, v)
    out, weights = _AttendSources.apply(kernel, q, k, v)
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
    def forward(ctx: Any, kernel: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        parts = [fused(kernel, q, k[:, :, :, m], v[:, :, :, m]) for m in range(k.shape[3])]
        ctx.kernel, ctx.rests = kernel, [rest for *_, rest in parts]
        sums = torch.stack([lse for _, lse, _ in parts], 2)  # (B, H, M, T)
        total = sums.logsumexp(2)  # (B, H, T)
        weights = (sums - total[:, :, None]).exp()
        out = torch.zeros_like(q, dtype=weights.dtype)
        for m, (part, *_) in enumerate(parts):
            out += weights[:, :, m, :, None] * part
        out = out.type_as(q)
        ctx.save_for_backward(q, k, v, out, total)
        ctx.mark_non_differentiable(weights)
        return out, weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        q, k, v, out, total = ctx.saved_tensors
        grad_q, grads_k, grads_v = torch.zeros_like(q), [], []
        for m, rest in enumerate(ctx.rests):
            part_q, part_k, part_v = fused_backward(ctx.kernel, grad, q, k[:, :, :, m], v[:, :, :, m], out, total, rest)
            grad_q += part_q
            grads_k.append(part_k)
            grads_v.append(part_v)
        return None, grad_q, torch.stack(grads_k, 3), torch.stack(grads_v, 3)


def attend_with_depth(q: Tensor, k: Tensor, v: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One softmax over times and depth: the last T of S times see k, v (B, H, S, d) up to themselves, and N more.

    q: (B, H, T, d); keys, values: N times (B, H, T, d), seen only at their own time. Returns (B, H, T, d). CPUs and
    CUDA have fused kernels for whole windows, S = T.
    """
    kernel = kernel_for(q, k, v) if q.shape[2] == k.shape[2] else ""
    if not kernel:
        return plain_attend_with_depth(q, k, v, keys, values)
    out: Tensor = _AttendWithDepth.apply(kernel, q, k, v, len(keys), *keys, *values)
    return out


def plain_attend_with_depth(q: Tensor, k: Tensor, v: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """The same by its formula."""
    shares = depth_shares(q, k, keys).type_as(v)
    out: Tensor = shares[..., : k.shape[2]] @ v
    for number, value in enumerate(values):
        out = out + shares[..., k.shape[2] + number, None] * value
    return out


def depth_shares(q: Tensor, k: Tensor, keys: list[Tensor]) -> Tensor:
    """The weights of that softmax, fp32 (B, H, T, S + N)."""
    scale, late = q.shape[-1] ** -0.5, k.shape[2] - q.shape[2]
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(late + 1)
    times = (q.float() @ k.float().mT * scale).masked_fill(hidden, -torch.inf)
    depth = [(q.float() * key.float()).sum(-1, keepdim=True) * scale for key in keys]  # (B, H, T, 1) each
    return torch.cat((times, *depth), -1).softmax(-1)


class _AttendWithDepth(torch.autograd.Function):
    """Fused attention over times, merged with the few depth keys by their log-sum-exps; backward as above."""

    @staticmethod
    def forward(ctx: Any, kernel: str, q: Tensor, k: Tensor, v: Tensor, count: int, *below: Tensor) -> Tensor:
        keys, values = below[:count], below[count:]
        out, lse, ctx.rest = fused(kernel, q, k, v)
        ctx.kernel = kernel
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
        grad_q, grad_k, grad_v = fused_backward(ctx.kernel, grad, q, k, v, y, total, ctx.rest)
        inner = torch.linalg.vecdot(grad, y)  # (B, H, T)
        grads_k, grads_v = [], []
        for share, key, value in zip(shares, keys, values, strict=True):
            by_score = (share * (torch.linalg.vecdot(grad, value) - inner) * q.shape[-1] ** -0.5).unsqueeze(-1)
            grad_q = torch.addcmul(grad_q, by_score, key)
            grads_k.append(by_score * q)
            grads_v.append(share.unsqueeze(-1) * grad)
        return None, grad_q, grad_k, grad_v, None, *grads_k, *grads_v
