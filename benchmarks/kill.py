"""Kill `shortcut prepare`, or processes of a training, with SIGKILL at random moments; the result has to be the same.

    python benchmarks/kill.py midi|audio|text FOLDER [--rounds 20] [--set KEY=VALUE ...]
    python benchmarks/kill.py train FOLDER [--rounds 20] [--devices 2] [--set train.shard=fsdp ...]

One undisturbed run with one worker gives the bytes to compare with. Then every round prepares a new folder with 1, 2 or
5 workers and the arguments in another order. The whole process group is killed at a random moment and restarted, up to
five times, until it finishes. Prints how many rounds gave different bytes.

`train` trains a small model on the texts of FOLDER by `train --devices`, once undisturbed. Then a process of a random
rank is killed at a random moment, from the start of the interpreter to the end of the run, and the command starts all
again. A run that ends before there were --rounds kills is followed by another. Prints the moments of the kills, and how
many runs have other weights or losses. For a training in one process: `shortcut prove resume`.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.stages.proof import weights_sha256
from shortcut_cli.training import tensor_file
from shortcut_cli.training.run_log import read_log

TRAINED = ["train.steps=120", "train.warmup=10", "train.eval_every=3", "train.log_every=1", "train.eval_windows=4"]
TRAINED += ["train.precision=fp32", "train.batch_size=8", "model.width=192", "model.ffn=768"]


def folder_sha256(folder):
    """SHA-256 of all names and bytes, except the lock file."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".shortcut"):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def start(options, out, workers, paths):
    command = [sys.executable, "-m", "shortcut_cli", "prepare", options.domain, *map(str, paths), "--out", str(out)]
    command += ["--workers", str(workers), "--max-bad", "100%"]
    command += set_flags(options.settings)
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def set_flags(settings):
    return [part for setting in settings for part in ("--set", setting)]


class Training:
    """`train --devices` of one folder."""

    def __init__(self, shards, folder, devices, rounds, settings):
        command = [sys.executable, "-m", "shortcut_cli", "train", "--recipe", "text-tiny", "--out", str(folder)]
        command += ["--devices", str(devices), "--device", "cpu", "--no-report", "--max-restarts", str(rounds)]
        command += set_flags([*TRAINED, f"data.shards={shards}", *settings])
        self.folder, self.devices = folder, devices
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def workers(self):
        """Process ids by rank."""
        found = {}
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            try:
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                said = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if parent == self.process.pid else ()
            except OSError:  # it has ended
                continue
            found |= {int(text[5:]): pid for text in said if text.startswith(b"RANK=")}
        return found

    def is_new(self, before):
        """Whether all processes are there, and none of them was among those before."""
        now = self.workers()
        return len(now) == self.devices and not set(now.values()) & set(before.values())

    def moment(self):
        """What goes on: how many steps were logged; whether a state is being written."""
        steps = len([line for line in read_log(self.folder) if "loss" in line])
        named = set()
        for name in ("resume.pt", "resume.prev.pt"):
            try:
                named.add(tensor_file.describe(self.folder / name, "resume.pt")["parts"]["folder"])
            except (CheckFailed, UsageError, KeyError):  # it is not there, or whole
                continue
        saving = {place.name for place in self.folder.glob("state-*")} - named
        saving |= {place.name for place in self.folder.glob(".*.tmp")}
        return steps, bool(saving)

    def end(self):
        """Wait for its end, and require that it went well."""
        errors = self.process.communicate()[1]
        assert self.process.returncode == 0, errors


def results(folder):
    """What has to be the same: hashes of the weights, and the log without times."""
    lines = [{key: value for key, value in line.items() if key != "seconds"} for line in read_log(folder)]
    return [weights_sha256(folder / name) for name in ("resume.pt", "run.pt")], lines


def train(options):
    """Kill processes of trainings; returns whether any had another result."""
    chance, kills, different, runs, before = random.Random(options.seed), [], 0, 0, {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        prepare = [
            sys.executable,
            "-m",
            "shortcut_cli",
            "prepare",
            "text",
            str(options.folder),
            "--recipe",
            "text-tiny",
        ]
        subprocess.run([*prepare, "--out", str(root / "shards"), "--max-bad", "100%"], check=True, capture_output=True)
        began = time.monotonic()
        arguments = root / "shards", root / "whole", options.devices, 0, options.settings
        Training(*arguments).end()
        seconds = time.monotonic() - began
        expected = results(root / "whole")
        while len(kills) < options.rounds:
            runs, folder = runs + 1, root / f"killed-{runs}"
            training = Training(root / "shards", folder, options.devices, options.rounds, options.settings)
            while len(kills) < options.rounds:
                while not training.is_new(before) and training.process.poll() is None:
                    time.sleep(0.02)
                before = training.workers()
                try:
                    training.process.wait(chance.uniform(0, seconds))
                    break
                except subprocess.TimeoutExpired:
                    rank = chance.randrange(options.devices)
                    moment = training.moment() if (folder / "log.jsonl").exists() else (0, False)
                    try:
                        os.kill(before[rank], signal.SIGKILL)
                    except ProcessLookupError:  # the run ends
                        continue
                    kills.append((rank, *moment))
                    print(f"kill {len(kills)}: run {runs}, rank {rank}, {moment[0]} steps, {moment[1]}", flush=True)
            training.end()
            is_other = results(folder) != expected
            different += is_other
            print(f"run {runs}: {'other weights or losses' if is_other else 'the same'}", flush=True)
    ranks = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(Counter(rank for rank, *_ in kills).items()))
    print(f"{len(kills)} kills in {runs} runs of {options.devices} processes: {ranks};")
    print(f"  {sum(saving for *_, saving in kills)} while a state was written, ", end="")
    print(f"{sum(not steps for _, steps, _ in kills)} before the first step of a run")
    print(f"runs with other weights or losses: {different}")
    return bool(different)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", choices=["midi", "audio", "text", "train"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--devices", type=int, default=2, help="of train: how many processes")
    parser.add_argument("--set", dest="settings", action="append", default=[])
    options = parser.parse_args()
    if options.domain == "train":
        sys.exit(train(options))
    chance = random.Random(options.seed)
    different = kills = 0
    with tempfile.TemporaryDirectory() as scratch:
        began = time.monotonic()
        first = start(options, Path(scratch) / "whole", 1, [options.folder])
        assert first.wait() == 0, f"exit code {first.returncode}"
        seconds = time.monotonic() - began
        expected = folder_sha256(Path(scratch) / "whole")
        entries = sorted(options.folder.iterdir())
        for number in range(options.rounds):
            out = Path(scratch) / f"round{number}"
            for attempt in range(6):
                paths = [options.folder, options.folder.resolve(), *chance.sample(entries, min(3, len(entries)))]
                chance.shuffle(paths)
                process = start(options, out, chance.choice([1, 2, 5]), paths)
                try:
                    process.wait(chance.uniform(0.3, 1.0) * seconds if attempt < 5 else None)
                    break
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    kills += 1
            assert process.returncode == 0, f"exit code {process.returncode}"
            different += folder_sha256(out) != expected
    print(f"{options.domain}: {options.rounds} rounds, {kills} kills; folders with different bytes: {different}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
