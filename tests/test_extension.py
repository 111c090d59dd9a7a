"""train --extend, and what train.keep keeps: a longer run is the same whether it was planned so long or extended."""

import json
import math
import os
import shutil

import pytest
import torch
from conftest import quiet
from test_training import KINDS, NEVER, equal, go, log_lines, stop_after, tiny, weights_hash

from shortcut_cli.config import reading, schema
from shortcut_cli.errors import CheckFailed, Interrupted, UsageError
from shortcut_cli.stages import training
from shortcut_cli.training import checkpoint, keeping, optim

WSD = ("train.schedule=wsd", "train.decay=0.25", "train.steps=12")  # falls from step 9 on; 16 of 22: from step 16
CONSTANT = ("train.schedule=constant", "train.steps=12")


def extend(text_run, folder, steps, *settings, report=quiet, stop=NEVER):
    return go(tiny(text_run, *settings, f"train.steps={steps}"), folder, stop, report=report, extend=True)


def logged(folder):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in log_lines(folder)]


def check_same_run(extended, whole):
    """Weights, optimizer, scores and log of two runs are equal."""
    for name in ("run.pt", "resume.pt"):
        one, other = (checkpoint.load(folder / name) for folder in (extended, whole))
        assert equal(one["model"], other["model"]), name
        assert all(one[key] == other[key] for key in ("recipe", "step", "scores", "lineage", "precision")), name
    one, other = (checkpoint.load(folder / "resume.pt") for folder in (extended, whole))
    for key in ("optimizer", "muon"):
        torch.testing.assert_close(one.get(key), other.get(key), rtol=0, atol=0)
    assert {key: value for key, value in one["state"].items() if key != "seconds"} == {
        key: value for key, value in other["state"].items() if key != "seconds"
    }
    if one["average"]:
        assert equal(one["average"], other["average"])
    assert logged(extended) == logged(whole)


# The ends of these runs: on the plan of a longer one (12), off that of its log (eval 4, log 2 of 13 steps), off both.
@pytest.mark.parametrize("schedule", ["wsd", "constant"])
@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        *((12, kind) for kind in KINDS),
        (12, ("train.ema=0.9", "train.accumulation=2", "model.dropout=0.1")),
        (13, ("train.ema=0.9",)),
        (11, ("train.log_every=3", "train.eval_every=5")),
        (10, ("train.eval_every=5", "train.log_every=3")),
    ],
)
def test_an_extended_run_equals_one_that_was_planned_so_long(text_run, tmp_path, schedule, steps, settings):
    settings = (f"train.schedule={schedule}", *settings)
    go(tiny(text_run, *settings, "train.steps=22"), tmp_path / "whole")
    go(tiny(text_run, *settings, f"train.steps={steps}"), tmp_path / "run")
    before = checkpoint.load(tmp_path / "run" / "run.pt")
    torch.manual_seed(5)  # nothing depends on the state of the global generator
    extend(text_run, tmp_path / "run", 22, *settings)
    check_same_run(tmp_path / "run", tmp_path / "whole")
    kept = checkpoint.load(tmp_path / "run" / f"run-{steps}.pt")
    assert equal(kept["model"], before["model"])
    assert kept["recipe"] == before["recipe"]
    # It is now a run of that length: plain `train` finds it finished.
    assert go(tiny(text_run, *settings, "train.steps=22"), tmp_path / "run")["worked"] is False


def test_a_run_that_is_extended_twice_is_still_the_same(text_run, tmp_path):
    go(tiny(text_run, *WSD, "train.steps=30"), tmp_path / "whole")
    go(tiny(text_run, *WSD), tmp_path / "run")
    extend(text_run, tmp_path / "run", 17, *WSD)
    extend(text_run, tmp_path / "run", 30, *WSD)
    check_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_best_weights_from_before_the_decay_come_back(text_run, tmp_path, monkeypatch):
    """Validation losses as given, the shorter run's best in its decay, the longer one's before that."""
    losses = {4: 3.0, 8: 2.0, 12: 1.0, 16: 2.5, 20: 2.5, 22: 2.5}
    monkeypatch.setattr(training.Trainer, "validation_loss", lambda trainer: losses[trainer.state.step])
    settings = (*WSD, "train.steps=12", "train.decay=0.2")  # falls from step 10: the best before is that of step 8
    go(tiny(text_run, *settings), tmp_path / "run")
    assert checkpoint.load(tmp_path / "run" / "run.pt")["step"] == 12
    losses[12] = 2.5
    longer = (*settings, "train.steps=22")
    go(tiny(text_run, *longer), tmp_path / "whole")
    extend(text_run, tmp_path / "run", 22, *settings)
    check_same_run(tmp_path / "run", tmp_path / "whole")
    found = checkpoint.load(tmp_path / "run" / "run.pt")
    assert (found["step"], found["scores"]) == (8, {"validation": 2.0})


