"""A module of one's own: honest stacks pass its gate, planted mistakes do not, and what cannot be judged is refused."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import portnet
from portnet import own_model, plugins
from portnet.contract import Session, Settings
from portnet.errors import InputError, PortNetError, Unavailable, Unsupported
from portnet.measurement import Measurement
from portnet.own_model import OwnModel
from portnet.record import Spec
from portnet_backends import cpu, torch_own

BACKEND = plugins.backends()["cpu"]
RATE = 0.01


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PORTNET_CACHE", str(tmp_path_factory.getbasetemp() / "own"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that wait for one another beside other work make steps of microseconds last milliseconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Factories, named as a user names them.


def pictures(n, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 2, 6, 6)).astype(np.float32), rng.integers(0, 5, n)


def layers(dropout=0.0):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 8),
        nn.LayerNorm(8),
        nn.Linear(8, 5),
    )


def honest():
    return portnet.Model(
        module=layers(), batch=pictures, loss=F.cross_entropy, learning_rate=RATE, momentum=0.8, weight_decay=1e-2
    )


def dropping():
    return portnet.Model(module=layers(0.5), batch=pictures, loss=F.cross_entropy)


def small():
    """Two products and nothing else, for the compiler."""
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    return portnet.Model(module=module, batch=vectors, loss=F.cross_entropy)


def vectors(n, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 6)).astype(np.float32), rng.integers(0, 5, n)


class Odd(nn.Module):
    """A weight that is used twice, one that is not used, one that is frozen, and targets that are numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def odd():
    def batch(n, seed):
        x = torch.from_numpy(vectors(n, seed)[0])
        return x, x.roll(1, 1)

    return portnet.Model(module=Odd(), batch=batch, loss=nn.MSELoss())


def coupled():
    """A loss that is no mean over the batch."""
    return portnet.Model(module=nn.Linear(6, 5), batch=vectors, loss=lambda y, t: F.cross_entropy(y, t) * len(y))


def spec(name="honest", **asked):
    asked = {"backend": "cpu", "mode": "train", "batch": 16, **asked}
    return Spec(model=f"{__name__}:{name}", **asked)


def verdict(name="honest", backend=BACKEND, precision="float32", engine="eager", channels_last=False, **asked):
    settings = Settings(precision=precision, engine=engine, channels_last=channels_last)
    return OwnModel(spec(name, **asked)).verdict(backend, settings)


# Honest stacks.


@pytest.mark.parametrize("mode", ["train", "infer", "serve"])
@pytest.mark.parametrize(
    "stack",
    [
        {},
        {"precision": "bfloat16"},
        {"precision": "float64"},
        {"channels_last": True},
        {"channels_last": True, "precision": "bfloat16"},
    ],
    ids=str,
)
def test_honest_stacks_pass(stack, mode):
    found = verdict(mode=mode, **stack)
    assert found.passed, found
    assert found.worst.share < 0.5


@pytest.mark.parametrize("batch", [1, 8, 100])
def test_at_any_batch(batch):
    found = verdict("small", batch=batch)
    assert found.passed, found
    assert any(f.what.startswith("batch ") for f in found.findings) == (batch > 8)


def test_what_is_compared():
    names = {f.what for f in verdict().findings}
    for name in ("infer() outputs", "training outputs", "loss of trace()", "loss of train_step() 2"):
        assert {name, f"batch 16: {name}"} <= names
    for name in ("0.weight", "1.bias", "8.weight"):
        assert {f"gradient {name}", f"update {name}", f"batch 16: update {name}"} <= names
    # Of the running variance n - 1 is part: two batches in one leave another.
    assert "update 1.running_var" in names
    assert "batch 16: update 1.running_var" not in names


def test_compiled():
    found = verdict("small", engine="compile", batch=8)
    assert found.passed, found
    # Compiled, indeed: rounding comes out otherwise.
    assert found.worst.error > 0


def test_regions_are_portnets_own_networks():
    with pytest.raises(Unsupported, match="a module of yours has none"):
        verdict("small", engine="regions")


def test_shared_unused_and_frozen_weights():
    found = verdict("odd")
    assert found.passed, found
    names = {f.what: f for f in found.findings}
    assert "gradient second.weight" not in names
    assert "gradient second.bias" not in names
    assert names["update second.bias"].error == 0
    assert names["gradient idle.weight"].error == 0


