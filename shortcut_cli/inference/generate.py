"""Sampling from a model with its key/value cache, at any length.

When the context is full, its last half is read again into a fresh cache, and sampling continues: every logit is that of
a whole forward pass over the tokens since then, and the cost per token stays constant on average.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shortcut_cli.config.schema import SampleConfig
from shortcut_cli.errors import CheckFailed
from shortcut_cli.models.transformer import Decoder
from shortcut_cli.tokenizers.base import Constraint

AHEAD = 64  # uniform numbers of a row that are drawn at once


@dataclass(frozen=True)
class Generation:
    """New ids of each row, up to and including EOS, and how many of them were forced."""

    ids: list[list[int]]
    forced: list[int]


def probabilities(logits: Tensor, config: SampleConfig) -> Tensor:
    """The distribution (B, V) to sample from: logits (B, V) through temperature, top-k, top-p and min-p, in this order.

    top-k keeps the k largest; top-p (Holtzman et al. 2020) the smallest set of the most probable ids that together have
    at least that probability; min-p (Nguyen et al. 2024) the ids with at least that share of the largest probability.
    """
    logits = logits.float()
    if config.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits / config.temperature
    if 0 < config.top_k < logits.shape[-1]:
        least = logits.topk(config.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = logits.softmax(-1)
    if config.top_p < 1:
        p = p.masked_fill(~_nucleus(p, config.top_p), 0.0)
    if config.min_p > 0:
        p = p.masked_fill(p < config.min_p * p.amax(-1, keepdim=True), 0.0)
    return p / p.sum(-1, keepdim=True)


def _nucleus(p: Tensor, least: float) -> Tensor:
    """Of distributions (B, V) the smallest sets with a probability of `least`, as a mask; of equal ids the first ones.

    NumPy sorts numbers several times as fast as torch sorts them together with their places.
    """
    ordered = torch.from_numpy(np.sort(p.numpy(), axis=-1)).flip(-1)
    kept = (ordered.cumsum(-1) - ordered < least).sum(-1, keepdim=True)
    last = ordered.gather(-1, kept - 1)
    above, equal = p > last, p == last
    return above | (equal & (equal.cumsum(-1) <= kept - above.sum(-1, keepdim=True)))


def draw(p: Tensor, uniform: Tensor) -> Tensor:
    """One id (B,) from each distribution p (B, V), by inversion; uniform: a number below 1 for each, float64 (B,)."""
    cumulative = p.double().cumsum(-1)
    place = uniform.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, place, right=True).squeeze(-1)


class Uniforms:
    """Uniform numbers for each row, from a generator of its own, seeded by seed and row; many are drawn at once."""

    def __init__(self, seed: int, rows: int, first: int = 0) -> None:
        numbers = range(first, first + rows)
        self.generators = [torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**64) for number in numbers]
        self.drawn = torch.empty(rows, 0, dtype=torch.float64)
        self.used = 0

    def next(self) -> Tensor:
        """The next number of each row, float64 (B,)."""
        if self.used == self.drawn.shape[1]:
            each = [torch.rand(AHEAD, dtype=torch.float64, generator=generator) for generator in self.generators]
            self.drawn, self.used = torch.stack(each), 0
        self.used += 1
        return self.drawn[:, self.used - 1]

    def keep(self, rows: list[int]) -> None:
        """Let these rows follow each other, and forget the others."""
        self.generators = [self.generators[row] for row in rows]
        self.drawn = self.drawn[rows]


@torch.inference_mode()
def generate(
    model: Decoder,
    prompt: Tensor,
    tokens: int,
    *,
    config: SampleConfig,
    eos: int,
    constraints: Sequence[Constraint] | None = None,
    progress: Callable[[int], None] | None = None,
    drawn_id: Callable[[int, int], None] | None = None,
    first: int = 0,
) -> Generation:
    """Sample at most `tokens` ids after each row of `prompt`, int64 (B, P), P >= 1.

    eos: the id at which a row stops. constraints: one per row, which has already followed the prompt; a step whose most
    probable id was not allowed counts as forced. progress: called with the number of tokens sampled so far. drawn_id:
    called with a row and its id, as soon as that is drawn. Each row
    draws from its own generator, seeded by seed and row: same seed, same machine, same ids. A row that has ended leaves
    the batch and costs nothing more. first: the number of the first row, if another call draws the rows before it.

    Raises CheckFailed if a logit is not finite: no id can be drawn then.
    """
    ids: list[list[int]] = [[] for _ in prompt]
    forced = [0] * len(prompt)
    active = list(range(len(prompt)))  # the rows that have not ended, in the order of the window
    uniforms, window = Uniforms(config.seed, len(prompt), first), Window(model, prompt)
    for number in range(tokens):
        logits = window.logits().cpu()  # (B, V)
        if not bool(logits.isfinite().all()):
            raise CheckFailed("the model's logits are not finite: its weights are damaged, or its training diverged")
        if constraints is not None:
            logits, lost = _restrict(logits, [constraints[row].allowed(tokens - number) for row in active])
            for place in lost:
                forced[active[place]] += 1
        drawn = draw(probabilities(logits, config), uniforms.next())
        going = []  # places in the window
        for place, (row, token) in enumerate(zip(active, drawn.tolist(), strict=True)):
            ids[row].append(token)
            if drawn_id:
                drawn_id(row, token)
            if token != eos:
                going.append(place)
                if constraints is not None:
                    constraints[row].push(token)
        if progress:
            progress(number + 1)
        if not going:
            break
        if len(going) < len(active):
            going = _fill(going)
            active = [active[place] for place in going]
            uniforms.keep(going)
            window.keep(going)
            drawn = drawn[going]
        window.append(drawn)
    return Generation(ids, forced)


def _fill(places: list[int]) -> list[int]:
    """The same places, ordered so that few rows move: the last ones fill the gaps before them."""
    count, kept = len(places), set(places)
    moving = (place for place in places if place >= count)
    return [place if place in kept else next(moving) for place in range(count)]


def _restrict(logits: Tensor, masks: Sequence[np.ndarray | None]) -> tuple[Tensor, list[int]]:
    """Logits (B, V) with all ids masked that are not allowed, and the rows that lose their most probable id.

    masks: bool (V,) for each row, None if all ids are allowed.
    """
    if all(mask is None for mask in masks):
        return logits, []
    legal = torch.empty(logits.shape, dtype=torch.bool)
    for row, mask in zip(legal.numpy(), masks, strict=True):
        row[:] = True if mask is None else mask
    best = legal.gather(1, logits.argmax(-1, keepdim=True)).squeeze(1)
    return logits.masked_fill(~legal, -torch.inf), (~best).nonzero().flatten().tolist()


class Window:
    """The tokens that the model sees, and the cache that holds all of them but the newest."""

    def __init__(self, model: Decoder, prompt: Tensor) -> None:
        self.model = model
        self.context = model.config.context
        self.ids = prompt.new_empty(len(prompt), self.context)
        start = prompt[:, -self.context :]
        self.ids[:, : start.shape[1]] = start
        self._restart(start.shape[1])

    def _restart(self, used: int) -> None:
        """Read the first `used` ids again, into a fresh cache."""
        self.cache = self.model.new_cache(len(self.ids), self.context)
        self.used = used
        self.new = self.ids[:, :used]

    def logits(self) -> Tensor:
        """Logits (B, V) of the next id."""
        logits: Tensor = self.model(self.new, self.cache)
        return logits[:, -1]

    def append(self, drawn: Tensor) -> None:
        """Add one id to each row: (B,)."""
        self.new = drawn.to(self.ids.device)[:, None]
        if self.used == self.context:
            keep = self.context // 2
            self.ids[:, : keep - 1] = self.ids[:, self.context - keep + 1 :].clone()
            self.ids[:, keep - 1] = self.new[:, 0]
            self._restart(keep)
        else:
            self.ids[:, self.used] = self.new[:, 0]
            self.used += 1

    def keep(self, rows: list[int]) -> None:
        """Let these rows follow each other, and forget the others; see `Cache.keep`."""
        self.ids = self.ids[rows]
        self.cache.keep(rows)
