"""Audio: EnCodec's codes, frame by frame; the natural unit is the second.

Codebook q's code c of a frame is the id q * 1024 + c, the codebooks of a frame one after the other; the end id follows.
Any rate, width and number of channels that libsndfile reads becomes 24 kHz mono, in blocks.
"""

import gzip
import hashlib
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from shortcut_cli import files
from shortcut_cli.codec import weights
from shortcut_cli.errors import CheckFailed, Rejected
from shortcut_cli.recipe import Keys
from shortcut_cli.tokenizers.base import Assign, Document, Guide, Piece, Source, Tokenizer

FORMAT = 1
SAMPLE_RATE_HZ = 24_000
FRAMES_A_SECOND = 75
CODES = 1024
READ_FRAMES = 1 << 16
BLOCK_IDS = 1 << 20


class AudioOptions(Keys):
    """[tokenizer] of audio."""

    name: Literal["audio"] = Field(description="the domain")
    weights: str = Field(
        "encodec_24khz",
        description="encodec_24khz (fetched once), the path of a checkpoint of the encodec package, or untrained:SEED "
        "(for tests)",
    )
    codebooks: int = Field(1, description="of 1,024 codes each, 0.75 kbit/s each; 1 is the coarse stream", ge=1, le=32)


class AudioTokenizer(Tokenizer):
    """Sound files <-> ids."""

    Options = AudioOptions
    unit: ClassVar[str] = "second"
    suffixes: ClassVar[tuple[str, ...]] = tuple(
        suffix + packed for packed in ("", ".gz") for suffix in (".wav", ".flac", ".ogg", ".mp3")
    )
    extension: ClassVar[str] = ".wav"

    def __init__(self, options: AudioOptions, state: bytes = b"") -> None:
        self.options = options
        self.state = state  # the bytes of a checkpoint that came with a run, instead of a file of this machine

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "state": self.state}

    @cached_property
    def codec(self) -> Any:
        """The codec with its weights."""
        from shortcut_cli.codec import encodec

        return encodec.Codec(self._model(), round(encodec.BLOCK_FRAMES * self.block_scale))

    def _model(self) -> Any:
        from shortcut_cli.codec import encodec

        seed = weights.seed(self.options.weights)
        if seed is not None:
            return encodec.untrained(seed)
        if not self.state:
            return encodec.load(weights.resolve(self.options.weights))
        with tempfile.TemporaryDirectory(prefix="shortcut-") as folder:
            path = Path(folder) / "weights.th"
            path.write_bytes(self.state)
            return encodec.load(path)

    @property
    def vocabulary(self) -> int:
        """1,024 ids a codebook, and the end id."""
        return self.options.codebooks * CODES + 1

    @property
    def end(self) -> int:
        """The last id."""
        return self.options.codebooks * CODES

    @property
    def stride(self) -> int:
        """The codebooks of a frame belong together."""
        return self.options.codebooks

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights' bytes (or seed), the number of codebooks, and the resampler's version."""
        parts = [FORMAT, self._weights_sha256, self.options.codebooks, _versions()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def _weights_sha256(self) -> str:
        if weights.seed(self.options.weights) is not None:
            return self.options.weights
        if self.state:
            return hashlib.sha256(self.state).hexdigest()
        return files.sha256(weights.resolve(self.options.weights))

    @property
    def description(self) -> dict[str, str | int | float]:
        """Library versions and the hash of the weights."""
        return {"library": _versions(), "weights_sha256": self._weights_sha256}

    def survey(self, source: Source) -> Iterator[Document]:
        """One document, its ids staged. Raises Rejected where it can't be read, or a sample is not finite."""
        sidecar = source.staged.with_name(source.staged.name + ".json")
        if not (source.staged.exists() and sidecar.exists()):
            length = Length()
            with files.writing(source.staged) as stream:
                for ids in self._ids(source.path, length):
                    stream.write(ids.astype("<u2").tobytes())
                files.write(sidecar, json.dumps({"second": length.seconds}))
        units = json.loads(sidecar.read_text())
        yield Document(source.sha256, source.start, source.staged.stat().st_size // 2, units)

    def _ids(self, path: Path, length: "Length") -> Iterator[np.ndarray]:
        first = np.arange(self.options.codebooks) * CODES
        for codes in self.codec.encode(read_samples(path, length, self.block_scale), self.options.codebooks):
            yield (codes + first).reshape(-1)  # (frames Q,)

    def encode(self, source: Source, assign: Assign, threads: int) -> Iterator[Piece]:
        """The staged ids; cuts are moved to the beginning of a frame."""
        del threads
        (document,) = self.survey(source)
        ids = np.memmap(source.staged, "<u2", "r")
        first = asked = 0
        for split, size in assign(document):
            asked += size
            end = asked - asked % self.stride
            part = ids[first:end]
            whole = len(part) == document.size
            units = document.units if whole else {"second": len(part) / self.stride / FRAMES_A_SECOND}
            yield Piece(document, split, units, _blocks(part))
            first = end

    def prompt(self, path: Path) -> np.ndarray:
        """The ids of one file."""
        return np.concatenate(list(self._ids(path, Length())))

    def decode(self, ids: Sequence[int], path: Path) -> dict[str, float]:
        """Write 24 kHz mono PCM16; an unfinished last frame is left out."""
        import soundfile

        found = np.array(ids, np.int64)
        ends = np.flatnonzero(found == self.end)
        found = found[: ends[0]] if len(ends) else found
        frames = found[: len(found) - len(found) % self.stride].reshape(-1, self.stride)
        codes = frames - np.arange(self.stride) * CODES
        assert ((codes >= 0) & (codes < CODES)).all(), "ids out of turn: sample with `allowed`"
        count = 0
        with files.writing(path) as stream:
            kind = {"samplerate": SAMPLE_RATE_HZ, "channels": 1, "format": "WAV", "subtype": "PCM_16"}
            with soundfile.SoundFile(stream, "w", **kind) as sound:
                for samples in self.codec.decode([codes]) if len(codes) else ():
                    sound.write(samples.clip(-1, 1))
                    count += len(samples)
        return {"second": count / SAMPLE_RATE_HZ}

    def guide(self) -> Guide:
        """The codes of the codebook whose turn it is; the end only between frames, and not first."""
        return Turns(self._turns)

    @cached_property
    def _turns(self) -> np.ndarray:
        """Masks (Q + 1, V): one for each codebook, and that of the beginning last."""
        book = np.arange(self.vocabulary) // CODES
        masks = book == np.array([*range(self.stride), 0])[:, None]
        masks[0, self.end] = True
        return masks

    def save(self, folder: Path) -> None:
        """tokenizer.json; and the weights, but those that have an official name or a seed."""
        content = {"format": FORMAT, "weights": self.options.weights, "sha256": self._weights_sha256}
        files.write(folder / "tokenizer.json", json.dumps(content, indent=1) + "\n")
        named = self.options.weights in weights.OFFICIAL or weights.seed(self.options.weights) is not None
        if not named:
            files.write(folder / "weights.th", self.state or weights.resolve(self.options.weights).read_bytes())

    @classmethod
    def load(cls, options: Keys, folder: Path) -> "AudioTokenizer":
        """Raises CheckFailed where the files are not an audio tokenizer's, or the weights are others."""
        assert isinstance(options, AudioOptions), options
        try:
            sha256 = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["sha256"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckFailed(f"{folder} does not hold an audio tokenizer: {error!r}") from error
        own = folder / "weights.th"
        loaded = cls(options, own.read_bytes() if own.is_file() else b"")
        if loaded._weights_sha256 != sha256:
            raise CheckFailed(f"the codec weights {options.weights} are not those that the tokens were made with")
        return loaded


def _blocks(ids: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(ids), BLOCK_IDS):
        yield ids[start : start + BLOCK_IDS]


class Turns(Guide):
    """Follows the frames of a sample."""

    def __init__(self, masks: np.ndarray) -> None:
        self.masks = masks  # (Q + 1, V)
        self.count = 0

    @property
    def least(self) -> int:  # type: ignore[override]
        """A whole frame."""
        return max(0, len(self.masks) - 1 - self.count)

    def allowed(self, left: int) -> np.ndarray:
        """The codes of one codebook."""
        del left
        return np.asarray(self.masks[self.count % (len(self.masks) - 1) if self.count else -1])

    def push(self, token: int) -> None:
        """One more code."""
        del token
        self.count += 1


def _versions() -> str:
    return f"encodec {version('encodec')}, soxr {version('soxr')}"


class Length:
    """Seconds of sound that were read, from the samples themselves."""

    def __init__(self) -> None:
        self.seconds = 0.0


def read_samples(path: Path, length: Length, scale: float = 1.0) -> Iterator[np.ndarray]:
    """The samples of a sound file, 24 kHz mono, float32 blocks; `length` is complete at the end.

    scale: size of the blocks, relative to READ_FRAMES; the samples do not depend on it.

    Raises Rejected where libsndfile can't read the file, or where there is no sample or one that is not finite.
    """
    import soundfile

    with _plain(path) as opened:
        try:
            with soundfile.SoundFile(opened) as sound:
                yield from _resampled(sound, length, round(READ_FRAMES * scale))
        except soundfile.LibsndfileError as error:
            raise Rejected(f"can't be read by libsndfile: {error.error_string.rstrip('.')}") from error
        except TypeError as error:
            # soundfile takes .raw and files without header for raw samples of unknown form.
            raise Rejected("has no header that says its format") from error


def _resampled(sound: Any, length: Length, frames: int) -> Iterator[np.ndarray]:
    import soxr

    rate_hz = sound.samplerate
    resampler = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32")
    count = 0
    while len(block := sound.read(frames, dtype="float32", always_2d=True)):
        mono = block.mean(axis=1)
        if not np.isfinite(mono).all():
            raise Rejected(f"has a sample that is not a finite number, at {count + int(np.isfinite(mono).argmin())}")
        count += len(mono)
        yield mono if rate_hz == SAMPLE_RATE_HZ else resampler.resample_chunk(mono)
    if not count:
        raise Rejected("has no samples")
    if rate_hz != SAMPLE_RATE_HZ:
        yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    length.seconds = count / rate_hz


@contextmanager
def _plain(path: Path) -> Iterator[Path]:
    """The file itself, or an unpacked copy in a temporary folder, since libsndfile reads no gzip."""
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
