"""Sampling against a plain loop: no cache, one row at a time, filters and draws in float64 numpy."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import CONTEXT, VOCABULARY, ids, make

from shortcut_cli import registry
from shortcut_cli.errors import CheckFailed
from shortcut_cli.inference.decoding import Packed, Rounded, ShortBlock, Transposed, prepared
from shortcut_cli.inference.generate import AHEAD, Uniforms, _fill, draw, generate, probabilities
from shortcut_cli.models.transformer import Linear
from shortcut_cli.tokenizers.base import Constraint
from shortcut_cli.training import conditions

ARMS = [("gpt", {}), ("shortcut", {}), ("shortcut", {"mode": "gated", "taps": "all"})]
ALL_ARMS = [*{name: (name, {}) for name in registry.MODELS}.values(), ARMS[-1]]
# How far fp32 may move a probability (measured: below 4e-7). A plain draw or filter closer to a border than this would
# depend on rounding; `plain_row` asserts that no fixed example does.
ROUNDING = 2e-6


def sampler(**given):
    return SimpleNamespace(**({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1} | given))


# The plain loop -------------------------------------------------------------------------------------------------------


def plain_probabilities(z, config):
    """The distribution of logits z (V,) in float64, and how near the filters came to a border (ties don't count)."""
    z = np.asarray(z, np.float64)
    if config.temperature == 0:
        return np.eye(len(z))[z.argmax()], np.inf
    p = np.exp((z - z.max()) / config.temperature)
    if config.top_k:
        p[p < np.sort(p)[::-1][min(config.top_k, len(p)) - 1]] = 0
    p /= p.sum()
    near = np.inf
    if config.top_p < 1:
        kept, total = np.zeros(len(p)), 0.0
        for place in np.argsort(-p, kind="stable"):
            near = min(near, abs(total - config.top_p))
            if total >= config.top_p:
                break
            kept[place] = p[place]
            total += p[place]
        p = kept
    if config.min_p:
        least = config.min_p * p.max()
        near = min(near, np.abs(p - least).min())
        p = np.where(p < least, 0, p)
    return p / p.sum(), near


def plain_row(logits_of, prompt, tokens, *, config, number, eos, context, constraint=None, rounding=ROUNDING):
    """New ids of the row with that number, and its forced steps; the whole window is read again for each id.

    logits_of: the list of ids seen so far -> the logits (V,) of the next id, an array.
    """
    generator = torch.Generator().manual_seed(1_000_003 * config.seed + number)
    seen, new, forced = prompt[-context:], [], 0
    for step in range(tokens):
        z = logits_of(seen).astype(np.float64)
        mask = constraint.allowed(tokens - step) if constraint else None
        if mask is not None:
            forced += int(not mask[z.argmax()])
            z[~mask] = -np.inf
        p, near = plain_probabilities(z, config)
        borders = p.cumsum()
        u = torch.rand(1, dtype=torch.float64, generator=generator).item()
        assert min(near, np.abs(borders - u)[p > 0].min()) > rounding, f"step {step} depends on rounding"
        token = next(i for i, border in enumerate(borders) if border > u)
        new.append(token)
        if token == eos:
            break
        if constraint:
            constraint.push(token)
        # A full window continues from its newest half, the new id included.
        full = len(seen) == context
        seen = [*seen, token]
        if full:
            seen = seen[-(context // 2) :]
    return new, forced


class Rows(list):
    """A cache: the ids of each row."""

    def keep(self, rows):
        self[:] = [self[row] for row in rows]


class Exact:
    """A model whose logits are random numbers, seeded by all the ids that it sees: equal or entirely different."""

    def __init__(self, context, vocabulary=17):
        self.config, self.vocabulary = SimpleNamespace(context=context), vocabulary
        self.calls = []  # the ids of each call

    def new_cache(self, batch, length):
        assert length == self.config.context
        return Rows([] for _ in range(batch))

    def __call__(self, new, cache):
        assert torch.is_inference_mode_enabled()
        assert new.dtype == torch.int64
        self.calls.append(new.tolist())
        out = []
        for row, tokens in zip(cache, new.tolist(), strict=True):
            out.append([])
            for token in tokens:
                row.append(token)
                out[-1].append(self.logits(row))
            assert len(row) <= self.config.context
        return torch.tensor(np.array(out), dtype=torch.float32)

    def logits(self, seen):
        return np.random.default_rng([len(seen), *seen]).normal(0, 2, self.vocabulary).astype(np.float32)


class Turns(Constraint):
    """Allows ids by their difference from the last id and the number of ids left; logs its calls.

    All of them if the number of ids left is that of the row, modulo 5, or 0: some rows or all.
    """

    def __init__(self, row, vocabulary=17):
        self.row, self.vocabulary, self.last, self.log = row, vocabulary, 0, []

    def allowed(self, left):
        self.log.append(("allowed", left))
        if left % 5 in (0, self.row):
            return None
        return (np.arange(self.vocabulary) + self.last + left) % 3 != 0

    def push(self, token):
        self.log.append(("push", token))
        self.last = token


def prompts(rows, length, vocabulary=17):
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(length))


SAMPLERS = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5, "seed": 3},
    "greedy": {"temperature": 0, "top_k": 2, "top_p": 0.1, "min_p": 0.9},
    "top_k": {"top_k": 3, "seed": 0},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.4, "top_k": 6, "top_p": 0.85, "min_p": 0.1, "seed": 12},
}


