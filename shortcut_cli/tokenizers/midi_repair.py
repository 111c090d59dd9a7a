"""MIDI files that programs read in different ways, read leniently and written again so that all read them alike.

What was mended is counted; a file is rejected if notes would be lost or guessed.
"""

from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from shortcut_cli.errors import Rejected
from shortcut_cli.tokenizers.midi_bytes import (
    CONTROLLER,
    END_OF_TRACK,
    HEADER_BYTES,
    KEY_PRESSURE,
    META,
    NOTE_OFF,
    NOTE_ON,
    PEDAL_DOWN,
    PITCH_BEND,
    PRESSURE,
    PROGRAM,
    SILENCING,
    SUSTAIN,
    TEMPO,
    TIME_SIGNATURE,
    Channels,
    Plain,
    TrackWriter,
    dropped_as,
    events,
    is_usable,
    midi_file,
    presses_of,
)

MAX_TRACKS = 65_535  # the header has two bytes for their number
MAX_PROGRAMS = 1_000_000  # changes of program that are held at once
DROPPED = {
    KEY_PRESSURE: "pressures_dropped",
    PRESSURE: "pressures_dropped",
    CONTROLLER: "control_changes_dropped",
    PITCH_BEND: "pitch_bends_dropped",
}


@dataclass
class _Track:
    """What has to be known of a track before it can be written again."""

    start: int  # of its events in the file
    stop: int
    first_end: int | None = None  # where in the file its first End of Track ends, if it has one
    failure: Rejected | None = None  # why the events can't be read up to `stop`
    end: int = 0  # ticks: its last event
    last_note: int = 0  # ticks: the last beginning or end of a note
    open_from: dict[int, int] = field(default_factory=dict)  # note -> number of the event from which it lacks an end
    programs: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # channel -> (tick, program)

    def set_program(self, channel: int, tick: int, program: int) -> None:
        """Note a change of program; of several at the same tick the last one counts."""
        changes = self.programs.setdefault(channel, [])
        if changes and changes[-1][0] == tick:
            changes.pop()
        changes.append((tick, program))


def rewrite(content: bytes, most: int) -> tuple[bytes, Plain]:
    """A file of type 1 with the same music, and what it holds; its account tells what was mended, too.

    A note that nothing ends is closed by the next one of its pitch on its channel and track. If there is none, it
    sounds until the last note of the piece begins or ends, or, if that is its own beginning, until the last event.
    Controllers that silence a channel end its notes. Of a track without programs of its own, notes take those that
    other tracks set on their channel. Raises Rejected with the reason if the file can't be read, or if it has more than
    `most` notes.
    """
    mended: Counter[str] = Counter()
    kind, promised, division, position = _header(content)
    tracks = list(_tracks(content, position, mended))
    if kind == 2 and len(tracks) > 1:
        raise Rejected(f"is of type 2: {len(tracks)} independent sequences, not one piece")
    if len(tracks) < promised and (mended["bytes_skipped"] or not tracks):
        raise Rejected(f"is cut short: its header promises {promised:,} tracks, {len(tracks):,} are whole")
    mended["tracks_beyond_header"] += max(len(tracks) - promised, 0)
    mended["tracks_missing"] += max(promised - len(tracks), 0)
    piece = _Piece(tracks, mended)
    rewriters = [_Rewriter(piece, number) for number in range(len(tracks))]
    written = [rewriter.run(content) for rewriter in rewriters]
    channels, place = Channels(), HEADER_BYTES
    for rewriter, writer in zip(rewriters, written, strict=True):
        channels.add(place + 8, rewriter.changes, rewriter.first, rewriter.controlled)
        place += len(writer.chunk())
    notes = sum(rewriter.notes for rewriter in rewriters)
    if notes > most:
        raise Rejected(f"has {notes:,} notes, more than {most:,}")
    return midi_file(division, written), Plain(notes, channels.orphans, mended + channels.unheard)


def _header(content: bytes) -> tuple[int, int, int, int]:
    """Type, number of tracks, ticks per quarter note, and where the header ends."""
    size = int.from_bytes(content[4:8])
    if size < 6 or len(content) < 8 + size:
        raise Rejected("can't be parsed: its header is cut short")
    kind, promised, division = (int.from_bytes(content[place : place + 2]) for place in (8, 10, 12))
    if kind > 2:
        raise Rejected(f"is of type {kind}, which the standard does not have")
    if division & 0x8000:
        raise Rejected("counts time in SMPTE frames, not in beats")
    if not division:
        raise Rejected("has a time division of 0 ticks")
    return kind, promised, division, 8 + size


