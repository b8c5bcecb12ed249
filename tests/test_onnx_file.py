"""ONNX files that were damaged, or made to harm: each is refused with its kind, and no other file is touched."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper

import portnet
from portnet import alexnet, images, model, onnx_export, onnx_file, plugins, training, weights
from portnet.contract import Backend, Device, Settings
from portnet.errors import InputError, OnnxFileError, UnknownName, Unsupported
from portnet.onnx_export import seal, sealed

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "fuzz_onnx.py"


def fuzz_onnx():
    spec = spec_from_file_location("fuzz_onnx", SCRIPT)
    module = module_from_spec(spec)
    sys.modules["fuzz_onnx"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


fuzz = fuzz_onnx()
NOTES = {"class_names": ["cat", "dog"], "whole": True, "seed": 7}


@pytest.fixture(autouse=True)
def _small_is_a_preset(monkeypatch):
    monkeypatch.setitem(alexnet.PRESETS, "small", fuzz.small)


def written(path, *, notes=NOTES, **how):
    """The bytes of a file of the small network, and its path."""
    graph = fuzz.small()
    graph = dataclasses.replace(graph, options=(("classes", 5), ("dropout", 0.5), ("image_size", 20)))
    return onnx_export.export(graph, weights.parity(graph), path, notes=notes, **how)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A file that is opened: images to logits."""
    return written(tmp_path_factory.mktemp("good") / "good.onnx").read_bytes()


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """Pictures to probabilities, two at a time."""
    path = tmp_path_factory.mktemp("pictured") / "good.onnx"
    return written(path, preprocess=True, softmax=True, batch=2).read_bytes()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    return written(tmp_path_factory.mktemp("narrow") / "good.onnx", half=True).read_bytes()


@pytest.fixture(scope="module")
def quantised(good):
    from portnet_backends.onnxruntime_quantize import quantise

    return seal(quantise(good, [given(4)], reduce_range=False).SerializeToString())


def given(count=2, seed=0):
    return np.random.default_rng(seed).normal(0, 60, (count, 3, 20, 20)).astype(np.float32)


def changed(content, change):
    """The same after `change` of the model, sealed again."""
    made = ModelProto.FromString(content)
    change(made)
    return seal(made.SerializeToString())


def refused(content, path, **how):
    """The error at opening these bytes, which must be one."""
    path.write_bytes(content)
    with pytest.raises(OnnxFileError) as caught:
        onnx_file.read(path, **how)
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 600 + len(str(path))
    assert str(caught.value).isprintable()
    return caught.value


# Whole files.


