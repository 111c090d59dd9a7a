"""Panels one above the other over one shared axis: a waveform, a spectrogram, a piano roll, shares of attention.

Their words are HTML beside pictures that stretch, so that they keep their size on narrow screens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from shortcut_cli.report import media, spectrum
from shortcut_cli.report.axis import Axis
from shortcut_cli.report.page import cell, minus, template
from shortcut_cli.report.synth import Note

WAVE_PX, MEL_PX, ROW_PX = 56, 150, 7  # heights: of a waveform, of a spectrogram, of a semitone
ROLL_PX = (90, 320)  # of a piano roll, at least and at most
MOST_NOTES = 3000  # that are drawn
NAMES = "C C# D D# E F F# G G# A A# B".replace("#", "\N{MUSIC SHARP SIGN}").split()


@dataclass(frozen=True)
class Panel:
    """One picture, which fills its row.

    label: of its vertical axis, or, if `flat`, of the row; ticks: (height from 0 to 1, words).
    """

    label: str
    description: str  # what a screen reader says instead
    picture: Markup
    height_px: int
    ticks: Sequence[tuple[float, str]] = field(default=())
    flat: bool = False  # the label is not turned
    walk: bool = False  # parts of it have values, which arrow keys show


def stack(
    panels: Iterable[Panel],
    axis: Axis,
    *,
    sound: str = "",
    name: str = "",
    tops: Sequence[tuple[float, str]] = (),
    shaded: float | None = None,
    values: str = "",
) -> Markup:
    """Panels over an axis; with a player, a line moves over them. Places are values of the axis.

    sound: a data: URI; name: of the player. tops: words of a second axis above, such as bars.
    shaded: what lies before it is a prompt. values: of flat rows, as JSON: "edges" (0 to 1000), "names", and "values".
    """
    return template(
        "tracks.html",
        panels=list(panels),
        axis=axis,
        ticks=[(axis.share(tick), cell(float(tick))) for tick in axis.ticks(5)],
        sound=sound,
        called=name,
        values=values,
        tops=[(axis.share(at), words) for at, words in tops],
        shaded=min(1.0, max(0.0, axis.share(shaded))) if shaded else 0.0,
    )


def wave(samples: npt.NDArray[np.floating]) -> Panel:
    """The waveform of mono samples; the axis covers exactly these."""
    found = spectrum.outline(samples)
    most = max(float(np.abs(samples).max(initial=0)), 1e-3)
    high = [f"{at} {500 - 490 * value / most:.0f}" for at, value in enumerate(found[:, 1])]
    low = [f"{at} {500 - 490 * value / most:.0f}" for at, value in reversed(list(enumerate(found[:, 0])))]
    picture = template("wave.html", width=max(1, len(found) - 1), path=f"M{'L'.join([*high, *low])}Z")
    peak_db = 20 * np.log10(most)
    words = f"waveform; its peak is {peak_db:.1f} dB below full scale".replace(" -", " ")
    return Panel("level", words, picture, WAVE_PX, ((0.99, cell(round(most, 2))), (0.5, "0")))


def mel(samples: npt.NDArray[np.floating], rate_hz: int) -> Panel:
    """The mel spectrogram of mono samples."""
    loudness = spectrum.mel_db(samples, rate_hz)
    picture = template("picture.html", uri=media.png(spectrum.shades(loudness)))
    words = (
        f"mel spectrogram from 0 to {rate_hz // 2:,} Hz; the loudest band reaches {minus(f'{loudness.max():z.0f}')} dB"
    )
    return Panel("Hz", words, picture, MEL_PX, spectrum.ticks(rate_hz))


def scale() -> Markup:
    """The bar that says which shade of a spectrogram is how loud."""
    uri = media.png(np.arange(256, dtype=np.uint8)[None])
    return template("scale.html", uri=uri, low=minus(f"{spectrum.LOWEST_DB:.0f}"))


def note_name(pitch: int) -> str:
    """C4 is 60, the C in the middle of a piano."""
    return f"{NAMES[pitch % 12]}{pitch // 12 - 1}"


def roll(notes: Sequence[Note], axis: Axis, *, unit: str = "s", bars: Sequence[float] = ()) -> Panel:
    """A piano roll: a rectangle for each note, darker if it was played louder, and a line where each bar begins.

    Times are values of the axis, in `unit`.
    """
    drawn = notes[:MOST_NOTES]
    pitches = [note.pitch for note in drawn] or [60]
    low, high = min(pitches) - 1, max(pitches) + 2
    shapes: list[dict[str, Any]] = []
    for note in drawn:
        name = f"drum {note.pitch}" if note.drum else note_name(note.pitch)
        length = note.end - note.start
        words = f"{name}, velocity {note.velocity}, from {cell(float(note.start))} for {cell(float(length))} {unit}"
        x, width = 1000 * axis.share(note.start), max(1.5, 1000 * (axis.share(note.end) - axis.share(note.start)))
        shade = 0.3 + 0.7 * note.velocity / 127
        shapes.append(
            {
                "x": x,
                "y": high - note.pitch - 0.95,
                "width": width,
                "shade": shade,
                "words": words,
                "kind": "drum" if note.drum else "note",
            }
        )
    octaves = [pitch for pitch in range(low, high) if pitch % 12 == 0]
    shown = octaves if len(octaves) > 1 else [pitch for pitch in range(low, high) if pitch % 12 in (0, 3, 6, 9)]
    uprights = [1000 * axis.share(bar) for bar in bars if axis.low < bar < axis.high]
    picture = template(
        "roll.html", shapes=shapes, height=high - low, lines=[high - p for p in octaves], uprights=uprights
    )
    ticks = [((pitch - low + 0.5) / (high - low), note_name(pitch)) for pitch in shown]
    more = "" if len(drawn) == len(notes) else f"; the first {len(drawn):,} are drawn"
    words = f"piano roll of {len(notes):,} notes from {note_name(min(pitches))} to {note_name(max(pitches))}{more}"
    least, most = ROLL_PX
    return Panel("note", words, picture, min(most, max(least, ROW_PX * (high - low))), ticks, walk=True)
