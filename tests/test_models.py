"""Architectures: all of the registry, and every option of the shortcut against a slow float64 reference."""

import itertools
import math
import re
import zlib
from collections import Counter
from functools import cache

import pytest
import torch
from pydantic import create_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter

from shortcut_cli import registry
from shortcut_cli.config.schema import ModelConfig, TrainConfig
from shortcut_cli.errors import UsageError
from shortcut_cli.kernels.attention import plain_attend_with_depth
from shortcut_cli.kernels.rope import rotate
from shortcut_cli.models import moda, transformer
from shortcut_cli.models.loss import loss
from shortcut_cli.models.options import ShortcutOptions
from shortcut_cli.models.shortcut import tapped_layers
from shortcut_cli.models.trace import Trace
from shortcut_cli.training import optim, precision

VOCABULARY, CONTEXT = 37, 24
SECTIONS = {name: registry.load(registry.MODEL_OPTIONS, name) for name in registry.MODEL_OPTIONS}
Config = create_model("Config", __base__=ModelConfig, **{name: (kind, kind()) for name, kind in SECTIONS.items()})
ARMS = [
    ("gpt", {}),
    ("conv", {}),
    ("conv", {"kernel": 3, "groups": 4}),
    ("shortcut", {}),
    ("shortcut", {"map_norm": False}),
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
    ("shortcut_pool", {}),
    ("shortcut_pool", {"taps": "all", "concat": "feature"}),
    ("shortcut_pool", {"taps": "none"}),
    ("x0", {}),
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
    ("depth_attention", {"values": "raw"}),
    ("moda", {}),
    ("moda", {"feed_forward": True}),
    ("mudd", {}),
    ("mudd_last", {}),
    ("hyper", {}),
    ("hyper", {"weights": "static", "streams": 2}),
]
PATHS = [
    ({"mode": mode, "taps": taps, "project": project, "depth_embedding": True, "map_width": 20}, {})
    for mode, taps, project in itertools.product(("replace", "add", "gated"), ("paper", "0,2,5"), ("shared", "per_tap"))
] + [
    ({"map": "linear", "taps": "all"}, {"rope_base": 30.0, "heads": 2}),
    ({"map": "identity", "mode": "gated", "taps": "1,4"}, {"activation": "swiglu", "tied": False}),
    ({"share_map": True, "mode": "add", "taps": "every:2", "map_width": 20}, {"rope_base": 30.0}),
    ({"concat": "feature", "map_width": 20, "depth_embedding": True, "project": "per_tap"}, {}),
    ({"concat": "feature", "mode": "add", "map": "linear", "share_map": True, "taps": "0,1,5"}, {"tied": False}),
    ({"concat": "feature", "mode": "gated", "map": "identity", "taps": "3,5"}, {"rope_base": 30.0}),
    ({"map_norm": False, "map_width": 20}, {}),
    ({"map_norm": False, "concat": "feature", "map": "linear"}, {}),
]
TAPPED = {"paper": [2, 4], "all": [1, 2, 3, 4, 5], "every:2": [2, 4]}  # of six layers
FORMS = {**{taps: [int(layer) for layer in taps.split(",")] for taps in ("0,2,5", "1,4", "0,1,5", "3,5")}, **TAPPED}


# Initial weights at which each part of a model does something, and no norms but those of the layers' inputs.
PLAIN = {"init": "gpt2", "qk_norm": False, "tied": True}
NORMED = {"qk_norm": True}
FAN_IN = {"init": "fan_in", "tied": False, **NORMED}


def make(name, options, *, seed=1, open_gates=False, **shape):
    """open_gates: with weights at which every part of the model matters, and no two parts are alike."""
    shape = {"layers": 6, "width": 32, "heads": 4, "context": CONTEXT, "ffn": 64, **PLAIN} | shape
    section = registry.OPTIONS_OF.get(name, name)
    sections = {section: SECTIONS[section](**options)} if options else {}
    config = Config(name=name, **shape, **sections)
    model = registry.load(registry.MODELS, name)(config, VOCABULARY, seed)
    if open_gates:
        with torch.no_grad():
            enliven(model)
    return model


def enliven(model):
    """Change the initial values, at which gates are closed, norms alike, scores near zero and sublayers add little."""
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if name.endswith("outer.weight"):
            parameter.normal_(0.025, 0.025, generator=generator)  # larger, MUDD's streams would grow with each layer
        elif any(name.endswith(router) for router in model.routers()):
            parameter.normal_(0.2, 0.2, generator=generator)
        elif parameter.dim() == 1:
            parameter.normal_(0.7 if name.endswith("gate") else 1.0, 0.3, generator=generator)
        elif name.startswith("blocks."):
            parameter.mul_(8)


def shallow(name, options):
    """An arm with few layers, since each is traced anew, but with two taps, and with enough to mix what was mixed."""
    if name.startswith("shortcut") and name != "shortcut_gated" and options.get("taps") != "none":
        options = options | {"taps": "0,1"}
    layers = 3 if name == "depth_attention" or {"dilation", "blocks"} & options.keys() else 2
    return make(name, options, open_gates=True, layers=layers)


def test_the_list_of_arms_has_every_architecture():
    assert {name for name, _ in ARMS} == registry.MODELS.keys()


