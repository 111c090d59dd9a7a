"""The search for a learning rate: on pilot seeds, which are not used again, the same grid for all arms.

The rate of an arm is where a parabola in log rate, through the best rate of the grid and its two neighbours, has its
minimum. The loss near its minimum is close to such a parabola, and its error is then of second order in that of the
rate. The choice by the lowest loss alone is as rough as the grid, and constant over seeds, so that no test over seeds
sees it. While the best rate of any arm is at the edge of the grid, the grid grows there, for all arms.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MOST_ADDED = 4  # rates at either end of the grid
DIGITS = 3  # of a rate that is chosen


@dataclass(frozen=True)
class Curve:
    """How the loss of an arm depends on the learning rate."""

    losses: dict[float, list[float]]  # by rate, one per pilot seed; infinite where the run diverged

    def means(self) -> dict[float, float]:
        """The mean loss over the pilot seeds by rate, in ascending order of the rates."""
        return {rate: sum(self.losses[rate]) / len(self.losses[rate]) for rate in sorted(self.losses)}

    def lowest(self) -> float:
        """The lowest mean loss; infinite if every run diverged."""
        return min(self.means().values())

    def edge(self) -> int:
        """-1 or 1 if the lowest mean loss is at the lowest or highest rate, else 0; -1 if every run diverged."""
        means = list(self.means().values())
        place = means.index(min(means))
        return -1 if place == 0 else int(place == len(means) - 1)

    def chosen(self) -> float:
        """The rate to use."""
        rates, means = list(self.means()), list(self.means().values())
        place = means.index(min(means))
        around = slice(place - 1, place + 2)
        if not 0 < place < len(rates) - 1 or not all(map(math.isfinite, means[around])):
            return rates[place]
        return float(f"{math.exp(_vertex([*map(math.log, rates[around])], means[around])):.{DIGITS}g}")


def _vertex(x: Sequence[float], y: Sequence[float]) -> float:
    """Where the parabola through three points has its minimum; y[1] is the lowest, x ascends.

    Press et al. 2007, equation 10.3.1. If all are equally low, x[1].
    """
    left, right = (x[1] - x[0]) * (y[1] - y[2]), (x[1] - x[2]) * (y[1] - y[0])
    if left == right:
        return x[1]
    return x[1] - ((x[1] - x[0]) * left - (x[1] - x[2]) * right) / (2 * (left - right))


def search(
    rates: Sequence[float], run: Callable[[Sequence[float]], dict[str, Curve]], most: float = math.inf
) -> dict[str, Curve]:
    """The curve of each arm over a grid that begins with `rates`, at least two, and grows.

    run: the curves of all arms over a grid. most: the highest rate. An arm whose best rate is at the edge of the last
    grid still has its `edge`.
    """
    grid, added = sorted(set(rates)), {-1: 0, 1: 0}
    while True:
        curves = run(grid)
        edges = {curve.edge() for curve in curves.values()}
        following = {-1: grid[0] ** 2 / grid[1], 1: grid[-1] ** 2 / grid[-2]}
        following = {side: float(f"{rate:.{DIGITS}g}") for side, rate in following.items()}
        new = [side for side in (-1, 1) if side in edges and added[side] < MOST_ADDED and following[side] <= most]
        if not new:
            return curves
        for side in new:
            added[side] += 1
        grid = sorted({*grid, *(following[side] for side in new)})
