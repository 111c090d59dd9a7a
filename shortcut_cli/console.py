"""What reaches the screen: progress and notes on stderr, the result on stdout.

Rich is imported by what draws with it: it is a third of the time of `--help`, which does not.
"""

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from shortcut_cli.errors import ShortcutError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.table import Table

PLAIN_INTERVAL_S = 10.0
PIPE_WIDTH = 120  # of what no terminal gives a width


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
    """Let file names that are not valid UTF-8 be printed, escaped, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def panel(error: ShortcutError) -> None:
    """One panel on stderr: what went wrong, and what to do."""
    from rich.markup import escape
    from rich.panel import Panel

    hint = f"\n\n[bold]Next:[/] {escape(error.hint)}" if error.hint else ""
    _err().print(Panel(escape(error.message) + hint, title="Error", title_align="left", border_style="red"))


def result(data: Any, table: "Table | str", *, as_json: bool) -> None:
    """The result of a command on stdout: one JSON document, or a table or text."""
    if as_json:
        sys.stdout.write(json.dumps(data, indent=1) + "\n")
    else:
        _out().print(table, markup=False) if isinstance(table, str) else _out().print(table)


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> "Table":
    """A table whose columns after the first are aligned to the right."""
    from rich.markup import escape
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(cell(value)) for value in row))
    return made


def pairs(title: str, rows: Mapping[str, Any]) -> "Table":
    """A table of names and values."""
    return table(title, ("", "value"), rows.items())


def cell(value: Any) -> str:
    """A value as people read it: thousands separated, four significant digits."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(cell, value))
    return str(value)


def _progress() -> "Progress":
    """Bars on stderr, with rate and time left."""
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
    """The `report(event, **fields)` of every stage: a live bar on a terminal, a plain line now and then in a pipe."""

    def __init__(self) -> None:
        self.live: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.printed = time.monotonic()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, event: str, **fields: Any) -> None:
        """Show one event of a stage: "note", "validation" or "progress"."""
        if event == "note":
            _err().print(fields["text"], markup=False, highlight=False, soft_wrap=True)
        elif event == "validation":
            best = " (best so far)" if fields["loss"] <= fields["best"] else ""
            shown = fields.get("text") or f"{fields['loss']:.4f} nats/token"
            _err().print(
                f"step {fields['step']:,}: validation {shown}{best}",
                highlight=False,
                soft_wrap=True,
            )
        elif _err().is_terminal:
            self._bar(**fields)
        else:
            self._plain(**fields)

    def _bar(self, *, task: str, done: int, total: int, unit: str, loss: float | None = None, **_: Any) -> None:
        if not self.live:
            self.live = _progress()
            self.live.start()
        if task not in self.tasks:
            self.tasks[task] = self.live.add_task(task, total=total, unit=unit, loss="")
        shown: dict[str, Any] = {} if loss is None else {"loss": f"loss {loss:.4f}"}
        self.live.update(self.tasks[task], completed=done, total=total, **shown)
        if done >= total:
            self.live.remove_task(self.tasks.pop(task))

    def _plain(
        self,
        *,
        task: str,
        done: int,
        total: int,
        unit: str,
        loss: float | None = None,
        tokens: int = 0,
        seconds: float = 0.0,
        **_: Any,
    ) -> None:
        now = time.monotonic()
        if now - self.printed < PLAIN_INTERVAL_S:
            return
        self.printed = now
        rate = f", {tokens / seconds:,.0f} tokens/s, {seconds / done * (total - done):,.0f} s left" if seconds else ""
        shown = "" if loss is None else f", loss {loss:.4f}"
        _err().print(f"{task}: {done:,} of {total:,} {unit}{shown}{rate}", highlight=False, soft_wrap=True)
