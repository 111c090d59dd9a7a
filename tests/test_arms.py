"""Every architecture against its formula: slow and plain, in double precision, written from the papers."""

import math
import weakref

import pytest
import torch
from test_models import (
    NORMED,
    apart,
    attended,
    fed,
    head,
    heads,
    ids,
    layer_output,
    look_at,
    make,
    normed,
    read_taps,
    turned,
)
from torch.nn import functional as F

from shortcut_cli import registry
from shortcut_cli.config.schema import TrainConfig
from shortcut_cli.errors import UsageError
from shortcut_cli.kernels import depth
from shortcut_cli.models.mudd import Router
from shortcut_cli.models.options import ShortcutOptions
from shortcut_cli.models.trace import Trace
from shortcut_cli.models.transformer import History
from shortcut_cli.training import optim


def gpt(model, x):
    for layer in range(len(model.blocks)):
        x = layer_output(model, layer, x)
    return x


def conv(model, x):
    options = model.config.conv
    for layer, block in enumerate(model.blocks):
        x = x + attended(model, layer, x)
        module = block.convolution
        h = normed(x, block.convolution_norm.weight) @ module.inner.weight.T
        h = h[..., : x.shape[-1]] / (1 + (-h[..., x.shape[-1] :]).exp())
        y = torch.zeros_like(h)
        for t in range(h.shape[1]):
            for back in range(min(options.kernel, t + 1)):
                y[:, t] += h[:, t - back] * module.kernel[:, -1 - back]
        y = normed(y, module.norm.weight)
        x = x + (y / (1 + (-y).exp())) @ module.out.weight.T
        x = x + (blocks_fed(model, layer, x, options.groups) if options.groups > 1 else fed(model, layer, x))
    return x


def blocks_fed(model, layer, x, groups):
    """What a feed-forward of GELU, or of SwiGLU, adds, if its matrices are block-diagonal: written out in full."""
    block, config = model.blocks[layer], model.config
    parts = 2 if config.activation == "swiglu" else 1
    inner = [torch.block_diag(*part.chunk(groups)) for part in block.feed_forward.inner.weight.chunk(parts)]
    h = [normed(x, block.feed_forward_norm.weight) @ weight.T for weight in inner]
    h = F.silu(h[0]) * h[1] if parts == 2 else F.gelu(h[0])
    return h @ torch.block_diag(*block.feed_forward.out.weight.chunk(groups)).T


def value_residual(model, x):
    first = []

    def values(q, k, v, h):
        if not first:
            first.append(v)
            return v
        attention = model.blocks[layer].attention
        if model.config.value_residual.gate == "token":
            return v + F.relu(h @ attention.gate.weight.T).unsqueeze(-1) * first[0]
        return attention.share[0] * first[0] + attention.share[1] * v

    for layer in range(len(model.blocks)):
        x = layer_output(model, layer, x, values)
    return x


def depth_attention(model, x):
    below = []

    def values(q, k, v, h):
        below.append((k, v))
        scores = torch.stack([(q * key).sum(-1) / math.sqrt(q.shape[-1]) for key, _ in below])
        mixed = sum(share.unsqueeze(-1) * value for share, (_, value) in zip(scores.softmax(0), below, strict=True))
        if model.config.depth_attention.values == "mixed":
            below[-1] = (k, mixed)
        return mixed

    for layer in range(len(model.blocks)):
        x = layer_output(model, layer, x, values)
    return x


def denseformer(model, x):
    options = model.config.denseformer
    states = [x]
    for layer in range(len(model.blocks)):
        states.append(layer_output(model, layer, x))
        x = states[-1]
        if (layer + 1) % options.period == 0:
            read = states[:: -options.dilation][::-1]
            x = sum(a * state for a, state in zip(model.mixes[str(layer + 1)], read, strict=True))
    return x


def x0(model, x):
    first = normed(x, 1)
    for layer in range(len(model.blocks)):
        x = layer_output(model, layer, model.carry[layer] * x + model.again[layer] * first)
    return x


def dense_last(model, x):
    states = [x]
    for layer in range(len(model.blocks)):
        states.append(layer_output(model, layer, states[-1]))
    return sum(a * state for a, state in zip(model.mix, states, strict=True))


