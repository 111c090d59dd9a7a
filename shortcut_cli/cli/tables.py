"""How the results of the commands look on a screen."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortcut_cli.cli.console import pairs, table
from shortcut_cli.compare import page

if TYPE_CHECKING:
    from shortcut_cli.cli.console import Table

Result = dict[str, Any]


def shards(manifest: Result) -> "Table":
    """The splits of a shards folder, from its manifest and its "path"."""
    unit = manifest["tokenizer"]["unit"]
    rows = []
    for name, split in manifest["splits"].items():
        amount = split["units"].get(unit, 0)
        rows.append((name, split["documents"], split["tokens"], amount, split["tokens"] / amount if amount else None))
    state = " (already prepared; nothing to do)" if manifest.get("worked") is False else ""
    counts = f"{manifest['inputs']:,} files, {manifest['duplicates']:,} duplicates, {manifest['rejected']:,} rejected"
    if manifest.get("ignored"):
        counts += f", {manifest['ignored']:,} with other suffixes ignored"
    rate = f", {manifest['tokens_per_s']:,.0f} tokens/s" if manifest.get("tokens_per_s") else ""
    columns = ("split", "documents", "tokens", f"{unit}s", f"tokens per {unit}")
    return table(f"{manifest['path']}: {counts}{rate}{state}", columns, rows)


def account(manifest: Result) -> Iterator["Table"]:
    """What the ids of a shards folder do not carry, summed over its documents; nothing if that is nothing."""
    rows = {name.replace("_", " "): amount for name, amount in manifest.get("account", {}).items() if amount}
    if rows:
        yield pairs("account: what was changed on the way to ids", rows)


def scores(title: str, result: Result) -> "Table":
    """The result of `eval`."""
    unit = result["unit"]
    rows = {
        "split": f"{result['split']}, {result['documents']:,} documents, {result['tokens']:,} tokens",
        "nats per token": result["nats_per_token"],
        f"  95 % interval over {result['interval_over']}": result["interval_95"],
        "  unigram entropy of the split": result["unigram_entropy"],
        "perplexity": result["perplexity"],
        "accuracy": result["accuracy"],
        f"bits per {unit}": result["bits_per_unit"],
        "  95 % interval": result["bits_per_unit_interval_95"],
    }
    if "depth_weights" in result:
        heads = result["depth_weights"]["by_head"]
        for source, shares in zip(result["depth_weights"]["sources"], zip(*heads, strict=True), strict=True):
            rows[f"attention to {source}"] = sum(shares) / len(shares)
    return pairs(title, rows)


def attention(folder: Path, result: Result) -> "Table":
    """The result of `attention`: one row for each source that the final layer reads."""
    columns = ["source", "attention weight", "tokens back"]
    columns += ["loss added if masked", "95 %", "loss added if shuffled", "95 %"]
    title = f"{folder}: {result['tokens']:,} tokens, {result['nats_per_token']:.4f} nats per token"
    return table(title, columns, attention_rows(result))


def attention_rows(result: Result) -> Iterator[tuple[Any, ...]]:
    """For each source: name, attention weight, distance, then loss added and its interval, masked and shuffled."""
    for entry in result["sources"]:
        costs = [entry["masked"], entry["shuffled"] or {}]
        cells = [cost.get(key) for cost in costs for key in ("nats_per_token", "interval_95")]
        yield entry["source"], entry["attention_weight"], entry["distance_tokens"], *cells


def comparison(result: Result) -> "Table":
    """The result of `compare`: one row for each arm."""
    return table("means over seeds", page.headings(result), page.table(result))


def description(title: str, result: Result) -> Iterator["Table"]:
    """The result of `inspect`."""
    if result["kind"] == "shards":
        yield shards(result)
        yield from account(result)
    else:
        yield pairs(title, _flat(result))


def _flat(tree: Result, prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows


def recipes(listed: Iterable[Result]) -> "Table":
    """The recipes that come with shortcut."""
    return table("recipes", ("name", "about"), ((entry["name"], entry["about"]) for entry in listed), "left")


def checked_recipes(checked: Iterable[Result]) -> "Table":
    """The result of `recipes check`."""
    rows = ((entry["recipe"], entry["problem"] or "none") for entry in checked)
    return table("recipes", ("recipe", "problem"), rows, "left")


def proof(title: str, result: Result) -> "Table":
    """The result of a `prove` command."""
    return pairs(title, {key.replace("_", " "): value for key, value in result.items() if key != "schema_version"})


def codec_scores(result: Result) -> "Table":
    """The result of `codec eval`: one row for each bandwidth, and one for Opus."""
    perplexities = ", ".join(f"{perplexity:.0f}" for perplexity in result["perplexity"])
    title = (
        f"{result['files']:,} files, {len(result['rejects']):,} rejected, {result['seconds']:,.0f} s; encodes at "
        f"{result['encode_x_realtime']:,.0f} and decodes at {result['decode_x_realtime']:,.0f} times real time; "
        f"perplexity of the codebooks {perplexities}"
    )
    return table(title, ("codec", "kbit/s", "SI-SDR dB", "log-mel distance", "STOI", "PESQ"), codec_rows(result))


def codec_rows(result: Result) -> Iterator[tuple[Any, ...]]:
    """For each bandwidth, and for Opus: name, kbit/s, SI-SDR, log-mel distance, STOI and PESQ."""
    for name, entry in (*((result["weights"], entry) for entry in result["bandwidths"]), ("opus", result["opus"])):
        yield name, *(entry.get(key) for key in ("kbps", "si_sdr_db", "log_mel", "stoi", "pesq"))


def checks(found: Iterable[Result]) -> "Table":
    """The result of `doctor`."""
    rows = (
        (
            check["what"],
            "ok" if check["works"] else "missing",
            check["found"],
            "" if check["works"] else check["remedy"],
        )
        for check in found
    )
    return table("doctor", ("what", "state", "found", "what to do"), rows, "left")


def demo(result: Result) -> "Table":
    """The result of `demo`: one row for each recipe and model."""
    keys = ("recipe", "model", "parameters", "nats_per_token", "unigram_entropy", "accuracy")
    columns = ("recipe", "model", "parameters", "nats per token", "unigram entropy", "accuracy", "bits per unit")
    rows = (
        (*(row[key] for key in keys), f"{row['bits_per_unit']:.4g} bits per {row['unit']}") for row in result["rows"]
    )
    return table("test split", columns, rows)
