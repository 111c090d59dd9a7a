"""Cross-layer reads, seen and changed in every architecture: against plain formulas in double precision."""

import itertools
import math
from copy import deepcopy

import pytest
import torch
from test_models import ARMS, apart, fed, gelu, head, ids, layer_output, look_at, make, normed, turned
from torch.nn import functional as F

from shortcut_cli.models.trace import Change, Trace

KINDS = ("masked", "shuffled", "mean_ablated")
SHAPE = {"layers": 3, "width": 16, "heads": 2, "ffn": 24}
TIMES = 6


class Plain:
    """What readers find, by the definition of each change; x is (B, T, ...) here."""

    def __init__(self, model, kind=None, source=None, reader=None):
        self.model, self.kind, self.source, self.reader = model, kind, source, reader
        self.weights = {}  # by reader: (B, H, M, T)

    def hit(self, reader, name):
        if self.kind is None or self.reader not in (None, reader):
            return False
        return name == self.source if self.source else not name.startswith("own ")

    def new(self, x):
        if self.kind == "masked":
            return x * 0
        if self.kind == "shuffled":
            return torch.stack([x[row - 1] for row in range(len(x))])
        total = sum(x[row, t] for row in range(x.shape[0]) for t in range(x.shape[1]))
        return (total / x.shape[0] / x.shape[1]).expand(x.shape)

    def keep(self, reader, weights):
        """weights: for each source (B, T, H)."""
        assert reader not in self.weights
        self.weights[reader] = torch.stack(weights, 2).permute(0, 3, 2, 1)

    def summed(self, reader, terms):
        """Terms (name, weight, state): a weight is (), (B, T), or (B, T, H) of a state by head."""
        total, kept = 0, []
        for name, weight, state in terms:
            by_head = weight if weight.dim() == 3 else weight.expand(state.shape[:2]).unsqueeze(-1)  # (B, T, H or 1)
            factor = by_head if by_head.dim() == state.dim() else by_head.unsqueeze(-1)
            total = total + factor * (self.new(state) if self.hit(reader, name) else state)
            kept.append(by_head)
        self.keep(reader, kept)
        return total

    def keys(self, reader, sources):
        """Sources (name, keys before their rotation, values): the same, None if masked."""
        found = []
        for name, k, v in sources:
            if not self.hit(reader, name):
                found.append((turned(k, self.model), v))
            else:
                found.append(None if self.kind == "masked" else (turned(self.new(k), self.model), self.new(v)))
        return found

    def shared(self, reader, shares, found):
        """Keep shares (B, T, H) of those that are found; the others have none."""
        shares = iter(shares)
        template = torch.zeros(*found_shape(found, self.model), dtype=torch.float64)
        self.keep(reader, [template if one is None else next(shares) for one in found])


def found_shape(found, model):
    one = next((pair for pair in found if pair is not None), None)
    return (3, TIMES, model.config.heads) if one is None else one[0].shape[:3]


def raw(model, layer, x):
    """Queries, turned, and keys, not turned, and values of a layer that reads x, already normed: (B, T, H, d) each."""
    qkv = (x @ model.blocks[layer].attention.query_key_value.weight.T).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (model.config.heads, -1)) for y in qkv)
    return turned(q, model), k, v


def mixed_layer(model, layer, x, change_values):
    """A layer whose values are change_values(q, raw k, v, normed x)."""
    block = model.blocks[layer]
    h = normed(x, block.attention_norm.weight)
    q, k, v = raw(model, layer, h)
    v = change_values(q, k, v, h)
    x = x + look_at(q, [(turned(k, model), v)])[0].flatten(-2) @ block.attention.out.weight.T
    return x + fed(model, layer, x)


def layers_of(model):
    return range(len(model.blocks))


def name_of(layer):
    return "embedding" if layer == 0 else f"layer {layer}"


def value_residual(model, x, plain):
    first = []

    def values(q, k, v, h):
        if not first:
            first.append(v)
            return v
        attention = model.blocks[layer].attention
        if model.config.value_residual.gate == "token":
            weights = F.relu(h @ attention.gate.weight.T), torch.ones(*v.shape[:3], dtype=v.dtype)
        else:
            weights = attention.share
        return plain.summed(f"layer {layer + 1}", [("layer 1", weights[0], first[0]), ("own values", weights[1], v)])

    for layer in layers_of(model):
        x = mixed_layer(model, layer, x, values)
    return x


