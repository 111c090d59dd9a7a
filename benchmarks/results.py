"""The tables of RESULTS.md, from the compare.json files beside it.

    python benchmarks/results.py [NAME ...]

For each folder of benchmarks/results, as Markdown: what was compared, each arm with its cost and its losses, each arm
against its baseline, and the verdicts. A test checks that RESULTS.md has these tables.
"""

import argparse
import json
from pathlib import Path

FOLDER = Path(__file__).parent / "results"


def names():
    """The comparisons, as paths below FOLDER."""
    return sorted(path.parent.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("compare.json"))


def tables(name):
    """Markdown of one comparison."""
    result = json.loads((FOLDER / name / "compare.json").read_text())
    recipe, unit = result["recipe"], next((row["unit"] for row in result["arms"] if row["unit"]), "unit")
    shape, train, ladder = recipe["model"], recipe["train"], result.get("ladder")
    curved = "curved " if ladder and ladder.get("curvature") else ""
    against = f"a {curved}ladder over {ladder['cost']}" if ladder else f"matched by {result['match']}"
    yield (
        f"{shape['layers']} layers, width {shape['width']}, {shape['heads']} heads, feed-forward {shape['ffn']}, "
        f"context {shape['context']}; {train['steps']} steps of {result['tokens_per_step']:,} tokens, "
        f"{result['epochs']:.1f} epochs; {against}; {result['split']} split; "
        f"seeds {result['arms'][0]['seeds']}."
    )
    yield ""
    yield from arms(result["arms"], unit)
    floors = result.get("floors", {"scores": {}})["scores"]
    if floors:
        reached = (f"{name} {number(floor['nats_per_token'], '.4f')}" for name, floor in floors.items())
        yield from ("", f"Floors, nats per token: {', '.join(reached)}.")
    yield ""
    yield from contrasts(result)
    yield ""
    yield from (f"- {words}" for words in result.get("notices", ()))
    yield from (f"- {entry['verdict']}" for entry in result["contrasts"])


def arms(rows, unit):
    """A row for each arm; a run that diverged has no loss, and its arm no mean."""
    heads = ["arm", "layers x width x feed-forward", "learning rate", "non-embedding parameters"]
    heads += ["training FLOPs per token", "tokens/s", "peak MB", "cache bytes per token", "nats per token, each seed"]
    heads += ["mean", f"bits per {unit}"]
    yield line(heads)
    yield line(["---"] * len(heads))
    for row in rows:
        losses = row["nats_per_token"]
        yield line(
            [
                f"`{row['label']}`",
                f"{row['layers']} x {row['width']} x {row['ffn']}",
                f"{row['lr']:g}",
                f"{row['parameters']:,}",
                f"{row['training_flops_per_token']:,}",
                number(row["tokens_per_s"], ",.0f"),
                number(row["peak_mb"], ",.0f"),
                f"{row['cache_bytes_per_token']:,}",
                ", ".join("diverged" if loss is None else f"{loss:.4f}" for loss in losses),
                number(mean(losses), ".4f"),
                number(mean(row["bits_per_unit"]), ".4f"),
            ]
        )


def contrasts(result):
    """A row for each contrast. Results from before there were levels, or a ladder, have no columns for them."""
    entries, laddered = result["contrasts"], bool(result.get("ladder"))
    levelled = any("level" in entry for entry in entries)
    heads = ["arm", "baseline", "difference, nats", "95 % over seeds", "95 % over documents", "wins", "p", "p (Holm)"]
    heads += ["level"] * levelled + ["compute-equivalent gain", "95 % of the gain"] * laddered
    yield line(heads)
    yield line(["---"] * len(heads))
    for entry in entries:
        cells = [f"`{entry['arm']}`", f"`{entry['baseline']}`"]
        if "unavailable" in entry:
            yield line([*cells, f"not compared: {entry['unavailable']}", *["-"] * (len(heads) - 3)])
            continue
        cells += [f"{entry['mean']:+.4f}", ends(entry["interval_95"]), ends(entry["documents_interval_95"])]
        cells += [f"{entry['wins']} of {entry['seeds']}", number(entry["p"], ".3g"), number(entry["p_holm"], ".3g")]
        cells += [number(entry.get("level"), ".3g")] * levelled
        yield line(cells + (gained(entry.get("gain", {})) if laddered else []))


def gained(gain):
    """The cells of a compute-equivalent gain, or why there is none; an end of its interval may be beyond the ladder."""
    if "gain" not in gain:
        return [gain.get("reason", "-"), "-"]
    low, high = ("beyond" if end is None else f"{end:.3g}" for end in gain["interval_95"])
    return [f"{gain['gain']:.3g}", f"{low} to {high}"]


def ends(interval):
    """An interval; with one seed there is none."""
    return "-" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"


def mean(values):
    """None if one of them is not known."""
    return None if None in values else sum(values) / len(values)


def number(value, how):
    """A number as text; "-" if it is not known."""
    return "-" if value is None else format(value, how)


def line(cells):
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=names())
    for name in parser.parse_args().names:
        print(f"## {name}\n\n" + "\n".join(tables(name)) + "\n")


if __name__ == "__main__":
    main()
