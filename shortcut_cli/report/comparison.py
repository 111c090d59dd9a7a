"""The page of a comparison: its verdicts first, then what they are made from."""

import hashlib
import math
import shlex
from pathlib import Path

from markupsafe import Markup

from shortcut_cli.config import writing
from shortcut_cli.formatting import ESCAPES
from shortcut_cli.kept import names
from shortcut_cli.report import comparison_losses, comparison_runs, page, samples
from shortcut_cli.report.compared import NAME, Compared, Contrast, number, text
from shortcut_cli.report.comparison_words import count, decimals, figures, signed, signed_ends
from shortcut_cli.report.page import Section, template

MATCHED = {
    "none": "baselines not matched",
    "params": "baselines matched by non-embedding parameters",
    "flops": "baselines matched by training FLOPs",
    "time": "baselines matched by time per step",
}
WORDS = (
    ("arm", "A model of the comparison, trained once for each seed."),
    ("floor", "The loss of a simple predictor that only counts the training split."),
    (
        "gate",
        "No verdict counts unless gpt is clearly below the lowest floor: models that are no better than counting say "
        "nothing about architectures.",
    ),
    (
        "baseline",
        "A plain gpt that costs about as much as an arm; gpt-4x96x384 has 4 layers, width 96, feed-forward 384.",
    ),
    (
        "ladder",
        "Baselines of several sizes, its rungs, and the line through their losses: what more cost alone brings.",
    ),
    ("A/A twin", "A second gpt of nearly the same shape. Its difference should be 0; else there is more than chance."),
    (
        "positive control",
        "An arm that is known to help (conv). If it is not found, the page says what could have been.",
    ),
    ("look", "A reading of the results before all planned seeds have run. Each has a stricter level for that."),
    ("Holm", "A procedure that makes levels stricter the more differences were named, so that 5 % holds for all."),
    ("pilot", "A short run, on a seed of its own, that chooses a learning rate or a baseline."),
)
TITLED = 5  # arms that are named in the title
MOST_SAMPLES = 8  # of the page, of all arms together
COPIED = {code: f"\\u{code:04x}" for code in ESCAPES}


def title(folder: Path) -> str:
    """What the comparison in a folder is of. Raises CheckFailed as `sections` does."""
    return _title(folder, Compared(folder))


def _title(folder: Path, found: Compared) -> str:
    """What a comparison is of, in a line: its folder, its arms, their shape, its data."""
    asked = [arm.label for arm in found.arms if arm.role in ("plain", "asked")]
    more = f" and {len(asked) - TITLED:,} more" if len(asked) > TITLED else ""
    shape, data = names.shape(found.recipe), names.of_data(found.recipe)
    arms = f"{', '.join(asked[:TITLED])}{more}{f' at {shape}' if shape else ''}"
    return f"Comparison: {names.of_folder(folder)}, {arms}{f' on {data}' if data else ''}"


def sections(folder: Path) -> list[Section]:
    """The sections of the comparison in a folder.

    Raises CheckFailed if it holds none, or compare.json is damaged.
    """
    found = Compared(folder)
    key = hashlib.sha256((folder / NAME).read_bytes()).hexdigest()[:8]  # tells two comparisons in one page apart
    made: list[tuple[str, str, Markup | None]] = [
        ("verdict", "Verdict", _verdict(found)),
        ("losses", "Losses of the arms", comparison_losses.losses(found)),
        ("differences", "Differences", comparison_losses.differences(found)),
        ("ladder", "The ladder of baselines", comparison_runs.ladder(found)),
        ("curves", "Validation loss during training", comparison_runs.curves(found)),
        ("rates", "Learning rates of the pilots", comparison_runs.rates(found)),
        ("samples", "Samples side by side", _samples(folder, found)),
        ("checks", "Checks", _checks(found)),
        ("recipe", "Recipe", _recipe(found, f"toml-{key}")),
    ]
    return [Section(f"{anchor}-{key}", title, body) for anchor, title, body in made if body]


