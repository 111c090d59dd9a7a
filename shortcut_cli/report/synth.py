"""A small synthesiser: notes as sound, so that a page plays MIDI without a network or sound fonts.

A note of pitch p and velocity v, struck at 0 and released at d seconds, or at LONGEST_S if it is held longer, is

    x(t) = GAIN (v / 127)^1.5 a(t) r(t) sum of k^-s sin(2 pi k f t) exp(-t (1 + BEND (k - 1)) / T), k = 1 .. PARTIALS,

with f = 440 * 2^((p - 69) / 12) Hz; T = 1.6 * 2^((60 - p) / 24) s, so that high notes decay sooner; s = 2.2 - 1.2 w /
127, w being v rounded down to a multiple of VELOCITIES, so that loud notes are brighter; the attack a(t) = min(1, t /
ATTACK_S); and the release r(t) = 1 until d, then exp(-(t - d) / RELEASE_S) times a line to 0 at d + TAIL_S. Partials
from 0.45 of the sampling rate up are left out. Drums are bursts of noise, or, of low ones, falling sines. Every
instrument sounds the same.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RATE_HZ = 24_000
GAIN = 0.2
PARTIALS = 8
BEND = 0.3
VELOCITIES = 8
ATTACK_S, RELEASE_S = 0.004, 0.07
TAIL_S = 0.5  # after the last note; each is faded out over it
LONGEST_S = 12.0  # of a note; only low ones are still heard then
PEAK = 0.9  # louder music is turned down to it as a whole
LOW_DRUMS = {35: 55, 36: 60, 41: 80, 43: 95, 45: 110, 47: 130, 48: 150, 50: 170}  # General MIDI's, in Hz
LONG_DRUMS = {46, 49, 51, 52, 55, 57, 59}  # open hi-hat and cymbals

Samples = npt.NDArray[np.float32]


class Note(NamedTuple):
    """start, end: seconds; pitch: of a drum, its number in General MIDI."""

    start: float
    end: float
    pitch: int
    velocity: int
    drum: bool = False


def render(notes: Iterable[Note], seconds: float) -> Samples:
    """The sound of notes, float32 (N,) at RATE_HZ: `seconds` and TAIL_S long. None of its samples is beyond 1."""
    mixed = np.zeros(round((seconds + TAIL_S) * RATE_HZ), np.float32)
    for note in notes:
        first = round(note.start * RATE_HZ)
        tone = (drum(note) if note.drum else tone_of(note))[: max(0, len(mixed) - first)]
        mixed[first : first + len(tone)] += tone
    peak = float(np.abs(mixed).max(initial=0))
    return mixed * np.float32(min(1.0, PEAK / peak)) if peak else mixed


def tone_of(note: Note) -> Samples:
    """One note, float32, from its start until TAIL_S after its end."""
    force = note.velocity / 127
    held = min(LONGEST_S, max(0.0, note.end - note.start))
    count = round((held + TAIL_S) * RATE_HZ)
    tone = force**1.5 * _string(note.pitch, note.velocity // VELOCITIES * VELOCITIES, _whole(count))[:count]
    released = round(held * RATE_HZ)
    after = np.arange(count - released) / RATE_HZ
    tone[released:] *= np.exp(-after / RELEASE_S) * (1 - after / TAIL_S)  # zero at the end
    return np.asarray(tone, np.float32)


def _whole(count: int) -> int:
    """Round a number of samples up to half seconds, so that few lengths are computed."""
    return -(-count // (RATE_HZ // 2)) * (RATE_HZ // 2)


@lru_cache(maxsize=512)
def _string(pitch: int, velocity: int, count: int) -> Samples:
    """The sum of partials of a string that is not released, float32 (count,).

    sin(k x) = 2 cos(x) sin((k - 1) x) - sin((k - 2) x), and exp(-k y) = exp(-y) exp(-(k - 1) y).
    """
    hz, decay_s = 440 * 2 ** ((pitch - 69) / 12), 1.6 * 2 ** ((60 - pitch) / 24)
    time_s = np.arange(count) / RATE_HZ
    angle = 2 * np.pi * hz * time_s
    sine, before, twice = np.sin(angle), np.zeros(count), 2 * np.cos(angle)
    fall, faster = np.exp(-time_s / decay_s), np.exp(-BEND * time_s / decay_s)
    slope, total = 2.2 - 1.2 * velocity / 127, np.zeros(count)
    for number in range(1, PARTIALS + 1):
        if number * hz >= 0.45 * RATE_HZ:
            break
        total += number**-slope * sine * fall
        sine, before, fall = twice * sine - before, sine, fall * faster
    total *= GAIN * np.minimum(1, time_s / ATTACK_S)
    return np.asarray(total, np.float32)


def drum(note: Note) -> Samples:
    """A burst of noise that fades within a tenth of a second (cymbals: half a second), or a low drum's sine."""
    time_s = np.arange(round(TAIL_S * RATE_HZ)) / RATE_HZ
    fade = 1 - time_s / TAIL_S
    if hz := LOW_DRUMS.get(note.pitch):
        wave = np.sin(2 * np.pi * (hz * time_s - hz * time_s**2 / 2)) * np.exp(-time_s / 0.1)
    else:
        noise = np.random.default_rng(note.pitch).uniform(-1, 1, len(time_s))
        wave = noise * np.exp(-time_s / (0.2 if note.pitch in LONG_DRUMS else 0.04))
    return np.asarray(GAIN * (note.velocity / 127) ** 1.5 * wave * fade, np.float32)
