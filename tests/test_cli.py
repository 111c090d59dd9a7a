"""The command line: results on stdout, one panel on stderr, the right exit code.

First in separate processes; then in this process, with the stages replaced, to see which arguments each option becomes.
"""

import errno
import gc
import io
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tomllib
import wave
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
import typer
from conftest import TEXT_SETTINGS, set_flags, shortcut, write_texts
from rich.console import Console

from shortcut_cli import errors
from shortcut_cli.cli import bars, commands, console, tables
from shortcut_cli.cli import signals as ending
from shortcut_cli.cli.signals import Signals
from shortcut_cli.codec import weights
from shortcut_cli.compare import table as compared
from shortcut_cli.config import reading
from shortcut_cli.errors import CheckFailed, Unavailable, UsageError
from shortcut_cli.events import Note, Part, Progress, Sampled, Validation, Whole
from shortcut_cli.formatting import cell
from shortcut_cli.inference import prompts, runs
from shortcut_cli.stages import (
    codec_evaluation,
    codec_training,
    comparison,
    demo,
    doctor,
    early,
    inspection,
    pipeline,
    preparation,
    proof,
    sampling,
    training,
)
from shortcut_cli.training import device


def one_panel(done):
    """The text of the only panel on stderr; stdout has to be empty."""
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("╭")]
    assert len(starts) == 1, done.stderr
    return "\n".join(lines[starts[0] :])


def test_help_is_quick(tmp_path):
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        shortcut("--help", cwd=tmp_path, fresh=True)
        seconds.append(time.perf_counter() - began)
    # Ten times the goal of 0.3 s: enough for slow machines, and still too little for a heavy import.
    assert statistics.median(seconds) < 3


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["prepare", "midi", "nowhere"], 2, "nowhere does not exist"),
        (["prepare", "midi", "empty"], 2, "no .mid"),
        (["prepare", "midi", "texts"], 2, "ignored because of their suffix: 3 .txt (000.txt, 001.txt, 002.txt)"),
        (["prepare", "text", "texts", "--out", "texts"], 2, "texts is left out, since the result goes there"),
        (["codec", "eval", "mini", "texts"], 2, "ignored because of their suffix: 3 .txt (000.txt, 001.txt, 002.txt)"),
        (["codec", "train", "texts", "--out", "o"], 2, "ignored because of their suffix: 3 .txt"),
        (["prepare", "text", "texts", "--workers", "two"], 2, "'two'"),
        (["prepare", "text", "texts", "--ray-address", "a:1"], 2, "--ray-address is for --executor ray"),
        (
            ["prepare", "text", "texts", "--task", "1/2", "--executor", "ray"],
            2,
            "--executor ray divides the files itself",
        ),
        (["compare", "--recipe", "text", "--models", "gpt", "--run-cpus", "4"], 2, "--run-cpus is for --executor ray"),
        (["codec", "get", "nope"], 2, "'nope' is not one of 'encodec_24khz', 'encodec_48khz'. ╰"),
        (["inspect", "text-tiny"], 2, "text-tiny does not exist; a recipe has that name"),
        (["sample", "--like", "s.txt"], 2, "s.txt is a sample, not the .json that says how it was made"),
        (["prepare", "video", "empty"], 2, "Invalid value for 'DOMAIN': 'video' is not one of 'audio', 'midi', 'text'"),
        (["prepare"], 2, "prepare --help"),
        (["trian"], 2, "No such command 'trian'"),
        (["recipes", "list", "--josn"], 2, "No such option: --josn"),
        (["prepare", "text", "texts", "--recipe", "music"], 2, "recipe music is for midi"),
        (["prepare", "text", "texts", "--max-bad", "few"], 2, "--max-bad few"),
        (["train", "--recipe", "musik"], 2, "Did you mean 'music'?"),
        (["train", "--recipe", "music", "--set", "train.stepz=1"], 2, "Did you mean 'train.steps'?"),
        (["train", "--recipe", "music", "--set", "train.steps=many"], 2, "valid integer, got 'many'"),
        (["train", "--recipe", "music", "--model", "rnn"], 2, "unknown architecture 'rnn'"),
        (["train", "--recipe", "text-tiny", "--set", "data.shards=empty"], 2, "not a shards folder"),
        (["demo", "--device", "cuda:99"], 5, "device 'cuda:99' can't be used"),
        (["eval", "--ckpt", "missing.pt"], 2, "missing.pt does not exist"),
        (["sample", "--ckpt", "fake.pt"], 2, "is not a run.pt"),
        (["attention", "--ckpt", "fake.pt"], 2, "is not a run.pt"),
        (["inspect", "fake.txt"], 2, "neither a shards folder"),
        (["inspect", "empty"], 2, "no manifest.json"),
        (["recipes", "show", "zzz"], 2, "unknown recipe 'zzz'"),
        (["prepare", "midi", "fake.mid", "--out", "o"], 3, "not a MIDI file"),
    ],
)
def test_bad_input_is_one_panel_and_the_right_code(tmp_path, arguments, code, words):
    (tmp_path / "empty").mkdir()
    write_texts(tmp_path / "texts", 3)
    for name in ("s.txt", "s.txt.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "fake.pt").write_text("not a checkpoint")
    (tmp_path / "fake.txt").write_text("text")
    (tmp_path / "fake.mid").write_text("this is text")
    done = shortcut(*arguments, cwd=tmp_path, check=code)
    assert words in " ".join(one_panel(done).replace("│", " ").split())


@pytest.mark.parametrize("group", [[], ["recipes"], ["prove"], ["codec"]])
def test_a_group_without_a_command_shows_its_help_and_fails(tmp_path, group):
    done = shortcut(*group, cwd=tmp_path, check=2)
    assert done.stdout == ""
    assert done.stderr.startswith("Usage: ")
    assert " ".join(["", *group, "[OPTIONS] COMMAND"]) in done.stderr.splitlines()[0]
    assert done.stderr == shortcut(*group, "--help", cwd=tmp_path).stdout


def test_text_from_files_to_samples(tmp_path):
    shortcut = partial(conftest.shortcut, fresh=True)
    write_texts(tmp_path / "texts")
    settings = set_flags(*TEXT_SETTINGS, "data.shards=shards")
    done = shortcut(
        "prepare", "text", "texts", "--recipe", "text-tiny", "--out", "shards", "--json", *settings, cwd=tmp_path
    )
    prepared = json.loads(done.stdout)
    assert prepared["schema_version"] == 2
    assert prepared["inputs"] == 30
    assert sum(split["documents"] for split in prepared["splits"].values()) == 30
    again = shortcut("prepare", "text", "texts", "--recipe", "text-tiny", "--out", "shards", *settings, cwd=tmp_path)
    assert "already prepared; nothing to do" in again.stdout
    other = shortcut("prepare", "text", "texts", "--recipe", "text-tiny", "--out", "shards", cwd=tmp_path, check=2)
    assert "tokenizer.algorithm" in one_panel(other)

    done = shortcut("train", "--recipe", "text-tiny", "--model", "shortcut", *settings, cwd=tmp_path)
    run = tmp_path / "runs" / "text-tiny" / "shortcut-s1"
    assert done.stdout.strip() == "runs/text-tiny/shortcut-s1/run.pt"
    assert {"run.pt", "resume.pt", "log.jsonl", "recipe.toml"} <= {path.name for path in run.iterdir()}

    scores = json.loads(shortcut("eval", "--ckpt", run / "run.pt", "--json", cwd=tmp_path).stdout)
    assert scores["unit"] == "byte"
    page = scores.pop("report")
    assert page == str(run / "report.html")
    assert scores.pop("written") == [str(run / "eval.json"), str(run / "eval-test.npz"), page]
    assert json.loads((run / "eval.json").read_text())["splits"]["test"] == scores
    done = shortcut("sample", "--ckpt", run / "run.pt", "-n", 2, "--tokens", 50, "--out", "samples", cwd=tmp_path)
    paths = [tmp_path / line for line in done.stdout.split()]
    assert len(paths) == 2
    for path in paths:
        assert path.suffix == ".txt"
        assert path.read_text()
        assert json.loads(path.with_suffix(".txt.json").read_text())["sampler"]["tokens"] == 50
    done = conftest.shortcut("sample", "--ckpt", run / "run.pt", "--out", "samples", "-n", 2, cwd=tmp_path, check=2)
    assert "exists already" in one_panel(done)

    done = shortcut("attention", "--ckpt", run / "run.pt", "--prompt", "texts/000.txt", "--json", cwd=tmp_path)
    looked = json.loads(done.stdout)
    assert (run / "attention" / "attention.png").read_bytes()[:4] == b"\x89PNG"
    assert sum(looked["mean_weights"].values()) == pytest.approx(1, abs=1e-5)

    assert "parameters.total" in shortcut("inspect", run / "run.pt", cwd=tmp_path).stdout
    shortcut("inspect", "shards", "--verify", cwd=tmp_path)
    with open(tmp_path / "shards" / "train-00000.bin", "r+b") as stream:
        stream.write(b"\xff")
    done = shortcut("inspect", "shards", "--verify", cwd=tmp_path, check=4)
    assert "train-00000.bin" in one_panel(done)


def test_equal_seeds_give_equal_bytes(text_run, tmp_path):
    shortcut = partial(conftest.shortcut, fresh=True)  # hashes of strings differ from one process to the next
    for name in ("a", "b"):
        settings = ("--tokens", 40, "--temperature", 10, "--seed", 3)  # hot, since it has hardly been trained
        shortcut("sample", "--ckpt", text_run / "gpt" / "run.pt", *settings, "--out", name, cwd=tmp_path)
    page, *files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert page == "report.html"  # which names its folder
    assert files == [f"sample-3-00{number}.txt{end}" for number in (0, 1) for end in ("", ".json")]
    texts = {(tmp_path / "a" / name).read_text() for name in files[::2]}
    assert len(texts) == 2
    assert all(len(set(text)) > 5 for text in texts)
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_run_pt_is_enough_anywhere(text_run, tmp_path):
    shutil.copy(text_run / "gpt" / "run.pt", tmp_path / "elsewhere.pt")
    done = shortcut("sample", "--ckpt", "elsewhere.pt", "--tokens", 10, "-n", 1, cwd=tmp_path)
    assert done.stdout == "samples/sample-1-000.txt\n"
    assert (tmp_path / "samples" / "sample-1-000.txt").read_text()
    done = shortcut("eval", "--ckpt", "elsewhere.pt", "--shards", text_run / "shards", "--json", cwd=tmp_path)
    scores, manifest = json.loads(done.stdout), json.loads((text_run / "shards" / "manifest.json").read_text())
    test = manifest["splits"]["test"]
    assert scores.pop("written") == ["eval.json", "eval-test.npz"]
    assert (scores["split"], scores["tokens"], scores["documents"]) == ("test", test["tokens"], test["documents"])
    assert json.loads((tmp_path / "eval.json").read_text())["splits"] == {"test": scores}


def test_run_skips_what_is_finished(tmp_path):
    write_texts(tmp_path / "texts")
    command = ["run", "--recipe", "text-tiny", "texts", "--json", *set_flags(*TEXT_SETTINGS, "sample.tokens=20")]
    first = json.loads(shortcut(*command, cwd=tmp_path).stdout)
    stamps = {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != ".shortcut"
    }
    second = json.loads(shortcut(*command, cwd=tmp_path).stdout)
    assert (first["train"]["worked"], second["train"]["worked"]) == (True, False)
    assert first["eval"] == second["eval"]
    after = {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != ".shortcut"
    }
    assert after == stamps
    # Only what is missing is made again; the samples have the same bytes as before.
    kept = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("sample-1-*.txt")}
    assert len(kept) == 2
    for path in (min(kept), *(tmp_path / "runs").rglob("eval.json")):
        path.unlink()
    third = json.loads(shortcut(*command, cwd=tmp_path).stdout)
    assert (third["train"]["worked"], third["eval"], third["samples"]) == (False, first["eval"], first["samples"])
    assert {path: path.read_bytes() for path in kept} == kept
    changed = {path.name for path, stamp in stamps.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {"eval.json", "eval-test.npz", f"{min(kept).name}", f"{min(kept).name}.json"}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_the_state(text_run, tmp_path, number, code):
    settings = set_flags(
        *TEXT_SETTINGS, f"data.shards={text_run / 'shards'}", "train.steps=100000", "train.eval_every=50"
    )
    command = [sys.executable, "-m", "shortcut_cli", "train", "--recipe", "text-tiny", "--out", "run", *settings]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "log.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert "the state is saved in run" in " ".join(stderr.replace("│", " ").split())
    assert (tmp_path / "run" / "resume.pt").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_evaluation_of_a_run_which_can_be_resumed(text_run, tmp_path, number, code):
    # Training treats the first signal as a request to save; the later stages must not.
    settings = set_flags(
        *TEXT_SETTINGS, f"data.shards={text_run / 'shards'}", "train.steps=2", "eval.stride=8", "sample.tokens=400"
    )
    arguments = ["run", "--recipe", "text-tiny", text_run / "texts", "--out", "run", *settings]
    command = [sys.executable, "-m", "shortcut_cli", *map(str, arguments)]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "resume.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == code, stderr
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "run" / "samples").exists()
    shortcut(*arguments, cwd=tmp_path)
    assert (tmp_path / "run" / "samples").exists()