def _tracks(content: bytes, position: int, mended: Counter[str]) -> Iterator[_Track]:
    """The tracks of a file. Chunks of other kinds are skipped, as the standard wants it."""
    number = programs = 0
    while position < len(content):
        declared = _chunk_end(content, position)
        if content[position : position + 4] == b"MTrk" and position + 8 <= len(content):
            number += 1
            if number > MAX_TRACKS:
                raise Rejected(f"has more than {MAX_TRACKS:,} tracks")
            track, position = _track(content, position + 8, declared, number, mended)
            programs += sum(map(len, track.programs.values()))
            if programs > MAX_PROGRAMS:
                raise Rejected(f"has more than {MAX_PROGRAMS:,} program changes")
            yield track
        elif _is_chunk(content, position):
            position = declared
        else:
            another = content[position : position + 4] == b"MThd"  # a second file, glued to this one
            following = len(content) if another else _next_track(content, position + 1)
            mended["bytes_skipped"] += following - position
            position = following


def _chunk_end(content: bytes, position: int) -> int:
    return position + 8 + int.from_bytes(content[position + 4 : position + 8])


def _is_chunk(content: bytes, position: int) -> bool:
    """Whether a whole chunk begins here, other than the header of another file."""
    name = content[position : position + 4]
    if position + 8 > len(content) or name == b"MThd":
        return False
    return name == b"MTrk" or (name.isalnum() and name.isascii() and _chunk_end(content, position) <= len(content))


def _next_track(content: bytes, position: int) -> int:
    """Where the next track begins, or else the end of the file."""
    found = content.find(b"MTrk", position)
    return found if found >= 0 else len(content)


def _track(content: bytes, start: int, declared: int, number: int, mended: Counter[str]) -> tuple[_Track, int]:
    """A track, and where what follows it begins.

    It ends where it declares to if there are events up to there; else its first End of Track counts.
    """
    stop = declared if declared <= len(content) else _next_track(content, start)
    track = _survey(content, start, stop)
    if track.first_end is None and declared < len(content) and not _is_chunk(content, declared):
        longer = _survey(content, start, _next_track(content, start))
        if longer.first_end is not None:
            track, stop = longer, longer.first_end
    first = track.first_end
    if first is None:
        _accept_without_end(track, declared - start, len(content) - start, number)
        mended["tracks_without_end"] += 1
        return track, stop
    if first > declared or declared > len(content) or content[first : first + 4] == b"MTrk":
        mended["track_lengths_corrected"] += first != declared
        return _survey(content, start, first), first
    if track.failure is not None:  # no events, but rubbish
        mended["bytes_skipped"] += stop - first
        return _survey(content, start, first), stop
    mended["track_ends_ignored"] += first < stop
    return track, stop


def _accept_without_end(track: _Track, declared: int, there: int, number: int) -> None:
    """Raise Rejected unless all bytes of a track are there and are events."""
    if declared > there:
        raise Rejected(f"is cut short: {there:,} of {declared:,} bytes of track {number} are there")
    if track.failure is not None:
        raise Rejected(f"can't be parsed: track {number} {track.failure}") from track.failure


def _survey(content: bytes, start: int, stop: int) -> _Track:
    track = _Track(start, stop)
    try:
        _look_through(track, content)
    except Rejected as failure:
        track.failure = failure
    return track


def _look_through(track: _Track, content: bytes) -> None:
    """Fill in what the events of a track tell."""
    sounding: list[dict[int, int]] = [{} for _ in range(16)]  # channel -> pitch -> how many notes
    since: dict[int, int] = {}
    for number, (tick, status, data, after) in enumerate(events(content, track.start, track.stop, Counter())):
        track.end, kind, channel = tick, status & 0xF0, status & 15
        if kind in (NOTE_ON, NOTE_OFF):
            track.last_note, pitch = tick, data[0]
            count = sounding[channel].get(pitch, 0)
            if kind == NOTE_ON and data[1]:
                if not count:
                    since[channel << 7 | pitch] = number
                sounding[channel][pitch] = count + 1
            elif count:
                sounding[channel][pitch] = count - 1
        elif kind == PROGRAM:
            track.set_program(channel, tick, data[0])
        elif kind == CONTROLLER and data[0] in SILENCING:
            sounding[channel].clear()
        elif status == META and data[0] == END_OF_TRACK and track.first_end is None:
            track.first_end = after
            if content[after : after + 4] == b"MTrk":
                break  # the declared length may be that of the whole file
    for channel, counts in enumerate(sounding):
        for pitch in (pitch for pitch, count in counts.items() if count):
            track.open_from[channel << 7 | pitch] = since[channel << 7 | pitch]


class _Piece:
    """What the tracks know of each other."""

    def __init__(self, tracks: list[_Track], mended: Counter[str]) -> None:
        self.tracks, self.mended = tracks, mended
        self.last_note = max((track.last_note for track in tracks), default=0)
        self.end = max((track.end for track in tracks), default=0)
        self.programs: dict[int, list[tuple[int, int, int]]] = {}  # channel -> (tick, number of the track, program)
        for number, track in enumerate(tracks):
            for channel, changes in track.programs.items():
                self.programs.setdefault(channel, []).extend((tick, number, program) for tick, program in changes)
        for together in self.programs.values():
            together.sort()


