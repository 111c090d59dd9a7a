"""Prove: correct data is found equal, and every difference is found."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TEXT_SETTINGS, quiet, set_flags, shortcut
from test_preparation import CHARS, DOMAINS, material, run

from shortcut_cli.compare import watching
from shortcut_cli.config import reading
from shortcut_cli.data.shards import Shards
from shortcut_cli.errors import CheckFailed, ShortcutError, UsageError
from shortcut_cli.events import Part, Progress
from shortcut_cli.stages import proof
from shortcut_cli.training import checkpoint, conditions

assert material  # the fixture


def prove(folder, *paths, count=100):
    return proof.tokens(folder, [str(path) for path in paths], count=count, seed=1, report=quiet)


@pytest.mark.parametrize(("name", "kind", "settings"), DOMAINS, ids=str)
def test_documents_tokenized_again_in_other_blocks_are_equal(material, tmp_path, name, kind, settings):
    manifest = run(name, [material / kind], tmp_path / "s", *settings)
    result = prove(tmp_path / "s")
    assert result["different"] == []
    assert result["tokens"] == sum(split["tokens"] for split in manifest["splits"].values())


@pytest.mark.parametrize("kind", ["texts", "wavs"])
def test_a_contiguous_split_is_cut_again_at_the_same_places(material, tmp_path, kind):
    (name, _, settings) = next(domain for domain in DOMAINS if domain[1] == kind)
    manifest = run(name, [material / kind], tmp_path / "s", *settings, "data.split=contiguous")
    result = prove(tmp_path / "s", material / kind)
    assert (result["different"], result["tokens"]) == ([], sum(s["tokens"] for s in manifest["splits"].values()))


@pytest.mark.parametrize("split", ["documents", "contiguous"])
@pytest.mark.parametrize("duplicates", ["drop", "keep"])
def test_dropped_documents_and_bad_records_are_passed_over(tmp_path, split, duplicates):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("".join(f"line {n % 7}\n\n" for n in range(20)))
    records = [{"text": f"line {n}\n\n"} for n in range(12)] + [{"text": ""}, {"no": 1}, {"text": "last"}] * 2
    (tmp_path / "in" / "b.jsonl").write_text("\n".join(map(json.dumps, records)))
    settings = (*CHARS, "tokenizer.documents=line", f"data.split={split}", f"data.duplicates={duplicates}")
    manifest = run("text-tiny", [tmp_path / "in"], tmp_path / "s", *settings, max_bad="2")
    assert (manifest["documents_duplicated"] > 0) == (duplicates == "drop")
    result = prove(tmp_path / "s", tmp_path / "in")
    assert (result["different"], result["sources"]) == ([], 2)
    assert result["tokens"] == sum(split["tokens"] for split in manifest["splits"].values())


@pytest.mark.parametrize("duplicates", ["drop", "keep"])
@pytest.mark.parametrize("split", ["documents", "contiguous"])
def test_files_of_one_name_below_several_roots(tmp_path, duplicates, split):
    """Each is compared with itself, whatever is the order of their hashes; equal and broken ones have no records."""
    for root in ("one", "two", "three"):
        (tmp_path / root).mkdir()
        for number in range(5):
            (tmp_path / root / f"{number}.txt").write_text(f"{root} line\n\n{number} {root}\n")
    (tmp_path / "one" / "3.txt").write_text("three line\n\n2 three\n")  # as 2.txt of three
    (tmp_path / "two" / "3.txt").write_bytes(b"\xff")
    (tmp_path / "three" / "1.txt").write_text("one line\n\n1 one\n")  # as 1.txt of one
    roots = [tmp_path / root for root in ("one", "two", "three")]
    settings = (*CHARS, f"data.split={split}", f"data.duplicates={duplicates}", "tokenizer.documents=paragraph")
    manifest = run("text-tiny", roots, tmp_path / "s", *settings, max_bad="1")
    assert (manifest["duplicates"], manifest["rejected"]) == (2, 1)
    for order in (roots, roots[::-1]):
        result = prove(tmp_path / "s", *order)
        assert (result["different"], result["sources"]) == ([], 15 - 2 - 1)
        assert result["tokens"] == sum(split["tokens"] for split in manifest["splits"].values())
    (tmp_path / "two" / "0.txt").write_text("one line\n\n4 two\n")
    with pytest.raises(ShortcutError, match=r"the documents of .*0\.txt have changed"):
        prove(tmp_path / "s", *roots)


def test_a_document_that_was_not_dropped_as_a_duplicate_has_changed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("".join(f"line {n % 7}\n" for n in range(20)))
    run("text-tiny", [tmp_path / "in"], tmp_path / "s", *CHARS, "tokenizer.documents=line")
    for number, content in enumerate(("line 9\n", "line 3\n")):
        (tmp_path / "in" / "a.txt").write_text("".join(f"line {n}\n" for n in range(7)) + content)
        if number:
            assert prove(tmp_path / "s")["different"] == []
            continue
        with pytest.raises(ShortcutError, match=r"the documents of .* have changed"):
            prove(tmp_path / "s")


def test_bpe_across_the_cuts_of_a_contiguous_split_can_not_be_proven(material, tmp_path):
    run("music-tiny", [material / "midi"], tmp_path / "s", "tokenizer.bpe=1000", "data.split=contiguous")
    with pytest.raises(UsageError, match="does not support a contiguous split"):
        prove(tmp_path / "s")


def test_one_wrong_id_is_found(material, tmp_path):
    run("music-tiny", [material / "midi"], tmp_path / "s")
    path = tmp_path / "s" / "val-00000.bin"
    ids = np.fromfile(path, "<u2")
    ids[10] ^= 1
    ids.tofile(path)
    wrong = [json.loads(line) for line in (tmp_path / "s" / "documents.jsonl").read_text().splitlines()]
    assert prove(tmp_path / "s")["different"] == [next(d["source"] for d in wrong if d["split"] == "val")]
    done = shortcut("prove", "tokens", tmp_path / "s", "--sources", "100", cwd=tmp_path, check=4)
    assert "1 documents were tokenized differently" in done.stderr


def test_sources_that_moved_or_changed(material, tmp_path):
    shutil.copytree(material / "midi", tmp_path / "midi")
    run("music-tiny", [tmp_path / "midi"], tmp_path / "s")
    (tmp_path / "midi").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="does not exist"):
        prove(tmp_path / "s")
    assert prove(tmp_path / "s", tmp_path / "moved")["different"] == []
    one, other = sorted((tmp_path / "moved").glob("*.mid"))[:2]
    one.write_bytes(other.read_bytes())
    with pytest.raises(ShortcutError, match=r"the documents of .* have changed"):
        prove(tmp_path / "s", tmp_path / "moved")
    one.write_bytes(b"no longer MIDI")
    with pytest.raises(ShortcutError, match=r"the documents of .* have changed .*: it is not a MIDI file"):
        prove(tmp_path / "s", tmp_path / "moved")
    Shards(tmp_path / "s")


def test_a_run_that_is_killed_while_it_saves_ends_with_the_same_bytes(text_run, tmp_path):
    flags = set_flags(*TEXT_SETTINGS, f"data.shards={text_run / 'shards'}", "train.steps=20", "train.eval_every=1")
    flags += set_flags("train.eval_windows=4", "train.optimizer=muon", "train.precision=bf16")
    resolved, events = reading.read("text-tiny", flags[1::2]), []
    result = proof.resume(resolved, tmp_path / "runs", kills=2, seed=1, device="cpu", report=events.append)
    told = [event for event in events if isinstance(event, Progress)]  # by the trainings themselves
    assert {(event.task, event.total, event.unit) for event in told} == {("train", 20, "steps")}
    assert {event.loss_unit for event in told if event.loss is not None} == {"nats per token"}
    over = [event.whole.over for event in told]
    assert over == sorted(over)
    assert over[0] == 0 < over[-1]  # the last training may end between two looks
    assert result["kills"] == 2
    assert result["equal_weights"] is result["equal_logs"] is True
    assert set(result["killed_sha256"]) == {result["uninterrupted_sha256"]}
    lines = [json.loads(line) for line in (tmp_path / "runs" / "killed-1" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation" in line] == list(range(1, 21))
    assert not list((tmp_path / "runs").rglob("*.tmp"))


def test_the_requested_number_of_sources_is_read_again_at_all_block_scales(material, tmp_path, monkeypatch):
    (name, kind, settings) = next(domain for domain in DOMAINS if domain[1] == "texts")
    run(name, [material / kind], tmp_path / "s", *settings)
    read, again = [], proof._again

    def spy(tokenizer, source, records, *, cut, dropped):
        read.append((source.relative, tokenizer.block_scale))
        assert not cut
        return again(tokenizer, source, records, cut=cut, dropped=dropped)

    monkeypatch.setattr(proof, "_again", spy)
    chosen = []
    for seed in (1, 1, 2):
        result = proof.tokens(tmp_path / "s", [], count=6, seed=seed, report=quiet)
        assert (result["sources"], result["block_scales"], result["different"]) == (6, [0.4, 3.7, 30.0], [])
        chosen.append([source for source, _ in read])
        assert len(set(chosen[-1])) == 6
        assert sorted(scale for _, scale in read) == [0.4, 0.4, 3.7, 3.7, 30.0, 30.0]
        lines = map(json.loads, (tmp_path / "s" / "documents.jsonl").read_text().splitlines())
        assert result["tokens"] == sum(line["tokens"] for line in lines if line["source"] in chosen[-1])
        read.clear()
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_stored_document_is_found_across_shards_by_its_record():
    shards = [SimpleNamespace(ids=range(size)) for size in (5, 1, 4)]
    asked = []
    split = SimpleNamespace(shards=shards, name="val", tokens=10, read=lambda *arguments: asked.append(arguments))
    for shard, offset, tokens in ((0, 0, 5), (1, 0, 1), (2, 1, 3)):
        proof._stored(split, {"shard": shard, "offset": offset, "tokens": tokens})
    assert asked == [(0, 5), (5, 1), (7, 3)]
    with pytest.raises(CheckFailed, match=r"a\.txt ends behind the val split"):
        proof._stored(split, {"source": "a.txt", "shard": 2, "offset": 2, "tokens": 3})


# Hashes of weights


WEIGHTS = {"b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "a": torch.tensor([5, -6], dtype=torch.int16)}


def hashed(monkeypatch, weights):
    monkeypatch.setattr(checkpoint, "load", lambda _: {"model": weights, "step": 4})
    return proof.weights_sha256(Path("run.pt"))


def test_a_hash_covers_names_dtypes_shapes_and_bytes_of_all_weights_sorted_by_name(monkeypatch):
    content = b"a torch.int16 [2] " + np.array([5, -6], "<i2").tobytes()
    content += b"b torch.float32 [2, 2] " + np.array([1, 2, 3, 4], "<f4").tobytes()
    found = hashed(monkeypatch, WEIGHTS)
    assert found == hashlib.sha256(content).hexdigest()
    assert found == hashed(monkeypatch, dict(reversed(WEIGHTS.items())))


def test_weights_that_differ_in_one_bit_or_one_name_have_different_hashes(monkeypatch):
    found = [hashed(monkeypatch, WEIGHTS)]
    for name, weight in WEIGHTS.items():
        content = bytearray(weight.numpy().tobytes())
        for place in range(len(content)):
            flipped = bytearray(content)
            flipped[place] ^= 1
            other = torch.frombuffer(flipped, dtype=weight.dtype).reshape(weight.shape)
            found.append(hashed(monkeypatch, WEIGHTS | {name: other}))
        found.append(hashed(monkeypatch, {f"{key}x" if key == name else key: value for key, value in WEIGHTS.items()}))
        found.append(hashed(monkeypatch, {key: value for key, value in WEIGHTS.items() if key != name}))
    found.append(hashed(monkeypatch, {"a": WEIGHTS["b"], "b": WEIGHTS["a"]}))
    found.append(hashed(monkeypatch, WEIGHTS | {"c": torch.zeros(1)}))
    found.append(hashed(monkeypatch, WEIGHTS | {"a": WEIGHTS["a"].view(torch.uint16)}))
    found.append(hashed(monkeypatch, WEIGHTS | {"b": WEIGHTS["b"].flatten()}))
    assert len(set(found)) == len(found) == 1 + 16 + 4 + 2 + 2 + 2 + 2


# Killed runs, with the training replaced


class Trainings:
    """Training processes; the run in each folder finishes after it was killed as often as `lasts` says."""

    def __init__(self, monkeypatch, lasts, errors=None):
        self.started, self.waited, self.killed = [], [], []
        self.lasts, self.errors = lasts, errors or {}
        self.weights, self.best, self.logs = {}, {}, {}
        self.tell = lambda _, __: None
        monkeypatch.setattr(proof, "_start", self.start)
        monkeypatch.setattr(proof, "_saved_step", lambda path: 10 * self.killed.count(path.name))
        monkeypatch.setattr(proof, "weights_sha256", self.hash)
        monkeypatch.setattr(proof, "_log", lambda path: self.logs.get(path.name, ["log"]))

    def hash(self, path):
        assert path.name in ("run.pt", "resume.pt")
        return (self.best if path.name == "run.pt" else self.weights).get(path.parent.name, path.name)

    def start(self, folder, name, device, told):
        assert (folder / "recipe.toml").exists()
        self.tell(name, watching.Teller(told))
        self.started.append((name, device))

        def wait(timeout):
            self.waited.append(timeout)
            if self.killed.count(name) < self.lasts[name]:
                raise subprocess.TimeoutExpired("train", timeout)
            return 0

        return SimpleNamespace(
            wait=wait,
            kill=lambda: self.killed.append(name),
            communicate=lambda: (None, "errors of the training"),
            returncode=self.errors.get(name, 0),
        )


def resumed(folder, kills=3, seed=1, report=quiet):
    resolved = reading.read("text-tiny", ["data.shards=somewhere"])
    return proof.resume(resolved, folder, kills=kills, seed=seed, device="d", report=report)


def test_every_kill_is_counted_and_a_run_that_ends_too_early_is_followed_by_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainings = Trainings(monkeypatch, {"killed-1": 1, "killed-2": 0, "killed-3": 9})
    done = []
    result = resumed(tmp_path / "f", report=done.append)
    assert trainings.killed == ["killed-1", "killed-3", "killed-3"]
    names = ["whole", "killed-1", "killed-1", "killed-2", "killed-3", "killed-3", "killed-3"]
    assert trainings.started == [(name, "d") for name in names]
    assert result == {
        "schema_version": 2,
        "kills": 3,
        "resumed_at_steps": [10, 10, 20],
        "uninterrupted_sha256": "resume.pt",
        "killed_sha256": ["resume.pt"] * 3,
        "equal_weights": True,
        "equal_logs": True,
        "conditions": conditions.told(conditions.now("d")),
    }
    assert [(event.number, event.total) for event in done] == [(number, 5) for number in (1, 2, 3, 3, 3, 4, 5)]
    written = reading.read(str(tmp_path / "f" / "recipe.toml"))
    assert written.data.shards == str(tmp_path / "somewhere")
    assert written.train == reading.read("text-tiny", [f"train.threads={torch.get_num_threads()}"]).train


def test_the_times_of_the_kills_are_random_and_set_by_the_seed(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 50))
    monkeypatch.setattr(proof.time, "monotonic", lambda: next(clock))  # the uninterrupted training takes 50 s
    for number, seed in enumerate((1, 2)):
        trainings = Trainings(monkeypatch, {"killed-1": 9})
        resumed(tmp_path / str(number), kills=2, seed=seed)
        moments = random.Random(seed)
        assert trainings.waited == [moments.uniform(0, 50), moments.uniform(0, 50)]


def test_what_a_training_tells_moves_the_bar_over_all_and_the_time_left(tmp_path, monkeypatch):
    """Of 50 s without a kill; then there are two kills, of half a training each, and a training to the end."""
    now = 0.0
    monkeypatch.setattr(proof.time, "monotonic", lambda: now)
    monkeypatch.setattr(proof, "POLL_S", 0.01)
    trainings, events, arrived = Trainings(monkeypatch, {"killed-1": 9}), [], threading.Event()

    def report(event):
        events.append(event)
        if isinstance(event, Progress):
            arrived.set()

    def tell(name, teller):
        nonlocal now
        for done, seconds in ((0, 5.0), (1, 9.0)) if name == "whole" else ((2, 10.0),):
            now += seconds
            arrived.clear()
            teller.told = -1.0
            teller.tell(Progress("train", done, 5, "steps", loss=1.5))
            assert arrived.wait(20)
        now += 50.0 - now % 50.0

    trainings.tell = tell
    resumed(tmp_path, kills=2, report=report)
    told = [event for event in events if isinstance(event, Progress)]
    found = {one.whole.over: (one.done, one.loss, round(one.whole.share, 3), one.whole.left_s) for one in told}
    assert found == {
        0: (1, 1.5, round(0.2 / 3, 3), pytest.approx(2.8 * 50)),  # 5 s until it begins, and 9 s for a fifth
        1: (2, 1.5, round(1.2 / 3, 3), pytest.approx(1.8 * 50)),  # 10 of 50 s
        2: (2, 1.5, round(1.7 / 3, 3), pytest.approx(1.3 * 50)),
        3: (2, 1.5, round(2.4 / 3, 3), pytest.approx(0.6 * 50)),  # 2 of 5 steps
    }
    parts = [(event.number, event.whole.over) for event in events if isinstance(event, Part)]
    assert parts == [(1, 0), (2, 1), (3, 2), (4, 3)]


@pytest.mark.parametrize(
    ("where", "name", "weights", "logs"),
    [
        ("weights", "whole", False, True),
        ("weights", "killed-1", False, True),
        ("weights", "killed-2", False, True),
        ("best", "whole", False, True),
        ("best", "killed-1", False, True),
        ("best", "killed-2", False, True),
        ("logs", "whole", True, False),
        ("logs", "killed-1", True, False),
        ("logs", "killed-2", True, False),
    ],
)
def test_one_different_file_in_any_of_the_runs_is_found(tmp_path, monkeypatch, where, name, weights, logs):
    trainings = Trainings(monkeypatch, {"killed-1": 1, "killed-2": 9})
    getattr(trainings, where)[name] = ["other"] if where == "logs" else "other"
    result = resumed(tmp_path)
    assert (result["equal_weights"], result["equal_logs"]) == (weights, logs)
    assert result["uninterrupted_sha256"] == trainings.weights.get("whole", "resume.pt")
    assert result["killed_sha256"] == [trainings.weights.get(name, "resume.pt") for name in ("killed-1", "killed-2")]


def test_a_folder_that_is_not_empty_is_refused(tmp_path, monkeypatch):
    trainings = Trainings(monkeypatch, {"killed-1": 9})
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="is not empty"):
        resumed(tmp_path)
    assert trainings.started == []


@pytest.mark.parametrize("name", ["whole", "killed-1"])
def test_a_run_that_fails_on_its_own_ends_the_proof_with_its_error_message(tmp_path, monkeypatch, name):
    Trainings(monkeypatch, {"killed-1": 0}, {name: 5})
    with pytest.raises(ShortcutError, match="failed with exit code 5\nerrors of the training"):
        resumed(tmp_path)


def test_a_run_is_the_train_command_with_the_recipe_of_the_folder(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(proof.cleanup, "start", lambda command, **_: commands.append(command))
    proof._start(tmp_path, "killed-1", "cuda:1", 7)
    expected = ["train", "--recipe", f"{tmp_path}/recipe.toml", "--out", f"{tmp_path}/killed-1", "--device", "cuda:1"]
    expected.append("--no-report")
    assert commands == [[sys.executable, "-m", "shortcut_cli", *expected]]


def test_the_step_of_the_newest_state_and_the_log_without_its_times(tmp_path, monkeypatch):
    assert proof._saved_step(tmp_path) == 0
    steps = {"resume.pt": 8, "resume.prev.pt": 12}
    for name in (*steps, "run.pt"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(checkpoint, "load", lambda path: {"step": steps[path.name]})
    assert proof._saved_step(tmp_path) == 12
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 0.5, "seconds": 3}\n{"step": 2, "validation": 0.25}\n')
    assert proof._log(tmp_path) == [{"step": 1, "loss": 0.5}, {"step": 2, "validation": 0.25}]