def test_recipes_commands(tmp_path):
    listed = json.loads(shortcut("recipes", "list", "--json", cwd=tmp_path).stdout)
    assert [entry["name"] for entry in listed["recipes"]] == reading.names()
    shown = shortcut("recipes", "show", "music", cwd=tmp_path).stdout
    assert shown == reading.find("music").read_text()
    shortcut("recipes", "copy", "music", "mine.toml", cwd=tmp_path)
    assert (tmp_path / "mine.toml").read_text() == shown
    (tmp_path / "link.toml").symlink_to("nowhere.toml")
    for taken in ("mine.toml", "link.toml"):
        shortcut("recipes", "copy", "music", taken, cwd=tmp_path, check=2)
    assert (tmp_path / "link.toml").is_symlink()
    shortcut("recipes", "check", "mine.toml", cwd=tmp_path)
    (tmp_path / "mine.toml").write_text(shown.replace("steps =", "stepz ="))
    done = shortcut("recipes", "check", "mine.toml", "music", cwd=tmp_path, check=4)
    assert "train.stepz: no such key" in " ".join(done.stdout.replace("│", " ").split())
    checked = json.loads(shortcut("recipes", "check", "x" * 300, "music", "--json", cwd=tmp_path, check=4).stdout)
    assert [bool(entry["problem"]) for entry in checked["recipes"]] == [True, False]  # a name that no file can have


def test_doctor_says_what_to_do(tmp_path):
    checks = json.loads(shortcut("doctor", "--json", cwd=tmp_path, SHORTCUT_CACHE=str(tmp_path)).stdout)["checks"]
    codec = next(check for check in checks if check["what"] == "codec encodec_24khz")
    assert codec["works"] is False
    assert str(tmp_path) in codec["remedy"]
    assert next(check for check in checks if check["what"] == "torch")["works"] is True


def test_version(tmp_path):
    import shortcut_cli

    assert shortcut("--version", cwd=tmp_path).stdout.strip() == shortcut_cli.__version__


@pytest.mark.parametrize("model", ["gpt", "shortcut"])
def test_a_sample_is_recreated_byte_for_byte(text_run, tmp_path, model):
    prompt = text_run / "texts" / "000.txt"
    ckpt = text_run / model / "run.pt"
    settings = ("-n", "3", "--tokens", "40", "--temperature", "1.3", "--seed", "7", "--top-k", "20")
    shortcut("sample", "--ckpt", ckpt, "--prompt", prompt, *settings, "--out", "first", cwd=tmp_path)
    made = sorted((tmp_path / "first").glob("*.txt"))
    assert [path.name for path in made] == ["sample-7-000.txt", "sample-7-001.txt", "sample-7-002.txt"]
    assert all(path.read_text().startswith(prompt.read_text()) for path in made)
    assert len({path.read_text() for path in made}) == 3
    sidecar = tmp_path / "first" / "sample-7-002.txt.json"
    given = {"n": 3, "tokens": 40, "temperature": 1.3, "seed": 7, "top_k": 20}
    assert json.loads(sidecar.read_text())["sampler"] == given | {
        "top_p": 0.98,
        "min_p": 0.0,
        "precision": "fp32",
    }  # these are the recipe's
    done = shortcut("sample", "--like", sidecar, cwd=tmp_path, fresh=True)
    (again,) = done.stdout.split()
    assert (tmp_path / again).read_bytes() == (tmp_path / "first" / "sample-7-002.txt").read_bytes()
    assert sorted(path.name for path in (tmp_path / "first" / "again").iterdir()) == [
        "report.html",
        "sample-7-002.txt",
        "sample-7-002.txt.json",
    ]
    assert "leave out" in shortcut("sample", "--like", sidecar, "--top-k", "3", cwd=tmp_path, check=2).stderr
    other = text_run / ("gpt" if model == "shortcut" else "shortcut") / "run.pt"
    assert "--ckpt" in shortcut("sample", "--like", sidecar, "--ckpt", other, cwd=tmp_path, check=4).stderr
    sidecar.write_text("[]")
    assert "not the .json" in shortcut("sample", "--like", sidecar, cwd=tmp_path, check=4).stderr


# In this process: the arguments that each option becomes


def call(*arguments):
    """Run a command in this process; its errors are raised here."""
    commands.app([str(argument) for argument in arguments], standalone_mode=False)


def replaced(monkeypatch, module, name, result):
    """Replace a stage by one that returns `result`; returns the list of its calls, as (arguments, options).

    There is no page then, since nothing was made that it could show.
    """
    calls = []
    monkeypatch.setattr(commands, "_refreshed", lambda *_: {})
    for check in ("check_paths", "check_shards"):  # no file that they name is there
        monkeypatch.setattr(early, check, lambda *_: None)

    def stage(*arguments, report=None, **options):
        calls.append((arguments, options))
        if report is not None:
            assert isinstance(report, console.Reporter)
        return result

    monkeypatch.setattr(module, name, stage)
    return calls


@pytest.fixture
def prepared(monkeypatch):
    """The shards of every recipe count as prepared."""
    monkeypatch.setattr(commands, "_with_shards", lambda _, resolved, *__: resolved)


@pytest.fixture
def ckpt(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.pt").write_bytes(b"PK")
    return tmp_path / "r" / "run.pt"


def printed(capsys):
    """The JSON document on stdout, without the list of files, which every command has."""
    found = json.loads(capsys.readouterr().out)
    assert found["schema_version"] == 2
    assert all(isinstance(path, str) for path in found.pop("written"))
    return found


SPLIT = {"documents": 3, "tokens": 30, "units": {"byte": 60}}
MANIFEST = {
    "tokenizer": {"unit": "byte"},
    "splits": dict.fromkeys(("train", "val", "test"), SPLIT),
    "inputs": 9,
    "duplicates": 0,
    "rejected": 0,
}
SCORES = {
    "schema_version": 2,
    "split": "val",
    "documents": 3,
    "tokens": 30,
    "nats_per_token": 1.5,
    "interval_over": "blocks",
    "interval_95": [1.25, 1.75],
    "unigram_entropy": 2.5,
    "perplexity": 4.5,
    "accuracy": 0.25,
    "unit": "byte",
    "bits_per_unit": 2.75,
    "bits_per_unit_interval_95": [2.25, 3.25],
}


def test_flags_win_over_settings_over_the_recipe_over_defaults(monkeypatch, prepared):
    calls = replaced(monkeypatch, training, "train", {"run": "r"})
    base = ("train", "--recipe", "text-tiny", "--device", "cpu")
    settings = set_flags("model.name=gpt", "train.seed=5", "train.steps=9")
    call(*base)
    call(*base, *settings)
    call(*base, *settings, "--model", "moda", "--seed", "0")
    call(*base, "--model", "moda", "--seed", "7", *settings)
    call(*base, "--seed", "7", *settings, "--set", "train.steps=11")
    found = [(config.model.name, config.train.seed, config.train.steps, str(folder)) for (config, folder), _ in calls]
    assert found == [
        ("shortcut", 1, 150, "runs/text-tiny/shortcut-s1"),
        ("gpt", 5, 9, "runs/text-tiny/gpt-s5"),
        ("moda", 0, 9, "runs/text-tiny/moda-s0"),
        ("moda", 7, 9, "runs/text-tiny/moda-s7"),
        ("gpt", 7, 11, "runs/text-tiny/gpt-s7"),
    ]
    assert commands._settings(None) == []
    flags = {"c__d": ("--d", 0), "e__f": ("-f", None), "g__h": ("--h", ""), "i__j": ("--j", "nan")}
    assert commands._settings(["a.b=1"], **flags) == [
        "a.b=1",
        reading.Setting("c.d", 0, "--d 0"),
        reading.Setting("g.h", "", "--h "),
        reading.Setting("i.j", "nan", "--j nan"),
    ]


def test_the_options_of_train_reach_its_stage(monkeypatch, capsys, prepared, tmp_path):
    calls = replaced(monkeypatch, training, "train", {"run": "r/run.pt", "step": 4})
    base = ("train", "--recipe", "text-tiny")
    call(*base, "--out", "o", "--resume", "never", "--device", "cpu:0", "--json")
    assert printed(capsys) == {"schema_version": 2, "run": "r/run.pt", "step": 4}
    call(*base, "--device", "cpu")
    assert capsys.readouterr().out == "r/run.pt\n"
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "run.pt").write_bytes(b"PK")
    call(*base, "--device", "cpu", "--extend", 999, "--init-from", tmp_path / "first", "--set", "train.steps=5")
    usual = {"device": "cpu", "resume": "auto", "stop": commands.signals, "init_from": None, "extend": False}
    usual |= {"logs": False}
    assert [(str(arguments[1]), options) for arguments, options in calls] == [
        ("o", usual | {"device": "cpu:0", "resume": "never"}),
        ("runs/text-tiny/shortcut-s1", usual),
        ("runs/text-tiny/shortcut-s1", usual | {"init_from": tmp_path / "first" / "run.pt", "extend": True}),
    ]
    assert [arguments[0].train.steps for arguments, _ in calls] == [150, 150, 999]
    for wrong, flag in ((("--resume", "never"), "--resume never"), (("--dry-run",), "--dry-run")):
        with pytest.raises(UsageError, match=f"it takes no {flag}"):
            call(*base, "--extend", 999, *wrong)


def test_the_options_of_a_dry_run_reach_its_stage(monkeypatch, capsys, prepared):
    found = {"run": "r/run.pt", "parameters": {"total": 9999, "non_embedding": 8888}, "steps": 150, "tokens": 77_777}
    found |= {"training_tokens": 11_111, "epochs": 7.0, "training_flops_per_token": 2_500_000, "training_flops": 2e15}
    found |= {"seconds_per_step": 0.25, "tokens_per_s": 4321.0, "seconds_per_validation": 0.5, "seconds": 1234.0}
    found |= {"memory_mb": 321.5, "lineage": {}}
    calls = replaced(monkeypatch, training, "rehearse", found)
    call("train", "--recipe", "text-tiny", "--dry-run", "--device", "cpu", "--json")
    assert printed(capsys) == {"schema_version": 2, **found}
    call("train", "--recipe", "text-tiny", "--dry-run", "--device", "cpu:0", "--out", "o", "--seed", 3)
    shown = capsys.readouterr().out
    for text in ("9,999 (8,888 non-embedding)", "77,777 (7.00 epochs of 11,111)", "2e+15", "321.5", "4,321", "21 min"):
        assert text in shown
    assert [(str(arguments[1]), options) for arguments, options in calls] == [
        ("runs/text-tiny/shortcut-s1", {"device": "cpu", "init_from": None}),
        ("o", {"device": "cpu:0", "init_from": None}),
    ]
    assert calls[1][0][0].train.seed == 3


def test_the_options_of_prepare_reach_its_stage(monkeypatch, capsys):
    calls = replaced(monkeypatch, preparation, "prepare", MANIFEST | {"files": {}, "request": {}})
    monkeypatch.setattr(os, "cpu_count", lambda: 61)
    call("prepare", "text", "a", "b", "--recipe", "text-tiny", "--out", "o", "--workers", 3, "--max-bad", "5", "--json")
    assert printed(capsys) == {"schema_version": 2, "path": "o", **MANIFEST}
    call("prepare", "text", "a", "--out", "o", *set_flags("data.shards=x", "tokenizer.vocabulary=300"))
    call("prepare", "midi", "a", "--set", "data.shards=x")
    call("prepare", "audio", "a")
    found = [(config.tokenizer.name, config.data.shards, paths, str(o)) for (config, paths, o), _ in calls]
    assert found == [
        ("text", "o", ["a", "b"], "o"),
        ("text", "o", ["a"], "o"),
        ("midi", "x", ["a"], "x"),
        ("audio", "shards/audio", ["a"], "shards/audio"),
    ]
    usual = {"n_workers": 61, "max_bad": "1%", "merge": False, "executor": "local", "ray_address": ""}
    assert [options for _, options in calls] == [usual | {"n_workers": 3, "max_bad": "5"}, usual, usual, usual]
    recipes = [config for (config, *_), _ in calls]
    assert recipes[0].train.steps == reading.read("text-tiny").train.steps
    assert (recipes[1].tokenizer.vocabulary, recipes[1].train) == (300, reading.read("text").train)
    assert (recipes[2].train, recipes[3].train) == (reading.read("music").train, reading.read("audio").train)
    with pytest.raises(UsageError, match="recipe music is for midi, not text"):
        call("prepare", "text", "a", "--recipe", "music")


