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
from shortcut_cli.models.mixing import softmax_read
from shortcut_cli.models.options import AttnResOptions
from shortcut_cli.recipe import ModelKeys


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

    def _read(self, number: int, sources: list[Tensor]) -> Tensor:
        return softmax_read(self.queries[number] * self.key_norms[number], sources, EPSILON)

    def _sublayers(self) -> list[tuple[Block, int]]:
        return [(block, part) for block in self.blocks for part in (0, 1)]  # type: ignore[misc]

    def _reads(self, x: Tensor, table: Tensor, cache: Cache | None) -> Tensor:
        sublayers = self._sublayers()
        groups = min(self.options.blocks, len(sublayers)) if self.options.variant == "block" else len(sublayers)
        sources = [x]
        for number, (block, part) in enumerate(sublayers):
            y = block.delta(self._read(number, sources), part, table, cache)
            begins = number == 0 or number * groups // len(sublayers) != (number - 1) * groups // len(sublayers)
            if begins:
                sources.append(y)
            else:
                sources[-1] = sources[-1] + y
        return self._read(len(sublayers), sources)

    def _delta(self, x: Tensor, table: Tensor, cache: Cache | None) -> Tensor:
        deltas: list[Tensor] = []
        for number, (block, part) in enumerate(self._sublayers()):
            h = x + self._read(number - 1, deltas) if deltas else x
            deltas.append(block.delta(h, part, table, cache))
            x = x + deltas[-1]
        return x

    def routers(self) -> list[str]:
        """Pseudo-queries, and the weights of their norms."""
        return ["queries", "key_norms"]
