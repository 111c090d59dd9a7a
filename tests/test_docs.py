"""The documents match the code: commands, recipes, keys, files, results, links, words."""

import json
import re
import statistics
import tomllib
from pathlib import Path

import generate
import mutate
import pytest
import results

from shortcut_cli.config import reading

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "shortcut_cli"
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "benchmarks" / "RESULTS.md").read_text()
DOCUMENTS = sorted(
    path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/RESULTS.md")]
)
LIVING = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]  # that one tells of what is gone, too
# Words for which the field has better ones, in what users read.
FORMER = r"trunk|mass|opponents?|cells?|guides?|surveys?|end id|is closed|exchanged for|nats a token|bytes a token"


def test_generated_parts_are_up_to_date():
    for path, text in generate.documents().items():
        assert path.read_text() == text, "python docs/generate.py"


def test_every_generated_part_is_in_a_document():
    written = "".join(path.read_text() for path in generate.documents())
    assert all(f"<!-- generated: {name} -->" in written for name in generate.parts())


def test_the_tree_has_every_file():
    text = (ROOT / "docs" / "architecture.md").read_text()
    (tree,) = re.findall(r"^```text\nshortcut_cli/\n(.*?)^```", text, re.S | re.M)
    listed, folder = [], ""
    for line in tree.splitlines():
        indent, name, says = re.fullmatch(r"( +)(\S+) +(\S.*)", line).groups()
        assert says
        folder = name if name.endswith("/") else folder if len(indent) == 4 else ""
        listed.append(folder + "__init__.py" if name == folder else folder + name)
    assert sorted(listed) == sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_to_files(document):
    prose = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.S | re.M)
    links = re.findall(r"\]\((?!http|#)([^)#]+)", prose)
    missing = [link for link in links if not (ROOT / document).parent.joinpath(link).exists()]
    assert not missing


@pytest.mark.parametrize("document", LIVING, ids=str)
def test_files_that_are_named_are_there(document):
    named = re.findall(r"`(?:python )?((?:[a-z_]+/)+\w+\.(?:py|md|toml))`", (ROOT / document).read_text())
    missing = [
        name for name in named if not any((root / name).exists() for root in (ROOT, PACKAGE)) and "NAME" not in name
    ]
    assert not missing


def test_numbers_of_readme_are_in_results():
    numbers = re.findall(r"(?<![\d.])\d+\.\d{3,}", README.replace("arXiv 2409.10870", ""))
    assert len(numbers) > 20
    assert [number for number in numbers if number not in RESULTS] == []


def said(name):
    """What the prose says of a comparison, to three digits of the values in compare.json.

    The loss of each arm; differences with intervals by arm and what it is held against; the arms of which there is a
    verdict. What is rounded twice, 3.263476 by way of 3.2635, is wrong.
    """
    found = json.loads((ROOT / "benchmarks" / "results" / name / "compare.json").read_text())
    arms = [arm for arm in found["arms"] if not arm["label"].startswith("gpt-")]
    losses = {arm["label"]: f"{statistics.fmean(arm['nats_per_token']):.3f}" for arm in arms}
    differences = {}
    for one in [*found["contrasts"], found["aa"]]:
        mean, low, high = (f"{x:+z.3f}".replace("+0.000", "0.000") for x in (one["mean"], *one["interval_95"]))
        differences[one["arm"], one["baseline"]] = (mean, f"[{low}, {high}]")
    verdicts = {one["arm"] for one in found["contrasts"] if one["baseline"] == "ladder" and one["p"] < one["level"]}
    return losses, differences, verdicts


@pytest.mark.parametrize("name", ["speech", "text", "piano-4m", "piano", "piano-192"])
def test_numbers_of_a_comparison_are_rounded_once(name):
    losses, differences, _ = said(name)
    section = " ".join(RESULTS.split(f"<!-- generated: results/{name} -->")[0].rpartition("\n## ")[2].split())
    expected = [f"`{arm}` {loss}" for arm, loss in losses.items()]
    expected += [
        f"`{arm}` {mean} {interval}"
        for (arm, other), (mean, interval) in differences.items()
        if other == "ladder" and arm != "twin"
    ]
    assert [words for words in expected if words not in section] == []
    if ("shortcut", "shortcut_local") in differences:
        low, high = re.findall(r"[+-]?\d\.\d+", differences["shortcut", "shortcut_local"][1])
        assert f"[{low}, {high}]" in section or f"({low} to {high})" in section


