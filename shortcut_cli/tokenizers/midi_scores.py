"""The score that is tokenized: which notes, pedals, tempos and time signatures of a file are used.

Beats are quarter notes here, whatever the time signature. What a file has and the score has not is counted in an
account (`data/documents.py`).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shortcut_cli.errors import Rejected
from shortcut_cli.tokenizers.midi_bytes import PEDAL_DOWN, SUSTAIN
from shortcut_cli.tokenizers.midi_meters import Change, Meter, Meters
from shortcut_cli.tokenizers.midi_reading import MAX_NOTES

MAX_BEATS = 500_000  # about 70 hours at 120 beats per minute; symusic counts ticks in 32 bits
DEFAULT_MSPQ = 500_000  # microseconds per quarter note before the first tempo, in any MIDI file
DRUMS = -1  # stands for the program of drums

Account = defaultdict[str, float]
Events = dict[str, np.ndarray]  # symusic's arrays of tempos: time, mspq


@dataclass
class Part:
    """The notes and pedals of one program: times in ticks, sorted."""

    program: int  # DRUMS, or 0 to 127
    notes: dict[str, np.ndarray]  # symusic's arrays: time, duration, pitch, velocity, each (N,)
    pedals: np.ndarray  # int64 (P, 2): pressed and released; they do not overlap

    @property
    def ends(self) -> np.ndarray:
        """Where each note ends, int64 (N,)."""
        ends: np.ndarray = self.notes["time"].astype(np.int64) + self.notes["duration"]
        return ends


@dataclass
class Arranged:
    """A score that is ready to be tokenized, what its notes last in the file, and what was left out of it."""

    score: Any  # symusic: one track per program, each with notes, without pedals
    lengths: list[np.ndarray]  # ticks that each note of each track lasts; the score's own are cut to what fits
    pedals: list[np.ndarray]  # of each track, int64 (P, 2) ticks
    account: Account = field(default_factory=lambda: Account(float))

    @property
    def end(self) -> int:
        """The tick at which the last note ends or the last pedal is released."""
        notes = zip(self.score.tracks, self.lengths, strict=True)
        ends = [int((track.notes.numpy()["time"] + lengths).max()) for track, lengths in notes]
        return max(ends + [int(pedals[-1, 1]) for pedals in self.pedals if len(pedals)])


@dataclass(frozen=True)
class Rules:
    """What of a file is used, and how."""

    programs: bool  # keep instruments and drums; otherwise one piano plays all but the drums
    tempos: bool  # there are tokens for tempos
    sustain: str  # of the pedal: "tokens", "durations" or "drop"
    longest_rest: int  # beats of silence that are accepted
    longest_note: int  # beats that a pedal is held after the last note at most
    cut: bool  # cut every note to the longest; otherwise MidiTok does
    resolution: int  # steps to a beat
    meters: Sequence[Meter]  # time signatures that have tokens; empty: time signatures are not used


def arrange(score: Any, variant: str, rules: Rules) -> Arranged:
    """The score to tokenize; transposed or slowed down by `variant` ("transpose=+2", "tempo=1.1").

    Raises Rejected if the file has no usable notes, is too large, rests for too long, or can't be transposed.
    """
    account = Account(float, notes_in=score.note_num())
    _check_size(score)
    parts = [_part(program, tracks, account) for program, tracks in _groups(score, rules, account).items()]
    _check_rests(parts, score.ticks_per_quarter, rules)
    _use_pedals(parts, score.ticks_per_quarter, rules, account)
    kind, _, amount = variant.partition("=")
    factor = float(amount) if kind == "tempo" else 1.0
    if kind == "transpose":
        _transpose(parts, int(amount))
    if not rules.tempos and factor != 1:
        _stretch(score, parts, factor)
    tempos, changes = _global_events(score, parts, rules, account)
    if rules.tempos and factor != 1:
        tempos = _slower(tempos, factor)
    return _assemble(score, parts, tempos, changes, rules, account)


def _check_size(score: Any) -> None:
    if not score.note_num():
        raise Rejected("has no notes")
    if score.note_num() > MAX_NOTES:
        raise Rejected(f"has {score.note_num():,} notes, more than {MAX_NOTES:,}")


def _groups(score: Any, rules: Rules, account: Account) -> dict[int, list[Any]]:
    """The tracks of each program that is kept, in order of first appearance, among them one with notes."""
    groups: dict[int, list[Any]] = {}
    for track in score.tracks:
        program = (DRUMS if track.is_drum else track.program) if rules.programs else 0
        if track.is_drum and not rules.programs:
            account["drum_notes_dropped"] += len(track.notes)
            _drop_pedals(track, account)
        else:
            account["notes_reprogrammed"] += len(track.notes) * (track.program != max(program, 0))
            groups.setdefault(program, []).append(track)
    for program in [program for program, tracks in groups.items() if not any(len(track.notes) for track in tracks)]:
        for track in groups.pop(program):
            _drop_pedals(track, account)
    if not groups:
        raise Rejected("has only drums, and tokenizer.programs is off")
    return groups


def _drop_pedals(track: Any, account: Account) -> None:
    account["pedals_dropped"] += len(_presses(track, 0, account))


def _part(program: int, tracks: Iterable[Any], account: Account) -> Part:
    """The notes of several tracks, in symusic's order, and their pedals, none after the last note."""
    arrays = [track.notes.numpy() for track in tracks]
    notes = {name: np.concatenate([array[name] for array in arrays]) for name in arrays[0]}
    order = np.lexsort([notes[name] for name in ("velocity", "pitch", "duration", "time")])
    notes = {name: values[order] for name, values in notes.items()}
    end = int((notes["time"] + notes["duration"]).max())
    presses = np.concatenate([_presses(track, end, account) for track in tracks])
    heard = presses[presses[:, 0] < end]
    account["pedals_dropped"] += len(presses) - len(heard)
    pedals = _united(heard)
    account["pedals_merged"] += len(heard) - len(pedals)
    return Part(program, notes, pedals)


