"""What the process that drives a preparation takes in time and memory, against the number of files and of workers.

    python benchmarks/scale.py files [10000 100000 1000000] [--objects] [--in-order]
    python benchmarks/scale.py workers FOLDER [1 2]

files: as many inputs as are asked for, each with one document, whose bytes, hashes, scans and ids are made up, so that
only the driver's own work is measured: from the name of a file on, which comes in no order, to the lines of
documents.jsonl; the file system that gives names is not in it. Each number of files has a process of its own; memory is
its peak, less what a process with three files has, divided by the files. --objects: of a store, with ETags.
--in-order: results of scans come in the order of the files, as those of texts do.

workers: seconds of `shortcut prepare text FOLDER` with a divided write pass, by the number of workers.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from shortcut_cli.config import reading
from shortcut_cli.data import duplicates, inputs, objects, splits
from shortcut_cli.data.documents import Document
from shortcut_cli.data.hashes import Hashes
from shortcut_cli.stages import preparation
from shortcut_cli.tokenizers import tokenization
from shortcut_cli.tokenizers.encoding import PartEncoder
from shortcut_cli.tokenizers.scanning import Scanned

TOKENS = 1000  # of each document
PART = int(os.environ.get("PART", "10000"))  # documents of a part, which are Python objects while they are handed on
PRIME = 1_000_003  # in steps of which files are found


def quiet(_):
    """No progress."""


class MadeUp(Hashes):
    """Hashes of files and objects that are those of their names."""

    def sha256(self, name, _):
        """Read nothing."""
        return hashlib.sha256(name.encode()).hexdigest()

    def fetched(self, wanted, path):
        """Fetch nothing."""
        return self.sha256(wanted.name.partition("/")[2], path)


def scanned(source):
    """What a scan would find in a source."""
    tally = splits.Tally(0.05, 0.05)
    document = Document(source.sha256, 0, TOKENS)
    tally.add(document)
    return Scanned.of(tally, duplicates.key(document))


def written(work, part):
    """Write what a worker would write of a part, without the ids."""
    number, items = part
    with open(work.writer.documents(number), "w") as stream:
        for item in items:
            source = item.source
            ((split, size),) = item.assign(Document(source.sha256, source.start, source.size))
            record = {"source": source.relative, "sha256": source.sha256}
            stream.write(json.dumps([split, size + 1, {"byte": size, "character": size}, record]) + "\n")


class Tokenizer:
    """One without ids."""

    needs_fit, depends_on, description, variants, suffixes = False, {}, {}, [], (".txt",)
    vocabulary, eos, stride, unit, fingerprint = 32_000, 1, 1, "byte", ""

    def __init__(self, in_order):
        self.in_order = in_order

    def group(self, sources, _):
        """From the end, unless `in_order`."""
        places = range(len(sources))
        return ([place] for place in (places if self.in_order else reversed(places)))

    def save(self, folder):
        """Nothing."""


def listed(count, folder, remote):
    """The names of so many files, found in no order. 50 characters are a usual length of a path below its root."""
    search = inputs._Search((".txt",), None, folder / "fetched")
    store = SimpleNamespace(scheme="s3") if remote else None
    assert count % PRIME
    for number in range(count):
        number = number * PRIME % count  # noqa: PLW2901
        name = f"a-corpus/of-some-hundreds/of-folders/{number:09d}.txt"
        if store:
            version = (("size", TOKENS), ("ETag", f'"{number:032x}"'))
            search._add_object(name, objects.Object(store, f"bucket/{name}", version), is_root=False)
        else:
            search.names.add(name, "/data", f"/data/{name}")
    return search.result()


def drive(count, folder, remote, in_order):
    """Do the driver's part for so many files; yields (what, CPU seconds)."""
    began = time.process_time()

    def spent():
        nonlocal began
        before, began = began, time.process_time()
        return began - before

    found = listed(count, folder, remote)
    yield "list", spent()
    hashed, _ = preparation._hash(found, 1, quiet, None, MadeUp(folder / "hashes"))
    yield "hash", spent()
    tokenizer = Tokenizer(in_order)
    recipe = reading.read("text", [f"data.shards={folder / 's'}"])
    request = preparation._request(recipe, tokenizer, hashed)
    marks = {}

    def report(event):
        marks.setdefault(getattr(event, "task", ""), time.process_time())

    made = tokenization.Tokenization(recipe, tokenizer, "documents", folder / "s", [], n_workers=2, report=report)
    made._in_workers = lambda groups, _: ((group, [scanned(one) for one in group]) for group in groups)
    workers_s = 0

    def writing(work, jobs, _):
        nonlocal workers_s
        for job in jobs:
            first = time.process_time()
            if isinstance(work, PartEncoder):
                written(work, job)
            workers_s += time.process_time() - first
            yield job, None if isinstance(work, PartEncoder) else "0" * 64

    made._writing = writing
    yield "request", spent()
    write = made._write

    def timed(*arguments):
        marks["write"] = time.process_time()
        write(*arguments)

    made._write = timed
    tokenization.WORTH_PARTS, tokenization.PART_SIZE = 0, PART * TOKENS
    made.run(hashed, request)
    whole = began
    yield "scan and divide", marks["write"] - whole
    yield "(parts)", workers_s  # what workers do
    yield "write", spent() - (marks["write"] - whole) - workers_s


