"""MIDI: notes survive, legal streams stay legal, and broken files are refused with a reason."""

import gzip
import hashlib
import itertools
import json
import os
import subprocess
import sys

import mido
import numpy as np
import pytest
import symusic
from conftest import allowed
from pydantic import ValidationError

from shortcut_cli import composer
from shortcut_cli.errors import CheckFailed, Rejected, UsageError
from shortcut_cli.tokenizers import midi
from shortcut_cli.tokenizers.base import Source
from shortcut_cli.tokenizers.midi import MidiOptions, MidiTokenizer

SCHEMES = [(scheme, programs) for scheme in ("REMI", "TSD", "MIDILike") for programs in (False, True)]


def whole(document):
    return [("train", document.size)]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("midi")
    composer.write_midi(folder, pieces=6, seed=3)
    return sorted(folder.glob("*.mid"))


def source(tmp_path, path, variant=""):
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Source(path, path.name, digest, tmp_path / f"{path.name}{variant}.ids", variant)


def notes(path):
    score = symusic.Score(path)
    found = [(n.time / score.ticks_per_quarter, n.pitch) for track in score.tracks for n in track.notes]
    return sorted(found)


def file(path, *messages, tpq=480):
    track = mido.MidiTrack([*messages, mido.MetaMessage("end_of_track")])
    mido.MidiFile(ticks_per_beat=tpq, tracks=[track]).save(path)
    return path


@pytest.mark.parametrize(("scheme", "programs"), SCHEMES)
class TestEveryScheme:
    def test_notes_survive_the_round_trip(self, tmp_path, pieces, scheme, programs):
        tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs))
        ids = tokenizer.prompt(pieces[0])
        assert ((ids >= 0) & (ids < tokenizer.vocabulary)).all()
        assert tokenizer.end not in ids
        units = tokenizer.decode([*ids.tolist(), tokenizer.end, 1, 2], tmp_path / "out.mid")
        before, after = notes(pieces[0]), notes(tmp_path / "out.mid")
        assert units["note"] == len(before) == len(after)
        assert units["dropped"] == 0
        assert [pitch for _, pitch in before] == [pitch for _, pitch in after]
        # Eight positions a beat.
        assert max(abs(a[0] - b[0]) for a, b in zip(before, after, strict=True)) <= 1 / 8
        mido.MidiFile(tmp_path / "out.mid")

    def test_streams_under_the_mask_are_legal_and_decode(self, tmp_path, scheme, programs):
        tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs))
        generator = np.random.default_rng(0)
        for number in range(5):
            ids = []
            for _ in range(200):
                mask = allowed(tokenizer, ids).copy()
                assert mask.any()
                mask[tokenizer.end] = False
                ids.append(int(generator.choice(np.flatnonzero(mask))))
            kinds = [tokenizer.base[i].split("_")[0] for i in ids]
            graph = tokenizer.base.tokens_types_graph
            assert all(b in graph[a] for a, b in itertools.pairwise(kinds))
            assert tokenizer.decode(ids, tmp_path / f"{number}.mid")["dropped"] == 0
            mido.MidiFile(tmp_path / f"{number}.mid")

    @pytest.mark.parametrize("settings", [{}, {"tempos": False, "time_signatures": False}])
    def test_every_sample_is_a_file_with_a_note(self, tmp_path, scheme, programs, settings):
        tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs, **settings))
        generator = np.random.default_rng(3)
        for number in range(20):
            guide = tokenizer.guide()
            ids = []
            for left in range(guide.least + number // 2 * 3, 0, -1):
                token = int(generator.choice(np.flatnonzero(guide.allowed(left))))
                if token == tokenizer.end:
                    break
                ids.append(token)
                guide.push(token)
            units = tokenizer.decode(ids, tmp_path / f"{number}.mid")
            assert units["note"] > 0
            assert units["dropped"] == 0
            assert symusic.Score(tmp_path / f"{number}.mid").note_num() > 0
            assert any(message.type == "note_on" for message in mido.MidiFile(tmp_path / f"{number}.mid"))

    def test_the_end_comes_after_a_whole_note(self, pieces, scheme, programs):
        tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs))
        ids = tokenizer.prompt(pieces[0]).tolist()
        kinds = [tokenizer.base[i].split("_")[0] for i in ids]
        for place in range(len(ids) + 1):
            closed = place > 0 and kinds[place - 1] in ("Duration", "NoteOff", "DrumOff")
            assert allowed(tokenizer, ids[:place])[tokenizer.end] == closed

    def test_any_ids_decode(self, tmp_path, scheme, programs):
        tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs))
        generator = np.random.default_rng(1)
        for number in range(20):
            ids = generator.integers(0, tokenizer.vocabulary, generator.integers(0, 200)).tolist()
            assert tokenizer.decode(ids, tmp_path / f"{number}.mid")["dropped"] <= len(ids)
            symusic.Score(tmp_path / f"{number}.mid")
            mido.MidiFile(tmp_path / f"{number}.mid")

    def test_no_note_is_lost_at_the_edges(self, tmp_path, scheme, programs):
        tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs))
        messages = [
            mido.Message(kind, note=note, velocity=64, channel=channel, time=time)
            for channel in (0, 9)
            for note in (0, 127)
            for kind, time in (("note_on", 0), ("note_off", 240))
        ]
        tokenizer.decode(tokenizer.prompt(file(tmp_path / "a.mid", *messages)).tolist(), tmp_path / "b.mid")
        expected = [(0, 0), (0.5, 127), (1, 0), (1.5, 127)] if programs else [(0, 0), (0.5, 127)]
        assert notes(tmp_path / "b.mid") == expected


