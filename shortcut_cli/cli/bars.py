"""Progress bars: what stands beside each, as far as the screen has room, and else above it.

No number is broken or cut: counts become thousands and millions, then the least important leaves.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shortcut_cli.cli.layout import Measure, shortened
from shortcut_cli.formatting import cell

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PARTS = "parts"
BAR = "bar"
ROOMY = 110  # columns of the screen from which a bar has everything beside it
# What is beside a bar; if there is no room for the last of these, the bar has two lines.
EVERYTHING = ("name", BAR, "amount", "loss", "epoch", "spent", "left", "rate")
BESIDE = (
    ("name", BAR, "amount", "loss", "spent", "left"),
    ("name", BAR, "short", "loss", "spent", "left"),
)
# Else each bar has these lines, of which the first choice that has room is taken.
ABOVE = (
    (("name", "amount", "loss"),),
    (("name", "short", "loss"),),
    (("amount", "loss"),),
    (("short", "loss"),),
    (("short",), ("loss",)),
    (("short",), ("value",)),
)
BELOW = (((BAR, "spent", "left"),), ((BAR, "left"),))
STEADY = {"loss": 22, "left": 10, "spent": 4}  # columns that are kept for what changes, so that nothing beside it moves
BROADEST, NARROWEST = 40, 7  # a bar
LEAST = 3  # of it, on a line of its own
Values = Mapping[str, str]
Row = list[tuple[str, int]]  # names of values, and how many columns each has


def row(every: Sequence[Values], keys: Sequence[str], room: int, measure: Measure, *, least: int) -> Row | None:
    """The columns of `keys` that any of the bars has a value for, with their widths; None if there is no room."""
    found = {key: max((measure(each.get(key, "")) for each in every), default=0) for key in keys if key != BAR}
    widths = {key: max(width, STEADY.get(key, 0)) for key, width in found.items() if width}
    bar = room - sum(widths.values()) - len(widths)
    if (BAR in keys and bar < least) or bar + 1 < 0:
        return None
    return [(key, min(bar, BROADEST) if key == BAR else widths[key]) for key in keys if key == BAR or key in widths]


def rows(every: Sequence[Values], room: int, measure: Measure) -> Iterator[tuple[int, Row]]:
    """The lines of several bars: the number of the bar, and what is on the line."""
    for keys in (EVERYTHING, *BESIDE) if room >= ROOMY else BESIDE:
        if found := row(every, keys, room, measure, least=NARROWEST):
            yield from ((number, found) for number in range(len(every)))
            return
    for number, each in enumerate(every):
        for choices in (ABOVE, BELOW):
            fitting = ([row([each], keys, room, measure, least=LEAST) for keys in lines] for lines in choices)
            yield from ((number, found) for found in next(filter(all, fitting), ()) if found)


def clock(seconds: float) -> str:
    """A time as 1:02, or 1:02:03 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def made(screen: "Console", left: Callable[[], float | None]) -> "Progress":
    """The bars of a command on a screen. That of its parts comes last; the line above all says what is going on.

    left: tells how many seconds all parts go on, if that is known.
    """
    from rich.cells import cell_len
    from rich.progress import Progress
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    def values(task: Any, room: int) -> Values:
        """What can be said of a task."""
        fields, speed = task.fields, task.finished_speed or task.speed
        whole = fields["unit"] == PARTS
        rest = left() if whole else task.time_remaining
        return {
            **{key: fields[key] for key in ("amount", "short", "epoch")},
            "loss": fields["loss"] or " " * (fields["unit"] == "steps"),  # it has its room before it is known
            "name": shortened(fields["name"], max(8, room // 5), cell_len),
            "value": fields["loss"].removeprefix("loss "),
            "spent": clock(task.elapsed or 0),
            "left": "" if rest is None else f"{clock(rest)} left",
            "rate": f"{cell(float(speed))} {fields['unit']}/s" if speed and not whole else "",
        }

    class Bars(Progress):
        def get_renderables(self) -> Iterator[Any]:
            """The lines."""
            room = screen.width
            whole = [task for task in self.tasks if task.fields["unit"] == PARTS]
            if whole:
                yield Text(shortened(whole[0].description, room, cell_len), no_wrap=True)
            tasks = [*(task for task in self.tasks if task not in whole), *whole]
            every = [values(task, room) for task in tasks]
            for number, columns in rows(every, room, cell_len):
                line = Table.grid(padding=(0, 1), pad_edge=False)
                for _, width in columns:
                    line.add_column(width=width, no_wrap=True)
                task = tasks[number]
                bar = ProgressBar(total=task.total, completed=task.completed)
                line.add_row(*(bar if key == BAR else Text(every[number].get(key, "")) for key, _ in columns))
                yield line

    return Bars(console=screen, transient=True)
