"""Training: a resumed run equals an uninterrupted one bit for bit; what is refused; what is written."""

import collections
import copy
import functools
import itertools
import json
import math
import os
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TEXT_SETTINGS, quiet
from test_windows import plain_key, plain_start
from torch.nn import functional as F

from shortcut_cli import files, registry
from shortcut_cli.config import reading, schema
from shortcut_cli.data import shards
from shortcut_cli.errors import CheckFailed, Diverged, Interrupted, ShortcutError, Unavailable, UsageError
from shortcut_cli.events import Note, Progress, Validation
from shortcut_cli.inference import runs
from shortcut_cli.kernels import bf16
from shortcut_cli.models.loss import loss as cross_entropy
from shortcut_cli.stages import proof, training
from shortcut_cli.training import checkpoint, loop, muon, optim, precision, run_log
from shortcut_cli.training.loop import State
from shortcut_cli.training.trainer import Trainer, validation_starts


def config(text_run, *settings):
    return reading.read("text-tiny", [*TEXT_SETTINGS, f"data.shards={text_run / 'shards'}", *settings])


NEVER = nullcontext(lambda: None)
CROSS_ENTROPY = "shortcut_cli.training.trainer.cross_entropy"


def go(resolved, folder, stop=NEVER, resume="auto", report=quiet, extend=False):
    return training.train(resolved, folder, device="cpu", resume=resume, report=report, stop=stop, extend=extend)


VOCABULARY = 1 + 1 + 26 + 10 + 1  # newline, space, letters, digits, and EOS
TINY = ("model.layers=1", "model.width=8", "model.heads=1", "model.context=16", "model.ffn=16", "eval.stride=8")
SMALL = ("model.width=32", "model.heads=2", "model.context=32", "model.ffn=64", "eval.stride=16")  # four layers


def tiny(text_run, *settings):
    """A recipe whose steps take milliseconds."""
    return config(text_run, *TINY, "model.name=gpt", "train.precision=fp32", "train.batch_size=4", *settings)


def made(text_run, folder, *settings):
    return Trainer(tiny(text_run, *settings), folder, "cpu", quiet)


def tokens(text_run, split):
    """All ids of a split, read without the code that training uses (uint16, one shard)."""
    return np.fromfile(text_run / "shards" / f"{split}-00000.bin", "<u2").astype(np.int64)


def equal(a, b):
    """Whether two dictionaries hold the same tensors, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def redrawn(weights, seed):
    """Other weights of the same shapes; the head of the tiny model is tied to its embedding."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}
    return drawn | {"head.weight": drawn["embedding.weight"]}


def weights_hash(folder, name="resume.pt"):
    return proof.weights_sha256(folder / name)


def log_lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def stop_after(steps):
    """A `stop` that asks to leave after `steps` steps."""
    asked = 0

    def stop():
        nonlocal asked
        asked += 1
        return 75 if asked == steps else None

    return nullcontext(stop)


KINDS = [  # of training, each of which has a state and a path of its own
    *itertools.product(
        ("train.optimizer=adamw", "train.optimizer=muon"), ("train.precision=fp32", "train.precision=bf16")
    )
]


@pytest.mark.parametrize("model", ["gpt", "shortcut"])
@pytest.mark.parametrize(
    "extra", [*KINDS, ("train.precision=fp32", "model.dropout=0.1", "train.ema=0.9", "train.accumulation=2")]
)
def test_an_interrupted_run_equals_an_uninterrupted_one(text_run, tmp_path, model, extra):
    resolved = config(text_run, *SMALL, f"model.name={model}", *extra)
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
    assert go(config(text_run, "model.name=gpt"), text_run / "gpt")["worked"] is False
    assert (text_run / "gpt" / "run.pt").read_bytes() == before


def test_another_recipe_is_refused_and_named(text_run):
    with pytest.raises(UsageError, match=r"train\.lr: .* -> 0\.5"):
        go(config(text_run, "model.name=gpt", "train.lr=0.5"), text_run / "gpt")


def test_never_starts_from_scratch(text_run, tmp_path):
    resolved = tiny(text_run)
    with pytest.raises(Interrupted):
        go(resolved, tmp_path, stop_after(5))
    assert go(resolved, tmp_path, resume="never")["step"] == 12
    assert [line["step"] for line in log_lines(tmp_path) if "loss" in line] == [2, 4, 6, 8, 10, 12]


def test_the_loss_goes_down_and_is_logged(text_run):
    lines = [line for line in log_lines(text_run / "gpt") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert {"step", "loss", "lr", "gradient_norm", "tokens", "seconds"} == lines[0].keys()


@pytest.mark.parametrize("parts", [(), (3,), (5, 1)])
def test_run_pt_is_the_best_by_validation_also_of_a_resumed_run(text_run, tmp_path, monkeypatch, parts):
    scripted = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 9: 1.5}
    monkeypatch.setattr(Trainer, "validation_loss", lambda self: scripted[self.state.step])
    resolved, events, weights = tiny(text_run, "train.steps=9", "train.eval_every=2"), [], {}

    def watched(event):
        if isinstance(event, Validation):
            events.append(event)

    def step(self, number, plain=Trainer.step):
        loss = plain(self, number)
        weights[number + 1] = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        return loss

    monkeypatch.setattr(Trainer, "step", step)
    for steps in parts:
        with pytest.raises(Interrupted):
            go(resolved, tmp_path, stop_after(steps), report=watched)
    summary = go(resolved, tmp_path, report=watched)
    assert events == [
        Validation(step=step, loss=loss, best=best)
        for (step, loss), best in zip(scripted.items(), (3, 1, 1, 1, 1), strict=True)
    ]
    assert [(line["step"], line["validation"]) for line in log_lines(tmp_path) if "validation" in line] == [
        *scripted.items()
    ]
    best = checkpoint.load(tmp_path / "run.pt")
    assert best["step"] == 4
    assert best["scores"] == {"validation": 1.0}
    assert equal(best["model"], weights[4])
    assert summary["validation_nats_per_token"] == 1.0
    last = checkpoint.load(tmp_path / "resume.pt")
    assert last["step"] == 9
    assert equal(last["model"], weights[9])


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(text_run, tmp_path, monkeypatch):
    resolved = tiny(text_run)
    calls = 0

    def breaks(logits, targets):
        nonlocal calls
        calls += torch.is_grad_enabled()
        return cross_entropy(logits, targets) * (math.nan if calls > 6 and torch.is_grad_enabled() else 1)

    monkeypatch.setattr(CROSS_ENTROPY, breaks)
    with pytest.raises(ShortcutError, match="not finite at step 7"):
        go(resolved, tmp_path)
    kept = checkpoint.load(tmp_path / "resume.pt")
    assert kept["step"] == 4
    assert all(tensor.isfinite().all() for tensor in kept["model"].values())


