"""The conformance suite on the backend asked for, and on fakes that must fail it.

PORTNET_TEST_BACKEND names the backend, as the tox environments do; cpu otherwise. One that was asked for and is not
available fails.
"""

import os
from dataclasses import replace

import pytest
from fakes import FakeAsyncSession, FakeBackend, FakeNoOpSession, FakeStaleSession, change, change_recipe

from portnet import alexnet, clock, conformance, parity, plugins
from portnet.contract import Session
from portnet_backends.reference import ReferenceSession

BACKEND = os.environ.get("PORTNET_TEST_BACKEND", "cpu")
REFERENCE = plugins.backends()["reference"]


def suite(name, **options):
    return [pytest.param(check, id=f"{name}: {check}") for check in conformance.checks(name, **options)]


# At full size: this is where ALEXNET.md's numbers and the parity gate meet.
@pytest.mark.parametrize("check", suite(BACKEND))
def test_the_backend_asked_for_conforms(check):
    assert check()


@pytest.mark.parametrize("check", suite("onnxruntime-cpu") if BACKEND == "cpu" else [])
def test_the_exported_network_conforms(check):
    assert check()


@pytest.mark.parametrize("check", suite("reference", image_size=67))
def test_the_reference_conforms(check):
    assert check()


def test_baselines_of_every_precision_lie_within_their_own_gate():
    case = parity.Case(alexnet.graph("paper2012", image_size=67, classes=10))
    for precision in ("float32", "tf32", "bfloat16", "float16"):
        expected = parity.expect(case, REFERENCE, precision)
        session = REFERENCE.open(case.gated, case.weights, case.settings(precision))
        assert parity.judge(expected, session, train=True).passed, precision


def verdict(tamper, precision="float32", preset="paper2012"):
    case = parity.Case(alexnet.graph(preset, image_size=67, classes=100))
    expected = parity.expect(case, REFERENCE, precision)
    backend = FakeBackend(tamper=tamper, precision=precision)
    session = backend.open(case.gated, case.weights, case.settings(precision))
    return parity.judge(expected, session, train=True)


@pytest.mark.parametrize("preset", ["paper2012", "chm145"])
def test_an_untampered_fake_passes(preset):
    assert verdict(lambda graph: graph, preset=preset).passed


# MEASURING.md asks that a mistake exceed the gate by far, not by luck.
@pytest.mark.parametrize(
    ("tamper", "where", "least"),
    [
        pytest.param(change("norm1", alpha=1e-4), "norm1", 100, id="LRN alpha without the factor 5"),
        pytest.param(change("norm2", alpha=4.9e-4), "norm2", 100, id="LRN alpha off by 2%"),
        pytest.param(change("norm1", k=1.0), "norm1", 100, id="LRN k of Caffe"),
        pytest.param(change("norm1", beta=0.74), "norm1", 100, id="LRN beta off by 0.01"),
        pytest.param(change("norm1", groups=1), "norm1", 100, id="LRN over merged towers"),
        pytest.param(change("norm2", groups=1), "norm2", 100, id="LRN over merged towers, second"),
        pytest.param(change("drop6", p=0.4), "drop6", 100, id="dropout's test scale"),
        pytest.param(change("drop7", inverted=True), "drop7", 100, id="inverted dropout"),
        pytest.param(change_recipe(bias_decay=1.0), "updated", 20, id="decay on biases"),
        pytest.param(change_recipe(weight_decay=0.0), "updated", 20, id="no decay"),
        pytest.param(change_recipe(momentum=0.89), "updated", 20, id="momentum"),
        pytest.param(change_recipe(bias_rate=2.0), "updated", 20, id="Caffe's bias rate"),
    ],
)
def test_a_mistake_is_caught(tamper, where, least):
    found = verdict(tamper)
    assert not found.passed
    share = max(f.share for f in found.findings if where in f.what)
    assert share > least


def swap(one, other):
    """Two layers that change places."""

    def tampered(graph):
        layers = {layer.name: layer for layer in graph.layers}
        order = [{one: other, other: one}.get(layer.name, layer.name) for layer in graph.layers]
        return replace(graph, layers=tuple(layers[name] for name in order))

    return tampered


