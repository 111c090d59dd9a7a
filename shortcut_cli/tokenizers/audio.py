"""Audio: a codec's codes, frame by frame; the natural unit is the second.

Codebook q's code c of a frame is the id q * 1024 + c, the codebooks of a frame one after the other; the end id follows.
Any rate, width and number of channels that libsndfile reads becomes 24 kHz mono, in blocks. EnCodec's 48 kHz stereo
model codes segments of one second, each brought to one loudness: that loudness, in dB below full scale, comes before
the codes of its segment, as one of 64 more ids.
"""

import gzip
import hashlib
import itertools
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
from shortcut_cli.codec.stream import CODES, HOP, LEVELS, MONO, Layout
from shortcut_cli.errors import CheckFailed, Rejected, UsageError
from shortcut_cli.recipe import Keys
from shortcut_cli.tokenizers.base import Assign, Classes, Document, Excerpt, Guide, Piece, Source, Tokenizer

FORMAT = 1
READ_FRAMES = 1 << 16
SILENCE_DB = 30  # below the loudest frame
BLOCK_IDS = 1 << 20
# Files up to here share EnCodec's LSTM, which makes encoding 1.4 times as fast where eight are under way. It slows a
# file down that is alone, whose codes must not depend on whether there are others. A minute or two of sound.
SMALL_BYTES = 4_000_000
GROUP = 16


