"""Recipes: strict, complete, and the same after writing and reading."""

import re
import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from shortcut_cli import registry
from shortcut_cli.codec import weights
from shortcut_cli.config import reading, schema, writing
from shortcut_cli.config.schema import CodecRecipe, Config, codec_keys, keys
from shortcut_cli.data import shards
from shortcut_cli.errors import UsageError

SHIPPED = [
    "audio",
    "audio-tiny",
    "codec-mini",
    "music",
    "music-tiny",
    "paper-librispeech",
    "paper-maestro",
    "paper-text8",
    "paper-wikitext103",
    "text",
    "text-tiny",
]


def test_all_recipes_are_there():
    assert reading.names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_valid_and_complete(name):
    tree = tomllib.loads(reading.find(name).read_text())
    read = reading.read_any(name)
    # Every key is written down, at the value that it has.
    assert writing.differences(tree, read.model_dump()) == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_header_says_what_and_how(name):
    header = reading.header(name)
    assert f"--recipe {name}" in header
    assert len(header.splitlines()[0]) < 90
    if name.startswith("paper-"):
        assert "reconstruction" in header.lower()


@pytest.mark.parametrize("name", SHIPPED)
def test_dump_reads_back_equal(name, tmp_path):
    read = reading.read_any(name)
    (tmp_path / "r.toml").write_text(writing.dump(read))
    assert reading.read_any(str(tmp_path / "r.toml")) == read


@given(st.text())
def test_any_text_value_survives(text):
    assert tomllib.loads(f"x = {writing.toml(text)}") == {"x": text}


def test_settings_win_over_the_recipe():
    read = reading.read(
        "music", ["train.steps=7", "train.lr = 3e-4", "data.shards=a b", "model.shortcut.taps=1,2", "model.tied=false"]
    )
    assert (read.train.steps, read.train.lr, read.data.shards) == (7, 3e-4, "a b")
    assert (read.model.shortcut.taps, read.model.tied) == ("1,2", False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.stepz=5", "train.stepz: no such key"),
        ("training.steps=5", "training: no such key"),
        ("train.steps=many", "train.steps: Input should be a valid integer, got 'many'"),
        ("train.steps=0", "train.steps: Input should be greater than or equal to 1, got 0"),
        ("train.steps=1.5", "train.steps"),
        ("model.name=transformer", "unknown architecture 'transformer'"),
        ("model.heads=7", "is not a multiple of twice heads 7"),
        ("tokenizer.name=video", "tokenizer"),
        ("tokenizer.codebooks=8", "tokenizer.codebooks: no such key"),
        ("eval.stride=100000", "is larger than model.context 256: take at most 256"),
        ("data.split=given", "split 'given' needs splits"),
        ("train.accumulation=3", "not a multiple of accumulation 3: take accumulation 2 or 4"),
        ("train.accumulation=99", "not a multiple of accumulation 99: take accumulation 4"),
        ("nothing", "is not SECTION.KEY=VALUE"),
        ("train.steps.more=1", "steps is a key, not a section"),
    ],
)
def test_a_wrong_setting_is_named(setting, message):
    with pytest.raises(UsageError) as caught:
        reading.read("music", [setting])
    assert message in caught.value.message


def test_a_misspelt_key_gets_a_proposal():
    with pytest.raises(UsageError) as caught:
        reading.read("music", ["train.stepz=5"])
    assert "Did you mean 'train.steps'?" in caught.value.hint


@pytest.mark.parametrize(("name", "hint"), [("musik", "Did you mean 'music'?"), ("zzzz", "Known: audio,")])
def test_an_unknown_recipe(name, hint):
    with pytest.raises(UsageError) as caught:
        reading.read(name)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff = [", "can't be read: 'utf-8' codec"),
        ("[data]\n".encode("utf-16"), "can't be read: 'utf-8' codec"),
        (b"a = [", "can't be read as TOML"),
        (b"a = " + b"[" * 100_000, "can't be read as TOML"),
    ],
)
def test_a_file_that_is_not_toml(tmp_path, content, message):
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        reading.read(str(path))


def test_every_domain_has_a_default_recipe():
    assert registry.DEFAULT_RECIPES.keys() == registry.TOKENIZERS.keys()
    for domain, name in registry.DEFAULT_RECIPES.items():
        assert reading.read(name).tokenizer.name == domain


def test_names_of_splits_and_weights_are_those_of_the_registry():
    assert shards.SPLITS == registry.SPLITS == ("train", "val", "test")
    assert tuple(weights.OFFICIAL) == registry.OFFICIAL_WEIGHTS


def test_one_file_serves_every_arm():
    for name in registry.MODELS:
        assert reading.read("music", [f"model.name={name}"]).model.name == name


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({}, {}, []),
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2}, ["a: 1 -> 2"]),
        ({"a": 2}, {"a": 1}, ["a: 2 -> 1"]),
        ({"a": 1}, {}, ["a: 1 -> None"]),
        ({}, {"a": 1}, ["a: None -> 1"]),
        ({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}}, ["a.c: 2 -> 5", "d: 3 -> None"]),
        ({"a": {"b": {"c": "x"}}}, {"a": {"b": {"c": "y"}}}, ["a.b.c: 'x' -> 'y'"]),
        ({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}, ["a.c: None -> 2"]),
        ({"a": {"b": 1}}, {"a": 4}, ["a: {'b': 1} -> 4"]),
        ({"a": 4}, {"a": {"b": 1}}, ["a: 4 -> {'b': 1}"]),
        ({"b": 1, "a": [1, 2]}, {"b": 2, "a": [2, 1]}, ["a: [1, 2] -> [2, 1]", "b: 1 -> 2"]),
        ({"a": 0}, {"a": 0.5}, ["a: 0 -> 0.5"]),
    ],
)
def test_differences_names_the_keys_that_either_has(old, new, expected):
    assert writing.differences(old, new) == expected