def test_prepare_shows_the_counts_of_each_split(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    splits = {
        "train": {"documents": 3, "tokens": 30, "units": {"byte": 60}},
        "val": {"documents": 2, "tokens": 12, "units": {"byte": 8}},
        "test": {"documents": 0, "tokens": 0, "units": {}},
    }
    shown = MANIFEST | {"splits": splits, "duplicates": 4, "rejected": 5, "ignored": 6, "tokens_per_s": 7000.0}
    monkeypatch.setattr(console._out(), "_width", 200)
    for more, end in (({}, ""), ({"worked": True}, ""), ({"worked": False}, " (already prepared; nothing to do)")):
        console.result({}, tables.shards(shown | {"path": "o"} | more), as_json=False)
        title, _, head, _, *rows, _ = capsys.readouterr().out.splitlines()
        counts = "9 files, 4 duplicates, 5 rejected, 6 with other suffixes ignored, 7,000 tokens/s"
        assert title.strip() == f"o: {counts}{end}"
        cells = [
            [cell.strip() for cell in line.strip("\u2502\u2503").replace("\u2503", "\u2502").split("\u2502")]
            for line in (head, *rows)
        ]
        assert cells == [
            ["split", "documents", "tokens", "bytes", "tokens per byte"],
            ["train", "3", "30", "60", "0.5"],
            ["val", "2", "12", "8", "1.5"],
            ["test", "0", "0", "0", ""],
        ]


def test_the_options_of_eval_reach_its_stage(monkeypatch, capsys, ckpt):
    calls = replaced(monkeypatch, pipeline, "score", SCORES)
    call("eval", "--ckpt", ckpt, "--shards", "s", "--split", "val", "--device", "cpu:0", "--json")
    assert printed(capsys) == SCORES
    call("eval", "--ckpt", ckpt, "--device", "cpu")
    assert calls == [((ckpt, Path("s"), "val"), {"device": "cpu:0"}), ((ckpt, None, None), {"device": "cpu"})]


def test_eval_shows_each_score_under_its_name(monkeypatch):
    depth = {"sources": ["layer 2", "own"], "by_head": [[0.25, 0.75], [0.5, 0.5]]}
    table = tables.scores("t", SCORES | {"depth_weights": depth})
    rows = dict(zip(*([str(cell) for cell in column._cells] for column in table.columns), strict=True))
    assert rows == {
        "split": "val, 3 documents, 30 tokens",
        "nats per token": "1.50",
        "  95 % interval over blocks": "[1.25, 1.75]",
        "  unigram entropy of the split": "2.50",
        "perplexity": "4.5",
        "accuracy": "0.25",
        "bits per byte": "2.75",
        "  95 % interval": "[2.25, 3.25]",
        "attention to layer 2": "0.375",
        "attention to own": "0.625",
    }


SAMPLER = {
    "n": 2,
    "tokens": 300,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 0.98,
    "min_p": 0.0,
    "seed": 1,
    "precision": "fp32",
}


def test_the_options_of_sample_reach_its_stage(monkeypatch, capsys, ckpt, tmp_path):
    opened = []
    run = SimpleNamespace(recipe=reading.read("text-tiny"))
    monkeypatch.setattr(runs, "open_run", lambda *arguments: opened.append(arguments) or run)
    calls = replaced(monkeypatch, pipeline, "sample", [Path("a.txt"), Path("b.txt")])
    base = ("sample", "--ckpt", ckpt)
    call(*base, "--device", "cpu:0", "--json")
    assert printed(capsys) == {"schema_version": 2, "samples": ["a.txt", "b.txt"]}
    every = ("-n", 3, "--tokens", 44, "--temperature", 0, "--top-k", 5, "--top-p", 0.5, "--min-p", 0.25, "--seed", 0)
    (tmp_path / "p.txt").write_text("a")
    call(*base, "--device", "cpu", *every, "--prompt", tmp_path / "p.txt", "--out", "o")
    assert capsys.readouterr().out == "a.txt\nb.txt\n"
    for flag, value in zip(every[::2], every[1::2], strict=True):
        call(*base, "--device", "cpu", flag, value)
    changed = {"n": 3, "tokens": 44, "temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.25, "seed": 0}
    assert [config.model_dump() for (_, _, config), _ in calls] == [
        SAMPLER,
        SAMPLER | changed,
        *(SAMPLER | {key: value} for key, value in changed.items()),
    ]
    assert [folder for (_, folder, _), _ in calls[:3]] == [ckpt.parent / "samples", Path("o"), ckpt.parent / "samples"]
    usual = {"prompt": None, "device": "cpu", "only": None, "have": [], "stream": False}
    assert [options for _, options in calls[:3]] == [
        usual | {"device": "cpu:0"},
        usual | {"prompt": prompts.Prompt(tmp_path / "p.txt")},
        usual,
    ]
    assert all(arguments[0] is run for arguments, _ in calls)
    assert opened[:2] == [(ckpt, "cpu:0"), (ckpt, "cpu")]
    with pytest.raises(UsageError, match="neither --ckpt nor --like"):
        call("sample")
    with pytest.raises(UsageError, match=r"--top-p 2.0 is not valid\n  sample\.top_p"):
        call(*base, "--device", "cpu", "--top-p", 2)


def test_the_options_of_sample_like_reach_its_stage(monkeypatch, ckpt, tmp_path):
    opened, asked = [], []
    run = SimpleNamespace(recipe=reading.read("text-tiny"))
    monkeypatch.setattr(runs, "open_run", lambda *arguments: opened.append(arguments) or run)
    calls = replaced(monkeypatch, pipeline, "sample", [])
    old = prompts.Prompt(Path("c/p.txt"))
    again = sampling.Like(Path("c/run.pt"), old, ["sample.n=5", "sample.seed=9"], 4, "cpu:0", {})
    monkeypatch.setattr(sampling, "like", lambda *arguments: asked.append(arguments) or again)
    sidecar = tmp_path / "x" / "s.json"
    sidecar.parent.mkdir()
    sidecar.write_text("{}")
    call("sample", "--like", sidecar)
    call("sample", "--like", sidecar, "--ckpt", ckpt, "--prompt", "p", "--out", "o", "--device", "cpu")
    assert asked == [(sidecar, None, None), (sidecar, ckpt, Path("p"))]
    assert opened == [(Path("c/run.pt"), "cpu:0"), (Path("c/run.pt"), "cpu")]
    assert [(folder, config.model_dump()) for (_, folder, config), _ in calls] == [
        (tmp_path / "x" / "again", SAMPLER | {"n": 5, "seed": 9}),
        (Path("o"), SAMPLER | {"n": 5, "seed": 9}),
    ]
    same = {"prompt": old, "only": 4, "have": [], "stream": False}
    assert [options for _, options in calls] == [same | {"device": "cpu:0"}, same | {"device": "cpu"}]
    for flags in (("-n", 3), ("--tokens", 9), ("--temperature", 0), ("--seed", 0)):
        with pytest.raises(UsageError, match="takes the sampler's settings from the sample"):
            call("sample", "--like", sidecar, *flags)
    for number in (5, -1):
        again = sampling.Like(Path("c/run.pt"), None, ["sample.n=5"], number, "cpu", {})
        with pytest.raises(CheckFailed, match=f"is sample {number} of 5"):
            call("sample", "--like", sidecar)


@pytest.mark.parametrize("terminals", [(), ("stdout",), ("stderr",), ("stdout", "stderr")])
def test_what_is_streamed_is_whole_before_a_page_is_written(monkeypatch, ckpt, terminals):
    """The page has a bar, which would take the line of the last words."""
    screens = {name: io.TextIOWrapper(io.BytesIO(), newline="", write_through=True) for name in ("stdout", "stderr")}
    for name, screen in screens.items():
        screen.isatty = lambda name=name: name in terminals
        monkeypatch.setattr(console.sys, name, screen)

    def shown():
        return [screen.buffer.getvalue().decode() for screen in screens.values()]

    def draw(*_, report, **__):
        for part in ("it was", " life", "ly"):
            report(Sampled(part))
        return [Path("out/sample-1-000.txt")]

    at_page = []
    monkeypatch.setattr(pipeline, "draw", draw)
    monkeypatch.setattr(commands, "_refreshed", lambda *_: at_page.extend(shown()) or {})
    monkeypatch.setattr(commands, "_end", lambda *_, **__: None)
    console._typed.cache_clear()
    try:
        call("sample", "--ckpt", ckpt, "--stream")
    finally:
        console._typed.cache_clear()
    below = "\n" if terminals else ""
    assert at_page == shown() == ["it was lifely", f"{below}out/sample-1-000.txt\n"]


def test_the_options_of_attention_reach_its_stage(monkeypatch, capsys, ckpt):
    source = {"source": "own", "attention_weight": 0.5, "distance_tokens": 2.0, "shuffled": None}
    source |= {"masked": {"nats_per_token": 0.125, "interval_95": [0.0625, 0.25]}}
    source |= {"mean_ablated": {"nats_per_token": 0.375, "interval_95": None}}
    other = source | {"source": "layer 2", "shuffled": {"nats_per_token": 0.5, "interval_95": [0.25, 0.75]}}
    result = {"schema_version": 2, "tokens": 8, "nats_per_token": 1.5, "sources": [source, other], "softmax": True}
    result["all_sources"] = {kind: {"nats_per_token": 1.0, "interval_95": [0, 2]} for kind in ("masked", "shuffled")}
    result["all_sources"] |= {"mean_ablated": {"nats_per_token": 3.0, "interval_95": [1, 4]}}
    keys = ("lens_nats_per_token", "state_rms", "gradient_rms", "attention_rms", "feed_forward_rms")
    result["layers"] = [{"state": "embedding"} | dict(zip(keys, (4.0, 0.5, 0.25, None, None), strict=True))]
    result["layers"] += [{"state": "layer 1"} | dict(zip(keys, (1.5, 0.75, 0.125, 6.0, 7.0), strict=True))]
    result["cka"] = {"states": ["embedding", "layer 1"], "matrix": [[1.0, 0.3], [0.3, 1.0]]}
    calls = replaced(monkeypatch, pipeline, "look", result)
    flags = ("--windows", 3, "--out", "o", "--device", "cpu:0")
    call("attention", "--ckpt", ckpt, "--prompt", "p", "--prompt-tokens", 7, *flags, "--json")
    assert printed(capsys) == result
    call("attention", "--ckpt", ckpt, "--shards", "s", "--split", "test", *flags, "--json")
    assert printed(capsys) == result
    call("attention", "--ckpt", ckpt, "--device", "cpu")
    assert "attention: 8 tokens, 1.5000 nats per token" in " ".join(capsys.readouterr().out.split())
    assert [str(column.header) for column in tables.attention(Path("o"), result).columns] == [
        *("source", "weight", "back"),
        *("masked", "masked 95 %", "shuffled", "shuffled 95 %", "ablated", "ablated 95 %"),
    ]
    assert "weight: mean weight in the sum;" in str(tables.attention(Path("o"), result | {"softmax": False}).title)
    assert calls == [
        ((ckpt, prompts.Given("p", tokens=7), None, "val", 3, Path("o")), {"device": "cpu:0"}),
        ((ckpt, prompts.Given(), Path("s"), "test", 3, Path("o")), {"device": "cpu:0"}),
        ((ckpt, prompts.Given(), None, "val", 64, ckpt.parent / "attention"), {"device": "cpu"}),
    ]
    assert list(tables.attention_rows(result)) == [
        ("own", 0.5, 2.0, 0.125, [0.0625, 0.25], None, None, 0.375, None),
        ("layer 2", 0.5, 2.0, 0.125, [0.0625, 0.25], 0.5, [0.25, 0.75], 0.375, None),
        ("all sources", None, None, 1.0, [0, 2], 1.0, [0, 2], 3.0, [1, 4]),
    ]
    assert list(tables.layer_rows(result)) == [
        ("embedding", 4.0, 0.5, 0.25, None, None, None),
        ("layer 1", 1.5, 0.75, 0.125, 6.0, 7.0, 0.3),
    ]
    for entry in (source, result["all_sources"]):  # of one window there is nothing to shuffle with, and no interval
        entry |= {kind: {"nats_per_token": 0.5, "interval_95": None} for kind in ("masked", "mean_ablated")}
        entry["shuffled"] = None
    shown = tables.attention(Path("o"), result | {"sources": [source]})
    assert [str(one.header) for one in shown.columns] == ["source", "weight", "back", "masked", "ablated"]
    assert "nats per token; of one window, so there is no interval" in str(shown.title)


def test_the_options_of_run_reach_its_stage(monkeypatch, capsys):
    result = {"prepare": MANIFEST, "train": {"run": "r/run.pt"}, "eval": SCORES, "samples": ["a.txt", "b.txt"]}
    calls = replaced(monkeypatch, pipeline, "run_all", result)
    monkeypatch.setattr(os, "cpu_count", lambda: 61)
    base = ("run", "--recipe", "text-tiny", "a", "b")
    flags = ("--out", "o", "--workers", 3, "--max-bad", "5", "--device", "cpu:0", *set_flags("train.seed=4"))
    call(*base, *flags, "--json")
    assert printed(capsys) == {"schema_version": 2, **result}
    call(*base, "--device", "cpu")
    assert capsys.readouterr().out.splitlines()[-2:] == ["a.txt", "b.txt"]
    assert [(config.train.seed, paths, str(folder)) for (config, paths, folder), _ in calls] == [
        (4, ["a", "b"], "o"),
        (1, ["a", "b"], "runs/text-tiny/shortcut-s1"),
    ]
    assert [options for _, options in calls] == [
        {"n_workers": 3, "max_bad": "5", "device": "cpu:0", "stop": commands.signals, "page": True},
        {"n_workers": 61, "max_bad": "1%", "device": "cpu", "stop": commands.signals, "page": True},
    ]


def test_the_options_of_compare_reach_its_stage(monkeypatch, capsys, prepared):
    result = {"schema_version": 2, "contrasts": [{"verdict": "first"}, {"verdict": "second"}]}
    result |= {"gate": {"open": True}, "notices": ["A/A"], "report": "c/report.html"}
    calls = replaced(monkeypatch, comparison, "compare", result)
    monkeypatch.setattr(compared, "headings", lambda _: ("arm", "nats"))
    monkeypatch.setattr(compared, "rows", lambda _: [("gpt", 1.5)])
    monkeypatch.setattr(comparison, "commands", lambda folder: [f"shortcut sample --ckpt {folder}/runs/gpt-s1"])
    base = ("compare", "--recipe", "text-tiny", "--models", "gpt,moda")
    flags = ("--seeds", 2, "--match", "time", "--lrs", "5e-4,1", "--margin", 0.25, "--out", "o", "--json")
    call(*base, *flags, "--device", "cpu:0,cpu", "--set", "train.steps=9")
    assert printed(capsys) == result
    call(*base, "--device", "cpu")
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-3:] == ["A/A", "first", "second"]
    assert shown.err.splitlines()[-1] == "Page: c/report.html"
    assert "shortcut sample --ckpt comparisons/text-tiny/runs/gpt-s1" in shown.err.splitlines()
    laddered = ("--ladder", "48, 8x72,24", "--contrast", "moda : gpt", "--contrast", "gpt:moda", "--most-seeds", "9")
    call(*base, "--device", "cpu", *laddered)
    shut = {"gate": {"open": False}, "notices": ["No verdict.", "A/A"]}
    monkeypatch.setattr(comparison, "compare", lambda *_, **__: result | shut)
    call(*base)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[-3:] == ["A/A", "first", "second"]
    assert lines.count("No verdict.") == 1
    assert [(config.train.steps, models, str(folder)) for (config, models, folder), _ in calls] == [
        (9, ["gpt", "moda"], "o"),
        (150, ["gpt", "moda"], "comparisons/text-tiny"),
        (150, ["gpt", "moda"], "comparisons/text-tiny"),
    ]
    first = {"seeds": 2, "match": "time", "lrs": [5e-4, 1.0], "margin": 0.25, "devices": ["cpu:0", "cpu"]}
    usual = {"seeds": 3, "match": "params", "lrs": [], "margin": 0.005, "devices": ["cpu"]}
    plain = {"rungs": [], "pairs": [], "most_seeds": 0, "page": True, "task": None}
    plain |= {"executor": "local", "run_cpus": 1, "ray_address": ""}
    third = (
        usual
        | plain
        | {"match": "flops", "rungs": ["48", "8x72", "24"], "pairs": [("moda", "gpt"), ("gpt", "moda")]}
        | {"most_seeds": 9}
    )
    wanted = (first | plain, usual | plain, third)
    assert [options for _, options in calls] == [given | {"stop": commands.signals} for given in wanted]
    monkeypatch.setattr(comparison, "compare", lambda *_, page, **__: result | shut | ({"report": 1} if page else {}))
    call(*base, "--no-report")
    assert "second" in capsys.readouterr().out.splitlines()[-1]
    for wrong in ("a", "a:b:c", ":b", "a:"):
        with pytest.raises(UsageError, match="does not name two models"):
            call(*base, "--contrast", wrong)
    with pytest.raises(UsageError, match="--ladder needs a cost"):
        call(*base, "--ladder", "48", "--match", "none")
    with pytest.raises(UsageError, match="--lrs 1,x is not a list of numbers"):
        call(*base, "--lrs", "1,x")


def test_the_options_of_inspect_reach_its_stage(monkeypatch, capsys):
    found = {"kind": "checkpoint", "model": "conv", "parameters": {"total": 7}, "step": 4}
    found |= {"recipe": {"model": {"width": 64, "conv": {"kernel": 7}, "hyper": {"streams": 4}}}}
    calls = replaced(monkeypatch, inspection, "inspect", found)
    call("inspect", "p", "--verify", "--json")
    assert printed(capsys) == {"schema_version": 2, **found}
    call("inspect", "p")
    shown = [
        [cell.strip() for cell in line.strip("\u2502").split("\u2502")] for line in capsys.readouterr().out.splitlines()
    ]
    assert ["parameters.total", "7"] in shown
    assert ["step", "4"] in shown
    keys = [row[0] for row in shown if row[0].startswith("recipe")]
    assert keys == ["recipe.model.width", "recipe.model.conv.kernel"]  # not those of other architectures
    assert calls == [((Path("p"),), {"verify": True}), ((Path("p"),), {"verify": False})]
    replaced(monkeypatch, inspection, "inspect", {"kind": "shards", "path": "p", **MANIFEST})
    call("inspect", "p", "--json")
    assert printed(capsys)["kind"] == "shards"
    call("inspect", "p")
    assert capsys.readouterr().out.startswith("p: 9 files")


def test_checking_recipes_names_each_problem_and_fails_if_there_is_one(monkeypatch, capsys, tmp_path):
    (tmp_path / "bad.toml").write_text("[data]\n")
    call("recipes", "check", "text-tiny", "codec-mini", "--json")
    assert printed(capsys)["recipes"] == [{"recipe": name, "problem": ""} for name in ("text-tiny", "codec-mini")]
    with pytest.raises(CheckFailed, match="1 of 2 recipes are not valid"):
        call("recipes", "check", "text-tiny", tmp_path / "bad.toml", "--json")
    right, wrong = printed(capsys)["recipes"]
    assert right["problem"] == ""
    assert "data.shards: is missing" in wrong["problem"]
    call("recipes", "list", "--json")
    listed = printed(capsys)["recipes"]
    assert {entry["name"]: entry["about"] for entry in listed}["text-tiny"] == (
        "Text, trained in seconds: for tests and the demo, not for results."
    )


@pytest.mark.parametrize(("weights", "logs"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_options_of_prove_resume_reach_its_stage(monkeypatch, capsys, prepared, weights, logs):
    result = {"schema_version": 2, "kills": 2, "equal_weights": weights, "equal_logs": logs, "conditions": "1 thread"}
    calls = replaced(monkeypatch, proof, "resume", result)
    base = ("prove", "resume", "--recipe", "text-tiny", "--json")
    for flags in (
        ("--device", "cpu"),
        ("--kills", 9, "--seed", 8, "--out", "o", "--device", "cpu:0", "--set", "train.steps=9"),
    ):
        if weights and logs:
            call(*base, *flags)
        else:
            with pytest.raises(CheckFailed, match="ended with different weights or logs"):
                call(*base, *flags)
        assert printed(capsys) == result
    assert [(config.train.steps, folder.name) for (config, folder), _ in calls] == [(150, "runs"), (9, "o")]
    assert [options for _, options in calls] == [
        {"kills": 5, "seed": 1, "device": "cpu"},
        {"kills": 9, "seed": 8, "device": "cpu:0"},
    ]
    assert not calls[0][0][1].parent.exists()  # both runs were removed
    with suppress(CheckFailed):
        call("prove", "resume", "--recipe", "text-tiny", "--device", "cpu")
    word = "equal" if weights and logs else "not equal"
    assert capsys.readouterr().out.splitlines()[-1] == f"weights and logs are {word} after 2 kills (1 thread)"


def test_the_options_of_prove_tokens_reach_its_stage(monkeypatch, capsys):
    result = {"schema_version": 2, "sources": 3, "tokens": 9, "different": []}
    calls = replaced(monkeypatch, proof, "tokens", result)
    call("prove", "tokens", "d", "--json")
    assert printed(capsys) == result
    result["different"] = ["a", "b"]
    with pytest.raises(CheckFailed, match="2 documents were tokenized differently from d"):
        call("prove", "tokens", "d", "p", "q", "--sources", 3, "--seed", 8, "--json")
    assert printed(capsys) == result
    assert calls == [
        ((Path("d"), []), {"count": 20, "seed": 1}),
        ((Path("d"), ["p", "q"]), {"count": 3, "seed": 8}),
    ]
    for different, words in (([], "all are equal"), (["a"], "some differ")):
        result["different"] = different
        with suppress(CheckFailed):
            call("prove", "tokens", "d")
        assert capsys.readouterr().out.splitlines()[-1] == f"9 tokens of 3 files were compared; {words}"


def test_the_options_of_codec_train_reach_its_stage(monkeypatch, capsys):
    calls = replaced(monkeypatch, codec_training, "train", {"codec": "r/codec.pt"})
    monkeypatch.setattr(os, "cpu_count", lambda: 61)
    flags = ("--out", "o", "--workers", 3, "--resume", "never", "--device", "cpu:0", "--set", "train.seed=4", "--json")
    call("codec", "train", "a", "b", "--recipe", "codec-mini", *flags)
    assert printed(capsys) == {"schema_version": 2, "codec": "r/codec.pt"}
    call("codec", "train", "a", "--set", "train.seed=4", "--device", "cpu")
    assert capsys.readouterr().out == "r/codec.pt\n"
    assert [(config.train.seed, paths, str(folder)) for (config, paths, folder), _ in calls] == [
        (4, ["a", "b"], "o"),
        (4, ["a"], "runs/codec-mini-s4"),
    ]
    assert [options for _, options in calls] == [
        {"n_workers": 3, "device": "cpu:0", "resume": "never", "stop": commands.signals},
        {"n_workers": 61, "device": "cpu", "resume": "auto", "stop": commands.signals},
    ]


@pytest.mark.parametrize("there", [True, False])
def test_the_options_of_codec_get_reach_its_stage(monkeypatch, capsys, tmp_path, there):
    if there:
        (tmp_path / "w").write_bytes(b"")
    monkeypatch.setattr(weights, "cached", lambda _: tmp_path / "w")
    fetched = replaced(monkeypatch, weights, "fetch", tmp_path / "w")
    call("codec", "get", "encodec_48khz", "--json")
    expected = {"name": "encodec_48khz", "path": str(tmp_path / "w"), "worked": not there}
    assert printed(capsys) == {"schema_version": 2, **expected}
    assert [name for (name, _), _ in fetched] == ["encodec_48khz"]


def test_the_options_of_codec_eval_reach_its_stage(monkeypatch, capsys):
    result = {"schema_version": 2, "files": 1, "rejects": [], "seconds": 2.0, "perplexity": [3.0]}
    result |= {"encode_x_realtime": 4.0, "decode_x_realtime": 5.0, "weights": "mini"}
    result |= {"bandwidths": [{"kbps": 1.5, "si_sdr_db": 0.25}, {"kbps": 3.0, "stoi": 0.75}]}
    result |= {"opus": {"kbps": 7.5, "si_sdr_db": 1.25, "log_mel": 2.25, "stoi": 3.25, "pesq": 4.25}}
    calls = replaced(monkeypatch, codec_evaluation, "evaluate", result)
    call("codec", "eval", "mini", "a", "b", "--out", "o", "--json")
    assert printed(capsys) == result
    call("codec", "eval", "mini", "a")
    assert "encodes at 4 and decodes at 5 times real time" in " ".join(capsys.readouterr().out.split())
    assert list(tables.codec_rows(result)) == [
        ("mini", 1.5, 0.25, None, None, None),
        ("mini", 3.0, None, None, 0.75, None),
        ("opus", 7.5, 1.25, 2.25, 3.25, 4.25),
    ]
    assert [arguments for arguments, _ in calls] == [("mini", ["a", "b"], Path("o")), ("mini", ["a"], None)]


def test_the_options_of_demo_reach_its_stage(monkeypatch, capsys):
    row = SCORES | {"recipe": "text-tiny", "model": "gpt", "parameters": 5}
    result = {"schema_version": 2, "rows": [row], "samples": ["a.txt"]}
    calls = replaced(monkeypatch, demo, "demo", result)
    monkeypatch.setattr(os, "cpu_count", lambda: 61)
    monkeypatch.setattr(console._out(), "_width", 200)
    call("demo", "--out", "o", "--workers", 3, "--device", "cpu:0", "--json")
    assert printed(capsys) == result
    call("demo", "--device", "cpu")
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "a.txt"
    (row,) = (line for line in shown.splitlines() if "text-tiny" in line)  # the heading can take several lines
    cells = [cell.strip() for cell in row.strip("\u2502").split("\u2502")]
    assert cells == ["text-tiny", "gpt", "5", "1.5", "2.5", "0.25", "2.75 byte"]
    assert calls == [
        ((Path("o"),), {"n_workers": 3, "device": "cpu:0", "stop": commands.signals, "page": True}),
        ((Path("demo"),), {"n_workers": 61, "device": "cpu", "stop": commands.signals, "page": True}),
    ]


def test_auto_is_cuda_if_available_and_a_missing_device_is_an_error(monkeypatch):
    for available, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert device.choose("auto") == expected
    assert device.choose("cpu") == "cpu"
    assert device.choose("cpu:0") == "cpu:0"
    for name in ("cuda:99", "tpu", "meta"):
        with pytest.raises(Unavailable, match=f"device '{name}' can't be used") as refused:
            device.choose(name)
        assert refused.value.hint == "--device cpu"


# Exit codes


def ended(monkeypatch, capsys, command):
    """The exit code and stderr of `command`."""
    monkeypatch.setattr(ending.signals, "install", lambda: None)
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as left:
        ending.guarded(command)
    out, err = capsys.readouterr()
    assert out == ""
    return left.value.code, err


def raises(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code"),  # the codes in README
    [
        (errors.ShortcutError("what", "then"), 1),
        (errors.UsageError("what", "then"), 2),
        (errors.TooManyRejects("what", "then"), 3),
        (errors.CheckFailed("what", "then"), 4),
        (errors.Unavailable("what", "then"), 5),
        (errors.Interrupted("what", "then"), 75),
        (errors.Interrupted("what", "then", exit_code=130), 130),
        (errors.CheckFailed("what"), 4),
        (errors.CheckFailed("what [bold]then", "[red]this"), 4),
    ],
)
def test_every_error_is_one_panel_with_its_hint_and_its_code(monkeypatch, capsys, error, code):
    found, shown = ended(monkeypatch, capsys, raises(error))
    assert found == code
    lines = [line.strip("\u2502 ") for line in shown.splitlines()]
    assert [line for line in lines[1:-1] if line] == [error.message, *([f"Hint: {error.hint}"] if error.hint else [])]
    assert [line[0] for line in (lines[0], lines[-1])] == ["\u256d", "\u2570"]
    assert f" {'Interrupted' if isinstance(error, errors.Interrupted) else 'Error'} " in lines[0]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS])
def test_an_error_of_the_system_is_one_panel_and_code_1(monkeypatch, capsys, number):
    code, shown = ended(monkeypatch, capsys, raises(OSError(number, os.strerror(number), "a/file")))
    assert code == 1
    assert f"{os.strerror(number)}: a/file" in shown
    assert "files that were complete before are unchanged" in shown


def test_a_bug_keeps_its_traceback_and_success_is_0(monkeypatch, capsys):
    assert ended(monkeypatch, capsys, lambda: None) == (None, "")  # exit code 0
    assert ended(monkeypatch, capsys, lambda: 0) == (0, "")
    for error in (
        ValueError("a bug"),
        errors.Rejected("escaped"),
        OSError(errno.ENOENT, "none"),  # of no file
        OSError(errno.ENOENT, "none", commands.__file__),  # of a file of ours
        OSError(errno.ENOENT, "none", os.__file__),
        OSError(errno.ENOENT, "none", typer.__file__),
        OSError(errno.ECHILD, "no child", "f"),  # nothing that a path can cause
        BrokenPipeError(errno.EPIPE, "of a worker process"),
    ):
        with pytest.raises(type(error)):
            ending.guarded(raises(error))


def test_a_wrong_option_points_to_the_help_of_its_command(monkeypatch, capsys):
    for arguments, text in (
        (["eval", "--chpt", "x"], "shortcut eval --help"),
        (["codec", "eval"], "shortcut codec eval --help"),
        (["sample", "-n", "0"], "shortcut sample --help"),
        (["evil"], "shortcut --help"),
    ):
        code, shown = ended(monkeypatch, capsys, partial(commands.dispatch, arguments))
        assert code == 2
        assert f"Next: {text}" in shown
    monkeypatch.setattr(commands, "app", lambda *_, **__: raises(typer.BadParameter("odd"))())
    code, shown = ended(monkeypatch, capsys, partial(commands.dispatch, []))
    assert (code, "Next: shortcut --help" in shown) == (2, True)


PATH_ERRORS = [
    "ENOENT",
    "ENOTDIR",
    "EEXIST",
    "EISDIR",
    "ENOTEMPTY",
    "ENAMETOOLONG",
    "ELOOP",
    "ENXIO",
    "EINVAL",
    "EBUSY",
]


@pytest.mark.parametrize("name", PATH_ERRORS)
def test_an_error_of_a_path_of_the_user_is_one_panel_with_a_hint(monkeypatch, capsys, name):
    number = getattr(errno, name)
    for error in (
        OSError(number, os.strerror(number), "a/[/v2]"),
        OSError(number, os.strerror(number), b"a/[/v2]"),
        OSError(number, os.strerror(number), "a/tmp", None, "a/[/v2]"),
    ):
        code, shown = ended(monkeypatch, capsys, raises(error))
        assert code == (2 if name in ("ENAMETOOLONG", "ELOOP") else 1)
        assert f"{os.strerror(number)}: a/[/v2]" in shown
        assert "Hint: " in shown


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), 1, "there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 1, "9 bytes"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 1, "there is not enough memory: CUDA out of memory."),
        (ValueError("embedded null byte"), 2, "contains the character NUL"),
    ],
)
def test_what_a_user_can_act_on_is_one_panel(monkeypatch, capsys, error, code, words):
    found, shown = ended(monkeypatch, capsys, raises(error))
    assert found == code
    assert words in shown