def test_shards_of_another_tokenizer_are_refused(text_run, tmp_path):
    with pytest.raises(UsageError, match=r"tokenizer\.alphabet: '\\n abc.*' -> 'abc'"):  # the shards' -> the recipe's
        go(config(text_run, "tokenizer.alphabet=abc"), tmp_path)


def test_too_little_data_is_a_usage_error(text_run, tmp_path):
    with pytest.raises(UsageError, match="too few for a context"):
        go(config(text_run, "model.context=100000"), tmp_path)


def test_the_log_is_cut_at_the_saved_step(tmp_path):
    log = run_log.Log(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        log.write(step=step, loss=1.0)
    with open(log.path, "a") as stream:
        stream.write('{"step": 4, "lo')
    log.cut(2)
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2]


def sealed(path, model):
    """A checkpoint with a valid checksum, as an attacker could write it."""
    content = {name: kind() for name, kind in checkpoint.FIELDS.items()}
    tokenizer = {"fingerprint": "", "files": {}}
    content |= {"format": checkpoint.FORMAT, "model": model, "vocabulary": 1, "tokenizer": tokenizer}
    content |= {"recipe": {"model": {"name": "gpt"}}, "scores": {"validation": 1.0}}
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


def test_a_checkpoint_of_an_earlier_version_means_what_it_meant(text_run, tmp_path):
    content = checkpoint.load(text_run / "gpt" / "run.pt")
    expected = runs.open_run(text_run / "gpt" / "run.pt", "cpu")
    for section, keys in (("model", ("qk_norm", "init")), ("train", ("optimizer", "schedule", "min_lr", "decay"))):
        for key in keys:
            del content["recipe"][section][key]
    del content["recipe"]["model"]["shortcut"]["map_norm"], content["recipe"]["model"]["depth_attention"]
    checkpoint.save(tmp_path / "run.pt", content)
    found = runs.open_run(tmp_path / "run.pt", "cpu")
    assert not found.recipe.model.qk_norm
    assert not found.recipe.model.shortcut.map_norm
    assert found.recipe.model.depth_attention.values == "raw"
    assert (found.recipe.model.init, found.recipe.train.optimizer) == ("gpt2", "adamw")
    assert (found.recipe.train.schedule, found.recipe.train.min_lr, found.recipe.train.decay) == ("cosine", 0.1, 0.2)
    x = torch.arange(12)[None]
    assert torch.equal(found.model(x), expected.model(x))


def test_a_recipe_inside_a_checkpoint_asks_for_no_more_than_its_weights(text_run, tmp_path):
    content = checkpoint.load(text_run / "gpt" / "run.pt")
    content["recipe"]["model"]["width"] = 2**16
    checkpoint.save(tmp_path / "run.pt", content)
    with pytest.raises(CheckFailed, match="do not match its recipe"):
        runs.open_run(tmp_path / "run.pt", "cpu")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("run.pt", "run.pt"), ("x.pt", "run.pt"), ("resume.pt", "resume.pt"), (loop.PREVIOUS, "resume.pt")],
)
def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"hello")
    with pytest.raises(UsageError, match=rf"{name} is not a {kind}$"):
        checkpoint.load(tmp_path / name)


