"""The line through the baselines, against other libraries, and the whole protocol by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from shortcut_cli.compare import ladder, rates, significance
from shortcut_cli.compare.significance import Noise

COSTS = [1e6, 1.7e6, 2.6e6, 4.1e6, 5e6]


def made(seed=0, seeds=5, spread=0.01):
    """Losses of five rungs, (5, seeds), with an effect of the seed."""
    rng = np.random.default_rng(seed)
    line = 3.0 - 0.1 * np.log(COSTS)
    return line[:, None] + rng.normal(0, 0.03, seeds) + rng.normal(0, spread, (5, seeds))


QUIET = Noise(0.01**2, 20)  # of a run of `made`


def bent(by, seed=0, spread=0.01):
    """The same losses with a parabola added: `by` nats from its middle to its ends."""
    x = np.log(COSTS)
    return made(seed, spread=spread) + by * (((x - x[0]) / (x[-1] - x[0]) * 2 - 1) ** 2)[:, None]


@pytest.mark.parametrize(("degree", "losses"), [(1, made()), (2, bent(0.05))])
def test_the_line_is_that_of_numpys_polynomials(degree, losses):
    found = ladder.fit(COSTS, losses, QUIET)
    assert found.degree == degree
    wanted = np.polynomial.Polynomial.fit(np.log(COSTS), losses.mean(1), degree).convert()
    assert found.coefficients == pytest.approx((*wanted.coef, 0.0)[:3], rel=1e-6)
    left = losses.mean(1) - wanted(np.log(COSTS))
    assert found.scatter == Noise(pytest.approx((left**2).sum() / (4 - degree)), 4 - degree)
    for cost in (1e6, 3e6, 5e6):
        assert found.at(cost) @ losses.mean(1) == pytest.approx(wanted(math.log(cost)))
        assert found.loss(cost) == pytest.approx(wanted(math.log(cost)))


@pytest.mark.parametrize(("degree", "losses"), [(1, made()), (2, bent(0.05))])
def test_the_contrast_with_the_line_has_the_interval_of_a_prediction(degree, losses):
    # The scatter alone: the prediction interval of the general linear model, from its design matrix.
    arm, cost = 1.55, 3e6
    found = ladder.fit(COSTS, losses, QUIET)
    design = np.log(COSTS)[:, None] ** np.arange(degree + 1)
    row = math.log(cost) ** np.arange(degree + 1)
    factor = 1 + row @ np.linalg.inv(design.T @ design) @ row
    weights = found.at(cost)
    scale = 1 + float(weights @ weights)
    assert scale == pytest.approx(factor, rel=1e-4)
    differences = arm - weights @ losses
    one = significance.contrast(differences, scale, found.scatter, 0.005)
    reach = stats.t.ppf(0.975, 4 - degree) * math.sqrt(found.scatter.variance * factor)
    predicted = float(row @ np.linalg.lstsq(design, losses.mean(1), rcond=None)[0])
    assert one.mean == pytest.approx(arm - predicted)
    assert one.interval_95 == pytest.approx((arm - predicted - reach, arm - predicted + reach), rel=1e-4)


def test_a_line_is_curved_if_a_t_test_of_its_square_says_so():
    # The regression with and without the square, its coefficient's t by the design matrix: V as `noise` has it.
    seen = set()
    for by in np.linspace(0, 0.03, 13):
        losses = bent(by, seed=int(1000 * by))
        x = np.log(COSTS) - np.log(COSTS).mean()
        design = x[:, None] ** np.arange(3)
        found, [left], *_ = np.linalg.lstsq(design, losses.mean(1), rcond=None)
        over = QUIET.variance / 5
        if left / 2 > over and stats.f.sf(left / 2 / over, 2, 20) < 0.15:
            variance, freedom = left / 2, 2
        else:
            variance, freedom = (left + 20 * over) / 22, 22
        t = found[2] / math.sqrt(variance * np.linalg.inv(design.T @ design)[2, 2])
        curved = bool(2 * stats.t.sf(abs(t), freedom) < 0.05)
        assert ladder.fit(COSTS, losses, QUIET).degree == (2 if curved else 1)
        seen.add(curved)
    assert seen == {True, False}


def test_three_costs_have_no_curve():
    losses = np.array([[3.0, 3.0], [2.5, 2.5], [2.5, 2.5], [2.4, 2.4]])
    assert ladder.fit([1.0, 2.0, 2.0, 4.0], losses, Noise(1e-6, 9)).degree == 1


@pytest.mark.parametrize(("share", "alone"), [(0.5, False), (1.0, False), (1.9, False), (2.0, True), (9.0, True)])
def test_the_scatter_of_the_rungs_is_pooled_unless_it_is_clearly_larger(share, alone):
    # The upper 15 % of F with 3 and 24 degrees of freedom begin at 1.94.
    assert stats.f.isf(0.15, 3, 24) == pytest.approx(1.94, abs=0.005)
    scatter, residual = Noise(share * 0.2, 3), Noise(1.0, 24)
    pooled = Noise(pytest.approx((3 * share * 0.2 + 24 * 0.2) / 27), 27)
    assert ladder.noise(scatter, residual, 5) == ((scatter, True) if alone else (pooled, False))


def test_with_one_seed_the_rungs_alone_say_what_chance_does():
    assert ladder.noise(Noise(0.3, 3), None, 1) == (Noise(0.3, 3), True)
    assert ladder.noise(Noise(0.3, 3), Noise(0.0, 24), 5) == (Noise(0.3, 3), True)
    assert ladder.noise(Noise(0.0, 3), Noise(0.0, 24), 5) == (Noise(0.0, 27), False)


def test_nothing_is_said_beyond_the_ladder():
    found = ladder.fit(COSTS, made(), QUIET)
    assert [found.lacks(cost, "FLOPs") for cost in (1e6, 2e6, 5e6)] == ["", "", ""]
    assert found.lacks(5.1e6, "FLOPs") == (
        "its FLOPs, 5,100,000, are not between those of the ladder, 1,000,000 to 5,000,000"
    )
    assert found.lacks(0.99e6, "FLOPs")


@pytest.mark.parametrize(("degree", "losses"), [(1, made()), (2, bent(0.03, spread=0.001))])
def test_the_interval_of_the_gain_is_where_the_shifted_contrast_is_not_significant(degree, losses):
    # By its definition, on a fine grid of costs: where a test does not reject that the arm, at its loss, costs that.
    cost, noise = 2.2e6, Noise(2e-5, 20)
    found = ladder.fit(COSTS, losses, QUIET)
    assert found.degree == degree
    x = np.log(COSTS)
    middle = x.mean()
    design = (x - middle)[:, None] ** np.arange(degree + 1)
    inverse = np.linalg.inv(design.T @ design)
    line, *_ = np.linalg.lstsq(design, losses.mean(1), rcond=None)
    grid = np.linspace(x[0], x[-1], 200_001)
    rows = (grid - middle)[:, None] ** np.arange(degree + 1)
    spread = noise.variance * (1 + np.einsum("ij,jk,ik->i", rows, inverse, rows))
    for difference in (-0.02, 0.0, 0.01):
        result = ladder.gain(found, cost, difference, noise)
        loss = np.interp(math.log(cost), grid, rows @ line) + difference
        inside = grid[(rows @ line - loss) ** 2 <= stats.t.ppf(0.975, 20) ** 2 * spread]
        assert result["gain"] == pytest.approx(cost_at(grid, rows @ line, loss) / cost, rel=1e-4)
        for one, end, edge in zip(result["interval_95"], (inside[0], inside[-1]), (x[0], x[-1]), strict=True):
            assert one == (None if end == edge else pytest.approx(math.exp(end) / cost, rel=1e-4))


def cost_at(grid, line, loss):
    """Where a falling line over the log of the cost has a loss."""
    return math.exp(np.interp(-loss, -line, grid))


@pytest.mark.parametrize("by", [0.4, -0.4])
def test_there_is_no_gain_if_the_line_rises_at_an_end(by):
    found = ladder.fit(COSTS, bent(by), QUIET)
    assert found.degree == 2
    assert ladder.gain(found, 2e6, 0.0, Noise(1e-8, 20)) == {"reason": "the curve of the ladder rises at an end"}


def test_a_gain_is_never_extrapolated():
    found = ladder.fit(COSTS, made(), QUIET)
    quiet = Noise(1e-8, 20)
    assert ladder.gain(found, 4e6, -0.1, quiet) == {"reason": "its loss is that of a cost above all of the ladder's"}
    assert ladder.gain(found, 2e6, 0.1, quiet) == {"reason": "its loss is that of a cost below all of the ladder's"}
    wide = ladder.gain(found, 4.9e6, 0.0, Noise(1e-5, 20))
    assert wide["gain"] == pytest.approx(1.0)
    assert wide["interval_95"][0] < 1
    assert wide["interval_95"][1] is None
    flat = ladder.fit(COSTS, np.ones((5, 2)), QUIET)
    for one, noise in ((flat, quiet), (found, Noise(1.0, 20))):
        assert ladder.gain(one, 2e6, 0.0, noise) == {
            "reason": "the loss of the ladder does not fall clearly with its cost"
        }


def test_the_interval_of_the_gain_covers_it_95_times_in_100():
    rng, covered, count = np.random.default_rng(4), 0, 2000
    x, cost, true = np.log(COSTS), 2.2e6, math.log(1.3)
    for _ in range(count):
        losses = 3 - 0.1 * x + rng.normal(0, 0.005, 5)
        found = ladder.fit(COSTS, losses[:, None], Noise(0.005**2, 30))
        arm = 3 - 0.1 * (math.log(cost) + true) + rng.normal(0, 0.005)
        noise = Noise(0.005**2 * rng.chisquare(30) / 30, 30)
        result = ladder.gain(found, cost, float(arm - found.at(cost) @ losses), noise)
        low, high = result.get("interval_95", (None, None))
        covered += (low is None or low <= 1.3) and (high is None or high >= 1.3)
    assert covered / count == pytest.approx(0.95, abs=0.015)


# What a run of the simulated laboratory loses by its learning rate: nats per squared octave, and the spread of runs.
CURVATURE, SPREAD = 0.03, 0.015


def decided(rng, count, rate_of, slope=-0.1, bend=0.0, seeds=5):
    """Whether an arm that is one more baseline is told apart from the ladder, in `count` comparisons, at 5 %.

    rate_of: the error of the rates, in octaves, (arms,). bend: nats from the middle of the line to its ends. A
    comparison has five rungs, a twin and three arms.
    """
    costs = [*COSTS, *np.geomspace(1.2e6, 4.5e6, 4)]
    found = np.empty(count, bool)
    for number in range(count):
        share = np.log(np.array(costs) / costs[0]) / math.log(5) * 2 - 1
        line = 3 + slope * np.log(costs) + bend * share**2
        excess = CURVATURE * rate_of(rng, 9) ** 2
        losses = (line + excess)[:, None] + rng.normal(0, 0.03, seeds) + rng.normal(0, SPREAD, (9, seeds))
        residual = significance.residual(losses)
        rungs = ladder.fit(costs[:6], losses[:6], residual)  # with the twin
        noise, _ = ladder.noise(rungs.scatter, residual, seeds)
        weights = rungs.at(costs[7])
        one = significance.contrast(losses[7] - weights @ losses[:6], 1 + float(weights @ weights), noise, 0.005)
        found[number] = one.p < 0.05
    return found.mean()


def searched(rng, arms):
    """The errors of the rates that `rates.search` chooses for arms whose best rate is 0.01, in octaves."""

    def run(grid):
        octaves = np.log2(np.array(grid) / 0.01)
        losses = CURVATURE * octaves[:, None] ** 2 + rng.normal(0, SPREAD, (arms, len(grid), 2))
        return {str(arm): rates.Curve(dict(zip(grid, losses[arm].tolist(), strict=True))) for arm in range(arms)}

    # The grid begins too low.
    return np.log2([curve.chosen() / 0.01 for curve in rates.search((0.001, 0.002, 0.004), run).values()])


@pytest.mark.parametrize("rate_of", [lambda _, arms: np.zeros(arms), searched], ids=["one rate", "searched"])
def test_a_baseline_is_told_apart_from_the_ladder_in_5_percent_of_comparisons(rate_of):
    assert decided(np.random.default_rng(2), 5000, rate_of) == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize("bend", [0.01, 0.03])
def test_so_it_is_if_the_line_is_curved(bend, monkeypatch):
    def equal(_, arms):
        return np.zeros(arms)

    assert decided(np.random.default_rng(5), 3000, equal, bend=bend) == pytest.approx(0.05, abs=0.015)
    monkeypatch.setattr(ladder, "CURVED", 0.0)  # always straight: the rungs scatter, and intervals are far too wide
    assert decided(np.random.default_rng(5), 1000, equal, bend=bend) < (0.06 if bend < 0.02 else 0.02)


def test_choosing_the_lowest_of_a_coarse_grid_is_seen_by_the_scatter_of_the_rungs(monkeypatch):
    def coarse(rng, arms):
        return rng.choice([-1.0, 0.0, 1.0], arms)

    assert decided(np.random.default_rng(3), 1500, coarse) < 0.1
    monkeypatch.setattr(ladder, "POOLED", 0.0)
    assert decided(np.random.default_rng(3), 1500, coarse) > 0.2  # the wrong rate is constant over seeds
