"""The path of a GPU, without one: shapes, devices and kernels on a fake `cuda`, and steps that never wait for a device.

Under FakeTensorMode torch computes the shape, dtype and device of every result of a device that isn't there, and
refuses to mix devices. What it can't show is a number.
"""

import importlib.util
from collections import Counter

import pytest
import torch
from test_models import ARMS, make
from test_training import made, tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from shortcut_cli.config import schema
from shortcut_cli.kernels import attention
from shortcut_cli.models.loss import loss
from shortcut_cli.models.trace import Change, Trace
from shortcut_cli.training import compiling, parallel, precision
from shortcut_cli.training.optim import Optimizer

CUDA = "cuda:0"
CONTEXT = 24


def gradients(node, given):
    """What a node of the graph returns for each input that needs a gradient."""
    if callable(node):  # written in C++
        returned = node(*given)
        returned = returned if isinstance(returned, tuple) else (returned,)
        needed = [below is not None for below, _ in node.next_functions]
    else:
        returned, needed = node.apply(*given), node.needs_input_grad
        returned = returned if isinstance(returned, tuple) else (returned,)
    return [grad for grad, wanted in zip(returned, needed, strict=True) if wanted]


@torch.no_grad()
def walk_back(loss):
    """`loss.backward()`, without autograd's engine, which asks the driver for its streams.

    Every node of the graph gets the gradients of its outputs, and may only return such as fit what it read.
    """
    waiting, nodes = Counter(), [loss.grad_fn]
    for node in nodes:
        for below, _ in node.next_functions:
            if below is not None:
                waiting[below] += 1
                if waiting[below] == 1:
                    nodes.append(below)
    found, ready = {loss.grad_fn: {0: torch.ones_like(loss)}}, [loss.grad_fn]
    while ready:
        node = ready.pop()
        grads = found.pop(node, {})
        if hasattr(node, "variable"):
            node.variable.grad = grads[0].detach()
            continue
        given = [grads.get(number) for number in range(len(node._input_metadata))]
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        for (below, number), grad in zip(edges, gradients(node, given) if grads else [None] * len(edges), strict=True):
            waiting[below] -= 1
            if waiting[below] == 0:
                ready.append(below)
            if grad is not None:
                wanted, sums = below._input_metadata[number], found.setdefault(below, {})
                assert grad.device == wanted.device, (node, below)
                fitting = grad.sum_to_size(wanted.shape).to(wanted.dtype)
                sums[number] = sums[number] + fitting if number in sums else fitting


def test_walking_back_gives_autograds_gradients():
    ids = torch.arange(2 * CONTEXT).view(2, CONTEXT) % 37
    for name in ("shortcut", "mudd", "hyper"):
        model = make(name, {})
        loss(model(ids), ids).backward()
        wanted = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        walk_back(loss(model(ids), ids))
        for parameter, grad in zip(model.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, grad)


@pytest.fixture
def driver(monkeypatch):
    """What torch would ask a driver for. Returns a function that chooses the kernel for attention."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)

    def choose(kernel):
        monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda _: kernel == "flash")
        monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", lambda _: kernel == "efficient")

    return choose


WAITING = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique_consecutive"}


class Waited(Exception):
    pass


class NeverWaiting(TorchDispatchMode):
    """Fails if an operation waits for the device: one that reads a number, or copies from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        by_mask = name.startswith("index") and any(
            index is not None and index.dtype == torch.bool for index in (args[1] if isinstance(args[1], list) else [])
        )
        if name in WAITING or by_mask:  # torch counts a mask's ones to know the shape
            raise Waited(name)
        found = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            if source.device.type != "cpu" and found.device != source.device:
                raise Waited("a copy from the device")
        return found


def waits(work):
    with NeverWaiting():
        try:
            work()
        except Waited as error:
            return str(error)
    return ""


def test_waiting_is_noticed():
    x = torch.ones(3)
    assert waits(lambda: x.sum().item()) == waits(x.sum().__float__) == "_local_scalar_dense"
    assert waits(lambda: bool(x.any())) in ("is_nonzero", "_local_scalar_dense")
    assert (waits(lambda: x[x > 0]), waits(x.nonzero)) == ("index", "nonzero")
    with FakeTensorMode():
        x = torch.ones(3, device=CUDA)
        assert waits(x.cpu) == waits(lambda: torch.ones(3).copy_(x)) == "a copy from the device"
        assert waits(lambda: torch.ones(3).to(CUDA)) == ""


