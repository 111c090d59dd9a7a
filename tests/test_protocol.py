"""The protocol of a comparison, with scripted runs: ladder, gate, positive control, looks, runs that diverge."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import test_compare as scripts
from scipy import stats
from test_compare import ASKED, PILOTS, SCRIPTED, SHARDS, TOKENS, Scripted, document_nats, flops_of
from test_significance import power

from shortcut_cli.cli import tables, worker
from shortcut_cli.compare import contrasts, looks, runner
from shortcut_cli.compare import table as arms_table
from shortcut_cli.compare.arms import plan
from shortcut_cli.compare.asked import ladder
from shortcut_cli.compare.runner import PlannedRun
from shortcut_cli.config import reading, writing
from shortcut_cli.errors import CheckFailed, Diverged, UsageError
from shortcut_cli.stages import comparison
from shortcut_cli.training import checkpoint

WIDTHS = ("16", "24", "40", "48")
RUNGS = {f"gpt-4x{width}x{2 * int(width)}": ("gpt", 4, int(width), 2 * int(width)) for width in WIDTHS}
POINTS = ["gpt", *RUNGS, "twin"]  # through which the line goes
NARROW = {"gpt-4x8x16": ("gpt", 4, 8, 16)}
SHAPES = scripts.SHAPES | RUNGS | NARROW


def size_of(label, by):
    """FLOPs or parameters, by hand."""
    if label in ASKED:
        return scripts.wanted_size(label)[2 if by == "flops" else 0]
    _, layers, width, ffn = SHAPES[label]
    return flops_of(layers, width, ffn) if by == "flops" else layers * (4 * width**2 + 2 * width * ffn) + 9 * width


@pytest.fixture
def laddered(monkeypatch, tmp_path):
    """A script whose baselines lie about a line; `shortcut` is 0.04 nats below it and `late_kv` on it."""
    rng = np.random.default_rng(11)
    seeds = rng.normal(0, 0.02, 3)
    known = {}
    for label in SHAPES:
        below = {"shortcut": -0.04, "late_kv": 0.0}.get(label, 0.0)
        line = 4.5 - 0.2 * math.log(size_of(label, "flops")) + below
        known[label] = tuple((line + seeds + rng.normal(0, 0.004, 3)).tolist())
    for name in ("NATS", "LOWEST"):
        monkeypatch.setattr(scripts, name, known)
    monkeypatch.setattr(scripts, "BEST", dict.fromkeys(known, 0.002))
    monkeypatch.setattr(scripts, "LABELS", tuple(known))
    script = Scripted(monkeypatch, tmp_path)
    script.shapes |= {shape: label for label, shape in SHAPES.items()}
    script.nats = known
    return script


def wanted(nats, labels, seeds, label, places, points=POINTS):
    """A contrast with the ladder by lstsq and plain sums: mean, standard error, degrees of freedom, slope, inverse."""
    losses = np.array([nats[one][:seeds] for one in labels])
    rows = [[float(a == b) for b in range(len(labels))] + [float(s == t) for t in range(1, seeds)]
            for a in range(len(labels)) for s in range(seeds)]  # fmt: skip
    left = losses.ravel() - np.array(rows) @ np.linalg.lstsq(np.array(rows), losses.ravel(), rcond=None)[0]
    free = (len(labels) - 1) * (seeds - 1)
    residual = left @ left / free / seeds
    design = np.array([[1.0, math.log(places[one])] for one in points])
    means = np.array([np.mean(nats[one][:seeds]) for one in points])
    line, *_ = np.linalg.lstsq(design, means, rcond=None)
    off = means - design @ line
    scatter, few = off @ off / (len(points) - 2), len(points) - 2
    alone = stats.f.sf(scatter / residual, few, free) < 0.15 and scatter > residual
    variance, freedom = (scatter, few) if alone else ((few * scatter + free * residual) / (few + free), few + free)
    row = np.array([1.0, math.log(places[label])])
    inverse = np.linalg.inv(design.T @ design)
    mean = float(np.mean(nats[label][:seeds]) - row @ line)
    return mean, math.sqrt(variance * (1 + row @ inverse @ row)), freedom, line, (inverse, variance, row)


@pytest.mark.parametrize("match", ["flops", "params"])
def test_every_arm_stands_against_the_line_through_the_baselines(laddered, match):
    result = laddered("shortcut", "late_kv", rungs=WIDTHS, match=match, pairs=[("late_kv", "shortcut")])
    labels = ["gpt", "shortcut", "late_kv", *RUNGS, "twin"]
    assert [row["label"] for row in result["arms"]] == labels == [label for label, _, seed in laddered.ran if seed == 7]
    places = {label: size_of(label, match) for label in labels}
    for entry in result["contrasts"][:2]:
        mean, error, freedom, line, (inverse, variance, row) = wanted(laddered.nats, labels, 3, entry["arm"], places)
        assert (entry["baseline"], entry["freedom"], entry["baselines"]) == ("ladder", freedom, [])
        assert (entry["mean"], entry["error"]) == (pytest.approx(mean), pytest.approx(error))
        reach = stats.t.ppf(0.975, freedom) * error
        assert entry["interval_95"] == pytest.approx((mean - reach, mean + reach))
        assert entry["p"] == pytest.approx(2 * stats.t.sf(abs(mean) / error, freedom))
        assert np.mean(entry["differences"]) == pytest.approx(mean)
        shift, limit = entry["detectable"] / error, stats.t.isf(entry["level"] / 2, freedom)
        assert power(shift, limit, freedom) == pytest.approx(0.8, abs=1e-5)
        assert entry["gain"]["gain"] == pytest.approx(math.exp(mean / line[1]))
        # Fieller: at each end, the distance of the shifted line from the loss is just significant.
        for end in entry["gain"]["interval_95"]:
            if end is not None:
                f = math.log(end)
                spread = variance * (1 + row @ inverse @ row + f**2 * inverse[1, 1] + 2 * f * (row @ inverse[:, 1]))
                assert (mean - f * line[1]) ** 2 == pytest.approx(stats.t.ppf(0.975, freedom) ** 2 * spread)
    documents = result["contrasts"][0]["documents_interval_95"]
    design = np.array([[1.0, math.log(places[one])] for one in POINTS])
    weights = np.array([1.0, math.log(places["shortcut"])]) @ np.linalg.inv(design.T @ design) @ design.T
    nats = np.array(
        [
            document_nats("shortcut", seed)
            - sum(w * document_nats(one, seed) for w, one in zip(weights, POINTS, strict=True))
            for seed in (7, 8, 9)
        ]
    )
    generator = np.random.default_rng(1)
    drawn = generator.integers(0, 3, (2000, 2))
    rows = [generator.integers(0, 6, 6) for _ in range(2000)]
    means = [nats[s].mean(0)[row].sum() / TOKENS[row].sum() for s, row in zip(drawn, rows, strict=True)]
    assert documents == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))
    beaten, even, pair = (entry["verdict"] for entry in result["contrasts"])
    assert beaten.startswith("shortcut beats the ladder by 0.0")
    assert "late_kv beats" not in even
    assert pair.startswith("late_kv loses to shortcut by ")
    assert result["ladder"]["rungs"] == POINTS
    # The band: at each cost the line, and what a test of an arm there would call its interval.
    band = result["ladder"]["band"]
    _, _, freedom, line, (inverse, variance, _) = wanted(laddered.nats, labels, 3, "gpt", places)
    ends = [min(places[one] for one in POINTS), max(places[one] for one in POINTS)]
    assert [band[0]["cost"], band[-1]["cost"]] == pytest.approx(ends)
    for point in band:
        row = np.array([1.0, math.log(point["cost"])])
        reach = stats.t.ppf(0.975, freedom) * math.sqrt(variance * (1 + row @ inverse @ row))
        found = (point["loss"], point["low"], point["high"])
        assert found == pytest.approx((row @ line, row @ line - reach, row @ line + reach))
    assert result["looks"]["family"] == ["shortcut:ladder", "late_kv:ladder", "late_kv:shortcut"]
    # The twin against the rungs without itself.
    mean, error, freedom, *_ = wanted(laddered.nats, labels, 3, "twin", places, POINTS[:-1])
    assert (result["aa"]["mean"], result["aa"]["error"]) == (pytest.approx(mean), pytest.approx(error))
    html = Path(result["report"]).read_text()
    assert "a ladder of 6 baselines over the log of" in html
    assert "A/A: should be 0" in html


def test_an_arm_beyond_the_ladder_is_named_before_training_and_not_compared(laddered):
    result = laddered("shortcut", "late_kv", rungs=("8", "16", "24"), match="params", seeds=2)
    assert laddered.notes[0] == (
        "shortcut (40,288 params) will not be compared with the ladder, whose rungs have 2,120 to 33,056: "
        "add 40 to --ladder"
    )
    first, *_ = result["contrasts"]
    assert first["unavailable"].startswith("its non-embedding parameters, 40,288, are not between those of the ladder")
    assert first["verdict"] == f"shortcut is not compared with the ladder: {first['unavailable']}."
    assert "mean" not in first
    assert f"shortcut is not compared: {first['unavailable']}." in Path(result["report"]).read_text()


def test_costs_in_seconds_are_those_that_were_measured(laddered):
    result = laddered("late_kv", rungs=WIDTHS, match="time", seeds=2)
    speeds = {row["label"]: row["tokens_per_s"] for row in result["arms"]}
    assert result["ladder"]["costs"] == [1 / speeds[label] for label in POINTS]
    places = {label: 1 / speed for label, speed in speeds.items()}
    (entry,) = result["contrasts"]
    within = min(places[one] for one in POINTS) <= places["late_kv"] <= max(places[one] for one in POINTS)
    assert ("mean" in entry) == within
    if within:
        assert entry["mean"] == pytest.approx(wanted(laddered.nats, list(speeds), 2, "late_kv", places)[0])


def test_rungs_are_widths_or_layers_and_widths():
    plain = reading.read("text-tiny", [*SCRIPTED, "model.name=gpt"])
    found = [rung.model for rung in ladder(plain, ("16", "6x32", "40", "32", "2x32"))]
    assert [(one.layers, one.width, one.heads, one.ffn) for one in found] == [
        (2, 32, 4, 64), (4, 16, 2, 32), (4, 32, 4, 64), (4, 40, 5, 80), (6, 32, 4, 64)
    ]  # fmt: skip
    for rungs, words in (
        (("16", "x"), "neither a width nor layers x width"),
        (("-16",), "neither a width"),
        (("9" * 5000,), "'9{40}' is neither a width"),
        (("9" * 5000 + "x32",), "neither a width"),
        (("\u0663x16",), "neither a width"),
        (("16", "24", "42"), "width 42 is not a multiple of 8"),
        (("16", "24"), "3 rungs with the recipe's own, 4x32, are too few"),
        (("16", "24", "0"), "width 0 is not a multiple"),
    ):
        with pytest.raises(UsageError, match=words):
            ladder(plain, rungs)


def test_another_ladder_in_the_same_folder_is_refused(laddered):
    laddered("late_kv", rungs=WIDTHS, match="flops", seeds=2)
    laddered.ran.clear()
    for rungs in ((*WIDTHS, "64"), ()):
        with pytest.raises(UsageError, match="holds a different comparison"):
            laddered("late_kv", rungs=rungs, match="flops", seeds=2)
    laddered("late_kv", rungs=WIDTHS[::-1], match="flops", seeds=2)
    assert laddered.ran == []


def test_the_twin_differs_in_a_hundredth_of_its_feed_forward_layers():
    plain = reading.read("text-tiny", [*SCRIPTED, "model.ffn=256"])
    arms = plan(plain, [], 27, "none", lambda _: 1.0)
    assert list(arms) == ["gpt", "twin"]
    assert (arms["twin"].recipe.model.ffn, arms["twin"].recipe.model.width, arms["twin"].role) == (260, 32, "twin")
    assert arms["twin"].size.flops / arms["gpt"].size.flops < 1.02


@pytest.mark.parametrize(("documents", "words"), [(1, "1 document,"), (2, "2 documents,")])
def test_intervals_over_blocks_are_called_so(scripted, monkeypatch, documents, words):
    monkeypatch.setattr(scripts, "REST", scripts.REST | {"interval_over": "blocks", "documents": documents})
    result = scripted("shortcut", seeds=3)
    (said,) = [notice for notice in result["notices"] if "over blocks" in notice]
    assert said.startswith(f"The test split has {words} too few to be drawn from")
    assert {(row["documents"], row["interval_over"]) for row in result["arms"]} == {(documents, "blocks")}


def test_there_is_no_verdict_unless_the_baseline_is_clearly_below_the_floors(scripted):
    scripted.measure = None
    comparison.floors.measure = lambda *_: {
        "trained_tokens": 1,
        "scores": {
            name: {"nats_per_token": nats, "bits_per_unit": 1.0} for name, nats in (("unigram", 3.9), ("5-gram", 2.69))
        },
    }
    result = scripted("shortcut", "late_kv", seeds=3)
    first, aa = result["notices"]
    assert first.startswith("No verdict: gpt (2.6000) is not 0.1 nats per token below the 5-gram (2.6900).")
    assert aa.startswith("A/A: ")
    assert [entry["verdict"] for entry in result["contrasts"]] == [
        f"No verdict on shortcut against {scripts.WIDER} (-0.0503 nats per token).",
        "No verdict on late_kv against gpt (+0.0002 nats per token).",
    ]
    html = Path(result["report"]).read_text()
    assert re.search(r"<main>.*?<p[^>]*>(.*?)</p>", html, re.S)[1] == f"<strong>{first}</strong>"
    assert tables.comparison(result).title.plain.startswith("No verdict: gpt")
    Path(result["report"]).unlink()
    assert scripted("shortcut", "late_kv", seeds=3, page=False) == {k: v for k, v in result.items() if k != "report"}
    assert not Path(result["report"]).exists()
    # It was no look at a verdict, so that more seeds may join.
    assert "looks" not in json.loads((scripted.out / comparison.COMPARISON).read_text())


@pytest.fixture
def scripted(monkeypatch, tmp_path):
    return Scripted(monkeypatch, tmp_path)


def test_the_gate_opens_a_tenth_of_a_nat_below_the_lowest_floor():
    def gate(baseline, **floors):
        scores = {name: {"nats_per_token": nats} for name, nats in floors.items()}
        return contrasts.gate({"gpt": {"nats_per_token": baseline}}, {"scores": scores})["open"]

    assert gate([2.0, 2.2], ngram=2.2, unigram=9.0)
    assert not gate([2.0, 2.2], ngram=2.19, unigram=9.0)
    assert not gate([2.0, 2.2], ngram=9.0, codebook=2.19)  # whichever it is
    assert not gate([2.0, None], ngram=9.0)


def test_a_positive_control_that_is_not_found_is_said(scripted, monkeypatch):
    assert scripted("shortcut", "late_kv", seeds=3)["control"] is None
    monkeypatch.setattr(contrasts, "CONTROL", "late_kv")
    result = scripted("shortcut", "late_kv", seeds=3, pairs=[("late_kv", "shortcut")])
    tested = result["contrasts"][1]
    assert tested["arm"] == "late_kv"
    assert result["control"] == {
        "arm": "late_kv",
        "found": False,
        "mean": tested["mean"],
        "detectable": tested["detectable"],
    }
    assert result["notices"][0] == (
        f"The positive control late_kv, which is known to help, was not found: it differs by {tested['mean']:+.4f} "
        f"nats per token, and this comparison finds a difference of {tested['detectable']:.4f} with 80 % power, "
        "smaller ones less often."
    )
    result = scripted("shortcut", "late_kv", seeds=1)  # nothing can be tested
    assert result["notices"][0].endswith("was not found: this comparison could not have seen anything.")
    monkeypatch.setattr(contrasts, "CONTROL", "shortcut")
    result = scripted("shortcut", "late_kv", seeds=3)
    assert (result["control"]["arm"], result["control"]["found"]) == ("shortcut", True)
    assert result["notices"][0].startswith("A/A")
    monkeypatch.setattr(contrasts, "CONTROL", "shortcut_local")  # it loses, which is not what is known of it
    assert not scripted("shortcut_local", seeds=3)["control"]["found"]


def test_added_seeds_are_tested_at_the_levels_of_the_plan(scripted):
    first = scripted("shortcut", seeds=2, most_seeds=3)
    (entry,) = first["contrasts"]
    assert entry["level"] == pytest.approx(looks.nominal(0.05, [2], 3))
    assert entry["level"] < 0.02
    assert scripted("shortcut", seeds=2) == first  # the same look again, under the plan that was kept
    with pytest.raises(UsageError, match="under the plan of at most 3 seeds, not 5"):
        scripted("shortcut", seeds=3, most_seeds=5)
    with pytest.raises(UsageError, match="--most-seeds 1 is less than --seeds 2"):
        scripted("shortcut", seeds=2, most_seeds=1)
    second = scripted("shortcut", seeds=3)
    assert second["looks"] == {"planned": 3, "seeds": [2, 3], "family": ["shortcut:matched"]}
    assert second["contrasts"][0]["level"] == pytest.approx(looks.nominal(0.05, [2, 3], 3))
    assert second["contrasts"][0]["level"] < 0.05


def test_seeds_that_were_not_planned_test_nothing(scripted):
    scripted("shortcut", seeds=2)
    result = scripted("shortcut", seeds=3)
    (entry,) = result["contrasts"]
    assert entry["level"] == 0
    assert entry["verdict"] == (
        f"shortcut is 0.0503 nats per token below {scripts.WIDER}, without a verdict: earlier looks at fewer seeds "
        "have spent the 5 %."
    )
    json.loads((scripted.out / "compare.json").read_text(), parse_constant=pytest.fail)


def test_contrasts_that_are_left_out_later_still_count(scripted):
    scripted("shortcut", "late_kv", "value_residual", seeds=2)
    result = scripted("shortcut", seeds=2)
    assert result["looks"]["family"] == ["shortcut:matched", "late_kv:matched", "value_residual:matched"]
    assert result["contrasts"][0]["level"] == pytest.approx(0.05 / 3)
    assert result["contrasts"][0]["p_holm"] == pytest.approx(min(1, 3 * result["contrasts"][0]["p"]))


@pytest.mark.parametrize(
    ("pairs", "words"),
    [([("shortcut", "hyper")], "'hyper' is not among --models"), ([("gpt", "gpt")], "gpt is compared with itself")],
)
def test_a_contrast_of_other_arms_trains_nothing(scripted, pairs, words):
    with pytest.raises(UsageError, match=words):
        scripted("shortcut", pairs=pairs)
    assert scripted.ran == []
    assert not (scripted.out / comparison.COMPARISON).exists()


def test_a_pair_is_one_contrast_whichever_way_it_is_named(scripted):
    pairs = [("shortcut", "gpt"), ("gpt", "shortcut"), ("late_kv", "shortcut")]
    result = scripted("shortcut", "late_kv", seeds=2, pairs=pairs)
    named = [(entry["arm"], entry["baseline"]) for entry in result["contrasts"]]
    assert named == [("shortcut", scripts.WIDER), ("late_kv", "gpt"), ("shortcut", "gpt"), ("late_kv", "shortcut")]


def test_a_contrast_that_is_there_already_counts_once_and_is_said_so(scripted):
    alone = scripted("shortcut", match="none", seeds=3)
    scripted.notes.clear()
    (entry,) = alone["contrasts"]
    assert entry["level"] == pytest.approx(0.05)
    assert entry["p_holm"] == pytest.approx(entry["p"])
    pairs = [("shortcut", "gpt"), ("gpt", "shortcut")]
    assert scripted("shortcut", match="none", seeds=3, pairs=pairs) == alone
    assert scripted.notes == [
        f"--contrast {pair} is among the contrasts already (shortcut:matched): it counts once"
        for pair in ("shortcut:gpt", "gpt:shortcut")
    ]


def test_the_plain_model_counts_once_if_it_is_the_only_baseline(scripted):
    pairs = [("late_kv", "gpt"), ("shortcut", "gpt"), ("gpt", "shortcut")]  # gpt is not the baseline of shortcut
    result = scripted("shortcut", "late_kv", seeds=2, pairs=pairs)
    assert [entry["baselines"] for entry in result["contrasts"][:2]] == [[scripts.WIDER, scripts.DEEPER], ["gpt"]]
    assert result["looks"]["family"] == ["shortcut:matched", "late_kv:matched", "gpt:shortcut"]
    (first, second) = [note for note in scripted.notes if note.startswith("--contrast")]
    assert first.startswith("--contrast late_kv:gpt is among the contrasts already (late_kv:matched)")
    assert second.startswith("--contrast gpt:shortcut is among the contrasts already (gpt:shortcut)")


def diverging(script, *which):
    """Let runs of (label, rate, seed), any of which may be None, diverge."""
    write = script.write

    def instead(folder, label, rate, seed, device):
        if any(all(a in (None, b) for a, b in zip(one, (label, rate, seed), strict=True)) for one in which):
            made = reading.read(str(folder / "run.toml"))
            inputs = checkpoint.made_from(made.model_dump(), SHARDS)
            (folder / "diverged.json").write_text(json.dumps({"inputs": inputs, "diverged": "not finite at step 3"}))
        else:
            write(folder, label, rate, seed, device)

    script.write = instead


def test_a_run_that_diverges_is_listed_and_stops_nothing(scripted):
    diverging(scripted, ("value_residual", None, 8))
    result = scripted("shortcut", "value_residual", "late_kv", seeds=3)
    row = next(row for row in result["arms"] if row["label"] == "value_residual")
    assert row["diverged"] == {"8": "not finite at step 3"}
    assert (row["nats_per_token"][1], row["validation"][1]) == (None, None)
    assert "value_residual diverged at seed 8: not finite at step 3" in result["notices"]
    verdicts = {entry["arm"]: entry["verdict"] for entry in result["contrasts"]}
    assert verdicts["value_residual"] == "value_residual is not compared with gpt: value_residual diverged at seed 8."
    assert "beats" in verdicts["shortcut"]
    shown = next(cells for cells in arms_table.rows(result) if cells[0] == "value_residual")
    assert shown[-2:] == (None, None)
    html = Path(result["report"]).read_text()
    assert "diverged at seed 8</span>" in html
    row = r'<th scope="row"[^>]*>value_residual</th>\s*<td[^>]*>8</td>\s*<td[^>]*>not finite at step 3</td>'
    assert re.search(row, html)
    # It is not tried again, unless it would be another run.
    scripted.ran.clear()
    assert scripted("shortcut", "value_residual", "late_kv", seeds=3) == result
    assert scripted.ran == []
    path = scripted.out / "runs" / "value_residual-lr0.002-s8" / "diverged.json"
    for damage in ("{", '{"inputs": {}}', json.dumps({"inputs": {"shards": SHARDS}, "diverged": "x"})):
        path.write_text(damage)
        scripted.ran.clear()
        scripted("shortcut", "value_residual", "late_kv", seeds=3)
        assert scripted.ran == [("value_residual", 0.002, 8)]


def test_a_comparison_of_which_every_arm_diverges_ends_without_a_verdict(scripted):
    diverging(scripted, (None, None, 7))
    result = scripted("shortcut", seeds=2, match="none")
    assert result["notices"][0].startswith("No verdict: gpt (diverged)")
    assert result["contrasts"][0]["unavailable"] == "shortcut diverged at seed 7"
    assert result["aa"]["unavailable"] == "twin diverged at seed 7"
    assert "report" in result


@pytest.mark.parametrize("apart", [0.0, 0.05])
def test_an_arm_that_scatters_more_is_named_beside_the_verdicts(laddered, apart):
    own = laddered.nats["shortcut"] = (2.5, 2.4, 2.4)
    for number, label in enumerate(RUNGS):  # if they are far from the line, seeds have no part in intervals
        laddered.nats[label] = tuple(loss + (-1) ** number * apart for loss in laddered.nats[label])
    result = laddered("shortcut", "late_kv", rungs=WIDTHS, match="flops")
    assert result["ladder"]["scattered"] == bool(apart)
    others = np.array([laddered.nats[label] for label in ("late_kv", *POINTS)])
    left = others - others.mean(0) - others.mean(1)[:, None] + others.mean()
    variance = (left**2).sum() / 12
    deviation = math.sqrt(np.var(np.array(own) - others.mean(0), ddof=1) - variance / 7)
    (said,) = [words for words in result["notices"] if "scatters" in words]
    assert said.startswith(
        f"shortcut scatters over seeds more than the other arms (standard deviation {deviation:.4f} against "
        f"{math.sqrt(variance):.4f}, p = "
    )
    end = "its own intervals are too narrow" + ("." if apart else ", and those of the others too wide.")
    assert said.endswith(f"All share one estimate of chance: {end}")


def test_a_rate_at_which_a_pilot_diverges_is_not_chosen(scripted):
    diverging(scripted, (None, 0.004, PILOTS[1]), (None, 0.008, None))
    result = scripted("late_kv", lrs=(0.001, 0.002, 0.004), seeds=2)
    for label, curve in result["pilots"].items():
        assert math.isinf(curve["validation"]["0.004"][1])
        assert not math.isinf(curve["validation"]["0.004"][0])
        assert curve["chosen"] == 0.002, label  # no parabola through what is infinite
        assert f"A pilot of {label} diverged at the rate 0.004." in result["notices"]
    assert re.search("<td[^>]*>diverged</td>", Path(result["report"]).read_text())
    kept = json.loads((scripted.out / "compare.json").read_text(), parse_constant=pytest.fail)
    assert kept["pilots"]["gpt"]["validation"]["0.004"][1] is None
    assert result["arms"][0]["validation_by_lr"]["0.004"] == math.inf


def test_a_ladder_stands_without_a_rung_that_diverged_and_not_without_two(laddered):
    diverging(laddered, ("gpt-4x16x32", None, 7))
    result = laddered("late_kv", rungs=WIDTHS, match="flops", seeds=2)
    assert result["ladder"]["rungs"] == [label for label in POINTS if label != "gpt-4x16x32"]
    assert "mean" in result["contrasts"][0]


def test_too_few_rungs_that_did_not_diverge_are_no_ladder(laddered):
    diverging(laddered, *((label, None, 7) for label in list(RUNGS)[:3]))
    result = laddered("late_kv", rungs=WIDTHS, match="flops", seeds=2)
    assert result["ladder"] is None
    assert result["contrasts"][0]["unavailable"] == "only 3 rungs of the ladder have a loss and a cost"
    assert result["notices"][0].startswith("A/A: not available, only 2 rungs")


def test_the_process_of_a_run_that_diverges_says_so_and_ends_well(monkeypatch, tmp_path):
    def train(*_, **__):
        raise Diverged("the loss is not finite at step 3; the last good state is kept in x")

    monkeypatch.setattr("shortcut_cli.stages.training.train", train)
    monkeypatch.setattr("shortcut_cli.stages.pipeline.score", lambda *_, **__: pytest.fail("it was scored"))
    (tmp_path / "manifest.json").write_text(json.dumps({"checksum": SHARDS}))
    arm = plan(reading.read("text-tiny", [*SCRIPTED, f"data.shards={tmp_path}"]), [], 27, "none", None)["gpt"]
    planned = PlannedRun(arm, 0.5, 3)
    folder = planned.folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(writing.dump(planned.recipe()))
    worker.run(str(folder / "run.toml"), folder, "cpu")
    one = scripts.make_runner(tmp_path)
    found = one.result(planned)
    assert (found.validation, found.diverged) == (math.inf, "the loss is not finite at step 3")
    assert one._finished(PlannedRun(arm, 0.25, 3)) is None
    assert runner.divergence_of(folder, checkpoint.made_from(planned.recipe().model_dump(), "b" * 64)) == ""


def test_pilots_are_short_and_on_seeds_of_their_own():
    resolved = reading.read("text-tiny", [*SCRIPTED, "train.steps=10", "train.warmup=9", "train.schedule_steps=9"])
    arm = plan(resolved, [], 27, "none", None)["gpt"]
    made = [one.recipe().train for one in runner.pilots(arm, 0.5)]
    assert [(one.steps, one.warmup, one.schedule_steps, one.lr, one.seed) for one in made] == [
        (3, 2, 3, 0.5, seed) for seed in PILOTS
    ]
    late = reading.with_settings(resolved, [f"train.seed={2**63 - 1}"])
    seeds = [one.recipe().train.seed for one in runner.pilots(plan(late, [], 27, "none", None)["gpt"], 0.5)]
    assert seeds == [999_999, 1_000_000]


LOOKS_OF_NO_ONE = [
    *([], None, "x", {"seeds": 3}, {"seeds": ["1"]}, {"seeds": [[1]]}, {"seeds": [0]}, {"seeds": [True]}),
    *({"seeds": [10**400]}, {"planned": "3"}, {"planned": 2.5}, {"planned": -1}, {"planned": None}),
    *({"family": "x"}, {"family": [["x"]]}, {"family": [{}]}),
]


def test_looks_that_are_no_table_are_damage(scripted):
    scripted("late_kv", seeds=1)
    path = scripted.out / comparison.COMPARISON
    kept = json.loads(path.read_text())
    for looks_of in LOOKS_OF_NO_ONE:
        path.write_text(json.dumps(kept | {"looks": looks_of}))
        with pytest.raises(CheckFailed, match="its looks are no table"):
            scripted("late_kv", seeds=1)
