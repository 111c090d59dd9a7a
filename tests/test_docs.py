"""Every command, recipe and key is in the documents, and README begins with the two commands."""

import importlib.util
import re
import tomllib
from pathlib import Path

import mutate
import pytest

from shortcut_cli import recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def key_table():
    """docs/recipes.md as it should be."""
    lines = [
        "# Recipe keys",
        "",
        "Every key that a recipe can have. `shortcut recipes show music` is a whole recipe.",
        "",
    ]
    lines += ["| key | meaning |", "|---|---|"]
    lines += [f"| `{key}` | {text} |" for key, text in recipe.keys().items()]
    lines += ["", "The recipe of a codec, `shortcut recipes show codec-mini`, has these.", ""]
    lines += ["| key | meaning |", "|---|---|"]
    lines += [f"| `{key}` | {text} |" for key, text in recipe.codec_keys().items()]
    return "\n".join(lines) + "\n"


def test_every_key_is_documented():
    assert (ROOT / "docs" / "recipes.md").read_text() == key_table()


def test_readme_begins_with_the_two_commands():
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.S | re.M)
    assert blocks[:2] == ["pip install -e . && shortcut demo\n", 'pip install -e ".[test]" && pytest\n']


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_is_named(name):
    assert f"`{name}`" in README


def test_every_command_is_named():
    from shortcut_cli.cli import app

    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    for group in app.registered_groups:
        commands |= {f"{group.name} {command.name}" for command in group.typer_instance.registered_commands}
    assert len(commands) >= 18
    for name in commands:
        assert f"shortcut {name}" in README


def test_every_option_is_named_in_readme():
    import typer.main

    from shortcut_cli.cli import app

    group = typer.main.get_command(app)
    inner = [command for one in group.commands.values() for command in getattr(one, "commands", {}).values()]
    options = {
        option
        for command in [*group.commands.values(), *inner]
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("-") and option not in ("--help",)
    }
    missing = {option for option in options if f"`{option}" not in README and f"{option} " not in README}
    assert not missing


def test_results_are_those_of_their_files():
    path = ROOT / "benchmarks" / "results.py"
    spec = importlib.util.spec_from_file_location("results", path)
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    written = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    names = sorted(found.parent.name for found in results.FOLDER.glob("*/compare.json"))
    assert names
    for name in names:
        assert "\n".join(results.tables(name)) in written
        assert (results.FOLDER / name / "compare.html").is_file()


def test_mutants_that_are_called_equivalent_are_of_the_code_as_it_is():
    found = mutate.equivalent()
    assert found
    for entry in found:
        package, code = ROOT / "shortcut_cli", mutate.bare(entry["code"])
        paths = package.rglob("*.py") if entry["module"] == "*" else [package / f"{entry['module']}.py"]
        assert any(code in mutate.bare(path.read_text()) for path in paths), entry
        assert entry["why"]
        assert mutate.differs(entry["module"], entry["code"], entry["code"] + " + 1", found)
        for now in entry["now"]:
            pair = (f"x = {entry.get('line', '')}{code}" for code in (entry["code"], now))
            assert not mutate.differs(entry["module"], *pair, found)


def test_modules_with_mutants_and_their_tests_are_there():
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutation"]["modules"]
    for module, arguments in modules.items():
        assert (ROOT / "shortcut_cli" / f"{module}.py").is_file()
        assert all((ROOT / argument).is_file() for argument in arguments if argument.startswith("tests/")), module


def test_an_equivalent_mutant_is_one_of_its_line_alone():
    listed = [{"module": "*", "line": "zip(", "code": "strict=True", "now": ["strict=False"]}]
    assert not mutate.differs("m", "zip(a, b, strict=True)", "zip(a, b, strict = False)", listed)
    assert mutate.differs("m", "Field(strict=True)", "Field(strict=False)", listed)
