"""Text: nothing is lost, ids do not depend on how a file is read, and only the training split is learned from."""

import gzip
import hashlib
import io
import json
import re
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import sentencepiece
from conftest import allowed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shortcut_cli.errors import CheckFailed, Rejected, ShortcutError, UsageError
from shortcut_cli.tokenizers import text
from shortcut_cli.tokenizers.base import Source
from shortcut_cli.tokenizers.text import TextOptions, TextTokenizer

LINES = "".join(
    f"The {w} number {n} went over the hill and far away, and so did I.\n" for n in range(200) for w in ("cat", "dog")
)


def whole(document):
    return [("train", document.size)]


def surveyed(tokenizer, path, start=0):
    found = Source(path, path.name, hashlib.sha256(path.read_bytes()).hexdigest(), path, start=start)
    documents = list(tokenizer.survey(found))
    return documents, replace(found, size=sum(d.size for d in documents))


def encoded(tokenizer, found, assign=whole):
    """(split, units, ids) of each piece."""
    return [
        (piece.split, piece.units, np.concatenate(list(piece.ids)).tolist())
        for piece in tokenizer.encode(found, assign, 2)
    ]


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
    chunks, place = [], 0
    for size in [*sizes, len(content)]:
        chunks.append(content[place : place + size])
        place += size
    found = list(text.segments([content], longest // 2, longest))
    assert list(text.segments(chunks, longest // 2, longest)) == found
    assert "".join(found) == content
    assert all(0 < len(segment) <= longest for segment in found)


@pytest.mark.parametrize("kind", ["file", "line", "paragraph"])
@settings(max_examples=50, deadline=None)
@given(content=st.text(st.sampled_from("a \n\u00e9\u2581"), min_size=1), block=st.integers(1, 9))
@example(content="a" * 9000 + " \n" + " " * 9000 + "\n\nb", block=1000)
def test_ids_do_not_depend_on_how_a_file_is_read(trained, tmp_path_factory, kind, content, block):
    path = tmp_path_factory.mktemp("t") / "x.txt"
    path.write_bytes(content.encode())
    tokenizer = TextTokenizer(TextOptions(name="text", documents=kind), trained.model)
    documents, found = surveyed(tokenizer, path)
    at_once = encoded(tokenizer, found)
    assert len(at_once) == len(documents)
    with mock.patch.object(text, "BLOCK_BYTES", block), mock.patch.object(text, "BATCH_CHARS", 3):
        assert surveyed(tokenizer, path) == (documents, found)
        assert encoded(tokenizer, found) == at_once


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("a \t\n"), min_size=1))
@example("\n\na\n\n\nb\n \nc")
@example("a\n \t")
def test_a_paragraph_is_text_and_the_blank_lines_behind_it(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("t") / "x.txt"
    path.write_text(content)
    expected = [""]
    for line in content.splitlines(keepends=True):
        # Blank lines before the first text belong to it too.
        if line.strip() and expected[-1].strip() and not expected[-1].splitlines()[-1].strip():
            expected.append("")
        expected[-1] += line
    assert ["".join(chunks) for chunks in text.read_documents(path, "paragraph")] == expected


@pytest.mark.parametrize("kind", ["file", "line", "paragraph"])
def test_documents_add_up_to_the_file(tmp_path, kind):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree\n \nfour")
    tokenizer = TextTokenizer(
        TextOptions(name="text", algorithm="chars", alphabet="\n abcdefghijklmnopqrstuvwxyz", documents=kind)
    )
    documents, found = surveyed(tokenizer, path, start=100)
    assert len(documents) == {"file": 1, "line": 7, "paragraph": 3}[kind]
    assert [d.offset for d in documents] == [100 + sum(d.size for d in documents[:n]) for n in range(len(documents))]
    texts = [tokenizer.pieces.decode(ids) for _, _, ids in encoded(tokenizer, found)]
    assert "".join(texts) == path.read_text()
    assert [units for _, units, _ in encoded(tokenizer, found)] == [d.units for d in documents]
    assert [d.sha256 for d in documents] == [hashlib.sha256(t.encode()).hexdigest() for t in texts]


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 6])
def test_a_contiguous_cut_moves_to_the_next_character(tmp_path, trained, cut):
    path = tmp_path / "a.txt"
    path.write_text("a\u00e9\u4e00b")  # 1, 2, 3 and 1 bytes
    _, found = surveyed(trained, path)
    pieces = encoded(trained, found, lambda d: [("train", cut), ("val", d.size - cut)])
    texts = [trained.pieces.decode(ids) for _, _, ids in pieces]
    assert "".join(texts) == "a\u00e9\u4e00b"
    assert len(texts[0].encode()) == {1: 1, 2: 3, 3: 3, 4: 6, 5: 6, 6: 6}[cut]
    assert [units["byte"] for _, units, _ in pieces] == [len(t.encode()) for t in texts]


def test_one_moved_cut_does_not_move_the_next(tmp_path, trained):
    path = tmp_path / "a.txt"
    path.write_text("\u4e00abcd\u4e00e")
    _, found = surveyed(trained, path)
    pieces = encoded(trained, found, lambda d: [("train", 1), ("val", 4), ("test", d.size - 5)])
    assert [trained.pieces.decode(ids) for _, _, ids in pieces] == ["\u4e00", "ab", "cd\u4e00e"]


def test_only_the_training_split_is_learned_from(tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    (tmp_path / "b.txt").write_text("xylophonequartz " * 500 + "\n")
    tokenizer = TextTokenizer(TextOptions(name="text", vocabulary=300))
    sources = [surveyed(tokenizer, tmp_path / name)[1] for name in ("a.txt", "b.txt")]
    (val,) = (document.sha256 for document in tokenizer.survey(sources[1]))
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


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_a_text_too_short_for_the_vocabulary_gets_the_largest_that_it_fills(tmp_path, algorithm):
    (tmp_path / "a.txt").write_text("a few words, no more\n" * 3)
    tokenizer = TextTokenizer(TextOptions(name="text", algorithm=algorithm, vocabulary=4000))
    remark = tokenizer.fit([surveyed(tokenizer, tmp_path / "a.txt")[1]], whole)
    largest = tokenizer.vocabulary
    assert remark == f"the training split fills {largest} pieces, not the 4000 of tokenizer.vocabulary"
    exact = TextTokenizer(TextOptions(name="text", algorithm=algorithm, vocabulary=largest))
    assert exact.fit([surveyed(exact, tmp_path / "a.txt")[1]], whole) is None
    above = TextTokenizer(TextOptions(name="text", algorithm=algorithm, vocabulary=largest + 1))
    assert above.fit([surveyed(above, tmp_path / "a.txt")[1]], whole) is not None


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"ab\xffc", "byte 0xff at offset 2"),
        ("a.txt", b"a" * 2_000_000 + b"\xe4\xb8", "0xe4 at offset 2000000"),
        ("a.txt.gz", b"not gzip", "not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"hello" * 1000, mtime=0)[:-10], "not a whole gzip file"),  # a name that stays
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "line 2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', "line 2"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
    ],
)
def test_bad_files_are_rejected_with_a_reason(tmp_path, trained, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Rejected, match=reason):
        surveyed(trained, tmp_path / name)


