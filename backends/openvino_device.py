"""OpenVINO, one backend per kind of device, over the exported graph.

`openvino` is imported inside functions only. Properties are those of https://docs.openvino.ai (Properties of devices,
precision control).
"""

import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from time import perf_counter
from typing import Any, ClassVar

import numpy as np

from portnet.contract import (
    INT8,
    Array,
    Backend,
    Ceilings,
    Device,
    LayerTime,
    Session,
    Settings,
    Unavailable,
    Unsupported,
    Weights,
)
from portnet.errors import out_of_memory
from portnet.graph import Conv, Graph
from portnet.hookspecs import hookimpl
from portnet.host import instruction_sets
from portnet.onnx_export import lower, one_matmul
from portnet_backends import timing
from portnet_backends.amx import no_amx
from portnet_backends.onnx_groups import apart
from portnet_backends.onnx_session import OnnxSession, layer_of

INSTALL = "pip install 'portnet[openvino]'"
_HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "f32"}
"""Of what is left in floating point; int8 is in the model itself."""
_CAPABILITIES = {"FP32": "float32", "BF16": "bfloat16", "FP16": "float16", "INT8": "int8"}


class OpenVino(Backend):
    """OpenVINO's own name of the device is `kind`."""

    name = "openvino"
    vendor = "any CPU"
    kind: ClassVar[str] = "CPU"
    strict = True

    def probe(self) -> Device:
        openvino = self._runtime()
        core = openvino.Core()
        if not any(d.partition(".")[0] == self.kind for d in core.available_devices):
            raise Unavailable(
                f"OpenVINO {openvino.__version__} finds no {self.kind}, only {', '.join(core.available_devices)}",
                "if the machine has one, install its driver",
            )
        able = core.get_property(self.kind, "OPTIMIZATION_CAPABILITIES")
        return Device(
            name=f"OpenVINO on {core.get_property(self.kind, 'FULL_DEVICE_NAME').strip()}",
            precisions=tuple(p for c, p in _CAPABILITIES.items() if c in able),
            versions={"openvino": openvino.__version__},
            unified=self.kind == "CPU",
        )

    def open(self, graph: Graph, weights: Weights, settings: Settings) -> Session:
        self.check(settings)
        return OpenVinoSession(self, weights, settings, graph=graph)

    def open_exported(self, content: bytes, weights: Weights, settings: Settings) -> Session:
        """A serialised model of one input and one output."""
        self.check(settings)
        return OpenVinoSession(self, weights, settings, content=content)

    def start(self, model: bytes, settings: Settings, **properties: Any) -> Any:
        """The model compiled for the device alone, in the precision asked for.

        Raises `Unsupported` where OpenVINO cannot read or compile it, or computes in another precision.
        """
        openvino = self._runtime()
        hint = _HINTS[settings.precision]
        asked = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", **properties}
        core = openvino.Core()
        try:
            compiled = core.compile_model(core.read_model(io.BytesIO(model)), self.kind, asked)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            first = str(error).strip().splitlines()[-1]
            raise Unsupported(f"OpenVINO refuses the model: {first}") from error
        effective = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if effective != hint:
            raise Unsupported(f"OpenVINO was asked for {hint} and computes in {effective}")
        return compiled

    def ceilings(self, precision: str) -> Ceilings | None:
        """The better of a matrix product and a 3x3 convolution: OpenVINO's convolutions outdo its products by a fifth.

        FLOPs of the convolution are counted as the graph counts them, padding included. It has no copy to measure, and
        of int8 nothing without a calibration.
        """
        settings = Settings(precision=precision)
        self.check(settings)
        if precision == INT8:
            return None

        def product(n: int) -> timing.Work:
            request = self.start(one_matmul(n), settings).create_infer_request()
            request.set_input_tensor(_tensor(np.random.default_rng(n + 1).random((n, n), np.float32) - np.float32(0.5)))
            return lambda: request.infer()

        found = timing.ceilings(product, (1024, 2048, 4096), None, lambda: None, budget=2.0)
        rates = tuple(self._convolution(channels, side, settings) for channels, side in ((256, 32), (384, 16)))
        best = max((found.flops or 0.0, *rates))
        return replace(found, flops=best, samples={**found.samples, "convolution": rates})

    def _convolution(self, channels: int, side: int, settings: Settings) -> float:
        """FLOP/s of a 3x3 convolution of 8 images, the best of several."""
        layer = Conv(name="conv", in_channels=channels, out_channels=channels, kernel=3, padding=1)
        graph = Graph(preset="convolution", input=(channels, side, side), layers=(layer,))
        rng = np.random.default_rng(channels)
        weights = {n: rng.random(s, np.float32) - np.float32(0.5) for n, s in graph.parameters.items()}
        request = self.start(lower(graph, weights).SerializeToString(), settings).create_infer_request()
        request.set_input_tensor(_tensor(rng.random((8, *graph.input), np.float32)))
        seconds = []
        for _ in range(10):
            began = perf_counter()
            request.infer()
            seconds.append(perf_counter() - began)
        return 2 * 8 * graph.macs / min(seconds)

    def _runtime(self) -> Any:
        try:
            import openvino
        except (ImportError, OSError) as error:
            raise Unavailable(f"OpenVINO cannot be imported ({error})", INSTALL) from error
        return openvino


class OpenVinoGpu(OpenVino):
    name = "openvino-gpu"
    vendor = "Intel"
    kind = "GPU"
    note = "not yet verified on hardware"


