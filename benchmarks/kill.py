"""Kill `shortcut prepare` with SIGKILL at random moments and restart it; the folder has to end with the same bytes.

    python benchmarks/kill.py midi|audio|text FOLDER [--rounds 20] [--set KEY=VALUE ...]

One undisturbed run with one worker gives the bytes to compare with. Then every round prepares a new folder with 1, 2 or
5 workers and the arguments in another order. The whole process group is killed at a random moment and restarted, up to
five times, until it finishes. Prints how many rounds gave different bytes. For training: `shortcut prove resume`.
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
from pathlib import Path


def folder_sha256(folder):
    """SHA-256 of all names and bytes, except the lock file."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".shortcut"):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def start(options, out, workers, paths):
    command = [sys.executable, "-m", "shortcut_cli", "prepare", options.domain, *map(str, paths), "--out", str(out)]
    command += ["--workers", str(workers), "--max-bad", "100%"]
    command += [part for setting in options.settings for part in ("--set", setting)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", choices=["midi", "audio", "text"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", dest="settings", action="append", default=[])
    options = parser.parse_args()
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
