"""Checkpoints and files on disk: read without running code, refused for every single fault, complete or absent."""

import collections
import errno
import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXT_SETTINGS

from shortcut_cli import files, registry
from shortcut_cli.config import reading
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.inference import runs
from shortcut_cli.stages import evaluation
from shortcut_cli.tokenizers.text import TextTokenizer
from shortcut_cli.training import checkpoint, tensor_file, trainer

SMALL = ("model.layers=2", "model.width=16", "model.heads=2", "model.ffn=16", "model.context=8", "eval.stride=4")


def small_run(path, *settings):
    """Write the run.pt of a small untrained text model with `checkpoint.save`; returns its content."""
    resolved = reading.read("text-tiny", [*TEXT_SETTINGS, "model.name=gpt", *SMALL, *settings])
    tokenizer = TextTokenizer(resolved.tokenizer)
    folder = path.parent / f"{path.name}-tokenizer"
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder)
    model = registry.load(registry.MODELS, "gpt")(resolved.model, tokenizer.vocabulary, 3)
    content = {
        "format": 1,
        "recipe": resolved.model_dump(),
        "model": model.state_dict(),
        "vocabulary": tokenizer.vocabulary,
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "files": checkpoint.pack_folder(folder)},
        "shards": "checksum of the shards",
        "step": 7,
        "scores": {"validation": 1.5},
        "versions": tensor_file.versions(),
    }
    checkpoint.save(path, content)
    return content


def with_seal(write):
    """The bytes of a zip file that `write` fills, with a valid checksum as the format describes it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        write(archive)
        archive.comment = b"-" * 80
    body = stream.getvalue()[:-80]
    return body + b"shortcut sha256 " + hashlib.sha256(body).hexdigest().encode()


def entries(content):
    """The zip entries that `torch.save` writes."""
    stream = io.BytesIO()
    torch.save(content, stream)
    with zipfile.ZipFile(stream) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_pickle(path, program):
    """A PyTorch file with a valid checksum whose pickle is `program`."""
    changed = entries({"a": torch.ones(3)}) | {"archive/data.pkl": program}
    path.write_bytes(with_seal(lambda archive: [archive.writestr(name, text) for name, text in changed.items()]))


@pytest.fixture
def no_unpickling(monkeypatch):
    """Fails if PyTorch is asked to read a file."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the file reached torch.load"))


# No code is run


TOUCH = b"S'touch proof'\n"
PROGRAMS = {
    "STACK_GLOBAL": b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93X\x0b\x00\x00\x00touch proof\x85R.",
    "INST": b"(" + TOUCH + b"ios\nsystem\n.",
    "INST of an allowed class": b"(icollections\nOrderedDict\n.",
    "OBJ of an allowed class": b"(ccollections\nOrderedDict\no.",
    "NEWOBJ of an allowed class": b"ccollections\nOrderedDict\n)\x81.",
    "GLOBAL": b"cos\nsystem\n(" + TOUCH + b"tR.",
    "GLOBAL after an allowed one": b"ccollections\nOrderedDict\n0cos\nsystem\n(" + TOUCH + b"tR.",
    "EXT1": b"\x82\x01.",
}
GLOBALS = (
    *("builtins eval", "builtins bytearray", "__builtin__ bytearray", "os FloatStorageX", "collections Counter"),
    *("collections OrderedDic", "torch Size", "torch device", "torch Tensor", "torch._utils _rebuild_parameter"),
    *("torch._utils _rebuild_sparse_tensor", "torch.storage _load_from_bytes", "_codecs encode"),
)


