"""Finding input files: folders are walked, files and globs taken, each real file once, in an order that is fixed."""

import glob
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shortcut_cli import files
from shortcut_cli.data import objects
from shortcut_cli.errors import PASSING_ERRORS, UsageError, unreadable

MAGIC = re.compile(r"[*?[]")


@dataclass(frozen=True)
class Found:
    """The input files behind command-line arguments."""

    files: list[tuple[str, Path]]  # (path below its root, path), sorted by the first
    rejects: list[tuple[str, str]]  # (path below its root, reason)
    ignored: list[str]  # files in folders whose suffix is not of the domain, by their paths below their roots, sorted
    outputs: list[str]  # folders that were left out since they are ours, sorted
    passing: set[str] = field(default_factory=set)  # paths of `rejects` whose reason may pass
    remote: dict[Path, objects.Object] = field(default_factory=dict)  # paths that `sha256` fetches objects to

    def sha256(self, path: Path) -> str:
        """Hex SHA-256 of a file's bytes; an object is fetched to its path meanwhile.

        Raises OSError as `files.sha256` does, Rejected if an object can't be fetched.
        """
        return self.remote[path].fetch(path) if path in self.remote else files.sha256(path)

    def named(self, path: Path) -> Path:
        """The path as it was named; of an object, its bucket and key."""
        return Path(self.remote[path].name) if path in self.remote else path


def check(arguments: Iterable[str]) -> None:
    """Raise UsageError if an argument names nothing, as far as the file system of this machine says it."""
    for argument in arguments:
        if not files.is_url(argument):
            _expand(str(files.place(argument)))


def find(
    arguments: Iterable[str], suffixes: tuple[str, ...], *, out: Path | None = None, fetched: Path | None = None
) -> Found:
    """Find the input files behind command-line arguments: folders, files or globs, and URLs of objects.

    The result does not depend on the order or repetition of the arguments, on whether paths are relative or absolute,
    or on the order in which the file system lists names. Links to folders and files are followed.

    What a command has written is left out: folders below the arguments that are marked as ours, and the folder `out`,
    which is where the result goes. A folder of ours that an argument names itself is searched.

    Objects are listed, each with a path in the folder `fetched`, to which nothing is fetched yet. Their names below a
    URL are those that a local copy would have.

    Raises UsageError if an argument names nothing, or is a URL while there is no `fetched`, ShortcutError if objects
    can't be listed.
    """
    search = _Search(suffixes, out)
    for argument in arguments:
        if not files.is_url(argument):
            for root in _expand(str(files.place(argument))):
                search.add(root)
        elif fetched is None:
            objects.check(argument)
            raise UsageError(f"{argument} is a URL; this command takes files of this machine", "copy them here first")
        else:
            search.add_objects(objects.Store(argument), fetched)
    return search.result()


def _expand(argument: str) -> list[Path]:
    if os.path.lexists(argument):
        return [Path(argument)]
    matches = sorted(glob.glob(argument, recursive=True, include_hidden=False))
    if not matches:
        raise UsageError(f"{argument} does not exist", "give folders, files or globs; quote globs for `**`")
    fixed = Path(argument[: MAGIC.search(argument).start()].rpartition("/")[0] or ".")  # type: ignore[union-attr]
    return [path for match in matches if not _within_ours(path := Path(match), fixed)]


def _within_ours(path: Path, above: Path) -> bool:
    """Whether a path is, or is in, a folder of ours that is below the folder `above`."""
    between = [folder for folder in (path, *path.parents) if folder != above and above in folder.parents]
    return any(files.owner(folder) for folder in between)


@dataclass(frozen=True, order=True)
class _Candidate:
    """One of the names of a file; the smallest is the one it is listed under."""

    height: int  # minus the number of folders above it; a file below two roots is named by the outer one
    relative: str  # path below its root
    path: Path
    reason: str  # why it can't be an input, or nothing


