"""A control: the shortcut model whose last layer asks the same of the taps at every token.

    q = a learned vector per head, turned by its time; taps, maps, keys, values and mask are those of `shortcut`

Attention-based aggregation (PatchConvNet, Touvron et al. 2021, arXiv 2112.13692: one learned query pools an image) in a
causal form. What `shortcut` gains over this, it gains by what the last layer's state asks for.
"""

import torch
from torch import Tensor, nn

from shortcut_cli.config.schema import ModelConfig
from shortcut_cli.errors import UsageError
from shortcut_cli.kernels.rope import rotate
from shortcut_cli.models.options import ShortcutOptions
from shortcut_cli.models.shortcut import Shortcut, TapAttention, TapBlock
from shortcut_cli.models.trace import Trace
from shortcut_cli.models.transformer import INIT_STD, Cache


class PoolAttention(TapAttention):
    """Attention to the taps with a learned query."""

    def __init__(self, config: ModelConfig, options: ShortcutOptions, taps: int) -> None:
        super().__init__(config, options, taps)
        del self.query
        self.pool = nn.Parameter(torch.empty(config.heads, config.width // config.heads))

    def _own(self, x: Tensor, freqs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self._normed(rotate(self.pool.expand(*x.shape[:2], -1, -1), freqs))
        return q, q, q

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, slot: int, cache: Cache | None, trace: Trace | None) -> Tensor:
        # No product has made the query, so that autocast did not choose its precision.
        return super()._attend(q.type_as(k), k, v, slot, cache, trace)


class PoolBlock(TapBlock):
    """The last layer: as in `shortcut`, but its attention does not read its input, so that it has no norm for that."""

    def __init__(self, config: ModelConfig, options: ShortcutOptions, taps: int) -> None:
        super().__init__(config, options, taps)
        del self.attention_norm
        self.attention = PoolAttention(config, options, taps)

    def forward(
        self, x: Tensor, tapped: list[Tensor], freqs: Tensor, cache: Cache | None, trace: Trace | None
    ) -> Tensor:
        """x (B, T, D), M tapped states (B, T, D) -> (B, T, D)."""
        x = x + self.dropout(self.attention(x, tapped, freqs, cache, trace))
        x, h = self.feed_forward_norm.fork(x)
        y: Tensor = x + self.dropout(self.feed_forward(h))
        return y


class ShortcutPool(Shortcut):
    """`shortcut`, with the options of [model.shortcut], whose query does not depend on the tokens."""

    def options_of(self, config: ModelConfig) -> ShortcutOptions:
        """Those of `shortcut`. Raises UsageError if the last layer is to read its own keys, which need its state."""
        options = super().options_of(config)
        if options.mode != "replace":
            raise UsageError(
                f"shortcut_pool has no keys of the last layer, which model.shortcut.mode {options.mode!r} asks for",
                'set model.shortcut.mode = "replace"',
            )
        return options

    def make_block(self, layer: int) -> nn.Module:
        """The last layer pools the taps, if there are any."""
        if self.tapped and layer == self.config.layers - 1:
            return PoolBlock(self.config, self.options, len(self.tapped))
        return super().make_block(layer)

    def initial_std(self, name: str, weight: Tensor) -> float:
        """That of the query: as large as the queries that the matrix of `shortcut` makes of a normed state."""
        if not name.endswith("attention.pool"):
            return super().initial_std(name, weight)
        return INIT_STD * self.config.width**0.5 if self.config.init == "gpt2" else 1.0

    def routers(self) -> list[str]:
        """The query."""
        return ["attention.pool"]
