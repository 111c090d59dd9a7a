"""The page of a comparison: verdicts, table and curves in one file that needs nothing else."""

import html
import io
from collections.abc import Iterator
from typing import Any

COLUMNS = (
    ("arm", "label"),
    ("layers", "layers"),
    ("width", "width"),
    ("feed-forward", "ffn"),
    ("learning rate", "lr"),
    ("parameters of the trunk", "parameters"),
    ("training FLOPs a token", "training_flops_per_token"),
    ("tokens/s", "tokens_per_s"),
    ("peak MB", "peak_mb"),
    ("cache bytes a token", "cache_bytes_per_token"),
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .6rem; border-bottom: 1px solid #ccc }
td { text-align: right; font-variant-numeric: tabular-nums } td:first-child, th:first-child { text-align: left }
svg { max-width: 100%; height: auto } pre { background: #f5f5f5; padding: 1rem; overflow: auto }
"""


def table(result: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
    """A row for each arm: the columns, then the mean loss and bits per unit over seeds."""
    for row in result["arms"]:
        losses, bits = row["nats_per_token"], row["bits_per_unit"]
        yield (*(row[key] for _, key in COLUMNS), sum(losses) / len(losses), sum(bits) / len(bits))


def headings(result: dict[str, Any]) -> list[str]:
    """Of the columns of `table`."""
    return [*(heading for heading, _ in COLUMNS), "nats per token", f"bits per {result['arms'][0]['unit']}"]


def page(result: dict[str, Any]) -> str:
    """HTML, self-contained."""
    recipe = result["recipe"]
    shape = recipe["model"]
    title = f"{recipe['tokenizer']['name']}: {', '.join(row['label'] for row in result['arms'] if row['asked'])}"
    facts = (
        f"{shape['layers']} layers, width {shape['width']}, context {shape['context']}; {recipe['train']['steps']:,} "
        f"steps of {result['tokens_per_step']:,} tokens, {result['epochs']:.2f} epochs; matched by {result['match']}; "
        f"{result['split']} split; shards {result['shards'][:12]}."
    )
    verdicts = "".join(f"<li>{html.escape(entry['verdict'])}</li>" for entry in result["contrasts"])
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(facts)}</p><ul>{verdicts}</ul>"
        f"{_html(headings(result), table(result))}<h2>Against the opponent</h2>{_contrasts(result)}"
        f"<h2>Validation loss</h2>{_curves(result)}<h2>Recipe</h2><pre>{html.escape(_recipe(recipe))}</pre></html>\n"
    )


def _contrasts(result: dict[str, Any]) -> str:
    names = ["arm", "opponent", "seeds", "nats per token", "95 % over seeds", "95 % over documents", "wins", "p"]
    names += ["p (Holm)", "detectable", f"p of equality within {result['margin_nats']}"]
    rows = (
        (
            *(entry[key] for key in ("arm", "opponent", "seeds", "mean", "interval_95", "documents_interval_95")),
            *(entry[key] for key in ("wins", "p", "p_holm", "detectable", "p_equal")),
        )
        for entry in result["contrasts"]
    )
    return _html(names, rows)


def _html(names: list[str], rows: Any) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(_cell(value))}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_cell(part) for part in value)}]"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _curves(result: dict[str, Any]) -> str:
    """Loss by step, by FLOPs and by seconds, as SVG."""
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
    for section, keys in tree.items():
        lines.append(f"[{section}]")
        lines += [f"{key} = {value}" for key, value in keys.items()]
    return "\n".join(lines)
