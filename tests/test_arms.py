"""Every architecture against its formula: slow, plain, in double precision, written from the papers."""

import math
import weakref

import pytest
import torch
from test_models import ids, make
from torch.nn import functional as F

from shortcut_cli.models import mixing


def normed(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x, model):
    """(B, T, H, d) turned by its time."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * model.table.to(torch.complex128)[: x.shape[1], None]).flatten(-2)


def heads(model, layer, x):
    """Queries, keys, values of a layer that reads x, already normed: (B, T, H, d) each."""
    attention = model.blocks[layer].attention
    q, k, v = (x @ attention.query_key_value.weight.T).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (attention.heads, -1)) for y in (q, k, v))
    return turned(q, model), turned(k, model), v


def look(q, k, v):
    """Causal attention of every head, by loops over time."""
    out = torch.zeros_like(q)
    for t in range(q.shape[1]):
        scores = torch.einsum("bhd,bshd->bhs", q[:, t], k[:, : t + 1]) / math.sqrt(q.shape[-1])
        out[:, t] = torch.einsum("bhs,bshd->bhd", scores.softmax(-1), v[:, : t + 1])
    return out


def attended(model, layer, x, values=None):
    """What the attention of a layer adds; values(q, k, v, x) may change what is attended to."""
    block = model.blocks[layer]
    h = normed(x, block.attention_norm.weight)
    q, k, v = heads(model, layer, h)
    v = values(q, k, v, h) if values else v
    return look(q, k, v).flatten(-2) @ block.attention.out.weight.T


def fed(model, layer, x):
    """What the feed-forward of a layer adds."""
    block = model.blocks[layer]
    h = normed(x, block.feed_forward_norm.weight)
    return F.gelu(h @ block.feed_forward.inner.weight.T) @ block.feed_forward.out.weight.T


def layer_output(model, layer, x, values=None):
    x = x + attended(model, layer, x, values)
    return x + fed(model, layer, x)


def head(model, x):
    return normed(x, model.norm.weight) @ model.head.weight.T


def gpt(model, x):
    for layer in range(len(model.blocks)):
        x = layer_output(model, layer, x)
    return x


def value_residual(model, x):
    first = []

    def values(q, k, v, h):
        if not first:
            first.append(v)
            return v
        attention = model.blocks[layer].attention
        if attention.gate is not None:
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
        return sum(share.unsqueeze(-1) * value for share, (_, value) in zip(scores.softmax(0), below, strict=True))

    for layer in range(len(model.blocks)):
        x = layer_output(model, layer, x, values)
    return x


def denseformer(model, x):
    options = model.keys.denseformer
    states = [x]
    for layer in range(len(model.blocks)):
        states.append(layer_output(model, layer, x))
        x = states[-1]
        if (layer + 1) % options.period == 0:
            read = states[:: -options.dilation][::-1]
            x = sum(a * state for a, state in zip(model.mixes[str(layer + 1)], read, strict=True))
    return x


def dense_last(model, x):
    states = [x]
    for layer in range(len(model.blocks)):
        states.append(layer_output(model, layer, states[-1]))
    return sum(a * state for a, state in zip(model.mix, states, strict=True))


def attnres(model, x):
    options, count = model.keys.attnres, 2 * len(model.blocks)

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
    x = streams[3] + look(q, k, v).flatten(-2) @ block.attention.out.weight.T
    return x + fed(model, layer, x)


def mudd(model, x):
    states, streams = [x], [x] * 4
    for layer, mix in enumerate(model.mixes):
        states.append(streamed(model, layer, streams))
        streams = routed(mix, states)
    return streams[0]


def mudd_last(model, x):
    states = [x]
    for layer in range(len(model.blocks)):
        if layer < 4:
            x = layer_output(model, layer, x)
        else:
            values, residual = routed(model.mixes[layer - 4], [states[0], states[3], x])
            x = streamed(model, layer, [residual, residual, values, residual])
        states.append(x)
    return x


def hyper(model, x):
    n = model.keys.hyper.streams
    streams = [x] * n
    for number, connection in enumerate(model.connections):
        read, carry, write = connection.read, connection.carry, connection.write
        if model.keys.hyper.weights == "dynamic":
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
    (gpt, {}),
    (value_residual, {}),
    (value_residual, {"gate": "token"}),
    (depth_attention, {}),
    (denseformer, {}),
    (denseformer, {"dilation": 2}),
    (denseformer, {"dilation": 3, "period": 2}),
    (dense_last, {}),
    (attnres, {}),
    (attnres, {"variant": "block", "blocks": 5}),
    (attnres, {"variant": "delta"}),
    (moda, {}),
    (mudd, {}),
    (mudd_last, {}),
    (hyper, {}),
    (hyper, {"weights": "static", "streams": 3}),
]


@pytest.mark.parametrize(("plain", "options"), REFERENCES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_an_architecture_is_its_formula(plain, options):
    # Sublayers large enough that every source counts.
    model = make(plain.__name__, options, open_gates=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and name.startswith("blocks."):
                parameter.mul_(8)
            elif name.endswith("outer.weight"):
                # As they are, MUDD's streams grow from 0.2 to 2,800 over the layers, and 1e-5 is what rounding costs.
                parameter.div_(8)
        if plain is hyper:
            # What its first connection reads is one state times a number, which a norm divides out again but for its
            # epsilon: at the usual size of the embedding that gradient is what remains of sums that cancel.
            model.embedding.weight.div_(10)
    x = ids()
    found = model(x)
    found.square().sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    slow = model.double()
    expected = head(slow, plain(slow, slow.embedding(x)))
    assert (found - expected).norm() < 1e-5 * expected.norm()
    expected.square().sum().backward()
    for name, parameter in slow.named_parameters():
        assert (grads[name] - parameter.grad).norm() < 1e-4 * parameter.grad.norm() + 1e-9, name


@pytest.mark.parametrize("name", ["denseformer", "dense_last", "shortcut_gated", "mudd", "mudd_last", "hyper"])
def test_the_identity_at_the_start_is_the_baseline_bit_for_bit(name):
    assert torch.equal(make("gpt", {})(ids()), make(name, {})(ids()))


def test_the_controls_of_the_shortcut():
    x = ids()
    shortcut, local, late = make("shortcut", {}), make("shortcut_local", {}), make("late_kv", {"layer": 2})
    assert local.count() == shortcut.count()
    assert local.flops(24) == shortcut.flops(24)
    assert all(torch.equal(local.state_dict()[name], weight) for name, weight in shortcut.state_dict().items())
    # Where all taps read the state below, the shortcut is the control.
    shortcut.sources = local.sources
    assert torch.equal(shortcut(x), local(x))
    assert late.count()["trunk"] == make("gpt", {}).count()["trunk"] + 32
    one = make("shortcut", {"taps": "2", "map": "identity"})
    assert torch.equal(one(x), late(x))
    gated = make("shortcut", {"taps": "all", "map": "linear", "mode": "gated"})
    assert torch.equal(gated(x), make("shortcut_gated", {})(x))


@pytest.mark.parametrize(("name", "options"), [("attnres", {}), ("attnres", {"variant": "block"}), ("mudd", {})])
def test_the_states_of_a_step_die_with_it(name, options, monkeypatch):
    """Autograd's graph leads to them; were there a way back, no collector would see the circle, and memory grow."""
    made = []
    begin = mixing._Store.__init__

    def remember(store, *arguments):
        made.append(weakref.ref(store))
        begin(store, *arguments)

    monkeypatch.setattr(mixing._Store, "__init__", remember)
    model = make(name, options, open_gates=True)
    model(ids()).square().sum().backward()
    assert [store() for store in made] == [None]
