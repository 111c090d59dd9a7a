"""The page of a comparison: its verdicts first, then what they are made from."""

import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from markupsafe import Markup

from shortcut_cli.config import writing
from shortcut_cli.formatting import ESCAPES
from shortcut_cli.report import page, samples
from shortcut_cli.report.chart import Line, Mark, Rule, Style, chart, legend, style
from shortcut_cli.report.compared import FLOPS, LADDER, NAME, Arm, Compared, Contrast, Floor, Pilots, mean, number, text
from shortcut_cli.report.forest import Row, forest
from shortcut_cli.report.page import Section, template
from shortcut_cli.report.svg import Axis, around

ROLES = {
    "plain": "the plain baseline",
    "asked": "",
    "matched": "matched baseline",
    "rung": "rung of the ladder",
    "twin": "A/A twin of gpt",
}
MATCHED = {
    "none": "baselines not matched",
    "params": "baselines matched by non-embedding parameters",
    "flops": "baselines matched by training FLOPs",
    "time": "baselines matched by time per step",
}
TITLED = 5  # arms that are named in the title
NEAR = 1.0  # how many times the width of the losses a floor may be away to be drawn
MOST_SAMPLES = 8  # of the page, of all arms together
UNKNOWN = "\u2013"
MINUS = "\u2212"
COPIED = {code: f"\\u{code:04x}" for code in ESCAPES}


def page_of(folder: Path) -> str:
    """The whole page of the comparison in a folder. Raises CheckFailed as `sections` does."""
    return page.render(_title(Compared(folder)), sections(folder))


def _title(found: Compared) -> str:
    """What a comparison is of, in a line."""
    asked = [arm.label for arm in found.arms if arm.role in ("plain", "asked")]
    more = f" and {len(asked) - TITLED:,} more" if len(asked) > TITLED else ""
    return f"Comparison on {found.domain or 'shards'}: {', '.join(asked[:TITLED])}{more}"


def sections(folder: Path) -> list[Section]:
    """The sections of the comparison in a folder.

    Raises CheckFailed if it holds none, or compare.json is damaged.
    """
    found = Compared(folder)
    key = hashlib.sha256((folder / NAME).read_bytes()).hexdigest()[:8]  # tells two comparisons in one page apart
    made: list[tuple[str, str, Markup | None]] = [
        ("verdict", "Verdict", _verdict(found)),
        ("losses", "Losses of the arms", _losses(found)),
        ("differences", "Differences", _differences(found)),
        ("ladder", "The ladder of baselines", _ladder(found)),
        ("curves", "Validation loss during training", _curves(found)),
        ("rates", "Learning rates of the pilots", _rates(found)),
        ("samples", "Samples side by side", _samples(folder, found)),
        ("checks", "Checks", _checks(found)),
        ("recipe", "Recipe", _recipe(found, f"toml-{key}")),
    ]
    return [Section(f"{anchor}-{key}", title, body) for anchor, title, body in made if body]


def _verdict(found: Compared) -> Markup:
    shut = bool(found.gate) and found.gate.get("open") is not True
    first, *others = found.notices or [""]
    if not shut:
        first, others = _passed(found), [*found.notices]
    return template(
        "comparison_verdict.html",
        first=first,
        shut=shut,
        notices=others,
        verdicts=[one.verdict for one in found.contrasts if one.verdict],
        facts=_facts(found),
    )


def _passed(found: Compared) -> str:
    """What an open gate means, in numbers."""
    if not found.gate:
        return "This comparison has no gate: it was made before baselines had to beat an n-gram for a verdict."
    baseline, floor, clear = (number(found.gate.get(key)) for key in ("baseline", "floor_nats_per_token", "clear_by"))
    return (
        f"The verdicts count: gpt, at {_loss(baseline)} nats per token, is more than {clear:g} below the lowest floor, "
        f"the {text(found.gate.get('floor'))} at {_loss(floor)}."
    )