def test_an_unfinished_run_is_extended_from_where_it_is(text_run, tmp_path):
    go(tiny(text_run, *WSD, "train.steps=22"), tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(tiny(text_run, *WSD), tmp_path / "run", stop_after(7))
    notes = []
    extend(text_run, tmp_path / "run", 22, *WSD, report=lambda event: notes.append(getattr(event, "text", None)))
    assert "resuming at step 7" in notes
    check_same_run(tmp_path / "run", tmp_path / "whole")
    # One that is in its decay goes back to before it.
    with pytest.raises(Interrupted):
        go(tiny(text_run, *WSD), tmp_path / "late", stop_after(11))
    notes = []
    extend(text_run, tmp_path / "late", 22, *WSD, report=lambda event: notes.append(getattr(event, "text", None)))
    assert notes[:2] == [
        "the decay of a run of 12 steps begins after step 9; it goes on from there",
        "resuming at step 9",
    ]
    check_same_run(tmp_path / "late", tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_an_extension_that_is_interrupted_is_resumed_by_the_same_command(text_run, tmp_path, kind):
    settings = (*WSD, *kind)
    go(tiny(text_run, *settings, "train.steps=22"), tmp_path / "whole")
    go(tiny(text_run, *settings), tmp_path / "run")
    for steps in (3, 6):  # before and in the new decay
        with pytest.raises(Interrupted):
            extend(text_run, tmp_path / "run", 22, *settings, stop=stop_after(steps))
    extend(text_run, tmp_path / "run", 22, *settings)
    check_same_run(tmp_path / "run", tmp_path / "whole")
    assert extend(text_run, tmp_path / "run", 22, *settings)["worked"] is False


@pytest.mark.parametrize("settings", [WSD, (*CONSTANT, "train.steps=11"), CONSTANT, (*WSD, *KINDS[-1])])
def test_a_process_that_is_killed_while_it_extends_loses_nothing(text_run, tmp_path, monkeypatch, settings):
    """It is killed after each rename in turn; the same command then ends as if that had not happened."""
    go(tiny(text_run, *settings, "train.steps=22"), tmp_path / "whole")
    go(tiny(text_run, *settings), tmp_path / "short")

    for renames in range(1, 6):
        folder = tmp_path / f"killed-{renames}"
        shutil.copytree(tmp_path / "short", folder)
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", killing_after(renames))
            with pytest.raises(Killed):
                extend(text_run, folder, 22, *settings)
        for path in folder.glob("*.pt"):
            checkpoint.load(path)
        extend(text_run, folder, 22, *settings)
        check_same_run(folder, tmp_path / "whole")


class Killed(BaseException):
    pass


def killing_after(renames):
    """An `os.replace` that raises Killed after it has renamed so many files."""
    replace = os.replace

    def replaced(*paths):
        nonlocal renames
        replace(*paths)
        renames -= 1
        if renames == 0:
            raise Killed

    return replaced


def test_cosine_says_that_its_schedule_has_ended_and_keeps_its_last_rate(text_run, tmp_path):
    go(tiny(text_run), tmp_path / "run")
    notes = []
    extend(text_run, tmp_path / "run", 16, report=lambda event: notes.append(getattr(event, "text", "")))
    (said,) = (note for note in notes if "schedule" in note)
    assert said == (
        "the cosine schedule of this run ends at step 12; "
        "the steps after that have the learning rate of its end, 0.0002"
    )
    rates = {line["step"]: line["lr"] for line in log_lines(tmp_path / "run") if "lr" in line}
    assert rates[10] > rates[12] == pytest.approx(0.1 * 0.002)  # min_lr = 0.1, lr = 0.002
    assert rates[14] == rates[16] == rates[12]
    # The recipe says so, and a run that was planned that way is the same.
    held = tiny(text_run, "train.steps=16", "train.schedule_steps=12")
    assert reading.read(str(tmp_path / "run" / "recipe.toml")) == held
    go(held, tmp_path / "whole")
    assert weights_hash(tmp_path / "run") == weights_hash(tmp_path / "whole")
    with pytest.raises(UsageError, match=r"a different run\n  train\.schedule_steps: 12 -> None"):
        go(tiny(text_run, "train.steps=16"), tmp_path / "run")
    extend(text_run, tmp_path / "run", 18)
    assert reading.read(str(tmp_path / "run" / "recipe.toml")).train.schedule_steps == 12


def test_a_cosine_that_ends_at_a_rate_of_0_is_refused(text_run, tmp_path):
    go(tiny(text_run, "train.min_lr=0.0"), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="ends at step 12, with a learning rate of 0"):
        extend(text_run, tmp_path, 16, "train.min_lr=0.0")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_can_not_be_extended_is_refused_and_left_as_it_is(text_run, tmp_path):
    with pytest.raises(UsageError, match="has no run to extend"):
        extend(text_run, tmp_path / "none", 16, *WSD)
    assert not (tmp_path / "none").exists()
    go(tiny(text_run, *WSD), tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(UsageError, match="holds a run of 12 steps, which can't be extended to 11"):
        extend(text_run, tmp_path / "run", 11, *WSD)
    with pytest.raises(UsageError, match=r"a different run\n  train\.lr: 0\.002 -> 0\.5$"):
        extend(text_run, tmp_path / "run", 22, *WSD, "train.lr=0.5")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    (tmp_path / "run" / "stable.pt").write_bytes(before["stable.pt"][:-1])
    with pytest.raises(CheckFailed, match=r"stable\.pt can't be read"):
        extend(text_run, tmp_path / "run", 22, *WSD)
    (tmp_path / "run" / "stable.pt").unlink()
    with pytest.raises(UsageError, match=r"has passed step 9, up to which .* has no stable\.pt"):
        extend(text_run, tmp_path / "run", 22, *WSD)
    go(tiny(text_run, *WSD, "train.seed=2"), tmp_path / "other")
    (tmp_path / "run" / "stable.pt").write_bytes((tmp_path / "other" / "stable.pt").read_bytes())
    with pytest.raises(UsageError, match=r"has no stable\.pt"):
        extend(text_run, tmp_path / "run", 22, *WSD)
    del before["stable.pt"]
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before


SCHEDULES = [
    {"schedule": "constant"},
    *({"schedule": "wsd", "decay": decay} for decay in (0.001, 0.1, 0.33, 0.5, 0.99, 1.0)),
    {"schedule": "cosine"},
    {"schedule": "cosine", "min_lr": 1.0},
    {"schedule": "wsd", "schedule_steps": 30},
]


@pytest.mark.parametrize("keys", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 5, 60])
def test_shared_steps_are_those_that_a_plain_loop_finds(keys, warmup):
    for steps, longer in ((1, 2), (7, 8), (40, 41), (40, 80), (50, 33)):
        one, other = (
            schema.ScheduleConfig(steps=count, batch_size=1, lr=0.5, warmup=warmup, **keys) for count in (steps, longer)
        )
        rates = [[optim.learning_rate(step, each) for step in range(min(steps, longer))] for each in (one, other)]
        differ = [step for step, (a, b) in enumerate(zip(*rates, strict=True)) if a != b]
        assert keeping.shared_steps(one, other) == min(differ, default=min(steps, longer))


def test_the_rate_holds_after_the_steps_of_the_schedule():
    config = schema.ScheduleConfig(steps=30, batch_size=1, lr=1.0, min_lr=0.2, warmup=4, schedule_steps=20)
    planned = schema.ScheduleConfig(steps=20, batch_size=1, lr=1.0, min_lr=0.2, warmup=4)
    rates = [optim.learning_rate(step, config) for step in range(30)]
    assert rates[:20] == [optim.learning_rate(step, planned) for step in range(20)]
    assert rates[19:] == [pytest.approx(0.2)] * 11
    assert rates[11] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 7 / 15)))


