"""Worker processes: a job that crashes, hangs or is killed fails by itself, and the run continues."""

import ctypes
import gc
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import TimeoutError as JobTimeout
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from shortcut_cli import cleanup, files
from shortcut_cli.errors import Rejected, ShortcutError

Job = TypeVar("Job")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
# Signals that come from outside, as from the kernel if memory runs out, or from a disk that fails under a mapped file.
KILLED = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGBUS, signal.SIGXCPU, signal.SIGXFSZ}
AHEAD = 8  # jobs in flight for each worker: enough to keep it busy, few enough to keep memory flat


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for reuse instead of returning it to the system.

    A training step, or a codec, frees and allocates the same large blocks again and again; by default each comes back
    as fresh pages, and touching them for the first time costs more than the arithmetic of norms and activations.
    Without glibc this does nothing.
    """
    library = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        library.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def _start(scratch: str) -> None:
    # Temporary files of a worker are in a folder of the parent, which removes it, however the worker ends.
    tempfile.tempdir = scratch
    # One thread each: the parallelism is in the processes. Must be set before the worker imports torch.
    os.environ["OMP_NUM_THREADS"] = "1"
    # Parsers create hundreds of thousands of objects without cycles; the default threshold of 700 has the garbage
    # collector look through them far too often.
    gc.set_threshold(50_000)
    # Ctrl-C and the end of a terminal reach the whole process group; the parent decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # Pebble's way to stop a worker, whose own handler would wait for native code to return.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker whose parent was killed. It would finish its job, for hours perhaps, and nobody takes the result."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _start_tracker() -> None:
    """Start the process in which multiprocessing keeps track of semaphores, and removes them if this process does not.

    Its complaints about that would follow the panel of a signal, so its stderr leads nowhere. Starting it unblocks
    signals here; workers inherit the mask, so that what is blocked can't end them before `_start`.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with cleanup.steady(), files.diverted(2):  # steady: the panel must not get lost
        try:
            resource_tracker.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


class _Worker(SpawnProcess):
    """A process that is known to `_abandon` as soon as there is one, so that it never waits for data in vain."""

    def start(self) -> None:
        with cleanup.steady():
            super().start()

    def terminate(self) -> None:
        """Kill it: one that is still starting has SIGTERM blocked, and Pebble would wait for it."""
        self.kill()


class _Workers(SpawnContext):
    """Keeps the locks of a pool for as long as itself.

    Pebble drops them before it stops the workers; one that is still starting then (in the place of one that died or
    took too long) does not find them, and shows a traceback.
    """

    Process = _Worker

    def __init__(self) -> None:
        super().__init__()
        self.locks: list[Any] = []

    def RLock(self) -> Any:  # noqa: N802
        """A lock that processes share."""
        lock = super().RLock()
        self.locks.append(lock)
        return lock


def _abandon() -> None:
    """Kill all worker processes."""
    for process in multiprocessing.active_children():
        process.kill()


def in_order(
    work: Callable[..., Any],
    jobs: Iterable[Job],
    fixed: tuple[Any, ...],
    *,
    workers: int,
    timeout_s: float,
    memory_mb: int,
) -> Iterator[tuple[Job, Any]]:
    """Run `work(*fixed, job)` for each job in worker processes and yield (job, result) in the order of the jobs.

    The result is a `Rejected` if the job raised one, its process died, it took more than `timeout_s` seconds, or it
    needed more than `memory_mb` on top of what its process had. It is `passing` unless the job raised it, or the
    process crashed by itself. Any other exception of `work` is a bug and is raised.

    Raises ShortcutError if processes end that have no job, as they do if memory runs out while they start.
    """
    _start_tracker()
    with (
        files.temporary_folder() as scratch,
        cleanup.due(_abandon),
        ProcessPool(max_workers=workers, context=_Workers(), initializer=_start, initargs=(str(scratch),)) as pool,
    ):
        waiting: deque[tuple[Job, ProcessFuture[Any]]] = deque()
        try:
            for job in jobs:
                try:
                    future = pool.schedule(_within, args=(memory_mb, work, *fixed, job), timeout=timeout_s)
                except RuntimeError as error:  # what broke the pool is in the first of `waiting`, if any
                    raise _broken() from error
                waiting.append((job, future))
                if len(waiting) >= AHEAD * workers:
                    yield _result(*waiting.popleft(), timeout_s)
            while waiting:
                yield _result(*waiting.popleft(), timeout_s)
        finally:
            with suppress(RuntimeError):
                pool.stop()  # type: ignore[no-untyped-call]


def _within(memory_mb: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """Run a job with a limit on the memory that its process may take in addition to what it has.

    The kernel limits private writable memory (RLIMIT_DATA); file mappings do not count.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _data_bytes() + memory_mb * 1_000_000
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        return work(*arguments)
    except (MemoryError, RuntimeError) as error:
        # PyTorch's allocator raises a RuntimeError.
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            reason = f"needs more than {memory_mb} MB of memory (data.file_memory_mb)"
            raise Rejected(reason, passing=True) from error
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _data_bytes() -> int:
    """Private writable memory of this process; 0 on systems without Linux's /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


def _result(job: Job, future: ProcessFuture[Any], timeout_s: float) -> tuple[Job, Any]:
    try:
        return job, future.result()
    except Rejected as reason:
        return job, reason
    except JobTimeout:
        return job, Rejected(f"took longer than {timeout_s:g} s (data.file_timeout_s)", passing=True)
    except BrokenProcessPool as error:
        raise _broken() from error
    except ProcessExpired as death:
        with cleanup.steady():  # it was not killed because this process ends
            pass
        killed = -death.exitcode in KILLED
        what = "was being read when its process was killed" if killed else "crashed the process that read it"
        return job, Rejected(f"{what} ({_cause(death.exitcode)})", passing=killed)


def _broken() -> ShortcutError:
    with cleanup.steady():  # they were not killed because this process ends
        pass
    message = "the processes that read files ended before they had any; perhaps memory ran out"
    return ShortcutError(message, "run the same command again, perhaps with fewer --workers")


def _cause(exit_code: int) -> str:
    if exit_code < 0:
        with suppress(ValueError):
            return signal.Signals(-exit_code).name
    return f"exit code {exit_code}"
