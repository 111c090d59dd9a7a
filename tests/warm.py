"""Run commands in forks of a process that has imported PyTorch already.

A command finds what it would find in a process of its own, but the seconds of its imports are spent once. Reads jobs as
lines of JSON, one at a time, and answers each with its exit code.
"""

import gc
import importlib
import json
import os
import sys

# torch's optimisers import its compiler when the first of them is made.
SLOW = ("torch._dynamo", "shortcut_cli.cli", "shortcut_cli.pipeline")


def main():
    for name in SLOW:
        importlib.import_module(name)
    gc.freeze()  # forks leave what lies here untouched, and shared
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
            sys.modules["shortcut_cli.cli"].main()
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":  # the worker processes of a command import this file again
    main()
