"""What commands do beyond a single stage: score, look, draw, and all stages in a row, skipping what is finished."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_cli import SCHEMA_VERSION, files
from shortcut_cli.config import reading
from shortcut_cli.config.schema import Recipe
from shortcut_cli.data.shards import Shards
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.events import Note, Report
from shortcut_cli.inference import runs
from shortcut_cli.stages import attention, sampling
from shortcut_cli.stages.evaluation import check_tokenizer, evaluate
from shortcut_cli.stages.preparation import prepare
from shortcut_cli.stages.sampling import prompt_ids, sample
from shortcut_cli.stages.training import train
from shortcut_cli.training import device as devices
from shortcut_cli.training.loop import Stop


def score(path: Path, shards: Path | None, split: str | None, *, device: str, report: Report) -> dict[str, Any]:
    """Evaluate a checkpoint; write the result into eval.json beside it, by split, and the groups into eval-SPLIT.npz.

    shards, split: default to the recipe's.
    """
    run = runs.open_run(path, device)
    name = split or run.recipe.eval.split
    result = evaluate(run, Shards(shards or Path(run.recipe.data.shards)), name, device=device, report=report)
    groups = result.pop("groups")
    with files.writing(path.parent / f"eval-{name}.npz") as stream:
        np.savez(stream, **groups)
    result["checkpoint_sha256"] = files.sha256(path)
    kept = path.parent / "eval.json"
    results: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "splits": {}}
    if kept.exists():
        results = json.loads(kept.read_text(encoding="utf-8"))
    results["splits"][name] = result
    results["schema_version"] = SCHEMA_VERSION  # also in an older file, whose keys are the same
    files.write(kept, json.dumps(results, indent=1) + "\n")
    return result


def look(
    path: Path,
    prompt: Path | None,
    shards: Path | None,
    split: str,
    windows: int,
    out: Path,
    *,
    device: str,
    report: Report,
) -> dict[str, Any]:
    """Analyse where a checkpoint's final layer looks: in the file `prompt`, or else in up to `windows` of a split.

    Returns the result of `stages.attention.analyse`.
    """
    run = runs.open_run(path, device)
    if prompt is not None:
        tokenizer = run.tokenizer()
        row = np.concatenate(([tokenizer.eos], prompt_ids(tokenizer, prompt)))
        tokens = len(row)

        def read(first: int, count: int) -> np.ndarray:
            return row[first : first + count]
    else:
        opened = Shards(shards or Path(run.recipe.data.shards))
        check_tokenizer(run, opened)
        ids, eos = opened.split(split), opened.tokenizer["end"]
        tokens = ids.tokens + 1

        def read(first: int, count: int) -> np.ndarray:
            return ids.read(first - 1, count) if first else np.concatenate(([eos], ids.read(0, count - 1)))

    config = run.recipe.eval
    found = attention.cut(read, tokens, run.recipe.model.context, windows)
    return attention.analyse(
        run, found, out, resamples=config.resamples, batch=config.batch_size, device=device, report=report
    )


def draw(
    ckpt: Path | None,
    like: Path | None,
    prompt: Path | None,
    settings: list[str],
    out: Path | None,
    *,
    device: str,
    report: Report,
) -> list[Path]:
    """Sample a checkpoint, or recreate the sample whose .json is `like`; returns the paths of the samples.

    settings: of the sampler, as "sample.n=2"; none with `like`. device: "auto" with `like` is the device noted there.

    Raises UsageError if neither or both `like` and settings are given, CheckFailed if `like` names no such sample.
    """
    only = None
    if like is not None:
        if settings:
            raise UsageError("--like takes the sampler's settings from the sample", "leave out the other flags")
        again = sampling.like(like, ckpt, prompt)
        ckpt, prompt, settings, only = again.checkpoint, again.prompt, again.settings, again.number
        device, out = (again.device if device == "auto" else device), out or like.parent / "again"
    if ckpt is None:
        raise UsageError("neither --ckpt nor --like is given", "shortcut sample --ckpt runs/RECIPE/MODEL-s1/run.pt")
    where = devices.choose(device)
    run = runs.open_run(ckpt, where)
    config = reading.with_settings(run.recipe, settings, "the result of the flags").sample
    if only is not None and not 0 <= only < config.n:
        raise CheckFailed(f"{like} is sample {only} of {config.n}")
    folder = out or ckpt.parent / "samples"
    return sample(run, folder, config, prompt=prompt, device=where, report=report, only=only)


def _scored(path: Path, split: str) -> dict[str, Any] | None:
    """The result in eval.json, if it is of exactly this checkpoint on this split."""
    kept = path.parent / "eval.json"
    if not kept.exists():
        return None
    result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))["splits"].get(split, {})
    return result if result.get("checkpoint_sha256") == files.sha256(path) else None


def _sampled(path: Path, folder: Path, recipe: Recipe) -> list[Path]:
    """The samples in a folder, if they are of exactly this checkpoint and sampler and none is missing; else none."""
    wanted = {"checkpoint_sha256": files.sha256(path), "sampler": recipe.sample.model_dump(), "prompt": None}
    found = []
    for sidecar in sorted(folder.glob("*.json")):
        content = _sidecar(sidecar)
        made = sampling.sample_path(sidecar)
        if {key: content.get(key) for key in wanted} == wanted and made.is_file():
            found.append(made)
    return found if len(found) == recipe.sample.n else []


def _sidecar(path: Path) -> dict[str, Any]:
    """The content of a sample's .json; empty if it is missing or damaged, so that its sample counts as missing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _make_room(path: Path, folder: Path, recipe: Recipe, report: Report) -> None:
    """Move away files that have the names of the new samples: those of an earlier checkpoint or an unfinished sampling.

    They go into a folder earlier-1, earlier-2 ... beside the samples. Samples of this checkpoint with other settings
    stay: `sample` then refuses to overwrite them.
    """
    names = [f"{sampling.stem(recipe.sample.seed, number)}.*" for number in range(recipe.sample.n)]
    checkpoint_sha256, moved = files.sha256(path), list[Path]()
    for made in (made for name in names for made in folder.glob(name) if made.suffix != ".json"):
        sidecar = sampling.sidecar_path(made)
        content = _sidecar(sidecar)
        same_way = (content.get("sampler"), content.get("prompt")) == (recipe.sample.model_dump(), None)
        if same_way or content.get("checkpoint_sha256") != checkpoint_sha256:
            moved += [made, sidecar]
    if moved:
        earlier = next(place for n in itertools.count(1) if not (place := folder / f"earlier-{n}").exists())
        earlier.mkdir()
        for old in moved:
            if old.exists():
                old.rename(earlier / old.name)
        report(Note(text=f"samples of another checkpoint, or of an unfinished sampling, were moved to {earlier}"))


