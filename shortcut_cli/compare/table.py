"""The table of a comparison on a screen: its arms with their costs, means and floors."""

import math
from collections.abc import Iterator
from typing import Any

COLUMNS = (
    ("arm", "label"),
    ("layers", "layers"),
    ("width", "width"),
    ("feed-forward", "ffn"),
    ("learning rate", "lr"),
    ("non-embedding parameters", "parameters"),
    ("training FLOPs per token", "training_flops_per_token"),
    ("tokens/s", "tokens_per_s"),
    ("peak MB", "peak_mb"),
    ("cache bytes per token", "cache_bytes_per_token"),
)


def rows(result: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """A row per arm: COLUMNS, then the means over seeds of nats per token and bits per unit. Below, a row per floor."""
    for row in result["arms"]:
        yield (*(row[key] for _, key in COLUMNS), _mean(row["nats_per_token"]), _mean(row["bits_per_unit"]))
    # Comparisons that were made before there were floors have none.
    for name, floor in result.get("floors", {"scores": {}})["scores"].items():
        empty = (None,) * (len(COLUMNS) - 1)
        yield (f"floor: {name}", *empty, floor["nats_per_token"], floor["bits_per_unit"])


def _mean(values: list[float | None]) -> float | None:
    """None if one of them is not finite, as that of a run that diverged."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if len(known) == len(values) else None


def headings(result: dict[str, Any]) -> list[str]:
    """The headings of `rows`."""
    return [
        *(heading for heading, _ in COLUMNS),
        "nats per token",
        f"bits per {next((row['unit'] for row in result['arms'] if row['unit']), 'unit')}",
    ]
