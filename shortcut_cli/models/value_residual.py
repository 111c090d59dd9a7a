"""Value residual (ResFormer, Zhou et al. 2024, arXiv 2410.17897): every layer also reads the values of the first.

    V_l <- a_l V_1 + b_l V_l            l > 1, a_l and b_l scalars, 0.5 at first (the paper's learnable form)
    V_l <- V_l + relu(W_l x_l) V_1      gate = "token": a weight per token and head (SATFormer, arXiv 2605.03953)

The mixed values are cached, so that the cache is no larger.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shortcut_cli.config.schema import ModelConfig
from shortcut_cli.models.options import ValueResidualOptions
from shortcut_cli.models.trace import Reads, layer_name
from shortcut_cli.models.transformer import Attention, History, Linear, ReadingDecoder


class ValueAttention(Attention):
    """Attention whose values are mixed with those of the first layer."""

    def __init__(self, config: ModelConfig, layer: int, options: ValueResidualOptions) -> None:
        super().__init__(config, layer)
        self.share = nn.Parameter(torch.full((2,), 0.5)) if options.gate == "scalar" else None  # of V_1, of V_l
        self.gate = Linear(config.width, config.heads) if options.gate == "token" else None

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, history: History) -> Tensor:
        """(B, H, T, d)."""
        del q, k
        first = history.values[0]
        if self.gate is not None:
            gate = F.relu(self.gate(x)).mT  # (B, H, T)
            mixed = v + gate.unsqueeze(-1) * first
        else:
            assert self.share is not None
            mixed = self.share[0] * first + self.share[1] * v
        if history.trace is None:
            return mixed
        weights = self.share if self.share is not None else torch.stack((gate, torch.ones_like(gate)))
        return history.trace.summed(self.name, weights, [first, v], mixed)


class ValueResidual(ReadingDecoder):
    """The baseline with a value residual."""

    def make_attention(self, layer: int) -> Attention:
        """Above the first layer."""
        return ValueAttention(self.config, layer, self.config.value_residual)  # type: ignore[attr-defined]

    def reads(self) -> Reads:
        """The values of the first layer, beside their own."""
        return {layer_name(layer): (layer_name(1), "own values") for layer in range(2, self.config.layers + 1)}

    def macs(self) -> int:
        """The matrices, and the sums of two values, one of which has no weight before a gate."""
        weighted = 2 if self.config.value_residual.gate == "scalar" else 1  # type: ignore[attr-defined]
        return super().macs() + weighted * (self.config.layers - 1) * self.config.width

    def routers(self) -> list[str]:
        """The scalars or gates."""
        return ["attention.share", "attention.gate.weight"]
