"""Weights that are fetched: once, whole, with the right sum; from servers that drop, truncate, corrupt and forget."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from typer.testing import CliRunner

from shortcut_cli.cli import app
from shortcut_cli.codec import weights
from shortcut_cli.codec.stream import MONO
from shortcut_cli.errors import Unavailable, UsageError

CONTENT = bytes(range(256)) * 40_000  # 10 MB, more than one block


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT in one of the ways in which servers fail; remembers the first byte of each request."""

    mode = "good"
    requests: list[int]

    def do_GET(self):
        asked = self.headers.get("Range", "bytes=0-")
        first = int(asked.removeprefix("bytes=").removesuffix("-"))
        self.requests.append(first)
        content = CONTENT if self.mode != "corrupt" else b"x" + CONTENT[1:]
        if self.mode == "missing":
            self.send_error(404)
            return
        if first >= len(content):
            self.send_error(416)
            return
        if self.mode == "forgets":
            first = 0  # no ranges: everything from the beginning
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        drops = {"drops": 3_500_000, "forgets": 6_000_000 if len(self.requests) == 1 else len(content), "stops": 0}
        self.wfile.write(content[first : first + drops.get(self.mode, len(content))])

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Start a server on localhost that offers CONTENT as the official weights; returns its requests."""
    servers = []

    def start(mode):
        handler = type("Handler", (Server,), {"mode": mode, "requests": []})
        official = weights.Official("w.th", 10, hashlib.sha256(CONTENT).hexdigest()[:8], MONO)
        monkeypatch.setitem(weights.OFFICIAL, "encodec_24khz", official)
        server = HTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("SHORTCUT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("SHORTCUT_WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}")
        return handler.requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_weights_are_fetched_once(serve, tmp_path):
    requests = serve("good")
    path = weights.resolve("encodec_24khz")
    assert path == tmp_path / "cache" / "w.th"
    assert path.read_bytes() == CONTENT
    assert weights.resolve("encodec_24khz") == path
    assert requests == [0]


def test_a_connection_that_drops_is_taken_up_where_it_was(serve, tmp_path):
    requests = serve("drops")
    seen = []
    path = weights.fetch("encodec_24khz", lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert requests == [0, 3_500_000, 7_000_000]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert names(tmp_path / "cache") == ["w.th"]


def test_a_server_without_ranges_begins_again(serve):
    requests = serve("forgets")
    assert weights.fetch("encodec_24khz").read_bytes() == CONTENT
    assert requests == [0, 6_000_000]


def test_what_arrived_is_kept_for_the_next_time(serve, tmp_path):
    part = tmp_path / "cache" / "w.th.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT[:1000])
    requests = serve("stops")
    with pytest.raises(Unavailable, match="broke off after 1,000 of"):
        weights.fetch("encodec_24khz")
    assert requests == [1000] * weights.ATTEMPTS
    assert part.read_bytes() == CONTENT[:1000]
    serve("good")
    assert weights.fetch("encodec_24khz").read_bytes() == CONTENT


@pytest.mark.parametrize("start", [b"", CONTENT[:500], b"of another file" * 1_000_000])
def test_a_wrong_sum_leaves_nothing(serve, tmp_path, start):
    serve("corrupt" if len(start) < len(CONTENT) and start != CONTENT[:500] else "good")
    (tmp_path / "cache").mkdir()
    if start:
        (tmp_path / "cache" / "w.th.part").write_bytes(b"y" + start[1:])
    with pytest.raises(Unavailable, match="SHA-256") as caught:
        weights.resolve("encodec_24khz")
    assert str(tmp_path / "cache" / "w.th") in caught.value.hint
    assert names(tmp_path / "cache") == []


def test_what_is_not_there_is_said_with_the_ways_out(serve, monkeypatch):
    serve("missing")
    with pytest.raises(Unavailable, match="Not Found") as caught:
        weights.resolve("encodec_24khz")
    assert "--set tokenizer.weights=mini works offline" in caught.value.hint
    monkeypatch.setenv("SHORTCUT_WEIGHTS_URL", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="refused"):
        weights.resolve("encodec_24khz")


def test_the_command(serve, tmp_path):
    serve("good")
    for worked in (True, False):
        done = CliRunner().invoke(app, ["codec", "get", "encodec_24khz", "--json"])
        found = json.loads(done.stdout)
        assert (found["path"], found["worked"]) == (str(tmp_path / "cache" / "w.th"), worked)


@pytest.mark.parametrize("name", ["nothing", "untrained:x", "untrained_48khz:"])
def test_unknown_names_are_a_usage_error(name):
    with pytest.raises(UsageError):
        weights.seed(name) or weights.resolve(name)
