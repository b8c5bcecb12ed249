"""Weights: what they start from, the files they are kept in, and torchvision's names."""

import builtins
import io
import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from portnet import alexnet, philox, weights
from portnet.contract import Settings
from portnet.errors import InputError, WeightsError
from portnet.graph import LRN, Constant, Conv, Flatten, Graph, Linear, Normal, ReLU, Uniform
from portnet_backends.cpu import Cpu


def tiny(*, image_size: int = 5, classes: int = 3, bias: float = 0.5) -> Graph:
    """A preset small enough to write a hundred times."""
    side = image_size - 2
    return Graph(
        preset="tiny",
        input=(2, image_size, image_size),
        layers=(
            Conv(name="conv", in_channels=2, out_channels=4, kernel=3, bias_init=Constant(value=bias)),
            ReLU(name="relu"),
            LRN(name="norm", alpha=1e-4, k=1.0),
            Flatten(name="flat"),
            Linear(name="fc", in_features=4 * side * side, out_features=classes),
        ),
    )


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch):
    monkeypatch.setitem(alexnet.PRESETS, "tiny", tiny)


def drawn(**options):
    graph = alexnet.graph("tiny", **options)
    return graph, weights.initial(graph, seed=1)


def equal(one, other):
    return list(one) == list(other) and all(np.array_equal(one[name], other[name]) for name in one)


# Initial values.


def test_elements_are_words_of_their_parameters_counter():
    graph = Graph(
        preset="two",
        input=(300,),
        layers=(
            Linear(name="one", in_features=300, out_features=300, bias_init=Constant(value=2.0)),  # over 2^16 words
            Linear(
                name="two", in_features=300, out_features=5, weight_init=Uniform(bound=0.5), bias_init=Normal(std=3)
            ),
        ),
    )
    found = weights.initial(graph, seed=2**40 + 1)
    assert list(found) == list(graph.parameters)

    def words(index, count):
        return philox.words(2**40 + 1, philox.Stream.WEIGHTS, [index], 0, count)[0]

    np.testing.assert_array_equal(
        found["one.weight"].ravel(), (philox.normal(words(0, 90_000)) * 0.01).astype(np.float32)
    )
    np.testing.assert_array_equal(found["one.bias"], np.full(300, 2, np.float32))
    np.testing.assert_array_equal(
        found["two.weight"].ravel(), ((2 * philox.uniform(words(2, 1500)) - 1) * 0.5).astype(np.float32)
    )
    np.testing.assert_array_equal(found["two.bias"], (philox.normal(words(3, 5)) * 3).astype(np.float32))
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}


def test_a_seed_decides_the_weights():
    graph, one = drawn()
    assert equal(one, weights.initial(graph, seed=1))
    assert equal(weights.initial(graph), weights.initial(graph, seed=0))
    other = weights.initial(graph, seed=2)
    assert (one["conv.weight"] != other["conv.weight"]).all()
    assert (one["fc.weight"].ravel()[:10] != one["conv.weight"].ravel()[:10]).all()


def gauss(std, bias=0.0):
    return Normal(std=std), Constant(value=bias)


def kaiming(fan_in):
    """PyTorch's default for convolutions and products: uniform within 1 / sqrt(fan in), biases too."""
    return Uniform(bound=fan_in**-0.5), Uniform(bound=fan_in**-0.5)


INITIAL = {
    "paper2012": [gauss(0.01), gauss(0.01, 1), gauss(0.01), *[gauss(0.01, 1)] * 4, gauss(0.01)],
    "caffe": [
        gauss(0.01),
        gauss(0.01, 0.1),
        gauss(0.01),
        *[gauss(0.01, 0.1)] * 2,
        *[gauss(0.005, 0.1)] * 2,
        gauss(0.01),
    ],
    "torchvision": [kaiming(n) for n in (363, 1600, 1728, 3456, 2304, 9216, 4096, 4096)],
    # The released code: conv3 to conv5 start wider.
    "chm145": [
        gauss(0.01),
        gauss(0.01, 1),
        gauss(0.03),
        *[gauss(0.03, 1)] * 2,
        *[gauss(0.01, 1)] * 2,
        gauss(0.01),
    ],
}


