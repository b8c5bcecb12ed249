"""Ceilings, single layers, fallbacks, events and memory of a torch device: on the processor, and on fakes of others."""

import subprocess
import sys
from ast import literal_eval
from dataclasses import replace
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_probes import fake_amd, fake_intel, fake_nvidia, fake_torch
from test_torch_session import needs_onednn

from portnet.contract import Ceilings, Settings, Unsupported
from portnet.graph import LRN, Conv, Dropout, Flatten, Graph, Linear, MaxPool, Pad, ReLU
from portnet_backends import timing, torch_probe
from portnet_backends.cpu import Cpu
from portnet_backends.cuda import Cuda
from portnet_backends.mps import Mps
from portnet_backends.reference import Reference
from portnet_backends.rocm import Rocm
from portnet_backends.torch_modes import without
from portnet_backends.xpu import Xpu

CPU = torch.device("cpu")

GRAPH = Graph(
    preset="tiny",
    input=(3, 15, 15),
    layers=(
        Pad(name="pad", right=1, bottom=1),
        Conv(name="conv1", in_channels=3, out_channels=8, kernel=3),
        ReLU(name="relu1"),
        LRN(name="norm1", alpha=0.5, k=2.0, groups=2),
        MaxPool(name="pool1"),
        Flatten(name="flat"),
        Dropout(name="drop1", p=0.5),
        Linear(name="fc1", in_features=288, out_features=5),
    ),
)
NAMES = [layer.name for layer in GRAPH.layers]


def session(backend=None, **settings):
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape, np.float32) / 8 for name, shape in GRAPH.parameters.items()}
    return (backend or Cpu()).open(GRAPH, weights, Settings(**settings))


def images(batch=4):
    return np.random.default_rng(1).standard_normal((batch, *GRAPH.input), np.float32)


# Blocks.


class FakeClock:
    """Time that passes only when `work` is done or `wait` waits."""

    def __init__(self, monkeypatch, work, wait=0.0):
        self.now, self.each, self.pause, self.calls, self.waits = 0.0, work, wait, 0, 0
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)

    def work(self):
        self.calls += 1
        self.now += self.each

    def wait(self):
        self.waits += 1
        self.now += self.pause


def test_blocks_last_long_enough_and_end_in_the_wait(monkeypatch):
    clock = FakeClock(monkeypatch, 0.001, wait=0.008)
    found = timing.blocks(clock.work, clock.wait, seconds=0.02, repeats=4)
    assert len(found) == 4
    # All of a block's waiting is in it, and it is long: else each would be 0.009.
    assert all(0.001 + 0.008 / 12 >= t > 0.001 for t in found), found
    assert max(found) - min(found) < 1e-12
    assert clock.waits >= 6


def test_blocks_warm_up(monkeypatch):
    clock = FakeClock(monkeypatch, 1.0)
    clock.each = 5.0

    def work():
        clock.work()
        clock.each = 1.0

    assert timing.blocks(work, clock.wait, seconds=0.02, repeats=3) == [1.0] * 3


def test_blocks_keep_to_their_budget(monkeypatch):
    clock = FakeClock(monkeypatch, 1.0)
    assert len(timing.blocks(clock.work, clock.wait, seconds=0.02, repeats=9, budget=4.5)) == 3
    assert len(timing.blocks(clock.work, clock.wait, seconds=0.02, repeats=9, budget=0.1)) == 1


def test_the_typical_time_is_the_median(monkeypatch):
    monkeypatch.setattr(timing, "blocks", lambda *_, **__: [9.0, 1.0, 2.0])
    assert timing.typical(lambda: None, lambda: None) == 2.0


def test_ceilings_count_flops_and_bytes(monkeypatch):
    """At 1 ms a product the larger is the faster, and a copy of 5 MB in 1 ms is 5 GB/s."""
    clock = FakeClock(monkeypatch, 0.001)
    found = timing.ceilings(lambda n: clock.work, (10, 20), (clock.work, 5_000_000), clock.wait, budget=9.0)
    assert found.flops == pytest.approx(2 * 20**3 / 0.001)
    assert found.bandwidth == pytest.approx(5e9)
    assert found.samples.keys() == {"copy_5000000", "matmul_10", "matmul_20"}
    assert found.samples["matmul_10"] == pytest.approx((2e6,) * 5)


def test_ceilings_stop_where_time_or_memory_ends(monkeypatch):
    clock = FakeClock(monkeypatch, 0.1)
    asked = []

    def product(n):
        asked.append(n)
        clock.each = n**3 / 1e6
        return clock.work if n < 500 else None

    found = timing.ceilings(product, (100, 110, 1000, 1100), None, clock.wait, budget=15.0)
    assert asked == [100, 110]
    assert (found.bandwidth, found.flops) == (None, pytest.approx(2e6))
    assert timing.ceilings(lambda n: None, (1, 2), None, clock.wait, budget=9.0) == Ceilings(flops=None, bandwidth=None)


