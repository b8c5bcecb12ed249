"""The ONNX file and ONNX Runtime against an independent float64 computation of the same graph."""

import builtins
import json
import os
from importlib import metadata

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F

from portnet import alexnet, images
from portnet.contract import Settings
from portnet.errors import InputError, Unavailable, Unsupported, WeightsError
from portnet.graph import (
    LRN,
    AdaptiveAvgPool,
    Conv,
    Dropout,
    Flatten,
    Graph,
    Layer,
    Linear,
    MaxPool,
    Normalisation,
    Pad,
    ReLU,
    SpatialLRN,
)
from portnet.onnx_export import export, lower
from portnet.weights import digest
from portnet_backends.onnxruntime_ep import OnnxRuntime

BOUND = 1e-5  # Float32 made at most 3e-6 in these tests; the mildest mistake tried, merged towers, 7e-4.


def random_weights(graph, seed=0):
    """He-scaled weights and biases N(0, 0.1), at which mistakes show."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in graph.parameters.items():
        std = (2 / np.prod(shape[1:])) ** 0.5 if name.endswith(".weight") else 0.1
        out[name] = rng.standard_normal(shape, np.float32) * np.float32(std)
    return out


def random_images(graph, batch, seed=1):
    """Wide enough that LRN is far from inert."""
    return np.random.default_rng(seed).standard_normal((batch, *graph.input), np.float32) * np.float32(4)


def lrn_by_formula(x, layer):
    """The sum written out, channel by channel, inside each tower."""
    out, width = np.empty_like(x), x.shape[1] // layer.groups
    for c in range(x.shape[1]):
        tower, reach = c // width * width, layer.size // 2
        window = x[:, max(tower, c - reach) : min(tower + width, c + reach + 1)]
        out[:, c] = x[:, c] / (layer.k + layer.alpha / layer.size * (window**2).sum(axis=1)) ** layer.beta
    return out


def spatial_lrn_by_formula(x, layer):
    """The sum written out, position by position, inside each map."""
    out, reach = np.empty_like(x), layer.size // 2
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            window = x[:, :, max(0, i - reach) : i + reach + 1, max(0, j - reach) : j + reach + 1]
            total = (window**2).sum(axis=(2, 3))
            out[:, :, i, j] = x[:, :, i, j] / (layer.k + layer.alpha / layer.size**2 * total) ** layer.beta
    return out


def by_layer(graph, weights, images):
    """Every layer's output in float64, by torch's functions and the formula of LRN."""
    x, out = torch.from_numpy(images).double(), {}
    w = {name: torch.from_numpy(value).double() for name, value in weights.items()}
    for layer in graph.layers:
        name = layer.name
        match layer:
            case Pad():
                x = F.pad(x, (0, layer.right, 0, layer.bottom))
            case Conv():
                x = F.conv2d(
                    x, w[f"{name}.weight"], w[f"{name}.bias"], layer.stride, layer.padding, groups=layer.groups
                )
            case Linear():
                x = F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
            case ReLU():
                x = F.relu(x)
            case LRN():
                x = torch.from_numpy(lrn_by_formula(x.numpy(), layer))
            case SpatialLRN():
                x = torch.from_numpy(spatial_lrn_by_formula(x.numpy(), layer))
            case MaxPool():
                x = F.max_pool2d(x, layer.kernel, layer.stride)
            case AdaptiveAvgPool():
                x = F.adaptive_avg_pool2d(x, layer.size)
            case Flatten():
                x = x.flatten(1)
            case Dropout():
                x = x if layer.inverted else x * (1 - layer.p)
            case _:
                raise TypeError(type(layer).__name__)
        out[name] = x.numpy()
    return out


def error(got, want):
    """The worst output channel's |difference|, beside the channel's norm or the mean channel's if that is larger."""
    assert got.dtype == np.float32
    assert got.shape == want.shape
    want = np.moveaxis(want, 1, 0).reshape(want.shape[1], -1)
    got = np.moveaxis(got, 1, 0).reshape(want.shape)
    size = np.linalg.norm(want, axis=1)
    scale = np.maximum(size, np.linalg.norm(want) / len(want) ** 0.5)
    return (np.linalg.norm(got - want, axis=1) / scale).max()


def run(model, images):
    """All outputs by name, computed by ONNX Runtime on the CPU."""
    data = model if isinstance(model, bytes) else model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return dict(zip((o.name for o in session.get_outputs()), session.run(None, {"images": images}), strict=True))