# What a run keeps


def names(folder):
    return sorted(path.name for path in folder.glob("*.pt"))


def test_a_run_keeps_what_its_recipe_says(text_run, tmp_path):
    plain = tiny(text_run, "train.ema=0.9", "train.log_every=5")
    keep = tiny(text_run, "train.ema=0.9", "train.log_every=5", "train.keep=best, last, every:5")
    go(plain, tmp_path / "plain")
    go(keep, tmp_path / "keep")
    assert names(tmp_path / "plain") == ["resume.prev.pt", "resume.pt", "run.pt"]
    assert names(tmp_path / "keep") == [
        *("last.pt", "resume.prev.pt", "resume.pt", "run.pt", "step-10.pt", "step-5.pt"),
    ]
    for name in ("run.pt", "resume.pt"):
        assert weights_hash(tmp_path / "plain", name) == weights_hash(tmp_path / "keep", name)
    assert logged(tmp_path / "plain") == logged(tmp_path / "keep")
    # Each file has the weights of its step, as a run that ends there has them (constant: so far as rates are equal).
    last, state = (checkpoint.load(tmp_path / "keep" / name) for name in ("last.pt", "resume.pt"))
    assert equal(last["model"], state["average"])
    losses = {line["step"]: line["validation"] for line in log_lines(tmp_path / "keep") if "validation" in line}
    assert (last["step"], last["scores"]) == (12, {"validation": losses[12]})
    short = tiny(text_run, "train.ema=0.9", "train.log_every=5", "train.steps=5", "train.schedule_steps=12")
    go(short, tmp_path / "short")
    (ended,) = (checkpoint.load(tmp_path / "short" / name) for name in ("resume.pt",))
    fifth = checkpoint.load(tmp_path / "keep" / "step-5.pt")
    assert equal(fifth["model"], ended["average"])
    measured = [line["validation"] for line in log_lines(tmp_path / "short") if "validation" in line]
    assert (fifth["step"], fifth["scores"]["validation"]) == (5, measured[-1])


