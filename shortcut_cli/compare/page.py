"""The HTML page of a comparison: verdicts, tables and curves in one self-contained file."""

import html
import io
import math
from collections.abc import Iterable, Iterator
from typing import Any

from shortcut_cli.formatting import cell

COLUMNS = (
    ("arm", "label"),
    ("layers", "layers"),
    ("width", "width"),
    ("feed-forward", "ffn"),
    ("learning rate", "lr"),
    ("non-embedding parameters", "parameters"),
    ("training FLOPs per token", "training_flops_per_token"),
    ("tokens/s", "tokens_per_s"),
    ("peak MB", "peak_mb"),
    ("cache bytes per token", "cache_bytes_per_token"),
)
MATCHED = {
    "none": "baselines not matched",
    "params": "baselines matched by non-embedding parameters",
    "flops": "baselines matched by training FLOPs",
    "time": "baselines matched by time per step",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .6rem; border-bottom: 1px solid #ccc }
td { text-align: right; font-variant-numeric: tabular-nums } td:first-child, th:first-child { text-align: left }
svg { max-width: 100%; height: auto } pre { background: #f5f5f5; padding: 1rem; overflow: auto }
"""


def table(result: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """A row per arm: COLUMNS, then the means over seeds of nats per token and bits per unit. Below, a row per floor."""
    for row in result["arms"]:
        yield (*(row[key] for _, key in COLUMNS), _mean(row["nats_per_token"]), _mean(row["bits_per_unit"]))
    # Comparisons that were made before there were floors have none.
    for name, floor in result.get("floors", {"scores": {}})["scores"].items():
        empty = (None,) * (len(COLUMNS) - 1)
        yield (f"floor: {name}", *empty, floor["nats_per_token"], floor["bits_per_unit"])


def _mean(values: list[float | None]) -> float | None:
    """None if one of them is not finite, as that of a run that diverged."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if len(known) == len(values) else None


def headings(result: dict[str, Any]) -> list[str]:
    """The headings of `table`."""
    return [
        *(heading for heading, _ in COLUMNS),
        "nats per token",
        f"bits per {next((row['unit'] for row in result['arms'] if row['unit']), 'unit')}",
    ]


def page(result: dict[str, Any]) -> str:
    """The HTML of a result of `stages.comparison.compare`."""
    recipe = result["recipe"]
    shape = recipe["model"]
    title = f"{recipe['tokenizer']['name']}: {', '.join(row['label'] for row in result['arms'] if row['asked'])}"
    # Comparisons that were made before there were notices have none.
    said = "".join(f"<p><strong>{html.escape(notice)}</strong></p>" for notice in result.get("notices", ()))
    facts = (
        f"{shape['layers']} layers, width {shape['width']}, context {shape['context']}; {recipe['train']['steps']:,} "
        f"steps of {result['tokens_per_step']:,} tokens, {result['epochs']:.2f} epochs; {_matched(result)}; "
        f"{result['split']} split; shards {result['shards'][:12]}.{_floors(result)}"
    )
    verdicts = "".join(f"<li>{html.escape(entry['verdict'])}</li>" for entry in result["contrasts"])
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style>{said}<h1>{html.escape(title)}</h1><p>{html.escape(facts)}</p><ul>{verdicts}</ul>"
        f"{_html(headings(result), table(result))}<h2>Differences from the baseline</h2>{_contrasts(result)}"
        f"{_rates(result)}"
        f"<h2>Validation loss</h2>{_curves(result)}<h2>Recipe</h2><pre>{html.escape(_recipe(recipe))}</pre></html>\n"
    )


def _matched(result: dict[str, Any]) -> str:
    """What the arms stand against."""
    if result.get("ladder"):
        return f"baselines: {', '.join(result['ladder']['rungs'])}, a line over the log of {result['ladder']['cost']}"
    return MATCHED[result["match"]]


def _floors(result: dict[str, Any]) -> str:
    """What the floors are, in a sentence; empty if there are none."""
    found = result.get("floors")
    if not found:
        return ""
    return (
        f" Floors: simple predictors (Kneser-Ney) that know {found['trained_tokens']:,} tokens of the training split, "
        "on the same tokens as the models."
    )


DIFFERENCES = (
    ("arm", "arm"),
    ("baseline", "baseline"),
    ("seeds", "seeds"),
    ("nats per token", "mean"),
    ("95 % interval over seeds", "interval_95"),
    ("95 % interval over documents and seeds", "documents_interval_95"),
    ("seeds won", "wins"),
    ("p", "p"),
    ("p (Holm)", "p_holm"),
    ("level", "level"),
    ("detectable at 80 % power", "detectable"),
    ("p (equivalence)", "p_equal"),
)


def _contrasts(result: dict[str, Any]) -> str:
    """The contrasts, and last that of the twin; with a ladder, each with its compute-equivalent gain."""
    entries = [*result["contrasts"], *([result["aa"] | {"arm": "A/A"}] if "aa" in result else [])]
    names, laddered = [name for name, _ in DIFFERENCES], bool(result.get("ladder"))
    names[-1] += f" within {result['margin_nats']}"
    if laddered:
        names += ["compute-equivalent gain", "its 95 % interval"]
    rows = []
    for entry in entries:
        gain = entry.get("gain", {})
        more = (gain.get("gain", gain.get("reason")), _ends(gain.get("interval_95"))) if laddered else ()
        rows.append((*(entry.get(key) for _, key in DIFFERENCES), *more))
    return _html(names, rows)


def _ends(interval: list[float | None] | None) -> str | None:
    """An interval of a gain, whose ends may lie beyond the ladder."""
    if interval is None:
        return None
    return f"[{', '.join('beyond the ladder' if end is None else cell(end) for end in interval)}]"


def _rates(result: dict[str, Any]) -> str:
    """The sensitivity curves: validation loss of the pilots by learning rate; nothing if there were no pilots."""
    curves = result.get("pilots")
    if not curves:
        return ""
    rates = sorted({float(rate) for curve in curves.values() for rate in curve["validation"]})
    rows = []
    for label, curve in curves.items():
        losses = [curve["validation"].get(repr(rate)) for rate in rates]
        shown = [None if one is None else _mean(one) for one in losses]
        cells = ["diverged" if one and mean is None else mean for one, mean in zip(losses, shown, strict=True)]
        rows.append((label, *cells, curve["chosen"], "at the edge" if curve["at_edge"] else ""))
    one = next(iter(curves.values()))
    names = ["arm", *(f"{rate:g}" for rate in rates), "learning rate chosen", ""]
    seeds = ", ".join(map(str, one["seeds"]))
    return f"<h2>Pilots: validation loss after {one['steps']:,} steps, seeds {seeds}</h2>{_html(names, rows)}"


def _html(names: list[str], rows: Iterable[Iterable[Any]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell(value))}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _curves(result: dict[str, Any]) -> str:
    """Validation loss by steps, FLOPs and seconds, as SVG."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(1, 3, sharey=True)
    for row in result["arms"]:
        steps = [point["step"] for point in row["curve"]]
        losses = [point["validation"] for point in row["curve"]]
        flops = [step * result["tokens_per_step"] * row["training_flops_per_token"] for step in steps]
        seconds = [point["seconds"] for point in row["curve"]]
        for axes, places in zip(panels, (steps, flops, seconds), strict=True):
            axes.plot(places, losses, "-" if row["asked"] else "--", label=row["label"], linewidth=1.2)
    for axes, label in zip(panels, ("steps", "training FLOPs", "seconds"), strict=True):
        axes.set_xlabel(label)
    panels[0].set_ylabel("nats per token, mean over seeds")
    panels[0].legend(fontsize="x-small")
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    drawn = stream.getvalue()
    return drawn[drawn.index("<svg") :]


def _recipe(tree: dict[str, Any]) -> str:
    lines = []
    for section, config in tree.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {value}" for key, value in config.items()]
    return "\n".join(lines)
