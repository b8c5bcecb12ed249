"""The network as a user holds it, on the back end that PORTNET_TEST_BACKEND names; cpu otherwise."""

import dataclasses
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

import portnet
from portnet import alexnet, images, onnx_export, plugins, weights
from portnet.contract import Backend, Device
from portnet.errors import (
    ExportError,
    InputError,
    PictureError,
    PortNetError,
    Unavailable,
    UnknownName,
    Unsupported,
    WeightsError,
)
from portnet.graph import LRN, Constant, Conv, Dropout, Flatten, Graph, Linear, MaxPool, Normal, Pad, Recipe, ReLU
from portnet.images import DataSet, Splits
from portnet.plugins import Registry
from portnet.training import Diverged

BACKEND = os.environ.get("PORTNET_TEST_BACKEND", "cpu")
EVERY = (BACKEND, "reference", "onnxruntime-cpu")
TRAIN = (BACKEND, "reference")


def make_tiny(*, image_size: int = 35, classes: int = 10, dropout: float = 0.5, bias: float = 0.1) -> Graph:
    """A preset that opens in no time. Its weights are wide enough that a mistake shows in the first losses."""
    return alexnet._graph(
        "tiny",
        image_size,
        [
            Pad(name="pad", right=1, bottom=1),
            Conv(name="conv1", in_channels=3, out_channels=8, kernel=11, stride=4),
            ReLU(name="relu1"),
            LRN(name="norm1", alpha=5e-4, k=2.0, groups=2),
            MaxPool(name="pool1"),
            Flatten(name="flatten"),
        ],
        lambda features: [
            Linear(
                name="fc6",
                in_features=features,
                out_features=32,
                weight_init=Normal(std=0.05),
                bias_init=Constant(value=bias),
            ),
            ReLU(name="relu6"),
            Dropout(name="drop6", p=dropout),
            Linear(name="fc8", in_features=32, out_features=classes, weight_init=Normal(std=0.2)),
        ],
        Recipe(learning_rate=2e-3, momentum=0.9, weight_decay=5e-4),
        alexnet.graph().normalisation,
    )


@pytest.fixture(autouse=True)
def _tiny_is_a_preset(monkeypatch):
    monkeypatch.setitem(alexnet.PRESETS, "tiny", make_tiny)


def tiny(backend=BACKEND, classes=10, **options):
    return portnet.AlexNet(backend, "tiny", classes=classes, **options)


def batch(count=4, size=35, seed=0):
    return np.random.default_rng(seed).normal(0, 60, (count, 3, size, size)).astype(np.float32)


LABELS = np.array([3, 1, 0, 9])


def assert_close(values, expected):
    """Bit for bit on the processor. Elsewhere torch's own default for convolutions may be TF32."""
    atol = 0 if BACKEND == "cpu" else 5e-3 * np.abs(expected).max()
    np.testing.assert_allclose(values, expected, rtol=0, atol=atol)


def colours(count=12, **options):
    """Pictures of one colour each under noise; the colour is the class."""
    labels = np.arange(count) % 3

    def read(i):
        noise = np.random.default_rng(i).integers(0, 60, (40, 40, 3))
        return (noise + 180 * np.eye(3, dtype=int)[labels[i]]).astype(np.uint8)

    names = ("red", "green", "blue")
    mean = (90.0, 90.0, 90.0)
    made = DataSet(
        name="colours", class_names=names, labels=labels, ids=7 + np.arange(count), mean=mean, read=read, flip=False
    )
    return dataclasses.replace(made, **options)


@pytest.fixture(scope="module")
def start():
    """Weights at which mistakes show, of the real network at the size that the tests use."""
    return weights.parity(alexnet.graph("paper2012", image_size=67, classes=10))


@pytest.fixture(scope="module")
def nets(start):
    """The real network, one on every back end, from the same weights. Not to be trained."""
    return {
        name: portnet.AlexNet(name, "paper2012", image_size=67, classes=10, weights=start)
        for name in dict.fromkeys(EVERY)
    }


# In and out.


@pytest.mark.parametrize("backend", EVERY)
def test_numpy_in_numpy_out_and_torch_in_torch_out(backend):
    net = tiny(backend)
    given = batch()
    before = given.copy()
    logits = net(given)
    assert type(logits) is np.ndarray
    assert (logits.dtype, logits.shape) == (np.float32, (4, 10))
    tensor = torch.tensor(given, requires_grad=True)
    answer = net(tensor)
    assert type(answer) is torch.Tensor
    assert (answer.dtype, answer.device, answer.requires_grad) == (torch.float32, tensor.device, False)
    np.testing.assert_array_equal(answer.numpy(), logits)
    logits[...] = 0
    np.testing.assert_array_equal(net(given), answer.numpy())
    np.testing.assert_array_equal(given, before)


def test_a_tensor_comes_back_on_the_device_it_came_from():
    device = tiny().module.conv1.weight.device
    answer = tiny()(torch.tensor(batch(), device=device))
    assert answer.device == device
    # A network on another device than the tensor's.
    assert tiny("reference")(torch.tensor(batch(), device=device)).device == device


