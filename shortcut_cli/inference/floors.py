"""Floors: what simple predictors reach on the tokens that a model is scored on, having seen what it was trained on.

A model that is not clearly below its floors has not learned what makes it worth comparing with another.

All distributions are Kneser-Ney's (Chen and Goodman 1999, section 3): interpolated, with three discounts per order
("modified"). With c the count of an n-gram, h its first n - 1 ids and h' those but the first,

    p(w | h) = (c(hw) - D(c(hw))) / c(h.) + g(h) p(w | h'),   g(h) = sum over w of D(c(hw)) / c(h.)

D is 0 for n-grams that do not occur, and p(w | h) = p(w | h') if h does not. At the highest order c is the number of
occurrences, below it the number of different ids that precede the n-gram; the unigram is interpolated with the uniform
distribution. Occurrences overlap the ends of documents, as the windows of a model do, and before the first id of a
stream are EOS ids.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shortcut_cli.data.shards import Shards
from shortcut_cli.events import Note, Report
from shortcut_cli.inference.metrics import Floats, bits_per_unit

Ids = npt.NDArray[np.int64]
ORDER = 5
MOST_TOKENS = 2**25  # to learn from: 3 GB of memory
WITHOUT_ESTIMATE = (0.5, 1.0, 1.5)  # discounts, as KenLM's --discount_fallback


def measure(trained: Shards, scored: Shards, name: str, report: Report) -> dict[str, Any]:
    """What simple predictors that learn from the training split of `trained` reach on a split of `scored`.

    They score every token of the split, each after those before it. "scores": nats per token and bits per unit of
    "unigram"; of "codebook", a unigram for each codebook, if a frame has several; and of "5-gram". "discounts": of the
    5-gram, for each order. "trained_tokens": how many they know, MOST_TOKENS at most.
    """
    train, split, tokenizer = trained.split("train"), scored.split(name), scored.tokenizer
    used = min(train.tokens, MOST_TOKENS)
    if used < train.tokens:
        report(Note(text=f"the floors learn from the first {used:,} of {train.tokens:,} training tokens"))
    past, ids = train.read(0, used), split.read(0, split.tokens)
    vocabulary, eos = tokenizer["vocabulary"], tokenizer["end"]
    nats = {"unigram": ngram(past, ids, vocabulary, eos, 1).nats}
    codebooks = scored.manifest["request"].get("tokenizer", {}).get("codebooks", 1)
    if codebooks > 1:
        whose = [turns(one.document_tokens(), tokenizer["stride"], codebooks) for one in (train, split)]
        outcomes = (vocabulary - 1) // codebooks + 1  # the codes of one codebook, and EOS
        nats["codebook"] = by_turn(past, whose[0][:used], ids, whose[1], vocabulary, eos, outcomes)
    longest = ngram(past, ids, vocabulary, eos)
    nats[f"{ORDER}-gram"] = longest.nats
    amount = split.units.get(tokenizer["unit"], 0)
    return {
        "trained_tokens": used,
        "discounts": [list(found) for found in longest.discounts],
        "scores": {
            predictor: {
                "nats_per_token": float(found.mean()),
                "bits_per_unit": bits_per_unit(float(found.sum()), amount) if amount else None,
            }
            for predictor, found in nats.items()
        },
    }


@dataclass(frozen=True)
class NGram:
    """What an n-gram model says about scored ids."""

    nats: Floats  # (M,) of each scored id
    discounts: list[tuple[float, float, float]]  # of each order from 1: of counts 1, 2, and 3 or more


def ngram(train: Ids, scored: Ids, vocabulary: int, eos: int, order: int = ORDER, outcomes: int = 0) -> NGram:
    """Score ids (M,) with a Kneser-Ney model of `order` over training ids (N,).

    outcomes: among how many ids the unigram's uniform distribution is divided; default: the vocabulary. Takes memory
    for about eight numbers of 8 bytes per training id.
    """
    seen, asked = _Stream(train, vocabulary, eos), _Stream(scored, vocabulary, eos)
    p: Floats = np.full(len(scored), 1 / (outcomes or vocabulary))
    discounts = []
    types, last = seen.lengthen()
    for length in range(1, order + 1):
        prefixes = asked.kinds[asked.before[1:]]  # (M,) of each scored n-gram, -1 if that does not occur
        asked.find(types)
        if length < order:
            suffixes = seen.kinds
            longer, longer_last = seen.lengthen()
            counts = np.bincount(suffixes[longer_last[longer_last > 0]], minlength=len(types))
        else:
            longer, longer_last = types, last
            counts = np.bincount(seen.kinds[1:], minlength=len(types))
        cut = np.array([0.0, *_discounts(counts)])
        discounts.append((float(cut[1]), float(cut[2]), float(cut[3])))
        p = _interpolated(p, types // vocabulary, counts, cut, prefixes, asked.kinds[1:])
        types, last = longer, longer_last
    return NGram(-np.log(p), discounts)


class _Stream:
    """Ids after an endless row of EOS, and the n-grams that end at each of them, numbered by kind.

    Entry 0 of the arrays stands for the EOS ids, so they have N + 1 entries; what ends there is no occurrence.
    """

    def __init__(self, ids: Ids, vocabulary: int, eos: int) -> None:
        self.ids = np.concatenate(([eos], ids))
        self.vocabulary = vocabulary
        self.before = np.maximum(np.arange(-1, len(ids)), 0)  # the entry before each
        self.kinds = np.zeros(len(self.ids), np.int64)  # of the n-gram ending at each entry, -1: unknown; n is 0 first

    def _keys(self) -> Ids:
        """One number for each n-gram of one id more: that of its prefix, and its last id."""
        keys: Ids = self.kinds[self.before] * self.vocabulary + self.ids
        return keys

    def lengthen(self) -> tuple[Ids, Ids]:
        """Number the n-grams of one id more; returns the sorted keys of their kinds, and where each occurs last."""
        keys = self._keys()
        places = np.argsort(keys)
        keys = keys[places]
        first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        self.kinds = np.empty_like(places)
        self.kinds[places] = np.repeat(np.arange(len(first)), np.diff(np.append(first, len(keys))))
        return keys[first], np.maximum.reduceat(places, first)

    def find(self, types: Ids) -> None:
        """The same, with the numbers that another stream's `lengthen` gave them."""
        keys = self._keys()
        places = np.minimum(np.searchsorted(types, keys), len(types) - 1)
        self.kinds = np.where((self.kinds[self.before] >= 0) & (types[places] == keys), places, -1)


