"""The statistics of a comparison, against scipy's own tests and by simulation with known effects."""

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


def test_one_seed_says_nothing_and_equal_runs_are_equal():
    one = statistics.contrast([-0.1], MARGIN)
    assert (one.mean, one.p, one.interval_95) == (-0.1, None, None)
    assert "no test" in statistics.verdict("a", "b", one, MARGIN)
    same = statistics.contrast([0.0, 0.0, 0.0], MARGIN)
    assert (same.p, same.p_equal) == (1.0, 0.0)


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


def test_holm():
    # Worked by hand: sorted 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.04 x 1, made monotone.
    assert statistics.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    rng = np.random.default_rng(3)
    false = 0
    for _ in range(2000):
        p_values = [statistics.contrast(rng.normal(0, 1, 5), MARGIN).p for _ in range(5)]
        false += min(statistics.holm(p_values)) < 0.05
    assert false / 2000 < 0.065


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
