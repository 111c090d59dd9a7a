"""What commands do beyond a single stage: score, look, draw, and all stages in a row, skipping what is finished."""

import io
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shortcut_cli import files, registry
from shortcut_cli.config import reading
from shortcut_cli.config.schema import EvalConfig, Recipe, SampleConfig
from shortcut_cli.data.rejects import described
from shortcut_cli.data.shards import Shards, warning
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.events import Note, Report, Sampled
from shortcut_cli.formatting import to_json
from shortcut_cli.inference import floors, prompts, runs
from shortcut_cli.inference.runs import Run
from shortcut_cli.kept import floors as kept_floors
from shortcut_cli.kept import scores
from shortcut_cli.kept.inputs import differences, read
from shortcut_cli.stages import attention, early, sampling, stores
from shortcut_cli.stages.course import Course, Stage
from shortcut_cli.stages.evaluation import check_tokenizer, evaluate
from shortcut_cli.stages.preparation import prepare, tokenize
from shortcut_cli.stages.sampling import sample
from shortcut_cli.stages.training import train
from shortcut_cli.tokenizers.base import Tokenizer
from shortcut_cli.training import conditions
from shortcut_cli.training import device as devices
from shortcut_cli.training.loop import Stop

RUN = "run.pt"
SHOWN = 10  # rejected files
FORWARDS = 3  # passes through the model in a training step, in time: backward takes as long as two forward
SAMPLED = (
    0.024  # training steps that a token takes which is drawn in all samples: CPU seconds of text-tiny and music-tiny
)
FILES = "files"  # in place of a split, of a score on files


def score(
    path: Path,
    shards: Path | None,
    split: str | None,
    config: EvalConfig | None = None,
    *,
    device: str,
    report: Report,
    with_floors: bool = True,
) -> dict[str, Any]:
    """Evaluate a checkpoint, and keep the result in eval.json beside it, see `kept.scores`, if that can be written.

    shards, config: default: those of the run's recipe. split: default: that of `config`. with_floors: add "floors",
    what simple predictors reach that learn from the shards of the training, if these are at hand.

    Raises UsageError if the shards are missing or were made by another tokenizer, or the split is empty.
    """
    run = runs.open_run(path, device)
    config = config or run.recipe.eval
    opened, name = _open_shards(run, shards, report), split or config.split
    result = evaluate(run, opened, name, config, device=device, report=report)
    if with_floors:
        result |= _floors(run, opened, name, name, report)
    own = opened.manifest["checksum"] == run.content["shards"]
    _keep(run, result, opened, config, device, own=own, report=report)
    return result