def test_what_a_file_tells(good, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(good)
    file = onnx_file.read(path)
    graph = alexnet.graph("small")
    assert (file.path, file.content, file.graph) == (path, good, graph)
    assert (file.input, file.output, file.batch) == ("images", "logits", None)
    assert (file.class_names, file.whole, file.notes) == (("cat", "dog"), True, {"seed": 7})
    assert (file.half, file.quantised) == (False, False)
    expected = weights.parity(graph)
    assert file.weights_digest == weights.digest(expected)
    assert list(file.weights) == list(graph.parameters)
    for name, value in expected.items():
        np.testing.assert_array_equal(file.weights[name], value)


def test_what_a_file_of_pictures_tells(pictured, tmp_path):
    (tmp_path / "net.onnx").write_bytes(pictured)
    file = onnx_file.read(tmp_path / "net.onnx")
    assert (file.input, file.output, file.batch) == ("pictures", "probabilities", 2)


def test_what_a_float16_file_tells(narrow, tmp_path):
    (tmp_path / "net.onnx").write_bytes(narrow)
    file = onnx_file.read(tmp_path / "net.onnx")
    assert (file.half, file.quantised) == (True, False)
    expected = weights.parity(alexnet.graph("small"))
    assert file.weights_digest == weights.digest(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(file.weights[name], value.astype(np.float16).astype(np.float32))


def test_what_a_quantised_file_tells(quantised, tmp_path):
    (tmp_path / "net.onnx").write_bytes(quantised)
    file = onnx_file.read(tmp_path / "net.onnx")
    assert (file.half, file.quantised, file.weights) == (False, True, {})
    assert file.weights_digest == weights.digest(weights.parity(alexnet.graph("small")))
    assert file.notes["seed"] == 7


def test_notes_may_be_left_out(tmp_path):
    file = onnx_file.read(written(tmp_path / "net.onnx", notes=None))
    assert (file.class_names, file.whole, file.notes) == (None, False, {})


def test_notes_of_another_program_are_kept_as_text(good, tmp_path):
    def add(made):
        made.metadata_props.add(key="onnx.infer", value="onnxruntime.quant")
        made.metadata_props.add(key="deep", value="[" * 100_000)

    (tmp_path / "net.onnx").write_bytes(changed(good, add))
    notes = onnx_file.read(tmp_path / "net.onnx").notes
    assert notes == {"seed": 7, "onnx.infer": "onnxruntime.quant", "deep": "[" * 100_000}


@pytest.mark.parametrize("preset", ["paper2012", "chm145", "caffe", "torchvision"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "half"])
def test_every_preset_is_opened(preset, half, tmp_path):
    graph = alexnet.graph(preset, image_size=67, classes=3, mean=(1.5, 2.0, 3.0))
    values = weights.initial(graph)
    path = onnx_export.export(graph, values, tmp_path / "net.onnx", preprocess=True, opset=13, half=half)
    file = onnx_file.read(path)
    assert file.graph == graph
    assert file.half == half
    assert file.weights_digest == weights.digest(values)


def test_normalisation_within_maps_is_checked_number_by_number(tmp_path):
    graph = alexnet.graph("chm145", image_size=67, classes=3)
    content = onnx_export.export(graph, weights.initial(graph), tmp_path / "net.onnx").read_bytes()

    def opened(change):
        (tmp_path / "net.onnx").write_bytes(changed(content, change))
        return onnx_file.read(tmp_path / "net.onnx")

    def constant(name, value):
        def change(made):
            (tensor,) = (t for t in made.graph.initializer if t.name == name)
            tensor.CopyFrom(numpy_helper.from_array(np.array(value, np.float32), name))

        return change

    def attribute(name, *values):
        def change(made):
            (node,) = (n for n in made.graph.node if n.op_type == "AveragePool")
            (found,) = (a for a in node.attribute if a.name == name)
            found.CopyFrom(helper.make_attribute(name, values[0] if len(values) == 1 else values))

        return change

    assert opened(lambda made: None).graph == graph
    assert opened(constant("mapnorm2.alpha", 0.256)).graph == graph
    for name, value in (("alpha", 0.001 / 25), ("k", 2.0), ("power", -0.5)):
        with pytest.raises(OnnxFileError, match=rf"mapnorm2\.{name} has other values") as caught:
            opened(constant(f"mapnorm2.{name}", value))
        assert caught.value.kind == "weights"
    for name, *values in (("count_include_pad", 0), ("kernel_shape", 3, 3), ("pads", 4, 4, 0, 0)):
        with pytest.raises(OnnxFileError, match=r"its node 'mapnorm2\.averages' is not as this version") as caught:
            opened(attribute(name, *values))
        assert caught.value.kind == "operators"


@pytest.mark.parametrize("opset", [13, 18, 21, onnx.defs.onnx_opset_version()])
def test_every_opset_is_opened(opset, tmp_path):
    onnx_file.read(written(tmp_path / "net.onnx", opset=opset))


def test_a_link_is_followed(good, tmp_path):
    (tmp_path / "net.onnx").write_bytes(good)
    (tmp_path / "link.onnx").symlink_to("net.onnx")
    assert onnx_file.read(str(tmp_path / "link.onnx")).content == good


# The seal.


def test_a_file_ends_in_its_seal(good):
    made = ModelProto.FromString(good)
    assert [p.key for p in made.metadata_props][-1] == "sha256"
    assert sealed(good) is True
    assert seal(good) == good
    onnx.checker.check_model(good, full_check=True)


def test_a_new_seal_takes_the_place_of_the_old(good):
    made = ModelProto.FromString(good)
    made.metadata_props.add(key="quantisation", value="1")
    again = seal(made.SerializeToString())
    assert [p.key for p in ModelProto.FromString(again).metadata_props].count("sha256") == 1
    assert sealed(again) is True


@pytest.mark.parametrize("content", [b"", b"\x08", b"sha256", b"x" * 200])
def test_no_seal(content):
    assert sealed(content) is None


@pytest.mark.parametrize("content", [b"", b"\x08\x08", b"x" * 200])
def test_a_seal_of_any_bytes(content):
    assert sealed(seal(content)) is True
    assert sealed(b"y" + seal(content)) is False


def test_a_seal_of_other_bytes(good):
    assert sealed(good[:-76] + seal(b"")) is False


# Paths.


def kind_of(path, **how):
    with pytest.raises(OnnxFileError) as caught:
        onnx_file.read(path, **how)
    return caught.value.kind


def test_what_is_no_file(tmp_path):
    assert kind_of(tmp_path / "missing.onnx") == "missing"
    assert kind_of(tmp_path) == "unreadable"
    assert kind_of("a\0b") == "unreadable"
    (tmp_path / "file").touch()
    assert kind_of(tmp_path / "file" / "net.onnx") == "unreadable"
    (tmp_path / "broken").symlink_to("nowhere")
    assert kind_of(tmp_path / "broken") == "missing"


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices are POSIX's")
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/tty", "pipe"])
def test_pipes_and_devices_are_not_even_opened(device, tmp_path, monkeypatch):
    if device == "pipe":
        os.mkfifo(tmp_path / "pipe")
        device = tmp_path / "pipe"
    monkeypatch.setattr(os, "open", lambda *_: pytest.fail("opened"))
    assert kind_of(device) == "unreadable"


@pytest.mark.skipif(os.name != "posix", reason="pipes are POSIX's")
def test_a_pipe_that_takes_the_files_place_does_not_hold_it_up(good, tmp_path, monkeypatch):
    (tmp_path / "net.onnx").write_bytes(good)
    os.mkfifo(tmp_path / "pipe")
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: real(tmp_path / "pipe", flags))
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(20)
    try:
        assert kind_of(tmp_path / "net.onnx") == "unreadable"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read(good, tmp_path):
    (tmp_path / "net.onnx").write_bytes(good)
    (tmp_path / "net.onnx").chmod(0)
    assert kind_of(tmp_path / "net.onnx") == "unreadable"


def test_a_file_that_grows_is_not_read_on(good, tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(good)
    real = os.fstat

    def grown(handle):
        status = real(handle)
        with path.open("ab") as file:
            file.write(b"x" * 10_000_000)
        return status

    taken = []
    monkeypatch.setattr(os, "fstat", grown)
    fdopen = os.fdopen

    def listened(*how):
        file = fdopen(*how)
        read = file.read

        class File:
            __enter__ = lambda self: self  # noqa: E731
            __exit__ = lambda self, *_: file.close()  # noqa: E731

            def read(self, size):
                taken.append(size)
                return read(size)

        return File()

    monkeypatch.setattr(os, "fdopen", listened)
    assert kind_of(path) == "unreadable"
    assert taken == [len(good) + 1]


def test_the_limit(good, tmp_path, monkeypatch):
    (tmp_path / "net.onnx").write_bytes(good)
    onnx_file.read(tmp_path / "net.onnx", limit=len(good))
    monkeypatch.setattr(os, "fdopen", lambda *_: pytest.fail("read"))
    with pytest.raises(BaseException, match="read"):
        onnx_file.read(tmp_path / "net.onnx", limit=len(good))
    monkeypatch.undo()
    assert kind_of(tmp_path / "net.onnx", limit=len(good) - 1) == "too large"


@pytest.mark.skipif(os.name != "posix", reason="sparse files")
def test_a_file_beyond_protobufs_limit(tmp_path):
    path = tmp_path / "net.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)
    assert kind_of(path) == "too large"


# Bytes.


def test_files_that_are_no_onnx(tmp_path):
    path = tmp_path / "net.onnx"
    graph = alexnet.graph("small")
    weights.save(tmp_path / "w.safetensors", graph, weights.parity(graph))
    png = b"\x89PNG\r\n\x1a\n" + bytes(100)
    for content in (
        b"",
        b"\n",
        b"import os\n",
        b'{"preset": "caffe"}',
        "Æther\n".encode("utf-16"),
        png,
        bytes(1000),
        (tmp_path / "w.safetensors").read_bytes(),
        b"PK\x03\x04" + bytes(50),
    ):
        assert refused(content, path).kind == "not ONNX", content


def test_every_file_that_is_cut_off_is_damaged(good, tmp_path):
    lengths = {*range(20, 200), *range(200, len(good), 97), *range(len(good) - 200, len(good))}
    kinds = {refused(good[:length], tmp_path / "net.onnx").kind for length in lengths}
    assert kinds == {"damaged"}
    for length in range(1, 20):
        assert refused(good[:length], tmp_path / "net.onnx").kind in ("not ONNX", "damaged")


def test_every_flipped_bit_is_seen(good, tmp_path):
    rng = np.random.default_rng(0)
    for at in [*range(100), *rng.integers(0, len(good), 300), *range(len(good) - 80, len(good))]:
        flipped = bytearray(good)
        flipped[at] ^= 1 << rng.integers(8)
        assert refused(bytes(flipped), tmp_path / "net.onnx").kind == "damaged", at


def test_bytes_that_are_added_or_missing_are_seen(good, tmp_path):
    path = tmp_path / "net.onnx"
    entry = ModelProto(metadata_props=[onnx.StringStringEntryProto(key="a", value="b")]).SerializeToString()
    for content in (
        good + b"\0",
        good + b"trailing",
        good + entry,
        good + seal(b""),
        good + seal(good)[-76:],
        good + good,
        entry + good,
        good[:500] + good[501:],
        good[:500] + b"\0" + good[500:],
        good[:-76],
        good[:-76] + good[-75:],
    ):
        assert refused(content, path).kind == "damaged"


def test_a_seal_over_a_seal(good, tmp_path):
    """Each fits what stands before it."""
    twice = good + onnx_export._seal(good)
    assert sealed(twice)
    assert refused(twice, tmp_path / "net.onnx").kind == "damaged"
    entry = ModelProto(doc_string="more").SerializeToString()
    assert refused(good + entry + onnx_export._seal(good + entry), tmp_path / "net.onnx").kind == "damaged"


def test_models_of_other_programs_are_foreign(tmp_path):
    node = helper.make_node("Relu", ["images"], ["logits"])
    ends = [helper.make_tensor_value_info(name, 1, ["batch", 3]) for name in ("images", "logits")]
    theirs = helper.make_model(helper.make_graph([node], "theirs", ends[:1], ends[1:])).SerializeToString()
    error = refused(theirs, tmp_path / "net.onnx")
    assert error.kind == "foreign"
    assert "portnet export" in str(error)
    assert refused(seal(theirs), tmp_path / "net.onnx").kind != "foreign"
    assert refused(theirs[:-3], tmp_path / "net.onnx").kind == "damaged"


def test_files_that_fill_memory_are_refused_before_they_are_parsed(good, tmp_path, monkeypatch):
    """Two bytes of a message take a hundred; one of a packed number eight."""
    path = tmp_path / "net.onnx"
    bombs = [
        seal(good[:-76] + b"\x72\x00" * 100_000),
        seal(good[:-76] + ModelProto(graph=GraphProto(node=[onnx.NodeProto()] * 100_000)).SerializeToString()),
        b"\x08\x08" + b"\x72\x00" * 100_000,
        b"\x08\x08" + b"\x08\x08" * 100_000,
    ]
    packed = onnx.AttributeProto(name="a")
    content = packed.SerializeToString() + b"\x42" + varint(2**26 + 1) + b"\x01" * (2**26 + 1)
    size = len(content)
    for number in (5, 1, 7):  # attribute, node, graph
        content = bytes([number << 3 | 2]) + varint(size) + content
        size = len(content)
    bombs.append(b"\x08\x08" + content + b"\x3a\x00")
    monkeypatch.setattr(ModelProto, "FromString", lambda *_: pytest.fail("parsed"))
    for bomb in bombs:
        assert refused(bomb, path).kind == "too large"


def varint(value):
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


# Models that are sealed again: what stands behind the seal.


def outside(location="../../secret", *, flag=True, entries=True):
    """A tensor whose values lie in another file."""
    tensor = TensorProto(name="outside", data_type=TensorProto.FLOAT, dims=[4])
    if flag:
        tensor.data_location = TensorProto.EXTERNAL
    if entries:
        for key, value in {"location": location, "offset": "0", "length": "16"}.items():
            tensor.external_data.add(key=key, value=value)
    return tensor


def inner(*tensors):
    return helper.make_graph([], "inner", [], [], initializer=tensors)


def as_initialiser(made, tensor):
    made.graph.initializer.append(tensor)


def as_weights(made, tensor):
    """The file's own weights, with all that a runtime needs to read them."""
    (own,) = (t for t in made.graph.initializer if t.name == "fc3.weight")
    size = len(own.raw_data)
    own.ClearField("raw_data")
    own.data_location = tensor.data_location
    own.external_data.extend(tensor.external_data)
    for entry in own.external_data:
        if entry.key == "length":
            entry.value = str(size)


def as_attribute(made, tensor):
    made.graph.node[0].attribute.append(helper.make_attribute("value", tensor))


def as_attributes(made, tensor):
    made.graph.node[0].attribute.add(name="values", type=AttributeProto.TENSORS).tensors.append(tensor)


def in_a_subgraph(made, tensor):
    made.graph.node[0].attribute.append(helper.make_attribute("then_branch", inner(tensor)))


def in_subgraphs(made, tensor):
    nested = helper.make_node("If", [], [], branches=[inner(tensor)])
    graph = helper.make_graph([nested], "between", [], [])
    made.graph.node[0].attribute.append(helper.make_attribute("branches", [graph]))


def sparse_values(made, tensor):
    made.graph.sparse_initializer.add().values.CopyFrom(tensor)


def sparse_indices(made, tensor):
    made.graph.sparse_initializer.add().indices.CopyFrom(tensor)


def as_sparse_attribute(made, tensor):
    attribute = made.graph.node[0].attribute.add(name="sparse_value", type=AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.values.CopyFrom(tensor)


def in_a_function(made, tensor):
    node = helper.make_node("Constant", [], ["x"])
    node.attribute.append(helper.make_attribute("value", tensor))
    made.functions.add(name="f", domain="own").node.append(node)


def in_training(made, tensor):
    made.training_info.add().initialization.CopyFrom(inner(tensor))


PLACES = (
    *(as_initialiser, as_weights, as_attribute, as_attributes, in_a_subgraph, in_subgraphs, sparse_values),
    *(sparse_indices, as_sparse_attribute, in_a_function, in_training),
)
LOCATIONS = ("../../secret", "secret", "/proc/self/environ", "*/_ORT_MEM_ADDR_/*", "")
MARKS = {"flag and entries": {}, "flag alone": {"entries": False}, "entries alone": {"flag": False}}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("mark", MARKS)
def test_data_in_another_file_are_refused(place, mark, good, tmp_path):
    for location in LOCATIONS:
        content = changed(good, lambda made, where=location: place(made, outside(where, **MARKS[mark])))
        assert refused(content, tmp_path / "net.onnx").kind == "external data"


def node(made, name):
    return next(n for n in made.graph.node if n.name == name)


def tensor(made, name):
    return next(t for t in made.graph.initializer if t.name == name)


def attribute(made, name, key):
    return next(a for a in node(made, name).attribute if a.name == key)


def prop(made, key):
    return next(p for p in made.metadata_props if p.key == key)


def dims(end):
    return end.type.tensor_type.shape.dim


def rename(end, name):
    end.name = name


def put(key, value):
    """A change of one entry of metadata; to JSON unless it is text."""

    def change(made):
        prop(made, key).value = value if isinstance(value, str) else json.dumps(value)

    return change


def options(**new):
    def change(made):
        prop(made, "options").value = json.dumps(json.loads(prop(made, "options").value) | new)

    return change


def renamed_input(made):
    """To what would clear a terminal."""
    made.graph.input[0].name = made.graph.node[0].input[0] = "\x1b[2J\n\u202e"


def renamed_output(made):
    made.graph.output[0].name = made.graph.node[-1].output[0] = "scores"


def second_output(made):
    made.graph.output.append(helper.make_tensor_value_info("relu3", 1, ["batch", 12]))


def second_input(made):
    made.graph.input.append(helper.make_tensor_value_info("more", 1, ["batch", 12]))


def sequence(made):
    made.graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = 1


def as_pictures(made):
    """Float images under the other convention's name."""
    made.graph.input[0].name = made.graph.node[0].input[0] = "pictures"


INTERFACE = {
    "another input": renamed_input,
    "another output": renamed_output,
    "another convention's name": as_pictures,
    "a second input": second_input,
    "a second output": second_output,
    "no input": lambda made: made.graph.input.pop(),
    "no output": lambda made: made.graph.output.pop(),
    "float16 input": lambda made: setattr(made.graph.input[0].type.tensor_type, "elem_type", 10),
    "float64 output": lambda made: setattr(made.graph.output[0].type.tensor_type, "elem_type", 11),
    "a larger image": lambda made: setattr(dims(made.graph.input[0])[2], "dim_value", 21),
    "fewer classes": lambda made: setattr(dims(made.graph.output[0])[1], "dim_value", 4),
    "open classes": lambda made: setattr(dims(made.graph.output[0])[1], "dim_param", "classes"),
    "no shape": lambda made: made.graph.input[0].type.tensor_type.ClearField("shape"),
    "rank 3": lambda made: dims(made.graph.input[0]).pop(),
    "another symbol": lambda made: setattr(dims(made.graph.input[0])[0], "dim_param", "n"),
    "batches that differ": lambda made: setattr(dims(made.graph.input[0])[0], "dim_value", 3),
    "a batch of 0": lambda made: [setattr(dims(v)[0], "dim_value", 0) for v in ends(made)],
    "a negative batch": lambda made: [setattr(dims(v)[0], "dim_value", -1) for v in ends(made)],
    "a batch that fills memory": lambda made: [setattr(dims(v)[0], "dim_value", 2**40) for v in ends(made)],
}


def ends(made):
    return [*made.graph.input, *made.graph.output]


@pytest.mark.parametrize("case", INTERFACE)
def test_another_interface_is_refused(case, good, tmp_path):
    assert refused(changed(good, INTERFACE[case]), tmp_path / "net.onnx").kind == "interface"


OPSET = {
    "too old": lambda made: setattr(made.opset_import[0], "version", 12),
    "too new": lambda made: setattr(made.opset_import[0], "version", onnx.defs.onnx_opset_version() + 1),
    "huge": lambda made: setattr(made.opset_import[0], "version", 2**63 - 1),
    "none": lambda made: made.opset_import.pop(),
    "two": lambda made: made.opset_import.append(helper.make_opsetid("", 13)),
    "a custom domain too": lambda made: made.opset_import.append(helper.make_opsetid("com.microsoft", 1)),
    "a custom domain only": lambda made: setattr(made.opset_import[0], "domain", "ai.onnx.ml"),
    "an old IR": lambda made: setattr(made, "ir_version", 7),
    "a new IR": lambda made: setattr(made, "ir_version", onnx.IR_VERSION + 1),
    "no IR": lambda made: made.ClearField("ir_version"),
}


@pytest.mark.parametrize("case", OPSET)
def test_another_opset_is_refused(case, good, tmp_path):
    assert refused(changed(good, OPSET[case]), tmp_path / "net.onnx").kind == "opset"


def swapped(made):
    """ReLU and the identity have the same shapes."""
    node(made, "relu1").op_type = "Identity"


def unclipped(made):
    """Without a ReLU, which only a quantised file can lack."""
    made.graph.node.remove(node(made, "relu3"))
    node(made, "drop3").input[0] = "fc3"


def rewired(made):
    """Both are 12 numbers an image, but the second product is fed before its ReLU."""
    node(made, "drop3").input[0] = "fc3"


def bypassed(made):
    """The output is that of a node of its own."""
    made.graph.node.append(helper.make_node("Identity", ["logits"], ["more"], name="more"))


def moved_output(made):
    """All nodes as they were, and the output of another name's."""
    last = node(made, "logits")
    last.output[0] = "kept"
    node(made, "drop3").output[0] = "logits"
    last.input[0] = "logits"


def doubled(made):
    made.graph.node.add().CopyFrom(made.graph.node[0])


def same_name(made):
    made.graph.node.insert(0, helper.make_node("Relu", ["images"], ["other"], name="relu1"))


def two_of_one_name(made):
    """Each is read before the next is written."""
    node(made, "relu1").output[0] = node(made, "conv1").output[0]
    node(made, "norm1.towers").input[0] = node(made, "conv1").output[0]


def own_operator(made):
    node(made, "relu1").domain = "com.microsoft"


def function(made):
    """ONNX's Relu, anew."""
    body = [helper.make_node("Neg", ["x"], ["y"])]
    made.functions.append(helper.make_function("", "Relu", ["x"], ["y"], body, [helper.make_opsetid("", 17)]))


def subgraph(made):
    node(made, "relu1").attribute.append(helper.make_attribute("then_branch", inner()))


def loop(made):
    body = helper.make_graph([], "body", [], [])
    made.graph.node.append(helper.make_node("Loop", ["images"], ["looped"], name="loop", body=body))


def plain_tensor_attribute(made):
    node(made, "relu1").attribute.append(helper.make_attribute("value", numpy_helper.from_array(np.ones(3))))


def sparse(made):
    values = numpy_helper.from_array(np.ones(1, np.float32), "s")
    made.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.zeros(1, np.int64)), [4])
    )


