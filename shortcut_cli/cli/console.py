"""All printing: results go to stdout, progress, notes and errors to stderr.

Rich is imported only where something is drawn with it, so that `--help` starts fast. Nothing that comes from outside,
such as a path, is ever read as Rich's markup or as the name of an emoji: it becomes a Text, or is printed as it is.
Nor does a terminal obey it: all of it goes through `formatting.shown`.

A result that can't be written is an error. Progress that nobody can see is not: the work goes on without it.
"""

import errno
import io
import os
import stat
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TextIO

from shortcut_cli import SCHEMA_VERSION, cleanup, files
from shortcut_cli.cli import bars
from shortcut_cli.cli.bars import PARTS
from shortcut_cli.cli.layout import MOST_ROWS, Column, Fitted, Typed, fit, records, wrapped, written
from shortcut_cli.errors import ReaderLeft, ShortcutError, UsageError
from shortcut_cli.events import Event, Note, Part, Progress, Sampled, Validation, Whole
from shortcut_cli.formatting import alike, rounded, shown, to_json, visible

if TYPE_CHECKING:
    import rich.progress
    import rich.table
    from rich.console import Console

    from shortcut_cli.compare.watching import Teller

    Table = rich.table.Table

PLAIN_INTERVAL_S = 10.0
OPEN = "PATH..."  # in a command, what its user has to fill in
LONG_S = 100  # from here on a time is said in minutes
PIPE_WIDTH = 120  # columns of a table if there is no terminal at all
STDERR = 2  # its number, the last of the standard streams'
COMPLETION = "_SHORTCUT_COMPLETE"  # the variable by which a shell asks for completions, beside the user's own line
CLEAR_LINE = "\r\x1b[K"
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
    return _console(soft_wrap=True, width=None if known else _width_of_pipe())


def _width_of_pipe() -> int:
    """The columns of what is not printed on a terminal: those of the terminal on which the other end of a pipe prints.

    Of a pipeline like `shortcut runs | head` stderr or stdin is still that terminal.
    """
    with suppress(OSError, ValueError):  # it has no number
        if stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
            for stream in (sys.stderr, sys.stdin):
                with suppress(OSError, ValueError, AttributeError):
                    return os.get_terminal_size(stream.fileno()).columns or PIPE_WIDTH
    return PIPE_WIDTH


@cache
def _err() -> "Console":
    return _console(stderr=True)


class _Closed(io.TextIOBase):
    """Takes the place of a stdout that was closed before the command began."""

    def write(self, _: str) -> int:
        raise _lost(os.strerror(errno.EBADF))


class _Loading:
    """Says on a terminal that a large library is being imported, since that can take seconds.

    The line goes away before anything else is printed.
    """

    names = ("pydantic", "numpy", "scipy", "torch", "matplotlib", "miditok", "encodec")
    said = False
    bars = False  # whether there are bars, which say enough

    def find_spec(self, name: str, *_: Any) -> None:
        """Called by Python for each module that is about to be imported; finds none itself."""
        if name in self.names and not self.bars and COMPLETION not in os.environ and sys.stderr.isatty():
            # The cursor goes back to the beginning, so that whatever comes next, even of a signal, takes its place.
            with suppress(OSError):
                sys.stderr.write(f"{CLEAR_LINE}loading {name} ...\r")
                sys.stderr.flush()
            _Loading.said = True

    @classmethod
    def over(cls) -> None:
        """Take the line away, if there is one."""
        if cls.said:
            cls.said = False
            with suppress(OSError):
                sys.stderr.write(CLEAR_LINE)
                sys.stderr.flush()


def say_what_loads() -> None:
    """From here on, say on a terminal which large library is being imported."""
    sys.meta_path.insert(0, _Loading())


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
    """Raises ReaderLeft or ShortcutError if what is printed on stdout in this block does not arrive."""
    _Loading.over()
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        raise _unwritten(error) from error


def _unwritten(error: OSError) -> ShortcutError:
    """What to raise if stdout can't be written, which leads nowhere from here on."""
    _mute(sys.stdout)
    if isinstance(error, BrokenPipeError):
        return ReaderLeft("nobody reads stdout any more")
    return _lost(str(error.strerror))


def _lost(reason: str) -> ShortcutError:
    return ShortcutError(f"the output can't be written to stdout: {reason}", "files that were written are complete")


@contextmanager
def _trying() -> Iterator[None]:
    """What is printed on stderr in this block may get lost."""
    _Loading.over()
    try:
        yield
        sys.stderr.flush()
    except OSError:
        _mute(sys.stderr)


