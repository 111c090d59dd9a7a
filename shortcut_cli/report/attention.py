"""What a model reads across layers: on the excerpt itself, in numbers, and what each source is worth.

Sources and layers have one order everywhere: from top to bottom they go down the model, as in attention.png, and from
left to right up.
"""

import math
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from shortcut_cli import files
from shortcut_cli.errors import CheckFailed, in_short
from shortcut_cli.formatting import shown, to_json
from shortcut_cli.kept import remarks
from shortcut_cli.kept.inputs import is_finite, read
from shortcut_cli.report import tracks
from shortcut_cli.report.axis import Axis
from shortcut_cli.report.page import Section, cell, minus, table, template
from shortcut_cli.report.synth import Note

FOLDER, NUMBERS, ARRAYS = "attention", "attention.json", "attention.npz"
CHANGES = {"masked": "masked", "shuffled": "shuffled", "mean_ablated": "mean-ablated"}
WAYS = CHANGES | {"shuffled": "shuffled (that of another window)"}  # as a caption has them
BINS = 400  # of a row of shares
ROW_PX, HALF, WORDS = 40, 480, 360  # of a row: its height; in thousandths of it how far a value and its tick go
MOST_BYTES = 256 << 20  # of attention.npz
MOST_TEXTS = 20_000  # tokens of an excerpt
GREATEST, MOST_WEIGHT = 1e7, 1e30  # number in an excerpt, such as samples a second; weight, which may be no share
OWN = "own "  # models.trace.OWN, whose module imports torch
COLOURS, LINES = 8, 5  # classes k0 .. k7 and u0 .. u4 of a source

Floats = npt.NDArray[np.float64]
WRONG = (
    *(KeyError, TypeError, ValueError, IndexError, AttributeError, OSError, EOFError, zipfile.BadZipFile, zlib.error),
    *(MemoryError, ArithmeticError, RecursionError, RuntimeError),
)


@dataclass(frozen=True)
class Excerpt:
    """The first window: weights (M, T) of its sources, and what its tokens represent."""

    weights: Floats
    sources: list[str]
    parts: Mapping[str, npt.NDArray[Any]]  # texts, notes, note_beats, token_beats, samples, rate_hz


def of_folder(folder: Path) -> list[Section]:
    """A section of what `shortcut attention --out` wrote into a folder.

    Raises CheckFailed if its numbers are damaged.
    """
    found = read(folder / NUMBERS)
    assert found is not None, folder
    try:
        return [Section("attention", "Attention over layers", _body(found, folder))]
    except WRONG as error:
        raise CheckFailed(f"{folder / NUMBERS} can't be shown: {in_short(error)}") from error


def sections(run_folder: Path) -> list[Section]:
    """A section of what `shortcut attention` wrote into RUN/attention; none if there is nothing."""
    folder = run_folder / FOLDER
    if not os.path.lexists(folder):
        return []
    try:
        found = read(folder / NUMBERS)
        if found is None:
            raise CheckFailed(f"{folder} holds no {NUMBERS}: `shortcut attention` has not ended there")
        body = _body(found, folder)
    except CheckFailed as error:
        body = template("broken.html", words=error.message)
    except WRONG as error:
        body = template("broken.html", words=f"{folder / NUMBERS} can't be shown: {in_short(error)}")
    return [Section("attention", "Attention over layers", body)]


def _body(result: dict[str, Any], folder: Path) -> Markup:
    sources = [str(entry["source"]) for entry in result["sources"]]
    alone = sources[0] if len(sources) == 1 else ""
    try:
        excerpt = _excerpt(folder / ARRAYS)
        drawn, lost = (_drawn(excerpt, result) if not alone else _content(excerpt)), ""
    except WRONG as error:
        drawn, lost = Markup(), f"The excerpt can't be shown: {error}"
    return template(
        "attention.html",
        about=_about(result),
        alone=alone,
        taps=str(result.get("model")).startswith("shortcut"),
        drawn=drawn,
        lost=lost,
        costs=_costs(result, sources),
        heads=Markup() if alone else _heads(result, sources),
        readers=Markup() if alone else _readers(result, sources),
        layers=_layers(result),
        cka=_cka(result),
    )


