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
from shortcut_cli.events import Part
from shortcut_cli.inference import runs
from shortcut_cli.inference.prompts import Given
from shortcut_cli.stages import demo, inspection, pipeline
from shortcut_cli.training import checkpoint

NEVER = nullcontext(lambda: None)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# What a score has besides, so that it is whole.
REST = dict.fromkeys(("nats_per_token", "unigram_entropy", "perplexity", "accuracy", "bits_per_unit", "interval_95"))
REST |= {"bits_per_unit_interval_95": None, "unit": "byte", "interval_over": "documents", "documents": 2, "tokens": 3}


class Stages:
    """Stages that write what the real ones write, and record that they ran."""

    def __init__(self, monkeypatch, resolved):
        self.ran = []
        self.weights = b"first"
        self.recipe = resolved
        self.checksums = {"the/shards": "a" * 64}  # of shards, by folder; that of the others is "b" * 64
        monkeypatch.setattr(runs, "open_run", self.open_run)
        monkeypatch.setattr(pipeline, "Shards", self.Shards)
        monkeypatch.setattr(pipeline.floors, "measure", lambda *_: {"trained_tokens": 3, "scores": {}})
        for name in ("prepare", "train", "evaluate", "sample"):
            monkeypatch.setattr(pipeline, name, getattr(self, name))

    def open_run(self, path, _):
        return SimpleNamespace(path=path, recipe=self.recipe, content={"shards": "a" * 64})

    def Shards(self, folder):  # noqa: N802
        return SimpleNamespace(folder=folder, manifest={"checksum": self.checksums.get(str(folder), "b" * 64)})

    def prepare(self, _, paths, shards, *, n_workers, max_bad, **_options):
        self.ran.append(("prepare", paths, str(shards), n_workers, max_bad))
        return {"worked": len(self.ran) == 1, "splits": {"test": {"tokens": 640}}}

    def train(self, _, folder, *, device, resume, stop, **_options):
        self.ran.append(("train", str(folder.name), device, resume, stop))
        folder.mkdir(exist_ok=True)
        (folder / "run.pt").write_bytes(self.weights)
        return {"step": 4}

    def evaluate(self, run, shards, name, config, *, device, **_options):
        self.ran.append(("evaluate", run.path.name, str(shards.folder), name, device))
        self.scored = config
        sums = {"nats": np.array([len(self.ran)])}
        return {**REST, "split": name, "of": run.path.read_bytes().decode(), "groups": sums}

    def sample(self, run, folder, config, *, prompt, device, have=(), **_options):
        self.ran.append(("sample", run.path.name, str(folder.name), config.n, prompt, device))
        paths = [folder / f"sample-{config.seed}-{number:03d}.txt" for number in range(config.n)]
        new = [path for path in paths if path not in have]
        if any(path.exists() for path in new):
            raise UsageError("exists already")
        folder.mkdir(exist_ok=True)
        for path in new:
            path.write_text(run.path.read_bytes().decode())
            number = int(path.stem[-3:])
            sidecar = {"checkpoint": "../run.pt", "checkpoint_sha256": sha256(run.path), "number": number}
            sidecar |= {"sampler": config.model_dump(), "prompt": prompt and str(prompt), "device": device}
            sidecar |= {"prompt_sha256": prompt and sha256(prompt), "prompt_tokens": 5 if prompt else 0}
            path.with_suffix(".txt.json").write_text(json.dumps(sidecar | {"sha256": sha256(path)}))
        return paths

    def names(self):
        """The stages that ran since the last call, except training, which itself decides what is left to do."""
        found = [name for name, *_ in self.ran if name != "train"]
        self.ran.clear()
        return found


RESOLVED = reading.read("text-tiny", ["data.shards=the/shards", "sample.n=2", "sample.seed=5"])


@pytest.fixture
def the_shards(monkeypatch, tmp_path_factory):
    """A working directory with the shards folder of the recipe."""
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    Path("the/shards").mkdir(parents=True)


@pytest.fixture
def stages(monkeypatch, the_shards):
    return Stages(monkeypatch, RESOLVED)