# What each key takes

SMALL = {
    "data": {"shards": "s"},
    "tokenizer": {"name": "text"},
    "model": {"name": "gpt", "layers": 2, "width": 8, "heads": 2, "context": 64, "ffn": 8},
    "train": {"steps": 5, "batch_size": 4, "lr": 0.5},
    "eval": {"stride": 2},
    "sample": {"tokens": 9},
}


def changed(tree, key, value):
    """A copy of a nested table with one key at another value."""
    name, _, rest = key.partition(".")
    return tree | {name: changed(tree.get(name, {}), rest, value) if rest else value}


def without(tree, key):
    name, _, rest = key.partition(".")
    if rest:
        return tree | {name: without(tree[name], rest)}
    return {other: value for other, value in tree.items() if other != name}


def test_a_missing_key_has_the_documented_default():
    found = reading.validate(SMALL, "here").model_dump()
    assert found["data"] == {
        "shards": "s",
        "split": "documents",
        "val": 0.05,
        "test": 0.05,
        "duplicates": "drop",
        "shard_tokens": 268_435_456,
        "file_timeout_s": 7200,
        "file_memory_mb": 4096,
        "splits": {"train": [], "val": [], "test": [], "table": ""},
    }
    plain = {key: value for key, value in found["model"].items() if not isinstance(value, dict)}
    assert plain == SMALL["model"] | {
        "activation": "gelu",
        "qk_norm": True,
        "init": "fan_in",
        "tied": False,
        "dropout": 0.0,
        "rope_base": 10000.0,
    }
    schedule = {
        "steps": 5,
        "batch_size": 4,
        "lr": 0.5,
        "min_lr": 0.0,
        "warmup": 100,
        "schedule": "wsd",
        "decay": 1.0,
        "schedule_steps": 0,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "clip": 1.0,
        "ema": 0.0,
        "seed": 1,
        "log_every": 10,
        "eval_every": 250,
        "eval_windows": 64,
        "tensorboard": False,
        "threads": 0,
    }
    assert found["train"] == schedule | {
        "optimizer": "muon",
        "matrix_lr": 2.5,
        "momentum": 0.9,
        "momentum_warmup": 200,
        "accumulation": 1,
        "router_lr": 1.0,
        "precision": "auto",
        "compile": "auto",
        "deterministic": False,
        "keep": "best",
        "shard": "none",
        "checkpoint_activations": False,
        "timeout_s": 600.0,
    }
    assert found["eval"] == {"split": "test", "stride": 2, "batch_size": 16, "resamples": 1000}
    sampler = {"n": 4, "tokens": 9, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
    sampler["precision"] = "fp32"
    assert found["sample"] == sampler
    codec = reading.validate_codec({"data": {}, "codec": {}, "train": SMALL["train"]}, "here").model_dump()
    assert codec["data"] == {
        "speaker": "",
        "val": 0.1,
        "segment_s": 1.0,
        "speed": 0.0,
        "gain_db": 0.0,
        "mix": 0.0,
        "file_timeout_s": 7200,
        "file_memory_mb": 4096,
    }
    assert codec["codec"] == {
        "network": "frame",
        "codebooks": 8,
        "dimension": 64,
        "codebook_decay": 0.99,
        "seanet": {"filters": 32},
        "frame": {"width": 160, "encoder_blocks": 6, "decoder_blocks": 8, "expansion": 4, "kernel": 7},
    }
    schedule |= {"min_lr": 0.1, "schedule": "cosine", "decay": 0.2}
    assert codec["train"] == schedule | {
        "mel": 1.0,
        "wave": 0.1,
        "commitment": 1.0,
        "adversarial_from": 0,
        "adversarial": 3.0,
        "features": 3.0,
        "discriminator_filters": 32,
        "discriminator_lr": 3e-4,
    }


TINY = 1e-300
RANGES = {  # the least and the greatest value that a key takes, None for no bound, and two beyond these
    "data.val": (TINY, 0.4999, 0.0, 0.5),
    "data.test": (TINY, 0.4999, 0.0, 0.5),
    "data.shard_tokens": (1024, 2**40, 1023, 2**40 + 1),
    "data.file_timeout_s": (TINY, 10**9, 0.0, 10**9 + 1),
    "data.file_memory_mb": (1024, 2**30, 1023, 2**30 + 1),
    "model.layers": (1, 512, 0, 512 + 1),
    "model.width": (4, 65_536, 0, 65_540),
    "model.heads": (1, 4, 0, 65_537),
    "model.context": (2, 2**24, 1, 2**24 + 1),
    "model.ffn": (1, 2**20, 0, 2**20 + 1),
    "model.dropout": (0.0, 0.9999, -TINY, 1.0),
    "model.rope_base": (1.0001, 1e12, 1.0, 1000999999999.9999),
    "train.steps": (1, 10**9, 0, 10**9 + 1),
    "train.batch_size": (1, 2**20, 0, 2**20 + 1),
    "train.lr": (TINY, 1000.0, 0.0, 1000.9999999999999),
    "train.min_lr": (0.0, 1.0, -TINY, 1.0001),
    "train.warmup": (0, 10**9, -1, 10**9 + 1),
    "train.decay": (TINY, 1.0, 0.0, 1.0001),
    "train.schedule_steps": (0, 10**9, -1, 10**9 + 1),
    "train.weight_decay": (0.0, 1000.0, -TINY, 1000.9999999999999),
    "train.beta1": (0.0, 0.9999, -TINY, 1.0),
    "train.beta2": (0.0, 0.9999, -TINY, 1.0),
    "train.clip": (0.0, 1e9, -TINY, 1000999999.9999999),
    "train.ema": (0.0, 0.9999, -TINY, 1.0),
    "train.seed": (0, 2**63 - 1, -1, 2**63),
    "train.log_every": (1, 10**9, 0, 10**9 + 1),
    "train.eval_every": (1, 10**9, 0, 10**9 + 1),
    "train.eval_windows": (1, 10**9, 0, 10**9 + 1),
    "train.accumulation": (1, 4, 0, 2**20 + 1),
    "train.matrix_lr": (TINY, 1e6, 0.0, 1000999.9999999999),
    "train.momentum": (0.0, 0.9999, -TINY, 1.0),
    "train.momentum_warmup": (0, 10**9, -1, 10**9 + 1),
    "train.router_lr": (TINY, 1e6, 0.0, 1000999.9999999999),
    "eval.stride": (1, 64, 0, 65),
    "eval.batch_size": (1, 2**20, 0, 2**20 + 1),
    "eval.resamples": (1, 10**6, 0, 10**6 + 1),
    "sample.n": (1, 10**6, 0, 10**6 + 1),
    "sample.tokens": (1, 10**9, 0, 10**9 + 1),
    "sample.temperature": (0.0, 1e6, -TINY, 1000999.9999999999),
    "sample.top_k": (0, 10**9, -1, 10**9 + 1),
    "sample.top_p": (1e-6, 1.0, 0.99e-6, 1.0001),
    "sample.min_p": (0.0, 0.9999, -TINY, 1.0),
    "sample.seed": (0, 2**63 - 1, -1, 2**63),
}
CODEC_RANGES = {
    "data.val": (TINY, 0.4999, 0.0, 0.5),
    "data.segment_s": (0.2, 60.0, 0.1999, 60.0001),
    "data.speed": (0.0, 0.4999, -TINY, 0.5),
    "data.gain_db": (0.0, 40.0, -TINY, 40.0001),
    "data.mix": (0.0, 1.0, -TINY, 1.0001),
    "data.file_timeout_s": (TINY, 10**9, 0.0, 10**9 + 1),
    "data.file_memory_mb": (1024, 2**30, 1023, 2**30 + 1),
    "codec.codebooks": (1, 32, 0, 33),
    "codec.dimension": (2, 65536, 1, 65536 + 1),
    "codec.codebook_decay": (TINY, 0.9999, 0.0, 1.0),
    "codec.frame.width": (8, 65536, 7, 65536 + 1),
    "codec.frame.encoder_blocks": (1, 512, 0, 512 + 1),
    "codec.frame.decoder_blocks": (1, 512, 0, 512 + 1),
    "codec.frame.expansion": (1, 64, 0, 64 + 1),
    "codec.frame.kernel": (2, 1024, 1, 1024 + 1),
    "codec.seanet.filters": (2, 4096, 1, 4096 + 1),
    "train.mel": (0.0, 1000.0, -TINY, 1000.9999999999999),
    "train.wave": (0.0, 1000.0, -TINY, 1000.9999999999999),
    "train.commitment": (0.0, 1000.0, -TINY, 1000.9999999999999),
    "train.adversarial_from": (0, 10**9, -1, 10**9 + 1),
    "train.adversarial": (0.0, 1000.0, -TINY, 1000.9999999999999),
    "train.features": (0.0, 1000.0, -TINY, 1000.9999999999999),
    "train.discriminator_filters": (1, 4096, 0, 4096 + 1),
    "train.discriminator_lr": (TINY, 1000.0, 0.0, 1000.9999999999999),
}
SMALL_CODEC = {"data": {}, "codec": {}, "train": SMALL["train"]}
CASES = [(reading.validate, SMALL, key, *bounds) for key, bounds in RANGES.items()]
CASES += [(reading.validate_codec, SMALL_CODEC, key, *bounds) for key, bounds in CODEC_RANGES.items()]


@pytest.mark.parametrize(("check", "tree", "key", "least", "greatest", "below", "above"), CASES)
def test_a_number_is_accepted_within_its_bounds_only(check, tree, key, least, greatest, below, above):
    for value in (least, greatest):
        if value is not None:
            found = check(changed(tree, key, value), "here").model_dump()
            for part in key.split("."):
                found = found[part]
            assert found == value
    for value in (below, above):
        if value is not None:
            with pytest.raises(UsageError) as refused:
                check(changed(tree, key, value), "here")
            assert refused.value.message.startswith("here is not a valid recipe\n")
            assert key.rpartition(".")[2] in refused.value.message
    whole = isinstance(least, int)
    wrong = ["3", True, None, [3], {}, float("nan"), float("inf"), -float("inf"), 10**400, -(2**63)]
    wrong += [3.0, 2.5] if whole else []
    for value in wrong:
        with pytest.raises(UsageError) as refused:
            check(changed(tree, key, value), "here")
        assert f"  {key}: " in refused.value.message


@pytest.mark.parametrize("key", ["model.tied", "train.deterministic", "train.tensorboard"])
def test_a_switch_takes_only_true_or_false(key):
    for value in (True, False):
        section, name = key.split(".")
        assert reading.validate(changed(SMALL, key, value), "here").model_dump()[section][name] is value
    for value in (0, 1, "true", None):
        with pytest.raises(UsageError, match=key):
            reading.validate(changed(SMALL, key, value), "here")


@pytest.mark.parametrize(
    ("check", "tree", "key", "choices"),
    [
        (reading.validate, SMALL, "train.compile", ("auto", True, False)),
        (reading.validate, SMALL, "data.duplicates", ("drop", "keep")),
        (reading.validate, SMALL, "model.activation", ("gelu", "swiglu")),
        (reading.validate, SMALL, "train.schedule", ("cosine", "wsd", "constant")),
        (reading.validate, SMALL, "train.precision", ("auto", "fp32", "bf16")),
        (reading.validate, SMALL, "eval.split", ("val", "test")),
        (reading.validate_codec, SMALL_CODEC, "codec.network", ("frame", "seanet")),
    ],
)
def test_a_choice_is_one_of_its_names(check, tree, key, choices):
    for value in choices:
        section, name = key.split(".")
        assert check(changed(tree, key, value), "here").model_dump()[section][name] == value
    for value in ("", choices[0].upper(), "train", None, 0):
        with pytest.raises(UsageError, match=key):
            check(changed(tree, key, value), "here")


REQUIRED = [f"{section}.{key}" for section, keys in SMALL.items() for key in keys if section != "tokenizer"]


@pytest.mark.parametrize("key", [*REQUIRED, *SMALL])
def test_a_missing_key_without_a_default_is_an_error(key):
    with pytest.raises(UsageError) as refused:
        reading.validate(without(SMALL, key), "here")
    assert refused.value.message == f"here is not a valid recipe\n  {key}: is missing"


@pytest.mark.parametrize(
    ("recipe", "key", "value", "named"),
    [
        *((name, "train.steps", 0, name) for name in ("audio", "music", "text")),
        ("paper-maestro", "model.layers", -1, "music"),
        ("text", "tokenizer.name", "none", "music"),
        ("text", "tokenizer", 3, "music"),
        ("codec-mini", "train.steps", 0, "codec-mini"),
    ],
)
def test_a_wrong_value_comes_with_a_recipe_of_its_domain(recipe, key, value, named):
    check = reading.validate_codec if recipe == "codec-mini" else reading.validate
    with pytest.raises(UsageError) as refused:
        check(changed(tomllib.loads(reading.text(recipe)), key, value), "here")
    assert f"`shortcut recipes show {named}`" in refused.value.hint


def test_every_wrong_key_has_a_line_and_the_first_unknown_one_a_proposal():
    tree = changed(changed(changed(SMALL, "train.steps", 0), "model.widht", 3), "sample.token", 3)
    with pytest.raises(UsageError) as refused:
        reading.validate(tree, "here")
    assert refused.value.message.splitlines() == [
        "here is not a valid recipe",
        "  model.widht: no such key",
        "  train.steps: Input should be greater than or equal to 1, got 0",
        "  sample.token: no such key",
    ]
    assert refused.value.hint == "Did you mean 'model.width'?"
    with pytest.raises(UsageError) as refused:
        reading.validate_codec(changed(SMALL_CODEC, "codec.frame.widht", 3), "here")
    assert refused.value.hint == "Did you mean 'codec.frame.width'?"


@pytest.mark.parametrize(("width", "heads", "right"), [(8, 2, True), (8, 4, True), (8, 8, False), (12, 4, False)])
def test_a_head_has_an_even_width(width, heads, right):
    tree = changed(changed(SMALL, "model.width", width), "model.heads", heads)
    if right:
        assert reading.validate(tree, "here").model.heads == heads
    else:
        with pytest.raises(UsageError, match=f"width {width} is not a multiple of twice heads {heads}"):
            reading.validate(tree, "here")


@pytest.mark.parametrize(
    ("width", "heads", "proposal"),
    [
        (100, 6, "take width 96 or 108, or heads 5 or 10"),
        (5, 4, "take width 8"),
        (101, 2, "take width 100 or 104"),
        (65_535, 3, "take width 65532"),
        (64, 33, "take width 66, or heads 32"),
    ],
)
def test_the_nearest_widths_and_heads_are_proposed_and_valid(width, heads, proposal):
    with pytest.raises(UsageError) as refused:
        reading.validate(changed(changed(SMALL, "model.width", width), "model.heads", heads), "here")
    assert f": {proposal}" in refused.value.message
    found = re.search(r": take (?:width ([\d or]+))?(?:, or )?(?:heads ([\d or]+))?", refused.value.message)
    for text, key, other, value in ((found[1], "width", "heads", heads), (found[2], "heads", "width", width)):
        for number in re.findall(r"\d+", text or ""):
            tree = changed(changed(SMALL, f"model.{key}", int(number)), f"model.{other}", value)
            assert reading.validate(tree, "here")


@pytest.mark.parametrize(("batch", "parts", "right"), [(4, 2, True), (4, 4, True), (4, 3, False), (4, 8, False)])
def test_the_parts_of_a_batch_are_equal(batch, parts, right):
    tree = changed(changed(SMALL, "train.batch_size", batch), "train.accumulation", parts)
    if right:
        assert reading.validate(tree, "here").train.accumulation == parts
    else:
        with pytest.raises(UsageError, match=f"batch_size {batch} is not a multiple of accumulation {parts}"):
            reading.validate(tree, "here")


def test_a_speaker_is_an_expression():
    assert reading.validate_codec(changed(SMALL_CODEC, "data.speaker", "a(b)"), "here").data.speaker == "a(b)"
    with pytest.raises(UsageError, match=r"data\.speaker is not a regular expression"):
        reading.validate_codec(changed(SMALL_CODEC, "data.speaker", "a(b"), "here")


def test_an_empty_folder_name_is_refused_and_a_recipe_is_frozen():
    with pytest.raises(UsageError, match=r"data\.shards"):
        reading.validate(changed(SMALL, "data.shards", ""), "here")
    read = reading.validate(SMALL, "here")
    with pytest.raises(ValueError, match="frozen"):
        read.train.steps = 3


# --set


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("3e-4", 3e-4),
        ("-0.5", -0.5),
        ("1_000", 1000),
        ("true", True),
        ("false", False),
        ("True", "True"),
        ("", ""),
        ("a=b", "a=b"),
        ("1,2,3", "1,2,3"),
        ("[1, -2]", [1, -2]),
        ("[0.5, 1e3]", [0.5, 1000.0]),
        ("[a]", "[a]"),
        ('"3"', "3"),
        ("3\ny = 4", "3\ny = 4"),
    ],
)
@pytest.mark.parametrize("key", ["train.steps", "tokenizer.transpose", "model.tied", "no.such.key"])
def test_the_value_of_a_key_that_holds_no_text_is_read_as_toml_or_else_as_text(key, text, value):
    found = reading._parsed(schema.schema(), {}, f"{key}={text}")
    assert found == reading.Setting(key, value, f"--set {key}={text}")
    assert type(found.value) is type(value)