def test_what_is_kept_is_the_same_after_an_interruption(text_run, tmp_path):
    resolved = tiny(text_run, *WSD, "train.keep=best,last,every:3")
    go(resolved, tmp_path / "whole")
    for steps in (2, 5):
        with pytest.raises(Interrupted):
            go(resolved, tmp_path / "parts", stop_after(steps))
    go(resolved, tmp_path / "parts")
    assert names(tmp_path / "parts") == names(tmp_path / "whole")
    assert {"last.pt", "stable.pt", "step-3.pt", "step-12.pt"} < set(names(tmp_path / "whole"))
    for name in names(tmp_path / "whole"):
        if name != "resume.prev.pt":
            assert weights_hash(tmp_path / "parts", name) == weights_hash(tmp_path / "whole", name), name


def test_a_finished_run_gets_its_last_weights_if_they_are_missing_or_damaged(text_run, tmp_path):
    go(tiny(text_run), tmp_path)
    resolved = tiny(text_run, "train.keep=last, best")
    for damage in (None, b"PK", (tmp_path / "run.pt").read_bytes()[:-1]):
        if damage:
            (tmp_path / "last.pt").write_bytes(damage)
        assert go(resolved, tmp_path)["worked"] is False
        assert equal(checkpoint.load(tmp_path / "last.pt")["model"], checkpoint.load(tmp_path / "resume.pt")["model"])
    before = (tmp_path / "last.pt").stat().st_mtime_ns
    go(resolved, tmp_path)
    assert (tmp_path / "last.pt").stat().st_mtime_ns == before


def test_starting_over_removes_what_the_run_before_has_kept(text_run, tmp_path):
    go(tiny(text_run, *WSD, "train.keep=best, last, every:4"), tmp_path)
    extend(text_run, tmp_path, 14, *WSD, "train.keep=best, last, every:4")
    (tmp_path / "step-99.pt").write_bytes(b"a file of the user")
    (tmp_path / "mine.pt").write_bytes((tmp_path / "run.pt").read_bytes())
    assert {"stable.pt", "last.pt", "run-12.pt", "step-4.pt"} < set(names(tmp_path))
    go(tiny(text_run, "train.steps=1"), tmp_path, resume="never")
    assert names(tmp_path) == ["mine.pt", "resume.pt", "run.pt", "step-99.pt"]


@pytest.mark.parametrize(
    ("keep", "found"),
    [
        ("best", (False, 0)),
        ("best,last", (True, 0)),
        (" last ,best", (True, 0)),
        ("every:7, best", (False, 7)),
        ("best, last, every:1000", (True, 1000)),
        ("best, every:1000000000", (False, 10**9)),
    ],
)
def test_what_keep_means(text_run, keep, found):
    assert schema.kept(tiny(text_run, f"train.keep={keep}").train.keep) == found


WRONG = [
    "",
    "last",
    "every:5",
    "best, best",
    "best, every:0",
    "best, every:",
    "best, every:x",
    "best, every:1, every:2",
]


@pytest.mark.parametrize(
    "keep", [*WRONG, "best, all", "best;last", "best, every:-1", "best, every:1000000001", "best,"]
)
def test_another_keep_is_refused(text_run, keep):
    with pytest.raises(UsageError, match=r"train\.keep: "):
        tiny(text_run, f"train.keep={json.dumps(keep)}")
