"""Execution providers: what is believed of them, what is asked of them, and what they leave to the CPU.

What needs a vendor's hardware is held against fakes of ONNX Runtime, named so. Azure's provider is in every wheel,
takes none of our operators, and so is a real provider that leaves everything to the CPU.
"""

from dataclasses import replace
from importlib import metadata

import numpy as np
import onnxruntime
import pytest
from onnx import numpy_helper

from portnet import calibration, plugins
from portnet.contract import Settings
from portnet.errors import Unavailable, Unsupported
from portnet.graph import LRN, Conv, Flatten, Graph, Linear, ReLU
from portnet.measurement import Measurement
from portnet.onnx_export import one_matmul
from portnet.record import Spec
from portnet_backends import onnxruntime_ep
from portnet_backends.onnxruntime_ep import CPU, PROVIDERS, OnnxRuntime, Provider

AZURE = Provider(name="azure", title="Azure", vendor="anybody", install="nothing")
BY_NAME = {provider.name: provider for provider in PROVIDERS}
GRAPH = Graph(
    preset="tiny",
    input=(3, 8, 8),
    layers=(
        Conv(name="conv1", in_channels=3, out_channels=8, kernel=3),
        ReLU(name="relu1"),
        LRN(name="norm1", alpha=0.5, k=2.0, groups=2),
        Flatten(name="flat"),
        Linear(name="fc1", in_features=288, out_features=5),
    ),
)
WEIGHTS = {n: np.random.default_rng(0).standard_normal(s, np.float32) for n, s in GRAPH.parameters.items()}
IMAGES = np.random.default_rng(1).standard_normal((2, *GRAPH.input), np.float32)


class FakeSession:
    """Takes what `InferenceSession` takes, and computes nothing."""

    made: list

    def __init__(self, model, options, providers=(), enable_fallback=1):
        self.options, self.providers, self.enable_fallback = options, providers, enable_fallback
        FakeSession.made.append(self)

    def get_providers(self):
        return [self.providers[0][0], "CPUExecutionProvider"]


@pytest.fixture
def fake_runtime(monkeypatch):
    FakeSession.made = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", FakeSession)
    return FakeSession.made


def asked(provider, precision, made, **settings):
    OnnxRuntime(provider).start(b"", Settings(precision=precision, **settings))
    ((name, options),) = made[-1].providers
    assert name == f"{provider.title}ExecutionProvider"
    assert made[-1].enable_fallback == 0, "ONNX Runtime would go on on the CPU, with a line on standard output"
    return options


def test_every_backend_of_the_table():
    backends = list(onnxruntime_ep.portnet_backends())
    assert [b.name for b in backends] == [
        f"onnxruntime-{n}"
        for n in ("cpu", "cuda", "tensorrt", "migraphx", "coreml", "openvino", "directml", "qnn", "xnnpack", "webgpu")
    ]
    assert len({b.provider for b in backends}) == len(backends)
    assert all(b.note for b in backends if b.name != "onnxruntime-cpu")
    assert set(backends[0].about.precisions) == {"float32", "int8"}


def test_float32_is_asked_for_and_tf32_too(fake_runtime):
    cuda = BY_NAME["cuda"]
    assert asked(cuda, "float32", fake_runtime) == {"use_tf32": "0"}
    assert asked(cuda, "tf32", fake_runtime) == {"use_tf32": "1"}
    assert asked(cuda, "float16", fake_runtime)["use_tf32"] == "0"
    narrow = ("migraphx_fp16_enable", "migraphx_bf16_enable")
    for precision, on in (("float32", "00"), ("float16", "10"), ("bfloat16", "01")):
        assert asked(BY_NAME["migraphx"], precision, fake_runtime) == dict(zip(narrow, on, strict=True))
    assert asked(BY_NAME["openvino"], "float32", fake_runtime)["precision"] == "FP32"


def test_tensorrt_claims_float32_only_where_the_process_forbids_tf32(monkeypatch):
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    assert tuple(onnxruntime_ep._tensorrt()) == ("tf32", "float16", "bfloat16")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert tuple(onnxruntime_ep._tensorrt()) == ("float32", "float16", "bfloat16")


def test_strict_forbids_the_runtimes_own_fallback(fake_runtime):
    key = "session.disable_cpu_ep_fallback"
    asked(BY_NAME["cuda"], "float32", fake_runtime, strict=True)
    assert fake_runtime[-1].options.get_session_config_entry(key) == "1"
    asked(BY_NAME["cuda"], "float32", fake_runtime)
    with pytest.raises(RuntimeError):
        fake_runtime[-1].options.get_session_config_entry(key)


def test_directml_runs_without_memory_patterns(fake_runtime):
    asked(BY_NAME["directml"], "float32", fake_runtime)
    assert not fake_runtime[-1].options.enable_mem_pattern