def _verdict(found: Compared) -> Markup:
    shut = bool(found.gate) and found.gate.get("open") is not True
    first, *others = found.notices or [""]
    if not shut:
        first, others = _passed(found), [*found.notices]
    return template(
        "comparison_verdict.html",
        first=first,
        shut=shut,
        notices=others,
        problems=_problems(found),
        verdicts=[one.verdict for one in found.contrasts if one.verdict],
        facts=_facts(found),
        columns=WORDS,
    )


def _problems(found: Compared) -> str:
    """What of the file is not shown, and why."""
    if not found.problems:
        return ""
    more = f", and {len(found.problems) - TITLED:,} more" if len(found.problems) > TITLED else ""
    return f"{NAME} is damaged, so a part of it is not shown: {', '.join(found.problems[:TITLED])}{more}."


def _passed(found: Compared) -> str:
    """What an open gate means, in numbers."""
    if not found.gate:
        return "This comparison has no gate: it was made before baselines had to beat an n-gram for a verdict."
    baseline, floor, clear = (number(found.gate.get(key)) for key in ("baseline", "floor_nats_per_token", "clear_by"))
    return (
        f"The verdicts count: gpt, at {decimals(baseline)} nats per token, is more than {clear:g} below the lowest "
        f"floor, the {text(found.gate.get('floor'))} at {decimals(floor)}."
    )


def _facts(found: Compared) -> str:
    """What was compared, in a sentence or two."""
    sizes = [("layers", "layers"), ("width", "width"), ("context", "context")]
    parts = [f"{name} {count(found.fact('recipe', 'model', key))}" for name, key in sizes]
    steps, batch = found.fact("recipe", "train", "steps"), found.fact("tokens_per_step")
    parts.append(f"{count(steps)} steps of {count(batch)} tokens ({figures(found.fact('epochs'))} epochs)")
    if found.ladder:
        parts.append(f"a ladder of {len(found.ladder.rungs)} baselines over the log of {found.ladder.what}")
    else:
        parts.append(MATCHED.get(text(found.content.get("match")), "baselines"))
    seeds = max((len(arm.seeds) for arm in found.arms), default=0)
    parts.append(f"{seeds:,} seed{'s' if seeds != 1 else ''}")
    parts.append(f"{text(found.content.get('split'))} split of the shards {text(found.content.get('shards'))[:12]}")
    return f"{'; '.join(parts)}."


