"""The events that a stage reports while it works. The command line shows them; other programs may collect them."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Whole:
    """How far a command with several parts is."""

    share: float  # that is done
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
    whole: Whole | None = None  # of a command with several parts


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
    """A part of a command that has several begins."""

    task: str  # what the parts are of
    number: int  # from 1
    total: int
    text: str
    whole: Whole
    beside: bool = False  # whether those before it may go on beside it


@dataclass(frozen=True)
class Sampled:
    """The next part of a text that is being sampled, which is a result."""

    text: str


Event = Progress | Validation | Note | Part | Sampled
Report = Callable[[Event], None]
