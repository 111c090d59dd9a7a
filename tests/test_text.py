"""Text: nothing is lost, ids do not depend on how a file is read, and only the training split is learned from."""

import gzip
import hashlib
import io
import json
import pickle
import re
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import sentencepiece
from conftest import allowed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shortcut_cli.data.documents import RejectedRecord, Source
from shortcut_cli.errors import CheckFailed, Rejected, UsageError
from shortcut_cli.tokenizers import text, text_reading, text_vocabulary
from shortcut_cli.tokenizers.text import TextOptions, TextTokenizer
from shortcut_cli.tokenizers.text_reading import read_documents, read_lines

LINES = "".join(
    f"The {w} number {n} went over the hill and far away, and so did I.\n" for n in range(200) for w in ("cat", "dog")
)


def whole(document):
    return [("train", document.size)]


def source_of(path, start=0):
    return Source(path, path.name, hashlib.sha256(path.read_bytes()).hexdigest(), path, start=start)


def scanned(tokenizer, path, start=0):
    found = source_of(path, start)
    documents = list(tokenizer.documents(found))
    return documents, replace(found, size=sum(d.size for d in documents))


def texts_of(path, kind, **config):
    """The texts of a file's documents; rejected records as they are."""
    found = text_reading.read_documents(path, kind, **config)
    return ["".join(one.chunks) if isinstance(one, text_reading.Text) else one for one in found]


def units_of(content):
    """By Python's own functions: a word of the original is what split() gives, and each newline is one more."""
    words = len(content.split()) + content.count("\n")
    return {"byte": len(content.encode()), "character": len(content), "word": words}


def encoded(tokenizer, found, assign=whole):
    """(split, units, ids) of each chunk."""
    return [
        (chunk.split, chunk.units, np.concatenate(list(chunk.ids)).tolist())
        for chunk in tokenizer.encode(found, assign, 2)
    ]


