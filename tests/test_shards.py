"""Shards: written by us, read back by an independent reader of the Megatron format; damage is refused."""

import hashlib
import itertools
import json
import os
import stat
import struct
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shortcut_cli import files
from shortcut_cli.data import shards
from shortcut_cli.errors import CheckFailed, UsageError

IDENTITY = {"name": "text", "fingerprint": "f", "vocabulary": 300, "end": 299, "stride": 1, "unit": "byte"}


def make(folder, documents, *, vocabulary=300, shard_tokens=1 << 20):
    """Write `documents`, a list of (split, ids), into a complete shards folder."""
    with shards.FolderWriter(folder, vocabulary, shard_tokens, eos=vocabulary - 1) as writer:
        for number, (split, ids) in enumerate(documents):
            record = {"source": f"{number}.txt", "sha256": f"{number:064x}"}
            writer.add(split, [np.array(ids)], {"byte": len(ids)}, record)
        (writer.partial / "tokenizer" / "tokenizer.json").write_text("{}")
        return writer.finish([], {"request": {}, "tokenizer": IDENTITY | {"vocabulary": vocabulary}})


def plain_read(stem):
    """All documents of STEM.bin/.idx, from the description of the format: no code shared with the program."""
    idx, data = Path(f"{stem}.idx").read_bytes(), Path(f"{stem}.bin").read_bytes()
    assert idx[:9] == b"MMIDIDX\x00\x00"
    assert struct.unpack_from("<Q", idx, 9) == (1,)
    code = idx[17]
    sequences, documents = struct.unpack_from("<QQ", idx, 18)
    lengths = struct.unpack_from(f"<{sequences}i", idx, 34)
    pointers = struct.unpack_from(f"<{sequences}q", idx, 34 + 4 * sequences)
    bounds = struct.unpack_from(f"<{documents}q", idx, 34 + 12 * sequences)
    assert len(idx) == 34 + 12 * sequences + 8 * documents
    letter = {8: "H", 4: "i"}[code]
    read = [list(struct.unpack_from(f"<{n}{letter}", data, p)) for n, p in zip(lengths, pointers, strict=True)]
    return [[token for sequence in read[a:b] for token in sequence] for a, b in itertools.pairwise(bounds)]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 298), max_size=20), min_size=1, max_size=12), st.integers(1, 40))
def test_documents_come_back_through_a_plain_reader(tmp_path_factory, documents, shard_tokens):
    folder = tmp_path_factory.mktemp("shards")
    make(folder, [("train", ids) for ids in documents], shard_tokens=shard_tokens)
    stems = sorted(str(path)[:-4] for path in folder.glob("train-*.bin"))
    assert [doc for stem in stems for doc in plain_read(stem)] == [[*ids, 299] for ids in documents]
    split = shards.Shards(folder).split("train")
    assert split.read(0, split.tokens).tolist() == [i for ids in documents for i in [*ids, 299]]
    assert split.document_tokens().tolist() == [len(ids) + 1 for ids in documents]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=12),
    st.integers(1, 20),
    st.sampled_from([300, 70_000]),
)
def test_a_shard_has_at_most_shard_tokens_unless_a_document_has_more(
    tmp_path_factory, documents, shard_tokens, vocabulary
):
    """documents: the sizes of the blocks that each comes in."""
    folder = tmp_path_factory.mktemp("shards")
    ids = [[np.arange(size) + number for size in sizes] for number, sizes in enumerate(documents)]
    with shards.FolderWriter(folder, vocabulary, shard_tokens, eos=vocabulary - 1) as writer:
        for blocks in ids:
            writer.add("train", blocks, {"byte": 1}, {"source": "a", "sha256": "b"})
        (writer.partial / "tokenizer" / "tokenizer.json").write_text("{}")
        writer.finish([], {"request": {}, "tokenizer": IDENTITY | {"vocabulary": vocabulary}})
    expected = [[]]
    for blocks in ids:
        document = [int(token) for block in blocks for token in block] + [vocabulary - 1]
        if expected[-1] and sum(map(len, expected[-1])) + len(document) > shard_tokens:
            expected.append([])
        expected[-1].append(document)
    stems = sorted(str(path)[:-4] for path in folder.glob("train-*.bin"))
    assert [plain_read(stem) for stem in stems] == expected
    assert list(shards.verify(folder)) == []
    lines = [json.loads(line) for line in (folder / "documents.jsonl").read_text().splitlines()]
    places = [
        (shard, sum(map(len, shards_[:place])), len(document))
        for shard, shards_ in enumerate(expected)
        for place, document in enumerate(shards_)
    ]
    assert [(line["shard"], line["offset"], line["tokens"]) for line in lines] == places


