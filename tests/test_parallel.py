"""Several processes train one run: the same windows, losses and weights as one; one writes; all end together."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXT_SETTINGS, set_flags, shortcut
from test_models import make
from test_training import TINY, log_lines, weights_hash
from torch.distributed import TCPStore

from shortcut_cli import registry
from shortcut_cli.cli import launch, signals
from shortcut_cli.errors import Diverged, Interrupted, Unavailable, UsageError
from shortcut_cli.kernels import bf16
from shortcut_cli.models.loss import loss as cross_entropy
from shortcut_cli.training import activations, checkpoint, loop, parallel, sharded
from shortcut_cli.training.parallel import Left, Lost, Processes, joined
from shortcut_cli.training.run_log import read_log
from shortcut_cli.training.torchrun import PROMISED, QUIET

PLAIN = ("train.precision=fp32", "train.batch_size=12", "train.log_every=1", "model.layers=2", "train.timeout_s=60")
PATIENCE_S = 120


DIVIDING = {"arms", "narrow", "first", "most"}  # functions of together.py that divide weights themselves


def skip_if_divided(settings):
    if "train.shard=fsdp" in settings and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip(f"PyTorch {torch.__version__} can't divide weights on CPUs")


class Together:
    """Four processes that wait for jobs: forks of one that has imported torch."""

    def __init__(self):
        jobs, answers = [os.pipe() for _ in range(4)], [os.pipe() for _ in range(4)]
        theirs = [end for (reads, _), (_, writes) in zip(jobs, answers, strict=True) for end in (reads, writes)]
        command = [sys.executable, Path(__file__).parent / "together.py", *map(str, theirs)]
        environment = os.environ | QUIET | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": launch.LOOPBACK}
        self.first = subprocess.Popen(command, env=environment, pass_fds=theirs, process_group=0)
        for end in theirs:
            os.close(end)
        self.jobs = [os.fdopen(writes, "w") for _, writes in jobs]
        self.answers = [os.fdopen(reads) for reads, _ in answers]

    def __call__(self, count, name, local=0, heard=None, **arguments):
        """What the function of together.py returned in each of the first `heard` of `count` processes; None: in all.

        local: how many are on a node, or on that of each process.
        """
        skip_if_divided(["train.shard=fsdp"] if name in DIVIDING else arguments.get("settings", []))
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        for rank, jobs in enumerate(self.jobs[:count]):
            said = place | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
            said |= {"LOCAL_WORLD_SIZE": local[rank] if isinstance(local, list) else local or count}
            environment = {key: str(value) for key, value in said.items()}
            jobs.write(json.dumps({"name": name, "arguments": arguments, "environment": environment}) + "\n")
            jobs.flush()
        return [json.loads(answers.readline()) for answers in self.answers[: count if heard is None else heard]]

    def close(self, code=0):
        for pipe in self.jobs:
            pipe.close()
        assert self.first.wait(PATIENCE_S) == code
        for pipe in self.answers:
            pipe.close()


@pytest.fixture(scope="module")
def together():
    made = Together()
    yield made
    made.close()


@pytest.fixture(scope="module")
def mortal():
    """Some that have trained nothing, so that they can fork."""
    made = Together()
    yield made
    made.close()


@pytest.fixture(scope="module")
def settings(text_run):
    return [*TEXT_SETTINGS, f"data.shards={text_run / 'shards'}", *TINY, *PLAIN]


def losses(folder):
    return [line[key] for line in log_lines(folder) for key in ("loss", "validation") if key in line]


def weights(folder, name="resume.pt"):
    return checkpoint.load(folder / name)["model"]


def near(folder, other):
    """Whether two runs logged the same losses, to 1e-5, and have the same weights, to rounding."""
    assert losses(folder) == pytest.approx(losses(other), abs=1e-5)
    one, two = weights(folder), weights(other)
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4


@pytest.fixture(scope="module")
def runs(together, settings, tmp_path_factory):
    """Runs of 50 steps on 1, 2 and 4 processes: (folder, what the processes returned) by their number."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for count in (1, 2, 4):
        asked = [*settings, "train.steps=50", "train.eval_every=25"]
        made[count] = folder / str(count), together(count, "train", settings=asked, folders=[str(folder / str(count))])
    return made


