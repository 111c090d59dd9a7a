"""A piece as a MIDI file, and as sound: one struck string per note, in a small room."""

import struct
from functools import cache

import numpy as np
import numpy.typing as npt

from shortcut_cli.demo.composer import Note, Piece

Samples = npt.NDArray[np.float32]
TICKS_PER_BEAT = 480
TEMPO, METER, END_OF_TRACK = b"\xff\x51\x03", b"\xff\x58\x04", b"\xff\x2f\x00"
PROGRAM, NOTE_OFF, NOTE_ON = 0xC0, 0x80, 0x90  # on channel 0
RING_S = 4.0  # no note is longer
DAMPER_S = 0.12  # how long a string keeps sounding after its key is released
TAIL_S = 0.5  # after the last note of a recording
REVERB_S = 0.9  # time to fall by 60 dB
PARTIALS = 12
INHARMONICITY = 4e-4  # B, about that of a piano's middle strings: partial k has k sqrt(1 + B k^2) times the frequency


def render(piece: Piece, sample_rate_hz: int) -> npt.NDArray[np.int16]:
    """The sound of a piece, int16 (samples,), its peak at 0.7 of full scale; TAIL_S longer than its beats."""
    beat_s = 60 / piece.tempo_bpm
    dry = np.zeros(round((piece.beats * beat_s + TAIL_S) * sample_rate_hz), np.float32)
    for note in piece.notes:
        first = round(note.start * beat_s * sample_rate_hz)
        tone = _strike(note, beat_s, sample_rate_hz)
        dry[first : first + len(tone)] += tone
    wet = _reverberate(dry, sample_rate_hz)
    return np.asarray(np.round(wet * (0.7 * 32767 / np.abs(wet).max())), np.int16)


def _strike(note: Note, beat_s: float, sample_rate_hz: int) -> Samples:
    """A piano-like tone, float32 (samples,): the harder the key is struck, the louder and brighter it is."""
    force = note.velocity / 127
    soft, bright = _string(note.pitch, sample_rate_hz)[:, : round((note.length * beat_s + DAMPER_S) * sample_rate_hz)]
    tone = np.asarray(force**1.5 * ((1 - force) * soft + force * bright), np.float32)
    damped = round(DAMPER_S * sample_rate_hz)
    tone[-damped:] *= np.linspace(1, 0, damped, dtype=np.float32) ** 2
    return tone


@cache
def _string(pitch: int, sample_rate_hz: int) -> Samples:
    """A string struck softly and hard, float32 (2, samples): partials are slightly sharp, and high ones decay first."""
    number = np.arange(1, PARTIALS + 1)[:, None]  # (partials, 1)
    partial_hz = 440 * 2 ** ((pitch - 69) / 12) * number * np.sqrt(1 + INHARMONICITY * number**2)
    decay_s = 1.6 * 2 ** ((60 - pitch) / 24) / (1 + 0.3 * (number - 1))
    time_s = np.arange(round((RING_S + DAMPER_S) * sample_rate_hz)) / sample_rate_hz
    waves = np.sin(2 * np.pi * partial_hz * time_s) * np.exp(-time_s / decay_s)  # (partials, samples)
    waves *= partial_hz < 0.45 * sample_rate_hz  # no aliases
    spectra = np.stack([number[:, 0] ** -2.2, number[:, 0] ** -1.0])  # (2, partials)
    attack = np.minimum(time_s / 0.004, 1)
    # Not `@`: the last bits of what BLAS computes may depend on its threads.
    return np.asarray(np.einsum("sk,kt->st", spectra, waves) * attack, np.float32)


def _reverberate(dry: Samples, sample_rate_hz: int) -> Samples:
    """Add the reverberation of a small room, about 12 dB below: convolution with exponentially decaying noise."""
    samples = round(REVERB_S * sample_rate_hz)
    room = np.random.default_rng(0).standard_normal(samples) * 10 ** (-3 * np.arange(samples) / samples)
    size = 1 << (len(dry) + samples).bit_length()
    wet = np.fft.irfft(np.fft.rfft(dry, size) * np.fft.rfft(room / np.sqrt((room**2).sum()), size), size)
    return np.asarray(dry + 0.25 * wet[: len(dry)], np.float32)


def midi_bytes(piece: Piece) -> bytes:
    """A piece as a Standard MIDI File of format 0: tempo, meter, program 0 (acoustic grand piano), notes."""
    events = [
        (0, 0, TEMPO + round(60e6 / piece.tempo_bpm).to_bytes(3, "big")),  # microseconds per beat
        (0, 0, METER + bytes((piece.beats_per_bar, 2, 24, 8))),  # quarters, of 24 clocks and 8 thirty-seconds
        (0, 0, bytes((PROGRAM, 0))),
    ]
    for start, length, pitch, velocity in piece.notes:
        events.append((round(start * TICKS_PER_BEAT), 2, bytes((NOTE_ON, pitch, velocity))))
        events.append((round((start + length) * TICKS_PER_BEAT), 1, bytes((NOTE_OFF, pitch, 0))))
    track, now = b"", 0
    for tick, _, message in sorted(events):  # at the same tick, a key is released before it is struck again
        track += _variable_length(tick - now) + message
        now = tick
    track += b"\x00" + END_OF_TRACK
    return struct.pack(">4sIHHH4sI", b"MThd", 6, 0, 1, TICKS_PER_BEAT, b"MTrk", len(track)) + track


def _variable_length(number: int) -> bytes:
    """MIDI's variable-length quantity: seven bits per byte, with the high bit set on all but the last."""
    parts = [number & 0x7F]
    while number := number >> 7:
        parts.append(number & 0x7F | 0x80)
    return bytes(reversed(parts))