def panel(error: ShortcutError) -> None:
    """Print one panel on stderr: what went wrong, and what helps. A command stands below, whole, to be copied."""
    from rich.panel import Panel
    from rich.text import Text

    said = Text(visible(error.message))
    if error.hint:
        said.append("\n\n").append("Hint:", "bold").append(f" {visible(error.hint)}")
    with _trying():
        _err().print(Panel(said, title=error.title, title_align="left", border_style="red"))
        if error.then:
            _say(f"{'Fill in PATH' if OPEN in error.then else 'Next'}: {error.then}", "bold", whole=True)


def text(words: str, *, error: bool = False) -> None:
    """Print text, on stdout or stderr. Raises ReaderLeft or ShortcutError if stdout can't be written."""
    with _trying() if error else _showing():
        (sys.stderr if error else sys.stdout).write(shown(words))


def browse(page: Path) -> None:
    """Open a page in the user's browser; a line says so if there is none."""
    import webbrowser

    with files.diverted(1), files.diverted(STDERR):  # a browser may write what it likes
        opened = webbrowser.open(page.resolve().as_uri())
    if not opened:
        text("no browser was found; open the page yourself\n", error=True)


class Prose(str):
    """Text that a terminal shows in lines broken at spaces; other text, such as a path, stays on its line."""


@cache
def _typed() -> Typed:
    return Typed(_out().width, _fitting().measure)


def stream(words: str) -> None:
    """Print a part of a text on stdout, at once: on a terminal by whole words, elsewhere as its very bytes in UTF-8.

    Raises ReaderLeft if nobody reads it any more, ShortcutError if it can't be written otherwise.
    """
    bare = None if sys.stdout.isatty() else getattr(sys.stdout, "buffer", None)
    if bare is None:
        text(_typed().push(words))
        return
    try:
        bare.write(words.encode())
        bare.flush()
    except OSError as error:
        raise _unwritten(error) from error


def end_stream(*paths: str) -> None:
    """Print what is left, and say on stderr which files have all of it, below it if a terminal may show both."""
    if sys.stdout.isatty():
        text(_typed().end())
    below = "\n" if paths and any(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr)) else ""
    text(below + "".join(f"{path}\n" for path in paths), error=True)


def standard_input(most: int) -> bytes:
    """What stdin has, up to `most` bytes. Raises UsageError if it is closed or can't be read."""
    try:
        return sys.stdin.buffer.read(most) if sys.stdin else b""
    except OSError as error:
        raise UsageError(f"standard input can't be read: {error.strerror}") from error


def result(data: Mapping[str, Any], *parts: "Table | str", as_json: bool, written: Sequence[str] = ()) -> None:
    """Print the result of a command on stdout: `data` with its schema version as one JSON document, or `parts`.

    written: the files that are there now because of the command, in the document under that name.

    Raises ShortcutError if stdout can't be written.
    """
    if as_json:
        text(to_json({"schema_version": SCHEMA_VERSION, **data, "written": [*written]}, indent=1) + "\n")
        return
    with _showing():
        for part in parts:
            _out().print(_broken(part) if isinstance(part, str) else part)


def note(words: str, style: str = "", *, whole: bool = False) -> None:
    """Print something for the user on stderr. whole: a command, which stays in one line so that it can be copied."""
    with _trying():
        _say(words, style, whole=whole)


def _say(words: str, style: str = "", *, whole: bool = False) -> None:
    from rich.text import Text

    broken = _err().is_terminal and not whole
    text = wrapped(shown(words), _err().width, _fitting().measure) if broken else shown(words)
    _err().print(Text(text, style), soft_wrap=True)


def _broken(words: str) -> str:
    """Text as it is printed on stdout."""
    if not (isinstance(words, Prose) and _out().is_terminal):
        return shown(words)
    return wrapped(shown(words), _out().width, _fitting().measure)


def table(
    title: str,
    columns: Iterable[str | Column],
    rows: Iterable[Iterable[Any]],
    align: Literal["left", "right"] = "right",
) -> "Table":
    """A table, which shows as many of its columns as there is room for, see `layout`, and names the others below.

    align: of the columns after the first, which is aligned left. The first never leaves, nor does a column of rank 0.
    Values may come from a file that anyone has made, so there are only so many rows, and so much of a value: drawing
    takes far longer than reading.
    """
    from rich.text import Text

    named = [one if isinstance(one, Column) else Column(one, min(1, number)) for number, one in enumerate(columns)]
    named = [Column(shown(one.heading), one.rank) for one in named]
    every = [tuple(row) for row in rows]
    if len(named) > 2:  # of two columns the second has values of all kinds
        every = [*zip(*(alike(column) for column in zip(*every, strict=True)), strict=True)]
    made: Table = _fitting()(title=Text(shown(title), "bold"), title_justify="left")
    shown_rows = every[:MOST_ROWS]
    vars(made).update(named=named, values=shown_rows, more=len(every) - len(shown_rows))
    for number, column in enumerate(named):
        made.add_column(Text(column.heading), justify=align if number else "left")
    for row in shown_rows:
        made.add_row(*(Text(written(value)) for value in row))
    return made


