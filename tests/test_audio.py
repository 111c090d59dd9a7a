"""Sound: the codes of a single pass for any division into blocks, and files of every kind or a reason."""

import gzip
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import allowed

from shortcut_cli.codec import encodec
from shortcut_cli.codec.layout import MONO, STEREO
from shortcut_cli.data.documents import Document, Source
from shortcut_cli.data.sound import READ_FRAMES, SoundReader
from shortcut_cli.errors import CheckFailed, Rejected, UsageError
from shortcut_cli.tokenizers import audio
from shortcut_cli.tokenizers.audio import AudioOptions, AudioTokenizer
from shortcut_cli.tokenizers.base import Excerpt


def whole(document):
    return [("train", document.size)]


def tone(seconds, rate_hz=24_000, seed=0):
    """A glide with some noise, float32."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    noise = np.random.default_rng(seed).normal(0, 0.02, len(t))
    return (0.4 * np.sin(2 * np.pi * (200 + 300 * t) * t) * np.exp(-0.3 * t) + noise).astype(np.float32)


@pytest.fixture(scope="module")
def package():
    """The package's own model, without folded weight norms."""
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


def test_streams_encoded_together_have_the_same_codes_as_alone(package, codec):
    lengths = [60_001, 1, 319, 200_000, 24_000, 5000, 233_333, 48_000, 12_345, 80_000, 7]
    samples = [tone(10, seed=n)[:length] for n, length in enumerate(lengths)]
    assert len(samples) > encodec.ROWS
    expected = [one_pass(package, x)[:, :4] for x in samples]
    for order in (range(11), range(10, -1, -1), [3], [1], [4, 6]):
        found = many(codec, [cut(samples[n], 9000) for n in order])
        assert all(np.array_equal(codes, expected[n]) for codes, n in zip(found, order, strict=True))


def test_a_stream_that_breaks_off_fails_alone(codec):
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
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "0" * 64
    return Source(path, path.name, sha256, tmp_path / f"{path.name}.ids")


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
    groups = [[sources[place] for place in group] for group in tokenizer.group(sources, 2)]
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
    assert len(list(AudioTokenizer(AudioOptions(name="audio", weights="mini")).group(sources, 2))) == 201


def test_staging_together_writes_what_a_scan_would(tmp_path, tokenizer):
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
        assert list(tokenizer.scan(other)) == list(tokenizer.scan(one))
        assert other.staged.read_bytes() == staged == one.staged.read_bytes()


def test_ids_take_turns_and_decode(tmp_path, tokenizer, package):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(2.0), 24_000)
    (document,) = tokenizer.scan(source(tmp_path, path))
    assert document.size == 2 * 150
    assert document.units == {"second": 2.0}
    ids = tokenizer.prompt(path)
    assert (ids[0::2] < 1024).all()
    assert ((ids[1::2] >= 1024) & (ids[1::2] < 2048)).all()
    codes = one_pass(package, soundfile.read(path, dtype="float32")[0])[:, :2]
    assert ids.tolist() == (codes + np.array([0, 1024])).reshape(-1).tolist()
    assert all(allowed(tokenizer, ids[:place])[ids[place]] for place in range(10))
    assert (tokenizer.vocabulary, tokenizer.eos, tokenizer.stride) == (2049, 2048, 2)
    units = tokenizer.decode([*ids.tolist(), 5, tokenizer.eos, 7], tmp_path / "out.wav")
    info = soundfile.info(tmp_path / "out.wav")
    assert (info.samplerate, info.channels, info.subtype, info.frames) == (24_000, 1, "PCM_16", 48_000)
    assert units == {"second": 2.0}


def test_eos_is_allowed_only_between_frames(tokenizer):
    assert [bool(allowed(tokenizer, [0] * n)[tokenizer.eos]) for n in range(5)] == [False, False, True, False, True]


def test_a_cut_leaves_frames_whole(tmp_path, tokenizer):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1.0), 24_000)
    list(tokenizer.scan(source(tmp_path, path)))
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
    sound = SoundReader(path, scale=0.1)
    samples = np.concatenate(list(sound))
    # Oracle: libsndfile and soxr in one go. MP3 adds silence at both ends.
    rows, _ = soundfile.read(path, dtype="float32", always_2d=True)
    expected = soxr.resample(rows.mean(axis=1), rate_hz, 24_000)
    assert sound.seconds == len(rows) / rate_hz >= 1.5
    assert samples.shape == expected.shape
    assert np.abs(samples - expected).max() < 1e-6


