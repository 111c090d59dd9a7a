"""Train: shards -> run.pt, resumable bit for bit at any step; or only what a training would take.

A step depends only on the weights, the optimizer's state and its own number: the windows follow from the seed and the
step, the learning rate from the step, and dropout is seeded at each step. So resume.pt holds no random state. It holds
the conditions of the training (`training.conditions`): under others, the last bits of a step can differ. What else a
run folder keeps is in `training.keeping`.
"""

import os
import resource
import statistics
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from shortcut_cli import files
from shortcut_cli.config import reading
from shortcut_cli.config.schema import Recipe
from shortcut_cli.data.shards import warning
from shortcut_cli.data.workers import keep_freed_memory
from shortcut_cli.errors import UsageError
from shortcut_cli.events import Note, Progress, Report
from shortcut_cli.kept import remarks
from shortcut_cli.training import (
    checkpoint,
    conditions,
    extension,
    lineage,
    loop,
    parallel,
    parts,
    sharded,
    tensor_file,
    torchrun,
)
from shortcut_cli.training.keeping import Keeper
from shortcut_cli.training.loop import Stop
from shortcut_cli.training.parallel import Processes
from shortcut_cli.training.trainer import Trainer

WARM_UP_STEPS = 2  # before those that are timed: the first ones allocate memory, and compile
TIMED_STEPS = 5
MB = 1e6


def train(
    resolved: Recipe,
    folder: Path,
    *,
    device: str,
    resume: str,
    report: Report,
    stop: Stop,
    init_from: Path | None = None,
    extend: bool = False,
    logs: bool = False,
) -> dict[str, Any]:
    """Train the recipe's model into a run folder, resuming the run in it if it is unfinished.

    resume: "auto", or "never" to start from scratch. init_from: the checkpoint whose weights the run begins with.
    extend: the run in the folder may have fewer steps, and gets those of the recipe. logs: each process that torchrun
    has started writes a log of its own steps, rank-N.jsonl, and rank-N.txt if it ends with an error. Returns a
    summary; "worked" says whether there was anything to do. It is empty in a process that torchrun has started beside
    the first.

    Raises UsageError if the folder holds a run of a different recipe, of other shards or of other first weights, or
    the checkpoint that a new run is to begin with,
    Interrupted after a signal, Diverged if the loss is not finite.
    """
    _prepare(resolved)
    with (
        conditions.threads(resolved.train.threads),
        _ending_told(folder, logs),
        parallel.joined(device, resolved.train.timeout_s, logs) as processes,
    ):
        if processes.count > 1 and resolved.train.shard == "fsdp":
            sharded.check(device)
        if processes.leads:
            return _lead(resolved, folder, device, resume, report, stop, init_from, extend, processes)
        _follow(folder, device, stop, init_from, processes)
        return {}


@contextmanager
def _ending_told(folder: Path, logs: bool) -> Iterator[None]:
    """If each process has a log: with which error this one has ended, in rank-N.txt."""
    try:
        yield
    except Exception:
        if logs and torchrun.promised() and folder.is_dir():
            path, flags = folder / f"rank-{os.environ['RANK']}.txt", os.O_APPEND | os.O_CREAT | os.O_WRONLY
            with (
                suppress(OSError),  # the error itself matters more, and is raised in any case
                open(os.open(path, flags | os.O_NOFOLLOW, 0o666), "a", encoding="utf-8") as stream,
            ):
                stream.write(traceback.format_exc())
        raise


def _lead(
    resolved: Recipe,
    folder: Path,
    device: str,
    resume: str,
    report: Report,
    stop: Stop,
    init_from: Path | None,
    extend: bool,
    processes: Processes,
) -> dict[str, Any]:
    """Train in the process that writes the files."""
    with ExitStack() as held:
        with processes.leading():
            ancestor = lineage.read(init_from) if init_from else None
            held.enter_context(files.held(folder, "shortcut train", known=loop.is_run_folder))
            resume = "auto" if processes.begun() else resume
            divided = processes.count > 1 and resolved.train.shard == "fsdp"
            read, states = "", _States(folder, processes)

            def load(path: Path) -> dict[str, Any]:
                nonlocal read
                found = states.together(path.name) if divided and not extend else checkpoint.load(path)
                read = path.name
                return found

            content = loop.saved_state(folder, Trainer.result, resume, report, load)
            if init_from and content is None and folder.resolve() == init_from.resolve().parent:
                raise UsageError(
                    f"{init_from} is in {folder}, whose run this one would replace", "choose another folder with --out"
                )
            if extend:
                resolved = extension.planned(resolved, content, folder, report)
            ends = content is not None and content["step"] == resolved.train.steps
            shares = processes.count if divided and not ends else 1
            trainer = Trainer(resolved, folder, device, report, ancestor, 1 if extend else shares)
            processes.part(trainer.config.batch_size, trainer.config.accumulation)
            if unfinished := warning(files.place(resolved.data.shards), trainer.shards.manifest):
                report(Note(text=unfinished))
            if extend and content:
                before, content = content, extension.extended(trainer, content)
                read = read if content is before else loop.STATE
                if shares > 1:
                    content = states.together(read)
            if trainer.shares != shares:
                trainer = Trainer(resolved, folder, device, report, ancestor, shares)
            keeper = Keeper(trainer)
            if content is None:
                keeper.clear()
            elif ends and "parts" in content:
                content = parts.whole(folder, content)
            worked = loop.start(trainer, content)
            del content  # files that are mapped take room on the disk even when they are removed
            parts.sweep(folder, loop.STATE, loop.PREVIOUS)
            processes.begin()
            if worked:
                _remark(trainer, report)
        trainer.began = time.monotonic() - trainer.state.seconds
        if processes.count > 1:
            processes.copied(trainer.saved() | {"shares": shares, "read": read})
        if worked and processes.count > 1:
            trainer.connect(processes)
        with stop as asked:
            loop.run(trainer, processes.agreed(asked), keeper)
        if not worked:
            keeper.complete()
    return {
        "run": str(folder / Trainer.result),
        "worked": worked,
        "step": trainer.state.step,
        "validation_nats_per_token": trainer.state.best,
        "parameters": trainer.model.count(),
        "seconds": round(trainer.state.seconds, 1),
        "lineage": trainer.lineage,
    }


