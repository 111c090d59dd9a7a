"""The sections of a shards folder: amounts, lengths of documents, what was changed, what was rejected."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from shortcut_cli import accounts
from shortcut_cli.data import shards
from shortcut_cli.formatting import counted
from shortcut_cli.kept import remarks
from shortcut_cli.report import chart, page, samples
from shortcut_cli.report.axis import Axis
from shortcut_cli.report.page import Section
from shortcut_cli.report.run import sentence

DOCUMENTS = 3  # that are decoded
BINS = 40  # of a histogram, at most
MOST_REASONS = 20
MOST_REJECTS = 100_000  # that are read
LONGEST_REASON = 200
DIGITS = re.compile(r"\d[\d,.]*")


def sections(folder: Path) -> list[Section]:
    """What a shards folder holds. Raises UsageError or CheckFailed if it is none, or damaged."""
    opened = shards.Shards(folder)
    made = [
        Section("shards", "Shards", _warnings(folder, opened) + _facts(folder, opened.manifest) + _splits(opened)),
        Section("lengths", "Lengths of documents", _lengths(opened)),
    ]
    if account := _account(opened.manifest):
        made.append(Section("account", "What the ids do not carry", account))
    if opened.manifest.get("rejected") or opened.manifest.get("records_rejected"):
        made.append(Section("rejects", "Rejected", _rejects(folder)))
    return made


def documents(folder: Path) -> list[Section]:
    """Some of the training documents, decoded from their ids. Raises what opening the shards and decoding do."""
    if not shards.read_manifest(folder)["splits"]["train"]["documents"]:
        return []
    return [Section("documents", "Documents, as their ids decode", samples.excerpts(folder, DOCUMENTS))]


def _warnings(folder: Path, opened: shards.Shards) -> Markup:
    unfinished = shards.warning(folder, opened.manifest)
    few = [
        sentence(remark)
        for name, split in opened.manifest["splits"].items()
        if name != "train"
        for remark in remarks.of_score({"split": name, "documents": split["documents"]})
    ]
    return page.notices([*([unfinished] if unfinished else []), *few])


def _facts(folder: Path, manifest: Mapping[str, Any]) -> Markup:
    tokenizer = manifest["tokenizer"]
    return page.facts(
        {
            "tokenizer": tokenizer["name"],
            "vocabulary": tokenizer["vocabulary"],
            "fingerprint of the tokenizer": tokenizer["fingerprint"][:16],
            "files": manifest.get("inputs"),
            "duplicates": manifest.get("duplicates"),
            "rejected": manifest.get("rejected"),
            "records": manifest.get("records") or None,
            "records rejected": manifest.get("records_rejected") or None,
            "how it was split": manifest.get("split"),
            "checksum": manifest["checksum"][:16],
            "folder": str(folder),
        }
    )


def _splits(opened: shards.Shards) -> Markup:
    unit = opened.tokenizer["unit"]
    rows = []
    for name, split in opened.manifest["splits"].items():
        amount = split["units"].get(unit, 0)
        others = [_amount(split["units"].get(other)) for other in _units(opened)]
        rate = split["tokens"] / amount if amount else None
        rows.append((name, split["documents"], split["tokens"], *others, rate))
    units = [f"{other}s" for other in _units(opened)]
    return page.table(("split", "documents", "tokens", *units, f"tokens per {unit}"), rows)


def _amount(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.4g}"


def _units(opened: shards.Shards) -> list[str]:
    """The units that its splits are counted in, the natural one first."""
    every = [unit for split in opened.manifest["splits"].values() for unit in split["units"]]
    return list(dict.fromkeys([opened.tokenizer["unit"], *every]))[:6]


def _lengths(opened: shards.Shards) -> Markup:
    """A histogram of each split's documents by length, on one axis, if there are several; the median in words."""
    found = {name: opened.split(name).document_tokens() for name in shards.SPLITS}
    every = np.concatenate(list(found.values()))
    every = every[every > 0]
    if not len(every):
        return Markup("<p>There are no documents.</p>")
    edges = _edges(every)
    plots = Markup("").join(_histogram(name, lengths, edges) for name, lengths in found.items() if len(lengths) > 1)
    rows = [(name, len(lengths), *_spread(lengths)) for name, lengths in found.items() if len(lengths)]
    columns = ("split", "documents", "shortest", "a quarter is below", "median", "a quarter is above", "longest")
    return page.template("plots.html", plots=plots) + page.table(columns, rows, "Tokens of a document, EOS included")


def _spread(lengths: shards.Ids) -> list[int]:
    return [round(float(value)) for value in np.percentile(lengths, [0, 25, 50, 75, 100])]


def _edges(lengths: shards.Ids) -> npt.NDArray[np.float64]:
    """Edges of equal bins; of bins that grow by a factor, if the lengths differ by much."""
    low, high = int(lengths.min()), int(lengths.max())
    count = min(BINS, max(1, high - low + 1), max(5, int(len(lengths) ** 0.5) * 2))
    if high >= 30 * low:
        return np.geomspace(low, high + 1, count + 1)
    return np.linspace(low, high + 1, count + 1)


def _histogram(name: str, lengths: shards.Ids, edges: npt.NDArray[np.float64]) -> Markup:
    counts, _ = np.histogram(lengths, edges)
    log = bool(edges[-1] >= 30 * edges[0])
    x = Axis(f"tokens of a document{' (log scale)' if log else ''}", float(edges[0]), float(edges[-1]), log=log)
    _, low, middle, high, _ = _spread(lengths)
    half = f"half of them have {low:,} to {high:,} tokens, the median {middle:,}"
    told = f"{name}: {counted(len(lengths), 'document')}; {half}"
    drawn = chart.bars(edges.tolist(), counts.tolist(), x, f"documents of {name}", told)
    return page.template("figure.html", drawn=drawn, legend="", caption="")


def _account(manifest: Mapping[str, Any]) -> Markup:
    rows = [*accounts.rows(manifest.get("account", {}))]
    return page.table(("what was changed on the way to ids", "amount", "per note"), rows) if rows else Markup("")


def _rejects(folder: Path) -> Markup:
    """How often each reason was given, numbers in it aside, with the first file."""
    count: Counter[str] = Counter()
    first: dict[str, tuple[str, str]] = {}
    lines = shards.read_lines(folder / "rejects.jsonl", lambda line: line.keys() >= shards.REJECT_KEYS)
    for line, _ in zip(lines, range(MOST_REJECTS), strict=False):
        reason, source = str(line["reason"])[:LONGEST_REASON], str(line["source"])[:LONGEST_REASON]
        kind = DIGITS.sub("#", reason)
        count[kind] += 1
        first.setdefault(kind, (reason, source))
    common = count.most_common(MOST_REASONS)
    rows = [(first[kind][0], times, first[kind][1]) for kind, times in common]
    left = len(count) - len(common)
    caption = f"and {left:,} more reasons" if left else ""
    return page.table(("reason, numbers as in the first file", "files", "first of them"), rows, caption)
