"""What can be said against a command by its arguments and the file system alone, before torch is loaded."""

import hashlib
import itertools
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shortcut_cli import files, registry
from shortcut_cli.codec import weights
from shortcut_cli.config import reading
from shortcut_cli.data import inputs, shards
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.inference import prompts
from shortcut_cli.kept.inputs import read

MOST_LOOKED_AT = 1000  # samples that may be in the way


def check_paths(paths: Sequence[str]) -> None:
    """Raise UsageError if a path or glob names nothing."""
    inputs.check(paths)


def check_max_bad(limit: str) -> None:
    """Raise UsageError if a limit is neither a number nor a percentage."""
    inputs.too_many([], limit)


def check_codec(name: str) -> None:
    """Raise UsageError if there is no codec of a name, nor such a file."""
    if weights.seed(name) is None:
        weights.check(name)


def check_shards(folder: str | None) -> None:
    """Raise UsageError if a folder that was named is no shards folder; one in a store is looked at when fetched."""
    if folder is not None and not files.is_url(folder):
        shards.read_manifest(files.place(folder))


def no_place_for_shards(folder: Path) -> str:
    """Why no shards can be prepared into a folder: it is something else; empty if they can, or just are."""
    if files.owner(folder) == shards.PREPARE:
        return ""
    try:
        files.check_held(folder, shards.PREPARE, known=shards.is_shards)
    except UsageError as error:
        return error.message
    return ""


def holds(place: Path, domain: str) -> bool:
    """Whether a folder that no command of ours has made, at any depth, or a file is one of a domain's inputs.

    If a part of it can't be read, it is not known, and not worth an error here.
    """
    suffixes = registry.load(registry.TOKENIZERS, domain).suffixes
    try:
        return os.path.lexists(place) and not files.owner(place) and len(inputs.find([str(place)], suffixes).files) > 0
    except (OSError, UsageError):
        return False


def free_shards(source: Path) -> Path:
    """A folder for the shards of what is at a path, in which nothing is yet."""
    name = source.resolve().stem or "data"
    numbered = (Path("shards") / (f"{name}-{number}" if number > 1 else name) for number in itertools.count(1))
    return next(folder for folder in numbered if not os.path.lexists(folder))


def check_sample(
    ckpt: Path | None, like: Path | None, given: prompts.Given, settings: Sequence[str | reading.Setting]
) -> None:
    """Raise UsageError if the options of `sample` do not go together, or name what is not there."""
    if like is not None and (settings or given.limit or given.only_new):
        raise UsageError("--like takes the sampler's settings from the sample", "leave out the other flags")
    if like is not None and not like.exists():
        raise UsageError(f"{like} can't be read: there is no such file")
    if like is not None and Path(f"{like}.json").is_file():
        raise UsageError(f"{like} is a sample, not the .json that says how it was made", f"--like {like}.json")
    if like is None and ckpt is None:
        raise UsageError("neither --ckpt nor --like is given", "for example --ckpt runs/text/shortcut-s1")
    if like is None:
        reading.with_settings(reading.read("text"), settings)  # the keys of the sampler are the same in all recipes


def check_prompt(ckpt: Path | None, given: prompts.Given) -> None:
    """Raise UsageError if a prompt can't be one of the domain of a run, as its recipe.toml says it."""
    name = _recipe(ckpt).get("tokenizer", {}).get("name") if ckpt else None
    if given.prompt not in (None, "-") and name in registry.TOKENIZERS:
        prompts.found(given, registry.load(registry.TOKENIZERS, name))


def in_the_way(
    ckpt: Path, given: prompts.Given, settings: Sequence[str | reading.Setting], folder: Path
) -> tuple[Path, int] | None:
    """A sample that is there under the name of one that is asked for, and was made from something else; a free seed.

    Only by what the options say: whether it was made from the same in all else is seen when the checkpoint is open.
    """
    said = {one.key.removeprefix("sample."): one.value for one in settings if isinstance(one, reading.Setting)}
    planned = _recipe(ckpt).get("sample", {}) | said
    seed, count = planned.get("seed"), planned.get("n")
    if not (isinstance(seed, int) and isinstance(count, int) and folder.is_dir()):
        return None
    names = {name.partition(".")[0] for name in os.listdir(folder)}
    wanted = _prompt(given) | {"checkpoint_sha256": files.sha256(ckpt)}
    for number in range(min(count, MOST_LOOKED_AT)):
        for sidecar in folder.glob(f"sample-{seed}-{number:03d}.*.json"):
            made = _read(sidecar)
            differs = any(made.get(key) != value for key, value in wanted.items())
            if made and (differs or any(made["sampler"].get(key) != value for key, value in said.items())):
                taken = {name.split("-")[1] for name in names if name.count("-") == 2}
                return sidecar.with_suffix(""), next(one for one in range(1, len(names) + 2) if str(one) not in taken)
    return None


def _prompt(given: prompts.Given) -> dict[str, Any]:
    """What the .json of a sample says about its prompt, as far as the options do."""
    if given.prompt is None:
        return {"prompt_sha256": None}
    rest = {"prompt_limit": given.limit or None, "only_new": given.only_new}
    if given.prompt == "-":
        return rest
    if os.path.isfile(given.prompt):
        return rest | {"prompt_sha256": files.sha256(Path(given.prompt))}
    return rest | {"prompt_sha256": hashlib.sha256(os.fsencode(given.prompt)).hexdigest()}


def _recipe(ckpt: Path) -> dict[str, Any]:
    """The recipe beside a checkpoint, as far as it has tables; empty if there is none that can be read."""
    try:
        found = tomllib.loads((ckpt.parent / "recipe.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: table for name, table in found.items() if isinstance(table, dict)}


def _read(sidecar: Path) -> dict[str, Any]:
    """The .json of a sample of ours; empty if it is none."""
    try:
        made = read(sidecar) or {}
    except CheckFailed:
        return {}
    ours = isinstance(made.get("sampler"), dict) and made.keys() >= {"checkpoint_sha256", "number"}
    return made if ours and sidecar.with_suffix("").is_file() else {}
