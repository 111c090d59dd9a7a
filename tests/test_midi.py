"""MIDI: notes survive, constrained streams are legal, and broken files are refused with a reason."""

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

from shortcut_cli import files
from shortcut_cli.data.documents import Source
from shortcut_cli.demo import material
from shortcut_cli.errors import CheckFailed, Rejected, UsageError
from shortcut_cli.tokenizers import midi, midi_grammar, midi_reading, midi_scores
from shortcut_cli.tokenizers.midi import MidiOptions, MidiTokenizer

SCHEMES = [(scheme, programs) for scheme in ("REMI", "TSD", "MIDILike") for programs in (False, True)]


def whole(document):
    return [("train", document.size)]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("midi")
    material.write_midi(folder, pieces=6, seed=3)
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


def may_follow(tokenizer, ids):
    """Only the ids that MidiTok's table of types allows after those kept before them."""
    graph, kept = tokenizer.base.tokens_types_graph, []
    types = [[word.partition("_")[0] for word in words] for words in tokenizer.grammar.spelled]
    for i in ids:
        musical = types[i][0] not in ("PAD", "BOS", "EOS")
        if musical and (not kept or types[i][0] in graph[types[kept[-1]][-1]]):
            kept.append(i)
    return kept


@pytest.mark.parametrize(("scheme", "programs"), SCHEMES)
class TestEveryScheme:
    def test_notes_survive_the_round_trip(self, tmp_path, pieces, scheme, programs):
        tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs))
        ids = tokenizer.prompt(pieces[0])
        assert ((ids >= 0) & (ids < tokenizer.vocabulary)).all()
        assert tokenizer.eos not in ids
        units = tokenizer.decode([*ids.tolist(), tokenizer.eos, 1, 2], tmp_path / "out.mid")
        before, after = notes(pieces[0]), notes(tmp_path / "out.mid")
        assert units["note"] == len(before) == len(after)
        assert units["dropped"] == 0
        assert [pitch for _, pitch in before] == [pitch for _, pitch in after]
        # To the nearest of eight positions per beat.
        assert max(abs(a[0] - b[0]) for a, b in zip(before, after, strict=True)) <= 1 / 16
        mido.MidiFile(tmp_path / "out.mid")

    def test_constrained_streams_are_legal_and_decode(self, tmp_path, scheme, programs):
        tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs))
        generator = np.random.default_rng(0)
        for number in range(5):
            ids = []
            for _ in range(200):
                mask = allowed(tokenizer, ids).copy()
                assert mask.any()
                mask[tokenizer.eos] = False
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
            constraint = tokenizer.constraint()
            ids = []
            for left in range(constraint.needed + number // 2 * 3, 0, -1):
                token = int(generator.choice(np.flatnonzero(constraint.allowed(left))))
                if token == tokenizer.eos:
                    break
                ids.append(token)
                constraint.push(token)
            units = tokenizer.decode(ids, tmp_path / f"{number}.mid")
            assert units["note"] > 0
            assert units["dropped"] == 0
            assert symusic.Score(tmp_path / f"{number}.mid").note_num() > 0
            assert any(message.type == "note_on" for message in mido.MidiFile(tmp_path / f"{number}.mid"))

    def test_eos_comes_after_a_complete_note(self, pieces, scheme, programs):
        tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs))
        ids = tokenizer.prompt(pieces[0]).tolist()
        kinds = [tokenizer.base[i].split("_")[0] for i in ids]
        for place in range(len(ids) + 1):
            closed = place > 0 and kinds[place - 1] in ("Duration", "NoteOff", "DrumOff")
            assert allowed(tokenizer, ids[:place])[tokenizer.eos] == closed

    def test_any_ids_decode(self, tmp_path, scheme, programs):
        tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs))
        generator = np.random.default_rng(1)
        for number in range(20):
            ids = generator.integers(0, tokenizer.vocabulary, generator.integers(0, 200)).tolist()
            before = ids[: ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids
            kept = may_follow(tokenizer, before)
            assert tokenizer.decode(ids, tmp_path / f"{number}.mid")["dropped"] == len(before) - len(kept)
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


def test_a_token_of_another_type_is_not_taken_for_a_velocity(tmp_path):
    # MidiTok itself turns this into a velocity of -1, in a file that neither symusic nor mido can read.
    tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme="MIDILike", programs=True))
    tokens = ["Program_0", "NoteOn_60", "Program_-1", "TimeShift_1.0.12", "Program_0", "NoteOff_60"]
    units = tokenizer.decode([tokenizer.base[token] for token in tokens], tmp_path / "a.mid")
    assert units["dropped"] > 0
    symusic.Score(tmp_path / "a.mid")
    mido.MidiFile(tmp_path / "a.mid")


def test_units_are_counted(tmp_path, pieces):
    tokenizer = MidiTokenizer(MidiOptions(name="midi"))
    (document,) = tokenizer.scan(source(tmp_path, pieces[0]))
    assert document.units["note"] == len(notes(pieces[0]))
    now = last = 0
    for message in mido.MidiFile(pieces[0]):
        now += message.time
        last = now if message.type in ("note_on", "note_off") else last
    assert document.units["second"] == pytest.approx(last, rel=1e-5)  # symusic adds in float32
    (chunk,) = tokenizer.encode(source(tmp_path, pieces[0]), whole, 1)
    assert np.concatenate(list(chunk.ids)).tolist() == tokenizer.prompt(pieces[0]).tolist()