class OpenVinoSession(OnnxSession):
    """Values are OpenVINO's tensors in the host's memory; what a run needs on a GPU it copies itself."""

    backend: OpenVino
    request: Any = None

    def start(self, model: bytes) -> Any:
        return self.backend.start(model, self.settings)

    def rewritten(self, graph: Graph, weights: Weights) -> tuple[Graph, Weights]:
        # On AMX 0.96 of the time, elsewhere up to 1.04.
        tiles = self.backend.kind == "CPU" and not no_amx(instruction_sets(), self.settings.precision)
        return apart(graph, weights) if tiles else (graph, weights)

    def outputs(self, started: Any, images: Array) -> list[Array]:
        request = started.create_infer_request()
        request.infer([images])
        return [np.array(request.get_output_tensor(i).data) for i in range(len(started.outputs))]

    def put(self, array: Array) -> Any:
        return _tensor(array)

    def get(self, value: Any) -> Array:
        self.synchronize()
        return np.array(value.data)

    def infer(self, images: Any) -> Any:
        if self.request is None:
            self.request = self.running.create_infer_request()
        self.synchronize()
        self.request.set_input_tensor(images)
        # A result of its own: the request's is overwritten by the next run.
        shape = self.running.output(0).partial_shape
        shape[0] = images.shape[0]
        if not shape.is_static:
            self.request.infer()
            return _tensor(self.request.get_output_tensor().data)
        result = _empty(self.running.output(0).element_type, shape.to_shape())
        self.request.set_output_tensor(result)
        self.request.start_async()
        return result

    def synchronize(self) -> None:
        if self.request is not None:
            self.request.wait()

    def options(self) -> dict[str, str]:
        """What OpenVINO says is in force."""
        names = ("INFERENCE_PRECISION_HINT", "EXECUTION_DEVICES", "INFERENCE_NUM_THREADS", "NUM_STREAMS")
        known = self.running.get_property("SUPPORTED_PROPERTIES")
        return {name: str(self.running.get_property(name)) for name in names if name in known}

    def fallbacks(self, run: Callable[[], object]) -> dict[str, int] | None:
        """Convolutions and products of `run` that were computed in another precision than the one asked for.

        None is elsewhere: a model that was compiled for one device runs there, or is refused. Counted on a request
        like the session's, which stands in for it while `run` lasts; None where the device keeps no count.
        """
        usual = self.running, self.request
        self.running = self.backend.start(self.model(), self.settings, PERF_COUNT=True)
        self.request = self.running.create_infer_request()
        try:
            run()
            self.synchronize()
            ran = [(p.node_type, p.exec_type) for p in self.request.get_profiling_info() if p.real_time.total_seconds()]
        finally:
            self.running, self.request = usual
        return other_precision(ran, self.settings.precision) if ran else None

    def layer_times(self, images: Array, labels: Array | None = None) -> dict[str, LayerTime]:
        """Forward of the layers by OpenVINO's own counters: in the network, not singly.

        What it fused stands under the layer whose operator is left, and the others are missing; conversions of layout
        belong to none. Raises `Unsupported` with `labels`.
        """
        if labels is not None:
            raise Unsupported(f"{self.backend.name} does not train: time its layers without labels")
        if self.graph is None:
            return {}
        request = self.backend.start(self.model(), self.settings, PERF_COUNT=True).create_infer_request()
        runs = []
        for _ in range(9):
            request.infer([images])
            runs.append({p.node_name: p.real_time.total_seconds() for p in request.get_profiling_info()})
        typical = {name: float(np.median([run.get(name, 0.0) for run in runs[2:]])) for name in runs[-1]}
        return {name: LayerTime(forward=t) for name, t in by_layer(typical, self.graph).items()}

    def close(self) -> None:
        super().close()
        self.request = None


def other_precision(ran: Iterable[tuple[str, str]], precision: str) -> dict[str, int]:
    """By operator and kernel, how often a convolution or a product (type, kernel) ran in another precision.

    A kernel's name ends in its precision: ``brgconv_avx512_f32``, ``brgemm_avx512_I8``.
    """
    own = "i8" if precision == INT8 else _HINTS[precision]
    wrong = Counter(
        f"{operator} as {kernel}"
        for operator, kernel in ran
        if any(word in operator for word in ("Convolution", "FullyConnected", "MatMul"))
        and kernel.lower().rpartition("_")[2] not in (own, own.replace("i8", "u8"))
    )
    return dict(wrong)


def by_layer(seconds: Mapping[str, float], graph: Graph) -> dict[str, float]:
    """Seconds of each layer, from those of OpenVINO's nodes, which are named after the graph's values.

    A name may have the layer's at its beginning, and a slash or a dot after it; the last layer's is the logits'.
    """
    names = [layer.name for layer in graph.layers]
    found: dict[str, float] = {}
    for node, taken in seconds.items():
        of = layer_of(node.partition("/")[0], graph)
        if of is not None and taken:
            found[of] = found.get(of, 0.0) + taken
    return {name: found[name] for name in names if name in found}


def _tensor(array: Array) -> Any:
    from openvino import Tensor

    return Tensor(np.array(array, order="C"), shared_memory=False)


def _empty(kind: Any, shape: Any) -> Any:
    from openvino import Tensor

    return Tensor(kind, shape)


@hookimpl
def portnet_backends() -> Iterable[Backend]:
    """OpenVINO on the processor, and on Intel's GPUs."""
    return [OpenVino(), OpenVinoGpu()]