def _facts(found: Compared) -> str:
    """What was compared, in a sentence or two."""
    sizes = [("layers", "layers"), ("width", "width"), ("context", "context")]
    parts = [f"{name} {_count(found.fact('recipe', 'model', key))}" for name, key in sizes]
    steps, batch = found.fact("recipe", "train", "steps"), found.fact("tokens_per_step")
    parts.append(f"{_count(steps)} steps of {_count(batch)} tokens ({_figures(found.fact('epochs'))} epochs)")
    if found.ladder:
        parts.append(f"a ladder of {len(found.ladder.rungs)} baselines over the log of {found.ladder.what}")
    else:
        parts.append(MATCHED.get(text(found.content.get("match")), "baselines"))
    seeds = max((len(arm.seeds) for arm in found.arms), default=0)
    parts.append(f"{seeds:,} seed{'s' if seeds != 1 else ''}")
    parts.append(f"{text(found.content.get('split'))} split of the shards {text(found.content.get('shards'))[:12]}")
    return f"{'; '.join(parts)}."


# Losses of the arms


def _losses(found: Compared) -> Markup:
    ordered = sorted(found.arms, key=lambda arm: (math.isnan(arm.mean), arm.mean))
    values = [value for arm in found.arms for value in (*arm.nats, *(arm.interval or ()))]
    axis, beyond = _with_floors(found, around("nats per token, lower is better", values))
    rules = [Rule(floor.nats, f"{floor.name} {_loss(floor.nats)}", "floor") for floor in found.floors]
    return template(
        "comparison_losses.html",
        plot=forest([_arm_row(found, arm) for arm in ordered], _axes(found, axis), "Loss of each arm", rules),
        beyond=[f"{floor.name} at {_loss(floor.nats)}" for floor in beyond],
        floors=bool(found.floors),
        trained=found.fact("floors", "trained_tokens"),
        intervals=any(arm.interval for arm in found.arms),
        results=page.table(*_results(found, ordered)),
        costs=page.table(*_costs(found)),
        columns=_described(found, ARMS),
        folders=[(arm.label, arm.folders) for arm in found.arms if arm.folders],
    )


def _with_floors(found: Compared, axis: Axis) -> tuple[Axis, list[Floor]]:
    """The axis, longer for floors that are near, and the floors that are not on it."""
    span = axis.high - axis.low
    near = [floor.nats for floor in found.floors if axis.low - NEAR * span <= floor.nats <= axis.high + NEAR * span]
    low = min([axis.low, *(nats - 0.02 * span for nats in near)])
    high = max([axis.high, *(nats + 0.02 * span for nats in near)])
    made = Axis(axis.label, low, high)
    return made, [floor for floor in found.floors if floor.nats not in near]


def _axes(found: Compared, axis: Axis) -> list[Axis]:
    """An axis in nats, and the same in bits per unit."""
    if not math.isfinite(found.factor):
        return [axis]
    return [axis, Axis(f"bits per {found.unit}", axis.low * found.factor, axis.high * found.factor)]


def _arm_row(found: Compared, arm: Arm) -> Row:
    words = [f"diverged at seed {', '.join(arm.diverged) or '?'}"] if math.isnan(arm.mean) else [_loss(arm.mean)]
    if arm.interval:
        words.append(f"[{_loss(arm.interval[0])}, {_loss(arm.interval[1])}]")
    return Row(arm.label, _role(found, arm), style(arm.number), arm.nats, arm.mean, arm.interval, words)


def _role(found: Compared, arm: Arm) -> str:
    """What an arm is in the comparison; nothing of one that was asked for, unless it is the positive control."""
    if found.control and text(found.control.get("arm")) == arm.label:
        return "positive control"
    return ROLES.get(arm.role, arm.role)


def _results(found: Compared, arms: Iterable[Arm]) -> tuple[list[str], list[list[str]], str]:
    heads = ["arm", "nats per token", "95 % interval", "spread over seeds", f"bits per {found.unit}", "seeds"]
    rows = []
    for arm in arms:
        whole = math.isfinite(arm.mean)
        spread = f"{max(arm.nats) - min(arm.nats):.4f}" if whole and len(arm.nats) > 1 else UNKNOWN
        loss = _loss(arm.mean) if whole else "diverged"
        rows.append(
            [
                arm.label,
                loss,
                _ends(arm.interval),
                spread,
                _loss(arm.mean_bits if whole else math.nan),
                f"{len(arm.seeds):,}",
            ]
        )
    rows += [
        [f"floor: {floor.name}", _loss(floor.nats), UNKNOWN, UNKNOWN, _loss(floor.bits), ""] for floor in found.floors
    ]
    return heads, rows, "Losses, the lowest first"


