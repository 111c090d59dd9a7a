"""How a success ends: the files of each command, and a next command that works as pasted."""

import json
import os
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from conftest import TEXT_SETTINGS, set_flags, shortcut, write_texts

from shortcut_cli import registry
from shortcut_cli.cli import commands, endings
from shortcut_cli.config import reading
from shortcut_cli.errors import UsageError

SMALL = {"steps = 150": "steps = 2", "warmup = 20": "warmup = 1", "n = 2": "n = 1", "tokens = 300": "tokens = 9"}


def next_command(done):
    """The arguments of the command that a success ends with; only a page is named below it."""
    *_, before, last = done.stderr.splitlines()
    last = before if last.startswith("Page: ") else last
    assert last.startswith("Next: shortcut "), done.stderr
    return shlex.split(last.removeprefix("Next: "))[1:]


def small_recipe(path):
    """A recipe of the user's own that trains for a moment."""
    text = reading.text("text-tiny")
    for old, new in SMALL.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def files_in(folder):
    """When each file in a folder was written, but for markers, by another way than that of the command."""
    found = [os.path.join(base, name) for base, _, names in os.walk(folder) for name in names if name[0] != "."]
    return {path: os.stat(path).st_mtime_ns for path in found}


def test_each_next_command_works_as_pasted(tmp_path):
    """prepare -> train -> eval -> sample -> attention -> compare, from names that a shell takes apart."""
    write_texts(tmp_path / "my texts")
    small_recipe(tmp_path / "my recipe.toml")
    first = ["prepare", "text", "my texts", "--recipe", "my recipe.toml", "--out", "it's shards"]
    done = shortcut(*first, *set_flags("tokenizer.vocabulary=300", "tokenizer.sample_mb=1"), cwd=tmp_path)
    ran = ["prepare"]
    while ran[-1] != "attention":
        command = next_command(done)
        done = shortcut(*command, cwd=tmp_path)
        ran.append(command[0])
    assert ran == ["prepare", "train", "eval", "sample", "attention"]
    assert next_command(done)[:2] == ["compare", "--recipe"]
    run = tmp_path / "runs" / "my recipe" / "shortcut-s1"
    assert tomllib.loads((run / "recipe.toml").read_text())["tokenizer"]["vocabulary"] == 300
    assert (run / "attention" / "attention.json").is_file()


def test_every_command_names_the_files_that_it_wrote(tmp_path):
    write_texts(tmp_path / "texts")
    small_recipe(tmp_path / "r.toml")
    before = files_in(tmp_path)
    for command in (
        ["prepare", "text", "texts", "--recipe", "r.toml", "--out", "s"],
        ["train", "--recipe", "r.toml", "--set", "data.shards=s", "--out", "o"],
        ["eval", "--ckpt", "o"],
        ["sample", "--ckpt", "o"],
        ["attention", "--ckpt", "o", "--windows", "1"],
    ):
        found = json.loads(shortcut(*command, "--json", cwd=tmp_path).stdout)
        after = files_in(tmp_path)
        new = {path for path in after if path not in before or before[path] != after[path]}
        assert {str(tmp_path / path) for path in found["written"]} == new, command
        before = after
    assert json.loads(shortcut("runs", ".", "--json", cwd=tmp_path).stdout)["written"] == []


# The tokenizer's keys


@pytest.fixture
def own(tmp_path):
    """A recipe file of the user's that says some keys of its tokenizer."""
    text = reading.text("text-tiny").replace('algorithm = "unigram"\n', "")
    (tmp_path / "own.toml").write_text(text)
    return str(tmp_path / "own.toml")


def made(**changes):
    """The tokenizer's keys of shards: those of text-tiny with changes."""
    return reading.read("text-tiny").tokenizer.model_dump() | changes


def agreed(name, settings, found):
    """The recipe that goes with shards that were made with these keys."""
    resolved = reading.read(name, settings)
    return reading.with_shards(name, resolved, settings, found, "s", ["shortcut", "train", "--recipe", name])


def test_shards_win_over_a_shipped_recipe_and_over_what_a_file_does_not_say(own):
    for name in ("text-tiny", own):
        assert agreed(name, [], made())[1] == {}
        recipe, taken = agreed(name, [], made(algorithm="bpe"))
        assert (recipe.tokenizer.algorithm, taken) == ("bpe", {"algorithm": "bpe"})
    recipe, taken = agreed("text-tiny", ["train.steps=3"], made(vocabulary=300, sample_mb=7))
    assert (recipe.tokenizer.vocabulary, recipe.tokenizer.sample_mb, recipe.train.steps) == (300, 7, 3)
    assert taken == {"vocabulary": 300, "sample_mb": 7}


