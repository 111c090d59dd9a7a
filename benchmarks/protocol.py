"""How often `shortcut compare` is wrong: comparisons of baselines with baselines, through gate, ladder, tests and Holm.

    python benchmarks/protocol.py --comparisons 20000

Every arm of a simulated comparison is one more plain baseline: no contrast is real. A run's loss is a line over the log
of its cost, straight or bent by some standard deviations of an arm's mean (the distance from arc to chord), plus the
effect of its seed (standard deviation 0.03 nats), plus chance (0.015); plus what is constant over the seeds of an arm
(tau), of which a test over seeds alone knows nothing. With --searched, learning rates are searched by `compare.rates`
on curves of 0.03 nats per squared octave, and tau is what the search leaves.

Prints, for each tau and bend: the share of contrasts with p < 0.05, the share of comparisons in which any contrast is a
verdict (Holm), the share of A/A intervals without 0; of contrasts if the scatter of the rungs were always pooled, and
if the line were always straight; and the median half-width of a 95 % interval, in standard deviations of a run, as it
is and with a line that is always straight.
"""

import argparse
import math
from types import SimpleNamespace

import numpy as np

from shortcut_cli.compare import contrasts, ladder, rates, significance

EFFECT, SPREAD, CURVATURE, SLOPE = 0.03, 0.015, 0.03, -0.1
FLOOR = 3.0  # nats per token of the n-gram; baselines are at half of it


def simulated(rng: np.random.Generator, options: argparse.Namespace, tau: float, bend: float) -> list[float]:
    """One comparison: the shares of its contrasts with p < 0.05, of verdicts, of A/A intervals without 0; the width."""
    rungs = np.geomspace(1e6, 5e6, options.rungs)
    costs = [*rungs, rungs[1] * 1.02, *np.geomspace(1.2e6, 4.5e6, options.arms)]
    labels = ["gpt", *(f"rung-{n}" for n in range(1, len(rungs))), "twin", *(f"arm-{n}" for n in range(options.arms))]
    roles = ["plain", *["rung"] * (len(rungs) - 1), "twin", *["asked"] * options.arms]
    constant = rng.normal(0, tau, len(costs))
    if options.searched:
        constant = constant + CURVATURE * searched(rng, len(costs)) ** 2
    places = np.log(costs) - math.log(costs[0])
    half = np.ptp(places) / 2
    arc = bend * SPREAD / math.sqrt(options.seeds) * ((places / half - 1) ** 2 - 1)
    losses = (1.5 + SLOPE * places + arc + constant)[:, None]
    losses = losses + rng.normal(0, EFFECT, options.seeds) + rng.normal(0, SPREAD, (len(costs), options.seeds))
    rows = {
        label: {
            "diverged": {},
            "seeds": list(range(options.seeds)),
            "nats_per_token": own.tolist(),
            "training_flops_per_token": cost,
        }
        for label, own, cost in zip(labels, losses, costs, strict=True)
    }
    arms = {label: SimpleNamespace(role=role) for label, role in zip(labels, roles, strict=True)}
    assert contrasts.gate(rows, {"scores": {"5-gram": {"nats_per_token": FLOOR}}})["open"]
    judge = contrasts.Judge(arms, rows, "flops", 0.005)  # type: ignore[arg-type]
    named = [contrasts.Named(label, contrasts.LADDER) for label in labels[-options.arms :]]
    tests = [judge.test(one)[0] for one in named]
    assert all(tests), "an arm is beyond the ladder"
    told = significance.adjusted([one for one in tests if one], len(named), lambda level: level)
    twin, _ = judge.test(contrasts.Named("twin", contrasts.LADDER))
    assert twin
    assert twin.interval_95
    low, high = twin.interval_95
    widths = [np.ptp(one.interval_95) / 2 / SPREAD for one in told if one.interval_95]
    ps = np.array([one.p for one in told])
    return [(ps < 0.05).mean(), any(one.differs for one in told), not low <= 0 <= high, float(np.median(widths))]


def searched(rng: np.random.Generator, arms: int) -> np.ndarray:
    """Errors of the learning rates that a search leaves, in octaves, (arms,); the grid begins too low."""

    def run(grid: tuple[float, ...]) -> dict[str, rates.Curve]:
        octaves = np.log2(np.array(grid) / 0.01)
        losses = CURVATURE * octaves[:, None] ** 2 + rng.normal(0, SPREAD, (arms, len(grid), 2))
        return {str(arm): rates.Curve(dict(zip(grid, losses[arm].tolist(), strict=True))) for arm in range(arms)}

    return np.log2([curve.chosen() / 0.01 for curve in rates.search((0.001, 0.002, 0.004), run).values()])


def main() -> None:
    """Print one row for each tau."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rungs", type=int, default=5, help="besides the twin")
    parser.add_argument("--arms", type=int, default=6)
    parser.add_argument("--searched", action="store_true", help="search learning rates; only tau = 0")
    parser.add_argument("--random-seed", type=int, default=1)
    options = parser.parse_args()
    heads = ["S tau^2 / sigma^2", "bend", "p < 0.05", "any verdict (Holm)", "A/A without 0", "always pooled"]
    heads += ["always straight", "half-width", "half-width if straight"]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    taus = [(ratio, 0.0) for ratio in (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)]
    for ratio, bend in [(0.0, 0.0)] if options.searched else [*taus, (0.0, 2.0), (0.0, 4.0), (0.0, 8.0), (0.5, 4.0)]:
        tau, levels = math.sqrt(ratio * SPREAD**2 / options.seeds), (ladder.POOLED, ladder.CURVED)
        rows = []
        for ladder.POOLED, ladder.CURVED in (levels, (0.0, levels[1]), (levels[0], 0.0)):
            rng = np.random.default_rng(options.random_seed)
            found = [simulated(rng, options, tau, bend) for _ in range(options.comparisons)]
            rows.append([*np.mean([one[:3] for one in found], 0), np.median([one[3] for one in found])])
        ladder.POOLED, ladder.CURVED = levels
        shares = [f"{share:.1%}" for share in (*rows[0][:3], rows[1][0], rows[2][0])]
        widths = [f"{row[3]:.2f}" for row in (rows[0], rows[2])]
        print("| " + " | ".join([f"{ratio:g}", f"{bend:g}", *shares, *widths]) + " |", flush=True)


if __name__ == "__main__":
    main()
