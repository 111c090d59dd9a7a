"""The page of a comparison: everything that is drawn is measured in the picture and compared with compare.json."""

import copy
import html.parser
import itertools
import json
import math
import random
import re
import shlex
import tomllib
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import results

from shortcut_cli.errors import CheckFailed
from shortcut_cli.report import assemble, chart, compared, comparison, page
from shortcut_cli.report.axis import Axis

HOSTILE = "a<script>alert(1)</script>&\"'\u202e\x1b[2J\x9b\U0001f3b5"
FLOPS = {"gpt": 2_000_000, "conv": 2_600_000, "gpt-4x48": 3_100_000, "gpt-4x64": 4_400_000, "twin": 2_050_000}
ROLES = {"gpt": "plain", "conv": "asked", "twin": "twin"}
FACTOR = 1.75  # bits per unit of a nat
RATES = (0.001, 0.002, 0.004)


def arm(place, label):
    nats = [3.2 - 0.01 * place + 0.013 * seed for seed in range(3)]
    curve = [
        {"step": step, "validation": 3.1 + 5 / step + 0.02 * place, "seconds": 0.1 * step}
        | {"validation_lowest": 3.05 + 5 / step, "validation_highest": 3.3 + 5 / step}
        for step in range(10, 101, 10)
    ]
    return {
        "label": label,
        "model": "gpt",
        "role": ROLES.get(label, "rung"),
        "asked": label in ("gpt", "conv"),
        "lr": 0.00234,
        "layers": 4,
        "width": 1064,
        "ffn": 4256,
        "parameters": 1_234_567 + place,
        "training_flops_per_token": FLOPS[label],
        "tokens_per_s": 14321.6,
        "peak_mb": 2321.5,
        "cache_bytes_per_token": 2048,
        "seeds": [1, 2, 3],
        "nats_per_token": nats,
        "nats_per_token_interval_95": [min(nats) - 0.02, max(nats) + 0.03],
        "bits_per_unit": [FACTOR * loss for loss in nats],
        "unit": "note",
        "diverged": {},
        "folders": [f"runs/{label}-s{seed}" for seed in (1, 2, 3)],
        "curve": curve,
    }


def contrast(label, other, differences):
    mean = sum(differences) / len(differences)
    return {
        "arm": label,
        "baseline": other,
        "baselines": [],
        "seeds": 3,
        "mean": mean,
        "differences": differences,
        "interval_95": [mean - 0.02, mean + 0.02],
        "documents_interval_95": [mean - 0.03, mean + 0.04],
        "wins": 2,
        "p": 0.0112,
        "p_holm": 0.0224,
        "level": 0.025,
        "detectable": 0.0321,
        "p_equal": 0.9,
        "gain": {"gain": 1.234, "interval_95": [1.1, None]},
        "verdict": f"{label} beats {other}.",
    }


def made():
    """A comparison with a ladder, a search for rates, a twin and the positive control."""
    costs = [2e6 * (4.4 / 2) ** (share / 4) for share in range(5)]
    line = {"intercept": 4.6, "slope": -0.1}
    band = [
        {"cost": cost, "loss": 4.6 - 0.1 * math.log(cost), "low": 4.5 - 0.1 * math.log(cost), "high": 3.2}
        for cost in costs
    ]
    rungs = [label for label in FLOPS if label != "conv"]
    pilots = {
        label: {
            "steps": 25,
            "seeds": [1000001, 1000002],
            "chosen": 0.0021,
            "at_edge": label == "conv",
            "validation": {repr(rate): [3.5 + 20 * abs(rate - 0.002) + add for add in (0, 0.01)] for rate in RATES},
        }
        for label in FLOPS
    }
    recipe = json.loads((results.FOLDER / "superseded" / "music" / "compare.json").read_text())["recipe"]
    floors = {"5-gram": {"nats_per_token": 3.35, "bits_per_unit": 5.9}}
    floors["unigram"] = {"nats_per_token": 5.5, "bits_per_unit": 9.6}
    return {
        "schema_version": 2,
        "recipe": recipe,
        "shards": "ab" * 32,
        "split": "test",
        "match": "flops",
        "ladder": line
        | {"rungs": rungs, "cost": "training FLOPs per token", "costs": [FLOPS[label] for label in rungs]}
        | {"band": band, "scattered": True},
        "margin_nats": 0.005,
        "tokens_per_step": 4096,
        "epochs": 12.3456,
        "floors": {"trained_tokens": 1_234_567, "scores": floors},
        "gate": {"open": True, "baseline": 3.213, "floor": "5-gram", "floor_nats_per_token": 3.35, "clear_by": 0.1},
        "pilots": pilots,
        "looks": {"planned": 5, "seeds": [3], "family": ["conv:ladder"]},
        "arms": [arm(place, label) for place, label in enumerate(FLOPS)],
        "aa": contrast("twin", "ladder", [0.002, -0.001, 0.004]) | {"verdict": None},
        "contrasts": [contrast("conv", "ladder", [-0.05, -0.03, -0.045])],
        "control": {"arm": "conv", "found": True},
        "notices": ["A/A: fine.", "A notice."],
    }


