"""The bytes of MIDI files: every note is found, odd files are mended or refused with the reason."""

import hashlib
import io
import os
import tracemalloc
from collections import Counter, defaultdict

import mido
import numpy as np
import pytest

from shortcut_cli import files
from shortcut_cli.errors import Rejected
from shortcut_cli.tokenizers import midi_bytes, midi_reading, midi_repair

hexa = bytes.fromhex
EOT = hexa("00 ff2f00")
C, D, E = hexa("00 903c40 60 803c40"), hexa("00 903e40 60 803e40"), hexa("00 904040 60 804040")  # 96 ticks each


def track(*events, declared=None):
    body = b"".join(events)
    return b"MTrk" + (len(body) if declared is None else declared).to_bytes(4) + body


def smf(*chunks, kind=1, promised=None, division=96, more=b""):
    number = sum(chunk.startswith(b"MTrk") for chunk in chunks) if promised is None else promised
    header = kind.to_bytes(2) + number.to_bytes(2) + division.to_bytes(2) + more
    return b"MThd" + len(header).to_bytes(4) + header + b"".join(chunks)


def read(tmp_path, content, **keys):
    (tmp_path / "a.mid").write_bytes(content)
    return midi_reading.read_score(tmp_path / "a.mid", **keys)


def listed(score):
    """(start, length, pitch) of all notes."""
    return sorted((note.time, note.duration, note.pitch) for part in score.tracks for note in part.notes)


def heard(content, merged=False):
    """(start, length, pitch, velocity, program) by mido and a plain loop; -1: drums."""
    file, notes = mido.MidiFile(file=io.BytesIO(content), clip=True), []
    for events in [file.merged_track] if merged else file.tracks:
        now, programs, sounding = 0, [0] * 16, defaultdict(list)
        for event in events:
            now += event.time
            if event.type == "program_change":
                programs[event.channel] = event.program
            elif event.type == "note_on" and event.velocity:
                sounding[event.channel, event.note].append((now, event.velocity, programs[event.channel]))
            elif event.type in ("note_on", "note_off") and sounding[event.channel, event.note]:
                start, velocity, program = sounding[event.channel, event.note].pop(0)
                notes.append((start, now - start, event.note, velocity, -1 if event.channel == 9 else program))
    return sorted(notes)


def dropped(content):
    """What tokens do not carry, as mido and a plain loop count it."""
    names = {"pitchwheel": "pitch_bends", "aftertouch": "pressures", "polytouch": "pressures"}
    names |= {"sysex": "system_messages", "key_signature": "key_signatures", "control_change": "control_changes"}
    names |= dict.fromkeys(("text", "copyright", "track_name", "lyrics", "marker"), "texts")
    names |= dict.fromkeys(("smpte_offset", "sequencer_specific", "midi_port"), "meta_events")
    events = [event for one in mido.MidiFile(file=io.BytesIO(content), clip=True).tracks for event in one]
    return Counter(
        names[event.type] + "_dropped"
        for event in events
        if event.type in names and not (event.type == "control_change" and event.control == 64)
    )


def ours(score):
    return sorted(
        (note.time, note.duration, note.pitch, note.velocity, -1 if part.is_drum else part.program)
        for part in score.tracks
        for note in part.notes
    )


def played(generator, events=200):
    """A track of all kinds of events, as mido writes it: with running status."""
    sounding, messages = [], []
    channels = generator.choice(16, 3, replace=False).tolist()
    for _ in range(events):
        time, channel = int(generator.choice([0, 0, 5, 200, 20000])), int(generator.choice(channels))
        kind = generator.integers(0, 14)
        if kind < 5:
            key = (channel, int(generator.integers(0, 128)))
            sounding.append(key)
            messages.append(
                mido.Message(
                    "note_on", channel=channel, note=key[1], velocity=int(generator.integers(1, 128)), time=time
                )
            )
        elif kind < 10 and sounding:
            channel, note = sounding.pop(0)
            messages.append(
                mido.Message(
                    ["note_on", "note_off"][kind % 2],
                    channel=channel,
                    note=note,
                    velocity=0 if kind % 2 == 0 else 64,
                    time=time,
                )
            )
        elif kind == 10:
            messages.append(
                mido.Message("control_change", channel=channel, control=7 + time % 2 * 57, value=3, time=time)
            )
        elif kind == 11:
            messages.append(mido.Message("aftertouch", channel=channel, value=3, time=time))
            messages.append(mido.Message("aftertouch", channel=channel, value=4))
        elif kind == 12:
            messages.append(mido.MetaMessage("set_tempo", tempo=400000 + time, time=time))
            messages.append(mido.Message("pitchwheel", channel=channel, pitch=77))
        else:
            messages.append(mido.MetaMessage("text", text="x" * 200, time=time))
            messages.append(mido.Message("sysex", data=[1, 2, 3]))
    messages += [mido.Message("note_off", channel=channel, note=note, time=3) for channel, note in sounding]
    return mido.MidiTrack(messages)


