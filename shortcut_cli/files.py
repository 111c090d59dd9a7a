"""Files that are either complete or absent (temporary name, sync, rename), and folders with one owner at a time."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from io import BufferedRandom
from pathlib import Path
from typing import BinaryIO, TextIO

from shortcut_cli import cleanup
from shortcut_cli.errors import UsageError

BLOCK_BYTES = 1 << 20
CACHE_VARIABLE = "SHORTCUT_CACHE"
FULL = {errno.EFBIG, errno.ENOSPC, errno.EDQUOT}
MOST_BYTES = 64_000_000  # of a file of ours that is read whole
GROWING = {"log.jsonl", "output.txt"}  # files in folders that are ours that are written in place
WORKING = {".partial", ".staging"}  # folders in those, for what is not finished
MARKER = ".shortcut"  # in a folder that is ours: which command it belongs to, and the lock of the process at work
PAGE = "report.html"  # in a folder that is ours: the page about what it holds
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
HOLDER_CHARACTERS = 200  # of a marker that are read; anything may have been written into it


def cache_folder() -> Path:
    """$SHORTCUT_CACHE if set, else shortcut/ in the user's cache folder."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shortcut"


def is_url(name: str) -> bool:
    """Whether a name is that of something in a store, as s3://bucket/folder is; file:///folder lies on this machine."""
    return bool(URL.match(name)) and not name.lower().startswith("file://")


def place(name: str) -> Path:
    """Where a folder that a path or a URL names lies on this machine: one in a store has its copy in the cache."""
    if is_url(name):
        return cache_folder() / "stored" / hashlib.sha256(name.rstrip("/").encode()).hexdigest()[:32]
    return Path(name[len("file://") :] if name.lower().startswith("file://") else name)


def check_known(path: Path | str) -> None:
    """Raise UsageError if a path at which nothing was found may exist: a folder above it can't be searched."""
    try:
        os.stat(path)
    except PermissionError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}", "a folder above it does not let you in") from error
    except (OSError, ValueError):  # ValueError: it holds a NUL
        pass


def check_out(folder: Path) -> None:
    """Raise UsageError if a folder can't be made, since a link that leads nowhere is in its place, or above it."""
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            raise UsageError(f"{path} is a link that leads nowhere", "remove the link, or choose another --out")


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are missing, unless a signal is ending this process.

    Its end removes the marker of a folder in which there is nothing else, so nothing may appear there after that.

    Raises UsageError as `check_out` does.
    """
    check_out(folder)
    with cleanup.steady():
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """If the disk, a quota or a limit is full in this block, the OSError names the file that is written."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in FULL:
            error.filename = str(path)
        raise


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
    temporary = path.with_name(f".{_short(path)}.{os.getpid()}.tmp")
    with cleanup.due(lambda: os.unlink(temporary)), naming(path):
        try:
            with cleanup.steady():
                stream = open(temporary, "w+b")  # noqa: SIM115 - `leave` may come once it is there
            with stream:
                yield stream
                stream.flush()
                if durable:
                    os.fsync(stream.fileno())
            with cleanup.steady():
                if previous and path.exists():
                    os.replace(path, previous)
                os.replace(temporary, path)
        except OSError as error:
            if error.filename == str(temporary):
                error.filename, error.filename2 = str(path), None  # the user knows nothing of the temporary file
            raise
        finally:
            with suppress(OSError):  # there is none, or the folder can't be written
                os.unlink(temporary)
    if durable:
        sync_folder(path.parent)


class Shielded:
    """A file for a C library that would not hand an OSError on: what comes after one has no effect.

    Whoever gives it to the library calls `check` afterwards.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def _try(self, step: Callable[[], int], otherwise: int) -> int:
        if self.error is None:
            try:
                return step()
            except OSError as error:
                self.error = error
        return otherwise

    def write(self, content: bytes) -> int:
        """As in any file."""
        return self._try(lambda: self.stream.write(content), len(content))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As in any file."""
        return self._try(lambda: self.stream.seek(offset, whence), offset)

    def tell(self) -> int:
        """As in any file."""
        return self._try(self.stream.tell, 0)

    def check(self) -> None:
        """Raise the OSError that there was, if any."""
        if self.error:
            raise self.error


def _short(path: Path) -> str:
    """The name of a file, or as much of it that the name of its temporary file fits if its own does."""
    return os.fsdecode(os.fsencode(path.name)[:200])


