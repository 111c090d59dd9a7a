"""Finding input files: folders are walked, files and globs taken, each real file once, in an order of its own."""

import glob
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shortcut_cli.errors import UsageError


@dataclass
class Found:
    """What a list of arguments stands for."""

    files: list[tuple[str, Path]] = field(default_factory=list)  # (path below its root, path), sorted by the first
    rejects: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)
    ignored: int = 0  # files in folders whose suffix is not of the domain
    misnamed: dict[str, Path] = field(default_factory=dict)  # folders that are named like files of the domain


def find(arguments: Iterable[str], suffixes: tuple[str, ...]) -> Found:
    """Find the input files behind command-line arguments.

    The result does not depend on the order or repetition of the arguments, on relative or absolute paths, nor on the
    order in which the file system lists names. Links to folders and files are followed, each real file is taken once.

    Raises UsageError where an argument names nothing.
    """
    found = Found()
    best: dict[str, tuple[int, str, Path, str]] = {}
    passed: set[str] = set()
    for argument in arguments:
        for root in _expand(argument):
            for relative, path in _walk(root, suffixes, found):
                if not path.name.lower().endswith(suffixes):
                    if path == root:
                        found.rejects.append((path.name, f"its suffix is none of {' '.join(suffixes)}"))
                    else:
                        passed.add(os.path.realpath(path))
                    continue
                # The same file below two roots is listed under the outer one, which says more.
                reason = _not_a_file(path)
                candidate = (-relative.count("/"), relative, path, reason)
                place = os.path.abspath(path) if reason else os.path.realpath(path)
                best[place] = min(best.get(place, candidate), candidate)
    found.files = sorted((relative, path) for _, relative, path, reason in best.values() if not reason)
    found.rejects += [(relative, reason) for _, relative, _, reason in best.values() if reason]
    for relative, folder in found.misnamed.items():
        if not any(folder in path.parents for _, path in found.files):
            found.rejects.append((relative, "is a folder, without files of this kind in it"))
    found.rejects = sorted(set(found.rejects))
    found.ignored = len(passed)
    return found


def _expand(argument: str) -> list[Path]:
    if os.path.lexists(argument):
        return [Path(argument)]
    matches = sorted(glob.glob(argument, recursive=True, include_hidden=False))
    if not matches:
        raise UsageError(f"{argument} does not exist", "give folders, files or globs; quote globs for `**`")
    return [Path(match) for match in matches]


def _walk(root: Path, suffixes: tuple[str, ...], found: Found) -> Iterator[tuple[str, Path]]:
    if not root.is_dir():
        yield root.name, root
        return
    visited: set[tuple[int, int]] = set()

    def refused(error: OSError) -> None:
        name = os.path.relpath(os.fsdecode(error.filename or root), root)
        found.rejects.append((name, f"folder can't be read: {error.strerror}"))

    for folder, names, file_names in os.walk(root, followlinks=True, onerror=refused):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            names.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        # Real folders before links to them, so that a link back does not take their place.
        names.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        like_files = (name for name in names if name.lower().endswith(suffixes))
        found.misnamed |= {os.path.relpath(Path(folder, name), root): Path(folder, name) for name in like_files}
        for name in sorted(file_names):
            path = Path(folder, name)
            yield path.relative_to(root).as_posix(), path


def _not_a_file(path: Path) -> str:
    """Why a path can't be an input, or nothing."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return f"can't be read: {error.strerror}"
    return "" if stat.S_ISREG(mode) else "is not a regular file"
