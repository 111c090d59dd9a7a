"""The training loop, shared by models and codecs, and how a run starts or resumes from its saved state."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from shortcut_cli import files
from shortcut_cli.config import writing
from shortcut_cli.config.schema import CodecRecipe, Recipe, ScheduleConfig
from shortcut_cli.errors import CheckFailed, Diverged, Interrupted, UsageError
from shortcut_cli.events import Note, Progress, Report
from shortcut_cli.kept.inputs import is_number
from shortcut_cli.training import conditions, tensor_file
from shortcut_cli.training.run_log import Log

Stop = AbstractContextManager[Callable[[], int | None]]
"""Yields a function that is called after every step: None means continue, an exit code means save and leave."""
STATE = "resume.pt"
PREVIOUS = "resume.prev.pt"  # the state saved before the one in resume.pt


@dataclass
class State:
    """What changes from step to step, apart from weights and optimizers."""

    step: int = 0  # optimizer steps done
    best: float = math.inf  # lowest validation loss so far
    best_step: int | None = None  # at which it was reached; None: not known
    seconds: float = 0.0  # of training, summed over all parts of a resumed run
    pending: list[Any] = field(default_factory=list)  # what `step` returned since the last line of the log
    # Those of each part of the run, with its first step: a new part begins where a resumed run has other conditions.
    conditions: list[dict[str, Any]] = field(default_factory=list)


class Trainable(Protocol):
    """What the loop needs of a trainer, whether of a model or of a codec."""

    task: str  # what its progress is called
    result: str  # name of the file with the best weights
    state: State
    folder: Path
    device: str
    log: Log
    report: Report
    began: float  # time.monotonic() at which an uninterrupted training would have begun

    @property
    def recipe(self) -> Recipe | CodecRecipe:
        """The recipe of the run."""

    @property
    def config(self) -> ScheduleConfig:
        """Its [train]: the number of steps, and how often to log and to validate."""

    def describe(self) -> str:
        """What is about to be trained, and on how much data."""

    def changes(self, content: dict[str, Any]) -> list[str]:
        """The differences between the run that saved a resume.pt and this one, a line each."""

    def step(self, number: int) -> Any:
        """Take optimizer step `number`, counted from 0; returns what goes into `state.pending`."""

    def write_log(self) -> None:
        """Write a line of the log and empty `state.pending`."""

    def validate(self) -> None:
        """Log a validation, and save the weights if they are the best so far."""

    def save(self) -> None:
        """Write resume.pt, or begin to: the next step need not wait for the disk."""

    def saved_all(self) -> None:
        """Wait until the last `save` has ended."""

    def check_result(self, path: Path) -> None:
        """Raise UsageError or CheckFailed if the file with the best weights is missing, damaged or of another run."""

    def save_result(self) -> None:
        """Write the file with the best weights: those of this step."""

    def load_state(self, content: dict[str, Any]) -> None:
        """Restore weights, optimizers and `state` from the content of a resume.pt."""


class Keeper(Protocol):
    """Who keeps more than the result and the state of a run, see `training.keeping`."""

    def stable(self) -> None:
        """Called after every step, before what is done only because the run ends there."""

    def copies(self) -> None:
        """Called after every step, before its state is saved."""


def check_finite(number: int, values: Mapping[str, float], folder: Path) -> None:
    """Raise Diverged if any of `values`, the losses and gradient norm of step `number`, is not finite."""
    if not all(map(math.isfinite, values.values())):
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        kept = "the last good state is kept in" if (folder / STATE).exists() else "no state was saved yet in"
        raise Diverged(
            f"the loss or its gradient is not finite at step {number + 1} ({shown}); {kept} {folder}",
            "a lower train.lr, a longer train.warmup or train.clip = 1.0 usually helps",
        )


def is_run_folder(folder: Path) -> bool:
    """Whether a folder without a marker holds a run: a checkpoint that ends with our seal."""
    kept = (folder / name for name in (STATE, PREVIOUS, "run.pt", "codec.pt"))
    return any(path.is_file() and tensor_file.is_sealed(path) for path in kept)


def saved_state(folder: Path, result: str, resume: str, report: Report, load: Callable[[Path], Any]) -> Any | None:
    """The content of resume.pt, or of resume.prev.pt if the former is missing or damaged; None to start from scratch.

    result: name of the file that the training produces. resume: "auto", or "never" to start from scratch.
    load: reads a state; raises CheckFailed or UsageError if it can't.

    Raises CheckFailed if no saved state can be read, UsageError if there is a result but no state.
    """
    kept = [path for path in (folder / STATE, folder / PREVIOUS) if path.exists()]
    if resume == "never":
        return None
    for number, path in enumerate(kept, 1):
        try:
            return load(path)
        except (CheckFailed, UsageError) as error:
            if number == len(kept):
                raise CheckFailed(
                    error.message, "`train --resume never` starts from scratch and overwrites the run"
                ) from error
            report(Note(text=f"{error.message}; continuing from the state before it, {kept[number].name}"))
    if (folder / result).exists():
        raise UsageError(
            f"{folder} has a {result} but no {STATE} to continue from",
            "choose another --out, or `train --resume never`",
        )
    return None


def start(trainer: Trainable, content: dict[str, Any] | None) -> bool:
    """Prepare the run folder for a run from scratch (`content` None), or restore the state in `content`.

    Returns whether there are steps left to take. Raises what `resume` raises, and CheckFailed if a finished run lacks
    its result.
    """
    if content is None:
        for name in ("log.jsonl", trainer.result, STATE, PREVIOUS):
            (trainer.folder / name).unlink(missing_ok=True)
        files.write(trainer.folder / "recipe.toml", writing.dump(trainer.recipe))
        trainer.report(Note(text=trainer.describe()))
        _note_conditions(trainer)
        return True
    resume(trainer, content)
    unfinished = trainer.state.step < trainer.config.steps
    if trainer.state.best < math.inf:
        _check_result(trainer)
    if unfinished:  # with the recipe of this command, which may differ in keys that don't determine the weights
        files.write(trainer.folder / "recipe.toml", writing.dump(trainer.recipe))
    state = f"resuming at step {trainer.state.step}" if unfinished else "this run is already finished"
    trainer.report(Note(text=state))
    if unfinished:
        _note_conditions(trainer)
    return unfinished


def _check_result(trainer: Trainable) -> None:
    """Check the file with the best weights; if it is missing or damaged, make it again if those are this state's.

    Raises CheckFailed if they are not, UsageError if it is the file of another run.
    """
    path, state = trainer.folder / trainer.result, trainer.state
    try:
        trainer.check_result(path)
        return
    except CheckFailed as error:
        problem = error.message
    except UsageError:
        if path.exists():
            raise
        problem = f"{path} is missing"
    if state.best_step != state.step:
        there = "" if state.best_step is None else f", which were those of step {state.best_step}"
        raise CheckFailed(f"{problem}; {STATE} does not hold its weights{there}", "--resume never trains again")
    if path.exists():
        path.replace(path.with_name(f"{path.stem}.damaged{path.suffix}"))
    trainer.save_result()
    trainer.report(Note(text=f"{problem}; it was made again from {STATE}"))


def _note_conditions(trainer: Trainable) -> None:
    """Add the present conditions to the state if they are new; say how they differ from those before."""
    here, state = conditions.now(trainer.device), trainer.state
    changed = conditions.changes(state.conditions[-1], here) if state.conditions else ""
    if changed:
        text = f"the run goes on under other conditions ({changed}): its weights can differ in their last bits"
        trainer.report(Note(text=f"{text} from those of a run that was never interrupted"))
    if changed or not state.conditions:
        state.conditions.append({conditions.FROM_STEP: state.step, **here})


def resume(trainer: Trainable, content: dict[str, Any]) -> None:
    """As `restore`. If the run is unfinished, log lines after that state are dropped."""
    restore(trainer, content)
    if trainer.state.step < trainer.config.steps:
        damaged = trainer.log.cut(trainer.state.step)
        if damaged:
            trainer.report(Note(text=f"log.jsonl had lines that can't be read; as it was, it is kept as {damaged}"))


def restore(trainer: Trainable, content: dict[str, Any]) -> None:
    """Restore the content of a resume.pt.

    Raises UsageError if it is the state of a different run, CheckFailed if it can't be restored.
    """
    try:
        check_same(trainer, content, trainer.folder)
        trainer.load_state(content)
        _check_types(trainer.state)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError) as error:
        raise CheckFailed(f"{trainer.folder / STATE} is not a state of this run: {error}") from error


def _check_types(state: State) -> None:
    """Raise TypeError if a restored state has other types than it was saved with, so that steps can't be taken."""
    numbers = [state.best, state.seconds]
    for entry in state.pending:
        numbers += entry.values() if isinstance(entry, dict) else [entry]
    whole = isinstance(state.pending, list) and isinstance(state.step, int) and state.step >= 0
    if not whole or not all(map(is_number, numbers)):
        raise TypeError("its step, times or losses are no numbers")


