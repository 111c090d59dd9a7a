"""Where jobs run: in processes of this machine, on a Ray cluster, or as an array of Slurm jobs.

An executor is called like `workers.in_order`, which is the local one. The others hand batches of jobs to other
machines, each of which runs `workers.in_order` on its batch: so a job that crashes or hangs fails in the same way
everywhere. Machines share the folders that jobs read and write, under the same names, and have this package installed.
"""

import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

from shortcut_cli import cleanup, files
from shortcut_cli.data import workers
from shortcut_cli.errors import ShortcutError, Unavailable, UsageError

BATCHES = 4  # for each worker, so that a slow one holds up little, and starting processes costs little
BATCH = 1000  # jobs in a batch, at most: a preparation of ten million files keeps only some of them in memory
POLL_S = 0.2
RETRIES = 3  # of a batch whose machine was lost
ANSWER_S = 5  # within which a cluster must
STORE_BYTES = 100_000_000  # of a Ray that is started here, whose tasks return little


class Executor(Protocol):
    """What `workers.in_order` is."""

    def __call__(
        self,
        work: Callable[..., Any],
        jobs: Iterable[Any],
        fixed: tuple[Any, ...],
        *,
        workers: int,
        timeout_s: float,
        memory_mb: int,
    ) -> Iterator[tuple[Any, Any]]:
        """Run `work(*fixed, job)` for each job and yield (job, result) in the order of the jobs."""


@dataclass(frozen=True)
class Batch:
    """Some of the jobs, to be run on one machine; the result of a call is those of its jobs."""

    work: Callable[..., Any]
    fixed: tuple[Any, ...]
    limits: dict[str, Any]  # timeout_s and memory_mb
    folder: str  # the working directory
    cache: str | None

    def enter(self) -> None:
        """Make this process one like that which has the jobs. Raises OSError if it lacks the working directory."""
        os.chdir(self.folder)
        if self.cache is not None:
            os.environ[files.CACHE_VARIABLE] = self.cache

    def __call__(self, jobs: Sequence[Any]) -> list[Any]:
        """The results of jobs, in order. Raises OSError as `enter` does."""
        self.enter()
        return [result for _, result in workers.in_order(self.work, jobs, self.fixed, workers=1, **self.limits)]


def named(name: str, *, folder: Path, ray_address: str = "") -> Executor:
    """The executor "ray" or "slurm". folder: for Slurm's files, on a file system that all machines share.

    Raises Unavailable if its package is not installed, UsageError if a cluster does not answer.
    """
    if name == "ray":
        ray, address = _imported("ray"), ray_address or os.environ.get("RAY_ADDRESS", "")
        with _answering(address):
            _check_answers(address)
        return partial(_on_ray, ray, address)
    return partial(_on_slurm, _imported("submitit"), folder)


def _imported(module: str) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # what goes wrong is in the error that it raises
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of a change to come
    try:
        if module == "ray":
            import ray

            return ray
        import submitit
    except ImportError as error:
        extra = {"ray": "ray", "submitit": "slurm"}[module]
        raise Unavailable(f"{module} can't be imported: {error}", f'pip install "shortcut-cli[{extra}]"') from error
    return submitit


def _run(batch: Batch, jobs: Sequence[Any]) -> list[Any]:
    """In a process of Ray, whose script every process that it starts would import, and Ray with it."""
    script = vars(sys.modules["__main__"]).pop("__file__", None)
    try:
        return batch(jobs)
    finally:
        vars(sys.modules["__main__"])["__file__"] = script


