"""Any torch module as an ONNX file: it computes what the module does, which stays as it is, and mistakes are told."""

import copy
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import portnet
from portnet import plugins
from portnet.errors import ExportError, InputError, PortNetError, Unavailable, Unsupported
from portnet_backends import torch_own


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that wait for one another beside other work make steps of microseconds last milliseconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class ConvNet(nn.Module):
    """A residual block whose batch normalisation is fused, one that is not, dropout, and a layer used twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.pooled = nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.Flatten())
        self.drop, self.hidden, self.last = nn.Dropout(0.5), nn.Linear(36, 8), nn.Linear(8, 5)
        with torch.no_grad():
            for norm in (self.norm, self.pooled[1]):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.pooled(self.relu(self.norm(self.conv(x))))
        return self.last(self.drop(self.relu(self.hidden(x))))


class Paired(nn.Module):
    """Two inputs, of other dtypes; three outputs, nested, one of integers."""

    def __init__(self):
        super().__init__()
        self.words, self.mix = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, tokens, scale):
        mixed = self.mix(self.words(tokens)) * scale
        return mixed, {"likeliest": mixed.argmax(2), "mean": mixed.mean()}


def made(factory, **settings):
    """A module from a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return factory(**settings)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The network, in training mode throughout its export, and the result."""
    net = made(ConvNet)
    folder = tmp_path_factory.mktemp("exported")
    return net, portnet.export_onnx(net, drawn(3, 2, 6, 6), folder / "net.onnx")


def ran(path, **inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def dims(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


# Right files.


@pytest.mark.parametrize("batch", [1, 7, 32])
def test_the_file_computes_what_the_module_does_at_any_batch(exported, batch):
    net, done = exported
    assert done.error < 1e-6
    images = drawn(batch, 2, 6, 6, seed=batch)
    with torch.no_grad():
        expected = copy.deepcopy(net).eval()(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(ran(done.path, images=images)[0], expected, rtol=1e-5, atol=1e-5)


def test_what_is_in_the_file(exported):
    _, done = exported
    model = onnx.load(done.path)
    onnx.checker.check_model(done.path, full_check=True)
    (given,), (got,) = model.graph.input, model.graph.output
    assert (given.name, dims(given)) == ("images", ["batch", 2, 6, 6])
    assert (got.name, dims(got)) == ("logits", ["batch", 5])
    # One file, and nothing of where its maker's sources stand.
    assert list(done.path.parent.iterdir()) == [done.path]
    assert all(not tensor.external_data for tensor in model.graph.initializer)
    assert __file__.encode() not in done.path.read_bytes()
    assert {"conv.weight", "last.bias"} <= {tensor.name for tensor in model.graph.initializer}


def test_layers_are_those_that_the_file_has(exported):
    _, done = exported
    # The first convolution is one with its normalisation, dropout is nothing, and the ReLU is called twice.
    assert set(done.layers) == {"norm", "pooled.0", "pooled.1", "pooled.2", "hidden", "last"}
    assert max(done.layers.values()) < 1e-6
    assert done.worst in done.layers


class Aside(nn.Module):
    """Hands on more than it returns."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 3)

    def forward(self, x):
        y = self.line(x)
        self.left = y * 2
        return y + 1


def test_a_layer_that_is_not_sure_is_left_out(tmp_path):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Aside()

        def forward(self, x):
            return self.inner(x) * self.inner.left

    done = portnet.export_onnx(Outer(), drawn(2, 3), tmp_path / "net.onnx")
    assert done.error < 1e-5
    assert set(done.layers) == {"inner.line"}


def test_the_module_stays_as_it_is(tmp_path):
    net = made(ConvNet)
    net.last.eval()
    net.conv.weight.requires_grad_(False)
    net(torch.from_numpy(drawn(3, 2, 6, 6))).sum().backward()
    modes = {name: module.training for name, module in net.named_modules()}
    held = {name: (value, value.clone(), value.requires_grad, value.grad) for name, value in net.named_parameters()}
    held |= {name: (value, value.clone(), False, None) for name, value in net.named_buffers()}
    hooks = sum(len(module._forward_hooks) for module in net.modules())
    example = torch.from_numpy(drawn(3, 2, 6, 6))
    before, state = example.clone(), torch.get_rng_state()
    portnet.export_onnx(net, example, tmp_path / "net.onnx")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(example, before)
    assert {name: module.training for name, module in net.named_modules()} == modes
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        same, was, grad, gradient = held.pop(name)
        assert value is same
        assert torch.equal(value, was)
        assert (value.requires_grad, value.grad) == (grad, gradient)
        assert value.device.type == "cpu"
    assert not held
    assert sum(len(module._forward_hooks) for module in net.modules()) == hooks


