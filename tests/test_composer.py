"""The demo's material: files that any program can read, the same every time, and music that keeps its own rules."""

import hashlib
import io
import os
import subprocess
import sys
import wave
from collections import Counter, defaultdict
from itertools import combinations, pairwise

import mido
import numpy as np
import pytest
import symusic

from shortcut_cli.demo import composer
from shortcut_cli.demo import material as demo_material
from shortcut_cli.demo.composer import CHORDS, MELODY_LOWEST, Note, Piece, compose
from shortcut_cli.demo.material import write_audio, write_midi, write_text
from shortcut_cli.demo.render import INHARMONICITY, TAIL_S, TICKS_PER_BEAT, midi_bytes, render

# How well each pitch class fits a key, from its tonic up (Krumhansl, Cognitive Foundations of Musical Pitch, 1990).
MAJOR_PROFILE = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
MINOR_PROFILE = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)


@pytest.fixture(scope="module")
def pieces():
    return [compose(seed) for seed in range(200)]


def melody(piece):
    return [note for note in piece.notes if note.pitch >= MELODY_LOWEST]


def left_hand(piece):
    return [note for note in piece.notes if note.pitch < MELODY_LOWEST]


def classes(notes):
    return {note.pitch % 12 for note in notes}


def bass_of_the_end(piece):
    return min(note.pitch for note in piece.notes if note.start + note.length == piece.beats)


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def seconds(piece):
    return piece.beats * 60 / piece.tempo_bpm


# The piece


def test_a_seed_is_one_piece_and_another_seed_another(pieces):
    assert compose(7) == pieces[7]
    assert len({tuple(piece.notes) for piece in pieces}) == len(pieces)


def test_pieces_have_whole_phrases_and_the_length_asked_for(pieces):
    assert {piece.beats / piece.beats_per_bar for piece in pieces} == {8, 12, 16}
    assert {piece.beats_per_bar for piece in pieces} == {3, 4}
    assert all(15 <= seconds(piece) <= 30 for piece in pieces)
    assert all(7 <= seconds(compose(seed, (7, 12))) <= 12 for seed in range(50))
    with pytest.raises(AssertionError, match="no form lasts 1 to 2 s"):
        compose(1, (1, 2))


def test_notes_lie_on_a_piano_and_on_the_grid(pieces):
    for note in (note for piece in pieces for note in piece.notes):
        assert 36 <= note.pitch <= 96
        assert 30 <= note.velocity <= 120
        assert note.length >= 0.5
        assert note.start % 0.5 == note.length % 0.5 == 0


def test_no_key_is_struck_while_it_is_held(pieces):
    for piece in pieces:
        keys = defaultdict(list)
        for note in piece.notes:
            keys[note.pitch].append(note)
        for notes in keys.values():
            assert all(first.start + first.length <= second.start for first, second in pairwise(notes))


def test_the_melody_has_one_voice_and_mostly_moves_by_step(pieces):
    leaps = Counter()
    for piece in pieces:
        for first, second in pairwise(melody(piece)):
            assert first.start + first.length <= second.start
            leaps[abs(second.pitch - first.pitch)] += 1
    assert leaps[1] + leaps[2] > 0.35 * leaps.total()
    assert sum(count for leap, count in leaps.items() if leap > 12) < 0.01 * leaps.total()


def test_a_bar_begins_with_a_melody_tone_of_its_chord(pieces):
    for piece in pieces:
        for note in melody(piece):
            if note.start % piece.beats_per_bar == 0:
                chord = classes(other for other in left_hand(piece) if note.start <= other.start < note.start + 2)
                assert note.pitch % 12 in chord


