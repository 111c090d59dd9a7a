"""Signals as exceptions or requests: SIGINT leaves with 130, SIGTERM with 75."""

import signal
from contextlib import suppress
from types import FrameType

from shortcut_cli.errors import Interrupted

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}


class Signals:
    """From `install` on a signal raises Interrupted; while `patient`, the first one only sets `code`."""

    def __init__(self) -> None:
        self.patient = False
        self.code: int | None = None

    def install(self) -> None:
        """Handle SIGINT and SIGTERM in this process."""
        for number in EXIT_CODES:
            with suppress(ValueError):  # not in the main thread
                signal.signal(number, self._handle)

    def stop(self) -> int | None:
        """The exit code that a signal asked for, or None. From the first call on, signals wait for the next one."""
        self.patient = True
        return self.code

    def _handle(self, number: int, _: FrameType | None) -> None:
        code = EXIT_CODES[signal.Signals(number)]
        if self.patient and self.code is None:
            self.code = code
            return
        raise Interrupted("interrupted", "run the same command again to go on", exit_code=code)