@pytest.mark.parametrize("seed", range(20))
def test_notes_are_counted_and_read_as_mido_reads_them(tmp_path, seed):
    generator = np.random.default_rng(seed)
    tracks = [played(generator) for _ in range(1 + seed % 3)]
    mido.MidiFile(tracks=tracks).save(tmp_path / "m.mid")
    content = (tmp_path / "m.mid").read_bytes()
    wanted = sum(message.type == "note_on" and message.velocity > 0 for one in tracks for message in one)
    found = midi_bytes.plain(content)
    assert (found.notes, found.orphans) == (wanted, [])
    assert {name: count for name, count in found.account.items() if name and count} == dropped(content)
    score, account = midi_reading.read_score(tmp_path / "m.mid")
    assert ours(score) == heard(content)
    assert account == dropped(content)
    # The lenient way reads the same.
    again, found = midi_repair.rewrite(content, wanted)
    assert heard(again) == heard(content)
    assert (found.notes, found.orphans) == (wanted, [])
    assert {name: count for name, count in found.account.items() if name and count} == dropped(content)


@pytest.mark.parametrize("number", [1, 4095, 4096, 4097, 4098, 8193, 20_000])
@pytest.mark.parametrize("running", [False, True])
def test_long_runs_of_messages_are_counted_as_mido_counts_them(tmp_path, number, running):
    """A regular expression takes some thousand messages at once."""
    notes = hexa("00 903c40 01 903c00") + (hexa("00 3c40 01 3c00") if running else hexa("00 903c40 01 903c00")) * number
    pressures = hexa("00 d005") + (hexa("8100 06") if running else hexa("8100 d006")) * number
    content = smf(track(notes, pressures, C, pressures, EOT))
    found = midi_bytes.plain(content)
    assert found.notes == len(heard(content)) == number + 2
    assert {name: count for name, count in found.account.items() if count} == dropped(content)
    assert found.account["pressures_dropped"] == 2 * (number + 1)


def test_memory_for_a_run_does_not_grow_with_it():
    content = hexa("00 903c40") + hexa("60 3c40") * 100_000
    tracemalloc.start()
    try:
        run = midi_bytes._PLAIN.match(content)
        assert midi_bytes._rest(run, midi_bytes._MORE_PLAIN, len(content)) == len(content)
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("first", ["00 3c40", "00 d0 05 00 3c40", "00 ff5103010203 00 3c40", "00 c005 00 3c40"])
def test_a_run_has_a_status_of_its_own(first):
    assert midi_bytes.plain(smf(track(C * 5000, hexa("00 c101"), hexa(first), EOT))) is None


