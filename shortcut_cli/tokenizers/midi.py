"""MIDI: MidiTok's REMI, TSD or MIDI-Like tokens in one stream, with BPE on top if wanted; the unit is the note.

All 128 pitches have tokens, so that no note is dropped. Without program tokens, all melodic tracks are merged into one
piano and drum tracks are left out; a file with only drums is rejected. What the ids of a file do not carry, or carry
only to the nearest step, is in the account of its document.
"""

import hashlib
import json
import sys
import warnings
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from shortcut_cli import files
from shortcut_cli.config.schema import Config
from shortcut_cli.data.documents import Assign, Chunk, Document, Source, add_account
from shortcut_cli.errors import CheckFailed, Rejected, UsageError, in_short
from shortcut_cli.tokenizers.base import NO_LIMIT, Classes, Constraint, Excerpt, Tokenizer, Written, before_eos
from shortcut_cli.tokenizers.midi_account import compare
from shortcut_cli.tokenizers.midi_grammar import CLOCK_TYPES, CLOSING_TYPES, SPECIAL, Grammar, NoteConstraint
from shortcut_cli.tokenizers.midi_meters import known_meters
from shortcut_cli.tokenizers.midi_reading import read_score
from shortcut_cli.tokenizers.midi_scores import (
    Rules,
    added,
    arrange,
    barline,
    in_order,
    natural_units,
    place_pedals,
    since,
    sounding_end,
    swap_ends,
)
from shortcut_cli.tokenizers.midi_writing import dump

FORMAT = 2
BLOCK_IDS = 1 << 20
IDENTITY = ("tokenization", "config")  # the keys of MidiTok's JSON that determine the ids below BPE


class MidiOptions(Config):
    """[tokenizer] of midi."""

    name: Literal["midi"] = Field(description="the domain")
    scheme: Literal["REMI", "TSD", "MIDILike"] = Field("REMI", description="MidiTok's tokenization")
    tempos: bool = Field(True, description="tokens for tempo changes; without them everything is at 120 bpm")
    time_signatures: bool = Field(True, description="tokens for time signatures; without them everything is in 4/4")
    programs: bool = Field(False, description="tokens for instruments; without them one piano plays all but the drums")
    velocities: int = Field(32, description="steps of loudness", ge=1, le=127)
    beat_resolution: int = Field(12, description="positions per beat to which onsets are rounded", ge=1, le=96)
    longest_note: int = Field(64, description="beats; longer notes are cut", ge=1, le=1024)
    longest_rest: int = Field(1000, description="beats; a file in which nothing sounds for longer is rejected", ge=1)
    tempo_range: list[int] = Field([10, 400], description="slowest and fastest tempo that has a token, in bpm")
    tempo_count: int = Field(391, description="number of tempos, evenly spread over the range", ge=2, le=2048)
    meters: list[str] = Field(
        ["1-4/2", "1-12/4", "1-15/8", "1-15/16"],
        description="time signatures that have tokens: 6/8, or 1-12/4 for twelve of them; 4/4 must be among them",
    )
    sustain: Literal["tokens", "durations", "drop"] = Field(
        "tokens",
        description="the sustain pedal: tokens for it, notes that last as long as it holds them, or neither",
    )
    bpe: int = Field(
        0, description="vocabulary of a BPE on top, trained on the training split; 0: none", ge=0, le=10**6
    )
    transpose: list[int] = Field([], description="semitones; each adds a transposed copy of every training piece")
    tempo_factors: list[float] = Field([], description="factors; each adds a stretched copy of every training piece")

    @field_validator("transpose")
    @classmethod
    def _check_transpose(cls, semitones: list[int]) -> list[int]:
        if 0 in semitones or len(set(semitones)) < len(semitones):
            raise ValueError("semitones must differ from each other and from 0, which is the piece itself")
        return semitones

    @field_validator("tempo_range")
    @classmethod
    def _check_tempo_range(cls, ends: list[int]) -> list[int]:
        if len(ends) != 2 or not 4 <= ends[0] < ends[1] <= 500:
            raise ValueError("the range must be two tempos between 4 and 500, the slower one first")
        return ends

    @field_validator("meters")
    @classmethod
    def _check_meters(cls, meters: list[str]) -> list[str]:
        if 4 not in known_meters(meters).get(4, []):
            raise ValueError("4/4 must be among them: music without a time signature is in 4/4")
        return meters

    @field_validator("tempo_factors")
    @classmethod
    def _check_tempo_factors(cls, factors: list[float]) -> list[float]:
        if not all(0.5 <= factor <= 2 for factor in factors):
            raise ValueError("factors must be between 0.5 and 2")
        names = {f"{factor:g}" for factor in factors}
        if "1" in names or len(names) < len(factors):
            raise ValueError("factors must differ from each other and from 1, which is the piece itself")
        return factors


