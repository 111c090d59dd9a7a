"""The order of training windows: a permutation in every epoch, computed from the seed alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortcut_cli import batches
from shortcut_cli.errors import UsageError


class Counting:
    """A split whose id at place i is i."""

    name = "train"

    def __init__(self, tokens):
        self.tokens = tokens

    def read(self, start, length):
        assert 0 <= start <= start + length <= self.tokens
        return np.arange(start, start + length)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, seed):
    out = batches.permute(np.arange(size, dtype=np.uint64), size, seed)
    assert sorted(out.tolist()) == list(range(size))


def test_permutations_of_different_keys_are_unrelated():
    index = np.arange(4096, dtype=np.uint64)
    a, b = batches.permute(index, 4096, 1), batches.permute(index, 4096, 2)
    # Two random permutations agree in one place on average; 99.99 % of the time in fewer than 8.
    assert (a == b).sum() < 8
    assert abs(np.corrcoef(a.astype(float), index.astype(float))[0, 1]) < 0.06


@pytest.mark.parametrize("tokens", [17, 33, 50, 1000, 1024, 1025])
def test_every_window_comes_once_an_epoch(tokens):
    windows = batches.Windows(Counting(tokens), 16, seed=3)
    for epoch in range(3):
        starts = sorted(windows.starts(epoch * windows.count, windows.count).tolist())
        assert np.diff(starts).tolist() == [16] * (windows.count - 1)
        assert starts[0] >= 0
        assert starts[-1] + 17 <= tokens


def test_epochs_begin_at_different_places():
    windows = batches.Windows(Counting(10_000), 16, seed=3)
    offsets = {windows.starts(epoch * windows.count, windows.count).min() for epoch in range(8)}
    assert len(offsets) > 3


def test_targets_are_the_inputs_one_later():
    x, y = batches.Windows(Counting(1000), 16, seed=0).batch(5, 4)
    assert x.shape == y.shape == (4, 16)
    assert (y == x + 1).all()


def test_a_batch_does_not_depend_on_how_it_is_divided():
    windows = batches.Windows(Counting(5000), 8, seed=9)
    whole, _ = windows.batch(1000, 6)
    parts = [windows.batch(1000 + first, 2)[0] for first in (0, 2, 4)]
    assert whole.tolist() == [row for part in parts for row in part.tolist()]


def plain_mix(value):
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def plain_key(*numbers):
    state = 0
    for number in numbers:
        state = plain_mix((state + 0x9E3779B97F4A7C15 + number) % 2**64)
    return state


def plain_permute(value, size, seed):
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        left, right = value >> half, value % 2**half
        for number in range(6):
            left, right = right, left ^ (plain_mix(right ^ plain_key(seed, number)) % 2**half)
        value = (left << half) + right
        if value < size:
            return value


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 2**40), st.integers(0, 2**64 - 1), st.data())
def test_the_permutation_equals_a_plain_one(size, seed, data):
    # With Python's own integers; a change here would make every older run impossible to resume exactly.
    index = data.draw(st.integers(0, size - 1))
    assert batches.permute(np.array([index], np.uint64), size, seed).tolist() == [plain_permute(index, size, seed)]


def test_a_split_that_is_too_short_is_refused():
    with pytest.raises(UsageError, match="too few for a context of 16"):
        batches.Windows(Counting(16), 16, seed=1)
