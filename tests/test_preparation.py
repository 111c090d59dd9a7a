"""Preparation: the same bytes however it is run, every input accounted for, and sound and MIDI up to samples."""

import errno
import gc
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mido
import numpy as np
import pytest
import soundfile
import symusic
from conftest import quiet, set_flags, shortcut, write_pieces, write_texts
from kill import folder_sha256  # benchmarks/kill.py

from shortcut_cli import files
from shortcut_cli.codec import weights
from shortcut_cli.config import reading
from shortcut_cli.config.writing import differences
from shortcut_cli.data import inputs, shards, workers
from shortcut_cli.data.hashed import Input
from shortcut_cli.data.hashes import Hashes
from shortcut_cli.data.inputs import too_many
from shortcut_cli.data.rejects import Reject, all_rejected
from shortcut_cli.data.shards import Shards, source_paths_file, verify
from shortcut_cli.data.workers import in_order
from shortcut_cli.demo import material as demo_material
from shortcut_cli.errors import Rejected, ShortcutError, TooManyRejects, Unfinished, UsageError, unreadable
from shortcut_cli.events import Note, Progress
from shortcut_cli.stages import preparation
from shortcut_cli.stages.preparation import prepare
from shortcut_cli.tokenizers import audio, midi, tokenization
from shortcut_cli.tokenizers.audio import AudioTokenizer
from shortcut_cli.tokenizers.midi import MidiTokenizer
from shortcut_cli.tokenizers.text import TextTokenizer

SMALL = ("train.steps=4", "train.eval_every=2", "train.warmup=1", "sample.n=1", "model.context=64", "eval.stride=64")


