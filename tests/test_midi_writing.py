"""Written MIDI files: each note has its own length and its own program, whoever reads them."""

import io
import random

import mido
import pretty_midi
import pytest
import symusic
from test_midi_bytes import heard, ours

from shortcut_cli.tokenizers.midi import MidiOptions, MidiTokenizer
from shortcut_cli.tokenizers.midi_writing import dump

NOTHING_LOST = {"notes_left_out": 0, "unisons_shared": 0}


def score(*parts):
    """A score of (program, notes), program -1 for drums; a note is (start, length, pitch, velocity)."""
    made = symusic.Score(480)
    for program, notes in parts:
        part = symusic.Track(program=max(program, 0), is_drum=program < 0)
        part.notes.extend(symusic.Note(*note) for note in notes)
        made.tracks.append(part)
    return made


def wanted(*parts):
    return sorted((*note, program) for program, notes in parts for note in notes)


def by_pretty_midi(content):
    """Note by note, as `heard` in test_midi_bytes gives them."""
    piece = pretty_midi.PrettyMIDI(io.BytesIO(content))
    tick = piece.time_to_tick
    return sorted(
        (
            tick(note.start),
            tick(note.end) - tick(note.start),
            note.pitch,
            note.velocity,
            -1 if part.is_drum else part.program,
        )
        for part in piece.instruments
        for note in part.notes
    )


def readings(content):
    """What four readers find: two that go track by track, one that merges all tracks, and symusic."""
    return [
        heard(content),
        heard(content, merged=True),
        by_pretty_midi(content),
        ours(symusic.Score.from_midi(content)),
    ]


def check(*parts):
    content, lost = dump(score(*parts))
    assert lost == NOTHING_LOST
    for found in readings(content):
        assert found == wanted(*parts)


def test_a_short_note_inside_a_long_one_of_its_pitch_keeps_its_length():
    check((0, [(0, 1920, 60, 100), (480, 480, 60, 50)]))
    check((0, [(0, 1920, 60, 100), (480, 480, 60, 50), (600, 60, 60, 51), (960, 100, 60, 52), (2000, 9, 60, 53)]))


def test_notes_of_a_pitch_that_overlap_touch_or_are_equal():
    check((5, [(0, 100, 60, 100), (50, 100, 60, 90), (150, 10, 60, 80), (160, 10, 60, 70), (160, 10, 60, 70)]))


def test_equal_notes_need_no_channels_of_their_own():
    check(*[(number, [(0, 100, 60, 80)] * 20) for number in range(15)])


def test_programs_that_share_channels_over_time_are_set_before_their_notes():
    check(*[(number, [(number * 480, 480, 40 + number, 80)]) for number in range(60)])


def test_a_program_that_comes_back_is_set_again():
    check(*[(number, [(number * 10, 10, 60, 80), (1000 + number * 10, 10, 61, 80)]) for number in range(40)])


@pytest.mark.parametrize("seed", range(30))
def test_any_score_is_read_as_it_was_meant(seed):
    choose = random.Random(seed)
    programs = choose.sample(range(128), choose.choice([1, 2, 8, 30]))
    length, pitches = (1500, 90) if len(programs) == 30 else (300, 72 if len(programs) < 8 else 100)
    span = 100_000 if len(programs) == 30 else 2000
    check(
        *[
            (
                program,
                [
                    (
                        choose.randrange(span),
                        choose.randrange(1, length),
                        choose.randrange(60, pitches),
                        choose.randrange(1, 128),
                    )
                    for _ in range(6)
                ],
            )
            for program in programs
        ],
        (-1, [(number * 100, 50, 35 + number, 99) for number in range(9)]),
    )


def test_a_note_without_a_free_channel_is_left_out_and_counted():
    parts = [(number, [(0, 100, 60, 80), (100, 100, 60, 80)]) for number in range(15)]
    content, lost = dump(score(*parts, (15, [(99, 9, 60, 80)]), (16, [(199, 9, 60, 80), (200, 9, 60, 80)])))
    assert lost == {"notes_left_out": 2, "unisons_shared": 0}
    kept = wanted(*parts, (16, [(200, 9, 60, 80)]))
    for found in readings(content):
        assert found == kept


def test_a_unison_without_a_free_channel_shares_one_in_a_track_of_its_own():
    parts = [(number, [(0, 400, 60, 80)]) for number in range(15)]
    parts[7][1].append((100, 100, 60, 70))
    content, lost = dump(score(*parts))
    assert lost == {"notes_left_out": 0, "unisons_shared": 1}
    track_by_track = [heard(content), by_pretty_midi(content), ours(symusic.Score.from_midi(content))]
    assert track_by_track == [wanted(*parts)] * 3


def test_unisons_of_the_drums_share_their_channel_and_no_other_part_gets_it():
    drums = (-1, [(0, 400, 38, 80), (100, 100, 38, 70)])
    parts = [drums, *[(number, [(0, 400, 60, 80)]) for number in range(15)]]
    content, lost = dump(score(*parts))
    assert lost == {"notes_left_out": 0, "unisons_shared": 1}
    assert heard(content) == by_pretty_midi(content) == wanted(*parts)