def owners(graph):
    return [layer for layer in graph.layers if layer.parameters()]


@pytest.mark.parametrize("preset", sorted(set(alexnet.PRESETS) - {"tiny"}))
def test_distributions_of_each_preset(preset):
    found = [(layer.weight_init, layer.bias_init) for layer in owners(alexnet.graph(preset))]
    for (weight, bias), (expected_weight, expected_bias) in zip(found, INITIAL[preset], strict=True):
        assert type(weight) is type(expected_weight)
        assert vars(weight) == pytest.approx(vars(expected_weight), rel=1e-15)
        assert type(bias) is type(expected_bias)
        assert vars(bias) == pytest.approx(vars(expected_bias), rel=1e-15)


@pytest.mark.parametrize("preset", sorted(set(alexnet.PRESETS) - {"tiny"}))
def test_statistics_of_each_preset(preset):
    """Every layer but the two largest, drawn whole: means, deviations, constants, bounds."""
    for layer, (weight_init, bias_init) in zip(owners(alexnet.graph(preset)), INITIAL[preset], strict=True):
        if layer.name in ("fc6", "fc7"):
            continue
        shape = layer.parameters()["weight"]
        weight = weights.draw(layer.weight_init, shape, seed=0, stream=philox.Stream.WEIGHTS, index=0)
        assert (weight.shape, weight.dtype) == (shape, np.float32)
        n, wide = weight.size, weight.astype(np.float64)
        std = weight_init.std if isinstance(weight_init, Normal) else weight_init.bound / 3**0.5
        assert abs(wide.mean()) < 5 * std / n**0.5
        assert wide.std() == pytest.approx(std, rel=5 / n**0.5)
        if isinstance(weight_init, Uniform):
            assert weight_init.bound * (1 - 20 / n) < np.abs(wide).max() <= weight_init.bound
        else:
            # The extreme of n normals is near sqrt(2 log n): neither cut off nor heavy-tailed.
            assert np.abs(wide).max() / std == pytest.approx((2 * np.log(n)) ** 0.5, rel=0.2)
        bias = weights.draw(layer.bias_init, (1000,), seed=0, stream=philox.Stream.WEIGHTS, index=1)
        if isinstance(bias_init, Constant):
            np.testing.assert_array_equal(bias, np.full(1000, bias_init.value, np.float32))
        else:
            assert bias_init.bound * 0.98 < np.abs(bias).max() <= bias_init.bound


def test_parity_weights_show_mistakes():
    """He-scaled, the last product a hundredth of it, biases of deviation 0.1; another stream than initial weights."""
    graph = alexnet.graph("paper2012", image_size=67, classes=300)
    layers = [layer for layer in owners(graph) if layer.name in ("conv2", "fc8")]
    layers = (layers[0], Flatten(name="flat"), Linear(name="fc8", in_features=256 * 9, out_features=300))
    graph = Graph(preset="two", input=(96, 3, 3), layers=layers)
    found = weights.parity(graph, seed=3)
    assert found["conv2.weight"].std() == pytest.approx((2 / (48 * 25)) ** 0.5, rel=0.01)
    assert found["fc8.weight"].std() == pytest.approx(0.01 * (2 / 2304) ** 0.5, rel=0.01)
    assert found["conv2.bias"].std() == pytest.approx(0.1, rel=0.15)
    assert found["fc8.bias"].std() == pytest.approx(0.1, rel=0.15)
    initial = weights.initial(graph, seed=3)["conv2.weight"].ravel() / 0.01
    assert abs(np.corrcoef(found["conv2.weight"].ravel(), initial)[0, 1]) < 0.02
    # A last layer that is no product is scaled like any other.
    ends = Graph(preset="one", input=(96, 3, 3), layers=layers[:1])
    np.testing.assert_array_equal(weights.parity(ends, seed=3)["conv2.weight"], found["conv2.weight"])


