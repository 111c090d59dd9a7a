"""Forest plots: a row for each value with its interval and the single seeds, over one axis. All places are percentages.

Each row has its numbers as text too, which is what a screen reader reads.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from shortcut_cli.report.axis import Axis
from shortcut_cli.report.chart import SHAPES, Rule, Style, at, ticks
from shortcut_cli.report.comparison_words import decimals
from shortcut_cli.report.page import template


@dataclass(frozen=True)
class Row:
    """A value. dots: one for each seed; NaN is not drawn.

    role: said below its name; words: its numbers; say: the words of a dot.
    """

    name: str
    role: str
    style: Style
    dots: Sequence[float]
    mean: float
    interval: tuple[float, float] | None
    words: Sequence[str]
    say: Callable[[float], str] = decimals


def forest(rows: Sequence[Row], axes: Sequence[Axis], label: str, rules: Sequence[Rule] = ()) -> Markup:
    """Rows over `axes`: the values' own, and others of the same places, such as bits per unit below nats per token.

    label: of the list, for a screen reader.
    """
    own = axes[0]
    known = [rule for rule in rules if 0 <= own.share(rule.x) <= 1]
    return template(
        "forest.html",
        label=label,
        rows=[_row(row, own) for row in rows],
        rules=[(at(own, rule.x), rule) for rule in known],
        named=[(at(own, rule.x), rule) for rule in known if rule.words],
        axes=[{"label": axis.label, "ticks": ticks(axis)} for axis in axes],
    )


def _row(row: Row, axis: Axis) -> dict[str, Any]:
    """A row with places in percent."""
    return {
        "row": row,
        "dots": [(at(axis, dot), row.say(dot)) for dot in row.dots if math.isfinite(dot)],
        "mean": at(axis, row.mean) if math.isfinite(row.mean) else None,
        "interval": [at(axis, end) for end in row.interval] if row.interval else None,
        "path": SHAPES[row.style.shape],
    }
