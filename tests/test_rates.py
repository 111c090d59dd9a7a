"""The search for a learning rate, with losses that are known."""

import math

import numpy as np
import pytest

from shortcut_cli.compare import rates
from shortcut_cli.compare.rates import Curve


def parabolas(bests, ran, diverged=math.inf):
    """Curves of arms whose loss is a parabola in log rate; runs above a rate diverge."""

    def run(grid):
        ran.append(list(grid))
        return {
            arm: Curve(
                {
                    rate: [
                        math.inf if rate > diverged else 2 + 0.03 * math.log2(rate / best) ** 2 + more
                        for more in (0, 1)
                    ]
                    for rate in grid
                }
            )
            for arm, best in bests.items()
        }

    return run


def test_the_minimum_of_a_parabola_is_found_to_three_digits():
    ran = []
    found = rates.search((0.004, 0.008, 0.002), parabolas({"a": 0.00345, "b": 0.0051}, ran))
    assert ran == [[0.002, 0.004, 0.008]]
    assert {arm: curve.chosen() for arm, curve in found.items()} == {"a": 0.00345, "b": 0.0051}
    assert found["a"].lowest() == pytest.approx(2.5 + 0.03 * math.log2(0.004 / 0.00345) ** 2)


def test_the_grid_grows_for_all_arms_while_one_is_at_its_edge():
    ran = []
    found = rates.search((0.004, 0.008), parabolas({"a": 0.017, "b": 0.0051, "c": 0.0019}, ran))
    assert ran[0] == [0.004, 0.008]
    assert ran[-1] == [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]
    assert [sorted(curve.losses) for curve in found.values()] == [ran[-1]] * 3
    assert {arm: curve.chosen() for arm, curve in found.items()} == {"a": 0.017, "b": 0.0051, "c": 0.0019}
    assert {curve.edge() for curve in found.values()} == {0}


def test_a_grid_does_not_grow_for_ever():
    ran = []
    found = rates.search((1, 2), parabolas({"a": 1e9}, ran), most=20)
    assert ran[-1] == [1, 2, 4, 8, 16]
    assert (found["a"].edge(), found["a"].chosen()) == (1, 16)
    ran.clear()
    found = rates.search((1, 2), parabolas({"a": 1e-9}, ran))
    assert ran[-1] == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2]
    assert (found["a"].edge(), found["a"].chosen()) == (-1, pytest.approx(1 / 16))


def test_a_run_that_diverged_is_the_worst_of_all():
    found = rates.search((0.004, 0.008, 0.016), parabolas({"a": 0.007}, [], diverged=0.01))["a"]
    assert found.losses[0.016] == [math.inf, math.inf]
    assert found.chosen() == 0.008  # no parabola has an infinite point
    assert not math.isinf(found.lowest())
    below = rates.search((0.004, 0.008, 0.016), parabolas({"a": 0.003}, [], diverged=0.01))["a"]
    assert below.chosen() == 0.003
    nowhere = rates.search((0.004, 0.008), parabolas({"a": 0.003}, [], diverged=0))["a"]
    assert (nowhere.lowest(), nowhere.edge(), nowhere.chosen()) == (math.inf, -1, min(nowhere.losses))
    one = Curve({0.1: [1.0, math.inf], 0.2: [2.0, 2.0], 0.4: [3.0, 3.0]})
    assert (one.edge(), one.chosen()) == (0, 0.2)


@pytest.mark.parametrize("seed", range(5))
def test_a_parabola_through_unequal_steps_has_the_minimum_of_numpys_fit(seed):
    rng = np.random.default_rng(seed)
    grid = np.sort(rng.uniform(0.001, 0.1, 3))
    losses = np.array([2.1, 2.0, 2.0 + rng.uniform(0.01, 0.3)])
    square, linear, _ = np.polyfit(np.log(grid), losses, 2)
    chosen = Curve({float(rate): [float(loss)] for rate, loss in zip(grid, losses, strict=True)}).chosen()
    assert chosen == pytest.approx(math.exp(-linear / (2 * square)), rel=0.006)
    assert grid[0] < chosen < grid[2]


def test_equal_losses_leave_the_rate_of_the_grid():
    assert Curve({0.1: [1.0], 0.2: [1.0], 0.4: [1.0]}).edge() == -1
    assert Curve({0.1: [2.0], 0.2: [1.0], 0.4: [1.0], 0.8: [3.0]}).chosen() < 0.4