@pytest.mark.parametrize(("vocabulary", "code"), [(65499, 8), (65500, 4), (200_000, 4)])
def test_the_dtype_follows_the_vocabulary(tmp_path, vocabulary, code):
    top = vocabulary - 2
    make(tmp_path, [("train", [0, top]), ("train", []), ("train", [top, 5, 6])], vocabulary=vocabulary)
    assert (tmp_path / "train-00000.idx").read_bytes()[17] == code
    assert plain_read(tmp_path / "train-00000") == [[0, top, top + 1], [top + 1], [top, 5, 6, top + 1]]


def test_megatron_reads_the_same_tokens(tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    documents = [[1, 2, 3], [], [4] * 1000]
    make(tmp_path, [("train", ids) for ids in documents])
    dataset = indexed.IndexedDataset(str(tmp_path / "train-00000"))
    assert [dataset[number].tolist() for number in range(len(dataset))] == [[*ids, 299] for ids in documents]


def test_a_long_document_is_several_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SEQUENCE_TOKENS", 10)
    documents = [list(range(25)), [7], list(range(9)), list(range(19)), list(range(10))]
    make(tmp_path, [("train", ids) for ids in documents])
    assert plain_read(tmp_path / "train-00000") == [[*ids, 299] for ids in documents]
    assert shards.read_shard(tmp_path / "train-00000").lengths.tolist() == [10, 10, 6, 2, 10, 10, 10, 10, 1]
    assert shards.Shards(tmp_path).split("train").document_tokens().tolist() == [26, 2, 10, 20, 11]


def test_documents_are_found_where_the_list_says(tmp_path):
    make(tmp_path, [("train", [1, 2]), ("val", [3]), ("train", [4, 5, 6])], shard_tokens=3)
    lines = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text().splitlines()]
    for line, ids in zip(lines, [[1, 2, 299], [3, 299], [4, 5, 6, 299]], strict=True):
        stem = f"{line['split']}-{line['shard']:05d}"
        content = np.fromfile(tmp_path / f"{stem}.bin", "<u2")
        assert content[line["offset"] : line["offset"] + line["tokens"]].tolist() == ids
    assert [(line["split"], line["shard"]) for line in lines] == [("train", 0), ("val", 0), ("train", 1)]


def test_a_folder_without_manifest_is_not_read(tmp_path):
    make(tmp_path, [("train", [1])])
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"no manifest\.json"):
        shards.Shards(tmp_path)


def killed_at(monkeypatch, step):
    """Leave everything as it is at the `step`-th rename, as SIGKILL does."""
    left, replace = [None] * step, os.replace

    def counted(*paths):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        replace(*paths)

    monkeypatch.setattr(os, "replace", counted)
    monkeypatch.setattr(shards, "discard", lambda _: None)


@pytest.mark.parametrize("step", range(25))
@pytest.mark.parametrize("unfinished", [False, True])
def test_what_a_killed_process_had_moved_is_known_as_ours(tmp_path, monkeypatch, step, unfinished):
    documents = [("train", [1, 2]), ("val", [3]), ("train", [4, 5, 6])]
    make(tmp_path / "whole", documents, shard_tokens=3)
    (tmp_path / "s").mkdir()
    if unfinished:  # with files that will not be there afterwards
        make(tmp_path / "s", [*documents, ("train", [7, 8]), ("train", [9, 9])], shard_tokens=3)
    (tmp_path / "s" / "notes.txt").write_text("mine")
    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        killed_at(patched, step)
        make(tmp_path / "s", documents, shard_tokens=3)
    shards.check_free(tmp_path / "s")
    make(tmp_path / "s", documents, shard_tokens=3)
    assert list(shards.verify(tmp_path / "s")) == ["notes.txt does not belong to the folder"]
    for path in (tmp_path / "whole").rglob("*"):
        assert (
            path.is_dir() or path.read_bytes() == (tmp_path / "s" / path.relative_to(tmp_path / "whole")).read_bytes()
        )


