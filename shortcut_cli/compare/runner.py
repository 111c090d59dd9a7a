"""The runs of a comparison: each is an ordinary run folder, made in a process of its own."""

import itertools
import math
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shortcut_cli import cleanup, files
from shortcut_cli.compare import pace, watching
from shortcut_cli.compare.arms import Arm
from shortcut_cli.compare.pace import Load, Pace
from shortcut_cli.compare.significance import of_mean
from shortcut_cli.config import reading, writing
from shortcut_cli.config.schema import SEED, Recipe
from shortcut_cli.errors import CheckFailed, Diverged, Interrupted, Missing, ShortcutError, UsageError
from shortcut_cli.events import Part, Progress, Report, Whole
from shortcut_cli.formatting import to_json
from shortcut_cli.kept import scores
from shortcut_cli.kept.inputs import differences, is_number, read
from shortcut_cli.training import checkpoint, conditions, loop
from shortcut_cli.training.device import check_room
from shortcut_cli.training.run_log import REMEDY, read_log, timed

POLL_S = 0.2
WAIT_S = 60  # for a process whose parent was killed to be gone
MOST_PAIRS = 100_000  # of lines of a log that its speed is the median of
MOST_VALIDATIONS = 100_000  # of a run, in its curve
PILOTS = 2  # seeds on which learning rates and matched baselines are chosen
PILOT_SEED = 1_000_000  # the first of them, after the recipe's: no run that counts has it
PILOT_SHARE = 4  # of how many steps a pilot has one
TRAINING_FORWARDS = 3  # FLOPs of a training step, in those of a forward pass
DIVERGED = "diverged.json"