def test_what_the_user_wrote_is_never_replaced(own):
    for name, settings in (
        (own, []),
        ("text-tiny", ["tokenizer.vocabulary=900"]),
        (own, ["tokenizer.vocabulary = 900"]),
    ):
        with pytest.raises(UsageError, match=r"tokenizer\.vocabulary: 300 -> ") as raised:
            agreed(name, settings, made(vocabulary=300, algorithm="bpe"))
        flags = shlex.split(raised.value.then)[4:]
        assert flags == ["--set", "tokenizer.vocabulary=300"]
        recipe, _ = agreed(name, [*settings, flags[1]], made(vocabulary=300, algorithm="bpe"))
        assert recipe.tokenizer.vocabulary == 300


@pytest.mark.parametrize("value", ["a b", " abc", "it's", "1", "true"])
def test_the_flags_that_agree_are_read_back_as_they_are(own, value):
    found = made(alphabet=value, character_coverage=0.5)
    with pytest.raises(UsageError) as raised:
        agreed(own, [], found)
    flags = shlex.split(raised.value.then)[4:]
    assert flags[::2] == ["--set", "--set"]
    assert agreed(own, flags[1::2], found)[0].tokenizer.alphabet == value


def test_another_tokenizer_is_another_recipe():
    with pytest.raises(UsageError, match="was tokenized for midi, and recipe text-tiny is for text"):
        agreed("text-tiny", [], {"name": "midi"})


@pytest.mark.parametrize("value", [{"a": 1}, [[1]], None, 1e400, "x"])
def test_a_manifest_that_holds_anything_is_a_users_error(own, value):
    for name in ("text-tiny", own):
        with pytest.raises(UsageError, match=r"s: tokenizer\.vocabulary is not valid"):
            agreed(name, [], made(vocabulary=value))


def test_shards_that_say_no_keys_change_nothing():
    resolved = reading.read("text-tiny")
    assert agreed("text-tiny", [], {}) == (resolved, {})
    assert agreed("text-tiny", [], {"a key of another version": 1}) == (resolved, {})


def test_train_takes_the_keys_of_its_shards_and_says_so(tmp_path):
    write_texts(tmp_path / "texts")
    flags = set_flags(*TEXT_SETTINGS[:2], "data.shards=s")
    shortcut("prepare", "text", "texts", "--recipe", "text-tiny", *flags, cwd=tmp_path)
    short = set_flags("data.shards=s", "train.steps=2", "train.warmup=1")
    done = shortcut("train", "--recipe", "text-tiny", *short, "--out", "o", cwd=tmp_path)
    assert re.search(r"the tokenizer's keys are those of s: .*algorithm = \"chars\"", done.stderr)
    kept = tomllib.loads((tmp_path / "o" / "recipe.toml").read_text())["tokenizer"]
    request = json.loads((tmp_path / "s" / "manifest.json").read_text())["request"]["tokenizer"]
    assert kept == request


# The parts


def test_architectures_without_reads_across_layers_are_those_that_attention_refuses():
    import torch

    silent = []
    for name in registry.MODELS:
        config = reading.read("text-tiny", [f"model.name={name}"]).model
        with torch.device("meta"):
            if not registry.load(registry.MODELS, name)(config, 100).reads():
                silent.append(name)
    assert tuple(silent) == endings.READ_NOTHING


def with_recipe(run):
    """The checkpoint of a run folder that has a recipe."""
    run.mkdir(parents=True)
    (run / "recipe.toml").write_text(reading.text("text-tiny"))
    return run / "run.pt"


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("runs/text/gpt-s1", "text"),
        ("runs/text/gpt-s12", "text"),
        ("runs/text/mine", "mine"),
        ("runs/mine", "mine"),
        ("runs/gpt-s1", "gpt-s1"),
        ("it's mine", "it's mine"),
        ("comparisons/text/other/gpt-s1", "other"),
    ],
)
def test_a_comparison_is_proposed_under_a_name_that_is_free(tmp_path, monkeypatch, run, name):
    monkeypatch.chdir(tmp_path)
    for ckpt in (with_recipe(Path(run)), tmp_path / run / "run.pt"):
        assert endings.after_sample(ckpt, "gpt") == [
            *("compare", "--recipe", str(ckpt.parent / "recipe.toml")),
            *("--models", "shortcut", "--out", f"comparisons/{name}"),
        ]
    monkeypatch.chdir(tmp_path / run)
    assert endings.after_sample(Path("run.pt"), "gpt")[-1] == f"comparisons/{name}"
    monkeypatch.chdir(tmp_path)
    for number in (2, 3):
        Path(endings.after_sample(ckpt, "gpt")[-1]).mkdir(parents=True)
        assert endings.after_sample(ckpt, "gpt")[-1] == f"comparisons/{name}-{number}"


