"""hf://: the shards of local files, of one commit, however requests fail. The Hub is a server of this file."""

import base64
import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest
from conftest import TEXT_SETTINGS, quiet, set_flags, shortcut
from kill import folder_sha256  # benchmarks/kill.py
from test_stores import fill, local, one_in_five, prepare, texts  # noqa: F401

from shortcut_cli.data import hub as hub_module
from shortcut_cli.data import inputs, objects, shards
from shortcut_cli.errors import Rejected, ShortcutError, Unavailable, UsageError
from shortcut_cli.stages import stores

pytestmark = pytest.mark.skipif(
    not find_spec("huggingface_hub"), reason="needs huggingface_hub: pip install 'shortcut-cli[hf]'"
)
TOKEN = "hf_token-of-the-test"
PAGE = 4  # entries of a listing in one answer


class Hub:
    """What of the Hub's HTTP interface is used: a dataset, corpus/texts, with a branch main of several commits.

    fault(method, path): "500", "503" or "cut".
    """

    def __init__(self):
        self.commits = []  # each: path -> bytes
        self.fault = lambda *_: ""
        self.seen = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                hub.seen.append((self.command, self.path, self.headers.get("Range", "")))
                fault = hub.fault(self.command, self.path)
                if fault in ("500", "503"):
                    self.answer(int(fault), b"", {})
                else:
                    self.answer(*hub.answer(self.path, self.headers, body), cut=fault == "cut")

            def answer(self, status, body, headers, cut=False):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", len(body))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if cut else body)
                self.close_connection = self.close_connection or cut

            do_GET = do_POST = handle_any  # noqa: N815

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.elsewhere = f"http://localhost:{self.server.server_port}"  # another host, as far as a client knows
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def commit(self, added, removed=()):
        before = self.commits[-1] if self.commits else {}
        self.commits.append({path: each for path, each in (before | added).items() if path not in removed})

    def revisions(self):
        """Files by the names of commits and branches."""
        return {digest(str(number)): files for number, files in enumerate(self.commits)} | {"main": self.commits[-1]}

    def answer(self, path, headers, body):
        """Status, body and headers."""
        parts = urlsplit(path)
        if path.startswith("/cdn/"):  # elsewhere, it has its own credentials
            content = next(each for files in self.commits for each in files.values() if digest(each) == path[5:])
            assert "Authorization" not in headers
            assert headers["Host"] not in self.url
            return ranged(content, headers)
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return wrong(401, "RepoNotFound")
        match = re.fullmatch(r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/([^/]+)/([^/]+)(?:/(.*))?)?", parts.path)
        if not match or match[1] != "corpus/texts":
            return wrong(404, "RepoNotFound")
        files = self.revisions().get(unquote(match[3] or "main"))
        if files is None:
            return wrong(404, "RevisionNotFound")
        return self.of_files(files, match[2], unquote(match[4] or ""), parts.query, headers, body)

    def of_files(self, files, what, below, query, headers, body):  # noqa: PLR0911
        if what in (None, "revision"):
            sha = next(name for name, each in self.revisions().items() if each is files)
            return 200, json.dumps({"id": "corpus/texts", "sha": sha}).encode(), {}
        if what == "commit":
            header, *lines = map(json.loads, body.splitlines())
            assert header["key"] == "header"
            added = {one["value"]["path"]: one["value"]["content"] for one in lines if one["key"] == "file"}
            removed = [one["value"]["path"] for one in lines if one["key"] == "deletedFile"]
            if any(path not in self.commits[-1] for path in removed):
                return wrong(404, "EntryNotFound")
            self.commit({path: base64.b64decode(content) for path, content in added.items()}, removed)
            return (
                200,
                json.dumps({"commitUrl": f"{self.url}/datasets/corpus/texts/commit/1", "commitOid": "1"}).encode(),
                {},
            )
        if what == "preupload":
            asked = [one["path"] for one in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in asked]
            return 200, json.dumps({"files": modes}).encode(), {}
        if what == "paths-info":
            asked = json.loads(body)["paths"]
            return 200, json.dumps([entry(path, files[path]) for path in asked if path in files]).encode(), {}
        if what == "tree":
            return self.page(files, below, query)
        assert what == "resolve", what
        if below not in files:
            return wrong(404, "EntryNotFound")
        if files[below] == b"gated":
            return wrong(403, "GatedRepo")
        if below.endswith("1.txt"):  # as large files are
            return 302, b"", {"Location": f"{self.elsewhere}/cdn/{digest(files[below])}"}
        return ranged(files[below], headers)

    def page(self, files, below, query):
        asked = parse_qs(query)
        assert asked["recursive"] == ["true"]
        names = sorted(path for path in files if path.startswith(f"{below}/" if below else ""))
        if not names:
            return wrong(404, "EntryNotFound")
        folders = sorted({path.rpartition("/")[0] for path in names} - {"", below})
        entries = [{"type": "directory", "path": path, "size": 0, "oid": digest(path)} for path in folders]
        entries += [entry(path, files[path]) for path in names]
        first = int(asked.get("cursor", ["0"])[0])
        sha = next(name for name, each in self.revisions().items() if each is files)
        following = f"{self.url}/api/datasets/corpus/texts/tree/{sha}/{below}?recursive=true&cursor={first + PAGE}"
        more = {"Link": f'<{following}>; rel="next"'} if first + PAGE < len(entries) else {}
        return 200, json.dumps(entries[first : first + PAGE]).encode(), more


