"""Curves of one training or of several: what was logged, against steps, tokens, FLOPs or seconds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from shortcut_cli.report import page, svg
from shortcut_cli.report.run_data import RunData

WIDTH, HEIGHT = 480, 280  # of a plot, in pixels
MOST_ROWS = 200  # of a table of validations
Line = dict[str, float]


# Words beside the button, label of the axis, and key of the places on it in a line of the log.
AXES = (
    ("steps", "steps", "step"),
    ("tokens", "tokens", "tokens"),
    ("FLOPs", "training FLOPs", "flops"),
    ("seconds", "seconds of training", "seconds"),
)


@dataclass(frozen=True)
class Curve:
    """Values with the lines of the log that they are at, which have the keys of AXES as far as these are known."""

    label: str
    lines: Sequence[Line]
    values: Sequence[float]
    colour: int
    dashed: bool = False


def _placed(run: RunData, lines: Sequence[Line]) -> list[Line]:
    """Lines of a log with the tokens and FLOPs up to their step, as far as these are known."""
    tokens, flops = run.tokens_per_step or math.nan, run.costs.flops if run.costs else math.nan
    return [line | {"tokens": line["step"] * tokens, "flops": line["step"] * tokens * flops} for line in lines]


def speeds(run: RunData) -> list[float]:
    """Tokens per second between each line of the log and the one before, or the start; NaN if no time passed."""
    found, before = [], {"tokens": 0.0, "seconds": 0.0}
    for line in run.log:
        spent = line["seconds"] - before["seconds"]
        found.append((line["tokens"] - before["tokens"]) / spent if spent > 0 else math.nan)
        before = {"tokens": line["tokens"], "seconds": line["seconds"]}
    return found


def logged(lines: Sequence[Line], key: str, label: str, colour: int, *, dashed: bool = False) -> Curve:
    """The values of one key of the lines that have it."""
    found = [line for line in lines if key in line]
    return Curve(label, found, [line[key] for line in found], colour, dashed)


def of_run(run: RunData, name: str) -> Markup:
    """The curves of one run. name: of the choice between axes, unique in the page."""
    lines, validations = _placed(run, run.log), _placed(run, run.validations)
    made = {
        "loss, nats per token": [
            logged(lines, "loss", "training", 0, dashed=True),
            logged(validations, "validation", "validation", 1),
        ],
        "learning rate": [logged(lines, "lr", "learning rate", 2)],
        "gradient norm, before clipping": [logged(lines, "gradient_norm", "gradient norm", 3)],
        "tokens/s": [Curve("tokens/s", lines, speeds(run), 4)],
    }
    return panels(name, made) + _table(validations)


def of_runs(runs: Sequence[RunData], names: Sequence[str], name: str) -> Markup:
    """The same curves of several runs on common axes. names: of the runs."""
    made: dict[str, list[Curve]] = {}
    for number, (run, label) in enumerate(zip(runs, names, strict=True)):
        lines, validations = _placed(run, run.log), _placed(run, run.validations)
        for title, curve in (
            ("validation loss, nats per token", logged(validations, "validation", label, number)),
            ("training loss, nats per token", logged(lines, "loss", label, number)),
            ("gradient norm, before clipping", logged(lines, "gradient_norm", label, number)),
            ("tokens/s", Curve(label, lines, speeds(run), number)),
        ):
            made.setdefault(title, []).append(curve)
    return panels(name, made)


def panels(name: str, made: Mapping[str, Sequence[Curve]]) -> Markup:
    """Plots of the curves under each title, against a choice of axes: each plot and axis that has points."""
    parts = {}
    for words, label, key in AXES:
        drawn = Markup("").join(_panel(title, curves, label, key) for title, curves in made.items())
        if drawn:
            parts[words] = page.template("plots.html", plots=drawn)
    return page.choice(name, "Against", parts) if parts else Markup("<p>Nothing is logged yet.</p>")


def _panel(label: str, curves: Sequence[Curve], axis: str, key: str) -> Markup:
    """One plot with its legend; empty if it has no points."""
    series = [
        svg.Series(
            curve.label,
            [line.get(key, math.nan) for line in curve.lines],
            curve.values,
            dashed=curve.dashed,
            colour=curve.colour,
        )
        for curve in curves
    ]
    points = [(x, y) for one in series for x, y in zip(one.x, one.y, strict=True) if math.isfinite(x + y)]
    if not points:
        return Markup("")
    across = svg.Axis(axis, 0.0, max(x for x, _ in points) or 1.0)
    values = [y for _, y in points]
    from_zero = "loss" not in label and min(values) >= 0
    up = svg.Axis(label, 0.0, max(values) * 1.05 or 1.0) if from_zero else svg.around(label, values)
    drawn = svg.plot(series, across, up, _told(label, series, axis), width=WIDTH, height=HEIGHT)
    names = svg.legend([one.label for one in series], [one.colour or 0 for one in series]) if len(series) > 1 else ""
    return page.template("figure.html", drawn=drawn, legend=names, caption="")


def _told(label: str, series: Sequence[svg.Series], axis: str) -> str:
    """The plot in words: where each line begins, is lowest, and ends."""
    lines = [f"{label} against {axis}."]
    for one in series:
        known = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(x + y)]
        if known:
            (_, first), (end, last) = known[0], known[-1]
            low = min(y for _, y in known)
            ends = f"begins at {svg.short(first)}, ends at {svg.short(last)} at {svg.short(end)}"
            lines.append(f"{one.label} {ends}, lowest {svg.short(low)}.")
    return " ".join(lines)


def _table(validations: Sequence[Line]) -> Markup:
    """The validations as a table, closed at first."""
    rows = [(line["step"], line["tokens"], line.get("seconds"), line["validation"]) for line in validations]
    if not rows:
        return Markup("")
    every = math.ceil(len(rows) / MOST_ROWS)
    kept = rows[::every] if rows[::every][-1] == rows[-1] else [*rows[::every], rows[-1]]
    caption = "" if every == 1 else f"every {every}th of {len(rows):,} validations, and the last"
    columns = ("step", "tokens", "seconds", "validation loss, nats per token")
    whole = ((*(_whole(one) for one in (step, tokens)), seconds, loss) for step, tokens, seconds, loss in kept)
    return page.details("Validations as a table", page.table(columns, whole, caption))


def _whole(value: float) -> int | None:
    return int(value) if math.isfinite(value) else None
