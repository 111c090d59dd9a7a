"""EnCodec at 24 kHz (Defossez et al. 2022, arXiv 2210.13438), block by block, with the codes of one pass over the file.

The network is causal: a convolution needs the samples that its kernel reaches back to, the LSTM its state. Both are
carried from block to block, so memory does not grow with the length of a file. What a block computes depends on its
place alone, not on how the samples came in: blocks are cut here, always BLOCK_FRAMES frames long, and four of them for
the LSTM and what follows it. The LSTM, which would wait for its weights, can take frames of several streams together.

Only this file imports `encodec`, whose package imports torchaudio. Its Linux wheel does not load beside a CPU build of
torch, and nothing of it is needed to encode or decode, so a placeholder stands in for it during the import.
"""

import itertools
import math
import sys
import types
import warnings
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shortcut_cli.codec.stream import HOP, LEVELS, MONO, STEREO, Layout, regular
from shortcut_cli.errors import CheckFailed, Rejected

# Two processes at once, one thread each: 15.3 times real time at 50, 15.7 at 75, 15.9 at 150, 15.9 at 200.
BLOCK_FRAMES = 150
# The LSTM goes over several blocks at once: 0.37 ms a frame for 150 of them, 0.31 ms for 600, on one core;
# convolutions take no less in larger blocks.
RECURRENT_BLOCKS = 4
# Streams that the LSTM takes together: its 8 MB of weights are read once for all of them. A frame of one takes 0.35 ms,
# of two 0.32, of four 0.16, of eight 0.09, of sixteen 0.07 each.
ROWS = 8
SHORT_FRAMES = 16  # more than any layer's padding


def package() -> Any:
    """The module `encodec.model`, imported without torchaudio."""
    if "encodec.model" in sys.modules:
        return sys.modules["encodec.model"]
    missing = "torchaudio" not in sys.modules
    if missing:
        sys.modules["torchaudio"] = types.ModuleType("torchaudio")
    try:
        import encodec.model

        return encodec.model
    finally:
        if missing:
            del sys.modules["torchaudio"]


def build(layout: Layout = MONO) -> Any:
    """The 24 kHz or the 48 kHz model of the package with random weights."""
    with warnings.catch_warnings():
        # The package uses the older weight_norm, which torch deprecates.
        warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)
        kinds = package().EncodecModel
        return (kinds.encodec_model_24khz if layout == MONO else kinds.encodec_model_48khz)(pretrained=False)


def load(path: Path) -> tuple[Any, Layout]:
    """The model with the weights of a checkpoint of the package, and its layout.

    Raises CheckFailed where the file is no such checkpoint; no code in it is run.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        # Only the 24 kHz model has weight norm.
        layout = MONO if any(name.endswith("weight_g") for name in weights) else STEREO
        model = build(layout)
        model.load_state_dict(weights)
    except Exception as error:  # torch.load raises anything on a file that it did not write
        problem = str(error).splitlines()[0]
        raise CheckFailed(f"{path} is not a checkpoint of the `encodec` package: {problem}") from error
    return model, layout


def quantizer(dimension: int, codebooks: int, codes: int, decay: float) -> Any:
    """The package's residual vector quantizer (Zeghidour et al. 2021, arXiv 2107.03312) over embeddings (B, D, T).

    Its own revival of dead codes is switched off: it puts a new vector in `embed` and then overwrites it, in the same
    call, by the running mean of the old one. `rvq.quantize` revives them.
    """
    kinds = package().qt
    return kinds.ResidualVectorQuantizer(
        dimension, codebooks, codes, decay, kmeans_init=True, kmeans_iters=10, threshold_ema_dead_code=0
    )


def seanet(dimension: int, filters: int) -> tuple[Any, Any]:
    """The encoder and decoder of the 24 kHz model with `filters` filters in the outermost layer (32 there)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)
        kinds = package().m
        shared = {"dimension": dimension, "n_filters": filters, "causal": True}
        return kinds.SEANetEncoder(**shared), kinds.SEANetDecoder(**shared)