def depth_attention(model, x, plain):
    below = []

    def values(q, k, v, h):
        if layer == 0:
            below.append((k, v))
            return v
        names = [*(f"layer {n + 1}" for n in range(layer)), "own values"]
        reader = f"layer {layer + 1}"
        below.append((k, v))
        found = plain.keys(reader, [(name, *pair) for name, pair in zip(names, below, strict=True)])
        there = [pair for pair in found if pair is not None]
        parts = [((q * key).sum(-1) / math.sqrt(q.shape[-1])).exp() for key, _ in there]
        shares = [part / sum(parts) for part in parts]
        plain.shared(reader, shares, found)
        mixed = sum(share.unsqueeze(-1) * value for share, (_, value) in zip(shares, there, strict=True))
        if model.config.depth_attention.values == "mixed":
            below[-1] = (k, mixed)
        return mixed

    for layer in layers_of(model):
        x = mixed_layer(model, layer, x, values)
    return x


def moda(model, x, plain):
    below = []
    for layer, block in enumerate(model.blocks):
        q, k, v = raw(model, layer, normed(x, block.attention_norm.weight))
        reader = f"layer {layer + 1}"
        sources = [("own keys", k, v), *below]
        found = plain.keys(reader, sources) if layer else [(turned(k, model), v)]
        out, shares = torch.zeros_like(q), torch.zeros(*q.shape[:3], len(found), dtype=q.dtype)
        for t in range(q.shape[1]):
            parts, read = [], []
            for m, pair in enumerate(found):
                for j in () if pair is None else range(t + 1) if m == 0 else (t,):
                    score = torch.einsum("bhd,bhd->bh", q[:, t], pair[0][:, j]) / math.sqrt(q.shape[-1])
                    parts.append((m, score.exp()))
                    read.append(pair[1][:, j])
            whole = sum(part for _, part in parts)
            for (m, part), value in zip(parts, read, strict=True):
                shares[:, t, :, m] += part / whole
                out[:, t] += (part / whole).unsqueeze(-1) * value
        if layer:
            plain.keep(reader, list(shares.unbind(-1)))
        below.append((f"layer {layer + 1}", k, v))
        x = x + out.flatten(-2) @ block.attention.out.weight.T
        if model.config.moda.feed_forward and layer + 1 < len(model.blocks):
            key_value = normed(x, block.feed_forward_norm.weight) @ block.depth_key_value.weight.T
            k, v = (y.unflatten(-1, (model.config.heads, -1)) for y in key_value.chunk(2, -1))
            below.append((f"layer {layer + 1} feed-forward", k, v))
        x = x + fed(model, layer, x)
    return x


def x0(model, x, plain):
    first = normed(x, 1)
    for layer in layers_of(model):
        terms = [("own state", model.carry[layer], x), ("embedding", model.again[layer], first)]
        x = layer_output(model, layer, plain.summed(f"layer {layer + 1}", terms))
    return x


def denseformer(model, x, plain):
    options, states = model.config.denseformer, [x]
    for layer in range(1, len(model.blocks) + 1):
        states.append(layer_output(model, layer - 1, x))
        x = states[-1]
        if layer % options.period == 0:
            read = list(range(len(states)))[:: -options.dilation][::-1]
            names = [*map(name_of, read[:-1]), "own state"]
            terms = zip(names, model.mixes[str(layer)], [states[n] for n in read], strict=True)
            x = plain.summed("head" if layer == len(model.blocks) else f"layer {layer + 1}", terms)
    return x


def dense_last(model, x, plain):
    states = [x]
    for layer in layers_of(model):
        states.append(layer_output(model, layer, states[-1]))
    names = [*map(name_of, range(len(states) - 1)), "own state"]
    return plain.summed("head", zip(names, model.mix, states, strict=True))


def parts_of(model):
    """Name of each sublayer, and a function that gives what it adds to a state."""
    found = []
    for layer in layers_of(model):
        for kind, part in (("attention", 0), ("feed-forward", 1)):

            def adds(h, layer=layer, part=part):
                block = model.blocks[layer]
                if part:
                    return fed(model, layer, h)
                q, k, v = raw(model, layer, normed(h, block.attention_norm.weight))
                return look_at(q, [(turned(k, model), v)])[0].flatten(-2) @ block.attention.out.weight.T

            found.append((f"layer {layer + 1} {kind}", adds))
    return found


