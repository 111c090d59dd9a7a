"""A comparison end to end, resumed and grown, and what it writes."""

import fcntl
import json
import os

import pytest
from conftest import TEXT_SETTINGS, set_flags, shortcut


@pytest.fixture(scope="module")
def compared(text_run, tmp_path_factory):
    """A folder with a comparison, its command and what that printed; made once, whatever the number of workers."""
    shared = tmp_path_factory.getbasetemp()
    folder = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "compare"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "made.json").exists():
            return folder, *json.loads((folder / "made.json").read_text())
        made = _compare(text_run, folder)
        (folder / "made.json").write_text(json.dumps(made))
    return folder, *made


def _compare(text_run, folder):
    flags = set_flags(*TEXT_SETTINGS, f"data.shards={text_run / 'shards'}", "model.width=32", "model.ffn=64")
    command = ["compare", "--recipe", "text-tiny", "--models", "shortcut", "--seeds", "2", "--out", "c"]
    command += ["--lrs", "0.002,0.004", "--device", "cpu,cpu", "--json", *flags]
    return command, shortcut(*command, cwd=folder).stdout


def test_every_arm_stands_against_a_baseline_of_its_size(compared):
    folder, _, printed = compared
    result = json.loads(printed)
    assert result == json.loads((folder / "c" / "compare.json").read_text())
    arms = {row["label"]: row for row in result["arms"]}
    assert {"gpt", "shortcut"} < arms.keys()
    for entry in result["contrasts"]:
        arm, opponent = arms[entry["arm"]], arms[entry["opponent"]]
        assert opponent["model"] == "gpt"
        assert opponent["parameters"] == pytest.approx(arm["parameters"], rel=0.005)
        differences = [a - b for a, b in zip(arm["nats_per_token"], opponent["nats_per_token"], strict=True)]
        assert entry["differences"] == pytest.approx(differences)
        assert entry["mean"] == pytest.approx(sum(differences) / 2)
        assert entry["p_holm"] >= entry["p"]
        assert entry["documents_interval_95"][0] < entry["documents_interval_95"][1]
        assert entry["verdict"].startswith((entry["arm"], "No difference"))
    for row in arms.values():
        assert row["lr"] == float(min(row["validation_by_lr"], key=row["validation_by_lr"].get))
        assert row["tokens_per_s"] > 0
        assert row["peak_mb"] > 100
        assert [point["step"] for point in row["curve"]] == [4, 8, 12]


def test_the_page_needs_nothing_else(compared):
    folder, _, printed = compared
    page = (folder / "c" / "compare.html").read_text()
    for entry in json.loads(printed)["contrasts"]:
        assert entry["verdict"] in page
    assert page.count("<svg") == 1
    assert "<script" not in page
    assert "src=" not in page


def test_a_second_time_trains_nothing_and_another_recipe_is_refused(compared):
    folder, command, printed = compared
    before = {path: path.stat().st_mtime_ns for path in (folder / "c" / "runs").rglob("run.pt")}
    assert len(before) >= 2 * 4
    again = shortcut(*command, cwd=folder)
    assert json.loads(again.stdout) == json.loads(printed)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "c" / "runs").rglob("run.pt")}
    refused = shortcut(*command, "--set", "train.clip=0.5", cwd=folder, check=2)
    assert "train.clip" in refused.stderr


def test_equal_seeds_share_trunk_and_order(compared):
    folder, _, _ = compared
    from shortcut_cli import sealed

    recipes = [
        sealed.load(path, "run.pt")["recipe"]["train"]["seed"] for path in sorted((folder / "c").rglob("*-s2/run.pt"))
    ]
    assert set(recipes) == {2}


@pytest.mark.parametrize(
    ("flags", "words"),
    [(("--models", "gtp"), "unknown name"), (("--models", "shortcut", "--lrs", "a"), "not a list of numbers")],
)
def test_wrong_flags_are_one_panel(text_run, tmp_path, flags, words):
    shards = set_flags(*TEXT_SETTINGS, f"data.shards={text_run / 'shards'}")
    done = shortcut("compare", "--recipe", "text-tiny", *flags, "--out", "c", *shards, cwd=tmp_path, check=2)
    assert words in done.stderr
