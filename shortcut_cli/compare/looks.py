"""Looking at a comparison before all of its seeds have run, without testing at more than 5 %.

Whoever adds seeds until a test succeeds rejects a true null hypothesis in far more than 5 % of cases (Armitage,
McPherson and Rowe 1969). Here the largest number of seeds is named before, and each look at fewer spends a part of the
level: up to the share t of the seeds, by the function of Lan and DeMets (1983) that resembles O'Brien and Fleming's
bounds (1979),

    spent(t) = 2 (2 - 2 cdf(z / sqrt(t))),   z the upper quantile of level / 4

half of it on each side. Early looks then cost little: of 5 % the first of two looks at half of the seeds spends 0.3 %.
Bounds are found for a normal statistic, of which the tests use the p-value (Jennison and Turnbull 2000, section 3.8).
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy import optimize, stats

NODES = 200  # of the integral over what earlier looks left
FARTHEST = 9.0  # standard deviations: beyond that a normal variable has less than 1e-18
LEAST = 1e-15  # a level below it is none


def nominal(level: float, looks: Sequence[int], planned: int) -> float:
    """The level of a two-sided test at the last of some looks, such that all together have `level`.

    looks: the number of seeds at each, in ascending order; planned: the largest number of seeds. A single look at all
    of them has `level`. After that none is left: 0.
    """
    return _nominal(level, tuple(min(1.0, count / planned) for count in looks))


@cache
def _nominal(level: float, shares: tuple[float, ...]) -> float:
    """The same by the shares of the seeds.

    The statistic is a Brownian motion at the times `shares`. `places` and `weights` are nodes of its density where no
    earlier look has rejected (Armitage, McPherson and Rowe 1969).
    """
    if shares == (1.0,):
        return level
    places, weights = np.zeros(1), np.ones(1)
    before, bound = 0.0, math.inf
    for number, share in enumerate(shares):
        step = math.sqrt(share - before)
        earlier = spent(level, before) if before else 0.0
        left = spent(level, share) - earlier
        if step == 0 or left < LEAST:
            bound = math.inf
        else:
            farthest = FARTHEST * math.sqrt(share)

            def lacking(limit: float) -> float:
                out = stats.norm.sf((limit - places) / step) + stats.norm.sf((limit + places) / step)  # noqa: B023
                return float(weights @ out) - left  # noqa: B023

            bound = float(optimize.brentq(lacking, 0.0, farthest, xtol=1e-12)) if lacking(farthest) < 0 else math.inf
        if number + 1 < len(shares) and step:
            edge = min(bound, FARTHEST * math.sqrt(share))
            nodes, sizes = np.polynomial.legendre.leggauss(NODES)
            density = stats.norm.pdf((edge * nodes[:, None] - places) / step) @ weights / step
            places, weights = edge * nodes, edge * sizes * density
        before = share
    return float(2 * stats.norm.sf(bound / math.sqrt(before))) if math.isfinite(bound) else 0.0


def spent(level: float, share: float) -> float:
    """How much of a level may be spent up to a share of the seeds, above 0 and at most 1."""
    return float(4 * stats.norm.sf(stats.norm.isf(level / 4) / math.sqrt(share)))