def annotated(made):
    made.graph.quantization_annotation.add(tensor_name="relu1")


def devices(made):
    made.graph.node[0].device_configurations.add(configuration_id="a")


def unknown_field(made):
    """Field 99 of a node: a newer reader may know it."""
    made.graph.node[0].MergeFromString(b"\x9a\x06\x01x")


OPERATORS = {
    "another operator": swapped,
    "another input": rewired,
    "no ReLU": unclipped,
    "another output": moved_output,
    "a node more": bypassed,
    "a node less": lambda made: made.graph.node.pop(),
    "a node twice": doubled,
    "a name twice": same_name,
    "an operator that does not exist": lambda made: setattr(node(made, "relu1"), "op_type", "System"),
    "no operator": lambda made: node(made, "relu1").ClearField("op_type"),
    "an operator of another domain": own_operator,
    "an overload": lambda made: setattr(node(made, "relu1"), "overload", "x"),
    "another stride": lambda made: attribute(made, "conv1", "strides").ints.__setitem__(0, 1),
    "a stride of 0": lambda made: attribute(made, "conv1", "strides").ints.__setitem__(0, 0),
    "a huge window": lambda made: setattr(attribute(made, "norm2", "size"), "i", 2**62),
    "another alpha": lambda made: setattr(attribute(made, "norm2", "alpha"), "f", float("nan")),
    "an attribute less": lambda made: node(made, "conv1").attribute.pop(),
    "an attribute more": lambda made: node(made, "pool1").attribute.append(helper.make_attribute("ceil_mode", 1)),
    "an attribute by reference": lambda made: setattr(attribute(made, "norm2", "size"), "ref_attr_name", "x"),
    "an input more": lambda made: node(made, "relu1").input.append("images"),
    "an output more": lambda made: node(made, "pool1").output.append("indices"),
    "a function": function,
    "a subgraph": subgraph,
    "a loop": loop,
    "a tensor as attribute": plain_tensor_attribute,
    "a sparse initialiser": sparse,
    "training": lambda made: made.training_info.add(),
    "an annotation": annotated,
    "devices": devices,
    "an unknown field": unknown_field,
    "nodes in another order": lambda made: made.graph.node.append(made.graph.node.pop(0)),
    "two values of one name": two_of_one_name,
    "a value called as a weight": lambda made: made.graph.node[0].output.__setitem__(0, "conv1.weight"),
}


