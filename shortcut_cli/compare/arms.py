"""The arms of a comparison: the models asked for, the baselines that they stand against, and a twin of the plain one.

The twin is a plain baseline that differs in nothing that matters: its feed-forward layers are wider by a hundredth or
two. Its rate is searched as that of every arm, and whatever is found between it and the baselines is chance.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from shortcut_cli.compare import baselines
from shortcut_cli.compare.asked import BASELINE, ladder, of_size
from shortcut_cli.config import reading
from shortcut_cli.config.schema import Recipe
from shortcut_cli.registry import Match

Role = Literal["plain", "asked", "matched", "rung", "twin"]
TWIN = 64  # one feed-forward unit more for each of so many
CONTROL = "conv"  # an arm that is known to help
MOST_RUNG = 4  # times the width of the recipe: a rung that is proposed is not larger


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
    plain = reading.with_settings(resolved, [f"model.name={BASELINE}"])
    arms = {BASELINE: _arm(BASELINE, plain, vocabulary, "plain")}
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


def reaching(plain: Recipe, vocabulary: int, match: Match, cost: float, above: bool) -> int | None:
    """The width of a rung that costs at least so much, or at most if not `above`; None if no usual one does."""
    head = plain.model.width // plain.model.heads
    widths = range(head, MOST_RUNG * plain.model.width, head)
    for width in widths if above else reversed(widths):
        size = baselines.size(of_size(plain, plain.model.layers, width), vocabulary).of(match)
        if size >= cost if above else size <= cost:
            return width
    return None


def _arm(label: str, recipe: Recipe, vocabulary: int, role: Role) -> Arm:
    return Arm(label, recipe, baselines.size(recipe, vocabulary), role=role)


def _label(baseline: Recipe, plain: Recipe) -> str:
    """The label of a baseline: that of the plain one if it has its shape."""
    shape, own = baseline.model, plain.model
    same = (shape.layers, shape.width, shape.ffn) == (own.layers, own.width, own.ffn)
    return BASELINE if same else f"gpt-{shape.layers}x{shape.width}x{shape.ffn}"


def _match(arms: dict[str, Arm], vocabulary: int, match: Match, step_seconds: Callable[[Arm], float]) -> None:
    """Add the matched baselines of each model."""
    plain = arms[BASELINE]
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
