"""The pictures of `shortcut attention`: attention weights over an excerpt, and what each source is worth."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_cli import files
from shortcut_cli.formatting import visible
from shortcut_cli.inference.metrics import Floats
from shortcut_cli.tokenizers.base import Excerpt

MAX_STRIPS = 4
STRIP_TOKENS = {"text": 64, "other": 256}  # as many as can be told apart
MAX_TOKENS = MAX_STRIPS * STRIP_TOKENS["other"]  # that are drawn
MIN_CLASS_TOKENS = 20  # of a class that is drawn; attention.json has all classes


def heading_of(result: dict[str, Any]) -> str:
    """The model, the file, and its step, of the content of attention.json."""
    step = "" if result.get("step") is None else f", step {result['step']:,}"
    return _plain(f"{result.get('model', '')}, {result.get('checkpoint', '')}{step}")


def _plain(words: str) -> str:
    """Words that matplotlib does not take for a formula, and that can be seen."""
    return visible(words).replace("\t", "\\t").replace("$", "\\$")


def draw_excerpt(
    attention_weights: Floats, sources: tuple[str, ...], excerpt: Excerpt, path: Path, heading: str = ""
) -> None:
    """Strips, one below the other: the attention weight (M, T) of each source by token, and the excerpt itself.

    All rows of a strip have one axis; strips are as long as the excerpt if there is only one. The first source is the
    lowest, as in `draw_use`.
    """
    tokens = attention_weights.shape[1]
    length = min(tokens, STRIP_TOKENS["text" if excerpt.texts is not None else "other"])
    starts = list(range(0, tokens, length))[:MAX_STRIPS]
    below = [0.6, 1.2] if excerpt.samples is not None else [0.8 if excerpt.texts is not None else 1.2]
    if excerpt.samples is None and excerpt.notes is None and excerpt.texts is None:
        below = []
    heights = [0.3 * len(sources) + 0.4, *below]
    figure = _figure((14, 1.0 + len(starts) * (sum(heights) + 0.5)))
    grid = figure.subplots(len(starts) * len(heights), 1, squeeze=False, height_ratios=heights * len(starts))[:, 0]
    shown = attention_weights[:, : starts[-1] + length]
    limits = min(0.0, float(shown.min())), float(shown.max())
    for number, start in enumerate(starts):
        axes = grid[number * len(heights)]
        end = min(start + length, tokens)
        edges = (start - 0.5, end - 0.5, -0.5, len(sources) - 0.5)
        if len(sources) == 1:
            _say_nothing_to_compare(axes, sources[0])
        else:
            image = axes.imshow(
                attention_weights[:, start:end],
                aspect="auto",
                origin="lower",
                interpolation="nearest",
                vmin=limits[0],
                vmax=limits[1],
                extent=edges,
            )
            axes.set_yticks(range(len(sources)), [_plain(name) for name in sources], fontsize="small")
            figure.colorbar(image, ax=axes, pad=0.01, label="weight")
        _draw_content(excerpt, grid[number * len(heights) + 1 : (number + 1) * len(heights)], start, end, tokens)
        for each in grid[number * len(heights) : (number + 1) * len(heights)]:  # specgram sets its own limits
            each.set_xlim(start - 0.5, start + length - 0.5)
        ticks = unit_ticks(excerpt, tokens, start, end)
        if ticks:
            places, labels = zip(*ticks, strict=True)
            axes.set_xticks(places, [""] * len(places))
            grid[(number + 1) * len(heights) - 1].set_xticks(places, labels)
    grid[0].set_title(
        "weight of each source when each token is predicted, mean over heads and readers", fontsize="medium"
    )
    grid[-1].set_xlabel(_axis_label(excerpt, tokens))
    figure.suptitle(heading, fontsize="medium")
    _save(figure, path)


def _seconds(excerpt: Excerpt) -> float:
    return 0.0 if excerpt.samples is None else len(excerpt.samples) / excerpt.rate_hz


def _axis_label(excerpt: Excerpt, tokens: int) -> str:
    """What is along the axis: tokens, named by the seconds or beats at which they begin."""
    if seconds := _seconds(excerpt):
        return f"seconds ({tokens / seconds:.4g} tokens each)"
    return "token" if excerpt.token_beats is None else "beats (tokens have equal widths, beats have not)"


def unit_ticks(excerpt: Excerpt, tokens: int, start: int, end: int) -> list[tuple[float, str]]:
    """Places on the token axis and labels of round seconds or beats, in tokens start .. end; none if it has tokens.

    Token t is from t - 0.5 to t + 0.5, and begins at the former.
    """
    from matplotlib.ticker import MaxNLocator

    seconds = _seconds(excerpt)
    beats = np.array([]) if excerpt.token_beats is None else excerpt.token_beats[start:end]
    if seconds:
        first, last = start * seconds / tokens, end * seconds / tokens
    elif len(beats):
        first, last = float(beats.min()), float(beats.max())
    else:
        return []
    found: list[tuple[float, str]] = []
    for value in MaxNLocator(8, integer=not seconds).tick_values(first, last):
        if not first <= value <= last:
            continue
        token = int(np.argmax(beats >= value)) if len(beats) else 0
        if not seconds and beats[token] >= value + 1:
            continue  # no note begins in this beat
        place = value * tokens / seconds if seconds else start + token
        if not found or place - 0.5 - found[-1][0] >= (end - start) / 25:  # else labels would collide
            found.append((place - 0.5, f"{value:.6g}"))
    return found


def _say_nothing_to_compare(axes: Any, source: str) -> None:
    """Words in the place of a picture of shares that are all of the same source."""
    words = f"{_plain(source)} is the only source: nothing to compare"
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center")
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_content(excerpt: Excerpt, rows: Any, start: int, end: int, tokens: int) -> None:
    """Draw tokens start .. end of an excerpt of `tokens`: their text, piano roll, or waveform and spectrogram."""
    if excerpt.texts is not None:
        rows[0].set_axis_off()
        for token in range(start, end):
            text = excerpt.texts[token].replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
            rows[0].text(
                token, 1, _plain(text), rotation=90, ha="center", va="top", fontsize="small", family="monospace"
            )
        rows[0].set_ylim(0, 1)
    if excerpt.notes is not None:
        pitches = excerpt.notes[:, 2]
        for first, last, pitch, velocity in excerpt.notes:
            if last >= start and first < end:
                rows[0].barh(pitch, last - first, left=first, height=0.9, color=str(0.8 - velocity / 160))
        if len(pitches):
            rows[0].set_ylim(pitches.min() - 2, pitches.max() + 2)
            octaves = [pitch for pitch in range(0, 128, 12) if pitches.min() - 2 <= pitch <= pitches.max() + 2]
            rows[0].set_yticks(octaves, [f"C{pitch // 12 - 1}" for pitch in octaves])  # 60 is C4
        rows[0].set_ylabel("pitch", fontsize="small")
    if excerpt.samples is not None:
        per_token = len(excerpt.samples) // tokens
        part = excerpt.samples[start * per_token : end * per_token]
        rows[0].plot(np.linspace(start - 0.5, end - 0.5, len(part), endpoint=False), part, linewidth=0.4)
        rows[0].set_xticks([])
        window = min(512, len(part))
        overlap = window * 3 // 4
        edges = (start - 0.5, end - 0.5)
        with np.errstate(divide="ignore"):  # silence is minus infinity dB
            rows[1].specgram(part, NFFT=window, Fs=excerpt.rate_hz, noverlap=overlap, xextent=edges, vmin=-140)
        rows[1].set_ylim(0, 8000)
        rows[1].set_ylabel("Hz", fontsize="small")


def draw_use(result: dict[str, Any], path: Path) -> None:
    """Weight, also by head, beside the loss that each change of a source adds, in all and by class.

    result: the content of attention.json. Classes of fewer than MIN_CLASS_TOKENS are left out. Sources are in one order
    everywhere, the first the lowest or the leftmost; with only one, weights are not drawn.
    """
    names = [_plain(entry["source"]) for entry in result["sources"]]
    ways = [
        (way, [entry for entry in rows if entry["tokens"] >= MIN_CLASS_TOKENS])
        for way, rows in result["classes"].items()
    ]
    most = max([len(rows) for _, rows in ways], default=1)
    top = max(3.0, 0.4 * len(names))
    figure = _figure((13, 0.7 + top + len(ways) * (0.8 + 0.28 * most)))
    grid = figure.subplots(1 + len(ways), 3, squeeze=False, height_ratios=[top, *[0.8 + 0.28 * most] * len(ways)])
    weight = "attention weight" if result["softmax"] else "weight in the sum"
    if len(names) == 1:
        for axes in (grid[0, 0], grid[0, 2]):
            _say_nothing_to_compare(axes, result["sources"][0]["source"])
    else:
        grid[0, 0].barh(names, [entry["attention_weight"] for entry in result["sources"]])
        grid[0, 0].set_xlabel(weight)
        heads = np.array([entry["attention_weight_by_head"] for entry in result["sources"]])  # (M, H)
        head_names = [str(head + 1) for head in range(heads.shape[1])]
        _heat(figure, grid[0, 2], heads, names, head_names, f"{weight} by head")
        grid[0, 2].invert_yaxis()
        grid[0, 2].set_xlabel("head")
    for change, place, hatch in (("masked", -0.27, ""), ("shuffled", 0.0, "//"), ("mean_ablated", 0.27, "..")):
        costs = [entry[change] for entry in result["sources"]]
        if None not in costs:
            values = [cost["nats_per_token"] for cost in costs]
            bars = [cost["interval_95"] or [value, value] for cost, value in zip(costs, values, strict=True)]
            errors = np.abs(np.array(bars).T - np.array(values))
            label = change.replace("_", "-")
            grid[0, 1].barh(np.arange(len(names)) + place, values, 0.25, xerr=errors, label=label, hatch=hatch)
    grid[0, 1].set_yticks(range(len(names)), names)
    grid[0, 1].set_xlabel("loss added, nats per token")
    grid[0, 1].legend(fontsize="x-small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    for row, (way, classes) in enumerate(ways, 1):
        labels = [_plain(f"{entry['class']} ({entry['tokens']:,})") for entry in classes]
        titles = {
            "attention_weight": f"{weight}, by {way}",
            "masked": f"nats added if masked, by {way}",
            "shuffled": f"nats added if shuffled, by {way}",
        }
        for axes, (key, title) in zip(grid[row], titles.items(), strict=True):
            told = len(names) > 1 or key != "attention_weight"
            if classes and told and classes[0][key] is not None:  # None: there was only one window to shuffle
                _heat(figure, axes, np.array([entry[key] for entry in classes]), labels, names, title)
            else:
                axes.set_axis_off()
    figure.suptitle(heading_of(result), fontsize="medium")
    _save(figure, path)


def _heat(figure: Any, axes: Any, values: Floats, rows: list[str], columns: list[str], title: str) -> None:
    """A heat map with labels, centered on white if some values are negative."""
    most = float(np.abs(values).max()) if values.size else 1.0
    limits: dict[str, Any] = {"vmin": -most, "vmax": most, "cmap": "RdBu_r"} if values.min() < 0 else {"vmin": 0}
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **limits)
    axes.set_yticks(range(len(rows)), rows, fontsize="x-small")
    axes.set_xticks(
        range(len(columns)),
        columns,
        fontsize="x-small",
        rotation=90 if max(map(len, columns)) > 2 and len(columns) > 2 else 0,
    )
    axes.set_title(title, fontsize="small")
    figure.colorbar(image, ax=axes)


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    with files.writing(path) as stream, warnings.catch_warnings():
        # matplotlib's font lacks many scripts; it draws a box instead.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format="png", dpi=110)
