"""The conditions of a training: recorded, compared, and named where bytes are said to be equal."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import TEXT_SETTINGS, quiet, set_flags, shortcut

import shortcut_cli
from shortcut_cli.compare.runner import differing
from shortcut_cli.config import reading, schema
from shortcut_cli.events import Note
from shortcut_cli.stages.training import train
from shortcut_cli.training import checkpoint, conditions, tensor_file

HERE = {
    "device": "cpu",
    "threads": torch.get_num_threads(),
    "shortcut": shortcut_cli.__version__,
    "torch": torch.__version__,
    "numpy": np.__version__,
}


def recipe(text_run, *settings):
    return reading.read(
        "text-tiny", [*TEXT_SETTINGS, f"data.shards={text_run / 'shards'}", "model.name=gpt", *settings]
    )


def go(resolved, folder, stop_at=None, report=quiet):
    steps = iter(range(10**6))
    stop = nullcontext(lambda: None if stop_at is None or next(steps) + 1 < stop_at else 75)
    return train(resolved, folder, device="cpu", resume="auto", report=report, stop=stop)


def stopped(resolved, folder, step):
    with pytest.raises(Exception, match=f"stopped at step {step}"):
        go(resolved, folder, step)


def weights(folder):
    content = checkpoint.load(folder / "resume.pt")["model"]
    return b"".join(content[name].numpy().tobytes() for name in sorted(content))


def test_a_run_says_under_which_conditions_it_was_trained(text_run):
    for name in ("run.pt", "resume.pt"):
        (part,) = torch.load(text_run / "gpt" / name, weights_only=True)["conditions"]
        assert part | HERE | {"from_step": 0} == part
        assert part["cpu"].endswith(torch.backends.cpu.get_cpu_capability())
    shown = shortcut("inspect", text_run / "gpt", cwd=text_run).stdout
    assert "conditions.1.threads" in shown


def altered(folder, **changes):
    """Let the state of a run say that it was made under other conditions."""
    content = checkpoint.load(folder / "resume.pt")
    content["conditions"][-1] |= changes
    tensor_file.save(folder / "resume.pt", content)


@pytest.mark.parametrize(
    ("key", "value"),
    [("threads", 99), ("cpu", "x86_64 SSE"), ("torch", "1.0"), ("numpy", "1.0"), ("shortcut", "0"), ("device", "mps")],
)
def test_a_resume_under_other_conditions_says_so_once_and_in_one_line(text_run, tmp_path, key, value):
    resolved, said = recipe(text_run), []
    stopped(resolved, tmp_path, 5)
    altered(tmp_path, **{key: value})
    with pytest.raises(Exception, match="stopped at step 7"):
        go(resolved, tmp_path, 2, said.append)
    (note,) = (event.text for event in said if isinstance(event, Note) and "conditions" in event.text)
    assert f"{key}: {value!r} -> " in note
    assert "\n" not in note
    go(resolved, tmp_path, report=(later := []).append)
    assert not [event for event in later if isinstance(event, Note) and "conditions" in event.text]
    for name in ("run.pt", "resume.pt"):
        first, second = checkpoint.load(tmp_path / name)["conditions"]
        assert (first["from_step"], first[key], second["from_step"]) == (0, value, 5)
        assert second | HERE == second


def test_a_resume_under_the_same_conditions_says_nothing_and_ends_in_the_same_bytes(text_run, tmp_path):
    resolved, said = recipe(text_run), []
    go(resolved, tmp_path / "whole")
    stopped(resolved, tmp_path / "parts", 5)
    go(resolved, tmp_path / "parts", report=said.append)
    assert not [event for event in said if isinstance(event, Note) and "conditions" in event.text]
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    assert (tmp_path / "whole" / "run.pt").read_bytes() == (tmp_path / "parts" / "run.pt").read_bytes()


@pytest.mark.parametrize("found", [None, "text", [3], {}])
def test_a_state_of_an_earlier_version_resumes_and_is_told_from_then_on(text_run, tmp_path, found):
    resolved, said = recipe(text_run), []
    stopped(resolved, tmp_path, 5)
    content = checkpoint.load(tmp_path / "resume.pt")
    del content["recipe"]["train"]["threads"]
    content["conditions"] = found
    if found is None:
        del content["conditions"]
    tensor_file.save(tmp_path / "resume.pt", content)
    go(resolved, tmp_path, report=said.append)
    assert not [event for event in said if isinstance(event, Note) and "conditions" in event.text]
    (part,) = checkpoint.load(tmp_path / "run.pt")["conditions"]
    assert part["from_step"] == 5


def test_threads_bind_a_run_and_none_asked_for_is_as_before(text_run):
    tree = recipe(text_run).model_dump()
    older = recipe(text_run).model_dump()
    del older["train"]["threads"]
    assert schema.binding(tree) == schema.binding(older)
    assert "train.threads" not in schema.FREE | schema.CODEC_FREE
    several = recipe(text_run, "train.threads=2").model_dump()
    assert schema.binding(several)["train"]["threads"] == 2


def test_the_recipe_sets_the_threads_and_only_while_it_trains(text_run, tmp_path):
    before = torch.get_num_threads()
    go(recipe(text_run, "train.threads=3"), tmp_path)
    assert torch.get_num_threads() == before
    assert checkpoint.load(tmp_path / "run.pt")["conditions"][0]["threads"] == 3


def test_weights_depend_on_the_threads_of_the_recipe_and_not_on_those_of_the_environment(text_run, tmp_path):
    """In processes that are offered 1 and 2 threads; the batch is wide enough for torch to divide a sum."""
    found = {}
    for asked, offered in ((0, 1), (0, 2), (2, 1)):
        folder = tmp_path / f"{asked}-{offered}"
        settings = (*TEXT_SETTINGS, f"data.shards={text_run / 'shards'}", f"train.threads={asked}", "model.layers=2")
        wide = ("model.width=128", "model.heads=4", "train.batch_size=16", "train.steps=2", "train.eval_windows=1")
        command = [sys.executable, "-m", "shortcut_cli", "train", "--recipe", "text-tiny", "--out", folder]
        environment = os.environ | {"OMP_NUM_THREADS": str(offered), "MKL_NUM_THREADS": str(offered)}
        subprocess.run([*command, *set_flags(*settings, *wide)], env=environment, check=True, capture_output=True)
        (part,) = checkpoint.load(folder / "run.pt")["conditions"]
        assert part["threads"] == (asked or offered)
        found[asked, offered] = weights(folder)
    assert found[2, 1] == found[0, 2]
    if found[0, 1] == found[0, 2]:
        pytest.skip("on this machine 1 and 2 threads round alike")


def test_a_proof_names_its_conditions_and_pins_the_threads(text_run, tmp_path):
    flags = set_flags(*TEXT_SETTINGS, f"data.shards={text_run / 'shards'}")
    command = ("prove", "resume", "--recipe", "text-tiny", *flags, "--kills", 1, "--out", "p")
    done = shortcut(*command, cwd=tmp_path, fresh=True, OMP_NUM_THREADS="1")
    assert "cpu, 1 thread, " in done.stdout
    assert f"torch {torch.__version__}" in done.stdout
    assert reading.read(str(tmp_path / "p" / "recipe.toml")).train.threads == 1


def test_runs_of_a_comparison_under_other_conditions_are_named():
    one = {"from_step": 0, **conditions.now("cpu")}
    rows = [{"conditions": [one]}, {"conditions": [one | {"from_step": 9}]}]
    assert differing(rows) == ""
    other = one | {"threads": one["threads"] + 1}
    assert differing([*rows, {"conditions": [other]}]) == f"threads: {one['threads']} -> {one['threads'] + 1}"
    assert differing([{"conditions": []}]) == ""


def test_a_sample_is_made_again_with_the_threads_that_made_it(text_run, tmp_path):
    flags = ("--ckpt", text_run / "gpt", "-n", 1, "--tokens", 9, "--out", "one")
    shortcut("sample", *flags, cwd=tmp_path, fresh=True, OMP_NUM_THREADS="2")
    (made,) = (tmp_path / "one").glob("*.txt")
    sidecar = made.with_suffix(".txt.json")
    assert json.loads(sidecar.read_text())["conditions"]["threads"] == 2
    done = shortcut("sample", "--like", sidecar, "--out", "again", cwd=tmp_path, fresh=True, OMP_NUM_THREADS="1")
    assert "conditions" not in done.stderr
    again = tmp_path / "again" / made.name
    assert again.read_bytes() == made.read_bytes()
    assert json.loads(again.with_suffix(".txt.json").read_text())["conditions"]["threads"] == 2
    content = json.loads(sidecar.read_text())
    content["conditions"]["torch"] = "1.0"
    sidecar.write_text(json.dumps(content))
    done = shortcut("sample", "--like", sidecar, "--out", "third", cwd=tmp_path)
    assert "torch: '1.0' -> " in done.stderr
