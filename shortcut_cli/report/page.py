"""The shell of a page: sections of HTML in one file that asks nothing of a network.

All text goes through Jinja2 with autoescape on, so names and contents of files stay text.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from shortcut_cli.formatting import cell, shown

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Section:
    """A part of a page: the name of its anchor, its heading, its HTML."""

    anchor: str
    title: str
    body: Markup


@cache
def _templates() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"cell": cell, "shown": shown}
    return made


def template(name: str, **values: Any) -> Markup:
    """The HTML that templates/`name` makes of these values."""
    return Markup(_templates().get_template(name).render(values))  # noqa: S704 - the template escapes


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]], caption: str = "") -> Markup:
    """A table whose first column names its rows. Values are shown as `formatting.cell` does."""
    return template("table.html", columns=list(columns), rows=[list(row) for row in rows], caption=caption)


def render(title: str, sections: Iterable[Section]) -> str:
    """A whole page."""
    return str(
        template(
            "page.html",
            title=title,
            sections=list(sections),
            style=_every("style.css", "css"),
            script=_every("page.js", "js"),
        )
    )


def _every(first: str, suffix: str) -> Markup:
    """All of our files of a kind, one after another, `first` before the others."""
    paths = sorted(TEMPLATES.glob(f"*.{suffix}"), key=lambda path: (path.name != first, path.name))
    return Markup("\n".join(path.read_text() for path in paths))  # noqa: S704 - ours
