"""Full disks, folders in use, vanishing inputs: a clear message, the right exit code, and no damage to old files."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile
from conftest import TEXT_SETTINGS, quiet, set_flags, shortcut, write_texts

from shortcut_cli import cleanup, files
from shortcut_cli.config import reading
from shortcut_cli.data import sound
from shortcut_cli.data.documents import Source
from shortcut_cli.data.shards import Shards
from shortcut_cli.errors import Rejected, Unfinished, UsageError
from shortcut_cli.stages import codec_evaluation, preparation
from shortcut_cli.tokenizers.audio import AudioOptions, AudioTokenizer
from shortcut_cli.tokenizers.midi import MidiOptions, MidiTokenizer
from shortcut_cli.tokenizers.text import TextOptions, TextTokenizer

CHARS = ("--recipe", "text-tiny", *set_flags(*TEXT_SETTINGS))


def limited(blocks, *arguments, cwd):
    """Run the command with files limited to `blocks` KiB, as on a full disk."""
    command = 'ulimit -f "$0"; exec "$@"'
    return subprocess.run(
        ["bash", "-c", command, str(blocks), sys.executable, "-m", "shortcut_cli", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_full_disk_during_preparation(tmp_path):
    write_texts(tmp_path / "texts")
    full = limited(4, "prepare", "text", "texts", *CHARS, "--out", "s", cwd=tmp_path)
    assert full.returncode == 1, full.stderr
    assert "File too large" in full.stderr
    assert "Traceback" not in full.stderr
    shortcut("inspect", "s", cwd=tmp_path, check=2)
    shortcut("prepare", "text", "texts", *CHARS, "--out", "s", cwd=tmp_path)
    shortcut("inspect", "s", "--verify", cwd=tmp_path)


def test_a_full_disk_during_training(text_run, tmp_path):
    arguments = ("train", *CHARS, "--set", f"data.shards={text_run / 'shards'}", "--out", "run")
    full = limited(200, *arguments, cwd=tmp_path)
    assert full.returncode == 1, full.stderr
    assert "Traceback" not in full.stderr
    assert not (tmp_path / "run" / "run.pt").exists()
    shortcut(*arguments, cwd=tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pt")}
    more = limited(200, "eval", "--ckpt", "run/run.pt", cwd=tmp_path)
    assert more.returncode == 0, more.stderr
    longer = limited(200, *arguments, "--out", "other", cwd=tmp_path)
    assert longer.returncode == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pt")} == before
    assert not list((tmp_path / "other").glob("*.pt"))


@pytest.mark.parametrize("blocks", [0, 1, 8])
@pytest.mark.parametrize("command", ["sample", "codec eval"])
def test_a_full_disk_under_libsndfile_is_an_error_with_the_name_of_the_file(tmp_path, capfd, blocks, command):
    tokenizer = AudioTokenizer(AudioOptions(name="audio", weights="untrained:1", codebooks=2))
    ids, path = np.tile([0, 1024], 200), tmp_path / "a-2.wav"
    tokenizer.decode(ids, tmp_path / "whole.wav")  # loads what it needs
    silence = np.zeros(60_000, np.float32)
    write = {
        "sample": lambda: tokenizer.decode(ids, path),
        "codec eval": lambda: codec_evaluation._keep(tmp_path, "a.wav", "2", silence),
    }[command]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * blocks, hard))
    try:
        with pytest.raises(OSError, match="File too large") as failed:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failed.value.filename == str(path)
    assert [left.name for left in tmp_path.iterdir()] == ["whole.wav"]
    assert capfd.readouterr() == ("", "")


def test_without_a_folder_for_temporary_files_the_message_names_tmpdir(text_run):
    full = limited(0, "eval", "--ckpt", text_run / "gpt" / "run.pt", "--files", text_run / "texts", cwd=text_run)
    assert full.returncode == 1, full.stderr
    assert "Traceback" not in full.stderr
    assert "TMPDIR" in full.stderr


def test_the_second_process_is_told_who_holds_the_folder(text_run, tmp_path):
    with files.held(tmp_path / "run", "shortcut train"):
        arguments = ("train", *CHARS, "--set", f"data.shards={text_run / 'shards'}", "--out", "run")
        refused = shortcut(*arguments, cwd=tmp_path, check=2)
    assert f"shortcut train, process {os.getpid()}" in refused.stderr
    shortcut(*arguments, cwd=tmp_path)


def test_an_input_that_vanishes_between_hashing_and_reading(tmp_path, monkeypatch):
    write_texts(tmp_path / "texts", 5)
    config = reading.read("text-tiny", [*TEXT_SETTINGS, f"data.shards={tmp_path / 's'}"])
    hashed = preparation._hash

    def then_removes(*arguments):
        found = hashed(*arguments)
        (tmp_path / "texts" / "003.txt").unlink()
        return found

    monkeypatch.setattr(preparation, "_hash", then_removes)
    options = {"n_workers": 1, "max_bad": "1", "report": quiet}
    with pytest.raises(Unfinished, match=re.escape("003.txt: can't be read: No such file or directory")):
        preparation.prepare(config, [str(tmp_path / "texts")], tmp_path / "s", **options)
    made = Shards(tmp_path / "s").manifest
    assert (made["inputs"], made["rejected"]) == (5, 1)
    assert "003.txt" in (tmp_path / "s" / "rejects.jsonl").read_text()


@pytest.fixture
def impatient():
    """Whatever waits for longer than 10 s fails, as the opening of a pipe does that nobody writes to."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".mid", ".wav"])
