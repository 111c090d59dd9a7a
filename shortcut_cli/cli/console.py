"""All printing: results go to stdout, progress, notes and errors to stderr.

Rich is imported only where something is drawn with it, so that `--help` starts fast.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from shortcut_cli import SCHEMA_VERSION
from shortcut_cli.errors import ShortcutError
from shortcut_cli.events import Event, Note, Progress, Validation
from shortcut_cli.formatting import cell

if TYPE_CHECKING:
    import rich.progress
    import rich.table
    from rich.console import Console

    Table = rich.table.Table

PLAIN_INTERVAL_S = 10.0
PIPE_WIDTH = 120  # columns of a table if there is no terminal


@cache
def _out() -> "Console":
    from rich.console import Console

    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(soft_wrap=True, width=None if known else PIPE_WIDTH)


@cache
def _err() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


def harden() -> None:
    """Print file names that are not valid UTF-8 escaped, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def panel(error: ShortcutError) -> None:
    """Print one panel on stderr: what went wrong, and what to do next."""
    from rich.markup import escape
    from rich.panel import Panel

    hint = f"\n\n[bold]Next:[/] {escape(error.hint)}" if error.hint else ""
    _err().print(Panel(escape(error.message) + hint, title="Error", title_align="left", border_style="red"))


def text(words: str, *, error: bool = False) -> None:
    """Print text as it is, on stdout or stderr."""
    (sys.stderr if error else sys.stdout).write(words)


def result(data: Mapping[str, Any], *shown: "Table | str", as_json: bool) -> None:
    """Print the result of a command on stdout: `data` with its schema version as one JSON document, or `shown`."""
    if as_json:
        text(json.dumps({"schema_version": SCHEMA_VERSION, **data}, indent=1) + "\n")
        return
    for part in shown:
        _out().print(part, markup=not isinstance(part, str))


def table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]], align: Literal["left", "right"] = "right"
) -> "Table":
    """A table. align: of the columns after the first, which is aligned left."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=escape(title), title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify=align if number else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(cell(value)) for value in row))
    return made


def pairs(title: str, rows: Mapping[str, Any]) -> "Table":
    """A table with two columns, names and values."""
    return table(title, ("", "value"), rows.items())


def _bars() -> "rich.progress.Progress":
    """Progress bars on stderr, with rate and time left."""
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{cell(float(speed))} {task.fields['unit']}/s" if speed else "")

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f}"))
    more = (Rate(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
    return Progress(*columns, *more, console=_err(), transient=True)


class Reporter:
    """Shows the events of a stage: live bars on a terminal, otherwise a plain line at most every PLAIN_INTERVAL_S."""

    def __init__(self) -> None:
        self.live: rich.progress.Progress | None = None
        self.tasks: dict[str, rich.progress.TaskID] = {}
        self.printed = time.monotonic()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, event: Event) -> None:
        """Show one event of a stage."""
        if isinstance(event, Note):
            _err().print(event.text, markup=False, highlight=False, soft_wrap=True)
        elif isinstance(event, Validation):
            best = " (best so far)" if event.loss <= event.best else ""
            shown = event.text or f"{event.loss:.4f} nats per token"
            _err().print(f"step {event.step:,}: validation {shown}{best}", highlight=False, soft_wrap=True)
        elif _err().is_terminal:
            self._bar(event)
        else:
            self._plain(event)

    def _bar(self, event: Progress) -> None:
        if not self.live:
            self.live = _bars()
            self.live.start()
        if event.task not in self.tasks:
            self.tasks[event.task] = self.live.add_task(event.task, total=event.total, unit=event.unit, loss="")
        shown: dict[str, Any] = {} if event.loss is None else {"loss": f"loss {event.loss:.4f}"}
        self.live.update(self.tasks[event.task], completed=event.done, total=event.total, **shown)
        if event.done >= event.total:
            self.live.remove_task(self.tasks.pop(event.task))

    def _plain(self, event: Progress) -> None:
        now = time.monotonic()
        if now - self.printed < PLAIN_INTERVAL_S:
            return
        self.printed = now
        rate = ""
        if event.seconds:
            left = event.seconds / event.done * (event.total - event.done)
            rate = f", {event.tokens / event.seconds:,.0f} tokens/s, {left:,.0f} s left"
        loss = "" if event.loss is None else f", loss {event.loss:.4f}"
        line = f"{event.task}: {event.done:,} of {event.total:,} {event.unit}{loss}{rate}"
        _err().print(line, highlight=False, soft_wrap=True)
