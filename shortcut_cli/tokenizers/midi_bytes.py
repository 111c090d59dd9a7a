"""Standard MIDI Files byte by byte: how many notes a file holds, counted fast, and its events, read leniently.

Nothing here knows what a parser makes of the bytes, so its count is a check of one.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from shortcut_cli.errors import Rejected

HEADER_BYTES = 14
LAST_TICK = 2**31 - 1  # parsers count ticks in 32 bits
NOTE_OFF, NOTE_ON, KEY_PRESSURE, CONTROLLER = 0x80, 0x90, 0xA0, 0xB0  # status bytes of channel 0
PROGRAM, PRESSURE, PITCH_BEND = 0xC0, 0xD0, 0xE0
DRUM_CHANNEL = 9
SUSTAIN = 64  # the controller of the sustain pedal,
PEDAL_DOWN = 64  # which is down from this value on
ESCAPE, SYSEX, META = 0xF7, 0xF0, 0xFF
TRACK_NAME, END_OF_TRACK, TEMPO, TIME_SIGNATURE, KEY_SIGNATURE = 3, 0x2F, 0x51, 0x58, 0x59  # types of meta events
TEXTS = range(1, 16)  # names, lyrics, markers
SIZES = {TEMPO: 3, TIME_SIGNATURE: 4, KEY_SIGNATURE: 2}
SILENCING = frozenset({120, *range(123, 128)})  # controllers that end all notes of their channel (MIDI 1.0, table 3)
_SILENCES = np.isin(np.arange(128), list(SILENCING))
SYSTEM_DATA = {0xF1: 1, 0xF2: 2, 0xF3: 1}  # data bytes of messages that only a cable may carry; the others have none

# A delta time of up to three bytes; four or more claim 4,369 beats at 480 ticks, which deserve a closer look.
_DELTA, _DATA = rb"[\x80-\xff]{0,2}[\x00-\x7f]", rb"[\x00-\x7f]"
_AT_ONCE = b"4096"  # messages of a match, each of which takes memory until its end. No possessive quantifiers instead:
# before Python 3.11.5 a match can end behind the first bytes of what fails (https://github.com/python/cpython/pull/108004).


def _run(status: bytes, data: bytes) -> tuple[bytes, bytes]:
    """Of messages, of which all but the first may have running status: how they begin, and how they go on."""
    begin, more = _DELTA + status + data, b"(?:" + _DELTA + status + b"?" + data + b")"
    return begin + more + b"{0," + _AT_ONCE + b"}", more + b"{1," + _AT_ONCE + b"}"


_begin, _more = _run(rb"[\x80-\xbf\xe0-\xef]", _DATA + _DATA)
_PLAIN, _MORE_PLAIN = re.compile(b"(?:" + _begin + b")?"), re.compile(_more)
_begin, _more = _run(rb"[\xd0-\xdf]", _DATA)
_MORE_PRESSURES = re.compile(_more)
_TEMPO = _DELTA + rb"\xff\x51\x03(?!\x00\x00\x00)[\x00-\xff]{3}"
_PROGRAM = _DELTA + rb"(?P<status>[\xc0-\xcf])(?P<program>" + _DATA + rb")"
_SIZED = _DELTA + rb"(?:\xff(?P<kind>" + _DATA + rb")|\xf0)(?P<size>[\x80-\xff]?[\x00-\x7f])"
_RARE = re.compile(b"(?P<pressures>" + _begin + b")|" + _TEMPO + b"|" + _PROGRAM + b"|" + _SIZED)
_TWICE = b"\0\xff\x2f\0"  # some programs write a second End of Track

Event = tuple[int, int, bytes, int]
"""Tick from the start of the track; status with its channel, or META; data bytes (of a meta event its type, then its
content); where the next event begins."""


class Plain(NamedTuple):
    """What a file without oddities holds."""

    notes: int  # note-ons with a velocity
    orphans: list[tuple[int, int, int]]  # (where its track's events begin, channel, program), see `adopt`
    account: Counter[str]  # what a score does not hold, or what tokens do not, and what was mended


def plain(content: bytes) -> Plain | None:
    """The notes of a file without oddities; None if the file needs a closer look (see midi_repair).

    Oddities are what programs read in different ways: other headers and chunks than the standard has, running status
    across other events, long pauses, controllers that end notes, programs set in other tracks.
    """
    if content[:8] != b"MThd\0\0\0\6" or content[8:10] not in (b"\0\0", b"\0\1"):
        return None
    if not 0 < int.from_bytes(content[12:14]) < 0x8000:
        return None
    position, notes, channels, account = HEADER_BYTES, 0, Channels(), Counter[str]()
    for _ in range(int.from_bytes(content[10:12])):
        end = position + 8 + int.from_bytes(content[position + 4 : position + 8])
        if content[position : position + 4] != b"MTrk" or end > len(content):
            return None
        track = _plain_track(content, position + 8, end, channels, account)
        if track is None or not _is_short(content[position + 8 : end]):
            return None
        notes, position = notes + track, end
    if position < len(content) or not channels.agree:
        return None
    return Plain(notes, channels.orphans, account + channels.unheard)


class Channels:
    """Which channels play, with which programs, and what other tracks have to say about them."""

    def __init__(self) -> None:
        self.changed: set[int] = set()  # channels with a program other than 0, the default
        self.unset: set[int] = set()  # channels on which a track plays without a program of its own
        self.played: dict[int, int] = {}  # channel -> the program of its first note
        # (track, channel without notes there, program if set, how often the pedal is pressed)
        self.controlled: list[tuple[int, int, int | None, int]] = []

    def add(
        self, start: int, changes: list[tuple[int, int, int]], first: dict[int, int], controlled: dict[int, int]
    ) -> None:
        """Add a track: (place, channel, program) of each change, the place of the first note on each channel, and, for
        each channel with controllers and without notes, how often the pedal is pressed.
        """
        self.changed |= {channel for _, channel, program in changes if program}
        for channel, place in first.items():
            own = [program for changed, other, program in changes if other == channel and changed <= place]
            self.played.setdefault(channel, own[-1] if own else 0)
            if not own:
                self.unset.add(channel)
        for channel, presses in sorted(controlled.items()):
            self.controlled.append((start, channel, {c: program for _, c, program in changes}.get(channel), presses))

    @property
    def agree(self) -> bool:
        """Whether no track is given its programs by another one; the drums' program is ignored."""
        return not self.changed & self.unset - {DRUM_CHANNEL}

    @property
    def orphans(self) -> list[tuple[int, int, int]]:
        """The controllers of channels that play in other tracks only."""
        return [
            (start, channel, self.played[channel] if program is None else program)
            for start, channel, program, _ in self.controlled
            if channel in self.played
        ]

    @property
    def unheard(self) -> Counter[str]:
        """For the account: the pedals of channels that never play."""
        presses = sum(presses for _, channel, _, presses in self.controlled if channel not in self.played)
        return Counter(pedals_in=presses, pedals_dropped=presses)


