"""A preparation divided into tasks has the bytes of one that is not, however many there are and whatever kills them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
from conftest import quiet, shortcut, without_workers, write_pieces, write_texts
from kill import folder_sha256  # benchmarks/kill.py

from shortcut_cli import files
from shortcut_cli.config import reading
from shortcut_cli.data import hashes
from shortcut_cli.errors import Missing, Unfinished, UsageError
from shortcut_cli.stages import preparation
from shortcut_cli.tokenizers import tokenization
from shortcut_cli.tokenizers.midi import MidiTokenizer
from shortcut_cli.tokenizers.scanning import Scanner

CHARS = ("tokenizer.algorithm=chars", "tokenizer.alphabet=\n abcdefghijklmnopqrstuvwxyz0123456789")


def recipe(name, out, *settings):
    return reading.read(name, [f"data.shards={out}", *settings])


def run(name, paths, out, *settings, workers=1, merge=False, report=quiet):
    config = recipe(name, out, *settings)
    options = {"n_workers": workers, "max_bad": "100%", "merge": merge, "report": report}
    with without_workers() if workers == 1 else nullcontext():
        return preparation.prepare(config, [str(path) for path in paths], out, **options)


def part(name, paths, out, task, *settings, workers=1):
    config = recipe(name, out, *settings)
    paths = [str(path) for path in paths]
    with without_workers() if workers == 1 else nullcontext():
        return preparation.prepare_part(config, paths, out, task=task, n_workers=workers, report=quiet)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """midi/ with 12 pieces, a copy and a bad file; texts/ with 30 texts, a copy, records and bad records."""
    root = tmp_path_factory.mktemp("material")
    write_pieces(root / "midi")
    shutil.copy(sorted((root / "midi").glob("*.mid"))[0], root / "midi" / "copy.mid")
    (root / "midi" / "bad.mid").write_text("no music")
    write_texts(root / "texts")
    shutil.copy(root / "texts" / "003.txt", root / "texts" / "copy.txt")
    records = [json.dumps({"text": f"record {number % 4}"}) for number in range(6)]
    (root / "texts" / "records.jsonl").write_text("\n".join([*records, "{no record", '{"other": 1}']) + "\n")
    shutil.copy(root / "texts" / "records.jsonl", root / "texts" / "the same as text.txt")
    return root


KILLED = """
import os, signal, sys
from shortcut_cli.stages import preparation
from shortcut_cli.tokenizers import tokenization
from shortcut_cli.tokenizers.scanning import Scanner
from shortcut_cli.__main__ import main

leave, left, after = Scanner.leave, [], int(sys.argv[1])

def dies(self, source, result):
    if len(left) == after:
        os.kill(os.getpid(), signal.SIGKILL)
    leave(self, source, result)
    left.append(source)

