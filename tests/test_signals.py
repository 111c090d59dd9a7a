"""Processes that get signals: the right exit code, one panel, nothing left behind; and what `cleanup` does for that."""

import atexit
import io
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from shortcut_cli import cleanup, files
from shortcut_cli.cli.signals import leave

CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGHUP: 75}
PANEL = ["interrupted", "", "Hint: run the same command again to resume"]
# A command that says when it has begun; `body` is what it does, in a process with signals installed.
COMMAND = """import sys, time, os, signal, threading, subprocess
from shortcut_cli.cli.signals import guarded, signals
def command():
    print("begun", flush=True)
{body}
{head}
if __name__ == "__main__":
    guarded(command)
"""


def begun(tmp_path, body, head="", **options):
    (tmp_path / "command.py").write_text(COMMAND.format(body=body, head=head))
    process = subprocess.Popen(
        [sys.executable, tmp_path / "command.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=tmp_path,
        **options,
    )
    assert process.stdout.readline() == "begun\n"
    return process


def ends(process, code, within_s=10.0):
    """Wait for the end of a process: its code, one panel, and nobody left in its session."""
    out, err = process.communicate(timeout=within_s)
    assert process.returncode == code, err
    rows = err.splitlines()
    assert [row.strip("\u2502 ") for row in rows[1:-1]] == PANEL, err
    assert rows[0].startswith("\u256d\u2500 Interrupted ")
    assert not alive(process.pid), "orphans"
    return out


def alive(session):
    """The processes of a session that still run: not zombies, nor those that have given up their memory to exit."""
    listed = subprocess.run(
        ["ps", "-e", "-o", "sess=,stat=,args="], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found = [line.split(None, 2) for line in listed]
    # ps puts the name into brackets if there is no memory left to read the command line from.
    return [line for line in found if line[0] == str(session) and not line[1].startswith("Z") and line[2][0] != "["]


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize(
    "body",
    [
        "    time.sleep(60)",
        "    while True:\n        try: time.sleep(60)\n        except BaseException: pass",
        "    threading.Event().wait()",
        "    import ctypes; ctypes.CDLL(None).sleep(60)",  # native code that no Python handler can end
        "    from concurrent.futures import ThreadPoolExecutor as Pool\n"
        "    with Pool(2) as pool: list(pool.map(time.sleep, [60, 60]))",
        "    class A:\n        def __del__(self): time.sleep(60)\n    A()",
    ],
    ids=["sleep", "swallows", "waits", "native", "threads", "finalizer"],
)
def test_a_signal_ends_whatever_goes_on_within_a_second(tmp_path, number, body):
    process = begun(tmp_path, body)
    time.sleep(0.1)
    began = time.monotonic()
    process.send_signal(number)
    ends(process, CODES[number])
    assert time.monotonic() - began < 1.0


def test_the_same_signal_twice_is_one_panel(tmp_path):
    for number, code in CODES.items():
        process = begun(tmp_path, "    time.sleep(60)")
        for _ in range(2):
            process.send_signal(number)
            time.sleep(0.05)
        ends(process, code)


def test_two_signals_during_a_training_save_once_and_a_later_one_ends_at_once(tmp_path):
    body = (
        "    with signals as asked:\n        print('within', flush=True)\n        while not asked(): time.sleep(0.01)\n"
        "        time.sleep({0})\n        print('saved', flush=True)"
    )
    for pause, wait, out in ((0.3, 0.05, "saved\n"), (20, 1.1, "")):
        process = begun(tmp_path, body.format(pause))
        assert process.stdout.readline() == "within\n"
        process.send_signal(signal.SIGINT)
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        assert ends(process, 130) == out


def test_workers_and_temporary_files_are_gone(tmp_path):
    head = "def work(job):\n    import tempfile\n    tempfile.mkdtemp(prefix='of-a-worker-')\n    time.sleep(60)"
    body = """    from pathlib import Path
    from shortcut_cli import cleanup, files
    from shortcut_cli.data import workers
    with files.temporary_folder() as folder, files.writing(Path("result")) as stream:
        (folder / "a").write_text("a")
        Path("folder").write_text(str(folder))
        cleanup.start([sys.executable, "-c", "import time; time.sleep(60)"])
        list(workers.in_order(work, range(4), (), workers=2, timeout_s=60, memory_mb=4000))"""
    for group in (False, True):
        process = begun(tmp_path, body, head, env=os.environ | {"TMPDIR": str(tmp_path)})
        deadline = time.monotonic() + 20
        while len(list(tmp_path.rglob("of-a-worker-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(alive(process.pid)) == 5  # us, the tracker, a child, two workers
        (os.killpg if group else os.kill)(process.pid, signal.SIGINT)
        ends(process, 130)
        assert not Path((tmp_path / "folder").read_text()).exists()
        assert {path.name for path in tmp_path.iterdir()} == {"command.py", "folder"}


@pytest.mark.parametrize("job", ["time.sleep(60)", "sum(n for n in range(10**12))", "bytearray(10**6).count(b'x' * 7)"])
def test_workers_end_with_a_parent_that_is_killed(tmp_path, job):
    head = f"def work(_):\n    Path(f'at-work-{{os.getpid()}}').touch()\n    while True: {job}\n"
    body = """    from shortcut_cli.data import workers
    list(workers.in_order(work, range(4), (), workers=2, timeout_s=60, memory_mb=4000))"""
    head = "import os\nfrom pathlib import Path\n" + head
    process = begun(tmp_path, body, head, env=os.environ | {"TMPDIR": str(tmp_path)})
    try:
        wait_for(lambda: len(list(tmp_path.glob("at-work-*"))) == 2)
        process.kill()
        process.communicate(timeout=10)
        wait_for(lambda: not alive(process.pid))
    finally:
        for path in tmp_path.glob("at-work-*"):
            with suppress(ProcessLookupError):
                os.kill(int(path.name.split("-")[-1]), signal.SIGKILL)


@pytest.mark.parametrize("death", ["os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(60)"])
def test_a_pool_that_ends_while_a_worker_is_starting_says_nothing(tmp_path, death):
    # The one that died last is replaced at once; the pool ends before its successor is up.
    script = tmp_path / "command.py"
    script.write_text(f"""
import os, signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # as shortcut_cli.__main__ does
from shortcut_cli.data import workers

if __name__ == "__mp_main__":
    time.sleep(0.5)

def work(job):
    {death}

if __name__ == "__main__":
    for _ in range(3):
        ((job, result),) = workers.in_order(work, [1], (), workers=1, timeout_s=0.3, memory_mb=4000)
        assert result.passing
""")
    root = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, env=os.environ | root, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def wait_for(condition, within_s=20.0):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_commands_are_imported(tmp_path, number):
    # Signals are blocked by the first import, and the thread that waits for them stands before the heavy ones.
    code = (
        "import os, shortcut_cli.__main__\n"
        f"os.kill(os.getpid(), {int(number)})\n"  # nobody handles it yet
        "shortcut_cli.__main__.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "doctor"], capture_output=True, text=True, check=False)
    assert done.returncode == CODES[number]
    assert [row.strip("\u2502 ") for row in done.stderr.splitlines()[1:-1]] == PANEL
    assert done.stdout == ""


def test_nohup_is_respected(tmp_path):
    process = begun(
        tmp_path,
        "    signal.sigtimedwait([], 0.5); print('done')",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "done\n", "")


def test_a_stderr_that_nobody_reads_holds_nothing_up(tmp_path):
    body = (
        "    os.set_blocking(2, False)\n    try:\n        while True: os.write(2, bytes(9))\n    except OSError: pass\n"
    )
    process = begun(tmp_path, body + "    os.set_blocking(2, True); print('full', flush=True); time.sleep(60)")
    assert process.stdout.readline() == "full\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130
    process.communicate()


def test_the_panel_is_seen_while_stderr_is_diverted(tmp_path):
    """As it is while a native library reads a file."""
    body = "    from shortcut_cli import files\n    with files.diverted(2): print('there', flush=True); time.sleep(60)"
    process = begun(tmp_path, body)
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 75
    assert "interrupted" in err


@pytest.mark.parametrize("make", [lambda path: files.write(path, "text"), files.make_folder])
def test_after_leaving_nothing_appears(tmp_path, monkeypatch, make):
    """In a thread that goes on: the main thread of a command, while the process is being ended by another.

    No temporary file and no folder either: the marker of a folder that had nothing else in it is gone then.
    """
    monkeypatch.setattr(cleanup, "_steady", threading.RLock())
    cleanup.leave()
    writer = threading.Thread(target=make, args=(tmp_path / "late",), daemon=True)
    writer.start()
    writer.join(0.2)
    assert list(tmp_path.iterdir()) == []
    cleanup._steady.release()
    writer.join(5)
    assert [path.name for path in tmp_path.iterdir()] == ["late"]


def test_leaving_undoes_the_newest_first_and_survives_what_fails():
    done = []

    def fails():
        done.append("fails")
        raise OSError

    with cleanup.due(lambda: done.append("a")), cleanup.due(fails), cleanup.due(lambda: done.append("c")):
        with cleanup.due(lambda: done.append("over")):
            pass
        cleanup.leave()
    cleanup._steady.release()
    assert done == ["c", "fails", "a"]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs to see the semaphores")
def test_semaphores_that_are_left_are_removed_without_a_word(tmp_path):
    body = """    import multiprocessing
    from shortcut_cli.data import workers
    for _ in workers.in_order(str, range(1), (), workers=1, timeout_s=60, memory_mb=4000): pass
    lock = multiprocessing.get_context("spawn").RLock()
    print(lock._semlock.name, flush=True)
    time.sleep(60)"""
    process = begun(tmp_path, body)
    name = process.stdout.readline().strip()
    process.send_signal(signal.SIGTERM)
    process.wait(5)
    deadline = time.monotonic() + 10
    while Path(f"/dev/shm/sem.{name[1:]}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/dev/shm/sem.{name[1:]}").exists()
    ends(process, 75)


@pytest.mark.parametrize("moment", range(4))
def test_last_files_are_in_place_or_not_there(tmp_path, moment):
    """A signal at any moment: the command exits with 0 and its files are complete, or with 75 and there are none."""
    pauses = ["time.sleep(0.4)" if moment == each else "pass" for each in range(4)]
    body = f"""    from pathlib import Path
    print("close", flush=True)
    {pauses[0]}
    with files.together(Path("o"), "unit", ["one", "two"]):
        files.write(Path("o/one"), b"1")
        files.write(Path("o/two"), b"2")
        {pauses[1]}
        cleanup.last()
        {pauses[2]}
    {pauses[3]}"""
    process = begun(tmp_path, body, "from shortcut_cli import cleanup, files\n")
    assert process.stdout.readline() == "close\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    made = sorted(path.name for path in (tmp_path / "o").glob("*"))
    assert (process.returncode, made) == ((75, []) if moment < 2 else (0, ["one", "two"]))


@pytest.mark.parametrize(
    ("arguments", "stage"),
    [
        (("sample", "--ckpt", "run.pt"), "shortcut_cli.stages.pipeline.draw"),
        (("attention", "--ckpt", "run.pt", "--out", "o"), "shortcut_cli.stages.pipeline.look"),
        (("codec", "eval", "mini", "."), "shortcut_cli.stages.codec_evaluation.evaluate"),
    ],
)
def test_a_signal_after_the_last_file_changes_nothing(tmp_path, arguments, stage):
    """Else the same command would stop at its own files: "exists already"."""
    (tmp_path / "run.pt").write_bytes(b"PK")  # looks like one
    body = f"""    from unittest.mock import patch
    from shortcut_cli.cli import console
    from shortcut_cli.cli.commands import app
    console.result = lambda *_, **__: (print("made", flush=True), time.sleep(1))
    import shortcut_cli.cli.tables as tables
    tables.attention = tables.codec_scores = tables.layers = lambda *_: ""
    from shortcut_cli.stages import codec_evaluation
    codec_evaluation.keep = lambda *_: None
    tables.account = lambda *_: []
    with patch({stage!r}, lambda *_, **__: {[] if stage.endswith("draw") else {}}):
        app({list(arguments)!r}, standalone_mode=False)"""
    process = begun(tmp_path, body)
    assert process.stdout.readline() == "made\n"
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err


LEAVES = """
import atexit, sys, threading, time
from shortcut_cli.cli.signals import leave

class Module:
    def __del__(self):
        print("taken apart")

kept = Module()
atexit.register(print, "at exit")
begun = threading.Event()
threading.Thread(target=lambda: begun.wait(60) and (time.sleep(0.1) or print("thread"))).start()
print("begun ", end="")
begun.set()
if sys.argv[1]:
    sys.modules["torch"] = sys
try:
    sys.exit(int(sys.argv[2]) if sys.argv[2].isdigit() else sys.argv[2] or None)
except SystemExit as end:
    leave(end)
    raise
"""


@pytest.mark.parametrize(
    ("torch", "code", "ends", "apart"),
    [("torch", "7", 7, False), ("torch", "", 0, False), ("", "7", 7, True), ("torch", "words", 1, True)],
)
def test_a_process_ends_whole_but_torch_is_not_taken_apart(torch, code, ends, apart):
    done = subprocess.run([sys.executable, "-c", LEAVES, torch, code], capture_output=True, text=True, check=False)
    assert done.returncode == ends
    assert done.stdout == "begun thread\nat exit\n" + "taken apart\n" * apart


@pytest.mark.parametrize(
    ("watcher", "shown"),
    [("-m cProfile", "function calls"), ("-m trace --count --summary -C .", "lines   cov%"), ("-i", "after")],
)
def test_who_watches_a_command_has_the_last_word(tmp_path, watcher, shown):
    (tmp_path / "leaves.py").write_text(LEAVES)
    command = [sys.executable, *watcher.split(), "leaves.py", "torch", "7"]
    done = subprocess.run(command, cwd=tmp_path, input="print('after')", capture_output=True, text=True, check=False)
    assert shown in done.stdout


class Full(io.StringIO):
    def flush(self):
        raise OSError(28, "No space left on device")


def test_what_can_not_be_flushed_is_left_to_the_interpreter(monkeypatch):
    ended = []
    monkeypatch.setattr(threading, "_shutdown", lambda: None)
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: None)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(sys, "getprofile", lambda: None)
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    monkeypatch.setitem(sys.modules, "torch", sys)
    monkeypatch.setattr(sys, "stdout", Full())
    leave(SystemExit(3))
    assert ended == []
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    leave(SystemExit(3))
    assert ended == [3]