def _presses(track: Any, end: int, account: Account) -> np.ndarray:
    """When the sustain pedal is pressed and released, int64 (P, 2); it is released at `end` if it never is."""
    controls = track.controls.numpy()
    of_pedal = controls["number"] == SUSTAIN
    times, down = controls["time"][of_pedal].astype(np.int64), controls["value"][of_pedal] >= PEDAL_DOWN
    change = np.diff(np.r_[False, down].astype(np.int8))
    pressed, released = times[change > 0], times[change < 0]
    account["pedals_in"] += len(pressed)
    account["pedal_depths_dropped"] += len(times) - len(pressed) - len(released)
    if len(released) < len(pressed):
        released = np.r_[released, max(end, pressed[-1])]
    return np.stack([pressed, released], 1)


def _united(presses: np.ndarray) -> np.ndarray:
    """The times at which any of several pedals is down: intervals (P, 2) that do not overlap, though they may touch."""
    presses = presses[presses[:, 1] > presses[:, 0]]
    presses = presses[np.argsort(presses[:, 0], kind="stable")]
    until = np.maximum.accumulate(presses[:, 1])
    first = np.flatnonzero(np.r_[True, presses[1:, 0] >= until[:-1]][: len(presses)])
    last = np.r_[first[1:] - 1, len(presses) - 1][: len(first)]
    return np.stack([presses[first, 0], until[last]], 1)