@pytest.mark.parametrize("damage", [lambda _: b"", lambda b: b[:-2], lambda b: bytes(len(b)), lambda b: b + b"ab"])
@pytest.mark.parametrize("ending", ["", ".json"])
def test_what_a_power_cut_left_of_a_staged_file_is_read_again(tmp_path, pieces, damage, ending):
    tokenizer, wanted = MidiTokenizer(MidiOptions(name="midi")), source(tmp_path, pieces[0])
    first = list(tokenizer.scan(wanted))
    torn = wanted.staged.with_name(wanted.staged.name + ending)
    before = wanted.staged.read_bytes()
    torn.write_bytes(damage(torn.read_bytes()))
    assert list(tokenizer.scan(wanted)) == first
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
    (document,) = tokenizer.scan(source(tmp_path, pieces[0], variant))
    (chunk,) = tokenizer.encode(source(tmp_path, pieces[0], variant), whole, 1)
    tokenizer.decode(np.concatenate(list(chunk.ids)).tolist(), tmp_path / "t.mid")
    moved = int(variant.split("=")[1])
    assert [p for _, p in notes(tmp_path / "t.mid")] == [p + moved for _, p in notes(pieces[0])]
    assert document.sha256 != source(tmp_path, pieces[0]).sha256


def test_a_stretched_variant(tmp_path, pieces):
    for tempos in (True, False):
        tokenizer = MidiTokenizer(MidiOptions(name="midi", tempos=tempos, tempo_factors=[1.5]))
        folder = tmp_path / str(tempos)
        folder.mkdir()
        (plain,) = tokenizer.scan(source(folder, pieces[0]))
        (longer,) = tokenizer.scan(source(folder, pieces[0], "tempo=1.5"))
        assert longer.units["second"] == pytest.approx(1.5 * plain.units["second"], rel=0.02)
        assert longer.units["beat"] == pytest.approx((1 if tempos else 1.5) * plain.units["beat"], rel=0.02)
        assert longer.units["note"] == plain.units["note"]


def test_a_transposition_out_of_range_is_refused(tmp_path, pieces):
    with pytest.raises(Rejected, match="out of range"):
        list(MidiTokenizer(MidiOptions(name="midi")).scan(source(tmp_path, pieces[0], "transpose=+90")))


def test_bpe_shortens_and_survives(tmp_path, pieces):
    options = MidiOptions(name="midi", bpe=1100)
    models = []
    for _ in range(2):
        tokenizer = MidiTokenizer(options)
        assert tokenizer.needs_fit
        sources = [source(tmp_path, path) for path in pieces]
        for found in sources:
            list(tokenizer.scan(found))
        tokenizer.fit(sources, whole)
        models.append(tokenizer.trained)
    assert models[0] == models[1]
    assert tokenizer.vocabulary == 1100
    plain = MidiTokenizer(MidiOptions(name="midi"))
    (chunk,) = tokenizer.encode(sources[0], whole, 1)
    ids = np.concatenate(list(chunk.ids)).tolist()
    assert len(ids) < 0.8 * len(plain.prompt(pieces[0]))
    assert tokenizer.decode(ids, tmp_path / "b.mid")["note"] == len(notes(pieces[0]))
    assert all(allowed(tokenizer, ids[:place])[ids[place]] for place in range(1, len(ids)))
    random = np.random.default_rng(2).integers(0, 1100, 500).tolist()
    assert tokenizer.decode(random, tmp_path / "r.mid")["dropped"] > 0
    mido.MidiFile(tmp_path / "r.mid")
    tokenizer.save(tmp_path)
    assert MidiTokenizer.load(options, tmp_path).fingerprint == tokenizer.fingerprint


TRAIN = """
import sys
from pathlib import Path
from shortcut_cli.data.documents import Source
from shortcut_cli.files import sha256
from shortcut_cli.tokenizers.midi import MidiOptions, MidiTokenizer

tokenizer = MidiTokenizer(MidiOptions(name="midi", bpe=1000))
sources = [Source(Path(p), p, sha256(Path(p)), Path(f"{sys.argv[1]}.{n}.ids")) for n, p in enumerate(sys.argv[2:])]
for source in sources:
    list(tokenizer.scan(source))
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


def test_bpe_is_learned_from_the_training_split_only(tmp_path, pieces):
    tokenizers = [MidiTokenizer(MidiOptions(name="midi", bpe=1000)) for _ in range(2)]
    sources = [source(tmp_path, path) for path in pieces]
    held_out = sources[-1].sha256
    for found in sources:
        list(tokenizers[0].scan(found))
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
        MidiTokenizer.load(MidiOptions(name="midi", bpe=1100), tmp_path)
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
def test_a_file_that_is_not_a_midi_tokenizer_is_not_loaded(tmp_path, keep, change):
    MidiTokenizer(MidiOptions(name="midi")).save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text()) if keep else {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | change))
    for bpe in (0, 1100):
        with pytest.raises(CheckFailed):
            MidiTokenizer.load(MidiOptions(name="midi", bpe=bpe), tmp_path)


def bpe_with(**changes):
    """A change of MidiTok's JSON that changes the BPE in it."""

    def change(content):
        whole = json.loads(content["_model"])
        whole["model"] |= changes
        return content | {"_model": json.dumps(whole)}

    return change


def without_last_piece(content):
    vocabulary = json.loads(content["_model"])["model"]["vocab"]
    del vocabulary[max(vocabulary, key=vocabulary.get)]
    return bpe_with(vocab=vocabulary)(content)


HOSTILE_BPES = {
    "an attribute of MidiTok": lambda content: content | {"decode": 5},
    "other base tokens": lambda content: content | {"_vocab_base": content["_vocab_base"] | {"x": 1}},
    "other bytes": lambda content: content | {"_vocab_base_byte_to_token": {"a": "x"}},
    "a prefix that is longer than a piece": bpe_with(continuing_subword_prefix="#" * 100),
    "an empty prefix": bpe_with(continuing_subword_prefix=""),
    "no pieces": bpe_with(vocab={}, merges=[]),
    "other bytes than the base tokens'": bpe_with(vocab={chr(33 + i): 934 - i for i in range(935)}, merges=[]),
    "a merge of pieces that are none": bpe_with(merges=[["a", "b" * 40]]),
    "a merge of one": bpe_with(merges=[["a"]]),
    "a merge without its piece": without_last_piece,
    "a number that is a text": bpe_with(vocab={"a": "b"}),
    "another kind": bpe_with(type="WordPiece"),
    "chance": bpe_with(dropout=0.5),
    "a normalizer": lambda content: (
        content | {"_model": content["_model"].replace('"normalizer":null', '"normalizer":1')}
    ),
    "nested deeply": lambda content: content | {"_model": '{"model":' + "[" * 100_000},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pieces):
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = MidiTokenizer(MidiOptions(name="midi", bpe=1100))
    sources = [source(folder, path) for path in pieces]
    for found in sources:
        list(tokenizer.scan(found))
    tokenizer.fit(sources, whole)
    tokenizer.save(folder)
    return tokenizer.options, json.loads((folder / "tokenizer.json").read_text())