@dataclass(frozen=True)
class Reading:
    """What a file is as base ids."""

    ids: np.ndarray  # int64 (T,)
    units: dict[str, float]  # natural units
    account: dict[str, float]  # what the ids do not carry; what did not happen is left out


class MidiTokenizer(Tokenizer):
    """MIDI files <-> ids."""

    Options = MidiOptions
    unit: ClassVar[str] = "note"
    suffixes: ClassVar[tuple[str, ...]] = (".mid", ".midi", ".kar", ".rmi", ".mid.gz", ".midi.gz", ".kar.gz", ".rmi.gz")
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
        """MidiTok's tokenizer, with BPE if it was trained."""
        return _from_json(self.options.scheme, self.trained) if self.trained else self.base

    @property
    def vocabulary(self) -> int:
        """Ids of MidiTok, BPE included."""
        assert not self.needs_fit, "fit comes before vocabulary"
        return len(self.full)

    @property
    def eos(self) -> int:
        """MidiTok's EOS_None."""
        return int(self.base["EOS_None"])

    @property
    def needs_fit(self) -> bool:
        """Whether BPE has to be trained."""
        return bool(self.options.bpe) and not self.trained

    @property
    def variants(self) -> list[str]:
        """One for each transposition and tempo factor."""
        transposed = [f"transpose={semitones:+d}" for semitones in self.options.transpose]
        return transposed + [f"tempo={factor:g}" for factor in self.options.tempo_factors]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of MidiTok's configuration, the versions of MidiTok and symusic, and the BPE."""
        assert not self.needs_fit, "fit comes before fingerprint"
        config = self.base.config.to_dict(serialize=True)
        ours = {key: getattr(self.options, key) for key in ("sustain", "longest_note", "longest_rest")}
        parts = [FORMAT, self.options.scheme, _versions(), config, ours, self.trained]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def description(self) -> dict[str, str | int | float]:
        """Library versions."""
        return {"library": _versions()}

    @property
    def depends_on(self) -> dict[str, str | int]:
        """The format, and library versions."""
        return {"format": FORMAT, "library": _versions()}

    def scan(self, source: Source) -> Iterator[Document]:
        """One document, its base ids staged. Raises Rejected if the file is not MIDI or has no notes."""
        found = _staged_facts(source)
        if found is None:
            reading = self._read(source.path, source.variant, source.sha256)
            content = reading.ids.astype("<u2").tobytes()
            found = {"units": reading.units, "account": reading.account}
            files.write(_sidecar(source), json.dumps([found, _checksum(content, found)]), durable=False)
            files.write(source.staged, content, durable=False)
        sha256 = source.sha256
        if source.variant:
            sha256 = hashlib.sha256(f"{source.sha256} {source.variant}".encode()).hexdigest()
        yield Document(sha256, source.start, source.staged.stat().st_size // 2, found["units"], found["account"])

    def _read(self, path: Path, variant: str = "", sha256: str = "") -> Reading:
        score, repairs = read_score(path, sha256)
        arranged = arrange(score, variant, self._rules)
        with warnings.catch_warnings():
            # MidiTok warns of a time signature that its vocabulary lacks, and keeps the one before.
            warnings.simplefilter("ignore")
            prepared = self.base.preprocess_score(arranged.score)
            place_pedals(prepared, arranged, self.options.beat_resolution)
            try:
                sequences = self.base.encode(prepared, encode_ids=False, no_preprocess_score=True)
            except KeyError as error:
                raise Rejected(f"can't be tokenized: MidiTok has no token {error}") from error
        sequence = sequences[0] if isinstance(sequences, list) else sequences
        ids = np.array(sequence.ids, np.int64)
        units = natural_units(arranged.score, int(self.base_grammar.is_note[ids].sum()), arranged.end)
        decoded = swap_ends(prepared) if self.base_grammar.by_off else prepared
        account = compare(arranged, decoded, self.base.tempos if self.options.tempos else np.zeros(0))
        add_account(account, repairs)
        return Reading(ids, units, {name: _rounded(amount) for name, amount in sorted(account.items()) if amount})

    @cached_property
    def _rules(self) -> Rules:
        options = self.options
        return Rules(
            programs=options.programs,
            tempos=options.tempos,
            sustain=options.sustain,
            longest_rest=options.longest_rest,
            longest_note=options.longest_note,
            cut=self.base_grammar.by_off,
            resolution=options.beat_resolution,
            meters=self.base.time_signatures if options.time_signatures else [],
        )

    def fit(self, sources: Sequence[Source], assign: Assign) -> None:
        """Train BPE on the base ids of the training split. Raises UsageError if `bpe` is too small."""
        if self.options.bpe <= len(self.base):
            raise UsageError(
                f"tokenizer.bpe {self.options.bpe} is no larger than the {len(self.base)} tokens below it",
                f"--set tokenizer.bpe={4 * len(self.base)}",
            )
        full = _from_json(self.options.scheme, json.dumps(self.base.to_dict()))
        parts = array("q")  # number of the source, first id, number of ids
        for number, source in enumerate(sources):
            for first, size in self._training_parts(source, assign):
                parts.extend((number, first, size))
        with files.diverted(1):  # the native trainer prints empty lines to stdout, which MidiTok has no option against
            # The merges do not depend on the number of threads or the order of files: ties are broken by id.
            full.train(self.options.bpe, "BPE", iterator=_Corpus(full, sources, parts))
        content = json.loads(json.dumps(full.to_dict()))  # keys that are numbers are sorted as the texts they become
        self.trained = json.dumps(content, sort_keys=True)

    def _training_parts(self, source: Source, assign: Assign) -> Iterator[tuple[int, int]]:
        """(first id, number of ids) of each part of a source that the training split gets."""
        (document,) = self.scan(source)
        first = 0
        for split, size in assign(document):
            if split == "train":
                yield first, size
            first += size

    def encode(self, source: Source, assign: Assign, threads: int) -> Iterator[Chunk]:
        """The staged ids, after BPE if it was trained; beats and seconds of a part are proportional to its tokens."""
        del threads
        (document,) = self.scan(source)
        ids = np.memmap(source.staged, "<u2", "r")
        first = 0
        for split, size in assign(document):
            part = ids[first : first + size]
            first += size
            units = document.units if size == document.size else self._part_units(part, document)
            yield Chunk(document, split, units, self._blocks(part))

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

    def prompt(self, path: Path, limit: Mapping[str, float] = NO_LIMIT) -> np.ndarray:
        """The ids of one file."""
        del limit
        ids = self._read(path).ids
        return self._compress(ids.tolist()) if self.trained else ids

    def classes(self, ids: np.ndarray) -> dict[str, Classes]:
        """By MidiTok's type; ids that BPE joined from several tokens are a class of their own."""
        kinds, of_id = self._kinds
        return {"type": Classes(kinds, of_id[ids])}

    @cached_property
    def _kinds(self) -> tuple[list[str], np.ndarray]:
        of_id = ["joined" if len(words) > 1 else words[0].partition("_")[0] for words in self.grammar.spelled]
        of_id = ["end" if kind == "EOS" else kind for kind in of_id]
        kinds = sorted(set(of_id) - {"PAD", "BOS"})
        return kinds, np.array([kinds.index(kind) if kind in kinds else -1 for kind in of_id])

    def excerpt(self, ids: np.ndarray) -> Excerpt:
        """Notes, each drawn from the token that completes it to that of the first note that begins after its end."""
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
        quarter = self._score(ids)[0].ticks_per_quarter
        ends = np.array([(start, end) for _, start, end, *_ in found], np.float64).reshape(-1, 2) / quarter
        done = np.array([token for token, *_ in found], np.int64)
        beats = np.append(ends[:, 0], ends[-1:, 0] if len(ends) else 0.0)[np.searchsorted(done, np.arange(len(ids)))]
        return Excerpt(
            notes=np.array(rows, np.int64).reshape(-1, 4), note_beats=ends, token_beats=np.maximum.accumulate(beats)
        )

    def decode(self, ids: Sequence[int], path: Path) -> dict[str, float]:
        """Write a MIDI file; the units also count "dropped", the ids left out because the grammar forbids them there.

        MidiTok trusts the order of types: it takes whatever follows a pitch for its velocity, and writes files that
        no program can read. Ids that were encoded from a file or sampled under the constraint lose nothing.
        """
        return self._write(*self._score(ids), path)

    def _write(self, score: Any, dropped: int, path: Path) -> dict[str, float]:
        content, lost = dump(score)
        files.write(path, content)
        notes = score.note_num() - int(lost["notes_left_out"])
        return natural_units(score, notes, sounding_end(score)) | {"dropped": dropped} | lost

    def decode_after(
        self, ids: Sequence[int], path: Path, count: int, *, recorded: Path | None = None, only_new: bool = False
    ) -> Written:
        """The new part begins where a note would that came right after the prompt, or with the first note that is new.

        That one may be earlier: a sampled position may go back within its bar. Alone, the new part begins at the
        barline before, so that its notes stay where they are in their bars, with the tempo and the time signature that
        hold there. What began in the prompt is left out.
        """
        del recorded
        score, dropped = self._score(ids)
        old, tick, start = self._score(ids[:count])[0], self._now(ids[:count])[0], 0
        if not self.base_grammar.by_off:  # else a new NoteOff may end a note of the prompt, which is not new
            tick = min([tick, *(note.time for notes in added(score, old) for note in notes)])
        left_out = _place(score, 0)
        if only_new:
            start = barline(score, tick)
            left_out = _place(score, start)
            score = since(score, old, tick, start)
        return Written(self._write(score, dropped, path), _place(score, tick - start), left_out)

    def first(self, ids: np.ndarray, seconds: float) -> int:
        """The ids of what begins before `seconds` have passed."""
        score, _ = self._score(ids)
        lasts = _place(score, sounding_end(score))["second"]
        if seconds > lasts:
            raise Rejected(f"has only {lasts:.3f} s")
        if seconds == lasts:  # the end of the last note is an id of its own in MIDI-Like
            return len(ids)
        return bisect_left(range(1, len(ids) + 1), seconds, key=lambda count: self._now(ids[:count])[1])

    def _now(self, ids: Sequence[int] | np.ndarray) -> tuple[int, float]:
        """Tick and second at which a note would begin that came next: MidiTok's own, of a note that is put there."""
        grammar = self.base_grammar
        words = [word for i in ids for word in self.grammar.spelled[int(i)]]
        kept = [int(self.base[word]) for word in words if word.partition("_")[0] in CLOCK_TYPES]
        kinds = ("NoteOn", "Velocity", "TimeShift", "NoteOff") if grammar.by_off else ("Pitch", "Velocity", "Duration")
        note = [grammar.example(kind, 0, "60") for kind in kinds]
        sequence = _miditok().TokSequence(ids=kept + note)
        one_stream = self.base.config.one_token_stream_for_programs
        score = in_order(self.base.decode(sequence if one_stream else [sequence]))
        tick = int(score.tracks[0].notes[0].time)
        return tick, _place(score, tick)["second"]

    def _score(self, ids: Sequence[int] | np.ndarray) -> tuple[Any, int]:
        """The score that the ids before the first EOS encode, and how many of them were left out."""
        found = before_eos([int(i) for i in ids], self.eos)
        legal = self.grammar.legal(found)
        sequence = _miditok().TokSequence(ids=list(legal))
        sequence.are_ids_encoded = bool(self.trained)
        one_stream = self.base.config.one_token_stream_for_programs
        return in_order(self.full.decode(sequence if one_stream else [sequence])), len(found) - len(legal)

    def constraint(self) -> Constraint:
        """MidiTok's own table of types; EOS only after a complete note, for which it always leaves room."""
        return NoteConstraint(self.grammar)

    @cached_property
    def grammar(self) -> Grammar:
        """Which ids may follow which."""
        return Grammar(self.full, self.eos)

    @property
    def base_grammar(self) -> Grammar:
        """The grammar of the base ids, below BPE."""
        return _base_grammar(self.options.model_dump_json())

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, in MidiTok's own format."""
        content = self.trained or json.dumps(self.base.to_dict(), sort_keys=True)
        files.write(folder / "tokenizer.json", content + "\n")

    @classmethod
    def load(cls, options: Config, folder: Path) -> "MidiTokenizer":
        """Raises CheckFailed if the file is not MidiTok's or does not match the options."""
        assert isinstance(options, MidiOptions), options
        try:
            content = json.loads(files.content(folder / "tokenizer.json"))
            identity = {key: content[key] for key in IDENTITY}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckFailed(f"{folder} does not hold a MIDI tokenizer: {in_short(error)}") from error
        trained = "_model" in content
        loaded = cls(options, json.dumps(content, sort_keys=True) if trained else "")
        ours = json.loads(json.dumps(loaded.base.to_dict()))
        if identity != {key: ours[key] for key in IDENTITY} or trained != bool(options.bpe):
            raise CheckFailed(f"{folder} holds a MIDI tokenizer of another configuration than the recipe's")
        if trained and not _is_bpe(content, loaded.base):
            raise CheckFailed(f"{folder} does not hold a MIDI tokenizer: its BPE is not one that MidiTok trains")
        _ = loaded.full
        return loaded


def _place(score: Any, tick: int) -> dict[str, float]:
    """A tick of a score in beats and seconds."""
    units = natural_units(score, 0, tick)
    return {name: units[name] for name in ("beat", "second")}


def _miditok() -> Any:
    """MidiTok without its PyTorch data sets, which nothing here uses and whose import takes most of its import time."""
    others = sys.modules.setdefault("miditok.pytorch_data", None)  # type: ignore[arg-type]
    import miditok

    if others is None:
        sys.modules.pop("miditok.pytorch_data", None)
    return miditok


@lru_cache(maxsize=8)
def _base(options_json: str) -> Any:
    """MidiTok's tokenizer without BPE for these options: built once per process, not for every file."""
    options, library = MidiOptions.model_validate_json(options_json), _miditok()
    config = library.TokenizerConfig(
        pitch_range=(0, 127),
        drums_pitch_range=(0, 127),
        num_velocities=options.velocities,
        special_tokens=list(SPECIAL),
        beat_res=_steps(options.beat_resolution, options.longest_note),
        use_tempos=options.tempos,
        tempo_range=tuple(options.tempo_range),
        num_tempos=options.tempo_count,
        use_time_signatures=options.time_signatures,
        time_signature_range=known_meters(options.meters) if options.time_signatures else {4: [4]},
        use_sustain_pedals=options.sustain == "tokens",
        use_programs=options.programs,
        use_pitchdrum_tokens=options.programs,
        one_token_stream_for_programs=options.programs,
        encode_ids_split="no",
    )
    return _complete(getattr(library, options.scheme)(config))


def _steps(resolution: int, longest: int) -> dict[tuple[int, int], int]:
    """Range of beats -> steps per beat: the full resolution for up to 4 beats, then up to 4, up to 2, and 1.

    MidiTok needs divisors of the resolution.
    """
    ends = [*(end for end in (4, 12, 32) if end < longest), longest]
    most = [resolution, *(max(n for n in range(1, few + 1) if resolution % n == 0) for few in (4, 2, 1))]
    return {(first, last): steps for first, last, steps in zip([0, *ends], ends, most, strict=False)}


def _complete(tokenizer: Any) -> Any:
    """Add to MidiTok's table of types what it writes itself where pedals of several programs are in one stream."""
    graph = tokenizer.tokens_types_graph
    if "Pedal" in graph and "Program" in graph:
        graph["Pedal"].add("PedalOff")
        graph["Velocity" if "NoteOff" in graph else "Duration"] |= {"Pedal", "PedalOff"}
    return tokenizer


@lru_cache(maxsize=8)
def _base_grammar(options_json: str) -> Grammar:
    base = _base(options_json)
    return Grammar(base, int(base["EOS_None"]))


def _sidecar(source: Source) -> Path:
    """The file beside a staged file with its natural units, its account, and a checksum of all of it."""
    return source.staged.with_name(source.staged.name + ".json")


def _checksum(content: bytes, found: dict[str, dict[str, float]]) -> str:
    return hashlib.blake2b(content + json.dumps(found).encode(), digest_size=16).hexdigest()


def _staged_facts(source: Source) -> dict[str, dict[str, float]] | None:
    """Units and account of a staged file; None if there is none, or if not all of it reached the disk."""
    try:
        found: dict[str, dict[str, float]]
        found, expected = json.loads(_sidecar(source).read_bytes())
        return found if _checksum(source.staged.read_bytes(), found) == expected else None
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _rounded(amount: float) -> float:
    """A number as it is best written in JSON: counts without a decimal point."""
    return int(amount) if float(amount).is_integer() else round(float(amount), 6)


class _Corpus:
    """The training parts in the form that MidiTok's BPE trainer expects, read from disk one at a time."""

    def __init__(self, tokenizer: Any, sources: Sequence[Source], parts: "array[int]") -> None:
        """parts: of each the number of its source, its first id and how many it has."""
        self.tokenizer = tokenizer
        self.sources, self.parts = sources, parts

    def __len__(self) -> int:
        return len(self.parts) // 3

    def __iter__(self) -> Iterator[list[str]]:
        for at in range(0, len(self.parts), 3):
            number, first, size = self.parts[at : at + 3]
            ids = np.fromfile(self.sources[number].staged, "<u2", size, offset=2 * first)
            yield [self.tokenizer._ids_to_bytes(ids.tolist(), as_one_str=True)]


def _versions() -> str:
    return f"miditok {version('miditok')}, symusic {version('symusic')}"


def _is_bpe(content: dict[str, Any], base: Any) -> bool:
    """Whether MidiTok's JSON of a BPE is as it is written after training on top of `base`, so that its reader is safe.

    MidiTok sets keys that it does not know as attributes of itself, and native code reads the BPE: some contents end
    in its panic, with a traceback of its own on stderr. `content` is from a file that anyone may have made.
    """
    learned = ("_vocab_base", "_vocab_base_byte_to_token", "_model")
    spelling = base._vocab_base_byte_to_token
    try:
        whole = json.loads(content["_model"])
        model, added = whole.pop("model"), whole.pop("added_tokens")
        vocabulary, merges = model.pop("vocab"), model.pop("merges")
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]  # text before 0.20
        joined = [(first, second, first + second) for first, second in pairs]
        return (
            content.keys() == base.to_dict().keys() | set(learned)
            and content["_vocab_base"] == base.vocab
            and content["_vocab_base_byte_to_token"] == spelling
            and whole.pop("version") == "1.0"
            and all(value is None for value in whole.values())
            and model.pop("type") == "BPE"
            and all(value is None or value is False for value in model.values())
            and [*sorted(vocabulary.values())] == [*range(len(vocabulary))]
            and all(type(number) is int for number in vocabulary.values())
            and all(piece and spelling.keys() >= set(piece) for piece in vocabulary)
            and all(vocabulary[byte] == base.vocab[token] for byte, token in spelling.items())
            and all(piece in vocabulary for triple in joined for piece in triple)
            and all(vocabulary[token["content"]] == token["id"] for token in added)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _from_json(scheme: str, content: str) -> Any:
    """MidiTok's tokenizer from its own JSON, which it can only read from a file."""
    with files.temporary_folder() as folder:
        path = folder / "tokenizer.json"
        path.write_text(content, encoding="utf-8")
        try:
            return _complete(getattr(_miditok(), scheme)(params=path))
        except Exception as error:  # the reader of the BPE raises Exception itself
            raise CheckFailed(f"MidiTok can't read its own tokenizer file: {in_short(error)}") from error
