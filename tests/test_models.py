"""Architectures: over the registry, and the shortcut's every option against a slow float64 reference."""

import itertools
import math

import pytest
import torch
from pydantic import create_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter

from shortcut_cli import metrics, registry
from shortcut_cli.errors import UsageError
from shortcut_cli.models import merge
from shortcut_cli.models.blocks import FEW_ROWS, LARGE_MATRIX, Linear, Trace, rotate
from shortcut_cli.models.options import ShortcutOptions
from shortcut_cli.models.shortcut import tapped_layers
from shortcut_cli.recipe import ModelKeys

VOCABULARY, CONTEXT = 37, 24
SECTIONS = {name: registry.load(registry.MODEL_OPTIONS, name) for name in registry.MODEL_OPTIONS}
Keys = create_model("Keys", __base__=ModelKeys, **{name: (kind, kind()) for name, kind in SECTIONS.items()})
ARMS = [
    ("gpt", {}),
    ("shortcut", {}),
    ("shortcut", {"taps": "none"}),
    ("shortcut", {"taps": "all", "map": "linear", "project": "per_tap"}),
    ("shortcut", {"taps": "0,3", "map": "identity", "depth_embedding": True}),
    ("shortcut", {"mode": "add", "share_map": True}),
    ("shortcut", {"mode": "gated"}),
    ("shortcut", {"concat": "feature"}),
    ("shortcut", {"mode": "gated", "concat": "feature"}),
    ("shortcut", {"attention": "merge", "taps": "every:2"}),
    ("shortcut_gated", {}),
    ("shortcut_local", {}),
    ("dense_last", {}),
    ("late_kv", {}),
    ("late_kv", {"layer": 1}),
    ("value_residual", {}),
    ("value_residual", {"gate": "token"}),
    ("denseformer", {}),
    ("denseformer", {"dilation": 2, "period": 3}),
    ("attnres", {}),
    ("attnres", {"variant": "block", "blocks": 5}),
    ("attnres", {"variant": "delta"}),
    ("depth_attention", {}),
    ("moda", {}),
    ("mudd", {}),
    ("mudd_last", {}),
    ("hyper", {}),
    ("hyper", {"weights": "static", "streams": 2}),
]
PATHS = [
    {"mode": mode, "taps": taps, "project": project, "depth_embedding": True, "map_width": 20}
    for mode, taps, project in itertools.product(("replace", "add", "gated"), ("paper", "0,2,5"), ("shared", "per_tap"))
]


def make(name, options, *, seed=1, open_gates=False, **shape):
    shape = {"layers": 6, "width": 32, "heads": 4, "context": CONTEXT, "ffn": 64} | shape
    sections = {name: SECTIONS[name](**options)} if options else {}
    keys = Keys(name=name, **shape, **sections)
    model = registry.load(registry.MODELS, name)(keys, VOCABULARY, seed)
    if open_gates:
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("gate"):
                torch.nn.init.constant_(parameter, 0.7)
            elif any(parameter_name.endswith(router) for router in model.routers()):
                generator = torch.Generator().manual_seed(len(parameter_name))
                torch.nn.init.normal_(parameter, 0.2, 0.2, generator=generator)
    return model