def digest(content):
    return hashlib.sha1(content if isinstance(content, bytes) else content.encode()).hexdigest()


def entry(path, content):
    return {"type": "file", "path": path, "size": len(content), "oid": digest(content)}


def wrong(status, code):
    return status, b"", {"X-Error-Code": code, "X-Error-Message": f"an error of the Hub: {code}"}


def ranged(content, headers):
    if found := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", "")):
        return 206, content[int(found[1]) : int(found[2]) + 1 if found[2] else None], {}
    return 200, content, {}


@pytest.fixture
def hub(monkeypatch):
    """A server, which the environment leads to."""
    made = Hub()
    for name, value in {"HF_ENDPOINT": made.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1"}.items():
        monkeypatch.setenv(name, value)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def here(hub, monkeypatch):
    """The server, for this process, whose huggingface_hub may have read the environment before."""
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.url, "token": TOKEN})
    monkeypatch.setattr(objects, "WAITS_S", (0.0,) * 4)
    return hub


def test_a_hub_that_fails_one_request_in_five_gives_the_shards_of_local_files(hub, texts, local, tmp_path):  # noqa: F811
    hub.commit({"texts-2/other.txt": b"of another folder", "README.md": b"about"})
    fill(lambda key, content: hub.commit({f"texts/{key}": content}), texts)
    hub.fault = one_in_five(1)
    arguments = ("prepare", "text", "hf://datasets/corpus/texts/texts", "--recipe", "text-tiny", "--out", "out")
    done = shortcut(*arguments, "--max-bad", "0", "--workers", 1, "--json", *set_flags(*TEXT_SETTINGS), cwd=tmp_path)
    assert folder_sha256(tmp_path / "out") == folder_sha256(local)
    assert json.loads(done.stdout)["ignored"] == 1
    assert TOKEN not in done.stdout + done.stderr
    assert "HTTP" not in done.stderr  # what failed and passed is not told
    assert sum("/tree/" in path for _, path, _ in hub.seen) >= 4  # pages of four entries


@pytest.mark.parametrize(
    ("below", "found"),
    [
        ("", ["a/1.txt", "a/b/2.txt", "ab/3.txt", "é #4.txt"]),
        ("/", ["a/1.txt", "a/b/2.txt", "ab/3.txt", "é #4.txt"]),
        ("/a", ["1.txt", "b/2.txt"]),
        ("/a/b/", ["2.txt"]),
        ("/a/1.txt", ["1.txt"]),
        ("/é #4.txt", ["é #4.txt"]),
        ("/a*/*.txt", ["a/1.txt", "ab/3.txt"]),
        ("@main/a/b", ["2.txt"]),
        (f"@{digest('0')}", ["a/1.txt"]),
        (f"@{digest('0')}/a", ["1.txt"]),
    ],
)
def test_a_url_names_a_file_a_folder_or_a_glob_at_a_revision(here, tmp_path, below, found):
    here.commit({"a/1.txt": b"one", "README.md": b"about"})
    here.commit({"a/b/2.txt": b"two", "ab/3.txt": b"three", "é #4.txt": b"four"})
    listed = inputs.find([f"hf://datasets/corpus/texts{below}"], (".txt",), fetched=tmp_path).files
    assert [name for name, _ in listed] == (found if "*" not in below else [name.split("/")[-1] for name in found])
    contents = [b"".join(listed.object(place).blocks()) for place in range(len(listed))]
    numbers = {"1": b"one", "2": b"two", "3": b"three", "4": b"four"}
    assert contents == [numbers[name[-5]] for name in found]


