"""Splits: by content hash, never empty where three documents differ, or cut in three."""

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from shortcut_cli import splits
from shortcut_cli.tokenizers.base import Document


def documents(numbers, size=10):
    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in numbers]
    return [Document(digest, place * size, size) for place, digest in enumerate(digests)]


def tally(items, val=0.05, test=0.05):
    total = splits.Tally(val, test)
    for item in items:
        total.add(item)
    return total


@given(st.lists(st.integers(), min_size=3, max_size=40, unique=True))
def test_no_split_is_empty(numbers):
    items = documents(numbers)
    assign = splits.by_document(tally(items))
    assert {split for item in items for split, _ in assign(item)} == {"train", "val", "test"}


@given(st.lists(st.integers(), min_size=1, max_size=40), st.integers(0, 39), st.randoms())
def test_tallies_add_up_in_any_order(numbers, cut, random):
    items = documents(numbers)
    whole = tally(items)
    random.shuffle(items)
    merged = tally(items[:cut])
    merged.merge(tally(items[cut:]))
    assert merged == whole


def test_equal_documents_share_a_split():
    items = documents([1, 2, 3, 4, 5] * 3)
    assign = splits.by_document(tally(items))
    for first, *rest in zip(items[:5], items[5:10], items[10:], strict=True):
        assert all(assign(other)[0][0] == assign(first)[0][0] for other in rest)


def test_shares_come_out_as_asked():
    items = documents(range(4000))
    assign = splits.by_document(tally(items, val=0.1, test=0.2))
    counts = [sum(assign(item)[0][0] == name for item in items) for name in ("val", "test")]
    # Four standard deviations of a binomial around 400 and 800.
    assert abs(counts[0] - 400) < 76
    assert abs(counts[1] - 800) < 102


def test_another_document_moves_none_of_the_others():
    before = documents(range(100))
    after = documents(range(101))
    first, second = splits.by_document(tally(before)), splits.by_document(tally(after))
    assert [first(item)[0][0] for item in before] == [second(item)[0][0] for item in before]


def test_a_contiguous_split_cuts_exactly():
    items = [Document("0" * 64, 0, 30_000_000), Document("1" * 64, 30_000_000, 70_000_000)]
    assign = splits.contiguous(tally(items))
    assert assign(items[0]) == [("train", 30_000_000)]
    # text8's own split: 90 million, 5 million, 5 million.
    assert assign(items[1]) == [("train", 60_000_000), ("val", 5_000_000), ("test", 5_000_000)]