def write(path: Path, content: bytes | str, *, durable: bool = True) -> None:
    """Write a whole file at once, as `writing` does; text is encoded as UTF-8."""
    with writing(path, durable=durable) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


def unfinished(path: Path) -> bool:
    """Whether a process was killed while it was writing a file, by the temporary file that it left."""
    return bool(_left(path))


def _left(path: Path) -> list[Path]:
    """The temporary files of a file that were left by processes that were killed while writing it."""
    found = [(each, each.name.split(".")[-2]) for each in path.parent.glob(f".{glob.escape(_short(path))}.*.tmp")]
    return [each for each, p in found if p.isdecimal() and (int(p) == os.getpid() or not _alive(int(p)))]


def check_free(folder: Path, unit: str, names: Iterable[str]) -> None:
    """Raise UsageError if `together` would, which then leaves everything as it is.

    What a process has left that was killed is known by the list that it left too.
    """
    check_out(folder)
    ours: set[str] = set()
    for path in _left(folder / unit):
        with suppress(OSError, ValueError, RecursionError):  # it had not made any
            ours |= {str(name) for name in json.loads(content(path))}
    for name in names:
        if os.path.lexists(folder / name) and name not in ours:
            raise UsageError(f"{folder / name} exists already", "choose another --out")


@contextmanager
def together(folder: Path, unit: str, names: Sequence[str]) -> Iterator[None]:
    """Files that are made in this block, all or none of them; a temporary file lists them meanwhile.

    Raises UsageError if one of them is there already, and was not left by a process that was killed in this block.
    """
    check_free(folder, unit, names)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    listed = folder / f".{unit}.{os.getpid()}.tmp"

    def undo() -> None:
        for name in (*names, listed.name):
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # there is something else in it
            for path in missing:
                path.rmdir()

    with cleanup.due(undo):
        try:
            make_folder(folder)
            write(listed, json.dumps(list(names)), durable=False)
            yield
            listed.unlink()
            everything = {unit, *names}
            for path in folder.glob(".*.tmp"):
                if path.name[1:].rsplit(".", 2)[0] in everything:
                    _sweep_one(path)
        except BaseException:
            undo()
            raise


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is removed with all it holds when the block ends, or a signal ends the process."""
    folder = Path(tempfile.mkdtemp(prefix="shortcut-"))

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)

    with cleanup.due(remove):
        try:
            yield folder
        finally:
            remove()


@contextmanager
def diverted(number: int, target: BinaryIO | None = None) -> Iterator[None]:
    """What anyone in this process, C libraries too, writes to a standard stream goes to a file, or nowhere.

    number: 1 for stdout, 2 for stderr; if that stream is closed, nothing happens.
    """
    try:
        kept = os.dup(number)
    except OSError:
        yield
        return
    with nullcontext(target) if target else open(os.devnull, "wb") as taken:
        os.dup2(taken.fileno(), number)
    try:
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks. Raises OSError as `regular` does."""
    digest = hashlib.sha256()
    with regular(path) as stream:
        while block := stream.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError if it can't be, or is none: a pipe would be waited for.

    What was a regular file when it was found can be a pipe by the time that it is opened, so this asks the open file.
    """
    stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return stream


def content(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a regular file. Raises OSError as `regular` does, ValueError if there are more than `most`."""
    with regular(path) as stream:
        found = stream.read(most + 1)
    if len(found) > most:
        raise ValueError(f"it has over {most:,} bytes")
    return found


def sweep(folder: Path, pattern: str = "") -> None:
    """Remove the temporary files, of all names or of those that match, of processes that were killed while writing."""
    for path in folder.glob(f".{pattern}*.tmp"):
        _sweep_one(path)


def _sweep_one(path: Path) -> None:
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


def owner(folder: Path) -> str:
    """The command that a folder belongs to, such as "shortcut train", by the marker in it; empty: none of ours."""
    path = folder / MARKER
    try:
        with regular(path) as stream:
            line = stream.readline(HOLDER_CHARACTERS).decode(errors="replace")
    except OSError:
        return ""
    return line.partition(",")[0].strip() if line.startswith("shortcut ") else ""


def refuse_unfinished(folder: Path) -> None:
    """Raise UsageError if a folder, which has no result, belongs to a command of ours: it has not come to its end."""
    if command := owner(folder):
        raise UsageError(f"{folder} is not complete: its `{command}` has not come to its end", "run that command again")


IN_USE = "wait until it ends, or choose another --out"