# Ceilings of real processors: orders of magnitude.


@pytest.mark.parametrize("backend", [Cpu(), Reference()], ids=lambda b: b.name)
def test_a_processors_ceilings(backend, monkeypatch):
    before = torch.get_rng_state()
    found = backend.ceilings("float32")
    assert 1e9 < found.flops < 1e14
    assert 1e8 < found.bandwidth < 2e12
    rates = [max(rates) for name, rates in found.samples.items() if "matmul_" in name]
    assert found.flops == max(rates)
    assert torch.equal(torch.get_rng_state(), before), "a global generator was moved"


@needs_onednn
@pytest.mark.parametrize(("slow", "best"), [("_product", "onednn_matmul_"), ("_onednn_product", "matmul_")])
def test_the_faster_library_makes_the_ceiling(slow, best, monkeypatch):
    real = getattr(torch_probe, slow)
    monkeypatch.setattr(torch_probe, slow, lambda *operands: (sleep(0.2), real(*operands)))
    found = Cpu().ceilings("float32")
    assert found.flops == max(max(rates) for name, rates in found.samples.items() if name.startswith(best))
    with without(["onednn"]):
        assert not any("onednn" in name for name in Cpu().ceilings("float32").samples)


def test_ceilings_are_measured_in_the_asked_precision(monkeypatch):
    seen = []

    def spy(product, sizes, copy, wait, *, budget):
        product(1024)()
        mode = torch.backends.mkldnn.matmul.fp32_precision
        seen.append((torch.mm.dtype, mode, copy and copy[1], budget))
        return Ceilings(flops=1.0, bandwidth=1.0)

    real = torch.mm

    def mm(a, b, *, out):
        mm.dtype = out.dtype
        assert a.dtype == b.dtype == out.dtype
        return real(a, b, out=out)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(timing, "ceilings", spy)
    monkeypatch.setattr(torch_probe, "_free_memory", lambda device: 2**27)
    monkeypatch.setattr(torch_probe, "has_onednn", lambda: False)
    for precision in ("float64", "float32", "bfloat16", "float16"):
        torch_probe.ceilings(CPU, lambda: None, precision)
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    assert [s[0] for s in seen] == dtypes
    assert {s[1] for s in seen} == {"ieee"}
    assert {s[2] for s in seen} == {2 * 2**25}
    torch_probe.ceilings(CPU, lambda: None, "tf32")
    assert seen[-1][1] == "tf32"


def test_ceilings_spare_memory(monkeypatch):
    monkeypatch.setattr(torch_probe, "_free_memory", lambda device: 2**24)

    def spy(product, sizes, copy, wait, *, budget):
        assert product(1024) is None  # three of 4 MiB are more than half of 16 MiB
        assert copy is None or copy[1] == 2 * 2**22
        return Ceilings(flops=None, bandwidth=None)

    monkeypatch.setattr(timing, "ceilings", spy)
    torch_probe.ceilings(CPU, lambda: None, "float32")


def test_ceilings_of_a_precision_that_is_not_offered():
    with pytest.raises(Unsupported, match="does not compute in 'tf32'"):
        Cpu().ceilings("tf32")


# Layers.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bfloat16"},
        {"precision": "bfloat16", "formulation": "stock"},
        {"precision": "float64", "channels_last": True},
        {"formulation": "unfold"},
    ],
    ids=str,
)
def test_every_layer_has_its_times(settings):
    s = session(**settings)
    before = s.weights()
    inferred = torch_probe.layer_times(s, images(), training=False, seconds=1e-3, repeats=1)
    assert list(inferred) == NAMES
    assert all(t.forward > 0 and t.backward is None for t in inferred.values())
    trained = torch_probe.layer_times(s, images(), training=True, seconds=1e-3, repeats=1)
    assert list(trained) == NAMES
    # The gradient ends at the first weights: nothing goes back through the padding.
    assert [name for name, t in trained.items() if t.backward is None] == ["pad"]
    assert all(np.array_equal(before[name], value) for name, value in s.weights().items())
    assert not any(layer._forward_pre_hooks for layer in s.module.children())


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_whose_work_the_next_one_does_has_no_times(training):
    s = session(precision="bfloat16", engine="regions", channels_last=True)
    found = torch_probe.layer_times(s, images(), training=training, seconds=1e-3, repeats=1)
    assert list(found) == [name for name in NAMES if name != "relu1"]
    assert all(t.forward > 0 for t in found.values())
    assert [name for name, t in found.items() if t.backward is None] == (["pad"] if training else list(found))


