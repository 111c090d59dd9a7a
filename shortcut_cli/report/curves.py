"""Curves of one training or of several: what was logged, against steps, tokens, FLOPs or seconds."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from shortcut_cli.report import page, svg
from shortcut_cli.report.run_data import RunData

WIDTH, HEIGHT = 480, 280  # of a plot, in pixels
MOST_ROWS = 200  # of a table of validations
Line = Mapping[str, float]


@dataclass(frozen=True)
class Against:
    """A horizontal axis. at: where a line of the log of a run lies on it; NaN: not known."""

    words: str
    label: str
    at: Callable[[RunData, Line], float]


def _tokens(run: RunData, line: Line) -> float:
    return line["step"] * (run.tokens_per_step or math.nan)


def _flops(run: RunData, line: Line) -> float:
    return _tokens(run, line) * (run.costs.flops if run.costs else math.nan)


AXES = (
    Against("steps", "steps", lambda _, line: line["step"]),
    Against("tokens", "tokens", _tokens),
    Against("FLOPs", "training FLOPs", _flops),
    Against("seconds", "seconds of training", lambda _, line: line.get("seconds", math.nan)),
)


@dataclass(frozen=True)
class Curve:
    """Values of a run, with the lines of the log that they are at."""

    run: RunData
    label: str
    lines: Sequence[Line]
    values: Sequence[float]
    colour: int
    dashed: bool = False


def speeds(run: RunData) -> list[float]:
    """Tokens per second between each line of the log and the one before; NaN at the first, if it is not the start."""
    found, before = [], {"tokens": 0.0, "seconds": 0.0}
    for line in run.log:
        spent = line["seconds"] - before["seconds"]
        found.append((line["tokens"] - before["tokens"]) / spent if spent > 0 else math.nan)
        before = {"tokens": line["tokens"], "seconds": line["seconds"]}
    return found


def _logged(run: RunData, name: str, label: str, colour: int, *, dashed: bool = False) -> Curve:
    return Curve(run, label, run.log, [line[name] for line in run.log], colour, dashed)


def _validated(run: RunData, label: str, colour: int) -> Curve:
    return Curve(run, label, run.validations, [line["validation"] for line in run.validations], colour)


def of_run(run: RunData, name: str) -> Markup:
    """The curves of one run. name: of the choice between axes, unique in the page."""
    panels = {
        "loss, nats per token": [_logged(run, "loss", "training", 0, dashed=True), _validated(run, "validation", 1)],
        "learning rate": [_logged(run, "lr", "learning rate", 2)],
        "gradient norm, before clipping": [_logged(run, "gradient_norm", "gradient norm", 3)],
        "tokens/s": [Curve(run, "tokens/s", run.log, speeds(run), 4)],
    }
    return _panels(name, panels) + _table(run)


def of_runs(runs: Sequence[RunData], names: Sequence[str], name: str) -> Markup:
    """The same curves of several runs on common axes. names: of the runs."""
    numbered = [(run, label, number) for number, (run, label) in enumerate(zip(runs, names, strict=True))]
    panels = {
        "validation loss, nats per token": [_validated(*each) for each in numbered],
        "training loss, nats per token": [_logged(run, "loss", label, n) for run, label, n in numbered],
        "gradient norm, before clipping": [_logged(run, "gradient_norm", label, n) for run, label, n in numbered],
        "tokens/s": [Curve(run, label, run.log, speeds(run), n) for run, label, n in numbered],
    }
    return _panels(name, panels)


def _panels(name: str, panels: Mapping[str, Sequence[Curve]]) -> Markup:
    """A choice of axes; for each, every panel that has points on it."""
    parts = {}
    for axis in AXES:
        drawn = Markup("").join(_panel(label, curves, axis) for label, curves in panels.items())
        if drawn:
            parts[axis.words] = page.template("plots.html", plots=drawn)
    return page.choice(name, "Against", parts) if parts else Markup("<p>Nothing is logged yet.</p>")


def _panel(label: str, curves: Sequence[Curve], axis: Against) -> Markup:
    """One plot with its legend; empty if it has no points."""
    series = [
        svg.Series(
            curve.label,
            [axis.at(curve.run, line) for line in curve.lines],
            curve.values,
            dashed=curve.dashed,
            colour=curve.colour,
        )
        for curve in curves
    ]
    points = [(x, y) for one in series for x, y in zip(one.x, one.y, strict=True) if math.isfinite(x + y)]
    if not points:
        return Markup("")
    across = svg.Axis(axis.label, 0.0, max(x for x, _ in points) or 1.0)
    values = [y for _, y in points]
    up = svg.around(label, values) if "loss" in label else svg.Axis(label, 0.0, max(values) * 1.05 or 1.0)
    drawn = svg.plot(series, across, up, _told(label, series, axis), width=WIDTH, height=HEIGHT)
    names = svg.legend([one.label for one in series], [one.colour or 0 for one in series]) if len(series) > 1 else ""
    return page.template("figure.html", drawn=drawn, legend=names, caption="")


def _told(label: str, series: Sequence[svg.Series], axis: Against) -> str:
    """The plot in words: where each line begins, is lowest, and ends."""
    lines = [f"{label} against {axis.label}."]
    for one in series:
        known = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(x + y)]
        if known:
            (_, first), (end, last) = known[0], known[-1]
            low = min(y for _, y in known)
            ends = f"begins at {svg.short(first)}, ends at {svg.short(last)} at {svg.short(end)}"
            lines.append(f"{one.label} {ends}, lowest {svg.short(low)}.")
    return " ".join(lines)


def _table(run: RunData) -> Markup:
    """The validations as a table, closed at first."""
    rows = [*_rows(run)]
    if not rows:
        return Markup("")
    every = math.ceil(len(rows) / MOST_ROWS)
    kept = rows[::every] if rows[::every][-1] == rows[-1] else [*rows[::every], rows[-1]]
    caption = "" if every == 1 else f"every {every}th of {len(rows):,} validations, and the last"
    columns = ("step", "tokens", "seconds", "validation loss, nats per token")
    return page.details("Validations as a table", page.table(columns, kept, caption))


def _rows(run: RunData) -> Iterator[tuple[object, ...]]:
    for line in run.validations:
        tokens = _tokens(run, line)
        seconds, loss = line.get("seconds"), line["validation"]
        yield int(line["step"]), int(tokens) if math.isfinite(tokens) else None, seconds, loss
