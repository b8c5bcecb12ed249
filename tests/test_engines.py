"""The torch session's engines, layouts and rungs, on the processor; device graphs from a fake that replays operators.

torch.compile takes seconds a network, so what is compiled here is small and compiled few times.
"""

import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_torch_session import GRAPH, HOLDERS, IDS, LRNS, batch, needs_onednn, precisions, random_map, random_weights
from torch.nn import functional as F
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from portnet import parity, plugins
from portnet.contract import Settings, Unsupported
from portnet.errors import PortNetError
from portnet.graph import LRN, Conv, Graph
from portnet_backends import cpu, torch_layers, torch_modes, torch_norms, torch_philox
from portnet_backends.accelerator import Accelerator
from portnet_backends.cpu import Cpu
from portnet_backends.cuda import Cuda
from portnet_backends.mps import Mps
from portnet_backends.rocm import Rocm
from portnet_backends.torch_modes import without
from portnet_backends.torch_norms import LocalResponseNorm
from portnet_backends.torch_session import Captured, TorchSession
from portnet_backends.xpu import Xpu

CASE = parity.Case(GRAPH)
CONVOLUTIONS = Graph(preset="tiny", input=GRAPH.input, layers=(GRAPH.layers[1], *GRAPH.layers[4:6]))


def session(graph=GRAPH, weights=None, backend=None, **settings):
    return (backend or Cpu()).open(graph, weights or random_weights(graph), Settings(**settings))


def judged(precision, *, train=True, **settings):
    expected = parity.expect(CASE, plugins.backends()["reference"], precision)
    return parity.judge(expected, session(CASE.gated, CASE.weights, precision=precision, **settings), train=train)


def operators(run):
    with profile() as seen:
        run()
    return [event.name for event in seen.events()]


def train(s, steps, rate=0.1, first=0):
    put = [s.put(a) for a in (*batch(), IDS)]
    return [float(s.get(s.train_step(*put, step=first + i, learning_rate=rate))) for i in range(steps)]


# The gate.


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("formulation", ["portable", "stock", "unfold"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_gate_as_it_stands(precision, formulation, channels_last):
    verdict = judged(precision, formulation=formulation, channels_last=channels_last)
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("precision", "formulation", "channels_last"),
    [("float32", "portable", False), ("bfloat16", "stock", True)],
)
def test_the_gate_compiled(precision, formulation, channels_last, monkeypatch):
    """In one graph a function, and without the function that cannot be traced."""
    monkeypatch.setattr(torch_norms._AcrossChannels, "apply", None)
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    # Compiled training in bfloat16 is judged below, with the direct formulation: each compilation takes seconds.
    train = precision == "float32"
    verdict = judged(precision, train=train, formulation=formulation, channels_last=channels_last, engine="compile")
    assert verdict.passed, verdict
    assert not breaks


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_gate_of_regions(precision, channels_last, monkeypatch):
    monkeypatch.setattr(torch_norms._AcrossChannels, "apply", None)
    verdict = judged(precision, engine="regions", channels_last=channels_last)
    assert verdict.passed, verdict
    # What a loop does for the layer before it is seen all the same.
    shown = session(precision=precision, engine="regions").trace(batch()[0]).layers
    assert list(shown) == [step.layer.name for step in GRAPH.steps]


@pytest.mark.parametrize(("precision", "engine"), [("float32", "eager"), ("bfloat16", "compile")])
def test_the_gate_of_the_direct_formulation(precision, engine):
    verdict = judged(precision, formulation="direct", engine=engine)
    assert verdict.passed, verdict


def test_a_mistake_in_what_is_compiled_is_caught(monkeypatch):
    real = torch_norms._sum_across_channels

    def merged(x, layer, wide):
        return real(x, replace(layer, groups=1), wide)

    monkeypatch.setattr(torch_norms, "_sum_across_channels", merged)
    verdict = judged("float32", engine="compile", train=False)
    assert next(f for f in verdict.findings if f.what.startswith("infer()")).share > 20


# Compiling.


@LRNS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_lrn_for_compilers(layer, dtype):
    x = random_map().detach().to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    plain, traced = (
        LocalResponseNorm(layer, 8, stock=False, engine=engine).to(wide) for engine in ("eager", "compile")
    )
    y, expected = traced(x), plain(x)
    # Both sum in float32 and round once.
    close = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2**-8, "atol": 1e-5}
    torch.testing.assert_close(y, expected, **close)
    g = random_map(seed=1).detach().to(dtype)
    gradients = (torch.autograd.grad(out, x, g)[0] for out in (y, expected))
    torch.testing.assert_close(*gradients, **(close | {"atol": 2**-7 if dtype == torch.bfloat16 else 1e-14}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("layer", "dtype"),
    [(LRNS.args[1][1], torch.float64), (LRNS.args[1][3], torch.float64), (LRNS.args[1][2], torch.bfloat16)],
)
@pytest.mark.parametrize("shape", [(5, 8, 3, 9), (2, 8, 1, 1), (1, 8, 1, 1)])
def test_lrn_in_compiled_loops(layer, dtype, layout, shape):
    """In either layout, with gradients that lie otherwise, and where there are the first and the last run alone."""
    x = random_map(shape=shape).detach().to(dtype).contiguous(memory_format=layout).requires_grad_()
    g = random_map(seed=1, shape=x.shape).detach().to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    plain, looped = (
        LocalResponseNorm(layer, 8, stock=False, engine=engine).to(wide) for engine in ("eager", "regions")
    )
    y, expected = looped(x), plain(x)
    assert y.is_contiguous(memory_format=layout)
    close = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2**-8, "atol": 2**-7}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, g)[0] for out in (y, expected)), **close)
    assert looped(x[:0]).shape == (0, *shape[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 2, 13), (3, 2, 12), (2, 3, 9)])
