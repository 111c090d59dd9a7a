"""A state in parts: one file of each process beside resume.pt. It is read without running code, and complete or absent.

How processes write and read one together is in test_parallel.py.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_checkpoint import small_run

from shortcut_cli.errors import CheckFailed
from shortcut_cli.training import checkpoint, loop, parts, tensor_file

ROWS = (0, 5, 9, 60)  # of the parts of a tensor, as far as it has them


def write(folder, step=7):
    """Write the state of a small model as three processes would; returns the content of a plain resume.pt of it."""
    folder.mkdir(exist_ok=True)
    content = small_run(folder.parent / "run.pt", "model.tied=false") | {"step": step}
    generator = torch.Generator().manual_seed(step)
    moments = {"step": torch.tensor(float(step)), "exp_avg": torch.randn(40, 3, generator=generator)}
    content |= {"optimizer": {"state": {0: moments}, "param_groups": [{"lr": 0.5, "params": [0]}]}, "average": None}
    content["model"] = dict(content["model"]) | {"again": content["model"]["head.weight"]}
    place = folder / f"state-{step}"
    place.mkdir()
    files, tensors = {f"{number}.pt": {} for number in range(3)}, {}
    named = {f"model.{name}": weight for name, weight in content["model"].items() if name != "again"}
    named |= {f"optimizer.state.0.{name}": value for name, value in moments.items()}
    for name, tensor in named.items():
        chunks = []
        for number, (first, end) in enumerate(pairwise(ROWS)):
            part = tensor[first:end] if tensor.dim() else tensor
            if part.numel() and (tensor.dim() or not number):
                files[f"{number}.pt"][f"{name}@{first}"] = part.clone()
                chunks.append([first, len(part) if tensor.dim() else 1, f"{number}.pt"])
        tensors[name] = [str(tensor.dtype)[6:], list(tensor.shape), chunks]
    seals = {name: tensor_file.save(place / name, held) for name, held in files.items()}
    same = {"model.again": "model.head.weight"}
    head = {name: empty(value) if name in ("model", "optimizer") else value for name, value in content.items()}
    head["parts"] = {"folder": place.name, "files": seals, "tensors": tensors, "same": same}
    checkpoint.save(folder / "resume.pt", head, previous=folder / "resume.prev.pt")
    return content


def empty(value):
    """A tree in which tensors have no elements."""
    if isinstance(value, dict):
        return {name: empty(part) for name, part in value.items()}
    return torch.empty(0) if isinstance(value, torch.Tensor) else value


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for name in one:
            assert_same(one[name], other[name])
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def test_a_state_in_parts_is_read_as_a_plain_one(tmp_path):
    written = write(tmp_path / "run")
    found = checkpoint.load(tmp_path / "run" / "resume.pt")
    assert_same(found, written)
    assert found["model"]["again"].data_ptr() == found["model"]["head.weight"].data_ptr()
    apart = checkpoint.load(tmp_path / "run" / "resume.pt", apart=True)
    assert {tensor.numel() for tensor in apart["model"].values()} == {0}


def change(folder, at, value):
    """Replace what is at a path in the table of resume.pt, whose checksum is right."""
    content = checkpoint.load(folder / "resume.pt", apart=True)
    place = content["parts"]
    for name in at[:-1]:
        place = place[name]
    if value is None:
        del place[at[-1]]
    else:
        place[at[-1]] = value
    checkpoint.save(folder / "resume.pt", content)


HEAD = ("tensors", "model.head.weight")


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("folder",), "../other"),
        (("folder",), "/state-7"),
        (("folder",), 7),
        (("folder",), None),
        (("files",), []),
        (("files", "0.pt"), None),
        (("files", "../0.pt"), "0" * 64),
        (("files", "0.pt"), 5),
        (("files", "0.pt"), "0" * 64),
        (("tensors", "model.head.weight"), None),
        (("tensors", "model.more"), ["float32", [1], [[0, 1, "0.pt"]]]),
        ((*HEAD, 0), "object"),
        ((*HEAD, 0), "float64"),
        ((*HEAD, 0), []),
        ((*HEAD, 1), [2**40, 16]),
        ((*HEAD, 1), [-1, 16]),
        ((*HEAD, 1, 1), 8),
        ((*HEAD, 2), []),
        ((*HEAD, 2, 1), None),
        ((*HEAD, 2, 1, 0), 4),
        ((*HEAD, 2, 1, 0), 5.0),
        ((*HEAD, 2, 1, 1), 3),
        ((*HEAD, 2, 1, 2), "3.pt"),
        ((*HEAD, 2, 1, 2), "0.pt"),
        (("same", "model.again"), "model.none"),
        (("same", "model.again"), None),
    ],
    ids=str,
)
def test_a_table_that_does_not_fit_is_damage(tmp_path, at, value):
    folder = tmp_path / "run"
    write(folder)
    change(folder, at, value)
    for apart in (False, True):
        with pytest.raises(CheckFailed):
            checkpoint.load(folder / "resume.pt", apart=apart)


def test_a_folder_elsewhere_is_not_read(tmp_path):
    folder = tmp_path / "run"
    write(folder)
    shutil.copytree(folder / "state-7", tmp_path / "state-7")
    content = checkpoint.load(folder / "resume.pt", apart=True)
    content["parts"]["folder"] = "../state-7"
    checkpoint.save(folder / "resume.pt", content)
    with pytest.raises(CheckFailed, match="is not a resume"):
        checkpoint.load(folder / "resume.pt")


def test_parts_that_overlap_and_leave_a_gap_are_damage(tmp_path):
    """As many rows as there should be, and files that agree."""
    folder = tmp_path / "run"
    write(folder)
    content = checkpoint.load(folder / "resume.pt", apart=True)
    part = folder / "state-7" / "1.pt"
    held = {name: tensor.clone() for name, tensor in tensor_file.load(part, "resume.pt").items()}
    held["model.head.weight@4"] = held.pop("model.head.weight@5")
    content["parts"]["files"]["1.pt"] = tensor_file.save(part, held)
    content["parts"]["tensors"]["model.head.weight"][2][1][0] = 4
    checkpoint.save(folder / "resume.pt", content)
    with pytest.raises(CheckFailed, match="is not a resume"):
        checkpoint.load(folder / "resume.pt")


class Bomb:
    """Runs code where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_no_pickle_is_loaded(tmp_path):
    """Neither PyTorch's own metadata, if someone puts some there, nor what takes the place of a part."""
    folder, bomb = tmp_path / "run", tmp_path / "bomb"
    write(folder)
    place = folder / "state-7"
    (place / ".metadata").write_bytes(pickle.dumps(Bomb(bomb)))
    checkpoint.load(folder / "resume.pt")
    for content in (pickle.dumps(Bomb(bomb)), None):
        if content:
            (place / "1.pt").write_bytes(content)
        else:
            digest = tensor_file.save(place / "1.pt", {"model.head.weight@5": Bomb(bomb)})
            with pytest.raises(CheckFailed):
                change(folder, ("files", "1.pt"), digest)
        with pytest.raises(CheckFailed):
            checkpoint.load(folder / "resume.pt")
    assert not bomb.exists()
    pickle.loads((place / ".metadata").read_bytes())
    assert bomb.exists()  # so it would have


