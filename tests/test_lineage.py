"""train --init-from: which weights a run begins with, and that it is bound to them."""

import json
import re

import pytest
import torch
from conftest import shortcut
from test_training import equal, go, made, stop_after, tiny, weights_hash

from shortcut_cli import files
from shortcut_cli.errors import CheckFailed, Interrupted, UsageError
from shortcut_cli.events import Note
from shortcut_cli.inference import runs
from shortcut_cli.stages import inspection, training
from shortcut_cli.training import checkpoint, lineage


def begin(resolved, folder, first, stop=None, notes=None):
    return training.train(
        resolved,
        folder,
        device="cpu",
        resume="auto",
        report=lambda event: notes.append(event.text) if notes is not None and isinstance(event, Note) else None,
        stop=stop or stop_after(10**9),
        init_from=first,
    )


@pytest.fixture(scope="module")
def first(text_run, tmp_path_factory):
    """The run.pt of a run of the tiny model, and a checkpoint of weights all of which are different."""
    folder = tmp_path_factory.mktemp("first")
    go(tiny(text_run, "model.layers=2", "train.steps=3"), folder)
    return folder / "run.pt"


def first_weights(resolved, folder, ancestor):
    """The weights of a run before its first step, without the trainer's own initialisation in the middle."""
    return training.Trainer(resolved, folder, "cpu", lambda _: None, ancestor)


@pytest.mark.parametrize("settings", [(), ("train.ema=0.9",)])
def test_weights_of_equal_name_and_shape_are_taken_and_the_rest_is_as_without(text_run, tmp_path, first, settings):
    resolved = tiny(text_run, "model.layers=3", "model.ffn=24", *settings)
    source, plain = (
        checkpoint.load(first)["model"],
        made(text_run, tmp_path, "model.layers=3", "model.ffn=24").model.state_dict(),
    )
    trainer = first_weights(resolved, tmp_path, lineage.read(first))
    found = trainer.model.state_dict()
    same = {name for name in plain if name in source and source[name].shape == plain[name].shape}
    assert same > {"embedding.weight", "head.weight", "blocks.1.attention.out.weight"}
    assert not {name for name in same if "feed_forward.inner" in name or name.startswith("blocks.2")}
    assert equal(found, {name: source[name] if name in same else plain[name] for name in plain})
    assert equal(trainer.optimizer.weights(), found)  # the EMA begins with them too
    said = trainer.lineage
    assert set(said["taken"]) == same - {"head.weight"}  # tied: one weight, under its first name
    assert set(said["initialised"]) == set(plain) - same
    assert set(said["unused"]) == {name for name in source if "feed_forward" in name and source[name].dim() == 2}
    assert trainer.model.head.weight is trainer.model.embedding.weight


