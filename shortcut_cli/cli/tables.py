"""How the results of the commands look on a screen."""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shortcut_cli import accounts, registry
from shortcut_cli.cli.console import Prose, pairs, table
from shortcut_cli.cli.layout import Column
from shortcut_cli.compare import table as compared
from shortcut_cli.formatting import alike, apart, cell, counted

if TYPE_CHECKING:
    from shortcut_cli.cli.console import Table

Result = dict[str, Any]
LONGEST = 200  # characters of a value
HASH = re.compile("[0-9a-f]{64}")
SECONDARY = {  # columns of a comparison, in the order in which they leave a narrow screen, from the last on
    "nats per token": 0,
    **{name: rank for rank, name in enumerate(("non-embedding parameters", "learning rate"), 2)},
    **{name: rank for rank, name in enumerate(("training FLOPs per token", "tokens/s", "layers", "width"), 4)},
    **{name: rank for rank, name in enumerate(("peak MB", "cache bytes per token", "feed-forward"), 8)},
}
COUNTS = (("inputs", "files"), ("duplicates", "duplicates"), ("rejected", "rejected"))  # of a manifest


def shards(manifest: Result) -> "Table":
    """The splits of a shards folder, from its manifest and its "path"."""
    unit = manifest["tokenizer"]["unit"]
    rows = []
    for name, split in manifest["splits"].items():
        amount = split["units"].get(unit, 0)
        rows.append((name, split["documents"], split["tokens"], amount, split["tokens"] / amount if amount else None))
    state = " (already prepared; nothing to do)" if manifest.get("worked") is False else ""
    state += " (verified: every byte is as it was written)" if manifest.get("verified") else ""
    counts = ", ".join(f"{manifest.get(key, 0):,} {name}" for key, name in COUNTS)
    if manifest.get("unfinished"):
        counts += f" ({manifest['unfinished']:,} to be tried again)"
    if manifest.get("documents_duplicated"):
        counts += f", {counted(manifest['documents_duplicated'], 'document')} duplicated"
    if manifest.get("records_rejected"):
        counts += f", {manifest['records_rejected']:,} of {manifest['records']:,} records rejected"
    if manifest.get("outside_splits"):
        counts += f", {manifest['outside_splits']:,} in none of the splits"
    if manifest.get("ignored"):
        counts += f", {manifest['ignored']:,} with other suffixes ignored"
    rate = f", {manifest['tokens_per_s']:,.0f} tokens/s" if manifest.get("tokens_per_s") else ""
    columns = (
        *("split", Column("documents", 2), Column("tokens", 0)),
        *(Column(f"{unit}s", 1), Column(f"tokens per {unit}", 3)),
    )
    return table(f"{manifest['path']}: {counts}{rate}{state}", columns, rows)


def part(result: Result) -> str:
    """What one task of a preparation did."""
    if not result["worked"]:
        return "already prepared; nothing to do"
    counts = f"{result['mine']:,} of {result['files']:,} files scanned, {result['rejected']:,} rejected"
    return f"task {result['task']}: {counts}; --merge writes the shards once all tasks are done"


def share(result: Result) -> str:
    """What one task of a comparison did."""
    return f"task {result['task']}: {result['mine']} of {result['runs']} runs done; without --task all are judged"


def account(result: Result) -> Iterator["Table"]:
    """What was changed on the way to ids, by the "account" of a result; nothing if that is nothing."""
    rows = [*accounts.rows(result.get("account", {}))]
    if not rows:
        return
    columns = ["what was changed on the way to ids", "amount", "per note"]
    means = any(mean is not None for *_, mean in rows)
    yield table("account", columns if means else columns[:2], rows if means else (row[:2] for row in rows))


