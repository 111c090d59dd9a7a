"""Sampling from a model with its key/value cache, at any length.

When the context is full, the last half of it is read again into a fresh cache and sampling goes on: every logit is that
of a whole forward pass over the tokens since then, and the cost of a token stays constant on average.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from shortcut_cli.recipe import SampleKeys


class Guide(Protocol):
    """Follows one row and says which ids may come next, bool (V,), or None for all; `left` ids are still to come."""

    def allowed(self, left: int) -> np.ndarray | None: ...

    def push(self, token: int) -> None: ...


@dataclass(frozen=True)
class Generation:
    """New ids of each row, the end id included where a row came to it, and how many of them were forced."""

    ids: list[list[int]]
    forced: list[int]


def probabilities(logits: Tensor, keys: SampleKeys) -> Tensor:
    """The distribution (B, V) that is sampled from: logits (B, V), then temperature, top-k, top-p and min-p in turn.

    top-k keeps the k largest; top-p (Holtzman et al. 2020) the smallest set of the most probable that holds at least
    that much; min-p (Nguyen et al. 2024) what has at least that share of the largest probability.
    """
    logits = logits.float()
    if keys.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits / keys.temperature
    if 0 < keys.top_k < logits.shape[-1]:
        least = logits.topk(keys.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = logits.softmax(-1)
    if keys.top_p < 1:
        ordered, places = p.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        p = p.scatter(-1, places, ordered.masked_fill(before >= keys.top_p, 0.0))
    if keys.min_p > 0:
        p = p.masked_fill(p < keys.min_p * p.amax(-1, keepdim=True), 0.0)
    return p / p.sum(-1, keepdim=True)


def draw(p: Tensor, generator: torch.Generator) -> int:
    """One id of the distribution p (V,), by inversion: a third of the time of torch.multinomial at V = 1,024."""
    cumulative = p.double().cumsum(0)
    place = torch.rand(1, dtype=torch.float64, generator=generator) * cumulative[-1]
    return int(torch.searchsorted(cumulative, place, right=True))


@torch.inference_mode()
def generate(
    model: Any,
    prompt: Tensor,
    tokens: int,
    *,
    keys: SampleKeys,
    end: int,
    guides: Sequence[Guide] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Generation:
    """Sample at most `tokens` ids behind each row of `prompt`, int64 (B, P), P >= 1.

    end: the id at which a row stops. guides: one for each row, which has followed its prompt; a step whose most
    probable id was not allowed counts as forced. Each row draws from a generator of its own, seeded by seed and row.
    Same seed, same machine, same ids.
    """
    rows = [row.tolist() for row in prompt]
    start = len(rows[0])
    generators = [torch.Generator().manual_seed(keys.seed * 1_000_003 + number) for number in range(len(rows))]
    forced = [0] * len(rows)
    done = [False] * len(rows)
    window = Window(model, prompt)
    for number in range(tokens):
        logits = window.logits().cpu()  # (B, V)
        if guides is not None:
            logits = _restrict(logits, guides, tokens - number, done, forced)
        p = probabilities(logits, keys)
        drawn = [end if done[row] else draw(p[row], generators[row]) for row in range(len(rows))]
        for row, token in enumerate(drawn):
            if not done[row]:
                rows[row].append(token)
                done[row] = token == end
                if guides is not None and not done[row]:
                    guides[row].push(token)
        if progress:
            progress(number + 1)
        if all(done):
            break
        window.append(drawn)
    return Generation([row[start:] for row in rows], forced)


def _restrict(logits: Tensor, guides: Sequence[Guide], left: int, done: list[bool], forced: list[int]) -> Tensor:
    """Logits without what is not allowed; counts the steps at which that took the most probable id away."""
    logits = logits.clone()
    for row, guide in enumerate(guides):
        mask = None if done[row] else guide.allowed(left)
        if mask is not None:
            legal = torch.from_numpy(mask)
            forced[row] += not bool(legal[logits[row].argmax()])
            logits[row].masked_fill_(~legal, -torch.inf)
    return logits


class Window:
    """The tokens that the model sees, and the cache that holds all of them but the newest."""

    def __init__(self, model: Any, prompt: Tensor) -> None:
        self.model = model
        self.context = model.keys.context
        self.ids = prompt[:, -self.context :]  # (B, up to context)
        self._restart()

    def _restart(self) -> None:
        self.cache = self.model.new_cache(self.ids.shape[0], self.context)
        self.new = self.ids

    def logits(self) -> Tensor:
        """Logits (B, V) of the next id."""
        return self.model(self.new, self.cache)[:, -1]

    def append(self, drawn: list[int]) -> None:
        """Go on by one id in each row."""
        self.new = torch.tensor(drawn, device=self.ids.device)[:, None]
        if self.ids.shape[1] == self.context:
            keep = self.context // 2
            self.ids = torch.cat((self.ids[:, self.context - keep + 1 :], self.new), 1)
            self._restart()
        else:
            self.ids = torch.cat((self.ids, self.new), 1)
