"""Prompts: how one is read, how much of it is given, where what is new begins, and text that is shown while drawn."""

import hashlib
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import mido
import numpy as np
import pytest
import sentencepiece
import soundfile
import soxr
import symusic
from conftest import quiet, shortcut
from hypothesis import given as given_by
from hypothesis import settings
from hypothesis import strategies as st

from shortcut_cli.config.schema import SampleConfig
from shortcut_cli.data.documents import Source
from shortcut_cli.demo import material
from shortcut_cli.errors import CheckFailed, Rejected, UsageError
from shortcut_cli.events import Progress, Sampled
from shortcut_cli.inference import prompts, runs
from shortcut_cli.inference.prompts import Given, Prompt, found
from shortcut_cli.stages import sampling
from shortcut_cli.stages.sampling import sample
from shortcut_cli.tokenizers import audio
from shortcut_cli.tokenizers.audio import AudioOptions, AudioTokenizer
from shortcut_cli.tokenizers.midi import MidiOptions, MidiTokenizer
from shortcut_cli.tokenizers.text import TextOptions, TextTokenizer

# What is meant


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a file and a folder whose names could be texts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spring").write_text("a file")
    (tmp_path / "summer").mkdir()
    os.mkfifo(tmp_path / "autumn")
    (tmp_path / "winter").symlink_to("nowhere")
    return tmp_path


@pytest.mark.parametrize(
    "said", ["Once upon a time", "Spring", "a\nb", "x" * 5000, "the end.", "--prompt", "caf\u00e9"]
)
def test_what_is_no_file_and_looks_like_none_is_a_text(place, said):
    assert found(Given(said), TextTokenizer) == Prompt(None, said)
    with pytest.raises(UsageError, match=r"does not exist$"):
        found(Given(said), MidiTokenizer)


@pytest.mark.parametrize(
    "said", ["summer", "autumn", "winter", "either/or", "./x", "my.txt", "my.TXT", "a b.md", "x.jsonl.gz", "."]
)
def test_what_could_be_a_path_and_a_text_is_refused_with_both_readings(place, said):
    with pytest.raises(UsageError, match="looks too much like a path to be a text") as raised:
        found(Given(said), TextTokenizer)
    assert raised.value.message.startswith(f"prompt {said} ")
    assert "printf %s TEXT | shortcut sample --prompt -" in raised.value.hint


def test_a_file_is_meant_whatever_its_name_looks_like(place):
    for kind in (TextTokenizer, MidiTokenizer, AudioTokenizer):
        assert found(Given("spring"), kind).path.name == "spring"
    assert found(Given(), TextTokenizer) is None
    assert found(Given("spring"), TextTokenizer).seam is None
    assert found(Given("spring"), AudioTokenizer).seam == {
        "prompt": "as recorded",
        "crossfade": "equal power",
        "crossfade_s": 0.03,
    }
    assert found(Given("spring", only_new=True), AudioTokenizer).seam is None


def test_standard_input_is_read_for_text_alone():
    def read():
        return "\u00e9\n".encode()

    assert found(Given("-", read, tokens=2, only_new=True), TextTokenizer) == Prompt(
        None, "\u00e9\n", {"tokens": 2}, True
    )
    for kind in (MidiTokenizer, AudioTokenizer):
        with pytest.raises(UsageError, match="only text is read from it") as raised:
            found(Given("-", lambda: 1 / 0), kind)
        assert raised.value.hint == f"--prompt FILE{kind.extension}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "standard input is empty"),
        (b"ab\xff", "standard input is not UTF-8: byte 0xff at offset 2"),
        (b"a" * (prompts.MOST_BYTES + 1), "standard input has over 1,048,576 bytes"),
    ],
)
def test_input_that_is_no_text_is_refused(content, reason):
    with pytest.raises(UsageError, match=reason):
        found(Given("-", lambda: content), TextTokenizer)


@pytest.mark.parametrize("said", ["spring", "the cat", "-"])
def test_the_seconds_of_a_text_are_refused_before_it_is_read(place, said):
    with pytest.raises(UsageError, match="a text has no seconds") as raised:
        found(Given(said, lambda: 1 / 0, seconds=1.0), TextTokenizer)
    assert raised.value.hint == "--prompt-tokens N"