def test_perturbed_weights_are_one_rounding_away():
    _, one = drawn(classes=200)
    runs = [weights.perturbed(one, run) for run in (0, 1)]
    assert equal(runs[0], weights.perturbed(one, 0))
    for name, value in one.items():
        ups = [np.nextafter(value, np.float32(np.inf)) == run[name] for run in runs]
        for up, run in zip(ups, runs, strict=True):
            assert run[name].dtype == np.float32
            assert (run[name][~up] == np.nextafter(value, np.float32(-np.inf))[~up]).all()
        if value.size > 1000:
            assert all(abs(up.mean() - 0.5) < 4 * 0.5 / value.size**0.5 for up in ups)
            assert abs((ups[0] == ups[1]).mean() - 0.5) < 4 * 0.5 / value.size**0.5


# The digest.


def test_the_digest_changes_with_anything():
    _, one = drawn()
    known = weights.digest(one)
    assert len(known) == 64
    assert known == weights.digest(dict(reversed(one.items())))
    assert known == weights.digest({name: np.asfortranarray(value) for name, value in one.items()})
    assert known == weights.digest({name: value.astype(">f4") for name, value in one.items()})
    bit = {name: value.copy() for name, value in one.items()}
    bit["fc.weight"].view(np.uint32)[2, 7] ^= 1
    swapped = {name: value.copy() for name, value in one.items()}
    swapped["fc.bias"] = np.array([1, 0, 0], np.float32)
    back = {**swapped, "fc.bias": np.array([0, 1, 0], np.float32)}
    changed = [
        bit,
        swapped,
        back,
        {name.replace("fc", "fd"): value for name, value in one.items()},
        {name: value for name, value in one.items() if name != "fc.bias"},
        {**one, "extra": np.zeros(0, np.float32)},
        {**one, "fc.weight": one["fc.weight"].reshape(4, -1)},
        {**one, "fc.weight": one["fc.weight"].T},
        {**one, "fc.bias": -one["fc.bias"]},  # minus zero is another number
    ]
    assert len({known, *map(weights.digest, changed)}) == len(changed) + 1


# Checking.


def test_checked_weights_are_in_order_and_float32():
    graph, one = drawn()
    given = {name: value.astype(np.float64) for name, value in reversed(one.items())}
    checked = weights.check(graph, given)
    assert equal(checked, one)
    assert {value.dtype for value in checked.values()} == {np.dtype(np.float32)}
    half = {name: value.astype(np.float16) for name, value in one.items()}
    assert weights.check(graph, half)["fc.bias"].dtype == np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("fc.bias"), r"not weights of tiny: missing fc\.bias$"),
        (lambda w: w.update(fd=w["fc.bias"]), r"not weights of tiny: unexpected fd$"),
        (lambda w: w.update(fd=w.pop("fc.bias")), r"missing fc\.bias; unexpected fd$"),
        (lambda w: w.clear(), r"missing conv\.bias, conv\.weight, fc\.bias, fc\.weight$"),
        (lambda w: w.update({f"x{i}": w["fc.bias"] for i in range(9)}), r"unexpected x0, x1, x2, x3, \.\.\.$"),
        (lambda w: w.update({"fc.bias": np.zeros(4, np.float32)}), r"fc\.bias of tiny has shape \(3,\), got \(4,\)"),
        (lambda w: w.update({"fc.weight": w["fc.weight"].T}), r"shape \(3, 36\), got \(36, 3\)"),
        (lambda w: w.update({"fc.bias": np.zeros((3, 1), np.float32)}), r"got \(3, 1\)"),
        (lambda w: w.update({"fc.bias": np.zeros(3, np.int64)}), r"fc\.bias must hold floating-point.*int64"),
        (lambda w: w.update({"fc.bias": np.zeros(3, np.complex64)}), r"floating-point.*complex64"),
        (lambda w: w.update({"fc.bias": np.array(["a", "b", "c"])}), r"floating-point"),
        (lambda w: w["conv.weight"].__setitem__((0, 0, 0, 0), np.nan), r"conv\.weight holds NaN or infinity"),
        (lambda w: w["conv.bias"].__setitem__(3, -np.inf), r"conv\.bias holds NaN or infinity"),
        (lambda w: w.update({"fc.bias": np.array([0, 1e300, 0])}), r"fc\.bias holds NaN or infinity"),
    ],
)
def test_what_is_refused(change, message, tmp_path):
    graph, given = drawn()
    change(given)
    with pytest.raises(WeightsError, match=message):
        weights.check(graph, given)
    with pytest.raises(WeightsError, match=message):
        weights.save(tmp_path / "it.safetensors", graph, given)
    assert not list(tmp_path.iterdir())