@pytest.mark.parametrize("count", [2, 4])
def test_the_windows_of_each_step_are_the_same_set(runs, count):
    (alone,) = runs[1][1]
    parts = [of_one["rows"] for of_one in runs[count][1]]
    assert len(alone["rows"]) == 50
    for step, whole in enumerate(alone["rows"]):
        assert all(len(part[step]) == 12 // count for part in parts)
        assert sorted(row for part in parts for row in part[step]) == sorted(whole)


@pytest.mark.parametrize("count", [2, 4])
def test_losses_agree_over_fifty_steps(runs, count):
    assert len(losses(runs[1][0])) == 52
    near(runs[count][0], runs[1][0])


def test_two_processes_add_as_two_parts_of_a_step_in_one_do(runs, together, settings, tmp_path):
    """The halves of a batch are summed in the same order, so all is equal to the bit, however rounding would grow."""
    two = [*settings, "train.steps=50", "train.eval_every=25", "train.accumulation=2"]
    together(1, "train", settings=two, folders=[str(tmp_path)])
    one, other = weights(tmp_path), weights(runs[2][0])
    assert losses(tmp_path) == losses(runs[2][0])
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_same_number_of_processes_gives_the_same_bits(runs, together, settings, tmp_path):
    together(2, "train", settings=[*settings, "train.steps=50", "train.eval_every=25"], folders=[str(tmp_path)])
    assert weights_hash(tmp_path) == weights_hash(runs[2][0])
    assert losses(tmp_path) == losses(runs[2][0])


@pytest.mark.parametrize(
    "extra",
    [
        ("train.accumulation=3", "train.clip=0.05"),
        ("train.ema=0.9",),
        ("train.precision=bf16",),
        ("train.optimizer=muon", "train.ema=0.9", "train.clip=0.05"),
    ],
    ids=["accumulation and clipping", "ema", "bf16", "muon"],
)
def test_what_a_recipe_asks_for_works_in_two(together, settings, tmp_path, extra):
    for count in (1, 2):
        folder = tmp_path / str(count)
        together(count, "train", settings=[*settings, "train.eval_every=6", *extra], folders=[str(folder)])
    if "train.precision=bf16" in extra:  # the halves of a batch are rounded apart from each other
        assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), abs=2e-2)
        return
    near(tmp_path / "2", tmp_path / "1")
    one, two = (weights(tmp_path / name, "run.pt") for name in "12")
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4


@pytest.mark.parametrize("count", [2, 3, 4])
def test_each_process_orthogonalises_its_share_of_the_matrices(together, settings, tmp_path, count):
    """Two layers of 3 + 1 + 1 + 1 matrices, and 2 more of the map, of four shapes."""
    asked = [*settings, "train.optimizer=muon", "train.eval_every=6"]
    found = {}
    for number in (1, count):
        found[number] = together(number, "train", settings=asked, folders=[str(tmp_path / str(number))])
    steps = 12
    assert [one["matrices"] for one in found[1]] == [14 * steps]
    assert [one["matrices"] for one in found[count]] == [len(range(rank, 14, count)) * steps for rank in range(count)]
    near(tmp_path / str(count), tmp_path / "1")


@pytest.mark.parametrize("count", [2, 3, 4])
def test_validation_counts_every_window_once(together, settings, tmp_path, count):
    """Seven windows in batches of two: for four processes the last batch is half full."""
    asked = [*settings, "train.batch_size=2", "train.eval_windows=7"]
    (alone,) = together(1, "validate", settings=asked, folders=[str(tmp_path)])
    part = [*asked, f"train.batch_size={2 if count == 2 else count}"]
    found = together(count, "validate", settings=part, folders=[str(tmp_path)])
    assert found == [pytest.approx(alone, rel=1e-6)] * count


def test_only_the_first_process_writes(together, settings, tmp_path):
    folders = [str(tmp_path / "first"), str(tmp_path / "second")]
    asked = [*settings, "train.keep='best,last,every:4'", "train.schedule=constant"]
    together(2, "train", settings=asked, folders=folders)
    names = {"log.jsonl", "recipe.toml", "resume.pt", "run.pt", "last.pt", "step-4.pt", "step-8.pt", "step-12.pt"}
    assert {path.name for path in Path(folders[0]).iterdir()} >= names
    assert not Path(folders[1]).exists()


