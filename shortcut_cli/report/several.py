"""Several runs at once: one table, and for those on the same data common curves and how they differ."""

import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from shortcut_cli.config import writing
from shortcut_cli.inference import metrics
from shortcut_cli.kept import names, scores
from shortcut_cli.report import curves, page
from shortcut_cli.report.comparison_words import FIXED, decimals, ends, signed, signed_ends
from shortcut_cli.report.page import Section, exact
from shortcut_cli.report.run import duration, known
from shortcut_cli.report.run_data import RunData, read

RESAMPLES = 2000  # for intervals of differences
MOST_LINES = 100  # of differences between recipes
COUNTED = "counted"


def sections(folders: Sequence[Path]) -> list[Section]:
    """Tables of all runs, then a section for each set of runs that share their training data, if it has several."""
    runs = [read(folder) for folder in folders]
    labels = dict(zip([str(run.folder) for run in runs], distinct([run.name for run in runs]), strict=True))
    made = [Section("runs", "Runs side by side", _overview(runs, labels))]
    shared: dict[str, list[RunData]] = {}
    for run in runs:
        shared.setdefault(run.content["shards"], []).append(run)
    together = [group for group in shared.values() if len(group) > 1]
    for number, group in enumerate(together, 1):
        own = [labels[str(run.folder)] for run in group]
        body = curves.of_runs(group, own, f"runs-axis-{number}") + _differences(group, own)
        where = f" on {_data(group[0])}" if len(together) > 1 else ""
        made.append(Section(f"runs-{number}", f"Curves and differences{where}", body))
    return made


def distinct(given: Sequence[str]) -> list[str]:
    """Names, with a number behind those that are there more than once."""
    count, seen = Counter(given), Counter[str]()
    found = []
    for name in given:
        seen[name] += 1
        found.append(f"{name} ({seen[name]})" if count[name] > 1 else name)
    return found


def _data(run: RunData) -> str:
    return names.of_data(run.recipe) or f"shards {run.content['shards'][:12]}"


def _overview(runs: Sequence[RunData], labels: Mapping[str, str]) -> Markup:
    """A row per run in each of two tables, which fit where one does not; the captions say what may be compared."""
    several = len({run.content["shards"] for run in runs}) > 1
    scored = any("test" in run.scores for run in runs)
    caption = (
        f"Losses, nats per token, on the validation split{' and the test split' if scored else ''}; lower is better"
    )
    caption += ", and only losses on the same data can be compared" if several else ""
    caption += (
        f". {COUNTED.capitalize()}: the best of the simple predictors that only count the training split."
        if any(map(_counted, runs))
        else "."
    )
    losses = page.table(
        ("run", "validation", "test", "95 % interval", COUNTED, "test, in bits"),
        ((labels[str(run.folder)], *_losses(run)) for run in runs),
        caption,
    )
    trained = page.table(
        ("run", "data", "model", "parameters", "tokens seen", "time"),
        ((labels[str(run.folder)], *_trained(run)) for run in runs),
        "What was trained, and for how long",
    )
    return losses + trained


def _counted(run: RunData) -> float | None:
    """The lowest loss of what is counted beside a run's score on the test split; None if nothing is."""
    floors = run.scores.get("test", {}).get("floors", {"scores": {}})["scores"]
    return min((one["nats_per_token"] for name, one in floors.items() if name != "unigram"), default=None)


def _losses(run: RunData) -> Iterator[str | None]:
    score, counted, validation = run.scores.get("test", {}), _counted(run), run.content["scores"]["validation"]
    nats, interval, bits = (score.get(key) for key in ("nats_per_token", "interval_95", "bits_per_unit"))
    yield decimals(validation) if math.isfinite(validation) else None
    yield None if nats is None else decimals(nats)
    yield ends(interval) if known(interval) else None
    yield None if counted is None else decimals(counted)
    yield None if bits is None else f"{bits:.4g} per {score['unit']}".replace(" ", FIXED)


def _trained(run: RunData) -> Iterator[Any]:
    yield _data(run)
    yield names.of_model(run.recipe)
    yield run.costs.parameters["total"] if run.costs else None
    yield None if run.trained_tokens is None else exact(run.trained_tokens)
    yield duration(run.seconds)


def _differences(runs: Sequence[RunData], labels: Sequence[str]) -> Markup:
    """What each run scores beyond the first, and in which keys of their recipes they differ."""
    first, name = runs[0], labels[0]
    rows = [(label, *_difference(first, run)) for run, label in zip(runs[1:], labels[1:], strict=True)]
    unit = next((run.scores["test"]["unit"] for run in runs if "test" in run.scores), "unit")
    columns = (
        f"run, against {name}",
        "nats per token",
        "95 % interval, nats",
        f"bits per {unit}",
        "parameters",
        "tokens/s",
    )
    caption = (
        "Differences on the test split, negative: better than the first. Intervals are over documents, with one "
        "training each; shortcut compare measures what several seeds change. Blank: not scored on the same test split."
    )
    tables = page.table(columns, rows, caption)
    changed = Markup("").join(_recipes(first, run, label) for run, label in zip(runs[1:], labels[1:], strict=True))
    return tables + changed


def _difference(first: RunData, run: RunData) -> tuple[Any, ...]:
    """Difference in nats per token with its interval, and in bits per unit; ratios of parameters and of tokens/s."""
    one, other = first.scores.get("test"), run.scores.get("test")
    nats = bits = interval = None
    if one and other and one["tokens"] == other["tokens"]:
        nats, interval = _minus(one, other, "nats_per_token"), _interval(first, run)
        bits = _minus(one, other, "bits_per_unit")
    sizes = [each.costs.parameters["total"] if each.costs else None for each in (first, run)]
    speeds = [(each.trained_tokens or 0) / each.seconds if each.seconds else None for each in (first, run)]
    return nats, interval, bits, _times(*sizes), _times(*speeds)


def _minus(one: Mapping[str, Any], other: Mapping[str, Any], key: str) -> str | None:
    if one[key] is None or other[key] is None:
        return None
    return signed(other[key] - one[key])


def _times(one: float | None, other: float | None) -> str | None:
    return f"{other / one:.3g} times" if one and other else None


def _interval(first: RunData, run: RunData) -> str | None:
    """The paired bootstrap interval of the difference over documents; None if these are not the same."""
    found = []
    for each in (first, run):
        path = scores.groups(each.folder, dict(each.scores["test"]))
        if path is None:
            return None
        try:
            with np.load(path, allow_pickle=False) as sums:
                found.append((sums["nats"], sums["tokens"]))
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error):
            return None
    (nats, tokens), (others, same) = found
    if nats.shape != others.shape or not np.array_equal(tokens, same) or not len(tokens):
        return None
    return signed_ends(metrics.bootstrap(others - nats, tokens, RESAMPLES))


def _recipes(first: RunData, run: RunData, label: str) -> Markup:
    """The keys in which two recipes differ, closed at first."""
    lines = writing.differences(first.recipe, run.recipe)
    if not lines:
        return Markup("")
    more = [f"and {len(lines) - MOST_LINES:,} more"] if len(lines) > MOST_LINES else []
    rows = [(key, change) for key, _, change in (line.partition(": ") for line in lines[:MOST_LINES])]
    shown = page.table(("key", "first -> this run"), [*rows, *((line, "") for line in more)])
    return page.details(
        f"Recipe of {label}: {len(lines)} key{'s' * (len(lines) != 1)} differ{'s' * (len(lines) == 1)}", shown
    )
