"""Training: a resumed run is the run, to the bit; what is refused; what is written."""

import hashlib
import json
import math

import pytest
import torch
from conftest import TEXT_SETTINGS

from shortcut_cli import checkpoint, recipe
from shortcut_cli.errors import Interrupted, ShortcutError, UsageError
from shortcut_cli.stages import training


def quiet(*_, **__):
    pass


def keys(text_run, *settings):
    return recipe.read("text-tiny", [*TEXT_SETTINGS, f"data.shards={text_run / 'shards'}", *settings])


def go(resolved, folder, stop=lambda: None, resume="auto"):
    return training.train(resolved, folder, device="cpu", resume=resume, report=quiet, stop=stop)


def weights_hash(folder, name="resume.pt"):
    content = checkpoint.load(folder / name)
    digest = hashlib.sha256()
    for key, tensor in sorted(content["model"].items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def stop_after(steps):
    """A `stop` that asks to leave after that many steps."""
    asked = 0

    def stop():
        nonlocal asked
        asked += 1
        return 75 if asked == steps else None

    return stop


@pytest.mark.parametrize("model", ["gpt", "shortcut"])
@pytest.mark.parametrize("extra", [(), ("model.dropout=0.1", "train.ema=0.9", "train.accumulation=2")])
def test_an_interrupted_run_equals_an_uninterrupted_one(text_run, tmp_path, model, extra):
    resolved = keys(text_run, f"model.name={model}", *extra)
    go(resolved, tmp_path / "whole")
    for steps in (3, 1, 5):  # leaves at steps 3, 4 and 9
        with pytest.raises(Interrupted) as left:
            go(resolved, tmp_path / "parts", stop_after(steps))
        assert left.value.exit_code == 75
    summary = go(resolved, tmp_path / "parts")
    assert summary["step"] == 12
    for name in ("resume.pt", "run.pt"):
        assert weights_hash(tmp_path / "parts", name) == weights_hash(tmp_path / "whole", name)
    a, b = log_lines(tmp_path / "whole"), log_lines(tmp_path / "parts")
    times = {"seconds"}
    assert [{k: v for k, v in line.items() if k not in times} for line in a] == [
        {k: v for k, v in line.items() if k not in times} for line in b
    ]


def test_a_finished_run_is_left_alone(text_run):
    before = (text_run / "gpt" / "run.pt").read_bytes()
    assert go(keys(text_run, "model.name=gpt"), text_run / "gpt")["worked"] is False
    assert (text_run / "gpt" / "run.pt").read_bytes() == before


def test_another_recipe_is_refused_and_named(text_run):
    with pytest.raises(UsageError, match=r"train\.lr: .* -> 0\.5"):
        go(keys(text_run, "model.name=gpt", "train.lr=0.5"), text_run / "gpt")


def test_never_begins_again(text_run, tmp_path):
    resolved = keys(text_run)
    with pytest.raises(Interrupted):
        go(resolved, tmp_path, stop_after(5))
    assert go(resolved, tmp_path, resume="never")["step"] == 12
    assert [line["step"] for line in log_lines(tmp_path) if "loss" in line] == [2, 4, 6, 8, 10, 12]


def test_the_loss_goes_down_and_is_logged(text_run):
    lines = [line for line in log_lines(text_run / "gpt") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert {"step", "loss", "lr", "gradient_norm", "tokens", "seconds"} == lines[0].keys()


def test_run_pt_is_the_best_by_validation(text_run):
    validations = {line["step"]: line["validation"] for line in log_lines(text_run / "gpt") if "validation" in line}
    best = checkpoint.load(text_run / "gpt" / "run.pt")
    assert best["scores"]["validation"] == min(validations.values())
    assert validations[best["step"]] == best["scores"]["validation"]
    assert list(validations) == [4, 8, 12]


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(text_run, tmp_path, monkeypatch):
    resolved = keys(text_run)
    plain, calls = training.metrics.loss, 0

    def breaks(logits, targets):
        nonlocal calls
        calls += torch.is_grad_enabled()
        return plain(logits, targets) * (math.nan if calls > 6 and torch.is_grad_enabled() else 1)

    monkeypatch.setattr(training.metrics, "loss", breaks)
    with pytest.raises(ShortcutError, match="not finite at step 7"):
        go(resolved, tmp_path)
    kept = checkpoint.load(tmp_path / "resume.pt")
    assert kept["step"] == 4
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())


def test_shards_of_another_tokenizer_are_refused(text_run, tmp_path):
    with pytest.raises(UsageError, match=r"tokenizer\.alphabet"):
        go(keys(text_run, "tokenizer.alphabet=abc"), tmp_path)


def test_too_little_data_is_a_usage_error(text_run, tmp_path):
    with pytest.raises(UsageError, match="too few for a context"):
        go(keys(text_run, "model.context=100000"), tmp_path)


def test_the_log_is_cut_at_the_saved_step(tmp_path):
    log = training.Log(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        log.write(step=step, loss=1.0)
    with open(log.path, "a") as stream:
        stream.write('{"step": 4, "lo')
    log.cut(2)
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2]


def test_a_checkpoint_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "proof"), "w")

    torch.save({name: Payload() for name in checkpoint.FIELDS}, tmp_path / "run.pt")
    with pytest.raises(ShortcutError, match="can't be read"):
        checkpoint.load(tmp_path / "run.pt")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(100)])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    (tmp_path / "run.pt").write_bytes(content)
    with pytest.raises(UsageError, match="is not a run"):
        checkpoint.load(tmp_path / "run.pt")


def test_a_damaged_checkpoint(text_run, tmp_path):
    whole = (text_run / "gpt" / "run.pt").read_bytes()
    for size in (len(whole) // 2, len(whole) - 10):
        (tmp_path / "run.pt").write_bytes(whole[:size])
        with pytest.raises(ShortcutError, match=r"is not a run\.pt|can't be read"):
            checkpoint.load(tmp_path / "run.pt")