Scanner.leave = dies
tokenization.workers.in_order = lambda work, jobs, fixed, **_: ((job, work(*fixed, job)) for job in jobs)
sys.argv[1:] = sys.argv[2:]
main()
"""


def killed(domain, paths, out, task, *settings, after):
    """A task that is killed by SIGKILL once it has left `after` results."""
    flags = [word for setting in settings for word in ("--set", setting)]
    given = [domain, *map(str, paths), "--out", str(out), "--task", task, *flags]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(after), "prepare", *given], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


CORPORA = [
    ("music-tiny", "midi", "midi", ("tokenizer.transpose=[1, -40]",)),
    ("music-tiny", "midi", "midi", ("tokenizer.bpe=1100",)),
    ("text-tiny", "text", "texts", ("tokenizer.vocabulary=300",)),
    ("text-tiny", "text", "texts", (*CHARS, "data.split=contiguous", "data.duplicates=keep")),
]


@pytest.mark.parametrize(("name", "domain", "kind", "settings"), CORPORA, ids=str)
def test_tasks_that_are_killed_and_run_again_give_the_bytes_of_one_process(
    material, tmp_path, name, domain, kind, settings
):
    paths = [material / kind]
    run(name, paths, tmp_path / "one", *settings)
    run(name, paths, tmp_path / "two", *settings, workers=2)
    whole = folder_sha256(tmp_path / "one")
    assert folder_sha256(tmp_path / "two") == whole
    for number, after in ((2, 0), (3, 1)):
        given = ["--recipe", name, material / kind]
        killed(domain, given, tmp_path / "tasks", f"{number}/4", *settings, after=after)
    for number in (4, 3, 1):
        part(name, paths, tmp_path / "tasks", (number, 4), *settings, workers=1 + number % 2)
    with pytest.raises(Missing, match="no task has scanned"):
        run(name, paths, tmp_path / "tasks", *settings, merge=True)
    shutil.copytree(tmp_path / "tasks", tmp_path / "mixed", symlinks=True)
    part(name, paths, tmp_path / "tasks", (2, 4), *settings)
    manifest = run(name, paths, tmp_path / "tasks", *settings, merge=True)
    assert manifest["worked"]
    assert folder_sha256(tmp_path / "tasks") == whole
    # The other copy lacks a task: another number of tasks, then a plain preparation, do what is missing.
    part(name, paths, tmp_path / "mixed", (1, 2), *settings)
    run(name, paths, tmp_path / "mixed", *settings, workers=2)
    assert folder_sha256(tmp_path / "mixed") == whole
    assert not (tmp_path / "mixed" / ".staging").exists()


def test_each_file_falls_to_one_task_by_its_name():
    names = [f"folder {number % 7}/{number}.wav" for number in range(10_000)] + ["\udcff\ud800.wav"]
    for tasks in (1, 2, 3, 64):
        found = [preparation._task_of(name, tasks) for name in names]
        counts = [found.count(task) for task in range(1, tasks + 1)]
        assert sum(counts) == len(names)
        mean = len(names) / tasks
        assert all(abs(count - mean) < 5 * mean**0.5 for count in counts)  # binomial, to five standard deviations
    assert preparation._task_of("a/b.mid", 8) == 0x863CF8FBBE3EB931 % 8 + 1  # of sha256sum


@pytest.mark.usefixtures("in_this_process")
def test_what_is_missing_is_named_and_nothing_is_written(material, tmp_path):
    for number in (1, 3):
        part("text-tiny", [material / "texts"], tmp_path / "s", (number, 3), *CHARS)
    before = sorted(path.name for path in (tmp_path / "s").iterdir())
    names = sorted(path.name for path in (material / "texts").iterdir())
    what = {name: (name.endswith("l"), (material / "texts" / name).read_bytes()) for name in names}
    left = [what[name] for name in names if preparation._task_of(name, 3) != 2]
    missing = [
        name for name in names if what[name] not in left
    ]  # a copy's result serves, if it is read in the same way
    with pytest.raises(Missing) as refused:
        run("text-tiny", [material / "texts"], tmp_path / "s", *CHARS, merge=True)
    first, *listed = refused.value.message.splitlines()
    assert first == f"no task has scanned {len(missing)} of 31 files"  # of 33, two are copies
    assert listed == [f"  {name}" for name in missing[:3]]
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == before == [".shortcut", ".staging"]


@pytest.mark.usefixtures("in_this_process")
def test_nothing_that_a_task_has_read_is_read_again(material, tmp_path, monkeypatch):
    read, reads = [], MidiTokenizer._read
    shutil.copytree(material / "midi", tmp_path / "midi")
    monkeypatch.setattr(hashes, "RACY_S", -1)
    for number in (1, 2):
        part("music-tiny", [tmp_path / "midi"], tmp_path / "s", (number, 2))
    monkeypatch.setattr(
        MidiTokenizer, "_read", lambda self, path, *rest: read.append(path.name) or reads(self, path, *rest)
    )
    hashed, sha256 = [], files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    os.utime(tmp_path / "midi" / "bad.mid")  # it looks changed
    run("music-tiny", [tmp_path / "midi"], tmp_path / "s", merge=True)
    assert not read
    assert [name for name in hashed if name.endswith(".mid")] == ["bad.mid"]


@pytest.mark.usefixtures("in_this_process")
def test_a_file_that_changed_after_its_task_is_another_file(material, tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "RACY_S", -1)
    write_texts(tmp_path / "texts", 6)
    part("text-tiny", [tmp_path / "texts"], tmp_path / "s", (1, 1), *CHARS)
    old = (tmp_path / "texts" / "002.txt").read_text()
    (tmp_path / "texts" / "002.txt").write_text(old[::-1])
    with pytest.raises(Missing, match=r"1 of 6 files\n  002\.txt"):
        run("text-tiny", [tmp_path / "texts"], tmp_path / "s", *CHARS, merge=True)
    run("text-tiny", [tmp_path / "texts"], tmp_path / "s", *CHARS)
    run("text-tiny", [tmp_path / "texts"], tmp_path / "new", *CHARS)
    assert folder_sha256(tmp_path / "s") == folder_sha256(tmp_path / "new")


def test_a_hash_of_a_file_that_has_just_changed_is_not_listed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    known = hashes.Hashes(tmp_path / "lists", keep=True)
    known.sha256("a.txt", path)
    known.save("1-of-1")
    assert (tmp_path / "lists" / "1-of-1.txt").read_text() == ""


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("damage", ["cut", "changed", "other settings", "no list"])
def test_a_damaged_result_is_made_again(material, tmp_path, damage):
    part("text-tiny", [material / "texts"], tmp_path / "s", (1, 1), *CHARS)
    results = sorted((tmp_path / "s" / ".staging").rglob("*.jsonl.ids.scan"))
    assert len(results) == 1
    if damage == "cut":
        results[0].write_bytes(results[0].read_bytes()[:40])
    elif damage == "changed":
        results[0].write_text(results[0].read_text().replace("listed", "lifted"))
    elif damage == "no list":
        results[0].with_name(results[0].name.replace(".scan", ".rejects.jsonl")).unlink()
    other = ("data.val=0.3",) if damage == "other settings" else ()
    with pytest.raises(Missing):
        run("text-tiny", [material / "texts"], tmp_path / "s", *CHARS, *other, merge=True)
    run("text-tiny", [material / "texts"], tmp_path / "s", *CHARS, *other)
    run("text-tiny", [material / "texts"], tmp_path / "new", *CHARS, *other)
    assert folder_sha256(tmp_path / "s") == folder_sha256(tmp_path / "new")


@pytest.mark.usefixtures("in_this_process")
def test_tasks_share_the_folder_and_a_preparation_has_it_alone(material, tmp_path, monkeypatch):
    entered, go_on, scan = threading.Barrier(3), threading.Event(), Scanner.__call__
    waited = set()

    def waits(self, group):
        if threading.get_ident() not in waited:
            waited.add(threading.get_ident())
            entered.wait(60)
            go_on.wait(60)
        return scan(self, group)

    monkeypatch.setattr(Scanner, "__call__", waits)
    tasks = [
        threading.Thread(target=part, args=("text-tiny", [material / "texts"], tmp_path / "s", (n, 2), *CHARS))
        for n in (1, 2)
    ]
    for task in tasks:
        task.start()
    entered.wait(60)
    try:
        with pytest.raises(UsageError, match="is in use: shortcut prepare, a task"):
            run("text-tiny", [material / "texts"], tmp_path / "s", *CHARS)
    finally:
        go_on.set()
    for task in tasks:
        task.join(60)
    monkeypatch.setattr(Scanner, "__call__", scan)
    with files.held(tmp_path / "s", "shortcut prepare"), pytest.raises(UsageError, match="is in use"):
        part("text-tiny", [material / "texts"], tmp_path / "s", (1, 2), *CHARS)
    run("text-tiny", [material / "texts"], tmp_path / "s", *CHARS, merge=True)
    assert part("text-tiny", [material / "texts"], tmp_path / "s", (1, 2), *CHARS)["worked"] is False
    with pytest.raises(UsageError, match="was prepared from something else"):
        part("text-tiny", [material / "texts"], tmp_path / "s", (1, 2), *CHARS, "data.val=0.3")


@pytest.mark.usefixtures("in_this_process")
def test_a_reason_that_may_pass_is_not_kept(material, tmp_path, monkeypatch):
    found = Scanner._found

    def fails(self, source):
        if source.relative == "004.txt":
            raise tokenization.Rejected("took too long", passing=True)
        return found(self, source)

    with monkeypatch.context() as patch:
        patch.setattr(Scanner, "_found", fails)
        with pytest.raises(Unfinished, match=r"004\.txt: took too long"):
            part("text-tiny", [material / "texts"], tmp_path / "s", (1, 1), *CHARS)
    with pytest.raises(Missing, match=r"1 of 31 files\n  004\.txt"):
        run("text-tiny", [material / "texts"], tmp_path / "s", *CHARS, merge=True)
    part("text-tiny", [material / "texts"], tmp_path / "s", (1, 1), *CHARS)
    assert run("text-tiny", [material / "texts"], tmp_path / "s", *CHARS, merge=True)["worked"]


def test_the_command_line_of_tasks(material, tmp_path):
    flags = (
        "--recipe",
        "text-tiny",
        "--out",
        "s",
        "--workers",
        "1",
        *(word for one in CHARS for word in ("--set", one)),
    )
    for wrong in ("0/4", "5/4", "1", "a/b", "1/0", "-1/4", "1/999999999", "\u0661/4"):
        failed = shortcut("prepare", "text", material / "texts", *flags, "--task", wrong, cwd=tmp_path, check=2)
        assert "is not I/N" in failed.stderr
    both = shortcut("prepare", "text", material / "texts", *flags, "--task", "1/1", "--merge", cwd=tmp_path, check=2)
    assert "exclude each other" in both.stderr
    for number in (1, 2):
        refused = shortcut("prepare", "text", material / "texts", *flags, "--merge", cwd=tmp_path, check=3)
        assert "no task has scanned" in refused.stderr
        shown = shortcut("prepare", "text", material / "texts", *flags, "--task", f"{number}/2", cwd=tmp_path)
        assert f"task {number}/2: " in shown.stdout
    done = shortcut("prepare", "text", material / "texts", *flags, "--merge", "--json", "--max-bad", "9", cwd=tmp_path)
    assert json.loads(done.stdout)["inputs"] == 33


def test_a_task_needs_a_folder_that_all_machines_see(tmp_path):
    write_texts(tmp_path / "in", 3)
    refused = shortcut("prepare", "text", "in", "--out", "s3://bucket/s", "--task", "1/2", cwd=tmp_path, check=2)
    assert "--task needs a folder that all machines see" in refused.stderr