def test_several_inputs_and_outputs(tmp_path):
    net = made(Paired)
    tokens, scale = np.random.default_rng(0).integers(0, 9, (4, 3)), drawn(4, 1, 1)
    done = portnet.export_onnx(net, (tokens, torch.from_numpy(scale)), tmp_path / "net.onnx")
    assert done.error < 1e-6
    graph = onnx.load(done.path).graph
    assert [(v.name, dims(v)) for v in graph.input] == [
        ("input_0", ["batch", 3]),
        ("input_1", ["batch", 1, 1]),
    ]
    assert [v.name for v in graph.output] == ["output_0", "output_1", "output_2"]
    mixed, likeliest, mean = ran(done.path, input_0=tokens[:2], input_1=scale[:2])
    with torch.no_grad():
        expected, others = net(torch.from_numpy(tokens[:2]), torch.from_numpy(scale[:2]))
    np.testing.assert_allclose(mixed, expected.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(likeliest, others["likeliest"].numpy())
    np.testing.assert_allclose(mean, others["mean"].numpy(), rtol=1e-5)


def test_inputs_of_any_number(tmp_path):
    class Summed(nn.Module):
        def forward(self, first, *others):
            return first + sum(others)

    done = portnet.export_onnx(Summed(), tuple(drawn(2, 3, seed=i) for i in range(3)), tmp_path / "net.onnx")
    assert done.error < 1e-6
    assert [dims(v) for v in onnx.load(done.path).graph.input] == [["batch", 3]] * 3


def test_an_example_of_one_item(tmp_path):
    net = made(nn.GRU, input_size=3, hidden_size=4, batch_first=True)
    # Of the other byte order, too.
    done = portnet.export_onnx(net, drawn(1, 5, 3).astype(">f4"), tmp_path / "net.onnx")
    assert done.error < 1e-6
    assert [dims(v) for v in onnx.load(done.path).graph.output] == [["batch", 5, 4], [1, "batch", 4]]


class Fixed(nn.Module):
    """Works for batches of four alone."""

    def forward(self, x):
        return x.reshape(4, 3).cumsum(1)


def test_a_batch_that_stays_as_it_is(tmp_path):
    done = portnet.export_onnx(Fixed(), drawn(4, 3), tmp_path / "net.onnx", dynamic_batch=False)
    assert done.error < 1e-6
    assert dims(onnx.load(done.path).graph.input[0]) == [4, 3]
    with pytest.raises(InputError, match=r"fails on float32 \(1, 3\): .*pass dynamic_batch=False"):
        portnet.export_onnx(Fixed(), drawn(4, 3), tmp_path / "net.onnx")
    with pytest.raises(Unsupported, match=r"fixed the batch at 4.*pass dynamic_batch=False"):
        portnet.export_onnx(Fixed(), drawn(4, 3), tmp_path / "net.onnx", verify=False)


def test_whatever_the_caller_is_about(tmp_path):
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    compiled = torch.compile(net, backend="eager")
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        done = portnet.export_onnx(compiled, drawn(4, 5, 8), tmp_path / "net.onnx")
    assert done.error < 1e-5
    assert {"linear1", "linear2", "norm1"} <= set(done.layers)
    model = onnx.load(done.path)
    assert "Cast" not in {node.op_type for node in model.graph.node}
    assert {"linear1.bias", "norm1.weight"} <= {tensor.name for tensor in model.graph.initializer}


# Planted mistakes: in the file alone, after torch made it.


def plant(monkeypatch, change):
    """What torch exports, changed."""
    export = torch_own.Frozen.export

    def spoilt(self, *args, **how):
        good = export(self, *args, **how)
        model = onnx.load_model_from_string(good.content)
        change(model.graph)
        return replace(good, content=model.SerializeToString())

    monkeypatch.setattr(torch_own.Frozen, "export", spoilt)


def weight(name, by):
    def change(graph):
        (tensor,) = (t for t in graph.initializer if t.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + np.float32(by), name))

    return change


def crossed(graph):
    """Outputs that are swapped; they have one shape."""
    for node in graph.node:
        for i, name in enumerate(node.output):
            if name.startswith("output_"):
                node.output[i] = {"output_0": "output_1", "output_1": "output_0"}[name]