def test_what_is_no_velocity_is_not_taken_for_one(tmp_path):
    # MidiTok itself makes a velocity of -1 of this, which is a file that neither symusic nor mido reads.
    tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme="MIDILike", programs=True))
    tokens = ["Program_0", "NoteOn_60", "Program_-1", "TimeShift_1.0.8", "Program_0", "NoteOff_60"]
    units = tokenizer.decode([tokenizer.base[token] for token in tokens], tmp_path / "a.mid")
    assert units["dropped"] > 0
    symusic.Score(tmp_path / "a.mid")
    mido.MidiFile(tmp_path / "a.mid")


def test_units_are_counted(tmp_path, pieces):
    tokenizer = MidiTokenizer(MidiOptions(name="midi"))
    (document,) = tokenizer.survey(source(tmp_path, pieces[0]))
    assert document.units["note"] == len(notes(pieces[0]))
    assert document.units["second"] == pytest.approx(mido.MidiFile(pieces[0]).length, rel=0.1)
    (piece,) = tokenizer.encode(source(tmp_path, pieces[0]), whole, 1)
    assert np.concatenate(list(piece.ids)).tolist() == tokenizer.prompt(pieces[0]).tolist()


@pytest.mark.parametrize("damage", [lambda _: b"", lambda b: b[:-2], lambda b: bytes(len(b)), lambda b: b + b"ab"])
@pytest.mark.parametrize("ending", ["", ".json"])
def test_what_a_power_cut_left_of_a_staged_file_is_read_again(tmp_path, pieces, damage, ending):
    tokenizer, wanted = MidiTokenizer(MidiOptions(name="midi")), source(tmp_path, pieces[0])
    first = list(tokenizer.survey(wanted))
    torn = wanted.staged.with_name(wanted.staged.name + ending)
    before = wanted.staged.read_bytes()
    torn.write_bytes(damage(torn.read_bytes()))
    assert list(tokenizer.survey(wanted)) == first
    assert wanted.staged.read_bytes() == before


