"""What was kept is used again only if it was made from exactly what it would be made from now."""

import json
import math

import pytest
from conftest import quiet

from shortcut_cli.config import reading
from shortcut_cli.errors import CheckFailed
from shortcut_cli.kept import floors, inputs, scores

WANTED = {"shards": "a" * 64, "keys": {"lr": 0.002, "clip": None}, "split": "test"}


def changed(path, value):
    tree = json.loads(json.dumps(WANTED))
    table = tree
    for part in path[:-1]:
        table = table[part]
    table[path[-1]] = value
    return tree


def test_the_same_table_has_no_differences_also_after_json():
    assert inputs.differences(json.loads(json.dumps(WANTED)), WANTED) == []


@pytest.mark.parametrize(
    ("made_from", "lines"),
    [
        (changed(["shards"], "b" * 64), ["shards: bbbbbbbbbbbb -> aaaaaaaaaaaa"]),
        (changed(["keys", "lr"], 0.0020000001), ["keys.lr: 0.0020000001 -> 0.002"]),
        (changed(["keys"], 3), ["keys: 3 -> {'lr': 0.002, 'clip': None}"]),
        (changed(["more"], 1), ["more: 1 -> None"]),
        ({}, ["keys: None -> {'lr': 0.002, 'clip': None}", "shards: None -> aaaaaaaaaaaa", "split: None -> 'test'"]),
        # A key that is missing is not a key that is None.
        (WANTED | {"keys": {"lr": 0.002}}, ["it does not name everything that it was made from"]),
        *((other, ["what it was made from is not known"]) for other in (None, [], "x", 3)),
    ],
)
def test_every_difference_has_a_line(made_from, lines):
    assert inputs.differences(made_from, WANTED) == lines


def test_a_json_file_holds_a_table_or_is_not_there(tmp_path):
    path = tmp_path / "x.json"
    assert inputs.read(path) is None
    path.write_text('{"a": 1}')
    assert inputs.read(path) == {"a": 1}
    for content in (b"", b"{", b"[]", b"3", b"null", b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(CheckFailed, match=r"x\.json is damaged"):
            inputs.read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckFailed, match=r"x\.json can't be read: Is a directory"):
        inputs.read(path)


# Scores


CONFIG = reading.read("text-tiny").eval


def made(split="test", checkpoint="c" * 64, shards="a" * 64, stride=CONFIG.stride, nats=1.0):
    made_from = scores.made_from(checkpoint, shards, split, CONFIG.model_copy(update={"stride": stride}), "cuda:1")
    rest = dict.fromkeys(("unigram_entropy", "perplexity", "accuracy", "bits_per_unit", "interval_95"))
    rest |= {"unit": "byte", "interval_over": "documents", "documents": 2, "tokens": 3}
    rest |= {"bits_per_unit_interval_95": None}
    return {"split": split, "nats_per_token": nats, "checkpoint_sha256": checkpoint, "inputs": made_from, **rest}


def kept(folder):
    """All scores in a folder by their loss, each with the bytes of its sums."""
    content = json.loads((folder / "eval.json").read_text())
    every = [*content["splits"].values(), *content["others"]]
    assert len({score["groups"]["file"] for score in every}) == len(every)
    return {score["nats_per_token"]: scores.groups(folder, score).read_bytes() for score in every}


def keep(folder, score, own=True):
    scores.keep(folder, score, str(score["nats_per_token"]).encode(), own=own, report=quiet)


def test_no_score_takes_the_place_of_one_that_was_made_from_something_else(tmp_path):
    several = [
        (made(nats=1.0), True),
        (made(split="val", nats=2.0), True),
        (made(shards="b" * 64, nats=3.0), False),
        (made(stride=5, nats=4.0), True),
        (made(shards="b" * 64, stride=5, nats=5.0), False),
        (made(checkpoint="d" * 64, nats=6.0), False),
        (made(stride=6, nats=7.0), True),
    ]
    for count, (score, own) in enumerate(several, 1):
        keep(tmp_path, score, own)
        assert kept(tmp_path) == {
            each["nats_per_token"]: str(float(n)).encode() for n, (each, _) in enumerate(several[:count], 1)
        }
        for each, _ in several[:count]:
            assert scores.find(tmp_path, each["inputs"])["nats_per_token"] == each["nats_per_token"]
    splits = json.loads((tmp_path / "eval.json").read_text())["splits"]
    assert {name: score["nats_per_token"] for name, score in splits.items()} == {"test": 7.0, "val": 2.0}
    assert {score["groups"]["file"] for score in splits.values()} == {"eval-test.npz", "eval-val.npz"}
    # The same again replaces itself, wherever it is.
    for number in (0, 2, 6, 0):
        score, own = several[number]
        keep(tmp_path, score | {"nats_per_token": 9.0 + number}, own)
        several[number] = (score | {"nats_per_token": 9.0 + number}, own)
        assert kept(tmp_path).keys() == {each["nats_per_token"] for each, _ in several}