def test_pooling_in_one_loop_is_torchs(kernel, stride, size, dtype, monkeypatch):
    x = random_map(shape=(2, 8, size, size + 1)).detach().to(dtype)
    x[0, 1, 2, 3] = math.nan
    x = x.contiguous(memory_format=torch.channels_last)
    expected = F.max_pool2d(x, kernel, stride)
    monkeypatch.setattr(F, "max_pool2d", None)
    y = torch_layers.MaxPool2d(kernel, stride)(x)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert y.stride() == expected.stride()


def test_lrn_that_no_gradient_comes_to_keeps_nothing(monkeypatch):
    norm = LocalResponseNorm(LRN(name="n", alpha=1e-3, k=2.0), 8, stock=False, engine="regions").float()
    loops, kept = torch_norms._loops(), []

    def normed(y, root, *rest):
        kept.append(root is not None)
        loops["normed"](y, root, *rest)

    monkeypatch.setattr(torch_norms, "_loops", lambda: loops | {"normed": normed})
    x = random_map().detach().float()
    y = norm(x)
    torch.testing.assert_close(norm(x.requires_grad_()), y, rtol=0, atol=0)
    assert kept == [False, True]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_regions_take_gradients_as_they_come(accumulate):
    """And keep the weights of the next step in bfloat16, also if somebody changes the wide ones in between."""
    ours, plain = (
        session(precision="bfloat16", engine=engine, accumulate=accumulate, channels_last=True)
        for engine in ("regions", "eager")
    )
    images, labels = batch()
    for step in range(3):
        losses = []
        for s in (ours, plain):
            if step == 2:
                with torch.no_grad():
                    s.parameters["fc1.weight"].mul_(1.5)
            losses.append(float(s.train_step(*(s.put(a) for a in (images, labels, IDS)), step=step, learning_rate=0.1)))
        np.testing.assert_allclose(*losses, rtol=2**-8)
        for name, wide in ours.parameters.items():
            assert torch.equal(ours._casts[name], wide.detach().to(torch.bfloat16))
    # PyTorch's own fallback sums the images' gradients in bfloat16.
    rounding = 2.0 ** (-7 if "bfloat16" in Cpu().probe().emulated else -8)
    for name, value in plain.state().items():
        np.testing.assert_allclose(ours.state()[name], value, atol=rounding * np.abs(value).max(), err_msg=name)
    _, _, gradients = ours._backward(ours.put(images), ours.put(labels), {})
    assert {g.dtype for g in gradients.values()} == {torch.bfloat16 if accumulate == 1 else torch.float32}
    logits = [s.get(s.infer(s.put(images))) for s in (ours, plain)]
    np.testing.assert_allclose(*logits, atol=2**-6 * np.abs(logits[1]).max())


