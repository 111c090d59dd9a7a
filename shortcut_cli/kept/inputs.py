"""Whether something that was kept may be used again: only if it was made from exactly what it would be made from now.

Beside every kept result lies a table of all that it depends on: the checksum of shards, the hash of a checkpoint, the
keys of a recipe. `differences` compares that table with today's wherever a result is used again.
"""

import itertools
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shortcut_cli.config import writing
from shortcut_cli.errors import CheckFailed

MOST_BYTES = 64_000_000  # of a .json file: far more than any that is kept
DEEPEST = 32  # nesting in one
SHA256 = re.compile(r"'([0-9a-f]{12})[0-9a-f]{52}'")


def differences(made_from: Any, wanted: Mapping[str, Any]) -> list[str]:
    """How what a kept result was made from differs from `wanted`, a line each; none: the result may be used again.

    made_from: the table beside the result; anything that is no table means that it is not known. Hashes are shown by
    their first 12 digits.
    """
    if made_from == wanted:
        return []
    if not isinstance(made_from, Mapping):
        return ["what it was made from is not known"]
    lines = [SHA256.sub(r"\1", line) for line in writing.differences(made_from, wanted)]
    return lines or ["it does not name everything that it was made from"]  # a missing key is not None


def read(path: Path) -> dict[str, Any] | None:
    """The content of a .json file that holds a table; None if there is no such file.

    Raises CheckFailed if it can't be read or holds something else: whatever lies there, this ends soon.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
            raise CheckFailed(f"{path} can't be read: it is no regular file")
        if found.st_size > MOST_BYTES:
            raise CheckFailed(f"{path} can't be read: it has {found.st_size:,} bytes, more than any that is kept")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckFailed(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckFailed(f"{path} is damaged: {error}", "move it away, then run the same command again") from error
    if not isinstance(content, dict):
        raise CheckFailed(f"{path} is damaged: it holds no table", "move it away, then run the same command again")
    if not _is_flat(content):
        raise CheckFailed(f"{path} is damaged: its tables are nested too deeply", "move it away")
    return content


def _is_flat(content: Any) -> bool:
    """Whether a value from JSON is nested no deeper than DEEPEST."""
    level = [content]
    for _ in range(DEEPEST):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [item for one in inner for item in one if isinstance(item, dict | list)]
    return not level


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a number; an integer of more than 64 bits, which no float may hold, is none."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def is_finite(value: Any) -> bool:
    """Whether a value from JSON is a number, and not NaN or infinite."""
    return is_number(value) and math.isfinite(value)


def move_away(path: Path) -> Path:
    """Rename a damaged file, so that a new one can take its place; returns where it is now."""
    free = (path.with_name(f"{path.stem}.damaged-{number}{path.suffix}") for number in itertools.count(1))
    place = next(place for place in free if not os.path.lexists(place))
    path.rename(place)
    return place
