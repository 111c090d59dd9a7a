"""What must not outlive this process: temporary files, and processes that it has started.

A block that ends cleans up by itself. A signal ends the process in the middle of its blocks (cli/signals.py), after
`leave` has done what they would have done.
"""

import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

LOCK_S = 1.0  # longest wait for `steady` blocks: a rename can hang if a file server does
_actions: dict[object, Callable[[], object]] = {}
_steady = threading.RLock()
_last: list[Callable[[], object]] = []


@contextmanager
def due(action: Callable[[], object]) -> Iterator[None]:
    """`leave` calls `action` if it comes within this block."""
    key = object()
    _actions[key] = action
    try:
        yield
    finally:
        _actions.pop(key, None)


@contextmanager
def steady() -> Iterator[None]:
    """A short block that `leave` lets end. No such block begins after `leave`: whoever tries waits for ever."""
    with _steady:
        yield


def before_last(action: Callable[[], object]) -> None:
    """`last` calls `action`."""
    _last.append(action)


def last() -> None:
    """What a command does next puts its last files into place: no signal ends it any more.

    Else it would stop at these files when it is run again. Does not return if a signal is ending the process.
    """
    for action in _last:
        action()


def start(command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
    """Start a process that `leave` kills. options: those of `subprocess.Popen`."""
    with steady():
        process = subprocess.Popen(command, **options)  # noqa: S603
        _actions[process] = process.kill  # which does nothing if it has ended
    return process


def leave() -> None:
    """Clean up, the newest block first. What goes wrong with that does not matter, since the process ends next.

    From here on no file appears under its name and no process is started, so that what other threads still do, perhaps
    because their helpers are gone, leaves no trace.
    """
    _steady.acquire(timeout=LOCK_S)
    for action in reversed(list(_actions.values())):
        with suppress(Exception):
            action()
