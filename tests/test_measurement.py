"""The method tested on itself: each way of fooling the harness, by a fake made for it, has the right outcome."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import thin
from fakes_measured import FAKES

from portnet import clock, launch, measurement, parity, plan, plugins, record, workload
from portnet.contract import Backend, Device, LibraryLayer, Settings
from portnet.errors import InputError, UnknownName, Unsupported
from portnet.plugins import Registry
from portnet.record import Spec

SMALL = Spec(
    backend="fake-honest",
    preset="paper2012",
    image_size=67,
    batch=4,
    curve_size=67,
    curve_batch=4,
    curve_steps=3,
    perturbed=0,
    blocks=3,
    quick=True,
)


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    """The fakes beside PortNet's own backends, on a thin network."""
    real = plugins.backends()
    registry = Registry([*real.values(), *FAKES.values()], [])
    monkeypatch.setattr(plugins, "backends", lambda: registry)
    monkeypatch.setattr(workload.AlexNet, "graph_of", thin.graph_of)
    return registry


def measured(backend, **changes):
    said = []
    made = measurement.measure(replace(SMALL, backend=backend, **changes), said.append)
    made.to_json()  # whatever the outcome, it can be kept
    return made


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_an_honest_one_works_and_keeps_every_sample(mode):
    made = measured("fake-honest", mode=mode)
    assert (made.outcome, made.reason) == ("works", "")
    timed = made.samples[mode]
    assert len(timed["seconds"]) == 3
    assert min(timed["seconds"]) >= 0.5 * measurement.BLOCK
    assert len(timed["warm_up"]) >= 3
    assert made.gates["parity"]["passed"]
    assert made.gates["parity"]["findings"]
    assert made.gates["fallbacks"] == {"known": True, "operations": {}}
    assert made.gates["clock"][mode]["honest"]
    assert made.gates["clock"][mode]["foreign_cpu"]["of"] >= 1
    assert made.times["total"] > made.times["first_step"] > 0
    assert made.effective["precision"] == "float32"
    assert len(made.effective["weights"]) == 64
    assert made.watch["blocks"] == 3
    assert list(made.layers) == [s.layer.name for s in workload.AlexNet(SMALL).graph.steps]
    assert bool(made.training) == (mode == "train")


@pytest.mark.parametrize(
    ("foreign", "outcome"), [(0.4, "dishonest clock"), (None, "dishonest clock"), (0.6, "not measured")]
)
def test_on_a_crowded_machine_a_clock_is_not_accused_and_has_no_figure_either(monkeypatch, foreign, outcome):
    told = {"foreign_cpu": {"foreign": foreign, "of": 2}}
    monkeypatch.setattr(measurement.Watch, "summary", lambda self: told)
    made = measured("fake-other-units")
    assert (made.outcome, made.samples) == (outcome, {})
    assert "the device's events say" in made.reason
    assert made.reason.startswith("others kept 0.6 of 2 processors busy") == (outcome == "not measured")


@pytest.mark.parametrize(
    ("backend", "outcome", "said"),
    [
        ("fake-no-synchronize", "dishonest clock", "fetching the last value took"),
        ("fake-sleeping-synchronize", "dishonest clock", "fetching the last value took"),
        ("fake-other-units", "dishonest clock", "the device's events say"),
        ("fake-remembers", "dishonest clock", "inputs not seen before took"),
        ("fake-too-fast", "dishonest clock", "of the ceiling measured here"),
        ("fake-wrong-layer", "wrong", "tensors, the worst inference"),
        ("fake-out-of-memory", "out of memory", "cannot allocate 1 TiB"),
        ("fake-broken", "failed", "RuntimeError: it broke"),
    ],
)
def test_what_tries_to_fool_the_harness_has_no_speed(backend, outcome, said):
    made = measured(backend)
    assert made.outcome == outcome
    assert said in made.reason
    assert not made.samples
    assert not made.serving


def test_a_batch_is_judged_by_its_own_images():
    """One that computes the first images only, and repeats them, is found at the size that is timed."""
    made = measured("fake-repeats", batch=32)
    assert made.outcome == "wrong"
    assert "batch 32: infer() of different images" in made.reason


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_whether_it_repeats_bit_for_bit_is_recorded_and_refuses_nothing(mode):
    honest, wandering = (measured(f"fake-{name}", mode=mode, quick=False, blocks=0) for name in ("honest", "wandering"))
    assert (honest.outcome, wandering.outcome) == ("works", "works"), wandering.reason
    tensors = 3 + len(workload.AlexNet(SMALL).graph.parameters) * (mode == "train")
    assert honest.gates["repeats"] == {"equal": True, "compared": tensors, "differing": []}
    assert not wandering.gates["repeats"]["equal"]
    assert ("conv1.bias" if mode == "train" else "step 0") in wandering.gates["repeats"]["differing"]
    if mode == "infer":
        assert "repeats" not in measured("fake-honest", mode=mode, blocks=0).gates


def test_a_fallback_is_partial_and_named():
    made = measured("fake-fallback")
    assert made.outcome == "partial"
    assert made.reason == "2 operations ran elsewhere than on the device: aten::local_response_norm (2)"
    assert made.samples["infer"]["seconds"]


