"""Preparation: the same bytes however it is run, every input accounted for, and sound and MIDI through to samples."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import symusic
from conftest import set_flags, shortcut, write_texts
from kill import folder_sha256  # benchmarks/kill.py

from shortcut_cli import composer, recipe
from shortcut_cli.errors import Rejected, TooManyRejects, UsageError
from shortcut_cli.shards import Shards
from shortcut_cli.stages.preparation import prepare, too_many
from shortcut_cli.tokenizers.audio import AudioTokenizer
from shortcut_cli.workers import in_order

SMALL = ("train.steps=4", "train.eval_every=2", "train.warmup=1", "sample.n=1", "model.context=64", "eval.stride=64")


def quiet(*_, **__):
    pass


def run(name, paths, out, *settings, workers=1, max_bad="0"):
    return prepare(
        recipe.read(name, [f"data.shards={out}", *settings]),
        [str(path) for path in paths],
        out,
        n_workers=workers,
        max_bad=max_bad,
        report=quiet,
    )


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """midi/ with 12 pieces, texts/ with 30, wavs/ with 5."""
    root = tmp_path_factory.mktemp("material")
    (root / "midi" / "more").mkdir(parents=True)
    composer.write_midi(root / "midi", pieces=6, seed=1)
    composer.write_midi(root / "midi" / "more", pieces=6, seed=2)
    write_texts(root / "texts")
    (root / "wavs").mkdir()
    composer.write_audio(root / "wavs", pieces=5, seed=1)
    return root


DOMAINS = [
    ("music-tiny", "midi", ()),
    ("music-tiny", "midi", ("tokenizer.transpose=[1, -1]",)),
    ("music-tiny", "midi", ("tokenizer.bpe=600",)),
    ("text-tiny", "texts", ("tokenizer.vocabulary=300",)),
    ("audio-tiny", "wavs", ("tokenizer.codebooks=2",)),
    ("audio-tiny", "wavs", ("tokenizer.codebooks=2", "tokenizer.weights=untrained:0")),
]


@pytest.mark.parametrize(("name", "kind", "settings"), DOMAINS, ids=str)
def test_equal_bytes_for_any_workers_order_and_form_of_arguments(material, tmp_path, monkeypatch, name, kind, settings):
    monkeypatch.chdir(material)
    root = material / kind
    run(name, [root], tmp_path / "a", *settings)
    run(name, [kind, root, root / "more"][: 3 if kind == "midi" else 2][::-1], tmp_path / "b", *settings, workers=3)
    assert folder_sha256(tmp_path / "a") == folder_sha256(tmp_path / "b")
    manifest = Shards(tmp_path / "a").manifest
    assert all(split["documents"] for split in manifest["splits"].values())
    assert not (tmp_path / "a" / ".staging").exists()


def test_every_input_is_in_one_of_the_lists(material, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    composer.write_midi(folder, pieces=5, seed=5)
    first = sorted(folder.glob("*.mid"))[0]
    (folder / "again.mid").write_bytes(first.read_bytes())
    (folder / "text.mid").write_text("this is text")
    (folder / "empty.mid").write_bytes(b"")
    os.mkfifo(folder / "pipe.mid")
    (folder / "notes.doc").write_text("not for us")
    with pytest.raises(TooManyRejects, match="3 of 9 files"):
        run("music-tiny", [folder], tmp_path / "out")
    manifest = run("music-tiny", [folder], tmp_path / "out", max_bad="40%")
    assert manifest["worked"] is False
    counts = {key: manifest[key] for key in ("inputs", "duplicates", "rejected", "ignored")}
    assert counts == {"inputs": 9, "duplicates": 1, "rejected": 3, "ignored": 1}
    documents = [json.loads(line) for line in (tmp_path / "out" / "documents.jsonl").read_text().splitlines()]
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    listed = [d["source"] for d in documents] + [s for d in documents for s in d.get("duplicates", [])]
    assert sorted(listed + [r["source"] for r in rejects]) == sorted(p.name for p in folder.glob("*.mid"))
    assert all(reject["reason"] for reject in rejects)


def test_other_inputs_into_the_same_folder_are_refused(material, tmp_path):
    run("text-tiny", [material / "texts"], tmp_path / "s", "tokenizer.vocabulary=300")
    with pytest.raises(UsageError, match=r"tokenizer\.vocabulary: 300 -> 301"):
        run("text-tiny", [material / "texts"], tmp_path / "s", "tokenizer.vocabulary=301")
    with pytest.raises(UsageError, match=r"inputs\.files: 30 -> 1"):
        run("text-tiny", [material / "texts" / "000.txt"], tmp_path / "s", "tokenizer.vocabulary=300")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("keep me")
    with pytest.raises(UsageError, match="is not a shards folder"):
        run("text-tiny", [material / "texts"], tmp_path / "mine", "tokenizer.vocabulary=300")


def test_what_was_staged_before_a_kill_is_used_and_the_bytes_stay(material, tmp_path, monkeypatch):
    from shortcut_cli.stages import preparation

    run("music-tiny", [material / "midi"], tmp_path / "whole")

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preparation.FolderWriter, "finish", dies)
        with pytest.raises(KeyboardInterrupt):
            run("music-tiny", [material / "midi"], tmp_path / "killed")
    staged = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / ".staging").rglob("*.ids")}
    assert len(staged) == 12
    with pytest.raises(UsageError, match="is incomplete"):
        Shards(tmp_path / "killed")
    run("music-tiny", [material / "midi"], tmp_path / "killed")
    assert folder_sha256(tmp_path / "killed") == folder_sha256(tmp_path / "whole")


def test_preparations_that_are_killed_at_random_moments_end_in_the_same_bytes(material):
    script = Path(__file__).parent.parent / "benchmarks" / "kill.py"
    command = [sys.executable, script, "midi", material / "midi", "--rounds", "1", "--set", "tokenizer.bpe=600"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "folders with other bytes: 0" in done.stdout


def test_augmentation_is_for_training_alone(material, tmp_path):
    run("music-tiny", [material / "midi"], tmp_path / "s", "tokenizer.transpose=[2]")
    documents = [json.loads(line) for line in (tmp_path / "s" / "documents.jsonl").read_text().splitlines()]
    train = [d for d in documents if d["split"] == "train"]
    assert len(documents) == 12 + len(train) / 2
    assert {d.get("variant") for d in train} == {None, "transpose=+2"}
    assert {d.get("variant") for d in documents if d["split"] != "train"} == {None}


def test_few_documents_are_cut_contiguously(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 1000)
    manifest = run(
        "text-tiny",
        [tmp_path / "a.txt"],
        tmp_path / "s",
        "tokenizer.algorithm=chars",
        "data.val=0.05",
        "data.test=0.05",
    )
    assert manifest["split"] == "contiguous"
    assert [split["tokens"] for split in manifest["splits"].values()] == [9001, 501, 501]
    assert [split["units"]["byte"] for split in manifest["splits"].values()] == [9000, 500, 500]


def test_megatron_reads_the_same_tokens(material, tmp_path):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    run("music-tiny", [material / "midi"], tmp_path / "s")
    split = Shards(tmp_path / "s").split("train")
    dataset = indexed.IndexedDataset(str(tmp_path / "s" / "train-00000"))
    joined = np.concatenate([dataset[number] for number in range(len(dataset))])
    assert joined.tolist() == split.read(0, split.tokens).tolist()


@pytest.mark.parametrize(
    ("rejected", "inputs", "limit", "expected"),
    [(0, 10, "0", False), (1, 10, "0", True), (1, 100, "1%", False), (2, 100, "1%", True), (3, 9, "3", False)],
)
def test_max_bad(rejected, inputs, limit, expected):
    assert too_many(rejected, inputs, limit) is expected


@pytest.mark.parametrize("limit", ["few", "-1", "1.5", "%"])
def test_max_bad_of_another_form(limit):
    with pytest.raises(UsageError):
        too_many(0, 1, limit)


def misbehave(job):
    """In a worker: die, hang, refuse, or return."""
    import time

    if job == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if job == "hangs":
        time.sleep(60)
    if job == "grows":
        return len(bytearray(4_000_000_000))
    if job == "grows in torch":
        import torch

        return torch.ones(1000, 1000, 1000).sum().item()
    if job == "refuses":
        raise Rejected("no")
    return job.upper()


def test_a_job_that_crashes_hangs_or_grows_costs_itself():
    jobs = ["a", "dies", "b", "hangs", "grows", "refuses", "grows in torch", "c"]
    done = in_order(misbehave, jobs, (), workers=2, timeout_s=20, memory_mb=2000)
    results = {job: str(result) for job, result in done}
    assert list(results) == jobs
    assert [results[job] for job in ("a", "b", "c")] == ["A", "B", "C"]
    assert "SIGSEGV" in results["dies"]
    assert "longer than 20 s" in results["hangs"]
    assert "more than 2000 MB" in results["grows"]
    assert "more than 2000 MB" in results["grows in torch"]
    assert results["refuses"] == "no"


class Fragile(AudioTokenizer):
    """Dies where it reads a file of that name."""

    def _samples(self, path, length):
        if path.stem == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        return super()._samples(path, length)


def test_a_file_that_kills_a_group_costs_itself(material, tmp_path, monkeypatch):
    """Five files are encoded together, and one of them takes the process with it."""
    settings = ("tokenizer.weights=untrained:0", "data.split=contiguous")
    shutil.copytree(material / "wavs", tmp_path / "wavs")
    expected = run("audio-tiny", [tmp_path / "wavs"], tmp_path / "expected", *settings)
    (tmp_path / "wavs" / "dies.wav").write_bytes(b"RIFF")
    monkeypatch.setattr("shortcut_cli.registry.load", lambda *_: Fragile)
    monkeypatch.setattr(AudioTokenizer, "group", lambda _self, sources, _n: [list(sources)])
    found = run("audio-tiny", [tmp_path / "wavs"], tmp_path / "found", *settings, max_bad="1")
    (reject,) = map(json.loads, (tmp_path / "found" / "rejects.jsonl").read_text().splitlines())
    assert reject["source"] == "dies.wav"
    assert "SIGSEGV" in reject["reason"]
    assert found["splits"] == expected["splits"]
    for split in ("train", "val", "test"):
        name = f"{split}-00000.bin"
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


@pytest.mark.parametrize("model", ["gpt", "shortcut"])
def test_midi_to_samples_through_the_command_line(material, tmp_path, model):
    flags = set_flags(*SMALL, "sample.tokens=120", f"model.name={model}")
    done = shortcut("run", "--recipe", "music-tiny", material / "midi", "--json", *flags, cwd=tmp_path, fresh=True)
    result = json.loads(done.stdout)
    assert result["eval"]["unit"] == "note"
    (path,) = result["samples"]
    assert path.endswith(".mid")
    symusic.Score(tmp_path / path)


@pytest.mark.parametrize("model", ["gpt", "shortcut"])
def test_sound_to_samples_through_the_command_line(material, tmp_path, model):
    flags = set_flags(*SMALL, "sample.tokens=75", f"model.name={model}")
    done = shortcut("run", "--recipe", "audio-tiny", material / "wavs", "--json", *flags, cwd=tmp_path, fresh=True)
    result = json.loads(done.stdout)
    assert result["eval"]["unit"] == "second"
    info = soundfile.info(tmp_path / result["samples"][0])
    assert (info.samplerate, info.subtype) == (24_000, "PCM_16")
    sidecar = json.loads((tmp_path / f"{result['samples'][0]}.json").read_text())
    kept = sidecar["tokens"] - sidecar["ended"]
    assert info.frames == 320 * kept


def test_sound_without_weights_exits_5_with_the_ways_out(material, tmp_path):
    done = shortcut(
        "prepare",
        "audio",
        material / "wavs",
        cwd=tmp_path,
        check=5,
        SHORTCUT_CACHE=str(tmp_path),
        SHORTCUT_WEIGHTS_URL="http://127.0.0.1:9",
    )
    assert "tokenizer.weights=PATH" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
