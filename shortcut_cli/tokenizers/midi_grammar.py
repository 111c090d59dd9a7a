"""Which MIDI tokens may follow which, and constrained decoding: every sample contains a complete note."""

from collections import deque
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from shortcut_cli.tokenizers.base import Constraint

SPECIAL = ("PAD", "BOS", "EOS")
NOTE_TYPES = ("Pitch", "NoteOn", "PitchDrum", "DrumOn")
CLOSING_TYPES = ("Duration", "NoteOff", "DrumOff")  # end a note
ENDING_TYPES = (*CLOSING_TYPES, "PedalOff")  # may end a piece
TIME_TYPES = ("TimeShift", "Rest")
CLOCK_TYPES = ("Bar", "Position", "TimeSig", "Tempo", *TIME_TYPES)  # say alone what the time is
OPENING_TYPES = ("Bar", "TimeSig", "Tempo", "TimeShift", "Program", "Pedal", *NOTE_TYPES)  # may begin a piece


class Grammar:
    """The types of all ids, and which may follow which: MidiTok's table of types, extended to the ids of a BPE."""

    def __init__(self, tokenizer: Any, eos: int) -> None:
        self.eos = eos
        self.spelled = _spelled(tokenizer)  # base tokens of each id
        self.parts = [[_parts(token) for token in tokens] for tokens in self.spelled]  # their types and values
        spelled = [[kind for kind, _ in parts] for parts in self.parts]
        graph = tokenizer.tokens_types_graph
        self.graph = {kind: sorted(after - set(SPECIAL)) for kind, after in graph.items()}
        self.by_off = "NoteOff" in graph  # notes end with a note-off instead of having a duration
        kinds = sorted(graph)
        place = {kind: number for number, kind in enumerate(kinds)}
        first = np.array([place[types[0]] for types in spelled])
        self.last = np.array([place[types[-1]] for types in spelled])  # (V,) number of the last base token's type
        self.musical = np.array([types[0] not in SPECIAL for types in spelled])  # (V,)
        self.is_note = np.array([any(t in NOTE_TYPES for t in types) for types in spelled])  # (V,) begins a note
        self.single: dict[str, list[tuple[str, int]]] = {}  # type -> (value, id) of the ids that are one base token
        for number, parts in enumerate(self.parts):
            if len(parts) == 1:
                ((kind, value),) = parts
                self.single.setdefault(kind, []).append((value, number))
        may = np.array([[b in graph[a] for b in kinds] for a in kinds])
        self.follows = may[:, first] & self.musical  # (types, V)
        opening = "Bar" if "Bar" in place else None
        starts = [opening] if opening else [kind for kind in OPENING_TYPES if kind in place]
        if not opening and "Program" in place:
            starts = [kind for kind in starts if kind not in NOTE_TYPES]
        self.beginning = np.isin(first, [place[kind] for kind in starts]) & self.musical  # (V,)
        self.opening_kinds = starts
        without = np.vstack((self.follows, self.beginning))
        without[:, eos] = False
        self.masks = np.stack((without, without))  # (2, types + 1, V): without and with EOS; last, the beginning
        self.masks[1, :, eos] = True
        self.masks.flags.writeable = False  # constraints hand its rows out

    @cached_property
    def longest_plan(self) -> int:
        """The most ids that a complete note can take, from any state of a sample."""
        lengths = []
        for kind in ["", *self.single]:
            constraint = NoteConstraint(self)
            constraint.kind, constraint.begun = kind, kind in NOTE_TYPES
            if kind not in SPECIAL:
                lengths.append(len(constraint.plan()))
        return max(lengths)

    def kinds_after(self, kind: str) -> list[str]:
        """The types that may follow a type, or, if it is empty, begin a piece."""
        return self.graph.get(kind, []) if kind else self.opening_kinds

    def example(self, kind: str, program: int, pitch: str) -> int:
        """An id of a type: the one with the given pitch or program if there is one, else the first."""
        known = dict(self.single[kind])
        wanted = pitch if kind in (*NOTE_TYPES, *CLOSING_TYPES) else str(program) if kind == "Program" else ""
        return known.get(wanted, self.single[kind][0][1])

    def legal(self, ids: Sequence[int]) -> list[int]:
        """Drop every id that may not follow the one kept before it; the first may be any musical token."""
        kept: list[int] = []
        for i in ids:
            if self.follows[self.last[kept[-1]], i] if kept else self.musical[i]:
                kept.append(i)
        return kept


class NoteConstraint(Constraint):
    """Only what MidiTok's table of types allows, and at least one complete note.

    A note is complete at its duration, or, in MIDI-Like, at the note-off of a sounding note, after time has passed.
    """

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.kind = ""  # type of the last base token
        self.program = 0
        self.begun = self.complete = False  # whether any note has begun, and whether any is complete
        self.sounding: dict[tuple[int, str], int] = {}  # (program, pitch) -> value of `time` when it began
        self.time = 0  # time tokens so far
        self.closed = False  # the last base token ended a note or released a pedal
        self.token = -1  # the last id

    @property
    def needed(self) -> int:  # type: ignore[override]
        """Ids still needed for the first complete note."""
        return len(self.plan())

    def allowed(self, left: int) -> np.ndarray:
        """What may follow; only the shortest way to a complete note, if anything else could leave too few ids."""
        grammar = self.grammar
        if not self.complete and left <= grammar.longest_plan:
            only: np.ndarray = np.zeros_like(grammar.beginning)
            only[self.plan()[0]] = True
            return only
        after = grammar.last[self.token] if self.kind else -1
        mask: np.ndarray = grammar.masks[int(self.closed and self.complete), after]
        return mask

    def push(self, token: int) -> None:
        """Advance by an id, through all base tokens that it spells."""
        for kind, value in self.grammar.parts[token]:
            self._advance(kind, value)
        self.kind = kind
        self.closed = self.kind in ENDING_TYPES
        self.token = token

    def _advance(self, kind: str, value: str) -> None:
        if kind == "Program":
            self.program = int(value)
        elif kind in TIME_TYPES:
            self.time += 1
        elif kind in NOTE_TYPES:
            self.begun = True
            self.sounding.setdefault((self.program, value), self.time)
        elif kind == "Duration":
            self.complete |= self.begun
        elif kind in CLOSING_TYPES:
            self.complete |= self.sounding.pop((self.program, value), self.time) < self.time

    def plan(self) -> list[int]:
        """The shortest sequence of ids from here to a complete note; empty if there is one, or no way to one."""
        if self.complete:
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
    """The types on the way to a state, without the first state's."""
    way: list[str] = []
    while came[reached] is not None:
        way.append(reached[0])
        reached = came[reached]
    return way[::-1]


def _parts(token: str) -> tuple[str, str]:
    """Type and value of a base token: "Pitch_60" is ("Pitch", "60")."""
    kind, _, value = token.partition("_")
    return kind, value


def _spelled(tokenizer: Any) -> list[list[str]]:
    """The base tokens that each id joins."""
    spelled: list[list[str]] = [[]] * len(tokenizer)
    if tokenizer.is_trained:
        for joined, number in tokenizer.vocab_model.items():
            spelled[number] = tokenizer._vocab_learned_bytes_to_tokens[joined]
    else:
        for token, number in tokenizer.vocab.items():
            spelled[number] = [token]
    return spelled
