"""Each layer's sizes, gradients, logit lens and CKA, against plain formulas in double precision."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from test_models import ARMS, attended, fed, head, ids, make, read_taps
from torch.nn import functional as F

from shortcut_cli.inference.layers import LayerSums
from shortcut_cli.models.options import ShortcutOptions

SHAPE = {"layers": 3, "width": 16, "heads": 2, "ffn": 24}


def measured(model, *batches):
    sums = LayerSums(model)
    with torch.no_grad():  # as in the stage
        for batch in batches:
            sums.add(batch)
    return sums.result()


def rms(x):
    return np.sqrt(np.mean(np.square(x.detach().numpy())))


def plain_states(model, x):
    """What each layer and the head read, with gradients kept, and what attention and feed-forward add: of gpt."""
    states, added = [model.embedding.weight[x]], []
    for layer in range(len(model.blocks)):
        states[-1].retain_grad()
        y = attended(model, layer, states[-1])
        added.append((y, fed(model, layer, states[-1] + y)))
        states.append(states[-1] + y + added[-1][1])
    states[-1].retain_grad()
    return states, added


def kornblith(x, y):
    """Linear CKA of (N, D) by its formula."""
    x, y = x - x.mean(0), y - y.mean(0)
    return np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


def by_kernels(x, y):
    """The same by the HSIC of Gram matrices, centred on both sides."""
    n = len(x)
    centre = np.eye(n) - 1 / n
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))


def test_every_number_of_a_layer_is_that_of_the_formula():
    """In two batches of different sizes, whose sums make up the whole."""
    model = make("gpt", {}, open_gates=True, **SHAPE).eval()
    windows = ids(rows=5, length=8)
    found = measured(model, windows[:3], windows[3:])
    slow = deepcopy(model).double()
    states, added = plain_states(slow, windows[:, :-1])
    head(slow, states[-1])
    targets = windows[:, 1:].flatten()
    F.cross_entropy(head(slow, states[-1]).flatten(0, 1), targets, reduction="sum").backward()
    near = lambda x: pytest.approx(x, rel=1e-4)  # noqa: E731
    for number, (entry, state) in enumerate(zip(found["layers"], states, strict=True)):
        with torch.no_grad():
            lens = F.cross_entropy(head(slow, state).flatten(0, 1), targets).item()
        assert entry == {
            "state": f"layer {number}" if number else "embedding",
            "lens_nats_per_token": near(lens),
            "state_rms": near(rms(state)),
            "gradient_rms": near(rms(state.grad)),
            "attention_rms": near(rms(added[number - 1][0])) if number else None,
            "feed_forward_rms": near(rms(added[number - 1][1])) if number else None,
        }
    assert found["cka"]["states"] == ["embedding", "layer 1", "layer 2", "layer 3"]
    flat = [state.detach().flatten(0, 1).numpy() for state in states]
    for i, x in enumerate(flat):
        for j, y in enumerate(flat):
            assert found["cka"]["matrix"][i][j] == near(kornblith(x, y)) == near(by_kernels(x, y))
    assert kornblith(flat[0], flat[3]) < 0.9  # or a matrix of ones would do
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_gradient_of_a_tapped_state_comes_from_all_its_readers():
    model = make("shortcut", {"taps": "1,2"}, open_gates=True, **SHAPE).eval()
    windows, slow = ids(rows=3, length=8), deepcopy(model).double()
    states = [slow.embedding.weight[windows[:, :-1]]]
    for layer in range(2):
        states[-1].retain_grad()
        y = states[-1] + attended(slow, layer, states[-1])
        states.append(y + fed(slow, layer, y))
    states[-1].retain_grad()
    y, _ = read_taps(slow, states, ShortcutOptions(taps="1,2"), [1, 2])
    F.cross_entropy(head(slow, y).flatten(0, 1), windows[:, 1:].flatten(), reduction="sum").backward()
    found = measured(model, windows)["layers"]
    assert [entry["gradient_rms"] for entry in found[:3]] == pytest.approx([rms(x.grad) for x in states], rel=1e-4)


@pytest.mark.parametrize(("name", "options"), ARMS)
def test_in_every_architecture_the_head_reads_the_last_state(name, options):
    model, windows = make(name, options, open_gates=True).eval(), ids(rows=3, length=8)
    found = measured(model, windows)
    with torch.no_grad():
        nats = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).item()
    assert found["layers"][-1]["lens_nats_per_token"] == pytest.approx(nats, rel=1e-5)
    assert len(found["layers"]) == model.config.layers + 1
    for entry in found["layers"]:
        assert all(value > 0 for key, value in entry.items() if key != "state" and value is not None), entry
    matrix = np.array(found["cka"]["matrix"])
    assert np.allclose(matrix.diagonal(), 1)
    assert np.allclose(matrix, matrix.T)
    assert (matrix >= 0).all()
    assert (matrix <= 1 + 1e-9).all()


def test_a_state_that_is_the_same_everywhere_is_like_none():
    model = make("gpt", {}, **SHAPE).eval()
    with torch.no_grad():
        model.embedding.weight.fill_(0.5)
    found = measured(model, ids(rows=2, length=4))
    assert found["cka"]["matrix"][0] == [None] * 4
