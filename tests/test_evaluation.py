"""Evaluation: every token once, equal to a plain loop, and depth weights that sum to one."""

import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shortcut_cli import checkpoint
from shortcut_cli.errors import UsageError
from shortcut_cli.shards import Shards
from shortcut_cli.stages import evaluation


def quiet(*_, **__):
    pass


@given(st.integers(1, 300), st.integers(1, 40), st.data())
def test_every_target_is_scored_once_with_all_the_context_there_is(tokens, context, data):
    stride = data.draw(st.integers(1, context))
    seen = []
    for first, end, scored in evaluation.windows(tokens, context, stride):
        assert 0 <= first <= scored < end <= tokens
        assert end - first == min(context, end)
        seen += range(scored, end)
    assert seen == list(range(tokens))


@pytest.mark.parametrize("model", ["gpt", "shortcut"])
def test_scores_equal_a_plain_loop(text_run, model):
    run = checkpoint.open_run(text_run / model / "run.pt", "cpu")
    shards = Shards(text_run / "shards")
    result = evaluation.evaluate(run, shards, "val", device="cpu", report=quiet)
    split = shards.split("val")
    ids = [shards.tokenizer["end"], *split.read(0, split.tokens).tolist()]
    context, stride = run.recipe.model.context, run.recipe.eval.stride
    nats, correct = 0.0, 0

    @cache
    def predicted(first, end):
        with torch.no_grad():
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


def test_the_interval_holds_the_score_and_depth_weights_sum_to_one(text_run):
    run = checkpoint.open_run(text_run / "shortcut" / "run.pt", "cpu")
    result = evaluation.evaluate(run, Shards(text_run / "shards"), "test", device="cpu", report=quiet)
    low, high = result["interval_95"]
    assert low <= result["nats_per_token"] <= high
    assert result["depth_weights"]["sources"] == list(run.model.taps)
    assert [sum(head) for head in result["depth_weights"]["by_head"]] == pytest.approx([1] * run.recipe.model.heads)


def test_the_context_helps_a_trained_model_no_less_with_a_smaller_stride(text_run):
    run = checkpoint.open_run(text_run / "gpt" / "run.pt", "cpu")
    shards = Shards(text_run / "shards")
    scores = {}
    for stride in (4, run.recipe.model.context):
        resolved = run.recipe.model_copy(update={"eval": run.recipe.eval.model_copy(update={"stride": stride})})
        other = checkpoint.Run(run.path, resolved, run.model, run.content)
        scores[stride] = evaluation.evaluate(other, shards, "val", device="cpu", report=quiet)["nats_per_token"]
    assert scores[4] <= scores[run.recipe.model.context] + 0.02


def test_shards_of_another_tokenizer_name_both_fingerprints(text_run):
    run = checkpoint.open_run(text_run / "gpt" / "run.pt", "cpu")
    run.content["tokenizer"]["fingerprint"] = "0" * 64
    with pytest.raises(UsageError) as caught:
        evaluation.evaluate(run, Shards(text_run / "shards"), "val", device="cpu", report=quiet)
    assert "0" * 12 in caught.value.message
    assert Shards(text_run / "shards").tokenizer["fingerprint"][:12] in caught.value.message
