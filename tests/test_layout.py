"""Tables on narrow screens: what is shown is whole, and what is left out is named."""

import io
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from shortcut_cli.cli import bars, console, tables
from shortcut_cli.cli.layout import Column, Typed, fit, shortened
from shortcut_cli.events import Part, Progress, Whole
from shortcut_cli.formatting import alike, apart, cell, rounded

LONG = "runs/a-folder-with-a-long-name/shortcut_gated-lr0.0040000000000000001-s1234567890"  # more than 80 characters
WIDE = "\u97f3\u697d-\u306e-\u30d5\u30a9\u30eb\u30c0"  # characters that take two columns of the screen
BIG = 3_014_208_577
ONE = {"nats_per_token": 1234.5678, "interval_95": [1234.0, 123456.75]}
ARM = {"label": "gpt-128x65536x271", "layers": 128, "width": 65_536, "ffn": 262_144, "lr": 0.00123456}
ARM |= {"parameters": BIG, "training_flops_per_token": 10 * BIG, "tokens_per_s": 123_456.7, "peak_mb": 81_920.5}
ARM |= {"cache_bytes_per_token": 1_048_576, "nats_per_token": [3.25, 3.5], "bits_per_unit": [12_345.5, 12_346.5]}
SPLIT = {"documents": 12_345_678, "tokens": BIG, "units": {"second": 987_654_321.5}}
SCORES = {"split": "test", "documents": 12_345_678, "tokens": BIG, "nats_per_token": 3.25, "interval_over": "documents"}
SCORES |= {"interval_95": [3.0625, 3.4375], "unigram_entropy": 5.5, "perplexity": 25.79, "accuracy": 0.25}
SCORES |= {"unit": "second", "bits_per_unit": 1234.5, "bits_per_unit_interval_95": [1233.5, 1235.5]}
SCORES |= {"depth_weights": {"sources": ["layer 2", LONG], "by_head": [[0.25, 0.75]]}}
STATE = {"lens_nats_per_token": 1234.5, "state_rms": 123_456.7, "gradient_rms": 1e-9, "attention_rms": 1.5}
DEMO = {"recipe": "text-tiny", "model": "shortcut", "parameters": BIG, "nats_per_token": 3.25, "unigram_entropy": 5.5}
CODEC = {"kbps": 12.5, "si_sdr_db": -12.34, "log_mel": 1.125, "stoi": 0.8765, "pesq": 3.456}


