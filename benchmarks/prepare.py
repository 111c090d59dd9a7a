"""Preparation speed on your files, beside plain calls of the libraries underneath.

    python benchmarks/prepare.py midi FOLDER [--rounds 3]
    python benchmarks/prepare.py text FOLDER [--rounds 3]

midi: `shortcut prepare midi` (the whole command, one worker per core) against one process that loads each file with
symusic and tokenizes it with MidiTok's REMI with the same settings. text: `shortcut prepare text` with a given model
(the whole command) against SentencePiece's own threaded `encode` of the same lines. Both alternate; medians; the files
are in the page cache.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import miditok
import sentencepiece
import symusic

from shortcut_cli import registry
from shortcut_cli.config import reading


def prepare(domain, folder, out, *settings):
    """Seconds that the whole command takes."""
    command = [sys.executable, "-m", "shortcut_cli", "prepare", domain, str(folder), "--out", str(out)]
    command += ["--max-bad", "100%", *(part for setting in settings for part in ("--set", setting))]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def plain_midi(folder):
    """Seconds that MidiTok takes in one process, without imports."""
    options = reading.read("music", []).tokenizer
    base = registry.load(registry.TOKENIZERS, "midi")(options).base
    tokenizer = miditok.REMI(base.config)
    started = time.perf_counter()
    for path in sorted(folder.rglob("*.mid")) + sorted(folder.rglob("*.midi")):
        score = symusic.Score(path)
        for track in score.tracks:  # MidiTok without programs fails at the pedals of any track but a piano's
            track.program, track.is_drum = 0, False
        tokenizer(score)
    return time.perf_counter() - started


def plain_text(folder, model):
    """Seconds that SentencePiece's threaded encode takes for all lines, one list per file."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    started = time.perf_counter()
    for path in sorted(folder.rglob("*.txt")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        processor.encode(lines, num_threads=os.cpu_count())
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", choices=["midi", "text"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    times = {"shortcut": [], "library": []}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        settings = []
        if options.domain == "text":
            prepare("text", options.folder, work / "first")
            (model,) = (work / "first" / "tokenizer").glob("*.model")
            settings = [f"tokenizer.model={model}"]
        for number in range(options.rounds):
            times["shortcut"].append(prepare(options.domain, options.folder, work / f"round{number}", *settings))
            plain = plain_midi(options.folder) if options.domain == "midi" else plain_text(options.folder, model)
            times["library"].append(plain)
    ours, theirs = (statistics.median(times[name]) for name in ("shortcut", "library"))
    print(f"{options.domain}: shortcut prepare {ours:.2f} s (whole command, {os.cpu_count()} cores)")
    print(f"{options.domain}: plain library {theirs:.2f} s; ratio of throughputs {theirs / ours:.2f}")


if __name__ == "__main__":
    main()
