"""What all codecs share: frame rate, codebooks and layout, and re-blocking of streams."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

RATE_HZ = 24_000  # of all codecs but EnCodec's at 48 kHz
HOP = 320  # samples per frame: 75 frames per second at 24 kHz
CODES = 1024  # per codebook
CODEBOOK_KBPS = RATE_HZ / HOP * math.log2(CODES) / 1000  # bandwidth of one codebook at 24 kHz, kbit/s
LEVELS = 64  # loudness of a segment, in steps of 1 dB from 0 dB down


@dataclass(frozen=True)
class Layout:
    """The sound that a codec takes, and the form of its codes: a stream of frames, or segments with a loudness each."""

    rate_hz: int = RATE_HZ
    channels: int = 1
    segment: int = 0  # samples per segment; 0: no segments
    advance: int = 0  # samples from the start of a segment to the start of the next

    @property
    def frames(self) -> int:
        """Frames of a whole segment."""
        return self.segment // HOP

    def seconds(self, frames: int) -> float:
        """Duration of the sound that `frames` frames encode; overlapping segments are not counted twice."""
        samples = frames * HOP
        if self.segment:
            whole, rest = divmod(frames, self.frames)
            samples = whole * self.advance + rest * HOP
        return samples / self.rate_hz


MONO = Layout()
STEREO = Layout(48_000, 2, 48_000, 47_520)


def regular(blocks: Iterable[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, bool]]:
    """The same rows in blocks of `size`, each with whether it is the last one, which also takes the remainder."""
    held: list[np.ndarray] = []
    count = 0
    for block in blocks:
        held.append(block)
        count += len(block)
        if count >= 2 * size:
            rows = np.concatenate(held)
            first = 0
            while count - first >= 2 * size:
                yield rows[first : first + size], False
                first += size
            held, count = [rows[first:]], count - first
    if count:
        yield np.concatenate(held), True