def test_what_has_been_done_is_not_proposed_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ckpt = with_recipe(Path("runs/text/shortcut-s1"))
    folder = ckpt.parent
    (folder / "recipe.toml").write_text('[model]\nname = "shortcut"\n')
    assert endings.after_eval(ckpt) == ["sample", "--ckpt", str(folder)]
    (folder / "samples").mkdir()
    assert endings.after_eval(ckpt) == ["sample", "--ckpt", str(folder)]
    (folder / "samples" / "sample-1-000.txt.json").write_text("{}")
    assert endings.after_eval(ckpt) == endings.after_sample(ckpt, "shortcut") == ["attention", "--ckpt", str(folder)]
    (folder / "attention").mkdir()
    assert endings.after_eval(ckpt) == endings.after_sample(ckpt, "shortcut")
    assert endings.after_eval(ckpt)[0] == "compare"


def test_after_a_run_of_a_comparison_comes_the_comparison(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arms = [with_recipe(Path("my c/runs") / name) for name in ("gpt-lr0.002-s1", "shortcut-lr0.002-s1")]
    Path("my c/comparison.json").write_text("{}")
    assert endings.after_sample(arms[0], "gpt") == ["runs", "my c/runs"]  # it is not over yet
    Path("my c/compare.json").write_text("{}")
    assert endings.after_sample(arms[0], "gpt") == ["report", "my c"]
    assert endings.after_sample(arms[1], "shortcut") == ["attention", "--ckpt", "my c/runs/shortcut-lr0.002-s1"]
    assert endings.after_attention(arms[1], "shortcut") == ["report", "my c"]
    assert endings.after_attention(arms[1].resolve(), "shortcut") == ["report", str(tmp_path / "my c")]
    for inside in ("my c", "my c/runs", arms[0].parent):
        monkeypatch.chdir(tmp_path / inside)
        ckpt = Path(os.path.relpath(tmp_path / arms[0]))
        assert Path(endings.after_sample(ckpt, "gpt")[1]).resolve() == tmp_path / "my c"


def test_a_path_with_a_dash_in_front_is_no_option(tmp_path):
    shortcut("recipes", "copy", "text", "--", "-mine.toml", cwd=tmp_path)
    done = shortcut("recipes", "copy", "text-tiny", "--", "-my tiny.toml", cwd=tmp_path)
    (line,) = done.stderr.splitlines()
    assert line == "Next: shortcut recipes check './-my tiny.toml'"
    assert "-my tiny.toml" in shortcut(*shlex.split(line)[2:], cwd=tmp_path).stdout
    assert [commands._few(["-a", "b"]), commands._few(["s3://a"] * 9)] == [["./-a", "b"], ["s3://a"] * 9]


def test_the_model_of_a_run_is_read_from_the_recipe_beside_it(tmp_path):
    for text in (None, "[model]\n", "model = 3\n", "[model]\nname = 3\n", "a", "[" * 9999):
        if text is not None:
            (tmp_path / "recipe.toml").write_text(text)
        assert endings.model_of(tmp_path / "run.pt") == ""
        assert endings.after_sample(tmp_path / "run.pt", "") == []
    (tmp_path / "recipe.toml").write_text('[model]\nname = "moda"\n')
    assert endings.model_of(tmp_path / "run.pt") == "moda"


def test_many_files_are_told_on_one_line():
    paths = [f"r/{number}.txt" for number in range(20)] + ["r/a/b"]
    assert endings.told(Path("r"), paths) == (
        f"In r: {', '.join(f'{number}.txt' for number in range(8))}, 12 more files, 1 file in folders below"
    )


def test_a_whole_run_says_what_to_open_first():
    assert endings.to_open("r/report.html", ["a.mid", "b.mid"]) == (
        "Open first: r/report.html (curves, scores, 2 samples)"
    )
    assert endings.to_open("", ["a.mid", "b.mid"]) == "Open first: a.mid (2 samples)"
    assert endings.to_open("", []) == "There are no samples to open."
