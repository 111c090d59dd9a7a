"""What every training shares: its log, its states, and how it goes on from one."""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from shortcut_cli import files
from shortcut_cli.errors import CheckFailed, Interrupted, Unavailable, UsageError

Report = Callable[..., None]
Stop = AbstractContextManager[Callable[[], int | None]]
"""What it gives is asked after every step: None to go on, or the exit code with which to save and leave."""
STATE = "resume.pt"
PREVIOUS = "resume.prev.pt"  # the state before the one in resume.pt


class Log:
    """log.jsonl, every step once, and TensorBoard events where they are wanted."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self.path = folder / "log.jsonl"
        self.events: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ModuleNotFoundError as error:
                raise Unavailable(
                    "train.tensorboard needs TensorBoard, which is not installed",
                    "pip install 'shortcut-cli[tensorboard]'",
                ) from error
            self.events = SummaryWriter(folder / "tensorboard")

    def write(self, *, step: int, **values: float) -> None:
        """Append one line."""
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        if self.events:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)

    def cut(self, step: int) -> None:
        """Drop what was logged after `step`, a half-written last line included."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        whole = (line for line in lines if line.endswith("\n"))
        files.write(self.path, "".join(line for line in whole if json.loads(line)["step"] <= step))


def run(trainer: Any, asked: Callable[[], int | None]) -> None:
    """Take a trainer from where it is to its last step; log, validate and save on the way, as its keys say.

    A trainer has keys (steps, log_every, eval_every), state (step, seconds, and pending: what `step` gave since the
    last line of the log), folder and began, and does step(number), write_log(), validate() and save().

    Raises Interrupted where `asked` returns an exit code, after saving.
    """
    keys, state = trainer.keys, trainer.state
    trainer.began = time.monotonic() - state.seconds
    while state.step < keys.steps:
        state.pending.append(trainer.step(state.step))
        state.step += 1
        last = state.step == keys.steps
        if last or state.step % keys.log_every == 0:
            trainer.write_log()
        if last or state.step % keys.eval_every == 0:
            trainer.validate()
            trainer.save()
        code = asked()
        if code is not None and not last:
            trainer.save()
            raise Interrupted(
                f"stopped at step {state.step} of {keys.steps}; the state is saved in {trainer.folder}",
                "run the same command again to go on",
                exit_code=code,
            )


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def earlier(folder: Path, result: str, resume: str, report: Report, load: Callable[[Path], Any]) -> Any | None:
    """The state to go on from: that of resume.pt, or the one before where resume.pt is missing or damaged.

    result: the name of the file that the training ends in. resume: "auto", or "never" to begin again. load: reads a
    state, and raises CheckFailed or UsageError where it can't.
    """
    kept = [path for path in (folder / STATE, folder / PREVIOUS) if path.exists()]
    if resume == "never":
        return None
    for number, path in enumerate(kept, 1):
        try:
            return load(path)
        except (CheckFailed, UsageError) as error:
            if number == len(kept):
                raise CheckFailed(error.message, "--resume never begins again and overwrites the run") from error
            report("note", text=f"{error.message}; going on from the state before it, {kept[number].name}")
    if (folder / result).exists():
        raise UsageError(
            f"{folder} has a {result} but no {STATE} to go on from", "choose another --out, or --resume never"
        )
    return None


def refuse(folder: Path, changes: list[str]) -> None:
    """Raise UsageError where there are changes between the run that lies in a folder and the one that is asked for."""
    if changes:
        raise UsageError(
            f"{folder} holds a run of something else\n" + "\n".join(f"  {line}" for line in changes),
            "choose another --out, or --resume never to begin again and overwrite it",
        )
