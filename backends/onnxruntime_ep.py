"""ONNX Runtime, one backend per execution provider, all of them over the same exported graph.

`onnxruntime` is imported inside functions only: listing backends must not load a vendor's software. Options and names
are those of https://onnxruntime.ai/docs/execution-providers.
"""

import importlib.util
import json
import os
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module, metadata
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from portnet.contract import (
    INT8,
    Array,
    Backend,
    Ceilings,
    Device,
    LayerTime,
    Settings,
    Unavailable,
    Unsupported,
    Weights,
)
from portnet.errors import out_of_memory
from portnet.graph import Conv, Graph
from portnet.hookspecs import hookimpl
from portnet.host import processor
from portnet.onnx_export import one_matmul
from portnet_backends import timing
from portnet_backends.onnx_session import OnnxSession, layer_of
from portnet_backends.onnxruntime_quantize import quantise

NOT_VERIFIED = "not yet verified on hardware"


@dataclass(frozen=True, kw_only=True)
class Provider:
    """An execution provider. `name` is the backend's after ``onnxruntime-``, `title` ONNX Runtime's.

    `install`: what brings it. `precisions` maps each that it has to the options that ask for it. `half`: whether a
    float16 network is handed over as such, and not a float32 one that the provider narrows. `memory`: ONNX Runtime's
    name of where its values live; `unified` where that is the host's in any case. `plugin`: the module of the
    distribution that adds it to a plain ONNX Runtime, for a device of that `kind`.
    """

    name: str
    title: str
    vendor: str
    install: str
    precisions: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: {"float32": {}})
    half: bool = False
    memory: str = "cpu"
    unified: bool = False
    plugin: str = ""
    kind: str = "CPU"
    note: str = NOT_VERIFIED


def _extra(name: str) -> str:
    return f"pip install 'portnet[{name}]'"


def _tensorrt() -> dict[str, dict[str, str]]:
    """TensorRT takes TF32 for float32 unless the process forbids it; the provider has no option for that."""
    wide = "float32" if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0" else "tf32"
    return {
        wide: {"trt_fp16_enable": "0", "trt_bf16_enable": "0"},
        "float16": {"trt_fp16_enable": "1", "trt_bf16_enable": "0"},
        "bfloat16": {"trt_fp16_enable": "0", "trt_bf16_enable": "1"},
    }


CPU = Provider(
    name="cpu",
    title="CPU",
    vendor="any CPU",
    install=_extra("cpu"),
    precisions={"float32": {}, "int8": {}},
    unified=True,
    note="",
)
PROVIDERS = (
    CPU,
    Provider(
        name="cuda",
        title="CUDA",
        vendor="NVIDIA",
        install=_extra("cuda"),
        precisions={"float32": {"use_tf32": "0"}, "tf32": {"use_tf32": "1"}, "float16": {"use_tf32": "0"}},
        half=True,
        memory="cuda",
    ),
    Provider(
        name="tensorrt",
        title="Tensorrt",
        vendor="NVIDIA",
        install=f"{_extra('cuda')}, and TensorRT's libraries: pip install tensorrt",
        precisions=_tensorrt(),
        memory="cuda",
    ),
    Provider(
        name="migraphx",
        title="MIGraphX",
        vendor="AMD",
        install=_extra("migraphx"),
        memory="cuda",  # which is what a build for AMD calls its own
        precisions={
            "float32": {"migraphx_fp16_enable": "0", "migraphx_bf16_enable": "0"},
            "float16": {"migraphx_fp16_enable": "1", "migraphx_bf16_enable": "0"},
            "bfloat16": {"migraphx_fp16_enable": "0", "migraphx_bf16_enable": "1"},
        },
    ),
    Provider(
        name="coreml",
        title="CoreML",
        vendor="Apple",
        install=f"on macOS, {_extra('cpu')}",
        unified=True,
        precisions={p: {"ModelFormat": "MLProgram", "MLComputeUnits": "ALL"} for p in ("float32", "float16")},
        half=True,
    ),
    Provider(
        name="openvino",
        title="OpenVINO",
        vendor="any CPU",
        install=_extra("openvino-ep"),
        precisions={p: {"device_type": "CPU", "precision": "FP32"} for p in ("float32", "int8")},
        unified=True,
        plugin="onnxruntime_ep_openvino",
        note="on the CPU",
    ),
    Provider(
        name="directml",
        title="Dml",
        vendor="any GPU on Windows",
        install=f"on Windows, {_extra('directml')}",
        memory="dml",
        precisions={"float32": {}, "float16": {}},
        half=True,
    ),
    Provider(
        name="qnn",
        title="QNN",
        vendor="Qualcomm",
        install=f"on Windows or Linux for ARM64, {_extra('qnn')}",
        precisions={
            "float16": {"backend_type": "htp", "enable_htp_fp16_precision": "1"},
            "int8": {"backend_type": "htp"},
        },
        unified=True,
        plugin="onnxruntime_qnn",
        kind="NPU",
    ),
    Provider(
        name="xnnpack",
        title="Xnnpack",
        vendor="any CPU",
        unified=True,
        install="build ONNX Runtime with --use_xnnpack; no distribution for Python has this provider",
    ),
    Provider(
        name="webgpu",
        title="WebGpu",
        vendor="any GPU",
        install=f"{_extra('webgpu')}, and on Linux the Vulkan loader (libvulkan1) with a driver",
        precisions={"float32": {}, "float16": {}},
        half=True,
        memory="webgpu",
        plugin="onnxruntime_ep_webgpu",
        kind="GPU",
    ),
)


