"""Object stores: the same shards as from local files, however requests fail, and nothing of half a folder.

memory:// and a store of this file need no package; s3:// is moto's server on localhost, behind a proxy that fails.
"""

import hashlib
import http.client
import json
import os
import shutil
import sys
import threading
import tracemalloc
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import soundfile
from conftest import TEXT_SETTINGS, quiet, set_flags, shortcut, write_texts
from kill import folder_sha256  # benchmarks/kill.py

from shortcut_cli import files
from shortcut_cli.config import reading
from shortcut_cli.data import inputs, objects, shards
from shortcut_cli.demo import material as demo_material
from shortcut_cli.errors import CheckFailed, Missing, Rejected, ShortcutError, Unavailable, Unfinished, UsageError
from shortcut_cli.stages import preparation, stores

NEEDS_S3 = pytest.mark.skipif(
    not (find_spec("moto") and find_spec("s3fs")), reason="needs moto and s3fs: pip install 'shortcut-cli[moto]'"
)
SECRET = "a-secret-of-the-test"


def prepare(paths, out, *settings, name="text-tiny", max_bad="0", report=quiet, merge=False):
    """What `shortcut prepare` does in one process; out: a folder or a URL."""
    given = TEXT_SETTINGS if name == "text-tiny" else ()
    recipe = reading.read(name, [*given, f"data.shards={out}", *settings])
    with stores.kept(str(out), report) as folder:
        options = {"n_workers": 1, "max_bad": max_bad, "report": report, "merge": merge}
        return preparation.prepare(recipe, map(str, paths), folder, **options)


@pytest.fixture
def in_this_process(in_this_process, monkeypatch):
    """Besides, tries again at once."""
    monkeypatch.setattr(objects, "WAITS_S", (0.0,) * 4)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with 12 texts, one of them below a folder and one in a file of records."""
    root = tmp_path_factory.mktemp("corpus") / "texts"
    write_texts(root, 12)
    (root / "more").mkdir()
    (root / "more" / "ten o'clock.txt").write_text("it is ten\n" * 20)
    (root / "records.jsonl").write_text("".join(json.dumps({"text": f"record {n}"}) + "\n" for n in range(5)))
    (root / "cover.png").write_text("not of the domain")
    return root


@pytest.fixture(scope="module")
def local(texts, tmp_path_factory):
    """The shards of `texts`."""
    folder = tmp_path_factory.mktemp("local") / "shards"
    prepare([texts], folder)
    return folder


@pytest.fixture
def memory():
    """The store behind memory://, empty."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def fill(put, root):
    """Call `put(key, bytes)` for every file below a folder."""
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        put(path.relative_to(root).as_posix(), path.read_bytes())


# --- without S3


def test_of_several_processes_of_a_machine_one_fetches_and_the_others_wait(local, memory, tmp_path, monkeypatch):
    fill(lambda key, content: memory.pipe_file(f"/several/{key}", content), local)
    monkeypatch.setenv("SHORTCUT_CACHE", str(tmp_path / "cache"))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    waits = []

    def fetch_meanwhile(seconds):
        waits.append(seconds)
        assert len(waits) == 1
        monkeypatch.setenv("LOCAL_RANK", "0")
        stores.fetched("memory://several", quiet)
        monkeypatch.setenv("LOCAL_RANK", "1")

    monkeypatch.setattr(stores.time, "sleep", fetch_meanwhile)
    said = []
    folder = stores.fetched("memory://several", said.append)
    assert waits == [stores.WAIT_S]
    assert not said  # it fetched nothing itself
    assert shards.read_manifest(folder)["checksum"] == shards.read_manifest(local)["checksum"]


def test_a_bug_of_a_store_keeps_its_traceback(memory, tmp_path, in_this_process, monkeypatch):
    memory.pipe_file("/bugs/one.txt", b"words")
    calls = []

    def broken(*_, **__):
        calls.append(1)
        return {}["missing"]

    for method in ("_open", "info"):
        with monkeypatch.context() as patched:
            patched.setattr(type(memory), method, broken)
            calls.clear()
            with pytest.raises(KeyError, match="missing"):
                prepare(["memory://bugs"], tmp_path / method)
            assert len(calls) == 1


def test_the_shards_of_objects_are_those_of_a_local_copy(texts, local, memory, tmp_path, in_this_process):
    fill(lambda key, content: memory.pipe_file(f"/bucket/deep/{key}", content), texts)
    memory.pipe_file("/bucket/deeper/other.txt", b"of another folder whose name begins alike")
    prepare(["memory://bucket/deep"], tmp_path / "objects")
    prepare([f"file://{texts}"], tmp_path / "file")
    assert folder_sha256(tmp_path / "objects") == folder_sha256(tmp_path / "file") == folder_sha256(local)
    assert not (tmp_path / "objects" / ".staging").exists()
    remembered = shards.source_paths_file(shards.read_manifest(tmp_path / "objects"))
    assert json.loads(remembered.read_text()) == [str(texts)]  # where it was last prepared from
    prepare(["memory://bucket/deep"], tmp_path / "objects")
    assert json.loads(remembered.read_text()) == ["memory://bucket/deep"]


def test_paths_of_several_kinds_are_read_together(texts, memory, tmp_path, in_this_process):
    for number in range(3):
        memory.pipe_file(f"/b/x/{number}.txt", f"object {number}".encode())
    (tmp_path / "x").mkdir()
    fill(lambda key, content: (tmp_path / key).write_bytes(content), tmp_path)
    for number in range(3):
        (tmp_path / "x" / f"{number}.txt").write_text(f"object {number}")
    prepare([texts, "memory://b/x/"], tmp_path / "mixed")
    prepare([tmp_path / "x", texts], tmp_path / "folders")
    assert folder_sha256(tmp_path / "mixed") == folder_sha256(tmp_path / "folders")


