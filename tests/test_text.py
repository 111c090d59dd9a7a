"""Text: nothing is lost, ids do not depend on how a file is read, and only the training split is learned from."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shortcut_cli.errors import CheckFailed, Rejected, ShortcutError, UsageError
from shortcut_cli.tokenizers import text
from shortcut_cli.tokenizers.base import Source
from shortcut_cli.tokenizers.text import TextOptions, TextTokenizer

LINES = "".join(
    f"The {w} number {n} went over the hill and far away, and so did I.\n" for n in range(200) for w in ("cat", "dog")
)


def whole(document):
    return [("train", document.size)]


def source(path, size=0, start=0):
    return Source(path, path.name, "0" * 64, path, size=size, start=start)


def surveyed(tokenizer, path):
    documents = list(tokenizer.survey(source(path)))
    return documents, source(path, size=sum(d.size for d in documents))


@pytest.fixture(scope="module", params=["unigram", "bpe", "char"])
def trained(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(LINES)
    tokenizer = TextTokenizer(TextOptions(name="text", algorithm=request.param, vocabulary=300))
    tokenizer.fit([surveyed(tokenizer, path)[1]], whole)
    return tokenizer


@settings(max_examples=200, deadline=None)
@given(st.text())
@example("\u2581 a\u2581\u2581b")
@example("<s></s><unk><0x0A> \x00\r\n\ufeff \u2028 \U0001f600")
@example(" " * 5000 + "x")
@example("\n \n\n  x")
def test_nothing_is_lost(trained, tmp_path_factory, content):
    path = tmp_path_factory.mktemp("t") / "x.txt"
    path.write_bytes(content.encode())
    ids = trained.prompt(path)
    assert ((ids >= 0) & (ids < trained.vocabulary)).all()
    assert trained.end not in ids
    units = trained.decode([*ids.tolist(), trained.end, 5, 6], path)
    assert path.read_bytes() == content.encode()
    assert units == {"byte": len(content.encode())}


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab \n\u00e9"), max_size=300), st.lists(st.integers(1, 40)), st.integers(2, 30))
def test_segments_depend_on_the_text_alone(content, sizes, longest):
    # A small limit, so that short texts are cut too.
    before = text.LONGEST_CHARS, text.SEGMENT_CHARS
    text.LONGEST_CHARS, text.SEGMENT_CHARS = longest, longest // 2
    try:
        chunks, place = [], 0
        for size in [*sizes, len(content)]:
            chunks.append(content[place : place + size])
            place += size
        assert list(text.segments(chunks)) == list(text.segments([content]))
        assert "".join(text.segments(chunks)) == content
        assert all(0 < len(segment) <= longest for segment in text.segments([content]))
    finally:
        text.LONGEST_CHARS, text.SEGMENT_CHARS = before


@pytest.mark.parametrize("kind", ["file", "line", "paragraph"])
def test_documents_add_up_to_the_file(tmp_path, kind):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree\n \nfour")
    tokenizer = TextTokenizer(
        TextOptions(name="text", algorithm="chars", alphabet="\n abcdefghijklmnopqrstuvwxyz", documents=kind)
    )
    documents, found = surveyed(tokenizer, path)
    assert len(documents) == {"file": 1, "line": 7, "paragraph": 3}[kind]
    assert [d.offset for d in documents] == [sum(d.size for d in documents[:n]) for n in range(len(documents))]
    pieces = [(p.units, np.concatenate(list(p.ids))) for p in tokenizer.encode(found, whole, 1)]
    assert sum(units["byte"] for units, _ in pieces) == path.stat().st_size
    assert tokenizer.pieces.decode(np.concatenate([ids for _, ids in pieces])) == path.read_text()


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 6])
def test_a_contiguous_cut_moves_to_the_next_character(tmp_path, trained, cut):
    path = tmp_path / "a.txt"
    path.write_text("a\u00e9\u4e00b")  # 1, 2, 3 and 1 bytes
    _, found = surveyed(trained, path)
    pieces = [
        (p.split, p.units, list(p.ids))
        for p in trained.encode(found, lambda d: [("train", cut), ("val", d.size - cut)], 1)
    ]
    texts = [trained.pieces.decode([i for block in ids for i in block]) for _, _, ids in pieces]
    assert "".join(texts) == "a\u00e9\u4e00b"
    assert len(texts[0].encode()) == {1: 1, 2: 3, 3: 3, 4: 6, 5: 6, 6: 6}[cut]
    assert [units["byte"] for _, units, _ in pieces] == [len(t.encode()) for t in texts]


def test_only_the_training_split_is_learned_from(tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    (tmp_path / "b.txt").write_text("xylophonequartz " * 500 + "\n")
    tokenizer = TextTokenizer(TextOptions(name="text", vocabulary=300))
    sources = [surveyed(tokenizer, tmp_path / name)[1] for name in ("a.txt", "b.txt")]
    val = next(iter(tokenizer.survey(sources[1]))).sha256
    tokenizer.fit(sources, lambda d: [("val" if d.sha256 == val else "train", d.size)])
    pieces = [tokenizer.pieces.processor.id_to_piece(i) for i in range(tokenizer.vocabulary)]
    assert not [piece for piece in pieces if "xyl" in piece or "quart" in piece]
    assert tokenizer.description["training_split_bytes"] == len(LINES)


def test_training_is_deterministic_and_bounded(tmp_path):
    (tmp_path / "a.txt").write_text(LINES * 80)
    models = []
    for _ in range(2):
        tokenizer = TextTokenizer(TextOptions(name="text", vocabulary=300, sample_mb=1))
        tokenizer.fit([surveyed(tokenizer, tmp_path / "a.txt")[1]], whole)
        models.append(tokenizer.model)
    assert models[0] == models[1]
    assert 900_000 < tokenizer.description["trained_on_bytes"] <= 1_000_100 < len(LINES) * 80


def test_a_vocabulary_that_is_too_large_names_the_largest(tmp_path):
    (tmp_path / "a.txt").write_text("a few words, no more\n" * 3)
    tokenizer = TextTokenizer(TextOptions(name="text", vocabulary=4000))
    with pytest.raises(UsageError) as caught:
        tokenizer.fit([surveyed(tokenizer, tmp_path / "a.txt")[1]], whole)
    assert caught.value.hint.startswith("--set tokenizer.vocabulary=")
    again = TextTokenizer(TextOptions(name="text", vocabulary=int(caught.value.hint.split("=")[1])))
    again.fit([surveyed(again, tmp_path / "a.txt")[1]], whole)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"ab\xffc", "byte 0xff at offset 2"),
        ("a.txt", b"a" * 2_000_000 + b"\xe4\xb8", "0xe4 at offset 2000000"),
        ("a.txt.gz", b"not gzip", "not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"hello" * 1000)[:-10], "not a whole gzip file"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', "line 2"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
    ],
)
def test_bad_files_are_rejected_with_a_reason(tmp_path, trained, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Rejected, match=reason):
        list(trained.survey(source(tmp_path / name)))


def test_jsonl_and_gzip(tmp_path, trained):
    records = ["one\ntwo", "", "\u4e00"]
    content = "".join(json.dumps({"text": record}) + "\n" for record in records).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    assert [d.size for d in trained.survey(source(tmp_path / "a.jsonl.gz"))] == [7, 3]


def test_chars_names_what_it_does_not_know(tmp_path):
    (tmp_path / "a.txt").write_text("abc\u00e9d")
    tokenizer = TextTokenizer(TextOptions(name="text", algorithm="chars"))
    assert (tokenizer.vocabulary, tokenizer.end) == (28, 27)
    with pytest.raises(Rejected, match="'\u00e9' at byte 3"):
        list(tokenizer.survey(source(tmp_path / "a.txt")))


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path, trained):
    path = tmp_path / "a.txt"
    path.write_text("before")
    _, found = surveyed(trained, path)
    path.write_text("afterwards")
    with pytest.raises(ShortcutError, match="changed while"):
        _read_all(trained.encode(found, whole, 1))


def _read_all(pieces):
    return [list(piece.ids) for piece in pieces]


def test_saved_and_loaded(tmp_path, trained):
    trained.save(tmp_path)
    loaded = TextTokenizer.load(trained.options, tmp_path)
    assert loaded.fingerprint == trained.fingerprint
    (tmp_path / "sentencepiece.model").write_bytes(b"garbage")
    with pytest.raises(CheckFailed):
        TextTokenizer.load(trained.options, tmp_path)


def test_an_existing_model(tmp_path, trained):
    (tmp_path / "m.model").write_bytes(trained.model)
    given_model = TextTokenizer(TextOptions(name="text", model=str(tmp_path / "m.model")))
    assert not given_model.needs_fit
    assert given_model.description["lossless"] is True
    for bad in ("missing.model", __file__):
        with pytest.raises(UsageError):
            TextTokenizer(TextOptions(name="text", model=str(tmp_path / bad if bad != __file__ else Path(bad))))


def test_masks_leave_out_control_pieces(trained):
    beginning, later = trained.allowed([]), trained.allowed([5])
    assert not beginning[trained.end]
    assert later[trained.end]
    assert not later[trained.pieces.processor.unk_id()]
