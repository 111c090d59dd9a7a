"""The floors: Kneser-Ney and the turn of a codebook, against plain loops, sums over the vocabulary, and by hand."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortcut_cli.inference import floors

EOS = 0


def plain_discounts(counts):
    """Chen and Goodman 1999, equation 17; 0.5, 1, 1.5 if these are not numbers between 0 and the count."""
    n = Counter(counts)
    try:
        y = n[1] / (n[1] + 2 * n[2])
        found = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
    except ZeroDivisionError:
        return [0.5, 1.0, 1.5]
    sound = n[4] > 0 and all(0 < d <= k for k, d in enumerate(found, 1))
    return found if sound else [0.5, 1.0, 1.5]


class Plain:
    """Interpolated modified Kneser-Ney with dictionaries of tuples, as its formula says."""

    def __init__(self, train, vocabulary, order):
        self.order, self.vocabulary = order, vocabulary
        ids = [EOS] * order + list(train)
        grams = {n: [tuple(ids[t - n + 1 : t + 1]) for t in range(order, len(ids))] for n in range(1, order + 1)}
        self.counts = {order: Counter(grams[order])}
        for n in range(1, order):
            preceding = defaultdict(set)
            for gram in grams[n + 1]:
                preceding[gram[1:]].add(gram[0])
            self.counts[n] = Counter({gram: len(ids) for gram, ids in preceding.items()})
        self.discounts = {n: plain_discounts(self.counts[n].values()) for n in self.counts}

    def p(self, context, w):
        return self._p(self.order, tuple(context), w)

    def _p(self, n, context, w):
        if n == 0:
            return 1 / self.vocabulary
        h = context[len(context) - n + 1 :]
        rows = [(gram[-1], c) for gram, c in self.counts[n].items() if gram[:-1] == h]
        lower = self._p(n - 1, context, w)
        if not rows:
            return lower
        total, discounts = sum(c for _, c in rows), self.discounts[n]
        gamma = sum(discounts[min(c, 3) - 1] for _, c in rows) / total
        own = sum(c - discounts[min(c, 3) - 1] for other, c in rows if other == w) / total
        return own + gamma * lower


def sample(generator, vocabulary, tokens):
    """Ids with a memory: often the id before plus one, so that all orders have n-grams of every count."""
    ids = [EOS]
    for _ in range(tokens):
        step = (ids[-1] + 1) % vocabulary if generator.random() < 0.6 else int(generator.zipf(1.5)) % vocabulary
        ids.append(step)
    return np.array(ids[1:], np.int64)


def probability(train, context, vocabulary, order):
    """p(w | context) for each w of the vocabulary."""
    streams = [np.array([*context, w]) for w in range(vocabulary)]
    return np.array([math.exp(-floors.ngram(train, ids, vocabulary, EOS, order).nats[-1]) for ids in streams])


@pytest.mark.parametrize(("order", "vocabulary", "tokens"), [(1, 9, 50), (2, 5, 40), (3, 11, 300), (5, 7, 900)])
def test_every_probability_is_that_of_a_plain_loop(order, vocabulary, tokens):
    generator = np.random.default_rng(order)
    train, scored = sample(generator, vocabulary, tokens), sample(generator, vocabulary, 60)
    plain = Plain(train.tolist(), vocabulary, order)
    ids = [EOS] * order + scored.tolist()
    wanted = [-math.log(plain.p(ids[t - order + 1 : t], ids[t])) for t in range(order, len(ids))]
    found = floors.ngram(train, scored, vocabulary, EOS, order)
    assert found.nats == pytest.approx(wanted, rel=1e-12)
    assert found.discounts == [pytest.approx(plain.discounts[n]) for n in range(1, order + 1)]


def test_discounts_are_estimated_where_the_counts_allow_it():
    train = sample(np.random.default_rng(5), 7, 900)
    found = floors.ngram(train, train[:5], 7, EOS, 5).discounts
    assert found[0] == floors.WITHOUT_ESTIMATE  # of seven unigrams, none is rare
    assert found[4] != floors.WITHOUT_ESTIMATE
    # n1 = 8, n2 = 2, n3 = 1, n4 = 1: Y = 2/3, so 1 - 4/3 * 2/8, 2 - 2 * 1/2, 3 - 8/3 * 1/1.
    counts = np.array([1] * 8 + [2] * 2 + [3, 4, 9, 0])
    assert floors._discounts(counts) == pytest.approx((2 / 3, 1, 1 / 3))
    # n3 = 2, n4 = 4 would make the third 3 - 4 * Y * 2 negative.
    assert floors._discounts(np.array([1] * 8 + [2] * 2 + [3] * 2 + [4] * 4)) == floors.WITHOUT_ESTIMATE
    # n3 = 2, n4 = 1: the second is 2 - 3 * 2/3 * 2/2 = 0, which would leave unseen ids nothing of such a history.
    assert floors._discounts(np.array([1] * 8 + [2] * 2 + [3] * 2 + [4])) == floors.WITHOUT_ESTIMATE
    # n1 = 8, n2 = 4, n3 = 2, n4 = 2, n5 = 2, which is no part of it: Y = 1/2, so 1/2, 2 - 3/4, 3 - 2.
    assert floors._discounts(np.array([1] * 8 + [2] * 4 + [3] * 2 + [4] * 2 + [5] * 2)) == pytest.approx(
        (1 / 2, 5 / 4, 1)
    )


@given(st.integers(2, 6), st.integers(1, 5), st.integers(0, 80), st.data())
def test_probabilities_sum_to_one_in_any_context(vocabulary, order, tokens, data):
    train = sample(np.random.default_rng(tokens), vocabulary, tokens)
    # Contexts of the training ids and others: in a small corpus most are unseen.
    context = data.draw(st.lists(st.integers(0, vocabulary - 1), min_size=0, max_size=order + 1))
    p = probability(train, context, vocabulary, order)
    assert p.sum() == pytest.approx(1, rel=1e-12)
    assert (p > 0).all()


def test_a_bigram_by_hand():
    # After EOS: 1 2 1. The bigrams 01, 12, 21 occur once; 1 follows two different ids, 2 one, 0 and 3 none. Discounts
    # 0.5 and 1: p(1) = (2 - 1) / 3 + (1 + 0.5) / 3 / 4 = 11/24, p(2) = 0.5 / 3 + 1/8 = 7/24, p(0) = p(3) = 1/8.
    found = floors.ngram(np.array([1, 2, 1]), np.array([1, 2, 3, 1, 1]), 4, EOS, 2)
    wanted = [
        0.5 + 0.5 * 11 / 24,  # 1 after EOS
        0.5 + 0.5 * 7 / 24,  # 2 after 1
        0.5 * 1 / 8,  # 3 after 2
        11 / 24,  # 1 after 3, which was never followed by anything
        0.5 * 11 / 24,  # 1 after 1
    ]
    assert np.exp(-found.nats) == pytest.approx(wanted, rel=1e-14)


def test_a_unigram_counts_and_leaves_a_share_to_what_never_occurred():
    # Counts 3, 1, 0, 0: discounts 1.5 and 0.5, a half of all in sum, for four ids.
    found = floors.ngram(np.array([1, 1, 1, 0]), np.array([0, 1, 2, 3]), 4, EOS, 1)
    assert np.exp(-found.nats) == pytest.approx([0.5 / 4 + 1 / 8, 1.5 / 4 + 1 / 8, 1 / 8, 1 / 8])
    # Ids that can't occur need no share: p is that of two outcomes.
    two = floors.ngram(np.array([1, 1, 1, 0]), np.array([0, 1]), 4, EOS, 1, outcomes=2)
    assert np.exp(-two.nats) == pytest.approx([0.5 / 4 + 1 / 4, 1.5 / 4 + 1 / 4])


def test_nothing_to_learn_from_leaves_the_uniform_distribution():
    found = floors.ngram(np.zeros(0, np.int64), np.array([3, 0]), 4, EOS)
    assert found.nats == pytest.approx([math.log(4)] * 2)


def test_large_vocabularies_do_not_overflow():
    top = 2**31 - 1
    ids = np.array([top - 1, top - 2, top - 1, top - 2, 5])
    found = floors.ngram(ids, ids, top, EOS)
    small = {top - 1: 1, top - 2: 2, 5: 3}
    same = np.array([small[i] for i in ids.tolist()])
    wanted = floors.ngram(same, same, top, EOS)
    assert found.nats == pytest.approx(wanted.nats)


def test_turns_follow_the_frames_of_each_document():
    # Two codebooks: frames of 2, then EOS, whose turn is the first of a frame.
    assert floors.turns(np.array([5, 1, 3]), 2, 2).tolist() == [0, 1, 0, 1, 0, 0, 0, 1, 0]
    # Segments of a level and two frames of two codebooks.
    assert floors.turns(np.array([8]), 5, 2).tolist() == [2, 0, 1, 0, 1, 2, 0, 1]
    # The same with three codebooks, frames and segments, in documents that end within one.
    assert floors.turns(np.array([4, 5]), 3, 3).tolist() == [0, 1, 2, 0, 0, 1, 2, 0, 1]
    assert floors.turns(np.array([9, 3]), 7, 3).tolist() == [3, 0, 1, 2, 0, 1, 2, 3, 0, 3, 0, 1]


def test_by_turn_is_a_unigram_of_each_turn():
    generator = np.random.default_rng(3)
    train_turns, scored_turns = np.arange(400) % 3, np.arange(90) % 3
    train, scored = (turns * 10 + generator.integers(0, 10, len(turns)) for turns in (train_turns, scored_turns))
    found = floors.by_turn(train, train_turns, scored, scored_turns, 31, 30, 10)
    for turn in range(3):
        counts = Counter(train[train_turns == turn].tolist())
        discounts = plain_discounts(counts.values())
        left = sum(discounts[min(c, 3) - 1] for c in counts.values()) / counts.total()
        for w, nats in zip(scored[scored_turns == turn], found[scored_turns == turn], strict=True):
            c = counts[int(w)]
            own = (c - discounts[min(c, 3) - 1]) / counts.total() if c else 0
            assert nats == pytest.approx(-math.log(own + left / 10))
    # Knowing the turn is worth ln 3 here, but for what the unigram lacks in data.
    whole = floors.ngram(train, scored, 31, 30, 1).nats.mean()
    assert whole - found.mean() == pytest.approx(math.log(3), abs=0.05)
