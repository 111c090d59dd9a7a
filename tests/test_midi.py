"""MIDI: notes survive, legal streams stay legal, and broken files are refused with a reason."""

import io
import itertools
import json

import mido
import numpy as np
import pytest
import symusic

from shortcut_cli import composer
from shortcut_cli.errors import CheckFailed, Rejected, UsageError
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
    return Source(path, path.name, f"{abs(hash(path.name)):064x}", tmp_path / f"{path.name}{variant}.ids", variant)


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
                mask = tokenizer.allowed(ids).copy()
                assert mask.any()
                mask[tokenizer.end] = False
                ids.append(int(generator.choice(np.flatnonzero(mask))))
            kinds = [tokenizer.base[i].split("_")[0] for i in ids]
            graph = tokenizer.base.tokens_types_graph
            assert all(b in graph[a] for a, b in itertools.pairwise(kinds))
            tokenizer.decode(ids, tmp_path / f"{number}.mid")
            mido.MidiFile(tmp_path / f"{number}.mid")

    def test_any_ids_decode(self, tmp_path, scheme, programs):
        tokenizer = MidiTokenizer(MidiOptions(name="midi", scheme=scheme, programs=programs))
        generator = np.random.default_rng(1)
        for number in range(20):
            ids = generator.integers(0, tokenizer.vocabulary, generator.integers(0, 200)).tolist()
            tokenizer.decode(ids, tmp_path / f"{number}.mid")
            symusic.Score(tmp_path / f"{number}.mid")


def test_units_are_counted(tmp_path, pieces):
    tokenizer = MidiTokenizer(MidiOptions(name="midi"))
    (document,) = tokenizer.survey(source(tmp_path, pieces[0]))
    assert document.units["note"] == len(notes(pieces[0]))
    assert document.units["second"] == pytest.approx(mido.MidiFile(pieces[0]).length, rel=0.1)
    (piece,) = tokenizer.encode(source(tmp_path, pieces[0]), whole, 1)
    assert np.concatenate(list(piece.ids)).tolist() == tokenizer.prompt(pieces[0]).tolist()


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
    assert all(tokenizer.allowed(ids[:place])[ids[place]] for place in range(1, len(ids)))
    tokenizer.save(tmp_path)
    assert MidiTokenizer.load(options, tmp_path).fingerprint == tokenizer.fingerprint


def test_a_bpe_that_is_too_small(tmp_path):
    with pytest.raises(UsageError, match=r"tokenizer\.bpe 100"):
        MidiTokenizer(MidiOptions(name="midi", bpe=100)).fit([], whole)


def test_saved_and_loaded(tmp_path):
    tokenizer = MidiTokenizer(MidiOptions(name="midi"))
    tokenizer.save(tmp_path)
    assert MidiTokenizer.load(tokenizer.options, tmp_path).fingerprint == tokenizer.fingerprint
    with pytest.raises(CheckFailed, match="another configuration"):
        MidiTokenizer.load(MidiOptions(name="midi", velocities=8), tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"config": 5}))
    with pytest.raises(CheckFailed):
        MidiTokenizer.load(tokenizer.options, tmp_path)


def test_fingerprints_follow_what_changes_ids():
    base = MidiTokenizer(MidiOptions(name="midi")).fingerprint
    assert MidiTokenizer(MidiOptions(name="midi", transpose=[1])).fingerprint == base
    assert MidiTokenizer(MidiOptions(name="midi", velocities=16)).fingerprint != base


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


def test_gzip(tmp_path, pieces):
    import gzip

    (tmp_path / "x.mid.gz").write_bytes(gzip.compress(pieces[0].read_bytes()))
    tokenizer = MidiTokenizer(MidiOptions(name="midi"))
    assert tokenizer.prompt(tmp_path / "x.mid.gz").tolist() == tokenizer.prompt(pieces[0]).tolist()
    assert io.BytesIO(pieces[0].read_bytes()).read(4) == b"MThd"
