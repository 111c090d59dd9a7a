"""The contrasts of a comparison, weighted sums of arms: an arm against the ladder, its baseline, or another arm."""

import io
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shortcut_cli.compare import ladder, significance
from shortcut_cli.compare.arms import CONTROL, Arm
from shortcut_cli.compare.asked import BASELINE, LEAST_RUNGS
from shortcut_cli.compare.ladder import Ladder
from shortcut_cli.compare.significance import Contrast, Noise
from shortcut_cli.errors import CheckFailed
from shortcut_cli.formatting import counted
from shortcut_cli.kept import scores
from shortcut_cli.registry import Match

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]  # the results of an arm, from `Runner.row`
CLEAR = 0.1  # nats per token that the plain baseline has to be below every floor
LADDER = "ladder"
COSTS = {"flops": "training FLOPs per token", "params": "non-embedding parameters", "time": "seconds per token"}


@dataclass(frozen=True)
class Named:
    """A contrast that was named before: an arm and what it is compared with, a label or "ladder"."""

    arm: str
    other: str
    matched: bool = False  # whether the other is whichever baseline of the arm was chosen on pilots

    @property
    def basic(self) -> bool:
        """Whether it is of an arm with its baselines, not with another arm."""
        return self.matched or self.other == LADDER

    @property
    def name(self) -> str:
        """How comparison.json calls it: by what was asked, not by which baseline was chosen."""
        if self.basic:
            return f"{self.arm}:{'matched' if self.matched else LADDER}"
        return ":".join(sorted((self.arm, self.other)))


