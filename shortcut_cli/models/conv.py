"""A positive control, which is known to help: a convolution over the last few tokens in every layer.

    x <- x + W_2 SiLU(RMSNorm(conv(GLU(W_1 RMSNorm(x)))))            GLU(a, b) = a sigmoid(b), W_1: D -> 2 D

The convolution module of GroupBERT (Chelombiev et al. 2021, arXiv 2106.05822) in a causal form: conv is depthwise and
reads `kernel` tokens, the newest of which is its own. It stands between attention and feed-forward, as in Conformer
(Gulati et al. 2020). A comparison that does not find what this gains may miss any smaller effect too. With
`groups` the matrices of the feed-forward are block-diagonal, GroupBERT's other change. Nothing reads across layers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shortcut_cli.config.schema import ModelConfig
from shortcut_cli.errors import UsageError
from shortcut_cli.kernels.cpu import linear
from shortcut_cli.models.options import ConvOptions
from shortcut_cli.models.transformer import Block, Cache, Decoder, History, Linear, RMSNorm


class GroupedLinear(Linear):
    """A block-diagonal matrix, or several: each group of outputs reads its own group of inputs."""

    def __init__(
        self, in_features: int, out_features: int, groups: int, parts: int = 1, *, narrow: bool = False
    ) -> None:
        super().__init__(in_features // groups, out_features, parts * groups, narrow=narrow)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        inputs, blocks = x.chunk(self.groups, -1), self.weight.chunk(self.parts)
        products = [linear(inputs[n % self.groups], block, self.narrow) for n, block in enumerate(blocks)]
        return torch.cat(products, -1)


class Convolution(nn.Module):
    """A gated causal depthwise convolution."""

    def __init__(self, config: ModelConfig, kernel: int, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.inner = Linear(config.width, 2 * config.width, parts=2)
        self.kernel = nn.Parameter(torch.empty(config.width, kernel))
        self.norm = RMSNorm(config.width)
        self.out = Linear(config.width, config.width)

    def forward(self, x: Tensor, cache: Cache | None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        h = F.glu(self.inner(x))
        width, before = self.kernel.shape[0], self.kernel.shape[1] - 1
        h = cache.follow(self.layer, h, before) if cache else F.pad(h, (0, 0, before, 0))
        h = F.conv1d(h.mT, self.kernel.unsqueeze(1), groups=width).mT
        y: Tensor = self.out(F.silu(self.norm(h.type_as(x))))
        return y


class ConvBlock(Block):
    """A decoder layer with a convolution between attention and feed-forward."""

    def __init__(self, config: ModelConfig, options: ConvOptions, layer: int) -> None:
        super().__init__(config, layer)
        self.convolution_norm = RMSNorm(config.width)
        self.convolution = Convolution(config, options.kernel, layer)
        if options.groups > 1:
            inner, groups = self.feed_forward.inner, options.groups
            self.feed_forward.inner = GroupedLinear(
                config.width, inner.out_features, groups, inner.parts, narrow=inner.narrow
            )
            self.feed_forward.out = GroupedLinear(config.ffn, config.width, groups)

    def forward(self, x: Tensor, freqs: Tensor, cache: Cache | None, history: History | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x, h = self.attention_norm.fork(x)
        x = x + self.dropout(self.attention(h, freqs, cache, history))
        x, h = self.convolution_norm.fork(x)
        x = x + self.dropout(self.convolution(h, cache))
        x, h = self.feed_forward_norm.fork(x)
        y: Tensor = x + self.dropout(self.feed_forward(h))
        return y


class Conv(Decoder):
    """The baseline with a convolution in every layer."""

    def __init__(self, config: ModelConfig, vocabulary: int, seed: int | None = None) -> None:
        """Raises UsageError if the groups do not divide what they have to."""
        self.options: ConvOptions = config.conv  # type: ignore[attr-defined]
        for key, size in (("width", config.width), ("ffn", config.ffn)):
            if size % self.options.groups:
                raise UsageError(
                    f"model.{key} {size} is not a multiple of model.conv.groups {self.options.groups}",
                    "choose a number of groups that divides both model.width and model.ffn",
                )
        super().__init__(config, vocabulary, seed)

    def make_block(self, layer: int) -> nn.Module:
        """Every layer has a convolution."""
        return ConvBlock(self.config, self.options, layer)

    def initial_std(self, name: str, weight: Tensor) -> float:
        """That of a kernel keeps the size of what goes through, whatever `model.init` says: a norm follows."""
        return weight.shape[1] ** -0.5 if name.endswith("convolution.kernel") else super().initial_std(name, weight)

    def macs(self) -> int:
        """The matrices, and the kernels."""
        return super().macs() + self.config.layers * self.config.width * self.options.kernel
