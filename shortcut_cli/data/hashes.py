"""The hashes of files and objects that were read already, for another process that would read all of them again.

A file counts as unchanged by what git's index goes by: its size, its inode, and the times of its last change. One that
changed in the last moment before it was hashed is not listed, since a change in the same tick of the clock would not
show. An object counts as unchanged by what its store lists as its version; its bytes are kept too, and hashed again.
"""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np

from shortcut_cli import files
from shortcut_cli.data.objects import Object

ENTRY = re.compile(rb"([0-9a-f]{32}) ([0-9a-f]{64})\n")
KEY_BYTES, HASH_BYTES = 16, 32
RACY_S = 2.0  # file systems keep times to this much, at worst
AT_ONCE = 1 << 12  # files that are given to threads at once: each waits in a future of its own

Result = TypeVar("Result")


class Hashes:
    """Hashes by the name of a file and what it looked like; 56 bytes for each."""

    def __init__(self, folder: Path, *, keep: bool = False) -> None:
        """folder: where lists of them are, if there are any. keep: those that are asked for will be saved there.

        The bytes of objects are kept in a folder beside it.
        """
        self.folder, self.keep = folder, keep
        self.objects = folder.with_name("objects")
        self.lock = threading.Lock()
        self.used = bytearray()  # a key and a hash after the other
        known = bytearray()
        for path in sorted(folder.glob("*.txt")):
            with open(path, "rb") as stream:
                for line in stream:
                    if entry := ENTRY.fullmatch(line):  # else it is damaged
                        known += bytes.fromhex((entry[1] + entry[2]).decode())
        entries = np.frombuffer(known, np.dtype([("first", "<u8"), ("rest", "V40")]))
        self.order = np.argsort(entries["first"], kind="stable").astype(np.uint32)
        self.firsts, self.known = entries["first"][self.order], known

    def sha256(self, relative: str, path: Path) -> str:
        """Hex SHA-256 of a file's bytes. Raises OSError as `files.sha256` does. relative: its path below its root."""
        if not (self.keep or self.known):
            return files.sha256(path)
        before = os.stat(path)
        key = _key(relative, before)
        sha256 = self._find(key)
        if sha256 is None:
            sha256 = files.sha256(path)
            settled = time.time() - max(before.st_mtime, before.st_ctime) > RACY_S
            if not settled or _key(relative, os.stat(path)) != key:
                return sha256
        self.note(key, sha256)
        return sha256

    def fetched(self, wanted: Object, path: Path) -> str:
        """Hex SHA-256 of an object, whose bytes are at `path` then: fetched, unless another process has kept them.

        Raises Rejected and OSError as `Object.fetch` does.
        """
        if not (self.keep or self.known) or not wanted.is_told_apart:
            return wanted.fetch(path)
        key = _digest(wanted.url, wanted.packed())
        sha256 = self._find(key)
        if sha256 is None or not self._linked(sha256, path):
            sha256 = wanted.fetch(path)
            if self.keep:
                files.make_folder(self.objects)
                os.replace(path, self._kept(sha256, path))
                _link(path, self._kept(sha256, path))
        self.note(key, sha256)
        return sha256

    def _linked(self, sha256: str, path: Path) -> bool:
        """Whether the bytes of an object were kept and still have their hash; then `path` leads to them."""
        kept = self._kept(sha256, path)
        if not kept.is_file() or files.sha256(kept) != sha256:
            return False
        _link(path, kept)
        return True

    def _kept(self, sha256: str, path: Path) -> Path:
        """Where the bytes of an object are kept. path: has its suffix."""
        return self.objects / f"{sha256}{''.join(path.suffixes)}"

    def _find(self, key: bytes) -> str | None:
        """The hash that is known for a key; None if there is none."""
        first = np.frombuffer(key, "<u8")[0]
        for place in self.order[self.firsts.searchsorted(first) : self.firsts.searchsorted(first, "right")].tolist():
            entry = self.known[place * (KEY_BYTES + HASH_BYTES) : (place + 1) * (KEY_BYTES + HASH_BYTES)]
            if entry[:KEY_BYTES] == key:
                return entry[KEY_BYTES:].hex()
        return None

    def note(self, key: bytes, sha256: str) -> None:
        """Keep a hash for whoever comes next, if that is wanted."""
        if self.keep:
            with self.lock:
                self.used += key + bytes.fromhex(sha256)

    def save(self, name: str) -> None:
        """List those that were asked for in a file of the folder, for whoever comes next."""
        files.make_folder(self.folder)
        size = KEY_BYTES + HASH_BYTES
        with files.writing(self.folder / f"{name}.txt") as stream:
            for first in range(0, len(self.used), size):
                entry = self.used[first : first + size]
                stream.write(f"{entry[:KEY_BYTES].hex()} {entry[KEY_BYTES:].hex()}\n".encode())


def _key(relative: str, status: os.stat_result) -> bytes:
    return _digest(relative, status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def _digest(*seen: str | int) -> bytes:
    return hashlib.blake2b(json.dumps(seen).encode(), digest_size=KEY_BYTES).digest()


def _link(path: Path, kept: Path) -> None:
    """Make a path lead to a file, whatever a killed process has left in its place."""
    path.unlink(missing_ok=True)
    path.symlink_to(os.path.relpath(kept, path.parent))


def in_threads(pool: ThreadPoolExecutor, work: Callable[[int], Result], count: int) -> Iterator[Result]:
    """work(number) of each of so many files, in order."""
    blocks = (range(count)[first : first + AT_ONCE] for first in range(0, count, AT_ONCE))
    return chain.from_iterable(pool.map(work, block) for block in blocks)
