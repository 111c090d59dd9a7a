"""Reading recipes: finding them by name, applying `--set KEY=VALUE`, and validating them with clear messages."""

import copy
import os
import re
import shlex
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from shortcut_cli import files, registry
from shortcut_cli.config import writing
from shortcut_cli.config.schema import AnyRecipe, CodecRecipe, Recipe, is_text, keys, known_keys, schema
from shortcut_cli.errors import UsageError

DEEPEST = 32  # values in a recipe; its own are at most four deep
SHOWN_CHARACTERS = 200  # of a value, in a message
MOST_PROBLEMS = 100  # of a recipe that are explained


@dataclass(frozen=True)
class Setting:
    """The value of a recipe key that a flag gives, and the flag as it was given, for messages: "--seed 3"."""

    key: str
    value: Any
    given: str


def folder() -> Path:
    """The folder of the recipes that come with shortcut: inside the package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """The names of the recipes that come with shortcut."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def find(name: str) -> Path:
    """The file that a `--recipe` argument names: a path, or the name of a recipe that comes with shortcut.

    Raises UsageError if there is no such file, or that can't be known.
    """
    path = Path(name)
    named = path.suffix == ".toml" or "/" in name
    if not named and name in names():
        return folder() / f"{name}.toml"
    if os.path.isfile(path):  # which does not raise if the name is too long, unlike the method
        return path
    if os.path.isdir(path):
        raise UsageError(f"recipe {name} is a folder", "name the .toml file in it, or a recipe of `recipes list`")
    if os.path.exists(path):
        raise UsageError(f"recipe {name} is no regular file", "a recipe is a text file in UTF-8")
    files.check_known(path)
    if named:
        there = path.with_name(f"{path.name}.toml")
        raise UsageError(
            f"recipe file {name} does not exist",
            f"Did you mean {str(there)!r}?"
            if os.path.isfile(there)
            else "`shortcut recipes list` shows those that come with shortcut",
        )
    raise UsageError(f"unknown recipe {name!r}", registry.did_you_mean(name, names()))


def text(name: str) -> str:
    """The text of the recipe file that `find` finds, without a byte order mark; lines end with a newline alone.

    Raises UsageError if there is no such file, or if it is not text.
    """
    path = find(name)
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path} can't be read: {error}", "a recipe is a text file in UTF-8") from error


def read(name: str, settings: Iterable[str | Setting] = ()) -> Recipe:
    """Read recipe `name` (a name or a path), then apply `settings` ("train.steps=200"), then validate.

    Raises UsageError that names the file, or the settings that are at fault, the key, the value found and what would be
    valid.
    """
    found = read_any(name, settings)
    if isinstance(found, CodecRecipe):
        raise UsageError(
            f"recipe {name} is for a codec", then=f"shortcut codec train PATH... --recipe {shlex.quote(name)}"
        )
    return found


def read_codec(name: str, settings: Iterable[str | Setting] = ()) -> CodecRecipe:
    """As `read`, for a codec recipe."""
    found = read_any(name, settings)
    if not isinstance(found, CodecRecipe):
        raise UsageError(
            f"recipe {name} is not for a codec: it has no [codec] section",
            then=f"shortcut train --recipe {shlex.quote(name)}",
        )
    return found


def read_any(name: str, settings: Iterable[str | Setting] = ()) -> Recipe | CodecRecipe:
    """As `read`, for a recipe of either kind: a codec recipe has a section [codec]."""
    path = find(name)
    try:
        tree = _loaded(text(name))
    except (ValueError, RecursionError) as error:  # ValueError: also of an integer with thousands of digits
        raise UsageError(
            f"{path} can't be read as TOML: {error}", "`shortcut recipes show music` prints a complete one"
        ) from error
    where = str(path)
    return (
        _changed(CodecRecipe, tree, where, settings) if "codec" in tree else _changed(schema(), tree, where, settings)
    )


def is_shipped(name: str) -> bool:
    """Whether a `--recipe` argument names a recipe that comes with shortcut, not a file of the user's."""
    return find(name).resolve().parent == folder().resolve()


