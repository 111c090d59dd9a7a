"""Residual vector quantization in training: each clip at its own number of codebooks, dead codes revived."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

DEAD = 0.1  # a code whose running count falls below this share of the mean is dead


def quantize(quantizer: Any, z: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize embeddings z (B, D, T), clip b with its first codebooks[b] codebooks, (B,).

    Returns what the decoder gets, (B, D, T), whose gradient goes straight through to z (van den Oord et al. 2017,
    arXiv 1711.00937), and the commitment loss, the mean squared distance of the residuals from their codes.

    All codebooks see all clips, so that each learns at every step, whatever is drawn: the codebooks of a clip beyond
    its own add nothing to its sound (Kumar et al. 2023, arXiv 2306.06546, 3.2, draw the number a clip too).
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
    """Put codes that hardly anything falls to where vectors of this step, found (N, D), are; counted as average ones.

    The order of random draws is torch's global one: the trainer seeds it for each step.
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
    """exp(entropy) of the codes of each codebook, codes (Q, N) -> Q numbers between 1 and `size`."""
    found = []
    for row in codes:
        share = torch.bincount(row.flatten(), minlength=size).double() / row.numel()
        found.append(torch.exp(-torch.special.xlogy(share, share).sum()).item())
    return found