class Spectrogram(nn.Module):
    """What the discriminator asks of torchaudio: the complex STFT, by the norm of the window, (B, C, F, frames)."""

    def __init__(self, n_fft: int, hop_length: int, win_length: int, **_: Any) -> None:
        super().__init__()
        assert n_fft == win_length, (n_fft, win_length)
        self.hop_length = hop_length
        self.register_buffer("window", torch.hann_window(win_length), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, N)."""
        window = self.get_buffer("window")
        found = torch.stft(
            x.flatten(0, 1), len(window), self.hop_length, window=window, center=False, return_complex=True
        )
        return found.unflatten(0, x.shape[:2]) / window.square().sum().sqrt()


def discriminator(filters: int) -> Any:
    """The package's multi-scale STFT discriminator (EnCodec, 3.4): (B, 1, N) -> logits and features of each scale."""
    package()
    stand_in: Any = types.ModuleType("torchaudio")
    stand_in.transforms = types.SimpleNamespace(Spectrogram=Spectrogram)
    kept = sys.modules.get("torchaudio")
    sys.modules["torchaudio"] = stand_in
    try:
        import encodec.msstftd as kinds

        kinds.torchaudio = stand_in
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)
            return kinds.MultiScaleSTFTDiscriminator(filters=filters)
    finally:
        del sys.modules["torchaudio"]
        if kept is not None:
            sys.modules["torchaudio"] = kept


@torch.no_grad()
def untrained(seed: int, layout: Layout = MONO) -> Any:
    """A model with weights drawn from a seed, for tests: its codes vary, and all codebooks are in use.

    Convolutions and LSTM are drawn so that signals keep their size; codebooks in the scale of what they quantize.
    """
    generator = torch.Generator().manual_seed(seed)
    model = build(layout)
    for name, weight in sorted(model.named_parameters()):
        if ".norm." in name:
            continue
        if not name.endswith("weight_g"):
            scale = 1.0 / math.sqrt(weight[0].numel()) if weight.dim() > 1 else 0.0
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    for name, weight in sorted(model.named_parameters()):
        if name.endswith("weight_g"):
            direction = model.get_parameter(name.removesuffix("g") + "v")
            weight.copy_(direction.flatten(1).norm(dim=1).view_as(weight))
    for number, layer in enumerate(model.quantizer.vq.layers):
        book = layer._codebook
        book.embed.copy_(torch.randn(book.embed.shape, generator=generator) * 0.3 * 0.9**number)
        book.inited.fill_(1)
    return model


