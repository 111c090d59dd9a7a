"""Report: one page, in one file, of runs, comparisons, codecs and shards."""

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortcut_cli import files
from shortcut_cli.errors import UsageError
from shortcut_cli.events import Progress, Report
from shortcut_cli.report import assemble
from shortcut_cli.report.page import MARKER, attempted

HEAD_BYTES = 4096  # of a page, in which its marker is


def write(paths: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """Write the page of the folders that `paths` stand for; returns its path, its size and the folders.

    out: default: report.html in the first of the folders. A report that is there is replaced, any other file is not.

    Raises UsageError if a path stands for no folder of ours, or something else is in the way; CheckFailed if the
    result in a folder is damaged.
    """
    place = out or default(paths[0])
    check_free(place)
    html = assemble.html(paths).encode()
    if not _holds(place, html):
        files.make_folder(place.parent)
        files.write(place, html)
    return {"report": str(place), "bytes": len(html), "folders": [str(path) for path in paths]}


def default(path: Path) -> Path:
    """The page of a path, in its folder."""
    return (path if path.is_dir() else path.parent) / files.PAGE


def check_free(place: Path) -> None:
    """Raise UsageError if something is at a path that is no report of ours."""
    if place.is_dir():
        raise UsageError(f"{place} is a folder", f"--out {place / files.PAGE}")
    if os.path.lexists(place) and not _is_report(place):
        raise UsageError(f"{place} exists, and is no page that `shortcut report` wrote", "choose another --out")


def _holds(place: Path, html: bytes) -> bool:
    """Whether a file has exactly these bytes, so that a command that had nothing to do changes nothing."""
    return place.is_file() and place.stat().st_size == len(html) and place.read_bytes() == html


def _is_report(path: Path) -> bool:
    """Whether a path is a page of ours, and no link to one."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return False
    with files.regular(path) as stream:
        return MARKER.encode() in stream.read(HEAD_BYTES)


def refresh(folder: Path, report: Report) -> dict[str, str]:
    """Write the page of a folder after a command has worked there, see `attempted`."""
    return attempted(lambda: told([folder], None, report)["report"])


def told(paths: Sequence[Path], out: Path | None, report: Report) -> dict[str, Any]:
    """As `write`, which takes a while if there is music to play: a screen says that it is at work."""
    report(Progress(task="page", done=0, total=1, unit="pages"))
    try:
        return write(paths, out)
    finally:
        report(Progress(task="page", done=1, total=1, unit="pages"))
