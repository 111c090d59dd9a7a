"""Values as people read them, and as JSON."""

import ast
import json
import unicodedata
from pathlib import Path

import pytest

import shortcut_cli
from shortcut_cli.formatting import alike, cell, counted, to_json, visible
from shortcut_cli.report.comparison_words import decimals, signed


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, ""),
        (True, "yes"),
        (False, "no"),
        (0, "0"),
        (-1234567, "-1,234,567"),
        (0.000123456, "0.0001235"),
        (3.14159, "3.142"),
        (9999.4, "9,999"),
        (1174.2, "1,174"),
        (10_000.0, "10,000"),
        (-12_345.6, "-12,346"),
        (float("nan"), "nan"),
        ("text", "text"),
        ([1.25, None, 2000], "[1.25, , 2,000]"),
        ((0.5, [True]), "[0.5, [yes]]"),
        ([1.913, 1.92], "[1.913, 1.920]"),
        ([0.1, 20_000.0], "[0.1, 20,000]"),
        ([], "[]"),
    ],
)
def test_a_cell_is_short_and_exact_enough(value, shown):
    assert cell(value) == shown


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (NAN, None),
        (INF, None),
        (-INF, None),
        (0.1, 0.1),
        (1e308, 1e308),
        ([NAN, 1, (INF, True)], [None, 1, [None, True]]),
        ({"a": {"b": [{"c": NAN}]}, "d": "NaN", "e": None}, {"a": {"b": [{"c": None}]}, "d": "NaN", "e": None}),
        ("nan [/v2] \u00e9\ud800", "nan [/v2] \u00e9\ud800"),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_json_has_null_for_what_json_does_not_have(value, expected, indent):
    text = to_json(value, indent)
    assert json.loads(text, parse_constant=pytest.fail) == expected
    assert text == json.dumps(expected, indent=indent)


def test_every_json_file_of_results_is_written_without_nan():
    # What a tokenizer writes are its checked options and counts; the rest goes through to_json.
    root = Path(shortcut_cli.__file__).parent
    found = set()
    for path in (path for path in root.rglob("*.py") if path.parent.name != "tokenizers"):
        for node in ast.walk(ast.parse(path.read_text())):
            writes = isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("write", "text")
            if writes and "json.dumps(" in ast.unparse(node):
                found.add(path.relative_to(root).as_posix())
    # Lists of paths, for `prove tokens` and `files.together`; lines of documents, of which the same goes as above.
    assert found == {"stages/preparation.py", "files.py", "data/assembly.py"}


# What has no picture: format characters, but the signs of Arabic and Kaithi numbers, which have one.
UNSEEN = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) == "Cf"]
SIGNS = {"ARABIC", "SYRIAC", "KAITHI", "EGYPTIAN"}


@pytest.mark.parametrize("around", ["", "a", "ab"])
def test_names_that_differ_look_different(around):
    for letter in [*UNSEEN, "\r", "\x00", "\u115f", "\u3164", "\ufe0f"]:
        if unicodedata.name(letter, "").partition(" ")[0] in SIGNS and letter != "\u061c":
            assert visible(letter) == letter
            continue
        name = f"{around[:1]}{letter}{around[1:]}"
        assert letter not in visible(name), repr(letter)
        assert ast.literal_eval(f'"{visible(name)}"') == name


def test_scripts_and_emoji_keep_their_joiners():
    for name in (
        "\u062e\u0627\u200c\u0647",
        "क\u094d\u200dष",
        "👨\u200d👩\u200d👧",
        "❤\ufe0f",
        "1\ufe0f\u20e3",
        "naïve",
        "a\tb\n",
    ):
        assert visible(name) == name


def test_no_zero_is_negative():
    assert [cell(-0.0), cell([-0.0, 1.5])] == ["0", "[0.0, 1.5]"]
    assert alike([-0.0, 0.25]) == ["0.00", "0.25"]
    assert [decimals(-0.00004), signed(-0.00004), signed(-0.0)] == ["0.0000", "+0.0000", "+0.0000"]


def test_one_thing_is_no_plural():
    assert [counted(number, "document") for number in (0, 1, 2000)] == ["0 documents", "1 document", "2,000 documents"]
