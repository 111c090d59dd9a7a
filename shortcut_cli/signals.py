"""Signals as exceptions or requests: SIGINT leaves with 130, SIGTERM with 75."""

import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from shortcut_cli.errors import Interrupted

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}


class Signals:
    """From `install` on a signal raises Interrupted; within a `with` block, the first one waits to be asked for."""

    def __init__(self) -> None:
        self.patient = False
        self.code: int | None = None

    def install(self) -> None:
        """Handle SIGINT and SIGTERM in this process."""
        for number in EXIT_CODES:
            with suppress(ValueError):  # not in the main thread
                signal.signal(number, self._handle)

    def __enter__(self) -> Callable[[], int | None]:
        """Gives a function that returns the exit code that a signal asked for, or None."""
        self.patient = True
        return lambda: self.code

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """A signal that came too late to be asked for raises now."""
        self.patient = False
        if self.code is not None and kind is None:
            raise _interrupted(self.code)

    def _handle(self, number: int, _: FrameType | None) -> None:
        code = EXIT_CODES[signal.Signals(number)]
        if self.patient and self.code is None:
            self.code = code
            return
        raise _interrupted(code)


def _interrupted(code: int) -> Interrupted:
    return Interrupted("interrupted", "run the same command again to go on", exit_code=code)
