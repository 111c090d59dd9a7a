"""What a terminal would obey never reaches it: escape sequences in names, recipes, checkpoints and manifests."""

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import unicodedata
from contextlib import suppress

import pytest
import torch
from conftest import TEXT_SETTINGS, set_flags, shortcut, write_texts
from test_cli import PLACES
from test_reading_shards import rewrite

from shortcut_cli.cli import console
from shortcut_cli.config import reading
from shortcut_cli.errors import UsageError
from shortcut_cli.events import Note, Progress, Validation
from shortcut_cli.formatting import shown, to_json
from shortcut_cli.training import tensor_file

EVIL = "\x1b]0;x\x07a\x1b[31mred\r\x9b2J\u202egnp\x7f"
SHOWN = r"\x1b]0;x\x07a\x1b[31mred\x0d\x9b2J\u202egnp\x7f"


def obeyed(text):
    """The characters of a text that a terminal obeys, by their Unicode category, but tab, newline and those of words.

    Cc: control; Cf with a direction: bidirectional controls; Zl, Zp: ends of lines.
    """
    directions = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    kinds = {c: (unicodedata.category(c), unicodedata.bidirectional(c)) for c in set(text) - {"\n", "\t"}}
    marks = {"\u200e", "\u200f", "\u061c"}
    return {c for c, (kind, way) in kinds.items() if kind in ("Cc", "Zl", "Zp") or way in directions or c in marks}


def test_every_character_that_a_terminal_obeys_is_shown_as_an_escape():
    every = "".join(map(chr, range(0x30000)))
    assert len(obeyed(every)) > 75
    assert not obeyed(shown(every))
    harmless = "tab\tline\nnaïve \u200d\ufeff 音楽 [red]x[/red] :cat: \\x1b"
    assert shown(harmless) == harmless
    assert shown(EVIL) == SHOWN


def test_json_holds_the_name_and_no_character_that_a_terminal_obeys():
    text = to_json({EVIL: [EVIL]}, indent=1)
    assert not obeyed(text)
    assert json.loads(text) == {EVIL: [EVIL]}


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_that_is_printed_holds_what_a_terminal_obeys(monkeypatch, capsys, terminal):
    """Also on a terminal, where Rich writes sequences of its own: those are taken away before looking."""
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr(console, "PLAIN_INTERVAL_S", 0)
    monkeypatch.setenv("COLUMNS", "400")  # so that a bar has room for the name of its task
    console._out.cache_clear()
    console._err.cache_clear()
    try:
        console.text(EVIL)
        console.text(EVIL, error=True)
        console.panel(UsageError(EVIL, EVIL))
        console.result({}, EVIL, console.table(EVIL, (EVIL, EVIL), [(EVIL, [EVIL])]), as_json=False)
        console.result({EVIL: EVIL}, as_json=True)
        console._warning(EVIL, UserWarning, EVIL, 1)
        console._traceback(ValueError, ValueError(EVIL), None)
        with console.Reporter() as report:
            report(Note(EVIL))
            report(Validation(step=1, loss=1.0, best=1.0, text=EVIL))
            report(Progress(task=EVIL, done=1, total=2, unit=EVIL))
    finally:
        console._out.cache_clear()
        console._err.cache_clear()
    own = r"\x1b\[[0-9;?]*[mhlAK]|\r" if terminal else "(?!)"
    out, err = (re.sub(own, "", text) for text in capsys.readouterr())
    assert not obeyed(out), repr(out)
    assert not obeyed(err), repr(err)
    assert out.count(SHOWN) == 7
    assert err.count(SHOWN) >= 9


FLAGS = [arguments for arguments, _ in PLACES]


@pytest.mark.parametrize("arguments", FLAGS, ids=[" ".join(arguments) for arguments in FLAGS])
def test_no_wrong_path_of_any_flag_reaches_the_terminal_as_it_is(text_run, tmp_path, arguments):
    write_texts(tmp_path / "texts", 2)
    (tmp_path / "sound.wav").write_text(EVIL)
    (tmp_path / "file").write_text(EVIL)
    given = [part.replace("RUN", str(text_run)).replace("@", "file/" + EVIL) for part in arguments]
    done = shortcut(*given, cwd=tmp_path, check=None)
    assert done.returncode in (1, 2, 3, 4)
    assert not obeyed(done.stdout + done.stderr)
    assert "Traceback" not in done.stderr