def adopt(content: bytes, orphans: list[tuple[int, int, int]]) -> bytes:
    """The file with a stand-in, a note of pitch 0, velocity 1 and no length, where a track has only controllers.

    symusic drops the controllers of a track without notes, and with them the pedals that are in a track of their own.
    """
    parts, position = [], 0
    for start in sorted({start for start, _, _ in orphans}):
        inserted = b"".join(
            bytes((0, PROGRAM | channel, program, 0, NOTE_ON | channel, 0, 1, 0, NOTE_OFF | channel, 0, 0))
            for place, channel, program in orphans
            if place == start
        )
        size = int.from_bytes(content[start - 4 : start]) + len(inserted)
        parts += [content[position : start - 4], size.to_bytes(4), inserted]
        position = start
    return b"".join(parts) + content[position:]


def _plain_track(content: bytes, start: int, end: int, channels: Channels, account: Counter[str]) -> int | None:
    """Note-ons of a track whose events are all plain, and which ends with an End of Track; None for any other."""
    runs, size, position = [], 0, start  # runs of messages, and their bytes
    changes: list[tuple[int, int, int]] = []
    while True:
        begin, position = position, _rest(_PLAIN.match(content, position, end), _MORE_PLAIN, end)
        runs.append(content[begin:position])
        size += position - begin
        rare = _RARE.match(content, position, end)
        if rare is None:
            return None
        position, kind = rare.end(), rare["kind"]
        if rare["status"]:
            changes.append((size, rare["status"][0] & 15, rare["program"][0]))
        elif rare["size"]:
            length = _value(rare["size"])
            if kind == b"\x2f":
                break
            account[dropped_as(kind[0] if kind else None)] += 1
            data = content[position : position + length]
            position += length
            if position > end or (kind and not is_usable(kind[0], data)):
                return None
        elif rare["pressures"]:  # below 128 are two bytes of each: the end of its delta time, and its value
            position = _rest(rare, _MORE_PRESSURES, end)
            account["pressures_dropped"] += sum(byte < 0x80 for byte in content[rare.start() : position]) // 2
    if length or content[position:end] not in (b"", _TWICE):
        return None
    notes, first, controlled, silenced = _count(b"".join(runs), account)
    channels.add(start, changes, first, controlled)
    return None if any(place < silenced for place in first.values()) else notes