@pytest.mark.parametrize("constrained", [False, True], ids=["free", "constrained"])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("context", "length"), [(8, 3), (9, 1), (8, 8), (7, 12)], ids=["short", "one", "full", "beyond the context"]
)
def test_the_ids_and_forced_steps_are_those_of_a_plain_loop(context, length, name, constrained):
    config, eos, tokens, prompt = sampler(**SAMPLERS[name]), 4, 29, prompts(6, length)
    constraints, plain_constraints = ([Turns(row) for row in range(6)] if constrained else None for _ in range(2))
    model = Exact(context)
    made = generate(model, prompt, tokens, config=config, eos=eos, constraints=constraints)
    expected = [
        plain_row(
            model.logits,
            row,
            tokens,
            config=config,
            number=number,
            eos=eos,
            context=context,
            constraint=plain_constraints[number] if constrained else None,
        )
        for number, row in enumerate(prompt.tolist())
    ]
    assert made.ids == [row for row, _ in expected]
    assert made.forced == [forced for _, forced in expected]
    # These make the example a test: rows longer than the context, rows that end before others, many different ids.
    assert max(map(len, made.ids)) > context
    assert min(map(len, made.ids)) < max(map(len, made.ids))
    assert len({token for row in made.ids for token in row}) > 6
    if constrained:
        assert 0 < sum(made.forced) < sum(map(len, made.ids))
        assert [constraint.log for constraint in constraints] == [constraint.log for constraint in plain_constraints]


@pytest.mark.parametrize("context", [2, 3])
def test_the_smallest_contexts_continue_from_one_id(context):
    model, config = Exact(context), sampler()
    made = generate(model, prompts(2, 1), 12, config=config, eos=-1)
    for number, row in enumerate(prompts(2, 1).tolist()):
        assert (
            made.ids[number]
            == plain_row(model.logits, row, 12, config=config, number=number, eos=-1, context=context)[0]
        )


def test_the_model_reads_one_id_a_step_and_half_a_window_when_it_is_full():
    model = Exact(8)
    made = generate(model, prompts(1, 20), 11, config=sampler(), eos=-1)
    everything = prompts(1, 20).tolist()[0] + made.ids[0]
    # The prompt fills the window with 8 ids; then come the newest 4, then one at a time until there are 8 again.
    filled = [(12, 20)]
    again = [(17, 21), (21, 22), (22, 23), (23, 24), (24, 25)]
    once_more = [(22, 26), (26, 27), (27, 28), (28, 29), (29, 30)]
    assert model.calls == [[everything[a:b]] for a, b in filled + again + once_more]