@pytest.fixture
def show(tmp_path):
    """Writes a compare.json; returns its sections as XML, by the first part of their anchors."""

    def write(result):
        (tmp_path / "compare.json").write_text(json.dumps(result))
        return {
            section.anchor.rpartition("-")[0]: ET.fromstring(f"<x>{section.body}</x>")
            for section in comparison.sections(tmp_path)
        }

    return write


def text(element):
    return " ".join("".join(element.itertext()).split())


def classed(element, name):
    return [one for one in element.iter() if name in (one.get("class") or "").split()]


def percent(element, key):
    value = element.get(key)
    assert value.endswith("%"), value
    return float(value[:-1])


def value_of(words):
    """The number on a tick."""
    found = re.fullmatch(r"(\u2212?)([0-9.,]+)([KMGTPE]?)", words)
    scale = 1000 ** " KMGTPE".index(found[3] or " ")
    return (-1 if found[1] else 1) * float(found[2].replace(",", "")) * scale


def inverse(ticks, key, *, log=False):
    """From a place in percent to a value, by the first and the last tick of an axis."""
    ends = [(percent(tick, key), value_of(text(tick))) for tick in (ticks[0], ticks[-1])]
    (a, low), (b, high) = [(place, math.log(value) if log else value) for place, value in ends]

    def value(place):
        found = low + (place - a) * (high - low) / (b - a)
        return math.exp(found) if log else found

    return value


def near(found, wanted, by=2e-4):
    assert len(found) == len(wanted), (found, wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=by), (found, wanted)


def forest(section):
    """Of each row: its name, and in the values of the axis its dots, mean and interval; all that by a function too."""
    axes = [classed(axis, "x-tick") for axis in classed(section, "forest-axis")]
    rows = {}
    for row in section.find(".//ul").findall("li"):
        name = row.find("span").text.strip()
        dots = [percent(dot, "cx") for dot in classed(row, "seed")]
        means = [percent(mark, "x") for mark in classed(row, "mean")]
        ends = [percent(line, key) for line in classed(row, "interval") for key in ("x1", "x2")]
        rows[name] = (dots, means, ends, text(row))
    return rows, [inverse(ticks, "x") for ticks in axes]


def test_each_arms_seeds_mean_and_interval_are_where_they_belong(show):
    result = made()
    rows, (nats, bits) = forest(show(result)["losses"])
    means = {row["label"]: sum(row["nats_per_token"]) / 3 for row in result["arms"]}
    assert [*rows] == sorted(means, key=means.get)
    for row in result["arms"]:
        dots, mean, ends, words = rows[row["label"]]
        near(map_(nats, dots), row["nats_per_token"])
        near(map_(nats, mean), [means[row["label"]]])
        near(map_(nats, ends), row["nats_per_token_interval_95"])
        near(map_(bits, mean), [sum(row["bits_per_unit"]) / 3], 5e-4)
        low, high = row["nats_per_token_interval_95"]
        assert f"{means[row['label']]:.4f} [{low:.4f}, {high:.4f}]" in words


def map_(function, values):
    return [function(value) for value in values]


@pytest.mark.parametrize("near", [3.35, 3.05])  # above the losses, and below
def test_floors_that_are_near_are_lines_and_others_are_named(show, near):
    result = made()
    result["floors"]["scores"]["5-gram"]["nats_per_token"] = near
    section = show(result)["losses"]
    _, (nats, _) = forest(section)
    (line,) = {percent(line, "x1") for line in classed(section, "floor")}
    assert 0 <= line <= 100
    assert nats(line) == pytest.approx(near, abs=2e-4)
    assert "Beyond the axis: unigram at 5.5000." in text(section)
    assert "knows 1,234,567 tokens" in text(section)