CASES = {
    "running status goes on behind a SysEx message": (
        smf(track(hexa("00 903c40 60 3c00 00 f003 7e09f7 00 3e40 60 3e00"), EOT)),
        [(0, 96, 60), (96, 96, 62)],
        {"running_status_resumed": 1, "system_messages_dropped": 1},
    ),
    "running status goes on behind a text": (
        smf(track(hexa("00 903c40 60 3c00 00 ff010141 00 3e40 60 3e00"), EOT)),
        [(0, 96, 60), (96, 96, 62)],
        {"running_status_resumed": 1, "texts_dropped": 1},
    ),
    "an escape with bytes for a cable": (
        smf(track(hexa("00 903c40 00 f703 f84142 60 803c40"), EOT)),
        [(0, 96, 60)],
        {"system_messages_dropped": 1},
    ),
    "messages that only a cable may carry": (
        smf(track(hexa("00 903c40 00 fa 00 f27f7f 00 f301 60 803c40"), EOT)),
        [(0, 96, 60)],
        {"system_messages_skipped": 3},
    ),
    "the header says one of two tracks": (
        smf(track(C, EOT), track(D, EOT), promised=1),
        [(0, 96, 60), (0, 96, 62)],
        {"tracks_beyond_header": 1},
    ),
    "the header says three of two tracks": (
        smf(track(C, EOT), track(D, EOT), promised=3),
        [(0, 96, 60), (0, 96, 62)],
        {"tracks_missing": 1},
    ),
    "a long header": (smf(track(C, EOT), more=b"more"), [(0, 96, 60)], {}),
    "a chunk of another kind": (
        smf(track(C, EOT), b"XFIH\0\0\0\2ab", track(D, EOT)),
        [(0, 96, 60), (0, 96, 62)],
        {},
    ),
    "rubbish between tracks": (
        smf(track(C, EOT), b"\0\0\0", track(D, EOT)),
        [(0, 96, 60), (0, 96, 62)],
        {"bytes_skipped": 3},
    ),
    "rubbish behind the last track": (smf(track(C, EOT)) + b"rubbish", [(0, 96, 60)], {"bytes_skipped": 7}),
    "another file behind the first": (
        smf(track(C, EOT)) + smf(track(D, EOT)),
        [(0, 96, 60)],
        {"bytes_skipped": len(smf(track(D, EOT)))},
    ),
    "a RIFF container": (
        b"RIFF\0\0\0\0RMIDLIST\3\0\0\0abc\0data"
        + len(smf(track(C, EOT))).to_bytes(4, "little")
        + smf(track(C, EOT))
        + b"LIST\0\0\0\0",
        [(0, 96, 60)],
        {},
    ),
    "two notes that nothing ends": (
        smf(track(hexa("00 903c40 60 904040 60 904340 60 804340 50"), EOT[1:])),
        [(0, 288, 60), (96, 192, 64), (192, 96, 67)],
        {"notes_closed": 2},
    ),
    "the next note of the pitch ends one that nothing ends": (
        smf(track(hexa("00 903c40 60 903c40 60 803c40 60 903c40 60 803c40"), EOT)),
        [(0, 96, 60), (96, 96, 60), (288, 96, 60)],
        {"notes_closed": 1},
    ),
    "overlaps before a note that nothing ends": (
        smf(track(hexa("00 903c40 60 903c40 60 803c40 60 803c40 60 903c40 60 804040"), EOT)),
        [(0, 192, 60), (96, 192, 60), (384, 96, 60)],
        {"notes_closed": 1},
    ),
    "the last note of all, which nothing ends": (
        smf(track(C, hexa("00 903e40 830f"), EOT[1:])),
        [(0, 96, 60), (96, 399, 62)],
        {"notes_closed": 1},
    ),
    "a note that nothing ends, with a later one in another track": (
        smf(track(hexa("00 903c40"), EOT), track(hexa("60 914040 60 814040"), EOT)),
        [(0, 192, 60), (96, 96, 64)],
        {"notes_closed": 1},
    ),
    "all notes off": (
        smf(track(hexa("00 903c40 00 903e40 00 914040 60 b07b00 60 814040 00 903c40 60 803c40"), EOT)),
        [(0, 96, 60), (0, 96, 62), (0, 192, 64), (192, 96, 60)],
        {"notes_ended_by_controller": 2, "control_changes_dropped": 1},
    ),
    "all sound off, before the note-off": (
        smf(track(hexa("00 903c40 60 b07800 60 803c40"), EOT)),
        [(0, 96, 60)],
        {"notes_ended_by_controller": 1, "control_changes_dropped": 1},
    ),
    "all notes off under running status": (
        smf(track(hexa("00 903c40 60 b04040 00 7b00 60 803c40"), EOT)),
        [(0, 96, 60)],
        {"notes_ended_by_controller": 1, "control_changes_dropped": 1},
    ),
    "overlaps behind all notes off": (
        smf(track(hexa("00 903c40 60 b07b00 60 903c40 60 903c40 60 803c40 60 803c40 00 903c40"), D, EOT)),
        [(0, 96, 60), (192, 192, 60), (288, 192, 60), (480, 96, 60), (480, 96, 62)],
        {"notes_closed": 1, "notes_ended_by_controller": 1, "control_changes_dropped": 1},
    ),
    "all notes off while none sounds": (
        smf(track(hexa("00 b07b00"), C, hexa("00 b07b00"), EOT)),
        [(0, 96, 60)],
        {"control_changes_dropped": 2},
    ),
    "a note-off without a note": (smf(track(hexa("00 803c40 10 803e40"), C, EOT)), [(16, 96, 60)], {}),
    "a note without a length": (smf(track(hexa("00 903c40 00 803c40"), D, EOT)), [(0, 0, 60), (0, 96, 62)], {}),
    "no End of Track": (smf(track(C), track(D, EOT)), [(0, 96, 60), (0, 96, 62)], {"tracks_without_end": 1}),
    "two Ends of Track": (smf(track(C, EOT, EOT)), [(0, 96, 60)], {}),
    "events behind an End of Track": (
        smf(track(hexa("00 903c40 60"), EOT[1:], hexa("60 803c40"), D, EOT)),
        [(0, 192, 60), (192, 96, 62)],
        {"track_ends_ignored": 1},
    ),
    "rubbish behind an End of Track": (smf(track(C, EOT, b"\1\2\3\4")), [(0, 96, 60)], {"bytes_skipped": 4}),
    "a length that is too long": (smf(track(C, EOT, declared=99)), [(0, 96, 60)], {"track_lengths_corrected": 1}),
    "a length that takes in the next track": (
        smf(track(C, EOT, declared=25), track(D, EOT)),
        [(0, 96, 60), (0, 96, 62)],
        {"track_lengths_corrected": 1},
    ),
    "a length that is too short": (
        smf(track(C, D, EOT, declared=4), track(E, EOT)),
        [(0, 96, 60), (0, 96, 64), (96, 96, 62)],
        {"track_lengths_corrected": 1},
    ),
    "a length of zero, in the last track": (
        smf(track(C, EOT, declared=0)),
        [(0, 96, 60)],
        {"track_lengths_corrected": 1},
    ),
    "a delta time of four bytes": (smf(track(hexa("00 903c40 81808000 803c40"), EOT)), [(0, 1 << 21, 60)], {}),
    "a delta time of five bytes": (smf(track(hexa("00 903c40 8080808060 803c40"), EOT)), [(0, 96, 60)], {}),
    "long pauses one after the other": (
        smf(track(hexa("ffffff7f f00101 ffffff7f 903c40 60 803c40"), EOT)),
        [(2 * (1 << 28) - 2, 96, 60)],
        {"system_messages_dropped": 1},
    ),
    "a controller above 127": (
        smf(track(hexa("00 b0a8ff"), C, EOT)),
        [(0, 96, 60)],
        {"data_bytes_clipped": 2, "control_changes_dropped": 1},
    ),
    "a tempo of zero": (smf(track(hexa("00 ff5103000000"), C, EOT)), [(0, 96, 60)], {"meta_events_skipped": 1}),
    "a tempo of zero, a signature of 0/4 and a short one": (
        smf(track(hexa("00 ff5103000000 00 ff580400021808 00 ff58020402"), C, EOT)),
        [(0, 96, 60)],
        {"meta_events_skipped": 3},
    ),
    "the drums": (smf(track(hexa("00 993c40 60 893c40"), EOT)), [(0, 96, 60)], {}),
    "velocity zero ends notes": (smf(track(hexa("00 903c40 60 3c00"), EOT)), [(0, 96, 60)], {}),
    "one sequence of type 2": (smf(track(C, EOT), kind=2), [(0, 96, 60)], {}),
    "two tracks in a file of type 0": (smf(track(C, EOT), track(D, EOT), kind=0), [(0, 96, 60), (0, 96, 62)], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_odd_files_are_read_whole_and_what_was_mended_is_counted(tmp_path, name):
    content, notes, mended = CASES[name]
    score, account = read(tmp_path, content)
    assert listed(score) == notes
    assert account == mended


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (smf(track(C, EOT), track(D, EOT), kind=2), "is of type 2: 2 independent sequences, not one piece"),
        (smf(track(C, EOT), kind=3), "is of type 3, which the standard does not have"),
        (smf(track(C, EOT), division=0xE728), "counts time in SMPTE frames, not in beats"),
        (smf(track(C, EOT), division=0), "has a time division of 0 ticks"),
        (smf(track(C, EOT))[:13], "can't be parsed: its header is cut short"),
        (b"MThd\0\0\0\5" + bytes(30), "can't be parsed: its header is cut short"),
        (smf(track(C, EOT))[:-6], "is cut short: 6 of 12 bytes of track 1 are there"),
        (smf(track(C, EOT), track(D, EOT))[:-1], "is cut short: 11 of 12 bytes of track 2 are there"),
        (smf(track(C, EOT), track(D, EOT))[:-13], "is cut short: its header promises 2 tracks, 1 are whole"),
        (smf(track(C, EOT))[:14], "is cut short: its header promises 1 tracks, 0 are whole"),
        (smf(track(hexa("00 3c40"), EOT)), "can't be parsed: track 1 has an event without a status at byte 23"),
        (smf(track(hexa("00 90c840"), EOT)), "can't be parsed: track 1 has a note of pitch 200 at byte 24"),
        (smf(track(C, hexa("00 903c"))), "can't be parsed: track 1 ends in the middle of an event, at byte 33"),
        (smf(track(hexa("00 ff0109 61"))), "can't be parsed: track 1 ends in the middle of an event, at byte 27"),
        (smf(track(b"\xff" * 9, C, EOT)), "can't be parsed: track 1 has a number of more than 31 bits"),
        (
            smf(track(hexa("ffffff7f f00101") * 9, EOT[:-3])),
            "can't be parsed: track 1 claims to last more than 2,147,483,647 ticks",
        ),
        (
            smf(track(hexa("ffffff7f 903c40 00 803c40") * 9, EOT)),
            "can't be parsed: track 1 claims to last more than 2,147,483,647 ticks",
        ),
        (b"RIFF\0\0\0\0RMIDLIST\0\0\0\0", "is a RIFF container without a MIDI file"),
        (b"RIFF\0\0\0\0RMIDdata\3\0\0\0MTh", "is not a MIDI file: it begins with b'MTh'"),
    ],
)
def test_what_can_not_be_read_is_refused_with_the_reason(tmp_path, content, reason):
    with pytest.raises(Rejected) as raised:
        read(tmp_path, content)
    assert str(raised.value) == reason


