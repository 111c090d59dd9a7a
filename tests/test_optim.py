"""The optimizer, its learning rates and the EMA: against closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch

from shortcut_cli.config.schema import TrainConfig
from shortcut_cli.training import optim


def config(**given):
    return TrainConfig(**({"steps": 111, "batch_size": 8, "lr": 0.5, "warmup": 10, "min_lr": 0.2} | given))


WARMED = [(0, 0.05), (4, 0.25), (9, 0.5)]  # 1/10, 5/10 and 10/10 of lr
ROOT = math.sqrt(2) / 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # After warm-up there are 100 steps from the first to the last: cosines of 0, 45, 90, 135 and 180 degrees.
        (
            {},
            [*WARMED, (10, 0.5), (35, 0.5 * (0.6 + 0.4 * ROOT)), (60, 0.3), (85, 0.5 * (0.6 - 0.4 * ROOT)), (110, 0.1)],
        ),
        ({"min_lr": 0.0}, [*WARMED, (10, 0.5), (35, 0.25 * (1 + ROOT)), (60, 0.25), (110, 0.0)]),
        ({"min_lr": 1.0}, [*WARMED, (10, 0.5), (60, 0.5), (110, 0.5)]),
        ({"warmup": 0}, [(0, 0.5), (55, 0.3), (110, 0.1)]),
        ({"warmup": 0, "steps": 1}, [(0, 0.5)]),
        ({"warmup": 1, "steps": 2}, [(0, 0.5), (1, 0.5)]),
        ({"warmup": 1, "steps": 3}, [(0, 0.5), (1, 0.5), (2, 0.1)]),
        ({"warmup": 200}, [(0, 0.0025), (110, 0.5 * 111 / 200)]),
        # The last round(0.2 * 111) = 22 steps go down from 1 to 0.2 of lr.
        (
            {"schedule": "wsd"},
            [*WARMED, (10, 0.5), (88, 0.5), (89, 0.5 * (0.2 + 0.8 * 21 / 22)), (99, 0.3), (110, 0.1)],
        ),
        ({"schedule": "wsd", "decay": 0.5}, [(54, 0.5), (55, 0.5 * (0.2 + 0.8 * 55 / 56)), (82, 0.3), (110, 0.1)]),
        (
            {"schedule": "wsd", "decay": 1.0, "min_lr": 0.0},
            [*WARMED, (10, 0.5 * 100 / 101), (60, 0.5 * 50 / 101), (110, 0.0)],
        ),
        ({"schedule": "wsd", "decay": 0.95}, [*WARMED, (10, 0.5 * (0.2 + 0.8 * 100 / 101)), (110, 0.1)]),
        ({"schedule": "wsd", "decay": 0.001}, [(109, 0.5), (110, 0.1)]),
        ({"schedule": "constant"}, [*WARMED, (10, 0.5), (60, 0.5), (110, 0.5)]),
    ],
)
def test_learning_rates_are_those_of_the_closed_form(given, expected):
    schedule = config(**{"schedule": "cosine", "min_lr": 0.2, "decay": 0.2, **given})
    rates = [optim.learning_rate(step, schedule) for step, _ in expected]
    assert rates == pytest.approx([rate for _, rate in expected], rel=1e-12, abs=1e-12)


class Three(torch.nn.Module):
    """A matrix, a vector, a matrix and a vector that are routers, and a matrix that is not trained."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)

        def drawn(*shape):
            return torch.nn.Parameter(torch.randn(shape, generator=generator))

        self.matrix, self.vector, self.frozen = drawn(3, 2), drawn(4), drawn(2, 2)
        self.inner = torch.nn.Module()
        self.inner.gate, self.inner.route = drawn(2, 2), drawn(3)
        self.frozen.requires_grad = False


def plain_adamw(weight, gradients, rates, decay, beta1, beta2):
    """Loshchilov and Hutter 2019, algorithm 2, float64."""
    first = second = np.zeros_like(weight)
    for number, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        mean, square = first / (1 - beta1**number), second / (1 - beta2**number)
        weight = weight - rate * decay * weight - rate * mean / (np.sqrt(square) + 1e-8)
    return weight