def test_differences_are_drawn_in_nats_and_in_bits(show):
    result = made()
    section = show(result)["differences"]
    rows, (nats, bits) = forest(section)
    assert [*rows] == ["conv \u2212 the ladder", "twin \u2212 the ladder"]
    for entry, (dots, mean, ends, _) in zip([*result["contrasts"], result["aa"]], rows.values(), strict=True):
        near(map_(nats, dots), entry["differences"])
        near(map_(nats, mean), [entry["mean"]])
        near(map_(nats, ends), entry["interval_95"])
        near(map_(bits, mean + ends), [FACTOR * one for one in [entry["mean"], *entry["interval_95"]]], 5e-4)
    assert "positive control" in rows["conv \u2212 the ladder"][3]
    assert "A/A: should be 0" in rows["twin \u2212 the ladder"][3]
    near(map_(nats, {percent(line, "x1") for line in classed(section, "zero")}), [0.0])
    margins = {percent(line, "x1") for line in classed(section, "rule")} - {
        percent(line, "x1") for line in classed(section, "zero")
    }
    near(sorted(map_(nats, margins)), [-0.005, 0.005])
    sizes, in_bits, tests, gains = section.findall(".//table")
    assert cells(sizes)["conv \u2212 the ladder"] == {
        "nats per token": "\u22120.0417",
        "95 % interval": "[\u22120.0617, \u22120.0217]",
        "95 % over documents": "[\u22120.0717, \u22120.0017]",
        "seeds won": "2 of 3",
    }
    assert cells(in_bits)["conv \u2212 the ladder"] == {
        "bits per note": "\u22120.0729",
        "95 % interval, bits": "[\u22120.1079, \u22120.0379]",
    }
    assert cells(tests)["conv \u2212 the ladder"] == {
        "p": "0.0112",
        "p (Holm)": "0.0224",
        "level": "0.025",
        "detectable, nats": "0.0321",
        "p of equivalence": "0.9",
    }
    assert cells(gains)["conv \u2212 the ladder"] == {
        "compute-equivalent gain": "1.23",
        "95 % of the gain": "[1.1, beyond]",
    }


def cells(table):
    """The cells of a table by row and heading."""
    heads = [text(head) for head in table.find("thead").iter("th")]
    rows = [[text(cell) for cell in row] for row in table.find("tbody").iter("tr")]
    return {row[0]: dict(zip(heads[1:], row[1:], strict=True)) for row in rows}


def test_tables_have_thousands_units_and_means(show):
    losses, shapes, costs = (cells(table) for table in show(made())["losses"].findall(".//table"))
    assert losses["conv"] == {
        "nats per token": "3.2030",
        "95 % interval": "[3.1700, 3.2460]",
        "spread over seeds": "0.0260",
        "bits per note": f"{math.fsum(made()['arms'][1]['bits_per_unit']) / 3:.4f}",
        "seeds": "3",
    }
    assert losses["floor: 5-gram"]["bits per note"] == "5.9000"
    assert shapes["conv"] == {
        "layers": "4",
        "width": "1,064",
        "feed-forward": "4,256",
        "learning rate": "0.00234",
        "non-embedding parameters": "1,234,568",
    }
    assert costs["conv"] == {
        "FLOPs per token": "2,600,000",
        "tokens/s": "14,322",
        "peak MB": "2,322",
        "cache bytes": "2,048",
    }


def test_every_column_is_explained(show):
    made_sections = show(made())
    for anchor in ("losses", "differences"):
        section = made_sections[anchor]
        (listed,) = [one for one in section.findall(".//details") if one.find("summary").text.startswith("What each")]
        named = {text(term) for term in listed.iter("dt")}
        heads = {text(head) for table in section.findall(".//table") for head in table.find("thead").iter("th")}
        assert heads - named <= {"layers", "width", "learning rate", "seeds", "95 % interval, bits", "95 % of the gain",
                                 *(("nats per token", "bits per note") if anchor == "differences" else ())}  # fmt: skip


def points(plot, x, y):
    """The marks of a chart in the values of its axes: {what it says: (x, y)}."""
    return {
        mark.get("data-tip"): (x(percent(mark, "x")), y(percent(mark, "y")))
        for mark in plot.iter("svg")
        if mark.get("data-tip")
    }


def scales(plot, *, log=False):
    return inverse(classed(plot, "x-tick"), "x", log=log), inverse(classed(plot, "y-tick"), "y")


def path(element, x, y):
    return [
        (x(float(a)), y(float(b)))
        for a, b in (pair.split() for pair in re.sub("[MLZ]", ",", element.get("d")).split(",") if pair.strip())
    ]