def test_what_is_listed_and_what_is_fetched_are_of_one_commit(here):
    here.commit({f"{number}.txt": b"before" for number in range(3)})
    store = objects.Store("hf://datasets/corpus/texts")
    listed = dict(store.listed())
    here.commit({"0.txt": b"after!", "3.txt": b"new"})
    assert {b"".join(one.blocks()) for one in listed.values()} == {b"before"}
    assert dict(store.listed()) == listed
    assert b"".join(store.find("0.txt").blocks()) == b"before"
    assert store.find("3.txt") is None
    again = dict(store.renewed().listed())
    assert b"".join(again["0.txt"].blocks()) == b"after!"
    assert again["0.txt"].packed() != listed["0.txt"].packed()
    assert again["1.txt"].packed() == listed["1.txt"].packed()  # so that a merge does not fetch it again
    assert again["1.txt"].url == listed["1.txt"].url
    assert again.keys() - listed.keys() == {"3.txt"}


def test_a_file_that_a_url_names_is_of_the_commit_in_which_it_was_found(here):
    here.commit({"a.txt": b"before"})

    def pushed(_, path):
        if "/paths-info/" in path and len(here.commits) == 1:
            here.commit({"a.txt": b"after!"})
        return ""

    here.fault = pushed
    ((name, found),) = objects.Store("hf://datasets/corpus/texts/a.txt").listed()
    assert len(here.commits) == 2
    assert (name, b"".join(found.blocks())) == ("a.txt", b"before")


@pytest.mark.parametrize("second", ["/b", "@main/b", "/b/", "/b*", "/*/*.txt", "", "/b/0.txt"])
def test_all_files_of_a_command_are_of_one_commit(here, tmp_path, second):
    """A commit is pushed before the second URL is listed, and one before anything is read."""
    url = "hf://datasets/corpus/texts"
    both = [f"{folder}/{number}.txt" for folder in "ab" for number in range(5)]
    here.commit(dict.fromkeys(both, b"before"))

    def pushed(_, path):
        if "/tree/" in path and len(here.commits) < 3:
            here.commit(dict.fromkeys([*both, "b/new.txt"], b"after!"))
        return ""

    here.fault = pushed
    listed = inputs.find([f"{url}/a", f"{url}{second}"], (".txt",), fetched=tmp_path).files
    assert len(here.commits) == 3
    assert len(listed) == (6 if second == "/b/0.txt" else 10)
    assert {b"".join(listed.object(place).blocks()) for place in range(len(listed))} == {b"before"}
    here.commit({"a/0.txt": b"after!"})
    now = inputs.find([f"{url}/a/0.txt"], (".txt",), fetched=tmp_path).files
    assert b"".join(now.object(0).blocks()) == b"after!"