@pytest.mark.parametrize(("content", "state"), [(b"", "is empty"), (bytes(512), "begins with zeros")])
def test_a_file_that_a_power_cut_left_is_damaged(tmp_path, content, state):
    (tmp_path / "run.pt").write_bytes(content)
    with pytest.raises(CheckFailed, match=state):
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
    go(tiny(text_run), tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(tiny(text_run), tmp_path / "parts", stop_after(11))  # after a line of the log at step 10
    state = tmp_path / "parts" / "resume.pt"
    state.write_bytes(state.read_bytes()[:-100])
    notes = []
    training.train(
        tiny(text_run),
        tmp_path / "parts",
        device="cpu",
        resume="auto",
        report=lambda event: notes.append(event.text) if isinstance(event, Note) else None,
        stop=NEVER,
    )
    assert "truncated" in notes[0]
    assert "continuing from the state before it, resume.prev.pt" in notes[0]
    assert "resuming at step 8" in notes
    assert weights_hash(tmp_path / "parts") == weights_hash(tmp_path / "whole")
    assert [line["step"] for line in log_lines(tmp_path / "parts") if "loss" in line] == [2, 4, 6, 8, 10, 12]


def test_two_damaged_states_are_refused(text_run, tmp_path):
    with pytest.raises(Interrupted):
        go(tiny(text_run), tmp_path, stop_after(9))
    for name in ("resume.pt", loop.PREVIOUS):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(CheckFailed) as refused:
        go(tiny(text_run), tmp_path)
    assert "--resume never" in refused.value.hint


def test_what_a_killed_process_left_is_removed(text_run, tmp_path):
    (tmp_path / ".shortcut").write_text("shortcut train, process 999999999\n")
    (tmp_path / ".run.pt.999999999.tmp").write_bytes(b"half")
    (tmp_path / f".eval.json.{os.getpid()}.tmp").write_bytes(b"of another command that is at work")
    go(tiny(text_run), tmp_path)
    assert [path.name for path in tmp_path.glob(".*.tmp")] == [f".eval.json.{os.getpid()}.tmp"]


def test_routers_have_no_weight_decay_and_a_rate_of_their_own():
    from test_models import make

    from shortcut_cli.training import optim

    model = make("mudd", {})
    config = reading.read("text-tiny", ["train.router_lr=0.25"]).train
    optimizer = optim.adamw(model, config, model.routers(), config.router_lr)
    optim.set_rate(optimizer, 0.5)
    named = {parameter: name for name, parameter in model.named_parameters()}
    found = {named[p]: group for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == set(named.values())
    for name, group in found.items():
        routing = name.startswith("mixes.")
        assert group["lr"] == (0.125 if routing else 0.5)
        assert group["weight_decay"] == (
            config.weight_decay if "weight" in name and "norm" not in name and not routing else 0
        )


def test_what_multiplies_the_whole_stream_learns_at_a_hundredth_of_the_rate(text_run, tmp_path):
    trainer = made(text_run, tmp_path, "model.name=x0", "train.router_lr=0.5", "train.lr=0.25")
    optim.set_rate(trainer.optimizer.adamw, 0.25)
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.optimizer.adamw.param_groups
    found = {names[p]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found["carry"] == (0.00125, 0)
    assert found["again"] == (0.125, 0)
    assert {rate for name, (rate, _) in found.items() if name not in ("carry", "again")} == {0.25}


@pytest.mark.parametrize(
    ("accumulation", "clip", "ema"), [(1, 0.0, 0.0), (1, 0.05, 0.9), (2, 0.05, 0.15), (4, 1e6, 0.9)]
)
def test_steps_equal_plain_ones(text_run, tmp_path, monkeypatch, accumulation, clip, ema):
    # Plain gradient descent instead of AdamW, whose updates do not show the size of a gradient.
    monkeypatch.setattr(optim, "adamw", lambda model, *_: torch.optim.SGD(model.parameters(), lr=math.nan))
    settings = (f"train.accumulation={accumulation}", f"train.clip={clip}", f"train.ema={ema}", "train.seed=5")
    rates = ("train.lr=0.5", "train.warmup=4", "train.schedule=constant", "train.steps=10000")
    trainer = made(text_run, tmp_path, *settings, *rates)
    ids = tokens(text_run, "train")
    model = registry.load(registry.MODELS, "gpt")(trainer.recipe.model, VOCABULARY, seed=5)
    assert equal(trainer.model.state_dict(), model.state_dict())
    average = {name: weight.clone() for name, weight in model.state_dict().items()}
    # Two steps of warm-up, then one whose windows are from another epoch.
    for number, rate in ((0, 0.125), (1, 0.25), (5000, 0.5)):
        starts = [plain_start(len(ids), 16, 5, number * 4 + i) for i in range(4)]
        rows = torch.from_numpy(np.stack([ids[start : start + 17] for start in starts]))
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(weight.grad.double().pow(2).sum().item() for weight in model.parameters()))
        assert clip == 0 or 0.05 < norm < 1e6
        with torch.no_grad():
            for weight in model.parameters():
                weight.sub_(rate * (0.05 / norm if clip == 0.05 else 1) * weight.grad)
        share = min(ema, (1 + number) / (10 + number))
        average = {name: share * average[name] + (1 - share) * weight for name, weight in model.state_dict().items()}
        # fp32, summed in another order; torch clips to 0.05 / (norm + 1e-6).
        assert trainer.step(number).item() == pytest.approx(loss.item(), rel=1e-5)
        trainer.settle()
        assert trainer.norm == pytest.approx(norm, rel=1e-4)
        torch.testing.assert_close(dict(trainer.model.state_dict()), dict(model.state_dict()), rtol=1e-4, atol=1e-6)
        kept = average if ema else dict(model.state_dict())
        torch.testing.assert_close(dict(trainer.optimizer.weights()), kept, rtol=1e-4, atol=1e-6)
    assert trainer.model.training


def test_the_optimizer_has_the_recipes_settings_and_the_architectures_routers(text_run, tmp_path):
    settings = ("model.name=mudd", "train.router_lr=0.25", "train.weight_decay=0.3", "train.beta1=0.5")
    trainer = made(text_run, tmp_path, *settings, "train.beta2=0.7", "train.lr=0.125")
    assert isinstance(trainer.optimizer.adamw, torch.optim.AdamW)
    matrices, rest, routers = trainer.optimizer.adamw.param_groups
    assert (matrices["weight_decay"], rest["weight_decay"], routers["weight_decay"]) == (0.3, 0, 0)
    assert matrices["betas"] == rest["betas"] == routers["betas"] == (0.5, 0.7)
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    assert {names[p] for p in routers["params"]} == {name for name in names.values() if name.startswith("mixes.")}
    trainer.step(trainer.config.steps - 1)  # the last of a cosine that ends at min_lr = 0.1 of lr
    assert [group["lr"] for group in trainer.optimizer.adamw.param_groups] == pytest.approx(
        [0.0125, 0.0125, 0.0125 / 4]
    )


def fixed_windows(count, context=16):
    """The same windows whatever windows are asked for."""
    ids = torch.randint(0, VOCABULARY, (1, context + 1), generator=torch.Generator().manual_seed(7)).expand(count, -1)
    return SimpleNamespace(batch=lambda first, size: (ids[:size, :-1], ids[:size, 1:]))  # noqa: ARG005


def test_every_step_and_every_part_of_it_has_its_own_dropout_mask_which_seed_and_step_determine(
    text_run, tmp_path, monkeypatch
):
    losses = []

    def noting(logits, targets):
        loss = cross_entropy(logits, targets)
        losses.append(loss.item())
        return loss

    def parts(seed, number):
        """Losses of a step's two parts, with the same weights and windows."""
        trainer = made(text_run, tmp_path, "model.dropout=0.5", "train.accumulation=2", f"train.seed={seed}")
        trainer.model.load_state_dict(redrawn(trainer.model.state_dict(), 1))
        trainer.windows = fixed_windows(2)
        losses.clear()
        trainer.step(number)
        return tuple(losses)

    monkeypatch.setattr(CROSS_ENTROPY, noting)
    torch.manual_seed(1)
    found = [parts(seed=1, number=3), parts(seed=1, number=4), parts(seed=2, number=3)]
    assert len({loss for pair in found for loss in pair}) == 6
    torch.manual_seed(2)
    assert parts(seed=1, number=3) == found[0]
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    parts(seed=2, number=5)
    # torch takes 63 bits; seed and step in this order, so that step 5 of seed 2 is not step 2 of seed 5.
    assert seeds == [plain_key(2, 5) >> 1]


@pytest.mark.parametrize("name", list(registry.MODELS))
def test_dropout_acts_on_the_embedding_and_on_what_every_sublayer_adds(monkeypatch, name):
    from test_models import make

    # The output of a sublayer is linear in its last matrix: dropping all of it equals setting that matrix to zero.
    model = make(name, {}, open_gates=True, dropout=0.25, tied=False, layers=4).train()
    places = ["embedding"]
    sublayers = ("attention", "convolution", "feed_forward") if name == "conv" else ("attention", "feed_forward")
    for layer in range(4):
        places += [f"blocks.{layer}.{sublayer}.out" for sublayer in sublayers]
    ids = torch.randint(0, 37, (2, 12), generator=torch.Generator().manual_seed(1))
    calls = []

    def logits(dropped=None):
        """With the whole input dropped at call number `dropped` of dropout, and nothing at the others."""

        def scripted(x, p, training, inplace):
            calls.append((p, training, inplace))
            return torch.zeros_like(x) if len(calls) - 1 == dropped else x

        calls.clear()
        monkeypatch.setattr(F, "dropout", scripted)
        return model(ids)

    whole = logits()
    assert calls == [(0.25, True, False)] * len(places)
    with torch.no_grad():
        for number, place in enumerate(places):
            found = logits(dropped=number)
            assert not torch.allclose(found, whole)
            weight = model.get_parameter(f"{place}.weight")
            kept = weight.clone()
            weight.zero_()
            torch.testing.assert_close(logits(), found)
            weight.copy_(kept)
    model.eval()
    logits()
    assert {training for _, training, _ in calls} <= {False}


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_validation_loss_is_the_mean_over_windows_that_are_spread_over_the_validation_split(
    text_run, tmp_path, ema
):
    # Dropout of 0.5, and batches of 4, 4 and 3 windows: neither may affect the mean.
    trainer = made(text_run, tmp_path, f"train.ema={ema}", "model.dropout=0.5", "train.eval_windows=11")
    trained = redrawn(trainer.model.state_dict(), 1)
    averaged = redrawn(trained, 2)
    trainer.model.load_state_dict(trained)
    if ema:
        trainer.optimizer.ema.weights = {name: weight.clone() for name, weight in averaged.items()}
    model = copy.deepcopy(trainer.model).eval()
    model.load_state_dict(averaged if ema else trained)
    ids = tokens(text_run, "val")
    fitting = (len(ids) - 1) // 16
    assert fitting > 22
    losses = []
    for index in range(11):
        start = math.floor(index * fitting / 11) * 16
        window = torch.from_numpy(ids[start : start + 17])
        losses.append(F.cross_entropy(model(window[None, :-1])[0], window[1:]).item())
    assert trainer.validation_loss() == pytest.approx(sum(losses) / 11, rel=1e-5)
    assert equal(trainer.model.state_dict(), trained)
    assert trainer.model.training
    assert all(module.training for module in trainer.model.modules())


def test_validation_windows_are_spread_evenly_and_none_overlaps():
    def starts(tokens, count):
        return validation_starts(SimpleNamespace(name="val", tokens=tokens), 10, count)

    assert starts(101, 4) == [0, 20, 50, 70]  # of 10 that fit: 0, 2.5, 5 and 7.5, rounded down
    assert starts(101, 3) == [0, 30, 60]
    assert starts(101, 1) == [0]
    assert starts(101, 64) == list(range(0, 100, 10))
    assert starts(100, 64) == list(range(0, 90, 10))
    assert starts(11, 2) == [0]
    with pytest.raises(UsageError, match="the val split has 10 tokens, too few for a context of 10"):
        starts(10, 2)


def test_run_pt_holds_the_ema_weights_and_resume_pt_holds_both(text_run, tmp_path):
    trainer = made(text_run, tmp_path, "train.ema=0.5")
    trained = redrawn(trainer.model.state_dict(), 1)
    averaged = redrawn(trained, 2)
    trainer.model.load_state_dict(trained)
    trainer.optimizer.ema.weights = averaged
    trainer.validate()
    assert equal(checkpoint.load(tmp_path / "run.pt")["model"], averaged)
    trainer.save()
    state = checkpoint.load(tmp_path / "resume.pt")
    assert equal(state["model"], trained)
    assert equal(state["average"], averaged)
    again = made(text_run, tmp_path, "train.ema=0.5")
    again.load_state(state)
    assert equal(again.model.state_dict(), trained)
    assert equal(again.optimizer.ema.weights, averaged)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_that_of_the_recipe_in_training_and_validation(text_run, tmp_path, monkeypatch, precision):
    trainer = made(text_run, tmp_path, f"train.precision={precision}")
    seen = []
    product = bf16.plain_product
    monkeypatch.setattr(bf16, "product", lambda *x: seen.append(torch.is_grad_enabled()) or product(*x))
    trainer.step(0)
    trainer.validation_loss()
    assert set(seen) == ({True, False} if precision == "bf16" else set())


@pytest.mark.parametrize(("wanted", "chosen"), [("fp32", "fp32"), ("auto", "bf16"), ("bf16", "bf16")])
def test_auto_is_bf16_on_cuda(text_run, tmp_path, monkeypatch, wanted, chosen):
    moved = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: moved.append(device) or self)
    trainer = Trainer(tiny(text_run, f"train.precision={wanted}"), tmp_path, "cuda:1", quiet)
    assert trainer.precision == chosen
    assert moved == ["cuda:1"]


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True)])
def test_auto_is_bf16_on_a_cpu_with_instructions_for_it(text_run, monkeypatch, avx512, amx):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    for wanted, device, chosen in (
        ("auto", "cpu", "bf16" if avx512 or amx else "fp32"),
        ("auto", "mps", "fp32"),
        ("fp32", "cpu", "fp32"),
        ("bf16", "cpu", "bf16"),
    ):
        assert precision.choose(tiny(text_run, f"train.precision={wanted}"), device) == chosen


