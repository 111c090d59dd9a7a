"""The time left of a comparison, against a simulated one whose runs take known times."""

import itertools
import math

import pytest

from shortcut_cli.compare import pace
from shortcut_cli.compare.pace import SCORE, START, TRAIN, Load, Pace

LOOKS = 200  # at the training of a run, and as many at its scoring: several a second, as on a screen
SECONDS = {  # what a run of each arm takes to start, to train and to be scored; their FLOPs differ less
    "gpt": (3.0, 20.0, 5.0),
    "shortcut": (4.0, 50.0, 15.0),
    "mudd": (5.0, 130.0, 40.0),
}
FLOPS = {"gpt": 100.0, "shortcut": 130.0, "mudd": 150.0}


def load(arm):
    return Load(arm, {START: 1.0, TRAIN: FLOPS[arm] * 1e9, SCORE: FLOPS[arm] * 2e8})


class Simulated:
    """Runs one after the other; `seen` has (arm, seconds left as told, seconds left as it is) at every look."""

    def __init__(self, monkeypatch, arms):
        self.now, self.seen, self.pace = 100.0, [], Pace()
        monkeypatch.setattr(pace.time, "monotonic", lambda: self.now)
        end = 100.0 + sum(sum(SECONDS[arm]) for arm in arms)
        for number, arm in enumerate(arms):
            name, later = f"{arm}-{number}", [load(other) for other in arms[number + 1 :]]
            start, train, score = SECONDS[arm]
            self.pace.begin(name, load(arm))
            self.look(arm, later, end)
            self.now += start
            for phase, seconds in ((TRAIN, train), (SCORE, score)):
                for look in range(LOOKS + 1):
                    self.now += seconds / LOOKS if look else 0.0
                    self.pace.move(name, phase, look / LOOKS)
                    self.look(arm, later, end)
            self.pace.end(name)

    def look(self, arm, later, end):
        self.seen.append((arm, self.pace.left(later, 1), end - self.now))


def test_nothing_is_told_before_anything_has_trained(monkeypatch):
    found = Simulated(monkeypatch, ["gpt", "gpt"])
    assert [one[1] for one in found.seen[:2]] == [None, None]
    assert found.seen[2][1] is not None


def test_runs_of_one_arm_take_what_the_first_took(monkeypatch):
    """From the second run on all three rates are known exactly."""
    found = Simulated(monkeypatch, ["mudd"] * 4)
    for _, told, true in found.seen[2 * LOOKS + 3 :]:
        assert told == pytest.approx(true, abs=1e-6)


@pytest.mark.parametrize("order", [*itertools.permutations(SECONDS)])
def test_the_time_left_does_not_jump_when_another_arm_begins(monkeypatch, order):
    """From look to look it changes by less than 3 % and the time between them; once every arm has run it is right.

    The arms differ by more than fourfold in their seconds per FLOP.
    """
    found = Simulated(monkeypatch, [*order] * 3)
    known = [one for one in found.seen if one[1] is not None]
    for (_, before, true), (_, after, later) in itertools.pairwise(known):
        assert abs(before - after) < 0.03 * before + true - later
    for _, told, true in found.seen[3 * (2 * LOOKS + 3) :]:
        assert told == pytest.approx(true, abs=1e-6)


def test_a_run_that_goes_on_from_a_saved_state_does_not_seem_to_have_been_fast(monkeypatch):
    now = 0.0
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    one = Pace()
    one.begin("a", load("gpt"))
    now = 3.0
    one.move("a", TRAIN, 0.5)  # of another command
    assert one.left([], 1) is None
    now = 5.0
    one.move("a", TRAIN, 0.6)
    assert one.left([], 1) == pytest.approx(0.4 * 20 + 20 * 0.2)  # 20 s a training; scoring is a fifth of its FLOPs
    now = 6.0
    assert one.left([], 1) == pytest.approx(0.4 * 20 - 1 + 20 * 0.2)


def test_runs_side_by_side_share_the_time_that_is_left(monkeypatch):
    now = 0.0
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    one = Pace()
    for name in "ab":
        one.begin(name, load("gpt"))
        one.move(name, TRAIN, 0.0)
    now = 10.0
    for name in "ab":
        one.move(name, TRAIN, 0.5)
    each = 10 + 20 * 0.2
    assert one.left([], 2) == pytest.approx(each)
    whole = 20 + 20 * 0.2
    assert one.left([load("gpt")] * 2, 2) == pytest.approx(each + whole)
    assert one.left([load("gpt")], 2) == pytest.approx(max(each + whole / 2, whole))
    assert math.isfinite(one.left([load("mudd")] * 99, 2))
