"""A comparison on a Ray cluster: what a local one finds, also if processes that train are killed. Ray runs for real."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXT_SETTINGS, FakeRay, set_flags, shortcut

from shortcut_cli.compare.runner import Runner
from shortcut_cli.config import reading
from shortcut_cli.data import executors
from shortcut_cli.errors import Interrupted, UsageError
from shortcut_cli.training import checkpoint

pytest.importorskip("ray", reason="needs Ray (the extra `ray`)")
PATIENCE_S = 300


@pytest.fixture
def command(text_run, monkeypatch):
    """A comparison of two runs on one thread each, long enough for one to be killed in the middle."""
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else a busy machine forgets them
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    settings = [*TEXT_SETTINGS, "train.steps=120", "train.eval_every=20", "model.width=32", "model.ffn=64"]
    flags = set_flags(*settings, f"data.shards={text_run / 'shards'}")
    arms = ("--models", "shortcut", "--match", "none", "--seeds", "1", "--device", "cpu")
    return ["compare", "--recipe", "text-tiny", *arms, *flags, "--no-report", "--json"]


def parent(process):
    """The process that started another, and its command line."""
    number = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return number, Path(f"/proc/{number}/cmdline").read_text()


def trainer(folder):
    """The process that trains a run, once the run has logged a step; None before."""
    marker = folder / ".shortcut"
    if not (folder / "log.jsonl").is_file() or "process" not in (text := marker.read_text()):
        return None
    return int(text.split()[-1])


def kill_workers(folder, times, process):
    """Kill the Ray processes whose children train, so often; returns those children."""
    killed, until = [], time.monotonic() + PATIENCE_S
    while len(killed) < times and time.monotonic() < until and process.poll() is None:
        for run in folder.glob("runs/*"):
            try:
                if (child := trainer(run)) in (None, *killed):
                    continue
                worker, line = parent(child)
            except (FileNotFoundError, ProcessLookupError, ValueError):
                continue
            assert "ray::" in line, line
            os.kill(worker, signal.SIGKILL)
            killed.append(child)
            break
        time.sleep(0.02)
    return killed


def without_times(result):
    """What does not depend on how fast or where it was computed."""
    if isinstance(result, dict):
        drop = {"peak_mb", "tokens_per_s", "seconds", "report", "no_report", "validation_by_lr", "checksum", "floors"}
        return {key: without_times(value) for key, value in result.items() if key not in drop}
    return [without_times(each) for each in result] if isinstance(result, list) else result


@pytest.mark.filterwarnings("default")
def test_killed_workers_cost_only_their_runs_and_nothing_of_the_result(command, tmp_path):
    shortcut(*command, "--out", "local", cwd=tmp_path)
    full = [sys.executable, "-m", "shortcut_cli", *command, "--out", "ray", "--executor", "ray"]
    process = subprocess.Popen(full, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    killed = kill_workers(tmp_path / "ray", 2, process)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    assert len(killed) == 2
    for child in killed:
        assert not Path(f"/proc/{child}").exists()  # it ended with its parent
    found, expected = (json.loads((tmp_path / name / "compare.json").read_text()) for name in ("ray", "local"))
    assert without_times(found) == without_times(expected)
    names = [run.name for run in (tmp_path / "local" / "runs").iterdir()]
    assert len(names) == 3  # gpt, shortcut and the twin
    for name in names:
        lines = (tmp_path / "ray" / "runs" / name / "log.jsonl").read_text().splitlines()
        steps = [json.loads(line).get("step") for line in lines]
        assert steps == sorted(steps)
        here, there = (checkpoint.load(tmp_path / where / "runs" / name / "run.pt") for where in ("local", "ray"))
        assert here["model"].keys() == there["model"].keys()
        assert all(torch.equal(tensor, there["model"][key]) for key, tensor in here["model"].items())
    # A finished comparison needs no run, but Ray would be asked where it is.
    again = shortcut(*command, "--out", "ray", cwd=tmp_path)
    assert json.loads(again.stdout)["contrasts"] == found["contrasts"]


def test_what_does_not_go_together_is_said_at_once(command, tmp_path):
    for flags, what in (
        (("--task", "1/2"), "--task and --executor exclude each other"),
        (("--device", "cpu,cpu"), "--device cpu,cpu is not of every machine"),
        (("--device", "cuda:1"), "--device cuda:1 is not of every machine"),
        (("--ray-address", "127.0.0.1:1"), "the Ray cluster at 127.0.0.1:1 does not answer"),
    ):
        refused = shortcut(*command, "--out", "c", "--executor", "ray", *flags, cwd=tmp_path, check=2)
        assert what in refused.stderr
        assert not (tmp_path / "c").exists()


class Ray(FakeRay):
    """As much of Ray as a cluster needs."""

    def __init__(self, machines, outcomes=()):
        self.machines, self.outcomes, self.asked, self.cancelled = machines, dict(outcomes), [], []

    def nodes(self):
        return [{"Alive": alive, "Resources": has} for alive, has in self.machines]

    def put(self, setup):
        return setup

    def remote(self, **needs):
        self.asked.append(needs)
        remote = type("Task", (), {})()
        remote.remote = lambda _, job: job
        return lambda _: remote

    def wait(self, futures, **_):
        return (futures[-1:], futures[:-1])

    def cancel(self, future):
        self.cancelled.append(future)

    def get(self, future):
        if isinstance(found := self.outcomes.get(future, future.upper()), Exception):
            raise found
        return found


@pytest.mark.parametrize(
    ("device", "cpus", "machines", "expected"),
    [
        ("cpu", 2, [(True, {"CPU": 2.0})], ("cpu", 0)),
        ("auto", 1, [(True, {"CPU": 1.0}), (True, {"CPU": 1.0, "GPU": 1.0})], ("cuda", 1)),
        ("auto", 1, [(True, {"CPU": 1.0}), (False, {"CPU": 1.0, "GPU": 1.0})], ("cpu", 0)),
        ("cuda", 1, [(True, {"CPU": 1.0})], None),
        ("cpu", 4, [(True, {"CPU": 2.0}), (True, {"CPU": 3.0})], None),  # one machine has to have them all
        ("cuda", 2, [(True, {"CPU": 8.0}), (True, {"CPU": 1.0, "GPU": 4.0})], None),
    ],
)
def test_a_run_asks_for_what_it_needs_and_a_cluster_without_it_is_refused(
    monkeypatch, device, cpus, machines, expected
):
    ray = Ray(machines)
    monkeypatch.setattr(executors, "_imported", lambda _: ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if expected is None:
        with pytest.raises(UsageError, match="no machine of the Ray cluster has"), executors.cluster(device, cpus=cpus):
            pass
        return
    with executors.cluster(device, cpus=cpus) as (cluster, chosen):
        assert list(cluster(str, ["a", "b"], lambda: False)) == [("b", "B"), ("a", "A")]
    assert (chosen, cluster.gpus) == expected
    assert ray.asked == [{"num_cpus": cpus, "num_gpus": expected[1], "max_retries": executors.RETRIES}]


def test_after_a_signal_all_that_runs_is_cancelled_and_an_error_before_one_is_raised():
    lost = Ray.exceptions.RayError("the worker died\nmore")
    with pytest.raises(executors.ShortcutError, match=r"^Ray lost a task 4 times: the worker died$"):
        list(executors.Cluster(Ray([], {"a": lost}), 1, 0)(str, ["a"], lambda: False))
    ray = Ray([], {"a": lost})
    assert list(executors.Cluster(ray, 1, 0)(str, ["a", "b"], lambda: True)) == [("b", "B")]
    assert ray.cancelled == ["a", "b"]


def test_the_process_of_a_run_ends_with_its_parent(tmp_path):
    reading, writing = os.pipe()
    code = "import sys, time; from shortcut_cli.cli import worker; worker.end_with(int(sys.argv[1]))"
    child = subprocess.Popen([sys.executable, "-c", code, str(reading)], pass_fds=[reading])
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(1)
    os.close(writing)
    assert child.wait(60) == 1
    os.close(reading)


def test_a_run_that_was_interrupted_is_not_done(tmp_path):
    events, recipe = [], reading.read("text-tiny")

    def elsewhere(cell, jobs, stop):
        return ((job, (75, "")) for job in jobs)

    runner = Runner(tmp_path, ["cpu"], events.append, "0" * 64, 300, elsewhere=elsewhere)
    runner.asked = lambda: 143
    with pytest.raises(Interrupted):
        runner._train_elsewhere({tmp_path / "runs" / "a": SimpleNamespace(recipe=lambda: recipe)}, elsewhere)
    assert (events, runner.over) == ([], set())