def test_a_resumed_run_keeps_the_precision_that_was_chosen(text_run, tmp_path, monkeypatch):
    """Also if it is extended."""
    short, long = (tiny(text_run, "train.precision=auto", "train.schedule=wsd", f"train.steps={n}") for n in (8, 12))
    monkeypatch.setattr(precision, "choose", lambda *_: "bf16")
    for resolved in (short, long):
        go(resolved, tmp_path / f"whole-{resolved.train.steps}")
    with pytest.raises(Interrupted):
        go(short, tmp_path / "parts", stop_after(5))
    monkeypatch.setattr(precision, "choose", lambda *_: "fp32")  # of another version, or on another device
    for resolved in (short, long):
        go(resolved, tmp_path / "parts", extend=resolved is long)
        for name in ("run.pt", "resume.pt"):
            found, whole = (
                checkpoint.load(tmp_path / folder / name) for folder in ("parts", f"whole-{resolved.train.steps}")
            )
            assert found["precision"] == whole["precision"] == "bf16"
            assert equal(found["model"], whole["model"])


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ({"precision": "bf16"}, "bf16"),
        ({"precision": "fp32"}, "fp32"),
        # Of earlier versions, which named none.
        ({"wanted": "bf16"}, "bf16"),
        ({"wanted": "auto"}, "fp32"),
        ({"wanted": "auto", "conditions": [{"device": "cpu"}]}, "fp32"),
        ({"wanted": "auto", "conditions": [{"device": "cpu"}, {"device": "NVIDIA H100"}]}, "bf16"),
        ({"wanted": "auto", "conditions": "all"}, "fp32"),
        ({"wanted": "auto", "conditions": [1]}, "fp32"),
    ],
)
def test_the_precision_of_a_file(written, found):
    recipe = {"train": {"precision": written.pop("wanted", "auto")}}
    assert precision.of({"recipe": recipe, **written}) == found


def test_a_file_of_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="a precision of 'fp8'"):
        precision.of({"precision": "fp8", "recipe": {"train": {"precision": "fp32"}}})


def test_a_device_may_have_a_number(text_run, tmp_path):
    trainer, plain = Trainer(tiny(text_run), tmp_path, "cpu:0", quiet), made(text_run, tmp_path)
    assert trainer.step(0) == plain.step(0)
    assert trainer.validation_loss() == plain.validation_loss()


