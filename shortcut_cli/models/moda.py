"""MoDA (Zhu et al. 2026, arXiv 2603.15619): a query also sees the keys of the layers below at its own time.

    one softmax over  { k_l,j : j <= t }  and  { k_i,t : i < l },  the same for values

Nothing is added to the cache: depth keys are those of the current token. Keys are rotated by their time, which query
and depth keys share. With `feed_forward`, each feed-forward leaves a key and a value too, by a projection of its own of
what it reads, its norm included (the paper's figure 1). The last layer's would be read by none. By the paper's tables
most of its gain is by these. In the authors' code (hustvl/MoDA, bla_gpt_moda_depth_scaling.py) depth keys are not
rotated, but queries are, so that their products depend on the place in the window; and norms stand behind the
sublayers.
"""

import torch
from torch import Tensor, nn

from shortcut_cli.config.schema import ModelConfig
from shortcut_cli.kernels.attention import attend_with_depth, depth_shares, plain_attend_with_depth
from shortcut_cli.kernels.cpu import unit_norm
from shortcut_cli.kernels.rope import rotate
from shortcut_cli.models.options import MoDAOptions
from shortcut_cli.models.trace import Reads, Trace, layer_name
from shortcut_cli.models.transformer import Attention, Block, Cache, History, Linear, ReadingDecoder


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
        trace = history.trace
        read = attend_with_depth(q, k, v, *below) if trace is None else self._traced(q, k, v, *below, trace)
        y: Tensor = self.out(read.transpose(1, 2).flatten(-2))
        return y

    def _traced(
        self, q: Tensor, k: Tensor, v: Tensor, keys: list[Tensor], values: list[Tensor], trace: Trace
    ) -> Tensor:
        """Own q, k, v (B, H, T, d), and keys and values of the layers below -> (B, H, T, d), by the plain formula."""
        pairs = trace.keyed(self.name, [k, *keys], [v, *values])
        kept = list(pairs)
        k, v = pairs.pop(0, (k[:, :, :0], v[:, :, :0]))  # masked: there is none at any time
        keys, values = [key for key, _ in pairs.values()], [value for _, value in pairs.values()]
        shares = depth_shares(q, k, keys)  # (B, H, T, S + N)
        own, depth = shares.split((k.shape[2], len(keys)), -1)
        by_source = torch.cat((own.sum(-1, keepdim=True), depth), -1) if 0 in kept else depth
        trace.record(self.name, kept, by_source.movedim(-1, 0))
        return plain_attend_with_depth(q, k, v, keys, values)


class DepthBlock(Block):
    """A decoder layer whose feed-forward leaves a key and a value."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.heads, self.qk_norm = config.heads, config.qk_norm
        self.depth_key_value = Linear(config.width, 2 * config.width, parts=2)

    def forward(self, x: Tensor, freqs: Tensor, cache: Cache | None, history: History | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        assert history is not None
        x, h = self.attention_norm.fork(x)
        x = x + self.dropout(self.attention(h, freqs, cache, history))
        x, h = self.feed_forward_norm.fork(x)
        k, v = self.depth_key_value(h).unflatten(-1, (2, self.heads, -1)).unbind(2)  # (B, T, H, d)
        k = rotate(k, freqs).transpose(1, 2)
        history.keys.append(unit_norm(k) if self.qk_norm else k)
        history.values.append(v.transpose(1, 2))
        y: Tensor = x + self.dropout(self.feed_forward(h))
        return y


class MoDA(ReadingDecoder):
    """The baseline whose attention also reads the layers below at its own time."""

    softmax_reads = True

    def __init__(self, config: ModelConfig, vocabulary: int, seed: int | None = None) -> None:
        self.options: MoDAOptions = config.moda  # type: ignore[attr-defined]
        super().__init__(config, vocabulary, seed)

    def make_block(self, layer: int) -> nn.Module:
        """A layer whose feed-forward leaves something too, if it should and another layer follows."""
        if not self.options.feed_forward or layer == self.config.layers - 1:
            return super().make_block(layer)
        block = DepthBlock(self.config, layer)
        if layer:
            block.attention = self.make_attention(layer)
        return block

    def reads(self) -> Reads:
        """The layers below, and what their feed-forwards left, beside its own keys at all times."""
        below = [(layer_name(n), f"{layer_name(n)} feed-forward") for n in range(1, self.config.layers)]
        kinds = 2 if self.options.feed_forward else 1
        return {
            layer_name(n): ("own keys", *(name for names in below[: n - 1] for name in names[:kinds]))
            for n in range(2, self.config.layers + 1)
        }

    def macs(self) -> int:
        """The matrices; a score and a share of the sum for each depth key."""
        layers, kinds = self.config.layers, 2 if self.options.feed_forward else 1
        return super().macs() + kinds * layers * (layers - 1) * self.config.width

    def make_attention(self, layer: int) -> Attention:
        """Above the first layer."""
        return DepthKeys(self.config, layer)