def ids(rows=2, length=CONTEXT, seed=0):
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("name", "options"), ARMS)
class TestEveryArm:
    def test_a_change_leaves_everything_before_it_bit_equal(self, name, options):
        model = make(name, options, open_gates=True).eval()
        x = ids()
        for place in (0, 11, CONTEXT - 1):
            other = x.clone()
            other[:, place] = (x[:, place] + 1) % VOCABULARY
            a, b = model(x), model(other)
            assert torch.equal(a[:, :place], b[:, :place])
            assert not torch.equal(a[:, place:], b[:, place:])

    @pytest.mark.parametrize("shape", [{}, {"activation": "swiglu", "tied": False, "dropout": 0.1}])
    def test_every_parameter_gets_a_finite_gradient(self, name, options, shape):
        for parameter, grad in gradients(make(name, options, open_gates=True, **shape), ids()).items():
            assert grad.isfinite().all(), parameter
            assert grad.abs().sum() > 0, parameter

    def test_cached_equals_full(self, name, options):
        model = make(name, options, open_gates=True).eval()
        x = ids()
        with torch.inference_mode():
            full = model(x)
            cache = model.new_cache(2, CONTEXT)
            parts = [model(x[:, a:b], cache) for a, b in itertools.pairwise([0, 5, 6, 9, *range(10, CONTEXT + 1)])]
        assert (torch.cat(parts, 1) - full).abs().max() < 1e-5 * full.abs().max().clamp(min=1)

    def test_compiled_equals_eager_in_one_graph(self, name, options):
        """torch.compile's tracing and its gradients; what its backend then makes of the graph is torch's own."""
        x = ids(rows=1, length=8)
        # Below a shortcut layer, the paper's taps begin with the second layer and end two layers down.
        model = make(name, options, open_gates=True, layers=4 if name.startswith("shortcut") else 3)
        expected, logits = gradients(model, x), model(x)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for parameter_name, grad in gradients(compiled, x).items():
            wanted = expected[parameter_name.removeprefix("_orig_mod.")]
            assert (grad - wanted).abs().max() < 1e-3 * wanted.abs().max(), parameter_name
        assert torch.allclose(compiled(x), logits, atol=1e-5)

    def test_the_flops_are_those_that_torch_counts(self, name, options, monkeypatch):
        model = make(name, options).eval()
        # torch counts no FLOPs of the CPU's fused attention, so the plain one runs.
        path = {} if options.get("attention") != "merge" else {"attention": "mask"}
        counted = make(name, options | path).eval().requires_grad_(False)
        plain = lambda q, k, v, n, *below: merge.plain_with_depth(q, k, v, list(below[:n]), list(below[n:]))  # noqa: E731
        monkeypatch.setattr(merge._Depth, "apply", plain)
        # torch knows baddbmm, but not its form in place.
        mapping = {torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * math.prod(a) * b[-1]}
        counter = flop_counter.FlopCounterMode(display=False, custom_mapping=mapping)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            counted(ids(rows=1))
        assert counter.get_total_flops() == model.flops(CONTEXT, causal=False)
        assert model.flops(CONTEXT) < model.flops(CONTEXT, causal=False)

    def test_the_count_is_the_sum(self, name, options):
        for tied in (True, False):
            model = make(name, options, tied=tied)
            count = model.count()
            assert count["total"] == sum(p.numel() for p in model.parameters())
            assert count["total"] == count["embedding"] + count["trunk"] + count["head"]
            assert (count["head"] == 0) is tied

    def test_it_can_learn_a_batch_by_heart(self, name, options):
        model = make(name, options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        x = ids(rows=4)
        for _ in range(60):
            loss = metrics.loss(model(x[:, :-1]), x[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.2 < math.log(VOCABULARY)

    def test_weights_survive_being_saved(self, name, options, tmp_path):
        model = make(name, options).eval()
        torch.save(model.state_dict(), tmp_path / "w.pt")
        other = make(name, options, seed=2).eval()
        assert not torch.equal(other(ids()), model(ids()))
        other.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
        assert torch.equal(other(ids()), model(ids()))

    def test_rows_do_not_depend_on_each_other(self, name, options):
        model = make(name, options).eval()
        x = ids(rows=3)
        assert torch.allclose(model(x)[1:2], model(x[1:2]), atol=1e-5)

    def test_the_cache_is_as_large_as_it_says(self, name, options):
        model = make(name, options)
        cache = model.new_cache(1, CONTEXT)
        held = sum(t.numel() * 4 for t in cache.keys + cache.values)
        assert held == model.cache_bytes_per_token() * CONTEXT


def test_no_taps_is_the_baseline_bit_for_bit():
    gpt, none = make("gpt", {}), make("shortcut", {"taps": "none"})
    assert torch.equal(gpt(ids()), none(ids()))
    a, b = gradients(gpt, ids()), gradients(none, ids())
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("options", [{}, {"mode": "add"}, {"mode": "gated", "taps": "all"}])
def test_the_trunks_start_equal(options):
    gpt, other = make("gpt", {}).state_dict(), make("shortcut", options).state_dict()
    shared = [name for name in gpt if name in other and gpt[name].shape == other[name].shape]
    assert len([name for name in shared if name.startswith("blocks.4.")]) == 6
    assert all(torch.equal(gpt[name], other[name]) for name in shared)


def test_gated_starts_as_the_baseline():
    assert torch.equal(make("gpt", {})(ids()), make("shortcut", {"mode": "gated"})(ids()))


def reference(model, x):
    """The last layer by its formula, in float64 with plain loops over heads; the layers below by the model itself."""
    model = model.double()
    attention = model.blocks[-1].attention
    table = model.table.to(torch.complex128)[: x.shape[1]]
    history = [model.embedding(x)]
    for block in model.blocks[:-1]:
        history.append(block(history[-1], table, None))
    last = model.blocks[-1]
    h = history[-1]
    n = last.attention_norm(h)
    heads, width = model.keys.heads, model.keys.width
    d = width // heads

    def turn(z):  # (B, T, heads * d)
        pairs = torch.view_as_complex(z.unflatten(-1, (heads, d // 2, 2)).contiguous())
        return torch.view_as_real(pairs * table[:, None]).flatten(-3)

    sources = []
    for m, layer in enumerate(model.tapped):
        feature = attention.features.maps[m % len(attention.features.maps)](attention.features.norms[m](history[layer]))
        if attention.features.depth is not None:
            feature = feature + attention.features.depth[m]
        k, v = attention.key_value[m % len(attention.key_value)](feature).chunk(2, -1)
        sources.append((turn(k), v))
    if attention.own:
        q, k, v = attention.query_key_value(n).chunk(3, -1)
        own = (turn(k), v)
    else:
        q = attention.query(n)
    q = turn(q)

    def attend(pairs):
        times = x.shape[1]
        hidden = torch.ones(times, times, dtype=torch.bool).triu(1)
        outs, shares = [], []
        for head in range(heads):
            cut = slice(head * d, (head + 1) * d)
            scores = [(q[..., cut] @ k[..., cut].mT / math.sqrt(d)).masked_fill(hidden, -torch.inf) for k, _ in pairs]
            weights = torch.cat(scores, -1).softmax(-1).split(times, -1)
            outs.append(sum(w @ v[..., cut] for w, (_, v) in zip(weights, pairs, strict=True)))
            shares.append(torch.stack([w.sum(-1) for w in weights], 1))
        return torch.cat(outs, -1), torch.stack(shares, 1)  # (B, T, D), (B, H, M, T)

    mode = attention.mode
    y, shares = attend([own, *sources] if mode == "add" else sources)
    if mode == "gated":
        y = attend([own])[0] + attention.gate.repeat_interleave(d) * y
    h = h + attention.out(y)
    h = h + last.feed_forward(last.feed_forward_norm(h))
    return model.head(model.norm(h)), shares


@pytest.mark.parametrize("options", PATHS, ids=lambda o: "-".join((o["mode"], o["taps"], o["project"])))
@pytest.mark.parametrize("attention", ["mask", "merge"])
def test_both_paths_equal_the_formula(options, attention):
    x = ids()
    model = make("shortcut", options | {"attention": attention}, open_gates=True)
    grads = gradients(model, x)
    logits = model(x)
    trace = Trace()
    traced = model(x, trace=trace)
    slow = make("shortcut", options, open_gates=True)
    expected, shares = reference(slow, x)
    expected.square().sum().backward()
    assert torch.allclose(logits.double(), expected, atol=1e-5)
    assert torch.allclose(traced.double(), expected, atol=1e-5)
    for name, parameter in slow.named_parameters():
        assert torch.allclose(grads[name].double(), parameter.grad, atol=1e-4, rtol=1e-4), name
    assert torch.allclose(trace.depth_weights.double(), shares, atol=1e-5)
    assert trace.depth_weights.shape[2] == len(model.taps)


def test_the_merged_attention_equals_one_softmax_to_double_precision():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 3, 17, *shape, 8, dtype=torch.float64, generator=generator) for shape in ((), (4,), (4,))]
    results = []
    for attend in (merge.attend, merge.plain):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out, weights = attend(*leaves)
        (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves), weights.double()])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    for a, b in zip(results[0][:4], results[1][:4], strict=True):
        assert torch.allclose(a, b, atol=2e-6)


@pytest.mark.parametrize(
    ("taps", "layers", "expected"),
    [
        ("paper", 10, [2, 4, 6, 8]),
        ("paper", 6, [2, 4]),
        ("all", 4, [1, 2, 3]),
        ("every:3", 10, [3, 6, 9]),
        ("none", 10, []),
        ("8,2", 10, [2, 8]),
        ("0,1", 3, [0, 1]),
    ],
)
def test_taps(taps, layers, expected):
    assert tapped_layers(taps, layers) == expected


def test_a_tap_above_the_last_layer_is_a_usage_error():
    with pytest.raises(UsageError, match="layer 10; the last layer reads 0 to 9"):
        tapped_layers("2,10", 10)


@pytest.mark.parametrize("taps", ["", "2;4", "every:0", "first", "-1"])
def test_taps_of_an_unknown_form_are_refused(taps):
    with pytest.raises(ValueError, match="is none of paper"):
        ShortcutOptions(taps=taps)


def test_the_papers_probable_size():
    shape = {"layers": 10, "width": 128, "heads": 8, "context": 512, "ffn": 512}
    counts = {
        name: make(arm, options, **shape).count()["trunk"]
        for name, arm, options in (
            ("gpt", "gpt", {}),
            ("one", "shortcut", {}),
            ("per", "shortcut", {"project": "per_tap"}),
        )
    }
    assert counts["gpt"] == 10 * (4 * 128**2 + 2 * 128 * 512 + 2 * 128) + 128
    maps = 4 * (2 * 128 * 1024 + 128)
    assert counts["one"] - counts["gpt"] == maps
    assert counts["per"] - counts["one"] == 3 * 2 * 128**2
    assert make("shortcut_gated", {}, **shape).count()["trunk"] - counts["gpt"] == 181_384


def plainly(model, x, targets):
    """The baseline's loss by torch's own operations, in the model's precision."""
    f = torch.nn.functional
    x = model.embedding(x)
    for block in model.blocks:
        h = f.rms_norm(x, x.shape[-1:], block.attention_norm.weight, 1e-6)
        q, k, v = block.attention.query_key_value(h).unflatten(-1, (3, block.attention.heads, -1)).unbind(2)
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, model.table), rotate(k, model.table), v))
        y = f.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
        x = x + block.attention.out(y)
        h = f.rms_norm(x, x.shape[-1:], block.feed_forward_norm.weight, 1e-6)
        x = x + block.feed_forward.out(f.gelu(block.feed_forward.inner(h)))
    logits = model.head(f.rms_norm(x, x.shape[-1:], model.norm.weight, 1e-6))
    return f.cross_entropy(logits.flatten(0, 1), targets.flatten())


