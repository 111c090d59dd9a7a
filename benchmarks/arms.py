"""Training cost of every architecture against the baseline's, alternating, each in its own process.

    python benchmarks/arms.py [ARM ...] [--starts 2] [--rounds 4]

Shape, optimizer and timing as in benchmarks/train.py. For each arm: tokens/s, the ratio of its step time to that of
`gpt` (round by round), the ratio of their FLOPs (counted by the model; a test checks that torch counts the same), the
first ratio divided by the second, the peak memory of its process, and cache bytes per token. "time / FLOPs" is 1 if
time follows the FLOPs; arms above 1.25 are listed.
"""

import argparse
import multiprocessing
import random
import resource
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from train import BATCH, CONTEXT, begin, mine, time_steps, windows

from shortcut_cli import registry

LIMIT = 1.25


def memory(_):
    """Peak memory of this process, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def flops_of(_):
    """FLOPs of a forward pass over one window."""
    return mine["arm"].model.flops(CONTEXT, causal=False)


def cache_bytes(_):
    """Bytes that the model's cache holds per token."""
    return mine["arm"].model.cache_bytes_per_token()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", default=[name for name in registry.MODELS if name != "gpt"])
    parser.add_argument("--starts", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    heads = ("tokens/s", "time / gpt", "FLOPs / gpt", "time / FLOPs", "peak MB", "cache B")
    print(f"{'arm':<16}" + "".join(f"{head:>14}" for head in heads))
    slow = []
    with tempfile.TemporaryDirectory() as folder:
        source = windows(Path(folder))
        for arm in options.arms:
            times = {"gpt": [], arm: []}
            for _ in range(options.starts):
                pools = {
                    name: ProcessPoolExecutor(1, spawn, begin, (name, None, torch.get_num_threads())) for name in times
                }
                for number in range(options.rounds + 1):
                    batch = source.batch(number * BATCH, BATCH)
                    for name in random.sample(list(times), 2):
                        step_s = pools[name].submit(time_steps, batch).result()
                        if number:
                            times[name].append(step_s)
                peak = pools[arm].submit(memory, None).result()
                flops = {name: pool.submit(flops_of, None).result() for name, pool in pools.items()}
                cache = pools[arm].submit(cache_bytes, None).result()
                for pool in pools.values():
                    pool.shutdown()
            ratio = statistics.median(a / b for a, b in zip(times[arm], times["gpt"], strict=True))
            share = flops[arm] / flops["gpt"]
            if ratio / share > LIMIT:
                slow.append(arm)
            rate = BATCH * CONTEXT / statistics.median(times[arm])
            columns = f"{rate:>14,.0f}{ratio:>14.3f}{share:>14.3f}{ratio / share:>14.3f}{peak:>14,.0f}{cache:>14,}"
            print(f"{arm:<16}{columns}", flush=True)
    print(f"time / FLOPs above {LIMIT}: {', '.join(slow) or 'none'}")


if __name__ == "__main__":
    main()
