"""`portnet.export_onnx`: any torch module as one ONNX file, compared with the module before the call returns."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from portnet import plugins
from portnet.contract import Array
from portnet.errors import ExportError, InputError, PortNetError, Unavailable, Unsupported
from portnet.files import write_atomically
from portnet.model import EXPORT_TOLERANCE, Export
from portnet.own_model import Frozen, FrozenExport, on_torch
from portnet.parity import channel_error

if TYPE_CHECKING:
    from torch import nn

ALLOWED = EXPORT_TOLERANCE["float32"]
"""The largest relative error, over channels (axis 1), between an output of the module and that of its file."""

Batch = tuple[Array, ...]


def export_onnx(
    module: "nn.Module",
    example: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    verify: bool = True,
) -> Export:
    """Write any torch module to one ONNX file by ``torch.onnx.export``, and compare what ONNX Runtime makes of it.

    `example`: the input of the module's ``forward``, a tensor or NumPy array, batch first; several, in its order, as a
    tuple. Their dtypes and shapes are the file's; with `dynamic_batch` the first axis, of one length in all of them, is
    open. The module may return tensors singly or nested in tuples, lists and dicts. One input is called ``images`` and
    one output ``logits``, as in PortNet's own files; several ``input_0``, ``input_1``, and ``output_0``, ....

    What is exported is a copy in evaluation mode on the processor: the module's mode, device and values stay, and
    torch's generator too. The file has no external data, passes ONNX's checker with strict shape inference before it is
    written, and is there whole or not at all; an existing one is replaced.

    Unless `verify` is false the file is run on ONNX Runtime's CPU provider and its outputs are held against the
    module's: on the example, and where the batch is open also on its last item alone and on one item more, in reverse.
    (Give at least two items that differ: of one, no mistake between items shows.) In the result `error` is the worst of
    all outputs and batches. `layers` has the error, on the example, of each submodule that is called once, gives one
    tensor, and is a value of its own in the file; what torch's exporter fuses, such as a convolution with the batch
    normalisation after it, is missing there.

    Raises `InputError` for what is no module or no example of its inputs, a module that draws at random or keeps state,
    outputs that are not finite, weights beyond 2 GiB, or a path that cannot be written; `Unavailable` without torch or
    onnxscript; `Unsupported` where torch's exporter fails, or ONNX Runtime does not run what it wrote; and
    `ExportError` where an output differs by more than float32 explains (`ALLOWED`).
    """
    frozen = on_torch().freeze(module, example)
    batches = _batches(frozen.example) if dynamic_batch else [frozen.example]
    expected, shown = [frozen.run(frozen.example)], {}
    if verify:
        _check_steady(frozen, expected[0])
        shown = frozen.layers()
        expected += [frozen.run(batch) for batch in batches[1:]]
    exported = frozen.export(len(expected[0]), dynamic=dynamic_batch)
    _check_model(exported.content)
    written = write_atomically(path, exported.content, InputError)
    runner: Any = plugins.backends().get(plugins.RUNNER)
    if not verify or runner is None:
        return Export(path=written, error=None)
    try:
        return _verify(written, runner, exported, list(zip(batches, expected, strict=True)), shown)
    except Unavailable:
        return Export(path=written, error=None)


def _batches(example: Batch) -> list[Batch]:
    """The example, its last item, and one item more than it has, in reverse; each once."""
    lengths = {array.shape[:1] for array in example}
    if len(lengths) > 1 or lengths & {(), (0,)}:
        raise InputError(
            f"inputs must be batches of one length, at least 1, on their first axis, got {_told(example)}; "
            "dynamic_batch=False takes any shapes"
        )
    n = len(example[0])
    more = tuple(array[np.arange(n, -1, -1) % n] for array in example)
    last = tuple(array[-1:] for array in example)
    return [example, more] if n == 1 else [example, last, more]


def _check_steady(frozen: Frozen, expected: list[Array]) -> None:
    """Nothing can be compared with a module that gives something else each time, or no numbers."""
    for name, value in enumerate(expected):
        if not np.isfinite(value).all():
            raise InputError(
                f"the module's output {name} holds NaN or infinity on the example, which nothing can be compared with; "
                "give an example and weights that do not, or pass verify=False"
            )
    again = frozen.run(frozen.example)
    error = max((_error(value, first) for value, first in zip(again, expected, strict=False)), default=0.0)
    if error > ALLOWED or (frozen.drew and error) or len(again) != len(expected):
        raise InputError(
            f"the module gives something else on the same inputs (by {error:.2g}), in evaluation mode too: it must "
            "draw nothing at random and keep no state, or pass verify=False"
        )


def _check_model(content: bytes) -> None:
    from onnx import checker, shape_inference

    try:
        checker.check_model(content, full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        raise Unsupported(
            f"what torch.onnx.export wrote does not pass ONNX's checker: {_line(error)}; no file is written"
        ) from error


def _verify(
    path: Path, runner: Any, exported: FrozenExport, cases: list[tuple[Batch, list[Array]]], shown: Mapping[str, Array]
) -> Export:
    content = path.read_bytes()

    def run(model: bytes, given: Batch) -> dict[str, Array]:
        try:
            return dict(runner.run_model(model, dict(zip(exported.inputs, given, strict=True))))
        except PortNetError:
            raise
        except Exception as error:  # ONNX Runtime's have no common base
            raise ExportError(
                f"{path}: {runner.name} fails on {_told(given)}, which the module takes: {type(error).__name__}: "
                f"{_line(error)}; the file is left for inspection"
            ) from error

    values = {name: value for name, value in exported.layers.items() if name in shown}
    every = run(_showing(content, values.values()), cases[0][0])
    layers = {name: _error(every[value], shown[name]) for name, value in values.items()}
    errors, told = [], []
    for given, expected in cases:
        found = run(content, given)
        for name, value in zip(exported.outputs, expected, strict=True):
            errors.append(_error(found[name], value))
            told.append(f"its output {name} on {runner.name} for {_told(given)}")
            if (found[name].shape, found[name].dtype) != (value.shape, value.dtype):
                told[-1] += f" is {_told([found[name]])}, the module's {_told([value])}: it"
    done = Export(path=path, error=max(errors), layers=layers)
    if not max(errors) <= ALLOWED:
        where = f"; of all layers {done.worst} most, by {layers[done.worst]:.2g}" if done.worst else ""
        raise ExportError(
            f"{path}: {told[errors.index(max(errors))]} differs from the module's by {max(errors):.2g}, where float32 "
            f"explains {ALLOWED:.2g}{where}; the file is left for inspection"
        )
    return done


def _showing(content: bytes, values: Iterable[str]) -> bytes:
    """The model with these values among its outputs."""
    import onnx

    model = onnx.load_model_from_string(content)
    there = {output.name for output in model.graph.output}
    # Without a type, which ONNX Runtime infers.
    model.graph.output.extend(onnx.ValueInfoProto(name=value) for value in values if value not in there)
    return bytes(model.SerializeToString())


def _error(found: Array, exact: Array) -> float:
    """The relative error of the worst channel; infinite for another shape or dtype, or where there is no number."""
    if (found.shape, found.dtype) != (exact.shape, exact.dtype):
        return float("inf")
    if not exact.size:
        return 0.0
    # What has no channels is one.
    found, exact = (a.astype(np.float64).reshape(a.shape if a.ndim > 1 else (-1, 1)) for a in (found, exact))
    error = channel_error(found, exact)
    return error if np.isfinite(error) else float("inf")


def _told(arrays: Iterable[Array]) -> str:
    return ", ".join(f"{array.dtype} {array.shape}" for array in arrays)


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
