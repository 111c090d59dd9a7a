"""Columns: what they hold is what lists hold, in a fraction of the memory; and the driver's memory for each file."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import quiet, write_pieces
from hypothesis import given
from hypothesis import strategies as st

from shortcut_cli.config import reading
from shortcut_cli.data import columns, hashed, hashes, inputs, objects
from shortcut_cli.data.given import PREFERRED
from shortcut_cli.stages import preparation
from shortcut_cli.tokenizers import encoding

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "scale.py"
NAMES = st.text(st.characters(min_codepoint=1), max_size=12)  # surrogates too, as names of files have them


@given(st.lists(NAMES, max_size=30), st.integers(1, 7), st.randoms())
def test_texts_are_kept_and_put_in_order_as_a_list_of_them(names, run, random):
    texts = columns.Texts(names)
    assert (list(texts), len(texts)) == (names, len(names))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "RUN", run)
        order = texts.order().tolist()
    assert order == sorted(range(len(names)), key=names.__getitem__)  # sorted is stable
    places = [random.randrange(len(names)) for _ in names]
    assert list(texts.taken(places)) == [names[place] for place in places]
    assert texts[1:-1] == names[1:-1]
    if names:
        assert texts[-1] == names[-1]
    with pytest.raises(IndexError):
        texts[len(names)]


@given(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 2**62)), min_size=1))
def test_numbers_take_the_bytes_of_the_largest(values):
    numbers = columns.Numbers(len(values))
    for place in Random(1).sample(range(len(values)), len(values)):
        numbers[place] = values[place]
    assert [numbers[place] for place in range(len(values))] == values
    sizes = {255: 1, 2**16 - 1: 2, 2**32 - 1: 4, 2**63: 8}
    assert numbers.values.itemsize == next(size for most, size in sizes.items() if max(values) <= most)
    assert (numbers.values - np.ones(1, np.int64)).dtype == np.int64  # never a float


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=25))
def test_equal_keys_are_found_even_if_many_begin_alike(pairs):
    keys = b"".join(first.to_bytes(8, "little") + last.to_bytes(8, "little") for first, last in pairs)
    expected = [[place for place, other in enumerate(pairs) if other == pair] for pair in set(pairs)]
    found = columns.repeated(keys, 16)
    assert sorted(found) == sorted(places for places in expected if len(places) > 1)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(0, 5)), max_size=20), st.randoms()
)
def test_of_equal_files_the_first_is_kept_and_all_are_in_order(files_, random):
    """Against lists and dicts. files_: a root, a name below it, and which bytes; the same bytes may be unreadable."""
    files_ = sorted({(name, root): number for root, name, number in files_}.items())
    found = inputs.Files()
    for (name, root), _ in files_:
        found.add(name, root)
    digests = [hashlib.sha256(bytes([number])).hexdigest() for _, number in files_]
    unread = [place for place in range(len(files_)) if random.random() < 0.2]
    given_ = [random.choice(PREFERRED) for _ in files_] if random.random() < 0.5 else None
    packed = bytearray(b"".join(bytes(32) if n in unread else bytes.fromhex(sha) for n, sha in enumerate(digests)))
    made = hashed.Inputs(found, packed, unread, given_)

    by_hash = {}
    for place, ((name, root), _) in enumerate(files_):
        if place not in unread:
            split = given_[place] if given_ else ""
            one = hashed.Input(name, Path(root, name), digests[place], (), split)
            by_hash.setdefault(digests[place], []).append(one)
    expected = []
    for same in by_hash.values():
        if given_:
            same.sort(key=lambda one: PREFERRED.index(one.split))
        expected.append(replace(same[0], duplicates=tuple(one.relative for one in same[1:])))
    expected.sort(key=lambda one: (one.relative, one.sha256))
    assert list(made) == expected
    assert made.equal == sum(len(one.duplicates) for one in expected)
    some = {one.sha256 for one in expected if random.random() < 0.5}
    assert [one for _, one in made.of(some)] == [one for one in expected if one.sha256 in some]
    gone = {number for number, _ in made.of(some)}
    assert list(made.without(gone)) == [one for one in expected if one.sha256 not in some]


def test_objects_and_files_stand_in_one_table():
    store = SimpleNamespace(scheme="s3", url="s3://bucket")
    versions = [(), (("size", 5), ("ETag", '"a"')), (("ETag", "b"), ("created", 1.5)), (("size", 0),)]
    found = inputs.Files((".txt", ".txt.gz"), Path("fetched"))
    found.add("0.txt", "root")
    for number, version in enumerate(versions, 1):
        found.add(f"a/{number}.TXT.gz", "bucket", store, objects.Object(store, "", version).packed())
        found.add(f"{number}.txt", "")
    for table in (found, found.taken(np.arange(9)[::-1]).taken(np.arange(9)[::-1])):
        assert table[0] == ("0.txt", Path("root/0.txt"))
        assert [table.object(place) for place in range(0, 9, 2)] == [None] * 5
        for number, version in enumerate(versions, 1):
            place = 2 * number - 1
            assert table.object(place) == objects.Object(store, f"bucket/a/{number}.TXT.gz", version)
            assert table[place] == (f"a/{number}.TXT.gz", Path(f"fetched/{place:08d}.txt.gz"))
            assert table.object(place + 1) is None
            assert table.named(place) == Path(f"bucket/a/{number}.TXT.gz")
            assert table[place + 1] == (f"{number}.txt", Path(f"{number}.txt"))


def test_hashes_of_others_are_found_by_the_whole_key(tmp_path):
    kept = hashes.Hashes(tmp_path, keep=True)
    keys = [bytes([n % 5]) * 8 + bytes([n]) * 8 for n in range(40)]  # the first halves of many are equal
    expected = {key: hashlib.sha256(key).hexdigest() for key in keys}
    for key, sha256 in expected.items():
        kept.note(key, sha256)
    kept.save("1-of-1")
    text = (tmp_path / "1-of-1.txt").read_text()
    (tmp_path / "2-of-2.txt").write_text("damaged\n" + "z" * 32 + " " + "0" * 64 + "\n" + text[:50])
    found = hashes.Hashes(tmp_path)
    assert {key: found._find(key) for key in keys} == expected
    assert found._find(b"0" * 16) is None
    assert found._find(keys[0][:8] + b"0" * 8) is None


def test_parts_have_just_over_the_size_that_is_asked_for():
    for seed in range(20):
        sizes = np.random.default_rng(seed).integers(0, 9, seed * 3)
        expected, part, sum_ = [], [], 0
        for at, size in enumerate(sizes.tolist()):
            part.append(at)
            sum_ += size
            if sum_ >= 12:
                expected.append(part)
                part, sum_ = [], 0
        expected += [part] if part else []
        assert [list(range(*ends)) for ends in encoding.parts(sizes, 12)] == expected


def test_forms_follow_their_sources_in_the_order_of_their_names(tmp_path):
    write_pieces(tmp_path / "in")
    recipe = reading.read("music-tiny", [f"data.shards={tmp_path / 's'}", "tokenizer.transpose=[2, -40, -1]"])
    preparation.prepare(recipe, [str(tmp_path / "in")], tmp_path / "s", n_workers=1, max_bad="0", report=quiet)
    lines = [json.loads(line) for line in (tmp_path / "s" / "documents.jsonl").read_text().splitlines()]
    found = [(line["source"], line.get("variant", "")) for line in lines]
    assert found == sorted(found)
    assert {variant for _, variant in found} == {"", "transpose=-1", "transpose=-40", "transpose=+2"}


def peak(count, *flags):
    done = subprocess.run(
        [sys.executable, BENCHMARK, "one", str(count), *flags],
        check=True,
        capture_output=True,
        env=os.environ | {"PART": "500"},
    )
    return json.loads(done.stdout)["peak"]


@pytest.mark.parametrize("flags", [(), ("--objects",)])
def test_the_driver_takes_less_than_200_bytes_for_a_file(flags):
    few, many = 10_000, 60_000
    assert (peak(many, *flags) - peak(few, *flags)) / (many - few) < 200
