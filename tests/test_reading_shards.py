"""Reading shards: files written here from the description of Megatron's format; each single fault is refused."""

import hashlib
import json
import struct

import numpy as np
import pytest

from shortcut_cli.data import shards
from shortcut_cli.errors import CheckFailed, UsageError

TYPES = {8: "<u2", 4: "<i4"}


def idx(lengths, documents, *, magic=b"MMIDIDX\0\0", version=1, code=8, sequences=None, starts=None):
    """An .idx file: header, lengths, byte offsets, first sequence of each document and the number of sequences."""
    offsets = np.cumsum([0, *lengths])[:-1] * (2 if code == 8 else 4)
    return b"".join(
        (
            magic,
            struct.pack("<Q", version) + bytes([code]),
            struct.pack("<Q", len(lengths) if sequences is None else sequences),
            struct.pack("<Q", len(documents) if starts is None else starts),
            np.asarray(lengths, "<i4").tobytes(),
            np.asarray(offsets, "<i8").tobytes(),
            np.asarray(documents, "<i8").tobytes(),
        )
    )


def write(stem, ids, index, code=8):
    stem.with_name(stem.name + ".bin").write_bytes(np.asarray(ids, TYPES[code]).tobytes())
    stem.with_name(stem.name + ".idx").write_bytes(index)


@pytest.mark.parametrize("code", [8, 4])
def test_a_correct_pair_is_read(tmp_path, code):
    ids = [5, 0, 65_000, 7, 9, 1, 2]
    write(tmp_path / "s", ids, idx([3, 0, 4], [0, 2, 2, 3], code=code), code)
    shard = shards.read_shard(tmp_path / "s")
    assert shard.ids.dtype == np.dtype(TYPES[code])
    assert shard.ids.tolist() == ids
    assert shard.lengths.tolist() == [3, 0, 4]
    assert shard.documents.tolist() == [0, 2, 2, 3]


def test_a_pair_without_documents_is_read(tmp_path):
    write(tmp_path / "s", [], idx([], [0]))
    shard = shards.read_shard(tmp_path / "s")
    assert (len(shard.ids), len(shard.lengths), shard.documents.tolist()) == (0, 0, [0])


IDS = [1, 2, 3, 4, 5, 6, 7]  # as three sequences, 3 + 2 + 2, of two documents
RIGHT = idx([3, 2, 2], [0, 1, 3])
FAULTS = {
    "magic": (idx([3, 2, 2], [0, 1, 3], magic=b"MMIDIDX\0\1"), "is not a Megatron index"),
    "version 0": (idx([3, 2, 2], [0, 1, 3], version=0), "is not a Megatron index"),
    "version 2": (idx([3, 2, 2], [0, 1, 3], version=2), "is not a Megatron index"),
    "dtype code of int64": (idx([3, 2, 2], [0, 1, 3], code=5), "is not a Megatron index"),
    "dtype code 0": (idx([3, 2, 2], [0, 1, 3], code=0), "is not a Megatron index"),
    "int32 for uint16": (idx([3, 2, 2], [0, 1, 3], code=4), "describes a different size"),
    "first document not at 0": (idx([3, 2, 2], [1, 1, 3]), "document indices out of order"),
    "first document below 0": (idx([3, 2, 2], [-1, 1, 3]), "document indices out of order"),
    "documents decrease": (idx([3, 2, 2], [0, 2, 1, 3]), "document indices out of order"),
    "a document past the end": (idx([3, 2, 2], [0, 4, 3]), "document indices out of order"),
    "last index too small": (idx([3, 2, 2], [0, 1, 2]), "document indices out of order"),
    "last index too large": (idx([3, 2, 2], [0, 1, 4]), "document indices out of order"),
    "no document index": (idx([3, 2, 2], []), "document indices out of order"),
    "a negative length that adds up": (idx([6, -1, 2], [0, 1, 3]), "describes a different size"),
    "lengths too small": (idx([3, 2, 1], [0, 1, 3]), "describes a different size"),
    "lengths too large": (idx([3, 2, 3], [0, 1, 3]), "describes a different size"),
    "lengths that add up modulo 2**32": (idx([2**31 - 1, 2**31 - 1, 9], [0, 1, 3]), "describes a different size"),
    "one sequence too many in the header": (idx([3, 2, 2], [0, 1, 3], sequences=4), "does not fit 4 sequences"),
    "one sequence too few in the header": (idx([3, 2, 2], [0, 1, 3], sequences=2), "does not fit 2 sequences"),
    "sequences beyond any file": (idx([3, 2, 2], [0, 1, 3], sequences=2**63), "does not fit"),
    "one document too many in the header": (idx([3, 2, 2], [0, 1, 3], starts=4), "3 sequences, 4 documents"),
    "one document too few in the header": (idx([3, 2, 2], [0, 1, 3], starts=2), "3 sequences, 2 documents"),
    "cut in the arrays": (RIGHT[:-1], "does not fit"),
    "a byte more": (RIGHT + b"\0", "does not fit"),
    "cut in the header": (RIGHT[:33], "is cut off: 33 bytes"),
    "one byte": (RIGHT[:1], "is cut off: 1 bytes"),
    "empty": (b"", "can't be read"),
}