def test_a_track_without_programs_takes_those_that_another_track_sets(tmp_path):
    setup = track(hexa("00 c005 00 c107 8340 c009"), EOT)
    first = track(C, hexa("8340 903c40 60 803c40"), EOT)
    second = track(hexa("00 c10b 00 913c40 60 813c40"), EOT)
    content = smf(setup, first, second)
    score, mended = read(tmp_path, content)
    assert ours(score) == heard(content, merged=True)
    assert {program for *_, program in ours(score)} == {5, 9, 11}
    assert not mended


def test_a_program_of_the_own_track_counts_from_where_it_is_set(tmp_path):
    content = smf(track(hexa("00 903c40 00 c003 60 803c40 00 903c40 60 803c40"), EOT), track(hexa("00 c000"), EOT))
    score, _ = read(tmp_path, content)
    assert ours(score) == heard(content)
    assert [program for *_, program in ours(score)] == [0, 3]


def test_a_track_has_the_programs_of_others_until_its_own_first_one(tmp_path):
    own = hexa("00 903c40 60 803c40 00 903c40 00 c002 00 c003 60 803c40 00 903c40 60 803c40")
    score, _ = read(tmp_path, smf(track(hexa("00 c005 10 c006"), EOT), track(own, EOT), track(hexa("00 c905"), EOT)))
    assert [program for *_, program in ours(score)] == [5, 6, 3]


