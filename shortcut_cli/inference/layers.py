"""What each layer holds and adds: sizes, gradients, what the head would say there, and how alike the layers are.

A state is what a layer, or the head, reads as its residual stream; that behind layer l is the one that the next reader
gets, whatever the architecture mixes into it. So the last one is what the head reads.

Logit lens (nostalgebraist 2020): the loss if the head, with its norm, read that state. Linear CKA (Kornblith et al.
2019, arXiv 1905.00414, eq. 4 with centred columns), of states X, Y (N, D) at N tokens:

    CKA = |Y^T X|^2 / (|X^T X| |Y^T Y|)          Frobenius norms

Two layers at a CKA near one hold nearly the same, up to rotation and scale: one can take the place of the other, so
that masking either alone costs little, though masking both may cost much.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shortcut_cli.inference.metrics import Floats
from shortcut_cli.models.loss import token_losses
from shortcut_cli.models.trace import Trace, layer_name
from shortcut_cli.models.transformer import Decoder

PARTS = ("attention", "feed_forward")  # of a layer, whose `out` is what they add


class LayerSums:
    """Sums over all tokens of the batches that were added. L layers, L + 1 states, D channels."""

    def __init__(self, model: Decoder) -> None:
        states, width, device = model.config.layers + 1, model.config.width, model.norm.weight.device
        self.model, self.tokens = model, 0
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.lens = torch.zeros(states, dtype=torch.float64)  # nats
        self.squares = torch.zeros(states, dtype=torch.float64)  # of states
        self.slopes = torch.zeros(states, dtype=torch.float64)  # squares of gradients
        self.added = {part: torch.zeros(states - 1, dtype=torch.float64) for part in PARTS}  # squares
        self.means = torch.zeros(states, width, dtype=wide, device=device)
        self.products = torch.zeros(states, states, width, width, dtype=wide, device=device)  # of states i <= j

    def add(self, ids: Tensor) -> None:
        """One batch of windows of ids, int64 (B, T + 1): a pass forward, and one back from the sum of their losses."""
        trace, entered = Trace(keep_states=True), list[Tensor]()
        with torch.enable_grad(), ExitStack() as hooks:
            hooks.enter_context(_hook(self.model.embedding, entered.append))
            for part, layer, module in self._parts():
                hooks.enter_context(_hook(module, lambda x, sums=self.added[part], n=layer: _add_square(sums, n, x)))
            losses = token_losses(self.model(ids[:, :-1], trace=trace), ids[:, 1:])
            for number, state in enumerate(trace.states):
                # Not from autograd.grad: kernels of lower layers add to a gradient in place, once it is theirs.
                state.register_hook(lambda grad, n=number: _add_square(self.slopes, n, grad))
            torch.autograd.grad(losses.sum(), entered)
        self.tokens += losses.numel()
        with torch.no_grad():
            self._add_states([state.detach() for state in trace.states], ids[:, 1:])

    def _parts(self) -> Iterator[tuple[str, int, nn.Module]]:
        for layer, block in enumerate(self.model.blocks):
            for part in PARTS:
                yield part, layer, block.get_submodule(f"{part}.out")

    def _add_states(self, states: list[Tensor], targets: Tensor) -> None:
        wide = [state.to(self.means.dtype).flatten(0, 1) for state in states]  # (B T, D)
        for i, state in enumerate(states):
            _add_square(self.squares, i, state)
            self.lens[i] += token_losses(self.model.head(self.model.norm(state)), targets).double().sum().cpu()
            self.means[i] += wide[i].sum(0)
            for j in range(i, len(states)):
                self.products[i, j] += wide[i].T @ wide[j]

    def result(self) -> dict[str, Any]:
        """`layers`, from the embedding up, and `cka` of their states, None if one of the two is constant."""
        width, layers = self.model.config.width, []
        for number in range(len(self.lens)):
            entry = {
                "state": layer_name(number),
                "lens_nats_per_token": float(self.lens[number]) / self.tokens,
                "state_rms": self._rms(self.squares[number], width),
                "gradient_rms": self._rms(self.slopes[number], width),
            }
            for part, sums in self.added.items():
                entry[f"{part}_rms"] = self._rms(sums[number - 1], width) if number else None
            layers.append(entry)
        names = [entry["state"] for entry in layers]
        return {"layers": layers, "cka": {"states": names, "matrix": self._cka()}}

    def _rms(self, squares: Tensor, width: int) -> float:
        return math.sqrt(float(squares) / self.tokens / width)

    def _cka(self) -> list[list[float | None]]:
        means = self.means / self.tokens
        count = len(means)
        sizes: Floats = np.zeros((count, count))
        for i in range(count):
            for j in range(i, count):
                centred = self.products[i, j] - self.tokens * torch.outer(means[i], means[j])
                sizes[i, j] = sizes[j, i] = float(centred.square().sum())
        own = np.sqrt(np.outer(sizes.diagonal(), sizes.diagonal()))
        return [
            [float(a / b) if b else None for a, b in zip(*rows, strict=True)] for rows in zip(sizes, own, strict=True)
        ]


def _add_square(sums: Tensor, number: int, x: Tensor) -> None:
    sums[number] += x.detach().double().square().sum().cpu()


@contextmanager
def _hook(module: nn.Module, see: Any) -> Iterator[None]:
    """In this block, show what the module gives to see(x)."""
    handle = module.register_forward_hook(lambda _module, _given, x: see(x) and None)
    try:
        yield
    finally:
        handle.remove()
