"""A codec that works at frame rate: STFT, causal ConvNeXt blocks, codes, causal ConvNeXt blocks, inverse STFT.

After Vocos (Siuzdak 2023, arXiv 2306.00814), whose decoder works this way: no layer runs faster than 75 frames per
second, so two CPU cores can train it. Frame t covers samples 320 t .. 320 (t + 1), and its window extends 480 samples
further on both sides. The blocks are causal, so sound is encoded and decoded block by block, with 20 ms of lookahead.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shortcut_cli.codec.layout import HOP, MONO
from shortcut_cli.config.schema import FrameConfig

WINDOW = 1280  # samples
EDGE = (WINDOW - HOP) // 2  # samples of a window before its frame, and as many after it
BINS = WINDOW // 2 + 1
PHASED_BINS = 161  # the encoder also sees the phase of these, up to 3 kHz
QUIET = 1e-5  # added to magnitudes before the logarithm; a full-scale sine has magnitude 0.5
LOUDEST = 4.0  # logarithm of the largest magnitude that the decoder can output
BLOCK_FRAMES = 75
Carried = list[Tensor | None]


class Block(nn.Module):
    """A ConvNeXt block (Liu et al. 2022, arXiv 2201.03545), causal."""

    def __init__(self, width: int, inner: int, kernel: int, scale: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, kernel, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.scale = nn.Parameter(torch.full((width,), scale))

    def forward(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, T, D) -> (B, T, D), and the frames that the next call needs as `before`; None means silence."""
        reach = self.depthwise.kernel_size[0] - 1
        if before is None:
            before = x.new_zeros(len(x), reach, x.shape[-1])
        wide = torch.cat((before, x), 1)  # (B, reach + T, D)
        y = self.norm(self.depthwise(wide.mT).mT)
        return x + self.scale * self.down(F.gelu(self.up(y))), wide[:, -reach:]


class Blocks(nn.Module):
    """Linear in, blocks, norm, linear out: (B, T, inputs) -> (B, T, outputs)."""

    def __init__(self, inputs: int, outputs: int, *, width: int, blocks: int, expansion: int, kernel: int) -> None:
        super().__init__()
        self.inward = nn.Linear(inputs, width)
        self.first = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, width * expansion, kernel, 1 / blocks) for _ in range(blocks))
        self.last = nn.LayerNorm(width)
        self.outward = nn.Linear(width, outputs)

    def start(self) -> Carried:
        """The state of the blocks at the start of a stream."""
        return [None] * len(self.blocks)

    def forward(self, x: Tensor, carried: Carried) -> Tensor:
        """carried: the state left by the previous call on the same stream; updated in place."""
        x = self.first(self.inward(x))
        for number, block in enumerate(self.blocks):
            x, carried[number] = block(x, carried[number])
        y: Tensor = self.outward(self.last(x))
        return y


def _hann(like: Tensor) -> Tensor:
    return torch.hann_window(WINDOW, dtype=like.dtype, device=like.device)


class Encoder(nn.Module):
    """Windows of sound -> embeddings."""

    def __init__(self, dimension: int, *, width: int, blocks: int, expansion: int, kernel: int) -> None:
        super().__init__()
        inputs = BINS + 2 * PHASED_BINS
        self.blocks = Blocks(inputs, dimension, width=width, blocks=blocks, expansion=expansion, kernel=kernel)

    def forward(self, x: Tensor, carried: Carried | None = None) -> Tensor:
        """Samples of T frames with EDGE more on both sides, (B, T HOP + 2 EDGE) -> (B, D, T)."""
        windows = x.unfold(-1, WINDOW, HOP) * _hann(x)  # (B, T, WINDOW)
        spectrum = torch.fft.rfft(windows) * (2 / WINDOW)  # (B, T, BINS)
        magnitude = spectrum.abs() + QUIET
        low = spectrum[..., :PHASED_BINS] * magnitude[..., :PHASED_BINS] ** -0.7
        features = torch.cat((magnitude.log() / 3 + 2.5, 3 * low.real, 3 * low.imag), -1)
        y: Tensor = self.blocks(features, self.blocks.start() if carried is None else carried).mT
        return y


class Decoder(nn.Module):
    """Embeddings -> windows of sound, for `overlap` to add up."""

    def __init__(self, dimension: int, *, width: int, blocks: int, expansion: int, kernel: int) -> None:
        super().__init__()
        self.blocks = Blocks(dimension, 2 * BINS, width=width, blocks=blocks, expansion=expansion, kernel=kernel)

    def forward(self, z: Tensor, carried: Carried | None = None) -> Tensor:
        """(B, D, T) -> (B, T, WINDOW); window t starts EDGE samples before frame t."""
        y = self.blocks(z.mT, self.blocks.start() if carried is None else carried)
        size, phase = y.split(BINS, -1)
        # Vocos, eq. 2: the magnitude from its logarithm, the phase from an angle of any size.
        spectrum = torch.polar(size.clamp(max=LOUDEST).exp(), phase)
        windows: Tensor = torch.fft.irfft(spectrum, WINDOW) * _hann(z)
        return windows


