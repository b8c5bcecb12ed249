"""ONNX files that PortNet wrote, read as if by an enemy: nothing in them is believed, followed or run unchecked.

What is handed on is the very content that was checked, and it names no other file. Its nodes are those of the network
that its metadata name, so that what runs it is asked for nothing else.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portnet import alexnet, onnx_export, weights
from portnet.contract import Array
from portnet.errors import OnnxFileError, WeightsError
from portnet.graph import Graph
from portnet.onnx_export import BATCH, INPUT, OUTPUT, PICTURES, PROBABILITIES, SEAL

if TYPE_CHECKING:
    import onnx

LIMIT = 2**31 - 1
"""Bytes of the largest file: protobuf reads no larger message."""
_FIELDS, _PACKED, _TEXT = 100_000, 2**26, 2**20
"""The most fields, bytes of packed numbers and characters of metadata: a field of two bytes takes a hundred in memory.
A quantised file has some 5,000 fields."""
_RUN = 2**30
"""The most bytes of input that a file may demand of one run: a size is quickly written into a file."""
_REQUIRED = ("preset", "options", "normalisation", "input", "weights", "portnet")
_PLAIN = frozenset(
    {
        *("ModelProto", "GraphProto", "NodeProto", "AttributeProto", "TensorProto", "ValueInfoProto", "TypeProto"),
        *("TypeProto.Tensor", "TensorShapeProto", "TensorShapeProto.Dimension"),
        *("OperatorSetIdProto", "StringStringEntryProto"),
    }
)
_QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
_QUANTISED = "_quantized"
"""How ONNX Runtime's quantiser ends the names of initialisers that it replaced."""
_TYPES = ("FLOAT", "FLOAT16", "INT64", "INT32", "INT16", "UINT16", "INT8", "UINT8")
_HEX = re.compile("[0-9a-f]{64}")
_AGAIN = "export it again"


@dataclass(frozen=True, kw_only=True)
class OnnxFile:
    """A checked file.

    `content` is what was checked, the whole file. `input` is ``images``, float32 ``(batch, *graph.input)``, or
    ``pictures``, uint8 ``(batch, S, S, 3)``; `output` ``logits`` or ``probabilities``, float32 ``(batch, classes)``.
    `batch` is its size where the file fixes it. `weights_digest` is the SHA-256 (`portnet.weights.digest`) of the
    float32 weights that the file holds or, where it is `half` (float16) or `quantised`, was made from. `weights` are
    those that it holds, as float32; none where it is quantised. `notes` are all other metadata, read as JSON where they
    are.
    """

    path: Path
    content: bytes = field(repr=False)
    graph: Graph = field(repr=False)
    input: str
    output: str
    batch: int | None
    class_names: tuple[str, ...] | None
    whole: bool
    weights_digest: str
    half: bool
    quantised: bool
    notes: Mapping[str, Any] = field(repr=False)
    weights: Mapping[str, Array] = field(repr=False)


def read(path: str | os.PathLike[str], *, limit: int = LIMIT) -> OnnxFile:
    """The file, once all of it was checked; no other is read. Raises `OnnxFileError`, whose `kind` says what is wrong.

    `limit`: the most bytes that are read.
    """
    from onnx import checker

    path = Path(path)
    content = _content(path, limit)
    model = _parsed(path, content)
    messages = _messages(path, model)
    _check_external(path, messages)
    _check_opset(path, model)
    _check_messages(path, model, messages)
    props = _metadata(path, model)
    graph = _graph(path, props)
    given, result, batch = _interface(path, model, graph, props)
    quantised = any(node.op_type in _QUANTISERS for node in model.graph.node)
    arrays = {tensor.name: _array(path, tensor) for tensor in model.graph.initializer}
    if len(arrays) < len(model.graph.initializer):
        raise OnnxFileError(path, "weights", "two of its initialisers have one name")
    half = not quantised and _in_half(path, [arrays[name] for name in graph.parameters if name in arrays])
    nodes, constants = onnx_export.structure(
        graph, preprocess=given == PICTURES, softmax=result == PROBABILITIES, half=half
    )
    _check_nodes(path, model, nodes, arrays, result, quantised=quantised)
    _check_initialisers(path, graph, arrays, constants, quantised=quantised)
    held = {} if quantised else _weights(path, graph, arrays, props["weights"], half=half)
    names, whole, notes = _notes(path, graph, props)
    del model, messages  # as large as the file, and the checker makes two more
    try:
        checker.check_model(content, full_check=True)
    except Exception as error:  # onnx's errors have no common base
        raise OnnxFileError(path, "invalid", f"ONNX's checker refuses it: {_shown(str(error))}") from error
    return OnnxFile(
        path=path,
        content=content,
        graph=graph,
        input=given,
        output=result,
        batch=batch,
        class_names=names,
        whole=whole,
        weights_digest=props["weights"],
        half=half,
        quantised=quantised,
        notes=notes,
        weights=held,
    )


