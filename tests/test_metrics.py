"""Losses, scores and learning rates, against closed forms and plain loops."""

import itertools
import math

import numpy as np
import pytest
import torch

from shortcut_cli.config.schema import TrainConfig
from shortcut_cli.inference import metrics
from shortcut_cli.models import loss
from shortcut_cli.training import optim


def test_loss_is_the_mean_of_the_token_losses_and_both_equal_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator)
    targets = torch.randint(0, 5, (2, 3), generator=generator)
    plain = [
        math.log(sum(math.exp(v) for v in row.tolist())) - row[target].item()
        for row, target in zip(logits.flatten(0, 1), targets.flatten(), strict=True)
    ]
    assert loss.token_losses(logits, targets).flatten().tolist() == pytest.approx(plain, rel=1e-5)
    assert loss.loss(logits, targets).item() == pytest.approx(sum(plain) / 6, rel=1e-5)


def test_the_gradient_of_the_loss_is_that_of_torch_whatever_comes_from_above():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 5, 7, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 7, (4, 5), generator=generator)
    wanted, found = logits.clone().requires_grad_(), logits.float().requires_grad_()
    (-2.5 * torch.nn.functional.cross_entropy(wanted.flatten(0, 1), targets.flatten())).backward()
    (-2.5 * loss.loss(found, targets)).backward()
    # At most 2.5 / 20, of which fp32 keeps seven digits.
    assert torch.allclose(found.grad.double(), wanted.grad, rtol=0, atol=1e-7)


def test_losses_are_computed_in_fp32_whatever_the_logits_are():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator).bfloat16()
    targets = torch.randint(0, 5, (2, 3), generator=generator)
    plain = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="none")
    each, mean = loss.token_losses(logits, targets), loss.loss(logits, targets)
    assert each.dtype == mean.dtype == torch.float32
    assert torch.allclose(each.double(), plain.view(2, 3), rtol=1e-6)
    assert mean.item() == pytest.approx(plain.mean().item(), rel=1e-6)


def test_entropy_of_a_uniform_distribution():
    assert metrics.entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))


def test_entropy_of_a_half_a_quarter_and_two_eighths():
    # 1/2 * 1 + 1/4 * 2 + 2 * 1/8 * 3 bits. An id that occurs once counts.
    assert metrics.entropy(np.array([0, 1, 4, 0, 2, 1])) == pytest.approx(1.75 * math.log(2))
    assert metrics.entropy(np.array([0, 9])) == 0


def test_bits_per_unit():
    # 8 tokens of ln 2 nats each are 8 bits; over 4 bytes, 2 bits per byte.
    assert metrics.bits_per_unit(8 * math.log(2), 4) == pytest.approx(2)


@pytest.mark.parametrize("resamples", [1, 40, 1000])
def test_the_interval_is_that_of_the_ratio_of_sums_over_the_same_draws(resamples):
    generator = np.random.default_rng(5)
    tokens = generator.integers(1, 500, 13).astype(float)
    nats = tokens * generator.normal(2, 0.3, 13) + tokens**1.2  # long documents cost more per token
    draws = np.random.default_rng(0)
    drawn = np.stack([draws.integers(0, 13, 13) for _ in range(resamples)])
    ratios = np.sort(nats[drawn].sum(1) / tokens[drawn].sum(1))
    wanted = [np.interp(share * (resamples - 1), np.arange(resamples), ratios) for share in (0.025, 0.975)]
    assert metrics.bootstrap(nats, tokens, resamples) == pytest.approx(wanted, rel=1e-12)
    if resamples == 40:  # the ends are apart, and another seed gives another interval
        assert wanted[0] < np.median(ratios) < wanted[1]
        assert metrics.bootstrap(nats, tokens, resamples, seed=1) != pytest.approx(wanted, rel=1e-4)


def test_the_interval_has_its_coverage():
    # 300 experiments with 40 documents of 100 tokens whose mean losses are normal around 2: about 95 % cover 2.
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(300):
        nats = generator.normal(2, 0.3, 40) * 100
        low, high = metrics.bootstrap(nats, np.full(40, 100.0), 300)
        held += low <= 2 <= high
    # Three standard deviations of a binomial, and the known slight undercoverage of percentile intervals.
    assert 0.88 <= held / 300 <= 0.99


def config(**given):
    return TrainConfig(steps=100, batch_size=8, lr=1.0, **({"warmup": 10, "min_lr": 0.1} | given))


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_schedule_warms_up_peaks_and_ends_low(schedule):
    rates = [optim.learning_rate(step, config(schedule=schedule)) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert max(rates) == pytest.approx(1)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_wsd_is_flat_until_its_decay():
    rates = [optim.learning_rate(step, config(schedule="wsd", decay=0.3)) for step in range(100)]
    assert set(rates[10:69]) == {1.0}
    assert rates[84] == pytest.approx(0.1 + 0.9 * 15 / 30)


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, free = optim.adamw(model, config(weight_decay=0.5)).param_groups
    assert [p.dim() for p in decayed["params"]] == [2]
    assert decayed["weight_decay"] == 0.5
    assert len(free["params"]) == 3
    assert free["weight_decay"] == 0
