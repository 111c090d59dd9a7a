"""What a run or a comparison is called, everywhere alike: by its folder, its network and its data.

Recipes have no name of their own. Each function takes a recipe as it is in a checkpoint, of any version, or in a
damaged file: what it lacks is left out.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from shortcut_cli.kept.remarks import is_count

LONGEST = 80  # characters of a part of a name


def of_folder(folder: Path) -> str:
    """A short name of a folder: its own and that of the one above."""
    return "/".join(folder.resolve().parts[-2:]).lstrip("/") or str(folder)


def of_model(recipe: Mapping[str, Any]) -> str:
    """The network: its architecture, and layers x width, as in the labels of a comparison's baselines."""
    return " ".join(filter(None, (_text(recipe, "model", "name"), shape(recipe))))


def shape(recipe: Mapping[str, Any]) -> str:
    """Layers x width."""
    sizes = [_found(recipe, "model", key) for key in ("layers", "width")]
    return "x".join(map(str, sizes)) if all(map(is_count, sizes)) else ""


def of_data(recipe: Mapping[str, Any]) -> str:
    """The domain, and the end of the path of the shards."""
    shards = PurePosixPath(_text(recipe, "data", "shards").replace("\\", "/"))
    place = "/".join(part for part in shards.parts[-2:] if part not in ("/", "..", "."))[-LONGEST:]
    domain = _text(recipe, "tokenizer", "name")
    return f"{domain} ({place})" if domain and place else domain or place


def _text(recipe: Mapping[str, Any], section: str, key: str) -> str:
    found = _found(recipe, section, key)
    return found[-LONGEST:] if isinstance(found, str) else ""


def _found(recipe: Mapping[str, Any], section: str, key: str) -> Any:
    table = recipe.get(section)
    return table.get(key) if isinstance(table, Mapping) else None
