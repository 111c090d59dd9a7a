"""Shards in stores: a folder's copy on this machine, fetched if it differs, and copied back with the manifest last.

A command works on the copy, which is in the cache (`files.place`), so it needs a store only to begin and to end.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shortcut_cli import files
from shortcut_cli.data import objects
from shortcut_cli.data.shards import MANIFEST, PREPARE, read_manifest
from shortcut_cli.errors import CheckFailed, Rejected, ShortcutError, TooManyRejects, Unfinished, UsageError
from shortcut_cli.events import Note, Progress, Report
from shortcut_cli.training import torchrun

WAIT_S = 0.5  # between looks whether another process has fetched


def fetched(name: str, report: Report) -> Path:
    """The folder of the shards that a recipe names by a path or a URL.

    That of a URL is its copy in the cache, which is fetched, and every checksum compared, unless the manifest in the
    store is that of the copy.

    Raises UsageError if a URL names no shards, CheckFailed if they are damaged, ShortcutError if they can't be read.
    """
    folder = files.place(name)
    if files.is_url(name):
        store = objects.Store(name)
        if (manifest := _manifest(store)) is None:
            raise UsageError(
                f"{name} is not a shards folder (it has no {MANIFEST})",
                "`shortcut prepare audio|midi|text PATH... --out URL` makes one",
            )
        _fetch(store, manifest, folder, report)
    return folder


@contextmanager
def kept(name: str, report: Report) -> Iterator[Path]:
    """A folder to prepare shards into; that of a URL is copied to the store when the block ends.

    If there are shards in the store already, the block begins with them, and what is there stays unless the block
    replaces them. A preparation that ends with rejects is copied too.

    Raises UsageError if the store holds something else there, and what `fetched` raises.
    """
    folder = files.place(name)
    if not files.is_url(name):
        yield folder
        return
    store = objects.Store(name)
    before = _manifest(store)
    if before is not None:
        _fetch(store, before, folder, report)
    elif store.is_empty() and _copied(folder).exists():  # it has been removed from the store since
        with files.held(folder, PREPARE):
            _clear(folder)
        _copied(folder).unlink()
    elif not (store.is_empty() or ((marker := store.find(files.MARKER)) and store.is_marker(marker))):
        raise UsageError(f"{name} is not empty, and was not made by `{PREPARE}`", "choose another --out")
    try:
        yield folder
    except (TooManyRejects, Unfinished):
        _copy(store, folder, before, report)
        raise
    _copy(store, folder, before, report)


def _manifest(store: objects.Store) -> dict[str, Any] | None:
    """The manifest below a URL; None if there is none. Raises what `fetched` raises."""
    found = store.find(MANIFEST)
    if found is None:
        return None
    with files.temporary_folder() as scratch:
        try:
            found.fetch(scratch / MANIFEST)
            return read_manifest(scratch)
        except Rejected as refused:
            raise ShortcutError(f"{found.url} {refused}", "run the same command again") from refused
        except CheckFailed as error:
            text = error.message.replace(str(scratch), store.url.rstrip("/"))
            raise CheckFailed(text, error.hint) from error


def _has(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether a folder is a copy of the shards of a manifest."""
    try:
        return bool(read_manifest(folder)["checksum"] == manifest["checksum"])
    except (UsageError, CheckFailed):
        return False


def _copied(folder: Path) -> Path:
    """A file beside a copy; it is there if the store has, or had, the same."""
    return folder.with_name(f"{folder.name}.copied")


def _clear(folder: Path) -> None:
    """Remove all but the marker of a copy, its manifest first."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != files.MARKER:
            path.unlink()


def _fetch(store: objects.Store, manifest: dict[str, Any], folder: Path, report: Report) -> None:
    """Make a folder a copy of the shards of a manifest, with the manifest last."""
    while torchrun.follows_here() and not _has(folder, manifest):
        time.sleep(WAIT_S)  # if the process that fetches fails, all are ended
    if _has(folder, manifest):
        return
    with files.held(folder, PREPARE, "wait until it ends"):
        _clear(folder)
        entries = manifest["files"]
        report(Note(text=f"fetching {store.url} into {folder}"))
        for done, (name, entry) in enumerate(entries.items(), 1):
            _fetch_one(store, name, entry, folder)
            report(Progress(task="fetch", done=done, total=len(entries), unit="files"))
        found = store.find(MANIFEST)
        if found is not None:
            _checked(found, folder / MANIFEST)
        if not _has(folder, manifest):
            (folder / MANIFEST).unlink(missing_ok=True)
            raise ShortcutError(f"{store.url} changed while it was fetched", "run the same command again")
        _copied(folder).touch()


def _fetch_one(store: objects.Store, name: str, entry: dict[str, Any], folder: Path) -> None:
    """Fetch one of the files of a manifest. Raises CheckFailed if it is not the one that the manifest lists."""
    where = f"{store.url.rstrip('/')}/{name}"
    if name == MANIFEST or any(part.startswith(".") for part in name.split("/")):
        raise CheckFailed(f"{where} is in the manifest, but no file of shards", "prepare the folder again")
    found = store.find(name)
    if found is None:
        raise CheckFailed(f"{where} is missing", "prepare the folder again")
    if found.size not in (None, entry["bytes"]):
        raise CheckFailed(f"{where} has {found.size} bytes, the manifest says {entry['bytes']}", "prepare it again")
    files.make_folder((folder / name).parent)
    if _checked(found, folder / name) != entry["sha256"]:
        (folder / name).unlink()
        raise CheckFailed(f"{where} is damaged: its checksum is not that in the manifest", "prepare the folder again")


def _checked(found: objects.Object, path: Path) -> str:
    """Fetch an object; returns its hash. Raises ShortcutError if it can't be fetched."""
    try:
        return found.fetch(path)
    except Rejected as refused:
        raise ShortcutError(f"{found.url} {refused}", "run the same command again") from refused


def _copy(store: objects.Store, folder: Path, before: dict[str, Any] | None, report: Report) -> None:
    """Copy finished shards to a store, unless it has them. before: the manifest that was there at the beginning.

    What the manifest lists is there before the manifest is, so that nobody reads half a folder. A marker comes first:
    by it a later try knows what one that was killed has left.

    Raises UsageError if another command has written there meanwhile.
    """
    if not (folder / MANIFEST).is_file() or (before and _has(folder, before)):
        return
    with files.held(folder, PREPARE, "wait until it ends"):
        store = store.renewed()
        manifest, now = read_manifest(folder), _manifest(store)
        if (now or {}).get("checksum") != (before or {}).get("checksum"):
            raise UsageError(f"{store.url} was written by another command meanwhile", "choose another --out")
        store.remove(MANIFEST)
        store.put(f"{PREPARE}\n".encode(), files.MARKER)
        for done, name in enumerate(manifest["files"], 1):
            store.put(folder / name, name)
            report(Progress(task="copy", done=done, total=len(manifest["files"]), unit="files"))
        for name in (before or {"files": {}})["files"].keys() - manifest["files"].keys():
            store.remove(name)
        store.put(folder / MANIFEST, MANIFEST)
        _copied(folder).touch()
        report(Note(text=f"copied to {store.url}; {folder} is the copy on this machine"))