def run(name, paths, out, *settings, workers=1, max_bad="0"):
    return prepare(
        reading.read(name, [f"data.shards={out}", *settings]),
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
    write_pieces(root / "midi")
    write_texts(root / "texts")
    (root / "wavs").mkdir()
    demo_material.write_audio(root / "wavs", pieces=5, seed=1)
    return root


DOMAINS = [
    ("music-tiny", "midi", ()),
    ("music-tiny", "midi", ("tokenizer.transpose=[1, -1]",)),
    ("music-tiny", "midi", ("tokenizer.bpe=1100",)),
    ("text-tiny", "texts", ("tokenizer.vocabulary=300",)),
    ("audio-tiny", "wavs", ("tokenizer.codebooks=2",)),
    ("audio-tiny", "wavs", ("tokenizer.codebooks=2", "tokenizer.weights=untrained:0")),
]


@pytest.mark.parametrize(("name", "kind", "settings"), DOMAINS, ids=str)
def test_equal_bytes_for_any_workers_order_and_form_of_arguments(material, tmp_path, monkeypatch, name, kind, settings):
    monkeypatch.chdir(material)
    root = material / kind
    run(name, [root], tmp_path / "a", *settings)
    paths, count = [kind, root, root / "more"][: 3 if kind == "midi" else 2], 2 if kind == "wavs" else 3
    run(name, paths[::-1], tmp_path / "b", *settings, workers=count)
    assert folder_sha256(tmp_path / "a") == folder_sha256(tmp_path / "b")
    manifest = Shards(tmp_path / "a").manifest
    assert all(split["documents"] for split in manifest["splits"].values())
    assert not (tmp_path / "a" / ".staging").exists()


def test_every_input_is_in_one_of_the_lists(material, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    demo_material.write_midi(folder, pieces=5, seed=5)
    first = sorted(folder.glob("*.mid"))[0]
    (folder / "again.mid").write_bytes(first.read_bytes())
    (folder / "text.mid").write_text("this is text")
    (folder / "text again.mid").write_text("this is text")
    (folder / "empty.mid").write_bytes(b"")
    os.mkfifo(folder / "pipe.mid")
    (folder / "notes.doc").write_text("not for us")
    with pytest.raises(TooManyRejects, match="3 of 10 files"):
        run("music-tiny", [folder], tmp_path / "out")
    manifest = run("music-tiny", [folder], tmp_path / "out", max_bad="40%")
    assert manifest["worked"] is False
    counts = {key: manifest[key] for key in ("inputs", "duplicates", "rejected", "ignored")}
    assert counts == {"inputs": 10, "duplicates": 2, "rejected": 3, "ignored": 1}
    documents = [json.loads(line) for line in (tmp_path / "out" / "documents.jsonl").read_text().splitlines()]
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    listed = [name for line in documents + rejects for name in (line["source"], *line.get("duplicates", []))]
    assert sorted(listed) == sorted(p.name for p in folder.glob("*.mid"))
    assert all(reject["reason"] for reject in rejects)


def test_other_inputs_into_the_same_folder_are_refused(material, tmp_path):
    run("text-tiny", [material / "texts"], tmp_path / "s", "tokenizer.vocabulary=300")
    with pytest.raises(UsageError, match=r"tokenizer\.vocabulary: 300 -> 301"):
        run("text-tiny", [material / "texts"], tmp_path / "s", "tokenizer.vocabulary=301")
    with pytest.raises(UsageError, match=r"inputs\.files: 30 -> 1"):
        run("text-tiny", [material / "texts" / "000.txt"], tmp_path / "s", "tokenizer.vocabulary=300")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("keep me")
    with pytest.raises(UsageError, match="is not empty, and was not made by `shortcut prepare`"):
        run("text-tiny", [material / "texts"], tmp_path / "mine", "tokenizer.vocabulary=300")


def interrupted(monkeypatch, *arguments):
    """A preparation that is stopped just before it finishes."""

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenization.FolderWriter, "finish", dies)
        with pytest.raises(KeyboardInterrupt):
            run(*arguments)


def test_what_was_staged_before_a_kill_is_reused_and_gives_the_same_bytes(
    material, tmp_path, monkeypatch, in_this_process
):
    run("music-tiny", [material / "midi"], tmp_path / "whole")
    interrupted(monkeypatch, "music-tiny", [material / "midi"], tmp_path / "killed")
    assert len(list((tmp_path / "killed" / ".staging").rglob("*.ids"))) == 12
    with pytest.raises(UsageError, match="is incomplete"):
        Shards(tmp_path / "killed")

    def reads(*_):
        raise AssertionError("a file was read again")

    monkeypatch.setattr(MidiTokenizer, "_read", reads)
    run("music-tiny", [material / "midi"], tmp_path / "killed")
    assert folder_sha256(tmp_path / "killed") == folder_sha256(tmp_path / "whole")


def test_what_was_staged_for_another_recipe_is_not_used(material, tmp_path, monkeypatch, in_this_process):
    paths, other = [material / "midi" / "more"], "tokenizer.velocities=4"
    run("music-tiny", paths, tmp_path / "whole", other)
    interrupted(monkeypatch, "music-tiny", paths, tmp_path / "killed")
    run("music-tiny", paths, tmp_path / "killed", other)
    assert folder_sha256(tmp_path / "killed") == folder_sha256(tmp_path / "whole")


def test_what_another_version_staged_is_read_again(material, tmp_path, monkeypatch, in_this_process):
    paths, read, reads = [material / "midi" / "more"], [], MidiTokenizer._read

    def noted(self, path, *rest):
        read.append(path.name)
        return reads(self, path, *rest)

    interrupted(monkeypatch, "music-tiny", paths, tmp_path / "s")
    monkeypatch.setattr(midi, "_versions", lambda: "miditok 99, symusic 99")
    monkeypatch.setattr(MidiTokenizer, "_read", noted)
    run("music-tiny", paths, tmp_path / "s")
    assert sorted(read) == sorted(path.name for path in paths[0].glob("*.mid"))


def test_preparations_that_are_killed_at_random_times_end_with_the_same_bytes(material):
    script = Path(__file__).parent.parent / "benchmarks" / "kill.py"
    command = [sys.executable, script, "midi", material / "midi", "--rounds", "1", "--set", "tokenizer.bpe=1100"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "folders with different bytes: 0" in done.stdout


def test_only_the_training_split_is_augmented(material, tmp_path):
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
    for counts in ([(rejected, inputs)], [(rejected, inputs), (0, 0)], [(0, 7), (rejected, inputs)]):
        assert too_many(counts, limit) is expected


def test_a_number_of_rejects_is_of_files_and_records_together_and_a_percentage_of_each():
    assert too_many([(2, 100), (1, 3)], "3") is False
    assert too_many([(2, 100), (2, 3)], "3") is True
    assert too_many([(1, 100), (1, 100)], "1%") is False
    assert too_many([(2, 100), (0, 10**6)], "1%") is True
    assert too_many([(0, 10**6), (2, 100)], "1%") is True


@pytest.mark.parametrize("limit", ["few", "-1", "1.5", "%", "nan", "inf", "nan%", "1e999"])
def test_an_invalid_max_bad_is_a_usage_error(limit):
    with pytest.raises(UsageError):
        too_many([], limit)


def killed_at_once(_):
    os.kill(os.getpid(), signal.SIGKILL)


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
    if job == "looks around":
        return f"{os.environ['OMP_NUM_THREADS']} {signal.getsignal(signal.SIGINT).name} {gc.get_threshold()[0]}"
    if job == "refuses":
        raise Rejected("no")
    return job.upper()


def test_a_job_that_crashes_hangs_or_grows_fails_alone(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    jobs = ["a", "dies", "b", "hangs", "grows", "looks around", "refuses", "grows in torch", "c"]
    done = in_order(misbehave, jobs, (), workers=2, timeout_s=20, memory_mb=2000)
    results = {job: str(result) for job, result in done}
    assert list(results) == jobs
    assert [results[job] for job in ("a", "b", "c")] == ["A", "B", "C"]
    assert "SIGSEGV" in results["dies"]
    assert "longer than 20 s" in results["hangs"]
    assert "more than 2000 MB" in results["grows"]
    assert "more than 2000 MB" in results["grows in torch"]
    assert results["refuses"] == "no"
    assert results["looks around"] == "1 SIG_IGN 50000"  # one thread each; Ctrl-C is for the parent


class Fragile(AudioTokenizer):
    """Kills its process when it reads a file named dies."""

    def _reader(self, path, sha256=""):
        if path.stem == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        return super()._reader(path, sha256)


def test_a_file_that_kills_its_group_is_rejected_alone(tmp_path, monkeypatch):
    """Six files are encoded together, and one of them crashes the process."""
    settings = ("tokenizer.weights=untrained:0", "data.split=contiguous")
    (tmp_path / "wavs").mkdir()
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(0, 0.1, 4800)
        soundfile.write(tmp_path / "wavs" / f"{seed}.wav", noise, 24_000)
    expected = run("audio-tiny", [tmp_path / "wavs"], tmp_path / "expected", *settings)
    (tmp_path / "wavs" / "dies.wav").write_bytes(b"RIFF")
    monkeypatch.setattr("shortcut_cli.registry.load", lambda *_: Fragile)
    monkeypatch.setattr(AudioTokenizer, "group", lambda _self, sources, _n: [range(len(sources))])
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


def test_sound_without_weights_exits_5_and_names_the_alternatives(material, tmp_path):
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


CHARS = ("tokenizer.algorithm=chars", "tokenizer.alphabet=\n abcdefghijklmnopqrstuvwxyz0123456789")


def chars(content):
    """The ids of a text, by hand."""
    return ["\n abcdefghijklmnopqrstuvwxyz0123456789".index(character) for character in content]


def lines_of(folder, name="documents.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def stored(folder, line):
    """The ids of a document, from the place that documents.jsonl names."""
    content = np.fromfile(folder / f"{line['split']}-{line['shard']:05d}.bin", "<u2")
    return content[line["offset"] : line["offset"] + line["tokens"]].tolist()


def write_files(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.mark.usefixtures("in_this_process")
def test_a_contiguous_corpus_is_its_files_in_order_cut_twice(tmp_path):
    contents = {f"{name}.txt": f"{name} {place} " * (7 + 13 * place) for place, name in enumerate("cabd")}
    write_files(tmp_path / "in", contents | {"e/z.txt": contents["b.txt"], "a2.txt": contents["c.txt"]})
    settings = (*CHARS, "data.split=contiguous", "data.val=0.1", "data.test=0.25", "data.shard_tokens=1024")
    manifest = run("text-tiny", [tmp_path / "in"], tmp_path / "s", *settings)
    # Equal files count once, under the first of their names: c under a2, z under b.
    order = {"a.txt": "a.txt", "a2.txt": "c.txt", "b.txt": "b.txt", "d.txt": "d.txt"}
    corpus = "".join(contents[name] for name in order.values())
    second = len(corpus) - round(len(corpus) * 0.25)
    first = second - round(len(corpus) * 0.1)
    expected, place = [], 0
    for name, same in order.items():
        content = contents[same]
        sha256 = hashlib.sha256(content.encode()).hexdigest()
        duplicates = {"a2.txt": ["c.txt"], "b.txt": ["e/z.txt"]}.get(name)
        for split, low, high in (("train", 0, first), ("val", first, second), ("test", second, len(corpus))):
            part = content[max(0, low - place) : max(0, high - place)]
            if part:
                # A word that is cut counts where it begins.
                begins = [n for n in range(len(content)) if content[n] > " " and (not n or content[n - 1] <= " ")]
                words = sum(max(0, low - place) <= n < max(0, high - place) for n in begins)
                units = {"byte": len(part), "character": len(part), "word": words}
                record = {"source": name, "sha256": sha256, "split": split, "units": units}
                expected.append((record | ({"duplicates": duplicates} if duplicates else {}), part))
        place += len(content)
    found = lines_of(tmp_path / "s")
    for line, (record, part) in zip(found, expected, strict=True):
        assert {key: line[key] for key in line if key not in ("shard", "offset", "tokens")} == record
        assert stored(tmp_path / "s", line) == [*chars(part), 38]
    for split in ("train", "val", "test"):
        mine = [part for record, part in expected if record["split"] == split]
        size = sum(map(len, mine))
        words = sum(record["units"]["word"] for record, _ in expected if record["split"] == split)
        assert manifest["splits"][split] == {
            "documents": len(mine),
            "tokens": size + len(mine),
            "units": {"byte": size, "character": size, "word": words},
        }
    assert (manifest["split"], manifest["inputs"], manifest["duplicates"], manifest["rejected"]) == (
        *("contiguous", 6),
        *(2, 0),
    )
    assert {line["split"] for line in found} == {"train", "val", "test"}
    expected = {"name": "text", "vocabulary": 39, "end": 38, "stride": 1, "unit": "byte", "lossless": True}
    assert {key: manifest["tokenizer"][key] for key in expected} == expected
    assert json.loads(source_paths_file(manifest).read_text()) == [str(tmp_path / "in")]


@pytest.mark.usefixtures("in_this_process")
def test_hashes_decide_the_split_of_a_document_and_files_their_order(tmp_path):
    contents = {f"{n:02d}.txt": "".join(f"line {i * n} of file {n % 7}\n" for i in range(n % 5 + 1)) for n in range(30)}
    contents["05.txt"] = contents["03.txt"]
    write_files(tmp_path / "in", contents)
    settings = (*CHARS, "tokenizer.documents=line", "data.val=0.2", "data.test=0.3")
    manifest = run("text-tiny", [tmp_path / "in"], tmp_path / "s", *settings)
    expected = []
    for name, content in sorted(contents.items()):
        if content in [contents[other] for other in contents if other < name]:
            continue
        for line in content.splitlines(keepends=True):
            if line in [one[3] for one in expected]:
                continue
            sha256 = hashlib.sha256(line.encode()).hexdigest()
            place = int(sha256[:16], 16) / 2**64
            expected.append((name, sha256, "val" if place < 0.2 else "test" if place < 0.5 else "train", line))
    found = lines_of(tmp_path / "s")
    assert [(line["source"], line["sha256"], line["split"]) for line in found] == [tuple(one[:3]) for one in expected]
    assert [stored(tmp_path / "s", line) for line in found] == [[*chars(one[3]), 38] for one in expected]
    assert manifest["split"] == "documents"
    counts = {split: sum(one[2] == split for one in expected) for split in ("train", "val", "test")}
    assert {name: split["documents"] for name, split in manifest["splits"].items()} == counts
    assert min(counts.values()) > 5


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(("different", "split"), [(2, "contiguous"), (3, "documents")])
def test_three_distinct_documents_are_enough_to_fill_the_splits(tmp_path, different, split):
    write_files(tmp_path / "in", {f"{n}.txt": f"{n % different} line\n" * 9 for n in range(6)})
    # Each line is a document, and nine of a file are equal.
    settings = (*CHARS, "tokenizer.documents=line", "data.val=0.25", "data.test=0.25")
    manifest = run("text-tiny", [tmp_path / "in"], tmp_path / "s", *settings, "data.duplicates=keep")
    assert (manifest["split"], manifest["documents_duplicated"]) == (split, 0)
    counts = [one["documents"] for one in manifest["splits"].values()]
    # 18 lines of 7 bytes are cut at 126 - 2 * 32 and 126 - 32 bytes; with three distinct ones, each split gets one.
    assert counts == ([9, 6, 5] if split == "contiguous" else [9, 9, 9])
    manifest = run("text-tiny", [tmp_path / "in"], tmp_path / "dropped", *settings)
    assert (manifest["split"], manifest["documents_duplicated"]) == (split, 8 * different)
    counts = [one["documents"] for one in manifest["splits"].values()]
    # Two lines, 14 bytes, are cut at 14 - 2 * 4 and 14 - 4.
    assert counts == ([1, 2, 1] if split == "contiguous" else [1, 1, 1])


@pytest.mark.usefixtures("in_this_process")
def test_variants_of_training_pieces_follow_them_and_rejected_ones_are_listed(tmp_path):
    # A piece with pitch 127 can't be transposed up; only that variant is rejected.
    (tmp_path / "in").mkdir()
    for number in range(8):
        on = mido.Message("note_on", note=127 if number % 2 else 60 + number, velocity=64)
        track = mido.MidiTrack([on, mido.Message("note_off", note=on.note, time=480 + 60 * number)])
        mido.MidiFile(tracks=[track]).save(tmp_path / "in" / f"{number}.mid")
    settings = ("tokenizer.transpose=[1, -1]", "tokenizer.tempo_factors=[2.0]", "data.val=0.3", "data.test=0.3")
    manifest = run("music-tiny", [tmp_path / "in"], tmp_path / "s", *settings)
    expected, rejects, splits_ = [], [], {}
    hashes = {n: hashlib.sha256((tmp_path / "in" / f"{n}.mid").read_bytes()).hexdigest() for n in range(8)}
    for number, sha256 in hashes.items():
        place = int(sha256[:16], 16) / 2**64
        splits_[number] = "val" if place < 0.3 else "test" if place < 0.6 else "train"
    assert set(splits_.values()) == {"train", "val", "test"}
    for number, sha256 in hashes.items():
        expected.append((f"{number}.mid", None, splits_[number], sha256))
        # In order of their names.
        for variant in ("tempo=2", "transpose=+1", "transpose=-1") * (splits_[number] == "train"):
            if variant == "transpose=+1" and number % 2:
                rejects.append({"source": f"{number}.mid", "sha256": sha256, "variant": variant})
            else:
                name = hashlib.sha256(f"{sha256} {variant}".encode()).hexdigest()
                expected.append((f"{number}.mid", variant, "train", name))
    found = lines_of(tmp_path / "s")
    assert [(line["source"], line.get("variant"), line["split"], line["sha256"]) for line in found] == expected
    listed = lines_of(tmp_path / "s", "rejects.jsonl")
    assert [{key: line[key] for key in line if key != "reason"} for line in listed] == rejects
    assert all("out of range" in line["reason"] for line in listed)
    assert rejects
    assert (manifest["inputs"], manifest["rejected"], manifest["variants_rejected"]) == (8, 0, len(rejects))


def test_equal_files_are_kept_once_under_the_first_of_their_names(tmp_path):
    contents = {"a.txt": "one", "b.txt": "two", "c.txt": "one", "d.txt": "three", "e.txt": "one", "f.txt": "two"}
    write_files(tmp_path, contents)
    found = inputs.find([str(tmp_path)], (".txt",))
    found.files.add("gone.txt", str(tmp_path))
    found.rejects.append(("pipe.txt", "is not a regular file"))
    kept, rejects = preparation._hash(found, 3, quiet, None, Hashes(tmp_path / "hashes"))
    sha256 = {name: hashlib.sha256(content.encode()).hexdigest() for name, content in contents.items()}
    assert list(kept) == [
        Input("a.txt", tmp_path / "a.txt", sha256["a.txt"], ("c.txt", "e.txt")),
        Input("b.txt", tmp_path / "b.txt", sha256["b.txt"], ("f.txt",)),
        Input("d.txt", tmp_path / "d.txt", sha256["d.txt"]),
    ]
    assert [reject.line() for reject in rejects] == [
        {"source": "pipe.txt", "sha256": None, "reason": "is not a regular file"},
        {"source": "gone.txt", "sha256": None, "reason": "can't be read: No such file or directory", "passing": True},
    ]


def test_a_request_differs_if_the_folder_would_differ():
    file = Input("a.txt", Path("a.txt"), "5" * 64, ("b.txt",))

    def request(*settings, files=(file,), model=b""):
        recipe = reading.read("text-tiny", settings)
        tokenizer = TextTokenizer(recipe.tokenizer, model)
        return preparation._request(recipe, tokenizer, list(files))

    before = request()
    assert before["inputs"]["files"] == 2
    for same in ("data.shards=elsewhere", "data.file_timeout_s=5", "data.file_memory_mb=2000", "train.steps=5"):
        assert request(same) == before
    assert request(files=[replace(file, path=Path("moved/a.txt"))]) == before
    changes = [
        *("data.val=0.2", "data.test=0.2", "data.split=contiguous", "data.shard_tokens=2000"),
        *("tokenizer.algorithm=bpe", "tokenizer.vocabulary=999", "tokenizer.documents=line", "tokenizer.sample_mb=5"),
        *("tokenizer.normalization=nfkc", "tokenizer.character_coverage=0.9", "tokenizer.alphabet=abc"),
    ]
    others = [request(change) for change in changes]
    keys = ({"relative": "c.txt"}, {"sha256": "6" * 64}, {"duplicates": ("c.txt",)}, {"duplicates": ()})
    others += [request(files=[replace(file, **one)]) for one in keys]
    others.append(request(files=[file, file]))
    # A file that an option names counts by its content.
    others += [request("tokenizer.algorithm=bpe", "tokenizer.model=a.model", model=model) for model in (b"1", b"2")]
    assert all(differences(before, other) for other in others)
    assert len({json.dumps(other) for other in others}) == len(others)


def test_finished_shards_of_other_weights_or_an_earlier_version_are_not_used_again(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", np.sin(np.arange(200_000) / 9), 24_000)
    shutil.copy(Path(weights.resolve("mini")), tmp_path / "codec.pt")
    recipe = reading.read("audio-tiny", [f"tokenizer.weights={tmp_path / 'codec.pt'}"])

    def again():
        return prepare(recipe, [str(tmp_path)], tmp_path / "out", n_workers=1, max_bad="0", report=quiet)

    assert [again()["worked"], again()["worked"]] == [True, False]
    with monkeypatch.context() as patched:
        patched.setattr(audio, "_versions", lambda: "encodec 0")
        with pytest.raises(UsageError, match=r"prepared from something else\n  depends_on\.library: .* -> 'encodec 0'"):
            again()
    content = (tmp_path / "codec.pt").read_bytes()
    (tmp_path / "codec.pt").write_bytes(content + b" ")
    with pytest.raises(UsageError, match=r"prepared from something else\n  depends_on\.weights_sha256: "):
        again()
    (tmp_path / "codec.pt").write_bytes(content)
    assert again()["worked"] is False


@pytest.mark.parametrize("limit", ["0%", "0"])
def test_no_reject_is_not_too_many(limit):
    assert too_many([(0, 7)], limit) is False
    assert too_many([(1, 10**6)], limit) is True


@pytest.mark.parametrize(("rejected", "expected"), [(15, False), (16, True)])
def test_a_percentage_of_rejects_is_of_all_inputs(rejected, expected):
    assert too_many([(rejected, 600)], "2.5%") is expected
    assert too_many([(rejected, 10)], "15") is expected


def test_all_files_rejected_is_an_error_that_lists_ten_reasons():
    rejects = [Reject(f"{number}.txt", None, f"reason {number}") for number in range(12)]
    error = all_rejected(rejects)
    assert error.message.splitlines()[0] == "all 12 files were rejected"
    assert error.message.splitlines()[1:] == [*(f"  {n}.txt: reason {n}" for n in range(10)), "  and 2 more"]
    assert len(all_rejected(rejects[:10]).message.splitlines()) == 11


def private_bytes():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024


def test_the_memory_of_a_process_is_what_the_kernel_reports(monkeypatch):
    status = "Name:\tpython\nVmPeak:\t  99 kB\nVmData:\t  1234 kB\nVmStk:\t  88 kB\n"
    monkeypatch.setattr(
        workers, "Path", lambda name: SimpleNamespace(read_text=lambda: {"/proc/self/status": status}[name])
    )
    assert workers._data_bytes() == 1234 * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_memory_limit_of_a_job_is_on_top_of_what_its_process_has(monkeypatch):
    before, has = resource.getrlimit(resource.RLIMIT_DATA), private_bytes() + 10**9
    monkeypatch.setattr(workers, "_data_bytes", lambda: has)
    for megabytes in (1500, 3000):
        soft, hard = workers._within(megabytes, resource.getrlimit, resource.RLIMIT_DATA)
        assert soft == has + megabytes * 10**6
        assert hard == before[1]
        assert resource.getrlimit(resource.RLIMIT_DATA) == (hard, hard)

    def fails(error):
        raise error

    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):
        with pytest.raises(Rejected, match=r"needs more than 1500 MB of memory \(data\.file_memory_mb\)"):
            workers._within(1500, fails, error)
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == before[1]
    for error in (RuntimeError("a bug"), ValueError("another")):
        with pytest.raises(type(error), match=str(error)):
            workers._within(1500, fails, error)


def test_the_cause_of_a_death_is_a_signal_or_a_code():
    assert [workers._cause(code) for code in (-9, -11, 3, -300)] == [
        "SIGKILL",
        "SIGSEGV",
        "exit code 3",
        "exit code -300",
    ]


class Pool:
    """A pool that runs a job when its result is requested, and records when it was scheduled."""

    def __init__(self, events, **config):
        self.events, self.config = events, config

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.events.append("closed")

    def schedule(self, function, args, timeout):
        self.events.append(("in", args[-1], timeout))

        def result():
            self.events.append(("out", args[-1]))
            return function(*args)

        return SimpleNamespace(result=result)

    def stop(self):
        self.events.append("stopped")


def test_few_jobs_are_in_flight_and_results_come_in_order(monkeypatch):
    events, most = [], 0
    monkeypatch.setattr(workers, "ProcessPool", lambda **config: Pool(events, **config))
    done = workers.in_order(str.__add__, (str(n) for n in range(50)), ("x",), workers=2, timeout_s=7, memory_mb=9000)
    for number, (job, result) in enumerate(done):
        assert (job, result) == (str(number), f"x{number}")
        handed_in = sum(event[0] == "in" for event in events)
        most = max(most, handed_in - number)
    assert number == 49
    assert most == 16  # eight for each worker
    assert {event[2] for event in events if event[0] == "in"} == {7}
    assert events[-2:] == ["stopped", "closed"]


@pytest.mark.parametrize(("workers_", "files_", "expected"), [(3, 5, 3), (9, 5, 5), (1, 5, 1)])
def test_scans_get_the_limits_of_the_recipe_and_at_most_as_many_workers_as_files(
    tmp_path, monkeypatch, workers_, files_, expected
):
    asked = []

    def in_order(work, jobs, fixed, **config):
        asked.append(config)
        return ((job, work(*fixed, job)) for job in jobs)

    monkeypatch.setattr(tokenization.workers, "in_order", in_order)
    write_files(tmp_path / "in", {f"{n}.txt": f"file {n}" for n in range(files_)})
    settings = ("data.file_timeout_s=33", "data.file_memory_mb=2222")
    summary = run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS, *settings, workers=workers_)
    assert asked == [{"workers": expected, "timeout_s": 33, "memory_mb": 2222}]
    assert summary["worked"] is True


@pytest.mark.usefixtures("in_this_process")
def test_augmenting_a_contiguous_split_is_a_usage_error(material, tmp_path):
    for name, settings in (("few", ()), ("cut", ("data.split=contiguous",))):
        paths = [material / "midi" / "more"] if settings else sorted((material / "midi").glob("*.mid"))[:2]
        with pytest.raises(UsageError, match="augmentation needs at least three different files"):
            run("music-tiny", paths, tmp_path / name, "tokenizer.transpose=[1]", *settings)


def test_a_file_in_place_of_the_folder_is_a_usage_error(material, tmp_path):
    (tmp_path / "s").write_text("keep me")
    with pytest.raises(UsageError, match="s is a file"):
        run("text-tiny", [material / "texts"], tmp_path / "s")
    assert (tmp_path / "s").read_text() == "keep me"


@pytest.mark.usefixtures("in_this_process")
def test_a_tokenizer_learns_from_the_training_split_and_reports_a_smaller_vocabulary(material, tmp_path):
    said = []
    settings = [f"data.shards={tmp_path / 's'}", "tokenizer.algorithm=bpe", "tokenizer.vocabulary=9000"]
    config = reading.read("text-tiny", settings)
    report = lambda event: said.append(event.text) if isinstance(event, Note) else None  # noqa: E731
    manifest = prepare(config, [str(material / "texts")], tmp_path / "s", n_workers=1, max_bad="0", report=report)
    filled = manifest["tokenizer"]["vocabulary"]
    assert said == [
        "training the tokenizer on the training split",
        f"the training split fills only {filled:,} of the 9,000 pieces of tokenizer.vocabulary",
    ]
    sizes = {split: one["units"]["byte"] for split, one in manifest["splits"].items()}
    assert manifest["tokenizer"]["training_split_bytes"] == sizes["train"] < sum(sizes.values())


@pytest.mark.usefixtures("in_this_process")
def test_each_file_is_reported_once_per_task_and_the_speed_counts_all_splits(tmp_path, monkeypatch):
    said, clock = [], iter([100.0, 102.0])
    monkeypatch.setattr(preparation, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    write_files(tmp_path / "in", {f"{n}.txt": f"file {n}" for n in range(5)})
    config = reading.read("text-tiny", [f"data.shards={tmp_path / 's'}", *CHARS])
    summary = prepare(config, [str(tmp_path / "in")], tmp_path / "s", n_workers=1, max_bad="0", report=said.append)
    tasks = [(task, done) for task in ("read", "scan", "write") for done in range(1, 6)]
    assert said == [Progress(task=task, done=done, total=5, unit="files") for task, done in tasks]
    assert summary["tokens_per_s"] == 5 * (len("file 0") + 1) / 2


@pytest.mark.usefixtures("in_this_process")
def test_the_absolute_paths_of_the_sources_are_remembered_for_each_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notes = {}
    for name in ("one", "two"):
        write_files(tmp_path / name, {f"{n}.txt": f"{name} {n}" for n in range(3)})
        manifest = run("text-tiny", [name, Path("..", tmp_path.name, name, "0.txt")], tmp_path / f"{name} s", *CHARS)
        notes[source_paths_file(manifest)] = [str(tmp_path / name), str(tmp_path / name / "0.txt")]
    assert len(notes) == 2
    assert {path: json.loads(path.read_text()) for path in notes} == notes


@pytest.mark.usefixtures("in_this_process")
def test_files_are_cut_in_order_of_their_names_however_they_are_grouped(tmp_path, monkeypatch):
    write_files(tmp_path / "in", {f"{n}.txt": f"file {n} " * (9 - n) for n in range(9)})
    settings = (*CHARS, "data.split=contiguous", "data.val=0.2", "data.test=0.3")
    run("text-tiny", [tmp_path / "in"], tmp_path / "alone", *settings)
    assert lines_of(tmp_path / "alone")[0]["split"] == "train"
    monkeypatch.setattr(TextTokenizer, "group", lambda *_: [range(8, 3, -1), range(3, -1, -1)])
    run("text-tiny", [tmp_path / "in"], tmp_path / "grouped", *settings)
    assert folder_sha256(tmp_path / "alone") == folder_sha256(tmp_path / "grouped")


def test_a_folder_in_use_is_left_alone(tmp_path):
    write_files(tmp_path / "in", {"a.txt": "a"})
    with files.held(tmp_path / "s", "shortcut a"), pytest.raises(UsageError, match="s is in use: shortcut a, process"):
        run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS)
    assert not (tmp_path / "s").exists()


@pytest.mark.usefixtures("in_this_process")
def test_a_manifest_of_sound_has_the_number_of_ids_per_frame(material, tmp_path):
    manifest = run("audio-tiny", [material / "wavs"], tmp_path / "s", "tokenizer.codebooks=2")
    expected = {"name": "audio", "vocabulary": 2049, "end": 2048, "stride": 2, "unit": "second"}
    assert {key: manifest["tokenizer"][key] for key in expected} == expected


@pytest.mark.usefixtures("in_this_process")
def test_a_split_that_no_hash_falls_into_gets_a_document_from_the_largest(tmp_path):
    # val: below 0.1; test: from 0.1 to below 0.5.
    hashes = {f"{n}": hashlib.sha256(f"{n}".encode()).hexdigest() for n in range(40)}
    place = {content: int(sha256[:16], 16) / 2**64 for content, sha256 in hashes.items()}
    train = [content for content in hashes if place[content] >= 0.5][:5]
    test = [content for content in hashes if 0.1 <= place[content] < 0.5][:2]
    write_files(tmp_path / "in", {f"{content}.txt": content for content in train + test})
    run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS, "data.val=0.1", "data.test=0.4")
    moved = min(train, key=hashes.get)
    expected = dict.fromkeys(train, "train") | dict.fromkeys(test, "test") | {moved: "val"}
    assert {line["source"].removesuffix(".txt"): line["split"] for line in lines_of(tmp_path / "s")} == expected


# Records, duplicates, splits that come with a corpus


def records(*texts):
    """A .jsonl file; what is not a string is a line as it is."""
    return "".join((json.dumps({"text": one}) if isinstance(one, str) else one.decode()) + "\n" for one in texts)


def notes_of(name, paths, out, *settings, **config):
    """What a preparation says, and its manifest."""
    said = []
    resolved = reading.read(name, [f"data.shards={out}", *settings])
    report = lambda event: said.append(event.text) if isinstance(event, Note) else None  # noqa: E731
    config = {"n_workers": 1, "max_bad": "0"} | config
    return said, prepare(resolved, [str(path) for path in paths], out, **config, report=report)


LINES = (*CHARS, "tokenizer.documents=line")


@pytest.mark.usefixtures("in_this_process")
def test_bad_records_are_listed_with_their_lines_and_the_rest_is_kept(tmp_path):
    write_files(
        tmp_path / "in",
        {
            "a.jsonl": records("one", b"", b"[]", "", "two", b'{"text": "A"}', "three", b"{cut"),
            "b.jsonl": records("four", b'{"txt": 1}', "five"),
            "c.jsonl": records(b"null", b"5"),
            "d.txt": "six\n",
        },
    )
    with pytest.raises(TooManyRejects) as raised:
        run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS)
    assert raised.value.message == "\n".join(
        [
            "1 of 4 files and 4 of 10 records were rejected, more than --max-bad 0",
            "  c.jsonl: has no record that can be used; line 1 it is null, not an object",
            "  a.jsonl, line 3: it is an array, not an object",
            "  a.jsonl, line 6: has the character 'A' at byte 0, which is not in tokenizer.alphabet",
        ]
    )
    assert "--max-bad" in raised.value.hint
    said, manifest = notes_of("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS, max_bad="5")
    assert manifest["worked"] is False
    listed = f"; {tmp_path / 's' / 'rejects.jsonl'} has all reasons"
    assert said == [raised.value.message.replace(", more than --max-bad 0", listed)]
    counts = ("inputs", "rejected", "records", "records_rejected", "documents_duplicated")
    assert [manifest[key] for key in counts] == [4, 1, 10, 4, 0]
    assert manifest["account"] == {"records_empty": 1}
    rejects = lines_of(tmp_path / "s", "rejects.jsonl")
    assert [(line["source"], line.get("line")) for line in rejects] == [
        *(("c.jsonl", None), ("a.jsonl", 3), ("a.jsonl", 6), ("a.jsonl", 8), ("b.jsonl", 2))
    ]
    digest = hashlib.sha256((tmp_path / "in" / "a.jsonl").read_bytes()).hexdigest()
    assert all(line["sha256"] == digest for line in rejects[1:4])
    found = lines_of(tmp_path / "s")
    assert [(line["source"], line.get("line"), line.get("account")) for line in found] == [
        ("a.jsonl", 1, {"records_empty": 1}),
        ("a.jsonl", 5, None),
        ("a.jsonl", 7, None),
        ("b.jsonl", 1, None),
        ("b.jsonl", 3, None),
        ("d.txt", None, None),
    ]
    texts = ("one", "two", "three", "four", "five", "six\n")
    assert [stored(tmp_path / "s", line) for line in found] == [[*chars(text), 38] for text in texts]


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize(("limit", "passes"), [("9%", False), ("10%", True), ("2", True), ("1", False)])
def test_a_share_of_records_is_of_records_and_not_of_lines_of_other_files(tmp_path, limit, passes):
    write_files(
        tmp_path / "in",
        {
            "a.jsonl": records(*(f"record {n}" for n in range(17)), "", b"[]", b"[]"),
            "b.txt": "".join(f"line {n}\n" for n in range(200)),
        },
    )
    if passes:
        assert run("text-tiny", [tmp_path / "in"], tmp_path / "s", *LINES, max_bad=limit)["records"] == 20
    else:
        with pytest.raises(TooManyRejects, match=r"^2 of 20 records were rejected, more than --max-bad"):
            run("text-tiny", [tmp_path / "in"], tmp_path / "s", *LINES, max_bad=limit)


def test_duplicates_and_bad_records_give_the_same_bytes_in_any_number_of_workers(tmp_path):
    contents = {f"{n}.jsonl": records(*(f"text {i % (n + 3)}" for i in range(9)), b"[]", "") for n in range(6)}
    contents |= {f"{n}.txt": "".join(f"text {i}\n" for i in range(n)) for n in range(1, 6)}
    write_files(tmp_path / "in", contents)
    for name, workers_ in (("a", 1), ("b", 3)):
        run("text-tiny", [tmp_path / "in"], tmp_path / name, *LINES, workers=workers_, max_bad="100%")
    run("text-tiny", [*(tmp_path / "in").iterdir()], tmp_path / "c", *LINES, workers=2, max_bad="100%")
    assert folder_sha256(tmp_path / "a") == folder_sha256(tmp_path / "b") == folder_sha256(tmp_path / "c")
    found = [line["sha256"] for line in lines_of(tmp_path / "a")]
    assert len(set(found)) == len(found) == 8 + 5  # "text 0" to "text 7", and five of them with a newline


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("split", ["documents", "contiguous"])
def test_equal_documents_are_kept_once_or_all_as_the_recipe_says(tmp_path, split):
    contents = {
        "a.jsonl": records("same", "one", "same", "same"),
        "b.txt": "two\nsame\ntwo\n\n",
        "c.txt": "one\nthree\n",
        "d.txt": "two\nsame\n",
    }
    write_files(tmp_path / "in", contents)
    order = [
        *(("a.jsonl", text) for text in ("same", "one", "same", "same")),
        *(("b.txt", text) for text in ("two\n", "same\n", "two\n\n")),
        *(("c.txt", text) for text in ("one\n", "three\n")),
        *(("d.txt", text) for text in ("two\n", "same\n")),
    ]
    once = [one for number, one in enumerate(order) if one[1] not in [text for _, text in order[:number]]]
    for duplicates, expected in (("keep", order), ("drop", once)):
        out = tmp_path / duplicates
        settings = (*LINES, f"data.duplicates={duplicates}", f"data.split={split}")
        manifest = run("text-tiny", [tmp_path / "in"], out, *settings)
        corpus = {}
        for line in lines_of(out):
            corpus[line["source"]] = corpus.get(line["source"], []) + stored(out, line)[:-1]
        wanted = {}
        for name, text in expected:
            wanted[name] = wanted.get(name, []) + chars(text)
        assert corpus == wanted
        assert manifest["documents_duplicated"] == len(order) - len(expected)
        assert manifest["rejected"] == 0
        listed = [(line["source"], line["reason"]) for line in lines_of(out, "rejects.jsonl")]
        assert listed == [("d.txt", "all of its documents are duplicates of others")] * (duplicates == "drop")
        if split == "contiguous":
            size = sum(len(text) for _, text in expected)
            assert manifest["splits"]["val"]["units"]["byte"] == round(size * 0.1)


@pytest.mark.usefixtures("in_this_process")
def test_copies_with_and_without_a_byte_order_mark_are_one_document(tmp_path):
    texts = {f"{n}.txt": f"text {n}\n" for n in range(40)}
    write_files(tmp_path / "in", texts | {f"bom {name}": "\ufeff" + text for name, text in texts.items()})
    manifest = run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS)
    assert manifest["documents_duplicated"] == 40
    found = [line["sha256"] for line in lines_of(tmp_path / "s")]
    assert sorted(found) == sorted(hashlib.sha256(text.encode()).hexdigest() for text in texts.values())
    listed = [line["source"] for line in lines_of(tmp_path / "s") + lines_of(tmp_path / "s", "rejects.jsonl")]
    assert sorted(listed) == sorted(path.name for path in (tmp_path / "in").iterdir())


GIVEN = ('data.splits.train=["train"]', 'data.splits.val=["dev"]', 'data.splits.test=["test"]')


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("split", ["given", "documents"])
def test_given_splits_hold_what_they_name_and_nothing_leaks(tmp_path, split):
    contents = {
        "train/a.txt": "train one which is quite long\ncommon\n",
        "train/b.txt": "train two\nval one\n",
        "a/train/c.txt": "equal file\n",
        "dev/a.txt": "val one\ncommon\n",
        "test/a.txt": "test one\ncommon\n",
        "test/z.txt": "equal file\n",
        "other/a.txt": "other\n",
    }
    write_files(tmp_path / "in", contents)
    said, manifest = notes_of("text-tiny", [tmp_path / "in"], tmp_path / "s", *LINES, *GIVEN, f"data.split={split}")
    assert manifest["split"] == "given"
    assert said == []
    found = [(line["source"], line["split"], stored(tmp_path / "s", line)[:-1]) for line in lines_of(tmp_path / "s")]
    expected = [
        ("dev/a.txt", "val", "val one\n"),
        ("test/a.txt", "test", "test one\n"),
        ("test/a.txt", "test", "common\n"),
        ("test/z.txt", "test", "equal file\n"),
        ("train/a.txt", "train", "train one which is quite long\n"),
        ("train/b.txt", "train", "train two\n"),
    ]
    assert found == [(name, split, chars(text)) for name, split, text in expected]
    assert lines_of(tmp_path / "s")[3]["duplicates"] == ["a/train/c.txt"]
    counts = ("inputs", "duplicates", "documents_duplicated", "rejected", "outside_splits")
    assert [manifest[key] for key in counts] == [7, 1, 3, 0, 1]
    assert lines_of(tmp_path / "s", "rejects.jsonl") == [
        {"source": "other/a.txt", "sha256": None, "reason": "is in none of data.splits"}
    ]


@pytest.mark.usefixtures("in_this_process")
def test_a_split_that_is_none_is_said_and_what_is_in_none_is_no_reject(tmp_path):
    names = {"0": "train", "1": "trian", "2": "val", "3": "test", "4": "", "5": "train"}
    write_files(tmp_path / "in", {f"{number}.txt": f"text {number}\n" for number in names})
    (tmp_path / "in" / "5.txt").write_bytes(b"\xff\xff")
    (tmp_path / "t.csv").write_text("f,split\n" + "".join(f"{number}.txt,{name}\n" for number, name in names.items()))
    table = f'data.splits.table="{tmp_path / "t.csv"}"'
    said, manifest = notes_of("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS, table, max_bad="1")
    assert said[0] == f"files of {tmp_path / 't.csv'} are left out whose split is none of train, val and test: 'trian'"
    assert (manifest["rejected"], manifest["outside_splits"]) == (1, 2)
    (rejected,) = [text for text in said if "rejects.jsonl" in text]
    assert rejected.splitlines()[0].startswith("1 of 6 files were rejected")
    assert [line.split(":")[0] for line in rejected.splitlines()[1:]] == ["  5.txt"]


@pytest.mark.usefixtures("in_this_process")
def test_a_table_gives_the_splits_and_another_table_is_another_preparation(tmp_path):
    write_files(tmp_path / "in", {f"{n}.txt": f"text {n}\n" for n in range(4)})
    rows = {"0.txt": "test", "1.txt": "validation", "2.txt": "train", "3.txt": "train"}
    write = lambda: (tmp_path / "t.csv").write_text("f,split\n" + "".join(f"{k},{v}\n" for k, v in rows.items()))  # noqa: E731
    write()
    settings = (*CHARS, f"data.splits.table={tmp_path / 't.csv'}")
    run("text-tiny", [tmp_path / "in"], tmp_path / "s", *settings)
    assert {line["source"]: line["split"] for line in lines_of(tmp_path / "s")} == rows | {"1.txt": "val"}
    assert run("text-tiny", [tmp_path / "in"], tmp_path / "s", *settings)["worked"] is False
    rows["3.txt"] = "test"
    write()
    with pytest.raises(UsageError, match="was prepared from something else"):
        run("text-tiny", [tmp_path / "in"], tmp_path / "s", *settings)


@pytest.mark.usefixtures("in_this_process")
def test_a_given_split_that_gets_nothing_is_a_usage_error(tmp_path):
    write_files(tmp_path / "in", {"train/a.txt": "a", "dev/b.txt": "b"})
    with pytest.raises(UsageError, match=r"data\.splits gives no file to test"):
        run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS, *GIVEN)
    assert not (tmp_path / "s").exists()
    write_files(tmp_path / "in", {"test/c.txt": "\u00e9"})  # not in the alphabet
    with pytest.raises(UsageError, match=r"data\.splits gives no document that can be used to test"):
        run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS, *GIVEN)


@pytest.mark.usefixtures("in_this_process")
def test_the_tokenizer_learns_from_the_given_training_split_alone(tmp_path):
    words = "".join(f"the cat number {n} sat\n" for n in range(300))
    write_files(tmp_path / "in", {"train/a.txt": words, "dev/a.txt": "quartz " * 400, "test/a.txt": "xylem " * 400})
    settings = ("tokenizer.vocabulary=300", *GIVEN)
    manifest = run("text-tiny", [tmp_path / "in"], tmp_path / "s", *settings)
    assert manifest["tokenizer"]["training_split_bytes"] == len(words)
    assert b"quart" not in (tmp_path / "s" / "tokenizer" / "sentencepiece.model").read_bytes()


@pytest.mark.usefixtures("in_this_process")
def test_only_the_given_training_split_is_augmented(material, tmp_path):
    names = sorted(path.name for path in (material / "midi" / "more").glob("*.mid"))
    lists = {"train": names[:3], "val": names[3:4], "test": names[4:]}
    settings = [f"data.splits.{split}={json.dumps(mine)}" for split, mine in lists.items()]
    run("music-tiny", [material / "midi" / "more"], tmp_path / "s", "tokenizer.transpose=[2]", *settings)
    found = [(line["source"], line.get("variant"), line["split"]) for line in lines_of(tmp_path / "s")]
    expected = [(name, None, split) for split, mine in lists.items() for name in mine]
    assert sorted(found, key=str) == sorted([*expected, *((n, "transpose=+2", "train") for n in names[:3])], key=str)


@pytest.mark.usefixtures("in_this_process")
def test_what_is_odd_about_a_preparation_is_said_in_one_line_each(tmp_path):
    write_files(tmp_path / "in", {"a.txt": "one", "b.txt": "two", "c.md5": "", "d/e.PDF": "", "f.pdf": "", "g": ""})
    said, _ = notes_of("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS)
    assert said == [
        "ignored because of their suffix: 2 .pdf, 1 .md5, 1 without suffix (c.md5, d/e.PDF, f.pdf, ...)",
        "fewer than three different documents: the corpus is cut into train, val and test",
    ]
    write_files(tmp_path / "given", {"train/a.txt": "one", "dev/b.txt": "two and more", "test/c.txt": "one two"})
    said, _ = notes_of("text-tiny", [tmp_path / "given"], tmp_path / "t", *CHARS, *GIVEN)
    assert said == [
        "the val split is larger than the training split: 13 tokens, train has 4",
        "the test split is larger than the training split: 8 tokens, train has 4",
    ]
    write_files(tmp_path / "tiny", {"a.txt": "one"})
    said, _ = notes_of("text-tiny", [tmp_path / "tiny"], tmp_path / "u", *CHARS)
    assert said[1:] == ["the val split is empty", "the test split is empty"]


@pytest.mark.usefixtures("in_this_process")
def test_a_trained_tokenizer_makes_one_split_of_other_files(material, tmp_path):
    write_files(tmp_path / "other", {f"{n}.txt": f"text {n % 3} of others\n" for n in range(5)} | {"bad.txt": ""})
    recipe = reading.read("text-tiny", [f"data.shards={tmp_path / 's'}", "tokenizer.vocabulary=300", *GIVEN])
    plain = reading.read("text-tiny", [f"data.shards={tmp_path / 's'}", "tokenizer.vocabulary=300"])
    prepare(plain, [str(material / "texts")], tmp_path / "s", n_workers=1, max_bad="0", report=quiet)
    tokenizer = TextTokenizer.load(recipe.tokenizer, tmp_path / "s" / "tokenizer")
    config = {"n_workers": 1, "report": quiet}
    with pytest.raises(TooManyRejects, match="1 of 6 files"):
        preparation.tokenize(recipe, tokenizer, [str(tmp_path / "other")], tmp_path / "t", max_bad="0", **config)
    manifest = preparation.tokenize(recipe, tokenizer, [str(tmp_path / "other")], tmp_path / "t", max_bad="1", **config)
    opened = Shards(tmp_path / "t")
    assert (manifest["split"], manifest["worked"], manifest["duplicates"]) == ("test", False, 2)
    assert opened.tokenizer["fingerprint"] == Shards(tmp_path / "s").tokenizer["fingerprint"]
    assert [opened.split(name).tokens for name in ("train", "val")] == [0, 0]
    test = opened.split("test")
    expected = [[*tokenizer.prompt(tmp_path / "other" / f"{n}.txt"), tokenizer.eos] for n in range(3)]
    assert test.read(0, test.tokens).tolist() == [token for one in expected for token in one]
    assert manifest["splits"]["test"]["units"] == {"byte": 3 * 17, "character": 3 * 17, "word": 3 * 5}


@pytest.mark.usefixtures("in_this_process")
def test_a_rerun_removes_the_shards_that_a_killed_one_left(tmp_path, monkeypatch):
    write_files(tmp_path / "in", {f"{n}.txt": f"text {n} " * 200 for n in range(12)})
    small, large = (f"data.shard_tokens={size}" for size in (1024, 10**6))
    replace_ = os.replace

    def dies(old, new):
        if Path(new) == tmp_path / "s" / "manifest.json":
            raise KeyboardInterrupt
        replace_(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        patch.setattr(shards, "discard", lambda _: None)  # nor does a killed process clean up
        with pytest.raises(KeyboardInterrupt):
            run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS, small)
    assert (tmp_path / "s" / "train-00001.bin").exists()
    (tmp_path / "s" / "train-notes.bin").write_text("of the user")
    run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS, large)
    run("text-tiny", [tmp_path / "in"], tmp_path / "whole", *CHARS, large)
    left = {path.name for path in (tmp_path / "s").iterdir()} - {path.name for path in (tmp_path / "whole").iterdir()}
    assert left == {"train-notes.bin"}
    (tmp_path / "s" / "train-notes.bin").unlink()
    assert folder_sha256(tmp_path / "s") == folder_sha256(tmp_path / "whole")


def test_the_rejects_are_listed_also_if_no_file_can_be_used(tmp_path):
    write_files(tmp_path / "in", {"a.txt": "", "b.txt": "", "c.txt": ""})
    (tmp_path / "in" / "c.txt").write_bytes(b"\xff")
    with pytest.raises(TooManyRejects, match="all 2 files were rejected") as refused:
        run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS)
    assert str(tmp_path / "s" / "rejects.jsonl") in refused.value.hint
    lines = [json.loads(line) for line in (tmp_path / "s" / "rejects.jsonl").read_text().splitlines()]
    assert {line["source"] for line in lines} == {"a.txt", "c.txt"}  # b is a duplicate of a
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [".shortcut", "rejects.jsonl"]
    write_files(tmp_path / "in", {f"{n}.txt": f"text {n}" for n in range(9)})
    run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS, max_bad="3")


