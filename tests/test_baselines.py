"""Matched baselines: within the tolerance, as torch counts parameters and FLOPs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shortcut_cli import registry
from shortcut_cli.compare import baselines
from shortcut_cli.config import reading, writing
from shortcut_cli.errors import UsageError

SHAPE = ["model.layers=10", "model.width=128", "model.heads=8", "model.ffn=512", "model.context=64", "eval.stride=64"]
VOCABULARY = 27


def build(resolved):
    return registry.load(registry.MODELS, resolved.model.name)(resolved.model, VOCABULARY, 1)


def non_embedding(model):
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("embedding", "head")))


def counted_flops(model, context):
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.requires_grad_(False)(torch.zeros(1, context, dtype=torch.long))
    return counter.get_total_flops()


@pytest.mark.parametrize("arm", ["shortcut", "shortcut_gated", "value_residual", "hyper", "mudd"])
def test_baselines_have_as_many_parameters(arm):
    resolved = reading.read("text-tiny", [*SHAPE, f"model.name={arm}"])
    wanted = non_embedding(build(resolved))
    found = baselines.matched(resolved, VOCABULARY, "params")
    assert found.keys() == {"deeper", "wider"}
    for name, baseline in found.items():
        assert baseline.model.name == "gpt"
        assert non_embedding(build(baseline)) == pytest.approx(wanted, rel=0.005)
        if arm == "shortcut":
            assert (baseline.model.layers > 10) is (name == "deeper")
    assert found["wider"].model.layers == 10


@pytest.mark.parametrize("arm", ["shortcut", "shortcut_local", "late_kv"])
def test_baselines_take_as_many_flops(arm):
    resolved = reading.read("text-tiny", [*SHAPE, f"model.name={arm}"])
    for baseline in baselines.matched(resolved, VOCABULARY, "flops").values():
        # Torch counts all pairs of positions, `Size` only those that a query sees; the numbers are close.
        ratio = counted_flops(build(baseline), 64) / counted_flops(build(resolved), 64)
        assert ratio == pytest.approx(1, abs=0.02)
        sizes = [baselines.size(made, VOCABULARY).flops for made in (baseline, resolved)]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def parameters_of(layers, width, ffn, swiglu=False):
    """Non-embedding parameters of a gpt: four square matrices, two or three of the feed-forward, the norms."""
    return layers * (4 * width**2 + (3 if swiglu else 2) * width * ffn + 2 * width) + width


def flops_of(layers, width, ffn, context, swiglu=False):
    """Training FLOPs per token of a gpt: 3 passes, 2 per multiply-add, (T + 1) / 2 keys per query on average."""
    matrices = layers * (4 * width**2 + (3 if swiglu else 2) * width * ffn) + VOCABULARY * width
    return 3 * (2 * matrices + layers * 4 * width * (context + 1) / 2)


def measure(match, context, layers, width, ffn):
    return parameters_of(layers, width, ffn) if match == "params" else flops_of(layers, width, ffn, context)


def shape_of(resolved):
    return resolved.model.layers, resolved.model.width, resolved.model.ffn


def worked(match, aim, shape, heads, context):
    """(layers, width, ffn) of the deeper and the wider baseline, by trying all of them."""
    layers, width, ffn = shape
    found = {}
    for name, candidates in (
        ("deeper", [(n, width) for n in range(layers, 4 * layers + 1)]),
        ("wider", [(layers, n) for n in range(width, 4 * width + 1, 2 * heads)]),
    ):
        depth, breadth = min(candidates, key=lambda one: abs(measure(match, context, *one, ffn) - aim))
        inner = min(range(1, 4 * ffn), key=lambda inner: abs(measure(match, context, depth, breadth, inner) - aim))
        found[name] = (depth, breadth, inner)
    return found


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_size_of_the_baseline_equals_that_computed_by_hand(activation, tied):
    settings = ["model.name=gpt", "model.layers=3", "model.width=24", "model.heads=2", "model.ffn=50"]
    settings += [
        "model.context=10",
        "eval.stride=5",
        f"model.activation={activation}",
        f"model.tied={str(tied).lower()}",
    ]
    found = baselines.size(reading.read("text-tiny", settings), VOCABULARY)
    swiglu = activation == "swiglu"
    parameters = parameters_of(3, 24, 50, swiglu)
    assert found == baselines.Size(
        parameters=parameters,
        total=parameters + VOCABULARY * 24 * (1 if tied else 2),
        flops=flops_of(3, 24, 50, 10, swiglu),
        cache_bytes=3 * 2 * 24 * 4,  # a key and a value of fp32 in each layer
    )
    assert (found.of("params"), found.of("flops")) == (parameters, found.flops)


@pytest.mark.parametrize("settings", [["model.name=shortcut"], ["model.name=late_kv"], ["model.name=value_residual"]])
def test_the_size_of_an_arm_is_that_of_its_tensors(settings):
    settings = [*settings, "model.layers=6", "model.width=32", "model.heads=4", "model.ffn=64", "model.tied=false"]
    resolved = reading.read(
        "text-tiny", [*settings, "model.context=16", "eval.stride=16", "model.shortcut.map_width=48"]
    )
    model, found = build(resolved), baselines.size(resolved, VOCABULARY)
    assert found.parameters == non_embedding(model)
    assert (
        found.total
        == sum(weight.numel() for weight in model.parameters())
        == non_embedding(model) + 2 * VOCABULARY * 32
    )
    cache = model.new_cache(1, 10)
    assert found.cache_bytes * 10 == sum(slot.nbytes for slot in [*cache.keys, *cache.values])
    # Torch counts the pairs that no query sees too, but not the sums of two weighted values in layers above the first.
    unseen = 4 * 32 * (16 * 15 // 2) * sum(cache.entries)
    summed = 16 * 2 * 32 * 2 * 5 if resolved.model.name == "value_residual" else 0
    assert found.flops == 3 * (counted_flops(model, 16) - unseen + summed) // 16


@pytest.mark.parametrize("match", ["params", "flops"])
@pytest.mark.parametrize("arm", ["shortcut", "value_residual"])
def test_baselines_are_the_nearest_of_all_shapes_and_else_the_arm(match, arm):
    resolved = reading.read("text-tiny", [*SHAPE, "model.layers=6", f"model.name={arm}", "train.lr=0.00123"])
    aim = non_embedding(build(resolved)) if match == "params" else baselines.size(resolved, VOCABULARY).flops
    found = baselines.matched(resolved, VOCABULARY, match)
    assert {name: shape_of(one) for name, one in found.items()} == worked(match, aim, (6, 128, 512), 8, 64)
    for name, changed in (("deeper", {"layers", "ffn"}), ("wider", {"width", "ffn"})):
        lines = writing.differences(resolved.model_dump(), found[name].model_dump())
        changes = {line.partition(":")[0].removeprefix("model.") for line in lines}
        assert {"name"} <= changes <= {"name", *changed}


@pytest.mark.parametrize("match", ["params", "flops"])
@pytest.mark.parametrize("times", [1.0, 1.5, 3.3])
def test_a_target_is_matched_instead_of_the_arms_size(match, times):
    settings = ["model.name=shortcut", "model.layers=2", "model.width=24", "model.heads=2", "model.ffn=48"]
    resolved = reading.read("text-tiny", [*settings, "model.context=16", "eval.stride=16"])
    aim = measure(match, 16, 2, 24, 48) * times
    found = baselines.matched(resolved, VOCABULARY, match, aim)
    assert {name: shape_of(one) for name, one in found.items()} == worked(match, aim, (2, 24, 48), 2, 16)
    for one in found.values():
        assert one.model.heads == 2
        assert measure(match, 16, *shape_of(one)) == pytest.approx(aim, rel=0.005 if match == "params" else 0.01)


def test_no_baseline_is_more_than_four_times_as_deep_or_wide():
    settings = ["model.name=gpt", "model.layers=2", "model.width=24", "model.heads=2", "model.ffn=48"]
    resolved = reading.read("text-tiny", [*settings, "model.context=16", "eval.stride=16"])
    found = baselines.matched(resolved, VOCABULARY, "params", parameters_of(2, 6 * 24, 48))
    assert shape_of(found["deeper"])[:2] == (8, 24)
    assert shape_of(found["wider"])[:2] == (2, 96)
    for one in found.values():  # the feed-forward makes up the difference
        assert parameters_of(*shape_of(one)) == pytest.approx(parameters_of(2, 6 * 24, 48), rel=0.005)


SMALL = ["model.name=shortcut", "model.layers=2", "model.width=8", "model.heads=2", "model.ffn=30", "model.context=8"]


@pytest.mark.parametrize("match", ["params", "flops"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_size_outside_the_tolerance_is_refused(match, sign):
    resolved = reading.read("text-tiny", [*SMALL, "eval.stride=8"])
    tolerance = {"params": 0.005, "flops": 0.01}[match]
    nearest = measure(match, 8, 2, 8, 9)
    # The next feed-forward widths are outside the tolerance, so this one is the best.
    step = measure(match, 8, 2, 8, 10) - nearest
    assert step > 2.2 * tolerance * nearest
    within, outside = (nearest / (1 + sign * share * tolerance) for share in (0.98, 1.02))
    assert shape_of(baselines.matched(resolved, VOCABULARY, match, within)["smaller"]) == (2, 8, 9)
    with pytest.raises(UsageError) as refused:
        baselines.matched(resolved, VOCABULARY, match, outside)
    off = nearest / outside - 1
    assert refused.value.message == (
        f"no gpt of 2 layers and width 8 comes closer than {100 * off:+.2f} % to {outside:,.0f} {match} of gpt"
    )
    assert "--match none" in refused.value.hint


def test_an_unreachably_small_size_is_refused():
    resolved = reading.read("text-tiny", [*SMALL, "eval.stride=8"])
    with pytest.raises(UsageError, match="no gpt of 2 layers"):
        baselines.matched(resolved, VOCABULARY, "params", 10)


@pytest.mark.parametrize("match", ["params", "flops"])
def test_a_baseline_that_is_too_large_already_gets_a_smaller_one(match):
    settings = ["model.name=shortcut", "model.layers=2", "model.width=24", "model.heads=2", "model.ffn=300"]
    resolved = reading.read("text-tiny", [*settings, "model.context=16", "eval.stride=16"])
    tolerance = {"params": 0.005, "flops": 0.01}[match]
    plain = measure(match, 16, 2, 24, 300)
    step = plain - measure(match, 16, 2, 24, 299)
    aim = plain / (1 + 1.02 * tolerance)
    (found,) = baselines.matched(resolved, VOCABULARY, match, aim).items()
    assert (found[0], shape_of(found[1])) == ("smaller", (2, 24, 300 - round((plain - aim) / step)))
    found = baselines.matched(resolved, VOCABULARY, match, plain / (1 + 0.98 * tolerance))
    assert found.keys() == {"deeper", "wider"}


def test_a_baseline_that_is_larger_by_exactly_the_tolerance_is_too_large():
    resolved = reading.read("text-tiny", [*SHAPE, "model.name=gpt"])
    flops = baselines.size(resolved, VOCABULARY).flops
    target = flops / 1.01
    assert target * 1.01 == flops  # in floating point too
    assert baselines.matched(resolved, VOCABULARY, "flops", target).keys() == {"smaller"}
