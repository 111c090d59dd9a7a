"""A repository of the Hugging Face Hub, behind hf://, as it is at one commit.

The file system of huggingface_hub keeps all of a listing, lists the folder of each file again to open it, and takes
what it has listed for what a branch has now. So only writing goes through it.
"""

import errno
import re
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from shortcut_cli.errors import Unavailable, UsageError

MOST_REST_S = 300.0  # the Hub counts requests over so long (huggingface.co/docs/hub/rate-limits)
LEAST = (2, 4)  # version of huggingface_hub


class Repository:
    """What a URL names: a file or a folder of a repository, which is read as it was when it was first asked."""

    def __init__(self, system: Any, root: str, commits: dict[Hashable, str]) -> None:
        """system: that file system. root: [datasets/]owner/name[@revision][/folder].

        commits: in which revisions are read, by all that share this.

        Raises UsageError if there is no such repository or revision, ValueError if its name can't be one.
        """
        from huggingface_hub import HfApi, __version__

        if tuple(map(int, __version__.split(".")[:2])) < LEAST:
            raise Unavailable(
                f"hf:// needs huggingface_hub {LEAST[0]}.{LEAST[1]} or later; {__version__} is installed",
                "pip install 'shortcut-cli[hf]'",
            )
        self.api = HfApi(endpoint=system.endpoint, token=system.token)
        try:
            with _translated():
                self.place = system.resolve_path(root)
        except FileNotFoundError as error:
            raise UsageError(
                f"hf://{root} does not exist, or is private",
                "check the names of repository and revision; private ones need HF_TOKEN, or `hf auth login`",
            ) from error
        self.root = str(self.place.unresolve())
        self.commits = commits
        self.key = (self.place.repo_type, self.place.repo_id, self.place.revision)

    @property
    def commit(self) -> str:
        """That is read; `pin` is called before."""
        return self.commits[self.key]

    def pin(self) -> None:
        """Ask which commit the revision is at, unless that is known: from now on it is read."""
        if self.key in self.commits:
            return
        with _translated():
            place = self.place
            info = self.api.repo_info(place.repo_id, revision=place.revision, repo_type=place.repo_type)
        if not info.sha:
            raise _something_else()
        self.commits[self.key] = info.sha

    def page(self, following: str = "") -> tuple[list[tuple[str, dict[str, Any]]], str]:
        """(name, what is known of it) of some files below the root, and what to give as `following` for the next ones.

        Raises FileNotFoundError if there is no such folder.
        """
        url = following or f"{self._address('tree', self.place.path_in_repo)}?recursive=true"
        answer = self._asked("GET", url)
        found = [(self._name(entry), _info(entry)) for entry in _listed(answer)]
        following = answer.links.get("next", {}).get("url", "")
        return found, self._own(urljoin(url, following)) if following else ""

    def info(self, name: str) -> dict[str, Any] | None:
        """What is known of a file; None if there is none of this name."""
        if not (path := self._path(name)):
            return None
        answer = self._asked("POST", self._address("paths-info"), json={"paths": [path], "expand": False})
        return next((_info(entry) for entry in _listed(answer) if entry["path"] == path), None)

    def open(self, name: str, place: int) -> "Stream":
        """The bytes of a file from a place on."""
        from huggingface_hub import hf_hub_url

        at = self.place
        url = hf_hub_url(
            at.repo_id, self._path(name), repo_type=at.repo_type, revision=self.commit, endpoint=self.api.endpoint
        )
        with _translated():
            return Stream(url, self._headers(), place)

    def _headers(self) -> dict[str, str]:
        found: dict[str, str] = _http().build_hf_headers(token=self.api.token)
        return found

    def _asked(self, method: str, url: str, **options: Any) -> Any:
        from huggingface_hub import constants

        with _translated():
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            answer = _http().get_session().request(method, url, headers=self._headers(), timeout=timeout, **options)
            _http().hf_raise_for_status(answer)
            return answer

    def _own(self, url: str) -> str:
        """A URL of the Hub. Raises OSError if it is of another host, which must not see the token."""
        if urlsplit(url)[:2] != urlsplit(self.api.endpoint)[:2]:
            raise _something_else()
        return url

    def _address(self, what: str, path: str = "") -> str:
        below = f"/{quote(path, safe='')}" if path else ""
        return f"{self.api.endpoint}/api/{self.place.repo_type}s/{self.place.repo_id}/{what}/{self.commit}{below}"

    def _name(self, entry: dict[str, Any]) -> str:
        return f"{self.place.root}/{entry['path']}"

    def _path(self, name: str) -> str:
        return name.removeprefix(self.place.root).lstrip("/")


class Stream:
    """A file that is being read."""

    def __init__(self, url: str, headers: dict[str, str], place: int) -> None:
        from huggingface_hub import constants

        headers = headers | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={place}-"} if place else {})
        self._blocks: Iterator[bytes] | None = None
        self._context: Any = (
            _http().get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        )
        answer = self._context.__enter__()
        try:
            _http().hf_raise_for_status(answer)
            if place and answer.status_code != 206:
                raise OSError("the server does not send a part of a file")
        except BaseException:
            self.close()
            raise
        self._answer = answer

    def read(self, length: int) -> bytes:
        """The next bytes, up to that many; empty at the end."""
        if self._blocks is None:
            self._blocks = self._answer.iter_bytes(length)
        return next(self._blocks, b"")

    def close(self) -> None:
        """Give up the connection."""
        self._context.__exit__(None, None, None)


def _http() -> Any:
    """The functions of huggingface_hub behind its own requests; it does not export their types."""
    import huggingface_hub.utils

    return huggingface_hub.utils


def _rest_s(headers: Any) -> float:
    """Seconds that a server asks to wait, in one of the ways of the Hub; 0 if it does not say."""
    found = re.fullmatch(r"(\d+)", headers.get("Retry-After", "")) or re.search(
        r";t=(\d+)", headers.get("RateLimit", "")
    )
    return float(found[1]) if found else 0.0


def _something_else() -> OSError:
    return OSError(errno.EPROTO, "the server does not answer as the Hub does")


def _listed(answer: Any) -> list[dict[str, Any]]:
    """The files of a listing. Raises OSError if it is none."""
    try:
        if not isinstance(every := answer.json(), list):
            raise _something_else()
        found = [entry for entry in every if entry["type"] == "file"]
        for entry in found:
            entry["path"].encode()  # half a character is refused
            if type(entry["size"]) is not int or entry["size"] < 0 or not isinstance(entry["oid"], str):
                raise _something_else()
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _something_else() from error
    return found


def _info(entry: dict[str, Any]) -> dict[str, Any]:
    return {"type": "file", "size": entry["size"], "blob_id": entry["oid"]}


@contextmanager
def _translated() -> Iterator[None]:
    """Raises what `objects` knows in place of the Hub's own errors that do not pass."""
    from huggingface_hub import errors

    try:
        yield
    except KeyError as error:  # of huggingface_hub, if an answer lacks something
        raise _something_else() from error
    except errors.OfflineModeIsEnabled as error:
        raise Unavailable("hf:// needs the network, and HF_HUB_OFFLINE forbids it", "unset HF_HUB_OFFLINE") from error
    except errors.GatedRepoError as error:
        raise PermissionError(str(error)) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise FileNotFoundError(str(error)) from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 429:
            time.sleep(min(_rest_s(error.response.headers), MOST_REST_S))
        if error.response.status_code in (401, 403):
            raise PermissionError(str(error)) from error
        raise
