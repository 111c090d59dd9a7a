"""Accounts: every key that the sources count is listed with its meaning, and shown within 80 columns."""

import ast
from pathlib import Path

import pytest
from conftest import shortcut

import shortcut_cli
from shortcut_cli import accounts
from shortcut_cli.cli import console, tables
from shortcut_cli.cli.commands import app
from shortcut_cli.stages import codec_evaluation, pipeline

ROOT = Path(shortcut_cli.__file__).parent
COUNTERS = {"account", "mended", "repairs", "found", "left"}  # what the sources call an account that they fill
NAMES = ("data/sound.py", "tokenizers/encoding.py", "tokenizers/midi*.py", "tokenizers/text*.py")
FILES = [path for name in NAMES for path in ROOT.glob(name)]


def is_account(node):
    return ast.unparse(node).rpartition(".")[2] in COUNTERS


def texts(node):
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)}


def counted(tree):
    """The keys that a source writes into accounts, however it does that."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and is_account(node.value):
            chosen = [node.slice.body, node.slice.orelse] if isinstance(node.slice, ast.IfExp) else [node.slice]
            yield from (text for each in chosen for text in texts(each))
        elif isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(is_account(target) for target in targets):
                dicts = [each for each in ast.walk(node.value) if isinstance(each, ast.Dict)]
                yield from (text for each in dicts for key in each.keys if key for text in texts(key))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "Account":
            yield from (keyword.arg for keyword in node.keywords)
        elif isinstance(node, ast.Call) and node.args and is_account(node.args[0]):
            yield from (text for argument in node.args[1:2] for text in texts(argument))


def test_every_key_that_is_counted_is_listed_and_no_other():
    trees = [ast.parse(path.read_text()) for path in FILES]
    found = {key for tree in trees for key in counted(tree)}
    # Some keys are chosen in a table or a function before they are counted.
    found |= {text for tree in trees for text in texts(tree) if text.endswith("_dropped")}
    assert found - {"units", "account"} == set(accounts.ENTRIES)


def test_the_keys_of_a_domain_belong_to_no_other_and_say_what_their_amount_is():
    assert len(accounts.ENTRIES) == sum(map(len, accounts.DOMAINS.values()))
    for key, entry in accounts.ENTRIES.items():
        assert entry.unit, key
        if entry.unit in ("beats", "seconds"):
            assert entry.unit in key, key
            assert entry.unit in entry.label, key
        assert key.endswith("_max") == ("most" in entry.label or "largest" in entry.label), key


def test_rows_come_in_a_fixed_order_with_means_and_unknown_keys_last():
    account = {
        "odd_things": 3,
        "onset_moved_beats": 2.0,
        "notes_out": 8,
        "onset_moved_beats_max": 0.5,
        "tempos_rounded": 1,
    }
    assert [*accounts.rows(account)] == [
        ("notes in the ids", 8, None),
        ("  moved by at most, in beats", 0.5, None),
        ("  moved by, in beats", 2.0, 0.25),
        ("tempos rounded to one that has a token", 1, None),
        ("odd things", 3, None),
    ]
    assert [*accounts.rows({"notes_shortened": 1})] == [("notes made shorter", 1, None)]


@pytest.mark.parametrize("domain", accounts.DOMAINS)
def test_each_line_fits_into_eighty_columns(domain, capsys):
    """However large the amounts are; a folder without an account shows none."""
    (table,) = tables.account({"account": dict.fromkeys(accounts.DOMAINS[domain], 1_234_567_890)})
    console._console(width=80).print(table)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(accounts.DOMAINS[domain]) + 5  # a title, three lines above and one below
    assert max(map(len, lines)) <= 80
    assert [*tables.account({"account": {}})] == [*tables.account({})] == []


def test_prepare_and_inspect_show_the_account(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffa b c")
    command = ["prepare", "text", "a.txt", "--recipe", "text-tiny", "--out", "shards"]
    for arguments in ([*command, "--set", "tokenizer.algorithm=chars"], ["inspect", "shards"]):
        shown = shortcut(*arguments, cwd=tmp_path).stdout
        assert [line.split()[1:-2] for line in shown.splitlines() if "marks" in line] == [
            ["byte", "order", "marks", "left", "out", "│"]
        ]


def scored(account=()):
    keys = ("documents", "tokens", "nats_per_token", "interval_over", "interval_95", "unigram_entropy", "perplexity")
    result = dict.fromkeys((*keys, "accuracy", "bits_per_unit", "bits_per_unit_interval_95"), 1)
    return result | {"unit": "note", "split": "files", **({"account": account} if account else {})}


@pytest.mark.parametrize(
    ("arguments", "stage", "result"),
    [
        (
            ["run", "--recipe", "music", "."],
            (pipeline, "run_all"),
            {"prepare": {"account": {"notes_closed": 7}}, "train": {"run": "r"}, "eval": scored(), "samples": []},
        ),
        (["eval", "--ckpt", "run.pt", "--files", "."], (pipeline, "score_files"), scored({"notes_closed": 7})),
        (
            ["codec", "eval", "mini", "."],
            (codec_evaluation, "evaluate"),
            {"files": 1, "rejects": [], "seconds": 1, "encode_x_realtime": 1, "decode_x_realtime": 1, "perplexity": []}
            | {"bandwidths": [], "opus": {}, "weights": "mini", "account": {"notes_closed": 7}},
        ),
    ],
)
def test_every_command_that_reads_files_shows_the_account(tmp_path, monkeypatch, capsys, arguments, stage, result):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(*stage, lambda *_, **__: result)
    monkeypatch.setattr("shortcut_cli.training.tensor_file.recognise", lambda *_: None)
    app(arguments, standalone_mode=False)
    assert "notes without an end that were ended │      7 │" in capsys.readouterr().out


def test_the_most_that_a_thing_was_changed_stands_right_below_its_number():
    account = {"notes_out": 10, "onset_moved_beats": 2.5, "onsets_moved": 4, "onset_moved_beats_max": 0.25}
    account |= {"velocity_changed_steps": 7, "velocity_changed_steps_max": 2, "velocities_changed": 5}
    assert [label for label, *_ in accounts.rows(account)] == [
        "notes in the ids",
        "notes that begin earlier or later",
        "  moved by at most, in beats",
        "  moved by, in beats",
        "notes made louder or softer",
        "  velocity changed by at most, of 127",
        "  velocity changed by, of 127",
    ]