@dataclass(frozen=True)
class PlannedRun:
    """A run of an arm at one learning rate and seed."""

    arm: Arm
    lr: float
    seed: int
    pilot: bool = False

    def folder(self, out: Path) -> Path:
        """The run folder."""
        return out / "runs" / f"{'pilot-' if self.pilot else ''}{self.arm.label}-lr{self.lr!r}-s{self.seed}"

    def recipe(self) -> Recipe:
        """The recipe of this run: of a pilot, with a share of the steps, and of those of its schedule."""
        settings = [f"train.lr={self.lr!r}", f"train.seed={self.seed}"]
        if self.pilot:
            train = self.arm.recipe.train
            settings += [f"train.steps={-(-train.steps // PILOT_SHARE)}", f"train.warmup={train.warmup // PILOT_SHARE}"]
            settings.append(f"train.schedule_steps={-(-train.schedule_steps // PILOT_SHARE)}")
        return reading.with_settings(self.arm.recipe, settings)

    def load(self, scored: int) -> Load:
        """Its FLOPs. scored: tokens of the split; a token is read again in each window that it is in."""
        train, model = self.arm.recipe.train, self.arm.recipe.model
        steps = -(-train.steps // PILOT_SHARE) if self.pilot else train.steps
        trained = self.arm.size.flops * steps * train.batch_size * model.context
        forward = self.arm.size.flops / TRAINING_FORWARDS * scored * model.context / self.arm.recipe.eval.stride
        return Load(self.arm.label, {pace.START: 1.0, pace.TRAIN: trained, pace.SCORE: forward})


def pilots(arm: Arm, lr: float) -> list[PlannedRun]:
    """The pilot runs of an arm at a learning rate, on seeds that no other run has."""
    first = (arm.recipe.train.seed + PILOT_SEED) % SEED
    return [PlannedRun(arm, lr, (first + number) % SEED, pilot=True) for number in range(PILOTS)]


@dataclass(frozen=True)
class Finished:
    """What a run that is trained and scored left in its folder; of one that diverged, `validation` and `diverged`."""

    validation: float  # lowest loss; infinite if the run diverged
    cost: dict[str, Any] = field(default_factory=dict)  # content of cost.json
    score: dict[str, Any] = field(default_factory=dict)
    groups: Path | None = None  # the score's sums by document
    conditions: list[dict[str, Any]] = field(default_factory=list)  # of each part of its training
    diverged: str = ""  # how, if it did


def cost_of(folder: Path, inputs: dict[str, str]) -> dict[str, Any] | None:
    """The content of a run's cost.json; None if there is none, it is damaged, or it is not of `inputs`."""
    try:
        cost = read(folder / "cost.json")
    except CheckFailed:
        return None  # what it said is lost, and nothing but the peak memory depends on it
    if cost is None or differences(cost.get("inputs"), inputs):
        return None
    peak = cost.get("peak_mb", "")
    return cost if isinstance(cost.get("device"), str) and (peak is None or is_number(peak)) else None


def keep_divergence(folder: Path, recipe: Recipe, error: Diverged) -> None:
    """Note in a run folder that the run of a recipe diverged."""
    manifest = read(files.place(recipe.data.shards) / "manifest.json") or {}
    inputs = checkpoint.made_from(recipe.model_dump(), manifest["checksum"])
    how = error.message.partition(";")[0]
    files.write(folder / DIVERGED, to_json({"inputs": inputs, "diverged": how}, indent=1) + "\n")


def divergence_of(folder: Path, inputs: dict[str, Any]) -> str:
    """How the run of `inputs` in a folder diverged; empty if that is not known of it."""
    try:
        kept = read(folder / DIVERGED)
    except CheckFailed:
        return ""  # then it runs again
    how = kept.get("diverged") if kept and not differences(kept.get("inputs"), inputs) else None
    return how if isinstance(how, str) else ""


Elsewhere = Callable[[Callable[[Any], Any], Iterable[Any], Callable[[], bool]], Iterator[tuple[Any, Any]]]
"""Runs a function of a job on other machines: see `data/executors.py`, `Cluster`."""


@dataclass(frozen=True)
class Cell:
    """Trains and scores a run in a process of its own, on a machine that sees the folder of the comparison."""

    output: str  # a file for what the process prints
    device: str
    threads: int

    def __call__(self, job: tuple[str, str]) -> tuple[int, str]:
        """job: the run folder, and its recipe as TOML. Returns the exit code of the process, and what it complained of.

        The process ends if this one is killed, so that the run can be begun again, and after an interruption once it
        has saved its state. Raises UsageError if another process has the folder for longer than WAIT_S.
        """
        folder = Path(job[0])
        self._write(folder, job[1])
        command = [sys.executable, "-m", "shortcut_cli.cli.worker", str(folder / "run.toml"), job[0], self.device]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads), "COLUMNS": "76"}
        ours, theirs = os.pipe()
        with open(self.output, "ab") as output, tempfile.TemporaryFile() as told, open(theirs, "wb"), open(ours, "rb"):
            process = cleanup.start(
                [*command, str(told.fileno()), str(ours)],
                stdout=output,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env=environment,
                pass_fds=[told.fileno(), ours],
            )
            try:
                _, errors = process.communicate()
            except KeyboardInterrupt:
                process.terminate()
                _, errors = process.communicate()
            output.write(errors)
        return process.returncode, errors.decode(errors="replace")

    def _write(self, folder: Path, recipe: str) -> None:
        """Write the recipe of the run; the process of a try before this one may be about to end."""
        until = time.monotonic() + WAIT_S
        while True:
            try:
                with files.held(folder, "shortcut train", known=loop.is_run_folder):
                    files.write(folder / "run.toml", recipe)
                return
            except UsageError:
                if time.monotonic() > until:
                    raise
            time.sleep(POLL_S)


