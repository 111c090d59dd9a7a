"""The architecture: rooms import only rooms below them, heavy imports wait, a library is used in one file."""

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TEXT_SETTINGS

import shortcut_cli

ROOT = Path(shortcut_cli.__file__).parent
# A room is a folder of the package, or a module beside the folders. From the ground up: each may import the rooms that
# its row names, which come before it, so imports point downward and rooms form no cycle.
ROOMS = {
    "cleanup": "",
    "errors": "",
    "accounts": "",
    "events": "",
    "formatting": "",
    "files": "cleanup errors",
    "registry": "errors",
    "config": "errors files registry",
    "kept": "errors events formatting files config",
    "data": "cleanup errors formatting files registry",
    "kernels": "",
    "models": "errors config kernels",
    "training": "errors events formatting files registry config kept data kernels models",
    "codec": "errors accounts events formatting files registry config kept data training",
    "tokenizers": "errors events formatting files config data codec",
    "inference": "errors events files registry config data kernels models training tokenizers",
    "plots": "formatting files tokenizers inference",
    "compare": "cleanup errors events formatting files registry config kept models training",
    "demo": "",
    "report": "accounts errors events formatting files registry config kept data models training codec tokenizers "
    "inference plots",
    "stages": "cleanup errors events formatting files registry config kept data models training codec tokenizers "
    "inference plots compare demo report",
    "cli": "cleanup errors accounts events formatting files registry config kept training codec inference compare "
    "stages",
}
CALLS_STAGES = {"stages/pipeline.py", "stages/demo.py"}  # stages that run other stages
NAMES_MODULES = {"registry.py", "compare/runner.py"}  # they load or start modules of rooms above them, by name
ONE_FILE = {
    "encodec": "codec/encodec.py",
    "miditok": "tokenizers/midi.py",
    "symusic": "tokenizers/midi_reading.py tokenizers/midi_scores.py",
    "sentencepiece": "tokenizers/text_vocabulary.py",
    "typer": "cli/commands.py cli/completion.py cli/helptext.py",
    "rich": "cli/bars.py cli/console.py",
    "fsspec": "data/objects.py",
    "huggingface_hub": "data/hub.py",
    "pebble": "data/workers.py",
    "jinja2": "report/page.py",
    "ray": "data/executors.py",
    "submitit": "data/executors.py",
    "scipy": "compare/ladder.py compare/looks.py compare/significance.py",
}
LIGHT = re.compile(
    r"(__init__|__main__|accounts|cleanup|errors|events|formatting|files|registry)\.py|(config|kept)/.*"
    r"|data/(__init__|workers)\.py"
)
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def imports(path):
    """(module, names) for each import statement of a file, those inside functions too."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, []
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names]


def ours(path):
    """The files of the package that a file imports, as "tokenizers/base.py" or "errors.py"."""
    for module, names in imports(path):
        package, _, rest = module.partition(".")
        if package == "shortcut_cli":
            place = ROOT / rest.replace(".", "/")
            files = [place / f"{name}.py" for name in names] if place.is_dir() else [place.with_suffix(".py")]
            for file in files or [place / "__init__.py"]:
                found = file if file.is_file() else place / "__init__.py"  # a name that is no module
                if found != ROOT / "__init__.py":  # the version, which any room may import
                    yield found.relative_to(ROOT).as_posix()


def room(path):
    return path.split("/")[0].removesuffix(".py")


def test_every_file_is_in_a_room():
    assert {room(path) for path in FILES} - {"__init__", "__main__"} == ROOMS.keys()


def test_the_table_lists_rooms_from_the_ground_up():
    names = list(ROOMS)
    for name, allowed in ROOMS.items():
        assert set(allowed.split()) <= set(names[: names.index(name)]), name


def test_the_diagram_of_the_documents_has_the_rooms_in_that_order():
    text = (ROOT.parent / "docs" / "architecture.md").read_text()
    (diagram,) = re.findall(r"^```text\n(cli\n.*?)^```", text, re.S | re.M)
    lines = diagram.splitlines()
    assert sorted(diagram.split()) == sorted(ROOMS)
    for number, line in enumerate(lines):
        below = " ".join(lines[number + 1 :]).split()
        assert all(set(ROOMS[name].split()) <= set(below) for name in line.split()), line


@pytest.mark.parametrize("name", ROOMS)
def test_imports_point_downward(name):
    for path in (path for path in FILES if room(path) == name):
        above = [file for file in ours(path) if room(file) not in {name, *ROOMS[name].split()}]
        assert not above, f"{path} imports {above}"


def test_no_files_import_each_other_in_a_cycle():
    list(graphlib.TopologicalSorter({path: set(ours(path)) for path in FILES}).static_order())


@pytest.mark.parametrize("path", [path for path in FILES if room(path) == "stages" and path not in CALLS_STAGES])
def test_a_stage_imports_no_other_stage(path):
    assert not [file for file in ours(path) if room(file) == "stages"]


def expressions(path):
    """The regular expressions of a file: those that it keeps, and those that it writes into a call."""
    module = importlib.import_module("shortcut_cli." + path.removesuffix(".py").replace("/", "."))
    yield from (value.pattern for value in vars(module).values() if isinstance(value, re.Pattern))
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            written = node.args[0]
            if getattr(node.func.value, "id", "") == "re" and isinstance(written, ast.Constant):
                yield written.value


def test_no_regular_expression_is_possessive():
    """Before Python 3.11.5 such a match can end in the middle (https://github.com/python/cpython/pull/108004)."""
    found = [(path, each) for path in FILES if path != "__main__.py" for each in expressions(path)]
    possessive = [pair for pair in found if re.search("POSSESSIVE|ATOMIC", repr(re._parser.parse(pair[1])))]
    assert len(found) > 50
    assert not possessive
    assert re.search("POSSESSIVE", repr(re._parser.parse("a(b[c]?+)*")))


def test_only_two_files_name_modules_in_strings():
    nodes = {path: ast.walk(ast.parse((ROOT / path).read_text())) for path in FILES}
    texts = {path: [node.value for node in nodes[path] if isinstance(node, ast.Constant)] for path in FILES}
    named = re.compile(r"shortcut_cli(\.\w+)+(:\w+)?")
    assert {path for path in FILES if any(named.fullmatch(str(text)) for text in texts[path])} == NAMES_MODULES


@pytest.mark.parametrize(("library", "home"), ONE_FILE.items())
def test_each_library_is_used_in_one_file(library, home):
    users = {path for path in FILES for module, _ in imports(path) if module.split(".")[0] == library}
    assert users == set(home.split())


@pytest.mark.parametrize("path", [path for path in FILES if LIGHT.fullmatch(path)])
def test_the_lower_rooms_know_neither_torch_nor_numpy(path):
    assert not {module.split(".")[0] for module, _ in imports(path)} & {"torch", "numpy"}


def run_fresh(code):
    """Run Python code in a new process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["recipes", "list"], ["train", "--help"], ["runs", "--help"]]
)
def test_the_command_line_loads_nothing_heavy(arguments):
    code = (
        "import sys\nfrom shortcut_cli.cli.commands import app\n"
        f"try: app({arguments!r})\nexcept SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'numpy', 'encodec', 'miditok', 'sentencepiece', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run_fresh(code)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]])
def test_help_is_drawn_without_rich(arguments):
    code = (
        f"import sys\nfrom shortcut_cli.cli.commands import app\napp({arguments!r}, standalone_mode=False)\n"
        "assert 'rich.console' not in sys.modules and 'typer.rich_utils' not in sys.modules"
    )
    run_fresh(code)


def test_reading_a_recipe_loads_no_torch():
    code = (
        "import sys\nfrom shortcut_cli.config import reading\nreading.read('music')\nassert 'torch' not in sys.modules"
    )
    run_fresh(code)


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (["train", "--recipe", "musik"], 2),
        (["train", "--recipe", "music", "--set", "train.stepz=1"], 2),
        (["train", "--recipe", "music", "--model", "rnn"], 2),
        (["run", "--recipe", "music", "--set", "train.steps=many", "."], 2),
        (["compare", "--recipe", "music", "--models", "shortcut", "--lrs", "a"], 2),
        (["codec", "train", ".", "--recipe", "music"], 2),
        (["prove", "resume", "--recipe", "musik"], 2),
        (["eval", "--ckpt", "missing.pt"], 2),
        (["sample", "--ckpt", "missing.pt"], 2),
        (["attention", "--ckpt", "missing.pt"], 2),
        (["inspect", "missing.pt"], 2),
        (["recipes", "check", "music"], 0),
    ],
)
def test_a_slip_is_reported_before_torch_is_loaded(tmp_path, monkeypatch, arguments, exit_code):
    monkeypatch.chdir(tmp_path)
    code = (
        f"import sys\nsys.argv = {['shortcut', *arguments]!r}\nfrom shortcut_cli.cli import commands\n"
        "try: commands.main()\n"
        f"except SystemExit as end: assert (end.code or 0) == {exit_code}, end.code\nassert 'torch' not in sys.modules"
    )
    run_fresh(code)


def test_shards_are_inspected_without_torch(text_run):
    code = (
        "import sys\nfrom pathlib import Path\nfrom shortcut_cli.stages import inspection\n"
        f"inspection.inspect(Path({str(text_run / 'shards')!r}), verify=True)\nassert 'torch' not in sys.modules"
    )
    run_fresh(code)


def test_a_run_is_opened_and_models_are_counted_without_torchs_compiler(text_run):
    """Importing it takes about as long as importing torch."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom shortcut_cli import registry\n"
        "from shortcut_cli.compare import baselines\nfrom shortcut_cli.config import reading\n"
        "from shortcut_cli.inference import runs\n"
        f"runs.open_run(Path({str(text_run / 'shortcut' / 'run.pt')!r}), 'cpu')\n"
        "for name in registry.MODELS: baselines.size(reading.read('text-tiny', [f'model.name={name}']), 100)\n"
        "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    )
    run_fresh(code)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_that_stops_and_goes_on_loads_no_compiler(text_run, tmp_path, optimizer):
    keys = [*TEXT_SETTINGS, f"data.shards={text_run / 'shards'}", f"train.optimizer={optimizer}", "train.steps=4"]
    code = f"""if True:
        import sys
        from contextlib import nullcontext
        from pathlib import Path
        from shortcut_cli.config import reading
        from shortcut_cli.errors import Interrupted
        from shortcut_cli.stages.training import train
        config, folder = reading.read("text-tiny", {keys!r}), Path({str(tmp_path / "run")!r})
        how = {{"device": "cpu", "resume": "auto", "report": lambda event: None}}
        try:
            train(config, folder, stop=nullcontext(lambda: 75), **how)
        except Interrupted:
            train(config, folder, stop=nullcontext(lambda: None), **how)
        assert (folder / "run.pt").exists()
        assert not {{"torch._dynamo", "sympy"}} & set(sys.modules)"""
    run_fresh(code)


def test_only_the_trainer_of_a_codec_knows_how_training_works():
    """The room `codec` may import `training` for files of tensors; its loop and optimizer stay away from tokenizers."""
    how = {"training/loop.py", "training/optim.py", "training/run_log.py"}
    mine = {path for path in FILES if room(path) == "codec" and how & set(ours(path))}
    assert mine == {"codec/trainer.py", "codec/discriminator.py"}
    assert not [path for path in FILES if room(path) == "tokenizers" and mine & set(ours(path))]
