"""Kernels: each equals its plain version, in value and gradient, and runs only where it can."""

import inspect
import itertools
import math
from collections import Counter

import pytest
import torch
from test_models import apart
from torch.nn import functional as F

from shortcut_cli.kernels import attention, bf16, cpu, depth, rope
from shortcut_cli.kernels.attention import (
    attend_sources,
    attend_with_depth,
    distances,
    plain_attend_sources,
    plain_attend_with_depth,
)
from shortcut_cli.kernels.cpu import FEW_ROWS, LARGE_MATRIX, fork_norm, linear
from shortcut_cli.kernels.depth import States, fork_read, fork_scores, weighted_sum
from shortcut_cli.kernels.rope import rope_freqs
from shortcut_cli.models.transformer import RMSNorm

MODULES = (attention, bf16, cpu, depth, rope)
FREQS = rope_freqs(5, 8, 100.0)


def drawing(seed=0, **options):
    """A function that draws leaf tensors of normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, **options).requires_grad_()


def depth_inputs(draw):
    q, k, v, *below = (draw(2, 3, 5, 8) for _ in range(7))
    return q, k, v, below[:2], below[2:]


# kernel -> its arguments in some cases, from a function that draws tensors
INPUTS = {
    "fork_norm": [lambda draw: (draw(2, 5, 8), draw(8))],
    "unit_norm": [lambda draw: (draw(2, 5, 8),), lambda draw: (draw(2, 3, 5, 8).transpose(1, 2),)],
    "rotate": [
        lambda draw: (draw(2, 5, 8), FREQS),
        lambda draw: (draw(2, 5, 2, 3, 8), FREQS),
        lambda draw: (draw(2, 5, 8, 3).mT, FREQS),
    ],
    "qkv_heads": [lambda draw: (draw(2, 5, 72), FREQS, 3)],
    "weighted_sum": [
        lambda draw: (draw(3), [draw(2, 5, 8) for _ in range(3)]),
        lambda draw: (draw(3, 2, 5), [draw(2, 5, 8) for _ in range(3)]),
        lambda draw: (draw(3, 2, 5, 1), [draw(2, 5, 8) for _ in range(3)]),
    ],
    "fork_scores": [lambda draw: (draw(2, 5, 8), draw(4, 8)), lambda draw: (draw(2, 5, 3, 8), draw(4, 8))],
    "fork_read": [lambda draw: (draw(2, 5, 3, 8), draw(2, 5, 3))],
    "product": [
        lambda draw: (draw(2, 5, 8), draw(4, 8), False),
        lambda draw: (draw(2, 8, 5).mT, draw(4, 8), True),
    ],
    "attend_sources": [lambda draw: (draw(2, 3, 5, 8), draw(2, 3, 5, 4, 8), draw(2, 3, 5, 4, 8))],
    "attend_with_depth": [depth_inputs],
}
CASES = [(name, make) for name, makers in INPUTS.items() for make in makers]


def twins(name):
    """The module of a kernel, the kernel, and its plain version."""
    (module,) = (module for module in MODULES if hasattr(module, f"plain_{name}"))
    return module, getattr(module, name), getattr(module, f"plain_{name}")


def flat(values):
    """The tensors among arguments or results, including those in lists."""
    values = values if isinstance(values, (list, tuple)) else [values]
    nested = [flat(value) if isinstance(value, (list, tuple)) else [value] for value in values]
    return [value for part in nested for value in part if isinstance(value, torch.Tensor)]


def moved(value):
    """The same without numbers, on the meta device."""
    if isinstance(value, list):
        return [moved(one) for one in value]
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def test_every_plain_version_has_a_kernel_of_its_signature_and_a_test():
    plain = [name for module in MODULES for name in vars(module) if name.startswith("plain_")]
    assert sorted(plain) == sorted(f"plain_{name}" for name in INPUTS)
    for name in INPUTS:
        _, fast, slow = twins(name)
        assert inspect.signature(fast) == inspect.signature(slow), name


@pytest.mark.parametrize(("name", "make"), CASES)
def test_a_kernel_equals_its_plain_version_in_value_and_gradient(name, make):
    found = []
    for function in twins(name)[1:]:
        arguments = make(drawing())
        outputs = flat(function(*arguments))
        scales = drawing(seed=1)
        differentiable = [y for y in outputs if y.requires_grad]
        total = sum((scales(*y.shape).detach() * y).sum() for y in differentiable)
        leaves = [x for x in flat(arguments) if x.requires_grad]
        found.append([len(differentiable), *(y.detach() for y in outputs), *torch.autograd.grad(total, leaves)])
    (count, *fast), (plain_count, *plain) = found
    assert (count, len(fast)) == (plain_count, len(plain))
    for a, b in zip(fast, plain, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert apart(a, b) < 1e-5


@pytest.mark.parametrize(("name", "make"), CASES)
def test_a_kernel_without_gradients_has_the_same_values(name, make):
    _, fast, plain = twins(name)
    with torch.inference_mode():
        arguments = make(drawing())
        for a, b in zip(flat(fast(*arguments)), flat(plain(*arguments)), strict=True):
            assert apart(a, b) < 1e-5


# Where the plain version runs: while torch.compile traces, under autocast (tensors of two dtypes), off the CPU.
PLAIN = {
    "fork_norm": {"compile", "autocast", "device"},
    "unit_norm": {"compile", "device"},
    "rotate": {"compile"},
    "qkv_heads": {"compile"},
    "weighted_sum": {"compile"},
    "fork_scores": {"compile", "autocast", "device"},
    "fork_read": {"compile", "autocast", "device"},
    "product": {"compile"},
    "attend_sources": {"device"},
    "attend_with_depth": {"device"},
}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("where", ["eager", "compile", "autocast", "device"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("name", "make"), CASES)
def test_the_plain_version_runs_where_the_kernel_can_not(name, make, grad, where, monkeypatch):
    module, fast, plain = twins(name)
    ran = Counter()
    monkeypatch.setattr(module, f"plain_{name}", lambda *arguments: ran.update(plain=1) or plain(*arguments))
    arguments = make(drawing())
    if where == "device":
        arguments = [moved(argument) for argument in arguments]
    if where == "autocast" and name == "fork_norm":
        arguments = arguments[0].bfloat16(), arguments[1]
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", where == "compile")
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=where == "autocast"):
        fast(*arguments)
    assert ran["plain"] == (where in PLAIN[name])


def test_a_norm_of_one_dtype_is_the_kernel_under_autocast_too(monkeypatch):
    monkeypatch.setattr(cpu, "plain_fork_norm", None)
    draw = drawing()
    with torch.autocast("cpu", torch.bfloat16):
        assert fork_norm(draw(2, 5, 8), draw(8))[1].dtype == torch.float32


def test_states_keep_a_buffer_only_where_its_kernels_run(monkeypatch):
    x = torch.zeros(2, 5, 8)
    buffered = lambda x: States(3, 4, x).store is not None  # noqa: E731
    assert buffered(x)
    assert not buffered(x.bfloat16())
    assert not buffered(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not buffered(x)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert not buffered(x)


# bf16 -----------------------------------------------------------------------------------------------------------------


def rounded(x):
    """x as its nearest bf16 numbers, in fp32; its gradient is not rounded."""
    return x + (x.detach().bfloat16().float() - x.detach())


def close(a, b):
    """Whether a is b but for the rounding to bf16, 2^-9 of a number, of what was multiplied and of the result."""
    return (a - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize("sources", [1, 3])
@pytest.mark.parametrize("times", [1, 24, bf16.BLOCK, 2 * bf16.BLOCK + 30])
def test_attention_in_bf16_is_the_plain_one_but_for_its_rounding(times, sources):
    draw = drawing()
    q, k, v = draw(2, 3, times, 8), draw(2, 3, times, sources, 8), draw(2, 3, times, sources, 8)
    scale = drawing(seed=1)(2, 3, times, 8).detach()
    found = []
    for attend, inputs in (
        (bf16.attend, (q, k.flatten(2, 3), v.flatten(2, 3))),
        (plain_attend_sources, map(rounded, (q, k, v))),
    ):
        y, weights = attend(*inputs)
        assert not weights.requires_grad
        assert y.dtype == weights.dtype == torch.float32
        found.append([y.detach(), weights, *torch.autograd.grad((y * scale).sum(), (q, k, v))])
    for number, (a, b) in enumerate(zip(*found, strict=True)):
        assert a.shape == b.shape
        # With one key, the softmax is constant: queries and keys have no gradient.
        assert close(a, b) or (times * sources == 1 and number in (2, 3) and a.abs().max() == b.abs().max() == 0)


def test_attention_in_bf16_sees_nothing_after_a_query():
    q, k, v = (draw.detach() for draw in (drawing()(1, 2, 300, 8) for _ in range(3)))
    before, _ = bf16.attend(q, k, v)
    k[:, :, 140], v[:, :, 140] = 7, -7
    after, _ = bf16.attend(q, k, v)
    assert torch.equal(before[:, :, :140], after[:, :, :140])
    assert not torch.equal(before[:, :, 140:], after[:, :, 140:])


@pytest.mark.parametrize("where", ["here", "outside", "meta", "long"])
def test_attention_is_in_bf16_only_in_its_context_on_a_cpu_and_for_short_windows(where):
    times = bf16.MOST_TIMES + (where == "long")
    q = torch.empty(1, 1, times, 2, device="meta" if where == "meta" else "cpu")
    with bf16.products(where != "outside"):
        assert bf16.can_attend(q) is (where == "here")
    assert not bf16.can_attend(q)


def test_a_product_in_bf16_keeps_fp32_weights_and_returns_fp32():
    x, weight = drawing()(2, 5, 8), drawing(seed=1)(4, 8)
    with bf16.products():
        y, narrow = linear(x, weight), linear(x, weight, narrow=True)
    assert (y.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(y, narrow.float())
    assert torch.equal(y, F.linear(x.bfloat16(), weight.bfloat16()).float())
    scale = drawing(seed=2)(2, 5, 4).detach()
    by_x, by_weight = torch.autograd.grad((y * scale).sum(), (x, weight))
    assert by_x.dtype == by_weight.dtype == torch.float32
    assert close(by_x, scale @ weight)
    assert close(by_weight, scale.flatten(0, 1).t() @ x.flatten(0, 1))


# Products and norms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_features", [LARGE_MATRIX // 64, LARGE_MATRIX // 64 + 1])
def test_a_product_divided_among_threads_is_that_product(out_features, monkeypatch):
    weight = torch.randn(out_features, 64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(FEW_ROWS + 1, 3, 64, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ weight.double().t()
    parts = []
    whole = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: parts.append(len(b)) or whole(a, b))
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for rows in (x[:1, :1], x[:FEW_ROWS, 1:2], x[:2, :].transpose(0, 1), x[:, 0], x):
                with torch.inference_mode():
                    y = linear(rows, weight)
                wanted = rows.double() @ weight.double().t()
                assert y.shape == wanted.shape
                assert (y - wanted).abs().max() < 1e-5 * exact.abs().max()
    finally:
        torch.set_num_threads(threads)
    # The first three have few rows.
    assert parts == [math.gcd(out_features, number) for number in (1, 2, 3) for _ in range(3)]


@pytest.mark.parametrize("where", ["training", "small", "autocast", "compile", "device"])
def test_a_product_is_torchs_own_where_dividing_it_gains_nothing(where, monkeypatch):
    monkeypatch.setattr(torch, "bmm", None)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", where == "compile")
    device = "meta" if where == "device" else "cpu"
    x, weight = (
        torch.zeros(1, 1, 64, device=device),
        torch.zeros(LARGE_MATRIX // 64 - (where == "small"), 64, device=device),
    )
    with torch.set_grad_enabled(where == "training"), torch.autocast("cpu", torch.bfloat16, where == "autocast"):
        assert linear(x, weight).shape == F.linear(x, weight).shape


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("plain", [True, False])
def test_a_norm_divides_by_the_root_of_mean_square_and_epsilon(grad, plain, monkeypatch):
    if plain:
        monkeypatch.setattr(cpu, "on_cpu", lambda *_, **__: False)
    norm = RMSNorm(6)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2, -1, 0.5, 3, 1]))
    x = (
        torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 1e-3, 1e-5])[:, None, None]
    )
    wide = x.double()
    expected = wide / (wide.square().sum(-1, keepdim=True) / 6 + 1e-6).sqrt() * norm.weight
    with torch.set_grad_enabled(grad):
        stream, found = norm.fork(x)
        again = norm(x)
    assert torch.equal(stream, x)
    for row, wanted, other in zip(found, expected, again, strict=True):
        assert apart(row, wanted) < 1e-6
        assert torch.equal(row, other)


@pytest.mark.parametrize("taken", ["both", "stream", "other"])
@pytest.mark.parametrize("function", [fork_norm, fork_scores, fork_read])
def test_a_fork_has_the_gradient_of_both_its_ways(function, taken):
    """By finite differences, in double precision."""
    draw = drawing(dtype=torch.float64)
    x, weights = {
        fork_norm: (draw(2, 3, 4), draw(4)),
        fork_scores: (draw(2, 3, 4), draw(5, 4)),
        fork_read: (draw(2, 3, 2, 4), draw(2, 3, 2)),
    }[function]

    def fork(x, weights):
        stream, other = function(x * 1, weights)  # forks write into the gradient of what they are given
        return (stream * 1, other)[taken == "other"] if taken != "both" else (stream * 1, other)

    assert torch.autograd.gradcheck(fork, (x, weights))


# Depth ----------------------------------------------------------------------------------------------------------------


def test_sums_over_depth_are_sums_and_have_their_gradients():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()  # noqa: E731
    states = [draw(2, 3, 4) for _ in range(3)]
    for shape in ((3,), (3, 2, 3), (3, 2, 3, 1)):
        weights = draw(*shape)
        wide = weights.view(*shape, *(1,) * (4 - len(shape)))
        wanted = sum(wide[i] * state for i, state in enumerate(states))
        found = weighted_sum(weights, states)
        assert torch.allclose(found.double(), wanted, atol=1e-6)  # weights are rounded to fp32
        leaves = [weights, *states]
        scale = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
        grads = zip(
            torch.autograd.grad((found * scale).sum(), leaves),
            torch.autograd.grad((wanted * scale).sum(), leaves),
            strict=True,
        )
        assert all(torch.allclose(a.double(), b, atol=1e-6) for a, b in grads)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_states_are_read_as_they_were_at_that_time(kind):
    """Put, read, put, replace, read twice: the same with lists; bf16 has no buffer."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(2, 3, 4, generator=generator).to(kind).requires_grad_() for _ in range(3))
    one, two, three = (torch.randn(2, 3, *shape, generator=generator).to(kind) for shape in ((1, 1), (2, 2), (1, 3)))
    weights = [w.requires_grad_() for w in (one, two, three)]
    states = States(3, 4, a)
    assert (states.store is None) is (kind == torch.bfloat16)
    put_a = states.put(a)
    first = states.mix(one)
    put_b = states.put(b)
    states.replace(put_b * 2)
    second = states.mix(two)
    states.put(c)
    third = states.mix(three)
    found = [*first, *second, *third, put_a]

    def plain():
        rows = [a, b * 2, c]
        for count, weight in ((1, one), (2, two), (3, three)):
            for stream in range(weight.shape[2]):
                yield sum(weight[:, :, stream, j, None] * rows[j] for j in range(count))
        yield a

    wanted = list(plain())
    tolerance = 1e-12 if kind == torch.float64 else 2**-5  # a sum of three at 8 bits
    scales = [torch.randn(2, 3, 4, generator=generator).to(kind) for _ in wanted]
    for one_found, one_wanted in zip(found, wanted, strict=True):
        assert apart(one_found.double(), one_wanted.double()) < tolerance
    leaves = [a, b, c, *weights]
    sums = [sum((scale * y).sum() for scale, y in zip(scales, ys, strict=True)) for ys in (found, wanted)]
    for x, y in zip(torch.autograd.grad(sums[0], leaves), torch.autograd.grad(sums[1], leaves), strict=True):
        assert apart(x.double(), y.double()) < tolerance


