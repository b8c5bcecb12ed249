"""ONNX Runtime's ceilings, its profile by layer, and the nodes that it gave to another execution provider."""

from functools import partial

import numpy as np
import onnx
import pytest

from portnet.contract import Ceilings, Settings, Unsupported
from portnet.graph import LRN, AdaptiveAvgPool, Conv, Dropout, Flatten, Graph, Linear, MaxPool, ReLU
from portnet_backends import onnxruntime_ep, timing
from portnet_backends.onnxruntime_ep import OnnxRuntime, by_layer, elsewhere, nodes, profiled

GRAPH = Graph(
    preset="tiny",
    input=(3, 16, 16),
    layers=(
        Conv(name="conv1", in_channels=3, out_channels=32, kernel=3),
        ReLU(name="relu1"),
        LRN(name="norm1", alpha=0.5, k=2.0, groups=2),
        MaxPool(name="pool1"),
        Conv(name="conv2", in_channels=32, out_channels=32, kernel=3, padding=1),
        ReLU(name="relu2"),
        AdaptiveAvgPool(name="avg", size=4),
        Flatten(name="flat"),
        Dropout(name="drop1", p=0.5, inverted=False),
        Linear(name="fc1", in_features=512, out_features=16),
        ReLU(name="relu3"),
        Linear(name="fc2", in_features=16, out_features=5),
    ),
)


def session():
    rng = np.random.default_rng(0)
    return OnnxRuntime().open(
        GRAPH, {k: rng.standard_normal(s, np.float32) for k, s in GRAPH.parameters.items()}, Settings()
    )


def images(batch=2):
    return np.random.default_rng(1).standard_normal((batch, *GRAPH.input), np.float32)


def event(name, operator, microseconds, provider="CPUExecutionProvider"):
    """As ONNX Runtime 1.31 writes them, less what is not read."""
    return {
        "cat": "Node",
        "pid": 1,
        "tid": 2,
        "dur": microseconds,
        "ts": 3,
        "ph": "X",
        "name": f"{name}_kernel_time",
        "args": {"op_name": operator, "provider": provider, "node_index": "0", "thread_scheduling_stats": "4"},
    }


# A fake run split between providers, as one with a GPU writes it.
FAKE_SPLIT = [
    {"cat": "Session", "dur": 9000, "ts": 0, "ph": "X", "name": "model_run", "args": {}},
    event("Memcpy_token_1", "MemcpyFromHost", 30, "CUDAExecutionProvider"),
    event("conv1", "Conv", 100, "CUDAExecutionProvider"),
    event("norm1.tower0", "LRN", 700),
    event("norm1.tower1", "LRN", 500),
    event("norm1", "Concat", 20, "CUDAExecutionProvider"),
    event("avg", "MatMul", 40),
]


def test_nodes_of_another_provider_are_fallbacks():
    ran = nodes(FAKE_SPLIT)
    assert len(ran) == 6
    assert elsewhere(ran, "CUDAExecutionProvider") == {"LRN": 2, "MatMul": 1}
    assert elsewhere(ran, "CPUExecutionProvider") == {"MemcpyFromHost": 1, "Conv": 1, "Concat": 1}
    assert ran[1] == {"name": "conv1", "operator": "Conv", "provider": "CUDAExecutionProvider", "seconds": 1e-4}


