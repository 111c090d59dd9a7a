"""Sound as a picture: a mel spectrogram in dB, and the outline of its waveform."""

import math
from functools import cache

import numpy as np
import numpy.typing as npt

WINDOW_S = 0.043  # of the transform; 1,024 samples at 24 kHz
BANDS = 80
COLUMNS = 800  # at most
FASTEST_HZ = 1_000_000  # more is a damaged header, whose transform would take all memory
LOWEST_DB = -90.0  # of what is shown; full scale is 0
TICKS_HZ = (100, 500, 1000, 2000, 4000, 8000, 16000)

Floats = npt.NDArray[np.float64]


def mel(hz: float) -> float:
    """HTK's scale: 2595 log10(1 + f / 700)."""
    return 2595 * math.log10(1 + hz / 700)


@cache
def _bank(size: int, rate_hz: int) -> Floats:
    """Triangles of height 1, evenly spaced in mel from 0 to half the rate, (BANDS, size / 2 + 1)."""
    corners = np.linspace(0, mel(rate_hz / 2), BANDS + 2)
    places = np.array([mel(hz) for hz in np.arange(size // 2 + 1) * rate_hz / size])
    width = corners[1]
    triangles: Floats = np.maximum(0, 1 - np.abs(places - corners[1:-1, None]) / width)
    return triangles


def mel_db(samples: npt.NDArray[np.floating], rate_hz: int) -> Floats:
    """Loudness by band and time, dB (BANDS, columns), the lowest band first.

    The power of Hann windows around evenly spaced times, summed in triangles of the mel scale. 0 dB is about a sine
    of full scale: measured, from -2.4 to +1.7 dB, as the three bins that a window spreads it over meet a triangle or
    two. Column c is at (c + 1/2) / columns of the whole.

    Raises ValueError if the rate is none of sound.
    """
    if not 0 < rate_hz <= FASTEST_HZ:
        raise ValueError(f"a rate of {rate_hz:,} Hz")
    size = 1 << round(math.log2(WINDOW_S * rate_hz))
    columns = max(1, min(COLUMNS, 4 * len(samples) // size))
    middles = ((np.arange(columns) + 0.5) * len(samples) / columns).astype(int)
    padded = np.pad(samples.astype(np.float64), size, mode="symmetric")  # so that the ends are no clicks
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[middles + size // 2]  # around each middle
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    power = np.abs(np.fft.rfft(frames * window) / (window.sum() / 2)) ** 2  # (columns, size / 2 + 1)
    with np.errstate(divide="ignore"):
        found: Floats = 10 * np.log10(_bank(size, rate_hz) @ power.T)
    return np.maximum(found, LOWEST_DB)


def shades(loudness_db: Floats) -> npt.NDArray[np.uint8]:
    """A spectrogram as shades 0 (LOWEST_DB) to 255 (0 dB), uint8, the highest band on top."""
    scaled = 255 * (1 - loudness_db / LOWEST_DB)
    return np.asarray(np.round(scaled.clip(0, 255))[::-1], np.uint8)


def ticks(rate_hz: int) -> list[tuple[float, str]]:
    """(height from 0 to 1, words) of round frequencies below half the rate."""
    known = [hz for hz in TICKS_HZ if hz < 0.97 * rate_hz / 2]
    return [(mel(hz) / mel(rate_hz / 2), f"{hz:,}") for hz in known]


def outline(samples: npt.NDArray[np.floating], columns: int = COLUMNS) -> npt.NDArray[np.floating]:
    """The lowest and the highest sample in each of at most `columns` equal parts, (parts, 2)."""
    parts = min(columns, len(samples))
    starts = np.arange(parts) * len(samples) // max(1, parts)
    return np.stack([np.minimum.reduceat(samples, starts), np.maximum.reduceat(samples, starts)], 1)