def _check_rests(parts: list[Part], tpq: int, rules: Rules) -> None:
    """Raise Rejected if nothing sounds for too long between two notes or before the first, or if the end is too far.

    A note sounds no longer than the longest that is kept, and every beat costs tokens.
    """
    starts = np.concatenate([part.notes["time"] for part in parts]).astype(np.int64)
    ends = np.minimum(np.concatenate([part.ends for part in parts]), starts + rules.longest_note * tpq)
    order = np.argsort(starts, kind="stable")
    silent = starts[order] - np.r_[0, np.maximum.accumulate(ends[order])[:-1]]
    if silent.max() > rules.longest_rest * tpq:
        raise Rejected(
            f"has a rest of {silent.max() / tpq:,.0f} beats, more than tokenizer.longest_rest = {rules.longest_rest:,}"
        )
    if ends.max() > MAX_BEATS * tpq:
        raise Rejected(f"claims to last {ends.max() / tpq:,.0f} beats")


def _use_pedals(parts: list[Part], tpq: int, rules: Rules, account: Account) -> None:
    """Keep the pedals, apply them to the lengths of the notes, or drop them."""
    for part in parts:
        if rules.sustain == "tokens":
            limit = int(part.ends.max()) + rules.longest_note * tpq
            account["pedals_shortened"] += int((part.pedals[:, 1] > limit).sum())
            part.pedals = np.minimum(part.pedals, limit)
            continue
        if rules.sustain == "durations" and part.program != DRUMS:
            before = part.ends
            part.notes["duration"] = (_sustained(part) - part.notes["time"]).astype(np.int32)
            account["notes_sustained"] += int((part.ends > before).sum())
            account["beats_sustained"] += float((part.ends - before).sum()) / tpq
        account["pedals_applied" if rules.sustain == "durations" else "pedals_dropped"] += len(part.pedals)
        part.pedals = part.pedals[:0]


def _sustained(part: Part) -> np.ndarray:
    """Where each note ends with the pedal: at its release, or where the same key is struck again, int64 (N,)."""
    starts, ends, pitches = part.notes["time"].astype(np.int64), part.ends, part.notes["pitch"].astype(np.int64)
    if not len(part.pedals):
        return ends
    of = np.searchsorted(part.pedals[:, 0], ends, "right") - 1
    released = part.pedals[np.maximum(of, 0), 1]
    keys = pitches << 32 | starts
    known = np.r_[np.sort(keys), np.iinfo(np.int64).max]
    following = known[np.searchsorted(known, keys, "right")]
    struck = np.where(following >> 32 == pitches, following & 0xFFFFFFFF, released)
    sustained = np.maximum(ends, np.minimum(released, struck))
    return np.where((of >= 0) & (released > ends), sustained, ends)


def _global_events(score: Any, parts: list[Part], rules: Rules, account: Account) -> tuple[Events, list[Change]]:
    """The tempos before the end, and the changes of the time signature; none if they have no tokens."""
    end = max(max(int(part.ends.max()), *part.pedals[-1:, 1].tolist(), 0) for part in parts)
    tempos = score.tempos.numpy()
    early = (tempos["time"] < end) | (tempos["time"] == 0)
    account["tempos_dropped"] += int((~early).sum())
    tempos = {name: values[early] for name, values in tempos.items()}
    written = [(one.time, one.numerator, one.denominator) for one in score.time_signatures]
    if not rules.meters:
        account["time_signatures_dropped"] += sum(meter != [4, 4] for _, *meter in written)
        return tempos, []
    meters = Meters(rules.meters, score.ticks_per_quarter, rules.resolution, account)
    return tempos, meters.spell(written, end)


def _transpose(parts: list[Part], semitones: int) -> None:
    """Shift all but the drums in place. Raises Rejected if a note would leave the MIDI range."""
    melodic = [part for part in parts if part.program != DRUMS]
    if not melodic:
        raise Rejected("has only drums, which are not transposed")
    for part in melodic:
        pitches = part.notes["pitch"].astype(int) + semitones
        if pitches.min() < 0 or pitches.max() > 127:
            raise Rejected(f"has notes that a transposition by {semitones:+d} would move out of range")
        part.notes["pitch"] = pitches.astype(part.notes["pitch"].dtype)


