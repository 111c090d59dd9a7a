"""Train: shards -> run.pt, resumable bit for bit at any step.

A step depends only on the weights, the optimizer's state and its own number: the windows follow from the seed and the
step, the learning rate from the step, and dropout is seeded at each step. So resume.pt holds no random state. It holds
the conditions of the training (`training.conditions`): under others, the last bits of a step can differ.
"""

from pathlib import Path
from typing import Any

import torch

from shortcut_cli import files
from shortcut_cli.config.schema import Recipe
from shortcut_cli.data.shards import warning
from shortcut_cli.data.workers import keep_freed_memory
from shortcut_cli.events import Note, Report
from shortcut_cli.training import checkpoint, conditions, loop
from shortcut_cli.training.loop import Stop
from shortcut_cli.training.trainer import Trainer


def train(resolved: Recipe, folder: Path, *, device: str, resume: str, report: Report, stop: Stop) -> dict[str, Any]:
    """Train the recipe's model into a run folder, resuming the run in it if it is unfinished.

    resume: "auto", or "never" to start from scratch. Returns a summary; "worked" says whether there was anything to do.

    Raises UsageError if the folder holds a run of a different recipe or of other shards, Interrupted after a signal,
    ShortcutError if the loss is not finite.
    """
    keep_freed_memory()
    if resolved.train.deterministic:
        torch.use_deterministic_algorithms(True)
    with (
        files.held(folder, "shortcut train", known=loop.is_run_folder),
        conditions.threads(resolved.train.threads),
    ):
        content = loop.saved_state(folder, Trainer.result, resume, report, checkpoint.load)
        trainer = Trainer(resolved, folder, device, report)
        if unfinished := warning(Path(resolved.data.shards), trainer.shards.manifest):
            report(Note(text=unfinished))
        worked = loop.start(trainer, content)
        with stop as asked:
            loop.run(trainer, asked)
    return {
        "run": str(folder / Trainer.result),
        "worked": worked,
        "step": trainer.state.step,
        "validation_nats_per_token": trainer.state.best,
        "parameters": trainer.model.count(),
        "seconds": round(trainer.state.seconds, 1),
    }
