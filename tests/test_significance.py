"""The statistics of a comparison, against scipy's own tests and by simulation with known effects."""

import dataclasses
import math
import statistics

import numpy as np
import pytest
from scipy import stats

from shortcut_cli.compare import significance

MARGIN = 0.005


def power(shift, limit, freedom):
    """Of a t-test, by a million equal shares of chi-square; scipy's noncentral t is NaN here and there."""
    s = np.sqrt(stats.chi2.ppf((np.arange(1_000_000) + 0.5) / 1_000_000, freedom) / freedom)
    return float(np.mean(stats.norm.sf(limit * s - shift) + stats.norm.cdf(-limit * s - shift)))


def paired(differences, margin=MARGIN):
    """The contrast of two arms, by itself: the paired test."""
    differences = np.asarray(differences, float)
    residual = significance.residual(np.stack([differences, np.zeros(len(differences))]))
    noise = residual and residual.over(len(differences))
    return significance.adjusted([significance.contrast(differences, 2.0, noise, margin)])[0]


def test_a_contrast_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    arm, baseline = rng.normal(2.0, 0.01, 6), rng.normal(2.01, 0.01, 6)
    found = paired(arm - baseline)
    wanted = stats.ttest_rel(arm, baseline)
    assert found.p == pytest.approx(wanted.pvalue)
    assert found.interval_95 == pytest.approx(tuple(wanted.confidence_interval(0.95)))
    assert (found.seeds, found.wins) == (6, int((arm < baseline).sum()))
    shifted = [
        stats.ttest_1samp(arm - baseline, edge, alternative=side).pvalue
        for edge, side in ((-MARGIN, "greater"), (MARGIN, "less"))
    ]
    assert found.p_equal == pytest.approx(max(shifted))


@pytest.mark.parametrize("count", [2, 3, 5, 9])
@pytest.mark.parametrize("mean", [-0.02, -0.004, 0.0, 0.004, 0.02])
def test_every_number_of_a_contrast_is_scipys(count, mean):
    found_of = np.random.default_rng(count).normal(mean, 0.006, count)
    found = paired(found_of)
    wanted = stats.ttest_1samp(found_of, 0.0)
    low, high = wanted.confidence_interval(0.95)
    above_lower = stats.ttest_1samp(found_of, -MARGIN, alternative="greater").pvalue
    below_upper = stats.ttest_1samp(found_of, MARGIN, alternative="less").pvalue
    limit = stats.t.ppf(0.975, count - 1)
    assert found.seeds == count
    assert found.mean == pytest.approx(math.fsum(found_of) / count)
    assert found.interval_95 == pytest.approx((low, high))
    assert low < found.mean < high
    assert found.p == pytest.approx(wanted.pvalue)
    assert found.wins == sum(1 for difference in found_of if difference < 0)
    assert found.p_equal == pytest.approx(max(above_lower, below_upper))
    assert (found.p_holm, found.level, found.freedom) == (found.p, 0.05, count - 1)
    assert found.error == pytest.approx(stats.sem(found_of))
    # A true difference of this size, divided by the standard error of the mean, is the noncentrality at which the
    # t-test has 80 % power.
    shift = found.detectable / (np.std(found_of, ddof=1) / math.sqrt(count))
    assert power(shift, limit, count - 1) == pytest.approx(0.8, abs=1e-5)


def test_a_tie_is_not_a_win():
    assert paired([-1.0, 0.0, 0.0, 1.0, -1.0], MARGIN).wins == 2
    assert paired([0.0], MARGIN).wins == 0
    assert paired([-1.0], MARGIN).wins == 1


def test_the_content_of_a_contrast_names_each_number():
    found = significance.Contrast(3, 0.1, (0.0, 0.2), 0.3, 1, 0.4, 2, 0.5, 0.6, 0.7, 0.8)
    assert found.content() == {
        "seeds": 3,
        "mean": 0.1,
        "interval_95": (0.0, 0.2),
        "p": 0.3,
        "wins": 1,
        "error": 0.4,
        "freedom": 2,
        "p_equal": 0.5,
        "p_holm": 0.6,
        "level": 0.7,
        "detectable": 0.8,
    }


