"""Sound: the codes of one pass for any division into blocks, and files of every kind or a reason."""

import gzip
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from conftest import allowed

from shortcut_cli.codec import encodec
from shortcut_cli.errors import CheckFailed, Rejected, UsageError
from shortcut_cli.tokenizers.audio import AudioOptions, AudioTokenizer, Length, read_samples
from shortcut_cli.tokenizers.base import Source


def whole(document):
    return [("train", document.size)]


def tone(seconds, rate_hz=24_000, seed=0):
    """A glide with some noise, float32."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    noise = np.random.default_rng(seed).normal(0, 0.02, len(t))
    return (0.4 * np.sin(2 * np.pi * (200 + 300 * t) * t) * np.exp(-0.3 * t) + noise).astype(np.float32)


@pytest.fixture(scope="module")
def package():
    """The package's own model, not folded."""
    model = encodec.untrained(0).eval()
    model.set_target_bandwidth(24.0)
    return model


@pytest.fixture(scope="module")
def codec():
    return encodec.Codec(encodec.untrained(0))


def one_pass(package, samples):
    with torch.inference_mode():
        return package.encode(torch.from_numpy(samples)[None, None])[0][0][0].T.numpy()


def cut(rows, size):
    return (rows[first : first + size] for first in range(0, len(rows), size))


@pytest.mark.parametrize("block_s", [0.31, 1.0, 3.7, 30.0])
def test_codes_equal_one_pass_of_the_package(package, codec, block_s):
    samples = tone(5.123)
    expected = one_pass(package, samples)
    assert len(np.unique(expected)) > 200
    found = np.concatenate(list(codec.encode(cut(samples, round(block_s * 24_000)), 32)))
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("length", [1, 5, 319, 320, 321, 1600, 23_999, 24_001, 47_999, 48_000, 48_321, 71_999])
def test_any_length_equals_one_pass(package, codec, length):
    samples = tone(3.1)[:length]
    assert np.array_equal(np.concatenate(list(codec.encode([samples], 32))), one_pass(package, samples))


def test_two_streams_do_not_disturb_each_other(codec):
    a, b = tone(3, seed=1), tone(3, seed=2)
    alone = [np.concatenate(list(codec.encode(cut(x, 9000), 4))) for x in (a, b)]
    streams = [codec.encode(cut(x, 9000), 4) for x in (a, b)]
    together = [np.concatenate(parts) for parts in zip(*zip(*streams, strict=True), strict=True)]
    assert all(np.array_equal(x, y) for x, y in zip(alone, together, strict=True))


def many(codec, streams, codebooks=4):
    """What `encode_many` gives: codes (frames, Q) or the reason, stream by stream."""
    parts, found = {}, {}
    for number, codes in codec.encode_many(streams, codebooks):
        assert number not in found, "something came after the end"
        if isinstance(codes, np.ndarray):
            parts.setdefault(number, []).append(codes)
        else:
            found[number] = codes or np.concatenate(parts[number])
    return [found[number] for number in range(len(found))]


def test_streams_beside_each_other_have_the_codes_that_they_have_alone(package, codec):
    lengths = [60_001, 1, 319, 200_000, 24_000, 5000, 233_333, 48_000, 12_345, 80_000, 7]
    samples = [tone(10, seed=n)[:length] for n, length in enumerate(lengths)]
    assert len(samples) > encodec.ROWS
    expected = [one_pass(package, x)[:, :4] for x in samples]
    for order in (range(11), range(10, -1, -1), [3], [1], [4, 6]):
        found = many(codec, [cut(samples[n], 9000) for n in order])
        assert all(np.array_equal(codes, expected[n]) for codes, n in zip(found, order, strict=True))


def test_a_stream_that_breaks_off_costs_itself(codec):
    def broken():
        yield tone(4)
        raise Rejected("enough")

    samples = tone(6, seed=1)
    first, reason, last = many(codec, [cut(samples, 9000), broken(), cut(samples[:99_999], 50_000)])
    assert str(reason) == "enough"
    assert np.array_equal(first, np.concatenate(list(codec.encode([samples], 4))))
    assert np.array_equal(last, np.concatenate(list(codec.encode([samples[:99_999]], 4))))


def test_fewer_codebooks_are_the_first_ones(codec):
    samples = tone(1.5)
    full, some = (np.concatenate(list(codec.encode([samples], count))) for count in (32, 3))
    assert np.array_equal(full[:, :3], some)


def test_decoding_in_blocks_equals_one_pass(package, codec):
    codes = one_pass(package, tone(4.2))
    with torch.inference_mode():
        expected = package.decode([(torch.from_numpy(codes.T.copy())[None], None)])[0, 0].numpy()
    found = np.concatenate(list(codec.decode(cut(codes, 50))))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def source(tmp_path, path):
    return Source(path, path.name, "0" * 64, tmp_path / f"{path.name}.ids")


