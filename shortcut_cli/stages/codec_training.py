"""Train a codec: sound files -> codec.pt, resumable bit for bit at any step.

As in `training`, a step depends only on the weights, the states of the optimizers and its own number.
"""

from pathlib import Path
from typing import Any

from shortcut_cli import files
from shortcut_cli.codec import dataset
from shortcut_cli.codec.trainer import CodecTrainer
from shortcut_cli.config.schema import CodecRecipe
from shortcut_cli.data.workers import keep_freed_memory
from shortcut_cli.events import Report
from shortcut_cli.training import conditions, loop, tensor_file
from shortcut_cli.training.loop import STATE, Stop


def train(
    resolved: CodecRecipe,
    paths: list[str],
    folder: Path,
    *,
    n_workers: int,
    device: str,
    resume: str,
    report: Report,
    stop: Stop,
) -> dict[str, Any]:
    """Train the recipe's codec on sound files into a run folder, resuming the run in it if it is unfinished.

    resume: "auto", or "never" to start from scratch. Returns a summary; "worked" says whether there was anything to do.

    Raises UsageError if the folder holds a run of a different recipe or of other files, Interrupted after a signal,
    ShortcutError if a loss is not finite.
    """
    keep_freed_memory()
    with (
        files.held(folder, "shortcut codec train", known=loop.is_run_folder),
        conditions.threads(resolved.train.threads),
    ):
        content = loop.saved_state(
            folder, CodecTrainer.result, resume, report, lambda path: tensor_file.load(path, STATE)
        )
        data = dataset.stage(paths, folder / "data", resolved.data, n_workers=n_workers, report=report)
        trainer = CodecTrainer(resolved, folder, data, device, report)
        worked = loop.start(trainer, content)
        with stop as asked:
            loop.run(trainer, asked)
    return {
        "codec": str(folder / CodecTrainer.result),
        "worked": worked,
        "step": trainer.state.step,
        "validation_distance": trainer.state.best,
        "parameters": trainer.size(),
        "rejected": data.rejected,
        "seconds": round(trainer.state.seconds, 1),
    }
