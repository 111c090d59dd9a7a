"""The sections of a comparison's page on what was found: the losses of its arms, and their differences."""

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from shortcut_cli.report import page
from shortcut_cli.report.axis import Axis, around
from shortcut_cli.report.chart import Rule, style
from shortcut_cli.report.compared import FLOPS, LADDER, Arm, Compared, Contrast, Floor, text
from shortcut_cli.report.comparison_words import (
    FIXED,
    Table,
    axes,
    count,
    decimals,
    described,
    ends,
    figures,
    role,
    signed,
    signed_ends,
    style_of,
)
from shortcut_cli.report.forest import Row, forest
from shortcut_cli.report.page import MINUS, UNKNOWN, template

NEAR = 1.0  # how many times the width of the losses a floor may be away to be drawn
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
    ("non-embedding parameters", "All weights but those of the embedding and the head."),
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
        "have shown. A split with too few documents is drawn from in blocks; the verdicts say so.",
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


def losses(found: Compared) -> Markup:
    """What each arm reached, the lowest loss first, with floors; what it is, and what it costs."""
    ordered = sorted(found.arms, key=lambda arm: (math.isnan(arm.mean), arm.mean))
    values = [value for arm in found.arms for value in (*arm.nats, *(arm.interval or ()))]
    axis, beyond = _with_floors(found, around("nats per token, lower is better", values))
    rules = [Rule(floor.nats, f"{floor.name} {decimals(floor.nats)}", "floor") for floor in found.floors]
    rows = [_arm_row(found, arm) for arm in ordered]
    drawn = any(map(math.isfinite, values))
    tables = [_results(found, ordered), _facts(found, SHAPES, "Shapes"), _facts(found, COSTS, "Costs")]
    return template(
        "comparison_losses.html",
        plot=forest(rows, axes(found, axis), "Loss of each arm", rules) if drawn else None,
        beyond=[f"{floor.name} at {decimals(floor.nats)}" for floor in beyond],
        floors=bool(found.floors),
        trained=found.fact("floors", "trained_tokens"),
        intervals=any(arm.interval for arm in found.arms),
        tables=[page.table(*one) for one in tables],
        columns=described(found, ARMS, tables),
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


def _arm_row(found: Compared, arm: Arm) -> Row:
    words = [f"diverged at seed {', '.join(arm.diverged) or '?'}"] if math.isnan(arm.mean) else [decimals(arm.mean)]
    if arm.interval:
        words.append(ends(arm.interval))
    return Row(arm.label, role(found, arm), style(arm.number), arm.nats, arm.mean, arm.interval, words)


def _results(found: Compared, arms: Iterable[Arm]) -> Table:
    heads = ["arm", "nats per token", "95 % interval", "spread over seeds", f"bits per {found.unit}", "seeds"]
    rows = []
    for arm in arms:
        whole = math.isfinite(arm.mean)
        spread = f"{max(arm.nats) - min(arm.nats):.4f}" if whole and len(arm.nats) > 1 else UNKNOWN
        cells = [decimals(arm.mean) if whole else "diverged", ends(arm.interval), spread]
        rows.append([arm.label, *cells, decimals(arm.mean_bits if whole else math.nan), f"{len(arm.seeds):,}"])
    rows += [
        [f"floor: {floor.name}", decimals(floor.nats), UNKNOWN, UNKNOWN, decimals(floor.bits), ""]
        for floor in found.floors
    ]
    return heads, rows, "Losses, the lowest first"


SHAPES = (
    ("layers", "layers"),
    ("width", "width"),
    ("feed-forward", "ffn"),
    ("non-embedding parameters", "parameters"),
    ("learning rate", "lr"),
)
COSTS = (
    ("FLOPs per token", FLOPS),
    ("tokens/s", "tokens_per_s"),
    ("peak MB", "peak_mb"),
    ("cache bytes", "cache_bytes_per_token"),
)


def _facts(found: Compared, columns: Sequence[tuple[str, str]], caption: str) -> Table:
    """A row per arm with facts about it. columns: their names and keys."""
    rows = []
    for arm in found.arms:
        cells = [(figures if key == "lr" else count)(arm.facts.get(key, math.nan)) for _, key in columns]
        rows.append([arm.label, *cells])
    return ["arm", *(name for name, _ in columns)], rows, caption


def differences(found: Compared) -> Markup | None:
    """The contrasts that were named, and the twin's, or why there is none; None if nothing is said of any."""
    entries = _entries(found)
    known = [one for one, _ in entries if math.isfinite(one.mean)]
    missing = [(one.arm, one.unavailable) for one, _ in entries if one.unavailable]
    if not known and not missing:
        return None
    margin = found.fact("margin_nats")
    values = [value for one in known for value in (*one.differences, one.mean, *(one.interval or ()))]
    axis = around("difference in nats per token, lower is better", [0.0, *values])
    rules = [Rule(0.0, "no difference", "zero")]
    if math.isfinite(margin) and margin > 0:
        rules += [Rule(-margin, ""), Rule(margin, f"equivalence, \u00b1{margin:g}")]
    tables = [_sizes(entries), _in_bits(found, entries), _tests(entries, margin)] if known else []
    tables += [_gains(entries)] if known and found.ladder else []
    rows = [_contrast_row(found, one, note) for one, note in entries]
    return template(
        "comparison_differences.html",
        plot=forest(rows, axes(found, axis), "Differences", rules) if known else None,
        tables=[page.table(*one) for one in tables],
        missing=missing,
        columns=described(found, DIFFERENCES, tables),
    )


def _entries(found: Compared) -> list[tuple[Contrast, str]]:
    """The contrasts that were named, each with what it is for, and the twin's."""
    control = text(found.control.get("arm")) if found.control else None
    named = [(one, "positive control" if one.arm == control else "") for one in found.contrasts]
    return [*named, *([(found.aa, "A/A: should be 0")] if found.aa else [])]


def _against(one: Contrast) -> str:
    return f"{one.arm} {MINUS} {'the ladder' if one.other == LADDER else one.other}"


def _contrast_row(found: Compared, one: Contrast, note: str) -> Row:
    if not math.isfinite(one.mean):
        words = ["not compared"]
    else:
        words = [signed(one.mean)] + ([signed_ends(one.interval)] if one.interval else ["one seed, no interval"])
    return Row(_against(one), note, style_of(found, one.arm), one.differences, one.mean, one.interval, words, signed)


def _sizes(entries: Sequence[tuple[Contrast, str]]) -> Table:
    heads = ["difference", "nats per token", "95 % interval", "95 % over documents", "seeds won"]
    rows = []
    for one, _ in entries:
        wins, seeds = (one.facts.get(key, math.nan) for key in ("wins", "seeds"))
        won = f"{count(wins)} of {count(seeds)}" if math.isfinite(wins) else UNKNOWN
        rows.append([_against(one), signed(one.mean), signed_ends(one.interval), signed_ends(one.documents), won])
    return heads, rows, "Sizes of the differences, nats per token"


def _in_bits(found: Compared, entries: Sequence[tuple[Contrast, str]]) -> Table:
    """The same differences in bits per unit: all arms are scored on the same tokens, by one factor."""
    factor = found.factor
    rows = [[_against(one), signed(factor * one.mean), signed_ends(_times(one.interval, factor))] for one, _ in entries]
    caption = f"The same in bits per {found.unit}"
    return ["difference", f"bits per {found.unit}", "95 % interval, bits"], rows, caption


def _tests(entries: Sequence[tuple[Contrast, str]], margin: float) -> Table:
    heads = ["difference", "p", "p (Holm)", "level", "detectable, nats", "p of equivalence"]
    keys = ("p", "p_holm", "level", "detectable", "p_equal")
    rows = [[_against(one), *(figures(one.facts.get(key, math.nan)) for key in keys)] for one, _ in entries]
    return heads, rows, f"Tests; equivalence within {margin:g} nats per token" if math.isfinite(margin) else "Tests"


def _gains(entries: Sequence[tuple[Contrast, str]]) -> Table:
    heads = ["difference", "compute-equivalent gain", "95 % of the gain"]
    return heads, [[_against(one), figures(one.gain), _gain_ends(one)] for one, _ in entries], "What it is worth"


def _gain_ends(one: Contrast) -> str:
    if one.gain_interval is None:
        return one.no_gain or UNKNOWN
    both = ("beyond" if math.isnan(end) else figures(end) for end in one.gain_interval)
    return f"[{f',{FIXED}'.join(both)}]"


def _times(interval: tuple[float, float] | None, factor: float) -> tuple[float, float] | None:
    return (interval[0] * factor, interval[1] * factor) if interval and math.isfinite(factor) else None