@pytest.fixture(scope="module")
def tokenizer():
    return AudioTokenizer(AudioOptions(name="audio", weights="untrained:0", codebooks=2))


def test_large_files_are_alone_and_small_ones_in_groups_that_get_smaller(tmp_path, tokenizer):
    sources = []
    for number in range(200):
        path = tmp_path / f"{number}.wav"
        with open(path, "wb") as stream:
            stream.truncate(9_000_000 - number if number % 50 == 7 else 100 + number)
        sources.append(source(tmp_path, path))
    sources.append(source(tmp_path, tmp_path / "gone.wav"))
    groups = tokenizer.group(sources, 2)
    assert sorted(one.relative for group in groups for one in group) == sorted(one.relative for one in sources)
    assert [[one.relative for one in group] for group in groups[:4]] == [
        ["7.wav"],
        ["57.wav"],
        ["107.wav"],
        ["157.wav"],
    ]
    counts = [len(group) for group in groups[4:]]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (16, 1)
    assert len(AudioTokenizer(AudioOptions(name="audio", weights="mini")).group(sources, 2)) == 201


def test_what_is_staged_together_is_what_a_survey_stages(tmp_path, tokenizer):
    sources = []
    for number in range(3):
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, tone(1 + number / 10, seed=number), 24_000)
        sources.append(source(tmp_path, path))
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no sound")
    together = [replace(one, staged=tmp_path / f"together-{one.relative}") for one in sources]
    tokenizer.stage([*together[:2], source(tmp_path, broken), together[2]])
    assert not source(tmp_path, broken).staged.exists()
    for one, other in zip(sources, together, strict=True):
        staged = other.staged.read_bytes()
        assert list(tokenizer.survey(other)) == list(tokenizer.survey(one))
        assert other.staged.read_bytes() == staged == one.staged.read_bytes()


def test_ids_take_turns_and_decode(tmp_path, tokenizer):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(2.0), 24_000)
    (document,) = tokenizer.survey(source(tmp_path, path))
    assert document.size == 2 * 150
    assert document.units == {"second": 2.0}
    ids = tokenizer.prompt(path)
    assert (ids[0::2] < 1024).all()
    assert ((ids[1::2] >= 1024) & (ids[1::2] < 2048)).all()
    assert all(allowed(tokenizer, ids[:place])[ids[place]] for place in range(10))
    assert (tokenizer.vocabulary, tokenizer.end, tokenizer.stride) == (2049, 2048, 2)
    units = tokenizer.decode([*ids.tolist(), 5, tokenizer.end, 7], tmp_path / "out.wav")
    info = soundfile.info(tmp_path / "out.wav")
    assert (info.samplerate, info.channels, info.subtype, info.frames) == (24_000, 1, "PCM_16", 48_000)
    assert units == {"second": 2.0}


def test_the_end_comes_between_frames_only(tokenizer):
    assert [bool(allowed(tokenizer, [0] * n)[tokenizer.end]) for n in range(5)] == [False, False, True, False, True]


def test_a_cut_leaves_frames_whole(tmp_path, tokenizer):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1.0), 24_000)
    list(tokenizer.survey(source(tmp_path, path)))
    parts = list(tokenizer.encode(source(tmp_path, path), lambda d: [("train", 33), ("val", d.size - 33)], 1))
    ids = [np.concatenate(list(part.ids)) for part in parts]
    assert [len(part) for part in ids] == [32, 118]
    assert np.concatenate(ids).tolist() == tokenizer.prompt(path).tolist()
    assert sum(part.units["second"] for part in parts) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("rate_hz", "channels", "form", "subtype"),
    [(8000, 1, "WAV", "PCM_16"), (44_100, 2, "FLAC", "PCM_24"), (48_000, 2, "OGG", "VORBIS"), (16_000, 1, "MP3", None)],
)
def test_any_rate_and_format(tmp_path, rate_hz, channels, form, subtype):
    path = tmp_path / f"a.{form.lower()}"
    soundfile.write(path, np.tile(tone(1.5, rate_hz)[:, None], channels), rate_hz, format=form, subtype=subtype)
    length = Length()
    samples = np.concatenate(list(read_samples(path, length)))
    assert length.seconds == pytest.approx(1.5, abs=0.1)
    assert len(samples) == pytest.approx(length.seconds * 24_000, abs=2)
    reference = tone(1.5)
    close = np.corrcoef(samples[2000:20_000], reference[2000:20_000])[0, 1] if form != "MP3" else 1
    assert close > 0.9


def test_gzip(tmp_path, tokenizer):
    soundfile.write(tmp_path / "a.wav", tone(1.0), 24_000)
    (tmp_path / "b.wav.gz").write_bytes(gzip.compress((tmp_path / "a.wav").read_bytes()))
    assert tokenizer.prompt(tmp_path / "b.wav.gz").tolist() == tokenizer.prompt(tmp_path / "a.wav").tolist()