def test_float64_goes_in_and_comes_out_where_the_session_computes_in_it():
    net = tiny("reference", precision="float64")
    fine = batch().astype(np.float64) + 1e-9
    assert net(fine).dtype == np.float64
    assert np.abs(net(fine) - net(batch())).max() > 0
    assert net(torch.tensor(fine)).dtype == torch.float64
    np.testing.assert_allclose(net(fine), tiny("reference")(batch()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", EVERY)
def test_images_may_be_views(backend):
    net, given = tiny(backend), batch()
    mirrored = net(np.ascontiguousarray(given[..., ::-1]))
    np.testing.assert_array_equal(net(given[..., ::-1]), mirrored)
    np.testing.assert_array_equal(net(torch.tensor(given).flip(3)).numpy(), mirrored)
    np.testing.assert_array_equal(net(np.asfortranarray(given)), net(given))
    np.testing.assert_array_equal(net(torch.tensor(given).to(memory_format=torch.channels_last)).numpy(), net(given))
    assert net.evaluate((given[..., ::-1], LABELS[::-1])).count == 4


def test_back_ends_agree_on_the_logits(nets):
    given = batch(size=67)
    expected = nets["reference"](given)
    assert np.ptp(expected, axis=0).min() > 1e-2 * np.abs(expected).max(), "the images must give different logits"
    for net in nets.values():
        np.testing.assert_allclose(net(given), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


# Weights.


@pytest.mark.parametrize("backend", EVERY)
def test_weights_are_those_given_under_their_names_in_torchs_shapes(nets, start, backend):
    held = nets[backend].weights()
    shapes = {name: value.shape for name, value in held.items()}
    names = [f"{layer}.{kind}" for layer in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
             for kind in ("weight", "bias")]  # fmt: skip
    assert list(held) == names
    assert shapes["conv1.weight"] == (96, 3, 11, 11)
    assert shapes["conv2.weight"] == (256, 48, 5, 5)
    assert shapes["conv5.bias"] == (256,)
    assert shapes["fc6.weight"] == (4096, 256)
    assert shapes["fc8.weight"] == (10, 4096)
    for name, value in held.items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, start[name])
    assert sum(v.size for v in held.values()) == nets[backend].graph.parameter_count


@pytest.mark.parametrize("backend", EVERY)
def test_weights_are_copies(backend):
    given = weights.initial(make_tiny())
    net = tiny(backend, weights=given)
    logits = net(batch())
    for value in [*given.values(), *net.weights().values()]:
        value[...] = 0
    np.testing.assert_array_equal(net(batch()), logits)
    assert net.weights()["fc8.weight"].any()


def test_weights_from_a_state_dict():
    net = tiny(seed=5)
    np.testing.assert_array_equal(tiny("reference", weights=net.weights())(batch()), tiny("reference", seed=5)(batch()))
    on_host = {name: value.cpu() for name, value in net.module.state_dict().items()}
    np.testing.assert_array_equal(tiny(weights=on_host)(batch()), net(batch()))


# Saving and loading.


@pytest.mark.parametrize("backend", EVERY)
def test_the_real_network_saved_and_loaded_on_every_back_end(nets, backend, tmp_path):
    path = nets[BACKEND].save(tmp_path / "net.safetensors")
    net = portnet.AlexNet.load(path, backend)
    assert (net.graph, net.backend.name) == (nets[BACKEND].graph, backend)
    given = batch(size=67)
    np.testing.assert_array_equal(net(given), nets[backend](given))


def test_a_round_trip_keeps_weights_classes_mean_and_how_pictures_are_read(tmp_path):
    data = colours(whole=True)
    net = tiny(classes=4, mean=data.mean, dropout=0.25)
    assert (net.class_names, net.whole) == (None, False)
    net.fit(data, steps=2, batch=4)
    assert (net.class_names, net.whole) == (("red", "green", "blue"), True)
    path = net.save(str(tmp_path / "net.safetensors"))
    assert path == tmp_path / "net.safetensors"
    for backend in dict.fromkeys(EVERY):
        again = portnet.AlexNet.load(path, backend)
        assert again.graph == net.graph
        assert again.graph.normalisation.mean == data.mean
        assert dict(again.graph.options)["dropout"] == 0.25
        assert (again.class_names, again.whole, again.steps) == (net.class_names, True, 0)
        for name, value in net.weights().items():
            np.testing.assert_array_equal(again.weights()[name], value)
        assert [c for c, _ in again.classify(data.read(1))] == [c for c, _ in net.classify(data.read(1))]
    twice = portnet.AlexNet.load(again.save(tmp_path / "twice"), BACKEND)
    assert (twice.graph, twice.class_names, twice.whole) == (net.graph, net.class_names, True)
    assert weights.digest(twice.weights()) == weights.digest(net.weights())


def test_a_network_that_saw_no_data_set_has_no_names(tmp_path):
    net = portnet.AlexNet.load(tiny().save(tmp_path / "net"), "reference")
    assert (net.class_names, net.whole) == (None, False)


def test_loading_takes_precision_formulation_and_seed(tmp_path):
    path = tiny().save(tmp_path / "net")
    net = portnet.AlexNet.load(path, BACKEND, precision="bfloat16", formulation="stock", seed=3)
    assert (net.settings.precision, net.settings.formulation, net.settings.seed) == ("bfloat16", "stock", 3)


def test_saving_where_it_cannot_be(tmp_path):
    with pytest.raises(WeightsError, match="no folder"):
        tiny().save(tmp_path / "missing" / "net")
    with pytest.raises(WeightsError, match="it is a folder"):
        tiny().save(tmp_path)


# The torch module.


def test_the_module_computes_what_the_session_does():
    net = tiny()
    assert isinstance(net.module, nn.Module)
    assert [name for name, _ in net.module.named_parameters()] == list(net.graph.parameters)
    for name, value in net.module.named_parameters():
        np.testing.assert_array_equal(value.detach().cpu().numpy(), net.weights()[name])
    given = torch.tensor(batch(), device=net.module.conv1.weight.device)
    net.module.eval()
    with torch.no_grad():
        assert_close(net.module(given).cpu().numpy(), net(batch()))
    # A pass of the module's in training is another thing: it drops.
    net.module.train()
    assert not np.array_equal(net.module(given).detach().cpu().numpy(), net(batch()))


def test_the_module_shares_the_sessions_weights():
    net = tiny()
    given = torch.tensor(batch(), device=net.module.conv1.weight.device)
    module = net.module
    before = net(batch())
    net.fit((batch(), LABELS), steps=1, batch=4)
    after = net(batch())
    assert not np.array_equal(before, after)
    module.eval()
    with torch.no_grad():
        assert_close(module(given).cpu().numpy(), after)
    # And what torch's own optimiser does, the session sees.
    module(given).sum().backward()
    torch.optim.SGD(module.parameters(), lr=1e-3).step()
    assert not np.array_equal(net(batch()), after)
    np.testing.assert_array_equal(module.fc8.bias.detach().cpu().numpy(), net.weights()["fc8.bias"])


@pytest.mark.parametrize("backend", ["reference", "onnxruntime-cpu"])
def test_no_module_where_there_is_no_torch(backend):
    with pytest.raises(Unsupported, match=f"backend {backend} has no torch module; use one of torch's, such as cpu"):
        _ = tiny(backend).module


# ONNX.


def run_file(path, given):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": given})[0]


@pytest.mark.parametrize("backend", EVERY)
def test_an_exported_file_computes_what_the_session_does(backend, tmp_path):
    net = tiny(backend, seed=1)
    done = net.export_onnx(tmp_path / "net.onnx")
    assert done.path == tmp_path / "net.onnx"
    assert 0 <= done.error < 1e-5
    np.testing.assert_allclose(run_file(done.path, batch()), net(batch()), rtol=1e-4, atol=1e-4)
    # Trained weights are what is exported, not the initial ones.
    if "train" in net.backend.modes:
        net.fit((batch(), LABELS), steps=2, batch=4)
        net.export_onnx(done.path)
        np.testing.assert_allclose(run_file(done.path, batch()), net(batch()), rtol=1e-4, atol=1e-4)


def test_the_real_network_is_exported(nets, tmp_path):
    assert nets[BACKEND].export_onnx(tmp_path / "net.onnx").error < 1e-5


def test_an_export_names_the_layer_that_differs_most(tmp_path):
    net = tiny("reference", precision="bfloat16")
    done = net.export_onnx(tmp_path / "net.onnx")
    assert list(done.layers) == [layer.name for layer in net.graph.layers]
    assert done.layers[done.worst] == max(done.layers.values()) > 1e-4
    assert net.export_onnx(tmp_path / "net.onnx", verify=False).worst is None


def test_a_file_that_prepares_its_pictures_gives_the_same_answers(tmp_path):
    """As the Python pipeline does, for pictures cut to size; with class names and probabilities."""
    data = portnet.load_data("digits")
    net = portnet.AlexNet("cpu", "caffe", classes=10, image_size=67, mean=data.train.mean)
    net.fit(data, steps=1, batch=2)
    done = net.export_onnx(tmp_path / "net.onnx", preprocess=True, softmax=True)
    assert done.error < 1e-5
    pictures = np.stack([data.test.read(i) for i in range(16)])
    cut = np.stack([images._view(picture, 67, whole=net.whole) for picture in pictures])
    session = onnxruntime.InferenceSession(done.path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pictures": cut})
    told = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    for picture, row in zip(pictures, found, strict=True):
        ((name, probability),) = net.classify(picture, top=1)
        assert told[row.argmax()] == name
        assert row.max() == pytest.approx(probability, abs=1e-5)


@pytest.mark.parametrize("how", [{"dynamic_batch": False}, {"opset": 21}, {"softmax": True}])
def test_every_way_of_exporting_is_verified(how, tmp_path):
    net = tiny("reference")
    assert net.export_onnx(tmp_path / "net.onnx", **how).error < 1e-5
    with pytest.raises(InputError, match="opset must lie between"):
        net.export_onnx(tmp_path / "net.onnx", opset=3)


def test_a_narrow_session_may_differ_by_what_its_precision_explains(tmp_path):
    error = tiny("reference", precision="bfloat16").export_onnx(tmp_path / "net.onnx").error
    assert 1e-4 < error < 0.15


@pytest.mark.parametrize("spoil", [lambda y: y * 1.001, lambda y: y * np.nan, lambda y: y[:, ::-1]])
def test_a_session_that_differs_from_its_file_is_found(spoil, tmp_path, monkeypatch):
    net = tiny("reference")
    infer = net.session.infer
    monkeypatch.setattr(net.session, "infer", lambda x: spoil(infer(x)))
    with pytest.raises(
        ExportError, match=r"differs from the session's by .*; of all layers .*; the file is left for inspection"
    ) as caught:
        net.export_onnx(tmp_path / "net.onnx")
    assert str(tmp_path / "net.onnx") in str(caught.value)
    assert (tmp_path / "net.onnx").exists()


def test_a_file_that_differs_from_its_session_is_found(tmp_path, monkeypatch):
    export = onnx_export.export

    def spoilt(graph, values, path, **how):
        return export(graph, values | {"fc8.bias": values["fc8.bias"] + np.float32(0.1)}, path, **how)

    monkeypatch.setattr(onnx_export, "export", spoilt)
    with pytest.raises(ExportError):
        tiny().export_onnx(tmp_path / "net.onnx")
    assert tiny().export_onnx(tmp_path / "net.onnx", verify=False).error is None


def test_a_file_that_cannot_be_run_here_has_no_error_figure(tmp_path, monkeypatch):
    net = tiny()

    def absent(*_):
        raise Unavailable("ONNX Runtime cannot be imported", "install it")

    with monkeypatch.context() as patch:
        patch.setattr(type(plugins.backends()["onnxruntime-cpu"]), "run_model", absent)
        assert net.export_onnx(tmp_path / "net.onnx").error is None
    monkeypatch.setattr(plugins, "backends", lambda: Registry([net.backend], []))
    assert net.export_onnx(tmp_path / "net.onnx").error is None


def test_exporting_where_it_cannot_be(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        tiny().export_onnx(tmp_path / "missing" / "net.onnx")


# What is printed.


def test_summary(nets):
    lines = nets[BACKEND].summary().splitlines()
    assert re.fullmatch(r"layer +output +parameters +MACs", lines[0])
    assert any(re.fullmatch(r"conv1 \(Conv\) +96x15x15 +34,944 +7,840,800", line) for line in lines)
    assert re.fullmatch(r"total \(paper2012\) +20,209,034 +[\d,]+", lines[-1])


def test_repr():
    net = tiny("reference", precision="float64")
    count = 3 * 121 * 8 + 8 + 72 * 32 + 32 + 320 + 10
    assert repr(net) == f"<AlexNet tiny, {count:,} parameters, float64, on reference ({net.device.name})>"


# Training.


def test_one_seed_gives_the_same_weights_and_the_same_first_losses_everywhere():
    """Order, crops, colour noise and dropout masks are all in the losses of the real network."""
    data = colours(whole=False, flip=True)

    def first(backend, seed):
        net = portnet.AlexNet(backend, "caffe", classes=3, image_size=67, seed=seed, mean=data.mean)
        held = weights.digest(net.weights())
        return held, net.fit(data, steps=3, batch=4)

    ours, theirs = first(BACKEND, 1), first("reference", 1)
    assert ours[0] == theirs[0]
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5)


def test_another_seed_gives_other_weights_and_other_losses():
    nets = [tiny("reference", seed=seed) for seed in (0, 0, 2**64 - 1)]
    digests = [weights.digest(net.weights()) for net in nets]
    assert digests[0] == digests[1] != digests[2]
    # From one set of weights, so that only order, augmentation and masks differ.
    same = nets[0].weights()
    losses = [tiny("reference", seed=seed, weights=same).fit(colours(), steps=1, batch=4) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_dropout_masks_go_by_the_seed_and_the_step():
    """With one batch of the same images, nothing but the masks can differ."""
    given = batch(), LABELS
    at_rest = {"learning_rate": 0.0, "batch": 4}
    net = tiny("reference", dropout=0.5)
    losses = net.fit(given, steps=3, **at_rest)
    assert len(set(losses)) == 3
    assert tiny("reference", weights=net.weights(), seed=1).fit(given, steps=1, **at_rest) != losses[:1]
    without = tiny("reference", dropout=0.0).fit(given, steps=3, **at_rest)
    assert np.ptp(without) < 1e-6


@pytest.mark.parametrize("backend", TRAIN)
@pytest.mark.parametrize("data", [colours(), (batch(12), np.arange(12) % 10)], ids=["data set", "pair"])
def test_fitting_twice_is_fitting_once_for_longer(backend, data):
    """Three batches make an epoch, so that the second call begins inside one."""
    options = {"classes": 10, "seed": 3}
    once, twice = tiny(backend, **options), tiny(backend, **options)
    expected = once.fit(data, steps=8, batch=4)
    assert once.steps == 8
    losses = twice.fit(data, steps=4, batch=4)
    assert twice.steps == 4
    losses += twice.fit(data, steps=4, batch=4)
    assert twice.steps == 8
    # Some devices sum gradients in an order of the moment.
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    for name, value in once.weights().items():
        np.testing.assert_allclose(twice.weights()[name], value, rtol=1e-3, atol=1e-5)


def test_epochs_and_their_default():
    seen = []
    net = tiny(classes=3)
    losses = net.fit(colours(13), batch=4, epochs=2, on_step=lambda *step: seen.append(step))
    assert len(losses) == net.steps == 6
    assert seen == [(i + 1, loss) for i, loss in enumerate(losses)]
    assert len(net.fit(colours(13), batch=4)) == 3
    assert net.steps == 9


def test_the_training_split_is_trained_on_and_the_test_split_evaluated_on():
    def unread(i):
        raise AssertionError("the other split was read")

    net = tiny(classes=3, mean=(90, 90, 90))
    net.fit(Splits(train=colours(), test=colours(read=unread)), steps=2, batch=4)
    assert net.evaluate(Splits(train=colours(read=unread), test=colours(6))).count == 6


@pytest.mark.parametrize("backend", TRAIN)
def test_it_learns(backend):
    net = tiny(backend, classes=3, mean=(90, 90, 90))
    before = net.evaluate(colours(24))
    losses = net.fit(colours(24), steps=40, batch=12)
    after = net.evaluate(colours(24))
    assert after.top1 == 1.0 > before.top1
    assert after.loss < 0.2 * before.loss
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


@pytest.mark.parametrize("backend", TRAIN)
def test_the_learning_rate_is_the_recipes_unless_given(backend):
    given = (batch(), LABELS)

    def moved(**options):
        net = tiny(backend)
        before = net.weights()["fc8.bias"]
        net.fit(given, steps=1, batch=4, **options)
        return np.abs(net.weights()["fc8.bias"] - before).max()

    assert moved(learning_rate=2e-3) == moved() > 0
    assert moved(learning_rate=4e-3) == pytest.approx(2 * moved(), rel=1e-5)
    assert moved(learning_rate=0) == 0


class StopTraining(Exception):
    pass


def test_an_interrupted_training_goes_on_where_it_was():
    expected = tiny("reference").fit(colours(), steps=8, batch=4)
    net = tiny("reference")

    def stop(step, loss):
        if step == 3:
            raise StopTraining

    with pytest.raises(StopTraining):
        net.fit(colours(), steps=8, batch=4, on_step=stop)
    # The loss of a step is told when the next has been taken.
    assert net.steps == 4
    assert net.fit(colours(), steps=4, batch=4) == expected[4:]


def test_a_picture_lost_on_the_way_does_not_undo_the_steps_before_it():
    expected = tiny("reference").fit(colours(), steps=6, batch=4)
    reads = []

    def failing(i):
        reads.append(i)
        if len(reads) > 16:
            raise PictureError("cannot read it")
        return colours().read(i)

    net = tiny("reference")
    with pytest.raises(PictureError):
        net.fit(colours(read=failing), steps=6, batch=4)
    assert net.steps == 4
    assert net.fit(colours(), steps=2, batch=4) == expected[4:]


def test_evaluation_by_ten_views_and_its_progress():
    net = tiny(classes=3, mean=(90, 90, 90))
    counted = []
    result = net.evaluate(colours(10), views=10, batch=40, on_batch=counted.append)
    assert result.count == 10
    assert counted == [4, 8, 10]
    assert result.loss != net.evaluate(colours(10)).loss


# One picture.


def test_classify_ranks_and_names(tmp_path):
    data = colours()
    net = tiny(classes=3, mean=data.mean)
    numbered = net.classify(data.read(0))
    assert sorted(c for c, _ in numbered) == ["0", "1", "2"]
    net.fit(data, steps=30, batch=12)
    for i in range(3):
        ranked = net.classify(data.read(i))
        assert ranked[0][0] == data.class_names[i]
        assert sum(p for _, p in ranked) == pytest.approx(1)
        assert [p for _, p in ranked] == sorted((p for _, p in ranked), reverse=True)
        assert net.classify(data.read(i), top=1) == ranked[:1]
    logits = net(portnet.preprocess([data.read(2)], net.graph))[0].astype(float)
    assert ranked[0][1] == pytest.approx(1 / np.exp(logits - logits[2]).sum(), rel=1e-5)
    Image.fromarray(data.read(1)).save(tmp_path / "picture.png")
    assert net.classify(tmp_path / "picture.png") == net.classify(str(tmp_path / "picture.png"))
    assert net.classify(tmp_path / "picture.png") == net.classify(data.read(1))


def test_classify_scales_whole_what_was_trained_on_whole():
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 60:] = 255  # outside the central square
    net = tiny(classes=3)
    cropped = net.classify(wide)
    net.fit(colours(whole=True), steps=1, batch=4, learning_rate=0)
    whole = net.classify(wide)
    assert [p for _, p in whole] != [p for _, p in cropped]
    logits = net(portnet.preprocess([wide], net.graph, whole=True))[0]
    assert whole[0][0] == ("red", "green", "blue")[logits.argmax()]


def test_classes_without_a_name_are_numbered():
    net = tiny(classes=5)
    net.fit(colours(), steps=1, batch=4)
    assert {c for c, _ in net.classify(colours().read(0))} == {"red", "green", "blue", "3", "4"}


# Wrong input.


def refuses(error, match, call):
    """The error is of that very kind, PortNet's own, and says what was expected."""
    with pytest.raises(error, match=match) as caught:
        call()
    assert type(caught.value) is error
    assert isinstance(caught.value, PortNetError)


SHAPE = r"\(n, 3, 35, 35\)"
WRONG_IMAGES = {
    "one picture without a batch": (batch()[0], rf"must have shape {SHAPE}.*got \(3, 35, 35\)"),
    "channels last": (batch().transpose(0, 2, 3, 1), rf"{SHAPE}.*got \(4, 35, 35, 3\)"),
    "another size": (batch(size=36), rf"{SHAPE}.*got \(4, 3, 36, 36\)"),
    "none": (batch()[:0], rf"{SHAPE} with n of at least 1, got \(0, 3, 35, 35\)"),
    "uint8": (batch().astype(np.uint8), rf"float32 {SHAPE}.*got dtype uint8; portnet.preprocess makes them"),
    "int64": (batch().astype(np.int64), "must be float32.*got dtype int64"),
    "float64": (batch().astype(np.float64), "must be float32.*got dtype float64"),
    "float16": (batch().astype(np.float16), "must be float32.*got dtype float16"),
    "a list of floats": (batch(1).tolist(), "must be float32.*got dtype float64"),
    "a ragged list": ([[1.0], [2.0, 3.0]], "must be float32.*got what is no array"),
    "a name": ("digits", "must be float32.*got dtype <U6"),
    "nothing": (None, "must be float32.*got dtype object"),
    "NaN": (np.where(np.arange(35) == 34, np.float32(np.nan), batch()), "images hold NaN or infinity"),
    "infinity": (np.where(np.arange(35) == 34, np.float32(np.inf), batch()), "images hold NaN or infinity"),
    "torch uint8": (torch.zeros(4, 3, 35, 35, dtype=torch.uint8), "must be float32.*got dtype uint8"),
    "torch int64": (torch.zeros(4, 3, 35, 35, dtype=torch.int64), "must be float32.*got dtype int64"),
    "torch bfloat16": (torch.zeros(4, 3, 35, 35, dtype=torch.bfloat16), "must be float32.*got what is no array.*BF"),
    "torch sparse": (torch.zeros(4, 3, 35, 35).to_sparse(), "must be float32.*got what is no array.*[Ss]parse"),
    "torch shape": (torch.zeros(4, 3, 36, 36), rf"{SHAPE}.*got \(4, 3, 36, 36\)"),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "says"), WRONG_IMAGES.values(), ids=WRONG_IMAGES)
def test_wrong_images(wrong, says):
    net = tiny("reference")
    refuses(InputError, says, lambda: net(wrong))
    labels = np.zeros(len(wrong) if wrong is not None else 0, np.int64)
    refuses(InputError, says, lambda: net.fit((wrong, labels), steps=1, batch=1))
    refuses(InputError, says, lambda: net.evaluate((wrong, labels)))
    assert net.steps == 0


WRONG_LABELS = {
    "too large": ([0, 1, 2, 10], r"must lie in \[0, 10\), the network's classes, got 0 to 10"),
    "negative": ([0, 1, 2, -1], r"must lie in \[0, 10\), the network's classes, got -1 to 2"),
    "far too large": (np.array([0, 1, 2, 2**64 - 1], np.uint64), r"must lie in \[0, 10\)"),
    "floats": (LABELS.astype(float), r"must be integers of shape \(4,\), got float64"),
    "booleans": (LABELS > 1, r"must be integers of shape \(4,\), got bool"),
    "one hot": (np.eye(10, dtype=int)[LABELS], r"must be integers of shape \(4,\), got int64 of shape \(4, 10\)"),
    "too few": (LABELS[:3], r"must be integers of shape \(4,\), got int64 of shape \(3,\)"),
    "names": (["cat", "dog", "cat", "dog"], r"must be integers of shape \(4,\), got <U3"),
    "ragged": ([[0], [1, 2], [3], [4]], r"must be integers of shape \(4,\), got what is no array"),
}


@pytest.mark.parametrize(("wrong", "says"), WRONG_LABELS.values(), ids=WRONG_LABELS)
def test_wrong_labels(wrong, says):
    net = tiny("reference")
    refuses(InputError, says, lambda: net.fit((batch(), wrong), steps=1, batch=4))
    refuses(InputError, says, lambda: net.evaluate((batch(), wrong)))


@pytest.mark.parametrize(
    "wrong",
    ["digits", None, batch(), [batch(), LABELS], (batch(),), (batch(), LABELS, LABELS), {"images": batch()}],
    ids=["name", "nothing", "images", "list", "one", "three", "dict"],
)
def test_what_is_no_data(wrong):
    says = r"data must be a data set, as portnet.load_data gives it, or a pair \(images, labels\), got "
    refuses(InputError, says, lambda: tiny().fit(wrong, steps=1, batch=2))
    refuses(InputError, says, lambda: tiny().evaluate(wrong))


WRONG_AMOUNTS = {
    "no steps": ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
    "half a step": ({"steps": 1.5}, "steps must be an integer of at least 1, got 1.5"),
    "no epochs": ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
    "both": ({"epochs": 1, "steps": 1}, "either epochs or steps"),
    "no batch": ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
    "a batch in words": ({"batch": "4"}, "batch must be an integer of at least 1, got '4'"),
    "too large a batch": ({"batch": 13}, "a batch of 13 needs at least as many images to train on, got 12"),
    "the default batch": ({"batch": 128}, "a batch of 128 needs at least as many images to train on, got 12"),
    "a negative rate": ({"learning_rate": -0.1}, "learning rate must be a finite number of at least 0, got -0.1"),
    "an infinite rate": ({"learning_rate": np.inf}, "learning rate must be a finite number of at least 0, got inf"),
    "no rate": ({"learning_rate": np.nan}, "learning rate must be a finite number of at least 0, got nan"),
}


@pytest.mark.parametrize(("wrong", "says"), WRONG_AMOUNTS.values(), ids=WRONG_AMOUNTS)
@pytest.mark.parametrize("data", [colours(), (batch(12), np.zeros(12, int))], ids=["data set", "pair"])
def test_wrong_amounts(wrong, says, data):
    net = tiny()
    before = weights.digest(net.weights())
    refuses(InputError, says, lambda: net.fit(data, **{"batch": 4} | wrong))
    assert (net.steps, net.class_names) == (0, None)
    assert weights.digest(net.weights()) == before


def test_wrong_amounts_in_evaluating_and_classifying():
    refuses(InputError, "batch must be an integer of at least 1, got 0", lambda: tiny().evaluate(colours(), batch=0))
    refuses(InputError, r"views must be 1 \(centre\) or 10", lambda: tiny().evaluate(colours(), views=5))
    says = "ten views need pictures that suit cropping"
    refuses(InputError, says, lambda: tiny().evaluate((batch(), LABELS), views=10))
    refuses(InputError, says, lambda: tiny().evaluate(colours(whole=True), views=10))
    refuses(InputError, "top must be at least 1, got 0", lambda: tiny().classify(colours().read(0), top=0))


def test_a_data_set_of_more_classes_than_the_network_has():
    net = tiny(classes=2)
    says = "colours has 3 classes and the network 2 outputs; make the network with classes=3"
    refuses(InputError, says, lambda: net.fit(colours(), steps=1, batch=4))
    refuses(InputError, says, lambda: net.evaluate(colours()))
    refuses(InputError, says, lambda: net.evaluate(colours(), views=10))
    assert net.class_names is None


def test_an_empty_data_set():
    empty = colours(0)
    refuses(InputError, "there is nothing to evaluate on: the data set is empty", lambda: tiny().evaluate(empty))
    refuses(InputError, "a batch of 1 needs at least as many", lambda: tiny().fit(empty, steps=1, batch=1))


@pytest.mark.parametrize(
    ("wrong", "near"), [("cdua", "cuda"), ("refrence", "reference"), ("onnxruntime-cp", "onnxruntime-cpu")]
)
def test_an_unknown_backend(wrong, near):
    refuses(UnknownName, rf"unknown backend '{wrong}'; did you mean {near}", lambda: tiny(wrong))
    refuses(UnknownName, "known: .*cpu.*reference", lambda: tiny("nothing like it"))


def test_unknown_presets_options_and_data_sets():
    make = portnet.AlexNet
    refuses(UnknownName, r"unknown preset 'cafe'; did you mean caffe", lambda: make("reference", "cafe"))
    says = "unknown option of preset caffe 'imagesize'; did you mean image_size"
    refuses(UnknownName, says, lambda: make("reference", "caffe", imagesize=67))
    refuses(UnknownName, "unknown data set 'digit'; did you mean digits", lambda: portnet.load_data("digit"))
    refuses(InputError, "the image is too small: pool2", lambda: make("reference", "caffe", image_size=20))
    refuses(InputError, "classes must be a positive integer, got 0", lambda: tiny(classes=0))
    refuses(InputError, "classes must be a positive integer, got '10'", lambda: tiny(classes="10"))


class Absent(Backend):
    name, vendor = "absent", "nobody"

    def probe(self):
        raise Unavailable("there is no such device", "buy one")

    def open(self, graph, weights, settings):
        raise NotImplementedError


class Present(Absent):
    """Infers nothing and is chosen unasked."""

    name, priority = "present", 5

    def probe(self):
        return Device(name="a device", precisions=("float32",))

    def open(self, graph, weights, settings):
        return object()


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(plugins, "backends", lambda: Registry([Absent(), Present()], []))
    refuses(Unavailable, "there is no such device; buy one", lambda: tiny("absent"))
    assert tiny("auto").backend.name == "present"
    assert portnet.AlexNet(preset="tiny").device.name == "a device"


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, "1", None, True])
def test_a_wrong_seed(seed, tmp_path):
    says = re.escape(f"seed must be an integer in [0, 2^64), got {seed!r}")
    refuses(InputError, says, lambda: tiny(seed=seed))
    path = tiny("reference").save(tmp_path / "net")
    refuses(InputError, says, lambda: portnet.AlexNet.load(path, "reference", seed=seed))


