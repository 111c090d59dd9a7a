"""The tables of RESULTS.md from results of every version of `shortcut compare`."""

import itertools
import json

import pytest
import results

ARM = {"label": "gpt", "layers": 4, "width": 96, "ffn": 384, "lr": 0.002, "parameters": 1234567}
ARM |= {"training_flops_per_token": 7654321, "tokens_per_s": 4321.6, "peak_mb": 1321.4, "cache_bytes_per_token": 2048}
ARM |= {"nats_per_token": [2.5, 2.75], "bits_per_unit": [1.0, 1.5], "unit": "note", "seeds": [1, 2]}
CONTRAST = {"arm": "conv", "baseline": "ladder", "seeds": 2, "mean": -0.0123, "interval_95": [-0.02, 0.0046]}
CONTRAST |= {"documents_interval_95": [-0.03, 0.04], "wins": 2, "p": 0.0112, "p_holm": 0.0224, "level": 0.025}
CONTRAST |= {"gain": {"gain": 1.2345, "interval_95": [1.01, None]}, "verdict": "conv beats the ladder."}


def tables_of(tmp_path, monkeypatch, **changes):
    recipe = {"model": {"layers": 4, "width": 96, "heads": 4, "ffn": 384, "context": 128}, "train": {"steps": 300}}
    result = {"recipe": recipe, "match": "flops", "split": "test", "tokens_per_step": 4096, "epochs": 1.25}
    result |= {"arms": [ARM], "contrasts": [CONTRAST], "ladder": {"cost": "training FLOPs per token"}} | changes
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "compare.json").write_text(json.dumps(result))
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    lines = [*results.tables("x")]
    assert all(isinstance(one, str) for one in lines)
    for before, after in itertools.pairwise(lines):  # all rows of a table have its columns
        if before.startswith("|") and after.startswith("|"):
            assert before.count("|") == after.count("|")
    return lines


def row(lines, label):
    (found,) = [one.strip("| ").split(" | ") for one in lines if one.startswith(f"| `{label}` ")]
    return found


def test_a_ladder_has_levels_and_gains(tmp_path, monkeypatch):
    lines = tables_of(tmp_path, monkeypatch, notices=["A/A: fine."])
    assert row(lines, "conv") == [
        *("`conv`", "`ladder`", "-0.0123", "-0.0200 to +0.0046", "-0.0300 to +0.0400", "2 of 2", "0.0112", "0.0224"),
        *("0.025", "1.23", "1.01 to beyond"),
    ]
    assert "a ladder over training FLOPs per token; test split" in lines[0]
    assert lines[-2:] == ["- A/A: fine.", "- conv beats the ladder."]


@pytest.mark.parametrize(("curvature", "words"), [(0.0, "; a ladder over"), (0.03, "; a curved ladder over")])
def test_a_ladder_that_is_curved_is_called_so(curvature, words, tmp_path, monkeypatch):
    ladder = {"cost": "training FLOPs per token", "curvature": curvature}
    assert words in tables_of(tmp_path, monkeypatch, ladder=ladder)[0]


def test_a_contrast_that_is_not_available_says_why(tmp_path, monkeypatch):
    missing = {"arm": "x0", "baseline": "gpt", "baselines": [], "seeds": 2, "unavailable": "x0 diverged at seed 2"}
    none = CONTRAST | {"gain": {"reason": "the ladder is flat"}}
    lines = tables_of(tmp_path, monkeypatch, contrasts=[missing | {"verdict": "x0 is not compared."}, none])
    assert row(lines, "x0")[:3] == ["`x0`", "`gpt`", "not compared: x0 diverged at seed 2"]
    assert row(lines, "conv")[-2:] == ["the ladder is flat", "-"]


def test_one_seed_and_a_run_that_diverged_have_no_numbers(tmp_path, monkeypatch):
    alone = CONTRAST | dict.fromkeys(("interval_95", "p", "p_holm", "level"))
    broken = ARM | {"nats_per_token": [2.5, None], "bits_per_unit": [1.0, None], "tokens_per_s": None, "peak_mb": None}
    lines = tables_of(tmp_path, monkeypatch, arms=[broken], contrasts=[alone], ladder=None)
    assert row(lines, "conv")[3:] == ["-", "-0.0300 to +0.0400", "2 of 2", "-", "-", "-"]
    assert row(lines, "gpt")[5:] == ["-", "-", "2,048", "2.5000, diverged", "-", "-"]


@pytest.mark.parametrize("key", ["level", "gain"])
def test_results_from_before_have_no_empty_columns(tmp_path, monkeypatch, key):
    old = {name: value for name, value in CONTRAST.items() if name not in ("level", "gain")}
    lines = tables_of(tmp_path, monkeypatch, contrasts=[old], ladder=None)
    assert len(row(lines, "conv")) == 8
    assert key not in "".join(lines)


def test_floors_are_named(tmp_path, monkeypatch):
    floors = {"scores": {"5-gram": {"nats_per_token": 3.25}, "unigram": {"nats_per_token": 4.5}}}
    lines = tables_of(tmp_path, monkeypatch, floors=floors)
    assert "Floors, nats per token: 5-gram 3.2500, unigram 4.5000." in lines
