"""Several stages, one after the other: what `run` and `demo` do. Stages that are finished are skipped."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_cli import checkpoint, files
from shortcut_cli.loop import Stop
from shortcut_cli.recipe import Recipe
from shortcut_cli.shards import Shards
from shortcut_cli.stages import attention
from shortcut_cli.stages.evaluation import check_tokenizer, evaluate
from shortcut_cli.stages.preparation import prepare
from shortcut_cli.stages.sampling import prompt_ids, sample
from shortcut_cli.stages.training import train

Report = Callable[..., None]


def score(path: Path, shards: Path | None, split: str | None, *, device: str, report: Report) -> dict[str, Any]:
    """Evaluate a checkpoint and keep the result in eval.json beside it, by split, and its groups in eval-SPLIT.npz."""
    run = checkpoint.open_run(path, device)
    name = split or run.recipe.eval.split
    result = evaluate(run, Shards(shards or Path(run.recipe.data.shards)), name, device=device, report=report)
    groups = result.pop("groups")
    with files.writing(path.parent / f"eval-{name}.npz") as stream:
        np.savez(stream, **groups)
    result["checkpoint_sha256"] = files.sha256(path)
    kept = path.parent / "eval.json"
    results: dict[str, Any] = {"schema_version": 1, "splits": {}}
    if kept.exists():
        results = json.loads(kept.read_text(encoding="utf-8"))
    results["splits"][name] = result
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
    """Where a checkpoint's final layer looks in a file, or in windows of a split; see `stages.attention.attend`."""
    run = checkpoint.open_run(path, device)
    if prompt is not None:
        tokenizer = run.tokenizer()
        row = np.concatenate(([tokenizer.end], prompt_ids(tokenizer, prompt)))
        tokens = len(row)

        def read(first: int, count: int) -> np.ndarray:
            return row[first : first + count]
    else:
        opened = Shards(shards or Path(run.recipe.data.shards))
        check_tokenizer(run, opened)
        ids, end = opened.split(split), opened.tokenizer["end"]
        tokens = ids.tokens + 1

        def read(first: int, count: int) -> np.ndarray:
            return ids.read(first - 1, count) if first else np.concatenate(([end], ids.read(0, count - 1)))

    keys = run.recipe.eval
    found = attention.cut(read, tokens, run.recipe.model.context, windows)
    return attention.attend(
        run, found, out, resamples=keys.resamples, batch=keys.batch_size, device=device, report=report
    )


def _scored(path: Path, split: str) -> dict[str, Any] | None:
    """The kept result of exactly this checkpoint on this split."""
    kept = path.parent / "eval.json"
    if not kept.exists():
        return None
    result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))["splits"].get(split, {})
    return result if result.get("checkpoint_sha256") == files.sha256(path) else None


def _sampled(path: Path, folder: Path, recipe: Recipe) -> list[Path]:
    """The samples of exactly this checkpoint with this sampler that lie in a folder, where all of them are there."""
    wanted = {"checkpoint_sha256": files.sha256(path), "sampler": recipe.sample.model_dump(), "prompt": None}
    found = []
    for sidecar in sorted(folder.glob("*.json")):
        content = _told(sidecar)
        made = sidecar.with_suffix("")
        if {key: content.get(key) for key in wanted} == wanted and made.is_file():
            found.append(made)
    return found if len(found) == recipe.sample.n else []


def _told(sidecar: Path) -> dict[str, Any]:
    """What the .json of a sample says; nothing where it is missing or damaged, so that its sample is not taken."""
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _make_room(path: Path, folder: Path, recipe: Recipe, report: Report) -> None:
    """Move what an earlier checkpoint, or a sampling that did not end, left under the names of the samples.

    It goes to a folder earlier-1, earlier-2 ... beside them. Samples of this checkpoint that were made in another way
    stay: `sample` then says that they exist already.
    """
    names = [f"sample-{recipe.sample.seed}-{number:03d}.*" for number in range(recipe.sample.n)]
    checkpoint_sha256, moved = files.sha256(path), list[Path]()
    for made in (made for name in names for made in folder.glob(name) if made.suffix != ".json"):
        sidecar = made.with_suffix(made.suffix + ".json")
        content = _told(sidecar)
        same_way = (content.get("sampler"), content.get("prompt")) == (recipe.sample.model_dump(), None)
        if same_way or content.get("checkpoint_sha256") != checkpoint_sha256:
            moved += [made, sidecar]
    if moved:
        earlier = next(place for n in itertools.count(1) if not (place := folder / f"earlier-{n}").exists())
        earlier.mkdir()
        for old in moved:
            if old.exists():
                old.rename(earlier / old.name)
        report("note", text=f"samples of another checkpoint, or of a sampling that did not end, are now in {earlier}")


def train_score_sample(recipe: Recipe, folder: Path, *, device: str, report: Report, stop: Stop) -> dict[str, Any]:
    """Train, eval and sample one model, skipping what is done; returns what each stage gave."""
    trained = train(recipe, folder, device=device, resume="auto", report=report, stop=stop)
    path = folder / "run.pt"
    scores = _scored(path, recipe.eval.split) or score(
        path, Path(recipe.data.shards), recipe.eval.split, device=device, report=report
    )
    samples = _sampled(path, folder / "samples", recipe)
    if not samples:
        _make_room(path, folder / "samples", recipe, report)
        run = checkpoint.open_run(path, device)
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
    """Prepare, train, eval and sample; finished stages are skipped."""
    shards = Path(recipe.data.shards)
    prepared = prepare(recipe, paths, shards, n_workers=n_workers, max_bad=max_bad, report=report)
    report("note", text=f"{shards}: {'prepared' if prepared['worked'] else 'already prepared'}")
    return {"prepare": prepared, **train_score_sample(recipe, folder, device=device, report=report, stop=stop)}
