"""Several processes of a training, for tests/test_parallel.py: each does one job after the other.

Each reads jobs as lines of JSON: the name of a function below, its arguments, and the environment that torchrun would
set. It answers each with what the function returned. All are forks of one that has imported torch.
"""

import errno
import gc
import hashlib
import importlib
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

from shortcut_cli.cli import signals
from shortcut_cli.config import reading
from shortcut_cli.data import windows
from shortcut_cli.errors import ShortcutError
from shortcut_cli.events import Note
from shortcut_cli.stages import training
from shortcut_cli.training import checkpoint, muon, parallel, sharded, tensor_file, torchrun
from shortcut_cli.training.trainer import Trainer


def quiet(*_, **__):
    """A `report` that ignores its events."""


class Recorded:
    """What this process computed: rows of each batch as hashes, and the matrices that were orthogonalised."""

    def __init__(self):
        self.rows, self.matrices, self.verified, self.said = [], 0, [], []
        self.batch, self.orthogonalise = windows.Windows.batch, muon.orthogonalise
        self.check_seal = tensor_file._check_seal

    def __enter__(self):
        def batch(itself, first, count):
            x, y = self.batch(itself, first, count)
            self.rows.append(
                [hashlib.sha256(torch.stack(row).numpy().tobytes()).hexdigest() for row in zip(x, y, strict=True)]
            )
            return x, y

        def orthogonalise(x):
            self.matrices += len(x)
            return self.orthogonalise(x)

        def check_seal(path, *rest):
            if path.parent.name.startswith("state-"):
                self.verified.append(f"{path.parent.name}/{path.name}")
            self.check_seal(path, *rest)

        windows.Windows.batch, muon.orthogonalise = batch, orthogonalise
        tensor_file._check_seal = check_seal
        return self

    def __exit__(self, *_):
        windows.Windows.batch, muon.orthogonalise = self.batch, self.orthogonalise
        tensor_file._check_seal = self.check_seal

    def report(self, event):
        """Remembers what is said to the user."""
        self.said += [event.text] if isinstance(event, Note) else []


def asked_after(steps, code, sleeps_at=0, sleep_s=0):
    """A `stop` that returns `code` after that many steps; None: never. It sleeps after the step `sleeps_at`."""
    done = 0

    def asked():
        nonlocal done
        done += 1
        if done == sleeps_at:
            time.sleep(sleep_s)
        return code if steps is not None and done >= steps else None

    return nullcontext(asked)


def whole(weights):
    """Weights, put together; all processes call this."""
    return {key: each.full_tensor() if sharded.is_part(each) else each for key, each in weights.items()}


def train(settings, folders, stops=None, code=75, init_from=None, extend=False, sleeps=None):
    """Train; folders: of each rank, or of all; stops: after how many steps a rank is asked to leave.

    Of parts of a state, `verified` lists those whose bytes were.

    sleeps: after how many steps a rank sleeps, and for how many seconds.
    """
    rank = int(os.environ["RANK"])
    folder = Path(folders[min(rank, len(folders) - 1)])
    resolved = reading.read("text-tiny", settings)
    stop = asked_after((stops or {}).get(str(rank)), code, *(sleeps or {}).get(str(rank), ()))
    ended = 0
    with Recorded() as recorded:
        try:
            training.train(
                resolved,
                folder,
                device="cpu",
                resume="auto",
                report=recorded.report,
                stop=stop,
                init_from=Path(init_from) if init_from else None,
                extend=extend,
            )
        except ShortcutError as error:
            ended = [type(error).__name__, error.exit_code, error.message]
    found = {name: getattr(recorded, name) for name in ("rows", "matrices", "verified", "said")}
    return found | {"ended": ended}


def refuse(number, name):
    """An OSError of the system about a file."""
    raise OSError(number, os.strerror(number), name)


def full(save, meant):
    """A `save` that finds no room for the files that are meant."""
    return lambda path, *rest, **given: refuse(errno.ENOSPC, str(path)) if meant(path) else save(path, *rest, **given)


