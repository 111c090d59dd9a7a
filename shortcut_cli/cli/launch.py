"""`train --devices N`: the same command in N processes on this machine, with the environment that torchrun would set.

A process that ends with an error that a user can act on has ended for good, and so have the others. If one is killed,
or does not answer the others, all are killed and started again, up to --max-restarts times: they go on from the state
that was saved last. It is not torchrun's own agent that starts them. That sends SIGTERM to the rest and waits for them
to end, while they wait for the process that is gone; and it starts all again after a Ctrl-C, and after an error that a
user can act on.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from shortcut_cli import cleanup
from shortcut_cli.cli import console
from shortcut_cli.cli.signals import INTERRUPTED, signals
from shortcut_cli.errors import Interrupted, ShortcutError
from shortcut_cli.training import torchrun

POLL_S = 0.05
GRACE_S = 30.0  # that the others get to end, after one has ended for good
PASSED_ON = {130: signal.SIGINT, 75: signal.SIGTERM}
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
HINT = "run the same command again to resume"


def processes(arguments: Sequence[str], count: int, max_restarts: int) -> int:
    """Run `shortcut` with these arguments in `count` processes; returns their exit code.

    A signal to this process is passed on to all of them.

    Raises ShortcutError if they fail more often than they may be restarted, Interrupted if one failed after a signal.
    """
    store = None
    with signals as asked:
        for attempt in range(max_restarts + 1):
            store = _store(store)
            codes = _attempt(arguments, _environment(count, store.port, attempt, max_restarts), asked)
            verdict = _final(codes)
            code, signals.code = asked(), None  # the processes have answered to it
            if verdict is not None:
                return verdict
            if code:
                raise Interrupted(*INTERRUPTED, exit_code=code)
            failed = _told(codes)
            if attempt < max_restarts:
                console.note(f"{failed}; all start again from the last state ({attempt + 1} of {max_restarts})")
    raise ShortcutError(f"{failed}" + f", after {max_restarts} restarts" * bool(max_restarts), HINT)


def _store(before: Any) -> Any:
    """A store through which processes find each other, and a word from the one before it.

    It is another one for each attempt, as PyTorch expects: it has the addresses of those that are gone.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    if before and before.check([torchrun.BEGUN]):
        store.set(torchrun.BEGUN, "")
    return store


def _environment(count: int, port: int, attempt: int, max_restarts: int) -> dict[str, str]:
    """What torchrun would say to each process, but for its rank."""
    environment = dict(os.environ)
    environment.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    return environment | {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        "TORCHELASTIC_MAX_RESTARTS": str(max_restarts),
    }


Workers = list["subprocess.Popen[Any]"]


@contextmanager
def _started(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[Workers]:
    """The processes, by rank. After the block none of them is left, whatever it is doing.

    Each is in a group of its own, so that a Ctrl-C reaches it once, through `_attempt`.
    """
    workers: Workers = []
    try:
        for rank in range(int(environment["WORLD_SIZE"])):
            command = [sys.executable, "-m", "shortcut_cli", *arguments]
            its = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(cleanup.start(command, env=its, process_group=0))
        yield workers
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait()


def _attempt(arguments: Sequence[str], environment: Mapping[str, str], asked: Any) -> list[int | None]:
    """Run all processes until they have ended, or until the rest of them is of no use; returns exit codes by rank.

    None: it had to be killed.
    """
    passed, until = False, None
    with _started(arguments, environment) as workers:
        while True:
            codes = [worker.poll() for worker in workers]
            if None not in codes or any(code is not None and code < 0 for code in codes):
                return codes
            if any(codes) and until is None:
                until = time.monotonic() + GRACE_S
            if until is not None and time.monotonic() > until:
                return codes
            code = asked() or next((code for code in codes if code in PASSED_ON), None)
            if code is not None and not passed:
                passed = True
                _pass_on(workers, PASSED_ON[code])
            time.sleep(POLL_S)


def _pass_on(workers: Workers, number: signal.Signals) -> None:
    for worker in workers:
        with suppress(ProcessLookupError):
            worker.send_signal(number)


def _final(codes: list[int | None]) -> int | None:
    """The exit code of processes that have ended for good; None if they are to be started again."""
    if any(code is not None and code < 0 for code in codes):  # whatever the others say then
        return None
    own = [code for code in codes if code and code not in (torchrun.LOST, torchrun.LEFT)]
    if own:
        return own[0]
    return 0 if codes[0] == 0 else None  # the first one ends last: it has written all files


def _told(codes: list[int | None]) -> str:
    """Which processes were killed; else that one does not answer, as the others say."""
    count = len(codes)
    killed = {rank: signal.Signals(-code).name for rank, code in enumerate(codes) if code is not None and code < 0}
    if killed:
        return " and ".join(f"process {rank} of {count} was killed by {name}" for rank, name in killed.items())
    late = [str(rank) for rank, code in enumerate(codes) if code is None]
    return (
        f"process {', '.join(late)} of {count} did not answer" if late else "the connection was lost between processes"
    )
