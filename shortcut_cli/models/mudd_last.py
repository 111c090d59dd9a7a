"""MUDD where it pays most: around the last layer, for its values and the residual stream.

As trimmed in modded-nanogpt (records/track_1_short/2026-04-22_MuddFormer, third version), whose eleven layers give the
sources: the embedding, layers 4 and 8 (their numbers 3 and 7), and the state x before the last layer.

    V <- V + a . (x_0, h_8, x),    x <- x + b . (x_0, h_8, x)       before the last layer, from x
    x <- x + c . (x_0, h_4, h_8, x before the last layer)           after it, before the head's norm, from x

    (a, b) or c = 0.1 (GELU(RMSNorm(x) W_1) W_2 + bias)             W_1: D -> 64; W_2 = 0 at first

The biases are zero at first, but that of h_8 in c, at which half of that state is taken off. Values take states as they
are, D channels for the heads of D. Other depths have their layers at the same shares of it. Not taken over: what that
record gates besides, its value embeddings, and its learning rate; the norm is MUDD's.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shortcut_cli.config.schema import ModelConfig
from shortcut_cli.kernels.cpu import unit_norm
from shortcut_cli.kernels.depth import weighted_sum
from shortcut_cli.models.trace import HEAD, Reads, Trace, layer_name
from shortcut_cli.models.transformer import Attention, Block, Cache, Decoder, History, Linear

INNER, SCALE = 64, 0.1
LAYERS, EARLY, LATE = 11, 4, 8  # of the record


class Weights(nn.Module):
    """Weights of states, computed from the current one."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.inner, self.outer = Linear(width, INNER), Linear(INNER, count)
        self.static = nn.Parameter(torch.zeros(count))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (count, B, T), fp32."""
        weights: Tensor = self.outer(F.gelu(self.inner(unit_norm(x)))) + self.static
        return SCALE * weights.movedim(-1, 0)


class AddedValues(Attention):
    """Attention whose values have a state added, which the history brings."""

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, history: History) -> Tensor:
        """(B, H, T, d)."""
        del x, q, k
        added: Tensor = history.values[0].unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return v + added.type_as(v)


def _mixed(reader: str, weights: Tensor, states: list[Tensor], trace: Trace | None) -> Tensor:
    """A sum of states (B, T, D), by weights (n, B, T)."""
    total = weighted_sum(weights, states)
    return total if trace is None else trace.summed(reader, weights, states, total)


class MuddLast(Decoder):
    """The baseline with three mixes of states around its last layer."""

    def __init__(self, config: ModelConfig, vocabulary: int, seed: int | None = None) -> None:
        super().__init__(config, vocabulary)
        self.early, self.late = (min(round(n * config.layers / LAYERS), config.layers - 1) for n in (EARLY, LATE))
        self.before, self.after = Weights(config.width, 6), Weights(config.width, 4)
        if seed is not None:
            self.initialise(seed)

    def init_extra(self) -> None:
        """Nothing is mixed, but that half of a state is taken off at the end."""
        for weights in (self.before, self.after):
            weights.outer.weight.zero_()
            weights.static.zero_()
        self.after.static[2] = -0.5 / SCALE

    def make_block(self, layer: int) -> nn.Module:
        """The last layer has values that are added to."""
        block = Block(self.config, layer)
        if layer == self.config.layers - 1:
            block.attention = AddedValues(self.config, layer)
        return block

    def run_blocks(self, x: Tensor, freqs: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        states = [x]
        for block in self.blocks[:-1]:
            if trace is not None:
                trace.stream(states[-1])
            states.append(block(states[-1], freqs, cache))
        first, early, late, x = states[0], states[self.early], states[self.late], states[-1]
        for_values, for_stream = self.before(x).chunk(2)
        values_reader, stream_reader, head = self._readers()
        values = _mixed(values_reader, for_values, [first, late, x], trace)
        y: Tensor = x + _mixed(stream_reader, for_stream, [first, late, x], trace)
        if trace is not None:
            trace.stream(y)
        y = self.blocks[-1](y, freqs, cache, History(values=[values]))
        return y + _mixed(head, self.after(y), [first, early, late, x], trace)

    def reads(self) -> Reads:
        """Before the last layer, which reads the state x anyway, and after it, when x is a state like the others."""
        first, early, late, x = (layer_name(n) for n in (0, self.early, self.late, self.config.layers - 1))
        before = tuple("own state" if name == x else name for name in (first, late, x))
        values, stream, head = self._readers()
        return {values: before, stream: before, head: (first, early, late, x)}

    def _readers(self) -> tuple[str, str, str]:
        last = layer_name(self.config.layers)
        return f"{last} values", f"{last} residual", HEAD

    def macs(self) -> int:
        """The matrices, and the sums."""
        return super().macs() + (3 + 3 + 4) * self.config.width

    def routers(self) -> list[str]:
        """Static and dynamic weights."""
        return [
            f"{place}.{name}" for place in ("before", "after") for name in ("static", "inner.weight", "outer.weight")
        ]