@pytest.mark.usefixtures("no_unpickling")
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_pickle_that_calls_something_is_refused_before_it_runs(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    write_pickle(tmp_path / "run.pt", b"\x80\x02" + program)
    with pytest.raises(CheckFailed, match="can't be read: it asks for "):
        tensor_file.load(tmp_path / "run.pt", "run.pt")
    assert not (tmp_path / "proof").exists()


@pytest.mark.usefixtures("no_unpickling")
@pytest.mark.parametrize("name", GLOBALS)
def test_a_class_that_is_not_on_the_list_is_refused_and_named(tmp_path, name):
    write_pickle(tmp_path / "run.pt", b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n.")
    with pytest.raises(CheckFailed, match=f"it asks for {name}"):
        tensor_file.load(tmp_path / "run.pt", "run.pt")


def test_everything_that_a_checkpoint_is_made_of_is_read_back(tmp_path):
    names = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    tensors = {name: torch.tensor([[0, 1], [1, 0]]).to(getattr(torch, name)) for name in names}
    rest = {"numbers": [1, -2, 2**60, 0.5, True, None], "text": "\u00e9", "ordered": collections.OrderedDict(a=(1, 2))}
    tensor_file.save(tmp_path / "run.pt", {"tensors": tensors, **rest})
    found = tensor_file.load(tmp_path / "run.pt", "run.pt")
    assert {key: found[key] for key in rest} == rest
    assert type(found["ordered"]) is dict
    assert found["tensors"].keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found["tensors"][name].dtype == tensor.dtype
        assert torch.equal(found["tensors"][name], tensor)


@pytest.mark.usefixtures("no_unpickling")
@pytest.mark.parametrize("name", ["archive/data.pkl", "archive/data/0"])
def test_an_entry_that_is_compressed_is_refused(tmp_path, name):
    def write(archive):
        for entry, text in entries({"a": torch.zeros(1000)}).items():
            archive.writestr(entry, text, zipfile.ZIP_DEFLATED if entry == name else zipfile.ZIP_STORED)

    (tmp_path / "run.pt").write_bytes(with_seal(write))
    with pytest.raises(CheckFailed, match=f"{name} is not stored as PyTorch stores it"):
        tensor_file.load(tmp_path / "run.pt", "run.pt")


@pytest.mark.usefixtures("no_unpickling")
def test_an_entry_that_claims_more_bytes_than_the_file_has_is_refused(tmp_path):
    def write(archive):
        for entry, text in entries({"a": torch.zeros(3)}).items():
            archive.writestr(entry, text)
        archive.getinfo("archive/data/0").file_size = 10**6  # in the zip file's central directory

    (tmp_path / "run.pt").write_bytes(with_seal(write))
    with pytest.raises(CheckFailed, match="archive/data/0 is not stored as PyTorch stores it"):
        tensor_file.load(tmp_path / "run.pt", "run.pt")


@pytest.mark.usefixtures("no_unpickling")
@pytest.mark.parametrize("programs", [0, 2])
def test_a_zip_file_without_one_pickle_is_refused(tmp_path, programs):
    kept = entries({"a": torch.zeros(3)})
    program = kept.pop("archive/data.pkl")
    kept |= {f"{number}/data.pkl": program for number in range(programs)}
    (tmp_path / "run.pt").write_bytes(
        with_seal(lambda archive: [archive.writestr(name, text) for name, text in kept.items()])
    )
    with pytest.raises(CheckFailed, match="can't be read"):
        tensor_file.load(tmp_path / "run.pt", "run.pt")


# The checksum


def test_the_checksum_is_that_of_all_bytes_before_it(tmp_path):
    tensor_file.save(tmp_path / "run.pt", {"a": torch.arange(50)})
    content = (tmp_path / "run.pt").read_bytes()
    assert content[-80:] == b"shortcut sha256 " + hashlib.sha256(content[:-80]).hexdigest().encode()
    with zipfile.ZipFile(tmp_path / "run.pt") as archive:
        assert archive.comment == content[-80:]
        assert archive.testzip() is None
    assert torch.equal(torch.load(tmp_path / "run.pt", weights_only=True)["a"], torch.arange(50))


@pytest.mark.usefixtures("no_unpickling")
def test_a_wrong_checksum_is_distinguished_from_a_missing_one(tmp_path):
    path = tmp_path / "run.pt"
    tensor_file.save(path, {"a": torch.arange(50)})
    whole = path.read_bytes()
    changed = [
        *(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :] for place in (30, len(whole) // 2, -81)),
        *(whole[:place] + b"g" + whole[place + 1 :] for place in (-64, -2)),  # a digit of the checksum
        whole[:-1] + b"g",
        whole[:50] + whole[51:],
        whole[:50] + b"x" + whole[50:],
        whole[:-80] + b"shortcut sha256 " + b"0" * 64,
    ]
    for content in changed:
        path.write_bytes(content)
        with pytest.raises(CheckFailed, match="bytes have changed since it was written"):
            tensor_file.load(path, "run.pt")
    for content in (whole[:-1], whole[:-80], whole[:100], whole + b"x", b"PK", whole[:-80] + b"SHORTCUT" + whole[-72:]):
        path.write_bytes(content)
        with pytest.raises(CheckFailed, match="is truncated, or was not written by `shortcut`"):
            tensor_file.load(path, "run.pt")


def test_the_checksum_of_files_longer_than_a_block_covers_them_to_their_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 64)
    path = tmp_path / "run.pt"
    tensor_file.save(path, {"a": torch.arange(50)})
    assert torch.equal(tensor_file.load(path, "run.pt")["a"], torch.arange(50))
    whole = path.read_bytes()
    assert files.sha256(path) == hashlib.sha256(whole).hexdigest()
    path.write_bytes(whole[:-90] + bytes([whole[-90] ^ 1]) + whole[-89:])
    with pytest.raises(CheckFailed, match="bytes have changed"):
        tensor_file.load(path, "run.pt")


def test_what_ends_with_a_checksum_is_recognised(tmp_path):
    tensor_file.save(tmp_path / "sealed.pt", {"a": 1})
    torch.save({"a": 1}, tmp_path / "plain.pt")
    whole = (tmp_path / "sealed.pt").read_bytes()
    for name, content in (("short", b"PK"), ("empty", b""), ("longer", whole + b"x"), ("shorter", whole[:-1])):
        (tmp_path / f"{name}.pt").write_bytes(content)
    (tmp_path / "changed.pt").write_bytes(whole[:40] + b"x" + whole[41:])
    found = {path.stem for path in tmp_path.glob("*.pt") if tensor_file.is_sealed(path)}
    assert found == {"sealed", "changed"}


@pytest.mark.parametrize(
    ("name", "writer"), [("run.pt", "run.pt"), ("resume.pt", "write it"), ("codec.pt", "codec train")]
)
def test_a_foreign_file_is_a_usage_error_that_names_the_command_that_writes_one(tmp_path, name, writer):
    (tmp_path / "text.pt").write_bytes(b"PX")
    (tmp_path / "folder.pt").mkdir()
    for path, text in (("text", f"is not a {name}"), ("folder", "is no regular file"), ("missing", "does not exist")):
        with pytest.raises(UsageError, match=text) as refused:
            tensor_file.load(tmp_path / f"{path}.pt", name)
        assert "shortcut " in refused.value.hint
        assert writer in refused.value.hint
    (tmp_path / "zip.pt").write_bytes(b"PK")
    tensor_file.recognise(tmp_path / "zip.pt", name)


def test_tensors_are_put_on_the_device_asked_for_and_tied_ones_stay_tied(tmp_path):
    tied = torch.ones(2)
    tensor_file.save(tmp_path / "run.pt", {"a": tied, "b": tied.view(2, 1)})
    for device in ("cpu", "meta"):
        found = tensor_file.load(tmp_path / "run.pt", "run.pt", device)
        assert {tensor.device.type for tensor in found.values()} == {device}
        assert found["a"].untyped_storage()._cdata == found["b"].untyped_storage()._cdata


def test_a_disk_error_is_not_hidden_by_pytorch(tmp_path, monkeypatch):
    def fails(content, stream):
        with pytest.raises(OSError, match="disk"):
            stream.write(b"x")
        raise RuntimeError("PytorchStreamWriter failed")

    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(28, "no space on the disk")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space on the disk"):
        tensor_file._save({}, Full())

    def fails_otherwise(*_):
        raise RuntimeError("another")

    monkeypatch.setattr(torch, "save", fails_otherwise)
    with pytest.raises(RuntimeError, match="another"):
        tensor_file._save({}, Full())


def test_tensors_are_distinguished_from_other_values():
    assert tensor_file.are_tensors({})
    assert tensor_file.are_tensors({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.int64)})
    assert tensor_file.are_tensors({"a": torch.ones(2, dtype=torch.uint8)}, "uint8")
    assert not tensor_file.are_tensors({"a": torch.ones(2)}, "uint8")
    right = torch.ones(2, 3)
    for wrong in (None, [right], right, {1: right}, {"a": right, "b": [1.0]}):
        assert not tensor_file.are_tensors(wrong)


# run.pt


def test_a_checkpoint_is_read_back_as_it_was_written(tmp_path):
    content = small_run(tmp_path / "run.pt")
    found = checkpoint.load(tmp_path / "run.pt")
    assert found.keys() == content.keys()
    for key in content.keys() - {"model", "tokenizer"}:
        assert found[key] == content[key]
    assert found["model"].keys() == content["model"].keys()
    assert all(torch.equal(found["model"][name], weight) for name, weight in content["model"].items())


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("recipe", []),
        ("model", [torch.ones(1)]),
        ("model", {"a": 1.0}),
        ("vocabulary", 8.0),
        ("vocabulary", "8"),
        ("vocabulary", 0),
        ("tokenizer", []),
        ("tokenizer", {}),
        ("tokenizer", {"fingerprint": 1, "files": {}}),
        ("tokenizer", {"fingerprint": "f", "files": {"a": torch.ones(1)}}),
        ("tokenizer", {"fingerprint": "f", "files": [torch.ones(1, dtype=torch.uint8)]}),
        ("tokenizer", {"fingerprint": "f"}),
        ("tokenizer", {"files": {}}),
        ("shards", None),
        ("step", 1.0),
        ("step", "1"),
        ("scores", []),
        ("scores", {"validation": "1.5"}),
        ("scores", {"validation": [1.5]}),
        ("scores", {1: 1.5}),
        ("scores", {str(number): 1.5 for number in range(200)}),
        ("scores", {"v" * 1000: 1.5}),
        ("versions", "1.0"),
        ("versions", {"torch": 2}),
        ("versions", {"torch": "2" * 1000}),
        ("versions", {"torch": {"torch": "2"}}),
        ("recipe", {"model": {"name": "gpt"}, "data": {"shards": [1] * 2000}}),
        ("recipe", {}),
        ("recipe", {"model": {"name": ["gpt"]}}),
        ("recipe", {"model": "gpt"}),
        ("recipe", {"model": {"name": "gpt"}, "train": 3}),
        ("recipe", {"model": {"name": "gpt"}, "train": {3: 3}}),
        ("recipe", {"model": {"name": "gpt"}, 3: {}}),
        ("recipe", {"model": {"name": "gpt"}, "train": {"lr": torch.ones(2)}}),
        ("recipe", {"model": {"name": "gpt"}, "train": {"lr": [torch.ones(2)]}}),
        ("recipe", {"model": {"name": "gpt"}, "codec": {"network": "frame"}}),
        ("scores", {}),
    ],
)
def test_a_field_of_the_wrong_type_is_refused(tmp_path, field, wrong):
    right = {
        "format": 1,
        "recipe": {"model": {"name": "gpt"}},
        "model": {"a": torch.ones(1)},
        "vocabulary": 8,
        "tokenizer": {"fingerprint": "f", "files": {"a": torch.ones(1, dtype=torch.uint8)}},
        "shards": "",
        "step": 1,
        "scores": {"validation": 1.5},
        "versions": {},
    }
    checkpoint.save(tmp_path / "run.pt", right)
    checkpoint.load(tmp_path / "run.pt")
    checkpoint.save(tmp_path / "run.pt", right | {field: wrong})
    with pytest.raises(CheckFailed, match=r"is not a run\.pt: its fields have the wrong types"):
        checkpoint.load(tmp_path / "run.pt")