def attnres(model, x, plain):
    options, parts = model.config.attnres, parts_of(model)

    def read(number, reader, sources):
        found = [None if plain.hit(reader, name) and plain.kind == "masked" else state for name, state in sources]
        for m, (name, state) in enumerate(sources):
            if found[m] is not None and plain.hit(reader, name):
                found[m] = plain.new(state)
        there = [state for state in found if state is not None]
        tops = [(normed(state, model.key_norms[number]) @ model.queries[number]).exp() for state in there]
        shares = iter([top / sum(tops) for top in tops])
        kept = [torch.zeros(x.shape[:2], dtype=x.dtype) if state is None else next(shares) for state in found]
        plain.keep(reader, [share.unsqueeze(-1) for share in kept])
        pairs = zip(kept, found, strict=True)
        return sum((share.unsqueeze(-1) * state for share, state in pairs if state is not None), torch.zeros_like(x))

    added = []
    if options.variant == "delta":
        for number, (reader, adds) in enumerate(parts):
            added.append((reader, adds(x + read(number - 1, reader, added) if added else x)))
            x = x + added[-1][1]
        return x
    for number, (reader, adds) in enumerate([*parts, ("head", None)]):
        sources = added
        if options.variant == "block":
            groups = {}
            for place, (_, y) in enumerate(added):
                name = f"group {place * options.blocks // len(parts) + 1}"
                groups[name] = groups.get(name, 0) + y
            sources = list(groups.items())
        h = read(number, reader, [("embedding", x), *sources]) if number else x
        if adds is None:
            return h
        added.append((reader, adds(h)))
    raise AssertionError


def mudd(model, x, plain):
    states, streams = [x], [x] * 4
    for layer, (block, mix) in enumerate(zip(model.blocks, model.mixes, strict=True)):
        weight = block.attention_norm.weight
        q, k, v = (raw(model, layer, normed(y, weight))[part] for part, y in enumerate(streams[:3]))
        y = streams[3] + look_at(q, [(turned(k, model), v)])[0].flatten(-2) @ block.attention.out.weight.T
        states.append(y + fed(model, layer, y))
        weights = F.gelu(normed(states[-1], 1) @ mix.inner.weight.T) @ mix.outer.weight.T
        weights = weights.unflatten(-1, (-1, len(states))) + mix.static  # (B, T, C, n)
        last = layer + 1 == len(model.blocks)
        readers = [f"layer {layer + 2} {stream}" for stream in ("queries", "keys", "values", "residual")]
        names = [*map(name_of, range(layer + 1)), "own state"]
        streams = [
            plain.summed(reader, [(name, weights[:, :, c, j], states[j]) for j, name in enumerate(names)])
            for c, reader in enumerate(["head"] if last else readers)
        ]
    return streams[0]


def mudd_last(model, x, plain):
    """Of eleven layers, as in the record: 4 and 8; of three or four, the later one is the state below the last."""
    count = len(model.blocks)
    early, late = {11: (4, 8), 4: (1, 3), 3: (1, 2)}[count]

    def weights(mix, x):
        return (F.gelu(normed(x, 1) @ mix.inner.weight.T) @ mix.outer.weight.T + mix.static).mul(0.1).unbind(-1)

    states = [x]
    for layer in range(count - 1):
        states.append(layer_output(model, layer, states[-1]))
    first, h_early, h_late, x = states[0], states[early], states[late], states[-1]
    found = weights(model.before, x)
    names = ["embedding", "own state" if late == count - 1 else name_of(late), "own state"]
    added = plain.summed(f"layer {count} values", zip(names, found[:3], [first, h_late, x], strict=True))
    y = x + plain.summed(f"layer {count} residual", zip(names, found[3:], [first, h_late, x], strict=True))
    added = added.unflatten(-1, (model.config.heads, -1))
    y = mixed_layer(model, count - 1, y, lambda _q, _k, v, _h: v + added)
    names = ["embedding", name_of(early), name_of(late), name_of(count - 1)]
    return y + plain.summed("head", zip(names, weights(model.after, y), [first, h_early, h_late, x], strict=True))


def hyper(model, x, plain):
    """Every stream holds how much of what was written is in it, beside its own sum, which is never changed."""
    n, dynamic = model.config.hyper.streams, model.config.hyper.weights == "dynamic"
    one = torch.ones(x.shape[:2], dtype=x.dtype)
    streams, holds, written = [x] * n, [{"embedding": one} for _ in range(n)], {"embedding": x}

    def read(reader, shares):
        total = {name: sum(a * hold[name] for a, hold in zip(shares, holds, strict=True)) for name in written}
        if len(written) == 1:
            return total["embedding"].unsqueeze(-1) * x
        return plain.summed(reader, [(name, share, written[name]) for name, share in total.items()])

    for (reader, adds), connection in zip(parts_of(model), model.connections, strict=True):
        a, r, b = ([connection.read[i] * one for i in range(n)], connection.carry, connection.write)
        moved = torch.zeros(n, *x.shape[:2], n + 2, dtype=x.dtype)
        scale = (0, 0)
        if dynamic:
            scale = connection.scale
            moved = [torch.tanh(normed(h, connection.norm) @ connection.route.weight.T) for h in streams]
        a = [a[i] + scale[0] * moved[i][..., 0] for i in range(n)]
        r = [[r[i, j] + scale[0] * moved[i][..., 1 + j] for j in range(n)] for i in range(n)]
        b = [b[i] * one + scale[1] * moved[i][..., -1] for i in range(n)]
        y = adds(read(reader, a))
        streams = [sum(r[i][j][..., None] * streams[i] for i in range(n)) + b[j][..., None] * y for j in range(n)]
        holds = [{m: sum(r[i][j] * holds[i][m] for i in range(n)) for m in written} | {reader: b[j]} for j in range(n)]
        written[reader] = y
    return read("head", [one / n] * n)