def every(name):
    """The tables of every command, with a run, model or file of this name."""
    accounts = {"notes_shortened": BIG, "notes_moved": BIG}
    shards = {"path": name, "splits": dict.fromkeys(("train", "val", "test"), SPLIT), "tokenizer": {"unit": "second"}}
    yield tables.shards(shards | {"inputs": BIG, "verified": True})
    yield from tables.account({"account": accounts})
    yield tables.scores(name, SCORES)
    source = {"source": name, "attention_weight": 0.12345, "distance_tokens": 1234.5}
    source |= dict.fromkeys(("masked", "shuffled", "mean_ablated"), ONE)
    found = {"tokens": BIG, "nats_per_token": 3.25, "sources": [source], "all_sources": source, "softmax": True}
    yield tables.attention(Path(name), found)
    states = [
        {"state": "embedding", "feed_forward_rms": None} | STATE,
        {"state": name, "feed_forward_rms": 2.5} | STATE,
    ]
    yield tables.layers({"layers": states, "cka": {"matrix": [[1.0, 0.5], [0.5, 1.0]]}})
    arms = [ARM | {"unit": "second"}, ARM | {"label": name, "unit": "second"}]
    yield tables.comparison({"arms": arms, "notices": [f"No verdict. {name}"], "gate": {"open": False}})
    yield from tables.description(name, {"kind": "codec", "path": name, "parameters": {"total": BIG}, "x": "a" * 64})
    rehearsed = {"parameters": {"total": BIG, "non_embedding": BIG}, "steps": BIG, "tokens": BIG, "epochs": 1.5}
    rehearsed |= {"training_tokens": BIG, "training_flops": 1e18, "training_flops_per_token": BIG, "run": name}
    rehearsed |= {"memory_mb": 81_920.5, "tokens_per_s": 123_456.7, "seconds_per_step": 0.5, "seconds": 123_456.0}
    yield tables.rehearsal(rehearsed | {"seconds_per_validation": 0.5})
    run = {
        "run": name,
        "model": "shortcut_gated",
        "shape": "4x128",
        "data": "text (shards/text-tiny)",
        "step": 999_999,
        "steps": BIG,
        "validation": 3.25,
        "kind": "checkpoint",
    }
    run |= {"scores": {"test": SCORES}, "problem": f"{name} is damaged"}
    yield from tables.runs(name, {"runs": [run]})
    yield from tables.difference(
        {"runs": [name, "b"], "differences": {"train.steps": [BIG, 2], "shards": ["a" * 64, name]}}
    )
    yield tables.recipes([{"name": name, "about": f"About {name} and {BIG} more words, in a long sentence about it."}])
    yield tables.checked_recipes([{"recipe": name, "problem": f"train.steps: must be less than {BIG}"}])
    yield tables.proof(name, {"kills": BIG, "killed_sha256": ["a" * 64], "resumed_at_steps": [BIG] * 9})
    codec = {
        "weights": name,
        "bandwidths": [CODEC],
        "opus": CODEC,
        "files": BIG,
        "rejects": [],
        "perplexity": [1023.5] * 8,
    }
    yield tables.codec_scores(codec | {"seconds": BIG, "encode_x_realtime": 123.0, "decode_x_realtime": 123.0})
    yield from tables.checks([{"what": name, "works": False, "found": f"{BIG} in {name}", "remedy": f"remove {name}"}])
    yield tables.demo({"rows": [DEMO | {"accuracy": 0.25, "bits_per_unit": 1234.5, "unit": "second"}]})


def drawn(part, width):
    """The lines of a table on a terminal of this width; in a pipe it is drawn as on one of 120 columns."""
    screen = console._console(file=io.StringIO(), width=width, soft_wrap=True)
    screen.print(part)
    return screen.file.getvalue().split("\n")


def atoms(text):
    """The words of a cell that have to appear whole: an interval is one."""
    return re.findall(r"\[[^][]{0,60}\]|\S+", text)


def is_rounding(word, value):
    """Whether a word is a number in thousands, millions ..., rounded to three digits."""
    found = re.fullmatch(r"(-?[\d.]+)([KMBT])", word)
    size = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    return bool(found) and abs(float(found[1]) * size[found[2]] - value) <= 0.0051 * abs(value)


