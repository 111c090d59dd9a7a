"""Each arm that was asked for against the better of its baselines."""

import io
import math
import statistics
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shortcut_cli.compare import significance
from shortcut_cli.compare.arms import Arm
from shortcut_cli.errors import CheckFailed
from shortcut_cli.kept import scores

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]  # the results of an arm, from `Runner.row`


def contrast_arms(arms: Mapping[str, Arm], rows: Mapping[str, Row], margin: float) -> list[dict[str, Any]]:
    """The contrast of each arm that has baselines with the one of them that has the lowest mean validation loss.

    rows: the results of all arms, by label. margin: of equivalence, in nats per token. p-values are Holm-adjusted over
    all contrasts.
    """
    pairs = [(label, _better(arm.baselines, rows)) for label, arm in arms.items() if arm.baselines]
    found = [
        significance.contrast(_differences(rows[arm], rows[baseline], "nats_per_token"), margin)
        for arm, baseline in pairs
    ]
    return [
        {
            "arm": arm,
            "baseline": baseline,
            "baselines": arms[arm].baselines,
            **contrast.content(),
            **_more(rows[arm], rows[baseline]),
            "verdict": significance.verdict(arm, baseline, contrast, margin),
        }
        for (arm, baseline), contrast in zip(pairs, significance.adjusted(found), strict=True)
    ]


def _better(baselines: list[str], rows: Mapping[str, Row]) -> str:
    return min(baselines, key=lambda label: statistics.mean(rows[label]["validation"]))


def _differences(row: Row, other: Row, key: str) -> list[float]:
    """Arm minus baseline, by seed."""
    differences: list[float] = np.subtract(row[key], other[key]).tolist()
    return differences


def _sums(*rows: Row) -> list[list[dict[str, Any]]]:
    """The sums by document of each seed, for each row. Raises CheckFailed if they are not of the same documents."""
    found = [[sums(Path(path)) for path in row["groups"]] for row in rows]
    tokens = found[0][0]["tokens"]
    for row, parts in zip(rows, found, strict=True):
        for path, part in zip(row["groups"], parts, strict=True):
            if not np.array_equal(part["tokens"], tokens):
                raise CheckFailed(
                    f"{path} is of other documents than {rows[0]['groups'][0]}",
                    "move the eval.json beside it away, then run the same command again",
                )
    return found


def _more(row: Row, other: Row) -> dict[str, Any]:
    """The differences by seed, in bits per unit, and over documents."""
    counted = None not in (*row["bits_per_unit"], *other["bits_per_unit"])  # or the split has none of the unit
    bits = significance.contrast(_differences(row, other, "bits_per_unit"), math.inf) if counted else None
    found = _sums(row, other)  # by document, for each seed
    ours, theirs = (np.mean([part["nats"] for part in parts], 0) for parts in found)
    return {
        "differences": _differences(row, other, "nats_per_token"),
        "bits_per_unit": bits and bits.mean,
        "bits_per_unit_interval_95": bits and bits.interval_95,
        "documents_interval_95": significance.over_documents(ours, theirs, found[0][0]["tokens"]),
    }


def sums(path: Path) -> dict[str, Floats]:
    """What is in a file that `scores.groups` has found: "nats" and "tokens" of each document (or block), both (n,).

    Raises CheckFailed if it holds anything else: the score that names it may be of someone else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")
            found = {name: _array(archive.read(f"{name}.npy")) for name in ("nats", "tokens")}
        if len(found["nats"]) != len(found["tokens"]) or not (found["tokens"] > 0).all():
            raise ValueError("it has documents without tokens")
    except (ValueError, KeyError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
        raise CheckFailed(
            f"{path} does not hold the sums of a score: {str(error)[: scores.LONGEST]}",
            f"move {path.with_name(scores.NAME)} away, then run the same command again",
        ) from error
    return found


def _array(content: bytes) -> Floats:
    """The numbers of an .npy file, (n,). Raises ValueError if it does not hold exactly these."""
    stream = io.BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("its arrays are not as they are written here")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    rest = content[stream.tell() :]
    if dtype != np.float64 or len(shape) != 1 or shape[0] * dtype.itemsize != len(rest):
        raise ValueError("its arrays are not as they are written here")
    return np.frombuffer(rest, np.float64)