def test_files_of_the_user_with_the_names_of_ours_are_named_and_left_alone(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        killed_at(patched, 14)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, [("train", [1])])
    assert (tmp_path / "train-00000.bin").exists()
    (tmp_path / "tokenizer").mkdir(exist_ok=True)
    names = ["documents.jsonl", "rejects.jsonl", "tokenizer/mine.model", "train-00000.bin", "train-00007.bin"]
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / "val-00003.idx").symlink_to(tmp_path / "train-00007.bin")
    with pytest.raises(UsageError, match=r"may not have written: .*, train-00007\.bin and 1 more") as raised:
        make(tmp_path, [("train", [1])])
    assert all(name in raised.value.message for name in names)
    assert [(tmp_path / name).read_text() for name in names] == ["mine"] * 5
    assert (tmp_path / "val-00003.idx").is_symlink()


def test_every_flipped_byte_is_found(tmp_path):
    make(tmp_path, [("train", [1, 2, 3]), ("val", [4]), ("test", [5])])
    assert list(shards.verify(tmp_path)) == []
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size):
        whole = path.read_bytes()
        path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        try:
            problems = list(shards.verify(tmp_path))
        except CheckFailed as error:  # the manifest itself
            problems = [str(error)]
        assert path.name in " ".join(problems)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["train-00000.bin", "train-00000.idx", "documents.jsonl", "tokenizer/tokenizer.json"])
def test_missing_and_added_files_are_found(tmp_path, name):
    make(tmp_path, [("train", [1, 2, 3])])
    (tmp_path / name).rename(tmp_path / "other")
    assert sorted(shards.verify(tmp_path)) == sorted([f"{name} is missing", "other does not belong to the folder"])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_mutated_index_is_refused_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("shards")
    make(folder, [("train", [1, 2, 3]), ("train", [4, 5])])
    path = folder / "train-00000.idx"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        shard = shards.read_shard(folder / "train-00000")
    except CheckFailed:
        return
    assert shard.lengths.sum() == len(shard.ids) == 7


def test_a_split_of_another_size_than_the_manifest_is_refused(tmp_path):
    make(tmp_path, [("train", [1, 2, 3])])
    with open(tmp_path / "train-00000.bin", "ab") as stream:
        stream.write(b"\0\0")
    with pytest.raises(CheckFailed, match="bytes, the manifest says"):
        shards.Shards(tmp_path).split("train")


def test_a_manifest_from_the_future_is_refused(tmp_path):
    make(tmp_path, [("train", [1, 2, 3])])
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckFailed, match="format 2"):
        shards.Shards(tmp_path)