@pytest.mark.parametrize("wanted", [False, True])
def test_compile_and_deterministic_do_what_the_recipe_says(text_run, tmp_path, monkeypatch, wanted):
    made_of, called, chosen = [], [], []

    def compiled(nats, mode):
        made_of.append(nats)
        return lambda x, y: called.append((len(x), len(y))) or nats(x, y)

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", chosen.append)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    flag = str(wanted).lower()
    go(tiny(text_run, "train.steps=1", "train.warmup=1", f"train.compile={flag}"), tmp_path / "compiled")
    assert len(made_of) == wanted
    assert called == [(4, 4)] * wanted
    assert (chosen, "CUBLAS_WORKSPACE_CONFIG" in os.environ) == ([], False)
    go(tiny(text_run, "train.steps=1", "train.warmup=1", f"train.deterministic={flag}"), tmp_path / "deterministic")
    assert chosen == [True] * wanted
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_model_and_loss_are_compiled_into_one_graph_of_the_same_numbers(text_run, tmp_path, monkeypatch, precision):
    whole = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)
    losses = []
    for flag in ("false", "true"):
        trainer = made(text_run, tmp_path, f"train.compile={flag}", f"train.precision={precision}")
        losses.append([trainer.step(number).item() for number in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if precision == "fp32" else 1e-3)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
@pytest.mark.parametrize("writes", ["write_log", "validate", "save", "save_result"])
def test_a_loss_or_a_gradient_that_is_not_finite_gets_into_no_file(
    text_run, tmp_path, monkeypatch, broken, clip, writes
):
    breaking = False

    def breaks(logits, targets):
        # An infinite loss with a finite gradient; or a finite loss with a gradient of 0 / 0.
        change = math.inf if broken == "loss" else (logits.sum() * 0).sqrt()
        return cross_entropy(logits, targets) + change * breaking if breaking else cross_entropy(logits, targets)

    monkeypatch.setattr(CROSS_ENTROPY, breaks)
    trainer = made(text_run, tmp_path, f"train.clip={clip}", "train.ema=0.5")

    def take():
        trainer.state.pending.append(trainer.step(trainer.state.step))
        trainer.state.step += 1

    for _ in range(4):
        take()
    trainer.save()
    trainer.save_result()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    take()
    breaking = True
    take()
    breaking = False
    take()  # with weights that are not numbers, if the gradient was none
    found = r"loss inf, norm \d+\.\d+" if broken == "loss" else r"loss \d\.\d+, norm nan"
    with pytest.raises(ShortcutError, match=rf"not finite at step 6 \({found}\)"):
        getattr(trainer, writes)()
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_losses_are_read_now_and_then_and_before_a_state_is_saved(text_run, tmp_path, monkeypatch):
    """At most MOST_UNREAD steps after one that is not finite, the run stops."""
    monkeypatch.setattr("shortcut_cli.training.trainer.MOST_UNREAD", 3)
    trainer = made(text_run, tmp_path)
    for number in range(8):
        trainer.state.pending.append(trainer.step(number))
        trainer.state.step += 1
    read = [isinstance(loss, float) for loss in trainer.state.pending]
    assert read == [True] * 6 + [False] * 2
    trainer.save()
    assert all(isinstance(loss, float) for loss in trainer.state.pending)
    assert checkpoint.load(tmp_path / "resume.pt")["state"]["pending"] == trainer.state.pending


def test_a_line_of_the_log_summarises_the_steps_since_the_last_one(text_run, tmp_path, monkeypatch):
    said = []
    settings = ("train.steps=100", "train.warmup=10", "train.lr=0.5")
    trainer = Trainer(tiny(text_run, *settings), tmp_path, "cpu", said.append)
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    trainer.began, trainer.norm = 991.8766, 2.5
    trainer.state.step, trainer.state.pending = 4, [1.0, 2.0, 6.0]
    trainer.write_log()
    # Step 4 of 10 of warm-up; 4 steps of 4 windows of 16 tokens.
    line = {"step": 4, "loss": 3.0, "lr": 0.2, "gradient_norm": 2.5, "tokens": 256, "seconds": 8.123}
    assert log_lines(tmp_path) == [line]
    epochs = 256 / trainer.shards.split("train").tokens
    progress = {"loss": 3.0, "loss_unit": "nats per token", "epochs": epochs, "tokens": 256}
    progress |= {"seconds": 1000.0 - 991.8766}
    assert said == [Progress(task="train", done=4, total=100, unit="steps", **progress)]
    assert trainer.state.pending == []


def test_a_run_begins_with_nothing_done():
    assert vars(State()) == {
        "step": 0,
        "best": math.inf,
        "best_step": None,
        "seconds": 0.0,
        "pending": [],
        "conditions": [],
    }


def test_a_state_keeps_time_best_and_pending_losses(text_run, tmp_path, monkeypatch):
    trainer = made(text_run, tmp_path)
    trainer.step(0)
    trainer.state = State(step=7, best=0.5, seconds=1.0, pending=[1.5, 2.5])
    trainer.began = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: 142.0)
    trainer.save()
    again = made(text_run, tmp_path)
    again.load_state(checkpoint.load(tmp_path / "resume.pt"))
    assert again.state == State(step=7, best=0.5, seconds=42.0, pending=[1.5, 2.5])
    for old, new in zip(trainer.optimizer.adamw.state.values(), again.optimizer.adamw.state.values(), strict=True):
        assert equal(old, new)


def test_a_run_says_what_it_was_made_of(text_run, tmp_path):
    resolved = tiny(text_run, "train.steps=2", "train.warmup=1")
    summary = go(resolved, tmp_path)
    manifest = json.loads((text_run / "shards" / "manifest.json").read_text())
    for name in ("run.pt", "resume.pt"):
        content = checkpoint.load(tmp_path / name)
        assert content["recipe"] == resolved.model_dump()
        assert content["shards"] == manifest["checksum"]
        assert content["vocabulary"] == VOCABULARY
        assert content["tokenizer"]["fingerprint"] == manifest["tokenizer"]["fingerprint"]
        assert {name: bytes(packed.numpy()) for name, packed in content["tokenizer"]["files"].items()} == {
            path.name: path.read_bytes() for path in (text_run / "shards" / "tokenizer").iterdir()
        }
        assert content["scores"]["validation"] == summary["validation_nats_per_token"]
        assert content["versions"]["torch"] == torch.__version__
    assert reading.read(str(tmp_path / "recipe.toml")) == resolved
    assert summary["run"] == str(tmp_path / "run.pt")
    assert summary["worked"] is True
    assert summary["parameters"]["total"] == VOCABULARY * 8 + (4 * 64 + 2 * 8 * 16 + 2 * 8) + 8


@pytest.mark.parametrize("compiles", [False, True])
def test_the_first_note_counts_parameters_operations_and_epochs(compiles):
    trainer = SimpleNamespace(
        model=SimpleNamespace(
            count=lambda: {"total": 12345, "non_embedding": 2345},
            training_flops_per_token=lambda context: 15e6 / 16 * context,
        ),
        recipe=SimpleNamespace(model=SimpleNamespace(name="gpt", context=16)),
        windows=SimpleNamespace(split=SimpleNamespace(tokens=6400)),
        config=SimpleNamespace(steps=200, batch_size=4),
        lineage={},
        precision="bf16",
        compiles=compiles,
    )
    computed = "in bf16, compiled" if compiles else "in bf16"
    assert Trainer.describe(trainer) == (
        f"gpt: 12,345 parameters (2,345 non-embedding), 15.0 training MFLOPs per token {computed}; "
        "6,400 training tokens, 2.00 epochs"
    )