def test_the_program_of_the_drums_is_no_oddity():
    drums = hexa("00 993c40 60 893c40")
    assert midi_bytes.plain(smf(track(hexa("00 c905"), EOT), track(drums, EOT)))[:2] == (1, [])


def test_two_tracks_that_share_a_channel_keep_their_programs(tmp_path):
    content = smf(track(hexa("00 c005"), C, EOT), track(hexa("00 c007"), D, EOT))
    assert midi_bytes.plain(content).notes == 2
    assert ours(read(tmp_path, content)[0]) == heard(content)


def test_twenty_programs_one_after_the_other_are_read(tmp_path):
    tracks = []
    for number in range(20):
        channel = [*range(9), *range(10, 16)][number % 15]
        at = {"channel": channel, "note": 40 + number}
        program = mido.Message("program_change", channel=channel, program=6 * number, time=96 * number)
        tracks.append(mido.MidiTrack([program, mido.Message("note_on", **at), mido.Message("note_off", time=96, **at)]))
    mido.MidiFile(tracks=tracks).save(tmp_path / "m.mid")
    content = (tmp_path / "m.mid").read_bytes()
    found = ours(read(tmp_path, content)[0])
    assert found == heard(content, merged=True)
    assert [program for *_, program in found] == [6 * number for number in range(20)]