def test_the_ladder_is_a_line_with_a_band_and_arms_at_their_cost(show):
    result = made()
    section = show(result)["ladder"]
    (plot,) = classed(section, "chart-plot")
    x, y = scales(plot, log=True)
    found = points(plot, x, y)
    assert len(found) == len(FLOPS)
    for row in result["arms"]:
        (place,) = [place for words, place in found.items() if words.startswith(f"{row['label']}: ")]
        assert place[0] == pytest.approx(FLOPS[row["label"]], rel=1e-4)
        assert place[1] == pytest.approx(sum(row["nats_per_token"]) / 3, abs=2e-4)
    hollow = {mark.get("data-tip").partition(":")[0] for mark in classed(plot, "hollow")}
    assert hollow == {*result["ladder"]["rungs"]}
    (line,), (band,) = classed(plot, "line"), classed(plot, "band")
    for cost, loss in path(line, x, y):
        assert loss == pytest.approx(4.6 - 0.1 * math.log(cost), abs=2e-4)
    lower, upper = path(band, x, y)[:5], path(band, x, y)[5:]
    near([low for _, low in lower], [point["low"] for point in result["ladder"]["band"]])
    near([high for _, high in upper], [3.2] * 5)
    assert "scatter more about the line" in text(section)
    assert f"\u2212{0.1 * math.log(2):.4f} nats per token for each doubling" in text(section)


def test_a_ladder_may_be_curved(show):
    result = made()
    middle = math.log(result["ladder"]["band"][2]["cost"])
    result["ladder"] |= {"intercept": 4.6 + 0.02 * middle**2, "slope": -0.1 - 0.04 * middle, "curvature": 0.02}

    def curve(cost):
        return 4.6 - 0.1 * math.log(cost) + 0.02 * (math.log(cost) - middle) ** 2

    section = show(result)["ladder"]
    (plot,) = classed(section, "chart-plot")
    (line,) = classed(plot, "line")
    for cost, loss in path(line, *scales(plot, log=True)):
        assert loss == pytest.approx(curve(cost), abs=2e-4)
    assert f"\u2212{0.1 * math.log(2):.4f} nats per token for a doubling at its middle; it is curved" in text(section)
    rows = cells(section.find(".//table"))
    for label, cost in FLOPS.items():
        assert rows[label]["line there"] == f"{curve(cost):.4f}"


def test_curves_are_drawn_over_steps_flops_and_seconds_with_the_spread(show):
    result = made()
    section = show(result)["curves"]
    plots = classed(section, "chart-plot")
    places = (
        lambda _, point: point["step"],
        lambda row, point: point["step"] * 4096 * row["training_flops_per_token"],
        lambda _, point: point["seconds"],
    )
    for plot, place in zip(plots, places, strict=True):
        x, y = scales(plot)
        lines, bands = classed(plot, "line"), classed(plot, "band")
        for row, line, band in zip(result["arms"], lines, bands, strict=True):
            found, wanted = path(line, x, y), [(place(row, point), point["validation"]) for point in row["curve"]]
            near([a for a, _ in found], [a for a, _ in wanted], 1e-3 * max(a for a, _ in wanted))
            near([b for _, b in found], [b for _, b in wanted], 1e-3)
            around = path(band, x, y)
            near([b for _, b in around[:10]], [point["validation_lowest"] for point in row["curve"]], 1e-3)
            near([b for _, b in around[:9:-1]], [point["validation_highest"] for point in row["curve"]], 1e-3)


def test_the_axis_of_the_curves_is_that_of_the_second_half(show):
    result = made()
    section = show(result)["curves"]
    later = [
        point[key]
        for row in result["arms"]
        for point in row["curve"]
        if point["step"] >= 50
        for key in ("validation", "validation_lowest", "validation_highest")
    ]
    x, y = scales(classed(section, "chart-plot")[0])
    room = 0.05 * (max(later) - min(later))
    near([y(100), y(0)], [min(later) - room, max(later) + room])
    assert "those of the second half of training" in text(section)
    crossings = []  # where losses, which fall, come below the upper end of the axis
    for row in result["arms"]:
        fall = sorted((point["validation"], point["step"]) for point in row["curve"])
        crossings.append(np.interp(max(later) + room, *zip(*fall, strict=True)))
    assert min(crossings) > 10
    near([x(0), x(100)], [min(crossings), 100], 0.02)


def test_the_values_of_the_curves_can_be_read(show):
    result = made()
    plots = classed(show(result)["curves"], "chart-plot")
    units = [plot.find("svg").get("data-x") for plot in plots]
    assert units == ["steps", "training FLOPs", "seconds of training"]
    found = json.loads(plots[0].find("svg").get("data-series"))
    assert [one["label"] for one in found] == [row["label"] for row in result["arms"]]
    for one, row in zip(found, result["arms"], strict=True):
        known = dict(zip(one["at"].split("\n"), one["words"].split("\n"), strict=True))
        assert known == {str(p["step"]): f"{p['validation']:.4f}" for p in row["curve"] if str(p["step"]) in known}
        assert {"50", "100"} <= known.keys()