@pytest.mark.parametrize("damage", ["missing", "byte", "short", "of another state"])
def test_a_damaged_part_leads_to_the_state_before(tmp_path, damage):
    folder, said = tmp_path / "run", []
    before, _ = write(folder, 6), write(folder, 7)
    part = folder / "state-7" / "1.pt"
    if damage == "missing":
        part.unlink()
    elif damage == "of another state":
        shutil.copy(folder / "state-6" / "1.pt", part)
    else:
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content if damage == "byte" else content[:-100])
    for apart in (False, True):
        found = loop.saved_state(
            folder, "run.pt", "auto", said.append, lambda path, apart=apart: checkpoint.load(path, apart=apart)
        )
        assert found["step"] == 6
    assert str(part) in said[0].text
    assert_same(checkpoint.load(folder / "resume.prev.pt"), before)


def test_only_states_that_nothing_names_are_removed(tmp_path):
    folder = tmp_path / "run"
    for step in (5, 6, 7):
        write(folder, step)
    mine = folder / "state-5" / "notes.txt"
    mine.write_text("mine")
    (folder / "state-9").mkdir()
    (folder / "state-9" / ".0.pt.123.tmp").write_bytes(b"half")
    (folder / "state-of-mine").mkdir()
    os.symlink(folder / "state-6", folder / "state-8")
    parts.sweep(folder, "resume.pt", "resume.prev.pt")
    assert sorted(path.name for path in folder.glob("state-*")) == [f"state-{n}" for n in (5, 6, 7, 8, "of-mine")]
    assert [path.name for path in (folder / "state-5").iterdir()] == ["notes.txt"]
    checkpoint.load(folder / "resume.pt")
    checkpoint.load(folder / "resume.prev.pt")
    (folder / "resume.prev.pt").write_bytes(b"PK damaged")
    parts.sweep(folder, "resume.pt", "resume.prev.pt")  # nobody knows what it named
    assert (folder / "state-6").is_dir()


def test_a_state_never_takes_the_folder_of_another(tmp_path):
    assert [parts.free(tmp_path, 4).name for _ in range(3)] == ["state-4", "state-4-2", "state-4-3"]


def test_a_process_that_is_killed_while_it_saves_leaves_a_whole_state(tmp_path):
    """Killed before each operation that changes a folder, and before some of those that write into a file."""
    command = [sys.executable, Path(__file__).parent / "killed_saving.py", tmp_path]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    codes, steps, whole, folders = zip(*found, strict=True)
    assert len(found) > 15
    assert set(codes[:-1]) == {9}
    assert codes[-1] == 0
    assert sorted(steps) == list(steps)
    assert set(steps) == {2, 3}
    assert all(whole)
    assert max(folders) == 2