# Files.


def saved(folder, **options):
    graph, given = drawn(**options)
    return weights.save(folder / "it.safetensors", graph, given), graph, given


def write(path, arrays, metadata=None):
    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, path, metadata)
    return path


@pytest.mark.parametrize("options", [{}, {"classes": 7, "bias": 0.25, "image_size": 6}, {"mean": (1, 2, 3)}], ids=str)
def test_round_trip(tmp_path, options):
    path, graph, given = saved(tmp_path, **options)
    assert path == tmp_path / "it.safetensors"
    held, found = weights.load(path)
    assert held == graph
    assert equal(found, given)
    assert weights.digest(found) == weights.digest(given)
    assert equal(weights.load_for(graph, str(path)), given)
    assert [file.name for file in tmp_path.iterdir()] == ["it.safetensors"]


def test_a_real_preset_round_trip(tmp_path):
    graph = alexnet.graph("caffe", image_size=67, classes=2, dropout=0.25)
    rng = np.random.default_rng(0)
    given = {name: rng.standard_normal(shape, np.float32) for name, shape in graph.parameters.items()}
    held, found = weights.load(weights.save(tmp_path / "it", graph, given))
    assert held == graph
    assert equal(found, given)


def test_what_a_file_says_of_itself(tmp_path):
    path, graph, given = saved(tmp_path, classes=7)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header = json.loads(path.read_bytes()[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert (metadata["format"], metadata["preset"]) == ("portnet.weights/1", "tiny")
    assert json.loads(metadata["options"]) == {"bias": 0.5, "classes": 7, "image_size": 5}
    assert {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()} == {
        name: ("F32", shape) for name, shape in graph.parameters.items()
    }
    assert list(given) == list(graph.parameters)


def test_saving_any_layout_and_type(tmp_path):
    graph, given = drawn()
    odd = {name: np.asfortranarray(value.astype(np.float64)) for name, value in given.items()}
    assert equal(weights.load(weights.save(tmp_path / "it", graph, odd))[1], given)


def test_saving_replaces_a_file(tmp_path):
    path, graph, _ = saved(tmp_path)
    other = weights.initial(graph, seed=9)
    weights.save(path, graph, other)
    assert equal(weights.load(path)[1], other)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_saved_file_may_be_read_by_others(tmp_path):
    path, *_ = saved(tmp_path)
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("failing", ["os.fsync", "os.fdopen", "pathlib.Path.replace", "tempfile.mkstemp"])
@pytest.mark.parametrize("there_before", [False, True])
def test_a_failing_write_leaves_what_was_there(tmp_path, monkeypatch, failing, there_before):
    graph, given = drawn()
    path = tmp_path / "it.safetensors"
    if there_before:
        path.write_bytes(b"before")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, full)
    with pytest.raises(WeightsError, match=r"cannot write .*it\.safetensors.*No space left"):
        weights.save(path, graph, given)
    assert [file.name for file in tmp_path.iterdir()] == ["it.safetensors"] * there_before
    assert not there_before or path.read_bytes() == b"before"


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    graph, given = drawn()

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        weights.save(tmp_path / "it", graph, given)
    assert not list(tmp_path.iterdir())


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    graph, given = drawn()
    seen = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(os.listdir(tmp_path)) or fsync(handle))
    weights.save(tmp_path / "it", graph, given)
    # First the file, under another name in the same folder: moving it across file systems would not be atomic.
    ((name,), *after) = seen
    assert name != "it"
    assert after == ([["it"]] if os.name == "posix" else [])  # then the folder