def test_jsonl_and_gzip(tmp_path, trained):
    records = ["one\ntwo", "", "\u4e00"]
    content = "".join(json.dumps({"text": record}) + "\n" for record in records).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    documents, found = surveyed(trained, tmp_path / "a.jsonl.gz")
    assert [d.size for d in documents] == [7, 3]
    assert [trained.pieces.decode(ids) for _, _, ids in encoded(trained, found)] == ["one\ntwo", "\u4e00"]


def test_chars_names_what_it_does_not_know(tmp_path):
    (tmp_path / "a.txt").write_text("abc\u00e9d")
    tokenizer = TextTokenizer(TextOptions(name="text", algorithm="chars"))
    assert (tokenizer.vocabulary, tokenizer.end) == (28, 27)
    for read in (tokenizer.prompt, lambda path: surveyed(tokenizer, path)):
        with pytest.raises(Rejected, match="'\u00e9' at byte 3"):
            read(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("hello world")
    expected = ["abcdefghijklmnopqrstuvwxyz".find(c) + 1 for c in "hello world"]
    assert tokenizer.prompt(tmp_path / "a.txt").tolist() == expected
    assert not allowed(tokenizer, [])[tokenizer.end]
    assert allowed(tokenizer, [3]).all()


@pytest.mark.parametrize("after", ["afterwards", "BEFORE"])
def test_a_file_that_changes_meanwhile_is_noticed(tmp_path, trained, after):
    path = tmp_path / "a.txt"
    path.write_text("before")
    _, found = surveyed(trained, path)
    path.write_text(after)
    with pytest.raises(ShortcutError, match="changed while"):
        encoded(trained, found)


def test_a_file_that_changes_under_the_reader_is_noticed(tmp_path, trained):
    path = tmp_path / "a.txt"
    path.write_text("before")
    _, found = surveyed(trained, path)
    with pytest.raises(ShortcutError, match="changed while"):
        encoded(trained, replace(found, size=5))


def test_saved_and_loaded(tmp_path, trained):
    trained.save(tmp_path)
    loaded = TextTokenizer.load(trained.options, tmp_path)
    assert loaded.fingerprint == trained.fingerprint
    assert loaded.description == trained.description
    for change in ({"documents": "line"}, {"algorithm": "chars"}):
        with pytest.raises(CheckFailed, match="another configuration"):
            TextTokenizer.load(trained.options.model_copy(update=change), tmp_path)
    for content in (b"garbage", b""):
        (tmp_path / "sentencepiece.model").write_bytes(content)
        with pytest.raises(CheckFailed, match="can't be loaded"):
            TextTokenizer.load(trained.options, tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(CheckFailed, match="does not hold a text tokenizer"):
        TextTokenizer.load(trained.options, tmp_path)


def test_fingerprints_follow_what_changes_ids(trained):
    def fingerprint(model=trained.model, **keys):
        return TextTokenizer(TextOptions(name="text", **keys), model).fingerprint

    assert fingerprint(sample_mb=1, vocabulary=999) == fingerprint()
    different = [fingerprint(), fingerprint(documents="line"), fingerprint(b"", algorithm="chars")]
    different.append(fingerprint(b"", algorithm="chars", alphabet="abc"))
    assert len(set(different)) == len(different)


@pytest.mark.parametrize("keys", [{"alphabet": "aba"}, {"algorithm": "chars", "model": "m.model"}])
def test_options_that_contradict_themselves(keys):
    with pytest.raises(ValidationError, match=r"twice|takes no model"):
        TextOptions(name="text", **keys)


def test_an_existing_model(tmp_path, trained):
    (tmp_path / "m.model").write_bytes(trained.model)
    given_model = TextTokenizer(TextOptions(name="text", model=str(tmp_path / "m.model")))
    assert not given_model.needs_fit
    assert given_model.description["lossless"] is True
    (tmp_path / "empty.model").write_bytes(b"")
    (tmp_path / "text.model").write_text(LINES)
    for bad in ("missing.model", "empty.model", "text.model"):
        with pytest.raises(UsageError, match=re.escape(bad)):
            TextTokenizer(TextOptions(name="text", model=str(tmp_path / bad)))


def test_an_existing_model_that_loses_characters_says_so(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES.split("\n")), model_writer=model, vocab_size=50, eos_id=-1, minloglevel=2
    )
    (tmp_path / "m.model").write_bytes(model.getvalue())
    tokenizer = TextTokenizer(TextOptions(name="text", model=str(tmp_path / "m.model")))
    assert tokenizer.description["lossless"] is False
    # It has no </s>, so that the end is an id behind all of its pieces.
    assert (tokenizer.end, tokenizer.vocabulary) == (50, 51)
    (tmp_path / "a.txt").write_text("The cat number \u4e00 went\u2581over")
    ids = tokenizer.prompt(tmp_path / "a.txt").tolist()
    tokenizer.decode([*ids, tokenizer.end], tmp_path / "b.txt")
    assert (tmp_path / "b.txt").read_text().startswith("The cat number")
    assert allowed(tokenizer, ids)[tokenizer.end]


def test_bytes_that_are_no_text_become_replacement_characters(tmp_path, trained):
    piece = trained.pieces.processor.piece_to_id
    units = trained.decode([piece("<0xE4>"), piece("<0xB8>"), piece("a")], tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "\ufffd\ufffda"
    assert units == {"byte": 7}


def test_masks_leave_out_control_pieces(trained):
    beginning, later = allowed(trained, []), allowed(trained, [5])
    assert not beginning[trained.end]
    assert later[trained.end]
    assert not later[trained.pieces.processor.unk_id()]


def test_classes_and_excerpts_of_characters():
    tokenizer = TextTokenizer(TextOptions(name="text", algorithm="chars", alphabet=" ab1.\n"))
    ids = np.array([0, 1, 3, 4, 5, 2, 6])
    classes = tokenizer.classes(ids)["character"]
    assert [classes.names[i] for i in classes.of] == [
        "space",
        "letter",
        "digit",
        "punctuation",
        "space",
        "letter",
        "end",
    ]
    assert tokenizer.excerpt(ids).texts == [" ", "a", "1", ".", "\n", "b", "<end>"]


def test_classes_and_excerpts_of_pieces(trained, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the cat, 12 dogs\n\u4e00")
    ids = np.concatenate([trained.prompt(path), [trained.end]])
    shown = trained.excerpt(ids).texts
    assert "".join(text for text in shown if not text.startswith("<")) == "the cat, 12 dogs\n"
    classes = trained.classes(ids)["character"]
    for piece, number in zip(shown, classes.of, strict=True):
        first = piece.strip(" ")[:1]
        if piece.startswith("<"):
            expected = "end" if piece == "<end>" else "byte or control"
        elif not first.strip():
            expected = "space"
        else:
            expected = {(True, False): "letter", (False, True): "digit"}.get((first.isalpha(), first.isdigit()))
        assert classes.names[number] == (expected or "punctuation")
    assert len(set(classes.of.tolist())) == 6
