"""Completion with Tab: what each key offers, and what bash, zsh and fish put into the line."""

import errno
import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from conftest import shortcut

from shortcut_cli import registry
from shortcut_cli.cli import completion, console
from shortcut_cli.codec import weights
from shortcut_cli.config import reading, schema

TYPED = {  # what is typed, with Tab; what the command then gets
    "--set train.ste\t9": "--set|train.steps=9",
    "--set model.init=g\tx": "--set|model.init=gpt2|x",
    "--set train.tensorboard=t\tx": "--set|train.tensorboard=true|x",
    "--model densef\tx": "--model|denseformer|x",
    "--recipe music-t\tx": "--recipe|music-tiny|x",
}
PROMPT = "ready>"
LONGEST_S = 60


class Line:
    """What stands on a command line, as far as the completion of settings asks."""

    def __init__(self, **params):
        self.params = params


@pytest.mark.parametrize("name", reading.names())
def test_every_key_of_a_recipe_is_offered_and_no_other(name):
    found = completion.settings(Line(recipe=name), "")
    kind = schema.CodecRecipe if name == "codec-mini" else schema.schema()
    known = schema.known_keys(kind, completion._read(name))
    assert sorted(found) == sorted(f"{key}=" for key in known)


def test_a_recipe_that_leaves_keys_out_and_one_that_can_not_be_read_offer_them_too(tmp_path):
    (tmp_path / "mine.toml").write_text('[tokenizer]\nname = "midi"\n')
    assert "train.steps=" in completion.settings(Line(recipe=str(tmp_path / "mine.toml")), "train.s")
    (tmp_path / "bad.toml").write_text("[")
    for line in (Line(recipe=str(tmp_path / "bad.toml")), Line(recipe="none"), Line()):
        assert completion.settings(line, "train.step") == ["train.steps="]


def refusal(recipe, setting):
    """What is said against a setting; empty if it is valid."""
    try:
        reading.read(recipe, [setting])
    except reading.UsageError as error:
        return error.message
    return ""


@pytest.mark.parametrize("domain", registry.TOKENIZERS)
def test_what_is_offered_for_a_key_is_one_of_its_values(domain):
    recipe, offered = registry.DEFAULT_RECIPES[domain], 0
    for key in schema.keys([domain]):
        values = completion.settings(Line(domain=domain), f"{key}=")
        refused = [problem for value in values if "Input should be" in (problem := refusal(recipe, value))]
        assert refused == []  # another key may forbid a value, but it is one of those of its key
        offered += bool(values)
    assert offered > 20
    assert completion.settings(Line(domain=domain), "train.schedule=") == [
        f"train.schedule={one}" for one in ("cosine", "wsd", "constant")
    ]
    assert completion.settings(Line(domain=domain), "model.name=") == [f"model.name={one}" for one in registry.MODELS]
    assert completion.settings(Line(domain=domain), "model.tied=") == ["model.tied=true", "model.tied=false"]
    assert completion.settings(Line(domain=domain), "train.compile=") == [
        f"train.compile={one}" for one in ("auto", "true", "false")
    ]
    assert completion.settings(Line(domain=domain), "train.steps=") == []


def test_names_of_codecs_are_offered():
    assert completion.codecs("") == [*weights.NAMES]
    assert completion.settings(Line(domain="audio"), "tokenizer.weights=m") == ["tokenizer.weights=mini"]


def test_bash_gives_the_line_and_torch_is_not_loaded(tmp_path):
    asked = {console.COMPLETION: "complete_bash"}
    for word, expected in {
        "train.step": "train.steps=",
        "model.init=g": "model.init=gpt2",
        "tokenizer.weights=m": "",
    }.items():
        line = f'shortcut train --out "a b" --recipe text --set {word}'
        done = shortcut(cwd=tmp_path, fresh=True, _TYPER_COMPLETE_ARGS=line, PYTHONVERBOSE="1", **asked)
        assert done.stdout.strip() == (expected or "tokenizer.weights=mini")
        assert "import 'shortcut_cli.cli.completion'" in done.stderr
        assert "import 'torch'" not in done.stderr


