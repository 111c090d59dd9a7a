"""Residual vector quantization in training: each clip has its own number of codebooks, and dead codes are revived."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

DEAD = 0.1  # a code is dead if its running count is below this share of the mean count


def quantize(quantizer: Any, z: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize embeddings z (B, D, T), clip b with the first codebooks[b] codebooks; codebooks: (B,).

    Returns the decoder's input (B, D, T), whose gradient goes straight through to z (van den Oord et al. 2017,
    arXiv 1711.00937), and the commitment loss, the mean squared distance of the residuals from their codes.

    All codebooks see all clips, so that each learns at every step, whatever numbers were drawn; codebooks beyond a
    clip's own number add nothing to its output. (Kumar et al. 2023, arXiv 2306.06546, section 3.2, also draw the number
    per clip.)
    """
    residual, total, penalty = z, torch.zeros_like(z), z.new_zeros(())
    for number, layer in enumerate(quantizer.vq.layers):
        book = layer._codebook
        found = residual.detach().mT.contiguous()  # (B, T, D)
        codes = book(found)[0].mT  # (B, D, T)
        if book.training:
            _revive(book, found.flatten(0, 1))
        used = (codebooks > number)[:, None, None]
        penalty = penalty + (F.mse_loss(residual, codes, reduction="none") * used).mean()
        total = total + codes * used
        residual = residual - codes
    return z + (total - z).detach(), penalty / len(quantizer.vq.layers)


@torch.no_grad()
def _revive(book: Any, found: Tensor) -> None:
    """Replace dead codes by random vectors of this step, found (N, D), with the mean count.

    Draws from torch's global generator, which the trainer seeds at each step.
    """
    mean = book.cluster_size.mean()
    dead = book.cluster_size < DEAD * mean
    count = int(dead.sum())
    if count:
        fresh = found[torch.randint(len(found), (count,), device=found.device)]
        book.embed[dead] = fresh
        book.embed_avg[dead] = fresh * mean
        book.cluster_size[dead] = mean


@torch.no_grad()
def perplexities(codes: Tensor, size: int) -> list[float]:
    """exp(entropy) of the codes of each codebook: codes (Q, N) -> Q numbers between 1 and `size`."""
    found = []
    for row in codes:
        share = torch.bincount(row.flatten(), minlength=size).double() / row.numel()
        found.append(torch.exp(-torch.special.xlogy(share, share).sum()).item())
    return found