def test_nothing_falls_back_from_the_cpus_provider(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = session()
    usual, ran = s.running, []

    def run():
        ran.append((s.running, s.infer(s.put(images()))))

    assert s.fallbacks(run) == {}
    (profiled, logits), *more = ran
    assert not more
    assert profiled is not usual
    assert s.running is usual
    np.testing.assert_allclose(s.get(logits), s.get(s.infer(s.put(images()))), rtol=1e-5)
    assert not list(tmp_path.iterdir()), "a profile was left behind"


def test_a_real_profile_is_counted():
    """The same run, were another provider asked for: every node is elsewhere, each as often as it ran."""
    s = session()
    ran = profiled(partial(s.start, s.model()), lambda timed: [timed.run(None, {"images": images()}) for _ in range(3)])
    counted = elsewhere(ran, "FakeExecutionProvider")
    assert counted["LRN"] == 3  # in three runs
    assert sum(counted.values()) == len(ran)


def test_the_session_comes_back_where_the_run_fails():
    s = session()
    usual = s.running

    def fail():
        raise RuntimeError("it broke")

    with pytest.raises(RuntimeError, match="it broke"):
        s.fallbacks(fail)
    assert s.running is usual


def test_layers_of_a_real_profile():
    s = session()
    found = s.layer_times(images())
    names = [layer.name for layer in GRAPH.layers]
    assert list(found) == [name for name in names if name in found], "not in the graph's order"
    # What is fused is gone: ReLUs, and here nothing else.
    assert {"conv1", "norm1", "pool1", "conv2", "avg", "flat", "drop1", "fc1", "fc2"} == found.keys()
    assert all(0 < t.forward < 1 and t.backward is None for t in found.values())


def test_layers_are_medians_of_their_nodes_after_warming_up():
    profile = []
    for slower in (1000, 1000, 1, 3, 2):
        profile += [
            event("relu1_nchwc", "Conv", 10 * slower),
            event("ReorderOutput_token_1", "ReorderOutput", 5 * slower),
            event("norm1.tower0.input", "Split", slower),
            event("norm1.tower0", "LRN", 20 * slower),
            event("norm1.tower1", "LRN", 20 * slower),
            event("norm1", "Concat", slower),
            event("fused fc1", "FusedGemm", 7 * slower),
            event("logits", "Gemm", 3 * slower),
        ]
    found = by_layer(nodes(profile), GRAPH)
    # The ReLU's name is on a convolution: conv1 with its ReLU. Layout conversions are no layer's.
    assert found == pytest.approx({"conv1": 20e-6, "norm1": 84e-6, "fc1": 14e-6, "fc2": 6e-6})


def test_a_convolution_keeps_its_own_name():
    assert by_layer(nodes([event("conv2", "FusedConv", 8)]), GRAPH) == {"conv2": 8e-6}
    # conv10 is not conv1's.
    assert by_layer(nodes([event("conv10", "Conv", 8)]), GRAPH) == {}


def test_layers_are_not_trained():
    with pytest.raises(Unsupported, match="does not train: time its layers without labels"):
        session().layer_times(images(), np.zeros(2, np.int64))


def test_ceilings():
    found = OnnxRuntime().ceilings("float32")
    assert 1e9 < found.flops < 1e14
    assert found.bandwidth is None
    assert set(found.samples) <= {"matmul_1024", "matmul_2048", "matmul_4096"}
    with pytest.raises(Unsupported, match="does not compute in 'bfloat16'"):
        OnnxRuntime().ceilings("bfloat16")


def test_the_ceilings_model_multiplies(monkeypatch):
    def spy(product, sizes, copy, wait, *, budget):
        product(8)()
        return Ceilings(flops=None, bandwidth=None)

    kept = {}
    real = onnxruntime_ep.OnnxRuntime.start

    def start(self, model, *more, **others):
        kept["model"] = model
        return real(self, model, *more, **others)

    monkeypatch.setattr(timing, "ceilings", spy)
    monkeypatch.setattr(OnnxRuntime, "start", start)
    OnnxRuntime().ceilings("float32")
    model = onnx.load_from_string(kept["model"])
    (b,) = (onnx.numpy_helper.to_array(t) for t in model.graph.initializer)
    a = np.random.default_rng(0).random((8, 8), np.float32)
    (c,) = real(OnnxRuntime(), kept["model"]).run(None, {"a": a})
    np.testing.assert_allclose(c, a @ b, rtol=1e-5)
    assert len(np.unique(b)) == 64


def test_the_processors_memory_is_the_hosts():
    assert OnnxRuntime().probe().unified