def test_a_loss_that_is_no_mean_is_judged_at_the_timed_batch():
    found = verdict("coupled", batch=24)
    assert found.passed, found
    assert not any(f.what.startswith("batch ") for f in found.findings)


def test_onnx_runtime():
    backend = plugins.backends()["onnxruntime-cpu"]
    work = OwnModel(spec(backend=backend.name, mode="infer"))
    found = work.verdict(backend, Settings())
    assert found.passed, found
    assert {f.what for f in found.findings} == {"infer() outputs", "batch 16: infer() outputs"}
    session = work.open(backend, Settings())
    np.testing.assert_array_equal(session.weights()["0.weight"], work.start["0.weight"])
    images = work.batch(3, 1)[0]
    assert session.fallbacks(lambda: session.infer(session.put(images))) == {}
    assert session.layer_times(images) == {}
    session.close()
    with torch.no_grad():
        work.model.module[6].weight[0, 0] += 1e-3
    work.__dict__["_exported"] = work.torch.export(work.model, images)
    assert not work.verdict(backend, Settings()).passed


# Planted mistakes: on the stack that is judged alone, never on the reference.


class Mistaken(cpu.Cpu):
    """The processor, with something wrong in its session."""

    def __init__(self, plant):
        self.plant = plant

    def open_module(self, model, weights, settings):
        session = super().open_module(model, weights, settings)
        self.plant(session)
        return session


def eps(session):
    session.module[1].eps = session.module[7].eps = 2e-5


def weight(session):
    with torch.no_grad():
        session.module[6].weight[3, 5] += 1e-4


def buffer(session):
    session.module[1].running_mean[2] += 1e-3


def statistics(session):
    session.module[1].momentum = 0.11


def pooling(session):
    session.module[4] = nn.AvgPool2d(2)


def smoothing(session):
    session.model = portnet.Model(**vars(session.model) | {"loss": nn.CrossEntropyLoss(label_smoothing=1e-3)})


def momentum(session):
    session.model = portnet.Model(**vars(session.model) | {"momentum": 0.81})


def decay(session):
    session.model = portnet.Model(**vars(session.model) | {"weight_decay": 0.0})


def rate_outside(session):
    """torch's rule, in which the learning rate stays outside the velocity."""

    def update(parameters, velocity, gradients, rate, casts):
        for name, gradient in gradients.items():
            velocity[name].mul_(0.8).add_(gradient + 1e-2 * parameters[name])
            parameters[name].sub_(rate * velocity[name])

    session._update = update


def frozen(session):
    session.parameters.pop("6.bias")


def nothing(session):
    session.get = lambda value: np.full(tuple(value.shape), np.nan, np.float32)


EVERYWHERE = [eps, weight, buffer, pooling, nothing]
IN_TRAINING = [statistics, smoothing, momentum, decay, rate_outside, frozen]


@pytest.mark.parametrize("plant", [*EVERYWHERE, *IN_TRAINING])
def test_planted_mistakes_are_found(plant):
    assert not verdict(backend=Mistaken(plant)).passed


@pytest.mark.parametrize("plant", EVERYWHERE)
def test_planted_mistakes_are_found_in_inference(plant):
    assert not verdict(backend=Mistaken(plant), mode="infer").passed


def test_a_planted_mistake_at_the_timed_batch_alone():
    def plant(session):
        whole = session._pass
        session._pass = lambda operands, x, *_: whole(operands, x) * (1 + 1e-3 * (len(x) > 8))

    found = verdict(backend=Mistaken(plant))
    assert not found.passed
    assert all(f.what.startswith("batch 16") for f in found.findings if f.share > 1)


@pytest.mark.parametrize("plant", [pooling, decay, frozen, nothing])
def test_planted_mistakes_are_found_in_bfloat16(plant):
    assert not verdict(backend=Mistaken(plant), precision="bfloat16").passed


def test_tf32_is_judged_by_cut_factors():
    value = torch.tensor([1 + 2.0**-10, 1 + 2.0**-11, -1 - 2.0**-11])
    assert torch_own._truncated(value).tolist() == [1 + 2.0**-10, 1, -1]
    work = OwnModel(spec())
    case = work.batch(8, 0)
    exact, plain, cut = (work._run(work._reference(p), case, True) for p in ("float64", "float32", "tf32"))
    for name in ("infer() outputs", "training outputs", "gradient 6.weight"):
        fine, coarse = (own_model._errors(found, exact)[name] for found in (plain, cut))
        assert 1e-4 < coarse < 1e-2
        assert fine < coarse / 100


