"""Codecs: the codes of one pass for any division into blocks, and training that resumes bit for bit."""

import copy
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import USERS_CACHE, quiet, set_flags, shortcut
from test_windows import plain_key
from torch import nn
from torch.nn import functional as F

from shortcut_cli import files
from shortcut_cli.cli import tables
from shortcut_cli.codec import checkpoint, dataset, encodec, loading, losses, rvq, vocos, weights
from shortcut_cli.codec.discriminator import Discriminator
from shortcut_cli.codec.layout import MONO, STEREO, Layout, regular
from shortcut_cli.codec.trainer import CodecTrainer
from shortcut_cli.config import reading
from shortcut_cli.config.schema import CodecDataConfig
from shortcut_cli.data import workers
from shortcut_cli.data.sound import SoundReader
from shortcut_cli.errors import CheckFailed, Interrupted, Rejected, ShortcutError, Unfinished, UsageError
from shortcut_cli.events import Note, Progress
from shortcut_cli.kept import codec_scores
from shortcut_cli.report import samples
from shortcut_cli.stages import codec_evaluation, codec_training
from shortcut_cli.tokenizers.audio import AudioOptions, AudioTokenizer
from shortcut_cli.training import tensor_file

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


def glide(seconds, seed=0, rate_hz=24_000):
    """A glide with some noise, float32."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    noise = np.random.default_rng(seed).normal(0, 0.02, len(t))
    return (0.4 * np.sin(2 * np.pi * (200 + 60 * seed + 300 * t) * t) + noise).astype(np.float32)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    """A folder with six sounds of three speakers and one broken file."""
    folder = tmp_path_factory.mktemp("sounds")
    for number in range(6):
        soundfile.write(folder / f"speaker{number % 3}-{number}.wav", glide(1.5, number), 24_000)
    (folder / "broken.wav").write_text("no sound at all, but long enough for a header")
    return folder


def config(*settings):
    return reading.read_codec("codec-mini", [*SMALL, *settings])


def train(made, sounds, folder, resume="auto", stop=None):
    """Train; sounds are read in this process, since starting another takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(workers, "in_order", in_order)
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
    """A small frame codec that uses all its codebooks."""
    network = checkpoint.network(config().codec, seed=1)
    generator = torch.Generator().manual_seed(0)
    for number, layer in enumerate(network.quantizer.vq.layers):
        layer._codebook.embed.copy_(torch.randn(1024, 8, generator=generator) * 0.5**number)
        layer._codebook.inited.fill_(1)
    return vocos.Codec(network)


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
    assert np.array_equal(np.concatenate(list(codec.encode([x], 2))), expected[:, :2])


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


HANN = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1280) / 1280)


class Held(nn.Module):
    """Replaces the blocks of a network: no state, the identity."""

    def start(self):
        return []

    def forward(self, x, carried):
        assert carried == []
        return x


def test_windows_that_overlap_add_up_to_the_sound():
    # Analysis and synthesis without a network in between: the identity.
    x = torch.from_numpy(glide(0.5))[None]
    padded = F.pad(x, (480, -x.shape[1] % 320 + 480))
    hann = torch.hann_window(1280)
    windows = padded.unfold(-1, 1280, 320) * hann * hann
    y = vocos.overlap(windows) / vocos.weight(windows.shape[1], x).clamp(min=1e-3)
    assert torch.allclose(y[:, 480:-480][:, : x.shape[1]], x, atol=1e-5)


def test_a_frame_knows_nothing_of_what_is_more_than_20_ms_later(codec):
    x = glide(2.0)
    changed = x.copy()
    changed[24_000 + 480 :] = 0
    assert np.array_equal(one_pass(codec, x)[:75], one_pass(codec, changed)[:75])
    assert not np.array_equal(one_pass(codec, x)[75:], one_pass(codec, changed)[75:])


def frame_network(*settings):
    return checkpoint.network(config("codec.codebooks=1", *settings).codec, seed=3)


def test_the_encoder_sees_magnitudes_and_low_phases_of_windows_around_each_frame():
    network = frame_network()
    network.encoder.blocks = Held()
    x = glide(0.07) * np.linspace(0, 1, 1680, dtype=np.float32) ** 8  # 5.25 frames, the first one nearly silent
    found = network.encode(torch.from_numpy(x)[None])[0].T
    padded = np.pad(x.astype(np.float64), (480, 480 + 240))
    assert found.shape == (6, 641 + 161 + 161)
    for number in range(6):
        spectrum = np.fft.rfft(padded[320 * number : 320 * number + 1280] * HANN) * 2 / 1280
        magnitude = np.abs(spectrum) + 1e-5
        low = 3 * spectrum[:161] / magnitude[:161] ** 0.7
        expected = np.concatenate((np.log(magnitude) / 3 + 2.5, low.real, low.imag))
        np.testing.assert_allclose(
            found[number].numpy(), expected, rtol=0, atol=1e-3
        )  # the FFT's rounding, 1e-8 of 1e-5


def test_the_decoder_outputs_log_magnitudes_and_angles_of_windows_that_are_added_up():
    network = frame_network()
    network.decoder.blocks = Held()
    said = torch.randn(2, 2 * 641, 5, generator=torch.Generator().manual_seed(0)) * 3  # some magnitudes beyond exp(4)
    found = network.decode(said)
    assert found.shape == (2, 5 * 320)
    total, weight = np.zeros((2, 4 * 320 + 1280)), np.zeros(4 * 320 + 1280)
    for number in range(5):
        size, angle = said[:, :641, number].double().numpy(), said[:, 641:, number].double().numpy()
        spectrum = np.exp(np.minimum(size, 4)) * np.exp(1j * angle)
        total[:, 320 * number : 320 * number + 1280] += np.fft.irfft(spectrum, 1280) * HANN
        weight[320 * number : 320 * number + 1280] += HANN**2
    expected = (total / np.maximum(weight, 1e-3))[:, 480:-480]
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    loose = torch.randn(2, 5, 1280, generator=torch.Generator().manual_seed(1))
    for row, windows in zip(vocos.overlap(loose), loose, strict=True):
        assert row[640].item() == pytest.approx(sum(windows[t, 640 - 320 * t] for t in range(3)).item(), abs=1e-5)
    np.testing.assert_allclose(vocos.weight(1, loose)[0].numpy(), HANN**2, rtol=0, atol=1e-6)
    np.testing.assert_allclose(vocos.weight(5, loose)[0].numpy(), weight, rtol=0, atol=1e-5)


def normed(x, layer):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    return x * layer.weight.double().numpy() + layer.bias.double().numpy()


def linear(x, layer):
    return x @ layer.weight.double().numpy().T + layer.bias.double().numpy()


@torch.no_grad()
def test_blocks_are_causal_convnext_blocks():
    blocks = vocos.Blocks(3, 5, width=8, blocks=2, expansion=3, kernel=4)
    generator = torch.Generator().manual_seed(0)
    for parameter in blocks.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    x = torch.randn(2, 9, 3, generator=generator)
    expected = []
    for row in x.double().numpy():
        y = normed(linear(row, blocks.inward), blocks.first)
        for block in blocks.blocks:
            kernel = block.depthwise.weight[:, 0].double().numpy().T  # (4, D)
            wide = np.concatenate((np.zeros((3, 8)), y))
            mixed = np.stack([(wide[t : t + 4] * kernel).sum(0) for t in range(9)])
            inner = linear(normed(mixed + block.depthwise.bias.double().numpy(), block.norm), block.up)
            assert inner.shape == (9, 24)
            gelu = inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2
            y = y + block.scale.double().numpy() * linear(gelu, block.down)
        expected.append(linear(normed(y, blocks.last), blocks.outward))
    np.testing.assert_allclose(blocks(x, blocks.start()).numpy(), np.stack(expected), rtol=0, atol=1e-4)
    carried = blocks.start()
    parts = [blocks(x[:, first:end], carried) for first, end in ((0, 1), (1, 3), (3, 9))]
    np.testing.assert_allclose(torch.cat(parts, 1).numpy(), np.stack(expected), rtol=0, atol=1e-4)


def test_a_network_is_built_as_its_recipe_says():
    settings = ("frame.encoder_blocks=3", "frame.decoder_blocks=2", "frame.expansion=5", "frame.kernel=4")
    made = config(*(f"codec.{text}" for text in settings), "codec.codebook_decay=0.87", "codec.codebooks=2").codec
    before = torch.get_rng_state()
    network = checkpoint.network(made, 1)
    assert torch.equal(torch.get_rng_state(), before)
    shapes = {
        name: tuple(part.shape) for name, part in network.named_parameters() if name.endswith(("weight", "scale"))
    }
    for side, count in (("encoder", 3), ("decoder", 2)):
        assert len(getattr(network, side).blocks.blocks) == count
        assert shapes[f"{side}.blocks.blocks.0.depthwise.weight"] == (16, 1, 4)
        assert shapes[f"{side}.blocks.blocks.0.up.weight"] == (80, 16)
        assert getattr(network, side).blocks.blocks[0].scale.tolist() == pytest.approx([1 / count] * 16)
    assert shapes["encoder.blocks.inward.weight"] == (16, 963)
    assert shapes["encoder.blocks.outward.weight"] == (8, 16)
    assert shapes["decoder.blocks.outward.weight"] == (1282, 16)
    assert [tuple(layer.codebook.shape) for layer in network.quantizer.vq.layers] == [(1024, 8)] * 2
    book = network.quantizer.vq.layers[1]._codebook
    assert (book.decay, book.kmeans_iters, book.inited.item()) == (0.87, 10, 0)
    weight = "encoder.blocks.inward.weight"
    same, other = (checkpoint.network(made, seed).get_parameter(weight) for seed in (1, 2))
    assert torch.equal(same, network.get_parameter(weight))
    assert not torch.equal(other, same)
    seanet = checkpoint.network(config("codec.network=seanet", "codec.seanet.filters=3").codec)
    assert seanet.encoder.model[0].conv.conv.weight.shape[0] == 3
    assert seanet.encode(torch.zeros(2, 641)).shape == (2, 8, 3)
    assert seanet.decode(torch.zeros(2, 8, 3)).shape == (2, 960)


def test_the_deepest_codec_that_a_recipe_may_ask_for_is_read_back(tmp_path):
    deepest = ("encoder_blocks=512", "decoder_blocks=512", "width=8", "expansion=1")
    made = config(*(f"codec.frame.{text}" for text in deepest), "codec.codebooks=1", "codec.dimension=2")
    weights = checkpoint.network(made.codec).state_dict()
    checkpoint.save(tmp_path / "codec.pt", made, weights, step=1, scores={})
    read = checkpoint.load(tmp_path / "codec.pt").network.state_dict()
    assert read.keys() == weights.keys()