@pytest.mark.parametrize(
    "settings", [(), ("train.optimizer=muon",), ("train.accumulation=2", "train.ema=0.9", "model.dropout=0.1")]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_never_waits_for_the_device(text_run, tmp_path, settings, precision):
    trainer = made(text_run, tmp_path, f"train.precision={precision}", *settings)
    with NeverWaiting():
        for number in range(3):
            trainer.step(number)


def test_batches_are_pinned_and_copied_without_waiting(text_run, tmp_path, monkeypatch):
    trainer = made(text_run, tmp_path)
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pin") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *x, **y: calls.append((x, y)) or self)
    trainer.device = CUDA
    trainer._moved(torch.zeros(2))
    assert calls == ["pin", ((CUDA,), {"non_blocking": True})]


def on_fake_gpu(name, options):
    with torch.device(CUDA):
        return make(name, options, seed=None, dropout=0.1, layers=4), torch.zeros(2, CONTEXT, dtype=torch.int64)


# Arms that merge attention run it in each kernel.
CASES = [(*arm, "bf16", "flash") for arm in ARMS]
CASES += [
    (name, options, *gpu)
    for name, options in (("shortcut", {}), ("shortcut_gated", {}), ("moda", {}))
    for gpu in (("fp32", "efficient"), ("bf16", ""))
]


@pytest.mark.parametrize(("name", "options", "wanted", "kernel"), CASES)
def test_every_arm_trains_scores_and_samples_on_a_gpu(name, options, wanted, kernel, driver, text_run):
    driver(kernel)
    train = tiny(text_run, "train.ema=0.9", "train.optimizer=muon").train
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, ids = on_fake_gpu(name, options)
        optimizer = Optimizer(model, train, model.routers(), 1.0, model.matrices(), model.decays(), model.rates())
        assert {group["params"][0].device for group in optimizer.muon.param_groups} == {torch.device(CUDA)}
        with NeverWaiting():
            with precision.products(wanted, CUDA):
                logits = model(ids)
            nats = loss(logits, ids)
            walk_back(nats)
            norm = optimizer.clip()
            assert {parameter.grad.device for parameter in model.parameters()} == {torch.device(CUDA)}
            optimizer.step(0)
        assert {logits.device, nats.device, norm.device} == {torch.device(CUDA)}
        assert (nats.dtype, nats.shape, norm.shape) == (torch.float32, (), ())
        model.eval()
        with torch.no_grad(), precision.products(wanted, CUDA):
            cache = model.new_cache(2, CONTEXT)
            assert model(ids[:, :10], cache).shape == model(ids[:, 10:20], cache).shape
            assert model(ids[:, 20:21], cache).device == torch.device(CUDA)
            trace = Trace(measure_distances=True, keep_states=True)
            model(ids, trace=trace)
            for kind in ("masked", "shuffled", "mean_ablated") if model.reads() else ():
                changed = model(ids, trace=Trace(Change(kind)))
                assert (changed.device, changed.dtype) == (torch.device(CUDA), logits.dtype)
        seen = [*trace.weights.values(), *trace.distances.values(), *trace.states]
        assert {each.device for each in seen} == {torch.device(CUDA)}
        last = {(2, 4, len(model.taps), CONTEXT)} if model.taps else set()
        assert {each.shape for each in trace.distances.values()} == last


@pytest.mark.parametrize("name", ["shortcut", "shortcut_pool"])
def test_a_gpu_merges_the_attention_to_taps_in_its_flash_kernel(name, driver, monkeypatch):
    driver("flash")
    ran = []
    plain = attention.fused
    note = lambda kernel, *x: ran.append((kernel, *(each.dtype for each in x))) or plain(kernel, *x)  # noqa: E731
    monkeypatch.setattr(attention, "fused", note)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, ids = on_fake_gpu(name, {"taps": "all"})
        with precision.products("bf16", CUDA):
            model(ids)
    # The kernel takes no fp32, nor a mixture.
    assert ran == [("flash", *[torch.bfloat16] * 3)] * 3


class AnotherKernel:
    """The CPU's fused kernel, called as one of a GPU: so the merging of its results can be checked in numbers."""

    def __init__(self, kernel):
        self.kernel, self.random = kernel, (torch.tensor(1), torch.tensor(2))

    def __getattr__(self, name):
        def call(*arguments):
            backward, forward = (f"_scaled_dot_product_{self.kernel}_attention{end}" for end in ("_backward", ""))
            assert name in (backward, forward)
            q, k, v, *more = arguments[1:] if name == backward else arguments
            if name == forward:
                assert more == ([0.0, True] if self.kernel == "flash" else [None, True, 0.0, True])
                out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
                padded = F.pad(lse, (0, 32 - lse.shape[2]), value=torch.inf)
                lengths = None, None, q.shape[2], k.shape[2]
                return (
                    (out, lse, *lengths, *self.random, None) if self.kernel == "flash" else (out, padded, *self.random)
                )
            if self.kernel == "flash":
                out, lse, *rest = more
                assert rest == [None, None, q.shape[2], k.shape[2], 0.0, True, *self.random]
            else:
                bias, out, lse, *rest = more
                assert bias is None
                assert rest == [*self.random, 0.0, [True, True, True, False], True]
                assert lse.shape[2] == 32
                lse = lse[..., : q.shape[2]].contiguous()
            cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
            return (*cpu(arguments[0], q, k, v, out, lse, 0.0, True), None)

        return call


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_merging_a_gpus_kernels_gives_the_plain_attention(kernel, monkeypatch):
    monkeypatch.setattr(attention, "aten", AnotherKernel(kernel))
    monkeypatch.setattr(attention, "kernel_for", lambda *_: kernel)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=draw).requires_grad_() for shape in [(2, 3, 5, 8)] + [(2, 3, 5, 4, 8)] * 2)
    below = [torch.randn(2, 3, 5, 8, generator=draw).requires_grad_() for _ in range(4)]
    scale = torch.randn(2, 3, 5, 8, generator=draw)
    for fast, plain, arguments in (
        (attention.attend_sources, attention.plain_attend_sources, (q, k, v)),
        (
            attention.attend_with_depth,
            attention.plain_attend_with_depth,
            (q, k[:, :, :, 0], v[:, :, :, 0], below[:2], below[2:]),
        ),
    ):
        found = []
        for function in (fast, plain):
            y = function(*arguments)
            y = y[0] if isinstance(y, tuple) else y
            leaves = [q, k, v, *(below if fast is attention.attend_with_depth else [])]
            found.append([y, *torch.autograd.grad((y * scale).sum(), leaves)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "width", "kernel"), [(torch.bfloat16, 64, "flash"), (torch.float32, 64, ""), (torch.bfloat16, 512, "")]
)
def test_a_compiled_step_asks_the_driver_nothing(dtype, width, kernel, monkeypatch):
    """torch.compile can't trace the questions."""

    def asked(*_):
        raise AssertionError

    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", asked)
    with FakeTensorMode():
        q = torch.zeros(1, 2, 8, width, device=CUDA, dtype=dtype)
    assert attention.kernel_for(q, q, q) == kernel