def ids(rows=2, length=CONTEXT, seed=0):
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("name", "options"), ARMS)
class TestEveryArm:
    @pytest.mark.parametrize("shape", [{}, NORMED])
    def test_a_change_leaves_everything_before_it_bit_equal(self, name, options, shape):
        model = make(name, options, open_gates=True, **shape).eval()
        x = ids()
        for place in (0, 11, CONTEXT - 1):
            other = x.clone()
            other[:, place] = (x[:, place] + 1) % VOCABULARY
            a, b = model(x), model(other)
            assert torch.equal(a[:, :place], b[:, :place])
            assert not torch.equal(a[:, place:], b[:, place:])

    @pytest.mark.parametrize("shape", [{}, {"activation": "swiglu", "tied": False, "dropout": 0.1}, NORMED])
    def test_every_parameter_gets_a_finite_gradient(self, name, options, shape):
        for parameter, grad in gradients(make(name, options, open_gates=True, **shape), ids()).items():
            assert grad.isfinite().all(), parameter
            assert grad.abs().sum() > 0, parameter

    @pytest.mark.parametrize("shape", [{}, NORMED])
    def test_cached_equals_full(self, name, options, shape):
        model = make(name, options, open_gates=True, **shape).eval()
        x = ids()
        with torch.inference_mode():
            full = model(x)
            cache = model.new_cache(2, CONTEXT)
            parts = [model(x[:, a:b], cache) for a, b in itertools.pairwise([0, 5, 6, 9, *range(10, CONTEXT + 1)])]
        assert apart(torch.cat(parts, 1), full) < 1e-5

    def test_compiled_equals_eager_in_one_graph(self, name, options):
        """The traced graph and its gradients; what a backend then makes of the graph is not tested."""
        x, model = ids(rows=1, length=8), shallow(name, options)
        expected, logits = gradients(model, x), model(x)
        torch.compiler.reset()
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        assert apart(found, logits) < 1e-5
        model.zero_grad()
        found.square().sum().backward()
        for parameter_name, parameter in model.named_parameters():
            assert apart(parameter.grad, expected[parameter_name]) < 1e-4, parameter_name

    def test_the_flops_are_those_that_torch_counts(self, name, options, monkeypatch):
        shape = {"layers": 6, "width": 40, "heads": 5, "ffn": 56}
        times = 19
        model = make(name, options, **shape).eval()
        # torch doesn't count the FLOPs of the CPU's fused attention, so the plain one runs.
        path = {} if options.get("attention") != "merge" else {"attention": "mask"}
        counted = make(name, options | path, **shape).eval().requires_grad_(False)
        monkeypatch.setattr(moda, "attend_with_depth", plain_attend_with_depth)
        # torch counts baddbmm, but not its in-place form.
        mapping = {torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * math.prod(a) * b[-1]}
        counter = flop_counter.FlopCounterMode(display=False, custom_mapping=mapping)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            counted(ids(rows=1, length=times))
        # Nor does it count products of states with numbers, and sums over depth of what they give.
        summed = 2 * times * 40 * depth_sums(name, options)
        assert counter.get_total_flops() + summed == model.flops(times, causal=False)
        # Without the keys at later times, which no query sees: for each of them and each channel, one multiply-add in
        # the scores and one in the sums.
        keys = sum(slots(name, options))
        assert model.flops(times, causal=False) - model.flops(times) == 4 * 40 * keys * (times * (times - 1) // 2)

    def test_the_cache_has_a_slot_per_layer_and_a_row_per_source(self, name, options):
        model = make(name, options)
        expected = slots(name, options)
        assert model.cache_entries() == expected
        cache = model.new_cache(3, 7)
        for kept in (cache.keys, cache.values):
            assert [tuple(tensor.shape) for tensor in kept] == [(3, 4, 7 * rows, 8) for rows in expected]
            assert all(tensor.dtype == torch.float32 for tensor in kept)
        assert model.cache_bytes_per_token() == sum(expected) * 2 * 32 * 4

    def test_the_count_is_the_sum(self, name, options):
        for tied in (True, False):
            model = make(name, options, tied=tied)
            count = model.count()
            assert count["total"] == sum(p.numel() for p in model.parameters())
            assert count["total"] == count["embedding"] + count["non_embedding"] + count["head"]
            assert (count["head"] == 0) is tied

    def test_it_can_learn_a_batch_by_heart(self, name, options):
        model = make(name, options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        x = ids(rows=4, length=13)
        for _ in range(60):
            nats = loss(model(x[:, :-1]), x[:, 1:])
            if nats.item() < 0.2:
                return
            optimizer.zero_grad()
            nats.backward()
            optimizer.step()
        pytest.fail(f"a loss of {nats.item():.3f} after 60 steps")

    def test_weights_survive_being_saved(self, name, options, tmp_path):
        model = make(name, options).eval()
        torch.save(model.state_dict(), tmp_path / "w.pt")
        other = make(name, options, seed=2).eval()
        assert not torch.equal(other(ids()), model(ids()))
        other.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
        assert torch.equal(other(ids()), model(ids()))

    def test_rows_do_not_depend_on_each_other(self, name, options):
        model = make(name, options, open_gates=True).eval()
        x = ids(rows=3)
        assert apart(model(x)[1:2], model(x[1:2])) < 1e-5

    def test_matrices_are_drawn_and_the_rest_starts_as_its_paper_says(self, name, options):
        """N(0, 0.02), divided by sqrt(2 L) for what writes to the residual stream (GPT-2)."""
        model, other = make(name, options, tied=False, seed=3), make(name, options, tied=False, seed=4)
        firsts, others = set(), dict(other.named_parameters())
        for parameter_name, weight in model.named_parameters():
            fixed = start(parameter_name, weight.shape, mapped_size(name, options))
            if fixed is not None:
                assert torch.equal(weight, fixed), parameter_name
                continue
            std = 0.02 / math.sqrt(2 * 6) if WRITES.search(parameter_name) else 0.02
            if name == "hyper" and WRITES.search(parameter_name):
                std *= math.sqrt(options.get("streams", 4))
            if parameter_name.endswith("convolution.kernel"):
                std = options.get("kernel", 7) ** -0.5
            if parameter_name.endswith("attention.pool"):  # what a matrix of 32 inputs makes of a normed state
                std = 0.02 * math.sqrt(32)
            # Five standard errors of the standard deviation, and below of the mean.
            assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel())), parameter_name
            assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel()), parameter_name
            assert not torch.isclose(weight, others[parameter_name], rtol=1e-5).all(), parameter_name
            firsts.add(round(weight.flatten()[0].item() / std, 4))
        drawn = [n for n, weight in model.named_parameters() if start(n, weight.shape) is None]
        assert len(firsts) == len(drawn), "two matrices with the same numbers"
        assert "embedding.weight" in drawn
        assert "head.weight" in drawn

    def test_with_fan_in_matrices_keep_sizes_and_layers_add_nothing(self, name, options):
        """A standard deviation of inputs^-1/2, and 0 for what writes to the residual stream."""
        model = make(name, options, tied=False, init="fan_in")
        given = dict(model.named_parameters())
        plain = dict(make(name, options, tied=False).named_parameters())
        written = [n for n in given if WRITES.search(n)]
        assert len(written) == (3 if name == "conv" else 2) * 6
        for parameter_name, weight in given.items():
            if parameter_name in written:
                assert (weight == 0).all(), parameter_name
            elif parameter_name in {*model.matrices(), "embedding.weight", "head.weight"}:
                std = 1 if parameter_name == "embedding.weight" else weight.shape[1] ** -0.5
                assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel())), parameter_name
                assert torch.allclose(weight / std, plain[parameter_name] / 0.02), parameter_name
            elif parameter_name.endswith("attention.pool"):
                assert torch.allclose(weight, plain[parameter_name] / (0.02 * math.sqrt(32)))
            elif options.get("concat") == "feature" and "map_norms" in parameter_name:
                assert (weight == 1).all()  # the matrix that reads them keeps their size
            elif "map_norms" in parameter_name:
                assert torch.allclose(weight, torch.tensor(mapped_size(name, options) ** 0.5))
            else:
                assert torch.equal(weight, plain[parameter_name]), parameter_name

    @pytest.mark.parametrize("length", [CONTEXT, 256])
    @pytest.mark.parametrize("shape", [{}, FAN_IN], ids=["gpt2", "fan_in"])
    def test_every_attention_starts_as_large_as_the_baselines(self, name, options, shape, length):
        """What it adds or, where that starts at zero, what it multiplies by that zero."""
        found, expected = attention_sizes(name, options, shape, length=length), baseline_sizes(bool(shape), length)
        # By their formulas, a mean over depth starts smaller, and what writes to many streams larger.
        expected = [size * share for size, share in zip(expected, first_shares(name, options, shape), strict=True)]
        if options.get("map_norm", True):
            assert all(1 / 2 < a / b < 2 for a, b in zip(found, expected, strict=True)), (found, expected)
        elif not shape:  # the reconstruction as it was
            assert found[-1] < expected[-1] / 10

    def test_with_fan_in_it_starts_as_the_baseline(self, name, options):
        x = ids()
        found, expected = (make(*arm, init="fan_in", tied=False, **NORMED)(x) for arm in ((name, options), ("gpt", {})))
        assert apart(found, expected) < 1e-3  # a mean over depth is smaller, which epsilon lets the last norm see

    def test_what_it_shares_with_the_baseline_starts_equal(self, name, options):
        baseline, weights = make("gpt", {}).state_dict(), make(name, options).state_dict()
        missing = {parameter for parameter in baseline if parameter not in weights}
        # A last layer that reads only taps has no keys of its own.
        replaced = name in ("shortcut_local", "shortcut_pool", "late_kv")
        replaced = replaced or (name == "shortcut" and "mode" not in options)
        replaced = replaced and options.get("taps") != "none"
        lacking = {"blocks.5.attention.query_key_value.weight"} if replaced else set()
        if replaced and name == "shortcut_pool":  # nor anything else that its attention asks
            lacking |= {"blocks.5.attention_norm.weight"}
        assert missing == lacking
        if "groups" in options:  # a fourth of the matrices
            missing = {n for n in baseline if re.search(r"feed_forward\.(inner|out)\.weight$", n)}
            assert all(weights[n].numel() * 4 == baseline[n].numel() for n in missing)
        if name == "hyper":  # it writes sqrt(n) more to each of n streams
            times = math.sqrt(options.get("streams", 4))
            written = {n for n in baseline if WRITES.search(n)}
            assert all(torch.allclose(weights[n], times * baseline[n], rtol=1e-6) for n in written)
            missing |= written
        assert all(torch.equal(weights[n], weight) for n, weight in baseline.items() if n not in missing)

    def test_its_routers_are_just_what_weighs_sources(self, name, options):
        """Given by the ends of their names, as the optimizer looks for them."""
        model = make(name, options)
        parameters = [n for n, _ in model.named_parameters()]
        found = {n for n in parameters if any(n.endswith(router) for router in model.routers())}
        assert found == {n for n in parameters if ROUTING.fullmatch(n)}
        without = ("gpt", "conv", "depth_attention", "moda", "shortcut", "shortcut_gated", "shortcut_local", "late_kv")
        assert bool(found) is (name not in without and options.get("taps") != "none")

    def test_dropout_is_on_the_embedding_and_on_what_each_sublayer_adds(self, name, options, monkeypatch):
        """With a factor of 1/2, which is exact, in place of chance, it equals a model with half of those weights."""
        chances = set()

        def halve(x, p, training, inplace=False):
            chances.add(p)
            return x * 0.5 if training else x

        monkeypatch.setattr(torch.nn.functional, "dropout", halve)
        model = make(name, options, open_gates=True, dropout=0.3, tied=False)
        other = make(name, options, open_gates=True, dropout=0.3, tied=False).eval()
        assert torch.equal(model.eval()(ids()), other(ids()))
        with torch.no_grad():
            for parameter_name, weight in other.named_parameters():
                if parameter_name == "embedding.weight" or WRITES.search(parameter_name):
                    weight.mul_(0.5)
        assert apart(model.train()(ids()), other(ids())) < 1e-6
        assert chances == {0.3}

    def test_autocast_changes_no_more_than_it_rounds(self, name, options):
        model = make(name, options, open_gates=True)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("route.weight"):  # of hyper: at this size it would double the difference
                parameter.data.mul_(0.1)
        x = ids(1, 8)
        expected, grads = model(x), gradients(model, x)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            found = model(x)
        # Twelve sublayers and a head, each rounded to 8 bits; twice as many roundings on the way back.
        assert apart(found, expected) < 13 * 2**-8
        found.float().square().sum().backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
        whole = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        assert apart(whole, torch.cat([grad.flatten() for grad in grads.values()])) < 26 * 2**-8


