"""Hyper-connections (Zhu et al. 2024, arXiv 2409.19606): n residual streams, read and written by learned weights.

For a sublayer F and streams H (n, D):

    h = a^T H,      H <- R^T H + b (x) F(h)                          static: vectors a, b (n) and a matrix R (n, n)
    a <- a + s_a tanh(N(H) w_a),  R <- R + s_a tanh(N(H) W_r),  b <- b + s_b tanh(N(H) w_b)       dynamic, per token

N is a norm of each stream. At first a reads stream (number of the sublayer mod n), R = I, b = 1, all w are zero and all
s 0.01: every stream is the residual stream of a baseline whose output matrices are sqrt(n) times as large, as the paper
draws them. The head reads their mean; the paper's sum is n times that, a factor that the norm before the head removes.
As in the paper, the static weights do not decay, and the matrix of the dynamic ones does.
"""

import math

import torch
from torch import Tensor, nn

from shortcut_cli.config.schema import ModelConfig
from shortcut_cli.kernels.depth import fork_read, fork_scores, unrounded
from shortcut_cli.models.options import HyperOptions
from shortcut_cli.models.trace import HEAD, Reads, Trace, sublayer_name
from shortcut_cli.models.transformer import Block, Cache, Decoder, Linear


class Connection(nn.Module):
    """How one sublayer reads and writes the streams."""

    def __init__(self, width: int, options: HyperOptions, number: int) -> None:
        super().__init__()
        n = options.streams
        self.number, self.streams = number, n
        self.read = nn.Parameter(torch.zeros(n))
        self.carry = nn.Parameter(torch.zeros(n, n))  # until `init_extra`
        self.write = nn.Parameter(torch.ones(n))
        self.dynamic = options.weights == "dynamic"
        if self.dynamic:
            self.norm = nn.Parameter(torch.ones(width))
            self.route = Linear(width, n + 2)  # for `read`, the n columns of `carry`, and `write`
            self.scale = nn.Parameter(torch.full((2,), 0.01))  # for `read` and `carry`, and for `write`

    def init_extra(self) -> None:
        """Start as the baseline."""
        self.read.zero_()
        self.read[self.number % self.streams] = 1
        self.carry.copy_(torch.eye(self.streams))
        if self.dynamic:
            self.route.weight.zero_()

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Streams (B, T, n, D) -> the same, and weights: read (B, T, n), carry (B, T, n, n) and write (B, T, n)."""
        if not self.dynamic:
            shape = h.shape[:3]
            return h, self.read.expand(shape), self.carry.expand(*shape, -1), self.write.expand(shape)
        h, scores = fork_scores(h, self.route.weight * self.norm)
        fixed = torch.cat((self.read[:, None], self.carry, self.write[:, None]), 1)  # (n, n + 2)
        scale = torch.cat((self.scale[:1].expand(self.streams + 1), self.scale[1:]))
        weights = torch.addcmul(fixed, torch.tanh(scores), scale)  # (B, T, n, n + 2)
        read, carry, write = weights.split((1, self.streams, 1), -1)
        # Contiguous, since torch multiplies other layouts one by one.
        read, write = (x.squeeze(-1).contiguous() for x in (read, write))
        return h, read, carry, write


class Unrolled:
    """Streams as weighted sums of what was written to them, for a trace.

    Reading, carrying and writing are linear, so that stream j is sum over m of C_jm s_m, with s_0 the embedding and
    s_m what sublayer m wrote; C <- R^T C, and then b for the new column. A read with weights a is sum of (a^T C)_m s_m.
    """

    def __init__(self, x: Tensor, streams: int, trace: Trace) -> None:
        self.trace, self.sources = trace, [x]
        self.shares = x.new_ones(*x.shape[:2], streams, 1)  # C, (B, T, n, M)

    def read(self, reader: str, weights: Tensor, total: Tensor) -> Tensor:
        """What was read, `total` (B, T, D), by weights (B, T, n) of the streams, as changed."""
        by_source = (weights.unsqueeze(-2) @ self.shares).squeeze(-2)  # (B, T, M)
        return self.trace.summed(reader, by_source.movedim(-1, 0), self.sources, total)

    def write(self, carry: Tensor, write: Tensor, y: Tensor) -> None:
        """carry (B, T, n, n), write (B, T, n), y (B, T, D)."""
        self.sources.append(y)
        self.shares = torch.cat((carry.mT @ self.shares, write.unsqueeze(-1)), -1)


class Hyper(Decoder):
    """The baseline's sublayers on n residual streams."""

    def __init__(self, config: ModelConfig, vocabulary: int, seed: int | None = None) -> None:
        self.options: HyperOptions = config.hyper  # type: ignore[attr-defined]
        super().__init__(config, vocabulary)
        self.connections = nn.ModuleList(
            Connection(config.width, self.options, number) for number in range(2 * config.layers)
        )
        if seed is not None:
            self.initialise(seed)

    def initial_std(self, name: str, weight: Tensor) -> float:
        """What writes to the streams starts sqrt(n) larger."""
        factor = math.sqrt(self.options.streams) if name.endswith(".out.weight") else 1.0
        return super().initial_std(name, weight) * factor

    def decays(self) -> dict[str, bool]:
        """The matrix of the dynamic weights does."""
        return {"route.weight": True}

    def init_extra(self) -> None:
        """Start as the baseline."""
        for connection in self.connections:
            assert isinstance(connection, Connection)
            connection.init_extra()

    def run_blocks(self, x: Tensor, freqs: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        unrolled = None if trace is None else Unrolled(x, self.options.streams, trace)
        # Contiguous, since torch multiplies expanded matrices one by one.
        h = x.unsqueeze(2).expand(-1, -1, self.options.streams, -1).contiguous()  # (B, T, n, D)
        for number, connection in enumerate(self.connections):
            h, read, carry, write = connection(h)
            block = self.blocks[number // 2]
            assert isinstance(block, Block)
            h, x = fork_read(h, read)
            if unrolled is not None:
                x = unrolled.read(sublayer_name(number), read, x)
                if number % 2 == 0:
                    unrolled.trace.stream(x)
            y = block.delta(x, number % 2, freqs, cache)
            y = y.type_as(h)  # under autocast it is narrower than the streams
            with unrounded(h):
                written = write.unsqueeze(-1).flatten(0, 1) @ y.unsqueeze(-2).flatten(0, 1)  # (B T, n, D)
                if unrolled is not None:
                    unrolled.write(carry, write, y)
                h = written.baddbmm_(carry.mT.flatten(0, 1), h.flatten(0, 1)).view_as(h)
        # Not h.mean(2): the layout of its gradient slows down all products behind it.
        mean = h.new_full(h.shape[:3], 1 / self.options.streams)
        x = fork_read(h, mean)[1]
        return x if unrolled is None else unrolled.read(HEAD, mean, x)

    def reads(self) -> Reads:
        """All that was written so far, but for the first sublayer, which has only the embedding to read."""
        names = ["embedding", *map(sublayer_name, range(2 * self.config.layers))]
        return {reader: tuple(names[:number]) for number, reader in enumerate([*names[2:], HEAD], 2)}

    def macs(self) -> int:
        """The matrices, and reading, carrying and routing by each stream."""
        n = self.options.streams
        sublayers, width = 2 * self.config.layers, self.config.width
        again = (n - 1) * (n + 2) * width if self.options.weights == "dynamic" else 0
        return super().macs() + sublayers * ((n + n * (n + 1)) * width + again) + n * width

    def routers(self) -> list[str]:
        """Everything that weighs streams."""
        names = ("read", "carry", "write", "norm", "route.weight", "scale")
        return [f"connections.{n}.{name}" for n in range(len(self.connections)) for name in names]