@pytest.fixture(scope="module", params=["unigram", "bpe", "char"])
def trained(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(LINES)
    tokenizer = TextTokenizer(TextOptions(name="text", algorithm=request.param, vocabulary=300))
    tokenizer.fit([scanned(tokenizer, path)[1]], whole)
    return tokenizer


@settings(max_examples=200, deadline=None)
@given(st.text())
@example("\u2581 a\u2581\u2581b")
@example("<s></s><unk><0x0A> \x00\r\n\ufeff \u2028 \U0001f600")
@example(" " * 5000 + "x")
@example("\n \n\n  x")
@example("\ufeffa\ufeff")
def test_nothing_but_a_byte_order_mark_is_lost(trained, tmp_path_factory, content):
    path = tmp_path_factory.mktemp("t") / "x.txt"
    path.write_bytes(content.encode())
    ids = trained.prompt(path)
    assert ((ids >= 0) & (ids < trained.vocabulary)).all()
    assert trained.eos not in ids
    units = trained.decode([*ids.tolist(), trained.eos, 5, 6], path)
    kept = content.removeprefix("\ufeff").encode()
    assert path.read_bytes() == kept
    assert units == {"byte": len(kept)}


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab \n\u00e9"), max_size=300), st.lists(st.integers(1, 40)), st.integers(2, 30))
def test_segments_depend_on_the_text_alone(content, sizes, longest):
    chunks, place = [], 0
    for size in [*sizes, len(content)]:
        chunks.append(content[place : place + size])
        place += size
    found = list(text_reading.segments([content], longest // 2, longest))
    assert list(text_reading.segments(chunks, longest // 2, longest)) == found
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
    documents, found = scanned(tokenizer, path)
    at_once = encoded(tokenizer, found)
    assert len(at_once) == len(documents)
    with mock.patch.object(text_reading, "BLOCK_BYTES", block), mock.patch.object(text, "BATCH_CHARS", 3):
        assert scanned(tokenizer, path) == (documents, found)
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
        # Blank lines before the first text belong to its paragraph.
        if line.strip() and expected[-1].strip() and not expected[-1].splitlines()[-1].strip():
            expected.append("")
        expected[-1] += line
    assert texts_of(path, "paragraph") == expected


@pytest.mark.parametrize("kind", ["file", "line", "paragraph"])
def test_documents_add_up_to_the_file(tmp_path, kind):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\nthree\n \nfour")
    tokenizer = TextTokenizer(
        TextOptions(name="text", algorithm="chars", alphabet="\n abcdefghijklmnopqrstuvwxyz", documents=kind)
    )
    documents, found = scanned(tokenizer, path, start=100)
    assert len(documents) == {"file": 1, "line": 4, "paragraph": 3}[kind]
    assert [d.offset for d in documents] == [100 + sum(d.size for d in documents[:n]) for n in range(len(documents))]
    texts = [tokenizer.pieces.decode(ids) for _, _, ids in encoded(tokenizer, found)]
    assert "".join(texts) == path.read_text()
    assert [units for _, units, _ in encoded(tokenizer, found)] == [units_of(t) for t in texts]
    assert [d.units for d in documents] == [{"byte": len(t.encode())} for t in texts]
    assert [d.sha256 for d in documents] == [hashlib.sha256(t.encode()).hexdigest() for t in texts]


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 6])
def test_a_contiguous_cut_moves_to_the_next_character(tmp_path, trained, cut):
    path = tmp_path / "a.txt"
    path.write_text("a\u00e9\u4e00b")  # 1, 2, 3 and 1 bytes
    _, found = scanned(trained, path)
    chunks = encoded(trained, found, lambda d: [("train", cut), ("val", d.size - cut)])
    texts = [trained.pieces.decode(ids) for _, _, ids in chunks]
    assert "".join(texts) == "a\u00e9\u4e00b"
    assert len(texts[0].encode()) == {1: 1, 2: 3, 3: 3, 4: 6, 5: 6, 6: 6}[cut]
    assert [units["byte"] for _, units, _ in chunks] == [len(t.encode()) for t in texts]


def test_one_moved_cut_does_not_move_the_next(tmp_path, trained):
    path = tmp_path / "a.txt"
    path.write_text("\u4e00abcd\u4e00e")
    _, found = scanned(trained, path)
    chunks = encoded(trained, found, lambda d: [("train", 1), ("val", 4), ("test", d.size - 5)])
    assert [trained.pieces.decode(ids) for _, _, ids in chunks] == ["\u4e00", "ab", "cd\u4e00e"]


def test_only_the_training_split_is_learned_from(tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    (tmp_path / "b.txt").write_text("xylophonequartz " * 500 + "\n")
    tokenizer = TextTokenizer(TextOptions(name="text", vocabulary=300))
    sources = [scanned(tokenizer, tmp_path / name)[1] for name in ("a.txt", "b.txt")]
    (val,) = (document.sha256 for document in tokenizer.scan(sources[1]))
    tokenizer.fit(sources, lambda d: [("val" if d.sha256 == val else "train", d.size)])
    pieces = [tokenizer.pieces.processor.id_to_piece(i) for i in range(tokenizer.vocabulary)]
    assert not [piece for piece in pieces if "xyl" in piece or "quart" in piece]
    assert tokenizer.description["training_split_bytes"] == len(LINES)


def test_training_is_deterministic_and_bounded(tmp_path):
    (tmp_path / "a.txt").write_text(LINES * 80)
    models = []
    for _ in range(2):
        tokenizer = TextTokenizer(TextOptions(name="text", vocabulary=300, sample_mb=1))
        tokenizer.fit([scanned(tokenizer, tmp_path / "a.txt")[1]], whole)
        models.append(tokenizer.model)
    assert models[0] == models[1]
    assert 900_000 < tokenizer.description["trained_on_bytes"] <= 1_000_100 < len(LINES) * 80


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
def test_a_text_too_short_for_the_vocabulary_gets_the_largest_that_it_fills(tmp_path, algorithm):
    (tmp_path / "a.txt").write_text("a few words, no more\n" * 3)
    tokenizer = TextTokenizer(TextOptions(name="text", algorithm=algorithm, vocabulary=4000))
    remark = tokenizer.fit([scanned(tokenizer, tmp_path / "a.txt")[1]], whole)
    largest = tokenizer.vocabulary
    assert remark == f"the training split fills only {largest:,} of the 4,000 pieces of tokenizer.vocabulary"
    exact = TextTokenizer(TextOptions(name="text", algorithm=algorithm, vocabulary=largest))
    assert exact.fit([scanned(exact, tmp_path / "a.txt")[1]], whole) is None
    above = TextTokenizer(TextOptions(name="text", algorithm=algorithm, vocabulary=largest + 1))
    assert above.fit([scanned(above, tmp_path / "a.txt")[1]], whole) is not None


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"ab\xffc", "byte 0xff at offset 2"),
        ("a.txt", b"a" * 2_000_000 + b"\xe4\xb8", "0xe4 at offset 2000000"),
        ("a.txt.gz", b"not gzip", "not a whole gzip file"),
        (
            "a.txt.gz",
            gzip.compress(b"hello" * 1000, mtime=0)[:-10],
            "not a whole gzip file",
        ),  # mtime: the same test id every time
        ("a.txt", b"\xef\xbb\xbf", "is empty"),
        ("a.jsonl", b" \n\n", "is empty"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not UTF-8: byte 0xff at offset 10 of the line$"),
        ("a.jsonl", b'\n{"txt": "b"}\n{"text": 5}\n', "^has no record that can be used; line 2 has no field 'text'$"),
        ("a.jsonl", b'{"text": ""}\n' * 3, r"^has only empty records \(3\)$"),
        ("a.jsonl", b"[" * 100_000, "line 1 is nested too deeply"),
    ],
)
def test_bad_files_are_rejected_with_a_reason(tmp_path, trained, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Rejected, match=reason):
        scanned(trained, tmp_path / name)


def test_jsonl_and_gzip(tmp_path, trained):
    records = ["one\ntwo", "", "\u4e00"]
    content = "".join(json.dumps({"text": record}) + "\n" for record in records).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    documents, found = scanned(trained, tmp_path / "a.jsonl.gz")
    assert [(d.size, d.line) for d in documents] == [(7, 1), (0, 2), (3, 3)]
    parts = encoded(trained, found, lambda d: whole(d) if d.size else [])
    assert [trained.pieces.decode(ids) for _, _, ids in parts] == ["one\ntwo", "\u4e00"]


def test_chars_names_the_character_that_has_no_id(tmp_path):
    (tmp_path / "a.txt").write_text("abc\u00e9d")
    tokenizer = TextTokenizer(TextOptions(name="text", algorithm="chars"))
    assert (tokenizer.vocabulary, tokenizer.eos) == (28, 27)
    for read in (tokenizer.prompt, lambda path: scanned(tokenizer, path)):
        with pytest.raises(Rejected, match="'\u00e9' at byte 3"):
            read(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("hello world")
    expected = ["abcdefghijklmnopqrstuvwxyz".find(c) + 1 for c in "hello world"]
    assert tokenizer.prompt(tmp_path / "a.txt").tolist() == expected
    assert not allowed(tokenizer, [])[tokenizer.eos]
    assert allowed(tokenizer, [3]).all()


def test_a_file_of_very_many_records_that_can_not_be_used_is_given_up(tmp_path, monkeypatch):
    tokenizer = TextTokenizer(TextOptions(name="text", algorithm="chars"))
    path = tmp_path / "a.jsonl"
    path.write_text("1\n" * 1000)
    monkeypatch.setattr(text, "MOST_BAD_FIRST", 100)
    found = []
    with pytest.raises(Rejected, match="begins with 100 records that can't be used; line 1 it is a number"):
        found.extend(tokenizer.scan(source_of(path)))
    path.write_text("1\n" * 99 + '{"text": "a"}\n' + "1\n" * 500)
    assert len(list(tokenizer.scan(source_of(path)))) == 600


def test_very_many_empty_lines_are_few_parts():
    text = "a\n" + "\n" * 100_000 + "x" * 4096 + "\n\n\nb" + "\n" * 5000
    blocks = [text[start : start + 30_000] for start in range(0, len(text), 30_000)]
    parts = list(read_lines(blocks))
    assert "".join(parts) == text
    assert len(parts) < 50
    # The newline that ends a line does not come with those of empty ones.
    assert all(part.strip("\n") == "" or part.count("\n") <= 1 for part in parts)
    assert parts[parts.index("x" * 4096) + 1] == "\n"


@pytest.mark.parametrize("blank", [1, 2, 3, 5000])
@pytest.mark.parametrize("block", [7, 1000, 10**6])
def test_documents_and_lines_are_the_same_whatever_the_number_of_empty_lines_in_a_part(tmp_path, blank, block):
    between = "\n" * blank
    text = between + "one\ntwo\n" + between + "x" * 4096 + "\n" + between + "three" + between
    path = tmp_path / "a.txt"
    path.write_text(text)
    blocks = [text[start : start + block] for start in range(0, len(text), block)]
    found = {}
    for lines in (True, False):
        numbered = text_reading._by_text(read_lines(blocks), lines=lines)
        found[lines] = ["".join(part for _, part in run) for _, run in groupby(numbered, itemgetter(0))]
    long = "x" * 4096 + "\n" + between
    assert found[True] == [between + "one\n", "two\n" + between, long, "three" + between]
    assert found[False] == [between + "one\ntwo\n" + between, long, "three" + between]
    records = between + '{"text": "a"}\n' + between + '{"text": 1}' + between + '{"text": "b"}'
    path = tmp_path / "a.jsonl"
    path.write_text(records)
    assert [one.line for one in read_documents(path, "file")] == [blank + 1, 2 * blank + 2, 3 * blank + 2]


@pytest.mark.parametrize("after", ["afterwards", "BEFORE"])
def test_a_file_that_changes_meanwhile_is_noticed(tmp_path, trained, after):
    path = tmp_path / "a.txt"
    path.write_text("before")
    _, found = scanned(trained, path)
    path.write_text(after)
    with pytest.raises(Rejected, match="changed while") as raised:
        encoded(trained, found)
    assert raised.value.passing


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_file_that_changes_while_it_is_encoded_is_noticed_whatever_its_size(tmp_path, trained, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text('{"text": "before"}\n' * 2)
    _, found = scanned(trained, path)

    def assign(document):
        path.write_text('{"text": "BEFORE"}\n' * 2)
        return whole(document)

    with pytest.raises(Rejected, match="changed while") as raised:
        encoded(trained, found, assign)
    assert raised.value.passing


def test_a_file_that_changes_while_the_vocabulary_is_trained_on_it_is_noticed(tmp_path, trained):
    # It has its old bytes again when it is encoded, but the vocabulary is of others.
    path = tmp_path / "a.txt"
    path.write_text("before and after " * 100)
    _, found = scanned(trained, path)

    def assign(document):
        path.write_text("BEFORE AND AFTER " * 100)
        return whole(document)

    with pytest.raises(Rejected, match="changed while") as raised:
        TextTokenizer(TextOptions(name="text", vocabulary=300)).fit([found], assign)
    assert raised.value.passing


@pytest.mark.parametrize("after", [b"", b"before\xff", b"\0"])
def test_a_file_that_is_half_rewritten_is_not_rejected_for_good(tmp_path, after):
    tokenizer = TextTokenizer(TextOptions(name="text", algorithm="chars"))
    path = tmp_path / "a.txt"
    path.write_text("before")
    found = source_of(path)
    path.write_bytes(after)
    with pytest.raises(Rejected, match="changed while") as raised:
        list(tokenizer.scan(found))
    assert raised.value.passing
    with pytest.raises(Rejected) as raised:
        list(tokenizer.scan(source_of(path)))
    assert not raised.value.passing


def test_a_file_that_changes_under_the_reader_is_noticed(tmp_path, trained):
    path = tmp_path / "a.txt"
    path.write_text("before")
    _, found = scanned(trained, path)
    with pytest.raises(Rejected, match="changed while"):
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
    def fingerprint(model=trained.model, **config):
        return TextTokenizer(TextOptions(name="text", **config), model).fingerprint

    assert fingerprint(sample_mb=1, vocabulary=999) == fingerprint()
    different = [fingerprint(), fingerprint(documents="line"), fingerprint(b"", algorithm="chars")]
    different.append(fingerprint(b"", algorithm="chars", alphabet="abc"))
    assert len(set(different)) == len(different)


@pytest.mark.parametrize("config", [{"alphabet": "aba"}, {"algorithm": "chars", "model": "m.model"}])
def test_options_that_contradict_themselves(config):
    with pytest.raises(ValidationError, match=r"twice|takes no model"):
        TextOptions(name="text", **config)


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
    # It has no </s>, so EOS is an id after all of its pieces.
    assert (tokenizer.eos, tokenizer.vocabulary) == (50, 51)
    (tmp_path / "a.txt").write_text("The cat number \u4e00 went\u2581over")
    ids = tokenizer.prompt(tmp_path / "a.txt").tolist()
    tokenizer.decode([*ids, tokenizer.eos], tmp_path / "b.txt")
    assert (tmp_path / "b.txt").read_text().startswith("The cat number")
    assert allowed(tokenizer, ids)[tokenizer.eos]


def test_invalid_bytes_become_replacement_characters(tmp_path, trained):
    piece = trained.pieces.processor.piece_to_id
    units = trained.decode([piece("<0xE4>"), piece("<0xB8>"), piece("a")], tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "\ufffd\ufffda"
    assert units == {"byte": 7}


def test_masks_leave_out_control_pieces(trained):
    beginning, later = allowed(trained, []), allowed(trained, [5])
    assert not beginning[trained.eos]
    assert later[trained.eos]
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
    ids = np.concatenate([trained.prompt(path), [trained.eos]])
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


def fitted(tmp_path, content, **config):
    (tmp_path / "train.txt").write_text(content)
    tokenizer = TextTokenizer(TextOptions(name="text", **({"vocabulary": 300} | config)))
    tokenizer.fit([scanned(tokenizer, tmp_path / "train.txt")[1]], whole)
    return tokenizer


def back(tokenizer, tmp_path, content):
    """The text after encoding and decoding."""
    (tmp_path / "in.txt").write_bytes(content.encode())
    tokenizer.decode(tokenizer.prompt(tmp_path / "in.txt").tolist(), tmp_path / "out.txt")
    return (tmp_path / "out.txt").read_bytes().decode()


@pytest.mark.parametrize(
    ("normalization", "expected"), [("identity", "\ufb01ne \u212b\uff11"), ("nfkc", "fine \u00c51")]
)
def test_nfkc_brings_characters_to_one_form_and_identity_leaves_them(tmp_path, normalization, expected):
    tokenizer = fitted(tmp_path, LINES, normalization=normalization)
    assert back(tokenizer, tmp_path, "\ufb01ne \u212b\uff11") == expected
    assert tokenizer.description["lossless"] is (normalization == "identity")


@pytest.mark.parametrize(
    ("coverage", "content", "known"),
    [(1.0, LINES + "\u00e9", True), (0.98, "ab ba\n" * 2000 + "\u00e9" * 100, False)],
)
def test_the_coverage_says_which_characters_get_pieces(tmp_path, coverage, content, known):
    # One character in 26,000, which the default coverage would leave out; and one in 120, which it would keep.
    tokenizer = fitted(tmp_path, content, character_coverage=coverage, algorithm="char")
    ids = tokenizer.prompt(path_of(tmp_path, "\u00e9")).tolist()
    spelled = [tokenizer.pieces.processor.id_to_piece(i) for i in ids]
    assert spelled == (["\u00e9"] if known else ["<0xC3>", "<0xA9>"])
    assert back(tokenizer, tmp_path, "\u00e9") == "\u00e9"


def path_of(tmp_path, content):
    (tmp_path / "in.txt").write_bytes(content.encode())
    return tmp_path / "in.txt"


def test_the_algorithm_is_the_requested_one(trained):
    processor, kind = trained.pieces.processor, trained.options.algorithm
    numbers = range(processor.vocab_size())
    special = lambda i: processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i)  # noqa: E731
    pieces = [i for i in numbers if not special(i) and processor.id_to_piece(i) != "\n"]
    longest = max(len(processor.id_to_piece(i)) for i in pieces)
    scores = [processor.get_score(i) for i in pieces]
    assert (longest == 1) == (kind == "char")
    assert all(score == round(score) for score in scores) == (kind == "bpe")  # the number of the merge
    assert trained.vocabulary == 300 or kind == "char"
    assert processor.id_to_piece(trained.eos) == "</s>"


@pytest.mark.parametrize("budget", [1000, 5000, 9999, 10**6])
def test_lines_are_sampled_at_one_rate_over_the_whole_training_split(tmp_path, budget):
    halves = [("a" if number < 40 else "b") * 1000 + f"{number:02d}" for number in range(80)]
    (tmp_path / "a.txt").write_text("\n".join(halves[:60]) + "\n")
    (tmp_path / "b.txt").write_text("held out\n" * 1000)
    (tmp_path / "c.txt").write_text("\n".join(halves[60:]) + "\n")
    options = TextOptions(name="text").model_copy(update={"sample_mb": budget / 1e6})
    tokenizer = TextTokenizer(options)
    sources = [scanned(tokenizer, tmp_path / name)[1] for name in ("a.txt", "b.txt", "c.txt")]
    total = 80 * 1003 + 9000
    assert sum(found.size for found in sources) == total
    held_out = hashlib.sha256(b"held out\n" * 1000).hexdigest()
    found = list(tokenizer._sample(sources, lambda d: [("val" if d.sha256 == held_out else "train", d.size)]))
    expected, used = [], 0
    for number, line in enumerate(halves, 1):  # a line of more than 1,000 characters is a segment
        if used * total <= number * 1003 * budget:
            expected.append(line)
            used += 1002
    assert found == expected
    assert tokenizer.trained_on == {"trained_on_bytes": used, "training_split_bytes": 80 * 1003}
    # As many from the first half as from the second, except that the first line is always taken.
    counts = [sum(line[0] == letter for line in found) for letter in "ab"]
    assert abs(counts[0] - counts[1]) <= 1
    assert len(found) == min(80, round(budget * 80 * 1003 / total / 1002 + 0.5))


def test_a_small_sample_makes_pieces_of_all_the_text(tmp_path):
    (tmp_path / "a.txt").write_text(LINES + LINES.upper())
    options = TextOptions(name="text", vocabulary=320, algorithm="bpe").model_copy(update={"sample_mb": 0.01})
    tokenizer = TextTokenizer(options)
    tokenizer.fit([scanned(tokenizer, tmp_path / "a.txt")[1]], whole)
    pieces = {tokenizer.pieces.processor.id_to_piece(i) for i in range(tokenizer.vocabulary)}
    assert set("thewnumbrovilandfysg" + "THEWNUMBROVILANDFYSG") <= pieces


def segment_lengths(content, shortest, longest):
    """Literally by the docstring of `segments`, character by character."""
    lengths = []
    while content:
        window = content[:longest]
        newlines = [place for place, character in enumerate(window) if character == "\n" and place >= shortest]
        spaces = [place for place, character in enumerate(window) if character == " "]
        if newlines:
            size = newlines[0] + 1
        elif len(content) < longest:
            size = len(content)
        else:
            size = spaces[-1] + 1 if spaces else longest
        lengths.append(size)
        content = content[size:]
    return lengths


@settings(max_examples=80, deadline=None)
@given(st.text(st.sampled_from("aab \n\u00e9"), max_size=200), st.integers(2, 20), st.data())
@example("aaa\naaaa", 4, None)
@example("aaaa\na", 8, None)
def test_segments_end_at_a_newline_or_after_the_last_space(content, longest, data):
    shortest = longest // 2 if data is None else data.draw(st.integers(0, longest - 1))
    found = list(text_reading.segments([content], shortest, longest))
    assert [len(segment) for segment in found] == segment_lengths(content, shortest, longest)
    assert "".join(found) == content


def test_default_segments_have_1000_to_4096_characters():
    content = "a" * 999 + "\n\n" + "b" * 10 + "\n" + "c" * 4095 + " " + "d" * 5000
    assert [len(segment) for segment in text_reading.segments([content])] == segment_lengths(content, 1000, 4096)
    assert [len(segment) for segment in text_reading.segments([content])] == [1001, 4096, 11, 4096, 904]


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.sampled_from("a\u00e9\u4e00\U0001f600"), max_size=30),
    st.lists(st.integers(0, 12), max_size=8),
    st.integers(1, 7),
)
def test_parts_are_cut_at_the_first_character_boundary_from_each_byte_count(content, sizes, chunk):
    sizes = [*sizes, max(0, len(content.encode()) - sum(sizes))]
    begins = [len(content[:n].encode()) for n in range(len(content) + 1)]
    cuts, asked = [0], 0
    for size in sizes:
        asked += size
        cuts.append(min((place for place in begins if place >= asked), default=begins[-1]))
    cutter = text_reading.Cutter(iter(content[n : n + chunk] for n in range(0, len(content), chunk)))
    for first, last, size in zip(cuts, cuts[1:], sizes, strict=False):
        units = {"byte": 0}
        assert "".join(cutter.take(size, units)).encode() == content.encode()[first:last]
        assert units["byte"] == last - first


@pytest.mark.parametrize("block", [1, 2, 3, 5, 7, 1000])
@pytest.mark.parametrize(
    "content",
    [
        b"abc\xffdef",
        "ab\u4e00\u4e00".encode() + b"\x80x",
        "\u4e00".encode() + b"\xe4\xb8",
        "ab\U0001f600".encode() + b"\xf0\x9fa",
        b"abcde\xc3(",
    ],
)
def test_invalid_bytes_are_named_by_their_place(tmp_path, content, block):
    with pytest.raises(UnicodeDecodeError) as expected:
        content.decode()
    start = expected.value.start
    (tmp_path / "a.txt").write_bytes(content)
    with mock.patch.object(text_reading, "BLOCK_BYTES", block), pytest.raises(Rejected) as found:
        list(text_reading.read_blocks(tmp_path / "a.txt"))
    assert str(found.value).startswith(f"is not UTF-8: byte 0x{content[start]:02x} at offset {start} (")


@pytest.mark.parametrize("kind", ["file", "line"])
def test_a_character_without_an_id_is_named_by_its_byte_in_the_file(tmp_path, kind):
    options = TextOptions(name="text", algorithm="chars", alphabet="\u00e9\nab\u4e00", documents=kind)
    tokenizer = TextTokenizer(options)
    content = "\u00e9a\n\u4e00b\n\u4e00\u00e9Zab"
    (tmp_path / "a.txt").write_text(content)
    place = len("\u00e9a\n\u4e00b\n\u4e00\u00e9".encode())
    for block in (2, 1000):
        with (
            mock.patch.object(text_reading, "BLOCK_BYTES", block),
            pytest.raises(Rejected, match=f"'Z' at byte {place},"),
        ):
            scanned(tokenizer, tmp_path / "a.txt")
    assert tokenizer.prompt(path_of(tmp_path, "ab\n\u00e9\u4e00")).tolist() == [2, 3, 1, 0, 4]
    assert (tokenizer.vocabulary, tokenizer.eos) == (6, 5)


def test_only_a_newline_ends_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes("a\r\nb\u2028c\x0bd\x85\n\ne".encode())
    assert texts_of(tmp_path / "a.txt", "line") == ["a\r\n", "b\u2028c\x0bd\x85\n\n", "e"]


@pytest.mark.parametrize("kind", ["file", "line", "paragraph"])
def test_records_are_documents_whatever_the_recipe_says_and_are_counted_from_one(tmp_path, kind):
    records = [json.dumps({"text": record, "id": 3}) for record in ("a\n\nb", "", "\u4e00" * 3000)]
    (tmp_path / "A.JSONL").write_text("\n".join([records[0], " ", *records[1:]]))
    found = list(text_reading.read_documents(tmp_path / "A.JSONL", kind))
    assert [(one.line, "".join(one.chunks)) for one in found] == [(1, "a\n\nb"), (3, ""), (4, "\u4e00" * 3000)]


GOOD = '{"text": "good", "data": {"body": "deep"}}'
BAD_RECORDS = [
    ('{"text": "\\ud800 a"}', "has a lone surrogate, U+D800, which is no character"),
    ("[]", "it is an array, not an object"),
    ("5", "it is a number, not an object"),
    ("true", "it is a boolean, not an object"),
    ('"text"', "it is a string, not an object"),
    ("null", "it is null, not an object"),
    ('{"txt": "b"}', "has no field 'text'"),
    ('{"text": null}', "the field 'text' is null, not a string"),
    ('{"text": ["b"]}', "the field 'text' is an array, not a string"),
    ('{"text": "cut her', "is not JSON: Unterminated string starting at character 10"),
    ("{", "is not JSON: Expecting property name enclosed in double quotes at character 2"),
    ('{"text": "a"} x', "is not JSON: Extra data at character 15"),
    ('{"text": "\u00e9\udcff"}', "is not UTF-8: byte 0xff at offset 12 of the line"),
    ('{"\udcc3": 1, "text": "a"}', "is not UTF-8: byte 0xc3 at offset 2 of the line"),
    ('{"text": "cut \udce4\udcb8', "is not UTF-8: byte 0xe4 at offset 14 of the line"),  # within a character
    ("1" * 5000, None),
    ("[" * 100_000, "is nested too deeply"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_RECORDS, ids=[ascii(bad[:20]) for bad, _ in BAD_RECORDS])
def test_one_bad_record_costs_only_itself(tmp_path, trained, bad, reason):
    after = GOOD.replace("good", "after")
    lines = [GOOD, after, bad] if "cut" in bad else [GOOD, "", bad, after]
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    found = list(trained.scan(source_of(tmp_path / "a.jsonl")))
    rejected = [one for one in found if isinstance(one, RejectedRecord)]
    assert [one.line for one in rejected] == [3]
    assert rejected[0].reason == reason or (reason is None and rejected[0].reason.startswith("is not JSON: "))
    documents, source = scanned(trained, tmp_path / "a.jsonl")
    texts = [trained.pieces.decode(ids) for _, _, ids in encoded(trained, source)]
    assert texts == [json.loads(line)["text"] for line in lines if line and line != bad]
    assert [document.offset for document in documents] == [0, 4]
    assert [document.line for document in documents] == [lines.index(GOOD) + 1, 2 if lines[-1] == bad else 4]
    with pytest.raises(Rejected, match="line 3 "):
        trained.prompt(tmp_path / "a.jsonl")


def test_a_character_without_an_id_costs_only_its_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "ab"}\n{"text": "abZ"}\n{"text": "b"}\n')
    tokenizer = TextTokenizer(TextOptions(name="text", algorithm="chars", alphabet="ab"))
    first, bad, last = tokenizer.scan(source_of(tmp_path / "a.jsonl"))
    assert (first.line, last.line, last.offset) == (1, 3, 2)
    assert bad == RejectedRecord(2, "has the character 'Z' at byte 2, which is not in tokenizer.alphabet")


def test_the_field_of_a_record_is_named_by_a_dotted_key(tmp_path, trained):
    (tmp_path / "a.jsonl").write_text(GOOD + '\n{"data": 5}\n{"data": {"text": "b"}}\n')
    options = trained.options.model_copy(update={"field": "data.body"})
    tokenizer = TextTokenizer(options, trained.model)
    document, one, other = tokenizer.scan(source_of(tmp_path / "a.jsonl"))
    assert document.sha256 == hashlib.sha256(b"deep").hexdigest()
    assert one == RejectedRecord(2, "the field 'data' is a number, not an object")
    assert other == RejectedRecord(3, "has no field 'data.body'")
    (tmp_path / "b.jsonl").write_text(GOOD)
    assert tokenizer.prompt(tmp_path / "b.jsonl").tolist() == trained.prompt(path_of(tmp_path, "deep")).tolist()
    for wrong in ("", "a..b", ".a"):
        with pytest.raises(ValidationError, match="not a dotted name"):
            TextOptions(name="text", field=wrong)


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.tokens", "a.txt.gz"])
@pytest.mark.parametrize("block", [1, 2, 1000])
def test_a_byte_order_mark_is_dropped_and_counted(tmp_path, trained, name, block):
    content = "one two\n" if "jsonl" not in name else '{"text": "one two"}\n'
    documents = []
    for mark in (b"", b"\xef\xbb\xbf"):
        whole_file = mark + content.encode()
        (tmp_path / name).write_bytes(gzip.compress(whole_file) if name.endswith("gz") else whole_file)
        with mock.patch.object(text_reading, "BLOCK_BYTES", block):
            documents += scanned(trained, tmp_path / name)[0]
    plain, marked = documents
    assert (plain.account, marked.account) == ({}, {"byte_order_marks_dropped": 1})
    assert replace(marked, account={}) == plain
    assert (
        trained.prompt(tmp_path / name).tolist()
        == trained.prompt(path_of(tmp_path, "one two\n" if "jsonl" not in name else "one two")).tolist()
    )


def test_only_the_first_character_of_a_file_is_a_byte_order_mark(tmp_path, trained):
    (tmp_path / "a.txt").write_text("\ufeff\ufeffa\ufeff\nb\n")
    tokenizer = TextTokenizer(trained.options.model_copy(update={"documents": "line"}), trained.model)
    for block in (3, 1000):
        with mock.patch.object(text_reading, "BLOCK_BYTES", block):
            documents, found = scanned(tokenizer, tmp_path / "a.txt")
            texts = [tokenizer.pieces.decode(ids) for _, _, ids in encoded(tokenizer, found)]
        assert texts == ["\ufeffa\ufeff\n", "b\n"]
        assert [document.account for document in documents] == [{"byte_order_marks_dropped": 1}, {}]


def test_a_place_is_counted_from_the_beginning_of_the_file_a_byte_order_mark_included(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab\nabZ")
    tokenizer = TextTokenizer(TextOptions(name="text", algorithm="chars", alphabet="ab\n", documents="line"))
    for block in (1, 5, 1000):
        with mock.patch.object(text_reading, "BLOCK_BYTES", block), pytest.raises(Rejected, match="'Z' at byte 8,"):
            list(tokenizer.scan(source_of(tmp_path / "a.txt")))


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("a \t\n\r"), min_size=1))
@example("\n\na\n\n\nb\n \nc")
@example("\r\n a\r\n\r\nb\r\n")
@example("a\n \t")
@example("\n\n")
def test_blank_lines_belong_to_the_line_before_them(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("t") / "x.txt"
    path.write_bytes(content.encode())
    expected = [""]
    for line in content.split("\n"):
        if line.strip() and expected[-1].strip():
            expected.append("")
        expected[-1] += line + "\n"
    expected[-1] = expected[-1][:-1]  # the split makes one newline too many
    found = texts_of(path, "line")
    assert found == expected
    assert "".join(found) == content


SPACES = [chr(code) for code in range(0x110000) if chr(code).isspace()]


def test_the_spaces_are_all_of_unicodes():
    assert text_reading.SPACES == SPACES


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.sampled_from(["a", "\u00e9", "\u4e00", "\n", " ", *SPACES]), max_size=60), st.lists(st.integers(0, 9))
)
@example(" ", [])
@example("ab", [1])
@example("\u00a0a\u3000b\x85c\n", [3, 1])
def test_words_are_counted_over_chunks_as_over_the_whole(content, sizes):
    for short in (0, 5, 1000):
        counter, units, place = text_reading.UnitCounter(), {}, 0
        with mock.patch.object(text_reading, "SHORT_CHARS", short):
            for size in [*sizes, len(content)]:
                chunk = content[place : place + size]
                counter.add(chunk, chunk.encode(), units)
                place += size
        assert units == (units_of(content) if content else {})


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.sampled_from("ab\u00e9\u00a0 \n"), max_size=60),
    st.lists(st.integers(0, 9), max_size=5),
    st.integers(1, 9),
)
def test_a_word_that_is_cut_belongs_to_the_part_in_which_it_begins(content, sizes, chunk):
    cutter = text_reading.Cutter(iter(content[n : n + chunk] for n in range(0, len(content), chunk)))
    place = 0
    for size in [*sizes, len(content.encode())]:
        units = {"byte": 0, "character": 0, "word": 0}
        part = "".join(cutter.take(size, units))
        begins = [
            n
            for n in range(place, place + len(part))
            if not content[n].isspace() and (not n or content[n - 1].isspace())
        ]
        assert units == units_of(part) | {"word": len(begins) + part.count("\n")}
        place += len(part)