def test_the_contracts_call_says_whether_it_trains(monkeypatch):
    s = session()
    calls = []
    monkeypatch.setattr(torch_probe, "layer_times", lambda *a, **k: calls.append((a[0], k)) or {})
    s.layer_times(images())
    s.layer_times(images(), np.zeros(4, np.int64))
    assert calls == [(s, {"training": False}), (s, {"training": True})]


@pytest.mark.parametrize("training", [False, True])
def test_layers_are_timed_on_what_they_get_in_the_network(training, monkeypatch):
    """The input of each is the output of the one before, as `trace` tells it, and dropout has its mask."""
    s = session()
    masks = s.masks(np.arange(4), step=0)
    trace = s.trace(images(), *((np.zeros(4, np.int64), masks) if training else ()))
    seen = {}

    def spy(session, layer, x, mask, training, behind_weights, **_):
        name = next(n for n, m in s.module.named_children() if m is layer)
        seen[name] = (x, mask, training, layer.training, behind_weights)

    monkeypatch.setattr(torch_probe, "_layer_time", spy)
    torch_probe.layer_times(s, images(), training=training)
    for name, before in zip(NAMES[1:], NAMES, strict=False):
        np.testing.assert_allclose(seen[name][0].numpy(), trace.layers[before], rtol=1e-5, atol=1e-6)
        assert seen[name][2:4] == (training, training)
    assert [name for name in NAMES if seen[name][4]] == NAMES[2:]
    given = {name: mask for name, (_, mask, *_) in seen.items() if mask is not None}
    assert given.keys() == ({"drop1"} if training else set())
    for name, mask in given.items():
        np.testing.assert_array_equal(mask.numpy(), masks[name])


def test_layers_are_timed_as_the_session_is_set(monkeypatch):
    """Precision, layout and what is switched off hold while a layer runs."""
    seen = []
    real = timing.typical

    def spy(work, wait, **_):
        seen.append((torch.backends.mkldnn.enabled, torch.backends.mkldnn.conv.fp32_precision))
        # Compiled code that may reuse what it kept cannot run backward twice.
        assert not torch._functorch.config.donated_buffer
        return real(work, wait, seconds=1e-4, repeats=1)

    monkeypatch.setattr(timing, "typical", spy)
    s = session(channels_last=True)
    s.settings = replace(s.settings, without=("onednn",))
    found = torch_probe._inputs(s, images(), None)
    assert found["relu1"].is_contiguous(memory_format=torch.channels_last)
    torch_probe.layer_times(s, images(), training=True)
    assert set(seen) == {(False, "ieee")}
    assert torch.backends.mkldnn.enabled


def test_the_work_of_a_layer_is_its_own(monkeypatch):
    """What is timed is the layer's output, and the gradients that the network needs of it."""
    s, done = session(precision="bfloat16"), []

    def spy(work, wait, **_):
        done.append(work())
        return 1.0

    monkeypatch.setattr(timing, "typical", spy)
    torch_probe.layer_times(s, images(), training=True)
    y, (dw, db, *dx) = done[1], done[2]  # behind pad's: conv1 forward and backward
    assert (y.shape, y.dtype) == ((4, 8, 14, 14), torch.bfloat16)
    # Its weights' gradients are float32 as the weights are; of the image none is owed.
    assert (dw.shape, dw.dtype, db.shape, dx) == ((8, 3, 3, 3), torch.float32, (8,), [])
    y, (dw, db, dx) = done[-2], done[-1]
    assert (y.shape, dw.shape, dx.shape, dx.dtype) == ((4, 5), (5, 288), (4, 288), torch.bfloat16)


def test_a_compiled_sessions_layers_are_compiled_singly(monkeypatch):
    compiled = []

    def spy(function):
        compiled.append(function)
        return function

    s = session(engine="compile")
    monkeypatch.setattr(torch_probe, "compiled", spy)
    torch_probe.layer_times(s, images(), training=False, seconds=1e-4, repeats=1)
    assert len(compiled) == len(NAMES)
    torch_probe.layer_times(session(), images(), training=False, seconds=1e-4, repeats=1)
    assert len(compiled) == len(NAMES)


def test_a_compiled_layer_runs_backward_again_and_again():
    """Which torch forbids where compiled code may reuse what it kept."""
    graph = Graph(
        preset="two",
        input=(3, 4, 4),
        layers=(
            Conv(name="conv1", in_channels=3, out_channels=4, kernel=1),
            LRN(name="norm1", alpha=0.5, k=2.0),
        ),
    )
    weights = {name: np.ones(shape, np.float32) for name, shape in graph.parameters.items()}
    s = Cpu().open(graph, weights, Settings(engine="compile"))
    found = torch_probe.layer_times(s, np.ones((2, 3, 4, 4), np.float32), training=True, seconds=1e-4, repeats=2)
    assert all(t.forward > 0 and t.backward > 0 for t in found.values())