def test_the_sensitivity_curve_has_the_chosen_rate_and_the_edges_of_the_grid(show):
    result = made()
    section = show(result)["rates"]
    (plot,) = classed(section, "chart-plot")
    x, y = scales(plot, log=True)
    for curve, line in zip(result["pilots"].values(), classed(plot, "line"), strict=True):
        found = path(line, x, y)
        near([rate for rate, _ in found], RATES, 1e-6)
        near([loss for _, loss in found], [sum(curve["validation"][repr(rate)]) / 2 for rate in RATES])
    near([x(percent(mark, "x")) for mark in classed(plot, "chosen")], [0.0021] * len(FLOPS), 1e-6)
    near([x(percent(line, "x1")) for line in classed(plot, "rule")], [0.001, 0.004], 1e-6)
    assert "At the edge of the grid: conv." in text(section)
    assert cells(section.find(".//table"))["conv"] == {
        "0.001": "3.5250", "0.002": "3.5050", "0.004": "3.5450", "chosen": "0.0021", "edge": "at the edge"
    }  # fmt: skip


def test_the_verdict_comes_first(show):
    section = show(made())["verdict"]
    first, *rest = section.findall(".//p")
    assert text(first) == (
        "The verdicts count: gpt, at 3.2130 nats per token, is more than 0.1 below the lowest floor, the 5-gram at "
        "3.3500."
    )
    assert [text(one) for one in rest[:2]] == ["A/A: fine.", "A notice."]
    assert [text(one) for one in section.iter("li")] == ["conv beats ladder."]
    assert text(rest[2]).startswith(
        "layers 6; width 64; context 256; 300 steps of 4,096 tokens (12.3 epochs); a ladder"
    )
    shut = made()
    shut["gate"]["open"], shut["notices"] = False, ["No verdict: gpt is bad.", "A/A: fine."]
    first, second, *_ = show(shut)["verdict"].findall(".//p")
    assert (text(first), text(second)) == ("No verdict: gpt is bad.", "A/A: fine.")


def test_checks_name_the_twin_the_control_and_what_diverged(show):
    result = made()
    result["arms"][1] |= {"nats_per_token": [3.1, None, 3.2], "diverged": {"2": "not finite at step 9"}}
    result["arms"][1] |= {"nats_per_token_interval_95": None}
    result["pilots"]["gpt"]["validation"]["0.004"] = [None, 3.6]
    made_sections = show(result)
    words = text(made_sections["checks"])
    assert "differs by +0.0017 nats per token, 95 % interval [\u22120.0183, +0.0217]. It contains 0" in words
    assert "conv, which is known to help, was found to help" in words
    assert "Looked at with 3 of at most 5 seeds." in words
    table = made_sections["checks"].find(".//table")
    rows = [[text(cell) for cell in row] for row in table.find("tbody").iter("tr")]
    assert rows == [["conv", "2", "not finite at step 9"], ["gpt", "pilot at 0.004", "its loss is not finite"]]
    rows, (nats, _) = forest(made_sections["losses"])
    dots, mean, ends, said = rows["conv"]
    near(map_(nats, dots), [3.1, 3.2])
    assert (mean, ends) == ([], [])
    assert "diverged at seed 2" in said
    assert [*rows][-1] == "conv"  # without a mean it is not the best
    assert cells(made_sections["rates"].find(".//table"))["gpt"]["0.004"] == "diverged"


def alone():
    """One arm, one seed, and nothing that an old version did not have."""
    one = arm(0, "gpt") | {"seeds": [1], "nats_per_token": [3.25], "bits_per_unit": [None]}
    new = ("role", "nats_per_token_interval_95", "diverged", "folders")
    one = {key: value for key, value in one.items() if key not in new}
    one["curve"] = [{"step": 10, "validation": 3.25, "seconds": 1.0}]
    keys = ("schema_version", "recipe", "shards", "split", "tokens_per_step", "epochs", "margin_nats")
    return {key: made()[key] for key in keys} | {"match": "none", "arms": [one], "contrasts": []}


def test_one_arm_with_one_seed_is_a_page(show):
    found = show(alone())
    assert [*found] == ["verdict", "losses", "curves", "checks", "recipe"]
    rows, axes = forest(found["losses"])
    assert (len(rows["gpt"][0]), len(rows["gpt"][2]), len(axes)) == (1, 0, 1)
    assert "1 seed;" in text(found["verdict"])


@pytest.mark.parametrize("name", results.names())
def test_results_of_earlier_versions_are_pages(name):
    result = json.loads((results.FOLDER / name / "compare.json").read_text())
    found = {one.anchor.rpartition("-")[0]: one for one in comparison.sections(results.FOLDER / name)}
    verdicts = [text(one) for one in ET.fromstring(f"<x>{found['verdict'].body}</x>").iter("li")]
    written = [verdict.replace("\N{MINUS SIGN}", "-") for verdict in verdicts]
    assert written == [entry["verdict"] for entry in result["contrasts"]]
    assert not re.search(r"[( ]-\d", " ".join(verdicts))
    rows, (nats, _) = forest(ET.fromstring(f"<x>{found['losses'].body}</x>"))
    for row in result["arms"]:
        near(map_(nats, rows[row["label"]][0]), row["nats_per_token"])
    assert tomllib.loads(recipe_of(found["recipe"].body)) == result["recipe"]


