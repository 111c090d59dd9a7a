"""Help and completion: commands in panels, examples that are right, and what a shell is told."""

import ast
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from conftest import shortcut
from rich.console import Console

from shortcut_cli import errors, registry
from shortcut_cli.cli import commands, console, helptext
from shortcut_cli.config import reading

ROOT = typer.main.get_command(commands.app)


def every(group=ROOT, name="shortcut"):
    """(words, command) of every command and group."""
    yield name, group
    for part, command in getattr(group, "commands", {}).items():
        yield from every(command, f"{name} {part}")


EVERY = dict(every())
ENDS = {name: one for name, one in EVERY.items() if not hasattr(one, "commands")}


def help_of(name, width=98):
    command = EVERY[name]
    root = ROOT.make_context("shortcut", [], resilient_parsing=True, terminal_width=width)
    return command.get_help(command.make_context(name, [], parent=root, resilient_parsing=True))


def test_the_help_lists_each_command_once_in_a_panel():
    text = help_of("shortcut")
    panels = re.findall(r"^(\w+):\n((?:  .*\n)+)", text, re.M)
    listed = {panel: re.findall(r"^  (\w+) ", lines, re.M) for panel, lines in panels if panel in helptext.PANELS}
    assert tuple(listed) == helptext.PANELS
    assert sorted(name for names in listed.values() for name in names) == sorted(ROOT.commands)
    assert "\nCommands:" not in text


def test_without_a_command_the_first_steps_are_said(tmp_path):
    said = shortcut(cwd=tmp_path, check=2).stderr
    assert "First:\n    shortcut demo " in said


@pytest.mark.parametrize("name", ENDS)
def test_every_example_is_a_command_line_that_is_right(name):
    lines = re.findall(r"^ +(shortcut .*)$", help_of(name).partition("Examples:")[2], re.M)
    assert 1 <= len(lines) <= 3
    for line in lines:
        assert line.startswith(name)
        assert len(line) < 76
        words = shlex.split(line.removeprefix(name))
        EVERY[name].make_context(name, words)  # raises an error of Typer's if an option is wrong
        recipe = words[words.index("--recipe") + 1] if "--recipe" in words else "text"
        reading.read(recipe, [words[n + 1] for n, word in enumerate(words) if word == "--set" and recipe != "text"])


@pytest.mark.parametrize("name", EVERY)
def test_every_help_has_a_short_flag_and_fits(name):
    text = help_of(name)
    assert re.search(r"^  -h, --help ", text, re.M)
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("width", [32, 40, 60, 78, 118])
@pytest.mark.parametrize("name", EVERY)
def test_nothing_in_a_help_is_cut_or_broken_at_any_width(name, width):
    """A command stays on one line, which a terminal may break without harm. No other line is too wide."""
    text, roomy = help_of(name, width), help_of(name, 400)
    assert text.split() == roomy.split()
    assert not re.search(r"[a-z]\.\.\.", text)
    found = [line.strip() for line in text.splitlines()]
    for line in roomy.splitlines():
        if line.startswith("    shortcut "):
            assert re.split(" {3,}", line.strip())[0] in [re.split(" {3,}", one)[0] for one in found]
    for line in text.splitlines():
        if not line.strip().startswith(("shortcut ", "Usage: shortcut ")):
            assert len(line) <= width or len(line.split()) == (2 if line.strip().startswith("-") else 1), line


def test_the_first_steps_stand_beside_their_remarks_at_80_columns():
    lines = help_of("shortcut", 78).splitlines()
    assert max(map(len, lines)) <= 78
    assert sum(bool(re.match("    shortcut .*   .*files|.*offline", line)) for line in lines) >= 2