def reached(terminal, text, shown=""):
    """What a terminal shows until `text` is among it."""
    end = time.monotonic() + LONGEST_S
    while text not in shown:
        assert time.monotonic() < end, f"{text!r} is not in {shown[-2000:]!r}"
        if select.select([terminal], [], [], 0.2)[0]:
            more = os.read(terminal, 65536).decode(errors="replace")
            if "\x1b[c" in more or "\x1b[0c" in more:  # fish asks what terminal this is
                os.write(terminal, b"\x1b[?62;c")
            shown += more
    return shown


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_from_the_first_tab_on(tmp_path, shell):
    """A real shell on a terminal, whose `shortcut` shows what it was given."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    home = tmp_path / "home"
    (home / "bin").mkdir(parents=True)
    config = {"XDG_CONFIG_HOME": str(home / ".config"), "ZDOTDIR": str(home)}
    shortcut("--install-completion", shell, cwd=tmp_path, fresh=True, HOME=str(home), **config)
    stub = home / "bin" / "shortcut"
    real = f'exec "{sys.executable}" -m shortcut_cli "$@"'
    stub.write_text(
        f'#!/bin/sh\n[ -n "${console.COMPLETION}" ] && {real}\nprintf GOT; printf "|%s" "$@"; echo "|END"\n'
    )
    stub.chmod(0o755)
    settings = {"bash": home / ".bashrc", "zsh": home / ".zshrc", "fish": home / ".config/fish/config.fish"}[shell]
    prompt = f"function fish_prompt; echo '{PROMPT}'; end" if shell == "fish" else f"PS1='{PROMPT}'"
    with settings.open("a") as file:
        file.write(f"\n{prompt}\n")
    env = (
        os.environ
        | config
        | {
            "HOME": str(home),
            "ZDOTDIR": str(home),
            "TERM": "xterm",
            "PATH": f"{stub.parent}:{os.environ['PATH']}",
        }
    )
    env |= {"XDG_DATA_HOME": str(home / "data")}
    lead, follow = pty.openpty()
    fcntl.ioctl(follow, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    own = subprocess.Popen(
        ["setsid", "-c", shell, *(["--rcfile", str(settings)] if shell == "bash" else []), "-i"],
        stdin=follow,
        stdout=follow,
        stderr=follow,
        cwd=tmp_path,
        env=env,
    )
    os.close(follow)
    try:
        reached(lead, PROMPT)
        for typed, expected in TYPED.items():
            os.write(lead, f"shortcut train {typed}\n".encode())
            shown = reached(lead, "|END")
            assert f"GOT|train|{expected}|END" in shown
    finally:
        os.killpg(own.pid, signal.SIGKILL)
        own.wait()
        os.close(lead)


@pytest.mark.parametrize(("shell", "name"), [("bash", ".bashrc"), ("zsh", ".zshrc")])
def test_what_the_user_has_in_the_settings_of_a_shell_stays(tmp_path, monkeypatch, shell, name):
    """Their file is only added to, once, and a script that can't be written leaves it as it was."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ZDOTDIR", raising=False)
    mine = tmp_path / name
    mine.write_bytes(b"export A=\xff")
    number = mine.stat().st_ino

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(completion.files, "write", full)
        with pytest.raises(OSError, match="No space"):
            completion.install(shell)
    assert mine.read_bytes() == b"export A=\xff"
    path = completion.install(shell)
    assert path.read_text() == completion.script(shell) + "\n"
    once = mine.read_bytes()
    assert once.startswith(b"export A=\xff\n")
    assert once.count(b"\n") == 2
    completion.install(shell)
    assert (mine.read_bytes(), mine.stat().st_ino) == (once, number)