@cache
def _fitting() -> Any:
    """The class of tables that choose their columns when they are drawn, since only then the width is known."""
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    def line(words: str, style: str = "") -> Text:
        return Text(words, style, no_wrap=True, overflow="ignore")

    def fitted(words: str) -> Text:
        return Text(words, no_wrap=True, overflow="crop")  # with "ignore" it would not be aligned

    class Fitting(Table):
        named: list[Column]
        values: list[tuple[Any, ...]]
        more: int  # rows that are not shown
        measure = staticmethod(cell_len)

        def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
            """Draw the title, then the columns that fit, then what else there is."""
            room = options.max_width
            yield line(wrapped(str(self.title), room, cell_len), "bold")
            found = fit(self.named, self.values, room, cell_len)
            if found is None:
                yield from map(line, records(self.named, self.values, room, cell_len))
            else:
                yield self.drawn(found)
            if self.more:
                yield line(f"and {self.more:,} more rows: --json", "dim")
            if found and (left := [one.heading for n, one in enumerate(self.named) if n not in found.kept]):
                more = f"more columns with --json or a wider terminal: {', '.join(left)}"
                yield line(wrapped(more, room, cell_len), "dim")

        def drawn(self, found: Fitted) -> Table:
            """The columns that fit, as a table of Rich's."""
            made = Table()
            for number, width, heading in zip(found.kept, found.widths, found.headings, strict=True):
                side = self.columns[number].justify
                made.add_column(fitted(heading), justify=side, width=width)
            for row in found.rows:
                made.add_row(*map(fitted, row))
            return made

    return Fitting


def pairs(title: str, rows: Mapping[str, Any]) -> "Table":
    """A table with two columns, names and values."""
    return table(title, ("", "value"), rows.items())