def scores(title: str, result: Result) -> "Table":
    """The result of `eval`."""
    unit = result["unit"]
    losses = {
        "nats per token": result["nats_per_token"],
        f"  95 % interval over {result['interval_over']}": result["interval_95"],
        **{f"  {name} of the training split": one["nats_per_token"] for name, one in floors(result)},
        "  unigram entropy of the split": result["unigram_entropy"],
    }
    rows = {
        "split": f"{result['split']}, {counted(result['documents'], 'document')}, {counted(result['tokens'], 'token')}",
        **dict(zip(losses, alike([*losses.values()]), strict=True)),
        "perplexity": result["perplexity"],
        "accuracy": result["accuracy"],
        f"bits per {unit}": f"the split has no {unit}s" if result["bits_per_unit"] is None else result["bits_per_unit"],
        "  95 % interval": result["bits_per_unit_interval_95"],
    }
    if "words" in result:
        rows |= {"bits per character": result["bits_per_character"], "perplexity per word": result["word_perplexity"]}
    if result.get("rejects"):
        rows["rejected files and records"] = len(result["rejects"])
    if "depth_weights" in result:
        heads = result["depth_weights"]["by_head"]
        for source, shares in zip(result["depth_weights"]["sources"], zip(*heads, strict=True), strict=True):
            rows[f"attention to {source}"] = sum(shares) / len(shares)
    return pairs(title, rows)


def floors(result: Result) -> Iterator[tuple[str, Result]]:
    """The simple predictors beside a score, and what they reach, the lowest loss first."""
    found = result.get("floors", {"scores": {}})["scores"]
    yield from sorted(found.items(), key=lambda each: each[1]["nats_per_token"])


def attention(folder: Path, result: Result) -> "Table":
    """The result of `attention`: one row for each source that is read across layers, and one for all at once."""
    from shortcut_cli.kept import remarks  # which loads pydantic

    columns: list[str | Column] = ["source", Column("weight", 1), Column("back", 4)]
    columns += [Column("masked", 2), Column("masked 95 %", 3), Column("shuffled", 5), Column("shuffled 95 %", 6)]
    columns += [Column("ablated", 7), Column("ablated 95 %", 8)]
    weight = "attention weight" if result["softmax"] else "weight in the sum"
    where = f" of {result['split']}" if result.get("split") else ""
    title = f"{folder}: {result['tokens']:,} tokens{where}, {result['nats_per_token']:.4f} nats per token"
    title += f"\nweight: mean {weight}; back: tokens; masked ...: loss that it adds, nats per token"
    rows = [*attention_rows(result)]
    known = [any(row[number] is not None for row in rows) for number in range(len(columns))]
    title += ", with 95 % intervals" if any(known[4::2]) else "; of one window, so there is no interval over windows"
    if few := remarks.of_windows(result):
        title += f"\n{few}"
    return table(title, [*compress(columns, known)], (tuple(compress(row, known)) for row in rows))


def layers(result: Result) -> "Table":
    """One row for each state that `attention` found, and its CKA with the one below."""
    columns: list[str | Column] = ["state", Column("loss", 1), Column("RMS", 3), Column("gradient", 4)]
    columns += [Column("attention", 5), Column("feed-forward", 6), Column("CKA", 2)]
    title = "states behind the layers\nloss: nats per token if the head read it; RMS of it, of its gradient, of what "
    title += "attention and feed-forward add to it; CKA: with the state below"
    return table(title, columns, layer_rows(result))


def layer_rows(result: Result) -> Iterator[tuple[Any, ...]]:
    """For each state: name, loss of the head there, sizes, and likeness."""
    keys = ("state", "lens_nats_per_token", "state_rms", "gradient_rms", "attention_rms", "feed_forward_rms")
    for number, entry in enumerate(result["layers"]):
        likeness = result["cka"]["matrix"][number][number - 1] if number else None
        yield (*(entry[key] for key in keys), likeness)


def attention_rows(result: Result) -> Iterator[tuple[Any, ...]]:
    """For each source, and all: name, weight, distance, then loss added by each change, and its interval."""
    for entry in [*result["sources"], {"source": "all sources"} | result["all_sources"]]:
        costs = [entry[kind] or {} for kind in ("masked", "shuffled", "mean_ablated")]
        cells = [cost.get(key) for cost in costs for key in ("nats_per_token", "interval_95")]
        yield entry["source"], entry.get("attention_weight"), entry.get("distance_tokens"), *cells


