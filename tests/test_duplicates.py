"""Equal documents: all but the first are found, and the corpus that is left has no gaps."""

import hashlib
from unittest.mock import patch

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from shortcut_cli.data import duplicates, splits
from shortcut_cli.data.documents import Document


def document(content, offset=0):
    return Document(hashlib.sha256(content.encode()).hexdigest(), offset, len(content))


def corpus(sources):
    """Per source: where it begins, and its documents."""
    found, start = [], 0
    for contents in sources:
        documents = []
        begin = start
        for content in contents:
            documents.append(document(content, start))
            start += len(content)
        found.append((begin, documents))
    return found


def find(sources):
    """What `duplicates.find` finds. sources: in order of preference, where each begins and its documents."""
    counts = np.array([len(mine) for _, mine in sources], np.uint16)
    starts = np.array([start for start, _ in sources], np.int64)
    content, firsts = bytearray(), np.zeros(len(sources), np.uint16)
    for number in sorted(range(len(sources)), key=lambda number: number * 7919 % 11):  # scans end in any order
        firsts[number] = len(content) // duplicates.KEY.itemsize
        content += b"".join(map(duplicates.key, sources[number][1]))
    return duplicates.find(starts, counts, duplicates.in_order(content, firsts, counts))


CONTENTS = st.sampled_from(["a", "b", "cc", "dd", "eee", "ffff"])


@given(st.lists(st.lists(CONTENTS, min_size=1, max_size=8), min_size=1, max_size=8), st.randoms(), st.integers(1, 4))
@example([["a"]], None, duplicates.BLOCK)
@example([["a", "a"], ["b", "a", "b"]], None, duplicates.BLOCK)
def test_all_but_the_first_in_the_order_of_preference_are_dropped(sources, random, block):
    placed = corpus(sources)
    order = list(placed)
    if random:
        random.shuffle(order)
    with patch.object(duplicates, "BLOCK", block), patch.object(duplicates, "SOURCES", block):
        dropped = find(order)
    seen, expected = set(), {}
    for _, mine in order:
        for one in mine:
            if one.sha256 in seen:
                expected[one.offset] = one.size
            seen.add(one.sha256)
    every = [one for _, mine in placed for one in mine]
    assert {one.offset for one in every if dropped.holds(one.offset)} == set(expected)
    assert (dropped.documents, dropped.size) == (len(expected), sum(expected.values()))
    for start, mine in placed:
        size = sum(one.size for one in mine)
        inside = sum(expected.get(one.offset, 0) for one in mine)
        assert dropped.within(start, size) == inside
    for one in every:
        assert dropped.before(one.offset) == sum(size for offset, size in expected.items() if offset < one.offset)


def test_without_duplicates_nothing_is_dropped():
    for dropped in (duplicates.Dropped(), find([]), find([(0, [document("a")])])):
        assert (dropped.documents, dropped.size, dropped.holds(0), dropped.before(9)) == (0, 0, False, 0)


def test_documents_are_equal_if_128_bits_of_their_hashes_are():
    low, high = "0" * 16, "1" * 16
    hashes = [low + high, low + low, high + high, low + high]
    documents = [Document(digest + "5" * 32, 7 * n, 7) for n, digest in enumerate(hashes)]
    dropped = find([(0, documents)])
    assert dropped.offsets.tolist() == [21]


def test_the_order_of_many_documents_is_kept():
    numbers = np.random.default_rng(1).integers(0, 3000, 20_000).tolist()
    documents, first, expected = [], set(), []
    for place, number in enumerate(numbers):
        documents.append(Document(hashlib.sha256(str(number).encode()).hexdigest(), place, 1))
        if number in first:
            expected.append(place)
        first.add(number)
    dropped = find([(0, documents)])
    assert dropped.offsets.tolist() == expected


@given(st.lists(CONTENTS, min_size=1, max_size=12))
def test_a_contiguous_split_cuts_the_corpus_that_is_left(contents):
    ((_, documents),) = corpus([contents])
    dropped = find([(0, documents)])
    kept = "".join(dict.fromkeys(contents))
    total = splits.Tally(0.25, 0.25, size=len(kept))
    assign = splits.without(dropped, splits.contiguous(total))
    found, seen = {"train": "", "val": "", "test": ""}, set()
    for content, one in zip(contents, documents, strict=True):
        parts = assign(one)
        assert (parts == []) == (content in seen)
        seen.add(content)
        place = 0
        for split, size in parts:
            found[split] += content[place : place + size]
            place += size
    share = round(len(kept) * 0.25)
    first, second = len(kept) - 2 * share, len(kept) - share
    assert found == {"train": kept[:first], "val": kept[first:second], "test": kept[second:]}


def test_an_empty_record_has_no_part():
    assign = splits.without(duplicates.Dropped(), lambda one: [("train", one.size)])
    assert assign(Document("0" * 64, 5, 0, line=3)) == []
    assert assign(Document("0" * 64, 5, 1, line=4)) == [("train", 1)]
