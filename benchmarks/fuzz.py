"""Mutation fuzzing of every reader of foreign files: it may read a mutant, reject it, or raise a ShortcutError.

    python benchmarks/fuzz.py [--mutants 10000] [--seed 1] [TARGET ...]

Targets: idx, manifest, recipe, midi, wav; and of run.pt: checkpoint (its bytes), records (of its zip file), program (of
its pickle) and values (of its fields). Mutated checkpoints and manifests get a correct checksum, so that the code
behind its check is reached. MIDI and WAV run in worker processes, as in `prepare`; no other mutant may take more than
MOST_SECONDS, or more than MOST_BYTES. tests/test_fuzz.py runs the same with a few hundred mutants.
"""

import argparse
import collections
import hashlib
import itertools
import json
import pickletools
import random
import resource
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from pytorch_zip import sealed, zipped

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

MOST_SECONDS = 10
MOST_BYTES = 500 << 20  # more than before the first mutant
BOMB = b"cbuiltins\nbytearray\ncbuiltins\nbytearray\n\x8a\x05\x00^\xd0\xb2\x00\x85R\x85R"  # 3 GB, twice
OPERATIONS = (
    *(BOMB, b"]", b"}", b"(", b")", b"N", b"0", b"1", b"2", b"t", b"e", b"u", b"s", b"a", b"b", b"R", b"Q", b"."),
    *(b"\x85", b"\x86", b"\x93", b"q\0", b"h\0", b"]q\0h\0a", b"ccollections\nOrderedDict\n", b"cos\nsystem\n"),
    *(b"ccollections\nOrderedDict\n)R}X\1\0\0\0aK\1sb", b"K\xff", b"\x8a\x08" + b"\x7f" * 8, b"X\xff\xff\xff\x7f"),
)
VALUES = (0, -1, 1, 600, 10**6, 10**8, 10**9, 2**62, 1e308, float("nan"), True, None, "", "x" * 10**5, [], {}, [[[[]]]])


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


def mutate_records(material, chance):
    """A run.pt with records renamed, repeated, hidden behind others, deflated or left out, or with headers that lie."""
    found = [*material.entries]
    lies = {}
    for _ in range(chance.randint(1, 3)):
        number = chance.choice((0, chance.randrange(len(found))))
        name, data = found[number]
        variants = (name.upper(), f"sub/{name}", f"../{name}", name, chance.choice(found)[0], name[:-1])
        kind = chance.randrange(5)
        if kind == 0:  # another record in its place
            found[number] = (chance.choice(variants), data)
            found.insert(chance.randrange(len(found)), (chance.choice(variants), b"\x80\x02" + BOMB + b"."))
        elif kind == 1:
            found[number] = (chance.choice(variants), data)
        elif kind == 2:
            found.insert(chance.randrange(len(found)), (chance.choice(variants), chance.choice(found)[1]))
        elif kind == 3 and len(found) > 1:
            del found[number]
        else:
            field = chance.choice(("flags", "method", "crc", "packed", "size", "start", "count"))
            size = 2 if field in ("flags", "method", "count") else 4
            lies[chance.choice(("local", "behind", "central", "end")), name] = {
                field: chance.choice(EXTREMES) % 256**size
            }

    def change(kind, name, fields):
        told = lies.get((kind, name), {})
        fields.update({field: value for field, value in told.items() if field in fields})

    return sealed(zipped(found, change))


def mutate_program(material, chance):
    """A run.pt whose pickle has operations inserted, repeated, moved or left out, or other numbers in them."""
    whole = dict(material.entries)["data.pkl"]
    places = [place for _, _, place in pickletools.genops(whole)] + [len(whole)]
    parts = [whole[first:end] for first, end in itertools.pairwise(places)]
    for _ in range(chance.randint(1, 3)):
        place, kind = chance.randrange(1, len(parts)), chance.randrange(5)
        if kind == 0:
            parts.insert(place, chance.choice(OPERATIONS) * chance.choice((1, 1, 1, 2, 100, 10**5)))
        elif kind == 1:
            parts[place] *= chance.choice((2, 100, 10**5))
        elif kind == 2:
            del parts[place]
        elif kind == 3:
            parts.insert(place, parts.pop(chance.randrange(1, len(parts))))
        elif len(parts[place]) > 1:
            size = chance.randint(1, len(parts[place]) - 1)
            number = chance.choice(EXTREMES) % 256**size
            parts[place] = parts[place][:-size] + number.to_bytes(size, "little")
    program = b"".join(parts)
    return sealed(zipped([(name, program if name == "data.pkl" else data) for name, data in material.entries]))


