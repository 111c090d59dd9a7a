"""DenseFormer (Pagliardini et al. 2024, arXiv 2402.02622): each layer's input is a learned mix of all states below.

    Y_i = sum over j <= i of a_ij X_j        X_0 the embedding, X_i = layer_i(Y_{i-1}), a_ij scalars, Y_i = X_i at first

After every `period` layers, over every `dilation`-th state (the paper's DWA).
"""

import torch
from torch import Tensor, nn

from shortcut_cli.config.schema import ModelConfig
from shortcut_cli.kernels.depth import weighted_sum
from shortcut_cli.models.options import DenseFormerOptions
from shortcut_cli.models.trace import Reads, Trace, layer_name, reader_name
from shortcut_cli.models.transformer import Cache, Decoder


class DenseFormer(Decoder):
    """The baseline with a static mix of states after its layers."""

    def __init__(self, config: ModelConfig, vocabulary: int, seed: int | None = None) -> None:
        options: DenseFormerOptions = config.denseformer  # type: ignore[attr-defined]
        super().__init__(config, vocabulary)
        self.read = {
            layer: list(range(layer % options.dilation, layer + 1, options.dilation))
            for layer in range(options.period, config.layers + 1, options.period)
        }
        self.mixes = nn.ParameterDict({str(layer): nn.Parameter(_last(len(read))) for layer, read in self.read.items()})
        if seed is not None:
            self.initialise(seed)

    def run_blocks(self, x: Tensor, freqs: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        states = [x]
        for layer, block in enumerate(self.blocks, 1):
            if trace is not None:
                trace.stream(x)
            x = block(x, freqs, cache)
            states.append(x)
            if layer in self.read:
                weights, below = self.mixes[str(layer)], [states[j] for j in self.read[layer]]
                x = weighted_sum(weights, below)
                if trace is not None:
                    x = trace.summed(reader_name(layer, self.config.layers), weights, below, x)
        return x

    def reads(self) -> Reads:
        """Of each mix: all states that are in it, the last of which is the one right below."""
        return {
            reader_name(layer, self.config.layers): (*map(layer_name, read[:-1]), "own state")
            for layer, read in self.read.items()
            if len(read) > 1
        }

    def macs(self) -> int:
        """The matrices, and the mixes."""
        return super().macs() + sum(map(len, self.read.values())) * self.config.width

    def routers(self) -> list[str]:
        """The mixes."""
        return [f"mixes.{layer}" for layer in self.read]


def _last(count: int) -> Tensor:
    weights = torch.zeros(count)
    weights[-1] = 1
    return weights
