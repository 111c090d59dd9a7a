"""Mutation fuzzing of every reader of foreign files: it may read a mutant, reject it, or raise a ShortcutError.

    python benchmarks/fuzz.py [--mutants 10000] [--seed 1] [TARGET ...]

Targets: idx, manifest, recipe, checkpoint, midi, wav. Mutated checkpoints and manifests get a correct checksum, so that
the code behind its check is reached. MIDI and WAV run in worker processes, as in `prepare`. tests/test_fuzz.py runs the
same with a few hundred mutants.
"""

import argparse
import collections
import hashlib
import json
import random
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from shortcut_cli.config import reading
from shortcut_cli.data import shards, workers
from shortcut_cli.data.documents import Source
from shortcut_cli.data.shards import Shards
from shortcut_cli.data.sound import SoundReader
from shortcut_cli.demo import material as demo_material
from shortcut_cli.errors import Rejected, ShortcutError
from shortcut_cli.inference import runs
from shortcut_cli.stages.preparation import prepare
from shortcut_cli.stages.training import train
from shortcut_cli.tokenizers.midi import MidiOptions, MidiTokenizer
from shortcut_cli.training import tensor_file

EXTREMES = (0, 1, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
WORDS = (b"null", b"-1", b"1e999", b"{}", b"[]", b'""', b"99999999999999999999", b"true", b"../../x", b"/etc/passwd")


def quiet(*_, **__):
    pass


def mutate(content, chance):
    """A copy with one to four changes: bits, bytes, integers, parts moved, cut or repeated, words of JSON and TOML."""
    data = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data) + 1)
        kind = chance.randrange(7)
        if kind == 0 and place < len(data):
            data[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[place : place + 1] = bytes([chance.randrange(256)])
        elif kind == 2:
            size = chance.choice((1, 2, 4, 8))
            number = chance.choice(EXTREMES) % 256**size
            data[place : place + size] = number.to_bytes(size, chance.choice(("little", "big")))
        elif kind == 3:
            del data[place : place + chance.choice((1, 4, 16, len(data)))]
        elif kind == 4:
            data[place:place] = data[place : place + chance.choice((1, 8, 64))]
        elif kind == 5:
            data[place : place + chance.choice((0, 1, 4))] = chance.choice(WORDS)
        else:
            other = chance.randrange(len(data) + 1)
            data[place : place + 8] = data[other : other + 8]
    return bytes(data)


class Material:
    """Small valid files to mutate, made once: a shards folder, a run, a recipe, a MIDI and a WAV file."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "texts").mkdir(parents=True)
        for number in range(12):
            (folder / "texts" / f"{number}.txt").write_text(f"text number {number}\n" * 20)
        settings = ["tokenizer.algorithm=chars", "train.steps=2", "train.warmup=1", "train.eval_every=2"]
        settings += ["tokenizer.alphabet=\n abcdefghijklmnopqrstuvwxyz0123456789", f"data.shards={folder / 'shards'}"]
        settings += ["model.context=32", "eval.stride=32", "model.width=16", "model.heads=2", "model.ffn=32"]
        config = reading.read("text-tiny", settings)
        prepare(config, [str(folder / "texts")], folder / "shards", n_workers=1, max_bad="0", report=quiet)
        train(config, folder / "run", device="cpu", resume="never", report=quiet, stop=nullcontext(lambda: None))
        demo_material.write_midi(folder / "midi", pieces=1, seed=1)
        demo_material.write_audio(folder / "wavs", pieces=1, seed=1)
        self.recipe = (folder / "run" / "recipe.toml").read_bytes()
        self.manifest = (folder / "shards" / "manifest.json").read_bytes()
        self.idx = (folder / "shards" / "train-00000.idx").read_bytes()
        whole = (folder / "run" / "run.pt").read_bytes()
        self.checkpoint = whole[: -tensor_file.SEAL_BYTES]
        self.midi = next((folder / "midi").glob("*.mid")).read_bytes()
        self.wav = next((folder / "wavs").glob("*.wav")).read_bytes()[:20_000]

    def idx_of(self, content):
        stem = self.folder / "shards" / "fuzz"
        stem.with_suffix(".bin").write_bytes((self.folder / "shards" / "train-00000.bin").read_bytes())
        stem.with_suffix(".idx").write_bytes(content)
        shard = shards.read_shard(stem)
        assert int(shard.lengths.sum(dtype="int64")) == len(shard.ids)

    def manifest_of(self, content):
        try:
            tree = json.loads(content)
            tree.pop("checksum", None)
            tree["checksum"] = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
            content = json.dumps(tree).encode()
        except (ValueError, AttributeError, RecursionError):
            pass
        path = self.folder / "shards" / "manifest.json"
        path.write_bytes(content)
        try:
            opened = Shards(path.parent)
            for name in shards.SPLITS:
                split = opened.split(name)
                split.read(0, min(split.tokens, 10))
            list(shards.verify(path.parent))
        finally:
            path.write_bytes(self.manifest)

    def recipe_of(self, content):
        path = self.folder / "fuzz.toml"
        path.write_bytes(content)
        reading.read(str(path))

    def checkpoint_of(self, content):
        path = self.folder / "fuzz.pt"
        digest = hashlib.sha256(content).hexdigest()
        path.write_bytes(content + tensor_file.SEAL + digest.encode())
        runs.open_run(path, "cpu").tokenizer()


def read_midi(folder, number_and_content):
    """In a worker: tokenize a mutant."""
    number, content = number_and_content
    path = Path(folder) / f"fuzz{number}.mid"
    path.write_bytes(content)
    source = Source(path, path.name, "", path.with_suffix(".ids"))
    try:
        return sum(document.size for document in MidiTokenizer(MidiOptions(name="midi")).scan(source))
    finally:
        for left in path.parent.glob(f"fuzz{number}.*"):
            left.unlink()


def read_wav(folder, number_and_content):
    """In a worker: read a mutant to its end."""
    number, content = number_and_content
    path = Path(folder) / f"fuzz{number}.wav"
    path.write_bytes(content)
    try:
        return sum(len(block) for block in SoundReader(path))
    finally:
        path.unlink()


def fuzz(material, target, mutants, seed):
    """Count the outcomes. Any exception but ShortcutError and Rejected is raised, and its mutant kept as `found`."""
    chance = random.Random(f"{seed} {target}")
    whole = getattr(material, target)
    outcomes = collections.Counter()
    if target in ("midi", "wav"):
        work = {"midi": read_midi, "wav": read_wav}[target]
        jobs = ((number, mutate(whole, chance)) for number in range(mutants))
        limits = {"workers": 2, "timeout_s": 60, "memory_mb": 2000}
        for _, result in workers.in_order(work, jobs, (str(material.folder),), **limits):
            outcomes[f"rejected: {str(result).split(':')[0][:50]}" if isinstance(result, Rejected) else "read"] += 1
        return outcomes
    for _ in range(mutants):
        content = mutate(whole, chance)
        try:
            getattr(material, f"{target}_of")(content)
        except ShortcutError as error:
            outcomes[type(error).__name__] += 1
        except BaseException:
            (material.folder / "found").write_bytes(content)
            raise
        else:
            outcomes["read"] += 1
    return outcomes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=["idx", "manifest", "recipe", "checkpoint", "midi", "wav"])
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        material = Material(Path(scratch))
        for target in options.targets:
            began = time.monotonic()
            outcomes = fuzz(material, target, options.mutants, options.seed)
            print(
                f"{target}: {options.mutants} mutants in {time.monotonic() - began:.0f} s, {dict(outcomes)}", flush=True
            )


if __name__ == "__main__":
    sys.exit(main())
