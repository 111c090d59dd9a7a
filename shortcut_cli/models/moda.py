"""Mixture-of-depths attention, MoDA (arXiv 2603.15619): a query also sees the keys of the layers below at its own time.

    one softmax over  { k_l,j : j <= t }  and  { k_i,t : i < l },  values alike

Nothing is added to the cache: depth keys are those of the current token. The variant without the paper's projection of
feed-forward states to keys and values. Keys are turned by their time, which query and depth keys share.
"""

from torch import Tensor

from shortcut_cli.models import merge
from shortcut_cli.models.blocks import Attention, Cache, History, ReadingDecoder, split_heads


class DepthKeys(Attention):
    """Attention over the times up to its own and, at its own time, over the layers below."""

    def forward(self, x: Tensor, table: Tensor, cache: Cache | None, history: History | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        assert history is not None
        q, k, v = split_heads(self.query_key_value(x), table, self.heads)  # (B, H, T, d)
        below = list(history.keys), list(history.values)
        history.keys.append(k)
        history.values.append(v)
        if cache:
            k, v = cache.extend(self.layer, k, v)
        return self.out(merge.attend_with_depth(q, k, v, *below).transpose(1, 2).flatten(-2))


class MoDA(ReadingDecoder):
    """The baseline whose attention also reads the layers below at its own time."""

    def attention(self, layer: int) -> Attention:
        """Above the first layer."""
        return DepthKeys(self.keys, layer)
