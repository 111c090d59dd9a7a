"""Several stages in a row: which run, in which order, with which arguments, and which results are reused."""

import hashlib
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TEXT_SETTINGS, quiet

from shortcut_cli.codec import checkpoint as codec_checkpoint
from shortcut_cli.config import reading
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.inference import runs
from shortcut_cli.stages import demo, inspection, pipeline
from shortcut_cli.training import checkpoint

NEVER = nullcontext(lambda: None)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Stages:
    """Stages that write what the real ones write, and record that they ran."""

    def __init__(self, monkeypatch, resolved):
        self.ran = []
        self.weights = b"first"
        self.recipe = resolved
        monkeypatch.setattr(runs, "open_run", lambda path, _: SimpleNamespace(path=path, recipe=self.recipe))
        monkeypatch.setattr(pipeline, "Shards", lambda folder: folder)
        for name in ("prepare", "train", "evaluate", "sample"):
            monkeypatch.setattr(pipeline, name, getattr(self, name))

    def prepare(self, _, paths, shards, *, n_workers, max_bad, **_options):
        self.ran.append(("prepare", paths, str(shards), n_workers, max_bad))
        return {"worked": len(self.ran) == 1}

    def train(self, _, folder, *, device, resume, stop, **_options):
        self.ran.append(("train", str(folder.name), device, resume, stop))
        folder.mkdir(exist_ok=True)
        (folder / "run.pt").write_bytes(self.weights)
        return {"step": 4}

    def evaluate(self, run, shards, name, *, device, **_options):
        self.ran.append(("evaluate", run.path.name, str(shards), name, device))
        return {"split": name, "of": run.path.read_bytes().decode(), "groups": {"nats": np.array([len(self.ran)])}}

    def sample(self, run, folder, config, *, prompt, device, **_options):
        self.ran.append(("sample", run.path.name, str(folder.name), config.n, prompt, device))
        paths = [folder / f"sample-{config.seed}-{number:03d}.txt" for number in range(config.n)]
        if any(path.exists() for path in paths):
            raise UsageError("exists already")
        folder.mkdir(exist_ok=True)
        for path in paths:
            path.write_text(run.path.read_bytes().decode())
            sidecar = {"checkpoint_sha256": sha256(run.path), "sampler": config.model_dump(), "prompt": prompt}
            path.with_suffix(".txt.json").write_text(json.dumps(sidecar))
        return paths

    def names(self):
        """The stages that ran since the last call, except training, which itself decides what is left to do."""
        found = [name for name, *_ in self.ran if name != "train"]
        self.ran.clear()
        return found


RESOLVED = reading.read("text-tiny", ["data.shards=the/shards", "sample.n=2", "sample.seed=5"])


@pytest.fixture
def stages(monkeypatch):
    return Stages(monkeypatch, RESOLVED)


def go(folder, resolved=RESOLVED, report=quiet):
    return pipeline.train_score_sample(resolved, folder, device="d", report=report, stop=NEVER)


def test_stages_run_in_order_with_what_the_recipe_and_the_caller_say(stages, tmp_path):
    notes = []
    options = {"n_workers": 3, "max_bad": "5", "device": "d", "stop": NEVER}

    def report(event):
        notes.append(event.text)

    for _ in range(2):
        result = pipeline.run_all(RESOLVED, ["a", "b"], tmp_path / "r", report=report, **options)
    prepare = ("prepare", ["a", "b"], "the/shards", 3, "5")
    train = ("train", "r", "d", "auto", NEVER)
    score = ("evaluate", "run.pt", "the/shards", "test", "d")
    assert stages.ran == [prepare, train, score, ("sample", "run.pt", "samples", 2, None, "d"), prepare, train]
    assert notes == ["the/shards: prepared", "the/shards: already prepared"]
    assert result["prepare"] == {"worked": False}
    assert result["train"] == {"step": 4}
    assert (result["eval"]["split"], result["eval"]["of"]) == ("test", "first")
    assert result["samples"] == [str(tmp_path / "r" / "samples" / f"sample-5-00{number}.txt") for number in (0, 1)]


