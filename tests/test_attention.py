"""`shortcut attention`: its changes to the last layer against a slow reference, and its numbers against one another."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import shortcut
from test_models import ids, make, reference

from shortcut_cli import checkpoint, pictures, pipeline
from shortcut_cli.errors import UsageError
from shortcut_cli.models import merge
from shortcut_cli.models.blocks import Trace
from shortcut_cli.stages import attention
from shortcut_cli.tokenizers.base import Excerpt

FORMS = [
    {"mode": "replace", "taps": "2,4"},
    {"mode": "add", "taps": "0,2,5"},
    {"mode": "gated", "taps": "1,3"},
    {"mode": "replace", "taps": "2,4", "concat": "feature"},
    {"mode": "gated", "taps": "3"},
]


def quiet(*_, **__):
    pass


@pytest.mark.parametrize("options", FORMS, ids=str)
class TestChanges:
    def test_an_exchanged_source_is_that_of_the_next_row(self, options):
        """Rows that are equal exchange nothing; with other rows, the others' sources and losses stay as they are."""
        model = make("shortcut", options, open_gates=True).eval()
        x = ids(rows=3)
        same = x[:1].repeat(3, 1)
        with torch.no_grad():
            for m in range(len(model.taps)):
                assert torch.equal(model(same, trace=Trace(exchanged=m)), model(same, trace=Trace()))
                assert not torch.equal(model(x, trace=Trace(exchanged=m)), model(x, trace=Trace()))

    def test_what_comes_later_changes_nothing_before_it(self, options):
        model = make("shortcut", options, open_gates=True).eval()
        x = ids(rows=3)
        other = x.clone()
        other[:, 15] = (x[:, 15] + 1) % 37
        with torch.no_grad():
            for m in range(len(model.taps)):
                for change in ({"exchanged": m}, {"closed": m}):
                    a, b = model(x, trace=Trace(**change)), model(other, trace=Trace(**change))
                    assert torch.equal(a[:, :15], b[:, :15])

    def test_a_closed_source_gets_nothing_and_the_others_all(self, options):
        model = make("shortcut", options, open_gates=True).eval()
        x = ids()
        for m in range(len(model.taps)):
            trace, whole = Trace(closed=m, measure_distances=True), Trace()
            with torch.no_grad():
                model(x, trace=trace)
                model(x, trace=whole)
            kept = [n for n in range(len(model.taps)) if n != m]
            if not kept:
                assert trace.depth_weights.numel() == 0
                continue
            expected = whole.depth_weights[:, :, kept]
            assert torch.allclose(trace.depth_weights, expected / expected.sum(2, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("tapped", ["2,4", "0,3,5"])
def test_a_model_with_a_closed_tap_is_one_without_it(tapped):
    """Same weights: the model that has the tap, but closed, and one that was made with the others alone."""
    numbers = tapped.split(",")
    full = make("shortcut", {"taps": tapped, "project": "per_tap"}).eval()
    for m in range(len(numbers)):
        kept = [n for n in range(len(numbers)) if n != m]
        less = make("shortcut", {"taps": ",".join(numbers[n] for n in kept), "project": "per_tap"}).eval()
        state = dict(full.state_dict())
        for key in list(state):
            for part in ("features.norms.", "features.maps.", ".key_value."):
                before, _, after = key.partition(part)
                number, _, rest = after.partition(".")
                if after and int(number) == m:
                    state.pop(key, None)
                elif after and int(number) > m:
                    state[f"{before}{part}{int(number) - 1}.{rest}"] = full.state_dict()[key]
        last = sum(key.startswith("blocks.5.attention.key_value.") for key in less.state_dict())
        wanted = {key: value for key, value in state.items() if key in less.state_dict()}
        assert last == len(kept)
        less.load_state_dict(wanted)
        expected, _ = reference(less, ids())
        with torch.no_grad():
            assert torch.allclose(full(ids(), trace=Trace(closed=m)).double(), expected, atol=1e-5)


def test_a_gated_model_with_its_only_tap_closed_is_its_own_attention():
    model = make("shortcut", {"mode": "gated", "taps": "3"}, open_gates=True).eval()
    with torch.no_grad():
        closed = model(ids(), trace=Trace(closed=0))
        model.blocks[-1].attention.gate.zero_()
        assert torch.allclose(closed, model(ids()), atol=1e-5)


def test_distances_are_those_of_the_plain_softmax():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 17, 8, generator=generator)
    k = torch.randn(2, 3, 17, 4, 8, generator=generator)
    scores = torch.einsum("bhid,bhjmd->bhmij", q, k) / math.sqrt(8)
    shares = scores.masked_fill(torch.ones(17, 17).triu(1).bool(), -torch.inf).softmax(-1)
    back = torch.arange(17)[:, None] - torch.arange(17)
    assert torch.allclose(merge.distances(q, k), (shares * back).sum(-1), atol=1e-4)


def test_windows_are_spread_evenly_and_whole():
    row = np.arange(1000)
    found = attention.cut(lambda first, count: row[first : first + count], 1000, 99, 4)
    assert found.shape == (4, 100)
    assert [window[0] for window in found] == [0, 300, 600, 900]
    assert attention.cut(lambda first, count: row[first : first + count], 30, 99, 4).shape == (1, 30)
    assert len(attention.cut(lambda first, count: row[first : first + count], 250, 99, 64)) == 2


def test_batches_never_leave_one_window_alone():
    for count in range(1, 12):
        sizes = [len(part) for _, part in attention._batches(np.zeros((count, 3), int), 3)]
        assert sum(sizes) == count
        assert min(sizes) > 1 or count == 1


class TestARun:
    def look(self, text_run, out, **changes):
        arguments = {"prompt": None, "shards": text_run / "shards", "split": "val", "windows": 6, "out": out}
        arguments |= {"path": text_run / "shortcut" / "run.pt"} | changes
        return pipeline.look(**arguments, device="cpu", report=quiet)

    def test_the_parts_make_up_the_whole(self, text_run, tmp_path):
        result = self.look(text_run, tmp_path / "a")
        run = checkpoint.open_run(text_run / "shortcut" / "run.pt", "cpu")
        assert result["windows"] == 6
        assert result["tokens"] == 6 * run.recipe.model.context
        assert sum(result["mean_weights"].values()) == pytest.approx(1, abs=1e-5)
        (classes,) = result["classes"].values()
        assert {entry["class"] for entry in classes} >= {"letter", "space"}
        assert sum(entry["tokens"] for entry in classes) == result["tokens"]
        weights = np.array([entry["tokens"] for entry in classes]) / result["tokens"]
        assert weights @ [entry["nats_per_token"] for entry in classes] == pytest.approx(result["nats_per_token"])
        by_head = np.tensordot(weights, [entry["mass_by_head"] for entry in classes], 1)  # (H, M)
        assert np.allclose(by_head.T, [source["mass_by_head"] for source in result["sources"]], atol=1e-6)
        for m, source in enumerate(result["sources"]):
            for key in ("mass", "closed", "exchanged"):
                whole = source[key] if key == "mass" else source[key]["nats_per_token"]
                assert weights @ [entry[key][m] for entry in classes] == pytest.approx(whole, abs=1e-6)
            for key in ("closed", "exchanged"):
                low, high = source[key]["interval_95"]
                assert low <= source[key]["nats_per_token"] <= high
            assert 0 <= source["distance_tokens"] < run.recipe.model.context
        for entropy, largest in zip(result["entropy_nats_by_head"], result["largest_share_by_head"], strict=True):
            assert 0 <= entropy <= math.log(len(result["sources"])) + 1e-9
            assert 1 / len(result["sources"]) <= largest <= 1 + 1e-6
        assert json.loads((tmp_path / "a" / "attention.json").read_text()) == result

    def test_the_arrays_are_of_the_first_window(self, text_run, tmp_path):
        self.look(text_run, tmp_path / "a")
        found = np.load(tmp_path / "a" / "attention.npz")
        heads, sources, times = found["depth_weights"].shape
        assert found["distances"].shape == (heads, sources, times)
        assert np.allclose(found["depth_weights"].sum(1), 1, atol=1e-5)
        assert len(found["ids"]) == times
        for name in ("attention.png", "use.png"):
            assert (tmp_path / "a" / name).read_bytes()[:4] == b"\x89PNG"

    def test_a_single_window_exchanges_nothing_and_says_so(self, text_run, tmp_path):
        result = self.look(text_run, tmp_path / "a", windows=1)
        assert all(source["exchanged"] is None for source in result["sources"])
        assert all(source["closed"]["interval_95"] is None for source in result["sources"])

    def test_nothing_is_overwritten(self, text_run, tmp_path):
        self.look(text_run, tmp_path / "a", windows=1)
        with pytest.raises(UsageError, match="exists already"):
            self.look(text_run, tmp_path / "a", windows=1)

    def test_other_data_is_refused(self, text_run, tmp_path):
        with pytest.raises(UsageError, match="attends to no other layer"):
            self.look(text_run, tmp_path / "a", path=text_run / "gpt" / "run.pt")
        (tmp_path / "empty.txt").write_text("")
        with pytest.raises(UsageError, match=r"no tokens to look at|can't be used"):
            self.look(text_run, tmp_path / "a", prompt=tmp_path / "empty.txt")

    def test_a_prompt_is_looked_at_whole(self, text_run, tmp_path):
        done = shortcut(
            *("attention", "--ckpt", text_run / "shortcut" / "run.pt", "--prompt", text_run / "texts" / "000.txt"),
            *("--out", tmp_path / "a"),
            cwd=tmp_path,
        )
        assert "nats if closed" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    "excerpt",
    [
        Excerpt(),
        Excerpt(texts=["a$", "\n", "\u4e00", "x_y^{"] * 75),
        Excerpt(notes=np.array([[3, 30, 60, 90], [250, 300, 72, 1]])),
        Excerpt(notes=np.zeros((0, 4), int)),
        Excerpt(samples=np.sin(np.arange(300 * 320) / 9).astype(np.float32), rate_hz=24_000),
        Excerpt(samples=np.zeros(300 * 40, np.float32), rate_hz=24_000),
    ],
    ids=["nothing", "text", "notes", "no notes", "sound", "silence"],
)
def test_every_excerpt_is_drawn_without_a_warning(tmp_path, excerpt, recwarn):
    shares = np.full((3, 300), 1 / 3)
    pictures.draw_excerpt(shares, ("embedding", "layer 2", "layer 4"), excerpt, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert not [str(warning.message) for warning in recwarn]
