"""Weights: seeded initial values, files, and torchvision's names.

A set of weights is a dict of arrays named as the graph names them (``conv1.weight``), in torch's shapes. Files are
safetensors with the preset and its options in the metadata; nothing is ever unpickled.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from portnet import alexnet, philox
from portnet.errors import PortNetError, WeightsError
from portnet.files import write_atomically
from portnet.graph import Constant, Conv, Graph, Init, Linear, Normal, Shape

Arrays = dict[str, npt.NDArray[np.float32]]

_TORCHVISION = {
    "conv1": "features.0",
    "conv2": "features.3",
    "conv3": "features.6",
    "conv4": "features.8",
    "conv5": "features.10",
    "fc6": "classifier.1",
    "fc7": "classifier.4",
    "fc8": "classifier.6",
}
_CHUNK = 1 << 16  # words at a time, so that the rounds stay in cache


def initial(graph: Graph, seed: int = 0) -> Arrays:
    """The graph's initial weights: float32, drawn in float64 and rounded once, the same bits on every machine."""
    return {
        name: draw(init, shape, seed=seed, stream=philox.Stream.WEIGHTS, index=i)
        for i, (name, shape, init) in enumerate(_inits(graph))
    }


def parity(graph: Graph, seed: int = 0) -> Arrays:
    """Weights at which mistakes show: He-scaled, the last product times 0.01, biases N(0, 0.1).

    At the paper's 0.01, LRN is nearly inert and over which channels it runs can hardly be seen; at zero biases their
    decay cannot.
    """
    last = next((s.layer.name for s in reversed(graph.steps) if s.parameter_count), "")
    out = {}
    for i, (layer, (name, shape)) in enumerate(zip(_owners(graph), graph.parameters.items(), strict=True)):
        std = 0.1
        if name.endswith(".weight"):
            std = sqrt(2 / layer.fan_in) * (0.01 if layer.name == last and isinstance(layer, Linear) else 1)
        out[name] = draw(Normal(std=std), shape, seed=seed, stream=philox.Stream.PARITY, index=i)
    return out


def perturbed(weights: Mapping[str, npt.NDArray[np.float32]], run: int) -> Arrays:
    """Every weight moved to the next float32 above or below it, by a fair bit each."""
    out = {}
    for i, (name, value) in enumerate(weights.items()):
        up = philox.bits(run, philox.Stream.PERTURB, [i], 0, value.size).reshape(value.shape)
        towards = np.where(up, np.float32(np.inf), np.float32(-np.inf))
        out[name] = np.nextafter(value, towards)
    return out


def draw(init: Init, shape: Shape, *, seed: int, stream: int, index: int) -> npt.NDArray[np.float32]:
    """Float32 values of that distribution; word n of the stream's counter `index` gives element n."""
    if isinstance(init, Constant):
        return np.full(shape, init.value, np.float32)
    out = np.empty(shape, np.float32)
    flat = out.reshape(-1)

    def fill(start: int) -> None:
        part = flat[start : start + _CHUNK]
        drawn = philox.words(seed, stream, index, 0, part.size, first_block=start // 4)[0]
        if isinstance(init, Normal):
            part[:] = philox.normal(drawn) * init.std
        else:
            part[:] = (2 * philox.uniform(drawn) - 1) * init.bound

    # NumPy lets other threads run meanwhile. Every element depends on its own counter alone, so any order will do.
    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(0, flat.size, _CHUNK)))
    return out