COSTS = (
    ("layers", "layers"),
    ("width", "width"),
    ("feed-forward", "ffn"),
    ("learning rate", "lr"),
    ("parameters", "parameters"),
    ("FLOPs per token", FLOPS),
    ("tokens/s", "tokens_per_s"),
    ("peak MB", "peak_mb"),
    ("cache bytes", "cache_bytes_per_token"),
)


def _costs(found: Compared) -> tuple[list[str], list[list[str]], str]:
    rows = []
    for arm in found.arms:
        cells = [(_figures if key == "lr" else _count)(arm.facts.get(key, math.nan)) for _, key in COSTS]
        rows.append([arm.label, *cells])
    return ["arm", *(name for name, _ in COSTS)], rows, "Shapes and costs"


# Differences


def _differences(found: Compared) -> Markup | None:
    entries = _entries(found)
    if not entries:
        return None
    known = [one for one, _ in entries if math.isfinite(one.mean)]
    margin = found.fact("margin_nats")
    values = [value for one in known for value in (*one.differences, one.mean, *(one.interval or ()))]
    axis = around("difference in nats per token, lower is better", [0.0, *values])
    rules = [Rule(0.0, "no difference", "zero")]
    if math.isfinite(margin) and margin > 0:
        rules += [Rule(-margin, ""), Rule(margin, f"margin of equivalence, \u00b1{margin:g}")]
    return template(
        "comparison_differences.html",
        plot=forest(
            [_contrast_row(found, one, note) for one, note in entries], _axes(found, axis), "Differences", rules
        ),
        tables=[page.table(*_sizes(found, entries)), page.table(*_tests(found, entries))],
        missing=[(one.arm, one.unavailable) for one, _ in entries if one.unavailable],
        columns=_described(found, DIFFERENCES),
    )


def _entries(found: Compared) -> list[tuple[Contrast, str]]:
    """The contrasts that were named, each with what it is for, and the twin's."""
    control = text(found.control.get("arm")) if found.control else None
    named = [(one, "positive control" if one.arm == control else "") for one in found.contrasts]
    return [*named, *([(found.aa, "A/A: should be 0")] if found.aa else [])]


def _against(one: Contrast) -> str:
    return f"{one.arm} {MINUS} {'the ladder' if one.other == LADDER else one.other}"


def _style_of(found: Compared, label: str) -> Style:
    arm = found.arm(label)
    return style(arm.number if arm else len(found.arms))


def _contrast_row(found: Compared, one: Contrast, note: str) -> Row:
    if not math.isfinite(one.mean):
        words = ["not compared"]
    else:
        words = [_signed(one.mean)] + ([_signed_ends(one.interval)] if one.interval else ["one seed, no interval"])
    return Row(_against(one), note, _style_of(found, one.arm), one.differences, one.mean, one.interval, words)


def _sizes(found: Compared, entries: Sequence[tuple[Contrast, str]]) -> tuple[list[str], list[list[str]], str]:
    """The differences in nats per token and bits per unit: all arms are scored on the same tokens, by one factor."""
    heads = ["difference", "nats per token", "95 % interval", f"bits per {found.unit}", "95 % in bits"]
    rows = []
    for one, _ in entries:
        wins, seeds = (one.facts.get(key, math.nan) for key in ("wins", "seeds"))
        won = f"{_count(wins)} of {_count(seeds)}" if math.isfinite(wins) else UNKNOWN
        cells = [_against(one), _signed(one.mean), _signed_ends(one.interval), _signed(found.factor * one.mean)]
        rows.append([*cells, _signed_ends(_times(one.interval, found.factor)), _signed_ends(one.documents), won])
    return [*heads, "95 % over documents", "seeds won"], rows, "Sizes of the differences"