def test_one_that_remembers_its_last_answer_has_to_work_all_the_same():
    """No step gets the input of the step before it: the memory is of no use, and the time is that of the work."""
    made = measured("fake-remembers-the-last")
    assert made.outcome == "works"
    honest = measured("fake-honest")
    per_step = [np.median(m.samples["infer"]["seconds"]) / m.samples["infer"]["steps"] for m in (made, honest)]
    assert per_step[0] > 0.5 * per_step[1]


def test_one_that_slows_down_is_unsteady_and_keeps_its_samples():
    made = measured("fake-slowing", blocks=30)
    assert made.outcome == "unsteady"
    assert "its time changed by +" in made.reason
    assert len(made.samples["infer"]["seconds"]) == 30


def test_a_curve_outside_the_envelope_of_equals_is_wrong():
    equals = [[2.0, 1.9, 1.8], [2.0, 1.91, 1.83], [2.0, 1.9, 1.82]]
    equals = [*equals, [2.0, 1.903, 1.81], [2.0, 1.905, 1.825]]
    inside = {"losses": [2.0, 1.915, 1.85], "perturbed": equals}
    assert workload.curve_verdict(inside)["passed"]
    # Student's t of 4 degrees of freedom at 99.99%, 15.54, times the root of 1 + 1/5.
    outside = {"losses": [2.0, 1.905, 2.04], "perturbed": equals}
    seen = workload.curve_verdict(outside)
    assert not seen["passed"]
    assert (seen["step"], seen["runs"]) == (2, 5)
    assert seen["share"] == pytest.approx((2.04 - 1.817) / (17.03 * 0.01204), rel=0.01)


def test_what_the_training_gate_lets_through(monkeypatch):
    """Losses that were seen: paper2012 in float32 on an AMD processor with AVX2."""
    losses = json.loads((Path(__file__).parent / "training_curves.json").read_text())
    equals = losses.pop("equals")

    def passing():
        return [
            n for n, seen in losses.items() if workload.curve_verdict({"losses": seen, "perturbed": equals})["passed"]
        ]

    assert passing() == ["channels-last", "regions, channels-last", "PyTorch's operators"]
    monkeypatch.setattr(workload, "EARLIER", 0)
    assert passing() == ["PyTorch's operators"]


@pytest.mark.parametrize(("parts", "passed"), [(5, True), (6, False)])
def test_a_run_may_part_a_few_steps_before_its_equals(parts, passed):
    """All of these equals take the same turn at step 1, and other ones from each other `parts` steps later."""
    equals = [[2.0] * (1 + parts) + [2.0 + 1e-4 * i] * 3 for i in range(8)]
    held = {"losses": [2.0] + [2.0003] * (3 + parts), "perturbed": equals}
    assert workload.curve_verdict(held)["passed"] is passed


@pytest.mark.parametrize(("precision", "steps"), [("float32", 1), ("bfloat16", 2**15)])
def test_equals_begin_one_rounding_away(precision, steps, monkeypatch, tmp_path):
    monkeypatch.setenv("PORTNET_CACHE", str(tmp_path))
    begun = []
    passed = parity.Verdict(findings=(parity.Finding(what="logits", error=0.0, allowed=1.0),))
    monkeypatch.setattr(workload, "_gate", lambda *_, **__: passed)
    monkeypatch.setattr(workload.AlexNet, "_fit", lambda *a: begun.append((a[2].name, a[4])) or [1.0])
    work = workload.AlexNet(replace(SMALL, mode="train", perturbed=3))
    work.curve(FAKES["fake-honest"], Settings(precision=precision), lambda _: None)
    assert [name for name, _ in begun] == ["fake-honest", "cpu", "cpu", "cpu"]
    start, first, *others = (of["conv1.weight"] for _, of in begun)
    assert np.array_equal(first, start)
    for moved in others:
        assert np.median(np.abs(moved - start) / np.spacing(np.abs(start))) == pytest.approx(steps, rel=0.01)
    assert not np.array_equal(*others)


def test_without_blocks_it_stops_at_the_gates():
    made = measured("fake-honest", mode="train", blocks=0)
    assert (made.outcome, made.samples) == ("works", {})
    assert made.gates["parity"]["passed"]
    assert made.training["losses"]
    # Equals that agree to the bit leave the loss's own rounding.
    assert workload.curve_verdict({"losses": [2.000001], "perturbed": [[2.0], [2.0]]})["passed"]
    assert not workload.curve_verdict({"losses": [2.1], "perturbed": [[2.0], [2.0]]})["passed"]


def test_a_mode_a_backend_has_not():
    made = measured("onnxruntime-cpu", mode="train")
    assert (made.outcome, made.reason) == ("not available", "onnxruntime-cpu does not train")


