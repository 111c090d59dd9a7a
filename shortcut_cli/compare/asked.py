"""What is asked of a comparison, as far as it can be checked without PyTorch."""

import re
from collections.abc import Sequence
from pathlib import Path

from shortcut_cli.config import reading
from shortcut_cli.config.schema import Recipe
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.kept.inputs import read
from shortcut_cli.registry import MODELS, did_you_mean

COMPARISON = "comparison.json"
BASELINE = "gpt"
LEAST_RUNGS = 4  # of a ladder: a line, and its scatter
RUNG = re.compile(r"(?:([0-9]{1,9})x)?([0-9]{1,9})")
SHOWN = 40  # characters of a rung that is wrong


def check(resolved: Recipe, models: Sequence[str], rungs: Sequence[str], pairs: Sequence[tuple[str, str]]) -> None:
    """Raise UsageError if a model is unknown, a rung is wrong, or a pair names what is not among the models."""
    for name in models:
        if name not in MODELS:
            raise UsageError(f"--models: unknown architecture {name!r}", did_you_mean(name, MODELS))
        reading.with_settings(resolved, [f"model.name={name}"])
    if rungs:
        ladder(reading.with_settings(resolved, [f"model.name={BASELINE}"]), rungs)
    for pair in pairs:
        for label in pair:
            if label not in (*models, BASELINE):
                raise UsageError(
                    f"--contrast: {label!r} is not among --models", did_you_mean(label, (*models, BASELINE))
                )
        if pair[0] == pair[1]:
            raise UsageError(f"--contrast: {pair[0]} is compared with itself")


def check_seeds(seeds: int, most_seeds: int) -> None:
    """Raise UsageError if there are more seeds than there may be in the end; 0: as many as now."""
    if most_seeds and most_seeds < seeds:
        raise UsageError(f"--most-seeds {most_seeds} is less than --seeds {seeds}")


def ladder(plain: Recipe, rungs: Sequence[str]) -> list[Recipe]:
    """The recipes of the rungs, the plain baseline among them, from widths, or layers x width: "96", "8x64".

    Heads keep their width, and feed-forward layers their ratio to the width.

    Raises UsageError if a rung is wrong, or if there are too few.
    """
    shape = plain.model
    head, found = shape.width // shape.heads, {(shape.layers, shape.width): plain}
    for rung in rungs:
        given = RUNG.fullmatch(rung)
        if not given:
            raise UsageError(
                f"--ladder: {rung[:SHOWN]!r} is neither a width nor layers x width", "for example --ladder 48,64,96"
            )
        layers, width = given.groups()
        place = (int(layers or shape.layers), int(width))
        if not place[1] or place[1] % head:
            below = place[1] // head * head
            raise UsageError(
                f"--ladder: width {width} is not a multiple of {head}, the width of a head of the recipe",
                f"take {below} or {below + head}" if below else f"take {head}",
            )
        found.setdefault(place, of_size(plain, *place))
    if len(found) < LEAST_RUNGS:
        raise UsageError(
            f"--ladder: {len(found)} rungs with the recipe's own, {shape.layers}x{shape.width}, are too few for a line",
            f"name at least {LEAST_RUNGS - 1} others",
        )
    return [found[place] for place in sorted(found)]


def of_size(plain: Recipe, layers: int, width: int) -> Recipe:
    """The recipe of a rung; its width is a multiple of that of a head."""
    shape = plain.model
    heads, ffn = width * shape.heads // shape.width, max(1, round(shape.ffn * width / shape.width))
    settings = [f"layers={layers}", f"width={width}", f"heads={heads}", f"ffn={ffn}"]
    return reading.with_settings(plain, [f"model.{setting}" for setting in settings])


def is_comparison(folder: Path) -> bool:
    """Whether a folder without a marker holds a comparison."""
    try:
        kept = read(folder / COMPARISON) or {}
    except CheckFailed:
        return False
    return kept.keys() >= {"schema_version", "inputs"}
