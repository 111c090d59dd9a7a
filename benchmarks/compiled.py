"""What torch.compile takes and gains on a CPU, for every architecture: after how many steps it pays.

    python benchmarks/compiled.py [ARM ...] [--precision fp32 bf16] [--width 128] [--steps 8]

Steps are Trainer's own, of 4 windows of 256 random ids with AdamW, 6 layers, one thread; each trainer has a process of
its own, with an empty cache for what is compiled. Steps without and with compilation alternate. Times are CPU seconds
of that process and of the compilers that it starts, since others may use the machine: the first step with compilation
less one without, the medians of the others, and the first divided by what a step saves.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from train import VOCABULARY, random_shards

from shortcut_cli import registry
from shortcut_cli.config import reading
from shortcut_cli.data.workers import keep_freed_memory
from shortcut_cli.training.compiling import CACHE_VARIABLE
from shortcut_cli.training.trainer import Trainer

HEAD = 32  # width of a head
WARM_UP = 2
mine = {}  # this process's trainer


def cpu_s():
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def recipe(name, folder, compiled, precision, width):
    settings = {
        "model.name": name,
        "model.layers": 6,
        "model.width": width,
        "model.heads": width // HEAD,
        "model.ffn": 4 * width,
        "model.shortcut.map_width": 4 * width,
        "model.context": 256,
        "model.dropout": 0.0,
        "data.shards": str(folder),
        "eval.stride": 256,
        "train.batch_size": 4,
        "train.optimizer": "adamw",
        "train.compile": compiled,
        "train.precision": precision,
        "train.steps": 100_000,
    }
    return reading.read("text", [reading.Setting(key, value, key) for key, value in settings.items()])


def begin(name, folder, compiled, precision, width):
    """Make this the process of one trainer."""
    torch.set_num_threads(1)
    keep_freed_memory()
    os.environ[CACHE_VARIABLE] = str(folder / f"compiled-{name}-{precision}")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process, whose CPU seconds are counted
    trainer = Trainer(recipe(name, folder, compiled, precision, width), folder, "cpu", lambda _: None)
    mine["trainer"], mine["step"] = trainer, 0


def step_s():
    """CPU seconds of the next step."""
    began = cpu_s()
    mine["trainer"].step(mine["step"])
    mine["step"] += 1
    return cpu_s() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", default=[*registry.MODELS])
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    print(f"torch {torch.__version__}, one thread, {torch.backends.cpu.get_cpu_capability()}, width {options.width}")
    heads = ("precision", "ms", "compiled, ms", "ratio", "first, s", "pays after")
    print(f"{'arm':<16}" + "".join(f"{head:>14}" for head in heads))
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        tokenizer = recipe("gpt", folder, False, "fp32", options.width).tokenizer.model_dump()
        random_shards(folder, VOCABULARY, {"tokenizer": tokenizer})
        for name in options.arms:
            for precision in options.precision:
                given = [(name, folder, compiled, precision, options.width) for compiled in (False, True)]
                pools = [ProcessPoolExecutor(1, spawn, begin, each) for each in given]
                firsts = [pool.submit(step_s).result() for pool in pools]
                rows = [[pool.submit(step_s).result() for pool in pools] for _ in range(WARM_UP + options.steps)]
                for pool in pools:
                    pool.shutdown()
                plain, compiled = (statistics.median(column) for column in zip(*rows[WARM_UP:], strict=True))
                cost = firsts[1] - plain
                after = f"{cost / (plain - compiled):,.0f} steps" if compiled < plain else "never"
                shown = f"{plain * 1e3:>14.0f}{compiled * 1e3:>14.0f}{compiled / plain:>14.2f}{cost:>14.0f}{after:>14}"
                print(f"{name:<16}{precision:>14}{shown}", flush=True)


if __name__ == "__main__":
    main()
