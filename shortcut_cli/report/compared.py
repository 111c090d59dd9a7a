"""The content of a compare.json, whatever version of `shortcut compare` wrote it.

Keys that a version did not have are None, NaN or empty here; so is whatever has a type that it should not have, since
a page can be asked for of any file. `problems` names the latter.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortcut_cli.errors import CheckFailed
from shortcut_cli.kept.inputs import is_number, read

NAME = "compare.json"
LADDER = "ladder"
LONGEST = 80  # characters of a name
NEGATIVE = re.compile(r"(?<![\w.\-])-(?=\d)")  # the sign of a number, no hyphen in a name or an exponent
LONGEST_SENTENCE = 2000
MOST = 1000  # arms, contrasts, rates and sentences that are shown
GREATEST = 1e30  # number: more than the FLOPs of any training
MOST_POINTS = 200  # of a curve
Interval = tuple[float, float]


@dataclass(frozen=True)
class Validation:
    """A point of a validation curve: nats per token, the mean over seeds and their range (NaN if not known)."""

    step: float
    loss: float
    lowest: float
    highest: float
    seconds: float


@dataclass(frozen=True)
class Arm:
    """An arm: its losses by seed, NaN where it diverged, and what else its row has."""

    number: int
    label: str
    role: str  # "plain", "asked", "matched", "rung" or "twin"
    seeds: list[str]
    nats: list[float]
    bits: list[float]
    interval: Interval | None  # of the mean of `nats`
    diverged: dict[str, str]  # how, by seed
    curve: list[Validation]
    folders: list[str]
    facts: Mapping[str, float]  # other numbers of the row

    @property
    def mean(self) -> float:
        """The mean over seeds; NaN if one diverged."""
        return mean(self.nats)

    @property
    def mean_bits(self) -> float:
        """The same in bits per unit."""
        return mean(self.bits)


@dataclass(frozen=True)
class Contrast:
    """An arm against something else: differences in nats per token, negative if the arm is better."""

    arm: str
    other: str
    verdict: str
    unavailable: str  # why there is no difference
    mean: float
    interval: Interval | None
    documents: Interval | None
    differences: list[float]  # by seed
    facts: Mapping[str, float]  # seeds, wins, p, p_holm, level, detectable, p_equal
    gain: float
    gain_interval: tuple[float, float] | None  # NaN: an end beyond the ladder
    no_gain: str  # why there is no gain


@dataclass(frozen=True)
class Rung:
    """A baseline of the ladder: its cost, and the loss that its arm has."""

    label: str
    cost: float


@dataclass(frozen=True)
class Ladder:
    """The line through the baselines, a parabola in log cost or straight, and its 95 % band."""

    what: str  # the cost, with its unit
    rungs: list[Rung]
    intercept: float
    slope: float
    curvature: float
    band: list[tuple[float, float, float]]  # (cost, low, high)
    scattered: bool

    def loss(self, cost: float) -> float:
        """What the line has at a cost, in nats per token."""
        place = math.log(cost)
        return self.intercept + self.slope * place + self.curvature * place**2

    def doubling(self, cost: float) -> float:
        """By how much the line falls from a cost to twice as much, as its slope there says."""
        return (self.slope + 2 * self.curvature * math.log(cost)) * math.log(2)


@dataclass(frozen=True)
class Pilots:
    """How the loss of an arm's pilots depends on the learning rate."""

    label: str
    steps: float
    seeds: list[str]
    losses: dict[float, list[float]]  # by rate, ascending; NaN where a pilot diverged
    chosen: float
    at_edge: bool


@dataclass(frozen=True)
class Floor:
    """What a simple predictor reaches."""

    name: str
    nats: float
    bits: float