@pytest.mark.parametrize("rank", ["0", "2"])
def test_a_signal_to_any_process_stops_all_at_one_step(together, settings, tmp_path, rank):
    asked = [*settings, "train.eval_every=6"]
    ended = together(3, "train", settings=asked, folders=[str(tmp_path / "parts")], stops={rank: 5}, code=130)
    assert {tuple(one["ended"][:2]) for one in ended} == {("Interrupted", 130)}
    assert {one["ended"][2] for one in ended} == {ended[0]["ended"][2]}  # names the step
    assert {len(one["rows"]) for one in ended} == {6}
    assert checkpoint.load(tmp_path / "parts" / "resume.pt")["step"] == 6
    together(3, "train", settings=asked, folders=[str(tmp_path / "parts")])
    together(3, "train", settings=asked, folders=[str(tmp_path / "whole")])
    assert weights_hash(tmp_path / "parts") == weights_hash(tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.fixture(scope="module")
def begun(together, settings, tmp_path_factory):
    """Runs that stopped halfway, on 4 processes and on 1, and the whole run on 1."""
    folder, asked = (
        tmp_path_factory.mktemp("begun"),
        [*settings, "train.steps=20", "train.eval_every=5", "train.ema=0.9"],
    )
    for count in (4, 1):
        together(count, "train", settings=asked, folders=[str(folder / str(count))], stops={"0": 8})
    together(1, "train", settings=asked, folders=[str(folder / "whole")])
    return folder, asked


@pytest.mark.parametrize(("before", "after"), [(4, 1), (4, 2), (4, 3), (1, 4)])
def test_a_run_goes_on_with_another_number_of_processes(together, begun, tmp_path, before, after):
    folder, asked = begun
    shutil.copytree(folder / str(before), tmp_path / "run")
    ended = together(after, "train", settings=asked, folders=[str(tmp_path / "run")])
    assert not any(one["ended"] for one in ended)
    assert len(losses(tmp_path / "run")) == 24
    near(tmp_path / "run", folder / "whole")
    made = checkpoint.load(tmp_path / "run" / "run.pt")["conditions"]
    assert [part["processes"] for part in made] == [before, after]


# Weights that are divided


def test_every_arm_trains_the_same_with_divided_weights(together, settings, tmp_path):
    """And with activations that are computed again; in every option that changes what layers hand on."""
    named = [(name, {}) for name in registry.MODELS]
    named += [("shortcut", {"mode": "gated"}), ("value_residual", {"gate": "token"}), ("attnres", {"variant": "block"})]
    asked = [*settings, "model.layers=3", "train.optimizer=adamw"]
    first, second = together(2, "arms", settings=asked, folders=[str(tmp_path)], named=named)
    assert first == second
    for name in {key.rpartition(" ")[0] for key in first}:
        assert first[f"{name} fsdp"] == pytest.approx(first[f"{name} none"], rel=1e-6), name


@pytest.mark.parametrize("count", [2, 3])
def test_matrices_that_travel_in_bf16_change_nothing_of_a_training_in_bf16(together, settings, tmp_path, count):
    """To the bit, in every arm; of three processes some have no row of a matrix, or fewer than others."""
    named = [(name, {}) for name in registry.MODELS]
    named += [("shortcut", {"mode": "gated"}), ("value_residual", {"gate": "token"}), ("moda", {"feed_forward": True})]
    found, *others = together(count, "narrow", settings=[*settings, "model.layers=3"], folders=["x"], named=named)
    assert others == [found] * (count - 1)
    for name, (half, whole) in found.items():
        assert half[:-1] == whole[:-1], name
        assert (half[-1], whole[-1]) == (1, 0), name


@pytest.fixture(scope="module")
def divided(together, settings, tmp_path_factory):
    """A run on two processes, whole and with divided weights, and what it takes to make it."""
    folder = tmp_path_factory.mktemp("divided")
    asked = [*settings, "train.eval_every=4", "train.ema=0.9", "train.clip=0.05", "train.accumulation=2"]
    asked += ["train.batch_size=24", "train.optimizer=muon", "train.schedule=wsd", "train.keep='best,last,every:4'"]
    together(2, "train", settings=asked, folders=[str(folder / "whole")])
    together(2, "train", settings=[*asked, "train.shard=fsdp"], folders=[str(folder / "fsdp")])
    return folder, asked


def test_a_run_with_divided_weights_writes_the_same_files(divided):
    folder, _ = divided
    near(folder / "fsdp", folder / "whole")
    names = sorted(path.name for path in (folder / "whole").iterdir())
    parts = ["state-12", "state-8"]  # those of resume.pt and resume.prev.pt
    assert sorted(path.name for path in (folder / "fsdp").iterdir()) == sorted([*names, *parts])
    assert [sorted(path.name for path in (folder / "fsdp" / name).iterdir()) for name in parts] == [
        ["0.pt", "1.pt"]
    ] * 2
    assert {"run.pt", "last.pt", "step-8.pt", "stable.pt"} <= set(names)
    for name in (name for name in names if name.endswith(".pt")):
        assert_near(checkpoint.load(folder / "fsdp" / name), checkpoint.load(folder / "whole" / name))


def assert_near(one, other):
    """Whether the contents of two files have the same keys, and tensors that are equal to rounding."""
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape
        assert type(one) is type(other) is torch.Tensor
        assert (one.double() - other.double()).abs().max() < 1e-4
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"state", "recipe", "versions", "conditions", "scores"} | (one.keys() & {"state"}):
            assert_near(one[key], other[key])


@pytest.mark.parametrize("after", [(1, 0, "none"), (3, 0, "none"), (3, 0, "fsdp"), (4, 2, "fsdp")], ids=str)
def test_a_run_with_divided_weights_goes_on_elsewhere(together, divided, tmp_path, after):
    """Begun on two processes; (4, 2): two to a node."""
    folder, asked = divided
    begun = [*asked, "train.shard=fsdp"]
    ended = together(2, "train", settings=begun, folders=[str(tmp_path)], stops={"1": 4})
    assert [one["ended"][1] for one in ended] == [75, 75]
    count, local, shard = after
    asked = [*asked, f"train.shard={shard}"]
    ended = together(count, "train", local=local, settings=asked, folders=[str(tmp_path)])
    assert not any(one["ended"] for one in ended)
    near(tmp_path, folder / "whole")


def test_a_whole_run_goes_on_with_divided_weights(together, divided, tmp_path):
    folder, asked = divided
    together(1, "train", settings=asked, folders=[str(tmp_path)], stops={"0": 5})
    together(2, "train", settings=[*asked, "train.shard=fsdp"], folders=[str(tmp_path)])
    near(tmp_path, folder / "whole")