def test_everything_that_was_added_is_counted_and_listed_in_order(tmp_path):
    added = [
        ("train", [[1, 2], [], [3]], {"note": 2, "beat": 1.5}),
        ("val", [[4]], {"note": 1}),
        ("train", [], {"note": 4, "beat": 0.25}),
        ("train", [[5, 6, 7, 8]], {"beat": 2.0}),
        ("val", [[9, 9]], {"note": 10}),
        ("train", [[1]], {}),
    ]
    (tmp_path / ".partial" / "tokenizer").mkdir(parents=True)  # left by a preparation that was killed
    (tmp_path / ".partial" / "stale.bin").write_text("stale")
    places, documents, last = {"train": (0, 0), "val": (0, 0)}, [], []
    with shards.FolderWriter(tmp_path, 300, 5, eos=299) as writer:
        for number, (split, blocks, units) in enumerate(added):
            ids = [*(i for block in blocks for i in block), 299]
            last.append(writer.add(split, [np.array(block) for block in blocks], units, {"source": f"{number}"}))
            # A shard is full at five tokens.
            shard, offset = places[split]
            shard, offset = (shard + 1, 0) if offset >= 5 else (shard, offset)
            places[split] = shard, offset + len(ids)
            place = {"split": split, "shard": shard, "offset": offset, "tokens": len(ids), "units": units}
            documents.append(({"source": f"{number}"} | place, ids))
        (writer.partial / "tokenizer" / "tokenizer.json").write_text("{}")
        rejects = [{"source": "b", "reason": "one"}, {"source": "a", "reason": "two"}]
        manifest = writer.finish(iter(rejects), {"tokenizer": IDENTITY, "request": {"a": 1}, "rejected": 2})
    lines = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text().splitlines()]
    assert lines == [line for line, _ in documents]
    assert last == [len(ids) for _, ids in documents]
    for line, ids in documents:
        content = np.fromfile(tmp_path / f"{line['split']}-{line['shard']:05d}.bin", "<u2")
        assert content[line["offset"] :][: line["tokens"]].tolist() == ids
    assert [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()] == rejects
    assert manifest["splits"] == {
        "train": {"documents": 4, "tokens": 4 + 1 + 5 + 2, "units": {"note": 6, "beat": 3.75}},
        "val": {"documents": 2, "tokens": 2 + 3, "units": {"note": 11}},
        "test": {"documents": 0, "tokens": 0, "units": {}},
    }
    assert (manifest["request"], manifest["rejected"], manifest["tokenizer"]) == ({"a": 1}, 2, IDENTITY)
    stems = ["train-00000", "train-00001", "train-00002", "val-00000", "test-00000"]
    listed = {f"{stem}.{ending}" for stem in stems for ending in ("bin", "idx")}
    assert manifest["files"].keys() == listed | {"documents.jsonl", "rejects.jsonl", "tokenizer/tokenizer.json"}
    for name, entry in manifest["files"].items():
        content = (tmp_path / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest == shards.read_manifest(tmp_path)
    assert list(shards.verify(tmp_path)) == []


def test_everything_is_synced_under_its_name_before_the_manifest_appears(tmp_path, monkeypatch):
    durable, forgotten = {}, []  # synced state by inode: the size of a file, or the names in a folder
    fsync, replace = os.fsync, os.replace

    def state(path):
        found = os.stat(path)
        return found.st_ino, sorted(os.listdir(path)) if stat.S_ISDIR(found.st_mode) else found.st_size

    def synced(handle):
        inode, now = state(handle)
        durable[inode] = now
        fsync(handle)

    def replaced(old, new):
        if Path(new) == tmp_path / "manifest.json":  # from .partial, which holds nothing else any more
            for path in [tmp_path, *tmp_path.rglob("*")]:
                inode, now = state(path)
                if path != tmp_path / ".partial" and durable.get(inode) != now:
                    forgotten.append(path.relative_to(tmp_path).as_posix())
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    with shards.FolderWriter(tmp_path, 300, 3, eos=299) as writer:
        for split, ids in (("train", [1, 2]), ("train", [3, 4, 5]), ("train", [6]), ("val", [7]), ("test", [])):
            writer.add(split, [np.array(ids)], {"byte": len(ids)}, {"source": "a.txt"})
        files.write(writer.partial / "tokenizer" / "tokenizer.json", "{}")
        writer.finish([], {"request": {}, "tokenizer": IDENTITY})
    assert (tmp_path / "manifest.json").exists()
    assert forgotten == []


def test_a_document_is_one_sequence_up_to_the_limit_of_the_index(tmp_path):
    make(tmp_path, [("train", [1] * 5000)])
    assert struct.unpack_from("<QQ", (tmp_path / "train-00000.idx").read_bytes(), 18) == (1, 2)
    assert 2**29 < shards.SEQUENCE_TOKENS < 2**31  # lengths are int32


def test_paths_are_noted_in_the_cache_by_the_checksum(tmp_path, monkeypatch):
    monkeypatch.setenv("SHORTCUT_CACHE", str(tmp_path))
    assert shards.source_paths_file({"checksum": "abc"}) == tmp_path / "sources" / "abc.json"