class _Search:
    """What has been found below the roots so far."""

    def __init__(self, suffixes: tuple[str, ...], out: Path | None) -> None:
        self.suffixes = suffixes
        self.out = None if out is None else Path(os.path.realpath(out))
        self.named: dict[str, _Candidate] = {}  # by real path
        self.ignored: dict[str, str] = {}  # real path -> the smallest of its paths below the roots
        self.rejects: set[tuple[str, str]] = set()
        self.outputs: set[str] = set()
        self.passing: set[str] = set()
        self.misnamed: dict[str, Path] = {}  # folders that are named like files of the domain
        self.remote: dict[Path, objects.Object] = {}

    def add(self, root: Path) -> None:
        """Add a file, or all files below a folder."""
        for relative, path in self._walk(root):
            if path.name.lower().endswith(self.suffixes):
                reason, passing = _not_a_file(path)
                self.passing |= {relative} if passing else set()
                candidate = _Candidate(-relative.count("/"), relative, path, reason)
                real = os.path.abspath(path) if reason else os.path.realpath(path)
                self.named[real] = min(self.named.get(real, candidate), candidate)
            elif path == root:
                self.rejects.add((path.name, f"its suffix is none of {' '.join(self.suffixes)}"))
            else:
                real = os.path.realpath(path)
                self.ignored[real] = min(self.ignored.get(real, relative), relative)

    def add_objects(self, store: objects.Store, fetched: Path) -> None:
        """Add an object, or all objects below a folder of keys."""
        ours, listed = set[str](), list[tuple[str, objects.Object]]()
        for relative, found in store.listed():
            folder, slash, name = relative.rpartition("/")
            if name == files.MARKER and slash and store.is_marker(found):
                ours.add(f"{folder}/")
            elif name:
                self._add_object(relative, found, listed)
            elif found.size and folder.lower().endswith(self.suffixes):
                self.rejects.add((relative, "its key ends in /, as that of a folder"))
        self.outputs |= {f"{store.url.rstrip('/')}/{folder[:-1]}" for folder in ours}
        for relative, found in listed:
            if not any(relative.startswith(folder) for folder in ours):
                suffix = max((end for end in self.suffixes if relative.lower().endswith(end)), key=len)
                path = fetched / f"{len(self.remote):08d}{suffix}"  # a key may be no name for a file
                self.remote[path] = found
                candidate = _Candidate(-relative.count("/"), relative, path, "")
                self.named[found.url] = min(self.named.get(found.url, candidate), candidate)

    def _add_object(self, relative: str, found: objects.Object, listed: list[tuple[str, objects.Object]]) -> None:
        """Add an object to `listed` if it is of the domain."""
        if relative.lower().endswith(self.suffixes):
            listed.append((relative, found))
        elif found.is_root:
            self.rejects.add((relative, f"its suffix is none of {' '.join(self.suffixes)}"))
        else:
            self.ignored[found.url] = min(self.ignored.get(found.url, relative), relative)

    def result(self) -> Found:
        """Everything that was found, sorted."""
        named = sorted((one.relative, one.path) for one in self.named.values() if not one.reason)
        rejects = self.rejects | {(one.relative, one.reason) for one in self.named.values() if one.reason}
        for relative, folder in self.misnamed.items():
            if not any(folder in path.parents for _, path in named):
                rejects.add((relative, "is a folder, without files of this kind in it"))
        return Found(
            named, sorted(rejects), sorted(self.ignored.values()), sorted(self.outputs), self.passing, self.remote
        )

    def _is_output(self, folder: Path) -> bool:
        """Whether a command has written a folder, or is about to."""
        return bool(files.owner(folder)) or Path(os.path.realpath(folder)) == self.out

    def _walk(self, root: Path) -> Iterator[tuple[str, Path]]:
        """(path below the root, path) of every file."""
        real = Path(os.path.realpath(root))
        if self.out and (real == self.out or (self.out in real.parents and files.owner(self.out))):
            self.outputs.add(str(root))
            return
        if not root.is_dir():
            yield root.name, root
            return
        visited: set[tuple[int, int]] = set()

        def refused(error: OSError) -> None:
            name = os.path.relpath(os.fsdecode(error.filename or root), root)
            self.rejects.add((name, f"folder can't be read: {error.strerror}"))
            self.passing |= {name} if error.errno in PASSING_ERRORS else set()

        for folder, names, file_names in os.walk(root, followlinks=True, onerror=refused):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in visited:
                names.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            if Path(folder) != root and self._is_output(Path(folder)):
                self.outputs.add(folder)
                names.clear()
                continue
            # Real folders before links to them, so that a link back to a folder does not take its place.
            names.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
            like_files = (name for name in names if name.lower().endswith(self.suffixes))
            self.misnamed |= {os.path.relpath(Path(folder, name), root): Path(folder, name) for name in like_files}
            for name in sorted(file_names):
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path


def _not_a_file(path: Path) -> tuple[str, bool]:
    """Why a path can't be an input, or nothing; and whether the reason may pass."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        return str(unreadable(error)), False  # a link that leads nowhere
    except OSError as error:
        reason = unreadable(error)
        return str(reason), reason.passing
    return "" if stat.S_ISREG(mode) else "is not a regular file", False


def too_many(rejected: Sequence[tuple[int, int]], limit: str) -> bool:
    """Whether more was rejected than `limit` allows.

    rejected: for files and for records, how many of how many were rejected. limit: "3" files and records together, or
    "1%" of the files and of the records.

    Raises UsageError if the limit is neither.
    """
    text, percent = limit.removesuffix("%").strip(), limit.endswith("%")
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not math.isfinite(number) or number < 0 or (not percent and number != int(number)):
        raise UsageError(f"--max-bad {limit} is neither a number nor a percentage", "for example 3 or 1%")
    if percent:
        return any(bad > total * number / 100 for bad, total in rejected)
    return sum(bad for bad, _ in rejected) > number