@pytest.mark.parametrize("case", OPERATORS)
def test_other_nodes_than_the_networks_are_refused(case, good, tmp_path):
    assert refused(changed(good, OPERATORS[case]), tmp_path / "net.onnx").kind == "operators"


METADATA = {
    **{f"no {key}": lambda made, key=key: made.metadata_props.remove(prop(made, key)) for key in onnx_file._REQUIRED},
    "a key twice": lambda made: made.metadata_props.add(key="preset", value="small"),
    "much": lambda made: made.metadata_props.add(key="more", value="x" * 2**20),
    "another preset": put("preset", "caffe"),
    "an unknown preset": put("preset", "\x1b[31m" + "x" * 10_000),
    "options that are no JSON": put("options", "{"),
    "options that are a list": put("options", [1]),
    "options that are a number": put("options", "3"),
    "an option of the function's own": options(preset="small"),
    "nested options": put("options", "[" * 100_000),
    "a number beyond Python's limit": put("options", '{"classes": 1' + "0" * 5000 + "}"),
    "an unknown option": options(depth=3),
    "an option out of range": options(dropout=-1),
    "no number": put("options", '{"dropout": NaN}'),
    "a huge image": options(image_size=10**9),
    "an image beyond all": options(image_size=10**4000),
    "many classes": options(classes=10**12),
    "a mean beyond floats": options(mean=[10**400, 0, 0]),
    "another normalisation": put("normalisation", {"mean": [1.0, 2.0, 3.0], "scale": [1.0, 1.0, 1.0]}),
    "a normalisation that is none": put("normalisation", {"mean": 3}),
    "another normalisation's form": put("normalisation", "[]"),
    "no normalisation's JSON": put("normalisation", "nan?"),
    "another input": put("input", {"name": "images", "dtype": "float32", "shape": ["batch", 3, 20, 21]}),
    "another dtype": put("input", {"name": "images", "dtype": "float16", "shape": ["batch", 3, 20, 20]}),
    "an input without a name": put("input", {"dtype": "float32", "shape": ["batch", 3, 20, 20]}),
    "an input that is a list": put("input", ["images"]),
    "an input that is no JSON": put("input", "images"),
    "names that are no list": put("class_names", {"a": "b"}),
    "names that are one text": put("class_names", '"abc"'),
    "names that are no text": put("class_names", [1, 2]),
    "more names than classes": put("class_names", list("abcdef")),
    "whole that is a number": put("whole", "1"),
    "a digest that is none": put("weights", "0" * 63 + "g"),
}