def test_serving_a_user():
    made = measured("fake-honest", mode="serve", batch=1)
    assert made.outcome == "works", made.reason
    found = made.serving
    assert len(found["latencies"]) == 100
    assert found["p50"] <= found["p90"] <= found["p99"]
    assert list(found["sweep"]) == ["1", "2", "4", "8", "16", "32"]
    assert found["largest_batch"] is None
    assert found["bus"]["reason"] == "host and device share their memory"


def test_parsing_stacks():
    parse = measurement.parse_stack
    assert parse("cpu") == {"backend": "cpu"}
    assert parse("cpu/compile/bfloat16") == {"backend": "cpu", "engine": "compile", "precision": "bfloat16"}
    assert parse("cpu/bfloat16/stock/channels-last") == {
        "backend": "cpu", "precision": "bfloat16", "formulation": "stock", "channels_last": True,
    }  # fmt: skip
    assert parse("reference") == {"backend": "reference", "precision": "float64"}
    for wrong in ("cpuu", "cpu/float33", "onnxruntime-cpu/compile"):
        with pytest.raises(UnknownName):
            parse(wrong)
    with pytest.raises(InputError, match="precision twice"):
        parse("cpu/float32/bfloat16")


@pytest.mark.parametrize(("backend", "engine"), [("cuda", "compile-graph"), ("cpu", "regions")])
def test_the_fastest_stack_comes_before_those_between(backend, engine, monkeypatch):
    device = Device(name="fake device", precisions=("float32", "bfloat16", "float16"))
    monkeypatch.setattr(plan, "_probed", lambda chosen: ({backend: device}, []))
    found = [spec.stack for group in plan.everything([backend], modes=["train"]).groups for spec in group]
    plain = [f"{backend}/eager/float32", f"{backend}/eager/bfloat16"]
    assert found[:3] == [*plain, f"{backend}/{engine}/bfloat16/channels-last"]
    assert len(found) == len(set(found))
    assert f"{backend}/{engine}/float32/channels-last" not in found


def test_what_a_device_emulates_is_measured_by_name_only(monkeypatch):
    device = Device(name="fake device", precisions=("float32", "bfloat16", "float16"), emulated=("bfloat16", "float16"))
    monkeypatch.setattr(plan, "_probed", lambda chosen: ({"cpu": device}, []))
    made = plan.everything(["cpu"], modes=["train"])
    found = [spec for group in made.groups for spec in group]
    assert [spec.stack for spec in found[:2]] == ["cpu/eager/float32", "cpu/regions/float32/channels-last"]
    assert {spec.precision for spec in found} == {"float32"}
    assert [name for name, _ in made.left_out] == ["cpu/bfloat16", "cpu/float16"]
    assert "fake device has no kernels for it" in str(made.left_out[0][1])


class FakeLayered(Backend):
    """Three kinds of layers, and one that is not there."""

    name = "fake-layered"
    vendor = "nobody"

    def probe(self):
        return Device(name="a fake", precisions=("float32", "tf32"))

    def open(self, graph, weights, settings):
        raise NotImplementedError

    def library_layers(self, settings):
        return (
            LibraryLayer(name="cores", title="", replace={"precision": "float32"}),
            LibraryLayer(name="isa", title="", environment={"FAKE_ISA": "old"}),
            LibraryLayer(name="library", title=""),
            LibraryLayer(name="gone", title="", missing="this processor has none"),
        )


def test_what_is_in_force_once_layers_are_taken_away():
    spec = Spec(backend="fake-layered", precision="tf32")
    backend = FakeLayered()
    assert workload.effective(backend, spec) == (Settings(precision="tf32"), {})
    taken = replace(spec, without=("cores", "isa", "library"))
    settings, environment = workload.effective(backend, taken)
    assert settings == Settings(precision="float32", without=("library",))
    assert environment == {"FAKE_ISA": "old"}
    with pytest.raises(Unsupported, match="'gone' cannot be taken away: this processor has none"):
        workload.effective(backend, replace(spec, without=("gone",)))
    with pytest.raises(Unsupported, match="no layer 'other'"):
        workload.effective(backend, replace(spec, without=("other",)))


def test_a_layer_of_the_environment_needs_a_process_started_for_it(fakes, monkeypatch):
    registry = Registry([*fakes.values(), FakeLayered()], [])
    monkeypatch.setattr(plugins, "backends", lambda: registry)
    made = measurement.measure(Spec(backend="fake-layered", precision="tf32", without=("isa",)))
    assert made.outcome == "not available"
    assert "FAKE_ISA" in made.reason
    assert launch._environment(made.spec) == {"FAKE_ISA": "old"}


def test_images_are_renewed_for_every_block():
    session = FAKES["fake-honest"].open(workload.AlexNet(SMALL).graph, workload.AlexNet(SMALL).start, Settings())
    batches = workload.AlexNet(SMALL).batches(4)
    work = clock.Work(session, "infer", next(batches), next(batches))
    seen = {work.unseen(1)[0][0].tobytes() for _ in range(70)}
    assert len(seen) == 70


def test_a_record_holds_its_spec(tmp_path):
    made = measured("fake-honest", without=())
    assert record.read(made.write(tmp_path)).to_json() == made.to_json()
    assert json.loads(made.to_json())["spec"]["without"] == []