def chain(*layers, shape):
    return Graph(preset="chain", input=shape, layers=layers)


def small(preset="paper2012", **options):
    return alexnet.graph(preset, **{"image_size": 67, "classes": 10, **options})


def operators(model):
    return [node.op_type for node in model.graph.node]


@pytest.fixture(scope="module")
def paper():
    """The paper's network on a small image, and its weights."""
    graph = small()
    return graph, random_weights(graph)


@pytest.fixture(scope="module")
def tiny():
    """A network in small, and its weights."""
    graph = chain(
        Pad(name="pad", right=1, bottom=1),
        Conv(name="conv1", in_channels=3, out_channels=8, kernel=3, stride=2),
        ReLU(name="relu1"),
        LRN(name="norm1", alpha=5e-2, k=2.0, groups=2),
        MaxPool(name="pool1"),
        Flatten(name="flatten"),
        Linear(name="fc2", in_features=72, out_features=16),
        Dropout(name="drop2"),
        Linear(name="fc3", in_features=16, out_features=5),
        shape=(3, 16, 16),
    )
    return graph, random_weights(graph)


@pytest.mark.parametrize("preset", sorted(alexnet.PRESETS))
def test_every_preset_at_full_size(preset, tmp_path):
    graph = alexnet.graph(preset)
    weights = random_weights(graph)
    data = export(graph, weights, tmp_path / "alexnet.onnx").read_bytes()
    images = random_images(graph, 3)
    want = by_layer(graph, weights, images)["fc8"]
    for batch in (1, 3):
        assert error(run(data, images[:batch])["logits"], want[:batch]) < BOUND


@pytest.mark.parametrize(
    ("preset", "image_size"), [*((preset, 67) for preset in sorted(alexnet.PRESETS)), ("paper2012", 98)]
)
def test_every_layer_of_every_preset(preset, image_size):
    graph = small(preset, image_size=image_size)
    weights, images = random_weights(graph), random_images(graph, 2)
    model = lower(graph, weights, every_layer=True)
    onnx.checker.check_model(model, full_check=True)
    got, want = run(model, images), by_layer(graph, weights, images)
    assert list(got) == [*want, "logits"]
    for name, value in want.items():
        assert error(got[name], value) < BOUND, name
    np.testing.assert_array_equal(got["logits"], got["fc8"])


ALONE = [
    (Pad(name="a", right=3, bottom=1), (2, 5, 4)),
    (Pad(name="a", right=0, bottom=2), (2, 5, 4)),
    (Conv(name="a", in_channels=6, out_channels=4, kernel=3), (6, 8, 7)),
    (Conv(name="a", in_channels=6, out_channels=4, kernel=3, stride=2, padding=1, groups=2), (6, 8, 7)),
    (Conv(name="a", in_channels=3, out_channels=8, kernel=11, stride=4, padding=2), (3, 30, 33)),
    (Linear(name="a", in_features=13, out_features=7), (13,)),
    (ReLU(name="a"), (3, 4, 5)),
    (ReLU(name="a"), (9,)),
    (LRN(name="a", alpha=0.3, k=2.0), (12, 3, 4)),
    (LRN(name="a", alpha=0.3, k=1.0, beta=0.5, size=3), (7, 2, 2)),
    (LRN(name="a", alpha=0.3, k=2.0, groups=2), (12, 3, 4)),
    (LRN(name="a", alpha=0.3, k=2.0, groups=4), (12, 3, 4)),
    (LRN(name="a", alpha=0.3, k=2.0, groups=3), (3, 3, 4)),
    (SpatialLRN(name="a", alpha=0.3), (4, 7, 6)),
    (SpatialLRN(name="a", alpha=0.3, size=3, beta=0.5, k=2.0), (4, 7, 6)),
    (SpatialLRN(name="a", alpha=0.3), (4, 2, 3)),
    (SpatialLRN(name="a", alpha=0.3, size=1), (4, 2, 3)),
    (MaxPool(name="a"), (3, 13, 13)),
    (MaxPool(name="a"), (3, 12, 14)),
    (MaxPool(name="a", kernel=2, stride=3), (3, 9, 7)),
    (AdaptiveAvgPool(name="a", size=6), (3, 6, 6)),
    (AdaptiveAvgPool(name="a", size=6), (3, 13, 7)),
    (AdaptiveAvgPool(name="a", size=6), (3, 5, 11)),
    (AdaptiveAvgPool(name="a", size=6), (3, 1, 2)),
    (AdaptiveAvgPool(name="a", size=6), (3, 6, 9)),
    (AdaptiveAvgPool(name="a", size=1), (3, 4, 5)),
    (Flatten(name="a"), (3, 4, 5)),
    (Flatten(name="a"), (8,)),
    (Dropout(name="a", p=0.25), (3, 4, 5)),
    (Dropout(name="a", p=0.25, inverted=True), (9,)),
    (Dropout(name="a", p=0.0), (9,)),
]