@pytest.mark.parametrize("case", METADATA)
def test_other_metadata_are_refused(case, good, tmp_path):
    assert refused(changed(good, METADATA[case]), tmp_path / "net.onnx").kind == "metadata"


def other_values(made):
    weight = tensor(made, "fc4.bias")
    weight.raw_data = (np.frombuffer(weight.raw_data, "<f4") + 1).tobytes()


def not_finite(made):
    weight = tensor(made, "fc4.bias")
    weight.raw_data = np.full(5, np.nan, "<f4").tobytes()


def double(made):
    weight = tensor(made, "fc4.bias")
    weight.raw_data, weight.data_type = np.zeros(5).tobytes(), TensorProto.DOUBLE


def one_in_half(made):
    weight = tensor(made, "fc4.bias")
    weight.raw_data, weight.data_type = np.zeros(5, np.float16).tobytes(), TensorProto.FLOAT16


def one_of_integers(made):
    weight = tensor(made, "fc4.bias")
    weight.raw_data, weight.data_type = np.zeros(5, np.int32).tobytes(), TensorProto.INT32


def integers(made):
    for weight in made.graph.initializer:
        weight.data_type = TensorProto.INT32 if weight.data_type == TensorProto.FLOAT else weight.data_type


def text(made):
    weight = tensor(made, "fc4.bias")
    weight.ClearField("raw_data")
    weight.string_data.extend([b"a"] * 5)
    weight.data_type = TensorProto.STRING


