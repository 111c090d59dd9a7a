"""Run commands in forks of a process that has imported PyTorch already, so that tests pay for its imports once.

Reads jobs as lines of JSON, one at a time, and answers each with its exit code.
"""

import atexit
import gc
import importlib
import json
import os
import sys
import threading

SLOW = ("shortcut_cli.cli.commands", "shortcut_cli.stages.pipeline")


def end(command):
    """Run a command, and leave as an interpreter does, without its last step.

    That takes all modules apart, and would copy nearly all memory that this process shares with the first.
    """
    code = 1
    try:
        command()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:  # shown as an interpreter shows what nobody caught
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
            end(sys.modules["shortcut_cli.cli.commands"].main)
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":  # the worker processes of a command import this file again
    main()
