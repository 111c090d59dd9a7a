"""The demo: every domain end to end, on data that is generated offline."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from shortcut_cli import SCHEMA_VERSION, files
from shortcut_cli.config import reading
from shortcut_cli.demo import material
from shortcut_cli.events import Note, Report
from shortcut_cli.stages.course import Course, Stage
from shortcut_cli.stages.pipeline import train_score_sample
from shortcut_cli.stages.preparation import prepare
from shortcut_cli.training.loop import Stop

MODELS = ("gpt", "shortcut")
STAGES = ("train", "evaluate", "sample")  # of a model
FIRST, PAGE = "files and shards", "page"
# CPU seconds that each stage took on one core: the first, then those of each model, and the page. The stages of a demo
# are expected to be in these proportions.
SECONDS = {
    "text-tiny": (4.8, 16.9, 0.8, 0.8, 22.9, 1.1, 1.1),
    "music-tiny": (6.8, 17.0, 0.5, 0.8, 23.1, 0.7, 1.2),
    "audio-tiny": (13.0, 19.4, 0.4, 1.7, 25.1, 0.3, 2.4),
}
PAGE_S = 1.7
KINDS = (FIRST, *STAGES * len(MODELS))
MIDI_PIECES = 300
AUDIO_PIECES = 60
SEED = 1


def demo(
    folder: Path, *, n_workers: int, device: str, report: Report, stop: Stop, page: bool = False
) -> dict[str, Any]:
    """Prepare, train, evaluate and sample text, music and sound in `folder`; finished parts are skipped.

    page: the caller writes the page next, as a last part.

    Returns a row for each domain and model, and the paths of all samples.

    Raises UsageError if the folder has something else in it.
    """
    with files.held(folder, "shortcut demo"):
        stages = [Stage(*one) for each in SECONDS.values() for one in zip(KINDS, each, strict=True)]
        course = Course("demo", [*stages, *([Stage(PAGE, PAGE_S)] * page)], report, rate=1.0)
        result = _demo(folder, course, n_workers=n_workers, device=device, stop=stop)
        if page:
            course.begin(PAGE)
        return result


def _demo(folder: Path, course: Course, *, n_workers: int, device: str, stop: Stop) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    samples: list[str] = []
    for name, make in (("text-tiny", _text), ("music-tiny", _midi), ("audio-tiny", _audio)):
        resolved = reading.read(name, [f"data.shards={folder / 'shards' / name}"])
        course.begin(f"{name}: {FIRST}")
        data, shards = _once(folder / "data" / name, make, course.tell), Path(resolved.data.shards)
        found = prepare(resolved, [str(data)], shards, n_workers=n_workers, max_bad="0", report=course.tell)
        if not found["worked"]:
            course.skip()
        for model in MODELS:
            arm = reading.with_settings(resolved, [f"model.name={model}"])
            run = folder / "runs" / name / f"{model}-s{arm.train.seed}"
            begin = partial(_begin, course, f"{name}: {model}")
            done = train_score_sample(arm, run, device=device, report=course.tell, stop=stop, begin=begin)
            rows.append({"recipe": name, "parameters": done["train"]["parameters"]["total"], **done["eval"]})
            samples += done["samples"]
    return {"schema_version": SCHEMA_VERSION, "rows": rows, "samples": samples}


def _begin(course: Course, what: str, stage: str) -> None:
    course.begin(f"{what}, {stage}")


def _once(folder: Path, make: Callable[[Path], int], report: Report) -> Path:
    """Make the folder and its files unless it exists; it is complete or absent."""
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        files.make_folder(partial)
        report(Note(text=f"{folder.name}: {make(partial)} files in {folder}"))
        partial.rename(folder)
    return folder


def _text(folder: Path) -> int:
    return material.write_text(folder)


def _midi(folder: Path) -> int:
    return material.write_midi(folder, pieces=MIDI_PIECES, seed=SEED)


def _audio(folder: Path) -> int:
    return material.write_audio(folder, pieces=AUDIO_PIECES, seed=SEED)
