"""Writing recipes as TOML that reads back equal, and listing the differences between two of them."""

from collections.abc import Mapping
from typing import Any

from shortcut_cli.config.schema import CodecRecipe, Recipe


def dump(recipe: Recipe | CodecRecipe) -> str:
    """The recipe as TOML text that `reading.read` reads back equal."""
    lines: list[str] = []

    def table(prefix: str, tree: Mapping[str, Any]) -> None:
        lines.append(f"[{prefix}]")
        lines.extend(f"{key} = {toml(value)}" for key, value in tree.items() if not isinstance(value, dict))
        lines.append("")
        for key, value in tree.items():
            if isinstance(value, dict):
                table(f"{prefix}.{key}", value)

    for name, tree in recipe.model_dump().items():
        table(name, tree)
    return "\n".join(lines)


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
        return "[" + ", ".join(toml(item) for item in value) + "]"
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
