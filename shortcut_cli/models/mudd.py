"""MUDDFormer (Xiao et al. 2025, arXiv 2502.12170): after each layer, four mixes of all states, chosen by the token.

    Y^s = sum over j <= i of A^s_ij(X_i) X_j         s: what queries, keys, values and the residual stream of i + 1 read
    A(X) = GELU(RMSNorm(X) W_1) W_2 + a              W_2 = 0 and a = the current state at first: the baseline

RMSNorm without weights; W_1 and W_2 are C n wide for C streams over n states; after the last layer there is one stream.
Only the connections are here: the paper's models also let the feed-forward grow with depth and normalise the streams
apart, which a fair comparison would have to give to the baseline too. Checked against the authors' PyTorch code
(modeling_muddformer.py), whose initial values are those of inference; the ones here are those of their JAX code.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shortcut_cli.models.blocks import EPSILON, Attention, Block, Cache, Decoder, Linear, Trace, attend, split_heads
from shortcut_cli.models.mixing import States
from shortcut_cli.recipe import ModelKeys

ROUTING = ("static", "inner.weight", "outer.weight")  # parameters of a Router


class Router(nn.Module):
    """Weights of `states` states for `streams` streams, from the current state, which is the last of them."""

    def __init__(self, width: int, streams: int, states: int) -> None:
        super().__init__()
        self.shape = (streams, states)
        self.inner = Linear(width, streams * states)
        self.outer = Linear(streams * states, streams * states)
        self.static = nn.Parameter(torch.zeros(streams, states))

    def begin(self) -> None:
        """Every stream is the current state."""
        self.outer.weight.zero_()
        self.static.zero_()
        self.static[:, -1] = 1

    def forward(self, x: Tensor) -> Tensor:
        """The current state (B, T, D) -> weights (B, T, C, n)."""
        x = F.rms_norm(x, x.shape[-1:], eps=EPSILON)
        return self.outer(F.gelu(self.inner(x))).unflatten(-1, self.shape) + self.static


class StreamAttention(Attention):
    """Attention whose queries, keys and values read streams of their own."""

    def apart(self, streams: list[Tensor], table: Tensor, cache: Cache | None) -> Tensor:
        """Three normed streams (B, T, D) -> (B, T, D)."""
        weights = self.query_key_value.weight.chunk(3)
        qkv = torch.cat([F.linear(x, weight) for x, weight in zip(streams, weights, strict=True)], -1)
        q, k, v = split_heads(qkv, table, self.heads)  # (B, H, T, d)
        if cache:
            k, v = cache.extend(self.layer, k, v)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(-2))


class StreamBlock(Block):
    """A decoder layer that reads four streams."""

    attention: StreamAttention

    def __init__(self, keys: ModelKeys, layer: int) -> None:
        super().__init__(keys, layer)
        self.attention = StreamAttention(keys, layer)

    def read(self, streams: list[Tensor], table: Tensor, cache: Cache | None) -> Tensor:
        """Streams for queries, keys, values, residual (B, T, D) -> (B, T, D)."""
        normed = [self.attention_norm(x) for x in streams[:3]]
        x = streams[3] + self.dropout(self.attention.apart(normed, table, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Routed(Decoder):
    """A decoder with `mixes`, one Router each; the baseline at the start."""

    mixes: nn.ModuleList

    def begin(self) -> None:
        """The baseline."""
        for mix in self.mixes:
            assert isinstance(mix, Router)
            mix.begin()

    def routers(self) -> list[str]:
        """Static and dynamic weights."""
        return [f"mixes.{n}.{name}" for n in range(len(self.mixes)) for name in ROUTING]


class Mudd(Routed):
    """The baseline with multiway dynamic dense connections after every layer."""

    def __init__(self, keys: ModelKeys, vocabulary: int, seed: int | None = None) -> None:
        super().__init__(keys, vocabulary)
        last = keys.layers - 1
        self.mixes = nn.ModuleList(
            Router(keys.width, 4 if layer < last else 1, layer + 2) for layer in range(keys.layers)
        )
        if seed is not None:
            self.initialise(seed)

    def make_block(self, layer: int) -> nn.Module:
        """The first layer reads the embedding alone."""
        return StreamBlock(self.keys, layer) if layer else Block(self.keys, layer)

    def multiplications(self) -> int:
        """The mixes, beside the matrices."""
        mixed = sum(mix.outer.out_features for mix in self.mixes)  # type: ignore[union-attr, misc]
        return super().multiplications() + mixed * self.keys.width

    def trunk(self, x: Tensor, table: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        del trace
        states = States(self.keys.layers + 1, 4 * self.keys.layers - 3, x)
        streams = [states.put(x)]
        for block, mix in zip(self.blocks, self.mixes, strict=True):
            y = block.read(streams, table, cache) if isinstance(block, StreamBlock) else block(streams[0], table, cache)
            streams = states.mix(mix(states.put(y)))
        return streams[0]
