"""Finding inputs: each real file once, whatever the arguments look like."""

import os

import pytest

from shortcut_cli.data import inputs
from shortcut_cli.errors import UsageError

SUFFIXES = (".txt", ".txt.gz")


def names(*arguments):
    return [relative for relative, _ in inputs.find([str(a) for a in arguments], SUFFIXES).files]


@pytest.fixture
def tree(tmp_path):
    for name in ("b.txt", "a/c.TXT", "a/d/e.txt.gz", "a/notes.md"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "root"


def test_folders_are_walked_and_files_with_other_suffixes_listed(tree):
    (tree / "z.md").write_text("z")
    found = inputs.find([str(tree)], SUFFIXES)
    assert [relative for relative, _ in found.files] == ["a/c.TXT", "a/d/e.txt.gz", "b.txt"]
    assert list(found.ignored) == ["a/notes.md", "z.md"]
    assert found.rejects == []


def test_order_repetition_and_form_of_arguments_do_not_matter(tree, monkeypatch):
    monkeypatch.chdir(tree.parent)
    expected = names(tree)
    assert names("root") == names(tree, "root", tree / "a") == names(tree / "a", tree) == expected


def test_what_is_rejected_or_ignored_below_two_roots_is_counted_once(tree):
    (tree / "a" / "gone.txt").symlink_to(tree / "nowhere")
    (tree / "gone.txt").symlink_to(tree / "nowhere")
    expected = inputs.find([str(tree)], SUFFIXES)
    assert [name for name, _ in expected.rejects] == ["a/gone.txt", "gone.txt"]
    assert list(expected.ignored) == ["a/notes.md"]
    for roots in ((tree, tree), (tree / "a", tree), (tree, tree / "a", tree / "gone.txt")):
        found = inputs.find([str(root) for root in roots], SUFFIXES)
        assert list(found.files) == list(expected.files)
        assert (found.rejects, len(found.ignored)) == (expected.rejects, 1)


def test_globs_and_files(tree):
    assert names(f"{tree}/**/*.txt*") == ["b.txt", "e.txt.gz"]
    assert names(tree / "b.txt", tree / "a/c.TXT") == ["b.txt", "c.TXT"]


def test_links_are_followed_once(tree):
    (tree / "a" / "loop").symlink_to(tree)
    (tree / "z.txt").symlink_to(tree / "b.txt")
    (tree.parent / "outside").mkdir()
    (tree.parent / "outside" / "o.txt").write_text("o")
    (tree / "linked").symlink_to(tree.parent / "outside")
    assert names(tree) == ["a/c.TXT", "a/d/e.txt.gz", "b.txt", "linked/o.txt"]


def test_what_is_not_a_regular_file_is_rejected_with_its_reason(tree):
    os.mkfifo(tree / "pipe.txt")
    (tree / "broken.txt").symlink_to(tree / "nowhere")
    (tree / "folder.txt").mkdir()
    found = inputs.find([str(tree)], SUFFIXES)
    assert [name for name, _ in found.rejects] == ["broken.txt", "folder.txt", "pipe.txt"]
    assert found.rejects[2][1] == "is not a regular file"


def test_a_named_file_of_another_kind_is_rejected(tree):
    found = inputs.find([str(tree / "a/notes.md")], SUFFIXES)
    assert found.rejects == [("notes.md", "its suffix is none of .txt .txt.gz")]


def test_an_argument_that_names_nothing(tree):
    with pytest.raises(UsageError, match="does not exist"):
        inputs.find([str(tree / "nothing")], SUFFIXES)


def test_a_folder_named_like_a_file_is_listed_unless_it_holds_files(tmp_path):
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "b.txt").mkdir()
    (tmp_path / "b.txt" / "c.txt").write_text("c")
    found = inputs.find([str(tmp_path)], (".txt",))
    assert [relative for relative, _ in found.files] == ["b.txt/c.txt"]
    assert found.rejects == [("a.txt", "is a folder, without files of this kind in it")]


def test_a_real_folder_is_walked_before_a_link_to_it_whatever_their_names(tmp_path):
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "x.txt").write_text("x")
    (tmp_path / "z" / "a").symlink_to(tmp_path)  # and a link back
    (tmp_path / "b").symlink_to(tmp_path / "z")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "y.txt").write_text("y")
    found = inputs.find([str(tmp_path)], SUFFIXES)
    assert list(found.files) == [("c/y.txt", tmp_path / "c" / "y.txt"), ("z/x.txt", tmp_path / "z" / "x.txt")]
    assert (found.rejects, list(found.ignored)) == ([], [])


def test_files_with_one_name_below_two_roots_are_both_listed_in_order(tmp_path):
    for name in ("one/b.txt", "one/a.txt", "two/a.txt", "two/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = inputs.find([str(tmp_path / "two"), str(tmp_path / "one")], SUFFIXES)
    expected = [("a.txt", "one/a.txt"), ("a.txt", "two/a.txt"), ("b.txt", "one/b.txt"), ("b.txt", "two/b.txt")]
    assert list(found.files) == [(relative, tmp_path / path) for relative, path in expected]


def test_a_name_that_looks_like_a_glob_is_taken_literally_if_it_exists(tmp_path):
    for name in ("a[1].txt", "a1.txt", ".hidden.txt"):
        (tmp_path / name).write_text(name)
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]
    assert names(f"{tmp_path}/*") == ["a1.txt", "a[1].txt"]


def test_what_cannot_be_used_is_rejected_once_with_its_reason(tree, monkeypatch):
    (tree / "gone.txt").symlink_to(tree / "nowhere")
    (tree / "locked").mkdir()
    listed = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = inputs.find([str(tree), str(tree), str(tree / "gone.txt")], SUFFIXES)
    assert found.rejects == [
        ("gone.txt", "can't be read: No such file or directory"),
        ("locked", "folder can't be read: Permission denied"),
    ]
    assert [relative for relative, _ in found.files] == ["a/c.TXT", "a/d/e.txt.gz", "b.txt"]


# What a command has written


@pytest.mark.parametrize("argument", [".", "*", "**/*.txt", "a"])
def test_what_a_command_has_written_is_no_input(tmp_path, monkeypatch, argument):
    """The second of two equal commands must find what the first found, wherever the first has put its result."""
    monkeypatch.chdir(tmp_path)
    for name in ("a/own.txt", "a/runs/x/samples/made.txt", "a/shards/documents.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert len(inputs.find([argument], (".txt",)).files) == 3
    (tmp_path / "a" / "runs" / "x" / ".shortcut").write_text("shortcut train\n")
    if "**" not in argument:  # which names all files itself
        found = inputs.find([argument], (".txt",), out=tmp_path / "a" / "shards")
        assert [path.name for _, path in found.files] == ["own.txt"]
    (tmp_path / "a" / "shards" / ".shortcut").write_text("shortcut prepare\n")
    found = inputs.find([argument], (".txt",), out=tmp_path / "a" / "shards")
    assert [path.name for _, path in found.files] == ["own.txt"]
    assert list(found.ignored) == found.rejects == []


def test_a_folder_that_a_command_has_written_is_searched_if_it_is_named(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "made.txt").write_text("a")
    (tmp_path / ".shortcut").write_text("shortcut train\n")
    (tmp_path / "other.txt").write_text("b")
    for argument in (tmp_path / "samples", tmp_path / "*" / "*.txt"):
        assert "made.txt" in names(argument)[-1]
    found = inputs.find([str(tmp_path / "other.txt"), str(tmp_path)], (".txt",), out=tmp_path)
    assert list(found.files) == []
    assert found.outputs