FIELDS = ("format", "recipe", "model", "vocabulary", "tokenizer", "shards", "step", "scores", "versions")


@pytest.mark.parametrize("field", FIELDS)
def test_a_checkpoint_without_one_of_its_fields_is_neither_written_nor_read(tmp_path, field):
    content = small_run(tmp_path / "run.pt")
    del content[field]
    with pytest.raises(AssertionError, match=field):
        checkpoint.save(tmp_path / "run.pt", content)
    tensor_file.save(tmp_path / "run.pt", content)
    with pytest.raises(CheckFailed, match=r"but not a run\.pt"):
        checkpoint.load(tmp_path / "run.pt")


def test_a_pytorch_file_with_other_content_is_refused(tmp_path):
    tensor_file.save(tmp_path / "run.pt", [1, 2])
    with pytest.raises(CheckFailed, match=r"but not a run\.pt"):
        checkpoint.load(tmp_path / "run.pt")


@pytest.mark.parametrize("number", [0, 2, "1", None, True, [1]])
def test_another_format_is_refused_and_named(tmp_path, number):
    content = small_run(tmp_path / "run.pt")
    checkpoint.save(tmp_path / "run.pt", content | {"format": number})
    with pytest.raises(CheckFailed, match=re.escape(f"has format {number!r}; this version reads 1")) as refused:
        checkpoint.load(tmp_path / "run.pt")
    assert refused.value.hint == "update shortcut"