def test_finished_stages_are_skipped_until_the_checkpoint_changes(stages, tmp_path):
    first = go(tmp_path)
    assert stages.names() == ["evaluate", "sample"]
    assert go(tmp_path) == first
    assert stages.names() == []
    stages.weights = b"other"
    other = go(tmp_path)
    assert stages.names() == ["evaluate", "sample"]
    assert other["eval"]["of"] == "other"
    assert other["eval"]["checkpoint_sha256"] == hashlib.sha256(b"other").hexdigest()
    assert json.loads((tmp_path / "eval.json").read_text())["splits"]["test"] == other["eval"]
    assert other["samples"] == first["samples"]
    assert [Path(path).read_text() for path in other["samples"]] == ["other", "other"]
    # Earlier samples are kept: nobody asked to remove them.
    earlier = {path.name: path.read_text() for path in (tmp_path / "samples" / "earlier-1").iterdir()}
    assert {name for name in earlier if name.endswith(".txt")} == {"sample-5-000.txt", "sample-5-001.txt"}
    assert [earlier[f"sample-5-00{number}.txt"] for number in (0, 1)] == ["first", "first"]
    assert {json.loads(earlier[f"sample-5-00{number}.txt.json"])["checkpoint_sha256"] for number in (0, 1)} == {
        first["eval"]["checkpoint_sha256"]
    }
    assert go(tmp_path) == other
    assert stages.names() == []


def test_a_missing_score_or_missing_samples_are_made(stages, tmp_path):
    first = go(tmp_path)
    stages.names()
    (tmp_path / "eval.json").unlink()
    assert go(tmp_path) | {"eval": first["eval"]} == first
    assert stages.names() == ["evaluate"]
    shutil.rmtree(tmp_path / "samples")
    assert go(tmp_path)["samples"] == first["samples"]
    assert stages.names() == ["sample"]


@pytest.mark.parametrize("lost", ["sample-5-001.txt", "sample-5-001.txt.json", "sample-5-000.txt"])
def test_incomplete_samples_are_made_again(stages, tmp_path, lost):
    first = go(tmp_path)
    stages.names()
    (tmp_path / "samples" / lost).unlink()
    assert go(tmp_path) == first
    assert stages.names() == ["sample"]
    assert len([path for path in (tmp_path / "samples").iterdir() if path.is_file()]) == 4
    # A second time, into another folder.
    (tmp_path / "samples" / lost).unlink()
    assert go(tmp_path) == first
    left = [{path.name for path in (tmp_path / "samples" / f"earlier-{n}").iterdir()} for n in (1, 2)]
    names = {f"sample-5-00{number}.txt{ending}" for number in (0, 1) for ending in ("", ".json")}
    # A .json whose sample is gone is moved with the others.
    assert left[0] == left[1] <= names - {lost}


@pytest.mark.parametrize("damaged", ["", "{", "[]", "\udcff"])
def test_a_sample_with_a_damaged_json_is_kept_and_made_again(stages, tmp_path, damaged):
    first = go(tmp_path)
    stages.names()
    (tmp_path / "samples" / "sample-5-000.txt.json").write_bytes(damaged.encode(errors="surrogateescape"))
    assert go(tmp_path) == first
    assert stages.names() == ["sample"]
    assert (tmp_path / "samples" / "earlier-1" / "sample-5-000.txt").read_text() == "first"


def test_another_split_is_scored_beside_the_first(stages, tmp_path):
    first = go(tmp_path)["eval"]
    stages.recipe = reading.with_settings(RESOLVED, ["eval.split=val"])
    second = go(tmp_path, stages.recipe)["eval"]
    assert stages.names() == ["evaluate", "sample", "evaluate"]
    assert (first["split"], second["split"]) == ("test", "val")
    assert json.loads((tmp_path / "eval.json").read_text())["splits"] == {"test": first, "val": second}
    assert go(tmp_path) | {"eval": second} == go(tmp_path, stages.recipe)
    assert stages.names() == []