@pytest.mark.parametrize(("index", "message"), FAULTS.values(), ids=FAULTS)
def test_an_index_with_one_fault_is_refused(tmp_path, index, message):
    write(tmp_path / "s", IDS, RIGHT)
    shards.read_shard(tmp_path / "s")
    (tmp_path / "s.idx").write_bytes(index)
    with pytest.raises(CheckFailed, match=message):
        shards.read_shard(tmp_path / "s")


@pytest.mark.parametrize("size", [0, 12, 13, 15, 16])
def test_ids_of_another_size_than_the_index_says_are_refused(tmp_path, size):
    write(tmp_path / "s", IDS, RIGHT)
    (tmp_path / "s.bin").write_bytes(bytes(size))
    with pytest.raises(CheckFailed, match=f"has {size} bytes, s.idx describes a different size"):
        shards.read_shard(tmp_path / "s")


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_half_a_pair_is_refused(tmp_path, ending):
    write(tmp_path / "s", IDS, RIGHT)
    (tmp_path / f"s.{ending}").unlink()
    with pytest.raises(CheckFailed, match="can't be read"):
        shards.read_shard(tmp_path / "s")


# Splits

SHARDS = {  # of the training split: ids, lengths of sequences, documents
    "train-00000": ([1, 2, 3, 4, 5], [2, 3], [0, 1, 2]),
    "train-00001": ([6], [1], [0, 1]),
    "train-00002": ([], [], [0]),
    "train-00003": ([7, 8, 9, 10], [1, 2, 1], [0, 2, 3]),
    "val-00000": ([90, 91], [2], [0, 1]),
    "test-00000": ([80], [1], [0, 1]),
}
TRAIN = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]


def seal(manifest):
    """A manifest with its checksum: the SHA-256 of the rest, as JSON with sorted keys."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return rest | {"checksum": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def rewrite(folder, change):
    """Change the manifest of a folder, and seal it again."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(seal(manifest)))


