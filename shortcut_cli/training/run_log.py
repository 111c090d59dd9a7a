"""log.jsonl of a run: one line per logged step and one per validation."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shortcut_cli import files
from shortcut_cli.errors import CheckFailed, Unavailable
from shortcut_cli.formatting import to_json
from shortcut_cli.kept.inputs import is_number, move_away

MOST_WAITING = 10_000  # validations between two other lines
MOST_CHARACTERS = 1_000_000  # of a line: far more than any has
REMEDY = "move its run folder away, then train it again"


class Log:
    """Writes log.jsonl and, if asked to, TensorBoard events.

    Raises Unavailable if TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, tensorboard: bool, name: str = "log.jsonl") -> None:
        self.path = folder / name
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
        """Append one line, and the same values to TensorBoard."""
        with files.naming(self.path), open(self.path, "a", encoding="utf-8") as stream:
            stream.write(to_json({"step": step, **values}) + "\n")
        if self.events:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)

    def sync(self) -> None:
        """Wait until the disk has all lines, so that no state is saved whose log a power cut could take."""
        if self.path.exists():
            with open(self.path, "rb") as stream:
                os.fsync(stream.fileno())

    def cut(self, step: int) -> Path | None:
        """Drop the lines after `step`, an incomplete last line, and zeros, which a power cut leaves.

        Other lines that can't be read are dropped too. The log as it was is then kept, and its path returned.
        """
        damaged = any(_line(text) is None and text.strip(b"\0\n") for text in _lines(self.path) if _is_ended(text))
        kept = move_away(self.path) if damaged else None
        with files.writing(self.path) as stream:
            for text in _lines(kept or self.path):
                values = _line(text) if _is_ended(text) else None
                if values is not None and values["step"] <= step:
                    stream.write(text.strip(b"\0\n") + b"\n")
        return kept


class NoLog(Log):
    """The log of a process that writes none: another one of the same training does."""

    def __init__(self) -> None:
        super().__init__(Path(), tensorboard=False)

    def write(self, *, step: int, **values: float) -> None:
        """Write nothing."""

    def sync(self) -> None:
        """Wait for nothing."""


def timed(lines: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The validations in the lines of a log, each with the seconds of training at its step.

    A validation is logged without its time, and the last one before the line of its step. So the time is on the
    straight line between those of the lines before and after, from 0 at step 0.
    """
    waiting: list[Mapping[str, Any]] = []
    before = (0, 0.0)
    for line in lines:
        if line.get("validation") is not None:
            waiting.append(line)
            if len(waiting) > MOST_WAITING:  # no log of ours
                yield dict(waiting.pop(0)) | {"seconds": before[1]}
        elif is_number(line.get("seconds")):
            after = (line["step"], float(line["seconds"]))
            yield from (dict(one) | {"seconds": _between(before, after, one["step"])} for one in waiting)
            waiting, before = [], after
    yield from (dict(one) | {"seconds": before[1]} for one in waiting)


def _between(before: tuple[float, float], after: tuple[float, float], step: float) -> float:
    """Seconds at a step on the line through two (step, seconds)."""
    if after[0] <= before[0]:
        return before[1]
    share = min(1.0, max(0.0, (step - before[0]) / (after[0] - before[0])))
    return before[1] + (after[1] - before[1]) * share


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a log; one that is longer than any of ours in parts; none if there is no log."""
    if os.path.lexists(path):
        with files.regular(path) as stream:
            yield from iter(lambda: stream.readline(MOST_CHARACTERS), b"")


def _is_ended(text: bytes) -> bool:
    """Whether the end of a line is not missing because a process was killed."""
    return text.endswith(b"\n") or len(text) == MOST_CHARACTERS


def _line(text: bytes) -> dict[str, Any] | None:
    """The values of a line of log.jsonl, numbers or None by name, with a step; None if it is not such a line."""
    try:
        values = json.loads(text.strip(b"\0\n"))
    except (ValueError, RecursionError):
        return None
    step = values.get("step") if isinstance(values, dict) else None
    known = isinstance(step, int) and not isinstance(step, bool)
    return values if known and all(value is None or is_number(value) for value in values.values()) else None


def read_log(folder: Path, name: str = "log.jsonl") -> Iterator[dict[str, Any]]:
    """The lines of log.jsonl, or of a log of one process, one at a time: numbers by name, None for what is not finite.

    Raises CheckFailed at one that can't be read.
    """
    path = folder / name
    try:
        with files.regular(path) as stream:
            for number, text in enumerate(iter(lambda: stream.readline(MOST_CHARACTERS), b""), 1):
                values = _line(text)
                if values is None:
                    raise CheckFailed(f"{path} is missing or damaged: line {number} can't be read", REMEDY)
                yield values
    except OSError as error:
        raise CheckFailed(f"{path} is missing or damaged: {error.strerror}", REMEDY) from error
