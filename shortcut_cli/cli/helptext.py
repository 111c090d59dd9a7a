"""Help: commands in panels, arguments and options in plain words, in as many columns as the terminal has.

No name and no command is broken or cut, however narrow it is. Typer's own help is at least 50 columns wide, breaks long
words and cuts sentences, and its Rich help would take longer to import than the rest of `--help`.
"""

import os
import re
import shlex
import shutil
from collections.abc import Sequence
from typing import Any

import typer.core
from typer._click.formatting import HelpFormatter

from shortcut_cli.cli import completion, console
from shortcut_cli.cli.layout import wrapped
from shortcut_cli.errors import UsageError

PANELS = ("Data", "Models", "Look", "Codec", "Check")  # in which the commands are listed
WIDEST, NARROWEST = 98, 30  # columns of a help; in fewer, words of its first line would be broken
LONGEST = 30  # columns of a name that has its text beside it
LEAST = 24  # columns of a text beside a name; else it stands below
BELOW = 4  # columns by which it is indented there
# Metavars of what can be a path.
PATHS = {"DIR", "FILE", "FOLDER", "NAME|FILE", "PATH", "RUN", "SAMPLE.json", "WEIGHTS", "run.pt"}
SENTENCE = 1000  # characters, at most, of what a list says of a command
REMARK = re.compile(r" {3,}(?=\S)")  # what stands before a remark behind a command


class Formatter(HelpFormatter):
    """Breaks lines at spaces only, and puts texts below their names if there is no room beside them."""

    def write_text(self, text: str) -> None:
        """Write paragraphs; those behind a \\b keep their lines, which are commands with remarks."""
        for number, paragraph in enumerate(text.split("\n\n")):
            self.write("\n" * bool(number))
            if paragraph.startswith("\b\n"):
                for line in paragraph.splitlines()[1:]:
                    self._command(line)
            else:
                self._lines(" ".join(paragraph.split()), self.current_indent)

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = LONGEST, col_spacing: int = 2) -> None:
        """Write names and what they mean."""
        side = self.current_indent + min(max(len(name) for name, _ in rows), col_max) + col_spacing
        stacked = self.width - side < LEAST
        for name, text in rows:
            head = f"{' ' * self.current_indent}{name}"
            if stacked or len(head) > side - col_spacing:
                self.write(f"{head}\n")
                self._lines(text, self.current_indent + BELOW if stacked else side)
            else:
                self._lines(text, side, head)

    def _command(self, line: str) -> None:
        """Write a command, whole, and what is remarked on it, below it if there is no room beside it."""
        line = " " * self.current_indent + line
        if len(line) <= self.width:
            self.write(f"{line}\n")
            return
        command, *remarks = REMARK.split(line.strip(), maxsplit=1)
        indent = len(line) - len(line.lstrip())
        self.write(f"{' ' * indent}{command}\n")
        for remark in remarks:
            self._lines(remark, indent + BELOW)

    def _lines(self, text: str, indent: int, head: str = "") -> None:
        """Write a text with an indent, behind what already stands there."""
        lines = wrapped(text, self.width - indent, len).split("\n")
        for number, line in enumerate(lines):
            self.write(f"{'' if number else head:{indent}}{line}".rstrip() + "\n")


class _Plain:
    """What a command and a group have in common."""

    def get_help(self, ctx: Any) -> str:
        """The help."""
        columns = min(max(shutil.get_terminal_size().columns - 2, NARROWEST), WIDEST)
        formatter = Formatter(width=ctx.terminal_width or columns)
        self.format_help(ctx, formatter)  # type: ignore[attr-defined]
        return formatter.getvalue().rstrip("\n")

    def get_help_option(self, ctx: Any) -> Any:
        """The option --help, which prints as results are printed."""
        option = super().get_help_option(ctx)  # type: ignore[misc]
        if option:
            option.callback = _show
        return option


