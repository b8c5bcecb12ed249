"""Files in 8-bit integers, beside the float32 files that they were made from; and float16 files."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import portnet
from portnet import alexnet, cli, images, onnx_file, quantization
from portnet.errors import ExportError, InputError, Unsupported
from portnet.graph import Flatten, Linear, Normal, Normalisation, Recipe, ReLU


@pytest.fixture(autouse=True, scope="module")
def _tiny_is_a_preset():
    def make(*, image_size: int = 16, classes: int = 10):
        return alexnet._graph(
            "tiny",
            image_size,
            [Flatten(name="flatten")],
            lambda features: [
                Linear(name="fc1", in_features=features, out_features=64, weight_init=Normal(std=0.05)),
                ReLU(name="relu1"),
                Linear(name="fc2", in_features=64, out_features=classes, weight_init=Normal(std=0.05)),
            ],
            Recipe(learning_rate=0.02, momentum=0.9, weight_decay=5e-4),
            Normalisation(mean=(60, 60, 60), scale=(64, 64, 64)),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(alexnet.PRESETS, "tiny", make)
        yield


@pytest.fixture(scope="module")
def net():
    """A small network that has learnt the digits."""
    net = portnet.AlexNet("cpu", "tiny", classes=10)
    net.fit(portnet.load_data("digits"), steps=220, batch=64)
    return net


@pytest.fixture
def source(net, tmp_path):
    return net.export_onnx(tmp_path / "wide.onnx").path


def test_a_quantised_file_keeps_the_accuracy_at_a_quarter_of_the_size(source, tmp_path):
    told = []
    done = portnet.quantize(source, tmp_path / "narrow.onnx", "digits", say=told.append)
    assert done.float32.top1 > 0.9
    assert done.kept >= 0.99
    assert done.agree >= 350
    assert done.int8.count == done.float32.count == 360
    assert done.size < 0.3
    assert done.slowest <= done.speedup <= done.fastest
    assert done.bytes == (tmp_path / "narrow.onnx").stat().st_size
    assert told[0] == "calibrating on 128 training pictures"
    narrow = onnx_file.read(tmp_path / "narrow.onnx")
    assert narrow.quantised
    assert narrow.class_names == tuple("0123456789")
    assert narrow.notes["quantisation"] == {"data": "digits", "pictures": 128, "reduce_range": False}
    assert narrow.weights_digest == onnx_file.read(source).weights_digest
    assert "onnx.infer" not in narrow.notes
    onnx.checker.check_model(str(narrow.path), full_check=True)


def test_products_are_of_integers(source, tmp_path):
    portnet.quantize(source, tmp_path / "narrow.onnx")
    model = onnx.load(tmp_path / "narrow.onnx")
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert kinds["fc1.weight_quantized"] == onnx.TensorProto.INT8
    scales = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("_scale")}
    assert scales["fc1.weight_scale"].shape == (64,), "not by output channel"
    assert scales["relu1_scale"].shape == ()
    net = portnet.open_onnx(tmp_path / "narrow.onnx")
    assert net.settings.precision == "int8"
    given = net.session.put(images.preprocess([np.zeros((16, 16, 3), np.uint8)], net.graph))
    assert net.session.fallbacks(lambda: net.session.infer(given)) == {}


def test_equal_files_of_equal_pictures(source, tmp_path):
    for name in ("a", "b"):
        portnet.quantize(source, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    portnet.quantize(source, tmp_path / "c", pictures=10)
    assert onnx_file.read(tmp_path / "c").notes["quantisation"]["pictures"] == 10
    assert (tmp_path / "c").read_bytes() != (tmp_path / "a").read_bytes()


@pytest.mark.parametrize("options", [{"preprocess": True}, {"softmax": True}, {"dynamic_batch": False}, {"opset": 21}])
def test_what_else_a_file_does_is_kept(net, tmp_path, options):
    source = net.export_onnx(tmp_path / "wide.onnx", **options).path
    done = portnet.quantize(source, tmp_path / "narrow.onnx", pictures=32)
    assert done.kept >= 0.99
    wide, narrow = (onnx_file.read(path) for path in (source, done.path))
    assert (narrow.input, narrow.output, narrow.batch) == (wide.input, wide.output, wide.batch)
    assert narrow.notes["quantisation"]["pictures"] == 32
    assert done.batch == (narrow.batch or 16)


def test_a_preparing_file_gives_the_pipelines_answers(net, tmp_path):
    portnet.quantize(net.export_onnx(tmp_path / "plain.onnx").path, tmp_path / "a.onnx")
    portnet.quantize(net.export_onnx(tmp_path / "preparing.onnx", preprocess=True).path, tmp_path / "b.onnx")
    data = portnet.load_data("digits")
    pictures = [data.test.read(i) for i in range(100)]
    plain, preparing = (portnet.open_onnx(tmp_path / name) for name in ("a.onnx", "b.onnx"))
    given = portnet.preprocess(pictures, net.graph, whole=True)
    itself = preparing.of_prepared(portnet.preprocess(pictures, preparing.prepares, whole=True))
    assert itself.dtype == np.uint8
    np.testing.assert_allclose(preparing(itself), plain(given), atol=1e-5)


def test_a_loss_of_accuracy_is_an_error(source, tmp_path, monkeypatch):
    from portnet_backends.onnxruntime_ep import OnnxRuntime

    real = OnnxRuntime.quantise

    def coarse(self, content, batches, **options):
        model = real(self, content, batches, **options)
        for tensor in model.graph.initializer:
            if tensor.name == "fc1.weight_quantized":
                values = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.sign(values).astype(np.int8) * 100, tensor.name))
        return model

    monkeypatch.setattr(OnnxRuntime, "quantise", coarse)
    (tmp_path / "narrow.onnx").write_bytes(b"what was there")
    with pytest.raises(ExportError, match=r"narrow.onnx is not written: in int8 it ranks .* less than 99% of it is"):
        portnet.quantize(source, tmp_path / "narrow.onnx")
    assert (tmp_path / "narrow.onnx").read_bytes() == b"what was there"
    assert portnet.quantize(source, tmp_path / "narrow.onnx", keep=0.0).kept < 0.99


def test_calibration_never_sees_a_test_picture(source, tmp_path, monkeypatch):
    data = portnet.load_data("digits")
    seen = []
    from portnet_backends.onnxruntime_ep import OnnxRuntime

    real = OnnxRuntime.quantise

    def watch(self, content, batches, **options):
        def given():
            for batch in batches:
                seen.append(batch)
                yield batch

        return real(self, content, given(), **options)

    monkeypatch.setattr(OnnxRuntime, "quantise", watch)
    portnet.quantize(source, tmp_path / "narrow.onnx", data)
    every = np.concatenate(seen)
    assert every.shape == (128, 3, 16, 16)
    graph = portnet.open_onnx(source).graph
    train = next(images.evaluation_batches(data.train.some(128), graph, batch=128)).images
    np.testing.assert_array_equal(every, train)


def test_mistakes(source, net, tmp_path):
    portnet.quantize(source, tmp_path / "narrow.onnx")
    with pytest.raises(InputError, match="is not float32"):
        portnet.quantize(tmp_path / "narrow.onnx", tmp_path / "again.onnx")
    half = net.export_onnx(tmp_path / "half.onnx", half=True)
    with pytest.raises(InputError, match="is not float32"):
        portnet.quantize(half.path, tmp_path / "again.onnx")
    with pytest.raises(InputError, match="at least one picture"):
        portnet.quantize(source, tmp_path / "again.onnx", pictures=0)
    with pytest.raises(InputError, match="no such folder"):
        portnet.quantize(source, tmp_path / "missing" / "again.onnx")
    with pytest.raises(InputError, match=r"keep is a share .* got 3"):
        portnet.quantize(source, tmp_path / "again.onnx", keep=3)
    with pytest.raises(InputError, match="it is a folder"):
        portnet.quantize(source, tmp_path)
    with pytest.raises(InputError, match=r"was trained on other classes \(0, 1, 2, ...\) than synthetic has"):
        portnet.quantize(source, tmp_path / "again.onnx", "synthetic")
    many = portnet.AlexNet("cpu", "tiny", classes=12).export_onnx(tmp_path / "many.onnx")
    with pytest.raises(InputError, match=r"many.onnx has 12 classes, and digits has 10; give the data set"):
        portnet.quantize(many.path, tmp_path / "again.onnx")
    with pytest.raises(InputError, match="is the float32 file itself"):
        portnet.quantize(source, source)
    untrained = portnet.AlexNet("cpu", "tiny", classes=10).export_onnx(tmp_path / "untrained.onnx")
    with pytest.raises(InputError, match="which is chance: train it first"):
        portnet.quantize(untrained.path, tmp_path / "again.onnx")
    with pytest.raises(Unsupported, match="backend cpu runs no ONNX files"):
        portnet.quantize(source, tmp_path / "again.onnx", backend="cpu")
    with pytest.raises(portnet.OnnxFileError, match="there is no such file"):
        portnet.quantize(tmp_path / "none.onnx", tmp_path / "again.onnx")
    assert not (tmp_path / "again.onnx").exists()


def portnet_(*arguments, status=0):
    ran = CliRunner().invoke(cli.main, list(map(str, arguments)))
    assert ran.exit_code == status, (ran.output, ran.exception)
    return ran.stdout


def test_the_command_line(source, tmp_path):
    out = portnet_("quantize", source, tmp_path / "narrow.onnx", "--pictures", 64)
    first, second, third = out.splitlines()
    assert first.startswith(f"{tmp_path / 'narrow.onnx'}: ")
    assert "of float32's" in first
    assert "of 360 test pictures, float32 9" in second
    assert "times as fast at batch 16 (quick: " in third
    told = json.loads(portnet_("quantize", source, tmp_path / "narrow.onnx", "--json"))
    assert told["size"] == pytest.approx(told["bytes"] / told["bytes_before"])
    assert told["int8"]["count"] == 360
    portnet_("quantize", tmp_path / "narrow.onnx", tmp_path / "b.onnx", status=2)
    portnet_("quantize", tmp_path / "none.onnx", tmp_path / "b.onnx", status=2)


def test_an_onnx_file_classifies_pictures(net, source, tmp_path):
    from PIL import Image

    portnet.quantize(source, tmp_path / "narrow.onnx")
    data = portnet.load_data("digits")
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.fromarray(data.test.read(i)).save(path)
    for file in (source, tmp_path / "narrow.onnx"):
        told = json.loads(portnet_("infer", *paths, "--weights", file, "--json", "--top", 1))
        assert [t["classes"][0]["class"] for t in told] == [net.classify(path, top=1)[0][0] for path in paths]


def test_half_a_file(net, tmp_path):
    wide, half = (net.export_onnx(tmp_path / name, half=name == "half") for name in ("wide", "half"))
    assert half.path.stat().st_size < 0.6 * wide.path.stat().st_size
    assert 1e-5 < half.error < 2e-2
    assert wide.error < 1e-5
    assert half.layers.keys() == wide.layers.keys()
    kinds = {t.data_type for t in onnx.load(half.path).graph.initializer}
    assert kinds == {onnx.TensorProto.FLOAT16}
    data = portnet.load_data("digits")
    accuracies = [portnet.open_onnx(e.path).evaluate(data).top1 for e in (wide, half)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.01)


@pytest.mark.parametrize("preset", ["paper2012", "chm145", "caffe", "torchvision"])
def test_every_preset_in_half(preset, tmp_path):
    """LRN keeps its squares in float32, where float16 would overflow."""
    net = portnet.AlexNet("cpu", preset, classes=10, image_size=67)
    done = net.export_onnx(tmp_path / "half.onnx", half=True)
    assert done.error < 2e-2
    with np.errstate(all="ignore"):
        net = portnet.AlexNet("cpu", preset, classes=10, image_size=67, weights=weights_with(net, 1e5))
    with pytest.raises(portnet.PortNetError, match=r"fc8.weight has values beyond 65,504"):
        net.export_onnx(tmp_path / "half.onnx", half=True)


def weights_with(net, value):
    held = net.weights()
    held["fc8.weight"][0, 0] = value
    return held


def test_quick_ratios_begin_with_each_side_in_turn(source, monkeypatch):
    net, order = portnet.open_onnx(source), []

    class FakeNet:
        def __init__(self, name, cost):
            self.name, self.cost = name, cost
            self.session = self

        def put(self, value):
            return value

        def infer(self, value):
            order.append(self.name)
            clock[0] += self.cost

        def get(self, value):
            return value

    clock = [0.0]
    monkeypatch.setattr(quantization, "perf_counter", lambda: clock[0])
    ratios = quantization._ratios(FakeNet("wide", 3.0), FakeNet("narrow", 1.0), None)
    assert ratios == pytest.approx([3.0] * 15)
    assert order[4:8] == ["wide", "narrow", "narrow", "wide"]
    assert net is not None
