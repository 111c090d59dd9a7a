"""Audio: a codec's codes, frame by frame; the natural unit is the second.

Code c of codebook q is the id q * 1024 + c; a frame is the ids of its codebooks in order, and EOS is the last id.
Whatever libsndfile can read is converted to 24 kHz mono, in blocks (`data/sound.py`, which also says when a file is
damaged). EnCodec's 48 kHz stereo model encodes segments of
one second, each normalized in loudness: the loudness, in dB below full scale, precedes the codes of its segment as one
of 64 additional ids.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from shortcut_cli import files
from shortcut_cli.codec import weights
from shortcut_cli.codec.layout import CODES, HOP, LEVELS, Layout
from shortcut_cli.config.schema import Config
from shortcut_cli.data.documents import Assign, Chunk, Document, Source
from shortcut_cli.data.sound import READER_VERSION, SUFFIXES, Damaged, SoundReader
from shortcut_cli.errors import CheckFailed, Rejected, UsageError, in_short
from shortcut_cli.tokenizers.base import NO_LIMIT, Classes, Constraint, Excerpt, Tokenizer, Written

FORMAT = 1
SILENCE_DB = 30  # below the loudest frame
BLOCK_IDS = 1 << 20
# Files up to this size (a minute or two of sound) go through EnCodec's LSTM several at a time, which is faster. It is
# slower for a file on its own, but its codes must not depend on whether there are others.
SMALL_BYTES = 4_000_000
GROUP = 16  # such files in one group, at most
# From a prompt as it was recorded to the codec's rendering, of the prompt's own end. Equal power, since their waveforms
# hardly agree: with one codebook of `mini` their correlation is 0.2 on average, between 0.0 and 0.5.
CROSSFADE_S = 0.03


class AudioOptions(Config):
    """[tokenizer] of audio."""

    name: Literal["audio"] = Field(description="the domain")
    weights: str = Field(
        "encodec_24khz",
        description="mini (comes with shortcut), encodec_24khz or encodec_48khz (fetched once), the path of a codec.pt "
        "or of a checkpoint of the encodec package, or untrained:SEED (for tests)",
    )
    codebooks: int = Field(1, description="of 1,024 codes, 0.75 kbit/s each; 1 is the coarse stream", ge=1, le=32)
    damaged: Damaged = Field(
        "reject",
        description="files that are truncated, or can't be decoded to their end: reject; keep: take what is there and "
        "account for what is missing",
    )


class AudioTokenizer(Tokenizer):
    """Sound files <-> ids."""

    Options = AudioOptions
    unit: ClassVar[str] = "second"
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES
    extension: ClassVar[str] = ".wav"
    seam: ClassVar[dict[str, str | float]] = {
        "prompt": "as recorded",
        "crossfade": "equal power",
        "crossfade_s": CROSSFADE_S,  # or as long as the prompt, if that is shorter
    }

    def __init__(self, options: AudioOptions, state: bytes = b"") -> None:
        self.options = options
        self.state = state  # the bytes of a checkpoint stored with a run; empty: find the weights by their name

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "state": self.state}

    @cached_property
    def codec(self) -> Any:
        """The codec with its weights. Raises UsageError if it has fewer codebooks than the recipe asks for."""
        from shortcut_cli.codec import encodec, loading

        with self._file() as path:
            block_frames = round(encodec.BLOCK_FRAMES * self.block_scale)
            if path is None:
                codec = loading.codec(self.options.weights, block_frames)
            else:
                codec = loading.of_file(path, block_frames)
        if self.options.codebooks > codec.codebooks:
            raise UsageError(
                f"tokenizer.codebooks is {self.options.codebooks}, but {self.options.weights} has {codec.codebooks}",
                f"--set tokenizer.codebooks={codec.codebooks}",
            )
        return codec

    @cached_property
    def layout(self) -> Layout:
        """The codec's sampling rate and channels, and how its codes are arranged."""
        known = weights.layout(self.options.weights)
        if known is not None:
            return known
        from shortcut_cli.codec import loading

        with self._file() as path:
            return loading.layout(path or weights.resolve(self.options.weights))

    @contextmanager
    def _file(self) -> Iterator[Path | None]:
        """The checkpoint stored with a run, as a file; None if the weights are found by their name."""
        if not self.state:
            yield None
            return
        with files.temporary_folder() as folder:
            path = folder / "weights.th"
            path.write_bytes(self.state)
            yield path

    @property
    def vocabulary(self) -> int:
        """1,024 ids per codebook, the levels if the codec has segments, and EOS."""
        return self.eos + 1

    @property
    def eos(self) -> int:
        """The last id."""
        return self.options.codebooks * CODES + (LEVELS if self.layout.segment else 0)

    @property
    def stride(self) -> int:
        """The codebooks of a frame, or, if the codec has segments, a whole segment with its level."""
        return self.options.codebooks * (self.layout.frames or 1) + bool(self.layout.segment)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the weights' bytes (or seed), the number of codebooks, and the versions of reader and resampler.

        What to do with damaged files decides which files have ids, not what they are.
        """
        parts = [FORMAT, self._weights_sha256, self.options.codebooks, _versions(), READER_VERSION]
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
        """Library versions, the reader's version, and the hash of the weights."""
        return {"library": _versions(), "reader": READER_VERSION, "weights_sha256": self._weights_sha256}

    @property
    def depends_on(self) -> dict[str, str | int]:
        """Formats, library versions, and the weights."""
        return {
            "format": FORMAT,
            "library": _versions(),
            "reader": READER_VERSION,
            "weights_sha256": self._weights_sha256,
        }

    def group(self, sources: Sequence[Source], n_workers: int) -> Iterator[Sequence[int]]:
        """Large files first, each on its own; then small ones by size, in groups that get smaller towards the end."""
        known = weights.layout(self.options.weights)
        if self.options.weights in weights.EMBEDDED or (known and known.segment):
            yield from super().group(sources, n_workers)
            return
        sizes = np.fromiter((_bytes(source.path) for source in sources), np.int64, len(sources))
        rest = np.argsort(-sizes, kind="stable")
        large = int((sizes > SMALL_BYTES).sum())
        yield from ([place] for place in rest[:large].tolist())
        rest = rest[large:]
        while len(rest):
            count = min(max(1, len(rest) // (2 * n_workers)), GROUP)
            yield rest[:count].tolist()
            rest = rest[count:]

    def scan(self, source: Source) -> Iterator[Document]:
        """One document, its ids staged. Raises Rejected for what `SoundReader` does."""
        if not _is_staged(source):
            reader = self._reader(source.path, source.sha256)
            with files.writing(source.staged) as stream:
                for ids in self._ids(reader):
                    stream.write(ids.astype("<u2").tobytes())
                files.write(_sidecar(source), _sidecar_content(reader))
        content = json.loads(_sidecar(source).read_text())
        size = source.staged.stat().st_size // 2
        yield Document(source.sha256, source.start, size, content["units"], content["account"])

    def stage(self, sources: Sequence[Source]) -> None:
        """Stage small files, which EnCodec encodes together; a file that can't be read is left to its scan."""
        wanted = [source for source in sources if not _is_staged(source) and self._is_small(source.path)]
        readers = [self._reader(source.path, source.sha256) for source in wanted]
        found: list[list[bytes]] = [[] for _ in wanted]
        for number, codes in self.codec.encode_many(readers, self.options.codebooks) if wanted else ():
            if isinstance(codes, np.ndarray):
                found[number].append((codes + self._first).astype("<u2").tobytes())
                continue
            if codes is None:
                files.write(_sidecar(wanted[number]), _sidecar_content(readers[number]))
                files.write(wanted[number].staged, b"".join(found[number]))
            found[number] = []

    def _is_small(self, path: Path) -> bool:
        """Whether a file goes through the LSTM together with others: only in EnCodec, and up to SMALL_BYTES."""
        from shortcut_cli.codec import encodec

        return isinstance(self.codec, encodec.Codec) and _bytes(path) <= SMALL_BYTES

    def _reader(self, path: Path, sha256: str = "") -> SoundReader:
        """sha256: of the file that is meant; empty: any."""
        return SoundReader(
            path,
            self.block_scale,
            rate_hz=self.layout.rate_hz,
            channels=self.layout.channels,
            sha256=sha256,
            damaged=self.options.damaged,
        )

    @property
    def _first(self) -> np.ndarray:
        """The first id of each codebook (Q,)."""
        return np.arange(self.options.codebooks) * CODES

    def _ids(self, reader: SoundReader) -> Iterator[np.ndarray]:
        books = self.options.codebooks
        if self._is_small(reader.path):
            for _, codes in self.codec.encode_many([reader], books):
                if isinstance(codes, Rejected):
                    raise codes
                if codes is not None:
                    yield (codes + self._first).reshape(-1)  # (frames Q,)
        elif not self.layout.segment:
            for codes in self.codec.encode(reader, books):
                yield (codes + self._first).reshape(-1)  # (frames Q,)
        else:
            for level, codes in self.codec.encode(reader, books):
                yield np.concatenate(([books * CODES + level], (codes + self._first).reshape(-1)))  # (1 + frames Q,)

    def encode(self, source: Source, assign: Assign, threads: int) -> Iterator[Chunk]:
        """The staged ids; cuts are moved back to the beginning of a frame or segment."""
        del threads
        (document,) = self.scan(source)
        ids = np.memmap(source.staged, "<u2", "r")
        first = asked = 0
        for split, size in assign(document):
            asked += size
            # The last segment of a file can be shorter, so its end need not be a multiple of the stride.
            end = asked if asked == document.size else asked - asked % self.stride
            part = ids[first:end]
            whole = len(part) == document.size
            units = document.units if whole else {"second": self.layout.seconds(self._frames(len(part)))}
            yield Chunk(document, split, units, _blocks(part))
            first = end

    def prompt(self, path: Path, limit: Mapping[str, float] = NO_LIMIT) -> np.ndarray:
        """The ids of one file, up to the end of the block in which a limit is reached: what follows is not encoded.

        Codes never depend on later sound, beyond their segment if there are segments.

        Raises Rejected for what `SoundReader` does.
        """
        found: list[np.ndarray] = []
        for ids in self._ids(self._reader(path)):
            found.append(ids)
            if limit and self._reaches(sum(map(len, found)), limit):
                break
        return np.concatenate(found)

    def _reaches(self, count: int, limit: Mapping[str, float]) -> bool:
        """Whether so many ids are enough to say what a limit gives, and where else it could be."""
        if "tokens" in limit:
            return count >= limit["tokens"] + self.stride
        frames = self._frames(count)
        late = bool(frames) and self._ends(frames)[-1] > round(limit["seconds"] * self.layout.rate_hz, 6)
        return late and limit["seconds"] <= self.layout.seconds(frames)

    def _ends(self, frames: int) -> np.ndarray:
        """The sample at which each of the first frames ends, counted from the beginning of the file."""
        number, per = np.arange(frames), self.layout.frames or frames + 1
        ends: np.ndarray = number // per * self.layout.advance + (number % per + 1) * HOP
        return ends

    def whole(self, count: int) -> int:
        """The ids of whole frames, and of the levels before them."""
        begun = count // self.stride * self.stride
        rest = max(0, count - begun - bool(self.layout.segment)) // self.options.codebooks * self.options.codebooks
        return begun + rest + (bool(self.layout.segment) if rest else 0)

    def first(self, ids: np.ndarray, seconds: float) -> int:
        """The ids of the whole frames that end within the first seconds."""
        layout, total = self.layout, self._frames(len(ids))
        if seconds > layout.seconds(total):
            raise Rejected(f"has only {layout.seconds(total):.3f} s")
        per, late = layout.frames or total + 1, self._ends(total) > round(seconds * layout.rate_hz, 6)
        count = int(late.argmax()) if late.any() else total
        return count * self.options.codebooks + (-(-count // per) if layout.segment else 0)

    def _frames(self, ids: int) -> int:
        """Complete frames in this number of ids, counted from the beginning of a segment."""
        whole, rest = divmod(ids, self.stride)
        return whole * (self.layout.frames or 1) + max(0, rest - 1) // self.options.codebooks

    def decode(self, ids: Sequence[int], path: Path) -> dict[str, float]:
        """Write PCM16 at the codec's rate and channels; an incomplete last frame is dropped."""
        return {"second": self._write(self._rendered(ids), path)}

    def decode_after(
        self, ids: Sequence[int], path: Path, count: int, *, recorded: Path | None = None, only_new: bool = False
    ) -> Written:
        """The file that was recorded up to the end of the prompt, if it is given, then the codec's rendering."""
        end = round(self.layout.seconds(self._frames(count)) * self.layout.rate_hz)
        seconds = end / self.layout.rate_hz
        sound = self._rendered(ids)
        if only_new:
            return Written({"second": self._write(_after(sound, end), path)}, {"second": 0.0}, {"second": seconds})
        if recorded is not None:
            sound = joined(lambda: self._reader(recorded), sound, end, round(CROSSFADE_S * self.layout.rate_hz))
        return Written({"second": self._write(sound, path)}, {"second": seconds}, {"second": 0.0})

    def _rendered(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """What the codec makes of the ids before the first EOS: float32 blocks (N,), or (N, 2)."""
        found = np.array(ids, np.int64)
        ends = np.flatnonzero(found == self.eos)
        found = found[: ends[0]] if len(ends) else found
        sound: Iterator[np.ndarray] = self.codec.decode(self._coded(found))
        return sound

    def _write(self, blocks: Iterator[np.ndarray], path: Path) -> float:
        """Write blocks of sound, float32 or int16, and return their seconds."""
        import soundfile

        kind = {"samplerate": self.layout.rate_hz, "channels": self.layout.channels, "format": "WAV"}
        count = 0
        with files.writing(path) as stream:
            shielded = files.Shielded(stream)
            with soundfile.SoundFile(shielded, "w", **kind, subtype="PCM_16") as sound:
                for samples in blocks:
                    sound.write(samples if samples.dtype == np.int16 else samples.clip(-1, 1))
                    count += len(samples)
            shielded.check()
        return count / self.layout.rate_hz

    def _coded(self, ids: np.ndarray) -> Iterator[Any]:
        """What the codec decodes: codes (frames, Q), or, for each segment, its level and codes."""
        books = self.options.codebooks
        segmented = bool(self.layout.segment)
        for first in range(0, len(ids), self.stride if segmented else BLOCK_IDS // books * books):
            part = ids[first : first + self.stride] if segmented else ids[first : first + BLOCK_IDS // books * books]
            rows = part[segmented:]
            codes = rows[: len(rows) - len(rows) % books].reshape(-1, books) - np.arange(books) * CODES
            assert ((codes >= 0) & (codes < CODES)).all(), "ids out of order: sample under the constraint"
            if len(codes):
                yield (int(part[0]) - books * CODES, codes) if segmented else codes

    def classes(self, ids: np.ndarray) -> dict[str, Classes]:
        """By codebook; and, unless the codec has segments, by the loudness of the frame.

        A frame is silent if it is more than 30 dB below the loudest.
        """
        books = self.options.codebooks
        names = [f"codebook {book + 1}" for book in range(books)] + ["level"] * bool(self.layout.segment) + ["end"]
        found = {"codebook": Classes(names, np.where(ids == self.eos, len(names) - 1, ids // CODES))}
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
        """(first, end) of each run of complete frames between EOS ids."""
        books = self.options.codebooks
        cuts = [-1, *np.flatnonzero(ids == self.eos).tolist(), len(ids)]
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
        """The sound; each codebook of a frame gets an equal share of it, and incomplete frames are silent.

        Empty if the codec has segments.
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

    def constraint(self) -> Constraint:
        """The codes of each codebook in turn; EOS only between frames, and not at the start."""
        return FrameConstraint(self._masks, self.options.codebooks, self.stride if self.layout.segment else 0)

    @cached_property
    def _masks(self) -> np.ndarray:
        """Masks (Q + 2, V): one for each codebook, one for EOS, and one for the levels."""
        book = np.arange(self.vocabulary) // CODES
        books = self.options.codebooks
        masks: np.ndarray = book == np.arange(books + 2)[:, None]
        masks[books:] = False
        masks[books, self.eos] = True
        masks[books + 1, books * CODES : self.eos] = True
        masks[:books, self.eos] = False
        return masks

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and, unless they have an official name or a seed, the weights."""
        content = {"format": FORMAT, "weights": self.options.weights, "sha256": self._weights_sha256}
        files.write(folder / "tokenizer.json", json.dumps(content, indent=1) + "\n")
        named = self.options.weights in weights.NAMES or weights.seed(self.options.weights) is not None
        if not named:
            files.write(folder / "weights.th", self.state or weights.resolve(self.options.weights).read_bytes())

    @classmethod
    def load(cls, options: Config, folder: Path) -> "AudioTokenizer":
        """Raises CheckFailed if the files are not an audio tokenizer's, or the weights have changed."""
        assert isinstance(options, AudioOptions), options
        try:
            sha256 = json.loads(files.content(folder / "tokenizer.json"))["sha256"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckFailed(f"{folder} does not hold an audio tokenizer: {in_short(error)}") from error
        own = folder / "weights.th"
        loaded = cls(options, own.read_bytes() if own.is_file() else b"")
        if loaded._weights_sha256 != sha256:
            raise CheckFailed(f"the codec weights {options.weights} are not those that the tokens were made with")
        return loaded


def _after(blocks: Iterator[np.ndarray], start: int) -> Iterator[np.ndarray]:
    """The samples of a stream from number `start` on."""
    done = 0
    for block in blocks:
        if done + len(block) > start:
            yield block[max(0, start - done) :]
        done += len(block)


def joined(
    recorded: Callable[[], Iterable[np.ndarray]], rendered: Iterator[np.ndarray], end: int, fade: int
) -> Iterator[np.ndarray]:
    """A recording and a rendering of it that goes on beyond sample `end`, cross-faded into one stream, int16.

    Both are float32 blocks (N,) or (N, C). Up to `fade` samples before `end`, or before the recording's own end if that
    comes first, there is only the recording; a sample of 16 bits stays what it was. Then comes the fade, at equal
    power: cos and sin of the same angle.

    recorded: called twice: the first time to count, so that no more than a block is held.
    """
    length = 0
    for block in recorded():
        length = min(end, length + len(block))
        if length == end:
            break
    fade = min(fade, length)
    own, held, done = iter(recorded()), np.zeros(0, np.float32), 0
    for block in rendered:
        mixed = block.astype(np.float64)
        if count := min(len(block), max(0, length - done)):
            while len(held) < count:
                more = next(own)
                held = np.concatenate((held, more)) if len(held) else more
            angle = ((np.arange(done, done + count) + 0.5 - (length - fade)) / fade).clip(0) * (np.pi / 2)
            angle = angle.reshape(-1, *[1] * (block.ndim - 1))
            mixed[:count] = np.cos(angle) * held[:count] + np.sin(angle) * block[:count]
            held = held[count:]
        done += len(block)
        yield np.rint(mixed * 32768).clip(-32768, 32767).astype(np.int16)


def _sidecar(source: Source) -> Path:
    """The file beside a staged file with its units and its account."""
    return source.staged.with_name(source.staged.name + ".json")


def _sidecar_content(reader: SoundReader) -> str:
    return json.dumps({"units": {"second": reader.seconds}, "account": reader.account})


def _is_staged(source: Source) -> bool:
    return source.staged.exists() and _sidecar(source).exists()


def _bytes(path: Path) -> int:
    """Size of a file; 0 if it is gone, which reading it will report."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _blocks(ids: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(ids), BLOCK_IDS):
        yield ids[start : start + BLOCK_IDS]


class FrameConstraint(Constraint):
    """The codebooks of each frame in order, a level at the start of each segment, and at least one complete frame."""

    def __init__(self, masks: np.ndarray, codebooks: int, segment: int) -> None:
        self.masks = masks  # (Q + 2, V): codebooks, EOS, levels
        self.codebooks = codebooks
        self.segment = segment  # ids of a segment, including its level; 0: no segments
        self.count = 0  # ids so far

    @property
    def needed(self) -> int:  # type: ignore[override]
        """Ids still needed for the first frame and the level before it."""
        return max(0, self.codebooks + bool(self.segment) - self.count)

    def allowed(self, left: int) -> np.ndarray:
        """The codes of one codebook, or the levels; between frames also EOS."""
        del left
        place = self.count % self.segment if self.segment else self.count
        turn = (place - bool(self.segment)) % self.codebooks
        if self.segment and place == 0:
            mask, between = self.masks[-1], True
        else:
            mask, between = self.masks[turn], turn == 0 and place > bool(self.segment)
        return np.asarray(mask | self.masks[-2] if between and self.count else mask)

    def push(self, token: int) -> None:
        """Advance by one id."""
        del token
        self.count += 1


def _versions() -> str:
    return f"encodec {version('encodec')}, soxr {version('soxr')}"
