"""`shortcut attention`: its changes to the last layer against a slow reference, and its numbers against one another."""

import itertools
import json
import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import shortcut
from test_evaluation import END, made_run, plain_interval
from test_models import ids, make, reference

from shortcut_cli import checkpoint, pictures, pipeline
from shortcut_cli.errors import UsageError
from shortcut_cli.models import merge
from shortcut_cli.models.blocks import Trace
from shortcut_cli.stages import attention
from shortcut_cli.tokenizers.base import Classes, Excerpt

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
    def test_an_exchanged_source_is_that_of_the_row_before(self, options):
        """Rows that are equal exchange nothing; what comes before the first row is the last."""
        model = make("shortcut", options, open_gates=True).eval()
        x = ids(rows=3)
        same = x[:1].repeat(3, 1)
        with torch.no_grad():
            for m in range(len(model.taps)):
                assert torch.equal(model(same, trace=Trace(exchanged=m)), model(same, trace=Trace()))
                for first in range(3):  # the rows first and first + 1 are equal: only the second gets what it had
                    pair = x.clone()
                    pair[(first + 1) % 3] = pair[first]
                    exchanged, whole = model(pair, trace=Trace(exchanged=m)), model(pair, trace=Trace())
                    alike = [torch.equal(a, b) for a, b in zip(exchanged, whole, strict=True)]
                    assert alike == [row == (first + 1) % 3 for row in range(3)]

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


class Kinds:
    """A tokenizer that sorts in two ways, one with a class that never occurs and one that leaves tokens out."""

    def __init__(self):
        self.shown = []

    def classes(self, ids):
        size = Classes(["small", "never", "large"], np.where(ids == 3, -1, np.where(ids < 3, 0, 2)))
        return {"size": size, "parity": Classes(["odd", "even"], 1 - ids % 2)}

    def excerpt(self, ids):
        self.shown.append(ids.tolist())
        return Excerpt(texts=[str(token) for token in ids])


KINDS = {  # the same by hand
    "size": {"small": {0, 1, 2}, "large": {4, 5}},
    "parity": {"odd": {1, 3, 5}, "even": {0, 2, 4}},
}