def test_a_codec_file_holds_half_precision_and_gives_back_what_was_saved(tmp_path):
    made = config("codec.codebooks=2")
    network = checkpoint.network(made.codec, 5)
    settle(network.quantizer)
    checkpoint.save(tmp_path / "codec.pt", made, network.state_dict(), step=7, scores={"mel_3kbps": 0.5})
    content = checkpoint.read(tmp_path / "codec.pt")
    assert (content["step"], content["scores"], content["recipe"]) == (7, {"mel_3kbps": 0.5}, made.model_dump())
    expected = {name: part.half() for name, part in network.state_dict().items()}
    expected = {name: part for name, part in expected.items() if not name.endswith(("embed_avg", "cluster_size"))}
    assert content["weights"].keys() == expected.keys()
    assert all(torch.equal(content["weights"][name], part) for name, part in expected.items())
    assert checkpoint.is_codec(tmp_path / "codec.pt")
    codec = loading.codec(str(tmp_path / "codec.pt"))
    loaded = codec.network.state_dict()
    assert all(torch.equal(loaded[name], part.float()) for name, part in expected.items())
    assert codec.codebooks == 2
    assert loading.layout(tmp_path / "codec.pt") == Layout(24_000, 1)
    # A file that is written over is read again.
    checkpoint.save(
        tmp_path / "codec.pt", made, checkpoint.network(made.codec, 6).state_dict(), step=7, scores={"mel_3kbps": 0.5}
    )
    again = loading.codec(str(tmp_path / "codec.pt")).network.state_dict()
    assert not torch.equal(again["encoder.blocks.inward.weight"], loaded["encoder.blocks.inward.weight"])


def test_the_discriminator_sees_spectra_divided_by_the_norm_of_the_window():
    x = np.random.default_rng(0).normal(size=(2, 1, 1000))
    found = encodec.Spectrogram(n_fft=256, hop_length=100, win_length=256, normalized=True)(torch.from_numpy(x).float())
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256)
    frames = [np.fft.rfft(x[..., first : first + 256] * hann) for first in range(0, 745, 100)]
    expected = np.stack(frames, -1) / np.sqrt((hann**2).sum())
    assert found.shape == (2, 1, 129, 8)
    np.testing.assert_allclose(
        torch.view_as_real(found).numpy(), np.stack((expected.real, expected.imag), -1), rtol=0, atol=1e-5
    )
    network = encodec.discriminator(3)
    logits, features = network(torch.zeros(1, 1, 2400))
    assert [len(logits), *map(len, features)] == [3, 5, 5, 5]
    assert features[0][0].shape[1] == 3
    assert "torchaudio" not in sys.modules or hasattr(sys.modules["torchaudio"], "__version__")


def test_rows_come_in_blocks_of_one_size_and_what_is_left_over_joins_the_last():
    for count in (*range(1, 32), 100):
        for piece in (1, 7, 10, 40, 100):
            rows = np.arange(count)
            found = list(regular((rows[first : first + piece] for first in range(0, count, piece)), 10))
            whole = max(1, count // 10)
            cuts = [10 * number for number in range(whole)] + [count]
            assert [block.tolist() for block, _ in found] == [
                rows[first:end].tolist() for first, end in itertools.pairwise(cuts)
            ]
            assert [last for _, last in found] == [False] * (whole - 1) + [True]
    assert list(regular([], 10)) == []


def test_frames_last_a_75th_of_a_second_and_segments_overlap_by_a_hundredth():
    assert Layout().seconds(75) == 1
    assert (STEREO.rate_hz, STEREO.channels, STEREO.segment, STEREO.advance) == (48_000, 2, 48_000, 47_520)
    assert STEREO.frames == 150
    assert [STEREO.seconds(count) for count in (30, 150, 310)] == pytest.approx([0.2, 0.99, 1.98 + 10 / 150])


def books(codebooks, codes=16, dimension=4, decay=0.9):
    """A quantizer with random codes, each with a count of ten."""
    quantizer = encodec.quantizer(dimension, codebooks, codes, decay).train()
    settle(quantizer)
    return quantizer


def settle(quantizer):
    """Give a quantizer codes in the scale of what they quantize, none of them dead."""
    generator = torch.Generator().manual_seed(0)
    for number, layer in enumerate(quantizer.vq.layers):
        book = layer._codebook
        book.embed.copy_(torch.randn(book.embed.shape, generator=generator) * 0.5**number)
        book.embed_avg.copy_(10 * book.embed)
        book.cluster_size.fill_(10)
        book.inited.fill_(1)


def nearest(vectors, table):
    """The row of `table` that is nearest to each vector, by a loop."""
    return [min(range(len(table)), key=lambda row: ((table[row] - vector) ** 2).sum()) for vector in vectors]


def test_quantizing_is_the_residual_loop_of_each_vector_over_the_codebooks_of_its_clip():
    quantizer = books(4).eval()
    quantizer.vq.layers[1]._codebook.cluster_size[5] = 0  # only training revives it
    kept = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    z = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(1), requires_grad=True)
    counts = [1, 4, 2]
    y, penalty = rvq.quantize(quantizer, z, torch.tensor(counts))
    (straight,) = torch.autograd.grad(y.sum(), z, retain_graph=True)
    (pulled,) = torch.autograd.grad(penalty, z)
    expected, gradient, paid = np.zeros((3, 4, 10)), np.zeros((3, 4, 10)), 0.0
    for clip, count in enumerate(counts):
        residual = z[clip].detach().double().numpy().T  # (T, D)
        for layer in quantizer.vq.layers[:count]:
            table = layer._codebook.embed.double().numpy()
            chosen = table[nearest(residual, table)]
            expected[clip] += chosen.T
            residual = residual - chosen
            paid += (residual**2).sum()
            gradient[clip] += 2 * residual.T
    each = 4 * z.numel()  # the mean over codebooks, clips, dimensions and frames
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=0, atol=1e-6)
    assert penalty.item() == pytest.approx(paid / each, rel=1e-5)
    np.testing.assert_allclose(pulled.numpy(), gradient / each, rtol=0, atol=1e-7)
    assert torch.equal(straight, torch.ones_like(z))
    assert all(torch.equal(kept[name], tensor) for name, tensor in quantizer.state_dict().items())


def test_the_penalty_of_a_clip_of_one_codebook_is_that_of_this_codebook_only():
    quantizer = books(4).eval()
    z = torch.randn(1, 4, 10, generator=torch.Generator().manual_seed(1))
    first = quantizer.vq.layers[0]._codebook.embed.numpy()
    vectors = z[0].numpy().T
    _, penalty = rvq.quantize(quantizer, z, torch.tensor([1]))
    assert penalty.item() == pytest.approx(((vectors - first[nearest(vectors, first)]) ** 2).mean() / 4, rel=1e-5)