AS_THEY_ARE = [
    "2024",
    "true",
    "nan",
    "inf",
    "-1",
    "1e400",
    "0x10",
    "2024-01-01",
    "[1, 2]",
    "{a = 1}",
    "a b",
    " a ",
    "~",
]
AS_THEY_ARE += [
    "",
    "a=b",
    "a 'b' \"c\"",
    '"a" "b"',
    "x = 'y'",
    "\n abc",
    "3\ny = 4",
    "#",
    "a#b",
    "\\",
    "\u00e9",
    "[/v2]",
]


def leaves(kind, prefix=""):
    """(key, type) of all keys of a recipe; a second walk than that of the schema, over its JSON schema."""
    tree = kind.model_json_schema()

    def walk(node, prefix):
        if "$ref" in node:
            node = tree["$defs"][node["$ref"].rpartition("/")[2]]
        for choice in node.get("oneOf", []):
            yield from walk(choice, prefix)
        for name, inner in node.get("properties", {}).items():
            yield from walk(inner, f"{prefix}{name}.")
        if "properties" not in node and "oneOf" not in node:
            yield prefix.removesuffix("."), node

    return list(walk(tree, prefix))


ALL_KEYS = {(kind, key): node for kind in (schema.schema(), CodecRecipe) for key, node in leaves(kind)}
TEXT_KEYS = [where for where, node in ALL_KEYS.items() if node.get("type") == "string"]
NUMBER_KEYS = [where for where, node in ALL_KEYS.items() if node.get("type") in ("integer", "number")]


