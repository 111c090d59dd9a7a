"""benchmarks/time_to_loss.py: how the shortest run that reaches a loss is searched for, and its settings."""

import math
import re
from pathlib import Path

import pytest
import time_to_loss

from shortcut_cli.config import reading

EXPERIMENTS = (Path(__file__).parent.parent / "docs" / "experiments.md").read_text()


def searched(loss, goals, last):
    """steps -> loss of all runs, each of which is made once."""
    found = time_to_loss.narrowed("x", goals, last, lambda steps: run(steps, loss(steps)))
    steps = [each["steps"] for each in found]
    assert len(set(steps)) == len(steps)
    assert max(steps) <= last
    return {each["steps"]: each["loss"] for each in found}


def run(steps, loss):
    return dict.fromkeys(("rate", "tokens", "parameters", "wall_s", "cpu_s"), 1) | {"steps": steps, "loss": loss}


@pytest.mark.parametrize("last", [1, 7, 200, 2_400])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.77, 1.0])
def test_the_shortest_run_is_found_to_three_percent(last, share):
    goals = {"low": 1 / max(1, share * last), "high": 3 / max(1, share * last)}
    found = searched(lambda steps: 1 / steps, goals, last)
    for goal in goals.values():
        wanted = next(steps for steps in range(1, last + 1) if 1 / steps <= goal)
        assert wanted <= min(steps for steps, loss in found.items() if loss <= goal) <= max(wanted + 1, wanted * 1.031)
    assert len(found) <= 2 * (math.log2(1 / 0.03) + 1) + math.log(10, 1.25) + 1


def test_a_loss_that_is_not_reached_is_given_up_at_the_last_length():
    found = searched(lambda steps: 1 / steps, {"a": 0.05, "b": 0.001}, 200)
    assert max(found) == 200
    assert min(steps for steps, loss in found.items() if loss <= 0.05) == 20


@pytest.mark.parametrize(
    ("domain", "data"), [("letters", "letters"), ("text", "shards text"), ("audio", "shards speech")]
)
def test_the_settings_of_short_runs_are_those_of_the_experiments(domain, data):
    """Those of the newest command of that domain in docs/experiments.md."""
    command = re.search(rf"`python benchmarks/time_to_loss.py {data} [^`]*--ours\s([^`]*)`", EXPERIMENTS)
    settings = [*time_to_loss.SETTINGS, *time_to_loss.SHORT[domain]]
    assert reading.read("text", settings) == reading.read("text", command[1].split())
    assert time_to_loss.SHORT["midi"] == time_to_loss.SHORT["text"]