@pytest.mark.usefixtures("in_this_process")
def test_a_folder_with_files_of_the_user_is_left_alone(tmp_path):
    write_files(tmp_path / "in", {f"{n}.txt": f"text {n}" for n in range(9)})
    mine = {".lock": "", "tokenizer/model": "mine", "documents.jsonl": "mine", "train-00000.bin": "mine"}
    write_files(tmp_path / "s", mine)
    with pytest.raises(UsageError, match="is not empty, and was not made by `shortcut prepare`"):
        run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS)
    found = (path for path in (tmp_path / "s").rglob("*") if path.is_file())
    assert {path.relative_to(tmp_path / "s").as_posix(): path.read_text() for path in found} == mine


@pytest.mark.usefixtures("in_this_process")
def test_shards_inside_the_folder_of_the_inputs_are_no_inputs(tmp_path):
    write_files(tmp_path / "in", {f"{n}.txt": f"text {n}" for n in range(9)})
    first = run("text-tiny", [tmp_path / "in"], tmp_path / "in" / "s", *CHARS)
    (tmp_path / "in" / "s" / "notes.txt").write_text("not an input")
    again = run("text-tiny", [tmp_path / "in"], tmp_path / "in" / "s", *CHARS)
    assert (first["worked"], again["worked"], again["inputs"]) == (True, False, 9)


