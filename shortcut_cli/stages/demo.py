"""The demo: every domain end to end, on data that is generated offline."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from shortcut_cli import SCHEMA_VERSION, files
from shortcut_cli.config import reading
from shortcut_cli.demo import material
from shortcut_cli.events import Note, Parts, Report
from shortcut_cli.stages.pipeline import train_score_sample
from shortcut_cli.stages.preparation import prepare
from shortcut_cli.training.loop import Stop

MODELS = ("gpt", "shortcut")
DOMAINS = 3
STAGES = 3  # of a model: train, evaluate, sample
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
        parts = Parts("demo", DOMAINS * (1 + len(MODELS) * STAGES) + page, report)
        result = _demo(folder, parts, n_workers=n_workers, device=device, report=report, stop=stop)
        if page:
            parts.begin("page")
        return result


def _demo(folder: Path, parts: Parts, *, n_workers: int, device: str, report: Report, stop: Stop) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    samples: list[str] = []
    for name, make in (("text-tiny", _text), ("music-tiny", _midi), ("audio-tiny", _audio)):
        resolved = reading.read(name, [f"data.shards={folder / 'shards' / name}"])
        parts.begin(f"{name}: files and shards")
        data = _once(folder / "data" / name, make, report)
        prepare(resolved, [str(data)], Path(resolved.data.shards), n_workers=n_workers, max_bad="0", report=report)
        for model in MODELS:
            arm = reading.with_settings(resolved, [f"model.name={model}"])
            run = folder / "runs" / name / f"{model}-s{arm.train.seed}"
            begin = partial(_begin, parts, f"{name}: {model}")
            done = train_score_sample(arm, run, device=device, report=report, stop=stop, begin=begin)
            rows.append({"recipe": name, "parameters": done["train"]["parameters"]["total"], **done["eval"]})
            samples += done["samples"]
    return {"schema_version": SCHEMA_VERSION, "rows": rows, "samples": samples}


def _begin(parts: Parts, what: str, stage: str) -> None:
    parts.begin(f"{what}, {stage}")


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
