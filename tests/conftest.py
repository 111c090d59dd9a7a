"""What several tests share: running the command, small real runs, and a cache folder for tests only."""

import gc
import json
import os
import select
import signal
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest

from shortcut_cli import files

if "PYTEST_XDIST_WORKER" in os.environ:  # workers inherit the environment of the process that starts them
    os.environ["OMP_NUM_THREADS"] = "1"
    # Tests start hundreds of processes, each of which would else compile the package again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup; processes inherit it, and are to end by SIGHUP
    signal.signal(signal.SIGHUP, lambda *_: None)  # which they do not inherit
# torch's compiler makes hundreds of thousands of objects with few reference cycles; fewer collections speed it up.
gc.set_threshold(50_000)
USERS_CACHE = files.cache_folder()
PATIENCE_S = 600
# Files that take long begin first, and the rest fills the time that they wait, and the end.
LONG = ("hosts", "compare_ray", "parallel", "preparation", "models", "compare", "codec", "cli", "browser", "stores")


def pytest_xdist_auto_num_workers():
    """One more than there are cores: tests wait for timeouts, for processes that start, and for the disk."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items):
    """Files in the order in which workers take them."""
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """No test writes into the user's cache."""
    os.environ["SHORTCUT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _warm_process():
    yield
    if warm.cache_info().currsize:
        warm().communicate(timeout=60)


@cache
def warm():
    """The process of warm.py."""
    command = [sys.executable, Path(__file__).parent / "warm.py"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def shortcut(*arguments, cwd, check=0, fresh=False, **environment):
    """Run the command and check its exit code, unless `check` is None; returns what `subprocess.run` does.

    It runs in a fork of a process that has imported torch already. fresh: in a new process instead.
    """
    arguments, environment = list(map(str, arguments)), os.environ | {"COLUMNS": "200"} | environment
    with NamedTemporaryFile("r+") as stdout, NamedTemporaryFile("r+") as stderr:
        if fresh:
            command = [sys.executable, "-m", "shortcut_cli", *arguments]
            code = subprocess.run(
                command,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                check=False,
                timeout=PATIENCE_S,
            ).returncode
        else:
            job = {"arguments": arguments, "cwd": str(cwd), "environment": environment}
            warm().stdin.write(json.dumps(job | {"stdout": stdout.name, "stderr": stderr.name}) + "\n")
            warm().stdin.flush()
            assert select.select([warm().stdout], [], [], PATIENCE_S)[0], f"{arguments} did not end"
            code = int(warm().stdout.readline())
        stdout.seek(0)
        stderr.seek(0)
        done = subprocess.CompletedProcess(arguments, code, stdout.read(), stderr.read())
    assert check in (None, done.returncode), f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def allowed(tokenizer, ids, left=10**6):
    """Which ids may follow `ids` in a sample, if `left` are still to come."""
    constraint = tokenizer.constraint()
    for token in ids:
        constraint.push(int(token))
    return constraint.allowed(left)


def quiet(*_, **__):
    """A `report` that ignores its events."""


@contextmanager
def without_workers():
    """A block in which files are read in this process; to start another takes up to two seconds."""
    from shortcut_cli.data import workers

    def in_order(work, jobs, fixed, **_):
        return ((job, work(*fixed, job)) for job in jobs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(workers, "in_order", in_order)
        yield


@pytest.fixture
def in_this_process():
    """Scans without worker processes."""
    with without_workers():
        yield


def write_pieces(folder: Path) -> None:
    """Write 12 MIDI files, half of them in a folder below."""
    from shortcut_cli.demo import material

    (folder / "more").mkdir(parents=True)
    material.write_midi(folder, pieces=6, seed=1)
    material.write_midi(folder / "more", pieces=6, seed=2)


def write_texts(folder: Path, count: int = 30) -> None:
    """Write small texts with some regularity, all different."""
    verbs = ("walks", "runs", "sits", "jumps", "sleeps", "waits", "eats", "drinks", "sings", "reads", "writes", "plays")
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        animals = enumerate(("cat", "dog", "bird") * 8)
        lines = [f"the {w} of number {number + i} {verbs[(number * i) % 12]} again\n" for i, w in animals]
        (folder / f"{number:03d}.txt").write_text("".join(lines))


TEXT_SETTINGS = (
    "tokenizer.algorithm=chars",
    "tokenizer.alphabet=\n abcdefghijklmnopqrstuvwxyz0123456789",
    "train.steps=12",
    "train.batch_size=8",
    "train.warmup=2",
    "train.eval_every=4",
    "train.log_every=2",
)


def set_flags(*settings):
    """--set flags for a subprocess."""
    return [part for setting in settings for part in ("--set", setting)]


@pytest.fixture(scope="session")
def text_run(tmp_path_factory):
    """A folder with texts/, shards/ and finished runs gpt/ and shortcut/ of the recipe text-tiny."""
    from shortcut_cli.config import reading
    from shortcut_cli.stages.preparation import prepare
    from shortcut_cli.stages.training import train

    root = tmp_path_factory.mktemp("text-run")
    write_texts(root / "texts")
    for model in ("gpt", "shortcut"):
        config = reading.read("text-tiny", [*TEXT_SETTINGS, f"data.shards={root / 'shards'}", f"model.name={model}"])
        with without_workers():
            prepare(config, [str(root / "texts")], root / "shards", n_workers=1, max_bad="0", report=quiet)
        train(
            config,
            root / model,
            device="cpu",
            resume="auto",
            report=quiet,
            stop=nullcontext(lambda: None),
        )
    return root


class FakeRay:
    """What every stand-in for Ray has."""

    class exceptions:  # noqa: N801
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            pass

    def init(self, **_):
        pass

    def shutdown(self):
        pass
