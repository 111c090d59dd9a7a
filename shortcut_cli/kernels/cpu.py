"""What every layer computes: products with a matrix, and the norm with the residual stream beside it, fast on a CPU."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shortcut_cli.kernels import bf16

EPSILON = 1e-6  # of all norms, added to the mean square
FEW_ROWS = 16  # up to which a product with a large matrix is divided among the threads
LARGE_MATRIX = 2**17  # weights
_EPSILON = {
    dtype: torch.tensor(EPSILON, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


def on_cpu(x: Tensor, *, autocast: bool = False) -> bool:
    """Whether to run what is written for a CPU: not while torch.compile traces, which fuses the plain version itself.

    autocast: also under autocast. Most kernels can't run there: their gradients need all tensors to have one dtype.
    """
    eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    return eager and (autocast or not torch.is_autocast_enabled("cpu"))


def on_cpu_above_bf16(x: Tensor) -> bool:
    """Whether to run a kernel that computes in the dtype of its tensors; bf16 is too coarse for that."""
    return on_cpu(x) and x.dtype != torch.bfloat16


def linear(x: Tensor, weight: Tensor, narrow: bool = False) -> Tensor:
    """F.linear(x, weight): x (..., in_features), weight (out_features, in_features) -> (..., out_features).

    narrow: if the product is in bf16 (`bf16.products`), leave the result in bf16. While sampling on a CPU, each thread
    multiplies a few rows by its part of a large matrix; torch uses one thread.
    """
    if bf16.wanted(x):
        return bf16.product(x, weight, narrow)
    out_features, in_features = weight.shape
    few = weight.numel() >= LARGE_MATRIX and x.numel() <= FEW_ROWS * in_features
    if torch.is_grad_enabled() or not few or not on_cpu(x):
        return F.linear(x, weight)
    parts = math.gcd(out_features, torch.get_num_threads())
    rows = x.reshape(1, -1, in_features).expand(parts, -1, -1)
    y = torch.bmm(rows, weight.view(parts, -1, in_features).mT)  # (parts, rows, out_features / parts)
    return y.transpose(0, 1).reshape(*x.shape[:-1], -1)


def attend_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query (B, H, 1, d) to all of k, v (B, H, S, d); returns (B, H, 1, d).

    While sampling on a CPU by two products, which read a long cache faster than torch's fused kernel does.
    """
    if q.device.type != "cpu" or torch.is_grad_enabled() or q.dtype == torch.bfloat16 or not on_cpu(q):
        return F.scaled_dot_product_attention(q, k, v)
    scaled = (q * q.shape[-1] ** -0.5).flatten(0, 1)
    return attend_scaled(scaled, k.flatten(0, 1), v.flatten(0, 1)).view(q.shape)


def attend_scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same for q (N, 1, d), already divided by the root of d, and k, v (N, S, d); returns (N, 1, d)."""
    return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v)


def fork_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., D) itself, for the residual stream, and its RMS norm times weight (D,); x gets one gradient for both."""
    if not on_cpu(x, autocast=x.dtype == weight.dtype):
        return plain_fork_norm(x, weight)
    if not torch.is_grad_enabled():
        return x, norm(x, weight)
    stream, normed = _ForkNorm.apply(x, weight)
    return stream, normed


def plain_fork_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same by torch's own norm."""
    return x, F.rms_norm(x, weight.shape, weight, EPSILON)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """The norm without its gradient, in few passes over memory: torch 2.14 has no fused kernel for it on a CPU."""
    return (x * _scale(x)).mul_(weight)


def _scale(x: Tensor) -> Tensor:
    """1 / rms(x) (..., 1)."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(_EPSILON[x.dtype], size, size, value=1 / x.shape[-1]).rsqrt_()


class _ForkNorm(torch.autograd.Function):
    """The gradient of layer norm at a mean of 0, less the part of it that centres the gradient.

    The gradient of the residual stream is added in place; autograd would write the sum to new memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        scale = _scale(x)
        y = (x * scale).mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        return x, y

    @staticmethod
    def backward(ctx: Any, stream: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return stream, None
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(scale), scale, weight, None, [True, True, False]
        )
        grad_x.add_((grad @ weight).unsqueeze(-1).mul_(scale).div_(x.shape[-1]))
        return grad_x if stream is None else grad_x.add_(stream), grad_weight


def unit_norm(x: Tensor) -> Tensor:
    """x (..., D) / rms(x), without a weight."""
    if not on_cpu(x, autocast=True) or x.dtype == torch.bfloat16:
        return plain_unit_norm(x)
    if not torch.is_grad_enabled():
        return x * _scale(x)
    y: Tensor = _UnitNorm.apply(x)
    return y


def plain_unit_norm(x: Tensor) -> Tensor:
    """The same by torch's own norm."""
    return F.rms_norm(x, x.shape[-1:], eps=EPSILON)


class _UnitNorm(torch.autograd.Function):
    """y = s x with s = 1 / rms(x): grad_x = s (grad - y mean(grad y))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        scale = _scale(x)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        y, scale = ctx.saved_tensors
        mean = torch.linalg.vecdot(grad, y).unsqueeze(-1).div_(y.shape[-1])
        return torch.addcmul(grad, y, mean, value=-1).mul_(scale)