def _about(result: Mapping[str, Any]) -> str:
    """What was looked at, and how much of it, in a sentence."""
    what = [str(result[key]) for key in ("model", "checkpoint") if result.get(key)]
    step = result.get("step")
    what += [f"step {step:,}"] if type(step) is int else []
    windows, tokens, loss = (cell(result[key]) for key in ("windows", "tokens", "nats_per_token"))
    amount = f"{windows} window{'s' * (windows != '1')} {_split(result)}, {tokens} tokens in all"
    return f"{', '.join(what)}: {amount}, {loss} nats per token."


def _split(result: Mapping[str, Any]) -> str:
    """What the windows are of."""
    split = result.get("split", "")  # earlier versions did not note it
    return "of a prompt" if split is None else f"of the {split} split" if split else "of a split that was not noted"


def _excerpt(path: Path) -> Excerpt:
    """Raises OSError, ValueError, KeyError or BadZipFile if the file is not what `shortcut attention` writes."""
    with files.regular(path) as stream:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("attention.npz is too large")
        with np.load(stream, allow_pickle=False) as stored:
            parts = {name.removeprefix("excerpt_"): stored[name] for name in stored if name.startswith("excerpt_")}
            by_head, sources = stored["depth_weights"], list(map(str, stored["sources"]))
    _check("weights", by_head, MOST_WEIGHT)
    for name, part in parts.items():
        if name != "texts":
            _check(name, part, GREATEST)
        elif part.dtype.kind != "U" or part.ndim != 1 or len(part) > MOST_TEXTS:
            raise ValueError(f"its texts are not those of at most {MOST_TEXTS:,} tokens")
    weights = by_head.astype(np.float64).mean(0)
    count = len(parts["texts"]) if "texts" in parts else len(parts.get("token_beats", ())) or weights.shape[1]
    if weights.ndim != 2 or len(weights) != len(sources) or not weights.size:
        raise ValueError("its weights do not fit its sources")
    if "notes" in parts and not ((parts["notes"][:, 2:] >= 0) & (parts["notes"][:, 2:] <= 127)).all():
        raise ValueError("its notes are none of MIDI")
    return Excerpt(weights[:, :count] if "samples" not in parts else weights[:, :1024], sources, parts)


def _check(name: str, part: npt.NDArray[Any], most: float) -> None:
    """Raise ValueError if an array holds anything but numbers up to `most`."""
    if part.dtype.kind not in "fiu":
        raise ValueError(f"its {name} are no numbers")
    if not (np.abs(part.astype(np.float64)) <= most).all():
        raise ValueError(f"its {name} are not finite, or too large")


def even(result: Mapping[str, Any], sources: Sequence[str]) -> Floats:
    """What each source would weigh if its readers weighed theirs evenly (M,); 0 if weights are no shares."""
    if not result["softmax"]:
        return np.zeros(len(sources))
    shares: dict[str, list[float]] = {source: [] for source in sources}
    for reader in result["reads"]:
        for source in reader["sources"]:
            shares[source].append(1 / len(reader["sources"]))
    if unread := [source for source, found in shares.items() if not found]:
        raise ValueError(f"no reader reads {unread[0]}")
    return np.array([np.mean(each) for each in shares.values()])