@pytest.mark.parametrize("provider", [p for p in PROVIDERS if p is not CPU], ids=lambda p: p.name)
def test_what_the_wheel_lacks_is_listed_with_the_reason_and_the_remedy(provider, monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(Unavailable, match=f"has no {provider.title}ExecutionProvider, only CPUExecution") as caught:
        OnnxRuntime(provider).probe()
    assert provider.install in caught.value.remedy
    # What replaces the wheel belongs into an environment of its own; a plug-in does not.
    assert ("in a new environment" in caught.value.remedy) != bool(provider.plugin)


def test_extras_exist_for_every_remedy():
    known = metadata.metadata("portnet").get_all("Provides-Extra")
    for provider in PROVIDERS:
        if "portnet[" in provider.install:
            assert provider.install.partition("portnet[")[2].partition("]")[0] in known


# Real ones


def test_a_provider_on_the_list_that_computes_on_the_cpu_is_not_believed():
    assert "AzureExecutionProvider" in onnxruntime.get_available_providers()
    with pytest.raises(Unavailable, match="starts, but a product asked of it ran on CPUExecutionProvider"):
        OnnxRuntime(AZURE).probe()


def test_a_product_that_no_profile_shows_is_not_believed(monkeypatch):
    monkeypatch.setattr(onnxruntime_ep, "profiled", lambda start, run: [])
    with pytest.raises(Unavailable, match="ran on none that its profile names"):
        OnnxRuntime().probe()


def test_a_plug_ins_trouble_is_told(monkeypatch):
    """A fake plug-in whose library is of another ONNX Runtime, and one that finds a device of another kind."""
    import sys
    from types import ModuleType, SimpleNamespace

    fake = ModuleType("fake_plugin")
    fake.get_library_path = lambda: "/none"
    fake.__spec__ = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "fake_plugin", fake)
    backend = OnnxRuntime(replace(BY_NAME["webgpu"], plugin="fake_plugin"))
    with pytest.raises(Unavailable, match=r"the plug-in fake_plugin is installed, and finds no GPU .*\(.*none"):
        backend.probe()

    def device(kind):
        return SimpleNamespace(ep_name=backend.provider, device=SimpleNamespace(type=SimpleNamespace(name=kind)))

    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", lambda *_: None)
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: [device("CPU"), device("GPU")])
    assert [d.device.type.name for d in backend._plugged()] == ["GPU"]


def test_what_is_out_of_memory_is_told_as_such(monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("CUDA failure 2: out of memory")

    monkeypatch.setattr(onnxruntime, "InferenceSession", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        OnnxRuntime(BY_NAME["cuda"]).start(b"", Settings())


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ("NVIDIA H200, 143771, 580.1\n", {"name": "NVIDIA H200", "memory": 143771 * 2**20, "driver": "580.1"}),
        ("NVIDIA H200, 143771, 580.1\n" * 8, {"name": "NVIDIA H200", "memory": 143771 * 2**20, "driver": "580.1"}),
        ("NVIDIA H200, 143771, 580.1\nNVIDIA T4, 15360, 580.1\n", {}),
        ("No devices were found\n", {}),
    ],
)
def test_fake_drivers_tell_the_gpu(told, found, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(onnxruntime_ep.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=told))
    assert onnxruntime_ep._nvidia() == found


def test_int8_in_one_compiled_node_is_not_known(monkeypatch):
    cpu = OnnxRuntime()
    session = cpu.open_exported(calibration.calibrated(GRAPH, WEIGHTS, IMAGES), {}, Settings(precision="int8"))
    node = {"name": "n", "operator": "Compiled-subgraph", "provider": cpu.provider, "seconds": 1.0}
    monkeypatch.setattr(onnxruntime_ep, "profiled", lambda start, run: [node])
    assert session.fallbacks(lambda: None) is None


def test_strict_refuses_to_start_what_would_run_elsewhere():
    azure = OnnxRuntime(AZURE)
    model = one_matmul(8)
    azure.start(model, Settings())
    with pytest.raises(Unsupported, match="AzureExecutionProvider does not run all of it"):
        azure.start(model, Settings(strict=True))
    # On the CPU itself there is no elsewhere.
    OnnxRuntime().start(model, Settings(strict=True))


def test_backends_that_cannot_tell_refuse_strict():
    with pytest.raises(Unsupported, match="cpu cannot tell beforehand what would run elsewhere; leave strict out"):
        plugins.backends()["cpu"].check(Settings(strict=True))


def test_a_strict_measurement_of_what_cannot_tell_is_refused():
    measurement = Measurement(Spec(backend="cpu", strict=True))
    assert not measurement.prepare()
    record = measurement.finish()
    assert record.outcome == "not available"
    assert "cannot tell beforehand what would run elsewhere" in record.reason
    assert record.effective["strict"]


