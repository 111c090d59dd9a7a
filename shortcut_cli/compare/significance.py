"""Statistics of a comparison over seeds: paired confidence intervals, p-values, and the smallest detectable difference.

A difference is arm minus baseline in nats per token, one per seed, so a negative one favours the arm. Runs are paired
by seed: equal seeds give the same data order, and the same initial weights for parameters of equal name and shape.
Uncertainty over seeds and uncertainty over test documents are reported separately.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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
    """An arm against its baseline over n seeds. With one seed, what needs a variance is None."""

    seeds: int
    mean: float
    interval_95: tuple[float, float] | None  # of the mean, by Student's t with n - 1 degrees of freedom
    p: float | None  # paired t-test, two-sided
    wins: int  # seeds at which the arm has the lower loss
    detectable: float | None  # true difference that the t-test at 5 % detects with power 0.8
    p_equal: float | None  # two one-sided tests (TOST) for a true difference within the margin
    p_holm: float | None = None  # p, adjusted for the number of arms; see `adjusted`

    def content(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return asdict(self)


def contrast(differences: Sequence[float], margin: float) -> Contrast:
    """Test paired differences, one per seed. margin: of equivalence, in their unit."""
    found = np.asarray(differences, np.float64)
    count, mean = len(found), float(found.mean())
    wins = int((found < 0).sum())
    if count < 2:
        return Contrast(count, mean, None, None, wins, None, None)
    spread = float(found.std(ddof=1)) / math.sqrt(count)  # standard error of the mean
    if spread == 0:  # the same difference at every seed
        p = 0.0 if mean else 1.0
        return Contrast(count, mean, (mean, mean), p, wins, 0.0, 0.0 if abs(mean) < margin else 1.0)
    freedom = count - 1
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, freedom)) * spread
    p = float(2 * stats.t.sf(abs(mean) / spread, freedom))
    below, above = stats.t.sf((mean + margin) / spread, freedom), stats.t.cdf((mean - margin) / spread, freedom)
    return Contrast(
        count, mean, (mean - reach, mean + reach), p, wins, detectable(count) * spread, float(max(below, above))
    )


@cache
def detectable(count: int) -> float:
    """True mean difference, in standard errors, that a paired two-sided t-test at 5 % detects with power 0.8.

    The statistic is (Z + d) / S with Z standard normal and S^2 chi-square divided by its degrees of freedom, so the
    power at d is the mean over S of P(|Z + d| > limit S). scipy's noncentral t returns NaN for few degrees of freedom.
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


def adjusted(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """The same contrasts with `p_holm`, adjusted for all of them that have a p."""
    p_values = iter(holm([one.p for one in contrasts if one.p is not None]))
    return [one if one.p is None else replace(one, p_holm=next(p_values)) for one in contrasts]


def over_documents(
    arm: Floats, baseline: Floats, tokens: Floats, resamples: int = 2000, seed: int = 1
) -> tuple[float, float]:
    """95 % bootstrap interval of the difference in nats per token over test documents, resampled together for both.

    arm, baseline: nats of each document, averaged over seeds, (n,); tokens: of each document, (n,).
    """
    rng = np.random.default_rng(seed)
    differences, means = arm - baseline, np.empty(resamples)
    for number in range(resamples):  # one at a time: a split may have a million documents
        drawn = rng.integers(0, len(tokens), len(tokens))
        means[number] = differences[drawn].sum() / tokens[drawn].sum()
    low, high = np.quantile(means, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)


def verdict(arm: str, baseline: str, found: Contrast, margin: float) -> str:
    """The result in one sentence."""
    if found.p is None:
        side = "below" if found.mean < 0 else "above"
        return f"{arm} is {abs(found.mean):.4f} nats per token {side} {baseline} (one seed, no test)."
    p = found.p if found.p_holm is None else found.p_holm
    shown = f"{'p' if found.p_holm is None else 'Holm-adjusted p'} = {p:.2g}"
    if p < 1 - LEVEL:
        better = "beats" if found.mean < 0 else "loses to"
        return f"{arm} {better} {baseline} by {abs(found.mean):.4f} nats per token ({found.seeds} seeds, {shown})."
    if found.p_equal is not None and found.p_equal < 1 - LEVEL:
        return (
            f"{arm} and {baseline} are equivalent within {margin} nats per token "
            f"({found.seeds} seeds, TOST p = {found.p_equal:.2g})."
        )
    return (
        f"No significant difference between {arm} and {baseline} ({found.mean:+.4f} nats per token, {shown}); "
        f"{found.seeds} seeds detect a difference of {found.detectable:.4f} with {100 * POWER:.0f} % power."
    )
