"""The plan of docs/scale.md: its simulations against closed forms, and the document against the script."""

import math
import re
from pathlib import Path

import numpy as np
import plan  # benchmarks/plan.py
import pytest
import torch

from shortcut_cli import registry
from shortcut_cli.config import reading

DOCUMENT = Path(__file__).parent.parent / "docs" / "scale.md"


@pytest.mark.parametrize("rate", [1 / 300, 1 / 3000, 1 / 10**6])
def test_a_training_with_losses_takes_what_the_closed_form_expects(rate):
    generator = np.random.default_rng(1)
    times = [plan.simulated_seconds(4000, 400, 30, 120, rate, generator) for _ in range(3000)]
    expected = 10 * plan.expected_seconds(400, 30, 120, rate)
    error = np.std(times) / math.sqrt(len(times))
    assert abs(np.mean(times) - expected) < 4 * error + 1e-6


def test_without_losses_a_training_is_its_work_and_its_checkpoints():
    generator = np.random.default_rng(1)
    assert plan.simulated_seconds(1000, 300, 10, 120, 1e-12, generator) == 1000 + 4 * 10
    assert plan.expected_seconds(300, 10, 120, 1e-12) == pytest.approx(310)


def test_no_interval_is_better_than_youngs_where_losses_are_rare():
    rate, cost = 1e-6, 20
    best = plan.best_interval(cost, rate)
    per_second = [plan.expected_seconds(w, cost, 0, rate) / w for w in np.linspace(best / 3, best * 3, 200)]
    assert plan.expected_seconds(best, cost, 0, rate) / best <= min(per_second) * (1 + 1e-5)


def test_a_queue_gives_the_next_batch_to_whoever_is_free():
    assert plan.by_queue([5, 4, 3, 3, 3], 2) == 10  # 5 + 3, 4 + 3 and then 3
    assert plan.by_queue([1.0] * 12, 4) == 3
    batches = np.random.default_rng(2).random(50)
    assert batches.sum() / 7 <= plan.by_queue(batches, 7) <= batches.sum() / 7 + batches.max()  # Graham, 1966


def test_tasks_by_names_share_what_a_multinomial_shares():
    generator = np.random.default_rng(3)
    found = np.mean([plan.by_name(np.ones(6400), 64, generator) for _ in range(200)])
    draws = generator.multinomial(6400, [1 / 64] * 64, 200).max(axis=1)
    assert abs(found - draws.mean()) < 5 * draws.std() / math.sqrt(200)


def test_lengths_have_the_mean_that_is_asked_for():
    seconds = plan.lengths(200_000, 360, np.random.default_rng(4))
    assert seconds.mean() == pytest.approx(360, rel=0.02)
    assert seconds.max() <= plan.LARGEST


def test_memory_is_what_bytes_per_parameter_and_token_say():
    parameters = 1_256_341_504
    state, gathered, activations = plan.memory(16_384, 1)
    assert (state, gathered) == (16 * parameters, 2 * parameters)
    assert plan.memory(16_384, 64)[0] == state / 64
    assert plan.memory(32_768, 64)[2] == 2 * activations
    assert activations == 16_384 * (24 * 4096 + 69_632 + 8200)


def test_the_model_has_the_numbers_that_the_plan_counts():
    shape = ("layers=24", "width=2048", "heads=16", "ffn=8192", "context=2048", "dropout=0.0", "tied=true")
    shape += ("shortcut.map_width=1024",)
    resolved = reading.read("audio", ["model.name=shortcut", *(f"model.{one}" for one in shape)])
    with torch.device("meta"):
        model = registry.load(registry.MODELS, "shortcut")(resolved.model, 1025)
    assert sum(each.numel() for each in model.parameters()) == plan.value("parameters")
    assert model.training_flops_per_token(2048) == plan.value("flops_per_token")


def test_the_document_has_the_tables_that_the_script_prints():
    (found,) = re.findall(r"<!-- plan -->\n\n(.*?)\n\n<!-- end -->", DOCUMENT.read_text(), re.S)
    assert found == plan.tables()