# Rejects that depend on the machine


class Unlucky(MidiTokenizer):
    """Fails on files whose names begin with "bad", as a file named TROUBLE says."""

    def scan(self, source):
        trouble = Path(os.environ["TROUBLE"]).read_text()
        if source.path.name.startswith("bad") and trouble:
            number = getattr(signal, trouble, None)
            if number:
                os.kill(os.getpid(), number)
            if trouble == "timeout":
                import time

                time.sleep(60)
            if trouble == "memory":
                raise MemoryError
            if trouble == "rejected":
                raise Rejected("is no good")
            raise unreadable(OSError(getattr(errno, trouble), os.strerror(getattr(errno, trouble))))
        yield from super().scan(source)


@pytest.fixture
def unlucky(material, tmp_path, monkeypatch):
    """Prepares MIDI files of which one is in trouble; returns what is said, and the manifest or the error."""
    monkeypatch.setenv("TROUBLE", str(tmp_path / "TROUBLE"))
    shutil.copytree(material / "midi" / "more", tmp_path / "in")
    first = sorted((tmp_path / "in").glob("*.mid"))[0]
    first.rename(first.with_name("bad.mid"))

    def attempt(trouble, *settings, out="s", max_bad="100%"):
        (tmp_path / "TROUBLE").write_text(trouble)
        events = []
        recipe = reading.read("music-tiny", [f"data.shards={tmp_path / out}", *settings])
        try:
            with monkeypatch.context() as patched:
                patched.setattr("shortcut_cli.registry.load", lambda *_: Unlucky)
                paths, config = [str(tmp_path / "in")], {"n_workers": 2, "max_bad": max_bad}
                return events, prepare(recipe, paths, tmp_path / out, **config, report=events.append)
        except ShortcutError as error:
            return events, error

    return attempt


