"""Runs: what runs a folder holds, with their scores, and how two runs differ. Without PyTorch.

A run.pt is read as strictly as everywhere, its checksum included, but its tensors are only described. A score in
eval.json counts only if it is of the very bytes of the run.pt beside it.
"""

import math
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shortcut_cli import files
from shortcut_cli.config.schema import SEED
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.kept import names, scores
from shortcut_cli.training import checkpoint, conditions, run_log, tensor_file
from shortcut_cli.training.pickle_program import Described

RESULTS = ("run.pt", "codec.pt")
STATES = ("resume.pt", "resume.prev.pt")
OWNERS = ("shortcut train", "shortcut codec train")
COUNTS = ("seed", "steps")
UNKNOWN: dict[str, Any] = {
    "kind": "",
    "model": "",
    "shape": "",
    "data": "",
    "seed": None,
    "parameters": None,
    "step": None,  # the last one in the log
    "steps": None,
    "finished": False,
    "best_step": None,
    "validation": None,
    "scores": {},
    "checkpoint_sha256": None,
    "shards": None,
    "lineage": {},
}


def listed(folder: Path) -> dict[str, Any]:
    """The runs in a folder, at any depth, by path; "problem" says what is wrong with one, or is empty.

    Raises UsageError if there is no such folder.
    """
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"{folder} {state}", "`shortcut train` writes its runs into runs/; give another folder")
    return {"folder": str(folder), "runs": [_entry(folder, place, problem) for place, problem in _places(folder)]}


def _places(folder: Path) -> Iterator[tuple[Path, str]]:
    """The run folders in a folder, itself included, and the folders that can't be read with the reason, sorted."""
    failed: list[tuple[Path, str]] = []

    def note(error: OSError) -> None:
        failed.append((Path(os.fsdecode(error.filename)), f"can't be read: {error.strerror}"))

    found = []
    for name, folders, inside in os.walk(folder, onerror=note):
        place = Path(name)
        if {*RESULTS, *STATES} & {*inside, *folders} or files.owner(place) in OWNERS:
            found.append((place, ""))
    yield from sorted(found + failed)


def _entry(folder: Path, place: Path, problem: str) -> dict[str, Any]:
    """What is known of one run."""
    entry: dict[str, Any] = {"run": str(place.relative_to(folder)), **UNKNOWN}
    problems = [problem] if problem else []
    for part in () if problem else (_result, _scores, _progress):
        try:
            entry |= part(place, entry)
        except (CheckFailed, UsageError) as error:
            problems.append(error.message)
        except OSError as error:
            problems.append(f"{place} can't be read: {error.strerror}")
    if not problems and not entry["checkpoint_sha256"]:
        problems.append("nothing was validated yet: it has no run.pt or codec.pt")
    return entry | {"problem": "; ".join(problems)}