def with_shards(
    name: str,
    recipe: Recipe,
    settings: Iterable[str | Setting],
    made: Mapping[str, Any],
    where: str,
    command: Iterable[str],
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with the tokenizer's keys of the shards at `where`, `made`, and those that it had otherwise.

    The shards win over every key that the user did not write: over a recipe that comes with shortcut, and over keys
    that a file of the user's leaves out. A key that a --set or such a file says, and which differs, is a contradiction;
    so is another tokenizer.

    command: what is running, to which the flags are added that would agree. Raises UsageError if they contradict.
    """
    own = recipe.tokenizer.model_dump()
    different = {key: value for key, value in made.items() if key in own and own[key] != value}
    said = {"name"} if is_shipped(name) else {"name", *tomllib.loads(text(name)).get("tokenizer", {})}
    given = [setting.key if isinstance(setting, Setting) else setting.partition("=")[0].strip() for setting in settings]
    said |= {key.partition(".")[2] for key in given if key.startswith("tokenizer.")}
    contradicted = {key: value for key, value in different.items() if key in said}
    if "name" in contradicted:
        raise UsageError(
            f"{where} was tokenized for {made['name']}, and recipe {name} is for {own['name']}",
            "choose another --recipe, or point data.shards at other shards",
        )
    taken = [Setting(f"tokenizer.{key}", value, f"{where}: tokenizer.{key}") for key, value in different.items()]
    changed = _changed(schema(), recipe.model_dump(), where, taken) if taken else recipe  # a manifest can hold anything
    if contradicted:
        lines = [f"  tokenizer.{key}: {value!r} -> {own[key]!r}" for key, value in contradicted.items()]
        flags = [part for key, value in contradicted.items() for part in ("--set", f"tokenizer.{key}={_plain(value)}")]
        raise UsageError(
            f"{where} was tokenized with a different [tokenizer] than the recipe's\n" + "\n".join(lines),
            then=shlex.join(with_flags(command, flags)),
        )
    return changed, different


def with_flags(command: Iterable[str], flags: Iterable[str]) -> list[str]:
    """A command with flags added, before a -- if there is one: what comes after that is no flag."""
    words = list(command)
    end = words.index("--") if "--" in words else len(words)
    return [*words[:end], *flags, *words[end:]]


def _plain(value: Any) -> str:
    """A value as --set takes it."""
    return value if isinstance(value, str) else writing.toml(value)


def run_folder(name: str, recipe: Recipe) -> Path:
    """The default run folder of a recipe: runs/RECIPE/MODEL-sSEED."""
    return Path("runs") / Path(name).stem / f"{recipe.model.name}-s{recipe.train.seed}"


def validate(tree: Mapping[str, Any], where: str) -> Recipe:
    """Check a recipe that was read from `where`, and return it.

    Raises UsageError with one line for each key that is not valid.
    """
    return _checked(schema(), tree, where)


def validate_codec(tree: Mapping[str, Any], where: str) -> CodecRecipe:
    """As `validate`, for a codec recipe."""
    return _checked(CodecRecipe, tree, where)


def _checked(
    kind: type[AnyRecipe],
    tree: Mapping[str, Any],
    where: str,
    settings: Sequence[Setting] = (),
    bare: Mapping[str, Any] | None = None,
) -> AnyRecipe:
    """Check a recipe from `where`. bare: what it was before `settings` were applied, which are blamed for the rest.

    Raises UsageError with one line for each problem.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        every: list[Any] = list(error.errors())
    problems: list[Any] = every[:MOST_PROBLEMS]
    unexplained: int = len(every) - len(problems)
    before = [] if bare is None else _problems(kind, bare)
    blamed = [[] if _same(problem) in before else _blamed(problem, settings) for problem in problems]
    given = dict.fromkeys(setting.given for some in blamed for setting in some)
    verb = "is" if len(given) == 1 else "are"
    head = f"{', '.join(given)} {verb} not valid" if all(blamed) else f"{where} is not a valid recipe"
    lines = [head, *map(_explain, problems), *([f"  and {unexplained:,} more problems"] if unexplained else [])]
    raise UsageError("\n".join(lines), _near(problems, kind, tree, settings))


def _problems(kind: type[BaseModel], tree: Mapping[str, Any]) -> list[Any]:
    try:
        kind.model_validate(tree)
    except ValidationError as error:
        return [_same(problem) for problem in error.errors()]
    return []


def _same(problem: Any) -> Any:
    """What is equal for equal problems."""
    return problem["loc"], problem["type"], problem["msg"]


def _blamed(problem: Any, settings: Sequence[Setting]) -> list[Setting]:
    """The settings that a problem comes from: those of its key, those that it names, or those of its section."""
    key, words = _key(problem["loc"]), set(re.findall(r"[\w.]+", problem["msg"]))
    near = [
        setting
        for setting in settings
        if f"{setting.key}.".startswith(f"{key}.") or f"{key}.".startswith(f"{setting.key}.")
    ]
    named = [setting for setting in near or settings if words & {setting.key, setting.key.rpartition(".")[2]}]
    section = [setting for setting in settings if setting.key.split(".")[0] == key.split(".")[0]]
    return named or near or section or list(settings)


def with_settings(recipe: Recipe, settings: Iterable[str | Setting]) -> Recipe:
    """A validated copy of `recipe` with `settings` applied. Raises UsageError that names those that are not valid."""
    return _changed(schema(), recipe.model_dump(), "the recipe", settings)


def _changed(kind: type[AnyRecipe], tree: dict[str, Any], where: str, settings: Iterable[str | Setting]) -> AnyRecipe:
    """Apply settings to a recipe from `where`, in order, and check the result."""
    bare = copy.deepcopy(tree)
    applied = [setting if isinstance(setting, Setting) else _parsed(kind, tree, setting) for setting in settings]
    for setting in applied:
        _apply(tree, setting)
    return _checked(kind, tree, where, applied, bare)


def _parsed(kind: type[AnyRecipe], tree: Mapping[str, Any], given: str) -> Setting:
    """A --set argument, KEY=VALUE. With a space before the equals sign, those around the value do not belong to it.

    A key that holds text takes the value as it is, without the quotes if it is a TOML string; any other, as TOML.
    """
    name, equals, value = given.partition("=")
    key = name.strip()
    if not equals or "." not in key or not all(key.split(".")):
        known = known_keys(kind, tree)
        near = next((one for one in known if one.partition(".")[2] == key), "train.steps")
        example = f"for example --set {near}={_short(value) or '...'}"
        raise UsageError(f"{_short(f'--set {given}')} is not SECTION.KEY=VALUE", example)
    if name != name.rstrip():
        value = value.strip(" \t")
    found = _toml(value)
    return Setting(key, value if is_text(kind, key) and not isinstance(found, str) else found, _short(f"--set {given}"))


def _apply(tree: dict[str, Any], setting: Setting) -> None:
    *sections, key = setting.key.split(".")
    if len(sections) > DEEPEST:
        raise UsageError(f"{setting.given}: sections are nested more than {DEEPEST} deep")
    table = tree
    for section in sections:
        inner = table.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UsageError(f"{setting.given}: {section} is a key, not a section")
        table = inner
    table[key] = setting.value


def _toml(value: str) -> Any:
    """The TOML value if the text is one, else the text itself."""
    try:
        parsed = _loaded(f"x = {value}")
    except (ValueError, RecursionError):  # ValueError: also of an integer with thousands of digits
        return value
    return parsed["x"] if len(parsed) == 1 else value


def _loaded(text: str) -> dict[str, Any]:
    """The table in a TOML text.

    Raises ValueError or RecursionError if it is none, or holds what can be read but neither copied nor shown: values
    nested more than DEEPEST deep, and integers that TOML's 64 bits don't hold, which Python reads in hexadecimal.
    """
    tree = tomllib.loads(text)
    level: list[Any] = [tree]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ValueError("an integer does not fit into 64 bits")
            if isinstance(value, dict | list):
                inner += value.values() if isinstance(value, dict) else value
        level = inner
    if level:
        raise ValueError(f"values are nested more than {DEEPEST} deep")
    return tree


def _short(text: str) -> str:
    """A text as it is shown in a message."""
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _key(location: tuple[int | str, ...]) -> str:
    # Pydantic adds the tag of the tokenizer union to the location: (tokenizer, midi, bpe) is the key tokenizer.bpe.
    parts = [str(part) for part in location]
    if len(parts) > 1 and parts[0] == "tokenizer" and parts[1] in registry.TOKENIZERS:
        del parts[1]
    return ".".join(parts) or "recipe"


def _explain(problem: Any) -> str:
    key = _key(problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"  {key}: no such key"
    if problem["type"] == "missing":
        return f"  {key}: is missing"
    text = problem["msg"].removeprefix("Value error, ")
    got = problem["input"]
    return f"  {key}: {text}" + ("" if isinstance(got, (dict, BaseModel)) else f", got {_short(repr(got))}")


def _near(problems: Iterable[Any], kind: type[AnyRecipe], tree: Mapping[str, Any], settings: Sequence[Setting]) -> str:
    """A hint: for the first unknown key, the nearest key that exists; else a recipe of the domain."""
    for problem in problems:
        if problem["type"] == "extra_forbidden":
            key = _key(problem["loc"])
            asked = next((setting.key for setting in settings if setting.key.startswith(f"{key}.")), key)
            known = known_keys(kind, tree)
            if kind is not CodecRecipe and asked in keys():
                owners = [name for name in registry.TOKENIZERS if asked in keys([name])]
                return f"{asked} is a key of the tokenizer {' or '.join(owners)}"
            section = [one for one in known if one.startswith(f"{asked.partition('.')[0]}.")]
            return registry.did_you_mean(asked, known, section or kind.model_fields)
    given = tree.get("tokenizer")
    domain = given.get("name") if isinstance(given, Mapping) else None
    name = "codec-mini" if kind is CodecRecipe else registry.DEFAULT_RECIPES.get(str(domain), "music")
    return f"`shortcut recipes show {name}` prints a complete recipe; docs/recipes.md lists every key"


def header(name: str) -> str:
    """The comment at the top of a recipe file, without the comment signs."""
    lines: list[str] = []
    for line in text(name).splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return "\n".join(lines)
