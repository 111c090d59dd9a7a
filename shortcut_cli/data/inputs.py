"""Finding input files: folders are walked, files and globs taken, each real file once, in an order that is fixed."""

import fnmatch
import glob
import hashlib
import math
import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_cli import files
from shortcut_cli.data import objects
from shortcut_cli.data.columns import Places, Rows, Texts, repeated
from shortcut_cli.errors import PASSING_ERRORS, UsageError, unreadable

MAGIC = re.compile(r"[*?[]")
KEY_BYTES = 16  # of the hash of a real path


class Files(Rows[tuple[str, Path]]):
    """Files and objects: (path below its root, path) of each. The path of an object is a place for its bytes.

    Takes 12 bytes for each and its path below the root; for an object, its version and 8 more.
    """

    def __init__(self, suffixes: tuple[str, ...] = (), fetched: Path | None = None) -> None:
        """suffixes: of the domain. fetched: the folder of the paths of objects."""
        self.suffixes, self.fetched = suffixes, fetched
        self.names, self.versions = Texts(), Texts()  # the second is empty if there are no objects
        self.roots: list[tuple[str, objects.Store | None]] = []
        self.known: dict[tuple[str, int], int] = {}  # places in `roots`
        self.root = array("I")

    def add(self, name: str, root: str, store: objects.Store | None = None, version: str = "") -> None:
        """Append a file, or an object of a store, with a name below a root. version: see `Object.packed`."""
        key = root, id(store)
        if key not in self.known:
            self.known[key] = len(self.roots)
            self.roots.append((root, store))
        if store is not None or self.versions:
            self.versions = self.versions or Texts([""] * len(self.names))
            self.versions.append(version)
        self.names.append(name)
        self.root.append(self.known[key])

    def __len__(self) -> int:
        return len(self.names)

    def row(self, place: int) -> tuple[str, Path]:
        """Path below its root, and path."""
        name = self.names[place]
        root, store = self.roots[self.root[place]]
        if store is None:
            return name, Path(root, name)
        assert self.fetched is not None, name
        suffix = max((end for end in self.suffixes if name.lower().endswith(end)), key=len)
        return name, self.fetched / f"{place:08d}{suffix}"  # a key may be no name for a file

    def object(self, place: int) -> objects.Object | None:
        """The object of a store; None if it is a file."""
        _, store = self.roots[self.root[place]]
        if store is None:
            return None
        return objects.Object.unpacked(store, self.path(place), self.versions[place])

    def path(self, place: int) -> str:
        """The path as it was named; of an object, its bucket and key."""
        return f"{self.roots[self.root[place]][0]}/{self.names[place]}"

    def named(self, place: int) -> Path:
        """The path as it was named."""
        return Path(self.roots[self.root[place]][0], self.names[place])

    def taken(self, places: Places) -> "Files":
        """Some of them, in the order of `places`."""
        found = Files(self.suffixes, self.fetched)
        found.roots, found.known = self.roots, self.known
        found.names = self.names.taken(places)
        found.versions = self.versions.taken(places) if self.versions else self.versions
        found.root = array("I", np.frombuffer(self.root, np.uint32)[places].tobytes()) if self.root else self.root
        return found