def test_numbers_of_the_table_of_readme_are_rounded_once_and_bold_if_there_is_a_verdict():
    found = [said(name) for name in ("piano-4m", "text", "speech")]
    for arm in found[0][0]:
        (row,) = re.findall(rf"^\| `{arm}`.*", README.split("## One result per domain")[0], re.M)
        cells = []
        for losses, differences, verdicts in found:
            mean, interval = differences.get((arm, "ladder"), ("", ""))
            cells += [losses[arm], f"**{mean}** {interval}" if arm in verdicts else f"{mean} {interval}".strip()]
        assert [cell.strip() for cell in row.split("|")[2:-1]] == cells
    for _, differences, _ in found:
        assert differences["shortcut", "shortcut_local"][1] in README


@pytest.mark.parametrize("document", LIVING, ids=str)
def test_former_words_are_gone_from_the_documents(document):
    assert re.findall(rf"\b(?:{FORMER})\b", (ROOT / document).read_text()) == []


def commands():
    """(name, command) of every command."""
    import typer.main

    from shortcut_cli.cli.commands import app

    return list(generate.members(typer.main.get_command(app), "shortcut"))


def test_former_words_are_gone_from_the_help():
    contexts = [(command, command.make_context(name, [], resilient_parsing=True)) for name, command in commands()]
    texts = " ".join(command.get_help(context) for command, context in contexts)
    assert re.findall(rf"\b(?:{FORMER})\b", texts) == []


def test_readme_begins_with_the_two_commands():
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.S | re.M)
    assert blocks[:2] == ["pip install -e . && shortcut demo\n", 'pip install -e ".[test]" && pytest\n']


@pytest.mark.parametrize("name", reading.names())
def test_every_recipe_is_named(name):
    assert f"`{name}`" in README


def test_every_command_is_named():
    assert len(commands()) >= 18
    for name, _ in commands():
        assert name in README


def test_every_option_is_named_in_readme():
    options = {
        option
        for _, command in commands()
        for parameter in command.params
        for option in parameter.opts
        if option.startswith("-") and option not in ("--help",)
    }
    missing = {option for option in options if f"`{option}" not in README and f"{option} " not in README}
    assert not missing


def test_results_are_those_of_their_files():
    assert len(results.names()) >= 4
    for name in results.names():
        assert "\n".join(results.tables(name)) in RESULTS


def test_mutants_that_are_called_equivalent_are_of_the_code_as_it_is():
    found = mutate.equivalent()
    assert found
    for entry in found:
        code = mutate.bare(entry["code"])
        paths = PACKAGE.rglob("*.py") if entry["module"] == "*" else [PACKAGE / f"{entry['module']}.py"]
        assert any(code in mutate.bare(path.read_text()) for path in paths), entry
        assert entry["why"]
        assert mutate.differs(entry["module"], entry["code"], entry["code"] + " + 1", found)
        for now in entry["now"]:
            pair = (f"x = {entry.get('line', '')}{code}" for code in (entry["code"], now))
            assert not mutate.differs(entry["module"], *pair, found)


def test_modules_with_mutants_and_their_tests_are_there():
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutation"]["modules"]
    for module, arguments in modules.items():
        assert (PACKAGE / f"{module}.py").is_file()
        files = [argument.partition("::")[0] for argument in arguments if argument.startswith("tests/")]
        assert files, module
        assert all((ROOT / file).is_file() for file in files), module
        for file, _, name in (argument.partition("::") for argument in arguments if "::" in argument):
            assert f"def {name}(" in (ROOT / file).read_text(), module


def test_an_equivalent_mutant_is_only_that_of_its_line():
    listed = [{"module": "*", "line": "zip(", "code": "strict=True", "now": ["strict=False"]}]
    assert not mutate.differs("m", "zip(a, b, strict=True)", "zip(a, b, strict = False)", listed)
    assert mutate.differs("m", "Field(strict=True)", "Field(strict=False)", listed)