def test_a_planted_mistake_is_told_with_its_layer(exported, monkeypatch, tmp_path):
    net, _ = exported
    plant(monkeypatch, weight("last.bias", 1e-2))
    told = r"net.onnx: its output logits on onnxruntime-cpu for float32 \(\d, 2, 6, 6\) differs from the module's by "
    told += r"0\.0\d+, where float32 explains 0.0001; of all layers last most, by 0\.0\d+; the file is left"
    with pytest.raises(ExportError, match=told):
        portnet.export_onnx(net, drawn(3, 2, 6, 6), tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").exists()
    assert portnet.export_onnx(net, drawn(3, 2, 6, 6), tmp_path / "net.onnx", verify=False).error is None


@pytest.mark.parametrize("name", ["conv.weight", "hidden.weight", "pooled.1.running_mean"])
def test_small_planted_mistakes_are_found(exported, name, monkeypatch, tmp_path):
    plant(monkeypatch, weight(name, 1e-3))
    with pytest.raises(ExportError, match="differs from the module's"):
        portnet.export_onnx(exported[0], drawn(3, 2, 6, 6), tmp_path / "net.onnx")


def test_every_output_is_compared(monkeypatch, tmp_path):
    class Halves(nn.Module):
        def forward(self, x):
            return x + 1, x * 2

    plant(monkeypatch, crossed)
    with pytest.raises(ExportError, match="its output output_"):
        portnet.export_onnx(Halves(), drawn(2, 3), tmp_path / "net.onnx")


def test_dtypes_are_compared(monkeypatch, tmp_path):
    def widened(graph):
        graph.node[-1].output[0] = "narrow"
        graph.node.append(onnx.helper.make_node("Cast", ["narrow"], ["logits"], to=onnx.TensorProto.DOUBLE))
        graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE

    plant(monkeypatch, widened)
    with pytest.raises(ExportError, match=r"is float64 \(2, 2\), the module's float32 \(2, 2\): it differs .* by inf"):
        portnet.export_onnx(nn.Linear(3, 2), drawn(2, 3), tmp_path / "net.onnx")


class AtOne(nn.Module):
    """Other code for one item, which an open batch does not trace."""

    def forward(self, x):
        return x * 2 if x.shape[0] > 1 else x


class Flat(nn.Module):
    """Of one item it drops the batch."""

    def forward(self, x):
        return x * 2 if x.shape[0] > 1 else x.flatten()


class Beyond(nn.Module):
    """Other code for more items than the example has."""

    def forward(self, x):
        return x if x.shape[0] < 4 else x * 2


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (AtOne(), r"its output logits on onnxruntime-cpu for float32 \(1, 3\) differs from the module's by 1,"),
        (Flat(), r"for float32 \(1, 3\) is float32 \(1, 3\), the module's float32 \(3,\): it differs .* by inf"),
        (Beyond(), r"for float32 \(4, 3\) differs from the module's by 0\.5"),
    ],
    ids=["one", "shape", "more"],
)
def test_other_batches_than_the_example_are_compared(module, told, tmp_path):
    with pytest.raises(ExportError, match=told):
        portnet.export_onnx(module, drawn(3, 3), tmp_path / "net.onnx")


def test_a_file_that_takes_the_example_alone(monkeypatch, tmp_path):
    def fixed(graph):
        graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3

    plant(monkeypatch, fixed)
    with pytest.raises(
        ExportError, match=r"onnxruntime-cpu fails on float32 \(1, 4\), which the module takes: Invalid"
    ):
        portnet.export_onnx(nn.Linear(4, 2), drawn(3, 4), tmp_path / "net.onnx")


# What is refused.


class Noisy(nn.Module):
    """Adds noise, in evaluation mode too, far below what float32 explains."""

    def forward(self, x):
        return x + 1e-5 * torch.rand_like(x)


class Drawing(nn.Module):
    """Draws, and does nothing with it."""

    def forward(self, x):
        torch.rand(3)
        return x * 2


class Counting(nn.Module):
    """Gives more each time."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return x * self.count


class Branching(nn.Module):
    """Goes by values, which no trace does."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


class Named(nn.Module):
    """Has a parameter called as the output is."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.logits


class Giving(nn.Module):
    """Gives what it was made with."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


