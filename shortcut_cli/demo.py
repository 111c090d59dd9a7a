"""The demo: every domain end to end on data that is generated here, offline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shortcut_cli import composer, recipe
from shortcut_cli.loop import Stop
from shortcut_cli.pipeline import train_score_sample
from shortcut_cli.stages.preparation import prepare

Report = Callable[..., None]
MODELS = ("gpt", "shortcut")
MIDI_PIECES = 300
AUDIO_PIECES = 60
SEED = 1


def demo(folder: Path, *, n_workers: int, device: str, report: Report, stop: Stop) -> dict[str, Any]:
    """Prepare, train, evaluate and sample text, music and sound in `folder`; finished parts are skipped.

    Returns a row for each model and the samples of all.
    """
    rows: list[dict[str, Any]] = []
    samples: list[str] = []
    for name, material in (("text-tiny", _text), ("music-tiny", _midi), ("audio-tiny", _audio)):
        resolved = recipe.read(name, [f"data.shards={folder / 'shards' / name}"])
        data = _once(folder / "data" / name, material, report)
        prepare(resolved, [str(data)], Path(resolved.data.shards), n_workers=n_workers, max_bad="0", report=report)
        for model in MODELS:
            report("note", text=f"{name}: {model}")
            arm = recipe.with_settings(resolved, [f"model.name={model}"])
            run = folder / "runs" / name / f"{model}-s{arm.train.seed}"
            done = train_score_sample(arm, run, device=device, report=report, stop=stop)
            rows.append({"recipe": name, "parameters": done["train"]["parameters"]["total"], **done["eval"]})
            samples += done["samples"]
    return {"schema_version": 1, "rows": rows, "samples": samples}


def _once(folder: Path, material: Callable[[Path], int], report: Report) -> Path:
    """The folder with its material, made where it is not there yet: complete or absent."""
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        report("note", text=f"{folder.name}: {material(partial)} files in {folder}")
        partial.rename(folder)
    return folder


def _text(folder: Path) -> int:
    return composer.write_text(folder)


def _midi(folder: Path) -> int:
    return composer.write_midi(folder, pieces=MIDI_PIECES, seed=SEED)


def _audio(folder: Path) -> int:
    return composer.write_audio(folder, pieces=AUDIO_PIECES, seed=SEED)
