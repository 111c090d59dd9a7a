"""MIDI: what comes back of a file, and that the account says what does not; mido and pretty_midi are the judges."""

import hashlib
import itertools
from fractions import Fraction

import miditok
import mido
import pretty_midi
import pytest
import symusic
from conftest import allowed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shortcut_cli.data.documents import Source
from shortcut_cli.demo import material
from shortcut_cli.errors import Rejected
from shortcut_cli.tokenizers import midi
from shortcut_cli.tokenizers.midi import MidiOptions, MidiTokenizer

SCHEMES = [(scheme, programs) for scheme in ("REMI", "TSD", "MIDILike") for programs in (False, True)]
DRUMS = 9
LONGEST = 40  # beats of a note


def tokenizer_of(**options):
    return MidiTokenizer(MidiOptions(name="midi", **options))


def write(path, *tracks, tpq=480):
    """A file of tracks, each (tick, message) in any order; what is first in the list comes first at its tick."""
    out = mido.MidiFile(ticks_per_beat=tpq)
    for events in tracks:
        track, now = mido.MidiTrack(), 0
        for tick, message in sorted(events, key=lambda event: event[0]):
            track.append(message.copy(time=tick - now))
            now = tick
        out.tracks.append(track)
    out.save(path)
    return path


def note(first, last, pitch, velocity=127, channel=0):
    on = mido.Message("note_on", note=pitch, velocity=velocity, channel=channel)
    return [(first, on), (last, mido.Message("note_off", note=pitch, channel=channel))]


def pedal(tick, value, channel=0):
    return (tick, mido.Message("control_change", control=64, value=value, channel=channel))


def tempo(tick, mspq):
    return (tick, mido.MetaMessage("set_tempo", tempo=mspq))


def signature(tick, numerator, denominator):
    return (tick, mido.MetaMessage("time_signature", numerator=numerator, denominator=denominator))


class Heard:
    """A file as mido reads it, in beats and seconds, by a plain loop."""

    def __init__(self, path):
        file = mido.MidiFile(path)
        self.notes, self.pedals, self.tempos, self.signatures = {}, [], [], []
        self.last = 0  # beat of the last message
        self.clock = [(Fraction(0), Fraction(0), 500_000)]  # beat, second, tempo from there on
        self.counts = dict.fromkeys(("bends", "controls", "depths", "texts", "keys", "drums"), 0)
        down, now, program = {}, Fraction(0), dict.fromkeys(range(16), 0)
        for message in mido.merge_tracks(file.tracks):
            self.last = now = now + Fraction(message.time, file.ticks_per_beat)
            self.take(message, now, down, program)

    def take(self, message, now, down, program):
        kind = message.type
        if kind == "note_on" and message.velocity:
            of = "drums" if message.channel == DRUMS else program[message.channel]
            one = [now, None, message.velocity]
            self.notes.setdefault((of, message.note), []).append(one)
            down.setdefault((message.channel, message.note), []).append(one)
        elif kind in ("note_on", "note_off"):
            down[message.channel, message.note].pop(0)[1] = now
        elif kind == "control_change" and message.control == 64:
            held = down.setdefault(("pedal", message.channel), [])
            if (message.value >= 64) == bool(held):
                self.counts["depths"] += 1
            elif held:
                held.pop()[2] = now
            else:
                held.append(["drums" if message.channel == DRUMS else program[message.channel], now, None])
                self.pedals.extend(held)
        elif kind == "set_tempo":
            self.clock.append((now, self.seconds(now), message.tempo))
            self.tempos.append((now, message.tempo))
        elif kind == "time_signature":
            self.signatures.append((now, message.numerator, message.denominator))
        elif kind == "program_change":
            program[message.channel] = message.program
        else:
            of = {"pitchwheel": "bends", "control_change": "controls", "key_signature": "keys"}
            of |= {"lyrics": "texts", "marker": "texts"}
            if kind in of:
                self.counts[of[kind]] += 1

    def seconds(self, beat):
        begin, second, mspq = [entry for entry in self.clock if entry[0] <= beat][-1]
        return second + (beat - begin) * mspq / 1_000_000

    def barlines(self):
        """In beats, up to 70; a bar begins at every time signature."""
        changes, found = [(Fraction(0), 4, 4), *self.signatures, (Fraction(70), 4, 4)], []
        for (begin, numerator, denominator), (until, *_) in itertools.pairwise(changes):
            bars = range(int((until - begin) * denominator / (4 * numerator)) + 1)
            found += [begin + bar * Fraction(4 * numerator, denominator) for bar in bars]
        return sorted({beat for beat in found if beat < min(70, self.last)})

    def merge(self):
        """Make one piano of it: without drums, all notes and pedals of program 0."""
        merged = {}
        for (program, pitch), found in self.notes.items():
            if program != "drums":
                merged.setdefault((0, pitch), []).extend(found)
        self.notes = merged
        self.pedals = [[0, pressed, up] for program, pressed, up in self.pedals if program != "drums"]

    def end(self, longest=None):
        """In seconds, of the last note or pedal.

        With `longest`, a pedal counts only if it is pressed before the last note ends, and for so many beats after it.
        """
        last = {}
        for (program, _), found in self.notes.items():
            last[program] = max([last.get(program, 0), *(one[1] for one in found)])
        ends = list(last.values())
        for program, pressed, up in self.pedals:
            if longest is None:
                ends.append(up)
            elif pressed < last.get(program, 0):
                ends.append(min(up or last[program], last[program] + longest))
        return self.seconds(max(ends))


