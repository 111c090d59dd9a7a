"""What each kernel is worth: a step of training, or a sampled token, with it and with its plain version.

    python benchmarks/kernels.py [KERNEL ...] [--rounds 30] [--threads 1]

Shape and optimizer as in benchmarks/train.py. Every round runs both versions once, in random order, in one process on
one model. With one thread, times are CPU time of the process, which other work on the machine disturbs less than the
clock; with more they are the clock's, and `linear` divides its work only then. Printed for each kernel: the median time
with it, how much longer the median round takes without it, and the range that holds this median with 95 % confidence. A
kernel that gains less than 1 % of every architecture's step is not worth its code.
"""

import argparse
import math
import random
import statistics
import time
from contextlib import nullcontext
from unittest import mock

import torch
from torch.nn import functional as F
from train import BATCH, CONTEXT, VOCABULARY, ours

from shortcut_cli.data.workers import keep_freed_memory
from shortcut_cli.kernels import attention, cpu, depth, rope
from shortcut_cli.models import (
    attnres,
    denseformer,
    depth_attention,
    hyper,
    moda,
    mudd,
    mudd_last,
    shortcut,
    transformer,
)

TOKENS = 50  # of a round of sampling


class PlainStates(depth.States):
    """States without a buffer."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.store = None


# name: (arm, settings, (module that calls the kernel, its name there, its plain version))
KERNELS = {
    "fork_norm": ("gpt", [], (transformer, "fork_norm", cpu.plain_fork_norm)),
    "qkv_heads": ("gpt", [], (transformer, "qkv_heads", rope.plain_qkv_heads)),
    "weighted_sum:denseformer": ("denseformer", [], (denseformer, "weighted_sum", depth.plain_weighted_sum)),
    "weighted_sum:depth_attention": (
        "depth_attention",
        [],
        (depth_attention, "weighted_sum", depth.plain_weighted_sum),
    ),
    "weighted_sum:mudd_last": ("mudd_last", [], (mudd_last, "weighted_sum", depth.plain_weighted_sum)),
    "States:attnres": ("attnres", [], (attnres, "States", PlainStates)),
    "States:mudd": ("mudd", [], (mudd, "States", PlainStates)),
    "fork_scores:attnres": ("attnres", [], (attnres, "fork_scores", depth.plain_fork_scores)),
    "fork_scores:hyper": ("hyper", [], (hyper, "fork_scores", depth.plain_fork_scores)),
    "fork_read": ("hyper", [], (hyper, "fork_read", depth.plain_fork_read)),
    "attend_sources": (
        "shortcut",
        ["model.shortcut.attention=merge"],
        (shortcut, "attend_sources", attention.plain_attend_sources),
    ),
    "attend_with_depth": ("moda", [], (moda, "attend_with_depth", attention.plain_attend_with_depth)),
    "linear:sampling": ("gpt", [], (transformer, "linear", F.linear)),
    "fork_norm:sampling": ("gpt", [], (transformer, "fork_norm", cpu.plain_fork_norm)),
    "qkv_heads:sampling": ("gpt", [], (transformer, "qkv_heads", rope.plain_qkv_heads)),
}


def train(arm):
    """One step on random ids."""
    ids = torch.randint(0, VOCABULARY, (BATCH, CONTEXT + 1))
    arm.step(ids[:, :-1], ids[:, 1:])


@torch.inference_mode()
def sample(arm):
    """Some tokens of one row, greedily."""
    cache, ids = arm.model.new_cache(1, TOKENS), torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(TOKENS):
        ids = arm.model(ids, cache)[:, -1:].argmax(-1)


def seconds(work, arm):
    """How long some work takes."""
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = now()
    work(arm)
    return now() - started


def middle(values):
    """The median, and the range of ranks that holds the true median with 95 % confidence."""
    ordered, half = sorted(values), 0.98 * math.sqrt(len(values))
    low, high = math.floor(len(values) / 2 - half), math.ceil(len(values) / 2 + half)
    return statistics.median(values), ordered[max(0, low)], ordered[min(len(values) - 1, high)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", default=list(KERNELS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as `shortcut train` does
    print(f"torch {torch.__version__}, {options.threads} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'kernel':<32}{'ms':>10}{'longer without':>16}{'95 %':>20}")
    for name in options.kernels:
        arm_name, settings, patch = KERNELS[name]
        arm = ours(arm_name, *settings)
        work = sample if name.endswith("sampling") else train
        times = {"fast": [], "plain": []}
        for number in range(options.rounds + 2):
            for version in random.sample(list(times), 2):
                with mock.patch.object(*patch) if version == "plain" else nullcontext():
                    spent = seconds(work, arm)
                if number > 1:  # the first rounds warm up
                    times[version].append(spent)
        gain, low, high = middle([plain / fast - 1 for fast, plain in zip(times["fast"], times["plain"], strict=True)])
        share = 1000 * statistics.median(times["fast"]) / (TOKENS if work is sample else 1)
        print(f"{name:<32}{share:>10.2f}{gain:>16.2%}{f'{low:+.2%} to {high:+.2%}':>20}", flush=True)


if __name__ == "__main__":
    main()