class Judge:
    """Tests contrasts of the arms' losses, all with the same estimate of chance.

    rows: the results of all arms by label; those with a run that diverged take no part. axis: what the ladder is laid
    over, None without a ladder. margin: of equivalence, in nats per token.
    """

    def __init__(self, arms: Mapping[str, Arm], rows: Mapping[str, Row], axis: Match | None, margin: float) -> None:
        self.arms, self.rows, self.margin, self.axis = arms, rows, margin, axis
        self.whole = [label for label, row in rows.items() if not row["diverged"]]
        self.seeds = len(next(iter(rows.values()))["seeds"])
        losses = [rows[label]["nats_per_token"] for label in self.whole]
        self.losses = np.array(losses, np.float64).reshape(len(losses), self.seeds)  # (0, S) if all diverged
        self.residual = significance.residual(self.losses) if len(self.whole) > 1 else None
        self.rungs: list[str] = []
        self.ladder: Ladder | None = None
        self.scattered = False  # whether the rungs scatter more about the line than seeds explain
        if axis:
            self.rungs, self.ladder = self._fitted([label for label in self.whole if arms[label].role != "asked"])
            if self.ladder:
                self.scattered = ladder.noise(self.ladder.scatter, self.residual, self.seeds)[1]

    def _fitted(self, rungs: list[str]) -> tuple[list[str], Ladder | None]:
        """The rungs whose cost is known, and their ladder, if they are enough."""
        rungs = [label for label in rungs if self._cost(label) is not None]
        costs = [self._cost(label) or 0.0 for label in rungs]
        if len(rungs) < LEAST_RUNGS:
            return rungs, None
        return rungs, ladder.fit(costs, self.losses[[self.whole.index(label) for label in rungs]], self.residual)

    def _cost(self, label: str) -> float | None:
        """The cost of an arm on the axis; None if it was not measured."""
        row = self.rows[label]
        if self.axis == "time":
            return 1 / row["tokens_per_s"] if row["tokens_per_s"] else None
        found: float = row["parameters" if self.axis == "params" else "training_flops_per_token"]
        return found

    def described(self) -> dict[str, Any] | None:
        """The ladder, for compare.json; None without one."""
        if self.ladder is None:
            return None
        return {
            "rungs": self.rungs,
            "cost": COSTS[self.axis or "flops"],
            "costs": [self._cost(label) for label in self.rungs],
            **dict(zip(("intercept", "slope", "curvature"), self.ladder.coefficients, strict=True)),
            "scatter": math.sqrt(self.ladder.scatter.variance),
            "residual": self.residual and math.sqrt(self.residual.variance),
            "scattered": self.scattered,
            "band": ladder.band(self.ladder, ladder.noise(self.ladder.scatter, self.residual, self.seeds)[0]),
        }

    def uneven(self) -> list[str]:
        """A sentence for each arm whose runs scatter more than those of the others."""
        wide = "" if self.scattered else ", and those of the others too wide"  # whose intervals seeds have no part in
        return [
            f"{self.whole[one.arm]} scatters over seeds more than the other arms (standard deviation {one.own:.4f} "
            f"against {one.others:.4f}, p = {one.p:.2g}). All share one estimate of chance: its own intervals are too "
            f"narrow{wide}."
            for one in significance.uneven(self.losses)
        ]

    def weights(self, named: Named) -> Floats | str:
        """The weights of a contrast, one for each arm that is whole; or why there are none."""
        sides = [label for label in (named.arm, named.other) if label != LADDER]
        for label in sides:
            if label not in self.whole:
                return f"{label} diverged at seed {', '.join(self.rows[label]['diverged'])}"
        weights = np.zeros(len(self.whole))
        weights[self.whole.index(named.arm)] = 1
        if named.other != LADDER:
            weights[self.whole.index(named.other)] -= 1
            return weights
        rungs, fitted = self._without(named.arm)
        if fitted is None:
            return f"only {len(rungs)} rungs of the ladder have a loss and a cost"
        cost = self._cost(named.arm)
        if cost is None:
            return "its speed was not measured"
        assert self.axis
        if lacking := fitted.lacks(cost, COSTS[self.axis]):
            return lacking
        weights[[self.whole.index(label) for label in rungs]] -= fitted.at(cost)
        return weights

    def _without(self, arm: str) -> tuple[list[str], Ladder | None]:
        """The ladder without an arm that is one of its rungs: the twin, when it is tested itself."""
        if arm in self.rungs:
            return self._fitted([label for label in self.rungs if label != arm])
        return self.rungs, self.ladder

    def _noise(self, named: Named) -> Noise | None:
        """The variance of the mean of an arm, as a contrast is tested with it."""
        fitted = self._without(named.arm)[1] if named.other == LADDER else self.ladder
        if fitted is None:
            return self.residual and self.residual.over(self.seeds)
        return ladder.noise(fitted.scatter, self.residual, self.seeds)[0]

    def test(self, named: Named) -> tuple[Contrast | None, str]:
        """A contrast, not adjusted for others; or why there is none."""
        weights = self.weights(named)
        if isinstance(weights, str):
            return None, weights
        scale = float(weights @ weights)
        return significance.contrast(weights @ self.losses, scale, self._noise(named), self.margin), ""

    def content(self, named: Named, contrast: Contrast | None, reason: str) -> dict[str, Any]:
        """A contrast for compare.json, without a verdict."""
        found: dict[str, Any] = {
            "arm": named.arm,
            "baseline": named.other,
            "baselines": self.arms[named.arm].baselines if named.matched else [],
        }
        if contrast is None:
            return found | {"seeds": self.seeds, "unavailable": reason}
        weights = self.weights(named)
        assert not isinstance(weights, str)
        found |= contrast.content() | {"differences": (weights @ self.losses).tolist()} | self._bits(contrast)
        found["documents_interval_95"] = self._over_documents(weights)
        if named.other == LADDER:
            (_, fitted), cost, noise = self._without(named.arm), self._cost(named.arm), self._noise(named)
            assert fitted
            assert cost
            assert noise
            found["gain"] = ladder.gain(fitted, cost, contrast.mean, noise)
        return found

    def _bits(self, found: Contrast) -> dict[str, Any]:
        """A contrast in bits per unit: all arms are scored on the same tokens and units, so by one factor."""
        row = self.rows[self.whole[0]]
        if row["bits_per_unit"][0] is None:  # the split has none of the unit
            return {"bits_per_unit": None, "bits_per_unit_interval_95": None}
        factor = row["bits_per_unit"][0] / row["nats_per_token"][0]
        interval = found.interval_95 and tuple(factor * end for end in found.interval_95)
        return {"bits_per_unit": factor * found.mean, "bits_per_unit_interval_95": interval}

    def _over_documents(self, weights: Floats) -> tuple[float, float]:
        """The interval of a contrast over documents and seeds."""
        used = [(self.rows[label], weight) for label, weight in zip(self.whole, weights, strict=True) if weight]
        return significance.crossed(*by_document(used))


def by_document(weighted: Sequence[tuple[Row, float]]) -> tuple[Floats, Floats]:
    """The weighted sum of arms' nats at each seed in each document, (S, n), and the tokens of the documents, (n,).

    Raises CheckFailed if the arms were not scored on the same documents.
    """
    first = weighted[0][0]["groups"]
    tokens = sums(Path(first[0]))["tokens"]
    total = np.zeros((len(first), len(tokens)))
    for row, weight in weighted:
        for seed, path in enumerate(row["groups"]):
            part = sums(Path(path))
            if not np.array_equal(part["tokens"], tokens):
                raise CheckFailed(
                    f"{path} is of other documents than {first[0]}",
                    "move the eval.json beside it away, then run the same command again",
                )
            total[seed] += weight * part["nats"]
    return total, tokens


def judged(
    judge: Judge, named: Sequence[Named], family: int, spent: Callable[[float], float], shut: bool
) -> dict[str, Any]:
    """What a comparison found: "contrasts", each with a verdict, and "control", of the positive control.

    family: how many contrasts were ever named in this comparison; spent: see `significance.levels`; shut: whether the
    gate is, so that there is no verdict.
    """
    tests = [judge.test(one) for one in named]
    tested = iter(significance.adjusted([found for found, _ in tests if found], family, spent))
    contrasts = [found and next(tested) for found, _ in tests]
    entries = []
    for one, found, (_, reason) in zip(named, contrasts, tests, strict=True):
        verdict = _verdict(one, found, reason, judge.margin, shut)
        entries.append(judge.content(one, found, reason) | {"verdict": verdict})
    return {"contrasts": entries, "control": _control(named, contrasts, shut)}