def test_gzip(tmp_path, tokenizer):
    soundfile.write(tmp_path / "a.wav", tone(1.0), 24_000)
    (tmp_path / "b.wav.gz").write_bytes(gzip.compress((tmp_path / "a.wav").read_bytes()))
    assert tokenizer.prompt(tmp_path / "b.wav.gz").tolist() == tokenizer.prompt(tmp_path / "a.wav").tolist()


def test_bad_files_are_rejected_with_a_reason(tmp_path):
    (tmp_path / "text.wav").write_text("this is text, long enough to be looked at as a header")
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), 24_000)
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan, 0], np.float32), 24_000, subtype="FLOAT")
    (tmp_path / "x.wav.gz").write_bytes(b"no gzip")
    for name, reason in (
        ("text.wav", "is not WAV: it begins with 'this is t'"),
        ("empty.wav", r"is empty \(0 bytes\)"),
        ("none.wav", "no samples"),
        ("nan.wav", "not a finite number, at 1"),
        ("x.wav.gz", "gzip"),
    ):
        with pytest.raises(Rejected, match=reason):
            list(SoundReader(tmp_path / name))


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


def test_a_hostile_checkpoint_runs_no_code(tmp_path):
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
    """Two seconds of tone with silence between, starting in mid-frame, with EOS in the middle."""
    tokenizer = AudioTokenizer(AudioOptions(name="audio", weights="mini", codebooks=2))
    sound = np.concatenate([tone(1), np.zeros(24_000, np.float32), tone(1)])
    soundfile.write(tmp_path / "a.wav", sound, 24_000, subtype="FLOAT")
    ids = tokenizer.prompt(tmp_path / "a.wav")
    row = np.concatenate([ids[3:], [tokenizer.eos], ids[:101]])
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


