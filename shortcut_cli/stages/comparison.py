"""Compare architectures on the same data, each with its matched baselines, over seeds. Finished runs are skipped.

Each run has an ordinary run folder, as from `shortcut train` and `shortcut eval`, and a process of its own, so that its
peak memory can be measured and several devices work in parallel.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortcut_cli import SCHEMA_VERSION, files
from shortcut_cli.compare import page
from shortcut_cli.compare.arms import Arm, plan
from shortcut_cli.compare.baselines import BASELINE
from shortcut_cli.compare.contrasts import contrast_arms
from shortcut_cli.compare.runner import PlannedRun, Runner, differing
from shortcut_cli.config import reading
from shortcut_cli.config.schema import Recipe, binding
from shortcut_cli.data.shards import Shards, warning
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.events import Note, Report
from shortcut_cli.formatting import to_json
from shortcut_cli.inference import floors
from shortcut_cli.kept import floors as kept_floors
from shortcut_cli.kept.inputs import differences, read
from shortcut_cli.registry import Match
from shortcut_cli.training.loop import Stop

COMPARISON = "comparison.json"


def compare(
    resolved: Recipe,
    models: Sequence[str],
    out: Path,
    *,
    seeds: int,
    match: Match,
    lrs: Sequence[float],
    margin: float,
    devices: Sequence[str],
    report: Report,
    stop: Stop,
) -> dict[str, Any]:
    """Train and score every arm and its baselines, and write compare.json and compare.html into `out`.

    lrs: learning rates to try at the first seed; each arm and each baseline takes the one with its lowest validation
    loss. Empty: the recipe's rate. margin: of equivalence, in nats per token. Returns the content of compare.json.

    Raises UsageError if a model is unknown or `out` holds a different comparison, Interrupted after a signal; the same
    command then resumes.
    """
    with files.held(out, "shortcut compare", known=_is_comparison):
        shards = Shards(Path(resolved.data.shards))
        checksum = shards.manifest["checksum"]
        if unfinished := warning(Path(resolved.data.shards), shards.manifest):
            report(Note(text=unfinished))
        runner = Runner(out, devices, report, checksum, shards.tokenizer["vocabulary"])
        kept = _check_same(out, resolved, match, checksum)
        runner.check_shards()
        first = resolved.train.seed
        numbers = range(first, first + seeds)
        with stop as asked:
            runner.asked = asked
            arms = plan(resolved, models, shards.tokenizer["vocabulary"], match, runner.step_seconds)
            files.write(out / COMPARISON, to_json(kept, indent=1) + "\n")  # a command that is wrong leaves nothing
            _choose_rates(arms, list(lrs) or [resolved.train.lr], first, runner)
            runner.run([PlannedRun(arm, arm.lr, seed) for seed in numbers for arm in arms.values()])
        rows = {label: runner.row(arm, numbers) for label, arm in arms.items()}
        if changed := differing(rows.values()):
            report(Note(text=f"the runs were not all trained under the same conditions: {changed}"))
        contrasts = contrast_arms(arms, rows, margin)
        batch = resolved.train.batch_size * resolved.model.context
        result = {
            "schema_version": SCHEMA_VERSION,
            "recipe": resolved.model_dump(),
            "shards": checksum,
            "split": resolved.eval.split,
            "match": match,
            "margin_nats": margin,
            "tokens_per_step": batch,
            "epochs": resolved.train.steps * batch / shards.split("train").tokens,
            "floors": _floors(out, shards, resolved.eval.split, report),
            "arms": [{key: value for key, value in row.items() if key != "groups"} for row in rows.values()],
            "contrasts": contrasts,
        }
        files.write(out / "compare.json", to_json(result, indent=1) + "\n")
        files.write(out / "compare.html", page.page(result))
    return result


def _floors(out: Path, shards: Shards, split: str, report: Report) -> dict[str, Any]:
    """What simple predictors reach on the split: those kept in comparison.json, or new ones, which are kept there."""
    path, checksum = out / COMPARISON, shards.manifest["checksum"]
    inputs = kept_floors.made_from(checksum, checksum, split, floors.ORDER, floors.MOST_TOKENS)
    content = read(path) or {}
    found: dict[str, Any] = content.get("floors", {})
    if not kept_floors.is_usable(found, inputs):
        found = kept_floors.sealed(inputs, floors.measure(shards, shards, split, report))
        files.write(path, to_json(content | {"floors": found}, indent=1) + "\n")
    return found


def _is_comparison(folder: Path) -> bool:
    """Whether a folder without a marker holds a comparison."""
    try:
        kept = read(folder / COMPARISON) or {}
    except CheckFailed:
        return False
    return kept.keys() >= {"schema_version", "inputs"}


def _check_same(out: Path, resolved: Recipe, match: Match, shards: str) -> dict[str, Any]:
    """The content of comparison.json. Raises UsageError if it is there with another recipe, match or shards.

    Models and seeds may be added. The keys of the recipe that count are those that determine the weights of a gpt of
    this shape, since it is in every comparison; the options of other architectures bind their own runs. Raises
    CheckFailed if comparison.json is damaged.
    """
    path = out / COMPARISON
    kept = read(path)
    plain = reading.with_settings(resolved, [f"model.name={BASELINE}"])
    inputs = {"recipe": binding(plain.model_dump()), "match": match, "shards": shards}
    changes = [] if kept is None else differences(kept.get("inputs"), inputs)
    if changes:
        raise UsageError(
            f"{out} holds a different comparison\n" + "\n".join(f"  {line}" for line in changes),
            "choose another --out",
        )
    return kept or {"schema_version": SCHEMA_VERSION, "inputs": inputs}


def _choose_rates(arms: dict[str, Arm], rates: list[float], seed: int, runner: Runner) -> None:
    """Give each arm its learning rate: of several, the one with the lowest validation loss at a seed."""
    if len(rates) == 1:
        for arm in arms.values():
            arm.lr = rates[0]
        return
    runner.run([PlannedRun(arm, rate, seed) for arm in arms.values() for rate in rates])
    for arm in arms.values():
        losses = {rate: runner.result(PlannedRun(arm, rate, seed)).validation for rate in rates}
        arm.tried = {repr(rate): loss for rate, loss in losses.items()}
        arm.lr = min(losses, key=lambda rate: losses[rate])
