"""What a shell may put for the word that its user completes with Tab: names, keys of recipes and their values.

No torch is loaded, and Pydantic only for the values of a key: keys are read from the recipes, which have all of them.
"""

import os
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shortcut_cli import files, registry
from shortcut_cli.cli.console import COMPLETION


def recipes(incomplete: str) -> list[str]:
    """Names of recipes; with none of them a shell goes on with files."""
    return _beginning(incomplete, sorted(path.stem for path in _folder().glob("*.toml")))


def models(incomplete: str) -> list[str]:
    """Names of architectures, also behind a comma."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in _beginning(last, registry.MODELS)]


def codecs(incomplete: str) -> list[str]:
    """Names of codecs, which a file may take the place of."""
    from shortcut_cli.codec import weights

    return _beginning(incomplete, weights.NAMES)


def settings(ctx: Any, incomplete: str) -> list[str]:
    """Keys of the recipe that the line names, with "="; behind it the values of a key that has a few."""
    tree = _tree(ctx.params)
    key, equals, begun = incomplete.partition("=")
    if not equals:
        return _beginning(incomplete, (f"{key}=" for key in dict.fromkeys(_keys(tree))))
    return [f"{key}={value}" for value in _beginning(begun, _values(tree, key))]


def _beginning(begun: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(begun)]


def _folder() -> Path:
    """As `reading.folder`, whose module would load Pydantic."""
    package = Path(__file__).parents[1]
    return inside if (inside := package / "recipes").is_dir() else package.parent / "recipes"


def _tree(given: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe of a command line: that of --recipe, of the domain; empty if neither is given."""
    if given.get("recipe"):
        return _read(str(given["recipe"]))
    if given.get("domain") in registry.DEFAULT_RECIPES:
        return _read(registry.DEFAULT_RECIPES[given["domain"]])
    return {}


def _read(name: str) -> dict[str, Any]:
    """A recipe by name or path; empty if it can't be read, of which the command itself will tell."""
    shipped = _folder() / f"{name}.toml"
    try:
        return tomllib.loads((shipped if shipped.is_file() else Path(name)).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}


def _keys(tree: Mapping[str, Any]) -> Iterator[str]:
    """The dotted keys of a recipe, and those that shipped recipes of its kind have beside them."""
    name = _name(tree, "tokenizer")
    if "codec" in tree:
        kin = ["codec-mini"]
    else:
        kin = (
            [registry.DEFAULT_RECIPES[name]]
            if name in registry.DEFAULT_RECIPES
            else [*registry.DEFAULT_RECIPES.values()]
        )
    for one in (tree, *map(_read, kin)):
        yield from _flat("", one)


def _flat(prefix: str, tree: Mapping[str, Any]) -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield prefix + key


def _name(tree: Mapping[str, Any], section: str) -> Any:
    table = tree.get(section)
    return table.get("name") if isinstance(table, dict) else None


def _values(tree: Mapping[str, Any], key: str) -> Iterable[str]:
    """The values that a key can have, if they are few."""
    if key in ("model.name", "tokenizer.name"):
        return registry.MODELS if key == "model.name" else registry.TOKENIZERS
    if key == "tokenizer.weights":
        return codecs("")
    from shortcut_cli.config import schema

    section, _, rest = key.partition(".")
    options, _, last = rest.partition(".")
    kinds: list[Any] = [schema.CodecRecipe if "codec" in tree else schema.Recipe]
    if section == "tokenizer":
        name = _name(tree, "tokenizer")
        every = [name] if name in registry.TOKENIZERS else registry.TOKENIZERS
        kinds, key = [registry.load(registry.TOKENIZERS, one).Options for one in every], rest
    elif section == "model" and options in registry.MODEL_OPTIONS:
        kinds, key = [registry.load(registry.MODEL_OPTIONS, options)], last
    elif section == "model":
        kinds, key = [schema.ModelConfig], rest
    return dict.fromkeys(value for kind in kinds for value in schema.choices(kind, key))


# Each shell gives the line up to the cursor. bash ends a word at "=" and ":" too, so what is before these is taken away
# from what it puts in. No space comes after a key's "=", behind which the value is completed.
SCRIPTS = {
    "bash": r"""
_shortcut_completion() {
    local IFS=$'\n' line="${COMP_LINE:0:COMP_POINT}" word="${COMP_WORDS[COMP_CWORD]}" whole
    [[ $word == [=:] ]] && word=
    whole="${line##*[[:space:]]}"
    COMPREPLY=( $( env _TYPER_COMPLETE_ARGS="$line" VARIABLE=complete_bash "$1" ) )
    COMPREPLY=( "${COMPREPLY[@]#"${whole%"$word"}"}" )
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace
    return 0
}

complete -o default -F _shortcut_completion shortcut
""",
    "zsh": r"""
#compdef shortcut

_shortcut_completion() {
    local -a found keys values shown
    found=( "${(@f)$(env _TYPER_COMPLETE_ARGS="${words[1,CURRENT]}" _TYPER_COMPLETE_FISH_ACTION=get-args \
        VARIABLE=complete_fish shortcut)}" )
    found=( ${found:#} )
    (( $#found )) || { _files; return }
    keys=( ${(M)found:#*=} )
    found=( ${found:#*=} )
    values=( "${(@)found%%$'\t'*}" )
    shown=( "${(@)found/$'\t'/  -- }" )
    (( $#keys )) && compadd -S '' -a keys
    (( $#found )) && compadd -l -d shown -a values
}

if [[ $funcstack[1] == _shortcut ]]; then
    _shortcut_completion "$@"
else
    compdef _shortcut_completion shortcut
fi
""",
}


def script(shell: str) -> str:
    """What sets completion up in a shell."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    own = SCRIPTS.get(shell, "").strip().replace("VARIABLE", COMPLETION)
    return own or str(get_completion_script(prog_name="shortcut", complete_var=COMPLETION, shell=shell))


def install(shell: str) -> Path:
    """Set completion up in a shell: the script in its own file, and a line, once, at the end of the user's own.

    That file is never written anew: it is the user's, and the disk may be full.
    """
    home = Path.home()
    own = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    path, settings, line = {
        "bash": (home / ".bash_completions" / "shortcut.sh", home / ".bashrc", "source {path}"),
        "zsh": (
            home / ".zfunc" / "_shortcut",
            Path(os.environ.get("ZDOTDIR") or home) / ".zshrc",
            "fpath+=~/.zfunc; autoload -Uz compinit; compinit",
        ),
        "fish": (own / "fish" / "completions" / "shortcut.fish", None, ""),
    }[shell]
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, f"{script(shell)}\n")
    line = line.format(path=shlex.quote(str(path)))
    if settings and line not in (settings.read_text(errors="replace").splitlines() if settings.is_file() else ()):
        with settings.open("a") as file:
            file.write(f"\n{line}\n")
    return path


def begin() -> None:
    """Let Typer answer the shell that asks, in the way of its own scripts: words, and the number of the last one."""
    from typer._click.shell_completion import split_arg_string
    from typer.completion import completion_init  # type: ignore[attr-defined]

    completion_init()
    line = os.environ.get("_TYPER_COMPLETE_ARGS")
    if line is not None and os.environ[COMPLETION] == "complete_bash":
        ended = not line or line[-1].isspace()
        os.environ |= {"COMP_WORDS": line, "COMP_CWORD": str(len(split_arg_string(line)) - (not ended))}
