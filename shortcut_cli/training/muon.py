"""Muon: gradient descent with momentum, each update of a matrix brought near to an orthogonal one.

Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. It is ours, not torch.optim.Muon, for three reasons: one
weight that holds several matrices, as of queries, keys and values, is orthogonalised part by part; matrices of equal
shape are done at once; and products are in fp32 on a CPU unless the run's are in bf16 (torch's always are).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shortcut_cli.kernels import bf16
from shortcut_cli.training import eager, sharded
from shortcut_cli.training.parallel import ALONE

# Of a x + b x^3 + c x^5, one after the other: the first three of the five in modded-nanogpt's train_gpt.py, computed by
# the method of Amsel et al. 2025 (Polar Express, arXiv 2505.16932) for a margin of 1.02. All five take longer and bring
# singular values to 0.86 to 1.14, where three leave 0.16 to 1.87.
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
)
MARGIN = 1.01  # that the largest singular value stays below 1 in bf16 too


def orthogonalise(x: Tensor) -> Tensor:
    """(N, m, n) -> (N, m, n): each matrix U S V^T becomes U S' V^T by a Newton-Schulz iteration.

    Singular values above 1/700 of the Frobenius norm end between 0.15 and 1.88, smaller ones may end below.
    The products are in bf16 on CUDA, as in the original, and on a CPU where those of the model are.
    """
    tall = x.shape[1] > x.shape[2]
    y = x.mT if tall else x
    if x.device.type == "cuda" or bf16.wanted(x):
        y = y.bfloat16()
    y = y / (MARGIN * y.norm(dim=(1, 2), keepdim=True)).clamp(min=1e-7)
    y = _by_gram(y) if y.dtype == torch.float32 and y.shape[1] < y.shape[2] else _newton_schulz(y)
    return (y.mT if tall else y).type_as(x)


def _newton_schulz(y: Tensor) -> Tensor:
    """(N, m, n) through all polynomials, m at most n."""
    for a, b, c in COEFFICIENTS:
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y


def _by_gram(y: Tensor) -> Tensor:
    """The same for m well below n, in fp32: a step's polynomial in Y Y^T is (m, m), and so is the product of them all.

    With n = 4 m it takes 17 of 27 MACs. In bf16 Y Y^T would be too coarse to go on with.
    """
    gram = y @ y.mT
    whole = None
    for number, (a, b, c) in enumerate(COEFFICIENTS):
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=1, dim2=2).add_(a)
        whole = step if whole is None else step @ whole
        if number < len(COEFFICIENTS) - 1:
            gram = step @ gram @ step
    assert whole is not None
    return whole @ y


def scale(shape: Sequence[int]) -> float:
    """The learning rate of a matrix (outputs, inputs), as a multiple of the optimizer's.

    An orthogonal update of a matrix with more outputs than inputs changes each output less.
    """
    outputs, inputs = shape
    return math.sqrt(max(1.0, outputs / inputs))


class Muon(eager.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    groups: of parameters with one shape each; `parts` says how many matrices, one below the other, each holds.
    processes: those that train together. Each orthogonalises its share of the matrices, and gets the rest.
    """

    processes = ALONE

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all weights that have a gradient."""
        assert closure is None
        done = 0  # matrices
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._step(weights, [weight.grad for weight in weights], group, done)
            done += len(weights) * group["parts"]

    def _step(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any], done: int) -> None:
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        own = [sharded.local(weight) for weight in weights]  # and what follows, up to `assembled`
        momenta = [sharded.local(self.state[weight]["momentum"]) for weight in weights]
        gradients = [sharded.local(gradient) for gradient in gradients]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        aheads = torch._foreach_lerp(gradients, momenta, group["momentum"])
        ahead = torch.stack(list(map(sharded.assembled, aheads, weights)))  # (W, parts m, n)
        whole = ahead.shape
        matrices = ahead.view(len(weights) * group["parts"], -1, whole[-1])
        updates = self.processes.shared(orthogonalise, matrices, done)
        rate = group["lr"] * scale(updates.shape[1:])
        divided = [sharded.local(sharded.part(*pair)) for pair in zip(updates.reshape(whole), weights, strict=True)]
        torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(own, divided, alpha=-rate)
