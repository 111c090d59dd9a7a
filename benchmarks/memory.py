"""Peak memory of a command at two sizes of its data, ten times apart, and their ratio.

    python benchmarks/memory.py [audio] [text] [midi] [train] [divided] [--scale 1.0]

Scale 1 compares 6 with 60 minutes of sound, 100 MB with 1 GB of text, 300 with 3,000 MIDI files, and 30 training steps
on 1 with 10 million tokens; `divided` takes two steps of 117M parameters, divided over two processes. The data is
random; the number is the largest resident set of any process of the command.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import symusic

from shortcut_cli.data import shards

RATE_HZ = 24_000


def make_audio(folder, amount):
    """One file of noise, `amount` minutes long."""
    random = np.random.default_rng(0)
    with soundfile.SoundFile(folder / "noise.wav", "w", RATE_HZ, 1, "PCM_16") as sound:
        for _ in range(round(amount)):
            sound.write(random.standard_normal(60 * RATE_HZ) * 0.1)


def make_text(folder, amount):
    """One file of `amount` MB: words from a vocabulary of 20,000, by Zipf's law."""
    random = np.random.default_rng(0)
    words = np.array(["".join(random.choice(list("abcdefghijklmnopqrst"), 6)) for _ in range(20_000)])
    with open(folder / "words.txt", "w", encoding="ascii") as stream:
        while stream.tell() < amount * 1e6:
            stream.write(" ".join(words[np.minimum(random.zipf(1.2, 10_000), 20_000) - 1]) + "\n")


def make_midi(folder, amount):
    """`amount` files of 50 random notes."""
    random = np.random.default_rng(0)
    for number in range(round(amount)):
        track = symusic.Track()
        for place in range(50):
            track.notes.append(symusic.Note(place * 120, 120, int(random.integers(30, 90)), 64))
        score = symusic.Score(480)
        score.tracks.append(track)
        score.dump_midi(folder / f"{number:06d}.mid")


def make_train(folder, amount):
    """Shards with `amount` million random tokens, as the recipe text-tiny would make them."""
    random, vocabulary = np.random.default_rng(0), 28
    with shards.FolderWriter(folder / "shards", vocabulary, 1 << 28, eos=27) as writer:
        for name, count in (("train", amount * 1e6), ("val", 1e5), ("test", 1e5)):
            blocks = (random.integers(0, 27, 100_000) for _ in range(round(count / 1e5)))
            writer.add(name, blocks, {"byte": int(count)}, {})
        tokenizer = {"name": "text", "fingerprint": "", "vocabulary": 28, "end": 27, "unit": "byte"}
        request = {"tokenizer": text_options()}
        writer.finish([], {"request": request, "tokenizer": tokenizer})


def text_options():
    from shortcut_cli.config import reading

    return reading.read("text-tiny", ["tokenizer.algorithm=chars"]).tokenizer.model_dump()


COMMANDS = {
    "audio": ["prepare", "audio", "DATA", "--out", "OUT", "--set", "tokenizer.weights=untrained:0"],
    "text": ["prepare", "text", "DATA", "--out", "OUT"],
    "midi": ["prepare", "midi", "DATA", "--out", "OUT"],
}
COMMANDS["train"] = ["train", "--recipe", "text-tiny", "--out", "OUT", "--set", "data.shards=DATA/shards"]
COMMANDS["train"] += ["--set", "tokenizer.algorithm=chars", "--set", "train.steps=30", "--set", "train.warmup=1"]
COMMANDS["divided"] = [*COMMANDS["train"], "--devices", "2", "--no-report"]
for setting in ("train.steps=2", "train.shard=fsdp", "train.batch_size=2", "train.eval_windows=2", "model.context=64"):
    COMMANDS["divided"] += ["--set", setting]
for setting in ("model.name=gpt", "model.layers=16", "model.width=768", "model.heads=12", "model.ffn=3200"):
    COMMANDS["divided"] += ["--set", setting]
SIZES = {"audio": (make_audio, 6, "min"), "text": (make_text, 100, "MB"), "midi": (make_midi, 300, "files")}
SIZES["train"] = SIZES["divided"] = (make_train, 1, "M tokens")


def peak_mb(what, amount, make):
    """Largest resident set of any process of the command, MB."""
    with tempfile.TemporaryDirectory() as scratch:
        data, out = Path(scratch) / "data", Path(scratch) / "out"
        data.mkdir()
        make(data, amount)
        arguments = [part.replace("DATA", str(data)).replace("OUT", str(out)) for part in COMMANDS[what]]
        # In its own process, so that the peak of its children is that of this command only.
        script = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True)"
        script += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        command = [sys.executable, "-c", script, sys.executable, "-m", "shortcut_cli", *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
        return int(done.stdout) / 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(SIZES))
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    for what in options.what:
        make, amount, unit = SIZES[what]
        small, large = (peak_mb(what, amount * options.scale * factor, make) for factor in (1, 10))
        sizes = f"{amount * options.scale:g} and {amount * options.scale * 10:g} {unit}"
        print(f"{what}: {sizes}: {small:,.0f} and {large:,.0f} MB, ratio {large / small:.2f}", flush=True)


if __name__ == "__main__":
    main()