def test_the_fused_operations_have_the_gradients_of_torchs_own():
    model = make("gpt", {}, context=16, activation="gelu")
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, 0.3, 0.5, generator=generator)  # no norm near one, every term counts
    x, targets = torch.randint(0, VOCABULARY, (2, 2, 16), generator=generator)
    expected = plainly(model, x, targets)
    found = metrics.loss(model(x), targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    weights = dict(model.named_parameters())
    pairs = zip(
        torch.autograd.grad(found, list(weights.values())),
        torch.autograd.grad(expected, list(weights.values())),
        strict=True,
    )
    for name, (a, b) in zip(weights, pairs, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm(), name


@pytest.mark.parametrize("leaving", [LARGE_MATRIX // 64, LARGE_MATRIX // 64 + 1])
def test_a_product_divided_among_threads_is_that_product(leaving, monkeypatch):
    matrix = Linear(64, leaving)
    x = torch.randn(FEW_ROWS + 1, 3, 64)
    exact = x.double() @ matrix.weight.double().t()
    parts = []
    whole = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: parts.append(len(b)) or whole(a, b))
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for rows in (x[:1, :1], x[:FEW_ROWS, 1:2], x[:2, :].transpose(0, 1), x[:, 0], x):
                with torch.inference_mode():
                    y = matrix(rows)
                wanted = rows.double() @ matrix.weight.double().t()
                assert y.shape == wanted.shape
                assert (y - wanted).abs().max() < 1e-5 * exact.abs().max()
    finally:
        torch.set_num_threads(threads)
    # The first three have few rows.
    assert parts == [math.gcd(leaving, number) for number in (1, 2, 3) for _ in range(3)]


@pytest.mark.parametrize("name", ["gpt", "shortcut"])
def test_the_residual_stream_stays_in_full_precision_under_autocast(name):
    model = make(name, {})
    kept = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: kept.append(output.dtype))
    x = ids(1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        loss = metrics.loss(model(x), x)
    loss.backward()
    assert kept == [torch.float32] * len(model.blocks)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
