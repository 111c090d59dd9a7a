"""Objects in stores, by fsspec: listed in a stream, read once and hashed meanwhile, tried again if a request fails.

A URL such as s3://bucket/folder may name whatever fsspec has a file system for: s3, gs, hf, memory and others. These
read their settings and credentials from the environment (docs/object-stores.md); none are read here.
"""

import errno
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from shortcut_cli import files
from shortcut_cli.data import hub
from shortcut_cli.errors import Rejected, ShortcutError, Unavailable, UsageError

Result = TypeVar("Result")

READ_BYTES = 4 << 20  # of an object at a time, in one request
THREADS = 16  # objects that are fetched at once: waiting for a store takes no processor
WAITS_S = (0.5, 1.0, 2.0, 4.0)  # before another try of a request, each shortened by up to a half at random
LONGEST_REASON = 200
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
PACKAGES |= {"az": "adlfs", "abfs": "adlfs", "http": "aiohttp", "https": "aiohttp"}
EXTRAS = {"s3fs": "s3", "huggingface_hub": "hf"}  # which bring a package, in the version that was tried
VERSION_KEYS = ("size", "ETag", "etag", "generation", "blob_id", "mtime", "created")  # that change with an object
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError, TypeError, ImportError)
BUGS = (AttributeError, LookupError, AssertionError, NameError)  # they keep their tracebacks
INVALID = "ParamValidationError"  # of botocore: no request was made
SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSWORD|KEY|CREDENTIAL|SIGNATURE", re.I)
HOST_PORT = re.compile(r"([^:@]*@)?([^:@]*|\[[0-9a-fA-F:.]*\]):\d+")
AUTHORITY = re.compile(r"(://)[^/\s@]*@")
QUERY = re.compile(r"([?&][^=\s&]*(?:signature|credential|token|secret|key|password)[^=\s&]*=)[^&\s\"']*", re.I)


class _Changed(Exception):
    """An object is not the one any more that was listed."""


def check(url: str) -> None:
    """Raise UsageError, without the URL, if it holds a password or a query: it would be shown, and kept in recipes."""
    scheme, _, rest = url.partition("://")
    host = rest.partition("/")[0]  # or a bucket; a password in it may hold slashes
    password = ":" in host and not HOST_PORT.fullmatch(host) and not host.startswith("arn:")
    if password or (scheme.lower() in ("http", "https") and ("@" in host or "?" in rest)):
        raise UsageError(
            f"a {_plain(scheme)}:// URL has credentials or a query in it, which would be shown and kept in files",
            "give credentials in the environment or in the store's own configuration file",
        )


def _plain(text: str) -> str:
    """Text of others in one line, without secrets: what stands before an @ in a URL, and values of the environment."""
    secrets = [value for name, value in os.environ.items() if SECRET_NAME.search(name) and len(value) >= 8]
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    text = QUERY.sub(r"\1***", AUTHORITY.sub(r"\1", " ".join(text.split())))
    return text[:LONGEST_REASON] + "..." if len(text) > LONGEST_REASON else text


def reason(error: Exception) -> str:
    """What went wrong with a store, in one line, without secrets."""
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    if isinstance(error, PermissionError):
        return "access is denied"
    if isinstance(error, _Changed):
        return "it changed after it was listed"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{type(error).__name__}: {_plain(text)}" if text else type(error).__name__


def failed(url: str, what: str, error: Exception) -> ShortcutError:
    """The error that ends a command, since it could not do `what` with a URL. Raises it if it is a bug."""
    if isinstance(error, BUGS):
        raise error
    if isinstance(error, ShortcutError):
        return error
    if isinstance(error, FileNotFoundError):
        return UsageError(f"{url} does not exist", "check the names of bucket and folder")
    if isinstance(error, PermissionError):
        return UsageError(f"{url} can't be {what}: access is denied", "check the credentials in the environment")
    if _lacks_credentials(error):
        return Unavailable(
            f"{url} can't be {what}: no credentials were found",
            "set them in the environment, for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE; "
            "FSSPEC_S3_ANON=true reads public buckets without",
        )
    if isinstance(error, ValueError) or type(error).__name__ == INVALID:
        return UsageError(f"{url} can't be {what}: {reason(error)}", "check the names of bucket and folder")
    return ShortcutError(f"{url} can't be {what}: {reason(error)}", "run the same command again")