def test_reads_over_depth_in_bf16_are_those_in_full_precision():
    generator = torch.Generator().manual_seed(0)
    x, queries = torch.randn(2, 3, 8, generator=generator).bfloat16(), torch.randn(5, 8, generator=generator)
    wanted = torch.einsum(
        "btd,ld->btl", x.double() / x.double().square().mean(-1, keepdim=True).sqrt(), queries.double()
    )
    found = fork_scores(x, queries)[1]
    assert found.dtype == torch.float32
    assert apart(found, wanted) < 1e-5
    streams, weights = (torch.randn(2, 3, *shape, generator=generator).bfloat16() for shape in ((4, 8), (4,)))
    stream, found = fork_read(streams, weights)
    assert stream is streams
    assert apart(found.double(), torch.einsum("btn,btnd->btd", weights.double(), streams.double())) < 4 * 2**-8


def test_sums_over_depth_are_in_full_precision_under_autocast():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, 3, 8, generator=generator) for _ in range(3)]
    weights = torch.randn(2, 3, 2, 3, generator=generator)
    wanted = [sum(weights[:, :, c, j, None].double() * rows[j] for j in range(3)) for c in range(2)]
    states = States(3, 2, rows[0])
    with torch.autocast("cpu", torch.bfloat16):
        plain = States(3, 2, rows[0])  # has no buffer
        found = [weighted_sum(weights[:, :, c].permute(2, 0, 1), rows) for c in range(2)]
        for row in rows:
            plain.put(row)
        found += plain.mix(weights)
    assert (states.store is None, plain.store is None) == (False, True)
    for row in rows:
        states.put(row)
    for one, other in zip(found + states.mix(weights), wanted * 3, strict=True):
        assert apart(one, other) < 1e-6