def test_an_input_that_becomes_a_pipe_is_not_waited_for(tmp_path, impatient, suffix, packed):
    kinds = {
        ".mid": lambda: MidiTokenizer(MidiOptions(name="midi")),
        ".wav": lambda: AudioTokenizer(AudioOptions(name="audio", weights="untrained:1", codebooks=2)),
    }
    tokenizer = kinds.get(suffix, lambda: TextTokenizer(TextOptions(name="text", algorithm="chars")))()
    path = tmp_path / f"a{suffix}{packed}"
    os.mkfifo(path)
    with pytest.raises(Rejected, match="can't be read: Not a regular file") as raised:
        list(tokenizer.scan(Source(path, path.name, "0" * 64, tmp_path / "a.ids")))
    assert raised.value.passing  # it was a regular file when it was hashed
    with pytest.raises(Rejected, match="can't be read: Not a regular file"):
        tokenizer.prompt(path)
    with pytest.raises(OSError, match="Not a regular file"):
        files.sha256(path)


def test_a_sound_that_becomes_a_pipe_before_libsndfile_opens_it_is_not_waited_for(tmp_path, impatient, monkeypatch):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.zeros(24_000), 24_000)
    made = soundfile.SoundFile

    def after_a_pipe(*arguments, **options):
        path.unlink()
        os.mkfifo(path)
        return made(*arguments, **options)

    monkeypatch.setattr(soundfile, "SoundFile", after_a_pipe)
    assert sum(map(len, sound.SoundReader(path))) == 24_000


@pytest.mark.parametrize("after", ["pipe", "folder", "forbidden", "circle"])
def test_an_input_that_becomes_something_else_after_it_was_hashed_is_tried_again(tmp_path, monkeypatch, after):
    if after == "forbidden" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    write_texts(tmp_path / "texts", 5)
    config = reading.read("text-tiny", [*TEXT_SETTINGS, f"data.shards={tmp_path / 's'}"])
    path, hashed = tmp_path / "texts" / "003.txt", preparation._hash
    text = path.read_text()

    def then_changes(*arguments):
        found = hashed(*arguments)
        if after == "forbidden":
            path.chmod(0)
            return found
        path.unlink()
        {"pipe": os.mkfifo, "folder": os.mkdir, "circle": lambda path: path.symlink_to(path)}[after](path)
        return found

    options = {"n_workers": 1, "max_bad": "1", "report": quiet}
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "_hash", then_changes)
        with pytest.raises(Unfinished, match=re.escape("003.txt: can't be read: ")):
            preparation.prepare(config, [str(tmp_path / "texts")], tmp_path / "s", **options)
    assert Shards(tmp_path / "s").manifest["rejected"] == 1
    again = preparation.prepare(config, [str(tmp_path / "texts")], tmp_path / "s", **options)
    assert (again["worked"], again["rejected"], again["unfinished"]) == (True, 1, 0)
    if after == "folder":
        path.rmdir()
    else:
        path.unlink()
    path.write_text(text)
    shutil.rmtree(tmp_path / "s")
    assert preparation.prepare(config, [str(tmp_path / "texts")], tmp_path / "s", **options)["rejected"] == 0


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may read and write everywhere")
def test_a_folder_that_can_not_be_written_and_a_file_that_can_not_be_read(tmp_path):
    # Root drops the capabilities that let it ignore permissions.
    as_others = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    write_texts(tmp_path / "texts", 5)
    (tmp_path / "texts" / "003.txt").chmod(0)
    (tmp_path / "locked").mkdir(mode=0o500)

    def prepare(out, code):
        command = [*as_others, sys.executable, "-m", "shortcut_cli", "prepare", "text", "texts", *CHARS, "--out", out]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "Permission denied" in prepare("locked/s", 1)
    assert not any((tmp_path / "locked").iterdir())
    assert "1 of 5 files were rejected" in " ".join(prepare("s", 3).replace("│", " ").split())
    assert "Permission denied" in (tmp_path / "s" / "rejects.jsonl").read_text()
    assert len((tmp_path / "s" / "documents.jsonl").read_text().splitlines()) == 4


