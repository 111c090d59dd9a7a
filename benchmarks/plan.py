"""A plan for 100,000 hours of sound and a model of 1.3 billion parameters on 64 GPUs: arithmetic and a simulation.

    python benchmarks/plan.py

prints the tables of docs/scale.md. UNITS has every number that goes in, and says whether it was measured, with what, or
is assumed. Nothing here was run at this size.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np

HOUR = 3600.0
LARGEST = 4 * HOUR  # of a file, in the simulation
GPUS, NODE = 64, 8  # in all, and in a node
CORES = 64  # for the preparation, each a worker


@dataclass(frozen=True)
class Unit:
    """A number that goes into the plan."""

    value: float
    what: str
    source: str


UNITS = {
    "hours": Unit(100_000, "hours of sound", "given"),
    "frame_rate": Unit(75, "frames of EnCodec 24 kHz per second", "by definition"),
    "parameters": Unit(1_256_341_504, "parameters of `shortcut`, 24 x 2048, context 2,048, tied", "counted"),
    "flops_per_token": Unit(8_896_548_864, "training FLOPs per token of that model", "counted"),
    "encode": Unit(0.0956, "CPU s per second of sound and codebook stream, one core", "measured (1)"),
    "hash": Unit(0.79e-9, "CPU s per byte hashed", "measured (1)"),
    "part": Unit(2.5e-9, "CPU s per byte of ids written into a part", "measured (1)"),
    "shard": Unit(0.9e-9, "CPU s per byte of ids moved into a shard", "measured (1)"),
    "save": Unit(1.7e-9, "CPU s per byte of a checkpoint saved by one process", "measured (1)"),
    "driver_seconds": Unit(108e-6, "CPU s per file in the driver", "measured (2)"),
    "driver_bytes": Unit(206, "bytes per file in the driver", "measured (2)"),
    "mfu": Unit(0.321, "MFU of `shortcut` at 158M, compiled, one H200", "measured (3); assumed to hold at 1.3 B"),
    "peak": Unit(989e12, "FLOP/s of a GPU in bf16, dense", "data sheet"),
    "file_minutes": Unit(6, "mean length of a file in minutes, log-normal with sigma 1", "assumed"),
    "flac": Unit(30_000, "bytes per second of sound as stored", "assumed"),
    "disk": Unit(2e9, "bytes/s of the shared file system, all clients together", "assumed"),
    "nic": Unit(50e9, "bytes/s of network per GPU (400 Gbit/s), each way", "assumed"),
    "batch": Unit(1_048_576, "tokens per step", "assumed"),
    "micro": Unit(8, "windows per GPU at once", "assumed"),
    "node_mtbf": Unit(4380, "hours between losses of one node", "assumed"),
    "restart": Unit(300, "seconds from a loss to the first step after it", "assumed"),
}


def value(name):
    """A number of the plan."""
    return UNITS[name].value


def expected_seconds(work, checkpoint, restart, rate):
    """Expected seconds of a segment of work and its checkpoint, begun again after each loss until it is done.

    Losses come at `rate` per second while it works; after each come `restart` seconds in which there are none.
    (1/rate + restart) (exp(rate (work + checkpoint)) - 1); Daly, 2006, "A higher order estimate of the optimum
    checkpoint interval", for a restart that cannot fail.
    """
    return (1 / rate + restart) * math.expm1(rate * (work + checkpoint))


def simulated_seconds(total, interval, checkpoint, restart, rate, generator):
    """Seconds of a training of `total` seconds with a checkpoint after each `interval`, and losses drawn at random."""
    clock = done = 0.0
    while done < total:
        segment = min(interval, total - done)
        lost = generator.exponential(1 / rate)
        if lost < segment + checkpoint:
            clock += lost + restart
        else:
            clock += segment + checkpoint
            done += segment
    return clock


def best_interval(checkpoint, rate):
    """Seconds between checkpoints that cost the least: sqrt(2 C / rate), Young, 1974."""
    return math.sqrt(2 * checkpoint / rate)


def lengths(count, mean, generator, sigma=1.0):
    """Seconds of so many files, log-normal, cut at LARGEST."""
    return np.minimum(generator.lognormal(math.log(mean) - sigma**2 / 2, sigma, count), LARGEST)


def by_name(seconds, tasks, generator):
    """Seconds of the longest task if each file falls to one by the hash of its name."""
    return np.bincount(generator.integers(0, tasks, len(seconds)), seconds, tasks).max()


def by_queue(seconds, workers):
    """Seconds until all are done if each worker takes the next batch when it is free; longest batches first."""
    free = [0.0] * workers
    for batch in sorted(seconds, reverse=True):
        heapq.heappush(free, heapq.heappop(free) + batch)
    return max(free)


def memory(tokens, shards):
    """Bytes per GPU of weights, gradients, moments; of a block that is gathered; of activations; with `shards` ranks.

    fp32 weights, gradients and two moments, 16 bytes a parameter. One block of 24 is gathered in fp32, and the next one
    meanwhile; without shards all weights are copied to bf16. With activation checkpointing a layer keeps its input in
    bf16, and one layer at a time what it computes: 34 bytes a channel (Korthikanti et al., 2022, without the scores of
    attention). The logits of 1,025 ids are in fp32, with their gradient.
    """
    parameters, width, layers, vocabulary = value("parameters"), 2048, 24, 1025
    state = 16 * parameters / shards
    gathered = 2 * 4 * parameters / layers if shards > 1 else 2 * parameters
    activations = tokens * (layers * width * 2 + 34 * width + 2 * 4 * vocabulary)
    return state, gathered, activations


def preparation(generator):
    """Rows of the preparation: (what, amount)."""
    sound = value("hours") * HOUR
    tokens = sound * value("frame_rate")
    mean = value("file_minutes") * 60
    files = round(sound / mean)
    seconds = lengths(files, mean, generator)
    seconds *= sound / seconds.sum()
    work = seconds * (value("encode") + value("flac") * value("hash"))
    even = work.sum() / CORES
    named = by_name(work, CORES, generator)
    batches = np.add.reduceat(generator.permutation(work), np.arange(0, files, max(1, files // (4 * CORES))))
    queued = by_queue(batches, CORES)
    size = 2 * (tokens + files)  # uint16, and EOS
    writing = size * (value("part") + value("shard"))
    return [
        ("frames, and tokens of the coarse stream", f"{tokens / 1e9:.0f} billion"),
        ("files", f"{files / 1e6:.1f} million"),
        ("sound as stored", f"{sound * value('flac') / 1e12:.1f} TB"),
        ("reading it once, at the file system's rate", f"{sound * value('flac') / value('disk') / HOUR:.1f} h"),
        ("encoding and hashing", f"{work.sum() / HOUR:,.0f} core hours"),
        (f"on {CORES} cores, if all end at once", f"{even / HOUR:,.0f} h"),
        (f"as {CORES} tasks by names, until the last ends (simulated)", f"{named / HOUR:,.0f} h"),
        (f"from a queue of {4 * CORES} batches (simulated)", f"{queued / HOUR:,.0f} h"),
        ("ids, 2 bytes each", f"{size / 1e9:.0f} GB"),
        ("writing parts and shards", f"{writing / HOUR:.2f} core hours"),
        ("the driver, in time", f"{files * value('driver_seconds'):.0f} s"),
        ("the driver, in memory", f"{files * value('driver_bytes') / 1e9:.1f} GB"),
        ("a lost node: its files that were begun", f"{8 * mean * value('encode') / 60:.0f} core minutes"),
    ]


def training(generator):
    """Rows of the training: (what, amount)."""
    tokens = value("hours") * HOUR * value("frame_rate")
    steps = math.ceil(tokens / value("batch"))
    flops = tokens * value("flops_per_token")
    step = value("batch") * value("flops_per_token") / (GPUS * value("peak") * value("mfu"))
    total = steps * step
    share = (GPUS - 1) / GPUS
    ddp = 2 * share * 4 * value("parameters")
    fsdp = share * (2 + 2 + 4) * value("parameters")  # weights twice in bf16, gradients once in fp32
    saved = 12 * value("parameters")  # fp32 weights and two moments
    write = saved / value("disk")
    rate = GPUS / NODE / (value("node_mtbf") * HOUR)
    interval = best_interval(write, rate)
    simulated = np.mean(
        [simulated_seconds(total, interval, write, value("restart"), rate, generator) for _ in range(2000)]
    )
    window = 2048
    per_gpu = value("micro") * window
    rows = [
        ("training FLOPs of one epoch", f"{flops:.2e}"),
        ("steps", f"{steps:,}"),
        ("seconds of a step, computing", f"{step:.2f}"),
        ("one epoch of eight codebooks", f"{8 * GPUS * total / HOUR:,.0f} GPU hours"),
        ("one epoch without losses", f"{total / HOUR:.1f} h, {GPUS * total / HOUR:,.0f} GPU hours"),
        ("network per GPU and step, DDP (fp32 gradients, ring)", f"{ddp / 1e9:.1f} GB, {ddp / value('nic'):.2f} s"),
        ("network per GPU and step, FSDP2 over all", f"{fsdp / 1e9:.1f} GB, {fsdp / value('nic'):.2f} s"),
        ("checkpoint, CPU s of one process that saves all of it", f"{saved * value('save'):.0f} s"),
        (
            'checkpoint, if all write it (as with train.shard = "fsdp")',
            f"{saved / 1e9:.1f} GB, {write:.1f} s if nothing hides it",
        ),
        ("best interval between checkpoints (Young)", f"{interval / 60:.0f} min"),
        ("losses of a node to be expected in an epoch", f"{rate * total:.2f}"),
        ("cost of a loss: half an interval and the restart", f"{(interval / 2 + value('restart')) / 60:.0f} min"),
        (
            "one epoch with losses and checkpoints (simulated)",
            f"{simulated / HOUR:.2f} h, {simulated / total - 1:+.1%}",
        ),
    ]
    for name, shards in (("DDP", 1), (f"FSDP2 over a node of {NODE} (HSDP)", NODE), (f"FSDP2 over {GPUS}", GPUS)):
        parts = [amount / 1e9 for amount in memory(per_gpu, shards)]
        words = " + ".join(f"{part:.1f}" for part in parts)
        rows.append((f"memory per GPU, {name}: state + gathered + activations", f"{words} = {sum(parts):.1f} GB"))
    return rows


def table(title, headings, rows):
    """A table in Markdown."""
    lines = [f"**{title}**", "", f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def tables():
    """All tables of the plan, the same every time."""
    generator = np.random.default_rng(0)
    units = [(unit.what, f"{unit.value:,.4g}", unit.source) for unit in UNITS.values()]
    return "\n\n".join(
        [
            table("What goes in", ("number", "value", "measured or assumed"), units),
            table("Preparation", ("what", "amount"), preparation(generator)),
            table("Training", ("what", "amount"), training(generator)),
        ]
    )


if __name__ == "__main__":
    print(tables())