def test_a_row_that_has_ended_is_read_no_more_and_the_last_one_ends_the_loop():
    model, reported, prompt = Exact(8), [], prompts(12, 2)
    made = generate(model, prompt, 300, config=sampler(), eos=4, progress=reported.append)
    lengths = [len(row) for row in made.ids]
    assert all(row.index(4) == len(row) - 1 for row in made.ids)
    assert len(set(lengths)) > 5
    assert max(lengths) > 8
    assert reported == list(range(1, max(lengths) + 1))
    assert [len(call) for call in model.calls] == [
        sum(length > step for length in lengths) for step in range(max(lengths))
    ]


@pytest.mark.parametrize(("name", "options"), ALL_ARMS)
def test_every_row_of_a_batch_is_that_of_a_plain_loop_alone_while_others_end(name, options):
    """All architectures, beyond the context; rows end one after another and leave the batch."""
    model, prompt, config, eos = lively(name, options), ids(6, 3), sampler(temperature=1.2, top_p=0.97), 7

    def logits_of(seen):
        with torch.inference_mode():
            return model(torch.tensor([seen]))[0, -1].numpy()

    made = generate(model, prompt, 2 * CONTEXT, config=config, eos=eos)
    for number, row in enumerate(prompt.tolist()):
        plain = {"config": config, "number": number, "eos": eos, "context": CONTEXT, "rounding": 1e-9}
        assert made.ids[number] == plain_row(logits_of, row, 2 * CONTEXT, **plain)[0]
    lengths = {len(row) for row in made.ids}
    assert len(lengths) > 1
    assert max(lengths) > CONTEXT


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 30), min_size=1))
def test_rows_that_stay_move_only_over_rows_that_have_ended(places):
    order = _fill(sorted(places))
    assert sorted(order) == sorted(places)
    for place, row in enumerate(order):
        assert row == place or (place not in places and row >= len(order))


def test_a_cache_keeps_the_rows_that_are_named():
    model = make("shortcut", {}, open_gates=True).double().eval()
    x, order = ids(6, 9), [0, 5, 2, 4]
    with torch.inference_mode():
        cache = model.new_cache(6, CONTEXT)
        model(x[:, :6], cache)
        cache.keep(order)
        found = model(x[order, 6:], cache)
        assert torch.allclose(found, model(x)[order, 6:], atol=1e-12, rtol=0)


def test_progress_is_called_after_every_step():
    reported = []
    generate(Exact(8), prompts(2, 3), 9, config=sampler(), eos=-1, progress=reported.append)
    assert reported == [1, 2, 3, 4, 5, 6, 7, 8, 9]


# Real models ----------------------------------------------------------------------------------------------------------


def lively(name, options):
    """A model whose next id depends on many before it: an untied head, and weights that make attention selective."""
    model = make(name, options, open_gates=True, tied=False, activation="swiglu").double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(12)
    return model


