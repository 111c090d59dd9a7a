"""A control: the head reads one learned, static mix of the embedding and all layers; DenseFormer's `connect_to_last`.

    Y = sum over j <= L of a_j X_j            a_L = 1, the rest 0 at first

What a shortcut gains over this, it gains by looking at the tokens.
"""

import torch
from torch import Tensor, nn

from shortcut_cli.models.blocks import Cache, Decoder, Trace
from shortcut_cli.models.mixing import weighted_sum
from shortcut_cli.recipe import ModelKeys


class DenseLast(Decoder):
    """The baseline with a static mix of all states before the last norm."""

    def __init__(self, keys: ModelKeys, vocabulary: int, seed: int | None = None) -> None:
        super().__init__(keys, vocabulary)
        self.mix = nn.Parameter(torch.tensor([0.0] * keys.layers + [1.0]))
        if seed is not None:
            self.initialise(seed)

    def trunk(self, x: Tensor, table: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        del trace
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1], table, cache))
        return weighted_sum(self.mix, states)

    def routers(self) -> list[str]:
        """The mix."""
        return ["mix"]