def _verdict(one: Named, found: Contrast | None, reason: str, margin: float, shut: bool) -> str:
    other = "the ladder" if one.other == LADDER else one.other
    if found is None:
        return f"{one.arm} is not compared with {other}: {reason}."
    if shut:
        return f"No verdict on {one.arm} against {other} ({found.mean:+z.4f} nats per token)."
    return significance.verdict(one.arm, other, found, margin)


def _control(named: Sequence[Named], contrasts: Sequence[Contrast | None], shut: bool) -> dict[str, Any] | None:
    """Whether the positive control was found to help, and how large its effect had to be for that (mean, detectable).

    None if it is not among the arms.
    """
    own = [found for one, found in zip(named, contrasts, strict=True) if one.arm == CONTROL and one.basic]
    if not own:
        return None
    found = not shut and any(one is not None and one.differs and one.mean < 0 for one in own)
    first = own[0]
    return {
        "arm": CONTROL,
        "found": found,
        "mean": first and first.mean,
        "detectable": first and first.detectable,
    }


def unseen(mean: float | None, detectable: float | None) -> str:
    """What it means that the positive control was not found: how large an effect has to be for this comparison."""
    if mean is None or detectable is None:
        return "this comparison could not have seen anything"
    return (
        f"it differs by {mean:+z.4f} nats per token, and this comparison finds a difference of {detectable:.4f} with "
        "80 % power, smaller ones less often"
    )


def gate(rows: Mapping[str, Row], floors: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the plain baseline has learned enough for its architecture to matter: it is clearly below every floor."""
    known = {name: floor["nats_per_token"] for name, floor in floors["scores"].items()}
    lowest = min(known, key=lambda name: known[name])
    losses = rows[BASELINE]["nats_per_token"]
    mean = math.inf if None in losses else sum(losses) / len(losses)
    return {
        "open": mean <= known[lowest] - CLEAR,
        "baseline": mean,
        "floor": lowest,
        "floor_nats_per_token": known[lowest],
        "clear_by": CLEAR,
    }


def notices(result: Mapping[str, Any], uneven: Sequence[str]) -> list[str]:
    """What a reader has to know before the verdicts, a sentence each: no verdict first, if there is none.

    uneven: see `Judge.uneven`.
    """
    found = []
    entrance, control, aa = result["gate"], result["control"], result["aa"]
    if not entrance["open"]:
        reached = f"{entrance['baseline']:.4f}" if math.isfinite(entrance["baseline"]) else "diverged"
        found.append(
            f"No verdict: {BASELINE} ({reached}) is not {CLEAR} nats per token below the {entrance['floor']} "
            f"({entrance['floor_nats_per_token']:.4f}). Architectures of models that are no better than that are not "
            "told apart by it; train longer, or on more."
        )
    if control and not control["found"] and entrance["open"]:
        found.append(
            f"The positive control {control['arm']}, which is known to help, was not found: "
            f"{unseen(control['mean'], control['detectable'])}."
        )
    if "unavailable" in aa:
        found.append(f"A/A: not available, {aa['unavailable']}.")
    elif aa["interval_95"] is None:
        found.append(f"A/A: a second {BASELINE} differs by {aa['mean']:+z.4f} nats per token (one seed, no interval).")
    else:
        low, high = aa["interval_95"]
        fits = low <= 0 <= high
        found.append(
            f"A/A: a second {BASELINE} differs by {aa['mean']:+z.4f} nats per token, 95 % interval {low:+z.4f} to "
            f"{high:+z.4f}, which "
            + ("contains 0, as it should." if fits else "does not contain 0: chance, or a fault of the comparison.")
        )
    found += [
        f"{row['label']} diverged at seed {seed}: {how}"
        for row in result["arms"]
        for seed, how in row["diverged"].items()
    ]
    found += [
        f"A pilot of {label} diverged at the rate {rate}."
        for label, curve in result["pilots"].items()
        for rate, losses in curve["validation"].items()
        if any(loss is None or not math.isfinite(loss) for loss in losses)
    ]
    found += list(
        {
            f"The {result['split']} split has {counted(row['documents'], 'document')}, too few to "
            'be drawn from: what is called "over documents" is over blocks of them, and says nothing of others.'
            for row in result["arms"]
            if row["interval_over"] == "blocks"
        }
    )
    if result["ladder"] and result["ladder"]["scattered"]:
        found.append(
            "The rungs scatter more about the line than seeds explain: intervals are those of the rungs alone."
        )
    return [*found, *uneven]


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
