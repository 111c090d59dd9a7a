"""Charts whose words and marks keep their size on any screen: all places are percentages of the plot.

Series differ by colour, dashes and the shape of their marks, so that more than eight can be told apart, and on paper
without colours. What is drawn can be read too: by pointer, by touch, and by the arrow keys (templates/page.js).
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from shortcut_cli.formatting import PREFIXES, to_json
from shortcut_cli.report.axis import Axis
from shortcut_cli.report.page import exact, minus, rounded, said, template

COLOURS = 8  # classes s0 .. s7 of templates/style.css, for light and dark
# Around (0, 0), in pixels.
SHAPES = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
    "square": "M-3.7 -3.7H3.7V3.7H-3.7Z",
    "up": "M0 -4.8L4.6 3.4H-4.6Z",
    "diamond": "M0 -5.2L5.2 0L0 5.2L-5.2 0Z",
    "down": "M0 4.8L4.6 -3.4H-4.6Z",
    "cross": "M-4.4 -2.6L-2.6 -4.4L0 -1.8L2.6 -4.4L4.4 -2.6L1.8 0L4.4 2.6L2.6 4.4L0 1.8L-2.6 4.4L-4.4 2.6L-1.8 0Z",
    "plus": "M-1.3 -4.8H1.3V-1.3H4.8V1.3H1.3V4.8H-1.3V1.3H-4.8V-1.3H-1.3Z",
}
DASHES = ("", "7 4", "2 3", "9 3 2 3")
MOST_MARKS = 24  # of a line
MOST_POINTS = 400  # of a line; of more, the lowest and the highest of each stretch
TICKS = 5
APART = 16.0  # percent of the axis between two ticks


@dataclass(frozen=True)
class Style:
    """How a series looks: the class of its colour, its dashes, the shape of its marks; no shape: it has none."""

    colour: int
    dashes: str = ""
    shape: str = ""


def style(place: int) -> Style:
    """The style of the series at a place: 56 differ, since there are seven shapes and eight colours."""
    return Style(place % COLOURS, DASHES[place // COLOURS % len(DASHES)], [*SHAPES][place % len(SHAPES)])


@dataclass(frozen=True)
class Line:
    """A line through points, with a gap where one is not finite; with a band if `low` and `high` are given.

    label: its name where its values are read; a line without one can't be read. words: the value of each point, if
    `exact` does not fit.
    """

    style: Style
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    label: str = ""
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Mark:
    """A single mark. label: its name, words: its value, where it is read; kind: a class of the style sheet."""

    style: Style
    x: float
    y: float
    label: str = ""
    words: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Rule:
    """A vertical line and what it is."""

    x: float
    words: str
    kind: str = ""


def chart(
    lines: Sequence[Line],
    x: Axis,
    y: Axis,
    label: str,
    *,
    marks: Sequence[Mark] = (),
    rules: Sequence[Rule] = (),
    values: Sequence[float] = (),
) -> Markup:
    """Lines and marks over a grid. label: what a screen reader says instead; values: ticks that `x` should have."""
    placed = [_placed(mark, x, y) for line in lines for mark in _marks(line)]
    placed += [_placed(mark, x, y) for mark in marks]
    read = [_read(line, x, y) for line in lines if line.label]
    read += [_hover(mark.label, [(at(x, mark.x), exact(mark.x), mark.words)]) for mark in marks if mark.label]
    return _drawn(
        x,
        y,
        label,
        read,
        x_ticks=[(at(x, value), minus(f"{value:g}")) for value in _apart(x, values)] or ticks(x),
        lines=[{"style": line.style, **_paths(line, x, y)} for line in lines],
        marks=[mark for mark in placed if mark],
        rules=[(at(x, rule.x), rule) for rule in rules if _inside(x, rule.x)],
    )


def bars(edges: Sequence[float], counts: Sequence[int], x: Axis, y_label: str, label: str) -> Markup:
    """A histogram: how many values lie between each edge and the next. label: what a screen reader says instead."""
    y = Axis(y_label, 0.0, max(counts, default=1) * 1.05 or 1.0)
    ends = [(at(x, low), at(x, high)) for low, high in itertools.pairwise(edges)]
    words = [f"{exact(low)} to {exact(high)}" for low, high in itertools.pairwise(edges)]
    known = [entry for entry in zip(ends, words, counts, strict=True) if entry[2]]
    read = _hover(y_label, [((low + high) / 2, between, f"{count:,}") for (low, high), between, count in known])
    return _drawn(
        x,
        y,
        label,
        [read],
        y_ticks=[(100 - at(y, whole), rounded(whole)) for whole in whole_values(y)],
        bars=[(low, high - low, at(y, count)) for (low, high), _, count in known],
    )


def whole_values(axis: Axis) -> list[int]:
    """The whole numbers among the ticks of an axis of counts; of a short one, all that are on it."""
    found = sorted({round(value) for value in axis.ticks(TICKS) if abs(value - round(value)) < 1e-9})
    return found if len(found) > 1 else list(range(int(axis.low), int(axis.high) + 1))


def _drawn(x: Axis, y: Axis, label: str, read: Sequence[dict[str, Any]], **parts: Any) -> Markup:
    """What all charts share. read: what can be read, as `_hover` makes it."""
    series = to_json([one for one in read if one["places"]]) if read else ""
    ready = {"x_ticks": ticks(x), "y_ticks": [(100 - place, words) for place, words in ticks(y)]}
    ready |= {"lines": [], "bars": [], "marks": [], "rules": []}
    return template(
        "chart.html",
        label=label,
        x_label=x.label,
        x_unit=x.label.removesuffix(" (log scale)"),
        y_label=y.label,
        series=_attribute(series),
        **ready | parts,
    )


def _attribute(text: str) -> Markup:
    """Text between single quotes in a tag: JSON has many double ones, which need not be escaped there."""
    return Markup(text.replace("&", "&amp;").replace("'", "&#39;").replace("<", "&lt;"))  # noqa: S704 - escaped here


def _hover(label: str, points: Sequence[tuple[float, str, str]]) -> dict[str, Any]:
    """What page.js reads of a series: of each point its place across in percent, that in words, and its value."""
    return {
        "label": said(label),
        "places": [round(place, 2) for place, _, _ in points],
        "at": "\n".join(words for _, words, _ in points),
        "words": "\n".join(words for _, _, words in points),
    }


def _read(line: Line, x: Axis, y: Axis) -> dict[str, Any]:
    words = line.words or [*map(exact, line.y)]
    known = [n for n in thinned(line.y) if _inside(x, line.x[n]) and _drawable(y, line.y[n])]
    return _hover(line.label, [(at(x, line.x[n]), exact(line.x[n]), words[n]) for n in known])


def thinned(values: Sequence[float]) -> list[int]:
    """The numbers of all values, or if there are too many, of each stretch's lowest and highest: no peak is lost."""
    if len(values) <= MOST_POINTS:
        return [*range(len(values))]
    every = math.ceil(len(values) / (MOST_POINTS // 2))
    kept: list[int] = []
    for first in range(0, len(values), every):
        known = [n for n in range(first, min(first + every, len(values))) if math.isfinite(values[n])]
        kept += sorted({min(known, key=values.__getitem__), max(known, key=values.__getitem__)} if known else {first})
    return kept


def legend(entries: Iterable[tuple[Style, str]], *, lines: bool = True) -> Markup:
    """The names of series beside what they look like."""
    return template("chart_legend.html", entries=list(entries), shapes=SHAPES, lines=lines)


def at(axis: Axis, value: float) -> float:
    """Where a value is, in percent of the axis."""
    return 100 * axis.share(value)


def ticks(axis: Axis) -> list[tuple[float, str]]:
    """Places in percent and words of an axis: few enough for a narrow screen."""
    values = axis.ticks(TICKS)
    if axis.log:  # they are not evenly spaced
        values = _apart(axis, values)
    return [(at(axis, value), words) for value, words in zip(values, short(values), strict=True)]


def _apart(axis: Axis, values: Sequence[float]) -> list[float]:
    """Ascending values, without those whose words would stand in each other's way."""
    kept = [*values[:1]]
    for value in values[1:]:
        if at(axis, value) - at(axis, kept[-1]) >= APART:
            kept.append(value)
    return kept


def short(values: Sequence[float]) -> list[str]:
    """Numbers for an axis, all with as many decimals as their distance needs: 0.05, 0.10; 20K; 1.5M."""
    top = max((abs(value) for value in values), default=0.0)
    if top >= 1e15:
        return [minus(f"{value:.4g}").replace("e+", "e") for value in values]
    group = min(len(PREFIXES) - 1, max(0, math.floor(math.log10(top)) // 3)) if top >= 10_000 else 0
    if len(values) > 1 and group and values[1] >= 9 * values[0] > 0:  # powers of ten, each with its own prefix
        return [short([value])[0] for value in values]
    scaled, unit = [value / 1000**group for value in values], PREFIXES[group].strip()
    if len(values) == 1:
        return [minus(f"{scaled[0]:{',.0f' if abs(scaled[0]) >= 100 else '.3g'}}{unit}")]
    least = min((b - a for a, b in itertools.pairwise(scaled)), default=1.0)
    decimals = max(0, -math.floor(math.log10(max(least, 1e-9)) + 1e-9))
    return [minus(f"{value:,.{decimals}f}{unit}") if value else "0" for value in scaled]


def _inside(axis: Axis, value: float) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.log) and -1e-9 <= axis.share(value) <= 1 + 1e-9


def _marks(line: Line) -> Iterable[Mark]:
    """The marks of a line, of a long one some."""
    every = max(1, math.ceil(len(line.x) / MOST_MARKS))
    points = [*zip(line.x, line.y, strict=True)] if line.style.shape else []
    return [Mark(line.style, *point) for point in points[::-1][::every]]


def _placed(mark: Mark, x: Axis, y: Axis) -> dict[str, Any] | None:
    """A mark where it is, in percent; None if it is outside."""
    if not (_inside(x, mark.x) and _inside(y, mark.y)):
        return None
    tip = f"{mark.label}: {mark.words}" if mark.label else ""
    return {"mark": mark, "x": at(x, mark.x), "y": 100 - at(y, mark.y), "path": SHAPES[mark.style.shape], "tip": tip}


def _paths(line: Line, x: Axis, y: Axis) -> dict[str, str]:
    """The line and its band as paths in percent; what is beyond the axis is cut off by the picture."""

    def point(place: float, value: float) -> str:
        return f"{at(x, place):.3f} {100 - at(y, value):.3f}"

    parts: list[list[str]] = [[]]  # between the gaps
    for number in thinned(line.y):
        if _drawable(x, line.x[number]) and _drawable(y, line.y[number]):
            parts[-1].append(point(line.x[number], line.y[number]))
        else:
            parts.append([])
    # A point between gaps has no line, so it becomes one that has no length, which is drawn as a dot.
    drawn = [part * 2 if len(part) == 1 and not line.style.shape else part for part in parts]
    band = [
        row
        for row in zip(line.x, line.low, line.high, strict=True)
        if _drawable(x, row[0]) and _drawable(y, row[1]) and _drawable(y, row[2])
    ] if line.low else []  # fmt: skip
    around = [point(a, low) for a, low, _ in band] + [point(a, high) for a, _, high in reversed(band)]
    return {
        "path": " ".join(f"M{' L'.join(part)}" for part in drawn if len(part) > 1),
        "band": f"M{' L'.join(around)} Z" if len(band) > 1 else "",
    }


def _drawable(axis: Axis, value: float) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.log)
