"""Baselines of the same size: for an arm, a deeper and a wider `gpt` with as many parameters, or as many FLOPs.

Depth or width is set coarsely; the inner width of the feed-forward layers then takes up the rest. Sizes are counted on
models without memory (torch's meta device).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from shortcut_cli import recipe, registry
from shortcut_cli.errors import UsageError
from shortcut_cli.recipe import Recipe

Match = Literal["params", "flops"]
TOLERANCE = {"params": 0.005, "flops": 0.01}
BASELINE = "gpt"
FARTHEST = 4.0  # times the depth or width of the arm


@dataclass(frozen=True)
class Size:
    """What a model takes."""

    parameters: int  # of the trunk: no embedding, no head
    total: int
    flops: int  # of training, a token
    cache_bytes: int  # a token

    def of(self, match: Match) -> int:
        """The measure that is matched."""
        return self.parameters if match == "params" else self.flops


def size(resolved: Recipe, vocabulary: int) -> Size:
    """The size of a recipe's model."""
    kind = registry.load(registry.MODELS, resolved.model.name)
    with torch.device("meta"):
        model: Any = kind(resolved.model, vocabulary)
    count, context = model.count(), resolved.model.context
    return Size(count["trunk"], count["total"], 3 * model.flops(context) // context, model.cache_bytes_per_token())


def opponents(resolved: Recipe, vocabulary: int, match: Match, target: float | None = None) -> dict[str, Recipe]:
    """{"deeper": recipe, "wider": recipe}: baselines within the tolerance of the arm that `resolved` describes.

    target: to be matched instead of the arm's own size.

    Raises UsageError where there is none.
    """
    aim = target or size(resolved, vocabulary).of(match)
    shape = resolved.model
    depths = range(shape.layers, int(shape.layers * FARTHEST) + 1)
    widths = range(shape.width, int(shape.width * FARTHEST) + 1, 2 * shape.heads)
    plain = recipe.with_settings(resolved, [f"model.name={BASELINE}"])
    if size(plain, vocabulary).of(match) >= aim * (1 + TOLERANCE[match]):
        return {"smaller": _fitted(plain, vocabulary, match, aim)}
    return {
        "deeper": _nearest(plain, [f"model.layers={layers}" for layers in depths], vocabulary, match, aim),
        "wider": _nearest(plain, [f"model.width={width}" for width in widths], vocabulary, match, aim),
    }


def _nearest(plain: Recipe, settings: list[str], vocabulary: int, match: Match, aim: float) -> Recipe:
    """Of the baselines with one of the settings each, the one nearest to the aim, its feed-forward fitted."""
    made = [recipe.with_settings(plain, [setting]) for setting in settings]
    best = min(made, key=lambda candidate: abs(size(candidate, vocabulary).of(match) - aim))
    return _fitted(best, vocabulary, match, aim)


def _fitted(plain: Recipe, vocabulary: int, match: Match, aim: float) -> Recipe:
    """The baseline with the inner width that brings it nearest to the aim: sizes are linear in it."""

    def at(inner: int) -> Recipe:
        return recipe.with_settings(plain, [f"model.ffn={inner}"])

    first, second = size(at(1), vocabulary).of(match), size(at(2), vocabulary).of(match)
    inner = max(1, round(1 + (aim - first) / (second - first)))
    best = at(inner)
    off = size(best, vocabulary).of(match) / aim - 1
    if abs(off) > TOLERANCE[match]:
        raise UsageError(
            f"no {BASELINE} of {best.model.layers} layers and width {best.model.width} comes nearer than {off:+.2%} to "
            f"{aim:,.0f} {match} of {plain.model.name}",
            "--match none, or a larger model",
        )
    return best
