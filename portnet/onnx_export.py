"""A graph and its weights as an ONNX model, lowered layer by layer; nothing is traced.

Operators as in https://onnx.ai/onnx/operators. Arithmetic is float32, or with `half` float16; the
batch alone can be left open.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from portnet.contract import Weights
from portnet.errors import InputError, Unsupported, WeightsError
from portnet.files import write_atomically
from portnet.graph import (
    LRN,
    AdaptiveAvgPool,
    Conv,
    Dropout,
    Flatten,
    Graph,
    Linear,
    MaxPool,
    Pad,
    ReLU,
    SpatialLRN,
    Step,
)
from portnet.images import input_size, square_size
from portnet.weights import digest

if TYPE_CHECKING:
    import onnx

INPUT, OUTPUT, BATCH = "images", "logits", "batch"
PICTURES, PROBABILITIES = "pictures", "probabilities"
"""The ends of a model that prepares its pictures itself, and of one that ends in a softmax."""
OPSET = 17
OLDEST_OPSET = 13  # Pad takes its amounts as inputs, and Softmax goes along one axis, from here on.
OLDEST_IR = 8
SEAL = "sha256"
"""The key of the entry of metadata that ends every file."""
_LARGEST = 2**31 - 2**20  # A protobuf message ends at 2 GiB; the graph around the weights takes a few KiB.


def lower(
    graph: Graph,
    weights: Weights,
    *,
    opset: int = OPSET,
    batch: int | None = None,
    preprocess: bool = False,
    softmax: bool = False,
    half: bool = False,
    every_layer: bool = False,
    notes: Mapping[str, Any] | None = None,
) -> "onnx.ModelProto":
    """The network at inference as an ONNX model.

    Input ``images``, float32 ``(batch, *graph.input)``, prepared as `portnet.preprocess` does it; output ``logits``,
    float32 ``(batch, *graph.output)``. `batch` fixes its size, which is open by default. With `preprocess` the input is
    ``pictures``, uint8 ``(batch, S, S, 3)``, RGB, cut to the network's size, and the model does all that follows. With
    `softmax` the output is ``probabilities``. With `half` weights and all values between the ends are float16, but for
    the squares of local response normalisation, which overflow there. With `every_layer` each layer's value, the last
    one's too, is an output under its name, in order and before the others.

    A layer's value carries the layer's name (the last one's is the logits), an initialiser the parameter's. The
    metadata hold `preset`; `options`, `normalisation` and `input`, the convention of the input (JSON); the SHA-256 of
    the `weights`; the version of `portnet`; and `notes`, as JSON. The IR version is the lowest that `opset` allows, but
    at least 8.

    Raises `WeightsError` where `weights` are not float32 arrays of the graph's names and shapes, `InputError` for an
    `opset` or a `batch` out of range, a layer named like an end, a network beyond protobuf's 2 GiB, or `preprocess` of
    a graph that takes no pictures, and `Unsupported` for a layer that ONNX has no exact counterpart of.
    """
    from onnx import defs, helper

    newest = defs.onnx_opset_version()
    if not isinstance(opset, int) or not OLDEST_OPSET <= opset <= newest:
        raise InputError(
            f"opset must lie between {OLDEST_OPSET} and {newest}, the newest that onnx knows; got {opset!r}"
        )
    if batch is not None and not 1 <= batch < 2**31:
        raise InputError(f"a fixed batch must be at least 1, got {batch}")
    _check(graph, weights)
    body = _Body(graph, half=half)
    for name in graph.parameters:
        body.constant(name, weights[name])
    body.network(preprocess=preprocess, softmax=softmax, every_layer=every_layer)
    taken, *values = (
        helper.make_tensor_value_info(name, dtype, [batch or BATCH, *shape]) for name, shape, dtype in body.values
    )
    layers = {step.layer.name for step in graph.steps}
    given = [v for v in values if v is values[-1] or (every_layer and v.name in (*layers, OUTPUT))]

    opsets = [helper.make_opsetid("", opset)]
    portnet = _version()
    model = helper.make_model(
        helper.make_graph(
            body.nodes,
            graph.preset,
            [taken],
            given,
            body.initialisers,
            value_info=[v for v in values if v not in given],
        ),
        opset_imports=opsets,
        ir_version=max(OLDEST_IR, helper.find_min_ir_version_for(opsets)),
        producer_name="portnet",
        producer_version=portnet,
    )
    normalisation = {"mean": graph.normalisation.mean, "scale": graph.normalisation.scale}
    helper.set_model_props(
        model,
        {
            "preset": graph.preset,
            "options": json.dumps(dict(graph.options)),
            "normalisation": json.dumps(normalisation),
            "input": json.dumps(_convention(graph, taken.name, bool((notes or {}).get("whole")))),
            "weights": digest(weights),
            "portnet": portnet,
        }
        | {name: json.dumps(value) for name, value in (notes or {}).items()},
    )
    return model


def export(graph: Graph, weights: Weights, path: str | os.PathLike[str], **how: Any) -> Path:
    """Write `lower`'s model to one file, sealed, whole or not at all, and return its path. One that exists is replaced.

    `how`: options of `lower`.

    The model passes ONNX's checker with strict shape inference before anything is written. Raises what `lower`
    raises, and `InputError` where the file cannot be written.
    """
    from onnx import checker

    data = seal(lower(graph, weights, **how).SerializeToString(deterministic=True))
    checker.check_model(data, full_check=True)
    return write_atomically(path, data, InputError)


def structure(
    graph: Graph, *, preprocess: bool = False, softmax: bool = False, half: bool = False
) -> "tuple[list[onnx.NodeProto], dict[str, npt.NDArray[Any]]]":
    """The nodes of `lower`'s model, whatever its weights, and the initialisers besides those, by name."""
    from onnx import numpy_helper

    body = _Body(graph, half=half)
    body.network(preprocess=preprocess, softmax=softmax)
    return body.nodes, {tensor.name: numpy_helper.to_array(tensor) for tensor in body.initialisers}


def seal(content: bytes) -> bytes:
    """A serialised model with its seal at the end; one that it carries already goes, as it fits no longer.

    The seal is a ``ModelProto`` that holds one entry of metadata, ``sha256``: of all bytes before it, in hexadecimal.
    Protobuf's messages concatenate, so that the whole is still one model to everything that reads ONNX.
    """
    from onnx import ModelProto

    if SEAL.encode() in content:
        model = ModelProto.FromString(content)
        kept = [entry for entry in model.metadata_props if entry.key != SEAL]
        if len(kept) < len(model.metadata_props):
            del model.metadata_props[:]
            model.metadata_props.extend(kept)
            content = model.SerializeToString(deterministic=True)
    return content + _seal(content)


def sealed(content: bytes) -> bool | None:
    """Whether the seal at the end of a file's content fits what stands before it; None where it ends in none."""
    example = _seal(b"")
    end, digits = content[-len(example) :], 2 * hashlib.sha256().digest_size
    if end[:-digits] != example[:-digits]:
        return None
    return end == _seal(memoryview(content)[: -len(example)])


def _seal(content: bytes | memoryview) -> bytes:
    from onnx import ModelProto, StringStringEntryProto

    entry = StringStringEntryProto(key=SEAL, value=hashlib.sha256(content).hexdigest())
    return bytes(ModelProto(metadata_props=[entry]).SerializeToString())


def one_matmul(n: int, dtype: type[Any] = np.float32) -> bytes:
    """``c = a b`` of ``(n, n)`` matrices, serialised, with random `b` in the file as weights are.

    What runtimes are asked whether they are there, and how fast.
    """
    from onnx import helper, numpy_helper

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    a, c = (helper.make_tensor_value_info(name, kind, [n, n]) for name in "ac")
    b = numpy_helper.from_array((np.random.default_rng(n).random((n, n), np.float32) - 0.5).astype(dtype), "b")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", [a], [c], [b])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


class _Body:
    """Nodes and initialisers, as they gather."""

    def __init__(self, graph: Graph, *, half: bool) -> None:
        self.graph, self.half = graph, half
        self.nodes: list[onnx.NodeProto] = []
        self.initialisers: list[onnx.TensorProto] = []
        self.values: list[tuple[str, tuple[int, ...], int]] = []
        """Name, shape of one image and element type: the input, then every value that is to be told."""

    def network(self, *, preprocess: bool, softmax: bool, every_layer: bool = False) -> None:
        """Add the nodes from the input to the output, and what they need besides the parameters."""
        from onnx import TensorProto

        graph, half, value = self.graph, self.half, INPUT
        inner = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        if preprocess:
            size = input_size(graph)
            self.values.append((PICTURES, (size, size, 3), TensorProto.UINT8))
            self.prepare(graph)
        self.values.append((INPUT, graph.input, TensorProto.FLOAT))
        if half:
            value = self.node("Cast", [INPUT], f"{INPUT}.half", to=TensorProto.FLOAT16)
        for step in graph.steps:
            last = step is graph.steps[-1]
            target = OUTPUT if last and not (every_layer or half) else step.layer.name
            if not self.add(step, value, target):
                if not (last or every_layer):
                    continue
                self.node("Identity", [value], target)
            self.values.append((target, step.output, inner))
            value = target
        if value != OUTPUT:
            if half:
                self.node("Cast", [value], OUTPUT, to=TensorProto.FLOAT)
            else:
                self.node("Identity", [value], OUTPUT)
            self.values.append((OUTPUT, graph.output, TensorProto.FLOAT))
        if softmax:
            self.node("Softmax", [OUTPUT], PROBABILITIES, axis=1)
            self.values.append((PROBABILITIES, graph.output, TensorProto.FLOAT))

    def constant(self, name: str, array: npt.NDArray[Any], *, wide: bool = False) -> str:
        from onnx import numpy_helper

        if self.half and not wide and array.dtype == np.float32:
            with np.errstate(over="ignore"):
                array = array.astype(np.float16)
            if not np.isfinite(array).all():
                raise WeightsError(f"{name} has values beyond 65,504, which float16 does not hold; export float32")
        self.initialisers.append(numpy_helper.from_array(array, name))
        return name

    def node(self, operator: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes))
        return outputs[0]

    def prepare(self, graph: Graph) -> None:
        """Pictures to images, to the bit as `portnet.preprocess` normalises them."""
        norm = graph.normalisation
        self.node("Transpose", [PICTURES], f"{PICTURES}.planes", perm=[0, 3, 1, 2])
        self.node("Cast", [f"{PICTURES}.planes"], f"{PICTURES}.float", to=1)  # TensorProto.FLOAT
        mean, scale = (np.array(v, np.float32)[:, None, None] for v in (norm.mean, norm.scale))
        plain = bool((scale == 1).all())
        moved = INPUT if plain else f"{PICTURES}.centred"
        self.node("Sub", [f"{PICTURES}.float", self.constant(f"{PICTURES}.mean", mean, wide=True)], moved)
        if not plain:
            self.node("Div", [moved, self.constant(f"{PICTURES}.scale", scale, wide=True)], INPUT)

    def add(self, step: Step, x: str, y: str) -> bool:
        """Add the nodes that compute value `y` from value `x`; False where the layer leaves `x` as it is."""
        name, shape = step.layer.name, step.input
        match step.layer:
            case Pad(right=right, bottom=bottom):
                ends = np.array([0, 0, 0, 0, 0, 0, bottom, right], np.int64)
                self.node("Pad", [x, self.constant(f"{name}.pads", ends)], y)
            case Conv(kernel=kernel, stride=stride, padding=padding, groups=groups):
                self.node(
                    "Conv",
                    [x, f"{name}.weight", f"{name}.bias"],
                    y,
                    kernel_shape=[kernel] * 2,
                    strides=[stride] * 2,
                    pads=[padding] * 4,
                    group=groups,
                )
            case ReLU():
                self.node("Relu", [x], y)
            case LRN() as lrn:
                self._lrn(lrn, shape, x, y)
            case SpatialLRN() as lrn:
                self._spatial(lrn, x, y)
            case MaxPool(kernel=kernel, stride=stride):
                self.node("MaxPool", [x], y, kernel_shape=[kernel] * 2, strides=[stride] * 2)
            case AdaptiveAvgPool(size=size) as pool:
                if shape[1:] == (size, size):
                    return False
                # ONNX has no such pool. Each window's mean is a product: rows R (size, height) and columns C
                # (width, size) make R x C.
                rows = self.constant(f"{name}.rows", _averages(pool, shape[1]))
                columns = self.constant(f"{name}.columns", _averages(pool, shape[2]).T)
                self.node("MatMul", [rows, x], f"{name}.averaged_rows")
                self.node("MatMul", [f"{name}.averaged_rows", columns], y)
            case Flatten():
                self.node("Flatten", [x], y, axis=1)
            case Linear():
                self.node("Gemm", [x, f"{name}.weight", f"{name}.bias"], y, transB=1)
            case Dropout(test_scale=scale):
                if scale == 1:
                    return False
                self.node("Mul", [x, self.constant(f"{name}.scale", np.array(scale, np.float32))], y)
            case layer:
                raise Unsupported(f"{name} cannot be written to ONNX: there is no lowering of {type(layer).__name__}")
        return True

    def _lrn(self, lrn: LRN, shape: tuple[int, ...], x: str, y: str) -> None:
        if lrn.size % 2 == 0:
            raise Unsupported(
                f"{lrn.name} cannot be written to ONNX: its window of {lrn.size} channels is even, and ONNX centres "
                "even windows otherwise than PyTorch; make it odd"
            )
        if self.half:
            x, narrow = self.node("Cast", [x], f"{lrn.name}.wide", to=1), y  # TensorProto.FLOAT
            y = f"{lrn.name}.scaled"
        settings: dict[str, Any] = {"size": lrn.size, "alpha": lrn.alpha, "beta": lrn.beta, "bias": lrn.k}
        if lrn.groups == 1:
            self.node("LRN", [x], y, **settings)
        else:
            self._towers(lrn, shape, x, y, **settings)
        if self.half:
            self.node("Cast", [y], narrow, to=10)  # TensorProto.FLOAT16

    def _spatial(self, lrn: SpatialLRN, x: str, y: str) -> None:
        name = lrn.name
        if self.half:
            x, narrow = self.node("Cast", [x], f"{name}.wide", to=1), y  # TensorProto.FLOAT
            y = f"{name}.scaled"
        # A runtime told to compute in float16 throughout squares in it too, which overflows above 255: so a sixteenth
        # is squared, and alpha is 256 times as large. Powers of two change nothing in float32.
        alpha, k, power, part = (
            self.constant(f"{name}.{kind}", np.array(value, np.float32), wide=True)
            for kind, value in (("alpha", 256 * lrn.alpha), ("k", lrn.k), ("power", -lrn.beta), ("part", 1 / 16))
        )
        around = {"kernel_shape": [lrn.size] * 2, "strides": [1, 1], "pads": [lrn.size // 2] * 4}
        self.node("Mul", [x, part], f"{name}.sixteenth")
        self.node("Mul", [f"{name}.sixteenth"] * 2, f"{name}.squares")
        self.node("AveragePool", [f"{name}.squares"], f"{name}.averages", count_include_pad=1, **around)
        self.node("Mul", [f"{name}.averages", alpha], f"{name}.moved")
        self.node("Add", [f"{name}.moved", k], f"{name}.base")
        self.node("Pow", [f"{name}.base", power], f"{name}.factor")
        self.node("Mul", [x, f"{name}.factor"], y)
        if self.half:
            self.node("Cast", [y], narrow, to=10)  # TensorProto.FLOAT16

    def _towers(self, lrn: LRN, shape: tuple[int, ...], x: str, y: str, **settings: Any) -> None:
        # Windows must not reach over the seam between towers, so each is an image of its own. That only reads memory
        # in another way, where splitting and joining would copy it.
        channels, *rest = shape
        towers = self.constant(f"{lrn.name}.apart", np.array([-1, channels // lrn.groups, *rest], np.int64))
        whole = self.constant(f"{lrn.name}.together", np.array([-1, channels, *rest], np.int64))
        self.node("Reshape", [x, towers], f"{lrn.name}.towers")
        self.node("LRN", [f"{lrn.name}.towers"], f"{lrn.name}.responses", **settings)
        self.node("Reshape", [f"{lrn.name}.responses", whole], y)


def _averages(pool: AdaptiveAvgPool, length: int) -> npt.NDArray[np.float32]:
    """The ``(size, length)`` matrix whose rows average the pool's windows over `length` positions."""
    matrix = np.zeros((pool.size, length), np.float32)
    for row, (start, stop) in zip(matrix, pool.windows(length), strict=True):
        row[start:stop] = 1 / (stop - start)
    return matrix


def _check(graph: Graph, weights: Weights) -> None:
    if graph.parameter_count * 4 > _LARGEST:
        raise InputError(
            f"{graph.preset} has {graph.parameter_count:,} parameters, and one ONNX file holds less than 2 GiB; "
            "choose a smaller image_size or fewer classes"
        )
    for step in graph.steps:
        if step.layer.name in (INPUT, OUTPUT, PICTURES, PROBABILITIES):
            raise InputError(
                f"a layer cannot be called {step.layer.name!r} in ONNX, where that names an end; rename it"
            )
    if weights.keys() != graph.parameters.keys():
        odd = ", ".join(sorted(weights.keys() ^ graph.parameters.keys()))
        raise WeightsError(f"these weights belong to another network than {graph.preset}: missing or unexpected: {odd}")
    for name, shape in graph.parameters.items():
        array = weights[name]
        if array.dtype != np.float32 or array.shape != shape:
            raise WeightsError(
                f"{name} of {graph.preset} is float32 of shape {shape}, got {array.dtype} of shape {array.shape}"
            )


def _convention(graph: Graph, name: str, whole: bool) -> dict[str, Any]:
    """What a program in another language must know to fill the input."""
    if name == INPUT:
        pixels = "RGB from 0 to 255, less the mean, over the scale; see normalisation"
        told: dict[str, Any] = {"name": name, "dtype": "float32", "shape": [BATCH, *graph.input], "pixels": pixels}
    else:
        size = input_size(graph)
        told = {"name": name, "dtype": "uint8", "shape": [BATCH, size, size, 3], "pixels": "RGB from 0 to 255"}
    if len(graph.input) == 3 and graph.input[1] == graph.input[2]:
        size = graph.input[1]
        cut = f"the short side scaled to {square_size(size)} (bilinear, antialiased), the central {size}x{size} cut out"
        told["pictures"] = f"scaled whole to {size}x{size} (bilinear, antialiased)" if whole else cut
    return told


def _version() -> str:
    try:
        return version("portnet")
    except PackageNotFoundError:  # used from a checkout that is not installed
        return "unknown"
