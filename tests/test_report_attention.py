"""Attention on pages: shares, places and intervals against numbers by hand, for every kind of excerpt."""

import html
import json
import re
from pathlib import Path

import mido
import numpy as np
import pretty_midi
import pytest
from conftest import quiet
from test_attention import Kinds
from test_evaluation import EOS, made_run

from shortcut_cli.errors import CheckFailed
from shortcut_cli.inference import runs
from shortcut_cli.report import assemble, attention, page
from shortcut_cli.stages import attention as stage
from shortcut_cli.tokenizers.midi import MidiOptions, MidiTokenizer

NAMES = ["embedding", "layer 1", "layer 2"]


def cost(value, interval=(-0.1, 0.3)):
    return {"nats_per_token": value, "interval_95": interval and [value + interval[0], value + interval[1]]}


def written(folder, weights, parts, names=NAMES, **changes):
    """What `shortcut attention` would write, of weights (M, T)."""
    (folder / "attention").mkdir(parents=True)
    sources = [
        {
            "source": name,
            "attention_weight": float(np.mean(row)),
            "attention_weight_by_head": [0.25 + m, 0.5 + m],
            "masked": cost(0.5 + m),
            "shuffled": cost(0.25 + m),
            "mean_ablated": cost(-1.0 - m),
        }
        for m, (name, row) in enumerate(zip(names, weights, strict=True))
    ]
    states = ["embedding", "layer 1", "layer 2"]
    content = {
        "model": "shortcut",
        "checkpoint": "shortcut-s1/run.pt",
        "step": 1500,
        "windows": 3,
        "tokens": 12,
        "nats_per_token": 1.5,
        "softmax": True,
        "sources": sources,
        "all_sources": {"masked": cost(9.0, None), "shuffled": None, "mean_ablated": cost(2.0)},
        "reads": [{"reader": "layer 3", "sources": names, "weights": [0.2] * len(names)}],
        "layers": [{"state": state, "lens_nats_per_token": 3.0 - n} for n, state in enumerate(states)],
        "cka": {"states": states, "matrix": [[1.0, 0.5, None], [0.5, 1.0, 0.25], [None, 0.25, 1.0]]},
    } | changes
    (folder / "attention" / "attention.json").write_text(json.dumps(content))
    arrays = {f"excerpt_{name}": np.array(value) for name, value in parts.items()}
    both = np.stack([np.asarray(weights) * 0.5, np.asarray(weights) * 1.5])  # two heads, (H, M, T)
    np.savez(folder / "attention" / "attention.npz", depth_weights=both, sources=np.array(names), **arrays)
    return folder


def shown(folder):
    (found,) = attention.sections(folder)
    return page.render("a run", [found])


def signed(words):
    """Numbers as print has them."""
    return words.replace("-", "\N{MINUS SIGN}")


def paths(text, kind):
    """The corners of the areas of each row, from top to bottom."""
    found = re.findall(rf'<path class="{kind}" d="([^"]*)"', text)
    return [[tuple(map(float, pair.split())) for pair in re.split("[MLZ]", path) if pair] for path in found]


SHARES = np.array([[0.5, 0.2, 0.1, 0.0], [0.3, 0.2, 0.3, 0.0], [0.2, 0.6, 0.6, 1.0]])