def plant(fault):
    """Plant what goes wrong in this process."""
    batch, steps = windows.Windows.batch, iter(range(5))

    def unreadable(*given):
        return refuse(errno.EACCES, "train-00000.bin") if next(steps, None) is None else batch(*given)

    def settle(_):
        raise MemoryError if fault == "memory" else LookupError("a bug")

    if fault == "full disk, run.pt":
        checkpoint.save = full(checkpoint.save, lambda path: path.name == "run.pt")
    elif fault == "full disk, copy":
        checkpoint.save = full(checkpoint.save, lambda path: path.name == "resume.pt")
    elif fault == "full disk, parts":
        tensor_file.save = full(tensor_file.save, lambda path: path.parent.name.startswith("state-"))
    elif fault == "unreadable":
        windows.Windows.batch = unreadable
    elif fault == "unreadable at the start":
        training.Trainer = lambda *_: refuse(errno.EACCES, "train-00000.bin")
    else:
        Trainer.settle = settle


def fail(settings, folder, fault, wrong):
    """Train, with a fault in the processes of some ranks: [exit code, what is said, whether this process says it].

    In a fork, since only the end of a process closes all of its connections.
    """
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        found = [0, "", False]
        if int(os.environ["RANK"]) in wrong:
            plant(fault)
        try:
            resolved = reading.read("text-tiny", settings)
            stop = asked_after(None, 0)
            training.train(resolved, Path(folder), device="cpu", resume="auto", report=quiet, stop=stop)
        except Exception as error:
            shown = signals.translated(error)
            own = shown is None or not signals._is_of_another(shown)
            found = [(shown.exit_code if shown else 1) if own else torchrun.LEFT, repr(shown or error), own]
        os.write(writes, json.dumps(found).encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as answer:
        found = json.load(answer)
    os.waitpid(child, 0)
    return found


def validate(settings, folders):
    """The validation loss of the first weights."""
    resolved = reading.read("text-tiny", settings)
    with parallel.joined("cpu", 60) as processes:
        trainer = Trainer(resolved, Path(folders[0]), "cpu", quiet)
        trainer.connect(processes)
        return trainer.validation_loss()


def arms(settings, folders, named):
    """Losses of two steps and a sum of the weights of each arm, (name, options), whole and divided."""
    found = {}
    with parallel.joined("cpu", 60) as processes:
        for name, options in named:
            section = [f"model.{name}.{key}={json.dumps(value)}" for key, value in options.items()]
            for shard, again in (("none", "false"), ("fsdp", "true")):
                way = [f"model.name={name}", f"train.shard={shard}", f"train.checkpoint_activations={again}"]
                resolved = reading.read("text-tiny", [*settings, *section, *way])
                shares = processes.count if shard == "fsdp" else 1
                trainer = Trainer(resolved, Path(folders[0]), "cpu", quiet, shares=shares)
                trainer.connect(processes)
                losses = [trainer.step(number).item() for number in range(2)]
                parts = sum(sharded.local(weight).numel() for weight in trainer.model.parameters())
                assert (parts < 0.6 * trainer.model.count()["total"]) == (shard == "fsdp"), (name, parts)
                weights = whole(trainer.optimizer.weights())
                total = sum(weight.double().abs().sum().item() for weight in weights.values())
                found[f"{name} {json.dumps(options)} {shard}"] = [*losses, trainer.validation_loss(), total]
    return found


def narrow(settings, folders, named):
    """Losses of two steps in bf16 and the weights after them of each arm, as matrices travel in bf16 and in fp32.

    And how many matrices, of those that Muon is for, were sent in bf16.
    """
    found, sent, send = {}, [], sharded._Narrow.sent

    def wide(model):
        """Leave all in fp32."""

    def counted(self, mesh, size, _stride, _module, _policy):  # PyTorch counts them
        (part,), size = send(self, mesh, size, _stride, _module, _policy)
        assert part.dtype == torch.bfloat16
        sent.append(id(self))
        return (part,), size

    sharded._Narrow.sent, narrow = counted, sharded.narrow
    with parallel.joined("cpu", 60) as processes:
        for name, options in named:
            section = [f"model.{name}.{key}={json.dumps(value)}" for key, value in options.items()]
            asked = [*settings, *section, f"model.name={name}", "train.shard=fsdp", "train.precision=bf16"]
            resolved, ways = reading.read("text-tiny", asked), []
            for way in (narrow, wide):
                sharded.narrow = way
                trainer = Trainer(resolved, Path(folders[0]), "cpu", quiet, shares=processes.count)
                trainer.connect(processes)
                losses = [trainer.step(number).item() for number in range(2)]
                weights = whole(trainer.optimizer.weights())
                bits = [f"{key} {weight.numpy().tobytes().hex()}" for key, weight in weights.items()]
                ways.append([*losses, trainer.validation_loss(), hashlib.sha256("".join(bits).encode()).hexdigest()])
                ways[-1].append(len(set(sent)) / len(trainer.model.matrices()))
                sent.clear()
            found[f"{name} {json.dumps(options)}"] = ways
    sharded._Narrow.sent, sharded.narrow = send, narrow
    return found


def first(settings, folders, named):
    """A hash of the first weights of each arm, divided if there are several processes."""
    found = {}
    with parallel.joined("cpu", 60) as processes:
        for name, options in named:
            section = [f"model.{name}.{key}={json.dumps(value)}" for key, value in options.items()]
            resolved = reading.read("text-tiny", [*settings, *section, f"model.name={name}", "train.shard=fsdp"])
            trainer = Trainer(resolved, Path(folders[0]), "cpu", quiet, shares=processes.count)
            trainer.connect(processes)
            weights = whole(trainer.model.state_dict())
            parts = [f"{key} {weight.numpy().tobytes().hex()}" for key, weight in weights.items()]
            found[f"{name} {json.dumps(options)}"] = hashlib.sha256("".join(parts).encode()).hexdigest()
    return found


def most(settings, folders):
    """Bytes of all weights, of a layer's, of those outside of layers, and the most that tensors had at once."""
    resolved, peak = reading.read("text-tiny", [*settings, "train.shard=fsdp"]), 0

    def held():
        tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
        storages = [each.untyped_storage() for each in tensors if not each.is_meta]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    with parallel.joined("cpu", 60) as processes:
        trainer = Trainer(resolved, Path(folders[0]), "cpu", quiet, shares=processes.count)
        before = held()

        def start(name, weight):
            nonlocal peak
            trainer.model.draw(name, weight, 1)
            if name.endswith("feed_forward.out.weight"):  # a layer's last
                peak = max(peak, held() - before)

        sharded.divide(trainer.model, "cpu", processes.group, 60, start)
        whole = 4 * trainer.model.count()["total"]
        layer = 4 * sum(weight.numel() for weight in trainer.model.blocks[0].parameters())
    return whole, layer, whole - layer * len(trainer.model.blocks), peak


JOBS = SimpleNamespace(train=train, validate=validate, arms=arms, narrow=narrow, first=first, most=most, fail=fail)


def work(jobs, answers):
    """Do the jobs that come through a pipe; answer through another."""
    torch.set_num_threads(1)
    with os.fdopen(jobs) as lines, os.fdopen(answers, "w") as out:
        for line in lines:
            job = json.loads(line)
            os.environ.update(job["environment"])
            out.write(json.dumps(getattr(JOBS, job["name"])(**job["arguments"])) + "\n")
            out.flush()


def main():
    """Descriptors, two for each process: that of its jobs, and that of its answers."""
    importlib.import_module("torch._dynamo")  # as DDP would, in every process
    gc.freeze()
    ends = [int(text) for text in sys.argv[1:]]
    children = []
    for jobs, answers in zip(ends[::2], ends[1::2], strict=True):
        child = os.fork()
        if not child:
            for end in set(ends) - {jobs, answers}:
                os.close(end)
            work(jobs, answers)
            os._exit(0)  # see warm.py
        children.append(child)
    for end in ends:
        os.close(end)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))


if __name__ == "__main__":
    main()
