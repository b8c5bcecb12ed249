"""ONNX Runtime, one backend per execution provider, all of them over the same exported graph.

`onnxruntime` is imported inside functions only: listing backends must not load a vendor's software.
"""

from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from portnet.contract import Array, Backend, Device, Session, Settings, Trace, Unavailable, Unsupported, Weights
from portnet.graph import Graph
from portnet.hookspecs import hookimpl
from portnet.host import processor
from portnet.onnx_export import INPUT, OUTPUT, lower


class OnnxRuntime(Backend):
    """What every execution provider shares; a subclass names one."""

    provider: ClassVar[str]
    """ONNX Runtime's name of the execution provider."""
    extra: ClassVar[str]
    """PortNet's extra that installs a distribution with this provider."""
    precisions: ClassVar[tuple[str, ...]] = ("float32",)

    def probe(self) -> Device:
        runtime = self._runtime()
        offered = runtime.get_available_providers()
        if self.provider not in offered:
            raise Unavailable(
                f"the installed ONNX Runtime {runtime.__version__} has no {self.provider}, only {', '.join(offered)}",
                f"uninstall that distribution, then {self._install}",
            )
        return Device(name=self.device(), precisions=self.precisions, versions={"onnxruntime": runtime.__version__})

    def device(self) -> str:
        """What the provider computes on, in words."""
        return f"ONNX Runtime on {processor()}"

    def open(self, graph: Graph, weights: Weights, settings: Settings) -> "OnnxRuntimeSession":
        self.check(settings)
        return OnnxRuntimeSession(self, graph, weights)

    def start(self, model: bytes) -> Any:
        """An ``InferenceSession`` of a serialised model on this provider, or `Unavailable`: never on another one."""
        from onnxruntime import InferenceSession

        session = InferenceSession(model, providers=[self.provider])
        started = session.get_providers()
        if started[0] != self.provider:
            raise Unavailable(
                f"ONNX Runtime could not start {self.provider} and fell back to {started[0]}",
                "see its messages above, and check the driver and libraries that the provider needs",
            )
        return session

    def run_file(self, path: Path, images: Array) -> Array:
        """The logits that the file at `path` gives for `images`; what verifies an export."""
        self.probe()
        logits: Array = self.start(path.read_bytes()).run([OUTPUT], {INPUT: images})[0]
        return logits

    @property
    def _install(self) -> str:
        return f"pip install 'portnet[{self.extra}]'"

    def _runtime(self) -> Any:
        installed = _distributions()
        if len(installed) > 1:
            raise Unavailable(
                f"{' and '.join(installed)} are installed together and overwrite each other's files",
                f"uninstall them all and install one: pip uninstall {' '.join(installed)}, then {self._install}",
            )
        try:
            import onnxruntime
        except (ImportError, OSError) as error:
            raise Unavailable(f"ONNX Runtime cannot be imported ({error})", self._install) from error
        if not hasattr(onnxruntime, "InferenceSession"):  # an empty folder still imports
            raise Unavailable(
                "the installation of ONNX Runtime is damaged: files are missing, as after uninstalling one of two "
                "distributions",
                f"uninstall every onnxruntime distribution, then {self._install}",
            )
        return onnxruntime


class Cpu(OnnxRuntime):
    name = "onnxruntime-cpu"
    vendor = "any CPU"
    provider = "CPUExecutionProvider"
    extra = "cpu"


class OnnxRuntimeSession(Session):
    """One exported network. Values are host arrays, since ``run`` takes and returns them."""

    def __init__(self, backend: OnnxRuntime, graph: Graph, weights: Weights) -> None:
        self.backend, self.graph = backend, graph
        # ONNX Runtime does not give initialisers back; nothing changes them either.
        self.parameters = {name: np.array(weights[name]) for name in graph.parameters}
        self.session = self._start()
        self.tracer: Any = None

    def _start(self, *, every_layer: bool = False) -> Any:
        return self.backend.start(lower(self.graph, self.parameters, every_layer=every_layer).SerializeToString())

    def put(self, array: Array) -> Array:
        return np.array(array, order="C")

    def get(self, value: Array) -> Array:
        return np.array(value)

    def infer(self, images: Array) -> Array:
        logits: Array = self.session.run([OUTPUT], {INPUT: images})[0]
        return logits

    def weights(self) -> dict[str, npt.NDArray[np.float32]]:
        return {name: value.copy() for name, value in self.parameters.items()}

    def trace(self, images: Array, labels: Array | None = None, masks: Mapping[str, Array] | None = None) -> Trace:
        """Inference laid open by a second session that keeps every layer, started at the first call."""
        if labels is not None or masks is not None:
            raise Unsupported(f"{self.backend.name} does not train: trace it without labels and masks")
        if self.tracer is None:
            self.tracer = self._start(every_layer=True)
        *layers, logits = self.tracer.run(None, {INPUT: images})
        return Trace(layers=dict(zip((s.layer.name for s in self.graph.steps), layers, strict=True)), logits=logits)

    def synchronize(self) -> None:
        # Nothing can be outstanding: `run` on the CPU blocks until its threads have finished and the outputs are
        # filled, and `put` and `get` are copies that are done when they return.
        return

    def close(self) -> None:
        self.session = self.tracer = None
        self.parameters = {}


def _distributions() -> list[str]:
    """The installed distributions that supply the module ``onnxruntime``; there is one for most providers."""
    return sorted(set(metadata.packages_distributions().get("onnxruntime", ())))


@hookimpl
def portnet_backends() -> Iterable[Backend]:
    """One backend per execution provider."""
    return [Cpu()]