def recipe_of(body):
    return ET.fromstring(f"<x>{body}</x>").find(".//pre").text


def test_the_recipe_is_toml_that_reads_back_equal_whatever_is_in_it(show):
    result = made()
    result["recipe"]["data"]["shards"] = HOSTILE + '\\ "\n\t\x00\x7f]\u2028'
    result["recipe"]["data"]["a key \u202e."] = [{"b.c": 1e-7}, []]
    result["recipe"]["top"] = 3
    pre = show(result)["recipe"].find(".//pre")
    assert tomllib.loads(pre.text) == result["recipe"]
    assert not set(pre.text) & {"\x1b", "\x9b", "\u202e", "\x00", "\u2028"}
    button = show(result)["recipe"].find(".//button")
    assert button.get("data-copy") == pre.get("id")


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.handlers = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


def test_names_and_sentences_are_inert(tmp_path):
    def page_with(words):
        result = json.loads(json.dumps(made()).replace("conv", words))
        for entry in [result["contrasts"][0], result["aa"], result["floors"], result["ladder"]]:
            entry |= {key: f"{words} {value}" for key, value in entry.items() if isinstance(value, str)}
        result["arms"][0]["unit"] = words
        result["arms"][1]["diverged"] = {words: words}
        result |= {"notices": [words], "split": words, "shards": words}
        (tmp_path / "compare.json").write_text(json.dumps(result))
        made_page = assemble.html([tmp_path])
        found = Tags()
        found.feed(made_page)
        return made_page, found

    plain, before = page_with("conv2")
    hostile, after = page_with(json.dumps(HOSTILE + "\ud800")[1:-1])
    assert after.tags == before.tags
    assert after.handlers == []
    assert not set(hostile) & {"\x1b", "\x9b", "\u202e"}
    hostile.encode()
    long, _ = page_with("x" * 1_000_000)
    assert len(long) < 20 * len(plain)


def places(tree, before=()):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*before, key)
        yield from places(value, (*before, key))


OTHERS = (None, "x", [], {}, 1e308, -1, 0, True, float("nan"), [[1, 2]], {"a": {"b": None}}, 10**30)


@pytest.mark.parametrize("start", range(3))
def test_whatever_is_in_compare_json_there_is_a_page_or_an_error(tmp_path, start):
    small = made()
    for row in small["arms"]:
        row["curve"] = row["curve"][::5]
    small["ladder"]["band"], small["recipe"] = small["ladder"]["band"][::4], {"model": {"layers": 1}, "train": {}}
    choice = random.Random(start)
    paths = [*places(small)]
    for way in choice.sample(paths, 120):
        broken = copy.deepcopy(small)
        inner = broken
        for key in way[:-1]:
            inner = inner[key]
        inner[way[-1]] = choice.choice(OTHERS)
        (tmp_path / "compare.json").write_text(json.dumps(broken))
        try:
            assert comparison.sections(tmp_path)
        except CheckFailed:
            assert way == ("arms",), way


@pytest.mark.parametrize("key", ["cost", "low", "high"])
@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_whatever_is_in_a_ladders_band_there_is_a_page(tmp_path, key, other):
    broken = made()
    broken["ladder"]["band"][1][key] = other
    (tmp_path / "compare.json").write_text(json.dumps(broken))
    assert comparison.sections(tmp_path)


# What each part is, in words, and a value that it can't be.
KINDS = {dict: ("table", [1]), list: ("list", {}), str: ("text", [1]), int: ("number", "x"), float: ("number", "x")}


def test_whatever_is_not_shown_of_compare_json_is_named(tmp_path):
    """Every single part of the whole, as another type."""
    small = made()
    for row in small["arms"]:
        row["curve"] = row["curve"][::5]
    small["recipe"], small["ladder"]["curvature"] = {}, 0.0
    unread = {"schema_version", "asked", "model", "found", "open", "at_edge", "scattered", "baselines", "loss"}
    count = 0
    for way in places(small):
        inner = [small]
        for key in way:
            inner.append(inner[-1][key])
        if unread & {*way} or "seeds" in way or inner[-1] is None or way == ("arms",):
            continue
        word, other = KINDS[type(inner[-1])]
        inner[-2][way[-1]], kept = other, inner[-1]
        (tmp_path / "compare.json").write_text(json.dumps(small))
        inner[-2][way[-1]] = kept
        problems = compared.Compared(tmp_path).problems
        assert [one for one in problems if one.startswith(f"{'.'.join(map(str, way))} is no {word}")] == problems, way
        assert len(problems) == 1, way
        count += 1
    assert count > 300
    (tmp_path / "compare.json").write_text(json.dumps(small | {"contrasts": 3, "notices": ["a"] * 2000}))
    words = text(ET.fromstring(f"<x>{comparison.sections(tmp_path)[0].body}</x>"))
    assert "compare.json is damaged, so a part of it is not shown: contrasts is no list, " in words
    assert "notices has 2,000 entries, of which 1,000 are read" in words