@pytest.mark.parametrize("algorithm", ["unigram", "bpe"])
@pytest.mark.parametrize("moment", ["_assign", "_write"])
def test_a_text_that_changes_after_its_scan_costs_only_itself(tmp_path, monkeypatch, algorithm, moment):
    write_texts(tmp_path / "texts", 12)
    settings = (f"tokenizer.algorithm={algorithm}", "tokenizer.vocabulary=300")
    changing = [tmp_path / "texts" / name for name in ("004.txt", "007.txt")]
    before, step = {path: path.read_text() for path in changing}, getattr(tokenization.Tokenization, moment)

    def after_a_change(self, *arguments):
        for path in changing:
            path.write_text(before[path].upper().lower()[::-1])
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tokenization.Tokenization, moment, after_a_change)
        with pytest.raises(Unfinished, match=r"004\.txt: changed while it was being prepared"):
            run("text-tiny", [tmp_path / "texts"], tmp_path / "s", *settings, max_bad="2")
    manifest = Shards(tmp_path / "s").manifest
    assert (manifest["inputs"], manifest["rejected"], manifest["unfinished"]) == (12, 2, 2)
    lines = [json.loads(line) for line in (tmp_path / "s" / "rejects.jsonl").read_text().splitlines()]
    assert [(line["source"], line["passing"]) for line in lines] == [("004.txt", True), ("007.txt", True)]
    # What was written is what a preparation of the other files writes,
    shutil.copytree(tmp_path / "texts", tmp_path / "others")
    for path in changing:
        (tmp_path / "others" / path.name).unlink()
    others = run("text-tiny", [tmp_path / "others"], tmp_path / "o", *settings)
    assert {**manifest["files"], "rejects.jsonl": 0} == {**others["files"], "rejects.jsonl": 0}
    # and the same command ends in the bytes of an undisturbed one.
    run("text-tiny", [tmp_path / "texts"], tmp_path / "s", *settings)
    run("text-tiny", [tmp_path / "texts"], tmp_path / "new", *settings)
    assert folder_sha256(tmp_path / "s") == folder_sha256(tmp_path / "new")


