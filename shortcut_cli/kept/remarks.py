"""What a reader of a result should know first: sentences about what shrinks its subject away.

Each function takes a plain table, as it is in a .json file or in a recipe, and returns sentences; of a table that lacks
what a sentence needs, or holds something else there, it says nothing. They are shown by the commands and on pages.
"""

from collections.abc import Mapping
from typing import Any, TypeGuard

from shortcut_cli.kept.inputs import is_number

MOST_EPOCHS = 4  # Muennighoff et al. 2023, arXiv 2305.16264: to here repeated data is nearly worth new data
FEW_DOCUMENTS = FEW_WINDOWS = 10  # an interval over fewer says little
TAPPED = ("shortcut", "shortcut_local", "shortcut_pool")  # they read [model.shortcut] taps
Table = Mapping[str, Any]


def of_plan(recipe: Table, training_tokens: int) -> list[str]:
    """About a training: a single tap, many epochs, a warm-up that never ends. recipe: all of its sections."""
    model, train = _table(recipe, "model"), _table(recipe, "train")
    found = []
    layers, taps = model.get("layers"), _table(model, "shortcut").get("taps")
    if model.get("name") in TAPPED and taps == "paper" and layers in (4, 5):
        found.append(
            f'taps = "paper" at {layers} layers is one tap, layer 2: there is nothing to compare across layers; '
            'model.shortcut.taps = "all" taps every layer below the last'
        )
    steps, batch, context = train.get("steps"), train.get("batch_size"), model.get("context")
    if is_count(steps) and is_count(batch) and is_count(context) and training_tokens > 0:
        epochs = steps * batch * context / training_tokens
        if epochs > MOST_EPOCHS:
            found.append(
                f"the training reads its {training_tokens:,} tokens {epochs:,.1f} times: beyond {MOST_EPOCHS} epochs a "
                "model learns little that is new, and begins to repeat what it read"
            )
    warmup = train.get("warmup")
    if is_count(steps) and is_count(warmup) and warmup >= steps:
        found.append(
            f"the warm-up of {warmup:,} steps is as long as the training of {steps:,}, or longer: the learning rate "
            f"{'never reaches train.lr' if warmup > steps else 'reaches train.lr at the last step only'}"
        )
    return found


def of_score(score: Table) -> list[str]:
    """About a score: few documents, and a model that is worse than a simple predictor that counts."""
    found = []
    documents, split = score.get("documents"), score.get("split")
    if is_count(documents) and isinstance(split, str):
        if documents == 1:
            found.append(
                f"the {split} split has one document: how well others would be predicted can't be known from it"
            )
        elif documents < FEW_DOCUMENTS:
            found.append(f"the {split} split has only {documents} documents: the interval says little about others")
    loss: Any = score.get("nats_per_token")
    floors = _table(_table(score, "floors"), "scores")
    for name, floor in floors.items():
        reached: Any = floor.get("nats_per_token") if isinstance(floor, Mapping) else None
        if is_number(loss) and is_number(reached) and loss > reached:
            found.append(
                f"on the {split} split the model is worse than the {name}, which only counts: {loss:.4f} against "
                f"{reached:.4f} nats per token"
            )
    return found


def of_windows(attention: Table) -> str:
    """About intervals over windows: that these are few; empty if not. attention: the content of attention.json."""
    windows = attention.get("windows")
    if not (is_count(windows) and 1 < windows < FEW_WINDOWS):
        return ""
    return f"The intervals are over {windows} windows: so few say little about others."


def of_sample(sample: Table) -> list[str]:
    """About a sample: that it ended by itself long before its limit. sample: the content of its .json."""
    tokens, most = sample.get("tokens"), _table(sample, "sampler").get("tokens")
    if sample.get("ended") is not True or not (is_count(tokens) and is_count(most)) or 2 * tokens > most:
        return []
    units = _table(sample, "units")
    unit = next((name for name in ("second", "byte", *units) if is_number(units.get(name))), None)
    length = "" if unit is None else f" after {units[unit]:,.4g} {unit}{'' if units[unit] == 1 else 's'}"
    return [
        f"the sample ended by itself{length}: the model drew the end of the document at token {tokens:,} of {most:,}"
    ]


def is_count(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number from 0 on, and no bool."""
    return type(value) is int and 0 <= value < 2**63


def _table(tree: Table, name: str) -> Table:
    found = tree.get(name)
    return found if isinstance(found, Mapping) else {}