class AudioOptions(Keys):
    """[tokenizer] of audio."""

    name: Literal["audio"] = Field(description="the domain")
    weights: str = Field(
        "encodec_24khz",
        description="mini (comes with shortcut), encodec_24khz or encodec_48khz (fetched once), the path of a codec.pt "
        "or of a checkpoint of the encodec package, or untrained:SEED (for tests)",
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
        """The codec with its weights. Raises UsageError where it has fewer codebooks than the recipe asks for."""
        from shortcut_cli.codec import encodec, opening

        with self._file() as path:
            block_frames = round(encodec.BLOCK_FRAMES * self.block_scale)
            if path is None:
                codec = opening.codec(self.options.weights, block_frames)
            else:
                codec = opening.of_file(path, block_frames)
        if self.options.codebooks > codec.codebooks:
            raise UsageError(
                f"tokenizer.codebooks is {self.options.codebooks}, but {self.options.weights} has {codec.codebooks}",
                f"--set tokenizer.codebooks={codec.codebooks}",
            )
        return codec

    @cached_property
    def layout(self) -> Layout:
        """What sound the codec takes, and how its codes come."""
        known = weights.layout(self.options.weights)
        if known is not None:
            return known
        from shortcut_cli.codec import opening

        with self._file() as path:
            return opening.layout(path or weights.resolve(self.options.weights))

    @contextmanager
    def _file(self) -> Iterator[Path | None]:
        """The checkpoint that came with a run, as a file; None where the weights are to be found by their name."""
        if not self.state:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="shortcut-") as folder:
            path = Path(folder) / "weights.th"
            path.write_bytes(self.state)
            yield path

    @property
    def vocabulary(self) -> int:
        """1,024 ids a codebook, the levels where there are segments, and the end id."""
        return self.end + 1

    @property
    def end(self) -> int:
        """The last id."""
        return self.options.codebooks * CODES + (LEVELS if self.layout.segment else 0)

    @property
    def stride(self) -> int:
        """The codebooks of a frame belong together, or a whole segment with its level."""
        return self.options.codebooks * (self.layout.frames or 1) + bool(self.layout.segment)

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

    def group(self, sources: Sequence[Source], n_workers: int) -> list[list[Source]]:
        """Large files alone and first; small ones by size, several together, and fewer of them towards the end."""
        known = weights.layout(self.options.weights)
        if self.options.weights in weights.EMBEDDED or (known and known.segment):
            return super().group(sources, n_workers)
        rest = sorted(sources, key=lambda source: -_bytes(source.path))
        groups = [[source] for source in rest if _bytes(source.path) > SMALL_BYTES]
        rest = rest[len(groups) :]
        while rest:
            count = min(max(1, len(rest) // (2 * n_workers)), GROUP)
            groups.append(rest[:count])
            rest = rest[count:]
        return groups

    def survey(self, source: Source) -> Iterator[Document]:
        """One document, its ids staged. Raises Rejected where it can't be read, or a sample is not finite."""
        if not _is_staged(source):
            length = Length()
            with files.writing(source.staged) as stream:
                for ids in self._ids(source.path, length):
                    stream.write(ids.astype("<u2").tobytes())
                files.write(_sidecar(source), json.dumps({"second": length.seconds}))
        units = json.loads(_sidecar(source).read_text())
        yield Document(source.sha256, source.start, source.staged.stat().st_size // 2, units)

    def stage(self, sources: Sequence[Source]) -> None:
        """Small files that EnCodec encodes together; a file that can't be read is left to its survey."""
        wanted = [source for source in sources if not _is_staged(source) and self._is_small(source.path)]
        lengths = [Length() for _ in wanted]
        found: list[list[bytes]] = [[] for _ in wanted]
        streams = (self._samples(source.path, length) for source, length in zip(wanted, lengths, strict=True))
        for number, codes in self.codec.encode_many(streams, self.options.codebooks) if wanted else ():
            if isinstance(codes, np.ndarray):
                found[number].append((codes + self._first).astype("<u2").tobytes())
                continue
            if codes is None:
                files.write(_sidecar(wanted[number]), json.dumps({"second": lengths[number].seconds}))
                files.write(wanted[number].staged, b"".join(found[number]))
            found[number] = []

    def _is_small(self, path: Path) -> bool:
        """Whether a file goes through the LSTM together with others: for EnCodec, by the file's size."""
        from shortcut_cli.codec import encodec

        return isinstance(self.codec, encodec.Codec) and _bytes(path) <= SMALL_BYTES

    def _samples(self, path: Path, length: "Length") -> Iterator[np.ndarray]:
        return read_samples(path, length, self.block_scale, self.layout)

    @property
    def _first(self) -> np.ndarray:
        """The first id of each codebook (Q,)."""
        return np.arange(self.options.codebooks) * CODES

    def _ids(self, path: Path, length: "Length") -> Iterator[np.ndarray]:
        samples, books = self._samples(path, length), self.options.codebooks
        if self._is_small(path):
            for _, codes in self.codec.encode_many([samples], books):
                if isinstance(codes, Rejected):
                    raise codes
                if codes is not None:
                    yield (codes + self._first).reshape(-1)  # (frames Q,)
        elif not self.layout.segment:
            for codes in self.codec.encode(samples, books):
                yield (codes + self._first).reshape(-1)  # (frames Q,)
        else:
            for level, codes in self.codec.encode(samples, books):
                yield np.concatenate(([books * CODES + level], (codes + self._first).reshape(-1)))  # (1 + frames Q,)

    def encode(self, source: Source, assign: Assign, threads: int) -> Iterator[Piece]:
        """The staged ids; cuts are moved to the beginning of a frame."""
        del threads
        (document,) = self.survey(source)
        ids = np.memmap(source.staged, "<u2", "r")
        first = asked = 0
        for split, size in assign(document):
            asked += size
            # The last segment of a file is shorter; the end of a document is no cut.
            end = asked if asked == document.size else asked - asked % self.stride
            part = ids[first:end]
            whole = len(part) == document.size
            units = document.units if whole else {"second": self.layout.seconds(self._frames(len(part)))}
            yield Piece(document, split, units, _blocks(part))
            first = end

    def prompt(self, path: Path) -> np.ndarray:
        """The ids of one file."""
        return np.concatenate(list(self._ids(path, Length())))

    def _frames(self, ids: int) -> int:
        """Frames in so many ids from the beginning of a segment on; an unfinished last one does not count."""
        whole, rest = divmod(ids, self.stride)
        return whole * (self.layout.frames or 1) + max(0, rest - 1) // self.options.codebooks

    def decode(self, ids: Sequence[int], path: Path) -> dict[str, float]:
        """Write PCM16 of the codec's rate and channels; an unfinished last frame is left out."""
        import soundfile

        found = np.array(ids, np.int64)
        ends = np.flatnonzero(found == self.end)
        found = found[: ends[0]] if len(ends) else found
        kind = {"samplerate": self.layout.rate_hz, "channels": self.layout.channels, "format": "WAV"}
        count = 0
        with files.writing(path) as stream, soundfile.SoundFile(stream, "w", **kind, subtype="PCM_16") as sound:
            for samples in self.codec.decode(self._coded(found)):
                sound.write(samples.clip(-1, 1))
                count += len(samples)
        return {"second": count / self.layout.rate_hz}

    def _coded(self, ids: np.ndarray) -> Iterator[Any]:
        """What the codec decodes: codes (frames, Q), or a level and codes for each segment."""
        books = self.options.codebooks
        segmented = bool(self.layout.segment)
        for first in range(0, len(ids), self.stride if segmented else BLOCK_IDS // books * books):
            part = ids[first : first + self.stride] if segmented else ids[first : first + BLOCK_IDS // books * books]
            rows = part[segmented:]
            codes = rows[: len(rows) - len(rows) % books].reshape(-1, books) - np.arange(books) * CODES
            assert ((codes >= 0) & (codes < CODES)).all(), "ids out of turn: sample with `allowed`"
            if len(codes):
                yield (int(part[0]) - books * CODES, codes) if segmented else codes

    def classes(self, ids: np.ndarray) -> dict[str, Classes]:
        """By codebook; and by the loudness of the frame, where the codec has no segments.

        A frame is silent where it is 30 dB or more below the loudest of the row.
        """
        books = self.options.codebooks
        names = [f"codebook {book + 1}" for book in range(books)] + ["level"] * bool(self.layout.segment) + ["end"]
        found = {"codebook": Classes(names, np.where(ids == self.end, len(names) - 1, ids // CODES))}
        if not self.layout.segment:
            loudness = np.full(len(ids), -np.inf)
            for first, end in self._whole_frames(ids):
                samples = self._sound(ids[first:end])
                power = np.square(samples.reshape((end - first) // books, -1)).mean(1)
                loudness[first:end] = np.repeat(10 * np.log10(power + 1e-12), books)
            silent = loudness < loudness.max() - SILENCE_DB
            found["loudness"] = Classes(["loud", "silent"], np.where(np.isinf(loudness), -1, silent))
        return found

    def _whole_frames(self, ids: np.ndarray) -> Iterator[tuple[int, int]]:
        """(first, end) of the rows of whole frames between end ids."""
        books = self.options.codebooks
        cuts = [-1, *np.flatnonzero(ids == self.end).tolist(), len(ids)]
        for before, after in itertools.pairwise(cuts):
            part = ids[before + 1 : after]
            begins = np.flatnonzero(part // CODES == 0)
            if len(begins):
                first = before + 1 + int(begins[0])
                end = first + (after - first) // books * books
                if end > first:
                    yield first, end

    def _sound(self, ids: np.ndarray) -> np.ndarray:
        return np.concatenate(list(self.codec.decode(self._coded(ids))))

    def excerpt(self, ids: np.ndarray) -> Excerpt:
        """The sound, that of a frame in equal parts for its codebooks; silence where no whole frame is.

        Nothing where the codec has segments.
        """
        if self.layout.segment:
            return Excerpt()
        books = self.options.codebooks
        share = HOP // books
        samples = np.zeros((len(ids), share), np.float32)
        for first, end in self._whole_frames(ids):
            frames = self._sound(ids[first:end]).reshape(-1, HOP)
            samples[first:end] = frames[:, : share * books].reshape(-1, share)
        return Excerpt(samples=samples.reshape(-1), rate_hz=self.layout.rate_hz)

    def guide(self) -> Guide:
        """The codes of the codebook whose turn it is; the end only between frames, and not first."""
        return Turns(self._masks, self.options.codebooks, self.stride if self.layout.segment else 0)

    @cached_property
    def _masks(self) -> np.ndarray:
        """Masks (Q + 2, V): for each codebook; that of the end alone; and the levels."""
        book = np.arange(self.vocabulary) // CODES
        books = self.options.codebooks
        masks = book == np.arange(books + 2)[:, None]
        masks[books:] = False
        masks[books, self.end] = True
        masks[books + 1, books * CODES : self.end] = True
        masks[:books, self.end] = False
        return masks

    def save(self, folder: Path) -> None:
        """tokenizer.json; and the weights, but those that have an official name or a seed."""
        content = {"format": FORMAT, "weights": self.options.weights, "sha256": self._weights_sha256}
        files.write(folder / "tokenizer.json", json.dumps(content, indent=1) + "\n")
        named = self.options.weights in weights.NAMES or weights.seed(self.options.weights) is not None
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


def _sidecar(source: Source) -> Path:
    """What a staged file does not say: the seconds."""
    return source.staged.with_name(source.staged.name + ".json")


def _is_staged(source: Source) -> bool:
    return source.staged.exists() and _sidecar(source).exists()


def _bytes(path: Path) -> int:
    """Size of a file; 0 where it is gone, as reading it will say."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _blocks(ids: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(ids), BLOCK_IDS):
        yield ids[start : start + BLOCK_IDS]


class Turns(Guide):
    """Follows the frames of a sample, and its segments where there are some."""

    def __init__(self, masks: np.ndarray, codebooks: int, segment: int) -> None:
        self.masks = masks  # (Q + 2, V): codebooks, end, levels
        self.codebooks = codebooks
        self.segment = segment  # ids of a segment, its level included; 0: no segments
        self.count = 0

    @property
    def least(self) -> int:  # type: ignore[override]
        """A whole frame, and the level before it."""
        return max(0, self.codebooks + bool(self.segment) - self.count)

    def allowed(self, left: int) -> np.ndarray:
        """The codes of one codebook, or the levels."""
        del left
        place = self.count % self.segment if self.segment else self.count
        turn = (place - bool(self.segment)) % self.codebooks
        if self.segment and place == 0:
            mask, between = self.masks[-1], True
        else:
            mask, between = self.masks[turn], turn == 0 and place > bool(self.segment)
        return np.asarray(mask | self.masks[-2] if between and self.count else mask)

    def push(self, token: int) -> None:
        """One more id."""
        del token
        self.count += 1


def _versions() -> str:
    return f"encodec {version('encodec')}, soxr {version('soxr')}"


class Length:
    """Seconds of sound that were read, from the samples themselves."""

    def __init__(self) -> None:
        self.seconds = 0.0


def read_samples(path: Path, length: Length, scale: float = 1.0, layout: Layout = MONO) -> Iterator[np.ndarray]:
    """The samples of a sound file, float32 blocks: mono (N,), or stereo (N, 2); `length` is complete at the end.

    scale: size of the blocks, relative to READ_FRAMES; the samples do not depend on it. layout: rate and channels.

    Raises Rejected where libsndfile can't read the file, or where there is no sample or one that is not finite.
    """
    import soundfile

    with _plain(path) as opened:
        try:
            with soundfile.SoundFile(opened) as sound:
                yield from _resampled(sound, length, round(READ_FRAMES * scale), layout)
        except soundfile.LibsndfileError as error:
            raise Rejected(f"can't be read by libsndfile: {error.error_string.rstrip('.')}") from error
        except TypeError as error:
            # soundfile takes .raw and files without header for raw samples of unknown form.
            raise Rejected("has no header that says its format") from error


def _resampled(sound: Any, length: Length, frames: int, layout: Layout) -> Iterator[np.ndarray]:
    import soxr

    rate_hz = sound.samplerate
    resampler = soxr.ResampleStream(rate_hz, layout.rate_hz, layout.channels, dtype="float32")
    count = 0
    while len(block := sound.read(frames, dtype="float32", always_2d=True)):
        mixed = block.mean(axis=1) if layout.channels == 1 else _stereo(block)
        finite = np.isfinite(mixed) if layout.channels == 1 else np.isfinite(mixed).all(axis=1)
        if not finite.all():
            raise Rejected(f"has a sample that is not a finite number, at {count + int(finite.argmin())}")
        count += len(mixed)
        yield mixed if rate_hz == layout.rate_hz else resampler.resample_chunk(mixed)
    if not count:
        raise Rejected("has no samples")
    if rate_hz != layout.rate_hz:
        yield resampler.resample_chunk(mixed[:0], last=True)
    length.seconds = count / rate_hz


def _stereo(block: np.ndarray) -> np.ndarray:
    """Two channels as they are; one twice; more than two, their mean twice."""
    if block.shape[1] == 2:
        return block
    return np.repeat(block.mean(axis=1, keepdims=True), 2, axis=1)


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
