"""Samples on pages: the synthesiser against its formula, spectrograms against a plain transform, rolls against mido."""

import base64
import html
import io
import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import mido
import numpy as np
import pretty_midi
import pytest
import soundfile
from conftest import quiet, shortcut
from PIL import Image

from shortcut_cli import files
from shortcut_cli.data import shards
from shortcut_cli.data.shards import Shards
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.formatting import to_json
from shortcut_cli.inference import runs
from shortcut_cli.inference.prompts import Given
from shortcut_cli.report import assemble, documents, media, music, page, run_data, samples, spectrum, synth, tracks
from shortcut_cli.report.axis import Axis
from shortcut_cli.stages import pipeline

RATE = synth.RATE_HZ


def decoded(uri, kind):
    head, _, content = uri.partition(",")
    assert head == f"data:{kind};base64"
    return io.BytesIO(base64.b64decode(content, validate=True))


class TestSynthesiser:
    def note(self, pitch, velocity, seconds, held=None):
        return synth.render([synth.Note(0, seconds if held is None else held, pitch, velocity)], seconds)

    @pytest.mark.parametrize("pitch", [33, 60, 69, 93])
    def test_the_strongest_frequency_is_that_of_the_pitch(self, pitch):
        sound = self.note(pitch, 100, 2.0)
        size = 1 << 19
        spectrum = np.abs(np.fft.rfft(sound[:RATE] * np.hanning(RATE), size))
        assert np.argmax(spectrum) * RATE / size == pytest.approx(pretty_midi.note_number_to_hz(pitch), rel=2e-3)

    def test_partials_have_the_heights_and_decays_of_the_formula(self):
        """Heights are found by projection on a sine and a cosine over whole periods of A4, which are 1/440 s."""
        sound, velocity = self.note(69, 88, 2.0).astype(float), 88
        for number in (1, 2, 3, 8):
            for at in (0.25, 1.0):
                first, count = round(at * RATE), RATE // 40  # 11 periods
                time = np.arange(first, first + count) / RATE
                turn = np.exp(-2j * np.pi * 440 * number * time)
                found = 2 * abs((sound[first : first + count] * turn).mean())
                middle = at + count / RATE / 2
                decay = math.exp(-middle * (1 + 0.3 * (number - 1)) / (1.6 * 2 ** ((60 - 69) / 24)))
                wanted = 0.2 * (velocity / 127) ** 1.5 * number ** -(2.2 - 1.2 * velocity / 127) * decay
                assert found == pytest.approx(wanted, rel=0.02), (number, at)

    def test_a_note_begins_and_ends_where_it_should(self):
        sound = synth.render([synth.Note(0.5, 1.0, 69, 100)], 2.0)
        assert len(sound) == round(2.5 * RATE)
        assert not sound[: RATE // 2].any()
        assert not sound[round(1.5 * RATE) + 1 :].any()
        held, released = (np.abs(sound[round(at * RATE) :][:600]).max() for at in (0.95, 1.14))
        # Two release times later; the string itself decays meanwhile.
        assert released / held == pytest.approx(math.exp(-2) * (1 - 0.14 / 0.5) * math.exp(-0.19 / 1.23), rel=0.15)
        assert np.abs(np.diff(sound)).max() < 0.1  # no click

    def test_nothing_is_louder_than_full_scale(self):
        chord = [synth.Note(0, 1, pitch, 127, drum) for pitch in range(30, 90) for drum in (False, True)]
        sound = synth.render(chord, 1.0)
        assert np.abs(sound).max() == pytest.approx(0.9, abs=1e-4)
        assert np.abs(self.note(60, 127, 1.0)).max() < 0.9

    def test_a_louder_note_is_louder_and_a_drum_is_short(self):
        quiet_one, loud = (np.abs(self.note(60, velocity, 1.0)).max() for velocity in (20, 120))
        assert loud > 5 * quiet_one
        drum = synth.drum(synth.Note(0, 3, 38, 100, True))
        assert np.square(drum[: RATE // 20]).sum() > 5 * np.square(drum[RATE // 20 :]).sum()

    def test_no_notes_are_silence(self):
        assert not synth.render([], 0.0).any()
        assert np.isfinite(synth.render([synth.Note(0, 0, 127, 127), synth.Note(0, 0, 0, 0)], 0.0)).all()


class TestSpectrogram:
    def test_every_value_is_that_of_a_plain_transform(self, monkeypatch):
        monkeypatch.setattr(spectrum, "WINDOW_S", 64 / 8000)
        monkeypatch.setattr(spectrum, "BANDS", 6)
        spectrum._bank.cache_clear()
        rate, size = 8000, 64
        sound = np.random.default_rng(0).normal(size=400) / 10
        found = spectrum.mel_db(sound, rate)
        columns = found.shape[1]
        assert columns == 4 * 400 // 64

        def mel(hz):
            return 2595 * math.log10(1 + hz / 700)

        corners = [mel(4000) * number / 7 for number in range(8)]
        for column in (0, 7, columns - 1):
            middle = int((column + 0.5) * 400 / columns)
            weights = [0.5 - 0.5 * math.cos(2 * math.pi * n / size) for n in range(size)]
            around = [middle - size // 2 + n for n in range(size)]
            part = [sound[-1 - i if i < 0 else 799 - i if i >= 400 else i] for i in around]  # mirrored at the ends
            powers = []
            for k in range(size // 2 + 1):
                total = sum(
                    w * x * np.exp(-2j * np.pi * k * n / size)
                    for n, (w, x) in enumerate(zip(weights, part, strict=True))
                )
                powers.append(abs(total / (sum(weights) / 2)) ** 2)
            for band in range(6):
                low, peak, high = corners[band : band + 3]
                heights = [
                    max(
                        0,
                        min((mel(k * rate / size) - low) / (peak - low), (high - mel(k * rate / size)) / (high - peak)),
                    )
                    for k in range(size // 2 + 1)
                ]
                wanted = 10 * math.log10(sum(h * p for h, p in zip(heights, powers, strict=True)))
                assert found[band, column] == pytest.approx(wanted, abs=1e-6)
        spectrum._bank.cache_clear()

    def test_a_sine_of_full_scale_is_at_its_tick_and_at_0_db(self):
        rate = 24_000
        sound = np.sin(2 * np.pi * 1500 * np.arange(rate) / rate)  # 64 bins of 1,024
        found = spectrum.mel_db(sound, rate)[:, 20:-20]
        heights = (found.argmax(0) + 1) / (spectrum.BANDS + 1)
        assert heights == pytest.approx(spectrum.mel(1500) / spectrum.mel(12_000), abs=0.02)
        assert found.max() == pytest.approx(0, abs=1.5)
        assert spectrum.mel_db(np.zeros(5000), rate).max() == spectrum.LOWEST_DB
        assert [words for _, words in spectrum.ticks(rate)] == ["100", "500", "1,000", "2,000", "4,000", "8,000"]

    def test_the_outline_has_the_ends_of_every_part(self):
        sound = np.random.default_rng(0).normal(size=1001)
        found = spectrum.outline(sound, 10)
        for part, (low, high) in enumerate(found):
            mine = sound[part * 1001 // 10 : (part + 1) * 1001 // 10]
            assert (low, high) == (mine.min(), mine.max())

    def test_shades_are_read_back_as_their_colours_and_get_ever_lighter(self):
        shades = np.arange(6, dtype=np.uint8).reshape(2, 3) * 51
        image = Image.open(decoded(media.png(shades), "image/png"))
        assert image.size == (3, 2)
        found = np.array(image.convert("RGB"))
        assert found.tolist() == media.palette()[shades].tolist()
        light = media.palette() @ [0.2126, 0.7152, 0.0722]
        assert (light[0], light[-1]) == (0, pytest.approx(255))
        assert (np.diff(light) > -1).all()
        assert spectrum.shades(np.array([[-90.0], [0.0]])).tolist() == [[255], [0]]


@pytest.mark.parametrize(("rate", "channels"), [(24_000, 1), (48_000, 2), (44_100, 1), (20_000, 1)])
def test_sound_in_a_page_has_its_length_and_pitch(rate, channels):
    sound = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate).astype(np.float32)
    given = sound if channels == 1 else np.stack([sound] * channels, 1)
    found, found_rate = soundfile.read(decoded(media.mp3(given, rate), "audio/mpeg"), always_2d=True)
    assert len(found) / found_rate == pytest.approx(2, abs=0.001)
    assert found.shape[1] == channels
    mono = found.mean(1)
    assert np.argmax(np.abs(np.fft.rfft(mono))) * found_rate / len(mono) == pytest.approx(440, abs=1)
    assert np.sqrt(2 * np.square(mono).mean()) == pytest.approx(0.5, abs=0.02)


def test_eight_samples_of_half_a_minute_beside_others_take_less_than_10_mb():
    """Noise is the worst case of both; sixteen of them, stereo at 48 kHz."""
    sound = np.random.default_rng(0).normal(size=(30 * 48_000, 2)).astype(np.float32) / 10
    picture = media.png(spectrum.shades(spectrum.mel_db(sound.mean(1), 48_000)))
    assert 16 * (len(media.mp3(sound, 48_000)) + len(picture)) < 9.9e6


@pytest.fixture
def song(tmp_path):
    """A file with two tempos, two meters, a pedal and a drum."""
    file = mido.MidiFile(ticks_per_beat=480)
    head, hand, drums = mido.MidiTrack(), mido.MidiTrack(), mido.MidiTrack()
    head += [
        mido.MetaMessage("set_tempo", tempo=500_000, time=0),
        mido.MetaMessage("time_signature", numerator=3, denominator=4, time=0),
        mido.MetaMessage("set_tempo", tempo=1_000_000, time=1440),
        mido.MetaMessage("time_signature", numerator=6, denominator=8, time=1440),
    ]
    for pitch, velocity, wait, length in ((60, 100, 0, 480), (64, 20, 480, 960), (67, 127, 1440, 1200)):
        hand += [mido.Message("note_on", note=pitch, velocity=velocity, time=wait)]
        hand += [mido.Message("note_off", note=pitch, time=length)]
    drums += [mido.Message("note_on", channel=9, note=38, velocity=90, time=720)]
    drums += [mido.Message("note_off", channel=9, note=38, time=120)]
    file.tracks += [head, hand, drums]
    file.save(tmp_path / "song.mid")
    return tmp_path / "song.mid"


class TestMusic:
    def test_notes_and_bars_are_where_pretty_midi_has_them(self, song):
        found, other = music.read(song), pretty_midi.PrettyMIDI(str(song))
        wanted = sorted(
            (note.start, note.end, note.pitch, note.velocity, instrument.is_drum)
            for instrument in other.instruments
            for note in instrument.notes
        )
        assert len(found.notes) == 4
        for mine, theirs in zip(found.notes, wanted, strict=True):
            assert tuple(mine) == pytest.approx(theirs)
        assert found.seconds == pytest.approx(other.get_end_time())
        assert found.bars == pytest.approx([bar for bar in other.get_downbeats() if bar < found.seconds])

    def test_a_pedal_holds_what_ends_while_it_is_down(self, tmp_path):
        file, track = mido.MidiFile(ticks_per_beat=480), mido.MidiTrack()
        track += [mido.Message("control_change", control=64, value=127, time=240)]
        track += [mido.Message("note_on", note=60, velocity=90, time=0), mido.Message("note_off", note=60, time=240)]
        track += [mido.Message("control_change", control=64, value=0, time=960)]
        track += [mido.Message("note_on", note=62, velocity=90, time=0), mido.Message("note_off", note=62, time=480)]
        file.tracks.append(track)
        file.save(tmp_path / "a.mid")
        ends = [(note.pitch, note.end) for note in music.read(tmp_path / "a.mid").notes]
        assert ends == [(60, pytest.approx(1.5)), (62, pytest.approx(2.0))]

    def test_the_roll_has_every_note_at_its_time_and_pitch(self, song):
        found, axis = music.read(song), Axis("seconds", 0.0, 8.0)
        panel = tracks.roll([note for note in found.notes if not note.drum], axis, bars=found.bars)
        rects = [dict(re.findall(r'([a-z-]+)="([^"]*)"', rect)) for rect in re.findall("<rect [^>]*>", panel.picture)]
        wanted = pretty_midi.PrettyMIDI(str(song)).instruments[0].notes
        assert len(rects) == len(wanted)
        top = 67 + 2
        for rect, note in zip(rects, sorted(wanted, key=lambda note: note.start), strict=True):
            assert float(rect["x"]) == pytest.approx(1000 * note.start / 8, abs=0.01)
            assert float(rect["width"]) == pytest.approx(1000 * (note.end - note.start) / 8, abs=0.01)
            assert float(rect["y"]) == pytest.approx(top - note.pitch - 0.95, abs=0.01)
            assert rect["data-tip"].startswith(
                f"{pretty_midi.note_number_to_name(note.pitch)}, velocity {note.velocity},"
            )
        shades = [float(rect["fill-opacity"]) for rect in rects]
        assert shades[1] < shades[0] < shades[2]
        height = top - 59
        places = {
            words.replace("\N{MUSIC SHARP SIGN}", "#"): at * height - 0.5 + 59 for words, at in _turned(panel.ticks)
        }
        assert len(places) == 3
        assert places == pytest.approx({name: pretty_midi.note_name_to_number(name) for name in places})


def _turned(pairs):
    return [(b, a) for a, b in pairs]


def made(folder, name, content, **changes):
    """A sample with its .json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    sidecar = {"checkpoint_sha256": "0" * 64, "sampler": {"temperature": 0.9, "seed": 1, "top_k": 0}, "number": 0}
    sidecar |= {"tokens": 30, "prompt_tokens": 0, "prompt": None, "ended": True}
    sidecar |= {"sha256": files.sha256(folder / name)} | changes
    (folder / f"{name}.json").write_text(json.dumps(sidecar))


def shown(run):
    return page.render("a run", samples.sections(run))


class TestSamples:
    def test_a_run_without_samples_has_no_section(self, tmp_path):
        assert samples.sections(tmp_path) == []

    def test_names_and_contents_are_inert(self, tmp_path):
        evil = '"><script>alert(1)</script>\x1b[2J\u202e'
        made(tmp_path / "samples", "<img src=x onerror=alert(1)> \N{BOMB}.txt", evil.encode(), sampler={"seed": evil})
        made(tmp_path / "samples", "b.txt", b"\xff" * 100_000)
        found = shown(tmp_path)
        body = found.partition("<main>")[2].partition("</main>")[0]
        assert "<script" not in body
        assert "<img" not in body
        assert "\x1b" not in found
        assert "\u202e" not in found
        assert "80,000 more characters" in found

    def test_what_is_no_sample_or_damaged_is_left_out_or_said(self, tmp_path):
        folder = tmp_path / "samples"
        made(folder, "a.wav", b"RIFF")
        made(folder, "b.mid", b"no music")
        made(folder, "c.txt", b"words")
        (folder / "c.txt").write_text("other words")
        made(folder, "d.txt", b"gone")
        (folder / "d.txt").unlink()
        (folder / "e.txt.json").write_text("{")
        (folder / "f.txt.json").write_text("[]")
        made(folder, "g.txt", b"kept", sampler=None, tokens="many", prompt_tokens=float("nan"), prompt=3)
        found = shown(tmp_path)
        assert re.findall("<strong>(.*?)</strong>", found) == ["a.wav", "b.mid", "c.txt", "g.txt"]
        assert found.count("It can&#39;t be read: ") == 2
        assert found.count("has changed since it was sampled") == 1

    def test_music_of_more_notes_than_can_be_played_is_said(self, tmp_path, song, monkeypatch):
        monkeypatch.setattr(samples, "MOST_NOTES", 3)
        made(tmp_path / "samples", "a.mid", song.read_bytes())
        assert "it has 4 notes in its first minute; 1 to 3 are played" in shown(tmp_path)

    def test_a_long_sample_is_shown_for_a_minute(self, tmp_path, monkeypatch):
        monkeypatch.setattr(samples, "MOST_S", 1.0)
        stream = io.BytesIO()
        soundfile.write(stream, np.full(36_000, np.nan), 24_000, format="WAV", subtype="FLOAT")
        made(tmp_path / "samples", "a.wav", stream.getvalue())
        found = shown(tmp_path)
        assert "seconds, the first 1 of 1.5" in found
        assert (re.search('data-low="(.*?)" data-high="(.*?)"', found).groups()) == ("0.0", "1.0")

    def test_only_eight_are_shown_and_the_others_counted(self, tmp_path):
        for number in range(11):
            made(tmp_path / "samples", f"{number:02d}.txt", b"words")
        found = shown(tmp_path)
        assert found.count("<strong>") == 8
        assert "3 more are in the folder" in found

    @pytest.mark.parametrize("how", ["begins", "file", "altered", "different"])
    def test_the_prompt_is_set_apart_from_what_was_sampled(self, tmp_path, how):
        (tmp_path / "given.txt").write_text("Once upon")
        changes = {"prompt": "../given.txt", "prompt_sha256": files.sha256(tmp_path / "given.txt"), "prompt_tokens": 4}
        if how == "begins":
            changes |= {"new_begins": {"character": 9}, "prompt_sha256": "0"}
        if how == "altered":
            changes["prompt_sha256"] = "0"
        content = b"once, upon a time" if how == "different" else b"Once upon a time"
        made(tmp_path / "samples", "a.txt", content, **changes)
        words = re.search('<div class="words"[^>]*>(.*?)</div>', shown(tmp_path), re.S)[1]
        prompt = re.search("prompt: </span>(.*?)<span", words)
        if how in ("altered", "different"):
            assert not prompt
            assert "where that ends is not known" in shown(tmp_path)
        else:
            assert prompt[1] == "Once upon"
            assert words.endswith("</mark> a time")

    def test_sound_has_a_player_pictures_and_the_place_of_its_prompt(self, tmp_path):
        stream = io.BytesIO()
        soundfile.write(stream, np.sin(np.arange(36_000) / 9) / 3, 24_000, format="WAV")
        made(tmp_path / "samples", "a.wav", stream.getvalue(), prompt_tokens=10, tokens=30)
        found = shown(tmp_path)
        sound, rate = soundfile.read(decoded(re.search('<audio [^>]*src="([^"]*)"', found)[1], "audio/mpeg"))
        assert len(sound) / rate == pytest.approx(1.5, abs=0.001)
        assert (re.search('data-low="(.*?)" data-high="(.*?)"', found).groups()) == ("0.0", "1.5")
        assert '<div class="given early" style="width:25.00%">' in found
        assert found.count('role="img" aria-label="') >= 2

    def test_music_is_played_for_as_long_as_it_is_drawn(self, tmp_path, song):
        made(tmp_path / "samples", "a.mid", song.read_bytes(), prompt_tokens=10, new_begins={"second": 2.0})
        found = shown(tmp_path)
        sound, rate = soundfile.read(decoded(re.search('<audio [^>]*src="([^"]*)"', found)[1], "audio/mpeg"))
        end = pretty_midi.PrettyMIDI(str(song)).get_end_time() + 0.5
        assert len(sound) / rate == pytest.approx(end, abs=0.01)
        assert float(re.search('data-high="(.*?)"', found)[1]) == pytest.approx(end, abs=0.001)
        assert f'style="width:{200 / end:.2f}%"' in found
        assert found.count('class="panel"') == 2  # the piano and the drums


class TestHeldOut:
    @pytest.fixture
    def run(self, text_run, tmp_path):
        folder = tmp_path / "run"
        folder.mkdir()
        content = (text_run / "shortcut" / "run.pt").read_bytes()
        (folder / "run.pt").write_bytes(content)
        settings = ["sample.n=2", "sample.tokens=40"]
        pipeline.draw(folder / "run.pt", None, Given(), settings, None, device="cpu", report=quiet)
        return folder

    def test_a_document_of_the_same_length_is_beside_each_sample(self, text_run, run):
        found = re.findall('<div class="words"[^>]*>(.*?)</div>', shown(run), re.S)
        assert len(found) == 4
        tokenizer = runs.open_run(run / "run.pt", "cpu").tokenizer()
        split = Shards(text_run / "shards").split("test")
        lengths = split.document_tokens()
        for number in (0, 1):
            sidecar = json.loads((run / "samples" / f"sample-1-{number:03d}.txt.json").read_text())
            index = number % len(lengths)
            ids = split.read(int(lengths[:index].sum()), sidecar["tokens"])
            wanted = "".join(tokenizer.excerpt(ids).texts)
            assert found[2 * number + 1] == wanted

    def test_it_is_decoded_once(self, run, monkeypatch):
        first = shown(run)
        monkeypatch.setattr(documents.Documents, "tokenizer", None)
        assert shown(run) == first

    def test_other_shards_or_none_are_said(self, run, monkeypatch):
        read = shards.read_manifest
        monkeypatch.setattr(shards, "read_manifest", lambda place: read(place) | {"checksum": "0" * 64})
        assert "the shards of the run are not at" in shown(run)
        monkeypatch.setattr(shards, "read_manifest", read)
        assert "the shards of the run are not at" not in shown(run)
        (run / "run.pt").write_bytes(b"PK")
        assert "No held-out documents are shown" in shown(run)

    @pytest.mark.parametrize("named", ["shards/text", "old/shards/text", "/gone/shards/text", "../shards/text"])
    def test_shards_are_found_beside_a_run_that_was_moved(self, text_run, tmp_path, named):
        shutil.copytree(text_run / "shards", tmp_path / "new" / "shards" / "text")
        folder = tmp_path / "new" / "runs" / "text" / "shortcut-s1"
        folder.mkdir(parents=True)
        checksum = json.loads((text_run / "shards" / "manifest.json").read_text())["checksum"]
        content = {"recipe": {"data": {"shards": named}}, "shards": checksum}
        assert run_data.shards_of(folder, content).resolve() == (tmp_path / "new" / "shards" / "text").resolve()
        assert run_data.shards_of(folder, content | {"shards": "0" * 64}) is None
        for strange in (None, 3, "a\0b", ""):
            assert run_data.shards_of(folder, content | {"recipe": {"data": {"shards": strange}}}) is None

    def test_excerpts_of_one_document_follow_each_other(self):
        found = object.__new__(documents.Documents)
        found.lengths, found.shards = [101], SimpleNamespace(tokenizer={"stride": 1})
        assert [found.start(0, 30, turn) for turn in range(5)] == [0, 30, 60, 0, 30]
        assert found.start(0, 100, 1) == found.start(0, 60, 1) == 0
        found.shards.tokenizer["stride"] = 4
        assert [found.start(0, 30, turn) for turn in range(3)] == [0, 28, 60]

    def test_samples_beside_one_document_have_parts_of_it(self, text_run, run):
        settings = ["sample.n=6", "sample.tokens=9", "sample.seed=5"]
        pipeline.draw(run / "run.pt", None, Given(), settings, None, device="cpu", report=quiet)
        captions = re.findall(r"in the test split, decoded from [^<]*", shown(run))
        count = len(Shards(text_run / "shards").split("test").document_tokens())
        assert count < 6
        assert any(re.search(r"tokens \d+ to \d+ of its", caption) for caption in captions)

    def test_a_document_is_long_enough_if_there_is_one(self):
        found = object.__new__(documents.Documents)
        found.lengths = [10, 50, 20, 60]
        assert found.like(30, {}) == 1
        assert found.like(30, {1: 1}) == 3
        assert found.like(30, {1: 1, 3: 1}) == 1
        assert found.like(30, {1: 2, 3: 1}) == 3
        assert found.like(50, {3: 7}) == 3
        assert found.like(100, {3: 7}) == 3
        found.lengths = []
        assert found.like(3, {}) is None

    def test_the_cache_keeps_only_what_was_used_last(self, tmp_path, monkeypatch):
        monkeypatch.setattr(documents, "MOST_KEPT", 3)
        for number in range(5):
            (tmp_path / str(number)).write_text("")
            os.utime(tmp_path / str(number), (number, number))
        documents._make_room(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4"]

    def test_documents_of_shards_are_spread_over_them(self, text_run):
        found = str(samples.excerpts(text_run / "shards", 3))
        count = len(Shards(text_run / "shards").split("train").document_tokens())
        named = [int(number) for number in re.findall(r"<strong>document (\d+)", found)]
        assert named == [number * count // 3 + 1 for number in range(3)]
        assert found.count('class="words"') == 3
        assert len(re.findall("<strong>", str(samples.excerpts(text_run / "shards", 10_000, "val")))) == len(
            Shards(text_run / "shards").split("val").document_tokens()
        )


def test_a_sidecar_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "<b>.txt.json").write_text("{")
    (tmp_path / "samples" / "other.json").write_text("{}")
    whole = json.dumps({"checkpoint_sha256": "0" * 64, "sampler": {}, "number": 0})
    (tmp_path / "samples" / "gone.txt.json").write_text(whole)
    (tmp_path / "samples" / "loop.txt.json").write_text(whole)
    (tmp_path / "samples" / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "samples" / "nowhere.txt.json").symlink_to("missing")
    (section,) = samples.sections(tmp_path)
    words = html.unescape(str(section.body))
    assert "Not shown: <b>.txt.json is damaged: " in words
    for reason in (
        "other.json describes no sample",
        "gone.txt is gone, or no file",
        "nowhere.txt.json describes no sample",
    ):
        assert reason in words
    assert re.search("loop.txt (can't be read|is gone, or no file)", words)


def test_ten_thousand_damaged_sidecars_are_a_short_sentence(tmp_path):
    (tmp_path / "samples").mkdir()
    for number in range(10_000):
        (tmp_path / "samples" / f"{number}.txt.json").touch()
    (section,) = samples.sections(tmp_path)
    assert "9,992 more" in section.body
    assert len(section.body) < 3000


@pytest.mark.parametrize("value", [np.inf, 1e30, -2000.0])
def test_sound_beyond_any_is_a_sentence(tmp_path, value):
    soundfile.write(tmp_path / "a.wav", np.full(2400, value, np.float32), RATE, subtype="FLOAT")
    shown = samples._figure(tmp_path / "a.wav", "a.wav", "", samples.Given(), "a.wav")
    assert "over 1,000 times full scale" in shown


def test_all_of_a_text_is_shown(tmp_path):
    words = "word " * 3000
    (tmp_path / "a.txt").write_text(words)
    shown = str(samples._figure(tmp_path / "a.txt", "a.txt", "", samples.Given(), "a.txt"))
    assert words in shown
    assert "more characters" not in shown
    (tmp_path / "a.txt").write_text(words * 2)
    shown = str(samples._figure(tmp_path / "a.txt", "a.txt", "", samples.Given(), "a.txt"))
    assert (words * 2)[: samples.MOST_CHARACTERS] in shown
    assert "10,000 more characters" in shown


class TestNames:
    """Of documents: those of the files that they are from."""

    LINES = (
        {"source": 'a "split": "test" <b>.txt', "split": "train"},
        {"source": "b.jsonl", "split": "test", "line": 5},
        {"source": "c.mid", "split": "test", "variant": "up 2"},
        {"source": "d.txt", "split": "val"},
    )

    @pytest.fixture
    def opened(self, tmp_path):
        (tmp_path / "documents.jsonl").write_text("".join(to_json(line) + "\n" for line in self.LINES))
        found = object.__new__(documents.Documents)
        found.shards, found.name, found.lengths = SimpleNamespace(folder=tmp_path), "test", [10, 10]
        return found

    def test_a_line_and_a_change_are_named_with_the_file(self, opened):
        assert [opened.called(index) for index in range(2)] == ["b.jsonl, line 5", "c.mid, up 2"]

    def test_the_name_of_a_file_is_no_split(self, opened):
        opened.name, opened.lengths = "train", [10]
        assert opened.called(0) == 'a "split": "test" <b>.txt'

    def test_a_list_that_does_not_fit_is_said(self, opened, tmp_path):
        opened.lengths = [10, 10, 10]
        with pytest.raises(CheckFailed, match="lists 2 documents of test, of which there are 3"):
            opened.called(0)
        opened.lengths = [10]
        (tmp_path / "documents.jsonl").write_text('{"split": "test", "source": 3}\n')
        del opened.__dict__["_lines"]
        with pytest.raises(CheckFailed, match="its line at byte 0 can't be read"):
            opened.called(0)

    def test_a_document_whose_name_is_lost_is_shown_all_the_same(self, text_run, tmp_path):
        shutil.copytree(text_run / "shards", tmp_path / "shards")
        (tmp_path / "shards" / "documents.jsonl").write_text("")
        found = html.unescape(str(samples.excerpts(tmp_path / "shards", 1)))
        assert "from a file that is not known" in found
        assert 'class="words"' in found

    def test_names_and_long_ones_are_text(self, text_run, tmp_path):
        shutil.copytree(text_run / "shards", tmp_path / "shards")
        path = tmp_path / "shards" / "documents.jsonl"
        evil = "<script>hit=1</script>" + "x" * 300
        path.write_text(
            "".join(to_json(json.loads(line) | {"source": evil}) + "\n" for line in path.read_text().splitlines())
        )
        found = str(samples.excerpts(tmp_path / "shards", 1))
        assert "<script" not in found
        assert html.escape(evil) in found


class TestFolderOfItsOwn:
    @pytest.fixture
    def run(self, text_run, tmp_path):
        shutil.copytree(text_run / "gpt", tmp_path / "gpt", ignore=shutil.ignore_patterns("samples", "report.html"))
        return tmp_path / "gpt"

    def sample(self, run, *more):
        settings = ["-n", "2", "--tokens", "30", "--seed", "4"]
        return shortcut("sample", "--ckpt", run, *settings, *more, cwd=run.parent)

    def test_sampling_elsewhere_writes_a_page_of_the_samples(self, run, tmp_path):
        done = self.sample(run, "--out", "other")
        assert done.stderr.splitlines()[-1] == "Page: other/report.html"
        assert not (run / "report.html").exists()
        made = (tmp_path / "other" / "report.html").read_text()
        assert made.count('<figure class="sample">') == 4  # with a document beside each
        for number in range(2):
            assert f"<strong>sample-4-{number:03d}.txt</strong>" in made
        for fact in ("gpt/run.pt", files.sha256(run / "run.pt")[:16]):
            assert f"<dd>{fact}</dd>" in made
        os.utime(tmp_path / "other" / "report.html", (1, 1))
        shortcut("report", "other", cwd=tmp_path)
        assert (tmp_path / "other" / "report.html").stat().st_mtime == 1  # it is the same page
        assert assemble.found(tmp_path / "other") == [("samples", tmp_path / "other")]

    def test_attention_elsewhere_writes_a_page_there(self, text_run, tmp_path):
        shutil.copy(text_run / "shortcut" / "run.pt", tmp_path / "run.pt")
        prompt = " ".join(["the words of a prompt"] * 9)
        done = shortcut("attention", "--ckpt", "run.pt", "--prompt", prompt, "--out", "seen", cwd=tmp_path)
        assert done.stderr.splitlines()[-1] == "Page: seen/report.html"
        assert "Attention over layers" in (tmp_path / "seen" / "report.html").read_text()
        assert not (tmp_path / "report.html").exists()

    def test_no_page_is_written_over_a_file_of_the_user_or_if_it_is_left_out(self, run, tmp_path):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "report.html").write_text("mine")
        done = self.sample(run, "--out", "other")
        assert "No page was written: other/report.html exists" in done.stderr
        assert (tmp_path / "other" / "report.html").read_text() == "mine"
        done = self.sample(run, "--out", "third", "--no-report")
        assert "Page:" not in done.stderr
        assert not (tmp_path / "third" / "report.html").exists()

    def test_samples_in_the_run_are_on_the_page_of_the_run(self, run):
        for more in ([], ["--out", "gpt/samples"]):
            done = self.sample(run, *more)
            assert done.stderr.splitlines()[-1].endswith("gpt/report.html")
            assert not (run / "samples" / "report.html").exists()

    def test_a_checkpoint_that_has_gone_is_said(self, run, tmp_path):
        self.sample(run, "--out", "other", "--no-report")
        place = os.path.normpath(tmp_path / "other" / ".." / "gpt" / "run.pt")
        said = f"No held-out documents are shown: the checkpoint is not at {place}, or has changed."
        (section,) = samples.of_folder(tmp_path / "other")
        assert said not in html.unescape(str(section.body))
        with (run / "run.pt").open("ab") as stream:
            stream.write(b"x")
        (section,) = samples.of_folder(tmp_path / "other")
        assert said in html.unescape(str(section.body))
        assert str(section.body).count('<figure class="sample">') == 2

    def test_a_folder_with_other_json_is_no_folder_of_samples(self, tmp_path):
        (tmp_path / "a.json").write_text("{}")
        (tmp_path / "b.json").write_text("{")
        with pytest.raises(UsageError, match="holds nothing to report on"):
            assemble.found(tmp_path)


@pytest.mark.parametrize(("share", "early"), [(0.02, True), (0.29, True), (0.31, False), (1.0, False)])
def test_a_prompt_that_is_short_has_its_label_behind_it(share, early):
    made = str(tracks.stack([], Axis("seconds", 0.0, 10.0), shaded=10 * share))
    assert ('class="given early"' in made, ">\u2190 prompt<" in made) == (early, early)
    assert (">prompt<" in made) is not early
