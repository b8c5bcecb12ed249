"""Inference of one ONNX model, whatever runs it. Imports no runtime."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from portnet.contract import Array, Backend, Session, Settings, Trace, Unsupported, Weights
from portnet.graph import Graph
from portnet.onnx_export import OUTPUT, lower


class OnnxSession(Session):
    """A graph with its weights, or a model that came as a file: of that the output alone is known, no layers.

    A subclass starts models, and runs the one in `running` by `put`, `infer`, `get` and `synchronize`.
    """

    def __init__(
        self,
        backend: Backend,
        weights: Weights,
        settings: Settings,
        *,
        graph: Graph | None = None,
        content: bytes = b"",
    ) -> None:
        if graph is not None and settings.precision == "int8":
            raise Unsupported(
                "int8 runs files that were calibrated on pictures: portnet.quantize makes one, open_onnx runs it"
            )
        self.backend, self.settings, self.graph, self.content = backend, settings, graph, content
        # No runtime gives initialisers back; nothing changes them either.
        self.parameters = {name: np.array(value) for name, value in weights.items()}
        model = self.model()
        self.size = len(model)
        self.running: Any = self.start(model)
        self.tracer: Any = None

    @abstractmethod
    def start(self, model: bytes) -> Any:
        """The runtime's own object for a serialised model."""

    @abstractmethod
    def outputs(self, started: Any, images: Array) -> list[Array]:
        """Everything that a started model gives for host images, in order."""

    def half(self) -> bool:
        """Whether the graph is written in float16, and not in float32 that the runtime narrows."""
        return False

    def model(self, *, every_layer: bool = False) -> bytes:
        """What is run, serialised."""
        if self.graph is None:
            return self.content
        graph, weights = (self.graph, self.parameters) if every_layer else self.rewritten(self.graph, self.parameters)
        return lower(graph, weights, every_layer=every_layer, half=self.half()).SerializeToString()

    def rewritten(self, graph: Graph, weights: Weights) -> tuple[Graph, Weights]:
        """Another form of the same network that the runtime is faster on."""
        return graph, weights

    def file_size(self) -> int:
        return self.size

    def weights(self) -> dict[str, npt.NDArray[np.float32]]:
        return {name: value.copy() for name, value in self.parameters.items()}

    def trace(self, images: Array, labels: Array | None = None, masks: Mapping[str, Array] | None = None) -> Trace:
        """Inference laid open by a second model that keeps every layer, started at the first call."""
        if labels is not None or masks is not None:
            raise Unsupported(f"{self.backend.name} does not train: trace it without labels and masks")
        if self.graph is None:
            return super().trace(images)
        if self.tracer is None:
            self.tracer = self.start(self.model(every_layer=True))
        *layers, logits = (value.astype(np.float32) for value in self.outputs(self.tracer, images))
        return Trace(layers=dict(zip((s.layer.name for s in self.graph.steps), layers, strict=True)), logits=logits)

    def close(self) -> None:
        self.running = self.tracer = None
        self.parameters, self.content = {}, b""


def layer_of(value: str, graph: Graph) -> str | None:
    """The layer whose node gives that value: named after it, or after it and a dot; the last one's is the logits."""
    if value == OUTPUT:
        return graph.layers[-1].name
    return next((x.name for x in graph.layers if value == x.name or value.startswith(f"{x.name}.")), None)