@pytest.mark.parametrize("every_layer", [False, True])
@pytest.mark.parametrize(("layer", "shape"), ALONE, ids=lambda value: str(value))
def test_each_layer_alone(layer, shape, every_layer):
    graph = chain(layer, shape=shape)
    weights, images = random_weights(graph), random_images(graph, 2)
    model = lower(graph, weights, every_layer=every_layer)
    onnx.checker.check_model(model, full_check=True)
    got = run(model, images)
    assert list(got) == (["a", "logits"] if every_layer else ["logits"])
    for value in got.values():
        assert error(value, by_layer(graph, weights, images)["a"]) < BOUND


def test_a_chain_in_another_order():
    graph = chain(
        Dropout(name="drop", p=0.3),
        LRN(name="norm", alpha=0.2, k=1.0, groups=2),
        AdaptiveAvgPool(name="grow", size=5),
        Pad(name="pad", right=1, bottom=2),
        AdaptiveAvgPool(name="shrink", size=3),
        Conv(name="conv", in_channels=4, out_channels=6, kernel=2, groups=2),
        Flatten(name="flatten"),
        Dropout(name="nothing", inverted=True),
        Linear(name="fc", in_features=24, out_features=5),
        ReLU(name="relu"),
        Dropout(name="end", inverted=True),
        shape=(4, 3, 7),
    )
    weights, images = random_weights(graph), random_images(graph, 3)
    want = by_layer(graph, weights, images)
    assert error(run(lower(graph, weights), images)["logits"], want["end"]) < BOUND
    got = run(lower(graph, weights, every_layer=True), images)
    assert {name: error(got[name], value) < BOUND for name, value in want.items()} == dict.fromkeys(want, True)


def test_normalising_per_tower_is_not_normalising_all_channels():
    split, merged = (LRN(name="a", alpha=0.3, k=2.0, groups=groups) for groups in (2, 1))
    images = random_images(chain(split, shape=(12, 3, 4)), 2)
    towers, together = (run(lower(chain(g, shape=(12, 3, 4)), {}), images)["logits"] for g in (split, merged))
    differ = (np.abs(towers - together) > 1e-3).any(axis=(0, 2, 3))
    assert differ.tolist() == [c in (4, 5, 6, 7) for c in range(12)]


def test_an_even_normalising_window_is_refused():
    with pytest.raises(Unsupported, match=r"norm.*even"):
        lower(chain(LRN(name="norm", alpha=0.1, k=1.0, size=4), shape=(8, 2, 2)), {})


def test_pooling_that_changes_nothing_lowers_to_nothing():
    assert operators(lower(chain(AdaptiveAvgPool(name="a", size=6), shape=(3, 6, 6)), {})) == ["Identity"]
    between = chain(ReLU(name="a"), AdaptiveAvgPool(name="b", size=2), ReLU(name="c"), shape=(3, 2, 2))
    assert operators(lower(between, {})) == ["Relu", "Relu"]


@pytest.mark.parametrize(("inverted", "scale"), [(False, 0.75), (True, 1.0)])
def test_dropout_scales_at_inference_unless_inverted(inverted, scale):
    graph = chain(Dropout(name="a", p=0.25, inverted=inverted), ReLU(name="b"), shape=(4,))
    model = lower(graph, {})
    images = np.array([[1, -2, 3, 4]], np.float32)
    np.testing.assert_array_equal(run(model, images)["logits"], np.maximum(images, 0) * np.float32(scale))
    assert operators(model) == (["Relu"] if inverted else ["Mul", "Relu"])


def test_padding_goes_right_and_down():
    image = np.ones((1, 1, 1, 2), np.float32)
    got = run(lower(chain(Pad(name="a", right=2, bottom=1), shape=(1, 1, 2)), {}), image)["logits"]
    assert got[0, 0].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]


