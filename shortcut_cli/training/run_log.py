"""log.jsonl of a run: one line per logged step and one per validation."""

import json
from pathlib import Path
from typing import Any

from shortcut_cli import files
from shortcut_cli.errors import Unavailable


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
            stream.write(json.dumps({"step": step, **values}) + "\n")
        if self.events:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)

    def cut(self, step: int) -> None:
        """Drop the lines after `step`, and an incomplete last line."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        whole = (line for line in lines if line.endswith("\n"))
        files.write(self.path, "".join(line for line in whole if json.loads(line)["step"] <= step))


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl, as dictionaries."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
