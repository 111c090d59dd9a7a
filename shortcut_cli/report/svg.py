"""Plots as SVG: axes, lines, points. Colours are classes of templates/style.css, for light and dark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from shortcut_cli.formatting import to_json
from shortcut_cli.report.page import said, template

LEFT, RIGHT, TOP, BOTTOM = 68, 18, 28, 46  # of its margins
COLOURS = 8  # classes s0 .. s7
MOST_POINTS = 400  # of a line; of more, the lowest and the highest of each stretch
MOST_DOTS = 40  # points of a line that are marked each
ROW = 44  # pixels of a row of `dots`
SUFFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K"))


def short(value: float) -> str:
    """A number on few characters: four significant digits, from 10,000 on with K, M, G, T or P."""
    size = abs(value)
    if not math.isfinite(value) or size >= 1e18 or size < 1e4:
        return f"{value:.4g}"
    unit, suffix = next(each for each in SUFFIXES if size >= each[0])
    return f"{value / unit:.4g}{suffix}"


@dataclass(frozen=True)
class Axis:
    """Values `low` .. `high` along a line. label: with the unit."""

    label: str
    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies: 0 at `low`, 1 at `high`."""
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return (at - low) / (high - low) if high > low else 0.5

    def ticks(self, most: int = 6) -> list[float]:
        """Round values between the ends."""
        if self.log and self.high / self.low >= 100:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            if len(powers) < 3:
                fine = [m * 10.0**power for power in range(powers[0] - 1, powers[-1] + 1) for m in (1, 2, 5)]
                return [tick for tick in fine if self.low <= tick <= self.high]
            every = max(1, math.ceil(len(powers) / most))
            return [10.0**power for power in powers][::every]
        return round_values(self.low, self.high, most)


def round_values(low: float, high: float, most: int) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten, from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def around(label: str, values: Sequence[float], *, log: bool = False) -> Axis:
    """An axis that holds all finite values, with some room."""
    known = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
    low, high = min(known), max(known)
    if log:
        return Axis(label, low / 1.05, high * 1.05, log=True)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return Axis(label, low - room, high + room)


@dataclass(frozen=True)
class Series:
    """A line. Points that are not finite leave a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False
    colour: int | None = None  # class; by default its place


def legend(labels: Sequence[str], colours: Sequence[int] = ()) -> Markup:
    """The names of the series beside their colours: by default those of their places."""
    classes = colours or range(len(labels))
    return template("legend.html", labels=[(a, b % COLOURS) for a, b in zip(labels, classes, strict=True)])


def plot(series: Sequence[Series], x: Axis, y: Axis, label: str, *, width: int, height: int) -> Markup:
    """Lines over a grid, with values on hover. label: what a screen reader says instead."""
    paths, hovers = [], []
    for number, one in enumerate(series):
        kept = _thinned(one)
        at = [(_x(x, a, width), _y(y, b, height)) if _drawn(x, a) and _drawn(y, b) else None for a, b in kept]
        colour = (number if one.colour is None else one.colour) % COLOURS
        known = [(place, pair) for place, pair in zip(at, kept, strict=True) if place]
        paths.append(
            {
                "colour": colour,
                "line": _path(at),
                "dashed": one.dashed,
                "dots": [place for place, _ in known] if len(known) <= MOST_DOTS else [],
            }
        )
        words = "\n".join(f"{short(b)} at {short(a)}" for _, (a, b) in known)
        hovers.append({"label": said(one.label), "places": [round(place[0], 1) for place, _ in known], "words": words})
    return template(
        "plot.html",
        label=label,
        width=width,
        height=height,
        inside=(LEFT, TOP, width - RIGHT, height - BOTTOM),
        x_ticks=[(_x(x, tick, width), short(tick)) for tick in x.ticks()],
        y_ticks=[(_y(y, tick, height), short(tick)) for tick in y.ticks()],
        x_label=x.label,
        y_label=y.label,
        paths=paths,
        series=_attribute(to_json([hover for hover in hovers if hover["places"]])),
    )


def _attribute(text: str) -> Markup:
    """Text between single quotes in a tag: JSON has many double ones, which need not be escaped there."""
    return Markup(text.replace("&", "&amp;").replace("'", "&#39;").replace("<", "&lt;"))  # noqa: S704 - escaped here


def bars(
    edges: Sequence[float],
    counts: Sequence[int],
    x: Axis,
    y_label: str,
    label: str,
    *,
    width: int = 480,
    height: int = 260,
) -> Markup:
    """A histogram: how many values lie between each edge and the next. label: what a screen reader says instead."""
    y = Axis(y_label, 0.0, max(counts, default=1) * 1.05 or 1.0)
    floor = _y(y, 0.0, height)
    rows = [
        {
            "x": _x(x, low, width),
            "width": max(1.0, _x(x, high, width) - _x(x, low, width) - 1),
            "y": _y(y, count, height),
            "height": floor - _y(y, count, height),
            "tip": f"{short(low)} to {short(high)}: {count:,}",
        }
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
        if count
    ]
    return template(
        "bars.html",
        label=label,
        width=width,
        height=height,
        inside=(LEFT, TOP, width - RIGHT, height - BOTTOM),
        x_ticks=[(_x(x, tick, width), short(tick)) for tick in x.ticks()],
        y_ticks=[(_y(y, tick, height), short(tick)) for tick in y.ticks(4) if tick == int(tick)],
        x_label=x.label,
        y_label=y_label,
        bars=rows,
    )


@dataclass(frozen=True)
class Dot:
    """A value beside its name. low, high: its interval; None: it has none, or that end is not known."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    colour: int = 0  # class


