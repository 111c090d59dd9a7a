"""Depth-Attention (Zeng et al. 2026, arXiv 2606.05014): a query first attends over the layers at its own position.

    V_l,t <- sum over i <= l of softmax_i(q_l,t . k_i,t / sqrt(d)) v_i,t

for each head; then attention as usual. No parameters. The mixed values replace the layer's own in the cache. Written
from the abstract and notes on the formula, without the code: that v_i are the values before mixing, and the scale, are
our reading. Queries and keys are rotated by their time; at one time the rotation is the same, so their products stay.
"""

import torch
from torch import Tensor

from shortcut_cli.kernels.depth import weighted_sum
from shortcut_cli.models.transformer import Attention, History, ReadingDecoder


class DepthMixing(Attention):
    """Attention whose values are a mix over the layers up to this one."""

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, history: History) -> Tensor:
        """(B, H, T, d)."""
        v = super().mix(x, q, k, v, history)
        scores = [(q * key).sum(-1, keepdim=True) for key in history.keys]  # (B, H, T, 1) each
        shares = (torch.stack(scores).float() * q.shape[-1] ** -0.5).softmax(0)
        return weighted_sum(shares, history.values).type_as(v)


class DepthAttention(ReadingDecoder):
    """The baseline with values mixed over depth."""

    def make_attention(self, layer: int) -> Attention:
        """Above the first layer."""
        return DepthMixing(self.config, layer)