@pytest.mark.parametrize("name", results.names())
def test_results_of_earlier_versions_are_not_damaged(name):
    assert compared.Compared(results.FOLDER / name).problems == []
    assert compared.Compared(results.FOLDER / name).arms


def test_a_folder_without_a_comparison_is_an_error(tmp_path):
    with pytest.raises(CheckFailed, match="holds no finished comparison"):
        comparison.sections(tmp_path)
    for content in ("{}", "[]", '{"arms": 3}', '{"arms": []}', "{"):
        (tmp_path / "compare.json").write_text(content)
        with pytest.raises(CheckFailed, match=r"compare\.json"):
            comparison.sections(tmp_path)


def test_fifty_series_look_different():
    looks = [chart.style(place) for place in range(56)]
    assert len({(look.colour, look.shape) for look in looks}) == 56
    for a, b in itertools.pairwise(looks):
        assert a.colour != b.colour
        assert a.shape != b.shape


def test_ticks_of_a_log_axis_are_apart():
    places = [place for place, _ in chart.ticks(Axis("rate", 0.0009, 0.0091, log=True))]
    assert len(places) > 2
    assert min(b - a for a, b in itertools.pairwise(places)) >= 16


def test_a_long_curve_is_thinned_to_its_end(show):
    result = made()
    result["arms"][0]["curve"] = [{"step": step, "validation": 3.0, "seconds": 1.0} for step in range(1, 1002)]
    section = show(result)["curves"]
    line = classed(section, "line")[0]
    assert len(path(line, float, float)) == 167  # every sixth
    assert cells(section.find(".//table"))["gpt"]["last step"] == "1,001"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.0, 0.05, 0.1], ["0", "0.05", "0.10"]),
        ([3.0, 3.2, 3.4], ["3.0", "3.2", "3.4"]),
        ([0.0, 500.0, 1000.0], ["0", "500", "1,000"]),
        ([-0.02, 0.0, 0.02], ["\u22120.02", "0", "0.02"]),
        ([0.0, 20_000.0], ["0", "20K"]),
        ([1e6, 1.5e6], ["1.0M", "1.5M"]),
        ([1e3, 1e6, 1e9, 1e12], ["1,000", "1M", "1B", "1T"]),
        ([0.0, 5e17, 1e18], ["0", "5e17", "1e18"]),
        ([0.0001, 0.001], ["0.0001", "0.0010"]),
        ([2.5], ["2.5"]),
    ],
)
def test_ticks_have_the_digits_that_they_need(values, words):
    assert chart.short(values) == words


def sampled(run, words):
    (run / "samples").mkdir(parents=True)
    sidecar = {"checkpoint_sha256": "0" * 64, "sampler": {"temperature": 1.0}, "number": 0, "tokens": 5, "seed": 1}
    (run / "samples" / "0000.txt").write_text(words)
    (run / "samples" / "0000.txt.json").write_text(json.dumps(sidecar))


def test_samples_of_the_arms_stand_side_by_side(tmp_path, show):
    assert "samples" not in show(made())
    sampled(tmp_path / "runs" / "gpt-s2", "of gpt <b>")
    sampled(tmp_path / "runs" / "conv-s1", "of conv")
    sampled(tmp_path.parent / f"{tmp_path.name}-outside", "of another folder")
    result = made()
    result["arms"][2]["folders"] = [f"../{tmp_path.name}-outside", str(tmp_path.parent / f"{tmp_path.name}-outside")]
    result["arms"][3]["folders"] = ["a\0b", "x" * 1500, "loop", ""]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (beside,) = classed(show(result)["samples"], "beside")
    assert [text(column.find("h3")) for column in beside] == ["gpt", "conv"]
    assert ["of gpt <b>" in text(column) for column in beside] == [True, False]
    assert ["of conv" in text(column) for column in beside] == [False, True]
    assert "of another folder" not in text(beside)