@pytest.mark.parametrize("odd", [False, True])
def test_the_pedals_of_a_track_without_notes_are_read(tmp_path, odd):
    pedals = track(hexa("00 ff010141 20 b0407f 40 b04000 10 b1407f 20 b14000 00 b2407f"), EOT)
    notes = track(hexa("00 c005 00 913c40 60 813c40"), C, EOT)
    content = smf(pedals, notes, track(hexa("00 b0407f 10 b04000"), EOT), promised=1 if odd else 3)
    score, _ = read(tmp_path, content)
    assert score.note_num() == 2
    controls = [(part.program, event.time, event.value) for part in score.tracks for event in part.controls]
    # On the channels that play, with the programs that they play; nothing sounds on the third.
    assert sorted(controls) == [(0, 112, 127), (0, 144, 0), (5, 0, 127), (5, 16, 0), (5, 32, 127), (5, 96, 0)]


@pytest.mark.parametrize(
    "notes",
    [
        pytest.param(track(hexa("81808000 903c40 60 803c40"), EOT), id="a delta time of four bytes"),
        pytest.param(track(C, C, EOT), id="a program that another track sets behind the first note"),
        pytest.param(track(hexa("00 903c40"), EOT), id="a note without an end"),
    ],
)
def test_the_pedals_of_a_track_without_notes_are_read_the_lenient_way(tmp_path, notes):
    others = track(hexa("00 b0407f 60 b04000 40 c005"), EOT)
    content = smf(notes, others)
    score, _ = read(tmp_path, content)
    controls = [(event.time, event.number, event.value) for part in score.tracks for event in part.controls]
    assert controls == [(0, 64, 127), (96, 64, 0)]
    assert score.note_num() == sum(one.type == "note_on" for one in mido.MidiFile(tmp_path / "a.mid").tracks[0])


@pytest.mark.parametrize("promised", [2, 1], ids=["plain", "lenient"])
def test_what_tokens_do_not_carry_is_counted_in_tracks_without_notes_too(tmp_path, promised):
    """symusic holds nothing of such tracks, no texts but lyrics, and the name of a track once for each channel."""
    texts = hexa("00 ff010141 00 ff020142 00 ff030143 00 ff050144 00 ff060145 00 ff5902ff01 00 ff210100 00 ff7f0101")
    silent = track(texts, hexa("00 e30040 05 e30041 00 b30701 00 b30702 00 d305 00 06 00 a33c05 00 f002 7ef7"), EOT)
    playing = track(hexa("00 ff030143 00 c005 00 c106"), C, hexa("00 913c40 60 813c40 00 e00041 00 b00701"), EOT)
    _, account = read(tmp_path, smf(silent, playing, promised=promised))
    assert account.pop("tracks_beyond_header", 0) == 2 - promised
    assert account == dropped(smf(silent, playing))
    assert len(account) == 7


