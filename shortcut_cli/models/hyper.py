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
from shortcut_cli.kernels.depth import fork_read, fork_scores
from shortcut_cli.models.options import HyperOptions
from shortcut_cli.models.transformer import Block, Cache, Decoder, Linear, Trace


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
        del trace
        # Contiguous, since torch multiplies expanded matrices one by one.
        h = x.unsqueeze(2).expand(-1, -1, self.options.streams, -1).contiguous()  # (B, T, n, D)
        for number, connection in enumerate(self.connections):
            h, read, carry, write = connection(h)
            block = self.blocks[number // 2]
            assert isinstance(block, Block)
            h, x = fork_read(h, read)
            y = block.delta(x, number % 2, freqs, cache)
            written = write.unsqueeze(-1).flatten(0, 1) @ y.unsqueeze(-2).flatten(0, 1)  # (B T, n, D)
            # Under autocast what is written has a narrower dtype than the streams, which keep theirs.
            h = written.type_as(h).baddbmm_(carry.mT.flatten(0, 1), h.flatten(0, 1)).view_as(h)
        # Not h.mean(2): the layout of its gradient slows down all products behind it.
        return fork_read(h, h.new_full(h.shape[:3], 1 / self.options.streams))[1]

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
