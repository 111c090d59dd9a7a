"""Sampling: cached equals uncached at any length, and the filters equal plain ones."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import CONTEXT, VOCABULARY, ids, make

from shortcut_cli.generate import generate, probabilities
from shortcut_cli.tokenizers.base import Guide

ARMS = [("gpt", {}), ("shortcut", {}), ("shortcut", {"mode": "gated", "taps": "all"})]


def sampler(**given):
    return SimpleNamespace(**({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1} | given))


@pytest.mark.parametrize(("name", "options"), ARMS)
def test_greedy_sampling_equals_a_loop_without_cache_beyond_the_context(name, options):
    model = make(name, options, open_gates=True).eval()
    made = generate(model, ids(2, 5), 3 * CONTEXT, keys=sampler(temperature=0), end=-1)
    for row, expected in enumerate(ids(2, 5).tolist()):
        window = list(expected)
        for token in made.ids[row]:
            logits = model(torch.tensor([window]))[0, -1]
            # Equal up to ties of rounding: the token that was drawn is as good as the best.
            assert logits[token] >= logits.max() - 1e-4
            if len(window) == CONTEXT:
                window = window[-(CONTEXT // 2 - 1) :]
            window.append(token)


@pytest.mark.parametrize("top_k", [1, 3])
def test_top_k_keeps_the_largest(top_k):
    p = probabilities(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), sampler(top_k=top_k))[0]
    expected = torch.tensor([0.0, 3.0, 1.0, 2.0]).masked_fill(
        torch.tensor([top_k < 4, False, top_k < 3, top_k < 2]), -torch.inf
    )
    assert torch.allclose(p, expected.softmax(0))


def test_top_p_keeps_no_more_than_the_smallest_set():
    assert probabilities(torch.zeros(1, 2), sampler(top_p=0.5))[0].tolist() == [1.0, 0.0]
    assert probabilities(torch.zeros(1, 4), sampler(top_p=0.75))[0, 3] == 0


@settings(max_examples=100, deadline=None)
@given(
    # On a grid: equal, or far enough apart that rounding does not decide which is larger.
    st.lists(st.integers(-256, 256).map(lambda step: step / 64), min_size=2, max_size=12),
    st.floats(0.05, 0.99),
    st.floats(0.0, 0.9),
    st.floats(0.3, 3),
)
def test_the_filters_equal_plain_ones(logits, top_p, min_p, temperature):
    found = probabilities(torch.tensor([logits]), sampler(top_p=top_p, min_p=min_p, temperature=temperature))[0].numpy()
    z = np.array(logits, np.float32) / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    kept = np.zeros(len(p), bool)
    total, near = 0.0, False
    for place in np.argsort(-p, kind="stable"):
        near |= abs(total - top_p) < 1e-5
        if total >= top_p:
            break
        kept[place] = True
        total += p[place]
    q = np.where(kept, p, 0)
    near |= bool((abs(q - min_p * q.max()) < 1e-5).any()) and min_p > 0
    q = np.where(q < min_p * q.max(), 0, q)
    if not near:  # at the very border rounding decides
        assert np.allclose(found, q / q.sum(), atol=1e-4)
    assert abs(found.sum() - 1) < 1e-5
    assert found[p.argmax()] > 0


def test_equal_seeds_give_equal_ids_and_rows_differ():
    model = make("gpt", {}).eval()
    first, second = (generate(model, ids(1, 4).repeat(3, 1), 20, keys=sampler(), end=-1).ids for _ in range(2))
    assert first == second
    assert len({tuple(row) for row in first}) == 3
    assert generate(model, ids(1, 4).repeat(3, 1), 20, keys=sampler(seed=2), end=-1).ids != first


def test_a_row_does_not_depend_on_how_many_there_are():
    model = make("shortcut", {}).eval()
    many = generate(model, ids(1, 4).repeat(3, 1), 20, keys=sampler(), end=-1).ids
    one = generate(model, ids(1, 4), 20, keys=sampler(), end=-1).ids
    assert many[0] == one[0]


def test_only_what_is_allowed_is_drawn_and_forced_steps_are_counted():
    model = make("gpt", {}).eval()

    class OddAfterEven(Guide):
        mask = np.arange(VOCABULARY) % 2 == 1

        def allowed(self, left):
            seen.append(left)
            return self.mask

        def push(self, token):
            self.mask = np.arange(VOCABULARY) % 2 != token % 2

    seen = []
    prompt, guides = torch.zeros(2, 1, dtype=torch.int64), [OddAfterEven(), OddAfterEven()]
    made = generate(model, prompt, 30, keys=sampler(), end=-1, guides=guides)
    for row in made.ids:
        assert [token % 2 for token in row] == [(place + 1) % 2 for place in range(30)]
    assert seen[::2] == list(range(30, 0, -1))
    # The head is tied to the embedding, so that an untrained model's most probable id is the one before: never allowed.
    assert made.forced == [30, 30]
    free = generate(model, ids(2, 4), 30, keys=sampler(), end=-1, guides=[Guide(), Guide()])
    assert free.forced == [0, 0]


def test_a_row_ends_at_the_end_id():
    model = make("gpt", {}).eval()
    made = generate(model, ids(8, 3), 400, keys=sampler(), end=7)
    for row in made.ids:
        assert row.count(7) == (row[-1] == 7)
        assert row[-1] == 7 or len(row) == 400
    assert any(len(row) < 400 for row in made.ids)