def dots(rows: Sequence[Dot], axis: str, label: str, *, width: int = 480) -> Markup:
    """Values with their intervals, a row each, along one axis. label: what a screen reader says instead."""
    ends = [end for row in rows for end in (row.value, row.low, row.high) if end is not None]
    x = around(axis, ends)
    bottom = ROW * len(rows) + 4

    def at(value: float) -> float:
        return LEFT / 2 + x.share(value) * (width - LEFT / 2 - RIGHT)

    return template(
        "dots.html",
        label=label,
        width=width,
        height=bottom + BOTTOM,
        bottom=bottom,
        inside=(LEFT / 2, width - RIGHT),
        ticks=[(at(tick), short(tick)) for tick in x.ticks()],
        axis=axis,
        rows=[
            {
                "label": f"{row.label}: {short(row.value)}",
                "tip": _told(row),
                "colour": row.colour % COLOURS,
                "at": ROW * number + 30,
                "place": at(row.value),
                "ends": None if row.low is None or row.high is None else (at(row.low), at(row.high)),
            }
            for number, row in enumerate(rows)
        ],
    )


def _told(row: Dot) -> str:
    interval = "" if row.low is None or row.high is None else f", 95 % interval {short(row.low)} to {short(row.high)}"
    return f"{row.label}: {short(row.value)}{interval}"


def _drawn(axis: Axis, value: float) -> bool:
    return math.isfinite(value) and (value > 0 or not axis.log)


def _x(axis: Axis, value: float, width: int) -> float:
    return LEFT + axis.share(value) * (width - LEFT - RIGHT)


def _y(axis: Axis, value: float, height: int) -> float:
    return height - BOTTOM - axis.share(value) * (height - TOP - BOTTOM)


def _thinned(one: Series) -> list[tuple[float, float]]:
    """The points of a line, or if there are too many, of each stretch the lowest and the highest: no peak is lost."""
    points = list(zip(one.x, one.y, strict=True))
    if len(points) <= MOST_POINTS:
        return points
    every = math.ceil(len(points) / (MOST_POINTS // 2))
    kept: list[tuple[float, float]] = []
    for first in range(0, len(points), every):
        stretch = range(first, min(first + every, len(points)))
        known = [number for number in stretch if math.isfinite(points[number][1])]
        ends = {min(known, key=lambda n: points[n][1]), max(known, key=lambda n: points[n][1])} if known else {first}
        kept += [points[number] for number in sorted(ends)]
    return kept


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """SVG's path through points, interrupted where one is missing."""
    words, pen = [], "M"
    for point in points:
        if point is None:
            pen = "M"
            continue
        words.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
        pen = "L"
    return " ".join(words)