def test_what_nfkc_changes_is_counted_by_document(tmp_path):
    lines = ["plain\n", "\ufb01ne\n", "\u00e9\n", "e\u0301\n"]  # a ligature; composed; an accent apart
    (tmp_path / "a.txt").write_text("".join(lines))
    for normalization, expected in (("nfkc", [0, 1, 0, 1]), ("identity", [0, 0, 0, 0])):
        tokenizer = TextTokenizer(TextOptions(name="text", normalization=normalization, documents="line"))
        for block in (1, 1000):
            with mock.patch.object(text_reading, "BLOCK_BYTES", block):
                documents, _ = scanned(tokenizer, tmp_path / "a.txt")
            assert [document.account.get("documents_normalized", 0) for document in documents] == expected
    path_of(tmp_path, "an accent apart: e\u0301")
    tokenizer = TextTokenizer(TextOptions(name="text", normalization="nfkc"))
    for block in (1, 1000):  # in blocks of one byte, no block is changed
        with mock.patch.object(text_reading, "BLOCK_BYTES", block):
            ((document,), _) = scanned(tokenizer, tmp_path / "in.txt")
        assert document.account == {"documents_normalized": 1}


def test_the_sign_of_sentencepiece_is_its_three_bytes(trained, tmp_path):
    ids = trained.prompt(path_of(tmp_path, "a\u2581\u2581b")).tolist()
    assert [trained.pieces.processor.id_to_piece(i) for i in ids] == ["a", *["<0xE2>", "<0x96>", "<0x81>"] * 2, "b"]


