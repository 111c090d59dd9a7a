"""Speed of encoding sound: `shortcut prepare audio` against the `encodec` package called file by file.

    python benchmarks/audio.py FOLDER [--codebooks 8] [--rounds 3] [--weights untrained:0]

Both read every sound file of FOLDER, bring it to 24 kHz mono by soxr, and encode it with the same weights, in turn; the
package as its README does it, in one process with as many threads as there are cores, model loading left out;
`shortcut` as a whole command, writing included, once as it is and once less its start: the time of the same command on
one clip of a tenth of a second. The codes are compared.
"""

import argparse
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

from shortcut_cli import inputs
from shortcut_cli.codec import encodec, weights
from shortcut_cli.shards import SPLITS, Shards
from shortcut_cli.tokenizers.audio import AudioTokenizer


def plain_model(name):
    """The package's model as it comes, weight norm and all."""
    drawn = weights.seed(name)
    model = encodec.untrained(*drawn) if drawn else encodec.load(weights.resolve(name))[0]
    return model.eval()


def plain(model, paths, codebooks):
    """Seconds of the package, and the codes of each file, (Q, frames)."""
    started = time.perf_counter()
    found = []
    with torch.no_grad():
        for path in paths:
            x, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
            mono = soxr.resample(x.mean(axis=1), rate_hz, 24_000) if rate_hz != 24_000 else x.mean(axis=1)
            embedding = model.encoder(torch.from_numpy(mono)[None, None])
            found.append(model.quantizer.encode(embedding, model.frame_rate, codebooks * 0.75)[:, 0].numpy())
    return time.perf_counter() - started, found


def prepare(folder, out, name, codebooks):
    """Seconds of the whole command."""
    command = [sys.executable, "-m", "shortcut_cli", "prepare", "audio", str(folder), "--out", str(out)]
    command += ["--max-bad", "100%", "--set", f"tokenizer.weights={name}", "--set", f"tokenizer.codebooks={codebooks}"]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def different(out, expected, codebooks):
    """How many of the documents in a shards folder have codes that the package did not give."""
    opened = Shards(out)
    wanted = {(codes + 1024 * np.arange(codebooks)[:, None]).T.astype(np.uint16).tobytes() for codes in expected}
    wrong = 0
    for name in SPLITS:
        split = opened.split(name)
        ids = split.read(0, split.tokens)
        ends = np.flatnonzero(ids == codebooks * 1024)
        for first, last in zip(np.concatenate(([0], ends[:-1] + 1)), ends, strict=True):
            wrong += ids[first:last].astype(np.uint16).tobytes() not in wanted
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--codebooks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--weights", default="untrained:0")
    options = parser.parse_args()
    paths = [path for _, path in inputs.find([str(options.folder)], AudioTokenizer.suffixes).files]
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
        wrong = different(out, expected, options.codebooks)
    base = statistics.median(times["package"])
    for name, found in times.items():
        median = statistics.median(found)
        print(f"{name}: {median:.1f} s, {seconds / median:.1f} times real time, {base / median:.2f} x the package")
    print(f"documents with other codes: {wrong} of {len(paths)}")


if __name__ == "__main__":
    main()