def test_the_reference_times_its_layers():
    found = session(Reference()).layer_times(images(1), np.zeros(1, np.int64))
    assert list(found) == NAMES
    assert all(t.forward > 0 and t.backward is None for t in found.values())


# Fallbacks, events, memory.


def fake_event(name, parent=None):
    return SimpleNamespace(name=name, cpu_parent=parent)


def test_fallbacks_are_called_after_the_outermost_operator():
    step = fake_event("autograd::engine::evaluate_function: ReluBackward0")
    first, second = fake_event("aten::linear", step), fake_event("aten::linear")
    inner = fake_event("aten::addmm", first)
    again = fake_event("aten::addmm", second)
    events = [
        fake_event("aten::_to_cpu", inner),
        fake_event("aten::_to_cpu", inner),  # its other operands
        fake_event("aten::_to_cpu", again),
        fake_event("aten::_to_cpu", fake_event("aten::relu")),
        fake_event("aten::_to_cpu"),  # somebody's own, inside no operator
        fake_event("aten::to", fake_event("aten::copy_")),
        *(step, first, second, inner, again),
    ]
    assert torch_probe.fallen(events) == {"linear": 2, "relu": 1}


def test_nothing_falls_back_from_the_processor():
    ran = []
    assert session().fallbacks(lambda: ran.append(1)) == {}
    assert session(Reference()).fallbacks(lambda: ran.append(1)) == {}


def test_the_processor_has_neither_events_nor_a_peak():
    s = session()
    assert s.device_seconds(lambda: None) is None
    assert s.peak_memory() is None


class FakeDeviceModule:
    """What torch.cuda and torch.xpu offer, without a device."""

    def __init__(self):
        self.log, self.now, self.peak = [], 0.0, 7

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = FAKE_MODULE.now

        def elapsed_time(self, other):
            assert FAKE_MODULE.log[-1] == "wait", "an event is read before it happened"
            return (other.at - self.at) * 1e3

    def max_memory_allocated(self):
        return self.peak

    def reset_peak_memory_stats(self):
        self.peak = 0

    def mem_get_info(self):
        return 5 * 2**30, 9 * 2**30


FAKE_MODULE = FakeDeviceModule()


def test_events_and_peak_memory_of_a_fake_device(monkeypatch):
    device = SimpleNamespace(type="fake")
    monkeypatch.setattr(torch, "get_device_module", lambda asked: FAKE_MODULE)

    def run():
        FAKE_MODULE.now += 0.25

    assert torch_probe.device_seconds(device, lambda: FAKE_MODULE.log.append("wait"), run) == pytest.approx(0.25)
    assert torch_probe.peak_memory(device) == 7
    torch_probe.forget_peak(device)
    assert torch_probe.peak_memory(device) == 0
    assert torch_probe._free_memory(device) == 5 * 2**30


def test_a_fake_device_that_offers_none_of_it(monkeypatch):
    device = SimpleNamespace(type="fake")
    monkeypatch.setattr(torch, "get_device_module", lambda asked: SimpleNamespace())
    torch_probe.forget_peak(device)
    assert torch_probe.peak_memory(device) is None
    assert torch_probe.device_seconds(device, lambda: None, lambda: None) is None
    assert torch_probe._free_memory(device) is None


def test_fallbacks_of_a_fake_device_of_torchs_own():
    """A device registered with torch, in a process of its own, that lacks operators of AlexNet's."""
    script = Path(__file__).with_name("fake_device.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert lines["device"] == "fakedevice device"
    assert lines["all there"] == "{}"
    assert literal_eval(lines["inference"]) == {"relu": 1, "max_pool2d": 1}
    assert literal_eval(lines["training"]) == {"relu": 1, "max_pool2d": 1, "convolution_backward": 1}
    assert lines["right"] == "True"
    assert done.stderr == ""


# Memory that host and device share.


def test_unified_memory_where_torch_tells():
    amd, nvidia, intel = fake_amd(), fake_nvidia(), fake_intel(fp64=False)
    cuda, rocm = fake_torch(cuda="13.0", gpu=nvidia), fake_torch(hip="7.2", gpu=amd)
    found = {
        "cuda": lambda: Cuda().find(cuda),
        "rocm": lambda: Rocm().find(rocm),
        "xpu": lambda: Xpu().find(fake_torch(xpu=intel, xpu_built=True)),
    }
    assert not any(find().unified for find in found.values())
    nvidia.is_integrated = amd.is_integrated = intel.is_integrated_gpu = 1
    assert all(find().unified is True for find in found.values())
    assert Mps().find(fake_torch(mps=(True, True))).unified
    assert all(backend.probe().unified for backend in (Cpu(), Reference()))