def go(folder, resolved=RESOLVED, report=quiet):
    return pipeline.train_score_sample(resolved, folder, device="d", report=report, stop=NEVER, begin=quiet)


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
    rest = ["train", "evaluate", "sample"]
    prepared = ["the/shards: prepared", "the/shards: already prepared"]
    assert notes == ["prepare", prepared[0], *rest, "prepare", prepared[1], *rest]
    assert result["prepare"]["worked"] is False
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
    # A second time, into another folder: of a name that nothing has, not even a link that leads nowhere.
    (tmp_path / "samples" / "earlier-2").symlink_to("nowhere")
    (tmp_path / "samples" / lost).unlink()
    assert go(tmp_path) == first
    left = [{path.name for path in (tmp_path / "samples" / f"earlier-{n}").iterdir()} for n in (1, 3)]
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
def test_samples_with_other_settings_are_neither_reused_nor_lost(stages, tmp_path, setting):
    first = go(tmp_path)["samples"]
    before = {path.name: path.read_bytes() for path in (tmp_path / "samples").iterdir()}
    other = reading.with_settings(RESOLVED, [setting])
    second = go(tmp_path, other)["samples"]
    assert stages.names() == ["evaluate", "sample", "sample"]
    assert second == first[: other.sample.n] + [str(tmp_path / "samples" / "sample-5-002.txt")] * (other.sample.n == 3)
    assert go(tmp_path, other)["samples"] == second
    assert stages.names() == []
    folders = (tmp_path / "samples" / "earlier-1", tmp_path / "samples")
    left = {path.name: path.read_bytes() for folder in folders for path in folder.glob("*.txt")}
    assert {name: left[name] for name in before if name.endswith(".txt")} == {
        name: content for name, content in before.items() if name.endswith(".txt")
    }


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