def test_opening_a_run_gives_its_own_weights_in_eval_mode(tmp_path, monkeypatch):
    content = small_run(tmp_path / "run.pt", "model.dropout=0.5")
    run = runs.open_run(tmp_path / "run.pt", "cpu")
    assert run.path == tmp_path / "run.pt"
    assert run.recipe.model_dump() == content["recipe"]
    assert run.content["step"] == 7
    assert not any(module.training for module in run.model.modules())
    weights = run.model.state_dict()
    assert weights.keys() == content["model"].keys()
    assert all(torch.equal(weights[name], weight) for name, weight in content["model"].items())
    assert {weight.device.type for weight in weights.values()} == {"cpu"}
    on_meta = checkpoint.load(tmp_path / "run.pt", "meta")["model"]
    assert {weight.device.type for weight in on_meta.values()} == {"meta"}
    load, devices = checkpoint.load, []
    monkeypatch.setattr(checkpoint, "load", lambda path, device: devices.append(device) or load(path))
    elsewhere = runs.open_run(tmp_path / "run.pt", "meta").model
    assert devices == ["meta"]
    assert {weight.device.type for weight in elsewhere.state_dict().values()} == {"meta"}


def test_weights_that_do_not_match_the_recipe_are_refused_and_named(tmp_path):
    content = small_run(tmp_path / "run.pt")
    name, weight = next(item for item in content["model"].items() if item[1].ndim == 2)
    wrong = {
        "shape": content["model"] | {name: weight[:-1].clone()},
        "turned": content["model"] | {name: weight.reshape(weight.shape[::-1])},
        "missing": {key: value for key, value in content["model"].items() if key != name},
    }
    for model in wrong.values():
        checkpoint.save(tmp_path / "run.pt", content | {"model": model})
        with pytest.raises(CheckFailed, match="the weights do not match its recipe") as refused:
            runs.open_run(tmp_path / "run.pt", "cpu")
        assert f"{name}: {tuple(weight.shape)} -> " in refused.value.message
    checkpoint.save(tmp_path / "run.pt", content | {"model": content["model"] | {"more": torch.ones(2)}})
    with pytest.raises(CheckFailed, match=r"more: None -> \(2,\)"):
        runs.open_run(tmp_path / "run.pt", "cpu")
    checkpoint.save(tmp_path / "run.pt", content | {"vocabulary": content["vocabulary"] + 1})
    with pytest.raises(CheckFailed, match="the weights do not match its recipe"):
        runs.open_run(tmp_path / "run.pt", "cpu")
    checkpoint.save(tmp_path / "run.pt", content | {"model": {"a": torch.ones(1), "b": torch.ones(1)}})
    with pytest.raises(CheckFailed) as refused:
        runs.open_run(tmp_path / "run.pt", "cpu")
    assert len(refused.value.message.splitlines()) == 6  # one, and the first five differences


def test_a_recipe_in_a_checkpoint_is_checked_and_the_file_named(tmp_path):
    content = small_run(tmp_path / "run.pt")
    content["recipe"]["train"]["stepz"] = 1
    checkpoint.save(tmp_path / "run.pt", content)
    with pytest.raises(CheckFailed, match=r"run\.pt is not a valid recipe\n  train\.stepz: no such key"):
        runs.open_run(tmp_path / "run.pt", "cpu")


