"""How long a comparison goes on: each run starts, trains and is scored, and each of these takes as long as its work.

The work of training and scoring is their FLOPs. How many seconds a FLOP takes differs between architectures, and is
not known before they ran. So an arm is expected to be as fast as all have been so far, and during its first run ever
more as fast as it is itself: the time left does not jump when another arm begins.
"""

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

START, TRAIN, SCORE = PHASES = ("start", "train", "score")


@dataclass
class Spent:
    """Work that was done, and the seconds that it took."""

    work: float = 0.0
    seconds: float = 0.0

    def add(self, work: float, seconds: float) -> None:
        """More of both."""
        self.work += work
        self.seconds += seconds


@dataclass(frozen=True)
class Load:
    """The work of a run in each phase, and the arm that it is of."""

    arm: str
    work: dict[str, float]


@dataclass
class _Going:
    """A run that goes on: when its phase was last looked at, and the share of it that was done then."""

    load: Load
    at: float
    phase: str = START
    share: float = 0.0
    known: bool = True  # whether `share` was looked at; a run that resumes begins somewhere


@dataclass
class Pace:
    """What runs have taken, by phase and arm."""

    all: dict[str, Spent] = field(default_factory=lambda: defaultdict(Spent))
    arms: dict[tuple[str, str], Spent] = field(default_factory=lambda: defaultdict(Spent))
    going: dict[str, _Going] = field(default_factory=dict)

    def begin(self, run: str, load: Load) -> None:
        """A run begins."""
        self.going[run] = _Going(load, time.monotonic())

    def move(self, run: str, phase: str, share: float) -> None:
        """A run has done this share of a phase; all phases before it are over."""
        one, now = self.going[run], time.monotonic()
        if phase != one.phase:
            self._spent(one, 1.0, now)  # the rest of the phase before, up to now
            one.phase, one.share, one.known = phase, share, False
        if one.known:
            self._spent(one, share, now)
        one.share, one.at, one.known = max(share, one.share), now, True

    def end(self, run: str) -> None:
        """A run is over."""
        one = self.going.pop(run)
        self._spent(one, 1.0, time.monotonic())

    def _spent(self, one: _Going, share: float, now: float) -> None:
        work = max(share - one.share, 0.0) * one.load.work[one.phase]
        for spent in (self.all[one.phase], self.arms[one.phase, one.load.arm]):
            spent.add(work, now - one.at)

    def left(self, later: Iterable[Load], width: int) -> float | None:
        """Seconds until these runs and those that go on are over, `width` at a time; None: not known yet."""
        if not self.all[TRAIN].work:
            return None
        waiting = [sum(self._seconds(load, phase) for phase in PHASES) for load in later]
        going = [self._rest(one) for one in self.going.values()]
        return max((sum(waiting) + sum(going)) / max(1, width), *going, *waiting, 0.0)

    def _rest(self, one: _Going) -> float:
        """Seconds that a run goes on."""
        first = PHASES.index(one.phase)
        found = self._seconds(one.load, one.phase) * (1 - one.share)
        since = time.monotonic() - one.at  # of which nothing has been told yet
        return max(0.0, found - since) + sum(self._seconds(one.load, phase) for phase in PHASES[first + 1 :])

    def _seconds(self, load: Load, phase: str) -> float:
        """Seconds that a phase takes."""
        return load.work[phase] * self._rate(load, phase)

    def _rate(self, load: Load, phase: str) -> float:
        """Seconds per work of a phase."""
        found = self._rate(load, TRAIN) if phase == SCORE else None  # as long as nothing was scored, a FLOP is a FLOP
        for spent in (self.all[phase], self.arms[phase, load.arm]):
            if spent.work:
                belief = 1.0 if found is None else min(1.0, spent.work / load.work[phase])
                found = belief * spent.seconds / spent.work + (1 - belief) * (found or 0.0)
        return found or 0.0