@pytest.mark.parametrize("name", HOSTILE_BPES)
def test_a_bpe_that_miditok_does_not_train_reaches_neither_it_nor_its_native_reader(tmp_path, trained, name, capfd):
    options, content = trained
    (tmp_path / "tokenizer.json").write_text(json.dumps(HOSTILE_BPES[name](content)))
    with pytest.raises(CheckFailed, match="its BPE is not one that MidiTok trains"):
        MidiTokenizer.load(options, tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("merges_as_text", [False, True])
def test_a_bpe_that_miditok_trains_is_loaded(tmp_path, trained, merges_as_text):
    options, content = trained
    merges = json.loads(content["_model"])["model"]["merges"]
    changed = bpe_with(merges=[" ".join(pair) for pair in merges])(content) if merges_as_text else content
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    assert MidiTokenizer.load(options, tmp_path).vocabulary == 1100


def test_fingerprints_follow_what_changes_ids():
    base = MidiTokenizer(MidiOptions(name="midi")).fingerprint
    assert MidiTokenizer(MidiOptions(name="midi", transpose=[1], tempo_factors=[0.9])).fingerprint == base
    assert MidiTokenizer(MidiOptions(name="midi", velocities=16)).fingerprint != base


@pytest.mark.parametrize(
    "config", [{"transpose": [1, 1]}, {"transpose": [0]}, {"tempo_factors": [1.0]}, {"tempo_factors": [3.0]}]
)
def test_variants_that_repeat_or_change_nothing_are_refused(config):
    with pytest.raises(ValidationError, match=r"factors|semitones"):
        MidiOptions(name="midi", **config)


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
    silence = file(tmp_path / "c.mid", on.copy(time=2**28 - 1), off, tpq=24)
    with pytest.raises(Rejected, match=r"a rest of 11,184,811 beats, more than tokenizer\.longest_rest = 1,000"):
        tokenizer.prompt(silence)
    with pytest.raises(Rejected, match="claims to last 11,184,831 beats"):
        MidiTokenizer(MidiOptions(name="midi", longest_rest=10**8)).prompt(silence)
    every = MidiTokenizer(MidiOptions(name="midi", programs=True))
    with pytest.raises(Rejected, match="only drums, which are not transposed"):
        list(every.scan(source(tmp_path, tmp_path / "b.mid", "transpose=+2")))


def test_what_is_too_large_is_refused(tmp_path, pieces, monkeypatch):
    tokenizer = MidiTokenizer(MidiOptions(name="midi"))
    monkeypatch.setattr(midi_scores, "MAX_NOTES", 10)
    with pytest.raises(Rejected, match="more than 10"):
        tokenizer.prompt(pieces[0])
    (tmp_path / "x.mid.gz").write_bytes(gzip.compress(b"MThd" + bytes(midi_reading.MAX_BYTES)))
    with pytest.raises(Rejected, match="larger than 64 MiB"):
        tokenizer.prompt(tmp_path / "x.mid.gz")


def test_gzip(tmp_path, pieces):
    (tmp_path / "x.mid.gz").write_bytes(gzip.compress(pieces[0].read_bytes()))
    tokenizer = MidiTokenizer(MidiOptions(name="midi"))
    assert tokenizer.prompt(tmp_path / "x.mid.gz").tolist() == tokenizer.prompt(pieces[0]).tolist()


@pytest.mark.parametrize(("scheme", "programs"), SCHEMES)
def test_an_excerpt_has_every_note_at_the_token_that_completes_it(pieces, scheme, programs):
    tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs))
    ids = tokenizer.prompt(pieces[0])[:150]
    shown = tokenizer.excerpt(ids).notes
    score, _ = tokenizer._score(ids)
    expected = sorted((note.pitch, note.velocity) for track in score.tracks for note in track.notes)
    assert sorted((pitch, velocity) for _, _, pitch, velocity in shown.tolist()) == expected
    kinds, found = tokenizer.classes(ids)["type"].names, tokenizer.classes(ids)["type"].of
    for first, last, pitch, _ in shown.tolist():
        word = tokenizer.grammar.spelled[ids[first]][0]
        assert word.partition("_")[0] in midi_grammar.CLOSING_TYPES
        assert kinds[found[first]] == word.partition("_")[0]
        assert first <= last <= len(ids)
        if scheme == "MIDILike":
            assert word.endswith(f"_{pitch}")


def test_classes_are_types_and_joined_pieces_of_bpe(tmp_path, pieces):
    tokenizer = MidiTokenizer(MidiOptions(name="midi", bpe=1100))
    tokenizer.fit([source(tmp_path, path) for path in pieces], whole)
    ids = np.concatenate([tokenizer.prompt(pieces[0]), [tokenizer.eos]])
    classes = tokenizer.classes(ids)["type"]
    for token, number in zip(ids, classes.of, strict=True):
        words = tokenizer.grammar.spelled[token]
        expected = "joined" if len(words) > 1 else words[0].partition("_")[0]
        assert classes.names[number] == ("end" if token == tokenizer.eos else expected)
    assert "joined" in {classes.names[number] for number in classes.of}


def melody(*found, channel=0, program=None, start=()):
    """Messages of a track: (tick, kind, note, velocity) in any order, after `start`, (tick, message)."""
    events = [(tick, 0, message) for tick, message in start]
    if program is not None:
        events.append((0, 1, mido.Message("program_change", program=program, channel=channel)))
    for first, last, note, velocity in found:
        events.append((first, 3, mido.Message("note_on", note=note, velocity=velocity, channel=channel)))
        events.append((last, 2, mido.Message("note_off", note=note, channel=channel)))
    track, now = mido.MidiTrack(), 0
    for tick, _, message in sorted(events, key=lambda event: event[:2]):
        track.append(message.copy(time=tick - now))
        now = tick
    return track


