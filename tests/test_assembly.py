"""Shards that many processes write: what one writer writes, whatever the parts and the shards are."""

import json
import pickle
from itertools import pairwise

import numpy as np
import pytest
from conftest import quiet, write_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from kill import folder_sha256  # benchmarks/kill.py

from shortcut_cli.config import reading
from shortcut_cli.data import duplicates, shards, splits
from shortcut_cli.data.assembly import PartWriter, ShardMaker, laid_out
from shortcut_cli.data.documents import Document
from shortcut_cli.demo import material as demo_material
from shortcut_cli.errors import Unfinished
from shortcut_cli.stages import preparation
from shortcut_cli.tokenizers import tokenization
from shortcut_cli.tokenizers.text import TextTokenizer

CHARS = ("tokenizer.algorithm=chars", "tokenizer.alphabet=\n abcdefghijklmnopqrstuvwxyz0123456789")
DOCUMENTS = st.lists(st.tuples(st.sampled_from(shards.SPLITS), st.integers(0, 12)), max_size=25)


def ids(number, length):
    return np.arange(number, number + length) % 250


@given(DOCUMENTS, st.integers(1, 15), st.lists(st.integers(0, 25), max_size=4), st.sampled_from([300, 70_000]))
@settings(max_examples=25, deadline=None)
def test_parts_make_the_folder_that_one_writer_makes(tmp_path_factory, documents, shard_tokens, cuts, vocabulary):
    folder, eos = tmp_path_factory.mktemp("shards"), vocabulary - 1
    units, fields = {"byte": 0.1}, {"request": {}}
    with shards.FolderWriter(folder / "one", vocabulary, shard_tokens, eos=eos) as writer:
        for number, (split, length) in enumerate(documents):
            writer.add(split, [ids(number, length)[:3], ids(number, length)[3:]], units, {"source": str(number)})
        one = writer.finish([], fields)
    bounds = [0, *sorted(min(cut, len(documents)) for cut in cuts), len(documents)]
    with shards.FolderWriter(folder / "many", vocabulary, shard_tokens, eos=eos) as writer:
        writer.leave_shards()
        made = PartWriter(folder / "parts", vocabulary)
        made.folder.mkdir()
        for part, (first, last) in reversed([*enumerate(pairwise(bounds))]):
            with made.writing(part) as add:
                for number in range(first, last):
                    split, length = documents[number]
                    add(split, [ids(number, length), np.array([eos])], units, {"source": str(number)})
        maker = pickle.loads(pickle.dumps(ShardMaker(writer.partial, made)))
        for shard in laid_out(made, len(bounds) - 1, shard_tokens, writer.place):
            writer.hashes[f"{shard.name}.bin"] = maker(pickle.loads(pickle.dumps(shard)))
        many = writer.finish([], fields)
    assert many == one
    assert folder_sha256(folder / "many") == folder_sha256(folder / "one")


def test_a_document_of_several_sequences_is_laid_out_like_one_that_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SEQUENCE_TOKENS", 4)
    assert shards.sequences(11) == [4, 4, 3]
    assert shards.sequences(8) == [4, 4]
    assert shards.sequences(0) == []


CORPORA = [
    ("text-tiny", "texts", ("tokenizer.vocabulary=300",)),
    ("text-tiny", "texts", (*CHARS, "data.split=contiguous", "data.val=0.3")),
    ("text-tiny", "texts", (*CHARS, 'data.splits={train=["0[01]*", "co*"], val=["020*"], test=["02[1-9]*"]}')),
    ("music-tiny", "midi", ("tokenizer.transpose=[1]", "tokenizer.bpe=1100")),
]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    root = tmp_path_factory.mktemp("material")
    write_texts(root / "texts")
    for number in (3, 11, 25):  # documents that are left out, in files that are not
        lines = [json.dumps({"text": text}) for text in ("one", "two", f"three {number}", "")]
        (root / "texts" / f"0{number:02d}.jsonl").write_text("\n".join(lines) + "\n")
    (root / "midi").mkdir()
    demo_material.write_midi(root / "midi", pieces=9, seed=4)
    return root


def run(name, paths, out, *chosen, workers=1):
    config = reading.read(name, [f"data.shards={out}", "data.shard_tokens=1024", *chosen])
    return preparation.prepare(config, [str(paths)], out, n_workers=workers, max_bad="0", report=quiet)


