"""A page of folders: what kind each is, and whose sections it gets."""

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shortcut_cli import files
from shortcut_cli.errors import ShortcutError, UsageError
from shortcut_cli.kept import codec_scores, names
from shortcut_cli.report import attention, codec, comparison, page, run, samples, several, shards
from shortcut_cli.report.page import Section

Maker = Callable[[Path], list[Section]]
# The makers of sections of each kind of folder, in the order of the page. The first of a kind reads its result: if that
# is damaged, there is no page; if a later one fails, its section says so.
MAKERS: dict[str, list[Maker]] = {
    "run": [run.sections, samples.sections, attention.sections, run.recipe],
    "comparison": [comparison.sections],
    "codec": [codec.sections],
    "shards": [shards.sections, shards.documents],
    "attention": [attention.of_folder],
    "samples": [samples.of_folder],
}
# What the page of a single folder is of.
TITLES: dict[str, Callable[[Path], str]] = {
    "run": run.title,
    "comparison": comparison.title,
    "codec": lambda folder: f"Codec: {names.of_folder(folder)}",
    "shards": lambda folder: f"Shards: {names.of_folder(folder)}",
    "attention": lambda folder: f"Attention: {names.of_folder(folder)}",
    "samples": lambda folder: f"Samples: {names.of_folder(folder)}",
}
# What a folder is, by the first of these files that is in it.
FILES = {
    "run.pt": "run",
    "codec.pt": "codec",
    codec_scores.NAME: "codec",
    "compare.json": "comparison",
    "manifest.json": "shards",
    attention.NUMBERS: "attention",
}
HEAD_BYTES = 4096  # of a page, in which its marker is
GIVE = "give folders of runs, comparisons, codecs, shards, samples or attention, or the folder of a demo"


def found(path: Path) -> list[tuple[str, Path]]:
    """The kinds of the folders that a path stands for: itself, the folder of a result, or the runs in it.

    Raises UsageError if it stands for none.
    """
    if path.name in FILES and path.is_file():
        path = path.parent
    for name, kind in FILES.items():
        if (path / name).is_file():
            return [(kind, path)]
    if files.owner(path) == "shortcut demo":
        runs = sorted(each.parent for each in path.glob("runs/*/*/run.pt"))
        if runs:
            return [("run", each) for each in runs]
    if samples.is_folder(path):
        return [("samples", path)]
    if runs := sorted(each.parent for each in (*path.glob("*/run.pt"), *path.glob("*/*/run.pt"))):
        return [("run", each) for each in runs]
    files.refuse_unfinished(path)
    state = "holds nothing to report on" if path.is_dir() else "is a file" if path.exists() else "does not exist"
    raise UsageError(f"{path} {state}", GIVE)


def _sections(kind: str, path: Path, *, several: bool) -> list[Section]:
    """The sections of one folder. several: whether they need its name, since there are others."""
    first, *rest = MAKERS[kind]
    made = first(path)
    for maker in rest:
        try:
            made += maker(path)
        except (ShortcutError, OSError) as error:
            words = error.message if isinstance(error, ShortcutError) else f"{path}: {error.strerror}"
            name = maker.__module__.rpartition(".")[2] if maker.__name__ == "sections" else maker.__name__
            title = name.capitalize()
            made.append(Section(title.lower(), title, page.notices([words])))
    if not several:
        return made
    group, key = names.of_folder(path), page.key(path)
    return [replace(section, group=group, anchor=f"{key}-{section.anchor}") for section in made]


def html(paths: Sequence[Path]) -> str:
    """The page of all folders that `paths` stand for, each once.

    Raises UsageError if one stands for none, CheckFailed if the result in one is damaged.
    """
    folders = {path.resolve(): (kind, path) for given in paths for kind, path in found(given)}
    every = [*folders.values()]
    runs = [path for kind, path in every if kind == "run"]
    made = several.sections(runs) if len(runs) > 1 else []
    for kind, path in every:
        made += _sections(kind, path, several=len(every) > 1)
    return page.render(_title(paths, every), made)


def _title(paths: Sequence[Path], every: Sequence[tuple[str, Path]]) -> str:
    """What a single folder is of; of several their names if they are few, or how many there are and where."""
    if len(every) == 1:
        kind, folder = every[0]
        return TITLES[kind](folder)
    what = "runs" if all(kind == "run" for kind, _ in every) else "folders"
    if len(paths) == 1:
        return f"{names.of_folder(paths[0])}: {len(every)} {what}"
    each = several.distinct([names.of_folder(folder) for _, folder in every])
    return f"{what.capitalize()}: {', '.join(each)}" if len(each) <= 3 else f"{len(each)} {what}"


def write(paths: Sequence[Path], out: Path | None = None) -> dict[str, Any]:
    """Write the page of the folders that `paths` stand for; returns its path, its size and the folders.

    out: default: report.html in the first of the folders. A report that is there is replaced, any other file is not.

    Raises UsageError if a path stands for no folder of ours, or something else is in the way; CheckFailed if the
    result in a folder is damaged.
    """
    place = out or default(paths[0])
    check_free(place)
    made = html(paths).encode()
    if not _holds(place, made):
        files.make_folder(place.parent)
        files.write(place, made)
    return {"report": str(place), "bytes": len(made), "folders": [str(path) for path in paths]}


def default(path: Path) -> Path:
    """The page of a path, in its folder."""
    return (path if path.is_dir() else path.parent) / files.PAGE


def check_free(place: Path) -> None:
    """Raise UsageError if something is at a path that is no report of ours."""
    if place.is_dir():
        raise UsageError(f"{place} is a folder", f"--out {place / files.PAGE}")
    if os.path.lexists(place) and not _is_report(place):
        raise UsageError(f"{place} exists, and is no page that `shortcut report` wrote", "choose another --out")


def _holds(place: Path, made: bytes) -> bool:
    """Whether a file has exactly these bytes, so that a command that had nothing to do changes nothing."""
    return place.is_file() and place.stat().st_size == len(made) and place.read_bytes() == made


def _is_report(path: Path) -> bool:
    """Whether a path is a page of ours, and no link to one."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return False
    with files.regular(path) as stream:
        return page.MARKER.encode() in stream.read(HEAD_BYTES)