class Codec:
    """A 24 kHz model, ready to encode and decode streams; weight norms are folded into the weights."""

    def __init__(self, model: Any, block_frames: int = BLOCK_FRAMES) -> None:
        self.layout = MONO
        self.block_frames = block_frames  # computed at once; the codes do not depend on it
        self.codebooks = len(model.quantizer.vq.layers)
        self.model = model.eval().requires_grad_(False)
        for module in model.modules():
            if hasattr(module, "weight_g"):
                nn.utils.remove_weight_norm(module)
        network = model.encoder.model
        middle = next(number for number, part in enumerate(network) if isinstance(part, package().m.SLSTM))
        self.before, self.recurrence, self.after = network[:middle], network[middle], network[middle + 1 :]

    @torch.inference_mode()
    def encode(self, blocks: Iterable[np.ndarray], codebooks: int) -> Iterator[np.ndarray]:
        """Samples, float32 (samples,) blocks of any size, -> codes, int64 (frames, codebooks) blocks.

        The codes are those of one pass over all samples, for any division into blocks.
        """
        one = _Encoding(self, blocks, codebooks)
        while one.go_on():
            yield from one.emptied()
            y, one.state = self.recurrence.lstm(one.features[:, None], one.state)  # (frames, 1, 512)
            one.take(y[:, 0])
        yield from one.emptied()

    @torch.inference_mode()
    def encode_many(
        self, streams: Iterable[Iterable[np.ndarray]], codebooks: int
    ) -> Iterator[tuple[int, np.ndarray | Rejected | None]]:
        """As `encode`, for several streams, ROWS of them at a time, which the LSTM takes together.

        Yields (number of the stream, codes), and at its end (number, None), or (number, reason) where reading its
        blocks raised Rejected. The codes of a stream do not depend on the others. From those of `encode` they differ
        only where a frame is as near to one code as to another, to the last bits: a product of matrices adds up in
        another order than that of a matrix and a vector.
        """
        waiting = enumerate(streams)
        active: dict[int, _Encoding] = {}
        while True:
            for number, blocks in itertools.islice(waiting, ROWS - len(active)):
                active[number] = _Encoding(self, blocks, codebooks)
            if not active:
                return
            for number, one in list(active.items()):
                reason = None
                try:
                    going = one.go_on()
                except Rejected as rejected:
                    going, reason = False, rejected
                for codes in one.emptied():
                    yield number, codes
                if not going:
                    del active[number]
                    yield number, reason
            if active:
                self._recur(list(active.values()))

    def _recur(self, active: "list[_Encoding]") -> None:
        """The LSTM over as many frames as all have; beside one alone a row of zeros, so that it is a matrix too."""
        lstm = self.recurrence.lstm
        frames = min(len(one.features) for one in active)
        x = torch.zeros(frames, max(2, len(active)), lstm.input_size)
        h, c = torch.zeros(2, lstm.num_layers, x.shape[1], lstm.hidden_size)
        for row, one in enumerate(active):
            x[:, row] = one.features[:frames]
            if one.state:
                h[:, row], c[:, row] = one.state
        y, (h, c) = lstm(x, (h, c))
        for row, one in enumerate(active):
            one.state = h[:, row], c[:, row]
            one.take(y[:, row])

    @torch.inference_mode()
    def decode(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Codes, integer (frames, codebooks) blocks, -> samples, float32 blocks of HOP samples a frame."""
        stream = Stream(self.model.decoder.model, SHORT_FRAMES)
        for codes, last in regular(blocks, self.block_frames):
            embedding = self.model.quantizer.vq.decode(torch.from_numpy(codes.T.astype(np.int64))[:, None])
            yield stream.push(embedding, last)[0, 0].numpy()


class _Encoding:
    """One stream on its way through the encoder, which stops wherever the LSTM is needed."""

    def __init__(self, codec: Codec, blocks: Iterable[np.ndarray], codebooks: int) -> None:
        self.features = torch.zeros(0)  # (frames, 512), what the LSTM has not taken yet
        self.state: Any = None  # of the LSTM
        self.given: list[Tensor] = []  # what it gave for frames of this block
        self.codes: list[np.ndarray] = []
        self.steps = self._steps(codec, blocks, codebooks)

    def go_on(self) -> bool:
        """Up to the next features for the LSTM, or to the end: False. Raises what reading the blocks raises."""
        if not len(self.features):
            try:
                self.features = self.steps.send(torch.cat(self.given) if self.given else None)
            except StopIteration:
                return False
            self.given = []
        return True

    def take(self, y: Tensor) -> None:
        """What the LSTM gave for the first frames of `features`."""
        self.given.append(y)
        self.features = self.features[len(y) :]

    def emptied(self) -> list[np.ndarray]:
        """The codes found since the last call."""
        found, self.codes = self.codes, []
        return found

    def _steps(
        self, codec: Codec, blocks: Iterable[np.ndarray], codebooks: int
    ) -> Generator[Tensor, Tensor | None, None]:
        """Yields features and is sent what the LSTM gives for them."""
        before, after = Stream(codec.before, SHORT_FRAMES * HOP), Stream(codec.after, SHORT_FRAMES)
        features = (
            before.push(torch.from_numpy(samples)[None, None], last)[0].T.numpy()
            for samples, last in regular(blocks, codec.block_frames * HOP)
        )
        for rows, last in regular(features, RECURRENT_BLOCKS * codec.block_frames):
            x = torch.from_numpy(rows)
            y = yield x
            assert y is not None
            assert y.shape == x.shape, (y.shape, x.shape)
            embedding = after.push((y + x if codec.recurrence.skip else y).T[None], last)  # (1, 128, frames)
            for part in embedding.split(codec.block_frames, -1):
                codes = codec.model.quantizer.vq.encode(part, n_q=codebooks)  # (Q, 1, frames)
                self.codes.append(codes[:, 0].T.numpy())


class Segments:
    """The 48 kHz stereo model, which works on segments of one second that overlap by a hundredth, each for itself.

    A segment is brought to the same loudness before it is coded. That loudness goes with its codes, in whole dB.
    """

    def __init__(self, model: Any) -> None:
        self.layout = STEREO
        self.codebooks = len(model.quantizer.vq.layers)
        self.model = model.eval().requires_grad_(False)

    @torch.inference_mode()
    def encode(self, blocks: Iterable[np.ndarray], codebooks: int) -> Iterator[tuple[int, np.ndarray]]:
        """Samples, float32 (samples, 2) blocks, -> for each segment its level, 0 .. LEVELS - 1 dB below full scale, and
        its codes, int64 (frames, codebooks). The codes are those of the package's own pass over the whole.
        """
        for samples in _overlapping(blocks, self.layout):
            x = torch.from_numpy(np.ascontiguousarray(samples.T))[None]  # (1, 2, N)
            scale = 1e-8 + x.mean(1, keepdim=True).square().mean(2, keepdim=True).sqrt()
            level = round(min(max(-20 * math.log10(scale.item()), 0), LEVELS - 1))
            codes = self.model.quantizer.vq.encode(self.model.encoder(x / scale), n_q=codebooks)  # (Q, 1, frames)
            yield level, codes[:, 0].T.numpy()

    @torch.inference_mode()
    def decode(self, segments: Iterable[tuple[int, np.ndarray]]) -> Iterator[np.ndarray]:
        """What `encode` gave -> samples, float32 (samples, 2) blocks; where segments overlap they fade over."""
        shape = 0.5 - (torch.linspace(0, 1, self.layout.segment + 2)[1:-1] - 0.5).abs()
        tail, advance = torch.zeros(3, 0), self.layout.advance  # two channels, and the sum of what they are weighted by
        for level, codes in segments:
            z = self.model.quantizer.vq.decode(torch.from_numpy(codes.T.astype(np.int64))[:, None])
            x = self.model.decoder(z)[0] * 10 ** (-level / 20)  # (2, N)
            weighted = torch.cat((x * shape[: x.shape[1]], shape[None, : x.shape[1]]))
            overlap = min(tail.shape[1], weighted.shape[1])
            weighted[:, :overlap] += tail[:, :overlap]
            done, tail = weighted[:, :advance], weighted[:, advance:]
            yield (done[:2] / done[2]).T.numpy()
        if tail.shape[1]:
            yield (tail[:2] / tail[2]).T.numpy()


def _overlapping(blocks: Iterable[np.ndarray], layout: Layout) -> Iterator[np.ndarray]:
    """Samples (N, channels) in segments, each of which begins `advance` after the one before; the last are shorter."""
    held = np.zeros((0, layout.channels), np.float32)
    for block in blocks:
        held = np.concatenate((held, block))
        while len(held) > layout.segment:
            yield held[: layout.segment]
            held = held[layout.advance :]
    while len(held):
        yield held[: layout.segment]
        held = held[layout.advance :]


def _sum(a: Any, x: Tensor, b: Any, y: Tensor) -> Tensor:
    """a(x) + b(y) of two convolutions with one tap, as products that add to one tensor: (1, C, T) each."""
    assert a.kernel_size == b.kernel_size == (1,), (a, b)
    total = torch.addmm((a.bias + b.bias)[:, None], a.weight[..., 0], x[0])
    return total.addmm_(b.weight[..., 0], y[0])[None]


class Stream:
    """A causal SEANet encoder or decoder, with what each of its layers carries from block to block."""

    def __init__(self, network: nn.Sequential, short: int) -> None:
        self.network = network
        self.short = short  # inputs below this length can be shorter than some layer's padding
        self.kinds = sys.modules["encodec.modules"]
        self.carried: dict[nn.Module | None, Any] = {}
        self.padded: set[nn.Module] = set()  # convolutions whose input has what they carry before it already

    def push(self, x: Tensor, last: bool) -> Tensor:
        """The output of one block (1, C, T). Every block but the last is a whole number of frames."""
        if last and not self.carried and x.shape[-1] < self.short:
            # The only block: the package's own pass, with its own treatment of inputs shorter than the padding.
            y: Tensor = self.network(x)
            return y
        return self._run(self.network, x, last)

    def _run(self, module: nn.Module, x: Tensor, last: bool) -> Tensor:
        if isinstance(module, nn.Sequential):
            return self._row(list(module), x, last)
        if isinstance(module, self.kinds.seanet.SEANetResnetBlock):
            *before, wide = module.block
            return _sum(wide.conv.conv, self._row(before, x, last), module.shortcut.conv.conv, x)
        if isinstance(module, self.kinds.SConv1d):
            return self._convolve(module, x, last)
        if isinstance(module, self.kinds.SConvTranspose1d):
            return self._transposed(module, x)
        if isinstance(module, self.kinds.SLSTM):
            return self._recur(module, x)
        y: Tensor = module(x)
        return y

    def _row(self, parts: list[nn.Module], x: Tensor, last: bool) -> Tensor:
        for number, part in enumerate(parts):
            following = parts[number + 1] if number + 1 < len(parts) else None
            reach = self._reach(following) if isinstance(part, nn.ELU) else 0
            if reach:
                x = self._into_padding(following, reach, x)
            elif isinstance(part, nn.ELU) and number:
                x = F.elu_(x)  # what the part before made, and nothing else reads
            else:
                x = self._run(part, x, last)
        return x

    def _reach(self, module: nn.Module | None) -> int:
        """How far a convolution reaches back; 0 for anything else."""
        if not isinstance(module, self.kinds.SConv1d):
            return 0
        conv: Any = module.conv.conv  # type: ignore[union-attr]
        return int((conv.kernel_size[0] - 1) * conv.dilation[0] - (conv.stride[0] - 1))

    def _into_padding(self, convolution: Any, reach: int, x: Tensor) -> Tensor:
        """ELU of x, written behind what the convolution after it carries, or reflects, which saves that a copy."""
        padded = x.new_empty(*x.shape[:-1], reach + x.shape[-1])
        torch.ops.aten.elu.out(x, out=padded[..., reach:])
        before = self.carried.get(convolution)
        padded[..., :reach] = padded[..., reach + 1 : 2 * reach + 1].flip(-1) if before is None else before
        self.padded.add(convolution)
        return padded

    def _convolve(self, module: Any, x: Tensor, last: bool) -> Tensor:
        """The samples that the kernel reaches back to come from the block before, at the start by reflection."""
        conv, reach = module.conv.conv, self._reach(module)
        if module in self.padded:
            self.padded.remove(module)
        elif module in self.carried:
            x = torch.cat((self.carried[module], x), -1)
        elif reach:
            x = F.pad(x, (reach, 0), "reflect")
        # The package fills up the last frame by reflection at the end.
        missing = (reach - x.shape[-1]) % conv.stride[0] if last else 0
        if missing:
            x = F.pad(x, (0, missing), "reflect")
        self.carried[module] = x[..., x.shape[-1] - reach :].clone()  # a view would keep all of x
        y: Tensor = conv(x)
        return y

    def _transposed(self, module: Any, x: Tensor) -> Tensor:
        """A frame reaches into the next one (kernel = 2 strides), so each block begins with the frame before it."""
        conv = module.convtr.convtr
        stride = conv.stride[0]
        assert conv.kernel_size[0] == 2 * stride, conv
        before = self.carried.get(module)
        self.carried[module] = x[..., -1:].clone()
        y: Tensor = conv(x if before is None else torch.cat((before, x), -1))
        return y[..., 0 if before is None else stride : -stride]

    def _recur(self, module: Any, x: Tensor) -> Tensor:
        x = x.permute(2, 0, 1)
        y, self.carried[module] = module.lstm(x, self.carried.get(module))
        return (y + x if module.skip else y).permute(1, 2, 0)
