"""The HTML page of a comparison: verdicts, tables and curves in one self-contained file."""

import html
import io
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
        losses, bits = row["nats_per_token"], row["bits_per_unit"]
        known = None if None in bits else sum(bits) / len(bits)
        yield (*(row[key] for _, key in COLUMNS), sum(losses) / len(losses), known)
    # Comparisons that were made before there were floors have none.
    for name, floor in result.get("floors", {"scores": {}})["scores"].items():
        empty = (None,) * (len(COLUMNS) - 1)
        yield (f"floor: {name}", *empty, floor["nats_per_token"], floor["bits_per_unit"])


def headings(result: dict[str, Any]) -> list[str]:
    """The headings of `table`."""
    return [*(heading for heading, _ in COLUMNS), "nats per token", f"bits per {result['arms'][0]['unit']}"]


def page(result: dict[str, Any]) -> str:
    """The HTML of a result of `stages.comparison.compare`."""
    recipe = result["recipe"]
    shape = recipe["model"]
    title = f"{recipe['tokenizer']['name']}: {', '.join(row['label'] for row in result['arms'] if row['asked'])}"
    facts = (
        f"{shape['layers']} layers, width {shape['width']}, context {shape['context']}; {recipe['train']['steps']:,} "
        f"steps of {result['tokens_per_step']:,} tokens, {result['epochs']:.2f} epochs; {MATCHED[result['match']]}; "
        f"{result['split']} split; shards {result['shards'][:12]}.{_floors(result)}"
    )
    verdicts = "".join(f"<li>{html.escape(entry['verdict'])}</li>" for entry in result["contrasts"])
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(facts)}</p><ul>{verdicts}</ul>"
        f"{_html(headings(result), table(result))}<h2>Differences from the baseline</h2>{_contrasts(result)}"
        f"<h2>Validation loss</h2>{_curves(result)}<h2>Recipe</h2><pre>{html.escape(_recipe(recipe))}</pre></html>\n"
    )


def _floors(result: dict[str, Any]) -> str:
    """What the floors are, in a sentence; empty if there are none."""
    found = result.get("floors")
    if not found:
        return ""
    return (
        f" Floors: simple predictors (Kneser-Ney) that know {found['trained_tokens']:,} tokens of the training split, "
        "on the same tokens as the models."
    )


def _contrasts(result: dict[str, Any]) -> str:
    names = ["arm", "baseline", "seeds", "nats per token", "95 % interval over seeds", "95 % interval over documents"]
    names += [
        "seeds won",
        "p",
        "p (Holm)",
        "detectable at 80 % power",
        f"p (equivalence within {result['margin_nats']})",
    ]
    rows = (
        (
            *(entry[key] for key in ("arm", "baseline", "seeds", "mean", "interval_95", "documents_interval_95")),
            *(entry[key] for key in ("wins", "p", "p_holm", "detectable", "p_equal")),
        )
        for entry in result["contrasts"]
    )
    return _html(names, rows)


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
