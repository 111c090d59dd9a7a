"""All printing: results go to stdout, progress, notes and errors to stderr.

Rich is imported only where something is drawn with it, so that `--help` starts fast. Nothing that comes from outside,
such as a path, is ever read as Rich's markup or as the name of an emoji: it becomes a Text, or is printed as it is.
Nor does a terminal obey it: all of it goes through `formatting.shown`.

A result that can't be written is an error. Progress that nobody can see is not: the work goes on without it.
"""

import errno
import io
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TextIO

from shortcut_cli import SCHEMA_VERSION, cleanup, files
from shortcut_cli.errors import ShortcutError
from shortcut_cli.events import Event, Note, Progress, Validation
from shortcut_cli.formatting import cell, shown, to_json

if TYPE_CHECKING:
    import rich.progress
    import rich.table
    from rich.console import Console

    Table = rich.table.Table

PLAIN_INTERVAL_S = 10.0
PIPE_WIDTH = 120  # columns of a table if there is no terminal
MOST_ROWS = 2000  # of a table that are shown; --json has all
MOST_CHARACTERS = 1000  # of a value in a table that are shown
MOST_LINES = 20  # of a value in a table that are shown
STDERR = 2  # its number, the last of the standard streams'
SHOW_CURSOR = b"\x1b[?25h\n"  # which Rich hides below its bars


def _console(**options: Any) -> "Console":
    from rich.console import Console

    made = Console(markup=False, emoji=False, **options)
    made.on_broken_pipe = _again  # type: ignore[method-assign]
    return made


def _again() -> None:
    """Raise the BrokenPipeError that Rich has caught; by itself it would exit."""
    raise  # noqa: PLE0704


@cache
def _out() -> "Console":
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return _console(soft_wrap=True, width=None if known else PIPE_WIDTH)


@cache
def _err() -> "Console":
    return _console(stderr=True)


class _Closed(io.TextIOBase):
    """Takes the place of a stdout that was closed before the command began."""

    def write(self, _: str) -> int:
        raise _lost(os.strerror(errno.EBADF))


