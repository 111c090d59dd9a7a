"""Training on a GPU: tokens/s, MFU, peak memory and the time to compile, of our steps and of nanoGPT's model.

    python benchmarks/gpu.py [ARM ...] [--compile no yes] [--optimizer adamw muon] [--layers 12] [--width 768]
                             [--context 1024] [--batch 16] [--vocabulary 32000] [--nanogpt FOLDER] [--peak 989]
                            [--profile]

A step is Trainer's own, from reading windows of random ids to the update, in bf16 (train.precision). The default shape
is GPT-2's of 124M parameters, but for the vocabulary. MFU: the FLOPs of training on a token (three times the forward
pass, attention only over the pairs that it sees) times tokens/s, divided by --peak, the device's TFLOP/s in bf16 (989:
H100 and H200, dense). nanoGPT's model.py is imported from a checkout of github.com/karpathy/nanoGPT, runs under
autocast with fused AdamW, and is charged with the FLOPs of our `gpt`. --profile: the kernels that take most of a step.
"""

import argparse
import gc
import statistics
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from train import nanogpt_module, random_shards

from shortcut_cli.config import reading
from shortcut_cli.data import shards
from shortcut_cli.data.workers import keep_freed_memory
from shortcut_cli.training.trainer import Trainer

WARM_UP, TIMED = 5, 20
KERNELS = 16  # that --profile shows


def recipe(folder, name, options, compiled, optimizer):
    return reading.read(
        "text",
        [
            f"model.name={name}",
            f"model.layers={options.layers}",
            f"model.width={options.width}",
            f"model.heads={options.width // 64}",
            f"model.ffn={4 * options.width}",
            f"model.context={options.context}",
            "model.dropout=0.0",
            f"model.shortcut.map_width={4 * options.width}",
            f"data.shards={folder}",
            f"eval.stride={options.context}",
            f"train.batch_size={options.batch}",
            f"train.optimizer={optimizer}",
            f"train.compile={str(compiled).lower()}",
            "train.precision=bf16",
            "train.steps=100000",
        ],
    )


def timed(step, profiled):
    """Median seconds of a step, seconds of the first one, and the most bytes in use."""
    gc.collect()  # of the model before
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for number in range(WARM_UP + TIMED):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step(number)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    found = statistics.median(times[WARM_UP:]), times[0], torch.cuda.max_memory_allocated()
    if profiled:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step(WARM_UP + TIMED)
            torch.cuda.synchronize()
        kernels = sorted(profile.key_averages(), key=lambda one: -one.self_device_time_total)[:KERNELS]
        for one in kernels:
            print(f"  {one.self_device_time_total / 1e3:9.3f} ms {one.count:6} x {one.key[:100]}")
    return found


def ours(folder, name, options, compiled, optimizer):
    trainer = Trainer(recipe(folder, name, options, compiled, optimizer), folder, "cuda", lambda _: None)
    flops = trainer.model.training_flops_per_token(options.context)
    return flops, trainer.model.count()["total"], timed(trainer.step, options.profile)


def nanogpt(folder, options, compiled):
    peer = nanogpt_module(options.nanogpt)
    config = peer.GPTConfig(
        options.context, options.vocabulary, options.layers, options.width // 64, options.width, 0.0, False
    )
    model = peer.GPT(config).cuda()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), 6e-4, (0.9, 0.95), weight_decay=0.1, fused=True)
    split, draw = shards.Shards(folder).split("train"), np.random.default_rng(1)
    ids = split.read(0, split.tokens)

    def step(_):
        starts = draw.integers(0, len(ids) - options.context - 1, options.batch)
        rows = torch.from_numpy(np.stack([ids[s : s + options.context + 1] for s in starts]))
        rows = rows.pin_memory().to("cuda", non_blocking=True)
        with torch.autocast("cuda", torch.bfloat16):
            _, nats = forward(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        nats.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return sum(p.numel() for p in model.parameters()), timed(step, options.profile)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", default=["gpt", "shortcut"])
    parser.add_argument("--compile", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--optimizer", nargs="+", choices=["adamw", "muon"], default=["adamw"])
    for name, default in (("layers", 12), ("width", 768), ("context", 1024), ("batch", 16), ("vocabulary", 32000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--nanogpt", metavar="FOLDER")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}, {options.layers} x {options.width}, ", end="")
    print(f"context {options.context}, batch {options.batch}, vocabulary {options.vocabulary}, bf16")
    heads = ("optimizer", "compile", "parameters", "ms/step", "tokens/s", "MFU %", "peak MB", "first s")
    print(f"{'arm':<16}" + "".join(f"{head:>12}" for head in heads))

    def show(name, optimizer, compiled, flops, parameters, found):
        step_s, first_s, peak = found
        rate = options.batch * options.context / step_s
        mfu = 100 * rate * flops / (options.peak * 1e12)
        print(
            f"{name:<16}{optimizer:>12}{compiled:>12}{parameters:>12,}{step_s * 1e3:>12.1f}{rate:>12,.0f}{mfu:>12.1f}"
            f"{peak / 1e6:>12,.0f}{first_s:>12.1f}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = recipe(folder, "gpt", options, False, "adamw").tokenizer.model_dump()
        random_shards(folder, options.vocabulary, {"tokenizer": made})
        flops = None
        for name, optimizer, compiled in product(options.arms, options.optimizer, options.compile):
            torch.compiler.reset()
            own, parameters, found = ours(folder, name, options, compiled == "yes", optimizer)
            flops = own if name == "gpt" else flops
            show(name, optimizer, compiled, own, parameters, found)
        for compiled in options.compile if options.nanogpt and flops else []:
            torch.compiler.reset()
            show("nanoGPT", "adamw", compiled, flops, *nanogpt(folder, options, compiled == "yes"))


if __name__ == "__main__":
    main()