def test_splits_of_a_corpus_name_objects_by_their_keys(texts, memory, tmp_path, in_this_process):
    for key in ("a/1", "b/2", "c/3"):
        memory.pipe_file(f"/data/{key}.txt", f"text of {key[0]}".encode())
    given = ("data.splits.train=['a']", "data.splits.val=['data/b']", "data.splits.test=['c/3.txt']")
    manifest = prepare(["memory://data"], tmp_path / "out", *given)
    assert {name: split["documents"] for name, split in manifest["splits"].items()} == dict.fromkeys(shards.SPLITS, 1)


class Given(fsspec.AbstractFileSystem):
    """A store whose requests fail as a test wants it, and which counts the bytes that are read of each object."""

    protocol = "given"
    cachable = False
    content: ClassVar[dict] = {}  # name -> bytes, or a function of the place and the length
    sizes: ClassVar[dict] = {}
    read: ClassVar[dict] = {}
    fail = staticmethod(lambda *_: None)

    def info(self, path, **_):
        name = self._strip_protocol(path)
        if name not in self.sizes:
            raise FileNotFoundError(name)
        return {"name": name, "size": self.sizes[name], "type": "file", "ETag": hash(self.content[name])}

    def find(self, path, **_):
        self.fail("find", path)
        return {name: self.info(name) for name in self.sizes if name.startswith(f"{path}/")}

    def _open(self, path, **_):
        self.fail("open", path)
        return Stream(self, self._strip_protocol(path))


class Stream:
    """An open object of `Given`."""

    def __init__(self, store, name):
        self.store, self.name, self.place, self.details = store, name, 0, store.info(name)

    def seek(self, place):
        self.place = place

    def read(self, length):
        self.store.fail("read", self.name, self.place)
        content = self.store.content[self.name]
        length = min(length, self.store.sizes[self.name] - self.place)
        block = content(self.place, length) if callable(content) else content[self.place : self.place + length]
        self.place += len(block)
        self.store.read[self.name] = self.store.read.get(self.name, 0) + len(block)
        return block

    def close(self):
        pass


@pytest.fixture
def given(monkeypatch):
    """Puts content into the store behind given://."""
    fsspec.register_implementation("given", Given, clobber=True)
    monkeypatch.setattr(Given, "read", {})

    def put(content, fail=lambda *_: None):
        monkeypatch.setattr(Given, "content", content)
        monkeypatch.setattr(Given, "sizes", {name: len(each) for name, each in content.items()})
        monkeypatch.setattr(Given, "fail", staticmethod(fail))

    return put


def listed(url):
    return dict(objects.Store(url).listed())


def failing(seed, share=0.2):
    """A share of all requests fails, by a seed."""
    draw = Random(seed)

    def fail(*_):
        if draw.random() < share:
            raise ConnectionError("a request failed")

    return fail


def test_one_request_in_five_fails_and_every_byte_is_read_once(given, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "WAITS_S", (0.0,) * 8)
    monkeypatch.setattr(objects, "READ_BYTES", 7)
    content = {f"top/{n}.txt": Random(n).randbytes(n * 13) for n in range(20)}
    given(content, failing(1))
    for name, one in listed("given://top").items():
        digest = one.fetch(tmp_path / name)
        assert (tmp_path / name).read_bytes() == content[f"top/{name}"]
        assert digest == hashlib.sha256(content[f"top/{name}"]).hexdigest()
        assert Given.read.get(f"top/{name}", 0) == one.size


def test_waits_grow_and_are_shortened_at_random(given, monkeypatch):
    waits = []
    monkeypatch.setattr(objects.time, "sleep", waits.append)
    given({"top/a.txt": b"a"}, failing(1, share=1))
    with pytest.raises(ShortcutError, match=r"given://top/ can't be listed: ConnectionError: a request failed"):
        listed("given://top/")
    assert len(waits) == len(objects.WAITS_S)
    assert all(longest / 2 <= wait < longest for wait, longest in zip(waits, objects.WAITS_S, strict=True))


def test_a_large_object_passes_through_little_memory(given, tmp_path):
    size = 60_000_000

    class Zeros:
        def __len__(self):
            return size

        def __call__(self, _, length):
            return bytes(length)

    given({"top/large.txt": Zeros()})
    (one,) = listed("given://top").values()
    tracemalloc.start()
    digest = one.fetch(tmp_path / "large")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * objects.READ_BYTES
    with open(tmp_path / "large", "rb") as stream:
        assert digest == hashlib.file_digest(stream, "sha256").hexdigest()
    assert (tmp_path / "large").stat().st_size == size