def test_one_seed_allows_no_test_and_equal_runs_are_equal():
    one = paired([-0.1], MARGIN)
    assert one == significance.Contrast(1, -0.1, None, None, 1, None, None, None)
    assert "no test" in significance.verdict("a", "b", one, MARGIN)
    same = paired([0.0, 0.0, 0.0], MARGIN)
    assert same == significance.Contrast(3, 0.0, (0.0, 0.0), 1.0, 0, 0.0, 2, 0.0, 1.0, 0.05, 0.0)


@pytest.mark.parametrize(
    ("difference", "margin", "p_equal"), [(-0.25, 0.5, 0.0), (0.25, 0.25, 1.0), (-0.25, 0.125, 1.0)]
)
def test_the_same_difference_at_every_seed_is_certain(difference, margin, p_equal):
    found = paired([difference] * 3, margin)
    assert found.interval_95 == (difference, difference)
    assert (found.p, found.detectable, found.p_equal) == (0.0, 0.0, p_equal)


@pytest.mark.parametrize(("count", "known"), [(3, 3.26), (5, 1.68), (10, 1.0)])
def test_the_detectable_difference_is_that_of_power_tables(count, known):
    # In standard deviations of a difference: 3.1 to 3.3, 1.7 and 1.0 for 3, 5 and 10 pairs.
    assert significance.detectable(count - 1, 0.05) / np.sqrt(count) == pytest.approx(known, rel=0.02)