def test_every_option_that_changes_ids_is_in_the_fingerprint_and_checked_on_loading(tmp_path, trained, monkeypatch):
    def fingerprint(model=trained.model, **config):
        return TextTokenizer(TextOptions(name="text", **config), model).fingerprint

    different = [
        fingerprint(),
        fingerprint(trained.model[:-1] + bytes([trained.model[-1] ^ 1])),
        fingerprint(documents="line"),
    ]
    different += [fingerprint(b"", algorithm="chars", alphabet=alphabet) for alphabet in ("abc", "bca", "abcd")]
    different += [fingerprint(documents="paragraph"), fingerprint(field="body")]
    for name in ("MIN_SEGMENT_CHARS", "MAX_SEGMENT_CHARS"):
        with monkeypatch.context() as patch:
            patch.setattr(text, name, 77)
            different.append(fingerprint())
    assert len(set(different)) == len(different)
    trained.save(tmp_path)
    for change in ({"normalization": "nfkc"}, {"alphabet": "xyz"}, {"documents": "paragraph"}, {"field": "body"}):
        with pytest.raises(CheckFailed, match="another configuration"):
            TextTokenizer.load(trained.options.model_copy(update=change), tmp_path)
    same = trained.options.model_copy(update={"sample_mb": 1, "vocabulary": 999, "character_coverage": 0.5})
    assert TextTokenizer.load(same, tmp_path).fingerprint == trained.fingerprint
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    del content["options"]["field"]  # as versions without this option wrote it
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert TextTokenizer.load(same, tmp_path).fingerprint == trained.fingerprint


