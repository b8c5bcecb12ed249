"""Any device that PyTorch reaches. A vendor's file says how to find its device and to wait for it; the rest is here.

torch is imported inside functions, since listing backends must not load it; `torch_session` imports it outright and
is loaded by `open`.
"""

import sys
from abc import abstractmethod
from importlib.metadata import distributions
from typing import TYPE_CHECKING, ClassVar

from portnet.contract import (
    Backend,
    Ceilings,
    Device,
    LibraryLayer,
    Mode,
    Parallel,
    Session,
    Settings,
    Unavailable,
    Unsupported,
    Weights,
)
from portnet.graph import LRN, Graph, SpatialLRN

if TYPE_CHECKING:
    from types import ModuleType

    from portnet.own_model import Model

INDEX = "https://download.pytorch.org/whl"


class TorchBackend(Backend):
    """A device of torch's. Subclasses give `type`, `find` and `synchronize`."""

    modes: ClassVar[tuple[Mode, ...]] = ("infer", "train")
    formulations: ClassVar[tuple[str, ...]] = ("portable", "stock", "unfold", "direct")
    engines: ClassVar[tuple[str, ...]] = ("eager", "compile")
    layouts: ClassVar[tuple[bool, ...]] = (False, True)
    accumulates: ClassVar[bool] = True
    caches: ClassVar[tuple[str, ...]] = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    type: ClassVar[str]
    """The device's type in torch (``cuda``, also for ROCm)."""

    def __init_subclass__(cls) -> None:
        ways: tuple[Parallel, ...] = ("data", "towers")
        cls.parallel = ways if cls.collectives else ()

    @abstractmethod
    def find(self, torch: "ModuleType") -> Device:
        """The device, through torch. Raises `Unavailable`."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all work issued to the device."""

    def device_type(self) -> str:
        """What to say to ``torch.device``."""
        return self.type

    def probe(self) -> Device:
        try:
            import torch
        except (ImportError, OSError) as error:
            raise Unavailable(
                f"PyTorch cannot be imported: {error}", f"install it, for instance from {INDEX}/cpu"
            ) from error
        return self.find(torch)

    def library_layers(self, settings: Settings) -> tuple[LibraryLayer, ...]:
        return (*engine_layers(settings), *self.libraries(settings), *self.rungs(settings))

    def libraries(self, settings: Settings) -> tuple[LibraryLayer, ...]:
        """What of the vendor's software stands between the engine and the rungs below it."""
        return ()

    def rungs(self, settings: Settings) -> tuple[LibraryLayer, ...]:
        """The formulations that use less of the library than that of `settings`, from most to least."""
        titles = {
            "unfold": "convolution library: one unfold and one matrix product each",
            "direct": "convolution and matrix library of convolutions: plain loops from torch's compiler",
        }
        names = [name for name in titles if name in self.formulations]
        if settings.formulation in names:
            names = names[names.index(settings.formulation) + 1 :]
        note = "LRN, a convolution too in the portable formulation, stays with the library"
        return tuple(LibraryLayer(name=n, title=titles[n], replace={"formulation": n}, note=note) for n in names)

    def check(self, settings: Settings, device: Device | None = None) -> Device:
        device = super().check(settings, device)
        if settings.parallel and settings.engine != "eager":
            raise Unsupported(f"several processes train together in engine eager, not {settings.engine}")
        return device

    def launcher(self, processes: int, restarts: int) -> list[str]:
        if not self.parallel:
            return super().launcher(processes, restarts)
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*run, f"--nproc-per-node={processes}", f"--max-restarts={restarts}"]

    def open(self, graph: Graph, weights: Weights, settings: Settings) -> Session:
        self.check(settings)
        if (settings.precision, settings.formulation) == ("float16", "stock") and any(
            isinstance(layer, LRN | SpatialLRN) for layer in graph.layers
        ):
            raise Unsupported(
                "PyTorch's local_response_norm squares in float16, which overflows above 255; "
                "use bfloat16, or the portable formulation"
            )
        if settings.parallel:
            from portnet_backends import torch_parallel

            torch_parallel.join(self.type, self.collectives)
            kind = torch_parallel.SESSIONS[settings.parallel]
            return kind(self.device_type(), self.synchronize, graph, weights, settings)
        from portnet_backends.torch_session import TorchSession

        return TorchSession(self.device_type(), self.synchronize, graph, weights, settings)

    def open_module(self, model: "Model", weights: Weights, settings: Settings) -> Session:
        """A user's own module on the device; see `portnet.own_model`."""
        self.check(settings)
        if settings.engine == "regions":
            raise Unsupported("engine 'regions' compiles parts of PortNet's own network; a module of yours has none")
        from portnet_backends import torch_own

        return torch_own.open_module(self.device_type(), self.synchronize, model, weights, settings)

    def own_models(self) -> "ModuleType":
        """What `portnet.own_model` asks of torch on the processor: its `Torch`."""
        from portnet_backends import torch_own

        return torch_own

    def ceilings(self, precision: str) -> Ceilings:
        self.check(Settings(precision=precision))
        import torch

        from portnet_backends import torch_probe

        return torch_probe.ceilings(torch.device(self.device_type()), self.synchronize, precision)


ENGINES = {
    "compile": "compiled kernels (torch.compile)",
    "graph": "graph capture",
    "compile-graph": "compiled kernels (torch.compile), captured as one graph",
    "regions": "compiled LRN and update (torch.compile)",
}


def engine_layers(settings: Settings) -> tuple[LibraryLayer, ...]:
    """The engine, where it is not the plain one."""
    name = settings.engine
    if name not in ENGINES:
        return ()
    note = "compiled code computes LRN by a formula of its own, which goes with it" if name != "graph" else ""
    return (LibraryLayer(name=name, title=ENGINES[name], replace={"engine": "eager"}, note=note),)


def versions(torch: "ModuleType", **more: object) -> dict[str, str]:
    """The versions to record: torch's, its kernel compiler's, and those of `more` that are known."""
    more["triton"] = next((d.version for d in distributions(name="triton")), None)
    return {"torch": torch.__version__} | {k: str(v) for k, v in more.items() if v is not None}


def wrong_build(torch: "ModuleType", wanted: str, wheel: str) -> Unavailable:
    """The installed torch was built for something else."""
    return Unavailable(
        f"PyTorch {torch.__version__} was built without {wanted}",
        f"in a new environment: pip install torch --index-url {wheel}",
    )
