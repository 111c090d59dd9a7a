"""eval.json of a run folder: the scores of its checkpoints, side by side, each with what it was made from.

    {"schema_version": ..., "splits": {"test": SCORE, "val": SCORE}, "others": [SCORE, ...]}

"splits" has the newest score of run.pt on each split of the shards that it was trained on. "others" has the rest: on
other shards, with other keys of [eval], of other checkpoints. The sums by document of each score are in a file of its
own, eval-SPLIT.npz or eval-SPLIT-HASH.npz, which the score names with its SHA-256. "score_sha256" is that of the score
itself: one that was edited is made again. "floors" has what simple predictors reach on the same tokens.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from shortcut_cli import SCHEMA_VERSION, files
from shortcut_cli.config.schema import EvalConfig
from shortcut_cli.errors import CheckFailed
from shortcut_cli.events import Note, Report
from shortcut_cli.formatting import to_json
from shortcut_cli.kept import floors
from shortcut_cli.kept.inputs import differences, is_number, move_away, read

NAME = "eval.json"
NUMBERS = ("nats_per_token", "unigram_entropy", "perplexity", "accuracy", "bits_per_unit")  # or None: not known
Score = dict[str, Any]


def made_from(checkpoint_sha256: str, shards: str, split: str, config: EvalConfig, device: str) -> dict[str, Any]:
    """Everything that a score depends on. shards: their checksum.

    Of the device the kind alone counts: rounding differs between kinds. `schema_version` stands for what the tool means
    by a score.
    """
    return config.model_dump() | {
        "schema_version": SCHEMA_VERSION,
        "checkpoint_sha256": checkpoint_sha256,
        "shards": shards,
        "split": split,
        "device": kind(device),
    }


def find_floors(folder: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """The floors of any score in a run folder that were made from exactly `inputs`, see `kept.floors`; else None."""
    return next((score["floors"] for score in _every(folder) if floors.is_usable(score.get("floors"), inputs)), None)


def kind(device: str) -> str:
    """The kind of a device: "cuda" of "cuda:1"."""
    return device.partition(":")[0]


def find(folder: Path, inputs: dict[str, Any]) -> Score | None:
    """The score in a run folder that was made from exactly `inputs`, if its sums by document are whole; else None."""
    same = (score for score in _every(folder) if not differences(score.get("inputs"), inputs))
    return next((score for score in same if _is_whole(score) and groups(folder, score) and _is_unaltered(score)), None)


def _every(folder: Path) -> list[Score]:
    """Every score in a run folder; none if eval.json is damaged: they are made again, and `keep` moves it away."""
    try:
        content = _content(folder)
    except CheckFailed:
        return []
    return [*content["splits"].values(), *content["others"]]


def of_checkpoint(folder: Path, checkpoint_sha256: str) -> dict[str, Score]:
    """The scores of a checkpoint on the splits of the shards that it was trained on, by split.

    Those that are not whole, were edited, or are of another checkpoint are left out. Raises CheckFailed if eval.json is
    damaged.
    """
    return {
        split: score
        for split, score in _content(folder)["splits"].items()
        if score.get("checkpoint_sha256") == checkpoint_sha256
        and score.get("split") == split
        and _is_whole(score)
        and groups(folder, score)
        and _is_unaltered(score)
    }


def _is_whole(score: Score) -> bool:
    """Whether a score has what is shown of it, or computed with it."""
    texts, counts = ("split", "unit", "interval_over"), ("documents", "tokens")
    numbers = [*NUMBERS, *(("bits_per_character", "word_perplexity") if "words" in score else ())]
    weights = score.get("depth_weights", {"sources": [], "by_head": []})
    return (
        score.keys() >= {*texts, *counts, *numbers, "interval_95", "bits_per_unit_interval_95"}
        and all(isinstance(score[key], str) for key in texts)
        and all(isinstance(score[key], int) for key in counts)
        and all(score[key] is None or is_number(score[key]) for key in numbers)
        and isinstance(weights, dict)
        and weights.keys() >= {"sources", "by_head"}
    )


def _is_unaltered(score: Score) -> bool:
    """Whether a score says what it said when it was kept."""
    return score.get("score_sha256") == _digest(score)


def _digest(score: Score) -> str:
    """Hex SHA-256 of a score as it is written, but for the name of its file of sums, which may change."""
    said = {key: value for key, value in score.items() if key not in ("score_sha256", "groups")}
    return hashlib.sha256(to_json(said | {"sums": score["groups"]["sha256"]}).encode()).hexdigest()


def groups(folder: Path, score: Score) -> Path | None:
    """The file with a score's sums by document; None if it is missing or has other bytes than the score says."""
    named = score.get("groups")
    if not isinstance(named, dict) or not isinstance(named.get("file"), str) or "/" in named["file"]:
        return None
    path = folder / named["file"]
    return path if path.is_file() and files.sha256(path) == named.get("sha256") else None


def keep(folder: Path, score: Score, sums: bytes, *, own: bool, report: Report) -> None:
    """Write a score, and its sums by document as `sums`, an .npz file; adds "groups" to the score.

    own: whether it is of the folder's run.pt on the shards that it was trained on. The own score that it takes the
    place of joins the others, unless that is of a checkpoint that has been replaced.

    Raises OSError if a file can't be written.
    """
    try:
        content = _content(folder)
    except CheckFailed as error:
        report(Note(text=f"{error.message}; it was moved to {move_away(folder / NAME)}"))
        content = _content(folder)
    splits, name = content["splits"], score["split"]
    others = [other for other in content["others"] if differences(other.get("inputs"), score["inputs"])]
    before = splits.get(name)
    checkpoint = score["inputs"]["checkpoint_sha256"]
    if (
        own
        and before
        and before.get("checkpoint_sha256") == checkpoint
        and differences(before.get("inputs"), score["inputs"])
    ):
        others.append(_renamed(folder, before))
    file = f"eval-{name}.npz" if own else _own_name(score)
    score["groups"] = {"file": file, "sha256": hashlib.sha256(sums).hexdigest()}
    score["score_sha256"] = _digest(score)
    if own:
        splits[name] = score
    else:
        others.append(score)
    files.write(folder / file, sums)
    content |= {"schema_version": SCHEMA_VERSION, "others": others}
    files.write(folder / NAME, to_json(content, indent=1) + "\n")


def _content(folder: Path) -> dict[str, Any]:
    """The content of eval.json, empty if there is none. Raises CheckFailed if it is damaged."""
    path = folder / NAME
    content: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "splits": {}, "others": []} | (read(path) or {})
    splits, others = content["splits"], content["others"]
    whole = isinstance(splits, dict) and isinstance(others, list)
    if not whole or not all(isinstance(score, dict) for score in (*splits.values(), *others)):
        raise CheckFailed(f"{path} is damaged: it holds no scores")
    return content


def _own_name(score: Score) -> str:
    """A name for the file of sums that no other score has."""
    digest = hashlib.sha256(json.dumps(score.get("inputs"), sort_keys=True).encode()).hexdigest()
    return f"eval-{score['split']}-{digest[:12]}.npz"


def _renamed(folder: Path, score: Score) -> Score:
    """A score with its file of sums under a name that no other score has."""
    path = groups(folder, score)
    if path is None:
        return score
    path.rename(folder / _own_name(score))
    return score | {"groups": score["groups"] | {"file": _own_name(score)}}
