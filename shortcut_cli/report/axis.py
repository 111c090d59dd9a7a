"""Axes of pictures: a range of values with its unit, and round values for its ticks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

GREATEST = 1e100  # value that is drawn: nothing that is measured is larger, and sums of these are finite


@dataclass(frozen=True)
class Axis:
    """Values `low` .. `high` along a line. label: with the unit."""

    label: str
    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies: 0 at `low`, 1 at `high`."""
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return (at - low) / (high - low) if high > low else 0.5

    def ticks(self, most: int = 6) -> list[float]:
        """Round values between the ends."""
        if self.log and self.high / self.low >= 10:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            if len(powers) < 3:
                fine = [m * 10.0**power for power in range(powers[0] - 1, powers[-1] + 1) for m in (1, 2, 5)]
                return [tick for tick in fine if self.low <= tick <= self.high]
            every = max(1, math.ceil(len(powers) / most))
            return [10.0**power for power in powers][::every]
        return round_values(self.low, self.high, most)


def round_values(low: float, high: float, most: int) -> list[float]:
    """At most `most` multiples of 1, 2 or 5 times a power of ten, from `low` to `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def around(label: str, values: Sequence[float], *, log: bool = False) -> Axis:
    """An axis that holds all values that can be drawn, with some room."""
    known = [value for value in values if abs(value) <= GREATEST and (value > 0 or not log)] or [1.0]
    low, high = min(known), max(known)
    if log:
        return Axis(label, low / 1.05, high * 1.05, log=True)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return Axis(label, low - room, high + room)