def attnres(model, x):
    options, count = model.config.attnres, 2 * len(model.blocks)

    def read(number, sources):
        keys = [normed(source, model.key_norms[number]) for source in sources]
        shares = torch.stack([key @ model.queries[number] for key in keys]).softmax(0)
        return sum(share.unsqueeze(-1) * source for share, source in zip(shares, sources, strict=True))

    def sublayer(number, h):
        return (attended, fed)[number % 2](model, number // 2, h)

    if options.variant == "delta":
        deltas = []
        for number in range(count):
            deltas.append(sublayer(number, x + read(number - 1, deltas) if deltas else x))
            x = x + deltas[-1]
        return x
    outputs = []
    for number in range(count + 1):
        if options.variant == "full":
            sources = [x, *outputs]
        else:
            groups = {}
            for place, y in enumerate(outputs):
                group = place * options.blocks // count
                groups[group] = groups.get(group, 0) + y
            sources = [x, *groups.values()]
        h = read(number, sources)
        if number == count:
            return h
        outputs.append(sublayer(number, h))
    raise AssertionError


def moda(model, x):
    below = []
    for layer, block in enumerate(model.blocks):
        q, k, v = heads(model, layer, normed(x, block.attention_norm.weight))
        out = torch.zeros_like(q)
        for t in range(q.shape[1]):
            seen = torch.cat([k[:, : t + 1], *(key[:, t : t + 1] for key, _ in below)], 1)
            read = torch.cat([v[:, : t + 1], *(value[:, t : t + 1] for _, value in below)], 1)
            scores = torch.einsum("bhd,bshd->bhs", q[:, t], seen) / math.sqrt(q.shape[-1])
            out[:, t] = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), read)
        below.append((k, v))
        x = x + out.flatten(-2) @ block.attention.out.weight.T
        if model.config.moda.feed_forward and layer + 1 < len(model.blocks):
            key_value = normed(x, block.feed_forward_norm.weight) @ block.depth_key_value.weight.T
            k, v = (y.unflatten(-1, (model.config.heads, -1)) for y in key_value.chunk(2, -1))
            below.append((turned(k, model), v))
        x = x + fed(model, layer, x)
    return x


def routed(mix, states):
    """The streams of a MUDD router."""
    x = normed(states[-1], 1)
    weights = F.gelu(x @ mix.inner.weight.T) @ mix.outer.weight.T
    weights = weights.unflatten(-1, (-1, len(states))) + mix.static  # (B, T, C, n)
    return [
        sum(weights[:, :, stream, j, None] * state for j, state in enumerate(states))
        for stream in range(weights.shape[2])
    ]


def streamed(model, layer, streams):
    block, weight = model.blocks[layer], model.blocks[layer].attention_norm.weight
    q, k, v = (heads(model, layer, normed(x, weight))[part] for part, x in enumerate(streams[:3]))
    x = streams[3] + look_at(q, [(k, v)])[0].flatten(-2) @ block.attention.out.weight.T
    return x + fed(model, layer, x)


def mudd(model, x):
    states, streams = [x], [x] * 4
    for layer, mix in enumerate(model.mixes):
        states.append(streamed(model, layer, streams))
        streams = routed(mix, states)
    return streams[0]


PLACES = {1: (0, 0), 2: (1, 1), 3: (1, 2), 5: (2, 4), 6: (2, 4), 11: (4, 8)}  # by layers: 4 / 11 and 8 / 11 of them


def mudd_last(model, x):
    def weights(mix, x):
        return (F.gelu(normed(x, 1) @ mix.inner.weight.T) @ mix.outer.weight.T + mix.static).mul(0.1).unbind(-1)

    def mixed(weights, states):
        return sum(weight[..., None] * state for weight, state in zip(weights, states, strict=True))

    early, late = PLACES[len(model.blocks)]
    states = [x]
    for layer in range(len(model.blocks) - 1):
        states.append(layer_output(model, layer, states[-1]))
    first, early, late, x = states[0], states[early], states[late], states[-1]
    shares = weights(model.before, x)
    added = mixed(shares[:3], [first, late, x]).unflatten(-1, (model.config.heads, -1))
    y = x + mixed(shares[3:], [first, late, x])
    y = layer_output(model, len(model.blocks) - 1, y, lambda _q, _k, v, _h: v + added)
    return y + mixed(weights(model.after, y), [first, early, late, x])


def tapping(options, taps, model, x, local=False):
    """A shortcut with these options, whatever the model's are; local: all taps read the state below the last layer."""
    states = [x]
    for layer in range(len(model.blocks) - 1):
        states.append(layer_output(model, layer, states[-1]))
    return read_taps(model, states[-1:] * len(states) if local else states, ShortcutOptions(**options), taps)[0]