def longer(made):
    weight = tensor(made, "fc4.bias")
    weight.dims[0], weight.raw_data = 6, np.zeros(6, "<f4").tobytes()


WEIGHTS = {
    "another digest": put("weights", "0" * 64),
    "other values": other_values,
    "values that are not finite": not_finite,
    "float64": double,
    "float16 among float32": one_in_half,
    "one of integers": one_of_integers,
    "integers": integers,
    "text": text,
    "another shape": longer,
    "a dimension less": lambda made: tensor(made, "conv1.weight").dims.pop(),
    "a turned matrix": lambda made: tensor(made, "fc4.weight").dims.append(tensor(made, "fc4.weight").dims.pop(0)),
    "a dimension of -1": lambda made: tensor(made, "fc4.bias").dims.__setitem__(0, -1),
    "a dimension that overflows": lambda made: tensor(made, "fc4.bias").dims.__setitem__(0, 2**62),
    "bytes too few": lambda made: setattr(tensor(made, "fc4.bias"), "raw_data", b"\0" * 19),
    "no bytes": lambda made: tensor(made, "fc4.bias").ClearField("raw_data"),
    "four bits of many": lambda made: made.graph.initializer.add(
        name="more", data_type=TensorProto.INT4, dims=[2**40], raw_data=b"a"
    ),
    "no type": lambda made: tensor(made, "fc4.bias").ClearField("data_type"),
    "an unknown type": lambda made: setattr(tensor(made, "fc4.bias"), "data_type", 77),
    "one less": lambda made: made.graph.initializer.remove(tensor(made, "fc4.bias")),
    "one more": lambda made: made.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "more")),
    "one twice": lambda made: made.graph.initializer.append(tensor(made, "fc4.bias")),
    "more padding": lambda made: setattr(
        tensor(made, "pad.pads"), "raw_data", np.array([0, 0, 0, 0, 0, 0, 2**40, 1]).tobytes()
    ),
    "another split": lambda made: setattr(tensor(made, "norm1.apart"), "raw_data", np.array([-1, 2, 6, 6]).tobytes()),
    "another average": lambda made: setattr(
        tensor(made, "avgpool.rows"), "raw_data", b"\0" * len(tensor(made, "avgpool.rows").raw_data)
    ),
    "another dropout": options(dropout=0.25),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_other_weights_are_refused(case, good, tmp_path):
    assert refused(changed(good, WEIGHTS[case]), tmp_path / "net.onnx").kind == "weights"


def no_text(made):
    """Text that is not UTF-8, which protobuf keeps."""
    made.graph.node[0].MergeFromString(b"\x32\x02\xff\xfe")


def wrong_type(made):
    made.graph.value_info.append(helper.make_tensor_value_info("relu3", TensorProto.INT64, ["batch", 13]))


def two_kinds_of_values(made):
    tensor(made, "fc4.bias").float_data.extend([0.0] * 5)


INVALID = {"text": no_text, "shapes": wrong_type, "values twice": two_kinds_of_values}


@pytest.mark.parametrize("case", INVALID)
def test_what_the_checker_refuses(case, good, tmp_path):
    assert refused(changed(good, INVALID[case]), tmp_path / "net.onnx").kind == "invalid"


def test_a_float16_file_is_checked_by_shapes(narrow, tmp_path):
    path = tmp_path / "net.onnx"
    assert refused(changed(narrow, lambda made: tensor(made, "fc4.bias").dims.append(1)), path).kind == "weights"
    assert refused(changed(narrow, one_in_single), path).kind == "weights"
    path.write_bytes(changed(narrow, put("weights", "0" * 64)))
    assert onnx_file.read(path).weights_digest == "0" * 64


def one_in_single(made):
    weight = tensor(made, "fc4.bias")
    weight.raw_data, weight.data_type = np.zeros(5, np.float32).tobytes(), TensorProto.FLOAT


def step(made):
    return next(n for n in made.graph.node if n.op_type == "QuantizeLinear")


def scale_of_two_dimensions(made):
    made.graph.initializer.append(numpy_helper.from_array(np.ones((1, 1), np.float32), "wide"))
    step(made).input[1] = "wide"


def scale_that_is_computed(made):
    next(n for n in made.graph.node if n.op_type == "DequantizeLinear").input[1] = "images"


def many_steps(made):
    for i in range(200):
        made.graph.node.append(helper.make_node("QuantizeLinear", step(made).input, [f"more{i}"], name=f"more{i}"))


QUANTISED = {
    "another operator": (lambda made: setattr(node(made, "pool1"), "op_type", "Identity"), "operators"),
    "another stride": (lambda made: attribute(made, "conv1", "strides").ints.__setitem__(0, 1), "operators"),
    "another input": (lambda made: node(made, "logits").input.__setitem__(1, node(made, "fc3").input[1]), "operators"),
    "a node less": (lambda made: made.graph.node.remove(node(made, "pool1")), "operators"),
    "a scale that is computed": (scale_that_is_computed, "operators"),
    "a scale of two dimensions": (scale_of_two_dimensions, "operators"),
    "a step of another domain": (
        lambda made: setattr(step(made), "domain", "com.microsoft"),
        "operators",
    ),
    "a step with blocks": (
        lambda made: step(made).attribute.append(helper.make_attribute("block_size", 2)),
        "operators",
    ),
    "a graph in a step": (
        lambda made: step(made).attribute.append(helper.make_attribute("axis", inner())),
        "operators",
    ),
    "a tensor in a step": (
        lambda made: step(made).attribute.append(helper.make_attribute("axis", numpy_helper.from_array(np.ones(3)))),
        "operators",
    ),
    "text among the scales": (
        lambda made: made.graph.initializer.append(helper.make_tensor("more", TensorProto.STRING, [1], [b"a"])),
        "weights",
    ),
    "complex numbers among the scales": (
        lambda made: made.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.complex64), "more")),
        "weights",
    ),
    "a step without a zero": (lambda made: step(made).input.pop(), "operators"),
    "many steps": (many_steps, "operators"),
    "another shape": (lambda made: tensor(made, "conv1.weight_quantized").dims.append(1), "weights"),
    "another constant": (
        lambda made: setattr(tensor(made, "norm1.apart"), "raw_data", np.array([-1, 2, 6, 6]).tobytes()),
        "weights",
    ),
    "another constant's shape": (lambda made: tensor(made, "avgpool.rows_quantized").dims.append(1), "weights"),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_a_quantised_file_has_the_networks_nodes(case, quantised, tmp_path):
    change, kind = QUANTISED[case]
    assert refused(changed(quantised, change), tmp_path / "net.onnx").kind == kind


