"""Products in bf16 against fp32 on a CPU: the loss after training in each, or the time of a step by width.

    python benchmarks/precision.py loss [--seeds 5] [--steps 2000] [--width 64] [--text FILE]
    python benchmarks/precision.py speed [ARM ...] [--widths 32 64 128 256] [--rounds 7]

loss: nanoGPT's own CPU example in shape (4 layers, context 64, batch 12) on the letters of a text, or on those of a
Markov chain. Printed are the loss of each seed on the last tenth in both precisions (each scored in its own), the mean
difference, and the standard deviation over seeds in fp32, the noise to compare it with. speed: shape and optimizer as
in benchmarks/train.py, one thread, CPU seconds; the two precisions alternate, and the median of the ratios is printed.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from train import BATCH, CONTEXT, VOCABULARY, ours

from shortcut_cli.data.workers import keep_freed_memory
from shortcut_cli.kernels import bf16
from shortcut_cli.models.loss import loss
from shortcut_cli.training import optim

WINDOW, ROWS = 64, 12


def letters(path):
    """Ids of a text's characters; without a text, of a Markov chain over 64 letters."""
    if path:
        text = Path(path).read_text(encoding="utf-8")
        return np.unique(np.array(list(text)), return_inverse=True)[1]
    draw = np.random.default_rng(0)
    table = draw.dirichlet(np.full(64, 0.1), 64 * 64).cumsum(1)
    ids = [0, 0]
    for number in draw.random(200_000):
        ids.append(min(63, int(np.searchsorted(table[ids[-2] * 64 + ids[-1]], number))))
    return np.array(ids)


def windows(ids, starts):
    rows = torch.from_numpy(np.stack([ids[start : start + WINDOW + 1] for start in starts]))
    return rows[:, :-1], rows[:, 1:]


def trained(ids, seed, options, narrow):
    """Loss on the last tenth after training."""
    settings = ["model.layers=4", f"model.width={options.width}", "model.heads=4", f"model.ffn={4 * options.width}"]
    settings += [f"model.context={WINDOW}", f"eval.stride={WINDOW}", f"train.seed={seed}"]
    settings += [f"train.steps={options.steps}", "train.lr=1e-3", f"train.batch_size={ROWS}"]
    arm = ours("gpt", *settings, seed=seed)
    config = arm.config
    cut, draw = len(ids) * 9 // 10, np.random.default_rng(seed)
    with bf16.products(narrow):
        for number in range(options.steps):
            optim.set_rate(arm.optimizer, optim.learning_rate(number, config))
            arm.step(*windows(ids, draw.integers(0, cut - WINDOW - 1, ROWS)))
        places = np.linspace(cut, len(ids) - WINDOW - 1, 512).astype(int)
        with torch.no_grad():
            x, y = windows(ids, places)
            return loss(arm.forward(x), y).item()


def compare_losses(options):
    ids = letters(options.text)
    found = []
    for seed in range(options.first, options.first + options.seeds):
        wide, narrow = (trained(ids, seed, options, narrow) for narrow in (False, True))
        found.append((wide, narrow))
        print(f"seed {seed}: fp32 {wide:.4f}, bf16 {narrow:.4f}, difference {narrow - wide:+.4f}", flush=True)
    gaps = [narrow - wide for wide, narrow in found]
    print(f"mean difference {statistics.mean(gaps):+.4f} nats", end="")
    if len(found) > 1:
        print(f"; over seeds, fp32 spreads by {statistics.stdev(wide for wide, _ in found):.4f}", end="")
    print()


def compare_speed(options):
    ids = torch.randint(0, VOCABULARY, (BATCH, CONTEXT + 1))
    print(f"{'arm':<16}{'width':>6}{'fp32 s':>9}{'bf16 s':>9}{'fp32 / bf16':>13}")
    for name in options.arms or ["gpt"]:
        for width in options.widths:
            shape = [f"model.width={width}", f"model.heads={max(1, width // 32)}", f"model.ffn={4 * width}"]
            arm = ours(name, *shape)
            times = {False: [], True: []}
            for number in range(options.rounds + 1):
                for narrow, taken in times.items():
                    started = time.process_time()
                    with bf16.products(narrow):
                        arm.step(ids[:, :-1], ids[:, 1:])
                    if number:
                        taken.append(time.process_time() - started)
            ratio = statistics.median(a / b for a, b in zip(times[False], times[True], strict=True))
            wide, narrow = (statistics.median(taken) for taken in times.values())
            print(f"{name:<16}{width:>6}{wide:>9.3f}{narrow:>9.3f}{ratio:>13.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["loss", "speed"])
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--text")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    (compare_losses if options.what == "loss" else compare_speed)(options)


if __name__ == "__main__":
    main()