def score_file(path, *tracks, tpq=480):
    mido.MidiFile(ticks_per_beat=tpq, tracks=list(tracks)).save(path)
    return path


def sounds(path):
    """(program or 128 for drums, start and end in beats, pitch, velocity) of every note, in order."""
    score = symusic.Score(path)
    beat = score.ticks_per_quarter
    return sorted(
        (128 if track.is_drum else track.program, n.start / beat, n.end / beat, n.pitch, n.velocity)
        for track in score.tracks
        for n in track.notes
    )


def again(tokenizer, path, variant=""):
    """What a file decodes to after it was encoded."""
    ids = tokenizer._read(path, variant).ids
    out = path.with_name("again.mid")
    assert tokenizer.decode(ids.tolist(), out)["dropped"] == 0
    return out


def test_beats_and_seconds_follow_the_tempos_and_notes_are_counted(tmp_path):
    # Four beats at 60 bpm, then six at 120: 4 + 3 s, whatever the tokens can express.
    tempos = [(0, mido.MetaMessage("set_tempo", tempo=1_000_000)), (960, mido.MetaMessage("set_tempo", tempo=500_000))]
    lead = melody((0, 480, 60, 100), (480, 2400, 64, 100), start=tempos)
    drums = melody((0, 480, 36, 90), (480, 960, 38, 90), (960, 1440, 36, 90), channel=9)
    path = score_file(tmp_path / "a.mid", lead, drums, tpq=240)
    for config, count in (({}, 2), ({"tempos": False}, 2), ({"programs": True}, 5)):
        (document,) = MidiTokenizer(MidiOptions(name="midi", **config)).scan(
            Source(path, "a.mid", files.sha256(path), tmp_path / f"{config}.ids", start=123)
        )
        assert document.units == {"note": count, "beat": 10, "second": 7}
        assert (document.sha256, document.offset) == (files.sha256(path), 123)


@pytest.mark.parametrize(("scheme", "programs"), SCHEMES)
def test_parts_have_the_notes_that_begin_in_them_and_their_share_of_beats_and_seconds(
    tmp_path, pieces, scheme, programs
):
    tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs))
    found = source(tmp_path, pieces[0])
    (document,) = tokenizer.scan(found)
    sizes = {"train": 100, "val": 31, "test": document.size - 131}
    parts = list(tokenizer.encode(found, lambda _: list(sizes.items()), 1))
    words = [tokenizer.base[int(i)] for i in tokenizer.prompt(pieces[0])]
    first = 0
    for part, (split, size) in zip(parts, sizes.items(), strict=True):
        assert part.split == split
        mine = words[first : first + size]
        first += size
        begun = [word for word in mine if word.startswith(("Pitch_", "PitchDrum_", "NoteOn_", "DrumOn_"))]
        assert part.units["note"] == len(begun) > 0
        for unit in ("beat", "second"):
            assert part.units[unit] == pytest.approx(document.units[unit] * size / document.size, rel=1e-12)
    for unit, amount in document.units.items():
        assert sum(part.units[unit] for part in parts) == pytest.approx(amount, rel=1e-12)


@pytest.mark.parametrize(
    ("pitches", "semitones", "expected"),
    [
        ((126, 60), 1, [61, 127]),
        ((127, 60), 1, None),
        ((1, 60), -1, [0, 59]),
        ((0, 60), -1, None),
        ((115, 12), 12, [24, 127]),
        ((116, 12), 12, None),
        ((115, 12), -12, [0, 103]),
        ((115, 11), -12, None),
    ],
)
@pytest.mark.parametrize("programs", [False, True])
def test_a_transposition_reaches_to_both_ends_of_the_range_and_leaves_drums(
    tmp_path, programs, pitches, semitones, expected
):
    tracks = [melody((0, 480, pitch, 100), channel=number) for number, pitch in enumerate(pitches)]
    drums = melody((0, 480, 0, 100), (480, 960, 127, 100), channel=9)
    path = score_file(tmp_path / "a.mid", *tracks, drums)
    tokenizer, variant = MidiTokenizer(MidiOptions(name="midi", programs=programs)), f"transpose={semitones:+d}"
    if expected is None:
        with pytest.raises(
            Rejected, match=rf"a transposition by {semitones:+d} would move out of range".replace("+", r"\+")
        ):
            tokenizer._read(path, variant)
        return
    found = sounds(again(tokenizer, path, variant))
    assert sorted(pitch for kind, _, _, pitch, _ in found if kind < 128) == expected
    assert [pitch for kind, _, _, pitch, _ in found if kind == 128] == [0, 127] * programs


def test_a_factor_makes_a_piece_longer_and_a_variant_has_a_hash_of_its_own(tmp_path):
    path = score_file(tmp_path / "a.mid", melody((480, 960, 60, 100), (960, 1920, 62, 100)))
    tokenizer = MidiTokenizer(MidiOptions(name="midi", transpose=[2, -1], tempo_factors=[1.5, 0.5]))
    assert tokenizer.variants == ["transpose=+2", "transpose=-1", "tempo=1.5", "tempo=0.5"]
    for variant, factor, moved in (("tempo=1.5", 1.5, 0), ("tempo=0.5", 0.5, 0), ("transpose=-1", 1, -1)):
        (document,) = tokenizer.scan(source(tmp_path, path, variant))
        assert document.units == {"note": 2, "beat": 4, "second": 2 * factor}
        found = [(start, end, pitch) for _, start, end, pitch, _ in sounds(again(tokenizer, path, variant))]
        assert found == [(1, 2, 60 + moved), (2, 4, 62 + moved)]
        end = symusic.Score(tmp_path / "again.mid").to("second").end()
        assert end == pytest.approx(2 * factor, rel=1e-5)
        name = f"{hashlib.sha256(path.read_bytes()).hexdigest()} {variant}"
        assert document.sha256 == hashlib.sha256(name.encode()).hexdigest()


