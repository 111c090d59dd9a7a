"""Worker processes: a job that crashes, hangs or is killed costs itself, not the run."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import TimeoutError as JobTimeout
from contextlib import suppress
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from shortcut_cli.errors import Rejected

Job = TypeVar("Job")
AHEAD = 8  # jobs in flight for each worker: enough to keep it busy, few enough to keep memory flat


def _start() -> None:
    # One thread each: the parallelism is in the processes. Set before torch is imported in the worker.
    os.environ["OMP_NUM_THREADS"] = "1"
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def in_order(
    work: Callable[..., Any], jobs: Iterable[Job], fixed: tuple[Any, ...], *, workers: int, timeout_s: float
) -> Iterator[tuple[Job, Any]]:
    """Run `work(*fixed, job)` for each job in worker processes and yield (job, result) in the order of the jobs.

    Where the result is a `Rejected`, the job raised it, its process died, or it took more than `timeout_s` seconds.
    Any other exception of `work` is a bug and is raised here.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPool(max_workers=workers, context=context, initializer=_start) as pool:
        waiting: deque[tuple[Job, ProcessFuture[Any]]] = deque()
        try:
            for job in jobs:
                waiting.append((job, pool.schedule(work, args=(*fixed, job), timeout=timeout_s)))
                if len(waiting) >= AHEAD * workers:
                    yield _result(*waiting.popleft(), timeout_s)
            while waiting:
                yield _result(*waiting.popleft(), timeout_s)
        finally:
            with suppress(RuntimeError):
                pool.stop()  # type: ignore[no-untyped-call]


def _result(job: Job, future: ProcessFuture[Any], timeout_s: float) -> tuple[Job, Any]:
    try:
        return job, future.result()
    except Rejected as reason:
        return job, reason
    except JobTimeout:
        return job, Rejected(f"took longer than {timeout_s:g} s (data.file_timeout_s)")
    except ProcessExpired as death:
        return job, Rejected(f"crashed the process that read it ({_cause(death.exitcode)})")


def _cause(exit_code: int) -> str:
    if exit_code < 0:
        with suppress(ValueError):
            return signal.Signals(-exit_code).name
    return f"exit code {exit_code}"