def test_a_step_of_training_moves_every_code_to_the_running_mean_of_all_clips_and_dead_ones_to_residuals():
    quantizer = books(3)
    dead = [3, 7]
    for layer in quantizer.vq.layers:
        layer._codebook.cluster_size[dead] = 1e-3
        layer._codebook.embed_avg[dead] = 1e-3 * layer._codebook.embed[dead]
    tables = [layer._codebook.embed.double().numpy() for layer in quantizer.vq.layers]
    sizes = [layer._codebook.cluster_size.double().numpy() for layer in quantizer.vq.layers]
    sums = [layer._codebook.embed_avg.double().numpy() for layer in quantizer.vq.layers]
    for table in tables:
        table[dead] = 50  # far from all vectors
    for layer, table in zip(quantizer.vq.layers, tables, strict=True):
        layer._codebook.embed.copy_(torch.from_numpy(table))
    z = torch.randn(3, 4, 10, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    y, _ = rvq.quantize(quantizer, z, torch.tensor([1, 2, 3]))  # all codebooks see all three clips
    residual = z.double().mT.flatten(0, 1).numpy()
    for layer, table, size, total in zip(quantizer.vq.layers, tables, sizes, sums, strict=True):
        book, chosen = layer._codebook, nearest(residual, table)
        size, total = 0.9 * size, 0.9 * total  # noqa: PLW2901
        for vector, code in zip(residual, chosen, strict=True):
            size[code] += 0.1
            total[code] += 0.1 * vector
        live = [code for code in range(16) if code not in dead]
        np.testing.assert_allclose(book.cluster_size[live].numpy(), size[live], rtol=1e-5)
        np.testing.assert_allclose(book.embed_avg[live].numpy(), total[live], rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            book.embed[live].numpy(), (total / size[:, None])[live], rtol=1e-3
        )  # smoothed by 1e-5
        for code in dead:
            assert np.abs(residual - book.embed[code].double().numpy()).max(1).min() < 1e-6
            assert book.cluster_size[code].item() == pytest.approx(size.mean(), rel=1e-5)
        residual = residual - table[chosen]
    np.testing.assert_allclose(y[0].T.numpy(), tables[0][nearest(z[0].T.numpy(), tables[0])], rtol=0, atol=1e-6)


def test_reviving_changes_only_dead_codes():
    generator = torch.Generator().manual_seed(0)
    # The mean is 8, so counts below 0.8 are dead; a tenth of the median would be 0.35, of the maximum 3, of the sum 4.
    sizes = torch.tensor([30, 0.5, 1, 5, 3.5])
    book = SimpleNamespace(
        cluster_size=sizes.clone(),
        embed=torch.randn(5, 3, generator=generator),
        embed_avg=torch.randn(5, 3, generator=generator),
    )
    before = {name: tensor.clone() for name, tensor in vars(book).items()}
    found = torch.randn(20, 3, generator=generator)
    torch.manual_seed(0)
    rvq._revive(book, found)
    live = [0, 2, 3, 4]
    assert all(torch.equal(tensor[live], before[name][live]) for name, tensor in vars(book).items())
    assert any(torch.equal(book.embed[1], vector) for vector in found)
    assert torch.equal(book.embed_avg[1], 8 * book.embed[1])
    assert book.cluster_size[1] == 8


def test_revived_codes_are_drawn_from_all_vectors():
    book = SimpleNamespace(cluster_size=torch.zeros(101), embed=torch.zeros(101, 1), embed_avg=torch.zeros(101, 1))
    book.cluster_size[0] = 1
    torch.manual_seed(0)
    rvq._revive(book, torch.tensor([[1.0], [2.0], [3.0]]))
    assert sorted(set(book.embed[1:, 0].tolist())) == [1, 2, 3]
    assert book.embed[0] == 0


def test_codes_far_from_all_vectors_come_back_into_use():
    quantizer = encodec.quantizer(8, 1, 128, 0.9).train()
    torch.manual_seed(0)
    z = torch.randn(4, 8, 200)
    everyone = torch.ones(4, dtype=torch.long)
    rvq.quantize(quantizer, z, everyone)  # initializes the codes by k-means
    book = quantizer.vq.layers[0]._codebook
    with torch.no_grad():
        book.embed[:60] += 100  # far from all vectors
        book.embed_avg[:60] += 100 * book.cluster_size[:60, None]
    for _ in range(60):  # 0.9 ** 22 is a tenth
        rvq.quantize(quantizer, z, everyone)
    assert book.embed.abs().max() < 10
    assert torch.bincount(quantizer.vq.layers[0].encode(z).flatten(), minlength=128).min() > 0


def test_perplexity_is_the_number_of_equally_used_codes():
    codes = torch.stack((torch.arange(96) % 12, torch.zeros(96, dtype=torch.long), torch.arange(96) % 4 // 3))
    uneven = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))  # one code three times as often as the other
    assert rvq.perplexities(codes, 1024) == pytest.approx([12, 1, uneven])


@cache
def mel_filters(window, bands):
    """Triangles with corners evenly spaced in mel, by the formula, (window / 2 + 1, bands)."""
    top = 2595 * math.log10(1 + 12_000 / 700)
    corners = [700 * (10 ** (top * number / (bands + 1) / 2595) - 1) for number in range(bands + 2)]
    places = [24_000 * number / window for number in range(window // 2 + 1)]
    filters = np.zeros((len(places), bands))
    for band, (low, middle, high) in enumerate(zip(corners, corners[1:], corners[2:], strict=False)):
        for number, hz in enumerate(places):
            if low < hz <= middle:
                filters[number, band] = (hz - low) / (middle - low)
            elif middle < hz < high:
                filters[number, band] = (high - hz) / (high - middle)
        if not filters[:, band].any():
            filters[np.argmin([abs(hz - middle) for hz in places]), band] = 1
    return filters / filters.sum(0)


def log_mel(x, window, bands):
    """Log-mel magnitudes (frames, bands) of samples (N,), window by window."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    frames = [x[first : first + window] * hann for first in range(0, len(x) - window + 1, window // 4)]
    return np.log(np.abs(np.fft.rfft(frames)) * 2 / window @ mel_filters(window, bands) + 1e-5)


def test_mel_bands_are_triangles_in_mel():
    for window, bands in ((256, 20), (2048, 128), (64, 40)):  # many of the last are narrower than a bin
        found = losses.mel_bands(window, bands)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), mel_filters(window, bands), rtol=0, atol=1e-6)


def test_the_log_mel_distance_is_the_mean_over_four_window_lengths():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.1, (2, 5000)).astype(np.float32)
    # The first is so quiet that the offset of the magnitudes matters, the second about as loud as x.
    y = x * np.array([[1e-4], [0.5]], np.float32) + rng.normal(0, [[1e-6], [0.1]], (2, 5000)).astype(np.float32)
    distances = []
    for window, bands in ((256, 20), (512, 40), (1024, 80), (2048, 128)):
        pairs = [log_mel(a, window, bands) - log_mel(b, window, bands) for a, b in zip(x, y, strict=True)]
        distances.append(np.abs(pairs).mean())
    mel = losses.LogMel()
    assert mel(torch.from_numpy(x), torch.from_numpy(y)).item() == pytest.approx(np.mean(distances), rel=1e-4)
    spectra = mel.spectra(torch.from_numpy(y))
    assert [part.shape for part in spectra] == [(2, 75, 20), (2, 36, 40), (2, 16, 80), (2, 6, 128)]
    np.testing.assert_allclose(spectra[0][1].numpy(), log_mel(y[1], 256, 20), rtol=0, atol=1e-3)


def test_distances():
    x = torch.from_numpy(np.stack([glide(1.0), glide(1.0, 1)]))
    mel = losses.LogMel()
    assert mel(x, x) == 0
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    noise -= x * (x * noise).sum(1, keepdim=True) / x.square().sum(1, keepdim=True)  # orthogonal to x
    noise *= (x.square().sum(1, keepdim=True) / noise.square().sum(1, keepdim=True)).sqrt() * 10 ** (-12 / 20)
    assert losses.si_sdr_db(x, 3 * (x + noise)).tolist() == pytest.approx([12, 12], abs=1e-3)


def test_si_sdr_is_the_cotangent_of_the_angle_between_the_sounds_which_are_not_centred():
    x, y = (np.random.default_rng(seed).normal(0.3, 0.2, (3, 500)) for seed in (0, 1))
    expected = []
    for a, b in zip(x, y, strict=True):
        cosine = (a @ b) / math.sqrt((a @ a) * (b @ b))
        expected.append(20 * math.log10(cosine / math.sqrt(1 - cosine**2)))
    assert losses.si_sdr_db(torch.from_numpy(x), torch.from_numpy(y)).tolist() == pytest.approx(expected, abs=1e-6)


def test_hinge_losses_equal_those_computed_by_hand():
    row = lambda *values: torch.tensor([values])  # noqa: E731
    assert losses.discriminator_loss([row(2.0)], [row(-2.0)]) == 0  # both beyond the margin
    assert losses.discriminator_loss([row(-1.0)], [row(1.0)]) == 4  # 2 for each
    assert losses.discriminator_loss([row(0.5)], [row(-2.0)]) == 0.5
    assert losses.discriminator_loss([row(2.0)], [row(-0.75)]) == 0.25
    # Scales weigh the same, however many logits they have: the means are 0.5 + 3 and 1 + 0.
    real, made = [row(0.0, 1.0), row(0.0)], [row(2.0, 2.0), row(-1.0, -3.0, -1.0)]
    assert losses.discriminator_loss(real, made) == pytest.approx((3.5 + 1) / 2)
    assert losses.adversarial_loss([row(2.0)]) == 0
    assert losses.adversarial_loss([row(-1.0)]) == 2
    assert losses.adversarial_loss([row(0.0, 0.5, 3.0), row(-4.0)]) == pytest.approx((1.5 / 3 + 5) / 2)


def test_the_distance_of_features_is_relative_to_the_size_of_the_real_ones():
    real = [[torch.tensor([1.0, -3.0]), torch.tensor([10.0])], [torch.tensor([0.5, 0.5, -0.5])]]
    made = [[torch.tensor([2.0, -3.0]), torch.tensor([0.0])], [torch.tensor([0.5, -0.5, -0.5])]]
    # Mean distances 1/2, 10, 1/3 of features whose mean sizes are 2, 10, 1/2.
    assert losses.feature_loss(real, made).item() == pytest.approx((0.25 + 1 + 2 / 3) / 3)


def test_the_balancer_gives_each_loss_its_share():
    balancer = losses.Balancer({"a": 1.0, "b": 3.0})
    w = torch.ones(2, 10, requires_grad=True)
    y = w * 1.0
    balancer.backward({"a": 1000 * y[:, 0].sum(), "b": 0.001 * y[:, 1].sum()}, y)
    assert w.grad[:, 0].tolist() == pytest.approx([0.25, 0.25])
    assert w.grad[:, 1].tolist() == pytest.approx([0.75, 0.75])


@pytest.mark.parametrize("decay", [None, 0.9])
def test_the_balancer_divides_by_running_means_of_the_norms(decay):
    shares = {"a": 1.0, "b": 3.0, "late": 0.5}
    balancer = losses.Balancer(shares) if decay is None else losses.Balancer(shares, decay)
    decay = decay or 0.999
    rng = np.random.default_rng(0)
    norms = {name: [] for name in shares}
    for step in range(5):
        size = {"a": 10.0**step, "b": 0.1, "late": 7.0 + step}
        there = ["a", "b", "late"] if step >= 2 else ["a", "b"]
        gradients = {name: rng.normal(0, size[name], (3, 8)) for name in there}
        w = torch.ones(3, 8, dtype=torch.float64, requires_grad=True)
        y = w * 1.0
        balancer.backward({name: (torch.from_numpy(part) * y).sum() for name, part in gradients.items()}, y)
        expected = np.zeros((3, 8))
        for name, part in gradients.items():
            # A loss that starts later counts as if it had always had its first norm.
            norms[name] += [np.linalg.norm(part, axis=1).mean()] * (1 if norms[name] else step + 1)
            ages = [decay ** (step - number) for number in range(step + 1)]
            mean = np.dot(ages, norms[name]) / sum(ages)
            expected += part * shares[name] / sum(shares[other] for other in there) / mean
        np.testing.assert_allclose(w.grad.numpy(), expected, rtol=1e-9)


def test_the_balancer_accepts_a_loss_without_gradient():
    balancer = losses.Balancer({"a": 1.0, "b": 1.0})
    w = torch.ones(1, 4, requires_grad=True)
    y = w * 1.0
    balancer.backward({"a": (0 * y).sum(), "b": y.sum()}, y)
    assert w.grad.tolist() == [pytest.approx([0.25] * 4)]  # half of a gradient of norm 2


def test_groups_stay_together_and_both_splits_have_at_least_one():
    names = {str(number): f"speaker{number % 5}-{number}.wav" for number in range(20)}
    splits = dataset.divide(names, r"speaker\d+", 0.2)
    by_speaker = {name.split("-")[0]: set() for name in names.values()}
    for sha256, split in splits.items():
        by_speaker[names[sha256].split("-")[0]].add(split)
    assert sorted(map(tuple, by_speaker.values())) == [("train",)] * 4 + [("val",)]
    with pytest.raises(UsageError, match="form 1 groups"):
        dataset.divide(names, "speaker", 0.2)


def test_the_share_of_validation_is_a_share_of_groups_and_independent_of_the_order_of_the_files():
    names = {str(number): f"a/speaker{number % 10}/{number // 10}.wav" for number in range(30)}
    for share, count in ((0.01, 1), (0.1, 1), (0.3, 3), (0.49, 5)):
        splits = dataset.divide(names, r"speaker\d", share)
        assert len({names[sha256][:10] for sha256, split in splits.items() if split == "val"}) == count
        assert splits == dataset.divide(dict(reversed(names.items())), r"speaker\d", share)
    # Without an expression each file is a group, as is a file whose path has no match.
    assert sorted(dataset.divide(names, "", 0.3).values()) == ["train"] * 21 + ["val"] * 9
    mixed = {"a": "speaker1-a.wav", "b": "speaker1-b.wav"} | {str(number): f"{number}.wav" for number in range(10)}
    splits = dataset.divide(mixed, r"speaker\d", 0.45)
    assert splits["a"] == splits["b"]
    assert len({mixed[sha256][:8] for sha256, split in splits.items() if split == "val"}) == 5  # of 11 groups


def test_the_groups_with_the_lowest_hashes_are_the_validation_split():
    names = {str(number): f"speaker{number:02}/1.wav" for number in range(40)}
    splits = dataset.divide(names, r"speaker\d+", 0.25)
    hashes = {sha256: plain_key(*name[:9].encode()) for sha256, name in names.items()}
    least = sorted(hashes, key=hashes.get)[:10]
    assert {sha256 for sha256, split in splits.items() if split == "val"} == set(least)
    assert sorted(least) != sorted(names)[:10]


def in_order(task, jobs, _, **__):
    """As `workers.in_order`, in this process."""
    for job in jobs:
        try:
            yield job, task(job)
        except Rejected as reason:
            yield job, reason


def test_files_that_are_too_few_leave_no_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "in_order", in_order)
    folder = tmp_path / "data"
    soundfile.write(tmp_path / "one.wav", np.linspace(-0.5, 0.5, 2400), 24_000)
    with pytest.raises(UsageError, match="1 groups"):
        dataset.stage([str(tmp_path / "one.wav")], folder, CodecDataConfig(), n_workers=1, report=quiet)
    assert [path.name for path in folder.iterdir()] == ["rejects.jsonl"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match=r"^no \.wav .*none$"):
        dataset.stage([str(tmp_path / "none")], tmp_path / "b", CodecDataConfig(), n_workers=1, report=quiet)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["rejects.jsonl", "train.s16", "val.s16"])
@pytest.mark.parametrize("what", ["file", "link"])
def test_a_file_of_the_user_is_no_staged_sound(tmp_path, monkeypatch, name, what):
    monkeypatch.setattr(workers, "in_order", in_order)
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", np.linspace(-0.5, 0.5, 2400 + number), 24_000)
    path = tmp_path / "data" / name
    path.parent.mkdir()
    if what == "link":
        (tmp_path / "theirs").write_text("theirs\n")
        path.symlink_to(tmp_path / "theirs")
    else:
        path.write_text("theirs\n")
    with pytest.raises(UsageError, match=re.escape(str(path))):
        dataset.stage([str(tmp_path / "*.wav")], path.parent, CodecDataConfig(), n_workers=1, report=quiet)
    assert path.read_text() == "theirs\n"
    assert [each.name for each in path.parent.iterdir()] == [name]


def test_what_a_killed_process_left_of_staged_sound_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "in_order", in_order)
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", np.linspace(-0.5, 0.5, 2400 + number), 24_000)
    (tmp_path / "none.wav").write_bytes(b"no sound")
    arguments = [str(tmp_path / "*.wav")], tmp_path / "data", CodecDataConfig()
    child = os.fork()
    if not child:
        monkeypatch.setattr(dataset, "to_json", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        monkeypatch.setattr(dataset, "_write_rejects", lambda folder, _: (folder / "rejects.jsonl").write_text(""))
        dataset.stage(*arguments, n_workers=1, report=quiet)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = {path.name for path in (tmp_path / "data").iterdir()}
    assert {"train.s16", "val.s16", "rejects.jsonl"} <= left
    assert "clips.json" not in left
    assert len(dataset.stage(*arguments, n_workers=1, report=quiet).clips) == 3
    names = {path.name for path in (tmp_path / "data").iterdir()}
    assert names == {"train.s16", "val.s16", "clips.json", "rejects.jsonl"}


def test_sound_is_staged_in_16_bits_one_file_after_the_other_and_identical_files_once(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "in_order", in_order)
    folder = tmp_path / "sounds"
    folder.mkdir()
    wave = np.array([0, 1, -1, 1.5, -1.5, 0.5, 0.4 / 32767, 0.6 / 32767, -0.6 / 32767], np.float32)
    bits = [0, 32767, -32767, 32767, -32767, 16384, 0, 1, -1]  # 16383.5 is rounded to even
    for number, name in enumerate(("d", "a", "c", "b", "e")):
        soundfile.write(folder / f"{name}.wav", np.append(wave, np.full(number, 0.25)), 24_000, subtype="FLOAT")
    (folder / "f.wav").write_bytes((folder / "a.wav").read_bytes())
    made = config("data.val=0.4").data
    staged = dataset.stage([str(folder)], tmp_path / "data", made, n_workers=1, report=quiet)
    lengths = {"a.wav": 10, "b.wav": 12, "c.wav": 11, "d.wav": 9, "e.wav": 13}
    assert sorted(clip.path for clip in staged.clips) == sorted(lengths)
    for split, count in (("train", 3), ("val", 2)):
        mine = [clip for clip in staged.clips if clip.split == split]
        assert len(mine) == count
        assert [clip.path for clip in mine] == sorted(clip.path for clip in mine)
        samples = np.fromfile(tmp_path / "data" / f"{split}.s16", "<i2")
        start = 0
        for clip in mine:
            assert (clip.start, clip.samples) == (start, lengths[clip.path])
            assert clip.sha256 == hashlib.sha256((folder / clip.path).read_bytes()).hexdigest()
            end = start + clip.samples
            assert samples[start:end].tolist() == bits + [8192] * (clip.samples - 9)
            start = end
        assert len(samples) == start
        assert staged.seconds(split) == start / 24_000
    assert staged.fingerprint == [(clip.split, clip.sha256) for clip in staged.clips]
    again = dataset.stage([str(folder)], tmp_path / "data", made, n_workers=1, report=quiet)
    assert again == staged
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "clips.json", "rejects.jsonl", "train.s16", "val.s16"
    ]  # fmt: skip
    for changed, name in (("data.val=0.3", "val"), ("data.speaker=[ab]", "speaker")):
        with pytest.raises(UsageError, match=f"its {name} differ"):
            dataset.stage(
                [str(folder)], tmp_path / "data", config("data.val=0.4", changed).data, n_workers=1, report=quiet
            )
    whole = (tmp_path / "data" / "val.s16").read_bytes()
    (tmp_path / "data" / "val.s16").write_bytes(whole[:-2])
    with pytest.raises(CheckFailed, match=r"val.s16 is not \d+ bytes long"):
        dataset.stage([str(folder)], tmp_path / "data", made, n_workers=1, report=quiet)
    (tmp_path / "data" / "val.s16").unlink()
    with pytest.raises(CheckFailed, match=r"val.s16 is not \d+ bytes long"):
        dataset.stage([str(folder)], tmp_path / "data", made, n_workers=1, report=quiet)
    (tmp_path / "data" / "clips.json").write_text("{}")
    with pytest.raises(CheckFailed, match="was not written by"):
        dataset.stage([str(folder)], tmp_path / "data", made, n_workers=1, report=quiet)


def test_sounds_are_read_within_the_limits_of_recipe_and_command(tmp_path, monkeypatch):
    asked, shown = [], []
    monkeypatch.setattr(workers, "in_order", lambda *given, **limits: asked.append(limits) or in_order(*given))
    folder = tmp_path / "sounds"
    folder.mkdir()
    for number in range(2):
        soundfile.write(folder / f"{number}.wav", np.full(4, number / 4), 24_000)
    (folder / "short.wav").write_text("no sound at all, but long enough for a header")
    (folder / "gone.wav").symlink_to("nowhere")
    made = config("data.val=0.4", "data.file_timeout_s=33", "data.file_memory_mb=2222").data
    staged = dataset.stage([str(folder)], tmp_path / "data", made, n_workers=3, report=shown.append)
    assert asked == [{"workers": 3, "timeout_s": 33, "memory_mb": 2222}]
    assert shown == [Progress(task="read", done=done, total=3, unit="files") for done in (1, 2, 3)]
    rejects = [json.loads(line) for line in (tmp_path / "data" / "rejects.jsonl").read_text().splitlines()]
    assert [(entry["path"], bool(entry["reason"])) for entry in rejects] == [("gone.wav", True), ("short.wav", True)]
    assert (staged.rejected, len(staged.clips)) == (2, 2)


@pytest.mark.parametrize("when", ["hashed", "read"])
def test_a_sound_that_the_machine_failed_to_read_is_listed_and_tried_again(tmp_path, monkeypatch, when):
    folder, data, made = tmp_path / "sounds", tmp_path / "data", config("data.val=0.4").data
    folder.mkdir()
    for number in range(3):
        soundfile.write(folder / f"{number}.wav", np.full(4, number / 4), 24_000)
    sha256 = files.sha256

    def fails(path):
        if path.name == "1.wav":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256(path)

    def broken(*given, **_):
        return [(job, Rejected("was killed", passing=True)) for job, _ in in_order(*given) if job[0].name == "1.wav"]

    with monkeypatch.context() as patched:
        patched.setattr(*((files, "sha256", fails) if when == "hashed" else (workers, "in_order", broken)))
        with pytest.raises(Unfinished, match=r"^1 files could not be read because of the machine\n  1\.wav: "):
            dataset.stage([str(folder)], data, made, n_workers=1, report=quiet)
    (reject,) = map(json.loads, (data / "rejects.jsonl").read_text().splitlines())
    assert (reject["path"], reject["passing"], (data / "clips.json").exists()) == ("1.wav", True, False)
    monkeypatch.setattr(workers, "in_order", lambda *given, **_: in_order(*given))
    staged = dataset.stage([str(folder)], data, made, n_workers=1, report=quiet)
    assert (staged.rejected, len(staged.clips), (data / "rejects.jsonl").read_text()) == (0, 3, "")
    before = by_content(data)
    monkeypatch.setattr(files, "sha256", fails)
    with pytest.raises(Unfinished):
        dataset.stage([str(folder)], data, made, n_workers=1, report=quiet)
    assert by_content(data) == before


def by_content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def written(folder, **splits):
    """Write what `stage` writes: the clips of each split, int16 (samples,) each."""
    made = []
    for split, rows in splits.items():
        np.concatenate(rows).astype("<i2").tofile(folder / f"{split}.s16")
        starts = itertools.accumulate(map(len, rows), initial=0)
        for n, (start, row) in enumerate(zip(starts, rows)):  # noqa: B905  one start more than rows
            made.append(dataset.Clip(f"{n}.wav", f"{split}{n}", split, start, len(row)))
    return dataset.Clips(folder, made, 0)


AS_THEY_ARE = ("data.segment_s=0.2", "data.speed=0", "data.gain_db=0", "data.mix=0")


def windows(folder, rows, *settings, seed=1):
    made = config(*AS_THEY_ARE, *settings).data
    return dataset.ClipWindows(written(folder, train=rows, val=[np.zeros(9)]), "train", made, seed)


def test_windows_are_cut_from_one_clip_and_short_clips_are_padded_with_silence(tmp_path):
    # Each sample is its own number: the clips have 5,000, 3,000 and 9,000 samples, a window 4,800.
    rows = [np.arange(1, 5001), np.arange(5001, 8001), np.arange(8001, 17001)]
    found = windows(tmp_path, rows)
    first = []
    for window in np.concatenate([found.batch(step, 20) for step in range(10)]):
        samples = (window * 32767).round().astype(int)
        begin = int(samples[0])
        first.append(begin)
        (clip,) = (row for row in rows if row[0] <= begin <= row[-1])
        length = min(4800, len(clip))
        assert begin + length - 1 <= clip[-1]
        assert samples.tolist() == [*range(begin, begin + length), *[0] * (4800 - length)]
    # Every place of the split is equally likely, so clips are as likely as they are long, up to chance (200 draws).
    counts = np.histogram(first, (1, 5001, 8001, 17001))[0] / 200
    assert counts == pytest.approx([5 / 17, 3 / 17, 9 / 17], abs=0.1)  # three standard deviations
    inside = [begin for begin in first if 8001 < begin < 12_201]  # neither end of the long clip
    assert len(inside) / 200 == pytest.approx(4200 / 17_000, abs=0.1)
    assert np.histogram(inside, (8001, 10_101, 12_201))[0].min() > 0.3 * len(inside)


def test_spread_windows_are_even_whatever_the_seed(tmp_path):
    rows = [np.arange(1, 5001), np.arange(5001, 8001), np.arange(8001, 17001)]
    strong = ("data.speed=0.4", "data.gain_db=30", "data.mix=1")
    found = windows(tmp_path, rows, *strong, seed=5).spread(4)
    # Middles at 1/8, 3/8, 5/8 and 7/8 of 17,000 samples: 2,125 is too close to the start of its clip, 6,375 in
    # the short one, 10,625 and 14,875 in the long one, the last too close to its end.
    begins = [1, 5001, 10_625 - 2400 + 1, 17_001 - 4800]
    expected = [[*range(begin, begin + 4800)] for begin in begins]
    expected[1] = [*range(5001, 8001), *[0] * 1800]
    assert found.dtype == np.float32
    assert (found * 32767).round().astype(int).tolist() == expected
    assert found[0][0] == np.float32(1) / np.float32(32767)
    (tmp_path / "two").mkdir()
    (middle,) = windows(tmp_path / "two", [np.arange(1, 5001), np.arange(5001, 10_001)]).spread(1)
    assert (middle[0] * 32767).round() == 5001  # the first sample of a clip belongs to that clip


def test_gain_is_within_its_bounds_both_ways_and_off_at_0(tmp_path):
    rows = [np.full(9000, 1000), np.full(9000, 1000)]
    plain = windows(tmp_path, rows).batch(0, 20)
    assert (plain == np.float32(1000) / np.float32(32767)).all()
    loud = windows(tmp_path, rows, "data.gain_db=12").batch(0, 200)
    gains = 20 * np.log10(loud[:, 0] * 32767 / 1000)
    np.testing.assert_allclose(loud, np.repeat(loud[:, :1], 4800, 1), rtol=1e-6)
    assert np.abs(gains).max() <= 12 + 1e-4
    # Uniform in dB: each quarter of the range gets 50 of 200; three standard deviations are 18.
    assert np.histogram(gains, (-12, -6, 0, 6, 12))[0] == pytest.approx([50] * 4, abs=18)


def test_a_share_of_the_windows_is_mixed_and_too_loud_ones_are_scaled_to_their_peak(tmp_path):
    rows = [np.full(9000, -1000), np.full(9000, -1000)]
    for share in (0.0, 0.2, 1.0):
        found = windows(tmp_path, rows, f"data.mix={share}").batch(0, 200) * 32767
        single, double = (np.isclose(found, level).all(1) for level in (-1000, -2000))
        assert (single ^ double).all()
        assert double.mean() == pytest.approx(share, abs=3 * math.sqrt(share * (1 - share) / 200))
    (tmp_path / "other").mkdir()
    pairs = windows(tmp_path / "other", [np.full(9000, 1000), np.full(9000, 3000)], "data.mix=1").batch(0, 200)
    counts = [int(np.isclose(pairs[:, 0] * 32767, level).sum()) for level in (2000, 4000, 6000)]
    assert counts == pytest.approx([50, 100, 50], abs=21)  # drawn independently; three standard deviations
    (tmp_path / "loud").mkdir()
    loud = [np.tile([-20_000, 10_000, 5000], 3000)]
    found = windows(tmp_path / "loud", loud, "data.gain_db=12").batch(0, 50)
    peaks = np.abs(found).max(1)
    assert peaks.max() == pytest.approx(1)
    assert (np.isclose(peaks, 1)).any()
    assert (peaks < 0.9).any()
    assert found.min(1) == pytest.approx(-2 * found.max(1), rel=1e-5)  # scaled, not clipped


def test_speed_is_within_its_bounds_both_ways_and_fills_the_window(tmp_path):
    hz, seconds = 1000, 2
    t = np.arange(seconds * 24_000) / 24_000
    rows = [8000 * np.sin(2 * np.pi * hz * t)]
    found = windows(tmp_path, rows, "data.speed=0.25").batch(0, 120)
    assert found.shape == (120, 4800)
    rates = []
    for window in found:
        spectrum = np.abs(np.fft.rfft(window * np.hanning(4800), 96_000))
        rates.append(int(spectrum.argmax()) * 0.25 / hz)
        assert np.abs(window[-24:-2]).max() > 4000 / 32767  # a whole period, up to the end
    rates = np.log(rates) / math.log(1.25)
    assert np.abs(rates).max() <= 1 + 0.01
    # Uniform in its logarithm: each third of the range gets 40 of 120; three standard deviations are 15.
    assert np.histogram(rates, (-1.01, -1 / 3, 1 / 3, 1.01))[0] == pytest.approx([40] * 3, abs=15)


def test_windows_depend_only_on_seed_and_step(sounds, tmp_path):
    made = config("data.speed=0.2", "data.gain_db=6", "data.mix=0.5").data
    staged = dataset.stage([str(sounds)], tmp_path, made, n_workers=1, report=quiet)
    windows = dataset.ClipWindows(staged, "train", made, 1)
    again = dataset.ClipWindows(
        dataset.stage([str(sounds)], tmp_path, made, n_workers=2, report=quiet), "train", made, 1
    )
    x = windows.batch(3, 5)
    assert x.shape == (5, 12_000)
    assert x.dtype == np.float32
    assert np.abs(x).max() <= 1
    assert np.array_equal(again.batch(3, 5), x)
    assert not np.array_equal(windows.batch(4, 5), x)
    assert not np.array_equal(dataset.ClipWindows(staged, "train", made, 2).batch(3, 5), x)
    assert [entry["path"] for entry in map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())] == [
        "broken.wav"
    ]


def twin(network):
    """A copy of a discriminator of two filters, made from its state: modules with weight_norm can't be deep-copied."""
    made = encodec.discriminator(2)
    made.load_state_dict(network.state_dict())
    return made


def trainer(folder, *settings):
    """A trainer on two clips, with one to validate on; all of its codes are in use."""
    rng = np.random.default_rng(0)
    noise = [rng.normal(0, 3000, 9000) for _ in range(2)]
    spoken = [np.concatenate((glide(0.4) * 20_000, glide(0.4, 1) * 500, np.zeros(9600)))]
    made = config(*AS_THEY_ARE, *settings)
    found = CodecTrainer(made, folder, written(folder, train=noise, val=spoken), "cpu", quiet)
    settle(found.network.quantizer)
    return found


def test_initial_weights_follow_from_the_seed_and_the_discriminator_is_as_wide_as_the_recipe_says(tmp_path):
    one = trainer(tmp_path, "train.seed=7", "train.discriminator_filters=3", "train.adversarial_from=1")
    expected = checkpoint.network(one.recipe.codec, 7)
    assert all(torch.equal(part, expected.get_parameter(name)) for name, part in one.network.named_parameters())
    layers = [scale.convs[0].conv for scale in one.discriminator.network.discriminators]
    assert [layer.out_channels for layer in layers] == [3] * 3


def test_half_of_the_clips_are_trained_at_the_full_rate_and_the_others_at_any(tmp_path, monkeypatch):
    drawn = []

    def stopped(_, z, codebooks):
        assert codebooks.shape == (len(z),)
        drawn.append(codebooks)
        raise KeyboardInterrupt

    monkeypatch.setattr(rvq, "quantize", stopped)
    one = trainer(tmp_path, "train.batch_size=64")
    monkeypatch.setattr(one.windows, "batch", lambda _, count: np.zeros((count, 320), np.float32))
    for step in range(30):
        with pytest.raises(KeyboardInterrupt):
            one.step(step)
    numbers = torch.cat(drawn)
    assert len(numbers) == 1920
    assert (int(numbers.min()), int(numbers.max())) == (1, 4)
    # Half of them, and a quarter of the other half; four standard deviations for 1,920 draws.
    shares = (torch.bincount(numbers, minlength=5) / 1920).tolist()
    assert shares == [0, *(pytest.approx(share, abs=0.045) for share in (0.125, 0.125, 0.125, 0.625))]
    assert not torch.equal(drawn[0], drawn[1])


def test_a_step_goes_down_the_weighted_losses_with_a_clipped_gradient(tmp_path, monkeypatch):
    settings = ("mel=0.7", "wave=2.3", "commitment=5.0", "clip=0.01", "weight_decay=0.3", "ema=0.9", "lr=0.01")
    one = trainer(tmp_path, *(f"train.{text}" for text in settings))
    before, average = copy.deepcopy(one.network), dict(one.optimizer.ema.weights)
    average = {name: tensor.clone() for name, tensor in average.items()}
    drawn, quantize = [], rvq.quantize
    monkeypatch.setattr(rvq, "quantize", lambda *given: drawn.append(given[2]) or quantize(*given))
    values = one.step(0)
    x = torch.from_numpy(one.windows.batch(0, 4))
    quantized, commitment = quantize(before.quantizer, before.encode(x), drawn[0])
    y = before.decode(quantized)
    mel, wave = losses.LogMel()(x, y), ((y - x).abs() / x.square().mean(1, keepdim=True).sqrt()).mean()
    (0.7 * mel + 2.3 * wave + 5 * commitment).backward()
    gradients = {name: parameter.grad for name, parameter in before.named_parameters()}
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
    expected = {"mel": mel.item(), "wave": wave.item(), "commitment": commitment.item(), "gradient_norm": norm}
    assert values == pytest.approx(expected, rel=1e-4)
    assert norm > 0.1  # so that clipping has an effect
    lr = 0.01 / 2  # the first of two steps of warm-up
    for name, parameter in before.named_parameters():
        gradient = gradients[name] * 0.01 / norm
        state = one.optimizer.adamw.state[one.network.get_parameter(name)]
        np.testing.assert_allclose(state["exp_avg"].numpy(), (0.1 * gradient).numpy(), rtol=0, atol=1e-7)
        decay = 0.3 if parameter.dim() > 1 else 0
        moved = parameter.detach() * (1 - lr * decay) - lr * gradient / (gradient.abs() + 1e-8)
        clear = gradient.abs() > 1e-6  # the sign of smaller ones depends on rounding
        found = one.network.get_parameter(name).detach()
        np.testing.assert_allclose(found[clear].numpy(), moved[clear].numpy(), rtol=0, atol=1e-5)
        # At the first step the EMA keeps a tenth.
        kept = 0.1 * average[name] + 0.9 * found
        np.testing.assert_allclose(one.optimizer.ema.weights[name].numpy(), kept.numpy(), rtol=0, atol=1e-6)
    assert all(parameter.grad is None for parameter in one.network.parameters())


def test_the_discriminator_is_used_from_its_step_on_and_losses_are_balanced(tmp_path, monkeypatch):
    settings = ("adversarial_from=3", "mel=2.0", "wave=0.25", "adversarial=1.5", "features=0.5", "commitment=0.4")
    one = trainer(tmp_path, *(f"train.{text}" for text in settings), "train.min_lr=0.1")
    assert "adversarial" not in one.step(2)
    before, discriminator = copy.deepcopy(one.network), one.discriminator
    drawn, shares, judges, quantize, learn = [], [], [], rvq.quantize, discriminator.learn

    def learned(x, y, share):
        shares.append(share)
        found = learn(x, y, share)
        judges.append(twin(discriminator.network))
        return found

    monkeypatch.setattr(rvq, "quantize", lambda *given: drawn.append(given[2]) or quantize(*given))
    monkeypatch.setattr(discriminator, "learn", learned)
    values = one.step(3)
    # Six steps, two of warm-up: the fourth is a third of the way down a cosine.
    assert shares == pytest.approx([0.1 + 0.9 * 0.75])
    x = torch.from_numpy(one.windows.batch(3, 4))
    quantized, commitment = quantize(before.quantizer, before.encode(x), drawn[0])
    y = before.decode(quantized)
    logits, made = judges[0](y[:, None])
    real = judges[0](x[:, None])[1]
    pairs = [pair for layers in zip(real, made, strict=True) for pair in zip(*layers, strict=True)]
    expected = {
        "mel": (2.0, losses.LogMel()(x, y)),
        "wave": (0.25, losses.wave_loss(x, y)),
        "adversarial": (1.5, sum((1 - part).clamp(min=0).mean() for part in logits) / 3),
        "features": (0.5, sum((b - a).abs().mean() / a.abs().mean() for a, b in pairs) / len(pairs)),
    }
    assert {name: values[name] for name in expected} == pytest.approx(
        {name: loss.item() for name, (_, loss) in expected.items()}, rel=1e-4
    )
    pull = torch.zeros_like(y)
    for weight, loss in expected.values():
        (gradient,) = torch.autograd.grad(loss, y, retain_graph=True)
        pull += weight / 4.25 * gradient / gradient.norm(dim=1).mean()
    ((y * pull).sum() + 0.4 * commitment).backward()
    norm = math.sqrt(sum(part.grad.double().square().sum().item() for part in before.parameters()))
    assert values["gradient_norm"] == pytest.approx(norm, rel=1e-3)
    assert values["commitment"] == pytest.approx(commitment.item(), rel=1e-4)
    assert values.keys() == {*expected, "commitment", "discriminator", "gradient_norm"}


def test_the_discriminator_learns_the_hinge_loss_at_its_share_of_the_learning_rate():
    one = Discriminator(config("train.discriminator_lr=0.02").train, "cpu")
    before = twin(one.network)
    x, y = torch.randn(2, 2, 2400, generator=torch.Generator().manual_seed(0)).unbind(1)
    y = (0.1 * y).requires_grad_()
    values = one.learn(x, y, 0.25)
    real, made = before(x[:, None])[0], before(y.detach()[:, None])[0]
    scales = [(1 - r).clamp(min=0).mean() + (1 + m).clamp(min=0).mean() for r, m in zip(real, made, strict=True)]
    loss = sum(scales) / 3
    loss.backward()
    assert values == {"discriminator": pytest.approx(loss.item(), rel=1e-5)}
    assert y.grad is None
    moved = 0
    for name, parameter in before.named_parameters():
        gradient, clear = parameter.grad, parameter.grad.abs() > 1e-6
        expected = parameter.detach() * (1 - 0.005 * 0.01) - 0.005 * gradient / (gradient.abs() + 1e-8)
        found = one.network.get_parameter(name).detach()
        np.testing.assert_allclose(found[clear].numpy(), expected[clear].detach().numpy(), rtol=0, atol=1e-5)
        moved += int(clear.sum())
    assert moved > 100
    assert one.optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    first, same, other = (
        next(Discriminator(config(f"train.seed={seed}").train, "cpu").network.parameters()) for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_difference_of_samples_is_relative_to_the_loudness_of_each_window():
    x = torch.tensor([[0.0, -4.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]])
    y = x + torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.2, -0.2, 0.0, 0.0], [0.001, 0.001, 0.001, 0.001]])
    # 1/4 relative to 2, 0.1 to 0.1, and for silence 0.001 to 0.01, the lower limit of the loudness.
    assert losses.wave_loss(x, y).item() == pytest.approx((0.125 + 1 + 0.1) / 3)


def test_a_loss_that_is_not_finite_stops_before_it_is_used(tmp_path, monkeypatch):
    one = trainer(tmp_path)
    before = {name: parameter.clone() for name, parameter in one.network.named_parameters()}
    monkeypatch.setattr("shortcut_cli.codec.trainer.wave_loss", lambda _, y: (y * math.nan).mean())
    with pytest.raises(ShortcutError, match="not finite at step 4 "):
        one.step(3)
    assert all(torch.equal(before[name], parameter) for name, parameter in one.network.named_parameters())


def test_validation_scores_the_ema_weights_in_half_precision_window_by_window(tmp_path):
    one = trainer(tmp_path, "codec.codebooks=8", "train.eval_windows=6", "train.batch_size=5")
    held = np.fromfile(tmp_path / "val.s16", "<i2").astype(np.float32) / 32767
    middles = [(2 * number + 1) * len(held) // 12 for number in range(6)]
    begins = [min(max(middle - 2400, 0), len(held) - 4800) for middle in middles]
    x = torch.from_numpy(np.stack([held[begin : begin + 4800] for begin in begins]))
    assert torch.equal(one.validation, x)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in one.network.state_dict().items():
        one.optimizer.ema.weights[name].copy_(tensor)
        if "quantizer" not in name:
            one.optimizer.ema.weights[name] += 0.1 * torch.randn(tensor.shape, generator=generator)
    one.optimizer.ema.weights["decoder.blocks.outward.bias"][641:] = 1000.24  # an angle; 1000 in half precision
    rounded = {name: tensor.half().float() for name, tensor in one.optimizer.ema.weights.items()}
    network = checkpoint.network(one.recipe.codec).eval()
    network.load_state_dict(rounded)
    mel, expected = losses.LogMel(), {"mel_6kbps": [], "mel_1.5kbps": [], "si_sdr_6kbps": []}
    codes = []
    with torch.no_grad():
        for window in x:
            residual, total = network.encode(window[None])[0].T, 0
            chosen = []
            for number, layer in enumerate(network.quantizer.vq.layers, 1):
                distance = (residual[:, None] - layer.codebook).square().sum(-1)
                chosen.append(distance.argmin(1))
                total = total + layer.codebook[chosen[-1]]
                residual = residual - layer.codebook[chosen[-1]]
                if number in (2, 8):
                    y = network.decode(total.T[None])
                    expected[f"mel_{number * 0.75:g}kbps"].append(mel(window[None], y).item())
            codes.append(torch.stack(chosen))
            if window.any():
                power = window.square().sum()
                cosine = ((window * y[0]).sum().square() / power / y.square().sum()).item()
                expected["si_sdr_6kbps"].append(10 * math.log10(cosine / (1 - cosine)))
    assert len(expected["si_sdr_6kbps"]) == 4  # two windows are silent, one of them a batch of its own
    perplexity = []
    for row in torch.cat(codes, 1):
        shares = np.unique(row.numpy(), return_counts=True)[1] / len(row)
        perplexity.append(math.exp(-(shares * np.log(shares)).sum()))
    found = one.scores()
    means = {name: sum(values) / len(values) for name, values in expected.items()}
    assert found == pytest.approx(means | {"perplexity": min(perplexity)}, rel=1e-3)
    assert min(perplexity) < 0.99 * max(perplexity)
    assert {name: type(value) for name, value in found.items()} == dict.fromkeys(found, float)
    one.validate()
    kept = checkpoint.read(tmp_path / "codec.pt")
    assert all(torch.equal(tensor.float(), rounded[name]) for name, tensor in kept["weights"].items())
    one.optimizer.ema = None
    assert one.scores()["mel_6kbps"] != found["mel_6kbps"]
    one.validation = torch.zeros(2, 4800)
    assert one.scores().keys() == found.keys() - {"si_sdr_6kbps"}


def scripted(monkeypatch, distances):
    """A training whose steps set every weight to their number, and whose validation has these scores."""

    def step(self, number):
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.fill_(number + 1)
        late = {"adversarial": 10.0 * number} if number else {}
        return {"mel": float(number), "gradient_norm": 3.0 * number} | late

    monkeypatch.setattr(CodecTrainer, "step", step)
    monkeypatch.setattr(CodecTrainer, "scores", lambda self: dict(distances[self.state.step - 1]))
    monkeypatch.setattr(workers, "in_order", in_order)


def test_the_codec_that_is_kept_is_the_one_with_the_lowest_distance(sounds, tmp_path, monkeypatch):
    # Distances 3, 1, 2 and 1 again; neither of the two alone, nor the SI-SDR, would give the same choice.
    figures = [(2.0, 1.0, 9.0), (0.75, 0.25, -9.0), (0.5, 1.5, 50.0), (0.875, 0.125, -50.0)]
    names = ("mel_0.75kbps", "mel_3kbps", "si_sdr_3kbps")
    distances = [dict(zip(names, row, strict=True)) | {"perplexity": 1.0} for row in figures]
    scripted(monkeypatch, distances)
    made = config("train.steps=4", "train.eval_every=1", "train.log_every=2", "train.ema=0")
    stops = iter([None, 75, None, None, None])
    with pytest.raises(Interrupted):
        train(made, sounds, tmp_path / "run", stop=lambda: next(stops))
    assert checkpoint.read(tmp_path / "run" / "codec.pt")["step"] == 2
    summary = train(made, sounds, tmp_path / "run", stop=lambda: next(stops))
    kept = checkpoint.read(tmp_path / "run" / "codec.pt")
    assert (kept["step"], kept["scores"], summary["validation_distance"]) == (2, distances[1], 1.0)
    assert set(kept["weights"]["encoder.blocks.inward.weight"].flatten().tolist()) == {2.0}
    network = checkpoint.network(made.codec)
    assert summary["parameters"] == sum(part.numel() for part in network.parameters()) + 4 * 1024 * 8
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 2, 3, 4, 4]
    assert [line for line in log if "mel_3kbps" in line] == [{"step": n + 1, **row} for n, row in enumerate(distances)]
    # Means since the last line; a loss that only some of the steps have is averaged over those. The learning rate is
    # that of the last step: a cosine at its start and at its end.
    lines = [line for line in log if "mel" in line]
    assert [(line["mel"], line["gradient_norm"], line["adversarial"]) for line in lines] == [
        (0.5, 1.5, 10),
        (2.5, 7.5, 25),
    ]
    assert [line["lr"] for line in lines] == pytest.approx([0.001, 0.001 * made.train.min_lr])
    train(made, sounds, tmp_path / "run", resume="never", stop=lambda: None)
    assert (tmp_path / "run" / "log.jsonl").read_text().count("\n") == 6


def test_files_that_changed_are_refused_even_if_the_clips_are_gone(sounds, tmp_path, monkeypatch):
    scripted(monkeypatch, [{"mel_3kbps": 1.0}] * 6)
    train(config(), sounds, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "data")
    (tmp_path / "fewer").mkdir()
    for path in sorted(sounds.glob("speaker*.wav"))[1:]:
        (tmp_path / "fewer" / path.name).symlink_to(path)
    with pytest.raises(UsageError, match="the files are different"):
        train(config(), tmp_path / "fewer", tmp_path / "run")


def test_starting_from_scratch_leaves_nothing_to_resume_from_before_the_first_state(sounds, tmp_path, monkeypatch):
    scripted(monkeypatch, [{"mel_3kbps": 1.0}] * 6)
    train(config(), sounds, tmp_path / "run")
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert made >= {"codec.pt", "resume.pt", "resume.prev.pt", "log.jsonl"}

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(CodecTrainer, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config("train.lr=0.5"), sounds, tmp_path / "run", resume="never")
    assert {path.name for path in (tmp_path / "run").iterdir() if path.is_file()} <= {"recipe.toml", ".shortcut"}
    assert reading.read_codec(str(tmp_path / "run" / "recipe.toml")).train.lr == 0.5


def test_a_training_uses_the_processes_and_the_device_of_the_command(tmp_path, monkeypatch):
    asked = []

    def made(_, *given):
        asked.append(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "stage", lambda *given, n_workers, report: (*given, n_workers, report))
    monkeypatch.setattr(CodecTrainer, "__init__", made)
    one = config()
    options = {"n_workers": 3, "device": "meta", "resume": "auto", "report": quiet, "stop": None}
    with pytest.raises(KeyboardInterrupt):
        codec_training.train(one, ["a", "b"], tmp_path, **options)
    data = (["a", "b"], tmp_path / "data", one.data, 3, quiet)
    assert asked == [(one, tmp_path, data, "meta", quiet)]


def test_a_folder_takes_one_codec_training_at_a_time(sounds, tmp_path):
    with files.held(tmp_path / "run", "shortcut a"), pytest.raises(UsageError, match="in use: shortcut a, process"):
        train(config(), sounds, tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()


def digest(path):
    return {name: tensor.clone() for name, tensor in checkpoint.read(path)["weights"].items()}


@pytest.mark.parametrize("settings", [(), ("train.adversarial_from=2",), ("codec.network=seanet",)])
def test_an_interrupted_training_ends_in_the_same_weights(sounds, tmp_path, settings):
    made = config(*settings)
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
    states = [tensor_file.load(tmp_path / name / "resume.pt", "resume.pt") for name in ("whole", "parts")]
    assert all(torch.equal(states[0]["network"][name], states[1]["network"][name]) for name in states[0]["network"])
    texts = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "parts")]
    logs = [[json.loads(line) | {"seconds": 0} for line in text.splitlines()] for text in texts]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [2, 3, 4, 6, 6]
    assert train(made, sounds, tmp_path / "whole")["worked"] is False


