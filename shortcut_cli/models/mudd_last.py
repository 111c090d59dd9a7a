"""MUDD where it pays most: the last two layers alone, their values and residual streams alone.

As trimmed in modded-nanogpt (record of 2026-04-22): sources are the embedding, the state in the middle and the current
one. Queries and keys read the mixed residual stream. The baseline at the start.
"""

from torch import Tensor, nn

from shortcut_cli.models.blocks import Block, Cache, Trace
from shortcut_cli.models.mixing import weighted_sum
from shortcut_cli.models.mudd import Routed, Router, StreamBlock
from shortcut_cli.recipe import ModelKeys

LAYERS = 2


class MuddLast(Routed):
    """The baseline whose last layers read two mixes of three states."""

    def __init__(self, keys: ModelKeys, vocabulary: int, seed: int | None = None) -> None:
        super().__init__(keys, vocabulary)
        self.first = max(1, keys.layers - LAYERS)  # the first layer that reads mixes
        self.middle = max(1, keys.layers // 2)
        self.mixes = nn.ModuleList(Router(keys.width, 2, 3) for _ in range(self.first, keys.layers))
        if seed is not None:
            self.initialise(seed)

    def make_block(self, layer: int) -> nn.Module:
        """The last two read streams."""
        late = layer >= max(1, self.keys.layers - LAYERS)
        return StreamBlock(self.keys, layer) if late else Block(self.keys, layer)

    def trunk(self, x: Tensor, table: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        del trace
        states = [x]
        for layer, block in enumerate(self.blocks):
            if not isinstance(block, StreamBlock):
                x = block(x, table, cache)
            else:
                read = [states[0], states[min(self.middle, layer)], x]
                weights = self.mixes[layer - self.first](x).permute(2, 3, 0, 1)  # (C, n, B, T)
                values, residual = (weighted_sum(weight, read) for weight in weights)
                x = block.read([residual, residual, values, residual], table, cache)
            states.append(x)
        return x