def test_midi_is_read_without_torch(pieces):
    code = (
        "import sys\nfrom pathlib import Path\nfrom shortcut_cli.tokenizers.midi import MidiOptions, MidiTokenizer\n"
        f"assert len(MidiTokenizer(MidiOptions(name='midi')).prompt(Path({str(pieces[0])!r})))\n"
        "assert 'torch' not in sys.modules\nimport miditok.pytorch_data\nassert 'torch' in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_cut_divides_tokens_and_notes(tmp_path, pieces):
    tokenizer = MidiTokenizer(MidiOptions(name="midi"))
    parts = list(tokenizer.encode(source(tmp_path, pieces[0]), lambda d: [("train", 100), ("val", d.size - 100)], 1))
    assert [part.split for part in parts] == ["train", "val"]
    ids = [np.concatenate(list(part.ids)).tolist() for part in parts]
    assert len(ids[0]) == 100
    assert ids[0] + ids[1] == tokenizer.prompt(pieces[0]).tolist()
    assert sum(part.units["note"] for part in parts) == len(notes(pieces[0]))


@pytest.mark.parametrize("variant", ["transpose=+3", "transpose=-2"])
def test_a_transposed_variant(tmp_path, pieces, variant):
    tokenizer = MidiTokenizer(MidiOptions(name="midi", transpose=[3, -2]))
    assert variant in tokenizer.variants
    (document,) = tokenizer.survey(source(tmp_path, pieces[0], variant))
    (piece,) = tokenizer.encode(source(tmp_path, pieces[0], variant), whole, 1)
    tokenizer.decode(np.concatenate(list(piece.ids)).tolist(), tmp_path / "t.mid")
    moved = int(variant.split("=")[1])
    assert [p for _, p in notes(tmp_path / "t.mid")] == [p + moved for _, p in notes(pieces[0])]
    assert document.sha256 != source(tmp_path, pieces[0]).sha256


def test_a_stretched_variant(tmp_path, pieces):
    tokenizer = MidiTokenizer(MidiOptions(name="midi", tempo_factors=[1.5]))
    (plain,) = tokenizer.survey(source(tmp_path, pieces[0]))
    (longer,) = tokenizer.survey(source(tmp_path, pieces[0], "tempo=1.5"))
    assert longer.units["beat"] == pytest.approx(1.5 * plain.units["beat"], rel=0.02)
    assert longer.units["note"] == plain.units["note"]


def test_a_transposition_out_of_range_is_refused(tmp_path, pieces):
    with pytest.raises(Rejected, match="out of range"):
        list(MidiTokenizer(MidiOptions(name="midi")).survey(source(tmp_path, pieces[0], "transpose=+90")))


def test_bpe_shortens_and_survives(tmp_path, pieces):
    options = MidiOptions(name="midi", bpe=600)
    models = []
    for _ in range(2):
        tokenizer = MidiTokenizer(options)
        assert tokenizer.needs_fit
        sources = [source(tmp_path, path) for path in pieces]
        for found in sources:
            list(tokenizer.survey(found))
        tokenizer.fit(sources, whole)
        models.append(tokenizer.trained)
    assert models[0] == models[1]
    assert tokenizer.vocabulary == 600
    plain = MidiTokenizer(MidiOptions(name="midi"))
    (piece,) = tokenizer.encode(sources[0], whole, 1)
    ids = np.concatenate(list(piece.ids)).tolist()
    assert len(ids) < 0.8 * len(plain.prompt(pieces[0]))
    assert tokenizer.decode(ids, tmp_path / "b.mid")["note"] == len(notes(pieces[0]))
    assert all(allowed(tokenizer, ids[:place])[ids[place]] for place in range(1, len(ids)))
    random = np.random.default_rng(2).integers(0, 600, 500).tolist()
    assert tokenizer.decode(random, tmp_path / "r.mid")["dropped"] > 0
    mido.MidiFile(tmp_path / "r.mid")
    tokenizer.save(tmp_path)
    assert MidiTokenizer.load(options, tmp_path).fingerprint == tokenizer.fingerprint


TRAIN = """
import sys
from pathlib import Path
from shortcut_cli.tokenizers.base import Source
from shortcut_cli.tokenizers.midi import MidiOptions, MidiTokenizer

tokenizer = MidiTokenizer(MidiOptions(name="midi", bpe=500))
sources = [Source(Path(p), p, str(n), Path(f"{sys.argv[1]}.{n}.ids")) for n, p in enumerate(sys.argv[2:])]
for source in sources:
    list(tokenizer.survey(source))
tokenizer.fit(sources, lambda document: [("train", document.size)])
print(tokenizer.fingerprint)
"""


def test_bpe_does_not_depend_on_threads_or_order_and_prints_nothing(tmp_path, pieces):
    paths = [str(path) for path in pieces]
    printed = []
    for threads, order in (("1", paths), ("4", paths[::-1])):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", TRAIN, str(tmp_path / threads), *order]
        printed.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert printed[0] == printed[1]
    assert len(printed[0]) == 65  # the fingerprint and its newline


def test_bpe_is_learned_from_the_training_split_alone(tmp_path, pieces):
    tokenizers = [MidiTokenizer(MidiOptions(name="midi", bpe=500)) for _ in range(2)]
    sources = [source(tmp_path, path) for path in pieces]
    held_out = sources[-1].sha256
    for found in sources:
        list(tokenizers[0].survey(found))
    tokenizers[0].fit(sources, lambda d: [("val" if d.sha256 == held_out else "train", d.size)])
    tokenizers[1].fit(sources[:-1], whole)
    assert tokenizers[0].trained == tokenizers[1].trained


def test_a_bpe_that_is_too_small(tmp_path):
    with pytest.raises(UsageError, match=r"tokenizer\.bpe 100"):
        MidiTokenizer(MidiOptions(name="midi", bpe=100)).fit([], whole)


def test_saved_and_loaded(tmp_path):
    tokenizer = MidiTokenizer(MidiOptions(name="midi"))
    tokenizer.save(tmp_path)
    assert MidiTokenizer.load(tokenizer.options, tmp_path).fingerprint == tokenizer.fingerprint
    with pytest.raises(CheckFailed, match="another configuration"):
        MidiTokenizer.load(MidiOptions(name="midi", velocities=8), tmp_path)
    with pytest.raises(CheckFailed, match="another configuration"):
        MidiTokenizer.load(MidiOptions(name="midi", bpe=600), tmp_path)
    again = (tmp_path / "tokenizer.json").read_bytes()
    tokenizer.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == again


@pytest.mark.parametrize(
    ("keep", "change"),
    [
        (False, {}),
        (False, {"config": 5}),
        (True, {"tokenization": "TSD"}),
        (True, {"_model": "no model"}),
        (True, {"_model": 5}),
    ],
)
def test_a_stranger_is_not_loaded(tmp_path, keep, change):
    MidiTokenizer(MidiOptions(name="midi")).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text()) if keep else {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | change))
    for bpe in (0, 600):
        with pytest.raises(CheckFailed):
            MidiTokenizer.load(MidiOptions(name="midi", bpe=bpe), tmp_path)


