"""Reading sound files: any rate, width and number of channels that libsndfile supports, in blocks."""

import gzip
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_cli.errors import Rejected

READ_FRAMES = 1 << 16
SUFFIXES = tuple(suffix + packed for packed in ("", ".gz") for suffix in (".wav", ".flac", ".ogg", ".mp3"))


class SoundReader:
    """Reads a sound file once: iterating yields its samples, float32 blocks, mono (N,) or stereo (N, 2).

    After the last block, `seconds` is the length of the file.

    scale: size of the blocks, relative to READ_FRAMES; the samples do not depend on it.

    Iterating raises Rejected if libsndfile can't read the file, if it has no samples, or if one is not finite.
    """

    def __init__(self, path: Path, scale: float = 1.0, *, rate_hz: int = 24_000, channels: int = 1) -> None:
        self.path = path
        self.block_frames = round(READ_FRAMES * scale)
        self.rate_hz = rate_hz
        self.channels = channels
        self.seconds = 0.0

    def __iter__(self) -> Iterator[np.ndarray]:
        import soundfile

        with _unpacked(self.path) as path:
            try:
                with soundfile.SoundFile(path) as sound:
                    yield from self._resampled(sound)
            except soundfile.LibsndfileError as error:
                raise Rejected(f"can't be read by libsndfile: {error.error_string.rstrip('.')}") from error
            except TypeError as error:
                # soundfile takes .raw and files without a header for raw samples, and asks for their format.
                raise Rejected("has no header that says its format") from error

    def _resampled(self, sound: Any) -> Iterator[np.ndarray]:
        import soxr

        own_hz = sound.samplerate
        resampler = soxr.ResampleStream(own_hz, self.rate_hz, self.channels, dtype="float32")
        count = 0
        while len(block := sound.read(self.block_frames, dtype="float32", always_2d=True)):
            mixed = block.mean(axis=1) if self.channels == 1 else _stereo(block)
            finite = np.isfinite(mixed) if self.channels == 1 else np.isfinite(mixed).all(axis=1)
            if not finite.all():
                raise Rejected(f"has a sample that is not a finite number, at {count + int(finite.argmin())}")
            count += len(mixed)
            yield mixed if own_hz == self.rate_hz else resampler.resample_chunk(mixed)
        if not count:
            raise Rejected("has no samples")
        if own_hz != self.rate_hz:
            yield resampler.resample_chunk(mixed[:0], last=True)
        self.seconds = count / own_hz


def _stereo(block: np.ndarray) -> np.ndarray:
    """Two channels unchanged; one channel, or the mean of more than two, twice."""
    if block.shape[1] == 2:
        return block
    return np.repeat(block.mean(axis=1, keepdims=True), 2, axis=1)


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """The file itself, or, since libsndfile reads no gzip, an unpacked copy in a temporary folder."""
    if path.suffix.lower() != ".gz":
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="shortcut-") as folder:
        copy = Path(folder) / path.stem
        try:
            with gzip.open(path) as packed, open(copy, "wb") as stream:
                shutil.copyfileobj(packed, stream)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise Rejected(f"is not a whole gzip file: {error}") from error
        yield copy
