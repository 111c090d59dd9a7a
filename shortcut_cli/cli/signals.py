"""How a command ends: signals as exceptions or requests, and errors as one panel and an exit code.

SIGINT exits with 130, SIGTERM with 75; errors.py lists the other codes.
"""

import errno
import gc
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

from shortcut_cli.cli import console
from shortcut_cli.errors import Interrupted, ShortcutError

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 75}
SYSTEM_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}


class Signals:
    """Once installed, a signal raises Interrupted; within a `with` block, the first one is only noted."""

    def __init__(self) -> None:
        self.patient = False
        self.code: int | None = None

    def install(self) -> None:
        """Handle SIGINT and SIGTERM in this process."""
        for number in EXIT_CODES:
            with suppress(ValueError):  # not in the main thread
                signal.signal(number, self._handle)

    def __enter__(self) -> Callable[[], int | None]:
        """Returns a function that gives the exit code that a signal asked for, or None."""
        self.patient = True
        return lambda: self.code

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Raises now if a signal came after the block last asked."""
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
    return Interrupted("interrupted", "run the same command again to resume", exit_code=code)


signals = Signals()  # of this process


def guarded(command: Callable[[], Any]) -> NoReturn:
    """Run a command, then exit: a ShortcutError is one panel and its exit code; a bug keeps its traceback."""
    console.harden()
    signals.install()
    try:
        sys.exit(command())
    except ShortcutError as error:
        console.panel(error)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in SYSTEM_ERRORS:
            raise
        where = f": {error.filename}" if error.filename else ""
        console.panel(ShortcutError(f"{error.strerror}{where}", "files that were complete before are unchanged"))
        sys.exit(ShortcutError.exit_code)
    finally:
        # Without this the interpreter would search torch's many objects for reference cycles on its way out.
        gc.freeze()