def test_steps_equal_plain_adamw_with_decay_on_matrices_and_a_separate_rate_for_routers():
    model = Three()
    optimizer = optim.adamw(
        model, config(weight_decay=0.3, beta1=0.7, beta2=0.4), routers=["inner.gate", "route"], router_lr=0.25
    )
    rates = (0.1, 0.02, 0.3)
    generator = torch.Generator().manual_seed(2)
    before = {name: weight.detach().double().numpy() for name, weight in model.named_parameters()}
    gradients = {name: [] for name in before}
    for rate in rates:
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.grad = torch.randn(weight.shape, generator=generator)
                weight.grad[0] *= 1e-6  # so small that epsilon matters
                gradients[name].append(weight.grad.double().numpy())
        optim.set_rate(optimizer, rate)
        optimizer.step()
    for name, scale, decay in (("matrix", 1, 0.3), ("vector", 1, 0), ("inner.gate", 0.25, 0), ("inner.route", 0.25, 0)):
        expected = plain_adamw(before[name], gradients[name], [rate * scale for rate in rates], decay, 0.7, 0.4)
        # fp32 against float64, three updates of at most 0.3 each.
        np.testing.assert_allclose(model.get_parameter(name).detach(), expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert (model.frozen.double().numpy() == before["frozen"]).all()


def test_what_decays_and_at_which_rate_can_be_said_by_name():
    model = Three()
    optimizer = optim.Optimizer(
        model,
        config(weight_decay=0.3),
        routers=["gate", "route"],
        router_lr=0.25,
        decays={"matrix": False, "vector": True, "inner.gate": True},
        rates={"inner.route": 0.5, "vector": 0.125},
    ).adamw
    optim.set_rate(optimizer, 0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[p]: (group["weight_decay"], group["lr"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert found == {
        "matrix": (0, 0.5),
        "vector": (0.3, 0.0625),
        "inner.gate": (0.3, 0.125),
        "inner.route": (0, 0.0625),
    }


def test_without_routers_all_matrices_decay_and_all_have_one_rate():
    model = Three()
    optimizer = optim.adamw(model, config(weight_decay=0.3), router_lr=0.25)
    optim.set_rate(optimizer, 0.125)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {frozenset(names[p] for p in group["params"]): group for group in optimizer.param_groups}
    assert {members: group["weight_decay"] for members, group in found.items()} == {
        frozenset({"matrix", "inner.gate"}): 0.3,
        frozenset({"vector", "inner.route"}): 0.0,
    }
    assert [(group["lr"], group["betas"], group["fused"]) for group in found.values()] == [
        (0.125, (0.9, 0.95), True)
    ] * 2


def test_routers_have_the_same_rate_unless_told_otherwise():
    optimizer = optim.adamw(Three(), config(), routers=["route"])
    optim.set_rate(optimizer, 0.125)
    assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == [
        (2, 0.125),
        (1, 0.125),
        (1, 0.125),
    ]


def test_the_ema_starts_at_the_weights_and_is_a_copy_in_fp32():
    model = torch.nn.Linear(2, 2).to(torch.bfloat16)
    before = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    average = optim.EMA(model, 0.9)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    assert average.weights.keys() == before.keys()
    for name, weight in average.weights.items():
        assert weight.dtype == torch.float32
        assert not weight.requires_grad
        assert (weight == before[name].float()).all()


@pytest.mark.parametrize(
    ("decay", "steps", "shares"),
    [
        # (1 + step) / (10 + step) is 1/10, 2/11, 88/97 (at 87) and 81/90 = 0.9 at 80.
        (0.9, (0, 1), (1 / 10, 2 / 11)),
        (0.9, (79, 80, 87, 10**6), (80 / 89, 0.9, 0.9, 0.9)),
        (0.15, (0, 1, 2), (1 / 10, 0.15, 0.15)),
    ],
)
def test_the_ema_keeps_its_decay_of_itself_and_less_in_early_steps(decay, steps, shares):
    model = torch.nn.Linear(3, 2)
    average = optim.EMA(model, decay)
    expected = {name: weight.detach().double().numpy() for name, weight in model.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    for step, share in zip(steps, shares, strict=True):
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
        average.update(model, step)
        for name, weight in model.named_parameters():
            expected[name] = share * expected[name] + (1 - share) * weight.detach().double().numpy()
            np.testing.assert_allclose(average.weights[name], expected[name], rtol=1e-5, atol=1e-6)


def test_the_state_of_another_optimizer_is_refused():
    def made(width, **given):
        model = torch.nn.Linear(width, 2)
        found = optim.Optimizer(model, config(ema=0.9, **given))
        model(torch.ones(1, width)).sum().backward()
        found.step(0)
        return found

    right = made(3).state()
    fresh = made(3)
    fresh.load_state(right, "cpu")
    for name, weight in right["average"].items():
        assert torch.equal(fresh.ema.weights[name], weight)
    group, *others = right["optimizer"]["param_groups"]
    wrong = {
        "another betas": right["optimizer"] | {"param_groups": [group | {"betas": "ab"}, *others]},
        "another weight_decay": right["optimizer"] | {"param_groups": [group | {"weight_decay": 5.0}, *others]},
        "shorter": right["optimizer"] | {"param_groups": [group]},
        "another shape": made(4).state()["optimizer"],
        "exp_avg has another shape": right["optimizer"]
        | {"state": {number: kept | {"exp_avg": "x"} for number, kept in right["optimizer"]["state"].items()}},
        "lacks a part": right["optimizer"]
        | {"state": {number: {"step": kept["step"]} for number, kept in right["optimizer"]["state"].items()}},
    }
    for reason, state in wrong.items():
        with pytest.raises(ValueError, match=reason):
            made(3).load_state(right | {"optimizer": state}, "cpu")
    with pytest.raises(ValueError, match="averaged weights are of another model"):
        made(3).load_state(right | {"average": made(4).state()["average"]}, "cpu")