class Compared:
    """A comparison that lies in a folder.

    Raises CheckFailed if there is none, or compare.json holds something else.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / NAME
        content = read(path)
        if content is None:
            raise CheckFailed(f"{folder} holds no finished comparison: it has no {NAME}", "run `shortcut compare`")
        rows = content.get("arms")
        if not isinstance(rows, list) or not any(isinstance(row, dict) for row in rows):
            raise CheckFailed(f"{path} is not the result of a comparison: it lists no arms")
        self.content = content
        self.recipe = _table(content.get("recipe"))
        self.domain = text(_table(self.recipe.get("tokenizer")).get("name"))
        self.arms = [_arm(number, row) for number, row in enumerate(_tables(rows))]
        self.unit = next((text(row["unit"]) for row in _tables(rows) if isinstance(row.get("unit"), str)), "unit")
        self.factor = _factor(self.arms)
        self.contrasts = [_contrast(entry) for entry in _tables(content.get("contrasts"))]
        aa = content.get("aa")
        self.aa = _contrast(aa) if isinstance(aa, dict) else None
        self.floors = _floors(content)
        self.ladder = _ladder(content.get("ladder"))
        self.pilots = [_pilots(label, one) for label, one in _table(content.get("pilots")).items()][:MOST]
        self.notices = [sentence(one) for one in _list(content.get("notices"))]
        self.gate = _table(content.get("gate"))
        self.control = _table(content.get("control"))
        self.looks = _table(content.get("looks"))
        self.problems = [*itertools.islice(_wrong(content, SHAPE, ""), MOST)]

    def arm(self, label: str) -> Arm | None:
        """The arm of a label."""
        return next((arm for arm in self.arms if arm.label == label), None)

    def cost(self, arm: Arm) -> float:
        """What an arm costs on the axis of the ladder; NaN if it was not measured."""
        if self.content.get("match") == "time":
            speed = arm.facts.get("tokens_per_s", math.nan)
            return 1 / speed if speed > 0 else math.nan
        return arm.facts.get("parameters" if self.content.get("match") == "params" else FLOPS, math.nan)

    def fact(self, *keys: str) -> float:
        """A number by the keys that lead to it; NaN if there is none."""
        found: Any = self.content
        for key in keys:
            found = _table(found).get(key)
        return number(found)


FLOPS = "training_flops_per_token"
COSTS = ("lr", "layers", "width", "ffn", "parameters", FLOPS, "tokens_per_s", "peak_mb", "cache_bytes_per_token")
NUMBERS = (
    *("mean", "wins", "p", "p_holm", "level", "detectable", "p_equal", "gain", "nats_per_token", "bits_per_unit"),
    *("step", "validation", "validation_lowest", "validation_highest", "seconds", "cost", "low", "high", "steps"),
    *(
        "intercept",
        "slope",
        "curvature",
        "chosen",
        "baseline",
        "floor_nats_per_token",
        "clear_by",
        "planned",
        "trained_tokens",
    ),
)
# What each part of a compare.json is if it is there and not null: a table by its keys ("" any), a list by its entry.
ENTRY: dict[str, Any] = dict.fromkeys(NUMBERS, float)
CONTRAST: dict[str, Any] = ENTRY | {
    **dict.fromkeys(("arm", "baseline", "verdict", "unavailable"), str),
    **{key: [float] for key in ("interval_95", "documents_interval_95", "differences")},
    "gain": {"gain": float, "interval_95": [float], "reason": str},
}
CONTRAST["baseline"] = str
SHAPE: dict[str, Any] = {
    "recipe": {},
    "match": str,
    "split": str,
    "shards": str,
    **dict.fromkeys(("margin_nats", "tokens_per_step", "epochs"), float),
    "arms": [
        dict.fromkeys(COSTS, float)
        | {
            **dict.fromkeys(("label", "role", "unit"), str),
            **{key: [float] for key in ("nats_per_token", "bits_per_unit", "nats_per_token_interval_95")},
            "curve": [ENTRY],
            "diverged": {"": str},
            "folders": [str],
            "seeds": [],
        }
    ],
    "contrasts": [CONTRAST],
    "aa": CONTRAST,
    "floors": {"trained_tokens": float, "scores": {"": ENTRY}},
    "ladder": ENTRY | {"cost": str, "rungs": [str], "costs": [float], "band": [ENTRY]},
    "pilots": {"": ENTRY | {"seeds": [], "validation": {"": [float]}}},
    "gate": ENTRY | {"floor": str},
    "control": ENTRY | {"arm": str},
    "looks": ENTRY | {"seeds": [float], "family": [str]},
    "notices": [str],
}
NAMES = {dict: "table", list: "list", str: "text", float: f"number up to {GREATEST:g}"}


def _wrong(value: Any, shape: Any, at: str) -> Iterator[str]:
    """The parts of a value that have not the type they should have, and so are not shown, with the reason."""
    kind = shape if isinstance(shape, type) else type(shape)
    fits = is_number(value) and not abs(value) > GREATEST if kind is float else isinstance(value, kind)
    if value is None:
        return
    if not fits:
        yield f"{at} is no {NAMES[kind]}"
    elif isinstance(value, list) and shape:
        for place, one in enumerate(value[:MOST]):
            yield from _wrong(one, shape[0], f"{at}.{place}")
        if len(value) > MOST:
            yield f"{at} has {len(value):,} entries, of which {MOST:,} are read"
    elif isinstance(value, dict) and isinstance(shape, dict):
        for key, one in value.items():
            if (inner := shape.get(key, shape.get(""))) is not None:
                yield from _wrong(one, inner, f"{at}.{text(key)}" if at else text(key))


def number(value: Any) -> float:
    """A number; NaN if it is none, as null is, which JSON has for what is not finite, or is beyond any measure."""
    return float(value) if is_number(value) and abs(value) <= GREATEST else math.nan


def mean(values: Iterable[float]) -> float:
    """NaN without values, or if one of them is."""
    known = list(values)
    return math.fsum(known) / len(known) if known and all(map(math.isfinite, known)) else math.nan


def text(value: Any, longest: int = LONGEST) -> str:
    """Some characters of a text; half of a surrogate pair, which no file can hold, as "?"."""
    words = str(value if isinstance(value, (str, int, float)) else "").encode("utf-8", "replace").decode()
    return words if len(words) <= longest else f"{words[: longest - 3]}..."


def sentence(value: Any) -> str:
    """A verdict or a notice, with the minus of all numbers on a page; in JSON and on a terminal it is a hyphen."""
    return NEGATIVE.sub("\N{MINUS SIGN}", text(value, LONGEST_SENTENCE))


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value[:MOST] if isinstance(value, list) else []


def _tables(value: Any) -> list[dict[str, Any]]:
    return [one for one in _list(value) if isinstance(one, dict)]


def _numbers(value: Any) -> list[float]:
    return [number(one) for one in _list(value)]


def _interval(value: Any) -> Interval | None:
    """Two numbers, or None."""
    ends = _numbers(value)
    return (ends[0], ends[1]) if len(ends) == 2 and all(map(math.isfinite, ends)) else None


def _facts(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the values of a table."""
    found = {key: number(value) for key, value in row.items()}
    return {key: value for key, value in found.items() if math.isfinite(value)}


