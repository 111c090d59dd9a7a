"""Matched baselines: within the tolerance, as torch counts parameters and FLOPs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shortcut_cli import matching, recipe, registry

SHAPE = ["model.layers=10", "model.width=128", "model.heads=8", "model.ffn=512", "model.context=64", "eval.stride=64"]
VOCABULARY = 27


def build(resolved):
    return registry.load(registry.MODELS, resolved.model.name)(resolved.model, VOCABULARY, 1)


def trunk(model):
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("embedding", "head")))


def counted_flops(model, context):
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.requires_grad_(False)(torch.zeros(1, context, dtype=torch.long))
    return counter.get_total_flops()


@pytest.mark.parametrize("arm", ["shortcut", "shortcut_gated", "value_residual", "hyper", "mudd"])
def test_opponents_have_as_many_parameters(arm):
    resolved = recipe.read("text-tiny", [*SHAPE, f"model.name={arm}"])
    wanted = trunk(build(resolved))
    found = matching.opponents(resolved, VOCABULARY, "params")
    assert found.keys() == {"deeper", "wider"}
    for name, opponent in found.items():
        assert opponent.model.name == "gpt"
        assert trunk(build(opponent)) == pytest.approx(wanted, rel=0.005)
        if arm == "shortcut":
            assert (opponent.model.layers > 10) is (name == "deeper")
    assert found["wider"].model.layers == 10


@pytest.mark.parametrize("arm", ["shortcut", "shortcut_local", "late_kv"])
def test_opponents_take_as_many_flops(arm):
    resolved = recipe.read("text-tiny", [*SHAPE, f"model.name={arm}"])
    for opponent in matching.opponents(resolved, VOCABULARY, "flops").values():
        # Torch counts all pairs of times, matching only those that a query sees; both are near.
        ratio = counted_flops(build(opponent), 64) / counted_flops(build(resolved), 64)
        assert ratio == pytest.approx(1, abs=0.02)
        sizes = [matching.size(made, VOCABULARY).flops for made in (opponent, resolved)]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
