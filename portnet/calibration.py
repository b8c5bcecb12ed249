"""Networks in 8-bit integers: calibrated on pictures, and opened on backends that run ONNX models."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from portnet import images, onnx_export, plugins
from portnet.contract import INT8, Array, Backend, Session, Settings, Unavailable, Unsupported, Weights
from portnet.graph import Graph
from portnet.images import DataSet
from portnet.weights import digest

PICTURES = 64
"""Of the training split, on whose values the ranges are set."""
_HELD = 4
"""Models that a process keeps: as many as one measurement opens (timed, two gates, answers)."""


@runtime_checkable
class TakesExports(Protocol):
    """A backend that runs inference of a serialised ONNX model."""

    def open_exported(self, content: bytes, weights: Weights, settings: Settings) -> Session: ...


class Quantiser(Protocol):
    """ONNX Runtime's backend, as far as it is needed here."""

    def quantise(self, content: bytes, batches: Iterable[Array], *, reduce_range: bool = False) -> Any: ...


def quantiser() -> Quantiser:
    """ONNX Runtime's static quantisation. Raises `Unavailable` where it is not installed."""
    backend = plugins.backends().get(plugins.RUNNER)
    if backend is None:
        raise Unavailable(
            "int8 is made by ONNX Runtime's tools, whose backend is missing", "pip install 'portnet[cpu]'"
        )
    plugins.probe(backend)
    return cast("Quantiser", backend)


def pictures(data: DataSet, graph: Graph) -> Array:
    """Pictures of a training split as the network sees them at inference: float32 ``(n, *graph.input)``."""
    return next(images.evaluation_batches(data.some(PICTURES), graph, batch=PICTURES)).images


def calibrated(graph: Graph, weights: Weights, given: Array) -> bytes:
    """The network as a serialised ONNX model of 8-bit integers, its ranges set on those images.

    Filters by output channel, activations by tensor; LRN stays in float32. Made once a process.
    """
    key = (repr(graph), digest(weights), digest({"images": given}))
    if key not in _made:
        content = onnx_export.lower(graph, weights).SerializeToString()
        batches = (given[i : i + 16] for i in range(0, len(given), 16))
        while len(_made) >= _HELD:
            del _made[next(iter(_made))]
        _made[key] = bytes(quantiser().quantise(content, batches).SerializeToString())
    return _made[key]


_made: dict[tuple[str, str, str], bytes] = {}


def opened(backend: Backend, graph: Graph, weights: Weights, settings: Settings, given: Callable[[], Array]) -> Session:
    """The network on a backend; in int8, calibrated on the images that `given` gives.

    Raises what `Backend.open` raises, and `Unsupported` for int8 where the backend runs no ONNX models.
    """
    if settings.precision != INT8:
        return backend.open(graph, weights, settings)
    backend.check(settings)
    if not isinstance(backend, TakesExports):
        raise Unsupported(f"{backend.name} runs no ONNX models, which int8 is in")
    return backend.open_exported(calibrated(graph, weights, np.ascontiguousarray(given())), weights, settings)