def test_a_flat_folder_is_packed_by_name(tmp_path):
    (tmp_path / "b").write_bytes(bytes(range(256)))
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    packed = checkpoint.pack_folder(tmp_path)
    assert list(packed) == ["a", "b"]
    assert {tensor.dtype for tensor in packed.values()} == {torch.uint8}
    assert (packed["a"].tolist(), packed["b"].tolist()) == ([], list(range(256)))


# The tokenizer


def test_the_tokenizer_of_a_run_is_built_from_the_files_inside_it(tmp_path, monkeypatch):
    small_run(tmp_path / "run.pt")
    run = runs.open_run(tmp_path / "run.pt", "cpu")
    run.content["tokenizer"]["files"]["more.bin"] = torch.arange(256).to(torch.uint8)
    seen = {}
    load = TextTokenizer.load.__func__

    def spy(kind, options, folder):
        seen.update({path.name: path.read_bytes() for path in folder.iterdir()}, folder=folder, options=options)
        return load(kind, options, folder)

    monkeypatch.setattr(TextTokenizer, "load", classmethod(spy))
    assert run.tokenizer().fingerprint == run.content["tokenizer"]["fingerprint"]
    assert seen["tokenizer.json"] == (tmp_path / "run.pt-tokenizer" / "tokenizer.json").read_bytes()
    assert seen["more.bin"] == bytes(range(256))
    assert seen["options"] == run.recipe.tokenizer
    assert not seen["folder"].exists()


def test_a_tokenizer_with_another_fingerprint_is_refused_and_both_are_named(tmp_path):
    content = small_run(tmp_path / "run.pt")
    ours, theirs = content["tokenizer"]["fingerprint"], "0123456789ab" + "c" * 52
    run = runs.open_run(tmp_path / "run.pt", "cpu")
    assert run.tokenizer().fingerprint == ours
    run.content["tokenizer"]["fingerprint"] = theirs
    with pytest.raises(CheckFailed, match=f"trained with tokenizer 0123456789ab, .* {ours[:12]}") as refused:
        run.tokenizer()
    assert "shortcut inspect" in refused.value.hint
    run.content["tokenizer"]["fingerprint"] = ours[:-1] + ("0" if ours[-1] != "0" else "1")
    with pytest.raises(CheckFailed, match="was trained with tokenizer"):
        run.tokenizer()


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "a/", ".", "..", "", "a\0b"])
def test_a_tokenizer_file_with_a_path_for_a_name_is_refused(tmp_path, monkeypatch, name):
    small_run(tmp_path / "run.pt")
    run = runs.open_run(tmp_path / "run.pt", "cpu")
    run.content["tokenizer"]["files"] = {name: torch.ones(1, dtype=torch.uint8)}
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(CheckFailed, match="holds a tokenizer file with the path"):
        run.tokenizer()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.pt", "run.pt-tokenizer"]


def test_shards_of_another_tokenizer_than_the_runs_are_refused_and_both_named(tmp_path):
    run = SimpleNamespace(path=Path("run.pt"), content={"tokenizer": {"fingerprint": "a" * 64}, "vocabulary": 9})
    shards = SimpleNamespace(folder=Path("shards"), tokenizer={"fingerprint": "a" * 64, "vocabulary": 9})
    evaluation.check_tokenizer(run, shards)
    for other in ("b" * 64, "a" * 63 + "b"):
        shards.tokenizer["fingerprint"] = other
        with pytest.raises(UsageError) as refused:
            evaluation.check_tokenizer(run, shards)
        assert f"tokenizer {'a' * 12}, shards was made with {other[:12]}" in refused.value.message
        assert "--shards" in refused.value.hint
    shards.tokenizer |= {"fingerprint": "a" * 64, "vocabulary": 10}
    with pytest.raises(CheckFailed, match="a vocabulary of 9 ids, shards one of 10"):
        evaluation.check_tokenizer(run, shards)


@pytest.mark.parametrize(
    "setting", ["tokenizer.alphabet=abc", "tokenizer.documents=line", "tokenizer.normalization=nfkc"]
)
def test_training_on_shards_with_other_tokenizer_keys_is_refused_and_named(setting):
    resolved = reading.read("text-tiny", TEXT_SETTINGS)
    made = {"request": {"tokenizer": resolved.tokenizer.model_dump()}}
    shards = SimpleNamespace(folder=Path("shards"), manifest=made, tokenizer={"fingerprint": "0123456789abcdef"})
    trainer._check_tokenizer(resolved, shards)
    key, _, value = setting.partition("=")
    with pytest.raises(UsageError) as refused:
        trainer._check_tokenizer(reading.with_settings(resolved, [setting]), shards)
    assert "fingerprint 0123456789ab)" in refused.value.message
    old = made["request"]["tokenizer"][key.removeprefix("tokenizer.")]
    assert f"  {key}: {old!r} -> {value!r}" in refused.value.message


# Files that are complete or absent


