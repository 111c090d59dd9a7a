"""For tests/test_parts.py: a state that is saved anew by processes each of which is killed at a later operation.

Prints how many of them were killed, and, for each, the step that is left and whether it is whole.
"""

import json
import os
import shutil
import sys
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from test_checkpoint import small_run
from torch.distributed import HashStore

from shortcut_cli.training import checkpoint, parts, resharding, tensor_file
from shortcut_cli.training.parallel import Processes

KILLED = 9


def state(content, step):
    """A state whose numbers tell its step."""
    filled = {
        name: torch.full_like(weight, step + number / 100) for number, (name, weight) in enumerate(content.items())
    }
    moments = {"state": {0: {"step": torch.tensor(float(step)), "exp_avg": torch.full((6, 2), float(step))}}}
    return {"model": filled, "optimizer": moments, "average": None, "step": step}


def save(folder, content):
    """Save a state in this process, as one of one."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=HashStore())

    def commit(found):
        checkpoint.save(folder / "resume.pt", found, previous=folder / "resume.prev.pt")
        parts.sweep(folder, "resume.pt", "resume.prev.pt")

    processes = Processes(sharded=True, states=dist.group.WORLD)
    resharding.wait(resharding.save(folder, content, processes, commit), 0)
    dist.destroy_process_group()


def die_at(number):
    """End this process, as SIGKILL would, before the operation of that number that changes a file or a folder."""
    done = count()

    def dying(operation, every=1):
        calls = count()

        def called(*given, **named):
            if next(calls) % every == 0 and next(done) == number:
                os._exit(KILLED)
            return operation(*given, **named)

        return called

    for name in ("mkdir", "replace", "unlink", "rmdir", "fsync"):
        setattr(os, name, dying(getattr(os, name)))
    tensor_file._Stream.write = dying(tensor_file._Stream.write, every=40)


def forked(work, *given):
    """The exit code of `work` in a process of its own."""
    child = os.fork()
    if not child:
        try:
            work(*given)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(number, folder, content):
    """Save while this process is to be killed."""
    die_at(number)
    save(folder, content)


def main():
    """Begin with states 1 and 2, and save 3, killed at each operation in turn, until it is not."""
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    small = small_run(root / "run.pt")
    before, found = root / "before", []
    before.mkdir()
    for step in (1, 2):
        assert forked(save, before, small | state(small["model"], step)) == 0
    for number in count():
        folder = root / "run"
        shutil.copytree(before, folder)
        code = forked(killed_at, number, folder, small | state(small["model"], 3))
        assert code in (0, KILLED), code
        left = next(folder / name for name in ("resume.pt", "resume.prev.pt") if (folder / name).exists())
        kept = checkpoint.load(left)
        wanted = state(small["model"], kept["step"])
        whole = all(torch.equal(kept["model"][name], wanted["model"][name]) for name in wanted["model"])
        whole &= torch.equal(kept["optimizer"]["state"][0]["exp_avg"], wanted["optimizer"]["state"][0]["exp_avg"])
        parts.sweep(folder, "resume.pt", "resume.prev.pt")
        again = checkpoint.load(left)
        folders = sum(path.is_dir() for path in folder.iterdir())
        assert forked(save, folder, small | state(small["model"], 4)) == 0  # whatever is left there
        found.append([code, kept["step"], whole and again["step"] == kept["step"], folders])
        assert checkpoint.load(folder / "resume.pt")["step"] == 4
        shutil.rmtree(folder)
        if not code:
            break
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
