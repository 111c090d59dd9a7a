"""Pages: what they say is what the folders hold, what is not ours stays, and what can't be read is named."""

import html
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import quiet, shortcut

from shortcut_cli import files
from shortcut_cli.config import reading
from shortcut_cli.errors import CheckFailed, UsageError
from shortcut_cli.kept import codec_scores, remarks
from shortcut_cli.report import assemble, axis, chart, curves, page, run, run_data, several, shards, warnings
from shortcut_cli.report.axis import Axis
from shortcut_cli.stages import inspection, pipeline, reporting


@pytest.fixture(scope="module")
def scored(text_run, tmp_path_factory):
    """A copy of text_run whose runs are scored on the test split."""
    root = tmp_path_factory.mktemp("scored") / "text"
    shutil.copytree(text_run, root)
    for model in ("gpt", "shortcut"):
        pipeline.score(root / model / "run.pt", text_run / "shards", "test", device="cpu", report=quiet)
    return root


@pytest.fixture
def copied(scored, tmp_path):
    """The same in a folder of this test."""
    shutil.copytree(scored, tmp_path / "text", ignore=shutil.ignore_patterns("report.html"))
    return tmp_path / "text"


def words(markup):
    """The text of some HTML, on one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", str(markup))).split())


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def score_of(folder):
    return json.loads((folder / "eval.json").read_text())["splits"]["test"]


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


# The command.


def test_the_page_of_a_run_is_in_its_folder_and_is_replaced(copied):
    made = copied / "shortcut" / "report.html"
    assert shortcut("report", copied / "shortcut", cwd=copied).stdout == f"{made}\n"
    first = made.read_text()
    assert json.loads(shortcut("report", copied / "shortcut" / "run.pt", "--json", cwd=copied).stdout)["report"] == str(
        made
    )
    layers, width, data = (
        run_data.read(copied / "shortcut").key(key) for key in ("model.layers", "model.width", "data.shards")
    )
    place = "/".join(Path(data).parts[-2:])
    assert f">Run: text/shortcut, shortcut {layers}x{width} on text ({place}), step 12</h1>" in first
    assert made.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_is_no_report_stays(copied, kind):
    place, other = copied / "shortcut" / "report.html", copied / "mine.html"
    other.write_text("<html>mine</html>")
    if kind == "folder":
        place.mkdir()
    elif kind == "link":
        reporting.write([copied / "gpt"], copied / "ours.html")
        place.symlink_to(copied / "ours.html")
    else:
        place.write_text(other.read_text())
    before = place.read_text() if place.is_file() else ""
    done = shortcut("report", copied / "shortcut", cwd=copied, check=2)
    assert "report.html" in done.stderr
    assert (place.read_text() if place.is_file() else "") == before
    assert place.is_symlink() == (kind == "link")


@pytest.mark.parametrize("given", ["texts", "missing", "texts/000.txt", "shortcut/recipe.toml"])
def test_a_path_that_is_none_of_the_kinds_is_an_error_of_use(copied, given):
    done = shortcut("report", copied / given, cwd=copied, check=2)
    assert given in done.stderr.replace("\n", "")
    assert "Hint:" in done.stderr


def test_a_damaged_run_is_an_error_and_leaves_no_page(copied):
    content = bytearray((copied / "gpt" / "run.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (copied / "gpt" / "run.pt").write_bytes(content)
    shortcut("report", copied / "gpt", cwd=copied, check=4)
    assert not list((copied / "gpt").glob("*.html")) + list((copied / "gpt").glob(".*.tmp"))


def test_commands_refresh_the_page_and_say_where_it_is_last(copied):
    ckpt, place = copied / "gpt" / "run.pt", copied / "gpt" / "report.html"
    done = shortcut("eval", "--ckpt", ckpt, "--shards", copied / "shards", "--split", "val", cwd=copied)
    assert done.stderr.splitlines()[-1] == f"Page: {place}"
    assert "report" not in done.stdout
    assert "Val split" in words(place.read_text())
    place.unlink()
    found = shortcut("sample", "--ckpt", ckpt, "-n", 1, "--tokens", 20, "--json", "--no-report", cwd=copied)
    assert "report" not in json.loads(found.stdout)
    assert not place.exists()
    found = shortcut("sample", "--ckpt", ckpt, "-n", 1, "--tokens", 20, "--seed", 2, "--json", cwd=copied)
    assert json.loads(found.stdout)["report"] == str(place)
    assert place.is_file()


def test_a_page_that_cannot_be_written_fails_no_command(copied):
    (copied / "gpt" / "report.html").write_text("mine")
    done = shortcut("eval", "--ckpt", copied / "gpt", "--shards", copied / "shards", "--json", cwd=copied)
    said = json.loads(done.stdout)
    assert "report" not in said
    assert str(copied / "gpt" / "report.html") not in said["written"]
    assert "exists, and is no page" in said["no_report"]
    done = shortcut("eval", "--ckpt", copied / "gpt", "--shards", copied / "shards", cwd=copied)
    assert done.stderr.splitlines()[-1].startswith("No page was written: ")
    assert (copied / "gpt" / "report.html").read_text() == "mine"


def test_a_bug_in_a_page_fails_no_command(copied, monkeypatch):
    events, bugs = [], []
    monkeypatch.setattr(sys, "excepthook", lambda *bug: bugs.append(bug[0]))
    monkeypatch.setitem(assemble.MAKERS, "run", [lambda _: 1 / 0])
    found = reporting.refresh(copied / "gpt", events.append)
    assert found == {"no_report": "ZeroDivisionError: division by zero"}
    assert bugs == [ZeroDivisionError]
    assert [(event.task, event.done) for event in events] == [("page", 0), ("page", 1)]


# What a page says.


def test_a_run_says_what_it_is(copied, monkeypatch):
    monkeypatch.chdir(copied)
    text = words(assemble.html([copied / "shortcut"]))
    last = [line for line in log(copied / "shortcut") if "loss" in line][-1]
    manifest = manifest_of(copied / "shards")
    score = score_of(copied / "shortcut")
    train = manifest["splits"]["train"]
    assert f"tokens seen {last['tokens']:,}, {last['tokens'] / train['tokens']:.3g} epochs" in text
    assert f"{train['documents']:,} documents" in text
    assert f"shards {manifest['checksum'][:16]}" in text
    assert f"nats per token {score['nats_per_token']:.4g} [" in text
    assert f"bits per byte {score['bits_per_unit']:.4g} [" in text
    for name, floor in score["floors"]["scores"].items():
        assert f"{name}, counted {floor['nats_per_token']:.4g} nats per token" in text


def test_flops_are_those_of_the_model_times_the_tokens(copied):
    found = run_data.read(copied / "shortcut")
    from shortcut_cli.inference import runs

    model = runs.open_run(copied / "shortcut" / "run.pt", "cpu").model
    assert found.costs.flops == model.training_flops_per_token(found.recipe["model"]["context"])
    assert found.costs.parameters == model.count()
    tokens = [line for line in log(copied / "shortcut") if "loss" in line][-1]["tokens"]
    assert f"{found.costs.flops * int(tokens):,} ({found.costs.flops:,} per token)" in words(
        assemble.html([copied / "shortcut"])
    )


def test_scores_of_another_checkpoint_or_that_were_edited_are_not_shown(copied):
    path = copied / "gpt" / "eval.json"
    path.write_text(path.read_text().replace('"accuracy": 0', '"accuracy": 1', 1))
    text = words(assemble.html([copied / "gpt"]))
    assert "Not scored yet" in text


@pytest.mark.parametrize("name", ["log.jsonl", "eval.json"])
def test_what_cannot_be_read_is_named_on_the_page(copied, name):
    (copied / "gpt" / name).write_text("{" * 100)
    text = words(assemble.html([copied / "gpt"]))
    assert f"{copied / 'gpt' / name} is" in text
    assert "parameters" in text


def altered(folder, change):
    path = folder / "eval.json"
    content = json.loads(path.read_text())
    change(content["splits"]["test"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda score: score.update(accuracy=0.5), "it was edited"),
        (lambda score: score.update(checkpoint_sha256="0" * 64), "it is of another checkpoint"),
        (lambda score: score.update(split="val"), "it lacks a part, or one has the wrong type"),
        (lambda score: score.pop("perplexity"), "it lacks a part, or one has the wrong type"),
        (lambda score: score["groups"].update(file="../x"), "its sums by document are gone, or have changed"),
    ],
)
def test_a_score_that_is_not_shown_is_named_with_the_reason(copied, change, why):
    altered(copied / "gpt", change)
    text = words(assemble.html([copied / "gpt"]))
    assert f"eval.json has a score on test that is not shown: {why}; `shortcut eval` makes it again." in text
    assert "Not scored yet" in text


def test_all_scores_that_are_shown_are_not_named(copied):
    assert "not shown" not in words(assemble.html([copied / "gpt"]))


def test_lines_of_a_log_that_are_not_drawn_are_counted(copied):
    path = copied / "gpt" / "log.jsonl"
    lines = path.read_text()
    path.write_text(lines + '{"step": 99, "loss": 1.0}\n{"step": 100, "other": 1.0}\n')
    assert "log.jsonl has 2 lines that are of no step, or lack a value." in words(assemble.html([copied / "gpt"]))
    path.write_text("")
    assert "log.jsonl has no line of a step: there are no curves." in words(assemble.html([copied / "gpt"]))
    path.unlink()
    assert "log.jsonl is missing or damaged" in words(assemble.html([copied / "gpt"]))


def test_names_and_contents_are_text(copied):
    folder = copied / "<script>alert(1)</script> 'a' \"b\" 😀\x1b[2J"
    shutil.copytree(copied / "gpt", folder)
    made = reporting.write([folder], copied / "page.html")
    found = (copied / "page.html").read_text()
    assert found.count("<script") == 1
    assert "\x1b" not in found
    assert made["bytes"] == len(found.encode())


def test_several_runs_stand_side_by_side_with_their_difference(copied):
    one, other = (score_of(copied / model) for model in ("gpt", "shortcut"))
    text = words(assemble.html([copied / "gpt", copied / "shortcut", copied / "gpt" / "run.pt"]))
    difference = f"{other['nats_per_token'] - one['nats_per_token']:+.4f}".replace("-", "\N{MINUS SIGN}")
    assert f"text/shortcut {difference} [" in text
    assert text.count("tokens seen") == 1 + 2  # in the table, and once for each run: the third path is the first
    assert "Recipe of text/shortcut: 1 key differs" in text
    assert "model.name 'gpt' -> 'shortcut'" in text


def test_the_interval_of_a_difference_is_that_of_documents_drawn_in_pairs(copied):
    """Oracle: the same bootstrap as a plain loop over documents."""
    found = several._interval(*(run_data.read(copied / model) for model in ("gpt", "shortcut")))
    sums = [np.load(copied / model / "eval-test.npz") for model in ("gpt", "shortcut")]
    nats, tokens = [each["nats"] for each in sums], sums[0]["tokens"]
    generator, means = np.random.default_rng(0), []
    for _ in range(several.RESAMPLES):
        drawn = generator.integers(0, len(tokens), len(tokens))
        means.append(sum(nats[1][i] - nats[0][i] for i in drawn) / sum(tokens[i] for i in drawn))
    low, high = np.percentile(means, [2.5, 97.5])
    assert found == f"[{low:+.4f},\u00a0{high:+.4f}]".replace("-", "\N{MINUS SIGN}")


def test_the_runs_of_a_demo_are_found_in_it(copied):
    place = copied / "demo"
    for recipe in ("a", "b"):
        shutil.copytree(copied / "gpt", place / "runs" / recipe / "gpt-s1")
    (place / ".shortcut").write_text("shortcut demo\n")
    assert assemble.found(place) == [("run", place / "runs" / recipe / "gpt-s1") for recipe in ("a", "b")]


def test_shards_say_what_they_hold(copied):
    text = words(assemble.html([copied / "shards"]))
    manifest = manifest_of(copied / "shards")
    for name, split in manifest["splits"].items():
        amount = split["units"]["byte"]
        assert f"{name} {split['documents']:,} {split['tokens']:,} {amount:,.0f}" in text
    lengths = [json.loads(line) for line in (copied / "shards" / "documents.jsonl").read_text().splitlines()]
    tokens = sorted(line["tokens"] for line in lengths if line["split"] == "train")
    assert f"train {len(tokens)} {tokens[0]}" in text
    assert text.count("document 1 ") == 1


def test_a_page_belongs_to_a_shards_folder(copied):
    shortcut("report", copied / "shards", cwd=copied)
    shortcut("inspect", copied / "shards", "--verify", cwd=copied)


def test_reasons_are_counted_with_their_numbers_aside(tmp_path):
    reasons = ["it has 3 bytes", "it has 17 bytes", "it is <b>empty</b>"]
    lines = [{"source": f"{n}.txt", "sha256": "0", "reason": reason} for n, reason in enumerate(reasons)]
    (tmp_path / "rejects.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = shards._rejects(tmp_path)
    assert "it has 3 bytes 2 0.txt" in words(made)
    assert "<b>" not in made
    assert "it is <b>empty</b> 1 2.txt" in html.unescape(" ".join(re.sub(r"</?(th|td|tr)[^>]*>", " ", made).split()))


# Curves and pictures.


def test_speed_is_tokens_over_seconds_between_lines():
    lines = [(100.0, 2.0), (300.0, 4.0), (300.0, 4.0), (700.0, 8.0)]
    made = SimpleNamespace(log=[{"tokens": tokens, "seconds": seconds} for tokens, seconds in lines])
    found = curves.speeds(made)
    assert found[:2] == [50.0, 100.0]
    assert math.isnan(found[2])
    assert found[3] == 100.0


def drawn(*values, **looks):
    """A chart of one line at 0, 1, 2, ... on an axis from 1 to 3."""
    line = chart.Line(chart.Style(0, **looks), range(len(values)), values, label="a <b>")
    return str(chart.chart([line], Axis("steps", 0, len(values) - 1), Axis("loss", 1, 3), "told"))


def test_a_line_is_drawn_where_its_values_are_and_has_gaps():
    assert ' d="M0.000 100.000 L25.000 0.000 M75.000 50.000 L100.000 100.000"' in drawn(1, 3, math.nan, 2, 1)


def test_a_point_between_gaps_is_a_dot():
    assert ' d="M50.000 50.000 L50.000 50.000"' in drawn(math.nan, 2, math.nan)
    marked = drawn(math.nan, 2, math.nan, shape="circle")
    assert 'class="line"' not in marked
    assert marked.count('class="mark') == 1


def test_the_values_of_a_line_can_be_read():
    (series,) = re.findall(r"data-series='([^']*)'", drawn(1, 1.23456, math.nan, 20_000, 2))
    (found,) = json.loads(html.unescape(series))
    assert found == {"label": "a <b>", "places": [0, 25, 75, 100], "at": "0\n1\n3\n4", "words": "1\n1.235\n20,000\n2"}


def test_where_a_value_is_read_has_all_its_digits():
    line = chart.Line(chart.Style(0), [1_234_567.0], [2.0], label="a")
    made = str(chart.chart([line], Axis("tokens", 0, 2e6), Axis("loss", 1, 3), "told"))
    (found,) = json.loads(html.unescape(re.search(r"data-series='([^']*)'", made)[1]))
    assert found["at"] == "1,234,567"


def test_a_peak_survives_in_a_long_line():
    y = [1.0] * 10_000
    y[4321], y[7777] = 9.0, math.nan
    found = chart.thinned(y)
    assert len(found) <= chart.MOST_POINTS + 2
    assert 4321 in found
    assert found == sorted(found)


def test_a_histogram_counts_every_value_once():
    edges, counts = np.linspace(0, 10, 6), [1, 0, 4, 2, 0]
    made = str(chart.bars(edges.tolist(), counts, Axis("x", 0, 10), "documents", "told"))
    bars = re.findall(r'<rect[^>]* x="([\d.]+)%" y="([\d.]+)%" width="([\d.]+)%" height="([\d.]+)%"', made)
    places, tops, widths, heights = np.array(bars, float).T
    assert places.tolist() == [0, 40, 60]
    assert widths.tolist() == [20, 20, 20]
    assert np.allclose(tops + heights, 100, atol=1e-3)
    assert np.allclose(heights / heights[0], [1, 4, 2], rtol=1e-3)
    ticks = dict(re.findall(r'y-tick" x="0" y="([\d.]+)%"[^>]*>(\d+)<', made))
    assert float(next(at for at, words in ticks.items() if words == "4")) == pytest.approx(tops[1], abs=1e-3)
    (series,) = re.findall(r"data-series='([^']*)'", made)
    assert json.loads(series)[0]["words"].split("\n") == ["1", "4", "2"]


# Sentences.


@pytest.mark.parametrize(("steps", "said"), [([], "no validation"), ([150], "one validation, at step 150")])
def test_a_training_too_short_for_a_curve_of_validations_says_so(steps, said):
    made = SimpleNamespace(
        validations=[{"step": step} for step in steps], step=150, count={"train.eval_every": 500}.get
    )
    assert said in curves._few(made)
    assert "train.eval_every is 500" in curves._few(made)
    made.validations = [{"step": 50}, {"step": 100}]
    assert curves._few(made) == ""


def test_remarks_are_sentences(copied, monkeypatch):
    monkeypatch.chdir(copied)
    found = run_data.read(copied / "shortcut")
    monkeypatch.setattr(remarks, "of_score", lambda score: [f"on the {score['split']} split"] if score else [])
    monkeypatch.setattr(remarks, "of_plan", lambda recipe, tokens: [f"{recipe['model']['name']}, {tokens}"])
    tokens = manifest_of(copied / "shards")["splits"]["train"]["tokens"]
    assert [*run.warned(found)] == ["On the test split.", f"Shortcut, {tokens}."]


def test_a_loss_that_is_not_finite_hides_no_rise():
    assert len([*warnings.risen([(1, math.nan), (2, 3.0), (3, 4.0), (4, math.nan)])]) == 1


def test_a_stop_and_a_rise_are_said():
    assert [*warnings.unfinished(5, 10)]
    assert not [*warnings.unfinished(10, 10)]
    assert [*warnings.risen([(1, 2.0), (2, 1.0), (3, 1.1)])]
    assert not [*warnings.risen([(1, 2.0), (2, 1.0), (3, 1.01)])]


# codec-eval.json.


RESULT = {
    "weights": "codec.pt",
    "files": 2,
    "rejects": [],
    "seconds": 3.0,
    "threads": 1,
    "perplexity": [5.0],
    "bandwidths": [{"kbps": 1.5, "si_sdr_db": None, "log_mel": 0.5, "stoi": None, "pesq": None}],
    "opus": {"kbps": 6.0, "si_sdr_db": 1.0, "log_mel": 0.25},
    "encode_x_realtime": 9.0,
    "decode_x_realtime": 9.0,
}


def test_a_result_of_codec_eval_is_kept_for_its_codec(tmp_path):
    codec_scores.keep(tmp_path, RESULT, "a" * 64)
    assert codec_scores.find(tmp_path, "b" * 64) is None
    assert codec_scores.find(tmp_path, "a" * 64)["files"] == 2
    assert "1.5 0.50 Opus 6.0 0.25" in words(assemble.html([tmp_path]))


@pytest.mark.parametrize("name", ["log.jsonl", codec_scores.NAME])
@pytest.mark.parametrize("how", ["damaged", "folder", "loop"])
def test_a_codec_that_can_be_read_is_shown_whatever_is_beside_it(tmp_path, name, how):
    checkpoint = pytest.importorskip("shortcut_cli.codec.checkpoint")
    recipe = reading.read_codec("codec-mini", [])
    checkpoint.save(
        tmp_path / "codec.pt", recipe, checkpoint.network(recipe.codec).state_dict(), step=3, scores={"mel_6kbps": 1.5}
    )
    assert name not in words(assemble.html([tmp_path])).partition("Values by keyboard")[0]
    place = tmp_path / name
    if how == "damaged":
        place.write_text('{"step": ')
    elif how == "folder":
        place.mkdir()
    else:
        place.symlink_to(place)
    text = words(assemble.html([tmp_path])).partition("Values by keyboard")[0]
    assert f"{place}" in text
    assert "codebooks" in text
    if how == "damaged" and name == codec_scores.NAME:
        place.write_text(json.dumps(RESULT | {"codec_sha256": "b" * 64}))
        assert "is of another codec; `shortcut codec eval` makes it again." in words(assemble.html([tmp_path]))


@pytest.mark.parametrize(
    "damage", [{"bandwidths": 3}, {"opus": {"kbps": "a"}}, {"files": 2**70}, {"weights": "a" * 5000}, {"seconds": None}]
)
def test_another_file_of_that_name_is_neither_shown_nor_replaced(tmp_path, damage):
    path = tmp_path / codec_scores.NAME
    path.write_text(json.dumps(RESULT | {"codec_sha256": None} | damage))
    before = path.read_bytes()
    with pytest.raises(CheckFailed):
        codec_scores.find(tmp_path, None)
    with pytest.raises(CheckFailed):
        codec_scores.keep(tmp_path, RESULT, None)
    assert path.read_bytes() == before


def test_a_megabyte_of_text_is_cut():
    made = page.table(["a"], [["x" * 1_000_000]])
    assert len(made) < 3000


def test_nothing_to_report_on_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="holds nothing to report on"):
        assemble.html([tmp_path])


@pytest.mark.parametrize("command", ["shortcut compare", "shortcut train", "shortcut codec train", "shortcut sample"])
def test_a_folder_without_its_result_names_the_command_that_has_not_ended(command, tmp_path):
    (tmp_path / files.MARKER).write_text(f"{command}, process 3\n")
    unfinished = f"is not complete: its `{command}` has not come to its end"
    with pytest.raises(UsageError, match=unfinished):
        assemble.found(tmp_path)
    # Finished samples are nothing that `inspect` knows either.
    with pytest.raises(UsageError, match="is not a shards folder" if command == "shortcut sample" else unfinished):
        inspection.inspect(tmp_path, verify=False)


def test_inspecting_a_comparison_names_the_command_that_shows_it(tmp_path):
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(UsageError, match="is a comparison") as refused:
        inspection.inspect(tmp_path, verify=False)
    assert refused.value.then == f"shortcut report {tmp_path}"


def test_numbers_beyond_any_measure_are_not_drawn():
    """1e308 is finite; the room around it, or a difference of two such numbers, is not."""
    for values in ([1e308, 1.0], [1e308, -1e308], [1.0, 1e300]):
        found = axis.around("loss", values)
        assert math.isfinite(found.high - found.low)
        assert all(math.isfinite(tick) for tick in found.ticks())
    assert axis.around("loss", [1e308]).low < axis.around("loss", [1e308]).high


def test_counts_have_whole_ticks():
    for most, expected in ((2, [0, 1, 2]), (1, [0, 1]), (4, [0, 1, 2, 3, 4]), (40, [0, 10, 20, 30, 40])):
        assert chart.whole_values(Axis("documents", 0.0, most * 1.05)) == expected


# Tables.


def heads(made):
    return re.findall(r"<th scope=\"col\"[^>]*>(.*?)</th>", made)


def column(made, heading):
    return re.findall(rf'data-label="{heading}">(.*?)</td>', made)


def test_a_column_that_holds_nothing_is_left_out():
    rows = [("a", None, page.UNKNOWN, "", 0, 0.0, False), ("b", None, None, page.UNKNOWN, None, None, None)]
    made = page.table(("name", "none", "unknown", "empty", "zero", "nothing", "no"), rows)
    assert heads(made) == ["name", "zero", "nothing", "no"]
    assert column(made, "zero") == ["0", ""]
    assert page.table(("name", "none"), [("a", None)]) == ""  # names alone say nothing
    assert heads(page.table(("name", "other"), [])) == ["name", "other"]
    assert heads(page.table(("name",), [("a",)])) == ["name"]


def test_numbers_of_a_column_have_as_many_decimals_and_a_minus():
    rows = [("0.5", 1.73, [1.5, 2.25], -0.5), ("2", -2.125, None, math.nan)]
    made = page.table(("name", "loss", "interval", "strange"), rows)
    assert re.findall(r'role="rowheader">(.*?)<', made) == ["0.5", "2"]  # a name is no number
    assert column(made, "loss") == ["1.730", f"{page.MINUS}2.125"]
    assert column(made, "strange") == [f"{page.MINUS}0.5", "not finite"]


def test_words_stand_to_the_left_and_numbers_to_the_right():
    rows = [
        ("a", "gpt 4x96", "12 s", f"{page.MINUS}0.5", f"[{page.MINUS}1, 2]", page.UNKNOWN, 3, "x"),
        (*"bc", *"4567", 8, 9),
    ]
    made = page.table((*"ABCDEFGH",), rows)
    assert re.findall(r'<td role="cell" class="words-in" data-label="(.)"', made) == ["B", "B"]
    assert re.findall(r'columnheader" class="words-in">(.)', made) == ["A", "B"]


def test_runs_side_by_side_have_what_is_known_of_them(copied, text_run):
    runs = [run_data.read(copied / name) for name in ("gpt", "shortcut")]
    labels = {str(one.folder): one.name for one in runs}
    made = str(several._overview(runs, labels))
    assert [len(heads(part)) for part in made.split("<thead")[1:]] == [6, 6]
    scores = [one.scores["test"] for one in runs]
    assert column(made, "test") == [f"{score['nats_per_token']:.4f}" for score in scores]
    assert column(made, "95 % interval") == ["[{:.4f},\u00a0{:.4f}]".format(*score["interval_95"]) for score in scores]
    for name in ("gpt", "shortcut"):
        (copied / name / "eval.json").unlink()
    made = str(several._overview([run_data.read(copied / name) for name in ("gpt", "shortcut")], labels))
    assert next(heads(part) for part in made.split("<thead")[1:]) == ["run", "validation"]
    assert "test" not in made.partition("<thead")[0]
    assert "Counted" not in made


def test_a_single_value_is_said_and_not_drawn():
    line = {"step": 7.0, "tokens": 70.0, "seconds": 1.0, "flops": 9.0}
    one = curves.Curve("gpt <b>", [line], [2.5], chart.Style(0))
    two = curves.Curve("conv", [line, line | {"step": 14.0}], [2.25, math.nan], chart.Style(1))
    made = curves.panels("a", {"validation loss": [one, two]})
    assert (
        words(made)
        == "Validation loss: gpt <b> 2.5 at step 7, conv 2.25 at step 7. One value each: there is no curve to draw."
    )
    assert "<svg" not in made
    more = curves.Curve("conv", two.lines, [2.25, 2.0], chart.Style(1))
    made = curves.panels("a", {"validation loss": [one, more], "rate": [one]})
    assert made.count('class="chart-plot"') == 4  # on every axis
    assert "Rate: 2.5 at step 7." in words(made)
    assert words(curves.panels("a", {"rate": []})) == "Nothing is logged yet."


def test_a_split_of_one_document_has_no_histogram(copied, monkeypatch):
    opened = shards.shards.Shards(copied / "shards")
    made = str(shards._lengths(opened))
    assert made.count('class="chart-plot"') == 3
    real = type(opened).split

    def one_in_test(self, name):
        return SimpleNamespace(document_tokens=lambda: np.array([37])) if name == "test" else real(self, name)

    monkeypatch.setattr(type(opened), "split", one_in_test)
    made = str(shards._lengths(opened))
    assert made.count('class="chart-plot"') == 2
    assert "test 1 37 37 37 37 37" in words(made)


def test_documents_are_named_by_their_files(copied):
    text = words(assemble.html([copied / "shards"]))
    lines = [json.loads(line) for line in (copied / "shards" / "documents.jsonl").read_text().splitlines()]
    train = [line["source"] for line in lines if line["split"] == "train"]
    for number in range(3):
        index = number * len(train) // 3
        assert f"document {index + 1} : {train[index]}; one of {len(train)} in the train split" in text


def test_a_folder_of_runs_stands_for_them(copied, tmp_path):
    runs = tmp_path / "runs" / "text"
    runs.mkdir(parents=True)
    for name in ("gpt", "shortcut"):
        shutil.copytree(copied / name, runs / name)
    expected = [("run", runs / "gpt"), ("run", runs / "shortcut")]
    assert assemble.found(runs) == assemble.found(runs.parent) == expected
    made = assemble.write([runs.parent])
    assert made["report"] == str(runs.parent / "report.html")
    assert "Runs side by side" in Path(made["report"]).read_text()
