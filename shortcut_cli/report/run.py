"""The sections of a run: what it is, what to be warned of, its curves, its scores, its recipe."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from shortcut_cli.config import reading, writing
from shortcut_cli.errors import UsageError
from shortcut_cli.formatting import alike, counted
from shortcut_cli.kept import names, remarks
from shortcut_cli.report import curves, page, warnings
from shortcut_cli.report.axis import around
from shortcut_cli.report.chart import Style
from shortcut_cli.report.comparison_words import FIXED, decimals, ends
from shortcut_cli.report.forest import Row, forest
from shortcut_cli.report.page import Section, cell, exact, minus
from shortcut_cli.report.run_data import RunData, read

SPLITS = ("test", "val", "train")


def sections(folder: Path) -> list[Section]:
    """What a run is, its curves and its scores.

    Raises UsageError or CheckFailed if its run.pt is missing or damaged.
    """
    run = read(folder)
    key = page.key(folder)
    made = [Section("run", "Run", page.notices(warned(run)) + page.facts(_facts(run)) + _lineage(run))]
    made.append(Section("curves", "Curves", curves.of_run(run, f"{key}-axis")))
    made.append(Section("scores", "Scores", _scores(run)))
    return made


def title(folder: Path) -> str:
    """What a run is of: its folder, its network, its data, its last step."""
    run = read(folder)
    data = names.of_data(run.recipe)
    step = f", step {run.step:,}" if run.step is not None else ""
    return f"Run: {run.name}, {names.of_model(run.recipe)}{f' on {data}' if data else ''}{step}"


def recipe(folder: Path) -> list[Section]:
    """The recipe of a run."""
    return [Section("recipe", "Recipe", _recipe(read(folder), f"toml-{page.key(folder)}"))]


def warned(run: RunData) -> Iterator[str]:
    """What a reader should not miss, a sentence each."""
    yield from run.problems
    for split in SPLITS:
        yield from map(sentence, remarks.of_score(run.scores.get(split) or {}))
    yield from map(sentence, remarks.of_plan(run.recipe, run.training_tokens or 0))
    yield from warnings.unfinished(run.step, run.count("train.steps"))
    yield from warnings.risen([(int(line["step"]), line["validation"]) for line in run.validations])


def sentence(remark: str) -> str:
    """A remark as a paragraph has it."""
    return f"{remark[:1].upper()}{remark[1:]}."


def _facts(run: RunData) -> dict[str, Any]:
    here = run.conditions
    threads = here.get("threads")
    device = f"{here.get('device')}" + (f", {threads} thread{'s' * (threads != 1)}" if threads else "")
    versions = ", ".join(f"{name} {version}" for name, version in run.content["versions"].items())
    validation = run.content["scores"]["validation"]
    return {
        "model": _model(run),
        "parameters": _parameters(run),
        "trained on": _data(run),
        "steps": _of(run.step, run.count("train.steps")),
        "tokens seen": _seen(run),
        "training FLOPs": _flops(run),
        "training took": duration(run.seconds),
        "tokens/s, mean": exact(run.trained_tokens / run.seconds) if run.trained_tokens and run.seconds else None,
        "lowest validation loss": f"{validation:.4g} nats per token at step {run.content['step']:,}",
        "device": device if here else None,
        "processor": here.get("cpu"),
        "precision": run.content.get("precision"),
        "versions": versions,
        "seed": run.count("train.seed"),
        "run.pt last changed": run.written,
        "run.pt, SHA-256 begins with": run.sha256[:16],
        "folder": str(run.folder),
    }


def _model(run: RunData) -> str:
    shape = [f"{run.count(f'model.{key}')} {name}" for key, name in (("layers", "layers"), ("heads", "heads"))]
    return f"{run.key('model.name')}: {', '.join(shape)}, width {run.count('model.width')}, context " + str(
        run.count("model.context")
    )


def _parameters(run: RunData) -> str | None:
    if not run.costs:
        return None
    count = run.costs.parameters
    return f"{count['total']:,}, of which {count['non_embedding']:,} non-embedding"


def _data(run: RunData) -> str:
    """The shards, by hash, with the amounts of their training split if they are at hand."""
    named = f"shards {run.content['shards'][:16]}"
    if not run.manifest:
        return f"{named}, which are not at {run.key('data.shards')} now"
    split, unit = run.manifest["splits"]["train"], run.manifest["tokenizer"]["unit"]
    amount = exact(split["units"].get(unit, 0))
    return f"{counted(split['documents'], 'document')}, {amount} {unit}s, {counted(split['tokens'], 'token')}; {named}"


def _of(step: int | None, steps: int | None) -> str | None:
    if step is None:
        return None
    return f"{step:,}" if step == steps or steps is None else f"{step:,} of {steps:,}"


def _seen(run: RunData) -> str | None:
    tokens, training = run.trained_tokens, run.training_tokens
    if tokens is None or not math.isfinite(tokens):
        return None
    return f"{int(tokens):,}" + (f", {tokens / training:.3g} epochs" if training else "")


def _flops(run: RunData) -> str | None:
    tokens = run.trained_tokens
    if not run.costs or tokens is None or not math.isfinite(tokens):
        return None
    return f"{exact(run.costs.flops * tokens)} ({exact(run.costs.flops)} per token)"


def duration(seconds: float | None) -> str | None:
    """Seconds in the unit that a person would use, which no line breaks."""
    if seconds is None or not math.isfinite(seconds):
        return None
    if seconds < 60:
        words = f"{seconds:.3g} s"
    elif (whole := round(seconds)) < 3600:
        words = f"{whole // 60} min {whole % 60} s"
    else:
        words = f"{whole // 3600:,} h {whole % 3600 // 60} min"
    return words.replace(" ", FIXED)


def _lineage(run: RunData) -> Markup:
    lineage = run.content.get("lineage") or {}
    if not lineage:
        return Markup("")
    return page.facts({"began with the weights of": f"run.pt {lineage['init_from'][:16]}, step {lineage['step']:,}"})


def _scores(run: RunData) -> Markup:
    """A figure and a table for each split that was scored."""
    made = Markup("").join(score_of(run.scores[split]) for split in SPLITS if split in run.scores)
    more = Markup("").join(score_of(score, elsewhere=True) for score in run.others)
    if not made and not more:
        return page.template("unscored.html", command=f"shortcut eval --ckpt {run.folder}")
    return made + more


def score_of(score: Mapping[str, Any], *, elsewhere: bool = False) -> Markup:
    """One score: the model and the floors on one axis, then every number."""
    rows, interval = [], known(score["interval_95"])
    if score["nats_per_token"] is not None:
        rows.append(_row("this model", score["nats_per_token"], Style(0, shape="circle"), interval))
    rows += [
        _row(name, one["nats_per_token"], Style(7, shape="diamond"), role="counted") for name, one in floors(score)
    ]
    shards = f" of shards {score['inputs']['shards'][:16]}" if elsewhere and "inputs" in score else ""
    heading = f"{score['split'].capitalize()} split{shards}"
    axis = around(
        "nats per token, lower is better", [value for row in rows for value in (row.mean, *(row.interval or ()))]
    )
    drawn = forest(rows, [axis], heading) if rows else ""
    caption = (
        f"95 % interval over {score['interval_over']}. Counted: simple predictors that count the training split, the "
        "unigram how often each token occurs, an n-gram how often it follows the n\u00a0\u2212\u00a01 tokens before "
        "it; a model that is no better has learned no more. A nat is 1.44 bits."
    )
    return page.template(
        "score.html",
        heading=heading,
        drawn=drawn,
        caption=caption,
        table=page.facts(_numbers(score)),
    )


def floors(score: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The simple predictors beside a score, the worst first."""
    found = score.get("floors", {"scores": {}})["scores"]
    return sorted(found.items(), key=lambda each: -each[1]["nats_per_token"])


