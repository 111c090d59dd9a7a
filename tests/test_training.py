"""Training: a resumed run is the run, to the bit; what is refused; what is written."""

import collections
import json
import math
import os
from contextlib import nullcontext

import pytest
import torch
from conftest import TEXT_SETTINGS

from shortcut_cli import checkpoint, loop, recipe
from shortcut_cli.errors import CheckFailed, Interrupted, ShortcutError, UsageError
from shortcut_cli.stages import proof, training


def quiet(*_, **__):
    pass


def keys(text_run, *settings):
    return recipe.read("text-tiny", [*TEXT_SETTINGS, f"data.shards={text_run / 'shards'}", *settings])


NEVER = nullcontext(lambda: None)


def go(resolved, folder, stop=NEVER, resume="auto"):
    return training.train(resolved, folder, device="cpu", resume=resume, report=quiet, stop=stop)


def weights_hash(folder, name="resume.pt"):
    return proof.weights_sha256(folder / name)


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def stop_after(steps):
    """A `stop` that asks to leave after that many steps."""
    asked = 0

    def stop():
        nonlocal asked
        asked += 1
        return 75 if asked == steps else None

    return nullcontext(stop)


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
    log = loop.Log(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        log.write(step=step, loss=1.0)
    with open(log.path, "a") as stream:
        stream.write('{"step": 4, "lo')
    log.cut(2)
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2]


def sealed(path, model):
    """A checkpoint with a right sum, as a stranger could write one."""
    content = {name: kind() for name, kind in checkpoint.FIELDS.items()}
    content |= {"format": checkpoint.FORMAT, "model": model, "tokenizer": {"fingerprint": "", "files": {}}}
    checkpoint.save(path, content)
    return path


def test_a_checkpoint_runs_no_code_and_allocates_no_more_than_it_holds(tmp_path):
    class Payload:
        def __init__(self, call, *arguments):
            self.reduced = call, arguments

        def __reduce__(self):
            return self.reduced

    assert checkpoint.load(sealed(tmp_path / "right.pt", {"a": torch.ones(3)}))["model"]["a"].sum() == 3
    for payload in (Payload(open, str(tmp_path / "proof"), "w"), Payload(bytearray, 10**11)):
        with pytest.raises(CheckFailed, match="asks for"):
            checkpoint.load(sealed(tmp_path / "run.pt", {"a": payload}))
    assert not (tmp_path / "proof").exists()
    small = torch.ones(1).untyped_storage()
    for shape, stride in (((10**11,), (1,)), ((10**6, 10**6), (10**6, 1)), ((10**11,), (0,))):
        claim = Payload(
            torch._utils._rebuild_tensor_v2,
            torch.storage.TypedStorage(wrap_storage=small, dtype=torch.float32, _internal=True),
            0,
            shape,
            stride,
            False,
            collections.OrderedDict(),
        )
        with pytest.raises(CheckFailed):
            checkpoint.load(sealed(tmp_path / "run.pt", {"a": claim}))


def test_a_recipe_inside_a_checkpoint_asks_for_no_more_than_its_weights(text_run, tmp_path):
    content = checkpoint.load(text_run / "gpt" / "run.pt")
    content["recipe"]["model"]["width"] = 2**20
    checkpoint.save(tmp_path / "run.pt", content)
    with pytest.raises(CheckFailed, match="not those of its recipe"):
        checkpoint.open_run(tmp_path / "run.pt", "cpu")


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_a_file_that_is_no_checkpoint(tmp_path, content):
    (tmp_path / "run.pt").write_bytes(content)
    with pytest.raises(UsageError, match="is not a run"):
        checkpoint.load(tmp_path / "run.pt")


def test_any_changed_byte_of_a_checkpoint_is_noticed(tmp_path):
    whole = sealed(tmp_path / "run.pt", {"a": torch.ones(3)}).read_bytes()
    changed = [whole[:size] for size in (3, 70, len(whole) // 2, len(whole) - 1)] + [
        whole + b"x",
        whole[:50] + whole[51:],
    ]
    changed += [whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :] for place in range(len(whole))]
    for content in changed:
        (tmp_path / "run.pt").write_bytes(content)
        with pytest.raises(ShortcutError):
            checkpoint.load(tmp_path / "run.pt")


def test_a_damaged_state_falls_back_to_the_one_before(text_run, tmp_path):
    go(keys(text_run), tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(keys(text_run), tmp_path / "parts", stop_after(9))
    state = tmp_path / "parts" / "resume.pt"
    state.write_bytes(state.read_bytes()[:-100])
    notes = []
    training.train(
        keys(text_run),
        tmp_path / "parts",
        device="cpu",
        resume="auto",
        report=lambda event, **fields: notes.append(fields["text"]) if event == "note" else None,
        stop=NEVER,
    )
    assert "cut off" in notes[0]
    assert "going on from the state before it, resume.prev.pt" in notes[0]
    assert "going on at step 8" in notes
    assert weights_hash(tmp_path / "parts") == weights_hash(tmp_path / "whole")
    assert [line["step"] for line in log_lines(tmp_path / "parts") if "loss" in line] == [2, 4, 6, 8, 10, 12]


def test_two_damaged_states_are_refused(text_run, tmp_path):
    with pytest.raises(Interrupted):
        go(keys(text_run), tmp_path, stop_after(9))
    for name in ("resume.pt", loop.PREVIOUS):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(CheckFailed) as refused:
        go(keys(text_run), tmp_path)
    assert "--resume never" in refused.value.hint


def test_what_a_killed_process_left_is_removed(text_run, tmp_path):
    (tmp_path / ".run.pt.999999999.tmp").write_bytes(b"half")
    (tmp_path / f".eval.json.{os.getpid()}.tmp").write_bytes(b"of another command that is at work")
    go(keys(text_run), tmp_path)
    assert [path.name for path in tmp_path.glob(".*.tmp")] == [f".eval.json.{os.getpid()}.tmp"]


def test_routers_have_no_weight_decay_and_a_rate_of_their_own():
    from test_models import make

    from shortcut_cli import optim

    model = make("mudd", {})
    keys = recipe.read("text-tiny", ["train.router_lr=0.25"]).train
    optimizer = optim.adamw(model, keys, model.routers(), keys.router_lr)
    optim.set_rate(optimizer, 0.5)
    named = {parameter: name for name, parameter in model.named_parameters()}
    found = {named[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == set(named.values())
    for name, group in found.items():
        routing = name.startswith("mixes.")
        assert group["lr"] == (0.125 if routing else 0.5)
        assert group["weight_decay"] == (
            keys.weight_decay if "weight" in name and "norm" not in name and not routing else 0
        )