def differences(before, after):
    """The account of the notes and seconds as a plain loop over the k-th notes of each pitch finds it."""
    found = dict.fromkeys(
        (
            *("notes_out", "onsets_moved", "onset_moved_beats", "onset_moved_beats_max", "onset_moved_seconds_max"),
            *("notes_shortened", "beats_cut", "notes_lengthened", "beats_added", "length_changed_beats_max"),
            *("velocities_changed", "velocity_changed_steps", "velocity_changed_steps_max"),
        ),
        0,
    )
    assert before.notes.keys() == after.notes.keys()
    for key, notes in before.notes.items():
        for (start, end, loud), (now, last, louder) in zip(sorted(notes), sorted(after.notes[key]), strict=True):
            moved, longer = abs(now - start), (last - now) - (end - start)
            found["notes_out"] += 1
            found["onsets_moved"] += moved > 0
            found["onset_moved_beats"] += moved
            found["onset_moved_beats_max"] = max(found["onset_moved_beats_max"], moved)
            shift = abs(after.seconds(now) - before.seconds(start))
            found["onset_moved_seconds_max"] = max(found["onset_moved_seconds_max"], shift)
            found["notes_shortened"] += longer < 0
            found["beats_cut"] += max(-longer, 0)
            found["notes_lengthened"] += longer > 0
            found["beats_added"] += max(longer, 0)
            found["length_changed_beats_max"] = max(found["length_changed_beats_max"], abs(longer))
            found["velocities_changed"] += loud != louder
            found["velocity_changed_steps"] += abs(louder - loud)
            found["velocity_changed_steps_max"] = max(found["velocity_changed_steps_max"], abs(louder - loud))
    lasts = after.end() - before.end(LONGEST)
    return found | {"seconds_cut": max(-lasts, 0), "seconds_added": max(lasts, 0)}


def there_and_back(tokenizer, path, variant=""):
    """(account, what the file has, what its ids decode to); nothing is dropped, and every id is one that may follow."""
    reading = tokenizer._read(path, variant)
    out = path.with_name("back.mid")
    assert tokenizer.decode(reading.ids.tolist(), out)["dropped"] == 0
    assert reading.units["note"] == sum(len(found) for found in Heard(out).notes.values())
    return reading.account, Heard(path), Heard(out)


