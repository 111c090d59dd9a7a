"""Products in bf16 while sampling: half the bytes of weights to read for each token.

Only the products are in bf16, each rounded once to its result; residual stream, norms, attention and its cache, and
logits stay in fp32. A cache in bf16 would be slower on a CPU: torch's kernels convert it number by number.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shortcut_cli.models.transformer import Decoder, Linear


class Rounded(nn.Module):
    """A Linear whose weights are in bf16; on a CPU that multiplies bf16, in the order in which oneDNN reads them."""

    def __init__(self, linear: Linear, rows: int) -> None:
        super().__init__()
        self.weight = linear.weight  # for what reads it directly
        self.rounded = linear.weight.detach().bfloat16()
        self.packed: Tensor | None = None
        if self.rounded.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.rounded, rows)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of x."""
        if self.packed is None:
            return F.linear(x.bfloat16(), self.rounded).type_as(x)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.packed, None, "none", [], "")
        return y.type_as(x)


@contextmanager
def rounded(model: Decoder, rows: int) -> Iterator[None]:
    """In this block, the model multiplies in bf16; packed for this many rows at once, though it takes any number."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, Linear)
    ]
    for parent, name, linear in found:
        setattr(parent, name, Rounded(linear, rows))
    try:
        yield
    finally:
        for parent, name, linear in found:
            setattr(parent, name, linear)
