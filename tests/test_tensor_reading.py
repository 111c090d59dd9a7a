"""Files of tensors: what `torch.save` writes is read as `torch.load` reads it; anything else is refused, in bounds."""

import hashlib
import io
import json
import mmap
import pickle
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pytorch_zip import sealed, zipped  # benchmarks/pytorch_zip.py
from test_checkpoint import small_run

from shortcut_cli.codec import checkpoint as codec_checkpoint
from shortcut_cli.codec import encodec, loading, weights
from shortcut_cli.errors import CheckFailed
from shortcut_cli.inference import runs
from shortcut_cli.tokenizers.audio import AudioOptions, AudioTokenizer
from shortcut_cli.training import tensor_file, zip_directory
from shortcut_cli.training.zip_directory import Malformed

MB = 1 << 20
LITTLE = {"version": b"3\n", "byteorder": b"little"}


# Pickle programs, operation by operation


class Raw(bytes):
    """Operations of a pickle, as they are."""


def program(value):
    """The operations of a pickle that push a value."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, str):
        return b"X" + struct.pack("<L", len(value.encode())) + value.encode()
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        text = pickle.encode_long(value)
        return b"\x8a" + bytes([len(text)]) + text
    before, after = {tuple: (b"(", b"t"), list: (b"](", b"e"), dict: (b"}(", b"u")}[type(value)]
    parts = [part for item in value.items() for part in item] if isinstance(value, dict) else value
    return before + b"".join(map(program, parts)) + after


def tensor(key="0", kind="torch\nFloatStorage", elements=3, first=0, shape=(3,), strides=(1,), **other):
    """The operations that push a tensor."""
    named = other.get("named", ("storage", Raw(b"c" + kind.encode() + b"\n"), key, "cpu", elements))
    hooks = other.get("hooks", Raw(b"ccollections\nOrderedDict\n)R"))
    arguments = (Raw(program(named) + b"Q"), first, shape, strides, other.get("gradient", False), hooks)
    return Raw(b"ctorch._utils\n_rebuild_tensor_v2\n" + program(arguments + other.get("more", ())) + b"R")


def file_of(operations, storages=(), change=lambda *_: None, **records):
    """A sealed file with this pickle program, and with the storages data/0, data/1 ..."""
    found = [("data.pkl", b"\x80\x02" + operations + b"."), *{**LITTLE, **records}.items()]
    found += [(f"data/{number}", data) for number, data in enumerate(storages)]
    return sealed(zipped(found, change))


THREE = struct.pack("<3f", 1, 2, 3)
GOOD = [("data.pkl", b"\x80\x02" + program({"a": tensor()}) + b"."), *LITTLE.items(), ("data/0", THREE)]


def test_the_writer_of_these_tests_writes_what_pytorch_reads(tmp_path):
    for number, content in enumerate((zipped(GOOD), sealed(zipped(GOOD)), file_of(program({"a": tensor()}), [THREE]))):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(content)
        read = tensor_file.load_unsealed(path) if number == 0 else tensor_file.load(path, "run.pt")
        for found in (torch.load(path, weights_only=True), read):
            assert found["a"].tolist() == [1, 2, 3]


# What is written is read


DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    found = torch.randint(0, 2, shape).to(getattr(torch, draw(st.sampled_from(DTYPES))))
    kind = draw(st.integers(0, 5))
    if kind == 0 and found.ndim > 1:
        return found.transpose(0, -1)
    if kind == 1 and found.ndim:
        return found[: len(found) // 2]
    if kind == 4 and found.is_floating_point():
        return torch.nn.Parameter(found)
    if kind == 2 and found.ndim and len(found):
        return found[:1].expand(3, *found.shape[1:])
    return found.requires_grad_() if kind == 3 and found.is_floating_point() else found


NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats() | st.booleans() | st.none()
LEAVES = NUMBERS | st.text(max_size=20) | tensors()
KEYS = st.text(max_size=8) | st.integers(0, 300)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=30,
)


def check_equal(a, b):
    """Equal in types, values, dtypes and shapes; NaN equals itself."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        a, b = [*a.values()], [*b.values()]
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            check_equal(one, other)
    elif isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b)
        assert a.is_contiguous()
        assert not a.requires_grad
    else:
        assert repr(a) == repr(b)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=TREES)
