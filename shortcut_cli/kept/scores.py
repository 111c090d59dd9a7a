"""eval.json of a run folder: the scores of its checkpoints, side by side, each with what it was made from.

    {"schema_version": ..., "splits": {"test": SCORE, "val": SCORE}, "others": [SCORE, ...]}

"splits" has the newest score of run.pt on each split of the shards that it was trained on. "others" has the rest: on
other shards, with other keys of [eval], of other checkpoints. The sums by document of each score are in a file of its
own, eval-SPLIT.npz or eval-SPLIT-HASH.npz, which the score names with its SHA-256. "score_sha256" is that of the score
itself: one that was edited is made again. "floors" has what simple predictors reach on the same tokens.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from shortcut_cli import SCHEMA_VERSION, files
from shortcut_cli.config.schema import EvalConfig
from shortcut_cli.errors import CheckFailed
from shortcut_cli.events import Note, Report
from shortcut_cli.formatting import to_json
from shortcut_cli.kept import floors as kept_floors
from shortcut_cli.kept.inputs import differences, is_finite, is_number, move_away, read

NAME = "eval.json"
NUMBERS = ("nats_per_token", "unigram_entropy", "perplexity", "accuracy", "bits_per_unit")  # or None: not known
LISTED = ("nats_per_token", "interval_95", "perplexity", "accuracy", "bits_per_unit", "unit", "documents", "tokens")
LONGEST = 200  # characters of a text of a score that is shown
SUMS = re.compile(r"eval-(train|val|test|files)(-[0-9a-f]{12})?\.npz")  # what `keep` calls the sums of a score
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
    return next(
        (score["floors"] for score in _every(folder) if kept_floors.is_usable(score.get("floors"), inputs)), None
    )


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


def listed(folder: Path, checkpoint_sha256: str) -> dict[str, Score]:
    """As `of_checkpoint`; of each score what is listed beside other things that are known of a run."""
    found = of_checkpoint(folder, checkpoint_sha256)
    return {split: {key: score.get(key) for key in LISTED} for split, score in found.items()}


def left_out(folder: Path, checkpoint_sha256: str) -> list[str]:
    """Which scores of a run folder `of_checkpoint` and `others` leave out, with the reason, a sentence each.

    Those of a checkpoint that was replaced count only if they were the newest of their split. Raises CheckFailed if
    eval.json is damaged.
    """
    content = _content(folder)
    shown = [*of_checkpoint(folder, checkpoint_sha256).values(), *others(folder, checkpoint_sha256)]
    found = []
    for name, score in [*content["splits"].items(), *(("other data", score) for score in content["others"])]:
        of_another = score.get("checkpoint_sha256") != checkpoint_sha256
        if score in shown or (of_another and name == "other data"):
            continue
        why = (
            "it is of another checkpoint"
            if of_another
            else "it lacks a part, or one has the wrong type"
            if not _is_whole(score) or (name != "other data" and score.get("split") != name)
            else "its sums by document are gone, or have changed"
            if not groups(folder, score)
            else "it was edited"
        )
        found.append(
            f"{folder / NAME} has a score on {name[:LONGEST]} that is not shown: {why}; `shortcut eval` makes it again."
        )
    return found


def others(folder: Path, checkpoint_sha256: str) -> list[Score]:
    """The scores of a checkpoint on anything but the splits of its own shards, as they were kept.

    Raises CheckFailed if eval.json is damaged.
    """
    return [
        score
        for score in _content(folder)["others"]
        if score.get("checkpoint_sha256") == checkpoint_sha256
        and _is_whole(score)
        and groups(folder, score)
        and _is_unaltered(score)
    ]


def _is_whole(score: Score) -> bool:
    """Whether a score has what is shown of it, or computed with it, each of the right type.

    Its checksum does not say so: it is no signature.
    """
    texts, counts = ("split", "unit", "interval_over"), ("documents", "tokens")
    numbers = [*NUMBERS, *(("bits_per_character", "word_perplexity") if "words" in score else ())]
    intervals = ("interval_95", "bits_per_unit_interval_95")
    return (
        score.keys() >= {*texts, *counts, *numbers, *intervals}
        and all(isinstance(score[key], str) and len(score[key]) <= LONGEST for key in texts)
        and all(isinstance(score[key], int) and is_number(score[key]) and score[key] >= 0 for key in counts)
        and all(score[key] is None or is_finite(score[key]) for key in numbers)
        and all(_is_interval(score[key]) for key in intervals)
        and isinstance(score.get("rejects", []), list)
        and kept_floors.is_whole(score.get("floors", {"trained_tokens": 0, "scores": {}}))
        and _are_depth_weights(score.get("depth_weights", {"sources": [], "by_head": [[]]}))
    )


def _is_interval(found: Any) -> bool:
    """Whether a value is an interval, of which an end that is not finite is None, or None since it is not known."""
    ends = isinstance(found, list) and len(found) == 2 and all(end is None or is_finite(end) for end in found)
    return found is None or ends


def _are_depth_weights(found: Any) -> bool:
    """Whether a value has a name for each source, and for each head a number for each source."""
    if not isinstance(found, dict) or not isinstance(found.get("sources"), list):
        return False
    sources, heads = found["sources"], found.get("by_head")
    return (
        all(isinstance(name, str) and len(name) <= LONGEST for name in sources)
        and isinstance(heads, list)
        and len(heads) > 0
        and all(isinstance(head, list) and len(head) == len(sources) for head in heads)
        and all(is_finite(share) for head in heads for share in head)
    )


def _is_unaltered(score: Score) -> bool:
    """Whether a score says what it said when it was kept."""
    return score.get("score_sha256") == _digest(score)


def _digest(score: Score) -> str:
    """Hex SHA-256 of a score as it is written, but for the name of its file of sums, which may change."""
    said = {key: value for key, value in score.items() if key not in ("score_sha256", "groups")}
    return hashlib.sha256(to_json(said | {"sums": score["groups"]["sha256"]}).encode()).hexdigest()


def groups(folder: Path, score: Score) -> Path | None:
    """The file with a score's sums by document; None if it is missing, or not the one that the score says.

    Its name is one that `keep` gives: what a score of someone else names may be any file in the folder.
    """
    named = score.get("groups")
    if not isinstance(named, dict) or not isinstance(named.get("file"), str) or not SUMS.fullmatch(named["file"]):
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
        others.append(_renamed(folder, name, before))
    file = f"eval-{name}.npz" if own else _own_name(name, score)
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
    found = read(path)
    content: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "splits": {}, "others": []} | (found or {})
    splits, others = content["splits"], content["others"]
    whole = (found is None or "splits" in found) and isinstance(splits, dict) and isinstance(others, list)
    if not whole or not all(isinstance(score, dict) for score in (*splits.values(), *others)):
        raise CheckFailed(f"{path} is damaged: it holds no scores")
    return content


def _own_name(split: str, score: Score) -> str:
    """A name for the file of sums that no other score has."""
    digest = hashlib.sha256(json.dumps(score.get("inputs"), sort_keys=True).encode()).hexdigest()
    return f"eval-{split}-{digest[:12]}.npz"


def _renamed(folder: Path, split: str, score: Score) -> Score:
    """A score of a split with its file of sums under a name that no other score has."""
    path = groups(folder, score)
    if path is None:
        return score
    file = _own_name(split, score)
    path.rename(folder / file)
    return score | {"groups": score["groups"] | {"file": file}}
