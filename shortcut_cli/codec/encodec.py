"""EnCodec (Defossez et al. 2022, arXiv 2210.13438), block by block, with the codes of a single pass over the file.

The 24 kHz network is causal: a convolution needs the samples that its kernel reaches back to, the LSTM its state. Both
are carried from block to block, so memory does not grow with the length of a file. The result of a block depends only
on its position, not on how the samples arrive: blocks are cut here, always BLOCK_FRAMES frames long, four of them at a
time for the LSTM and what follows it. The LSTM is limited by reading its weights, so it can process several streams
together.

Only this file imports `encodec`. That package imports torchaudio, whose Linux wheel does not load with a CPU build of
torch. Encoding and decoding do not use it, so a placeholder replaces it during the import.
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

from shortcut_cli.codec.layout import HOP, LEVELS, MONO, STEREO, Layout, regular
from shortcut_cli.errors import CheckFailed, Rejected
from shortcut_cli.training import tensor_file
from shortcut_cli.training.zip_directory import Malformed

BLOCK_FRAMES = 150  # larger blocks are not faster
RECURRENT_BLOCKS = 4  # the LSTM processes several blocks at once, which is faster; convolutions gain nothing by it
ROWS = 8  # streams that the LSTM processes together, reading its 8 MB of weights once for all of them
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
    """The package's 24 kHz (mono) or 48 kHz (stereo) model with random weights."""
    with warnings.catch_warnings():
        # The package uses the old weight_norm, which torch deprecates.
        warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)
        kinds = package().EncodecModel
        return (kinds.encodec_model_24khz if layout == MONO else kinds.encodec_model_48khz)(pretrained=False)


def load(path: Path) -> tuple[Any, Layout]:
    """The model with the weights of a checkpoint of the package, and its layout. Runs no code from the file.

    Raises CheckFailed if the file is not such a checkpoint.
    """
    try:
        weights = tensor_file.load_unsealed(path)
        if not tensor_file.are_tensors(weights):
            raise Malformed("it is not a dictionary of tensors")
        # Only the 24 kHz model has weight norm.
        layout = MONO if any(name.endswith("weight_g") for name in weights) else STEREO
        model = build(layout)
        model.load_state_dict(weights)
    except (Malformed, RuntimeError) as error:
        problem = str(error).splitlines()[0][: tensor_file.SHOWN]
        raise CheckFailed(f"{path} is not a checkpoint of the `encodec` package: {problem}") from error
    return model, layout


def quantizer(dimension: int, codebooks: int, codes: int, decay: float) -> Any:
    """The package's residual vector quantizer (Zeghidour et al. 2021, arXiv 2107.03312) over embeddings (B, D, T).

    Its own revival of dead codes is switched off, because it has no effect: it puts a new vector into `embed`, and in
    the same call overwrites it with the running mean of the old one. `rvq.quantize` revives dead codes instead.
    """
    kinds = package().qt
    return kinds.ResidualVectorQuantizer(
        dimension, codebooks, codes, decay, kmeans_init=True, kmeans_iters=10, threshold_ema_dead_code=0
    )


def seanet(dimension: int, filters: int) -> tuple[Any, Any]:
    """Encoder and decoder of the 24 kHz model, with `filters` filters in the outermost layer (EnCodec has 32)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)
        kinds = package().m
        shared = {"dimension": dimension, "n_filters": filters, "causal": True}
        return kinds.SEANetEncoder(**shared), kinds.SEANetDecoder(**shared)


class Spectrogram(nn.Module):
    """Replaces torchaudio's Spectrogram: the complex STFT divided by the window's norm, (B, C, F, frames)."""

    def __init__(self, n_fft: int, hop_length: int, win_length: int, **_: Any) -> None:
        super().__init__()
        assert n_fft == win_length, (n_fft, win_length)
        self.hop_length = hop_length
        self.register_buffer("window", torch.hann_window(win_length), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, N) -> (B, C, F, frames), complex."""
        window = self.get_buffer("window")
        found = torch.stft(
            x.flatten(0, 1), len(window), self.hop_length, window=window, center=False, return_complex=True
        )
        y: Tensor = found.unflatten(0, x.shape[:2]) / window.square().sum().sqrt()
        return y


def discriminator(filters: int) -> Any:
    """The package's multi-scale STFT discriminator (EnCodec, sec. 3.4): (B, 1, N) -> logits and features by scale."""
    package()
    placeholder: Any = types.ModuleType("torchaudio")
    placeholder.transforms = types.SimpleNamespace(Spectrogram=Spectrogram)
    kept = sys.modules.get("torchaudio")
    sys.modules["torchaudio"] = placeholder
    try:
        import encodec.msstftd as kinds

        kinds.torchaudio = placeholder  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*weight_norm.*", category=FutureWarning)
            return kinds.MultiScaleSTFTDiscriminator(filters=filters)
    finally:
        del sys.modules["torchaudio"]
        if kept is not None:
            sys.modules["torchaudio"] = kept