def test_the_walk_over_the_schema_finds_all_keys():
    found = {key for kind, key in ALL_KEYS if kind is schema.schema()}
    assert found - {"tokenizer.name"} == set(keys()) - {"tokenizer.name"}
    assert {key for kind, key in ALL_KEYS if kind is CodecRecipe} == set(codec_keys())
    assert len(TEXT_KEYS) > 15
    assert len(NUMBER_KEYS) > 60


@pytest.mark.parametrize(("kind", "key"), TEXT_KEYS)
def test_a_key_that_holds_text_takes_every_text_as_it_is(kind, key):
    for text in AS_THEY_ARE:
        assert reading._parsed(kind, {}, f"{key}={text}").value == text
    assert reading._parsed(kind, {}, f"{key} = a  b ").value == "a  b"
    for text, value in (('"3"', "3"), ("'a b'", "a b"), (r'" \n"', " \n"), ('""', "")):
        assert reading._parsed(kind, {}, f"{key}={text}").value == value


def test_folders_and_alphabets_that_look_like_other_values():
    for text in ("2024", "true", "nan", "inf", "1e400", "[1]", "my folder", "a=b"):
        assert reading.read("text-tiny", [f"data.shards={text}"]).data.shards == text
    for text in ("1234567890", "10", "nat", "10e+", " ab", "ab ", "a=\"b'", "\n\t"):
        found = reading.read("text-tiny", ["tokenizer.algorithm=chars", f"tokenizer.alphabet={text}"])
        assert found.tokenizer.alphabet == text
    assert reading.read("text-tiny", ["train.steps = 200", "data.shards =  my folder "]).data.shards == "my folder"
    assert reading.read("text-tiny", ["train.steps = 200"]).train.steps == 200
    assert reading.read("music", ["model.shortcut.taps=2"]).model.shortcut.taps == "2"
    assert reading.read("audio", ["tokenizer.weights=24"]).tokenizer.weights == "24"
    assert reading.read_codec("codec-mini", ["data.speaker=7"]).data.speaker == "7"
    flag = reading.Setting("data.shards", '"2024"', '--out "2024"')
    assert reading.read("text-tiny", [flag]).data.shards == '"2024"'