@pytest.fixture(scope="module")
def divided_by_four(together, begun, tmp_path_factory):
    """A run that stopped halfway, with weights divided over four processes."""
    folder = tmp_path_factory.mktemp("four") / "run"
    together(4, "train", settings=[*begun[1], "train.shard=fsdp"], folders=[str(folder)], stops={"3": 8})
    content = checkpoint.load(folder / "resume.pt", apart=True)
    assert sorted(content["parts"]["files"]) == ["0.pt", "1.pt", "2.pt", "3.pt"]
    parts = [(folder / content["parts"]["folder"] / f"{rank}.pt").stat().st_size for rank in range(4)]
    assert max(parts) < 0.3 * sum(parts)
    return folder


@pytest.mark.parametrize("shard", ["none", "fsdp"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_run_with_weights_divided_by_four_goes_on(together, begun, divided_by_four, tmp_path, after, shard):
    folder, asked = begun
    shutil.copytree(divided_by_four, tmp_path / "run")
    ended = together(after, "train", settings=[*asked, f"train.shard={shard}"], folders=[str(tmp_path / "run")])
    assert not any(one["ended"] for one in ended)
    assert len(losses(tmp_path / "run")) == 24
    near(tmp_path / "run", folder / "whole")
    plain = after == 1 or shard == "none"
    assert ("parts" in checkpoint.load(tmp_path / "run" / "resume.pt", apart=True)) != plain


def test_a_state_is_verified_once_by_all_and_again_by_who_reads_more(together, begun, divided_by_four, tmp_path):
    asked = [*begun[1], "train.shard=fsdp"]
    for count, most in ((4, 1), (2, 2)):
        folder = tmp_path / str(count)
        shutil.copytree(divided_by_four, folder)
        ended = together(count, "train", settings=asked, folders=[str(folder)])
        assert not any(one["ended"] for one in ended)
        verified = sorted(each for one in ended for each in one["verified"])
        name = verified[0].split("/")[0]
        assert set(verified) == {f"{name}/{number}.pt" for number in range(4)}
        assert len(verified) <= 4 * most
        assert all(len(set(one["verified"])) == len(one["verified"]) for one in ended)


@pytest.mark.parametrize("part", range(4))
def test_a_part_that_is_damaged_is_found_by_all_and_the_state_before_is_taken(
    together, begun, divided_by_four, tmp_path, part
):
    """Whichever process verifies it; and if there is no state before, all end."""
    folder, asked = begun
    asked, named = [*asked, "train.shard=fsdp"], checkpoint.load(divided_by_four / "resume.pt", apart=True)["parts"]
    for name in ("with", "without"):
        shutil.copytree(divided_by_four, tmp_path / name)
        damaged = tmp_path / name / named["folder"] / f"{part}.pt"
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
    (tmp_path / "without" / "resume.prev.pt").unlink()
    ended = together(2, "train", settings=asked, folders=[str(tmp_path / "with")])
    assert not any(one["ended"] for one in ended)
    assert any(f"{part}.pt" in text and "resume.prev.pt" in text for text in ended[0]["said"])
    near(tmp_path / "with", folder / "whole")
    ended = together(2, "train", settings=asked, folders=[str(tmp_path / "without")])
    assert [one["ended"][0] for one in ended] == ["CheckFailed", "Left"]
    assert str(damaged) in ended[0]["ended"][2]


def test_a_process_that_does_not_see_the_state_ends_all(together, begun, divided_by_four, tmp_path):
    shutil.copytree(divided_by_four, tmp_path / "run")
    (tmp_path / "other").mkdir()
    asked = [*begun[1], "train.shard=fsdp"]
    ended = together(2, "train", settings=asked, folders=[str(tmp_path / "run"), str(tmp_path / "other")])
    assert [one["ended"][0] for one in ended] == ["ShortcutError", "Left"]
    assert "process 1 of 2: " in ended[0]["ended"][2]
    assert str(tmp_path / "other") in ended[0]["ended"][2]


def test_all_take_the_state_before_if_a_run_is_to_be_extended_that_is_not_over(
    together, begun, divided_by_four, tmp_path
):
    shutil.copytree(divided_by_four, tmp_path / "run")
    (tmp_path / "run" / "resume.pt").write_bytes(b"PK damaged")
    asked = [*begun[1], "train.shard=fsdp"]
    ended = together(2, "train", settings=asked, folders=[str(tmp_path / "run")], extend=True)
    assert not any(one["ended"] for one in ended)
    near(tmp_path / "run", begun[0] / "whole")


def test_a_process_that_sees_another_state_ends_all(together, begun, divided_by_four, tmp_path):
    """On a disk of its own, say, or if a network file system shows it the state before for a while."""
    shutil.copytree(divided_by_four, tmp_path / "run")
    shutil.copytree(divided_by_four, tmp_path / "other")
    (tmp_path / "other" / "resume.prev.pt").replace(tmp_path / "other" / "resume.pt")
    asked = [*begun[1], "train.shard=fsdp"]
    ended = together(2, "train", settings=asked, folders=[str(tmp_path / "run"), str(tmp_path / "other")])
    assert [one["ended"][0] for one in ended] == ["ShortcutError", "Left"]
    assert "process 1 of 2 sees another resume.pt" in ended[0]["ended"][2]


def test_a_resume_with_divided_weights_is_the_run_that_never_stopped_to_the_bit(
    together, begun, divided_by_four, tmp_path
):
    _, asked = begun
    shutil.copytree(divided_by_four, tmp_path / "parts")
    for name in ("parts", "whole"):
        together(4, "train", settings=[*asked, "train.shard=fsdp"], folders=[str(tmp_path / name)])
    one, other = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_every_arm_begins_with_the_same_weights_on_any_number_of_processes(together, settings, tmp_path):
    """To the bit, though no process has them all: of tied and untied heads, and either kind of initialisation."""
    named = [(name, {}) for name in registry.MODELS]
    named += [("shortcut", {"mode": "gated"}), ("value_residual", {"gate": "token"}), ("attnres", {"variant": "block"})]
    asked = [*settings, "model.layers=3"]
    for more in ([], ["model.tied=false", "model.init=fan_in"]):
        (alone,) = together(1, "first", settings=[*asked, *more], folders=[str(tmp_path)], named=named)
        for count in (2, 3, 4):
            found = together(count, "first", settings=[*asked, *more], folders=[str(tmp_path)], named=named)
            assert found == [alone] * count


def test_nodes_of_different_sizes_divide_weights_over_all_processes(together, settings, tmp_path):
    """They have no grid of nodes and processes; each would wait for others in another one."""
    named, asked = [("shortcut", {})], [*settings, "model.layers=3", "train.optimizer=adamw"]
    (alone,) = together(1, "first", settings=asked, folders=[str(tmp_path)], named=named)
    found = together(4, "first", local=[2, 2, 1, 1], settings=asked, folders=[str(tmp_path)], named=named)
    assert found == [alone] * 4
    steps = {tuple(local): together(4, "arms", local=local, settings=asked, folders=[str(tmp_path)], named=named)
             for local in ([4] * 4, [2, 2, 1, 1])}  # fmt: skip
    assert steps[4, 4, 4, 4] == steps[2, 2, 1, 1]


def test_no_process_holds_more_than_its_part_and_a_layer_at_the_start(together, settings, tmp_path):
    """The most bytes that its weights had at once, of 8 equal layers."""
    asked = [*settings, "model.layers=8", "model.name=gpt", "model.width=128", "model.ffn=256"]
    for count in (2, 4):
        found = together(count, "most", settings=asked, folders=[str(tmp_path)])
        for whole, layer, rest, most in found:
            assert most < whole / count + layer + rest + 20_000, (count, whole, layer, rest, most)
            assert most > layer


def test_a_run_with_divided_weights_begins_with_those_of_another(together, settings, tmp_path):
    asked = [*settings, "train.eval_every=6"]
    together(1, "train", settings=asked, folders=[str(tmp_path / "first")])
    path = str(tmp_path / "first" / "run.pt")
    for shard in ("none", "fsdp"):
        together(2, "train", settings=[*asked, f"train.shard={shard}"], folders=[str(tmp_path / shard)], init_from=path)
    near(tmp_path / "fsdp", tmp_path / "none")
    one, other = (checkpoint.load(tmp_path / name / "run.pt")["lineage"] for name in ("none", "fsdp"))
    assert one == other


def test_a_run_with_divided_weights_is_extended(together, settings, tmp_path):
    asked = [*settings, "train.schedule=constant", "train.eval_every=4", "train.shard=fsdp"]
    longer, shorter = ([*asked, f"train.steps={steps}"] for steps in (12, 8))
    together(2, "train", settings=longer, folders=[str(tmp_path / "long")])
    together(2, "train", settings=shorter, folders=[str(tmp_path / "short")])
    together(2, "train", settings=longer, folders=[str(tmp_path / "short")], extend=True)
    one, other = weights(tmp_path / "short"), weights(tmp_path / "long")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(tmp_path / "short") == losses(tmp_path / "long")


def test_a_result_of_divided_weights_that_is_missing_is_made_again(together, settings, tmp_path):
    asked = [*settings, "train.eval_every=8", "train.shard=fsdp"]
    together(2, "train", settings=asked, folders=[str(tmp_path)], stops={"0": 7})
    state = checkpoint.load(tmp_path / "resume.pt")
    assert (state["step"], state["state"]["best_step"]) == (8, 8)
    before = (tmp_path / "run.pt").read_bytes()
    (tmp_path / "run.pt").unlink()
    together(2, "train", settings=asked, folders=[str(tmp_path)], stops={"0": 1})
    assert checkpoint.load(tmp_path / "resume.pt")["step"] == 10
    assert (tmp_path / "run.pt").read_bytes() == before


def test_a_state_that_is_being_written_is_waited_for_if_the_next_step_diverges():
    done = []

    def step(number):
        done.append(f"step {number}")
        if number == 2:
            raise Diverged("not finite")

    def said(what):
        return lambda *_: done.append(what)

    config = SimpleNamespace(steps=9, log_every=9, eval_every=2)
    trainer = SimpleNamespace(
        config=config,
        state=loop.State(),
        step=step,
        report=lambda _: None,
        task="train",
        validate=lambda: None,
        save=said("begin to save"),
        saved_all=said("saved"),
    )
    with pytest.raises(Diverged):
        loop.run(trainer, lambda: None)
    assert done == ["step 0", "step 1", "begin to save", "step 2", "saved"]


def test_a_process_that_does_not_see_the_run_folder_says_so(together, settings, tmp_path):
    folders = [str(tmp_path / "first"), str(tmp_path / "second")]
    ended = together(2, "train", settings=[*settings, "train.shard=fsdp"], folders=folders)
    assert [one["ended"][:2] for one in ended] == [["Left", 77], ["UsageError", 2]]
    assert "process 1 does not see" in ended[1]["ended"][2]
    assert not (tmp_path / "first" / "resume.pt").exists()


def saved_bytes(model, ids, narrow):
    """What a forward pass keeps for the gradient, but for weights, and all gradients."""
    kept, own = {}, {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with bf16.products(narrow), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = cross_entropy(model(ids), ids)
    found = sum(kept.values())
    loss.backward()
    return found, torch.cat([weight.grad.flatten() for weight in model.parameters()])


@pytest.mark.parametrize("name", ["gpt", "moda", "attnres", "mudd"])
@pytest.mark.parametrize("narrow", [False, True], ids=["fp32", "bf16"])
def test_activations_that_are_computed_again_are_not_kept(name, narrow):
    plain, again = (make(name, {}, open_gates=True, layers=4) for _ in range(2))
    activations.forget(again.blocks)
    ids = torch.randint(0, 37, (2, 24), generator=torch.Generator().manual_seed(1))
    whole, gradient = saved_bytes(plain, ids, narrow)
    less, same = saved_bytes(again, ids, narrow)
    assert less < whole / 2
    assert torch.allclose(same, gradient, atol=1e-6)


def test_windows_that_cannot_be_divided_are_refused(together, settings, tmp_path):
    with pytest.raises(UsageError, match="12 can't be divided among 5 processes"):
        Processes(0, 5).part(12)
    with pytest.raises(UsageError, match="and 2 parts of "):
        Processes(0, 4).part(12, 2)
    ended = together(2, "train", settings=[*settings, "train.batch_size=3"], folders=[str(tmp_path / "run")])
    assert [one["ended"][:2] for one in ended] == [["UsageError", 2], ["Left", 77]]
    assert not (tmp_path / "run" / "recipe.toml").exists()


class Board:
    """At which step each process is; None: nobody knows, and the answer never comes. noticed: ranks that wait too.

    fails: whether one has said that it ends with an error of its own.
    """

    def __init__(self, *steps, noticed=(), fails=False):
        self.steps, self.noticed, self.fails = steps, noticed, fails

    def set(self, *_):
        """Without effect."""

    def check(self, places):
        said = {parallel._notice(rank) for rank in self.noticed} | (
            {parallel._place(parallel.FAILS)} if self.fails else set()
        )
        return set(places) <= said

    def set_timeout(self, _):
        """Without effect, as if the cable were cut."""

    def get(self, place):
        step = self.steps[int(place.rpartition("/")[2])]
        if step is None:
            time.sleep(PATIENCE_S)
            raise RuntimeError("no answer came")
        return str(step)


@pytest.mark.parametrize(
    ("steps", "noticed", "said"),
    [
        ((7, 6, 7), (), "process 1 of 3 does not answer at step 7 (gloo: Timed out)"),
        ((7, 7, 7), (1,), "process 2 of 3 does not answer at step 8 (gloo: Timed out)"),
        ((7, 7, 7), (1, 2), "a process of the training does not answer at step 8 (gloo: Timed out)"),
        ((7, None, 7), (), "a process of the training does not answer (gloo: Timed out)"),
    ],
)
def test_who_does_not_answer_is_said_though_the_board_may_not(steps, noticed, said, monkeypatch):
    monkeypatch.setattr(parallel, "PATIENCE_S", 0.2)
    with pytest.raises(Lost) as lost, Processes(0, 3, board=Board(*steps, noticed=noticed)).answering():
        raise RuntimeError("gloo: Timed out\nmore")
    assert lost.value.message == said
    for bug in ("", "a bug", "what was stored can't be restored", "a kernel failed\n    tl.store(out, x) timed out"):
        with pytest.raises(RuntimeError) as found, Processes(0, 3, board=Board(*steps)).answering():
            raise RuntimeError(bug)
        assert str(found.value) == bug


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name in (*PROMISED, "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="3 processes on this machine, which has 2 GPUs"), joined("cuda:3", 60):
        pass


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        ([0, 0], 0),
        ([0, -9], None),
        ([75, 75], 75),
        ([130, 76], 130),
        ([2, 77], 2),
        ([77, 4], 4),
        ([76, 1], 1),  # the second failed, the first noticed
        ([1, -9], None),
        ([76, None], None),
        ([None, -9], None),
        ([None, 0], None),
    ],
)
def test_when_processes_have_ended_for_good(codes, wanted):
    assert launch._final(codes) == wanted


# The command


class Command:
    """`train --devices 2` in a process of its own, which does `first` before."""

    def __init__(self, settings, folder, *more, grace_s=launch.GRACE_S, first="pass"):
        skip_if_divided(settings)
        setting = f"{first}; from shortcut_cli.cli import launch; launch.GRACE_S = {grace_s}"
        start = f"from shortcut_cli.__main__ import main; {setting}; main()"
        command = [sys.executable, "-c", start, "train", "--recipe", "text-tiny", "--out", folder]
        command += ["--devices", "2", "--device", "cpu", "--no-report", *more, *set_flags(*settings)]
        self.folder, environment = folder, os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(list(map(str, command)), env=environment, **pipes)

    def workers(self):
        """Process ids by rank."""
        found = {}
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            try:
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                said = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            if parent == self.process.pid:
                found |= {int(text[5:]): pid for text in said if text.startswith(b"RANK=")}
        return found

    def wait_for(self, steps):
        """Wait until the log has that many lines of training; returns the workers."""
        until = time.monotonic() + PATIENCE_S
        while not (self.folder / "log.jsonl").exists() or len(log_lines(self.folder)) < steps:
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.02)
        return self.workers()

    def end(self):
        """Exit code, stdout and stderr."""
        out, errors = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, out, errors


@pytest.fixture(scope="module")
def long(settings):
    """Long enough to be met on the way."""
    return [*settings, "train.steps=200", "train.eval_every=20", "train.eval_windows=4"]


@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_a_killed_process_is_started_again_and_a_signal_stops_all(together, long, tmp_path, shard):
    """After both, the run goes on to the weights of one that never stopped."""
    long = [*long, f"train.shard={shard}"]
    together(2, "train", settings=long, folders=[str(tmp_path / "whole")])
    command = Command(long, tmp_path / "killed")
    first = command.wait_for(30)
    os.kill(first[1], signal.SIGKILL)
    while (second := command.workers()).keys() != {0, 1} or set(second.values()) & set(first.values()):
        time.sleep(0.02)
    command.wait_for(50)
    command.process.send_signal(signal.SIGTERM)
    code, _, errors = command.end()
    assert code == 75, errors
    assert "process 1 of 2 was killed by SIGKILL; all start again from the last state (1 of 3)" in errors
    assert errors.count("stopped at step") == 1, errors
    assert "Traceback" not in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in second.values())
    assert checkpoint.load(tmp_path / "killed" / "resume.pt")["step"] < 200
    together(2, "train", settings=long, folders=[str(tmp_path / "killed")])
    for name in ("resume.pt", "run.pt"):
        one, other = (weights(tmp_path / which, name) for which in ("killed", "whole"))
        assert all(torch.equal(one[key], other[key]) for key in other)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_a_process_that_does_not_answer_is_named(long, tmp_path, shard):
    asked = [*long, "train.timeout_s=8", f"train.shard={shard}"]
    command = Command(asked, tmp_path, "--max-restarts", 0, "--logs-per-rank", grace_s=3)
    os.kill(command.wait_for(10)[1], signal.SIGSTOP)
    code, _, errors = command.end()
    assert code == 1, errors
    (step,) = re.findall(r"process 1 of 2 does not answer at step (\d+)", errors)
    assert int(step) >= 10
    assert "process 1 of 2 did not answer" in errors
    assert "Traceback" not in errors
    assert not command.workers()
    assert f"process 1 of 2 does not answer at step {step}" in (tmp_path / "rank-0.txt").read_text()
    logs = [list(read_log(tmp_path, f"rank-{rank}.jsonl")) for rank in (0, 1)]
    assert len(logs[0]) in (int(step) - 1, int(step))  # that of its own step it may have taken
    assert [line["step"] for line in logs[0]] == list(range(1, len(logs[0]) + 1))
    for one, other, both in zip(*logs, (line for line in log_lines(tmp_path) if "loss" in line), strict=False):
        assert (one["loss"] + other["loss"]) / 2 == pytest.approx(both["loss"], abs=1e-6)
        assert 0 < one["computed_s"] <= one["seconds"]