def harden() -> None:
    """Print file names that are not valid UTF-8 escaped, instead of raising, and do without streams that are closed.

    The numbers of closed streams are taken, so that no file that the command opens gets what is written to them.
    """
    while (spare := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        os.set_inheritable(spare, True)
    os.close(spare)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.excepthook, warnings.showwarning = _traceback, _warning
    sys.stdout = sys.stdout or _Closed()
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of a bug, as Python itself does."""
    text("".join(traceback.format_exception(kind, error, trace)), error=True)


def _warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,  # noqa: ARG001 - these are the names that a library may use
    line: str | None = None,
) -> None:
    """Print a warning of a library, as Python itself does."""
    text(warnings.formatwarning(message, category, filename, lineno, line), error=True)


def _mute(stream: TextIO) -> None:
    """Let a stream that can't be written lead nowhere, what it still holds included."""
    with suppress(OSError):  # it has no number
        number = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


@contextmanager
def _showing() -> Iterator[None]:
    """Raises ShortcutError if what is printed on stdout in this block does not arrive."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        _mute(sys.stdout)
        raise _lost(str(error.strerror)) from error


def _lost(reason: str) -> ShortcutError:
    return ShortcutError(f"the output can't be written to stdout: {reason}", "files that were written are complete")


@contextmanager
def _trying() -> Iterator[None]:
    """What is printed on stderr in this block may get lost."""
    try:
        yield
        sys.stderr.flush()
    except OSError:
        _mute(sys.stderr)


def panel(error: ShortcutError) -> None:
    """Print one panel on stderr: what went wrong, and what to do next."""
    from rich.panel import Panel
    from rich.text import Text

    said = Text(shown(error.message))
    if error.hint:
        said.append("\n\n").append("Next:", "bold").append(f" {shown(error.hint)}")
    with _trying():
        _err().print(Panel(said, title=error.title, title_align="left", border_style="red"))


def text(words: str, *, error: bool = False) -> None:
    """Print text, on stdout or stderr. Raises ShortcutError if stdout can't be written."""
    with _trying() if error else _showing():
        (sys.stderr if error else sys.stdout).write(shown(words))


def made(page: Mapping[str, str]) -> None:
    """Say on stderr where the page is, by what `stages.reporting.refresh` returned; stdout has the result."""
    if page:
        text(f"report: {page['report']}\n", error=True)


def browse(page: Path) -> None:
    """Open a page in the user's browser; a line says so if there is none."""
    import webbrowser

    with files.diverted(1), files.diverted(STDERR):  # a browser may write what it likes
        opened = webbrowser.open(page.resolve().as_uri())
    if not opened:
        text("no browser was found; open the page yourself\n", error=True)


def result(data: Mapping[str, Any], *parts: "Table | str", as_json: bool) -> None:
    """Print the result of a command on stdout: `data` with its schema version as one JSON document, or `parts`.

    Raises ShortcutError if stdout can't be written.
    """
    if as_json:
        text(to_json({"schema_version": SCHEMA_VERSION, **data}, indent=1) + "\n")
        return
    with _showing():
        for part in parts:
            _out().print(shown(part) if isinstance(part, str) else part)


def table(
    title: str,
    columns: Iterable[str],
    rows: Iterable[Iterable[Any]],
    align: Literal["left", "right"] = "right",
    *,
    whole: bool = False,
) -> "Table":
    """A table. align: of the columns after the first, which is aligned left.

    Values may come from a file that anyone has made, so there are only so many rows, and so much of a value: drawing
    takes far longer than reading. whole: if the table is too wide, only the first column is broken into lines, as long
    as that is enough.
    """
    from rich.table import Table
    from rich.text import Text

    made = Table(title=Text(shown(title), "bold"), title_justify="left")
    for number, column in enumerate(columns):
        one_line = whole and number > 0
        made.add_column(Text(shown(column)), justify=align if number else "left", overflow="fold", no_wrap=one_line)
    every = [*rows]
    for row in every[:MOST_ROWS]:
        made.add_row(*(Text(shown(_cut(cell(value)))) for value in row))
    if len(every) > MOST_ROWS:
        made.add_row(f"and {len(every) - MOST_ROWS:,} more rows")
    return made


def _cut(words: str) -> str:
    """As much of a value as a table shows."""
    kept = "\n".join(words[:MOST_CHARACTERS].split("\n")[:MOST_LINES])
    return kept if kept == words else f"{kept} ..."


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

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
    )
    more = (Rate(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
    return Progress(*columns, *more, console=_err(), transient=True)


class Reporter:
    """Shows the events of a stage: live bars on a terminal, otherwise a plain line at most every PLAIN_INTERVAL_S."""

    def __init__(self) -> None:
        self.live: rich.progress.Progress | None = None
        self.tasks: dict[str, rich.progress.TaskID] = {}
        self.printed = time.monotonic()
        self.shown = ExitStack()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            with _trying():
                self.live.stop()
            self.shown.close()

    def __call__(self, event: Event) -> None:
        """Show one event of a stage."""
        with _trying():
            self._show(event)

    def _show(self, event: Event) -> None:
        if isinstance(event, Note):
            _err().print(shown(event.text), highlight=False, soft_wrap=True)
        elif isinstance(event, Validation):
            best = " (best so far)" if event.loss <= event.best else ""
            scored = shown(event.text) or f"{event.loss:.4f} nats per token"
            _err().print(f"step {event.step:,}: validation {scored}{best}", highlight=False, soft_wrap=True)
        elif _err().is_terminal:
            self._bar(event)
        else:
            self._plain(event)

    def _bar(self, event: Progress) -> None:
        if not self.live:
            self.live = _bars()
            self.shown.enter_context(cleanup.due(lambda: os.write(STDERR, SHOW_CURSOR)))
            self.live.start()
        if event.task not in self.tasks:
            self.tasks[event.task] = self.live.add_task(
                shown(event.task), total=event.total, unit=shown(event.unit), loss=""
            )
        loss: dict[str, Any] = {} if event.loss is None else {"loss": f"loss {event.loss:.4f}"}
        self.live.update(self.tasks[event.task], completed=event.done, total=event.total, **loss)
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
        _err().print(shown(line), highlight=False, soft_wrap=True)
