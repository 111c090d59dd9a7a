"""What a reader of a report should not miss, as plain sentences made from plain values."""

from collections.abc import Iterator, Mapping
from typing import Any

MOST_EPOCHS = 4  # of the same data that are worth nearly as much as new data (Muennighoff et al. 2023, section 5)
FEW_DOCUMENTS = 10  # in a split, for an interval over documents
RISE = 0.02  # of the validation loss over its lowest, as a share, that is named


def counted(score: Mapping[str, Any]) -> Iterator[str]:
    """That a model which only counts predicts a split better. score: of eval.json, with "floors" or without."""
    found = score.get("floors", {"scores": {}})["scores"]
    better = [(one["nats_per_token"], name) for name, one in found.items()]
    reached = score["nats_per_token"]
    if better and reached is not None and min(better)[0] < reached:
        floor, name = min(better)
        yield (
            f"On the {score['split']} split this model ({reached:.4g} nats per token) is worse than counting: "
            f"{_article(name)} {name} of the training split reaches {floor:.4g}."
        )


def _article(name: str) -> str:
    return "an" if name[:1] in "aeio8" else "a"


def few(split: str, documents: int, over: str = "documents") -> Iterator[str]:
    """That an interval is over few documents. over: what the interval is over: "documents", or what eval says."""
    if documents < FEW_DOCUMENTS:
        count = f"{documents} document{'s' * (documents != 1)}"
        what = f"its interval is over {over}, and" if over != "documents" else "an interval over so few is rough:"
        yield f"The {split} split has only {count}; {what} other documents may score quite differently."


def repeated(tokens: float | None, training_tokens: int | None) -> Iterator[str]:
    """That the training data was seen more often than is worth it. tokens: seen; None: not known."""
    if tokens and training_tokens and tokens / training_tokens > MOST_EPOCHS:
        yield (
            f"It saw its {training_tokens:,} training tokens {tokens / training_tokens:.3g} times; beyond "
            f"{MOST_EPOCHS} times, repeated data is worth much less than new data."
        )


def one_tap(model: str, taps: list[int], layers: int, said: str) -> Iterator[str]:
    """That the last layer reads one layer only. said: the taps as the recipe has them."""
    if len(taps) == 1:
        source = f"layer {taps[0]}" if taps[0] else "the embedding"
        yield (
            f'{model} with taps = "{said}" and {layers} layers has one tap, {source}: its last layer has no choice '
            'between layers. model.shortcut.taps = "all" gives it one.'
        )


def warmed(warmup: int, steps: int) -> Iterator[str]:
    """That the learning rate never reached its height."""
    if 0 < steps <= warmup:
        yield f"The warm-up takes {warmup:,} steps, the training only {steps:,}: the rate never reached train.lr."


def unfinished(step: int | None, steps: int | None) -> Iterator[str]:
    """That a training has not ended. step: the last one in the log."""
    if step is not None and steps is not None and step < steps:
        yield f"The training is at step {step:,} of {steps:,}; the same command resumes it."


def risen(validations: list[tuple[int, float]]) -> Iterator[str]:
    """That the validation loss rose again. validations: step and loss of each, in order."""
    if validations:
        best_step, best = min(validations, key=lambda each: each[1])
        last = validations[-1][1]
        if last > best * (1 + RISE):
            yield (
                f"The validation loss was lowest at step {best_step:,} ({best:.4g}) and ended at {last:.4g}; run.pt "
                f"has the weights of step {best_step:,}."
            )