def _samples(folder: Path, found: Compared) -> Markup | None:
    """Of each arm whose runs have samples, those of its first run that has; how to make those of the others.

    None if there are none, and no runs to sample from either.
    """
    runs = {}
    for arm in found.arms:
        sampled = next((place for name in arm.folders if (place := _sampled(folder, name))), None)
        if sampled:
            runs[arm.label] = sampled
    commands = _to_sample(folder, found)
    if not runs and not commands:
        return None
    each = max(1, MOST_SAMPLES // max(1, len(runs)))
    shown = {label: samples.figures(run, each) for label, run in [*runs.items()][:MOST_SAMPLES]}
    key = hashlib.sha256(str(folder).encode("utf-8", "replace")).hexdigest()[:8]
    return template(
        "comparison_samples.html",
        arms=shown,
        left_out=[*runs][MOST_SAMPLES:],
        commands=page.copied(f"sample-{key}", "\n".join(commands), "the commands") if commands else "",
    )


def to_sample(folder: Path) -> list[str]:
    """The commands that make samples of arms that have none, and show them on the page; see `_to_sample`.

    Raises CheckFailed as `sections` does.
    """
    return _to_sample(folder, Compared(folder))


def _to_sample(folder: Path, found: Compared) -> list[str]:
    """Commands for a shell, one for the first run of each arm that has no samples; [] if none is left.

    Rungs and the twin are left out: they are there to be measured. So are runs that are not in the folder.
    """
    arms = [arm for arm in found.arms if arm.role in ("plain", "asked", "matched")][:MOST_SAMPLES]
    each = max(1, MOST_SAMPLES // max(1, len(arms)))
    places = []
    for arm in arms:
        if not any(_sampled(folder, name) for name in arm.folders):
            places += [place for name in arm.folders if (place := _inside(folder, name)) and _is_run(place)][:1]
    commands = [shlex.join(["shortcut", "sample", "--ckpt", str(place), "-n", str(each)]) for place in places]
    if not all(command.isprintable() for command in commands):  # what a terminal obeys can't be pasted
        return []
    return commands


def _inside(folder: Path, name: str) -> Path | None:
    """A run's folder inside that of its comparison; None of any other that someone wrote there."""
    try:
        return folder / name if (folder / name).resolve().is_relative_to(folder.resolve()) else None
    except (OSError, RuntimeError, ValueError):  # such names can't be looked up
        return None


def _is_run(place: Path) -> bool:
    try:
        return (place / "run.pt").is_file()
    except (OSError, ValueError):
        return False


def _sampled(folder: Path, name: str) -> Path | None:
    """A run's folder inside that of its comparison, if it has samples."""
    try:
        place = _inside(folder, name)
        return place if place and any((place / "samples").glob("*.json")) else None
    except (OSError, RuntimeError, ValueError):
        return None


def _checks(found: Compared) -> Markup:
    diverged = [[arm.label, seed, how] for arm in found.arms for seed, how in arm.diverged.items()]
    diverged += [
        [one.label, page.minus(f"pilot at {rate:g}"), "its loss is not finite"]
        for one in found.pilots
        for rate, losses in one.losses.items()
        if any(map(math.isnan, losses))
    ]
    family = found.looks.get("family")
    return template(
        "comparison_checks.html",
        gate=_passed(found)
        if not found.gate or found.gate.get("open") is True
        else found.notices[0]
        if found.notices
        else "",
        aa=_twin(found.aa),
        control=_control(found),
        looks=_looked(found),
        family=[text(name, 200) for name in family][:1000] if isinstance(family, list) else [],
        diverged=page.table(["arm", "seed", "how"], diverged, "Runs that diverged") if diverged else None,
    )


def _twin(aa: Contrast | None) -> str:
    if aa is None:
        return "This comparison has no A/A twin: it was made before there was one."
    if not math.isfinite(aa.mean):
        return f"Not available: {aa.unavailable}."
    if not aa.interval:
        return f"A second gpt differs by {signed(aa.mean)} nats per token (one seed, no interval)."
    fits = aa.interval[0] <= 0 <= aa.interval[1]
    return (
        f"A second gpt, nearly the same, differs by {signed(aa.mean)} nats per token, 95 % interval "
        f"{signed_ends(aa.interval)}. It "
        + ("contains 0, as it should." if fits else "does not contain 0: chance, or a fault of the comparison.")
    )


def _control(found: Compared) -> str:
    if not found.control:
        return "Not among the arms: with conv, which is known to help, the page says whether it was found to."
    name = text(found.control.get("arm"))
    if found.control.get("found") is True:
        return f"{name}, which is known to help, was found to help: this comparison can see an effect of that size."
    if found.gate and found.gate.get("open") is not True:
        return f"{name} is among the arms; there is no verdict on it, as on no other."
    mean, detectable = number(found.control.get("mean")), number(found.control.get("detectable"))
    if math.isnan(mean) or math.isnan(detectable):
        return f"{name}, which is known to help, was not found to: this comparison could not have seen anything."
    return (
        f"{name}, which is known to help, was not found to: it differs by {signed(mean)} nats per token. This "
        f"comparison finds a difference of {decimals(detectable)} with 80 % power, smaller ones less often."
    )


def _looked(found: Compared) -> str:
    planned, seeds = number(found.looks.get("planned")), found.looks.get("seeds")
    if math.isnan(planned) or not isinstance(seeds, list):
        return ""
    counts = ", ".join(count(number(one)) for one in seeds[:100])
    return f"Looked at with {counts} of at most {count(planned)} seeds."


def _recipe(found: Compared, place: str) -> Markup:
    """The recipe as a file that can be used again: what a terminal would obey is escaped as TOML does it."""
    toml = writing.document(found.recipe).translate(COPIED).encode("utf-8", "replace").decode()
    return template("comparison_recipe.html", recipe=page.copied(place, toml, "the recipe"))
