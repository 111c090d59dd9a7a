"""The tables of RESULTS.md, from the compare.json files beside it.

    python benchmarks/results.py [NAME ...]

For each folder of benchmarks/results, as Markdown: what was compared, each arm with its cost and its losses, each arm
against its baseline, and the verdicts. A test checks that RESULTS.md has these tables.
"""

import argparse
import json
from pathlib import Path

FOLDER = Path(__file__).parent / "results"


def tables(name):
    """Markdown of one comparison."""
    result = json.loads((FOLDER / name / "compare.json").read_text())
    recipe, unit = result["recipe"], result["arms"][0]["unit"]
    shape, train = recipe["model"], recipe["train"]
    yield (
        f"{shape['layers']} layers, width {shape['width']}, {shape['heads']} heads, feed-forward {shape['ffn']}, "
        f"context {shape['context']}; {train['steps']} steps of {result['tokens_per_step']:,} tokens, "
        f"{result['epochs']:.1f} epochs; matched by {result['match']}; {result['split']} split; "
        f"seeds {result['arms'][0]['seeds']}."
    )
    yield ""
    heads = [
        "arm",
        "layers x width x feed-forward",
        "learning rate",
        "non-embedding parameters",
        "training FLOPs per token",
    ]
    heads += ["tokens/s", "peak MB", "cache bytes per token", "nats per token, each seed", "mean", f"bits per {unit}"]
    yield line(heads)
    yield line(["---"] * len(heads))
    for row in result["arms"]:
        losses = row["nats_per_token"]
        yield line(
            [
                f"`{row['label']}`",
                f"{row['layers']} x {row['width']} x {row['ffn']}",
                f"{row['lr']:g}",
                f"{row['parameters']:,}",
                f"{row['training_flops_per_token']:,}",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['peak_mb']:,.0f}",
                f"{row['cache_bytes_per_token']:,}",
                ", ".join(f"{loss:.4f}" for loss in losses),
                f"{sum(losses) / len(losses):.4f}",
                f"{sum(row['bits_per_unit']) / len(losses):.4f}",
            ]
        )
    yield ""
    yield line(
        ["arm", "baseline", "difference, nats", "95 % over seeds", "95 % over documents", "wins", "p", "p (Holm)"]
    )
    yield line(["---"] * 8)
    for entry in result["contrasts"]:
        low, high = entry["interval_95"]
        first, last = entry["documents_interval_95"]
        yield line(
            [
                f"`{entry['arm']}`",
                f"`{entry['baseline']}`",
                f"{entry['mean']:+.4f}",
                f"{low:+.4f} to {high:+.4f}",
                f"{first:+.4f} to {last:+.4f}",
                f"{entry['wins']} of {entry['seeds']}",
                f"{entry['p']:.3g}",
                f"{entry['p_holm']:.3g}",
            ]
        )
    yield ""
    yield from (f"- {entry['verdict']}" for entry in result["contrasts"])


def line(cells):
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=sorted(path.parent.name for path in FOLDER.glob("*/compare.json")))
    for name in parser.parse_args().names:
        print(f"## {name}\n\n" + "\n".join(tables(name)) + "\n")


if __name__ == "__main__":
    main()
