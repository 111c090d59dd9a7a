"""The ladder: baselines of several sizes, and where between them an arm stands at its own cost.

With C the cost of a rung (training FLOPs, parameters or seconds) and x = log C, for the means m over seeds,

    m[rung] = a + b x[rung] + c x[rung]^2 + d[rung],   d ~ N(0, V),   V = tau^2 + variance / seeds

It is a hierarchical model: runs in rungs, rungs about the line. `variance` is that of a run about its rung and its
seed, pooled over all arms (`significance.residual`); the effect of a seed is the same at every rung, since all have the
same seeds, and so only moves a. tau is whatever is constant over the seeds of a rung: that its learning rate is not
quite the best, which no test over seeds alone can see. An arm has it too. So the contrast of an arm with the line at
its own cost has the variance V (1 + h), with X the rows (1, x, x^2) of the rungs and

    h = row (X^T X)^-1 row^T,   row = (1, x, x^2) of the arm

The loss falls ever more slowly with the cost, since data and steps limit it too (Hoffmann et al. 2022): over a ladder
it is a straight line only as far as chance hides the rest. c is 0 unless a t-test at 5 % finds it.

With a handful of rungs, tau is poorly known: the scatter of the means about the line has few degrees of freedom.
V is that scatter by itself if it is larger than seeds explain, by an F-test at 15 %; else it is pooled with the
variance over seeds ("sometimes pool": Bancroft 1944). docs/protocol.md has the error rates of benchmarks/protocol.py,
tests/test_ladder.py simulates some of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

from shortcut_cli.compare.asked import LEAST_RUNGS
from shortcut_cli.compare.significance import Floats, Noise

BAND = 33  # costs at which the band is given
CURVED = 0.05  # level of the test of c: above it, the line is straight
POOLED = 0.15  # level of the F-test: above it, the scatter of the rungs is pooled with the variance over seeds


@dataclass(frozen=True)
class Ladder:
    """Rungs and the line through the means of their losses, straight or curved."""

    places: Floats  # (R,) log of the cost
    means: Floats  # (R,) nats per token
    degree: int  # 1 or 2
    scatter: Noise  # of the means of the rungs about the line

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """a, b and c; c is 0 for a straight line."""
        middle = float(self.places.mean())
        c0, c1, c2 = (*map(float, _solved(self.places - middle, self.means, self.degree)), 0.0)[:3]
        return c0 - c1 * middle + c2 * middle**2, c1 - 2 * c2 * middle, c2

    def at(self, cost: float) -> Floats:
        """The weights of the rungs, (R,), in the line's loss at a cost."""
        middle = self.places.mean()
        row = np.vander([math.log(cost) - middle], self.degree + 1, increasing=True)[0]
        rows = np.vander(self.places - middle, self.degree + 1, increasing=True)
        return np.asarray(row @ np.linalg.pinv(rows), np.float64)

    def loss(self, cost: float) -> float:
        """The line's loss at a cost."""
        return float(self.at(cost) @ self.means)

    def lacks(self, cost: float, what: str) -> str:
        """Why there is nothing to compare with at a cost, of a kind; empty if there is."""
        least, most = math.exp(self.places.min()), math.exp(self.places.max())
        if least <= cost * (1 + 1e-12) and cost <= most * (1 + 1e-12):
            return ""
        own, low, high = (f"{each:,.0f}" if each >= 1000 else f"{each:.4g}" for each in (cost, least, most))
        return f"its {what}, {own}, are not between those of the ladder, {low} to {high}"


def _solved(places: Floats, means: Floats, degree: int) -> Floats:
    """The coefficients of the least-squares polynomial, from the constant on."""
    rows = np.vander(places, degree + 1, increasing=True)
    return np.asarray(np.linalg.lstsq(rows, means, rcond=None)[0], np.float64)


