"""Evaluation: every token is scored once, and all numbers equal those of plain loops."""

import itertools
import json
import math
from collections import Counter
from copy import deepcopy
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import quiet
from hypothesis import given
from hypothesis import strategies as st
from test_floors import Plain, plain_discounts
from test_models import reference

from shortcut_cli import files, registry
from shortcut_cli.config import reading
from shortcut_cli.data.shards import FolderWriter, Shards
from shortcut_cli.errors import TooManyRejects, UsageError
from shortcut_cli.events import Note, Progress
from shortcut_cli.inference import floors, runs
from shortcut_cli.stages import evaluation, pipeline
from shortcut_cli.tokenizers.text import TextTokenizer
from shortcut_cli.training import checkpoint, precision, tensor_file

# Initial weights at which each part of a model does something, and no norms but those of the layers' inputs.
START = ("model.init=gpt2", "model.qk_norm=false")
ALPHABET = "ab1 ."
EOS = len(ALPHABET)


def made_run(folder, *settings, name="shortcut"):
    """A small untrained run, with weights so large that its predictions are confident and its attention is sharp."""
    tiny = ("model.layers=4", "model.width=8", "model.heads=2", "model.context=7", "model.ffn=8", "model.tied=false")
    text = ("tokenizer.algorithm=chars", f"tokenizer.alphabet={ALPHABET}", "model.shortcut.map_width=8")
    config = reading.read("text-tiny", [*text, *tiny, *START, "eval.stride=3", f"model.name={name}", *settings])
    model = registry.load(registry.MODELS, name)(config.model, EOS + 1, 1).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(20)
            elif parameter_name.endswith("gate"):
                parameter.copy_(torch.tensor([0.7, -1.3]))
    tokenizer = TextTokenizer(config.tokenizer)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    packed = {"fingerprint": tokenizer.fingerprint, "files": checkpoint.pack_folder(folder / "tokenizer")}
    content = {
        "format": checkpoint.FORMAT,
        "recipe": config.model_dump(),
        "model": model.state_dict(),
        "vocabulary": EOS + 1,
        "tokenizer": packed,
        "shards": "",
        "step": 23,
        "scores": {"validation": 1.0},
        "versions": tensor_file.versions(),
    }
    return runs.Run(folder / "run.pt", config, model, content)


def made_shards(folder, run, documents, **more):
    """Shards of (split, ids without EOS), in several files; seven notes per document, some bytes, and `more` units."""
    folder.mkdir()
    with FolderWriter(folder, EOS + 1, 50, eos=EOS) as writer:
        for split, ids in documents:
            writer.add(split, [np.array(ids, int)], {"byte": 1.0 + len(ids), "note": 7.0, **more}, {})
        (writer.partial / "tokenizer" / "tokenizer.json").write_text("{}")
        fingerprint = run.content["tokenizer"]["fingerprint"]
        kind = {"name": "text", "fingerprint": fingerprint, "vocabulary": EOS + 1, "end": EOS, "unit": "note"}
        writer.finish([], {"request": {}, "tokenizer": kind})
    return Shards(folder)


def made_documents(counts, seed=0):
    """Documents of 0 to 24 ids; `counts` gives their number in each split, and the splits take turns."""
    generator = np.random.default_rng(seed)
    splits = [split for number in range(99) for split, count in counts.items() if number < count]
    return [(split, generator.integers(0, EOS, generator.integers(0, 25)).tolist()) for split in splits]