@pytest.mark.parametrize(("name", "options"), ARMS)
def test_greedy_sampling_equals_a_loop_without_cache_beyond_the_context(name, options):
    model, prompt = lively(name, options), ids(2, 5, seed=3)
    made = generate(model, prompt, 3 * CONTEXT, config=sampler(temperature=0), eos=-1).ids
    seen, expected = prompt, []
    for _ in range(3 * CONTEXT):
        with torch.inference_mode():
            logits = model(seen)[:, -1]
        best = logits.topk(2)
        # With and without cache differ by fp32 rounding of the rotary positions; no step may depend on that.
        assert (best.values[:, 0] - best.values[:, 1]).min() > 1e-4
        expected.append(best.indices[:, 0].tolist())
        kept = seen[:, -(CONTEXT // 2 - 1) :] if seen.shape[1] == CONTEXT else seen
        seen = torch.cat((kept, best.indices[:, :1]), 1)
    assert made == [list(row) for row in zip(*expected, strict=True)]
    assert all(len(set(row)) > VOCABULARY // 2 for row in made)


@pytest.mark.parametrize(("name", "options"), ARMS)
def test_sampling_equals_a_plain_loop_without_cache_beyond_the_context(name, options):
    model, prompt, config = lively(name, options), ids(2, 30), sampler(temperature=1.5, top_p=0.95)

    def logits_of(seen):
        with torch.inference_mode():
            return model(torch.tensor([seen]))[0, -1].numpy()

    made = generate(model, prompt, 40, config=config, eos=-1)
    for number, row in enumerate(prompt.tolist()):
        expected, _ = plain_row(logits_of, row, 40, config=config, number=number, eos=-1, context=CONTEXT)
        assert made.ids[number] == expected


# The distribution -----------------------------------------------------------------------------------------------------


def test_a_top_p_of_one_keeps_what_the_rest_rounds_to_one_without():
    p = probabilities(torch.tensor([[20.0, 0.0, 1.0]]), sampler(top_p=1.0))[0]
    assert p.tolist() == pytest.approx([1.0, math.exp(-20), math.exp(-19)], rel=1e-5)


def test_temperature_divides_the_logits_at_any_size():
    z = np.array([0.3, 0.0, 0.25, -0.1])
    for t in (0.01, 0.05, 0.3, 0.9, 1.0, 1.1, 3.0, 50.0):
        expected = [math.exp(x / t) / sum(math.exp(y / t) for y in z) for x in z]
        found = probabilities(torch.tensor(z)[None], sampler(temperature=t))[0]
        # fp32 keeps z / t to 2 ** -24 of itself, here 30 at most: 2e-6 of a probability.
        assert np.allclose(found, expected, rtol=4e-6, atol=1e-12), t


@pytest.mark.parametrize("t", [1e-6, 1e-3, 0.05, 0.5, 1, 2, 1e3, 1e6])
def test_logits_as_large_as_the_temperature_have_the_softmax_of_their_ratio(t):
    ratios = np.array([3.0, 0.0, 2.5, -1.0])
    found = probabilities(torch.tensor(ratios * t)[None], sampler(temperature=t))[0]
    assert np.allclose(found, np.exp(ratios) / np.exp(ratios).sum(), rtol=2e-6)


def test_a_temperature_of_zero_takes_only_the_most_probable():
    z = torch.tensor([[0.0, 0.1, -1.0], [5.0, 4.999, 4.0], [-3.0, -2.0, -1.0]])
    found = probabilities(z, sampler(temperature=0))
    assert found.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert found.dtype == torch.float32


def test_logits_of_half_precision_are_divided_and_summed_in_fp32():
    z = torch.linspace(-3, 3, 50).bfloat16()[None]
    found = probabilities(z, sampler(temperature=0.7))
    expected = np.exp(z.double().numpy() / 0.7)
    assert found.dtype == torch.float32
    assert np.allclose(found, expected / expected.sum(), rtol=1e-5)  # in bfloat16: 4e-3


@pytest.mark.parametrize("top_k", [1, 3])
def test_top_k_keeps_the_largest(top_k):
    p = probabilities(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), sampler(top_k=top_k))[0]
    expected = torch.tensor([0.0, 3.0, 1.0, 2.0]).masked_fill(
        torch.tensor([top_k < 4, False, top_k < 3, top_k < 2]), -torch.inf
    )
    assert torch.allclose(p, expected.softmax(0))


@pytest.mark.parametrize("top_k", [0, 4, 5, 1000])
def test_a_top_k_of_zero_or_of_the_vocabulary_and_more_keeps_all(top_k):
    z = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    assert torch.allclose(probabilities(z, sampler(top_k=top_k)), z.softmax(-1))


def test_top_k_keeps_all_ties_of_the_last_it_keeps():
    p = probabilities(torch.tensor([[1.0, 1.0, 0.0, 2.0, 1.0]]), sampler(top_k=2))[0].tolist()
    e = math.e
    assert p == pytest.approx([e / (3 * e + e * e)] * 2 + [0, e * e / (3 * e + e * e), e / (3 * e + e * e)])


def test_top_k_larger_than_what_is_allowed_brings_nothing_back():
    p = probabilities(torch.tensor([[1.0, -torch.inf, 1.0, -torch.inf]]), sampler(top_k=3))[0].tolist()
    assert p == pytest.approx([0.5, 0, 0.5, 0])


def test_top_p_keeps_no_more_than_the_smallest_set():
    assert probabilities(torch.zeros(1, 2), sampler(top_p=0.5))[0].tolist() == [1.0, 0.0]
    assert probabilities(torch.zeros(1, 4), sampler(top_p=0.75))[0, 3] == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 3}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.91}, [0.1, 0.4, 0.2, 0.3]),
        ({"min_p": 0.24}, [0.1, 0.4, 0.2, 0.3]),
        ({"min_p": 0.26}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"min_p": 0.74}, [0, 4 / 7, 0, 3 / 7]),
        ({"min_p": 0.76}, [0, 1, 0, 0]),
        # After top-k, 4 / 7 and 3 / 7 are left, and the first is more than a half; before it was not.
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
        # After top-p, the smaller of two is 3 / 4 of the larger. If min-p came first, 0.4 and 0.3 of 0.7 would be left,
        # and top-p would keep one.
        ({"top_p": 0.5, "min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        # A temperature of a half squares them: 1, 16, 4, 9 of 30. The largest is 0.53, and 4 is a quarter of it.
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 0.5, "top_p": 0.52}, [0, 1, 0, 0]),
        ({"temperature": 0.5, "min_p": 0.26}, [0, 16 / 25, 0, 9 / 25]),
        ({"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.2}, [0, 16 / 29, 4 / 29, 9 / 29]),
    ],
)
def test_each_filter_keeps_the_right_ids_of_four(options, expected):
    found = probabilities(torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log(), sampler(**options))[0]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_min_p_keeps_what_has_exactly_its_share():
    z = torch.tensor([[1.0, 0.0, -2.0]])
    first, second, _ = z.softmax(-1)[0]
    nearest = second / first
    shares = [nearest, nearest.nextafter(torch.tensor(0.0)), nearest.nextafter(torch.tensor(1.0))]
    share = next(share.item() for share in shares if share * first == second)
    found = probabilities(z, sampler(min_p=share))[0]
    assert found.tolist() == pytest.approx([math.e / (math.e + 1), 1 / (math.e + 1), 0])


