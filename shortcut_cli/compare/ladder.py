"""The ladder: baselines of several sizes, and where between them an arm stands at its own cost.

With C the cost of a rung (training FLOPs, parameters or seconds), for the means m over seeds,

    m[rung] = a + b log C[rung] + d[rung],   d ~ N(0, V),   V = tau^2 + variance / seeds

It is a hierarchical model: runs in rungs, rungs about the line. `variance` is that of a run about its rung and its
seed, pooled over all arms (`significance.residual`); the effect of a seed is the same at every rung, since all have the
same seeds, and so only moves a. tau is whatever is constant over the seeds of a rung: that losses do not lie on a line,
and that its learning rate is not quite the best, which no test over seeds alone can see. An arm has it too. So the
contrast of an arm with the line at its own cost, x = log C, has the variance V times

    1 + 1 / rungs + (x - mean x)^2 / sum of (x[rung] - mean x)^2

With a handful of rungs, tau is poorly known: the scatter of the means about the line has rungs - 2 degrees of freedom.
V is that scatter by itself if it is larger than seeds explain, by an F-test at 15 %; else it is pooled with the
variance over seeds ("sometimes pool": Bancroft 1944). A null hypothesis is then rejected in 4 to 8.5 % of cases,
whatever tau is; if it were always pooled, in 42 % with tau^2 of five times the variance over seeds. docs/protocol.md
has the error rates, tests/test_ladder.py simulates some of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from shortcut_cli.compare.significance import LEVEL, Floats, Noise

LEAST_RUNGS = 4
BAND = 33  # costs at which the band is given
POOLED = 0.15  # level of the F-test: above it, the scatter of the rungs is pooled with the variance over seeds


@dataclass(frozen=True)
class Ladder:
    """Rungs and the line through the means of their losses."""

    places: Floats  # (R,) log of the cost
    means: Floats  # (R,) nats per token
    intercept: float
    slope: float  # nats per token and unit of log cost
    scatter: Noise  # of the means of the rungs about the line

    def at(self, cost: float) -> Floats:
        """The weights of the rungs, (R,), in the line's loss at a cost."""
        centred = self.places - self.places.mean()
        weights: Floats = 1 / len(centred) + (math.log(cost) - self.places.mean()) * centred / (centred**2).sum()
        return weights

    def lacks(self, cost: float, what: str) -> str:
        """Why there is nothing to compare with at a cost, of a kind; empty if there is."""
        least, most = math.exp(self.places.min()), math.exp(self.places.max())
        if least <= cost * (1 + 1e-12) and cost <= most * (1 + 1e-12):
            return ""
        return f"its {what}, {cost:,.4g}, are not between those of the ladder, {least:,.4g} to {most:,.4g}"


def fit(costs: Sequence[float], losses: Floats) -> Ladder:
    """The ladder through rungs: costs (R,), at least LEAST_RUNGS and not all equal; losses (R, S)."""
    assert len(costs) >= LEAST_RUNGS, f"{len(costs)} rungs, not {LEAST_RUNGS}"
    places, means = np.log(np.asarray(costs, np.float64)), losses.mean(1)
    centred = places - places.mean()
    slope = float(centred @ means / (centred @ centred))
    left = means - means.mean() - slope * centred
    freedom = len(places) - 2
    scatter = Noise(float(left @ left) / freedom, freedom)
    return Ladder(places, means, float(means.mean() - slope * places.mean()), slope, scatter)


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

    difference: arm minus ladder at its cost, nats per token. log gain = difference / slope, a ratio of two normal
    variables with a covariance; the interval is Fieller's (1954), as in calibration by a fitted line (Draper and Smith
    1998, section 3.2). "gain" and "interval_95", of which an end that lies beyond the ladder is None; or "reason" why
    there is none, if the slope or the gain itself lies beyond what the ladder can say.
    """
    centred = ladder.places - ladder.places.mean()
    place, square = math.log(cost), float(centred @ centred)
    offset = place - float(ladder.places.mean())
    quantile = float(stats.t.ppf(0.5 + LEVEL / 2, noise.freedom))
    limit = quantile**2 * noise.variance
    # Variances of the difference and of the slope, and their covariance, in units of V.
    own, shared, sloped = 1 + 1 / len(centred) + offset**2 / square, -offset / square, 1 / square
    steep = ladder.slope**2 - limit * sloped
    if ladder.slope >= 0 or steep <= 0:
        return {"reason": "the loss of the ladder does not fall clearly with its cost"}
    ratio = difference / ladder.slope
    least, most = float(ladder.places.min()), float(ladder.places.max())
    if not least <= place + ratio <= most:
        return {"reason": f"its loss is that of a cost {'above' if ratio > 0 else 'below'} all of the ladder's"}
    middle = difference * ladder.slope - limit * shared
    root = math.sqrt(max(0.0, middle**2 - steep * (difference**2 - limit * own)))
    ends = ((middle - root) / steep, (middle + root) / steep)
    interval = [math.exp(end) if least <= place + end <= most else None for end in ends]
    return {"gain": math.exp(ratio), "interval_95": interval}