def mutate_values(material, chance):
    """A run.pt with other values in its fields, its recipe and its tensors, written as `train` writes it."""

    def changed(tree):
        name = chance.choice([*tree])
        value = tree[name]
        if isinstance(value, dict) and value and chance.random() < 0.9:
            return tree | {name: changed(value)}
        if isinstance(value, torch.Tensor) and chance.random() < 0.5:
            return tree | {
                name: chance.choice(
                    (value[:0], value.flatten().repeat(2), value.double(), chance.choice([*tree.values()]))
                )
            }
        return tree | {chance.choice((name, f"{name}x")): chance.choice(VALUES)}

    content = material.content
    for _ in range(chance.randint(1, 3)):
        content = changed(content)
    path = material.folder / "values.pt"
    tensor_file.save(path, content)
    return path.read_bytes()


TARGETS = ["idx", "manifest", "recipe", "checkpoint", "records", "program", "values", "midi", "wav"]
STRUCTURED = {"records": mutate_records, "program": mutate_program, "values": mutate_values}


def ran_out_of_memory(error):
    """Whether an error, or one behind it, is a MemoryError."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def guarded():
    """Within the block the process gets at most four times MOST_BYTES more memory (on Linux)."""
    status, limits = Path("/proc/self/status"), resource.getrlimit(resource.RLIMIT_DATA)
    if status.exists():
        data = next(line for line in status.read_text().splitlines() if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, ((int(data.split()[1]) << 10) + 4 * MOST_BYTES, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


def peak_bytes():
    """The most memory that this process has had so far (on Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextmanager
def measured(before):
    """Raises AssertionError if the block takes too long, or more memory than MOST_BYTES above `before`."""
    began, problem = time.process_time(), None
    try:
        yield
    except BaseException as error:
        problem = error
        raise
    finally:
        seconds, grown = time.process_time() - began, peak_bytes() - before
        assert seconds < MOST_SECONDS, f"{seconds:.0f} s"
        assert grown < MOST_BYTES, f"{grown:,} bytes"
        assert not ran_out_of_memory(problem), "out of memory"


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
        with zipfile.ZipFile(folder / "run" / "run.pt") as archive:
            self.entries = [(name.partition("/")[2], archive.read(name)) for name in archive.namelist()]
        self.content = tensor_file.load(folder / "run" / "run.pt", "run.pt")
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
        digest = hashlib.sha256(content).hexdigest()
        self.run_of(content + tensor_file.SEAL + digest.encode())

    def run_of(self, content):
        path = self.folder / "fuzz.pt"
        path.write_bytes(content)
        runs.open_run(path, "cpu").tokenizer()

    records_of = program_of = values_of = run_of


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
    outcomes = collections.Counter()
    if target in ("midi", "wav"):
        work = {"midi": read_midi, "wav": read_wav}[target]
        jobs = ((number, mutate(getattr(material, target), chance)) for number in range(mutants))
        limits = {"workers": 2, "timeout_s": 60, "memory_mb": 2000}
        for _, result in workers.in_order(work, jobs, (str(material.folder),), **limits):
            outcomes[f"rejected: {str(result).split(':')[0][:50]}" if isinstance(result, Rejected) else "read"] += 1
        return outcomes
    with guarded():
        return outcomes_of(material, target, mutants, chance)


def outcomes_of(material, target, mutants, chance):
    """The outcomes of a target that is read in this process."""
    outcomes, before = collections.Counter(), peak_bytes()
    for _ in range(mutants):
        made = STRUCTURED.get(target)
        content = made(material, chance) if made else mutate(getattr(material, target), chance)
        try:
            with measured(before):
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
    parser.add_argument("targets", nargs="*", default=TARGETS)
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
