"""Floors that are kept, in the scores of eval.json and in comparison.json, each with what it was made from.

They depend on the shards alone, so they are computed once for all checkpoints in a folder.
"""

import hashlib
from typing import Any

from shortcut_cli import SCHEMA_VERSION
from shortcut_cli.formatting import to_json
from shortcut_cli.kept.inputs import differences, is_finite, is_number


def made_from(trained: str, shards: str, split: str, order: int, most_tokens: int) -> dict[str, Any]:
    """Everything that floors depend on.

    trained, shards: checksums of the shards that they learn from and of those that are scored. most_tokens: that they
    learn from. `schema_version` stands for what the tool means by a floor.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "trained": trained,
        "shards": shards,
        "split": split,
        "order": order,
        "most_tokens": most_tokens,
    }


def sealed(inputs: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Floors with what they were made from, and with their SHA-256, so that those that were edited are made again."""
    floors = {"inputs": inputs, **measured}
    return floors | {"sha256": _digest(floors)}


def is_usable(floors: Any, inputs: dict[str, Any]) -> bool:
    """Whether something that was kept are floors, as they were sealed, that were made from exactly `inputs`.

    The checksum is no signature, so that they are floors is looked at too.
    """
    return (
        is_whole(floors)
        and not differences(floors.get("inputs"), inputs)
        and floors.get("sha256") == _digest({key: value for key, value in floors.items() if key != "sha256"})
    )


def is_whole(floors: Any) -> bool:
    """Whether something has what is shown of floors."""
    scores = floors.get("scores") if isinstance(floors, dict) else None
    return (
        isinstance(scores, dict)
        and isinstance(floors.get("trained_tokens"), int)
        and is_number(floors["trained_tokens"])
        and all(isinstance(score, dict) and is_finite(score.get("nats_per_token")) for score in scores.values())
        and all(score.get("bits_per_unit") is None or is_finite(score["bits_per_unit"]) for score in scores.values())
    )


def _digest(floors: dict[str, Any]) -> str:
    return hashlib.sha256(to_json(floors).encode()).hexdigest()