@dataclass
class Found:
    """The input files behind command-line arguments."""

    files: Files  # sorted by their paths below their roots
    rejects: list[tuple[str, str]]  # (path below its root, reason)
    ignored: Sequence[str]  # paths below their roots of files in folders whose suffix is not of the domain, sorted
    outputs: list[str]  # folders that were left out since they are ours, sorted
    passing: set[str] = field(default_factory=set)  # paths of `rejects` whose reason may pass

    @property
    def remote(self) -> bool:
        """Whether there are objects."""
        return any(store for _, store in self.files.roots)

    def ignored_in_words(self) -> str:
        """Which files were ignored because of their suffix: how many of each suffix, and the first three."""
        names = self.ignored
        counts = Counter(os.path.splitext(name)[1].lower() or "without suffix" for name in names)
        suffixes = ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common(5))
        more = f" and {len(counts) - 5} other suffixes" if len(counts) > 5 else ""
        first = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        return f"ignored because of their suffix: {suffixes}{more} ({first})"

    def none(self, suffixes: Iterable[str], arguments: Iterable[str], out: Path | None) -> UsageError:
        """What to raise if there are no files of these suffixes: with what was there instead."""
        hint = self.ignored_in_words() if self.ignored else ""
        if self.outputs:
            hint = f"left out, since shortcut has written it: {', '.join(self.outputs)}"
        if out is not None and os.path.realpath(out) in map(os.path.realpath, self.outputs):
            hint = f"{out} is left out, since the result goes there; choose another --out"
        return UsageError(f"no {' '.join(suffixes)} files in {' '.join(map(str, arguments))}", hint)


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
    URL, and what a glob in it matches, are those of a local copy.

    Raises UsageError if an argument names nothing, or is a URL while there is no `fetched`, ShortcutError if objects
    can't be listed.
    """
    search = _Search(suffixes, out, fetched)
    for argument in arguments:
        if not files.is_url(argument):
            for root in _expand(str(files.place(argument))):
                search.add(root)
        elif fetched is None:
            objects.check(argument)
            raise UsageError(f"{argument} is a URL; this command takes files of this machine", "copy them here first")
        else:
            search.add_objects(argument)
    return search.result()


def _expand(argument: str) -> list[Path]:
    if os.path.lexists(argument):
        return [Path(argument)]
    matches = sorted(glob.glob(argument, recursive=True, include_hidden=False))
    if not matches:
        files.check_known(argument)
        raise UsageError(f"{argument} does not exist", "give folders, files or globs; quote globs for `**`")
    fixed = Path(argument[: MAGIC.search(argument).start()].rpartition("/")[0] or ".")  # type: ignore[union-attr]
    return [path for match in matches if not _within_ours(path := Path(match), fixed)]


def _within_ours(path: Path, above: Path) -> bool:
    """Whether a path is, or is in, a folder of ours that is below the folder `above`."""
    between = [folder for folder in (path, *path.parents) if folder != above and above in folder.parents]
    return any(files.owner(folder) for folder in between)


def _above_glob(url: str) -> str:
    """The folder, with its slash, above the first part of a URL that is a glob; empty if none is.

    What stands before the first slash, a bucket or a host, is none.
    """
    scheme, host, rest = re.fullmatch(r"(.*?://)([^/]*)(.*)", url, re.S).groups()  # type: ignore[union-attr]
    found = MAGIC.search(rest)
    return f"{scheme}{host}{rest[: found.start()].rpartition('/')[0]}/" if found else ""


def _depths(path: str, parts: list[str]) -> list[int]:
    """How many of the first parts of a path a glob matches, as `glob.glob` would: each way that it does.

    parts: of the glob. A path that ends in / is a folder.
    """
    found, at = list[int](), {0}  # places in the glob up to which the names so far match it
    for depth, name in enumerate([*path.removesuffix("/").split("/"), ""]):
        for place in sorted(at):  # ** may stand for no folder
            while place < len(parts) and parts[place] == "**":
                at.add(place := place + 1)
        if len(parts) in at:
            found.append(depth)
        left = {place for place in at if place < len(parts) and _fits(name, parts[place])}
        at = {place + (parts[place] != "**") for place in left}
    return found


def _fits(name: str, part: str) -> bool:
    """Whether a part of a glob matches a name."""
    if not MAGIC.search(part):
        return name == part
    return (part.startswith(".") or not name.startswith(".")) and fnmatch.fnmatchcase(name, part)


class _Names:
    """Names of files below their roots, as they are found, with what tells files apart: several are names of one."""

    def __init__(self, found: Files, rank: Callable[[Files, int], Any]) -> None:
        """found: where they are kept. rank: of the names of a file, the one that is left has the smallest."""
        self.files, self.rank = found, rank
        self.keys = bytearray()
        self.removed = array("Q")

    def add(self, name: str, root: str, real: str, store: objects.Store | None = None, version: str = "") -> None:
        """Add a name. real: is equal for two names of one file."""
        self.files.add(name, root, store, version)
        self.keys += hashlib.blake2b(os.fsencode(real), digest_size=KEY_BYTES).digest()

    def remove(self, first: int, condition: Callable[[str], bool]) -> None:
        """Forget the files from a place on for whose paths a condition holds."""
        found = self.files
        paths = ((place, found.path(place)) for place in range(first, len(found)))
        self.removed.extend(place for place, path in paths if condition(path))

    def result(self) -> Files:
        """One name of each file, in order; equal names in the order of their roots."""
        left = np.ones(len(self.files), bool)
        left[np.array(self.removed, np.int64)] = False
        for places in repeated(self.keys, KEY_BYTES):
            best = min((place for place in places if left[place]), key=lambda at: self.rank(self.files, at), default=-1)
            left[[place for place in places if place != best]] = False
        self.keys.clear()
        kept = np.flatnonzero(left)
        found = self.files.taken(kept) if len(kept) < len(left) else self.files
        order = found.names.order()
        if len(found.roots) > 1:  # else no two have the same name
            first = 0
            for _, same in groupby(order.tolist(), found.names.encoded):
                many = sorted(same, key=found.named)
                order[first : first + len(many)] = many
                first += len(many)
        return found.taken(order)


def _outermost(found: Files, place: int) -> tuple[int, str, Path]:
    """Orders the names of a file: one that is below two roots is named by the outer one."""
    name = found.names[place]
    return -name.count("/"), name, found.named(place)


class _Search:
    """What has been found below the roots so far."""

    def __init__(self, suffixes: tuple[str, ...], out: Path | None, fetched: Path | None) -> None:
        self.suffixes = suffixes
        self.out = None if out is None else Path(os.path.realpath(out))
        self.names = _Names(Files(suffixes, fetched), _outermost)
        self.ignored = _Names(Files(), lambda found, place: found.names[place])
        self.unusable: dict[str, tuple[int, str, Path, str]] = {}  # real path -> as `_outermost`, and why
        self.rejects: set[tuple[str, str]] = set()
        self.outputs: set[str] = set()
        self.passing: set[str] = set()
        self.commits: dict[Hashable, str] = {}  # in which repositories are read
        self.misnamed: dict[str, Path] = {}  # folders that are named like files of the domain

    def add(self, root: Path) -> None:
        """Add a file, or all files below a folder."""
        for relative, path, above in self._walk(root):
            if path.name.lower().endswith(self.suffixes):
                reason, passing = _not_a_file(path)
                if reason:
                    self.passing |= {relative} if passing else set()
                    one, real = (-relative.count("/"), relative, path, reason), os.path.abspath(path)
                    self.unusable[real] = min(self.unusable.get(real, one), one)
                else:
                    self.names.add(relative, above, os.path.realpath(path))
            elif path == root:
                self.rejects.add((path.name, f"its suffix is none of {' '.join(self.suffixes)}"))
            else:
                self.ignored.add(relative, above, os.path.realpath(path))

    def add_objects(self, url: str) -> None:
        """Add an object, or all objects below a folder of keys, or those that a glob matches."""
        store, parts = objects.Store(url, self.commits), list[str]()
        if (folder := _above_glob(url)) and not store.exists():
            store, parts = objects.Store(folder, self.commits), url[len(folder) :].rstrip("/").split("/")
        begin = parts[0][: MAGIC.search(parts[0]).start()] if parts else ""  # type: ignore[union-attr]
        ours, firsts, any_found = set[str](), (len(self.names.files), len(self.ignored.files)), False
        rejects = list[tuple[str, str, str]]()
        for path, found in store.listed(begin):
            depths = _depths(path, parts) if parts else [0]
            any_found |= bool(depths)
            above, slash, name = path.rpartition("/")
            if name == files.MARKER and slash and store.is_marker(found):
                ours.add(found.name.removesuffix(name))
                if depths and depths[0] <= above.count("/"):  # else it is the match itself
                    self.outputs.add(f"{store.url.rstrip('/')}/{above}")
                continue
            for depth in sorted({*depths[:1], *depths[-1:]}):  # from the outermost match, and as a match itself
                is_root = found.is_root or depth > path.count("/")
                relative = name if is_root else path.split("/", depth)[depth]
                if name:
                    reason = self._add_object(relative, found, is_root=is_root)
                else:
                    odd = found.size and above.lower().endswith(self.suffixes)
                    reason = "its key ends in /, as that of a folder" if odd else ""
                if reason:
                    rejects.append((found.name, relative, reason))
        if not any_found:
            what = "matches no objects" if parts else "names no objects"
            raise UsageError(f"{url} {what}", "give an object, a folder or a glob; quote globs for `**`")

        def is_ours(name: str) -> bool:
            return any(map(name.startswith, ours))

        if ours:
            for names, first in zip((self.names, self.ignored), firsts, strict=True):
                names.remove(first, is_ours)
        self.rejects |= {(relative, reason) for name, relative, reason in rejects if not is_ours(name)}

    def _add_object(self, relative: str, found: objects.Object, *, is_root: bool) -> str:
        """Add an object if it is of the domain; returns why it is rejected, if it is.

        is_root: an argument, or a match of it, is the object itself.
        """
        root = found.name.removesuffix(f"/{relative}")
        if relative.lower().endswith(self.suffixes):
            self.names.add(relative, root, found.url, found.store, found.packed())
        elif is_root:
            return f"its suffix is none of {' '.join(self.suffixes)}"
        else:
            self.ignored.add(relative, root, found.url)
        return ""

    def result(self) -> Found:
        """Everything that was found, sorted."""
        named = self.names.result()
        rejects = self.rejects | {(relative, reason) for _, relative, _, reason in self.unusable.values()}
        for relative, folder in self.misnamed.items():
            if not any(folder in path.parents for _, path in named):
                rejects.add((relative, "is a folder, without files of this kind in it"))
        return Found(named, sorted(rejects), self.ignored.result().names, sorted(self.outputs), self.passing)

    def _is_output(self, folder: Path) -> bool:
        """Whether a command has written a folder, or is about to."""
        return bool(files.owner(folder)) or Path(os.path.realpath(folder)) == self.out

    def _walk(self, root: Path) -> Iterator[tuple[str, Path, str]]:
        """(path below the root, path, the root) of every file; of a root that is a file, the folder that it is in."""
        real = Path(os.path.realpath(root))
        if self.out and (real == self.out or (self.out in real.parents and files.owner(self.out))):
            self.outputs.add(str(root))
            return
        if not root.is_dir():
            yield root.name, root, str(root.parent)
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
                yield path.relative_to(root).as_posix(), path, str(root)


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