def _drawn(excerpt: Excerpt, result: Mapping[str, Any]) -> Markup:
    """The excerpt below the shares of its sources, over one axis; a text as running words too."""
    edges, axis, weights = _places(excerpt)
    deviations = weights - even(result, excerpt.sources)[:, None]
    binned, places = _bins(deviations, edges, axis)
    means = np.average(deviations, axis=1, weights=np.maximum(np.diff(edges), 1e-12))
    rows = _share_rows(binned, places, means, excerpt.sources, softmax=bool(result["softmax"]))
    names = [shown(name) for name in excerpt.sources[::-1]]
    values = {
        "edges": places,
        "unit": axis.label,
        "names": names,
        "values": [[minus(f"{v:+z.3f}") for v in row] for row in binned[::-1]],
    }
    stacked = tracks.stack([*rows, *_panels(excerpt, axis)], axis, values=to_json(values))
    words = _words(excerpt, result) if "texts" in excerpt.parts else Markup()
    return template("drawn.html", stacked=stacked, words=words, softmax=result["softmax"])


def _content(excerpt: Excerpt) -> Markup:
    """The excerpt alone, if there are no shares to compare."""
    if "texts" in excerpt.parts:
        return template("plain_words.html", words="".join(map(str, excerpt.parts["texts"])))
    _, axis, _ = _places(excerpt)
    panels = _panels(excerpt, axis)
    return tracks.stack(panels, axis) if panels else Markup()


def _places(excerpt: Excerpt) -> tuple[Floats, Axis, Floats]:
    """Where tokens begin on the axis, and where the last ends (N + 1,); the axis; weights (M, N) between these."""
    parts, weights = excerpt.parts, excerpt.weights
    tokens = weights.shape[1]
    if "texts" in parts:
        edges = np.concatenate([[0], np.cumsum([max(1, len(str(text))) for text in parts["texts"]])]).astype(float)
        return edges, Axis("characters", 0.0, float(edges[-1])), weights
    if "samples" in parts:
        seconds = len(parts["samples"]) / int(parts["rate_hz"])
        return np.linspace(0, seconds, tokens + 1), Axis("seconds", 0.0, seconds), weights
    if "token_beats" in parts and len(parts["note_beats"]):
        starts, which = np.unique(parts["token_beats"], return_inverse=True)
        together = np.stack([np.bincount(which, row) for row in weights]) / np.bincount(which)
        end = max(float(parts["note_beats"].max()), float(starts[-1]) + 1e-6)
        return np.append(starts, end), Axis("beats", float(min(starts[0], parts["note_beats"].min())), end), together
    return np.arange(tokens + 1.0), Axis("tokens", 0.0, float(tokens)), weights


def _panels(excerpt: Excerpt, axis: Axis) -> list[tracks.Panel]:
    parts = excerpt.parts
    if "samples" in parts:
        return [tracks.wave(parts["samples"]), tracks.mel(parts["samples"], int(parts["rate_hz"]))]
    if "notes" in parts and len(parts["notes"]):
        in_beats = axis.label == "beats"
        times = parts["note_beats"] if in_beats else parts["notes"][:, :2]
        known = zip(times.tolist(), parts["notes"][:, 2:].tolist(), strict=True)
        notes = [Note(start, end, int(pitch), int(velocity)) for (start, end), (pitch, velocity) in known]
        return [tracks.roll(notes, axis, unit=axis.label)]
    return []


def _bins(deviations: Floats, edges: Floats, axis: Axis) -> tuple[Floats, list[float]]:
    """Means over at most BINS groups of tokens, (M, bins), and where these begin and the last ends, 0 to 1000."""
    every = max(1, math.ceil(deviations.shape[1] / BINS))
    starts = np.arange(0, deviations.shape[1], every)
    widths = np.maximum(np.diff(edges), 1e-12)
    binned = np.add.reduceat(deviations * widths, starts, axis=1) / np.add.reduceat(widths, starts)
    return binned, [round(1000 * axis.share(float(at)), 1) for at in (*edges[starts], edges[-1])]


