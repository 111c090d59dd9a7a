"""Downloaded weights: once, complete, with the right checksum; from servers that drop, truncate and corrupt."""

import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from test_checkpoint import watch
from typer.testing import CliRunner

from shortcut_cli import files
from shortcut_cli.cli.commands import app
from shortcut_cli.codec import encodec, loading, weights
from shortcut_cli.codec.layout import MONO, STEREO
from shortcut_cli.errors import Unavailable, UsageError

CONTENT = bytes(range(256)) * 40_000  # 10 MB, more than one block


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT, failing in one of several ways; records the first byte of each request."""

    mode = "good"
    requests: list[int]

    def do_GET(self):
        asked = self.headers.get("Range", "bytes=0-")
        first = int(asked.removeprefix("bytes=").removesuffix("-"))
        self.requests.append(first)
        if self.mode == "hangs":
            time.sleep(0.3)
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
        if self.mode != "silent":
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
        official = weights.Official("w.th", hashlib.sha256(CONTENT).hexdigest()[:8], MONO)
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
    return sorted(path.name for path in folder.iterdir() if path.name != ".shortcut")


def test_weights_are_fetched_once(serve, tmp_path):
    requests = serve("good")
    path = weights.resolve("encodec_24khz")
    assert path == tmp_path / "cache" / "w.th"
    assert path.read_bytes() == CONTENT
    assert weights.resolve("encodec_24khz") == path
    assert requests == [0]


def test_a_download_that_breaks_off_is_resumed(serve, tmp_path):
    requests = serve("drops")
    seen = []
    path = weights.fetch("encodec_24khz", lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert requests == [0, 3_500_000, 7_000_000]
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(set(done))
    assert (done[0], done[-1], set(totals)) == (1 << 20, len(CONTENT), {len(CONTENT)})
    assert names(tmp_path / "cache") == ["w.th"]


def test_a_server_that_does_not_answer_is_given_up_on(serve, monkeypatch):
    serve("hangs")
    monkeypatch.setattr(weights, "TIMEOUT_S", 0.05)
    with pytest.raises(Unavailable, match="timed out"):
        weights.fetch("encodec_24khz")


def test_one_process_at_a_time_fetches(serve, tmp_path):
    requests = serve("good")
    with files.held(tmp_path / "cache", "shortcut a"), pytest.raises(UsageError, match="in use: shortcut a, process"):
        weights.fetch("encodec_24khz")
    assert requests == []


def test_weights_are_synced_to_disk_before_they_get_their_name(serve, tmp_path, monkeypatch):
    serve("good")
    (tmp_path / "cache").mkdir()
    events = watch(monkeypatch, tmp_path / "cache")
    weights.fetch("encodec_24khz")
    size = len(CONTENT)
    assert events == [f"sync of a temporary file, {size} bytes", "a temporary file -> w.th", "sync of the folder"]


def test_a_server_without_ranges_starts_over(serve):
    requests = serve("forgets")
    assert weights.fetch("encodec_24khz").read_bytes() == CONTENT
    assert requests == [0, 6_000_000]


def test_a_partial_download_is_kept_for_the_next_time(serve, tmp_path):
    part = tmp_path / "cache" / "w.th.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT[:1000])
    requests = serve("stops")
    with pytest.raises(Unavailable, match="broke off after 1,000 of"):
        weights.fetch("encodec_24khz")
    assert requests == [1000] * 4
    assert part.read_bytes() == CONTENT[:1000]
    again = serve("good")
    assert weights.fetch("encodec_24khz").read_bytes() == CONTENT
    assert again == [1000]


def test_a_download_that_was_already_complete_is_checked_and_used(serve, tmp_path):
    part = tmp_path / "cache" / "w.th.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT)
    requests = serve("good")
    assert weights.fetch("encodec_24khz").read_bytes() == CONTENT
    assert requests == [len(CONTENT)]
    assert names(tmp_path / "cache") == ["w.th"]


def test_a_server_need_not_send_a_length(serve):
    serve("silent")
    seen = []
    assert weights.fetch("encodec_24khz", lambda done, total: seen.append((done, total))).read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), 0)


@pytest.mark.parametrize("start", [b"", CONTENT[:500], b"of another file" * 1_000_000])
def test_a_wrong_checksum_leaves_nothing(serve, tmp_path, start):
    serve("corrupt" if len(start) < len(CONTENT) and start != CONTENT[:500] else "good")
    (tmp_path / "cache").mkdir()
    if start:
        (tmp_path / "cache" / "w.th.part").write_bytes(b"y" + start[1:])
    with pytest.raises(Unavailable, match="SHA-256") as caught:
        weights.resolve("encodec_24khz")
    assert str(tmp_path / "cache" / "w.th") in caught.value.hint
    assert names(tmp_path / "cache") == []
    serve("good")
    assert weights.resolve("encodec_24khz").read_bytes() == CONTENT


def test_a_failed_download_is_reported_with_the_ways_out(serve, monkeypatch):
    serve("missing")
    with pytest.raises(Unavailable, match="Not Found") as caught:
        weights.resolve("encodec_24khz")
    assert "--set tokenizer.weights=mini works offline" in caught.value.hint
    monkeypatch.setenv("SHORTCUT_WEIGHTS_URL", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="refused"):
        weights.resolve("encodec_24khz")
    monkeypatch.setenv("SHORTCUT_WEIGHTS_URL", "nowhere")
    with pytest.raises(Unavailable, match="unknown url type"):
        weights.resolve("encodec_24khz")


def test_the_command(serve, tmp_path):
    serve("good")
    for worked in (True, False):
        done = CliRunner().invoke(app, ["codec", "get", "encodec_24khz", "--json"])
        found = json.loads(done.stdout)
        assert (found["path"], found["worked"]) == (str(tmp_path / "cache" / "w.th"), worked)


def test_the_published_checkpoints_are_those_that_the_package_downloads(monkeypatch):
    kinds = encodec.package()
    asked = {}

    def noted(kind):
        def get(name, repository):
            asked[kind] = name
            assert repository is None
            raise KeyError

        return get

    monkeypatch.setattr(kinds.EncodecModel, "_get_model", lambda *_, **__: None)
    assert kinds.ROOT_URL.rstrip("/") == weights.BASE_URL
    for kind in ("24khz", "48khz"):
        monkeypatch.setattr(kinds.EncodecModel, "_get_pretrained", noted(kind))
        with pytest.raises(KeyError):
            getattr(kinds.EncodecModel, f"encodec_model_{kind}")()
    assert asked == {kind: weights.OFFICIAL[f"encodec_{kind}"].file for kind in ("24khz", "48khz")}
    for official in weights.OFFICIAL.values():
        assert f"{official.sha256}.th" == official.file.split("-")[1]
        assert len(official.sha256) == 8
    assert [weights.OFFICIAL[f"encodec_{kind}"].layout for kind in ("24khz", "48khz")] == [MONO, STEREO]


def test_where_weights_are_cached_and_downloaded_from(tmp_path, monkeypatch):
    monkeypatch.setenv("SHORTCUT_CACHE", str(tmp_path))
    monkeypatch.delenv("SHORTCUT_WEIGHTS_URL", raising=False)
    assert weights.cached("encodec_48khz") == tmp_path / "encodec_48khz-7e698e3e.th"
    address = "https://dl.fbaipublicfiles.com/encodec/v0/encodec_24khz-d7cc33bc.th"
    assert weights.url("encodec_24khz") == address
    monkeypatch.setenv("SHORTCUT_WEIGHTS_URL", "http://mirror/a/")
    assert weights.url("encodec_24khz") == "http://mirror/a/encodec_24khz-d7cc33bc.th"
    # A cached file is used without any server, as are a path and mini.
    (tmp_path / "encodec_48khz-7e698e3e.th").write_bytes(b"put there")
    assert weights.resolve("encodec_48khz") == tmp_path / "encodec_48khz-7e698e3e.th"
    (tmp_path / "mine.pt").write_bytes(b"")
    assert weights.resolve(str(tmp_path / "mine.pt")) == tmp_path / "mine.pt"
    assert weights.resolve("mini").name == "mini.pt"
    with pytest.raises(UsageError, match="is a folder"):
        weights.resolve(str(tmp_path))
    with pytest.raises(UsageError, match="neither a file"):
        weights.resolve(str(tmp_path / "none"))


def test_a_name_determines_the_seed_and_the_layout():
    assert weights.seed("untrained:12") == (12, MONO)
    assert weights.seed("untrained_48khz:7") == (7, STEREO)
    assert weights.seed("encodec_24khz") is None
    names = ("untrained:12", "untrained_48khz:7", "encodec_24khz", "encodec_48khz", "mini", "some/path.pt")
    assert [weights.layout(name) for name in names] == [MONO, STEREO, MONO, STEREO, MONO, None]


def test_an_untrained_codec_has_its_seed_and_layout(monkeypatch):
    monkeypatch.setattr(encodec, "untrained", lambda *given: given)
    monkeypatch.setattr(encodec, "Codec", lambda *given: ("blocks", *given))
    monkeypatch.setattr(encodec, "Segments", lambda *given: ("segments", *given))
    monkeypatch.setattr(loading, "keep_freed_memory", lambda: None)
    loading._drawn.cache_clear()
    assert loading.codec("untrained:4") == ("blocks", (4, MONO), 150)
    assert loading.codec("untrained:4", 40) == ("blocks", (4, MONO), 40)
    assert loading.codec("untrained:5", 40) == ("blocks", (5, MONO), 40)
    assert loading.codec("untrained_48khz:5", 40) == ("segments", (5, STEREO))
    loading._drawn.cache_clear()


@pytest.mark.parametrize("name", ["nothing", "untrained:x", "untrained_48khz:", "untrained:" + "9" * 19])
def test_unknown_names_are_a_usage_error(name):
    with pytest.raises(UsageError):
        weights.seed(name) or weights.resolve(name)