@pytest.mark.parametrize(
    ("device", "accumulation", "mode"), [(CUDA, 1, "reduce-overhead"), (CUDA, 2, None), ("cpu", 1, None)]
)
def test_passes_are_cuda_graphs_unless_their_gradients_add_up(
    device, accumulation, mode, text_run, tmp_path, monkeypatch
):
    """The second of two passes would overwrite the gradients of the first, which live in the memory of the graph."""
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, mode: asked.append(mode) or function)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    trainer = made(text_run, tmp_path, f"train.accumulation={accumulation}", "train.compile=true")
    assert asked == [None]
    trainer.device = device
    trainer.connect(parallel.ALONE)
    assert asked[1:] == [mode]


@pytest.fixture
def can_compile(tmp_path, monkeypatch):
    """A machine with all that torch.compile needs on its GPU, and a folder for programs that are found."""
    compiler = tmp_path / "cc"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "triton" or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    return tmp_path


def compiles(*settings, steps=2000, device=CUDA, processes=1):
    config = schema.TrainConfig(steps=steps, batch_size=4, lr=1e-3, **dict(settings))
    return compiling.choose(config, device, processes)


def test_long_runs_on_a_gpu_are_compiled(can_compile):
    assert compiles()
    assert compiles(device="cuda:1")
    assert not compiles(steps=1999)
    assert not compiles(device="cpu")
    assert not compiles(device="mps")
    assert not compiles(processes=2)


@pytest.mark.parametrize("given", [{"device": "cpu"}, {"steps": 1}, {"processes": 2}, {}])
@pytest.mark.parametrize("wanted", [False, True])
def test_what_is_said_of_compilation_is_done(wanted, given, can_compile):
    assert compiles(("compile", wanted), **given) is wanted


def test_without_a_c_compiler_nothing_is_compiled(can_compile, monkeypatch):
    for name in ("gcc", "clang", "other"):
        (can_compile / "cc").rename(can_compile / name)
        assert compiles() == (name != "other")
        (can_compile / name).rename(can_compile / "cc")
    (can_compile / "cc").rename(can_compile / "other")
    monkeypatch.setenv("CC", "other")
    assert compiles()


def test_without_triton_nothing_is_compiled(can_compile, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert not compiles()


def test_for_a_gpu_that_triton_does_not_know_nothing_is_compiled(can_compile, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert not compiles()
