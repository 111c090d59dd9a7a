"""Reading recipes: finding them by name, applying `--set KEY=VALUE`, and validating them with clear messages."""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from shortcut_cli import registry
from shortcut_cli.config.schema import AnyRecipe, CodecRecipe, Recipe, codec_keys, keys, schema
from shortcut_cli.errors import UsageError


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

    Raises UsageError if there is no such file.
    """
    path = Path(name)
    if path.suffix == ".toml" or "/" in name:
        if not path.is_file():
            raise UsageError(
                f"recipe file {name} does not exist", "`shortcut recipes list` shows those that come with shortcut"
            )
        return path
    if name not in names():
        raise UsageError(f"unknown recipe {name!r}", registry.did_you_mean(name, names()))
    return folder() / f"{name}.toml"


def read(name: str, settings: Iterable[str] = ()) -> Recipe:
    """Read recipe `name` (a name or a path), then apply `settings` ("train.steps=200"), then validate.

    Raises UsageError that names the file, the key, the value found and what would be valid.
    """
    found = read_any(name, settings)
    if isinstance(found, CodecRecipe):
        raise UsageError(f"recipe {name} is for a codec", f"shortcut codec train PATH... --recipe {name}")
    return found


def read_codec(name: str, settings: Iterable[str] = ()) -> CodecRecipe:
    """As `read`, for a codec recipe."""
    found = read_any(name, settings)
    if not isinstance(found, CodecRecipe):
        raise UsageError(
            f"recipe {name} is not for a codec: it has no [codec] section", f"shortcut train --recipe {name}"
        )
    return found


def read_any(name: str, settings: Iterable[str] = ()) -> Recipe | CodecRecipe:
    """As `read`, for a recipe of either kind: a codec recipe has a section [codec]."""
    path = find(name)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(
            f"{path} can't be read as TOML: {error}", "`shortcut recipes show music` prints a complete one"
        ) from error
    for setting in settings:
        _apply(tree, setting)
    return validate_codec(tree, str(path)) if "codec" in tree else validate(tree, str(path))


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


def _checked(kind: type[AnyRecipe], tree: Mapping[str, Any], where: str) -> AnyRecipe:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(problem) for problem in error.errors()]
        raise UsageError(f"{where} is not a valid recipe\n" + "\n".join(lines), _near(error, kind)) from error


def with_settings(recipe: Recipe, settings: Iterable[str], where: str = "the result of --set") -> Recipe:
    """A validated copy of `recipe` with `settings` applied; `where` names the result in errors."""
    tree = recipe.model_dump()
    for setting in settings:
        _apply(tree, setting)
    return validate(tree, where)


def _apply(tree: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise UsageError(f"--set {setting} is not SECTION.KEY=VALUE", "for example --set train.steps=200")
    table = tree
    for part in parts[:-1]:
        inner = table.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UsageError(f"--set {setting}: {part} is a key, not a section")
        table = inner
    table[parts[-1]] = _value(text)


def _value(text: str) -> Any:
    """The TOML value if the text is one, else the text itself, so that names and paths need no quotes."""
    try:
        parsed = tomllib.loads(f"x = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["x"] if len(parsed) == 1 else text


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
    return f"  {key}: {text}" + ("" if isinstance(got, (dict, BaseModel)) else f", got {got!r}")


def _near(error: ValidationError, kind: type[Recipe] | type[CodecRecipe]) -> str:
    """A hint: for the first unknown key, the nearest key that exists."""
    for problem in error.errors():
        if problem["type"] == "extra_forbidden":
            known = codec_keys() if kind is CodecRecipe else keys()
            return registry.did_you_mean(_key(problem["loc"]), known)
    return "`shortcut recipes show music` prints a complete recipe; docs/recipes.md lists every key"


def header(name: str) -> str:
    """The comment at the top of a recipe file, without the comment signs."""
    lines: list[str] = []
    for line in find(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return "\n".join(lines)