def digest(weights: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 of names, shapes and float32 values, in the names' order."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name], "<f4")
        sha.update(f"{name}{array.shape}".encode())
        sha.update(array.data)
    return sha.hexdigest()


def check(graph: Graph, weights: Mapping[str, npt.ArrayLike]) -> Arrays:
    """The weights as float32, in the graph's order. Raises `WeightsError` unless names, shapes and values fit."""
    missing, extra = graph.parameters.keys() - weights.keys(), weights.keys() - graph.parameters.keys()
    if missing or extra:
        raise WeightsError(
            f"these are not weights of {graph.preset}: "
            + "; ".join(
                f"{word} {', '.join(sorted(names)[:4])}{', ...' if len(names) > 4 else ''}"
                for word, names in (("missing", missing), ("unexpected", extra))
                if names
            )
        )
    out = {}
    for name, shape in graph.parameters.items():
        array = np.asarray(weights[name])
        if array.shape != shape:
            raise WeightsError(f"{name} of {graph.preset} has shape {shape}, got {array.shape}")
        if array.dtype.kind != "f":
            raise WeightsError(f"{name} must hold floating-point numbers, got {array.dtype}")
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused below
            out[name] = np.asarray(array, np.float32)
        if not np.isfinite(out[name]).all():
            raise WeightsError(f"{name} holds NaN or infinity")
    return out


def save(
    path: str | os.PathLike[str],
    graph: Graph,
    weights: Mapping[str, npt.NDArray[Any]],
    notes: Mapping[str, Any] | None = None,
) -> Path:
    """Write one safetensors file, float32, whole or not at all; returns its path. Raises `WeightsError`.

    `notes` is anything JSON can hold, given back by `read_notes`.
    """
    from safetensors.numpy import save as to_bytes

    metadata = {
        "format": "portnet.weights/1",
        "preset": graph.preset,
        "options": json.dumps(dict(graph.options)),
        "notes": json.dumps(dict(notes or {})),
    }
    arrays = {name: np.ascontiguousarray(value) for name, value in check(graph, weights).items()}
    return write_atomically(path, to_bytes(arrays, metadata), WeightsError)


def load(path: str | os.PathLike[str]) -> tuple[Graph, Arrays]:
    """The network and the weights that a file holds: one of `save`'s, or torchvision's state dict as safetensors.

    Raises `WeightsError` where the file is missing, truncated, no safetensors file, or of no known network.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no weights file at {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} is damaged or no safetensors file ({error}); expected a file written by AlexNet.save"
        ) from None
    if metadata.get("format") == "portnet.weights/1":
        try:
            graph = alexnet.graph(metadata["preset"], **json.loads(metadata["options"]))
        except (PortNetError, KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{path} names a network that this version cannot build: {error}") from None
        return graph, _checked(path, graph, arrays)
    if set(arrays) == set(_torchvision_names()):
        graph = alexnet.graph("torchvision", classes=max(arrays["classifier.6.bias"].size, 1))
        return graph, _checked(path, graph, arrays, from_torchvision)
    raise WeightsError(f"{path} holds neither PortNet's weights nor torchvision's AlexNet: it has {sorted(arrays)[:3]}")


def read_notes(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The notes saved with the weights in a file that `load` has read; empty for another program's file."""
    from safetensors import safe_open

    with safe_open(Path(path), framework="numpy") as file:
        notes: dict[str, Any] = json.loads((file.metadata() or {}).get("notes", "{}"))
    return notes


def load_for(graph: Graph, path: str | os.PathLike[str]) -> Arrays:
    """The weights in a file, which must be of this very preset. Raises `WeightsError`."""
    held, arrays = load(path)
    if held.preset != graph.preset:
        raise WeightsError(
            f"{path} holds weights of preset {held.preset}, not {graph.preset}; "
            f"ask for preset={held.preset!r}, or use AlexNet.load"
        )
    return _checked(Path(path), graph, arrays)


def to_torchvision(weights: Mapping[str, npt.NDArray[np.float32]]) -> Arrays:
    """Weights of preset ``torchvision`` under torchvision's names (``features.0.weight``)."""
    return {theirs: weights[ours] for theirs, ours in _torchvision_names().items()}


def from_torchvision(state: Mapping[str, npt.ArrayLike]) -> Arrays:
    """A state dict under torchvision's names (NumPy arrays or CPU tensors) under PortNet's. Raises `WeightsError`."""
    names = _torchvision_names()
    if set(state) != set(names):
        odd = sorted(set(state) ^ set(names))
        raise WeightsError(f"not a state dict of torchvision's AlexNet: missing or unexpected {', '.join(odd[:4])}")
    return {ours: np.asarray(state[theirs], np.float32) for theirs, ours in names.items()}


def _checked(path: Path, graph: Graph, arrays: Arrays, convert: Callable[[Arrays], Arrays] | None = None) -> Arrays:
    try:
        return check(graph, convert(arrays) if convert else arrays)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None


def _owners(graph: Graph) -> list[Conv | Linear]:
    return [layer for layer in graph.layers if isinstance(layer, Conv | Linear) for _ in layer.parameters()]


def _inits(graph: Graph) -> list[tuple[str, Shape, Init]]:
    return [
        (name, shape, layer.weight_init if name.endswith(".weight") else layer.bias_init)
        for layer, (name, shape) in zip(_owners(graph), graph.parameters.items(), strict=True)
    ]


def _torchvision_names() -> dict[str, str]:
    return {f"{theirs}.{k}": f"{ours}.{k}" for ours, theirs in _TORCHVISION.items() for k in ("weight", "bias")}
