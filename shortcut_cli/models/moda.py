"""Mixture-of-depths attention, MoDA (arXiv 2603.15619): a query also sees the keys of the layers below at its own time.

    one softmax over  { k_l,j : j <= t }  and  { k_i,t : i < l },  the same for values

Nothing is added to the cache: depth keys are those of the current token. This is the variant without the paper's
projection of feed-forward states to keys and values. Keys are rotated by their time, which query and depth keys share.
"""

from torch import Tensor

from shortcut_cli.kernels.attention import attend_with_depth
from shortcut_cli.models.transformer import Attention, Cache, History, ReadingDecoder


class DepthKeys(Attention):
    """Attention over all times up to its own and, at its own time, over the layers below."""

    def forward(self, x: Tensor, freqs: Tensor, cache: Cache | None, history: History | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        assert history is not None
        q, k, v = self.heads_of(self.query_key_value(x), freqs)  # (B, H, T, d)
        below = list(history.keys), list(history.values)
        history.keys.append(k)
        history.values.append(v)
        if cache:
            k, v = cache.extend(self.layer, k, v)
        y: Tensor = self.out(attend_with_depth(q, k, v, *below).transpose(1, 2).flatten(-2))
        return y


class MoDA(ReadingDecoder):
    """The baseline whose attention also reads the layers below at its own time."""

    def make_attention(self, layer: int) -> Attention:
        """Above the first layer."""
        return DepthKeys(self.config, layer)