def _progress(place: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The last step in the log of a run, if it has one. Raises CheckFailed if that is damaged."""
    step = None
    for line in run_log.read_log(place) if (place / "log.jsonl").exists() else ():
        step = line["step"]
    return {"step": step, "finished": step is not None and step == entry["steps"]}


def _result(place: Path, _: Mapping[str, Any]) -> dict[str, Any]:
    """What the run.pt or codec.pt of a run says of it, or its recipe as long as it has neither."""
    path, recipe = (
        next((place / name for name in RESULTS if os.path.lexists(place / name)), None),
        place / "recipe.toml",
    )
    if path:
        return _of_codec(path) if path.name == "codec.pt" else _of_model(path)
    return _of_tree(_recipe(recipe)) if recipe.exists() else {}


def _recipe(path: Path) -> dict[str, Any]:
    """A recipe.toml, not validated, which would load tokenizers. Raises CheckFailed if it has not the form of one."""
    try:
        tree = tomllib.loads(files.content(path).decode())
    except (ValueError, RecursionError) as error:
        raise CheckFailed(f"{path} is damaged: {tensor_file.shortened(str(error))}") from error
    if not any(tensor_file.is_recipe(tree, *key) for key in (("model", "name"), ("codec", "network"))):
        raise CheckFailed(f"{path} is damaged: it is no recipe")
    return tree


def _of_tree(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe says of a run, as far as it is one of this version: a checkpoint may come from another."""
    codec = "codec" in recipe
    train = recipe.get("train", {})
    numbers = {key: found if isinstance(found := train.get(key), int) and 0 <= found < SEED else None for key in COUNTS}
    name = recipe["codec"]["network"] if codec else recipe["model"]["name"]
    kind, named = "codec" if codec else "checkpoint", name[: tensor_file.SHOWN]
    return {"kind": kind, "model": named, "shape": names.shape(recipe), "data": names.of_data(recipe), **numbers}


def _of_model(path: Path) -> dict[str, Any]:
    """What a run.pt says of its run. Raises what `checkpoint.load` raises."""
    content = tensor_file.describe(path, path.name)
    checkpoint.check(path, content)
    validation = content["scores"]["validation"]
    return _of_tree(content["recipe"]) | {
        "parameters": _parameters(content["model"]),
        "best_step": content["step"],
        "validation": validation if math.isfinite(validation) else None,
        "checkpoint_sha256": files.sha256(path),
        "shards": content["shards"],
        "lineage": content.get("lineage", {}),
    }


def _of_codec(path: Path) -> dict[str, Any]:
    """What a codec.pt says of its run. Raises UsageError or CheckFailed if it is none, or damaged."""
    content = tensor_file.describe(path, path.name)
    _check_codec(path, content)
    return _of_tree(content["recipe"]) | {
        "parameters": _parameters(content["weights"]),
        "best_step": content["step"],
        "scores": content["scores"],
        "checkpoint_sha256": files.sha256(path),
    }


def _check_codec(path: Path, content: Any) -> None:
    """Raise CheckFailed if what was read from a codec.pt does not have what is listed of it."""
    if not (
        isinstance(content, dict)
        and content.keys() >= {"recipe", "weights", "step", "scores", "versions"}
        and all(isinstance(content[key], dict) for key in ("recipe", "scores", "versions"))
        and isinstance(content["step"], int)
        and tensor_file.are_shown(content)
        and tensor_file.is_recipe(content["recipe"], "codec", "network")
        and tensor_file.are_tensors(content["weights"])
    ):
        raise CheckFailed(f"{path} is a PyTorch file, but not a codec.pt")


def _parameters(weights: Mapping[str, Described]) -> int:
    """How many numbers the weights are; tied ones count once."""
    return sum(storage.elements for storage in {tensor.storage for tensor in weights.values()})


def _scores(place: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    """What `eval` has found for a run.pt on the splits of its own shards, by split."""
    if entry["kind"] != "checkpoint" or not entry["checkpoint_sha256"]:
        return {}
    return {"scores": scores.listed(place, entry["checkpoint_sha256"])}


def difference(first: Path, second: Path) -> dict[str, Any]:
    """How two runs differ: "differences" has the value of each, by what differs; None if one of them has none.

    Raises UsageError if one is no run, CheckFailed if it is damaged.
    """
    one, other = _flat_run(first), _flat_run(second)
    keys = [*one, *(key for key in other if key not in one)]
    changes = {key: [one.get(key), other.get(key)] for key in keys if one.get(key) != other.get(key)}
    return {"runs": [str(first), str(second)], "differences": changes}


def _flat_run(given: Path) -> dict[str, Any]:
    """What is compared of a run, by dotted name."""
    path = given / "run.pt" if given.is_dir() else given
    content = tensor_file.describe(path, "run.pt")
    checkpoint.check(path, content)
    found = _scores(path.parent, {"kind": "checkpoint", "checkpoint_sha256": files.sha256(path)})
    made = conditions.parts(content.get("conditions"))
    last = {key: value for key, value in made[-1].items() if key not in content["versions"]} if made else {}
    lineage = content.get("lineage", {})
    parts = {
        "recipe": content["recipe"],
        "shards": content["shards"],
        "tokenizer": content["tokenizer"]["fingerprint"],
        "vocabulary": content["vocabulary"],
        "parameters": _parameters(content["model"]),
        "init_from": lineage.get("init_from"),
        "versions": content["versions"],
        "conditions": last,
        "precision": content.get("precision"),
        "step": content["step"],
        "scores": content["scores"] | found["scores"],
    }
    return dict(_flat("", parts))


def _flat(prefix: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield prefix + str(key), value