@torch.no_grad()
def untrained(seed: int, layout: Layout = MONO) -> Any:
    """A model with weights drawn from a seed, for tests: its codes vary, and all codebooks are used.

    Convolutions and LSTM are scaled to preserve the size of signals, codebooks to the size of what they quantize.
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
    """A 24 kHz model, ready to encode and decode streams. Weight norm is folded into the weights."""

    def __init__(self, model: Any, block_frames: int = BLOCK_FRAMES) -> None:
        self.layout = MONO
        self.block_frames = block_frames  # computed at a time; the codes do not depend on it
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
        """Samples, float32 (samples,) blocks of any size -> codes, int64 (frames, codebooks) blocks.

        The codes are those of one pass over all samples, however they are divided into blocks.
        """
        one = _Encoding(self, blocks, codebooks)
        while one.advance():
            yield from one.take_codes()
            y, one.state = self.recurrence.lstm(one.features[:, None], one.state)  # (frames, 1, 512)
            one.give(y[:, 0])
        yield from one.take_codes()

    @torch.inference_mode()
    def encode_many(
        self, streams: Iterable[Iterable[np.ndarray]], codebooks: int
    ) -> Iterator[tuple[int, np.ndarray | Rejected | None]]:
        """`encode` for several streams, ROWS at a time; the LSTM processes them together.

        Yields (number of the stream, codes), and at the end of a stream (number, None), or (number, error) if reading
        its blocks raised Rejected. The codes of a stream do not depend on the other streams. They differ from those of
        `encode` only if two codes are equally near up to rounding: a matrix-matrix product sums in another order than a
        matrix-vector product.
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
                    going = one.advance()
                except Rejected as rejected:
                    going, reason = False, rejected
                for codes in one.take_codes():
                    yield number, codes
                if not going:
                    del active[number]
                    yield number, reason
            if active:
                self._recur(list(active.values()))

    def _recur(self, active: "list[_Encoding]") -> None:
        """Run the LSTM over the frames that all streams have.

        A single stream gets a row of zeros beside it, so that its product is one of matrices too and rounds the same.
        """
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
            one.give(y[:, row])

    @torch.inference_mode()
    def decode(self, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Codes, integer (frames, codebooks) blocks -> samples, float32 blocks of HOP samples per frame."""
        stream = Stream(self.model.decoder.model, SHORT_FRAMES)
        for codes, last in regular(blocks, self.block_frames):
            embedding = self.model.quantizer.vq.decode(torch.from_numpy(codes.T.astype(np.int64))[:, None])
            yield stream.push(embedding, last)[0, 0].numpy()


class _Encoding:
    """The encoding of one stream, which pauses whenever it needs the LSTM."""

    def __init__(self, codec: Codec, blocks: Iterable[np.ndarray], codebooks: int) -> None:
        self.features = torch.zeros(0)  # (frames, 512), not yet processed by the LSTM
        self.state: Any = None  # of the LSTM
        self.outputs: list[Tensor] = []  # of the LSTM for this block
        self.codes: list[np.ndarray] = []
        self.steps = self._steps(codec, blocks, codebooks)

    def advance(self) -> bool:
        """Continue to the next features for the LSTM; False at the end. Raises what reading the blocks raises."""
        if not len(self.features):
            try:
                self.features = self.steps.send(torch.cat(self.outputs) if self.outputs else None)
            except StopIteration:
                return False
            self.outputs = []
        return True

    def give(self, y: Tensor) -> None:
        """Accept the LSTM's output for the first frames of `features`."""
        self.outputs.append(y)
        self.features = self.features[len(y) :]

    def take_codes(self) -> list[np.ndarray]:
        """The codes computed since the last call."""
        found, self.codes = self.codes, []
        return found

    def _steps(
        self, codec: Codec, blocks: Iterable[np.ndarray], codebooks: int
    ) -> Generator[Tensor, Tensor | None, None]:
        """Yields features and is sent the LSTM's output for them."""
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
    """The 48 kHz stereo model, which encodes segments of one second independently; they overlap by one per cent.

    Each segment is normalized in loudness. The loudness is stored with its codes, in whole dB.
    """

    def __init__(self, model: Any) -> None:
        self.layout = STEREO
        self.codebooks = len(model.quantizer.vq.layers)
        self.model = model.eval().requires_grad_(False)

    @torch.inference_mode()
    def encode(self, blocks: Iterable[np.ndarray], codebooks: int) -> Iterator[tuple[int, np.ndarray]]:
        """Samples, float32 (samples, 2) blocks -> (level, codes) per segment.

        level: 0 .. LEVELS - 1 dB below full scale; codes: int64 (frames, codebooks), those of the package's own pass
        over the whole. The package repeats the end of the last segment as another one if it is where that would begin.
        """
        for samples in _overlapping(blocks, self.layout):
            x = torch.from_numpy(np.ascontiguousarray(samples.T))[None]  # (1, 2, N)
            scale = 1e-8 + x.mean(1, keepdim=True).square().mean(2, keepdim=True).sqrt()
            level = round(min(max(-20 * math.log10(scale.item()), 0), LEVELS - 1))
            codes = self.model.quantizer.vq.encode(self.model.encoder(x / scale), n_q=codebooks)  # (Q, 1, frames)
            yield level, codes[:, 0].T.numpy()

    @torch.inference_mode()
    def decode(self, segments: Iterable[tuple[int, np.ndarray]]) -> Iterator[np.ndarray]:
        """The output of `encode` -> samples, float32 (samples, 2) blocks; overlapping segments are cross-faded."""
        shape = 0.5 - (torch.linspace(0, 1, self.layout.segment + 2)[1:-1] - 0.5).abs()
        tail, advance = torch.zeros(3, 0), self.layout.advance  # two channels, and the sum of their weights
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
    """Samples (N, channels) in segments that start every `layout.advance` samples; only the last can be shorter."""
    held = np.zeros((0, layout.channels), np.float32)
    for block in blocks:
        held = np.concatenate((held, block))
        while len(held) > layout.segment:
            yield held[: layout.segment]
            held = held[layout.advance :]
    if len(held):
        yield held


def _sum(a: Any, x: Tensor, b: Any, y: Tensor) -> Tensor:
    """a(x) + b(y) for two convolutions of kernel size 1, accumulated in one tensor: (1, C, T) each."""
    assert a.kernel_size == b.kernel_size == (1,), (a, b)
    total = torch.addmm((a.bias + b.bias)[:, None], a.weight[..., 0], x[0])
    return total.addmm_(b.weight[..., 0], y[0])[None]


class Stream:
    """A causal SEANet encoder or decoder, with the state that its layers carry from block to block."""

    def __init__(self, network: nn.Sequential, short: int) -> None:
        self.network = network
        self.short = short  # inputs shorter than this may be shorter than a layer's padding
        self.kinds = sys.modules["encodec.modules"]
        self.carried: dict[nn.Module | None, Any] = {}
        self.padded: set[nn.Module] = set()  # convolutions whose input already includes the carried samples

    def push(self, x: Tensor, last: bool) -> Tensor:
        """The output for one block (1, C, T). Every block but the last is a whole number of frames."""
        if last and not self.carried and x.shape[-1] < self.short:
            # The only block: leave inputs shorter than the padding to the package's own pass.
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
                x = F.elu_(x)  # in place: only this layer reads the output of the previous one
            else:
                x = self._run(part, x, last)
        return x

    def _reach(self, module: nn.Module | None) -> int:
        """How many samples a convolution reaches back; 0 for other modules."""
        if not isinstance(module, self.kinds.SConv1d):
            return 0
        conv: Any = module.conv.conv
        return int((conv.kernel_size[0] - 1) * conv.dilation[0] - (conv.stride[0] - 1))

    def _into_padding(self, convolution: Any, reach: int, x: Tensor) -> Tensor:
        """ELU of x, written behind the samples that the next convolution carries or reflects, which saves a copy."""
        padded = x.new_empty(*x.shape[:-1], reach + x.shape[-1])
        torch.ops.aten.elu.out(x, out=padded[..., reach:])
        before = self.carried.get(convolution)
        padded[..., :reach] = padded[..., reach + 1 : 2 * reach + 1].flip(-1) if before is None else before
        self.padded.add(convolution)
        return padded

    def _convolve(self, module: Any, x: Tensor, last: bool) -> Tensor:
        """The samples that the kernel reaches back to come from the previous block, at the start by reflection."""
        conv, reach = module.conv.conv, self._reach(module)
        if module in self.padded:
            self.padded.remove(module)
        elif module in self.carried:
            x = torch.cat((self.carried[module], x), -1)
        elif reach:
            x = F.pad(x, (reach, 0), "reflect")
        # The package pads the last frame by reflection.
        missing = (reach - x.shape[-1]) % conv.stride[0] if last else 0
        if missing:
            x = F.pad(x, (0, missing), "reflect")
        self.carried[module] = x[..., x.shape[-1] - reach :].clone()  # a view would keep all of x
        y: Tensor = conv(x)
        return y

    def _transposed(self, module: Any, x: Tensor) -> Tensor:
        """A frame extends into the next one (kernel = 2 strides), so each block starts with the frame before it."""
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
        z: Tensor = y + x if module.skip else y
        return z.permute(1, 2, 0)