def test_a_hang_with_weights_divided_within_nodes_ends_in_time(settings, tmp_path):
    """Two nodes of two processes: one sleeps, and only those of its node, or of its rank there, wait for it."""
    apart = Together()
    try:
        asked = [*settings, "train.steps=40", "train.shard=fsdp", "train.timeout_s=8"]
        began = time.monotonic()
        asked = {"local": 2, "settings": asked, "folders": [str(tmp_path)]}
        told = [one["ended"] for one in apart(4, "train", heard=3, sleeps={"3": [6, PATIENCE_S]}, **asked)]
        assert time.monotonic() - began < PATIENCE_S
        assert {(kind, code) for kind, code, _ in told} == {("Lost", 76)}
        assert any("process 3 of 4 does not answer at step 6" in message for _, _, message in told), told
    finally:
        os.killpg(apart.first.pid, signal.SIGKILL)
        apart.close(-signal.SIGKILL)


@pytest.mark.parametrize(
    ("fault", "wrong", "shard", "said"),
    [
        ("full disk, run.pt", [0], "none", "No space left"),
        ("full disk, run.pt", [0], "fsdp", "No space left"),
        ("full disk, parts", [1], "fsdp", "No space left"),
        ("full disk, parts", [0, 1, 2], "fsdp", "No space left"),
        ("full disk, copy", [0], "none", "No space left"),
        ("unreadable", [1], "none", "Permission denied"),
        ("unreadable at the start", [2], "none", "Permission denied"),
        ("memory", [0, 1, 2], "none", "there is not enough memory"),
        ("memory", [1], "fsdp", "there is not enough memory"),
        ("bug", [1], "none", "LookupError"),
    ],
)
def test_an_error_is_said_once_by_a_process_that_met_it(mortal, settings, tmp_path, fault, wrong, shard, said):
    asked = [*settings, "train.eval_every=4", f"train.shard={shard}", "train.timeout_s=20"]
    ended = mortal(3, "fail", settings=asked, folder=str(tmp_path), fault=fault, wrong=wrong)
    (rank,) = (rank for rank, (_, _, shown) in enumerate(ended) if shown)
    assert rank in wrong
    assert said in ended[rank][1]
    assert [code for code, *_ in ended] == [1 if each == rank else 77 for each in range(3)]


