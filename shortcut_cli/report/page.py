"""The shell of a page: sections of HTML in one file that asks nothing of a network.

All text goes through Jinja2 with autoescape on, so names and contents of files stay text.
"""

import base64
import hashlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from shortcut_cli import __version__, formatting
from shortcut_cli.errors import ShortcutError
from shortcut_cli.formatting import shown, visible
from shortcut_cli.kept.inputs import is_finite

TEMPLATES = Path(__file__).parent / "templates"
MARKER = '<meta name="generator" content="shortcut report'  # in the head of every page of ours
UNKNOWN = "\N{EN DASH}"  # in a cell of a table
NOTHING = (None, "", UNKNOWN)
LONGEST = 1000  # characters of a value that are shown
MINUS = "\N{MINUS SIGN}"
NUMERIC = re.compile(rf"[\[{MINUS}+]*\d|{UNKNOWN}$")  # how a number, an interval or a lack of one begins
NEGATIVE = re.compile(r"((?:^|[\s(\[])(?:[0-9][0-9.]*e)?)-(?=[0-9.])")  # as in -0.5 and 3e-05


@dataclass(frozen=True)
class Section:
    """A part of a page: the name of its anchor, its heading, its HTML; group: of what, if the page has several."""

    anchor: str
    title: str
    body: Markup
    group: str = ""


def minus(number: str) -> str:
    """A number with the sign that print has for it, not a hyphen; 1e-05 too."""
    return number.replace("-", MINUS)


def cell(value: Any) -> str:
    """As `formatting.cell`; numbers with `minus`, or in words if they are none."""
    if isinstance(value, float) and not math.isfinite(value):
        return "not finite"
    words = formatting.cell(value)
    return words if isinstance(value, str) else minus(words)


def rounded(value: float) -> str:
    """As `formatting.rounded`, with `minus`."""
    return minus(formatting.rounded(value))


def exact(value: float) -> str:
    """A count with all its digits, another number with four; beyond 1e15 with a power of ten."""
    return rounded(value) if abs(value) >= 1e15 else cell(value)


def in_words(sentence: str) -> str:
    """A sentence that was written for a terminal, its numbers with `minus`; names such as gpt-4x96 stay as they are."""
    return NEGATIVE.sub(rf"\1{MINUS}", sentence)


def said(words: str) -> str:
    """A name or a sentence as it is shown on a page: cut, and with what is obeyed or not seen as an escape."""
    return visible(words if len(words) <= LONGEST else f"{words[:LONGEST]}...")


def prose(words: str) -> str:
    """The text of a file or a sample, all of it, but for what would be obeyed."""
    return shown(words.replace("\r\n", "\n"))


@cache
def _templates() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "cell": cell,
        "shown": said,
        "sentence": in_words,
        "prose": prose,
    }
    return made


def template(name: str, /, **values: Any) -> Markup:
    """The HTML that templates/`name` makes of these values."""
    return Markup(_templates().get_template(name).render(values))  # noqa: S704 - the template escapes


def key(folder: Path) -> str:
    """A beginning for the names of elements about a folder that no other folder's have."""
    return f"f{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]}"


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> Markup:
    """A table whose first column names its rows, without columns that hold nothing, see `filled`; empty if all do.

    Values are shown as `formatting.cell` does, numbers of a column with as many decimals as each other.
    """
    kept, cells = filled(columns, rows)
    if len(kept) == 1 < len(columns):
        return Markup("")
    aligned = [each if number == 0 else _aligned(each) for number, each in enumerate(zip(*cells, strict=True))]
    words = [all(isinstance(one, str) and not NUMERIC.match(one) for one in each if one) for each in aligned]
    return template("table.html", columns=kept, rows=list(zip(*aligned, strict=True)), words=words, caption=caption)


def _aligned(column: Sequence[Any]) -> list[Any]:
    """Numbers as `formatting.alike` has them, with `minus`; what is none, or not finite, as it is."""
    made = zip(column, formatting.alike(column), strict=True)
    return [one if isinstance(one, str) or not is_finite(one) else minus(cell(shown)) for one, shown in made]


def filled(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> tuple[list[str], list[list[Any]]]:
    """The columns of a table, and their cells row by row, without those in which nothing is known of any row."""
    every = [list(row) for row in rows]
    kept = [
        number
        for number in range(len(columns))
        if not number or not every or any(row[number] not in NOTHING for row in every)
    ]
    return [columns[number] for number in kept], [[row[number] for number in kept] for row in every]


def facts(rows: Mapping[str, Any]) -> Markup:
    """Names with what is known of each, one below the other; those of which nothing is known are left out."""
    known = {name: cell(value) for name, value in rows.items() if value not in (None, "")}
    return template("facts.html", rows=known)


def notices(lines: Iterable[str]) -> Markup:
    """Sentences that a reader should not miss, a paragraph each."""
    return template("notices.html", lines=list(lines))


def choice(name: str, label: str, parts: Mapping[str, Markup]) -> Markup:
    """One of several parts at a time, picked by radio buttons, without a script; all of them are in the page.

    name: of the buttons, unique in the page. label: what is chosen. parts: at most 8, by the words beside the button.
    """
    return template("choice.html", name=name, label=label, parts=parts)


def details(summary: str, body: Markup) -> Markup:
    """A part that is closed at first."""
    return template("details.html", summary=summary, body=body)


def copied(name: str, words: str, label: str) -> Markup:
    """Text as it is, with a button that copies it. name: of its element, unique in the page; label: what it is."""
    return template("copied.html", name=name, words=words, label=label)


def attempted(write: Callable[[], Path | str]) -> dict[str, str]:
    """What `write` returned, the path of a page, as "report", or why there is none, as "no_report".

    For commands that write a page at their end: whatever keeps it from being written, what they did is done. A bug
    keeps its traceback all the same.
    """
    try:
        return {"report": str(write())}
    except (ShortcutError, OSError) as error:
        words = error.message if isinstance(error, ShortcutError) else str(error)
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        words = f"{type(error).__name__}: {error}"
    return {"no_report": words.splitlines()[0] if words else words}


def _joined(suffix: str, first: str) -> Markup:
    """The style sheets or scripts in templates/, `first` before the others."""
    paths = sorted(TEMPLATES.glob(f"*.{suffix}"), key=lambda path: (path.stem != first, path.stem))
    return Markup("\n".join(path.read_text() for path in paths))  # noqa: S704 - ours


def render(title: str, sections: Sequence[Section]) -> str:
    """A whole page: equal bytes for equal sections. What is no character, as in the name of a file, becomes "?"."""
    groups: dict[str, list[Section]] = {}
    for section in sections:
        groups.setdefault(section.group, []).append(section)
    script = _joined("js", "page")
    page = str(
        template(
            "page.html",
            title=title,
            sections=list(sections),
            groups=groups,
            several=len(groups.keys() - {""}) > 1,
            version=__version__,
            style=_joined("css", "style"),
            script=script,
            # No other script runs, should one ever get into a page.
            script_sha256=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    return page.encode("utf-8", "replace").decode()