@pytest.mark.parametrize(("ticks", "factor", "longer"), [(0, "0.5", 0), (0, "2", 0), (1, "0.5", 0), (1, "2", 2)])
def test_a_piece_of_almost_no_length_can_be_stretched(tmp_path, ticks, factor, longer):
    on = mido.Message("note_on", note=60, velocity=64)
    path = file(tmp_path / "a.mid", on, mido.Message("note_off", note=60, time=ticks))
    tokenizer = MidiTokenizer(MidiOptions(name="midi", tempos=False))
    reading = tokenizer._read(path, f"tempo={factor}")
    assert (reading.units["note"], reading.units["beat"]) == (1, longer / 480)
    assert reading.ids.tolist() == tokenizer.prompt(path).tolist()  # the shortest note that a token can express


def test_tracks_are_one_piano_without_drums_or_keep_their_programs(tmp_path):
    lead = melody((480, 960, 60, 99), (0, 480, 72, 99), program=24)
    bass = melody((0, 960, 40, 99), channel=1, program=33)
    drums = melody((0, 480, 36, 99), channel=9)
    path = score_file(tmp_path / "a.mid", lead, bass, drums)
    rest = [(24, 0, 1, 72, 99), (24, 1, 2, 60, 99), (33, 0, 2, 40, 99)]
    for scheme in ("REMI", "TSD", "MIDILike"):
        one = MidiTokenizer(MidiOptions(name="midi", scheme=scheme))
        assert sounds(again(one, path)) == sorted((0, *note[1:]) for note in rest)
        every = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=True))
        assert sounds(again(every, path)) == [*rest, (128, 0, 1, 36, 99)]


@pytest.mark.parametrize("scheme", ["REMI", "TSD", "MIDILike"])
def test_a_chord_goes_from_low_to_high_whatever_tracks_its_notes_are_in(tmp_path, scheme):
    high = [(480 * n, 480 * n + 480, 72 + n, 99) for n in range(4)]
    low = [(480 * n, 480 * n + 480, 40 + n, 99) for n in range(4)]
    tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme))
    one = score_file(tmp_path / "one.mid", melody(*high, *low))
    for number, parts in enumerate(((high, low), (low, high))):
        tracks = [melody(*part, channel=channel) for channel, part in enumerate(parts)]
        ids = tokenizer.prompt(score_file(tmp_path / f"{number}.mid", *tracks))
        assert ids.tolist() == tokenizer.prompt(one).tolist()
        words = [tokenizer.base[int(i)].split("_") for i in ids]
        begun = [int(pitch) for kind, pitch in words if kind in ("Pitch", "NoteOn")]
        assert begun == [40, 72, 41, 73, 42, 74, 43, 75]


@pytest.mark.parametrize("steps", [1, 8, 32, 127])
def test_velocities_come_back_as_the_nearest_step(tmp_path, steps):
    velocities = [1, 15, 16, 17, 40, 63, 64, 100, 126, 127]
    notes_ = [(480 * n, 480 * (n + 1), 60, velocity) for n, velocity in enumerate(velocities)]
    tokenizer = MidiTokenizer(MidiOptions(name="midi", velocities=steps))
    found = [velocity for *_, velocity in sounds(again(tokenizer, score_file(tmp_path / "a.mid", melody(*notes_))))]
    # MidiTok's steps: integers evenly spread up to and including 127.
    known = [127 * step // steps for step in range(1, steps + 1)]
    for before, after in zip(velocities, found, strict=True):
        assert after in known
        assert abs(after - before) == min(abs(step - before) for step in known)


@pytest.mark.parametrize("scheme", ["REMI", "TSD", "MIDILike"])
def test_tempos_and_time_signatures_come_back_unless_they_are_switched_off(tmp_path, scheme):
    rate = 74
    start = [
        (0, mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(rate))),
        (0, mido.MetaMessage("time_signature", numerator=3, denominator=4)),
    ]
    path = score_file(tmp_path / "a.mid", melody((0, 480, 60, 99), (1440, 1920, 62, 99), start=start))
    for on in (True, False):
        tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, tempos=on, time_signatures=on))
        score = symusic.Score(again(tokenizer, path))
        assert {round(tempo.qpm, 1) for tempo in score.tempos} == {rate if on else 120}
        assert {(one.numerator, one.denominator) for one in score.time_signatures} == {(3, 4) if on else (4, 4)}
        assert [note[1:4] for note in sounds(tmp_path / "again.mid")] == [(0, 1, 60), (3, 4, 62)]


@pytest.mark.parametrize(
    ("module", "name", "largest"),
    [(midi_scores, "MAX_NOTES", 2), (midi_scores, "MAX_BEATS", 4), (midi_reading, "MAX_BYTES", None)],
)
def test_a_file_at_the_limit_is_read(tmp_path, monkeypatch, module, name, largest):
    path = score_file(tmp_path / "a.mid", melody((0, 480, 60, 100), (480, 1920, 62, 100)))
    largest = largest or path.stat().st_size
    tokenizer = MidiTokenizer(MidiOptions(name="midi"))
    monkeypatch.setattr(module, name, largest)
    assert tokenizer._read(path).units["note"] == 2
    monkeypatch.setattr(module, name, largest - 1)
    with pytest.raises(Rejected):
        tokenizer._read(path)


def test_a_time_division_of_zero_is_refused(tmp_path):
    path = score_file(tmp_path / "a.mid", melody((0, 480, 60, 100)))
    content = bytearray(path.read_bytes())
    content[12:14] = b"\0\0"
    path.write_bytes(content)
    with pytest.raises(Rejected, match="a time division of 0 ticks"):
        midi_reading.read_score(path)


def follow(tokenizer, words):
    """A constraint after some base tokens."""
    constraint = tokenizer.constraint()
    for word in words:
        constraint.push(tokenizer.base[word])
    return constraint


