"""A model prepared for sampling: its weights in the order in which a step of few rows reads them fastest.

A step reads every weight once and does little with it, so that the order and the size of the weights decide its time,
and for one row the number of its operations. In bf16 the weights take half the bytes. Only the products are in bf16
then, each rounded once to its result, after the activation if one follows; residual stream, norms, attention and its
cache, and logits stay in fp32. A cache in bf16 would be slower on a CPU: torch's kernels convert it number by number.

Block-diagonal matrices (`model.conv.groups`) and convolutions stay as they are, in fp32.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shortcut_cli.kernels.cpu import attend_scaled, fork_norm, norm, unit_norm
from shortcut_cli.models.transformer import Attention, Block, Cache, Decoder, FeedForward, History, Linear

Precision = Literal["fp32", "bf16"]
_linear = torch.ops.mkldnn._linear_pointwise.default


class Rounded(nn.Module):
    """A Linear whose weights are in bf16."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.weight = linear.weight  # for what reads it directly
        self.rounded = linear.weight.detach().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of x."""
        return F.linear(x.bfloat16(), self.rounded).type_as(x)


class Packed(nn.Module):
    """A Linear whose weights are in the order in which oneDNN reads them for so many rows.

    activation: of the results; those stay in the dtype of the product then.
    """

    def __init__(self, linear: Linear, rows: int, precision: Precision) -> None:
        super().__init__()
        self.weight, self.activation = linear.weight, "none"
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(self.dtype), rows)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in fp32."""
        y: Tensor = _linear(x.to(self.dtype), self.packed, None, self.activation, [], "none")
        return y.float() if self.activation == "none" else y


class Transposed(nn.Module):
    """A Linear for one row in fp32: each thread multiplies it by its part of the columns, one row after the other."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        out_features, in_features = linear.weight.shape
        parts = math.gcd(out_features, torch.get_num_threads())
        self.parts = linear.weight.detach().view(parts, -1, in_features).mT.contiguous()  # (parts, in, out / parts)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        rows = x.reshape(-1, x.shape[-1])
        if len(self.parts) == 1:
            return torch.mm(rows, self.parts[0]).view(*x.shape[:-1], -1)
        y = torch.bmm(rows.expand(len(self.parts), -1, -1), self.parts)  # (parts, rows, out / parts)
        return y.transpose(0, 1).reshape(*x.shape[:-1], -1)


class ShortFeedForward(nn.Module):
    """A FeedForward of two Packed, the first of which ends with the activation: GELU or ReLU^2."""

    def __init__(self, inner: Packed, out: nn.Module, squared: bool) -> None:
        super().__init__()
        self.inner, self.out, self.squared = inner, out, squared
        inner.activation = "relu" if squared else "gelu"
        self.products = inner.forward, out.forward  # found faster than a module

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        inner, out = self.products
        h = inner(x)
        y: Tensor = out(h.square() if self.squared else h)
        return y


class ShortBlock(Block):
    """A Block in eval mode without dropout and hooks; if its attention is the baseline's, a token takes few operations.

    A step of one row takes as long for its operations, in Python and out of it, as for its products.
    """

    def __init__(self, block: Block) -> None:
        nn.Module.__init__(self)
        self._modules |= block._modules
        self.weights = block.attention_norm.weight, block.feed_forward_norm.weight
        self.whole, self.feed = block.attention.forward, block.feed_forward.forward
        weight, attention = self.weights[0], block.attention
        self.short = type(attention) is Attention and weight.device.type == "cpu" and weight.dtype == torch.float32
        if isinstance(attention, Attention):
            self.heads, self.layer, self.qk_norm = attention.heads, attention.layer, attention.qk_norm
            self.qkv, self.out = attention.query_key_value.forward, attention.out.forward

    def forward(self, x: Tensor, freqs: Tensor, cache: Cache | None, history: History | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        weight, feed_weight = self.weights
        if not self.short or cache is None or history is not None or x.shape[1] > 1:
            x = x + self.whole(fork_norm(x, weight)[1], freqs, cache, history)
            return x + self.feed(fork_norm(x, feed_weight)[1])
        x = x + self._attend(norm(x, weight), freqs, cache)
        return x + self.feed(norm(x, feed_weight))

    def _attend(self, x: Tensor, freqs: Tensor, cache: Cache) -> Tensor:
        """Attention of one token: (B, 1, D) -> (B, 1, D)."""
        batch, _, width = x.shape
        heads, head_width = self.heads, width // self.heads
        qkv = self.qkv(x)  # ours alone: queries and keys are turned where they are
        pairs = torch.view_as_complex(qkv.view(batch, 3, heads, -1, 2)[:, :2])
        torch.mul(pairs, torch.view_as_complex(freqs), out=pairs)
        parts = qkv.view(batch, 3, heads, head_width)
        if self.qk_norm:
            parts[:, :2] = unit_norm(parts[:, :2])
        k, v = cache.append(self.layer, parts[:, 1:])
        q = (qkv[:, :, :width] * head_width**-0.5).view(-1, 1, head_width)
        return self.out(attend_scaled(q, k, v).view(batch, 1, width))


def _form(module: nn.Module, rows: int, precision: Precision) -> nn.Module | None:
    """What takes the place of a module, whose parts have their forms, for steps of so many rows; None if it stays."""
    if type(module) is Linear:  # a matrix of blocks stays
        return _product(module, rows, precision)
    if isinstance(module, FeedForward) and isinstance(module.inner, Packed) and not module.gated:
        return ShortFeedForward(module.inner, module.out, module.squared)
    return ShortBlock(module) if type(module) is Block else None


def _product(linear: Linear, rows: int, precision: Precision) -> nn.Module | None:
    """The form of a Linear."""
    on_cpu = linear.weight.device.type == "cpu"
    packs = on_cpu and linear.weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if precision == "bf16":
        packs = packs and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return Packed(linear, rows, precision) if packs else Rounded(linear)
    if rows == 1:  # by oneDNN, one row takes longer than by the transposed matrix
        return Transposed(linear) if on_cpu else None
    return Packed(linear, rows, precision) if packs else None


@contextmanager
def prepared(model: Decoder, rows: int, precision: Precision) -> Iterator[None]:
    """In this block, the model is prepared for this many rows at once, though it takes any number."""
    replaced = [*_replace(model, rows, precision)]
    try:
        yield
    finally:
        for parent, name, module in replaced:
            setattr(parent, name, module)


def _replace(parent: nn.Module, rows: int, precision: Precision) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Put the forms of all modules below `parent` in their places, from below; yields each place and what was there."""
    for name, module in [*parent.named_children()]:
        yield from _replace(module, rows, precision)
        form = _form(module, rows, precision)
        if form is not None:
            setattr(parent, name, form)
            yield parent, name, module