def test_any_tree_is_read_as_pytorch_reads_it(tmp_path, value):
    tensor_file.save(tmp_path / "run.pt", {"value": value})
    check_equal(tensor_file.load(tmp_path / "run.pt", "run.pt"), _plain(torch.load(tmp_path / "run.pt")))


def test_what_was_read_is_written_as_the_same_bytes(tmp_path):
    """Whichever of its strings are the same object, or ones that PyTorch uses for its records."""
    content = {"device": "cpu", "cpu": "".join(["c", "pu"]), "a": torch.ones(2), "parts": [{"device": "storage"}]}
    tensor_file.save(tmp_path / "run.pt", content)
    tensor_file.save(tmp_path / "again.pt", tensor_file.load(tmp_path / "run.pt", "run.pt"))
    assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "run.pt").read_bytes()


def _plain(value):
    """Without gradients, which are not kept."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value.detach() if isinstance(value, torch.Tensor) else value


def test_the_state_of_a_module_and_of_its_optimizer_is_read_from_a_plain_file(tmp_path):
    model = torch.nn.ModuleDict(
        {"in": torch.nn.Embedding(5, 4), "out": torch.nn.Linear(4, 5), "lstm": torch.nn.LSTM(4, 4)}
    )
    model["out"].weight = model["in"].weight  # tied
    optimizer = torch.optim.AdamW([{"params": model["in"].parameters()}, {"params": model["lstm"].parameters()}])
    model["lstm"](model["in"](torch.tensor([1, 2])))[0].sum().backward()
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, tmp_path / "plain.th")
    tensor_file.save(tmp_path / "run.pt", content)
    oracle = torch.load(tmp_path / "plain.th", weights_only=True)
    expected = {"model": dict(oracle["model"]), "optimizer": oracle["optimizer"]}
    for found in (tensor_file.load_unsealed(tmp_path / "plain.th"), tensor_file.load(tmp_path / "run.pt", "run.pt")):
        check_equal(found, expected)
        storages = [found["model"][name].untyped_storage()._cdata for name in ("in.weight", "out.weight")]
        assert storages[0] == storages[1]


def test_changing_a_tensor_changes_neither_the_file_nor_the_next_reading(tmp_path):
    path = tmp_path / "run.pt"
    tensor_file.save(path, {"a": torch.zeros(5000)})
    whole = path.read_bytes()
    tensor_file.load(path, "run.pt")["a"].fill_(1)
    assert path.read_bytes() == whole
    assert tensor_file.load(path, "run.pt")["a"].sum() == 0


def test_a_file_of_an_older_pytorch_is_read(tmp_path):
    older = [entry for entry in GOOD if entry[0] != "byteorder"]
    (tmp_path / "old.th").write_bytes(zipped(older, folder="encodec_24khz-d7cc33bc"))
    assert tensor_file.load_unsealed(tmp_path / "old.th")["a"].tolist() == [1, 2, 3]
    torch.save({"a": torch.ones(2)}, tmp_path / "legacy.th", _use_new_zipfile_serialization=False)
    with pytest.raises(Malformed, match=r"is not a zip file, which `torch.save` writes since PyTorch 1\.6"):
        tensor_file.load_unsealed(tmp_path / "legacy.th")


def test_a_file_without_a_checksum_is_read_only_if_the_checksums_of_its_records_are_right(tmp_path):
    whole = zipped(GOOD)
    path = tmp_path / "plain.th"
    for place in (whole.index(THREE), whole.index(b"FloatStorage")):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(Malformed, match="have changed since it was written"):
            tensor_file.load_unsealed(path)
    path.write_bytes(b"")
    with pytest.raises(Malformed, match="it is empty"):
        tensor_file.load_unsealed(path)


def test_records_behind_4_gb_are_found_where_pytorch_finds_them(tmp_path):
    path, size = tmp_path / "large.pt", 2**32 + 100
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in ("data.pkl", "version"):
            archive.writestr(f"archive/{name}", b"3\n")
        start = archive.fp.tell()
        archive.fp.write(struct.pack("<4s5H3L2H", b"PK\x03\x04", 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, 14, 20))
        archive.fp.write(b"archive/data/0" + struct.pack("<2H2Q", 1, 16, size, size))
        archive.fp.seek(size, 1)  # a hole, which takes no space
        entry = zipfile.ZipInfo("archive/data/0")
        entry.header_offset, entry.file_size, entry.compress_size, entry.CRC = start, size, size, 0
        archive.filelist.append(entry)
        archive.NameToInfo[entry.filename] = entry
        archive.start_dir = archive.fp.tell()
        archive.writestr("archive/data/1", b"behind")
    with open(path, "rb") as stream:
        content = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        found = zip_directory.records(content, 0)
        assert bytes(found["data/1"].of(content)) == b"behind"
        content.release()
    assert found["data/0"].size == size
    oracle = torch._C.PyTorchFileReader(str(path))
    assert {name: record.start for name, record in found.items()} == {
        name: oracle.get_record_offset(name) for name in oracle.get_all_records()
    }


# What is not written is refused, within limits


def change(kind, record, **fields):
    """Falsify the fields of one header."""

    def changed(found_kind, found_name, found):
        if (found_kind, found_name) == (kind, record):
            found.update(fields)

    return changed


def lies(kind, record, **fields):
    return sealed(zipped(GOOD, change(kind, record, **fields)))


def records(*more, without=()):
    return sealed(zipped([entry for entry in GOOD if entry[0] not in without] + list(more)))


def overlapping():
    """Two entries of the directory for one record."""

    def changed(kind, name, found):
        if kind == "central" and name == "data/1":
            found.update(name=b"archive/data/0", start=starts["data/0"])
        starts[name] = found.get("start", 0) if kind == "central" else 0

    starts = {}
    return sealed(zipped([*GOOD, ("data/1", THREE)], changed))


def deflated():
    packed = zlib.compress(b"\0" * 20 * MB, wbits=-15)
    content = [*GOOD[:-1], ("data/0", packed)]

    def changed(kind, name, found):
        if name == "data/0" and kind != "end":
            found.update(method=8, size=20 * MB)

    return zipped(content, changed)


def wide_end(place):
    """A file of `torch.save` with one bit of its 64-bit end changed."""
    stream = io.BytesIO()
    torch.save({"a": torch.ones(3)}, stream)
    content = bytearray(stream.getvalue())
    content[content.rindex(b"PK\x06\x06") + place] ^= 1
    return sealed(bytes(content))


WIDE_END = (
    4,
    16,
    20,
    24,
    32,
    40,
    48,
    60,
    64,
    72,
)  # length, disks, counts, size, start; of the locator: disk, start, disks
WIDE = struct.pack("<2HQ", 1, 8, 12)
END64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 0, 0, 0, 0, 1, 1, 10, 0) + struct.pack(
    "<4sLQL", b"PK\x06\x07", 0, 0, 1
)
DIRECTORY = {
    "two cases of a name": (
        records(("DATA.PKL", b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x5e\xd0\xb2\x00\x85R.")),
        "'archive/DATA.PKL' is not a record",
    ),
    "a folder inside": (records(("sub/data.pkl", b"\x80\x02}.")), "'archive/sub/data.pkl' is not a record"),
    "a path": (records(("data/../0", b"")), "is not a record"),
    "a number with a zero before it": (records(("data/00", b"")), "is not a record"),
    "a record twice": (records(GOOD[0]), "not named once each"),
    "two folders": (lies("central", "version", name=b"ARCHIVE/version"), "not named once each|not stored"),
    "no folder": (sealed(zipped(GOOD, folder="")), "is not a record"),
    "no pickle": (records(without=["data.pkl"]), "has no data.pkl"),
    "no version": (records(without=["version"]), "has no version"),
    "a record that no tensor has": (records(("data/1", THREE)), "tensors and its records are not the same"),
    "a tensor without its record": (records(without=["data/0"]), "tensors and its records are not the same"),
    "big-endian": (file_of(program({}), byteorder=b"big"), "byte order is 'big', that of this machine is 'little'"),
    "no byte order": (file_of(program({}), byteorder=b""), "byte order is ''"),
    "deflated": (sealed(deflated()), "data/0 is not stored as PyTorch stores it"),
    "encrypted": (lies("central", "data/0", flags=0x809), "data/0 is not stored"),
    "two names": (lies("local", "data/0", name=b"archive/data/1"), "data/0 is not stored"),
    "two methods": (lies("local", "data/0", method=8), "data/0 is not stored"),
    "two flags": (lies("local", "data/0", flags=0x800), "data/0 is not stored|not begin"),
    "two sizes": (lies("local", "data/0", size=10**6), "data/0 is not stored"),
    "two sizes behind": (lies("behind", "data/0", size=10**6), "data/0 is not stored"),
    "two checksums": (lies("behind", "data/0", crc=1), "data/0 is not stored"),
    "a size beyond the file": (lies("central", "data/0", size=10**6, packed=10**6), "data/0 is not stored"),
    "a size that is packed": (lies("central", "data/0", size=10**6), "data/0 is not stored"),
    "a comment": (lies("central", "data/0", comment=b"x"), "data/0 is not stored"),
    "64 bits without need": (lies("central", "data/0", extra=WIDE), "extra field"),
    "64 bits for a small number": (lies("central", "data/0", size=2**32 - 1, extra=WIDE), "extra field"),
    "64 bits that are missing": (lies("central", "data/0", size=2**32 - 1, packed=2**32 - 1), "extra field"),
    "a gap": (lies("behind", "byteorder", after=b"?"), "does not begin where the record before it ends"),
    "something at the start": (b"MZ" + records(), "does not begin as one"),
    "something before the first": (lies("local", "data.pkl", before=b"PK"), "does not begin|no header"),
    "something before the directory": (lies("behind", "data/0", after=b"?"), "between its records and their directory"),
    "something behind the directory": (lies("end", "", between=b"?"), "not where its end says"),
    "two records in one place": (overlapping(), "does not begin where|named once each"),
    "an entry too few": (lies("end", "", count=3, here=3), "length that its end says"),
    "an entry too many": (lies("end", "", count=5, here=5), "length that its end says"),
    "two numbers of entries": (lies("end", "", here=3), "its end is not that of a PyTorch file"),
    "another disk": (lies("end", "", disk=1), "its end is not that of a PyTorch file"),
    **{
        f"byte {place} of the 64-bit end": (wide_end(place), "end is not that of|two directories") for place in WIDE_END
    },
    "another end": (lies("end", "", between=END64), "two directories|not that of|not where"),
    "a directory elsewhere": (lies("end", "", start=0), "not where its end says"),
    "a long directory": (lies("end", "", size=2**32 - 1), "not where its end says"),
    "only a checksum": (b"PK" + b"shortcut sha256 " + hashlib.sha256(b"PK").hexdigest().encode(), "it is truncated"),
    "only an end": (sealed(b"PK\x05\x06" + b"\0" * 18), "has no data.pkl, version"),
}
DEEP = Raw(b"](" * 60 + b"e" * 60)
ORDERED = b"ccollections\nOrderedDict\n)R"


def laughs():
    """Tuples of ten references to the tuple before: 10^30 items."""
    found = program((1,)) + b"q\x00"
    for number in range(30):
        found += b"(" + (b"h" + bytes([number])) * 10 + b"tq" + bytes([number + 1])
    return found


PROGRAMS = {
    "attributes of a dictionary": (ORDERED + b"}" + program("a") + program(1) + b"sb", "it sets attributes"),
    "attributes of a list": (b"]}b", "it sets attributes"),
    "versions of a list": (b"]" + program({"_metadata": {}}) + b"b", "it sets attributes"),
    "attributes that are a list": (b"}]b", "it sets attributes"),
    "bytes of any length": (b"cbuiltins\nbytearray\n" + program((3 * 10**9,)) + b"R", "asks for builtins bytearray"),
    "a call with arguments": (b"ccollections\nOrderedDict\n]\x85R", "asks for a call"),
    "a call of a storage": (b"ctorch\nFloatStorage\n" + program((10**9,)) + b"R", "asks for a call"),
    "a call of a string": (program("a") + b")R", "asks for a call"),
    "a name that is not ended": (b"ccollections", "asks for"),
    "a name of any length": (b"c" + b"o" * 10**6 + b"\ns\n", "asks for"),
    "bytes": (b"U\x01a", "asks for SHORT_BINSTRING"),
    "lists of lists": (DEEP, "nested more than 32 deep"),
    "many lists of lists": (b"]" * 10**5 + b"a" * (10**5 - 1), "nested more than 32 deep"),
    "tuples of tuples": (b")" + b"\x85" * 10**5, "nested more than 32 deep"),
    "dictionaries of dictionaries": (b"}" + (program("a") + b"}") * 50 + b"s" * 50, "nested more than 32 deep"),
    "many marks": (b"(" * 10**6, "nested more than 32 deep"),
    "a list in itself": (b"]q\0h\0a", "refers twice"),
    "a list twice": (b"]q\0h\0\x86", "refers twice"),
    "a dictionary twice": (b"}q\0h\0\x86", "refers twice"),
    "a tuple of lists twice": (b"]\x85q\0h\0\x86", "refers twice"),
    "tuples of one tuple": (laughs(), "refers twice"),
    "a string a million times": (program("a" * 10**5) + b"q\0](" + b"h\0" * 10**6 + b"e\x86", "repeats too much"),
    "a tuple a million times": (program((0,) * 10**4) + b"q\0](" + b"h\0" * 10**6 + b"e\x86", "repeats too much"),
    "a key twice": (b"}(" + (program("a") + b"N") * 2 + b"u", "a key twice"),
    "a key twice, one by one": (b"}" + (program("a") + b"Ns") * 2, "a key twice"),
    "a key that is a tuple": (program({(): 1}), "neither a string nor"),
    "a key that is a number": (b"}" + struct.pack(">sd", b"G", 1.5) + b"Ns", "neither a string nor"),
    "a key that is true": (program({True: 1}), "neither a string nor"),
    "a key that is large": (program({2**31: 1}), "neither a string nor"),
    "a key that is negative": (program({-1: 1}), "neither a string nor"),
    "a key without a value": (b"}(" + program("a") + b"u", "not a dictionary"),
    "an item of a number": (b"N" + program("a") + b"Ns", "not a dictionary"),
    "an item of a tuple": (b")Na", "not a list"),
    "an item of what is below the mark": (b"](Na", "refers to something that is not there"),
    "an integer of 65 bits": (program(2**64), "more than 64 bits"),
    "a negative integer of 65 bits": (program(-(2**63) - 1), "more than 64 bits"),
    "an integer of any length": (b"\x8b" + struct.pack("<L", 10**6) + b"\x7f" * 10**6, "asks for LONG4"),
    "a string of 300,000 bytes": (program("a" * 300_000), "string of more than 262,144 bytes"),
    "a string that is longer than the file": (b"X\xff\xff\xff\x7fa", "string of more than"),
    "a string that is cut off": (b"X\xff\0\0\0a", "truncated"),
    "a string that is not UTF-8": (b"X\x01\0\0\0\xff", "not UTF-8"),
    "many lists": (b"](" + b"]" * 11 * 10**5 + b"e", "more than 1,048,576 objects"),
    "many dictionaries": (b"](" + b"}" * 11 * 10**5 + b"e", "more than 1,048,576 objects"),
    "many dictionaries with an item": (b"](" + b"}K\0Ns" * 11 * 10**5 + b"e", "more than 1,048,576 objects"),
    "many ordered dictionaries": (b"](" + ORDERED * 11 * 10**5 + b"e", "more than 1,048,576 objects"),
    "many tuples": (b"](" + b"N\x85" * 11 * 10**5 + b"e", "more than 1,048,576 objects"),
    "many operations": (b"](" + b"N" * 9 * 10**6 + b"e", "more than 4,194,304 operations"),
    "a long program": (b"](" + b"N" * 65 * MB + b"e", "longer than 67,108,864 bytes"),
    "a number out of order": (b"]q\x01", "out of order"),
    "a reference to nothing": (b"h\0", "refers to something that is not there"),
    "nothing": (b"", "does not describe one value"),
    "two values": (b"NN", "does not describe one value"),
    "an open mark": (b"N(", "does not describe one value"),
    "a tuple of nothing": (b"\x86", "refers to something that is not there"),
    "a mark that is missing": (b"t", "refers to something that is not there"),
    "something behind its end": (b"N.N", "does not describe one value"),
    "another protocol": (b"N.\x80\x04", "does not describe one value"),
    "a name": (program({"a": Raw(b"ccollections\nOrderedDict\n")}), "a name that belongs to no tensor"),
    "a storage": (
        Raw(program(("storage", Raw(b"ctorch\nFloatStorage\n"), "0", "cpu", 3)) + b"Q"),
        "belongs to no tensor",
    ),
}
FLOATS = Raw(b"ctorch\nFloatStorage\n")
TENSORS = {
    "400 tensors in one storage": ([tensor()] * 400, "tensors need more than data/0 holds"),
    "three tensors in one storage": ([tensor()] * 3, "tensors need more than data/0 holds"),
    "a tensor 400 times": (
        Raw(b"](" + tensor() + b"q\0" + b"h\0" * 400 + b"e"),
        "tensors need more than data/0 holds",
    ),
    "overlapping tensors": ([tensor(first=n, shape=(2,)) for n in (0, 1)] * 2, "tensors need more than data/0 holds"),
    "a storage of two types": ([tensor(), tensor(kind="torch\nIntStorage")], "not the same"),
    "a storage of two lengths": ([tensor(), tensor(elements=2, shape=(2,))], "not the same"),
    "a storage that is too long": (tensor(elements=10**12, shape=(10**12,)), "size that its tensor says"),
    "a storage that is too short": (tensor(elements=2, shape=(2,)), "size that its tensor says"),
    "an offset beyond": (tensor(first=1), "reaches beyond"),
    "an offset before": (tensor(first=-1), "describes a tensor as PyTorch does not"),
    "a shape beyond": (tensor(shape=(4,)), "reaches beyond"),
    "an empty shape of any size": (tensor(shape=(0, 2**60), strides=(2**60, 1)), "reaches beyond"),
    "a negative shape": (tensor(shape=(-3,)), "describes a tensor as PyTorch does not"),
    "a shape that is a list": (tensor(shape=[3]), "describes a tensor as PyTorch does not"),
    "a shape that is true": (tensor(shape=(True,)), "describes a tensor as PyTorch does not"),
    "nine axes": (tensor(shape=(1,) * 9, strides=(1,) * 9), "describes a tensor as PyTorch does not"),
    "strides of another length": (tensor(strides=(1, 1)), "describes a tensor as PyTorch does not"),
    "a stride of 0": (tensor(strides=(0,)), "not contiguous"),
    "a stride of 2": (tensor(shape=(2,), strides=(2,)), "not contiguous"),
    "axes in another order": (tensor(elements=3, shape=(1, 3, 1), strides=(9, 3, 1)), "not contiguous"),
    "a gradient that is a number": (tensor(gradient=1), "describes a tensor as PyTorch does not"),
    "hooks": (tensor(hooks={"a": 1}), "describes a tensor as PyTorch does not"),
    "more arguments": (tensor(more=(None,)), "asks for a call"),
    "no storage": (Raw(b"ctorch._utils\n_rebuild_tensor_v2\n(NK\0))\x89}tR"), "describes a tensor as PyTorch does not"),
    "complex numbers": (tensor(kind="torch\nComplexFloatStorage"), "asks for torch ComplexFloatStorage"),
    "a storage of something else": (tensor(kind="collections\nOrderedDict"), "asks for a storage of collections"),
    "a storage that is no tuple": (tensor(named="storage"), "not a storage"),
    "a storage that is a number": (tensor(named=5), "not a storage"),
    "a storage of two parts": (tensor(named=("storage", "0")), "not a storage"),
    "a storage of a string": (
        tensor(named=("storage", "torch FloatStorage", "0", "cpu", 3)),
        "storage as PyTorch does not",
    ),
    "a storage on no device": (tensor(named=("storage", FLOATS, "0", 0, 3)), "storage as PyTorch does not"),
    "strides that are a list": (tensor(strides=[1]), "describes a tensor as PyTorch does not"),
    "a stride that is a string": (tensor(shape=(1,), strides=("1",)), "describes a tensor as PyTorch does not"),
    "a storage with another name": (tensor(named=("module", 1, 2, 3, 4)), "not a storage"),
    "a storage with a number for a key": (tensor(key=0), "describes a storage as PyTorch does not"),
    "a storage with a path for a key": (tensor(key="../0"), "not the same"),
    "a storage of negative length": (tensor(elements=-1), "describes a storage as PyTorch does not"),
}
HOSTILE = {
    **DIRECTORY,
    **{name: (file_of(operations), reason) for name, (operations, reason) in PROGRAMS.items()},
    **{name: (file_of(program({"a": value}), [THREE]), reason) for name, (value, reason) in TENSORS.items()},
    "truth values of any kind": (
        file_of(program({"a": tensor(kind="torch\nBoolStorage")}), [b"\0\1\2"]),
        "truth values that are neither 0 nor 1",
    ),
    "numbers at odd places": (
        file_of(program({"a": tensor()}), [THREE], change("local", "data/0", extra=b"")),
        "not aligned",
    ),
    "protocol 4": (records(("data.pkl", b"\x80\x04N."), without=["data.pkl", "data/0"]), "not a pickle of protocol 2"),
}
READ = """
import json, resource, sys, time
from pathlib import Path
import torch
from shortcut_cli.codec import loading
from shortcut_cli.errors import ShortcutError
from shortcut_cli.inference import runs
from shortcut_cli.training import tensor_file

