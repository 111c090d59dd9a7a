"""The time left of a command with several stages, against a simulated one whose stages take known times."""

from pathlib import Path

import pytest

from shortcut_cli.config import reading
from shortcut_cli.events import Note, Part, Progress
from shortcut_cli.stages import course, demo, pipeline
from shortcut_cli.stages.course import Course, Stage

KINDS = ("prepare", "train", "sample")
LOOKS = 50
UNITS = {"prepare": "files", "train": "steps", "sample": "tokens"}


class Simulated:
    """Runs the stages of a command, each in a known time; `seen` has (stage, left as told, as it is, share)."""

    def __init__(self, monkeypatch, works, seconds, *, rate=None, skipped=0, resumed=0.0):
        """skipped: stages that were done before. resumed: share of the next one that was."""
        self.now, self.seen, self.number = 50.0, [], 0
        monkeypatch.setattr(course.time, "monotonic", lambda: self.now)
        stages = [Stage(KINDS[n % 3], work) for n, work in enumerate(works)]
        one = Course("c", stages, self.look, rate)
        seconds = [0.01] * skipped + seconds[skipped:]
        seconds[skipped] *= 1 - resumed
        self.end = 50.0 + sum(seconds)
        for self.number, (stage, takes) in enumerate(zip(stages, seconds, strict=True)):
            one.begin(f"stage {self.number}")
            first = resumed if self.number == skipped else 0.0
            if self.number < skipped:
                self.now += takes
                if stage.kind == "prepare":  # it looks at its files
                    one.tell(Progress("read", 1, 2, "files"))
                    one.skip()
                continue
            for done in range(1, LOOKS + 1):
                self.now += takes / LOOKS
                total = round(LOOKS / (1 - first))
                one.tell(Progress("t", total - LOOKS + done, total, UNITS[stage.kind]))
            one.tell(Note("it is over"))

    def look(self, event):
        if not isinstance(event, Note):
            whole = event.whole
            assert whole.over == self.number
            self.seen.append((self.number, whole.left_s, self.end - self.now, whole.share))


WORKS = [4.0, 20.0, 6.0, 9.0, 30.0, 8.0]


@pytest.mark.parametrize("factor", [1.0, 0.3, 5.0])
def test_stages_in_the_expected_proportions_are_told_exactly_once_one_has_run(monkeypatch, factor):
    found = Simulated(monkeypatch, WORKS, [factor * work for work in WORKS], rate=1.0)
    for number, told, true, share in found.seen:
        if factor == 1.0 or number >= 3:
            assert told == pytest.approx(true, abs=1e-6)
            assert share == pytest.approx(1 - true / (found.end - 50.0))
    assert found.seen[0][1] == sum(WORKS)  # before anything was measured


def test_each_kind_has_its_own_pace_once_it_has_run(monkeypatch):
    """Samples take four times as long as their work says, and files a third."""
    works = WORKS[:3] * 2
    seconds = [work * (1 / 3, 1.0, 4.0)[number % 3] for number, work in enumerate(works)]
    found = Simulated(monkeypatch, works, seconds, rate=1.0)
    for number, told, true, _ in found.seen:
        if number >= 3:
            assert told == pytest.approx(true, abs=1e-6)


def test_nothing_is_told_as_long_as_no_stage_was_measured(monkeypatch):
    works = [0.0, 100.0, 30.0]
    found = Simulated(monkeypatch, works, [500.0, 50.0, 15.0])
    told = [left for number, left, *_ in found.seen if number == 0]
    assert set(told) == {None}
    assert {share for number, *_, share in found.seen if number == 0} == {0.0}
    assert found.seen[LOOKS + 1][1] is None  # the training begins
    for number, left, true, share in found.seen[LOOKS + 2 :]:
        assert left == pytest.approx(true, abs=1e-6), number
        assert share == pytest.approx(1 - true / 565)


@pytest.mark.parametrize(("skipped", "resumed"), [(1, 0.0), (4, 0.0), (1, 0.5), (4, 0.8)])
def test_what_was_done_before_does_not_make_the_rest_seem_short(monkeypatch, skipped, resumed):
    found = Simulated(monkeypatch, WORKS, [*WORKS], rate=1.0, skipped=skipped, resumed=resumed)
    for number, told, true, _ in found.seen:
        if number > skipped or (number == skipped and told is not None and told < true + 1):
            assert told == pytest.approx(true, rel=0.02, abs=0.02)
    assert sum(number == skipped and told == pytest.approx(true, abs=0.5) for number, told, true, _ in found.seen) >= 49