@st.composite
def pieces(draw):
    """Tracks of random notes, of which those of one pitch lie a beat apart, and of everything else that a file has."""
    tpq = draw(st.sampled_from([24, 96, 220, 384, 480, 1000]))
    tracks = []
    for channel in draw(st.sampled_from([[0], [0, 1], [0, 1, DRUMS]])):
        events = [(0, mido.Message("program_change", program=[0, 33, 0][channel % 7], channel=channel))]
        place = len(tracks)
        own = st.integers(0, 41).map(lambda number, place=place: 3 * number + place)  # no unisons of channels
        for pitch in draw(st.lists(own, min_size=1, max_size=6, unique=True)):
            now = draw(st.integers(0, 3 * tpq))
            for _ in range(draw(st.integers(1, 3))):
                length = draw(st.one_of(st.integers(1, 3 * tpq), st.integers(1, 100 * tpq)))
                events += note(now, now + length, pitch, draw(st.integers(1, 127)), channel)
                now += length + draw(st.integers(tpq, 5 * tpq))
        presses = sorted(draw(st.lists(st.integers(0, 40 * tpq), max_size=6, unique=True)))
        events += [pedal(tick, draw(st.integers(0, 127)), channel) for tick in presses]
        if draw(st.booleans()):
            events.append((draw(st.integers(0, tpq)), mido.Message("pitchwheel", pitch=99, channel=channel)))
            events.append((draw(st.integers(0, tpq)), mido.Message("control_change", control=7, channel=channel)))
        tracks.append(events)
    ticks = sorted(draw(st.lists(st.integers(0, 60 * tpq), max_size=4, unique=True)))
    tracks[0] += [tempo(tick, draw(st.integers(100_000, 3_000_000))) for tick in ticks]
    meters = st.sampled_from([(4, 4), (3, 4), (2, 2), (6, 8), (7, 8), (15, 16), (20, 16), (17, 16), (9, 8), (5, 4)])
    anywhere, halves = st.integers(0, 60 * tpq), st.integers(0, 120).map(lambda half: half * tpq // 2)
    ticks = sorted(draw(st.lists(st.one_of(anywhere, halves), max_size=3, unique=True)))
    tracks[0] += [signature(tick, *draw(meters)) for tick in ticks]
    tracks[0].append((0, mido.MetaMessage("marker", text="a")))
    return tracks, tpq


class TestAccount:
    @pytest.mark.parametrize(("scheme", "programs"), SCHEMES)
    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(made=pieces(), carried=st.booleans(), resolution=st.sampled_from([4, 8, 12]))
    def test_every_difference_that_mido_finds_is_in_it(self, tmp_path, scheme, programs, made, carried, resolution):
        tracks, tpq = made
        path = write(tmp_path / "a.mid", *tracks, tpq=tpq)
        options = {
            "tempos": carried,
            "time_signatures": carried,
            "beat_resolution": resolution,
            "longest_note": LONGEST,
        }
        tokenizer = tokenizer_of(scheme=scheme, programs=programs, **options)
        account, before, after = there_and_back(tokenizer, path)
        assert account["notes_in"] == sum(len(found) for found in before.notes.values())
        assert account.get("pedals_in", 0) == len(before.pedals)
        assert account.get("pedal_depths_dropped", 0) == before.counts["depths"]
        drums = sum(len(found) for (program, _), found in before.notes.items() if program == "drums")
        assert account.get("drum_notes_dropped", 0) == (0 if programs else drums)
        if not programs:
            before.merge()
        found = differences(before, after)
        for name, amount in found.items():
            assert account.get(name, 0) == pytest.approx(float(amount), abs=2e-5), name
        assert account.get("pitch_bends_dropped", 0) == before.counts["bends"]
        assert account.get("control_changes_dropped", 0) == before.counts["controls"]
        assert account["texts_dropped"] == before.counts["texts"]
        if carried and not account.keys() & {"time_signatures_moved", "time_signatures_dropped"}:
            last = min(before.last, after.last)
            assert [beat for beat in before.barlines() if beat < last] == [
                beat for beat in after.barlines() if beat < last
            ]
        assert account.get("pedals_out", 0) == len(after.pedals)
        assert sum(account.get(f"pedals_{end}", 0) for end in ("out", "merged", "dropped")) == account.get(
            "pedals_in", 0
        )


class TestNotes:
    @pytest.mark.parametrize("scheme", ["REMI", "TSD", "MIDILike"])
    def test_long_notes_are_whole(self, tmp_path, scheme):
        lengths = [Fraction(1, 12), Fraction(1, 3), 1, 12, 13, 16, 32, 40, 64]
        places = list(itertools.accumulate([0, *(int(length) + 1 for length in lengths)]))
        tracks = [note(480 * place, int(480 * (place + n)), 60) for place, n in zip(places, lengths, strict=False)]
        path = write(tmp_path / "a.mid", [tempo(0, 480_000), *itertools.chain(*tracks)])
        account, before, after = there_and_back(tokenizer_of(scheme=scheme), path)
        assert before.notes == after.notes
        assert account == {"notes_in": 9, "notes_out": 9}
        long = pretty_midi.PrettyMIDI(str(path)).instruments[0].notes
        back = pretty_midi.PrettyMIDI(str(tmp_path / "back.mid")).instruments[0].notes
        assert [one.duration for one in back] == pytest.approx([one.duration for one in long], abs=1e-3)

    @pytest.mark.parametrize("scheme", ["REMI", "TSD", "MIDILike"])
    def test_a_longer_note_is_cut_and_counted(self, tmp_path, scheme):
        path = write(tmp_path / "a.mid", note(0, 100 * 480, 60) + note(480, 960, 62))
        account, _, after = there_and_back(tokenizer_of(scheme=scheme), path)
        assert after.notes[0, 60] == [[0, 64, 127]]
        assert (account["notes_shortened"], account["beats_cut"], account["seconds_cut"]) == (1, 36, 18)
        assert account["length_changed_beats_max"] == 36

    @pytest.mark.parametrize("scheme", ["REMI", "TSD", "MIDILike"])
    @pytest.mark.parametrize("tpq", [12, 48, 480])
    def test_a_note_of_no_length_lasts_a_step(self, tmp_path, scheme, tpq):
        path = write(tmp_path / "a.mid", note(0, 0, 60) + note(tpq, 2 * tpq, 62), tpq=tpq)
        account, _, after = there_and_back(tokenizer_of(scheme=scheme), path)
        assert after.notes[0, 60] == [[0, Fraction(1, 12), 127]]
        assert (account["notes_lengthened"], account["beats_added"]) == (1, pytest.approx(1 / 12, abs=1e-6))

    @pytest.mark.parametrize(("resolution", "moved"), [(8, 1 / 24), (12, 0)])
    def test_triplets_and_sixteenths_need_twelve_steps(self, tmp_path, resolution, moved):
        ticks = [0, 120, 160, 240, 320, 360]
        notes = [one for number, tick in enumerate(ticks) for one in note(tick, tick + 480, 60 + number)]
        account, *_ = there_and_back(tokenizer_of(beat_resolution=resolution), write(tmp_path / "a.mid", notes))
        assert account.get("onset_moved_beats_max", 0) == pytest.approx(moved, abs=1e-6)

    def test_note_offs_of_one_pitch_end_the_notes_in_order(self, tmp_path, monkeypatch):
        swapped = {"notes_shortened": 1, "beats_cut": 2, "notes_lengthened": 1, "beats_added": 2}
        for scheme, account in (("TSD", {}), ("MIDILike", swapped | {"length_changed_beats_max": 2})):
            score, track = symusic.Score(480), symusic.Track()
            track.notes.extend([symusic.Note(0, 4 * 480, 60, 127), symusic.Note(480, 480, 60, 127)])
            score.tracks.append(track)
            monkeypatch.setattr(midi, "read_score", lambda *_, score=score: (score, {}))
            found = tokenizer_of(scheme=scheme)._read(tmp_path / "a.mid").account
            assert found == {"notes_in": 2, "notes_out": 2, **account}

    def test_ids_are_those_of_miditok(self, tmp_path):
        material.write_midi(tmp_path, pieces=2, seed=5)
        for path in sorted(tmp_path.glob("*.mid")):
            tokenizer = tokenizer_of()
            score = symusic.Score(path)
            score.tracks[0].notes.sort()
            (expected,) = miditok.REMI(tokenizer.base.config)(score)
            assert tokenizer.prompt(path).tolist() == expected.ids


class TestRests:
    @pytest.mark.parametrize("scheme", ["REMI", "TSD", "MIDILike"])
    @pytest.mark.parametrize("held", [False, True])
    def test_a_long_rest_is_refused_with_the_key(self, tmp_path, scheme, held):
        tokenizer = tokenizer_of(scheme=scheme, longest_rest=100)
        first = 480 * (165 if held else 1)  # a note of 165 beats sounds for 64
        rest = 64 if held else 1
        path = write(tmp_path / "a.mid", note(0, first, 60) + note(480 * (rest + 100), 480 * (rest + 101), 62))
        assert len(tokenizer.prompt(path)) < 300
        path = write(tmp_path / "b.mid", note(0, first, 60) + note(480 * (rest + 100) + 1, 480 * (rest + 101), 62))
        with pytest.raises(Rejected, match=r"has a rest of 100 beats, more than tokenizer\.longest_rest = 100"):
            tokenizer.prompt(path)

    def test_a_rest_before_the_first_note_counts_and_what_comes_after_the_last_does_not(self, tmp_path):
        tokenizer = tokenizer_of()
        with pytest.raises(Rejected, match="a rest of 400,000 beats"):
            tokenizer.prompt(write(tmp_path / "a.mid", note(480 * 400_000, 480 * 400_001, 60)))
        late = [tempo(480 * 400_000, 600_000), signature(480 * 400_000, 3, 4), pedal(480 * 400_000, 127)]
        control = mido.Message("control_change", control=7, value=1)
        reading = tokenizer._read(write(tmp_path / "b.mid", [*note(0, 480, 60), *late, (480 * 400000, control)]))
        assert len(reading.ids) < 12
        assert reading.units == {"note": 1, "beat": 1, "second": 0.5}
        dropped = ("tempos", "time_signatures", "pedals", "control_changes")
        assert {name: reading.account[f"{name}_dropped"] for name in dropped} == dict.fromkeys(dropped, 1)


def heard_seconds(path):
    """When the last note ends."""
    return max(one.end for instrument in pretty_midi.PrettyMIDI(str(path)).instruments for one in instrument.notes)


class TestTempos:
    @pytest.mark.parametrize("scheme", ["REMI", "TSD", "MIDILike"])
    def test_every_whole_tempo_comes_back(self, tmp_path, scheme):
        rates = list(range(10, 401))
        changes = [tempo(480 * beat, mido.bpm2tempo(rate)) for beat, rate in enumerate(rates)]
        path = write(tmp_path / "a.mid", changes + note(0, 480, 60) + note(480 * 391, 480 * 392, 62))
        account, before, after = there_and_back(tokenizer_of(scheme=scheme), path)
        assert before.tempos == after.tempos
        assert account == {"notes_in": 2, "notes_out": 2}

    def test_what_is_out_of_range_or_between_is_counted_in_seconds(self, tmp_path):
        for rate, nearest, kind in ((5, 10, "clipped"), (600, 400, "clipped"), (100.4, 100, "rounded")):
            path = write(tmp_path / "a.mid", [tempo(0, mido.bpm2tempo(rate)), *note(0, 4 * 480, 60)])
            account, _before, _after = there_and_back(tokenizer_of(), path)
            lasts = heard_seconds(tmp_path / "back.mid") - heard_seconds(path)
            assert lasts == pytest.approx(240 / nearest - 240 / rate, abs=1e-4)
            assert account[f"tempos_{kind}"] == 1
            assert account["seconds_added" if lasts > 0 else "seconds_cut"] == pytest.approx(abs(lasts), abs=1e-4)

    def test_without_tokens_everything_is_at_120(self, tmp_path):
        path = write(tmp_path / "a.mid", [tempo(0, 1_000_000), tempo(480, 500_000), *note(0, 960, 60)])
        account, *_ = there_and_back(tokenizer_of(tempos=False), path)
        assert (account["tempos_dropped"], account["seconds_cut"]) == (1, 0.5)

    @pytest.mark.parametrize("scheme", ["REMI", "TSD", "MIDILike"])
    def test_a_slower_variant_stays_on_the_beats(self, tmp_path, scheme):
        notes = [one for beat in range(17) for one in note(480 * beat, 480 * beat + 480, 60 + beat)]
        path = write(tmp_path / "a.mid", notes)
        account, _before, after = there_and_back(tokenizer_of(scheme=scheme), path, "tempo=1.1")
        assert [start for found in after.notes.values() for start, *_ in found] == list(range(17))
        seconds = [heard_seconds(tmp_path / name) for name in ("a.mid", "back.mid")]
        assert seconds[1] == pytest.approx(1.1 * seconds[0], rel=1e-3)
        assert account["tempos_rounded"] == 1  # 109.09 to 109
        assert account["seconds_added"] == pytest.approx(seconds[1] - 1.1 * seconds[0], abs=1e-4)
        account, *_ = there_and_back(tokenizer_of(scheme=scheme, tempos=False), path, "tempo=1.1")
        assert account["onset_moved_beats_max"] > 0.03  # that of the stretched beats from the nearest step


class TestMeters:
    @pytest.mark.parametrize("scheme", ["REMI", "TSD", "MIDILike"])
    def test_every_meter_and_its_barlines_come_back(self, tmp_path, scheme):
        common = ["2/2", "3/2", "4/2", "5/8", "7/8", "9/8", "12/8", "6/8", "3/8", "7/4", "5/4", "6/4", "15/16", "1/4"]
        changes, now = [], 0
        for meter in [*common, "2/4", "3/4", "4/4"]:
            numerator, denominator = map(int, meter.split("/"))
            changes.append(signature(now, numerator, denominator))
            now += 2 * 4 * 480 * numerator // denominator
        path = write(tmp_path / "a.mid", changes + note(0, 480, 60) + note(now - 480, now, 62))
        account, before, after = there_and_back(tokenizer_of(scheme=scheme), path)
        assert before.signatures == after.signatures
        assert not [name for name in account if name.startswith("time_signatures")]
        files = [pretty_midi.PrettyMIDI(str(tmp_path / name)) for name in ("a.mid", "back.mid")]
        bars = [file.get_downbeats() for file in files]
        assert bars[1] == pytest.approx(bars[0], abs=1e-3)

    @pytest.mark.parametrize(
        ("written", "back", "counts"),
        [
            ([(0, 20, 16)], [(0, 10, 8)], {"replaced": 1}),  # bars of equal length
            ([(0, 3, 4), (6, 17, 16)], [(0, 3, 4)], {"dropped": 1}),  # no such bar: the meter before goes on
            # The second bar has two beats: it becomes a bar of its own.
            ([(0, 4, 4), (6, 3, 4)], [(0, 4, 4), (4, 2, 4), (6, 3, 4)], {"added": 1}),
            ([(0, 4, 4), (2, 4, 4)], [(0, 2, 4), (2, 4, 4)], {"added": 1}),
            # No bar is as long as what is left of the second: the change comes a bar later.
            ([(0, 4, 4), (Fraction(14, 3), 3, 4)], [(0, 4, 4), (8, 3, 4)], {"moved": 1}),
            ([(0, 4, 4), (4 + Fraction(1, 480), 3, 4)], [(0, 4, 4), (4, 3, 4)], {"moved": 1}),
            # The second would come after the third, which is written before the bar is over.
            ([(0, 3, 4), (Fraction(1, 7), 6, 8), (Fraction(2, 7), 3, 4)], [(0, 3, 4)], {"moved": 2}),
        ],
    )
    def test_what_is_not_on_a_barline_or_not_known_is_counted(self, tmp_path, written, back, counts):
        changes = [signature(round(480 * beat), *meter) for beat, *meter in written]
        path = write(tmp_path / "a.mid", changes + note(0, 480, 60) + note(480 * 30, 480 * 31, 62))
        for scheme in ("REMI", "TSD", "MIDILike"):
            account, _, after = there_and_back(tokenizer_of(scheme=scheme), path)
            assert after.signatures == back
            found = {name[16:]: amount for name, amount in account.items() if name.startswith("time_signatures_")}
            assert found == counts

    @pytest.mark.parametrize("meters", [["3/4"], ["4/4", "4/5"], ["4/4", "0/4"], ["4/4", "5-3/4"], ["4/4", "65/8"], []])
    def test_a_list_that_makes_no_sense_is_refused(self, meters):
        with pytest.raises(ValidationError, match="meters"):
            MidiOptions(name="midi", meters=meters)


class TestPedals:
    def two(self, tmp_path):
        """A chord held by a pedal, and a note after it; the pedal is changed at beat 2, within a step."""
        controls = [pedal(100, 20), pedal(120, 90), pedal(480, 127), pedal(955, 0), pedal(965, 127), pedal(1440, 63)]
        return write(tmp_path / "a.mid", controls + note(0, 240, 60) + note(240, 300, 64) + note(960, 1000, 60))

    @pytest.mark.parametrize(("scheme", "programs"), SCHEMES)
    def test_as_tokens(self, tmp_path, scheme, programs):
        account, _before, after = there_and_back(tokenizer_of(scheme=scheme, programs=programs), self.two(tmp_path))
        assert after.pedals == [[0, Fraction(1, 4), 2], [0, 2, 3]]
        assert (account["pedals_in"], account["pedals_out"], account["pedal_depths_dropped"]) == (2, 2, 2)
        assert account["pedal_moved_beats_max"] == pytest.approx(5 / 480, abs=1e-6)
        assert "pedals_merged" not in account
        assert tokenizer_of()._read(tmp_path / "a.mid").units["beat"] == 3  # the pedal is part of the piece

    def test_as_lengths_of_notes(self, tmp_path):
        account, _, after = there_and_back(tokenizer_of(sustain="durations"), self.two(tmp_path))
        assert after.pedals == []
        # To the release, or to the next note of the pitch.
        ends = {pitch: [end for _, end, _ in found] for (_, pitch), found in after.notes.items()}
        assert ends == {60: [2, 3], 64: [2]}
        assert (account["pedals_applied"], account["notes_sustained"]) == (2, 3)
        assert account["beats_sustained"] == pytest.approx((955 - 240 + 955 - 300 + 1440 - 1000) / 480, abs=1e-6)

    def test_a_key_that_is_struck_again_ends_its_note(self, tmp_path):
        path = write(tmp_path / "a.mid", [pedal(0, 127), *note(0, 240, 60), *note(480, 720, 60), pedal(1440, 0)])
        _, _, after = there_and_back(tokenizer_of(sustain="durations"), path)
        assert after.notes[0, 60] == [[0, 1, 127], [1, 3, 127]]

    def test_dropped(self, tmp_path):
        account, _, after = there_and_back(tokenizer_of(sustain="drop"), self.two(tmp_path))
        assert (after.pedals, account["pedals_dropped"]) == ([], 2)
        assert tokenizer_of(sustain="drop")._read(tmp_path / "a.mid").units["beat"] == pytest.approx(1000 / 480)

    @pytest.mark.parametrize("sustain", ["tokens", "durations", "drop"])
    def test_every_press_is_accounted_for_once(self, tmp_path, sustain):
        """Of two tracks, so that presses overlap; one comes after the last note."""
        one = [pedal(480, 127), pedal(900, 0), pedal(960, 127), pedal(1440, 0)]
        other = [pedal(700, 127), pedal(1300, 0), pedal(2000, 127), pedal(2100, 0)]
        path = write(tmp_path / "a.mid", one + note(0, 960, 60), other + note(0, 1440, 40))
        account, _, _ = there_and_back(tokenizer_of(sustain=sustain), path)
        assert (account["pedals_in"], account["pedals_merged"]) == (4, 2)
        ends = [account.get(f"pedals_{end}", 0) for end in ("out", "applied", "dropped", "merged")]
        assert ends == {"tokens": [1, 0, 1, 2], "durations": [0, 1, 1, 2], "drop": [0, 0, 2, 2]}[sustain]

    def test_one_that_is_never_released_ends_with_the_notes_and_a_late_release_is_cut(self, tmp_path):
        path = write(tmp_path / "a.mid", [pedal(0, 127), *note(0, 960, 60)])
        assert there_and_back(tokenizer_of(), path)[2].pedals == [[0, 0, 2]]
        path = write(tmp_path / "a.mid", [pedal(0, 127), pedal(480 * 5000, 0), *note(0, 960, 60)])
        account, _, after = there_and_back(tokenizer_of(), path)
        assert (after.pedals, account["pedals_shortened"]) == ([[0, 0, 66]], 1)

    @pytest.mark.parametrize("scheme", ["REMI", "TSD", "MIDILike"])
    def test_pedals_of_several_programs_are_what_the_constraint_allows(self, tmp_path, scheme):
        tracks = []
        for channel in range(3):
            change = (0, mido.Message("program_change", program=10 * channel, channel=channel))
            presses = [pedal(480 * (n + channel), 127 * (n % 2 == 0), channel) for n in range(4)]
            notes = [one for n in range(3, 8) for one in note(480 * n, 480 * n + 480, 60 + n, 100, channel)]
            tracks.append([change, *presses, *notes])
        tokenizer = tokenizer_of(scheme=scheme, programs=True)
        _account, _, after = there_and_back(tokenizer, write(tmp_path / "a.mid", *tracks))
        assert sorted(after.pedals) == sorted([10 * c, c + n, c + n + 1] for c in range(3) for n in (0, 2))
        ids = tokenizer.prompt(tmp_path / "a.mid").tolist()
        assert all(allowed(tokenizer, ids[:place])[ids[place]] for place in range(len(ids)))

    def test_a_piece_may_end_with_a_release(self, tmp_path):
        tokenizer = tokenizer_of()
        path = write(tmp_path / "a.mid", [pedal(0, 127), pedal(960, 0), *note(0, 480, 60)])
        ids = tokenizer.prompt(path).tolist()
        assert tokenizer.base[ids[-1]] == "PedalOff_0"
        assert allowed(tokenizer, ids)[tokenizer.eos]


class TestDocuments:
    def test_an_account_is_staged_with_the_ids_and_a_variant_has_its_own(self, tmp_path):
        path = write(tmp_path / "a.mid", note(7, 100 * 480, 60, 90) + note(480, 960, 62))
        tokenizer = tokenizer_of(transpose=[1], tempo_factors=[1.1])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        for variant in ("", *tokenizer.variants):
            source = Source(path, path.name, digest, tmp_path / f"{variant}.ids", variant)
            (first,) = tokenizer.scan(source)
            assert first.account == tokenizer._read(path, variant).account
            assert ("tempos_rounded" in first.account) == variant.startswith("tempo")
            before = source.staged.stat().st_mtime_ns
            assert list(tokenizer.scan(source)) == [first]
            assert source.staged.stat().st_mtime_ns == before
            sidecar = source.staged.with_name(source.staged.name + ".json")
            sidecar.write_text(sidecar.read_text().replace('"notes_shortened": 1', '"notes_shortened": 0'))
            assert list(tokenizer.scan(source)) == [first]  # not what was tampered with
            assert source.staged.stat().st_mtime_ns > before

    def test_options_that_decide_what_becomes_of_a_file_change_the_fingerprint(self):
        changes = [{}, {"sustain": "durations"}, {"sustain": "drop"}, {"longest_rest": 5}, {"longest_note": 63}]
        assert len({tokenizer_of(**change).fingerprint for change in changes}) == len(changes)

    @pytest.mark.parametrize("resolution", [1, 5, 8, 12, 24, 96])
    @pytest.mark.parametrize("longest", [1, 4, 5, 40, 1024])
    def test_any_resolution_and_longest_note_can_be_spelled(self, tmp_path, resolution, longest):
        path = write(tmp_path / "a.mid", note(0, 480 * longest, 60) + note(480, 960, 62))
        tokenizer = tokenizer_of(beat_resolution=resolution, longest_note=longest)
        _account, before, after = there_and_back(tokenizer, path)
        assert before.notes == after.notes
        assert tokenizer.vocabulary < 1 << 16


def test_notes_for_which_no_channel_is_left_are_not_counted_as_written(tmp_path):
    """16 programs that sound at once have 15 channels."""
    tracks = [
        [
            (0, mido.Message("program_change", program=number, channel=(number + (number > 8)) % 16)),
            *note(0, 480, 60, channel=(number + (number > 8)) % 16),
        ]
        for number in range(16)
    ]
    tokenizer = tokenizer_of(programs=True)
    ids = tokenizer.prompt(write(tmp_path / "a.mid", *tracks))
    units = tokenizer.decode(ids.tolist(), tmp_path / "b.mid")
    written = sum(
        m.type == "note_on" and m.velocity > 0 for m in mido.merge_tracks(mido.MidiFile(tmp_path / "b.mid").tracks)
    )
    assert (units["note"], units["notes_left_out"]) == (written, 1) == (15, 1)
