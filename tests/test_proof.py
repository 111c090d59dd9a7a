"""Prove: what is right is found equal, and what is not is found."""

import json
import shutil

import numpy as np
import pytest
from conftest import TEXT_SETTINGS, set_flags, shortcut
from test_preparation import DOMAINS, material, quiet, run

from shortcut_cli.errors import ShortcutError, UsageError
from shortcut_cli.shards import Shards
from shortcut_cli.stages import proof

assert material  # the fixture


def prove(folder, *paths, count=100):
    return proof.tokens(folder, [str(path) for path in paths], count=count, seed=1, report=quiet)


@pytest.mark.parametrize(("name", "kind", "settings"), DOMAINS, ids=str)
def test_documents_tokenized_again_in_other_blocks_are_equal(material, tmp_path, name, kind, settings):
    manifest = run(name, [material / kind], tmp_path / "s", *settings)
    result = prove(tmp_path / "s")
    assert result["different"] == []
    assert result["tokens"] == sum(split["tokens"] for split in manifest["splits"].values())


@pytest.mark.parametrize("kind", ["texts", "wavs"])
def test_a_contiguous_split_is_cut_again_at_the_same_places(material, tmp_path, kind):
    (name, _, settings) = next(domain for domain in DOMAINS if domain[1] == kind)
    manifest = run(name, [material / kind], tmp_path / "s", *settings, "data.split=contiguous")
    result = prove(tmp_path / "s", material / kind)
    assert (result["different"], result["tokens"]) == ([], sum(s["tokens"] for s in manifest["splits"].values()))


def test_one_wrong_id_is_found(material, tmp_path):
    run("music-tiny", [material / "midi"], tmp_path / "s")
    path = tmp_path / "s" / "val-00000.bin"
    ids = np.fromfile(path, "<u2")
    ids[10] ^= 1
    ids.tofile(path)
    wrong = [json.loads(line) for line in (tmp_path / "s" / "documents.jsonl").read_text().splitlines()]
    assert prove(tmp_path / "s")["different"] == [next(d["source"] for d in wrong if d["split"] == "val")]
    done = shortcut("prove", "tokens", tmp_path / "s", "--sources", "100", cwd=tmp_path, check=4)
    assert "1 documents have other tokens" in done.stderr


def test_sources_that_moved_or_changed(material, tmp_path):
    shutil.copytree(material / "midi", tmp_path / "midi")
    run("music-tiny", [tmp_path / "midi"], tmp_path / "s")
    (tmp_path / "midi").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="does not exist"):
        prove(tmp_path / "s")
    assert prove(tmp_path / "s", tmp_path / "moved")["different"] == []
    one, other = sorted((tmp_path / "moved").glob("*.mid"))[:2]
    one.write_bytes(other.read_bytes())
    with pytest.raises(ShortcutError, match="other documents"):
        prove(tmp_path / "s", tmp_path / "moved")
    Shards(tmp_path / "s")


def test_a_training_killed_while_it_saves_ends_in_the_same_bytes(text_run, tmp_path):
    flags = set_flags(*TEXT_SETTINGS, f"data.shards={text_run / 'shards'}", "train.steps=20", "train.eval_every=1")
    flags += set_flags("train.eval_windows=4")
    command = ("prove", "resume", "--recipe", "text-tiny", "--kills", "2", "--json", "--out", "runs", *flags)
    result = json.loads(shortcut(*command, cwd=tmp_path).stdout)
    assert result["kills"] == 2
    assert result["equal_weights"] is result["equal_logs"] is True
    assert set(result["killed_sha256"]) == {result["uninterrupted_sha256"]}
    lines = [json.loads(line) for line in (tmp_path / "runs" / "killed-1" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation" in line] == list(range(1, 21))
    assert not list((tmp_path / "runs").rglob("*.tmp"))