# Nothing else is touched.

CHILD = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import fuzz_onnx
fuzz_onnx.prepared(Path(sys.argv[2]))
inner = Path.cwd()
outer = inner.parent.parent
paths = sorted(inner.glob("*.onnx"))
watch = fuzz_onnx.Watch(outer, inner.parent, inner)
(outer / "secret").read_bytes()
print(json.dumps(sorted(watch.touched())))
for path in paths:
    seen = fuzz_onnx.tried(path, fuzz_onnx.image("float32"))
    print(json.dumps([path.stem, seen.result, seen.told, sorted(watch.touched() - {"", path.name})]))
"""
"""Each file in a process of its own that is heard (Python's audit events), in folders that are watched (inotify)."""


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_hostile_files_have_nothing_else_touched(good, tmp_path, tmp_path_factory):
    inner = tmp_path / "some" / "where"
    inner.mkdir(parents=True)
    for folder in (tmp_path, inner):
        (folder / "secret").write_bytes(bytes(4096))
    (inner / "good.onnx").write_bytes(good)
    expected = {"good": "opened"}
    for place in PLACES:
        for mark, how in MARKS.items():
            for number, where in enumerate(LOCATIONS):
                name = f"{place.__name__}, {mark} {number}"
                content = changed(good, lambda made, p=place, w=where, h=how: p(made, outside(w, **h)))
                (inner / f"{name}.onnx").write_bytes(content)
                expected[name] = "external data"
    for kind, cases in KINDS.items():
        for number, change in enumerate(cases.values()):
            (inner / f"{kind} {number}.onnx").write_bytes(changed(good, change))
            expected[f"{kind} {number}"] = kind
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    work = tmp_path_factory.mktemp("work")
    command = [sys.executable, "-W", "error", "-c", CHILD, str(SCRIPT.parent), str(work)]
    ran = subprocess.run(command, cwd=inner, capture_output=True, text=True, timeout=300, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    heard, *told = map(json.loads, ran.stdout.splitlines())
    assert heard == ["secret"]
    assert {name: (kind or result, touched) for name, result, kind, touched in told} == {
        name: (kind, []) for name, kind in expected.items()
    }
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


KINDS = {
    "interface": INTERFACE,
    "opset": OPSET,
    "operators": OPERATORS,
    "metadata": METADATA,
    "weights": WEIGHTS,
    "invalid": INVALID,
}


# Networks.


def test_a_network_computes_what_the_one_it_came_from_does(tmp_path):
    net = portnet.AlexNet("cpu", "small", classes=5, weights=weights.parity(fuzz.small()))
    net.class_names = ("cat", "dog")
    path = net.export_onnx(tmp_path / "net.onnx").path
    opened = portnet.open_onnx(path)
    for batch in (1, 5):
        found = opened(given(batch))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, net(given(batch)), rtol=0, atol=1e-5 * np.abs(found).max())
    assert (opened.graph, opened.class_names, opened.whole) == (net.graph, ("cat", "dog"), False)
    assert (opened.settings.precision, opened.file.content) == ("float32", path.read_bytes())
    assert repr(opened).startswith(f"<OnnxNetwork {path}, small, float32 weights, on onnxruntime-cpu (")
    picture = np.random.default_rng(3).integers(0, 256, (40, 30, 3), np.uint8)
    assert opened.classify(picture, top=2) == [(n, pytest.approx(p, abs=1e-5)) for n, p in net.classify(picture, top=2)]
    with pytest.raises(InputError, match="top must be at least 1"):
        opened.classify(picture, top=0)


def labelled(count=11, whole=False):
    """Pictures with labels, and a network's answers must differ between them."""
    labels = np.arange(count) % 5

    def read(i):
        return np.random.default_rng(i).integers(0, 256, (31, 40, 3), np.uint8)

    return images.DataSet(
        name="noise",
        class_names=tuple("abcde"),
        labels=labels,
        ids=np.arange(count),
        mean=(1.0, 2.0, 3.0),
        read=read,
        whole=whole,
    )


def approx(evaluation):
    return training.Evaluation(
        top1=evaluation.top1,
        top5=evaluation.top5,
        loss=pytest.approx(evaluation.loss, rel=1e-5),
        count=evaluation.count,
    )


@pytest.mark.parametrize("how", [{}, {"preprocess": True}, {"softmax": True}, {"batch": 4}, {"half": True}, "all"])
def test_every_convention_is_classified_and_evaluated_alike(how, tmp_path):
    how = {"preprocess": True, "softmax": True, "batch": 4} if how == "all" else how
    net = portnet.AlexNet("cpu", "small", classes=5, weights=weights.parity(fuzz.small()))
    opened = portnet.open_onnx(written(tmp_path / "net.onnx", notes={"whole": True}, **how))
    narrow = "half" in how
    picture = np.random.default_rng(3).integers(0, 256, (40, 30, 3), np.uint8)
    net.whole = True
    for (name, p), (expected, q) in zip(opened.classify(picture), net.classify(picture), strict=True):
        assert narrow or name == expected
        assert p == pytest.approx(q, abs=1e-2 if narrow else 1e-5)
    for data, views in ((labelled(), 1), (labelled(whole=True), 1), (labelled(), 10)):
        counted = []
        found = opened.evaluate(data, batch=5, views=views, on_batch=counted.append)
        expected = net.evaluate(data, batch=5, views=views)
        assert counted[-1] == 11
        if not narrow:
            assert found == approx(expected)
        assert found.loss == pytest.approx(expected.loss, rel=1e-2)


def test_prepared_images_are_evaluated_where_the_file_takes_some(pictured, good, tmp_path):
    (tmp_path / "pictured.onnx").write_bytes(pictured)
    (tmp_path / "good.onnx").write_bytes(good)
    pair = given(6), np.arange(6) % 5
    assert portnet.open_onnx(tmp_path / "good.onnx").evaluate(pair).count == 6
    with pytest.raises(InputError, match="takes pictures, not prepared images"):
        portnet.open_onnx(tmp_path / "pictured.onnx").evaluate(pair)


def test_pictures_to_probabilities(pictured, good, tmp_path):
    (tmp_path / "pictured.onnx").write_bytes(pictured)
    (tmp_path / "good.onnx").write_bytes(good)
    pixels = np.random.default_rng(3).integers(0, 256, (2, 20, 20, 3), np.uint8)
    opened, plain = (portnet.open_onnx(tmp_path / f"{name}.onnx") for name in ("pictured", "good"))
    found = opened(pixels)
    mean = np.array(plain.graph.normalisation.mean, np.float32)
    logits = plain(np.ascontiguousarray((pixels - mean).transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(found, model._softmax(logits), atol=1e-6)
    np.testing.assert_array_equal(opened(pixels[:, :, ::-1][:, :, ::-1]), found)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.zeros((3, 20, 20, 3), np.uint8), "takes 2 at a time, got 3"),
        (np.zeros((2, 20, 20, 3), np.float32), "pictures must be uint8 .*got float32"),
        (np.zeros((2, 20, 21, 3), np.uint8), r"shape \(2, 20, 21, 3\)"),
        (np.zeros((2, 21, 20, 3), np.uint8), r"shape \(2, 21, 20, 3\)"),
        (np.zeros((20, 20, 3), np.uint8), r"shape \(20, 20, 3\)"),
        (np.zeros((0, 20, 20, 3), np.uint8), "n of at least 1"),
        (np.uint8(3), r"shape \(\)"),
        ([[1], [1, 2]], "what is no array"),
    ],
)
def test_wrong_pictures(batch, message, pictured, tmp_path):
    (tmp_path / "net.onnx").write_bytes(pictured)
    with pytest.raises(InputError, match=message):
        portnet.open_onnx(tmp_path / "net.onnx")(batch)