def shortcut(model, x, plain):
    return tapped(model, x, plain, model.options, [1, 2])


def shortcut_pool(model, x, plain):
    return tapped(model, x, plain, model.config.shortcut, [1, 2])


def shortcut_local(model, x, plain):
    return tapped(model, x, plain, model.options, [1, 2], names=["map of layer 1", "map of layer 2"], reads=[2, 2])


def shortcut_gated(model, x, plain):
    return tapped(model, x, plain, model.options, [1, 2])


def late_kv(model, x, plain):
    return tapped(model, x, plain, model.options, [1])


def tapped(model, x, plain, options, taps, names=None, reads=None):
    states = [x]
    for layer in range(len(model.blocks) - 1):
        states.append(layer_output(model, layer, states[-1]))
    block, width = model.blocks[-1], model.config.heads
    attention = block.attention
    features = []
    for m, layer in enumerate(reads or taps):
        feature = normed(states[layer], attention.features.norms[m].weight)
        if options.map == "mlp":
            first, _, second = attention.features.maps[m]
            feature = gelu(feature @ first.weight.T) @ second.weight.T
        elif options.map == "linear":
            feature = feature @ attention.features.maps[m].weight.T
        if options.map != "identity":
            feature = normed(feature, attention.features.map_norms[m].weight)
        features.append(feature)
    names = names or [name_of(layer) for layer in taps]
    if options.concat == "feature":
        names, features = [" + ".join(names)], [torch.cat(features, -1)]
    pairs = [(feature @ attention.key_value[0].weight.T).chunk(2, -1) for feature in features]
    sources = [(name, *(y.unflatten(-1, (width, -1)) for y in pair)) for name, pair in zip(names, pairs, strict=True)]
    h = normed(states[-1], block.attention_norm.weight) if hasattr(block, "attention_norm") else states[-1]
    own = None
    if hasattr(attention, "pool"):
        q = turned(attention.pool.expand(*h.shape[:2], -1, -1), model)
    elif options.mode == "replace":
        q = turned((h @ attention.query.weight.T).unflatten(-1, (width, -1)), model)
    else:
        q, *own = raw(model, -1, h)
    if options.mode == "add":
        sources.insert(0, ("own keys", *own))
    found = plain.keys(f"layer {len(model.blocks)}", sources)
    there = [pair for pair in found if pair is not None]
    y, shares = look_at(q, there) if there else (torch.zeros_like(q), None)
    plain.shared(
        f"layer {len(model.blocks)}", [share.transpose(1, 2) for share in shares.unbind(2)] if there else [], found
    )
    if options.mode == "gated":
        y = look_at(q, [(turned(own[0], model), own[1])])[0] + attention.gate[:, None] * y
    x = states[-1] + y.flatten(-2) @ attention.out.weight.T
    return x + fed(model, -1, x)


CASES = [
    (shortcut, {"taps": "1,2"}, {}),
    (shortcut, {"taps": "1,2", "mode": "add"}, {}),
    (shortcut, {"taps": "1,2", "mode": "gated", "map": "linear"}, {}),
    (shortcut, {"taps": "1,2", "concat": "feature"}, {}),
    (shortcut_gated, {}, {}),
    (shortcut_local, {"taps": "1,2"}, {}),
    (shortcut_pool, {"taps": "1,2"}, {}),
    (late_kv, {"layer": 1}, {}),
    (value_residual, {}, {}),
    (value_residual, {"gate": "token"}, {}),
    (x0, {}, {}),
    (denseformer, {}, {}),
    (denseformer, {"dilation": 2, "period": 2}, {"layers": 4}),
    (dense_last, {}, {}),
    (attnres, {}, {}),
    (attnres, {"variant": "block", "blocks": 4}, {}),
    (attnres, {"variant": "delta"}, {}),
    (mudd, {}, {}),
    (mudd_last, {}, {}),
    (mudd_last, {}, {"layers": 11}),
    (depth_attention, {}, {}),
    (depth_attention, {"values": "raw"}, {}),
    (moda, {}, {}),
    (moda, {"feed_forward": True}, {}),
    (hyper, {}, {}),
    (hyper, {"weights": "static", "streams": 2}, {}),
]