def run(path):
    runs.open_run(path, "cpu").tokenizer().fingerprint

read = {"file": lambda path: tensor_file.load(path, "run.pt"), "run": run, "codec": loading.of_file}[sys.argv[3]]
data = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + int(sys.argv[2]), resource.RLIM_INFINITY))
for path in sorted(Path(sys.argv[1]).iterdir()):
    began = time.process_time()
    try:
        read(path)
        reason, code = "read", 0
    except ShortcutError as error:
        reason, code = error.message, error.exit_code
    print(json.dumps({"name": path.stem, "reason": reason, "code": code, "seconds": time.process_time() - began}))
"""


def refusals(folder, kind):
    """What one process, which gets 400 MB more than PyTorch takes, says of each file in a folder; and its stderr."""
    command = [sys.executable, "-c", READ, folder, str(400 * MB), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}, done.stderr


def check_refused(refused, name, reason):
    found, problem = refused
    assert name in found, problem[-2000:]
    assert re.search(reason, found[name]["reason"]), found[name]["reason"]
    assert found[name]["code"] in (2, 4)
    assert len(found[name]["reason"]) < 6000
    assert found[name]["seconds"] < 10


on_linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux does")


@pytest.fixture(scope="module")
def refused_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    for name, (content, _) in HOSTILE.items():
        (folder / f"{name}.pt").write_bytes(content)
    return refusals(folder, "file")


@on_linux
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_with_its_reason_in_bounded_time_and_memory(refused_files, name):
    check_refused(refused_files, name, HOSTILE[name][1])


# What a recipe in a file asks for is held against the tensors that are there


def nested(depth):
    found = [1]
    for _ in range(depth):
        found = [found]
    return found


RECIPES = {
    "layers": ({"model.layers": 10**6}, "layers|1,000,000 blocks"),
    "as many layers as weights": ({"model.layers": 600}, "layers|600 blocks"),
    "context": ({"model.context": 10**8}, "context"),
    "a smaller context": ({"model.context": 2**23}, "describes no network: model.context 8,388,608"),
    "width": ({"model.width": 2**40}, "width|describes no network|do not match its recipe"),
    "heads": ({"model.heads": 10**9}, "heads"),
    "ffn": ({"model.ffn": 10**12}, "ffn|do not match its recipe"),
    "vocabulary": ({"vocabulary": 2**62}, "describes no network|do not match its recipe"),
    "a negative vocabulary": ({"vocabulary": -1}, "fields have the wrong types"),
    "taps": ({"model.shortcut.taps": ",".join(map(str, range(10**4))), "model.name": "shortcut"}, "taps"),
    "a tap of many digits": (
        {"model.shortcut.taps": "9" * 5000, "model.name": "shortcut"},
        "describes no network|taps",
    ),
    "map": (
        {"model.shortcut.map_width": 10**12, "model.shortcut.taps": "0", "model.name": "shortcut"},
        "map_width|do not match its recipe",
    ),
    "lists": ({"model.layers": nested(25)}, "layers"),
    "many lists": ({"model.layers": [[]] * 1500}, "fields have the wrong types"),
    "many keys": ({"model": {str(number): 1 for number in range(3000)}}, "fields have the wrong types"),
    "a long key": ({"model." + "k" * 10**5: 1}, "is not a valid recipe"),
    "tensors": ({"model.layers": torch.ones(3)}, "fields have the wrong types"),
    "scores": ({"scores": {"a": nested(25)}}, "fields have the wrong types"),
    "versions": ({"versions": {"a": nested(25)}}, "fields have the wrong types"),
    "format": ({"format": torch.ones(3)}, "has format tensor"),
}


def with_changes(content, changes):
    """A copy of what a run.pt holds, with keys of its recipe or fields of its own changed."""
    content = content | {"recipe": json.loads(json.dumps(content["recipe"]))}
    for key, value in changes.items():
        section, _, rest = key.partition(".")
        table = content
        if section == "model":
            table, section = content["recipe"], "model"
        *sections, last = [section, *rest.split(".")] if rest else [section]
        for part in sections:
            table = table[part]
        table[last] = value
    return content


@pytest.fixture(scope="module")
def refused_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "made").mkdir()
    (folder / "changed").mkdir()
    content = small_run(folder / "made" / "run.pt")
    more = {f"blocks.{number}.more": torch.ones(1) for number in range(1000)}
    for name, (changes, _) in RECIPES.items():
        weights = content["model"] | (more if name == "as many layers as weights" else {})
        tensor_file.save(folder / "changed" / f"{name}.pt", with_changes(content, changes) | {"model": weights})
    return refusals(folder / "changed", "run")


@on_linux
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_asks_for_more_than_the_file_has_is_refused(refused_runs, name):
    check_refused(refused_runs, name, RECIPES[name][1])


CODECS = {
    "encoder blocks": ({"encoder_blocks": 10**9}, "encoder_blocks|blocks"),
    "decoder blocks": ({"decoder_blocks": 10**9}, "decoder_blocks|blocks"),
    "expansion": ({"expansion": 10**12}, "expansion|describes no network|do not match its recipe"),
    "kernel": ({"kernel": 10**9}, "kernel|do not match its recipe"),
    "width": ({"width": 10**9}, "width|do not match its recipe"),
}


@pytest.fixture(scope="module")
def refused_codecs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codecs")
    content = codec_checkpoint.read(weights.EMBEDDED["mini"])
    for name, (changes, _) in CODECS.items():
        recipe = json.loads(json.dumps(content["recipe"]))
        recipe["codec"]["frame"] |= changes
        tensor_file.save(folder / f"{name}.pt", content | {"recipe": recipe})
    for name, (large, _) in WEIGHTS.items():
        (folder / f"{name}.th").write_bytes(large)
    return refusals(folder, "codec")


WEIGHTS = {
    "a bomb of zeros": (deflated(), "data/0 is not stored"),
    "bytes in bytes": (
        zipped([("data.pkl", b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x5e\xd0\xb2\x00\x85R."), *LITTLE.items()]),
        "not a checkpoint of the `encodec` package: it asks for builtins bytearray",
    ),
    "a list": (zipped([("data.pkl", b"\x80\x02]."), *LITTLE.items()]), "not a dictionary of tensors"),
    "no weights": (zipped([("data.pkl", b"\x80\x02}."), *LITTLE.items()]), "Missing key|rror"),
}


@on_linux
@pytest.mark.parametrize("name", [*CODECS, *WEIGHTS])
def test_a_codec_that_asks_for_more_than_the_file_has_is_refused(refused_codecs, name):
    check_refused(refused_codecs, name, (CODECS | WEIGHTS)[name][1])


def test_the_weights_in_a_run_are_read_as_strictly(tmp_path):
    own = WEIGHTS["bytes in bytes"][0]
    (tmp_path / "weights.th").write_bytes(own)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"sha256": hashlib.sha256(own).hexdigest()}))
    tokenizer = AudioTokenizer.load(AudioOptions(name="audio", weights="mine.th"), tmp_path)
    for ask in ("codec", "layout"):
        with pytest.raises(CheckFailed, match="asks for builtins bytearray"):
            getattr(tokenizer, ask)


def test_no_file_reaches_an_unpickler(tmp_path, monkeypatch):
    content = small_run(tmp_path / "run.pt")
    torch.save(encodec.untrained(1).state_dict(), tmp_path / "codec.th")
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the file reached an unpickler"))
    assert torch.equal(
        runs.open_run(tmp_path / "run.pt", "cpu").model.state_dict()["norm.weight"], content["model"]["norm.weight"]
    )
    assert loading.of_file(weights.EMBEDDED["mini"]).codebooks == 8
    assert loading.of_file(tmp_path / "codec.th").codebooks == 32