def test_a_working_directory_that_is_gone_is_named(monkeypatch, capsys, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, shown = ended(monkeypatch, capsys, Path.cwd)
    assert (code, "the working directory does not exist any more" in shown) == (1, True)


# Paths that are wrong in every way, for every flag that names one

LONG = "x" * 300
NO_FILE = ("[/v2]a[red]", "file/sub", "folder", LONG)
NO_FOLDER = (*NO_FILE, "file")
NO_OUT = ("file", "file/sub", LONG, "/proc/x/y")
TRAIN = ("train", "--recipe", "text-tiny", "--set", "train.steps=1", "--set", "data.shards=RUN/shards")
RUN = ("--ckpt", "RUN/gpt/run.pt")
PLACES = [
    (("prepare", "text", "@", "--recipe", "text-tiny", "--out", "o"), NO_FILE),
    (("prepare", "text", "texts", "--recipe", "@", "--out", "o"), NO_FILE),
    (("prepare", "text", "texts", "--recipe", "text-tiny", "--out", "@"), NO_OUT),
    (("train", "--recipe", "@"), NO_FILE),
    (("train", "--recipe", "text-tiny", "--set", "data.shards=@"), NO_FOLDER),
    ((*TRAIN, "--out", "@"), NO_OUT),
    ((*TRAIN, "--init-from", "@"), (*NO_FILE, "file", "folder")),
    (("runs", "@"), tuple(path for path in NO_FOLDER if path != "folder")),
    (("diff", "@", "RUN/gpt"), (*NO_FILE, "file")),
    (("diff", "RUN/gpt", "@"), (*NO_FILE, "file")),
    (("eval", "--ckpt", "@"), (*NO_FILE, "file")),
    (("eval", *RUN, "--shards", "@"), NO_FOLDER),
    (("eval", *RUN, "--files", "@"), NO_FILE),
    (("sample", "--ckpt", "@"), (*NO_FILE, "file")),
    (("sample", "--like", "@"), (*NO_FILE, "file")),
    (("sample", *RUN, "--prompt", "@"), NO_FILE[:-1]),  # a long one is a text
    (("sample", *RUN, "--tokens", "9", "--out", "@"), NO_OUT),
    (("attention", "--ckpt", "@"), (*NO_FILE, "file")),
    (("attention", *RUN, "--prompt", "@"), NO_FILE[:-1]),
    (("attention", *RUN, "--shards", "@"), NO_FOLDER),
    (("attention", *RUN, "--prompt", "texts/000.txt", "--out", "@"), NO_OUT),
    (("run", "--recipe", "@", "texts"), NO_FILE),
    (("run", "--recipe", "text-tiny", "@"), NO_FILE),
    (("compare", "--models", "gpt", "--recipe", "@"), NO_FILE),
    (("compare", "--models", "gpt", *TRAIN[1:], "--out", "@"), NO_OUT),
    (("inspect", "@"), (*NO_FILE, "file")),
    (("report", "@"), (*NO_FOLDER, "file")),
    (("report", "RUN/gpt", "--out", "@"), NO_OUT),
    (("recipes", "show", "@"), NO_FILE),
    (("recipes", "copy", "@", "new.toml"), NO_FILE),
    (("recipes", "copy", "music", "@"), ("none/such", "folder", *NO_OUT)),
    (("prove", "resume", "--recipe", "@"), NO_FILE),
    (("prove", "resume", *TRAIN[1:], "--out", "@"), NO_OUT),
    (("prove", "tokens", "@"), NO_FOLDER),
    (("prove", "tokens", "RUN/shards", "@"), NO_FILE),
    (("codec", "train", "@"), NO_FILE),
    (("codec", "train", "sound.wav", "--recipe", "@"), NO_FILE),
    (("codec", "train", "sound.wav", "--out", "@"), NO_OUT),
    (("codec", "eval", "@", "sound.wav"), (*NO_FILE, "file")),
    (("codec", "eval", "mini", "@"), NO_FILE),
    (("codec", "eval", "mini", "sound.wav", "--out", "@"), NO_OUT),
    (("demo", "--out", "@"), NO_OUT),
]


@pytest.mark.parametrize(("arguments", "wrong"), PLACES, ids=[" ".join(arguments) for arguments, _ in PLACES])
def test_a_wrong_path_is_one_panel_for_every_flag(text_run, tmp_path, arguments, wrong):
    write_texts(tmp_path / "texts", 2)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("a file")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 24_000, 0, "NONE", ""))
        sound.writeframes(bytes(48_000))
    for path in wrong:
        given = [part.replace("RUN", str(text_run)).replace("@", path) for part in arguments]
        done = shortcut(*given, cwd=tmp_path, check=None)
        assert done.returncode in (1, 2, 3, 4), (path[:20], done)
        assert one_panel(done)
    assert (tmp_path / "file").read_text() == "a file"
    assert not list((tmp_path / "folder").iterdir())