@pytest.mark.parametrize(("kind", "key"), NUMBER_KEYS)
@pytest.mark.parametrize(
    "text", ["nan", "inf", "-inf", "1e400", "-1e400", str(2**63), str(-(2**63)), "9" * 5000, "-1e9"]
)
def test_no_key_takes_a_number_that_is_not_finite_or_that_nobody_means(kind, key, text):
    name = (
        "codec-mini"
        if kind is CodecRecipe
        else next(recipe for recipe in ("music-tiny", "text-tiny", "audio-tiny") if owns(recipe, key))
    )
    with pytest.raises(UsageError) as refused:
        reading.read_any(name, [f"{key}={text}"])
    shown = f"--set {key}={text}" if len(text) < 100 else f"--set {key}={text}"[:200] + "..."
    assert refused.value.message.startswith(f"{shown} is not valid\n  {key}: ")


def owns(recipe, key):
    section, name = key.split(".", 1)
    return section != "tokenizer" or name in type(reading.read(recipe).tokenizer).model_fields


@pytest.mark.parametrize("setting", ["", "k", "k=1", "s.=1", ".k=1", "s..k=1", "s.k", "=1"])
def test_a_setting_without_a_section_a_key_and_a_value_is_refused(setting):
    with pytest.raises(UsageError, match=r"is not SECTION\.KEY=VALUE"):
        reading.read("music", [setting])


