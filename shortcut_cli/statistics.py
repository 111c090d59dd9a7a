"""What a comparison over seeds can say: paired intervals, exact p-values, and what it could not have seen.

A difference is arm minus opponent in nats per token, one for each seed, so a negative one is in the arm's favour. Seeds
pair runs: equal seeds give equal data order and equal initial weights where names and shapes agree. Uncertainty over
seeds and over test documents are two things and are kept apart.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import integrate, optimize, stats

LEVEL = 0.95
POWER = 0.8
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Contrast:
    """An arm against its opponent over n seeds. What one seed alone can't say is None."""

    seeds: int
    mean: float
    interval_95: tuple[float, float] | None  # of the mean, from Student's t with n - 1 degrees of freedom
    p: float | None  # paired t-test, two-sided
    wins: int  # seeds at which the arm is lower
    detectable: float | None  # the smallest true difference that n such seeds would find 4 times in 5, at 5 %
    p_equal: float | None  # two one-sided tests: that the true difference is within the margin
    p_holm: float | None = None  # p, adjusted for the number of arms

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def contrast(differences: Sequence[float], margin: float) -> Contrast:
    """Test paired differences, one a seed; margin: of equality, in their unit."""
    found = np.asarray(differences, np.float64)
    count, mean = len(found), float(found.mean())
    wins = int((found < 0).sum())
    if count < 2:
        return Contrast(count, mean, None, None, wins, None, None)
    spread = float(found.std(ddof=1)) / math.sqrt(count)  # standard error of the mean
    if spread == 0:  # runs that do not differ in their differences: the mean is all there is
        sure = 0.0 if mean else 1.0
        return Contrast(count, mean, (mean, mean), sure, wins, 0.0, 0.0 if abs(mean) < margin else 1.0)
    freedom = count - 1
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * spread
    p = float(2 * stats.t.sf(abs(mean) / spread, freedom))
    below, above = stats.t.sf((mean + margin) / spread, freedom), stats.t.cdf((mean - margin) / spread, freedom)
    return Contrast(
        count, mean, (mean - reach, mean + reach), p, wins, detectable(count) * spread, float(max(below, above))
    )


@cache
def detectable(count: int) -> float:
    """True mean difference, in standard errors, that a paired two-sided t-test at 5 % finds with power 0.8.

    The statistic is (Z + d) / S with Z normal and S^2 chi-square over its degrees of freedom, so the power at d is the
    mean over S of P(|Z + d| > limit S). scipy's own noncentral t gives no number for few degrees of freedom.
    """
    freedom = count - 1
    limit = float(stats.t.ppf(0.5 + LEVEL / 2, freedom))
    spread = stats.chi(freedom, scale=1 / math.sqrt(freedom))

    def lacking(shift: float) -> float:
        def share(s: float) -> float:
            return float((stats.norm.sf(limit * s - shift) + stats.norm.cdf(-limit * s - shift)) * spread.pdf(s))

        return float(integrate.quad(share, 0, spread.isf(1e-9), limit=200)[0]) - POWER

    return float(optimize.brentq(lacking, 0.0, 3 * limit + 10))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979): each p times the number of hypotheses not yet rejected, never decreasing."""
    order = np.argsort(p_values)
    adjusted = [0.0] * len(p_values)
    worst = 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def over_documents(
    arm: Floats, opponent: Floats, tokens: Floats, resamples: int = 2000, seed: int = 1
) -> tuple[float, float]:
    """95 % interval of the difference in nats per token from resampling test documents, the same for both.

    arm, opponent: summed nats of each document, (n,), summed or averaged over seeds; tokens: of each document, (n,).
    """
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(tokens), (resamples, len(tokens)))
    means = (arm - opponent)[draws].sum(1) / tokens[draws].sum(1)
    low, high = np.quantile(means, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)


def verdict(arm: str, opponent: str, found: Contrast, margin: float) -> str:
    """One plain sentence."""
    if found.p is None:
        return f"{arm} is {abs(found.mean):.4f} nats per token {_side(found.mean)} {opponent}, on one seed: no test."
    p = found.p if found.p_holm is None else found.p_holm
    if p < 1 - LEVEL:
        better = "beats" if found.mean < 0 else "loses to"
        return (
            f"{arm} {better} {opponent} by {abs(found.mean):.4f} nats per token (p = {p:.2g} over {found.seeds} seeds)."
        )
    if found.p_equal is not None and found.p_equal < 1 - LEVEL:
        return f"{arm} and {opponent} are equal within {margin} nats per token (p = {found.p_equal:.2g})."
    return (
        f"No difference shown between {arm} and {opponent} ({found.mean:+.4f} nats per token, p = {p:.2g}); "
        f"{found.seeds} seeds would have found {found.detectable:.4f} four times in five."
    )


def _side(mean: float) -> str:
    return "below" if mean < 0 else "above"