@pytest.mark.parametrize(
    "setting",
    [
        *("sample.tokens=7", "sample.temperature=0.5", "sample.top_k=3", "sample.top_p=0.5", "sample.min_p=0.5"),
        *("sample.n=1", "sample.n=3"),
    ],
)
def test_samples_with_other_settings_are_neither_reused_nor_removed(stages, tmp_path, setting):
    go(tmp_path)
    other = reading.with_settings(RESOLVED, [setting])
    with pytest.raises(UsageError, match="exists already"):
        go(tmp_path, other)
    assert stages.names() == ["evaluate", "sample", "sample"]
    assert sorted(path.name for path in (tmp_path / "samples").glob("*.txt")) == [
        "sample-5-000.txt",
        "sample-5-001.txt",
    ]


def test_samples_of_another_seed_are_put_beside_the_first(stages, tmp_path):
    first = go(tmp_path)["samples"]
    second = go(tmp_path, reading.with_settings(RESOLVED, ["sample.seed=6"]))["samples"]
    assert stages.names() == ["evaluate", "sample", "sample"]
    assert len({*first, *second}) == 4
    assert go(tmp_path)["samples"] == first
    stages.weights = b"other"
    go(tmp_path)
    assert [Path(path).read_text() for path in first + second] == ["other", "other", "first", "first"]


def test_a_checkpoint_from_elsewhere_is_scored_and_sampled_as_the_recipe_says(stages, tmp_path):
    there = ["data.shards=where it was trained", "eval.split=val", "sample.n=4"]
    stages.recipe = reading.with_settings(RESOLVED, there)
    go(tmp_path)
    score = ("evaluate", "run.pt", "the/shards", "test", "d")
    assert stages.ran[1:] == [score, ("sample", "run.pt", "samples", 2, None, "d")]