def _batches(jobs: Iterable[Any], workers: int) -> Iterator[list[Any]]:
    """The jobs in order, in a few batches for each worker; in more, made as they are asked for, if there are many."""
    rest = iter(jobs)
    head = list(islice(rest, BATCHES * workers * BATCH))
    size = max(1, -(-len(head) // (BATCHES * workers)))
    every = chain(head, rest)
    while batch := list(islice(every, size)):
        yield batch


def _batch(work: Callable[..., Any], fixed: tuple[Any, ...], limits: dict[str, Any]) -> Batch:
    return Batch(work, fixed, limits, os.getcwd(), os.environ.get(files.CACHE_VARIABLE))


def _on_ray(
    ray: Any,
    address: str,
    work: Callable[..., Any],
    jobs: Iterable[Any],
    fixed: tuple[Any, ...],
    *,
    workers: int,
    **limits: Any,
) -> Iterator[tuple[Any, Any]]:
    """Each batch is a Ray task with one CPU and the memory of a job."""
    with _connected(ray, address, {"num_cpus": workers}):
        memory = limits["memory_mb"] * 1_000_000
        largest = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
        if memory > largest:
            raise UsageError(
                f"no machine of the Ray cluster has the {limits['memory_mb']:,} MB of data.file_memory_mb; "
                f"the largest has {largest / 1e6:,.0f}",
                "--set data.file_memory_mb=1000",
            )
        task = ray.remote(num_cpus=1, memory=memory, max_retries=RETRIES)(_run)
        batch_of = ray.put(_batch(work, fixed, limits))
        workers = int(ray.cluster_resources()["CPU"])
        batches = ((batch, task.remote(batch_of, batch)) for batch in _batches(jobs, workers))
        waiting = deque(islice(batches, BATCHES * workers))
        while waiting:
            batch, future = waiting.popleft()
            try:
                results = ray.get(future)
            except ray.exceptions.RayError as error:
                raise _lost(ray, error) from error
            waiting.extend(islice(batches, 1))
            yield from zip(batch, results, strict=True)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster to which there is a connection, for jobs that each take a while."""

    ray: Any
    cpus: int  # that each job needs
    gpus: int

    def __call__(
        self, work: Callable[[Any], Any], jobs: Iterable[Any], stopped: Callable[[], bool]
    ) -> Iterator[tuple[Any, Any]]:
        """Run `work(job)` for each job as a Ray task, and yield (job, result) as they end.

        A job whose process or machine is lost is run again, RETRIES times. Once `stopped`, KeyboardInterrupt is raised
        in the jobs that run, and no other is begun: their results are not yielded.

        Raises ShortcutError if a job is lost too often.
        """
        task = self.ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=RETRIES)(_call)
        setup = self.ray.put(_batch(work, (), {}))
        waiting = {task.remote(setup, job): job for job in jobs}
        cancelled = False
        while waiting:
            ended, _ = self.ray.wait([*waiting], timeout=POLL_S)
            if stopped() and not cancelled:
                cancelled = True
                for future in waiting:
                    self.ray.cancel(future)
            for future in ended:
                job = waiting.pop(future)
                try:
                    result = self.ray.get(future)
                except self.ray.exceptions.RayError as error:
                    if cancelled:
                        continue
                    raise _lost(self.ray, error) from error
                yield job, result


@contextmanager
def cluster(device: str, *, cpus: int, ray_address: str = "") -> Iterator[tuple[Cluster, str]]:
    """A connection to a Ray cluster, and on which device its jobs run: with "auto", on a GPU each if there are any.

    cpus: that each job needs. Without an address, and without RAY_ADDRESS, Ray is started here for the block.

    Raises Unavailable if Ray is not installed, UsageError if a cluster does not answer or has no machine for a job.
    """
    ray, address = _imported("ray"), ray_address or os.environ.get("RAY_ADDRESS", "")
    with _answering(address):
        _check_answers(address)
    with _connected(ray, address, {}):
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = int(device == "cuda" or (device == "auto" and any(has.get("GPU", 0) >= 1 for has in machines)))
        if not any(has.get("CPU", 0) >= cpus and has.get("GPU", 0) >= gpus for has in machines):
            raise UsageError(
                f"no machine of the Ray cluster has {cpus} CPUs{' and a GPU' if gpus else ''} for a run",
                "--run-cpus 1" if cpus > 1 else "--device cpu",
            )
        yield Cluster(ray, cpus, gpus), "cuda" if gpus else "cpu"


def _call(setup: Batch, job: Any) -> Any:
    """In a process of Ray: the result of a job."""
    setup.enter()
    return setup.work(job)


def _lost(ray: Any, error: Exception) -> Exception:
    """What to raise for an error of a Ray task."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = getattr(error, "cause", None)
        return cause if isinstance(cause, ShortcutError) else error
    lost = str(error).splitlines()[0]
    return ShortcutError(f"Ray lost a task {RETRIES + 1} times: {lost}", "run the same command again")


@contextmanager
def _connected(ray: Any, address: str, here: dict[str, Any]) -> Iterator[None]:
    """A connection to the cluster at an address, or to one that is started here with these options for the block."""
    # "local", since without an address Ray looks for one that was started here, even if it has ended.
    here = here | {"address": "local", "object_store_memory": STORE_BYTES, "include_dashboard": False}
    handler = signal.getsignal(signal.SIGTERM)
    with cleanup.due(ray.shutdown):
        try:
            options = {"address": address} if address else here | {"_node_ip_address": "127.0.0.1"}
            with _answering(address):
                ray.init(**options, log_to_driver=False, logging_level="ERROR")
        finally:
            with suppress(ValueError):  # not in the main thread, where Ray does not set it either
                signal.signal(signal.SIGTERM, handler)
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _answering(address: str) -> Iterator[None]:
    """Raises UsageError if a cluster does not answer in this block."""
    try:
        yield
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {address} does not answer" if address else "Ray does not start"
        raise UsageError(
            f"{where}: {str(error).partition(chr(10))[0]}",
            "`ray status` says more; a cluster with tokens needs RAY_AUTH_TOKEN",
        ) from error


def _check_answers(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT; Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()


def _cancel(jobs: Iterable[Any]) -> None:
    for job in jobs:
        job.cancel()


def _on_slurm(
    submitit: Any,
    folder: Path,
    work: Callable[..., Any],
    jobs: Iterable[Any],
    fixed: tuple[Any, ...],
    *,
    workers: int,
    **limits: Any,
) -> Iterator[tuple[Any, Any]]:
    """Each batch is an element of a job array, of which `workers` run at once; sbatch's variables say on what."""
    try:
        executor = submitit.SlurmExecutor(folder=folder)
    except RuntimeError as error:
        raise Unavailable(f"Slurm is not there: {error}", "--executor local, or --task on each machine") from error
    executor.update_parameters(
        job_name="shortcut",
        array_parallelism=workers,
        cpus_per_task=1,
        mem=f"{limits['memory_mb'] + 1000}M",
    )
    every = _batches(jobs, workers)
    while batches := list(islice(every, BATCHES * workers)):
        most = max(map(len, batches))
        executor.update_parameters(time=max(1, -(-int(most * limits["timeout_s"]) // 60)))
        submitted = executor.map_array(_batch(work, fixed, limits), batches)
        with cleanup.due(partial(_cancel, submitted)):
            for batch, job in zip(batches, submitted, strict=True):
                try:
                    results = job.result()
                except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
                    lost = str(error).splitlines()[0]
                    raise ShortcutError(f"Slurm lost job {job.job_id}: {lost}", "run the same command again") from error
                yield from zip(batch, results, strict=True)
