"""MIDI: MidiTok's REMI, TSD or MIDI-Like tokens in one stream, with BPE on top if wanted; the unit is the note.

All 128 pitches have tokens, so that no note is dropped. Without program tokens all melodic tracks are one piano; drum
tracks are left out then, and a file of drums alone is rejected.
"""

import gzip
import hashlib
import json
import os
import sys
import tempfile
import warnings
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from shortcut_cli import files
from shortcut_cli.errors import CheckFailed, Rejected, UsageError
from shortcut_cli.recipe import Keys
from shortcut_cli.tokenizers.base import Assign, Classes, Document, Excerpt, Guide, Piece, Source, Tokenizer

FORMAT = 1
BLOCK_IDS = 1 << 20
MOST_BYTES = 1 << 26  # unpacked; the largest of 900 recitals and transcriptions has 0.3 MB
MOST_NOTES = 1_000_000  # MidiTok holds about 1.3 kB for each while it works
MOST_BEATS = 500_000  # about 70 hours at 120 beats a minute; a damaged delta time can claim years
SPECIAL = ("PAD", "BOS", "EOS")
IDENTITY = ("tokenization", "config")  # what MidiTok's JSON says of the ids below BPE
NOTE_TYPES = ("Pitch", "NoteOn", "PitchDrum", "DrumOn")
CLOSING_TYPES = ("Duration", "NoteOff", "DrumOff")  # what ends a note
TIME_TYPES = ("TimeShift", "Rest")
OPENING_TYPES = ("Bar", "TimeSig", "Tempo", "TimeShift", "Program", *NOTE_TYPES)


class MidiOptions(Keys):
    """[tokenizer] of midi."""

    name: Literal["midi"] = Field(description="the domain")
    scheme: Literal["REMI", "TSD", "MIDILike"] = Field("REMI", description="MidiTok's tokenization")
    tempos: bool = Field(True, description="tokens for tempo changes; without them everything is at 120 a minute")
    time_signatures: bool = Field(True, description="tokens for time signatures; without them everything is in 4/4")
    programs: bool = Field(False, description="tokens for instruments; without them all is one piano, without drums")
    velocities: int = Field(32, description="steps of loudness", ge=1, le=127)
    bpe: int = Field(0, description="vocabulary of a BPE on top, trained on the training split; 0: none", ge=0)
    transpose: list[int] = Field([], description="semitones by which training pieces are transposed, once for each")
    tempo_factors: list[float] = Field([], description="factors by which training pieces last longer, once for each")

    @field_validator("transpose")
    @classmethod
    def _other_keys(cls, semitones: list[int]) -> list[int]:
        if 0 in semitones or len(set(semitones)) < len(semitones):
            raise ValueError("semitones are different from each other and from 0, which is the piece itself")
        return semitones

    @field_validator("tempo_factors")
    @classmethod
    def _other_lengths(cls, factors: list[float]) -> list[float]:
        if not all(0.5 <= factor <= 2 for factor in factors):
            raise ValueError("factors lie between 0.5 and 2")
        names = {f"{factor:g}" for factor in factors}
        if "1" in names or len(names) < len(factors):
            raise ValueError("factors are different from each other and from 1, which is the piece itself")
        return factors


