"""Values as people read them, on the screen and on HTML pages."""

from typing import Any


def cell(value: Any) -> str:
    """Thousands separators, four significant digits; lists in brackets; an empty string for None."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(cell, value))}]"
    return str(value)