class TestShares:
    def test_shares_of_an_even_spread_are_those_of_the_readers(self):
        reads = [{"sources": ["a", "b"]}, {"sources": ["a", "b", "c", "d"]}]
        found = attention.even({"softmax": True, "reads": reads}, ["a", "b", "c", "d"])
        assert found.tolist() == [0.375, 0.375, 0.25, 0.25]
        assert not attention.even({"softmax": False, "reads": reads}, ["a", "b", "c", "d"]).any()

    def test_rows_are_deviations_at_the_places_of_their_tokens(self, tmp_path):
        text = shown(written(tmp_path, SHARES, {"texts": ["ab", "c", "defg", "\n"]}))
        edges = [0, 2, 3, 7, 8]
        deviations = SHARES - 1 / 3
        most = np.abs(deviations).max()
        for kind, sign in (("up", 1), ("down", -1)):
            for row, corners in zip(deviations[::-1], paths(text, kind), strict=True):  # the last source on top
                steps = corners[1:-1]
                assert [x for x, _ in steps] == pytest.approx(
                    [e / 8 * 1000 for e in [0, 2, 2, 3, 3, 7, 7, 8]], abs=0.06
                )
                heights = np.repeat(np.maximum(0, sign * row), 2)
                assert [y for _, y in steps] == pytest.approx(500 - sign * 480 * heights / most, abs=0.51)
        labels = re.findall(r"<em>(.*?) ([\u2212+][\d.]+)</em>", text)
        means = deviations @ np.diff(edges) / 8
        assert labels == [(name, signed(f"{mean:+.2f}")) for name, mean in list(zip(NAMES, means, strict=True))[::-1]]
        assert re.search('data-low="(.*?)" data-high="(.*?)"', text).groups() == ("0.0", "8.0")
        assert 'class="label-x">characters<' in text
        told = json.loads(html.unescape(re.search('data-rows="(.*?)"', text)[1]))
        assert told["edges"] == [1000 * edge / 8 for edge in edges]
        assert told["names"] == NAMES[::-1]
        assert told["values"] == [[signed(f"{value:+.3f}") for value in row] for row in deviations[::-1]]
        assert told["unit"] == "characters"

    @pytest.mark.parametrize(
        ("most", "tick"),
        [(0.6667, "0.5"), (0.45, "0.2"), (0.2, "0.2"), (0.0199, "0.01"), (5.1, "5"), (3e-6, "2e\u221206")],
    )
    def test_rows_have_a_scale(self, tmp_path, most, tick):
        weights = np.array([[0.0, 0.0], [0.0, -most], [0.0, 0.0]])
        text = shown(written(tmp_path, weights, {"texts": ["a", "b"]}, softmax=False))
        sides = re.findall("<em>.*?</em>(.*?)</div>", text)
        assert [re.findall(">([^<]+)<", side) for side in sides] == [[f"+{tick}", f"\u2212{tick}"]] * 3
        far = 480 * float(tick.replace("\u2212", "-")) / most
        lines = [
            tuple(map(float, pair)) for pair in re.findall('class="grid" x1="0" x2="1000" y1="(.*?)" y2="(.*?)"', text)
        ]
        assert lines == [(pytest.approx(500 + sign * far, abs=0.06),) * 2 for sign in (-1, 1)] * 3

    def test_the_loss_names_what_it_is_of(self, tmp_path):
        for name, split, words in (("a", "test", "of the test split"), ("b", None, "of a prompt")):
            text = shown(written(tmp_path / name, SHARES, {"texts": ["a"] * 4}, split=split))
            assert f"step 1,500: 3 windows {words}, 12 tokens in all, 1.5 nats per token.</p>" in text

    def test_weights_of_a_sum_are_shown_as_they_are(self, tmp_path):
        weights = np.array([[0.5, -1.0], [0.25, 0.25], [0.0, 0.0]])
        text = shown(written(tmp_path, weights, {"texts": ["a", "b"]}, softmax=False))
        assert re.findall("<em>(.*?)</em>", text) == ["layer 2 +0.00", "layer 1 +0.25", "embedding \u22120.25"]
        assert paths(text, "down")[2][3] == (500, 980)

    def test_many_tokens_are_averaged_by_their_width(self, tmp_path):
        weights = np.tile(SHARES, 250)  # 1,000 tokens
        text = shown(written(tmp_path, weights, {"texts": ["ab", "c", "defg", "\n"] * 250}))
        (corners, *_) = paths(text, "up")
        assert len(corners) - 2 == 2 * -(-1000 // 3)  # three tokens together
        rows, widths = (weights - 1 / 3)[2], np.tile([2, 1, 4, 1], 250)
        bins = [np.average(rows[i : i + 3], weights=widths[i : i + 3]) for i in range(0, 1000, 3)]
        low = [np.average((weights - 1 / 3)[0][i : i + 3], weights=widths[i : i + 3]) for i in range(0, 1000, 3)]
        most = max(np.abs(bins).max(), np.abs(low).max())
        assert [y for _, y in corners[1:-1:2]] == pytest.approx(500 - 480 * np.maximum(0, bins) / most, abs=0.6)

    def test_tokens_of_one_onset_are_one_step_in_beats(self, tmp_path):
        parts = {
            "notes": [[0, 3, 60, 90], [3, 4, 64, 20]],
            "note_beats": [[0.0, 1.5], [1.5, 4.0]],
            "token_beats": [0.0, 0.0, 0.0, 1.5],
        }
        text = shown(written(tmp_path, SHARES, parts))
        together = np.stack([SHARES[:, :3].mean(1), SHARES[:, 3]], 1) - 1 / 3
        for row, corners in zip(together[::-1], paths(text, "up"), strict=True):
            assert [x for x, _ in corners[1:-1]] == [0, 375, 375, 1000]
            heights = np.repeat(np.maximum(0, row), 2)
            assert [y for _, y in corners[1:-1]] == pytest.approx(
                500 - 480 * heights / np.abs(together).max(), abs=0.51
            )
        rects = [dict(re.findall(r'([a-z-]+)="([^"]*)"', rect)) for rect in re.findall("<rect [^>]*>", text)]
        assert [(float(rect["x"]), float(rect["width"])) for rect in rects] == [(0, 375), (375, 625)]
        assert "beats<" in text

    def test_sound_is_drawn_in_seconds(self, tmp_path):
        parts = {"samples": np.sin(np.arange(4 * 320) / 5).astype(np.float32), "rate_hz": 24_000}
        text = shown(written(tmp_path, SHARES, parts))
        assert float(re.search('data-high="(.*?)"', text)[1]) == pytest.approx(4 * 320 / 24_000)
        assert text.count('class="panel"') == 5
        assert [x for x, _ in paths(text, "up")[0][1:-1]] == [0, 250, 250, 500, 500, 750, 750, 1000]


class TestWords:
    def tokens(self, text):
        found = re.findall('<span class="k(\\d) u(\\d)" data-tip="([^"]*)">([^<]*)</span>', text, re.S)
        return [(int(k), int(u), html.unescape(tip), html.unescape(words)) for k, u, tip, words in found]

    def test_a_token_has_the_colour_of_its_source_and_all_shares(self, tmp_path):
        text = shown(written(tmp_path, SHARES, {"texts": ["ab", " <b>", "\n", "d"]}))
        found = self.tokens(text)
        assert [k for k, *_ in found] == [u for _, u, *_ in found] == [0, 2, 2, 2]
        assert "".join(words for *_, words in found) == "ab <b>\u21b5\nd"
        assert found[1][2].split("\n") == ["' <b>'", "layer 2: 0.600", "layer 1: 0.200", "embedding: 0.200"]
        legend = re.findall('<li><span class="k(\\d) u\\d">(.*?)</span> (.*?)</li>', text)
        assert legend == [("2", "layer 2", "75%"), ("1", "layer 1", "0%"), ("0", "embedding", "25%")]

    def test_tokens_that_can_not_be_seen_are_escapes(self, tmp_path):
        texts = ["\r", "\u200b", "\u202eab", "\u200d", "a\x1b[2J", "\r\n", "\t", " "]
        text = shown(written(tmp_path, np.tile(SHARES, 2), {"texts": texts}))
        found = [words for *_, words in self.tokens(text)]
        assert found == ["\\x0d", "\\u200b", "\\u202eab", "\\u200d", "a\\x1b[2J", "\\x0d\u21b5\n", "\t", " "]
        assert not set(text) & {"\r", "\u200b", "\u202e", "\u200d", "\x1b"}

    def test_what_is_read_anyway_is_no_layer(self, tmp_path):
        names = ["own keys", "layer 1", "layer 2"]
        text = shown(written(tmp_path, SHARES, {"texts": ["a", "b", "c", "d"]}, names))
        assert [k for k, *_ in self.tokens(text)] == [1, 2, 2, 2]
        assert "besides what the reader reads of its own" in text


class TestCosts:
    def rows(self, text):
        pattern = (
            r'left:([\d.]+)%"></s><i style="left:([\d.]+)%;width:([\d.]+)%"></i><b class="(\w+)" style="left:([\d.]+)%'
        )
        found = re.findall(pattern, text)
        return [(kind, float(zero), float(left), float(width), float(at)) for zero, left, width, kind, at in found]

    def test_marks_and_intervals_are_at_their_values(self, tmp_path):
        text = shown(written(tmp_path, SHARES, {"texts": ["a", "b", "c", "d"]}))
        values = [value for m in (2, 1, 0) for value in (0.5 + m, 0.25 + m, -1.0 - m)] + [9.0, 2.0]
        found = self.rows(text)
        assert [kind for kind, *_ in found] == ["masked", "shuffled", "mean_ablated"] * 3 + ["masked", "mean_ablated"]
        scale = (found[-2][4] - found[-2][1]) / 9.0  # percent for a nat
        assert scale == pytest.approx(100 / ((9.0 + 3.1) * 1.08), rel=1e-3)
        for (_, zero, left, width, at), value in zip(found, values, strict=True):
            assert at - zero == pytest.approx(value * scale, abs=0.02)
            low, high = (0, 0) if value == 9.0 else (-0.1, 0.3)
            assert left - zero == pytest.approx((value + low) * scale, abs=0.02)
            assert width == pytest.approx((high - low) * scale, abs=0.02)
        assert '<td role="cell"><span>+2.5000 [+2.4000, +2.8000]</span></td>' in text
        assert '<td role="cell"><span>+9.0000</span></td>' in text

    def test_every_table_goes_down_the_model_and_names_heads(self, tmp_path):
        text = shown(written(tmp_path, SHARES, {"texts": ["a", "b", "c", "d"]}))
        assert re.findall('rowspan="\\d">(.*?)<', text) == [*NAMES[::-1], "all at once"]
        heads, cka = re.findall('<table class="heat">(.*?)</table>', text, re.S)
        for table in (heads, cka, text[text.index("Each state") :].partition("</table>")[0]):
            assert re.findall('<th scope="row"[^>]*>(.*?)</th>', table) == NAMES[::-1]
        assert re.findall('<th scope="col">(.*?)</th>', heads) == ["source", "head 1", "head 2"]
        assert re.findall('<th scope="col">(.*?)</th>', cka) == ["state", *NAMES]
        values = re.findall("<td[^>]*>(.*?)</td>", cka)
        assert values == ["", "0.25", "1.00", "0.50", "1.00", "0.25", "1.00", "0.50", ""]
        assert re.findall(r"var\(--c(\d)\) (\d+)%", heads)[0] == ("0", "40")  # 2.25 of at most 2.5


class TestOdd:
    def test_without_attention_there_is_no_section(self, tmp_path):
        assert attention.sections(tmp_path) == []

    def test_a_single_source_has_nothing_to_compare(self, tmp_path):
        text = shown(written(tmp_path, np.ones((1, 2)), {"texts": ["one ", "<two>"]}, ["layer 2"]))
        assert "layer 2 is the only source" in text
        assert "one &lt;two&gt;" in text
        assert "by head" not in text
        assert "all at once" not in text
        assert not paths(text, "up")

    def test_names_are_inert(self, tmp_path):
        evil = '"><script>alert(1)</script>\x1b[2J'
        names = [evil, "layer 1", "layer 2"]
        changes = {"model": evil, "checkpoint": evil}
        text = shown(written(tmp_path, SHARES, {"texts": [evil] * 4}, names, **changes))
        body = text.partition("<main>")[2].partition("</main>")[0]
        assert "<script" not in body
        assert "\x1b" not in body

    @pytest.mark.parametrize(
        "change",
        [
            {"sources": None},
            {"sources": [{}]},
            {"reads": 3},
            {"reads": []},
            {"all_sources": {}},
            {"cka": {"states": ["a"], "matrix": [[1], [2]]}},
            {"layers": [3]},
        ],
        ids=str,
    )
    def test_damaged_numbers_are_said(self, tmp_path, change):
        text = shown(written(tmp_path, SHARES, {"texts": ["a", "b", "c", "d"]}, **change))
        assert "can&#39;t be shown" in text

    def test_a_damaged_file_is_said(self, tmp_path):
        folder = written(tmp_path, SHARES, {"texts": ["a", "b", "c", "d"]})
        (folder / "attention" / "attention.npz").write_bytes(b"PK\x03\x04 no")
        assert "The excerpt can&#39;t be shown" in shown(folder)
        assert "+2.5000" in shown(folder)
        (folder / "attention" / "attention.npz").unlink()
        assert "The excerpt can&#39;t be shown" in shown(folder)
        (folder / "attention" / "attention.json").write_text("{")
        assert "is damaged" in shown(folder)

    def test_a_folder_without_numbers_is_said(self, tmp_path):
        folder = written(tmp_path, SHARES, {"texts": ["a", "b", "c", "d"]})
        (folder / "attention" / "attention.json").unlink()
        assert "holds no attention.json" in shown(folder)
        (folder / "attention" / "attention.json").symlink_to("attention.json")
        assert "attention.json can&#39;t be read" in shown(folder)

    @pytest.mark.parametrize(
        "array",
        [
            np.ones((2, 3, 4), complex),
            np.full((2, 3, 4), 1e308),
            np.ones((2, 3, 4), bool),
            np.zeros((2, 3, 0)),
            np.ones(()),
        ],
        ids=["complex", "huge", "bool", "empty", "single"],
    )
    def test_weights_of_another_kind_are_said(self, tmp_path, array):
        folder = written(tmp_path, SHARES, {"texts": ["a", "b", "c", "d"]})
        np.savez(folder / "attention" / "attention.npz", depth_weights=array, sources=np.array(NAMES))
        assert "The excerpt can&#39;t be shown: " in shown(folder)

    def test_values_that_are_not_finite_are_said_to_be(self, tmp_path):
        layers = [{"state": "embedding", "lens_nats_per_token": float("inf")}]
        assert ">not finite</td>" in shown(written(tmp_path, SHARES, {"texts": ["a"] * 4}, layers=layers))

    def test_weights_that_are_not_finite_are_refused(self, tmp_path):
        weights = SHARES.copy()
        weights[0, 0] = np.nan
        assert "its weights are not finite" in shown(written(tmp_path, weights, {"texts": ["a"] * 4}))

    def test_what_an_earlier_version_wrote_has_its_shares_by_token(self, tmp_path):
        folder = written(tmp_path, SHARES, {})
        content = json.loads((folder / "attention" / "attention.json").read_text())
        for key in ("checkpoint", "step", "layers", "cka"):
            del content[key]
        (folder / "attention" / "attention.json").write_text(json.dumps(content))
        text = shown(folder)
        words = "3 windows of a split that was not noted, 12 tokens in all, 1.5 nats per token"
        assert f"<p>shortcut: {words}.</p>" in text
        assert 'class="label-x">tokens<' in text
        assert len(paths(text, "up")) == 3


@pytest.mark.parametrize("name", ["shortcut", "late_kv", "moda", "x0", "attnres", "hyper", "dense_last"])
def test_every_kind_of_reader_is_shown(tmp_path, monkeypatch, name):
    (tmp_path / "made").mkdir()
    taps = ["model.shortcut.taps=all"] if name == "shortcut" else []
    run = made_run(tmp_path / "made", "model.layers=3", *taps, name=name)
    monkeypatch.setattr(runs.Run, "tokenizer", lambda _: Kinds())
    windows = np.random.default_rng(0).integers(0, EOS + 1, (3, 7))
    result = stage.analyse(run, windows, tmp_path / "attention", resamples=9, batch=3, device="cpu", report=quiet)
    text = shown(tmp_path)
    assert "can&#39;t be shown" not in text
    sources = [entry["source"] for entry in result["sources"]]
    if len(sources) > 1:
        drawn = [html.unescape(words).rpartition(" ")[0] for words in re.findall("<em>(.*?)</em>", text)]
        assert drawn == sources[::-1]
    assert ("Weight of each source in each reader" in text) is (len(result["reads"]) > 1)


def test_notes_and_tokens_of_an_excerpt_have_their_beats(tmp_path):
    """At a resolution of 12, mido's onsets lie on steps."""
    file, track = mido.MidiFile(ticks_per_beat=480), mido.MidiTrack()
    for pitch, wait, length in ((60, 0, 480), (64, 240, 960), (67, 0, 120), (71, 1920, 480)):
        track += [mido.Message("note_on", note=pitch, velocity=90, time=wait)]
        track += [mido.Message("note_off", note=pitch, time=length)]
    file.tracks.append(track)
    file.save(tmp_path / "a.mid")
    tokenizer = MidiTokenizer(MidiOptions(name="midi"))
    ids = tokenizer.prompt(tmp_path / "a.mid")
    found = tokenizer.excerpt(ids)
    (played,) = pretty_midi.PrettyMIDI(str(tmp_path / "a.mid")).instruments
    wanted = sorted((2 * note.start, 2 * note.end) for note in played.notes)  # 120 quarters a minute
    assert found.note_beats.tolist() == [pytest.approx(pair) for pair in wanted]
    assert len(found.token_beats) == len(ids)
    for row, (start, _) in zip(found.notes, wanted, strict=True):
        assert found.token_beats[row[0]] == pytest.approx(start)
    assert (np.diff(found.token_beats) >= 0).all()
    assert found.token_beats[0] == 0
    assert tokenizer.excerpt(ids[:1]).note_beats.shape == (0, 2)


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\x05\x06" + b"\0" * 18, b"\x93NUMPY"], ids=repr)
def test_arrays_that_are_cut_off_are_a_sentence(tmp_path, content):
    written(tmp_path, SHARES, {"texts": ["a ", "b", "\n", "<i>"]})
    (tmp_path / "attention" / "attention.npz").write_bytes(content)
    (section,) = attention.sections(tmp_path)
    assert "The excerpt can&#39;t be shown: " in section.body


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rate_hz", np.array(0)),
        ("rate_hz", np.array(2**31 - 1)),
        ("samples", np.full(2400, np.nan, np.float32)),
        ("notes", np.array([[0.0, 1.0, 5e7, 64.0]])),
        ("notes", np.array([[0.0, 1.0, 60.0, np.inf]])),
    ],
    ids=str,
)
def test_an_excerpt_of_impossible_values_is_a_sentence(tmp_path, key, value):
    parts = {"samples": np.zeros(2400, np.float32), "rate_hz": np.array(24_000)}
    if key == "notes":
        parts = {"notes": value, "note_beats": np.array([[0.0, 1.0]]), "token_beats": np.arange(4.0)}
    written(tmp_path, SHARES, parts | {key: value})
    (section,) = attention.sections(tmp_path)
    assert "The excerpt can&#39;t be shown: " in section.body