def test_an_argument_that_is_no_text_is_refused():
    with pytest.raises(UsageError, match="--prompt is empty"):
        found(Given(""), TextTokenizer)
    with pytest.raises(UsageError, match="--prompt is not UTF-8: byte 0xe9 at offset 3"):
        found(Given("caf\udce9"), TextTokenizer)
    with pytest.raises(UsageError) as raised:
        found(Given("a/" * 9000), TextTokenizer)
    assert len(raised.value.message) < 400


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 3}, "--prompt-tokens is given without --prompt"),
        ({"seconds": 3.0}, "--prompt-seconds is given without --prompt"),
        ({"only_new": True}, "--only-new is given without --prompt"),
        ({"prompt": "x", "tokens": 3, "seconds": 1.0}, "both say how much"),
        *(
            ({"prompt": "x", "seconds": bad}, "is not above 0, or not finite")
            for bad in (0.0, -1.0, math.inf, math.nan)
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(UsageError, match=words):
        Given(**options)


# How much of it is given


class Frames(SimpleNamespace):
    """A tokenizer of frames of three ids, two of which are a second."""

    extension, suffixes = ".frames", (".frames",)

    def prompt(self, path, limit=None):  # noqa: ARG002
        return np.frombuffer(path.read_bytes(), np.uint8).astype(np.int64)

    def whole(self, count):
        return count // 3 * 3

    def first(self, ids, seconds):
        if seconds > len(ids) / 6:
            raise Rejected("has only that")
        return int(seconds * 2) * 3


def test_as_much_is_given_as_was_asked_for(tmp_path):
    path = tmp_path / "x.frames"
    path.write_bytes(bytes(range(12)))

    def ids(**limit):
        return Prompt(path, None, limit).ids(Frames()).tolist()

    assert ids() == [*range(12)]
    assert ids(tokens=9) == [*range(9)]
    assert ids(tokens=12) == ids(seconds=2.0) == [*range(12)]
    assert ids(seconds=1.7) == [*range(9)]
    for count, hint in ((4, 3), (11, 9), (2, 3)):
        with pytest.raises(UsageError, match=f"^{count} tokens of prompt .* end within a frame") as raised:
            ids(tokens=count)
        assert raised.value.hint == f"--prompt-tokens {hint}"
    with pytest.raises(UsageError, match="has only 12 tokens") as raised:
        ids(tokens=15)
    assert raised.value.hint == "--prompt-tokens 12, or fewer"
    with pytest.raises(UsageError, match=r"x.frames can't be used: has only that"):
        ids(seconds=2.5)
    with pytest.raises(UsageError, match=r"can't be used: has no whole token in its first 0\.1 s"):
        ids(seconds=0.1)


@pytest.mark.parametrize(("name", "hint"), [("a.mid", "this run reads .txt, "), ("a.txt", ""), ("A.TXT", "")])
def test_a_prompt_of_another_domain_comes_with_the_suffixes_of_this_one(tmp_path, name, hint):
    tokenizer = TextTokenizer(TextOptions(name="text", algorithm="chars", alphabet="ab"))
    (tmp_path / name).write_bytes(b"\xff")
    with pytest.raises(UsageError, match="can't be used: is not UTF-8") as refused:
        Prompt(tmp_path / name, None).ids(tokenizer)
    assert refused.value.hint.startswith(hint)
    assert bool(refused.value.hint) == bool(hint)


def test_a_text_has_tokens_and_no_seconds(tmp_path):
    tokenizer = TextTokenizer(TextOptions(name="text", algorithm="chars", alphabet="abc"))
    assert Prompt(None, "abcab", {"tokens": 4}).ids(tokenizer).tolist() == [0, 1, 2, 0]
    with pytest.raises(UsageError, match="the prompt can't be used: has no seconds, only tokens"):
        Prompt(None, "abcab", {"seconds": 1.0}).ids(tokenizer)
    with pytest.raises(UsageError, match="the prompt can't be used: has the character 'x' at byte 2"):
        Prompt(None, "abx").ids(tokenizer)


# Where what is new begins: text


def trained(tmp_path, **options):
    """A SentencePiece model of a few words, with pieces for single bytes."""
    lines = ["the cat walks on two  mats", " the dog sleeps", "a bird sings again and again", "cats walk"] * 20
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"),
        model_prefix=str(tmp_path / "m"),
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return (tmp_path / "m.model").read_bytes()


SPACES = [
    {},  # a space is added before the first word, and taken away again
    {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    {"model_type": "bpe", "add_dummy_prefix": True, "remove_extra_whitespaces": False},
]


@pytest.fixture(scope="module", params=range(len(SPACES)))
def pieces(request, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("pieces"), **SPACES[request.param])


def processor(model):
    made = sentencepiece.SentencePieceProcessor()
    made.LoadFromSerializedProto(model)
    return made


@pytest.mark.parametrize("count", range(14))
@pytest.mark.parametrize("only_new", [False, True])
def test_the_new_part_of_a_text_begins_with_the_first_character_that_the_prompt_alone_does_not_give(
    tmp_path, pieces, count, only_new
):
    """A character of four bytes, each a piece of its own, can be begun by the prompt; it is new then."""
    tokenizer, library = TextTokenizer(TextOptions(name="text"), pieces), processor(pieces)
    words = "the cat \U0001f600 walks \u00e9 again"
    ids = library.encode(words)
    written = tokenizer.decode_after([*ids, tokenizer.eos, 5], tmp_path / "x.txt", count, only_new=only_new)
    whole, old = library.decode(ids), library.decode(ids[:count])
    place = next((n for n in range(len(old)) if whole[n] != old[n]), len(old))
    assert place == len(old.rstrip("\ufffd"))
    text = (tmp_path / "x.txt").read_bytes()
    assert text.decode() == (whole[place:] if only_new else whole)
    before, zero = {"byte": len(whole[:place].encode()), "character": place}, {"byte": 0, "character": 0}
    assert (written.begins, written.left_out) == ((zero, before) if only_new else (before, zero))
    assert written.units == {"byte": len(text)}


# Text that is shown while it is drawn


@settings(max_examples=150, deadline=None)
@given_by(data=st.data())
def test_what_is_shown_of_ids_is_never_changed_and_in_the_end_all(pieces, data):
    """Any ids: bytes that are no character, or only part of one, spaces at the start, whole words."""
    tokenizer, library = TextTokenizer(TextOptions(name="text"), pieces), processor(pieces)
    byte = {value: library.piece_to_id(f"<0x{value:02X}>") for value in range(256)}
    some = st.sampled_from(
        [byte[value] for value in (0x20, 0x41, 0x80, 0xBF, 0xC3, 0xA9, 0xE2, 0x96, 0x81, 0xF0, 0x9F)]
    )
    word = st.sampled_from(range(3, library.vocab_size()))
    character = st.sampled_from("\u00e9\u2581\ufffd\U0001f600 ").map(lambda c: [byte[b] for b in c.encode()])
    parts = data.draw(st.lists(st.one_of(some.map(lambda i: [i]), word.map(lambda i: [i]), character), max_size=30))
    ids = [i for part in parts for i in part]
    stream, shown = tokenizer.stream(), ""
    for number, token in enumerate(ids):
        shown += stream.push(token)
        now = library.decode(ids[: number + 1])
        assert now.startswith(shown)
        assert len(now) - len(shown) <= 3  # no more is held back than bytes that may become a character
        if not library.is_byte(token):
            assert shown == now
    assert shown + stream.end() == library.decode(ids)


def test_the_window_that_is_decoded_for_the_next_id_stays_short(pieces):
    tokenizer, library = TextTokenizer(TextOptions(name="text"), pieces), processor(pieces)
    stream, sizes = tokenizer.stream(), []
    for token in library.encode("the cat \u4e00\u4e8c walks \U0001f600") * 20:
        stream.push(token)
        sizes.append(len(stream.window))
    assert max(sizes) <= 8


def test_characters_of_an_alphabet_are_shown_one_by_one():
    stream = TextTokenizer(TextOptions(name="text", algorithm="chars", alphabet=" ab\u00e9")).stream()
    assert [stream.push(i) for i in (3, 0, 1, 0)] == ["\u00e9", " ", "a", " "]
    assert stream.end() == ""


# Where what is new begins: MIDI


def score(path):
    """A quarter note has 480 ticks. 3/4 at 120 bpm, at beat 4 240 bpm, at beat 6 4/4; a note at every half beat up to
    beat 12, one from beat 2 to 10, and a pedal from 1 to 9.
    """
    events = [(0, mido.MetaMessage("time_signature", numerator=3, denominator=4))]
    events += [(0, mido.MetaMessage("set_tempo", tempo=500_000)), (4, mido.MetaMessage("set_tempo", tempo=250_000))]
    events += [(6, mido.MetaMessage("time_signature", numerator=4, denominator=4))]
    events += [(beat, mido.Message("control_change", control=64, value=value)) for beat, value in ((1, 127), (9, 0))]
    for start, end, pitch in [(n / 2, n / 2 + 0.5, 60 + n) for n in range(24)] + [(2, 10, 40)]:
        events += [(end, mido.Message("note_off", note=pitch)), (start, mido.Message("note_on", note=pitch))]
    events.sort(key=lambda event: (event[0], event[1].type == "note_on"))
    track, now = mido.MidiTrack(), 0
    for beat, message in events:
        track.append(message.copy(time=round((beat - now) * 480)))
        now = beat
    mido.MidiFile(ticks_per_beat=480, tracks=[track]).save(path)
    return path


def notes_in(path):
    found = symusic.Score(path)
    per = found.ticks_per_quarter
    return sorted((n.time / per, n.duration / per, n.pitch) for track in found.tracks for n in track.notes)


SCHEMES = [(scheme, programs) for scheme in ("REMI", "TSD", "MIDILike") for programs in (False, True)]
BEGIN_NOTES = ("Pitch", "NoteOn")


@pytest.mark.parametrize(("scheme", "programs"), SCHEMES)
class TestMidi:
    def ids(self, tmp_path, scheme, programs):
        tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs))
        ids = tokenizer.prompt(score(tmp_path / "a.mid")).tolist()
        words = [tokenizer.grammar.spelled[i][0] for i in ids]
        return tokenizer, ids, [n for n, word in enumerate(words) if word.partition("_")[0] in BEGIN_NOTES]

    def test_the_next_note_would_begin_where_it_does(self, tmp_path, scheme, programs):
        """At each note of the file, before it, and between its own tokens."""
        tokenizer, ids, begin = self.ids(tmp_path, scheme, programs)
        onsets = [start for start, *_ in notes_in(tmp_path / "a.mid")]
        assert len(begin) == len(onsets) == 25
        for number, (token, onset) in enumerate(zip(begin, onsets, strict=True)):
            for count in (token, token + 1):
                written = tokenizer.decode_after(ids, tmp_path / f"{number}.mid", count)
                assert written.begins["beat"] == onset
                assert written.begins["second"] == pytest.approx(min(onset, 4) * 0.5 + max(onset - 4, 0) * 0.25)
                assert written.left_out == {"beat": 0, "second": 0}
        tokenizer.decode(ids, tmp_path / "whole.mid")
        assert (tmp_path / "24.mid").read_bytes() == (tmp_path / "whole.mid").read_bytes()

    def test_the_new_part_alone_begins_at_its_barline_with_the_tempo_and_meter_that_hold_there(
        self, tmp_path, scheme, programs
    ):
        tokenizer, ids, begin = self.ids(tmp_path, scheme, programs)
        place = begin[next(n for n, note in enumerate(notes_in(tmp_path / "a.mid")) if note[0] == 7.5)]
        written = tokenizer.decode_after(ids, tmp_path / "b.mid", place, only_new=True)
        assert written.left_out == {"beat": 6, "second": 2.5}
        assert written.begins == {"beat": 1.5, "second": 0.375}
        assert notes_in(tmp_path / "b.mid") == [(n / 2 - 6, 0.5, 60 + n) for n in range(15, 24)]
        assert (written.units["note"], written.units["beat"], written.units["second"]) == (9, 6, 1.5)
        found = symusic.Score(tmp_path / "b.mid")
        per = found.ticks_per_quarter
        assert [(one.time, round(one.qpm)) for one in found.tempos] == [(0, 240)]
        assert [(one.time, one.numerator, one.denominator) for one in found.time_signatures] == [(0, 4, 4)]
        pedals = [(one.time / per, one.duration / per) for track in found.tracks for one in track.pedals]
        assert pedals == [(1.5, 1.5)]

    def test_the_first_seconds_have_what_begins_in_them(self, tmp_path, scheme, programs):
        tokenizer, ids, begin = self.ids(tmp_path, scheme, programs)
        for seconds in (0.01, 0.25, 0.26, 2.0, 2.125, 3.0, 3.99):
            beat = min(seconds, 2) / 0.5 + max(seconds - 2, 0) / 0.25
            count = tokenizer.first(np.array(ids), seconds)
            assert sum(token < count for token in begin) == sum(note[0] < beat for note in notes_in(tmp_path / "a.mid"))
        assert tokenizer.first(np.array(ids), 4.0) == len(ids)
        with pytest.raises(Rejected, match=r"^has only 4\.000 s$"):
            tokenizer.first(np.array(ids), 4.01)

    def test_nothing_new_is_a_file_without_notes(self, tmp_path, scheme, programs):
        tokenizer, ids, _ = self.ids(tmp_path, scheme, programs)
        written = tokenizer.decode_after([*ids, tokenizer.eos], tmp_path / "b.mid", len(ids), only_new=True)
        assert written.units["note"] == 0
        assert mido.MidiFile(tmp_path / "b.mid").length >= 0
        assert notes_in(tmp_path / "b.mid") == []


