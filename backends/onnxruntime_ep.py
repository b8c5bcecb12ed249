"""ONNX Runtime, one backend per execution provider, all of them over the same exported graph.

`onnxruntime` is imported inside functions only: listing backends must not load a vendor's software.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from portnet.contract import (
    Array,
    Backend,
    Ceilings,
    Device,
    LayerTime,
    Session,
    Settings,
    Trace,
    Unavailable,
    Unsupported,
    Weights,
)
from portnet.graph import Conv, Graph
from portnet.hookspecs import hookimpl
from portnet.host import processor
from portnet.onnx_export import INPUT, OUTPUT, lower
from portnet_backends import timing


class OnnxRuntime(Backend):
    """What every execution provider shares; a subclass names one."""

    provider: ClassVar[str]
    """ONNX Runtime's name of the execution provider."""
    extra: ClassVar[str]
    """PortNet's extra that installs a distribution with this provider."""
    precisions: ClassVar[tuple[str, ...]] = ("float32",)
    memory: ClassVar[str] = "cpu"
    """ONNX Runtime's name of the device on which the provider keeps its values."""

    def probe(self) -> Device:
        runtime = self._runtime()
        offered = runtime.get_available_providers()
        if self.provider not in offered:
            raise Unavailable(
                f"the installed ONNX Runtime {runtime.__version__} has no {self.provider}, only {', '.join(offered)}",
                f"uninstall that distribution, then {self._install}",
            )
        return Device(
            name=self.device(),
            precisions=self.precisions,
            # onnx writes the model that is run.
            versions={"onnxruntime": runtime.__version__, "onnx": metadata.version("onnx")},
            unified=self.memory == "cpu",
        )

    def device(self) -> str:
        """What the provider computes on, in words."""
        return f"ONNX Runtime on {processor()}"

    def open(self, graph: Graph, weights: Weights, settings: Settings) -> "OnnxRuntimeSession":
        self.check(settings)
        return OnnxRuntimeSession(self, graph, weights)

    def open_exported(self, content: bytes, weights: Weights, settings: Settings) -> "ExportedSession":
        """A serialised model of one input and one output, exported from a module with these weights."""
        self.check(settings)
        return ExportedSession(self, content, weights)

    def ceilings(self, precision: str) -> Ceilings:
        """Products by a model of one MatMul whose values stay on the provider's device. It has no copy to measure."""
        self.check(Settings(precision=precision))
        from onnxruntime import OrtValue

        def product(n: int) -> timing.Work:
            session = self.start(_one_matmul(n))
            rng, binding = np.random.default_rng(n), session.io_binding()
            for name in ("a", "b"):
                value = rng.random((n, n), np.float32) - np.float32(0.5)
                binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(value, self.memory, 0))
            binding.bind_ortvalue_output("c", OrtValue.ortvalue_from_shape_and_type([n, n], np.float32, self.memory, 0))
            binding.synchronize_inputs()

            def run() -> None:
                session.run_with_iobinding(binding)
                binding.synchronize_outputs()

            return run

        return timing.ceilings(product, (1024, 2048, 4096), None, lambda: None, budget=2.0)

    def start(self, model: bytes, *, profile: Path | None = None) -> Any:
        """An ``InferenceSession`` of a serialised model on this provider, or `Unavailable`: never on another one.

        With `profile` it records every node that it runs, in a file whose name begins so.
        """
        from onnxruntime import InferenceSession, SessionOptions

        options = SessionOptions()
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        session = InferenceSession(model, options, providers=[self.provider])
        started = session.get_providers()
        if started[0] != self.provider:
            raise Unavailable(
                f"ONNX Runtime could not start {self.provider} and fell back to {started[0]}",
                "see its messages above, and check the driver and libraries that the provider needs",
            )
        return session

    def run_model(self, content: bytes, inputs: Array) -> dict[str, Array]:
        """What a serialised model of one input gives, by the outputs' names; what verifies an export."""
        self.probe()
        session = self.start(content)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, {session.get_inputs()[0].name: inputs}), strict=True))

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

    def _start(self, *, every_layer: bool = False, profile: Path | None = None) -> Any:
        model = lower(self.graph, self.parameters, every_layer=every_layer).SerializeToString()
        return self.backend.start(model, profile=profile)

    def _profiled(self, run: Callable[[Any], object]) -> list[dict[str, Any]]:
        """What ONNX Runtime recorded of the nodes that `run` ran on a session of its own."""
        with TemporaryDirectory() as folder:
            session = self._start(profile=Path(folder, "profile"))
            run(session)
            return nodes(json.loads(Path(session.end_profiling()).read_text()))

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

    def fallbacks(self, run: Callable[[], object]) -> dict[str, int]:
        """By operator, the nodes that `run` ran on another execution provider than the one asked for.

        ONNX Runtime gives what a provider cannot do to the CPU's, in silence. Counted on a session like this one,
        which stands in for it while `run` lasts.
        """

        def stand_in(profiled: Any) -> None:
            usual, self.session = self.session, profiled
            try:
                run()
            finally:
                self.session = usual

        return elsewhere(self._profiled(stand_in), self.backend.provider)

    def layer_times(self, images: Array, labels: Array | None = None) -> dict[str, LayerTime]:
        """Forward of the layers as ONNX Runtime's own profile has them: in the network, not singly.

        What it fused stands under the layer whose operator is left, and the others are missing; the conversions of
        layout that it added between layers belong to none. Raises `Unsupported` with `labels`.
        """
        if labels is not None:
            raise Unsupported(f"{self.backend.name} does not train: time its layers without labels")

        def several(profiled: Any) -> None:
            for _ in range(_WARM + 7):
                profiled.run([OUTPUT], {INPUT: images})

        return {name: LayerTime(forward=t) for name, t in by_layer(self._profiled(several), self.graph).items()}

    def synchronize(self) -> None:
        # Nothing can be outstanding: `run` on the CPU blocks until its threads have finished and the outputs are
        # filled, and `put` and `get` are copies that are done when they return.
        return

    def close(self) -> None:
        self.session = self.tracer = None
        self.parameters = {}