class OnnxRuntime(Backend):
    """One execution provider."""

    strict = True

    def __init__(self, provider: Provider = CPU) -> None:
        self.about = provider
        self.name, self.vendor, self.note = f"onnxruntime-{provider.name}", provider.vendor, provider.note
        self.provider = f"{provider.title}ExecutionProvider"
        self._refusal = ""

    def probe(self) -> Device:
        """Believes no list: a provider is here if a product starts on it, and is seen to run there."""
        runtime = self._runtime()
        offered = [*runtime.get_available_providers(), *(d.ep_name for d in self._plugged())]
        if self.provider not in offered and self._plugin:
            raise Unavailable(
                f"the plug-in {self._plugin} is installed, and finds no {self.about.kind} that it can use"
                f"{self._refusal and f' ({self._refusal})'}",
                self.about.install,
            )
        if self.provider not in offered:
            raise Unavailable(
                f"the installed ONNX Runtime {runtime.__version__} has no {self.provider}, only "
                f"{', '.join(p for p in dict.fromkeys(offered) if p != 'AzureExecutionProvider')}",
                self.about.install if self.about.plugin else f"in a new environment, {self.about.install}",
            )
        n = 8
        ones = np.ones((n, n), np.float32)
        ran = profiled(partial(self.start, one_matmul(n)), lambda session: session.run(None, {"a": ones}))
        if not any(node["provider"] == self.provider for node in ran):
            places = ", ".join({node["provider"] for node in ran}) or "none that its profile names"
            raise Unavailable(
                f"{self.provider} starts, but a product asked of it ran on {places}", "check the device's driver"
            )
        through = "" if self.about is CPU else f"'s {self.about.title}"
        gpu = _nvidia() if self.about.vendor == "NVIDIA" else {}
        place = f"on {processor()}" if self.about.unified else f"on a device without a name, beside {processor()}"
        return Device(
            name=gpu.get("name") or f"ONNX Runtime{through} {place}",
            precisions=tuple(self.about.precisions),
            memory=gpu.get("memory"),
            # onnx writes the model that is run.
            versions={
                "onnxruntime": runtime.__version__,
                "onnx": metadata.version("onnx"),
                **({"driver": gpu["driver"]} if gpu else {}),
                **({self._plugin: _version(self._plugin)} if self._plugin else {}),
            },
            unified=self.about.unified,
        )

    def open(self, graph: Graph, weights: Weights, settings: Settings) -> "OnnxRuntimeSession":
        self.check(settings)
        return OnnxRuntimeSession(self, weights, settings, graph=graph)

    def open_exported(self, content: bytes, weights: Weights, settings: Settings) -> "OnnxRuntimeSession":
        """A serialised model of one input and one output, exported from a module with these weights."""
        self.check(settings)
        return OnnxRuntimeSession(self, weights, settings, content=content)

    def ceilings(self, precision: str) -> Ceilings | None:
        """Products by a model of one MatMul whose values stay on the provider's device.

        It has no copy to measure, and of int8 nothing without a calibration.
        """
        settings = Settings(precision=precision)
        self.check(settings)
        if precision == INT8:
            return None
        narrow = self.about.half and precision == "float16"
        dtype: type = np.float16 if narrow else np.float32

        def product(n: int) -> timing.Work:
            session = self.start(one_matmul(n, dtype), settings)
            binding = session.io_binding()
            value = np.random.default_rng(n + 1).random((n, n), np.float32) - np.float32(0.5)
            binding.bind_ortvalue_input("a", self.put(value.astype(dtype)))
            binding.bind_output("c", self.memory)
            binding.synchronize_inputs()

            def run() -> None:
                session.run_with_iobinding(binding)
                binding.synchronize_outputs()

            return run

        return timing.ceilings(product, (1024, 2048, 4096), None, lambda: None, budget=2.0)

    def put(self, array: Array) -> Any:
        """A copy of a host array where the provider keeps its values."""
        from onnxruntime import OrtValue

        # On the host an OrtValue is a view of the array that it is made from.
        return OrtValue.ortvalue_from_numpy(np.array(array, order="C"), self.memory, 0)

    @cached_property
    def memory(self) -> str:
        """Where values are bound: the provider's own memory, or the host's where this build reaches no other."""
        from onnxruntime import OrtValue

        try:
            OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), self.about.memory, 0)
        except Exception:  # its errors have no common base
            return "cpu"
        return self.about.memory

    def start(self, model: bytes, settings: Settings | None = None, *, profile: Path | None = None) -> Any:
        """An ``InferenceSession`` of a serialised model on this provider, and never on another one.

        With `profile` it records every node that it runs, in a file whose name begins so. Raises `Unavailable` where
        the provider does not start, and `Unsupported` where it cannot run the model, or not all of it and
        `Settings.strict` was asked for.
        """
        from onnxruntime import InferenceSession, SessionOptions

        settings = settings or Settings(precision=next(iter(self.about.precisions)))
        options, asked = SessionOptions(), dict(self.about.precisions.get(settings.precision, {}))
        options.log_severity_level = 4 if settings.strict else 3  # what is fatal, or errors too
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        if settings.strict and self.provider != "CPUExecutionProvider":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if self.about.name == "directml":  # as its page demands
            options.enable_mem_pattern = False
        devices = self._plugged()
        how: dict[str, Any] = {"providers": [(self.provider, asked)]}
        if devices:
            options.add_provider_for_devices(devices[:1], asked)
            how = {}
        try:
            # Its own fallback is to the CPU, with a line on standard output.
            session = InferenceSession(model, options, enable_fallback=0, **how)
        except Exception as error:  # its errors have no common base
            if out_of_memory(error):
                raise
            first = str(error).strip().partition("\n")[0]
            if "fallback to CPU EP has been explicitly disabled" in first:
                raise Unsupported(
                    f"{self.provider} does not run all of it, and what it leaves to the CPU was not to be: measure "
                    "without strict to see which operators those are"
                ) from error
            kind = type(error).__name__
            # The CPU's provider needs nothing that could be missing: what it does not start is the model's fault.
            if self.about is CPU or kind in ("NotImplemented", "InvalidGraph", "InvalidProtobuf", "InvalidArgument"):
                raise Unsupported(f"ONNX Runtime refuses the model: {kind}: {first}") from error
            raise Unavailable(
                f"ONNX Runtime could not start {self.provider}: {kind}: {first}",
                "check the driver and the libraries that the provider needs",
            ) from error
        started = session.get_providers()
        if started[0] != self.provider:
            raise Unavailable(
                f"ONNX Runtime could not start {self.provider} and fell back to {started[0]}",
                "see its messages above, and check the driver and libraries that the provider needs",
            )
        return session

    def run_model(self, content: bytes, inputs: Array | Mapping[str, Array]) -> dict[str, Array]:
        """What a serialised model gives, by the outputs' names; what verifies an export.

        `inputs`: its only one, or several by their names.
        """
        self.probe()
        session = self.start(content)
        names = [output.name for output in session.get_outputs()]
        given = inputs if isinstance(inputs, Mapping) else {session.get_inputs()[0].name: inputs}
        return dict(zip(names, session.run(names, given), strict=True))

    def quantise(self, content: bytes, batches: Iterable[Array], *, reduce_range: bool = False) -> Any:
        """A serialised float32 model as an ``onnx.ModelProto`` of 8-bit integers, calibrated on batches of its input.

        `reduce_range`: filters of 7 bits, for processors with AVX2 or AVX-512 but without VNNI, whose 16-bit sums
        saturate otherwise (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
        """
        self._runtime()
        return quantise(content, batches, reduce_range=reduce_range)

    @property
    def _plugin(self) -> str:
        """The module of the provider's plug-in where one is installed."""
        name = self.about.plugin
        return name if name and importlib.util.find_spec(name) is not None else ""

    def _plugged(self) -> list[Any]:
        """The devices of a provider that came as a plug-in; none where it is part of the runtime."""
        if not self._plugin:
            return []
        import onnxruntime

        try:
            library = import_module(self.about.plugin).get_library_path()
            onnxruntime.register_execution_provider_library(self.about.plugin, library)
        except Exception as error:  # its errors have no common base; a second time in a process is one, and harmless
            if "already" not in str(error):
                self._refusal = str(error).strip().partition("\n")[0]
        known = (d for d in onnxruntime.get_ep_devices() if d.ep_name == self.provider)
        return [d for d in known if d.device.type.name == self.about.kind]

    def _runtime(self) -> Any:
        installed = _distributions()
        if len(installed) > 1:
            raise Unavailable(
                f"{' and '.join(installed)} are installed together and overwrite each other's files",
                f"uninstall them all and install one: pip uninstall {' '.join(installed)}, then {self.about.install}",
            )
        try:
            import onnxruntime
        except (ImportError, OSError) as error:
            raise Unavailable(f"ONNX Runtime cannot be imported ({error})", self.about.install) from error
        if not hasattr(onnxruntime, "InferenceSession"):  # an empty folder still imports
            raise Unavailable(
                "the installation of ONNX Runtime is damaged: files are missing, as after uninstalling one of two "
                "distributions",
                f"uninstall every onnxruntime distribution, then {self.about.install}",
            )
        return onnxruntime