def test_what_is_no_character_is_replaced(tmp_path):
    written(tmp_path, SHARES, {"texts": ["a ", "\ud800", "\n", "<i>"]})
    assert ">?</span>" in page.render("\udcff", attention.sections(tmp_path)).encode().decode()


def test_a_table_of_one_window_promises_no_interval(tmp_path):
    one = [
        entry | {"shuffled": None, "masked": cost(0.5, None), "mean_ablated": cost(1.0, None)} for entry in sources()
    ]
    whole = {"masked": cost(9.0, None), "shuffled": None, "mean_ablated": cost(2.0, None)}
    text = shown(written(tmp_path / "a", SHARES, {}, sources=one, all_sources=whole, windows=1))
    caption = "Loss that is added if a source is masked or mean-ablated, nats per token"
    assert f"<caption>{caption}</caption>" in text
    assert "There is only one window" in text
    text = shown(written(tmp_path / "b", SHARES, {}))
    assert "masked, shuffled (that of another window) or mean-ablated, nats per token, with 95 % intervals" in text
    assert "only one window" not in text


def sources():
    return [{"source": name, "attention_weight": 0.3, "attention_weight_by_head": [0.2, 0.4]} for name in NAMES]


def test_a_folder_of_attention_has_a_page_of_its_own(tmp_path):
    folder = written(tmp_path, [[0.2, 0.3], [0.3, 0.3], [0.5, 0.4]], {"texts": ["a", "b"]}) / "attention"
    assert assemble.found(folder) == [("attention", folder)]
    made = Path(assemble.write([folder])["report"])
    assert made == folder / "report.html"
    assert "Attention over layers" in made.read_text()
    assert "shortcut-s1/run.pt" in made.read_text()
    made.unlink()
    for content in ("[", "{}", '{"sources": 3}'):
        (folder / "attention.json").write_text(content)
        with pytest.raises(CheckFailed, match=r"attention\.json"):
            assemble.write([folder])
        assert not made.exists()
    (folder / "attention.json").unlink()
    few = written(tmp_path / "few", [[0.2], [0.3], [0.5]], {"texts": ["a"]})
    assert "The intervals are over 3 windows: so few say little about others." in shown(few)
    many = written(tmp_path / "many", [[0.2], [0.3], [0.5]], {"texts": ["a"]}, windows=10)
    assert "so few say little" not in shown(many)
