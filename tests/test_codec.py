"""Codecs of our own: the codes of one pass for any division into blocks, and a training that repeats to the bit."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import USERS_CACHE, set_flags, shortcut
from torch.nn import functional as F

from shortcut_cli import clips, recipe, sealed
from shortcut_cli.codec import encodec, frame, objectives, opening, own, rvq, weights
from shortcut_cli.codec.stream import STEREO
from shortcut_cli.errors import CheckFailed, Interrupted, UsageError
from shortcut_cli.stages import codec_training
from shortcut_cli.tokenizers.audio import AudioOptions, AudioTokenizer, Length, read_samples

SMALL = [
    "codec.codebooks=4",
    "codec.dimension=8",
    "codec.frame.width=16",
    "codec.frame.encoder_blocks=2",
    "codec.frame.decoder_blocks=2",
    "codec.seanet.filters=2",
    "data.segment_s=0.5",
    "data.val=0.3",
    "train.steps=6",
    "train.batch_size=4",
    "train.warmup=2",
    "train.log_every=2",
    "train.eval_every=3",
    "train.eval_windows=3",
    "train.discriminator_filters=2",
]


def quiet(*_, **__):
    pass


def glide(seconds, seed=0, rate_hz=24_000):
    """A glide with some noise, float32."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    noise = np.random.default_rng(seed).normal(0, 0.02, len(t))
    return (0.4 * np.sin(2 * np.pi * (200 + 60 * seed + 300 * t) * t) + noise).astype(np.float32)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A folder with six sounds of two speakers and one file that is none."""
    folder = tmp_path_factory.mktemp("sounds")
    for number in range(6):
        soundfile.write(folder / f"speaker{number % 3}-{number}.wav", glide(1.5, number), 24_000)
    (folder / "broken.wav").write_text("no sound at all, but long enough for a header")
    return folder


def keys(*settings):
    return recipe.read_codec("codec-mini", [*SMALL, *settings])


def train(made, sounds, folder, resume="auto", stop=None):
    return codec_training.train(
        made,
        [str(sounds)],
        folder,
        n_workers=1,
        device="cpu",
        resume=resume,
        report=quiet,
        stop=nullcontext(stop or (lambda: None)),
    )


@pytest.fixture(scope="module")
def codec():
    """A small frame codec whose codebooks are all in use."""
    network = own.network(keys().codec, seed=1)
    generator = torch.Generator().manual_seed(0)
    for number, layer in enumerate(network.quantizer.vq.layers):
        layer._codebook.embed.copy_(torch.randn(1024, 8, generator=generator) * 0.5**number)
        layer._codebook.inited.fill_(1)
    return frame.Codec(network)


def coded(codec, x, size):
    blocks = [x[first : first + size] for first in range(0, len(x), size)]
    return np.concatenate(list(codec.encode(blocks, codec.codebooks)))


@torch.inference_mode()
def one_pass(codec, x):
    z = codec.network.encode(torch.from_numpy(x)[None])
    return codec.network.quantizer.vq.encode(z)[:, 0].T.numpy()


@pytest.mark.parametrize("length", [1, 319, 320, 321, 480, 481, 24_000, 24_480, 24_481, 47_999, 48_000, 60_123, 96_001])
def test_codes_equal_those_of_one_pass(codec, length):
    x = glide(4.1)[:length]
    expected = one_pass(codec, x)
    assert expected.shape == (math.ceil(length / 320), 4)
    assert len(np.unique(expected)) > min(20, len(expected))
    for size in (length, 1_000, 24_000, 31_111):
        assert np.array_equal(coded(codec, x, size), expected)


@pytest.mark.parametrize("frames", [1, 2, 3, 74, 75, 76, 77, 150, 151, 200])
def test_decoding_in_blocks_equals_one_pass(codec, frames):
    codes = np.random.default_rng(0).integers(0, 1024, (frames, 4))
    with torch.inference_mode():
        expected = codec.network.decode(codec.network.quantizer.vq.decode(torch.from_numpy(codes.T.copy())[:, None]))
    for size in (frames, 40, 75):
        blocks = [codes[first : first + size] for first in range(0, frames, size)]
        found = np.concatenate(list(codec.decode(blocks)))
        assert found.shape == (frames * 320,)
        assert np.abs(found - expected[0].numpy()).max() < 1e-5 * expected.abs().max()


def test_streams_do_not_disturb_each_other(codec):
    x, y = glide(3, 1), glide(3, 2)
    cut = lambda s: [s[first : first + 9000] for first in range(0, len(s), 9000)]  # noqa: E731
    together = zip(*zip(codec.encode(cut(x), 4), codec.encode(cut(y), 4), strict=True), strict=True)
    for found, alone in zip(together, (x, y), strict=True):
        assert np.array_equal(np.concatenate(found), coded(codec, alone, len(alone)))


def test_windows_that_overlap_add_up_to_the_sound():
    # Analysis and synthesis without a network in between: the identity.
    x = torch.from_numpy(glide(0.5))[None]
    padded = F.pad(x, (frame.EDGE, -x.shape[1] % frame.HOP + frame.EDGE))
    hann = torch.hann_window(frame.WINDOW)
    windows = padded.unfold(-1, frame.WINDOW, frame.HOP) * hann * hann
    y = frame.overlap(windows) / frame.weight(windows.shape[1], x).clamp(min=1e-3)
    assert torch.allclose(y[:, frame.EDGE : -frame.EDGE][:, : x.shape[1]], x, atol=1e-5)


def test_a_frame_knows_nothing_of_what_is_more_than_20_ms_later(codec):
    x = glide(2.0)
    changed = x.copy()
    changed[24_000 + frame.EDGE :] = 0
    assert np.array_equal(one_pass(codec, x)[:75], one_pass(codec, changed)[:75])
    assert not np.array_equal(one_pass(codec, x)[75:], one_pass(codec, changed)[75:])


def test_quantizing_passes_gradients_and_adds_only_the_codebooks_asked_for():
    quantizer = encodec.quantizer(8, 4, 1024, 0.99).train()
    torch.manual_seed(0)
    z = torch.randn(3, 8, 50, requires_grad=True)
    counts = torch.tensor([1, 4, 2])
    rvq.quantize(quantizer, z, counts)  # k-means start
    quantizer.eval()
    y, penalty = rvq.quantize(quantizer, z, counts)
    codes = quantizer.vq.encode(z.detach())
    for clip, count in enumerate(counts.tolist()):
        assert torch.allclose(y[clip], quantizer.vq.decode(codes[:count, clip : clip + 1])[0], atol=1e-6)
    (gradient,) = torch.autograd.grad(y.sum(), z, retain_graph=True)
    assert torch.equal(gradient, torch.ones_like(z))
    assert torch.autograd.grad(penalty, z)[0].abs().sum() > 0


def test_dead_codes_are_put_where_vectors_are():
    quantizer = encodec.quantizer(8, 1, 1024, 0.99).train()
    torch.manual_seed(0)
    z = torch.randn(4, 8, 400)
    rvq.quantize(quantizer, z, torch.full((4,), 1))
    book = quantizer.vq.layers[0]._codebook
    with torch.no_grad():
        book.embed[:500] += 100  # where nothing will ever fall
        book.embed_avg[:500] += 100 * book.cluster_size[:500, None]
    for _ in range(600):
        rvq.quantize(quantizer, z, torch.full((4,), 1))
    assert book.embed.abs().max() < 10
    codes = quantizer.vq.layers[0].encode(z)
    assert rvq.perplexities(codes.reshape(1, -1), 1024)[0] > 500


def test_perplexity_is_the_number_of_equally_used_codes():
    codes = torch.stack((torch.arange(96) % 12, torch.zeros(96, dtype=torch.long)))
    assert rvq.perplexities(codes, 1024) == pytest.approx([12, 1])


def test_mel_bands_cover_every_frequency_once():
    bands = objectives.mel_bands(2048, 128)
    assert torch.allclose(bands.sum(0), torch.ones(128))
    assert (bands[1:-1].sum(1) > 0).all()
    assert (objectives.mel_bands(256, 20).argmax(0).diff() > 0).all()


def test_distances():
    x = torch.from_numpy(np.stack([glide(1.0), glide(1.0, 1)]))
    mel = objectives.LogMel()
    assert mel(x, x) == 0
    assert mel(x, x * math.e).item() == pytest.approx(1, abs=0.05)  # natural logarithm
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    noise -= x * (x * noise).sum(1, keepdim=True) / x.square().sum(1, keepdim=True)  # orthogonal to x
    noise *= (x.square().sum(1, keepdim=True) / noise.square().sum(1, keepdim=True)).sqrt() * 10 ** (-12 / 20)
    assert objectives.si_sdr_db(x, 3 * (x + noise)).tolist() == pytest.approx([12, 12], abs=1e-3)


def test_the_balancer_gives_each_loss_its_share():
    balancer = objectives.Balancer({"a": 1.0, "b": 3.0})
    w = torch.ones(2, 10, requires_grad=True)
    y = w * 1.0
    balancer.backward({"a": 1000 * y[:, 0].sum(), "b": 0.001 * y[:, 1].sum()}, y)
    assert w.grad[:, 0].tolist() == pytest.approx([0.25, 0.25])
    assert w.grad[:, 1].tolist() == pytest.approx([0.75, 0.75])


def test_groups_stay_together_and_both_splits_have_some():
    names = {str(number): f"speaker{number % 5}-{number}.wav" for number in range(20)}
    splits = clips.divide(names, r"speaker\d+", 0.2)
    by_speaker = {name.split("-")[0]: set() for name in names.values()}
    for sha256, split in splits.items():
        by_speaker[names[sha256].split("-")[0]].add(split)
    assert sorted(map(tuple, by_speaker.values())) == [("train",)] * 4 + [("val",)]
    with pytest.raises(UsageError, match="make 1 groups"):
        clips.divide(names, "speaker", 0.2)


def test_windows_depend_on_seed_and_step_alone(sounds, tmp_path):
    made = keys("data.speed=0.2", "data.gain_db=6", "data.mix=0.5").data
    staged = clips.stage([str(sounds)], tmp_path, made, n_workers=1, report=quiet)
    windows = clips.Windows(staged, "train", made, 1)
    again = clips.Windows(clips.stage([str(sounds)], tmp_path, made, n_workers=2, report=quiet), "train", made, 1)
    x = windows.batch(3, 5)
    assert x.shape == (5, 12_000)
    assert x.dtype == np.float32
    assert np.abs(x).max() <= 1
    assert np.array_equal(again.batch(3, 5), x)
    assert not np.array_equal(windows.batch(4, 5), x)
    assert not np.array_equal(clips.Windows(staged, "train", made, 2).batch(3, 5), x)
    assert [entry["path"] for entry in map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())] == [
        "broken.wav"
    ]


def digest(path):
    return {name: tensor.clone() for name, tensor in own.read(path)["weights"].items()}


@pytest.mark.parametrize("settings", [(), ("train.adversarial_from=2",), ("codec.network=seanet",)])
def test_a_training_that_was_stopped_ends_in_the_same_weights(sounds, tmp_path, settings):
    made = keys(*settings)
    summary = train(made, sounds, tmp_path / "whole")
    assert (summary["step"], summary["worked"], summary["rejected"]) == (6, True, 1)
    stops = iter([None, 75, None, 75, 130])
    for _ in range(3):
        with pytest.raises(Interrupted):
            train(made, sounds, tmp_path / "parts", stop=lambda: next(stops))
    train(made, sounds, tmp_path / "parts")
    whole, parts = (digest(tmp_path / name / "codec.pt") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    states = [sealed.load(tmp_path / name / "resume.pt", "resume.pt") for name in ("whole", "parts")]
    assert all(torch.equal(states[0]["network"][name], states[1]["network"][name]) for name in states[0]["network"])
    texts = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "parts")]
    logs = [[json.loads(line) | {"seconds": 0} for line in text.splitlines()] for text in texts]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [2, 3, 4, 6, 6]
    assert train(made, sounds, tmp_path / "whole")["worked"] is False


def test_another_recipe_or_other_files_are_refused(sounds, tmp_path):
    train(keys(), sounds, tmp_path / "run")
    with pytest.raises(UsageError, match=r"train.lr: 0.001 -> 0.01"):
        train(keys("train.lr=0.01"), sounds, tmp_path / "run")
    (tmp_path / "more").mkdir()
    soundfile.write(tmp_path / "more" / "x.wav", glide(1.0, 9), 24_000)
    for name in sounds.iterdir():
        (tmp_path / "more" / name.name).symlink_to(name)
    with pytest.raises(UsageError, match="its files differ"):
        train(keys(), tmp_path / "more", tmp_path / "run")


def test_training_lowers_the_distance_and_a_run_uses_the_codec(sounds, tmp_path):
    made = ["train.steps=60", "train.lr=0.003", "train.eval_every=60"]
    found = shortcut("codec", "train", str(sounds), "--out", "c", "--json", *set_flags(*SMALL, *made), cwd=tmp_path)
    assert json.loads(found.stdout)["codec"] == "c/codec.pt"
    log = [json.loads(line) for line in (tmp_path / "c" / "log.jsonl").read_text().splitlines()]
    losses = [line["mel"] for line in log if "mel" in line]
    assert losses[-1] < 0.85 * losses[0]
    flags = set_flags("tokenizer.weights=c/codec.pt", "tokenizer.codebooks=4")
    (tmp_path / "w").mkdir()
    for path in sounds.glob("speaker*.wav"):
        (tmp_path / "w" / path.name).symlink_to(path)
    shortcut("prepare", "audio", "w", "--out", "s", *flags, cwd=tmp_path)
    proof = shortcut("prove", "tokens", "s", "w", "--json", cwd=tmp_path)
    assert json.loads(proof.stdout)["different"] == []
    refused = shortcut(
        "prepare", "audio", "w", "--out", "t", *flags[:-1], "tokenizer.codebooks=5", cwd=tmp_path, check=2
    )
    assert "has 4" in refused.stderr


def test_eval_measures_every_bandwidth_and_opus(sounds, tmp_path):
    train(keys(), sounds, tmp_path / "run")
    done = shortcut("codec", "eval", "run/codec.pt", str(sounds), "--out", "heard", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["schema_version"] == 1
    assert [row["kbps"] for row in found["bandwidths"]] == [0.75, 1.5, 3.0]
    assert found["files"] == 6
    assert [entry["path"] for entry in found["rejects"]] == ["broken.wav"]
    assert found["opus"]["si_sdr_db"] > found["bandwidths"][-1]["si_sdr_db"]
    assert 4 < found["opus"]["kbps"] < 16
    assert len(found["perplexity"]) == 4
    assert found["encode_x_realtime"] > 1
    kept = sorted(path.name for path in (tmp_path / "heard").iterdir())
    assert len(kept) == 6 * 4
    assert kept[0] == "speaker0-0-0.75kbps.wav"
    assert soundfile.info(tmp_path / "heard" / kept[0]).frames == 36_000


def test_stoi_and_pesq_are_those_of_their_packages(tmp_path):
    stoi, pesq = pytest.importorskip("pystoi").stoi, pytest.importorskip("pesq").pesq
    import soxr

    from shortcut_cli.stages.codec_evaluation import Measures

    x = glide(2.0) * np.repeat(np.random.default_rng(1).uniform(0.1, 1, 20), 2400).astype(np.float32)
    y = x + np.random.default_rng(0).normal(0, 0.05, len(x)).astype(np.float32)
    found = Measures()(x, y)
    assert found["stoi"] == stoi(x, y, 24_000)
    assert found["pesq"] == pesq(16_000, *(soxr.resample(s, 24_000, 16_000) for s in (x, y)), "wb")
    silence = np.zeros(24_000, np.float32)
    assert Measures()(silence, silence)["stoi"] is None


def test_a_damaged_or_foreign_codec_is_noticed(sounds, tmp_path):
    train(keys(), sounds, tmp_path / "run")
    path = tmp_path / "run" / "codec.pt"
    whole = path.read_bytes()
    for place in (5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises((CheckFailed, UsageError)):
            opening.of_file(path)
    path.write_bytes(whole)
    kept = own.read(path)
    for change in ({"format": 2}, {"kind": "other"}, {"recipe": kept["recipe"] | {"codec": {"codebooks": 3}}}):
        sealed.save(tmp_path / "other.pt", kept | change)
        with pytest.raises(CheckFailed):
            opening.of_file(tmp_path / "other.pt")


def test_48_khz_codes_are_those_of_the_package_and_the_loudness_comes_back(tmp_path):
    model = encodec.untrained(0, STEREO).eval()
    model.set_target_bandwidth(24.0)
    x = np.stack((glide(2.51, 1, 48_000), glide(2.51, 2, 48_000)), 1) * 0.3  # (N, 2)
    with torch.inference_mode():
        expected = model.encode(torch.from_numpy(x.T.copy())[None])
        sound = model.decode(expected)[0].T.numpy()
    segments = encodec.Segments(model)
    for size in (len(x), 7_000, 48_000):
        found = list(segments.encode([x[first : first + size] for first in range(0, len(x), size)], 16))
        assert len(found) == len(expected)
        for (level, codes), (wanted, scale) in zip(found, expected, strict=True):
            assert np.array_equal(codes, wanted[0].T.numpy())
            assert level == round(-20 * math.log10(scale.item()))
    y = np.concatenate(list(segments.decode(found)))
    assert y.shape == sound.shape
    assert np.abs(y - sound).max() < 0.07 * np.abs(sound).max()  # half a dB is six per cent
    exact = [(-20 * math.log10(scale.item()), codes[0].T.numpy()) for codes, scale in expected]
    assert np.abs(np.concatenate(list(segments.decode(exact))) - sound).max() < 1e-5 * np.abs(sound).max()


def test_48_khz_stereo_from_file_to_file(tmp_path):
    for number in range(4):
        x = np.stack((glide(1.7, number, 44_100), glide(1.7, number + 1, 44_100)), 1)
        (tmp_path / "w").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "w" / f"{number}.flac", x, 44_100)
    flags = set_flags(
        "tokenizer.weights=untrained_48khz:0",
        "tokenizer.codebooks=2",
        "data.shards=s",
        "train.steps=2",
        "train.warmup=1",
        "eval.resamples=10",
        "sample.tokens=700",
        "sample.n=1",
    )
    done = shortcut("run", "--recipe", "audio-tiny", "w", "--out", "r", "--json", *flags, cwd=tmp_path)
    (sample,) = json.loads(done.stdout)["samples"]
    info = soundfile.info(tmp_path / sample)
    assert (info.samplerate, info.channels) == (48_000, 2)
    assert info.frames >= 320
    tokenizer = AudioTokenizer(AudioOptions(name="audio", weights="untrained_48khz:0", codebooks=2))
    ids = tokenizer.prompt(tmp_path / "w" / "0.flac").tolist()
    guide = tokenizer.guide()
    for token in ids:
        assert guide.allowed(10**6)[token]
        guide.push(token)
    assert (tokenizer.vocabulary, tokenizer.stride) == (2 * 1024 + 64 + 1, 301)
    assert tokenizer.decode(ids, tmp_path / "back.wav")["second"] == pytest.approx(1.7, abs=0.01)


def test_a_killed_codec_training_goes_on(sounds, tmp_path):
    command = [sys.executable, "-m", "shortcut_cli", "codec", "train", str(sounds), "--out", "r"]
    command += set_flags(*SMALL, "train.steps=8", "train.eval_every=1", "train.log_every=1")
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "r" / "resume.pt").exists():
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGTERM)
    assert process.returncode == 75
    shortcut(*command[3:], cwd=tmp_path)
    train(keys("train.steps=8", "train.eval_every=1", "train.log_every=1"), sounds, tmp_path / "whole")
    whole, parts = (digest(tmp_path / name / "codec.pt") for name in ("whole", "r"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def read_codes(path):
    """The only tensor of a safetensors file, int64."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    ((_, entry),) = ((name, entry) for name, entry in json.loads(content[8 : 8 + size]).items() if name[0] != "_")
    assert entry["dtype"] == "I64"
    return np.frombuffer(content[8 + size :], "<i8").reshape(entry["shape"])


def test_the_official_weights_give_the_codes_that_others_published(monkeypatch):
    # Oracle: codes of the JFK clip that another implementation of EnCodec (candle) publishes, 1.5 kbit/s. They are of a
    # recording that is three frames longer, so they may begin up to three frames earlier.
    monkeypatch.setenv("SHORTCUT_CACHE", str(USERS_CACHE))
    data = Path(__file__).parent.parent.parent / "shared" / "data" / "audio"
    published, sound = data / "encodec-codes" / "jfk-codes.safetensors", next(data.glob("native-rate_misc/jfk*"), None)
    if not (weights.cached("encodec_24khz").is_file() and published.is_file() and sound):
        pytest.skip("needs the cached weights of encodec_24khz and the published codes")
    expected = read_codes(published)[0].T  # (frames, 2)
    found = np.concatenate(list(opening.codec("encodec_24khz").encode(read_samples(sound, Length()), 2)))
    differing = {}
    for shift in range(len(expected) - len(found) + 1):
        moved = expected[shift : shift + len(found)]
        differing[shift] = np.flatnonzero((found != moved).any(1)).tolist()
    best = min(differing.values(), key=len)
    assert len(best) < 0.1 * len(found), f"frames that differ, by shift: {differing}"
