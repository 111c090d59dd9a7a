"""The errors a user can meet, each kind with its exit code.

    ShortcutError           1    the command failed
      Diverged              1    a loss is not finite
      UsageError            2    a flag, a recipe or an input is wrong
      TooManyRejects        3    more files were rejected than --max-bad allows
      Unfinished            3    files could not be read because of the machine; the same command tries them again
      Missing               3    what others were to do is not done yet
      CheckFailed           4    a check failed: a file is damaged or belongs to something else
      Unavailable           5    a dependency, weights or a device is missing
      Interrupted      75, 130   stopped by a signal; the state is saved
      ReaderLeft            141  whoever read stdout has left; not shown

`Rejected` is separate: it concerns one input file and does not stop the command.
"""

import errno
from collections.abc import Iterable


class ShortcutError(Exception):
    """An error that the user can act on: `message` says what went wrong and where, `hint` in words what helps.

    then: a whole command that helps, to be pasted; its "PATH..." stands for what only the user knows. `title` is that
    of the panel that shows it.
    """

    exit_code = 1
    title = "Error"

    def __init__(self, message: str, hint: str = "", *, then: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.then = then


class UsageError(ShortcutError):
    """A flag, a recipe or an input is wrong."""

    exit_code = 2


class Diverged(ShortcutError):
    """The loss of a training, or its gradient, is not finite."""


class TooManyRejects(ShortcutError):
    """More input files were rejected than the user allowed."""

    exit_code = 3


class Unfinished(ShortcutError):
    """Files could not be read for a reason that may pass: killed, time, memory, an error of the disk.

    files: how many; first: some of them with their reasons, a line each.
    """

    exit_code = 3
    again = (
        "the same command tries them again; larger data.file_timeout_s and data.file_memory_mb give them more time and "
        "memory, fewer --workers more memory each"
    )

    def __init__(self, files: int, first: Iterable[str]) -> None:
        shown = "".join(f"\n  {line}" for line in first)
        super().__init__(f"{files:,} files could not be read because of the machine{shown}", self.again)


class Missing(ShortcutError):
    """What other processes were to do, and is to be put together, is not done yet."""

    exit_code = 3


class CheckFailed(ShortcutError):
    """A check failed: a file is damaged, incomplete, not valid, or belongs to something else."""

    exit_code = 4


class Unavailable(ShortcutError):
    """A dependency, weights or a device is missing."""

    exit_code = 5


class Interrupted(ShortcutError):
    """Stopped by a signal, after the state was saved: 130 for Ctrl-C, 75 for SIGTERM."""

    title = "Interrupted"

    def __init__(self, message: str, hint: str = "", *, exit_code: int = 75) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


class ReaderLeft(ShortcutError):
    """Whoever read stdout has closed it, as `head` does: the command ends without a word.

    The exit code is what a shell says of a program that ends by SIGPIPE.
    """

    exit_code = 141


class Rejected(Exception):
    """One input file can't be used; the text is the reason, which goes into rejects.jsonl.

    passing: the reason lies with the machine, or with this moment, so that the file is worth another try.
    """

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


# Errors of the system that say nothing about the file that was read.
PASSING_ERRORS = {
    *(errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN),
    *(errno.EBUSY, errno.ENOLCK, errno.ETIMEDOUT, errno.ENXIO, errno.ENODEV, errno.ECONNRESET, errno.ECONNABORTED),
    *(errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.EINTR),
    *(errno.ENOENT, errno.ENOTDIR),  # it was there when it was found
}


SHOWN = 300  # characters of an error of Python


def in_short(error: Exception) -> str:
    """An error of Python that the content of a file has led to, for a message: without that content, if it holds it."""
    return (str(error) if isinstance(error, UnicodeError) else repr(error))[:SHOWN]


def unreadable(error: OSError) -> Rejected:
    """That a file can't be read, and whether the error may pass."""
    return Rejected(f"can't be read: {error.strerror or error}", passing=error.errno in PASSING_ERRORS)
