"""DenseFormer (Pagliardini et al. 2024, arXiv 2402.02622): each layer's input is a learned mix of all states below.

    Y_i = sum over j <= i of a_ij X_j        X_0 the embedding, X_i = layer_i(Y_{i-1}), scalars, Y_i = X_i at first

Every `period` layers, over every `dilation`th state (their DWA).
"""

import torch
from torch import Tensor, nn

from shortcut_cli.models.blocks import Cache, Decoder, Trace
from shortcut_cli.models.mixing import weighted_sum
from shortcut_cli.models.options import DenseFormerOptions
from shortcut_cli.recipe import ModelKeys


class DenseFormer(Decoder):
    """The baseline with a static mix of states after its layers."""

    def __init__(self, keys: ModelKeys, vocabulary: int, seed: int | None = None) -> None:
        options: DenseFormerOptions = keys.denseformer  # type: ignore[attr-defined]
        super().__init__(keys, vocabulary)
        self.read = {
            layer: list(range(layer % options.dilation, layer + 1, options.dilation))
            for layer in range(options.period, keys.layers + 1, options.period)
        }
        self.mixes = nn.ParameterDict({str(layer): nn.Parameter(_last(len(read))) for layer, read in self.read.items()})
        if seed is not None:
            self.initialise(seed)

    def trunk(self, x: Tensor, table: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        del trace
        states = [x]
        for layer, block in enumerate(self.blocks, 1):
            x = block(x, table, cache)
            states.append(x)
            if layer in self.read:
                x = weighted_sum(self.mixes[str(layer)], [states[j] for j in self.read[layer]])
        return x

    def routers(self) -> list[str]:
        """The mixes."""
        return [f"mixes.{layer}" for layer in self.read]


def _last(count: int) -> Tensor:
    weights = torch.zeros(count)
    weights[-1] = 1
    return weights
