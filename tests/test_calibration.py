"""8-bit integers: the reference's baseline, the gate on quantised networks, and the trained network that all answer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from portnet import alexnet, cache, calibration, images, parity, plan, plugins, trained, weights
from portnet.contract import Settings
from portnet.errors import Unavailable, Unsupported
from portnet.graph import LRN, SpatialLRN
from portnet.measurement import Measurement
from portnet.own_model import workload
from portnet.record import Spec
from portnet.workload import AlexNet
from portnet_backends.reference import round_int8, round_uint8

REFERENCE, ORT = (plugins.backends()[name] for name in ("reference", "onnxruntime-cpu"))
INT8 = Settings(precision="int8")


def graph(preset="paper2012", size=99):
    return alexnet.graph(preset, image_size=size, classes=10)


def here(name):
    try:
        return "int8" in plugins.probe(plugins.backends()[name]).precisions
    except Unavailable:
        return False


needs_openvino = pytest.mark.skipif(not here("openvino"), reason="OpenVINO is not installed, or has no int8 here")
BACKENDS = ["onnxruntime-cpu", pytest.param("openvino", marks=needs_openvino)]


# The baseline


@pytest.mark.parametrize("low", [-3.0, 0.0, 0.5])
def test_activations_are_rounded_to_256_values_with_zero_among_them(low):
    x = np.random.default_rng(0).uniform(low, 5, 10_000).astype(np.float32)
    rounded = round_uint8(x)
    step = (5 - min(low, 0.0)) / 255
    assert rounded.dtype == np.float32
    assert len(np.unique(rounded)) <= 256
    assert np.abs(rounded - x).max() <= step * 1.01
    assert np.sqrt(np.mean((rounded - x) ** 2)) == pytest.approx(step / 12**0.5, rel=0.05)
    assert (round_uint8(np.array([0.0, *x], np.float32))[0]) == 0
    np.testing.assert_array_equal(round_uint8(np.zeros(3, np.float32)), 0)


def test_filters_are_rounded_channel_by_channel():
    w = (
        np.random.default_rng(0).standard_normal((4, 3, 5, 5), np.float32)
        * np.array([1, 10, 0.1, 0])[:, None, None, None]
    )
    rounded = round_int8(w.astype(np.float32))
    for own, channel in zip(rounded, w, strict=True):
        step = np.abs(channel).max() / 127
        assert np.abs(own - channel).max() <= step / 2 * 1.001
        assert len(np.unique(own)) <= 255
    assert np.abs(rounded).max() == pytest.approx(np.abs(w).max(), rel=1e-6)


def test_the_baseline_stores_every_activation_in_8_bits():
    case = parity.Case(graph("caffe", 67), batch=2)
    layers = REFERENCE.open(case.graph, case.weights, INT8).trace(case.images).layers
    for name, following in zip(layers, [*list(layers)[1:], ""], strict=True):
        # What a ReLU takes is not stored.
        assert (len(np.unique(layers[name])) <= 256) != following.startswith("relu"), name


def test_the_reference_offers_no_int8():
    assert "int8" not in REFERENCE.probe().precisions


# The gate


def judged(case, backend="onnxruntime-cpu", network=None):
    expected = parity.expect(case, REFERENCE, "int8", train=False)
    runner = plugins.backends()[backend]
    session = calibration.opened(runner, network or case.graph, case.weights, INT8, lambda: case.images)
    return parity.judge(expected, session, train=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", alexnet.PRESETS)
def test_every_preset_passes_in_int8(preset, backend):
    found = judged(parity.Case(graph(preset), batch=2), backend)
    assert found.passed, found
    # In 8 bits, and not float32 by another name.
    assert found.worst.error > 1e-3


@pytest.mark.parametrize("preset", ["paper2012", "chm145", "caffe"])
def test_a_wrong_network_does_not(preset):
    network = graph(preset)
    layers = (replace(x, alpha=x.alpha / 5) if isinstance(x, LRN | SpatialLRN) else x for x in network.layers)
    found = judged(parity.Case(network, batch=2), network=replace(network, layers=tuple(layers)))
    assert found.worst.share > 5, found


def test_a_file_is_a_quarter_as_large_and_made_once_a_process(monkeypatch):
    case = parity.Case(graph("caffe", 67), batch=2)
    calls = []
    real = type(ORT).quantise
    monkeypatch.setattr(type(ORT), "quantise", lambda *a, **k: calls.append(1) or real(*a, **k))
    one = calibration.calibrated(case.graph, case.weights, case.images)
    assert calibration.calibrated(case.graph, dict(case.weights), case.images.copy()) is one
    assert calls == [1]
    assert len(one) < 0.3 * 4 * case.graph.parameter_count
    # Other pictures, other ranges.
    assert calibration.calibrated(case.graph, case.weights, case.images[:1]) != one
    assert len(calibration._made) <= 4


def test_backends_that_run_no_files_refuse_int8():
    case = parity.Case(graph("caffe", 67), batch=1)
    for name in ("cpu", "reference"):
        with pytest.raises(Unsupported, match=f"{name} does not compute in 'int8'"):
            calibration.opened(plugins.backends()[name], case.graph, case.weights, INT8, lambda: case.images)
    with pytest.raises(Unsupported, match="int8 runs files that were calibrated"):
        ORT.open(case.graph, case.weights, INT8)


def test_int8_of_a_model_of_ones_own_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "own_model")
    work = workload(Spec(backend="onnxruntime-cpu", precision="int8", model="small:residual", mode="infer"))
    with pytest.raises(Unsupported, match="int8 is of PortNet's own network"):
        work.open(ORT, INT8)


def test_calibration_sees_training_pictures_and_no_others(monkeypatch):
    data = images.load("digits")
    seen = calibration.pictures(data.train, graph(size=67))
    assert seen.shape == (64, 3, 67, 67)
    assert seen.dtype == np.float32
    first = next(images.evaluation_batches(data.test, graph(size=67), batch=64)).images
    assert not any((seen == picture).all(axis=(1, 2, 3)).any() for picture in first)


# The answers


@pytest.fixture
def short(monkeypatch, tmp_path):
    """A training of few steps, in a cache of its own."""
    monkeypatch.setenv("PORTNET_CACHE", str(tmp_path))
    monkeypatch.setattr(trained, "STEPS", 3)
    monkeypatch.setattr(trained, "LARGEST", 50)
    return tmp_path


def test_all_stacks_answer_with_the_same_weights(short):
    told = []
    stacks = [("cpu", "float32"), ("onnxruntime-cpu", "float32"), ("onnxruntime-cpu", "int8")]
    stacks += [("openvino", "int8")] if here("openvino") else []
    found = {}
    for backend, precision in stacks:
        work = AlexNet(Spec(backend=backend, precision=precision, curve_size=67))
        found[backend, precision] = work.answers(
            plugins.backends()[backend], Settings(precision=precision), told.append
        )
    assert len({f["weights"] for f in found.values()}) == 1
    assert sum("step 3 of 3" in line for line in told) == 1, "trained more than once"
    for (_, precision), seen in found.items():
        assert seen["count"] == 50
        assert seen["pixels"] == 67
        assert 0 <= seen["right"] <= 50
        assert (seen["error"] > 1e-4) == (precision == "int8"), seen
        assert seen["agree"] == 50 or precision == "int8"
    plain = found["cpu", "float32"]
    assert plain["right"] == plain["right_by_reference"]


def test_a_damaged_cache_is_made_again(short):
    data, network = images.load("digits"), graph("caffe", 67)

    def once():
        return trained.trained(network, data, "digits", seed=0, say=lambda _: None)

    first = once()
    for path in short.iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    again = once()
    assert weights.digest(again.weights) == weights.digest(first.weights)
    np.testing.assert_array_equal(again.logits, first.logits)
    assert first.right == int((first.logits.argmax(axis=1) == first.labels).sum())


def test_compare_asks_for_int8_where_it_is_to_be_had(monkeypatch):
    """With fakes of more backends than are measured at once."""
    from portnet.contract import Device

    class FakeRunner(type(ORT)):
        def __init__(self, name):
            super().__init__()
            self.name = name

    fakes = [FakeRunner(f"fake-{i}") for i in range(3)]
    registry = plugins.Registry([*plugins.backends().values(), *fakes], [])
    monkeypatch.setattr(plugins, "backends", lambda: registry)
    found = {b.name: Device(name="x", precisions=("float32", "int8")[: 2 - i % 2]) for i, b in enumerate(fakes)}
    monkeypatch.setattr(plan.launch, "probes", lambda chosen: found)
    groups = plan.quick([b.name for b in fakes]).groups
    assert [[(s.backend, s.precision) for s in group] for group in groups] == [
        [("fake-0", "float32"), ("fake-0", "int8"), ("fake-1", "float32"), ("fake-2", "float32")],
        [("fake-2", "int8")],
    ]
    assert all(s.mode == "infer" and s.quick for group in groups for s in group)
    for narrower in ({"precision": "bfloat16"}, {"model": "small:residual"}):
        monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "own_model")
        specs = [s for group in plan.quick([b.name for b in fakes], **narrower).groups for s in group]
        assert not any(s.precision == "int8" for s in specs)


def test_arrays_are_kept_by_name_and_key(tmp_path, monkeypatch):
    monkeypatch.setenv("PORTNET_CACHE", str(tmp_path))
    made = []

    def make():
        made.append(1)
        return {"a": np.arange(3)}

    for key in ("x", "x", "y"):
        np.testing.assert_array_equal(cache.arrays("n", key, make)["a"], [0, 1, 2])
    assert len(made) == 2


def test_a_measurement_records_its_answers_and_its_file(short):
    spec = Spec(
        backend="onnxruntime-cpu", precision="int8", preset="caffe", image_size=67, curve_size=67, batch=2, blocks=1,
        quick=True,
    )  # fmt: skip
    measurement = Measurement(spec)
    assert measurement.prepare(), measurement.record
    measurement.block()
    record = measurement.finish()
    assert record.outcome in ("works", "unsteady"), record.reason
    assert record.answers["count"] == 50
    assert record.effective["file"] == pytest.approx(4 * 0.25 * work_parameters(spec), rel=0.05)
    assert record.gates["fallbacks"] == {"known": True, "operations": {}}


def work_parameters(spec):
    return AlexNet(spec).graph.parameter_count