def watch(monkeypatch, folder):
    """What happens to the files in a folder, in order: each sync with the size that it finds, each rename."""
    events, names = [], {}
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        found = os.fstat(handle)
        if found.st_ino == folder.stat().st_ino:
            events.append("sync of the folder")
        else:
            (name,) = (path.name for path in folder.iterdir() if path.stat().st_ino == found.st_ino)
            events.append(f"sync of {names.setdefault(name, 'a temporary file')}, {found.st_size} bytes")
        fsync(handle)

    def replaced(old, new):
        events.append(f"{names.get(old.name, old.name)} -> {new.name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    return events


def test_a_file_is_synced_then_renamed_then_its_folder_is_synced(tmp_path, monkeypatch):
    events = watch(monkeypatch, tmp_path)
    files.write(tmp_path / "f", b"12345")
    assert events == ["sync of a temporary file, 5 bytes", "a temporary file -> f", "sync of the folder"]
    events.clear()
    with files.writing(tmp_path / "f", tmp_path / "f.prev") as stream:
        stream.write(b"123")
        assert (tmp_path / "f").read_bytes() == b"12345"
    assert events == [
        "sync of a temporary file, 3 bytes",
        "f -> f.prev",
        "a temporary file -> f",
        "sync of the folder",
    ]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"f": b"123", "f.prev": b"12345"}
    events.clear()
    files.write(tmp_path / "quick", "\u00e9", durable=False)
    assert [event.partition(" -> ")[2] for event in events] == ["quick"]
    assert (tmp_path / "quick").read_bytes() == b"\xc3\xa9"


def test_a_checkpoint_is_durable_and_the_one_before_is_kept(tmp_path, monkeypatch):
    small_run(tmp_path / "run.pt")
    first, content = (tmp_path / "run.pt").read_bytes(), checkpoint.load(tmp_path / "run.pt")
    events = watch(monkeypatch, tmp_path)
    checkpoint.save(tmp_path / "run.pt", content | {"step": 8}, previous=tmp_path / "previous.pt")
    size = (tmp_path / "run.pt").stat().st_size
    assert events == [
        f"sync of a temporary file, {size} bytes",
        "run.pt -> previous.pt",
        "a temporary file -> run.pt",
        "sync of the folder",
    ]
    assert (tmp_path / "previous.pt").read_bytes() == first
    assert checkpoint.load(tmp_path / "run.pt")["step"] == 8


def test_a_block_that_fails_leaves_everything_as_it_was(tmp_path):
    def fail():
        with files.writing(tmp_path / "f", tmp_path / "f.prev") as stream:
            stream.write(b"half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
    files.write(tmp_path / "f", b"whole")
    with pytest.raises(RuntimeError):
        fail()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"f": b"whole"}
    with files.writing(tmp_path / "f", tmp_path / "f.prev") as stream:
        stream.write(b"other")
        (temporary,) = tmp_path.glob(".*")
        assert temporary.name == f".f.{os.getpid()}.tmp"
        stream.seek(0)
        assert stream.read() == b"other"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"f": b"other", "f.prev": b"whole"}


def test_a_name_of_any_length_that_the_file_system_allows_can_be_written(tmp_path):
    files.write(tmp_path / ("n" * 250), "x")
    assert (tmp_path / ("n" * 250)).read_text() == "x"


def test_holding_a_folder_removes_what_dead_processes_left_there(tmp_path, monkeypatch):
    states = {11: ProcessLookupError, 12: PermissionError, 13: None, 14: OverflowError}

    def kill(process, number):
        assert number == 0
        if states[process]:
            raise states[process]

    monkeypatch.setattr(os, "kill", kill)
    (tmp_path / "inner").mkdir()
    kept = [".b.12.tmp", ".c.13.tmp", ".d.14.tmp", ".e.tmp", ".f.x1.tmp", "g.11.tmp", ".h.11.tmpx", "inner/.i.11.tmp"]
    for name in [".a.pt.11.tmp", *kept]:
        (tmp_path / name).write_bytes(b"half")
    with files.held(tmp_path, "a test", known=lambda _: True):
        found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
        assert found == {*kept, ".shortcut"}


def test_a_lock_names_its_holder_and_nobody_after_it(tmp_path):
    folder = tmp_path / "new" / "folder"
    folder.mkdir(parents=True)
    (folder / ".shortcut").write_text("shortcut train, process 1234567890 with a long name that was killed\n")
    with files.held(folder, "shortcut train"):
        assert (folder / ".shortcut").read_text() == f"shortcut train, process {os.getpid()}\n"
        with pytest.raises(UsageError) as refused, files.held(folder, "shortcut prepare"):
            pass
        assert refused.value.message == f"{folder} is in use: shortcut train, process {os.getpid()}"
        assert "--out" in refused.value.hint
        assert (folder / ".shortcut").read_text() == f"shortcut train, process {os.getpid()}\n"
        (folder / "work").write_text("")
    assert (folder / ".shortcut").read_text() == "shortcut train\n"
    with files.held(tmp_path / "made" / "for it", "shortcut a"):
        (tmp_path / "made" / "for it" / ".shortcut").write_text("")
        with (
            pytest.raises(UsageError, match="in use: another process"),
            files.held(tmp_path / "made" / "for it", "shortcut b"),
        ):
            pass
    assert not (tmp_path / "made").exists()