def test_a_clock_that_jumps(text_run, tmp_path):
    # Whether a file is up to date depends on its content, never on its time stamp.
    shutil.copytree(text_run, tmp_path / "copy")
    for number, path in enumerate(sorted((tmp_path / "copy").rglob("*"))):
        os.utime(path, (4_000_000_000, 4_000_000_000) if number % 2 else (0, 0))
    shards, run = tmp_path / "copy" / "shards", tmp_path / "copy" / "gpt"
    again = shortcut("prepare", "text", tmp_path / "copy" / "texts", *CHARS, "--out", shards, cwd=tmp_path)
    assert "already prepared; nothing to do" in again.stdout
    shortcut("inspect", shards, "--verify", cwd=tmp_path)
    before = (run / "resume.pt").read_bytes()
    shortcut("train", *CHARS, "--model", "gpt", "--set", f"data.shards={shards}", "--out", run, cwd=tmp_path)
    assert (run / "resume.pt").read_bytes() == before


def test_a_lock_ends_with_its_block(tmp_path):
    with (
        files.held(tmp_path, "shortcut a"),
        pytest.raises(UsageError, match="in use: shortcut a, process"),
        files.held(tmp_path, "shortcut b"),
    ):
        pass
    with files.held(tmp_path, "shortcut b"):
        pass


@pytest.mark.parametrize("name", ["", "result"])
def test_a_signal_leaves_the_marker_of_no_process(tmp_path, name):
    folder = tmp_path / "new" / "s"
    child = os.fork()
    if not child:
        with files.held(folder, "shortcut a"):
            if name:
                (folder / name).touch()
            cleanup.leave()
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    if name:
        assert (folder / ".shortcut").read_text() == "shortcut a\n"
    else:
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"\xff\xfe\x00broken", b"x" * 10_000, b"\x1b[2J" + bytes(50)])
def test_a_damaged_lock_holds_nothing_up(tmp_path, content):
    with files.held(tmp_path, "shortcut a"):
        (tmp_path / ".shortcut").write_bytes(b"shortcut a, process 1" + content)
        with (
            pytest.raises(UsageError, match="is in use") as refused,
            files.held(tmp_path, "shortcut b"),
        ):
            pass
        assert len(refused.value.message) < len(str(tmp_path)) + files.HOLDER_CHARACTERS + 20


def test_a_lock_on_the_cache_names_no_flag(tmp_path, monkeypatch):
    from shortcut_cli.codec import weights

    monkeypatch.setenv(files.CACHE_VARIABLE, str(tmp_path / "cache"))
    with files.held(tmp_path / "cache", "shortcut another"), pytest.raises(UsageError) as refused:
        weights.fetch("encodec_24khz")
    assert "--out" not in refused.value.hint
    assert str(tmp_path / "cache") in refused.value.hint


def test_an_error_while_writing_names_the_file_and_not_the_temporary_one(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "a.txt", tmp_path / "folder", tmp_path / "file" / "b", tmp_path / ("n" * 300)):
        with pytest.raises(OSError, match=r"\[Errno") as failed:
            files.write(path, "text")
        assert failed.value.filename == str(path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_name_as_long_as_the_system_allows_can_be_written(tmp_path):
    for name in ("n" * 255, "\u3042" * 85):
        files.write(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
    assert len(list(tmp_path.iterdir())) == 2
