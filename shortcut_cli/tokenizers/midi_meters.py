"""Time signatures that tokens can spell, so that every barline of a file stays where it is.

MidiTok lets a time signature begin on a barline only, and knows a fixed list of them. What is not so in a file is made
so here: a bar that a new time signature cuts short becomes a bar of its own, in a shorter meter.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

METER = re.compile(r"(?:(\d{1,2})-)?(\d{1,2})/(1|2|4|8|16|32)")
PARTS = 8  # of a tick, so that a bar of thirty-second notes has a whole number of them

Meter = tuple[int, int]  # beats to a bar, and the note value of a beat
Change = tuple[int, int, int]  # time, then a meter


def known_meters(meters: list[str]) -> dict[int, list[int]]:
    """Denominator -> numerators of time signatures in the form of a recipe; ValueError if one is not in that form."""
    found: dict[int, set[int]] = {}
    for meter in meters:
        match = METER.fullmatch(meter)
        first, last, denominator = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
        if not 1 <= (first or last) <= last <= 64:
            raise ValueError(f"{meter!r} is not like 6/8 or 1-12/4, with up to 64 beats of a 1st, 2nd, 4th .. 32nd")
        found.setdefault(denominator, set()).update(range(first or last, last + 1))
    return {denominator: sorted(numerators) for denominator, numerators in sorted(found.items())}


class Meters:
    """The changes of meter of one piece, as they are spelled; what is not as in the file is counted in `account`."""

    def __init__(self, known: Sequence[Meter], tpq: int, resolution: int, account: defaultdict[str, float]) -> None:
        self.known = known
        self.whole = 4 * tpq * PARTS  # length of a whole note
        self.resolution = resolution
        self.account = account
        self.changes: list[Change] = [(0, 4, 4)]  # times in parts of a tick

    def spell(self, written: Iterable[Change], end: int) -> list[Change]:
        """The changes to spell up to the tick `end`, for those in a file, times in ticks and in order."""
        for tick, *meter in written:
            equal = self._known(meter[0], meter[1])
            if equal is None:
                self.account["time_signatures_dropped"] += 1
                continue
            self.account["time_signatures_replaced"] += equal != tuple(meter)
            self._change(tick * PARTS, equal)
        late = sum(time >= end * PARTS > 0 for time, *_ in self.changes)
        self.account["time_signatures_dropped"] += late
        kept = self.changes[: len(self.changes) - late]
        # MidiTok moves a time that is between two ticks to the barline behind it.
        return [(time // PARTS, numerator, denominator) for time, numerator, denominator in kept]

    def _known(self, numerator: int, denominator: int) -> Meter | None:
        """The meter itself if it is known, else one with bars of equal length; None if there is none."""
        if (numerator, denominator) in self.known:
            return numerator, denominator
        equal = [(n, d) for n, d in self.known if numerator and n * denominator == numerator * d]
        return max(equal, key=lambda one: one[1], default=None)

    def _change(self, time: int, meter: Meter) -> None:
        begin, *before = self.changes[-1]
        bar = self.whole * before[0] // before[1]
        rest = (time - begin) % bar if time > begin else 0
        if time < begin:  # the change before it came later than written
            self.account["time_signatures_moved"] += 1
            time = begin
        elif 2 * rest * before[1] * self.resolution <= self.whole:  # less than half a step behind the barline
            self.account["time_signatures_moved"] += rest > 0
            time -= rest
        elif (short := self._of_length(rest)) is not None:
            self.account["time_signatures_added"] += 1
            self._put(time - rest, short)
        else:
            self.account["time_signatures_moved"] += 1
            time += bar - rest
        self._put(time, meter)

    def _of_length(self, length: int) -> Meter | None:
        """The known meter whose bar has that length, if there is one: that most like the meter before."""
        fits = [(n, d) for n, d in self.known if self.whole * n == length * d]
        return min(fits, key=lambda one: abs(one[1] - self.changes[-1][2]), default=None)

    def _put(self, time: int, meter: Meter) -> None:
        """Append a change that takes the place of one at the same time."""
        while self.changes and self.changes[-1][0] >= time:
            self.changes.pop()
        if not self.changes or self.changes[-1][1:] != meter:
            self.changes.append((time, *meter))
