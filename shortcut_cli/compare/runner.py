"""The runs of a comparison: each is an ordinary run folder, made in a process of its own."""

import itertools
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortcut_cli import files
from shortcut_cli.compare.arms import Arm
from shortcut_cli.config import reading, writing
from shortcut_cli.config.schema import Recipe
from shortcut_cli.errors import Interrupted, ShortcutError
from shortcut_cli.events import Note, Report
from shortcut_cli.training.run_log import read_log

POLL_S = 0.2


@dataclass(frozen=True)
class PlannedRun:
    """A run of an arm at one learning rate and seed."""

    arm: Arm
    lr: float
    seed: int

    def folder(self, out: Path) -> Path:
        """The run folder."""
        return out / "runs" / f"{self.arm.label}-lr{self.lr!r}-s{self.seed}"

    def recipe(self) -> Recipe:
        """The recipe of this run."""
        return reading.with_settings(self.arm.recipe, [f"train.lr={self.lr!r}", f"train.seed={self.seed}"])


class Runner:
    """Trains and scores planned runs, one at a time on each device."""

    def __init__(self, out: Path, devices: Sequence[str], report: Report) -> None:
        self.out, self.report = out, report
        self.devices: queue.Queue[str] = queue.Queue()
        for device in devices:
            self.devices.put(device)
        self.width = len(devices)
        # Processes on one CPU that each use all its cores slow each other down.
        threads = max(1, (os.cpu_count() or 1) // self.width)
        self.environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if self.width > 1 else {})
        self.environment["COLUMNS"] = "76"  # so that the error panel of a failed run fits into ours
        self.asked: Callable[[], int | None] = lambda: None
        self.spent: list[float] = []  # seconds of each run done
        self.lock = threading.Lock()

    def run(self, runs: Sequence[PlannedRun]) -> None:
        """Train and score the runs that are not done yet; equal runs only once.

        Raises Interrupted after a signal, ShortcutError if a run fails.
        """
        left = {planned.folder(self.out): planned for planned in runs if not self._is_done(planned)}
        with ThreadPoolExecutor(self.width) as pool:
            for done, _ in enumerate(pool.map(self._train, left.values()), 1):
                each = statistics.mean(self.spent) / 60
                minutes = each * (len(left) - done) / self.width
                self.report(Note(text=f"{done} of {len(left)} runs done, about {minutes:,.0f} min left"))

    def _is_done(self, planned: PlannedRun) -> bool:
        folder = planned.folder(self.out)
        return (folder / "cost.json").exists() and (folder / "eval.json").exists()

    def _train(self, planned: PlannedRun) -> None:
        self._check_stop()
        folder, device = planned.folder(self.out), self.devices.get()
        try:
            began = time.monotonic()
            folder.mkdir(parents=True, exist_ok=True)
            recipe = folder / "run.toml"
            files.write(recipe, writing.dump(planned.recipe()))
            self.report(Note(text=f"{folder.name} on {device}"))
            self._process(recipe, folder, device)
            with self.lock:
                self.spent.append(time.monotonic() - began)
        finally:
            self.devices.put(device)

    def _check_stop(self) -> None:
        """Raise Interrupted after a signal."""
        code = self.asked()
        if code is not None:
            raise Interrupted("the comparison was interrupted", "run the same command again to resume", exit_code=code)

    def _process(self, recipe: Path, folder: Path, device: str) -> None:
        """Execute a run to its end in a process of its own, passing on a signal.

        Raises Interrupted after a signal, ShortcutError if the process fails.
        """
        command = [sys.executable, "-m", "shortcut_cli.cli.worker", str(recipe), str(folder), device]
        with open(self.out / "output.txt", "ab") as output:
            # A new session, so that Ctrl-C reaches the process only through us, once. S603: the command is our own.
            process = subprocess.Popen(  # noqa: S603
                command, stdout=output, stderr=subprocess.PIPE, start_new_session=True, env=self.environment
            )
            terminated = False
            while True:
                try:
                    _, errors = process.communicate(timeout=POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    if self.asked() is not None and not terminated:
                        process.terminate()
                        terminated = True
            output.write(errors)
        self._check_stop()
        if process.returncode:
            tail = errors.decode(errors="replace").strip().splitlines()[-12:]
            raise ShortcutError(f"{folder} on {device} exited with {process.returncode}\n" + "\n".join(tail))

    def validation(self, planned: PlannedRun) -> float:
        """The lowest validation loss of a run."""
        losses: list[float] = [
            line["validation"] for line in read_log(planned.folder(self.out)) if "validation" in line
        ]
        return min(losses)

    def step_seconds(self, arm: Arm) -> float:
        """Seconds per training step, measured in a short run.

        Raises ShortcutError if the steps are too short to be timed.
        """
        settings = ["train.steps=12", "train.warmup=1", "train.log_every=1", "train.eval_every=12"]
        timed = Arm(f"timing-{arm.label}", reading.with_settings(arm.recipe, settings), arm.size)
        planned = PlannedRun(timed, arm.recipe.train.lr, arm.recipe.train.seed)
        self.run([planned])
        speed = _speed(planned.folder(self.out))
        if math.isnan(speed):
            raise ShortcutError(f"steps of {arm.label} are too short to be timed", "--match flops")
        seconds: float = timed.recipe.train.batch_size * timed.recipe.model.context / speed
        return seconds

    def row(self, arm: Arm, seeds: Sequence[int]) -> dict[str, Any]:
        """The results of an arm's runs. "groups": paths of the scores by document, one per seed."""
        runs = [PlannedRun(arm, arm.lr, seed) for seed in seeds]
        folders = [planned.folder(self.out) for planned in runs]
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
            "tokens_per_s": statistics.median(speeds) if speeds else None,
            "peak_mb": max(cost["peak_mb"] for cost in costs),
            "device": costs[0]["device"],
            "seeds": list(seeds),
            "validation": [self.validation(planned) for planned in runs],
            "nats_per_token": [score["nats_per_token"] for score in scores],
            "bits_per_unit": [score["bits_per_unit"] for score in scores],
            "unit": scores[0]["unit"],
            "folders": [str(folder.relative_to(self.out)) for folder in folders],
            "curve": _curve(folders),
            "groups": [str(folder / f"eval-{split}.npz") for folder in folders],
        }


def _speed(folder: Path) -> float:
    """Tokens per second: the median over pairs of log lines with no validation between them; NaN if there are none."""
    lines = read_log(folder)
    found: list[float] = [
        (b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"])
        for a, b in itertools.pairwise(lines)
        if "tokens" in a and "tokens" in b and b["seconds"] > a["seconds"]
    ]
    return statistics.median(found) if found else math.nan


def _curve(folders: Sequence[Path]) -> list[dict[str, float]]:
    """Validation loss and training seconds by step, means over seeds."""
    by_step: dict[int, list[tuple[float, float]]] = {}
    for folder in folders:
        seconds = 0.0
        for line in read_log(folder):
            seconds = line.get("seconds", seconds)
            if "validation" in line:
                by_step.setdefault(line["step"], []).append((line["validation"], seconds))
    return [
        {
            "step": step,
            "validation": statistics.mean(v for v, _ in found),
            "seconds": statistics.mean(s for _, s in found),
        }
        for step, found in sorted(by_step.items())
    ]
