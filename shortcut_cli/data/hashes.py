"""The hashes of files that were read already, for another process that would read all of them again.

A file counts as unchanged by what git's index goes by: its size, its inode, and the times of its last change. One that
changed in the last moment before it was hashed is not listed, since a change in the same tick of the clock would not
show.
"""

import hashlib
import json
import os
import re
import threading
import time
from pathlib import Path

import numpy as np

from shortcut_cli import files

ENTRY = re.compile(rb"([0-9a-f]{32}) ([0-9a-f]{64})\n")
KEY_BYTES, HASH_BYTES = 16, 32
RACY_S = 2.0  # file systems keep times to this much, at worst


class Hashes:
    """Hashes by the name of a file and what it looked like; 56 bytes for each."""

    def __init__(self, folder: Path, *, keep: bool = False) -> None:
        """folder: where lists of them are, if there are any. keep: those that are asked for will be saved there."""
        self.folder, self.keep = folder, keep
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
    seen = (status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    return hashlib.blake2b(json.dumps([relative, *seen]).encode(), digest_size=KEY_BYTES).digest()