class ExportedSession(OnnxRuntimeSession):
    """A model that came as a file: its outputs alone are known, no layers."""

    def __init__(self, backend: OnnxRuntime, content: bytes, weights: Weights) -> None:
        self.backend, self.content = backend, content
        self.parameters = {name: np.array(value) for name, value in weights.items()}
        self.session = self._start()

    def _start(self, *, every_layer: bool = False, profile: Path | None = None) -> Any:
        return self.backend.start(self.content, profile=profile)

    def trace(self, images: Array, labels: Array | None = None, masks: Mapping[str, Array] | None = None) -> Trace:
        return Session.trace(self, images, labels, masks)

    def layer_times(self, images: Array, labels: Array | None = None) -> dict[str, LayerTime]:
        return {}

    def close(self) -> None:
        super().close()
        self.content = b""


_WARM = 2
"""Runs before those that count."""


def nodes(profile: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The nodes run, from the events of ONNX Runtime's profile: `name`, `operator`, `provider` and `seconds` of each.

    In the order of running. Events are those of https://onnxruntime.ai/docs/performance/tune-performance (Profiling
    tools): a node's is of category ``Node``, called ``<name>_kernel_time``, and lasts `dur` microseconds.
    """
    return [
        {
            "name": event["name"].removesuffix("_kernel_time"),
            "operator": event["args"]["op_name"],
            "provider": event["args"]["provider"],
            "seconds": event["dur"] / 1e6,
        }
        for event in profile
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]


def elsewhere(ran: Iterable[Mapping[str, Any]], provider: str) -> dict[str, int]:
    """How often each operator of `nodes` ran on another execution provider."""
    return dict(Counter(node["operator"] for node in ran if node["provider"] != provider))


def by_layer(ran: Iterable[Mapping[str, Any]], graph: Graph) -> dict[str, float]:
    """Seconds of each layer, from `nodes` of several runs of which the first two warm up: the median of each node.

    A layer's nodes are called after its value, or after that and a dot, and the last layer's is the logits' (see
    `portnet.onnx_export`). ONNX Runtime calls a convolution that took in its ReLU after the ReLU, and a product that
    did so ``fused`` and its own name; it marks the nodes of its blocked layout (``_nchwc``).
    """
    seconds = defaultdict(list)
    for node in ran:
        seconds[node["name"], node["operator"]].append(node["seconds"])
    names = [layer.name for layer in graph.layers]
    found: dict[str, float] = {}
    for (name, operator), taken in seconds.items():
        plain = name.removeprefix("fused ").removesuffix("_nchwc")
        of = next((n for n in names if plain == n or plain.startswith(f"{n}.")), None)
        if plain == OUTPUT:
            of = names[-1]
        if of is None:
            continue
        if operator in ("Conv", "FusedConv"):
            of = next(x.name for x in reversed(graph.layers[: names.index(of) + 1]) if isinstance(x, Conv))
        found[of] = found.get(of, 0.0) + median(taken[_WARM:] or taken)
    return {name: found[name] for name in names if name in found}


def _one_matmul(n: int) -> bytes:
    """``c = a b`` of float32 ``(n, n)`` matrices, serialised."""
    from onnx import TensorProto, helper

    a, b, c = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [n, n]) for name in "abc")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "product", [a, b], [c])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def _distributions() -> list[str]:
    """The installed distributions that supply the module ``onnxruntime``; there is one for most providers."""
    return sorted(set(metadata.packages_distributions().get("onnxruntime", ())))


@hookimpl
def portnet_backends() -> Iterable[Backend]:
    """One backend per execution provider."""
    return [Cpu()]