def _tests(found: Compared, entries: Sequence[tuple[Contrast, str]]) -> tuple[list[str], list[list[str]], str]:
    heads = ["difference", "p", "p (Holm)", "level", "detectable, nats", "p of equivalence"]
    heads += ["compute-equivalent gain", "95 % of the gain"] if found.ladder else []
    rows = []
    for one, _ in entries:
        keys = ("p", "p_holm", "level", "detectable", "p_equal")
        cells = [_against(one), *(_figures(one.facts.get(key, math.nan)) for key in keys)]
        rows.append([*cells, *((_figures(one.gain), _gain_ends(one)) if found.ladder else ())])
    return heads, rows, f"Tests; equivalence within {found.fact('margin_nats'):g} nats per token"


def _gain_ends(one: Contrast) -> str:
    if one.gain_interval is None:
        return one.no_gain or UNKNOWN
    ends = ("beyond" if math.isnan(end) else _figures(end) for end in one.gain_interval)
    return f"[{', '.join(ends)}]"


def _times(interval: tuple[float, float] | None, factor: float) -> tuple[float, float] | None:
    return (interval[0] * factor, interval[1] * factor) if interval and math.isfinite(factor) else None


# The ladder


def _ladder(found: Compared) -> Markup | None:
    ladder = found.ladder
    if not ladder or not ladder.rungs:
        return None
    names = {rung.label for rung in ladder.rungs}
    points = [(arm, found.cost(arm), arm.mean) for arm in found.arms]
    points = [point for point in points if all(map(math.isfinite, point[1:])) and point[1] > 0]
    x = around(f"{ladder.what} (log scale)", [cost for _, cost, _ in points], log=True)
    costs = [cost for cost, _, _ in ladder.band] or sorted(rung.cost for rung in ladder.rungs if rung.cost > 0)
    line = [ladder.intercept + ladder.slope * math.log(cost) for cost in costs]
    band = [(low, high) for _, low, high in ladder.band]
    y = around("nats per token, mean over seeds", [*(loss for *_, loss in points), *line, *itertools.chain(*band)])
    plain = Style(7, "", "circle")
    drawn = Line(plain, costs, line, [low for low, _ in band], [high for _, high in band], marked=False)
    marks = [
        Mark(
            style(arm.number),
            cost,
            loss,
            f"{arm.label}: {_loss(loss)} at {_count(cost)}",
            "hollow" if arm.label in names else "",
        )
        for arm, cost, loss in points
    ]
    return template(
        "comparison_ladder.html",
        plot=chart([drawn], x, y, "Loss of each arm by its cost, and the line through the baselines", marks=marks),
        legend=legend((style(arm.number), arm.label) for arm, *_ in points),
        band=bool(band),
        slope=_signed(ladder.slope * math.log(2)),
        scattered=ladder.scattered,
        table=page.table(
            ["arm", ladder.what, "nats per token", "line there", "on the ladder"],
            [
                [
                    arm.label,
                    _count(cost),
                    _loss(loss),
                    _loss(ladder.intercept + ladder.slope * math.log(cost)),
                    "rung" if arm.label in names else "arm",
                ]
                for arm, cost, loss in sorted(points, key=lambda point: point[1])
            ],
            "Costs and losses",
        ),
    )


# Curves


def _curves(found: Compared) -> Markup | None:
    arms = [arm for arm in found.arms if arm.curve]
    if not arms:
        return None
    batch = found.fact("tokens_per_step")
    y = _later(arms)
    plots = []
    for name in ("steps", "training FLOPs", "seconds of training"):
        lines = [_curve(arm, _places(arm, name, batch), name) for arm in arms]
        ends = [end for line in lines for end in line.x if math.isfinite(end)]
        x = Axis(name, 0.0, max(ends, default=0.0) or 1.0)
        plots.append((name, chart(lines, x, y, f"Validation loss by {name}")))
    return template(
        "comparison_curves.html",
        plots=plots,
        legend=legend((style(arm.number), arm.label) for arm in arms),
        spread=any(math.isfinite(point.lowest) for arm in arms for point in arm.curve),
        table=page.table(*_last(arms)),
    )


