"""Training speed: `gpt`, `shortcut` and nanoGPT's model, alternating, each in its own process.

    python benchmarks/train.py [--nanogpt FOLDER] [--starts 5] [--rounds 6]

FOLDER is a checkout of github.com/karpathy/nanoGPT (its model.py is imported; none of it is in this project). Shape: 6
layers, width 256, 8 heads, feed-forward 1,024, context 256, batch 16, vocabulary 1,024, fp32, fused AdamW, clipping at
1.0. In rows named bf16 products are in bf16: ours as with `train.precision = "bf16"`, nanoGPT's under torch's autocast.
Every round times a few steps of each arm, in random order. The processes are restarted a few times, since one can be
two per cent faster than the next. Printed are the medians over all rounds, each arm's ratio to `gpt` taken round by
round, the FLOPs that torch counts, and the share of the time that goes to data.
"""

import argparse
import importlib.util
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shortcut_cli import registry
from shortcut_cli.config import reading
from shortcut_cli.data import shards
from shortcut_cli.data.windows import Windows
from shortcut_cli.data.workers import keep_freed_memory
from shortcut_cli.kernels import bf16
from shortcut_cli.models.loss import loss
from shortcut_cli.training import optim

BATCH, CONTEXT, VOCABULARY = 16, 256, 1024
STEPS_A_ROUND = 3


def resolved(name, *more):
    """The recipe of one arm; more: settings beyond its name and shape."""
    settings = [
        f"model.name={name}",
        "model.layers=6",
        "model.width=256",
        "model.heads=8",
        "model.ffn=1024",
        f"model.context={CONTEXT}",
        "model.activation=gelu",
        "model.dropout=0.0",
        "model.tied=true",
        "model.qk_norm=false",
        "model.init=gpt2",
        "model.shortcut.map_width=1024",
        "train.warmup=100",
        "train.schedule=cosine",
        "train.min_lr=0.1",
        f"train.batch_size={BATCH}",
        f"eval.stride={CONTEXT}",
        *more,
    ]
    return reading.read("music", settings)


def random_shards(folder, vocabulary=VOCABULARY, request=None):
    """Shards of random ids. request: what they seem to have been made by."""
    writer = shards.FolderWriter(folder, vocabulary, 1 << 28, eos=vocabulary - 1)
    ids = np.random.default_rng(0).integers(0, vocabulary, 2_000_000)
    for split in shards.SPLITS:
        writer.add(split, [ids], {}, {})
    identity = {"name": "random", "fingerprint": "", "vocabulary": vocabulary, "end": vocabulary - 1, "unit": "byte"}
    writer.finish([], {"request": request or {}, "tokenizer": identity})


def windows(folder):
    """Training windows over random ids, through real shards and in the real order."""
    random_shards(folder)
    return Windows(shards.Shards(folder).split("train"), CONTEXT, seed=1)


class Arm:
    """A model with its optimizer; `step` does what one step of training does."""

    def __init__(self, name, model, forward, config):
        self.name, self.model, self.forward, self.config = name, model, forward, config
        self.optimizer = optim.adamw(model, config)

    def step(self, x, y):
        nats = loss(self.forward(x), y)
        nats.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return nats.item()

    def flops(self, x, y):
        # torch doesn't count the FLOPs of the CPU's fused attention; the plain one computes all T x S pairs.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss(self.forward(x), y).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()


def ours(name, *settings, seed=1):
    config = resolved(name, *settings)
    model = registry.load(registry.MODELS, name)(config.model, VOCABULARY, seed)
    return Arm(name, model, model, config.train)


def nanogpt_module(folder):
    """nanoGPT's model.py, imported from its checkout."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


def nanogpt(folder, narrow):
    """nanoGPT's model of the same shape, biases off, with targets given so that it returns all logits."""
    module = nanogpt_module(folder)
    config = module.GPTConfig(
        block_size=CONTEXT, vocab_size=VOCABULARY, n_layer=6, n_head=8, n_embd=256, dropout=0.0, bias=False
    )
    model = module.GPT(config)
    arm = Arm("nanoGPT", model, None, resolved("gpt").train)

    def step(x, y):
        # nanoGPT computes its own loss, as its training loop does.
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            _, nats = model(x, y)
        nats.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        arm.optimizer.step()
        arm.optimizer.zero_grad(set_to_none=True)

    arm.step = step
    arm.forward = lambda x: model(x, x)[0]
    return arm


mine = {}  # this process's arm


def begin(name, folder, threads):
    """Make this the process of one arm; nanoGPT's keeps the memory settings of its own script."""
    torch.set_num_threads(threads)
    name, _, narrow = name.partition(" ")
    if name == "nanoGPT":
        mine["arm"] = nanogpt(folder, bool(narrow))
        return
    keep_freed_memory()
    mine["arm"], plain = ours(name), Arm.step

    def step(x, y):
        with bf16.products(bool(narrow)):
            plain(mine["arm"], x, y)

    mine["arm"].step = step


def time_steps(batch):
    """Seconds per step, over a few steps."""
    started = time.perf_counter()
    for _ in range(STEPS_A_ROUND):
        mine["arm"].step(*batch)
    return (time.perf_counter() - started) / STEPS_A_ROUND


def count(batch):
    """FLOPs of a step."""
    return mine["arm"].flops(*batch)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", metavar="FOLDER")
    parser.add_argument("--starts", type=int, default=5, help="how often every arm gets a new process")
    parser.add_argument("--rounds", type=int, default=6, help="rounds with each process")
    options = parser.parse_args()
    names = ["gpt", "gpt bf16", "shortcut"] + (["nanoGPT", "nanoGPT bf16"] if options.nanogpt else [])
    spawn = multiprocessing.get_context("spawn")
    times = {name: [] for name in names}
    data_s, flops = [], {}
    with tempfile.TemporaryDirectory() as folder:
        source = windows(Path(folder))
        for start in range(options.starts):
            arguments = {name: (name, options.nanogpt, torch.get_num_threads()) for name in names}
            arms = {name: ProcessPoolExecutor(1, spawn, begin, arguments[name]) for name in names}
            for number in range(options.rounds + 1):
                started = time.perf_counter()
                batch = source.batch(number * BATCH, BATCH)
                data_s.append(time.perf_counter() - started)
                for name in random.sample(names, len(names)):  # none always runs after the same one
                    step_s = arms[name].submit(time_steps, batch).result()
                    if number:  # the first round warms up
                        times[name].append(step_s)
            if not flops:
                flops = {name: arms[name].submit(count, batch).result() for name in names}
            for arm in arms.values():
                arm.shutdown()
            found = (f"{name} {BATCH * CONTEXT / statistics.median(times[name]):,.0f}" for name in names)
            print(f"{start + 1} of {options.starts} starts, tokens/s: {', '.join(found)}", flush=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'arm':<14}{'tokens/s':>10}{'s/step':>9}{'time / gpt':>12}{'FLOPs / gpt':>13}{'GFLOPs/step':>13}")
    for name in names:
        step_s = statistics.median(times[name])
        ratio = statistics.median(a / b for a, b in zip(times[name], times["gpt"], strict=True))
        share = flops[name] / flops["gpt"]
        rate = BATCH * CONTEXT / step_s
        print(f"{name:<14}{rate:>10,.0f}{step_s:>9.3f}{ratio:>12.3f}{share:>13.3f}{flops[name] / 1e9:>13.1f}")
    batch_s = statistics.median(data_s[1:])
    print(f"data: {batch_s * 1e3:.2f} ms per batch, {batch_s / statistics.median(times['gpt']):.2%} of a step of gpt")


if __name__ == "__main__":
    main()