def test_the_constraint_requires_text_before_eos(trained):
    processor = trained.pieces.processor
    control = {
        i for i in range(300) if i < processor.vocab_size() and (processor.is_control(i) or processor.is_unknown(i))
    }
    assert trained.eos in control
    for ids, expected in (([], control), ([7], control - {trained.eos}), ([7, 8], control - {trained.eos})):
        assert set(np.flatnonzero(~allowed(trained, ids)).tolist()) == expected
    constraint = trained.constraint()
    assert constraint.needed == 1
    constraint.push(7)
    assert constraint.needed == 0


def test_each_newline_is_a_piece_of_its_own(trained, tmp_path):
    ids = trained.prompt(path_of(tmp_path, "a\n\n\nb\n")).tolist()
    assert [trained.pieces.processor.id_to_piece(i) for i in ids] == ["a", "\n", "\n", "\n", "b", "\n"]


@pytest.mark.parametrize("normalization", ["identity", "nfkc"])
def test_sentencepiece_gets_all_of_long_lines_in_parts_that_it_does_not_drop(tmp_path, normalization):
    lines = ["a" * 3000, "\u4e00" * 2500 + "\u2581" + "bc" * 300, "", "d", "\U0001f600" * 1500]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    config = {"algorithm": "bpe", "vocabulary": 777, "character_coverage": 0.99, "normalization": normalization}
    tokenizer, asked = TextTokenizer(TextOptions(name="text", **config)), {}

    def train(sentence_iterator, **given):
        asked.update(given, lines=list(sentence_iterator))

    with mock.patch.object(sentencepiece.SentencePieceTrainer, "train", train):
        assert tokenizer.fit([scanned(tokenizer, tmp_path / "a.txt")[1]], whole) is None
    assert "".join(asked["lines"]) == "".join(lines).replace("\u2581", "")
    # SentencePiece drops lines of more than 4,192 bytes.
    assert all(0 < len(line.encode()) <= 4192 for line in asked["lines"])
    expected = {"model_type": "bpe", "vocab_size": 777, "character_coverage": 0.99, "num_threads": 1}
    assert {key: asked[key] for key in expected} == expected
    assert asked["normalization_rule_name"] == normalization
    assert tokenizer.trained_on["trained_on_bytes"] == len("".join(lines).encode())


