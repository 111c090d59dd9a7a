"""`shortcut runs` and `shortcut diff`: which runs a folder holds, and how two of them differ."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import quiet, shortcut
from test_damaged_results import every
from test_training import go, stop_after, tiny

import shortcut_cli
from shortcut_cli import files
from shortcut_cli.cli import tables
from shortcut_cli.errors import CheckFailed, Interrupted, UsageError
from shortcut_cli.formatting import cell
from shortcut_cli.inference import runs as opening
from shortcut_cli.kernels import bf16
from shortcut_cli.stages import pipeline, runs
from shortcut_cli.training import checkpoint, tensor_file


@pytest.fixture(scope="module")
def some(text_run, tmp_path_factory):
    """A folder with two finished and scored runs, an unfinished one, one that has only begun, and a damaged one."""
    root = tmp_path_factory.mktemp("some")
    go(tiny(text_run), root / "text" / "gpt-s1")
    go(tiny(text_run, "train.seed=2", "train.lr=0.01", "model.layers=2"), root / "text" / "deep" / "gpt-s2")
    for name in ("gpt-s1", "deep/gpt-s2"):
        pipeline.score(root / "text" / name / "run.pt", None, "test", device="cpu", report=quiet)
    with pytest.raises(Interrupted):
        go(tiny(text_run), root / "half", stop_after(5))
    with pytest.raises(Interrupted):
        go(tiny(text_run), root / "begun", stop_after(3))
    shutil.copytree(root / "text" / "gpt-s1", root / "damaged")
    path = root / "damaged" / "run.pt"
    path.write_bytes(path.read_bytes()[:-1])
    (root / "notes").mkdir()
    (root / "notes" / "x.txt").write_text("no run")
    return root


def test_a_folder_lists_its_runs_with_their_scores(some):
    found = {entry["run"]: entry for entry in runs.listed(some)["runs"]}
    assert [*found] == ["begun", "damaged", "half", "text/deep/gpt-s2", "text/gpt-s1"]
    path = some / "text" / "deep" / "gpt-s2" / "run.pt"
    content, score = checkpoint.load(path), json.loads((path.parent / "eval.json").read_text())["splits"]["test"]
    entry = found["text/deep/gpt-s2"]
    assert [entry[key] for key in ("kind", "model", "seed")] == ["checkpoint", "gpt", 2]
    assert [entry[key] for key in ("step", "steps", "finished", "problem")] == [12, 12, True, ""]
    assert entry["best_step"] == content["step"]
    model = content["recipe"]["model"]
    assert entry["shape"] == f"{model['layers']}x{model['width']}"
    assert entry["data"] == f"text ({'/'.join(Path(content['recipe']['data']['shards']).parts[-2:])})"
    assert entry["validation"] == content["scores"]["validation"]
    assert entry["parameters"] == opening.open_run(path, "cpu").model.count()["total"]
    assert entry["checkpoint_sha256"] == files.sha256(path)
    assert entry["scores"].keys() == {"test"}
    assert all(entry["scores"]["test"][key] == score[key] for key in ("nats_per_token", "bits_per_unit", "unit"))
    half, begun, damaged = (found[name] for name in ("half", "begun", "damaged"))
    assert (half["step"], half["steps"], half["finished"], half["problem"]) == (4, 12, False, "")
    assert (begun["model"], begun["steps"]) == ("gpt", 12)
    assert "nothing was validated yet" in begun["problem"]
    assert "run.pt can't be read: it is truncated" in damaged["problem"]
    assert (damaged["model"], damaged["scores"]) == ("", {})


def test_the_description_of_a_scored_run_has_its_scores(some, tmp_path):
    run = some / "text" / "gpt-s1"
    kept = json.loads((run / "eval.json").read_text())["splits"]["test"]
    for path in (run, run / "run.pt"):
        found = json.loads(shortcut("inspect", path, "--json", cwd=tmp_path).stdout)["scores"]
        assert found.keys() == {"validation", "test"}
        assert found["validation"] == checkpoint.load(run / "run.pt")["scores"]["validation"]
        assert found["test"] == {key: kept[key] for key in found["test"]}
        assert found["test"].keys() > {"nats_per_token", "interval_95", "bits_per_unit", "unit"}
    lines = shortcut("inspect", run, cwd=tmp_path).stdout.splitlines()
    (shown,) = [line.split("\u2502")[2].strip() for line in lines if "scores.test.bits_per_unit" in line]
    assert shown == cell(kept["bits_per_unit"])
    shutil.copytree(run, tmp_path / "run")
    checkpoint.save(tmp_path / "run" / "run.pt", checkpoint.load(run / "run.pt") | {"step": 3})
    told = json.loads(shortcut("inspect", "run", "--json", cwd=tmp_path).stdout)
    assert told["scores"].keys() == {"validation"}  # the score is of another checkpoint
    (tmp_path / "run" / "eval.json").write_text("{")
    found = json.loads(shortcut("inspect", "run", "--json", cwd=tmp_path).stdout)["scores"]
    assert found.keys() == {"validation", "unreadable"}
    assert "eval.json is damaged" in found["unreadable"]


def test_a_run_folder_lists_itself(some):
    (entry,) = runs.listed(some / "text" / "gpt-s1")["runs"]
    assert entry["run"] == "."


def test_a_score_of_another_checkpoint_or_one_that_was_edited_is_not_shown(some, tmp_path):
    shutil.copytree(some / "text", tmp_path / "text")
    one, two = tmp_path / "text" / "gpt-s1", tmp_path / "text" / "deep" / "gpt-s2"
    checkpoint.save(one / "run.pt", checkpoint.load(one / "run.pt") | {"step": 3})
    content = json.loads((two / "eval.json").read_text())
    content["splits"]["test"]["nats_per_token"] = 0.1
    (two / "eval.json").write_text(json.dumps(content))
    assert [entry["scores"] for entry in runs.listed(tmp_path)["runs"]] == [{}, {}]


def test_damage_beside_a_checkpoint_is_named_and_the_rest_is_shown(some, tmp_path):
    shutil.copytree(some / "text" / "gpt-s1", tmp_path / "run")
    (tmp_path / "run" / "eval.json").write_text("{")
    (tmp_path / "run" / "log.jsonl").write_text("{\n")
    (entry,) = runs.listed(tmp_path)["runs"]
    assert "eval.json is damaged" in entry["problem"]
    assert "log.jsonl is missing or damaged: line 1" in entry["problem"]
    assert (entry["model"], entry["steps"], entry["step"]) == ("gpt", 12, None)


@pytest.mark.parametrize(
    "text", ["", "[", "[model]\nname = 3", "\x00", "[train]\n", "a = " + "[" * 9999, "[" + "a." * 5000 + "b]"]
)
def test_a_recipe_that_is_none_is_damaged(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".shortcut").write_text("shortcut train\n")
    (entry,) = runs.listed(tmp_path)["runs"]
    assert "nothing was validated yet" in entry["problem"]
    (tmp_path / "run" / "recipe.toml").write_text(text)
    (entry,) = runs.listed(tmp_path)["runs"]
    assert "recipe.toml is damaged" in entry["problem"]


@pytest.mark.parametrize("name", ["run.pt", "codec.pt", "resume.pt"])
@pytest.mark.parametrize("instead", ["folder", "link"])
def test_a_run_whose_result_is_no_file_is_listed_with_the_reason(tmp_path, name, instead):
    place = tmp_path / "odd"
    place.mkdir()
    if instead == "folder":
        (place / name).mkdir()
    else:
        (place / name).symlink_to("nowhere")
    (found,) = runs.listed(tmp_path)["runs"]
    state = "is no regular file" if instead == "folder" else "does not exist"
    assert (found["run"], state in found["problem"]) == ("odd", name != "resume.pt")


@pytest.mark.parametrize("content", [{"scores": 3}, {"splits": 3}, {"splits": {"test": 3}}])
def test_an_eval_that_holds_no_scores_is_named(some, tmp_path, content):
    shutil.copytree(some / "text" / "gpt-s1", tmp_path / "gpt")
    (tmp_path / "gpt" / "eval.json").write_text(json.dumps(content))
    (found,) = runs.listed(tmp_path)["runs"]
    assert (found["scores"], "eval.json is damaged" in found["problem"]) == ({}, True)


@pytest.mark.parametrize("content", [{}, {"kind": "codec"}, [1], {"kind": "codec", "recipe": {"codec": 3}}])
def test_a_codec_that_is_none_is_damaged(tmp_path, content):
    (tmp_path / "run").mkdir()
    tensor_file.save(tmp_path / "run" / "codec.pt", content)
    (entry,) = runs.listed(tmp_path)["runs"]
    assert "not a codec.pt" in entry["problem"]


def test_a_codec_run_is_listed(tmp_path):
    from shortcut_cli.codec import checkpoint as codecs

    shutil.copy(Path(shortcut_cli.__file__).parent / "codec" / "mini.pt", tmp_path / "codec.pt")
    (entry,) = runs.listed(tmp_path)["runs"]
    content = codecs.read(tmp_path / "codec.pt")
    assert (entry["kind"], entry["model"], entry["problem"]) == ("codec", content["recipe"]["codec"]["network"], "")
    assert entry["parameters"] == sum(tensor.numel() for tensor in content["weights"].values())
    assert entry["scores"] == content["scores"]


def test_what_is_no_folder_is_refused_and_an_empty_one_has_no_runs(tmp_path):
    for path in (tmp_path / "none", __file__):
        with pytest.raises(UsageError, match=r"(does not exist|is a file)$"):
            runs.listed(type(tmp_path)(path))
    assert runs.listed(tmp_path)["runs"] == []
    assert shortcut("runs", tmp_path, cwd=tmp_path).stdout == f"no runs in {tmp_path}\n"


def test_the_table_is_whole_at_80_columns(some, tmp_path):
    """Each number and each name is on one line; columns that would break them are named below."""
    shown = shortcut("runs", some, cwd=tmp_path, COLUMNS="80").stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert "damaged or incomplete" in shown
    entry = {
        "run": "a-recipe-with-a-name/depth_attention-s1",
        "model": "depth_attention",
        "shape": "24x1024",
        "data": "text (shards/text-tiny)",
        "step": 100_000,
        "kind": "checkpoint",
    }
    entry |= {"steps": 200_000, "validation": 12.345678, "problem": ""}
    score = {"nats_per_token": 12.345678, "bits_per_unit": 0.0012345678, "unit": "second"}
    entry |= {"scores": {"val": score, "test": score}}
    (made,) = tables.runs("runs", {"runs": [entry]})
    from rich.console import Console

    with open(tmp_path / "out", "w") as stream:
        Console(file=stream, width=80).print(made)
    lines = (tmp_path / "out").read_text().splitlines()
    assert max(map(len, lines)) <= 80
    cells = {cell.strip() for line in lines for cell in line.strip("\u2502").split("\u2502")}
    assert {entry["run"], "12.35", "0.001235 second"} <= cells
    assert lines[-1] == "more columns with --json or a wider terminal: model, data, steps"


def test_runs_and_diff_load_no_torch(some):
    for call in (f"runs.listed(Path({str(some)!r}))", f"runs.difference(*[Path({str(some / 'half')!r})] * 2)"):
        code = f"import sys\nfrom pathlib import Path\nfrom shortcut_cli.stages import runs\n{call}\n"
        code += "assert not {'torch', 'numpy'} & set(sys.modules), set(sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_difference_of_two_runs_is_what_differs(some):
    one, two = some / "text" / "gpt-s1", some / "text" / "deep" / "gpt-s2"
    found = runs.difference(one, two / "run.pt")
    assert found["runs"] == [str(one), str(two / "run.pt")]
    changes = found["differences"]
    keys = {key for key in changes if key.startswith("recipe.")}
    assert keys == {"recipe.train.seed", "recipe.train.lr", "recipe.model.layers"}
    assert changes["recipe.train.lr"] == [0.002, 0.01]
    scores = [json.loads((run / "eval.json").read_text())["splits"]["test"]["nats_per_token"] for run in (one, two)]
    assert changes["scores.test.nats_per_token"] == scores
    assert "shards" not in changes
    assert not {key for key in changes if key.startswith(("versions.", "conditions."))}
    assert runs.difference(one, one)["differences"] == {}


def test_the_precision_that_auto_chose_is_compared(text_run, tmp_path, monkeypatch):
    for name, native in (("narrow", True), ("wide", False)):
        monkeypatch.setattr(bf16, "native", lambda native=native: native)
        go(tiny(text_run, "train.precision=auto", "train.steps=3", "train.eval_every=3"), tmp_path / name)
    found = runs.difference(tmp_path / "narrow", tmp_path / "wide")["differences"]
    assert found["precision"] == ["bf16", "fp32"]


def test_shards_versions_and_first_weights_are_compared(some, tmp_path):
    content = checkpoint.load(some / "half" / "run.pt")
    content |= {"shards": "e" * 64, "versions": content["versions"] | {"torch": "1.0"}}
    content["conditions"] = [content["conditions"][0] | {"threads": 99}]
    checkpoint.save(tmp_path / "run.pt", content)
    changes = runs.difference(some / "half", tmp_path)["differences"]
    assert changes["shards"][1] == "e" * 64
    assert changes["versions.torch"][1] == "1.0"
    assert changes["conditions.threads"][1] == 99
    assert changes.keys() == {"shards", "versions.torch", "conditions.threads"}
    shown = shortcut("diff", some / "half", tmp_path, cwd=tmp_path).stdout
    assert "eeeeeeeeeeee" in shown
    assert "e" * 13 not in shown
    told = json.loads(shortcut("diff", some / "half", tmp_path, "--json", cwd=tmp_path).stdout)
    assert told["differences"] == changes
    assert "nothing differs" in shortcut("diff", some / "half", some / "half", cwd=tmp_path).stdout


def test_what_is_no_run_has_no_difference(some, tmp_path):
    with pytest.raises(UsageError, match=r"has no run\.pt"):
        runs.difference(some / "half", tmp_path)
    with pytest.raises(CheckFailed, match="can't be read"):
        runs.difference(some / "damaged", some / "half")


def test_the_description_of_a_file_is_its_content_without_tensors(some):
    path = some / "half" / "run.pt"
    whole, described = checkpoint.load(path), tensor_file.describe(path, "run.pt")
    assert {key: value for key, value in whole.items() if key not in ("model", "tokenizer")} == {
        key: value for key, value in described.items() if key not in ("model", "tokenizer")
    }
    shapes = {name: (str(tensor.dtype), tuple(tensor.shape)) for name, tensor in whole["model"].items()}
    assert shapes == {name: (f"torch.{one.storage.dtype}", one.shape) for name, one in described["model"].items()}


@pytest.mark.parametrize("name", ["eval.json", "log.jsonl"])
def test_whatever_lies_beside_a_checkpoint_the_runs_are_listed(some, tmp_path, name):
    shutil.copytree(some / "text" / "gpt-s1", tmp_path / "run")
    path = tmp_path / "run" / name
    if name == "log.jsonl":
        path.write_text(path.read_text().splitlines()[-1])
    for _ in every(path):
        (entry,) = runs.listed(tmp_path)["runs"]
        assert entry["model"] == "gpt"
        for part in tables.runs("runs", {"runs": [entry]}):
            assert part