def test_a_setting_without_its_section_is_completed():
    with pytest.raises(UsageError, match="--set steps=9 is not SECTION") as refused:
        reading.read("music", ["steps=9"])
    assert refused.value.hint == "for example --set train.steps=9"


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        (["train.stepz=1"], "--set train.stepz=1 is not valid\n  train.stepz: no such key", "'train.steps'?"),
        (["training.steps=1"], "--set training.steps=1 is not valid\n  training: no such key", "'train.steps'?"),
        (["train.steps=1", "train.lr=x"], "--set train.lr=x is not valid\n  train.lr: ", "recipes show"),
        (["model.width=100", "model.layers=3", "model.heads=6"], "--set model.width=100, --set model.heads=6 are", ""),
        (["eval.stride=999999", "train.steps=2"], "--set eval.stride=999999 is not valid\n  recipe: eval.stride", ""),
        (["tokenizer.codebooks=2"], "--set tokenizer.codebooks=2 is not valid", "is a key of the tokenizer audio"),
        (["tokenizer.name=text"], "--set tokenizer.name=text is not valid\n  tokenizer.scheme: no such key", ""),
        (["tokenizer.name=video"], "--set tokenizer.name=video is not valid\n  tokenizer: ", ""),
        (["train=3"], "--set train=3 is not SECTION.KEY=VALUE", ""),
        (["train.zzzzzzzzz=3"], "--set train.zzzzzzzzz=3 is not valid", "Known: train.accumulation, train.batch_size"),
        (["zzzz.qqqq=3"], "--set zzzz.qqqq=3 is not valid", "Known: data, eval, model, sample, tokenizer, train."),
        ([reading.Setting("model.name", "rnn", "--model rnn")], "--model rnn is not valid\n  model: unknown", ""),
        ([reading.Setting("train.seed", -1, "--seed -1")], "--seed -1 is not valid\n  train.seed: ", ""),
    ],
)
def test_a_wrong_setting_is_blamed_and_not_the_file(settings, message, hint):
    with pytest.raises(UsageError) as refused:
        reading.read("music", settings)
    assert refused.value.message.startswith(message)
    assert hint in refused.value.hint


