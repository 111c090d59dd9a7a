"""benchmarks/time_to_loss.py: how the shortest run that reaches a loss is searched for, and its settings."""

import json
import math
import re
from pathlib import Path

import pytest
import time_to_loss

from shortcut_cli.config import reading

ROOT = Path(__file__).parent.parent
EXPERIMENTS = (ROOT / "docs" / "experiments.md").read_text()


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


KEYS = ("who", "rate", "loss", "steps", "wall_s", "cpu_s")
RUNS = [
    dict(zip(KEYS, values, strict=True))
    for values in (
        ("nanoGPT", 0.001, 2.0, 100, 100.0, 200.0),
        ("nanoGPT", 0.002, 1.8, 100, 110.0, 220.0),
        ("nanoGPT", 0.004, 1.9, 100, 90.0, 160.0),
        ("nanochat", 1.0, 1.9, 60, 50.0, 80.0),
        ("shortcut", 0.016, 1.7, 1_040, 33.0, 88.0),  # the least wall time
        ("shortcut", 0.016, 1.95, 25, 40.0, 50.0),
        ("shortcut", 0.016, 1.8, 30, 55.0, 77.0),
        ("shortcut", 0.016, 2.01, 10, 5.0, 10.0),  # reaches nothing
    )
]
PEERS, OTHERS = RUNS[:3], RUNS[3:]


def test_each_goal_has_its_reference_and_the_quickest_run_that_reaches_it(capsys):
    goals = {"first rate": 2.0, "best rate": 1.8}
    found = time_to_loss.conclude(goals, PEERS, RUNS)
    assert found == {
        "goals": goals,
        "times": {
            "first rate": {"nanoGPT": PEERS[0], "nanochat": OTHERS[0], "shortcut": OTHERS[2]},
            "best rate": {"nanoGPT": PEERS[1], "nanochat": None, "shortcut": OTHERS[3]},
        },
    }
    assert [re.sub(" +", " ", line) for line in capsys.readouterr().out.splitlines()] == [
        "",
        "2.0000 nats per token (first rate, nanoGPT at 0.001)",
        " nanoGPT 100.0 s wall, 200.0 s CPU, 100 steps at 0.001, 1.00 of nanoGPT's CPU, 1.00 of its wall time",
        " nanochat 50.0 s wall, 80.0 s CPU, 60 steps at 1, 0.40 of nanoGPT's CPU, 0.50 of its wall time",
        " shortcut 40.0 s wall, 50.0 s CPU, 25 steps at 0.016, 0.25 of nanoGPT's CPU, 0.40 of its wall time",
        "",
        "1.8000 nats per token (best rate, nanoGPT at 0.002)",
        " nanoGPT 110.0 s wall, 220.0 s CPU, 100 steps at 0.002, 1.00 of nanoGPT's CPU, 1.00 of its wall time",
        " nanochat not reached",
        " shortcut 55.0 s wall, 77.0 s CPU, 30 steps at 0.016, 0.35 of nanoGPT's CPU, 0.50 of its wall time",
    ]


def test_a_goal_that_was_given_has_no_reference(capsys):
    found = time_to_loss.conclude({"goal": 1.75}, [], OTHERS)
    assert found["times"] == {"goal": {"nanochat": None, "shortcut": OTHERS[1]}}
    assert [re.sub(" +", " ", line) for line in capsys.readouterr().out.splitlines()] == [
        "",
        "1.7500 nats per token (goal)",
        " nanochat not reached",
        " shortcut 33.0 s wall, 88.0 s CPU, 1,040 steps at 0.016",
    ]


@pytest.mark.parametrize(
    ("domain", "data"), [("letters", "letters"), ("text", "shards text"), ("audio", "shards speech")]
)
def test_the_settings_of_short_runs_are_those_of_the_experiments(domain, data):
    """Those of the newest command of that domain in docs/experiments.md."""
    command = re.search(rf"`python benchmarks/time_to_loss.py {data} [^`]*--ours\s([^`]*)`", EXPERIMENTS)
    settings = [*time_to_loss.SETTINGS, *time_to_loss.SHORT[domain]]
    assert reading.read("text", settings) == reading.read("text", command[1].split())
    assert time_to_loss.SHORT["midi"] == time_to_loss.SHORT["text"]


@pytest.mark.parametrize("name", ["letters-middlemarch", "text"])
def test_tables_say_what_the_kept_runs_have(name):
    """The quickest runs that reach each goal: loss, CPU seconds, share of nanoGPT's, steps, in docs/experiments.md."""
    kept = json.loads((ROOT / "benchmarks" / "results" / "time_to_loss" / f"{name}.json").read_text())
    (entry,) = [part for part in EXPERIMENTS.split("\n## ") if f"time_to_loss/{name}.json" in part]
    rows = [re.sub(r"\([^)]*\)|\*\*", "", line).split("|")[2:] for line in entry.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in row] for row in rows]
    of_nanogpt = {run["rate"]: run for run in kept["runs"] if run["who"] == "nanoGPT"}
    best = min(of_nanogpt.values(), key=lambda run: run["loss"])
    for goal, reference in (("first rate", min(of_nanogpt.items())[1]), ("best rate", best)):
        assert kept["goals"][goal] == reference["loss"]
        for who in ("nanochat", "shortcut", "in bf16"):
            reached = [run for run in kept["runs"] if run["who"] == who and run["loss"] <= reference["loss"]]
            run = min(reached, key=lambda run: run["cpu_s"])
            share = f"{run['cpu_s'] / reference['cpu_s']:.2f}"
            said = [row for row in rows if row[:3] == [f"{run['loss']:.3f}", f"{run['cpu_s']:.1f}", share]]
            assert len(said) == 1, (who, goal, run["loss"], run["cpu_s"], share)
            assert said[0][-2].startswith(f"{run['steps']:,} of ")
