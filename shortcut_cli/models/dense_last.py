"""A control: the head reads one learned, static mix of the embedding and all layers (DenseFormer's `connect_to_last`).

    Y = sum over j <= L of a_j X_j            a_L = 1 and the rest 0 at first

What a shortcut gains over this, it gains by looking at the tokens.
"""

import torch
from torch import Tensor, nn

from shortcut_cli.config.schema import ModelConfig
from shortcut_cli.kernels.depth import weighted_sum
from shortcut_cli.models.trace import HEAD, Reads, Trace, layer_name
from shortcut_cli.models.transformer import Cache, Decoder


class DenseLast(Decoder):
    """The baseline with a static mix of all states before the last norm."""

    def __init__(self, config: ModelConfig, vocabulary: int, seed: int | None = None) -> None:
        super().__init__(config, vocabulary)
        self.mix = nn.Parameter(torch.tensor([0.0] * config.layers + [1.0]))
        if seed is not None:
            self.initialise(seed)

    def run_blocks(self, x: Tensor, freqs: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        states = [x]
        for block in self.blocks:
            if trace is not None:
                trace.stream(states[-1])
            states.append(block(states[-1], freqs, cache))
        x = weighted_sum(self.mix, states)
        return x if trace is None else trace.summed(HEAD, self.mix, states, x)

    def reads(self) -> Reads:
        """All states, the last of which is the one that a head reads anyway."""
        return {HEAD: (*map(layer_name, range(self.config.layers)), "own state")}

    def macs(self) -> int:
        """The matrices, and the mix."""
        return super().macs() + len(self.mix) * self.config.width

    def routers(self) -> list[str]:
        """The mix."""
        return ["mix"]
