"""The arms of a comparison: the models asked for, the baselines that they stand against, and a twin of the plain one.

The twin is a plain baseline that differs in nothing that matters: its feed-forward layers are wider by a hundredth or
two. It goes through the same choices as all arms, and whatever is found between it and the baselines is chance.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from shortcut_cli.compare import baselines
from shortcut_cli.compare.ladder import LEAST_RUNGS
from shortcut_cli.config import reading
from shortcut_cli.config.schema import Recipe
from shortcut_cli.errors import UsageError
from shortcut_cli.registry import Match

Role = Literal["plain", "asked", "matched", "rung", "twin"]
TWIN = 64  # one feed-forward unit more for each of so many
RUNG = re.compile(r"(?:([0-9]{1,9})x)?([0-9]{1,9})")
SHOWN = 40  # characters of a rung that is wrong
CONTROL = "conv"  # an arm that is known to help


@dataclass
class Arm:
    """A model in the comparison."""

    label: str
    recipe: Recipe
    size: baselines.Size
    baselines: list[str] = field(default_factory=list)  # labels of those that match it; one is chosen on pilots
    role: Role = "asked"
    lr: float = 0.0
    tried: dict[str, list[float]] = field(default_factory=dict)  # validation losses of its pilots by learning rate

    @property
    def asked(self) -> bool:
        """Whether it is one of the models asked for, or the plain baseline."""
        return self.role in ("plain", "asked")


def plan(
    resolved: Recipe,
    models: Sequence[str],
    vocabulary: int,
    match: Match,
    step_seconds: Callable[[Arm], float],
    rungs: Sequence[str] = (),
) -> dict[str, Arm]:
    """Arms by label: the plain baseline, the models, and the baselines, each of which occurs once; the twin is last.

    match: see registry.Match. step_seconds: measures the training step of an arm, called if `match` is "time" and there
    is no ladder. rungs: the ladder, see `ladder`; empty: each model has its own matched baselines.

    Raises UsageError if a model is unknown, has no matching baseline, or a rung is wrong.
    """
    plain = reading.with_settings(resolved, [f"model.name={baselines.BASELINE}"])
    arms = {baselines.BASELINE: _arm(baselines.BASELINE, plain, vocabulary, "plain")}
    for name in models:
        made = reading.with_settings(resolved, [f"model.name={name}"])
        arms.setdefault(name, _arm(name, made, vocabulary, "asked"))
    if rungs:
        for recipe in ladder(plain, rungs):
            label = _label(recipe, plain)
            arms.setdefault(label, _arm(label, recipe, vocabulary, "rung"))
    else:
        _match(arms, vocabulary, match, step_seconds)
    shape = plain.model
    twin = reading.with_settings(plain, [f"model.ffn={shape.ffn + max(1, shape.ffn // TWIN)}"])
    arms["twin"] = _arm("twin", twin, vocabulary, "twin")
    return arms


def _arm(label: str, recipe: Recipe, vocabulary: int, role: Role) -> Arm:
    return Arm(label, recipe, baselines.size(recipe, vocabulary), role=role)


def _label(baseline: Recipe, plain: Recipe) -> str:
    """The label of a baseline: that of the plain one if it has its shape."""
    shape, own = baseline.model, plain.model
    same = (shape.layers, shape.width, shape.ffn) == (own.layers, own.width, own.ffn)
    return baselines.BASELINE if same else f"gpt-{shape.layers}x{shape.width}x{shape.ffn}"


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
        ffn = max(1, round(shape.ffn * place[1] / shape.width))
        settings = [f"layers={place[0]}", f"width={place[1]}", f"heads={place[1] // head}", f"ffn={ffn}"]
        found.setdefault(place, reading.with_settings(plain, [f"model.{setting}" for setting in settings]))
    if len(found) < LEAST_RUNGS:
        raise UsageError(
            f"--ladder: {len(found)} rungs with the recipe's own, {shape.layers}x{shape.width}, are too few for a line",
            f"name at least {LEAST_RUNGS - 1} others",
        )
    return [found[place] for place in sorted(found)]


def _match(arms: dict[str, Arm], vocabulary: int, match: Match, step_seconds: Callable[[Arm], float]) -> None:
    """Add the matched baselines of each model."""
    plain = arms[baselines.BASELINE]
    for arm in [arm for arm in arms.values() if arm is not plain]:
        if match == "none":
            arm.baselines = [plain.label]
            continue
        for recipe in _matched(arm, plain, vocabulary, match, step_seconds):
            label = _label(recipe, plain.recipe)
            arms.setdefault(label, _arm(label, recipe, vocabulary, "matched"))
            if label not in arm.baselines:
                arm.baselines.append(label)


def _matched(arm: Arm, plain: Arm, vocabulary: int, match: Match, step_seconds: Callable[[Arm], float]) -> list[Recipe]:
    if match != "time":
        return list(baselines.matched(arm.recipe, vocabulary, match).values())
    # Step time is taken to be proportional to FLOPs among baselines.
    seconds = [step_seconds(one) for one in (arm, plain)]
    return list(baselines.matched(arm.recipe, vocabulary, "flops", plain.size.flops * seconds[0] / seconds[1]).values())