def _places(arm: Arm, name: str, batch: float) -> list[float]:
    """Where the points of an arm's curve are: in steps, FLOPs or seconds. batch: tokens per step."""
    if name == "seconds of training":
        return [point.seconds for point in arm.curve]
    each = 1.0 if name == "steps" else batch * arm.facts.get(FLOPS, math.nan)
    return [each * point.step for point in arm.curve]


def _later(arms: Sequence[Arm]) -> Axis:
    """An axis for the losses of the second half of training: with those of the first, differences are not seen."""
    values = []
    for arm in arms:
        half = max(point.step for point in arm.curve) / 2
        for point in arm.curve:
            if point.step >= half:
                values += [point.loss, point.lowest, point.highest]
    return around("validation loss, nats per token", values)


def _curve(arm: Arm, places: Sequence[float], name: str) -> Line:
    curve = arm.curve
    words = [
        f"{arm.label}: {_loss(point.loss)} at {_count(place)} {name}"
        for point, place in zip(curve, places, strict=True)
    ]
    losses, low, high = ([getattr(point, key) for point in curve] for key in ("loss", "lowest", "highest"))
    return Line(style(arm.number), places, losses, low, high, words)


def _last(arms: Sequence[Arm]) -> tuple[list[str], list[list[str]], str]:
    rows = []
    for arm in arms:
        lowest, last = min(arm.curve, key=lambda point: (math.isnan(point.loss), point.loss)), arm.curve[-1]
        cells = [_count(last.step), _loss(last.loss), _loss(lowest.loss), _count(lowest.step), _figures(last.seconds)]
        rows.append([arm.label, *cells])
    heads = ["arm", "last step", "loss there", "lowest loss", "at step", "seconds of training"]
    return heads, rows, "Ends of the curves, nats per token"


# Learning rates


def _rates(found: Compared) -> Markup | None:
    if not found.pilots:
        return None
    rates = sorted({rate for one in found.pilots for rate in one.losses})
    means = {one.label: {rate: mean(losses) for rate, losses in one.losses.items()} for one in found.pilots}
    finite = [loss for by_rate in means.values() for loss in by_rate.values()]
    searched = len(rates) > 1 and any(map(math.isfinite, finite))
    return template(
        "comparison_rates.html",
        searched=searched,
        plot=_sensitivity(found, rates, means) if searched else None,
        legend=legend(
            (_style_of(found, one.label), f"{one.label}{' (at the edge)' if one.at_edge else ''}")
            for one in found.pilots
        ),
        edge=[one.label for one in found.pilots if one.at_edge],
        steps=_count(found.pilots[0].steps),
        seeds=", ".join(found.pilots[0].seeds),
        table=page.table(
            ["arm", *(f"{rate:g}" for rate in rates), "chosen", "edge"],
            [_rate_row(one, rates, means[one.label]) for one in found.pilots],
            "Lowest validation loss, nats per token, by learning rate: means over the pilot seeds",
        ),
    )


def _rate_row(one: Pilots, rates: Sequence[float], means: dict[float, float]) -> list[str]:
    cells = [("diverged" if math.isnan(means[rate]) else _loss(means[rate])) if rate in means else "" for rate in rates]
    return [one.label, *cells, f"{one.chosen:g}", "at the edge" if one.at_edge else "inside"]


