"""How a success ends: the files that are there now, and the next command, which works as pasted."""

import itertools
import re
import shlex
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shortcut_cli.errors import CheckFailed
from shortcut_cli.formatting import counted

MOST_NAMED = 8  # files that are named; --json names all
# What a training writes into its folder; scores, samples and attention are those of other commands.
OF_TRAINING = re.compile(
    r"(run|codec|resume|resume\.prev|last|stable|(run|step)-\d+)\.pt|log\.jsonl|recipe\.toml|events\.out\..*"
)
READ_NOTHING = ("gpt", "conv")  # architectures without a read across layers
Command = list[str]


def within(folder: Path) -> list[str]:
    """The files in a folder that belongs to the command alone, at any depth, but for markers and temporary files."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def named(folder: Path, names: Iterable[str]) -> list[str]:
    """The files of these names that are in a folder."""
    return [str(folder / name) for name in names if (folder / name).is_file()]


def of_training(folder: Path) -> list[str]:
    """The files of a run folder that a training wrote."""
    return sorted(str(path) for path in folder.glob("*") if path.is_file() and OF_TRAINING.fullmatch(path.name))


def of_comparison(folder: Path, split: str) -> list[str]:
    """The files of a comparison, and what it wrote into the folders of its runs: others may have written there too."""
    found = named(folder, ["report.html", "compare.json", "comparison.json", "output.txt"])
    for run in sorted((folder / "runs").glob("*/")):
        found += of_training(run) + named(
            run, ["run.toml", "cost.json", "eval.json", f"eval-{split}.npz", "diverged.json"]
        )
    return found


def of_score(ckpt: Path, result: dict[str, Any]) -> list[str]:
    """The files in which a score was kept, if it could be."""
    kept = result.get("groups")
    return named(ckpt.parent, ["eval.json", kept["file"]]) if isinstance(kept, dict) and "file" in kept else []


def of_samples(paths: Iterable[Path | str]) -> list[str]:
    """Samples, and the .json beside each."""
    return [each for path in paths for each in (str(path), f"{path}.json")]


def of_results(score: dict[str, Any], samples: Iterable[str] = ()) -> list[str]:
    """What should be known of a score and of samples, see `kept.remarks`."""
    from shortcut_cli.kept import remarks
    from shortcut_cli.kept.inputs import read

    said = remarks.of_score(score)
    for path in samples:
        try:
            found = remarks.of_sample(read(Path(f"{path}.json")) or {})
        except CheckFailed:
            continue  # it is damaged; the sample is there all the same
        said += [f"{Path(path).name}: {one}" for one in found]
    return said


def told(folder: Path | str, paths: Sequence[str]) -> str:
    """One line about the files that are there now: those in the folder itself by name, others by their number."""
    inside = [Path(path).name for path in paths if Path(path).parent == Path(folder)]
    names, deeper = inside[:MOST_NAMED], len(paths) - len(inside)
    more = [_files(len(inside) - len(names), "more ")] if len(inside) > len(names) else []
    below = [f"{_files(deeper)} in folders below"] if deeper else []
    return f"In {folder}: {', '.join([*names, *more, *below])}"


def to_open(page: str, samples: Sequence[str]) -> str:
    """Which of the files to open first."""
    if page:
        return f"Open first: {page} (curves, scores, {counted(len(samples), 'sample')})"
    return (
        f"Open first: {samples[0]} ({counted(len(samples), 'sample')})" if samples else "There are no samples to open."
    )


def _files(count: int, which: str = "") -> str:
    return counted(count, f"{which}file")


def pasted(command: Iterable[str]) -> str:
    """A command as a shell takes it."""
    return shlex.join(["shortcut", *command])


def after_prepare(recipe: str, folder: str, settings: Iterable[str]) -> Command:
    """Train on the shards: with the recipe, and what it does not say of them.

    Of a recipe that comes with shortcut the tokenizer's keys follow the shards; a file of the user's keeps its own.
    """
    from shortcut_cli.config import reading

    command = ["train", "--recipe", recipe]
    if reading.read(recipe).data.shards != folder:
        command += ["--set", f"data.shards={folder}"]
    own = [] if reading.is_shipped(recipe) else [one for one in settings if one.strip().startswith("tokenizer.")]
    return [*command, *(part for one in own for part in ("--set", one))]


def after_train(run: Path) -> Command:
    """Score the run."""
    return ["eval", "--ckpt", _short(run)]


def after_eval(ckpt: Path) -> Command:
    """Sample the run; if it has samples, what comes after these."""
    if any((ckpt.parent / "samples").glob("*.json")):
        return after_sample(ckpt, model_of(ckpt))
    return ["sample", "--ckpt", _short(ckpt)]


def after_sample(ckpt: Path, model: str) -> Command:
    """Look at what the run reads across layers; if that was done, or it reads nothing there, compare it."""
    if model in ("", *READ_NOTHING) or (ckpt.parent / "attention").exists():
        return after_attention(ckpt, model)
    return ["attention", "--ckpt", _short(ckpt)]


def after_attention(ckpt: Path, model: str) -> Command:
    """Compare the architecture with its baselines over seeds, on the recipe and the data of the run.

    A run of a comparison has been compared: look at all of them, beside each other.
    """
    recipe = ckpt.parent / "recipe.toml"
    if not model:
        return []
    run = ckpt.resolve().parent
    if run.parent.name == "runs" and (run.parent.parent / "comparison.json").is_file():
        whole = (
            ckpt.parent.parent.parent if len(ckpt.parent.parts) > 2 and ".." not in ckpt.parts else run.parent.parent
        )
        done = (whole / "compare.json").is_file()
        return ["report", placed(whole)] if done else ["runs", placed(whole / "runs")]
    usual = re.fullmatch(rf"{re.escape(model)}-s\d+", run.name) and run.parent.name not in ("runs", "")
    name = (run.parent if usual else run).name or "run"
    numbered = (Path("comparisons") / (f"{name}-{number}" if number > 1 else name) for number in itertools.count(1))
    out = next(folder for folder in numbered if not folder.exists())
    models = "shortcut" if model in READ_NOTHING else model
    return ["compare", "--recipe", str(recipe), "--models", models, "--out", str(out)]


def after_demo(folder: Path) -> Command:
    """Look at what the last architecture of the demo reads across layers in music."""
    return ["attention", "--ckpt", str(folder / "runs" / "music-tiny" / "shortcut-s1")]


def placed(path: Path | str) -> str:
    """A path as an argument of its own: with a dash in front it would be an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def model_of(ckpt: Path) -> str:
    """The architecture of a run, from the recipe beside its checkpoint; empty if there is none that can be read."""
    try:
        found = tomllib.loads((ckpt.parent / "recipe.toml").read_text(encoding="utf-8"))["model"]["name"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""


def _short(ckpt: Path) -> str:
    """A run folder stands for the run.pt in it."""
    return str(ckpt.parent if ckpt.name == "run.pt" else ckpt)