def read(path, layout=MONO, scale=1.0):
    """All samples of a file, and its seconds."""
    sound = SoundReader(path, scale, rate_hz=layout.rate_hz, channels=layout.channels)
    return np.concatenate(list(sound)), sound.seconds


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_mono_is_the_mean_of_all_channels(tmp_path, channels):
    rows = np.random.default_rng(channels).uniform(-1, 1, (5000, channels)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", rows, 24_000, subtype="FLOAT")
    samples, seconds = read(tmp_path / "a.wav")
    # Adding six numbers below 1 in float32 has an error of at most five half units in the last place of 6.
    assert samples == pytest.approx(rows.astype(float).mean(axis=1), abs=5 * 2.0**-22)
    assert seconds == 5000 / 24_000


def test_opposite_channels_are_silence_and_equal_ones_as_loud_as_one(tmp_path):
    one = tone(0.5)
    for name, other in (("opposite", -one), ("equal", one)):
        soundfile.write(tmp_path / f"{name}.wav", np.stack((one, other), 1), 24_000, subtype="FLOAT")
    assert not read(tmp_path / "opposite.wav")[0].any()
    assert np.array_equal(read(tmp_path / "equal.wav")[0], one)


def test_stereo_is_two_channels_unchanged_or_one_twice_or_the_mean_of_more_twice(tmp_path):
    rows = np.random.default_rng(0).integers(-(2**15), 2**15, (4000, 4)).astype(np.int16)
    for channels in (1, 2, 4):
        soundfile.write(tmp_path / "a.wav", rows[:, :channels], 48_000)
        samples, seconds = read(tmp_path / "a.wav", layout=STEREO)
        exact = rows[:, :channels] / 2.0**15
        expected = exact if channels == 2 else np.repeat(exact.mean(axis=1, keepdims=True), 2, axis=1)
        assert np.array_equal(samples, expected)  # a mean of one or four sixteen-bit numbers is exact in float32
        assert seconds == 4000 / 48_000


@pytest.mark.parametrize("rate_hz", [8000, 11_025, 24_000, 44_100, 48_000])
@pytest.mark.parametrize(("layout", "out_hz"), [(MONO, 24_000), (STEREO, 48_000)])
def test_a_tone_keeps_its_pitch_loudness_and_place_from_any_rate(tmp_path, rate_hz, layout, out_hz):
    count = rate_hz + 137
    sine = lambda n, hz: 0.5 * np.sin(2 * np.pi * 440 * np.arange(n) / hz)  # noqa: E731
    soundfile.write(tmp_path / "a.wav", sine(count, rate_hz), rate_hz, subtype="FLOAT")
    samples, seconds = read(tmp_path / "a.wav", scale=0.1, layout=layout)
    assert seconds == count / rate_hz
    assert abs(len(samples) - count * out_hz / rate_hz) <= 1
    expected = sine(len(samples), out_hz)
    inner = slice(out_hz // 10, -out_hz // 10)  # the filter rings at the edges
    # soxr's default is "HQ": 20 bits.
    for found in samples.reshape(len(samples), -1).T:
        assert np.abs(found - expected)[inner].max() < 2.0**-17


@pytest.mark.parametrize(("layout", "bad"), [(MONO, np.nan), (STEREO, np.inf), (STEREO, np.nan)])
def test_a_sample_that_is_not_finite_is_named_by_its_place_in_the_file(tmp_path, layout, bad):
    rows = np.zeros((3000, 2), np.float32)
    rows[2345, 1] = rows[2999, 0] = bad
    soundfile.write(tmp_path / "a.wav", rows, layout.rate_hz, subtype="FLOAT")
    with pytest.raises(Rejected, match=r"not a finite number, at 2345$"):
        read(tmp_path / "a.wav", layout=layout, scale=1000 / READ_FRAMES)


class Script:
    """A codec with given codes, and a given function from codes to sound."""

    codebooks = 8

    def __init__(self, encoded=(), sound=None):
        self.encoded, self.sound, self.heard, self.given = encoded, sound, [], []

    def encode(self, blocks, codebooks):
        self.heard.append((np.concatenate(list(blocks)), codebooks))
        yield from self.encoded

    def decode(self, coded):
        for one in coded:
            self.given.append(one)
            yield self.sound(one)


def scripted(codebooks, segments=False, **script):
    """A tokenizer around such a codec."""
    weights = f"untrained{'_48khz' * segments}:0"
    tokenizer = AudioTokenizer(AudioOptions(name="audio", weights=weights, codebooks=codebooks))
    tokenizer.codec = Script(**script)
    return tokenizer


def test_ids_are_the_codes_of_each_frame_offset_by_codebook(tmp_path):
    codes = np.random.default_rng(0).integers(0, 1024, (50, 3))
    tokenizer = scripted(3, encoded=[codes[:20], codes[20:21], codes[21:]])
    sound = tone(0.5)
    soundfile.write(tmp_path / "a.wav", sound, 24_000, subtype="FLOAT")
    expected = [1024 * book + int(codes[frame, book]) for frame in range(50) for book in range(3)]
    assert tokenizer.prompt(tmp_path / "a.wav").tolist() == expected
    given = replace(source(tmp_path, tmp_path / "a.wav"), start=77)
    (document,) = tokenizer.scan(given)
    assert document == Document(given.sha256, 77, 150, {"second": 0.5}, {})
    assert np.fromfile(tmp_path / "a.wav.ids", "<u2").tolist() == expected
    for heard, codebooks in tokenizer.codec.heard:
        assert np.array_equal(heard, sound)
        assert codebooks == 3


def test_ids_of_segments_have_the_level_before_their_codes(tmp_path):
    codes = np.random.default_rng(1).integers(0, 1024, (310, 2))
    tokenizer = scripted(2, segments=True, encoded=[(7, codes[:150]), (0, codes[150:300]), (63, codes[300:])])
    rows = np.random.default_rng(1).uniform(-1, 1, (99_000, 2)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", rows, 48_000, subtype="FLOAT")
    expected = []
    for level, first, last in ((7, 0, 150), (0, 150, 300), (63, 300, 310)):
        expected += [2048 + level, *(1024 * book + int(codes[n, book]) for n in range(first, last) for book in (0, 1))]
    assert (tokenizer.vocabulary, tokenizer.eos, tokenizer.stride) == (2048 + 64 + 1, 2048 + 64, 301)
    assert tokenizer.prompt(tmp_path / "a.wav").tolist() == expected
    assert np.array_equal(tokenizer.codec.heard[0][0], rows)
    tokenizer.codec.sound = lambda one: np.full((len(one[1]) * 320, 2), one[0] / 100)
    units = tokenizer.decode([*expected, tokenizer.eos, 3], tmp_path / "b.wav")
    assert units == {"second": 310 * 320 / 48_000}
    assert [level for level, _ in tokenizer.codec.given] == [7, 0, 63]
    assert np.array_equal(np.concatenate([found for _, found in tokenizer.codec.given]), codes)
    found = tokenizer.classes(np.array([*expected, tokenizer.eos]))["codebook"]
    kinds = ["level", *["codebook 1", "codebook 2"] * 150] * 2 + ["level", *["codebook 1", "codebook 2"] * 10, "end"]
    assert [found.names[number] for number in found.of] == kinds
    assert tokenizer.excerpt(np.array(expected)) == Excerpt()


@pytest.mark.parametrize("left_over", [0, 1, 2, 3, 7, 299])
def test_an_incomplete_frame_of_a_segment_is_dropped(tmp_path, left_over):
    tokenizer = scripted(3, segments=True, sound=lambda one: np.zeros((len(one[1]) * 320, 2)))
    frame = [5, 1024 + 6, 2048 + 7]
    ids = [3072 + 9, *frame * 150, 3072 + 8, *frame * 150][: 451 + left_over]
    units = tokenizer.decode(ids, tmp_path / "a.wav")
    frames = 150 + max(0, left_over - 1) // 3
    assert units["second"] == frames * 320 / 48_000
    assert sum(len(codes) for _, codes in tokenizer.codec.given) == frames
    assert all(np.array_equal(codes, np.tile([5, 6, 7], (len(codes), 1))) for _, codes in tokenizer.codec.given)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 9, 10, 18, 100])
def test_blocks_are_decoded_in_whole_frames(tmp_path, monkeypatch, count):
    monkeypatch.setattr(audio, "BLOCK_IDS", 11)
    tokenizer = scripted(3, sound=lambda codes: np.zeros(len(codes) * 320))
    codes = np.random.default_rng(count).integers(0, 1024, (34, 3))
    ids = (codes + np.array([0, 1024, 2048])).reshape(-1)[:count]
    ended = [*ids, tokenizer.eos, 5, tokenizer.eos, 6]
    assert tokenizer.decode(ended, tmp_path / "a.wav") == {"second": count // 3 * 320 / 24_000}
    assert np.array_equal(np.concatenate([codes[:0], *tokenizer.codec.given]), codes[: count // 3])


def test_sound_is_written_in_steps_of_sixteen_bits_and_clipped_at_full_scale(tmp_path):
    samples = np.array([0, 0.25, -0.25, 0.5, 1, -1, 1.5, -1.5, 100, -100, 2.0**-15], np.float32)
    tokenizer = scripted(1, sound=lambda _: samples)
    units = tokenizer.decode([3], tmp_path / "a.wav")
    found, rate_hz = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert found.tolist() == [0, 2**13, -(2**13), 2**14, *[2**15 - 1, -(2**15)] * 3, 1]
    assert (rate_hz, units) == (24_000, {"second": 11 / 24_000})


def staged(tmp_path, ids, seconds):
    """A source that has been scanned."""
    found = Source(tmp_path / "gone.wav", "gone.wav", "5" * 64, tmp_path / "gone.ids", start=1000)
    found.staged.write_bytes(np.asarray(ids, "<u2").tobytes())
    (tmp_path / "gone.ids.json").write_text(json.dumps({"units": {"second": seconds}, "account": {}}))
    return found


@pytest.mark.parametrize(
    ("segments", "sizes", "expected"),
    [
        # Three codebooks, 100 frames of 1/75 s; the sound may fill only part of the last one.
        (False, (300,), [(300, 1.25)]),
        (False, (100, 101, 99), [(99, 33 / 75), (102, 34 / 75), (99, 33 / 75)]),
        (False, (2, 298), [(0, 0), (300, 1.25)]),
        (False, (3, 296, 1), [(3, 1 / 75), (294, 98 / 75), (3, 1 / 75)]),
        # Segments of 1 + 3 * 150 ids, each 0.99 s after the one before, and 20 frames of 1/150 s.
        (True, (963,), [(963, 2.1)]),
        (True, (500, 463), [(451, 0.99), (512, 0.99 + 20 / 150)]),
        (True, (450, 1, 512), [(0, 0), (451, 0.99), (512, 0.99 + 20 / 150)]),
        (True, (940, 23), [(902, 1.98), (61, 20 / 150)]),
    ],
)
def test_parts_begin_with_a_frame_or_segment_and_have_the_length_of_their_frames(tmp_path, segments, sizes, expected):
    tokenizer = scripted(3, segments)
    frame = [1, 1025, 2049]
    row = [3072, *frame * 150, 3073, *frame * 150, 3074, *frame * 20] if segments else frame * 100
    found = staged(tmp_path, row, sum(seconds for _, seconds in expected))
    names = ("train", "val", "test")
    chunks = list(tokenizer.encode(found, lambda _: list(zip(names, sizes, strict=False)), 1))
    ids = [np.concatenate([np.zeros(0), *chunk.ids]).tolist() for chunk in chunks]
    assert [chunk.split for chunk in chunks] == list(names[: len(sizes)])
    assert [part for one in ids for part in one] == row
    assert [len(one) for one in ids] == [count for count, _ in expected]
    assert [chunk.units["second"] for chunk in chunks] == pytest.approx([seconds for _, seconds in expected], abs=1e-12)


def test_the_level_of_an_incomplete_segment_is_not_a_frame(tmp_path):
    row = [1024, *range(150), 1025, *range(20)]
    chunks = scripted(1, segments=True).encode(staged(tmp_path, row, 9.0), lambda _: [("train", 151), ("val", 21)], 1)
    assert [chunk.units["second"] for chunk in chunks] == pytest.approx([0.99, 20 / 150], abs=1e-12)


def test_a_whole_document_comes_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(audio, "BLOCK_IDS", 7)
    tokenizer = scripted(2)
    row = np.arange(20) % 2 * 1024 + np.arange(20)
    (chunk,) = tokenizer.encode(staged(tmp_path, row, 0.125), whole, 1)
    blocks = [block.tolist() for block in chunk.ids]
    assert [len(block) for block in blocks] == [7, 7, 6]
    assert [number for block in blocks for number in block] == row.tolist()
    assert chunk.units == {"second": 0.125}


@pytest.mark.parametrize(("codebooks", "segments"), [(1, False), (3, False), (1, True), (2, True)])
def test_the_constraint_allows_each_codebook_in_its_turn(codebooks, segments):
    tokenizer = scripted(codebooks, segments)
    books = [set(range(1024 * book, 1024 * book + 1024)) for book in range(codebooks)]
    levels, end = set(range(1024 * codebooks, 1024 * codebooks + 64)), 1024 * codebooks + 64 * segments
    frames = 150 if segments else 10
    turns = [*([levels] * segments), *books * frames] * 2
    # EOS may follow a complete frame.
    ends = [*([False] * segments), *([False] * (codebooks - 1) + [True]) * frames] * 2
    constraint = tokenizer.constraint()
    for place, turn in enumerate(turns):
        expected = turn | ({end} if place and ends[place - 1] else set())
        assert set(np.flatnonzero(constraint.allowed(5)).tolist()) == expected, place
        assert constraint.needed == max(0, codebooks + segments - place)
        constraint.push(min(turn))


def test_frames_thirty_decibels_below_the_loudest_are_silent():
    loud, level = 0.5, [0, -29.9, -30.1, -60, 0, -10]
    amplitude = {code: loud * 10 ** (db / 20) for code, db in enumerate(level)}
    sign = np.where(np.arange(320) % 2, 1, -1)
    tokenizer = scripted(
        2, sound=lambda codes: np.concatenate([amplitude[int(code)] * sign for code in codes[:, 0]]).astype(np.float32)
    )
    end = tokenizer.eos
    # Starts in mid-frame, and has an incomplete frame before an EOS and one at the end.
    ids = np.array([1024, *(0, 1024), *(1, 1025), *(2, 1026), 4, end, *(3, 1029), *(5, 1024), end, end, 0])
    found = tokenizer.classes(ids)["loudness"]
    names = [found.names[number] if number >= 0 else "" for number in found.of]
    assert names == ["", *["loud"] * 4, *["silent"] * 2, "", "", *["silent"] * 2, *["loud"] * 2, "", "", ""]
    excerpt = tokenizer.excerpt(ids)
    assert excerpt.rate_hz == 24_000
    heights = np.abs(excerpt.samples.reshape(len(ids), 160))
    expected = [0, *[amplitude[0]] * 2, *[amplitude[1]] * 2, *[amplitude[2]] * 2, 0, 0, *[amplitude[3]] * 2]
    expected += [*[amplitude[5]] * 2, 0, 0, 0]
    assert heights == pytest.approx(np.repeat(np.array(expected)[:, None], 160, 1), rel=1e-6)


def test_fingerprints_follow_the_weights_and_the_codebooks():
    def fingerprint(weights="untrained:0", codebooks=2):
        return AudioTokenizer(AudioOptions(name="audio", weights=weights, codebooks=codebooks)).fingerprint

    assert fingerprint() == fingerprint()
    different = [fingerprint(), fingerprint(codebooks=3), fingerprint("untrained:1"), fingerprint("untrained_48khz:0")]
    assert len({*different, fingerprint("mini")}) == 5


def test_more_codebooks_than_the_codec_has_are_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"tokenizer\.codebooks is 32, but mini has 8"):
        AudioTokenizer(AudioOptions(name="audio", weights="mini", codebooks=32)).codec  # noqa: B018


def test_files_of_segments_are_scanned_one_by_one(tmp_path):
    sources = [source(tmp_path, tmp_path / f"{number}.wav") for number in range(20)]
    assert list(scripted(1, segments=True).group(sources, 2)) == [[place] for place in range(20)]


def test_sound_is_read_and_computed_in_blocks_of_the_requested_scale(tmp_path, monkeypatch):
    monkeypatch.setattr("shortcut_cli.data.sound.READ_FRAMES", 1000)
    soundfile.write(tmp_path / "a.wav", tone(0.2), 24_000)
    asked = []
    monkeypatch.setattr("shortcut_cli.codec.loading.codec", lambda _, frames: asked.append(frames) or Script())
    for scale in (0.3, 1, 2.5):
        tokenizer = AudioTokenizer(AudioOptions(name="audio", weights="untrained:0"))
        tokenizer.block_scale = scale
        lengths = [len(block) for block in tokenizer._reader(tmp_path / "a.wav")]
        assert {*lengths[:-1]} == {round(1000 * scale)}
        assert sum(lengths) == 4800
        assert tokenizer.codec.codebooks == 8
        assert asked.pop() == round(encodec.BLOCK_FRAMES * scale)


@pytest.mark.parametrize(("codebooks", "frames"), [(1, 2), (2, 3), (3, 2), (4, 2), (8, 1)])
def test_in_a_segment_the_codebooks_follow_its_level(codebooks, frames):
    """Segment by segment: a level, then the codebooks in turn; the end only behind a whole frame or a segment."""
    masks = np.eye(codebooks + 2, dtype=bool)  # an id for each codebook, the end, a level
    constraint = audio.FrameConstraint(masks, codebooks, 1 + codebooks * frames)
    end, level = codebooks, codebooks + 1
    for segment in range(3):
        for frame in range(frames + 1):
            for book in range(codebooks) if frame else [level]:
                may_end = (segment > 0 and frame == 0) or (frame > 1 and book == 0)
                assert np.flatnonzero(constraint.allowed(9)).tolist() == sorted({book, *([end] if may_end else [])})
                constraint.push(book)


@pytest.mark.parametrize(
    ("weights", "small"), [("mini", 0), ("untrained:0", 0), ("untrained:0", 1), ("untrained_48khz:0", 0)]
)
def test_only_what_is_given_of_a_prompt_is_encoded_and_to_the_same_ids(tmp_path, monkeypatch, weights, small):
    """The oracle is the whole file's encoding, and `first` on it."""
    made = AudioTokenizer(AudioOptions(name="audio", weights=weights, codebooks=2))
    monkeypatch.setattr("shortcut_cli.tokenizers.audio.SMALL_BYTES", 10**9 * small)
    made.block_scale = 0.1
    rate = made.layout.rate_hz
    noise = np.random.default_rng(1).normal(0, 0.2, (6 * rate, made.layout.channels)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, rate, subtype="FLOAT")
    whole = made.prompt(tmp_path / "a.wav")
    for seconds in (0.02, 0.5, 0.995, 1.0, 1.4, 1.981, 2.0, 5.9):
        count = made.first(whole, seconds)
        given = made.prompt(tmp_path / "a.wav", {"seconds": seconds})
        assert made.first(given, seconds) == count
        assert given[:count].tolist() == whole[:count].tolist()
        assert len(given) < len(whole) or seconds > 3
    for tokens in (2, 3, 150, 301, 302, 303):
        given = made.prompt(tmp_path / "a.wav", {"tokens": tokens})
        assert given.tolist() == whole[: len(given)].tolist()
        assert tokens + made.stride <= len(given) < len(whole)
    for limit in ({"seconds": 6.0}, {"seconds": 100.0}, {"tokens": 10**6}):
        assert made.prompt(tmp_path / "a.wav", limit).tolist() == whole.tolist()
