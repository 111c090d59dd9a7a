"""Scores: against closed forms and plain loops."""

import itertools
import math

import numpy as np
import pytest
import torch

from shortcut_cli import metrics, optim
from shortcut_cli.recipe import TrainKeys


def test_loss_is_the_mean_of_the_token_losses_and_both_equal_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator)
    targets = torch.randint(0, 5, (2, 3), generator=generator)
    plain = [
        math.log(sum(math.exp(v) for v in row.tolist())) - row[target].item()
        for row, target in zip(logits.flatten(0, 1), targets.flatten(), strict=True)
    ]
    assert metrics.token_losses(logits, targets).flatten().tolist() == pytest.approx(plain, rel=1e-5)
    assert metrics.loss(logits, targets).item() == pytest.approx(sum(plain) / 6, rel=1e-5)


def test_entropy_of_a_uniform_distribution():
    assert metrics.entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))


def test_bits_per_unit():
    # 8 tokens of ln 2 nats each are 8 bits; over 4 bytes, 2 bits a byte.
    assert metrics.bits_per_unit(8 * math.log(2), 4) == pytest.approx(2)


def test_the_interval_has_its_coverage():
    # 300 worlds of 40 documents of 100 tokens whose mean losses are normal around 2: about 95 % of them hold 2.
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        nats = generator.normal(2, 0.3, 40) * 100
        low, high = metrics.bootstrap(nats, np.full(40, 100.0), 300)
        held += low <= 2 <= high
    # Three standard deviations of a binomial, and the known slight undercoverage of percentile intervals.
    assert 0.88 <= held / 300 <= 0.99


def keys(**given):
    return TrainKeys(steps=100, batch_size=8, lr=1.0, **({"warmup": 10, "min_lr": 0.1} | given))


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_schedule_warms_up_peaks_and_ends_low(schedule):
    rates = [optim.learning_rate(step, keys(schedule=schedule)) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert max(rates) == pytest.approx(1)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_wsd_is_flat_until_its_decay():
    rates = [optim.learning_rate(step, keys(schedule="wsd", decay=0.3)) for step in range(100)]
    assert set(rates[10:69]) == {1.0}
    assert rates[84] == pytest.approx(0.1 + 0.9 * 15 / 30)


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, free = optim.adamw(model, keys(weight_decay=0.5)).param_groups
    assert [p.dim() for p in decayed["params"]] == [2]
    assert decayed["weight_decay"] == 0.5
    assert len(free["params"]) == 3
    assert free["weight_decay"] == 0