def test_fingerprints_follow_what_changes_ids():
    base = MidiTokenizer(MidiOptions(name="midi")).fingerprint
    assert MidiTokenizer(MidiOptions(name="midi", transpose=[1], tempo_factors=[0.9])).fingerprint == base
    assert MidiTokenizer(MidiOptions(name="midi", velocities=16)).fingerprint != base


@pytest.mark.parametrize(
    "keys", [{"transpose": [1, 1]}, {"transpose": [0]}, {"tempo_factors": [1.0]}, {"tempo_factors": [3.0]}]
)
def test_variants_that_are_none(keys):
    with pytest.raises(ValidationError, match=r"factors|semitones"):
        MidiOptions(name="midi", **keys)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"this is text", "not a MIDI file: it begins with"),
        (b"MThd\x00\x00\x00\x06\x00\x01", "can't be parsed|no notes"),
    ],
)
def test_broken_files_are_refused(tmp_path, content, reason):
    (tmp_path / "x.mid").write_bytes(content)
    with pytest.raises(Rejected, match=reason):
        MidiTokenizer(MidiOptions(name="midi")).prompt(tmp_path / "x.mid")


def test_no_notes_only_drums_and_years_of_silence(tmp_path):
    tokenizer = MidiTokenizer(MidiOptions(name="midi"))
    on, off = mido.Message("note_on", note=60, velocity=64), mido.Message("note_off", note=60, time=480)
    with pytest.raises(Rejected, match="no notes"):
        tokenizer.prompt(file(tmp_path / "a.mid", mido.Message("control_change", control=64, value=1)))
    drums = [message.copy(channel=9) for message in (on, off)]
    with pytest.raises(Rejected, match="only drums"):
        tokenizer.prompt(file(tmp_path / "b.mid", *drums))
    with pytest.raises(Rejected, match="claims to last"):
        tokenizer.prompt(file(tmp_path / "c.mid", on.copy(time=2**28 - 1), off, tpq=24))
    every = MidiTokenizer(MidiOptions(name="midi", programs=True))
    with pytest.raises(Rejected, match="only drums, which are not transposed"):
        list(every.survey(source(tmp_path, tmp_path / "b.mid", "transpose=+2")))


