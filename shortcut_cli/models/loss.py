"""Cross-entropy, the same for training and evaluation."""

from torch import Tensor
from torch.nn import functional as F


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token, fp32: logits (B, T, V), targets (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token in nats, fp32 (B, T): logits (B, T, V), targets (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)