def _slower(tempos: Events, factor: float) -> Events:
    """The tempos at which everything lasts `factor` times as long: no note leaves its place in the bar."""
    times, mspq = tempos["time"], tempos["mspq"]
    if not len(times) or times[0]:
        times, mspq = np.r_[0, times], np.r_[DEFAULT_MSPQ, mspq]
    slower = np.minimum(np.rint(mspq * factor), np.iinfo(np.int32).max)
    return {"time": times.astype(np.int32), "mspq": slower.astype(np.int32)}


def _stretch(score: Any, parts: list[Part], factor: float) -> None:
    """Multiply all times by the factor, in place, rounded to ticks: the way if there are no tokens for tempos."""
    for part in parts:
        starts, ends = (np.rint(times * factor).astype(np.int32) for times in (part.notes["time"], part.ends))
        part.notes |= {"time": starts, "duration": ends - starts}
        part.pedals = _united(np.rint(part.pedals * factor).astype(np.int64))
    for event in (*score.tempos, *score.time_signatures):
        event.time = round(event.time * factor)


def _assemble(
    score: Any, parts: list[Part], tempos: Events, changes: list[Change], rules: Rules, account: Account
) -> Arranged:
    import symusic

    result: Any = symusic.Score(score.ticks_per_quarter)
    result.tempos = symusic.Tempo.from_numpy(**tempos)
    for change in changes:
        result.time_signatures.append(symusic.TimeSignature(*change))
    lengths = []
    for part in parts:
        track: Any = symusic.Track(program=max(part.program, 0), is_drum=part.program == DRUMS)
        lengths.append(part.notes["duration"])
        longest = rules.longest_note * score.ticks_per_quarter if rules.cut else np.iinfo(np.int32).max
        fitting = np.clip(part.notes["duration"], 1, longest).astype(np.int32)
        track.notes = symusic.Note.from_numpy(**(part.notes | {"duration": fitting}))
        result.tracks.append(track)
    return Arranged(result, lengths, [part.pedals for part in parts], account)


def place_pedals(prepared: Any, arranged: Arranged, resolution: int) -> None:
    """Put the pedals on the grid of a score that MidiTok has prepared, `resolution` steps to a beat of each meter.

    MidiTok itself would join pedals if one is released within the step in which the next is pressed.
    """
    import symusic

    signatures, scale = prepared.time_signatures.numpy(), prepared.ticks_per_quarter / arranged.score.ticks_per_quarter
    begins = signatures["time"].astype(np.int64)
    steps = 4 * prepared.ticks_per_quarter // (signatures["denominator"].astype(np.int64) * resolution)
    until = np.r_[begins[1:], np.iinfo(np.int64).max]
    for track, pedals in zip(prepared.tracks, arranged.pedals, strict=True):
        of = np.searchsorted(begins, pedals * scale, "right") - 1
        there = begins[of] + np.rint((pedals * scale - begins[of]) / steps[of]).astype(np.int64) * steps[of]
        pressed, released = np.minimum(there, until[of]).T
        shortest = steps[np.searchsorted(begins, pressed, "right") - 1]
        pressed, released = _united(np.stack([pressed, np.maximum(released, pressed + shortest)], 1)).T
        track.pedals = symusic.Pedal.from_numpy(pressed.astype(np.int32), (released - pressed).astype(np.int32))


def swap_ends(score: Any) -> Any:
    """Let notes of one pitch end, in place, in the order in which they began: a note-off does not say which it ends."""
    import symusic

    for track in score.tracks:
        notes = track.notes.numpy()
        ends = notes["time"] + notes["duration"]
        begun = np.lexsort([notes["time"], notes["pitch"]])
        notes["duration"][begun] = ends[np.lexsort([ends, notes["pitch"]])] - notes["time"][begun]
        track.notes = symusic.Note.from_numpy(**notes)
    return score