@pytest.mark.parametrize("only_new", [False, True])
def test_a_sampled_note_that_goes_back_within_its_bar_is_new(tmp_path, only_new):
    """It begins before the last note of the prompt, and is neither lost nor part of the prompt."""
    tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme="REMI"))
    ids = tokenizer.prompt(score(tmp_path / "a.mid")).tolist()
    ends = [n + 1 for n, i in enumerate(ids) if tokenizer.grammar.spelled[i][0].startswith("Duration")]
    count = ends[16]  # the note at beat 7.5 is the prompt's last
    back = [int(tokenizer.base[word]) for word in ("Position_0", "Pitch_90", "Velocity_63", "Duration_1.0.12")]
    written = tokenizer.decode_after([*ids[:count], *back, tokenizer.eos], tmp_path / "b.mid", count, only_new=only_new)
    notes = notes_in(tmp_path / "b.mid")
    assert [one for one in notes if one[2] == 90] == [(0.0 if only_new else 6.0, 1.0, 90)]
    assert len(notes) == (1 if only_new else 18)
    assert written.left_out["beat"] == (6 if only_new else 0)
    assert written.begins["beat"] == (0 if only_new else 6)


def test_ids_of_a_bpe_can_be_cut_within_a_note(tmp_path):
    folder = tmp_path / "pieces"
    material.write_midi(folder, pieces=2, seed=3)
    plain = MidiTokenizer(MidiOptions(name="midi"))
    tokenizer = MidiTokenizer(MidiOptions(name="midi", bpe=1100))
    files = sorted(folder.glob("*.mid"))
    sources = [Source(path, path.name, "", tmp_path / f"{path.name}.ids", "") for path in files]
    tokenizer.fit(sources, lambda document: [("train", document.size)])
    base, ids = plain.prompt(files[0]).tolist(), tokenizer.prompt(files[0]).tolist()
    lengths = np.cumsum([len(tokenizer.grammar.spelled[i]) for i in ids])
    assert lengths[-1] == len(base) > len(ids)
    for count in range(0, len(ids), max(1, len(ids) // 12)):
        expected = plain.decode_after(base, tmp_path / "a.mid", int(lengths[count - 1]) if count else 0)
        assert tokenizer.decode_after(ids, tmp_path / "b.mid", count).begins == expected.begins


# Where what is new begins: sound


def sound(path, seconds, rate_hz=24_000, channels=1, seed=0):
    """A voice-like sound of 16 bits at its full scale, and its samples as they are in the file."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    wave = np.sin(2 * np.pi * 220 * t) * (0.6 + 0.4 * np.sin(2 * np.pi * 3 * t))
    wave = wave[:, None] + np.random.default_rng(seed).normal(0, 0.01, (len(t), channels))
    pcm = np.rint(np.clip(wave, -1, 1) * 32767).astype(np.int16)
    pcm[:2] = [[-32768], [32767]]
    soundfile.write(path, pcm, rate_hz, subtype="PCM_16")
    return pcm[:, 0] if channels == 1 else pcm


def pcm_of(path):
    return soundfile.read(path, dtype="int16")[0]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("length", [1000, 700, 12, 0])
@pytest.mark.parametrize("block", [64, 333, 5000])
def test_a_recording_and_its_rendering_are_joined_as_a_plain_loop_does(channels, length, block):
    """In blocks of any size, with a recording that ends before the prompt does."""
    generator = np.random.default_rng(channels)
    shape = (1500,) if channels == 1 else (1500, channels)
    recorded, rendered = generator.integers(-32768, 32768, shape) / 32768, generator.normal(0, 0.4, shape)
    recorded, rendered = recorded.astype(np.float32)[:length], rendered.astype(np.float32)
    end, fade = 900, 72

    def blocks(samples, size):
        return (samples[first : first + size] for first in range(0, len(samples), size))

    made = np.concatenate([*audio.joined(lambda: blocks(recorded, 97), blocks(rendered, block), end, fade)])
    until = min(end, length)
    width = min(fade, until)
    for place in range(1500):
        if place < until - width:
            expected = recorded[place]
        elif place < until:
            angle = (place - (until - width) + 0.5) / width * math.pi / 2
            expected = math.cos(angle) * np.float64(recorded[place]) + math.sin(angle) * np.float64(rendered[place])
        else:
            expected = rendered[place]
        assert np.abs(made[place] - np.clip(np.float64(expected) * 32768, -32768, 32767)).max() <= 0.5 + 1e-3, place
    assert made.dtype == np.int16


@pytest.mark.parametrize("books", [1, 3])
def test_a_recording_stays_as_it_is_and_what_follows_is_the_codecs(tmp_path, books):
    tokenizer = AudioTokenizer(AudioOptions(name="audio", weights="mini", codebooks=books))
    pcm = sound(tmp_path / "a.wav", 0.5)
    ids = tokenizer.prompt(tmp_path / "a.wav").tolist()
    count, new = 30 * books, [*ids, *ids[: 10 * books]]
    ids = ids[:count] + new
    tokenizer.decode([*ids, tokenizer.eos], tmp_path / "coded.wav")
    coded = pcm_of(tmp_path / "coded.wav")
    written = tokenizer.decode_after([*ids, tokenizer.eos], tmp_path / "b.wav", count, recorded=tmp_path / "a.wav")
    assert written.begins == {"second": 30 * 320 / 24_000}
    assert written.left_out == {"second": 0}
    assert written.units == {"second": len(coded) / 24_000}
    made = pcm_of(tmp_path / "b.wav")
    assert made[: 9600 - 720].tolist() == pcm[: 9600 - 720].tolist()  # 30 frames, and 30 ms before their end
    assert np.abs(made[9600:].astype(int) - coded[9600:]).max() <= 1  # one scale of 16 bits is 32,767, one 32,768
    assert len(made) == len(coded)
    # The codec's alone, as earlier versions wrote it; and what is new alone.
    tokenizer.decode_after(ids, tmp_path / "c.wav", count)
    assert (tmp_path / "c.wav").read_bytes() == (tmp_path / "coded.wav").read_bytes()
    written = tokenizer.decode_after(ids, tmp_path / "d.wav", count, only_new=True)
    assert pcm_of(tmp_path / "d.wav").tolist() == coded[9600:].tolist()
    assert (written.begins, written.left_out) == ({"second": 0}, {"second": 0.4})


def test_a_recording_of_another_rate_and_more_channels_is_what_the_tokenizer_reads(tmp_path):
    tokenizer = AudioTokenizer(AudioOptions(name="audio", weights="mini"))
    pcm = sound(tmp_path / "a.wav", 1.0, rate_hz=44_100, channels=2)
    ids = tokenizer.prompt(tmp_path / "a.wav").tolist()
    tokenizer.decode_after([*ids, *ids[:9]], tmp_path / "b.wav", len(ids), recorded=tmp_path / "a.wav")
    expected = soxr.resample((pcm / 32768).astype(np.float32).mean(1), 44_100, 24_000)
    kept = 24_000 - 720
    assert np.abs(pcm_of(tmp_path / "b.wav")[:kept] - (expected[:kept] * 32768).clip(-32768, 32767)).max() < 1.5


def test_whole_frames_are_given_and_those_within_the_first_seconds(tmp_path):
    tokenizer = AudioTokenizer(AudioOptions(name="audio", weights="mini", codebooks=4))
    assert [tokenizer.whole(count) for count in (0, 3, 4, 5, 8, 11)] == [0, 0, 4, 4, 8, 8]
    ids = np.zeros(4 * 75)
    for seconds, frames in ((0.0133, 0), (0.01334, 1), (0.5, 37), (0.52, 39), (1.0, 75)):
        assert tokenizer.first(ids, seconds) == 4 * frames
    with pytest.raises(Rejected, match=r"^has only 1\.000 s$"):
        tokenizer.first(ids, 1.001)


def test_segments_have_a_level_before_their_frames():
    """EnCodec at 48 kHz: segments of 150 frames, each after its level, begin every 47,520 samples."""
    tokenizer = AudioTokenizer(AudioOptions(name="audio", weights="encodec_48khz", codebooks=2))
    stride = 301
    sizes = [0, *(segment * stride + 1 + 2 * frame for segment in range(2) for frame in range(1, 151))]
    whole = {size for size in sizes if size}
    for count in range(2 * stride + 1):
        assert tokenizer.whole(count) == max((size for size in whole if size <= count), default=0)
    ids = np.zeros(2 * stride)
    for seconds in (0.001, 0.00667, 0.5, 0.99, 1.0, 1.3, 1.98):
        ends = [
            (segment * 47_520 + frame * 320, segment * stride + 1 + 2 * frame)
            for segment in range(2)
            for frame in range(1, 151)
        ]
        before = []
        for end, size in ends:
            if end > seconds * 48_000:
                break
            before.append(size)
        assert tokenizer.first(ids, seconds) == (before[-1] if before else 0)


# Samples


@pytest.fixture
def run(text_run):
    return runs.open_run(text_run / "gpt" / "run.pt", "cpu")


SAMPLER = SampleConfig(n=2, tokens=30, seed=3, temperature=1.1)


def sidecar(path):
    return json.loads(sampling.sidecar_path(path).read_text())


def written(run, folder, prompt, config=SAMPLER, **options):
    """The texts of the samples that continue a prompt, and their .json files."""
    paths = sample(run, folder, config, prompt=prompt, device="cpu", report=options.pop("report", quiet), **options)
    return [path.read_text() for path in paths], [sidecar(path) for path in paths]


def test_a_text_its_file_and_its_first_tokens_are_continued_alike(run, tmp_path):
    (tmp_path / "a.txt").write_text("the cat walks")
    by_file, told = written(run, tmp_path / "a", Prompt(tmp_path / "a.txt"))
    assert all(text.startswith("the cat walks") and len(text) > 13 for text in by_file)
    for number, prompt in enumerate(
        (Prompt(None, "the cat walks"), Prompt(None, "the cat walks again", {"tokens": 13}))
    ):
        texts, told = written(run, tmp_path / str(number), prompt)
        assert texts == by_file
        new, said = written(run, tmp_path / f"{number}-new", Prompt(None, prompt.text, prompt.limit, True))
        assert new == [text[13:] for text in by_file]
        for content, whole in zip(said, told, strict=True):
            digest = hashlib.sha256(prompt.text.encode()).hexdigest()
            for one in (content, whole):
                assert (one["prompt"], one["prompt_text"], one["prompt_sha256"]) == (None, prompt.text, digest)
                assert (one["prompt_tokens"], one["prompt_limit"], one["seam"]) == (13, prompt.limit or None, None)
            before, zero = (dict.fromkeys(("token", "byte", "character"), n) for n in (13, 0))
            assert (whole["only_new"], whole["new_begins"], whole["left_out"]) == (False, before, zero)
            assert (content["only_new"], content["new_begins"], content["left_out"]) == (True, zero, before)


def test_what_is_shown_while_it_is_drawn_is_the_file(run, tmp_path):
    for number, prompt in enumerate((None, Prompt(None, "the cat"), Prompt(None, "the cat", only_new=True))):
        events = []
        config = SAMPLER.model_copy(update={"n": 1})
        (text,), _ = written(run, tmp_path / str(number), prompt, config, report=events.append, stream=True)
        parts = [event.text for event in events if isinstance(event, Sampled)]
        assert "".join(parts) == text
        assert len(parts) > 10  # bit by bit
        assert not [event for event in events if isinstance(event, Progress)]
        (again,), _ = written(run, tmp_path / f"{number}-quiet", prompt, config)
        assert again == text


def test_one_of_several_rows_is_shown(run, tmp_path):
    texts, _ = written(run, tmp_path / "a", None)
    for number, text in enumerate(texts):
        events = []
        written(run, tmp_path / f"{number}", None, only=number, stream=True, report=events.append)
        assert "".join(event.text for event in events if isinstance(event, Sampled)) == text


def test_part_of_a_character_at_the_end_of_a_prompt_is_not_shown_as_new(pieces):
    """What is hidden is what the prompt gives alone, unless the new part completes its last character."""
    tokenizer, library = TextTokenizer(TextOptions(name="text"), pieces), processor(pieces)
    ids = library.encode("cat \U0001f600\u00e9 dog")
    for count in range(len(ids) + 1):
        events = []
        shown = sampling._Shown(tokenizer, ids[:count], Prompt(None, "x", only_new=True), events.append)
        follow = shown.follow(1, tokenizer.eos)
        for token in [*ids[count:], tokenizer.eos]:
            follow(0, 7)
            follow(1, token)
        shown.end()
        place = len(library.decode(ids[:count]).rstrip("\ufffd"))
        assert "".join(event.text for event in events) == library.decode(ids)[place:]


def test_a_sample_is_recreated_with_all_that_was_given(text_run, tmp_path):
    """By --like, from the .json alone; and a second call finds the samples only if all of it is the same."""
    (tmp_path / "a.txt").write_text("the dog sleeps again")
    base = ("sample", "--ckpt", text_run / "gpt" / "run.pt", "-n", 2, "--tokens", 20, "--json")
    flags = ("--prompt", "the cat", "--prompt-tokens", 5, "--only-new")
    for number, given in enumerate((flags, flags[:-1], ("--prompt", "a.txt", "--prompt-tokens", 5, "--only-new"))):
        out = ("--out", f"o{number}")
        done = shortcut(*base, *given, *out, cwd=tmp_path)
        path = tmp_path / json.loads(done.stdout)["samples"][1]
        assert sidecar(path)["prompt_limit"] == {"tokens": 5}
        (again,) = json.loads(shortcut("sample", "--like", sampling.sidecar_path(path), "--json", cwd=tmp_path).stdout)[
            "samples"
        ]
        assert (tmp_path / again).read_bytes() == path.read_bytes()
        assert sidecar(tmp_path / again) | {"checkpoint": "", "prompt": ""} == sidecar(path) | {
            "checkpoint": "",
            "prompt": "",
        }
        assert "already has these" in shortcut(*base, *given, *out, cwd=tmp_path).stderr
    for other in (flags[:2], flags[:-1], (*flags[:3], 4, flags[4]), ("--prompt", "the car", *flags[2:])):
        assert "exists already" in shortcut(*base, *other, "--out", "o0", cwd=tmp_path, check=2).stderr
    done = shortcut(
        "sample", "--like", "o0/sample-1-000.txt.json", "--only-new", "--prompt", "x", cwd=tmp_path, check=2
    )
    assert "leave out the other flags" in done.stderr


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt_text": "the car"}, "its prompt_text does not have its prompt_sha256"),
        ({"prompt_text": 3}, "is not the .json of a sample"),
        ({"prompt_text": "\ud800"}, "is not the .json of a sample"),
        ({"prompt_limit": {"tokens": 0}}, "prompt_limit"),
        ({"prompt_limit": {"tokens": "5"}}, "prompt_limit"),
        ({"prompt_limit": {"beats": 5}}, "prompt_limit"),
        ({"prompt_limit": [5]}, "is not the .json of a sample"),
        ({"only_new": 1}, "only_new"),
        ({"seam": "x"}, "seam"),
    ],
)
def test_a_json_whose_prompt_is_damaged_is_refused(run, tmp_path, changes, reason):
    config = SampleConfig(n=1, tokens=2, seed=3)
    (path,) = sample(run, tmp_path, config, prompt=Prompt(None, "the cat"), device="cpu", report=quiet)
    place = sampling.sidecar_path(path)
    assert sampling.like(place, None, None).prompt == Prompt(None, "the cat")
    place.write_text(json.dumps(sidecar(path) | changes))
    with pytest.raises(CheckFailed, match=reason):
        sampling.like(place, None, None)


def test_a_json_of_an_earlier_version_has_a_prompt_that_was_rendered(run, tmp_path):
    (tmp_path / "a.txt").write_text("the cat")
    config = SampleConfig(n=1, tokens=2, seed=3)
    (path,) = sample(run, tmp_path, config, prompt=Prompt(tmp_path / "a.txt"), device="cpu", report=quiet)
    place, added = sampling.sidecar_path(path), ("prompt_text", "prompt_limit", "only_new", "seam")
    place.write_text(json.dumps({key: value for key, value in sidecar(path).items() if key not in added}))
    assert sampling.like(place, None, None).prompt == Prompt(tmp_path / "." / "a.txt")


def test_text_is_read_from_stdin_and_printed_byte_for_byte(text_run, tmp_path):
    line = [sys.executable, "-m", "shortcut_cli", "sample", "--ckpt", str(text_run / "gpt" / "run.pt"), "--prompt", "-"]
    line += ["--stream", "--tokens", "30", "--out", "o"]
    done = subprocess.run(line, cwd=tmp_path, input=b"the cat", capture_output=True, check=True, timeout=300)
    path = tmp_path / "o" / "sample-1-000.txt"
    assert done.stdout == path.read_bytes()
    assert done.stdout.startswith(b"the cat")
    assert done.stderr.decode().splitlines()[0] == "o/sample-1-000.txt"
    assert sidecar(path)["sampler"]["n"] == 1
    # The same again is there already, and is printed; nobody who reads it is no error.
    again = subprocess.run(line, cwd=tmp_path, input=b"the cat", capture_output=True, check=True, timeout=300)
    assert again.stdout == done.stdout


def test_a_reader_that_leaves_ends_the_stream_without_a_word(text_run, tmp_path):
    command = '"$@" | { exec <&-; cat /dev/zero | head -c 1 > /dev/null; sleep 3; }; exit ${PIPESTATUS[0]}'
    line = [sys.executable, "-m", "shortcut_cli", "sample", "--ckpt", str(text_run / "gpt" / "run.pt"), "--stream"]
    line += ["--prompt", "the cat", "--tokens", "30", "--out", "o"]
    done = subprocess.run(
        ["bash", "-c", command, "bash", *line], cwd=tmp_path, capture_output=True, check=False, timeout=300
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, b"", b"")
    assert not [*(tmp_path / "o").glob("*")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--json",), "--stream and --json both print on stdout"),
        (("-n", 2), "--stream prints one sample, not 2"),
        (("--prompt-seconds", 1, "--prompt", "the cat"), "has no seconds, only tokens"),
        (("--prompt-tokens", 8, "--prompt", "the cat"), "has only 7 tokens"),
        (("--prompt", "no.txt"), "does not exist, and looks too much like a path"),
        (("--prompt-seconds", 1, "--prompt", "-"), "--prompt-seconds is for sound and MIDI"),
    ],
)
def test_flags_that_do_not_go_together_are_one_panel(text_run, tmp_path, flags, words):
    base = ("sample", "--ckpt", text_run / "gpt" / "run.pt", "--stream", "--tokens", 5, "--out", "o")
    done = shortcut(*base, *flags, cwd=tmp_path, check=2)
    assert words in " ".join(done.stderr.replace("\u2502", " ").split())
    assert (done.stdout, done.stderr.count("\u256d")) == ("", 1)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("flags", [("--split", "val"), ("--shards", "nowhere")])
def test_attention_to_a_prompt_takes_no_split(text_run, tmp_path, flags):
    base = ("attention", "--ckpt", text_run / "shortcut" / "run.pt", "--prompt", "the cat", "--out", "o")
    assert "--prompt takes no --shards and no --split" in shortcut(*base, *flags, cwd=tmp_path, check=2).stderr


def test_attention_looks_at_a_text_or_the_first_tokens_of_a_file(text_run, tmp_path):
    base = ("attention", "--ckpt", text_run / "shortcut" / "run.pt", "--json")
    prompt = text_run / "texts" / "000.txt"
    text = prompt.read_text()[:9]
    found = [
        json.loads(shortcut(*base, *flags, "--out", f"o{number}", cwd=tmp_path).stdout)
        for number, flags in enumerate((("--prompt", text), ("--prompt", prompt, "--prompt-tokens", 9)))
    ]
    assert found[0]["tokens"] == found[1]["tokens"] == 9
    assert found[0]["nats_per_token"] == found[1]["nats_per_token"]
