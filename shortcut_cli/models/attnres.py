"""Attention residuals (Kimi Team 2026, arXiv 2603.15031): a sublayer reads a softmax over all that was added so far.

    h_l = sum over i of softmax_i(w_l . RMSNorm(v_i)) v_i      v_0 the embedding, v_i what sublayer i gave for h_i

w_l a learned pseudo-query for each sublayer, zero at first, so that it starts from the mean, which is not the baseline.
The head reads once more, over everything. Variants:

    full    every sublayer a source
    block   sublayers in at most `blocks` groups: a source is the sum of a group, the unfinished group's so far included
    delta   h_l = x + that softmax over all sublayers' outputs, x the residual sum (Luo, Cai and Hu 2026,
            arXiv 2605.18855, their modeling_qwen3_attnres.py; the embedding is no source); the head reads x alone

Checked against `naive_attnres` of flash-linear-attention.
"""

import torch
from torch import Tensor, nn

from shortcut_cli.models.blocks import EPSILON, Block, Cache, Decoder, Trace
from shortcut_cli.models.mixing import States, depth_scores
from shortcut_cli.models.options import AttnResOptions
from shortcut_cli.recipe import ModelKeys


class Sources:
    """What a softmax over depth reads; queries (L, D), norms included, one for each of the reads in their order."""

    def __init__(self, queries: Tensor, most: int, like: Tensor) -> None:
        self.states = States(most, len(queries) - 1, like)
        self.queries = queries
        self.number = 0  # of the read that comes next
        self.scores: list[dict[int, Tensor]] = []  # of each source: for each read to come, (B, T)

    def put(self, x: Tensor) -> Tensor:
        """Another source; returns it."""
        x = self.states.put(x)
        self.scores.append(self._scores(x))
        return x

    def replace(self, x: Tensor) -> None:
        """Another source instead of the last one."""
        self.scores[-1] = self._scores(self.states.replace(x))

    def _scores(self, x: Tensor) -> dict[int, Tensor]:
        scores = depth_scores(x, self.queries[self.number :], EPSILON)
        return dict(enumerate(scores.unbind(-1), self.number))

    def read(self) -> Tensor:
        """Sum of softmax_i(query . RMSNorm(v_i)) v_i over the sources v_i so far: (B, T, D)."""
        number, self.number = self.number, self.number + 1
        if len(self.scores) == 1:
            return self.states.rows[0]
        shares = torch.stack([scores[number] for scores in self.scores], -1).softmax(-1)  # (B, T, n)
        return self.states.mix(shares.unsqueeze(2))[0]


class AttnRes(Decoder):
    """The baseline's sublayers, joined by softmax reads over depth."""

    def __init__(self, keys: ModelKeys, vocabulary: int, seed: int | None = None) -> None:
        self.options: AttnResOptions = keys.attnres  # type: ignore[attr-defined]
        super().__init__(keys, vocabulary)
        reads = 2 * keys.layers + (self.options.variant != "delta")
        if self.options.variant == "delta":
            reads -= 1  # the first sublayer has nothing to read
        self.queries = nn.Parameter(torch.zeros(reads, keys.width))
        self.key_norms = nn.Parameter(torch.ones(reads, keys.width))
        if seed is not None:
            self.initialise(seed)

    def begin(self) -> None:
        """Zero queries: a mean of all sources."""
        self.queries.zero_()
        self.key_norms.fill_(1)

    def trunk(self, x: Tensor, table: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        del trace
        return self._delta(x, table, cache) if self.options.variant == "delta" else self._reads(x, table, cache)

    def _sublayers(self) -> list[tuple[Block, int]]:
        return [(block, part) for block in self.blocks for part in (0, 1)]  # type: ignore[misc]

    def _begins(self, number: int) -> bool:
        """Whether a sublayer is a source of its own, or the first of a group."""
        sublayers = 2 * self.keys.layers
        groups = min(self.options.blocks, sublayers) if self.options.variant == "block" else sublayers
        return number == 0 or number * groups // sublayers != (number - 1) * groups // sublayers

    def _reads(self, x: Tensor, table: Tensor, cache: Cache | None) -> Tensor:
        sources = Sources(self.queries * self.key_norms, 2 * self.keys.layers + 1, x)
        sources.put(x)
        for number, (block, part) in enumerate(self._sublayers()):
            y = block.delta(sources.read(), part, table, cache)
            if self._begins(number):
                sources.put(y)
            else:
                sources.replace(sources.states.rows[-1] + y)
        return sources.read()

    def _delta(self, x: Tensor, table: Tensor, cache: Cache | None) -> Tensor:
        sublayers = self._sublayers()
        deltas = Sources(self.queries * self.key_norms, len(sublayers) - 1, x)
        for number, (block, part) in enumerate(sublayers):
            h = x + deltas.read() if number else x
            y = block.delta(h, part, table, cache)
            x = x + (deltas.put(y) if number + 1 < len(sublayers) else y)
        return x

    def multiplications(self) -> int:
        """Scores, of each source for the reads to come, and sums, beside the matrices."""
        reads = len(self.queries)
        sources = [1 + number for number in range(reads)]
        if self.options.variant == "block":
            sources = [1 + sum(self._begins(below) for below in range(number)) for number in range(reads)]
        sums = sum(count for count in sources if count > 1)
        return super().multiplications() + (reads * (reads + 1) // 2 + sums) * self.keys.width

    def routers(self) -> list[str]:
        """Pseudo-queries, and the weights of their norms."""
        return ["queries", "key_norms"]