def test_texts_are_encoded_in_batches_of_the_requested_scale(tmp_path, trained, monkeypatch):
    path = path_of(tmp_path, LINES)
    encode, sizes = text_vocabulary.Pieces.encode, []

    def noted(self, texts, threads):
        sizes.append(sum(map(len, texts)))
        return encode(self, texts, threads)

    tokenizer = TextTokenizer(trained.options, trained.model)
    found, expected = scanned(tokenizer, path)[1], encoded(trained, scanned(trained, path)[1])
    assert tokenizer.pieces.lossless  # which encodes a probe
    monkeypatch.setattr(text, "BATCH_CHARS", 2000)
    monkeypatch.setattr(text_vocabulary.Pieces, "encode", noted)
    for scale in (0.5, 1, 3):
        tokenizer.block_scale = scale
        sizes.clear()
        assert encoded(tokenizer, found) == expected
        assert sum(sizes) == len(LINES)
        assert all(2000 * scale <= size < 2000 * scale + text_reading.MAX_SEGMENT_CHARS for size in sizes[:-1])


@pytest.mark.parametrize(
    ("options", "valid"),
    [
        ({"vocabulary": 259}, False),
        ({"vocabulary": 260}, True),
        ({"character_coverage": 0.0}, False),
        ({"character_coverage": 1e-6}, True),
        ({"character_coverage": 1.0}, True),
        ({"character_coverage": 1.001}, False),
        ({"sample_mb": 0}, False),
        ({"sample_mb": 1}, True),
        ({"alphabet": ""}, False),
        ({"alphabet": "a"}, True),
    ],
)
def test_options_have_bounds(options, valid):
    if valid:
        assert TextOptions(name="text", **options).model_dump().items() >= options.items()
    else:
        with pytest.raises(ValidationError, match=next(iter(options))):
            TextOptions(name="text", **options)


