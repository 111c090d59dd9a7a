"""log.jsonl of a run: one line per logged step and one per validation."""

import json
import os
from pathlib import Path
from typing import Any

from shortcut_cli import files
from shortcut_cli.errors import CheckFailed, Unavailable
from shortcut_cli.formatting import to_json
from shortcut_cli.kept.inputs import is_number, move_away

REMEDY = "move its run folder away, then train it again"


class Log:
    """Writes log.jsonl and, if asked to, TensorBoard events.

    Raises Unavailable if TensorBoard is asked for and not installed.
    """

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
        """Append one line, and the same values to TensorBoard."""
        with open(self.path, "a", encoding="utf-8") as stream:
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
        *lines, _ = self.path.read_bytes().split(b"\n") if self.path.exists() else [b""]
        found = [(line.strip(b"\0"), _line(line)) for line in lines]
        damaged = any(text and values is None for text, values in found)
        kept = move_away(self.path) if damaged else None
        whole = (text + b"\n" for text, values in found if values is not None and values["step"] <= step)
        files.write(self.path, b"".join(whole))
        return kept


def _line(text: bytes) -> dict[str, Any] | None:
    """The values of a line of log.jsonl, numbers or None by name, with a step; None if it is not such a line."""
    try:
        values = json.loads(text.strip(b"\0"))
    except (ValueError, RecursionError):
        return None
    step = values.get("step") if isinstance(values, dict) else None
    known = isinstance(step, int) and not isinstance(step, bool)
    return values if known and all(value is None or is_number(value) for value in values.values()) else None


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl: numbers by name, None for what is not finite.

    Raises CheckFailed if one of them can't be read.
    """
    path = folder / "log.jsonl"
    try:
        *lines, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise CheckFailed(f"{path} is missing or damaged: {error.strerror}", REMEDY) from error
    found = []
    for number, line in enumerate([*lines, rest] if rest else lines, 1):
        values = _line(line)
        if values is None:
            raise CheckFailed(f"{path} is missing or damaged: line {number} can't be read", REMEDY)
        found.append(values)
    return found
