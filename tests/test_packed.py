"""Files that unpack to far more than they are: read as streams, and given up in time."""

import gzip
import os
import re
import shutil
import struct
from collections import namedtuple

import numpy as np
import pytest
import soundfile

from shortcut_cli.data import packed, sound
from shortcut_cli.errors import Rejected
from shortcut_cli.tokenizers.text_reading import read_blocks


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(packed, "ALWAYS_BYTES", 10_000)


def content_of(kind, size):
    """`size` bytes of silence, or of spaces: what compresses best."""
    if kind == "txt":
        return b" " * size
    header = struct.pack(
        "<4sI4s4sIHHIIHH4sI", b"RIFF", size, b"WAVE", b"fmt ", 16, 1, 1, 24000, 48000, 2, 16, b"data", size - 44
    )
    return header + bytes(size - 44)


def read(path):
    """How many samples, or characters, a file has."""
    blocks = sound.SoundReader(path) if ".wav" in path.name else read_blocks(path)
    return sum(map(len, blocks))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["txt", "wav"])
def test_a_file_that_unpacks_to_far_more_than_it_is_is_given_up(tmp_path, monkeypatch, kind):
    path = tmp_path / f"bomb.{kind}.gz"
    path.write_bytes(gzip.compress(content_of(kind, 50_000_000)))
    given = []
    whole = packed.Unpacked.read
    monkeypatch.setattr(packed.Unpacked, "read", lambda self, size: given.append(block := whole(self, size)) or block)
    with pytest.raises(Rejected, match="unpacks to more than 0 MiB and 32 times its size; unpack it yourself"):
        read(path)
    assert sum(map(len, given)) <= packed.MOST_RATIO * path.stat().st_size
    for size in (9_000, 10_000):
        path.write_bytes(gzip.compress(content_of(kind, size)))
        assert read(path) == (size if kind == "txt" else (size - 44) // 2)
    path.write_bytes(gzip.compress(content_of(kind, 10_001)))
    with pytest.raises(Rejected, match="unpacks to more"):
        read(path)


@pytest.mark.usefixtures("small")
def test_the_limit_grows_with_the_file(tmp_path):
    path = tmp_path / "a.wav.gz"
    samples = np.random.default_rng(0).integers(-9, 9, 100_000).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", samples, 24_000)
    path.write_bytes(gzip.compress((tmp_path / "a.wav").read_bytes()))
    assert read(path) == 100_000


def test_a_file_for_which_the_temporary_folder_is_too_small_leaves_room_in_it(tmp_path, monkeypatch):
    path = tmp_path / "a.wav.gz"
    path.write_bytes(gzip.compress(content_of("wav", 5_000_000)))
    usage = namedtuple("usage", "total used free")
    free = 3 << 20
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda folder: usage(10 << 20, 0, free - sum(f.stat().st_size for f in os.scandir(folder))),
    )
    with pytest.raises(Rejected, match=r"unpacks to more than there is room for in .* \(TMPDIR\)") as refused:
        read(path)
    assert refused.value.passing
    free = 20 << 20
    assert read(path) == (5_000_000 - 44) // 2


def test_a_full_disk_costs_the_file_and_is_named(tmp_path, monkeypatch):
    path = tmp_path / "a.wav.gz"
    path.write_bytes(gzip.compress(content_of("wav", 5_000)))

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "disk_usage", full)
    with pytest.raises(
        Rejected, match=re.escape("can't be read: No space left on device in ") + r".* \(TMPDIR\)"
    ) as refused:
        read(path)
    assert refused.value.passing