def test_options_that_are_left_out():
    assert TextOptions(name="text").model_dump() == {
        "name": "text",
        "algorithm": "unigram",
        "vocabulary": 8000,
        "model": "",
        "documents": "file",
        "field": "text",
        "normalization": "identity",
        "character_coverage": 0.9995,
        "sample_mb": 32,
        "alphabet": " abcdefghijklmnopqrstuvwxyz",
    }


def test_a_tokenizer_crosses_to_another_process(tmp_path, trained):
    (tmp_path / "a.txt").write_text(LINES)
    expected = trained.prompt(tmp_path / "a.txt").tolist()
    assert "pieces" in trained.__dict__
    state = pickle.dumps(trained)
    assert b"SentencePieceProcessor" not in state
    assert pickle.loads(state).prompt(tmp_path / "a.txt").tolist() == expected


def test_what_the_manifest_says_of_characters():
    tokenizer = TextTokenizer(TextOptions(name="text", algorithm="chars"))
    assert tokenizer.description == {"library": "none", "lossless": True}
    assert [len(mask) for mask in (tokenizer.constraint().allowed(3), tokenizer.pieces.anything)] == [28, 28]
    assert tokenizer.vocabulary == 28


@pytest.mark.parametrize(("lines", "exactly"), [(2000, True), (1037, False)])
def test_the_share_of_a_sample_is_exact(tmp_path, lines, exactly):
    """N lines of 1,000 bytes and a newline, a segment each: line k is taken after m others if m N <= 1000 k."""
    (tmp_path / "a.txt").write_text("".join(f"{number:04}{'x' * 996}\n" for number in range(lines)))
    tokenizer = TextTokenizer(TextOptions(name="text", sample_mb=1))
    _, found = scanned(tokenizer, tmp_path / "a.txt")
    taken, nearest = [], []
    for number in range(1, lines + 1):
        nearest.append(len(taken) * lines - 1000 * number)
        if nearest[-1] <= 0:
            taken.append(number - 1)
    assert [int(line[:4]) for line in tokenizer._sample([found], whole)] == taken
    # One line is at the bound exactly; or beyond it by so little that a millionth more in the budget would take it.
    assert 0 in nearest if exactly else any(0 < over * 1000 <= k for k, over in enumerate(nearest, 1))


def test_only_what_lies_behind_other_splits_is_learned_from(tmp_path):
    (tmp_path / "a.txt").write_text("held out\n" * 300 + "training\n" * 300)
    tokenizer = TextTokenizer(TextOptions(name="text"))
    _, found = scanned(tokenizer, tmp_path / "a.txt")
    assign = lambda document: [("val", 2700), ("train", document.size - 2700)]  # noqa: E731
    assert list(tokenizer._sample([found], assign)) == ["training"] * 300
    assert tokenizer.trained_on == {"trained_on_bytes": 2400, "training_split_bytes": 2700}


