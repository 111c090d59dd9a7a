"""The hashes of files that were read already, for another process that would read all of them again.

A file counts as unchanged by what git's index goes by: its size, its inode, and the times of its last change. One that
changed in the last moment before it was hashed is not listed, since a change in the same tick of the clock would not
show.
"""

import json
import os
import re
import time
from pathlib import Path

from shortcut_cli import files

SHA256 = re.compile("[0-9a-f]{64}")
RACY_S = 2.0  # file systems keep times to this much, at worst


class Hashes:
    """Hashes by the name of a file and what it looked like."""

    def __init__(self, folder: Path, *, keep: bool = False) -> None:
        """folder: where lists of them are, if there are any. keep: those that are asked for will be saved there."""
        self.folder, self.keep = folder, keep
        self.known: dict[str, str] = {}
        self.used: dict[str, str] = {}
        for path in sorted(folder.glob("*.jsonl")):
            with open(path, encoding="utf-8", errors="replace") as stream:
                self.known |= filter(None, map(_entry, stream))

    def sha256(self, relative: str, path: Path) -> str:
        """Hex SHA-256 of a file's bytes. Raises OSError as `files.sha256` does. relative: its path below its root."""
        if not (self.keep or self.known):
            return files.sha256(path)
        before = os.stat(path)
        key = _key(relative, before)
        sha256 = self.known.get(key)
        if sha256 is None:
            sha256 = files.sha256(path)
            settled = time.time() - max(before.st_mtime, before.st_ctime) > RACY_S
            if not settled or _key(relative, os.stat(path)) != key:
                return sha256
        if self.keep:
            self.used[key] = sha256
        return sha256

    def save(self, name: str) -> None:
        """List those that were asked for in a file of the folder, for whoever comes next."""
        files.make_folder(self.folder)
        with files.writing(self.folder / f"{name}.jsonl") as stream:
            stream.writelines(json.dumps(entry).encode() + b"\n" for entry in sorted(self.used.items()))


def _entry(line: str) -> tuple[str, str] | None:
    """A line of a list; None if it is damaged."""
    try:
        key, sha256 = json.loads(line)
    except (ValueError, TypeError, RecursionError):
        return None
    return (key, sha256) if isinstance(key, str) and SHA256.fullmatch(str(sha256)) else None


def _key(relative: str, status: os.stat_result) -> str:
    seen = (status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    return json.dumps([relative, *seen])