@pytest.mark.parametrize("source_tied", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(text_run, tmp_path, tied, source_tied):
    """A tied weight of the source serves as both; a tied one of the new run takes the embedding."""
    words = {True: "true", False: "false"}
    go(tiny(text_run, f"model.tied={words[source_tied]}", "train.steps=3"), tmp_path / "first")
    source = checkpoint.load(tmp_path / "first" / "run.pt")["model"]
    trainer = first_weights(
        tiny(text_run, f"model.tied={words[tied]}"), tmp_path, lineage.read(tmp_path / "first" / "run.pt")
    )
    model = trainer.model
    assert torch.equal(model.embedding.weight, source["embedding.weight"])
    assert torch.equal(model.head.weight, source["embedding.weight" if tied else "head.weight"])
    assert trainer.lineage["initialised"] == []
    assert trainer.lineage["unused"] == (["head.weight"] if tied and not source_tied else [])


def test_a_run_names_what_it_began_with_and_what_that_began_with(text_run, tmp_path, first):
    resolved = tiny(text_run, "model.layers=3")
    notes = []
    begin(resolved, tmp_path / "second", first, notes=notes)
    source, found = checkpoint.load(first), checkpoint.load(tmp_path / "second" / "run.pt")["lineage"]
    assert found["init_from"] == files.sha256(first)
    assert found["ancestors"] == []
    assert (found["step"], found["model"]) == (source["step"], "gpt")
    assert found["shards"] == source["shards"]
    assert found["tokenizer"] == source["tokenizer"]["fingerprint"]
    (said,) = (note for note in notes if "begins with" in note)
    _, begins, initialised, other = said.splitlines()
    assert other == "  its model has other keys: layers: 2 -> 3"
    count = len(found["taken"])
    assert (
        begins
        == f"begins with {found['init_from'][:12]}, step 3: {count} of {count + len(found['initialised'])} "
        + ("weights are taken")
    )
    assert initialised == "  initialised: " + ", ".join(found["initialised"])
    assert {name.split(".")[1] for name in found["initialised"]} == {"2"}
    chain = [first, tmp_path / "second" / "run.pt"]
    for name in ("third", "fourth"):
        begin(resolved, tmp_path / name, chain[-1])
        last = checkpoint.load(tmp_path / name / "resume.pt")["lineage"]
        nearest, *before = reversed([files.sha256(path) for path in chain])
        assert (last["init_from"], last["ancestors"]) == (nearest, before)
        chain.append(tmp_path / name / "run.pt")
    assert inspection.inspect(tmp_path / "fourth", verify=False)["lineage"] == last
    shown = shortcut("inspect", tmp_path / "fourth", cwd=tmp_path).stdout
    assert all(digest[:12] in shown for digest in (nearest, *before))
    runs.open_run(chain[-1], "cpu")


@pytest.mark.parametrize("count", [1, 98, 99, 100])
def test_the_nearest_100_ancestors_are_kept(text_run, first, count):
    digests = [f"{number:064x}" for number in range(count + 1)]
    ancestor = lineage.read(first)
    ancestor.content["lineage"] = {"init_from": digests[0], "ancestors": digests[1:]}
    assert first_weights(tiny(text_run), first.parent, ancestor).lineage["ancestors"] == digests[:100]


def test_a_run_is_bound_to_what_it_began_with(text_run, tmp_path, first):
    resolved = tiny(text_run, "model.layers=2")
    begin(resolved, tmp_path / "whole", first)
    with pytest.raises(Interrupted):
        begin(resolved, tmp_path / "run", first, stop_after(5))
    go(resolved, tmp_path / "plain")
    digest = files.sha256(first)[:12]
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    other = tmp_path / "plain" / "run.pt"
    with pytest.raises(UsageError, match=f"a different run\n  init_from: {digest} -> {files.sha256(other)[:12]}$"):
        begin(resolved, tmp_path / "run", other)
    with pytest.raises(UsageError, match=f"init_from: '?{files.sha256(first)}'? -> None|init_from: {digest} -> None"):
        go(resolved, tmp_path / "run")
    with pytest.raises(UsageError, match=f"init_from: None -> {digest}"):
        begin(resolved, tmp_path / "plain", first)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    begin(resolved, tmp_path / "run", first)
    for name in ("run.pt", "resume.pt"):
        assert weights_hash(tmp_path / "run", name) == weights_hash(tmp_path / "whole", name)
    assert weights_hash(tmp_path / "run") != weights_hash(tmp_path / "plain")
    assert begin(resolved, tmp_path / "run", first)["worked"] is False


def test_another_tokenizer_is_named(text_run, first):
    found = first_weights(tiny(text_run, "model.layers=2"), first.parent, lineage.read(first)).lineage
    assert "tokenizer" not in lineage.told(found, found["tokenizer"])
    assert f"{found['tokenizer'][:12]}, that of these shards {'f' * 12}" in lineage.told(found, "f" * 64)


def test_keys_that_change_what_weights_of_equal_shape_do_are_named(text_run, first):
    ancestor = lineage.read(first)
    same = first_weights(tiny(text_run, "model.layers=2"), first.parent, ancestor).lineage
    assert same["differs"] == []
    assert "other keys" not in lineage.told(same, same["tokenizer"])
    other = ("model.layers=2", "model.name=value_residual", "model.rope_base=30", "model.activation=relu2")
    other += ("model.value_residual.gate=token", "model.shortcut.map_width=99")  # the last of neither architecture
    found = first_weights(tiny(text_run, *other), first.parent, ancestor).lineage
    expected = ["activation: 'gelu' -> 'relu2'", "name: 'gpt' -> 'value_residual'", "rope_base: 10000.0 -> 30.0"]
    assert found["differs"] == [*expected, "value_residual.gate: 'scalar' -> 'token'"]
    assert "its model has other keys: activation: 'gelu' -> 'relu2', name" in lineage.told(found, found["tokenizer"])


def test_many_names_are_not_all_in_the_line(text_run, first):
    found = first_weights(tiny(text_run, "model.layers=2"), first.parent, lineage.read(first)).lineage
    said = lineage.told(found | {"unused": [f"w{number}" for number in range(25)]}, found["tokenizer"])
    assert "w18, w19 and 5 more" in said


def test_what_no_run_can_begin_with_is_refused(text_run, tmp_path, first):
    with pytest.raises(UsageError, match=r"no weight of .* has the name and shape") as refused:
        begin(tiny(text_run, "model.layers=1", "model.width=12"), tmp_path / "a", first)
    assert re.fullmatch(r"its model has other keys: layers: \d -> 1, width: \d+ -> 12", refused.value.hint)
    assert not (tmp_path / "a").exists()
    (tmp_path / "damaged.pt").write_bytes(first.read_bytes()[:-9])
    with pytest.raises(CheckFailed, match=r"damaged\.pt can't be read"):
        begin(tiny(text_run), tmp_path / "b", tmp_path / "damaged.pt")


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_refused(tmp_path, monkeypatch, first):
    copy = tmp_path / "run.pt"
    copy.write_bytes(first.read_bytes())
    load = checkpoint.load

    def replacing(path):
        found = load(path)
        (tmp_path / "new").write_bytes(path.read_bytes())
        (tmp_path / "new").replace(path)
        return found

    monkeypatch.setattr(checkpoint, "load", replacing)
    with pytest.raises(UsageError, match="was replaced while it was read"):
        lineage.read(copy)


STRANGE = [
    ("init_from", "x"),
    ("init_from", 3),
    ("ancestors", ["x"]),
    ("ancestors", ["a" * 64] * 101),
    ("taken", ["no.such.weight"]),
    ("initialised", [3]),
    ("unused", ["x" * 201]),
    ("differs", ["x" * 201]),
    ("differs", [3]),
    ("step", "1"),
    ("model", "x" * 201),
    ("more", 1),
]


@pytest.mark.parametrize(("key", "value"), STRANGE)
def test_a_strange_lineage_is_refused_by_the_reader(text_run, tmp_path, first, key, value):
    content = checkpoint.load(first)
    names = list(content["model"])
    whole = {"init_from": "a" * 64, "ancestors": ["b" * 64], "step": 3, "model": "gpt", "shards": "", "tokenizer": ""}
    whole |= {"taken": names[:1], "initialised": names[1:], "unused": ["old"], "differs": []}
    checkpoint.save(tmp_path / "run.pt", content | {"lineage": whole})
    assert json.loads(json.dumps(checkpoint.load(tmp_path / "run.pt")["lineage"])) == whole
    checkpoint.save(tmp_path / "run.pt", content | {"lineage": whole | {key: value}})
    with pytest.raises(CheckFailed, match="its fields have the wrong types"):
        checkpoint.load(tmp_path / "run.pt")


def test_the_flag_takes_a_run_folder_or_its_file(text_run, tmp_path, first):
    flags = ("--recipe", tmp_path / "r.toml", "--device", "cpu")
    (tmp_path / "r.toml").write_text((first.parent / "recipe.toml").read_text())
    for number, given in enumerate((first, first.parent)):
        shortcut("train", *flags, "--out", tmp_path / str(number), "--init-from", given, cwd=tmp_path)
    assert weights_hash(tmp_path / "0") == weights_hash(tmp_path / "1")
    done = shortcut("train", *flags, "--out", "x", "--init-from", "nowhere", cwd=tmp_path, check=2)
    assert "nowhere does not exist" in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("ancestor", ["run.pt", "last.pt"])
def test_a_run_does_not_replace_the_checkpoint_that_it_begins_with(text_run, tmp_path, ancestor):
    folder = tmp_path / "run"
    go(tiny(text_run, "model.layers=2", "train.steps=3", "train.keep=best, last"), folder)
    before = (folder / ancestor).read_bytes()
    with pytest.raises(UsageError, match=r"is in .*, whose run this one would replace"):
        training.train(
            tiny(text_run, "model.layers=2"),
            folder,
            device="cpu",
            resume="never",
            report=lambda _: None,
            stop=stop_after(10**9),
            init_from=folder / ancestor,
        )
    assert (folder / ancestor).read_bytes() == before


def test_a_checkpoint_whose_first_bytes_are_lost_is_damaged(first, tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(b"x" * 9 + first.read_bytes()[9:])
    with pytest.raises(CheckFailed, match="it ends as a checkpoint, but does not begin as one"):
        lineage.read(path)
