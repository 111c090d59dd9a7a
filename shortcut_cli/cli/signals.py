"""How a command ends: by a signal, or by an error that is shown as one panel, with an exit code.

SIGINT exits with 130, SIGTERM and SIGHUP with 75; errors.py lists the other codes.

A thread waits for signals, which are blocked everywhere else; no exception is raised in the middle of other code, which
could catch it. A training asks after each step whether a signal came; anything else ends at once, as after SIGKILL, but
for its temporary files and processes: what is complete is in place, and the rest is done again.
"""

import atexit
import errno
import gc
import os
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from select import select
from typing import Any, NoReturn

from shortcut_cli import cleanup
from shortcut_cli.cli import console
from shortcut_cli.cli.console import STDERR
from shortcut_cli.cli.layout import wrapped
from shortcut_cli.errors import Interrupted, ReaderLeft, ShortcutError, UsageError
from shortcut_cli.training import torchrun

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGHUP: 75}
REPEAT_S = 1.0  # the same request can arrive twice: at the process and at its group, or from a hasty supervisor
USUAL_COLUMNS, LEAST_COLUMNS = 80, 20  # of a terminal, for a panel
WRITE_S = 0.5  # longest wait for a stderr that nobody reads
# What the system can refuse at any time, with or without the name of a file.
SYSTEM_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO),
    *(errno.EMFILE, errno.ENFILE),
}
# What is wrong with a path, and what to do about it. Without the name of a file, or with one of ours, these are bugs.
PATH_ERRORS = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file is in the place of a folder; choose another path",
    errno.EEXIST: "a file is in the place of a folder; choose another path",
    errno.EISDIR: "a folder is in the place of a file; choose another path",
    errno.ENOTEMPTY: "choose another path",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "the links of this path lead in a circle",
    errno.ENXIO: "this is no regular file",
    errno.ENODEV: "this is no regular file",
    errno.EINVAL: "this is no regular file",
    errno.ETXTBSY: "a program of that name is running",
    errno.EBUSY: "another program uses it",
}
NEVER_A_FILE = {errno.ENAMETOOLONG, errno.ELOOP}  # whatever is on the disk: the path was wrong when it was given


