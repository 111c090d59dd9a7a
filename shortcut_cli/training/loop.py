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
from shortcut_cli.errors import CheckFailed, Interrupted, ShortcutError, UsageError
from shortcut_cli.events import Note, Report
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
    seconds: float = 0.0  # of training, summed over all parts of a resumed run
    pending: list[Any] = field(default_factory=list)  # what `step` returned since the last line of the log


class Trainable(Protocol):
    """What the loop needs of a trainer, whether of a model or of a codec."""

    result: str  # name of the file with the best weights
    state: State
    folder: Path
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
        """Write resume.pt."""

    def load_state(self, content: dict[str, Any]) -> None:
        """Restore weights, optimizers and `state` from the content of a resume.pt."""


def check_finite(number: int, values: Mapping[str, float], folder: Path) -> None:
    """Raise ShortcutError if any of `values`, the losses and gradient norm of step `number`, is not finite."""
    if not all(map(math.isfinite, values.values())):
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        raise ShortcutError(
            f"the loss or its gradient is not finite at step {number + 1} ({shown}); "
            f"the last good state is kept in {folder}",
            "a lower train.lr, a longer train.warmup or train.clip = 1.0 usually helps",
        )


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
                raise CheckFailed(error.message, "--resume never starts from scratch and overwrites the run") from error
            report(Note(text=f"{error.message}; continuing from the state before it, {kept[number].name}"))
    if (folder / result).exists():
        raise UsageError(
            f"{folder} has a {result} but no {STATE} to continue from", "choose another --out, or --resume never"
        )
    return None


def start(trainer: Trainable, content: dict[str, Any] | None) -> bool:
    """Prepare the run folder for a run from scratch (`content` None), or restore the state in `content`.

    Returns whether there are steps left to take. Raises what `resume` raises.
    """
    if content is None:
        for name in ("log.jsonl", trainer.result, STATE, PREVIOUS):
            (trainer.folder / name).unlink(missing_ok=True)
        files.write(trainer.folder / "recipe.toml", writing.dump(trainer.recipe))
        trainer.report(Note(text=trainer.describe()))
        return True
    resume(trainer, content)
    unfinished = trainer.state.step < trainer.config.steps
    state = f"resuming at step {trainer.state.step}" if unfinished else "this run is already finished"
    trainer.report(Note(text=state))
    return unfinished


def resume(trainer: Trainable, content: dict[str, Any]) -> None:
    """Restore the content of a resume.pt. If the run is unfinished, log lines after that state are dropped.

    Raises UsageError if it is the state of a different run, CheckFailed if it can't be restored.
    """
    try:
        changes = trainer.changes(content)
        if not changes:
            trainer.load_state(content)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckFailed(f"{trainer.folder / STATE} is not a state of this run: {error}") from error
    if changes:
        raise UsageError(
            f"{trainer.folder} holds a different run\n" + "\n".join(f"  {line}" for line in changes),
            "choose another --out, or --resume never to start from scratch and overwrite it",
        )
    if trainer.state.step < trainer.config.steps:
        trainer.log.cut(trainer.state.step)


def run(trainer: Trainable, asked: Callable[[], int | None]) -> None:
    """Train from the current step to the last, logging, validating and saving as the config says.

    Raises Interrupted, after saving, if `asked` returns an exit code.
    """
    config, state = trainer.config, trainer.state
    trainer.began = time.monotonic() - state.seconds
    while state.step < config.steps:
        state.pending.append(trainer.step(state.step))
        state.step += 1
        last = state.step == config.steps
        if last or state.step % config.log_every == 0:
            trainer.write_log()
        if last or state.step % config.eval_every == 0:
            trainer.validate()
            trainer.save()
        code = asked()
        if code is not None and not last:
            trainer.save()
            raise Interrupted(
                f"stopped at step {state.step} of {config.steps}; the state is saved in {trainer.folder}",
                "run the same command again to resume",
                exit_code=code,
            )
