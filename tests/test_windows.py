"""The order of training windows: a permutation in every epoch, computed from the seed."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shortcut_cli.data.windows import Windows, key, permute
from shortcut_cli.errors import UsageError


class Counting:
    """A split whose id at position i is i."""

    name = "train"

    def __init__(self, tokens):
        self.tokens = tokens

    def read(self, start, length):
        assert 0 <= start <= start + length <= self.tokens
        return np.arange(start, start + length)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, seed):
    out = permute(np.arange(size, dtype=np.uint64), size, seed)
    assert sorted(out.tolist()) == list(range(size))


def test_permutations_of_different_keys_are_unrelated():
    index = np.arange(4096, dtype=np.uint64)
    a, b = permute(index, 4096, 1), permute(index, 4096, 2)
    # Two random permutations agree in one position on average, and in fewer than 8 in 99.99 % of cases.
    assert (a == b).sum() < 8
    assert abs(np.corrcoef(a.astype(float), index.astype(float))[0, 1]) < 0.06


@pytest.mark.parametrize("tokens", [17, 33, 50, 1000, 1024, 1025])
def test_every_window_comes_once_per_epoch(tokens):
    windows = Windows(Counting(tokens), 16, seed=3)
    for epoch in range(3):
        starts = sorted(windows.starts(epoch * windows.count, windows.count).tolist())
        assert np.diff(starts).tolist() == [16] * (windows.count - 1)
        assert starts[0] >= 0
        assert starts[-1] + 17 <= tokens


def test_epochs_begin_at_different_places():
    windows = Windows(Counting(10_000), 16, seed=3)
    offsets = {windows.starts(epoch * windows.count, windows.count).min() for epoch in range(8)}
    assert len(offsets) > 3


def test_targets_are_the_inputs_one_later():
    x, y = Windows(Counting(1000), 16, seed=0).batch(5, 4)
    assert x.shape == y.shape == (4, 16)
    assert (y == x + 1).all()


def test_a_batch_does_not_depend_on_how_it_is_divided():
    windows = Windows(Counting(5000), 8, seed=9)
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
    # With Python's own integers. If this changed, no older run could be resumed exactly.
    index = data.draw(st.integers(0, size - 1))
    assert permute(np.array([index], np.uint64), size, seed).tolist() == [plain_permute(index, size, seed)]


def test_a_split_that_is_too_short_is_refused():
    with pytest.raises(UsageError, match="too few for a context of 16"):
        Windows(Counting(16), 16, seed=1)


def test_a_key_is_the_generator_that_the_paper_names():
    # The first outputs of the reference implementation of SplitMix64 from the states 0 and 1234567.
    assert key(0) == 0xE220A8397B1DCDAF
    assert key(1234567) == 6457827717110365317


@given(st.lists(st.integers(-(2**64), 2**65), max_size=4))
@example([-1, 2**64, -(2**64)])
def test_keys_equal_plain_ones(numbers):
    assert key(*numbers) == plain_key(*numbers)


def plain_start(tokens, context, seed, number):
    """First token of a run's window `number`, counted from 0."""
    count = 1  # windows per epoch: one fewer than fit into the split
    while (count + 2) * context + 1 <= tokens:
        count += 1
    slack = tokens - count * context - 1
    epoch, index = divmod(number, count)
    offset = plain_key(seed, epoch, 1) % (slack + 1)
    return plain_permute(index, count, plain_key(seed, epoch)) * context + offset


@pytest.mark.parametrize(("tokens", "context"), [(17, 16), (33, 16), (48, 16), (49, 16), (50, 16), (1025, 16), (99, 7)])
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_windows_equal_plain_ones(tokens, context, seed):
    # From the middle of an epoch across several epochs.
    windows = Windows(Counting(tokens), context, seed)
    expected = [plain_start(tokens, context, seed, number) for number in range(5, 145)]
    assert windows.starts(5, 140).tolist() == expected
    assert windows.batch(5, 140)[0][:, 0].tolist() == expected


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    orders = []
    for seed in (1, 2):
        windows = Windows(Counting(1000), 8, seed)
        assert windows.count == 123
        for epoch in range(3):
            starts = windows.starts(epoch * 123, 123)
            orders.append(tuple((starts - starts.min()).tolist()))
    assert len(set(orders)) == 6


def test_an_epoch_can_begin_at_every_place_that_leaves_room():
    # 40 tokens hold one window of 16 + 1 at 0 .. 23; 500 epochs miss one of 24 places once in 10^8.
    windows = Windows(Counting(40), 16, seed=1)
    assert windows.count == 1
    assert set(windows.starts(0, 500).tolist()) == set(range(24))


def test_a_batch_holds_whole_windows_in_their_order():
    windows = Windows(Counting(300), 16, seed=4)
    x, y = windows.batch(3, 40)
    starts = windows.starts(3, 40)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous()
    assert y.is_contiguous()
    assert (x.numpy() == starts[:, None] + np.arange(16)).all()
    assert (y.numpy() == starts[:, None] + np.arange(1, 17)).all()


def test_the_shortest_split_is_one_window():
    x, y = Windows(Counting(17), 16, seed=1).batch(0, 2)
    assert x.tolist() == [list(range(16))] * 2
    assert y.tolist() == [list(range(1, 17))] * 2