def test_every_command_and_every_flag_with_a_path_is_tried():
    flags = {"FILE", "FILE|-|TEXT", "DIR", "PATH", "NAME|FILE", "run.pt", "SAMPLE.json", "WEIGHTS"}

    def walk(group, name):
        for part, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from walk(command, [*name, part])
            else:
                wanted = [each.opts[0] for each in command.params if each.metavar in flags]
                yield [*name, part], [flag for flag in wanted if flag.startswith("-")]

    tried = {(*arguments[:2], arguments[arguments.index("@") - 1]) for arguments, _ in PLACES if "@" in arguments}
    for name, wanted in walk(typer.main.get_command(commands.app), []):
        for flag in wanted:
            if flag == "--recipe" or (name, flag) != (["run"], "--out"):  # run is prepare, train, eval and sample
                assert any(list(place[: len(name)]) == name and place[-1] == flag for place in tried), (name, flag)


# Streams that are closed or full


def through(command, *arguments, cwd):
    """Run the command within a command line of bash, in which "$@" stands for it: (exit code, stdout, stderr)."""
    line = [sys.executable, "-m", "shortcut_cli", *map(str, arguments)]
    done = subprocess.run(
        ["bash", "-c", command, "bash", *line], cwd=cwd, capture_output=True, text=True, check=False, timeout=300
    )
    return done.returncode, done.stdout, done.stderr


NOBODY = '"$@" | { exec <&-; cat /dev/zero | head -c 1 > /dev/null; sleep 3; }; exit ${PIPESTATUS[0]}'