def _arm(place: int, row: Mapping[str, Any]) -> Arm:
    label, asked = text(row.get("label")), row.get("asked") is True
    before = "plain" if label == "gpt" else "asked" if asked else "matched"  # there were no roles
    diverged = {text(seed): sentence(how) for seed, how in _table(row.get("diverged")).items()}
    return Arm(
        number=place,
        label=label,
        role=text(row.get("role", before)),
        seeds=[text(seed) for seed in _list(row.get("seeds"))],
        nats=_numbers(row.get("nats_per_token")),
        bits=_numbers(row.get("bits_per_unit")),
        interval=_interval(row.get("nats_per_token_interval_95")),
        diverged=dict(itertools.islice(diverged.items(), MOST)),
        curve=_curve(row.get("curve")),
        folders=[text(folder, LONGEST_SENTENCE) for folder in _list(row.get("folders"))],
        facts=_facts(row),
    )


def _curve(value: Any) -> list[Validation]:
    """At most MOST_POINTS of a curve, evenly, its last one among them."""
    rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    every = max(1, math.ceil(len(rows) / MOST_POINTS))
    keys = ("step", "validation", "validation_lowest", "validation_highest", "seconds")
    return [Validation(*(number(row.get(key)) for key in keys)) for row in rows[::-1][::every][::-1]]


def _factor(arms: Iterable[Arm]) -> float:
    """Bits per unit of one nat per token: the same for all arms, since all are scored on the same tokens."""
    pairs = (pair for arm in arms for pair in zip(arm.nats, arm.bits, strict=False))
    return next((bits / nats for nats, bits in pairs if nats > 0 and math.isfinite(bits)), math.nan)


def _contrast(entry: Mapping[str, Any]) -> Contrast:
    gain = _table(entry.get("gain"))
    ends = _numbers(gain.get("interval_95"))
    return Contrast(
        arm=text(entry.get("arm")),
        other=text(entry.get("baseline")),
        verdict=sentence(entry.get("verdict")),
        unavailable=sentence(entry.get("unavailable")),
        mean=number(entry.get("mean")),
        interval=_interval(entry.get("interval_95")),
        documents=_interval(entry.get("documents_interval_95")),
        differences=_numbers(entry.get("differences")),
        facts=_facts(entry),
        gain=number(gain.get("gain")),
        gain_interval=(ends[0], ends[1]) if len(ends) == 2 else None,
        no_gain=sentence(gain.get("reason")),
    )


def _floors(content: Mapping[str, Any]) -> list[Floor]:
    found = _table(_table(content.get("floors")).get("scores"))
    made = [
        Floor(text(name), number(one.get("nats_per_token")), number(one.get("bits_per_unit")))
        for name, one in itertools.islice(found.items(), MOST)
        if isinstance(one, dict)
    ]
    return sorted((floor for floor in made if math.isfinite(floor.nats)), key=lambda floor: floor.nats)


def _ladder(value: Any) -> Ladder | None:
    if not isinstance(value, dict):
        return None
    points = ([number(point.get(key)) for key in ("cost", "low", "high")] for point in _tables(value.get("band")))
    return Ladder(
        what=text(value.get("cost")),
        rungs=[
            Rung(text(label), cost)
            for label, cost in zip(_list(value.get("rungs")), _numbers(value.get("costs")), strict=False)
        ],
        intercept=number(value.get("intercept")),
        slope=number(value.get("slope")),
        curvature=number(value.get("curvature", 0.0)),  # comparisons of before had straight lines
        band=[
            (cost, low, high) for cost, low, high in points if cost > 0 and all(map(math.isfinite, (cost, low, high)))
        ],
        scattered=value.get("scattered") is True,
    )


def _pilots(label: str, value: Any) -> Pilots:
    one = _table(value)
    losses = {}
    for rate, found in itertools.islice(_table(one.get("validation")).items(), MOST):
        try:
            losses[float(rate)] = _numbers(found)
        except ValueError:
            continue
    known = sorted(rate for rate in losses if math.isfinite(rate) and rate > 0)
    return Pilots(
        label=text(label),
        steps=number(one.get("steps")),
        seeds=[text(seed) for seed in _list(one.get("seeds"))],
        losses={rate: losses[rate] for rate in known},
        chosen=number(one.get("chosen")),
        at_edge=one.get("at_edge") is True,
    )
