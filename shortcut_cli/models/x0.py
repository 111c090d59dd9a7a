"""The cheapest way to reach back: every layer also reads the embedding of its token.

    x <- r_l x + a_l norm(x_0)            r_l = 1 and a_l = 0 at first: the baseline

From nanochat (Karpathy 2025, nanochat/gpt.py: resid_lambdas and x0_lambdas). r multiplies the whole stream, layer after
layer, so it gets a hundredth of the learning rate of a, as there. The norm has no weights.
"""

import torch
from torch import Tensor, nn

from shortcut_cli.config.schema import ModelConfig
from shortcut_cli.kernels.cpu import unit_norm
from shortcut_cli.kernels.depth import weighted_sum
from shortcut_cli.models.trace import Reads, Trace, layer_name
from shortcut_cli.models.transformer import Cache, Decoder


class X0(Decoder):
    """The baseline whose layers read the embedding too."""

    def __init__(self, config: ModelConfig, vocabulary: int, seed: int | None = None) -> None:
        super().__init__(config, vocabulary)
        self.carry = nn.Parameter(torch.ones(config.layers))  # r
        self.again = nn.Parameter(torch.zeros(config.layers))  # a
        if seed is not None:
            self.initialise(seed)

    def run_blocks(self, x: Tensor, freqs: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        first = unit_norm(x)
        for layer, weights in enumerate(torch.stack((self.carry, self.again), 1)):
            read = weighted_sum(weights, [x, first])
            if trace is not None:
                read = trace.summed(layer_name(layer + 1), weights, [x, first], read)
                trace.stream(read)
            x = self.blocks[layer](read, freqs, cache)
        return x

    def reads(self) -> Reads:
        """The embedding, beside the state below."""
        return {layer_name(layer): ("own state", "embedding") for layer in range(1, self.config.layers + 1)}

    def macs(self) -> int:
        """The matrices, and a sum of two states per layer."""
        return super().macs() + 2 * self.config.layers * self.config.width

    def routers(self) -> list[str]:
        """Both kinds of scalars."""
        return ["carry", "again"]

    def rates(self) -> dict[str, float]:
        """A hundredth for the scalars that multiply the stream."""
        return {"carry": 0.01}