def plain_scores(run, ids, eos, stride):
    """For each of `ids`, by a loop: loss, whether the most probable token is right, and attention weights (H, M).

    Target t is scored in the window that ends with the last of its `stride` targets, and begins a context before that.
    """
    context, model = run.recipe.model.context, deepcopy(run.model).double()
    inputs = [eos, *ids[:-1]]

    @cache
    @torch.no_grad()
    def predicted(first, last):
        x = torch.tensor([inputs[first:last]])
        logits, shares = reference(model, x) if model.taps else (model(x), torch.zeros(1, 1, 1, last - first))
        return logits[0].log_softmax(-1), shares[0]

    scores = []
    for t, target in enumerate(ids):
        last = min((t // stride + 1) * stride, len(ids))
        first = max(0, last - context)
        logs, shares = predicted(first, last)
        row = logs[t - first]
        scores.append((-row[target].item(), int(row.argmax()) == target, shares[:, :, t - first]))
    return scores


def plain_interval(nats, tokens, resamples):
    """Percentiles of the ratio of sums over groups drawn with replacement, by numpy's generator with seed 0."""
    generator = np.random.default_rng(0)
    ratios = []
    for _ in range(resamples):
        drawn = generator.integers(0, len(nats), len(nats))
        ratios.append(sum(nats[g] for g in drawn) / sum(tokens[g] for g in drawn))
    ratios.sort()
    return [np.interp(share * (resamples - 1), range(resamples), ratios) for share in (0.025, 0.975)]


SPLITS = {  # documents of each split: how many, and what the interval is over
    "many": ({"train": 3, "val": 12, "test": 5}, "val", "documents"),
    "just enough": ({"train": 3, "val": 5, "test": 10}, "test", "documents"),
    "too few": ({"train": 3, "val": 5, "test": 9}, "test", "blocks"),
    "few tokens": ({"train": 3, "val": 2, "test": 5}, "val", "blocks"),
}
ARMS = {
    "add": (["model.shortcut.mode=add", "model.shortcut.taps=0,2,3"], ["own keys", "embedding", "layer 2", "layer 3"]),
    "gated": (["model.shortcut.mode=gated", "model.shortcut.taps=1,3"], ["layer 1", "layer 3"]),
    "replace": (["model.shortcut.taps=1,2,3"], ["layer 1", "layer 2", "layer 3"]),
    "gpt": ([], None),
}


def test_batches_have_the_requested_number_of_windows_of_one_length():
    # 25 tokens at context 8 and stride 4: windows of 4, then 8 each; the last scores only one token.
    config = SimpleNamespace(stride=4, batch_size=2)
    assert list(evaluation._batches(25, 8, config)) == [
        [(0, 4, 0)],
        [(0, 8, 4), (4, 12, 8)],
        [(8, 16, 12), (12, 20, 16)],
        [(16, 24, 20), (17, 25, 24)],
    ]
    assert list(evaluation._batches(3, 8, config)) == [[(0, 3, 0)]]


@pytest.mark.parametrize(
    ("documents", "arm", "stride", "batch"),
    [("many", "add", 3, 4), ("just enough", "gated", 7, 3), ("too few", "replace", 5, 1), ("few tokens", "gpt", 2, 50)],
)
def test_every_number_is_that_of_a_plain_loop(tmp_path, documents, arm, stride, batch):
    settings, sources = ARMS[arm]
    counts, name, over = SPLITS[documents]
    config = [f"eval.stride={stride}", f"eval.batch_size={batch}", "eval.resamples=40", *settings]
    run = made_run(tmp_path, *config, name="gpt" if arm == "gpt" else "shortcut")
    given_documents = made_documents(counts)
    shards, told = made_shards(tmp_path / "shards", run, given_documents), []
    result = evaluation.evaluate(run, shards, name, device="cpu", report=told.append)

    rows = [[*ids, EOS] for split, ids in given_documents if split == name]
    ids = [token for row in rows for token in row]
    scores = plain_scores(run, ids, EOS, stride)
    if over == "documents":
        groups = [number for number, row in enumerate(rows) for _ in row]
    else:  # a hundred of them, as equal as possible, or one per token
        blocks = min(100, len(ids))
        groups = [next(g for g in range(blocks) if t < (g + 1) * len(ids) // blocks) for t in range(len(ids))]
    nats, tokens = np.zeros(max(groups) + 1), np.zeros(max(groups) + 1)
    for group, (loss, _, _) in zip(groups, scores, strict=True):
        nats[group] += loss
        tokens[group] += 1
    total, units = sum(loss for loss, _, _ in scores), 7.0 * len(rows)
    assert len(set(tokens)) > 1 or documents == "few tokens"  # otherwise a mean of ratios would be the same
    # For fp32 losses of a few nats, 1e-5 is about ten units in the last place.
    found = result.pop("groups")
    assert found["tokens"].tolist() == tokens.tolist()
    assert found["nats"] == pytest.approx(nats, abs=1e-5 * tokens.max())
    low, high = plain_interval(nats, tokens, 40)
    bits = len(ids) / units / math.log(2)
    shares = ids.count(EOS) / len(ids), *(ids.count(token) / len(ids) for token in range(EOS))
    weights = result.pop("depth_weights", None)
    assert result == {
        "schema_version": 2,
        "model": run.recipe.model.name,
        "step": 23,
        "precision": "fp32",
        "split": name,
        "tokens": len(ids),
        "documents": counts[name],
        "stride": stride,
        "context": 7,
        "nats_per_token": pytest.approx(total / len(ids), abs=1e-5),
        "interval_95": pytest.approx([low, high], abs=1e-5),
        "interval_over": over,
        "perplexity": pytest.approx(math.exp(total / len(ids)), rel=1e-5),
        "accuracy": sum(right for _, right, _ in scores) / len(ids),
        "unit": "note",
        "units": units,
        "bits_per_unit": pytest.approx(total / math.log(2) / units, rel=1e-5),
        "bits_per_unit_interval_95": pytest.approx([low * bits, high * bits], rel=1e-5),
        "unigram_entropy": pytest.approx(-sum(share * math.log(share) for share in shares)),
    }
    if sources is None:
        assert weights is None
    else:
        assert weights["sources"] == sources
        by_head = sum(share for _, _, share in scores) / len(ids)
        assert torch.allclose(torch.tensor(weights["by_head"]).double(), by_head, atol=1e-5)
        assert by_head.flatten().sort().values.diff().min() > 1e-3  # no two could be confused
    assert {(type(event), event.task, event.unit) for event in told} == {(Progress, "eval", "tokens")}
    # A batch is at most `batch` consecutive windows of one length.
    windows = [(min(7, t + stride, len(ids)), min(stride, len(ids) - t)) for t in range(0, len(ids), stride)]
    alike = [[scored for _, scored in group] for _, group in itertools.groupby(windows, key=lambda window: window[0])]
    sizes = [sum(group[first : first + batch]) for group in alike for first in range(0, len(group), batch)]
    assert [event.done for event in told] == list(itertools.accumulate(sizes))
    assert {event.total for event in told} == {len(ids)}


@given(st.integers(1, 300), st.integers(1, 40), st.data())
def test_every_target_is_scored_once_with_all_available_context(tokens, context, data):
    stride = data.draw(st.integers(1, context))
    seen = []
    for first, end, scored in evaluation.windows(tokens, context, stride):
        assert 0 <= first <= scored < end <= tokens
        assert end - first == min(context, end)
        seen += range(scored, end)
    assert seen == list(range(tokens))


@pytest.mark.parametrize("model", ["gpt", "shortcut"])
def test_scores_equal_a_plain_loop(text_run, model):
    run = runs.open_run(text_run / model / "run.pt", "cpu")
    shards = Shards(text_run / "shards")
    result = evaluation.evaluate(run, shards, "val", device="cpu", report=quiet)
    split = shards.split("val")
    ids = [shards.tokenizer["end"], *split.read(0, split.tokens).tolist()]
    context, stride = run.recipe.model.context, run.recipe.eval.stride
    nats, correct = 0.0, 0

    @cache
    def predicted(first, end):
        with torch.no_grad(), precision.products(run.precision, "cpu"):
            return run.model(torch.tensor([ids[first:end]]))[0].double()

    for target in range(1, len(ids)):
        end = min(((target - 1) // stride + 1) * stride, len(ids) - 1)  # where its window ends
        first = max(0, end - context)
        logits = predicted(first, end)[target - 1 - first]
        nats -= torch.log_softmax(logits, 0)[ids[target]].item()
        correct += int(logits.argmax()) == ids[target]
    assert result["tokens"] == split.tokens
    assert result["nats_per_token"] == pytest.approx(nats / split.tokens, rel=1e-5)
    assert result["accuracy"] == pytest.approx(correct / split.tokens, abs=2 / split.tokens)
    texts = [json.loads(line) for line in (text_run / "shards" / "documents.jsonl").read_text().splitlines()]
    size = sum((text_run / "texts" / t["source"]).stat().st_size for t in texts if t["split"] == "val")
    assert result["bits_per_unit"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    counts = np.bincount(ids[1:])
    shares = counts[counts > 0] / counts.sum()
    assert result["unigram_entropy"] == pytest.approx(-(shares * np.log(shares)).sum())


def test_the_interval_contains_the_score_and_depth_weights_add_up(text_run):
    run = runs.open_run(text_run / "shortcut" / "run.pt", "cpu")
    result = evaluation.evaluate(run, Shards(text_run / "shards"), "test", device="cpu", report=quiet)
    for score, interval in (("nats_per_token", "interval_95"), ("bits_per_unit", "bits_per_unit_interval_95")):
        low, high = result[interval]
        assert low < result[score] < high
    found = result["depth_weights"]
    assert found["sources"] == ["layer 1", "layer 2", "layer 3"]
    assert np.array(found["by_head"]).shape == (run.recipe.model.heads, 3)
    assert np.array(found["by_head"]).sum(1) == pytest.approx(1.0, abs=1e-4)  # in bf16


def test_shards_of_another_tokenizer_name_both_fingerprints(text_run):
    run = runs.open_run(text_run / "gpt" / "run.pt", "cpu")
    run.content["tokenizer"]["fingerprint"] = "0" * 64
    with pytest.raises(UsageError) as caught:
        evaluation.evaluate(run, Shards(text_run / "shards"), "val", device="cpu", report=quiet)
    assert "0" * 12 in caught.value.message
    assert Shards(text_run / "shards").tokenizer["fingerprint"][:12] in caught.value.message
    run.content["tokenizer"]["fingerprint"] = "f" * 64
    with pytest.raises(UsageError, match="was trained with tokenizer ffffffffffff, "):
        evaluation.check_tokenizer(run, Shards(text_run / "shards"))


def test_an_empty_split_is_refused(tmp_path):
    run = made_run(tmp_path)
    shards = made_shards(tmp_path / "shards", run, made_documents({"train": 3, "val": 2}))
    with pytest.raises(UsageError, match=r"the test split of .* is empty"):
        evaluation.evaluate(run, shards, "test", device="cpu", report=quiet)


def test_a_split_of_one_token_has_a_score(tmp_path):
    run = made_run(tmp_path)
    shards = made_shards(tmp_path / "shards", run, [("train", [1, 2]), ("val", [])])
    result = evaluation.evaluate(run, shards, "val", device="cpu", report=quiet)
    ((loss, right, _),) = plain_scores(run, [EOS], EOS, 3)
    assert (result["tokens"], result["accuracy"], result["unigram_entropy"]) == (1, float(right), 0)
    assert [result["nats_per_token"], *result["interval_95"]] == pytest.approx([loss] * 3, abs=1e-5)


def test_text_has_bits_per_character_and_perplexity_per_word(tmp_path):
    """Over all characters and words of the split, whatever the documents; EOS is in the nats, but is no word."""
    run = made_run(tmp_path, "eval.resamples=9")
    documents = made_documents({"train": 3, "val": 12, "test": 11})
    shards = made_shards(tmp_path / "shards", run, documents, character=9.0, word=4.0)
    result = evaluation.evaluate(run, shards, "test", device="cpu", report=quiet)
    ids = [token for split, ids in documents if split == "test" for token in [*ids, EOS]]
    nats = sum(loss for loss, _, _ in plain_scores(run, ids, EOS, 3))
    assert (result["characters"], result["words"]) == (9.0 * 11, 4.0 * 11)
    assert result["bits_per_character"] == pytest.approx(nats / math.log(2) / 99, rel=1e-5)
    assert result["word_perplexity"] == pytest.approx(math.exp(nats / 44), rel=1e-4)


def test_files_are_scored_with_the_tokenizer_of_the_run(tmp_path):
    """Each is a document, in the order of their names; what can't be read is listed. The run's own scores stay."""
    run = made_run(tmp_path, "eval.resamples=9")
    checkpoint.save(run.path, run.content)
    texts = {"b.txt": "ab1 .", "a.txt": "bb a1.", "c.txt": "aab b"}
    (tmp_path / "texts").mkdir()
    for name, text in (texts | {"z.txt": "not of the alphabet"}).items():
        (tmp_path / "texts" / name).write_text(f"\ufeff{text}" if name == "c.txt" else text)
    told = []
    result = pipeline.score_files(
        run.path, [str(tmp_path / "texts")], n_workers=1, max_bad="1", device="cpu", report=told.append
    )
    ids = [token for name in sorted(texts) for token in [*map(ALPHABET.index, texts[name]), EOS]]
    nats = sum(loss for loss, _, _ in plain_scores(run, ids, EOS, 3))
    assert (result["split"], result["documents"], result["tokens"]) == ("files", 3, len(ids))
    assert result["nats_per_token"] == pytest.approx(nats / len(ids), abs=1e-5)
    assert result["words"] == sum(len(text.split()) for text in texts.values())
    assert [reject["source"] for reject in result["rejects"]] == ["z.txt"]
    assert result["account"] == {"byte_order_marks_dropped": 1}
    assert any("z.txt: has the character 'n' at byte 0" in event.text for event in told if isinstance(event, Note))
    kept = json.loads((tmp_path / "eval.json").read_text())
    assert (kept["splits"], kept["others"]) == ({}, [result])
    with pytest.raises(TooManyRejects, match="1 of 4 files") as raised:
        pipeline.score_files(
            run.path, [str(tmp_path / "texts")], n_workers=1, max_bad="0", device="cpu", report=told.append
        )
    assert "shards" not in raised.value.hint  # the shards of files are removed
    assert "--max-bad" in raised.value.hint
    (tmp_path / "texts" / "z.jsonl").write_text('{"text": "ab"}\n[]\n')
    pipeline.score_files(
        run.path, [str(tmp_path / "texts")], n_workers=1, max_bad="2", device="cpu", report=told.append
    )
    assert Note(text="rejected: z.jsonl, line 2: it is an array, not an object") in told


def test_a_perplexity_beyond_the_largest_float_is_infinite():
    assert evaluation._of_text(701.0, {"word": 1.0}) == {"words": 1.0, "word_perplexity": math.inf}
    assert evaluation._of_text(699.0, {"word": 1.0})["word_perplexity"] == math.exp(699)
    assert evaluation._of_text(1.0, {"note": 3.0}) == {}


def test_floors_learn_from_what_the_run_was_trained_on_and_are_computed_once(tmp_path, monkeypatch):
    """They score the tokens of the split, each after the one before it, across the ends of documents."""
    here, other = (tmp_path / name for name in ("shards", "other"))
    run = made_run(tmp_path, "eval.split=test", f"data.shards={here}", "eval.resamples=9")
    made = {
        folder: made_documents({"train": 30, "val": 2, "test": 4}, seed) for seed, folder in enumerate((here, other))
    }
    checksums = {folder: made_shards(folder, run, made[folder]).manifest["checksum"] for folder in made}
    checkpoint.save(run.path, run.content | {"shards": checksums[here]})

    def stream(folder, split):
        return [token for name, ids in made[folder] if name == split for token in (*ids, EOS)]

    def plain(folder, split, order):
        # `Plain` has EOS as its id 0.
        train, scored = (
            [(token + 1) % (EOS + 1) for token in ids] for ids in (stream(here, "train"), stream(folder, split))
        )
        model, ids = Plain(train, EOS + 1, order), [0] * order + scored
        return sum(-math.log(model.p(ids[t - order + 1 : t], ids[t])) for t in range(order, len(ids))) / len(scored)

    calls, measure = [], floors.measure
    monkeypatch.setattr(floors, "measure", lambda *given: calls.append(given[2]) or measure(*given))
    for shards, split in (
        (None, "test"),
        (other, "test"),
        (None, "val"),
        (None, "test"),
        (other, "test"),
        (None, "val"),
    ):
        scores_of = pipeline.score(run.path, shards, split, device="cpu", report=quiet)["floors"]
        assert scores_of["inputs"]["trained"] == checksums[here]
        assert scores_of["trained_tokens"] == len(stream(here, "train"))
        found, folder = scores_of["scores"], shards or here
        assert list(found) == ["unigram", "5-gram"]
        notes = 7.0 * sum(name == split for name, _ in made[folder])
        for name, order in (("unigram", 1), ("5-gram", 5)):
            wanted = plain(folder, split, order)
            bits = wanted * len(stream(folder, split)) / math.log(2) / notes
            assert found[name] == {"nats_per_token": pytest.approx(wanted), "bits_per_unit": pytest.approx(bits)}
    assert calls == ["test", "test", "val"]
    # Shards that are scored, but not what the run was trained on: these are no floors of this run.
    here.rename(tmp_path / "moved")
    said = []
    assert "floors" not in pipeline.score(run.path, other, "test", device="cpu", report=said.append)
    assert f"no floors: the shards {checksums[here][:12]}, which the run was trained on, are not at {here}" in [
        event.text for event in said if isinstance(event, Note)
    ]


def test_floors_of_sound_know_the_codebook(tmp_path):
    """With the codebook known, a unigram loses less than one over all ids; both score each token of the split."""
    generator = np.random.default_rng(0)
    with FolderWriter(tmp_path / "shards", 7, 1000, eos=6) as writer:
        for split, frames in (("train", 300), ("val", 1), ("test", 90)):
            codes = np.stack([generator.choice(3, frames, p=[0.5, 0.3, 0.2]), 3 + generator.integers(0, 3, frames)], 1)
            writer.add(split, [codes.reshape(-1)], {"second": 3.0}, {})
        kind = {"name": "audio", "fingerprint": "", "vocabulary": 7, "end": 6, "unit": "second", "stride": 2}
        writer.finish([], {"request": {"tokenizer": {"codebooks": 2}}, "tokenizer": kind})
    shards = Shards(tmp_path / "shards")
    found = floors.measure(shards, shards, "test", quiet)["scores"]
    ids = {split: shards.split(split).read(0, shards.split(split).tokens).tolist() for split in ("train", "test")}
    total = 0.0
    for book in range(2):
        counts = Counter(ids["train"][book::2])
        left = sum(plain_discounts(counts.values())[min(c, 3) - 1] for c in counts.values()) / counts.total()
        cut = plain_discounts(counts.values())[2]
        # Each id occurs; four can: three codes and EOS.
        low = {token: (c - (cut if c > 2 else plain_discounts(counts.values())[c - 1])) for token, c in counts.items()}
        total -= sum(math.log(low.get(token, 0) / counts.total() + left / 4) for token in ids["test"][book::2])
    assert found["codebook"]["nats_per_token"] == pytest.approx(total / 181)
    assert found["codebook"]["bits_per_unit"] == pytest.approx(total / math.log(2) / 3)
    assert found["codebook"]["nats_per_token"] < found["unigram"]["nats_per_token"] - 0.5


def test_floors_learn_from_a_limited_number_of_tokens_and_that_is_said(tmp_path, monkeypatch):
    run = made_run(tmp_path)
    shards, said = made_shards(tmp_path / "shards", run, made_documents({"train": 30, "test": 4})), []
    monkeypatch.setattr(floors, "MOST_TOKENS", 50)
    found = floors.measure(shards, shards, "test", said.append)
    tokens = shards.split("train").tokens
    assert found["trained_tokens"] == 50 < tokens
    assert [event.text for event in said] == [f"the floors learn from the first 50 of {tokens:,} training tokens"]
    train, scored = shards.split("train").read(0, 50), shards.split("test").read(0, shards.split("test").tokens)
    wanted = floors.ngram(train, scored, EOS + 1, EOS).nats.mean()
    assert found["scores"]["5-gram"]["nats_per_token"] == pytest.approx(wanted)
    monkeypatch.setattr(floors, "MOST_TOKENS", tokens)
    assert floors.measure(shards, shards, "test", pytest.fail)["trained_tokens"] == tokens


@pytest.mark.parametrize("units", [{}, {"second": 0.0}], ids=["none", "zero"])
def test_floors_of_a_split_whose_units_were_not_counted_are_per_token_alone(tmp_path, units):
    with FolderWriter(tmp_path / "shards", 5, 1000, eos=4) as writer:
        for split in ("train", "val", "test"):
            writer.add(split, [np.array([0, 1, 2, 3, 0, 1])], units, {})
        kind = {"name": "audio", "fingerprint": "", "vocabulary": 5, "end": 4, "unit": "second", "stride": 1}
        writer.finish([], {"request": {}, "tokenizer": kind})
    shards = Shards(tmp_path / "shards")
    scores = floors.measure(shards, shards, "test", quiet)["scores"]
    assert scores.keys() == {"unigram", "5-gram"}
    assert all(score["bits_per_unit"] is None and score["nats_per_token"] > 0 for score in scores.values())


def test_scores_lie_side_by_side_with_all_that_they_were_made_from(tmp_path):
    """By split for the run's own shards; those of other shards beside them, in no one's place."""
    here, other = (tmp_path / name for name in ("shards", "other"))
    run = made_run(tmp_path, "eval.split=test", f"data.shards={here}", "eval.resamples=9")
    counts = {"train": 3, "val": 12, "test": 11}
    made = {folder: made_documents(counts, seed) for seed, folder in enumerate((here, other))}
    checksums = {}
    for folder, documents in made.items():
        made_shards(folder, run, documents)
        checksums[folder] = json.loads((folder / "manifest.json").read_text())["checksum"]
    checkpoint.save(run.path, run.content | {"shards": checksums[here]})
    tokens = {
        (folder, split): [len(ids) + 1 for name, ids in documents if name == split]
        for folder, documents in made.items()
        for split in ("val", "test")
    }
    assert len({sum(sizes) for sizes in tokens.values()}) == 4
    splits, others = {}, []
    for shards, split, wanted in (
        (None, None, (here, "test")),
        (other, "val", (other, "val")),
        (other, "test", (other, "test")),
        (None, "val", (here, "val")),
    ):
        result = pipeline.score(run.path, shards, split, device="cpu", report=quiet)
        assert (result["split"], result["tokens"]) == (wanted[1], sum(tokens[wanted]))
        assert result["checkpoint_sha256"] == files.sha256(run.path)
        assert result["inputs"] == {
            "split": wanted[1],
            "stride": 3,
            "batch_size": run.recipe.eval.batch_size,
            "resamples": 9,
            "schema_version": 2,
            "checkpoint_sha256": files.sha256(run.path),
            "shards": checksums[wanted[0]],
            "device": "cpu",
        }
        if wanted[0] == here:
            splits[wanted[1]] = result
        else:
            others.append(result)
        kept = json.loads((tmp_path / "eval.json").read_text())
        assert kept == {"schema_version": 2, "splits": splits, "others": others}
        for score in (*splits.values(), *others):
            sizes = tokens[here if score in splits.values() else other, score["split"]]
            with np.load(tmp_path / score["groups"]["file"]) as stored:
                assert stored["tokens"].tolist() == sizes
                assert stored["nats"].sum() / sum(sizes) == pytest.approx(score["nats_per_token"])
    assert {score["groups"]["file"] for score in splits.values()} == {"eval-val.npz", "eval-test.npz"}