def model_of(plain_model, options, shape):
    name = "shortcut" if plain_model is shortcut else plain_model.__name__
    return make(name, options, open_gates=True, **(SHAPE | shape)).eval()


def changes_of(reads):
    """Every kind: of all sources, of each everywhere, and of one in each reader."""
    names = {name: None for sources in reads.values() for name in sources}
    places = [(None, None), *((name, None) for name in names)]
    places += [(sources[number % len(sources)], reader) for number, (reader, sources) in enumerate(reads.items())]
    return list(itertools.product(KINDS, dict.fromkeys(places)))


def test_every_architecture_that_reads_across_layers_has_a_formula_here():
    reading = {name for name, options in ARMS if make(name, options).reads()}
    assert {plain_model.__name__ for plain_model, _, _ in CASES} == reading
    assert not make("gpt", {}).reads()
    assert not make("conv", {}).reads()


@pytest.mark.parametrize(("plain_model", "options", "shape"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
class TestReads:
    def test_weights_and_changes_are_those_of_the_formula(self, plain_model, options, shape):
        model = model_of(plain_model, options, shape)
        slow, x = deepcopy(model).double(), ids(rows=3, length=TIMES)
        reads = model.reads()
        with torch.no_grad():
            embedded = slow.embedding.weight[x]
            whole = head(slow, plain_model(slow, embedded, Plain(slow)))
            for kind, (source, reader) in [(None, (None, None)), *changes_of(reads)]:
                plain = Plain(slow, kind, source, reader)
                expected = head(slow, plain_model(slow, embedded, plain))
                trace = Trace(kind and Change(kind, source, reader))
                found = model(x, trace=trace)
                here = (kind, source, reader)
                if kind is None:
                    assert apart(found, expected) < 1e-5
                else:  # what changes is right, not only what stays
                    assert ((found - whole) - (expected - whole)).norm() < 2e-5 * whole.norm(), here
                    assert (expected - whole).norm() > 1e-4 * whole.norm(), here
                assert trace.weights.keys() == plain.weights.keys() == reads.keys()
                for name, weights in trace.weights.items():
                    assert weights.dtype == torch.float32
                    assert torch.allclose(weights.double(), plain.weights[name], atol=2e-5, rtol=2e-5), (here, name)

    def test_later_tokens_and_their_changes_do_not_reach_back(self, plain_model, options, shape):
        """A mean over all tokens does, as it must."""
        model, x = model_of(plain_model, options, shape), ids(rows=3, length=TIMES)
        other = x.clone()
        other[:, 4] = (x[:, 4] + 1) % 37
        with torch.no_grad():
            for kind in ("masked", "shuffled"):
                a, b = (model(y, trace=Trace(Change(kind))) for y in (x, other))
                assert torch.equal(a[:, :4], b[:, :4])

    def test_the_last_state_is_what_the_head_reads(self, plain_model, options, shape):
        model, x = model_of(plain_model, options, shape), ids(rows=3, length=TIMES)
        trace = Trace(keep_states=True)
        with torch.no_grad():
            logits = model(x, trace=trace)
            assert torch.equal(model.head(model.norm(trace.states[-1])), logits)
            assert torch.equal(trace.states[0], model.embedding(x)) is (
                plain_model not in (x0, hyper)
            )  # which weigh it first
        assert len(trace.states) == model.config.layers + 1


@pytest.mark.parametrize(("name", "options"), ARMS)
def test_a_trace_that_changes_nothing_leaves_results_and_gradients(name, options):
    x = ids(rows=3, length=TIMES)
    found = []
    for trace in (None, Trace(keep_states=True)):
        model = make(name, options, open_gates=True)
        logits = model(x, trace=trace)
        logits.square().sum().backward()
        found.append((logits.detach(), *(parameter.grad for parameter in model.parameters())))
    for with_trace, without in zip(*found, strict=True):
        assert apart(with_trace, without) < 1e-4


def test_a_read_that_does_not_exist_can_not_be_changed():
    with pytest.raises(AssertionError, match="no read of layer 9"):
        make("shortcut", {})(ids(), trace=Trace(Change("masked", "layer 9")))