def test_an_object_that_ends_early_is_asked_for_the_rest(given, tmp_path):
    whole, cut = b"0123456789" * 10, [True]

    class Cut:
        def __len__(self):
            return len(whole)

        def __call__(self, place, length):
            return whole[place : place + (30 if cut else length)] if not cut or place < 30 else b""

    def fail(what, *_):
        if what == "open" and Given.read:
            cut.clear()

    given({"top/a.txt": Cut()}, fail)
    (one,) = listed("given://top").values()
    one.fetch(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == whole
    assert Given.read == {"top/a.txt": len(whole)}


@pytest.mark.parametrize("when", ["before it is opened", "while it is read", "when it is opened again", "removed"])
def test_an_object_that_changes_after_it_was_listed_is_refused(given, tmp_path, monkeypatch, when):
    monkeypatch.setattr(objects, "WAITS_S", (0.0,) * 4)
    monkeypatch.setattr(objects, "READ_BYTES", 10)
    content = {"top/a.txt": b"a" * 40}
    given(content)
    (one,) = listed("given://top").values()
    failed = []

    def fail(what, _, place=0):
        if when == "while it is read" and place == 20:
            Given.content["top/a.txt"], Given.sizes["top/a.txt"] = b"a" * 50, 50
        elif when == "when it is opened again" and place == 20 and not failed:
            failed.append(place)
            Given.content["top/a.txt"] = b"b" * 40
            raise ConnectionError

    given(content, fail)
    if when == "before it is opened":
        Given.content["top/a.txt"] = b"c" * 40
    if when == "removed":
        del Given.sizes["top/a.txt"]
    with pytest.raises(
        Rejected, match=r"can't be fetched: (it changed after it was listed|it does not exist|OSError: g)"
    ) as refused:
        one.fetch(tmp_path / "a")
    assert refused.value.passing
    assert not (tmp_path / "a").exists()


def test_what_cannot_be_fetched_is_a_reject_and_the_same_command_tries_it_again(
    given, texts, local, tmp_path, in_this_process
):
    content = {}
    fill(lambda key, found: content.__setitem__(f"top/{key}", found), texts)

    def fail(what, name, *_):
        if what == "read" and name == "top/003.txt":
            raise ConnectionError(f"https://user:hunter2222@host/?X-Amz-Signature=abcdef: {SECRET}")

    given(content, fail)
    with pytest.raises(Unfinished) as unfinished:
        prepare(["given://top"], tmp_path / "out", max_bad="1")
    assert "003.txt: can't be fetched: ConnectionError: https://host/?X-Amz-Signature=***" in unfinished.value.message
    (line,) = shards.read_lines(tmp_path / "out" / "rejects.jsonl", bool)
    assert line["source"] == "003.txt"
    assert line["passing"]
    assert shards.read_manifest(tmp_path / "out")["rejected"] == 1
    assert not (tmp_path / "out" / ".staging" / "fetched").exists()
    given(content)
    assert prepare(["given://top"], tmp_path / "out")["worked"]
    assert folder_sha256(tmp_path / "out") == folder_sha256(local)


def part(paths, out, task, *settings, name="text-tiny"):
    """What `shortcut prepare --task` does in one process."""
    given = TEXT_SETTINGS if name == "text-tiny" else ()
    recipe = reading.read(name, [*given, f"data.shards={out}", *settings])
    return preparation.prepare_part(recipe, map(str, paths), out, task=task, n_workers=1, report=quiet)


def test_a_merge_takes_the_objects_that_tasks_have_kept(given, texts, local, tmp_path, in_this_process):
    content = {}
    fill(lambda key, found: content.__setitem__(f"top/{key}", found), texts)
    content["top/copy.txt"] = content["top/003.txt"]
    given(content)
    out, kept = tmp_path / "out", tmp_path / "out" / ".staging" / "objects"
    for number in (1, 2):
        part(["given://top"], out, (number, 2))
    wanted = {name: len(found) for name, found in content.items() if name.endswith((".txt", ".jsonl"))}
    assert Given.read == wanted
    assert {path.name for path in kept.iterdir()} == {
        hashlib.sha256(content[name]).hexdigest() + Path(name).suffix for name in wanted
    }
    assert {path.name for path in kept.parent.iterdir() if path.name.startswith("fetched")} == set()
    part(["given://top"], out, (1, 2))  # again, as if its end had not been seen
    assert Given.read == wanted

    def place(name):
        return kept / f"{hashlib.sha256(content[name]).hexdigest()}.txt"

    place("top/001.txt").write_bytes(content["top/001.txt"][::-1])  # damaged
    place("top/002.txt").unlink()
    content["top/004.txt"] += b"and more"  # its ETag changes with it
    given(content)
    Given.read.clear()
    shutil.copytree(out, tmp_path / "other", symlinks=True)
    with pytest.raises(Missing, match=r"1 of 14 files\n  004\.txt"):
        prepare(["given://top"], out, merge=True)
    again = {name: len(content[name]) for name in ("top/001.txt", "top/002.txt", "top/004.txt")}
    assert Given.read == again
    part(["given://top"], out, (preparation._task_of("004.txt", 2), 2))
    Given.read.clear()
    prepare(["given://top"], out, merge=True)
    assert set(Given.read) <= {"top/001.txt", "top/002.txt"}  # one of the two may be that task's
    prepare(["given://top"], tmp_path / "other")  # no merge: it scans what is missing
    prepare(["given://top"], tmp_path / "whole")
    whole = folder_sha256(tmp_path / "whole")
    assert folder_sha256(out) == folder_sha256(tmp_path / "other") == whole
    assert not (out / ".staging").exists()


def test_objects_whose_versions_are_not_told_apart_are_fetched_again(given, tmp_path, monkeypatch, in_this_process):
    content = {f"top/{n}.txt": f"text {n}".encode() for n in range(4)}
    given(content)
    info = Given.info
    monkeypatch.setattr(
        Given, "info", lambda self, path, **_: {k: v for k, v in info(self, path).items() if k != "ETag"}
    )
    part(["given://top"], tmp_path / "out", (1, 1))
    Given.read.clear()
    content["top/2.txt"] = b"txet 2"
    with pytest.raises(Missing, match=r"1 of 4 files\n  2\.txt"):
        prepare(["given://top"], tmp_path / "out", merge=True)
    assert set(Given.read) == set(content)


def test_a_listing_that_breaks_off_ends_the_command(given, tmp_path, in_this_process):
    given({"top/a.txt": b"a", "top/b.txt": b"b"}, lambda *_: 1 / 0)
    with pytest.raises(ShortcutError, match="given://top can't be listed: ZeroDivisionError"):
        prepare(["given://top"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_kill_left_of_fetched_objects_is_removed(texts, local, memory, tmp_path, in_this_process):
    fill(lambda key, content: memory.pipe_file(f"/c/{key}", content), texts)
    left = tmp_path / "out" / ".staging" / "fetched"
    left.mkdir(parents=True)
    (left / "00000000.txt").write_text("of another object")
    (tmp_path / "out" / files.MARKER).write_text("shortcut prepare")
    prepare(["memory://c"], tmp_path / "out")
    assert folder_sha256(tmp_path / "out") == folder_sha256(local)
    assert not left.parent.exists()


def test_a_full_disk_ends_the_command_instead_of_rejecting_objects(given, tmp_path, monkeypatch, in_this_process):
    given({f"top/{n}.txt": b"a" for n in range(3)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hashlib, "sha256", lambda *_: type("Digest", (), {"update": full})())
    with pytest.raises(OSError, match="No space left"):
        prepare(["given://top"], tmp_path / "out")


def test_shards_of_a_store_are_left_out_of_its_texts(texts, local, memory, tmp_path, in_this_process):
    fill(lambda key, content: memory.pipe_file(f"/c/{key}", content), texts)
    prepare(["memory://c"], "memory://c/shards")
    said = []
    prepare(["memory://c"], tmp_path / "again", report=said.append)
    assert any("left out, since shortcut has written it: memory://c/shards" in getattr(one, "text", "") for one in said)
    assert folder_sha256(tmp_path / "again") == folder_sha256(local)


def test_an_object_is_named_once_by_the_outer_of_its_folders(texts, memory, tmp_path):
    for key in ("a/b.txt", "a/c/d.txt", "a/c/e.png"):
        memory.pipe_file(f"/n/{key}", key.encode())
    urls = ["memory://n/a/c", "memory://n", "memory://n/a/c/d.txt", "memory://n/a"]
    for given in (urls, urls[::-1]):
        found = inputs.find(given, (".txt",), fetched=tmp_path)
        assert [name for name, _ in found.files] == ["a/b.txt", "a/c/d.txt"]
        assert list(found.ignored) == ["a/c/e.png"]
    (place,) = (place for place, (name, _) in enumerate(found.files) if name == "a/b.txt")
    path, one = found.files[place][1], found.files.object(place)
    assert one.fetch(path) == hashlib.sha256(b"a/b.txt").hexdigest()
    assert path.read_bytes() == b"a/b.txt"


GLOBBED = (
    *("a/1.txt", "a/2.TXT", "a/.hidden.txt", "a/cover.png", "a/b/1.txt", "a/b/c/3.txt", "a/b/c/x.md", "a/bb/4.txt"),
    *("a/.git/5.txt", "a/[1].txt", "ab.txt", "z/a.txt/6.txt", "z/deep/er/7.txt"),
)
PATTERNS = (
    *("*", "**", "**/*.txt", "a/*.txt", "a/*", "a/**", "a/**/*.txt", "a/b*/*.txt", "a/b?/*", "a/[12].txt"),
    *("a/[!2].txt", "a/.*", "a/.h*", "*/b/c", "*/b/c/", "a/*/", "**/c/*.txt", "**/c/**", "**/**/ab.txt", "z/*.txt"),
    *("a/[1].txt", "[a]", "[a]b.*", "**/b/**/*.txt", "a/b/**", "a/**b/*.txt", "a/*/../*.txt", "z/**/*7*"),
)  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_glob_of_keys_matches_what_it_does_in_a_local_copy(memory, tmp_path, pattern):
    for key in GLOBBED:
        memory.pipe_file(f"/bucket/in/{key}", key.encode())
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_text(key)
    if ".." in pattern:  # no part of a key
        with pytest.raises(UsageError, match="matches no objects"):
            inputs.find([f"memory://bucket/in/{pattern}"], (".txt",), fetched=tmp_path)
        return
    there = inputs.find([f"memory://bucket/in/{pattern}"], (".txt",), fetched=tmp_path)
    here = inputs.find([f"{tmp_path}/{pattern}"], (".txt",))
    assert list(there.files.names) == list(here.files.names)
    assert (there.rejects, list(there.ignored), there.outputs) == (here.rejects, list(here.ignored), [])
    assert here.files
    names = [there.files.object(place).name.removeprefix("/bucket/in/") for place in range(len(there.files))]
    assert names == [path.relative_to(tmp_path).as_posix() for _, path in here.files]


@pytest.mark.parametrize("pattern", ["*", "**", "**/*.txt", "a/*", "a/s*", "a/s*/*"])
def test_globs_of_keys_leave_out_what_was_written(memory, tmp_path, pattern):
    keys = {"a/own.txt": "1", "a/sub/own.txt": "2", "a/shards/made.txt": "3", "a/shards/made.png": "4"}
    keys |= {"a/shards/.shortcut": "shortcut prepare\n", "a/sub/cover.png": "5", "a/sub/of/made.txt": "6"}
    keys |= {"a/sub/of/.shortcut": "shortcut sample\n"}
    for key, content in keys.items():
        memory.pipe_file(f"/left/{key}", content.encode())
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_text(content)
    there = inputs.find([f"memory://left/{pattern}"], (".txt",), fetched=tmp_path)
    here = inputs.find([f"{tmp_path}/{pattern}"], (".txt",))
    assert list(there.files.names) == list(here.files.names) != []
    assert there.rejects == here.rejects
    assert list(there.ignored) == list(here.ignored)
    assert [one.removeprefix("memory://left/") for one in there.outputs] == [
        os.path.relpath(one, tmp_path) for one in here.outputs
    ]


def test_a_glob_among_other_paths(texts, memory, tmp_path, in_this_process):
    fill(lambda key, content: memory.pipe_file(f"/mixed/{key}", content), texts)
    prepare(["memory://mixed/00[0-4].txt", f"file://{texts}/00[5-9].txt"], tmp_path / "one")
    prepare([texts / "00*.txt"], tmp_path / "two")
    assert folder_sha256(tmp_path / "one") == folder_sha256(tmp_path / "two")


@pytest.mark.parametrize(
    ("url", "kind", "text"),
    [
        ("memory://only/*.txt", UsageError, "memory://only/*.txt matches no objects"),
        ("memory://none/**", UsageError, "memory://none/** matches no objects"),
        ("memory://on*/below", UsageError, "memory://on*/below names no objects"),
        ("musik://bucket/x", UsageError, "fsspec knows no scheme musik://"),
        ("memory://user:hunter2222@b/x", UsageError, "a memory:// URL has credentials"),
        ("https://host/x?X-Amz-Signature=hunter2222", UsageError, "a https:// URL has credentials or a query"),
        ("s3://AKIA:hunter2222/with/slashes@b/x", UsageError, "a s3:// URL has credentials"),
        ("https://hunter2222@host/x", UsageError, "a https:// URL has credentials"),
        ("memory://nothing/here", UsageError, "memory://nothing/here names no objects"),
        ("memory://only/below", UsageError, "no .txt"),
    ],
)
def test_urls_that_cannot_be_read(memory, tmp_path, in_this_process, url, kind, text):
    memory.pipe_file("/only/below/other.png", b"")
    for begin in (
        partial(prepare, [url], tmp_path / "out"),
        partial(prepare, [tmp_path], url),
        partial(stores.fetched, url, quiet),
    ):
        with pytest.raises(ShortcutError) as error:
            begin()
        assert "hunter2222" not in error.value.message + error.value.hint
    with pytest.raises(kind) as error:
        prepare([url], tmp_path / "out")
    assert text in error.value.message


@pytest.mark.parametrize(
    ("url", "module", "package", "install"),
    [
        ("s3://bucket/x", "s3fs", "s3fs", "pip install 'shortcut-cli[s3]'"),
        ("gs://bucket/x", "gcsfs", "gcsfs", "pip install gcsfs"),
        ("hf://datasets/a/b/*", "huggingface_hub", "huggingface_hub", "pip install 'shortcut-cli[hf]'"),
        ("https://host/x", "fsspec.implementations.http", "aiohttp", "pip install aiohttp"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch, tmp_path, url, module, package, install
):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
    with pytest.raises(Unavailable) as error:
        prepare([url], tmp_path / "out")
    assert error.value.exit_code == 5
    assert f"{url.partition(':')[0]}:// needs {package}, which is not installed" in error.value.message
    assert error.value.hint == install


def test_an_unknown_scheme_is_answered_with_the_known_ones(tmp_path):
    done = shortcut("prepare", "text", "musik://bucket/x", "--out", "out", cwd=tmp_path, check=2)
    assert done.stderr.count("Error") == 1
    shown = " ".join(done.stderr.replace("│", " ").split())
    known = "abfs://, az://, file://, gcs://, gs://, hf://, http://, https://, s3://, s3a://"
    assert "fsspec knows no scheme musik://" in shown
    assert f"known are {known}" in shown


def test_commands_that_take_local_files_say_so():
    with pytest.raises(UsageError, match="memory://b/x is a URL; this command takes files of this machine"):
        inputs.find(["memory://b/x"], (".txt",))


# --- shards in a store


def stored(memory, root):
    """The objects below a folder of memory://."""
    return {name.removeprefix(f"/{root}/"): memory.cat_file(name) for name in memory.find(f"/{root}")}


def folder_bytes(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_are_written_to_a_store_with_the_manifest_last(texts, local, memory, monkeypatch, in_this_process):
    order, put = [], objects.Store.put
    monkeypatch.setattr(
        objects.Store, "put", lambda self, content, name: (order.append(name), put(self, content, name))
    )
    assert prepare([texts], "memory://b/out")["worked"]
    found = stored(memory, "b/out")
    assert found.pop(files.MARKER).startswith(b"shortcut prepare")
    wanted = folder_bytes(local)
    assert found == {name: content for name, content in wanted.items() if name != files.MARKER}
    assert order[0] == files.MARKER
    assert order[-1] == "manifest.json"
    order.clear()
    for machine in ("this", "another"):
        if machine == "another":
            shutil.rmtree(files.place("memory://b/out"))
        assert not prepare([texts], "memory://b/out/")["worked"]
        with pytest.raises(UsageError, match="prepared from something else"):
            prepare([texts], "memory://b/out", "data.val=0.4")
    assert not order


@pytest.mark.parametrize("nth", [0, 1, 4, -1])
def test_shards_whose_copying_fails_have_no_manifest_and_are_copied_by_the_same_command(
    texts, local, memory, monkeypatch, in_this_process, nth
):
    names = [files.MARKER, *shards.read_manifest(local)["files"], "manifest.json"]
    put = objects.Store.put

    def fails(self, content, name):
        if name == names[nth]:
            raise ShortcutError("the store is away")
        put(self, content, name)

    shutil.rmtree(files.place("memory://b/away"), ignore_errors=True)
    monkeypatch.setattr(objects.Store, "put", fails)
    with pytest.raises(ShortcutError, match="the store is away"):
        prepare([texts], "memory://b/away")
    assert len(stored(memory, "b/away")) == nth % len(names)
    with pytest.raises(UsageError, match="is not a shards folder"):
        stores.fetched("memory://b/away", quiet)
    monkeypatch.setattr(objects.Store, "put", put)
    assert not prepare([texts], "memory://b/away")["worked"]  # but only copied
    assert shards.read_manifest(stores.fetched("memory://b/away", quiet)) == shards.read_manifest(local)
    assert "manifest.json" in stored(memory, "b/away")


def test_nothing_in_a_store_is_overwritten(texts, memory, in_this_process):
    memory.pipe_file("/b/mine/thesis.txt", b"years of work")
    with pytest.raises(UsageError, match="memory://b/mine is not empty, and was not made by `shortcut prepare`"):
        prepare([texts], "memory://b/mine")
    assert stored(memory, "b/mine") == {"thesis.txt": b"years of work"}


def test_shards_that_another_command_wrote_meanwhile_stay(texts, memory, monkeypatch, in_this_process):
    other = prepare([texts], "memory://b/other", "data.val=0.4")
    shutil.rmtree(files.place("memory://b/race"), ignore_errors=True)
    work = preparation.prepare

    def slow(*arguments, **options):
        fill_from = stored(memory, "b/other")
        for name, content in fill_from.items():
            memory.pipe_file(f"/b/race/{name}", content)
        return work(*arguments, **options)

    monkeypatch.setattr(preparation, "prepare", slow)
    with pytest.raises(UsageError, match="written by another command meanwhile"):
        prepare([texts], "memory://b/race")
    assert json.loads(stored(memory, "b/race")["manifest.json"])["checksum"] == other["checksum"]


def test_shards_that_were_removed_from_a_store_can_be_made_anew(texts, memory, in_this_process):
    prepare([texts], "memory://b/gone")
    memory.rm("/b/gone", recursive=True)
    assert prepare([texts], "memory://b/gone", "data.val=0.4")["worked"]
    assert "manifest.json" in stored(memory, "b/gone")
    assert json.loads(stored(memory, "b/gone")["manifest.json"])["request"]["data"]["val"] == 0.4


def test_unfinished_shards_in_a_store_are_replaced_once_they_are_finished(
    given, texts, local, memory, tmp_path, in_this_process
):
    content = {}
    fill(lambda key, found: content.__setitem__(f"top/{key}", found), texts)
    given(content, lambda what, name, *_: failing(1, share=1)() if (what, name) == ("read", "top/003.txt") else None)
    with pytest.raises(Unfinished):
        prepare(["given://top"], "memory://b/part", max_bad="1")
    assert json.loads(stored(memory, "b/part")["manifest.json"])["unfinished"] == 1
    shutil.rmtree(files.place("memory://b/part"))  # as on another machine
    given(content)
    assert prepare(["given://top"], "memory://b/part")["worked"]
    assert stored(memory, "b/part")["manifest.json"] == (local / "manifest.json").read_bytes()


def test_shards_of_a_store_are_fetched_once_and_checked(texts, local, memory, monkeypatch, in_this_process):
    fill(lambda key, content: memory.pipe_file(f"/b/fetch/{key}", content), local)
    folder = stores.fetched("memory://b/fetch", quiet)
    assert {name: one for name, one in folder_bytes(folder).items() if name != files.MARKER} == {
        name: one for name, one in folder_bytes(local).items() if name != files.MARKER
    }
    fetched, fetch = [], objects.Object.fetch
    monkeypatch.setattr(objects.Object, "fetch", lambda self, path: (fetched.append(path.name), fetch(self, path))[1])
    assert stores.fetched("memory://b/fetch", quiet) == folder
    assert fetched == ["manifest.json"]


@pytest.mark.parametrize("damage", ["a byte", "the size", "missing", "the manifest", "a name"])
def test_damaged_shards_of_a_store_are_not_used(texts, local, memory, damage, in_this_process):
    url = f"memory://b/{damage.replace(' ', '-')}"
    root = url.removeprefix("memory:/")
    fill(lambda key, content: memory.pipe_file(f"{root}/{key}", content), local)
    content = memory.cat_file(f"{root}/train-00000.bin")
    if damage == "a byte":
        memory.pipe_file(f"{root}/train-00000.bin", bytes([content[0] ^ 1]) + content[1:])
    elif damage == "the size":
        memory.pipe_file(f"{root}/train-00000.bin", content + b"\0\0")
    elif damage == "missing":
        memory.rm_file(f"{root}/train-00000.bin")
    else:
        manifest = json.loads(memory.cat_file(f"{root}/manifest.json"))
        if damage == "a name":
            marker = memory.cat_file(f"{root}/{files.MARKER}")
            entry = {"bytes": len(marker), "sha256": hashlib.sha256(marker).hexdigest()}
            manifest["files"][files.MARKER] = entry
            manifest["checksum"] = shards._checksum(manifest)
        else:
            manifest["inputs"] = 5
        memory.pipe_file(f"{root}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(CheckFailed) as error:
        stores.fetched(url, quiet)
    assert url in error.value.message
    assert (f"bytes, the manifest says {len(content)}" in error.value.message) == (damage == "the size")
    assert not (files.place(url) / "manifest.json").exists()


def test_file_urls_name_folders_of_this_machine(local):
    assert stores.fetched(f"file://{local}", quiet) == local
    with stores.kept(f"FILE://{local}", quiet) as folder:
        assert folder == local
    assert files.place("shards/text") == Path("shards/text")


@pytest.mark.parametrize(
    "url",
    ["http://host:8080/x", "sftp://me@host:22/x", "http://[::1]:80/x", "s3://arn:aws:s3:eu-west-1:1:accesspoint/a/x",
     "abfs://container@account.dfs.core.windows.net/x", "s3://bucket/a:b@c?d"],
)  # fmt: skip
def test_ports_users_and_odd_keys_are_no_credentials(url):
    objects.check(url)


# --- S3


class Proxy:
    """Hands requests on to a server, but for those for which `fault(method, path)` says "500", "503" or "cut"."""

    def __init__(self, port):
        self.fault = lambda *_: ""
        self.seen = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.seen.append((self.command, self.path, self.headers.get("Range", "")))
                fault = proxy.fault(self.command, self.path)
                if fault in ("500", "503"):
                    self.answer(int(fault), [], b"")
                    return
                path = self.path + ("&max-keys=4" if "list-type=2" in self.path else "")
                server = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                server.request(self.command, path, body or None, dict(self.headers))
                answer = server.getresponse()
                self.answer(answer.status, answer.getheaders(), answer.read(), cut=fault == "cut")
                server.close()

            def answer(self, status, headers, body, cut=False):
                self.send_response(status)
                length = next((value for name, value in headers if name.lower() == "content-length"), len(body))
                for name, value in headers:
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if cut else body)
                if cut:
                    self.close_connection = True

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def moto_port():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def s3(moto_port, monkeypatch):
    """A proxy before an S3 server with an empty bucket, which the environment leads to."""
    proxy = Proxy(moto_port)
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    settings = {"ACCESS_KEY_ID": "key-of-the-test", "SECRET_ACCESS_KEY": SECRET, "DEFAULT_REGION": "us-east-1"}
    settings |= {"ENDPOINT_URL": proxy.url, "EC2_METADATA_DISABLED": "true", "MAX_ATTEMPTS": "1"}
    settings |= {"CONFIG_FILE": "/nowhere", "SHARED_CREDENTIALS_FILE": "/nowhere"}
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    request = http.client.HTTPConnection("127.0.0.1", moto_port)
    request.request("POST", "/moto-api/reset")
    request.getresponse().read()
    request.request("PUT", "/bucket")
    request.getresponse().read()
    proxy.put = lambda key, content: s3fs.S3FileSystem().call_s3("put_object", Bucket="bucket", Key=key, Body=content)
    yield proxy
    proxy.server.shutdown()
    proxy.server.server_close()


def one_in_five(seed):
    """A fault that fails one request in five, half of those with a body that is cut."""
    draw, lock = Random(seed), threading.Lock()

    def fault(method, path):
        with lock:
            number = draw.random()
        if number >= 0.2:
            return ""
        if number < 0.1 and method == "GET":
            return "cut"
        return "500" if number < 0.15 else "503"

    return fault


@NEEDS_S3
def test_s3_that_fails_one_request_in_five_gives_the_shards_of_local_files(s3, texts, local, tmp_path):
    fill(lambda key, content: s3.put(f"corpus/{key}", content), texts)
    s3.put("corpus-2/other.txt", b"of another folder")
    s3.fault = one_in_five(1)
    s3.seen.clear()
    flags = set_flags(*TEXT_SETTINGS)
    done = shortcut(
        *("prepare", "text", "s3://bucket/corpus", "--recipe", "text-tiny", "--out", "out", "--max-bad", "0"),
        *("--workers", 1, "--json", *flags),
        cwd=tmp_path,
        AWS_MAX_ATTEMPTS="3",
    )
    assert folder_sha256(tmp_path / "out") == folder_sha256(local)
    assert json.loads(done.stdout)["ignored"] == 1
    assert SECRET not in done.stdout + done.stderr
    assert sum("list-type=2" in path for _, path, _ in s3.seen) >= 4  # pages of four keys


def write_sounds(folder):
    """Three sounds of a second, and one that is none."""
    folder.mkdir()
    for number in range(3):
        samples = (np.sin(np.arange(24_000) * (0.05 + number / 50)) * 9000).astype("<i2")
        soundfile.write(folder / f"{number}.wav", samples, 24_000)
    (folder / "broken.wav").write_bytes(b"RIFF is all")


def write_pieces(folder):
    """Four pieces, and one that is none."""
    demo_material.write_midi(folder, pieces=4, seed=1)
    (folder / "broken.mid").write_bytes(b"MThd is all")


@NEEDS_S3
@pytest.mark.parametrize(("recipe", "write"), [("music-tiny", write_pieces), ("audio-tiny", write_sounds)])
def test_s3_with_music_and_sound(s3, tmp_path, in_this_process, recipe, write):
    write(tmp_path / "in")
    fill(lambda key, content: s3.put(f"in/{key}", content), tmp_path / "in")
    s3.fault = one_in_five(2)
    prepare([tmp_path / "in"], tmp_path / "local", name=recipe, max_bad="1")
    prepare(["s3://bucket/in"], tmp_path / "objects", name=recipe, max_bad="1")
    assert folder_sha256(tmp_path / "local") == folder_sha256(tmp_path / "objects")
    assert "broken" in (tmp_path / "objects" / "rejects.jsonl").read_text()


@NEEDS_S3
@pytest.mark.parametrize(
    ("recipe", "write"), [("text-tiny", write_texts), ("music-tiny", write_pieces), ("audio-tiny", write_sounds)]
)
def test_a_merge_over_s3_fetches_nothing_again(s3, tmp_path, in_this_process, recipe, write):
    write(tmp_path / "in")
    fill(lambda key, content: s3.put(f"in/{key}", content), tmp_path / "in")
    prepare([tmp_path / "in"], tmp_path / "local", name=recipe, max_bad="1")
    for task in ((1, 3), (2, 3), (3, 3)):
        s3.seen.clear()
        part(["s3://bucket/in"], tmp_path / "tasks", task, name=recipe)
    assert any(method == "GET" and "list-type" not in path for method, path, _ in s3.seen)
    s3.seen.clear()
    prepare(["s3://bucket/in"], tmp_path / "tasks", name=recipe, max_bad="1", merge=True)
    assert {path.partition("?")[0] for method, path, _ in s3.seen if method == "GET"} == {"/bucket"}  # listings
    assert folder_sha256(tmp_path / "local") == folder_sha256(tmp_path / "tasks")


@NEEDS_S3
def test_a_glob_in_s3_lists_only_what_begins_like_it(s3, tmp_path):
    for key in ("in/a1.txt", "in/a2.txt", "in/b1.txt", "in/a/3.txt", "in/a/4.png", "other/a1.txt", "in/odd*.txt"):
        s3.put(key, key.encode())
    asked = {"in/a*.txt": ["a1.txt", "a2.txt"], "in/a*": ["3.txt", "a1.txt", "a2.txt"], "in/odd*.txt": ["odd*.txt"]}
    asked |= {"**/a1.txt": ["a1.txt", "a1.txt"], "*/a/*.txt": ["3.txt"]}
    for pattern, names in asked.items():
        s3.seen.clear()
        found = inputs.find([f"s3://bucket/{pattern}"], (".txt",), fetched=tmp_path)
        assert list(found.files.names) == names
        if pattern.startswith("in/a"):
            assert "prefix=in%2Fa&" in s3.seen[-1][1]
    for url in ("s3://bucket/none*", "s3://bucket/in/c*"):
        with pytest.raises(UsageError, match="matches no objects"):
            inputs.find([url], (".txt",), fetched=tmp_path)
    with pytest.raises(UsageError, match=r"s3://no-such-bucket/x/ does not exist"):
        inputs.find(["s3://no-such-bucket/x/*"], (".txt",), fetched=tmp_path)


@NEEDS_S3
def test_a_listing_that_does_not_end_is_an_error(s3, monkeypatch):
    store = objects.Store("s3://bucket/x/")
    page = {"Contents": [{"Key": "x/a", "Size": 1, "ETag": ""}], "IsTruncated": True, "NextContinuationToken": "next"}
    monkeypatch.setattr(type(store.system), "call_s3", lambda *_, **__: page)
    monkeypatch.setattr(objects, "WAITS_S", ())
    with pytest.raises(ShortcutError, match="lists the same page again"):
        list(store.listed())


@NEEDS_S3
def test_a_body_that_is_cut_is_read_on_from_where_it_was(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "WAITS_S", (0.0,) * 4)
    monkeypatch.setattr(objects, "READ_BYTES", 1000)
    content = Random(1).randbytes(5500)
    s3.put("a.bin", content)
    cut = iter(["", "cut"])
    s3.fault = lambda method, path: next(cut, "") if method == "GET" and "list-type" not in path else ""
    (one,) = listed("s3://bucket/a.bin").values()
    assert one.fetch(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "a").read_bytes() == content
    ranges = [asked for method, _, asked in s3.seen if method == "GET" and asked]
    starts = [f"bytes={start}-{start + 999}" for start in (0, 1000, 1000, 2000, 3000, 4000, 5000)]
    assert ranges == starts


@NEEDS_S3
def test_odd_keys_and_changes(s3, tmp_path, in_this_process, monkeypatch):
    keys = ["a b.txt", "ünï ✓.txt", "../up.txt", "/two.txt", "x.txt", "x.txt/below.txt", "#h%20+&.txt", "<script>.txt"]
    for number, key in enumerate(keys):
        s3.put(f"in/{key}", f"text {number}".encode())
    s3.put("in/zero.txt", b"")
    s3.put("in/folder.txt/", b"")
    s3.put("in/odd.txt/", b"with content")
    s3.put("in/changing.txt", b"old text")
    s3.put("in/going.txt", b"old text of another")
    list_all = objects.Store.listed

    def then_change(*asked):
        yield from list_all(*asked)
        s3.put("in/changing.txt", b"new text")
        asked[0].system.rm_file("bucket/in/going.txt")

    monkeypatch.setattr(objects.Store, "listed", then_change)
    with pytest.raises(Unfinished):
        prepare(["s3://bucket/in"], tmp_path / "out", max_bad="100%")
    lines = shards.read_lines(tmp_path / "out" / "rejects.jsonl", bool)
    assert {line["source"]: line["reason"] for line in lines} == {
        "changing.txt": "can't be fetched: it changed after it was listed",
        "going.txt": "can't be fetched: it does not exist",
        "odd.txt/": "its key ends in /, as that of a folder",
        "zero.txt": "is empty",
    }
    found = {line["source"]: line["sha256"] for line in shards.read_lines(tmp_path / "out" / "documents.jsonl", bool)}
    assert found == {key: hashlib.sha256(f"text {n}".encode()).hexdigest() for n, key in enumerate(keys)}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


WRONG = [
    ("s3://no-such-bucket/x", {}, 2, "s3://no-such-bucket/x does not exist"),
    ("s3://bucket/none", {}, 2, "s3://bucket/none names no objects"),
    ("s3://Not A Bucket/x", {}, 2, "can't be listed: ParamValidationError"),
    ("s3://bucket/x", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, 5, "no credentials were found"),
    ("s3://bucket/x", {"AWS_ENDPOINT_URL": "http://me:hunter2222@127.0.0.1:9"}, 1, "can't be listed"),
    ("s3://me:hunter2222@bucket/x", {}, 2, "URL has credentials"),
]


@NEEDS_S3
@pytest.mark.parametrize(("url", "changed", "code", "text"), WRONG, ids=str)
def test_what_is_wrong_with_a_store_is_said_without_secrets(
    s3, tmp_path, monkeypatch, in_this_process, url, changed, code, text
):
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ShortcutError) as error:
        prepare([url], tmp_path / "out")
    assert error.value.exit_code == code
    assert text in error.value.message
    for secret in (SECRET, "hunter2222"):
        assert secret not in error.value.message + error.value.hint
    assert not (tmp_path / "out").exists()


@NEEDS_S3
def test_an_error_of_a_store_is_one_panel(s3, texts, tmp_path):
    done = shortcut("prepare", "text", texts, "--out", "s3://no-such-bucket/x", cwd=tmp_path, check=2)
    assert "s3://no-such-bucket/x does not exist" in done.stderr
    assert done.stderr.count("Error") == 1
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@NEEDS_S3
def test_shards_in_s3_are_trained_on_and_described(s3, texts, local, tmp_path, in_this_process):
    url, flags = "s3://bucket/my shards", set_flags(*TEXT_SETTINGS)
    s3.fault = one_in_five(3)
    prepare([texts], url)
    s3.fault = lambda *_: ""
    done = shortcut("prepare", "text", texts, "--recipe", "text-tiny", "--out", url, *flags, cwd=tmp_path)
    assert f"'data.shards={url}'" in done.stderr
    cache = {"SHORTCUT_CACHE": str(tmp_path / "another machine")}
    train = ["train", "--recipe", "text-tiny", "--out", "far", "--no-report", "--device", "cpu", *flags]
    shortcut(*train, *set_flags(f"data.shards={url}", "train.steps=2"), cwd=tmp_path, **cache)
    assert SECRET not in (tmp_path / "far" / "recipe.toml").read_text()
    s3.seen.clear()
    found = json.loads(shortcut("inspect", url, "--verify", "--json", cwd=tmp_path, **cache).stdout)
    assert (found["path"], found["verified"]) == (url, True)
    assert found["checksum"] == shards.read_manifest(local)["checksum"]
    scored = shortcut("eval", "--ckpt", "far", "--no-report", "--device", "cpu", "--json", cwd=tmp_path, **cache)
    assert json.loads(scored.stdout)["inputs"]["shards"] == found["checksum"]
    assert {path.rpartition("/")[2] for method, path, _ in s3.seen if method == "GET"} == {"manifest.json"}