def one(count, remote, in_order):
    """Print what so many files take, as JSON."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        seconds = dict(drive(count, Path(folder), remote, in_order))
    seconds["wall"] = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


def measured(count, flags):
    """What a process of its own says."""
    command = [sys.executable, __file__, "one", str(count), *flags]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def by_files(counts, flags):
    """Print a line for each number of files."""
    base = measured(3, flags)["peak"]
    print(f"a process with three files: {base / 1e6:.0f} MB")
    for count in counts:
        found = measured(count, flags)
        each = (found["peak"] - base) / count
        spent = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in found["seconds"].items())
        print(f"{count:>10,} files: {found['peak'] / 1e6:,.0f} MB, {each:,.0f} bytes a file; CPU: {spent}", flush=True)


def cpu_seconds():
    """CPU seconds of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def by_workers(folder, counts):
    """Print seconds, of the clock and of all CPUs, for each number of workers."""
    tokenization.PART_SIZE, tokenization.WORTH_PARTS = 1 << 22, 1
    for count in counts:
        with tempfile.TemporaryDirectory() as out:
            recipe = reading.read("text", [f"data.shards={out}/s"])
            began, cpu = time.monotonic(), cpu_seconds()
            limits = {"n_workers": count, "max_bad": "1%", "report": quiet}
            manifest = preparation.prepare(recipe, [folder], Path(out, "s"), **limits)
            print(
                f"{count} workers: {time.monotonic() - began:.1f} s, {cpu_seconds() - cpu:.1f} CPU s, "
                f"manifest {manifest['checksum'][:12]}",
                flush=True,
            )


def main():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    files, single = kinds.add_parser("files"), kinds.add_parser("one")
    files.add_argument("counts", nargs="*", type=int, default=[10_000, 100_000, 1_000_000])
    single.add_argument("count", type=int)
    for each in (files, single):
        each.add_argument("--objects", action="store_true")
        each.add_argument("--in-order", action="store_true")
    workers = kinds.add_parser("workers")
    workers.add_argument("folder")
    workers.add_argument("counts", nargs="*", type=int, default=[1, 2])
    options = parser.parse_args()
    if options.kind == "one":
        one(options.count, options.objects, options.in_order)
    elif options.kind == "files":
        by_files(options.counts, [flag for flag in ("--objects", "--in-order") if flag in sys.argv])
    else:
        by_workers(options.folder, options.counts)


if __name__ == "__main__":
    main()