def comparison(result: Result) -> "Table":
    """The result of `compare`: one row for each arm."""
    shut = not result.get("gate", {"open": True})["open"]  # then the first notice says that there is no verdict
    title = f"{result['notices'][0]}\nmeans over seeds" if shut else "means over seeds"
    headings = compared.headings(result)
    columns = [Column(name, SECONDARY.get(name, min(1, number))) for number, name in enumerate(headings)]
    return table(title, columns, compared.rows(result))


def description(title: str, result: Result) -> Iterator["Table"]:
    """The result of `inspect`."""
    if result["kind"] == "shards":
        yield shards(result)
        yield from account(result)
    else:
        yield pairs(title, {key: _short(value) for key, value in _flat(_without_others(result)).items()})


def _without_others(result: Result) -> Result:
    """A run without the recipe keys of other architectures, which change nothing of it."""
    if result["kind"] != "checkpoint":
        return result
    name = result["model"]
    others = registry.MODEL_OPTIONS.keys() - {registry.OPTIONS_OF.get(name, name)}
    model = {key: value for key, value in result["recipe"]["model"].items() if key not in others}
    return result | {"recipe": result["recipe"] | {"model": model}}


def _flat(tree: Result, prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        tables = isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)
        inner = {str(number): entry for number, entry in enumerate(value, 1)} if tables else value
        rows |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {prefix + key: inner}
    return rows


def rehearsal(result: Result) -> "Table":
    """The result of `train --dry-run`."""
    count, seconds = result["parameters"], result["seconds"]
    rows = {
        "parameters": f"{count['total']:,} ({count['non_embedding']:,} non-embedding)",
        "steps": result["steps"],
        "tokens": f"{result['tokens']:,} ({result['epochs']:.2f} epochs of {result['training_tokens']:,})",
        "training FLOPs": f"{result['training_flops']:.3g}",
        "training MFLOPs per token": result["training_flops_per_token"] / 1e6,
        "peak memory, MB": result["memory_mb"],
        "tokens/s": result["tokens_per_s"],
        "seconds per step": result["seconds_per_step"],
        "seconds per validation": result["seconds_per_validation"],
        "time": f"{seconds:,.0f} s" if seconds < 120 else f"{seconds / 60:,.0f} min",
    }
    return pairs(f"dry run of {result['run']}: nothing was written", rows)


def runs(folder: str, result: Result) -> Iterator["Table | str"]:
    """The result of `runs`: the runs that can be read, then what is wrong with others, or with their files."""
    readable = [entry for entry in result["runs"] if entry["model"]]
    broken = [(entry["run"], entry["problem"]) for entry in result["runs"] if entry["problem"]]
    if not result["runs"]:
        yield f"no runs in {folder}"
    if readable:
        columns = [Column("run", 0), Column("model", 4), Column("data", 6), Column("steps", 5), Column("val., nats", 1)]
        columns += [Column("test, nats", 2), Column("bits per unit", 3)]
        bits = _with_units([_test(entry) for entry in readable])
        yield table(folder, columns, map(_run_row, readable, bits))
    if broken:
        yield table("damaged or incomplete", ("run", Column("reason", 0)), broken, "left")


def _test(entry: Result) -> Result:
    found: Result = entry["scores"].get("test", {}) if entry["kind"] == "checkpoint" else {}
    return found


def _with_units(scored: Sequence[Result]) -> list[str | None]:
    """The bits per unit of scores, with the unit; those of one unit have one number of decimals."""
    texts: dict[int, str] = {}
    for unit in dict.fromkeys(one["unit"] for one in scored if one.get("bits_per_unit") is not None):
        places = [
            place for place, one in enumerate(scored) if one.get("bits_per_unit") is not None and one["unit"] == unit
        ]
        values = alike([scored[place]["bits_per_unit"] for place in places])
        texts |= {place: f"{cell(value)} {unit}" for place, value in zip(places, values, strict=True)}
    return [texts.get(place) for place in range(len(scored))]