def check_same(trainer: Trainable, content: dict[str, Any], where: Path) -> None:
    """Raise UsageError if a resume.pt or a result, read from `where`, is of a different run."""
    changes = trainer.changes(content)
    if changes:
        raise UsageError(
            f"{where} holds a different run\n" + "\n".join(f"  {line}" for line in changes),
            "choose another --out, or `train --resume never` to start from scratch and overwrite it",
        )


def run(trainer: Trainable, asked: Callable[[], int | None], keeper: Keeper | None = None) -> None:
    """Train from the current step to the last, logging, validating and saving as the config says.

    At the last step all three are done in any case, after what is done there because of its number: a longer run does
    that too. Raises Interrupted, after saving, if `asked` returns an exit code, and what the trainer raises: Diverged
    after the state before it is written.
    """
    try:
        _run(trainer, asked, keeper)
    except Diverged:
        trainer.saved_all()
        raise


def _run(trainer: Trainable, asked: Callable[[], int | None], keeper: Keeper | None) -> None:
    config, state = trainer.config, trainer.state
    trainer.began = time.monotonic() - state.seconds
    while state.step < config.steps:
        state.pending.append(trainer.step(state.step))
        state.step += 1
        last = state.step == config.steps
        logs, validates = (state.step % every == 0 for every in (config.log_every, config.eval_every))
        if not (logs or last):  # `write_log` says more
            trainer.report(Progress(task=trainer.task, done=state.step, total=config.steps, unit="steps"))
        if logs:
            trainer.write_log()
        if validates:
            trainer.validate()
        if keeper:
            keeper.stable()
        if last and not logs:
            trainer.write_log()
        if last and not validates:
            trainer.validate()
        if keeper:
            keeper.copies()
        if last or validates:
            trainer.save()
        code = asked()
        if last:
            trainer.saved_all()
        if code is not None and not last:
            trainer.save()
            trainer.saved_all()
            raise Interrupted(
                f"stopped at step {state.step:,} of {config.steps:,}; the state is saved in {trainer.folder}",
                "run the same command again to resume",
                exit_code=code,
            )
