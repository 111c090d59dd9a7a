"""Files that are either complete or absent (temporary name, sync, rename), and folders with one owner at a time."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path

from shortcut_cli.errors import UsageError

BLOCK_BYTES = 1 << 20
CACHE_VARIABLE = "SHORTCUT_CACHE"


def cache_folder() -> Path:
    """$SHORTCUT_CACHE if set, else shortcut/ in the user's cache folder."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shortcut"


def sync_folder(folder: Path) -> None:
    """Make the file names in a folder durable, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path, previous: Path | None = None, *, durable: bool = True) -> Iterator[BufferedRandom]:
    """A binary file that appears at `path`, complete, when the block ends without an error, and otherwise not at all.

    previous: where to keep the file that was at `path` before. durable: wait for the disk, so that this holds through a
    power cut too; without it a power cut can leave any bytes, and whoever reads the file has to check it.
    """
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    if durable:
        sync_folder(path.parent)


def write(path: Path, content: bytes | str, *, durable: bool = True) -> None:
    """Write a whole file at once, as `writing` does; text is encoded as UTF-8."""
    with writing(path, durable=durable) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _sweep(folder: Path) -> None:
    """Remove the temporary files of processes that were killed while writing."""
    for path in folder.glob(".*.tmp"):
        process = path.name.split(".")[-2]
        if process.isdecimal() and not _alive(int(process)):
            path.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Lock a folder for this process. what: the command that holds it, for the message to others.

    The lock is the kernel's (flock), so it ends with the process, however that ends.

    Raises UsageError, which names the holder, if another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            raise UsageError(f"{folder} is in use: {holder}", "wait until it ends, or choose another --out") from None
        stream.truncate(0)
        stream.write(f"{what}, process {os.getpid()}")
        stream.flush()
        _sweep(folder)
        yield
        stream.truncate(0)