class MidiTokenizer(Tokenizer):
    """MIDI files <-> ids."""

    Options = MidiOptions
    unit: ClassVar[str] = "note"
    suffixes: ClassVar[tuple[str, ...]] = (".mid", ".midi", ".kar", ".mid.gz", ".midi.gz", ".kar.gz")
    extension: ClassVar[str] = ".mid"

    def __init__(self, options: MidiOptions, trained: str = "") -> None:
        self.options = options
        self.trained = trained  # MidiTok's own JSON, once BPE is trained

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "trained": self.trained}

    @property
    def base(self) -> Any:
        """MidiTok's tokenizer without BPE."""
        return _base(self.options.model_dump_json())

    @cached_property
    def full(self) -> Any:
        """MidiTok's tokenizer with BPE where there is one."""
        return _from_json(self.options.scheme, self.trained) if self.trained else self.base

    @property
    def vocabulary(self) -> int:
        """Ids of MidiTok, BPE included."""
        assert not self.needs_fit, "fit comes before vocabulary"
        return len(self.full)

    @property
    def end(self) -> int:
        """MidiTok's EOS_None."""
        return int(self.base["EOS_None"])

    @property
    def needs_fit(self) -> bool:
        """Whether BPE has to be trained."""
        return bool(self.options.bpe) and not self.trained

    @property
    def variants(self) -> list[str]:
        """A transposition or stretching each."""
        transposed = [f"transpose={semitones:+d}" for semitones in self.options.transpose]
        return transposed + [f"tempo={factor:g}" for factor in self.options.tempo_factors]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of MidiTok's configuration, the versions of MidiTok and symusic, and the BPE."""
        assert not self.needs_fit, "fit comes before fingerprint"
        config = self.base.config.to_dict(serialize=True)
        parts = [FORMAT, self.options.scheme, _versions(), config, self.trained]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def description(self) -> dict[str, str | int | float]:
        """Library versions."""
        return {"library": _versions()}

    def survey(self, source: Source) -> Iterator[Document]:
        """One document, its base ids staged. Raises Rejected where the file is no MIDI, or has no notes."""
        units = _staged_units(source)
        if units is None:
            ids, units = self._read(source.path, source.variant)
            content = ids.astype("<u2").tobytes()
            files.write(_sidecar(source), json.dumps([units, _sum(content)]), durable=False)
            files.write(source.staged, content, durable=False)
        name = source.sha256
        if source.variant:
            name = hashlib.sha256(f"{source.sha256} {source.variant}".encode()).hexdigest()
        yield Document(name, source.start, source.staged.stat().st_size // 2, units)

    def _read(self, path: Path, variant: str = "") -> tuple[np.ndarray, dict[str, float]]:
        """Base ids, int64 (T,), and natural units of a file."""
        score = self._prepare(read_score(path), variant)
        with warnings.catch_warnings():
            # MidiTok warns of time signatures that its vocabulary lacks, and goes on in the one before.
            warnings.simplefilter("ignore")
            sequences = self.base.encode(score, encode_ids=False)
        sequence = sequences[0] if isinstance(sequences, list) else sequences
        ids = np.array(sequence.ids, np.int64)
        return ids, _units(score, int(self.base_grammar.is_note[ids].sum()))

    def _prepare(self, score: Any, variant: str) -> Any:
        """One piano track, or all programs; transposed or stretched."""
        import symusic

        if not score.note_num():
            raise Rejected("has no notes")
        if score.note_num() > MOST_NOTES:
            raise Rejected(f"has {score.note_num():,} notes, more than {MOST_NOTES:,}")
        beats = score.end() / score.ticks_per_quarter
        if beats > MOST_BEATS:
            raise Rejected(f"claims to last {beats:,.0f} beats")
        if not self.options.programs:
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

    def fit(self, sources: Sequence[Source], assign: Assign) -> None:
        """Train BPE on the base ids of the training split. Raises UsageError where `bpe` is too small."""
        if self.options.bpe <= len(self.base):
            raise UsageError(
                f"tokenizer.bpe {self.options.bpe} is no larger than the {len(self.base)} tokens below it",
                f"--set tokenizer.bpe={4 * len(self.base)}",
            )
        full = _from_json(self.options.scheme, json.dumps(self.base.to_dict()))
        parts = [part for source in sources for part in self._training_parts(source, assign)]
        with _silent():
            # The merges do not depend on threads or on the order of files (measured): equal counts go by id.
            full.train(self.options.bpe, "BPE", iterator=_Corpus(full, parts))
        self.trained = json.dumps(full.to_dict(), sort_keys=True)

    def _training_parts(self, source: Source, assign: Assign) -> Iterator[tuple[Path, int, int]]:
        """(staged file, first id, number of ids) of what the training split gets of a source."""
        (document,) = self.survey(source)
        first = 0
        for split, size in assign(document):
            if split == "train":
                yield source.staged, first, size
            first += size

    def encode(self, source: Source, assign: Assign, threads: int) -> Iterator[Piece]:
        """The staged ids, with BPE where there is one; a part's beats and seconds are its share of the tokens."""
        del threads
        (document,) = self.survey(source)
        ids = np.memmap(source.staged, "<u2", "r")
        first = 0
        for split, size in assign(document):
            part = ids[first : first + size]
            first += size
            units = document.units if size == document.size else self._part_units(part, document)
            yield Piece(document, split, units, self._blocks(part))

    def _part_units(self, part: np.ndarray, document: Document) -> dict[str, float]:
        share = len(part) / document.size
        shares = {unit: document.units[unit] * share for unit in ("beat", "second")}
        return {"note": int(self.base_grammar.is_note[part].sum()), **shares}

    def _blocks(self, ids: np.ndarray) -> Iterator[np.ndarray]:
        if self.trained:
            yield self._compress(ids.tolist())
        else:
            yield from (ids[first : first + BLOCK_IDS] for first in range(0, len(ids), BLOCK_IDS))

    def _compress(self, ids: list[int]) -> np.ndarray:
        sequence = _miditok().TokSequence(ids=ids)
        self.full.encode_token_ids(sequence)
        return np.array(sequence.ids, np.int64)

    def prompt(self, path: Path) -> np.ndarray:
        """The ids of one file."""
        ids, _ = self._read(path)
        return self._compress(ids.tolist()) if self.trained else ids

    def classes(self, ids: np.ndarray) -> dict[str, Classes]:
        """By MidiTok's type; ids of a BPE that join several are a class of their own."""
        kinds, of_id = self._kinds
        return {"type": Classes(kinds, of_id[ids])}

    @cached_property
    def _kinds(self) -> tuple[list[str], np.ndarray]:
        of_id = ["joined" if len(words) > 1 else words[0].partition("_")[0] for words in self.grammar.spelled]
        of_id = ["end" if kind == "EOS" else kind for kind in of_id]
        kinds = sorted(set(of_id) - {"PAD", "BOS"})
        return kinds, np.array([kinds.index(kind) if kind in kinds else -1 for kind in of_id])

    def excerpt(self, ids: np.ndarray) -> Excerpt:
        """Notes, each from the token that makes it whole to that of the first note that begins after its end."""
        found: list[tuple[int, int, int, int, int]] = []  # token, start, end, pitch, velocity
        for token in range(len(ids)):
            words = self.grammar.spelled[int(ids[token])]
            if not any(word.partition("_")[0] in CLOSING_TYPES for word in words):
                continue
            notes = [note for track in self._score(ids[: token + 1])[0].tracks for note in track.notes]
            known = {(start, pitch) for _, start, _, pitch, _ in found}
            new = [note for note in notes if (note.start, note.pitch) not in known]
            found += [(token, note.start, note.end, note.pitch, note.velocity) for note in new]
        rows = [
            (token, min((other for other, start, *_ in found if start >= end), default=len(ids)), pitch, velocity)
            for token, _, end, pitch, velocity in found
        ]
        return Excerpt(notes=np.array(rows, np.int64).reshape(-1, 4))

    def decode(self, ids: Sequence[int], path: Path) -> dict[str, float]:
        """Write a MIDI file; the units have "dropped" too, the ids that were left out since they may not follow.

        MidiTok trusts the order of types: it takes what stands behind a pitch for its velocity, and writes files that
        no reader takes. What was encoded from a file, or sampled with `allowed`, loses nothing.
        """
        score, dropped = self._score(ids)
        files.write(path, score.dumps_midi())
        return _units(score, score.note_num()) | {"dropped": dropped}

    def _score(self, ids: Sequence[int] | np.ndarray) -> tuple[Any, int]:
        """What ids stand for up to the first end id, and how many of them were left out."""
        found = [int(i) for i in ids]
        found = found[: found.index(self.end)] if self.end in found else found
        legal = self.grammar.legal(found)
        sequence = _miditok().TokSequence(ids=list(legal))
        sequence.are_ids_encoded = bool(self.trained)
        one_stream = self.base.config.one_token_stream_for_programs
        return self.full.decode(sequence if one_stream else [sequence]), len(found) - len(legal)

    def guide(self) -> Guide:
        """What MidiTok's own table lets follow; the end only after a whole note, for which there is always room."""
        return Notes(self.grammar)

    @cached_property
    def grammar(self) -> "Grammar":
        """Which id may follow which."""
        return Grammar(self.full, self.end)

    @property
    def base_grammar(self) -> "Grammar":
        """The same for the ids below BPE."""
        return _base_grammar(self.options.model_dump_json())

    def save(self, folder: Path) -> None:
        """tokenizer.json: MidiTok's own."""
        content = self.trained or json.dumps(self.base.to_dict(), sort_keys=True)
        files.write(folder / "tokenizer.json", content + "\n")

    @classmethod
    def load(cls, options: Keys, folder: Path) -> "MidiTokenizer":
        """Raises CheckFailed where the file is not MidiTok's, or of another tokenizer than the options say."""
        assert isinstance(options, MidiOptions), options
        try:
            content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            identity = {key: content[key] for key in IDENTITY}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckFailed(f"{folder} does not hold a MIDI tokenizer: {error!r}") from error
        trained = "_model" in content
        loaded = cls(options, json.dumps(content, sort_keys=True) if trained else "")
        ours = json.loads(json.dumps(loaded.base.to_dict()))
        if identity != {key: ours[key] for key in IDENTITY} or trained != bool(options.bpe):
            raise CheckFailed(f"{folder} holds a MIDI tokenizer of another configuration than the recipe's")
        _ = loaded.full
        return loaded


def _miditok() -> Any:
    """MidiTok without its data sets for PyTorch, which it does without: their import takes four fifths of its time."""
    others = sys.modules.setdefault("miditok.pytorch_data", None)  # type: ignore[arg-type]
    import miditok

    if others is None:
        sys.modules.pop("miditok.pytorch_data", None)
    return miditok


@lru_cache(maxsize=8)
def _base(options: str) -> Any:
    """MidiTok's tokenizer without BPE for these options (JSON): made once a process, not for every file."""
    keys, library = MidiOptions.model_validate_json(options), _miditok()
    config = library.TokenizerConfig(
        pitch_range=(0, 127),
        drums_pitch_range=(0, 127),
        num_velocities=keys.velocities,
        special_tokens=list(SPECIAL),
        use_tempos=keys.tempos,
        use_time_signatures=keys.time_signatures,
        use_programs=keys.programs,
        use_pitchdrum_tokens=keys.programs,
        one_token_stream_for_programs=keys.programs,
        encode_ids_split="no",
    )
    return getattr(library, keys.scheme)(config)


@lru_cache(maxsize=8)
def _base_grammar(options: str) -> "Grammar":
    base = _base(options)
    return Grammar(base, int(base["EOS_None"]))


def _sidecar(source: Source) -> Path:
    """What a staged file does not say: the natural units, and a sum of its bytes."""
    return source.staged.with_name(source.staged.name + ".json")


def _sum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _staged_units(source: Source) -> dict[str, float] | None:
    """The units of what is staged; None where nothing is, or not all of it reached the disk."""
    try:
        units, expected = json.loads(_sidecar(source).read_bytes())
        found: dict[str, float] | None = units if _sum(source.staged.read_bytes()) == expected else None
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return found


class Grammar:
    """The types of all ids, and which may follow which: MidiTok's table of types, over a BPE's pieces where need be."""

    def __init__(self, tokenizer: Any, end: int) -> None:
        self.end = end
        self.spelled = _spelled(tokenizer)
        spelled = [[token.partition("_")[0] for token in tokens] for tokens in self.spelled]
        graph = tokenizer.tokens_types_graph
        self.graph = {kind: sorted(after - set(SPECIAL)) for kind, after in graph.items()}
        self.by_off = "NoteOff" in graph
        kinds = sorted(graph)
        place = {kind: number for number, kind in enumerate(kinds)}
        first = np.array([place[types[0]] for types in spelled])
        self.last = np.array([place[types[-1]] for types in spelled])
        self.musical = np.array([types[0] not in SPECIAL for types in spelled])
        self.is_note = np.array([any(t in NOTE_TYPES for t in types) for types in spelled])
        self.single: dict[str, list[tuple[str, int]]] = {}  # type -> (value, id) of the tokens that BPE left single
        for number, tokens in enumerate(self.spelled):
            if len(tokens) == 1:
                kind, _, value = tokens[0].partition("_")
                self.single.setdefault(kind, []).append((value, number))
        may = np.array([[b in graph[a] for b in kinds] for a in kinds])
        self.follows = may[:, first] & self.musical  # (kinds, V)
        opening = "Bar" if "Bar" in place else None
        starts = [opening] if opening else [kind for kind in OPENING_TYPES if kind in place]
        if not opening and "Program" in place:
            starts = [kind for kind in starts if kind not in NOTE_TYPES]
        self.beginning = np.isin(first, [place[kind] for kind in starts]) & self.musical
        self.opening_kinds = starts

    @cached_property
    def longest_plan(self) -> int:
        """Ids that a whole note takes at most, from wherever a sample can be."""
        lengths = []
        for kind in ["", *self.single]:
            guide = Notes(self)
            guide.kind, guide.begun = kind, kind in NOTE_TYPES
            if kind not in SPECIAL:
                lengths.append(len(guide.plan()))
        return max(lengths)

    def kinds_after(self, kind: str) -> list[str]:
        """The types that may follow a type, or begin a piece where it is empty."""
        return self.graph.get(kind, []) if kind else self.opening_kinds

    def example(self, kind: str, program: int, pitch: str) -> int:
        """An id of a type: with the pitch or program that is asked for, else the first."""
        known = dict(self.single[kind])
        wanted = pitch if kind in (*NOTE_TYPES, *CLOSING_TYPES) else str(program) if kind == "Program" else ""
        return known.get(wanted, self.single[kind][0][1])

    def legal(self, ids: Sequence[int]) -> list[int]:
        """The ids that may follow those kept before them; any token of music may be the first."""
        kept: list[int] = []
        for i in ids:
            if self.follows[self.last[kept[-1]], i] if kept else self.musical[i]:
                kept.append(i)
        return kept


class Notes(Guide):
    """Follows the notes of a sample: MidiTok's table of types, and what is missing to a first whole note.

    A note is whole at its duration, or, in MIDI-Like, at a note-off for what sounds, after time has passed.
    """

    def __init__(self, grammar: "Grammar") -> None:
        self.grammar = grammar
        self.kind = ""  # type of the last token
        self.program = 0
        self.begun = self.whole = False  # a note; a whole one
        self.sounding: dict[tuple[int, str], int] = {}  # (program, pitch) -> time tokens when it began
        self.time = 0
        self.closed = False  # the last token ended a note
        self.token = -1

    @property
    def least(self) -> int:  # type: ignore[override]
        """Tokens to the first whole note."""
        return len(self.plan())

    def allowed(self, left: int) -> np.ndarray:
        """What may follow; the shortest way to a whole note where a step off it could leave too little."""
        grammar = self.grammar
        mask = (grammar.follows[grammar.last[self.token]] if self.kind else grammar.beginning).copy()
        mask[grammar.end] = self.closed and self.whole
        if not self.whole and left <= grammar.longest_plan:
            mask[:] = False
            mask[self.plan()[0]] = True
        return mask

    def push(self, token: int) -> None:
        """Take over an id and all that it spells."""
        for word in self.grammar.spelled[token]:
            kind, _, value = word.partition("_")
            self._hear(kind, value)
        self.kind = self.grammar.spelled[token][-1].partition("_")[0]
        self.closed = self.kind in CLOSING_TYPES
        self.token = token

    def _hear(self, kind: str, value: str) -> None:
        if kind == "Program":
            self.program = int(value)
        elif kind in TIME_TYPES:
            self.time += 1
        elif kind in NOTE_TYPES:
            self.begun = True
            self.sounding.setdefault((self.program, value), self.time)
        elif kind == "Duration":
            self.whole |= self.begun
        elif kind in CLOSING_TYPES:
            self.whole |= self.sounding.pop((self.program, value), self.time) < self.time

    def plan(self) -> list[int]:
        """The shortest row of ids from here to a whole note; none where there is one, or no way leads there."""
        if self.whole:
            return []
        by_duration, first, pitch = True, (self.kind, self.begun, False), "60"
        if self.grammar.by_off:
            open_here = {pitch: began for (program, pitch), began in self.sounding.items() if program == self.program}
            pitch = min(open_here, key=lambda pitch: (open_here[pitch], pitch), default="60")
            by_duration, first = False, (self.kind, bool(open_here), open_here.get(pitch, self.time) < self.time)
        came: dict[tuple[str, bool, bool], tuple[str, bool, bool] | None] = {first: None}
        waiting = deque([first])
        while waiting:
            state = waiting.popleft()
            kind, begun, passed = state
            for after in self.grammar.kinds_after(kind):
                closes = after in CLOSING_TYPES
                if closes and begun and (by_duration or passed):
                    kinds = [*_way(came, state), after]
                    return [self.grammar.example(kind, self.program, pitch) for kind in kinds]
                if closes:
                    continue
                begins = after in NOTE_TYPES
                reached = (after, begun or begins, (passed or (begun and after in TIME_TYPES)) and not begins)
                if reached not in came:
                    came[reached] = state
                    waiting.append(reached)
        return []


def _way(came: dict[Any, Any], reached: Any) -> list[str]:
    """The types on the way to a state, the first state left out."""
    way: list[str] = []
    while came[reached] is not None:
        way.append(reached[0])
        reached = came[reached]
    return way[::-1]


def _spelled(tokenizer: Any) -> list[list[str]]:
    """The base tokens that each id stands for."""
    spelled: list[list[str]] = [[]] * len(tokenizer)
    if tokenizer.is_trained:
        for piece, number in tokenizer.vocab_model.items():
            spelled[number] = tokenizer._vocab_learned_bytes_to_tokens[piece]
    else:
        for token, number in tokenizer.vocab.items():
            spelled[number] = [token]
    return spelled


class _Corpus:
    """The training parts as MidiTok's BPE trainer wants them, read from disk one at a time."""

    def __init__(self, tokenizer: Any, parts: list[tuple[Path, int, int]]) -> None:
        self.tokenizer = tokenizer
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[list[str]]:
        for path, first, size in self.parts:
            ids = np.fromfile(path, "<u2", size, offset=2 * first)
            yield [self.tokenizer._ids_to_bytes(ids.tolist(), as_one_str=True)]


@contextmanager
def _silent() -> Iterator[None]:
    """Keep stdout for results: the trainer prints empty lines to it, past Python, and MidiTok can't tell it not to."""
    kept = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def read_score(path: Path) -> Any:
    """Parse a MIDI file. Raises Rejected with a reason that says what is wrong with it."""
    import symusic

    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as stream:
            content = stream.read(MOST_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Rejected(f"is not a whole gzip file: {error}") from error
    except OSError as error:
        raise Rejected(f"can't be read: {error.strerror}") from error
    if not content:
        raise Rejected("is empty")
    if not content.startswith(b"MThd"):
        raise Rejected(f"is not a MIDI file: it begins with {content[:8]!r}")
    if len(content) > MOST_BYTES:
        raise Rejected(f"is larger than {MOST_BYTES >> 20} MiB")
    try:
        score: Any = symusic.Score.from_midi(content)
    except (RuntimeError, ValueError) as error:
        raise Rejected(f"can't be parsed: {error}") from error
    if score.ticks_per_quarter <= 0:
        raise Rejected(f"has a time division of {score.ticks_per_quarter} ticks")
    return score


def _transpose(score: Any, semitones: int) -> None:
    """Shift the melodic tracks in place. Raises Rejected where a note would leave the range of MIDI."""
    melodic = [track for track in score.tracks if not track.is_drum and len(track.notes)]
    if not melodic:
        raise Rejected("has only drums, which are not transposed")
    pitches = np.concatenate([track.notes.numpy()["pitch"] for track in melodic]).astype(int) + semitones
    if pitches.min() < 0 or pitches.max() > 127:
        raise Rejected(f"has notes that a transposition by {semitones:+d} would move out of range")
    for track in melodic:
        track.shift_pitch(semitones, inplace=True)


def _stretch(score: Any, factor: float) -> Any:
    """The score with all times longer by the factor, to the nearest tick."""
    end = score.end()
    # symusic divides by the time between the two; where there is none, nothing gets longer.
    return score.adjust_time([0, end], [0, round(end * factor)]) if end else score


def _units(score: Any, notes: int) -> dict[str, float]:
    # symusic gives the smallest float for zero seconds, hence the rounding.
    seconds = round(float(score.to("second").end()), 6)
    return {"note": notes, "beat": score.end() / score.ticks_per_quarter, "second": seconds}


def _versions() -> str:
    return f"miditok {version('miditok')}, symusic {version('symusic')}"


def _from_json(scheme: str, content: str) -> Any:
    """MidiTok's tokenizer from its own JSON, which it only reads from a file."""
    with tempfile.TemporaryDirectory(prefix="shortcut-") as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(content, encoding="utf-8")
        try:
            return getattr(_miditok(), scheme)(params=path)
        except Exception as error:  # the reader of the BPE raises Exception itself
            raise CheckFailed(f"MidiTok can't read its own tokenizer file: {error!r}") from error