def _share_rows(
    binned: Floats, places: Sequence[float], means: Floats, sources: Sequence[str], *, softmax: bool
) -> list[tracks.Panel]:
    """A row for each source, the last on top: its area above or below a line, all on one scale, with its ticks."""
    most = max(float(np.abs(binned).max(initial=0)), 1e-9)
    power = 10.0 ** math.floor(math.log10(most))
    tick = max(each * power for each in (1, 2, 5) if each * power <= most * (1 + 1e-9))
    far = HALF * tick / most
    ticks = [((500 + sign * min(far, WORDS)) / 1000, minus(f"{sign * tick:+g}")) for sign in (1, -1)]
    what = "share less that of an even spread" if softmax else "weight in the sum"
    found = []
    for name, row, mean in reversed(list(zip(sources, binned, means, strict=True))):
        paths = {kind: _area(row * sign, places, most, sign) for kind, sign in (("up", 1), ("down", -1))}
        ends = minus(f"from {row.min():+z.3f} to {row.max():+z.3f}, on average {mean:+z.3f}")
        words = f"{name}: {what}, {ends}"
        picture = template("share_row.html", paths=paths, lines=(500 - far, 500 + far))
        found.append(tracks.Panel(f"{name} {minus(f'{mean:+z.2f}')}", words, picture, ROW_PX, ticks, flat=True))
    return found


def _area(heights: Floats, places: Sequence[float], most: float, sign: int) -> str:
    """What is above the line in the middle (sign 1), or below (-1; heights are negated), as an SVG path."""
    words = [f"M{places[0]:.1f} 500"]
    for left, right, height in zip(places, places[1:], heights.clip(0), strict=False):
        y = 500 - sign * HALF * height / most
        words.append(f"L{left:.1f} {y:.0f}L{right:.1f} {y:.0f}")
    return "".join(words) + f"L{places[-1]:.1f} 500Z"


def _words(excerpt: Excerpt, result: Mapping[str, Any]) -> Markup:
    """The text, each token with the colour and line of the source that it reads most; not of what is read anyway."""
    names = excerpt.sources
    others = [m for m, name in enumerate(names) if not name.startswith(OWN)]
    others = others if len(others) > 1 else [*range(len(names))]
    signs = "+" if not result["softmax"] else ""
    most = np.array(others)[np.abs(excerpt.weights[others]).argmax(0)]
    tokens = []
    for number, text in enumerate(map(str, excerpt.parts["texts"])):
        column = excerpt.weights[:, number]
        lines = [
            f"{name}: {minus(f'{value:{signs}.3f}')}" for name, value in reversed(list(zip(names, column, strict=True)))
        ]
        words = text.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}\n")
        tokens.append({"text": words, "of": int(most[number]), "tip": "\n".join([repr(text), *lines])})
    counts = np.bincount(most, minlength=len(names))
    legend = [
        {"of": m, "name": name, "share": f"{counts[m] / max(1, len(most)):.0%}"}
        for m, name in enumerate(names)
        if m in others
    ]
    return template(
        "words.html", tokens=tokens, legend=legend[::-1], own=len(others) < len(names), colours=COLOURS, lines=LINES
    )