def train_score_sample(recipe: Recipe, folder: Path, *, device: str, report: Report, stop: Stop) -> dict[str, Any]:
    """Train, evaluate and sample one model, skipping finished stages; returns the result of each stage."""
    trained = train(recipe, folder, device=device, resume="auto", report=report, stop=stop)
    path = folder / "run.pt"
    scores = _scored(path, recipe.eval.split) or score(
        path, Path(recipe.data.shards), recipe.eval.split, device=device, report=report
    )
    samples = _sampled(path, folder / "samples", recipe)
    if not samples:
        _make_room(path, folder / "samples", recipe, report)
        run = runs.open_run(path, device)
        samples = sample(run, folder / "samples", recipe.sample, prompt=None, device=device, report=report)
    return {"train": trained, "eval": scores, "samples": [str(sample) for sample in samples]}


def run_all(
    recipe: Recipe,
    paths: list[str],
    folder: Path,
    *,
    n_workers: int,
    max_bad: str,
    device: str,
    report: Report,
    stop: Stop,
) -> dict[str, Any]:
    """Prepare, train, evaluate and sample, skipping finished stages; returns the result of each stage."""
    shards = Path(recipe.data.shards)
    prepared = prepare(recipe, paths, shards, n_workers=n_workers, max_bad=max_bad, report=report)
    report(Note(text=f"{shards}: {'prepared' if prepared['worked'] else 'already prepared'}"))
    return {"prepare": prepared, **train_score_sample(recipe, folder, device=device, report=report, stop=stop)}
