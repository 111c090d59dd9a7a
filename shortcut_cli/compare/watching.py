"""How a process that trains tells another one how far it is: in a file without a name that both have open.

A file never makes its writer wait, as a pipe does that nobody reads, and is gone with the processes.
"""

import json
import os
import time
from dataclasses import asdict

from shortcut_cli.events import Progress
from shortcut_cli.formatting import to_json

SIZE = 1024  # bytes of an event
EVERY_S = 0.1
FILE = "_SHORTCUT_TELL"  # the variable with the number of the file, for a process that is started as a command


class Teller:
    """Writes the newest event into a file, at most every EVERY_S: steps can take less than a millisecond."""

    def __init__(self, number: int) -> None:
        """number: of the open file."""
        self.number, self.told = number, 0.0

    def tell(self, event: Progress) -> None:
        """Take the place of the event before."""
        now = time.monotonic()
        if now - self.told >= EVERY_S or event.done >= event.total:
            self.told = now
            text = to_json(asdict(event)).encode()
            os.pwrite(self.number, text.ljust(SIZE)[:SIZE], 0)


def inherited() -> Teller | None:
    """What the process that started this one asked for, if it did; nobody further down is asked."""
    number = os.environ.pop(FILE, "")
    return Teller(int(number)) if number.isdecimal() else None


def newest(number: int) -> Progress | None:
    """The newest event in a file; None if there is none, or it is just being written: this is only for display."""
    try:
        return Progress(**json.loads(os.pread(number, SIZE, 0)))
    except (ValueError, TypeError):
        return None