def first_shares(name, options, shape):
    """By which an architecture's own formula makes the attention of each layer larger or smaller at first."""
    if name == "hyper" and not shape:
        return [math.sqrt(options.get("streams", 4))] * 6
    if name != "depth_attention":
        return [1] * 6
    mixed = []  # of each layer, as shares of the values of all, which do not depend on each other: their mean
    for layer in range(6):
        own = torch.eye(6)[layer]
        below = mixed if options.get("values") == "mixed" else torch.eye(6)[:layer].unbind()
        mixed.append(sum(below, own) / (layer + 1))
    return [shares.norm().item() for shares in mixed]


def attention_sizes(name, options, shape, layers=6, length=CONTEXT):
    """The standard deviation, at first, of what the attention of each layer adds, or of what its last matrix reads."""
    model = make(name, options, layers=layers, width=64, ffn=128, context=length, **shape).eval()
    sizes = {}

    def note(layer):
        return lambda _module, given, result: sizes.update({layer: (result if result.any() else given[0]).std().item()})

    for layer, block in enumerate(model.blocks):
        block.attention.out.register_forward_hook(note(layer))
    with torch.no_grad():
        model(ids(rows=8, length=length))
    return [sizes[layer] for layer in range(layers)]


@cache
def baseline_sizes(fan_in, length):
    return attention_sizes("gpt", {}, FAN_IN if fan_in else {}, length=length)