@pytest.mark.parametrize(
    "arguments", [["recipes", "list"], ["recipes", "show", "music"], ["recipes", "list", "--json"]]
)
@pytest.mark.parametrize(("command", "reason"), [('"$@" >&-', "Bad file"), ('"$@" > /dev/full', "No space")])
def test_a_stdout_that_takes_nothing_is_one_panel(tmp_path, arguments, command, reason):
    code, out, err = through(command, *arguments, cwd=tmp_path)
    assert (code, out) == (1, "")
    assert f"the output can't be written to stdout: {reason}" in err
    assert err.count("\u256d") == 1
    assert "Traceback" not in err
    assert "Exception ignored" not in err


@pytest.mark.parametrize(
    "arguments", [["recipes", "list"], ["recipes", "show", "music"], ["recipes", "list", "--json"]]
)
def test_who_reads_no_further_is_not_told(tmp_path, arguments):
    """As after `| head -1`: a command ends as others do by SIGPIPE, without a word."""
    assert through(NOBODY, *arguments, cwd=tmp_path) == (141, "", "")


@pytest.mark.parametrize("columns", [0, 20, 40, 80, 200])
def test_the_panel_of_a_signal_fits_the_terminal(monkeypatch, columns):
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((columns, 24)))
    lines = ending._panel(2).decode().splitlines()
    assert {len(line) for line in lines} == {columns or 80}
    words = " ".join("".join(letter for letter in " ".join(lines) if letter.isascii()).split())
    assert words == "Interrupted interrupted Hint: run the same command again to resume"


@pytest.mark.parametrize(("command", "exit_code"), [('"$@" >&-', 1), ('"$@" > /dev/full', 1), (NOBODY, 141)])
def test_help_for_a_stdout_that_takes_nothing_has_no_traceback(tmp_path, command, exit_code):
    code, out, err = through(command, "train", "--help", cwd=tmp_path)
    assert (code, out) == (exit_code, "")
    assert "Traceback" not in err
    assert "Exception ignored" not in err


PREPARE = ("prepare", "text", "texts", "--recipe", "text-tiny", "--out", "s", *set_flags("tokenizer.vocabulary=300"))