def test_the_false_positive_rate_is_5_percent_and_the_power_80_percent():
    rng = np.random.default_rng(1)
    null = [paired(rng.normal(0, 1, 5)).p < 0.05 for _ in range(4000)]
    assert np.mean(null) == pytest.approx(0.05, abs=0.012)
    effect = significance.detectable(4, 0.05) / np.sqrt(5)
    found = [paired(rng.normal(effect, 1, 5)).p < 0.05 for _ in range(4000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.025)


def test_equivalence_is_claimed_falsely_5_percent_of_the_time():
    rng = np.random.default_rng(2)
    claimed = [paired(rng.normal(MARGIN, 0.001, 5)).p_equal < 0.05 for _ in range(4000)]
    assert np.mean(claimed) == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize("count", [2, 3, 4, 7, 12, 40])
def test_the_detectable_difference_has_80_percent_power(count):
    limit, shift = stats.t.ppf(0.975, count - 1), significance.detectable(count - 1, 0.05)
    assert power(shift, limit, count - 1) == pytest.approx(0.8, abs=1e-5)


def test_holm():
    # By hand: sorted 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.04 x 1, made monotone.
    assert significance.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    # 0.001 x 3, 0.4 x 2, and 0.7 may not be below that.
    assert significance.holm([0.7, 0.001, 0.4]) == pytest.approx([0.8, 0.003, 0.8])
    # At most 1: 0.5 x 3 and 0.6 x 2 are larger.
    assert significance.holm([0.9, 0.5, 0.6]) == [1.0, 1.0, 1.0]
    assert significance.holm([0.3]) == [0.3]
    assert significance.holm([]) == []


@pytest.mark.parametrize("seed", range(4))
def test_holm_is_the_largest_product_among_the_smaller_p_values(seed):
    rng = np.random.default_rng(seed)
    p_values = list(rng.random(7) ** 3)
    p_values += p_values[:seed]  # ties
    wanted = [
        max(min(1.0, q * sum(1 for other in p_values if other >= q)) for q in p_values if q <= p) for p in p_values
    ]
    assert significance.holm(p_values) == pytest.approx(wanted)


def test_contrasts_are_adjusted_together_and_one_without_a_test_is_left_out():
    p_values = (0.04, None, 0.01, 0.02)
    plain = [significance.Contrast(3, -0.1, None, p, 1, 0.03, 2, 0.5) for p in p_values]
    found = significance.adjusted(plain)
    assert [one.p_holm for one in found] == [pytest.approx(0.04), None, pytest.approx(0.03), pytest.approx(0.04)]
    # 0.01 < 0.05 / 3 and 0.02 < 0.05 / 2 and 0.04 < 0.05.
    assert [one.level for one in found] == [0.05, None, pytest.approx(0.05 / 3), 0.025]
    assert [one.differs for one in found] == [True, False, True, True]
    bare = [dataclasses.replace(one, p_holm=None, level=None, detectable=None) for one in found]
    assert bare == plain
    for one in found:
        if one.p is not None:
            assert one.detectable == pytest.approx(0.03 * significance.detectable(2, one.level))


def test_what_is_not_rejected_has_the_level_at_which_holms_procedure_ended():
    def levels(p_values, family=0):
        return significance.levels(p_values, family, lambda level: level)

    assert levels([0.9, 0.001, 0.02, 0.3]) == pytest.approx([0.05 / 3, 0.05 / 4, 0.05 / 3, 0.05 / 3])
    assert levels([0.001, 0.002], 6) == pytest.approx([0.05 / 6, 0.05 / 5])
    assert significance.levels([0.001, 0.1], 0, lambda level: level / 10) == pytest.approx([0.0025, 0.005])
    assert significance.holm([0.001, 0.002], 6) == pytest.approx([0.006, 0.01])


def test_three_seeds_of_five_contrasts_need_seven_spreads_alone_and_far_fewer_together():
    # A paired test at 1 % with 2 degrees of freedom, in standard deviations of a difference, and the pooled one of
    # seven arms.
    assert significance.detectable(2, 0.01) / math.sqrt(3) == pytest.approx(7.3, abs=0.05)
    assert significance.detectable(12, 0.01) / math.sqrt(3) < 2.4
    assert significance.detectable(2, 0.0) == math.inf


@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (7, 3)])
def test_the_residual_is_that_of_a_two_way_analysis_of_variance(shape):
    losses = np.random.default_rng(6).normal(3, 0.1, shape)
    design = np.array(
        [
            [1.0, *(arm == other for other in range(1, shape[0])), *(seed == other for other in range(1, shape[1]))]
            for arm in range(shape[0])
            for seed in range(shape[1])
        ]
    )
    left = losses.ravel() - design @ np.linalg.lstsq(design, losses.ravel(), rcond=None)[0]
    freedom = losses.size - design.shape[1]
    found = significance.residual(losses)
    assert found.freedom == freedom
    assert found.variance == pytest.approx((left**2).sum() / freedom)
    assert found.over(4) == significance.Noise(found.variance / 4, freedom)
    assert significance.residual(losses[:1]) is None
    assert significance.residual(losses[:, :1]) is None


def test_what_scatters_more_than_the_others_is_found_by_the_ratio_of_variances():
    losses = np.random.default_rng(8).normal(3, 0.1, (5, 4)) + np.arange(4)
    losses[3] += [0.9, -0.9, 0.9, -0.9]
    (found,) = significance.uneven(losses)
    assert found.arm == 3
    rows = [losses[arm].tolist() for arm in (0, 1, 2, 4)]
    means = [sum(row[seed] for row in rows) / 4 for seed in range(4)]
    left = [row[seed] - sum(row) / 4 - means[seed] + sum(means) / 4 for row in rows for seed in range(4)]
    others = sum(one * one for one in left) / 9
    variance = statistics.variance(losses[3, seed] - means[seed] for seed in range(4))
    assert found.others == pytest.approx(math.sqrt(others))
    assert found.own == pytest.approx(math.sqrt(variance - others / 4))
    assert found.p == pytest.approx(stats.f.sf(variance / (others + others / 4), 3, 9))


