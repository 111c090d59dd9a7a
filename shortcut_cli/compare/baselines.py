"""Matched baselines: for an arm, a deeper and a wider `gpt` with as many parameters or FLOPs.

Depth or width is varied in whole steps; the inner width of the feed-forward layers then makes up the difference. Models
are built on torch's meta device to be counted, so they take no memory.
"""

from dataclasses import dataclass

import torch

from shortcut_cli import registry
from shortcut_cli.compare.asked import BASELINE
from shortcut_cli.config import reading
from shortcut_cli.config.schema import Recipe
from shortcut_cli.errors import UsageError
from shortcut_cli.models.transformer import Decoder
from shortcut_cli.registry import Match

TOLERANCE = {"params": 0.005, "flops": 0.01}  # relative, by what is matched
FARTHEST = 4.0  # times the depth or width of the arm


@dataclass(frozen=True)
class Size:
    """The size and the cost of a model."""

    parameters: int  # non-embedding
    total: int  # all parameters
    flops: int  # of training, per token
    cache_bytes: int  # per token

    def of(self, match: Match) -> int:
        """The quantity that is matched: "params" or "flops"."""
        return self.parameters if match == "params" else self.flops


def size(resolved: Recipe, vocabulary: int) -> Size:
    """The size of a recipe's model."""
    kind: type[Decoder] = registry.load(registry.MODELS, resolved.model.name)
    with torch.device("meta"):
        model = kind(resolved.model, vocabulary)
    count, context = model.count(), resolved.model.context
    flops = model.training_flops_per_token(context)
    return Size(count["non_embedding"], count["total"], flops, model.cache_bytes_per_token())


def matched(resolved: Recipe, vocabulary: int, match: Match, target: float | None = None) -> dict[str, Recipe]:
    """Baselines that match the arm that `resolved` describes within the tolerance: {"deeper": recipe, "wider": recipe}.

    If the arm is smaller than the plain baseline of its shape, the only one is {"smaller": recipe}.

    match: "params" or "flops". target: the quantity to match instead of the arm's own.

    Raises UsageError if a baseline can't be matched.
    """
    aim = target or size(resolved, vocabulary).of(match)
    shape = resolved.model
    depths = range(shape.layers, int(shape.layers * FARTHEST) + 1)
    widths = range(shape.width, int(shape.width * FARTHEST) + 1, 2 * shape.heads)
    plain = reading.with_settings(resolved, [f"model.name={BASELINE}"])
    if size(plain, vocabulary).of(match) >= aim * (1 + TOLERANCE[match]):
        return {"smaller": _fitted(plain, vocabulary, match, aim)}
    return {
        "deeper": _nearest(plain, [f"model.layers={layers}" for layers in depths], vocabulary, match, aim),
        "wider": _nearest(plain, [f"model.width={width}" for width in widths], vocabulary, match, aim),
    }


def _nearest(plain: Recipe, settings: list[str], vocabulary: int, match: Match, aim: float) -> Recipe:
    """The baseline whose setting brings it nearest to the aim, with its feed-forward width fitted."""
    made = [reading.with_settings(plain, [setting]) for setting in settings]
    best = min(made, key=lambda candidate: abs(size(candidate, vocabulary).of(match) - aim))
    return _fitted(best, vocabulary, match, aim)


def _fitted(plain: Recipe, vocabulary: int, match: Match, aim: float) -> Recipe:
    """The baseline with the feed-forward width that brings it nearest to the aim; sizes are linear in that width."""

    def at(inner: int) -> Recipe:
        return reading.with_settings(plain, [f"model.ffn={inner}"])

    first, second = size(at(1), vocabulary).of(match), size(at(2), vocabulary).of(match)
    inner = max(1, round(1 + (aim - first) / (second - first)))
    best = at(inner)
    off = size(best, vocabulary).of(match) / aim - 1
    if abs(off) > TOLERANCE[match]:
        raise UsageError(
            f"no {BASELINE} of {best.model.layers} layers and width {best.model.width} comes closer than "
            f"{100 * off:+z.2f} % to {aim:,.0f} {match} of {plain.model.name}",
            "--match none, or a larger model",
        )
    return best
