"""MUDDFormer (Xiao et al. 2025, arXiv 2502.12170): after each layer, four token-dependent mixes of all states.

    Y^s = sum over j <= i of A^s_ij(X_i) X_j         s: what queries, keys, values and the residual stream of i + 1 read
    A(X) = GELU(RMSNorm(X) W_1) W_2 + a              W_2 = 0 and a = the current state at first: the baseline

RMSNorm has no weights; W_1 and W_2 are C n wide for C streams over n states; after the last layer there is one stream.
Only the connections are here: the paper's models also let the feed-forward grow with depth and normalise each stream
separately, which a fair comparison would have to give to the baseline too. Checked against the authors' PyTorch code
(modeling_muddformer.py), whose initial values are meant for inference; those here are from their JAX code.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shortcut_cli.config.schema import ModelConfig
from shortcut_cli.kernels.cpu import EPSILON, linear
from shortcut_cli.kernels.depth import States
from shortcut_cli.models.trace import HEAD, Reads, Trace, layer_name
from shortcut_cli.models.transformer import (
    Attention,
    Block,
    Cache,
    Decoder,
    Linear,
    attend,
)

STREAMS = ("queries", "keys", "values", "residual")  # of a layer
ROUTING = ("static", "inner.weight", "outer.weight")  # parameters of a Router


class Router(nn.Module):
    """Weights of n states for C streams, computed from the current state, which is the last of them."""

    def __init__(self, width: int, streams: int, states: int) -> None:
        super().__init__()
        self.shape = (streams, states)
        self.inner = Linear(width, streams * states)
        self.outer = Linear(streams * states, streams * states)
        self.static = nn.Parameter(torch.zeros(streams, states))

    def init_extra(self) -> None:
        """Every stream is the current state."""
        self.outer.weight.zero_()
        self.static.zero_()
        self.static[:, -1] = 1

    def forward(self, x: Tensor) -> Tensor:
        """The current state (B, T, D) -> weights (B, T, C, n)."""
        x = F.rms_norm(x, x.shape[-1:], eps=EPSILON)
        dynamic: Tensor = self.outer(F.gelu(self.inner(x))).unflatten(-1, self.shape)
        return dynamic + self.static


class StreamAttention(Attention):
    """Attention whose queries, keys and values each read their own stream."""

    def apart(self, streams: list[Tensor], freqs: Tensor, cache: Cache | None) -> Tensor:
        """Three normed streams (B, T, D) -> (B, T, D)."""
        weights = self.query_key_value.weight.chunk(3)
        qkv = torch.cat([linear(x, weight) for x, weight in zip(streams, weights, strict=True)], -1)
        q, k, v = self.heads_of(qkv, freqs)  # (B, H, T, d)
        if cache:
            k, v = cache.extend(self.layer, k, v)
        y: Tensor = self.out(attend(q, k, v).transpose(1, 2).flatten(-2))
        return y


class StreamBlock(Block):
    """A decoder layer that reads four streams."""

    attention: StreamAttention

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.attention = StreamAttention(config, layer)

    def read(self, streams: list[Tensor], freqs: Tensor, cache: Cache | None) -> Tensor:
        """Streams for queries, keys, values, residual (B, T, D) -> (B, T, D)."""
        normed = [self.attention_norm(x) for x in streams[:3]]
        x = streams[3] + self.dropout(self.attention.apart(normed, freqs, cache))
        y: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return y


class Mudd(Decoder):
    """The baseline with multiway dynamic dense connections after every layer."""

    def __init__(self, config: ModelConfig, vocabulary: int, seed: int | None = None) -> None:
        super().__init__(config, vocabulary)
        last = config.layers - 1
        self.mixes = nn.ModuleList(
            Router(config.width, 4 if layer < last else 1, layer + 2) for layer in range(config.layers)
        )
        if seed is not None:
            self.initialise(seed)

    def init_extra(self) -> None:
        """Start as the baseline."""
        for mix in self.mixes:
            assert isinstance(mix, Router)
            mix.init_extra()

    def routers(self) -> list[str]:
        """Static and dynamic weights."""
        return [f"mixes.{n}.{name}" for n in range(len(self.mixes)) for name in ROUTING]

    def make_block(self, layer: int) -> nn.Module:
        """The first layer reads only the embedding."""
        return StreamBlock(self.config, layer) if layer else Block(self.config, layer)

    def macs(self) -> int:
        """The matrices, and the mixes."""
        mixed = sum(mix.outer.out_features for mix in self.mixes)  # type: ignore[union-attr, misc]
        return super().macs() + mixed * self.config.width

    def run_blocks(self, x: Tensor, freqs: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        states = States(self.config.layers + 1, 4 * self.config.layers - 3, x)
        streams = [states.put(x)]
        for layer, (block, mix) in enumerate(zip(self.blocks, self.mixes, strict=True), 1):
            if trace is not None:
                trace.stream(streams[-1])
            y = block.read(streams, freqs, cache) if isinstance(block, StreamBlock) else block(streams[0], freqs, cache)
            weights = mix(states.put(y))  # (B, T, C, n)
            streams = states.mix(weights)
            if trace is not None:
                parts = zip(self._readers(layer), weights.permute(2, 3, 0, 1), streams, strict=True)
                streams = [trace.summed(reader, weight, states.rows, stream) for reader, weight, stream in parts]
        return streams[0]

    def reads(self) -> Reads:
        """Of each stream: all states, the last of which is the one right below."""
        layers = self.config.layers
        return {
            reader: (*map(layer_name, range(layer)), "own state")
            for layer in range(1, layers + 1)
            for reader in self._readers(layer)
        }

    def _readers(self, layer: int) -> list[str]:
        """Of the streams behind that many layers."""
        return [f"{layer_name(layer + 1)} {name}" for name in STREAMS] if layer < self.config.layers else [HEAD]