def _content(path: Path, limit: int) -> bytes:
    try:
        # Opening a pipe could wait for ever, and opening a device do anything. Without blocking, since one may have
        # taken the file's place since it was looked at.
        _check_regular(path, os.stat(path))
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            _check_regular(path, status)
            size = status.st_size
            if size > limit:
                raise OnnxFileError(
                    path, "too large", f"it has {size:,} bytes, where an ONNX file has at most {limit:,}"
                )
            content = file.read(size + 1)
    except FileNotFoundError:
        raise OnnxFileError(path, "missing", "there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise OnnxFileError(path, "unreadable", f"it cannot be read: {error}") from error
    if len(content) != size:
        raise OnnxFileError(path, "unreadable", "it changed while it was read; read it again when it is written")
    return content


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
        raise OnnxFileError(path, "unreadable", f"it is {what}; expected a file that portnet export wrote")


def _parsed(path: Path, content: bytes) -> "onnx.ModelProto":
    """The model, if the seal fits."""
    from onnx import ModelProto

    fits = onnx_export.sealed(content)
    if fits is False:
        raise OnnxFileError(path, "damaged", f"it is not as it was sealed; copy or {_AGAIN}")
    try:
        if not _well_formed(path, content):
            raise ValueError("the wire format is broken")
        model: onnx.ModelProto = ModelProto.FromString(content)
        keys = [entry.key for entry in model.metadata_props]
        ours = model.producer_name == "portnet" or not {"portnet", SEAL}.isdisjoint(keys)
    except OnnxFileError:
        raise
    except Exception as error:  # protobuf's error is not onnx's to give
        # Every writer begins with the version of the IR, field 1.
        if content.startswith(b"\x08"):
            raise OnnxFileError(path, "damaged", f"it is cut off or damaged; copy or {_AGAIN}") from error
        raise OnnxFileError(path, "not ONNX", "it is no ONNX file; expected one that portnet export wrote") from error
    if fits and keys.count(SEAL) == 1:
        return model
    if ours:
        told = f"it does not end in its one seal: it was cut off, or changed after it was written; {_AGAIN}"
        raise OnnxFileError(path, "damaged", told)
    if not model.HasField("graph"):
        raise OnnxFileError(path, "not ONNX", "it holds no model; expected a file that portnet export wrote")
    raise OnnxFileError(
        path,
        "foreign",
        "it has no seal of PortNet's; only AlexNet is opened, as portnet export writes it",
    )


def _well_formed(path: Path, content: bytes) -> bool:
    """Walk the fields before anything is built of them; see https://protobuf.dev/programming-guides/encoding."""
    from onnx import ModelProto

    fields = packed = 0
    left = [(0, len(content), ModelProto.DESCRIPTOR)]
    while left:
        at, end, message = left.pop()
        while at < end:
            key, at = _varint(content, at)
            known, wire, size = message.fields_by_number.get(key >> 3), key & 7, 0
            if wire == 0:
                _, at = _varint(content, at)
            elif wire == 2:
                size, at = _varint(content, at)
                if known is not None and known.message_type is not None:
                    left.append((at, at + size, known.message_type))
                elif known is not None and known.type not in (known.TYPE_STRING, known.TYPE_BYTES):
                    packed += size
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                return False
            at += size
            fields += 1
            if at > end:
                return False
            if fields > _FIELDS or packed > _PACKED:
                told = f"it has more than {_FIELDS:,} fields, or {_PACKED:,} bytes of packed numbers"
                raise OnnxFileError(path, "too large", told)
    return True


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends; beyond the content where there is none."""
    value = 0
    for place, byte in enumerate(content[at : at + 10]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    return 0, len(content) + 1


def _messages(path: Path, model: "onnx.ModelProto") -> list[Any]:
    """The model and every message within it, at any depth."""
    found: list[Any] = [model]
    for message in found:  # grows meanwhile
        for known, value in message.ListFields():
            if known.message_type is not None:
                found.extend([value] if hasattr(value, "ListFields") else value)
            elif known.type == known.TYPE_STRING:  # protobuf gives what is no text as bytes
                several = [value] if isinstance(value, str | bytes) else value
                if not all(isinstance(text, str) for text in several):
                    raise OnnxFileError(path, "invalid", f"{message.DESCRIPTOR.name}.{known.name} is not UTF-8")
    return found


def _check_external(path: Path, messages: Iterable[Any]) -> None:
    """No tensor anywhere lies in another file: runtimes look for it in the working directory, or wherever it says."""
    from onnx import TensorProto

    for message in messages:
        if isinstance(message, TensorProto) and (message.external_data or message.data_location != TensorProto.DEFAULT):
            told = f"tensor {_shown(message.name)} is to be read from elsewhere; PortNet's files hold all they need"
            raise OnnxFileError(path, "external data", told)


def _check_opset(path: Path, model: "onnx.ModelProto") -> None:
    import onnx

    oldest, newest = onnx_export.OLDEST_OPSET, onnx.defs.onnx_opset_version()
    found = [(entry.domain, entry.version) for entry in model.opset_import]
    if len(found) != 1 or found[0][0] or not oldest <= found[0][1] <= newest:
        told = ", ".join(f"{domain or 'ONNX'} {version}" for domain, version in found[:4])
        raise OnnxFileError(
            path, "opset", f"its operators are of {_shown(told or 'no set')}; expected ONNX's, {oldest} to {newest}"
        )
    if not onnx_export.OLDEST_IR <= model.ir_version <= onnx.IR_VERSION:
        known = f"{onnx_export.OLDEST_IR} to {onnx.IR_VERSION}, the newest that onnx {onnx.__version__} knows"
        raise OnnxFileError(path, "opset", f"its IR version is {model.ir_version}; expected {known}")


def _check_messages(path: Path, model: "onnx.ModelProto", messages: Iterable[Any]) -> None:
    """One graph of nodes and plain initialisers: no functions, inner graphs, sparse tensors, training."""
    kinds = [message.DESCRIPTOR.full_name.removeprefix("onnx.") for message in messages]
    for kind in sorted(set(kinds) - _PLAIN):
        raise OnnxFileError(path, "operators", f"it holds a {kind}, and PortNet writes none")
    if kinds.count("GraphProto") != 1:
        told = f"it holds {kinds.count('GraphProto')} graphs, one inside another; expected one"
        raise OnnxFileError(path, "operators", told)
    if kinds.count("TensorProto") != len(model.graph.initializer):
        raise OnnxFileError(path, "operators", "a tensor is an attribute of a node; expected initialisers only")
    before = model.ByteSize()
    model.DiscardUnknownFields()
    if model.ByteSize() != before:  # another reader of these bytes may know them, and see another model
        raise OnnxFileError(path, "operators", "it has fields that ONNX does not know; expected none")


def _metadata(path: Path, model: "onnx.ModelProto") -> dict[str, str]:
    props = {entry.key: entry.value for entry in model.metadata_props}
    if len(props) != len(model.metadata_props):
        raise OnnxFileError(path, "metadata", "two entries of its metadata have one key")
    if sum(len(key) + len(value) for key, value in props.items()) > _TEXT:
        raise OnnxFileError(path, "metadata", f"its metadata have more than {_TEXT:,} characters")
    if missing := [key for key in _REQUIRED if key not in props]:
        raise OnnxFileError(path, "metadata", f"its metadata lack {', '.join(missing)}; {_AGAIN}")
    if not _HEX.fullmatch(props["weights"]):
        raise OnnxFileError(path, "metadata", "its metadata tell no SHA-256 of its weights")
    return props


def _graph(path: Path, props: Mapping[str, str]) -> Graph:
    try:
        options, told = json.loads(props["options"]), json.loads(props["normalisation"])
        graph = alexnet.graph(props["preset"], **options)
        normalisation = {key: tuple(value) for key, value in told.items()}
    # InputError, and what Python raises for numbers and nesting beyond its limits and for what is no mapping.
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        told = f"its metadata name a network that this version cannot build: {_shown(str(error))}"
        raise OnnxFileError(path, "metadata", told) from error
    if graph.parameter_count > LIMIT or prod(graph.input) * 4 > _RUN:
        raise OnnxFileError(path, "metadata", f"its metadata name a network of {graph.preset} that no file can hold")
    if normalisation != {"mean": graph.normalisation.mean, "scale": graph.normalisation.scale}:
        raise OnnxFileError(path, "metadata", "its metadata tell another normalisation than the network's")
    return graph


def _interface(
    path: Path, model: "onnx.ModelProto", graph: Graph, props: Mapping[str, str]
) -> tuple[str, str, int | None]:
    """Names of input and output, and the batch where it is fixed."""
    from onnx import TensorProto

    size = graph.input[1]
    inputs = {
        INPUT: (TensorProto.FLOAT, "float32", list(graph.input)),
        PICTURES: (TensorProto.UINT8, "uint8", [size, size, 3]),
    }
    outputs = {name: (TensorProto.FLOAT, "float32", list(graph.output)) for name in (OUTPUT, PROBABILITIES)}
    ends: list[tuple[str, Any]] = []
    for what, values, known in (("input", model.graph.input, inputs), ("output", model.graph.output, outputs)):
        if [value.name for value in values] not in [[name] for name in known]:
            told = ", ".join(value.name for value in values) or "none"
            raise OnnxFileError(path, "interface", f"its {what} is {_shown(told)}; expected {' or '.join(known)}")
        (value,) = values
        kind, dtype, shape = known[value.name]
        tensor = value.type.tensor_type
        batch, *rest = [d.dim_param or d.dim_value for d in tensor.shape.dim] or [0]
        if tensor.elem_type != kind or rest != shape or not (batch == BATCH or (isinstance(batch, int) and batch > 0)):
            told = f"{value.name} must be {dtype} of shape (batch, {', '.join(map(str, shape))})"
            raise OnnxFileError(path, "interface", f"{told}, with a batch that is open or at least 1")
        ends.append((value.name, batch))
    (given, batch), (result, other) = ends
    if batch != other:
        raise OnnxFileError(path, "interface", "its input and its output differ in their batch")
    fixed = None if batch == BATCH else batch
    if (needed := (fixed or 1) * prod(graph.input) * 4) > _RUN:
        raise OnnxFileError(path, "interface", f"one run would take {needed:,} bytes of images; at most {_RUN:,} are")
    try:
        convention = json.loads(props["input"])
        convention = [convention[key] for key in ("name", "dtype", "shape")]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise OnnxFileError(path, "metadata", f"its metadata do not tell its input: {_shown(str(error))}") from error
    if convention != [given, inputs[given][1], [BATCH, *inputs[given][2]]]:
        raise OnnxFileError(path, "metadata", "its metadata tell another input than the file has")
    return given, result, fixed


def _array(path: Path, tensor: "onnx.TensorProto") -> Array:
    from onnx import TensorProto, numpy_helper

    try:
        kind = TensorProto.DataType.Name(tensor.data_type)
        if kind not in _TYPES:
            raise ValueError(f"it holds {kind}")
        array: Array = numpy_helper.to_array(tensor)
        if array.shape != tuple(tensor.dims):  # NumPy takes a dimension of -1 for whatever fits
            raise ValueError(f"its shape is {array.shape}")
    except Exception as error:  # whatever the damage leads NumPy to
        told = f"initialiser {_shown(tensor.name)} cannot be read: {_shown(str(error))}"
        raise OnnxFileError(path, "weights", told) from error
    return array


def _in_half(path: Path, parameters: Iterable[Array]) -> bool:
    kinds = {str(array.dtype) for array in parameters}
    if len(kinds) > 1:
        raise OnnxFileError(path, "weights", f"its parameters are {' and '.join(sorted(kinds))}; expected float32")
    return kinds == {"float16"}


def _check_nodes(
    path: Path,
    model: "onnx.ModelProto",
    expected: "list[onnx.NodeProto]",
    arrays: Mapping[str, Array],
    result: str,
    *,
    quantised: bool,
) -> None:
    """The nodes are the network's: all of them, no others, each with its attributes, and fed by the same.

    A quantised file has steps to integers and back between them, and lacks each ReLU that such a step does.
    """
    nodes = model.graph.node
    values = [*(value.name for value in model.graph.input), *arrays, *(name for node in nodes for name in node.output)]
    if len(set(values)) != len(values):
        raise OnnxFileError(path, "operators", "two of its values have one name")
    steps = [node for node in nodes if node.op_type in _QUANTISERS]
    if len(steps) > 8 * len(expected):
        raise OnnxFileError(path, "operators", f"it has {len(steps)} steps of quantisation for {len(expected)} nodes")
    for node in steps:
        if (
            (node.domain or node.overload)
            or (len(node.input), len(node.output)) != (3, 1)
            or any(name not in arrays or arrays[name].ndim > 1 for name in node.input[1:])
            or any(attribute.name != "axis" for attribute in node.attribute)
        ):
            raise OnnxFileError(path, "operators", f"{_shown(node.name)} is no step of quantisation as PortNet writes")
    names = {node.name for node in nodes}
    found, end = _wired(nodes, result, lambda node: node.op_type in _QUANTISERS)
    wanted, last = _wired(
        expected, result, lambda node: quantised and node.op_type == "Relu" and node.name not in names
    )
    if len(found) != len(nodes) - len(steps):
        raise OnnxFileError(path, "operators", "two of its nodes have one name")
    for name, how in found.items():
        if wanted.get(name) != how:
            raise OnnxFileError(
                path, "operators", f"its node {_shown(name)} is not as this version writes it; {_AGAIN}"
            )
    # Every node of the network is on the way to its output: one that is missing shows in those after it.
    if end != last:
        raise OnnxFileError(path, "operators", f"its output is not as this version writes it; {_AGAIN}")


def _wired(
    nodes: "Iterable[onnx.NodeProto]", result: str, through: "Callable[[onnx.NodeProto], bool]"
) -> tuple[dict[str, Any], Any]:
    """What each node does and where its inputs come from, by its name; and where the result does.

    Nodes that are looked `through` are taken for their first input.
    """
    origin: dict[str, Any] = {}
    found = {}
    for node in nodes:
        inputs = [origin.get(name, name.removesuffix(_QUANTISED)) for name in node.input]
        if through(node):
            origin[node.output[0]] = inputs[0]
            continue
        attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
        found[node.name] = (node.op_type, node.domain, node.overload, attributes, inputs, len(node.output))
        origin.update({name: (node.name, i) for i, name in enumerate(node.output)})
    return found, origin.get(result)


def _check_initialisers(
    path: Path,
    graph: Graph,
    arrays: Mapping[str, Array],
    constants: Mapping[str, Array],
    *,
    quantised: bool,
) -> None:
    """Parameters of the network's shapes, its other constants as they are, and in a quantised file what scales them."""
    shapes = {**graph.parameters, **{name: array.shape for name, array in constants.items()}}
    for name, array in arrays.items():
        plain = name.removesuffix(_QUANTISED) if quantised else name
        if plain not in shapes:
            if quantised:  # the nodes were checked: only steps of quantisation take it
                continue
            raise OnnxFileError(path, "weights", f"{_shown(name)} is no parameter of {graph.preset}")
        if array.shape != shapes[plain]:
            told = f"{plain} of {graph.preset} has shape {shapes[plain]}, got {array.shape}"
            raise OnnxFileError(path, "weights", told)
        if name in constants and (array.dtype != constants[name].dtype or (array != constants[name]).any()):
            raise OnnxFileError(path, "weights", f"{name} has other values than this version writes; {_AGAIN}")
    if not quantised and (missing := shapes.keys() - arrays.keys()):
        raise OnnxFileError(path, "weights", f"it lacks {', '.join(sorted(missing)[:4])}")


def _weights(path: Path, graph: Graph, arrays: Mapping[str, Array], told: str, *, half: bool) -> dict[str, Array]:
    """The parameters as float32. Those of float16 are not the ones whose digest the file tells."""
    try:
        checked = weights.check(graph, {name: arrays[name] for name in graph.parameters})
    except WeightsError as error:
        raise OnnxFileError(path, "weights", str(error)) from error
    if not half and weights.digest(checked) != told:
        raise OnnxFileError(path, "weights", "its weights do not have the SHA-256 that its metadata tell")
    return checked


def _notes(path: Path, graph: Graph, props: Mapping[str, str]) -> tuple[tuple[str, ...] | None, bool, dict[str, Any]]:
    """Names of the classes, whether pictures are taken whole, and everything that is not read elsewhere."""
    notes: dict[str, Any] = {}
    for key, value in props.items():
        if key not in (*_REQUIRED, SEAL):
            try:
                notes[key] = json.loads(value)
            except (ValueError, RecursionError):
                notes[key] = value
    names, whole = notes.pop("class_names", None), notes.pop("whole", False)
    fits = isinstance(names, list) and len(names) <= graph.classes and all(isinstance(name, str) for name in names)
    if not (names is None or fits) or not isinstance(whole, bool):
        told = f"its metadata tell no names of at most {graph.classes} classes, or not whether pictures are taken whole"
        raise OnnxFileError(path, "metadata", told)
    return tuple(names) if names else None, whole, notes


def _shown(text: str) -> str:
    """Text of a file's own, fit for a message: short, in one line, and harmless to a terminal."""
    return ascii(text if len(text) <= 120 else f"{text[:117]}...")