def test_another_recipe_or_other_files_are_refused(sounds, tmp_path):
    train(config(), sounds, tmp_path / "run")
    with pytest.raises(UsageError, match=r"train.lr: 0.001 -> 0.01"):
        train(config("train.lr=0.01"), sounds, tmp_path / "run")
    (tmp_path / "more").mkdir()
    soundfile.write(tmp_path / "more" / "x.wav", glide(1.0, 9), 24_000)
    for name in sounds.iterdir():
        (tmp_path / "more" / name.name).symlink_to(name)
    with pytest.raises(UsageError, match="its files differ"):
        train(config(), tmp_path / "more", tmp_path / "run")


def test_keys_that_do_not_determine_the_weights_may_change(sounds, tmp_path):
    first = train(config(), sounds, tmp_path / "run")
    assert train(config("train.log_every=3", "data.file_timeout_s=60.0"), sounds, tmp_path / "run") == first | {
        "worked": False
    }
    (tmp_path / "run" / "codec.pt").unlink()
    state = tensor_file.load(tmp_path / "run" / "resume.pt", "resume.pt")
    for best_step in (1, 6):
        state["state"]["best_step"] = best_step
        tensor_file.save(tmp_path / "run" / "resume.pt", state)
        if best_step == 1:
            with pytest.raises(CheckFailed, match=r"codec\.pt is missing; resume\.pt does not hold its weights"):
                train(config(), sounds, tmp_path / "run")
    (tmp_path / "run" / "codec.pt").write_bytes(b"PK damaged")
    train(config(), sounds, tmp_path / "run")
    assert checkpoint.read(tmp_path / "run" / "codec.pt")["step"] == 6