@pytest.fixture
def folder(tmp_path):
    """A shards folder that was not written by the program."""
    made = tmp_path / "shards"
    (made / "tokenizer").mkdir(parents=True)
    (made / "tokenizer" / "tokenizer.json").write_text("{}")
    for name in ("documents.jsonl", "rejects.jsonl"):
        (made / name).write_text("")
    for stem, (ids, lengths, documents) in SHARDS.items():
        write(made / stem, ids, idx(lengths, documents))
    listed = {}
    for path in (path for path in made.rglob("*") if path.is_file()):
        content = path.read_bytes()
        name = path.relative_to(made).as_posix()
        listed[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    counts = {"train": (5, 10), "val": (1, 2), "test": (1, 1)}
    manifest = {
        "format": 1,
        "request": {},
        "tokenizer": {"name": "text", "fingerprint": "f", "vocabulary": 300, "end": 299, "unit": "byte"},
        "splits": {
            name: {"documents": documents, "tokens": tokens, "units": {"byte": tokens * 2.5}}
            for name, (documents, tokens) in counts.items()
        },
        "files": listed,
    }
    (made / "manifest.json").write_text(json.dumps(seal(manifest)))
    return made


def test_a_split_reads_as_one_sequence_at_every_border(folder):
    opened = shards.Shards(folder)
    split = opened.split("train")
    assert (split.name, split.tokens, split.units) == ("train", 10, {"byte": 25.0})
    for start in range(11):
        for length in range(11 - start):
            found = split.read(start, length)
            assert found.dtype == np.int64
            assert found.tolist() == TRAIN[start : start + length]
    for start, length in ((-1, 2), (0, 11), (10, 1), (11, 0), (3, -1)):
        with pytest.raises(AssertionError):
            split.read(start, length)
    assert opened.split("val").read(0, 2).tolist() == [90, 91]
    assert (opened.split("val").units, opened.split("test").units) == ({"byte": 5.0}, {"byte": 2.5})
    assert opened.split("test").read(0, 1).tolist() == [80]


def test_tokens_of_documents_are_sums_over_their_sequences(folder):
    assert shards.Shards(folder).split("train").document_tokens().tolist() == [2, 3, 1, 3, 1]
    assert shards.Shards(folder).split("val").document_tokens().tolist() == [2]


def test_a_split_without_shards_is_empty(folder):
    def forget(manifest):
        manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith("val-")}
        manifest["splits"]["val"]["tokens"] = 0

    rewrite(folder, forget)
    split = shards.Shards(folder).split("val")
    assert (split.tokens, split.document_tokens().tolist(), split.read(0, 0).tolist()) == (0, [], [])


@pytest.mark.parametrize("tokens", [9, 11])
def test_a_split_with_other_tokens_than_the_manifest_says_is_refused(folder, tokens):
    rewrite(folder, lambda manifest: manifest["splits"]["train"].update(tokens=tokens))
    with pytest.raises(CheckFailed, match=f"train has 10 tokens, the manifest says {tokens}"):
        shards.Shards(folder).split("train")
    shards.Shards(folder).split("val")


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_shard_that_the_manifest_does_not_describe_is_refused(folder, ending):
    name = f"train-00001.{ending}"
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    with pytest.raises(CheckFailed, match=f"{name} is missing"):
        shards.Shards(folder).split("train")
    (folder / name).write_bytes(content + b"\0")
    with pytest.raises(CheckFailed, match=f"{name} has {len(content) + 1} bytes, the manifest says {len(content)}"):
        shards.Shards(folder).split("train")
    (folder / name).write_bytes(content)
    rewrite(folder, lambda manifest: manifest["files"].pop("train-00001.idx"))
    with pytest.raises(CheckFailed, match=r"train-00001\.idx is missing"):
        shards.Shards(folder).split("train")


# The manifest


def test_a_manifest_is_returned_as_it_was_written(folder):
    assert shards.read_manifest(folder) == json.loads((folder / "manifest.json").read_text())
    assert shards.Shards(folder).tokenizer["end"] == 299