def fit(costs: Sequence[float], losses: Floats, residual: Noise | None) -> Ladder:
    """The ladder through rungs: costs (R,), at least LEAST_RUNGS and not all equal; losses (R, S).

    residual: see `noise`.
    """
    assert len(costs) >= LEAST_RUNGS, f"{len(costs)} rungs, not {LEAST_RUNGS}"
    places, means = np.log(np.asarray(costs, np.float64)), losses.mean(1)
    centred = places - places.mean()

    def fitted(degree: int) -> Ladder:
        left = means - np.vander(centred, degree + 1, increasing=True) @ _solved(centred, means, degree)
        freedom = len(places) - degree - 1
        return Ladder(places, means, degree, Noise(float(left @ left) / freedom, freedom))

    straight = fitted(1)
    if len(set(costs)) < LEAST_RUNGS:  # of three, or of three and a repetition, a parabola leaves nothing to judge by
        return straight
    curved = fitted(2)
    gained = straight.scatter.freedom * straight.scatter.variance - curved.scatter.freedom * curved.scatter.variance
    chance = noise(curved.scatter, residual, losses.shape[1])[0]
    clear = chance.variance == 0 or stats.f.sf(gained / chance.variance, 1, chance.freedom) < CURVED
    return curved if clear and gained > 0 else straight


def noise(scatter: Noise, residual: Noise | None, seeds: int) -> tuple[Noise, bool]:
    """The variance V of the mean of an arm, and whether it is that of the rungs alone.

    scatter: of the means about the line; residual: of a run, None with one seed: then the scatter is all that is known.
    """
    if residual is None:
        return scatter, True
    over = residual.over(seeds)
    freedom = scatter.freedom + over.freedom
    total = scatter.freedom * scatter.variance + over.freedom * over.variance
    if scatter.variance <= over.variance:
        return Noise(total / freedom, freedom), False
    alone = over.variance == 0 or stats.f.sf(scatter.variance / over.variance, scatter.freedom, over.freedom) < POOLED
    return (scatter, True) if alone else (Noise(total / freedom, freedom), False)


def band(ladder: Ladder, noise: Noise) -> list[dict[str, float]]:
    """The line between the rungs, "loss" by "cost", with "low" and "high" for an arm that lies on it.

    An arm is outside of this band where the 95 % interval of its contrast excludes 0. noise: V, see above.
    """
    found = []
    for place in np.linspace(ladder.places.min(), ladder.places.max(), BAND):
        weights = ladder.at(math.exp(place))
        loss, reach = float(weights @ ladder.means), noise.reach(1 + float(weights @ weights))
        found.append({"cost": math.exp(place), "loss": loss, "low": loss - reach, "high": loss + reach})
    return found


def gain(ladder: Ladder, cost: float, difference: float, noise: Noise) -> dict[str, Any]:
    """The compute-equivalent gain: by what factor an arm's cost would have to rise for the ladder to reach its loss.

    difference: arm minus ladder at its cost, nats per token. The interval has the factors by which the cost may be
    multiplied without a 95 % test telling the arm's loss from the ladder's there: Fieller's (1954), as in calibration
    by a fitted line (Draper and Smith 1998, section 3.2). "gain" and "interval_95", of which an end that lies beyond
    the ladder is None; or "reason" why there is none: the slope or the gain lies beyond what the ladder can say.
    """
    least, most = float(ladder.places.min()), float(ladder.places.max())
    first, last = ladder.at(math.exp(least)), ladder.at(math.exp(most))
    _, b, c = ladder.coefficients
    fallen = float((first - last) @ ladder.means)
    if fallen <= noise.reach(float((first - last) @ (first - last))):
        return {"reason": "the loss of the ladder does not fall clearly with its cost"}
    if max(b + 2 * c * least, b + 2 * c * most) >= 0:
        return {"reason": "the curve of the ladder rises at an end"}
    place, loss = math.log(cost), ladder.loss(cost) + difference

    def above(other: float) -> float:
        return ladder.loss(math.exp(other)) - loss

    if not above(least) >= 0 >= above(most):
        return {"reason": f"its loss is that of a cost {'above' if above(most) > 0 else 'below'} all of the ladder's"}
    equal = float(optimize.brentq(above, least, most))

    def told_apart(other: float) -> float:
        weights = ladder.at(math.exp(other))
        return abs(above(other)) - noise.reach(1 + float(weights @ weights))

    ends = [optimize.brentq(told_apart, equal, end) if told_apart(end) > 0 else None for end in (least, most)]
    return {
        "gain": math.exp(equal - place),
        "interval_95": [None if end is None else math.exp(end - place) for end in ends],
    }