def _lacks_credentials(error: Exception) -> bool:
    return "Credentials" in type(error).__name__  # NoCredentialsError of botocore, DefaultCredentialsError of Google


def _may_pass(error: Exception) -> bool:
    if isinstance(error, (*FINAL, *BUGS, _Changed, ShortcutError)) or type(error).__name__ == INVALID:
        return False
    return not _lacks_credentials(error)


def again(step: Callable[[], Result]) -> Result:
    """The result of a request to a store; one that fails for a reason that may pass is tried again, after a while.

    Libraries of stores raise whatever they like, so every exception counts as a failed request.
    """
    for wait in WAITS_S:
        try:
            return step()
        except Exception as error:
            if not _may_pass(error):
                raise
        time.sleep(wait * random.uniform(0.5, 1))  # noqa: S311
    return step()


@dataclass(frozen=True, slots=True)
class Object:
    """One object of a store, as it was listed."""

    store: "Store"
    name: str  # as its file system names it: for S3, bucket and key
    version: tuple[tuple[str, Any], ...]  # those of VERSION_KEYS that were listed
    is_root: bool = False  # the URL of the store names the object itself

    def packed(self) -> str:
        """Its version, short."""
        known = dict(self.version)
        values = [known.get(key) for key in VERSION_KEYS]
        return json.dumps(values[: max((at + 1 for at, value in enumerate(values) if value is not None), default=0)])

    @classmethod
    def unpacked(cls, store: "Store", name: str, version: str) -> "Object":
        """An object whose version was `packed`."""
        pairs = zip(VERSION_KEYS, json.loads(version), strict=False)
        return cls(store, name, tuple((key, value) for key, value in pairs if value is not None))

    @property
    def size(self) -> int | None:
        """Its bytes; None if the store does not say."""
        found: int | None = dict(self.version).get("size")
        return found

    @property
    def is_told_apart(self) -> bool:
        """Whether its version differs from that of other bytes of the same size."""
        return any(key != "size" for key, _ in self.version)

    @property
    def url(self) -> str:
        """What tells it from all others."""
        return f"{self.store.scheme}://{self.name}"

    def fetch(self, path: Path) -> str:
        """Write its bytes to a file, complete or not at all; returns their hex SHA-256, taken while they are read.

        Raises Rejected with a reason if it can't be read, or is not what was listed; OSError if the file can't be
        written.
        """
        digest = hashlib.sha256()
        with files.writing(path, durable=False) as stream:
            for block in self.blocks():
                digest.update(block)
                stream.write(block)
        return digest.hexdigest()

    def blocks(self) -> Iterator[bytes]:
        """Its bytes in order, READ_BYTES at a time. A request that fails is tried again from where it was.

        Raises Rejected as `fetch` does.
        """
        reading = _Reading(self)
        try:
            while block := self._next(reading):
                yield block
        finally:
            reading.close()

    def _next(self, reading: "_Reading") -> bytes:
        try:
            return again(reading.block)
        except BUGS:
            raise
        except Exception as error:
            passing = _may_pass(error) or isinstance(error, _Changed | FileNotFoundError)
            raise Rejected(f"can't be fetched: {reason(error)}", passing=passing) from error


