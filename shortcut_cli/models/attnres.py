"""Attention residuals (Kimi Team 2026, arXiv 2603.15031): a sublayer reads a softmax over all that was added so far.

    h_l = sum over i of softmax_i(w_l . RMSNorm(v_i)) v_i      v_0 the embedding, v_i the output of sublayer i for h_i

w_l is a learned pseudo-query per sublayer, zero at first, so that training starts from the mean, not from the baseline.
The head reads once more, over everything. Variants:

    full    every sublayer is a source
    block   sublayers in at most `blocks` groups: a source is a group's sum, as far as it has got
    delta   h_l = x + that softmax over all sublayers' outputs, x the residual sum (Luo, Cai and Hu 2026,
            arXiv 2605.18855, their modeling_qwen3_attnres.py; the embedding is not a source); the head reads only x

Checked against `naive_attnres` of flash-linear-attention.
"""

import torch
from torch import Tensor, nn

from shortcut_cli.config.schema import ModelConfig
from shortcut_cli.kernels.depth import States, fork_scores, plain_fork_scores, weighted_sum
from shortcut_cli.models.options import AttnResOptions
from shortcut_cli.models.trace import HEAD, Reads, Trace, sublayer_name
from shortcut_cli.models.transformer import Block, Cache, Decoder


class Sources:
    """What a softmax over depth reads; queries (L, D), norms included, one per read, in order."""

    def __init__(self, queries: Tensor, most: int, like: Tensor) -> None:
        self.states = States(most, len(queries) - 1, like)
        self.queries = queries
        self.number = 0  # of the next read
        self.scores: list[dict[int, Tensor]] = []  # of each source, by the number of each read to come: (B, T)

    def put(self, x: Tensor) -> Tensor:
        """Add a source; returns it, as `States.put` does."""
        x = self.states.put(x)
        self.scores.append(self._scores(x))
        return x

    def replace(self, x: Tensor) -> None:
        """Put a source in the place of the last one."""
        self.scores[-1] = self._scores(self.states.replace(x))

    def _scores(self, x: Tensor) -> dict[int, Tensor]:
        _, scores = fork_scores(x, self.queries[self.number :])
        return dict(enumerate(scores.unbind(-1), self.number))

    def read(self, reader: str, trace: Trace | None) -> Tensor:
        """Sum of softmax_i(query . RMSNorm(v_i)) v_i over the sources v_i so far: (B, T, D)."""
        number, self.number = self.number, self.number + 1
        if trace is not None and trace.hit(reader):
            return self._changed(number, reader, trace)
        if len(self.scores) == 1:
            if trace is not None and trace.reads(reader):
                trace.record(reader, [0], torch.ones_like(self.scores[0][number]).unsqueeze(0))
            return self.states.rows[0]
        shares = torch.stack([scores[number] for scores in self.scores], -1).softmax(-1)  # (B, T, n)
        if trace is not None:
            trace.record(reader, range(len(self.scores)), shares.movedim(-1, 0))
        return self.states.mix(shares.unsqueeze(2))[0]

    def _changed(self, number: int, reader: str, trace: Trace) -> Tensor:
        """The same, with the sources that the trace changes."""
        rows = dict(enumerate(self.states.rows))
        scores = {m: scores[number] for m, scores in enumerate(self.scores)}
        for m in trace.hit(reader):
            rows[m] = trace.value(rows[m])
            scores[m] = plain_fork_scores(rows[m], self.queries[number, None])[1].squeeze(-1)
        kept = [m for m in rows if not (trace.masks and m in trace.hit(reader))]
        if not kept:
            trace.record(reader, kept, scores[0].new_zeros(0, *scores[0].shape))
            return torch.zeros_like(rows[0])
        shares = torch.stack([scores[m] for m in kept]).softmax(0)  # (m, B, T)
        trace.record(reader, kept, shares)
        return weighted_sum(shares, [rows[m] for m in kept])


class AttnRes(Decoder):
    """The baseline's sublayers, joined by softmax reads over depth."""

    softmax_reads = True

    def __init__(self, config: ModelConfig, vocabulary: int, seed: int | None = None) -> None:
        self.options: AttnResOptions = config.attnres  # type: ignore[attr-defined]
        super().__init__(config, vocabulary)
        reads = 2 * config.layers + (self.options.variant != "delta")
        if self.options.variant == "delta":
            reads -= 1  # the first sublayer has nothing to read
        self.queries = nn.Parameter(torch.zeros(reads, config.width))
        self.key_norms = nn.Parameter(torch.ones(reads, config.width))
        if seed is not None:
            self.initialise(seed)

    def init_extra(self) -> None:
        """Zero queries: every read starts as the mean of its sources."""
        self.queries.zero_()
        self.key_norms.fill_(1)

    def run_blocks(self, x: Tensor, freqs: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        run = self._delta if self.options.variant == "delta" else self._reads
        return run(x, freqs, cache, trace)

    def reads(self) -> Reads:
        """All that was added so far, but for the first sublayer, which has only the embedding to read."""
        count = 2 * self.config.layers
        readers = [*map(sublayer_name, range(count)), HEAD]
        if self.options.variant == "delta":
            return {readers[number]: tuple(readers[:number]) for number in range(1, count)}
        added = [(number, name) for number, name in enumerate(readers[:-1]) if self._begins(number)]
        if self.options.variant == "block":
            added = [(number, f"group {group}") for group, (number, _) in enumerate(added, 1)]
        return {
            readers[number]: ("embedding", *(name for begun, name in added if begun < number))
            for number in range(1, count + 1)
        }

    def _sublayers(self) -> list[tuple[Block, int]]:
        return [(block, part) for block in self.blocks for part in (0, 1)]  # type: ignore[misc]

    def _begins(self, number: int) -> bool:
        """Whether a sublayer starts a new source: always, or if it is the first of a group."""
        sublayers = 2 * self.config.layers
        groups = min(self.options.blocks, sublayers) if self.options.variant == "block" else sublayers
        return number == 0 or number * groups // sublayers != (number - 1) * groups // sublayers

    def _reads(self, x: Tensor, freqs: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        sources = Sources(self.queries * self.key_norms, 2 * self.config.layers + 1, x)
        sources.put(x)
        for number, (block, part) in enumerate(self._sublayers()):
            h = sources.read(sublayer_name(number), trace)
            if trace is not None and part == 0:
                trace.stream(h)
            y = block.delta(h, part, freqs, cache)
            if self._begins(number):
                sources.put(y)
            else:
                sources.replace(sources.states.rows[-1] + y)
        return sources.read(HEAD, trace)

    def _delta(self, x: Tensor, freqs: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        sublayers = self._sublayers()
        deltas = Sources(self.queries * self.key_norms, len(sublayers) - 1, x)
        for number, (block, part) in enumerate(sublayers):
            h = x + deltas.read(sublayer_name(number), trace) if number else x
            if trace is not None and part == 0:
                trace.stream(h)
            y = block.delta(h, part, freqs, cache)
            x = x + (deltas.put(y) if number + 1 < len(sublayers) else y)
        return x

    def macs(self) -> int:
        """The matrices, the scores of each source for all reads to come, and the sums."""
        reads = len(self.queries)
        sources = [1 + number for number in range(reads)]
        if self.options.variant == "block":
            sources = [1 + sum(self._begins(below) for below in range(number)) for number in range(reads)]
        sums = sum(count for count in sources if count > 1)
        return super().macs() + (reads * (reads + 1) // 2 + sums) * self.config.width

    def routers(self) -> list[str]:
        """Pseudo-queries and the weights of their norms."""
        return ["queries", "key_norms"]
