"""Speed of encoding sound: `shortcut prepare audio` against the `encodec` package called file by file.

    python benchmarks/audio.py FOLDER [--codebooks 8] [--rounds 3] [--weights untrained:0]

Both read every sound file in FOLDER, bring it to 24 kHz mono by soxr and encode it with the same weights, alternating.
The package works as in its README, in one process with one thread per core, without the time to load the model.
`shortcut` is the whole command, writing included; a second row subtracts its start, the time of the same command on a
clip of a tenth of a second. The codes are compared. Two entries of a codebook can be equally near in single precision,
and then rounding decides: if codes differ, the distances of both are printed.
"""

import argparse
import collections
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

from shortcut_cli.codec import encodec, weights
from shortcut_cli.data import inputs
from shortcut_cli.data.shards import Shards
from shortcut_cli.tokenizers.audio import AudioTokenizer


def plain_model(name):
    """The package's own model, weight norm included."""
    drawn = weights.seed(name)
    model = encodec.untrained(*drawn) if drawn else encodec.load(weights.resolve(name))[0]
    return model.eval()


def read(path):
    """A sound file as 24 kHz mono, (samples,)."""
    x, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    return soxr.resample(x.mean(axis=1), rate_hz, 24_000) if rate_hz != 24_000 else x.mean(axis=1)


def plain(model, paths, codebooks):
    """Seconds that the package takes, and the codes of each file, (Q, frames)."""
    started = time.perf_counter()
    found = []
    with torch.no_grad():
        for path in paths:
            embedding = model.encoder(torch.from_numpy(read(path))[None, None])
            found.append(model.quantizer.encode(embedding, model.frame_rate, codebooks * 0.75)[:, 0].numpy())
    return time.perf_counter() - started, found


def prepare(folder, out, name, codebooks):
    """Seconds that the whole command takes."""
    command = [sys.executable, "-m", "shortcut_cli", "prepare", "audio", str(folder), "--out", str(out)]
    command += ["--max-bad", "100%", "--set", f"tokenizer.weights={name}", "--set", f"tokenizer.codebooks={codebooks}"]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def different(out, expected, codebooks):
    """(source, our codes, the package's) of each document in a shards folder whose codes differ from the package's."""
    opened = Shards(out)
    place = collections.Counter()
    for line in (out / "documents.jsonl").read_text().splitlines():
        document = json.loads(line)
        split, size = document["split"], document["tokens"]
        ids = opened.split(split).read(place[split], size)[:-1].astype(np.int64)  # without the EOS id
        place[split] += size
        ours = (ids.reshape(-1, codebooks) - 1024 * np.arange(codebooks)).T
        if not np.array_equal(ours, expected[document["source"]]):
            yield document["source"], ours, expected[document["source"]]


def describe(model, path, ours, theirs):
    """Where two rows of codes (Q, frames) first differ, and how far apart the two entries are in double precision.

    A codebook quantizes what the codebooks before it left, and up to the first difference their codes are equal.
    """
    if ours.shape != theirs.shape:
        return f"{ours.shape[1]} frames, the package gave {theirs.shape[1]}"
    frame = int(np.flatnonzero((ours != theirs).any(0))[0])
    book = int(np.flatnonzero(ours[:, frame] != theirs[:, frame])[0])
    with torch.no_grad():
        residual = model.encoder(torch.from_numpy(read(path)).double()[None, None])[0, :, frame]
        layers = [layer._codebook.embed.double() for layer in model.quantizer.vq.layers]
        for layer, code in zip(layers[:book], ours[:book, frame], strict=True):
            residual = residual - layer[code]
        mine, other = (float((residual - layers[book][codes[book, frame]]).square().sum()) for codes in (ours, theirs))
    return (
        f"{(ours != theirs).sum()} codes, the first at frame {frame}, codebook {book}; in double precision its entry "
        f"is {abs(other - mine) / mine:.1e} {'nearer' if mine < other else 'farther'} than the package's"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--codebooks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", default="untrained:0")
    options = parser.parse_args()
    sources = dict(inputs.find([str(options.folder)], AudioTokenizer.suffixes).files)
    paths = list(sources.values())
    seconds = sum(info.frames / info.samplerate for info in map(soundfile.info, paths))
    model = plain_model(options.weights)
    print(f"{len(paths)} files, {seconds / 60:.1f} min, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    times = {"package": [], "shortcut prepare": [], "shortcut prepare, less its start": []}
    with tempfile.TemporaryDirectory() as scratch:
        short = Path(scratch) / "short"
        short.mkdir()
        soundfile.write(short / "a.wav", np.random.default_rng(0).normal(0, 0.1, 2400), 24_000)
        for number in range(options.rounds):
            spent, expected = plain(model, paths, options.codebooks)
            times["package"].append(spent)
            out = Path(scratch) / str(number)
            whole = prepare(options.folder, out, options.weights, options.codebooks)
            start = prepare(short, Path(scratch) / f"start-{number}", options.weights, options.codebooks)
            times["shortcut prepare"].append(whole)
            times["shortcut prepare, less its start"].append(whole - start)
        wrong = list(different(out, dict(zip(sources, expected, strict=True)), options.codebooks))
    base = statistics.median(times["package"])
    for name, found in times.items():
        median = statistics.median(found)
        print(f"{name}: {median:.1f} s, {seconds / median:.1f} times real time, {base / median:.2f} x the package")
    print(f"documents with different codes: {len(wrong)} of {len(paths)}")
    model = model.double()
    for source, ours, theirs in wrong:
        print(f"{source}: {describe(model, sources[source], ours, theirs)}")


if __name__ == "__main__":
    main()