def is_whole(value, words, lines):
    """Whether all of a value can be read in the lines of a table."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and any(is_rounding(word, value) for word in words):
        return True
    return all(any(atom in line for line in lines) for atom in atoms(cell(value)))


@pytest.mark.parametrize("name", ["gpt", "shortcut_gated", LONG, WIDE, f"{WIDE}{LONG}", "two words"], ids=ascii)
@pytest.mark.parametrize("width", [60, 80, 120])
def test_what_a_table_shows_is_whole_and_what_it_leaves_out_is_named(name, width):
    from rich.cells import cell_len

    for part in every(name):
        if isinstance(part, str):
            continue
        lines = drawn(part, width)
        text = " ".join(" ".join(lines).split())
        left = text.partition("more columns with --json or a wider terminal: ")[2].split(", ")
        shown = [not column.heading or column.heading not in left for column in part.named]
        assert shown[0]
        assert sum(shown) >= 2
        words = {word for line in lines for word in re.split(r"[\s\u2502]+", line)}
        for row in part.values:
            for value, is_shown in zip(row, shown, strict=True):
                assert not is_shown or is_whole(value, words, lines), (width, value, "\n".join(lines))
        assert all(atom in text for atom in atoms(str(part.title)))
        for line in lines:
            longest = max((cell_len(atom) for atom in atoms(line.strip(" \u2502"))), default=0)
            assert cell_len(line) <= width or longest > width // 2 - 4, line


def test_the_columns_that_matter_least_leave_first():
    result = {"arms": [ARM | {"unit": "second"}], "notices": ["n"], "gate": {"open": True}}
    heads = {}
    for width in (60, 80, 300):
        lines = drawn(tables.comparison(result), width)
        left = " ".join(" ".join(lines).split()).partition("wider terminal: ")[2]
        heads[width] = left.split(", ") if left else []
    assert heads[300] == []
    assert heads[60][-2:] == ["peak MB", "cache bytes per token"]
    assert set(heads[80]) < set(heads[60])
    assert "nats per token" not in heads[60]
    assert "bits per second" not in heads[60]


def test_counts_are_rounded_only_if_there_is_no_room():
    rows = [("gpt", BIG, 1_234_567)]
    made = console.table("t", ("arm", "parameters", "tokens"), rows)
    assert "3,014,208,577" in "".join(drawn(made, 60))
    narrow = "".join(drawn(made, 34))
    assert "3.01B" in narrow
    assert "1.23M" in narrow
    assert "more columns" not in narrow
    assert "more columns with --json or a wider terminal: tokens" in " ".join(drawn(made, 25))


def test_a_table_without_room_becomes_records():
    made = console.table("t", ("run", "loss", "95 %"), [(LONG, 1.5, [1.25, 1.75])])
    assert drawn(made, 60) == ["t", LONG, "  loss  1.5", "  95 %  [1.25, 1.75]", ""]
    assert drawn(console.pairs("t", {"a": LONG, "a longer name": 2}), 60)[1:4] == ["a", LONG, "a longer name  2"]
    assert drawn(console.pairs("t", {"a": "b" * 30, "name": 2}), 34)[1:4] == ["a", f"    {'b' * 30}", "name  2"]


@pytest.mark.parametrize("name", ["gpt", "shortcut_gated", LONG, WIDE, "two words"], ids=ascii)
@pytest.mark.parametrize("width", [30, 40, 50, 60, 80])
def test_no_table_is_wider_than_the_screen_but_for_a_word_that_is(name, width):
    for part in every(name):
        for line in drawn(part, width) if not isinstance(part, str) else ():
            longest = max(map(cell_len, atoms(line)), default=0)
            assert cell_len(line) <= width or longest > width - 4, line


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_headings_of_attention_stay_on_a_line(width):
    for part in every("layer 2"):
        if not isinstance(part, str) and part.named[0].heading in ("source", "state"):
            found = fit(part.named, [[*row] for row in part.values], width, cell_len)
            assert not any("\n" in heading for heading in found.headings), found.headings


def test_a_column_of_rank_0_never_leaves():
    columns = ("a", Column("b" * 20, 0), Column("c" * 20, 2), Column("d" * 20, 1))
    text = " ".join(drawn(console.table("t", columns, [(1, 2, 3, 4)]), 60))
    assert "b" * 20 in text.partition("more columns")[0]
    assert text.split("wider terminal: ")[1].split() == ["c" * 20]
    kept = ("a", Column("b" * 20, 0), Column("c" * 20, 0))
    assert drawn(console.table("t", kept, [(1, 2, 3)]), 40)[1:4] == ["1", f"  {'b' * 20}", "    2"]


@given(st.integers(-(10**18), 10**18))
def test_a_rounded_number_is_near(value):
    text = rounded(value)
    assert len(text) <= 6 or abs(value) >= 10**14
    assert text == cell(value) if abs(value) < 10_000 or abs(value) >= 10**15 else is_rounding(text, value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (9999, "9,999"),
        (10_000, "10K"),
        (999_999, "1M"),
        (3_014_208, "3.01M"),
        (12_345.6, "12.3K"),
        (-2_000_000_000, "-2B"),
        (1.05e12, "1.05T"),
        (2.5e18, "2.5e18"),
    ],
)
def test_a_rounded_number_has_three_digits_and_a_unit(value, text):
    assert rounded(value) == text


@given(st.text("abc/\u97f3\u697d", max_size=60), st.integers(4, 40))
def test_a_name_that_is_too_long_loses_its_middle_and_keeps_most_of_its_end(name, width):
    found = shortened(name, width, cell_len)
    if cell_len(name) <= width:
        assert found == name
        return
    head, tail = found.split("\u2026")
    assert cell_len(found) <= width
    assert name.startswith(head)
    assert name.endswith(tail)
    assert cell_len(head) <= cell_len(tail)
    assert cell_len(found) >= width - 2  # a character can take two columns


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_end_of_a_long_name_is_in_its_bar(monkeypatch, width):
    screen = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(console, "_err", lambda: screen)
    with console.Reporter() as report:
        report(Part("compare", 2, 9, f"{LONG * 2}-end", whole=Whole(0.5, 1, 60.0)))
        report(Progress(LONG, 1, 9, "steps"))
        report.live.stop()
        with screen.capture() as drawn:
            screen.print(report.live.get_renderable())
    lines = drawn.get().splitlines()
    assert lines[0].startswith("compare 2 of 9: r")
    assert lines[0].rstrip().endswith("-end")
    assert lines[1].split(" ")[0].endswith("567890")
    assert max(map(len, lines)) <= width


@given(st.lists(st.text("ab \n\t\u97f3", max_size=9), max_size=20), st.integers(12, 30))
def test_what_is_typed_loses_nothing_and_breaks_lines_at_spaces(parts, width):
    typed = Typed(width, cell_len)
    found = "".join(map(typed.push, parts)) + typed.end()
    text = "".join(parts)
    if max((cell_len(word) for word in text.split()), default=0) < width:
        assert found.split() == text.split()  # no word is broken
        assert "\t" in text or all(cell_len(line.rstrip()) <= width for line in found.split("\n"))
    assert "".join(found.split()) == "".join(text.split())
    again = Typed(width, cell_len)
    assert again.push(text) + again.end() == found  # however it comes


def test_what_is_typed_ends_its_lines_as_its_author_did_and_obeys_nothing():
    typed = Typed(20, cell_len)
    assert [typed.push(part) for part in ("one\r", "\ntw", "o\rthree", "\n\n", "\x1b[2J ", "x")] == [
        *("one\n", "", "two\n", "three\n\n", r"\x1b[2J ", ""),
    ]
    assert typed.end() == "x"
    assert typed.push(f" {'y' * 30}") == f" \n{'y' * 20}"
    assert Typed(9, cell_len).push("word by word ") == "word by\u0020\nword "


def test_a_stream_on_a_terminal_comes_in_whole_words_and_ends_with_the_rest(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setenv("COLUMNS", "12")
    monkeypatch.setattr(console.sys, "stdout", screen)
    console._typed.cache_clear()
    console._out.cache_clear()
    try:
        for part in ("Once up", "on a tim", "e\r\n\x1b[2J"):
            console.stream(part)
        assert screen.getvalue() == "Once upon a \ntime\n"
        console.end_stream()
        assert screen.getvalue() == "Once upon a \ntime\n\\x1b[2J"
    finally:
        console._typed.cache_clear()
        console._out.cache_clear()


SAYS = {  # of a bar, at its longest
    "name": "x" * 8,
    "amount": "1,014,848/1,181,290 tokens",
    "short": "1.01M/1.18M tokens",
    "loss": "loss 5.8077 nats/token",
    "value": "5.8077 nats/token",
    "epoch": "epoch 1.25",
    "spent": "0:04",
    "left": "1:02:43 left",
    "rate": "6.161 steps/s",
}


@given(
    st.lists(st.fixed_dictionaries({}, optional={key: st.just(value) for key, value in SAYS.items()}), max_size=3),
    st.integers(20, 200),
)
def test_what_stands_beside_bars_fits_and_is_never_cut(every, room):
    found = list(bars.rows(every, room, len))
    for number, line in found:
        assert sum(width for _, width in line) + len(line) - 1 <= room
        for key, width in line:
            assert width >= (len(every[number].get(key, "")) if key != bars.BAR else bars.LEAST)
    shown = {(number, key) for number, line in found for key, _ in line}
    assert {number for number, key in shown if key == bars.BAR} == set(range(len(every)))


@pytest.mark.parametrize(("room", "lines"), [(20, 5), (40, 4), (60, 4), (80, 2), (110, 2), (200, 2)])
def test_a_training_says_its_step_loss_and_times_at_every_width(room, lines):
    """Always with their units; below 40 columns without the word "loss"."""
    training = SAYS | {"amount": "1,234/1,500 steps", "short": "1.23K/1.5K steps", "left": "0:51 left"}
    whole = {"name": "in all", "amount": "2/12 parts", "short": "2/12 parts", "spent": "0:35", "left": "1:23:10 left"}
    found = list(bars.rows([training, whole], room, len))
    assert len(found) == lines
    first = {key for number, line in found for key, _ in line if number == 0}
    assert first >= {"left"} | ({"spent"} if room >= 40 else set())
    assert first & {"amount", "short"}
    assert ("loss" in first) == (room >= 40)
    assert {"loss", "value"} & first
    last = {key for number, line in found for key, _ in line if number == 1}
    assert last & {"amount", "short"}
    assert "left" in last


def decimals(text):
    return {len(number.partition(".")[2]) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)}


@given(st.lists(st.floats(-9999, 9999).filter(lambda x: x == 0 or abs(x) > 0.01), min_size=1, max_size=8))
@example([1.5, 24.0, 3.0])
@example([2.1, 2.0004, 1.9])
def test_the_numbers_of_a_column_have_one_form(values):
    """Each is within half a unit of the last place of its value, and has at least the four digits of `cell`."""
    found = alike([*values, None])
    assert found[-1] is None
    if max(map(abs, values)) >= 1 and max(len(cell(one).partition(".")[2]) for one in values) > 4:
        assert found[:-1] == values  # too far apart
        return
    (places,) = {one for text in found[:-1] for one in decimals(text)}
    for text, value in zip(found[:-1], values, strict=True):
        assert abs(float(text.replace(",", "")) - value) <= 0.5000001 * 10.0**-places
        assert len(text) >= len(cell(value))


SIZES = st.floats(1e-12, 1e6) | st.floats(1e-5, 0.9999) | st.just(0.0)


@settings(deadline=None)
@given(st.lists(st.tuples(SIZES, st.sampled_from([-1, 1])).map(lambda one: one[0] * one[1]), min_size=1, max_size=8))
@example([0.25, 2.3e-05])
@example([0.0, -0.001579, -8.371e-05])
@example([1e-05, 0.99999])
@example([0.00009999996, 1e-9])
def test_a_column_has_powers_of_ten_throughout_or_nowhere(values):
    """Each number has what `cell` shows of it, four digits, or two at least if none has a power of ten."""
    found = [cell(one) for one in alike([*values, None])][:-1]
    assert len({"e" in text for text in found}) == 1
    if not any("e" in cell(one) for one in values):
        assert not any("e" in text for text in found)
        return
    assert len({len(text.partition("e")[0].partition(".")[2]) for text in found}) == 1
    for text, value in zip(found, values, strict=True):
        assert float(text) == pytest.approx(value, rel=0.0500001 if "e" not in text else 0.000500001)
    assert alike([values]) == [f"[{', '.join(found)}]"]  # of an interval too


def test_small_numbers_are_written_out_as_long_as_two_digits_are_left():
    assert alike([0.25, 2.3e-05, None]) == ["0.250000", "0.000023", None]
    assert alike([[0.002903, 0.005559], [-0.001579, -8.371e-05]]) == ["[0.002903, 0.005559]", "[-0.001579, -0.000084]"]
    assert cell([-0.001579, -8.371e-05]) == "[-0.001579, -0.000084]"
    assert alike([0.25, 1e-07, 0.0]) == ["2.5e-01", "1.0e-07", "0.0e+00"]
    assert alike([1.5, 2.345e-05]) == ["1.500e+00", "2.345e-05"]


@settings(deadline=None)
@given(st.floats(1e-3, 1e3), st.integers(1, 12), st.booleans())
@example(4.9451234567890123, 7, False)
def test_values_that_differ_have_the_fewest_digits_that_show_it(value, place, listed):
    other = value * (1 + 10.0**-place)
    first, second = (cell(one) for one in (apart([value, 2.5], [other, 2.5]) if listed else apart(value, other)))
    assert first != second
    for text, one in zip((first, second), (value, other), strict=True):
        shown = text.strip("[]").split(", ")[0]
        assert float(shown.replace(",", "")) == pytest.approx(one, abs=0.5000001 * 10.0 ** -max(decimals(shown)), rel=0)
    longest = max(len(re.sub(r"^0+", "", re.sub(r"\D", "", text.partition(",")[0]))) for text in (first, second))
    assert longest <= max(4, place + 2) + 1  # digits: as many as differ, and rounding may need one more


def test_what_is_not_of_one_kind_stays_as_it_is():
    for values in ([1, 2], ["a", 1.5], [12_345.0, 1.5], [True, 1.5], [None], [0.0123456, 12.3]):
        assert alike(values) == values
    assert alike([[0.5, -0.25], None, [1.0, 12.0]]) == ["[0.50, -0.25]", None, "[1.00, 12.00]"]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_runs_and_diff_show_numbers_of_one_form(width):
    every = []
    for number, loss in enumerate((2.1, 1.98765, 3.0)):
        entry = {"run": f"run-{number}", "model": "gpt", "shape": "4x64", "data": "text", "step": 9, "steps": 9}
        entry |= {"validation": loss, "kind": "checkpoint", "problem": ""}
        test = {"nats_per_token": loss, "bits_per_unit": loss / 2, "unit": "second" if number else "byte"}
        every.append(entry | {"scores": {"test": test}})
    lines = [line for part in tables.runs("runs", {"runs": every}) for line in drawn(part, width)]
    cells = [[one.strip() for one in line.split("\u2502")] for line in lines if "run-" in line]
    for row in zip(*cells, strict=True):
        numbers = [text.split()[0] for text in row if re.match(r"\d+\.\d+", text)]
        assert len({one for text in numbers for one in decimals(text)}) <= 1 + ("byte" in str(row))
    assert "2.100" in str(cells)
    changes = {"train.lr": [0.001, 0.0005], "scores.loss": [2.00001, 2.00002], "train.steps": [9, 10], "x": [None, 1.5]}
    changes |= {"bits": [4.945123456789012, 4.945987654321098], "test": [4.945123456789012, 4.9451298765432101]}
    lines = [
        line for part in tables.difference({"runs": ["a", "b"], "differences": changes}) for line in drawn(part, width)
    ]
    cells = {row[1]: row[2:4] for line in lines if len(row := [one.strip() for one in line.split("\u2502")]) == 5}
    assert cells["train.lr"] == ["0.0010", "0.0005"]
    assert cells["scores.loss"] == ["2.00001", "2.00002"]
    assert cells["train.steps"] == ["9", "10"]
    assert cells["bits"] == ["4.945", "4.946"]
    assert cells["test"] == ["4.94512", "4.94513"]
    assert cells["x"] == ["-", "1.5"]
