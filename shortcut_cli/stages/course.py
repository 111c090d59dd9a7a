"""How far a command is that has several stages, one after the other, and how long it goes on.

Each stage has an amount of work, in a unit that all have in common. How long a unit takes is not known before anything
has run. So a stage is expected to be as fast as all have been so far, and ever more as fast as those of its own kind.
"""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from shortcut_cli.compare.pace import Spent
from shortcut_cli.events import Event, Part, Progress, Report, Whole

WORK = ("steps", "tokens")  # units of the progress of a model, which is that of the stage


@dataclass(frozen=True)
class Stage:
    """A stage that is to come. work: 0 if it can't be compared with that of the others."""

    kind: str
    work: float


@dataclass
class Course:
    """Reports the stages of a command, with how far the whole is.

    stages: in their order; they may be replaced as long as they have not begun. rate: seconds that a unit of work is
    expected to take before anything was measured; None: not known.
    """

    task: str
    stages: Sequence[Stage]
    report: Report
    rate: float | None = None
    all: Spent = field(default_factory=Spent)
    kinds: dict[str, Spent] = field(default_factory=lambda: defaultdict(Spent))
    begun: int = 0  # stages

    def __post_init__(self) -> None:
        self.began = self.at = time.monotonic()  # the command; when the present stage was last looked at
        self.share, self.worked = 0.0, False  # of the present stage

    def begin(self, text: str) -> None:
        """The next stage begins; the one before it is over."""
        if self.worked:
            self._spend(1.0)
        self.begun += 1
        self.at, self.share, self.worked = time.monotonic(), 0.0, False
        self.report(Part(self.task, self.begun, len(self.stages), text, self.whole()))

    def skip(self) -> None:
        """Nothing was done in the present stage, whatever it told: it says nothing about those to come."""
        self.worked = False

    def tell(self, event: Event) -> None:
        """Report an event of the present stage."""
        if isinstance(event, Progress):
            share = event.done / event.total if event.unit in WORK and event.total else 0.0
            if event.unit == "steps" and event.done > 1 and not self.worked:  # it goes on from a saved state
                self.share, self.at = share, time.monotonic()
            self.worked = True
            if event.unit in WORK:
                self._spend(share)
            event = replace(event, whole=self.whole())
        self.report(event)

    def whole(self) -> Whole:
        """How far all stages are: by the time that they take, as far as that is known."""
        left, spent = self.left(), time.monotonic() - self.began
        return Whole(0.0 if left is None else spent / max(spent + left, 1e-9), max(0, self.begun - 1), left)

    def left(self) -> float | None:
        """Seconds that the command goes on; None: not known yet."""
        if self.rate is None and not self.all.work:
            return None
        later = sum(self._seconds(stage) for stage in self.stages[self.begun :])
        if not self.begun:
            return later
        rest = (1 - self.share) * self._seconds(self.stages[self.begun - 1])
        return later + max(0.0, rest - (time.monotonic() - self.at))

    def _spend(self, share: float) -> None:
        """The present stage has done this share of its work by now."""
        stage, now = self.stages[self.begun - 1], time.monotonic()
        share = max(share, self.share)
        if stage.work:
            for spent in (self.all, self.kinds[stage.kind]):
                spent.add((share - self.share) * stage.work, now - self.at)
        self.share, self.at = share, now

    def _seconds(self, stage: Stage) -> float:
        rate = self.rate
        for spent in (self.all, self.kinds[stage.kind]):
            if spent.work and stage.work:
                belief = 1.0 if rate is None else min(1.0, spent.work / stage.work)
                rate = belief * spent.seconds / spent.work + (1 - belief) * (rate or 0.0)
        return stage.work * (rate or 0.0)
