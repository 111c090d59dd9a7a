"""The house: imports point downward, heavy ones wait, each domain's library stands in one file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shortcut_cli

ROOT = Path(shortcut_cli.__file__).parent
FLOORS = {
    "errors": 0,
    "registry": 1,
    "recipe": 1,
    "files": 1,
    "inputs": 1,
    "workers": 1,
    "sealed": 2,
    "shards": 2,
    "composer": 2,
    "tokenizers": 2,
    "codec": 2,
    "models": 2,
    "batches": 3,
    "clips": 3,
    "loop": 3,
    "matching": 3,
    "metrics": 3,
    "pictures": 3,
    "statistics": 3,
    "optim": 3,
    "splits": 3,
    "checkpoint": 3,
    "generate": 3,
    "stages": 4,
    "pipeline": 5,
    "compare": 5,
    "demo": 5,
    "console": 5,
    "signals": 5,
    "cli": 5,
    "cell": 5,
}
ALONE = {"tokenizers": {"tokenizers", "codec"}, "models": {"models"}, "codec": {"codec"}, "stages": set()}
ONE_FILE = {
    "encodec": "codec/encodec.py",
    "miditok": "tokenizers/midi.py",
    "symusic": "tokenizers/midi.py",
    "sentencepiece": "tokenizers/text.py",
    "typer": "cli.py",
    "rich": "console.py",
}
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def imports(path, *, top_level_only=False):
    """(module, names) for each import statement of a file."""
    tree = ast.parse((ROOT / path).read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, []
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names]


def ours(path, **options):
    """The parts of the house that a file imports: ("tokenizers", "base"), ("errors", "") ..."""
    for module, names in imports(path, **options):
        parts = module.split(".")
        if parts[0] != "shortcut_cli":
            continue
        if len(parts) == 1:
            yield from ((name, "") for name in names if name != "__version__")
        elif len(parts) == 2 and parts[1] in ALONE:
            yield from ((parts[1], name) for name in names)
        else:
            yield parts[1], parts[2] if len(parts) > 2 else ""


def part_of(path):
    head = path.split("/")[0]
    return head.removesuffix(".py")


@pytest.mark.parametrize("path", [path for path in FILES if part_of(path) not in ("__init__", "__main__")])
def test_imports_point_downward(path):
    mine = part_of(path)
    for part, name in ours(path):
        assert FLOORS[part] <= FLOORS[mine], f"{path} imports {part}"
        if mine in ALONE and part in ALONE and FLOORS[part] == FLOORS[mine]:
            assert part in ALONE[mine], f"{path} imports {part}.{name}"


def test_every_file_has_a_floor():
    assert {part_of(path) for path in FILES} - {"__init__", "__main__"} == FLOORS.keys()


@pytest.mark.parametrize(("library", "home"), ONE_FILE.items())
def test_each_library_stands_in_one_file(library, home):
    users = {path for path in FILES for module, _ in imports(path) if module.split(".")[0] == library}
    assert users == {home}


@pytest.mark.parametrize("path", [path for path in FILES if FLOORS.get(part_of(path), 0) <= 1])
def test_the_lower_floors_know_neither_torch_nor_numpy(path):
    assert not {module.split(".")[0] for module, _ in imports(path)} & {"torch", "numpy"}


def run_fresh(code):
    """Run Python code in a process of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["recipes", "list"], ["train", "--help"]])
def test_the_command_line_loads_nothing_heavy(arguments):
    code = (
        "import sys\nfrom shortcut_cli.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'numpy', 'encodec', 'miditok', 'sentencepiece', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run_fresh(code)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]])
def test_help_is_drawn_without_rich(arguments):
    code = (
        f"import sys\nfrom shortcut_cli.cli import app\napp({arguments!r}, standalone_mode=False)\n"
        "assert 'rich.console' not in sys.modules and 'typer.rich_utils' not in sys.modules"
    )
    run_fresh(code)


def test_reading_a_recipe_loads_no_torch():
    code = "import sys\nfrom shortcut_cli import recipe\nrecipe.read('music')\nassert 'torch' not in sys.modules"
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
def test_a_slip_is_told_before_torch_is_loaded(tmp_path, monkeypatch, arguments, exit_code):
    monkeypatch.chdir(tmp_path)
    code = (
        f"import sys\nsys.argv = {['shortcut', *arguments]!r}\nfrom shortcut_cli import cli\ntry: cli.main()\n"
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
        "import sys\nfrom pathlib import Path\nfrom shortcut_cli import checkpoint, matching, recipe, registry\n"
        f"checkpoint.open_run(Path({str(text_run / 'shortcut' / 'run.pt')!r}), 'cpu')\n"
        "for name in registry.MODELS: matching.size(recipe.read('text-tiny', [f'model.name={name}']), 100)\n"
        "assert not {'torch._dynamo', 'sympy'} & set(sys.modules)"
    )
    run_fresh(code)