def test_a_folder_is_ours_by_its_marker_alone(tmp_path):
    """Not by a lock, a hidden folder or a marker that someone else wrote; what is in it then stays as it is."""
    for inside in (".lock", ".staging", ".partial", ".shortcut", "tokenizer", "resume.pt", "comparison.json"):
        folder = tmp_path / inside.removeprefix(".")
        folder.mkdir()
        (folder / inside).write_text("of someone else")
        message = "is not empty, and was not made by `shortcut a`"
        with pytest.raises(UsageError, match=message) as refused, files.held(folder, "shortcut a"):
            pass
        assert refused.value.hint == "choose another --out"
        assert {path.name: path.read_text() for path in folder.iterdir()} == {inside: "of someone else"}
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"), files.held(tmp_path / "file", "shortcut a"):
        pass
    with files.held(tmp_path / "mine", "shortcut a"):
        (tmp_path / "mine" / "work").write_text("")
    with pytest.raises(UsageError, match="belongs to `shortcut a`"), files.held(tmp_path / "mine", "shortcut b"):
        pass
    with files.held(tmp_path / "mine", "shortcut a"):
        pass
    assert (tmp_path / "mine" / ".shortcut").read_text() == "shortcut a\n"


@pytest.mark.parametrize("content", ["", "shortcut a\n"])
def test_a_marker_that_is_a_link_is_not_written_through(tmp_path, content):
    (tmp_path / "mine").write_text(content)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".shortcut").symlink_to(tmp_path / "mine")
    with pytest.raises(UsageError, match="was not made by `shortcut a`"), files.held(tmp_path / "out", "shortcut a"):
        pass
    assert (tmp_path / "out" / ".shortcut").is_symlink()
    assert (tmp_path / "mine").read_text() == content


def test_a_marker_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".shortcut")
    done = []
    thread = threading.Thread(target=lambda: done.append(files.owner(tmp_path)), daemon=True)
    thread.start()
    thread.join(10)
    assert done == [""]
    with pytest.raises(UsageError, match="was not made by `shortcut a`"), files.held(tmp_path, "shortcut a"):
        pass


@pytest.mark.parametrize("name", [".partial", ".staging", "log.jsonl", "output.txt"])
@pytest.mark.parametrize("what", ["link", "link to nothing", "pipe"])
def test_what_is_written_in_place_is_no_link_and_no_pipe(tmp_path, name, what):
    folder, target = tmp_path / "out", tmp_path / ("mine" if what == "link" else "nothing")
    folder.mkdir()
    (folder / ".shortcut").write_text("shortcut a\n")
    (tmp_path / "mine").mkdir()
    (folder / name).symlink_to(target) if "link" in what else os.mkfifo(folder / name)
    with pytest.raises(UsageError, match=f"out/{name} is no f") as refused, files.held(folder, "shortcut a"):
        pass
    assert refused.value.hint == "move it away"
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["mine", "out", ".shortcut", name])
    assert (folder / ".shortcut").read_text() == "shortcut a\n"