def score_files(
    path: Path, paths: Sequence[str], *, n_workers: int, max_bad: str, device: str, report: Report
) -> dict[str, Any]:
    """Evaluate a checkpoint on all of the files behind `paths`, tokenized with the run's own tokenizer.

    The result is kept as `score` does, beside those of shards; its "split" is "files". "rejects" has the files that
    can't be used, as in rejects.jsonl, and "account" what the ids do not carry, as in a manifest.

    Raises UsageError if there are no such files, TooManyRejects if more were rejected than `max_bad` allows.
    """
    run = runs.open_run(path, device)
    config = run.recipe.eval
    with files.temporary_folder() as scratch:
        folder = scratch / "shards"
        tokenize(run.recipe, run.tokenizer(), paths, folder, n_workers=n_workers, max_bad=max_bad, report=report)
        opened = Shards(folder)
        rejects = [json.loads(line) for line in (folder / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
        result = evaluate(run, opened, "test", config, device=device, report=report)
        result |= _floors(run, opened, "test", FILES, report)
    for reject in rejects[:SHOWN]:
        report(Note(text=f"rejected: {described(reject)}"))
    if len(rejects) > SHOWN:
        report(Note(text=f"and {len(rejects) - SHOWN:,} more; --json lists all"))
    result |= {"split": FILES, "rejects": rejects, "account": opened.manifest["account"]}
    _keep(run, result, opened, config, device, own=False, report=report)
    return result


def _floors(run: Run, opened: Shards, name: str, called: str, report: Report) -> dict[str, Any]:
    """{"floors": ...} of a split, which the score calls `called`: kept ones, or new ones; empty if they can't be known.

    They learn from what the run was trained on, which can be other shards than those that are scored.
    """
    wanted, trained = run.content["shards"], opened
    if opened.manifest["checksum"] != wanted:
        folder = files.place(run.recipe.data.shards)
        own = Shards(folder) if (folder / "manifest.json").is_file() else None
        if own is None or own.manifest["checksum"] != wanted:
            report(Note(text=f"no floors: the shards {wanted[:12]}, which the run was trained on, are not at {folder}"))
            return {}
        trained = own
    inputs = kept_floors.made_from(wanted, opened.manifest["checksum"], called, floors.ORDER, floors.MOST_TOKENS)
    found = scores.find_floors(run.path.parent, inputs)
    return {"floors": found or kept_floors.sealed(inputs, floors.measure(trained, opened, name, report))}


def _keep(
    run: Run, result: dict[str, Any], opened: Shards, config: EvalConfig, device: str, *, own: bool, report: Report
) -> None:
    """Keep what `evaluate` returned, without its "groups", beside the checkpoint, if that can be written."""
    path, sums = run.path, result.pop("groups")
    result["checkpoint_sha256"] = files.sha256(path)
    result["inputs"] = scores.made_from(
        result["checkpoint_sha256"], opened.manifest["checksum"], result["split"], config, device
    )
    own = own and (path.name == RUN or not path.with_name(RUN).exists())
    stream = io.BytesIO()
    np.savez(stream, **sums)
    try:
        scores.keep(path.parent, result, stream.getvalue(), own=own, report=report)
    except OSError as error:
        for name in ("groups", "score_sha256"):
            result.pop(name, None)
        report(Note(text=f"the score could not be kept in {path.parent / scores.NAME}: {error.strerror}"))


def _open_shards(run: Run, given: Path | None, report: Report) -> Shards:
    """The shards given, or those of the run's recipe. Raises UsageError if the latter are not there."""
    folder = given or stores.fetched(run.recipe.data.shards, report)
    if given is None and not folder.exists():
        raise UsageError(f"{folder}, the shards folder in the recipe of {run.path}, is not there", "--shards DIR")
    opened = Shards(folder)
    if unfinished := warning(folder, opened.manifest):
        report(Note(text=unfinished))
    if given is None and opened.manifest["checksum"] != run.content["shards"]:
        here, there = opened.manifest["checksum"][:12], run.content["shards"][:12]
        report(Note(text=f"{folder} has shards {here}; {run.path} was trained on {there}"))
    return opened


def _domain(run: Run) -> type[Tokenizer]:
    """The kind of tokenizer of a run, without its files."""
    kind: type[Tokenizer] = registry.load(registry.TOKENIZERS, run.recipe.tokenizer.name)
    return kind


def look(
    path: Path,
    given: prompts.Given,
    shards: Path | None,
    split: str,
    windows: int,
    out: Path,
    *,
    device: str,
    report: Report,
) -> dict[str, Any]:
    """Analyse what a checkpoint reads across layers: in a prompt, or else in up to `windows` of a split.

    Returns the result of `stages.attention.analyse`.
    """
    run = runs.open_run(path, device)
    if prompt := prompts.found(given, _domain(run)):
        tokenizer = run.tokenizer()
        row = np.concatenate(([tokenizer.eos], prompt.ids(tokenizer)))
        tokens, of = len(row), None

        def ids_at(first: int, count: int) -> np.ndarray:
            return row[first : first + count]
    else:
        opened = _open_shards(run, shards, report)
        check_tokenizer(run, opened)
        ids, eos = opened.split(split), opened.tokenizer["end"]
        tokens, of = ids.tokens + 1, split

        def ids_at(first: int, count: int) -> np.ndarray:
            return ids.read(first - 1, count) if first else np.concatenate(([eos], ids.read(0, count - 1)))

    config = run.recipe.eval
    found = attention.cut(ids_at, tokens, run.recipe.model.context, windows)
    return attention.analyse(
        *(run, found, out),
        resamples=config.resamples,
        batch=config.batch_size,
        device=device,
        report=report,
        split=of,
    )


def draw(
    ckpt: Path | None,
    like: Path | None,
    given: prompts.Given,
    settings: Sequence[str | reading.Setting],
    out: Path | None,
    *,
    device: str,
    report: Report,
    stream: bool = False,
) -> list[Path]:
    """Sample a checkpoint, or recreate the sample whose .json is `like`; returns the paths of the samples.

    settings: of the sampler, as "sample.n=2"; none with `like`. given: the prompt; with `like`, where its file is now.
    device: "auto" with `like` is the device noted there. stream: report the text of the sample as it is drawn.

    Raises UsageError if neither or both `like` and settings are given, or there is not one text to stream; CheckFailed
    if `like` names no such sample.
    """
    early.check_sample(ckpt, like, given, settings)
    again = None
    if like is not None:
        again = sampling.like(like, ckpt, None if given.prompt is None else Path(given.prompt))
        ckpt, settings = again.checkpoint, again.settings
        device, out = (again.device if device == "auto" else device), out or like.parent / "again"
    assert ckpt is not None
    where = devices.choose(device)
    run = runs.open_run(ckpt, where)
    config, kind = reading.with_settings(run.recipe, settings).sample, _domain(run)
    if again and not 0 <= again.number < config.n:
        raise CheckFailed(f"{like} is sample {again.number} of {config.n}")
    if stream and not kind.is_text:
        raise UsageError(f"--stream prints text, and samples of {ckpt} are {kind.extension} files", "leave it out")
    if stream and not again and config.n > 1:
        raise UsageError(f"--stream prints one sample, not {config.n}", "-n 1")
    prompt = again.prompt if again else prompts.found(given, kind)
    folder, have = out or ckpt.parent / "samples", []
    if again is None:
        have = _sampled(folder, _sampler_inputs(ckpt, config, prompt, where))
        if len(have) == config.n:
            report(Note(text=f"{folder} already has these samples"))
            if stream:
                report(Sampled(have[0].read_bytes().decode()))
            return have
        if out is None:
            _make_room(folder, config, report, have, whole=False)
    with conditions.threads(again.threads if again else 0):
        changed = conditions.changes(again.conditions or None, conditions.now(where)) if again else ""
        if changed:
            report(Note(text=f"{like} was made under other conditions ({changed}): its bytes can differ"))
        only = again.number if again else None
        return sample(
            run, folder, config, prompt=prompt, device=where, report=report, only=only, have=have, stream=stream
        )


def _sampler_inputs(path: Path, config: SampleConfig, prompt: prompts.Prompt | None, device: str) -> dict[str, Any]:
    """Everything that samples depend on, as their .json files say it; of the device the kind alone counts."""
    made_from = prompt.made_from if prompt else prompts.NO_PROMPT | {"prompt": None, "prompt_tokens": 0}
    return {
        "checkpoint_sha256": files.sha256(path),
        "sampler": config.model_dump(),
        "device": scores.kind(device),
        "prompt_suffix": _suffix(prompt.path.name) if prompt and prompt.path else "",
        **made_from,
    }


def _suffix(name: str) -> str:
    """What decides how a prompt is read, beside its bytes: ".jsonl", ".txt.gz"."""
    path = Path(name.lower())
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def _sampled(folder: Path, wanted: dict[str, Any]) -> list[Path]:
    """The samples in a folder that were made from `wanted` and have not been altered."""
    found, there = [], _by_stem(folder)
    for number in range(wanted["sampler"]["n"]):
        same = there.get(sampling.stem(wanted["sampler"]["seed"], number), [])
        for sidecar in (path for path in same if path.name.count(".") > 1 and path.suffix == ".json"):
            made, content = sampling.sample_path(sidecar), _sidecar(sidecar)
            made_from = {key: content.get(key) for key in (*wanted, "number", "sha256")}
            made_from["device"] = scores.kind(str(made_from["device"]))
            made_from["only_new"] = made_from["only_new"] or False  # earlier versions did not say so
            made_from["prompt_suffix"] = _suffix(str(content.get("prompt") or ""))
            if made.is_file() and not differences(made_from, wanted | {"number": number, "sha256": files.sha256(made)}):
                found.append(made)
                break
    return found


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    """What is in a folder, if there is one, by its names up to their first dots."""
    found: dict[str, list[Path]] = {}
    for path in folder.glob("*.*"):
        found.setdefault(path.name.partition(".")[0], []).append(path)
    return found


def _sidecar(path: Path) -> dict[str, Any]:
    """The content of a sample's .json; empty if it is missing or damaged, so that its sample counts as missing."""
    try:
        return read(path) or {}
    except CheckFailed:
        return {}


def _make_room(folder: Path, config: SampleConfig, report: Report, have: Sequence[Path], *, whole: bool = True) -> None:
    """Move files that have the names of new samples into a folder earlier-1, earlier-2 ... beside the samples.

    They are those of another checkpoint, or of another `shortcut sample`. The paths in their .json files are adapted,
    so that `sample --like` works as before. What is in `have` stays, as does what a killed process left unfinished,
    whose place is taken. whole: move samples with a .json too.
    """
    stay = {*have, *map(sampling.sidecar_path, have)}
    there = _by_stem(folder)
    stems = (sampling.stem(config.seed, number) for number in range(config.n))
    found = [path for stem in stems for path in there.get(stem, []) if path not in stay]
    moved = [path for path in found if not _is_unfinished(path) and (whole or not _is_paired(path))]
    if not moved:
        return
    earlier = next(place for n in itertools.count(1) if not os.path.lexists(place := folder / f"earlier-{n}"))
    files.make_folder(earlier)
    for old in moved:
        content = _sidecar(old) if old.suffix == ".json" else {}
        paths = {key: content[key] for key in ("checkpoint", "prompt") if isinstance(content.get(key), str)}
        if paths:
            content |= {key: os.path.join("..", path) for key, path in paths.items()}
            files.write(earlier / old.name, to_json(content, indent=1) + "\n")
            old.unlink()
        else:
            old.rename(earlier / old.name)
    report(Note(text=f"files with the names of the new samples were moved to {earlier}"))


def _is_unfinished(path: Path) -> bool:
    """Whether a sample was not finished, since its process was killed."""
    return path.suffix != ".json" and files.unfinished(sampling.sidecar_path(path))


def _is_paired(path: Path) -> bool:
    """Whether a file is a sample with a .json, or the .json of one."""
    return sampling.is_sidecar(path) if path.suffix == ".json" else sampling.sidecar_path(path).exists()


def train_score_sample(
    recipe: Recipe, folder: Path, *, device: str, report: Report, stop: Stop, begin: Callable[[str], None]
) -> dict[str, Any]:
    """Train, evaluate and sample one model, skipping finished stages; returns the result of each stage.

    begin: called with the name of each stage as it begins.
    """
    begin("train")
    trained = train(recipe, folder, device=device, resume="auto", report=report, stop=stop)
    path, shards, split = folder / RUN, files.place(recipe.data.shards), recipe.eval.split
    checksum = Shards(shards).manifest["checksum"]
    inputs = scores.made_from(files.sha256(path), checksum, split, recipe.eval, device)
    begin("evaluate")
    scored = scores.find(folder, inputs)
    if scored is None or "floors" not in scored:  # the runs of a comparison are scored without
        scored = score(path, shards, split, recipe.eval, device=device, report=report)
    wanted = _sampler_inputs(path, recipe.sample, None, device)
    begin("sample")
    samples = _sampled(folder / "samples", wanted)
    if len(samples) < recipe.sample.n:
        _make_room(folder / "samples", recipe.sample, report, samples)
        run = runs.open_run(path, device)
        samples = sample(
            run, folder / "samples", recipe.sample, prompt=None, device=device, report=report, have=samples
        )
    return {"train": trained, "eval": scored, "samples": [str(sample) for sample in samples]}


def _stages(recipe: Recipe, tokens: int, *, page: bool) -> list[Stage]:
    """The stages of `run_all`, whose work is counted in training steps. tokens: those of the split that is scored.

    A token is scored in each window that it is in. How long files and a page take can't be told from the recipe.
    """
    scored = tokens / recipe.eval.stride / recipe.train.batch_size / FORWARDS
    stages = [Stage("prepare", 0.0), Stage("train", recipe.train.steps), Stage("evaluate", scored)]
    return [*stages, Stage("sample", recipe.sample.tokens * SAMPLED), *([Stage("page", 0.0)] * page)]


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
    page: bool = False,
) -> dict[str, Any]:
    """Prepare, train, evaluate and sample, skipping finished stages; returns the result of each stage.

    page: the caller writes the page next, as a last part.
    """
    course = Course("run", _stages(recipe, 0, page=page), report)
    tell = course.tell
    course.begin("prepare")
    with stores.kept(recipe.data.shards, tell) as shards:
        prepared = prepare(recipe, paths, shards, n_workers=n_workers, max_bad=max_bad, report=tell)
    tell(Note(text=f"{shards}: {'prepared' if prepared['worked'] else 'already prepared'}"))
    course.stages = _stages(recipe, prepared["splits"][recipe.eval.split]["tokens"], page=page)
    done = train_score_sample(recipe, folder, device=device, report=tell, stop=stop, begin=course.begin)
    if page:
        course.begin("page")
    return {"prepare": prepared, **done}