@pytest.mark.parametrize("command", ['"$@" 2>&-', '"$@" 2> /dev/full', '"$@" 2> >(true)', '"$@" <&- 2>&-'])
def test_a_stderr_that_takes_nothing_does_not_stop_the_work(tmp_path, command):
    write_texts(tmp_path / "texts")
    code, out, err = through(command, *PREPARE, "--json", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert json.loads(out)["inputs"] == 30
    assert through(command, "inspect", "s", "--verify", cwd=tmp_path)[0] == 0
    assert through(command, "inspect", "nowhere", cwd=tmp_path) == (2, "", "")


def test_no_file_of_a_command_takes_the_place_of_a_closed_stream(tmp_path):
    write_texts(tmp_path / "texts")
    assert through('"$@" <&- >&- 2>&-', *PREPARE, cwd=tmp_path) == (1, "", "")
    code = "from shortcut_cli.cli import console; console.harden(); f = open('f', 'w'); f.write(str(f.fileno()))"
    subprocess.run(["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert int((tmp_path / "f").read_text()) > 2
    shortcut("inspect", "s", "--verify", cwd=tmp_path)


# Numbers of flags

CKPT = ("--ckpt", "r/run.pt")
HUGE, DIGITS = str(2**63), "9" * 5000
NUMBERS = [
    (("prepare", "text", "t", "--workers"), ("0", "-1", "1025", "1000000", HUGE, "nan", "1.5")),
    (
        ("prepare", "text", "t", "--recipe", "text-tiny", "--max-bad"),
        ("nan", "inf", "-1", "1e400", "nan%", "-1%", "1.5"),
    ),
    (("train", "--recipe", "text-tiny", "--seed"), ("-1", HUGE, DIGITS, "nan", "1.5")),
    (("sample", *CKPT, "-n"), ("0", "-1", "1000001", HUGE, DIGITS, "nan")),
    (("sample", *CKPT, "--tokens"), ("0", "-5", "1000000001", HUGE, "nan")),
    (("sample", *CKPT, "--temperature"), ("nan", "inf", "-inf", "-1", "1e-42", "1e-7", "1e7", "1e400")),
    (("sample", *CKPT, "--top-k"), ("-1", HUGE, "nan")),
    (("sample", *CKPT, "--top-p"), ("nan", "inf", "0", "-1", "1.1", "1e-300", "1e400")),
    (("sample", *CKPT, "--min-p"), ("nan", "inf", "-0.1", "1", "1e400")),
    (("sample", *CKPT, "--seed"), ("-1", HUGE, DIGITS, "nan")),
    (("attention", *CKPT, "--windows"), ("0", "-1", "nan", "1000000001", HUGE)),
    (("compare", "--recipe", "text-tiny", "--models", "gpt", "--seeds"), ("0", "-1", "1001", HUGE, "nan")),
    (("compare", "--recipe", "text-tiny", "--models", "gpt", "--margin"), ("nan", "inf", "-1", "-inf", "1e400")),
    (
        ("compare", "--recipe", "text-tiny", "--models", "gpt", "--lrs"),
        ("nan,-1,0", "nan", "0", "-1", "1e400", "1e-3,", ""),
    ),
    (("compare", "--recipe", "text-tiny", "--models"), ("", ",", " , ")),
    (("prove", "resume", "--recipe", "text-tiny", "--kills"), ("0", "-1", "1001", HUGE)),
    (("prove", "resume", "--recipe", "text-tiny", "--seed"), ("-1", HUGE)),
    (("prove", "tokens", "d", "--sources"), ("0", "-1", HUGE)),
    (("prove", "tokens", "d", "--seed"), ("-1", HUGE)),
    (("codec", "train", "a", "--workers"), ("0", "1025")),
]


@pytest.mark.parametrize(("arguments", "wrong"), NUMBERS, ids=[" ".join(arguments) for arguments, _ in NUMBERS])
def test_a_flag_takes_no_number_that_is_not_finite_or_out_of_range(
    monkeypatch, capsys, ckpt, prepared, arguments, wrong
):
    monkeypatch.chdir(ckpt.parent.parent)
    write_texts(Path("t"), 2)
    monkeypatch.setattr(runs, "open_run", lambda *_: SimpleNamespace(recipe=reading.read("text-tiny")))
    flag = arguments[-1]
    for value in wrong:
        code, shown = ended(
            monkeypatch, capsys, partial(commands.dispatch, [*arguments, f"{flag}={value}"[len(flag) + 1 :]])
        )
        assert code == 2, value
        assert flag in " ".join(shown.split()), (value, shown)


EMPTY_PATHS = [
    *(("train", "--recipe", ""), ("compare", "--recipe=", "--models", "gpt")),
    *(("prepare", "text", ""), ("prepare", "text", "t", ""), ("prepare", "text", "t", "--out", "")),
    *(("train", "--recipe", "text-tiny", "--out="), ("train", "--recipe", "text-tiny", "--init-from", "")),
    *(("eval", "--ckpt", ""), ("eval", *CKPT, "--shards", ""), ("eval", *CKPT, "--files", ""), ("eval", *CKPT, "")),
    *(("sample", "--ckpt="), ("sample", "--like", ""), ("sample", *CKPT, "--out", ""), ("attention", *CKPT, "--out=")),
    *(("run", "--recipe", "text-tiny", ""), ("compare", "--recipe", "text-tiny", "--models", "gpt", "--out", "")),
    *(
        ("inspect", ""),
        ("report", ""),
        ("report", "t", "--out", ""),
        ("runs", ""),
        ("diff", "t", ""),
        ("demo", "--out", ""),
    ),
    *(("recipes", "show", ""), ("recipes", "copy", "", "x"), ("codec", "eval", "", "t")),
    *(("recipes", "copy", "text", ""), ("recipes", "check", ""), ("prove", "tokens", ""), ("prove", "tokens", "t", "")),
    *(("prove", "resume", "--recipe", "text-tiny", "--out", ""), ("codec", "train", ""), ("codec", "eval", "mini", "")),
]


@pytest.mark.parametrize("arguments", EMPTY_PATHS, ids=" ".join)
def test_an_empty_path_is_not_the_working_directory(monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    write_texts(Path("t"), 2)
    before = sorted(tmp_path.rglob("*"))
    code, shown = ended(monkeypatch, capsys, partial(commands.dispatch, [*arguments]))
    assert code == 2
    assert " is empty" in shown
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("arguments", EMPTY_PATHS, ids=" ".join)
def test_who_asks_for_help_gets_it_whatever_else_is_wrong(capsys, arguments):
    for flag in ("--help", "-h"):
        commands.dispatch([*arguments, flag])
        assert capsys.readouterr().out.startswith("Usage: shortcut ")


STRAY = {
    "train text-tiny": "train --recipe text-tiny",
    "train --seed 3 mine.toml --set train.steps=5": "train --seed 3 --recipe mine.toml --set train.steps=5",
    "run text-tiny texts": "run --recipe text-tiny texts",
    "run texts 'my recipe.toml'": "run texts --recipe 'my recipe.toml'",
    "compare text-tiny --models gpt": "compare --recipe text-tiny --models gpt",
    "prove resume text-tiny": "prove resume --recipe text-tiny",
    "eval run": "eval --ckpt run",
    "eval run.pt --split val": "eval --ckpt run.pt --split val",
    "sample run -n 1": "sample --ckpt run -n 1",
    "attention run": "attention --ckpt run",
    # What may be meant is not known, or not where the flag belongs
    "train none": ("what is missing is --recipe NAME|FILE", "train --help"),
    "train --recipe text-tiny text": ("", "train --help"),
    "sample none": ("", "sample --help"),
    "doctor text-tiny": ("", "doctor --help"),
    "train -- text-tiny": ("perhaps --recipe text-tiny was meant", None),
    "train --out a.toml a.toml": ("perhaps --recipe a.toml was meant", None),
}


@pytest.mark.parametrize("line", STRAY)
def test_a_stray_argument_is_named_with_the_option_that_may_be_meant(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/run.pt").touch()
    with pytest.raises(UsageError) as refused:
        commands.dispatch(shlex.split(line))
    hint, then = ("", STRAY[line]) if isinstance(STRAY[line], str) else STRAY[line]
    assert re.fullmatch(
        r"unexpected argument (text|text-tiny|run|run\.pt|none|\w*( recipe)?\.toml)", refused.value.message
    )
    assert shlex.split(line).count(refused.value.message.removeprefix("unexpected argument "))
    assert (refused.value.hint, refused.value.then) == (hint, f"shortcut {then}" if then else "")


@pytest.mark.parametrize("line", ["train ''", "train '' text-tiny", "doctor ''", "compare '' --models gpt"])
def test_an_empty_stray_argument_is_said_to_be_empty(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is empty") as refused:
        commands.dispatch(shlex.split(line))
    assert (refused.value.hint, refused.value.then) == ("perhaps a variable of the shell is not set", "")


def test_a_path_that_has_the_name_of_a_recipe_is_no_stray_argument(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="text-tiny does not exist"):  # --recipe may be left out here
        commands.dispatch(["prepare", "text", "text-tiny"])


EMPTY = {"schema_version": 2, "contrasts": [], "notices": [], "gate": {"open": True}, "report": "c.html"}


def test_lists_of_names_and_numbers_may_have_spaces(monkeypatch, prepared):
    calls = replaced(monkeypatch, comparison, "compare", dict(EMPTY))
    monkeypatch.setattr(tables, "comparison", lambda _: "")
    monkeypatch.setattr(comparison, "commands", lambda _: [])
    base = ("compare", "--recipe", "text-tiny", "--models", " gpt, moda ,", "--lrs", "1e-3, 2e-3")
    call(*base, "--device", "cpu, cpu:0")
    (((_, models, _), options),) = calls
    assert (models, options["lrs"], options["devices"]) == (["gpt", "moda"], [1e-3, 2e-3], ["cpu", "cpu:0"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_has_no_number_that_json_does_not_have(monkeypatch, capsys, ckpt, value):
    result = SCORES | {"nats_per_token": value, "interval_95": [value, 1.0], "deep": {"a": ({"b": value},)}}
    replaced(monkeypatch, pipeline, "score", result)
    call("eval", "--ckpt", ckpt, "--device", "cpu", "--json")
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found.pop("written") == []
    assert found == SCORES | {"nats_per_token": None, "interval_95": [None, 1.0], "deep": {"a": [{"b": None}]}}
    call("eval", "--ckpt", ckpt, "--device", "cpu")
    assert cell(value) in capsys.readouterr().out


# Names that look like Rich's markup

ODD = "a[/v2]b [red]:cat:"


def test_names_that_look_like_markup_are_shown_as_they_are(tmp_path):
    folder = tmp_path / ODD
    write_texts(folder / "texts")
    tools = partial(shortcut, cwd=folder, COLUMNS="400")
    recipe, run = f"{ODD}.toml", f"runs/{ODD}"
    (folder / recipe).parent.mkdir()
    assert tools("recipes", "copy", "text-tiny", recipe).stdout == f"{recipe}\n"
    sets = set_flags(*TEXT_SETTINGS, f"data.shards={ODD}", "sample.tokens=20", "sample.n=1")
    shown = [
        tools("recipes", "check", recipe).stdout,
        tools("prepare", "text", "texts", "--recipe", recipe, *sets).stdout,
        tools("train", "--recipe", recipe, *sets, "--out", run).stdout,
        tools("eval", "--ckpt", run).stdout,
        tools("sample", "--ckpt", run).stdout,
        tools("attention", "--ckpt", run).stdout,
        tools("inspect", run).stdout,
        tools("inspect", ODD).stdout,
        tools("inspect", recipe).stdout,
        tools("prove", "tokens", ODD).stdout,
        tools("run", "--recipe", recipe, "texts", *sets, "--out", run).stdout,
        tools("sample", "--ckpt", f"{ODD}/none", check=2).stderr,
        tools("train", "--recipe", ODD, check=2).stderr,
        tools("train", "--recipe", recipe, "--model", ODD, check=2).stderr,
        tools("train", "--recipe", recipe, "--set", f"{ODD}=3", check=2).stderr,
        tools("prepare", "text", ODD, "--recipe", recipe, "--out", f"{recipe}/{ODD}", check=1).stderr,
        tools("eval", "--ckpt", ODD, f"--{ODD}", check=2).stderr,
        tools("inspect", f"{ODD}/none", check=2).stderr,
        tools("codec", "eval", "mini", ODD, check=2).stderr,
    ]
    assert [text for text in shown if ODD not in text] == []


def test_events_that_look_like_markup_are_shown_as_they_are(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with console.Reporter() as report:
        now = 200.0
        for event in (
            Note(text=ODD),
            Validation(step=1, loss=1.0, best=1.0, text=ODD),
            Progress(task=ODD, done=1, total=2, unit=ODD),
        ):
            report(event)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [ODD, f"step 1: validation {ODD} (best so far)", f"{ODD}: 1 of 2 {ODD}"]
    screen = console._console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(console, "_err", lambda: screen)
    with console.Reporter() as report:
        report(Progress(task=ODD, done=1, total=2, unit=ODD, loss=1.0))
        report.live.refresh()
    assert ODD in screen.file.getvalue()


# What is accepted, and what is proposed


def test_a_run_folder_stands_for_its_checkpoint(text_run, tmp_path):
    run = text_run / "shortcut"
    for flags in (("eval",), ("sample", "-n", 1, "--tokens", 9, "--out", "s"), ("attention", "--out", "a")):
        shortcut(*flags, "--ckpt", run, "--json", cwd=tmp_path)
    found = json.loads(shortcut("inspect", run, "--json", "--verify", cwd=tmp_path).stdout)
    assert found == json.loads(shortcut("inspect", run / "run.pt", "--json", cwd=tmp_path).stdout)
    assert (found["kind"], found["verified"], found["path"]) == ("checkpoint", True, str(run / "run.pt"))
    for flags in (("eval",), ("sample",), ("attention",)):
        done = shortcut(*flags, "--ckpt", text_run / "shards", cwd=tmp_path, check=2)
        assert "has no run.pt" in " ".join(one_panel(done).replace("\u2502", "").split())


def test_inspect_says_what_it_verified(text_run, tmp_path):
    assert "verified" not in shortcut("inspect", text_run / "shards", cwd=tmp_path).stdout
    done = shortcut("inspect", text_run / "shards", "--verify", cwd=tmp_path)
    assert "verified: every byte is as it was written" in done.stdout
    shutil.copy(text_run / "gpt" / "run.pt", tmp_path / "run.pt")
    with open(tmp_path / "run.pt", "r+b") as stream:
        stream.seek(5000)
        stream.write(b"\xff\x00\xff")
    for flags in ((), ("--verify",)):
        assert "bytes have changed" in one_panel(shortcut("inspect", "run.pt", *flags, cwd=tmp_path, check=4))
    (tmp_path / "r.toml").write_text(reading.text("music"))
    shortcut("inspect", "r.toml", cwd=tmp_path)
    assert "has no checksum" in one_panel(shortcut("inspect", "r.toml", "--verify", cwd=tmp_path, check=2))
    assert "none does not exist" in one_panel(shortcut("inspect", "none", cwd=tmp_path, check=2))


@pytest.mark.parametrize("command", [("train",), ("compare", "--models", "gpt"), ("prove", "resume")])
def test_shards_that_are_missing_are_proposed_to_be_prepared_with_the_same_settings(tmp_path, command):
    write_texts(tmp_path / "texts")
    sets = set_flags("tokenizer.vocabulary=300", "train.steps=2", "data.shards=my shards")
    done = shortcut(*command, "--recipe", "text-tiny", *sets, cwd=tmp_path, check=2)
    line = one_panel(done).splitlines()[-1].removeprefix("Fill in PATH: ")  # not in the panel, which would break it
    sets = "--set tokenizer.vocabulary=300 --set 'data.shards=my shards'"
    assert line == f"shortcut prepare text PATH... --recipe text-tiny {sets}"
    assert not (tmp_path / "runs").exists()
    shortcut(*shlex.split(line.replace("PATH...", "texts"))[1:], cwd=tmp_path)
    assert (tmp_path / "my shards" / "manifest.json").is_file()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / ".shortcut").write_text("shortcut prepare")
    done = shortcut(*command, "--recipe", "text-tiny", "--set", "data.shards=half", cwd=tmp_path, check=2)
    assert "half is incomplete" in one_panel(done)


@pytest.mark.parametrize(
    ("given", "proposed"),
    [
        ("texts", "prepare text texts --recipe text-tiny {} --out shards/texts-2"),  # shards/texts is there
        ("texts/000.txt", "prepare text texts/000.txt --recipe text-tiny {} --out shards/000"),
        ("other", "prepare text PATH... --recipe text-tiny {} --out shards/other"),
        ("run", "prepare text PATH... --recipe text-tiny {} --out shards/run"),  # of another command
    ],
)
def test_shards_are_not_proposed_to_be_prepared_where_something_else_is(tmp_path, monkeypatch, capsys, given, proposed):
    monkeypatch.chdir(tmp_path)
    write_texts(Path("texts"))
    for name, content in (("shards/texts/x", ""), ("other/x.mid", ""), ("run/.shortcut", "shortcut train\n")):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(content)
    write_texts(Path("run/samples"), 2)  # a command of ours wrote them
    sets = set_flags("tokenizer.vocabulary=300", "train.steps=2")
    with pytest.raises(UsageError) as refused:
        commands.dispatch(["train", "--recipe", "text-tiny", *sets, "--set", f"data.shards={given}"])
    assert refused.value.then == f"shortcut {proposed.format('--set tokenizer.vocabulary=300')}"
    line = shlex.split(refused.value.then.replace("PATH...", "texts"))[1:]
    commands.dispatch(line)
    assert (Path(line[-1]) / "manifest.json").is_file()
    monkeypatch.setattr(sys, "argv", ["shortcut", "run", "--recipe", "text-tiny", "texts"])
    with pytest.raises(UsageError) as refused:
        commands.dispatch(["run", "--recipe", "text-tiny", "texts", "--set", f"data.shards={given}"])
    *command, last = shlex.split(refused.value.then)
    assert command == [*sys.argv, "--set"]
    assert re.fullmatch(rf"data\.shards=shards/{Path(given).stem}(-\d)?", last)
    assert not Path(last.partition("=")[2]).exists()
    capsys.readouterr()


def test_what_can_not_be_searched_is_no_folder_of_inputs(tmp_path, monkeypatch):
    def refuses(*_):
        raise PermissionError(13, "Permission denied", "/proc/1/cwd")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "x").touch()
    monkeypatch.setattr(early.inputs, "find", refuses)
    with pytest.raises(UsageError, match="all is not a shards folder") as refused:
        commands.dispatch(["train", "--recipe", "text-tiny", "--set", "data.shards=all"])
    assert "PATH..." in refused.value.then


@pytest.mark.parametrize(
    ("command", "whole"), [("run a", "run a --x 1"), ("run -- a --b", "run --x 1 -- a --b"), ("--", "--x 1 --")]
)
def test_flags_of_a_proposed_command_come_before_what_is_no_flag(command, whole):
    assert reading.with_flags(command.split(), ["--x", "1"]) == whole.split()


@pytest.mark.parametrize("name", ["2024", "true", "nan", "inf", "1e400", "[1, 2]", "'a'", "a=b", "-x"])
def test_a_folder_can_have_any_name(tmp_path, name):
    write_texts(tmp_path / "texts")
    settings = set_flags(*TEXT_SETTINGS)
    shortcut("prepare", "text", "texts", "--recipe", "text-tiny", f"--out={name}", *settings, cwd=tmp_path)
    assert (tmp_path / name / "manifest.json").is_file()
    shortcut("inspect", "--", name, cwd=tmp_path)


# Signals (processes that get some: test_signals.py)


class Ended(BaseException):
    """Instead of the end of the process."""


@pytest.fixture
def received(monkeypatch):
    """Signals with a clock that tests set; the process does not end, but raises Ended with its exit code."""

    def end(code, stderr):
        raise Ended(code)

    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(ending, "_end", end)
    monkeypatch.setattr(ending, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return Signals(), clock


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_process_at_once_outside_of_a_block(received, number, code):
    signals, _ = received
    with pytest.raises(Ended) as ended:
        signals.receive(number)
    assert ended.value.args == (code,)
    signals.receive(number)  # too late


def leaving(signals, block, kind=errors.Interrupted):
    """The exception with which `block` leaves `with signals`."""

    def run():
        with signals as asked:
            block(asked)

    with pytest.raises(kind) as left:
        run()
    return left.value


def test_within_a_block_a_signal_waits_to_be_asked_for(received):
    signals, _ = received

    def block(asked):
        assert asked() is None
        signals.receive(signal.SIGINT)
        assert asked() == 130

    assert leaving(signals, block).exit_code == 130


@pytest.mark.parametrize("later_s", [0.0, 0.05, 0.999])
def test_a_signal_that_is_repeated_soon_is_the_same_request(received, later_s):
    signals, clock = received

    def block(asked):
        signals.receive(signal.SIGTERM)
        clock.now += later_s
        signals.receive(signal.SIGINT)
        assert asked() == 75

    assert leaving(signals, block).exit_code == 75
    signals.receive(signal.SIGINT)


@pytest.mark.parametrize("inside", [True, False])
def test_a_later_signal_ends_the_process_at_once_within_a_block_and_after_it(received, inside):
    signals, clock = received

    def block(_):
        signals.receive(signal.SIGTERM)
        clock.now += 1.0
        if inside:
            signals.receive(signal.SIGINT)

    left = leaving(signals, block, Ended if inside else errors.Interrupted)
    if not inside:
        with pytest.raises(Ended) as ended:
            signals.receive(signal.SIGINT)
        left = ended.value
    assert left.args == (130,)


def test_a_signal_that_nobody_asked_for_raises_at_the_end(received):
    signals, _ = received
    done = []

    def block(_):
        signals.receive(signal.SIGINT)
        done.append("went on")

    assert leaving(signals, block).exit_code == 130
    assert done == ["went on"]


def test_a_signal_does_not_hide_an_error_of_the_block(received):
    signals, _ = received

    def block(_):
        signals.receive(signal.SIGINT)
        raise KeyError("own")

    leaving(signals, block, KeyError)


def test_a_signal_after_the_end_of_the_command_is_ignored(received):
    signals, _ = received
    signals.close()
    signals.receive(signal.SIGTERM)


def test_the_panel_of_a_signal_is_that_of_an_error(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    console._err.cache_clear()
    console.panel(errors.Interrupted(*ending.INTERRUPTED))
    assert ending._panel(2).decode() == capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(encoding="ascii"))
    assert ending._panel(2).isascii()


# What reaches the screen


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "yes"),
        (False, "no"),
        (None, ""),
        (0, "0"),
        (1234567, "1,234,567"),
        (-1234, "-1,234"),
        (0.123456, "0.1235"),
        (9999.4, "9,999"),
        (10000.0, "10,000"),
        (-12345.6, "-12,346"),
        (1e-5, "1e-05"),
        ([1000, 0.5, None], "[1,000, 0.5, ]"),
        ((1000, 0.5), "[1,000, 0.5]"),
        ("1000", "1000"),
    ],
)
def test_a_cell_is_shown_as_people_read_it(value, text):
    assert cell(value) == text


def test_a_table_is_drawn_in_a_moment_whatever_is_in_it(capsys):
    values = {"lines": "\n" * 10**6, "long": "x" * 10**6, "short": "y"} | {f"row {n}": n for n in range(10**5)}
    began = time.process_time()
    console.result({}, console.pairs("t", values), as_json=False)
    assert time.process_time() - began < 10
    found = capsys.readouterr().out
    assert found.count("x") == 1000
    assert "x ..." in found
    assert "y" in found
    assert "row 1996" in found
    assert "row 1997" not in found
    assert "and 98,003 more rows" in found
    assert found.count("\n") < 2100


def test_a_table_aligns_all_columns_but_the_first_to_the_right():
    table = console.table("t[x]", ("a", "b", "c"), [("[x]", 1, 0.5)])
    assert str(table.title) == "t[x]"
    assert [column.justify for column in table.columns] == ["left", "right", "right"]
    assert [[str(cell) for cell in column._cells] for column in table.columns] == [["[x]"], ["1"], ["0.5"]]


def test_events_become_plain_lines_in_a_pipe(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    steps = partial(Progress, task="train", total=4000, unit="steps")
    with console.Reporter() as report:
        report(Note(text="[a] note"))
        report(Validation(step=1000, loss=1.25, best=1.5))
        report(Validation(step=1000, loss=1.5, best=1.5))
        report(Validation(step=2000, loss=1.75, best=1.5))
        report(Validation(step=2000, loss=0.5, best=0.5, text="0.5 dB"))
        report(steps(done=1))
        now = 109.9
        report(steps(done=1))
        now = 110.0
        report(steps(done=1000, loss=1.23456, tokens=64_000, seconds=2.0))
        now = 119.0
        report(steps(done=1500))
        now = 120.0
        report(steps(done=2000))
        report(Part(task="demo", number=2, total=9, text="music", whole=Whole(0.0, 1, None)))
        now = 130.0
        training = {"loss_unit": "nats per token", "epochs": 0.75, "tokens": 64_000, "seconds": 2.0}
        report(steps(done=3000, loss=1.5, **training))
        now = 140.0
        report(Progress(task="read", done=3, total=4, unit="files"))
    assert capsys.readouterr().err.splitlines() == [
        "[a] note",
        "step 1,000: validation 1.2500 nats per token on the val split (best so far)",
        "step 1,000: validation 1.5000 nats per token on the val split (best so far)",
        "step 2,000: validation 1.7500 nats per token on the val split",
        "step 2,000: validation 0.5 dB (best so far)",
        "train: 1,000 of 4,000 steps, loss 1.2346, 32,000 tokens/s, 2 s spent, 6 s left",
        "train: 2,000 of 4,000 steps, loss 1.2346, 32,000 tokens/s, 4 s spent, 4 s left",
        "demo 2 of 9: music",
        "train: 3,000 of 4,000 steps, loss 1.5000 nats per token, epoch 0.75, 32,000 tokens/s, 2 s spent, 1 s left",
        "read: 3 of 4 files",
    ]


def said(name, amount, **more):
    """What is beside a bar."""
    return {"name": name, "loss": "", "epoch": "", "amount": amount, "short": amount} | more


def test_a_terminal_shows_a_bar_for_each_task_until_it_is_done(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(console, "_err", lambda: screen)
    with console.Reporter() as report:
        report(Progress(task="read", done=0, total=3, unit="files"))
        report(Progress(task="train", done=2, total=9, unit="steps", loss=1.23456, tokens=5, seconds=1.0))
        report(Progress(task="train", done=5, total=9, unit="steps"))
        report(Progress(task="read", done=2, total=4, unit="files"))
        shown = [(task.description, task.completed, task.total, task.fields) for task in report.live.tasks]
        assert shown == [
            ("read", 2, 4, said("read", "2/4 files", unit="files")),
            ("train", 5, 9, said("train", "5/9 steps", unit="steps", loss="loss 1.2346")),
        ]
        report(Progress(task="read", done=4, total=4, unit="files"))
        report(Progress(task="read", done=4, total=4, unit="files"))  # no bar that is there for a moment
        assert [task.description for task in report.live.tasks] == ["train"]
        report(Progress(task="read", done=1, total=2, unit="files"))  # a second stage of that name
        assert [(task.description, task.completed) for task in report.live.tasks] == [("train", 5), ("read", 1)]
        live = report.live
        assert live.live.is_started
    assert not live.live.is_started  # otherwise the cursor would stay hidden


def test_a_command_with_parts_has_one_bar_over_all_and_none_of_a_part_that_is_over(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(console, "_err", lambda: screen)
    with console.Reporter() as report:
        report(Part("demo", 1, 3, "first", Whole(0.0, 0, None)))
        assert report._left() is None
        report(Progress("sample", 2, 9, "tokens", whole=Whole(0.1, 0, 90.0)))  # and it ends early
        report(Part("demo", 2, 3, "second", Whole(0.4, 1, 60.0)))
        training = {"loss": 1.5, "loss_unit": "nats per token", "epochs": 0.5}
        report(Progress("train", 1, 9, "steps", **training, whole=Whole(0.5, 1, 50.0)))
        report(Progress("train", 2, 9, "steps", whole=Whole(0.45, 1, 55.0)))
        whole, train = report.live.tasks
        assert (whole.description, whole.fields["amount"], whole.total) == ("demo 2 of 3: second", "1/3 parts", 1)
        assert whole.completed == 0.5  # it never goes back
        assert report._left() == pytest.approx(55, abs=1)
        assert (train.description, train.completed, train.total) == ("train", 2, 9)
        assert (train.fields["loss"], train.fields["epoch"]) == ("loss 1.5000 nats/token", "epoch 1.00")
        report(Progress("read", 4, 5, "files"))
        assert whole.completed == 0.5
        assert report._left() == pytest.approx(55, abs=1)


def test_parts_that_go_on_beside_each_other_keep_their_bars_and_the_time_left_is_told(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(console, "_err", lambda: screen)
    now = 100.0
    with console.Reporter() as report:
        monkeypatch.setattr(time, "monotonic", lambda: now)
        report(Part(task="compare", number=1, total=4, text="a on cuda:0", whole=Whole(0.0, 0, None), beside=True))
        assert report._left() is None
        report(Progress(task="a", done=2, total=10, unit="steps", whole=Whole(0.05, 0, 300.0)))
        report(Part(task="compare", number=2, total=4, text="b on cuda:1", whole=Whole(0.05, 0, 300.0), beside=True))
        report(Progress(task="b", done=5, total=10, unit="steps", whole=Whole(0.2, 1, 240.0)))
        now = 160.0
        whole, *runs = report.live.tasks
        assert (whole.completed, whole.fields["amount"]) == (0.2, "1/4 parts")  # of two that began one is over
        assert [task.description for task in runs] == ["a", "b"]  # side by side
        assert report._left() == 180  # as it was told, less what has passed since
        now = 999.0
        assert report._left() == 0
        report(Progress(task="b", done=6, total=10, unit="steps", whole=Whole(0.1, 1, 90.0)))
        assert (whole.completed, report._left()) == (0.2, 90)  # the bar never goes back


def test_in_a_pipe_parts_tell_the_time_left(monkeypatch, capsys):
    now = 100.0
    with console.Reporter() as report:
        monkeypatch.setattr(time, "monotonic", lambda: now)
        report(Part(task="compare", number=1, total=4, text="a on cpu", whole=Whole(0.0, 0, None)))
        now = 160.0
        report(Part(task="compare", number=2, total=4, text="b on cpu", whole=Whole(0.2, 1, 240.0)))
        report(Part(task="compare", number=3, total=4, text="c on cpu", whole=Whole(0.9, 2, 45.4)))
    assert capsys.readouterr().err.splitlines() == [
        "compare 1 of 4: a on cpu",
        "compare 2 of 4: b on cpu, about 4 min left",
        "compare 3 of 4: c on cpu, about 45 s left",
    ]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_bar_of_a_training_fits_and_says_its_loss_and_the_time_left(monkeypatch, width):
    screen = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(console, "_err", lambda: screen)
    now = 100.0
    with console.Reporter() as report:
        report(Part("demo", 2, 9, "music-tiny: shortcut", Whole(0.1, 1, None)))
        live = report.live
        live.stop()
        live._task_class = None
        monkeypatch.setattr(live, "get_time", lambda: now)
        for task in live.tasks:
            task._get_time = live.get_time
        training = {"loss_unit": "nats per token", "epochs": 1.25, "tokens": 64_000, "seconds": 2.0}
        for step in range(1, 100):
            now += 1.0
            report(Progress(task="train", done=10 * step, total=1_500, unit="steps", loss=4.0713, **training))
        with screen.capture() as drawn:
            screen.print(live.get_renderable())
    lines = drawn.get().splitlines()
    assert lines[0].rstrip() == "demo 2 of 9: music-tiny: shortcut"
    assert max(map(len, lines)) <= width
    assert len(lines) == (3 if width >= 80 else 5)
    at = next(number for number, line in enumerate(lines) if line.startswith("train"))
    found = " ".join(lines[at : at + (1 if width >= 80 else 2)])
    for said in ("990/1,500 steps", "loss 4.0713 nats/token", "1:38 ", "0:51 left"):
        assert said in found
    assert "1/9 parts" in lines[-1 if width >= 80 else -2]
    assert ("epoch 1.25" in found) == ("10 steps/s" in found) == (width >= bars.ROOMY)


def test_a_large_import_is_announced_on_a_terminal_and_the_line_goes_away(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    console._Loading().find_spec("torch")
    assert stream.getvalue() == ""  # in a pipe
    stream.isatty = lambda: True
    monkeypatch.setenv(console.COMPLETION, "complete_bash")
    console._Loading().find_spec("torch")
    assert stream.getvalue() == ""  # a shell asks, in the middle of the user's line
    monkeypatch.delenv(console.COMPLETION)
    for name in ("json", "torch"):
        console._Loading().find_spec(name)
    assert stream.getvalue() == "\r\x1b[Kloading torch ...\r"
    console.text("x", error=True)
    console.text("y", error=True)
    assert stream.getvalue() == "\r\x1b[Kloading torch ...\r\r\x1b[Kxy"


@pytest.mark.parametrize(
    ("terminal", "variables", "width"),
    [(False, {}, 120), (False, {"COLUMNS": "77"}, 77), (True, {"COLUMNS": "66"}, 66)],
)
def test_a_table_is_as_wide_as_the_terminal_and_120_columns_in_a_pipe(monkeypatch, terminal, variables, width):
    monkeypatch.delenv("COLUMNS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", stream)
    assert console._out.__wrapped__().width == width


def test_doctor_shows_what_to_do_only_if_something_is_missing(monkeypatch, capsys):
    checks = [
        {"what": "a", "works": True, "found": "1.0", "remedy": "nothing to do"},
        {"what": "b", "works": False, "found": "none", "remedy": "install b"},
    ]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    call("doctor", "--json")
    assert printed(capsys)["checks"] == checks
    call("doctor")
    *_, first, second, _, last = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("\u2502").split("\u2502")] for line in (first, second)]
    assert rows == [["a", "ok", "1.0"], ["b", "missing", "none"]]
    assert last == "b: install b"


def test_doctor_examines_every_package_that_is_required():
    required = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    assert sorted(doctor.PACKAGES) == sorted(requirement.partition(">=")[0] for requirement in required)


def test_doctor_examines_packages_devices_codecs_and_the_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("SHORTCUT_CACHE", str(tmp_path))

    def version(package):
        if package == "encodec":
            raise doctor.PackageNotFoundError(package)
        return f"{package} 1.2"

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    free = doctor.LOW_DISK_GIB * 2**30
    for amount, works in ((free, True), (free - 1, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, amount=amount: SimpleNamespace(free=amount))
        found = {check["what"]: check for check in doctor.examine()}
        assert (found["disk"]["works"], found["disk"]["found"]) == (works, "2.0 GiB free here")
    assert found["encodec"] == {
        "what": "encodec",
        "works": False,
        "found": "not installed",
        "remedy": "pip install encodec",
    }
    assert (found["torch"]["works"], found["torch"]["found"]) == (True, "torch 1.2")
    assert found["CUDA"]["found"] == "none; training runs on the CPU"
    assert "MPS" not in found
    assert found["CPU"]["found"].startswith(f"{os.cpu_count()} cores")
    assert found["codec mini"]["works"] is True
    for name in ("encodec_24khz", "encodec_48khz"):
        path = weights.cached(name)
        assert (found[f"codec {name}"]["works"], str(path) in found[f"codec {name}"]["remedy"]) == (False, True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    found = {check["what"]: check for check in doctor.examine()}
    assert found["CUDA"]["found"] == "a card"
    assert (found["MPS"]["works"], found["MPS"]["found"]) == (True, "available with --device mps")
    assert all(found[f"codec {name}"]["works"] for name in ("encodec_24khz", "encodec_48khz"))