def test_dissonances_are_entered_and_left_by_step(pieces):
    steps = Counter()
    for piece in pieces:
        bars = defaultdict(list)
        for note in left_hand(piece):
            bars[note.start // piece.beats_per_bar].append(note)
        notes = melody(piece)
        for before, note, after in zip(notes, notes[1:], notes[2:], strict=False):
            if note.pitch % 12 not in classes(bars[note.start // piece.beats_per_bar]):
                steps.update(abs(other.pitch - note.pitch) for other in (before, after))
    assert steps.total() > 500
    assert set(steps) <= {1, 2, 3}
    assert steps[3] < 0.01 * steps.total()  # the augmented second of minor


def test_the_piece_ends_on_its_tonic(pieces):
    agreed = 0
    for piece in pieces:
        last = [note for note in piece.notes if note.start + note.length == piece.beats]
        tonic = bass_of_the_end(piece) % 12
        assert max(last).pitch % 12 == tonic
        assert {(pitch - tonic) % 12 for pitch in classes(last)} in ({0, 4, 7}, {0, 3, 7})
        assert all(note.length == piece.beats_per_bar for note in last)
        durations = np.zeros(12)
        for note in piece.notes:
            durations[note.pitch % 12] += note.length
        fits = [
            max(np.corrcoef(np.roll(profile, key), durations)[0, 1] for profile in (MAJOR_PROFILE, MINOR_PROFILE))
            for key in range(12)
        ]
        agreed += np.argmax(fits) == tonic
    assert agreed > 0.9 * len(pieces)


def test_the_last_cadence_goes_from_the_dominant_to_the_tonic(pieces):
    for piece in pieces:
        end = piece.beats - piece.beats_per_bar
        tonic = bass_of_the_end(piece)
        dominant = [note for note in left_hand(piece) if end - piece.beats_per_bar <= note.start < end]
        leading_tone = (tonic - 1) % 12
        assert leading_tone in classes(dominant)
        *_, before, _ = melody(piece)
        assert (before.pitch - tonic) % 12 in (2, 11)


def test_a_piece_returns_to_its_opening(pieces):
    for piece in pieces:
        half_phrase = 2 * piece.beats_per_bar
        last_phrase = piece.beats - 2 * half_phrase
        opening = [note for note in melody(piece) if note.start < half_phrase - 1]
        reprise = [
            note._replace(start=note.start - last_phrase)
            for note in melody(piece)
            if last_phrase <= note.start < last_phrase + half_phrase - 1
        ]
        assert reprise == opening


def test_voices_seldom_move_in_parallel_fifths_or_octaves(pieces):
    """Without the rule against them, one chord change in six has some."""
    changes = parallels = 0
    for piece in pieces:
        chords = defaultdict(list)
        for note in left_hand(piece):
            chords[note.start].append(note.pitch)
        if any(len(chord) != 4 for chord in chords.values()):
            continue  # not in block chords
        for before, after in pairwise(chords.values()):
            changes += before != after
            parallels += any(
                low != next_low and high - low == next_high - next_low and (high - low) % 12 in (0, 7)
                for (low, next_low), (high, next_high) in combinations(zip(before, after, strict=True), 2)
            )
    assert changes > 100
    assert parallels < 0.1 * changes


def test_downbeats_are_louder_than_what_follows_and_the_melody_than_the_left_hand(pieces):
    compared = 0
    for piece in pieces:
        loudness = {note.start: note.velocity for note in left_hand(piece)}
        assert all(note.velocity > loudness.get(note.start, 0) for note in melody(piece))
        for start, velocity in loudness.items():
            if start % piece.beats_per_bar == 0 and start + 0.5 in loudness:
                compared += 1
                assert velocity > loudness[start + 0.5]
    assert compared > 500


def test_a_velocity_is_that_of_the_theme_the_swell_and_the_beat(pieces):
    """The left hand of a theme has 52 or 64, its melody 18 more; both gain 12 at 5/8 of a phrase of four bars."""
    for piece in pieces[:30]:
        length = 4 * piece.beats_per_bar
        for note in piece.notes:
            share = note.start % length / length
            swell = share / 0.625 if share < 0.625 else (1 - share) / 0.375
            accent = 8 if note.start % piece.beats_per_bar == 0 else 4 if note.start == int(note.start) else 0
            base = note.velocity - round(12 * swell) - accent
            assert base in ((52 + 18, 64 + 18) if note.pitch >= MELODY_LOWEST else (52, 64))


def test_chords_are_thirds_on_their_degree():
    degrees = {name: chord.degrees for name, chord in CHORDS.items()}
    assert degrees == {
        "I": (0, 2, 4),
        "I6": (0, 2, 4),
        "ii": (1, 3, 5),
        "ii6": (1, 3, 5),
        "IV": (3, 5, 0),
        "V": (4, 6, 1),
        "V7": (4, 6, 1, 3),
        "vi": (5, 0, 2),
        "vii6": (6, 1, 3),
    }
    assert {name: chord.bass for name, chord in CHORDS.items()} == {
        "I": 0,
        "I6": 2,
        "ii": 1,
        "ii6": 3,
        "IV": 3,
        "V": 4,
        "V7": 4,
        "vi": 5,
        "vii6": 1,
    }
    assert {name for name, chord in CHORDS.items() if chord.is_dominant} == {"V", "V7", "vii6"}


def test_a_place_is_a_pitch_of_the_key_and_minor_sharpens_its_dominants():
    major, minor = composer.KEYS[0], composer.KEYS[5]
    assert [major.pitch(place, CHORDS["V"]) for place in range(-1, 8)] == [47, 48, 50, 52, 53, 55, 57, 59, 60]
    assert [minor.pitch(place, CHORDS["I"]) for place in range(-1, 8)] == [48, 50, 52, 53, 55, 57, 58, 60, 62]
    assert [minor.pitch(place, CHORDS["V7"]) for place in range(-1, 8)] == [49, 50, 52, 53, 55, 57, 59, 61, 62]
    for key, scale in zip(composer.KEYS, [{0, 2, 4, 5, 7, 9, 11}] * 5 + [{0, 2, 3, 5, 7, 8, 10}] * 4, strict=True):
        assert {(key.pitch(place, CHORDS["I"]) - key.tonic) % 12 for place in range(7)} == scale


def test_voices_go_from_chord_to_chord_with_the_least_effort():
    """By trying all: a bass of MIDI 36 to 51, three others of 52 to 66, twelve semitones for each parallel."""
    major = (0, 2, 4, 5, 7, 9, 11)

    def pitches(degree, low, high):
        return [pitch for pitch in range(low, high) if (pitch - 48) % 12 == major[degree]]

    before = (43, 55, 60, 64)
    chords = ["I", "IV", "V7", "vi", "ii6", "V", "I"]
    voicings = composer._voicings(composer.KEYS[0], [CHORDS[name] for name in chords])
    for name, found in zip(chords, voicings, strict=True):
        degrees = CHORDS[name].degrees[1:] if name == "V7" else CHORDS[name].degrees
        tried = []
        for bass in pitches(CHORDS[name].bass, 36, 52):
            for a in pitches(degrees[0], 52, 67):
                for b in pitches(degrees[1], 52, 67):
                    for c in pitches(degrees[2], 52, 67):
                        after = (bass, *sorted((a, b, c)))
                        effort = sum(abs(new - old) for old, new in zip(before, after, strict=True))
                        for i, j in combinations(range(4), 2):
                            kept = after[j] - after[i] == before[j] - before[i]
                            effort += 12 * (kept and after[i] != before[i] and (after[j] - after[i]) % 12 in (0, 7))
                        tried.append((effort, after))
        assert found == min(tried)[1]
        before = found


def test_pieces_are_the_same_on_every_platform_and_in_every_python():
    """The promise is that they never change, so these hashes are a record, not from an independent source."""
    sums = [
        hashlib.sha256(b"".join(midi_bytes(compose(s, t)) for s in range(20))).hexdigest() for t in ((15, 30), (7, 12))
    ]
    assert sums == [
        "518615ff0c430fa90ab70bede178052b4b80dcc9c88de30d4e32132587dbdc8f",
        "866a5c79837d5b93312177cfa43586ce50f4cf080a1bde8eedc1c0a48ab373b0",
    ]
    assert demo_material._seeds(1, 3) == [1210245519433057, 7633004523783416, 6879470178836243]


# MIDI


def in_ticks(piece):
    return [
        (round(start * TICKS_PER_BEAT), round(length * TICKS_PER_BEAT), pitch, velocity)
        for start, length, pitch, velocity in piece.notes
    ]


def test_symusic_reads_the_same_piece(pieces):
    for piece in pieces[:30]:
        score = symusic.Score.from_midi(midi_bytes(piece))
        (track,) = score.tracks
        assert (score.ticks_per_quarter, track.program, track.is_drum) == (TICKS_PER_BEAT, 0, False)
        assert sorted((n.time, n.duration, n.pitch, n.velocity) for n in track.notes) == in_ticks(piece)
        assert [tempo.qpm for tempo in score.tempos] == [pytest.approx(piece.tempo_bpm, abs=1e-3)]
        assert [(s.numerator, s.denominator) for s in score.time_signatures] == [(piece.beats_per_bar, 4)]


def test_mido_reads_the_same_piece(pieces):
    for piece in pieces[:30]:
        file = mido.MidiFile(file=io.BytesIO(midi_bytes(piece)))
        assert (file.type, len(file.tracks), file.ticks_per_beat) == (0, 1, TICKS_PER_BEAT)
        assert file.length == pytest.approx(seconds(piece), rel=1e-5)
        now, held, notes = 0, {}, []
        for message in file.tracks[0]:
            now += message.time
            if message.type == "note_on":
                assert message.note not in held
                held[message.note] = now, message.velocity
            elif message.type == "note_off":
                start, velocity = held.pop(message.note)
                notes.append((start, now - start, message.note, velocity))
        assert not held
        assert sorted(notes) == in_ticks(piece)


def test_long_rests_are_written_in_several_bytes():
    piece = Piece([Note(start, 1, 60, 64) for start in (0, 1, 50, 5000)], tempo_bpm=120, beats_per_bar=4)
    (track,) = symusic.Score.from_midi(midi_bytes(piece)).tracks
    assert [note.time for note in track.notes] == [start * TICKS_PER_BEAT for start in (0, 1, 50, 5000)]


def test_midi_files_are_a_function_of_the_seed(tmp_path):
    assert write_midi(tmp_path / "here", pieces=12, seed=1) == 12
    code = "import sys; from pathlib import Path; from shortcut_cli.demo.material import write_midi\n"
    code += "write_midi(Path(sys.argv[1]), pieces=12, seed=1)"
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "elsewhere"], check=True, env=environment)
    write_midi(tmp_path / "other", pieces=12, seed=2)
    here, elsewhere, other = (hashes(tmp_path / name) for name in ("here", "elsewhere", "other"))
    assert here == elsewhere
    assert here.keys() == other.keys() == {f"{number:04d}.mid" for number in range(12)}
    assert len({*here.values(), *other.values()}) == 24


def test_each_file_is_the_piece_of_its_own_seed(tmp_path):
    seeds = [1210245519433057, 7633004523783416, 6879470178836243]
    write_midi(tmp_path / "midi", pieces=3, seed=1)
    write_audio(tmp_path / "audio", pieces=3, seed=1, sample_rate_hz=4000)
    for number, seed in enumerate(seeds):
        assert (tmp_path / "midi" / f"000{number}.mid").read_bytes() == midi_bytes(compose(seed))
        with wave.open(str(tmp_path / "audio" / f"000{number}.wav")) as sound:
            assert sound.getframerate() == 4000
            samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2")
        assert np.array_equal(samples, render(compose(seed, (7, 12)), 4000))


# Sound


def spectrum(samples, rate):
    """Magnitudes and their frequencies in hertz."""
    return np.abs(np.fft.rfft(samples * np.hanning(len(samples)))), np.fft.rfftfreq(len(samples), 1 / rate)


@pytest.mark.parametrize(("pitch", "fundamental_hz"), [(45, 110), (69, 440), (81, 880)])
@pytest.mark.parametrize("rate", [16000, 24000])
def test_a_note_has_its_pitch(pitch, fundamental_hz, rate):
    samples = render(Piece([Note(0, 4, pitch, 80)], tempo_bpm=120, beats_per_bar=4), rate)
    size, hz = spectrum(samples, rate)
    assert hz[np.argmax(size)] == pytest.approx(fundamental_hz * np.sqrt(1 + INHARMONICITY), abs=1)
    near_partials = np.abs(hz / fundamental_hz - np.round(hz / fundamental_hz)) < 0.1
    between = (hz > 0.5 * fundamental_hz) & (hz < 4.5 * fundamental_hz) & ~near_partials
    assert (size[between] ** 2).sum() < 0.01 * (size**2).sum()


def test_partials_that_the_rate_cannot_hold_are_left_out():
    samples = render(Piece([Note(0, 4, 93, 127)], tempo_bpm=120, beats_per_bar=4), 8000)
    size, hz = spectrum(samples, 8000)
    alone = np.abs(hz - 1760) < 50  # the third partial, 5,280 Hz, would come back at 2,720 Hz
    second = np.abs(hz - 3520) < 50
    assert (size[~alone & ~second] ** 2).sum() < 0.01 * (size**2).sum()


def test_a_note_struck_harder_is_brighter():
    def centroid_hz(velocity):
        size, hz = spectrum(render(Piece([Note(0, 1, 60, velocity)], 120, 4), 24000), 24000)
        return (size * hz).sum() / size.sum()

    assert centroid_hz(40) < centroid_hz(80) < centroid_hz(120)


def test_a_note_sounds_from_its_start_and_dies_away():
    samples = np.abs(render(Piece([Note(1, 2, 60, 100)], tempo_bpm=120, beats_per_bar=4), 24000).astype(float))
    assert not samples[:12000].any()
    loudness = [np.sqrt((samples[start : start + 6000] ** 2).mean()) for start in range(12000, 42000, 6000)]
    assert loudness == sorted(loudness, reverse=True)
    let_go = 36000
    assert samples[let_go + 1440 : let_go + 2880].mean() < 0.5 * samples[let_go - 1440 : let_go].mean()
    assert samples[-240:].max() < 0.01 * samples.max()


def test_a_rendered_piece_has_the_right_length_and_does_not_clip(pieces):
    for piece in pieces[:5]:
        samples = render(piece, 8000)
        assert samples.dtype == np.int16
        assert len(samples) == round((seconds(piece) + TAIL_S) * 8000)
        assert np.abs(samples.astype(int)).max() == round(0.7 * 32767)


def plainly_rendered(piece, rate):
    """The sound of a piece from the formulas: partials of struck strings, and a convolution with noise for the room."""
    beat_s = 60 / piece.tempo_bpm
    dry = np.zeros(round((piece.beats * beat_s + 0.5) * rate))
    damped = round(0.12 * rate)
    for note in piece.notes:
        t = np.arange(min(round((note.length * beat_s + 0.12) * rate), round(4.12 * rate))) / rate
        force, tone = note.velocity / 127, np.zeros(len(t))
        for k in range(1, 13):
            hz = k * 440 * 2 ** ((note.pitch - 69) / 12) * (1 + 4e-4 * k * k) ** 0.5
            decay_s = 1.6 * 2 ** ((60 - note.pitch) / 24) / (1 + 0.3 * (k - 1))
            if hz < 0.45 * rate:
                weight = (1 - force) * k**-2.2 + force / k
                tone += weight * np.sin(2 * np.pi * hz * t) * np.exp(-t / decay_s)
        tone *= force**1.5 * np.minimum(t / 0.004, 1)
        tone[-damped:] *= np.linspace(1, 0, damped) ** 2
        first = round(note.start * beat_s * rate)
        dry[first : first + len(t)] += tone
    length = round(0.9 * rate)
    room = np.random.default_rng(0).standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
    wet = dry + 0.25 * np.convolve(dry, room / np.linalg.norm(room))[: len(dry)]
    return wet * 0.7 * 32767 / np.abs(wet).max()


def test_a_piece_sounds_as_the_formulas_say():
    notes = [Note(0, 1, 45, 40), Note(0.5, 1.5, 57, 127), Note(0.5, 0.5, 76, 90), Note(1, 8, 60, 100)]
    for tempo_bpm, rate in ((120, 3200), (72, 3000)):  # 16,000 samples: with the room they pass a power of two
        piece = Piece(notes, tempo_bpm=tempo_bpm, beats_per_bar=4)
        found, expected = render(piece, rate), plainly_rendered(piece, rate)
        # Half a step is the rounding to 16 bits; float32 adds far less than a hundredth at this loudness.
        assert np.abs(found - expected).max() < 0.51


def test_audio_files_are_sound_and_a_function_of_the_seed(tmp_path):
    for name, seed in (("here", 1), ("again", 1), ("other", 2)):
        assert write_audio(tmp_path / name, pieces=3, seed=seed) == 3
    here, again, other = (hashes(tmp_path / name) for name in ("here", "again", "other"))
    assert here == again
    assert here.keys() == other.keys() == {"0000.wav", "0001.wav", "0002.wav"}
    assert len({*here.values(), *other.values()}) == 6
    for path in (tmp_path / "here").iterdir():
        with wave.open(str(path)) as sound:
            assert (sound.getnchannels(), sound.getsampwidth(), sound.getframerate()) == (1, 2, 24000)
            assert 7 <= sound.getnframes() / 24000 - TAIL_S <= 12
            samples = np.frombuffer(sound.readframes(sound.getnframes()), "<i2")
        assert np.abs(samples.astype(int)).max() == round(0.7 * 32767)
        assert np.sqrt((samples.astype(float) ** 2).mean()) > 1000


# Text


def test_texts_are_whole_and_readable(tmp_path):
    count = write_text(tmp_path)
    from pydoc_data.topics import topics

    texts = [path.read_bytes().decode("utf-8") for path in tmp_path.glob("*.txt")]
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {f"{topic}.txt": text.encode() for topic, text in topics.items()}
    assert count == len(texts) == len(list(tmp_path.iterdir())) > 50
    assert all(len(text) > 100 and text.count("\n") > 2 for text in texts)
    assert sum(map(len, texts)) > 300_000
    assert any('"assert" statement' in text for text in texts)