def test_a_note_without_a_length_begins_before_it_ends():
    content, _ = dump(score((0, [(0, 100, 60, 80), (100, 0, 60, 70), (100, 50, 60, 60)])))
    assert heard(content) == [(0, 100, 60, 80, 0), (100, 0, 60, 70, 0), (100, 50, 60, 60, 0)]


def states(content):
    """(tick, channel, number of the controller or "bend", value) of a file, by mido."""
    now, found = 0, []
    for event in mido.MidiFile(file=io.BytesIO(content)).merged_track:
        now += event.time
        if event.type == "control_change":
            found.append((now, event.channel, event.control, event.value))
        elif event.type == "pitchwheel":
            found.append((now, event.channel, "bend", event.pitch))
    return found


def test_pedals_and_bends_reach_every_channel_of_their_program():
    made = score((3, [(100, 500, 60, 80), (200, 100, 60, 70)]), (4, [(0, 900, 60, 80)]))
    made.tracks[0].pedals.extend([symusic.Pedal(50, 200), symusic.Pedal(250, 100)])
    made.tracks[0].pitch_bends.extend(
        [symusic.PitchBend(220, -8192), symusic.PitchBend(230, 8191), symusic.PitchBend(240, 0)]
    )
    content, _ = dump(made)
    alone = [(50, 1, 64, 127)]
    lent = [(200, 2, 64, 127)]
    both = [(220, "bend", -8192), (230, "bend", 8191), (240, "bend", 0), (250, 64, 0), (250, 64, 127), (350, 64, 0)]
    assert sorted(states(content), key=str) == sorted(
        alone + lent + [(tick, channel, *rest) for tick, *rest in both for channel in (1, 2)], key=str
    )
    assert [value for _, channel, number, value in states(content) if (channel, number) == (1, 64)] == [127, 0, 127, 0]


def test_a_channel_that_changes_hands_loses_its_pedal_and_gets_that_of_its_new_program():
    made = score(*[(number, [(number * 10, 10, 60, 80)]) for number in range(16)])
    made.tracks[0].pedals.append(symusic.Pedal(0, 1000))
    made.tracks[15].pedals.append(symusic.Pedal(145, 1000))
    content, lost = dump(made)
    assert lost == NOTHING_LOST
    # At tick 145 all channels have an owner, and the first one has been silent for the longest time.
    assert [state for state in states(content) if state[0] < 1000] == [
        (0, 0, 64, 127),
        (145, 0, 121, 0),
        (145, 0, 64, 127),
    ]


def test_tempos_and_time_signatures_are_written():
    made = score((0, [(0, 480, 60, 80)]))
    made.tempos.extend([symusic.Tempo(0, 120), symusic.Tempo(960, 1.0)])
    made.time_signatures.extend([symusic.TimeSignature(0, 9, 8), symusic.TimeSignature(960, 2, 2)])
    made.tracks[0].name = "Flügel"
    first, second = mido.MidiFile(file=io.BytesIO(dump(made)[0]), charset="utf-8").tracks
    found = [(event.type, event.time, getattr(event, "tempo", 0)) for event in first if event.type == "set_tempo"]
    # The slowest tempo that three bytes can hold is 3.6 beats per minute.
    assert found == [("set_tempo", 0, 500000), ("set_tempo", 960, 2**24 - 1)]
    meters = [(event.numerator, event.denominator) for event in first if event.type == "time_signature"]
    assert meters == [(9, 8), (2, 2)]
    assert second.name == "Flügel"


def test_a_piece_without_a_note_is_a_file():
    content, lost = dump(score((0, []), (-1, [])))
    assert [list(track) for track in mido.MidiFile(file=io.BytesIO(content)).tracks] == [
        [mido.MetaMessage("end_of_track")]
    ]
    assert lost == NOTHING_LOST


@pytest.mark.parametrize("programs", [False, True])
def test_ids_are_decoded_to_the_lengths_and_programs_that_they_have(tmp_path, programs):
    parts = [(number, [(number * 480, 480, 40 + number, 127)]) for number in range(20)]
    parts.append((20, [(0, 1920, 100, 127), (480, 480, 100, 127)]))
    (tmp_path / "a.mid").write_bytes(dump(score(*parts))[0])
    tokenizer = MidiTokenizer(MidiOptions(name="midi", programs=programs))
    ids = tokenizer.prompt(tmp_path / "a.mid").tolist()
    units = tokenizer.decode(ids, tmp_path / "b.mid")
    assert units["note"] == 22
    assert {name: units[name] for name in NOTHING_LOST} == NOTHING_LOST
    expected = wanted(*[(program if programs else 0, notes) for program, notes in parts])
    content = (tmp_path / "b.mid").read_bytes()
    beat = mido.MidiFile(tmp_path / "b.mid").ticks_per_beat
    for found in readings(content):
        assert [(start * 480 / beat, length * 480 / beat, *rest) for start, length, *rest in found] == expected
    # MidiTok orders simultaneous notes of several programs by track.
    assert sorted(tokenizer.prompt(tmp_path / "b.mid").tolist()) == sorted(ids)
    tokenizer.decode(ids, tmp_path / "c.mid")
    assert (tmp_path / "c.mid").read_bytes() == content