# What is refused.


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_dropout_is_refused_where_it_drops(mode):
    if mode == "infer":
        assert verdict("dropping", mode=mode).passed
    else:
        with pytest.raises(InputError, match="draw nothing at random in training"):
            verdict("dropping", mode=mode)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("honest", "package:factory"),
        ("nowhere_at_all:honest", "no module 'nowhere_at_all'"),
        (f"{__name__}:absent", "has no 'absent'"),
        (f"{__name__}:RATE", "must be a function"),
        ("raising_on_import:f", "raised ZeroDivisionError"),
    ],
)
def test_factories_that_are_none(name, message, tmp_path, monkeypatch):
    (tmp_path / "raising_on_import.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(InputError, match=message):
        own_model.find(name)


def changed(**fields):
    return lambda: portnet.Model(**vars(honest()) | fields)


def raising():
    raise KeyError("weights")


BAD = {
    "a_module": (layers, "must return a portnet.Model, got Sequential"),
    "no_module": (changed(module=print), "must be a torch.nn.Module"),
    "raising": (raising, "raised KeyError: 'weights'"),
    "double": (changed(module=layers().double()), "0.weight must be float32"),
    "pair": (changed(module=nn.LSTM(6, 5), batch=vectors), "must return one tensor"),
    "wide_inputs": (
        changed(batch=lambda n, seed: (np.zeros((n, 2, 6, 6)), np.zeros(n, int))),
        "float32 or int64 inputs",
    ),
    "too_many": (changed(batch=lambda n, seed: pictures(n + 1, seed)), "of 2 items"),
    "no_pair": (changed(batch=lambda n, seed: np.zeros((n + 1, 3))), "inputs and targets"),
    "no_seed": (changed(batch=lambda n, seed: pictures(n, None)), "two different batches"),
    "misfit": (changed(batch=vectors), "fails on inputs float32"),
    "losses": (changed(loss=nn.CrossEntropyLoss(reduction="none")), "must be one number"),
}


@pytest.mark.parametrize("name", BAD)
def test_models_that_are_none(name, monkeypatch):
    factory, message = BAD[name]
    monkeypatch.setattr(sys.modules[__name__], name, factory, raising=False)
    with pytest.raises(InputError, match=message):
        OwnModel(spec(name))


@pytest.mark.parametrize(
    ("backend", "settings", "message"),
    [
        ("reference", Settings(), "PortNet's own network only"),
        ("cpu", Settings(formulation="unfold"), "of PortNet's own network"),
        ("cpu", Settings(engine="graph"), "no engine 'graph'"),
        ("cpu", Settings(precision="tf32"), "does not compute in 'tf32'"),
    ],
)
def test_unsupported_stacks(backend, settings, message):
    with pytest.raises(Unsupported, match=message):
        OwnModel(spec()).open(plugins.backends()[backend], settings)


def test_what_cannot_be_exported(monkeypatch):
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    monkeypatch.setattr(sys.modules[__name__], "branching", changed(module=Branching(), batch=vectors), raising=False)
    work = OwnModel(spec("branching", mode="infer"))
    with monkeypatch.context() as patch:
        patch.setattr(torch_own.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(Unavailable, match=r"portnet\[model\]"):
            work.open(plugins.backends()["onnxruntime-cpu"], Settings())
    with pytest.raises(Unsupported, match=r"torch\.onnx\.export failed"):
        work.open(plugins.backends()["onnxruntime-cpu"], Settings())


# The workload.


def test_every_process_gets_the_same_weights_and_batches():
    state = torch.get_rng_state()
    one, other, third = OwnModel(spec()), OwnModel(spec()), OwnModel(spec(seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in one.start.items():
        np.testing.assert_array_equal(value, other.start[name])
    assert not np.array_equal(one.start["0.weight"], third.start["0.weight"])
    for a, b in zip(one.batch(4, 7), other.batch(4, 7), strict=True):
        np.testing.assert_array_equal(a, b)
    batches = one.batches(4)
    firsts = [next(batches)[0], next(batches)[0], one.batch(4, 0)[0], third.batch(4, 1)[0]]
    assert len({f.tobytes() for f in firsts}) == 4


def test_sessions_leave_the_model_alone():
    work = OwnModel(spec())
    session = work.open(BACKEND, Settings())
    on_device = [session.put(a) for a in work.batch(8, 1)]
    session.train_step(*on_device, step=0, learning_rate=0.1)
    assert not np.array_equal(session.weights()["0.weight"], work.start["0.weight"])
    np.testing.assert_array_equal(work.torch.weights(work.model)["0.weight"], work.start["0.weight"])
    before = session.get(session.latest_weights())
    session.train_step(*on_device, step=1, learning_rate=1e-6)
    assert not np.array_equal(session.get(session.latest_weights()), before)


def test_costs():
    work = OwnModel(spec("small"))
    infer = work.costs(32, training=False, precision="float32")["model"]
    assert infer.macs == 32 * (6 * 8 + 8 * 5)
    assert infer.bytes == 4 * (6 * 8 + 8 + 8 * 5 + 5) + 32 * 4 * 6
    # Backward twice the forward, less the first layer's input, which needs no gradient.
    assert work.costs(32, training=True, precision="float32")["model"].macs == 3 * infer.macs - 32 * 6 * 8


def test_curve():
    work = OwnModel(spec("small", curve_steps=4, curve_batch=8, perturbed=3))
    said = []
    found = work.curve(BACKEND, Settings(), said.append)
    assert len(found["losses"]) == 4
    assert [len(run) for run in found["perturbed"]] == [4, 4, 4]
    assert found["losses"] == found["perturbed"][0]
    assert 0 < max(abs(a - b) for a, b in zip(*found["perturbed"][:2], strict=True)) < 1e-5
    assert len(found["weights"]) == 64
    assert said[0].startswith("training, step 1 of 4, loss 1.")


def test_a_curve_that_diverges():
    work = OwnModel(spec("small", curve_steps=4, curve_batch=8, perturbed=2))
    session = work.open(BACKEND, Settings())
    step, told = session.train_step, iter([1.0, np.nan])
    session.train_step = lambda *a, **k: step(*a, **k) * 0 + next(told)
    assert work._fit(session, "training", str) == [1.0, own_model.DIVERGED, own_model.DIVERGED, own_model.DIVERGED]
    work = OwnModel(spec("odd", curve_steps=4, curve_batch=8, perturbed=2))
    work.model = portnet.Model(**vars(work.model) | {"learning_rate": 1e30})
    with pytest.raises(InputError, match="diverges in 4 steps of 8"):
        work.curve(BACKEND, Settings(), str)


# A whole measurement.


def measured(monkeypatch, name, *, plant=None, **asked):
    monkeypatch.setattr(cpu.Cpu, "ceilings", lambda *_: None)
    if plant is not None:
        usual = cpu.Cpu.open_module
        monkeypatch.setattr(cpu.Cpu, "open_module", lambda *a: [s := usual(*a), plant(s)][0])
    asked = {"curve_steps": 3, "curve_batch": 4, "perturbed": 2, "blocks": 3, "quick": True, "batch": 8} | asked
    measurement = Measurement(spec(name, **asked))
    if measurement.prepare():
        for _ in range(3):
            measurement.block()
    return measurement.finish()


def test_a_measurement(monkeypatch):
    found = measured(monkeypatch, "small")
    # Three blocks beside other tests may drift.
    assert found.outcome in ("works", "unsteady"), found.reason
    assert found.gates["parity"]["passed"]
    assert found.gates["curve"]["passed"]
    assert found.gates["clock"]["train"]["honest"]
    assert found.weights


def test_a_measurement_of_what_is_wrong(monkeypatch):
    found = measured(monkeypatch, "honest", plant=eps)
    assert (found.outcome, found.samples) == ("wrong", {})


def test_a_measurement_of_no_model(monkeypatch):
    found = measured(monkeypatch, "absent")
    assert found.outcome == "failed"
    assert "has no 'absent'" in found.reason


# The example.


@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_the_example(name, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "own_model")
    work = OwnModel(Spec(backend="cpu", model=f"small:{name}", mode="train", batch=8))
    found = work.verdict(BACKEND, Settings())
    assert found.passed, found
    assert isinstance(work.open(BACKEND, Settings()), Session)
    assert issubclass(InputError, PortNetError)