def test_a_graph_break_is_refused():
    def broken(x):
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(PortNetError, match=r"torch.compile failed: \w+: "):
        torch_modes.compiled(broken)(torch.ones(2))


def test_no_compiler_is_an_error():
    """It is named, and nothing runs as it stands."""
    missing = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with torch._inductor.config.patch(missing), pytest.raises(PortNetError, match=r"torch.compile failed: \w+: .*\S"):
        torch_modes.compiled(lambda x: x * 3 + 1)(torch.ones(7))


def test_a_disabled_compiler_is_an_error():
    with torch._dynamo.config.patch(disable=True), pytest.raises(Unsupported, match="switched off"):
        torch_modes.compiled(lambda x: x + 1)(torch.ones(2))


def test_compiled_work_is_the_sessions_own():
    """New weights, steps and rates are seen, and float32 stays float32 whatever the process asks."""
    ours, plain = session(engine="compile"), session()
    images = ours.put(batch()[0])
    before = precisions()
    first = ours.get(ours.infer(images))
    matmul = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    torch.backends.mkldnn.conv.fp32_precision = "bf16"
    try:
        np.testing.assert_array_equal(ours.get(ours.infer(images)), first)
        assert same_masks(ours.masks(IDS, step=3), plain.masks(IDS, step=3))
        for rate in (0.1, 0.01):
            assert train(ours, 2, rate, first=3) == pytest.approx(train(plain, 2, rate, first=3), rel=1e-5)
    finally:
        torch.set_float32_matmul_precision(matmul)
        for name, holder in HOLDERS.items():
            holder.fp32_precision = before[name]
    trained = ours.weights()
    for name, value in plain.weights().items():
        np.testing.assert_allclose(trained[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    changed = ours.get(ours.infer(images))
    assert (changed != first).any()
    np.testing.assert_allclose(changed, plain.get(plain.infer(images)), rtol=1e-4, atol=1e-5)


def same_masks(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


# Device graphs.


class FakeGraph(TorchDispatchMode):
    """Records operators with the tensors that they read and wrote, undoes what they changed, and replays them there.

    As on a device, what Python computed meanwhile is frozen, and a replay writes where the capture wrote.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.undo = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        infos = [argument.alias_info for argument in func._schema.arguments]
        self.undo += [(a, a.clone()) for a, info in zip(args, infos, strict=False) if info and info.is_write]
        out = func(*args, **kwargs)
        memory = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        shared = isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() in memory
        self.calls.append((func, args, kwargs, out, shared))
        return out

    def replay(self):
        for func, args, kwargs, out, shared in self.calls:
            if shared and not func._schema.is_mutable:
                continue  # a view already looks at its memory
            again = func(*args, **kwargs)
            if not shared:
                for old, new in zip(*((x if isinstance(x, tuple | list) else [x]) for x in (out, again)), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


def fake_capture(run):
    for _ in range(3):
        run()
    graph = FakeGraph()
    with graph:
        output = run()
    with torch.no_grad():
        for tensor, was in reversed(graph.undo):
            tensor.copy_(was)
        output.fill_(torch.nan)  # a capture computes nothing

    counted = tuple(t for t, _ in graph.undo if not t.is_inference())

    def replay():
        # A device's replay is nothing that torch's version counters see.
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(counted):
            graph.replay()

    return replay, output


class FakeGraphCpu(Cpu):
    engines = (*Cpu.engines, "graph", "compile-graph")


@pytest.fixture
def graphs(monkeypatch):
    """Sessions on the processor with fake graphs; the list counts the captures."""
    captured = []
    monkeypatch.setattr(TorchSession, "capture", staticmethod(lambda run: captured.append(run) or fake_capture(run)))
    return captured


def replayed_and_plain(**kwargs):
    """A session of replays and one that works as it stands, with the update of devices that can capture."""
    ours, plain = (session(backend=FakeGraphCpu(), engine=engine, **kwargs) for engine in ("graph", "eager"))
    plain._at_once = False
    return ours, plain


@pytest.mark.usefixtures("graphs")
@pytest.mark.parametrize(
    ("precision", "formulation", "channels_last"),
    [("float32", "portable", False), ("bfloat16", "portable", True), ("bfloat16", "stock", False)],
)
def test_the_gate_captured(precision, formulation, channels_last):
    verdict = judged(
        precision, backend=FakeGraphCpu(), engine="graph", formulation=formulation, channels_last=channels_last
    )
    assert verdict.passed, verdict


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_replays_see_what_is_new(precision, graphs):
    """Images, labels, ids, steps, rates and weights: bit for bit what the same work gives as it stands."""
    ours, plain = replayed_and_plain(precision=precision)
    for step, (seed, rate) in enumerate([(1, 0.1), (2, 0.1), (2, 0.1), (2, 0.01)]):
        images, labels = batch(seed)
        ids = IDS + seed
        losses, logits = [], []
        for s in (ours, plain):
            put = [s.put(a) for a in (images, labels, ids)]
            losses.append(s.get(s.train_step(*put, step=step, learning_rate=rate)))
            logits.append(s.get(s.infer(put[0])))
        np.testing.assert_array_equal(*losses)
        np.testing.assert_array_equal(*logits)
    for name, value in plain.weights().items():
        np.testing.assert_array_equal(ours.weights()[name], value, err_msg=name)
    assert len(graphs) == 2


@pytest.mark.usefixtures("graphs")
def test_results_outlive_the_next_replay():
    s = session(backend=FakeGraphCpu(), engine="graph")
    (one, labels), (other, _) = batch(1), batch(2)
    first = s.infer(s.put(one))
    kept = s.get(first)
    assert (s.get(s.infer(s.put(other))) != kept).any()
    np.testing.assert_array_equal(s.get(first), kept)
    put = [s.put(a) for a in (one, labels, IDS)]
    losses = [s.train_step(*put, step=i, learning_rate=0.1) for i in range(3)]
    assert len({float(loss) for loss in losses}) == 3


def test_a_capture_in_mid_training_changes_nothing(graphs):
    """Another batch size is another capture, whose first runs must leave weights and velocity alone."""
    ours, plain = replayed_and_plain()
    images, labels = batch()
    for step, size in enumerate((4, 2, 4, 2)):
        losses = [
            s.get(s.train_step(*(s.put(a[:size]) for a in (images, labels, IDS)), step=step, learning_rate=0.1))
            for s in (ours, plain)
        ]
        np.testing.assert_array_equal(*losses)
    np.testing.assert_array_equal(ours.weights()["fc1.weight"], plain.weights()["fc1.weight"])
    assert len(graphs) == 2


def fake_capture_of_compiled(run):
    """A fake whose replay is another run: compiled loops are no operators that `FakeGraph` could record."""
    for _ in range(3):
        run()
    output = run().clone()
    return lambda: output.copy_(run()), output


def test_what_is_compiled_can_be_captured(monkeypatch):
    """Once for inference and once for a step, of compiled functions; every input is seen through the capture's copy."""
    captured = []
    fake = staticmethod(lambda run: captured.append(run) or fake_capture_of_compiled(run))
    monkeypatch.setattr(TorchSession, "capture", fake)
    monkeypatch.setattr(torch_norms._AcrossChannels, "apply", None)
    verdict = judged("float32", backend=FakeGraphCpu(), engine="compile-graph", channels_last=True)
    assert verdict.passed, verdict
    assert len(captured) == 2


def test_what_is_frozen_shows():
    """The fake would tell: a value that Python holds does not change between replays."""
    held = [1.0]
    frozen = Captured(lambda x: x * held[0], capture=fake_capture)
    assert frozen(torch.ones(1)).item() == 1
    held[0] = 2.0
    assert frozen(torch.full((1,), 3.0)).item() == 3


def test_only_cuda_and_rocm_capture():
    found = {b.name for b in (Cpu(), Cuda(), Rocm(), Mps(), Xpu(), Accelerator()) if "graph" in b.engines}
    assert found == {"cuda", "rocm"}
    with pytest.raises(Unsupported, match="cpu has no engine 'graph'; it offers eager, compile"):
        session(engine="graph")


@pytest.mark.parametrize("p", [0.5, 0.3])
def test_masks_of_a_step_on_the_device(p):
    index = torch.tensor(IDS)
    for step in (0, 7, 2**31 + 5):
        drawn = torch_philox.keep_mask(3, 1, index, torch.tensor(step), 200, p)
        assert torch.equal(drawn, torch_philox.keep_mask(3, 1, index, step, 200, p))


# Layout.


def test_channels_last_is_the_devices_own_matter():
    s = session(channels_last=True)
    filters = [p for p in s.parameters.values() if p.dim() == 4 and p.shape[1] > 1]
    assert filters
    assert all(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in filters)
    seen = []
    s.module.conv1.register_forward_hook(lambda module, inputs, out: seen.extend([*inputs, out]))
    s.infer(s.put(batch()[0]))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in seen)
    for name, value in s.weights().items():
        assert value.shape == GRAPH.parameters[name]
        assert value.flags.c_contiguous
        np.testing.assert_array_equal(value, random_weights()[name])
    images, labels = batch()
    s.train_step(*map(s.put, (images, labels, IDS)), step=0, learning_rate=0.1)
    assert s.velocity["conv1.weight"].is_contiguous(memory_format=torch.channels_last)


# Below the library.


def test_unfold_is_one_product_a_convolution():
    s = session(CONVOLUTIONS, formulation="unfold")
    seen = operators(lambda: s.infer(s.put(batch()[0])))
    assert seen.count("aten::im2col") == seen.count("aten::baddbmm") == 2
    assert not [name for name in seen if "conv" in name]


def test_direct_calls_no_library():
    s = session(CONVOLUTIONS, formulation="direct")
    images = s.put(batch()[0])
    parameters = list(s.parameters.values())

    def run():
        s.infer(images)
        torch.autograd.grad(s.module(images).sum(), parameters)

    run()
    seen = [name for name in operators(run) if name.startswith(("aten::", "mkldnn::"))]
    assert any("pool" in name for name in seen)
    assert not [name for name in seen if any(word in name for word in ("conv", "mkldnn", "mm", "im2col", "matmul"))]


def test_rungs_are_convolutions():
    """In float64, with stride, padding and groups, and remainders at the right and the bottom."""
    x = torch.randn(2, 4, 11, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for formulation in ("unfold", "direct"):
        layer = Conv(name="c", in_channels=4, out_channels=6, kernel=3, stride=2, padding=1, groups=2)
        rung = torch_layers.layer_module(layer, 4, formulation).double()
        y, expected = rung(x), F.conv2d(x, rung.weight, rung.bias, 2, 1, 1, 2)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
        wanted = [x, rung.weight, rung.bias]
        found = (torch.autograd.grad((out**2).sum(), wanted) for out in (y, expected))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


# What can be taken away.


@needs_onednn
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_without_onednn_it_is_not_called(precision):
    images, labels = batch()

    def seen(s):
        put = [s.put(a) for a in (images, labels, IDS)]

        def run():
            s.infer(put[0])
            s.train_step(*put, step=0, learning_rate=0.1)
            s.trace(images, labels, s.masks(IDS, step=0))

        return {name for name in operators(run) if "mkldnn" in name}

    assert bool(seen(session(precision=precision))) == (precision not in Cpu().probe().emulated)
    assert not seen(session(precision=precision, without=("onednn",)))
    assert torch.backends.mkldnn.enabled
    assert judged(precision, without=("onednn",)).passed


@pytest.mark.parametrize(("name", "holder"), [("onednn", "mkldnn"), ("cudnn", "cudnn"), ("miopen", "cudnn")])
def test_what_is_switched_off_comes_back(name, holder):
    holder, seen = getattr(torch.backends, holder), []
    was = holder.enabled
    with pytest.raises(ZeroDivisionError), without((name, "avx512")):
        seen.append(holder.enabled) or 1 / 0
    assert (seen, holder.enabled) == ([False], was)


def layers(backend, **settings):
    return {layer.name: layer for layer in backend.library_layers(Settings(**settings))}


XEON = frozenset(["avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"])


@pytest.mark.parametrize(
    ("told", "emulated"),
    [
        ({"_is_mkldnn_bf16_supported": True, "_is_mkldnn_fp16_supported": False}, ("float16",)),
        ({"_is_mkldnn_bf16_supported": False, "_is_mkldnn_fp16_supported": False}, ("bfloat16", "float16")),
        ({}, ()),
    ],
    ids=["bfloat16", "neither", "a torch that does not tell"],
)
def test_what_a_processor_emulates(told, emulated):
    operators = SimpleNamespace(**{name: lambda has=has: has for name, has in told.items()})
    fake_torch = SimpleNamespace(ops=SimpleNamespace(mkldnn=operators))
    assert cpu.emulated(fake_torch) == emulated


@pytest.mark.parametrize(
    ("flags", "precision", "amx", "avx512"),
    [
        (XEON, "bfloat16", "", ""),
        (XEON, "float32", "float32 is not computed on AMX", ""),
        (XEON, "float64", "float64 is not computed on AMX", ""),
        (XEON, "float16", "the processor's AMX has no float16", ""),
        (XEON | {"amx_fp16"}, "float16", "", ""),
        (frozenset({"avx2"}), "bfloat16", "the processor has no AMX", "the processor has no AVX-512"),
        (frozenset(), "bfloat16", "the processor has no AMX", "the processor has no AVX-512"),
    ],
)
def test_layers_of_a_processor(flags, precision, amx, avx512, monkeypatch):
    monkeypatch.setattr(cpu, "instruction_sets", lambda: flags)
    found = layers(Cpu(), precision=precision)
    assert list(found) == ["amx", "avx512", "onednn", "unfold", "direct"]
    for name, missing in (("amx", amx), ("avx512", avx512)):
        assert found[name].missing.startswith(missing)
        assert bool(found[name].missing) == bool(missing)
    assert found["amx"].environment == {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16" if "avx512_fp16" in flags else "AVX512_CORE_BF16"
    }
    assert found["avx512"].environment == {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
    assert bool(found["avx512"].note) == (precision in ("bfloat16", "float16"))


def test_layers_of_the_others():
    assert list(layers(Cuda(), engine="compile-graph"))[:2] == ["compile-graph", "tensor-cores"]
    assert list(layers(Cuda(), engine="graph")) == ["graph", "tensor-cores", "cudnn", "unfold", "direct"]
    assert list(layers(Rocm(), engine="compile")) == ["compile", "matrix-cores", "miopen", "unfold", "direct"]
    for backend in (Mps(), Xpu()):
        assert list(layers(backend, engine="compile")) == ["compile", "unfold", "direct"]
    assert list(layers(Accelerator())) == ["unfold"]
    for backend, name in ((Cuda(), "tensor-cores"), (Rocm(), "matrix-cores")):
        for precision in ("tf32", "bfloat16", "float16"):
            layer = layers(backend, precision=precision)[name]
            assert (layer.replace, layer.missing) == ({"precision": "float32"}, "")
        assert layers(backend, precision="float32")[name].missing


def test_only_what_is_left_can_be_taken_away():
    assert list(layers(Cuda(), formulation="unfold"))[-2:] == ["cudnn", "direct"]
    assert list(layers(Cuda(), formulation="direct"))[-1] == "cudnn"
    assert layers(Cpu(), engine="compile")["compile"].replace == {"engine": "eager"}
    assert layers(Cpu(), engine="regions")["regions"].replace == {"engine": "eager"}
    assert not {"compile", "regions"} & set(layers(Cpu()))
    with pytest.raises(Unsupported, match=r"cpu cannot take away cudnn; it can: amx, avx512, onednn, unfold, direct"):
        session(without=("cudnn",))


def test_layers_are_known_without_torch():
    code = (
        "import sys; from portnet import plugins; from portnet.contract import Settings\n"
        "for b in plugins.backends().values(): b.library_layers(Settings())\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_what_instruction_sets_cost_is_told_to_a_fresh_process():
    """The environment bites: PyTorch's kernels answer for themselves, and oneDNN through its log."""
    layer = layers(Cpu())["avx512"]
    if layer.missing:
        pytest.skip(layer.missing)
    code = (
        "import torch; print(torch.backends.cpu.get_cpu_capability())\n"
        "x = torch.ones(2, 16, 9, 9); torch.conv2d(x, torch.ones(16, 16, 3, 3))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **layer.environment, "ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert run.stdout.startswith("AVX2") or "\nAVX2\n" in run.stdout
    assert "cpu,isa:Intel AVX2" in run.stdout