@pytest.mark.parametrize(
    "change",
    [
        *({"prompt": "p.txt"}, {"prompt_sha256": "c" * 64}, {"prompt_tokens": 3}, {"number": 1}, {"device": "cuda:1"}),
        *({"sha256": "d" * 64}, {"checkpoint_sha256": "e" * 64}, {"sampler": {}}, {"sampler": None}),
    ],
)
def test_a_sample_that_was_made_otherwise_is_not_taken_for_the_runs_own(stages, tmp_path, change):
    (path, *_) = go(tmp_path)["samples"]
    stages.names()
    sidecar = Path(f"{path}.json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | change))
    go(tmp_path)
    assert stages.names() == ["sample"]
    moved = json.loads((tmp_path / "samples" / "earlier-1" / sidecar.name).read_text())
    assert {key: moved[key] for key in change if key != "prompt"} == {k: v for k, v in change.items() if k != "prompt"}
    assert moved["checkpoint"] == "../../run.pt"  # it lies a folder deeper
    assert moved["prompt"] == ("../p.txt" if change.get("prompt") else None)


@pytest.mark.parametrize("missing", ["prompt", "prompt_sha256", "prompt_tokens", "number", "device", "sha256"])
def test_a_sample_whose_json_does_not_say_how_it_was_made_is_made_again(stages, tmp_path, missing):
    (path, *_) = go(tmp_path)["samples"]
    stages.names()
    sidecar = Path(f"{path}.json")
    content = json.loads(sidecar.read_text())
    del content[missing]
    sidecar.write_text(json.dumps(content))
    go(tmp_path)
    assert stages.names() == ([] if missing.startswith("prompt") and missing != "prompt_tokens" else ["sample"])


def test_an_altered_sample_is_kept_and_made_again(stages, tmp_path):
    (path, *_) = go(tmp_path)["samples"]
    Path(path).write_text("altered")
    go(tmp_path)
    assert stages.names() == ["evaluate", "sample", "sample"]
    assert (tmp_path / "samples" / "earlier-1" / Path(path).name).read_text() == "altered"


def test_a_real_run_is_scored_and_sampled_again_only_if_its_checkpoint_changes(text_run, tmp_path, monkeypatch):
    config = reading.read("text-tiny", [*TEXT_SETTINGS, f"data.shards={text_run / 'shards'}", "model.name=gpt"])
    config = reading.with_settings(config, ["sample.n=1", "sample.tokens=5", "eval.resamples=10"])
    (tmp_path / "gpt").mkdir()
    path = Path(shutil.copy(text_run / "gpt" / "run.pt", tmp_path / "gpt"))
    monkeypatch.setattr(pipeline, "train", lambda *_, **__: {})

    def made():
        result = pipeline.train_score_sample(
            config, tmp_path / "gpt", device="cpu", report=quiet, stop=NEVER, begin=quiet
        )
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


def test_samples_that_were_drawn_before_neither_stop_a_run_nor_are_lost(text_run, tmp_path, monkeypatch):
    """With the real stages: one sample, and some with a prompt, then the whole run; then the first made again."""
    config = reading.read("text-tiny", [*TEXT_SETTINGS, f"data.shards={text_run / 'shards'}", "model.name=gpt"])
    config = reading.with_settings(config, ["sample.n=2", "sample.tokens=5", "eval.resamples=10"])
    shutil.copytree(text_run / "gpt", tmp_path / "gpt")
    path, samples = tmp_path / "gpt" / "run.pt", tmp_path / "gpt" / "samples"
    prompt = text_run / "texts" / "000.txt"

    def draw(*settings, prompt=None, like=None):
        given = Given(prompt=prompt and str(prompt))
        return pipeline.draw(None if like else path, like, given, [*settings], None, device="cpu", report=quiet)

    def whole():
        return pipeline.train_score_sample(
            config, tmp_path / "gpt", device="cpu", report=quiet, stop=NEVER, begin=quiet
        )["samples"]

    (first,) = draw("sample.n=1", "sample.tokens=7")
    text, stamp = first.read_text(), first.stat().st_mtime_ns
    assert draw("sample.n=1", "sample.tokens=7") == [first]  # the same again is not drawn again
    assert first.stat().st_mtime_ns == stamp
    for other in (("sample.n=1", "sample.tokens=8"), ("sample.n=2", "sample.tokens=7")):
        with pytest.raises(UsageError, match="exists already"):
            draw(*other)
    with pytest.raises(UsageError, match="exists already"):
        draw("sample.n=1", "sample.tokens=7", prompt=prompt)
    own = whole()
    assert [Path(name).name for name in own] == ["sample-1-000.txt", "sample-1-001.txt"]
    assert (samples / "earlier-1" / first.name).read_text() == text
    monkeypatch.setattr(pipeline, "sample", None)
    assert whole() == own
    monkeypatch.undo()
    (again,) = draw(like=samples / "earlier-1" / f"{first.name}.json")
    assert again.read_text() == text
    shutil.rmtree(samples)
    prompted = draw("sample.n=2", "sample.tokens=5", prompt=prompt)
    assert draw("sample.n=2", "sample.tokens=5", prompt=prompt) == prompted
    same_bytes = tmp_path / "same.jsonl"  # which is read in another way
    shutil.copy(prompt, same_bytes)
    with pytest.raises(UsageError, match="line 1 is not JSON"):
        draw("sample.n=2", "sample.tokens=5", prompt=same_bytes)
    with pytest.raises(UsageError, match="is not a file"):
        draw("sample.n=3", prompt=tmp_path)
    texts = [made.read_text() for made in prompted]
    assert whole() == own
    assert [(samples / "earlier-1" / made.name).read_text() for made in prompted] == texts
    assert not Path(own[0]).read_text().startswith(prompt.read_text())
    with pytest.raises(UsageError, match=r"prompt nowhere\.txt does not exist"):
        draw(prompt="nowhere.txt")


# A score


def kept_scores(folder):
    return json.loads((folder / "eval.json").read_text())


def test_a_score_of_other_shards_stands_beside_the_runs_own(stages, tmp_path):
    own = go(tmp_path)["eval"]
    other = pipeline.score(tmp_path / "run.pt", Path("other"), None, device="d", report=quiet)
    assert stages.names() == ["evaluate", "sample", "evaluate"]
    assert kept_scores(tmp_path) == {"schema_version": 2, "splits": {"test": own}, "others": [other]}
    assert other["groups"]["file"] != own["groups"]["file"] == "eval-test.npz"
    for score, number in ((own, 2), (other, 4)):  # of the stage
        with np.load(tmp_path / score["groups"]["file"]) as stored:
            assert stored["nats"].tolist() == [number]
        assert score["groups"]["sha256"] == sha256(tmp_path / score["groups"]["file"])
    assert go(tmp_path)["eval"] == own
    assert stages.names() == []
    # The same again takes its own place only.
    again = pipeline.score(tmp_path / "run.pt", Path("other"), None, device="d", report=quiet)
    assert kept_scores(tmp_path) == {"schema_version": 2, "splits": {"test": own}, "others": [again]}


def test_a_score_of_another_checkpoint_of_the_folder_is_not_the_runs_own(stages, tmp_path):
    own = go(tmp_path)["eval"]
    (tmp_path / "resume.pt").write_bytes(b"later")
    other = pipeline.score(tmp_path / "resume.pt", None, None, device="d", report=quiet)
    assert kept_scores(tmp_path) == {"schema_version": 2, "splits": {"test": own}, "others": [other]}
    # A checkpoint without a run has its scores by split.
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "x.pt").write_bytes(b"later")
    alone = pipeline.score(tmp_path / "alone" / "x.pt", None, None, device="d", report=quiet)
    assert kept_scores(tmp_path / "alone") == {"schema_version": 2, "splits": {"test": alone}, "others": []}


