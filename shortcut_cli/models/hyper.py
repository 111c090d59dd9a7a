"""Hyper-connections (Zhu et al. 2024, arXiv 2409.19606): n residual streams, read and written by learned weights.

For a sublayer F and streams H (n, D):

    h = a^T H,      H <- R^T H + b (x) F(h)                          static: vectors a, b (n) and a matrix R (n, n)
    a <- a + s_a tanh(N(H) w_a),  R <- R + s_a tanh(N(H) W_r),  b <- b + s_b tanh(N(H) w_b)       dynamic, by the token

N is a norm of each stream. At first a reads stream (number of the sublayer mod n), R = I, b = 1, the w are zero and the
s 0.01: every stream is the baseline's residual stream. The head reads their mean; the paper's sum is n times that,
which the norm before the head undoes. Two or four streams start as the baseline bit for bit.
"""

import torch
from torch import Tensor, nn

from shortcut_cli.models.blocks import EPSILON, Block, Cache, Decoder, Linear, Trace
from shortcut_cli.models.mixing import fork_read, fork_scores
from shortcut_cli.models.options import HyperOptions
from shortcut_cli.recipe import ModelKeys


class Connection(nn.Module):
    """How one sublayer reads and writes the streams."""

    def __init__(self, width: int, options: HyperOptions, number: int) -> None:
        super().__init__()
        n = options.streams
        self.number, self.streams = number, n
        self.read = nn.Parameter(torch.zeros(n))
        self.carry = nn.Parameter(torch.zeros(n, n))  # until `begin`
        self.write = nn.Parameter(torch.ones(n))
        self.dynamic = options.weights == "dynamic"
        if self.dynamic:
            self.norm = nn.Parameter(torch.ones(width))
            self.route = Linear(width, n + 2)  # for `read`, the n columns of `carry`, and `write`
            self.scale = nn.Parameter(torch.full((2,), 0.01))  # of the first two, and of the last

    def begin(self) -> None:
        """The baseline."""
        self.read.zero_()
        self.read[self.number % self.streams] = 1
        self.carry.copy_(torch.eye(self.streams))
        if self.dynamic:
            self.route.weight.zero_()

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Streams (B, T, n, D) -> the same, and weights.

        To read (B, T, n), to carry (B, T, n, n), to write (B, T, n).
        """
        if not self.dynamic:
            shape = h.shape[:3]
            return h, self.read.expand(shape), self.carry.expand(*shape, -1), self.write.expand(shape)
        h, scores = fork_scores(h, self.route.weight * self.norm, EPSILON)
        fixed = torch.cat((self.read[:, None], self.carry, self.write[:, None]), 1)  # (n, n + 2)
        scale = torch.cat((self.scale[:1].expand(self.streams + 1), self.scale[1:]))
        weights = torch.addcmul(fixed, torch.tanh(scores), scale)  # (B, T, n, n + 2)
        read, carry, write = weights.split((1, self.streams, 1), -1)
        # Contiguous: torch multiplies others one by one.
        read, write = (x.squeeze(-1).contiguous() for x in (read, write))
        return h, read, carry, write


class Hyper(Decoder):
    """The baseline's sublayers on n residual streams."""

    def __init__(self, keys: ModelKeys, vocabulary: int, seed: int | None = None) -> None:
        self.options: HyperOptions = keys.hyper  # type: ignore[attr-defined]
        super().__init__(keys, vocabulary)
        self.connections = nn.ModuleList(
            Connection(keys.width, self.options, number) for number in range(2 * keys.layers)
        )
        if seed is not None:
            self.initialise(seed)

    def begin(self) -> None:
        """The baseline."""
        for connection in self.connections:
            assert isinstance(connection, Connection)
            connection.begin()

    def trunk(self, x: Tensor, table: Tensor, cache: Cache | None, trace: Trace | None) -> Tensor:
        """All layers: (B, T, D) -> (B, T, D)."""
        del trace
        # Contiguous: torch multiplies expanded matrices one by one.
        h = x.unsqueeze(2).expand(-1, -1, self.options.streams, -1).contiguous()  # (B, T, n, D)
        for number, connection in enumerate(self.connections):
            h, read, carry, write = connection(h)
            block = self.blocks[number // 2]
            assert isinstance(block, Block)
            h, x = fork_read(h, read)
            y = block.delta(x, number % 2, table, cache)
            written = write.unsqueeze(-1).flatten(0, 1) @ y.unsqueeze(-2).flatten(0, 1)  # (B T, n, D)
            # Under autocast what is written is narrower than the streams, which stay as they are.
            h = written.type_as(h).baddbmm_(carry.mT.flatten(0, 1), h.flatten(0, 1)).view_as(h)
        # Not h.mean(2): the layout of its gradient makes what follows eight times as slow.
        return fork_read(h, h.new_full(h.shape[:3], 1 / self.options.streams))[1]

    def multiplications(self) -> int:
        """Reading, carrying, and routing by each stream, beside the matrices."""
        n = self.options.streams
        sublayers, width = 2 * self.keys.layers, self.keys.width
        again = (n - 1) * (n + 2) * width if self.options.weights == "dynamic" else 0
        return super().multiplications() + sublayers * ((n + n * (n + 1)) * width + again) + n * width

    def routers(self) -> list[str]:
        """All that weighs streams."""
        names = ("read", "carry", "write", "norm", "route.weight", "scale")
        return [f"connections.{n}.{name}" for n in range(len(self.connections)) for name in names]
