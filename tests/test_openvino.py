"""OpenVINO on the processor, where it is installed; what it says of itself, and what it must not lose."""

import builtins

import numpy as np
import onnx
import pytest

from portnet import alexnet, calibration, conformance, parity, plugins, weights
from portnet.contract import Settings
from portnet.errors import Unavailable, Unsupported
from portnet_backends import openvino_device
from portnet_backends.openvino_device import OpenVino, OpenVinoGpu, by_layer, other_precision
from portnet_backends.reference import Reference

pytest.importorskip("openvino", reason="OpenVINO is not installed: pip install 'portnet[openvino]'")

GRAPH = alexnet.graph("paper2012", image_size=67, classes=10)
WEIGHTS = weights.parity(GRAPH, 0)
CASE = parity.Case(GRAPH, batch=4)
CAN = OpenVino().probe().precisions
XEON = {"amx_tile", "amx_bf16"}


def opened(precision="float32", **settings):
    return OpenVino().open(GRAPH, WEIGHTS, Settings(precision=precision, **settings))


@pytest.mark.parametrize("check", conformance.checks("openvino"), ids=lambda c: f"openvino: {c}")
def test_openvino_conforms(check):
    assert check()


def test_the_probe_tells_the_device():
    device = OpenVino().probe()
    assert device.name.startswith("OpenVINO on ")
    assert "float32" in device.precisions
    assert device.unified
    assert device.versions["openvino"]


@pytest.mark.parametrize("precision", [p for p in ("float32", "bfloat16", "float16") if p in CAN])
def test_the_precision_is_the_one_asked_for(precision):
    session = opened(precision)
    told = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}[precision]
    assert told in session.options()["INFERENCE_PRECISION_HINT"]
    exact = plugins.backends()["reference"].open(GRAPH, WEIGHTS, Settings(precision="float64"))
    error = parity.channel_error(session.trace(CASE.images).logits, exact.trace(CASE.images).logits)
    # Narrow, and not float32 by another name; or float32, and not narrow.
    assert (error > 1e-4) == (precision != "float32"), error


@pytest.mark.skipif("bfloat16" not in CAN, reason="this processor has no bfloat16")
def test_another_precision_than_asked_for_is_refused(monkeypatch):
    backend = OpenVino()
    model = opened().model()
    with pytest.raises(Unsupported, match="was asked for f32 and computes in bf16"):
        backend.start(model, Settings(), INFERENCE_PRECISION_HINT="bf16")


@pytest.mark.parametrize("precision", CAN)
def test_kernels_of_another_precision_are_told(precision):
    images = CASE.images
    session = calibration.opened(OpenVino(), GRAPH, WEIGHTS, Settings(precision=precision), lambda: images)
    usual = session.running
    given = session.put(images)
    assert session.fallbacks(lambda: session.infer(given)) == {}
    assert session.running is usual
    # The same kernels, had another precision been asked for: five convolutions and three products.
    session.settings = Settings(precision="float32" if precision == "int8" else "int8")
    told = session.fallbacks(lambda: session.infer(given))
    assert sum(told.values()) == 8, told


def test_what_a_kernel_is_called():
    ran = [("Convolution", "brgconv_avx512_f32"), ("GroupConvolution", "brgconv_avx512_I8"), ("LRN", "jit_avx512_f32")]
    ran += [("FullyConnected", "brgemm_avx512_bf16"), ("MatMul", "undef")]
    assert other_precision(ran, "float32") == {
        "GroupConvolution as brgconv_avx512_I8": 1,
        "FullyConnected as brgemm_avx512_bf16": 1,
        "MatMul as undef": 1,
    }
    assert set(other_precision(ran, "int8")) == {
        "Convolution as brgconv_avx512_f32",
        "FullyConnected as brgemm_avx512_bf16",
        "MatMul as undef",
    }


def test_a_result_outlives_the_next_run():
    session = opened()
    one, other = (session.put(CASE.images[i : i + 2]) for i in (0, 2))
    first = session.infer(one)
    before = session.get(first)
    session.infer(other)
    session.synchronize()
    np.testing.assert_array_equal(session.get(first), before)
    assert not np.array_equal(session.get(session.infer(other)), before)


def test_work_is_issued_and_waited_for():
    session = opened()
    images = session.put(np.concatenate([CASE.images] * 8))
    waited = []
    session.infer(images)
    real = session.request

    class FakeRequest:
        def __getattr__(self, name):
            return getattr(real, name)

        def wait(self):
            waited.append(1)
            real.wait()

    session.request = FakeRequest()
    session.synchronize()
    assert waited


def test_layers_are_timed_in_the_network():
    found = opened().layer_times(CASE.images)
    assert {"conv1", "norm1", "conv5", "fc6", "fc8"} <= found.keys()
    assert list(found) == [layer.name for layer in GRAPH.layers if layer.name in found]
    assert all(0 < t.forward < 1 for t in found.values())
    with pytest.raises(Unsupported, match="does not train"):
        opened().layer_times(CASE.images, CASE.labels)


def test_nodes_are_told_by_their_names():
    seen = {"conv1/WithoutBiases": 3.0, "images_conv1/WithoutBiases": 9.0, "norm1.tower0": 1.0, "norm1.tower1": 1.0}
    seen |= {"logits/WithoutBiases": 2.0, "conv10": 7.0, "pool1": 0.0}
    assert by_layer(seen, GRAPH) == {"conv1": 3.0, "norm1": 2.0, "fc8": 2.0}


def test_ceilings():
    found = OpenVino().ceilings("float32")
    assert 1e9 < found.flops < 1e14
    assert found.bandwidth is None
    assert len(found.samples["convolution"]) == 2
    assert found.flops == max(rate for rates in found.samples.values() for rate in rates)


def test_what_is_no_model_is_refused():
    for content in (b"", b"no model", opened().model()[:-1000]):
        with pytest.raises(Unsupported, match="OpenVINO refuses the model"):
            OpenVino().open_exported(content, {}, Settings())


def test_int8_needs_a_calibrated_file():
    if "int8" not in CAN:
        pytest.skip("this processor has no int8")
    with pytest.raises(Unsupported, match="int8 runs files that were calibrated"):
        opened("int8")


def test_a_device_that_is_not_there():
    with pytest.raises(Unavailable, match="finds no GPU, only CPU") as caught:
        OpenVinoGpu().probe()
    assert caught.value.remedy == "if the machine has one, install its driver"


def test_without_openvino(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "openvino":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Unavailable, match="OpenVINO cannot be imported") as caught:
        OpenVino().probe()
    assert caught.value.remedy == "pip install 'portnet[openvino]'"


@pytest.mark.skipif("bfloat16" not in CAN, reason="this processor has no bfloat16")
@pytest.mark.parametrize(
    ("precision", "sets", "reshapes"),
    [("bfloat16", XEON, 0), ("bfloat16", {"avx512_bf16"}, 4), ("float32", XEON, 4)],
)
def test_towers_are_run_as_one_in_16_bits_by_amx(precision, sets, reshapes, monkeypatch):
    """What is compiled then has no reshaping before LRN, and gives the same."""
    monkeypatch.setattr(openvino_device, "instruction_sets", lambda: sets)
    session = opened(precision)
    model = onnx.ModelProto.FromString(session.model())
    assert sum(node.op_type == "Reshape" for node in model.graph.node) == reshapes
    expected = parity.expect(CASE, Reference(), precision, train=False)
    session = OpenVino().open(CASE.gated, CASE.weights, session.settings)
    assert parity.judge(expected, session, train=False).passed
