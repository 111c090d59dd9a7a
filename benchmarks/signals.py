"""Send signals to every long command at random moments, and check how it ends, what it leaves, and what follows.

    python benchmarks/signals.py [--rounds 60] [--seed 1] [--only train,prepare-midi] [--keep FOLDER]

A round starts a command in a session of its own and, at a random moment of its usual duration or of its first second,
sends SIGINT, SIGTERM or SIGHUP, once or twice 50 ms apart, to the process or to its group. Then it checks

- the exit code: 130 (SIGINT), 75 (SIGTERM, SIGHUP), or 0 if the command had ended;
- stderr: one panel below the notes of the command, no traceback, no complaint of a helper;
- that no process of the session is left, and no temporary file;
- that it ended within a second; a training within its step, validation and save (--patience, 10 s);
- of trainings, that the state is saved: the step that the panel names is the next one's start.

If it was ended, the same command is then run to its end. The files have to be those of an undisturbed run. Prints a
line per failure and a table; exits with 1 if there was one. Signals that the interpreter gets before it runs anything
of ours (--boot, 0.15 s) end it in its own way, which is counted apart.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGHUP: 75}
TINY = [
    *("train.steps=30", "train.warmup=2", "train.eval_every=10", "train.log_every=5", "train.batch_size=4"),
    *("model.layers=4", "model.width=32", "model.heads=2", "model.context=64", "eval.stride=32", "eval.batch_size=8"),
    *("sample.n=2", "sample.tokens=64"),
]
TEXT = [*TINY, "tokenizer.vocabulary=400"]
CODEC = ["train.steps=6", "train.eval_every=3", "train.log_every=1", "train.batch_size=2", "data.segment_s=0.5"]
# Times and paths differ between equal runs; so do the states of zip files that hold times.
VOLATILE = re.compile(r'"(seconds|tokens_per_s|tokens_per_second|peak_mb|step_seconds)": [^,}\n]*')
TRAININGS = {"train", "run", "compare", "codec", "demo"}
IGNORED = {".shortcut", "output.txt", "cost.json", "compare.json", "report.html", "resume.prev.pt", "resume.pt"}


def sets(settings):
    return [part for setting in settings for part in ("--set", setting)]


def commands(base):
    """By name: arguments of a command that works below the current folder, and whether it saves a state."""
    text = [*sets(TEXT), "--set", f"data.shards={base / 'shards'}"]
    ckpt = ["--ckpt", str(base / "run" / "run.pt")]
    return {
        "prepare-midi": ["prepare", "midi", str(base / "midi"), "--out", "o", "--set", "tokenizer.bpe=1100"],
        "prepare-text": ["prepare", "text", str(base / "texts"), "--out", "o", "--set", "tokenizer.vocabulary=400"],
        "prepare-audio": ["prepare", "audio", str(base / "wavs"), "--recipe", "audio-tiny", "--out", "o"],
        "train": ["train", "--recipe", "text-tiny", "--out", "o", *text],
        "eval": ["eval", *ckpt],
        "eval-files": ["eval", *ckpt, "--files", str(base / "texts")],
        "sample": ["sample", *ckpt, "--out", "o"],
        "attention": ["attention", *ckpt, "--out", "o", "--windows", "8"],
        "run": ["run", "--recipe", "text-tiny", str(base / "texts"), "--out", "o", *sets([*TEXT, "data.shards=s"])],
        "compare": ["compare", "--recipe", "text-tiny", "--models", "late_kv", "--seeds", "1", "--out", "o", *text],
        "codec": ["codec", "train", str(base / "wavs"), "--out", "o", *sets(CODEC)],
        "prove": ["prove", "resume", "--recipe", "text-tiny", "--kills", "1", *text],
        "prove-tokens": ["prove", "tokens", str(base / "shards"), str(base / "texts")],
        "inspect": ["inspect", str(base / "shards"), "--verify"],
        "demo": ["demo", "--out", "o"],
    }


def start(arguments, folder, environment):
    return subprocess.Popen(
        [sys.executable, "-m", "shortcut_cli", *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def alive(tag):
    """Command lines of the living processes whose environment has this tag."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"SIGNALS_ROUND={tag}\0".encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has ended, or is not ours
            continue
    return [line for line in found if line]  # a dead process that nobody has waited for has none