def test_samples_with_a_prompt_are_not_reused(stages, tmp_path):
    (path, *_) = go(tmp_path)["samples"]
    sidecar = Path(f"{path}.json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"prompt": "p.txt"}))
    with pytest.raises(UsageError, match="exists already"):
        go(tmp_path)
    assert Path(path).exists()


def test_a_real_run_is_scored_and_sampled_again_only_if_its_checkpoint_changes(text_run, tmp_path, monkeypatch):
    config = reading.read("text-tiny", [*TEXT_SETTINGS, f"data.shards={text_run / 'shards'}", "model.name=gpt"])
    config = reading.with_settings(config, ["sample.n=1", "sample.tokens=5", "eval.resamples=10"])
    (tmp_path / "gpt").mkdir()
    path = Path(shutil.copy(text_run / "gpt" / "run.pt", tmp_path / "gpt"))
    monkeypatch.setattr(pipeline, "train", lambda *_, **__: {})

    def made():
        result = pipeline.train_score_sample(config, tmp_path / "gpt", device="cpu", report=quiet, stop=NEVER)
        (sample,) = result["samples"]
        hashes = {
            result["eval"]["checkpoint_sha256"],
            json.loads(Path(f"{sample}.json").read_text())["checkpoint_sha256"],
        }
        assert hashes == {sha256(path)}
        return {found: found.stat().st_mtime_ns for found in tmp_path.rglob("*") if found.is_file() and found != path}

    first = made()
    assert {found.name for found in first} == {
        "eval.json",
        "eval-test.npz",
        "sample-1-000.txt",
        "sample-1-000.txt.json",
    }
    assert made() == first
    checkpoint.save(path, checkpoint.load(path) | {"step": 5})
    second = made()
    earlier = tmp_path / "gpt" / "samples" / "earlier-1"
    assert second.keys() == {*first, earlier / "sample-1-000.txt", earlier / "sample-1-000.txt.json"}
    assert all(second[found] > first[found] for found in first)
    assert made() == second


# A score


def test_a_score_is_kept_by_split_with_its_groups_and_the_checkpoint(stages, tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(b"first")

    def kept():
        with np.load(tmp_path / "eval-test.npz") as test, np.load(tmp_path / "eval-val.npz") as val:
            groups = test["nats"].tolist(), val["nats"].tolist()
        return json.loads((tmp_path / "eval.json").read_text()), groups

    test = pipeline.score(path, None, None, device="d", report=quiet)
    val = pipeline.score(path, Path("other"), "val", device="e", report=quiet)
    assert stages.ran == [
        ("evaluate", "run.pt", "the/shards", "test", "d"),
        ("evaluate", "run.pt", "other", "val", "e"),
    ]
    assert test == {"split": "test", "of": "first", "checkpoint_sha256": hashlib.sha256(b"first").hexdigest()}
    assert kept() == ({"schema_version": 2, "splits": {"test": test, "val": val}}, ([1], [2]))
    path.write_bytes(b"other")
    older = json.dumps({"schema_version": 1, "splits": {"test": test, "val": val}})
    (tmp_path / "eval.json").write_text(older)
    again = pipeline.score(path, None, "test", device="d", report=quiet)
    assert again["checkpoint_sha256"] == hashlib.sha256(b"other").hexdigest()
    assert kept() == ({"schema_version": 2, "splits": {"test": again, "val": val}}, ([3], [2]))
    assert pipeline._scored(path, "test") == again
    assert pipeline._scored(path, "val") is None


# Attention


def seen_by(monkeypatch, run, *arguments):
    """The arguments that `look` passes to `cut` and to `analyse`."""
    seen = {}
    monkeypatch.setattr(runs, "open_run", lambda path, device: seen.update(opened=(path, device)) or run)

    def cut(read, tokens, context, most):
        seen.update(read=read, tokens=tokens, context=context, most=most)
        return "windows"

    def analyse(*given, **options):
        seen.update(given=given, options=options)
        return "result"

    monkeypatch.setattr(pipeline.attention, "cut", cut)
    monkeypatch.setattr(pipeline.attention, "analyse", analyse)
    assert pipeline.look(Path("run.pt"), *arguments, device="d", report=quiet) == "result"
    return seen


def test_a_prompt_or_a_split_is_read_after_an_eos(monkeypatch):
    resolved = reading.with_settings(RESOLVED, ["eval.resamples=77", "eval.batch_size=9", "model.context=99"])
    tokenizer = SimpleNamespace(eos=299, prompt=lambda _: np.array([4, 5, 6, 7]))
    run = SimpleNamespace(recipe=resolved, tokenizer=lambda: tokenizer, path=Path("run.pt"))
    run.content = {"tokenizer": {"fingerprint": "f"}}
    ids = {"val": [1, 2, 3, 4, 5], "test": [6, 7, 8]}
    opened = []

    class Split:
        def __init__(self, name):
            self.ids, self.tokens = np.array(ids[name]), len(ids[name])

        def read(self, start, length):
            assert 0 <= start <= start + length <= self.tokens
            return self.ids[start : start + length]

    class Shards:
        split = staticmethod(Split)
        tokenizer = {"fingerprint": "f", "end": 298}  # noqa: RUF012
        folder = Path("s")

        def __init__(self, folder):
            opened.append(str(folder))

    monkeypatch.setattr(pipeline, "Shards", Shards)
    for shards, split, row in ((None, "val", [298, 1, 2, 3, 4, 5]), (Path("x"), "test", [298, 6, 7, 8])):
        seen = seen_by(monkeypatch, run, None, shards, split, 12, Path("o"))
        assert (seen["tokens"], seen["context"], seen["most"]) == (len(row), 99, 12)
        for first in range(len(row)):
            for count in range(1, len(row) - first + 1):
                assert seen["read"](first, count).tolist() == row[first : first + count]
        assert seen["opened"] == (Path("run.pt"), "d")
        assert seen["given"] == (run, "windows", Path("o"))
        assert seen["options"] == {"resamples": 77, "batch": 9, "device": "d", "report": quiet}
    assert opened == ["the/shards", "x"]
    Shards.tokenizer = {"fingerprint": "g", "end": 298}
    with pytest.raises(UsageError, match="was trained with tokenizer f, s was made with g"):
        seen_by(monkeypatch, run, None, None, "val", 12, Path("o"))
    seen = seen_by(monkeypatch, run, Path(__file__), None, "val", 12, Path("o"))
    assert seen["tokens"] == 5
    assert seen["read"](0, 5).tolist() == [299, 4, 5, 6, 7]
    assert seen["read"](2, 3).tolist() == [5, 6, 7]


# The demo


def test_the_demo_goes_through_every_domain_with_both_models(monkeypatch, tmp_path):
    made, prepared, trained = [], [], []

    def material(name):
        def write(folder, **options):
            made.append((name, folder.name, options))
            (folder / "file").write_text(name)
            return 1

        return write

    for name in ("text", "midi", "audio"):
        monkeypatch.setattr(demo.material, f"write_{name}", material(name))
    monkeypatch.setattr(
        demo, "prepare", lambda config, paths, shards, **options: prepared.append((config, paths, shards, options))
    )

    def train_score_sample(config, folder, *, device, report, stop):
        trained.append((config, folder, device, stop))
        return {
            "train": {"parameters": {"total": len(trained)}},
            "eval": {"model": config.model.name},
            "samples": [f"{len(trained)}"],
        }

    monkeypatch.setattr(demo, "train_score_sample", train_score_sample)
    result = demo.demo(tmp_path, n_workers=3, device="d", report=quiet, stop=NEVER)
    names = ["text-tiny", "music-tiny", "audio-tiny"]
    pairs = [(name, model) for name in names for model in ("gpt", "shortcut")]
    assert result == {
        "schema_version": 2,
        "rows": [{"recipe": r, "parameters": i, "model": m} for i, (r, m) in enumerate(pairs, 1)],
        "samples": ["1", "2", "3", "4", "5", "6"],
    }
    assert made == [
        ("text", "text-tiny.partial", {}),
        ("midi", "music-tiny.partial", {"pieces": 300, "seed": 1}),
        ("audio", "audio-tiny.partial", {"pieces": 60, "seed": 1}),
    ]
    assert [(config.data.shards, paths, shards) for config, paths, shards, _ in prepared] == [
        (str(tmp_path / "shards" / name), [str(tmp_path / "data" / name)], tmp_path / "shards" / name) for name in names
    ]
    assert all((o["n_workers"], o["max_bad"]) == (3, "0") for *_, o in prepared)
    assert [(config.tokenizer.name, config.model.name, folder, *rest) for config, folder, *rest in trained] == [
        (tokenizer, model, tmp_path / "runs" / name / f"{model}-s1", "d", NEVER)
        for name, tokenizer in zip(names, ("text", "midi", "audio"), strict=True)
        for model in ("gpt", "shortcut")
    ]
    assert [config.data.shards for config, *_ in trained] == [str(tmp_path / "shards" / name) for name, _ in pairs]
    made.clear()
    demo.demo(tmp_path, n_workers=3, device="d", report=quiet, stop=NEVER)
    assert made == []  # the existing data is reused


def test_unfinished_material_is_made_again(tmp_path):
    def fails(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    def works(folder):
        (folder / "whole").write_text("")
        return 1

    with pytest.raises(KeyboardInterrupt):
        demo._once(tmp_path / "d", fails, quiet)
    assert not (tmp_path / "d").exists()
    assert demo._once(tmp_path / "d", works, quiet) == tmp_path / "d"
    assert (tmp_path / "d" / "whole").exists()
    assert demo._once(tmp_path / "d", fails, quiet) == tmp_path / "d"
    assert not (tmp_path / "d.partial").exists()


# Inspection


def test_a_checkpoint_is_described_by_its_own_numbers(monkeypatch, tmp_path):
    resolved = reading.with_settings(RESOLVED, ["model.context=100", "model.name=gpt"])
    model = SimpleNamespace(
        count=lambda: {"total": 7}, flops=lambda context: 33 * context + 99, cache_bytes_per_token=lambda: 48
    )
    content = {
        "step": 5,
        "scores": {"validation": 1.5},
        "tokenizer": {"fingerprint": "f", "files": {}},
        "shards": "s",
        "versions": {"torch": "2"},
    }
    run = SimpleNamespace(recipe=resolved, model=model, content=content)
    (tmp_path / "run.pt").write_bytes(b"PK")
    opened = []
    monkeypatch.setattr(runs, "open_run", lambda *arguments: opened.append(arguments) or run)
    monkeypatch.setattr(codec_checkpoint, "is_codec", lambda _: False)
    assert inspection.inspect(tmp_path / "run.pt", verify=False) == {
        "kind": "checkpoint",
        "path": str(tmp_path / "run.pt"),
        "model": "gpt",
        "parameters": {"total": 7},
        "forward_flops_per_token": 33,
        "cache_bytes_per_token": 48,
        "step": 5,
        "scores": {"validation": 1.5},
        "tokenizer": "f",
        "shards": "s",
        "versions": {"torch": "2"},
        "recipe": resolved.model_dump(),
    }
    assert opened == [(tmp_path / "run.pt", "cpu")]


def test_a_codec_is_described_by_its_own_numbers(monkeypatch, tmp_path):
    content = {
        "recipe": {"codec": {"network": "seanet"}},
        "step": 5,
        "scores": {"x": 1.5},
        "versions": {"torch": "2"},
    }
    tensors = {"a": SimpleNamespace(numel=lambda: 6), "b": SimpleNamespace(numel=lambda: 4)}
    monkeypatch.setattr(codec_checkpoint, "is_codec", lambda _: True)
    monkeypatch.setattr(codec_checkpoint, "load", lambda _: SimpleNamespace(codebooks=9))
    monkeypatch.setattr(codec_checkpoint, "read", lambda _: content | {"weights": tensors})
    (tmp_path / "codec.pt").write_bytes(b"PK")
    found = inspection.inspect(tmp_path / "codec.pt", verify=True)
    expected = {"kind": "codec", "network": "seanet", "codebooks": 9, "parameters": 10, **content}
    assert found == expected | {"path": str(tmp_path / "codec.pt")}


def test_shards_are_checked_by_size_or_with_verify_byte_by_byte(text_run, tmp_path):
    folder = tmp_path / "s"
    shutil.copytree(text_run / "shards", folder)
    for verify in (False, True):
        found = inspection.inspect(folder, verify=verify)
        assert (found["kind"], found["path"], found["verified"]) == ("shards", str(folder), verify)
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["files"], manifest["request"]
        assert {key: found[key] for key in found if key not in ("kind", "path", "verified")} == manifest
    path = folder / "val-00000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (folder / "more").write_text("")
    inspection.inspect(folder, verify=False)
    with pytest.raises(CheckFailed) as refused:
        inspection.inspect(folder, verify=True)
    assert refused.value.message.splitlines() == [
        f"{folder} is not as it was written",
        "  val-00000.bin has changed since it was written",
        "  more does not belong to the folder",
    ]
    for split in ("train", "val", "test"):
        path = folder / f"{split}-00000.bin"
        whole = path.read_bytes()
        path.write_bytes(whole[:-2])
        with pytest.raises(CheckFailed, match=f"{split}-00000.bin has {len(whole) - 2} bytes"):
            inspection.inspect(folder, verify=False)
        path.write_bytes(whole)


def test_recipes_and_other_files_are_told_apart(tmp_path):
    path = reading.find("text-tiny")
    found = inspection.inspect(path, verify=False)
    assert found == {"kind": "recipe", "path": str(path), **reading.read("text-tiny").model_dump()}
    for name, text in (("a.txt", "neither a shards folder"), ("missing.pt", "does not exist")):
        with pytest.raises(UsageError, match=text):
            inspection.inspect(tmp_path / name, verify=False)
