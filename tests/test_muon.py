"""Muon: against singular values in float64, against torch's own, and what it is given to update."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_models import make

from shortcut_cli import registry
from shortcut_cli.config.schema import TrainConfig
from shortcut_cli.kernels import bf16
from shortcut_cli.training import muon, optim


def config(**given):
    return TrainConfig(**({"steps": 100, "batch_size": 8, "lr": 0.01, "warmup": 0, "schedule": "constant"} | given))


def plain_orthogonal(matrix):
    """Only the singular values change: by three polynomials, after division by the root of the sum of their squares."""
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    s = s / np.sqrt((s**2).sum()) / 1.01
    for a, b, c in (
        (8.156555, -22.483293, 15.878770),
        (4.042930, -2.808917, 0.500018),
        (3.891668, -2.772484, 0.506065),
    ):
        s = a * s + b * s**3 + c * s**5
    return u * s @ v


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 12), (2, 12, 5), (2, 1, 7), (1, 7, 1)])
def test_singular_values_go_through_the_polynomial_and_directions_stay(shape):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32) * 1e-3
    found = muon.orthogonalise(torch.from_numpy(x)).numpy()
    for one, given in zip(found, x, strict=True):
        np.testing.assert_allclose(one, plain_orthogonal(given), atol=2e-4)


def test_singular_values_end_within_the_range_that_is_promised():
    small = np.geomspace(1 / 700, 1, 2000)  # beside one with which the squares sum to 1
    given = [np.diag([np.sqrt(1 - s**2), s]) for s in (*small, 1 / 2000)]
    found = muon.orthogonalise(torch.tensor(np.array(given), dtype=torch.float32)).diagonal(dim1=1, dim2=2).numpy()
    assert 0.15 < found[:-2].min() < 0.16  # the last but one has a singular value of 0
    assert 1.86 < found[:-2].max() < 1.88
    assert found[-1].min() < 0.15


@pytest.mark.parametrize("shape", [(3, 5, 12), (2, 12, 5)])
def test_products_are_in_bf16_where_those_of_the_model_are(shape):
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    with bf16.products():
        found = muon.orthogonalise(torch.from_numpy(x))
    assert found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16())  # the last of them was rounded to it
    for one, given in zip(found.numpy(), x, strict=True):
        np.testing.assert_allclose(one, plain_orthogonal(given), atol=0.04)


@pytest.mark.parametrize(
    ("shape", "precision", "way"),
    [
        ((2, 5, 12), "fp32", "_by_gram"),
        ((2, 12, 5), "fp32", "_by_gram"),
        ((4, 8, 8), "fp32", "_newton_schulz"),
        ((2, 12, 5), "bf16", "_newton_schulz"),
    ],
)
def test_what_is_squared_is_the_short_side(shape, precision, way, monkeypatch):
    taken = []
    for name in ("_by_gram", "_newton_schulz"):
        own = getattr(muon, name)
        monkeypatch.setattr(muon, name, lambda y, name=name, own=own: taken.append((name, tuple(y.shape))) or own(y))
    with bf16.products(precision == "bf16"):
        muon.orthogonalise(torch.ones(shape))
    assert taken == [(way, (shape[0], min(shape[1:]), max(shape[1:])))]


def test_every_shape_is_told_how_many_matrices_went_before():
    def shared(_, matrices, done):  # processes that train together go on from there with the next of them
        counts.append((len(matrices), done))
        return matrices

    counts = []
    weights = [torch.nn.Parameter(torch.ones(shape)) for shape in ((6, 2), (6, 2), (3, 4), (5, 5))]
    groups = [{"params": weights[:2], "parts": 3}, {"params": weights[2:3]}, {"params": weights[3:]}]
    optimizer = muon.Muon(groups, lr=0.1, momentum=0.9, weight_decay=0)
    optimizer.processes = SimpleNamespace(shared=shared)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert counts == [(6, 0), (1, 6), (1, 7)]


def test_a_gradient_of_zero_changes_nothing():
    assert (muon.orthogonalise(torch.zeros(2, 3, 4)) == 0).all()


def test_steps_equal_those_of_torchs_own_with_its_polynomial_but_for_its_bf16(monkeypatch):
    monkeypatch.setattr(muon, "COEFFICIENTS", [(3.4445, -4.7750, 2.0315)] * 5)
    monkeypatch.setattr(muon, "MARGIN", 1.0)
    generator = torch.Generator().manual_seed(2)
    ours, theirs = (torch.nn.Parameter(torch.randn(24, 8, generator=generator)) for _ in range(2))
    theirs.data.copy_(ours.data)
    one = muon.Muon([{"params": [ours]}], lr=0.1, momentum=0.9, weight_decay=0.2)
    # torch adds the gradient to the momentum, we take a mean; the update does not depend on its size.
    other = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.2)
    for _ in range(4):
        gradient = torch.randn(24, 8, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        one.step()
        other.step()
    moved = 4 * 0.1 * 3**0.5  # of each direction: the rate times the scale of a matrix of 24 x 8
    assert (ours - theirs).abs().max() < 0.02 * moved


def plain_steps(weight, gradients, parts, rate, momentum, decay):
    """Jordan et al. 2024 with Nesterov momentum as a mean, float64, a part at a time."""
    mean = np.zeros_like(weight)
    for gradient in gradients:
        mean = momentum * mean + (1 - momentum) * gradient
        ahead = momentum * mean + (1 - momentum) * gradient
        update = np.concatenate([plain_orthogonal(part) for part in np.split(ahead, parts)])
        outputs, inputs = weight.shape[0] / parts, weight.shape[1]
        weight = weight - rate * decay * weight - rate * max(1, outputs / inputs) ** 0.5 * update
    return weight


@pytest.mark.parametrize(("parts", "shape"), [(1, (6, 10)), (3, (18, 6)), (2, (24, 5))])
def test_each_part_of_a_weight_is_a_matrix_of_its_own(parts, shape):
    generator = torch.Generator().manual_seed(3)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(2)]
    optimizer = muon.Muon([{"params": weights, "parts": parts}], lr=0.1, momentum=0.8, weight_decay=0.3)
    before = [weight.detach().double().numpy() for weight in weights]
    gradients = [[torch.randn(shape, generator=generator) for _ in range(3)] for _ in weights]
    for step in range(3):
        for weight, given in zip(weights, gradients, strict=True):
            weight.grad = given[step]
        optimizer.step()
    for weight, start, given in zip(weights, before, gradients, strict=True):
        expected = plain_steps(start, [g.double().numpy() for g in given], parts, 0.1, 0.8, 0.3)
        np.testing.assert_allclose(weight.detach(), expected, atol=1e-3)


@pytest.mark.parametrize("name", registry.MODELS)
def test_muon_and_adamw_share_all_weights_of_every_architecture(name):
    model = make(name, {})
    given = model.matrices()
    optimizer = optim.Optimizer(model, config(), model.routers(), matrices=given)
    names = {parameter: name for name, parameter in model.named_parameters()}
    owned = [
        [names[p] for group in each.param_groups for p in group["params"]] for each in (optimizer.adamw, optimizer.muon)
    ]
    assert sorted(owned[0] + owned[1]) == sorted(names.values())
    assert set(owned[1]) == given.keys()
    for weight in given:
        assert weight.startswith("blocks.")
        assert model.get_parameter(weight).dim() == 2
        assert not weight.endswith(tuple(model.routers()))
    fused = {name for name, parts in given.items() if parts > 1}
    together = re.compile(r"query_key_value\.weight$|\.key_value\.|convolution\.inner\.weight$")
    assert fused == {name for name in given if together.search(name)}


def test_muon_turns_each_block_of_a_block_diagonal_matrix_by_itself():
    model = make("conv", {"groups": 4}, activation="swiglu")
    parts = {name: count for name, count in model.matrices().items() if "feed_forward" in name}
    assert parts == {
        f"blocks.{layer}.feed_forward.{name}.weight": 4 * matrices
        for layer in range(6)
        for name, matrices in (("inner", 2), ("out", 1))
    }


def test_the_rate_of_matrices_is_a_multiple_that_follows_the_schedule():
    model = make("gpt", {})
    given = {"matrix_lr": 4.0, "schedule": "wsd", "decay": 1.0, "min_lr": 0.0, "weight_decay": 0.2}
    settings = config(**given, momentum=0.7)
    optimizer = optim.Optimizer(model, settings, matrices=model.matrices())
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    optimizer.step(49)  # half of the way down, but for the last step
    for group in optimizer.muon.param_groups:
        assert group["lr"] == pytest.approx(0.01 * 4 * 0.5)
        assert (group["momentum"], group["weight_decay"]) == (0.7, 0.2)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [(0, 0.85), (50, 0.8625), (100, 0.875), (200, 0.9), (10**6, 0.9)]),
        ({"momentum_warmup": 0}, [(0, 0.9), (1, 0.9)]),
        ({"momentum": 0.5}, [(0, 0.5), (100, 0.5), (300, 0.5)]),
        ({"momentum": 0.95, "momentum_warmup": 10}, [(0, 0.85), (5, 0.9), (10, 0.95)]),
    ],
)
def test_the_momentum_rises_to_its_own(given, expected):
    model = make("gpt", {})
    optimizer = optim.Optimizer(model, config(**given), matrices=model.matrices())
    for step, value in expected:
        assert optim.momentum(step, config(**given)) == pytest.approx(value)
        model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
        optimizer.step(step)
        assert all(group["momentum"] == pytest.approx(value) for group in optimizer.muon.param_groups)


def test_its_state_is_restored_and_that_of_another_refused():
    def made(**given):
        model = make("gpt", {})
        found = optim.Optimizer(model, config(**given), matrices=model.matrices())
        model(torch.arange(8)[None]).sum().backward()
        found.step(0)
        return found

    right = made().state()
    fresh = made()
    fresh.load_state(right, "cpu")
    for number, kept in right["muon"]["state"].items():
        assert torch.equal(fresh.muon.state_dict()["state"][number]["momentum"], kept["momentum"])
    wrong = {
        "another weight_decay": made(weight_decay=0.5).state()["muon"],
        "lacks a part": right["muon"] | {"state": {number: {} for number in right["muon"]["state"]}},
        "another shape": right["muon"]
        | {"state": {number: {"momentum": torch.ones(2, 2)} for number in right["muon"]["state"]}},
    }
    for reason, state in wrong.items():
        with pytest.raises(ValueError, match=reason):
            made().load_state(right | {"muon": state}, "cpu")