# Ids needed for a complete note, and whether EOS may follow.
WAYS = [
    ("TSD", False, [], 3, False),
    ("TSD", False, ["TimeShift_1.0.12"], 3, False),
    ("TSD", False, ["Pitch_60"], 2, False),
    ("TSD", False, ["Pitch_60", "Velocity_63"], 1, False),
    ("TSD", False, ["Pitch_60", "Velocity_63", "Duration_1.0.12"], 0, True),
    ("TSD", False, ["Pitch_60", "Velocity_63", "Duration_1.0.12", "TimeShift_1.0.12"], 0, False),
    # From the middle of a piece: the duration ends a note that did not begin here.
    ("TSD", False, ["Velocity_63", "Duration_1.0.12"], 3, False),
    ("TSD", True, [], 4, False),
    ("TSD", True, ["Program_-1"], 3, False),
    ("TSD", True, ["Program_-1", "PitchDrum_36", "Velocity_63", "Duration_1.0.12"], 0, True),
    ("REMI", False, [], 5, False),
    ("REMI", False, ["Bar_None", "TimeSig_3/4", "Position_0"], 3, False),
    ("REMI", True, ["Bar_None", "TimeSig_3/4", "Position_0"], 4, False),
    ("MIDILike", False, [], 4, False),
    ("MIDILike", False, ["NoteOn_60", "Velocity_63"], 2, False),
    ("MIDILike", False, ["NoteOn_60", "Velocity_63", "TimeShift_1.0.12"], 1, False),
    ("MIDILike", False, ["NoteOn_60", "Velocity_63", "TimeShift_1.0.12", "NoteOff_60"], 0, True),
    # Of two sounding notes, the one that began first.
    ("MIDILike", False, ["NoteOn_60", "Velocity_63", "TimeShift_1.0.12", "NoteOn_61", "Velocity_63"], 2, False),
    ("MIDILike", False, ["NoteOn_61", "Velocity_63", "NoteOn_60", "Velocity_63", "TimeShift_1.0.12"], 1, False),
    # A note-off for a note that does not sound, or that began at the same time.
    ("MIDILike", False, ["TimeShift_1.0.12", "NoteOff_60"], 4, False),
    ("MIDILike", False, ["NoteOn_60", "Velocity_63", "TimeShift_1.0.12", "NoteOff_61"], 1, False),
    ("MIDILike", False, ["NoteOff_61", "NoteOn_60", "Velocity_63", "NoteOff_60"], 4, False),
    # Of two equal notes, the second counts as sounding since the first began.
    (
        *("MIDILike", False),
        ["NoteOn_60", "Velocity_63", "TimeShift_1.0.12", "NoteOn_60", "Velocity_63", "NoteOff_60"],
        *(0, True),
    ),
    ("MIDILike", True, ["Program_0", "NoteOn_60", "Velocity_63", "TimeShift_1.0.12"], 1, False),
    # A note of another instrument.
    (
        *("MIDILike", True),
        ["Program_0", "NoteOn_60", "Velocity_63", "TimeShift_1.0.12", "Program_1", "NoteOff_60"],
        *(5, False),
    ),
]


@pytest.mark.parametrize(("scheme", "programs", "words", "needed", "eos"), WAYS)
def test_eos_waits_for_a_complete_note_and_the_way_to_one_is_the_shortest(scheme, programs, words, needed, eos):
    tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs))
    constraint = follow(tokenizer, words)
    assert constraint.needed == needed
    assert constraint.allowed(10**6)[tokenizer.eos] == eos
    if needed:
        closing = tokenizer.base[constraint.plan()[-1]]
        assert closing.startswith(midi_grammar.CLOSING_TYPES)
        if "NoteOn_60" in words and needed < 3:
            assert closing.endswith("Off_60")  # MidiTok takes either off for a note of the instrument
        # If only as many ids are left, nothing but this way may follow.
        for token in constraint.plan():
            assert np.flatnonzero(constraint.allowed(constraint.needed)).tolist() == [token]
            constraint.push(token)
        assert constraint.allowed(10**6)[tokenizer.eos]
    for token in np.flatnonzero(constraint.allowed(10**6)).tolist():
        assert tokenizer.base[token] not in ("PAD_None", "BOS_None")


@pytest.mark.parametrize("bpe", [False, True])
def test_ids_that_may_not_follow_are_dropped_by_the_table_of_types(tmp_path, pieces, bpe):
    for scheme, programs in SCHEMES[: 1 if bpe else None]:
        tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs, bpe=950 if bpe else 0))
        if bpe:
            tokenizer.fit([source(tmp_path, path) for path in pieces[:2]], whole)
        assert any(len(words) > 1 for words in tokenizer.grammar.spelled) == bpe
        for seed in range(3):
            special = [tokenizer.base[f"{name}_None"] for name in midi_grammar.SPECIAL]
            ids = [*special, *np.random.default_rng(seed).integers(0, tokenizer.vocabulary, 600).tolist()]
            kept = may_follow(tokenizer, ids)
            assert tokenizer.grammar.legal(ids) == kept
            assert 20 < len(kept) < 580


def test_an_excerpt_draws_each_note_up_to_the_first_that_begins_after_its_end(tmp_path):
    path = score_file(
        tmp_path / "a.mid",
        melody((0, 480, 60, 127), (480, 960, 62, 95), (480, 1440, 64, 63), (960, 1440, 65, 31), (1920, 2400, 67, 127)),
    )
    tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme="TSD", tempos=False, time_signatures=False))
    ids = tokenizer.prompt(path)
    closing = [place for place, i in enumerate(ids) if tokenizer.base[int(i)].startswith("Duration")]
    assert len(closing) == 5
    ends = [closing[1], closing[3], closing[4], closing[4], len(ids)]
    pitches = [(60, 127), (62, 95), (64, 63), (65, 31), (67, 127)]
    expected = [[first, last, *of] for first, last, of in zip(closing, ends, pitches, strict=True)]
    assert tokenizer.excerpt(ids).notes.tolist() == expected