def test_precisions_and_formulations_that_are_not_there():
    says = "onnxruntime-cpu does not compute in 'bfloat16' on .*; it offers float32, int8$"
    refuses(Unsupported, says, lambda: tiny("onnxruntime-cpu", precision="bfloat16"))
    refuses(Unsupported, "does not compute in 'float13'.*it offers float64", lambda: tiny(precision="float13"))
    says = "reference has no formulation 'stock'; it offers portable"
    refuses(Unsupported, says, lambda: tiny("reference", formulation="stock"))
    refuses(Unsupported, "no formulation 'fast'; it offers portable, stock", lambda: tiny(formulation="fast"))


def test_training_where_there_is_only_inference():
    net = tiny("onnxruntime-cpu")
    says = "backend onnxruntime-cpu does not train, it only infers"
    refuses(Unsupported, says, lambda: net.fit((batch(), LABELS), steps=1, batch=4))
    assert net.evaluate((batch(), LABELS)).count == 4


def test_a_loss_that_is_no_longer_finite(tmp_path):
    net = tiny()
    says = r"the loss became (nan|inf) at step \d; try a lower learning rate"
    refuses(Diverged, says, lambda: net.fit((batch(), LABELS), steps=8, batch=4, learning_rate=1e30))
    refuses(WeightsError, "holds NaN or infinity", lambda: net.save(tmp_path / "net"))
    refuses(WeightsError, "holds NaN or infinity", lambda: net.export_onnx(tmp_path / "net.onnx"))
    assert not list(tmp_path.iterdir())


