"""What a run folder says of its run, read as strictly as everywhere, for the sections of a report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from shortcut_cli import files, registry
from shortcut_cli.config import reading
from shortcut_cli.data import shards
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.kept import names, scores
from shortcut_cli.kept.inputs import is_number
from shortcut_cli.training import checkpoint, conditions, run_log, tensor_file

RESULT = "run.pt"
STEPS = ("loss", "lr", "gradient_norm", "tokens", "seconds")  # of a line of the log of a model's training
MOST_ABOVE = 5  # folders that a run lies in, in which its shards are looked for


@dataclass(frozen=True)
class Costs:
    """Size and work of a model. parameters: as `Decoder.count`; flops: of training, per token."""

    parameters: Mapping[str, int]
    flops: int


@dataclass(frozen=True)
class RunData:
    """What is known of a run.

    log: the lines of log.jsonl with a loss, validations: those with a validation loss, NaN for what is not finite.
    manifest: of the shards that it was trained on, if they are where its recipe says; costs: None if this version does
    not know its network; scores: of run.pt on the splits of these shards; others: on other shards or files. problems:
    what could not be read, a sentence each.
    """

    folder: Path
    name: str
    content: Mapping[str, Any]  # of run.pt, its tensors described only
    sha256: str  # of run.pt
    written: str  # when run.pt was, UTC
    log: Sequence[dict[str, float]]
    validations: Sequence[dict[str, float]]
    scores: Mapping[str, Mapping[str, Any]]
    others: Sequence[Mapping[str, Any]] = ()
    manifest: Mapping[str, Any] | None = None
    costs: Costs | None = None
    problems: Sequence[str] = field(default=())

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe in run.pt, not validated."""
        return self.content["recipe"]  # type: ignore[no-any-return]

    @property
    def conditions(self) -> Mapping[str, Any]:
        """Device, threads and versions of the last part of the training."""
        made = conditions.parts(self.content.get("conditions"))
        return made[-1] if made else {}

    def key(self, name: str) -> Any:
        """A key of the recipe by its dotted name; None if it has none."""
        found: Any = self.recipe
        for part in name.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    def count(self, name: str) -> int | None:
        """A key of the recipe that is a whole number; None if it is none."""
        found = self.key(name)
        return found if isinstance(found, int) and not isinstance(found, bool) and is_number(found) else None

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of one step; None if the recipe does not say."""
        batch, context = self.count("train.batch_size"), self.count("model.context")
        return batch * context if batch and context else None

    @property
    def trained_tokens(self) -> float | None:
        """Tokens seen up to the last line of the log."""
        return self.log[-1]["tokens"] if self.log else None

    @property
    def seconds(self) -> float | None:
        """Seconds of the training up to the last line of the log."""
        return self.log[-1]["seconds"] if self.log else None

    @property
    def step(self) -> int | None:
        """The last step in the log."""
        steps = [line["step"] for line in (*self.log[-1:], *self.validations[-1:])]
        return int(max(steps)) if steps else None

    @property
    def training_tokens(self) -> int | None:
        """Tokens of the training split; None if they are not known."""
        return int(self.manifest["splits"]["train"]["tokens"]) if self.manifest else None


def read(folder: Path) -> RunData:
    """What is known of the run in a folder. It is read once, as long as its files stay as they are.

    Raises UsageError or CheckFailed if its run.pt is missing or damaged. What is wrong with its other files is in
    `problems`.
    """
    states = tuple(_state(folder / name) for name in (RESULT, "log.jsonl", scores.NAME))
    return _read(folder.resolve(), folder, states)


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=64)
def _read(_: Path, folder: Path, __: tuple[tuple[int, int], ...]) -> RunData:
    path = folder / RESULT
    content = tensor_file.describe(path, RESULT)
    checkpoint.check(path, content)
    sha256 = files.sha256(path)
    problems: list[str] = []
    found: dict[str, Any] = {"log": [], "validations": [], "scores": {}}
    for part in (_log, _scores, _manifest, _costs):
        try:
            made = part(folder, content, sha256)
            problems += made.pop("remarks", [])
            found |= made
        except (CheckFailed, UsageError) as error:
            problems.append(error.message)
        except OSError as error:
            problems.append(f"{error.filename or folder} can't be read: {error.strerror}")
    written = datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return RunData(folder, names.of_folder(folder), content, sha256, written, problems=tuple(problems), **found)


def _log(folder: Path, _: Mapping[str, Any], __: str) -> dict[str, Any]:
    lines: list[dict[str, float]] = []
    validations: list[dict[str, float]] = []
    every = [*run_log.read_log(folder)]
    for line in (*every, *run_log.timed(every)):
        values = {name: math.nan if value is None else float(value) for name, value in line.items()}
        if "validation" in values and "seconds" in values:
            validations.append(values)
        elif values.keys() >= set(STEPS):
            lines.append(values)
    # A validation is there twice: with its time, and without.
    unknown = len(every) - len(lines) - len(validations)
    remarks = [f"{folder / 'log.jsonl'} has no line of a step: there are no curves."] if not lines else []
    if unknown > 0:
        remarks.append(f"{folder / 'log.jsonl'} has {unknown:,} lines that are of no step, or lack a value.")
    return {"log": lines, "validations": validations, "remarks": remarks}


def _scores(folder: Path, _: Mapping[str, Any], sha256: str) -> dict[str, Any]:
    found = {"scores": scores.of_checkpoint(folder, sha256), "others": scores.others(folder, sha256)}
    return found | {"remarks": scores.left_out(folder, sha256)}


def _manifest(folder: Path, content: Mapping[str, Any], _: str) -> dict[str, Any]:
    """The manifest of the shards that the recipe names, if they are still those of the run."""
    place = shards_of(folder, content)
    return {} if place is None else {"manifest": shards.read_manifest(place)}


def shards_of(folder: Path, content: Mapping[str, Any]) -> Path | None:
    """The shards that a run was trained on; None if they are not found.

    Its recipe names them as seen from where the training was started. If they are not there, they are looked for
    beside the folders that the run is in: so a project can be moved, or looked at from elsewhere. Their hash says that
    they are the same.

    Raises what reading a manifest raises.
    """
    named = content["recipe"].get("data", {}).get("shards")
    if not isinstance(named, str) or "\0" in named:
        return None
    named = str(files.place(named))  # shards in a store have a copy in the cache
    parts = [part for part in Path(named).parts if part not in ("/", "..")]
    above = [*folder.resolve().parents][:MOST_ABOVE]
    beside = (each.joinpath(*parts[first:]) for each in above for first in range(len(parts)))
    for place in (Path(named), *beside):
        if (place / shards.MANIFEST).is_file() and shards.read_manifest(place)["checksum"] == content["shards"]:
            return place
    return None


def _costs(folder: Path, content: Mapping[str, Any], _: str) -> dict[str, Any]:
    """Size and cost of the network, counted on torch's meta device, on which it takes no memory.

    Raises CheckFailed if this version does not know it.
    """
    import torch

    resolved = reading.validate(content["recipe"], str(folder / RESULT))
    vocabulary, config = content["vocabulary"], resolved.model
    kind = registry.load(registry.MODELS, config.name)
    tensor_file.check_shapes(folder / RESULT, content["model"], lambda: kind(config, vocabulary), config.layers)
    with torch.device("meta"):
        model = kind(config, vocabulary)
    return {"costs": Costs(model.count(), model.training_flops_per_token(config.context))}
