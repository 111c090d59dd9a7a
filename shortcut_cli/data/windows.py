"""The order of training windows: a keyed permutation, computed and not stored.

A window follows from seed, epoch and index without any state, so a run resumes from its step number, instantly,
whatever the size of the data.
"""

import numpy as np
import numpy.typing as npt
import torch

from shortcut_cli.data.shards import Split
from shortcut_cli.errors import UsageError

U64 = npt.NDArray[np.uint64]
ROUNDS = 6


def mix(value: U64) -> U64:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a bijection that scatters 64-bit integers."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def key(*numbers: int) -> int:
    """One 64-bit key from several integers."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = mix(state + np.uint64(0x9E3779B97F4A7C15) + np.uint64(number & (2**64 - 1)))
    return int(state[0])


def permute(index: U64, size: int, seed: int) -> U64:
    """Apply a keyed permutation of range(size) to `index`, uint64 (n,) -> (n,).

    A balanced Feistel network over the next even number of bits; a value outside the range follows its cycle until it
    is inside (Black and Rogaway 2002), for fewer than four steps on average.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.uint64(key(seed, number)) for number in range(ROUNDS)]

    def once(value: U64) -> U64:
        left, right = value >> half, value & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        return (left << half) | right

    out = once(index)
    while (outside := out >= size).any():
        out[outside] = once(out[outside])
    return out


class Windows:
    """Windows of context + 1 ids over a split, each once per epoch, in an order set by seed and epoch.

    Raises UsageError if the split is shorter than one window.
    """

    def __init__(self, split: Split, context: int, seed: int) -> None:
        if split.tokens <= context:
            raise UsageError(
                f"the {split.name} split has {split.tokens} tokens, too few for a context of {context}",
                "prepare more data, or set a smaller model.context",
            )
        self.split = split
        self.context = context
        self.seed = seed
        # One window fewer than would fit, so that each epoch can start at a different offset.
        self.count = max(1, (split.tokens - 1) // context - 1)
        self.slack = split.tokens - 1 - self.count * context

    def starts(self, first: int, size: int) -> npt.NDArray[np.int64]:
        """Position in the split of windows first .. first + size, counted from the beginning of the run, (size,)."""
        epochs, indices = np.divmod(np.arange(first, first + size), self.count)
        out = np.empty(size, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            mine = epochs == epoch
            places = permute(indices[mine].astype(np.uint64), self.count, key(self.seed, epoch))
            out[mine] = places.astype(np.int64) * self.context + key(self.seed, epoch, 1) % (self.slack + 1)
        return out

    def batch(self, first: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows first .. first + size of the run: inputs and targets, both int64 (size, context)."""
        rows = [self.split.read(int(start), self.context + 1) for start in self.starts(first, size)]
        ids = torch.from_numpy(np.stack(rows))  # (B, T + 1)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
