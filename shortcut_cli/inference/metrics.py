"""Figures computed from losses and counts: entropy, bits per natural unit, and confidence intervals."""

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def entropy(counts: npt.NDArray[np.int64]) -> float:
    """Entropy in nats of the distribution that `counts` describe."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def bits_per_unit(nats: float, units: float) -> float:
    """Bits per natural unit, for a total of `nats` over a total of `units`."""
    return nats / math.log(2) / units


def bootstrap(nats: Floats, tokens: Floats, resamples: int, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of sum(nats) / sum(tokens), from resampling groups (documents) with replacement.

    nats, tokens: totals per group, (groups,); those without tokens do not count. Efron and Tibshirani 1993, chapter 13.
    """
    nats, tokens = nats[tokens > 0], tokens[tokens > 0]
    generator = np.random.default_rng(seed)
    ratios = np.empty(resamples)
    for number in range(resamples):
        drawn = generator.integers(0, len(nats), len(nats))
        ratios[number] = nats[drawn].sum() / tokens[drawn].sum()
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)