@pytest.mark.parametrize("promised", [2, 1], ids=["plain", "lenient"])
def test_the_pedals_of_a_channel_that_never_plays_are_counted(tmp_path, promised):
    pedals = hexa("00 b5407f 10 b54060 10 b54000 10 b5407f")  # pressed twice, the second time to the end
    score, account = read(tmp_path, smf(track(pedals, C, EOT), track(pedals, EOT), promised=promised))
    assert not [event for part in score.tracks for event in part.controls]
    assert (account["pedals_in"], account["pedals_dropped"]) == (4, 4)


@pytest.mark.parametrize("notes", [1023, 1026, 2060], ids=["below 2**31", "above 2**31", "above 2**32"])
def test_ticks_that_short_pauses_add_up_to(tmp_path, notes):
    """symusic counts ticks in 32 bits and goes on from the smallest number."""
    content = smf(track(*[hexa("ffff7f 903c40 01 803c40")] * notes, EOT))
    if notes << 21 >= 2**31:
        with pytest.raises(
            Rejected, match=r"^claims to last more than 2,147,483,647 ticks$|^can't be parsed: track 1 claims"
        ):
            read(tmp_path, content)
    else:
        assert listed(read(tmp_path, content)[0]) == sorted(((n << 21) - 1, 1, 60) for n in range(1, notes + 1))


def test_a_file_that_changed_after_it_was_hashed_is_refused(tmp_path):
    content = smf(track(C, EOT))
    digest = hashlib.sha256(content).hexdigest()
    assert listed(read(tmp_path, content, sha256=digest)[0]) == [(0, 96, 60)]
    with pytest.raises(Rejected, match=r"^changed while it was being prepared$"):
        read(tmp_path, smf(track(D, EOT)), sha256=digest)


def test_a_file_that_has_grown_beyond_all_limits_is_not_rejected_for_good(tmp_path):
    path = tmp_path / "a.mid"
    path.write_bytes(smf(track(C, EOT)))
    digest = files.sha256(path)
    os.truncate(path, midi_reading.MAX_BYTES + 1)
    for sha256, reason, passing in ((digest, "changed while", True), (files.sha256(path), "is larger than", False)):
        with pytest.raises(Rejected, match=reason) as raised:
            midi_reading.read_score(path, sha256)
        assert raised.value.passing is passing


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_refused_or_what_was_mended_is_told(tmp_path, seed):
    """No note more or less than mido finds, unless the account or the reason says so; nothing else is raised."""
    generator = np.random.default_rng(seed)
    whole = [content for content, _, _ in CASES.values()]
    mido.MidiFile(tracks=[played(generator, 30), played(generator, 30)]).save(tmp_path / "m.mid")
    whole += [(tmp_path / "m.mid").read_bytes()] * len(whole)
    read_alike = 0
    for _ in range(300):
        content = bytearray(whole[generator.integers(len(whole))])
        place = int(generator.integers(14, len(content)))
        how = generator.integers(4)
        if how == 0:
            content[place] = generator.integers(256)
        elif how == 1:
            del content[place : place + int(generator.integers(1, 4))]
        elif how == 2:
            content[place:place] = generator.bytes(2)
        else:
            del content[place:]
        try:
            score, mended = read(tmp_path, bytes(content))
            there = sum(
                message.type == "note_on" and message.velocity > 0
                for one in mido.MidiFile(file=io.BytesIO(content), clip=True).tracks
                for message in one
            )
        except (Rejected, OSError, EOFError, ValueError, KeyError, IndexError, TypeError):
            continue
        assert score.note_num() == there or mended, content
        read_alike += 1
    assert read_alike > 20


@pytest.mark.parametrize(("name", "largest"), [("MAX_TRACKS", 2), ("MAX_PROGRAMS", 3)])
def test_the_lenient_reader_has_limits(monkeypatch, name, largest):
    content = smf(track(hexa("00 c001 01 c002"), C, EOT), track(hexa("00 c001"), D, EOT), promised=1)
    monkeypatch.setattr(midi_repair, name, largest)
    assert midi_repair.rewrite(content, 2)[1].notes == 2
    with pytest.raises(Rejected, match="has 2 notes, more than 1"):
        midi_repair.rewrite(content, 1)
    monkeypatch.setattr(midi_repair, name, largest - 1)
    with pytest.raises(Rejected, match=f"has more than {largest - 1} "):
        midi_repair.rewrite(content, 2)