def test_arms_that_scatter_alike_are_called_uneven_in_5_of_100_comparisons():
    rng = np.random.default_rng(9)
    noise = 0.1 * rng.normal(size=(4000, 6, 5)) + rng.normal(size=(4000, 6, 1)) + rng.normal(size=(4000, 1, 5))
    share = np.mean([bool(significance.uneven(losses)) for losses in noise])
    assert 0.04 < share < 0.06
    noise[:, 2] += 0.4 * rng.normal(size=(4000, 5))
    found = [[one.arm for one in significance.uneven(losses)] for losses in noise[:500]]
    assert np.mean([2 in arms for arms in found]) > 0.8


def test_two_arms_or_one_seed_are_not_called_uneven():
    losses = np.random.default_rng(8).normal(3, 0.1, (5, 4))
    assert not significance.uneven(losses[:2])
    assert not significance.uneven(losses[:, :1])
    assert not significance.uneven(np.ones((5, 4)))
    equal = np.ones((5, 4))
    equal[1] = [1, 2, 3, 4]
    assert [one.arm for one in significance.uneven(equal)] == [1]


def test_holms_family_wise_error_rate_is_5_percent():
    rng = np.random.default_rng(3)
    false = [min(significance.holm(rng.random(5))) < 0.05 for _ in range(10_000)]
    # The chance that one of five uniform p-values is below 0.05 / 5; four standard deviations.
    chance = 1 - (1 - 0.05 / 5) ** 5
    assert np.mean(false) == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / 10_000))


@pytest.mark.parametrize("options", [{}, {"resamples": 50}, {"seed": 9}, {"resamples": 333, "seed": 2}])
@pytest.mark.parametrize("seeds", [1, 2, 4])
def test_the_interval_over_documents_and_seeds_is_that_of_a_plain_bootstrap(options, seeds):
    rng = np.random.default_rng(5)
    tokens = rng.integers(10, 1000, 11).astype(float)
    nats = rng.normal(0, 0.5, (seeds, 11)) * tokens
    generator = np.random.default_rng(options.get("seed", 1))
    count, each = options.get("resamples", 2000), max(1, seeds - 1)
    whose = [[int(index) for index in row] for row in generator.integers(0, seeds, (count, each))]
    drawn = [[int(index) for index in generator.integers(0, 11, 11)] for _ in range(count)]
    means = sorted(
        math.fsum(nats[seed, index] for index in row for seed in chosen)
        / each
        / math.fsum(tokens[index] for index in row)
        for row, chosen in zip(drawn, whose, strict=True)
    )

    def quantile(share):
        place = share * (count - 1)
        first = math.floor(place)
        return means[first] + (place - first) * (means[first + 1] - means[first])

    found = significance.crossed(nats, tokens, **options)
    assert found == pytest.approx((quantile(0.025), quantile(0.975)), rel=1e-9)
    assert significance.crossed(nats, tokens, **options) == found
    assert significance.crossed(-nats, tokens, **options) == pytest.approx((-found[1], -found[0]), rel=1e-9)


@pytest.mark.parametrize("seeds", [5, 10])
def test_the_interval_over_documents_and_seeds_has_the_width_of_both(seeds):
    # Effects of seeds and of documents: the variance of the mean is known.
    rng, widths = np.random.default_rng(8), []
    for _ in range(20):
        nats = rng.normal(0, 0.02, (seeds, 1)) + rng.normal(0, 0.3, 200)
        low, high = significance.crossed(nats, np.ones(200), resamples=500)
        widths.append((high - low) ** 2)
    wanted = 2 * 1.96 * math.sqrt(0.02**2 / seeds + 0.3**2 / 200)
    assert math.sqrt(np.mean(widths)) == pytest.approx(wanted, rel=0.1)
    alone = significance.crossed(np.full((seeds, 200), 0.1) + rng.normal(0, 0.3, 200), np.ones(200), resamples=500)
    assert alone[1] - alone[0] == pytest.approx(2 * 1.96 * 0.3 / math.sqrt(200), rel=0.15)  # seeds that agree


