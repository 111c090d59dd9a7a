"""What can go wrong for a user, each kind with its exit code.

    ShortcutError           1    the work failed
      UsageError            2    a flag, a recipe or an input is wrong
      TooManyRejects        3    more files were rejected than --max-bad allows
      CheckFailed           4    a file is not what it says it is
      Unavailable           5    a dependency, weights or a device is missing
      Interrupted      75, 130   a signal came; the state is saved

`Rejected` is apart: it stops one input file, not the run.
"""


class ShortcutError(Exception):
    """An error that the user can act on: `message` says what and where, `hint` what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ShortcutError):
    """A flag, a recipe or an input is wrong."""

    exit_code = 2


class TooManyRejects(ShortcutError):
    """More input files were rejected than the user allowed."""

    exit_code = 3


class CheckFailed(ShortcutError):
    """A file is damaged, incomplete, or belongs to something else."""

    exit_code = 4


class Unavailable(ShortcutError):
    """A dependency, a file of weights or a device is missing."""

    exit_code = 5


class Interrupted(ShortcutError):
    """A signal came and the state was saved: 130 after Ctrl-C, 75 after SIGTERM."""

    def __init__(self, message: str, hint: str = "", *, exit_code: int = 75) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


class Rejected(Exception):
    """One input file can't be used; the text is the reason that is written to rejects.jsonl."""