class Runner:
    """Trains and scores planned runs on shards with a checksum, one at a time on each device.

    task: the number of this machine, from 1, and of all that share the folder; each trains every n-th run. scored: how
    many tokens each run is scored on, which the time left depends on. elsewhere: where runs are trained, each on the
    first of the devices; None: here. threads: of each run there.
    """

    def __init__(
        self,
        out: Path,
        devices: Sequence[str],
        report: Report,
        shards: str,
        vocabulary: int,
        task: tuple[int, int] = (1, 1),
        scored: int = 0,
        elsewhere: Elsewhere | None = None,
        threads: int = 1,
    ) -> None:
        self.task, self.scored, self.elsewhere, self.threads = task, scored, elsewhere, threads
        self.out, self.report, self.shards, self.vocabulary = out, report, shards, vocabulary
        self.names = list(devices)
        self.devices: queue.Queue[str] = queue.Queue()
        for device in devices:
            self.devices.put(device)
        self.width = len(devices)
        # Processes on one CPU that each use all its cores slow each other down.
        threads = max(1, (os.cpu_count() or 1) // self.width)
        self.environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if self.width > 1 else {})
        self.environment["COLUMNS"] = "76"  # so that the error panel of a failed run fits into ours
        self.asked: Callable[[], int | None] = lambda: None
        self.begun = 0  # runs
        self.known: dict[Path, PlannedRun] = {}  # all runs of this command that were not done before it
        self.later: dict[Path, PlannedRun] = {}  # and those that will follow, as far as it is known
        self.shares: dict[Path, dict[str, float]] = {}  # how much is done of the training and scoring of each
        self.over: set[Path] = set()
        self.pace = Pace()
        self.told: dict[Path, Progress] = {}  # what each run that goes on told last
        self.lock = threading.Lock()

    def expect(self, runs: Sequence[PlannedRun]) -> None:
        """Count these runs in what is left to do, until `run` is called with `last`."""
        folders = {planned.folder(self.out): planned for planned in runs}
        self.later = {folder: one for folder, one in folders.items() if not (folder / scores.NAME).is_file()}

    def run(self, runs: Sequence[PlannedRun], *, last: bool = False) -> None:
        """Train and score the runs that are not done yet; equal runs only once. last: no others will follow.

        Raises Missing, unless these are the last, if other tasks have not done theirs, since what comes next depends on
        all; Interrupted after a signal, UsageError, before any training, if a folder holds a different run or a
        device has no room for a model, ShortcutError if a run fails.
        """
        left = {one.folder(self.out): one for one in self.mine(runs) if self._finished(one) is None}
        for planned, device in itertools.product(left.values(), [] if self.elsewhere else self.names):
            check_room(planned.arm.size.total, self.vocabulary, device)
        self.known |= left
        self.later = {} if last else self.later
        if self.elsewhere:
            self._train_elsewhere(left, self.elsewhere)
        else:
            with ThreadPoolExecutor(self.width) as pool:
                deque(pool.map(self._train, left.values()), maxlen=0)
        missing = [one for one in runs if self._finished(one) is None] if self.task[1] > 1 and not last else []
        if missing:
            names = ", ".join(one.folder(self.out).name for one in missing[:3])
            raise Missing(
                f"the rest depends on {len(missing)} runs that other tasks have not done yet: {names}",
                "run the same command again once they have",
            )

    def _whole(self) -> Whole:
        """How far all runs are."""
        loads = {folder: planned.load(self.scored) for folder, planned in (self.known | self.later).items()}
        phases = (pace.TRAIN, pace.SCORE)
        every = sum(load.work[phase] for load in loads.values() for phase in phases)
        done = sum(loads[run].work[phase] * share for run, each in self.shares.items() for phase, share in each.items())
        waiting = [load for folder, load in loads.items() if folder not in self.shares]
        return Whole(done / every, len(self.over), self.pace.left(waiting, self.width))

    def mine(self, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
        """The runs that fall to this task: all tasks agree, since they plan the same runs in the same order."""
        number, tasks = self.task
        return [*{one.folder(self.out): one for one in runs}.values()][number - 1 :: tasks]

    def check_shards(self) -> None:
        """Raise UsageError if a run in the folder was trained on other shards."""
        for path in sorted((self.out / "runs").glob("*/run.pt")):
            found = checkpoint.load(path)["shards"]
            if found != self.shards:
                raise UsageError(
                    f"{path} was trained on shards {found[:12]}; data.shards has {self.shards[:12]}",
                    "choose another --out",
                )

    def _finished(self, planned: PlannedRun) -> Finished | None:
        """What a run left, if it is trained and scored. Raises UsageError if its folder holds a different run."""
        folder, recipe = planned.folder(self.out), planned.recipe()
        path = folder / "run.pt"
        wanted = checkpoint.made_from(recipe.model_dump(), self.shards)
        if how := divergence_of(folder, wanted):
            return Finished(math.inf, diverged=how)
        if not path.is_file():
            return None
        content = checkpoint.load(path)
        found = checkpoint.made_from(content["recipe"], content["shards"], content.get("lineage"))
        changes = differences(found, wanted)
        if changes:
            raise UsageError(
                f"{folder} holds a different run\n" + "\n".join(f"  {line}" for line in changes), "choose another --out"
            )
        sha256 = files.sha256(path)
        cost = cost_of(folder, {"checkpoint_sha256": sha256})
        if cost is None:
            return None
        # Scored by the process that wrote cost.json, so on its device.
        inputs = scores.made_from(sha256, self.shards, recipe.eval.split, recipe.eval, cost["device"])
        score = scores.find(folder, inputs)
        groups = scores.groups(folder, score) if score else None
        made = conditions.parts(content.get("conditions"))
        if not score or not groups:
            return None
        validation = content["scores"]["validation"]
        if score["nats_per_token"] is None or not math.isfinite(validation):
            return Finished(math.inf, diverged="its loss is not finite after training")
        return Finished(validation, cost, score, groups, made)

    def _train(self, planned: PlannedRun) -> None:
        self._check_stop()
        folder, device = planned.folder(self.out), self.devices.get()
        try:
            recipe = folder / "run.toml"
            with files.held(folder, "shortcut train", known=loop.is_run_folder):
                files.write(recipe, writing.dump(planned.recipe()))
            with self.lock:
                self.begun += 1
                self.shares[folder] = {}
                self.pace.begin(folder.name, planned.load(self.scored))
                total = len(self.known | self.later)
                self.report(
                    Part("compare", self.begun, total, f"{folder.name} on {device}", self._whole(), beside=True)
                )
            self._process(recipe, folder, device)
            with self.lock:
                self.shares[folder] = {pace.TRAIN: 1.0, pace.SCORE: 1.0}
                self.over.add(folder)
                self.pace.end(folder.name)
                self._over(folder)
        finally:
            self.devices.put(device)

    def _train_elsewhere(self, left: Mapping[Path, PlannedRun], elsewhere: Elsewhere) -> None:
        """Train runs on other machines, in any order. Raises what `_train` raises; the others are stopped then."""
        cell = Cell(os.path.abspath(self.out / "output.txt"), self.names[0], self.threads)
        jobs = {os.path.abspath(folder): folder for folder in left}
        recipes = [(name, writing.dump(left[folder].recipe())) for name, folder in jobs.items()]
        total = len(self.known | self.later)
        for (name, _), (code, errors) in elsewhere(cell, recipes, lambda: self.asked() is not None):
            if code and self.asked() is None:
                tail = "\n".join(_plain(errors)[-12:])
                raise ShortcutError(f"{name} on {self.names[0]} exited with {code}\n{tail}")
            if code:  # it was interrupted, and is not done
                continue
            self.begun += 1
            self.shares[jobs[name]] = {pace.TRAIN: 1.0, pace.SCORE: 1.0}
            self.over.add(jobs[name])
            self.report(Part("compare", self.begun, total, f"{jobs[name].name} is done", self._whole(), beside=True))
        self._check_stop()

    def _check_stop(self) -> None:
        """Raise Interrupted after a signal."""
        code = self.asked()
        if code is not None:
            raise Interrupted("the comparison was interrupted", "run the same command again to resume", exit_code=code)

    def _process(self, recipe: Path, folder: Path, device: str) -> None:
        """Execute a run to its end in a process of its own, passing on a signal, and report its log.

        Raises Interrupted after a signal, ShortcutError if the process fails.
        """
        command = [sys.executable, "-m", "shortcut_cli.cli.worker", str(recipe), str(folder), device]
        with open(self.out / "output.txt", "ab") as output, tempfile.TemporaryFile() as told:
            # A new session, so that Ctrl-C reaches the process only through us, once.
            process = cleanup.start(
                [*command, str(told.fileno())],
                stdout=output,
                stderr=subprocess.PIPE,
                start_new_session=True,
                env=self.environment,
                pass_fds=[told.fileno()],
            )
            terminated = False
            while True:
                try:
                    _, errors = process.communicate(timeout=POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    self._watch(folder, told.fileno())
                    if self.asked() is not None and not terminated:
                        process.terminate()
                        terminated = True
            output.write(errors)
        self._check_stop()
        if process.returncode:
            tail = "\n".join(_plain(errors.decode(errors="replace"))[-12:])
            raise ShortcutError(f"{folder} on {device} exited with {process.returncode}\n{tail}")

    def _watch(self, folder: Path, told: int) -> None:
        """Report how far a run is, by what its process has told in a file."""
        event = watching.newest(told)
        if event is None:
            return
        trains = event.unit == "steps"
        event = replace(event, task=folder.name if trains else f"{event.task} {folder.name}")
        with self.lock:
            phase, share = pace.TRAIN if trains else pace.SCORE, event.done / event.total
            self.shares[folder] = {phase: share} if trains else {pace.TRAIN: 1.0, phase: share}
            self.pace.move(folder.name, phase, share)
            if (last := self.told.get(folder)) and last.task != event.task:
                self._over(folder)
            self.told[folder] = event
            self.report(replace(event, whole=self._whole()))

    def _over(self, folder: Path) -> None:
        """Report that what a run told last is over, which it may have said between two looks."""
        if last := self.told.pop(folder, None):
            self.report(replace(last, done=last.total))

    def result(self, planned: PlannedRun) -> Finished:
        """What a run left. Raises ShortcutError if that could not be written."""
        found = self._finished(planned)
        if found is None:
            raise ShortcutError(
                f"{planned.folder(self.out)} has no score", f"{self.out / 'output.txt'} has what its process printed"
            )
        return found

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
        results = [self.result(planned) for planned in runs]
        whole = [(result, folder) for result, folder in zip(results, folders, strict=True) if not result.diverged]
        peaks = [result.cost["peak_mb"] for result, _ in whole if result.cost["peak_mb"] is not None]
        losses = [result.score.get("nats_per_token") for result in results]
        speeds = [speed for speed in (_speed(folder) for _, folder in whole) if not math.isnan(speed)]
        return {
            "label": arm.label,
            "model": arm.recipe.model.name,
            "asked": arm.asked,
            "role": arm.role,
            "lr": arm.lr,
            "validation_by_lr": {rate: statistics.mean(losses) for rate, losses in arm.tried.items()},
            "layers": arm.recipe.model.layers,
            "width": arm.recipe.model.width,
            "ffn": arm.recipe.model.ffn,
            "parameters": arm.size.parameters,
            "parameters_total": arm.size.total,
            "training_flops_per_token": arm.size.flops,
            "cache_bytes_per_token": arm.size.cache_bytes,
            "tokens_per_s": statistics.median(speeds) if speeds else None,
            "peak_mb": max(peaks) if peaks else None,
            "device": next((result.cost["device"] for result, _ in whole), None),
            "conditions": _distinct(part for result in results for part in result.conditions),
            "seeds": list(seeds),
            "validation": [None if result.diverged else result.validation for result in results],
            "nats_per_token": losses,
            "nats_per_token_interval_95": of_mean(losses),
            "bits_per_unit": [result.score.get("bits_per_unit") for result in results],
            "unit": next((result.score["unit"] for result, _ in whole), None),
            "documents": next((result.score["documents"] for result, _ in whole), None),
            "interval_over": next((result.score["interval_over"] for result, _ in whole), None),
            "diverged": {str(seed): one.diverged for seed, one in zip(seeds, results, strict=True) if one.diverged},
            "folders": [str(folder.relative_to(self.out)) for folder in folders],
            "curve": _curve([folder for _, folder in whole]),
            "groups": [str(result.groups) for result in results],
        }


def _plain(printed: str) -> list[str]:
    """The lines that a process printed, those of its panel without the frame, since they go into ours."""
    lines = (line.strip("\u2502 ") for line in printed.splitlines() if not line.startswith(("\u256d", "\u2570")))
    return [line for line in lines if line]


def _distinct(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conditions that differ, without the steps from which they held."""
    found: list[dict[str, Any]] = []
    for part in parts:
        rest = {key: value for key, value in part.items() if key != conditions.FROM_STEP}
        if rest not in found:
            found.append(rest)
    return found


def differing(rows: Iterable[dict[str, Any]]) -> str:
    """How the conditions under which rows of results were trained differ, on one line; empty if they do not."""
    found = _distinct(part for row in rows for part in row["conditions"])
    return "; ".join(conditions.changes(found[0], other) for other in found[1:])


def _speed(folder: Path) -> float:
    """Tokens per second: the median over pairs of log lines with no validation between them; NaN if there are none.

    Of a log with very many lines, the last ones.
    """
    speeds: Iterable[float] = (
        (b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"])
        for a, b in itertools.pairwise(read_log(folder))
        if None not in (line.get(key) for line in (a, b) for key in ("tokens", "seconds"))
        and b["seconds"] > a["seconds"]
    )
    found = deque(speeds, maxlen=MOST_PAIRS)
    return statistics.median(found) if found else math.nan


def _curve(folders: Sequence[Path]) -> list[dict[str, float]]:
    """Validation loss and training seconds by step, means over seeds, and the lowest and the highest loss of a seed.

    Raises CheckFailed if there are too many.
    """
    by_step: dict[int, list[tuple[float, float]]] = {}
    for folder in folders:
        for count, line in enumerate(timed(read_log(folder)), 1):
            by_step.setdefault(line["step"], []).append((line["validation"], line["seconds"]))
            if count > MOST_VALIDATIONS:
                raise CheckFailed(f"{folder / 'log.jsonl'} has more than {MOST_VALIDATIONS:,} validations", REMEDY)
    return [
        {
            "step": step,
            "validation": statistics.mean(v for v, _ in found),
            "validation_lowest": min(v for v, _ in found),
            "validation_highest": max(v for v, _ in found),
            "seconds": statistics.mean(s for _, s in found),
        }
        for step, found in sorted(by_step.items())
    ]
