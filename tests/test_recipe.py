"""Recipes: strict, complete, and the same after writing and reading."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortcut_cli import registry
from shortcut_cli.codec import weights
from shortcut_cli.config import reading, writing
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
    assert tomllib.loads(f"x = {writing._toml(text)}") == {"x": text}


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
        ("eval.stride=100000", "is larger than model.context"),
        ("train.accumulation=3", "not a multiple of accumulation 3"),
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


def test_a_file_that_is_not_toml(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xff = [")
    with pytest.raises(UsageError, match="can't be read as TOML"):
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
        "shard_tokens": 268_435_456,
        "file_timeout_s": 7200,
        "file_memory_mb": 4096,
    }
    plain = {key: value for key, value in found["model"].items() if not isinstance(value, dict)}
    assert plain == SMALL["model"] | {"activation": "gelu", "tied": True, "dropout": 0.0, "rope_base": 10000.0}
    schedule = {
        "steps": 5,
        "batch_size": 4,
        "lr": 0.5,
        "min_lr": 0.1,
        "warmup": 100,
        "schedule": "cosine",
        "decay": 0.2,
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
    }
    assert found["train"] == schedule | {
        "accumulation": 1,
        "router_lr": 1.0,
        "precision": "auto",
        "compile": False,
        "deterministic": False,
    }
    assert found["eval"] == {"split": "test", "stride": 2, "batch_size": 16, "resamples": 1000}
    sampler = {"n": 4, "tokens": 9, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
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
    "data.shard_tokens": (1024, None, 1023, None),
    "data.file_timeout_s": (TINY, None, 0.0, None),
    "data.file_memory_mb": (1024, None, 1023, None),
    "model.layers": (1, None, 0, None),
    "model.width": (4, None, 0, None),
    "model.heads": (1, None, 0, None),
    "model.context": (2, None, 1, None),
    "model.ffn": (1, None, 0, None),
    "model.dropout": (0.0, 0.9999, -TINY, 1.0),
    "model.rope_base": (1.0001, None, 1.0, None),
    "train.steps": (1, None, 0, None),
    "train.batch_size": (1, None, 0, None),
    "train.lr": (TINY, None, 0.0, None),
    "train.min_lr": (0.0, 1.0, -TINY, 1.0001),
    "train.warmup": (0, None, -1, None),
    "train.decay": (TINY, 1.0, 0.0, 1.0001),
    "train.weight_decay": (0.0, None, -TINY, None),
    "train.beta1": (0.0, 0.9999, -TINY, 1.0),
    "train.beta2": (0.0, 0.9999, -TINY, 1.0),
    "train.clip": (0.0, None, -TINY, None),
    "train.ema": (0.0, 0.9999, -TINY, 1.0),
    "train.seed": (0, None, -1, None),
    "train.log_every": (1, None, 0, None),
    "train.eval_every": (1, None, 0, None),
    "train.eval_windows": (1, None, 0, None),
    "train.accumulation": (1, None, 0, None),
    "train.router_lr": (TINY, None, 0.0, None),
    "eval.stride": (1, 64, 0, 65),
    "eval.batch_size": (1, None, 0, None),
    "eval.resamples": (1, None, 0, None),
    "sample.n": (1, None, 0, None),
    "sample.tokens": (1, None, 0, None),
    "sample.temperature": (0.0, None, -TINY, None),
    "sample.top_k": (0, None, -1, None),
    "sample.top_p": (TINY, 1.0, 0.0, 1.0001),
    "sample.min_p": (0.0, 0.9999, -TINY, 1.0),
    "sample.seed": (0, None, -1, None),
}
CODEC_RANGES = {
    "data.val": (TINY, 0.4999, 0.0, 0.5),
    "data.segment_s": (0.2, 60.0, 0.1999, 60.0001),
    "data.speed": (0.0, 0.4999, -TINY, 0.5),
    "data.gain_db": (0.0, 40.0, -TINY, 40.0001),
    "data.mix": (0.0, 1.0, -TINY, 1.0001),
    "data.file_timeout_s": (TINY, None, 0.0, None),
    "data.file_memory_mb": (1024, None, 1023, None),
    "codec.codebooks": (1, 32, 0, 33),
    "codec.dimension": (2, None, 1, None),
    "codec.codebook_decay": (TINY, 0.9999, 0.0, 1.0),
    "codec.frame.width": (8, None, 7, None),
    "codec.frame.encoder_blocks": (1, None, 0, None),
    "codec.frame.decoder_blocks": (1, None, 0, None),
    "codec.frame.expansion": (1, None, 0, None),
    "codec.frame.kernel": (2, None, 1, None),
    "codec.seanet.filters": (2, None, 1, None),
    "train.mel": (0.0, None, -TINY, None),
    "train.wave": (0.0, None, -TINY, None),
    "train.commitment": (0.0, None, -TINY, None),
    "train.adversarial_from": (0, None, -1, None),
    "train.adversarial": (0.0, None, -TINY, None),
    "train.features": (0.0, None, -TINY, None),
    "train.discriminator_filters": (1, None, 0, None),
    "train.discriminator_lr": (TINY, None, 0.0, None),
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
    wrong = ["3", True, None, [3], {}, float("nan")] + ([3.0, 2.5] if whole else [])
    for value in wrong:
        with pytest.raises(UsageError) as refused:
            check(changed(tree, key, value), "here")
        assert f"  {key}: " in refused.value.message


@pytest.mark.parametrize("key", ["model.tied", "train.compile", "train.deterministic", "train.tensorboard"])
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
        (reading.validate, SMALL, "data.split", ("documents", "contiguous")),
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
        reading.validate(changed(SMALL, "train.steps", 0), "here")
    assert "recipes show music" in refused.value.hint
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
        (" a b ", " a b "),
        ("a=b", "a=b"),
        ("a/b.c", "a/b.c"),
        ("1,2,3", "1,2,3"),
        ("[1, -2]", [1, -2]),
        ("[0.5, 1e3]", [0.5, 1000.0]),
        ("[a]", "[a]"),
        ('"3"', "3"),
        ("'a b'", "a b"),
        ("3\ny = 4", "3\ny = 4"),
        ("\n abc", "\n abc"),
    ],
)
def test_a_setting_is_read_as_toml_or_else_as_text(text, value):
    tree = {"s": {"k": "old", "other": 1}}
    reading._apply(tree, f"s.k={text}")
    assert tree == {"s": {"k": value, "other": 1}}
    assert type(tree["s"]["k"]) is type(value)


@pytest.mark.parametrize("setting", ["", "k", "k=1", "s.=1", ".k=1", "s..k=1", "s.k", "=1"])
def test_a_setting_without_a_section_a_key_and_a_value_is_refused(setting):
    with pytest.raises(UsageError, match=r"is not SECTION\.KEY=VALUE"):
        reading._apply({}, setting)


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
    for where, expected in (((), "the result of --set is not a valid recipe"), (("x",), "x is not a valid recipe")):
        with pytest.raises(UsageError, match=expected):
            reading.with_settings(read, ["train.steps=0"], *where)


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


def test_codec_recipes_and_model_recipes_are_told_apart():
    assert reading.read("music").tokenizer.name == "midi"
    assert reading.read_codec("codec-mini").codec.codebooks == 8
    with pytest.raises(UsageError, match="recipe codec-mini is for a codec") as refused:
        reading.read("codec-mini")
    assert "codec train" in refused.value.hint
    with pytest.raises(UsageError, match="recipe music is not for a codec") as refused:
        reading.read_codec("music")
    assert "shortcut train --recipe music" in refused.value.hint


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