# Rotary positions -----------------------------------------------------------------------------------------------------


def test_angles_late_in_a_long_context_are_those_of_double_precision():
    table = rope_freqs(2**15, 8, 500.0)
    assert table.shape == (2**15, 4, 2)
    for t, k in itertools.product((0, 1, 1000, 2**15 - 1), range(4)):
        angle = t * 500.0 ** (-2 * k / 8)
        assert abs(complex(*table[t, k].tolist()) - complex(math.cos(angle), math.sin(angle))) < 1e-6


# Attention ------------------------------------------------------------------------------------------------------------


def test_the_merged_attention_equals_one_softmax_to_double_precision():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 3, 17, *shape, 8, dtype=torch.float64, generator=generator) for shape in ((), (4,), (4,))]
    results = []
    for attend in (attend_sources, plain_attend_sources):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out, weights = attend(*leaves)
        assert (out.requires_grad, weights.requires_grad) == (True, False)
        (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves), weights.double()])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    for a, b in zip(results[0][:4], results[1][:4], strict=True):
        assert torch.allclose(a, b, atol=2e-6)


def test_where_there_is_no_fused_kernel_attention_is_the_plain_one():
    q, k = torch.empty(2, 3, 5, 8, device="meta"), torch.empty(2, 3, 5, 4, 8, device="meta")
    out, weights = attend_sources(q, k, k)
    assert (out.shape, weights.shape) == ((2, 3, 5, 8), (2, 3, 4, 5))
    assert attend_with_depth(q, q, q, [q, q], [q, q]).shape == q.shape