def _sensitivity(found: Compared, rates: Sequence[float], means: dict[str, dict[float, float]]) -> Markup:
    x = around("learning rate (log scale)", [*rates, *(one.chosen for one in found.pilots)], log=True)
    each = [
        loss for one in found.pilots for losses in one.losses.values() for loss in losses if math.isfinite(mean(losses))
    ]
    y = around("validation loss, nats per token", each)
    lines, marks = [], []
    for one in found.pilots:
        own, by_rate = _style_of(found, one.label), means[one.label]
        words = [f"{one.label}: {_loss(loss)} at {rate:g}" for rate, loss in by_rate.items()]
        lines.append(Line(own, [*by_rate], [*by_rate.values()], words=words))
        seeds = ((rate, loss) for rate, losses in one.losses.items() for loss in losses)
        marks += [
            Mark(Style(own.colour, "", "circle"), *pair, f"{one.label}: one seed", "faint small") for pair in seeds
        ]
        marks.append(
            Mark(Style(own.colour, "", "up"), one.chosen, y.low, f"{one.label}: chosen {one.chosen:g}", "chosen")
        )
    edges = [Rule(rates[0], f"lowest rate of the grid, {rates[0]:g}"), Rule(rates[-1], f"highest rate, {rates[-1]:g}")]
    return chart(lines, x, y, "Loss of the pilots by learning rate", marks=marks, rules=edges, values=rates)


# Samples


