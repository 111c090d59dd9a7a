"""Training speed: `gpt`, `shortcut` and nanoGPT's model, in turn, in one process.

    python benchmarks/train.py [--nanogpt FOLDER] [--rounds 7]

FOLDER is a checkout of github.com/karpathy/nanoGPT (its model.py is imported; nothing of it is in this project).
Shape: 6 layers, width 256, 8 heads, feed-forward 1,024, context 256, batch 16, vocabulary 1,024, fp32, fused AdamW,
clipping at 1.0. Every round times a few steps of each arm; the medians over the rounds are printed, with each arm's
ratio to `gpt` taken round by round, the FLOPs that torch counts, and the share of the time that goes to data.
"""

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shortcut_cli import batches, metrics, optim, recipe, registry, shards
from shortcut_cli.stages.training import keep_freed_memory

BATCH, CONTEXT, VOCABULARY = 16, 256, 1024
STEPS_A_ROUND = 3


def resolved(name):
    """The recipe of one arm."""
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
        f"train.batch_size={BATCH}",
        f"eval.stride={CONTEXT}",
    ]
    return recipe.read("music", settings)


def windows(folder):
    """Training windows over random ids, through the real shards and the real order."""
    writer = shards.FolderWriter(folder, VOCABULARY, 1 << 28, end=VOCABULARY - 1)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, 2_000_000)
    for split in shards.SPLITS:
        writer.add(split, [ids], {}, {})
    identity = {"vocabulary": VOCABULARY, "end": VOCABULARY - 1, "unit": "byte"}
    writer.finish([], {"request": {}, "tokenizer": identity})
    return batches.Windows(shards.Shards(folder).split("train"), CONTEXT, seed=1)


class Arm:
    """A model with its optimiser; `step` does what one step of training does."""

    def __init__(self, name, model, forward, keys):
        self.name, self.model, self.forward = name, model, forward
        self.optimizer = optim.adamw(model, keys)

    def step(self, x, y):
        loss = metrics.loss(self.forward(x), y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def flops(self, x, y):
        # torch counts no FLOPs of the CPU's fused attention; the plain one runs all T x S pairs.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            metrics.loss(self.forward(x), y).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()


def ours(name):
    keys = resolved(name)
    model = registry.load(registry.MODELS, name)(keys.model, VOCABULARY, 1)
    return Arm(name, model, model, keys.train)


def nanogpt(folder):
    """nanoGPT's model of the same shape, biases off, with targets given so that it returns all logits."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(folder) / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        block_size=CONTEXT, vocab_size=VOCABULARY, n_layer=6, n_head=8, n_embd=256, dropout=0.0, bias=False
    )
    model = module.GPT(config)
    arm = Arm("nanoGPT", model, None, resolved("gpt").train)

    def step(x, y):
        # nanoGPT computes its own loss, as its training loop does.
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        arm.optimizer.step()
        arm.optimizer.zero_grad(set_to_none=True)

    arm.step = step
    arm.forward = lambda x: model(x, x)[0]
    return arm


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plain-malloc", action="store_true", help="without the setting that `train` makes of malloc")
    options = parser.parse_args()
    if not options.plain_malloc:
        keep_freed_memory()  # for all arms, nanoGPT's too
    arms = [ours("gpt"), ours("shortcut")] + ([nanogpt(options.nanogpt)] if options.nanogpt else [])
    with tempfile.TemporaryDirectory() as folder:
        source = windows(Path(folder))
        times = {arm.name: [] for arm in arms}
        data_s = 0.0
        for round_number in range(-1, options.rounds):  # round -1 warms up
            for arm in arms:
                started = time.perf_counter()
                x, y = source.batch((round_number + 1) * BATCH, BATCH)
                loaded = time.perf_counter()
                for _ in range(STEPS_A_ROUND):
                    arm.step(x, y)
                if round_number >= 0:
                    times[arm.name].append((time.perf_counter() - loaded) / STEPS_A_ROUND)
                    data_s += loaded - started
    flops = {arm.name: arm.flops(x, y) for arm in arms}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'arm':<10}{'tokens/s':>10}{'s/step':>9}{'time / gpt':>12}{'FLOPs / gpt':>13}{'GFLOPs/step':>13}")
    for arm in arms:
        step_s = statistics.median(times[arm.name])
        ratio = statistics.median(a / b for a, b in zip(times[arm.name], times["gpt"], strict=True))
        share = flops[arm.name] / flops["gpt"]
        rate = BATCH * CONTEXT / step_s
        print(f"{arm.name:<10}{rate:>10,.0f}{step_s:>9.3f}{ratio:>12.3f}{share:>13.3f}{flops[arm.name] / 1e9:>13.1f}")
    batch_s = data_s / options.rounds / len(arms)
    print(f"data: {batch_s * 1e3:.2f} ms a batch, {batch_s / statistics.median(times['gpt']):.2%} of a step of gpt")


if __name__ == "__main__":
    main()