def shortcut_gated(model, x):
    return tapping({"map": "linear", "mode": "gated"}, list(range(1, len(model.blocks))), model, x)


def shortcut_local(model, x):
    return tapping({}, [2, 4], model, x, local=True)


def shortcut_pool(model, x):
    options = model.config.shortcut
    return tapping(options.model_dump(), {"paper": [2, 4], "all": [1, 2, 3, 4, 5]}[options.taps], model, x)


def late_kv(model, x):
    layer = model.config.late_kv.layer or {2: 1, 3: 1, 5: 2, 6: 3}[len(model.blocks)]
    return tapping({"map": "identity"}, [layer], model, x)


def hyper(model, x):
    n = model.config.hyper.streams
    streams = [x] * n
    for number, connection in enumerate(model.connections):
        read, carry, write = connection.read, connection.carry, connection.write
        if model.config.hyper.weights == "dynamic":
            moved = [torch.tanh(normed(h, connection.norm) @ connection.route.weight.T) for h in streams]
            read = [read[i] + connection.scale[0] * moved[i][..., :1] for i in range(n)]
            carry = [
                [carry[i, j] + connection.scale[0] * moved[i][..., 1 + j, None] for j in range(n)] for i in range(n)
            ]
            write = [write[i] + connection.scale[1] * moved[i][..., -1:] for i in range(n)]
        else:
            carry = [[carry[i, j] for j in range(n)] for i in range(n)]
        y = (attended, fed)[number % 2](model, number // 2, sum(a * h for a, h in zip(read, streams, strict=True)))
        streams = [sum(carry[i][j] * streams[i] for i in range(n)) + write[j] * y for j in range(n)]
    return sum(streams) / n


REFERENCES = [
    (gpt, {}, {}),
    (gpt, {}, {"activation": "swiglu", "tied": False, "heads": 2, "rope_base": 30.0}),
    (gpt, {}, {"layers": 1, "rope_base": 1e6}),
    (conv, {}, {}),
    (conv, {"kernel": 3, "groups": 4}, {"rope_base": 30.0}),
    (conv, {"kernel": 16, "groups": 2}, {"layers": 2, "activation": "swiglu"}),
    (shortcut_gated, {}, {"activation": "swiglu"}),
    (shortcut_gated, {}, {"layers": 2}),
    (shortcut_local, {}, {"rope_base": 30.0}),
    (shortcut_pool, {}, {"rope_base": 30.0}),
    (shortcut_pool, {"taps": "all", "concat": "feature", "map": "linear"}, {}),
    (late_kv, {}, {}),
    (late_kv, {}, {"layers": 5, "rope_base": 30.0}),
    (late_kv, {}, {"layers": 2}),
    (late_kv, {"layer": 5}, {"tied": False}),
    (value_residual, {}, {}),
    (value_residual, {"gate": "token"}, {"heads": 2, "activation": "swiglu"}),
    (value_residual, {}, {"layers": 1}),
    (depth_attention, {}, {}),
    (depth_attention, {}, {"layers": 2, "heads": 2, "rope_base": 30.0}),
    (depth_attention, {"values": "raw"}, {}),
    (denseformer, {}, {}),
    (denseformer, {"dilation": 2}, {}),
    (denseformer, {"dilation": 3, "period": 2}, {"activation": "swiglu"}),
    (denseformer, {"dilation": 2, "period": 3}, {"layers": 5}),
    (denseformer, {"period": 4}, {"layers": 3}),
    (x0, {}, {}),
    (x0, {}, {"layers": 1, "tied": False}),
    (dense_last, {}, {}),
    (dense_last, {}, {"layers": 1, "tied": False}),
    (attnres, {}, {}),
    (attnres, {}, {"layers": 1}),
    (attnres, {"variant": "block", "blocks": 5}, {"activation": "swiglu"}),
    (attnres, {"variant": "block", "blocks": 1}, {"layers": 3}),
    (attnres, {"variant": "block"}, {"layers": 3}),
    (attnres, {"variant": "delta"}, {}),
    (attnres, {"variant": "delta"}, {"layers": 2}),
    (moda, {}, {}),
    (moda, {}, {"layers": 3, "heads": 2, "rope_base": 30.0}),
    (moda, {"feed_forward": True}, {}),
    (moda, {"feed_forward": True}, {"layers": 3, "heads": 2, "rope_base": 30.0, "activation": "swiglu"}),
    (mudd, {}, {}),
    (mudd, {}, {"layers": 1}),
    (mudd, {}, {"layers": 3, "activation": "swiglu", "rope_base": 30.0}),
    (mudd_last, {}, {}),
    (mudd_last, {}, {"layers": 5, "rope_base": 30.0}),
    (mudd_last, {}, {"layers": 11}),
    (mudd_last, {}, {"layers": 3}),
    (mudd_last, {}, {"layers": 2}),
    (mudd_last, {}, {"layers": 1}),
    (hyper, {}, {}),
    (hyper, {"weights": "static", "streams": 3}, {}),
    (hyper, {"streams": 2}, {"layers": 2, "activation": "swiglu"}),
    (hyper, {"streams": 5}, {"layers": 2}),
]


def test_every_architecture_has_a_formula():
    elsewhere = {"shortcut"}  # in test_models.py, with all its options
    assert {plain.__name__ for plain, _, _ in REFERENCES} | elsewhere == registry.MODELS.keys()


@pytest.mark.parametrize(("plain", "options", "shape"), REFERENCES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_an_architecture_is_its_formula(plain, options, shape):
    model = make(plain.__name__, options, open_gates=True, **shape)
    if plain is hyper:
        with torch.no_grad():
            # Its first connection reads one state times a number, which a norm cancels except for its epsilon. At the
            # embedding's usual size, the gradient of that number is what remains of sums that cancel.
            model.embedding.weight.div_(10)
            for name, weight in model.named_parameters():  # nor may what is written be so large that a norm cancels it
                if name.endswith(".out.weight"):
                    weight.div_(math.sqrt(model.options.streams))
    x = ids(length=11)
    found = model(x)
    found.square().sum().backward()
    with torch.inference_mode():
        sampled = model(x)  # by kernels that keep nothing for gradients
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    slow = model.double()
    expected = head(slow, plain(slow, slow.embedding.weight[x]))
    assert apart(found, expected) < 1e-5
    assert apart(sampled, expected) < 1e-5
    expected.square().sum().backward()
    for name, parameter in slow.named_parameters():
        assert (grads[name] - parameter.grad).norm() < 1e-4 * parameter.grad.norm() + 1e-9, name


@pytest.mark.parametrize("name", ["x0", "denseformer", "dense_last", "shortcut_gated", "mudd"])
def test_the_identity_at_the_start_is_the_baseline_bit_for_bit(name):
    assert torch.equal(make("gpt", {})(ids()), make(name, {})(ids()))


def test_a_row_that_is_left_keeps_the_tokens_that_its_convolutions_read():
    model, x = make("conv", {"kernel": 5}, open_gates=True).eval(), ids(3)
    with torch.inference_mode():
        cache = model.new_cache(3, 24)
        model(x[:, :7], cache)
        cache.keep([0, 2])
        found = [model(x[[0, 2], 7:8], cache)]
        cache.keep([1])
        found.append(model(x[2:, 8:12], cache))
        expected = model(x)
    assert apart(found[0], expected[[0, 2], 7:8]) < 1e-5
    assert apart(found[1], expected[2:, 8:12]) < 1e-5


def stripped(model):
    """A baseline with the weights that a model shares with it."""
    plain = make("gpt", {}, layers=len(model.blocks))
    plain.load_state_dict({name: weight for name, weight in model.state_dict().items() if name in plain.state_dict()})
    return plain


@pytest.mark.parametrize("weights", ["static", "dynamic"])
@pytest.mark.parametrize("streams", [1, 2, 3, 4, 5, 16])
def test_any_number_of_streams_starts_as_a_baseline_that_writes_more(streams, weights):
    """Bit for bit with two or four streams; with others the mean rounds once more."""
    model = make("hyper", {"streams": streams, "weights": weights})
    wanted, found = stripped(model)(ids()), model(ids())
    assert torch.equal(found, wanted) if streams in (1, 2, 4) else apart(found, wanted) < 1e-6


def test_the_dynamic_weights_of_streams_decay_and_the_static_ones_do_not():
    model = make("hyper", {})
    config = TrainConfig(steps=1, batch_size=1, lr=1.0, router_lr=0.5)
    optimizer = optim.adamw(model, config, model.routers(), config.router_lr, decays=model.decays())
    optim.set_rate(optimizer, 1.0)
    named = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for name in (named[parameter] for parameter in group["params"]):
            if name.startswith("connections."):
                assert group["lr"] == 0.5
                assert (group["weight_decay"] > 0) is name.endswith("route.weight"), name


def test_half_of_a_late_state_is_taken_off_before_the_head():
    model = make("mudd_last", {})
    plain, x = stripped(model), ids()
    states = [plain.embedding(x)]
    for block in plain.blocks:
        states.append(block(states[-1], plain.freqs, None))
    expected = plain.head(plain.norm(states[6] - states[4] / 2))
    assert apart(model(x), expected) < 1e-6


def test_the_controls_of_the_shortcut():
    x = ids()
    shortcut, local, late = make("shortcut", {}), make("shortcut_local", {}), make("late_kv", {"layer": 2})
    assert local.count() == shortcut.count()
    assert local.flops(24) == shortcut.flops(24)
    assert all(torch.equal(local.state_dict()[name], weight) for name, weight in shortcut.state_dict().items())
    # If all its taps read the state below, the shortcut is the control.
    shortcut.sources = local.sources
    assert torch.equal(shortcut(x), local(x))
    assert late.count()["non_embedding"] == make("gpt", {}).count()["non_embedding"] + 32
    one = make("shortcut", {"taps": "2", "map": "identity"})
    assert torch.equal(one(x), late(x))
    gated = make("shortcut", {"taps": "all", "map": "linear", "mode": "gated"})
    assert torch.equal(gated(x), make("shortcut_gated", {})(x))


def test_a_pooling_query_is_the_same_for_all_tokens_at_one_time():
    """Of two last layers that differ in nothing but their state, both attend alike; those of `shortcut` do not."""
    for name, alike in (("shortcut_pool", True), ("shortcut", False)):
        model = make(name, {}, open_gates=True, **NORMED)
        generator = torch.Generator().manual_seed(0)
        first, second, *tapped = (torch.randn(2, 9, 32, generator=generator) for _ in range(4))
        freqs = model.freqs[:9]
        found = []
        for x in (first, second):
            trace = Trace()
            trace.begin(model.reads(), freqs)
            model.blocks[-1](x, tapped, freqs, None, trace)
            found.append(trace.weights["layer 6"])
        assert torch.equal(*found) is alike


@pytest.mark.parametrize("qk_norm", [False, True])
def test_queries_and_keys_that_an_arm_adds_are_normed_as_the_others_are(qk_norm):
    pool = make("shortcut_pool", {}, open_gates=True, qk_norm=qk_norm)
    before = pool(ids())
    with torch.no_grad():
        pool.blocks[-1].attention.pool.mul_(3)
    assert (apart(pool(ids()), before) < 1e-4) is qk_norm
    moda = make("moda", {"feed_forward": True}, open_gates=True, qk_norm=qk_norm)
    history = History()
    moda.blocks[0](moda.embedding(ids()), moda.freqs, None, history)
    _, key = history.keys
    assert torch.allclose(key.square().mean(-1), torch.ones(()), atol=1e-3) is qk_norm


@pytest.mark.parametrize("mode", ["add", "gated"])
def test_a_pooling_query_has_no_keys_of_its_own_layer(mode):
    with pytest.raises(UsageError, match=rf"model\.shortcut\.mode '{mode}'") as refused:
        make("shortcut_pool", {"mode": mode})
    assert refused.value.hint == 'set model.shortcut.mode = "replace"'


@pytest.mark.parametrize(("name", "options"), [("attnres", {}), ("attnres", {"variant": "block"}), ("mudd", {})])
def test_the_states_of_a_step_are_freed_with_it(name, options, monkeypatch):
    """Autograd's graph refers to them. If they referred back, no collector would see the cycle; memory would grow."""
    made = []
    begin = depth._Store.__init__

    def remember(store, *arguments):
        made.append(weakref.ref(store))
        begin(store, *arguments)

    monkeypatch.setattr(depth._Store, "__init__", remember)
    model = make(name, options, open_gates=True)
    model(ids()).square().sum().backward()
    assert [store() for store in made] == [None]


def test_a_router_reads_small_states_with_the_epsilon_of_every_norm():
    mix = Router(8, 2, 3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in mix.parameters():
            weight.normal_(0, 0.5, generator=generator)
    x = torch.randn(2, 3, 8, generator=generator) / 1000  # a mean square of 1e-6
    h = normed(x, 1) @ mix.inner.weight.T
    wanted = (F.gelu(h) @ mix.outer.weight.T).unflatten(-1, (2, 3)) + mix.static
    assert apart(mix(x), wanted) < 1e-5
