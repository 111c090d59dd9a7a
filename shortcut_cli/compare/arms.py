"""The arms of a comparison: the models asked for, and their matched baselines."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shortcut_cli.compare import baselines
from shortcut_cli.config import reading
from shortcut_cli.config.schema import Recipe
from shortcut_cli.registry import Match


@dataclass
class Arm:
    """A model in the comparison: one of those asked for, or a matched baseline."""

    label: str
    recipe: Recipe
    size: baselines.Size
    baselines: list[str] = field(default_factory=list)  # labels
    asked: bool = True
    lr: float = 0.0
    tried: dict[str, float] = field(default_factory=dict)  # validation loss by learning rate


def plan(
    resolved: Recipe, models: Sequence[str], vocabulary: int, match: Match, step_seconds: Callable[[Arm], float]
) -> dict[str, Arm]:
    """Arms by label: the plain baseline, the models, and their matched baselines, each of which occurs once.

    match: see registry.Match. step_seconds: measures the training step of an arm, called if `match` is "time".

    Raises UsageError if a model is unknown or has no matching baseline.
    """
    plain = reading.with_settings(resolved, [f"model.name={baselines.BASELINE}"])
    arms = {baselines.BASELINE: Arm(baselines.BASELINE, plain, baselines.size(plain, vocabulary))}
    for name in models:
        made = reading.with_settings(resolved, [f"model.name={name}"])
        arms.setdefault(name, Arm(name, made, baselines.size(made, vocabulary)))
    for arm in [arm for label, arm in arms.items() if label != baselines.BASELINE]:
        if match == "none":
            arm.baselines = [baselines.BASELINE]
            continue
        found = _matched(arm, arms[baselines.BASELINE], vocabulary, match, step_seconds)
        for baseline in found:
            shape = baseline.model
            same = (shape.layers, shape.width, shape.ffn) == (plain.model.layers, plain.model.width, plain.model.ffn)
            label = baselines.BASELINE if same else f"gpt-{shape.layers}x{shape.width}x{shape.ffn}"
            arms.setdefault(label, Arm(label, baseline, baselines.size(baseline, vocabulary), asked=False))
            if label not in arm.baselines:
                arm.baselines.append(label)
    return arms


def _matched(arm: Arm, plain: Arm, vocabulary: int, match: Match, step_seconds: Callable[[Arm], float]) -> list[Recipe]:
    if match != "time":
        return list(baselines.matched(arm.recipe, vocabulary, match).values())
    # Step time is taken to be proportional to FLOPs among baselines.
    seconds = [step_seconds(one) for one in (arm, plain)]
    return list(baselines.matched(arm.recipe, vocabulary, "flops", plain.size.flops * seconds[0] / seconds[1]).values())
