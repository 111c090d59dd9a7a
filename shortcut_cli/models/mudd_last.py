"""MUDD where it pays most: only in the last two layers, only for their values and residual streams.

As trimmed in modded-nanogpt (record of 2026-04-22): the sources are the embedding, the state in the middle and the
current one. Queries and keys read the mixed residual stream. At the start it is the baseline.
"""

from torch import Tensor, nn

from shortcut_cli.config.schema import ModelConfig
from shortcut_cli.kernels.depth import weighted_sum
from shortcut_cli.models.mudd import Routed, Router, StreamBlock
from shortcut_cli.models.transformer import Block, Cache, Trace

LAYERS = 2


class MuddLast(Routed):
    """The baseline whose last layers read two mixes of three states."""

    def __init__(self, config: ModelConfig, vocabulary: int, seed: int | None = None) -> None:
        super().__init__(config, vocabulary)
        self.first = max(1, config.layers - LAYERS)  # the first layer that reads mixes
        self.middle = max(1, config.layers // 2)
        self.mixes = nn.ModuleList(Router(config.width, 2, 3) for _ in range(self.first, config.layers))
        if seed is not None:
            self.initialise(seed)

    def make_block(self, layer: int) -> nn.Module:
        """The last two layers read streams."""
        late = layer >= max(1, self.config.layers - LAYERS)
        return StreamBlock(self.config, layer) if late else Block(self.config, layer)

    def run_blocks(self, x: Tensor, freqs: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        del trace
        states = [x]
        for layer, block in enumerate(self.blocks):
            if not isinstance(block, StreamBlock):
                x = block(x, freqs, cache)
            else:
                read = [states[0], states[min(self.middle, layer)], x]
                weights = self.mixes[layer - self.first](x).permute(2, 3, 0, 1)  # (C, n, B, T)
                values, residual = (weighted_sum(weight, read) for weight in weights)
                x = block.read([residual, residual, values, residual], freqs, cache)
            states.append(x)
        return x
