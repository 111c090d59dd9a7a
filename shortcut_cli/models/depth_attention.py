"""Depth-Attention (Zeng et al. 2026, arXiv 2606.05014): a query first attends over the layers at its own position.

    V_l,t <- sum over i <= l of softmax_i(q_l,t . k_i,t / sqrt(d)) v_i,t

for each head; then attention as usual. No parameters. The mixed values replace the layer's own in the cache. Queries
and keys are rotated by their time; at one time the rotation is the same, so their products stay.

Written from the abstract, which does not say whether v_i of a lower layer is the value after mixing (`values` = mixed)
or before it (raw). In the authors' code (LUMIA-Group/Depth-Attention, modeling_llama_depth_attention.py) it is the one
after it, and the scale is the one here; of the layers below only every n-th is read there, n half of the layers by
default, and here all.
"""

import torch
from torch import Tensor

from shortcut_cli.config.schema import ModelConfig
from shortcut_cli.kernels.depth import weighted_sum
from shortcut_cli.models.options import DepthAttentionOptions
from shortcut_cli.models.trace import Reads, layer_name
from shortcut_cli.models.transformer import Attention, History, ReadingDecoder


class DepthMixing(Attention):
    """Attention whose values are a mix over the layers up to this one."""

    def __init__(self, config: ModelConfig, layer: int, options: DepthAttentionOptions) -> None:
        super().__init__(config, layer)
        self.mixed = options.values == "mixed"

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, history: History) -> Tensor:
        """(B, H, T, d)."""
        v = super().mix(x, q, k, v, history)
        keys, values, kept = history.keys, history.values, list(range(len(history.keys)))
        if history.trace is not None:
            pairs = history.trace.keyed(self.name, keys, values)
            kept, keys, values = list(pairs), [key for key, _ in pairs.values()], [value for _, value in pairs.values()]
        scores = [(q * key).sum(-1, keepdim=True) for key in keys]  # (B, H, T, 1) each
        shares = (torch.stack(scores).float() * q.shape[-1] ** -0.5).softmax(0)
        v = weighted_sum(shares, values).type_as(v)
        if history.trace is not None:
            history.trace.record(self.name, kept, shares.squeeze(-1))
        if self.mixed:
            history.values[-1] = v
        return v


class DepthAttention(ReadingDecoder):
    """The baseline with values mixed over depth."""

    softmax_reads = True

    def make_attention(self, layer: int) -> Attention:
        """Above the first layer."""
        return DepthMixing(self.config, layer, self.config.depth_attention)  # type: ignore[attr-defined]

    def reads(self) -> Reads:
        """The layers below, beside its own values."""
        layers = range(2, self.config.layers + 1)
        return {layer_name(layer): (*map(layer_name, range(1, layer)), "own values") for layer in layers}

    def macs(self) -> int:
        """The matrices; a score and a share of the sum for each layer up to each."""
        layers = self.config.layers
        return super().macs() + 2 * (layers * (layers + 1) // 2 - 1) * self.config.width