def test_a_fault_of_the_file_is_not_blamed_on_a_setting(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(reading.text("music").replace("\nheads = ", "\nheads = 7 # "))
    with pytest.raises(UsageError) as refused:
        reading.read(str(path), ["model.layers=3"])
    assert refused.value.message.startswith(f"{path} is not a valid recipe\n  model: width")
    assert reading.read(str(path), ["model.heads=4"]).model.heads == 4  # a setting can mend a file


def test_settings_apply_in_order_at_any_depth_to_a_copy():
    read = reading.validate(SMALL, "here")
    settings = ["train.steps=7", " model.shortcut.taps =all", "train.steps=8", "data.shards=a b"]
    found = reading.with_settings(read, settings)
    assert writing.differences(read.model_dump(), found.model_dump()) == [
        "data.shards: 's' -> 'a b'",
        "model.shortcut.taps: 'paper' -> 'all'",
        "train.steps: 5 -> 8",
    ]
    assert read.train.steps == 5
    with pytest.raises(UsageError, match=r"--set train\.steps=0 is not valid"):
        reading.with_settings(read, ["train.steps=0"])


# Files


def test_recipes_are_found_by_name_or_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reading.find("text-tiny") == Path(reading.__file__).parents[2] / "recipes" / "text-tiny.toml"
    for name in ("mine.toml", "folder/mine", str(tmp_path / "mine.toml")):
        with pytest.raises(UsageError, match=f"recipe file {name} does not exist"):
            reading.find(name)
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("")
        assert reading.find(name) == Path(name)
        Path(name).unlink()
    Path("text-tiny").write_text("")  # a name means the recipe that comes with the program
    assert reading.find("text-tiny").parent.name == "recipes"


def test_a_recipe_file_needs_no_ending(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").write_text(reading.text("music"))
    Path("sub").mkdir()
    Path("sub/other.toml").write_text(reading.text("music"))
    assert reading.read("mine") == reading.read("./mine") == reading.read("music")
    for name, hint in (("sub/other", "Did you mean 'sub/other.toml'?"), ("sub/none", "recipes list")):
        with pytest.raises(UsageError, match=f"recipe file {name} does not exist") as refused:
            reading.read(name)
        assert hint in refused.value.hint
    for name in ("sub", "./sub"):
        with pytest.raises(UsageError, match=f"recipe {name} is a folder"):
            reading.read(name)


@pytest.mark.parametrize("name", ["music", "codec-mini"])
def test_a_recipe_may_have_a_byte_order_mark_and_the_line_ends_of_windows(tmp_path, name):
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xef\xbb\xbf" + reading.find(name).read_bytes().replace(b"\n", b"\r\n"))
    assert reading.read_any(str(path)) == reading.read_any(name)
    assert reading.header(str(path)) == reading.header(name)
    assert reading.text(str(path)) == reading.text(name)


def test_codec_recipes_and_model_recipes_are_told_apart():
    assert reading.read("music").tokenizer.name == "midi"
    assert reading.read_codec("codec-mini").codec.codebooks == 8
    with pytest.raises(UsageError, match="recipe codec-mini is for a codec") as refused:
        reading.read("codec-mini")
    assert "codec train" in refused.value.then
    with pytest.raises(UsageError, match="recipe music is not for a codec") as refused:
        reading.read_codec("music")
    assert "shortcut train --recipe music" in refused.value.then


def test_a_run_folder_is_named_for_recipe_model_and_seed():
    read = reading.read("text-tiny", ["model.name=moda", "train.seed=9", "sample.seed=4"])
    for name in ("text-tiny", "some/where/text-tiny.toml"):
        assert reading.run_folder(name, read) == Path("runs/text-tiny/moda-s9")


def test_a_header_is_the_comment_at_the_top(tmp_path):
    (tmp_path / "r.toml").write_text("#  First\n#\n# third # line\n\n# not this\n[data]\n")
    assert reading.header(str(tmp_path / "r.toml")) == "First\n\nthird # line"


@pytest.mark.parametrize(
    "settings",
    [
        ["tokenizer.transpose=[1, -2]", "tokenizer.tempo_factors=[0.5, 2.0]", 'data.shards=a "b" \\\u00e9\t\x7f'],
        ["train.lr=1e-300", "train.clip=0.0", "model.tied=false", "train.seed=9007199254740993"],
    ],
)
def test_dump_reads_back_equal_whatever_the_values(tmp_path, settings):
    read = reading.read("music", settings)
    text = writing.dump(read)
    assert tomllib.loads(text) == read.model_dump()
    (tmp_path / "r.toml").write_text(text)
    assert reading.read(str(tmp_path / "r.toml")) == read


# Names


def test_the_nearest_name_is_proposed_or_all_are_listed():
    assert registry.did_you_mean("hyperr", ["gpt", "hyper", "moda"]) == "Did you mean 'hyper'?"
    assert registry.did_you_mean("zzz", ["moda", "gpt"]) == "Known: gpt, moda."


def test_every_registered_name_is_a_class_and_other_names_are_refused():
    for table in (registry.MODELS, registry.TOKENIZERS, registry.MODEL_OPTIONS):
        for name, place in table.items():
            found = registry.load(table, name)
            assert f"{found.__module__}:{found.__name__}" == place
    with pytest.raises(UsageError, match="unknown architecture 'hyperr'") as refused:
        registry.load(registry.MODELS, "hyperr")
    assert refused.value.hint == "Did you mean 'hyper'?"
    with pytest.raises(UsageError, match="unknown domain 'video'"):
        registry.load(registry.TOKENIZERS, "video")
    assert registry.MODEL_OPTIONS.keys() <= registry.MODELS.keys()
    for name in registry.MODELS:
        assert registry.load(registry.MODELS, name).__module__ == f"shortcut_cli.models.{name}"


# Which keys bind a run

# Each key of [model], [train] and [codec] is here: one that determines the weights, or one that does not.
BINDS = {
    "model": "name layers width heads context ffn activation qk_norm init tied dropout rope_base",
    "train": "steps batch_size lr min_lr warmup schedule decay schedule_steps weight_decay beta1 beta2 clip ema seed "
    "eval_every eval_windows optimizer matrix_lr momentum momentum_warmup accumulation router_lr precision "
    "compile deterministic threads",
}
BINDS_CODEC = {
    "data": "segment_s speed gain_db mix",
    "codec": "network codebooks dimension codebook_decay",
    "train": "steps batch_size lr min_lr warmup schedule decay schedule_steps weight_decay beta1 beta2 clip ema seed "
    "eval_every eval_windows mel wave commitment adversarial_from adversarial features discriminator_filters "
    "discriminator_lr threads",
}
OF_MODELS = {"train.keep", "train.timeout_s", "train.shard", "train.checkpoint_activations"}
FREE = OF_MODELS | {"train.log_every", "train.tensorboard"}
FREE_CODEC = (FREE - OF_MODELS) | {
    "data.speaker",
    "data.val",
    "data.file_timeout_s",
    "data.file_memory_mb",
}
OPTIONS = dict.fromkeys(
    ("shortcut", "shortcut_local", "shortcut_pool"), "shortcut"
)  # the table of [model.NAME] that an architecture reads
OPTIONS |= {
    name: name
    for name in ("conv", "late_kv", "value_residual", "denseformer", "attnres", "depth_attention", "moda", "hyper")
}


def binds(tree, key):
    """Whether a change of a key changes what binds a run of a complete recipe."""
    return schema.binding(changed(tree, key, "changed")) != schema.binding(tree)


def listed(table):
    return {f"{section}.{key}" for section, names in table.items() for key in names.split()}


@pytest.mark.parametrize("name", registry.MODELS)
def test_every_key_of_a_recipe_binds_a_run_or_is_known_not_to(name):
    tree = reading.validate(changed(SMALL, "model.name", name), "here").model_dump()
    for key in schema.keys():  # noqa: SIM118 - a function
        section, _, rest = key.partition(".")
        if section in ("data", "tokenizer", "eval", "sample"):  # the first two through the checksum of the shards
            wanted = False
        elif section == "model" and "." in rest:
            wanted = rest.partition(".")[0] == OPTIONS.get(name)
        else:
            assert (key in listed(BINDS)) != (key in FREE), f"{key} is in neither list of this test, or in both"
            wanted = key in listed(BINDS)
        if key != "model.name":
            assert binds(tree, key) == wanted, key
    assert binds(tree, "model.name")


@pytest.mark.parametrize("network", ["frame", "seanet"])
def test_every_key_of_a_codec_recipe_binds_a_run_or_is_known_not_to(network):
    tree = reading.validate_codec(changed(SMALL_CODEC, "codec.network", network), "here").model_dump()
    for key in schema.codec_keys():
        if key.startswith("codec.") and key.count(".") == 2:
            wanted = key.split(".")[1] == network
        else:
            assert (key in listed(BINDS_CODEC)) != (key in FREE_CODEC), f"{key} is in neither list, or in both"
            wanted = key in listed(BINDS_CODEC)
        assert binds(tree, key) == wanted, key


def test_an_unknown_key_of_model_or_train_binds():
    """As in the recipe of a run by a newer version."""
    tree = reading.validate(SMALL, "here").model_dump()
    assert binds(tree, "train.new")
    assert binds(tree, "model.new")
    assert binds(tree, "new.key")
    assert not binds(tree, "eval.new")


@pytest.mark.parametrize("name", registry.MODELS)
def test_an_architecture_reads_only_the_options_that_bind_its_runs(name):
    """The options of [model.NAME] that a model looks at while it is built."""
    torch = pytest.importorskip("torch")
    config = reading.validate(changed(changed(SMALL, "model.name", name), "model.layers", 4), "here").model
    read = set()

    class Watched(type(config)):
        def __getattribute__(self, key):
            if key in registry.MODEL_OPTIONS:
                read.add(key)
            return super().__getattribute__(key)

    watched = Watched.model_construct(**dict(config))
    read.clear()
    with torch.device("meta"):
        model = registry.load(registry.MODELS, name)(watched, 9)
        model(torch.zeros(1, 4, dtype=torch.int64))
    assert read == ({OPTIONS[name]} if name in OPTIONS else set())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_key_without_bounds_takes_no_number_that_is_not_finite(value):
    class Loose(Config):
        number: float = 0.0
        several: list[float] = Field(default_factory=list)

    for wrong in ({"number": value}, {"several": [1.0, value]}):
        with pytest.raises(ValueError, match="finite number"):
            Loose(**wrong)


@pytest.mark.parametrize("value", [2**63, -(2**63), 10**400])
def test_a_key_without_bounds_takes_no_integer_of_more_than_63_bits(value):
    class Loose(Config):
        number: int = 0
        several: list[int] = Field(default_factory=list)

    for wrong in ({"number": value}, {"several": [1, value]}):
        with pytest.raises(ValueError, match="more than 63 bits"):
            Loose(**wrong)
    assert Loose(number=2**63 - 1).number == 2**63 - 1


HUGE = {
    "brackets": "[" * 2000,
    "closed brackets": "[" * 2000 + "]" * 2000,
    "lists": "[" * 300 + "]" * 300,
    "tables": "{a=" * 300 + "1" + "}" * 300,
    "digits": "9" * 5000,
    "hexadecimal": "0x" + "f" * 5000,
    "65 bits": "0x1" + "0" * 16,
}


@pytest.mark.parametrize("value", HUGE.values(), ids=HUGE)
@pytest.mark.parametrize("key", ["train.steps", "train.lr", "data.splits.train", "foo.bar"])
def test_a_value_that_is_too_large_to_be_shown_is_refused_in_few_words(tmp_path, key, value):
    with pytest.raises(UsageError) as refused:
        reading.read("text-tiny", [f"{key}={value}"])
    assert len(refused.value.message + refused.value.hint) < 1500
    section, name = key.rsplit(".", 1)
    (tmp_path / "r.toml").write_text(f"[{section}]\n{name} = {value}\n")
    with pytest.raises(UsageError) as refused:
        reading.read(str(tmp_path / "r.toml"))
    assert len(refused.value.message + refused.value.hint) < 3000


def test_keys_of_very_many_parts_are_refused(tmp_path):
    with pytest.raises(UsageError):
        reading.read("text-tiny", ["a." * 3000 + "b=1"])
    (tmp_path / "r.toml").write_text("[" + "a." * 3000 + "b]\nx = 1\n")
    with pytest.raises(UsageError, match="nested more than 32 deep"):
        reading.read(str(tmp_path / "r.toml"))


def test_a_recipe_with_very_many_wrong_keys_is_refused_soon_and_in_few_lines(tmp_path):
    path = tmp_path / "many.toml"
    path.write_text("[model]\n" + "".join(f"k{number} = 1\n" for number in range(20_000)))
    began = time.process_time()
    with pytest.raises(UsageError, match=r"and 19,\d\d\d more problems") as refused:
        reading.read(str(path))
    assert time.process_time() - began < 5
    assert len(refused.value.message.splitlines()) < 150
