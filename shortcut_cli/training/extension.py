"""`train --extend`: more steps for a run, as if it had been planned with that many.

A step depends on the length of the run only through the learning rate (and, on a GPU with train.compile = "auto",
through whether it is compiled). So a run goes on from any state whose steps all had the rate that they would have had
in the longer run: with `constant` its last state, with `wsd` stable.pt, from before the decay (`training.keeping`). The
weights are then those of a run of that length, to the bit. With `cosine` there is no such state: the schedule stays as
it was (train.schedule_steps), and further steps have the rate of its end.
"""

import math
import shutil
from pathlib import Path
from typing import Any

from shortcut_cli import files
from shortcut_cli.config import reading
from shortcut_cli.config.schema import Recipe, TrainConfig
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.events import Note, Report
from shortcut_cli.formatting import to_json
from shortcut_cli.kept.inputs import differences
from shortcut_cli.training import checkpoint, loop, run_log, tensor_file
from shortcut_cli.training.keeping import OPEN, STABLE, shared_steps
from shortcut_cli.training.loop import PREVIOUS, STATE
from shortcut_cli.training.optim import learning_rate
from shortcut_cli.training.trainer import Trainer

Content = dict[str, Any]


def planned(resolved: Recipe, content: Content | None, folder: Path, report: Report) -> Recipe:
    """The recipe of the longer run. resolved: it has the new number of steps. content: of the run's resume.pt.

    Raises UsageError if there is no run, if it is longer already, or if its learning rate has ended at 0.
    """
    if content is None:
        raise UsageError(f"{folder} has no run to extend", "`shortcut train` without --extend begins one")
    before, steps = config_of(content, folder), resolved.train.steps
    if steps < before.steps:
        raise UsageError(
            f"{folder} holds a run of {before.steps:,} steps, which can't be extended to {steps:,}",
            "--extend takes the number of steps in all",
        )
    ends = resolved.train.schedule_steps or before.schedule_steps
    if steps > before.steps and not ends and before.schedule not in OPEN:
        ends = before.steps
    if not ends:
        return resolved
    longer = reading.with_settings(resolved, [reading.Setting("train.schedule_steps", ends, f"--extend {steps}")])
    rate = learning_rate(steps - 1, longer.train)
    said = f"the {before.schedule} schedule of this run ends at step {ends:,}"
    if not rate:
        raise UsageError(f"{said}, with a learning rate of 0", "--init-from begins a new run with its weights")
    report(Note(text=f"{said}; the steps after that have the learning rate of its end, {rate:g}"))
    return longer


def config_of(content: Content, folder: Path) -> TrainConfig:
    """[train] of the run that saved a resume.pt. Raises CheckFailed if its recipe is not valid."""
    try:
        return reading.validate(content["recipe"], str(folder / STATE)).train
    except UsageError as error:
        raise CheckFailed(tensor_file.shortened(error.message), error.hint) from error


def base(resolved: Recipe, content: Content, folder: Path) -> Content:
    """The state that the longer run goes on from: `content`, or that of stable.pt.

    Raises UsageError if the run has passed the last state that both share and did not keep it, CheckFailed if that is
    damaged.
    """
    before = config_of(content, folder)
    shared, ended = shared_steps(before, resolved.train), content["step"] == before.steps
    if content["step"] <= shared and not ended:
        return content
    path = folder / STABLE
    stable = checkpoint.load(path) if path.exists() and before.schedule in OPEN else None
    if stable is not None:
        here, there = (
            checkpoint.made_from(one["recipe"], one["shards"], one.get("lineage")) for one in (stable, content)
        )
        lines = differences(here, there | {"train": there["train"] | {"steps": here["train"]["steps"]}})
        if not lines and stable["step"] <= shared and (stable["step"] == content["step"] or content["step"] > shared):
            return stable
    if content["step"] <= shared:
        return content
    raise UsageError(
        f"{folder} has passed step {shared:,}, up to which a run of {resolved.train.steps:,} steps is the same, and "
        f"has no {STABLE} from before that",
        "--init-from begins a new run with its weights",
    )


def extended(trainer: Trainer, content: Content) -> Content:
    """The state that a trainer of a longer run goes on from, once the folder is one of that run; see `begin`.

    content: of resume.pt, which may be of that run already.
    """
    before = config_of(content, trainer.folder)
    if trainer.config.steps == before.steps:
        return content
    loop.check_same(trainer, content | {"recipe": _with_length(content["recipe"], trainer.config)}, trainer.folder)
    state = base(trainer.recipe, content, trainer.folder)
    if state["step"] < content["step"]:
        text = (
            f"the decay of a run of {before.steps:,} steps begins after step {state['step']:,}; it goes on from there"
        )
        trainer.report(Note(text=text))
    return begin(trainer, state, before)


def _with_length(recipe: Content, config: TrainConfig) -> Content:
    """A recipe with the number of steps of another one, and those of its schedule."""
    return recipe | {"train": recipe["train"] | {"steps": config.steps, "schedule_steps": config.schedule_steps}}


def begin(trainer: Trainer, state: Content, before: TrainConfig) -> Content:
    """Make the run in a folder one of the trainer's length, at `state`; returns the content of its new resume.pt.

    What run.pt was is kept as run-N.pt, N being the steps of `before`. A process that is killed here leaves a folder
    with which the same command does it again.

    Raises UsageError if the run differs in more than its length, CheckFailed if run.pt is damaged.
    """
    folder, path = trainer.folder, trainer.folder / trainer.result
    result = state.get("result")
    new = {key: value for key, value in state.items() if key != "result"} | {"recipe": trainer.recipe.model_dump()}
    loop.restore(trainer, new)
    now = trainer.state
    found = checkpoint.load(path) if path.exists() else None
    if found and config_of(found, folder).steps == before.steps:
        with files.writing(folder / f"run-{before.steps}.pt") as copy, open(path, "rb") as stream:
            shutil.copyfileobj(stream, copy)
    if now.best == math.inf:
        pass
    elif result:
        own = {"lineage": trainer.lineage, "precision": trainer.precision}
        checkpoint.save(path, {key: new[key] for key in checkpoint.FIELDS} | own | result)
    elif now.best_step == now.step:
        trainer.save_result()
    elif found and found["step"] == now.best_step:
        checkpoint.save(path, found | {"recipe": new["recipe"]})
    else:
        now.best, now.best_step = math.inf, None
    if now.best == math.inf:
        path.unlink(missing_ok=True)
        new["state"] = new["state"] | {"best": now.best, "best_step": None}
        new["scores"] = {"validation": now.best}
    _cut_log(trainer, before)
    checkpoint.save(folder / STATE, new, previous=folder / PREVIOUS)
    return new


def _cut_log(trainer: Trainer, before: TrainConfig) -> None:
    """Drop the lines that the log has only because the shorter run ended there."""
    step, path = trainer.state.step, trainer.log.path
    if step != before.steps or not path.exists():
        return
    every = {"loss": trainer.config.log_every, "validation": trainer.config.eval_every}
    with files.writing(path) as stream:
        for line in run_log.read_log(trainer.folder):
            if line["step"] != step or all(step % n == 0 for key, n in every.items() if key in line):
                stream.write(f"{to_json(line)}\n".encode())
