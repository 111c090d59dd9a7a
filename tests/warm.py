"""Run commands in forks of a process that has imported PyTorch already, so that tests pay for its imports once.

Reads jobs as lines of JSON, one at a time, and answers each with its exit code.
"""

import gc
import importlib
import json
import os
import sys

# torch's optimizers import its compiler when the first one is created.
SLOW = ("torch._dynamo", "shortcut_cli.cli.commands", "shortcut_cli.stages.pipeline")


def main():
    for name in SLOW:
        importlib.import_module(name)
    gc.freeze()  # so that garbage collection in a fork copies none of the shared memory
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            os.chdir(job["cwd"])
            os.environ.clear()
            os.environ.update(job["environment"])
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for descriptor, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(job[name], os.O_WRONLY), descriptor)
            sys.argv = ["shortcut", *job["arguments"]]
            sys.modules["shortcut_cli.cli.commands"].main()
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":  # the worker processes of a command import this file again
    main()
