"""Report: one page, in one file, of runs, comparisons, codecs, shards, samples and attention."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortcut_cli.events import Progress, Report
from shortcut_cli.report.assemble import check_free, default, write
from shortcut_cli.report.page import attempted

__all__ = ["check_free", "default", "refresh", "told", "write"]


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
