"""`shortcut attention`: its changes to the last layer against a slow reference, and its numbers against each other."""

import itertools
import json
import math
import os
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import quiet, shortcut
from test_evaluation import EOS, made_run, made_shards, plain_interval
from test_models import ids, make, reference
from test_trace import CASES, Plain

from shortcut_cli import registry
from shortcut_cli.errors import UsageError
from shortcut_cli.inference import runs
from shortcut_cli.inference.layers import LayerSums
from shortcut_cli.inference.prompts import Given
from shortcut_cli.kernels.attention import distances
from shortcut_cli.models.trace import Change, Trace
from shortcut_cli.plots import attention_maps
from shortcut_cli.stages import attention, pipeline
from shortcut_cli.tokenizers.base import Classes, Excerpt
from shortcut_cli.training import checkpoint

FORMS = [
    {"mode": "replace", "taps": "2,4"},
    {"mode": "add", "taps": "0,2,5"},
    {"mode": "gated", "taps": "1,3"},
    {"mode": "replace", "taps": "2,4", "concat": "feature"},
    {"mode": "gated", "taps": "3"},
]


def masked(source):
    return Trace(Change("masked", source))


def shuffled(source):
    return Trace(Change("shuffled", source))


@pytest.mark.parametrize("options", FORMS, ids=str)
class TestChanges:
    def test_a_shuffled_source_is_that_of_the_row_before(self, options):
        """Shuffling equal rows changes nothing; the row before the first is the last."""
        model = make("shortcut", options, open_gates=True).eval()
        x = ids(rows=3)
        same = x[:1].repeat(3, 1)
        with torch.no_grad():
            for source in model.taps:
                assert torch.equal(model(same, trace=shuffled(source)), model(same, trace=Trace()))
                for first in range(3):  # rows first and first + 1 are equal: only the second gets what it had
                    pair = x.clone()
                    pair[(first + 1) % 3] = pair[first]
                    changed, whole = model(pair, trace=shuffled(source)), model(pair, trace=Trace())
                    alike = [torch.equal(a, b) for a, b in zip(changed, whole, strict=True)]
                    assert alike == [row == (first + 1) % 3 for row in range(3)]

    def test_later_tokens_change_nothing_before_them(self, options):
        model = make("shortcut", options, open_gates=True).eval()
        x = ids(rows=3)
        other = x.clone()
        other[:, 15] = (x[:, 15] + 1) % 37
        with torch.no_grad():
            for source in model.taps:
                for change in (masked, shuffled):
                    a, b = model(x, trace=change(source)), model(other, trace=change(source))
                    assert torch.equal(a[:, :15], b[:, :15])

    def test_a_masked_source_gets_nothing_and_the_others_share_all(self, options):
        model = make("shortcut", options, open_gates=True).eval()
        x = ids()
        for m in range(len(model.taps)):
            trace, whole = masked(model.taps[m]), Trace()
            trace.measure_distances = True
            with torch.no_grad():
                model(x, trace=trace)
                model(x, trace=whole)
            kept = [n for n in range(len(model.taps)) if n != m]
            found, expected = trace.weights["layer 6"], whole.weights["layer 6"][:, :, kept]
            assert not found[:, :, m].any()
            assert not trace.distances["layer 6"][:, :, m].any()
            assert torch.allclose(found[:, :, kept], expected / expected.sum(2, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("tapped", ["2,4", "0,3,5"])
def test_a_model_with_a_masked_tap_equals_one_without_it(tapped):
    """Same weights: a model with the tap masked, and one that was built with only the others."""
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
            assert torch.allclose(full(ids(), trace=masked(full.taps[m])).double(), expected, atol=1e-5)


def test_a_gated_model_with_its_only_tap_masked_has_only_its_own_attention():
    model = make("shortcut", {"mode": "gated", "taps": "3"}, open_gates=True).eval()
    with torch.no_grad():
        changed = model(ids(), trace=Trace(Change("masked", "layer 3")))
        model.blocks[-1].attention.gate.zero_()
        assert torch.allclose(changed, model(ids()), atol=1e-5)


def test_distances_are_those_of_the_plain_softmax():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 17, 8, generator=generator)
    k = torch.randn(2, 3, 17, 4, 8, generator=generator)
    scores = torch.einsum("bhid,bhjmd->bhmij", q, k) / math.sqrt(8)
    shares = scores.masked_fill(torch.ones(17, 17).triu(1).bool(), -torch.inf).softmax(-1)
    back = torch.arange(17)[:, None] - torch.arange(17)
    assert torch.allclose(distances(q, k), (shares * back).sum(-1), atol=1e-4)


class Kinds:
    """A tokenizer with two ways to sort; in one, a class never occurs, and some tokens have no class."""

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

    def __init__(self, run, windows, layers, before, batches):
        self.model = deepcopy(run.model).double()
        self.windows, self.before, self.batches, config = windows, before, batches, run.recipe.model
        self.heads, self.d, self.base = config.heads, config.width // config.heads, config.rope_base
        self.times = windows.shape[1] - 1
        attention = self.model.blocks[-1].attention
        with torch.no_grad():
            history = [self.model.embedding(torch.from_numpy(windows[:, :-1]))]
            for block in self.model.blocks[:-1]:
                history.append(block(history[-1], self.model.freqs[: self.times], None))
            self.last = history[-1]
            normed = self.model.blocks[-1].attention_norm(self.last)
            parts = zip(attention.features.norms, attention.features.maps, attention.features.map_norms, strict=True)
            features = [
                after(mapped(before(history[n]))) for n, (before, mapped, after) in zip(layers, parts, strict=True)
            ]
            if attention.by_feature:
                features = [torch.cat(features, -1)]
            pairs = [attention.key_value[0](feature).chunk(2, -1) for feature in features]
            self.own = None
            if config.shortcut.mode == "replace":
                query = attention.query(normed)
            else:
                query, key, value = attention.query_key_value(normed).chunk(3, -1)
                self.own = self.turned(key), self.parted(value)
        self.mode = config.shortcut.mode
        self.query = self.turned(query)  # (N, T, H, d), like everything below
        self.sources = [(self.turned(k), self.parted(v)) for k, v in pairs]
        self.still = [self.parted(k) for k, _ in pairs]
        if self.mode == "add":
            self.sources.insert(0, self.own)
            self.still.insert(0, self.parted(key))

    def parted(self, x):
        return x.numpy().reshape(*x.shape[:2], self.heads, self.d)

    def turned(self, x):
        """Each pair of channels rotated by its time, as in Su et al. 2021."""
        x = self.parted(x)
        turned = np.empty_like(x)
        for t, pair in itertools.product(range(self.times), range(self.d // 2)):
            angle = t * self.base ** (-2 * pair / self.d)
            a, b = x[:, t, :, 2 * pair], x[:, t, :, 2 * pair + 1]
            turned[:, t, :, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            turned[:, t, :, 2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
        return turned

    def attended(self, n, sources, shares):
        """What window n reads, (T, D), from sources: (keys, values), each (T, H, d), or None if masked."""
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

    def mean(self, n, m):
        """Mean keys, turned by each time, and values of source m over the batch of window n, (T, H, d) each."""
        rows = [row for row in range(len(self.windows)) if self.batches[row] == self.batches[n]]
        keys, values = (np.stack([x[row] for row in rows]).mean((0, 1)) for x in (self.still[m], self.sources[m][1]))
        keys = np.broadcast_to(keys, (1, self.times, *keys.shape))
        return self.turned(torch.from_numpy(keys.reshape(1, self.times, -1).copy()))[0], np.stack([values] * self.times)

    def look(self, n, masked=(), shuffled=(), mean_ablated=()):
        """Losses (T,) of window n, and the attention (H, M, T, T) to each time of each source."""
        sources = []
        for m, (keys, values) in enumerate(self.sources):
            row = self.before[n] if m in shuffled else n
            pair = self.mean(n, m) if m in mean_ablated else (keys[row], values[row])
            sources.append(None if m in masked else pair)
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


def near(wanted):
    """Tolerance for fp32 losses of a few nats after a layer with large weights: about ten units in the last place."""
    return pytest.approx(wanted, abs=2e-5, rel=2e-5)


def plain_rises(slow, losses, changes):
    """By change: what it adds to `losses` (N, T) for each source, and for all but a layer's own keys, (N, M + 1, T)."""
    numbers = range(len(slow.sources))
    sets = [*((m,) for m in numbers), [m for m in numbers if not (m == 0 and slow.mode == "add")]]
    return {
        change: np.array([[slow.look(n, **{change: each})[0] - losses[n] for each in sets] for n in range(len(losses))])
        for change in changes
    }


def plain_costs(rises, m, count, times):
    """The entry of source m, or of all, by change."""
    costs = {"shuffled": None}
    for change, rise in rises.items():
        windows = rise[:, m].sum(1)
        interval = near(plain_interval(windows, [times] * count, 30)) if count > 1 else None
        costs[change] = {"nats_per_token": near(windows.sum() / count / times), "interval_95": interval}
    return costs


def plain_sources(labels, shares, rises):
    """The entry of each source, of shares (N, H, M, T, T)."""
    count, heads, _, times, _ = shares.shape
    back, entries = np.arange(times)[:, None] - np.arange(times), []
    for m, label in enumerate(labels):
        mine = shares[:, :, m]
        entry = {"source": label, "attention_weight": near(mine.sum() / count / heads / times)}
        entry["attention_weight_by_head"] = near((mine.sum((0, 2, 3)) / count / times).tolist())
        entry["distance_tokens"] = near((mine * back).sum() / mine.sum())
        entries.append(entry | plain_costs(rises, m, count, times))
    return entries


def plain_classes(members, targets, losses, weights, rises):
    """The entry of each class {name: its ids} that occurs; targets, losses (N, T), attention weights (N, H, M, T)."""
    entries = []
    for name, tokens in members.items():
        here = [(n, t) for (n, t), target in np.ndenumerate(targets) if target in tokens]
        if here:
            by_head = sum(weights[n, :, :, t] for n, t in here) / len(here)
            entry = {"class": name, "tokens": len(here), "nats_per_token": near(np.mean([losses[at] for at in here]))}
            entry |= {
                "attention_weight": near(by_head.mean(0).tolist()),
                "attention_weight_by_head": [near(row.tolist()) for row in by_head],
            }
            entry["shuffled"] = None
            for change, rise in rises.items():
                entry[change] = near((sum(rise[n, :-1, t] for n, t in here) / len(here)).tolist())
            entries.append(entry)
    return entries


SEVERAL = {  # settings, tapped layers, names of the sources, batch, and the window before each in its batch
    "add": (["mode=add", "taps=0,2,3"], [0, 2, 3], ["own keys", "embedding", "layer 2", "layer 3"], 3, [2, 0, 1, 4, 3]),
    "gated": (["mode=gated", "taps=1,3"], [1, 3], ["layer 1", "layer 3"], 1, [2, 0, 1]),
    "replace": (["taps=1,2,3"], [1, 2, 3], ["layer 1", "layer 2", "layer 3"], 2, [1, 0, 3, 2]),
    "one tap": (["taps='2'"], [2], ["layer 2"], 9, [1, 0]),
    "one window": (["mode=gated", "taps=1,3", "concat=feature"], [1, 3], ["layer 1 + layer 3"], 2, [None]),
}


BATCHES = {  # of each window
    "add": [0, 0, 0, 1, 1],
    "gated": [0, 0, 0],
    "replace": [0, 0, 1, 1],
    "one tap": [0, 0],
    "one window": [0],
}


@pytest.mark.parametrize("case", SEVERAL)
def test_every_number_is_that_of_a_plain_loop(tmp_path, monkeypatch, case):
    settings, layers, labels, batch, before = SEVERAL[case]
    run = made_run(tmp_path, *(f"model.shortcut.{setting}" for setting in settings))
    kinds, drawn, told, out = Kinds(), [], [], tmp_path / "out"
    if case == "replace":
        out.mkdir()  # an existing folder without these files is fine
    monkeypatch.setattr(runs.Run, "tokenizer", lambda _: kinds)
    monkeypatch.setattr(attention_maps, "MAX_TOKENS", 4)
    monkeypatch.setattr(attention_maps, "draw_excerpt", lambda *given: drawn.append(given))
    monkeypatch.setattr(attention_maps, "draw_use", lambda *given: drawn.append(deepcopy(given)))
    windows = np.random.default_rng(0).integers(0, EOS + 1, (len(before), 7))
    result = attention.analyse(*(run, windows, out), resamples=30, batch=batch, device="cpu", report=told.append)

    slow, targets = Slow(run, windows, layers, before, BATCHES[case]), windows[:, 1:]
    losses, shares = (np.stack(parts) for parts in zip(*map(slow.look, range(len(before))), strict=True))
    weights = shares.sum(-1)  # (N, H, M, T)
    changes = ("masked", "shuffled", "mean_ablated") if len(before) > 1 else ("masked", "mean_ablated")
    rises = plain_rises(slow, losses, changes)
    sources = plain_sources(labels, shares, rises)
    wanted = {
        "schema_version": 2,
        "model": "shortcut",
        "checkpoint": f"{tmp_path.name}/{run.path.name}",
        "step": run.content.get("step"),
        "split": None,
        "windows": len(before),
        "tokens": losses.size,
        "nats_per_token": near(losses.mean()),
        "mean_weights": {entry["source"]: entry["attention_weight"] for entry in sources},
        "sources": sources,
        "all_sources": plain_costs(rises, -1, len(before), 6),
        "softmax": True,
        "reads": [
            {
                "reader": "layer 4",
                "sources": labels,
                "weights": near(weights.mean((0, 1, 3)).tolist()),
                "weights_by_head": [near(row.tolist()) for row in weights.mean((0, 3))],
            }
        ],
        "entropy_nats_by_head": near([-(p * np.log(p)).sum() / losses.size for p in (weights[:, 0], weights[:, 1])]),
        "largest_share_by_head": near(weights.max(2).mean((0, 2)).tolist()),
        "classes": {way: plain_classes(members, targets, losses, weights, rises) for way, members in KINDS.items()},
    }
    if "mode=gated" in settings:
        wanted["gate_by_head"] = near([0.7, -1.3])
    layers = LayerSums(run.model)  # its formulas are in test_layers.py
    for number in sorted(set(BATCHES[case])):
        layers.add(torch.from_numpy(windows[[each == number for each in BATCHES[case]]]))
    wanted |= layers.result()
    paths = {"picture": out / "attention.png", "use": out / "use.png", "numbers": out / "attention.npz"}
    assert result == wanted | {key: str(path) for key, path in paths.items()}
    assert [list(result["mean_weights"]), list(result["classes"])] == [labels, list(KINDS)]
    assert json.loads((out / "attention.json").read_text()) == result

    with np.load(out / "attention.npz") as stored:
        numbers = dict(stored)
    assert {name: numbers.pop(name).tolist() for name in ("ids", "sources")} == {
        "ids": targets[0].tolist(),
        "sources": labels,
    }
    assert numbers.pop("excerpt_texts").tolist() == [str(token) for token in targets[0, :4]]
    assert numbers.pop("excerpt_rate_hz") == 0
    back = np.arange(6)[:, None] - np.arange(6)
    assert numbers == {
        "depth_weights": near(weights[0]),
        "read layer 4": near(weights[0]),
        "distances": near((shares[0] * back).sum(-1) / weights[0]),
    }
    (drawn_shares, *rest), use = drawn
    assert drawn_shares == near(weights[0].mean(0)[:, :4])
    assert rest[:2] == [tuple(labels), Excerpt(texts=[str(token) for token in targets[0, :4]])]
    assert rest[2].name == paths["picture"].name
    assert rest[3].startswith(f"shortcut, {tmp_path.name}/")
    assert kinds.shown == [targets[0, :4].tolist()]
    assert use == ({key: value for key, value in result.items() if key not in paths}, rest[2].with_name("use.png"))
    assert {event.total for event in told} == {len(before)}

    # No two numbers that could be confused are equal.
    costs = [rise for rows in rises.values() for rise in rows[:, : len(labels)].sum((0, 2))]
    for values in (costs, weights.sum((0, 3)).flatten()) if len(labels) > 1 else ():
        assert np.diff(sorted(values)).min() > 1e-3


@pytest.mark.parametrize(("plain_model", "options", "shape"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_what_is_read_in_every_architecture_is_what_its_formula_says(
    tmp_path, monkeypatch, plain_model, options, shape
):
    name = plain_model.__name__
    settings = [f"model.{registry.OPTIONS_OF.get(name, name)}.{key}={json.dumps(options[key])}" for key in options]
    settings += [f"model.{key}={value}" for key, value in ({"layers": 3} | shape).items()]
    run = made_run(tmp_path, *settings, name=name)
    with torch.no_grad():
        for parameter_name, parameter in run.model.named_parameters():
            if parameter_name.endswith(tuple(run.model.routers())):
                parameter.normal_(0.2, 0.2, generator=torch.Generator().manual_seed(len(parameter_name)))
    monkeypatch.setattr(runs.Run, "tokenizer", lambda _: Kinds())
    windows = np.random.default_rng(0).integers(0, EOS + 1, (3, 7))
    result = attention.analyse(run, windows, tmp_path / "out", resamples=9, batch=3, device="cpu", report=quiet)

    slow, x, targets = deepcopy(run.model).double(), torch.from_numpy(windows[:, :-1]), windows[:, 1:]

    def look(*change):
        plain = Plain(slow, *change)
        with torch.no_grad():
            logits = slow.head(slow.norm(plain_model(slow, slow.embedding(x), plain)))
        return -np.take_along_axis(logits.log_softmax(-1).numpy(), targets[..., None], 2).mean(), plain.weights

    whole, weights = look()
    assert result["nats_per_token"] == near(whole)
    reads, shares = run.model.reads(), {reader: each.mean((0, 1, 3)).tolist() for reader, each in weights.items()}
    found = [(read["reader"], read["sources"], read["weights"]) for read in result["reads"]]
    assert found == [(reader, list(names), near(shares[reader])) for reader, names in reads.items()]
    assert {entry["source"] for entry in result["sources"]} == {name for names in reads.values() for name in names}
    for entry in [*result["sources"], {"source": None} | result["all_sources"]]:
        for change in attention.CHANGES:
            rise = entry[change]["nats_per_token"]
            assert rise == pytest.approx(look(change, entry["source"])[0] - whole, abs=1e-3), (entry["source"], change)
        if entry["source"] is not None:
            mine = [
                sum(share for share, name in zip(shares[reader], names, strict=True) if name == entry["source"])
                for reader, names in reads.items()
                if entry["source"] in names
            ]
            assert entry["attention_weight"] == near(np.mean(mine))
            assert (entry["distance_tokens"] is None) is (not run.model.taps)
    assert (result["entropy_nats_by_head"] is None) is (not run.model.softmax_reads)
    for file in attention.NAMES:
        assert (tmp_path / "out" / file).exists()


def test_a_change_takes_the_source_that_it_names_and_leaves_what_it_is_given():
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 3, 2, 5, 4, 6, generator=generator)  # (B, H, T, M, d)
    copies = k.clone(), v.clone()
    names = ("layer 1", "own keys", "layer 2", "layer 3")
    for kind, (m, source) in itertools.product(("masked", "shuffled", None), enumerate(names)):
        trace = Trace(kind and Change(kind, source))
        trace.begin({"layer 4": names}, torch.zeros(5, 3, 2))
        pairs = trace.keyed("layer 4", k.unbind(3), v.unbind(3))
        assert list(pairs) == [n for n in range(4) if (kind, n) != ("masked", m)]
        for n, pair in pairs.items():
            for x, found in zip((k, v), pair, strict=True):
                rows = (2, 0, 1) if (kind, n) == ("shuffled", m) else (0, 1, 2)
                assert all(torch.equal(found[row], x[before, :, :, n]) for row, before in enumerate(rows))
    for x, copy in zip((k, v), copies, strict=True):
        assert torch.equal(x, copy)


@pytest.mark.parametrize(
    ("tokens", "context", "most", "starts"),
    [
        (1000, 99, 4, [0, 300, 600, 900]),
        (1000, 99, 1, [0]),
        (25, 4, 4, [0, 6, 13, 20]),  # every 6 2/3
        (250, 99, 64, [0, 150]),  # as many as fit without overlap
        (200, 99, 64, [0, 100]),
        (199, 99, 64, [0]),
        (100, 99, 64, [0]),
    ],
)
def test_windows_are_spread_evenly_and_whole(tokens, context, most, starts):
    row = np.arange(tokens) + 7
    found = attention.cut(lambda first, count: row[first : first + count], tokens, context, most)
    assert found.tolist() == [row[start : start + context + 1].tolist() for start in starts]


def test_a_row_shorter_than_the_context_is_one_window():
    row = np.arange(30)
    found = attention.cut(lambda first, count: row[first : first + count], 30, 99, 4)
    assert found.tolist() == [row.tolist()]


@pytest.mark.parametrize(
    ("count", "batch", "sizes"),
    [
        (1, 3, [1]),
        (2, 1, [2]),
        (3, 1, [3]),  # a batch of one can't be shuffled
        (3, 3, [3]),
        (4, 3, [4]),
        (5, 3, [3, 2]),
        (6, 3, [3, 3]),
        (7, 3, [3, 4]),
        (8, 3, [3, 3, 2]),
        (5, 2, [2, 3]),
        (9, 16, [9]),
    ],
)
def test_no_batch_has_a_single_window_unless_there_is_only_one(count, batch, sizes):
    windows = np.arange(count * 3).reshape(count, 3)
    found = list(attention._batches(windows, batch))
    assert [first for first, _ in found] == [sum(sizes[:number]) for number in range(len(sizes))]
    assert [len(part) for _, part in found] == sizes
    assert np.concatenate([part for _, part in found]).tolist() == windows.tolist()


class TestWindows:
    def looked(self, monkeypatch, run, tmp_path, **changes):
        """The arguments that `analyse` gets."""
        monkeypatch.setattr(attention, "analyse", lambda *given, **config: (*given, config))
        checkpoint.save(run.path, run.content)
        arguments = {"path": run.path, "given": Given(), "shards": None, "split": "val", "windows": 4} | changes
        found, *rest = pipeline.look(**arguments, out=tmp_path / "out", device="cpu", report=quiet)
        assert (found.path, found.recipe, rest[1]) == (run.path, run.recipe, tmp_path / "out")
        return rest[0].tolist(), rest[2]

    @pytest.mark.parametrize("named", [False, True])
    @pytest.mark.parametrize("split", ["val", "test"])
    def test_windows_of_a_split_begin_with_eos(self, monkeypatch, tmp_path, split, named):
        folders = [tmp_path / "recipes", tmp_path / "named"]
        run = made_run(tmp_path, f"data.shards={folders[0]}", "eval.resamples=17", "eval.batch_size=5")
        rows = {}
        for number, folder in enumerate(folders):
            generator = np.random.default_rng(number)
            documents = [(name, generator.integers(0, EOS, 19).tolist()) for name in ("val", "test", "train") * 2]
            made_shards(folder, run, documents)
            rows[folder] = [EOS] + [token for name, ids in documents if name == split for token in (*ids, EOS)]
        windows, config = self.looked(monkeypatch, run, tmp_path, split=split, shards=folders[1] if named else None)
        row = rows[folders[named]]
        # 41 ids: the last of four windows of 7 + 1 begins 33 after the first.
        assert windows == [row[start : start + 8] for start in (0, 11, 22, 33)]
        assert config == {"resamples": 17, "batch": 5, "device": "cpu", "report": quiet, "split": split}

    def test_a_prompt_begins_with_eos(self, monkeypatch, tmp_path):
        run = made_run(tmp_path)
        (tmp_path / "prompt.txt").write_text("ab1. ba a1bb")
        windows, _ = self.looked(monkeypatch, run, tmp_path, given=Given(str(tmp_path / "prompt.txt")))
        assert windows == [[EOS, 0, 1, 2, 4, 3, 1, 0]]
        (tmp_path / "prompt.txt").write_text("a1")
        windows, _ = self.looked(monkeypatch, run, tmp_path, given=Given(str(tmp_path / "prompt.txt")))
        assert windows == [[EOS, 0, 2]]

    def test_shards_of_another_tokenizer_are_refused(self, monkeypatch, tmp_path):
        run = made_run(tmp_path)
        other = runs.Run(run.path, run.recipe, run.model, {"tokenizer": {"fingerprint": "0" * 64}})
        made_shards(tmp_path / "shards", other, [("val", [0] * 50)])
        with pytest.raises(UsageError, match="was made with 000000000000"):
            self.looked(monkeypatch, run, tmp_path, shards=tmp_path / "shards")


class TestRefusals:
    def refused(self, run, tmp_path, words, tokens=8):
        windows = np.zeros((2, tokens), int)
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UsageError, match=words):
            attention.analyse(run, windows, tmp_path / "out", resamples=9, batch=2, device="cpu", report=quiet)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("name", ["attention.png", "use.png", "attention.npz", "attention.json"])
    def test_no_file_is_overwritten(self, tmp_path, name):
        run = made_run(tmp_path)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).write_text("mine")
        self.refused(run, tmp_path, f"{name} exists already")
        assert (tmp_path / "out" / name).read_text() == "mine"

    def test_what_a_killed_process_left_is_made_again(self, tmp_path):
        run, windows = made_run(tmp_path), np.array([[1, 2, 3], [3, 4, 5]])
        options = {"resamples": 9, "batch": 2, "device": "cpu", "report": quiet}
        attention.analyse(run, windows, tmp_path / "out", **options)
        whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert sorted(whole) == sorted(attention.NAMES)
        (tmp_path / "out" / "attention.json").unlink()
        (tmp_path / "out" / f".attention.{os.getpid()}.tmp").write_text(json.dumps(attention.NAMES))
        attention.analyse(run, windows, tmp_path / "out", **options)
        again = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert again.keys() == whole.keys()
        assert again["attention.json"] == whole["attention.json"]

    def test_windows_without_a_target_are_refused(self, tmp_path):
        self.refused(made_run(tmp_path), tmp_path, "no tokens to look at", tokens=1)

    def test_windows_of_one_target_are_accepted_and_parent_folders_are_made(self, tmp_path):
        windows, out = np.array([[1, 2], [3, 4]]), tmp_path / "a" / "b"
        found = attention.analyse(made_run(tmp_path), windows, out, resamples=9, batch=2, device="cpu", report=quiet)
        assert found["tokens"] == 2
        assert (out / "attention.json").exists()

    def test_a_model_without_taps_is_refused(self, tmp_path):
        run = made_run(tmp_path, "model.shortcut.taps=none")
        self.refused(run, tmp_path, "is a shortcut, none of whose layers reads across another")


class TestRun:
    def look(self, text_run, out, **changes):
        arguments = {"given": Given(), "shards": text_run / "shards", "split": "val", "windows": 6, "out": out}
        arguments |= {"path": text_run / "shortcut" / "run.pt"} | changes
        return pipeline.look(**arguments, device="cpu", report=quiet)

    def test_the_parts_make_up_the_whole(self, text_run, tmp_path):
        result = self.look(text_run, tmp_path / "a")
        run = runs.open_run(text_run / "shortcut" / "run.pt", "cpu")
        assert result["windows"] == 6
        assert result["tokens"] == 6 * run.recipe.model.context
        assert sum(result["mean_weights"].values()) == pytest.approx(1, abs=1e-5)
        (classes,) = result["classes"].values()
        assert {entry["class"] for entry in classes} >= {"letter", "space"}
        assert sum(entry["tokens"] for entry in classes) == result["tokens"]
        weights = np.array([entry["tokens"] for entry in classes]) / result["tokens"]
        assert weights @ [entry["nats_per_token"] for entry in classes] == pytest.approx(result["nats_per_token"])
        by_head = np.tensordot(weights, [entry["attention_weight_by_head"] for entry in classes], 1)  # (H, M)
        assert np.allclose(by_head.T, [source["attention_weight_by_head"] for source in result["sources"]], atol=1e-6)
        for m, source in enumerate(result["sources"]):
            for key in ("attention_weight", *attention.CHANGES):
                whole = source[key] if key == "attention_weight" else source[key]["nats_per_token"]
                assert weights @ [entry[key][m] for entry in classes] == pytest.approx(whole, abs=1e-6)
            for key in attention.CHANGES:
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

    def test_a_single_window_is_not_shuffled(self, text_run, tmp_path):
        result = self.look(text_run, tmp_path / "a", windows=1)
        assert all(source["shuffled"] is None for source in result["sources"])
        assert all(source["masked"]["interval_95"] is None for source in result["sources"])

    def test_nothing_is_overwritten(self, text_run, tmp_path):
        self.look(text_run, tmp_path / "a", windows=1)
        with pytest.raises(UsageError, match="exists already"):
            self.look(text_run, tmp_path / "a", windows=1)

    def test_other_data_is_refused(self, text_run, tmp_path):
        with pytest.raises(UsageError, match="none of whose layers reads"):
            self.look(text_run, tmp_path / "a", path=text_run / "gpt" / "run.pt")
        (tmp_path / "empty.txt").write_text("")
        with pytest.raises(UsageError, match="no tokens to look at"):
            self.look(text_run, tmp_path / "a", given=Given(str(tmp_path / "empty.txt")))

    def test_a_prompt_is_looked_at_as_a_whole(self, text_run, tmp_path):
        done = shortcut(
            *("attention", "--ckpt", text_run / "shortcut" / "run.pt", "--prompt", text_run / "texts" / "000.txt"),
            *("--out", tmp_path / "a"),
            cwd=tmp_path,
            COLUMNS="400",
        )
        assert "masked 95 %" in " ".join(done.stdout.split())


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
    attention_maps.draw_excerpt(shares, ("embedding", "layer 2", "layer 4"), excerpt, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert not [str(warning.message) for warning in recwarn]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn, not saved."""
    drawn = []
    monkeypatch.setattr(attention_maps, "_save", lambda figure, _: drawn.append(figure))
    return drawn


def labels(ticks):
    return [tick.get_text() for tick in ticks]


class TestExcerpts:
    SOURCES = ("embedding", "layer 2", "layer 4")

    def strips(self, figures, tokens, rows, excerpt):
        """The attention weights that were drawn, and the axes of each strip of `rows` rows."""
        shares = np.random.default_rng(0).random((3, tokens))
        shares[1, -1] = 5.0  # the largest, at the last token
        attention_maps.draw_excerpt(shares, self.SOURCES, excerpt, None)
        grid = [axes for axes in figures[-1].axes if axes.get_label() != "<colorbar>"]
        return shares, [grid[first : first + rows] for first in range(0, len(grid), rows)]

    def check_shares(self, strips, shares, length, most):
        assert "mean over heads" in strips[0][0].get_title()
        assert strips[-1][-1].get_xlabel().startswith(("token", "seconds"))
        for number, (axes, *below) in enumerate(strips):
            (image,) = axes.images
            part = shares[:, number * length : (number + 1) * length]
            first = number * length - 0.5
            assert image.get_array().tolist() == part.tolist()
            assert list(image.get_extent()) == [first, first + part.shape[1], -0.5, 2.5]
            assert (image.origin, image.get_clim()) == ("lower", (0, most))
            assert axes.get_yticks().tolist() == [0, 1, 2]
            assert labels(axes.get_yticklabels()) == list(self.SOURCES)
            assert [each.get_xlim() for each in (axes, *below)] == [(first, first + length)] * (1 + len(below))

    def test_text_is_drawn_below_its_tokens(self, figures):
        texts = [f"{number}$\n" for number in range(150)]
        shares, strips = self.strips(figures, 150, 2, Excerpt(texts=texts))
        assert len(strips) == 3
        self.check_shares(strips, shares, 64, 5.0)
        for number, (_, below) in enumerate(strips):
            wanted = [(token, f"{token}\\$\u21b5") for token in range(150)[number * 64 : (number + 1) * 64]]
            assert [(text.get_position()[0], text.get_text()) for text in below.texts] == wanted

    def test_four_strips_are_drawn_and_later_tokens_do_not_change_their_colors(self, figures):
        shares, strips = self.strips(figures, 300, 2, Excerpt(texts=["a"] * 300))
        assert len(strips) == 4
        self.check_shares(strips, shares, 64, shares[:, :256].max())
        assert shares[:, :256].max() < 1 < shares.max()

    def test_nothing_is_drawn_below_an_excerpt_without_content(self, figures):
        shares, strips = self.strips(figures, 300, 1, Excerpt())
        assert len(strips) == 2
        self.check_shares(strips, shares, 256, 5.0)

    def test_a_note_is_drawn_at_its_tokens_and_pitch_and_is_darker_if_louder(self, figures):
        notes = np.array([[3, 30, 60, 96], [250, 290, 72, 16]])
        shares, strips = self.strips(figures, 300, 2, Excerpt(notes=notes))
        self.check_shares(strips, shares, 256, 5.0)
        bars = [
            [
                (bar.get_x(), bar.get_width(), bar.get_y() + bar.get_height() / 2, bar.get_facecolor()[0])
                for bar in below
            ]
            for below in (axes.patches for _, axes in strips)
        ]
        first, second = (3, 27, 60, pytest.approx(0.2)), (250, 40, 72, pytest.approx(0.7))
        assert bars == [[first, second], [second]]
        assert [(axes.get_ylim(), axes.get_ylabel()) for _, axes in strips] == [((58, 74), "pitch")] * 2
        ticks = [[(at.get_position()[1], at.get_text()) for at in axes.get_yticklabels()] for _, axes in strips]
        assert ticks == [[(60, "C4"), (72, "C5")]] * 2

    @pytest.mark.parametrize("rate_hz", [24_000, 48_000])
    def test_sound_is_drawn_from_the_first_token_to_the_last(self, figures, rate_hz):
        noise = np.random.default_rng(1).normal(size=300 * 40 + 290) / 100  # 40 per token, and a remainder
        samples = (np.sin(np.arange(len(noise)) * 2 * np.pi * 3000 / rate_hz) + noise).astype(np.float32)
        shares, strips = self.strips(figures, 300, 3, Excerpt(samples=samples, rate_hz=rate_hz))
        self.check_shares(strips, shares, 256, 5.0)
        for (_, wave, spectrum), (start, end) in zip(strips, ((0, 256), (256, 300)), strict=True):
            (line,) = wave.lines
            # Not by ==: pytest would spend a minute explaining how ten thousand numbers differ.
            assert np.array_equal(line.get_ydata(), samples[start * 40 : end * 40])
            assert np.allclose(line.get_xdata(), start - 0.5 + np.arange((end - start) * 40) / 40, rtol=1e-9)
            (image,) = spectrum.images
            assert list(image.get_extent()) == [start - 0.5, end - 0.5, 0, rate_hz / 2]
            # 512 samples at a time, of which 128 are new; from half the rate down to 0, each row rate / 512 Hz.
            assert image.get_array().shape == (257, ((end - start) * 40 - 512) // 128 + 1)
            assert set(image.get_array().argmax(0)) == {256 - 3000 * 512 // rate_hz}
            assert (image.get_clim()[0], spectrum.get_ylim(), spectrum.get_ylabel()) == (-140, (0, 8000), "Hz")

    @pytest.mark.parametrize("tokens", [30, 128, 255])
    @pytest.mark.parametrize("kind", ["sound", "notes", "text"])
    def test_a_short_excerpt_fills_the_width_and_all_rows_are_aligned(self, figures, tokens, kind):
        """At a context under 256, the weights once ended in the middle of what stands below them."""
        samples = np.sin(np.arange(tokens * 320) / 9).astype(np.float32)
        excerpts = {
            "sound": Excerpt(samples=samples, rate_hz=24_000),
            "notes": Excerpt(notes=np.array([[3, 20, 60, 96]])),
            "text": Excerpt(texts=["a"] * tokens),
        }
        rows = 3 if kind == "sound" else 2
        _, strips = self.strips(figures, tokens, rows, excerpts[kind])
        figures[-1].draw_without_rendering()
        length = min(tokens, 64) if kind == "text" else tokens
        for number, strip in enumerate(strips):
            first = number * length - 0.5
            assert [axes.get_xlim() for axes in strip] == [(first, first + length)] * rows
            places = [axes.get_position() for axes in strip]
            assert [place.x0 for place in places] == pytest.approx([places[0].x0] * rows)
            assert [place.x1 for place in places] == pytest.approx([places[0].x1] * rows)
        images = [image for axes in strips[0] for image in axes.images]
        assert all(list(image.get_extent())[:2] == [-0.5, length - 0.5] for image in images)
        if kind == "sound":
            assert strips[0][-1].get_xlabel() == "seconds (75 tokens each)"
            (line,) = strips[0][1].lines
            assert line.get_xdata()[0] == -0.5
            assert line.get_xdata()[-1] == pytest.approx(tokens - 0.5, abs=0.01)

    def test_ticks_are_at_the_tokens_that_begin_at_round_seconds_or_beats(self):
        sound = Excerpt(samples=np.zeros(320 * 225, np.float32), rate_hz=24_000)  # 3 s, 75 tokens each
        found = attention_maps.unit_ticks(sound, 225, 0, 225)
        assert {"0", "2"} <= {label for _, label in found}
        assert all(place == pytest.approx(75 * float(label) - 0.5) for place, label in found)
        found = attention_maps.unit_ticks(sound, 225, 150, 225)
        assert all(2 <= float(label) <= 3 and place == pytest.approx(75 * float(label) - 0.5) for place, label in found)
        beats = np.repeat([0.0, 0.5, 1.0, 2.25, 5.0, 8.0], 40)  # notes of 40 tokens; none begins in beat 3, 4, 6 or 7
        found = attention_maps.unit_ticks(Excerpt(token_beats=beats), 240, 0, 240)
        assert found[0] == (-0.5, "0")
        assert found[-1] == (199.5, "8")
        assert (119.5, "2") in found
        assert not {"3", "4", "6", "7"} & {label for _, label in found}
        assert attention_maps.unit_ticks(Excerpt(texts=["a"] * 9), 9, 0, 9) == []

    def test_a_single_source_has_nothing_to_compare(self, figures):
        attention_maps.draw_excerpt(np.ones((1, 40)), ("layer $2",), Excerpt(texts=["a"] * 40), None, "a model")
        first, *_ = figures[-1].axes
        assert [text.get_text() for text in first.texts] == ["layer \\$2 is the only source: nothing to compare"]
        assert not any(axes.images for axes in figures[-1].axes)
        assert figures[-1].get_suptitle() == "a model"

    def test_names_of_many_sources_do_not_collide(self, figures):
        sources = ("embedding", *(f"layer {number // 2} part {number % 2}" for number in range(24)))
        attention_maps.draw_excerpt(np.random.default_rng(0).random((25, 64)), sources, Excerpt(), None)
        assert not colliding(figures[-1])


def colliding(figure):
    """Pairs of labels of one axis that lie on each other."""
    figure.draw_without_rendering()
    found = []
    for axes in figure.axes:
        for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
            shown = [tick for tick in ticks if tick.get_text()]
            boxes = [tick.get_window_extent() for tick in shown]
            pairs = itertools.pairwise(zip(shown, boxes, strict=True))
            found += [(a.get_text(), b.get_text()) for (a, x), (b, y) in pairs if x.overlaps(y)]
    return found


class TestUse:
    NAMES = ("embedding", "layer 2", "layer 4")

    def result(self, *, shuffled=True, intervals=True):
        """Distinct numbers: some negative costs, a class of few tokens, two ways to sort."""
        generator = np.random.default_rng(0)

        def cost(value):
            return {"nats_per_token": value, "interval_95": [value - 0.125, value + 0.5] if intervals else None}

        sources = [
            {
                "source": name,
                "attention_weight": generator.random(),
                "attention_weight_by_head": generator.random(2).tolist(),
                "masked": cost(1.0 + m),
                "shuffled": cost(4.0 + m) if shuffled else None,
                "mean_ablated": cost(7.0 + m),
            }
            for m, name in enumerate(self.NAMES)
        ]
        classes = {
            way: [
                {
                    "class": name,
                    "tokens": tokens,
                    "attention_weight": generator.random(3).tolist(),
                    "masked": generator.random(3).tolist(),
                    "shuffled": (generator.random(3) - 0.75).tolist() if shuffled else None,
                }
                for name, tokens in counts.items()
            ]
            for way, counts in (("kind", {"few": 19, "letter": 1234, "digit": 20}), ("beat", {"first": 77}))
        }
        return {"sources": sources, "classes": classes, "softmax": True}

    def cells(self, figures, result):
        attention_maps.draw_use(result, None)
        return np.array([axes for axes in figures[-1].axes if axes.get_label() != "<colorbar>"]).reshape(3, 3)

    def check_heat(self, axes, values, rows, columns, title):
        (image,) = axes.images
        assert image.get_array().tolist() == values
        assert [labels(axes.get_yticklabels()), labels(axes.get_xticklabels())] == [rows, columns]
        assert (axes.get_title(), image.origin) == (title, "upper")
        most, least = np.max(values), np.min(values)
        if least < 0:  # white means zero, only in such maps
            most = max(most, -least)
            assert (image.get_clim(), image.get_cmap().name) == ((-most, most), "RdBu_r")
        else:
            assert (image.get_clim(), image.get_cmap().name) == ((0, most), "viridis")

    def test_bars_have_the_lengths_of_the_numbers_of_their_source(self, figures):
        result = self.result()
        weights, costs, heads = self.cells(figures, result)[0]
        widths = [bar.get_width() for bar in weights.patches]
        assert widths == [entry["attention_weight"] for entry in result["sources"]]
        assert [axes.get_xlabel() for axes in (weights, costs)] == ["attention weight", "loss added, nats per token"]
        assert labels(weights.get_yticklabels()) == labels(costs.get_yticklabels()) == list(self.NAMES)
        bars = [container for container in costs.containers if hasattr(container, "patches")]
        assert [container.get_label() for container in bars] == ["masked", "shuffled", "mean-ablated"]
        for container, first, place in zip(bars, (1.0, 4.0, 7.0), (-0.27, 0.0, 0.27), strict=True):
            assert [bar.get_width() for bar in container] == [first, first + 1, first + 2]
            middles = [bar.get_y() + bar.get_height() / 2 for bar in container]
            assert middles == pytest.approx([m + place for m in range(3)])
            (lines,) = container.errorbar.lines[2]
            ends = [segment[:, 0].tolist() for segment in lines.get_segments()]
            assert ends == [[first + m - 0.125, first + m + 0.5] for m in range(3)]
        by_head = [entry["attention_weight_by_head"] for entry in result["sources"]]
        self.check_heat(heads, by_head, list(self.NAMES), ["1", "2"], "attention weight by head")

    def test_the_first_source_is_the_lowest_everywhere(self, figures):
        weights, costs, heads = self.cells(figures, self.result())[0]
        for axes in (weights, costs, heads):
            low, high = axes.get_ylim()
            assert low < high
            assert labels(axes.get_yticklabels())[0] == "embedding"
        assert heads.get_xlabel() == "head"

    def test_the_title_has_model_file_and_step(self, figures):
        self.cells(figures, self.result() | {"model": "moda", "checkpoint": "a$b/run.pt", "step": 1500})
        assert figures[-1].get_suptitle() == "moda, a\\$b/run.pt, step 1,500"

    def test_weights_of_a_single_source_are_not_drawn(self, figures):
        result = self.result()
        result["sources"] = result["sources"][:1]
        cells = self.cells(figures, result)
        for axes in (cells[0, 0], cells[0, 2]):
            assert [text.get_text() for text in axes.texts] == ["embedding is the only source: nothing to compare"]
            assert not axes.patches
            assert not axes.images
        assert cells[0, 1].patches
        assert not any(axes.axison for axes in cells[1:, 0])

    def test_names_of_many_sources_do_not_collide(self, figures):
        result = self.result()
        one = result["sources"][0]
        result["sources"] = [one | {"source": f"layer {number}", "attention_weight": 0.1} for number in range(25)]
        for entries in result["classes"].values():
            for entry in entries:
                for key in ("attention_weight", "masked", "shuffled"):
                    entry[key] = [0.1] * 25
        self.cells(figures, result)
        assert not colliding(figures[-1])

    def test_classes_of_few_tokens_are_left_out(self, figures):
        result = self.result()
        _, kinds, beats = self.cells(figures, result)
        for row, way, rows in ((kinds, "kind", ["letter (1,234)", "digit (20)"]), (beats, "beat", ["first (77)"])):
            drawn = [entry for entry in result["classes"][way] if entry["tokens"] >= 20]
            titles = {
                "attention_weight": f"attention weight, by {way}",
                "masked": f"nats added if masked, by {way}",
                "shuffled": f"nats added if shuffled, by {way}",
            }
            for axes, (key, title) in zip(row, titles.items(), strict=True):
                self.check_heat(axes, [entry[key] for entry in drawn], rows, list(self.NAMES), title)

    def test_a_way_to_sort_with_only_small_classes_is_left_empty(self, figures):
        result = self.result()
        for entry in result["classes"]["beat"]:
            entry["tokens"] = 19
        _, kinds, beats = self.cells(figures, result)
        assert [[axes.axison for axes in row] for row in (kinds, beats)] == [[True] * 3, [False] * 3]
        assert not any(axes.images for axes in beats)

    def test_what_was_not_shuffled_is_not_drawn(self, figures):
        first, *ways = self.cells(figures, self.result(shuffled=False, intervals=False))
        bars, other = (container for container in first[1].containers if hasattr(container, "patches"))
        assert [bars.get_label(), other.get_label()] == ["masked", "mean-ablated"]
        (lines,) = bars.errorbar.lines[2]
        assert [segment[:, 0].tolist() for segment in lines.get_segments()] == [[1, 1], [2, 2], [3, 3]]
        assert [[axes.axison for axes in row] for row in ways] == [[True, True, False]] * 2
