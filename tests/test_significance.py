"""The statistics of a comparison, against scipy's own tests and by simulation with known effects."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from shortcut_cli.compare import significance

MARGIN = 0.005


def test_a_contrast_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    arm, baseline = rng.normal(2.0, 0.01, 6), rng.normal(2.01, 0.01, 6)
    found = significance.contrast(arm - baseline, MARGIN)
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
    found = significance.contrast(found_of, MARGIN)
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
    assert found.p_holm is None
    # A true difference of this size, divided by the standard error of the mean, is the noncentrality at which the
    # t-test has 80 % power.
    shift = found.detectable / (np.std(found_of, ddof=1) / math.sqrt(count))
    power = stats.nct.sf(limit, count - 1, shift) + stats.nct.cdf(-limit, count - 1, shift)
    assert power == pytest.approx(0.8, abs=1e-6)


def test_a_tie_is_not_a_win():
    assert significance.contrast([-1.0, 0.0, 0.0, 1.0, -1.0], MARGIN).wins == 2
    assert significance.contrast([0.0], MARGIN).wins == 0
    assert significance.contrast([-1.0], MARGIN).wins == 1


def test_the_content_of_a_contrast_names_each_number():
    found = significance.Contrast(3, 0.1, (0.0, 0.2), 0.3, 1, 0.4, 0.5, 0.6)
    assert found.content() == {
        "seeds": 3,
        "mean": 0.1,
        "interval_95": (0.0, 0.2),
        "p": 0.3,
        "wins": 1,
        "detectable": 0.4,
        "p_equal": 0.5,
        "p_holm": 0.6,
    }


def test_one_seed_allows_no_test_and_equal_runs_are_equal():
    one = significance.contrast([-0.1], MARGIN)
    assert one == significance.Contrast(1, -0.1, None, None, 1, None, None)
    assert "no test" in significance.verdict("a", "b", one, MARGIN)
    same = significance.contrast([0.0, 0.0, 0.0], MARGIN)
    assert same == significance.Contrast(3, 0.0, (0.0, 0.0), 1.0, 0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("difference", "margin", "p_equal"), [(-0.25, 0.5, 0.0), (0.25, 0.25, 1.0), (-0.25, 0.125, 1.0)]
)
def test_the_same_difference_at_every_seed_is_certain(difference, margin, p_equal):
    found = significance.contrast([difference] * 3, margin)
    assert found.interval_95 == (difference, difference)
    assert (found.p, found.detectable, found.p_equal) == (0.0, 0.0, p_equal)


@pytest.mark.parametrize(("count", "known"), [(3, 3.26), (5, 1.68), (10, 1.0)])
def test_the_detectable_difference_is_that_of_power_tables(count, known):
    # In standard deviations of a difference: 3.1 to 3.3, 1.7 and 1.0 for 3, 5 and 10 pairs.
    assert significance.detectable(count) / np.sqrt(count) == pytest.approx(known, rel=0.02)


def test_the_false_positive_rate_is_5_percent_and_the_power_80_percent():
    rng = np.random.default_rng(1)
    null = [significance.contrast(rng.normal(0, 1, 5), MARGIN).p < 0.05 for _ in range(4000)]
    assert np.mean(null) == pytest.approx(0.05, abs=0.012)
    effect = significance.detectable(5) / np.sqrt(5)
    found = [significance.contrast(rng.normal(effect, 1, 5), MARGIN).p < 0.05 for _ in range(4000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.025)


def test_equivalence_is_claimed_falsely_5_percent_of_the_time():
    rng = np.random.default_rng(2)
    claimed = [significance.contrast(rng.normal(MARGIN, 0.001, 5), MARGIN).p_equal < 0.05 for _ in range(4000)]
    assert np.mean(claimed) == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize("count", [2, 3, 4, 7, 12, 40])
def test_the_detectable_difference_has_80_percent_power(count):
    limit, shift = stats.t.ppf(0.975, count - 1), significance.detectable(count)
    power = stats.nct.sf(limit, count - 1, shift) + stats.nct.cdf(-limit, count - 1, shift)
    assert power == pytest.approx(0.8, abs=1e-6)


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
    plain = [significance.Contrast(3, -0.1, None, p, 1, None, None) for p in p_values]
    found = significance.adjusted(plain)
    assert [one.p_holm for one in found] == [pytest.approx(0.04), None, pytest.approx(0.03), pytest.approx(0.04)]
    assert [dataclasses.replace(one, p_holm=None) for one in found] == plain


def test_holms_family_wise_error_rate_is_5_percent():
    rng = np.random.default_rng(3)
    false = [min(significance.holm(rng.random(5))) < 0.05 for _ in range(10_000)]
    # The chance that one of five uniform p-values is below 0.05 / 5; four standard deviations.
    chance = 1 - (1 - 0.05 / 5) ** 5
    assert np.mean(false) == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / 10_000))


@pytest.mark.parametrize("options", [{}, {"resamples": 50}, {"seed": 9}, {"resamples": 333, "seed": 2}])
def test_the_interval_over_documents_is_that_of_a_plain_bootstrap(options):
    rng = np.random.default_rng(5)
    tokens = rng.integers(10, 1000, 11).astype(float)
    arm, baseline = rng.normal(2, 0.5, 11) * tokens, rng.normal(2, 0.5, 11) * tokens
    generator = np.random.default_rng(options.get("seed", 1))
    count = options.get("resamples", 2000)
    drawn = [[int(index) for index in row] for row in generator.integers(0, 11, (count, 11))]
    means = sorted(
        math.fsum(arm[index] - baseline[index] for index in row) / math.fsum(tokens[index] for index in row)
        for row in drawn
    )

    def quantile(share):
        place = share * (count - 1)
        first = math.floor(place)
        return means[first] + (place - first) * (means[first + 1] - means[first])

    found = significance.over_documents(arm, baseline, tokens, **options)
    assert found == pytest.approx((quantile(0.025), quantile(0.975)), rel=1e-9)
    assert significance.over_documents(arm, baseline, tokens, **options) == found
    assert significance.over_documents(baseline, arm, tokens, **options) == pytest.approx(
        (-found[1], -found[0]), rel=1e-9
    )


def test_documents_are_resampled_together():
    rng = np.random.default_rng(4)
    tokens = rng.integers(100, 1000, 200).astype(float)
    hard = rng.normal(2, 0.5, 200)  # documents differ far more than the two arms
    arm, baseline = (hard - 0.01) * tokens, hard * tokens
    assert significance.over_documents(arm, baseline, tokens) == pytest.approx((-0.01, -0.01))
    noisy = arm + rng.normal(0, 0.02, 200) * tokens
    low, high = significance.over_documents(noisy, baseline, tokens)
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
    assert words in significance.verdict("x", "gpt", significance.contrast(differences, MARGIN), MARGIN)


CLEAR = significance.Contrast(3, -0.04321, (-0.05, -0.04), 0.012, 3, 0.02, 0.9)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "arm beats gpt by 0.0432 nats per token (3 seeds, p = 0.012)."),
        ({"mean": 0.04321}, "arm loses to gpt by 0.0432 nats per token (3 seeds, p = 0.012)."),
        ({"p_holm": 0.036}, "arm beats gpt by 0.0432 nats per token (3 seeds, Holm-adjusted p = 0.036)."),
        # Not significant after the adjustment, whatever it was before.
        (
            {"p_holm": 0.0512},
            "No significant difference between arm and gpt (-0.0432 nats per token, Holm-adjusted p = 0.051); "
            "3 seeds detect a difference of 0.0200 with 80 % power.",
        ),
        (
            {"mean": 0.001, "p": 0.2, "p_holm": 0.6, "p_equal": 0.06, "detectable": 0.01236, "seeds": 5},
            "No significant difference between arm and gpt (+0.0010 nats per token, Holm-adjusted p = 0.6); "
            "5 seeds detect a difference of 0.0124 with 80 % power.",
        ),
        (
            {"mean": 0.001, "p": 0.2, "p_holm": 0.6, "p_equal": 0.04},
            "arm and gpt are equivalent within 0.0125 nats per token (3 seeds, TOST p = 0.04).",
        ),
        # A difference can be significant and within the margin; significance comes first.
        ({"p_equal": 0.001}, "arm beats gpt by 0.0432 nats per token (3 seeds, p = 0.012)."),
        (
            {"seeds": 1, "interval_95": None, "p": None, "detectable": None, "p_equal": None},
            "arm is 0.0432 nats per token below gpt (one seed, no test).",
        ),
        (
            {"mean": 0.5, "seeds": 1, "interval_95": None, "p": None, "detectable": None, "p_equal": None},
            "arm is 0.5000 nats per token above gpt (one seed, no test).",
        ),
    ],
)
def test_a_verdict_says_what_the_numbers_show(changes, sentence):
    assert significance.verdict("arm", "gpt", dataclasses.replace(CLEAR, **changes), 0.0125) == sentence