def _rest(found: re.Match[bytes] | None, more: re.Pattern[bytes], end: int) -> int:
    """Where the messages end of which a match holds the first ones, or none at all."""
    assert found is not None
    position = found.end()
    if position > found.start():
        while following := more.match(found.string, position, end):
            position = following.end()
    return position


def _count(messages: bytes, account: Counter[str]) -> tuple[int, dict[int, int], dict[int, int], int]:
    """Note-ons with a velocity among messages with two data bytes, and the place of the first one on each channel.

    Then the presses of the pedal on each other channel with controllers, and the place of the last controller that ends
    notes (-1: there is none).
    """
    content = np.frombuffer(messages, np.uint8)
    # Below 128 are three bytes of each message: the end of its delta time, and its data.
    delta, first, second = np.flatnonzero(content < 0x80).reshape(-1, 3).T
    status = content[delta + 1]
    # Under running status the data come at once, and the status is that of the last message that has one.
    numbers = np.where(status < 0x80, 0, np.arange(len(status)))
    status = status[np.maximum.accumulate(numbers)]
    kinds = status & 0xF0
    on = np.flatnonzero((kinds == NOTE_ON) & (content[second] > 0))
    channels, places = np.unique(status[on] & 15, return_index=True)
    controls = kinds == CONTROLLER
    numbers = content[first[controls]]
    silencing = delta[controls][_SILENCES[numbers]]
    account["control_changes_dropped"] += int((numbers != SUSTAIN).sum())
    account["pitch_bends_dropped"] += int((kinds == PITCH_BEND).sum())
    account["pressures_dropped"] += int((kinds == KEY_PRESSURE).sum())
    begun = dict(zip(channels.tolist(), delta[on[places]].tolist(), strict=True))
    where, pedal, down = status[controls] & 15, numbers == SUSTAIN, content[second[controls]] >= PEDAL_DOWN
    silent = set(np.unique(where).tolist()) - begun.keys()
    controlled = {channel: presses_of(down[pedal & (where == channel)]) for channel in silent}
    return len(on), begun, controlled, int(silencing[-1]) if len(silencing) else -1


def presses_of(down: Iterable[bool]) -> int:
    """How often a pedal is pressed, from whether it is down at each of its messages."""
    return sum(now and not before for before, now in pairwise([False, *down]))


def _is_short(track: bytes) -> bool:
    """Whether the delta times of a plain track can't add up to more than LAST_TICK.

    Only those of three bytes have two bytes above 127 that are not content of a meta event or system message.
    """
    high = np.frombuffer(track, np.uint8) > 127
    # At most 2**21 ticks for each of three bytes, 2**14 for each of two, 2**7 for each of one, which has an event of
    # four bytes to itself or three under running status.
    return (int((high[1:] & high[:-1]).sum()) << 21) + (int(high.sum()) << 14) + (len(track) << 6) <= LAST_TICK


def dropped_as(kind: int | None) -> str:
    """The name in the account of a meta event that tokens do not carry, by its type; None: a system message.

    Empty for tempos, time signatures and ends of tracks, which are accounted for where they are used.
    """
    if kind is None:
        return "system_messages_dropped"
    if kind in (TEMPO, TIME_SIGNATURE, END_OF_TRACK):
        return ""
    return {KEY_SIGNATURE: "key_signatures_dropped"}.get(
        kind, "texts_dropped" if kind in TEXTS else "meta_events_dropped"
    )


def is_usable(kind: int, data: bytes) -> bool:
    """Whether a meta event means something: a tempo of 0, 3/0 or a signature of the wrong size does not."""
    right = len(data) == SIZES.get(kind, len(data))
    if kind == TIME_SIGNATURE and right:
        return data[0] > 0 and data[1] < 8
    return right and (kind != TEMPO or any(data))


def _value(quantity: bytes) -> int:
    """A variable-length quantity as a number."""
    value = 0
    for byte in quantity:
        value = value << 7 | byte & 127
    return value


def unwrap(content: bytes) -> bytes:
    """The MIDI file inside a RIFF container (RMID); other content as it is. Raises Rejected if it holds none."""
    if content[:4] != b"RIFF" or content[8:12] != b"RMID":
        return content
    position = 12
    while position + 8 <= len(content):
        size = int.from_bytes(content[position + 4 : position + 8], "little")
        if content[position : position + 4] == b"data":
            return content[position + 8 : position + 8 + size]
        position += 8 + size + size % 2
    raise Rejected("is a RIFF container without a MIDI file")