def _version(info: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What is known of the version of an object; some file systems give a time now as a number, now as a datetime."""
    known = ((key, info[key]) for key in VERSION_KEYS if info.get(key) is not None)
    return tuple((key, one.timestamp() if hasattr(one, "timestamp") else one) for key, one in known)


class _Reading:
    """An object that is being read."""

    def __init__(self, wanted: Object) -> None:
        self.wanted = wanted
        self.stream: Any = None
        self.place = 0  # bytes that have been read

    def block(self) -> bytes:
        """The next bytes; empty at the end. After an error the next call opens the object again, at the same place."""
        try:
            if self.stream is None:
                self._open()
            block = bytes(self.stream.read(READ_BYTES))
        except Exception:
            self.close()
            raise
        size = self.wanted.size
        if size is not None and (self.place + len(block) > size or (not block and self.place < size)):
            self.close()
            raise OSError(errno.EIO, f"got {self.place + len(block):,} of {size:,} bytes")
        self.place += len(block)
        return block

    def _open(self) -> None:
        repository = self.wanted.store.repository
        system, name = self.wanted.store.system, self.wanted.name
        if repository:  # of one commit, in which it does not change
            self.stream = repository.open(name, self.place)
            return
        self.stream = system.open(name, "rb", block_size=READ_BYTES, cache_type="none")
        found = dict(_version(getattr(self.stream, "details", None) or system.info(name)))
        if any(found.get(key, value) != value for key, value in self.wanted.version):
            raise _Changed
        if self.place:
            self.stream.seek(self.place)

    def close(self) -> None:
        """Close the object, if it is open."""
        stream, self.stream = self.stream, None
        if stream is not None:
            with suppress(Exception):  # it may be what has failed
                stream.close()


class Store:
    """What a URL names: an object, or a folder, which is all keys that begin with its own and a slash.

    A repository of the Hub is read as it was when it was first asked, however often that is.
    """

    def __init__(self, url: str, commits: dict[Hashable, str] | None = None) -> None:
        """commits: those of the repositories that stores read, for all that are given the same.

        Raises UsageError if no file system has the URL's scheme, Unavailable if a package for it is missing.
        """
        check(url)
        self.url = url
        scheme, _, rest = url.partition("://")
        self.scheme = scheme.lower()
        self.system = self._system()
        self.root = str(self.system._strip_protocol(f"{self.scheme}://{rest}"))
        self.repository: hub.Repository | None = None
        commits = {} if commits is None else commits
        if self.scheme == "hf" and not self.root.startswith("buckets/"):
            try:
                self.repository = again(lambda: hub.Repository(self.system, self.root, commits))
            except ImportError as error:
                raise self._missing(error) from error
            except Exception as error:
                raise failed(self.url, "opened", error) from error
            self.root = self.repository.root

    def _system(self) -> Any:
        try:
            import fsspec

            kind = fsspec.get_filesystem_class(self.scheme)
        except ValueError as error:
            raise UsageError(
                f"{self.url}: fsspec knows no scheme {self.scheme}://",
                f"known are {', '.join(f'{scheme}://' for scheme in sorted(['file', *PACKAGES]))}, and fsspec's others",
            ) from error
        except ImportError as error:
            raise self._missing(error) from error
        try:
            # A listing that is kept would grow, and hide that an object has changed.
            system = again(lambda: kind(**kind._get_kwargs_from_urls(self.url), use_listings_cache=False))
        except Exception as error:
            raise failed(self.url, "opened", error) from error
        if self.scheme in ("s3", "s3a"):
            system.retries = 1  # botocore tries again by AWS_MAX_ATTEMPTS, and `again` does; once more would be long
            system.max_concurrency = 2  # parts of a file, 50 MB each, that are held to be sent
        return system

    def _missing(self, error: ImportError) -> Unavailable:
        package = PACKAGES.get(self.scheme)
        wanted = f"'shortcut-cli[{EXTRAS[package]}]'" if package in EXTRAS else package
        remedy = f"pip install {wanted}" if package else _plain(str(error))
        return Unavailable(f"{self.scheme}:// needs {package or 'a package'}, which is not installed", remedy)

    def renewed(self) -> "Store":
        """What the URL names now."""
        return Store(self.url)

    def listed(self, begin: str = "") -> Iterator[tuple[str, Object]]:
        """(path below the URL, object) of every object; one that the URL itself names has its own last part.

        begin: only those are wanted whose paths begin with it; a store may list others too.

        Raises ShortcutError if they can't be listed.
        """
        try:
            for name, info in self._infos(begin):
                is_root = name == self.root
                relative = name.rpartition("/")[2] if is_root else name[len(self.root.rstrip("/")) + 1 :]
                yield relative, Object(self, name, _version(info), is_root)
        except Exception as error:
            raise failed(self.url, "listed", error) from error

    def _infos(self, begin: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, what is known of it) of every object."""
        if self.repository:
            again(self.repository.pin)
        if not self.url.endswith("/") and (own := self._info(self.root)):
            yield self.root, own
        if self.repository:
            yield from self._pages(self.repository)
            return
        if not hasattr(self.system, "call_s3"):
            found = again(lambda: self.system.find(self.root, detail=True))
            yield from ((name, info) for name, info in found.items() if name != self.root)
            return
        bucket, key, _ = self.system.split_path(self.root)
        asked = {"Bucket": bucket, "Prefix": (f"{key.rstrip('/')}/" if key else "") + begin}
        while True:  # a page of 1,000 keys at a time; fsspec's own listing would hold all of them
            page = again(lambda: self.system.call_s3("list_objects_v2", **asked))
            for entry in page.get("Contents", ()):
                yield f"{bucket}/{entry['Key']}", {"size": entry["Size"], "ETag": entry["ETag"]}
            if not page.get("IsTruncated"):
                return
            if asked.get("ContinuationToken") == page["NextContinuationToken"]:
                raise OSError(errno.EIO, "the store lists the same page again and again")
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def _pages(self, repository: hub.Repository) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, what is known of it) of every file of a folder, none if there is no such folder."""
        try:
            page, following = again(repository.page)
        except FileNotFoundError:
            return
        yield from page
        before = set[str]()
        while following:
            if following in before:
                raise OSError(errno.EIO, "the store lists the same page again and again")
            before.add(following)
            page, following = again(partial(repository.page, following))
            yield from page

    def _info(self, name: str) -> dict[str, Any] | None:
        """What is known of an object; None if there is none of this name."""
        if self.repository:
            return again(partial(self.repository.info, name))
        try:
            found: dict[str, Any] = again(lambda: self.system.info(name))
        except FileNotFoundError:
            return None
        return found if found.get("type") == "file" else None

    def find(self, relative: str) -> Object | None:
        """An object below the URL; None if there is none. Raises ShortcutError if the store does not say."""
        name = f"{self.root.rstrip('/')}/{relative}"
        try:
            if self.repository:
                again(self.repository.pin)
            info = self._info(name)
        except Exception as error:
            raise failed(self.url, "read", error) from error
        return None if info is None else Object(self, name, _version(info))

    def is_marker(self, found: Object) -> bool:
        """Whether an object is the marker of a folder of ours. Raises ShortcutError if it can't be read."""
        if found.size not in range(1, files.HOLDER_CHARACTERS):
            return False
        try:
            return b"".join(found.blocks()).startswith(b"shortcut ")
        except Rejected as refused:
            raise ShortcutError(f"{found.url} {refused}", "run the same command again") from refused

    def exists(self) -> bool:
        """Whether the URL names objects. Raises ShortcutError if the store does not say."""
        try:
            return next(self._infos(), None) is not None
        except FileNotFoundError:  # some file systems raise it for a folder, too; S3 for a bucket
            return False
        except Exception as error:
            raise failed(self.url, "listed", error) from error

    def is_empty(self) -> bool:
        """Whether the URL names no objects. Raises ShortcutError if the store does not say."""
        try:
            return next(self._infos(), None) is None
        except Exception as error:
            raise failed(self.url, "listed", error) from error

    def put(self, content: Path | bytes, relative: str) -> None:
        """Copy a file, or write some bytes, to below the URL. Raises ShortcutError if that fails."""
        name = f"{self.root.rstrip('/')}/{relative}"
        try:
            if isinstance(content, bytes):
                again(lambda: self.system.pipe_file(name, content))
            else:
                again(lambda: self.system.put_file(str(content), name))
        except Exception as error:
            raise failed(self.url, "written", error) from error

    def remove(self, relative: str) -> None:
        """Remove an object below the URL, if it is there. Raises ShortcutError if that fails."""
        if self.repository and not self.find(relative):  # it would be a commit that the Hub refuses
            return
        try:
            again(lambda: self.system.rm_file(f"{self.root.rstrip('/')}/{relative}"))
        except FileNotFoundError:
            return
        except Exception as error:
            raise failed(self.url, "written", error) from error