class OnnxRuntimeSession(OnnxSession):
    """Values are ``OrtValue``s, bound to a run and left where the provider keeps its own."""

    backend: OnnxRuntime
    binding: Any = None

    def half(self) -> bool:
        return self.backend.about.half and self.settings.precision == "float16"

    def start(self, model: bytes, *, profile: Path | None = None) -> Any:
        return self.backend.start(model, self.settings, profile=profile)

    def outputs(self, started: Any, images: Array) -> list[Array]:
        found: list[Array] = started.run(None, {started.get_inputs()[0].name: images})
        return found

    def put(self, array: Array) -> Any:
        return self.backend.put(array)

    def get(self, value: Any) -> Array:
        return np.array(value.numpy())

    def infer(self, images: Any) -> Any:
        self.binding = self.running.io_binding()
        self.binding.bind_ortvalue_input(self.running.get_inputs()[0].name, images)
        self.binding.bind_output(self.running.get_outputs()[0].name, self.backend.memory)
        self.running.run_with_iobinding(self.binding)
        return self.binding.get_outputs()[0]

    def options(self) -> dict[str, str]:
        """What the provider says is in force, and where values are bound."""
        told = self.running.get_provider_options().get(self.backend.provider, {})
        return {**told, "memory": self.backend.memory}

    def fallbacks(self, run: Callable[[], object]) -> dict[str, int] | None:
        """By operator, the nodes that `run` ran on another execution provider than the one asked for.

        ONNX Runtime gives what a provider cannot do to the CPU's, in silence. Counted on a session like this one,
        which stands in for it while `run` lasts. In int8 products and convolutions count that ran in floating point;
        None where a provider compiles so much into one node that this cannot be told.
        """

        def stand_in(profiled: Any) -> None:
            usual, self.running = self.running, profiled
            try:
                run()
            finally:
                self.running = usual

        ran = profiled(partial(self.start, self.model()), stand_in)
        away = elsewhere(ran, self.backend.provider)
        if self.settings.precision != INT8:
            return away
        wide = Counter(f"{node['operator']} in floating point" for node in ran if node["operator"] in _FLOATING)
        if not (away or wide or any(node["operator"] in _INTEGER for node in ran)):
            return None
        return away | dict(wide)

    def layer_times(self, images: Array, labels: Array | None = None) -> dict[str, LayerTime]:
        """Forward of the layers as ONNX Runtime's own profile has them: in the network, not singly.

        What it fused stands under the layer whose operator is left, and the others are missing; the conversions of
        layout that it added between layers belong to none. Raises `Unsupported` with `labels`.
        """
        if labels is not None:
            raise Unsupported(f"{self.backend.name} does not train: time its layers without labels")

        if self.graph is None:
            return {}

        def several(timed: Any) -> None:
            for _ in range(_WARM + 7):
                self.outputs(timed, images)

        seen = by_layer(profiled(partial(self.start, self.model()), several), self.graph)
        return {name: LayerTime(forward=t) for name, t in seen.items()}

    def synchronize(self) -> None:
        # A run returns when its outputs are filled (``disable_synchronize_execution_providers`` is not set); what is
        # left is the provider's own stream.
        if self.binding is not None:
            self.binding.synchronize_outputs()

    def close(self) -> None:
        super().close()
        self.binding = None


