"""Recipes: strict, complete, and the same after writing and reading."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shortcut_cli import recipe, registry
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
    assert recipe.names() == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_valid_and_complete(name):
    tree = tomllib.loads(recipe.find(name).read_text())
    read = recipe.read_any(name)
    # Every key is written down, at the value that it has.
    assert recipe.differences(tree, read.model_dump()) == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_header_says_what_and_how(name):
    header = recipe.header(name)
    assert f"--recipe {name}" in header
    assert len(header.splitlines()[0]) < 90
    if name.startswith("paper-"):
        assert "reconstruction" in header.lower()


@pytest.mark.parametrize("name", SHIPPED)
def test_dump_reads_back_equal(name, tmp_path):
    read = recipe.read_any(name)
    (tmp_path / "r.toml").write_text(recipe.dump(read))
    assert recipe.read_any(str(tmp_path / "r.toml")) == read


@given(st.text())
def test_any_text_value_survives(text):
    assert tomllib.loads(f"x = {recipe._toml(text)}") == {"x": text}


def test_settings_win_over_the_recipe():
    read = recipe.read(
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
        ("model.name=transformer", "unknown name 'transformer'"),
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
        recipe.read("music", [setting])
    assert message in caught.value.message


def test_a_misspelt_key_gets_a_proposal():
    with pytest.raises(UsageError) as caught:
        recipe.read("music", ["train.stepz=5"])
    assert "Did you mean 'train.steps'?" in caught.value.hint


@pytest.mark.parametrize(("name", "hint"), [("musik", "Did you mean 'music'?"), ("zzzz", "Known: audio,")])
def test_an_unknown_recipe(name, hint):
    with pytest.raises(UsageError) as caught:
        recipe.read(name)
    assert hint in caught.value.hint


def test_a_file_that_is_no_toml(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xff = [")
    with pytest.raises(UsageError, match="can't be read as TOML"):
        recipe.read(str(path))


def test_one_file_serves_every_arm():
    for name in registry.MODELS:
        assert recipe.read("music", [f"model.name={name}"]).model.name == name


def test_differences_names_the_keys():
    old = {"a": {"b": 1, "c": 2}, "d": 3}
    assert recipe.differences(old, {"a": {"b": 1, "c": 5}}) == ["a.c: 2 -> 5", "d: 3 -> None"]
