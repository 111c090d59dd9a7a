"""Depth-Attention (Zeng et al. 2026, arXiv 2606.05014): a query first attends over the layers at its own position.

    V_l,t <- sum over i <= l of softmax_i(q_l,t . k_i,t / sqrt(d)) v_i,t

for each head, then attention as ever. No parameters. The mixed values take the place of the layer's own in the cache.
The paper's abstract and our notes of its formula were at hand, not its code: that v_i are the values before mixing, and
the scale, are our reading. Keys are turned by their time, which two vectors of one time share, so products stay.
"""

import torch
from torch import Tensor

from shortcut_cli.models.blocks import Attention, History, ReadingDecoder
from shortcut_cli.models.mixing import weighted_sum


class DepthMixing(Attention):
    """Attention whose values are a mix over the layers up to this one."""

    def mix(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, history: History) -> Tensor:
        """(B, H, T, d)."""
        v = super().mix(x, q, k, v, history)
        scores = [(q * key).sum(-1, keepdim=True) for key in history.keys]  # (B, H, T, 1) each
        shares = (torch.stack(scores).float() * q.shape[-1] ** -0.5).softmax(0)
        return weighted_sum(shares, history.values).type_as(v)


class DepthAttention(ReadingDecoder):
    """The baseline with values that are mixed over depth."""

    def attention(self, layer: int) -> Attention:
        """Above the first layer."""
        return DepthMixing(self.keys, layer)