def spoken(*arguments, cwd, check=0):
    """Run a command; returns what it printed, in which nothing may be that a terminal obeys."""
    done = shortcut(*arguments, cwd=cwd, check=check)
    assert not obeyed(done.stdout + done.stderr), repr(done.stdout + done.stderr)
    assert "Traceback" not in done.stderr
    return done


def test_names_of_files_and_folders_do_not_reach_the_terminal(tmp_path):
    """A whole pipeline in folders, with files and a recipe, of such names; the files themselves have them."""
    texts, shards, run = tmp_path / EVIL, tmp_path / f"s{EVIL}", tmp_path / f"r{EVIL}"
    write_texts(texts, 30)
    for path in list(texts.iterdir()):
        path.rename(texts / f"{path.stem}{EVIL}.txt")
    (texts / f"bad{EVIL}.txt").write_bytes(b"\xff\xfe\xff")
    recipe = tmp_path / f"{EVIL}.toml"
    spoken("recipes", "copy", "text-tiny", recipe, cwd=tmp_path)
    settings = set_flags(*TEXT_SETTINGS[:2], f"data.shards={shards}", "train.steps=2", "train.warmup=1", "sample.n=1")
    flags = ("--recipe", recipe, *settings)
    spoken("prepare", "text", texts, *flags, "--max-bad", 9, cwd=tmp_path)
    spoken("run", *flags, texts, "--out", run, "--max-bad", 9, cwd=tmp_path)
    for done in ("train", *flags, "--out", run), ("eval", "--ckpt", run), ("inspect", run), ("inspect", shards):
        spoken(*done, cwd=tmp_path)
    found = json.loads(spoken("inspect", shards, "--json", cwd=tmp_path).stdout)
    assert found["path"] == str(shards)
    (sample,) = (run / "samples").glob("*.json")
    spoken("sample", "--like", sample, cwd=tmp_path)
    spoken(
        "sample",
        "--ckpt",
        run,
        "-n",
        1,
        "--tokens",
        9,
        "--out",
        "s",
        "--prompt",
        f"{texts}/000{EVIL}.txt",
        cwd=tmp_path,
    )
    spoken("eval", "--ckpt", run, "--files", texts, "--max-bad", 9, cwd=tmp_path)
    spoken("attention", "--ckpt", run, "--windows", 1, cwd=tmp_path)
    spoken("prove", "tokens", shards, texts, "--sources", 2, cwd=tmp_path)
    spoken("recipes", "check", recipe, cwd=tmp_path)
    spoken("recipes", "show", recipe, cwd=tmp_path)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--set", each) for each in (EVIL, f"{EVIL}=1", f"train.steps={EVIL}", f"model.name={EVIL}", "data.shards=")),
        *(("--model", EVIL), ("--device", EVIL), (f"--{EVIL}", "1"), ("--seed", EVIL), ("--resume", EVIL)),
    ],
)
def test_values_of_flags_do_not_reach_the_terminal(tmp_path, flag, value):
    spoken("train", "--recipe", "text-tiny", flag, value, cwd=tmp_path, check=2 if flag != "--device" else None)