@pytest.mark.parametrize("init", ["gpt2", "fan_in"])
@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("concat", ["time", "feature"])
@pytest.mark.parametrize("name", ["shortcut", "shortcut_local"])
@pytest.mark.parametrize("length", [8, CONTEXT, 256])
def test_the_last_attention_of_many_taps_starts_as_large_as_the_baselines(length, name, concat, mode, init):
    shape = {"init": init, "tied": init == "gpt2", "qk_norm": init == "fan_in"}
    options = {"taps": "all", "concat": concat, "mode": mode, "map_width": 128}
    found, expected = (attention_sizes(*arm, shape, 10, length)[-1] for arm in ((name, options), ("gpt", {})))
    assert 1 / 2 < found / expected < 2


def test_the_vectors_of_the_depth_embedding_do_not_decay():
    model = make("shortcut", {"depth_embedding": True})
    groups = optim.adamw(model, TrainConfig(steps=1, batch_size=1, lr=1.0), decays=model.decays()).param_groups
    named = {parameter: name for name, parameter in model.named_parameters()}
    decayed = {named[parameter] for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert "blocks.5.attention.features.depth" in named.values()
    assert decayed == {name for name, weight in model.named_parameters() if weight.dim() > 1} - {
        "blocks.5.attention.features.depth"
    }


def depth_sums(name, options):
    """How many states of one token six layers multiply by a number, to add them over depth, one after the other."""
    if name.startswith("shortcut"):  # what a gate weighs
        return int(options.get("mode") == "gated" or name == "shortcut_gated")
    if name == "value_residual":  # of two values, one may have no weight
        return 5 * (1 if options.get("gate") == "token" else 2)
    if name == "denseformer":
        return 2 + 4 if "dilation" in options else 2 + 3 + 4 + 5 + 6 + 7
    if name == "moda":  # scores and sums of the layers below
        return 2 * (1 + 2 + 3 + 4 + 5) * (2 if options.get("feed_forward") else 1)
    return {
        "x0": 6 * 2,
        "dense_last": 7,
        "depth_attention": 2 * (2 + 3 + 4 + 5 + 6),  # scores and sums of the layers so far
        "mudd_last": 3 + 3 + 4,
    }.get(name, 0)


def slots(name, options):
    """Keys per token in each slot of the cache of six layers."""
    if name == "late_kv":
        return [1] * 6
    if name == "shortcut_gated":
        return [1, 1, 1, 1, 1, 1, 5]
    if not name.startswith("shortcut") or options.get("taps") == "none":
        return [1] * 6
    taps = {"paper": 2, "all": 5, "0,3": 2, "every:2": 2}[options.get("taps", "paper")]
    taps = 1 if options.get("concat") == "feature" else taps
    return [1, 1, 1, 1, 1, *{"replace": [taps], "add": [taps + 1], "gated": [1, taps]}[options.get("mode", "replace")]]


WRITES = re.compile(r"(attention|convolution|feed_forward)\.out\.weight$")  # to the residual stream
ROUTING = re.compile(
    r"blocks\.\d+\.attention\.(share|pool|gate\.weight)|carry|again|mix|mixes\.\d+|queries|key_norms"
    r"|(mixes\.\d+|before|after)\.(static|inner\.weight|outer\.weight)|connections\.\d+\.(read|carry|write|norm|route\.weight|scale)"
)


def mapped_size(name, options):
    """Of what a map makes, at first: a mean of M features that do not depend on each other is sqrt(M) smaller.

    Between own keys and M others: (1 + M size^2)^1/2 = M + 1. A matrix of M D inputs makes sqrt(M) times more of them.
    """
    if name == "shortcut_gated":
        return math.sqrt(5)
    taps = {"all": 5}.get(options.get("taps"), 2)
    if options.get("concat") == "feature":
        return 1 / math.sqrt(taps)
    if options.get("share_map"):
        return 1.0
    return math.sqrt(taps)


def start(name, shape, size=None):
    """The initial value of a parameter that isn't drawn, None for the others; size: of what maps make."""
    last = torch.zeros(shape)
    last[..., -1] = 1
    if name == "before.static":
        return torch.zeros(shape)
    if name == "after.static":
        return torch.tensor([0, 0, -5.0, 0])  # times 0.1: half of layer 8 of 11 is taken off
    if name.startswith("connections."):
        _, number, part = name.split(".", 2)
        first = torch.zeros(shape)
        first[int(number) % shape[0]] = 1
        values = {"read": first, "carry": torch.eye(shape[0]), "write": torch.ones(shape), "norm": torch.ones(shape)}
        return (values | {"route.weight": torch.zeros(shape), "scale": torch.full(shape, 0.01)})[part]
    values = [
        (r"map_norms\.\d+\.weight", torch.full(shape, size or math.nan)),
        (r"norm\.weight|norms\.\d+\.weight|key_norms", torch.ones(shape)),
        (r"carry", torch.ones(shape)),
        (r"attention\.gate|queries|outer\.weight|again", torch.zeros(shape)),
        (r"attention\.share", torch.full(shape, 0.5)),
        (r"mix|mixes\.\d+|static", last),
    ]
    return next((value for form, value in values if re.search(rf"(^|[._])({form})$", name)), None)


def test_no_taps_is_the_baseline_bit_for_bit():
    gpt, none = make("gpt", {}), make("shortcut", {"taps": "none"})
    assert torch.equal(gpt(ids()), none(ids()))
    a, b = gradients(gpt, ids()), gradients(none, ids())
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_gated_starts_as_the_baseline():
    assert torch.equal(make("gpt", {})(ids()), make("shortcut", {"mode": "gated"})(ids()))


def normed(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x, model):
    """(B, T, H, d): neighbouring channels 2k and 2k + 1 rotated by t * base^(-2k / d) (Su et al. 2021, eq. 15)."""
    times, d = x.shape[1], x.shape[-1]
    rates = torch.tensor([model.config.rope_base ** (-2 * k / d) for k in range(d // 2)], dtype=torch.float64)
    angles = torch.arange(times, dtype=torch.float64)[:, None, None] * rates  # (T, 1, d / 2)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1).flatten(-2)


def heads(model, layer, x):
    """Queries, keys, values of a layer that reads x, already normed: (B, T, H, d) each."""
    qkv = (x @ model.blocks[layer].attention.query_key_value.weight.T).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (model.config.heads, -1)) for y in qkv)
    return turned(q, model), turned(k, model), v


def look_at(q, sources):
    """One causal softmax per head over the keys of all sources, by a loop over time: (B, T, H, d), (B, H, M, T)."""
    outs, shares = [], []
    for t in range(q.shape[1]):
        scores = [torch.einsum("bhd,bshd->bhs", q[:, t], k[:, : t + 1]) / math.sqrt(q.shape[-1]) for k, _ in sources]
        weights = torch.cat(scores, -1).softmax(-1).split(t + 1, -1)
        read = zip(weights, sources, strict=True)
        outs.append(sum(torch.einsum("bhs,bshd->bhd", weight, v[:, : t + 1]) for weight, (_, v) in read))
        shares.append(torch.stack([weight.sum(-1) for weight in weights], -1))
    return torch.stack(outs, 1), torch.stack(shares, -1)


def attended(model, layer, x, values=None):
    """What the attention of a layer adds; values(q, k, v, x) may change what is attended to."""
    block = model.blocks[layer]
    h = normed(x, block.attention_norm.weight)
    q, k, v = heads(model, layer, h)
    v = values(q, k, v, h) if values else v
    return look_at(q, [(k, v)])[0].flatten(-2) @ block.attention.out.weight.T


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def fed(model, layer, x):
    """What the feed-forward of a layer adds."""
    block = model.blocks[layer]
    h = normed(x, block.feed_forward_norm.weight) @ block.feed_forward.inner.weight.T
    if model.config.activation == "swiglu":  # swish(x W) * x V (Shazeer 2020, eq. 6), W above V in one matrix
        gate, value = h[..., : model.config.ffn], h[..., model.config.ffn :]
        h = gate / (1 + (-gate).exp()) * value
    else:
        h = gelu(h)
    return h @ block.feed_forward.out.weight.T


def layer_output(model, layer, x, values=None):
    x = x + attended(model, layer, x, values)
    return x + fed(model, layer, x)


def head(model, x):
    weight = model.embedding.weight if model.config.tied else model.head.weight
    return normed(x, model.norm.weight) @ weight.T


def read_taps(model, states, options, tapped):
    """The output of a shortcut's last layer, from the embedding and the outputs of all layers below; and the shares."""
    last = model.blocks[-1]
    attention, by_feature = last.attention, options.concat == "feature"
    features, maps, projections = [], list(attention.features.maps), list(attention.key_value)
    assert len(maps) == (1 if options.share_map else len(tapped))
    assert len(attention.features.map_norms) == (len(tapped) if options.map_norm and options.map != "identity" else 0)
    assert len(projections) == (len(tapped) if options.project == "per_tap" and not by_feature else 1)
    for m, layer in enumerate(tapped):
        feature = normed(states[layer], attention.features.norms[m].weight)
        mapped = maps[0 if options.share_map else m]
        if options.map == "mlp":
            assert mapped[0].weight.shape == (options.map_width, model.config.width)
            feature = gelu(feature @ mapped[0].weight.T) @ mapped[2].weight.T
        elif options.map == "linear":
            feature = feature @ mapped.weight.T
        if options.map_norm and options.map != "identity":
            feature = normed(feature, attention.features.map_norms[m].weight)
        features.append(feature + attention.features.depth[m] if options.depth_embedding else feature)
    sources = []
    for m, feature in enumerate([torch.cat(features, -1)] if by_feature else features):
        k, v = (feature @ projections[m % len(projections)].weight.T).chunk(2, -1)
        k, v = (y.unflatten(-1, (model.config.heads, -1)) for y in (k, v))
        sources.append((turned(k, model), v))
    h = normed(states[-1], last.attention_norm.weight) if hasattr(last, "attention_norm") else states[-1]
    if hasattr(attention, "pool"):
        q = turned(attention.pool.expand(*h.shape[:2], -1, -1), model)
    elif options.mode == "replace":
        q = turned((h @ attention.query.weight.T).unflatten(-1, (model.config.heads, -1)), model)
    else:
        q, *own = heads(model, -1, h)
    y, shares = look_at(q, [own, *sources] if options.mode == "add" else sources)
    if options.mode == "gated":
        y = look_at(q, [own])[0] + attention.gate[:, None] * y
    x = states[-1] + y.flatten(-2) @ attention.out.weight.T
    return x + fed(model, -1, x), shares


def reference(model, x, options=None, tapped=None):
    """The whole shortcut by its formula, in float64: logits, and the share of each source, (B, H, M, T)."""
    model = model.double()
    states = [model.embedding.weight[x]]
    for layer in range(len(model.blocks) - 1):
        states.append(layer_output(model, layer, states[-1]))
    y, shares = read_taps(model, states, options or model.options, model.tapped if tapped is None else tapped)
    return head(model, y), shares


def apart(found, wanted):
    """The relative difference of two tensors; 1e-5 is about a hundred roundings of fp32."""
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(("options", "shape"), PATHS, ids=lambda o: "-".join(map(str, o.values())))
def test_both_paths_equal_the_formula(options, shape):
    x = ids(length=9)
    slow = make("shortcut", options, open_gates=True, **shape)
    expected, shares = reference(slow, x, ShortcutOptions(**options), FORMS[options.get("taps", "paper")])
    expected.square().sum().backward()
    for attention in ("mask", "merge"):
        model = make("shortcut", options | {"attention": attention}, open_gates=True, **shape)
        grads = gradients(model, x)
        assert apart(model(x), expected) < 1e-5
        with torch.inference_mode():
            assert apart(model(x), expected) < 1e-5
        for name, parameter in slow.named_parameters():
            assert apart(grads[name], parameter.grad) < 1e-4, name
        trace = Trace()
        assert apart(model(x, trace=trace), expected) < 1e-5
        (weights,) = trace.weights.values()
        assert torch.allclose(weights.double(), shares, atol=1e-5)
        assert weights.shape[2] == len(model.taps)


def test_what_the_last_layer_attends_to_has_names():
    names = lambda name, options: make(name, options).taps  # noqa: E731
    assert names("gpt", {}) == names("shortcut", {"taps": "none"}) == ()
    assert names("shortcut", {}) == ("layer 2", "layer 4")
    assert names("shortcut", {"taps": "0,3", "mode": "gated"}) == ("embedding", "layer 3")
    assert names("shortcut", {"taps": "0,3", "mode": "add"}) == ("own keys", "embedding", "layer 3")
    assert names("shortcut", {"taps": "0,3", "concat": "feature"}) == ("embedding + layer 3",)
    both = {"taps": "1,3", "concat": "feature", "mode": "add"}
    assert names("shortcut", both) == ("own keys", "layer 1 + layer 3")
    assert names("shortcut_local", {}) == ("map of layer 2", "map of layer 4")
    assert names("shortcut_gated", {}) == ("layer 1", "layer 2", "layer 3", "layer 4", "layer 5")
    assert names("late_kv", {}) == ("layer 3",)


@pytest.mark.parametrize(("layers", "middle"), [(2, 1), (3, 1), (4, 2), (5, 2), (10, 5), (11, 5)])
def test_late_kv_reads_the_layer_in_the_middle_unless_told_otherwise(layers, middle):
    assert make("late_kv", {}, layers=layers).tapped == [middle]
    assert make("late_kv", {"layer": layers - 1}, layers=layers).tapped == [layers - 1]
    message = rf"model\.late_kv\.layer names layer {layers}, which is not below the last layer, {layers}$"
    with pytest.raises(UsageError, match=message):
        make("late_kv", {"layer": layers}, layers=layers)


def test_the_flops_of_a_window_by_hand():
    """Two per multiply-add; a query sees the keys of all times up to its own, T (T + 1) / 2 pairs in all."""
    # 3 layers of width 8: projections 4 * 64, feed-forward 2 * 8 * 20, head 8 * 37; five tokens, 15 pairs.
    gpt = make("gpt", {}, layers=3, width=8, heads=2, ffn=20)
    assert gpt.macs() == 3 * (256 + 320) + 296
    assert gpt.training_flops_per_token(5) * 5 == 3 * gpt.flops(5)
    assert gpt.flops(5) == 2 * 5 * (3 * 576 + 296) + 3 * 15 * (2 * 8 + 2 * 8)
    # SwiGLU: two matrices in, one out.
    assert make("gpt", {}, layers=3, width=8, heads=2, ffn=20, activation="swiglu").macs() == 3 * 736 + 296
    # A convolution: 128 in, 5 taps for each of 8 channels, 64 out; a feed-forward in two blocks costs half.
    conv = make("conv", {"kernel": 5, "groups": 2}, layers=3, width=8, heads=2, ffn=20)
    assert conv.macs() == 3 * (256 + 160 + 128 + 40 + 64) + 296
    # The last of 4 layers reads 3 taps: query 64 and out 64; per tap a map 2 * 8 * 10, keys and values 2 * 64.
    for project, share in itertools.product(("shared", "per_tap"), (False, True)):
        options = {"taps": "0,1,3", "map_width": 10, "project": project, "share_map": share}
        model = make("shortcut", options, layers=4, width=8, heads=2, ffn=20)
        assert model.macs() == 3 * 576 + (128 + 320 + 3 * (160 + 128)) + 296
        assert model.flops(7) == 2 * 7 * 3336 + (3 + 3) * 28 * 32
    # Side by side: one projection of 24 channels to 16; with own keys, 3 * 64 instead of 64, and a second key.
    options = {"taps": "0,1,3", "map": "linear", "concat": "feature", "share_map": True}
    model = make("shortcut", options | {"mode": "add"}, layers=4, width=8, heads=2, ffn=20)
    assert model.macs() == 3 * 576 + (256 + 320 + 3 * 64 + 24 * 16) + 296
    assert model.flops(7) == 2 * 7 * model.macs() + (3 + 2) * 28 * 32


@pytest.mark.parametrize(
    ("name", "options", "more"),
    [
        ("conv", {}, 6 * (3 * 32**2 + 7 * 32 + 2 * 32)),
        ("conv", {"kernel": 3, "groups": 4}, 6 * (3 * 32**2 + 3 * 32 + 2 * 32 - 2 * 32 * 64 * 3 // 4)),
        ("shortcut_pool", {"map": "linear"}, 2 * (32 + 32**2 + 32) - 32**2 - 32 + 32),
        ("x0", {}, 6 * 2),
        ("dense_last", {}, 7),
        ("late_kv", {}, 32),  # the norm of the tap
        ("value_residual", {}, 5 * 2),
        ("value_residual", {"gate": "token"}, 5 * 32 * 4),
        ("denseformer", {}, 2 + 3 + 4 + 5 + 6 + 7),
        ("denseformer", {"dilation": 2, "period": 3}, 2 + 4),  # layers 1, 3; 0, 2, 4, 6
        ("attnres", {}, 2 * 13 * 32),
        ("attnres", {"variant": "delta"}, 2 * 11 * 32),
        ("depth_attention", {}, 0),
        ("moda", {}, 0),
        ("mudd", {}, sum((32 + n + 1) * n for n in (8, 12, 16, 20, 24, 7))),
        ("moda", {"feed_forward": True}, 5 * 2 * 32**2),
        ("mudd_last", {}, 2 * 32 * 64 + (64 + 1) * (6 + 4)),
        ("hyper", {}, 12 * (4 + 16 + 4 + 32 + 6 * 32 + 2)),
        ("hyper", {"weights": "static", "streams": 3}, 12 * (3 + 9 + 3)),
        ("shortcut", {"mode": "gated", "taps": "0,3", "map": "linear"}, 2 * (32 + 32**2 + 32) + 2 * 32**2 + 4),
        ("shortcut", {"depth_embedding": True, "taps": "0,3", "map": "identity"}, 4 * 32),
        ("shortcut", {"share_map": True, "map_width": 9, "taps": "0,3"}, 2 * 32 + 2 * 9 * 32 + 2 * 32),
        ("shortcut", {"map_norm": False, "map_width": 9, "taps": "0,3"}, 2 * 32 + 2 * 2 * 9 * 32),
        ("shortcut", {"concat": "feature", "map": "identity", "taps": "0,3"}, 2 * 32 + 2 * 32**2),
    ],
)
def test_what_an_architecture_adds_to_the_baseline(name, options, more):
    baseline = make("gpt", {}, tied=False).count()
    assert baseline["non_embedding"] == 6 * (4 * 32**2 + 2 * 32 * 64 + 2 * 32) + 32
    assert baseline["embedding"] == baseline["head"] == VOCABULARY * 32
    assert make(name, options, tied=False).count() == baseline | {
        "non_embedding": baseline["non_embedding"] + more,
        "total": baseline["total"] + more,
    }


@pytest.mark.parametrize("sources", [1, 3])
def test_the_last_queries_see_the_keys_of_their_own_time_and_of_all_before(sources):
    generator = torch.Generator().manual_seed(0)
    for times, queries in ((5, 5), (5, 3), (5, 1), (1, 1)):
        q = torch.randn(2, 3, queries, 8, generator=generator)
        k, v = (torch.randn(2, 3, times * sources, 8, generator=generator) for _ in range(2))
        found = transformer.attend(q, k, v, sources)
        for i in range(queries):
            end = (times - queries + i + 1) * sources
            shares = torch.einsum("bhd,bhsd->bhs", q[:, :, i], k[:, :, :end]).div(math.sqrt(8)).softmax(-1)
            assert torch.allclose(found[:, :, i], torch.einsum("bhs,bhsd->bhd", shares, v[:, :, :end]), atol=1e-5)


def test_the_options_of_the_shortcut_are_the_papers_unless_told_otherwise():
    assert ShortcutOptions().model_dump() == {
        "taps": "paper",
        "map": "mlp",
        "map_width": 1024,
        "map_norm": True,
        "share_map": False,
        "concat": "time",
        "mode": "replace",
        "project": "shared",
        "depth_embedding": False,
        "attention": "auto",
    }
    rest = {name: SECTIONS[name]().model_dump() for name in SECTIONS if name != "shortcut"}
    assert rest == {
        "conv": {"kernel": 7, "groups": 1},
        "late_kv": {"layer": 0},
        "value_residual": {"gate": "scalar"},
        "denseformer": {"dilation": 1, "period": 1},
        "attnres": {"variant": "full", "blocks": 8},
        "depth_attention": {"values": "mixed"},
        "moda": {"feed_forward": False},
        "hyper": {"streams": 4, "weights": "dynamic"},
    }


@pytest.mark.parametrize(
    ("taps", "layers", "expected"),
    [
        ("paper", 10, [2, 4, 6, 8]),
        ("paper", 9, [2, 4, 6]),
        ("paper", 4, [2]),
        ("paper", 3, []),
        ("all", 1, []),
        ("every:1", 4, [1, 2, 3]),
        ("every:5", 10, [5]),
        ("every:10", 10, []),
        ("every:12", 40, [12, 24, 36]),
        ("3,9,3", 10, [3, 9]),
        ("10,9", 11, [9, 10]),
        ("0", 1, [0]),
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
    with pytest.raises(UsageError, match="layer 12; the last layer reads 0 to 9"):
        tapped_layers("12,2", 10)


@pytest.mark.parametrize(
    "taps", ["", "2;4", "every:0", "every:", "first", "-1", "2,", ",2", "2,-4", "paper2", "all,2", " 2"]
)
def test_taps_of_an_unknown_form_are_refused(taps):
    with pytest.raises(ValueError, match="is none of paper"):
        ShortcutOptions(taps=taps)


def test_the_papers_probable_size():
    shape = {"layers": 10, "width": 128, "heads": 8, "context": 512, "ffn": 512}
    counts = {
        name: make(arm, options, **shape).count()["non_embedding"]
        for name, arm, options in (
            ("gpt", "gpt", {}),
            ("one", "shortcut", {}),
            ("per", "shortcut", {"project": "per_tap"}),
        )
    }
    assert counts["gpt"] == 10 * (4 * 128**2 + 2 * 128 * 512 + 2 * 128) + 128
    maps = 4 * (2 * 128 * 1024 + 128 + 128)
    assert counts["one"] - counts["gpt"] == maps
    assert counts["per"] - counts["one"] == 3 * 2 * 128**2
    assert make("shortcut_gated", {}, **shape).count()["non_embedding"] - counts["gpt"] == 182_536


def plainly(model, x, targets):
    """The baseline's loss by torch's own operations, in the model's precision."""
    f = torch.nn.functional
    x = model.embedding(x)
    for block in model.blocks:
        h = f.rms_norm(x, x.shape[-1:], block.attention_norm.weight, 1e-6)
        q, k, v = block.attention.query_key_value(h).unflatten(-1, (3, block.attention.heads, -1)).unbind(2)
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, model.freqs), rotate(k, model.freqs), v))
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
    found = loss(model(x), targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    weights = dict(model.named_parameters())
    pairs = zip(
        torch.autograd.grad(found, list(weights.values())),
        torch.autograd.grad(expected, list(weights.values())),
        strict=True,
    )
    for name, (a, b) in zip(weights, pairs, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm(), name


@pytest.mark.parametrize(("name", "options"), ARMS)
def test_states_keep_full_precision_under_autocast(name, options, monkeypatch):
    """Sublayers compute in bf16, but sums over depth are never rounded to it."""
    model = make(name, options, open_gates=True)
    kept = []
    norm = transformer.RMSNorm.fork
    # Two kinds of norms read products, not states.
    inner = {part for n, part in model.named_modules() if "map_norms." in n or n.endswith("convolution.norm")}
    note = lambda self, x: norm(self, x if self in inner else kept.append(x) or x)  # noqa: E731
    monkeypatch.setattr(transformer.RMSNorm, "fork", note)
    x = ids(1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        nats = loss(model(x), x)
    nats.backward()
    assert len(kept) >= 12
    for state in kept:
        assert state.dtype == torch.float32
        # One fp32 number in 2^16 is a bf16 number too.
        assert (state == state.bfloat16()).float().mean() < 0.1
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(("name", "options"), ARMS)
def test_autocast_is_about_as_far_from_fp32_as_the_products_of_a_cpu(name, options):
    """What a GPU computes in bf16, on a CPU: the gradients are off by rounding, and no more than ours in bf16."""
    model = make(name, options, open_gates=True)
    places = {
        "fp32": lambda: precision.products("fp32", "cpu"),
        "bf16": lambda: precision.products("bf16", "cpu"),
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    off = Counter()
    for seed in range(4):
        x, found = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(seed)), {}
        for place, context in places.items():
            model.zero_grad()
            with context():
                logits = model(x)
            loss(logits, x).backward()
            found[place] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        exact = found.pop("fp32")
        off.update({place: ((grad - exact).norm() / exact.norm()).item() for place, grad in found.items()})
    assert 0 < off["autocast"] < 2 * off["bf16"]


@pytest.mark.parametrize(("groups", "key", "size"), [(3, "width", 32), (64, "width", 32), (16, "ffn", 72)])
def test_groups_divide_what_they_have_to(groups, key, size):
    message = rf"model\.{key} {size} is not a multiple of model\.conv\.groups {groups}$"
    with pytest.raises(UsageError, match=message):
        make("conv", {"groups": groups}, ffn=72)


def test_late_kv_of_a_single_layer_has_nothing_to_read():
    with pytest.raises(UsageError, match=r"model\.late_kv\.layer names layer 1, which is not below the last layer, 1"):
        make("late_kv", {}, layers=1)


def plain_gpt(model, x, activation):
    """Logits of a whole window of ids (T,), in float64 and by loops over heads and times."""
    w = {name: weight.detach().double() for name, weight in model.named_parameters()}
    config = model.config

    def normed(h, weight=1.0):
        return h / torch.sqrt((h**2).mean(-1, keepdim=True) + 1e-6) * weight

    d = config.width // config.heads
    turns = [t * config.rope_base ** (-2 * k / d) for t in range(len(x)) for k in range(d // 2)]
    angle = torch.tensor(turns, dtype=torch.float64).view(len(x), d // 2)

    def turned(y):
        a, b = y[:, 0::2], y[:, 1::2]
        return torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1).flatten(1)

    h = w["embedding.weight"][x]
    for layer in range(config.layers):
        at = f"blocks.{layer}."
        qkv = (normed(h, w[at + "attention_norm.weight"]) @ w[at + "attention.query_key_value.weight"].T).chunk(3, -1)
        heads = []
        for head in range(config.heads):
            q, k, v = (part[:, head * d : (head + 1) * d] for part in qkv)
            q, k = turned(q), turned(k)
            if config.qk_norm:
                q, k = normed(q), normed(k)
            rows = [((k[: t + 1] @ q[t]) / d**0.5).softmax(0) @ v[: t + 1] for t in range(len(x))]
            heads.append(torch.stack(rows))
        h = h + torch.cat(heads, -1) @ w[at + "attention.out.weight"].T
        inner = normed(h, w[at + "feed_forward_norm.weight"]) @ w[at + "feed_forward.inner.weight"].T
        h = h + activation(inner) @ w[at + "feed_forward.out.weight"].T
    return normed(h, w["norm.weight"]) @ w["embedding.weight"].T


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_norms_and_activations_are_those_of_the_formula(qk_norm, activation):
    shape = {"qk_norm": qk_norm, "activation": activation}
    model = make("gpt", {}, open_gates=True, **shape).eval()
    x = ids(rows=1)[0]
    plain = {"gelu": lambda y: y * 0.5 * (1 + torch.erf(y / 2**0.5)), "relu2": lambda y: y.clamp(min=0) ** 2}
    assert apart(model(x[None])[0].double(), plain_gpt(model, x, plain[activation])) < 1e-4
