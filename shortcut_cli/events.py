"""The events that a stage reports while it works. The command line shows them; other programs may collect them."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Whole:
    """How far a command is whose parts are weighed."""

    share: float  # of all its work that is done
    over: int  # parts that are over
    left_s: float | None  # seconds that it goes on, as far as it can be told


@dataclass(frozen=True)
class Progress:
    """How much of a task is done."""

    task: str
    done: int
    total: int
    unit: str
    loss: float | None = None  # in training: mean over the last steps
    loss_unit: str = ""
    epochs: float = 0.0  # in training: how often the data were seen so far
    tokens: int = 0  # in training: tokens seen so far
    seconds: float = 0.0  # in training: time spent so far
    whole: Whole | None = None  # of a command whose parts are weighed


@dataclass(frozen=True)
class Validation:
    """The result of a validation."""

    step: int
    loss: float
    best: float  # lowest loss so far, including this one
    text: str = ""  # shown instead of the loss


@dataclass(frozen=True)
class Note:
    """A line for the user."""

    text: str


@dataclass(frozen=True)
class Part:
    """A part of a command that has several begins; those before it are done, unless the parts are weighed."""

    task: str  # what the parts are of
    number: int  # from 1
    total: int
    text: str
    whole: Whole | None = None  # None: the parts are not weighed


@dataclass
class Parts:
    """Reports the parts of a command, one after the other."""

    task: str
    total: int
    report: "Report"
    begun: int = 0

    def begin(self, text: str) -> None:
        """The next part begins."""
        self.begun += 1
        self.report(Part(self.task, self.begun, self.total, text))


@dataclass(frozen=True)
class Sampled:
    """The next part of a text that is being sampled, which is a result."""

    text: str


Event = Progress | Validation | Note | Part | Sampled
Report = Callable[[Event], None]
