"""Sentences about what shrinks the subject of a result away."""

import math

import pytest

from shortcut_cli.config import reading
from shortcut_cli.kept import remarks
from shortcut_cli.models.shortcut import tapped_layers


def plan(tokens=10**9, **changes):
    tree = reading.read(
        "text-tiny", [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    ).model_dump()
    return remarks.of_plan(tree, tokens)


@pytest.mark.parametrize("layers", range(2, 13))
def test_one_tap_is_said_exactly_if_the_model_has_one(layers):
    assert bool(plan(model__shortcut__taps="paper", model__layers=layers)) == (len(tapped_layers("paper", layers)) == 1)
    assert plan(model__shortcut__taps="all", model__layers=layers) == []
    assert plan(model__shortcut__taps="paper", model__layers=layers, model__name="gpt") == []


def test_the_tiny_recipes_have_several_taps():
    for name in ("text-tiny", "music-tiny", "audio-tiny"):
        model = reading.read(name).model
        assert len(tapped_layers(model.shortcut.taps, model.layers)) > 1
        assert remarks.of_plan(reading.read(name).model_dump(), 10**9) == []


def test_epochs_are_counted_from_the_tokens():
    steps = {"train__steps": 100, "train__batch_size": 10, "train__warmup": 1}  # x 128 tokens = 128,000
    assert plan(32_000, **steps) == []  # 4 epochs
    (said,) = plan(5_120, **steps)
    assert said.startswith("the training reads its 5,120 tokens 25.0 times: beyond 4 epochs")


def test_a_warm_up_as_long_as_the_training_is_said():
    assert plan(train__steps=20, train__warmup=19) == []
    (said,) = plan(train__steps=20, train__warmup=20)
    assert "warm-up of 20 steps" in said
    assert "reaches train.lr at the last step only" in said
    (said,) = plan(train__steps=20, train__warmup=21)
    assert "never reaches train.lr" in said


def test_few_documents_and_a_loss_above_a_floor_are_said():
    floors = {"scores": {"5-gram": {"nats_per_token": 2.0}, "unigram": {"nats_per_token": 4.0}}}
    score = {"split": "test", "documents": 10, "nats_per_token": 3.0, "floors": floors}
    assert remarks.of_score(score) == [
        "on the test split the model is worse than the 5-gram, which only counts: 3.0000 against 2.0000 nats per token"
    ]
    assert remarks.of_score(score | {"nats_per_token": 1.5}) == []
    assert remarks.of_score(score | {"nats_per_token": 2.0}) == []
    (said,) = remarks.of_score({"split": "test", "documents": 1})
    assert said.startswith("the test split has one document")
    (said,) = remarks.of_score({"split": "val", "documents": 9})
    assert said.startswith("the val split has only 9 documents")


def test_a_sample_that_ended_early_is_said_with_its_length():
    sample = {"ended": True, "tokens": 68, "sampler": {"tokens": 375}, "units": {"second": 0.906666}}
    (said,) = remarks.of_sample(sample)
    assert said.startswith("the sample ended by itself after 0.9067 seconds:")
    assert said.endswith("at token 68 of 375")
    (said,) = remarks.of_sample(sample | {"units": {"note": 1, "beat": 4.0}})
    assert "after 1 note:" in said
    assert remarks.of_sample(sample | {"ended": False}) == []
    assert remarks.of_sample(sample | {"tokens": 188}) == []
    assert len(remarks.of_sample(sample | {"tokens": 187})) == 1
    assert len(remarks.of_sample(sample | {"tokens": 188, "sampler": {"tokens": 376}})) == 1


ODD = (None, True, -1, 0, 3, 10**30, 0.5, math.nan, math.inf, "x", "paper", [], [1], {}, {"a": 1}, {"tokens": "x"})


def with_odd(tree):
    """The table with each of its values, at any depth, replaced by each odd value in turn."""
    for key, value in tree.items():
        yield from (tree | {key: odd} for odd in ODD)
        if isinstance(value, dict):
            yield from (tree | {key: inner} for inner in with_odd(value))


def test_a_table_that_holds_anything_gets_sentences_or_none():
    floors = {"scores": {"5-gram": {"nats_per_token": 2.0}}}
    score = {"split": "test", "documents": 1, "nats_per_token": 3.0, "floors": floors}
    sample = {"ended": True, "tokens": 68, "sampler": {"tokens": 375}, "units": {"second": 0.9, "note": 3}}
    said = [one for tree in with_odd(reading.read("text-tiny").model_dump()) for one in remarks.of_plan(tree, 10)]
    said += [one for tree in with_odd(score) for one in remarks.of_score(tree)]
    said += [one for tree in with_odd(sample) for one in remarks.of_sample(tree)]
    assert said
    assert all(isinstance(sentence, str) for sentence in said)


def test_a_loss_that_is_not_finite_is_compared_with_nothing():
    floors = {"scores": {"5-gram": {"nats_per_token": 2.0}}}
    assert remarks.of_score({"nats_per_token": math.nan, "floors": floors}) == []


def test_intervals_over_few_windows_are_said_to_be_that():
    few = [number for number in range(20) if remarks.of_windows({"windows": number})]
    assert few == [*range(2, 10)]
    assert remarks.of_windows({"windows": 3}) == "The intervals are over 3 windows: so few say little about others."
    assert [remarks.of_windows(other) for other in ({}, {"windows": "3"}, {"windows": True}, {"windows": 3.0})] == [
        ""
    ] * 4
