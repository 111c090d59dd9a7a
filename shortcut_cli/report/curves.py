"""Curves of one training or of several: what was logged, against steps, tokens, FLOPs or seconds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from shortcut_cli.report import page
from shortcut_cli.report.axis import Axis, around
from shortcut_cli.report.chart import MOST_MARKS, Line, Style, chart, legend, style
from shortcut_cli.report.page import exact
from shortcut_cli.report.run_data import RunData

MOST_ROWS = 200  # of a table of validations
Logged = dict[str, float]  # a line of a log


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
    lines: Sequence[Logged]
    values: Sequence[float]
    style: Style


def _placed(run: RunData, lines: Sequence[Logged]) -> list[Logged]:
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


def logged(lines: Sequence[Logged], key: str, label: str, looks: Style) -> Curve:
    """The values of one key of the lines that have it; with marks, if `looks` has them and there is room."""
    found = [line for line in lines if key in line]
    return Curve(label, found, [line[key] for line in found], _roomy(looks, found))


def _roomy(looks: Style, lines: Sequence[Logged]) -> Style:
    return looks if len(lines) <= MOST_MARKS else replace(looks, shape="")


def of_run(run: RunData, name: str) -> Markup:
    """The curves of one run. name: of the choice between axes, unique in the page."""
    lines, validations = _placed(run, run.log), _placed(run, run.validations)
    made = {
        "loss, nats per token": [
            logged(lines, "loss", "training", Style(0, "5 3")),
            logged(validations, "validation", "validation", style(1)),
        ],
        "learning rate": [logged(lines, "lr", "learning rate", Style(2))],
        "gradient norm, before clipping": [logged(lines, "gradient_norm", "gradient norm", Style(3))],
        "tokens/s": [Curve("tokens/s", lines, speeds(run), Style(4))],
    }
    return panels(name, made) + page.template("few.html", words=_few(run)) + _table(validations)


def _few(run: RunData) -> str:
    """Why there is no curve of validations, if there is none."""
    every, last = run.count("train.eval_every"), run.step
    if len(run.validations) > 1 or not every or last is None:
        return ""
    found = f"one validation, at step {run.validations[0]['step']:,.0f}" if run.validations else "no validation"
    return (
        f"There is {found}, so there is no curve of it: the training is at step {last:,}, and train.eval_every is "
        f"{every:,}. A smaller one gives a curve."
    )


def of_runs(runs: Sequence[RunData], names: Sequence[str], name: str) -> Markup:
    """The same curves of several runs on common axes. names: of the runs."""
    made: dict[str, list[Curve]] = {}
    for number, (run, label) in enumerate(zip(runs, names, strict=True)):
        lines, validations, looks = _placed(run, run.log), _placed(run, run.validations), style(number)
        for title, curve in (
            ("validation loss, nats per token", logged(validations, "validation", label, looks)),
            ("training loss, nats per token", logged(lines, "loss", label, looks)),
            ("gradient norm, before clipping", logged(lines, "gradient_norm", label, looks)),
            ("tokens/s", Curve(label, lines, speeds(run), _roomy(looks, lines))),
        ):
            made.setdefault(title, []).append(curve)
    return panels(name, made)


def panels(name: str, made: Mapping[str, Sequence[Curve]]) -> Markup:
    """Plots of the curves under each title, against a choice of axes; in words those that have a single value each."""
    parts, single = {}, {title: _values(curves) for title, curves in made.items() if not _is_drawn(curves)}
    for words, label, key in AXES:
        drawn = Markup("").join(
            _panel(title, curves, label, key) for title, curves in made.items() if title not in single
        )
        if drawn:
            parts[words] = page.template("plots.html", plots=drawn)
    told = [f"{title[:1].upper()}{title[1:]}: {', '.join(values)}." for title, values in single.items() if values]
    if not parts and not told:
        return Markup("<p>Nothing is logged yet.</p>")
    drawn = page.choice(name, "Against", parts) if parts else Markup("")
    return drawn + page.template("single.html", sentences=told)


def _known(curve: Curve) -> list[tuple[Logged, float]]:
    return [(line, value) for line, value in zip(curve.lines, curve.values, strict=True) if math.isfinite(value)]


def _is_drawn(curves: Sequence[Curve]) -> bool:
    """Whether one of them has more than one point: a plot of single points looks empty."""
    return any(len(_known(curve)) > 1 for curve in curves)


def _values(curves: Sequence[Curve]) -> list[str]:
    """The single values of curves, each with its step."""
    return [
        f"{curve.label if len(curves) > 1 else ''} {exact(value)} at step {exact(line['step'])}".lstrip()
        for curve in curves
        for line, value in _known(curve)
    ]


def _panel(label: str, curves: Sequence[Curve], axis: str, key: str) -> Markup:
    """One plot with its legend; empty if it has no points."""
    lines = [
        Line(curve.style, [line.get(key, math.nan) for line in curve.lines], curve.values, label=curve.label)
        for curve in curves
    ]
    points = [(x, y) for one in lines for x, y in zip(one.x, one.y, strict=True) if math.isfinite(x + y)]
    if not points:
        return Markup("")
    across = Axis(axis, 0.0, max(x for x, _ in points) or 1.0)
    values = [y for _, y in points]
    from_zero = "loss" not in label and min(values) >= 0
    up = Axis(label, 0.0, max(values) * 1.05 or 1.0) if from_zero else around(label, values)
    drawn = chart(lines, across, up, _told(label, lines, axis))
    known = [one for one in lines if any(math.isfinite(x + y) for x, y in zip(one.x, one.y, strict=True))]
    names = legend((one.style, one.label) for one in known) if len(lines) > 1 else ""
    return page.template("figure.html", drawn=drawn, legend=names, caption="")


def _told(label: str, lines: Sequence[Line], axis: str) -> str:
    """The plot in words: where each line begins, is lowest, and ends."""
    told = [f"{label} against {axis}."]
    for one in lines:
        known = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(x + y)]
        if known:
            (_, first), (end, last) = known[0], known[-1]
            low = min(y for _, y in known)
            ends = f"begins at {exact(first)}, ends at {exact(last)} at {exact(end)}"
            told.append(f"{one.label} {ends}, lowest {exact(low)}.")
    return " ".join(told)


def _table(validations: Sequence[Logged]) -> Markup:
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