def test_one_file_serves_every_batch(paper, tmp_path):
    graph, weights = paper
    data = export(graph, weights, tmp_path / "small.onnx").read_bytes()
    images = random_images(graph, 32)
    want = by_layer(graph, weights, images)["fc8"]
    for batch in (1, 7, 32):
        assert error(run(data, images[:batch])["logits"], want[:batch]) < BOUND


def test_the_export_is_one_checked_file(paper, tmp_path):
    graph, weights = paper
    path = export(graph, weights, str(tmp_path / "small.onnx"))
    assert path == tmp_path / "small.onnx"
    assert list(tmp_path.iterdir()) == [path]
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)
    assert model.ir_version == 8
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert all(t.data_location == onnx.TensorProto.DEFAULT for t in model.graph.initializer)
    for name, value in weights.items():
        stored = next(t for t in model.graph.initializer if t.name == name)
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored), value)
    assert export(graph, weights, tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_names_and_shapes_are_the_graphs(paper):
    model = lower(*paper)
    ends = [*model.graph.input, *model.graph.output]
    assert [v.name for v in ends] == ["images", "logits"]
    assert [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in ends] == [
        ["batch", 3, 67, 67],
        ["batch", 10],
    ]
    named = {layer.name for layer in paper[0].layers} - {"fc8"}
    assert named <= {output for node in model.graph.node for output in node.output}
    assert set(paper[1]) <= {t.name for t in model.graph.initializer}


def test_metadata_tell_what_the_file_is():
    graph = small("torchvision", dropout=0.25)
    props = {p.key: p.value for p in lower(graph, random_weights(graph)).metadata_props}
    assert props.keys() == {"preset", "options", "normalisation", "input", "weights", "portnet"}
    assert props["weights"] == digest(random_weights(graph))
    assert alexnet.graph(props["preset"], **json.loads(props["options"])) == graph
    stored = {key: tuple(value) for key, value in json.loads(props["normalisation"]).items()}
    assert Normalisation(**stored) == graph.normalisation
    assert props["portnet"]


def test_metadata_keep_a_mean_of_ones_own():
    graph = small(mean=(1.0, 2.0, 3.5))
    props = {p.key: p.value for p in lower(graph, random_weights(graph)).metadata_props}
    assert alexnet.graph(props["preset"], **json.loads(props["options"])) == graph


def test_metadata_tell_a_program_in_another_language_how_to_fill_the_input():
    graph = small("caffe", image_size=227, mean=(1.0, 2.0, 3.5))
    weights = random_weights(graph)

    def told(**how):
        props = {p.key: p.value for p in lower(graph, weights, **how).metadata_props}
        return {key: json.loads(props[key]) for key in props if key in ("input", "class_names", "seed")}

    plain = told(notes={"class_names": ["cat", "dog"], "seed": 7})
    assert (plain["class_names"], plain["seed"]) == (["cat", "dog"], 7)
    assert plain["input"]["shape"] == ["batch", 3, 227, 227]
    assert "scaled to 256" in plain["input"]["pictures"]
    pictures = told(preprocess=True, notes={"whole": True})["input"]
    assert (pictures["name"], pictures["dtype"], pictures["shape"]) == ("pictures", "uint8", ["batch", 227, 227, 3])
    assert pictures["pictures"].startswith("scaled whole to 227x227")


@pytest.mark.parametrize("preset", sorted(alexnet.PRESETS))
def test_pictures_are_prepared_in_the_file_to_the_bit_as_in_python(preset):
    """Scale and mean; of pictures cut to the network's size, as `preprocess` cuts them."""
    graph = small(preset)
    weights = random_weights(graph)
    taken = np.random.default_rng(3).integers(0, 256, (5, 90, 120, 3), np.uint8)
    cut = np.stack([images._view(picture, 67, whole=False) for picture in taken])
    model = lower(graph, weights, preprocess=True)
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ready = images.preprocess(taken, graph)
    (plain,) = run(lower(graph, weights), ready).values()
    for batch in (1, 5):
        (got,) = session.run(None, {"pictures": cut[:batch]})
        np.testing.assert_array_equal(
            got, plain[:batch] if batch == 5 else run(lower(graph, weights), ready[:1])["logits"]
        )


def test_pictures_need_a_network_that_takes_some():
    graph = chain(Flatten(name="flat"), Linear(name="end", in_features=8, out_features=2), shape=(2, 2, 2))
    with pytest.raises(InputError, match=r"pictures make inputs of shape \(3, S, S\)"):
        lower(graph, random_weights(graph), preprocess=True)


def test_probabilities(tiny):
    graph, weights = tiny
    given = random_images(graph, 4)
    model = lower(graph, weights, softmax=True)
    onnx.checker.check_model(model, full_check=True)
    logits = run(lower(graph, weights), given)["logits"].astype(np.float64)
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    got = run(model, given)
    assert list(got) == ["probabilities"]
    np.testing.assert_allclose(got["probabilities"], expected / expected.sum(axis=1, keepdims=True), atol=1e-6)
    every = run(lower(graph, weights, softmax=True, every_layer=True), given)
    assert list(every)[-2:] == ["logits", "probabilities"]


def test_a_batch_can_be_fixed(tiny):
    graph, weights = tiny
    model = lower(graph, weights, batch=2)
    onnx.checker.check_model(model, full_check=True)
    assert run(model, random_images(graph, 2))["logits"].shape[0] == 2
    with pytest.raises(Exception, match="Got: 3 Expected: 2"):
        run(model, random_images(graph, 3))
    with pytest.raises(InputError, match="a fixed batch must be at least 1, got 0"):
        lower(graph, weights, batch=0)


@pytest.mark.parametrize("opset", [13, 18, 21, onnx.defs.onnx_opset_version()])
def test_other_opsets_pass_the_checker(tiny, opset):
    model = lower(*tiny, opset=opset)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version >= 8


@pytest.mark.parametrize("opset", [12, onnx.defs.onnx_opset_version() + 1])
def test_an_opset_out_of_range_is_refused(tiny, opset):
    with pytest.raises(InputError, match=f"opset.*{opset}"):
        lower(*tiny, opset=opset)


def test_a_wrong_destination_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match=r"it is a folder"):
        export(*tiny, tmp_path)
    with pytest.raises(InputError, match=r"no folder .*missing"):
        export(*tiny, tmp_path / "missing" / "a.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [None, b"what was there"])
def test_a_failing_write_leaves_things_as_they_were(tiny, tmp_path, monkeypatch, before):
    path = tmp_path / "a.onnx"
    if before:
        path.write_bytes(before)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        export(*tiny, path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([before] if before else [])


def test_an_existing_file_is_replaced(tiny, tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"what was there")
    export(*tiny, path)
    onnx.checker.check_model(str(path))


def test_weights_that_do_not_fit_are_refused(tiny):
    graph, weights = tiny
    missing = {name: value for name, value in weights.items() if name != "fc2.bias"}
    for wrong, message in (
        (missing, r"fc2\.bias"),
        ({**weights, "fc9.bias": weights["fc2.bias"]}, r"fc9\.bias"),
        ({**weights, "fc2.bias": np.zeros(3, np.float32)}, r"fc2\.bias .*\(16,\).*\(3,\)"),
        ({**weights, "fc2.bias": np.zeros(16)}, r"fc2\.bias .*float32.*float64"),
    ):
        with pytest.raises(WeightsError, match=message):
            lower(graph, wrong)


def test_the_order_of_weights_and_of_memory_does_not_matter(tiny):
    graph, weights = tiny
    turned = {name: np.asfortranarray(weights[name]) for name in reversed(weights)}
    assert lower(graph, turned) == lower(graph, weights)


def test_more_than_a_file_can_hold_is_refused():
    graph = chain(Linear(name="fc", in_features=2**16, out_features=2**14), shape=(2**16,))
    with pytest.raises(InputError, match="2 GiB"):
        lower(graph, {})


def test_unknown_layers_and_taken_names_are_refused():
    with pytest.raises(Unsupported, match=r"odd .*no lowering of Layer"):
        lower(chain(Layer(name="odd"), shape=(3,)), {})
    with pytest.raises(InputError, match="images"):
        lower(chain(ReLU(name="images"), shape=(3,)), {})


# The backend


def test_the_backend_computes_what_the_graph_says(tiny):
    graph, weights = tiny
    images = random_images(graph, 2)
    want = by_layer(graph, weights, images)
    session = OnnxRuntime().open(graph, weights, Settings())
    on_device = session.put(images)
    images[:] = 0  # put has copied
    logits = session.infer(on_device)
    session.synchronize()
    first = session.get(logits)
    assert error(first, want["fc3"]) < BOUND
    first[:] = 0  # so has get
    assert error(session.get(logits), want["fc3"]) < BOUND

    trace = session.trace(session.get(on_device))
    assert list(trace.layers) == list(want)
    for name, value in want.items():
        assert error(trace.layers[name], value) < BOUND, name
    assert error(trace.logits, want["fc3"]) < BOUND
    session.close()


def test_the_backends_weights_are_copies(tiny):
    graph, weights = tiny
    given = {name: value.copy() for name, value in weights.items()}
    session = OnnxRuntime().open(graph, given, Settings())
    given["fc3.bias"][:] = 7
    session.weights()["fc3.bias"][:] = 8
    kept = session.weights()
    assert list(kept) == list(graph.parameters)
    for name, value in weights.items():
        np.testing.assert_array_equal(kept[name], value)
        assert kept[name].dtype == np.float32


def test_put_leaves_dtype_and_shape(tiny):
    session = OnnxRuntime().open(*tiny, Settings())
    for array in (np.arange(6, dtype=np.int64), np.ones((2, 3), np.float32).T):
        value = session.get(session.put(array))
        assert value.dtype == array.dtype
        np.testing.assert_array_equal(value, array)


def test_training_is_refused(tiny):
    session = OnnxRuntime().open(*tiny, Settings())
    images = random_images(tiny[0], 1)
    with pytest.raises(Unsupported, match="onnxruntime-cpu does not train"):
        session.trace(images, np.zeros(1, np.int64))
    with pytest.raises(Unsupported, match="train"):
        session.train_step(images, None, None, step=0, learning_rate=0.1)


@pytest.mark.parametrize("settings", [Settings(precision="bfloat16"), Settings(formulation="stock")])
def test_settings_it_cannot_keep_are_refused(tiny, settings):
    with pytest.raises(Unsupported, match="onnxruntime-cpu"):
        OnnxRuntime().open(*tiny, settings)


def test_probe_tells_the_device_and_the_runtime():
    device = OnnxRuntime().probe()
    assert device.precisions == ("float32", "int8")
    assert device.versions == {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}


def test_two_distributions_at_once_are_refused(monkeypatch, tiny):
    both = {"onnxruntime": ["onnxruntime-gpu", "onnxruntime", "onnxruntime-gpu"], "onnx": ["onnx"]}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: both)
    with pytest.raises(Unavailable, match="onnxruntime and onnxruntime-gpu are installed together") as caught:
        OnnxRuntime().probe()
    assert caught.value.remedy.endswith("pip uninstall onnxruntime onnxruntime-gpu, then pip install 'portnet[cpu]'")
    with pytest.raises(Unavailable):
        OnnxRuntime().open(*tiny, Settings())


def test_distributions_with_a_like_name_do_not_count(monkeypatch):
    found = {"onnxruntime": ["onnxruntime"], "onnxruntime_extensions": ["onnxruntime-extensions"]}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: found)
    OnnxRuntime().probe()


def test_a_missing_runtime_names_the_remedy(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "onnxruntime":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Unavailable, match="No module named 'onnxruntime'") as caught:
        OnnxRuntime().probe()
    assert caught.value.remedy == "pip install 'portnet[cpu]'"


def test_a_damaged_runtime_is_told_from_a_missing_one(monkeypatch):
    monkeypatch.delattr(onnxruntime, "InferenceSession")
    with pytest.raises(Unavailable, match="damaged"):
        OnnxRuntime().probe()


def test_a_provider_the_runtime_lacks_is_unavailable(monkeypatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["OtherExecutionProvider"])
    with pytest.raises(Unavailable, match="no CPUExecutionProvider, only OtherExecutionProvider"):
        OnnxRuntime().probe()


def test_a_session_on_another_provider_is_never_used(monkeypatch, tiny):
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda self: ["OtherExecutionProvider"])
    with pytest.raises(Unavailable, match="fell back to OtherExecutionProvider"):
        OnnxRuntime().open(*tiny, Settings())


def test_listing_backends_loads_no_runtime():
    import subprocess
    import sys

    code = "import sys; from portnet_backends import onnxruntime_ep as m; m.portnet_backends(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"onnxruntime", "onnx", "torch"} & set(loaded)