_FLOATING = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
_INTEGER = ("QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger")
"""Convolutions and products in floating point, and in integers."""
_WARM = 2
"""Runs before those that count."""


def profiled(start: Callable[..., Any], run: Callable[[Any], object]) -> list[dict[str, Any]]:
    """What ONNX Runtime recorded of the nodes that `run` ran on a session of its own, which `start` makes."""
    with TemporaryDirectory() as folder:
        session = start(profile=Path(folder, "profile"))
        run(session)
        return nodes(json.loads(Path(session.end_profiling()).read_text()))


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
        of = layer_of(name.removeprefix("fused ").removesuffix("_nchwc"), graph)
        if of is None:
            continue
        if operator in ("Conv", "FusedConv"):
            of = next(x.name for x in reversed(graph.layers[: names.index(of) + 1]) if isinstance(x, Conv))
        found[of] = found.get(of, 0.0) + median(taken[_WARM:] or taken)
    return {name: found[name] for name in names if name in found}


def _distributions() -> list[str]:
    """The installed distributions that supply the module ``onnxruntime``; there is one for most providers."""
    return sorted(set(metadata.packages_distributions().get("onnxruntime", ())))


def _version(module: str) -> str:
    """Of the distribution that a module came from."""
    names = metadata.packages_distributions().get(module, ())
    return metadata.version(names[0]) if names else ""


def _nvidia() -> dict[str, Any]:
    """Name, memory in bytes and driver of the machine's GPUs; empty where they differ, or the driver does not tell.

    Which of several unlike ones CUDA calls the first depends on an order of its own.
    """
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        (line,) = set(told.strip().splitlines())
        name, mebibytes, driver = (part.strip() for part in line.split(","))
        return {"name": name, "memory": int(mebibytes) * 2**20, "driver": driver}
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


@hookimpl
def portnet_backends() -> Iterable[Backend]:
    """One backend per execution provider."""
    return [OnnxRuntime(provider) for provider in PROVIDERS]
