"""Compare: architectures on the same data, each against its matched baseline, over seeds; finished cells are skipped.

A cell is an ordinary run folder, as `shortcut train` and `shortcut eval` make one, in a process of its own, so that its
peak memory is its own and several devices work at once.
"""

import itertools
import json
import math
import os
import queue
import statistics as means
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_cli import files, matching, recipe, statistics
from shortcut_cli.errors import Interrupted, ShortcutError, UsageError
from shortcut_cli.loop import Stop, read_log
from shortcut_cli.recipe import Recipe
from shortcut_cli.shards import Shards
from shortcut_cli.stages import comparison

Report = Callable[..., None]
MATCHES = ("none", "params", "flops", "time")
POLL_S = 0.2


@dataclass
class Arm:
    """A model of the comparison: one of those asked for, or a matched baseline."""

    label: str
    recipe: Recipe
    size: matching.Size
    opponents: list[str] = field(default_factory=list)  # labels
    asked: bool = True
    lr: float = 0.0
    tried: dict[str, float] = field(default_factory=dict)  # validation loss by learning rate


@dataclass(frozen=True)
class Cell:
    """One training."""

    arm: Arm
    lr: float
    seed: int

    def folder(self, out: Path) -> Path:
        """Its run folder."""
        return out / "runs" / f"{self.arm.label}-lr{self.lr!r}-s{self.seed}"

    def recipe(self) -> Recipe:
        """All that it is trained by."""
        return recipe.with_settings(self.arm.recipe, [f"train.lr={self.lr!r}", f"train.seed={self.seed}"])


def compare(
    resolved: Recipe,
    models: Sequence[str],
    out: Path,
    *,
    seeds: int,
    match: str,
    lrs: Sequence[float],
    margin: float,
    devices: Sequence[str],
    report: Report,
    stop: Stop,
) -> dict[str, Any]:
    """Train and score every arm and its opponents, and write compare.json and compare.html into `out`.

    lrs: learning rates of which each arm, opponents too, takes the one with the lowest validation loss at the first
    seed; empty: the recipe's. margin: of equality, nats per token. Returns what compare.json holds.

    Raises UsageError where a name or a folder is wrong, Interrupted after a signal: the same command goes on.
    """
    with files.held(out, "shortcut compare"):
        shards = Shards(Path(resolved.data.shards))
        runner = Runner(out, devices, report)
        _check_same(out, resolved, models, match)
        with stop as asked:
            runner.asked = asked
            arms = _arms(resolved, models, shards.tokenizer["vocabulary"], match, runner)
            rates = list(lrs) or [resolved.train.lr]
            first = resolved.train.seed
            if len(rates) > 1:
                runner.run([Cell(arm, rate, first) for arm in arms.values() for rate in rates])
            for arm in arms.values():
                scores = {rate: runner.validation(Cell(arm, rate, first)) for rate in rates} if len(rates) > 1 else {}
                arm.tried = {repr(rate): score for rate, score in scores.items()}
                arm.lr = min(scores, key=lambda rate: scores[rate]) if scores else rates[0]
            numbers = range(first, first + seeds)
            runner.run([Cell(arm, arm.lr, seed) for seed in numbers for arm in arms.values()])
        rows = {label: runner.row(arm, numbers) for label, arm in arms.items()}
        result = _result(resolved, arms, rows, match, margin, shards)
        files.write(out / "compare.json", json.dumps(result, indent=1) + "\n")
        files.write(out / "compare.html", comparison.page(result))
    return result


def _check_same(out: Path, resolved: Recipe, models: Sequence[str], match: str) -> None:
    """Refuse a folder that holds a comparison by another recipe."""
    kept = out / "comparison.json"
    plan = {"recipe": resolved.model_dump(), "match": match}
    if kept.exists():
        changes = recipe.differences(json.loads(kept.read_text(encoding="utf-8")), plan)
        if changes:
            raise UsageError(
                f"{out} holds a comparison of something else\n" + "\n".join(f"  {line}" for line in changes),
                "choose another --out",
            )
    del models  # more arms and seeds may join later
    files.write(kept, json.dumps(plan, indent=1) + "\n")


def _arms(resolved: Recipe, models: Sequence[str], vocabulary: int, match: str, runner: "Runner") -> dict[str, Arm]:
    """Arms and opponents by label; equal opponents are trained once."""
    plain = recipe.with_settings(resolved, [f"model.name={matching.BASELINE}"])
    arms = {matching.BASELINE: Arm(matching.BASELINE, plain, matching.size(plain, vocabulary))}
    for name in models:
        made = recipe.with_settings(resolved, [f"model.name={name}"])
        arms.setdefault(name, Arm(name, made, matching.size(made, vocabulary)))
    for arm in [arm for label, arm in arms.items() if label != matching.BASELINE]:
        if match == "none":
            arm.opponents = [matching.BASELINE]
            continue
        found = _opponents(arm, arms[matching.BASELINE], vocabulary, match, runner)
        for opponent in found:
            shape = opponent.model
            same = (shape.layers, shape.width, shape.ffn) == (plain.model.layers, plain.model.width, plain.model.ffn)
            label = matching.BASELINE if same else f"gpt-{shape.layers}x{shape.width}x{shape.ffn}"
            arms.setdefault(label, Arm(label, opponent, matching.size(opponent, vocabulary), asked=False))
            if label not in arm.opponents:
                arm.opponents.append(label)
    return arms