def test_bad_files_are_rejected_with_a_reason(tmp_path):
    read = lambda path: list(read_samples(path, Length()))  # noqa: E731
    (tmp_path / "text.wav").write_text("this is text, long enough to be looked at as a header")
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 24_000)
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan, 0], np.float32), 24_000, subtype="FLOAT")
    (tmp_path / "x.wav.gz").write_bytes(b"no gzip")
    for name, reason in (
        ("text.wav", "can't be read by libsndfile"),
        ("empty.wav", "can't be read by libsndfile"),
        ("none.wav", "no samples"),
        ("nan.wav", "not a finite number, at 1"),
        ("x.wav.gz", "gzip"),
    ):
        with pytest.raises(Rejected, match=reason):
            read(tmp_path / name)


def test_saved_and_loaded(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    assert AudioTokenizer.load(tokenizer.options, tmp_path).fingerprint == tokenizer.fingerprint
    with pytest.raises(CheckFailed, match="not those"):
        AudioTokenizer.load(AudioOptions(name="audio", weights="untrained:1", codebooks=2), tmp_path)


def test_a_checkpoint_file_travels_with_the_run(tmp_path):
    torch.save(encodec.untrained(3).state_dict(), tmp_path / "mine.th")
    soundfile.write(tmp_path / "a.wav", tone(0.5), 24_000)
    made = AudioTokenizer(AudioOptions(name="audio", weights=str(tmp_path / "mine.th")))
    expected = made.prompt(tmp_path / "a.wav").tolist()
    (tmp_path / "saved").mkdir()
    made.save(tmp_path / "saved")
    (tmp_path / "mine.th").unlink()
    loaded = AudioTokenizer.load(made.options, tmp_path / "saved")
    assert loaded.fingerprint == made.fingerprint
    assert loaded.prompt(tmp_path / "a.wav").tolist() == expected


def test_a_stranger_as_checkpoint_runs_no_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "proof"), "w")

    torch.save({"x": Payload()}, tmp_path / "bad.th")
    (tmp_path / "text.th").write_text("hello")
    for name in ("bad.th", "text.th"):
        with pytest.raises(CheckFailed, match="not a checkpoint of the `encodec` package"):
            encodec.load(tmp_path / name)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", ["nothing", "untrained:x"])
def test_unknown_weights_are_a_usage_error(name):
    with pytest.raises(UsageError):
        AudioTokenizer(AudioOptions(name="audio", weights=name)).fingerprint  # noqa: B018


def test_classes_are_codebooks_and_loudness(tmp_path):
    """Two seconds of a tone with silence between, cut anywhere, with an end id in the middle."""
    tokenizer = AudioTokenizer(AudioOptions(name="audio", weights="mini", codebooks=2))
    sound = np.concatenate([tone(1), np.zeros(24_000, np.float32), tone(1)])
    soundfile.write(tmp_path / "a.wav", sound, 24_000, subtype="FLOAT")
    ids = tokenizer.prompt(tmp_path / "a.wav")
    row = np.concatenate([ids[3:], [tokenizer.end], ids[:101]])
    classes = tokenizer.classes(row)
    books, loudness = classes["codebook"], classes["loudness"]
    assert [books.names[i] for i in books.of[:3]] == ["codebook 2", "codebook 1", "codebook 2"]
    assert books.names[books.of[len(ids) - 3]] == "end"
    assert loudness.of[0] == -1
    assert loudness.of[len(ids) - 3] == loudness.of[-1] == -1
    quiet = loudness.of[2 * 75 + 10 : 2 * 150 - 20]
    loud = np.concatenate([loudness.of[10:120], loudness.of[2 * 150 + 10 : len(ids) - 20]])
    assert (quiet == 1).mean() > 0.8
    assert (loud == 0).mean() > 0.8


@pytest.mark.parametrize("codebooks", [1, 3, 8])
def test_an_excerpt_is_the_sound_of_its_tokens(tmp_path, codebooks):
    tokenizer = AudioTokenizer(AudioOptions(name="audio", weights="mini", codebooks=codebooks))
    soundfile.write(tmp_path / "a.wav", tone(0.5), 24_000, subtype="FLOAT")
    ids = tokenizer.prompt(tmp_path / "a.wav")
    whole = tokenizer.excerpt(ids)
    assert len(whole.samples) == len(ids) * (320 // codebooks)
    tokenizer.decode(ids.tolist(), tmp_path / "b.wav")
    decoded, _ = soundfile.read(tmp_path / "b.wav", dtype="float32")
    frames = whole.samples.reshape(len(ids) // codebooks, -1)
    assert np.allclose(frames.clip(-1, 1), decoded.reshape(-1, 320)[:, : frames.shape[1]], atol=1e-3)
    assert not tokenizer.excerpt(ids[:1] + 1024 * (codebooks - 1)).samples.any() or codebooks == 1