def _remark(trainer: Trainer, report: Report) -> None:
    """Say what of the plan shrinks its subject away."""
    for said in remarks.of_plan(trainer.recipe.model_dump(), trainer.windows.split.tokens):
        report(Note(text=f"Note: {said}"))


class _States(dict[str, dict[str, Any]]):
    """States that were read, by name. Of their parts in files this process verifies its share."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        super().__init__()
        self.folder, self.processes = folder, processes

    def read(self, name: str) -> str:
        """Read a state; returns its checksum."""
        share = self.processes.rank, self.processes.count
        self[name] = checkpoint.load(self.folder / name, apart=True, share=share)
        return tensor_file.sealed_digest(self.folder / name)

    def together(self, name: str) -> dict[str, Any]:
        """Called in the leading process: a state that all processes read."""
        self.processes.together(name, self.read)
        return self.pop(name)


def _follow(folder: Path, device: str, stop: Stop, init_from: Path | None, processes: Processes) -> None:
    """Train in a process beside the one that writes the files: the same steps from the same state."""
    states = _States(folder, processes)
    processes.wait(states.read)
    content = processes.copied(None)
    assert content
    resolved = reading.with_settings(
        reading.validate(content["recipe"], "the leading process"), ["train.tensorboard=false"]
    )
    shares, read = content["shares"], content["read"]
    begins = shares > 1 and not read
    ancestor = lineage.read(init_from) if begins and init_from else None
    trainer = Trainer(resolved, folder, device, lambda _: None, ancestor, shares)
    if shares > 1:
        trainer.source = states.get(read)
        states.clear()  # as in `_lead`
        trainer.load_rest(content)
    else:
        trainer.load_state(content)
    if trainer.state.step < trainer.config.steps:
        trainer.connect(processes)
    with stop as asked:
        loop.run(trainer, processes.agreed(asked), Keeper(trainer))


def _prepare(resolved: Recipe) -> None:
    keep_freed_memory()
    if resolved.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's products raise an error then
        torch.use_deterministic_algorithms(True)


def rehearse(
    resolved: Recipe, folder: Path, *, device: str, report: Report, init_from: Path | None = None
) -> dict[str, Any]:
    """What a training would take: WARM_UP_STEPS + TIMED_STEPS of its steps and part of a validation. Writes nothing.

    Memory is the peak of this process, on CUDA that of the device: all that a training allocates is allocated here.

    Raises what `train` raises, but for a folder that holds another run.
    """
    _prepare(resolved)
    ancestor = lineage.read(init_from) if init_from else None
    resolved = reading.with_settings(resolved, ["train.tensorboard=false"])
    with conditions.threads(resolved.train.threads):
        trainer = Trainer(resolved, folder, device, report, ancestor)
        report(Note(text=trainer.describe()))
        _remark(trainer, report)
        times = []
        count = min(resolved.train.steps, WARM_UP_STEPS + TIMED_STEPS)
        for number in range(count):
            began = time.perf_counter()
            trainer.step(number)
            _wait(device)
            times.append(time.perf_counter() - began)
            report(Progress(task="dry run", done=number + 1, total=count, unit="steps"))
        validation_s = _validation_seconds(trainer)
    return _estimate(trainer, statistics.median(times[min(WARM_UP_STEPS, count - 1) :]), validation_s) | {
        "run": str(folder / Trainer.result),
        "memory_mb": round(_peak_mb(device), 1),
        "lineage": trainer.lineage,
    }


def _validation_seconds(trainer: Trainer) -> float:
    """Seconds of a whole validation, by one of at most two batches."""
    every, batch = trainer.validation, trainer.config.batch_size
    trainer.validation = every[: 2 * batch]
    began = time.perf_counter()
    trainer.validation_loss()
    _wait(trainer.device)
    return (time.perf_counter() - began) * len(every) / len(trainer.validation)


def _estimate(trainer: Trainer, step_s: float, validation_s: float) -> dict[str, Any]:
    """Size, work and time of a whole training."""
    config, context = trainer.config, trainer.recipe.model.context
    tokens = config.steps * config.batch_size * context
    flops = trainer.model.training_flops_per_token(context)
    validations = -(-config.steps // config.eval_every)
    return {
        "parameters": trainer.model.count(),
        "steps": config.steps,
        "tokens": tokens,
        "training_tokens": trainer.windows.split.tokens,
        "epochs": tokens / trainer.windows.split.tokens,
        "training_flops_per_token": flops,
        "training_flops": flops * tokens,
        "seconds_per_step": step_s,
        "tokens_per_s": config.batch_size * context / step_s,
        "seconds_per_validation": validation_s,
        "seconds": config.steps * step_s + validations * validation_s,
    }


def _wait(device: str) -> None:
    """Wait until the device has done what it was given."""
    kind = device.partition(":")[0]
    if kind in ("cuda", "mps"):
        getattr(torch, kind).synchronize()


def _peak_mb(device: str) -> float:
    """Most memory that was in use at once, in MB: of a CUDA device, otherwise of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / MB
    try:  # unlike ru_maxrss, this does not count what the process was before it became this program
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / MB
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB
