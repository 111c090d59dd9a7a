"""On a real GPU, where there is one: its numbers against the CPU's, steps that never wait, runs that go on to the bit.

tests/test_fake_device.py checks shapes, devices and kernels without one.
"""

import copy
import json

import pytest
import torch
from conftest import TEXT_SETTINGS, quiet, shortcut
from test_models import ARMS, make
from test_training import SMALL, config, tiny, weights_hash

from shortcut_cli.models.loss import loss
from shortcut_cli.training import precision
from shortcut_cli.training.optim import Optimizer
from shortcut_cli.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
CUDA, CONTEXT = "cuda", 24


def drawn(rows=2, times=CONTEXT):
    return torch.randint(0, 37, (rows, times), generator=torch.Generator().manual_seed(3))


def apart(a, b):
    """Distance of b from a, relative to the length of a."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / a.norm().clamp(min=1e-12)).item()


def passed(model, ids, wanted, device):
    """Logits, and all gradients in one row, of a copy of the model on a device."""
    model, ids = copy.deepcopy(model).to(device), ids.to(device)
    with precision.products(wanted, device):
        logits = model(ids)
    loss(logits, ids).backward()
    return logits, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(("name", "options"), ARMS)
def test_every_arm_has_the_cpus_logits_and_gradients(name, options):
    """In bf16 the two devices round in different places: each is about as far from fp32 as the other."""
    model, ids = make(name, options, open_gates=True), drawn()
    wide, narrow = (passed(model, ids, wanted, "cpu") for wanted in ("fp32", "bf16"))
    there = {wanted: passed(model, ids, wanted, CUDA) for wanted in ("fp32", "bf16")}
    for number in range(2):
        assert apart(wide[number], there["fp32"][number]) < 1e-4
        assert apart(wide[number], there["bf16"][number]) < 2 * apart(wide[number], narrow[number])


@pytest.mark.parametrize(("name", "options"), ARMS)
def test_the_cache_of_every_arm_gives_the_whole_pass(name, options):
    model, ids = make(name, options, open_gates=True).to(CUDA).eval(), drawn().to(CUDA)
    with torch.no_grad():
        whole, cache = model(ids), model.new_cache(2, CONTEXT)
        parts = [model(part, cache) for part in ids.split([9, 7] + [1] * (CONTEXT - 16), 1)]
    assert apart(whole, torch.cat(parts, 1)) < 1e-4


@pytest.mark.parametrize(("name", "options"), ARMS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_step_of_any_arm_waits_for_the_device(name, options, optimizer, text_run):
    model, ids = make(name, options, dropout=0.1).to(CUDA), drawn().to(CUDA)
    train = tiny(text_run, f"train.optimizer={optimizer}", "train.ema=0.9").train
    made = Optimizer(model, train, model.routers(), 1.0, model.matrices() if optimizer == "muon" else {})

    def step(number):
        with precision.products("bf16", CUDA):
            logits = model(ids)
        loss(logits, ids).backward()
        made.clip()
        made.step(number)

    step(0)  # allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_steps_of_a_trainer_never_wait(text_run, tmp_path):
    trainer = Trainer(config(text_run, *SMALL, "train.batch_size=4"), tmp_path, CUDA, quiet)
    trainer.step(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(1, 5):
            trainer.step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.settle()
    assert trainer.precision == "bf16"


@pytest.mark.parametrize("name", ["gpt", "shortcut"])
def test_attention_runs_in_the_flash_kernel(name):
    """In training, forward and backward, without a product over all pairs."""
    model, ids = make(name, {}, width=128, heads=2, ffn=256, context=256).to(CUDA), drawn(4, 256).to(CUDA)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        with precision.products("bf16", CUDA):
            logits = model(ids)
        loss(logits, ids).backward()
        torch.cuda.synchronize()
    kernels = {event.key.lower() for event in profile.key_averages()}
    backward = {kernel for kernel in kernels if "flash" in kernel and ("bwd" in kernel or "bprop" in kernel)}
    assert backward, sorted(kernels)  # PyTorch's own kernel, or cuDNN's
    assert any("flash" in kernel for kernel in kernels - backward), sorted(kernels)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("name", ["gpt", "shortcut", "mudd"])
def test_a_run_goes_on_to_the_bit(name, optimizer, text_run, tmp_path):
    """Of a run that stops after step 9 and goes on, the weights are those of one that never stopped."""
    settings = [*TEXT_SETTINGS, *SMALL, f"data.shards={text_run / 'shards'}", f"model.name={name}"]
    settings += [f"train.optimizer={optimizer}", "train.deterministic=true", "train.schedule=constant"]
    settings += ["train.batch_size=4", "train.eval_every=7", "model.dropout=0.1"]

    def train(folder, steps, *more):
        asked = ["train", "--recipe", "text-tiny", "--out", tmp_path / folder, "--device", CUDA, *more]
        for setting in [*settings, f"train.steps={steps}"]:
            asked += ["--set", setting]
        shortcut(*asked, cwd=tmp_path, fresh=True)

    train("whole", 20)
    train("parts", 9)
    train("parts", 9, "--extend", 20)
    assert weights_hash(tmp_path / "parts") == weights_hash(tmp_path / "whole")


def test_a_run_of_a_gpu_is_scored_the_same_on_a_cpu(text_run, tmp_path):
    asked = ["train", "--recipe", "text-tiny", "--out", tmp_path / "run", "--device", CUDA]
    for setting in [*TEXT_SETTINGS, *SMALL, f"data.shards={text_run / 'shards'}", "train.steps=20"]:
        asked += ["--set", setting]
    shortcut(*asked, cwd=tmp_path, fresh=True)
    found = []
    for device in (CUDA, "cpu"):
        said = shortcut("eval", "--ckpt", tmp_path / "run", "--device", device, "--json", cwd=tmp_path, fresh=True)
        found.append(json.loads(said.stdout)["nats_per_token"])
    assert found[0] == pytest.approx(found[1], rel=1e-2)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # of torch 2.11 itself
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["gpt", "shortcut"])
def test_a_compiled_step_is_the_same_step(name, accumulation, text_run, tmp_path):
    losses = []
    for compiled in ("false", "true"):
        settings = [f"model.name={name}", f"train.compile={compiled}", "train.precision=fp32", "train.batch_size=4"]
        settings.append(f"train.accumulation={accumulation}")
        trainer = Trainer(config(text_run, *SMALL, *settings), tmp_path / compiled, CUDA, quiet)
        losses.append([trainer.step(number).item() for number in range(5)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # of torch 2.11 itself
def test_a_long_run_is_compiled_by_default(text_run, tmp_path):
    long = Trainer(config(text_run, *SMALL, "train.steps=2000"), tmp_path / "long", CUDA, quiet)
    short = Trainer(config(text_run, *SMALL, "train.steps=1999"), tmp_path / "short", CUDA, quiet)
    assert (long.compiles, short.compiles) == (True, False)
    assert long.step(0).item() == pytest.approx(short.step(0).item(), rel=1e-2)