def test_everything_that_a_provider_leaves_to_the_cpu_is_counted(monkeypatch):
    azure = OnnxRuntime(AZURE)
    monkeypatch.setattr(azure, "probe", lambda: plugins.probe(plugins.backends()["onnxruntime-cpu"]))
    session = azure.open(GRAPH, WEIGHTS, Settings())
    images = session.put(IMAGES)
    found = session.fallbacks(lambda: session.infer(images))
    assert found["LRN"] == 1
    assert {"Conv", "Reshape", "Flatten", "Gemm"} <= {n.removeprefix("Fused") for n in found}


def test_what_of_int8_ran_in_floating_point_is_counted():
    from onnx import load_from_string

    cpu = OnnxRuntime()
    content = calibration.calibrated(GRAPH, WEIGHTS, IMAGES)
    session = cpu.open_exported(content, {}, Settings(precision="int8"))
    images = session.put(IMAGES)
    assert session.fallbacks(lambda: session.infer(images)) == {}
    # The same, of which the product stayed in float32.
    model = load_from_string(content)
    for node in model.graph.node:
        if node.op_type == "Gemm":
            node.input[1] = "plain"
            model.graph.initializer.add().CopyFrom(numpy_helper.from_array(WEIGHTS["fc1.weight"], "plain"))
    session = cpu.open_exported(model.SerializeToString(), {}, Settings(precision="int8"))
    (counted,) = session.fallbacks(lambda: session.infer(images)).items()
    assert counted in {("Gemm in floating point", 1), ("FusedGemm in floating point", 1)}


def test_a_driver_that_does_not_start_is_told(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("libcudnn.so.9: cannot open shared object file\nand more")

    monkeypatch.setattr(onnxruntime, "InferenceSession", broken)
    with pytest.raises(Unavailable, match=r"could not start CUDA.*RuntimeError: libcudnn.so.9: cannot open .* file;"):
        OnnxRuntime(BY_NAME["cuda"]).start(b"", Settings())


@pytest.mark.parametrize("model", [b"", b"no model", one_matmul(8)[:-40]])
def test_what_is_no_model_is_refused_by_type(model):
    with pytest.raises((Unsupported, Unavailable), match="ONNX Runtime"):
        OnnxRuntime().start(model)


def test_memory_falls_back_to_the_hosts_where_the_build_has_no_other():
    backend = OnnxRuntime(replace(CPU, memory="cuda"))
    assert backend.memory == "cpu"
    value = backend.put(IMAGES)
    np.testing.assert_array_equal(value.numpy(), IMAGES)


class FakeSplit(OnnxRuntime):
    """The CPU's provider, of which all but the LRN pretends to be another's."""

    def __init__(self):
        super().__init__(CPU)
        self.name = "onnxruntime-split"

    def fallbacks_as(self, ran):
        return [
            {**node, "provider": node["provider"] if node["operator"] == "LRN" else "FakeExecutionProvider"}
            for node in ran
        ]


def test_one_operator_elsewhere_makes_the_outcome_partial(monkeypatch, tmp_path):
    """The whole measurement, with a custom split of providers: LRN, in both layers of it."""
    monkeypatch.setenv("PORTNET_CACHE", str(tmp_path))
    split = FakeSplit()
    real = onnxruntime_ep.elsewhere
    monkeypatch.setattr(
        onnxruntime_ep, "elsewhere", lambda ran, provider: real(split.fallbacks_as(ran), "FakeExecutionProvider")
    )
    registry = plugins.Registry([*plugins.backends().values(), split], [])
    monkeypatch.setattr(plugins, "backends", lambda: registry)
    spec = Spec(backend=split.name, preset="paper2012", image_size=67, batch=2, blocks=2, quick=True)
    measurement = Measurement(spec, detail=False)
    assert measurement.prepare(), measurement.record
    while len(measurement.seconds) < spec.blocks:
        measurement.block()
    record = measurement.finish()
    assert (record.outcome, record.reason) == (
        "partial",
        "2 operations ran elsewhere than on the device: LRN (2)",
    )
    assert record.gates["fallbacks"] == {"known": True, "operations": {"LRN": 2}}


@pytest.mark.skipif(
    "OpenVINOExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="a real split needs a second provider: pip install onnxruntime-openvino in place of onnxruntime",
)
def test_a_real_split_is_counted_and_refused_when_strict():
    from onnx import TensorProto, helper

    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["b", 3, 4, 4])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", 3])
    nodes = [helper.make_node("Relu", ["images"], ["a"]), helper.make_node("Det", ["a"], ["logits"])]
    graph = helper.make_graph(nodes, "split", [images], [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    backend = OnnxRuntime(BY_NAME["openvino"])
    session = backend.open_exported(model, {}, Settings())
    given = session.put(np.ones((2, 3, 4, 4), np.float32))
    assert session.fallbacks(lambda: session.infer(given)) == {"Det": 1}
    with pytest.raises(Unsupported, match="does not run all of it"):
        backend.open_exported(model, {}, Settings(strict=True))
