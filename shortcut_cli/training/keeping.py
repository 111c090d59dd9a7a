"""The checkpoints that a run keeps beside run.pt and resume.pt.

    last.pt       train.keep = "last": the weights of the newest validation, at the end those of the last step
    step-N.pt     train.keep = "every:M": the weights of step N, a multiple of M
    stable.pt     the state from before anything that depends on the length of the run, for `train --extend`
    run-N.pt      what run.pt was before a run of N steps was extended, see `training.extension`

The first two are like run.pt, and each names its own validation loss. stable.pt is like resume.pt, with the weights of
run.pt besides, if these are of an earlier step. A run has at most one: with the schedule `wsd` of the step at which its
learning rate begins to fall; with `constant` of its last step, if that is one at which a longer run would not log or
not validate. Cosine depends on the length of the run from the start, so such a run has none.
"""

import math
import re

from shortcut_cli.config.schema import ScheduleConfig, kept
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.training import checkpoint, tensor_file
from shortcut_cli.training.optim import learning_rate
from shortcut_cli.training.trainer import Trainer

STABLE = "stable.pt"
LAST = "last.pt"
OTHERS = re.compile(r"(step|run)-\d+\.pt")
OPEN = ("constant", "wsd")  # schedules that do not depend on the length of the run, or only in its decay
OF_RESULT = ("model", "step", "scores", "versions", "conditions")  # fields of a run.pt that a longer run would share


def shared_steps(one: ScheduleConfig, other: ScheduleConfig) -> int:
    """How many steps from the first have the same learning rate under both schedules."""
    low, high = 0, min(one.steps, other.steps)
    while low < high:
        middle = (low + high) // 2
        if learning_rate(middle, one) == learning_rate(middle, other):
            low = middle + 1
        else:
            high = middle
    return low


class Keeper:
    """Writes these files for a trainer, when `loop.run` says so."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.config = trainer, trainer.config
        self.last, self.apart = kept(self.config.keep)
        longer = self.config.model_copy(update={"steps": 2 * self.config.steps})
        self.branch = shared_steps(self.config, longer) if self.config.schedule in OPEN else None

    def stable(self) -> None:
        """Write stable.pt if this is its step; called before what is done only because the run ends here."""
        config, state, folder = self.config, self.trainer.state, self.trainer.folder
        if state.step != self.branch:
            return
        if state.step == config.steps and state.step % config.log_every == 0 and state.step % config.eval_every == 0:
            return  # a longer run does the same here, so resume.pt serves
        result = None
        if state.best < math.inf and state.best_step != state.step and self.trainer.processes.leads:
            try:
                found = checkpoint.load(folder / self.trainer.result)
                result = {key: found[key] for key in OF_RESULT if key in found}
            except (CheckFailed, UsageError):
                pass  # the end of the run says so; an extension looks for the best weights anew
        self.trainer.write(STABLE, lambda: self.trainer.saved() | {"result": result})

    def copies(self) -> None:
        """Write last.pt and step-N.pt if this is their step; called before the state is saved."""
        trainer, step = self.trainer, self.trainer.state.step
        loss = trainer.validated.get(step)
        if self.last and loss is not None:
            self._write(LAST, loss)
        if self.apart and step % self.apart == 0:
            self._write(f"step-{step}.pt", trainer.validation_loss() if loss is None else loss)

    def complete(self) -> None:
        """Write last.pt of a finished run if it is missing or damaged."""
        trainer = self.trainer
        if not self.last:
            return
        try:
            found = checkpoint.load(trainer.folder / LAST)
            whole = found["step"] == trainer.state.step and not trainer.changes(found)
        except (CheckFailed, UsageError):
            whole = False
        if not whole:
            self._write(LAST, trainer.validation_loss())

    def _write(self, name: str, loss: float) -> None:
        trainer = self.trainer
        scores = {"scores": {"validation": loss}}
        trainer.write(name, lambda: trainer.content(trainer.optimizer.weights()) | scores)

    def clear(self) -> None:
        """Remove the files that an earlier run has kept in the folder."""
        for path in self.trainer.folder.glob("*.pt"):
            ours = path.name in (STABLE, LAST) or OTHERS.fullmatch(path.name)
            if ours and path.is_file() and tensor_file.is_sealed(path):
                path.unlink()