def test_shards_are_fetched_from_the_commit_of_their_manifest(here, local, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SHORTCUT_CACHE", str(tmp_path / "cache"))
    here.commit({f"s/{path.relative_to(local)}": path.read_bytes() for path in local.rglob("*") if path.is_file()})

    def pushed(_, path):
        if path.endswith(".bin") and len(here.commits) == 1:
            here.commit(dict.fromkeys(here.commits[0], b"of another preparation"))
        return ""

    here.fault = pushed
    folder = stores.fetched("hf://datasets/corpus/texts/s", quiet)
    assert len(here.commits) == 2
    assert folder_sha256(folder) == folder_sha256(local)


def test_shards_that_another_command_has_written_meanwhile_stay(here, local, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SHORTCUT_CACHE", str(tmp_path / "cache"))
    here.commit({"README.md": b"about"})
    theirs = {f"s/{path.relative_to(local)}": path.read_bytes() for path in local.rglob("*") if path.is_file()}

    def made():
        with stores.kept("hf://datasets/corpus/texts/s", quiet) as folder:
            shutil.copytree(local, folder, dirs_exist_ok=True)
            here.commit(theirs)

    with pytest.raises(UsageError, match="was written by another command meanwhile"):
        made()
    assert len(here.commits) == 2


def test_a_file_is_asked_for_once_and_read_on_from_where_it_broke_off(here, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "READ_BYTES", 1000)
    content = bytes(range(256)) * 40
    here.commit({"large1.txt": content, "small.txt": b"words"})  # the first is sent from elsewhere
    listed = dict(objects.Store("hf://datasets/corpus/texts").listed())
    here.seen.clear()
    faults = iter(["cut", "", "503"])
    here.fault = lambda _, path: next(faults, "") if "/cdn/" in path else ""
    assert listed["large1.txt"].fetch(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "file").read_bytes() == content
    assert [asked for _, path, asked in here.seen if "/cdn/" in path] == ["", "bytes=5000-"]
    here.seen.clear()
    assert b"".join(listed["small.txt"].blocks()) == b"words"
    assert len(here.seen) == 1


def test_a_listing_that_breaks_off_is_no_listing(here):
    """A folder that is not there has no files; one of whose pages is not there ends the command."""
    here.commit({f"{number}.txt": b"words" for number in range(9)})
    store, page = objects.Store("hf://datasets/corpus/texts"), here.page
    here.page = lambda files, below, query: (
        page(files, below, query) if "cursor" not in query else wrong(404, "EntryNotFound")
    )
    with pytest.raises(UsageError):
        dict(store.listed())


@pytest.mark.parametrize(
    ("url", "kind", "text"),
    [
        ("hf://datasets/corpus/nothing", UsageError, "hf://datasets/corpus/nothing does not exist, or is private"),
        ("hf://datasets/corpus/texts@else", UsageError, "hf://datasets/corpus/texts@else does not exist"),
        ("hf://datasets/corpus/texts/nothing", UsageError, "hf://datasets/corpus/texts/nothing names no objects"),
        ("hf://datasets/corpus/texts/*.wav", UsageError, "matches no objects"),
        ("hf://datasets/corpus", UsageError, "can't be opened"),
        ("hf://datasets/corpus/a b", UsageError, "can't be opened"),
    ],
)
def test_what_is_not_there_is_one_panel(here, tmp_path, url, kind, text):
    here.commit({"a.txt": b"words"})
    with pytest.raises(kind, match=re.escape(text)):
        inputs.find([url], (".txt",), fetched=tmp_path)


def test_a_file_that_others_may_not_read_is_a_reject(here):
    here.commit({"a.txt": b"gated"})
    listed = dict(objects.Store("hf://datasets/corpus/texts").listed())
    with pytest.raises(Rejected, match="can't be fetched: access is denied"):
        list(listed["a.txt"].blocks())


def test_without_a_network_the_command_ends(here, tmp_path, monkeypatch):
    import huggingface_hub

    url = "hf://datasets/corpus/texts"
    monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": "http://127.0.0.1:9", "token": TOKEN})
    with pytest.raises(ShortcutError, match=r"can't be opened: ConnectError") as error:
        inputs.find([url], (".txt",), fetched=tmp_path)
    assert error.value.exit_code == 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(Unavailable, match="HF_HUB_OFFLINE forbids it"):
        inputs.find([url], (".txt",), fetched=tmp_path)


def test_shards_in_a_repository(here, texts, local):  # noqa: F811
    here.commit({"README.md": b"about"})
    out = "hf://datasets/corpus/texts/shards"
    prepare([texts], out)
    written = {path.removeprefix("shards/"): each for path, each in here.commits[-1].items() if path != "README.md"}
    assert written == {path: (local / path).read_bytes() for path in written}
    assert "shards/manifest.json" not in here.commits[-2]
    folder = stores.fetched(out, quiet)
    assert shards.read_manifest(folder)["checksum"] == shards.read_manifest(local)["checksum"]


GOOD = entry("a.txt", b"words")
OTHERS = [
    {},
    "text",
    None,
    [1],
    [{}],
    [GOOD | {"size": None}],
    [GOOD | {"size": -1}],
    [GOOD | {"size": float("nan")}],
    [GOOD | {"oid": 5}],
    [GOOD | {"path": None}],
    [GOOD | {"path": "half \ud800"}],
    [{name: GOOD[name] for name in ("type", "path", "size")}],
]


@pytest.mark.parametrize("url", ["hf://datasets/corpus/texts", "hf://datasets/corpus/texts/a.txt"])
@pytest.mark.parametrize("other", OTHERS, ids=repr)
def test_a_server_that_answers_as_no_hub_does_is_one_panel(here, tmp_path, monkeypatch, url, other):
    here.commit({"a.txt": b"words"})
    of_files = here.of_files

    def changed(files, what, *rest):
        return (200, json.dumps(other).encode(), {}) if what in ("tree", "paths-info") else of_files(files, what, *rest)

    monkeypatch.setattr(here, "of_files", changed)
    with pytest.raises(ShortcutError, match="the server does not answer as the Hub does") as error:
        inputs.find([url], (".txt",), fetched=tmp_path)
    assert error.value.exit_code == 1


@pytest.mark.parametrize("other", [{}, {"id": "corpus/texts"}, {"id": "corpus/texts", "sha": None}], ids=repr)
def test_a_repository_without_a_commit_is_one_panel(here, tmp_path, monkeypatch, other):
    here.commit({"a.txt": b"words"})
    monkeypatch.setattr(here, "of_files", lambda *_: (200, json.dumps(other).encode(), {}))
    with pytest.raises(ShortcutError, match="the server does not answer as the Hub does"):
        inputs.find(["hf://datasets/corpus/texts"], (".txt",), fetched=tmp_path)


def test_the_rest_of_a_listing_is_asked_of_the_same_host(here, tmp_path, monkeypatch):
    here.commit({"a.txt": b"words"})
    other, page = Hub(), here.page

    def elsewhere(link):
        monkeypatch.setattr(here, "page", lambda *asked: (*page(*asked)[:2], {"Link": f'<{link}>; rel="next"'}))
        return inputs.find(["hf://datasets/corpus/texts"], (".txt",), fetched=tmp_path)

    try:
        with pytest.raises(ShortcutError, match="the server does not answer as the Hub does"):
            elsewhere(f"{other.url}/api/datasets/corpus/texts/tree/main")
        assert not other.seen
    finally:
        other.server.shutdown()
        other.server.server_close()
    with pytest.raises(ShortcutError, match="lists the same page again and again"):
        elsewhere(f"/api/datasets/corpus/texts/tree/{digest('0')}?recursive=true")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"Retry-After": "99999"}, 300),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({}, 0),
    ],
)
def test_a_server_that_asks_for_rest_gets_it(here, tmp_path, monkeypatch, headers, seconds):
    here.commit({"a.txt": b"words"})
    busy, answer, slept = ["tree", "resolve"], here.answer, []

    def busy_once(path, *rest):
        if busy and f"/{busy[0]}/" in path:
            busy.pop(0)
            return 429, b"", headers
        return answer(path, *rest)

    monkeypatch.setattr(here, "answer", busy_once)
    monkeypatch.setattr(hub_module.time, "sleep", slept.append)
    listed = inputs.find(["hf://datasets/corpus/texts"], (".txt",), fetched=tmp_path).files
    assert b"".join(listed.object(0).blocks()) == b"words"
    assert [one for one in slept if one] == ([seconds] * 2 if seconds else [])


def test_an_old_huggingface_hub_is_one_panel(here, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "__version__", "1.31.0")
    with pytest.raises(Unavailable, match=r"needs huggingface_hub 2\.4 or later; 1\.31\.0 is installed"):
        inputs.find(["hf://datasets/corpus/texts"], (".txt",), fetched=tmp_path)