def test_starting_from_scratch_leaves_nothing_of_the_previous_run(text_run, tmp_path):
    for name in ("log.jsonl", "run.pt", "resume.pt", "resume.prev.pt"):
        (tmp_path / name).write_text("of the run before")
    (tmp_path / files.MARKER).write_text("shortcut train\n")
    with pytest.raises(Interrupted):
        go(tiny(text_run), tmp_path, stop_after(1), resume="never")
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert left == {"recipe.toml", "resume.pt"}
    assert checkpoint.load(tmp_path / "resume.pt")["step"] == 1


def test_a_finished_run_is_not_worked_and_a_resumed_one_is(text_run, tmp_path):
    notes = []

    def report(event):
        if isinstance(event, Note):
            notes.append(event.text)

    resolved = tiny(text_run)
    with pytest.raises(Interrupted):
        go(resolved, tmp_path, stop_after(11), report=report)
    first = go(resolved, tmp_path, report=report)
    assert first["worked"] is True
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 13, "by": "somebody else"}\n')  # the log of a finished run is not cut
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    again = go(resolved, tmp_path, report=report)
    assert again == first | {"worked": False}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert notes[1:] == ["resuming at step 11", "this run is already finished"]


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("damage", ["missing", "damaged", "empty", "zeros"])
def test_the_result_of_a_finished_run_is_checked_and_made_again_from_its_state(text_run, tmp_path, damage, ema):
    recipe, path = tiny(text_run, f"train.ema={ema}"), tmp_path / "run.pt"
    go(recipe, tmp_path)
    state = checkpoint.load(tmp_path / "resume.pt")
    whole = path.read_bytes()
    assert checkpoint.load(path)["step"] == state["state"]["best_step"]
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1

    def spoil():
        kinds = {"damaged": changed, "empty": b"", "zeros": bytes(len(whole))}
        path.unlink() if damage == "missing" else path.write_bytes(kinds[damage])

    for best_step in (8, None):  # the best weights were not those of the last step, or that is not known
        checkpoint.save(tmp_path / "resume.pt", state | {"state": state["state"] | {"best_step": best_step}})
        spoil()
        with pytest.raises(CheckFailed, match=r"resume\.pt does not hold its weights") as refused:
            go(recipe, tmp_path)
        assert "--resume never" in refused.value.hint
        path.write_bytes(whole)
    last = state["step"]
    checkpoint.save(tmp_path / "resume.pt", state | {"state": state["state"] | {"best_step": last}})
    spoil()
    notes = []
    assert go(recipe, tmp_path, report=lambda event: notes.append(event.text))["worked"] is False
    assert any("made again from resume.pt" in note for note in notes)
    if state["state"]["best_step"] == last:
        assert path.read_bytes() == whole
    assert (tmp_path / "run.damaged.pt").exists() == (damage != "missing")


def test_files_of_the_user_are_left_alone(text_run, tmp_path):
    """A recipe and a log of one's own, with or without the .lock of another program; no folder is made in vain."""
    mine = {"recipe.toml": "mine", "log.jsonl": "mine", ".lock": "of another program"}
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
        for resume in ("auto", "never"):
            with pytest.raises(UsageError, match="is not empty, and was not made by `shortcut train`"):
                go(tiny(text_run), tmp_path, resume=resume)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == mine
    with pytest.raises(UsageError, match="too few for a context"):
        go(tiny(text_run, "model.context=100000"), tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_the_summary_of_a_finished_run_is_that_of_its_state(text_run, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 8000.0)
    trainer = made(text_run, tmp_path)
    trainer.state = State(step=12, best=0.25)
    trainer.began = 8000.0 - 7234.56
    trainer.save()
    with pytest.raises(CheckFailed, match=r"run\.pt is missing; resume\.pt does not hold its weights"):
        go(tiny(text_run), tmp_path)
    checkpoint.save(tmp_path / "run.pt", trainer.content(trainer.model.state_dict()))
    assert go(tiny(text_run), tmp_path) == {
        "run": str(tmp_path / "run.pt"),
        "worked": False,
        "step": 12,
        "validation_nats_per_token": 0.25,
        "parameters": trainer.model.count(),
        "seconds": 7234.6,
        "lineage": {},
    }


def test_a_folder_that_another_training_holds_is_refused(text_run, tmp_path):
    with files.held(tmp_path, "shortcut a"), pytest.raises(UsageError, match="is in use: shortcut a"):
        go(tiny(text_run), tmp_path)


@pytest.mark.parametrize("broken", ["model", "optimizer", "average", "state", "step"])
def test_a_state_that_lacks_a_part_is_refused(text_run, tmp_path, broken):
    trainer = made(text_run, tmp_path, "train.ema=0.5")
    trainer.save()
    state = checkpoint.load(tmp_path / "resume.pt")
    without = {name: part for name, part in state.items() if name != broken}
    for content in (without, state | {broken: None}, state | {broken: torch.ones(3)}):
        if broken != "step" or "step" not in content:
            with pytest.raises(CheckFailed, match="is not a state of this run"):
                loop.resume(trainer, content)


class Changed(Trainer):
    """A trainer of a recipe on shards with a checksum, without model or data, whose saved run is finished."""

    def __init__(self, recipe, folder, checksum):
        self.recipe, self.config, self.folder = recipe, recipe.train, folder
        self.shards = SimpleNamespace(manifest={"checksum": checksum})
        self.lineage = {}

    def load_state(self, content):
        self.state = State(step=self.config.steps if content else 0)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("model.rope_base=500.0", "model.rope_base: 10000.0 -> 500.0"),
        ("model.name=mudd", "model.name: 'gpt' -> 'mudd'"),
        ("train.seed=3", "train.seed: 1 -> 3"),
        ("train.steps=99", "train.steps: 12 -> 99"),
        ("train.eval_every=3", "train.eval_every: 4 -> 3"),  # it decides which weights run.pt keeps
        ("data.val=0.2", ""),  # what it does to the weights, it does through the shards
        ("tokenizer.alphabet=abc", ""),
        ("model.shortcut.map_width=8", ""),  # of another architecture
        ("train.log_every=3", ""),
        ("eval.resamples=7", ""),
        ("sample.seed=2", ""),
        ("data.shards=elsewhere", ""),  # the same shards may have moved
    ],
)
def test_a_change_of_a_key_that_determines_the_weights_is_refused(text_run, tmp_path, setting, line):
    saved = {"recipe": tiny(text_run).model_dump(), "shards": "a" * 64}
    if not line:
        loop.resume(Changed(tiny(text_run, setting), tmp_path, "a" * 64), saved)
        return
    with pytest.raises(UsageError) as refused:
        loop.resume(Changed(tiny(text_run, setting), tmp_path, "a" * 64), saved)
    assert f"holds a different run\n  {line}" in refused.value.message
    assert refused.value.message.count("\n") == 1
    assert "--resume never" in refused.value.hint