def test_blocks_of_ids_are_the_whole(tmp_path, pieces, monkeypatch):
    monkeypatch.setattr(midi, "BLOCK_IDS", 70)
    tokenizer = MidiTokenizer(MidiOptions(name="midi"))
    (chunk,) = tokenizer.encode(source(tmp_path, pieces[0]), whole, 1)
    blocks = list(chunk.ids)
    assert {len(block) for block in blocks[:-1]} == {70}
    assert np.concatenate(blocks).tolist() == tokenizer.prompt(pieces[0]).tolist()


def test_a_bpe_learns_the_ids_of_the_training_part_of_a_document(tmp_path, pieces):
    tokenizer = MidiTokenizer(MidiOptions(name="midi", bpe=1000))
    found = source(tmp_path, pieces[0])
    ids = MidiTokenizer(MidiOptions(name="midi")).prompt(pieces[0]).tolist()
    assign = lambda d: [("val", 40), ("train", 60), ("test", d.size - 130), ("train", 30)]  # noqa: E731
    parts = [number for part in tokenizer._training_parts(found, assign) for number in (1, *part)]
    seen = [text for (text,) in midi._Corpus(tokenizer.base, [None, found], parts)]
    assert seen == [tokenizer.base._ids_to_bytes(part, as_one_str=True) for part in (ids[40:100], ids[-30:])]


def test_a_bpe_no_larger_than_the_base_vocabulary_is_refused():
    size = len(MidiTokenizer(MidiOptions(name="midi")).base)
    with pytest.raises(UsageError, match=f"no larger than the {size} tokens") as error:
        MidiTokenizer(MidiOptions(name="midi", bpe=size)).fit([], whole)
    assert error.value.hint == f"--set tokenizer.bpe={4 * size}"


def test_every_option_that_changes_ids_changes_the_fingerprint(tmp_path):
    changes = [
        *({}, {"scheme": "TSD"}, {"scheme": "MIDILike"}, {"tempos": False}, {"time_signatures": False}),
        *({"programs": True}, {"velocities": 31}, {"beat_resolution": 8}, {"longest_note": 40}, {"tempo_count": 2}),
        *({"tempo_range": [30, 300]}, {"meters": ["4/4"]}, {"sustain": "durations"}),
    ]
    tokenizers = [MidiTokenizer(MidiOptions(name="midi", **config)) for config in changes]
    assert len({one.fingerprint for one in tokenizers}) == len(changes)
    trained = [MidiTokenizer(MidiOptions(name="midi", bpe=1000), content).fingerprint for content in ("{}", "{ }")]
    assert len({*trained, tokenizers[0].fingerprint}) == 3
    tokenizers[0].save(tmp_path)
    for one in tokenizers[1:]:
        with pytest.raises(CheckFailed, match="another configuration"):
            MidiTokenizer.load(one.options, tmp_path)


def test_the_ends_of_the_range_of_factors_are_allowed():
    assert MidiOptions(name="midi", tempo_factors=[0.5, 2.0]).tempo_factors == [0.5, 2.0]
    for factors in ([0.49], [2.01], [1.2, 1.2], [1.0000001]):
        with pytest.raises(ValidationError, match="factors"):
            MidiOptions(name="midi", tempo_factors=factors)


def test_a_constraint_follows_the_base_tokens_of_a_bpe_id(tmp_path, pieces):
    tokenizer = MidiTokenizer(MidiOptions(name="midi", bpe=1100))
    tokenizer.fit([source(tmp_path, path) for path in pieces], whole)
    constraint, ended = tokenizer.constraint(), False
    for token in tokenizer.prompt(pieces[0]).tolist():
        words = tokenizer.grammar.spelled[token]
        constraint.push(token)
        ended |= any(word.startswith("Duration") for word in words)
        assert constraint.allowed(10**6)[tokenizer.eos] == words[-1].startswith("Duration")
        assert (constraint.needed == 0) == ended
    assert ended


@pytest.mark.parametrize(
    ("options", "valid"),
    [
        ({"bpe": -1}, False),
        ({"bpe": 0}, True),
        ({"velocities": 0}, False),
        ({"velocities": 1}, True),
        ({"velocities": 127}, True),
        ({"velocities": 128}, False),
    ],
)
def test_options_have_bounds(options, valid):
    if valid:
        assert MidiOptions(name="midi", **options).model_dump().items() >= options.items()
    else:
        with pytest.raises(ValidationError, match=next(iter(options))):
            MidiOptions(name="midi", **options)


def test_options_that_are_left_out():
    assert MidiOptions(name="midi").model_dump() == {
        "name": "midi",
        "scheme": "REMI",
        "tempos": True,
        "time_signatures": True,
        "programs": False,
        "velocities": 32,
        "beat_resolution": 12,
        "longest_note": 64,
        "longest_rest": 1000,
        "tempo_range": [10, 400],
        "tempo_count": 391,
        "meters": ["1-4/2", "1-12/4", "1-15/8", "1-15/16"],
        "sustain": "tokens",
        "bpe": 0,
        "transpose": [],
        "tempo_factors": [],
    }


@pytest.mark.parametrize("factor", [0.5, 1.3, 2.0])
def test_without_tempos_every_time_is_stretched_from_the_beginning_on(tmp_path, factor):
    path = score_file(tmp_path / "a.mid", melody((0, 100, 60, 100), (100, 900, 62, 100), (1000, 2000, 64, 100)))
    rules = MidiTokenizer(MidiOptions(name="midi", tempos=False))._rules
    score, _ = midi_reading.read_score(path)
    stretched = midi_scores.arrange(score, f"tempo={factor}", rules).score
    found = [note for track in stretched.tracks for note in track.notes]
    assert [note.time for note in found] == [round(time * factor) for time in (0, 100, 1000)]
    assert [note.end for note in found] == [round(time * factor) for time in (100, 900, 2000)]


def test_a_beat_of_one_tick_is_a_time_division(tmp_path):
    on = mido.Message("note_on", note=60, velocity=64)
    path = file(tmp_path / "a.mid", on, mido.Message("note_off", note=60, time=3), tpq=1)
    assert MidiTokenizer(MidiOptions(name="midi"))._read(path).units == {"note": 1, "beat": 3, "second": 1.5}