@pytest.mark.parametrize("columns", [1, 2, 20])
def test_a_help_is_printed_however_narrow_the_terminal_is(tmp_path, columns):
    text = shortcut("-h", cwd=tmp_path, COLUMNS=str(columns)).stdout
    assert text.split()[2:] == help_of("shortcut").split()[3:]


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_help_takes_the_width_of_the_terminal(tmp_path, columns):
    text = shortcut("diff", "-h", cwd=tmp_path, COLUMNS=str(columns)).stdout
    assert text.split()[2:] == help_of("shortcut diff").split()[3:]  # but for the name, which is "shortcut" twice there
    found = text.partition("\n\n")[2].partition("Examples:")[0].splitlines()
    wanted = help_of("shortcut diff", min(columns, 100) - 2).partition("\n\n")[2].partition("Examples:")[0]
    assert found == wanted.splitlines()
    assert max(map(len, found)) <= columns


PRINTED = ("-h", "train -h", "codec --help", "--version", "--show-completion bash", "recipes show text", "recipes list")
PRINTED += ("recipes check text --json", "inspect text.toml", "runs . --json", "doctor")


@pytest.mark.parametrize("line", PRINTED)
def test_what_cannot_be_printed_is_said_and_a_reader_who_left_is_not(tmp_path, line):
    """On a full disk one panel and exit code 1; if nobody reads any more 141, as after SIGPIPE, and nothing is said."""
    (tmp_path / "text.toml").write_text(reading.text("text"))
    with open("/dev/full", "w") as full:
        done = ended(line, full, tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\u256d") == 1
    assert "the output can't be written to stdout: No space left on device" in done.stderr
    read, write = os.pipe()
    os.close(read)
    done = ended(line, write, tmp_path)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def ended(line, stdout, cwd):
    """How a command ends that prints into a file."""
    command = [sys.executable, "-m", "shortcut_cli", *line.split()]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, cwd=cwd)


@pytest.mark.parametrize("name", ENDS)
def test_every_default_is_shown(name):
    text = " ".join(help_of(name).split())
    for parameter in ENDS[name].params:
        if parameter.opts[0].startswith("-") and parameter.default not in (None, False, "", ()):
            assert f"default: {parameter.default}" in text, parameter.name
    assert "default: ]" not in text


@pytest.mark.parametrize("name", EVERY)
def test_every_value_has_a_plain_name_and_its_limits_are_said(name):
    """Typer's own help has Python's types, and limits as [0<=x<=9223372036854775807]."""
    text, limited = help_of(name), []
    assert not re.search(r"[<>]|list\[|int range", text)
    for parameter in EVERY[name].params:
        if parameter.param_type_name == "option" and not parameter.is_flag:
            assert re.search(rf"^  (-h, )?{parameter.opts[0]} {re.escape(parameter.metavar)}", text, re.M), parameter
        least, most = (getattr(parameter, one, None) for one in ("min", "max"))
        if least is not None:
            limited.append(parameter.name)
            known = f"{least:,} to {most:,}" if (most or 10**9) <= commands.MOST_SAID else f"at least {least:,}"
            assert f"; {known}." in parameter.help
    assert bool(limited) == (name in LIMITED)


LIMITED = {
    f"shortcut {name}"
    for name in ("prepare", "train", "eval", "sample", "run", "attention", "compare", "prove resume", "prove tokens")
} | {"shortcut codec train", "shortcut demo"}


def test_the_architectures_are_listed():
    for name in ("shortcut train", "shortcut compare"):
        words = re.findall(r"\w+", help_of(name))
        assert set(registry.MODELS) <= set(words)