def test_changed_eval_keys_score_again_and_no_score_is_lost(stages, tmp_path):
    first = go(tmp_path)["eval"]
    other = reading.with_settings(RESOLVED, ["eval.stride=16"])
    second = go(tmp_path, other)["eval"]
    assert (first["inputs"]["stride"], second["inputs"]["stride"], stages.scored) == (64, 16, other.eval)
    assert stages.names() == ["evaluate", "sample", "evaluate"]
    (left,) = kept_scores(tmp_path)["others"]
    assert kept_scores(tmp_path)["splits"] == {"test": second}
    assert {key: left[key] for key in left if key != "groups"} == {key: first[key] for key in left if key != "groups"}
    assert left["groups"]["sha256"] == first["groups"]["sha256"] == sha256(tmp_path / left["groups"]["file"])
    assert go(tmp_path)["eval"] == left
    assert go(tmp_path, other)["eval"] == second
    assert stages.names() == []


def test_the_score_of_a_checkpoint_that_was_replaced_is_not_kept(stages, tmp_path):
    go(tmp_path)
    stages.weights = b"other"
    second = go(tmp_path)["eval"]
    assert kept_scores(tmp_path) == {"schema_version": 2, "splits": {"test": second}, "others": []}


@pytest.mark.parametrize(
    "key", ["checkpoint_sha256", "shards", "split", "stride", "batch_size", "resamples", "device", "schema_version"]
)
def test_a_score_is_used_again_only_if_all_that_it_depends_on_is_the_same(stages, tmp_path, key):
    score = go(tmp_path)["eval"]
    assert key in score["inputs"]
    content = kept_scores(tmp_path)
    for change in ({key: "x"}, {}):
        stages.names()
        inputs = {name: value for name, value in score["inputs"].items() if name != key} | change
        content["splits"]["test"] = score | {"inputs": inputs}
        (tmp_path / "eval.json").write_text(json.dumps(content))
        go(tmp_path)
        assert stages.names() == ["evaluate"]


@pytest.mark.parametrize("damage", ["missing", "altered", "unnamed", "elsewhere"])
def test_a_score_without_its_own_sums_by_document_is_made_again(stages, tmp_path, damage):
    score = go(tmp_path)["eval"]
    stages.names()
    sums, content = tmp_path / "eval-test.npz", kept_scores(tmp_path)
    if damage == "missing":
        sums.unlink()
    elif damage == "altered":
        sums.write_bytes(sums.read_bytes() + b"x")
    else:
        named = {"unnamed": None, "elsewhere": score["groups"] | {"file": f"../{tmp_path.name}/eval-test.npz"}}[damage]
        content["splits"]["test"]["groups"] = named
        (tmp_path / "eval.json").write_text(json.dumps(content))
    go(tmp_path)
    assert stages.names() == ["evaluate"]


@pytest.mark.parametrize(
    "damaged", ["", "{", "[]", '{"splits": []}', '{"splits": {"test": 3}}', "\udcff", "[" * 100000]
)
def test_a_damaged_eval_json_is_moved_away_and_the_score_made_again(stages, tmp_path, damaged):
    first, notes = go(tmp_path)["eval"], []
    stages.names()
    content = damaged.encode(errors="surrogateescape")
    (tmp_path / "eval.json").write_bytes(content)
    assert go(tmp_path, report=lambda event: notes.append(event.text))["eval"] == first
    assert stages.names() == ["evaluate"]
    assert (tmp_path / "eval.damaged-1.json").read_bytes() == content
    (note,) = notes
    assert "eval.json is damaged" in note
    assert "eval.damaged-1.json" in note


def test_a_score_is_not_lost_if_it_can_not_be_kept(stages, tmp_path, monkeypatch):
    (tmp_path / "run.pt").write_bytes(b"first")

    def full(*_):
        raise OSError(30, "Read-only file system")

    notes = []
    monkeypatch.setattr(pipeline.scores.files, "write", full)
    result = pipeline.score(tmp_path / "run.pt", None, None, device="d", report=lambda event: notes.append(event.text))
    assert (result["of"], stages.names()) == ("first", ["evaluate"])
    assert "groups" not in result
    assert notes == [f"the score could not be kept in {tmp_path / 'eval.json'}: Read-only file system"]
    assert not (tmp_path / "eval.json").exists()


