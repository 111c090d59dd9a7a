"""Reading MIDI files: checked, with melodic tracks merged into one piano if wanted, transposed or stretched."""

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_cli.errors import Rejected

MAX_BYTES = 1 << 26  # unpacked; the largest of 900 recitals and transcriptions has 0.3 MB
MAX_NOTES = 1_000_000  # MidiTok holds about 1.3 kB for each while it works
MAX_BEATS = 500_000  # about 70 hours at 120 beats per minute; a damaged delta time can claim years


def read_score(path: Path) -> Any:
    """Parse a MIDI file into a symusic score. Raises Rejected with the reason if that fails."""
    import symusic

    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Rejected(f"is not a whole gzip file: {error}") from error
    except OSError as error:
        raise Rejected(f"can't be read: {error.strerror}") from error
    if not content:
        raise Rejected("is empty")
    if not content.startswith(b"MThd"):
        raise Rejected(f"is not a MIDI file: it begins with {content[:8]!r}")
    if len(content) > MAX_BYTES:
        raise Rejected(f"is larger than {MAX_BYTES >> 20} MiB")
    try:
        score: Any = symusic.Score.from_midi(content)
    except (RuntimeError, ValueError) as error:
        raise Rejected(f"can't be parsed: {error}") from error
    if score.ticks_per_quarter <= 0:
        raise Rejected(f"has a time division of {score.ticks_per_quarter} ticks")
    return score


def arrange(score: Any, variant: str, *, programs: bool) -> Any:
    """The score to tokenize: all programs, or one piano without drums; transposed or stretched by `variant`.

    Raises Rejected if the score has no usable notes, is too large, or can't be transposed.
    """
    import symusic

    if not score.note_num():
        raise Rejected("has no notes")
    if score.note_num() > MAX_NOTES:
        raise Rejected(f"has {score.note_num():,} notes, more than {MAX_NOTES:,}")
    beats = score.end() / score.ticks_per_quarter
    if beats > MAX_BEATS:
        raise Rejected(f"claims to last {beats:,.0f} beats")
    if not programs:
        melodic = [track for track in score.tracks if not track.is_drum]
        piano: Any = symusic.Track(name="piano", program=0)
        for track in melodic:
            piano.notes.extend(track.notes)
        piano.notes.sort()
        if not len(piano.notes):
            raise Rejected("has only drums, and tokenizer.programs is off")
        score.tracks = [piano]
    kind, _, amount = variant.partition("=")
    if kind == "transpose":
        _transpose(score, int(amount))
    elif kind == "tempo":
        score = _stretch(score, float(amount))
    return score


def _transpose(score: Any, semitones: int) -> None:
    """Shift the melodic tracks in place. Raises Rejected if a note would leave the MIDI range."""
    melodic = [track for track in score.tracks if not track.is_drum and len(track.notes)]
    if not melodic:
        raise Rejected("has only drums, which are not transposed")
    pitches = np.concatenate([track.notes.numpy()["pitch"] for track in melodic]).astype(int) + semitones
    if pitches.min() < 0 or pitches.max() > 127:
        raise Rejected(f"has notes that a transposition by {semitones:+d} would move out of range")
    for track in melodic:
        track.shift_pitch(semitones, inplace=True)


def _stretch(score: Any, factor: float) -> Any:
    """The score with all times multiplied by the factor, rounded to ticks."""
    end = score.end()
    # symusic divides by the time between the two, which must not be zero.
    return score.adjust_time([0, end], [0, round(end * factor)]) if end else score


def natural_units(score: Any, notes: int) -> dict[str, float]:
    """Natural units of a score that holds `notes` notes."""
    # symusic gives the smallest float for zero seconds, hence the rounding.
    seconds = round(float(score.to("second").end()), 6)
    return {"note": notes, "beat": score.end() / score.ticks_per_quarter, "second": seconds}