def _samples(folder: Path, found: Compared) -> Markup | None:
    """Of each arm whose runs have samples, those of its first run that has; None if there are none."""
    runs = {}
    for arm in found.arms:
        sampled = next((place for name in arm.folders if (place := _sampled(folder, name))), None)
        if sampled:
            runs[arm.label] = sampled
    if not runs:
        return None
    each = max(1, MOST_SAMPLES // len(runs))
    shown = {label: samples.figures(run, each) for label, run in [*runs.items()][:MOST_SAMPLES]}
    return template("comparison_samples.html", arms=shown, left_out=[*runs][MOST_SAMPLES:])


def _sampled(folder: Path, name: str) -> Path | None:
    """A run's folder inside that of its comparison, if it has samples; None of any other that someone wrote there."""
    try:
        place = (folder / name).resolve()
        inside = place.is_relative_to(folder.resolve()) and any((place / "samples").glob("*.json"))
    except (OSError, RuntimeError, ValueError):  # such names can't be looked up
        return None
    return place if inside else None


# Checks


def _checks(found: Compared) -> Markup:
    diverged = [[arm.label, seed, how] for arm in found.arms for seed, how in arm.diverged.items()]
    diverged += [
        [one.label, f"pilot at {rate:g}", "its loss is not finite"]
        for one in found.pilots
        for rate, losses in one.losses.items()
        if any(map(math.isnan, losses))
    ]
    family = found.looks.get("family")
    return template(
        "comparison_checks.html",
        gate=_passed(found)
        if not found.gate or found.gate.get("open") is True
        else found.notices[0]
        if found.notices
        else "",
        aa=_twin(found.aa),
        control=_control(found),
        looks=_looked(found),
        family=[text(name, 200) for name in family][:1000] if isinstance(family, list) else [],
        diverged=page.table(["arm", "seed", "how"], diverged, "Runs that diverged") if diverged else None,
    )


def _twin(aa: Contrast | None) -> str:
    if aa is None:
        return "This comparison has no A/A twin: it was made before there was one."
    if not math.isfinite(aa.mean):
        return f"Not available: {aa.unavailable}."
    if not aa.interval:
        return f"A second gpt differs by {_signed(aa.mean)} nats per token (one seed, no interval)."
    fits = aa.interval[0] <= 0 <= aa.interval[1]
    return (
        f"A second gpt, nearly the same, differs by {_signed(aa.mean)} nats per token, 95 % interval "
        f"{_signed_ends(aa.interval)}. It "
        + ("contains 0, as it should." if fits else "does not contain 0: chance, or a fault of the comparison.")
    )


def _control(found: Compared) -> str:
    if not found.control:
        return "Not among the arms: with conv, which is known to help, the page says whether it was found to."
    name = text(found.control.get("arm"))
    if found.control.get("found") is True:
        return f"{name}, which is known to help, was found to help: this comparison can see an effect of that size."
    if found.gate and found.gate.get("open") is not True:
        return f"{name} is among the arms; there is no verdict on it, as on no other."
    return f"{name}, which is known to help, was not found to: this comparison could not have seen anything."


def _looked(found: Compared) -> str:
    planned, seeds = number(found.looks.get("planned")), found.looks.get("seeds")
    if math.isnan(planned) or not isinstance(seeds, list):
        return ""
    counts = ", ".join(_count(number(count)) for count in seeds[:100])
    return f"Looked at with {counts} of at most {_count(planned)} seeds."


# Recipe


def _recipe(found: Compared, place: str) -> Markup:
    """The recipe as a file that can be used again: what a terminal would obey is escaped as TOML does it."""
    toml = writing.toml(found.recipe).translate(COPIED).encode("utf-8", "replace").decode()
    return template("comparison_recipe.html", recipe=page.copied(place, toml, "the recipe"))


# Numbers


def _loss(value: float) -> str:
    return f"{value:,.4f}" if math.isfinite(value) else UNKNOWN


def _signed(value: float) -> str:
    return f"{value:+,.4f}".replace("-", MINUS) if math.isfinite(value) else UNKNOWN


def _ends(interval: tuple[float, float] | None) -> str:
    return f"[{_loss(interval[0])}, {_loss(interval[1])}]" if interval else UNKNOWN


def _signed_ends(interval: tuple[float, float] | None) -> str:
    return f"[{_signed(interval[0])}, {_signed(interval[1])}]" if interval else UNKNOWN


def _count(value: float) -> str:
    """A size, with thousands in groups; a small one that is no whole number with three digits."""
    if not math.isfinite(value):
        return UNKNOWN
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def _figures(value: float) -> str:
    """Three digits, or a size."""
    if abs(value) >= 1000:
        return _count(value)
    return f"{value:.3g}".replace("-", MINUS) if math.isfinite(value) else UNKNOWN


def _described(found: Compared, columns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """What columns mean, with the unit of this comparison."""
    return [(name.replace("UNIT", found.unit), words.replace("UNIT", found.unit)) for name, words in columns]


ARMS = (
    ("arm", "A model that was asked for, a baseline that it stands against, or the twin."),
    ("nats per token", "Mean over seeds of the loss on the split that is scored; lower is better."),
    (
        "95 % interval",
        "Of that mean, by Student's t over the arm's own seeds. It holds the effect of the seeds, which all arms share "
        "and a difference does not have: two intervals may overlap although the difference is clear.",
    ),
    ("spread over seeds", "Highest less lowest loss of a seed."),
    ("bits per UNIT", "The same loss in bits per UNIT of the documents, which does not depend on the tokenizer."),
    ("floor", "What a simple predictor of the training split reaches on the same tokens: an n-gram (Kneser-Ney)."),
    ("feed-forward", "Inner width of the feed-forward layers."),
    ("parameters", "Non-embedding: all weights but those of the embedding and the head."),
    ("FLOPs per token", "Of training, forward and backward: matrix products, attention, weighted sums over depth."),
    ("tokens/s", "Of training, the median over log lines and runs, on the device of this comparison."),
    ("peak MB", "Memory of the process of a run, or of its GPU: the highest over seeds."),
    ("cache bytes", "Of keys and values that sampling keeps for each token of the past."),
)
DIFFERENCES = (
    ("difference", "Loss of the arm less that of what it is compared with, seed by seed: below 0 the arm is better."),
    (
        "95 % interval",
        "Of this difference alone, by Student's t. The variance is that of a run about its arm and its seed, pooled "
        "over all arms; with a ladder, or that of the rungs about the line if it is larger.",
    ),
    (
        "95 % over documents",
        "In nats: a bootstrap that draws documents of the split and, independently, seeds: what another split might "
        "have shown.",
    ),
    ("seeds won", "At how many seeds the arm has the lower loss."),
    ("p", "Of a two-sided t-test for no difference."),
    ("p (Holm)", "The same, adjusted for the number of contrasts that were named (Holm 1979)."),
    ("level", "What p is compared with, so that the chance of any false verdict is 5 %."),
    ("detectable, nats", "The true difference, in nats per token, that this test finds with a power of 80 %."),
    ("p of equivalence", "Of two one-sided tests (TOST) for a difference within the margin."),
    (
        "compute-equivalent gain",
        "The factor by which the arm's cost would have to rise for a plain gpt to reach its loss; needs a ladder. "
        "An end of its interval may lie beyond the ladder.",
    ),
)