def test_places_that_cannot_be_written(tmp_path):
    graph, given = drawn()
    with pytest.raises(WeightsError, match="it is a folder"):
        weights.save(tmp_path, graph, given)
    with pytest.raises(WeightsError, match=r"no folder .*missing"):
        weights.save(tmp_path / "missing" / "it", graph, given)


def test_a_missing_file(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(WeightsError, match="no weights file at"):
            weights.load(path)


def test_another_presets_weights(tmp_path):
    path, *_ = saved(tmp_path)
    caffe = alexnet.graph("caffe", image_size=67)
    with pytest.raises(WeightsError, match="holds weights of preset tiny, not caffe; ask for preset='tiny'"):
        weights.load_for(caffe, path)


def test_the_same_preset_with_other_shapes(tmp_path):
    path, *_ = saved(tmp_path)
    with pytest.raises(WeightsError, match=r"it\.safetensors: fc\.weight of tiny has shape \(4, 36\), got \(3, 36\)"):
        weights.load_for(alexnet.graph("tiny", classes=4), path)
    # Options that change no shape do not matter.
    weights.load_for(alexnet.graph("tiny", bias=0.0), path)


@pytest.mark.parametrize("length", [0, 4, 8, 60, 400, -1])
def test_a_truncated_file(tmp_path, length):
    path, *_ = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(WeightsError, match="damaged or no safetensors file"):
        weights.load(path)


@pytest.mark.parametrize(
    "content",
    [b"\xff" * 8 + b"{}", b"\x02" + b"\0" * 7 + b"[]", b"GIF89a" + b"\0" * 100, struct.pack("<Q", 10) + b"not json!!"],
    ids=["huge header", "no object", "picture", "no JSON"],
)
def test_files_of_other_kinds(tmp_path, content):
    path = tmp_path / "it.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="damaged or no safetensors file"):
        weights.load(path)


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return builtins.open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["torch", "torch, old format", "pickle", "numpy"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_nothing_is_ever_unpickled(tmp_path, kind, suffix):
    mark = tmp_path / "exploded"
    path = tmp_path / f"it{suffix}"
    state = {"features.0.weight": Bomb(mark)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(state))
    elif kind == "numpy":
        buffer = io.BytesIO()
        np.save(buffer, np.array([Bomb(mark)], object), allow_pickle=True)
        path.write_bytes(buffer.getvalue())
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch")
    graph, _ = drawn()
    for load in (weights.load, lambda path: weights.load_for(graph, path)):
        with pytest.raises(WeightsError, match="no safetensors file"):
            load(path)
    assert not mark.exists()
    # The bomb is live.
    if kind == "pickle":
        pickle.loads(path.read_bytes())["features.0.weight"].close()
        assert mark.exists()


def edit(path, **changes):
    """The file again, with other metadata."""
    graph, arrays = weights.load(path)
    metadata = {"format": "portnet.weights/1", "preset": graph.preset, "options": json.dumps(dict(graph.options))}
    metadata = {k: v for k, v in {**metadata, **changes}.items() if v is not None}
    return write(path, arrays, metadata)


@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "no such preset"},
        {"preset": None},
        {"options": None},
        {"options": "{"},
        {"options": "[]"},
        {"options": "7"},
        {"options": '{"classes": "3"}'},
        {"options": '{"classes": 0}'},
        {"options": '{"clases": 3}'},
        {"options": '{"mean": 7}'},
        {"options": '{"preset": "tiny"}'},
    ],
    ids=str,
)
def test_metadata_that_names_no_network(tmp_path, changes):
    path, *_ = saved(tmp_path)
    edit(path, **changes)
    with pytest.raises(WeightsError, match=r"it\.safetensors names a network that this version cannot build"):
        weights.load(path)