def test_shards_that_are_not_there_are_asked_for_and_other_ones_are_named(stages, tmp_path):
    (tmp_path / "run.pt").write_bytes(b"first")
    stages.recipe = reading.with_settings(RESOLVED, ["data.shards=not/here"])
    with pytest.raises(UsageError, match=r"not/here, the shards folder in the recipe of .*, is not there") as refused:
        pipeline.score(tmp_path / "run.pt", None, None, device="d", report=quiet)
    assert refused.value.hint == "--shards DIR"
    notes = []
    stages.recipe, stages.checksums = RESOLVED, {}
    pipeline.score(tmp_path / "run.pt", None, None, device="d", report=lambda event: notes.append(event.text))
    assert notes == [
        f"the/shards has shards bbbbbbbbbbbb; {tmp_path / 'run.pt'} was trained on aaaaaaaaaaaa",
        "no floors: the shards aaaaaaaaaaaa, which the run was trained on, are not at the/shards",
    ]


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


@pytest.mark.usefixtures("the_shards")
def test_a_prompt_or_a_split_is_read_after_an_eos(monkeypatch):
    resolved = reading.with_settings(RESOLVED, ["eval.resamples=77", "eval.batch_size=9", "model.context=99"])
    tokenizer = SimpleNamespace(eos=299, prompt=lambda *_: np.array([4, 5, 6, 7]))
    run = SimpleNamespace(recipe=resolved, tokenizer=lambda: tokenizer, path=Path("run.pt"))
    run.content = {"tokenizer": {"fingerprint": "f"}, "shards": "c", "vocabulary": 300}
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
        tokenizer = {"fingerprint": "f", "end": 298, "vocabulary": 300}  # noqa: RUF012
        manifest = {"checksum": "c"}  # noqa: RUF012
        folder = Path("s")

        def __init__(self, folder):
            opened.append(str(folder))

    monkeypatch.setattr(pipeline, "Shards", Shards)
    for shards, split, row in ((None, "val", [298, 1, 2, 3, 4, 5]), (Path("x"), "test", [298, 6, 7, 8])):
        seen = seen_by(monkeypatch, run, Given(), shards, split, 12, Path("o"))
        assert (seen["tokens"], seen["context"], seen["most"]) == (len(row), 99, 12)
        for first in range(len(row)):
            for count in range(1, len(row) - first + 1):
                assert seen["read"](first, count).tolist() == row[first : first + count]
        assert seen["opened"] == (Path("run.pt"), "d")
        assert seen["given"] == (run, "windows", Path("o"))
        assert seen["options"] == {"resamples": 77, "batch": 9, "device": "d", "report": quiet, "split": split}
    assert opened == ["the/shards", "x"]
    Shards.tokenizer = {"fingerprint": "g", "end": 298}
    with pytest.raises(UsageError, match="was trained with tokenizer f, s was made with g"):
        seen_by(monkeypatch, run, Given(), None, "val", 12, Path("o"))
    seen = seen_by(monkeypatch, run, Given(__file__), None, "val", 12, Path("o"))
    assert (seen["tokens"], seen["options"]["split"]) == (5, None)
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
        demo,
        "prepare",
        lambda config, paths, shards, **options: prepared.append((config, paths, shards, options)) or {"worked": True},
    )

    def train_score_sample(config, folder, *, device, report, stop, begin):
        begin("sample")
        trained.append((config, folder, device, stop))
        return {
            "train": {"parameters": {"total": len(trained)}},
            "eval": {"model": config.model.name},
            "samples": [f"{len(trained)}"],
        }

    monkeypatch.setattr(demo, "train_score_sample", train_score_sample)
    parts = []

    def report(event):
        if isinstance(event, Part):
            parts.append((event.number, event.total, event.text))

    result = demo.demo(tmp_path, n_workers=3, device="d", report=report, stop=NEVER, page=True)
    assert parts[:3] == [
        (1, 22, "text-tiny: files and shards"),
        (2, 22, "text-tiny: gpt, sample"),
        (3, 22, "text-tiny: shortcut, sample"),
    ]
    assert parts[-1] == (10, 22, "page")
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
        "verified": True,
        "conditions": [],
        "lineage": {},
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
    assert found == expected | {"path": str(tmp_path / "codec.pt"), "verified": True, "conditions": []}


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
    (tmp_path / "a.txt").write_text("text")
    for name, text in (("a.txt", "neither a shards folder"), ("b.txt", "does not exist"), ("missing.pt", "not exist")):
        with pytest.raises(UsageError, match=text):
            inspection.inspect(tmp_path / name, verify=False)
