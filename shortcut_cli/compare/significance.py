"""Statistics of a comparison over seeds: contrasts, their intervals and p-values, and what they could have detected.

Losses form a matrix Y of arms by seeds, nats per token. Runs are paired by seed: equal seeds give the same data order,
and the same initial weights for parameters of equal name and shape. A contrast is a weighted sum of the arms' means,
so that a negative one favours the arm with weight 1. The model is

    Y[arm, seed] = mean[arm] + effect[seed] + e[arm, seed],   e ~ N(0, variance)

The effect of a seed cancels in a contrast, whose weights sum to 0. The variance of e is pooled over all arms (Cochran
and Cox 1957, chapter 4: randomized blocks, the blocks being seeds): with A arms and S seeds it has (A - 1)(S - 1)
degrees of freedom, instead of the S - 1 that a paired test of two arms has by itself. With two arms both are the same.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import integrate, optimize, stats

LEVEL = 0.95
ALPHA = 0.05  # of all the contrasts of a comparison together
POWER = 0.8
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Noise:
    """A variance, and its degrees of freedom."""

    variance: float
    freedom: int

    def over(self, count: int) -> "Noise":
        """That of the mean of `count` values."""
        return Noise(self.variance / count, self.freedom)

    def reach(self, scale: float) -> float:
        """Half the 95 % interval of a contrast whose squared weights sum to `scale`."""
        return float(stats.t.ppf(0.5 + LEVEL / 2, self.freedom)) * math.sqrt(scale * self.variance)


def residual(losses: Floats) -> Noise | None:
    """The variance of a run about its arm and its seed, pooled; losses: (A, S). None with fewer than two of either."""
    arms, seeds = losses.shape
    freedom = (arms - 1) * (seeds - 1)
    if not freedom:
        return None
    left = losses - losses.mean(1, keepdims=True) - losses.mean(0, keepdims=True) + losses.mean()
    return Noise(float((left**2).sum()) / freedom, freedom)


@dataclass(frozen=True)
class Uneven:
    """An arm whose runs scatter more than those of the other arms: standard deviations over seeds, nats per token."""

    arm: int
    own: float
    others: float
    p: float


def uneven(losses: Floats) -> list[Uneven]:
    """The arms that scatter more than the others, so that no pooled variance is theirs; losses: (A, S).

    The difference of an arm from the mean of the A - 1 others has the variance v + w / (A - 1), where v is its own and
    w that of the others, which their residual estimates independently. If v = w, the ratio of both estimates has an F
    distribution with S - 1 and (A - 2)(S - 1) degrees of freedom: one-sided, by Holm's procedure over all arms.
    """
    arms, seeds = losses.shape
    if arms < 3 or seeds < 2:
        return []
    found = []
    for arm in range(arms):
        rest = np.delete(losses, arm, 0)
        noise = residual(rest)
        assert noise
        variance = float((losses[arm] - rest.mean(0)).var(ddof=1))
        expected = noise.variance * arms / (arms - 1)
        ratio = variance / expected if expected else math.inf if variance else 0.0
        own = math.sqrt(max(0.0, variance - noise.variance / (arms - 1)))
        p = float(stats.f.sf(ratio, seeds - 1, noise.freedom))
        found.append(Uneven(arm, own, math.sqrt(noise.variance), p))
    return [one for one, p in zip(found, holm([one.p for one in found]), strict=True) if p < ALPHA]


def of_mean(losses: Sequence[float | None]) -> tuple[float, float] | None:
    """The 95 % interval of an arm's mean over seeds, by Student's t; None with one seed, or if a run diverged.

    The effect of the seeds is in it, but not in a contrast: the intervals of two arms may overlap though they differ.
    """
    known = np.array([loss for loss in losses if loss is not None], np.float64)
    if len(known) != len(losses) or len(known) < 2 or not np.isfinite(known).all():
        return None
    mean, reach = float(known.mean()), Noise(float(known.var(ddof=1)), len(known) - 1).over(len(known)).reach(1)
    return mean - reach, mean + reach


@dataclass(frozen=True)
class Contrast:
    """An arm against something else over n seeds. What needs a variance is None if there is none: with one seed."""

    seeds: int
    mean: float
    interval_95: tuple[float, float] | None  # of the mean, by Student's t
    p: float | None  # t-test, two-sided
    wins: int  # seeds at which the arm has the lower loss
    error: float | None  # standard error of the mean
    freedom: int | None  # degrees of freedom of `error`
    p_equal: float | None  # two one-sided tests (TOST) for a true difference within the margin
    p_holm: float | None = None  # p, adjusted for the number of contrasts; see `adjusted`
    level: float | None = None  # that p, and p_equal, are compared with; see `adjusted`
    detectable: float | None = None  # true difference that a test at `level` detects with power 0.8

    @property
    def differs(self) -> bool:
        """Whether the test at `level` finds a difference."""
        return None not in (self.p, self.level) and self.p < self.level  # type: ignore[operator]

    @property
    def equal(self) -> bool:
        """Whether the test at `level` finds a difference within the margin."""
        return None not in (self.p_equal, self.level) and self.p_equal < self.level  # type: ignore[operator]

    def content(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return asdict(self)


def contrast(differences: Floats, scale: float, noise: Noise | None, margin: float) -> Contrast:
    """Test a contrast.

    differences: its value at each seed, (S,); scale: sum of its squared weights; noise: of the mean of an arm over the
    seeds; margin: of equivalence, in nats per token.
    """
    count, mean = len(differences), float(np.mean(differences))
    wins = int((np.asarray(differences) < 0).sum())
    if noise is None:
        return Contrast(count, mean, None, None, wins, None, None, None)
    error, freedom = math.sqrt(scale * noise.variance), noise.freedom
    if error == 0:  # the same difference at every seed
        p, p_equal = (0.0 if mean else 1.0), (0.0 if abs(mean) < margin else 1.0)
        return Contrast(count, mean, (mean, mean), p, wins, 0.0, freedom, p_equal)
    reach = noise.reach(scale)
    p = float(2 * stats.t.sf(abs(mean) / error, freedom))
    below, above = stats.t.sf((mean + margin) / error, freedom), stats.t.cdf((mean - margin) / error, freedom)
    return Contrast(count, mean, (mean - reach, mean + reach), p, wins, error, freedom, float(max(below, above)))


@cache
def detectable(freedom: int, level: float) -> float:
    """True difference, in standard errors, that a two-sided t-test at `level` detects with power 0.8.

    The statistic is (Z + d) / S with Z standard normal and S^2 chi-square divided by its degrees of freedom, so the
    power at d is the mean over S of P(|Z + d| > limit S). scipy's noncentral t returns NaN for few degrees of freedom.
    Infinite if the level is 0.
    """
    if level <= 0:
        return math.inf
    limit = float(stats.t.isf(level / 2, freedom))
    spread = stats.chi(freedom, scale=1 / math.sqrt(freedom))

    def lacking(shift: float) -> float:
        def share(s: float) -> float:
            return float((stats.norm.sf(limit * s - shift) + stats.norm.cdf(-limit * s - shift)) * spread.pdf(s))

        return float(integrate.quad(share, 0, spread.isf(1e-9), limit=200)[0]) - POWER

    return float(optimize.brentq(lacking, 0.0, 3 * limit + 10))


def holm(p_values: Sequence[float], family: int = 0) -> list[float]:
    """Holm's step-down adjustment (1979): each p times the number of hypotheses not yet rejected, never decreasing.

    family: number of hypotheses, if it is larger than that of the p-values.
    """
    count = max(family, len(p_values))
    order = np.argsort(p_values)
    adjusted = [0.0] * len(p_values)
    worst = 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (count - rank) * p_values[index]))
        adjusted[index] = worst
    return adjusted


def levels(p_values: Sequence[float], family: int, spent: Callable[[float], float]) -> list[float]:
    """The level that Holm's procedure compares each p-value with.

    The smallest of m is compared with that of 0.05 / m, the next one with that of 0.05 / (m - 1), up to the first that
    is not below its level; the rest, which are not tested any more, have its level. spent: the level of this look at
    the data, of a level for all looks (see `looks.nominal`).
    """
    count = max(family, len(p_values))
    found = [0.0] * len(p_values)
    level, passed = 0.0, True
    for rank, index in enumerate(np.argsort(p_values)):
        if passed:
            level = spent(ALPHA / (count - rank))
            passed = p_values[index] < level
        found[index] = level
    return found


def adjusted(contrasts: Sequence[Contrast], family: int = 0, spent: Callable[[float], float] = float) -> list[Contrast]:
    """The same contrasts with `p_holm`, `level` and `detectable`, adjusted for all of them that have a p.

    family, spent: see `levels`; without them, these contrasts are all, and looked at once.
    """
    p_values = [one.p for one in contrasts if one.p is not None]
    found = iter(zip(holm(p_values, family), levels(p_values, family, spent), strict=True))
    return [one if one.p is None else _at(one, *next(found)) for one in contrasts]


def _at(one: Contrast, p_holm: float, level: float) -> Contrast:
    assert one.error is not None
    assert one.freedom is not None
    reached = one.error * detectable(one.freedom, level) if one.error else 0.0
    return replace(one, p_holm=p_holm, level=level, detectable=reached)


def crossed(nats: Floats, tokens: Floats, resamples: int = 2000, seed: int = 1) -> tuple[float, float]:
    """95 % bootstrap interval of a difference in nats per token over documents and seeds, both resampled.

    nats: the contrast's sum by seed and document, (S, n); tokens: of each document, (n,). Documents are drawn with
    replacement, and independently seeds: the pigeonhole bootstrap (Owen 2007), which never understates the variance of
    a mean of crossed effects. Of S seeds S - 1 are drawn, so that their part of the variance is unbiased (Rao and Wu
    1988, section 2). One seed is held fixed.
    """
    rng = np.random.default_rng(seed)
    seeds, documents = nats.shape
    drawn_seeds = rng.integers(0, seeds, (resamples, max(1, seeds - 1)))
    means = np.empty(resamples)
    for number in range(resamples):  # one at a time: a split may have a million documents
        drawn = rng.integers(0, documents, documents)
        total = nats[drawn_seeds[number]].mean(0) if seeds > 1 else nats[0]
        means[number] = total[drawn].sum() / tokens[drawn].sum()
    low, high = np.quantile(means, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)


def verdict(arm: str, other: str, found: Contrast, margin: float) -> str:
    """The result in one sentence."""
    side = "below" if found.mean < 0 else "above"
    if found.p is None or found.level is None:
        reason = "one seed" if found.seeds == 1 else "no variance"
        return f"{arm} is {abs(found.mean):.4f} nats per token {side} {other} ({reason}, no test)."
    if found.level <= 0:
        return (
            f"{arm} is {abs(found.mean):.4f} nats per token {side} {other}, without a verdict: earlier looks at "
            f"fewer seeds have spent the {100 * ALPHA:.0f} %."
        )
    shown = f"p = {found.p:.2g} at the level {found.level:.2g}"
    if found.differs:
        better = "beats" if found.mean < 0 else "loses to"
        return f"{arm} {better} {other} by {abs(found.mean):.4f} nats per token ({found.seeds} seeds, {shown})."
    if found.equal:
        return (
            f"{arm} and {other} are equivalent within {margin} nats per token "
            f"({found.seeds} seeds, TOST p = {found.p_equal:.2g})."
        )
    return (
        f"No significant difference between {arm} and {other} ({found.mean:+z.4f} nats per token, {shown}); "
        f"{found.seeds} seeds detect a difference of {found.detectable:.4f} with {100 * POWER:.0f} % power."
    )
