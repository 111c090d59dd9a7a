"""What is not used, and why: the lines of rejects.jsonl, and when there are too many."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from shortcut_cli.data import inputs
from shortcut_cli.data.shards import read_lines
from shortcut_cli.errors import TooManyRejects, Unfinished

# What --max-bad judges: in words, and the manifest's counts of rejected ones and of all.
JUDGED = (("files", "rejected", "inputs"), ("records", "records_rejected", "records"))


@dataclass
class Reject:
    """A file, or a variant of one, that is not used."""

    source: str
    sha256: str | None
    reason: str
    variant: str = ""
    bad: bool = True  # the file is at fault, which is for --max-bad to judge; False: it was not wanted
    passing: bool = False  # the reason may pass: the next preparation tries again

    def line(self) -> dict[str, Any]:
        """Its line in rejects.jsonl."""
        variant = {"variant": self.variant} if self.variant else {}
        passing = {"passing": True} if self.passing else {}
        return {"source": self.source, "sha256": self.sha256, **variant, "reason": self.reason, **passing}


def check_rejects(folder: Path, manifest: dict[str, Any], max_bad: str, *, kept: bool) -> None:
    """Raises TooManyRejects, with the first three reasons, if more was rejected than `max_bad` allows.

    kept: whether the user finds the folder afterwards.
    """
    if not inputs.too_many([(manifest[bad], manifest[total]) for _, bad, total in JUDGED], max_bad):
        return
    counts, *first = rejects_summary(folder, manifest)
    where = f"the rest is complete in {folder}; {folder / 'rejects.jsonl'} has all reasons; " if kept else ""
    passing = (
        f"; {manifest['unfinished']:,} are the machine's fault: {Unfinished.again}"
        if manifest.get("unfinished")
        else ""
    )
    raise TooManyRejects(
        "\n".join([f"{counts} were rejected, more than --max-bad {max_bad}", *first]),
        f"{where}--max-bad allows more{passing}",
    )


def rejects_summary(folder: Path, manifest: dict[str, Any]) -> list[str]:
    """How many files and records were rejected, and the first three reasons, a line each; nothing if none were.

    Raises CheckFailed if rejects.jsonl is damaged.
    """
    counts = [f"{manifest[bad]:,} of {manifest[total]:,} {what}" for what, bad, total in JUDGED if manifest[bad]]
    if not counts:
        return []
    shown = min(3, sum(manifest[bad] for _, bad, _ in JUDGED))  # after these come files that were not wanted
    return [" and ".join(counts), *(f"  {described(line)}" for line in islice(_lines(folder), shown))]


def passing_rejects(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a folder's rejects.jsonl whose reasons may pass. Raises CheckFailed if it is damaged."""
    return (line for line in _lines(folder) if line.get("passing"))


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of a folder's rejects.jsonl. Raises CheckFailed if it is damaged."""
    return read_lines(folder / "rejects.jsonl", _is_reject)


def _is_reject(line: dict[str, Any]) -> bool:
    """Whether a line has what is used of it."""
    known = isinstance(line.get("sha256"), str | None)
    return known and all(isinstance(line.get(key), str) for key in ("source", "reason"))


def described(reject: dict[str, Any]) -> str:
    """A line of rejects.jsonl in words: which file or record, and why."""
    where = f"{reject['source']}, line {reject['line']}" if "line" in reject else reject["source"]
    return f"{where}: {reject['reason']}"


def all_rejected(rejects: list[Reject], path: Path | None = None) -> TooManyRejects:
    """The error, with the first ten reasons. path: of rejects.jsonl, if the user finds it."""
    shown = [f"  {reject.source}: {reject.reason}" for reject in rejects[:10]]
    more = [f"  and {len(rejects) - 10} more"] if len(rejects) > 10 else []
    hint = f"{path} has all reasons" if path else ""
    return TooManyRejects(f"all {len(rejects)} files were rejected\n" + "\n".join(shown + more), hint)