def _run_row(entry: Result, bits: str | None) -> tuple[Any, ...]:
    done, planned = entry["step"], entry["steps"]
    steps = cell(done) if done == planned else f"{'?' if done is None else cell(done)}/{cell(planned)}"
    model = f"{entry['model']} {entry['shape']}".rstrip()
    return entry["run"], model, entry["data"], steps, entry["validation"], _test(entry).get("nats_per_token"), bits


def difference(result: Result) -> Iterator["Table | str"]:
    """The result of `diff`: one row for each thing that differs."""
    rows = [(key, *map(cell, apart(*map(_short, values)))) for key, values in result["differences"].items()]
    if rows:  # two paths as headings would leave their columns no room
        yield from (f"{number}: {run}" for number, run in enumerate(result["runs"], 1))
        yield table("differences", ("", Column("1", 0), Column("2", 0)), rows, "left")
    else:
        yield "nothing differs"


def _short(value: Any) -> Any:
    """A value as it is shown: of a hash the first 12 digits, of a long text its beginning."""
    if value is None:
        return "-"
    if not isinstance(value, str):
        return value
    return value[:12] if HASH.fullmatch(value) else value if len(value) <= LONGEST else f"{value[:LONGEST]}..."


def recipes(listed: Iterable[Result]) -> "Table":
    """The recipes that come with shortcut."""
    return table("recipes", ("name", Column("about", 0)), ((entry["name"], entry["about"]) for entry in listed), "left")


def checked_recipes(checked: Iterable[Result]) -> "Table":
    """The result of `recipes check`."""
    rows = ((entry["recipe"], entry["problem"] or "none") for entry in checked)
    return table("recipes", ("recipe", Column("problem", 0)), rows, "left")


def proof(title: str, result: Result) -> "Table":
    """The result of a `prove` command."""
    return pairs(title, {key.replace("_", " "): value for key, value in result.items() if key != "schema_version"})


def codec_scores(result: Result) -> "Table":
    """The result of `codec eval`: one row for each bandwidth, and one for Opus."""
    perplexities = ", ".join(f"{perplexity:.0f}" for perplexity in result["perplexity"])
    title = (
        f"{counted(result['files'], 'file')}, {len(result['rejects']):,} rejected, {result['seconds']:,.0f} s; encodes "
        f"at {result['encode_x_realtime']:,.0f} and decodes at {result['decode_x_realtime']:,.0f} times real time; "
        f"perplexity of the codebooks {perplexities}"
    )
    columns = ("codec", Column("kbit/s", 0), Column("SI-SDR dB", 1), Column("log-mel distance", 2))
    return table(title, (*columns, Column("STOI", 4), Column("PESQ", 3)), codec_rows(result))


def codec_rows(result: Result) -> Iterator[tuple[Any, ...]]:
    """For each bandwidth, and for Opus: name, kbit/s, SI-SDR, log-mel distance, STOI and PESQ."""
    for name, entry in (*((result["weights"], entry) for entry in result["bandwidths"]), ("opus", result["opus"])):
        yield name, *(entry.get(key) for key in ("kbps", "si_sdr_db", "log_mel", "stoi", "pesq"))


def checks(found: Iterable[Result]) -> Iterator["Table | str"]:
    """The result of `doctor`: what works, then what to do about the rest."""
    every = [*found]
    rows = ((check["what"], "ok" if check["works"] else "missing", check["found"]) for check in every)
    yield table("doctor", ("what", Column("state", 0), Column("found", 1)), rows, "left")
    yield from (Prose(f"{check['what']}: {check['remedy']}") for check in every if not check["works"])


def demo(result: Result) -> "Table":
    """The result of `demo`: one row for each recipe and model."""
    keys = ("recipe", "model", "parameters", "nats_per_token", "unigram_entropy", "accuracy")
    columns = [Column("recipe", 0), Column("model", 0), Column("parameters", 4), Column("nats per token", 0)]
    columns += [Column("unigram entropy", 2), Column("accuracy", 3), Column("bits per unit", 1)]
    bits = _with_units(result["rows"])
    return table(
        "test split", columns, ((*map(row.get, keys), one) for row, one in zip(result["rows"], bits, strict=True))
    )