def test_texts_that_all_change_after_their_scan_are_all_rejected(tmp_path, monkeypatch):
    write_texts(tmp_path / "texts", 3)
    write = tokenization.Tokenization._write

    def after_a_change(self, *arguments):
        for path in (tmp_path / "texts").iterdir():
            path.write_text("other")
        return write(self, *arguments)

    monkeypatch.setattr(tokenization.Tokenization, "_write", after_a_change)
    with pytest.raises(TooManyRejects, match="all 3 files were rejected"):
        run("text-tiny", [tmp_path / "texts"], tmp_path / "s", "tokenizer.algorithm=chars")
    assert {path.name for path in (tmp_path / "s").iterdir()} == {".shortcut", "rejects.jsonl"}


@pytest.mark.parametrize("trouble", ["SIGKILL", "SIGTERM", "SIGBUS", "timeout", "memory", "EIO", "ESTALE", "ENOSPC"])
def test_a_file_that_the_machine_failed_is_tried_again_and_the_bytes_end_the_same(unlucky, tmp_path, trouble):
    limits = ("data.file_timeout_s=8",)
    _, whole = unlucky("", *limits, out="whole")
    assert whole["unfinished"] == 0
    _, error = unlucky(trouble, *limits)
    assert isinstance(error, Unfinished)
    assert error.exit_code == 3
    assert error.message.startswith("1 files could not be read because of the machine\n  bad.mid: ")
    (line,) = lines_of(tmp_path / "s", "rejects.jsonl")
    assert (line["source"], line["passing"]) == ("bad.mid", True)
    assert Shards(tmp_path / "s").manifest["unfinished"] == 1
    assert len(list((tmp_path / "s" / ".staging").rglob("*.ids"))) == 5  # so that they need not be read again
    assert list(verify(tmp_path / "s")) == []
    before = folder_sha256(tmp_path / "s")
    events, error = unlucky(trouble, *limits)
    assert isinstance(error, Unfinished)
    assert {event.task for event in events if isinstance(event, Progress)} == {"read", "try again"}
    assert folder_sha256(tmp_path / "s") == before
    _, manifest = unlucky("", *limits)
    assert (manifest["worked"], manifest["unfinished"]) == (True, 0)
    assert folder_sha256(tmp_path / "s") == folder_sha256(tmp_path / "whole")
    assert unlucky("", *limits)[1]["worked"] is False