def test_strings_of_recipes_checkpoints_and_manifests_do_not_reach_the_terminal(text_run, tmp_path):
    recipe = tmp_path / "recipe.toml"
    evil = EVIL.replace("\x1b", "").replace("\x07", "").replace("\r", "").replace("\x7f", "")  # as TOML allows
    text = shortcut("recipes", "show", "text-tiny", cwd=tmp_path).stdout
    recipe.write_text(f"# {evil}\n" + re.sub(r'shards = ".*"', lambda _: f"shards = {json.dumps(EVIL)}", text))
    for command in ("inspect",), ("recipes", "check"), ("recipes", "show"), ("train", "--recipe"):
        spoken(*command, recipe, cwd=tmp_path, check=None)
    shards = shutil.copytree(text_run / "shards", tmp_path / "shards")

    def rename(manifest):
        manifest["tokenizer"] |= {"unit": EVIL, "name": EVIL, EVIL: EVIL}
        manifest["account"] = {EVIL: 1.0}

    rewrite(shards, rename)
    spoken("inspect", shards, cwd=tmp_path, check=None)
    spoken("eval", "--ckpt", text_run / "gpt", "--shards", shards, cwd=tmp_path, check=None)
    spoken("prove", "tokens", shards, cwd=tmp_path, check=None)
    content = torch.load(text_run / "gpt" / "run.pt", weights_only=True)
    content["versions"] = {EVIL: EVIL}
    content["scores"] = {EVIL: EVIL}
    tensor_file.save(tmp_path / "run.pt", content)
    spoken("inspect", tmp_path / "run.pt", cwd=tmp_path, check=None)
    content["recipe"]["model"]["name"] = EVIL
    tensor_file.save(tmp_path / "run.pt", content)
    spoken("inspect", tmp_path / "run.pt", cwd=tmp_path, check=4)
    content["tokenizer"]["files"][EVIL] = content["tokenizer"]["files"].popitem()[1]
    tensor_file.save(tmp_path / "run.pt", content)
    spoken("sample", "--ckpt", tmp_path / "run.pt", cwd=tmp_path, check=4)


def test_a_real_terminal_gets_no_sequence_of_a_name(tmp_path):
    """Names of files and of a folder, through a pseudo-terminal: Rich draws there, with sequences of its own."""
    texts = tmp_path / EVIL
    write_texts(texts, 3)
    prepare = ["prepare", "text", texts, "--recipe", "text-tiny", *set_flags(*TEXT_SETTINGS[:2]), "--out", EVIL + "o"]
    received, wide = bytearray(), os.environ | {"COLUMNS": "400"}  # so that no name is broken into lines
    for arguments in prepare, ["inspect", EVIL + "o"], ["inspect", texts]:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "shortcut_cli", *arguments]
        with subprocess.Popen(command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, env=wide):
            os.close(theirs)
            with suppress(OSError):  # EIO: the command has ended
                while part := os.read(ours, 65536):
                    received += part
        os.close(ours)
    assert bytes(received).count(b"\\x1b]0;") > 2
    assert b"\x1b[" in received
    assert b"\x1b]" not in received
    assert b"\x07" not in received
    assert b"\xc2\x9b" not in received


@pytest.mark.parametrize(
    "arguments", [["recipes", "list"], ["prepare", "text", "nowhere"], ["sample", "--like", "nowhere"], ["run", "-h"]]
)
def test_a_command_says_on_a_terminal_that_it_loads_before_its_first_large_library(tmp_path, arguments):
    """pydantic is the first: Typer needs it to read the options."""
    first, last = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "shortcut_cli", *arguments], stdout=last, stderr=last, stdin=last, cwd=tmp_path
    )
    os.close(last)
    said = os.read(first, 100)
    assert said.startswith(b"\r\x1b[Kloading pydantic ...")
    with suppress(OSError):
        while os.read(first, 4096):
            pass
    os.close(first)
    done.wait()


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_in_a_pipe_a_table_is_as_wide_as_the_terminal_that_shows_it(tmp_path, columns):
    """Of `shortcut inspect FILE | head` stderr is the terminal: a row that is wider would be broken there."""
    (tmp_path / "r.toml").write_text(reading.text("text"))
    command = [sys.executable, "-m", "shortcut_cli", "inspect", "r.toml"]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    options = {"cwd": tmp_path, "env": environment, "stdin": subprocess.DEVNULL}
    inner, outer = pty.openpty()
    try:
        fcntl.ioctl(outer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        piped = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=outer, **options).stdout.decode()
        with open(tmp_path / "out", "w") as file:
            subprocess.run(command, check=True, stdout=file, stderr=outer, **options)
    finally:
        os.close(inner)
        os.close(outer)
    there = shortcut("inspect", "r.toml", cwd=tmp_path, COLUMNS=str(columns)).stdout
    assert piped == there
    assert max(map(len, piped.splitlines())) <= columns
    file = shortcut("inspect", "r.toml", cwd=tmp_path, COLUMNS="120").stdout
    assert (tmp_path / "out").read_text() == file  # which no terminal shows