def known(interval: Any) -> tuple[float, float] | None:
    """An interval both of whose ends are known; None of any other."""
    return tuple(interval) if interval and None not in interval else None


def _row(name: str, value: float, looks: Style, interval: tuple[float, float] | None = None, role: str = "") -> Row:
    words = [decimals(value), *([ends(interval)] if interval else [])]
    return Row(name, role, looks, (), value, interval, words)


def _numbers(score: Mapping[str, Any]) -> dict[str, Any]:
    unit = score["unit"]
    numbers = {
        "nats per token": ranged(score["nats_per_token"], score["interval_95"]),
        f"bits per {unit}": ranged(score["bits_per_unit"], score["bits_per_unit_interval_95"]),
        "perplexity": score["perplexity"],
        "accuracy": score["accuracy"],
        "unigram entropy of the split": score["unigram_entropy"],
        **{
            f"{name}, counted": f"{cell(one['nats_per_token'])} nats per token"
            + (f", {cell(one['bits_per_unit'])} bits per {unit}" if one.get("bits_per_unit") is not None else "")
            for name, one in reversed(floors(score))
        },
        "documents": score["documents"],
        "tokens": score["tokens"],
    }
    if "words" in score:
        numbers |= {"bits per character": score["bits_per_character"], "perplexity per word": score["word_perplexity"]}
    return numbers


def ranged(value: float | None, interval: Any) -> str | None:
    """A value with its interval behind it, which no line breaks."""
    if value is None:
        return None
    low, high = interval or (None, None)
    if None in (low, high):
        return cell(value)
    middle, *ends = (minus(cell(each)) for each in alike([value, low, high]))
    return f"{middle}{FIXED}[{f',{FIXED}'.join(ends)}]"


def _recipe(run: RunData, name: str) -> Markup:
    """The recipe as TOML that `--recipe` reads; in plain words why not, if this version does not know it."""
    try:
        text = writing.dump(reading.validate(run.recipe, str(run.folder / "run.pt")))
    except UsageError as error:
        return page.notices([error.message])
    return page.details("Recipe as TOML", page.copied(name, text, "recipe"))
