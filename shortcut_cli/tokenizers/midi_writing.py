"""Scores -> MIDI files that every program reads alike: each note has its own length and its own program.

A note-off names a channel and a pitch, so notes of one pitch that overlap need channels of their own; and a channel
has one program at a time, so programs that are many share the channels over time. symusic's own writer does neither.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from shortcut_cli.tokenizers.midi_bytes import (
    CONTROLLER,
    DRUM_CHANNEL,
    NOTE_OFF,
    NOTE_ON,
    PITCH_BEND,
    PROGRAM,
    SUSTAIN,
    TEMPO,
    TIME_SIGNATURE,
    TRACK_NAME,
    TrackWriter,
    midi_file,
)

RESET = 121  # the controller that resets all others of its channel
SLOWEST = (1 << 24) - 1  # microseconds per quarter note: three bytes
# What comes first at the same tick: ends of notes, programs and controllers, notes without a length, other notes.
OFF, STATE, EMPTY, ON = range(4)


class _Note(NamedTuple):
    start: int  # ticks
    end: int
    pitch: int
    velocity: int


@dataclass(eq=False)
class _Voice:
    """Notes of one program of which no two of the same pitch overlap; a track of the file."""

    part: "_Part"
    messages: list[tuple[int, int, int, bytes]] = field(default_factory=list)  # tick, rank, number, bytes
    channel: int | None = None

    def add(self, tick: int, rank: int, *message: int) -> None:
        self.messages.append((tick, rank, len(self.messages), bytes(message)))

    def play(self, note: _Note, channel: int) -> None:
        """Add a note."""
        empty = note.start == note.end
        self.add(note.start, EMPTY if empty else ON, NOTE_ON | channel, note.pitch, note.velocity)
        self.add(note.end, EMPTY if empty else OFF, NOTE_OFF | channel, note.pitch, 0)


@dataclass(eq=False)
class _Part:
    """A track of a score."""

    name: str
    program: int
    drums: bool
    state: dict[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)  # the last of each kind of message
    voices: list[_Voice] = field(default_factory=list)

    def voice(self, layer: int) -> _Voice:
        while layer >= len(self.voices):
            voice = _Voice(self)
            if self.drums:
                voice.channel = DRUM_CHANNEL
                voice.add(0, STATE, PROGRAM | DRUM_CHANNEL, self.program)
            self.voices.append(voice)
        return self.voices[layer]


class _Channels:
    """The melodic channels, each lent to one voice at a time."""

    def __init__(self) -> None:
        self.owner: dict[int, _Voice | None] = {channel: None for channel in range(16) if channel != DRUM_CHANNEL}
        self.busy_until = dict.fromkeys(self.owner, -1)  # tick

    def acquire(self, voice: _Voice, tick: int) -> int | None:
        """The channel of a voice; None if it has none and all others are sounding."""
        if voice.channel is None:
            channel = min(self.owner, key=lambda one: self.busy_until[one])
            if self.busy_until[channel] > tick:
                return None
            self._lend(channel, voice, tick)
        return voice.channel

    def _lend(self, channel: int, voice: _Voice, tick: int) -> None:
        before = self.owner[channel]
        self.owner[channel], voice.channel, self.busy_until[channel] = voice, channel, max(tick, 0)
        if before is not None:
            before.channel = None
            if before.part.state:
                voice.add(tick, STATE, CONTROLLER | channel, RESET, 0)
        voice.add(0 if before is None else tick, STATE, PROGRAM | channel, voice.part.program)
        for kind, value in voice.part.state.items():
            voice.add(tick, STATE, kind[0] | channel, *kind[1:], *value)


def dump(score: Any) -> tuple[bytes, dict[str, float]]:
    """The bytes of a MIDI file with the notes, pedals, bends, tempos and time signatures of a score.

    Also counts "notes_left_out", for which all 15 melodic channels were taken by notes of other programs, and
    "unisons_shared", which overlap a note of their pitch and had to share its channel: programs that pair note-ons and
    note-offs by track read them right, but an instrument that hears all tracks may end one with the other.
    """
    channels, lost = _Channels(), {"notes_left_out": 0.0, "unisons_shared": 0.0}
    parts = [_Part(track.name, max(track.program, 0), track.is_drum) for track in score.tracks]
    events: list[tuple[Any, ...]] = []
    for number, track in enumerate(score.tracks):
        events += [(tick, 0, number, place, *state) for place, (tick, *state) in enumerate(_states(track))]
        events += [(note.start, 1, layer, number, note) for layer, note in _layers(track)]
    for tick, is_note, *what in sorted(events):
        if is_note:
            layer, number, note = what
            _play(parts[number], layer, note, channels, lost)
        else:
            number, _, kind, value = what
            _set(parts[number], tick, kind, value, channels)
    writers = [_conductor(score), *(_written(voice) for part in parts for voice in part.voices if voice.messages)]
    return midi_file(score.ticks_per_quarter, writers), lost


def _play(part: _Part, layer: int, note: _Note, channels: _Channels, lost: dict[str, float]) -> None:
    voice = part.voice(layer)
    if part.drums:
        voice.play(note, DRUM_CHANNEL)
        lost["unisons_shared"] += layer > 0
        return
    channel = channels.acquire(voice, note.start)
    if channel is None:
        channel = part.voices[0].channel
        if channel is None:
            lost["notes_left_out"] += 1
            return
        lost["unisons_shared"] += 1
        # Readers that keep one program for each track need it in this one, too.
        voice.add(note.start, STATE, PROGRAM | channel, part.program)
    voice.play(note, channel)
    channels.busy_until[channel] = max(channels.busy_until[channel], note.end)


def _set(part: _Part, tick: int, kind: tuple[int, ...], value: tuple[int, ...], channels: _Channels) -> None:
    """Send a pedal or bend to every channel on which a part plays; one that has none yet gets one."""
    first = part.voice(0)
    if not part.drums:
        channels.acquire(first, tick)
    part.state[kind] = value
    for voice in [first] if part.drums else part.voices:
        if voice.channel is not None:
            voice.add(tick, STATE, kind[0] | voice.channel, *kind[1:], *value)


def _layers(track: Any) -> Iterator[tuple[int, _Note]]:
    """The notes of a track, each with a layer; in a layer, notes of a pitch do not overlap, unless they are equal."""
    notes = sorted(_Note(n.time, n.time + n.duration, n.pitch, n.velocity) for n in track.notes)
    last: dict[int, list[_Note]] = {}  # pitch -> the last note of each layer
    for note in notes:
        layers = last.setdefault(note.pitch, [])
        free = (n for n, other in enumerate(layers) if other.end <= note.start or other[:2] == note[:2])
        layer = next(free, len(layers))
        layers[layer : layer + 1] = [note]
        yield layer, note


def _states(track: Any) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """(tick, status and number, value) of pedals, controllers and bends, in order of time."""
    states: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = []
    for pedal in track.pedals:
        states += [
            (pedal.time, (CONTROLLER, SUSTAIN), (127,)),
            (pedal.time + pedal.duration, (CONTROLLER, SUSTAIN), (0,)),
        ]
    for bend in track.pitch_bends:
        states.append((bend.time, (PITCH_BEND,), ((bend.value + 8192) & 127, (bend.value + 8192) >> 7)))
    return sorted(states, key=lambda state: state[0])


def _conductor(score: Any) -> TrackWriter:
    """The track of tempos and time signatures."""
    messages = [(t.time, TEMPO, min(t.mspq, SLOWEST).to_bytes(3)) for t in score.tempos]
    for signature in score.time_signatures:
        beat = signature.denominator.bit_length() - 1
        messages.append((signature.time, TIME_SIGNATURE, bytes((signature.numerator, beat, 24, 8))))
    writer = TrackWriter()
    for tick, kind, data in sorted(messages, key=lambda message: message[0]):
        writer.add_meta(tick, kind, data)
    return writer


def _written(voice: _Voice) -> TrackWriter:
    writer = TrackWriter()
    if voice.part.name:
        writer.add_meta(0, TRACK_NAME, voice.part.name.encode())
    for tick, _, _, message in sorted(voice.messages):
        writer.add(tick, message)
    return writer
