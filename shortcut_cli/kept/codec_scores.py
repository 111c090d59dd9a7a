"""codec-eval.json: what `codec eval` found, beside the codec.pt that it is about, or with the reconstructions."""

import os
from pathlib import Path
from typing import Any

from shortcut_cli import files
from shortcut_cli.errors import CheckFailed
from shortcut_cli.formatting import to_json
from shortcut_cli.kept.inputs import is_finite, is_number, read

NAME = "codec-eval.json"
NUMBERS = ("kbps", "si_sdr_db", "log_mel", "stoi", "pesq")  # of each bandwidth, where they are defined
LONGEST = 1000  # characters of the name of the codec
MOST = 100  # bandwidths, and codebooks


def keep(folder: Path, result: dict[str, Any], codec_sha256: str | None) -> None:
    """Write a result of `codec eval`. codec_sha256: of the codec.pt; None: of a codec that is known by its name.

    Raises CheckFailed if another file has that name, OSError if it can't be written.
    """
    path = folder / NAME
    found = read(path)
    if found is not None and not _is_whole(found):
        raise CheckFailed(f"{path} is no result of `codec eval`", "move it away")
    files.write(path, to_json(result | {"codec_sha256": codec_sha256}, indent=1) + "\n")


def find(folder: Path, codec_sha256: str | None) -> dict[str, Any] | None:
    """The result in a folder; None if there is none, or if it is of another codec. codec_sha256: None: of any.

    Raises CheckFailed if it is damaged.
    """
    found = read(folder / NAME)
    if found is None:
        return None
    if not _is_whole(found):
        raise CheckFailed(f"{folder / NAME} is damaged: it is no result of `codec eval`", "run it again")
    return found if codec_sha256 in (None, found["codec_sha256"]) else None


def _is_whole(found: dict[str, Any]) -> bool:
    """Whether something has what is shown of a result, each of the right type."""
    rows, perplexity = found.get("bandwidths"), found.get("perplexity")
    sha256 = found.get("codec_sha256", 0)
    return (
        isinstance(found.get("weights"), str)
        and len(found["weights"]) <= LONGEST
        and (sha256 is None or isinstance(sha256, str))
        and all(isinstance(found.get(key), int) and is_number(found[key]) for key in ("files", "threads"))
        and all(is_finite(found.get(key)) for key in ("seconds", "encode_x_realtime", "decode_x_realtime"))
        and isinstance(found.get("rejects"), list)
        and isinstance(rows, list)
        and len(rows) <= MOST
        and all(map(_is_row, [*rows, found.get("opus")]))
        and isinstance(perplexity, list)
        and len(perplexity) <= MOST
        and all(map(is_finite, perplexity))
        and isinstance(found.get("sounds", []), list)  # earlier versions did not name them
        and all(map(_is_sound, found.get("sounds", [])))
    )


def _is_sound(entry: Any) -> bool:
    """Whether a value is a file that was measured and its reconstructions, which are names of files beside it."""
    if not isinstance(entry, dict):
        return False
    made = entry.get("reconstructions")
    return (
        all(isinstance(entry.get(key), str) for key in ("path", "original", "sha256"))
        and is_finite(entry.get("seconds"))
        and isinstance(made, dict)
        and len(made) <= MOST
        and all(isinstance(name, str) and name == os.path.basename(name) for name in made.values())
    )


def _is_row(row: Any) -> bool:
    """Whether a value is a row of scores: kbit/s, and numbers, each or None if it is undefined."""
    return (
        isinstance(row, dict)
        and is_finite(row.get("kbps"))
        and all(row.get(key) is None or is_finite(row[key]) for key in NUMBERS)
    )