class Slow:
    """The last layer of a small model in float64, by loops over windows, heads, times and sources."""

    def __init__(self, run, windows, layers, before):
        self.model = deepcopy(run.model).double()
        self.windows, self.before, keys = windows, before, run.recipe.model
        self.heads, self.d, self.base = keys.heads, keys.width // keys.heads, keys.rope_base
        self.times = windows.shape[1] - 1
        attention = self.model.blocks[-1].attention
        with torch.no_grad():
            history = [self.model.embedding(torch.from_numpy(windows[:, :-1]))]
            for block in self.model.blocks[:-1]:
                history.append(block(history[-1], self.model.table[: self.times], None))
            self.last = history[-1]
            normed = self.model.blocks[-1].attention_norm(self.last)
            features = [
                attention.features.maps[m](attention.features.norms[m](history[layer]))
                for m, layer in enumerate(layers)
            ]
            if attention.by_feature:
                features = [torch.cat(features, -1)]
            pairs = [attention.key_value[0](feature).chunk(2, -1) for feature in features]
            self.own = None
            if keys.shortcut.mode == "replace":
                query = attention.query(normed)
            else:
                query, key, value = attention.query_key_value(normed).chunk(3, -1)
                self.own = self.turned(key), self.parted(value)
        self.mode = keys.shortcut.mode
        self.query = self.turned(query)  # (N, T, H, d), as all that follow
        self.sources = [(self.turned(k), self.parted(v)) for k, v in pairs]
        if self.mode == "add":
            self.sources.insert(0, self.own)

    def parted(self, x):
        return x.numpy().reshape(*x.shape[:2], self.heads, self.d)

    def turned(self, x):
        """Each pair of channels turned by its time, as Su et al. 2021 have it."""
        x = self.parted(x)
        turned = np.empty_like(x)
        for t, pair in itertools.product(range(self.times), range(self.d // 2)):
            angle = t * self.base ** (-2 * pair / self.d)
            a, b = x[:, t, :, 2 * pair], x[:, t, :, 2 * pair + 1]
            turned[:, t, :, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            turned[:, t, :, 2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
        return turned

    def attended(self, n, sources, shares):
        """What window n reads of [(keys, values) (T, H, d)] or None for a source that is closed, (T, D)."""
        out = np.zeros((self.times, self.heads, self.d))
        for t, head in itertools.product(range(self.times), range(self.heads)):
            parts = {}
            for (m, source), j in itertools.product(enumerate(sources), range(t + 1)):
                if source is not None:
                    parts[m, j] = math.exp(self.query[n, t, head] @ source[0][j, head] / math.sqrt(self.d))
            for (m, j), part in parts.items():
                shares[head, m, t, j] = part / sum(parts.values())
                out[t, head] += shares[head, m, t, j] * sources[m][1][j, head]
        return out.reshape(self.times, -1)

    def look(self, n, closed=None, exchanged=None):
        """Losses (T,) of window n and the share (H, M, T, T) of each time of each source."""
        sources = []
        for m, (keys, values) in enumerate(self.sources):
            row = self.before[n] if m == exchanged else n
            sources.append(None if m == closed else (keys[row], values[row]))
        shares = np.zeros((self.heads, len(sources), self.times, self.times))
        y = self.attended(n, sources, shares)
        block = self.model.blocks[-1]
        if self.mode == "gated":
            own = self.attended(n, [tuple(x[n] for x in self.own)], np.zeros_like(shares))
            y = own + np.repeat([0.7, -1.3], self.d) * y
        with torch.no_grad():
            x = self.last[n] + block.attention.out(torch.from_numpy(y))
            x = x + block.feed_forward(block.feed_forward_norm(x))
            logs = self.model.head(self.model.norm(x)).log_softmax(-1).numpy()
        return -logs[np.arange(self.times), self.windows[n, 1:]], shares


@pytest.mark.parametrize(
    ("settings", "layers", "labels", "batch", "before"),
    [  # before: of each window, the one before it in its batch, whose first follows the last
        (
            ["model.shortcut.mode=add", "model.shortcut.taps=0,2,3"],
            [0, 2, 3],
            ["own keys", "embedding", "layer 2", "layer 3"],
            2,
            [1, 0, 4, 2, 3],
        ),
        (["model.shortcut.mode=gated", "model.shortcut.taps=1,3"], [1, 3], ["layer 1", "layer 3"], 1, [2, 0, 1]),
        (["model.shortcut.taps=1,2,3"], [1, 2, 3], ["layer 1", "layer 2", "layer 3"], 2, [1, 0, 3, 2]),
        (["model.shortcut.taps='2'"], [2], ["layer 2"], 9, [1, 0]),
        (
            ["model.shortcut.mode=gated", "model.shortcut.taps=1,3", "model.shortcut.concat=feature"],
            [1, 3],
            ["layer 1 + layer 3"],
            2,
            [None],
        ),
    ],
    ids=["add", "gated", "replace", "one", "one window"],
)
def test_every_number_is_that_of_a_plain_loop(tmp_path, monkeypatch, settings, layers, labels, batch, before):
    run = made_run(tmp_path, *settings)
    kinds, drawn = Kinds(), []
    monkeypatch.setattr(checkpoint.Run, "tokenizer", lambda _: kinds)
    monkeypatch.setattr(pictures, "MOST", 4)
    monkeypatch.setattr(pictures, "draw_excerpt", lambda *given: drawn.append(given))
    monkeypatch.setattr(pictures, "draw_use", lambda *given: drawn.append(deepcopy(given)))
    windows = np.random.default_rng(0).integers(0, END + 1, (len(before), 7))
    told, out = [], tmp_path / "out"
    result = attention.attend(
        *(run, windows, out), resamples=30, batch=batch, device="cpu", report=lambda *_, **rest: told.append(rest)
    )

    slow, sources, count = Slow(run, windows, layers, before), range(len(labels)), len(before)
    losses, shares = (np.stack(parts) for parts in zip(*(slow.look(n) for n in range(count)), strict=True))
    times, tokens, targets = losses.shape[1], losses.size, windows[:, 1:]
    back = np.arange(times)[:, None] - np.arange(times)
    mass = shares.sum(-1)  # (N, H, M, T)
    changes = ("closed", "exchanged") if count > 1 else ("closed",)
    rises = {  # (N, M, T)
        change: np.array([[slow.look(n, **{change: m})[0] - losses[n] for m in sources] for n in range(count)])
        for change in changes
    }
    # Losses of a few nats in fp32, which a layer of large weights follows: some ten of their last digits.
    near = lambda wanted: pytest.approx(wanted, abs=2e-5, rel=2e-5)  # noqa: E731
    expected = []
    for m, label in enumerate(labels):
        entry = {"source": label, "mass": near(mass[:, :, m].sum() / tokens / 2)}
        entry["mass_by_head"] = near((mass[:, :, m].sum((0, 2)) / tokens).tolist())
        entry["distance_tokens"] = near((shares[:, :, m] * back).sum() / shares[:, :, m].sum())
        entry["exchanged"] = None
        for change in changes:
            rise = rises[change][:, m].sum(1)
            interval = near(plain_interval(rise, [times] * count, 30)) if count > 1 else None
            entry[change] = {"nats_per_token": near(rise.sum() / tokens), "interval_95": interval}
        expected.append(entry)
    classes = {}
    for way, ids in KINDS.items():
        classes[way] = []
        for name, members in ids.items():
            here = np.isin(targets, list(members))  # (N, T)
            if not here.any():
                continue
            by_head = np.stack([mass[:, :, m].transpose(1, 0, 2)[:, here].mean(-1) for m in sources], 1)
            entry = {"class": name, "tokens": here.sum(), "nats_per_token": near(losses[here].mean())}
            entry |= {"mass": near(by_head.mean(0).tolist()), "mass_by_head": [near(row.tolist()) for row in by_head]}
            entry["exchanged"] = None
            for change in changes:
                entry[change] = near([rises[change][:, m][here].mean() for m in sources])
            classes[way].append(entry)
    entropies = [-sum(p * math.log(p) for p in mass[:, head].flatten()) / tokens for head in range(2)]
    wanted = {
        "schema_version": 1,
        "model": "shortcut",
        "windows": count,
        "tokens": tokens,
        "nats_per_token": near(losses.mean()),
        "mean_weights": {label: entry["mass"] for label, entry in zip(labels, expected, strict=True)},
        "sources": expected,
        "entropy_nats_by_head": near(entropies),
        "largest_share_by_head": near(mass.max(2).mean((0, 2)).tolist()),
        "classes": classes,
    }
    if "model.shortcut.mode=gated" in settings:
        wanted["gate_by_head"] = near([0.7, -1.3])
    paths = {"picture": out / "attention.png", "use": out / "use.png", "numbers": out / "attention.npz"}
    assert result == wanted | {key: str(path) for key, path in paths.items()}
    assert [list(sums) for sums in (result["mean_weights"], result["classes"])] == [labels, list(KINDS)]
    assert json.loads((out / "attention.json").read_text()) == result
    with np.load(out / "attention.npz") as stored:
        numbers = dict(stored)
    assert set(numbers) == {"ids", "sources", "depth_weights", "distances"}
    assert numbers["ids"].tolist() == targets[0].tolist()
    assert numbers["sources"].tolist() == labels
    assert numbers["depth_weights"] == near(mass[0])
    assert numbers["distances"] == near((shares[0] * back).sum(-1) / mass[0])
    (drawn_shares, *rest), use = drawn
    assert drawn_shares == near(mass[0].mean(0)[:, :4])
    assert rest == [tuple(labels), Excerpt(texts=[str(token) for token in targets[0, :4]]), paths["picture"]]
    assert kinds.shown == [targets[0, :4].tolist()]
    assert use == ({key: value for key, value in result.items() if key not in paths}, paths["use"])
    assert [rest["total"] for rest in told] == [count] * len(told)

    # No two numbers that could be taken for one another are alike.
    costs = [rise for change in changes for rise in rises[change].sum((0, 2))]
    for values in (costs, mass.sum((0, 3)).flatten()) if len(labels) > 1 else ():
        assert np.diff(sorted(values)).min() > 1e-3


def test_a_change_takes_the_source_that_it_names_and_leaves_what_it_is_given():
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 3, 2, 5, 4, 6, generator=generator)  # (B, H, T, M, d)
    copies = k.clone(), v.clone()
    for m in range(4):
        others = [n for n in range(4) if n != m]
        for x, found in zip((k, v), Trace(exchanged=m).change(k, v), strict=True):
            assert torch.equal(found[:, :, :, others], x[:, :, :, others])
            for row, before in enumerate((2, 0, 1)):
                assert torch.equal(found[row, :, :, m], x[before, :, :, m])
        for x, found in zip((k, v), Trace(closed=m).change(k, v), strict=True):
            assert torch.equal(found, x[:, :, :, others])
    for x, found, copy in zip((k, v), Trace().change(k, v), copies, strict=True):
        assert torch.equal(found, x)
        assert torch.equal(x, copy)


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
        with np.load(tmp_path / "a" / "attention.npz") as stored:
            found = dict(stored)
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
