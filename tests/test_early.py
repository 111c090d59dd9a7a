"""What is wrong with a command is said before torch is loaded, if the arguments and the file system are enough."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import shortcut

from shortcut_cli.inference.prompts import Given
from shortcut_cli.stages import early

REFUSED = """
import json, sys
from shortcut_cli.cli import commands
from shortcut_cli.errors import ShortcutError
for arguments in json.loads(sys.argv[1]):
    try:
        commands.dispatch(arguments)
    except ShortcutError as error:
        print(json.dumps([error.exit_code, error.message, "torch" in sys.modules]))
"""
LOOKED_AT = """
import json, sys
from shortcut_cli.cli import commands
from shortcut_cli.cli.signals import translated
from shortcut_cli.errors import ShortcutError
for arguments in json.loads(sys.argv[1]):
    try:
        commands.dispatch(arguments)
    except (ShortcutError, OSError) as error:
        shown = translated(error)
        print(json.dumps([shown.exit_code, shown.message]))
"""
SHARDS = "--recipe text-tiny --set data.shards=shards"
CASES = {
    "sample": "neither --ckpt nor --like",
    "sample --like none.json": "no such file",
    "sample --like none.json --seed 3": "takes the sampler's settings",
    "sample --ckpt gpt --temperature -1": "--temperature -1.0 is not valid",
    "sample --ckpt gpt --prompt none.txt": "none.txt does not exist",
    "sample --ckpt none": "none",
    "attention --ckpt gpt --prompt none.txt": "none.txt does not exist",
    "attention --ckpt gpt --shards none": "none is not a shards folder",
    "eval --ckpt gpt --shards none": "none is not a shards folder",
    "eval --ckpt gpt --files none": "none does not exist",
    "prepare text none --out s": "none does not exist",
    "run --recipe text-tiny none": "none does not exist",
    "compare --recipe text-tiny --models gtp": "--models: unknown architecture 'gtp'",
    "compare --recipe text-tiny --models gpt --lrs x": "is not a list of numbers",
    "codec train none": "none does not exist",
    "codec eval mini none": "none does not exist",
    "train --recipe text-tiny --model gtp": "unknown architecture 'gtp'",
    "train --recipe text-tiny --init-from none": "",
    # A value that can't be right
    "demo --device gpu": "device 'gpu' can't be used",
    "train --recipe text-tiny --device CUDA": "device 'CUDA' can't be used",
    "eval --ckpt gpt --device cpu,cpu": "device 'cpu,cpu' can't be used",
    "sample --ckpt gpt --device x": "device 'x' can't be used",
    "attention --ckpt gpt --device cuda:x": "device 'cuda:x' can't be used",
    "run --recipe text-tiny texts --device tpu": "device 'tpu' can't be used",
    "prove resume --recipe text-tiny --device tpu": "device 'tpu' can't be used",
    "codec train texts --device tpu": "device 'tpu' can't be used",
    "compare --recipe text-tiny --models gpt --device cpu,tpu": "device 'tpu' can't be used",
    "compare --recipe text-tiny --models gpt --device ,": "--device ',' names nothing",
    "compare --recipe text-tiny --models gpt --ladder 7,wide": "--ladder",
    "compare --recipe text-tiny --models gpt --ladder 48,72": "rungs with the recipe's own",
    "compare --recipe text-tiny --models gpt --ladder 48,72 --match none": "--ladder needs a cost",
    "compare --recipe text-tiny --models gpt --contrast gpt": "does not name two models",
    "compare --recipe text-tiny --models gpt --contrast mudd:gpt": "'mudd' is not among --models",
    "compare --recipe text-tiny --models gpt --contrast gpt:gpt": "gpt is compared with itself",
    "compare --recipe text-tiny --models gpt --seeds 3 --most-seeds 2": "--most-seeds 2 is less than --seeds 3",
    "compare --recipe text-tiny --models gpt --margin nan": "--margin",
    "compare --recipe text-tiny --models gpt --task 3/2": "--task '3/2' is not I/N",
    "run --recipe text-tiny texts --max-bad few": "--max-bad few",
    "eval --ckpt gpt --files texts --max-bad few": "--max-bad few",
    "prepare text texts --max-bad few --out s": "--max-bad few",
    "prepare text texts --task 0/1 --out s": "--task '0/1' is not I/N",
    # What is in the way, or is not there
    "report none": "none does not exist",
    "report gpt none": "none does not exist",
    "report gpt --out texts": "texts is a folder",
    "runs none": "none does not exist",
    "diff gpt none": "none does not exist",
    "inspect none": "none does not exist",
    "demo --out texts": "texts is not empty, and was not made by `shortcut demo`",
    "demo --out gpt": "gpt belongs to `shortcut train`",
    "run --recipe text-tiny texts --out texts": "texts is not empty",
    "codec train texts --out gpt": "gpt belongs to `shortcut train`",
    f"train {SHARDS} --out texts": "texts is not empty",
    f"compare {SHARDS} --models gpt --out texts": "texts is not empty",
    f"prove resume {SHARDS} --out texts": "texts is not empty",
    "demo --out gpt/run.pt": "gpt/run.pt is a file",
    "codec eval none texts": "'none' is neither a file nor one of",
    "recipes copy text-tiny gpt/recipe.toml": "exists already",
    # A folder without a checkpoint
    "eval --ckpt texts": "the folder 'texts' has no run.pt",
    "sample --ckpt texts": "the folder 'texts' has no run.pt",
    "attention --ckpt texts": "the folder 'texts' has no run.pt",
    "diff gpt texts": "the folder 'texts' has no run.pt",
    f"train {SHARDS} --init-from texts": "the folder 'texts' has no run.pt",
    "codec eval texts texts": "'texts' is a folder",
    "eval --ckpt texts/run.pt": "the folder 'texts' has no run.pt",
    "eval --ckpt gpt/none.pt": "gpt/none.pt does not exist",
    "inspect texts": "texts is not a shards folder",
}


def test_what_the_arguments_alone_show_is_said_before_torch_is_loaded(text_run):
    arguments = json.dumps([shlex.split(line) for line in CASES])
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, arguments], cwd=text_run, capture_output=True, text=True, check=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(CASES), done.stderr
    for (line, words), (code, message, heavy) in zip(CASES.items(), found, strict=True):
        assert code == (5 if "can't be used" in words else 2), (line, code)
        assert words in message, (line, message)
        assert not heavy, line


LOCKED = [
    *("train --recipe locked/a.toml", "recipes show locked/a.toml", "recipes copy locked/a.toml b.toml"),
    *("recipes copy text locked/a.toml", "prepare text locked/a.txt --out s", "prepare text 'locked/*.txt' --out s"),
    *("run --recipe text-tiny locked/a.txt", "train --recipe text-tiny --set data.shards=locked/s"),
    *(
        f"train {SHARDS} --out locked/r",
        f"train {SHARDS} --init-from locked/r",
        f"compare {SHARDS} --models gpt --out locked/c",
    ),
    *("eval --ckpt locked/r", "eval --ckpt locked/run.pt", "eval --ckpt gpt --shards locked/s"),
    *(
        "eval --ckpt gpt --files locked/a.txt",
        "sample --ckpt gpt --prompt locked/a",
        "sample --ckpt gpt --prompt locked/a.txt",
    ),
    *("sample --like locked/a.json", "attention --ckpt locked/r", "inspect locked/s", "inspect locked/a.toml"),
    *("report locked/r", "runs locked/r", "diff locked/r gpt", "codec eval locked/codec.pt texts"),
    *("codec train locked/a.wav", "prove tokens locked/s", "prove tokens shards locked/a.txt"),
]


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may read and write everywhere")
def test_what_lies_in_a_folder_that_lets_nobody_in_is_not_said_to_be_missing(text_run, tmp_path):
    # Root drops the capabilities that let it ignore permissions.
    as_others = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    for name in ("shards", "gpt", "texts"):
        (tmp_path / name).symlink_to(text_run / name)
    (tmp_path / "locked").mkdir(mode=0)
    command = [*as_others, sys.executable, "-c", LOOKED_AT, json.dumps([shlex.split(line) for line in LOCKED])]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(LOCKED), done.stderr
    for line, (code, message) in zip(LOCKED, found, strict=True):
        assert code in (1, 2), line
        assert "Permission denied" in message, (line, message)
        assert "locked" in message, (line, message)
        assert "exist" not in message, (line, message)


@pytest.fixture
def sampled(text_run, tmp_path):
    """A run with two samples of seed 1, made by the real command."""
    shutil.copytree(text_run / "gpt", tmp_path / "gpt", ignore=shutil.ignore_patterns("samples"))
    shortcut("sample", "--ckpt", "gpt", "-n", 2, "--tokens", 5, "--seed", 1, "--no-report", cwd=tmp_path)
    return tmp_path


def test_samples_in_the_way_are_known_before_torch_is_loaded_and_the_next_command_takes_a_free_seed(sampled):
    def way(*options, prompt=None, **given):
        from shortcut_cli.cli.commands import _settings

        names = {"-n": "n", "--tokens": "tokens", "--seed": "seed", "--temperature": "temperature"}
        flags = {f"sample__{names[flag]}": (flag, value) for flag, value in options}
        return early.in_the_way(
            sampled / "gpt" / "run.pt", Given(prompt, **given), _settings(None, **flags), sampled / "gpt" / "samples"
        )

    same = (("-n", 2), ("--tokens", 5), ("--seed", 1))
    assert way(*same) is None  # they are there already, which is no error
    assert way(*same[:2], ("--seed", 2)) is None
    first = sampled / "gpt" / "samples" / "sample-1-000.txt"
    assert way(*same, ("--temperature", 0.5)) == (first, 2)
    assert way(*same, prompt="Once") == (first, 2)
    assert way(*same, prompt="Once", only_new=True) == (first, 2)
    (sampled / "gpt" / "samples" / "sample-1-000.txt.json").write_text("{")
    assert way(*same, prompt="Once")[0].name == "sample-1-001.txt"
    for path in (sampled / "gpt" / "samples").glob("*.json"):
        path.unlink()
    assert way(*same, prompt="Once") is None
    assert early.in_the_way(sampled / "gpt" / "run.pt", Given(), [], sampled / "none") is None


def test_the_next_command_of_samples_in_the_way_works_as_pasted(sampled):
    done = shortcut("sample", "--ckpt", "gpt", "-n", 1, "--tokens", 5, "--seed", 1, cwd=sampled, check=2)
    last = done.stderr.splitlines()[-1]
    assert last == "Next: shortcut sample --ckpt gpt -n 1 --tokens 5 --seed 1 --seed 2"
    shortcut(*shlex.split(last.removeprefix("Next: "))[1:], "--no-report", cwd=sampled)
    assert (sampled / "gpt" / "samples" / "sample-2-000.txt").is_file()