class _Rewriter:
    """Writes one track again."""

    def __init__(self, piece: _Piece, number: int) -> None:
        self.piece, self.number, self.track = piece, number, piece.tracks[number]
        self.mended, self.writer, self.notes = piece.mended, TrackWriter(), 0
        self.sounding: list[dict[int, deque[int]]] = [{} for _ in range(16)]  # channel -> pitch -> ticks of note-ons
        self.own: set[int] = set()  # channels with a program of this track's own
        self.lent: dict[int, int] = {}  # channel -> the program that another track set
        # What is written: (byte, channel, program), the byte of each channel's first note.
        self.changes: list[tuple[int, int, int]] = []
        self.first: dict[int, int] = {}
        self.pedals: list[list[bool]] = [[] for _ in range(16)]  # by channel: whether it is down at each message

    @property
    def controlled(self) -> dict[int, int]:
        """How often the pedal is pressed on each channel that has one, but no notes in this track."""
        found = {channel: presses_of(down) for channel, down in enumerate(self.pedals) if down}
        return {channel: presses for channel, presses in found.items() if channel not in self.first}

    def run(self, content: bytes) -> TrackWriter:
        """The track, with an end for each note."""
        for number, (tick, status, data, _) in enumerate(
            events(content, self.track.start, self.track.stop, self.mended)
        ):
            kind = status & 0xF0
            if kind == NOTE_ON and data[1]:
                self._begin(number, tick, status, data)
            elif kind in (NOTE_ON, NOTE_OFF):
                self._close(tick, status & 15, data[0])
            elif status == META:
                self._meta(tick, data[0], data[1:])
            elif kind == CONTROLLER and data[0] in SILENCING:
                self.mended["control_changes_dropped"] += 1
                self._silence(tick, status & 15)
            elif kind == PROGRAM:
                self.own.add(status & 15)
                self._program(tick, status & 15, data[0])
            else:
                self._other(tick, status, data)
        self._close_the_rest()
        return self.writer

    def _begin(self, number: int, tick: int, status: int, data: bytes) -> None:
        channel, pitch = status & 15, data[0]
        if pitch in self.sounding[channel] and number >= self.track.open_from.get(channel << 7 | pitch, number + 1):
            self.mended["notes_closed"] += 1
            self._close(tick, channel, pitch)
        if channel not in self.own and channel in self.piece.programs:
            self._borrow(tick, channel)
        self.first.setdefault(channel, len(self.writer.content))
        self.writer.add(tick, bytes((status,)) + data)
        self.sounding[channel].setdefault(pitch, deque()).append(tick)
        self.notes += 1

    def _borrow(self, tick: int, channel: int) -> None:
        """Set the program that another track set last on a channel."""
        changes = self.piece.programs[channel]
        place = bisect_right(changes, tick, key=lambda change: change[0]) - 1
        place -= place >= 0 and changes[place][1] == self.number  # at this tick, but behind the note
        program = changes[place][2] if place >= 0 else 0
        if program != self.lent.get(channel, 0):
            self._program(tick, channel, program)
            self.lent[channel] = program

    def _program(self, tick: int, channel: int, program: int) -> None:
        self.changes.append((len(self.writer.content), channel, program))
        self.writer.add(tick, bytes((PROGRAM | channel, program)))

    def _other(self, tick: int, status: int, data: bytes) -> None:
        """Copy a pedal; count what tokens do not carry."""
        kind = status & 0xF0
        if kind == CONTROLLER and data[0] == SUSTAIN:
            self.pedals[status & 15].append(data[1] >= PEDAL_DOWN)
            self.writer.add(tick, bytes((status,)) + data)
        else:
            self.mended[DROPPED[kind]] += 1

    def _close(self, tick: int, channel: int, pitch: int) -> None:
        """End the note that began first, as most programs do; a note-off without a note is left out."""
        if begun := self.sounding[channel].get(pitch):
            begun.popleft()
            if not begun:
                del self.sounding[channel][pitch]
            self.writer.add(tick, bytes((NOTE_OFF | channel, pitch, 0)))

    def _silence(self, tick: int, channel: int) -> None:
        for pitch, begun in sorted(self.sounding[channel].items()):
            for _ in range(len(begun)):
                self.mended["notes_ended_by_controller"] += 1
                self._close(tick, channel, pitch)

    def _close_the_rest(self) -> None:
        left = [
            (self._end_of(tick), channel, pitch)
            for channel, pitches in enumerate(self.sounding)
            for pitch, begun in pitches.items()
            for tick in begun
        ]
        for tick, channel, pitch in sorted(left):
            self.mended["notes_closed"] += 1
            self._close(max(tick, self.writer.tick), channel, pitch)

    def _end_of(self, begun: int) -> int:
        return self.piece.last_note if self.piece.last_note > begun else self.piece.end

    def _meta(self, tick: int, kind: int, data: bytes) -> None:
        """Copy tempos and time signatures; those without a meaning are left out."""
        if not is_usable(kind, data):
            self.mended["meta_events_skipped"] += 1
        elif kind in (TEMPO, TIME_SIGNATURE):
            self.writer.add_meta(tick, kind, data)
        else:
            self.mended[dropped_as(kind)] += 1