@pytest.mark.parametrize("trouble", ["SIGSEGV", "SIGABRT", "rejected", "EACCES", "EISDIR"])
def test_a_file_that_is_at_fault_itself_is_not_tried_again(unlucky, tmp_path, trouble):
    assert unlucky(trouble)[1]["unfinished"] == 0
    (line,) = lines_of(tmp_path / "s", "rejects.jsonl")
    assert "passing" not in line
    assert unlucky("")[1]["worked"] is False


def test_a_file_that_turns_out_to_be_bad_finishes_the_preparation(unlucky, tmp_path):
    unlucky("EIO")
    assert unlucky("rejected")[1]["unfinished"] == 0
    assert [line["reason"] for line in lines_of(tmp_path / "s", "rejects.jsonl")] == ["is no good"]
    assert not (tmp_path / "s" / ".staging").exists()


@pytest.mark.parametrize("trouble", ["ENOENT", "ENOTDIR"])
def test_a_file_that_is_gone_when_it_is_read_is_tried_again(unlucky, tmp_path, trouble):
    assert isinstance(unlucky(trouble)[1], Unfinished)
    assert lines_of(tmp_path / "s", "rejects.jsonl")[0]["passing"] is True
    assert unlucky("")[1]["unfinished"] == 0
    assert lines_of(tmp_path / "s", "rejects.jsonl") == []


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("now", ["gone", "leads nowhere"])
def test_a_file_that_could_not_be_hashed_and_is_gone_finishes_the_preparation(tmp_path, now):
    write_files(tmp_path / "in", {f"{n}.txt": f"text {n}\n" for n in range(5)})
    link = tmp_path / "in" / "link.txt"
    link.symlink_to("/proc/self/mem")  # Input/output error
    for _ in range(2):
        with pytest.raises(Unfinished, match=r"link\.txt: can't be read: Input/output error"):
            run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS, max_bad="1")
    link.unlink()
    if now == "leads nowhere":
        link.symlink_to(tmp_path / "nowhere")
    manifest = run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS, max_bad="1")
    assert (manifest["worked"], manifest["unfinished"]) == (True, 0)
    assert [line.get("passing") for line in lines_of(tmp_path / "s", "rejects.jsonl")] == [None] * manifest["rejected"]


