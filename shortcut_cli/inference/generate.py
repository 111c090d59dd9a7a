"""Sampling from a model with its key/value cache, at any length.

When the context is full, its last half is read again into a fresh cache, and sampling continues: every logit is that of
a whole forward pass over the tokens since then, and the cost per token stays constant on average.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shortcut_cli.config.schema import SampleConfig
from shortcut_cli.errors import CheckFailed
from shortcut_cli.models.transformer import Decoder
from shortcut_cli.tokenizers.base import Constraint


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
        ordered, places = p.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        p = p.scatter(-1, places, ordered.masked_fill(before >= config.top_p, 0.0))
    if config.min_p > 0:
        p = p.masked_fill(p < config.min_p * p.amax(-1, keepdim=True), 0.0)
    return p / p.sum(-1, keepdim=True)


def draw(p: Tensor, generator: torch.Generator) -> int:
    """One id from the distribution p (V,), by inversion, which is faster than torch.multinomial."""
    cumulative = p.double().cumsum(0)
    place = torch.rand(1, dtype=torch.float64, generator=generator) * cumulative[-1]
    return int(torch.searchsorted(cumulative, place, right=True))


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
    first: int = 0,
) -> Generation:
    """Sample at most `tokens` ids after each row of `prompt`, int64 (B, P), P >= 1.

    eos: the id at which a row stops. constraints: one per row, which has already followed the prompt; a step whose most
    probable id was not allowed counts as forced. progress: called with the number of tokens sampled so far. Each row
    draws from its own generator, seeded by seed and row: same seed, same machine, same ids. first: the number of the
    first row, if another call draws the rows before it.

    Raises CheckFailed if a logit is not finite: no id can be drawn then.
    """
    rows = [row.tolist() for row in prompt]
    start = len(rows[0])
    generators = [
        torch.Generator().manual_seed((config.seed * 1_000_003 + first + number) % 2**64) for number in range(len(rows))
    ]
    forced = [0] * len(rows)
    done = [False] * len(rows)
    window = Window(model, prompt)
    for number in range(tokens):
        logits = window.logits().cpu()  # (B, V)
        if not bool(logits.isfinite().all()):
            raise CheckFailed("the model's logits are not finite: its weights are damaged, or its training diverged")
        if constraints is not None:
            logits = _restrict(logits, constraints, tokens - number, done, forced)
        p = probabilities(logits, config)
        drawn = [eos if done[row] else draw(p[row], generators[row]) for row in range(len(rows))]
        for row, token in enumerate(drawn):
            if not done[row]:
                rows[row].append(token)
                done[row] = token == eos
                if constraints is not None and not done[row]:
                    constraints[row].push(token)
        if progress:
            progress(number + 1)
        if all(done):
            break
        window.append(drawn)
    return Generation([row[start:] for row in rows], forced)


def _restrict(
    logits: Tensor, constraints: Sequence[Constraint], left: int, done: list[bool], forced: list[int]
) -> Tensor:
    """Logits with all ids masked that are not allowed; counts in `forced` the rows that lose their most probable id."""
    logits = logits.clone()
    for row, constraint in enumerate(constraints):
        mask = None if done[row] else constraint.allowed(left)
        if mask is not None:
            legal = torch.from_numpy(mask)
            forced[row] += not bool(legal[logits[row].argmax()])
            logits[row].masked_fill_(~legal, -torch.inf)
    return logits


class Window:
    """The tokens that the model sees, and the cache that holds all of them but the newest."""

    def __init__(self, model: Decoder, prompt: Tensor) -> None:
        self.model = model
        self.context = model.config.context
        self.ids = prompt[:, -self.context :]  # (B, up to context)
        self._restart()

    def _restart(self) -> None:
        self.cache = self.model.new_cache(self.ids.shape[0], self.context)
        self.new = self.ids

    def logits(self) -> Tensor:
        """Logits (B, V) of the next id."""
        logits: Tensor = self.model(self.new, self.cache)
        return logits[:, -1]

    def append(self, drawn: list[int]) -> None:
        """Add one id to each row."""
        self.new = torch.tensor(drawn, device=self.ids.device)[:, None]
        if self.ids.shape[1] == self.context:
            keep = self.context // 2
            self.ids = torch.cat((self.ids[:, self.context - keep + 1 :], self.new), 1)
            self._restart()
        else:
            self.ids = torch.cat((self.ids, self.new), 1)
