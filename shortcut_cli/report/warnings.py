"""What a reader of a run's curves should not miss; `kept.remarks` has what is said of plans, scores and samples."""

import math
from collections.abc import Iterator

RISE = 0.02  # of the validation loss over its lowest, as a share, that is named


def unfinished(step: int | None, steps: int | None) -> Iterator[str]:
    """That a training has not ended. step: the last one in the log."""
    if step is not None and steps is not None and step < steps:
        yield f"The training is at step {step:,} of {steps:,}; the same command resumes it."


def risen(validations: list[tuple[int, float]]) -> Iterator[str]:
    """That the validation loss rose again. validations: step and loss of each, in order."""
    validations = [one for one in validations if math.isfinite(one[1])]
    if validations:
        best_step, best = min(validations, key=lambda each: each[1])
        last = validations[-1][1]
        if last > best * (1 + RISE):
            yield (
                f"The validation loss was lowest at step {best_step:,} ({best:.4g}) and ended at {last:.4g}; run.pt "
                f"has the weights of step {best_step:,}."
            )