@pytest.mark.usefixtures("in_this_process")
def test_a_preparation_that_fails_leaves_no_partial_shards(tmp_path, monkeypatch):
    write_files(tmp_path / "in", {f"{n}.txt": f"text {n}\n" for n in range(5)})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shortcut_cli.data.shards.FolderWriter.finish", full)
    with pytest.raises(OSError, match="No space left"):
        run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS)
    assert not (tmp_path / "s").exists()


@pytest.mark.usefixtures("in_this_process")
def test_a_marked_folder_without_a_manifest_keeps_files_of_the_user(tmp_path):
    write_files(tmp_path / "in", {f"{n}.txt": f"text {n}\n" for n in range(5)})
    mine = {".shortcut": "shortcut prepare\n"}
    mine |= dict.fromkeys(("train-00007.bin", "tokenizer/mine.model", "documents.jsonl", "rejects.jsonl"), "mine")
    write_files(tmp_path / "s", mine)
    with pytest.raises(UsageError, match=r"documents\.jsonl, rejects\.jsonl, tokenizer/mine\.model, train-00007\.bin"):
        run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS)
    found = {str(path.relative_to(tmp_path / "s")): path for path in (tmp_path / "s").rglob("*") if path.is_file()}
    assert {name: path.read_text() for name, path in found.items()} == mine


def test_workers_that_are_killed_before_they_have_a_job_end_the_command(monkeypatch):
    """As the kernel does, if memory runs out while they import what they need."""
    monkeypatch.setattr(workers, "_start", killed_at_once)
    jobs = in_order(misbehave, ["good"] * 40, (), workers=1, timeout_s=20, memory_mb=4096)
    with pytest.raises(ShortcutError, match="ended before they had any") as raised:
        list(jobs)
    assert raised.value.hint == "run the same command again, perhaps with fewer --workers"


def test_too_many_rejects_come_first_and_name_what_may_pass(unlucky):
    error = unlucky("SIGKILL", max_bad="0")[1]
    assert isinstance(error, TooManyRejects)
    assert "1 are the machine's fault" in error.hint


@pytest.mark.usefixtures("in_this_process")
def test_a_file_that_can_not_be_hashed_is_tried_again(tmp_path, monkeypatch):
    write_files(tmp_path / "in", {f"{n}.txt": f"text {n}\n" for n in range(5)})
    run("text-tiny", [tmp_path / "in"], tmp_path / "whole", *CHARS)
    sha256 = files.sha256

    def fails(path):
        if path.name == "3.txt":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256(path)

    with monkeypatch.context() as patched:
        patched.setattr(files, "sha256", fails)
        for _ in range(2):
            with pytest.raises(Unfinished, match=r"3\.txt: can't be read: Input/output error"):
                run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS, max_bad="1")
        with pytest.raises(UsageError, match=r"prepared from something else\n  data\.val"):
            run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS, "data.val=0.2", max_bad="1")
    assert run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS)["worked"] is True
    assert folder_sha256(tmp_path / "s") == folder_sha256(tmp_path / "whole")


def test_a_folder_that_can_not_be_listed_may_pass(tmp_path, monkeypatch):
    write_files(tmp_path, {"a/1.txt": "1", "b/2.txt": "2"})
    scandir = os.scandir

    def fails(path):
        if Path(path).name == "b":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fails)
    assert inputs.find([str(tmp_path)], (".txt",)).passing == {"b"}


def test_an_unfinished_preparation_has_no_manifest_while_it_is_rewritten(unlucky, tmp_path, monkeypatch):
    unlucky("EIO")
    replace_ = os.replace
    seen = []

    def noted(source, target):
        if ".partial" in str(source) and Path(target).parent == tmp_path / "s":
            seen.append((tmp_path / "s" / "manifest.json").exists())
        replace_(source, target)

    monkeypatch.setattr(os, "replace", noted)
    assert unlucky("")[1]["unfinished"] == 0
    assert seen
    assert not any(seen)


def test_whoever_uses_unfinished_shards_is_told(unlucky, tmp_path):
    from shortcut_cli.data.shards import warning

    assert warning(tmp_path / "s", unlucky("")[1]) == ""
    unlucky("EIO", out="t")
    assert "t is unfinished: it lacks 1 files" in warning(tmp_path / "t", Shards(tmp_path / "t").manifest)


def test_a_reject_keeps_its_kind_on_its_way_from_a_worker():
    import pickle

    for passing in (True, False):
        again = pickle.loads(pickle.dumps(Rejected("why", passing=passing)))
        assert (str(again), again.passing) == ("why", passing)