def seconds(ticks: np.ndarray, tempos: Events, tpq: int) -> np.ndarray:
    """When each of `ticks` comes, in seconds, float64, under tempos sorted by time."""
    times, mspq = np.r_[0, tempos["time"]].astype(np.int64), np.r_[DEFAULT_MSPQ, tempos["mspq"]].astype(np.float64)
    begins = np.r_[0, np.cumsum(np.diff(times) * mspq[:-1])]
    of = np.searchsorted(times, ticks, "right") - 1
    past: np.ndarray = (begins[of] + (ticks - times[of]) * mspq[of]) / (tpq * 1e6)
    return past


def in_order(score: Any) -> Any:
    """A decoded score with its tempos and time signatures by their times, in place; of equal times the last one holds.

    MidiTok leaves them in the order of their ids, in which a sampled position may go back within its bar.
    """
    import symusic

    kinds: Any = {"tempos": symusic.Tempo, "time_signatures": symusic.TimeSignature}
    for name, kind in kinds.items():
        events = getattr(score, name).numpy()
        order = np.argsort(events["time"], kind="stable")
        setattr(score, name, kind.from_numpy(**{key: values[order] for key, values in events.items()}))
    return score


def natural_units(score: Any, notes: int, end: int) -> dict[str, float]:
    """Natural units of a score that holds `notes` notes and ends at a tick."""
    lasts = float(seconds(np.array([end]), score.tempos.numpy(), score.ticks_per_quarter)[0])
    return {"note": notes, "beat": end / score.ticks_per_quarter, "second": round(lasts, 6)}


def sounding_end(score: Any) -> int:
    """The tick at which the last note of a score ends or the last pedal is released; 0 if there is neither."""
    lists = [events for track in score.tracks for events in (track.notes, track.pedals) if len(events)]
    return max((int((found["time"] + found["duration"]).max()) for found in (one.numpy() for one in lists)), default=0)


def barline(score: Any, tick: int) -> int:
    """The tick of the last barline at or before a tick; in 4/4 before the first time signature."""
    before = [one for one in score.time_signatures if one.time <= tick]
    begins, beats, unit = (before[-1].time, before[-1].numerator, before[-1].denominator) if before else (0, 4, 4)
    bar = score.ticks_per_quarter * 4 * beats // unit
    return int(tick - (tick - begins) % bar)


def added(score: Any, old: Any) -> list[list[Any]]:
    """The notes of each track of a score that `old`, which is its beginning, does not have."""
    known = Counter((_player(track), *_values(note)) for track in old.tracks for note in track.notes)
    found: list[list[Any]] = []
    for track in score.tracks:
        found.append([])
        for note in track.notes:
            key = _player(track), *_values(note)
            known[key] -= 1
            if known[key] < 0:
                found[-1].append(note)
    return found


def since(score: Any, old: Any, tick: int, start: int) -> Any:
    """What a score has more than `old`, which is its beginning up to a tick, with `start` as its tick 0.

    Notes that began before the tick are left out; a pedal that is held then is pressed there.
    """
    import symusic

    result: Any = symusic.Score(score.ticks_per_quarter)
    for name in ("tempos", "time_signatures"):
        events = list(getattr(score, name))
        first = max((number for number, one in enumerate(events) if one.time <= start), default=0)
        for one in events[first:]:
            one.time = max(0, one.time - start)
            getattr(result, name).append(one)
    for track, notes in zip(score.tracks, added(score, old), strict=True):
        made: Any = symusic.Track(track.name, track.program, track.is_drum)
        for note in notes:
            if note.time >= tick:
                made.notes.append(symusic.Note(note.time - start, note.duration, note.pitch, note.velocity))
        for pedal in track.pedals:
            if (end := pedal.time + pedal.duration) > tick:
                begins = max(pedal.time, tick)
                made.pedals.append(symusic.Pedal(begins - start, end - begins))
        result.tracks.append(made)
    return result


def _player(track: Any) -> tuple[int, bool]:
    return track.program, track.is_drum


def _values(note: Any) -> tuple[int, int, int, int]:
    return note.time, note.duration, note.pitch, note.velocity
