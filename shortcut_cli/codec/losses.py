"""Losses of a codec: distances between sound and its reconstruction, adversarial losses, and their balancer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shortcut_cli.codec.layout import RATE_HZ

SCALES = ((256, 20), (512, 40), (1024, 80), (2048, 128))  # samples per window, mel bands
QUIET = 1e-5  # added to mel magnitudes before the logarithm; a full-scale sine has about 0.5


def mel_bands(window: int, bands: int) -> Tensor:
    """Triangular filters, evenly spaced in mel (2595 log10(1 + f / 700)), (window / 2 + 1, bands); columns sum to 1.

    A filter that is too narrow to contain a bin consists of the nearest one.
    """
    highest = 2595 * torch.log10(torch.tensor(1 + RATE_HZ / 2 / 700, dtype=torch.float64))
    edges = 700 * (10 ** (torch.linspace(0, 1, bands + 2, dtype=torch.float64) * highest / 2595) - 1)
    bins = torch.linspace(0, RATE_HZ / 2, window // 2 + 1, dtype=torch.float64)
    columns = []
    for low, middle, high in zip(edges[:-2], edges[1:-1], edges[2:], strict=True):
        column = torch.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)).clamp(min=0)
        if column.sum() <= 0:
            column[(bins - middle).abs().argmin()] = 1
        columns.append(column / column.sum())
    return torch.stack(columns, 1).float()


class LogMel(nn.Module):
    """Mean absolute distance of log-mel magnitudes (natural logarithm) over several window lengths."""

    def __init__(self, scales: tuple[tuple[int, int], ...] = SCALES) -> None:
        super().__init__()
        self.scales = scales
        for window, bands in scales:
            self.register_buffer(f"bands{window}", mel_bands(window, bands), persistent=False)
            self.register_buffer(f"hann{window}", torch.hann_window(window), persistent=False)

    def spectra(self, x: Tensor) -> list[Tensor]:
        """Log-mel magnitudes of samples (B, N) at every scale, (B, frames, bands) each."""
        found = []
        for window, _ in self.scales:
            hann = self.get_buffer(f"hann{window}")
            spectrum = torch.stft(x, window, window // 4, window=hann, center=False, return_complex=True)
            power = torch.view_as_real(spectrum).square().sum(-1)
            magnitude = (power + 1e-12).sqrt() * (2 / window)
            found.append((magnitude.mT @ self.get_buffer(f"bands{window}") + QUIET).log())
        return found

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of y from x, both (B, N); N is at least the longest window."""
        with torch.no_grad():
            target = self.spectra(x)
        distances = [F.l1_loss(found, wanted) for found, wanted in zip(self.spectra(y), target, strict=True)]
        return torch.stack(distances).mean()


def wave_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute difference of samples, each window relative to its own loudness, (B, N) each."""
    loudness = x.square().mean(1, keepdim=True).sqrt().clamp(min=1e-2)
    return F.l1_loss(y / loudness, x / loudness)


def si_sdr_db(x: Tensor, y: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio of y as a reconstruction of x, (B, N) each -> (B,), in dB.

    Le Roux et al. 2019, arXiv 1811.02508. The signals are not centred. Undefined for a silent x.
    """
    share = (x * y).sum(-1, keepdim=True) / x.square().sum(-1, keepdim=True).clamp(min=1e-12)
    signal = (share * x).square().sum(-1)
    return 10 * torch.log10((signal + 1e-12) / ((share * x - y).square().sum(-1) + 1e-12))


def discriminator_loss(real: list[Tensor], made: list[Tensor]) -> Tensor:
    """Hinge loss of the discriminator, mean over its scales (EnCodec, eq. 3)."""
    pairs = zip(real, made, strict=True)
    return torch.stack([F.relu(1 - r).mean() + F.relu(1 + m).mean() for r, m in pairs]).mean()


def adversarial_loss(made: list[Tensor]) -> Tensor:
    """Hinge loss of the generator, mean over the scales (EnCodec, section 3.4)."""
    return torch.stack([F.relu(1 - m).mean() for m in made]).mean()


def feature_loss(real: list[list[Tensor]], made: list[list[Tensor]]) -> Tensor:
    """Distance of the discriminator's features relative to their size, mean over scales and layers (EnCodec, eq. 2)."""
    pairs = [pair for r, m in zip(real, made, strict=True) for pair in zip(r, m, strict=True)]
    return torch.stack([F.l1_loss(m, r) / r.abs().mean().clamp(min=1e-8) for r, m in pairs]).mean()


class Balancer:
    """EnCodec's loss balancer (section 3.4): each loss gets its share of the gradient with respect to the sound.

    Each gradient is divided by a running mean of its norm, and weighted by the loss's share of all weights.
    """

    def __init__(self, weights: dict[str, float], decay: float = 0.999) -> None:
        self.weights, self.decay = weights, decay
        self.state: dict[str, float] = {"steps": 0.0}  # running sums of norms, by name

    def backward(self, losses: dict[str, Tensor], y: Tensor) -> None:
        """Backpropagate the balanced sum of the gradients of `losses` through y (B, N)."""
        gradients = {name: torch.autograd.grad(loss, y, retain_graph=True)[0] for name, loss in losses.items()}
        state, total = self.state, sum(self.weights[name] for name in losses)
        state["steps"] = state["steps"] * self.decay + 1
        combined = torch.zeros_like(y)
        for name, gradient in gradients.items():
            norm = gradient.flatten(1).norm(dim=1).mean().item()
            # A loss that starts later counts as if it had always had its first norm.
            earlier = state[name] * self.decay if name in state else norm * (state["steps"] - 1)
            state[name] = earlier + norm
            mean = state[name] / state["steps"]
            combined += gradient * (self.weights[name] / total / max(mean, 1e-12))
        y.backward(combined)