def other_value(tree, key):
    """A valid value of a key that is not the one that it has; None if this test knows none."""
    value = tree
    for part in key.split("."):
        value = value[part]
    known = {"eval.split": "val", "data.split": "contiguous", "model.shortcut.taps": "all", "eval.stride": 4}
    known |= {"model.shortcut.map": "linear", "train.tensorboard": None, "data.shards": None, "sample.top_p": 0.5}
    if key in known or isinstance(value, (str, list, dict)):
        return known.get(key)
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 0.3


def binds(tree, key):
    changed = copy.deepcopy(tree)
    table = changed
    *sections, name = key.split(".")
    for section in sections:
        table = table[section]
    table[name] = "changed"
    return schema.binding(changed) != schema.binding(tree)


def test_keys_that_do_not_bind_a_run_leave_its_weights_equal(text_run, tmp_path):
    """All of them at once: one that is wrongly free would change the bytes."""
    resolved = tiny(text_run, "model.dropout=0.1")
    tree = resolved.model_dump()
    keys = [key for key in schema.keys() if not key.startswith("tokenizer.")]  # noqa: SIM118 - these determine shards
    free = {key: value for key in keys if not binds(tree, key) and (value := other_value(tree, key)) is not None}
    assert len(free) > 20
    assert {"sample.temperature", "eval.stride", "train.log_every", "data.val", "model.hyper.streams"} <= free.keys()
    go(resolved, tmp_path / "one")
    settings = [f"{key}={str(value).lower()}" for key, value in free.items()]
    go(reading.with_settings(resolved, settings), tmp_path / "other")
    for name in ("run.pt", "resume.pt"):
        assert weights_hash(tmp_path / "one", name) == weights_hash(tmp_path / "other", name)


def test_a_run_goes_on_with_other_keys_that_do_not_determine_its_weights(text_run, tmp_path):
    """Unfinished, it takes them over; finished, it is left alone."""
    resolved = tiny(text_run)
    changed = reading.with_settings(resolved, ["train.log_every=3", "sample.temperature=0.5", "eval.stride=4"])
    go(resolved, tmp_path / "whole")
    with pytest.raises(Interrupted):
        go(resolved, tmp_path / "parts", stop_after(5))
    go(changed, tmp_path / "parts")
    assert weights_hash(tmp_path / "parts", "run.pt") == weights_hash(tmp_path / "whole", "run.pt")
    assert reading.read(str(tmp_path / "parts" / "recipe.toml")) == changed
    assert checkpoint.load(tmp_path / "parts" / "run.pt")["recipe"] == changed.model_dump()
    before = {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
    assert go(resolved, tmp_path / "parts")["worked"] is False
    assert {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()} == before


def test_a_run_pt_of_another_run_in_a_finished_folder_is_refused(text_run, tmp_path):
    go(tiny(text_run), tmp_path / "a")
    go(tiny(text_run, "train.seed=3"), tmp_path / "b")
    (tmp_path / "a" / "run.pt").write_bytes((tmp_path / "b" / "run.pt").read_bytes())
    with pytest.raises(UsageError, match=r"a/run\.pt holds a different run\n  train\.seed: 3 -> 1$"):
        go(tiny(text_run), tmp_path / "a")


def test_other_shards_are_refused(text_run, tmp_path):
    saved = {"recipe": tiny(text_run).model_dump(), "shards": "a" * 64}
    with pytest.raises(UsageError, match=r"a different run\n  shards: aaaaaaaaaaaa -> bbbbbbbbbbbb$"):
        loop.resume(Changed(tiny(text_run), tmp_path, "b" * 64), saved)


class Scripted:
    """A trainer that only records what it is asked to do."""

    def __init__(self, steps, log_every, eval_every, **state):
        self.config = SimpleNamespace(steps=steps, log_every=log_every, eval_every=eval_every)
        self.state = State(**state)
        self.folder, self.calls = Path("runs/x"), []
        self.task, self.said = "train", []
        self.report = self.said.append

    def step(self, number):
        self.calls.append(f"step({number})")
        return float(number)

    def write_log(self):
        self.calls.append(f"log at {self.state.step} of {self.state.pending}")
        self.state.pending = []

    def validate(self):
        self.calls.append(f"validate at {self.state.step}")

    def save(self):
        self.calls.append(f"save at {self.state.step}")

    def saved_all(self):
        self.calls.append("saved")


def test_the_loop_steps_logs_validates_and_saves_in_turn(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 500.0)
    trainer = Scripted(7, 3, 2, step=1, pending=[0.0], seconds=60.0)
    asked = []
    loop.run(trainer, lambda: asked.append(trainer.state.step) or (9 if trainer.state.step == 7 else None))
    assert trainer.calls == [
        *("step(1)", "validate at 2", "save at 2"),
        *("step(2)", "log at 3 of [0.0, 1.0, 2.0]"),
        *("step(3)", "validate at 4", "save at 4"),
        "step(4)",
        *("step(5)", "log at 6 of [3.0, 4.0, 5.0]", "validate at 6", "save at 6"),
        *("step(6)", "log at 7 of [6.0]", "validate at 7", "save at 7", "saved"),
    ]
    # What is logged is reported there; every other step has an event of its own, so that a bar moves at each.
    assert [(event.task, event.done, event.total) for event in trainer.said] == [
        ("train", 2, 7),
        ("train", 4, 7),
        ("train", 5, 7),
    ]
    assert asked == [2, 3, 4, 5, 6, 7]  # asked to leave after the last step, there is nothing left to interrupt
    assert trainer.began == 440.0
    trainer.calls.clear()
    loop.run(trainer, lambda: 9)
    assert trainer.calls == []


@pytest.mark.parametrize("code", [75, 130, 0])
def test_the_loop_saves_and_leaves_with_the_code_that_it_is_given(code):
    trainer = Scripted(7, 10, 10)
    with pytest.raises(Interrupted, match="stopped at step 3 of 7; the state is saved in runs/x") as left:
        loop.run(trainer, lambda: code if trainer.state.step == 3 else None)
    assert left.value.exit_code == code
    assert trainer.calls == ["step(0)", "step(1)", "step(2)", "save at 3", "saved"]
    assert trainer.state.pending == [0.0, 1.0, 2.0]


def test_a_model_that_no_machine_has_room_for_is_refused_before_it_is_made(text_run, tmp_path):
    path = tmp_path / "huge" / "manifest.json"
    shutil.copytree(text_run / "shards", path.parent)
    manifest = json.loads(path.read_text())
    manifest["tokenizer"]["vocabulary"] = 2**31
    path.write_text(json.dumps(manifest | {"checksum": shards._checksum(manifest)}))
    made = reading.read("text-tiny", [*TEXT_SETTINGS, f"data.shards={path.parent}"])
    with pytest.raises(UsageError, match="with a vocabulary of 2,147,483,648, and their gradients take"):
        Trainer(made, tmp_path / "run", "cpu", quiet)


def test_a_cut_log_keeps_whole_lines_up_to_its_step(tmp_path):
    log = run_log.Log(tmp_path, tensorboard=False)
    log.cut(3)
    assert list(run_log.read_log(tmp_path)) == []
    for step in (1, 2, 2, 3):
        log.write(step=step, loss=step / 2)
    with open(log.path, "a") as stream:
        stream.write('{"step": 1}')  # complete except for the newline
    log.cut(2)
    assert log.path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n'
    log.write(step=3, validation=4.0)
    assert list(run_log.read_log(tmp_path)) == [
        *({"step": step, "loss": step / 2} for step in (1, 2, 2)),
        {"step": 3, "validation": 4.0},
    ]


def test_tensorboard_gets_every_value_at_its_step(text_run, tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, *arguments):
            written.append(arguments)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    run_log.Log(tmp_path, tensorboard=False).write(step=1, loss=9.0)
    assert written == []
    made(text_run, tmp_path, "train.tensorboard=true").log.write(step=4, loss=0.5, lr=0.25)
    assert written == [tmp_path / "tensorboard", ("loss", 0.5, 4), ("lr", 0.25, 4)]
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 4]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(Unavailable, match=r"train\.tensorboard needs TensorBoard"):
        run_log.Log(tmp_path, tensorboard=True)