class Reporter:
    """Shows the events of a stage: live bars on a terminal, otherwise a plain line at most every PLAIN_INTERVAL_S.

    Of a command with several parts the first bar is that of the parts, and the others are those of the present one.
    quiet: shows nothing, as in a process beside one that shows the same. teller: to another process, how far this is.
    """

    def __init__(self, *, quiet: bool = False, teller: "Teller | None" = None) -> None:
        self.quiet, self.teller = quiet, teller
        self.live: rich.progress.Progress | None = None
        self.tasks: dict[str, rich.progress.TaskID] = {}
        self.whole: rich.progress.TaskID | None = None  # the bar of the parts
        self.parts = 0  # how many there are
        self.told: tuple[Whole | None, float] = None, 0.0  # how far all parts are, and when that was said
        self.known: dict[str, Progress] = {}  # the last event of a task that had a loss
        self.printed = time.monotonic()
        self.shown = ExitStack()
        self.lock = threading.RLock()  # several runs of a comparison report at once

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            with _trying():
                self.live.stop()
            self.shown.close()
            _Loading.bars = False

    def __call__(self, event: Event) -> None:
        """Show one event of a stage."""
        if self.quiet:
            return
        if isinstance(event, Sampled):
            stream(event.text)
            return
        if self.teller and isinstance(event, Progress):
            self.teller.tell(self.with_loss(event))
        with self.lock, _trying():
            self._show(event)

    def _show(self, event: Progress | Validation | Note | Part) -> None:
        if isinstance(event, Note):
            _say(event.text)
        elif isinstance(event, Validation):
            best = " (best so far)" if event.loss <= event.best else ""
            scored = event.text or f"{event.loss:.4f} nats per token on the val split"
            _say(f"step {event.step:,}: validation {scored}{best}")
        elif isinstance(event, Part):
            self._part(event)
        elif _drawn():
            self._bar(self.with_loss(event))
        else:
            self._plain(self.with_loss(event))

    def with_loss(self, event: Progress) -> Progress:
        """An event with the loss that its task had last, and the epochs and seconds in proportion, if it has none."""
        if event.loss is not None:
            self.known[event.task] = event
        last = self.known.get(event.task)
        if last is None or event is last or not 0 < last.done <= event.done:
            return event
        grown = event.done / last.done
        return replace(
            event,
            loss=last.loss,
            loss_unit=last.loss_unit,
            epochs=last.epochs * grown,
            tokens=round(last.tokens * grown),
            seconds=last.seconds * grown,
        )

    def _started(self) -> "rich.progress.Progress":
        """The bars, which are there from the first event on."""
        if not self.live:
            self.live, _Loading.bars = bars.made(_err(), self._left), True
            self.shown.enter_context(cleanup.due(lambda: os.write(STDERR, SHOW_CURSOR)))
            self.live.start()
        return self.live

    def _part(self, event: Part) -> None:
        """Show that a part begins: nothing of those before it is left, unless they may go on beside it."""
        self.parts = event.total
        self._tell(event.whole)
        said = f"{event.task} {event.number:,} of {event.total:,}: {event.text}"
        if not _drawn():
            left = self._left()
            _say(said if left is None else f"{said}, about {_about(left)} left")
            return
        live = self._started()
        if not event.beside:
            for task in self.tasks.values():
                live.remove_task(task)
            self.tasks.clear()
            self.known.clear()
        if self.whole is None:
            self.whole = live.add_task("", total=1.0, **_fields("in all", PARTS))
        self._move(live, event.whole, description=shown(said))

    def _tell(self, whole: Whole) -> None:
        self.told = whole, time.monotonic()

    def _left(self) -> float | None:
        """The seconds that a command with parts goes on; None: not known."""
        whole, at = self.told
        if whole is None or whole.left_s is None:
            return None
        return max(0.0, whole.left_s - (time.monotonic() - at))

    def _move(self, live: "rich.progress.Progress", whole: Whole, **said: str) -> None:
        """Move the bar over all parts, which never goes back, and say how many of them are over."""
        amount = f"{whole.over:,}/{self.parts:,} parts"
        share = max(whole.share, live.tasks[live.task_ids.index(self.whole)].completed)  # type: ignore[arg-type]
        live.update(self.whole, completed=share, amount=amount, short=amount, **said)  # type: ignore[arg-type]

    def _bar(self, event: Progress) -> None:
        live = self._started()
        if self.whole is not None and event.whole:
            self._tell(event.whole)
            self._move(live, event.whole)
        if event.task not in self.tasks:
            if event.done >= event.total:
                return
            self.tasks[event.task] = live.add_task(
                shown(event.task),
                total=event.total,
                completed=event.done,
                **_fields(shown(event.task), shown(event.unit)),
            )
        unit = shown(event.unit)
        fields: dict[str, Any] = {"amount": f"{event.done:,}/{event.total:,} {unit}"}
        fields["short"] = f"{rounded(event.done)}/{rounded(event.total)} {unit}"
        fields |= {"epoch": f"epoch {event.epochs:.2f}"} if event.epochs else {}
        if event.loss is not None:
            fields["loss"] = _loss(event).replace(" per ", "/")
        live.update(self.tasks[event.task], completed=event.done, total=event.total, **fields)
        if event.done >= event.total:
            live.remove_task(self.tasks.pop(event.task))
            self.known.pop(event.task, None)

    def _plain(self, event: Progress) -> None:
        now = time.monotonic()
        if now - self.printed < PLAIN_INTERVAL_S:
            return
        self.printed = now
        line = f"{event.task}: {event.done:,} of {event.total:,} {event.unit}"
        line += "" if event.loss is None else f", {_loss(event)}"
        line += f", epoch {event.epochs:.2f}" if event.epochs else ""
        if event.seconds:
            left = event.seconds / event.done * (event.total - event.done)
            rate = f", {event.tokens / event.seconds:,.0f} tokens/s" if event.tokens else ""
            line += f"{rate}, {event.seconds:,.0f} s spent, {left:,.0f} s left"
        _say(line)


def _drawn() -> bool:
    """Whether stderr is a terminal on which lines can be drawn again."""
    return _err().is_terminal and not _err().is_dumb_terminal


def _fields(name: str, unit: str) -> dict[str, Any]:
    """What a bar says in the beginning."""
    return {"name": name, "unit": unit, "amount": "", "short": "", "loss": "", "epoch": ""}


def _about(seconds: float) -> str:
    """A time to come, which is not known exactly."""
    return f"{seconds:.0f} s" if seconds < LONG_S else f"{seconds / 60:,.0f} min"


def _loss(event: Progress) -> str:
    unit = f" {event.loss_unit}" if event.loss_unit else ""
    return shown(f"loss {event.loss:.4f}{unit}")
