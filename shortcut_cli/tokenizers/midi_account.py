"""What tokenization changes in a score: lengths, places and loudness of notes, tempos, time signatures, pedals.

Two scores are compared: the one that was arranged from a file, and the one that its ids decode to. All lengths are in
quarter notes, which are called beats, or in seconds.
"""

from typing import Any

import numpy as np

from shortcut_cli.tokenizers.midi_scores import DEFAULT_MSPQ, Account, Arranged, Events, seconds

Notes = dict[str, np.ndarray]


def compare(arranged: Arranged, decoded: Any, tempos: np.ndarray) -> Account:
    """The account of a document: what arranging it left out, and how its notes are changed by its ids.

    `decoded` has the same tracks with the same notes in the same order, and its tempos are among `tempos`, in quarter
    notes per minute; none, if there are no tokens for tempos.
    """
    account = Account(float, arranged.account)
    old, new = arranged.score, decoded
    scale = old.ticks_per_quarter, new.ticks_per_quarter
    clocks = (old.tempos.numpy(), scale[0]), (spelled(new.tempos.numpy(), tempos), scale[1])
    ends = [0]
    for track, lengths, presses, after in zip(old.tracks, arranged.lengths, arranged.pedals, new.tracks, strict=True):
        notes = track.notes.numpy() | {"duration": lengths}, after.notes.numpy()
        _compare_notes(account, *notes, scale)
        times = [seconds(one["time"], *clock) for one, clock in zip(notes, clocks, strict=True)]
        _raise(account, "onset_moved_seconds_max", np.abs(times[1] - times[0]))
        pedals = _intervals(after.pedals.numpy())
        _compare_pedals(account, presses, pedals, scale)
        ends += [int(_intervals(notes[1])[:, 1].max()), int(pedals[:, 1].max(initial=0))]
    _compare_tempos(account, clocks[0][0], clocks[1][0], tempos)
    lasts = [
        float(seconds(np.array([end]), *clock)[0]) for end, clock in zip((arranged.end, max(ends)), clocks, strict=True)
    ]
    account["seconds_added"] += max(lasts[1] - lasts[0], 0)
    account["seconds_cut"] += max(lasts[0] - lasts[1], 0)
    return account


def spelled(found: Events, tempos: np.ndarray) -> Events:
    """The tempos of a score as their tokens spell them: rounded to the next of `tempos`; none if there are none."""
    if not len(tempos):
        return {name: values[:0] for name, values in found.items()}
    per_minute = 6e7 / np.maximum(found["mspq"], 1)
    nearest = tempos[np.abs(tempos[:, None] - per_minute).argmin(0)] if len(per_minute) else per_minute
    return found | {"mspq": np.rint(6e7 / nearest)}


def _raise(account: Account, name: str, amounts: np.ndarray) -> None:
    account[name] = max(account[name], float(amounts.max(initial=0)))


def _intervals(found: Events) -> np.ndarray:
    """First and last tick of notes or pedals, int64 (N, 2)."""
    start = found["time"].astype(np.int64)
    return np.stack([start, start + found["duration"]], 1)


def _moved(old: np.ndarray, new: np.ndarray, scale: tuple[int, int]) -> np.ndarray:
    """How much later or longer in beats, float64, exactly 0 if equal; `scale` is the ticks per beat of both."""
    moved: np.ndarray = (new.astype(np.int64) * scale[0] - old.astype(np.int64) * scale[1]) / (scale[0] * scale[1])
    return moved


def _compare_notes(account: Account, old: Notes, new: Notes, scale: tuple[int, int]) -> None:
    account["notes_out"] += len(new["time"])
    onset = np.abs(_moved(old["time"], new["time"], scale))
    account["onsets_moved"] += int((onset > 0).sum())
    account["onset_moved_beats"] += float(onset.sum())
    _raise(account, "onset_moved_beats_max", onset)
    longer = _moved(old["duration"], new["duration"], scale)
    account["notes_shortened"] += int((longer < 0).sum())
    account["beats_cut"] += float(-longer[longer < 0].sum())
    account["notes_lengthened"] += int((longer > 0).sum())
    account["beats_added"] += float(longer[longer > 0].sum())
    _raise(account, "length_changed_beats_max", np.abs(longer))
    louder = np.abs(new["velocity"].astype(int) - old["velocity"])
    account["velocities_changed"] += int((louder > 0).sum())
    account["velocity_changed_steps"] += int(louder.sum())
    _raise(account, "velocity_changed_steps_max", louder)


def _compare_pedals(account: Account, old: np.ndarray, new: np.ndarray, scale: tuple[int, int]) -> None:
    """Count the pedals that merged on the grid; of the others, how far the ends of each moved at most."""
    account["pedals_out"] += len(new)
    account["pedals_merged"] += len(old) - len(new)
    for before, after in zip(old.T, new.T, strict=True):
        if len(after):
            there = after * scale[0] / scale[1]
            place = np.clip(np.searchsorted(before, there), 1, max(len(before) - 1, 1))
            near = np.stack([before[place - 1], before[np.minimum(place, len(before) - 1)]])
            _raise(account, "pedal_moved_beats_max", np.abs(near - there).min(0) / scale[0])


def _compare_tempos(account: Account, old: Events, new: Events, tempos: np.ndarray) -> None:
    if not len(tempos):
        account["tempos_dropped"] += int((old["mspq"] != DEFAULT_MSPQ).sum())
        return
    per_minute = 6e7 / np.maximum(old["mspq"], 1)
    nearest = spelled(old, tempos)["mspq"]
    clipped = (per_minute < tempos.min() - 0.005) | (per_minute > tempos.max() + 0.005)
    account["tempos_clipped"] += int(clipped.sum())
    account["tempos_rounded"] += int(((np.abs(nearest / np.maximum(old["mspq"], 1) - 1) > 1e-5) & ~clipped).sum())
    inserted = not len(old["time"]) or old["time"][0] > 0
    account["tempos_dropped"] += len(old["time"]) + inserted - len(new["time"])
