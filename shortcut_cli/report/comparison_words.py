"""Numbers, names and colours as the page of a comparison has them everywhere."""

import math
from collections.abc import Sequence

from shortcut_cli.report.axis import Axis
from shortcut_cli.report.chart import Style, style
from shortcut_cli.report.compared import Arm, Compared, text
from shortcut_cli.report.page import UNKNOWN, filled, minus

ROLES = {
    "plain": "the plain baseline",
    "asked": "",
    "matched": "matched baseline",
    "rung": "rung of the ladder",
    "twin": "A/A twin of gpt",
}
FIXED = "\u00a0"  # a space at which no line breaks: an interval is one word


def decimals(value: float) -> str:
    """A loss: four decimals."""
    return minus(f"{float(value):z,.4f}") if math.isfinite(value) else UNKNOWN


def signed(value: float) -> str:
    """A difference: the same with its sign."""
    return minus(f"{float(value):+z,.4f}") if math.isfinite(value) else UNKNOWN


def ends(interval: tuple[float, float] | None) -> str:
    """An interval of a loss."""
    return f"[{decimals(interval[0])},{FIXED}{decimals(interval[1])}]" if interval else UNKNOWN


def signed_ends(interval: tuple[float, float] | None) -> str:
    """An interval of a difference."""
    return f"[{signed(interval[0])},{FIXED}{signed(interval[1])}]" if interval else UNKNOWN


def count(value: float) -> str:
    """A size, with thousands in groups; a small one that is no whole number with three digits."""
    if not math.isfinite(value):
        return UNKNOWN
    return minus(f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}")


def figures(value: float) -> str:
    """Three digits, or a size."""
    if abs(value) >= 1000:
        return count(value)
    return minus(f"{value:.3g}") if math.isfinite(value) else UNKNOWN


Table = tuple[list[str], list[list[str]], str]  # columns, rows, caption


def described(found: Compared, columns: Sequence[tuple[str, str]], tables: Sequence[Table]) -> list[tuple[str, str]]:
    """What columns mean, with the unit of this comparison, but for columns that all these tables leave out."""
    named = {column for heads, _, _ in tables for column in heads}
    kept = {column for heads, rows, _ in tables for column in filled(heads, rows)[0]}
    every = [(name.replace("UNIT", found.unit), words.replace("UNIT", found.unit)) for name, words in columns]
    return [(name, words) for name, words in every if name in kept or name not in named]


def role(found: Compared, arm: Arm) -> str:
    """What an arm is in the comparison; nothing of one that was asked for, unless it is the positive control."""
    if found.control and text(found.control.get("arm")) == arm.label:
        return "positive control"
    return ROLES.get(arm.role, arm.role)


def style_of(found: Compared, label: str) -> Style:
    """How an arm looks in every picture of the page."""
    arm = found.arm(label)
    return style(arm.number if arm else len(found.arms))


def axes(found: Compared, axis: Axis) -> list[Axis]:
    """An axis in nats, and the same in bits per unit."""
    if not math.isfinite(found.factor):
        return [axis]
    label = axis.label.replace("nats per token", f"bits per {found.unit}")
    return [axis, Axis(label, axis.low * found.factor, axis.high * found.factor)]