def content(folder):
    """The hash of each file that has to be the same after every run."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in IGNORED):
        data = path.read_bytes()
        if path.suffix in (".jsonl", ".json"):
            data = VOLATILE.sub("", data.decode()).encode()
        found[path.relative_to(folder).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def prepare_base(base):
    from shortcut_cli.demo import material

    (base / "texts").mkdir()
    chance = random.Random(1)
    words = ["".join(chance.choices("abcdefghij", k=chance.randint(2, 7))) for _ in range(300)]
    for number in range(12):
        (base / "texts" / f"{number}.txt").write_text(" ".join(chance.choices(words, k=2000)))
    (base / "midi").mkdir()
    material.write_midi(base / "midi", pieces=40, seed=1)
    (base / "wavs").mkdir()
    material.write_audio(base / "wavs", pieces=6, seed=1)
    listed = commands(base)
    run = ["prepare", "text", str(base / "texts"), "--recipe", "text-tiny", "--out", str(base / "shards")]
    run += ["--set", "tokenizer.vocabulary=400"]
    for arguments in (run, [*listed["train"][:3], "--out", str(base / "run"), *listed["train"][5:]]):
        done = start(arguments, base, os.environ)
        _, err = done.communicate()
        assert done.returncode == 0, err


class Rounds:
    """The rounds of one benchmark, and what went wrong in them."""

    def __init__(self, base, options):
        self.base, self.options = base, options
        self.chance = random.Random(options.seed)
        self.usual = {}  # by command: seconds, files
        self.failures = []
        self.counts = defaultdict(Counter)

    def environment(self, tag, folder):
        (folder / "tmp").mkdir(parents=True)
        named = {"SIGNALS_ROUND": tag, "TMPDIR": str(folder / "tmp"), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
        return os.environ | named

    def undisturbed(self, name, arguments):
        folder = self.base / f"whole-{name}"
        environment = self.environment(f"whole-{name}", folder)
        (folder / "w").mkdir()
        began = time.monotonic()
        process = start(arguments, folder / "w", environment)
        _, err = process.communicate()
        assert process.returncode == 0, f"{name}: {err}"
        self.usual[name] = time.monotonic() - began, content(folder / "w")

    def round(self, number, name, arguments):
        if name not in self.usual:
            self.undisturbed(name, arguments)
        seconds, expected = self.usual[name]
        folder, tag = self.base / f"round-{number}", f"{os.getpid()}-{number}"
        environment = self.environment(tag, folder)
        (folder / "w").mkdir()
        chosen = self.chance.choice(list(CODES))
        twice, group = self.chance.random() < 0.4, self.chance.random() < 0.4
        moment = self.chance.choice([self.chance.uniform(0, 1), self.chance.uniform(0, seconds)])
        case = f"round {number}: {name}, {chosen.name}{' twice' * twice}{' to the group' * group} at {moment:.2f} s"
        process = start(arguments, folder / "w", environment)
        time.sleep(moment)
        send, sent = os.killpg if group else os.kill, False
        for count in range(1 + twice):
            if count:
                time.sleep(0.05)
            if process.poll() is None:
                send(process.pid, chosen)
                sent = True
        took = time.monotonic()
        try:
            _, err = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, err = process.communicate()
        took = time.monotonic() - took
        problems = self.judge(name, process.returncode, chosen, err, took, moment, sent)
        if left := alive(tag):
            time.sleep(0.5)
            problems += [f"left: {line[:150]}" for line in alive(tag) or []]
            self.counts["all"]["helpers that took up to 0.5 s more"] += bool(left)
        problems += [
            f"temporary: {path.name}" for path in (folder / "tmp").iterdir() if path.name.startswith("shortcut")
        ]
        # What workers had begun to stage is removed with .staging when the preparation ends.
        unfinished = [path for path in (folder / "w").rglob(".*.tmp") if ".staging" not in path.parts]
        problems += [f"temporary: {path}" for path in unfinished]
        if process.returncode:
            problems += self.finish(arguments, folder / "w", environment, err)
        problems += differences(folder / "w", expected)
        self.counts[name]["rounds"] += 1
        self.counts[name]["failed"] += bool(problems)
        self.counts[name][f"exit {process.returncode}"] += 1
        for problem in problems:
            self.failures.append(f"{case}: {problem}")
            print(f"  {case}: {problem}", flush=True)
        if not self.options.keep:
            shutil.rmtree(folder, ignore_errors=True)

    def judge(self, name, code, chosen, err, took, moment, sent):
        """What is wrong with the end of a process."""
        if moment < self.options.boot and code in (-chosen, 1) and "shortcut_cli" not in err:
            self.counts["all"]["before anything of ours ran"] += 1
            return []
        if code == 0:
            # In the last moments of a command, whose work is done, a signal changes nothing.
            self.counts["all"]["was leaving when the signal came" if sent else "had ended before the signal"] += 1
            return [f"the signal was lost: exit code 0 after {took:.1f} s"] if sent and took > 1.0 else []
        self.counts["all"]["ended by the signal"] += 1
        problems = [] if code == CODES[chosen] else [f"exit code {code} instead of {CODES[chosen]}: {err[-300:]}"]
        if err.count("\u256d") != 1 or "Traceback" in err or "Warning" in err:
            problems.append(f"stderr: {err[-1500:]}")
        limit = self.options.patience if name in TRAININGS else 1.0
        if took > limit:
            problems.append(f"took {took:.1f} s")
        return problems

    def finish(self, arguments, folder, environment, err):
        """Run a command that was ended to its end; returns what is wrong with that."""
        process = start(arguments, folder, environment)
        _, again = process.communicate()
        if process.returncode:
            return [f"the same command then exits with {process.returncode}: {again[-1500:]}"]
        saved = re.search(r"stopped at step (\d+) of", err)
        if saved and f"resuming at step {saved.group(1)}" not in again:
            return [f"stopped at step {saved.group(1)}, then: {again[:300]}"]
        return []


def differences(folder, expected):
    """Which files are not those of an undisturbed run."""
    found = content(folder)
    return [f"differs: {path}" for path in found.keys() | expected.keys() if found.get(path) != expected.get(path)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="commands, with commas; default: all but demo, which takes minutes")
    parser.add_argument("--patience", type=float, default=10.0, help="seconds for a step, a validation and a save")
    parser.add_argument("--boot", type=float, default=0.15, help="seconds that Python takes to start")
    parser.add_argument("--keep", type=Path, help="keep all folders here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base = options.keep or Path(scratch)
        base.mkdir(exist_ok=True)
        prepare_base(base)
        every = commands(base)
        names = options.only.split(",") if options.only else [name for name in every if name != "demo"]
        rounds = Rounds(base, options)
        for number in range(options.rounds):
            name = names[number % len(names)]
            rounds.round(number, name, every[name])
    print(json.dumps({name: dict(count) for name, count in rounds.counts.items()}, indent=1))
    print(f"{options.rounds} rounds, {len({line.split(':')[0] for line in rounds.failures})} with failures")
    sys.exit(bool(rounds.failures))


if __name__ == "__main__":
    main()