def test_a_manifest_with_another_checksum_is_refused(folder):
    path = folder / "manifest.json"
    whole = path.read_text()
    for old, new in (('"documents": 5', '"documents": 6'), ('"end": 299', '"end": 298')):
        assert old in whole
        path.write_text(whole.replace(old, new))
        with pytest.raises(CheckFailed, match="was changed after it was written"):
            shards.read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda m: m.pop("files"), "files"),
        (lambda m: m.pop("request"), "request"),
        (lambda m: m.update(request=[]), "request"),
        (lambda m: m["splits"].pop("val"), "splits.val"),
        (lambda m: m["splits"]["val"].update(tokens=-1), "splits.val.tokens"),
        (lambda m: m["splits"]["val"].update(tokens=2.0), "splits.val.tokens"),
        (lambda m: m["splits"]["val"].update(tokens="2"), "splits.val.tokens"),
        (lambda m: m["splits"]["test"].update(documents=2**63), "splits.test.documents"),
        (lambda m: m["splits"]["train"]["units"].update(byte=-0.5), "splits.train.units.byte"),
        (lambda m: m["splits"]["train"]["units"].update(byte=float("inf")), "splits.train.units.byte"),
        (lambda m: m["tokenizer"].update(vocabulary=0), "tokenizer.vocabulary"),
        (lambda m: m["tokenizer"].update(vocabulary=2**31 + 1), "tokenizer.vocabulary"),
        (lambda m: m["tokenizer"].update(end=-1), "tokenizer.end"),
        (lambda m: m["tokenizer"].pop("fingerprint"), "tokenizer.fingerprint"),
        (lambda m: m["tokenizer"].pop("unit"), "tokenizer.unit"),
        (lambda m: m["files"]["rejects.jsonl"].update(bytes=-1), r"files.rejects\.jsonl.bytes"),
        (lambda m: m["files"]["rejects.jsonl"].pop("sha256"), r"files.rejects\.jsonl.sha256"),
    ],
)
def test_a_manifest_with_one_wrong_field_is_refused_and_the_field_named(folder, change, where):
    rewrite(folder, change)
    with pytest.raises(CheckFailed, match=f"is damaged: {where}: "):
        shards.read_manifest(folder)


@pytest.mark.parametrize("name", ["../train-00000.bin", "a/../../b", "/etc/passwd", "", ".", "a\0b"])
def test_a_manifest_that_points_outside_its_folder_is_refused(folder, name):
    rewrite(folder, lambda manifest: manifest["files"].update({name: {"bytes": 0, "sha256": ""}}))
    with pytest.raises(CheckFailed, match="points outside the folder"):
        shards.read_manifest(folder)


@pytest.mark.parametrize("number", [0, 2, "1", None])
def test_a_manifest_of_another_format_is_refused_and_the_format_named(folder, number):
    rewrite(folder, lambda manifest: manifest.update(format=number))
    with pytest.raises(CheckFailed, match=f"has format {number!r}; this version reads 1") as refused:
        shards.read_manifest(folder)
    assert refused.value.hint == "update shortcut"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"format"', '{"format": 1}', "[" * 100_000])
def test_a_file_that_is_not_a_manifest_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckFailed, match="is damaged") as refused:
        shards.read_manifest(folder)
    assert refused.value.hint == "prepare the folder again"


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (".shortcut", "is incomplete"),
        (".partial", "is not a shards folder"),
        (".staging", "is not a shards folder"),
        ("train-00000.bin", "is not a shards folder"),
        (None, "is not a shards folder"),
    ],
)
def test_a_folder_without_a_manifest_is_unfinished_or_something_else(tmp_path, inside, message):
    if inside:
        (tmp_path / "f").mkdir()
        if inside == ".shortcut":
            (tmp_path / "f" / inside).write_text("shortcut prepare, process 1\n")
        else:
            (tmp_path / "f" / inside).mkdir()
    with pytest.raises(UsageError, match=message) as refused:
        shards.read_manifest(tmp_path / "f")
    assert "shortcut prepare" in refused.value.hint


# Every byte


def test_each_kind_of_damage_is_listed(folder):
    assert list(shards.verify(folder)) == []
    (folder / ".shortcut").write_text("a lock")
    assert list(shards.verify(folder)) == []
    (folder / "val-00000.bin").unlink()
    (folder / "train-00001.bin").write_bytes(b"\6")
    (folder / "tokenizer" / "tokenizer.json").write_text("[]")
    (folder / "tokenizer" / "more.json").write_text("{}")
    (folder / "notes.txt").write_text("")
    assert sorted(shards.verify(folder)) == [
        "notes.txt does not belong to the folder",
        "tokenizer/more.json does not belong to the folder",
        "tokenizer/tokenizer.json has changed since it was written",
        "train-00001.bin has 1 bytes, the manifest says 2",
        "val-00000.bin is missing",
    ]
