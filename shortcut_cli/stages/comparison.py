"""Compare architectures on the same data, each with its matched baselines, over seeds. Finished runs are skipped.

Each run has an ordinary run folder, as from `shortcut train` and `shortcut eval`, and a process of its own, so that its
peak memory can be measured and several devices work in parallel.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortcut_cli import SCHEMA_VERSION, files
from shortcut_cli.compare import page
from shortcut_cli.compare.arms import Arm, plan
from shortcut_cli.compare.contrasts import contrast_arms
from shortcut_cli.compare.runner import PlannedRun, Runner
from shortcut_cli.config import writing
from shortcut_cli.config.schema import Recipe
from shortcut_cli.data.shards import Shards
from shortcut_cli.errors import UsageError
from shortcut_cli.events import Report
from shortcut_cli.registry import Match
from shortcut_cli.training.loop import Stop


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
    with files.held(out, "shortcut compare"):
        shards = Shards(Path(resolved.data.shards))
        runner = Runner(out, devices, report)
        _check_same(out, resolved, match)
        first = resolved.train.seed
        numbers = range(first, first + seeds)
        with stop as asked:
            runner.asked = asked
            arms = plan(resolved, models, shards.tokenizer["vocabulary"], match, runner.step_seconds)
            _choose_rates(arms, list(lrs) or [resolved.train.lr], first, runner)
            runner.run([PlannedRun(arm, arm.lr, seed) for seed in numbers for arm in arms.values()])
        rows = {label: runner.row(arm, numbers) for label, arm in arms.items()}
        contrasts = contrast_arms(arms, rows, margin)
        batch = resolved.train.batch_size * resolved.model.context
        result = {
            "schema_version": SCHEMA_VERSION,
            "recipe": resolved.model_dump(),
            "shards": shards.manifest["checksum"],
            "split": resolved.eval.split,
            "match": match,
            "margin_nats": margin,
            "tokens_per_step": batch,
            "epochs": resolved.train.steps * batch / shards.split("train").tokens,
            "arms": [{key: value for key, value in row.items() if key != "groups"} for row in rows.values()],
            "contrasts": contrasts,
        }
        files.write(out / "compare.json", json.dumps(result, indent=1) + "\n")
        files.write(out / "compare.html", page.page(result))
    return result


def _check_same(out: Path, resolved: Recipe, match: Match) -> None:
    """Raise UsageError if a folder holds a comparison with another recipe or match; models and seeds may be added."""
    kept = out / "comparison.json"
    settings = {"recipe": resolved.model_dump(), "match": match}
    if kept.exists():
        changes = writing.differences(json.loads(kept.read_text(encoding="utf-8")), settings)
        if changes:
            raise UsageError(
                f"{out} holds a different comparison\n" + "\n".join(f"  {line}" for line in changes),
                "choose another --out",
            )
    files.write(kept, json.dumps(settings, indent=1) + "\n")


def _choose_rates(arms: dict[str, Arm], rates: list[float], seed: int, runner: Runner) -> None:
    """Give each arm its learning rate: of several, the one with the lowest validation loss at a seed."""
    if len(rates) == 1:
        for arm in arms.values():
            arm.lr = rates[0]
        return
    runner.run([PlannedRun(arm, rate, seed) for arm in arms.values() for rate in rates])
    for arm in arms.values():
        losses = {rate: runner.validation(PlannedRun(arm, rate, seed)) for rate in rates}
        arm.tried = {repr(rate): loss for rate, loss in losses.items()}
        arm.lr = min(losses, key=lambda rate: losses[rate])
