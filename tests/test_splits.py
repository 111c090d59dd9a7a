"""Splits: by content hash, never empty if there are three distinct documents, or cut in three."""

import hashlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shortcut_cli.data import splits
from shortcut_cli.data.documents import Document


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


def test_splits_have_about_the_requested_shares():
    items = documents(range(4000))
    assign = splits.by_document(tally(items, val=0.1, test=0.2))
    counts = [sum(assign(item)[0][0] == name for item in items) for name in ("val", "test")]
    # Four standard deviations of a binomial around 400 and 800.
    assert abs(counts[0] - 400) < 76
    assert abs(counts[1] - 800) < 102


def test_adding_a_document_moves_none_of_the_others():
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


# The first 16 digits of a hash are its place in [0, 1). val: below 1/8; test: from 1/8 to below 3/8.
PLACES = [
    ("0000000000000000", "val"),
    ("1ffffffffffff000", "val"),
    ("2000000000000000", "test"),
    ("5ffffffffffff000", "test"),
    ("6000000000000000", "train"),
    ("ffffffffffffffff", "train"),
]


@pytest.mark.parametrize(("first", "split"), PLACES)
@pytest.mark.parametrize("rest", ["0" * 48, "f" * 48])
def test_val_comes_first_then_test_then_train(first, split, rest):
    assert splits.split_of(first + rest, 0.125, 0.25) == split


def hashes_in(split, count):
    """Hashes of a split for val 0.125 and test 0.25, the smallest first."""
    first = {"val": 0x10, "test": 0x30, "train": 0xA0}[split]
    return [f"{first + number:02x}" + "7" * 62 for number in range(count)]


@pytest.mark.parametrize(
    ("counts", "moved"),
    [
        ({"train": 5}, {("train", 0): "val", ("train", 1): "test"}),
        ({"test": 4}, {("test", 0): "train", ("test", 1): "val"}),
        ({"val": 3}, {("val", 0): "train", ("val", 1): "test"}),
        ({"val": 2, "test": 3}, {("test", 0): "train"}),
        ({"val": 3, "test": 2}, {("val", 0): "train"}),
        ({"train": 2, "test": 1}, {("train", 0): "val"}),
        ({"train": 2, "val": 1}, {("train", 0): "test"}),
        ({"train": 1, "val": 1, "test": 1}, {}),
    ],
)
def test_an_empty_split_takes_the_smallest_hash_of_the_fullest(counts, moved):
    hashes = {split: hashes_in(split, count) for split, count in counts.items()}
    items = [Document(digest, 0, 1) for split in hashes for digest in reversed(hashes[split])]
    total = tally(items, 0.125, 0.25)
    assert total.exceptions() == {hashes[split][place]: to for (split, place), to in moved.items()}
    assign = splits.by_document(total)
    for split, mine in hashes.items():
        for place, digest in enumerate(mine):
            assert assign(Document(digest, 0, 17)) == [(moved.get((split, place), split), 17)]


def test_a_tally_counts_documents_sizes_and_up_to_three_distinct_documents_per_split():
    hashes = [digest for split, count in (("train", 5), ("val", 2), ("test", 0)) for digest in hashes_in(split, count)]
    items = [Document(digest, 0, size) for size, digest in enumerate([*hashes, *hashes[:2]], 1)]
    first, second = tally(items[:4], 0.125, 0.25), tally(items[4:], 0.125, 0.25)
    first.merge(second)
    assert (first.documents, first.size, first.distinct) == (9, 45, 5)
    assert first.smallest == {"train": set(hashes[:3]), "val": set(hashes[5:]), "test": set()}


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.floats(0.01, 0.49), st.floats(0.01, 0.49))
@example([107], 0.05, 0.1)  # 5.35 and 10.7
@example([30, 1, 1, 38], 0.25, 0.5)  # a document that ends where a split does
@example([0, 40, 0, 40, 0], 0.25, 0.25)
def test_a_contiguous_split_gives_every_byte_to_the_split_of_its_place(sizes, val, test):
    items, place = [], 0
    for size in sizes:
        items.append(Document("5" * 64, place, size))
        place += size
    assign = splits.contiguous(tally(items, val, test))
    counts = {"val": round(place * val), "test": round(place * test)}
    row = ["train"] * (place - counts["val"] - counts["test"]) + ["val"] * counts["val"] + ["test"] * counts["test"]
    for item in items:
        mine = row[item.offset : item.offset + item.size]
        expected = [(split, mine.count(split)) for split in ("train", "val", "test") if split in mine]
        assert assign(item) == expected