def test_each_row_is_filtered_separately():
    z = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.02, 0.03, 0.05, 0.9], [0.7, 0.1, 0.1, 0.1]]).log()
    before = z.clone()
    for options in SAMPLERS.values():
        config = sampler(**options)
        found = probabilities(z, config)
        for row, p in zip(z, found, strict=True):
            assert np.allclose(p, plain_probabilities(row, config)[0], atol=ROUNDING)
    assert torch.equal(z, before)


@settings(max_examples=100, deadline=None)
@given(
    # On a grid: equal, or so far apart that rounding doesn't decide which is larger.
    st.lists(st.integers(-256, 256).map(lambda step: step / 64), min_size=2, max_size=12),
    st.integers(0, 13),
    st.floats(0.05, 1),
    st.floats(0.0, 0.9),
    st.floats(0.1, 3),
)
def test_the_filters_equal_plain_ones(logits, top_k, top_p, min_p, temperature):
    config = sampler(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    found = probabilities(torch.tensor([logits]), config)[0].numpy()
    expected, near = plain_probabilities(logits, config)
    if near > 1e-5:  # at a border, rounding decides
        # fp32 keeps z / t to 2 ** -24 of itself, here 80 at most: 5e-6 of a probability.
        assert np.allclose(found, expected, atol=1e-5)
    assert abs(found.sum() - 1) < 1e-5
    assert found[np.argmax(logits)] > 0


# Drawing --------------------------------------------------------------------------------------------------------------


LARGEST = 1 - 2**-53  # of torch's uniforms in float64


def drawn(p, u):
    """The id drawn from one distribution (V,) by one number."""
    return draw(p[None], torch.tensor([u], dtype=torch.float64)).tolist()[0]


@pytest.mark.parametrize(
    ("u", "token"),
    [
        (0.0, 1),
        (0.1249, 1),
        (0.125, 3),
        (0.3749, 3),
        (0.375, 4),
        (0.8749, 4),
        (0.875, 6),
        (LARGEST, 6),
    ],
)
def test_the_id_drawn_is_the_first_whose_sum_exceeds_the_uniform(u, token):
    p = torch.tensor([0, 0.125, 0, 0.25, 0.5, 0, 0.125, 0])  # ids of no probability first, between and last
    assert drawn(p, u) == token


def test_a_distribution_that_rounds_to_less_than_one_never_draws_beyond_its_end():
    p = torch.tensor([0.9, 0.1])
    assert p.double().sum() < 1 - 1e-8
    assert drawn(p, LARGEST) == 1


def test_an_id_of_tiny_probability_is_not_lost_in_the_sum_before_it():
    assert drawn(torch.tensor([0.5, 2**-31, 0.5]), 0.5) == 1


def test_rows_are_drawn_each_from_its_own_distribution_by_its_own_number():
    p = torch.rand(50, 9, generator=torch.Generator().manual_seed(3)).masked_fill(torch.arange(9) % 4 == 1, 0)
    u = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    assert draw(p, u).tolist() == [drawn(row, number) for row, number in zip(p, u.tolist(), strict=True)]
    assert len(set(draw(p, u).tolist())) > 4


def test_numbers_drawn_ahead_are_those_drawn_one_by_one():
    uniforms, generators = Uniforms(5, 4), [torch.Generator().manual_seed(5 * 1_000_003 + row) for row in range(4)]
    rows = [0, 1, 2, 3]
    for step in range(2 * AHEAD + 3):
        if step == AHEAD // 2:
            rows = [0, 3]
            uniforms.keep(rows)
        each = [torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators]
        assert uniforms.next().tolist() == [each[row].item() for row in rows]


def test_draws_come_as_often_as_their_probability():
    p = torch.tensor([0.05, 0.3, 0.0, 0.15, 0.5])
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(4000, dtype=torch.float64, generator=generator)
    counts = np.bincount(draw(p.expand(4000, 5), numbers), minlength=5)
    assert counts[2] == 0
    kept, expected = counts[[0, 1, 3, 4]], 4000 * np.array([0.05, 0.3, 0.15, 0.5])
    assert ((kept - expected) ** 2 / expected).sum() < 16.27  # chi-square of 3 degrees of freedom, p = 0.001


# Rows and seeds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_a_failed_check(value, temperature):
    model = lively("gpt", {})
    with torch.no_grad():
        for weights in model.parameters():
            weights.fill_(value)
    with pytest.raises(CheckFailed, match="logits are not finite"):
        generate(model, ids(2, 4), 30, config=sampler(temperature=temperature), eos=-1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_logit_of_one_row_that_is_not_finite_is_a_failed_check(temperature):
    class Damaged(Exact):
        def __call__(self, new, cache):
            logits = super().__call__(new, cache)
            logits[2, -1, 5] = torch.nan if len(cache[2]) > 5 else logits[2, -1, 5]
            return logits

    steps = []
    with pytest.raises(CheckFailed, match="logits are not finite"):
        generate(Damaged(16), prompts(4, 3), 9, config=sampler(temperature=temperature), eos=-1, progress=steps.append)
    assert steps == [1, 2, 3]


def test_every_id_is_told_with_its_row_as_soon_as_it_is_drawn():
    told, after = [], []
    made = generate(
        Exact(8),
        prompts(6, 2),
        40,
        config=sampler(),
        eos=4,
        drawn_id=lambda row, token: told.append((row, token)),
        progress=lambda _: after.append(len(told)),
    )
    assert [[token for row, token in told if row == number] for number in range(6)] == made.ids
    assert after == [sum(min(step, len(row)) for row in made.ids) for step in range(1, max(map(len, made.ids)) + 1)]


@pytest.mark.parametrize("seed", [0, 2**53 + 1, 2**63 - 1])
def test_rows_of_any_seed_have_generators_of_their_own(seed):
    rows = Uniforms(seed, 3, first=2).next()
    expected = [
        torch.rand(
            1, dtype=torch.float64, generator=torch.Generator().manual_seed((seed * 1_000_003 + row) & (2**64 - 1))
        )
        for row in (2, 3, 4)
    ]
    assert torch.equal(rows, torch.cat(expected))
    assert len(set(rows.tolist())) == 3


def test_equal_seeds_give_equal_ids_and_rows_differ():
    model = make("gpt", {}).eval()
    first, second = (generate(model, ids(1, 4).repeat(3, 1), 20, config=sampler(), eos=-1).ids for _ in range(2))
    assert first == second
    assert len({tuple(row) for row in first}) == 3
    assert generate(model, ids(1, 4).repeat(3, 1), 20, config=sampler(seed=2), eos=-1).ids != first


def test_no_row_of_a_seed_is_a_row_of_another_seed():
    prompt = torch.zeros(5, 1, dtype=torch.int64)
    rows = [
        tuple(row)
        for seed in range(6)
        for row in generate(Exact(32), prompt, 12, config=sampler(seed=seed), eos=-1).ids
    ]
    assert len(set(rows)) == 30


def test_a_row_does_not_depend_on_how_many_there_are():
    model, prompt = lively("shortcut", {}), ids(3, 4, seed=1)
    many = generate(model, prompt, 30, config=sampler(), eos=-1).ids
    assert len({tuple(row) for row in many}) == 3
    for count in (1, 2):
        assert generate(model, prompt[:count], 30, config=sampler(), eos=-1).ids == many[:count]
    greedy = sampler(temperature=0)
    alone = [generate(model, row[None], 30, config=greedy, eos=-1).ids[0] for row in prompt]
    assert generate(model, prompt, 30, config=greedy, eos=-1).ids == alone
    assert all(len(set(row)) > 10 for row in alone)


# Constraints and EOS --------------------------------------------------------------------------------------------------


def test_only_what_is_allowed_is_drawn_and_forced_steps_are_counted():
    model = make("gpt", {}).eval()

    class OddAfterEven(Constraint):
        mask = np.arange(VOCABULARY) % 2 == 1

        def allowed(self, left):
            seen.append(left)
            return self.mask

        def push(self, token):
            self.mask = np.arange(VOCABULARY) % 2 != token % 2

    seen = []
    prompt, constraints = torch.zeros(2, 1, dtype=torch.int64), [OddAfterEven(), OddAfterEven()]
    made = generate(model, prompt, 30, config=sampler(), eos=-1, constraints=constraints)
    for row in made.ids:
        assert [token % 2 for token in row] == [(place + 1) % 2 for place in range(30)]
    assert seen == [left for left in range(30, 0, -1) for _ in constraints]
    # The head is tied to the embedding, so an untrained model's most probable id is the previous one: never allowed.
    assert made.forced == [30, 30]
    free = generate(model, ids(2, 4), 30, config=sampler(), eos=-1, constraints=[Constraint(), Constraint()])
    assert free.forced == [0, 0]


def test_a_step_is_forced_only_if_the_most_probable_id_was_not_allowed():
    class Without(Constraint):
        def __init__(self, *tokens):
            self.mask = ~np.isin(np.arange(4), tokens)

        def allowed(self, left):  # noqa: ARG002
            return self.mask

    kept = torch.tensor([0.0, 1, 3, 2]).expand(5, 1, 4).clone()  # most probable: 2, then 3
    given = kept.clone()

    class Constant(Exact):
        def __call__(self, *_):
            return kept

    model = Constant(8, vocabulary=4)
    constraints = [Without(), Without(2), Without(0, 1, 3), Without(3), Without(2, 3)]
    made = generate(
        model, torch.zeros(5, 1, dtype=torch.int64), 6, config=sampler(temperature=0), eos=-1, constraints=constraints
    )
    assert made.ids == [[2] * 6, [3] * 6, [2] * 6, [2] * 6, [1] * 6]
    assert made.forced == [0, 6, 0, 0, 6]
    assert torch.equal(kept, given), "constraints wrote into what the model returned"


def test_a_row_ends_at_eos():
    model, prompt = make("gpt", {}).eval(), ids(8, 3)
    made = generate(model, prompt, 50, config=sampler(), eos=7).ids
    # Without EOS, the same draws continue behind it.
    free = generate(model, prompt, 50, config=sampler(), eos=-1).ids
    assert made == [row[: row.index(7) + 1] if 7 in row else row for row in free]
    assert 0 < sum(7 in row for row in free) < 8


# bf16 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), ALL_ARMS)
def test_products_in_bf16_round_weights_and_what_they_multiply_and_nothing_else(name, options):
    """The oracle rounds both to bf16 and multiplies in fp32; the kernel may sum in another order, then round once."""
    model, x = make(name, options, open_gates=True, tied=False).eval(), ids(3, 12)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, Linear):
            weight = module.weight.detach().bfloat16().float()
            # What an activation follows is rounded after it, by the product that reads it.
            dtype = torch.float32 if module.narrow else torch.bfloat16
            module.forward = lambda x, w=weight, to=dtype: (x.bfloat16().float() @ w.T).to(to).float()
    with torch.inference_mode():
        exact, expected = model(x), plain(x)
        with prepared(model, 3, "bf16"):
            found = model(x)
            cache = model.new_cache(3, CONTEXT)
            parts = torch.cat([model(x[:, a:b], cache) for a, b in ((0, 5), *((t, t + 1) for t in range(5, 12)))], 1)
        assert torch.equal(model(x), exact)
    scale = exact.abs().max()
    noise = (expected - exact).abs().max() / scale
    assert 1e-4 < noise < 0.2
    for seen in (found, parts):
        # Sums in another order round to the other neighbor now and then, and the layers above carry that on.
        assert (seen - expected).abs().max() / scale < noise
        assert not torch.equal(seen, exact)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_model_is_prepared_for_a_block_alone_even_if_it_ends_by_an_error(rows, precision):
    model = make("gpt", {}).eval()
    kinds = [type(module) for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def fail():
        with prepared(model, rows, precision):
            assert sum(isinstance(module, Packed | Rounded | Transposed) for module in model.modules()) == 6 * 4 + 1
            assert all(type(block) is ShortBlock for block in model.blocks)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# Prepared models ------------------------------------------------------------------------------------------------------

SHAPES = [{}, {"activation": "relu2", "tied": False}, {"activation": "swiglu"}, {"qk_norm": True}]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("name", "options"), [*ALL_ARMS, ("conv", {"groups": 4})])
def test_a_prepared_model_has_the_logits_of_the_model(name, options, shape, rows):
    """The oracle reads whole windows in float64. Rounding in fp32 moves a logit of the model itself by up to 1e-5 of
    the largest (`hyper`, measured); the prepared one may add 5e-6.
    """
    model, x = make(name, options, open_gates=True, **shape).eval(), ids(rows, 14)

    def stepwise():
        cache = model.new_cache(rows, CONTEXT)
        steps = [(0, 5), *((t, t + 1) for t in range(5, 14))]
        return torch.cat([model(x[:, a:b], cache) for a, b in steps], 1)

    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(x)
        by_rounding = (stepwise() - expected).abs().max()
        with prepared(model, rows, "fp32"):
            found = stepwise()
    assert by_rounding < 2e-5 * expected.abs().max()
    assert (found - expected).abs().max() < by_rounding + 5e-6 * expected.abs().max()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_row_is_multiplied_by_a_part_of_the_matrix_in_each_thread(threads):
    linear, x = Linear(20, 12), torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), conditions.threads(threads):
        product = Transposed(linear)
        assert product.parts.shape == (threads, 20, 12 // threads)
        assert torch.allclose(product(x).double(), x.double() @ linear.weight.double().T, atol=1e-6)


def test_one_row_that_is_left_is_read_by_a_model_prepared_for_several():
    model, x = make("gpt", {}, open_gates=True).eval(), ids(5, 9)
    with torch.inference_mode(), prepared(model, 5, "fp32"):
        cache = model.new_cache(5, CONTEXT)
        for t in range(7):
            model(x[:, t : t + 1], cache)
        cache.keep([3])
        found = torch.cat([model(x[3:4, t : t + 1], cache) for t in (7, 8)], 1)
        expected = model(x[3:4])[:, 7:]
    assert torch.allclose(found, expected, atol=1e-6)
