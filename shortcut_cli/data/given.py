"""Splits that come with a corpus: lists of names, folders or globs, and tables such as MAESTRO's .csv."""

import csv
import io
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from shortcut_cli import files
from shortcut_cli.errors import UsageError
from shortcut_cli.registry import SPLITS

# Names of splits in tables, lower case.
NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
NAMES |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")
PREFERRED = ("test", "val", "train")  # of equal files or documents in several splits, which is kept


class Given:
    """Which split a file is in, as [data.splits] says."""

    def __init__(self, lists: Mapping[str, Iterable[str]], table: str = "") -> None:
        """lists: names, folders or globs by split. table: path of a .csv or .tsv with a column "split", or nothing.

        Raises UsageError if the table can't be read or has no such column.
        """
        self.lists = {split: [Path(pattern) for pattern in patterns] for split, patterns in lists.items()}
        self.table = dict[str, set[str]]()  # path -> splits
        self.others = set[str]()  # what the table calls splits and is none of NAMES
        if table:
            for path, name in _rows(Path(table)):
                if split := NAMES.get(name.lower()):
                    self.table.setdefault(path, set()).add(split)
                elif name:
                    self.others.add(name)

    def split_of(self, relative: str, path: Path) -> str:
        """The split of a file, "" if it is in none. relative: its path below its root; path: as it was named.

        A pattern is compared with the path below the root first, and with the path as named only if no pattern of any
        split matches there. Raises UsageError if the file is in two splits.
        """
        found = self._listed(Path(relative)) or self._listed(path)
        for names in (_endings(relative), _endings(path.as_posix())):
            rows = next((self.table[name] for name in names if name in self.table), None)
            if rows is not None:
                found = found | rows
                break
        if len(found) > 1:
            raise UsageError(f"{path} is in more than one of data.splits: {', '.join(sorted(found))}")
        return next(iter(found), "")

    def _listed(self, path: Path) -> set[str]:
        return {split for split, patterns in self.lists.items() if any(_matches(one, path) for one in patterns)}


def _matches(pattern: Path, path: Path) -> bool:
    """Whether a pattern matches a path, or a folder above it; unless it is absolute, it may begin at any folder."""
    if pattern.is_absolute():
        return _covers(pattern.parts, Path(os.path.abspath(path)).parts)
    return _covers(("**", *pattern.parts), path.parts)


def check_filled(names: Iterable[str], what: str) -> None:
    """Raises UsageError if a split gets nothing. names: the splits that got something."""
    filled = set(names)
    empty = [split for split in SPLITS if split not in filled]
    if empty:
        raise UsageError(
            f"data.splits gives {what} to {' and '.join(empty)}",
            "a pattern is compared with the path below the folder that is named, and with the path as it is named",
        )


def _covers(pattern: Sequence[str], path: Sequence[str]) -> bool:
    """Whether the parts of a pattern match the first parts of a path; "**" matches any number of parts."""
    ends = {0}  # how many parts of the path the pattern so far may match
    for part in pattern:
        if part == "**":
            ends = set(range(min(ends), len(path) + 1))
        else:
            ends = {end + 1 for end in ends if end < len(path) and (path[end] == part or fnmatchcase(path[end], part))}
        if not ends:
            return False
    return True


def _endings(path: str) -> Iterator[str]:
    """The path, and what is left of it without its first folder, its first two, and so on."""
    parts = path.split("/")
    return ("/".join(parts[place:]) for place in range(len(parts)))


def _rows(path: Path) -> Iterator[tuple[str, str]]:
    """(value, name of its split) for every value of a table that may be a path."""
    try:
        with io.TextIOWrapper(files.regular(path), encoding="utf-8-sig", newline="") as stream:
            rows = csv.DictReader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            column = next((name for name in rows.fieldnames or () if name.strip().lower() == "split"), None)
            if column is None:
                raise UsageError(f"data.splits.table {path} has no column `split`")
            for row in rows:
                split = (row[column] or "").strip()
                values = (value for name, value in row.items() if name != column and isinstance(value, str))
                yield from ((os.path.normpath(value), split) for value in values if value)
    except OSError as error:
        raise UsageError(f"data.splits.table {path} can't be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"data.splits.table {path} is not a table in UTF-8: {error}") from error