def _opponents(arm: Arm, plain: Arm, vocabulary: int, match: str, runner: "Runner") -> list[Recipe]:
    if match != "time":
        return list(matching.opponents(arm.recipe, vocabulary, match).values())  # type: ignore[arg-type]
    # A baseline that takes as long a step has about as many FLOPs as the times say.
    seconds = [runner.step_seconds(one) for one in (arm, plain)]
    return list(
        matching.opponents(arm.recipe, vocabulary, "flops", plain.size.flops * seconds[0] / seconds[1]).values()
    )


class Runner:
    """Runs cells, several at once where there are several devices."""

    def __init__(self, out: Path, devices: Sequence[str], report: Report) -> None:
        self.out, self.report = out, report
        self.devices: queue.Queue[str] = queue.Queue()
        for device in devices:
            self.devices.put(device)
        self.width = len(devices)
        # Several processes on one CPU that each take all its cores wait for one another.
        threads = max(1, (os.cpu_count() or 1) // self.width)
        self.environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if self.width > 1 else {})
        self.environment["COLUMNS"] = "76"  # the panel of a cell that fails fits into ours
        self.asked: Callable[[], int | None] = lambda: None
        self.spent: list[float] = []
        self.lock = threading.Lock()

    def run(self, cells: Sequence[Cell]) -> None:
        """Train and score what is not yet; equal cells once."""
        left = {cell.folder(self.out): cell for cell in cells if not self._is_done(cell)}
        with ThreadPoolExecutor(self.width) as pool:
            for done, _ in enumerate(pool.map(self._cell, left.values()), 1):
                each = means.mean(self.spent) / 60
                minutes = each * (len(left) - done) / self.width
                self.report("note", text=f"{done} of {len(left)} trainings done, about {minutes:,.0f} min left")

    def _is_done(self, cell: Cell) -> bool:
        folder = cell.folder(self.out)
        return (folder / "cost.json").exists() and (folder / "eval.json").exists()

    def _cell(self, cell: Cell) -> None:
        if self.asked() is not None:
            return self._stopped()
        folder, device = cell.folder(self.out), self.devices.get()
        try:
            began = time.monotonic()
            folder.mkdir(parents=True, exist_ok=True)
            planned = folder / "cell.toml"
            files.write(planned, recipe.dump(cell.recipe()))
            self.report("note", text=f"{folder.name} on {device}")
            self._process(planned, folder, device)
            with self.lock:
                self.spent.append(time.monotonic() - began)
        finally:
            self.devices.put(device)
        return None

    def _stopped(self) -> None:
        code = self.asked()
        assert code is not None
        raise Interrupted("the comparison is interrupted", "run the same command again to go on", exit_code=code)

    def _process(self, planned: Path, folder: Path, device: str) -> None:
        """Run a cell to its end. Raises what it failed with."""
        command = [sys.executable, "-m", "shortcut_cli.cell", str(planned), str(folder), device]
        with open(self.out / "output.txt", "ab") as output:
            # Our own program; a session of its own, so that Ctrl-C reaches it through us, once.
            process = subprocess.Popen(  # noqa: S603
                command, stdout=output, stderr=subprocess.PIPE, start_new_session=True, env=self.environment
            )
            told = False
            while True:
                try:
                    _, said = process.communicate(timeout=POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    if self.asked() is not None and not told:
                        process.terminate()
                        told = True
            output.write(said)
        if self.asked() is not None:
            self._stopped()
        if process.returncode:
            tail = said.decode(errors="replace").strip().splitlines()[-12:]
            raise ShortcutError(f"{folder} on {device} ended with {process.returncode}\n" + "\n".join(tail))

    def validation(self, cell: Cell) -> float:
        """The best validation loss of a cell."""
        return min(line["validation"] for line in read_log(cell.folder(self.out)) if "validation" in line)

    def step_seconds(self, arm: Arm) -> float:
        """Seconds of one training step, measured in a short run of its own."""
        settings = ["train.steps=12", "train.warmup=1", "train.log_every=1", "train.eval_every=12"]
        quick = Arm(f"timing-{arm.label}", recipe.with_settings(arm.recipe, settings), arm.size)
        cell = Cell(quick, arm.recipe.train.lr, arm.recipe.train.seed)
        self.run([cell])
        speed = _speed(cell.folder(self.out))
        if math.isnan(speed):
            raise ShortcutError(f"steps of {arm.label} are too short to be timed", "--match flops")
        return quick.recipe.train.batch_size * quick.recipe.model.context / speed

    def row(self, arm: Arm, seeds: Sequence[int]) -> dict[str, Any]:
        """What the runs of an arm gave."""
        cells = [Cell(arm, arm.lr, seed) for seed in seeds]
        folders = [cell.folder(self.out) for cell in cells]
        split = arm.recipe.eval.split
        scores = [json.loads((folder / "eval.json").read_text())["splits"][split] for folder in folders]
        costs = [json.loads((folder / "cost.json").read_text()) for folder in folders]
        speeds = [speed for speed in map(_speed, folders) if not math.isnan(speed)]
        return {
            "label": arm.label,
            "model": arm.recipe.model.name,
            "asked": arm.asked,
            "lr": arm.lr,
            "validation_by_lr": arm.tried,
            "layers": arm.recipe.model.layers,
            "width": arm.recipe.model.width,
            "ffn": arm.recipe.model.ffn,
            "parameters": arm.size.parameters,
            "parameters_total": arm.size.total,
            "training_flops_per_token": arm.size.flops,
            "cache_bytes_per_token": arm.size.cache_bytes,
            "tokens_per_s": means.median(speeds) if speeds else None,
            "peak_mb": max(cost["peak_mb"] for cost in costs),
            "device": costs[0]["device"],
            "seeds": list(seeds),
            "validation": [self.validation(cell) for cell in cells],
            "nats_per_token": [score["nats_per_token"] for score in scores],
            "bits_per_unit": [score["bits_per_unit"] for score in scores],
            "unit": scores[0]["unit"],
            "folders": [str(folder.relative_to(self.out)) for folder in folders],
            "curve": _curve(folders),
            "groups": [str(folder / f"eval-{split}.npz") for folder in folders],
        }


def _speed(folder: Path) -> float:
    """Tokens per second: the median over the pieces of the log between which nothing was validated; NaN without any."""
    lines = read_log(folder)
    found = [
        (b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"])
        for a, b in itertools.pairwise(lines)
        if "tokens" in a and "tokens" in b and b["seconds"] > a["seconds"]
    ]
    return means.median(found) if found else math.nan


def _curve(folders: Sequence[Path]) -> list[dict[str, float]]:
    """Validation loss by step, mean over seeds, with the mean of the seconds until then."""
    by_step: dict[int, list[tuple[float, float]]] = {}
    for folder in folders:
        seconds = 0.0
        for line in read_log(folder):
            seconds = line.get("seconds", seconds)
            if "validation" in line:
                by_step.setdefault(line["step"], []).append((line["validation"], seconds))
    return [
        {"step": step, "validation": means.mean(v for v, _ in found), "seconds": means.mean(s for _, s in found)}
        for step, found in sorted(by_step.items())
    ]


def _result(
    resolved: Recipe, arms: dict[str, Arm], rows: dict[str, dict[str, Any]], match: str, margin: float, shards: Shards
) -> dict[str, Any]:
    contrasts = list(_contrasts(arms, rows, margin))
    tested = [entry for entry in contrasts if entry["p"] is not None]
    for entry, adjusted in zip(tested, statistics.holm([entry["p"] for entry in tested]), strict=True):
        entry["p_holm"] = adjusted
    for entry in contrasts:
        found = statistics.Contrast(**{name: entry[name] for name in statistics.Contrast.__dataclass_fields__})
        entry["verdict"] = statistics.verdict(entry["arm"], entry["opponent"], found, margin)
    for row in rows.values():
        del row["groups"]
    batch = resolved.train.batch_size * resolved.model.context
    return {
        "schema_version": 1,
        "recipe": resolved.model_dump(),
        "shards": shards.manifest["checksum"],
        "split": resolved.eval.split,
        "match": match,
        "margin_nats": margin,
        "tokens_per_step": batch,
        "epochs": resolved.train.steps * batch / shards.split("train").tokens,
        "arms": list(rows.values()),
        "contrasts": contrasts,
    }


def _contrasts(arms: dict[str, Arm], rows: dict[str, dict[str, Any]], margin: float) -> Iterator[dict[str, Any]]:
    """Each arm that was asked for against the better of its opponents, by their validation loss."""
    for label, arm in arms.items():
        if not arm.opponents:
            continue
        opponent = min(arm.opponents, key=lambda one: means.mean(rows[one]["validation"]))
        row, other = rows[label], rows[opponent]
        nats = np.subtract(row["nats_per_token"], other["nats_per_token"]).tolist()
        found = statistics.contrast(nats, margin)
        bits = statistics.contrast(np.subtract(row["bits_per_unit"], other["bits_per_unit"]).tolist(), math.inf)
        sums = [[np.load(path) for path in one["groups"]] for one in (row, other)]
        tokens = sums[0][0]["tokens"]
        ours, theirs = (np.mean([part["nats"] for part in one], 0) for one in sums)
        over = statistics.over_documents(ours, theirs, tokens)
        yield {
            "arm": label,
            "opponent": opponent,
            "opponents": arm.opponents,
            **found.content(),
            "differences": nats,
            "bits_per_unit": bits.mean,
            "bits_per_unit_interval_95": bits.interval_95,
            "documents_interval_95": over,
        }