def test_wrong_images(good, tmp_path):
    (tmp_path / "net.onnx").write_bytes(good)
    opened = portnet.open_onnx(tmp_path / "net.onnx")
    for wrong in (given().astype(np.float64), given()[:, :, 1:], given() * np.nan):
        with pytest.raises(InputError, match="images"):
            opened(wrong)


def test_a_quantised_file_is_run_in_int8(quantised, good, tmp_path):
    (tmp_path / "int8.onnx").write_bytes(quantised)
    (tmp_path / "good.onnx").write_bytes(good)
    narrow, wide = (portnet.open_onnx(tmp_path / f"{name}.onnx") for name in ("int8", "good"))
    assert narrow.settings.precision == "int8"
    expected = wide(given(4))
    error = np.abs(narrow(given(4)) - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 0.1


class Deaf(Backend):
    """Runs the graph, no files."""

    name, vendor = "deaf", "test"

    def probe(self):
        pytest.fail("probed")

    def open(self, graph, weights, settings):
        raise NotImplementedError


class Told(Deaf):
    """Runs files, and keeps what it was told of them."""

    name = "told"
    precisions = ("float16", "float32")
    output = np.zeros((2, 5), np.float32)

    def probe(self):
        return Device(name="told", precisions=self.precisions)

    def open_exported(self, content, weights, settings):
        self.told = content, weights, settings
        return self

    def put(self, value):
        return value

    get = put

    def infer(self, value):
        if isinstance(self.output, Exception):
            raise self.output
        return self.output


def on(backend, monkeypatch):
    monkeypatch.setattr(plugins, "choose", lambda name: backend)
    return backend


def test_a_backend_that_runs_no_files(good, tmp_path, monkeypatch):
    with pytest.raises(Unsupported, match=r"backend cpu runs no ONNX files; name one that does, such as onnxruntime"):
        portnet.open_onnx(tmp_path / "missing.onnx", "cpu")
    on(Deaf(), monkeypatch)
    with pytest.raises(Unsupported, match="backend deaf runs no ONNX files"):
        portnet.open_onnx(tmp_path / "missing.onnx")


def test_an_unknown_backend(tmp_path):
    with pytest.raises(UnknownName, match="onnxruntime-cpu"):
        portnet.open_onnx(tmp_path / "missing.onnx", "onnxruntime-cp")


def test_a_file_is_checked_before_the_device_is_looked_for(tmp_path, monkeypatch):
    backend = on(Told(), monkeypatch)
    monkeypatch.setattr(backend, "probe", lambda: pytest.fail("probed"))
    with pytest.raises(OnnxFileError):
        portnet.open_onnx(tmp_path / "missing.onnx")


@pytest.mark.parametrize(
    ("precisions", "chosen"), [(("float16", "float32"), "float32"), (("float16", "int8"), "float16")]
)
@pytest.mark.parametrize("strict", [False, True])
def test_what_a_backend_is_told(precisions, chosen, strict, good, tmp_path, monkeypatch):
    backend = on(Told(), monkeypatch)

    def probe():
        (tmp_path / "net.onnx").write_bytes(b"what was never checked")
        return Device(name="told", precisions=precisions)

    monkeypatch.setattr(backend, "probe", probe)
    (tmp_path / "net.onnx").write_bytes(good)
    opened = portnet.open_onnx(tmp_path / "net.onnx", strict=strict)
    content, values, settings = backend.told
    assert content == good
    assert weights.digest(values) == opened.file.weights_digest
    assert settings == Settings(precision=chosen, strict=strict)
    assert opened(given()).shape == (2, 5)


@pytest.mark.parametrize(
    "output",
    [
        RuntimeError("out of memory\nthere"),
        MemoryError("more"),
        np.zeros((2, 5)),
        np.zeros((1, 5), np.float32),
        np.zeros((2, 6), np.float32),
    ],
)
def test_a_run_that_fails(output, good, tmp_path, monkeypatch):
    on(Told(), monkeypatch).output = output
    (tmp_path / "net.onnx").write_bytes(good)
    with pytest.raises(OnnxFileError) as caught:
        portnet.open_onnx(tmp_path / "net.onnx")(given())
    assert caught.value.kind == "run"
    assert "\n" not in str(caught.value)


def test_portnets_own_errors_are_left_as_they_are(good, tmp_path, monkeypatch):
    on(Told(), monkeypatch).output = Unsupported("no")
    (tmp_path / "net.onnx").write_bytes(good)
    with pytest.raises(Unsupported, match="no"):
        portnet.open_onnx(tmp_path / "net.onnx")(given())


# Files broken at random.


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_files_broken_at_random():
    """benchmarks/fuzz_onnx.py does 5,000."""
    command = [sys.executable, str(SCRIPT), "100", "--seed", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (ran.returncode, ran.stdout.splitlines()[-1], ran.stderr) == (0, "passed", ""), ran.stdout