def _show(context: Any, _: Any, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        console.text(f"{context.get_help()}\n")
        context.exit()


def _rows(command: Any, context: Any, formatter: HelpFormatter) -> None:
    """Write the arguments and options of a command: names and plain words instead of Python's types."""
    for title, kind in (("Arguments", "argument"), ("Options", "option")):
        rows = [_row(one) for one in command.get_params(context) if one.param_type_name == kind]
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows)


def _row(parameter: Any) -> tuple[str, str]:
    """A line of a help: what to write, and what it means."""
    written, value = ", ".join(sorted(parameter.opts, key=len)), parameter.metavar or ""
    if parameter.param_type_name == "argument":
        written, value = value, ""
    default = parameter.default
    shown = "" if default is None or default is False or default == "" or callable(default) else f"default: {default}"
    extra = "required" if parameter.required else shown
    return f"{written} {value}".rstrip(), (parameter.help or "") + (f"  [{extra}]" if extra else "")


def _words(value: Any) -> Sequence[Any]:
    """What was given for a parameter, each word by itself."""
    return value if isinstance(value, list | tuple) else (value,)


def _is_for(option: str, word: str) -> bool:
    """Whether an argument looks like the value of an option."""
    if option == "--recipe":
        return word.endswith(".toml") or word in completion.recipes(word)
    return option == "--ckpt" and (word.endswith(".pt") or os.path.isfile(os.path.join(word, "run.pt")))


class Command(_Plain, typer.core.TyperCommand):
    """A command whose help is in plain words, and that takes no empty path."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the arguments apart.

        Raises UsageError if a path is empty, since it would name the working directory, or an argument is one too many.
        Who asks for help gets it whatever else is wrong, as of the values that Typer checks.
        """
        given, left, _ = self.make_parser(ctx).parse_args(args=list(args))
        if not (ctx.resilient_parsing or given.get("help")):
            self._check_paths(given)
            self._check_stray(ctx, args, given, left)
        return super().parse_args(ctx, args)

    def _check_paths(self, given: dict[str, Any]) -> None:
        for one in self.params:
            if one.metavar in PATHS and "" in _words(given.get(one.name or "")):
                name = one.opts[0] if one.param_type_name == "option" else one.metavar
                raise UsageError(
                    f"{name} is empty", "perhaps a variable of the shell is not set; this folder is called ."
                )

    def _check_stray(self, ctx: Any, args: list[str], given: dict[str, Any], left: list[str]) -> None:
        """Raise UsageError if there is an argument too many, or one that an option that is missing was to have."""
        if "" in left:
            raise UsageError("an argument is empty", "perhaps a variable of the shell is not set")
        missing = [one for one in self.params if one.param_type_name == "option" and one.name not in given]
        taken = [given.get(one.name or "") for one in self.params if one.param_type_name == "argument"]
        placed = [word for value in taken for word in _words(value) if word]
        for option in (one.opts[0] for one in missing if left or one.required):
            for word in (*left, *placed):
                if _is_for(option, word):
                    apart = "--" in args or args.count(word) > 1  # where the word stands is not known then
                    at = args.index(word)
                    meant = [*ctx.command_path.split(), *args[:at], option, *args[at:]]
                    hint = f"perhaps {option} {word} was meant" if apart else ""
                    raise UsageError(f"unexpected argument {word}", hint, then="" if apart else shlex.join(meant))
        if left:
            lacks = ", ".join(f"{one.opts[0]} {one.metavar}" for one in missing if one.required)
            raise UsageError(
                f"unexpected argument {left[0]}",
                f"what is missing is {lacks}" if lacks else "",
                then=f"{ctx.command_path} --help",
            )

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options."""
        _rows(self, ctx, formatter)


class Panels(_Plain, typer.core.TyperGroup):
    """A group whose help lists the commands in panels."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, then the commands."""
        _rows(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each panel; a group that has none gets a single one."""
        every = [(name, self.commands[name]) for name in self.list_commands(ctx)]
        for panel in (*PANELS, None):
            mine = [(name, one) for name, one in every if (getattr(one, "rich_help_panel", None) or None) == panel]
            if mine:
                with formatter.section(panel or "Commands"):
                    formatter.write_dl([(name, one.get_short_help_str(SENTENCE)) for name, one in mine])
