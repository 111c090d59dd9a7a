"""Looking inside a forward pass: what is read across layers, with which weights, and what a change of it does.

An architecture declares its cross-layer reads in `Decoder.reads`: by reader, the names of its sources in order. A
reader is a layer, a part of one ("layer 3 values"), or the head; a source is the embedding, a layer, or a part of one.
What the reader would have read without the architecture's change, such as the state right below it, is a source too if
it is weighed against the others; its name begins with "own", and "all sources" does not mean it.

Where such a read happens, the model calls one of two hooks, if it was given a Trace:

    summed    the read is a weighted sum: x = sum over m of w_m s_m
    keyed     the read is a softmax over keys: which of them are there, and what they hold; then `record`

They store the weights, and change what is read, there and nowhere else: the source itself stays as it is for all other
readers, and for the layers above it. `stream` stores what each layer, and then the head, reads as its state.

Without a Trace no hook is called: a model computes what it computed before, to the bit, in one graph. With one that
changes nothing, the results are the same up to rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from shortcut_cli.kernels.rope import rotate

OWN = "own "  # begins the name of what a reader reads anyway
HEAD = "head"
Reads = dict[str, tuple[str, ...]]
Kind = Literal["masked", "shuffled", "mean_ablated"]


def layer_name(number: int) -> str:
    """Of a layer from 1; 0 is the embedding."""
    return f"layer {number}" if number else "embedding"


def sublayer_name(number: int) -> str:
    """Of a sublayer, from 0: attention and feed-forward of the first layer, attention of the second, and so on."""
    return f"{layer_name(number // 2 + 1)} {('attention', 'feed-forward')[number % 2]}"


def reader_name(layer: int, layers: int) -> str:
    """Who reads the state behind `layer` layers: the next of them, or the head."""
    return layer_name(layer + 1) if layer < layers else HEAD


@dataclass(frozen=True)
class Change:
    """What readers find in place of a source.

    masked: nothing; in a softmax the others share its part. shuffled: the source of the window before it in the batch,
    at the same times. mean_ablated: its mean over all tokens of the batch; of keys, before their rotation.
    """

    kind: Kind
    source: str | None = None  # None: all but the reader's own
    reader: str | None = None  # None: all

    def hits(self, reader: str, source: str) -> bool:
        """Whether this reader's read of this source is changed."""
        named = source == self.source if self.source is not None else not source.startswith(OWN)
        return named and self.reader in (None, reader)


@dataclass
class Trace:
    """Asks a forward pass over whole windows to record its reads, and optionally to change them."""

    change: Change | None = None
    measure_distances: bool = False
    keep_states: bool = False
    weights: dict[str, Tensor] = field(default_factory=dict)  # by reader, (B, H, M, T) fp32; H = 1 if heads share them
    distances: dict[str, Tensor] = field(default_factory=dict)  # by reader that looks back in time, the same, in tokens
    states: list[Tensor] = field(default_factory=list)  # (B, T, D): what each layer reads, and what the head reads
    _reads: Reads = field(default_factory=dict)
    _freqs: Tensor = field(default_factory=lambda: torch.empty(0))

    def begin(self, reads: Reads, freqs: Tensor) -> None:
        """Before the layers run. freqs: of all times, (T, d / 2, 2)."""
        self._reads, self._freqs = reads, freqs
        change = self.change
        if change is not None:
            changed = [(a, b) for a, names in reads.items() for b in names if change.hits(a, b)]
            assert changed, f"no read of {change.source} by {change.reader}"

    def reads(self, reader: str) -> bool:
        """Whether this is a cross-layer read."""
        return reader in self._reads

    def hit(self, reader: str) -> list[int]:
        """Numbers of the sources that are changed for this reader."""
        change, names = self.change, self._reads.get(reader, ())
        return [] if change is None else [m for m, name in enumerate(names) if change.hits(reader, name)]

    def stream(self, x: Tensor) -> None:
        """The state (B, T, D) that the next layer, or the head, reads."""
        if self.keep_states:
            self.states.append(x)

    def summed(self, reader: str, weights: Tensor, sources: Sequence[Tensor], total: Tensor) -> Tensor:
        """A read that is a weighted sum, `total` (B, ..., T, d), as changed.

        weights: (M,), (M, B, T), or by head (M, B, H, T); sources: M tensors in the shape of total. Nothing happens to
        a read that is not declared, such as that of a single source.
        """
        if reader not in self._reads:
            return total
        self._store(reader, weights, total)
        for m in self.hit(reader):
            weight = weights[m].unsqueeze(-1) if weights.dim() > 1 else weights[m]
            total = total + (weight * (self.value(sources[m]) - sources[m])).type_as(total)
        return total

    def keyed(self, reader: str, keys: Sequence[Tensor], values: Sequence[Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys (rotated by their time) and values of M sources, (B, H, T, d) each, as changed, without masked ones."""
        assert len(keys) == len(self._reads[reader]), (reader, len(keys), self._reads[reader])
        pairs = dict(enumerate(zip(keys, values, strict=True)))
        for m in self.hit(reader):
            k, v = pairs.pop(m)
            if not self.masks:
                pairs[m] = self._key(k), self.value(v)
        return dict(sorted(pairs.items()))

    def record(self, reader: str, kept: Sequence[int], shares: Tensor) -> None:
        """The shares (m, B, T) or (m, B, H, T) of those sources that are not masked."""
        count = len(self._reads[reader])
        whole = shares.new_zeros(count, *shares.shape[1:])
        whole[list(kept)] = shares
        self._store(reader, whole, shares)

    @property
    def masks(self) -> bool:
        """Whether the changed sources are masked."""
        return self.change is not None and self.change.kind == "masked"

    def value(self, x: Tensor) -> Tensor:
        """What stands in place of a changed source (B, ..., T, d)."""
        assert self.change is not None
        if self.change.kind == "masked":
            return torch.zeros_like(x)
        if self.change.kind == "shuffled":
            return x.roll(1, 0)
        return x.mean((0, -2), keepdim=True).expand_as(x)

    def _key(self, k: Tensor) -> Tensor:
        """The same of keys (B, H, T, d)."""
        assert self.change is not None
        if self.change.kind != "mean_ablated":
            return self.value(k)
        back = self._freqs * self._freqs.new_tensor([1.0, -1.0])
        still = rotate(k.transpose(1, 2), back)  # (B, T, H, d)
        return rotate(still.mean((0, 1), keepdim=True).expand_as(still), self._freqs).transpose(1, 2)

    def _store(self, reader: str, weights: Tensor, like: Tensor) -> None:
        """Keep weights (M,), (M, B, T) or (M, B, H, T); like: (B, ..., T, d) if they are the same for all tokens."""
        assert reader not in self.weights, f"{reader} reads twice"
        assert len(weights) == len(self._reads[reader]), (reader, len(weights), self._reads[reader])
        if weights.dim() == 1:
            weights = weights[:, None, None].expand(-1, like.shape[0], like.shape[-2])
        if weights.dim() == 3:
            weights = weights.unsqueeze(2)
        self.weights[reader] = weights.detach().float().movedim(0, 2)