@pytest.mark.parametrize(
    ("tamper", "where", "least"),
    [
        pytest.param(change("mapnorm2", alpha=0.001 * 25), "mapnorm2", 100, id="alpha not divided by the area"),
        pytest.param(change("mapnorm2", size=3), "mapnorm2", 100, id="another neighbourhood"),
        pytest.param(change("norm1", alpha=5e-4), "norm1", 100, id="the paper's alpha"),
        pytest.param(swap("norm1", "pool1"), "norm1", 100, id="pool before LRN"),
        pytest.param(change_recipe(bias_rate=1.0), "updated", 20, id="the paper's bias rate"),
    ],
)
def test_a_mistake_in_what_the_released_code_ran_is_caught(tamper, where, least):
    found = verdict(tamper, preset="chm145")
    assert not found.passed
    assert max(f.share for f in found.findings if where in f.what) > least


@pytest.mark.parametrize("precision", ["tf32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "tamper", [change("norm1", alpha=1e-4), change("norm1", groups=1)], ids=["alpha", "tower split"]
)
def test_a_mistake_is_caught_in_narrow_precisions_too(tamper, precision):
    assert not verdict(tamper, precision=precision).passed


def test_a_misplaced_input_pad_is_caught():
    class PadLeft(ReferenceSession):
        def _layer(self, layer, x, masks):
            y = super()._layer(layer, x, masks)
            return y[:, :, ::-1, ::-1].copy() if layer.name == "pad" else y

    # 68 pixels are padded to 71.
    case = parity.Case(alexnet.graph("paper2012", image_size=68, classes=10))
    expected = parity.expect(case, REFERENCE, "float32")
    session = FakeBackend(session=PadLeft).open(case.gated, case.weights, case.settings("float32"))
    assert parity.judge(expected, session, train=True).worst.share > 100


def test_float32_does_not_pass_for_tf32_nor_the_other_way_round():
    case = parity.Case(alexnet.graph("paper2012", image_size=67, classes=100))
    expected = parity.expect(case, REFERENCE, "float32")
    session = REFERENCE.open(case.gated, case.weights, case.settings("tf32"))
    assert parity.judge(expected, session, train=True).worst.share > 5


def test_float32_does_not_pass_for_float64():
    """By far: that is what leaves room for honest float64, which is as exact as the reference and no more."""
    case = parity.Case(alexnet.graph("paper2012", image_size=67, classes=100))
    session = REFERENCE.open(case.gated, case.weights, case.settings("float32"))
    found = parity.judge(parity.expect(case, REFERENCE, "float64"), session, train=True)
    # An update moves the weights little, and is stored in float32 as the weights came.
    shares = [f.share for f in found.findings if not f.what.startswith("updated")]
    assert min(shares) > 1e5, min(found.findings, key=lambda f: f.share)


def test_a_session_that_shows_only_logits_is_judged_by_them():
    case = parity.Case(alexnet.graph("paper2012", image_size=67, classes=10))
    expected = parity.expect(case, REFERENCE, "float32", train=False)

    class LogitsOnly(ReferenceSession):
        trace = Session.trace

    session = FakeBackend(session=LogitsOnly).open(case.gated, case.weights, case.settings("float32"))
    found = parity.judge(expected, session, train=False)
    assert found.passed
    assert {f.what for f in found.findings} == {"inference fc8", "infer() fc8"}


def test_nan_never_passes():
    finding = parity.Finding(what="x", error=float("nan"), allowed=1.0)
    assert not parity.Verdict((finding,)).passed
    assert not parity.Verdict().passed


@pytest.fixture
def small(monkeypatch):
    """What NumPy does at once is waited for as well."""
    monkeypatch.setattr(conformance, "WAITED", 2)


def waiting(session, mode):
    backend = FakeBackend(session=session)
    return next(c for c in conformance.checks(backend) if c.name == f"synchronize waits ({mode})")


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_an_asynchronous_backend_that_waits_is_honest(small, mode):
    assert waiting(FakeAsyncSession, mode)()


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_a_synchronize_that_does_nothing_is_caught(small, mode):
    with pytest.raises(conformance.ConformanceError, match="fetching the last value took"):
        waiting(FakeNoOpSession, mode)()


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_a_stale_value_is_caught(small, mode):
    with pytest.raises(conformance.ConformanceError, match="not the one"):
        waiting(FakeStaleSession, mode)()


def test_the_length_of_blocks_is_not_what_tells():
    """The lying blocks are short; it is the fetch that takes what they hid."""
    case = parity.Case(alexnet.graph("paper2012", image_size=67, classes=10), batch=4)
    session = FakeNoOpSession(case.gated, case.weights, case.settings("float32"))
    other = parity.Case(case.graph, batch=4, seed=1)
    work = clock.Work(session, "infer", *((c.images, c.labels, c.ids) for c in (case, other)))
    seen = clock.examine(work, seconds=0.1, repeats=3)
    assert seen.right
    assert min(seen.last) > 10 * max(seen.idle)
    assert not seen.honest