def _interpolated(lower: Floats, history: Ids, counts: Ids, cut: Floats, prefixes: Ids, kinds: Ids) -> Floats:
    """p(w | h) of scored ids (M,) from p(w | h').

    history, counts: of each kind of n-gram; cut: D by count, up to 3; prefixes, kinds: of the scored n-grams.
    """
    removed = cut[np.minimum(counts, 3)]
    total, left = (np.bincount(history, amount) for amount in (counts, removed))
    known = (prefixes >= 0) & (prefixes < len(total))
    known[known] = total[prefixes[known]] > 0
    kept = np.where(kinds[known] >= 0, (counts - removed)[kinds[known]], 0.0)
    out = lower.copy()
    out[known] = (kept + left[prefixes[known]] * lower[known]) / total[prefixes[known]]
    return out


def _discounts(counts: Ids) -> tuple[float, float, float]:
    """The discounts of an order from its counts (Chen and Goodman 1999, equation 17).

    WITHOUT_ESTIMATE if there are no n-grams with one of the counts 1 to 4, or too few for discounts above 0: so with
    the unigrams of a small vocabulary.
    """
    one, two, three, four = (int(number) for number in np.bincount(np.minimum(counts, 5), minlength=6)[1:5])
    if not (one and two and three and four):
        return WITHOUT_ESTIMATE
    ratio = one / (one + 2 * two)
    found = 1 - 2 * ratio * two / one, 2 - 3 * ratio * three / two, 3 - 4 * ratio * four / three
    return found if min(found) > 0 else WITHOUT_ESTIMATE


def by_turn(
    train: Ids, train_turns: Ids, scored: Ids, scored_turns: Ids, vocabulary: int, eos: int, outcomes: int
) -> Floats:
    """Nats of each scored id (M,), by a unigram for each turn. outcomes: ids that a turn can have."""
    nats = np.empty(len(scored))
    for turn in np.unique(scored_turns):
        asked = scored_turns == turn
        nats[asked] = ngram(train[train_turns == turn], scored[asked], vocabulary, eos, 1, outcomes).nats
    return nats


def turns(document_tokens: Ids, stride: int, codebooks: int) -> Ids:
    """Whose turn it is at each id of a split: 0 .. codebooks - 1.

    document_tokens: of each document, (documents,). stride: ids that belong together: a frame of codebooks, or, if it
    is not a multiple of that, a segment that begins with its level, whose turn is `codebooks`.
    """
    ends = np.cumsum(document_tokens)
    place = (np.arange(ends[-1]) - np.repeat(ends - document_tokens, document_tokens)) % stride
    level = stride % codebooks
    found: Ids = np.where(place < level, codebooks, (place - level) % codebooks)
    return found