def test_a_trace_tells_shares_and_distances_of_each_head_source_and_time():
    """One query direction: scores are plain numbers, shares and mean distances sums over them."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 7, *shape, 8, generator=generator) for shape in ((), (2,)))
    _, shares = attend_sources(q, k, k)
    back = distances(q, k)
    for row, h, t in itertools.product(range(2), range(3), range(7)):
        scores = [[math.exp(q[row, h, t] @ k[row, h, s, m] / math.sqrt(8)) for s in range(t + 1)] for m in range(2)]
        for m in range(2):
            assert shares[row, h, m, t].item() == pytest.approx(sum(scores[m]) / sum(map(sum, scores)), abs=1e-5)
            mean = sum((t - s) * score for s, score in enumerate(scores[m])) / sum(scores[m])
            assert back[row, h, m, t].item() == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("late", [0, 4])
def test_attention_with_depth_keys_is_one_softmax(late):
    """late: tokens in the cache, which have no depth keys."""
    generator = torch.Generator().manual_seed(0)
    q, *below = (torch.randn(2, 3, 5, 8, generator=generator) for _ in range(5))
    k, v = (torch.randn(2, 3, 5 + late, 8, generator=generator) for _ in range(2))
    keys, values = below[:2], below[2:]
    found = attend_with_depth(q, k, v, keys, values)
    for row, h, t in itertools.product(range(2), range(3), range(5)):
        seen = torch.cat([k[row, h, : late + t + 1], *(key[row, h, t][None] for key in keys)])
        read = torch.cat([v[row, h, : late + t + 1], *(value[row, h, t][None] for value in values)])
        shares = (seen.double() @ q[row, h, t].double() / math.sqrt(8)).softmax(0)
        assert torch.allclose(found[row, h, t].double(), shares @ read.double(), atol=1e-5)


def test_the_plain_attentions_weigh_in_full_precision_what_they_read_in_bf16():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: (2 * torch.randn(2, 3, *shape, generator=generator)).bfloat16()  # noqa: E731
    q, k = draw(5, 8), draw(5, 2, 8)
    scores = torch.einsum("bhid,bhjmd->bhmij", q.double(), k.double()) / math.sqrt(8)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    shares = (
        scores.masked_fill(hidden, -math.inf).transpose(2, 3).flatten(-2).softmax(-1).unflatten(-1, (2, 5)).sum(-1).mT
    )
    out, found = plain_attend_sources(q, k, k)
    assert out.dtype == torch.bfloat16
    assert apart(found, shares) < 1e-5
    # Scores near 30, which bf16 would round by a tenth; most shares are near 0 or 1, which bf16 can represent.
    q, (own, below) = q * 4, k.unbind(3)
    seen = torch.cat(
        (
            torch.einsum("bhid,bhjd->bhij", q.double(), own.double()).masked_fill(hidden, -math.inf),
            (q.double() * below.double()).sum(-1, keepdim=True),
        ),
        -1,
    )
    shares = (seen / math.sqrt(8)).softmax(-1)
    wanted = shares[..., :5] @ own.double() + shares[..., 5:] * below.double()
    found = plain_attend_with_depth(q, own, own, [below], [below])
    assert found.dtype == torch.bfloat16
    assert apart(found, wanted) < 2**-9


def test_a_unit_norm_and_its_gradient_are_those_of_the_formula():
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(4))
    x[0, 0, 0] = 1e-5  # where epsilon matters
    given = x.clone().requires_grad_()
    exact = x.double().requires_grad_()
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    found = cpu.unit_norm(given)
    expected = exact / torch.sqrt((exact**2).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cpu.plain_unit_norm(x).double(), expected, rtol=1e-5, atol=1e-6)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(given.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)