@pytest.mark.parametrize("below", ["", "b", "b/c"])
def test_a_link_that_leads_nowhere_is_no_folder(tmp_path, below):
    (tmp_path / "a").symlink_to(tmp_path / "gone")
    folder = tmp_path / "a" / below
    with pytest.raises(UsageError, match="/a is a link that leads nowhere"), files.held(folder, "shortcut a"):
        pass
    with pytest.raises(UsageError, match="/a is a link that leads nowhere"), files.together(folder, "u", ["x"]):
        pass
    with pytest.raises(UsageError, match="/a is a link that leads nowhere"):
        files.make_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_file_that_does_not_fit_is_named(tmp_path, number):
    with pytest.raises(OSError, match=os.strerror(number)) as raised, files.writing(tmp_path / "a"):
        raise OSError(number, os.strerror(number))
    assert raised.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError, match="Input") as raised, files.writing(tmp_path / "a"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # perhaps of a file that is read
    assert raised.value.filename is None


def left_by_a_killed_process(folder, made, after=0):
    """Make files together in another process, which is killed after it has made some of them."""
    program = """
import os, sys
from pathlib import Path
from shortcut_cli import files
folder, made, after = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with files.together(folder, "unit", ["a", "b", "c"]):
    for name in "abc"[:made]:
        files.write(folder / name, "half")
    if not after:
        os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program, str(folder), str(made), str(after)], check=False)
    assert done.returncode == (0 if after else -signal.SIGKILL)


@pytest.mark.parametrize("made", range(4))
def test_what_a_killed_process_left_of_files_that_belong_together_is_made_again(tmp_path, made):
    left_by_a_killed_process(tmp_path / "out", made)
    assert len([*(tmp_path / "out").glob("?")]) == made
    left_by_a_killed_process(tmp_path / "out", made)
    files.write(tmp_path / "out" / "d", "mine")
    with pytest.raises(UsageError, match="d exists already"):
        files.check_free(tmp_path / "out", "unit", ["a", "b", "c", "d"])
    with files.together(tmp_path / "out", "unit", ["a", "b", "c"]):
        for name in "abc":
            files.write(tmp_path / "out" / name, "whole")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == dict.fromkeys("abc", "whole") | {
        "d": "mine"
    }
    with pytest.raises(UsageError, match="a exists already"), files.together(tmp_path / "out", "unit", ["a"]):
        pass
    left_by_a_killed_process(tmp_path / "other", 3, after=1)
    with pytest.raises(UsageError, match="b exists already"):
        files.check_free(tmp_path / "other", "unit", ["b"])


def test_files_that_belong_together_are_gone_if_one_of_them_fails(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "mine", tmp_path / "new" / "folder"):
        with pytest.raises(KeyError), files.together(folder, "unit", ["a", "b"]):
            {}[files.write(folder / "a", "half")]
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


@pytest.mark.parametrize("left", [b"", b"shortcut b, process 1\n"])
def test_what_a_killed_process_left_empty_may_be_taken(tmp_path, left):
    (tmp_path / ".shortcut").write_bytes(left)
    with files.held(tmp_path, "shortcut a"):
        assert files.owner(tmp_path) == "shortcut a"
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_removed_while_another_process_opens_it_is_not_taken(tmp_path, monkeypatch):
    """Two processes may not hold a folder because the first removed the marker that the second had just opened."""
    import fcntl

    kept = fcntl.flock

    def flock(stream, how):
        monkeypatch.setattr(fcntl, "flock", kept)
        (tmp_path / ".shortcut").unlink()
        kept(stream, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with (
        files.held(tmp_path, "shortcut a"),
        pytest.raises(UsageError, match="in use: shortcut a"),
        files.held(tmp_path, "shortcut b"),
    ):
        pass


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SHORTCUT_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/shortcut"),
        ({"SHORTCUT_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/shortcut"),
    ],
)
def test_the_cache_is_where_the_variables_say(monkeypatch, variables, expected):
    for name in ("SHORTCUT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert files.cache_folder() == Path(expected)


def test_what_is_written_to_a_standard_stream_can_be_diverted(tmp_path, capfd):
    """Also by others than Python; afterwards the stream is as before. A stream that is closed stays closed."""
    with open(tmp_path / "taken", "w+b") as target, files.diverted(2, target):
        os.write(2, b"to the file")
    with files.diverted(1):
        os.system("echo nowhere")
    os.write(1, b"out")
    os.write(2, b"err")
    assert (tmp_path / "taken").read_bytes() == b"to the file"
    assert capfd.readouterr() == ("out", "err")
    number = os.open(os.devnull, os.O_RDONLY)
    os.close(number)
    with files.diverted(number), pytest.raises(OSError, match="Bad file descriptor"):
        os.write(number, b"closed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_tensors_that_are_made_while_they_are_written_give_the_same_bytes(tmp_path, dtype):
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (7, 3), "b": (), "none": (0, 4), "c": (1000,), "d": (5, 1, 2)}
    plain = {name: torch.randint(0, 2, shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    order = []

    def later(name):
        return tensor_file.Later(shapes[name], dtype, lambda: order.append(name) or plain[name])

    whole = {"model": plain, "step": 3, "more": [plain["a"], {"x": plain["c"][::2]}]}
    mixed = {name: later(name) if name != "b" else plain[name] for name in plain}
    # Tied weights are one only if they are the same object.
    written = tensor_file.save(tmp_path / "whole.pt", whole | {"more": [plain["a"].clone(), {"x": plain["c"][::2]}]})
    again = tensor_file.save(
        tmp_path / "later.pt", {**whole, "model": mixed, "more": [later("a"), {"x": plain["c"][::2]}]}
    )
    assert again == written
    assert (tmp_path / "later.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()
    assert [name for name in order if name != "none"] == ["a", "c", "d", "a"]


def test_tensors_are_made_in_their_order_whatever_the_order_in_which_they_are_written():
    """Other processes help to make them in that order. PyTorch 2.6 sorts the numbers of storages as texts."""
    made, written, filling = [], {}, tensor_file._Filling()

    def later(number):
        return tensor_file.Later((3,), torch.uint8, lambda: made.append(number) or torch.full((3,), number))

    def write_record(name, content, size):
        assert content.tolist() == [made[-1]] * size
        written[name] = made[-1]

    filling.writer = SimpleNamespace(write_record=write_record)
    places = [filling.place(later(number)) for number in range(12)]
    for name in sorted(map(str, range(12))):
        filling.write_record(f"data/{name}", places[int(name)].untyped_storage(), 3)
        assert made == [*written.values()]  # none before it is written
    assert made == [*range(12)]
    assert [*written] == [f"data/{number}" for number in range(12)]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_tensors_that_are_made_while_they_are_written_take_the_memory_of_one(tmp_path):
    elements, held = 1 << 22, []  # 16 MB each

    def make():
        held.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        return torch.tensor(float(len(held))).expand(elements)  # takes no memory, which malloc might keep

    content = {str(number): tensor_file.Later((elements,), torch.float32, make) for number in range(12)}
    tensor_file.save(tmp_path / "file.pt", content)
    assert max(held) - held[0] < 3 * 4 * elements
    found = tensor_file.load(tmp_path / "file.pt", "run.pt")
    assert [found[str(number)].unique().tolist() for number in range(12)] == [[number + 1.0] for number in range(12)]