@contextmanager
def held(
    folder: Path,
    what: str,
    hint: str = IN_USE,
    *,
    known: Callable[[Path], bool] = lambda _: False,
    shared: bool = False,
) -> Iterator[None]:
    """Lock a folder for this process and mark it as ours, unless it has files in it and is not ours.

    what: the command that holds it, for the marker, and for the message to others; hint: for them too. known: whether
    a folder without a marker is one of this command even so, by what else is in it. shared: others may hold it in the
    same way at once, on other machines too, but nobody may hold it for himself.

    The lock is the kernel's (flock) on the marker, so it ends with the process, however that ends. The marker stays,
    unless nothing else is in the folder; then it is removed, with the folders that were made for it.

    Raises UsageError if the folder has files and is not one of this command, or if another process, which is named,
    holds it.
    """
    _check_ours(folder, what, known)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    stream = _locked(folder / MARKER, f"{folder} is in use", hint, shared=shared)
    with stream:
        if shared:  # what others do with it is theirs: nothing is swept, and the marker stays
            _sign(stream, f"{what}, a task")
            yield
            return

        def release() -> None:
            with suppress(OSError):  # the folder was removed meanwhile
                if _is_bare(folder):
                    (folder / MARKER).unlink()
                    for path in made:
                        path.rmdir()
                else:
                    _sign(stream, what)

        with cleanup.due(release):
            try:
                _sign(stream, f"{what}, process {os.getpid()}")
                sweep(folder)
                yield
            finally:
                release()


def check_empty(folder: Path) -> None:
    """Raise UsageError if a folder is neither new nor empty."""
    check_out(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", "choose another --out")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", "choose another --out")


def check_held(folder: Path, what: str, *, known: Callable[[Path], bool] = lambda _: False) -> None:
    """Raise UsageError if `held` would: a check before anything heavy is loaded, which makes nothing."""
    _check_ours(folder, what, known)
    if (folder / MARKER).is_file():
        _locked(folder / MARKER, f"{folder} is in use", IN_USE).close()


def _check_ours(folder: Path, what: str, known: Callable[[Path], bool]) -> None:
    """Raise UsageError if a folder has files in it and is not one of `what`."""
    check_out(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", "choose another --out")
    theirs = "" if (folder / MARKER).is_symlink() else owner(folder)
    if not theirs and folder.exists() and not _is_free(folder, known):
        raise UsageError(f"{folder} is not empty, and was not made by `{what}`", "choose another --out")
    _check_places(folder)
    if theirs not in ("", what) and not _is_bare(folder):
        raise UsageError(f"{folder} belongs to `{theirs}`", "choose another --out")


def _check_places(folder: Path) -> None:
    """Raise UsageError if what we write in place is a link, which may lead to files of the user, or a pipe."""
    for names, what, is_kind in ((GROWING, "file", stat.S_ISREG), (WORKING, "folder", stat.S_ISDIR)):
        for path in (folder / name for name in names):
            if os.path.lexists(path) and not is_kind(path.lstat().st_mode):
                raise UsageError(f"{path} is no {what} of shortcut, but a link, or something else", "move it away")


def _is_free(folder: Path, known: Callable[[Path], bool]) -> bool:
    """Whether a folder that is not marked as ours may be: it is known, or there is nothing in it."""
    marker = folder / MARKER
    if marker.is_symlink() or (marker.exists() and (not marker.is_file() or marker.stat().st_size)):
        return False  # of someone else; what a link leads to is not ours to write
    return known(folder) or _is_bare(folder)


def _is_bare(folder: Path) -> bool:
    """Whether there is nothing but a marker in a folder."""
    return all(path.name == MARKER for path in folder.iterdir())


def _locked(path: Path, message: str, hint: str, *, shared: bool = False) -> TextIO:
    """The marker, open and locked. Raises UsageError if another process has locked it."""
    while True:
        stream = os.fdopen(
            os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+", encoding="utf-8", errors="replace"
        )
        try:
            fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                return stream
            stream.close()  # its holder has removed it since it was opened
        except BlockingIOError:
            with stream:
                holder = stream.readline(HOLDER_CHARACTERS).strip() or "another process"
            raise UsageError(f"{message}: {holder}", hint) from None
        except BaseException:
            stream.close()
            raise


def _sign(stream: TextIO, text: str) -> None:
    """Write a line into a marker, which is not empty meanwhile, whenever this process is killed."""
    os.pwrite(stream.fileno(), f"{text}\n".encode(), 0)
    os.ftruncate(stream.fileno(), len(text.encode()) + 1)