def test_documents_are_resampled_together():
    rng = np.random.default_rng(4)
    tokens = rng.integers(100, 1000, 200).astype(float)
    hard = rng.normal(2, 0.5, 200)  # documents differ far more than the two arms
    arm, baseline = (hard - 0.01) * tokens, hard * tokens
    assert significance.crossed((arm - baseline)[None], tokens) == pytest.approx((-0.01, -0.01))
    noisy = arm + rng.normal(0, 0.02, 200) * tokens
    low, high = significance.crossed((noisy - baseline)[None], tokens)
    width = 2 * 1.96 * 0.02 / np.sqrt(200)  # from the noise only: the difficulty of documents cancels
    assert high - low == pytest.approx(width, rel=0.25)
    assert (low + high) / 2 == pytest.approx(-0.01, abs=width)


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([-0.031, -0.030, -0.029], "beats"),
        ([0.031, 0.030, 0.029], "loses to"),
        ([0.0001, -0.0001, 0.0002], "are equivalent within 0.005"),
        ([-0.1, 0.05, 0.02], "No significant difference"),
    ],
)
def test_the_verdict_names_the_result(differences, words):
    assert words in significance.verdict("x", "gpt", paired(differences), MARGIN)


CLEAR = significance.Contrast(3, -0.04321, (-0.05, -0.04), 0.012, 3, 0.01, 12, 0.9, 0.036, 0.0167, 0.02)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "arm beats gpt by 0.0432 nats per token (3 seeds, p = 0.012 at the level 0.017)."),
        ({"mean": 0.04321}, "arm loses to gpt by 0.0432 nats per token (3 seeds, p = 0.012 at the level 0.017)."),
        # Not significant at the level that is really used, whatever it is at 5 %.
        (
            {"level": 0.0102},
            "No significant difference between arm and gpt (-0.0432 nats per token, p = 0.012 at the level 0.01); "
            "3 seeds detect a difference of 0.0200 with 80 % power.",
        ),
        (
            {"mean": 0.001, "p": 0.2, "p_equal": 0.017, "detectable": 0.01236, "seeds": 5},
            "No significant difference between arm and gpt (+0.0010 nats per token, p = 0.2 at the level 0.017); "
            "5 seeds detect a difference of 0.0124 with 80 % power.",
        ),
        (
            {"mean": 0.001, "p": 0.2, "p_equal": 0.016},
            "arm and gpt are equivalent within 0.0125 nats per token (3 seeds, TOST p = 0.016).",
        ),
        # A difference can be significant and within the margin; significance comes first.
        ({"p_equal": 0.001}, "arm beats gpt by 0.0432 nats per token (3 seeds, p = 0.012 at the level 0.017)."),
        (
            {"seeds": 1, "interval_95": None, "p": None, "detectable": None, "p_equal": None},
            "arm is 0.0432 nats per token below gpt (one seed, no test).",
        ),
        (
            {"level": 0.0},
            "arm is 0.0432 nats per token below gpt, without a verdict: earlier looks at fewer seeds have spent the "
            "5 %.",
        ),
        (
            {"mean": 0.5, "seeds": 1, "interval_95": None, "p": None, "detectable": None, "p_equal": None},
            "arm is 0.5000 nats per token above gpt (one seed, no test).",
        ),
    ],
)
def test_a_verdict_says_what_the_numbers_show(changes, sentence):
    assert significance.verdict("arm", "gpt", dataclasses.replace(CLEAR, **changes), 0.0125) == sentence


def test_the_interval_of_an_arms_mean_is_that_of_scipys_t_test():
    losses = [3.21, 3.25, 3.19, 3.3]
    wanted = stats.ttest_1samp(losses, 0.0).confidence_interval(0.95)
    assert significance.of_mean(losses) == pytest.approx((wanted.low, wanted.high))
    for unknown in ([3.2], [], [3.2, None, 3.1], [3.2, math.inf, 3.1], [3.2, math.nan]):
        assert significance.of_mean(unknown) is None
