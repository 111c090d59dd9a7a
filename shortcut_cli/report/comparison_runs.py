"""The sections of a comparison's page on how it was found: the ladder, curves of training, learning rates of pilots."""

import itertools
import math
from collections.abc import Sequence

from markupsafe import Markup

from shortcut_cli.report import page
from shortcut_cli.report.axis import Axis, around
from shortcut_cli.report.chart import Line, Mark, Rule, Style, chart, legend, style
from shortcut_cli.report.compared import FLOPS, Arm, Compared, Pilots, mean
from shortcut_cli.report.comparison_words import count, decimals, figures, signed, style_of
from shortcut_cli.report.page import minus, template


def ladder(found: Compared) -> Markup | None:
    """The line through the baselines with its band, and the arms at their cost; None if there is no ladder."""
    ladder = found.ladder
    if not ladder or not ladder.rungs:
        return None
    names = {rung.label for rung in ladder.rungs}
    points = [(arm, found.cost(arm), arm.mean) for arm in found.arms]
    points = [point for point in points if all(map(math.isfinite, point[1:])) and point[1] > 0]
    x = around(f"{ladder.what} (log scale)", [cost for _, cost, _ in points], log=True)
    costs = [cost for cost, _, _ in ladder.band] or sorted(rung.cost for rung in ladder.rungs if rung.cost > 0)
    line = [ladder.loss(cost) for cost in costs]
    band = [(low, high) for _, low, high in ladder.band]
    y = around("nats per token, mean over seeds", [*(loss for *_, loss in points), *line, *itertools.chain(*band)])
    drawn = Line(Style(7), costs, line, [low for low, _ in band], [high for _, high in band])
    marks = [
        Mark(
            style(arm.number),
            cost,
            loss,
            arm.label,
            decimals(loss),
            "hollow" if arm.label in names else "",
        )
        for arm, cost, loss in points
    ]
    return template(
        "comparison_ladder.html",
        plot=chart([drawn], x, y, "Loss of each arm by its cost, and the line through the baselines", marks=marks),
        legend=legend(((style(arm.number), arm.label) for arm, *_ in points), lines=False),
        band=bool(band),
        slope=signed(ladder.doubling(costs[len(costs) // 2])),
        curved=ladder.curvature != 0,
        scattered=ladder.scattered,
        twin=any(arm.role == "twin" and arm.label in names for arm in found.arms),
        table=page.table(
            ["arm", ladder.what, "nats per token", "line there", "on the ladder"],
            [
                [
                    arm.label,
                    count(cost),
                    decimals(loss),
                    decimals(ladder.loss(cost)),
                    "rung" if arm.label in names else "arm",
                ]
                for arm, cost, loss in sorted(points, key=lambda point: point[1])
            ],
            "Costs and losses",
        ),
    )


def curves(found: Compared) -> Markup | None:
    """Validation losses over steps, FLOPs and seconds; None if no arm has any."""
    arms = [arm for arm in found.arms if arm.curve]
    if not arms:
        return None
    batch = found.fact("tokens_per_step")
    y = _later(arms)
    plots = []
    several = any(sum(math.isfinite(point.loss) for point in arm.curve) > 1 for arm in arms)
    for name in ("steps", "training FLOPs", "seconds of training") if several else ():
        lines = [_curve(arm, _places(arm, name, batch)) for arm in arms]
        plots.append((name, chart(lines, _since(lines, y, name), y, f"Validation loss by {name}")))
    return template(
        "comparison_curves.html",
        plots=plots,
        legend=legend((style(arm.number), arm.label) for arm in arms),
        cut=any(point.loss > y.high for arm in arms for point in arm.curve),
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


def _since(lines: Sequence[Line], y: Axis, name: str) -> Axis:
    """An axis from where the first of the lines comes below the upper end of `y`, or from 0 if one is there at once."""
    ends = [end for line in lines for end in line.x if math.isfinite(end)]
    high = max(ends, default=0.0) or 1.0
    low = min((_enters(line, y) for line in lines), default=0.0)
    return Axis(name, low if low < high else 0.0, high)


def _enters(line: Line, y: Axis) -> float:
    """Where a line is below the upper end of `y` for the first time, or crosses it; infinite if it never is."""
    before = None
    for place, loss in zip(line.x, line.y, strict=True):
        if not math.isfinite(place + loss):
            continue
        if loss <= y.high:
            return before[0] + (place - before[0]) * (before[1] - y.high) / (before[1] - loss) if before else 0.0
        before = (place, loss)
    return math.inf


def _curve(arm: Arm, places: Sequence[float]) -> Line:
    curve = arm.curve
    losses, low, high = ([getattr(point, key) for point in curve] for key in ("loss", "lowest", "highest"))
    return Line(style(arm.number), places, losses, low, high, arm.label, [*map(decimals, losses)])


def _last(arms: Sequence[Arm]) -> tuple[list[str], list[list[str]], str]:
    rows = []
    for arm in arms:
        lowest, last = min(arm.curve, key=lambda point: (math.isnan(point.loss), point.loss)), arm.curve[-1]
        cells = [
            count(last.step),
            decimals(last.loss),
            decimals(lowest.loss),
            count(lowest.step),
            figures(last.seconds),
        ]
        rows.append([arm.label, *cells])
    heads = ["arm", "last step", "loss there", "lowest loss", "at step", "seconds of training"]
    return heads, rows, "Ends of the curves, nats per token"


def rates(found: Compared) -> Markup | None:
    """How the pilots' losses depend on the learning rate; None if there were no pilots."""
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
            (style_of(found, one.label), f"{one.label}{' (at the edge)' if one.at_edge else ''}")
            for one in found.pilots
        ),
        edge=[one.label for one in found.pilots if one.at_edge],
        steps=count(found.pilots[0].steps),
        seeds=", ".join(found.pilots[0].seeds),
        table=page.table(
            ["arm", *(minus(f"{rate:g}") for rate in rates), "chosen", "edge"],
            [_rate_row(one, rates, means[one.label]) for one in found.pilots],
            "Lowest validation loss, nats per token, by learning rate: means over the pilot seeds",
        ),
    )


def _rate_row(one: Pilots, rates: Sequence[float], means: dict[float, float]) -> list[str]:
    cells = [
        ("diverged" if math.isnan(means[rate]) else decimals(means[rate])) if rate in means else "" for rate in rates
    ]
    return [one.label, *cells, minus(f"{one.chosen:g}"), "at the edge" if one.at_edge else "inside"]


def _sensitivity(found: Compared, rates: Sequence[float], means: dict[str, dict[float, float]]) -> Markup:
    x = around("learning rate (log scale)", [*rates, *(one.chosen for one in found.pilots)], log=True)
    each = [
        loss for one in found.pilots for losses in one.losses.values() for loss in losses if math.isfinite(mean(losses))
    ]
    y = around("validation loss, nats per token", each)
    lines, marks = [], []
    for one in found.pilots:
        own, by_rate = style_of(found, one.label), means[one.label]
        words = [_of_seeds(loss, one.losses[rate]) for rate, loss in by_rate.items()]
        lines.append(Line(own, [*by_rate], [*by_rate.values()], label=one.label, words=words))
        seeds = ((rate, loss) for rate, losses in one.losses.items() for loss in losses)
        marks += [Mark(Style(own.colour, shape="circle"), *pair, kind="faint small") for pair in seeds]
        chosen = Style(own.colour, shape="up")
        marks.append(Mark(chosen, one.chosen, y.low, one.label, minus(f"chosen {one.chosen:g}"), "chosen"))
    ends = ((rates[0], "lowest rate of the grid"), (rates[-1], "highest rate"))
    edges = [Rule(rate, minus(f"{words}, {rate:g}")) for rate, words in ends]
    return chart(lines, x, y, "Loss of the pilots by learning rate", marks=marks, rules=edges, values=rates)


def _of_seeds(loss: float, losses: Sequence[float]) -> str:
    """A mean, and what it is the mean of."""
    return decimals(loss) + (f" (seeds {', '.join(map(decimals, losses))})" if len(losses) > 1 else "")
