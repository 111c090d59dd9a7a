"""MIDI files as notes in seconds, with their bars, for piano rolls and the synthesiser."""

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shortcut_cli.report.synth import Note
from shortcut_cli.tokenizers.midi_reading import read_score

MOST_BARS = 2000


@dataclass(frozen=True)
class Music:
    """notes: by their starts, as long as the pedal holds them; bars: seconds at which each begins."""

    notes: list[Note]
    bars: list[float]
    seconds: float  # until the last note ends


class _Clock:
    """Ticks to seconds. 120 quarters a minute before the first tempo."""

    def __init__(self, score: Any) -> None:
        self.per_quarter = score.ticks_per_quarter
        self.points = [(0, 0.0, 0.5)]  # tick, second, seconds per quarter from there
        for tempo in sorted(score.tempos, key=lambda tempo: tempo.time):
            self.points.append((tempo.time, self.second(tempo.time), 60 / tempo.qpm))

    def second(self, tick: int) -> float:
        at, second, per_quarter = self.points[bisect_right(self.points, tick, key=lambda point: point[0]) - 1]
        found: float = second + (tick - at) / self.per_quarter * per_quarter
        return found


def read(path: Path, *, most_s: float = float("inf")) -> Music:
    """The notes of a file that begin before `most_s`. Raises Rejected if it can't be read."""
    score, _ = read_score(path)
    clock, notes = _Clock(score), []
    for track in score.tracks:
        pedals = sorted((pedal.time, pedal.time + pedal.duration) for pedal in track.pedals)
        for note in track.notes:
            held = _held(note.time + note.duration, pedals)
            start_s = clock.second(note.time)
            if start_s < most_s:
                end_s = min(clock.second(held), most_s)
                notes.append(Note(start_s, end_s, note.pitch, note.velocity, track.is_drum))
    notes.sort()
    seconds = max((note.end for note in notes), default=0.0)
    return Music(notes, [second for second in map(clock.second, _bars(score)) if second < max(seconds, 1e-9)], seconds)


def _held(end: int, pedals: list[tuple[int, int]]) -> int:
    """When a note stops to sound that ends at `end`: then, or when the pedal goes up that is down."""
    last = bisect_right(pedals, end, key=lambda pedal: pedal[0]) - 1
    return max(end, pedals[last][1]) if last >= 0 else end


def _bars(score: Any) -> list[int]:
    """Ticks at which bars begin, up to the end; a change of the time signature begins a bar."""
    changes = sorted((change.time, change.numerator, change.denominator) for change in score.time_signatures)
    if not changes or changes[0][0]:
        changes.insert(0, (0, 4, 4))
    found: list[int] = []
    ends = [change[0] for change in changes[1:]] + [max(score.end(), 1)]
    for (first, numerator, denominator), end in zip(changes, ends, strict=True):
        bar = max(1, round(score.ticks_per_quarter * 4 * numerator / max(1, denominator)))
        found += range(first, end, bar)[: MOST_BARS - len(found)]
    return found