def test_a_piece_names_its_document_and_its_split(tmp_path, trained):
    (tmp_path / "a.txt").write_text("one two three\n" * 10)
    (document,), found = scanned(trained, tmp_path / "a.txt")
    pieces = [
        (piece.document, piece.split, [*map(len, piece.ids)] != [])
        for piece in trained.encode(found, lambda _: [("test", 28), ("train", 112)], 1)
    ]
    assert pieces == [(document, "test", True), (document, "train", True)]


def test_a_file_that_grows_by_a_document_is_noticed(tmp_path, trained, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")
    tokenizer = TextTokenizer(trained.options.model_copy(update={"documents": "line"}), trained.model)
    _, found = scanned(tokenizer, path)
    calls = []

    def read(path, _kind, **_):
        calls.append(path)
        grown = [["three\n"]] if len(calls) == 1 else []  # the texts; the second call is that of the scan
        return iter([text_reading.Text(iter(chunks)) for chunks in [["one\n"], ["two\n"], *grown]])

    monkeypatch.setattr(text, "read_documents", read)
    assert len(encoded(tokenizer, found)) == 2
    assert len(calls) == 2


def test_a_class_is_that_of_the_first_character(trained):
    spellings = [" a1", "1a", " ,a", "  ", "\n", "a,", "é", "", None, "x"]
    tokenizer = TextTokenizer(trained.options, trained.model)
    tokenizer.__dict__["pieces"] = SimpleNamespace(spelling=spellings.__getitem__, eos_id=9, adds_eos=False, size=10)
    names = ["letter", "digit", "punctuation", "space", "space", "letter", "letter", "space", "byte or control", "end"]
    found = tokenizer.classes(np.arange(10))["character"]
    assert [found.names[number] for number in found.of] == names


def test_the_unknown_piece_is_no_text(trained):
    assert trained.pieces.spelling(0) is None
    assert trained.pieces.spelling(trained.eos) is None
    assert trained.pieces.shown(0) == "<unk>"


def test_the_saved_description_has_its_keys_in_order(tmp_path, trained):
    trained.save(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text()
    assert content == json.dumps(json.loads(content), indent=1, sort_keys=True) + "\n"


@pytest.mark.parametrize("more", [-2, -1, 0, 1, 2])
def test_long_lines_come_in_parts_of_4096(tmp_path, more):
    lines = ["x" * (4096 + more) + "\n", "y" * (2 * 4096 + more) + "\n", "z" * (4096 + more)]
    (tmp_path / "a.txt").write_text("".join(lines))
    parts = [line[first : first + 4096] for line in lines for first in range(0, len(line), 4096)]
    assert list(text_reading.read_lines(text_reading.read_blocks(tmp_path / "a.txt"))) == parts


def test_a_line_of_4096_characters_is_never_blank(tmp_path):
    """More of it may follow, and it is not known what."""
    for spaces, count in ((4094, 2), (4095, 1), (5000, 1)):
        (tmp_path / "a.txt").write_text("a\n" + " " * spaces + "\nb\n")
        assert len(texts_of(tmp_path / "a.txt", "paragraph")) == count


@given(st.lists(st.integers(0, 9), max_size=30), st.integers(1, 20))
@example([3, 4, 5], 7)
@example([7, 6, 1, 2], 7)
def test_batches_have_as_many_characters_as_asked_for_or_little_more(sizes, chars):
    items = [(number, "x" * size) for number, size in enumerate(sizes)]
    expected = [[]]
    for item in items:
        if sum(len(content) for _, content in expected[-1]) >= chars:
            expected.append([])
        expected[-1].append(item)
    assert list(text._batches(items, chars)) == [batch for batch in expected if batch]


def test_an_existing_model_may_end_with_its_first_id(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES.splitlines()),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        eos_id=0,
        unk_id=1,
        bos_id=-1,
        minloglevel=2,
    )
    (tmp_path / "a.model").write_bytes(model.getvalue())
    tokenizer = TextTokenizer(TextOptions(name="text", model=str(tmp_path / "a.model")))
    assert (tokenizer.eos, tokenizer.vocabulary) == (0, 300)


def test_a_trained_model_ends_with_id_1_and_its_training_says_nothing(tmp_path, capfd):
    (tmp_path / "a.txt").write_text(LINES)
    tokenizer = TextTokenizer(TextOptions(name="text", vocabulary=300))
    tokenizer.fit([scanned(tokenizer, tmp_path / "a.txt")[1]], whole)
    assert (tokenizer.eos, tokenizer.vocabulary) == (1, 300)
    assert capfd.readouterr() == ("", "")


def test_a_vocabulary_that_the_characters_do_not_fit_in(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(0x4E00 + number) + "\n" for number in range(100)) * 3)
    options = {"name": "text", "character_coverage": 1.0}
    small = TextTokenizer(TextOptions(**options, vocabulary=280))
    source = scanned(small, tmp_path / "a.txt")[1]
    with pytest.raises(UsageError) as raised:
        small.fit([source], whole)
    need = 256 + 2 + 1 + 100  # bytes, <unk> and </s>, the newline, the characters
    assert raised.value.message == (
        f"tokenizer.vocabulary 280 is smaller than the number of single characters and bytes ({need})"
    )
    assert raised.value.hint == f"--set tokenizer.vocabulary={need}, or more"
    enough = TextTokenizer(TextOptions(**options, vocabulary=need))
    enough.fit([source], whole)
    assert enough.vocabulary == need


def test_a_training_that_fails_says_what_sentencepiece_said(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(LINES)
    tokenizer = TextTokenizer(TextOptions(name="text"))
    source = scanned(tokenizer, tmp_path / "a.txt")[1]
    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", mock.Mock(side_effect=RuntimeError("no luck")))
    with pytest.raises(UsageError) as raised:
        tokenizer.fit([source], whole)
    assert raised.value.message == "SentencePiece training failed: no luck"
    assert raised.value.hint == "give more text, or another tokenizer.vocabulary"


@pytest.mark.parametrize(("letter", "most"), [("a", 1000), ("\u00e9", 250)])
def test_a_record_that_takes_too_much_memory_costs_only_itself(tmp_path, monkeypatch, letter, most):
    monkeypatch.setattr(text_reading, "RECORD_BYTES", 10_000)
    monkeypatch.setattr(text_reading, "MAX_SEGMENT_CHARS", 100)
    monkeypatch.setattr(text_reading, "LINE_PART", re.compile("[^\n]{0,99}\n|[^\n]{1,100}"))
    extra = len('{"text": ""}\n')
    fits, too_long = letter * (10 * most - extra), letter * (10 * most - extra + 1)
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in (fits, too_long, "last")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    first, bad, last = text_reading.read_documents(tmp_path / "a.jsonl", "file")
    assert ("".join(first.chunks), first.line) == (fits, 1)
    assert (bad.line, "is longer than" in bad.reason) == (2, True)
    assert ("".join(last.chunks), last.line) == ("last", 3)