def test_a_full_disk_is_one_panel(settings, tmp_path):
    """Of the command, which may write no file of more than 16 KB: the first process meets that, the other loses it."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, resource.RLIM_INFINITY))"
    command = Command([*settings, "train.shard=fsdp"], tmp_path / "run", first=limit, grace_s=5)
    ended, _, errors = command.end()
    assert ended == 1, errors
    assert errors.count("File too large") == errors.count("\u256d") == 1, errors
    assert "start again" not in errors
    assert "Traceback" not in errors


def test_weights_cannot_be_divided_on_cpus_by_a_pytorch_whose_fsdp_fails_there(monkeypatch):
    """2.6: 'Stream' object has no attribute 'record_event'."""
    monkeypatch.setattr(torch.cpu, "Stream", type("Stream", (), {}))
    with pytest.raises(Unavailable, match="does not work on CPUs with PyTorch"):
        sharded.check("cpu:0")
    sharded.check("cuda:0")


def test_who_only_loses_another_that_fails_says_nothing(monkeypatch):
    monkeypatch.setattr(parallel, "PATIENCE_S", 0.2)
    with pytest.raises(Left), Processes(0, 3, board=Board(7, 6, 7, fails=True)).answering():
        raise RuntimeError("gloo: Connection closed by peer")


def test_logs_of_each_process_need_several(tmp_path):
    done = shortcut("train", "--recipe", "text-tiny", "--logs-per-rank", cwd=tmp_path, check=2)
    assert "--logs-per-rank is for several processes" in done.stderr


@pytest.mark.parametrize(
    ("errors", "shown"),
    [
        ([Left("failed"), UsageError("wrong")], [False, True]),
        ([Interrupted("stopped"), Interrupted("stopped")], [True, False]),
        ([UsageError("wrong"), UsageError("wrong")], [True, False]),  # before they have joined, say
        ([Lost("silent"), Lost("silent")], [True, False]),
        ([Lost("silent"), UsageError("wrong")], [True, True]),  # which took its time to find out
    ],
)
def test_what_several_processes_say_is_said_once(errors, shown, monkeypatch):
    monkeypatch.setattr(parallel, "PATIENCE_S", 60)  # on a busy machine
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for rank, (error, its) in enumerate(zip(errors, shown, strict=True)):
        for name, value in zip(PROMISED, (rank, 2, rank, "127.0.0.1", store.port), strict=True):
            monkeypatch.setenv(name, str(value))
        assert [signals._is_of_another(error) for _ in range(2)] == [not its] * 2


def test_an_error_is_shown_if_nobody_can_say_who_shows_it():
    """In a process of its own: a thread goes on to ask, and would say after five minutes that it gives up."""
    code = (
        "from shortcut_cli.cli import signals\nfrom shortcut_cli.errors import UsageError\n"
        "from shortcut_cli.training import parallel\nparallel.PATIENCE_S = 0.2\n"
        "print(signals._is_of_another(UsageError('wrong')))"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        promised = zip(PROMISED, ("1", "2", "1", "127.0.0.1", str(free.getsockname()[1])), strict=True)
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | dict(promised), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_a_dry_run_takes_no_devices(tmp_path):
    done = shortcut("train", "--recipe", "text-tiny", "--dry-run", "--devices", "2", cwd=tmp_path, check=2)
    assert "--dry-run takes no --devices" in done.stderr