class Signals:
    """Once installed, a signal ends the process; within a `with` block, the first one is only noted.

    Another one ends it at once if it comes REPEAT_S or more after the first.
    """

    def __init__(self) -> None:
        self.patient = False
        self.code: int | None = None  # of the signal that was noted
        self.noted_s = 0.0  # when, on the monotonic clock
        self.closed = False
        self.lock = threading.RLock()
        self.installed = False
        self.stderr = STDERR

    def install(self) -> None:
        """Handle SIGINT and SIGTERM in this process, and SIGHUP unless it is ignored, as after `nohup`."""
        if self.installed:
            return
        self.installed = True
        cleanup.before_last(self.close)
        with suppress(OSError):  # it is closed
            self.stderr = os.dup(STDERR)  # since the other may be diverted when a signal comes (files.diverted)
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        numbers = [number for number in EXIT_CODES if number != signal.SIGHUP or not nohup]
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        # For libraries that unblock signals (multiprocessing does, for a moment).
        for number in numbers:
            signal.signal(number, lambda number, _: self.receive(number))
        threading.Thread(target=self._wait, args=(numbers,), name="signals", daemon=True).start()

    def _wait(self, numbers: list[signal.Signals]) -> NoReturn:
        while True:
            self.receive(signal.sigwait(numbers))

    def __enter__(self) -> Callable[[], int | None]:
        """Returns a function that gives the exit code that a signal asked for, or None."""
        self.patient = True
        return lambda: self.code

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Raises Interrupted if a signal came after the block last asked."""
        with self.lock:
            self.patient = False
        if self.code is not None and kind is None:
            raise Interrupted(*INTERRUPTED, exit_code=self.code)

    def receive(self, number: int) -> None:
        """Note a signal, or end the process because of it."""
        now, code = time.monotonic(), EXIT_CODES[signal.Signals(number)]
        with self.lock:
            if self.closed or (self.code is not None and now - self.noted_s < REPEAT_S):
                return
            if self.patient and self.code is None:
                self.code, self.noted_s = code, now
                return
            self.closed = True
            _end(code, self.stderr)

    def close(self) -> None:
        """Ignore signals from here on: the command has ended. Does not return if a signal is ending the process."""
        with self.lock:
            self.closed = True


INTERRUPTED = ("interrupted", "run the same command again to resume")


def _end(code: int, stderr: int) -> NoReturn:
    """End the process with one panel and an exit code, whatever its threads are doing."""
    try:
        cleanup.leave()
        shown = _panel(stderr) if torchrun.leads() else b""
        if select([], [stderr], [], WRITE_S)[1]:
            os.write(stderr, shown)
    finally:
        os._exit(code)


def _panel(stderr: int) -> bytes:
    """What `console.panel` prints, drawn without Rich, which may be half imported or hold a lock."""
    try:
        columns = os.get_terminal_size(stderr).columns or USUAL_COLUMNS  # 0: it does not know
    except OSError:
        columns = USUAL_COLUMNS
    said, hint = INTERRUPTED
    width = max(LEAST_COLUMNS, columns) - 4
    rows = [line for row in (said, "", f"Hint: {hint}") for line in wrapped(row, width, len).split("\n")]
    top = f"\u256d\u2500 {Interrupted.title} ".ljust(width + 3, "\u2500") + "\u256e"
    lines = [top, *(f"\u2502 {row:{width}} \u2502" for row in rows), f"\u2570{chr(0x2500) * (width + 2)}\u256f"]
    text = "\n".join(lines) + "\n"
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    try:
        return text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(dict.fromkeys(map(ord, "\u256d\u256e\u2570\u256f\u2500\u2502"), "|")).encode(encoding)


signals = Signals()  # of this process


def translated(error: Exception) -> ShortcutError | None:
    """What to tell a user about an error of the system or of a path; None if it is a bug of ours."""
    text = str(error)
    if isinstance(error, ShortcutError):
        return error
    if isinstance(error, OSError):
        return _of_the_system(error)
    if isinstance(error, ValueError) and text.startswith("embedded null"):
        return UsageError("a path contains the character NUL", "check the paths of the recipe")
    # PyTorch has a class of its own for CUDA, and none for the CPU.
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in text:
        return ShortcutError(
            "there is not enough memory" + (f": {text.splitlines()[0]}" if text else ""),
            "a smaller model.width, model.context, train.batch_size or eval.batch_size needs less",
        )
    return None


def _of_the_system(error: OSError) -> ShortcutError | None:
    name = error.filename2 or error.filename
    where = f": {os.fsdecode(name)}" if isinstance(name, str | bytes) else ""
    if error.errno in SYSTEM_ERRORS:
        return ShortcutError(f"{error.strerror}{where}", "files that were complete before are unchanged")
    if where and error.errno in PATH_ERRORS and not _is_ours(os.fsdecode(name)):
        kind = UsageError if error.errno in NEVER_A_FILE else ShortcutError
        return kind(f"{error.strerror}{where}", PATH_ERRORS[error.errno])
    if not where and error.errno == errno.ENOENT and not _has_folder():
        return ShortcutError("the working directory does not exist any more", "change to another folder")
    if not where and "temporary directory" in str(error):  # of the module tempfile
        return ShortcutError(f"{error.strerror}", "set TMPDIR to a folder on a disk that has room")
    return None


def _is_ours(name: str) -> bool:
    """Whether a path is of this program or of Python itself: if it is missing, no user has named it."""
    path = Path(os.path.abspath(name)) if _has_folder() else Path(name)
    own = (str(Path(__file__).parents[1]), *(sysconfig.get_path(each) for each in ("stdlib", "purelib", "platlib")))
    return any(path.is_relative_to(folder) for folder in own)


def _has_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _is_of_another(error: ShortcutError) -> bool:
    """Whether another process of the training shows an error: of several that fail, the first."""
    if error.exit_code == torchrun.LEFT or not torchrun.promised():
        return error.exit_code == torchrun.LEFT
    if isinstance(error, Interrupted):
        return not torchrun.leads()
    from shortcut_cli.training import parallel

    return not parallel.is_first(parallel.LOSES if error.exit_code == torchrun.LOST else parallel.FAILS)


def leave(end: SystemExit) -> None:
    """End the process as the interpreter does, but for its last step, if that would take torch's modules apart.

    That takes 0.15 s and 127 MB. Returns if torch is not loaded, if the interpreter has something to say, or if someone
    waits for the command: a profiler, which would not show what it has found, or `python -i`.
    """
    monitoring = getattr(sys, "monitoring", None)  # of profilers too, from Python 3.12 on
    watched = sys.getprofile() or sys.gettrace() or (monitoring and any(map(monitoring.get_tool, range(6))))
    if "torch" not in sys.modules or not isinstance(end.code, int | None) or watched or sys.flags.inspect:
        return
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except (OSError, ValueError):
        return
    os._exit(end.code or 0)


def guarded(command: Callable[[], Any]) -> NoReturn:
    """Run a command, then exit: what a user can act on is one panel and its exit code; a bug keeps its traceback."""
    console.harden()
    console.say_what_loads()
    signals.install()
    try:
        result = command()
        signals.close()
        sys.exit(result)
    except Exception as error:
        signals.close()
        shown = translated(error)
        if shown is None:
            raise
        of_another = _is_of_another(shown)
        if not of_another and not isinstance(shown, ReaderLeft):  # whoever would read it
            console.panel(shown)
        ended = isinstance(shown, Interrupted) or not of_another
        sys.exit(shown.exit_code if ended else torchrun.LEFT)
    finally:
        # Without this the interpreter would search torch's many objects for reference cycles on its way out.
        gc.freeze()