BAD = {
    "function": (lambda x: x, drawn(2, 3), "must be a torch.nn.Module, got function"),
    "no_values": (nn.Linear(3, 2, device="meta"), drawn(2, 3), "weight has no values yet"),
    "lazy": (nn.LazyLinear(2), drawn(2, 3), "weight has no values yet; load them, or run the module once"),
    "narrow": (nn.Linear(3, 2).bfloat16(), drawn(2, 3), r"weight is torch.bfloat16; .* module.float\(\)"),
    "double_example": (nn.Linear(3, 2), np.zeros((2, 3)), r"fails on float64 \(2, 3\): RuntimeError: .*; example must"),
    "wrong_shape": (nn.Linear(3, 2), drawn(2, 4), r"fails on float32 \(2, 4\): RuntimeError"),
    "wrong_number": (nn.Linear(3, 2), (drawn(2, 3), drawn(2, 3)), "TypeError: .*; example must be of the number"),
    "list": (nn.Linear(3, 2), [[1.0, 2.0, 3.0]], "must be tensors or NumPy arrays .*, got list"),
    "nothing": (nn.Linear(3, 2), (), "got an empty tuple"),
    "no_items": (nn.Linear(3, 2), drawn(0, 3), "at least 1"),
    "no_batch": (nn.Linear(3, 2), torch.tensor(1.0), r"on their first axis, got float32 \(\); dynamic_batch=False"),
    "two_lengths": (Paired(), (np.zeros((2, 3), int), drawn(1, 1, 1)), "of one length"),
    "bfloat16": (nn.ReLU(), torch.zeros(2, 3, dtype=torch.bfloat16), "of a dtype that NumPy has"),
    "complex": (nn.ReLU(), np.zeros((2, 3), complex), "booleans, integers or floats, got complex128"),
    "noisy": (Noisy(), drawn(2, 3), "something else on the same inputs .* draw nothing at random"),
    "counting": (Counting(), drawn(2, 3), "keep no state, or pass verify=False"),
    "nan": (nn.Linear(3, 2), np.full((2, 3), np.nan, np.float32), "output 0 holds NaN or infinity"),
    "none": (Giving(None), drawn(2, 3), "must return tensors, got NoneType"),
    "no_outputs": (Giving(()), drawn(2, 3), "must return tensors, got none"),
    "named": (Named(), drawn(2, 3), "a parameter cannot be called 'logits' in ONNX"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_refused(name, tmp_path):
    module, example, told = BAD[name]
    with pytest.raises(InputError, match=told):
        portnet.export_onnx(module, example, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_drawing_without_effect_is_fine(tmp_path):
    assert portnet.export_onnx(Drawing(), drawn(2, 3), tmp_path / "net.onnx").error == 0


def test_what_is_not_to_be_verified_may_draw(tmp_path):
    assert portnet.export_onnx(Noisy(), drawn(2, 3), tmp_path / "net.onnx", verify=False).error is None


def test_what_torch_does_not_export(tmp_path):
    with pytest.raises(Unsupported, match=r"torch\.onnx\.export failed: \w+: .*"):
        portnet.export_onnx(Branching(), drawn(2, 3), tmp_path / "net.onnx")


def test_what_onnx_runtime_does_not_run(tmp_path):
    # There is no convolution in float64.
    with pytest.raises(Unsupported, match="refuses the model: NotImplemented"):
        portnet.export_onnx(nn.Conv2d(2, 2, 3).double(), np.zeros((2, 2, 4, 4)), tmp_path / "net.onnx")


def test_beyond_what_one_file_holds(monkeypatch, tmp_path):
    monkeypatch.setattr(torch_own, "_LARGEST", 4 * (3 * 2 + 2) - 1)
    with pytest.raises(InputError, match="one ONNX file holds less than 2"):
        portnet.export_onnx(nn.Linear(3, 2), drawn(2, 3), tmp_path / "net.onnx")
    monkeypatch.setattr(torch_own, "_LARGEST", 4 * (3 * 2 + 2))
    portnet.export_onnx(nn.Linear(3, 2), drawn(2, 3), tmp_path / "net.onnx", verify=False)


def test_what_the_checker_refuses_is_not_written(monkeypatch, tmp_path):
    plant(monkeypatch, lambda graph: graph.node.extend(list(graph.node)))
    (tmp_path / "net.onnx").write_text("what was there")
    with pytest.raises(Unsupported, match=r"does not pass ONNX's checker: .*; no file is written"):
        portnet.export_onnx(nn.Linear(3, 2), drawn(2, 3), tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_text() == "what was there"


def test_where_nothing_can_be_written(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        portnet.export_onnx(nn.Linear(3, 2), drawn(2, 3), tmp_path / "missing" / "net.onnx")


def test_without_what_it_needs(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(torch_own.importlib.util, "find_spec", lambda _: None)
        with pytest.raises(Unavailable, match=r"needs onnxscript; pip install 'portnet\[model\]'"):
            portnet.export_onnx(nn.Linear(3, 2), drawn(2, 3), tmp_path / "net.onnx")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        with pytest.raises(Unavailable, match="torch"):
            portnet.export_onnx(nn.Linear(3, 2), drawn(2, 3), tmp_path / "net.onnx")


def test_without_onnx_runtime_nothing_is_compared(monkeypatch, tmp_path):
    def absent(*_):
        raise Unavailable("ONNX Runtime cannot be imported", "install it")

    with monkeypatch.context() as patch:
        patch.setattr(type(plugins.backends()["onnxruntime-cpu"]), "run_model", absent)
        assert portnet.export_onnx(nn.Linear(3, 2), drawn(2, 3), tmp_path / "net.onnx").error is None
    backends = {name: b for name, b in plugins.backends().items() if name != "onnxruntime-cpu"}
    monkeypatch.setattr(plugins, "backends", lambda: backends)
    assert portnet.export_onnx(nn.Linear(3, 2), drawn(2, 3), tmp_path / "net.onnx").error is None
    assert issubclass(Unavailable, PortNetError)