@pytest.mark.parametrize(("name", "kind", "chosen"), CORPORA, ids=str)
def test_a_divided_write_pass_gives_the_same_bytes(material, tmp_path, monkeypatch, name, kind, chosen):
    run(name, material / kind, tmp_path / "one", *chosen)
    asked, in_order = [], tokenization.workers.in_order

    def here(work, jobs, fixed, **_):
        asked.append(type(work).__name__)
        return ((job, pickle.loads(pickle.dumps(work))(pickle.loads(pickle.dumps(job)))) for job in jobs)

    monkeypatch.setattr(tokenization, "PART_SIZE", 1500)
    monkeypatch.setattr(tokenization, "WORTH_PARTS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(tokenization.workers, "in_order", here)
        run(name, material / kind, tmp_path / "here", *chosen, workers=2)
    assert asked[-2:] == ["PartEncoder", "ShardMaker"]
    assert folder_sha256(tmp_path / "here") == folder_sha256(tmp_path / "one")
    if chosen == CORPORA[0][2]:
        assert in_order is tokenization.workers.in_order
        run(name, material / kind, tmp_path / "many", *chosen, workers=2)
        assert folder_sha256(tmp_path / "many") == folder_sha256(tmp_path / "one")


def test_a_text_that_changes_before_a_part_reads_it_costs_only_itself(material, tmp_path, monkeypatch):
    write_texts(tmp_path / "texts", 12)
    monkeypatch.setattr(tokenization, "PART_SIZE", 1500)
    monkeypatch.setattr(tokenization, "WORTH_PARTS", 1)
    encode = TextTokenizer.encode

    def after_a_change(self, source, *rest):
        if source.relative == "004.txt":
            source.path.write_text("other")
        return encode(self, source, *rest)

    def here(work, jobs, fixed, **_):
        for job in jobs:
            try:
                yield job, work(job)
            except tokenization.Rejected as reason:
                yield job, reason

    monkeypatch.setattr(tokenization.workers, "in_order", here)
    monkeypatch.setattr(TextTokenizer, "encode", after_a_change)
    config = reading.read("text-tiny", [f"data.shards={tmp_path / 's'}", *CHARS])
    with pytest.raises(Unfinished, match=r"004\.txt: changed while it was being prepared"):
        preparation.prepare(config, [str(tmp_path / "texts")], tmp_path / "s", n_workers=2, max_bad="1", report=quiet)
    manifest = shards.Shards(tmp_path / "s").manifest
    assert (manifest["inputs"], manifest["unfinished"]) == (12, 1)
    assert {path.name for path in (tmp_path / "s").iterdir() if path.name.startswith(".part")} == set()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_division_of_a_part_says_what_the_whole_one_says(data):
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=12))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    documents = [
        Document(f"{n:064x}", int(start), size) for n, (start, size) in enumerate(zip(starts, sizes, strict=False))
    ]
    chosen = sorted(data.draw(st.sets(st.sampled_from([n for n, size in enumerate(sizes) if size] or [-1]))) - {-1})
    dropped = duplicates.Dropped(
        starts[chosen], np.concatenate([[0], np.cumsum([sizes[n] for n in chosen])]).astype(int)
    )
    kept = [n for n, size in enumerate(sizes) if size and n not in chosen]
    names = data.draw(st.lists(st.sampled_from(shards.SPLITS), min_size=len(kept), max_size=len(kept)))
    begins = [documents[n].offset - dropped.before(documents[n].offset) for n in kept]
    total = splits.Tally(0.3, 0.2)
    for document in documents:
        total.add(document)
    total.size -= dropped.size
    by_document = [splits.by_document(total)] if total.distinct >= splits.ENOUGH else []
    for inner in (splits.as_given(begins, names), splits.contiguous(total), *by_document):
        whole = splits.without(dropped, inner)
        first = data.draw(st.integers(0, len(sizes) - 1))
        last = data.draw(st.integers(first, len(sizes) - 1))
        part = pickle.loads(pickle.dumps(whole.within(documents[first].offset, documents[last].offset + sizes[last])))
        for document in documents[first : last + 1]:
            assert part(document) == whole(document)