def test_paths_bind_the_clips_if_they_say_which_files_belong_together(sounds, tmp_path):
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for number, path in enumerate(sorted(sounds.iterdir())):
        shutil.copy(path, renamed / f"{number}{path.suffix}")

    def stage(folder, name, *settings):
        return dataset.stage([str(folder)], tmp_path / name, config(*settings).data, n_workers=1, report=quiet)

    assert stage(sounds, "a") == stage(renamed, "a")
    stage(sounds, "b", "data.speaker=speaker[0-9]")
    with pytest.raises(UsageError, match="its speaker differ"):
        stage(renamed, "b", "data.speaker=speaker[0-9]")


def test_clips_of_another_format_are_not_used(sounds, tmp_path, monkeypatch):
    dataset.stage([str(sounds)], tmp_path / "a", config().data, n_workers=1, report=quiet)
    monkeypatch.setattr(dataset, "FORMAT", dataset.FORMAT + 1)
    with pytest.raises(UsageError, match="its format differ"):
        dataset.stage([str(sounds)], tmp_path / "a", config().data, n_workers=1, report=quiet)


def test_training_lowers_the_distance_and_a_run_uses_the_codec(sounds, tmp_path):
    made = ["train.steps=60", "train.lr=0.003", "train.eval_every=60"]
    found = shortcut("codec", "train", str(sounds), "--out", "c", "--json", *set_flags(*SMALL, *made), cwd=tmp_path)
    assert json.loads(found.stdout)["codec"] == "c/codec.pt"
    log = [json.loads(line) for line in (tmp_path / "c" / "log.jsonl").read_text().splitlines()]
    distances = [line["mel"] for line in log if "mel" in line]
    assert distances[-1] < 0.85 * distances[0]
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
    train(config(), sounds, tmp_path / "run")
    done = shortcut("codec", "eval", "run/codec.pt", str(sounds), "--out", "heard", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["schema_version"] == 2
    assert [row["kbps"] for row in found["bandwidths"]] == [0.75, 1.5, 3.0]
    assert found["files"] == 6
    assert [entry["path"] for entry in found["rejects"]] == ["broken.wav"]
    assert found["opus"]["si_sdr_db"] > found["bandwidths"][-1]["si_sdr_db"]
    assert 4 < found["opus"]["kbps"] < 16
    assert len(found["perplexity"]) == 4
    assert found["encode_x_realtime"] > 1
    assert found["report"] == "heard/report.html"
    assert codec_scores.find(tmp_path / "heard", files.sha256(tmp_path / "run" / "codec.pt"))["files"] == 6
    kept = sorted({path.name for path in (tmp_path / "heard").iterdir()} - {codec_scores.NAME, "report.html"})
    assert len(kept) == 6 * 4
    assert kept[0] == "speaker0-0-0.75kbps.wav"
    assert soundfile.info(tmp_path / "heard" / kept[0]).frames == 36_000
    page = (tmp_path / "heard" / "report.html").read_text()
    heard = page.partition("Files, original and decoded</h2>")[2]
    assert "3 of 6 files" in heard
    players = re.findall(r'<audio [^>]*src="data:audio/mpeg;base64,[^"]*" aria-label="play ([^"]*)"', heard)
    labels = ["0.75kbps", "1.5kbps", "3kbps", "opus"]
    sources = [entry["path"] for entry in found["sounds"]]
    assert len(sources) == 6
    wanted = [
        [f"the original of {source}", *(f"{source} at {label} in {tmp_path.name}/heard" for label in labels)]
        for source in sources[:3]
    ]
    assert players == [name for names in wanted for name in names]
    assert heard.count("mel spectrogram from") == heard.count("waveform; its peak") == 15
    assert all(name in heard for name in kept)  # in the list of files
    assert len(page) < 10e6


def test_an_original_that_is_gone_or_changed_is_said_and_its_reconstructions_are_played(tmp_path):
    x = np.sin(np.arange(24_000) / 20).astype(np.float32) / 2
    soundfile.write(tmp_path / "a.wav", x, 24_000)
    (tmp_path / "heard").mkdir()
    soundfile.write(tmp_path / "heard" / "a-opus.wav", x, 24_000)
    entry = {
        "path": "a.wav",
        "original": "../a.wav",
        "sha256": hashlib.sha256((tmp_path / "a.wav").read_bytes()).hexdigest(),
        "seconds": 1.0,
        "reconstructions": {"opus": "a-opus.wav"},
    }

    def shown():
        return [figure.count("<audio") for figure in samples.reconstructed(tmp_path / "heard", entry)]

    assert shown() == [1, 1]
    soundfile.write(tmp_path / "a.wav", -x, 24_000)
    assert shown() == [0, 1]
    assert "changed since" in samples.reconstructed(tmp_path / "heard", entry)[0]
    (tmp_path / "a.wav").unlink()
    assert shown() == [0, 1]


@pytest.mark.parametrize("name", ["../a.wav", "b/a.wav", 3])
def test_a_result_names_reconstructions_in_its_own_folder_only(name):
    entry = {"path": "a", "original": "a", "sha256": "", "seconds": 1.0, "reconstructions": {"opus": name}}
    assert not codec_scores._is_sound(entry)
    assert codec_scores._is_sound(entry | {"reconstructions": {"opus": "a.wav"}})


class Steps:
    """A codec of three codebooks whose output is a constant: the number of codebooks / 100 + the first code / 1000."""

    codebooks, layout = 3, MONO

    def encode(self, blocks, codebooks):
        (x,) = blocks
        frames = -(-len(x) // 320)
        first = 100 * np.arange(codebooks)  # so that they differ
        yield np.full((frames // 2, codebooks), round(float(x[0]) * 100)) + first
        yield np.zeros((frames - frames // 2, codebooks), np.int64) + first

    def decode(self, blocks):
        for codes in blocks:
            yield np.full(320 * len(codes), codes.shape[1] / 100 + codes[0, 0] / 1000, np.float32)


def test_eval_means_are_over_the_files_for_which_the_score_is_defined(tmp_path, monkeypatch):
    folder = tmp_path / "w"
    (folder / "sub").mkdir(parents=True)
    lengths = {"a.wav": 24_000, "b.wav": 12_001, "sub/c.wav": 6400}
    for number, (name, length) in enumerate(lengths.items()):
        soundfile.write(folder / name, np.full(length, number / 100, np.float32), 24_000, subtype="FLOAT")
    (folder / "x.wav").write_text("no sound at all, but long enough for a header")
    seen = []

    class Figures:
        missing = "STOI (pystoi)"

        def __call__(self, x, y):
            assert len(x) == len(y)
            seen.append((len(x), float(y[0])))
            return {"si_sdr_db": float(x[0] * 100 + y[0] * 1000), "log_mel": float(y[0]), "stoi": None, "pesq": (
                float(len(x)) if len(x) < 24_000 else None
            )}  # fmt: skip

    ticks = itertools.count()
    monkeypatch.setattr(codec_evaluation.loading, "codec", lambda name: {"mine": Steps()}[name])
    monkeypatch.setattr(codec_evaluation, "Measures", Figures)
    monkeypatch.setattr(codec_evaluation.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(codec_evaluation, "_opus", lambda x: (np.full_like(x, 2), len(x) / 1000))
    notes = []
    (tmp_path / "out").mkdir()  # with what a killed process has left there
    (tmp_path / "out" / "a-opus.wav").write_text("half")
    (tmp_path / "out" / f".codec-eval.{os.getpid()}.tmp").write_text('["a-opus.wav"]')
    found = codec_evaluation.evaluate("mine", [str(folder)], tmp_path / "out", report=notes.append)
    # Sounds of 0, 0.01 and 0.02 come back as 0.01 or 0.02 for the codebooks plus 0, 0.001 or 0.002 for the codes.
    assert found["bandwidths"] == [
        {
            "kbps": count * 0.75,
            "si_sdr_db": pytest.approx((0 + 1 + 2) / 3 + 10 * count + 1, abs=1e-4),
            "log_mel": pytest.approx(count / 100 + 1 / 1000, abs=1e-6),
            "pesq": (12_001 + 6400) / 2,
        }
        for count in (1, 2)
    ]
    opus = {"kbps": (24 + 12.001 + 6.4) / 3, "si_sdr_db": 2001, "log_mel": 2, "pesq": (12_001 + 6400) / 2}
    assert found["opus"] == pytest.approx(opus)
    assert [length for length, _ in seen] == [24_000] * 3 + [12_001] * 3 + [6400] * 3
    # Of 133 frames, half of 38 have code 1, half of 20 have code 2, and the others code 0.
    shares = np.array([133 - 19 - 10, 19, 10]) / 133
    assert found["perplexity"] == pytest.approx([math.exp(-(shares * np.log(shares)).sum())] * 3)
    assert (found["files"], found["weights"], found["schema_version"]) == (3, "mine", 2)
    assert [entry["path"] for entry in found["rejects"]] == ["x.wav"]
    assert found["rejects"][0]["reason"] == "is not WAV: it begins with 'no sound '"
    assert found["seconds"] == sum(lengths.values()) / 24_000
    # One tick for encoding each file, and one for decoding it, on average over the bandwidths.
    assert (found["encode_x_realtime"], found["decode_x_realtime"]) == (found["seconds"] / 3, found["seconds"] / 3)
    assert Note("without STOI (pystoi): pip install 'shortcut-cli[measure]'") in notes
    kept = {path.name: soundfile.read(path)[0] for path in (tmp_path / "out").iterdir()}
    assert sorted(kept) == sorted(
        f"{name}-{label}.wav" for name in ("a", "b", "sub_c") for label in ("0.75kbps", "1.5kbps", "opus")
    )
    assert kept["sub_c-1.5kbps.wav"] == pytest.approx(np.full(6400, 0.022), abs=1 / 32768)
    assert kept["b-opus.wav"].tolist() == [32767 / 32768] * 12_001
    with pytest.raises(UsageError, match=r"a-0\.75kbps\.wav exists already"):
        codec_evaluation.evaluate("mine", [str(folder)], tmp_path / "out", report=notes.append)
    table = list(tables.codec_rows(found))
    assert [row[:2] for row in table] == [("mine", 0.75), ("mine", 1.5), ("opus", pytest.approx(opus["kbps"]))]
    assert table[2][2:] == pytest.approx((2001, 2, None, opus["pesq"]))


def test_eval_says_why_nothing_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(codec_evaluation.loading, "codec", lambda _: Steps())
    (tmp_path / "x.wav").write_text("no sound at all, but long enough for a header")
    with pytest.raises(UsageError, match=r"none of the files can be read: x\.wav: is not WAV: it begins"):
        codec_evaluation.evaluate("mine", [str(tmp_path)], None, report=quiet)


def test_eval_refuses_a_stereo_codec(tmp_path, monkeypatch):
    monkeypatch.setattr(codec_evaluation.loading, "codec", lambda _: SimpleNamespace(layout=STEREO))
    soundfile.write(tmp_path / "x.wav", glide(0.2), 24_000)
    with pytest.raises(UsageError, match="encodec_48khz is a 48 kHz stereo codec"):
        codec_evaluation.evaluate("encodec_48khz", [str(tmp_path)], None, report=quiet)


def test_scores_of_a_short_or_silent_sound():
    measures = codec_evaluation.Measures()
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 0.1, (2, 1000)).astype(np.float32)
    y += 3 * x
    found = measures(x, y)
    a, b = x.astype(float), y.astype(float)
    cosine = (a @ b) ** 2 / (a @ a) / (b @ b)
    assert found["si_sdr_db"] == pytest.approx(10 * math.log10(cosine / (1 - cosine)), abs=1e-3)
    padded = [np.pad(part, (0, 2048 - 1000)) for part in (x, y)]  # to the longest window
    scales = ((256, 20), (512, 40), (1024, 80), (2048, 128))
    distances = [np.abs(log_mel(padded[0], *scale) - log_mel(padded[1], *scale)).mean() for scale in scales]
    assert found["log_mel"] == pytest.approx(np.mean(distances), rel=1e-4)
    assert found["stoi"] is None
    silent = measures(np.zeros(1000, np.float32), y)
    assert (silent["si_sdr_db"], silent["stoi"], silent["pesq"]) == (None, None, None)
    assert silent["log_mel"] > 1
    assert measures(x, np.zeros(1000, np.float32))["pesq"] is None


def test_opus_is_as_long_as_the_sound_and_its_bitrate_is_that_of_the_whole_file(tmp_path):
    for length in (24_000, 10_001):
        x = glide(1.0)[:length]
        y, kbps = codec_evaluation._opus(x)
        assert y.shape == x.shape
        kind = {"format": "OGG", "subtype": "OPUS", "compression_level": 1.0}
        soundfile.write(tmp_path / "x.ogg", x, 24_000, **kind)
        assert kbps == pytest.approx((tmp_path / "x.ogg").stat().st_size * 8 / 1000 / (length / 24_000))
        assert losses.si_sdr_db(*map(torch.from_numpy, (x, y))).item() > 0


def test_stoi_and_pesq_are_those_of_their_packages(tmp_path):
    stoi, pesq = pytest.importorskip("pystoi").stoi, pytest.importorskip("pesq").pesq
    import soxr

    x = glide(2.0) * np.repeat(np.random.default_rng(1).uniform(0.1, 1, 20), 2400).astype(np.float32)
    y = x + np.random.default_rng(0).normal(0, 0.05, len(x)).astype(np.float32)
    found = codec_evaluation.Measures()(x, y)
    assert found["stoi"] == stoi(x, y, 24_000)
    assert found["pesq"] == pesq(16_000, *(soxr.resample(s, 24_000, 16_000) for s in (x, y)), "wb")
    silence = np.zeros(24_000, np.float32)
    assert codec_evaluation.Measures()(silence, silence)["stoi"] is None


def test_the_packages_of_stoi_and_pesq_get_the_original_first_and_the_rate_they_need(monkeypatch):
    import soxr

    calls, failing = [], []

    class PesqError(Exception):
        pass

    def measured(name, result):
        def measure(*given):
            calls.append((name, given))
            if failing:
                raise failing[0]
            return result

        return measure

    stoi, pesq = measured("stoi", np.float64(0.25)), measured("pesq", 1.5)
    monkeypatch.setitem(sys.modules, "pystoi", SimpleNamespace(stoi=stoi))
    monkeypatch.setitem(sys.modules, "pesq", SimpleNamespace(pesq=pesq, PesqError=PesqError))
    measures = codec_evaluation.Measures()
    x, y = glide(0.5), glide(0.5, 1)
    found = measures(x, y)
    assert (found["stoi"], found["pesq"], measures.missing) == (0.25, 1.5, "")
    (_, (original, back, rate)), (_, (rate_16, original_16, back_16, kind)) = calls
    assert (rate, rate_16, kind) == (24_000, 16_000, "wb")
    for given, sound in ((original, x), (back, y)):
        assert np.array_equal(given, sound)
    for given, sound in ((original_16, x), (back_16, y)):
        assert np.array_equal(given, soxr.resample(sound, 24_000, 16_000))
    for error in (RuntimeWarning("too short"), ValueError("no frames")):
        failing[:] = [error]
        assert measures._stoi(x, y) is None
    failing[:] = [PesqError("no utterance")]
    assert measures._pesq(x, y) is None
    calls.clear()
    silence = np.zeros_like(x)
    assert measures._stoi(silence, y) is measures._pesq(silence, y) is measures._pesq(x, silence) is None
    assert calls == []
    monkeypatch.setitem(sys.modules, "pystoi", None)
    assert codec_evaluation.Measures().missing == "STOI (pystoi)"
    monkeypatch.setitem(sys.modules, "pesq", None)
    assert codec_evaluation.Measures().missing == "STOI (pystoi) and PESQ (pesq)"


def test_a_damaged_or_foreign_codec_is_noticed(sounds, tmp_path):
    train(config(), sounds, tmp_path / "run")
    path = tmp_path / "run" / "codec.pt"
    whole = path.read_bytes()
    for place in (5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises((CheckFailed, UsageError)):
            loading.of_file(path)
    path.write_bytes(whole)
    kept = checkpoint.read(path)
    for change in ({"format": 2}, {"kind": "other"}, {"recipe": kept["recipe"] | {"codec": {"codebooks": 3}}}):
        tensor_file.save(tmp_path / "other.pt", kept | change)
        with pytest.raises(CheckFailed):
            loading.of_file(tmp_path / "other.pt")


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
    assert np.abs(y - sound).max() < 0.07 * np.abs(sound).max()  # half a dB is six percent
    silence, loud = np.zeros((9600, 2), np.float32), np.full((9600, 2), 1.5, np.float32)
    assert [level for part in (silence, loud) for level, _ in segments.encode([part], 1)] == [63, 0]
    assert [codes.shape for _, codes in segments.encode([x[:9600]], 3)] == [(30, 3)]
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
    constraint = tokenizer.constraint()
    for token in ids:
        assert constraint.allowed(10**6)[token]
        constraint.push(token)
    assert (tokenizer.vocabulary, tokenizer.stride) == (2 * 1024 + 64 + 1, 301)
    assert tokenizer.decode(ids, tmp_path / "back.wav")["second"] == pytest.approx(1.7, abs=0.01)


def test_a_killed_codec_training_resumes(sounds, tmp_path):
    command = [sys.executable, "-m", "shortcut_cli", "codec", "train", str(sounds), "--out", "r"]
    command += set_flags(*SMALL, "train.steps=8", "train.eval_every=1", "train.log_every=1")
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while not (tmp_path / "r" / "resume.pt").exists():
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGTERM)
    assert process.returncode == 75
    shortcut(*command[3:], cwd=tmp_path)
    train(config("train.steps=8", "train.eval_every=1", "train.log_every=1"), sounds, tmp_path / "whole")
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
    # Oracle: codes of the JFK clip at 1.5 kbit/s from another implementation of EnCodec (candle). That recording is
    # three frames longer, so its codes may start up to three frames earlier.
    monkeypatch.setenv("SHORTCUT_CACHE", str(USERS_CACHE))
    data = Path(__file__).parent.parent.parent / "shared" / "data" / "audio"
    published, sound = data / "encodec-codes" / "jfk-codes.safetensors", next(data.glob("native-rate_misc/jfk*"), None)
    if not (weights.cached("encodec_24khz").is_file() and published.is_file() and sound):
        pytest.skip("needs the cached weights of encodec_24khz and the published codes")
    expected = read_codes(published)[0].T  # (frames, 2)
    found = np.concatenate(list(loading.codec("encodec_24khz").encode(SoundReader(sound), 2)))
    differing = {}
    for shift in range(len(expected) - len(found) + 1):
        moved = expected[shift : shift + len(found)]
        differing[shift] = np.flatnonzero((found != moved).any(1)).tolist()
    best = min(differing.values(), key=len)
    assert len(best) < 0.1 * len(found), f"frames that differ, by shift: {differing}"


def test_what_killed_workers_left_is_removed_and_a_passing_fault_makes_no_clips(tmp_path, monkeypatch):
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", np.sin(np.arange(9000) / (9 + number)), 24_000)
    config, options = CodecDataConfig(), {"n_workers": 1, "report": quiet}
    in_order = dataset.workers.in_order

    def kills(work, jobs, *arguments, **config):
        for number, (job, result) in enumerate(in_order(work, jobs, *arguments, **config)):
            if not number:
                (job[2].parent / f".{job[2].name}.1.tmp").write_bytes(b"half")
            yield job, Rejected("was killed", passing=True) if not number else result

    with monkeypatch.context() as patched:
        patched.setattr(dataset.workers, "in_order", kills)
        with pytest.raises(Unfinished, match="was killed"):
            dataset.stage([str(tmp_path)], tmp_path / "data", config, **options)
    assert not (tmp_path / "data" / "clips.json").exists()
    assert '"passing": true' in (tmp_path / "data" / "rejects.jsonl").read_text()
    assert len(dataset.stage([str(tmp_path)], tmp_path / "data", config, **options).clips) == 3
    names = {"train.s16", "val.s16", "clips.json", "rejects.jsonl"}
    assert {path.name for path in (tmp_path / "data").iterdir()} == names
