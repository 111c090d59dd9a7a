"""The statistics of a comparison, against scipy's own tests and by simulation with known effects."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from shortcut_cli import statistics

MARGIN = 0.005


def test_a_contrast_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    arm, opponent = rng.normal(2.0, 0.01, 6), rng.normal(2.01, 0.01, 6)
    found = statistics.contrast(arm - opponent, MARGIN)
    wanted = stats.ttest_rel(arm, opponent)
    assert found.p == pytest.approx(wanted.pvalue)
    assert found.interval_95 == pytest.approx(tuple(wanted.confidence_interval(0.95)))
    assert (found.seeds, found.wins) == (6, int((arm < opponent).sum()))
    shifted = [
        stats.ttest_1samp(arm - opponent, edge, alternative=side).pvalue
        for edge, side in ((-MARGIN, "greater"), (MARGIN, "less"))
    ]
    assert found.p_equal == pytest.approx(max(shifted))


@pytest.mark.parametrize("count", [2, 3, 5, 9])
@pytest.mark.parametrize("mean", [-0.02, -0.004, 0.0, 0.004, 0.02])
def test_every_number_of_a_contrast_is_scipys(count, mean):
    found_of = np.random.default_rng(count).normal(mean, 0.006, count)
    found = statistics.contrast(found_of, MARGIN)
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
    # In nats per token: a true difference of this size, over the standard error of the mean, is the t-test's
    # noncentrality, at which it finds four in five.
    shift = found.detectable / (np.std(found_of, ddof=1) / math.sqrt(count))
    power = stats.nct.sf(limit, count - 1, shift) + stats.nct.cdf(-limit, count - 1, shift)
    assert power == pytest.approx(0.8, abs=1e-6)


def test_a_tie_is_no_win():
    assert statistics.contrast([-1.0, 0.0, 0.0, 1.0, -1.0], MARGIN).wins == 2
    assert statistics.contrast([0.0], MARGIN).wins == 0
    assert statistics.contrast([-1.0], MARGIN).wins == 1


def test_the_content_of_a_contrast_names_each_number():
    found = statistics.Contrast(3, 0.1, (0.0, 0.2), 0.3, 1, 0.4, 0.5, 0.6)
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


def test_one_seed_says_nothing_and_equal_runs_are_equal():
    one = statistics.contrast([-0.1], MARGIN)
    assert one == statistics.Contrast(1, -0.1, None, None, 1, None, None)
    assert "no test" in statistics.verdict("a", "b", one, MARGIN)
    same = statistics.contrast([0.0, 0.0, 0.0], MARGIN)
    assert same == statistics.Contrast(3, 0.0, (0.0, 0.0), 1.0, 0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("difference", "margin", "p_equal"), [(-0.25, 0.5, 0.0), (0.25, 0.25, 1.0), (-0.25, 0.125, 1.0)]
)
def test_equal_differences_at_every_seed_leave_no_doubt(difference, margin, p_equal):
    found = statistics.contrast([difference] * 3, margin)
    assert found.interval_95 == (difference, difference)
    assert (found.p, found.detectable, found.p_equal) == (0.0, 0.0, p_equal)


@pytest.mark.parametrize(("count", "known"), [(3, 3.26), (5, 1.68), (10, 1.0)])
def test_the_detectable_difference_is_that_of_power_tables(count, known):
    # In standard deviations of a difference: 3.1 to 3.3, 1.7 and 1.0 for 3, 5 and 10 pairs.
    assert statistics.detectable(count) / np.sqrt(count) == pytest.approx(known, rel=0.02)


def test_under_the_null_one_in_twenty_is_found_and_a_known_effect_four_in_five():
    rng = np.random.default_rng(1)
    null = [statistics.contrast(rng.normal(0, 1, 5), MARGIN).p < 0.05 for _ in range(4000)]
    assert np.mean(null) == pytest.approx(0.05, abs=0.012)
    effect = statistics.detectable(5) / np.sqrt(5)
    found = [statistics.contrast(rng.normal(effect, 1, 5), MARGIN).p < 0.05 for _ in range(4000)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.025)


def test_equality_is_claimed_falsely_one_time_in_twenty():
    rng = np.random.default_rng(2)
    claimed = [statistics.contrast(rng.normal(MARGIN, 0.001, 5), MARGIN).p_equal < 0.05 for _ in range(4000)]
    assert np.mean(claimed) == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize("count", [2, 3, 4, 7, 12, 40])
def test_the_detectable_difference_is_found_four_times_in_five(count):
    limit, shift = stats.t.ppf(0.975, count - 1), statistics.detectable(count)
    power = stats.nct.sf(limit, count - 1, shift) + stats.nct.cdf(-limit, count - 1, shift)
    assert power == pytest.approx(0.8, abs=1e-6)


def test_holm():
    # Worked by hand: sorted 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.04 x 1, made monotone.
    assert statistics.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    # 0.001 x 3, 0.4 x 2, and 0.7 may not fall below that.
    assert statistics.holm([0.7, 0.001, 0.4]) == pytest.approx([0.8, 0.003, 0.8])
    # A probability: 0.5 x 3 and 0.6 x 2 are more than 1.
    assert statistics.holm([0.9, 0.5, 0.6]) == [1.0, 1.0, 1.0]
    assert statistics.holm([0.3]) == [0.3]
    assert statistics.holm([]) == []


@pytest.mark.parametrize("seed", range(4))
def test_holm_is_the_largest_product_among_the_smaller_p_values(seed):
    rng = np.random.default_rng(seed)
    p_values = list(rng.random(7) ** 3)
    p_values += p_values[:seed]  # ties
    wanted = [
        max(min(1.0, q * sum(1 for other in p_values if other >= q)) for q in p_values if q <= p) for p in p_values
    ]
    assert statistics.holm(p_values) == pytest.approx(wanted)


def test_holm_finds_something_in_nothing_one_time_in_twenty():
    rng = np.random.default_rng(3)
    false = [min(statistics.holm(rng.random(5))) < 0.05 for _ in range(10_000)]
    # Some of five uniform p-values is below 0.05 / 5; four standard deviations of the share found.
    chance = 1 - (1 - 0.05 / 5) ** 5
    assert np.mean(false) == pytest.approx(chance, abs=4 * math.sqrt(chance * (1 - chance) / 10_000))


@pytest.mark.parametrize("options", [{}, {"resamples": 50}, {"seed": 9}, {"resamples": 333, "seed": 2}])
def test_the_interval_over_documents_is_that_of_numpys_draws(options):
    rng = np.random.default_rng(5)
    tokens = rng.integers(10, 1000, 11).astype(float)
    arm, opponent = rng.normal(2, 0.5, 11) * tokens, rng.normal(2, 0.5, 11) * tokens
    generator = np.random.default_rng(options.get("seed", 1))
    count = options.get("resamples", 2000)
    drawn = [[int(index) for index in row] for row in generator.integers(0, 11, (count, 11))]
    means = sorted(
        math.fsum(arm[index] - opponent[index] for index in row) / math.fsum(tokens[index] for index in row)
        for row in drawn
    )

    def quantile(share):
        place = share * (count - 1)
        first = math.floor(place)
        return means[first] + (place - first) * (means[first + 1] - means[first])

    found = statistics.over_documents(arm, opponent, tokens, **options)
    assert found == pytest.approx((quantile(0.025), quantile(0.975)), rel=1e-9)
    assert statistics.over_documents(arm, opponent, tokens, **options) == found
    assert statistics.over_documents(opponent, arm, tokens, **options) == pytest.approx(
        (-found[1], -found[0]), rel=1e-9
    )


def test_documents_are_resampled_together():
    rng = np.random.default_rng(4)
    tokens = rng.integers(100, 1000, 200).astype(float)
    hard = rng.normal(2, 0.5, 200)  # documents differ far more than the two arms
    arm, opponent = (hard - 0.01) * tokens, hard * tokens
    assert statistics.over_documents(arm, opponent, tokens) == pytest.approx((-0.01, -0.01))
    noisy = arm + rng.normal(0, 0.02, 200) * tokens
    low, high = statistics.over_documents(noisy, opponent, tokens)
    width = 2 * 1.96 * 0.02 / np.sqrt(200)  # of the noise alone: documents' own difficulty cancels
    assert high - low == pytest.approx(width, rel=0.25)
    assert (low + high) / 2 == pytest.approx(-0.01, abs=width)


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([-0.031, -0.030, -0.029], "beats"),
        ([0.031, 0.030, 0.029], "loses to"),
        ([0.0001, -0.0001, 0.0002], "are equal within 0.005"),
        ([-0.1, 0.05, 0.02], "No difference shown"),
    ],
)
def test_the_verdict_is_a_plain_sentence(differences, words):
    assert words in statistics.verdict("x", "gpt", statistics.contrast(differences, MARGIN), MARGIN)


CLEAR = statistics.Contrast(3, -0.04321, (-0.05, -0.04), 0.012, 3, 0.02, 0.9)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "arm beats gpt by 0.0432 nats per token (p = 0.012 over 3 seeds)."),
        ({"mean": 0.04321}, "arm loses to gpt by 0.0432 nats per token (p = 0.012 over 3 seeds)."),
        ({"p_holm": 0.036}, "arm beats gpt by 0.0432 nats per token (p = 0.036 over 3 seeds)."),
        # A p that does not outlive the adjustment, whatever it was before.
        (
            {"p_holm": 0.0512},
            "No difference shown between arm and gpt (-0.0432 nats per token, p = 0.051); "
            "3 seeds would have found 0.0200 four times in five.",
        ),
        (
            {"mean": 0.001, "p": 0.2, "p_holm": 0.6, "p_equal": 0.06, "detectable": 0.01236, "seeds": 5},
            "No difference shown between arm and gpt (+0.0010 nats per token, p = 0.6); "
            "5 seeds would have found 0.0124 four times in five.",
        ),
        (
            {"mean": 0.001, "p": 0.2, "p_holm": 0.6, "p_equal": 0.04},
            "arm and gpt are equal within 0.0125 nats per token (p = 0.04).",
        ),
        # A small difference can be shown and lie within the margin: that it is one comes first.
        ({"p_equal": 0.001}, "arm beats gpt by 0.0432 nats per token (p = 0.012 over 3 seeds)."),
        (
            {"seeds": 1, "interval_95": None, "p": None, "detectable": None, "p_equal": None},
            "arm is 0.0432 nats per token below gpt, on one seed: no test.",
        ),
        (
            {"mean": 0.5, "seeds": 1, "interval_95": None, "p": None, "detectable": None, "p_equal": None},
            "arm is 0.5000 nats per token above gpt, on one seed: no test.",
        ),
    ],
)
def test_a_verdict_says_what_the_numbers_show(changes, sentence):
    assert statistics.verdict("arm", "gpt", dataclasses.replace(CLEAR, **changes), 0.0125) == sentence