def overlap(windows: Tensor) -> Tensor:
    """Overlap-add: (B, T, WINDOW) -> (B, (T - 1) HOP + WINDOW)."""
    count = windows.shape[1]
    size = (1, (count - 1) * HOP + WINDOW)
    return F.fold(windows.mT, size, (1, WINDOW), stride=(1, HOP))[:, 0, 0]


def weight(count: int, like: Tensor) -> Tensor:
    """Sum of the squared windows of `count` frames, by which the result of `overlap` is divided."""
    return overlap(_hann(like).square().expand(1, count, WINDOW))


class Network(nn.Module):
    """Encoder, quantizer and decoder over whole clips, for training; `Codec` runs them block by block."""

    def __init__(self, dimension: int, config: FrameConfig, quantizer: Any) -> None:
        super().__init__()
        shared = {"width": config.width, "expansion": config.expansion, "kernel": config.kernel}
        self.encoder = Encoder(dimension, blocks=config.encoder_blocks, **shared)
        self.quantizer = quantizer
        self.decoder = Decoder(dimension, blocks=config.decoder_blocks, **shared)

    def encode(self, x: Tensor) -> Tensor:
        """Samples (B, N) -> embeddings (B, D, T), T = N / HOP rounded up."""
        z: Tensor = self.encoder(F.pad(x, (EDGE, -x.shape[-1] % HOP + EDGE)))
        return z

    def decode(self, z: Tensor) -> Tensor:
        """Embeddings (B, D, T) -> samples (B, T HOP)."""
        whole = overlap(self.decoder(z)) / weight(z.shape[-1], z).clamp(min=1e-3)
        return whole[:, EDGE:-EDGE]


class Codec:
    """A trained network, ready to encode and decode streams.

    It computes BLOCK_FRAMES frames at a time and pads the last block with silence. So each frame is computed at the
    same place in arrays of the same shape, however the samples arrive, and not even rounding can change a code.
    """

    def __init__(self, network: Network) -> None:
        self.layout = MONO
        self.network = network.eval().requires_grad_(False)
        self.codebooks = len(network.quantizer.vq.layers)

    @torch.inference_mode()
    def encode(self, blocks: Iterable[np.ndarray], codebooks: int) -> Iterator[np.ndarray]:
        """Samples, float32 (samples,) blocks of any size -> codes, int64 (frames, codebooks) blocks."""
        carried = self.network.encoder.blocks.start()
        for samples, frames in _windows(blocks):
            z = self.network.encoder(torch.from_numpy(samples)[None], carried)  # (1, D, BLOCK_FRAMES)
            codes = self.network.quantizer.vq.encode(z, n_q=codebooks)  # (Q, 1, BLOCK_FRAMES)
            yield codes[:, 0, :frames].T.numpy()

    @torch.inference_mode()
    def decode(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Codes, integer (frames, codebooks) blocks -> samples, float32 blocks; HOP samples per frame in total."""
        carried = self.network.decoder.blocks.start()
        tail = torch.zeros(2, WINDOW - HOP)  # of sound and of squared windows, to which later frames add
        skip = EDGE  # samples before the first frame
        for codes, frames, last in _filled(blocks):
            z = self.network.quantizer.vq.decode(torch.from_numpy(codes.T.astype(np.int64))[:, None])
            windows = self.network.decoder(z, carried)[:, :frames]
            both = torch.cat((overlap(windows), weight(frames, windows)))  # (2, samples)
            both[:, : tail.shape[1]] += tail
            done = frames * HOP + (EDGE if last else 0)
            tail = both[:, frames * HOP :]
            sound = both[0, skip:done] / both[1, skip:done].clamp(min=1e-3)
            skip = 0
            if len(sound):
                yield sound.numpy()


def _windows(blocks: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """The samples of BLOCK_FRAMES frames with EDGE more on both sides, and how many of the frames are not padding."""
    size = BLOCK_FRAMES * HOP
    held, count = [np.zeros(EDGE, np.float32)], EDGE
    for block in blocks:
        held.append(block)
        count += len(block)
        if count >= size + 2 * EDGE:
            rows = np.concatenate(held)
            while len(rows) >= size + 2 * EDGE:
                yield rows[: size + 2 * EDGE], BLOCK_FRAMES
                rows = rows[size:]
            held, count = [rows], len(rows)
    rows = np.concatenate(held)
    frames = -(-(len(rows) - EDGE) // HOP)
    rows = np.pad(rows, (0, 2 * size))
    for first in range(0, frames, BLOCK_FRAMES):
        place = first * HOP
        yield rows[place : place + size + 2 * EDGE], min(BLOCK_FRAMES, frames - first)


def _filled(blocks: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int, bool]]:
    """Codes in blocks of BLOCK_FRAMES, the last padded with zeros; how many are not padding; whether it is the last."""
    held: np.ndarray | None = None
    for block in blocks:
        held = block if held is None else np.concatenate((held, block))
        while len(held) > BLOCK_FRAMES:
            yield held[:BLOCK_FRAMES], BLOCK_FRAMES, False
            held = held[BLOCK_FRAMES:]
    if held is not None and len(held):
        yield np.pad(held, ((0, BLOCK_FRAMES - len(held)), (0, 0))), len(held), True