GOOD, BAD, ABSENT = "good", "bad", None
CASES = [  # resume.pt, resume.prev.pt, the result -> what the run continues from, notes
    (ABSENT, ABSENT, ABSENT, None, 0),
    (GOOD, ABSENT, ABSENT, "resume.pt", 0),
    (GOOD, GOOD, GOOD, "resume.pt", 0),
    (GOOD, BAD, ABSENT, "resume.pt", 0),
    (BAD, GOOD, GOOD, "resume.prev.pt", 1),
    (ABSENT, GOOD, ABSENT, "resume.prev.pt", 0),
    (BAD, BAD, GOOD, CheckFailed, 1),
    (BAD, ABSENT, ABSENT, CheckFailed, 0),
    (ABSENT, BAD, ABSENT, CheckFailed, 0),
    (ABSENT, ABSENT, GOOD, UsageError, 0),
]


@pytest.mark.parametrize("kind", [CheckFailed, UsageError])
@pytest.mark.parametrize(("state", "previous", "result", "expected", "count"), CASES)
def test_what_a_run_continues_from(tmp_path, kind, state, previous, result, expected, count):
    for name, content in (("resume.pt", state), ("resume.prev.pt", previous), ("codec.pt", result)):
        if content:
            (tmp_path / name).write_text(content)
    notes = []

    def load(path):
        if path.read_text() == BAD:
            raise kind(f"{path.name} is damaged")
        return path.name

    def begun(resume):
        return loop.saved_state(tmp_path, "codec.pt", resume, notes.append, load)

    if expected in (CheckFailed, UsageError):
        with pytest.raises(ShortcutError) as refused:
            begun("auto")
        assert type(refused.value) is expected
        assert "--resume never" in refused.value.hint
    else:
        assert begun("auto") == expected
    said = [Note("resume.pt is damaged; continuing from the state before it, resume.prev.pt")]
    assert notes == said * count
    assert begun("never") is None
    assert notes == said * count


def test_nothing_is_refused_if_nothing_changed(tmp_path):
    restored, changes = [], []
    trainer = Scripted(7, 10, 10, step=7)
    trainer.folder, trainer.changes, trainer.load_state = tmp_path, lambda _: changes, restored.append
    loop.resume(trainer, {"step": 7})
    assert restored == [{"step": 7}]
    changes += ["a: 1 -> 2", "b: 3 -> 4"]
    with pytest.raises(UsageError, match=r"holds a different run\n  a: 1 -> 2\n  b: 3 -> 4$"):
        loop.resume(trainer, {"step": 7})
    assert len(restored) == 1


@pytest.mark.parametrize("content", [["not", "a", "dictionary"], {"recipe": {}}])
def test_a_file_that_is_no_state_is_refused(text_run, tmp_path, content):
    with pytest.raises(CheckFailed, match="is not a state of this run"):
        loop.resume(Changed(tiny(text_run), tmp_path, "a" * 64), content)


@pytest.mark.parametrize("wanted", ["bf16", "fp32"])
def test_muon_multiplies_in_the_precision_of_the_run(text_run, tmp_path, monkeypatch, wanted):
    seen = []
    whole = muon.orthogonalise
    monkeypatch.setattr(muon, "orthogonalise", lambda x: seen.append(bf16.wanted(x)) or whole(x))
    made(text_run, tmp_path, f"train.precision={wanted}", "train.optimizer=muon").step(0)
    assert seen
    assert set(seen) == {wanted == "bf16"}


@pytest.mark.parametrize(("saved", "said"), [(False, "no state was saved yet in"), (True, "state is kept in")])
def test_a_divergence_says_whether_a_state_was_saved(tmp_path, saved, said):
    if saved:
        (tmp_path / "resume.pt").touch()
    with pytest.raises(Diverged, match=f"at step 3 .loss nan.; .*{said} {tmp_path}"):
        loop.check_finite(2, {"loss": math.nan}, tmp_path)


def test_validations_have_the_seconds_of_their_step():
    """On straight lines through (0, 0 s), (10, 1 s), (20, 3 s) and (24, 4 s)."""
    lines = [
        {"step": 4, "validation": 5.0},
        {"step": 10, "loss": 4.0, "seconds": 1.0},
        {"step": 12, "validation": 4.0},
        {"step": 20, "loss": 3.0, "seconds": 3.0},
        {"step": 20, "validation": 3.0},
        {"step": 24, "validation": 2.0},
        {"step": 24, "loss": 2.0, "seconds": 4.0},
        {"step": 30, "validation": 1.0},
    ]
    found = [(one["step"], one["validation"], one["seconds"]) for one in run_log.timed(lines)]
    expected = [(4, 5.0, 0.4), (12, 4.0, 1.4), (20, 3.0, 3.0), (24, 2.0, 4.0), (30, 1.0, 4.0)]
    assert found == [pytest.approx(one) for one in expected]
    many = [{"step": n, "validation": 1.0} for n in range(run_log.MOST_WAITING + 5)]
    assert [one["step"] for one in run_log.timed(many)] == [*range(run_log.MOST_WAITING + 5)]


def test_what_is_saved_stays_what_it_was_while_steps_go_on(text_run, tmp_path):
    """Divided states are written while the next steps are taken: their losses are not of the state."""
    trainer = made(text_run, tmp_path / "saved", "train.steps=4", "train.warmup=1", "train.log_every=3")
    trainer.state.pending.append(trainer.step(0))
    trainer.state.step = 1
    content = trainer.saved()
    kept = {"pending": [*content["state"]["pending"]], "conditions": [*content["conditions"]]}
    assert len(kept["pending"]) == 1
    trainer.state.pending.append(trainer.step(1))
    trainer.state.conditions.append({"device": "other"})
    assert content["state"]["pending"] == kept["pending"]
    assert content["conditions"] == kept["conditions"]
