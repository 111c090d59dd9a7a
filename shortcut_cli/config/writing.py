"""Writing recipes as TOML that reads back equal, and listing the differences between two of them."""

import re
from collections.abc import Mapping
from typing import Any

from shortcut_cli.config.schema import CodecRecipe, Recipe

BARE = re.compile("[A-Za-z0-9_-]+")


def dump(recipe: Recipe | CodecRecipe) -> str:
    """The recipe as TOML text that `reading.read` reads back equal."""
    return document(recipe.model_dump())


def document(tree: Mapping[str, Any]) -> str:
    """A table of tables as TOML text that tomllib reads back equal; None, which TOML has not, is left out."""
    lines: list[str] = []

    def table(prefix: str, inner: Mapping[str, Any]) -> None:
        if prefix:
            lines.append(f"[{prefix}]")
        known = {key: value for key, value in inner.items() if value is not None}
        values = [f"{_key(key)} = {toml(value)}" for key, value in known.items() if not isinstance(value, dict)]
        lines.extend([*values, ""] if prefix or values else [])
        for key, value in known.items():
            if isinstance(value, dict):
                table(f"{prefix}.{_key(key)}" if prefix else _key(key), value)

    table("", tree)
    return "\n".join(lines)


def _key(name: str) -> str:
    return name if BARE.fullmatch(name) else toml(name)


def toml(value: Any) -> str:
    """A value of a recipe as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = "".join(
            f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else ("\\" + c if c in '\\"' else c) for c in value
        )
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ", ".join(toml(item) for item in value if item is not None) + "]"
    if isinstance(value, dict):  # in a list
        return "{" + ", ".join(f"{_key(key)} = {toml(item)}" for key, item in value.items() if item is not None) + "}"
    assert isinstance(value, int | float), f"no TOML form for {value!r}"
    return repr(value)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys that differ between two nested tables, each as "key: old -> new"."""
    lines: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines
