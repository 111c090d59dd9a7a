"""The loss, the same for training and evaluation, and what is computed from it."""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

Floats = npt.NDArray[np.float64]


def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per token, fp32: logits (B, T, V), targets (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token in nats, fp32 (B, T): logits (B, T, V), targets (B, T)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)


def entropy(counts: npt.NDArray[np.int64]) -> float:
    """Entropy in nats of the distribution that `counts` describe."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def bits_per_unit(nats: float, units: float) -> float:
    """Bits per natural unit of data that cost `nats` in all and measure `units`."""
    return nats / math.log(2) / units


def bootstrap(nats: Floats, tokens: Floats, resamples: int, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of sum(nats) / sum(tokens) when groups (documents) are drawn with replacement.

    nats, tokens: totals of each group, (groups,). Efron and Tibshirani 1993, chapter 13.
    """
    generator = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for number in range(resamples):
        drawn = generator.integers(0, len(nats), len(nats))
        ratios[number] = nats[drawn].sum() / tokens[drawn].sum()
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)