@pytest.mark.parametrize("scheme", ["REMI", "TSD", "MIDILike"])
def test_the_shortest_sample_with_programs_is_a_note_of_the_piano(tmp_path, scheme):
    tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=True))
    ids = tokenizer.constraint().plan()
    assert tokenizer.decode(ids, tmp_path / "a.mid")["note"] == 1
    (track,) = [track for track in symusic.Score(tmp_path / "a.mid").tracks if len(track.notes)]
    assert (track.program, track.is_drum) == (0, False)


def test_tokens_that_are_never_in_a_piece_have_no_class(tmp_path, pieces):
    tokenizer = MidiTokenizer(MidiOptions(name="midi"))
    special = [tokenizer.base.vocab[name] for name in ("PAD_None", "BOS_None")]
    found = tokenizer.classes(np.array([*special, tokenizer.eos]))["type"]
    assert [found.names[number] if number >= 0 else None for number in found.of] == [None, None, "end"]


def test_an_excerpt_of_joined_tokens_has_all_notes(tmp_path, pieces):
    tokenizer = MidiTokenizer(MidiOptions(name="midi", bpe=1100))
    tokenizer.fit([source(tmp_path, path) for path in pieces], whole)
    ids = tokenizer.prompt(pieces[0])
    assert any(len(tokenizer.grammar.spelled[i]) > 1 for i in ids)
    assert len(tokenizer.excerpt(ids).notes) == len(notes(pieces[0]))


@pytest.mark.parametrize(
    ("scheme", "programs", "kinds"),
    [
        ("REMI", False, {"Bar"}),
        ("REMI", True, {"Bar"}),
        ("TSD", False, {"Tempo", "TimeSig", "TimeShift", "Pedal", "Pitch", "PitchDrum"}),
        ("TSD", True, {"Tempo", "TimeSig", "TimeShift", "Pedal", "Program"}),
        ("MIDILike", False, {"Tempo", "TimeSig", "TimeShift", "Pedal", "NoteOn", "DrumOn"}),
        ("MIDILike", True, {"Tempo", "TimeSig", "TimeShift", "Pedal", "Program"}),
    ],
)
def test_a_sample_begins_with_what_can_begin_a_piece(scheme, programs, kinds):
    tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs))
    mask = tokenizer.constraint().allowed(10_000)
    assert {word.partition("_")[0] for word, number in tokenizer.base.vocab.items() if mask[number]} <= kinds
    for word, number in tokenizer.base.vocab.items():
        assert mask[number] == (word.partition("_")[0] in kinds), word


def test_the_shortest_way_to_a_whole_note_ends_the_oldest_one():
    tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme="MIDILike"))
    constraint, vocabulary = tokenizer.constraint(), tokenizer.base.vocab
    shift = next(number for word, number in vocabulary.items() if word.startswith("TimeShift"))
    velocity = next(number for word, number in vocabulary.items() if word.startswith("Velocity"))
    for token in (vocabulary["NoteOn_70"], velocity, shift, vocabulary["NoteOn_40"], velocity):
        constraint.push(token)
    waits, ends = constraint.plan()  # a velocity is not followed by a note-off
    assert next(word for word, number in vocabulary.items() if number == waits).startswith("TimeShift")
    assert ends == vocabulary["NoteOff_70"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files by /proc")
def test_training_a_bpe_leaves_no_file_open(tmp_path, pieces):
    tokenizer, counts = MidiTokenizer(MidiOptions(name="midi", bpe=1100)), []
    for _ in range(3):
        tokenizer.fit([source(tmp_path, path) for path in pieces], whole)
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[1] == counts[2]


def test_a_file_of_another_format_is_shown_by_its_first_eight_bytes(tmp_path):
    (tmp_path / "a.mid").write_bytes(b"RIFF\x00\x01\x02\x03WAVE")
    with pytest.raises(Rejected) as raised:
        midi_reading.read_score(tmp_path / "a.mid")
    assert str(raised.value) == r"is not a MIDI file: it begins with b'RIFF\x00\x01\x02\x03'"


def test_seconds_are_exact_to_the_microsecond(tmp_path):
    on = mido.Message("note_on", note=60, velocity=64)
    path = file(tmp_path / "a.mid", on, mido.Message("note_off", note=60, time=320))
    assert MidiTokenizer(MidiOptions(name="midi"))._read(path).units["second"] == 0.333333


def test_seconds_of_positions_that_go_back_are_those_of_the_file(tmp_path):
    """As sampled ids have them: the tempo of an earlier position, after that of a later one."""
    tokenizer = MidiTokenizer(MidiOptions(name="midi"))
    vocabulary = tokenizer.base.vocab
    slow, fast, faster = (f"Tempo_{tokenizer.base.tempos[at]}" for at in (20, 150, 300))
    note = ["Pitch_60", "Velocity_63", next(word for word in vocabulary if word.startswith("Duration_"))]
    bars = ["Bar_None", "TimeSig_4/4", "Position_24", fast, *note, "Position_12", slow, *note, "Position_12", faster]
    words = [*bars, *note, "Bar_None", "TimeSig_4/4", "Position_36", *note]
    ids, path = [vocabulary[word] for word in words], tmp_path / "a.mid"
    units = tokenizer.decode(ids, path)
    assert units["dropped"] == 0
    assert units["second"] == pytest.approx(mido.MidiFile(path).length, abs=1e-4)
    # Alone, the new part begins at its barline with the tempo that holds there.
    written = tokenizer.decode_after(ids, tmp_path / "new.mid", len(bars) + len(note), only_new=True)
    assert written.units["second"] == pytest.approx(mido.MidiFile(tmp_path / "new.mid").length, abs=1e-4)
    whole = tokenizer.decode_after(ids, tmp_path / "whole.mid", len(bars) + len(note))
    tempos = [message.tempo for message in mido.MidiFile(tmp_path / "new.mid") if message.type == "set_tempo"]
    assert tempos[-1] == [m.tempo for m in mido.MidiFile(path).merged_track if m.type == "set_tempo"][-1]
    assert whole.begins["second"] > 0