def test_the_page_has_the_commands_for_the_samples_that_arms_lack(tmp_path, show):
    for name in ("gpt-s2", "conv-s1", "conv-s2", "twin-s1", "gpt-4x48-s1"):  # of gpt the first seed is gone
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.pt").touch()
    section = show(made())["samples"]
    places = [str(tmp_path / "runs" / name) for name in ("gpt-s2", "conv-s1")]
    wanted = [["shortcut", "sample", "--ckpt", place, "-n", "4"] for place in places]
    assert [shlex.split(line) for line in section.find(".//pre").text.splitlines()] == wanted
    assert comparison.to_sample(tmp_path) == section.find(".//pre").text.splitlines()
    assert "The arms have no samples yet" in text(section)
    sampled(tmp_path / "runs" / "gpt-s2", "of gpt")
    section = show(made())["samples"]
    assert [shlex.split(line) for line in section.find(".//pre").text.splitlines()] == wanted[1:]
    assert "The other arms have no samples yet" in text(section)
    sampled(tmp_path / "runs" / "conv-s2", "of conv")
    assert show(made())["samples"].find(".//pre") is None
    assert comparison.to_sample(tmp_path) == []


def test_a_path_that_a_terminal_obeys_is_in_no_command(tmp_path):
    folder = tmp_path / "a\x1b[2Jb"
    (folder / "runs" / "gpt-s1").mkdir(parents=True)
    (folder / "runs" / "gpt-s1" / "run.pt").touch()
    (folder / "compare.json").write_text(json.dumps(made()))
    assert comparison.to_sample(folder) == []


def test_two_comparisons_fit_into_one_page(tmp_path):
    found = []
    for name in "ab":
        (tmp_path / name / "runs" / "gpt-s1").mkdir(parents=True)
        (tmp_path / name / "runs" / "gpt-s1" / "run.pt").touch()
        (tmp_path / name / "compare.json").write_text(json.dumps(made() | {"epochs": 1.0 if name == "a" else 2.0}))
        found += comparison.sections(tmp_path / name)
    identities = re.findall(r' id="([^"]+)"', page.render("both", found))
    assert len(identities) == len(set(identities)) >= 2 * len(found)


def test_the_page_has_our_style_sheet_and_the_names_of_the_arms(tmp_path):
    (tmp_path / "compare.json").write_text(json.dumps(made()))
    made_page = assemble.html([tmp_path])
    assert (
        f"<title>Comparison: {tmp_path.parent.name}/{tmp_path.name}, gpt, conv at 6x64 on midi (shards/music)</title>"
        in made_page
    )
    assert Path(page.TEMPLATES / "comparison.css").read_text() in made_page


def test_a_sentence_on_a_page_has_the_minus_of_its_tables():
    said = "No verdict on gpt-5x96 against a-2 (-0.0503 nats per token, -0.1 to 1e-3, [-2, +3]); lr-1."
    assert compared.sentence(said) == (
        "No verdict on gpt-5x96 against a-2 (\u22120.0503 nats per token, \u22120.1 to 1e-3, [\u22122, +3]); lr-1."
    )


def test_what_no_arm_has_gets_no_column_and_no_explanation(show):
    result = made()
    for row in result["arms"]:
        row["nats_per_token_interval_95"] = None
        del row["peak_mb"]
    section = show(result)["losses"]
    names = {text(head) for table in section.findall(".//table") for head in table.find("thead").iter("th")}
    explained = {text(term) for term in section.iter("dt")}
    for gone in ("95 % interval", "peak MB"):
        assert gone not in names | explained
    assert {"spread over seeds", "tokens/s"} <= names & explained
    assert "floor" in explained  # of no column


def test_arms_that_were_validated_once_have_no_curves(show):
    result = made()
    for row in result["arms"]:
        row["curve"] = row["curve"][-1:]
    section = show(result)["curves"]
    assert not classed(section, "chart-plot")
    assert "Each arm was validated once, so there are no curves" in text(section)
    assert cells(section.find(".//table"))
    result = made()
    for row in result["arms"][1:]:
        row["curve"] = row["curve"][-1:]
    assert len(classed(show(result)["curves"], "chart-plot")) == 3


def test_what_has_no_number_gets_no_axis(show):
    result = made()
    for entry in (*result["contrasts"], result["aa"]):
        for key in ("mean", "differences", "interval_95"):
            del entry[key]
        entry["unavailable"] = "gpt diverged at seed 2"
    section = show(result)["differences"]
    assert "conv is not compared: gpt diverged at seed 2." in text(section)
    assert not section.findall(".//figure") + section.findall(".//table") + section.findall(".//details")
    result["aa"].pop("unavailable")
    result["contrasts"][0].pop("unavailable")
    assert "differences" not in show(result)
    for row in result["arms"]:
        row["nats_per_token"] = [None] * 3
        row["nats_per_token_interval_95"] = None
    section = show(result)["losses"]
    assert not section.findall(".//figure")
    assert cells(section.find(".//table"))