# Wrong weights.


def both_ways(path, says):
    """Refused as weights to start from, and as a network to load."""
    refuses(WeightsError, says, lambda: tiny("reference", weights=path))
    refuses(WeightsError, says, lambda: portnet.AlexNet.load(path, "reference"))


def test_a_missing_file(tmp_path):
    both_ways(tmp_path / "missing", "no weights file at .*missing")
    both_ways(tmp_path, "no weights file at ")


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_file(tmp_path, length):
    path = tiny("reference").save(tmp_path / "net.safetensors")
    path.write_bytes(path.read_bytes()[:length])
    both_ways(path, r"net.safetensors is damaged or no safetensors file .*; expected a file written by AlexNet.save")


class Harmful:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_pickle_is_never_loaded(tmp_path):
    harm = tmp_path / "harm"
    pickled = pickle.dumps(Harmful(harm))
    pickle.loads(pickled)
    assert harm.is_dir(), "the trap must work"
    harm.rmdir()
    (tmp_path / "plain.safetensors").write_bytes(pickled)
    torch.save({"fc8.bias": Harmful(harm)}, tmp_path / "zipped.pth")
    torch.save({"fc8.bias": Harmful(harm)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("plain.safetensors", "zipped.pth", "old.pth"):
        both_ways(tmp_path / name, "no safetensors file")
    assert not harm.exists()
    np.save(tmp_path / "array.npy", np.array([Harmful(harm)], object), allow_pickle=True)
    both_ways(tmp_path / "array.npy", "no safetensors file")
    with pytest.raises(PictureError):
        tiny("reference").classify(tmp_path / "plain.safetensors")
    assert not harm.exists()


def test_weights_of_another_network(tmp_path, nets):
    other = nets["reference"].save(tmp_path / "paper")
    says = r"paper holds weights of preset paper2012, not tiny; ask for preset='paper2012', or use AlexNet.load"
    refuses(WeightsError, says, lambda: tiny("reference", weights=other))
    path = tiny("reference").save(tmp_path / "net")
    says = r"fc8.weight of tiny has shape \(4, 32\), got \(10, 32\)"
    refuses(WeightsError, says, lambda: tiny("reference", classes=4, weights=path))
    says = r"fc6.weight of tiny has shape \(32, 128\), got \(32, 72\)"
    refuses(WeightsError, says, lambda: tiny("reference", image_size=43, weights=path))


def test_wrong_arrays():
    right = weights.initial(make_tiny())
    wrong = {
        "missing fc8.bias": {k: v for k, v in right.items() if k != "fc8.bias"},
        "unexpected fc9.bias": right | {"fc9.bias": right["fc8.bias"]},
        r"fc8.bias of tiny has shape \(10,\), got \(9,\)": right | {"fc8.bias": right["fc8.bias"][:9]},
        "fc8.bias must hold floating-point numbers, got int64": right | {"fc8.bias": np.zeros(10, int)},
        "fc8.bias holds NaN or infinity": right | {"fc8.bias": np.full(10, np.nan, np.float32)},
        "conv1.weight holds NaN or infinity": right | {"conv1.weight": np.full((8, 3, 11, 11), 1e300)},
    }
    for says, given in wrong.items():
        refuses(WeightsError, says, lambda given=given: tiny("reference", weights=given))


def test_a_file_with_nan(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = tiny("reference").save(tmp_path / "net")
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name).copy() for name in make_tiny().parameters}
    arrays["fc8.bias"][3] = np.nan
    save_file(arrays, path, metadata)
    both_ways(path, "net: fc8.bias holds NaN or infinity")


# Wrong pictures.


def test_an_unreadable_picture_is_named(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    net = tiny("reference")
    refuses(PictureError, r"cannot read .*broken.jpg as a picture", lambda: net.classify(tmp_path / "broken.jpg"))
    refuses(PictureError, r"cannot read .*missing.jpg", lambda: net.classify(str(tmp_path / "missing.jpg")))


@pytest.mark.parametrize("wrong", [batch()[0], np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8)])
def test_what_is_no_picture(wrong):
    says = r"picture 0 must be a uint8 array of shape \(height, width, 3\)"
    refuses(InputError, says, lambda: tiny("reference").classify(wrong))


def test_a_folder_with_an_unreadable_picture_goes_on_only_if_asked_to(tmp_path):
    for i in range(12):
        folder = tmp_path / "data" / ("red", "green")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours().read(i)).save(folder / f"{i:02}.png")
    broken = tmp_path / "data" / "green" / "99.png"
    broken.write_bytes(b"no picture")
    refuses(PictureError, re.escape(str(broken)), lambda: portnet.load_data(tmp_path / "data"))
    splits = images.load(tmp_path / "data", skip_unreadable=True)
    assert splits.skipped == (str(broken),)
    net = tiny("reference", classes=2, mean=splits.train.mean)
    net.fit(splits, steps=1, batch=4)
    assert net.class_names == ("green", "red")
    assert net.evaluate(splits).count == len(splits.test)
