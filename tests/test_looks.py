"""Looks at a comparison before its last seed, against published bounds and by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from shortcut_cli.compare import looks


def test_five_looks_have_the_bounds_of_lan_and_demets():
    # Two-sided 5 %, five equal looks: table of the function `ldBounds(t, iuse = 1)` of the R package ldbounds, which is
    # Lan and DeMets' own program.
    bounds = [stats.norm.isf(looks.nominal(0.05, range(1, count + 1), 5) / 2) for count in range(1, 6)]
    assert bounds == pytest.approx([4.8769, 3.3570, 2.6803, 2.2898, 2.0310], abs=1e-4)


def test_one_look_at_all_seeds_has_the_whole_level_and_none_is_left_afterwards():
    for level in (0.05, 0.05 / 6):
        assert looks.nominal(level, [5], 5) == pytest.approx(level)
        assert looks.nominal(level, [7], 5) == pytest.approx(level)  # the first look, later than planned
        assert looks.nominal(level, [5, 7], 5) == 0
        assert looks.nominal(level, [2, 5, 7], 5) == 0


@pytest.mark.parametrize(
    ("level", "planned", "at"), [(0.05, 10, (3, 5, 10)), (0.05, 8, (4, 6, 7, 8)), (0.01, 6, (3, 6))]
)
def test_all_looks_together_reject_as_often_as_the_level_says(level, planned, at):
    rng = np.random.default_rng(7)
    paths = rng.normal(size=(400_000, planned)).cumsum(1)
    bounds = [looks.nominal(level, at[: number + 1], planned) for number in range(len(at))]
    z = np.abs(paths[:, np.array(at) - 1]) / np.sqrt(at)
    rejected = (2 * stats.norm.sf(z) < bounds).any(1).mean()
    assert rejected == pytest.approx(level, abs=4 * math.sqrt(level / 400_000))
    assert bounds == sorted(bounds)
    assert sum(bounds) > level  # of one look each, they would be more


def test_adding_seeds_without_a_plan_would_reject_far_too_often():
    paths = np.random.default_rng(8).normal(size=(100_000, 10)).cumsum(1)[:, [2, 4, 6, 9]]
    naive = (np.abs(paths) / np.sqrt([3, 5, 7, 10]) > 1.96).any(1).mean()
    assert naive > 0.1