def completed(tmp_path, shell, line):
    """What a shell is told about the word that `line` ends with."""
    words = line.split(" ")
    variables = {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)} if shell == "bash" else {}
    variables |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"} if shell != "bash" else {}
    done = shortcut(cwd=tmp_path, fresh=True, _SHORTCUT_COMPLETE=f"complete_{shell}", **variables)
    told = re.sub(r"^_arguments .*\(\(|\)\)'$", "", done.stdout.strip())
    return [re.split(r'\t|":"', word)[0].strip('"') for word in told.split("\n")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_names_of_recipes_architectures_and_commands_are_completed(tmp_path, shell):
    assert completed(tmp_path, shell, "shortcut train --recipe music") == ["music", "music-tiny"]
    assert completed(tmp_path, shell, "shortcut compare --models x0,gpt,mud") == ["x0,gpt,mudd", "x0,gpt,mudd_last"]
    assert completed(tmp_path, shell, "shortcut doc") == ["doctor"]
    for command in ("show", "copy", "check"):
        assert completed(tmp_path, shell, f"shortcut recipes {command} te") == ["text", "text-tiny"]


def test_the_script_of_each_shell_asks_in_the_same_way(tmp_path):
    for shell in ("bash", "zsh", "fish"):
        script = shortcut("--show-completion", shell, cwd=tmp_path, fresh=True).stdout
        asked = "fish" if shell == "zsh" else shell  # whose way has values and descriptions apart
        assert f"_SHORTCUT_COMPLETE=complete_{asked} " in script
        assert "shortcut" in script.replace("_shortcut", "")


def test_bash_completes_after_the_script_was_installed(tmp_path):
    """A bash that reads the installed script, with a `shortcut` that is this one."""
    done = shortcut("--install-completion", "bash", cwd=tmp_path, fresh=True, HOME=str(tmp_path))
    script = tmp_path / ".bash_completions" / "shortcut.sh"
    assert done.stdout == f"{script}\n"
    assert str(script) in (tmp_path / ".bashrc").read_text()
    found = subprocess.run(
        ["bash", "--norc", "-c", f"source {shlex.quote(str(script))}; complete -p shortcut"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    )
    assert found.stdout.startswith("complete -o default -F _shortcut_completion")


KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}


def raised():
    """(place, text of the hint, `then` as it would be with names for what is in it) of every error in the package.

    What is in a text, as {name}, becomes x; an expression that is not a text, as a call that joins one, is left out.
    """
    for path in sorted(Path(commands.__file__).parents[1].rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if name in KINDS and name != "Rejected":
                hints = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "hint")]
                thens = [word.value for word in node.keywords if word.arg == "then"]
                yield f"{path.name}:{node.lineno}", *(list(map(said, each)) for each in (hints, thens))


def said(node):
    if isinstance(node, ast.JoinedStr):
        return "".join("x" if isinstance(part, ast.FormattedValue) else part.value for part in node.values)
    return node.value if isinstance(node, ast.Constant) else None


def test_only_what_can_be_pasted_is_the_next_command_of_an_error():
    every = list(raised())
    assert sum(bool(hints) for _, hints, _ in every) > 100
    for place, hints, _ in every:
        for hint in hints:
            assert not (hint or "").startswith(("shortcut ", "Next")), f"{place}: {hint}: then="
    commands_of = {place: then for place, _, thens in every for then in thens if then}
    assert len(commands_of) >= 4
    for place, then in commands_of.items():
        words = shlex.split(then)
        if words[-1] == "--help":
            continue
        name = max((name for name in EVERY if then.startswith(f"{name} ")), key=len)
        EVERY[name].make_context(name, words[len(name.split()) :])
        assert not re.search(r"[A-Z]{2}|\.\.\.", then.replace(console.OPEN, "")), place


@pytest.mark.parametrize("width", [40, 60, 80])
def test_the_next_command_of_an_error_is_one_line_whatever_the_width(monkeypatch, width):
    screen = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(console, "_err", lambda: screen)
    then = "shortcut train --recipe a-recipe --set 'tokenizer.weights=a name' --set tokenizer.codebooks=4 --seed 3"
    console.panel(errors.UsageError("what", "in words", then=then))
    console.panel(errors.UsageError("what", then="shortcut prepare text PATH... --recipe x"))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", screen.file.getvalue()).splitlines()
    assert [line for line in lines if not line.startswith(("\u256d", "\u2502", "\u2570"))] == [
        f"Next: {then}",
        "Fill in PATH: shortcut prepare text PATH... --recipe x",
    ]
    assert any("Hint: in words" in line for line in lines)