def _costs(result: Mapping[str, Any], sources: Sequence[str]) -> Markup:
    """The loss that each change of a source adds, with intervals as lines."""
    rows = []
    whole = [{"source": "all at once"} | result["all_sources"]] if len(sources) > 1 else []
    for entry in [*reversed(result["sources"]), *whole]:
        for key, words in CHANGES.items():
            cost = entry[key]
            if cost is not None and is_finite(cost["nats_per_token"]):
                rows.append({"source": str(entry["source"]), "kind": key, "change": words} | _interval(cost))
    if not rows:
        return Markup()
    low, high = min(0.0, *(row["low"] for row in rows)), max(0.0, *(row["high"] for row in rows))
    room = (high - low) * 0.04 or 1.0
    axis = Axis("nats per token", low - room, high + room)
    for row in rows:
        row["places"] = [100 * axis.share(row[key]) for key in ("low", "value", "high")]
        row["words"] = minus(f"{row['value']:+z.4f}")
        row["between"] = minus(f"[{row['low']:+z.4f}, {row['high']:+z.4f}]") if row["known"] else ""
    for before, row in zip([None, *rows], rows, strict=False):
        row["first"] = before is None or before["source"] != row["source"]
    spans = {row["source"]: sum(other["source"] == row["source"] for other in rows) for row in rows}
    made = {row["kind"] for row in rows}
    *others, last = [WAYS[key] for key in CHANGES if key in made]
    return template(
        "costs.html",
        rows=rows,
        spans=spans,
        zero=100 * axis.share(0.0),
        ticks=[(100 * axis.share(tick), cell(float(tick))) for tick in axis.ticks(4)],
        changes=f"{', '.join(others)} or {last}" if others else last,
        intervals=any(row["known"] for row in rows),
        shuffled="shuffled" in made,
        alone=result["windows"] == 1,
        few=remarks.of_windows(result),
    )


def _interval(cost: Mapping[str, Any]) -> dict[str, Any]:
    value = float(cost["nats_per_token"])
    known = cost["interval_95"] is not None
    low, high = map(float, cost["interval_95"]) if known else (value, value)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("an interval is not finite")
    return {"value": value, "low": low, "high": high, "known": known}


def heat(corner: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Any]]], caption: str) -> Markup:
    """A table of numbers, each cell tinted by its size: blue above zero, orange below."""
    known = [abs(value) for _, values in rows for value in values if is_finite(value)]
    most = max(known, default=0) or 1.0

    def tinted(value: Any) -> tuple[Any, int, bool]:
        return (value, round(45 * abs(value) / most), value < 0) if is_finite(value) else (None, 0, False)

    cells = [(name, [tinted(value) for value in values]) for name, values in rows]
    return template("heat.html", corner=corner, columns=columns, rows=cells, caption=caption)


def _heads(result: Mapping[str, Any], sources: Sequence[str]) -> Markup:
    by_head = [[*entry["attention_weight_by_head"]] for entry in result["sources"]]
    columns = [f"head {number + 1}" for number in range(len(by_head[0]))]
    what = "Share of each source" if result["softmax"] else "Weight of each source in the sum"
    rows = list(zip(sources, by_head, strict=True))
    return heat("source", columns, rows[::-1], f"{what} by head, the mean over tokens and readers")


def _readers(result: Mapping[str, Any], sources: Sequence[str]) -> Markup:
    """Who reads what, if there are several readers."""
    if len(result["reads"]) < 2:
        return Markup()
    rows = []
    for entry in reversed(result["reads"]):
        weights = dict(zip(entry["sources"], entry["weights"], strict=True))
        rows.append((str(entry["reader"]), [weights.get(name) for name in sources]))
    return heat("reader", sources, rows, "Weight of each source in each reader, the mean over tokens and heads")


def _layers(result: Mapping[str, Any]) -> Markup:
    names = {
        "lens_nats_per_token": "logit lens, nats per token",
        "state_rms": "state, RMS",
        "gradient_rms": "its gradient, RMS",
        "attention_rms": "attention adds, RMS",
        "feed_forward_rms": "feed-forward adds, RMS",
    }
    if not result.get("layers"):
        return Markup()
    rows = [[str(entry["state"]), *(entry.get(key) for key in names)] for entry in reversed(result["layers"])]
    return table(["state", *names.values()], rows, "Each state, from the last layer down to the embedding")


def _cka(result: Mapping[str, Any]) -> Markup:
    if not result.get("cka"):
        return Markup()
    states, matrix = [str(name) for name in result["cka"]["states"]], result["cka"]["matrix"]
    rows = list(zip(states, matrix, strict=True))[::-1]
    return heat("state", states, rows, "Linear CKA of states: 1 means alike up to rotation and scale")