def test_what_is_too_large_is_refused(tmp_path, pieces, monkeypatch):
    tokenizer = MidiTokenizer(MidiOptions(name="midi"))
    monkeypatch.setattr(midi, "MOST_NOTES", 10)
    with pytest.raises(Rejected, match="more than 10"):
        tokenizer.prompt(pieces[0])
    (tmp_path / "x.mid.gz").write_bytes(gzip.compress(b"MThd" + bytes(midi.MOST_BYTES)))
    with pytest.raises(Rejected, match="larger than 64 MiB"):
        tokenizer.prompt(tmp_path / "x.mid.gz")


def test_gzip(tmp_path, pieces):
    (tmp_path / "x.mid.gz").write_bytes(gzip.compress(pieces[0].read_bytes()))
    tokenizer = MidiTokenizer(MidiOptions(name="midi"))
    assert tokenizer.prompt(tmp_path / "x.mid.gz").tolist() == tokenizer.prompt(pieces[0]).tolist()


@pytest.mark.parametrize(("scheme", "programs"), SCHEMES)
def test_an_excerpt_has_every_note_at_the_token_that_makes_it_whole(pieces, scheme, programs):
    tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs))
    ids = tokenizer.prompt(pieces[0])[:150]
    shown = tokenizer.excerpt(ids).notes
    score, _ = tokenizer._score(ids)
    expected = sorted((note.pitch, note.velocity) for track in score.tracks for note in track.notes)
    assert sorted((pitch, velocity) for _, _, pitch, velocity in shown.tolist()) == expected
    kinds, found = tokenizer.classes(ids)["type"].names, tokenizer.classes(ids)["type"].of
    for first, last, pitch, _ in shown.tolist():
        word = tokenizer.grammar.spelled[ids[first]][0]
        assert word.partition("_")[0] in midi.CLOSING_TYPES
        assert kinds[found[first]] == word.partition("_")[0]
        assert first <= last <= len(ids)
        if scheme == "MIDILike":
            assert word.endswith(f"_{pitch}")


def test_classes_are_types_and_joined_pieces_of_bpe(tmp_path, pieces):
    tokenizer = MidiTokenizer(MidiOptions(name="midi", bpe=600))
    tokenizer.fit([source(tmp_path, path) for path in pieces], whole)
    ids = np.concatenate([tokenizer.prompt(pieces[0]), [tokenizer.end]])
    classes = tokenizer.classes(ids)["type"]
    for token, number in zip(ids, classes.of, strict=True):
        words = tokenizer.grammar.spelled[token]
        expected = "joined" if len(words) > 1 else words[0].partition("_")[0]
        assert classes.names[number] == ("end" if token == tokenizer.end else expected)
    assert "joined" in {classes.names[number] for number in classes.of}