@pytest.mark.parametrize(
    "edit",
    [
        {"nats_per_token": 0.5},
        {"words": 7},
        {"score_sha256": "0" * 64},
        {"score_sha256": None},
        {"groups": None},
        {"groups": {"file": "eval-test.npz"}},
    ],
)
def test_a_score_that_was_edited_is_not_used(tmp_path, edit):
    """Its numbers are in eval.json alone, so that file is as good as the sums beside it."""
    score = made() | {"words": 9, "bits_per_character": 1.0, "word_perplexity": math.inf}
    keep(tmp_path, score)
    path = tmp_path / "eval.json"
    content = json.loads(path.read_text())
    assert scores.find(tmp_path, score["inputs"])["nats_per_token"] == 1.0
    content["splits"]["test"] |= edit
    path.write_text(json.dumps(content))
    assert scores.find(tmp_path, score["inputs"]) is None


def test_scores_of_an_older_version_are_kept_but_not_used(tmp_path):
    """They do not say what they were made from."""
    older = {"split": "test", "nats_per_token": 5.0, "checkpoint_sha256": "c" * 64}
    (tmp_path / "eval.json").write_text(json.dumps({"schema_version": 2, "splits": {"test": older}}))
    (tmp_path / "eval-test.npz").write_bytes(b"sums")
    new = made()
    assert scores.find(tmp_path, new["inputs"]) is None
    keep(tmp_path, new)
    content = json.loads((tmp_path / "eval.json").read_text())
    assert content == {"schema_version": 2, "splits": {"test": new}, "others": [older]}
    assert scores.find(tmp_path, new["inputs"]) == new


def test_the_kind_of_device_counts_and_its_number_does_not():
    first, second, cpu = (scores.made_from("c", "s", "test", CONFIG, name) for name in ("cuda:0", "cuda:1", "cpu"))
    assert first == second
    assert inputs.differences(cpu, first) == ["device: 'cpu' -> 'cuda'"]


# Floors


def test_floors_are_used_again_only_as_they_were_sealed_and_for_the_same_inputs(tmp_path):
    wanted = floors.made_from("a" * 64, "b" * 64, "test", 5, 100)
    found = floors.sealed(wanted, {"trained_tokens": 7, "scores": {"5-gram": {"nats_per_token": 1.25}}})
    assert floors.is_usable(json.loads(json.dumps(found)), wanted)
    others = (("c" * 64, "b" * 64, "test", 5, 100), ("a" * 64, "c" * 64, "test", 5, 100))
    others += (("a" * 64, "b" * 64, "val", 5, 100), ("a" * 64, "b" * 64, "test", 4, 100))
    others += (("a" * 64, "b" * 64, "test", 5, 99),)
    for other in others:
        assert not floors.is_usable(found, floors.made_from(*other))
    for edited in (found | {"trained_tokens": 8}, found | {"sha256": ""}, found | {"scores": {}}, {}, None, [], 3):
        assert not floors.is_usable(edited, wanted)
    # Any score in the folder may have them, of whatever checkpoint.
    assert scores.find_floors(tmp_path, wanted) is None
    scores.keep(tmp_path, made() | {"floors": found}, b"sums", own=True, report=quiet)
    scores.keep(tmp_path, made(checkpoint="d" * 64), b"more", own=True, report=quiet)
    assert scores.find_floors(tmp_path, wanted) is None  # that score is gone
    scores.keep(tmp_path, made(split="val", checkpoint="d" * 64) | {"floors": found}, b"x", own=False, report=quiet)
    assert scores.find_floors(tmp_path, wanted) == found


def test_a_damaged_file_is_moved_to_a_name_that_nothing_has(tmp_path):
    for name in ("a.json", "a.damaged-1.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "a.damaged-2.json").symlink_to("nowhere")
    assert inputs.move_away(tmp_path / "a.json") == tmp_path / "a.damaged-3.json"
    assert (tmp_path / "a.damaged-3.json").read_text() == "a.json"
    assert (tmp_path / "a.damaged-1.json").read_text() == "a.damaged-1.json"
    assert (tmp_path / "a.damaged-2.json").is_symlink()