def test_the_time_left_runs_down_while_a_stage_tells_nothing(monkeypatch):
    now, seen = 0.0, []
    monkeypatch.setattr(course.time, "monotonic", lambda: now)
    one = Course("c", [Stage("prepare", 10.0), Stage("page", 5.0)], seen.append, rate=1.0)
    one.begin("prepare")
    now = 4.0
    assert one.left() == 11
    now = 60.0
    assert one.left() == 5  # it takes longer than it should
    one.tell(Note("x"))
    assert [type(event) for event in seen] == [Part, Note]


def test_the_stages_of_the_demo_begin_in_the_order_of_their_seconds(monkeypatch, tmp_path):
    said = []

    def train_score_sample(config, folder, *, begin, **options):
        for name in ("train", "evaluate", "sample"):  # as in `pipeline`, where a test has their order
            begin(name)
        return {"train": {"parameters": {"total": 1}}, "eval": {}, "samples": []}

    monkeypatch.setattr(demo, "train_score_sample", train_score_sample)
    monkeypatch.setattr(demo, "_once", lambda folder, *_: folder)
    monkeypatch.setattr(demo, "prepare", lambda *_, **_options: {"worked": True})
    demo.demo(tmp_path, n_workers=1, device="cpu", report=said.append, stop=None, page=True)
    parts = [event for event in said if isinstance(event, Part)]
    assert [part.number for part in parts] == [*range(1, 23)]
    for part, kind in zip(parts, [*demo.KINDS * 3, "page"], strict=True):
        assert part.text.endswith(kind)
        assert part.total == 22
    assert [part.text.partition(":")[0] for part in parts[:-1:7]] == [*demo.SECONDS]
    assert parts[0].whole.left_s == pytest.approx(sum(map(sum, demo.SECONDS.values())) + demo.PAGE_S, abs=1)


def test_the_work_of_a_run_is_counted_in_training_steps():
    recipe = reading.read("text-tiny", ["train.steps=900", "train.batch_size=8", "eval.stride=32", "sample.tokens=50"])
    found = pipeline._stages(recipe, 64_000, page=True)
    assert [one.kind for one in found] == ["prepare", "train", "evaluate", "sample", "page"]
    windows = 64_000 / 32
    assert found[1].work == 900
    assert found[2].work == pytest.approx(windows / 8 / 3)  # a step is eight windows, forward and twice as much back
    assert found[3].work == pytest.approx(50 * pipeline.SAMPLED)
    assert [found[0].work, found[4].work] == [0, 0]
    assert len(pipeline._stages(recipe, 1, page=False)) == 4


def test_a_run_tells_how_far_all_of_it_is(monkeypatch, tmp_path):
    """The stages are those of the recipe once it is known how much is scored, and each event of a stage tells it."""
    said, recipe = [], reading.read("text-tiny", ["data.shards=s"])

    def prepare(*_, report, **options):
        report(Progress("read", 1, 2, "files"))
        return {"worked": True, "splits": {"test": {"tokens": 640}}}

    def train_score_sample(recipe, folder, *, report, begin, **options):
        for name, unit in (("train", "steps"), ("evaluate", "tokens"), ("sample", "tokens")):
            begin(name)
            report(Progress(name, 1, 2, unit))
        return {}

    monkeypatch.setattr(pipeline, "prepare", prepare)
    monkeypatch.setattr(pipeline, "train_score_sample", train_score_sample)
    monkeypatch.chdir(tmp_path)
    pipeline.run_all(
        recipe, [], Path("r"), n_workers=1, max_bad="0", device="cpu", report=said.append, stop=None, page=True
    )
    shown = [
        (type(event), event.whole.over, event.whole.left_s is None) for event in said if not isinstance(event, Note)
    ]
    assert shown[:3] == [(Part, 0, True), (Progress, 0, True), (Part, 1, True)]
    assert shown[3:] == [(kind, over + (kind is Part), False) for over in (1, 2, 3) for kind in (Progress, Part)]