def test_metadata_that_names_another_network(tmp_path):
    path, *_ = saved(tmp_path)
    edit(path, options='{"classes": 4}')
    with pytest.raises(WeightsError, match=r"it\.safetensors: fc\.weight of tiny has shape \(4, 36\), got \(3, 36\)"):
        weights.load(path)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "portnet.weights/2"}, {"format": "pt"}], ids=str)
def test_a_file_of_nobodys(tmp_path, metadata):
    _, given = drawn()
    path = write(tmp_path / "it", given, metadata)
    with pytest.raises(WeightsError, match=r"neither PortNet's weights nor torchvision's.*'conv\.bias'"):
        weights.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("fc.bias"), r"it: these are not weights of tiny: missing fc\.bias"),
        (lambda w: w.update(more=w["fc.bias"]), "unexpected more"),
        (lambda w: w["fc.bias"].__setitem__(0, np.nan), r"it: fc\.bias holds NaN"),
        (lambda w: w.update({"fc.bias": np.zeros(3, np.int32)}), "floating-point"),
        (lambda w: w.update({"fc.bias": np.zeros(2, np.float32)}), r"shape \(3,\), got \(2,\)"),
    ],
)
def test_a_file_whose_content_does_not_fit(tmp_path, change, message):
    graph, given = drawn()
    change(given)
    metadata = {"format": "portnet.weights/1", "preset": "tiny", "options": json.dumps(dict(graph.options))}
    path = write(tmp_path / "it", given, metadata)
    with pytest.raises(WeightsError, match=message):
        weights.load(path)


def test_bfloat16_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "it")
    with pytest.raises(WeightsError, match="bfloat16"):
        weights.load(tmp_path / "it")


# torchvision.


class FakeTorchvisionAlexNet(nn.Module):
    """torchvision's structure (models/alexnet.py) written out: what its state dict's numbers mean."""

    def __init__(self, classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, classes),
        )

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


@pytest.fixture(scope="module")
def theirs():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FakeTorchvisionAlexNet(10).eval()


def test_torchvisions_weights_give_torchvisions_logits(theirs, tmp_path):
    from safetensors.torch import save_file

    state = theirs.state_dict()
    save_file(state, tmp_path / "it")
    graph, ours = weights.load(tmp_path / "it")
    assert graph == alexnet.graph("torchvision", classes=10)
    assert equal(ours, weights.check(graph, weights.from_torchvision(state)))
    assert equal(weights.load_for(graph, tmp_path / "it"), ours)
    session = Cpu().open(graph, ours, Settings())
    images = np.random.default_rng(0).standard_normal((2, 3, 224, 224), np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(images)).numpy()
    np.testing.assert_allclose(session.get(session.infer(session.put(images))), expected, rtol=1e-4, atol=1e-6)
    back = weights.to_torchvision(session.weights())
    assert list(back) == list(state)
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value.numpy())
    theirs.load_state_dict({name: torch.tensor(value) for name, value in back.items()})


def test_state_dicts_of_other_networks(theirs):
    state = theirs.state_dict()
    fewer = {name: value for name, value in state.items() if name != "features.0.bias"}
    with pytest.raises(WeightsError, match=r"not a state dict of torchvision's AlexNet.*features\.0\.bias"):
        weights.from_torchvision(fewer)
    with pytest.raises(WeightsError, match=r"missing or unexpected features\.1\.weight"):
        weights.from_torchvision({**state, "features.1.weight": state["features.0.weight"]})


@pytest.mark.parametrize("last", [np.zeros(()), np.zeros(0), np.zeros((2, 2))], ids=["scalar", "empty", "matrix"])
def test_torchvisions_names_on_other_shapes(tmp_path, last):
    names = weights.to_torchvision(dict.fromkeys(alexnet.graph("torchvision").parameters, np.zeros(1, np.float32)))
    path = write(tmp_path / "it", {**names, "classifier.6.bias": last.astype(np.float32)})
    with pytest.raises(WeightsError, match=r"it: conv1\.weight of torchvision has shape"):
        weights.load(path)


def test_errors_are_portnets_own():
    assert not issubclass(WeightsError, InputError)
