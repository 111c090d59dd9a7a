"""The parts of the documents that follow from the code and from the results: keys, commands, tables.

    python docs/generate.py

replaces, in README.md, docs/recipes.md, docs/accounts.md and benchmarks/RESULTS.md, what is between
`<!-- generated: NAME -->` and `<!-- end -->`. A test fails if a document is not what this makes of it.
"""

import inspect
import json
import re
import sys
from enum import Enum
from pathlib import Path
from statistics import mean
from typing import get_args, get_type_hints

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import results  # noqa: E402
import typer.main  # noqa: E402

from shortcut_cli import accounts  # noqa: E402
from shortcut_cli.cli.commands import app  # noqa: E402
from shortcut_cli.config import schema  # noqa: E402

PART = re.compile(r"(<!-- generated: (.+?) -->\n\n).*?(?=<!-- end -->)", re.S)
EVERYWHERE = {"--set", "--json"}  # options that the text explains once
# For each comparison of the old protocol: its data, and the loss of a simple predictor on the same tokens.
DATA = {
    "superseded/music": ("piano", "not measured"),
    "superseded/text8": ("Wikipedia, characters", "1.338 (5-gram)"),
    "superseded/wikitext": ("WikiText, SentencePiece", "2.602 (5-gram)"),
    "superseded/speech": ("speech, codec `mini`", "6.50 (codebook only)"),
}
NEAR_EQUAL = ("gpt", "gpt-6x64x271")  # two baselines of each comparison, which differ by 4 % of their parameters


def keys(meanings):
    """A table of recipe keys and what they mean."""
    yield from ("| key | meaning |", "|---|---|")
    yield from (f"| `{key}` | {text} |" for key, text in meanings.items())


def account(entries):
    """A table of keys of accounts, their units and what they mean."""
    yield from ("| key | unit | meaning |", "|---|---|---|")
    for key, entry in entries.items():
        yield f"| `{key}` | {entry.unit} | {entry.label.strip()}{f' ({entry.meaning})' if entry.meaning else ''} |"


def commands():
    """A table of the commands: usage with required arguments, help, other options."""
    yield from ("| command | what it does | options |", "|---|---|---|")
    for name, command in sorted(members(typer.main.get_command(app), "shortcut"), key=lambda one: one[0].count(" ")):
        usage, options = arguments(command)
        text = " ".join(inspect.getdoc(command.callback).split())
        yield f"| `{' '.join([name, *usage])}` | {text} | {', '.join(options)} |"


def members(group, name):
    """(name, command) of all commands of a group and of the groups in it."""
    for part, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from members(command, f"{name} {part}")
        else:
            yield f"{name} {part}", command


def arguments(command):
    """The required arguments of a command, as its usage shows them, and its options, quoted."""
    hints, usage, options = get_type_hints(command.callback), [], []
    for parameter in command.params:
        kinds = [kind for kind in (hints[parameter.name], *get_args(hints[parameter.name])) if isinstance(kind, type)]
        choices = next((list(kind) for kind in kinds if issubclass(kind, Enum)), [])
        value = (parameter.metavar or "|".join(choices) or parameter.name.upper()).replace("|", r"\|")
        flag = parameter.opts[0]
        if not flag.startswith("-"):
            value += "..." * (parameter.nargs == -1)
            usage.append(value if parameter.required else f"[{value}]")
        elif parameter.required:
            usage.append(f"{flag} {value}")
        elif flag not in EVERYWHERE:
            options.append(f"`{flag} {value}`" if choices else f"`{flag}`")
    return usage, options


def summary():
    """A table of the comparisons: `shortcut`, its baselines, and what puts their difference into proportion."""
    heads = ("test split, nats per token", "`gpt`", "`shortcut`", "`gpt` of equal FLOPs", "`shortcut` minus that, 95 %")
    yield results.line([*heads, "two near-equal `gpt`s differ by", "a simple predictor"])
    yield results.line(["---"] * 7)
    for name, (data, yardstick) in DATA.items():
        result = json.loads((results.FOLDER / name / "compare.json").read_text())
        loss = {row["label"]: mean(row["nats_per_token"]) for row in result["arms"]}
        (entry,) = (one for one in result["contrasts"] if one["arm"] == "shortcut")
        low, high = entry["interval_95"]
        near = abs(loss[NEAR_EQUAL[0]] - loss[NEAR_EQUAL[1]])
        losses = [f"{loss[label]:.3f}" for label in ("gpt", "shortcut", entry["baseline"])]
        difference = f"{entry['mean']:+.3f} [{low:+.3f}, {high:+.3f}]"
        yield results.line([data, *losses, difference, f"{near:.3f}", yardstick])


def parts():
    """The generated parts by name, each an iterable of lines."""
    return {
        "keys": keys(schema.keys()),
        "keys of codecs": keys(schema.codec_keys()),
        **{f"account/{domain}": account(entries) for domain, entries in accounts.DOMAINS.items()},
        "commands": commands(),
        "summary": summary(),
        **{f"results/{name}": results.tables(name) for name in results.names()},
    }


def documents():
    """Path -> text of each document with generated parts, as it should be."""
    made = {name: "".join(f"{line}\n" for line in lines) for name, lines in parts().items()}
    names = ("README.md", "docs/recipes.md", "docs/accounts.md", "benchmarks/RESULTS.md")
    paths = [ROOT / name for name in names]
    return {path: PART.sub(lambda part: f"{part[1]}{made[part[2]]}\n", path.read_text()) for path in paths}


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text)
