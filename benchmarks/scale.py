"""What the process that drives a preparation takes in time and memory, against the number of files and of workers.

    python benchmarks/scale.py files [10000 100000 1000000]
    python benchmarks/scale.py workers FOLDER [1 2]

files: as many inputs as are asked for, each with one document, whose hashes and scans are made up, so that only the
driver's own work is measured: what it keeps of each file from the hash on, equal documents, splits, places, and the
lines of documents.jsonl. Each number of files has a process of its own; memory is its peak, less what a process with no
files has, divided by the files. Finding the files on a disk is not in it.

workers: seconds of `shortcut prepare text FOLDER` with a divided write pass, by the number of workers.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from shortcut_cli.config import reading
from shortcut_cli.data import duplicates, splits
from shortcut_cli.data.assembly import PartWriter, laid_out
from shortcut_cli.data.documents import Document
from shortcut_cli.data.shards import FolderWriter
from shortcut_cli.stages import preparation
from shortcut_cli.tokenizers.scanning import Scanned

TOKENS = 1000  # of each document
PART = 10_000  # documents


def quiet(_):
    """No progress."""


def made_up(tokenizer, val, test, sources):
    """What a scan would find."""
    del tokenizer
    found = []
    for source in sources:
        tally = splits.Tally(val, test)
        document = Document(source.sha256, 0, TOKENS)
        tally.add(document)
        found.append(Scanned.of(tally, duplicates.key(document)))
    return found


def drive(count, folder):
    """Do the driver's part for so many files; yields (what, CPU seconds)."""
    recipe = reading.read("text", [f"data.shards={folder / 's'}"])
    # 50 characters are a usual length of a path below its root.
    names = (f"a-corpus/of-some-hundreds/of-folders/{number:09d}.txt" for number in range(count))
    root = Path("/data")
    began = time.process_time()
    hashed = [preparation.Input(name, root, hashlib.sha256(name.encode()).hexdigest()) for name in names]
    yield "list", time.process_time() - began
    began = time.process_time()
    tokenizer = SimpleNamespace(
        needs_fit=False, depends_on={}, variants=[], suffixes=(".txt",), group=lambda files, _: [list(files)]
    )
    made = preparation._Preparation(recipe, tokenizer, "documents", folder / "s", [], n_workers=1, report=quiet)
    made._in_workers = lambda groups: ((group, made_up(None, 0.05, 0.05, group)) for group in groups)
    everything = preparation._with_places(made._scan([made._source(file) for file in hashed], "scan"))
    yield "scan", time.process_time() - began
    began = time.process_time()
    total = made._total(everything)
    scanned = made._without_duplicates(everything, {})
    assign = made._assign(scanned, total, {})
    yield "divide", time.process_time() - began
    began = time.process_time()
    writer = PartWriter(folder / "parts", 32_000)
    writer.folder.mkdir()
    parts = 0
    for first in range(0, len(scanned), PART):
        with open(writer.documents(parts), "w") as stream:
            for source, one in scanned[first : first + PART]:
                ((split, size),) = assign(Document(one.only, source.start, one.size))
                record = {"source": source.relative, "sha256": source.sha256}
                stream.write(json.dumps([split, size + 1, {"byte": size, "character": size}, record]) + "\n")
        parts += 1
    yield "(parts)", time.process_time() - began  # what workers do
    began = time.process_time()
    with FolderWriter(folder / "out", 32_000, recipe.data.shard_tokens, eos=1) as out:
        out.leave_shards()
        shards = sum(1 for _ in laid_out(writer, parts, recipe.data.shard_tokens, out.place))
    yield f"places of {shards} shards", time.process_time() - began


def one(count):
    """Print what so many files take, as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        seconds = dict(drive(count, Path(folder)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


def measured(count):
    """What a process of its own says."""
    command = [sys.executable, __file__, "one", str(count)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def by_files(counts):
    """Print a line for each number of files."""
    base = measured(3)["peak"]
    print(f"a process with three files: {base / 1e6:.0f} MB")
    for count in counts:
        found = measured(count)
        each = (found["peak"] - base) / count
        spent = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in found["seconds"].items())
        print(f"{count:>10,} files: {found['peak'] / 1e6:,.0f} MB, {each:,.0f} bytes a file; CPU: {spent}", flush=True)


def by_workers(folder, counts):
    """Print seconds for each number of workers."""
    preparation.PART_SIZE, preparation.WORTH_PARTS = 1 << 22, 1
    for count in counts:
        with tempfile.TemporaryDirectory() as out:
            recipe = reading.read("text", [f"data.shards={out}/s"])
            began = time.monotonic()
            limits = {"n_workers": count, "max_bad": "1%", "report": quiet}
            manifest = preparation.prepare(recipe, [folder], Path(out, "s"), **limits)
            print(
                f"{count} workers: {time.monotonic() - began:.1f} s, manifest {manifest['checksum'][:12]}", flush=True
            )


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("files").add_argument("counts", nargs="*", type=int, default=[10_000, 100_000, 1_000_000])
    kinds.add_parser("one").add_argument("count", type=int)
    workers = kinds.add_parser("workers")
    workers.add_argument("folder")
    workers.add_argument("counts", nargs="*", type=int, default=[1, 2])
    options = parser.parse_args()
    if options.kind == "one":
        one(options.count)
    elif options.kind == "files":
        by_files(options.counts)
    else:
        by_workers(options.folder, options.counts)


if __name__ == "__main__":
    main()
