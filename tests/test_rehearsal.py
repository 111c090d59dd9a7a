"""train --dry-run: what a training would take, told before it begins, and nothing is left behind."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import TEXT_SETTINGS, quiet, set_flags, shortcut
from test_training import go, tiny

from shortcut_cli.events import Note
from shortcut_cli.inference import runs
from shortcut_cli.stages import training
from shortcut_cli.training.trainer import Trainer


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_left_behind(text_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = everything(text_run)
    notes = []
    training.rehearse(
        tiny(text_run, "train.tensorboard=true", "train.keep=best, last, every:1"),
        tmp_path / "runs" / "x",
        device="cpu",
        report=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
    )
    assert not list(tmp_path.iterdir())
    assert everything(text_run) == before
    assert "training MFLOPs per token" in notes[0]


def test_the_figures_are_those_of_the_training(text_run, tmp_path):
    resolved = tiny(text_run, "train.steps=40", "train.eval_every=15")
    found = training.rehearse(resolved, tmp_path / "x", device="cpu", report=quiet)
    go(resolved, tmp_path / "run")
    model = runs.open_run(tmp_path / "run" / "run.pt", "cpu").model
    tokens = 40 * 4 * 16  # steps, windows, context
    train = json.loads((text_run / "shards" / "manifest.json").read_text())["splits"]["train"]["tokens"]
    assert found["parameters"] == model.count()
    assert found["tokens"] == tokens
    assert found["training_tokens"] == train
    assert found["epochs"] == pytest.approx(tokens / train)
    assert found["training_flops_per_token"] == 3 * model.flops(16) // 16
    assert found["training_flops"] == tokens * found["training_flops_per_token"]


def test_time_is_that_of_the_steps_and_the_validations(text_run, tmp_path, monkeypatch):
    """A clock that only the steps and validations move on: step n 2 + n s, the first two 100 s more; 3 s a window."""
    now = 0.0
    steps = []

    def step(_, number):
        nonlocal now
        steps.append(number)
        now += 2.0 + number + 100.0 * (number < 2)

    def validation(trainer):
        nonlocal now
        now += 3.0 * len(trainer.validation)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(Trainer, "validation_loss", validation)
    settings = ("train.steps=40", "train.eval_every=15", "train.eval_windows=11")
    found = training.rehearse(tiny(text_run, *settings), tmp_path, device="cpu", report=quiet)
    assert steps == list(range(7))
    assert found["seconds_per_step"] == 6.0  # the median of those of steps 2 to 6
    assert found["tokens_per_s"] == 4 * 16 / 6.0
    assert found["seconds_per_validation"] == pytest.approx(33.0)
    assert found["seconds"] == pytest.approx(40 * 6.0 + 3 * 33.0)  # after steps 15, 30 and 40
    steps.clear()
    found = training.rehearse(tiny(text_run, "train.steps=1"), tmp_path, device="cpu", report=quiet)
    assert (steps, found["seconds_per_step"]) == ([0], 102.0)


def test_a_dry_run_says_which_weights_would_be_taken(text_run, tmp_path):
    go(tiny(text_run, "model.layers=2", "train.steps=1"), tmp_path / "first")
    notes = []
    found = training.rehearse(
        tiny(text_run, "model.layers=3"),
        tmp_path / "run",
        device="cpu",
        report=lambda event: notes.append(getattr(event, "text", "")),
        init_from=tmp_path / "first" / "run.pt",
    )
    assert "initialised: blocks.2." in notes[0]
    assert found["lineage"]["initialised"]


PEAK = (
    "import atexit, runpy, sys\n"
    "status = lambda: next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
    "atexit.register(lambda: print('peak', status(), file=sys.stderr))\n"
    "runpy.run_module('shortcut_cli', run_name='__main__')\n"
)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="there is no measure of a process's peak memory")
def test_memory_is_within_15_percent_of_what_a_training_takes(text_run, tmp_path):
    settings = (f"data.shards={text_run / 'shards'}", "model.width=256", "model.ffn=1024", "train.ema=0.9")
    settings += ("train.steps=20", "train.eval_every=10")
    flags = ("train", "--recipe", "text-tiny", "--model", "gpt", *set_flags(*TEXT_SETTINGS, *settings), "--json")
    done = shortcut(*flags, "--dry-run", cwd=tmp_path, fresh=True)
    estimated = json.loads(done.stdout)["memory_mb"]
    trained = subprocess.run(
        [sys.executable, "-c", PEAK, *flags, "--out", "run"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    (line,) = (line for line in trained.stderr.splitlines() if line.startswith("peak "))
    assert estimated == pytest.approx(int(line.split()[1]) * 1024 / 1e6, rel=0.15)