def events(content: bytes, start: int, end: int, repairs: Counter[str]) -> Iterator[Event]:
    """The channel messages and meta events from `start` to `end`; more than one End of Track is possible.

    Tolerates, and counts in `repairs`: running status across other events, messages that only a cable may carry, and
    data bytes above 127, which become 127. Counts system messages there, too.
    Raises Rejected at anything that makes the rest unreadable.
    """
    try:
        yield from _events(content, start, end, repairs)
    except IndexError:
        raise Rejected(f"ends in the middle of an event, at byte {end:,}") from None


def _events(content: bytes, place: int, end: int, repairs: Counter[str]) -> Iterator[Event]:
    """The events from a place on. Raises IndexError if the last one goes beyond `end`."""
    tick, running, interrupted = 0, 0, False
    while place < end:
        delta, place = (content[place], place + 1) if content[place] < 0x80 else _quantity(content, place)
        tick += delta
        if tick > LAST_TICK:
            raise Rejected(f"claims to last more than {LAST_TICK:,} ticks")
        status = content[place]
        if status >= 0x80:
            place += 1
        elif running:
            status = running
            repairs["running_status_resumed"] += interrupted
        else:
            raise Rejected(f"has an event without a status at byte {place:,}")
        if status < SYSEX:
            size = 1 if PROGRAM <= status < 0xE0 else 2
            data = content[place : place + size]
            if place + size > end:
                raise IndexError
            if not data.isascii():
                data = _seven_bits(data, status, place, repairs)
            place += size
            running, interrupted = status, False
            yield tick, status, data, place
        elif status in (META, SYSEX, ESCAPE):
            kind = content[place : place + 1] if status == META else b""
            size, place = _quantity(content, place + len(kind))
            data = content[place : place + size]
            place += size
            if place > end:
                raise IndexError
            interrupted = True
            repairs[dropped_as(None)] += status != META
            if status == META:
                yield tick, META, kind + data, place
        else:
            place += SYSTEM_DATA.get(status, 0)
            repairs["system_messages_skipped"] += 1


def _quantity(content: bytes, place: int) -> tuple[int, int]:
    """A variable-length quantity, and where it ends. Raises Rejected if it is too large."""
    value, byte = 0, content[place]
    while byte > 127:
        value = value << 7 | byte & 127
        if value > LAST_TICK:
            raise Rejected("has a number of more than 31 bits")
        place += 1
        byte = content[place]
    return value << 7 | byte, place + 1


def _seven_bits(data: bytes, status: int, place: int, repairs: Counter[str]) -> bytes:
    """Data bytes, none above 127. Raises Rejected for a pitch above 127."""
    if status < CONTROLLER and data[0] > 127:
        raise Rejected(f"has a note of pitch {data[0]} at byte {place:,}")
    repairs["data_bytes_clipped"] += sum(byte > 127 for byte in data)
    return bytes(min(byte, 127) for byte in data)


class TrackWriter:
    """The bytes of a track, from events in order of time, each with a status of its own."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.tick = 0

    def add(self, tick: int, message: bytes) -> None:
        """Append a message: its status and its data bytes; of a meta event also its type and size."""
        assert tick >= self.tick, (tick, self.tick)
        while tick - self.tick >= 1 << 28:  # a delta time has at most four bytes: an empty text in between
            self.content += _delta((1 << 28) - 1) + b"\xff\x01\0"
            self.tick += (1 << 28) - 1
        self.content += _delta(tick - self.tick) + message
        self.tick = tick

    def add_meta(self, tick: int, kind: int, data: bytes) -> None:
        """Append a meta event."""
        self.add(tick, bytes((META, kind)) + _delta(len(data)) + data)

    def chunk(self) -> bytes:
        """The whole chunk, with an End of Track where the last event is."""
        content = bytes(self.content) + b"\0\xff\x2f\0"
        return b"MTrk" + len(content).to_bytes(4) + content


@lru_cache(maxsize=1 << 12)
def _delta(value: int) -> bytes:
    """A number below 2**28 as a variable-length quantity."""
    digits = [value & 127]
    while value := value >> 7:
        digits.append(value & 127 | 128)
    return bytes(reversed(digits))


def midi_file(ticks_per_quarter: int, tracks: list[TrackWriter]) -> bytes:
    """A Standard MIDI File of type 1."""
    header = b"MThd\0\0\0\6\0\1" + len(tracks).to_bytes(2) + ticks_per_quarter.to_bytes(2)
    return header + b"".join(track.chunk() for track in tracks)
