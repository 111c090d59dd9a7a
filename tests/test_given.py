"""Splits that come with a corpus: patterns over paths, and tables."""

import os
import time
from pathlib import Path

import pytest

from shortcut_cli.data.given import Given, check_filled
from shortcut_cli.errors import UsageError

MAESTRO = (
    "canonical_composer,canonical_title,split,year,midi_filename,audio_filename,duration\n"
    'Alban Berg,"Sonata, Op. 1",train,2018,2018/one.midi,2018/one.wav,698.66\n'
    "test,val,validation,2008,2008/two.midi,2008/two.wav,759.51\n"
    "Alban Berg,Sonata,test,2017,2017/three.midi,2017/three.wav,464.64\n"
)


def split_of(lists, relative, named=None, table=""):
    return Given(lists, str(table) if table else "").split_of(relative, Path(named or relative))


@pytest.mark.parametrize(
    ("pattern", "relative", "named", "matches"),
    [
        ("wiki.train.tokens", "wiki.train.tokens", None, True),
        ("wiki.train.tokens", "data/wiki.train.tokens", None, True),
        ("wiki.train.tokens", "xwiki.train.tokens", None, False),
        ("train-clean-100", "train-clean-100/19/198/a.flac", None, True),
        ("train-clean-100/", "LibriSpeech/train-clean-100/19/a.flac", None, True),
        ("train-clean", "train-clean-100/19/a.flac", None, False),
        ("train-clean-*", "train-clean-100/19/a.flac", None, True),
        ("train-clean-100", "19/a.flac", "/data/LibriSpeech/train-clean-100/19/a.flac", True),
        ("train-clean-100/19", "train-clean-100/190/a.flac", None, False),
        ("./a/b.txt", "a/b.txt", None, True),
        ("a/*.txt", "a/b.txt", None, True),
        ("a/*.txt", "a/c/b.txt", None, False),
        ("a/**/*.txt", "a/c/d/b.txt", None, True),
        ("a/**/*.txt", "a/b.txt", None, True),
        ("a/**/*.txt", "a/b.md", None, False),
        ("a[1].txt", "a[1].txt", None, True),
        ("a[12].txt", "a2.txt", None, True),
        ("?.txt", "ab.txt", None, False),
        ("/data/x", "x/a.txt", "/data/x/a.txt", True),
        ("/x", "x/a.txt", "/data/x/a.txt", False),
        ("../other", "a.txt", "../other/a.txt", True),
    ],
)
def test_a_pattern_is_a_name_a_folder_or_a_glob_at_any_depth(pattern, relative, named, matches):
    assert split_of({"train": [pattern]}, relative, named) == ("train" if matches else "")


def test_an_absolute_pattern_matches_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert split_of({"val": [f"{tmp_path}/x"]}, "a.txt", "x/a.txt") == "val"


def test_the_path_below_the_root_decides_before_the_path_as_named():
    lists = {"train": ["train"], "test": ["test"]}
    assert split_of(lists, "train/a.txt", "/home/test/corpus/train/a.txt") == "train"
    assert split_of(lists, "a.txt", "/home/test/corpus/a.txt") == "test"


def test_a_file_in_two_splits_is_named(tmp_path):
    lists = {"train": ["a"], "test": ["*.txt"]}
    with pytest.raises(UsageError, match=r"a/b\.txt is in more than one of data\.splits: test, train"):
        split_of(lists, "a/b.txt")
    (tmp_path / "t.csv").write_text("path,split\na/b.md,val\n")
    with pytest.raises(UsageError, match=r"a/b\.md is in more than one of data\.splits: train, val"):
        split_of(lists, "a/b.md", table=tmp_path / "t.csv")
    assert split_of({"val": ["a"]}, "a/b.md", table=tmp_path / "t.csv") == "val"


@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_a_table_like_maestros(tmp_path, start):
    (tmp_path / "m.csv").write_text(start + MAESTRO)
    expected = {"2018/one": "train", "2008/two": "val", "2017/three": "test", "2017/four": "", "2018/two": ""}
    for name, split in expected.items():
        for suffix in ("midi", "wav"):
            file = f"{name}.{suffix}"
            # The root is the corpus, the folder above it, or one of its folders.
            assert split_of({}, file, f"/x/{file}", tmp_path / "m.csv") == split
            assert split_of({}, f"maestro/{file}", None, tmp_path / "m.csv") == split
            assert split_of({}, Path(file).name, f"maestro/{file}", tmp_path / "m.csv") == split


@pytest.mark.parametrize(
    ("value", "split"),
    [
        *((name, "val") for name in ("val", "valid", "validation", "dev", " Dev ")),
        *((name, "train") for name in ("train", "TRAIN", "training")),
        *((name, "test") for name in ("test", "testing")),
        *((name, "") for name in ("", "other")),
    ],
)
def test_splits_go_by_many_names(tmp_path, value, split):
    (tmp_path / "t.tsv").write_text(f"\ufeffSplit\tfile\n{value}\t./a.txt\n")
    assert split_of({}, "a.txt", table=tmp_path / "t.tsv") == split


def test_a_file_that_two_rows_put_into_two_splits_is_named(tmp_path):
    (tmp_path / "t.csv").write_text("path,split\na.txt,train\na.txt,test\nb.txt,train\nb.txt,train\n")
    assert split_of({}, "b.txt", table=tmp_path / "t.csv") == "train"
    with pytest.raises(UsageError, match=r"a\.txt is in more than one"):
        split_of({}, "a.txt", table=tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "can't be read: No such file or directory"),
        (b"path,set\na.txt,train\n", "has no column `split`"),
        (b"", "has no column `split`"),
        (b"path,split\n\xff\xfe,train\n", "is not a table in UTF-8"),
    ],
)
def test_a_table_that_is_none(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UsageError, match=reason):
        Given({}, str(tmp_path / "t.csv"))


def test_a_split_without_files_is_named():
    check_filled(["val", "test", "train", "train"], "no file")
    with pytest.raises(UsageError, match=r"data\.splits gives no file to val and test"):
        check_filled(["train", ""], "no file")


@pytest.mark.parametrize("middle", ["**", "x", "*"])
def test_any_number_of_stars_is_matched_soon(middle):
    pattern = "/".join(["**", middle] * 40)
    path = Path("/".join(["x"] * 200))
    began = time.process_time()
    matched = [Given({"train": [f"{pattern}/{end}"]}).split_of(str(path), path) for end in ("x", "y")]
    assert matched == ["train", ""]
    assert time.process_time() - began < 2


def test_a_table_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "table.csv")
    with pytest.raises(UsageError, match="can't be read: Not a regular file"):
        Given({}, str(tmp_path / "table.csv"))
