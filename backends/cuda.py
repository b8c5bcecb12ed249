"""NVIDIA GPUs, through PyTorch built for CUDA."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from portnet.contract import Backend, Device, LibraryLayer, Settings, Unavailable
from portnet.hookspecs import hookimpl
from portnet_backends.torch_device import INDEX, TorchBackend, versions, wrong_build

if TYPE_CHECKING:
    from types import ModuleType


class Cuda(TorchBackend):
    name: ClassVar[str] = "cuda"
    vendor: ClassVar[str] = "NVIDIA"
    priority: ClassVar[int] = 60
    note: ClassVar[str] = "not yet verified on hardware"
    engines: ClassVar[tuple[str, ...]] = ("eager", "compile", "graph", "compile-graph")
    type: ClassVar[str] = "cuda"
    collectives: ClassVar[str] = "nccl"

    def libraries(self, settings: Settings) -> tuple[LibraryLayer, ...]:
        reasons = {"float32": "strict float32 uses none", "float64": "nothing keeps float64 from those that have it"}
        return (
            LibraryLayer(
                name="tensor-cores",
                title="tensor cores: strict float32 remains",
                replace={"precision": "float32"},
                missing=reasons.get(settings.precision, ""),
            ),
            LibraryLayer(name="cudnn", title="cuDNN: PyTorch's own fallback remains, a loop over images on cuBLAS"),
        )

    def find(self, torch: "ModuleType") -> Device:
        from portnet_backends import cuda_telemetry

        # A ROCm build calls its devices "cuda" too; only torch.version tells them apart.
        if torch.version.hip or not torch.version.cuda:
            raise wrong_build(torch, "CUDA", f"{INDEX}/cu130")
        if not torch.cuda.is_available():
            raise Unavailable(
                "PyTorch finds no CUDA device", f"check nvidia-smi; the driver must support CUDA {torch.version.cuda}"
            )
        properties = torch.cuda.get_device_properties(0)
        ampere = ("tf32", "bfloat16") if properties.major >= 8 else ()
        return Device(
            name=properties.name,
            precisions=("float64", "float32", *ampere, "float16"),
            memory=properties.total_memory,
            versions=versions(
                torch, cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), driver=cuda_telemetry.driver()
            ),
            unified=bool(getattr(properties, "is_integrated", False)),
        )

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def telemetry(self) -> Mapping[str, Any]:
        from portnet_backends import cuda_telemetry

        return cuda_telemetry.read()


@hookimpl
def portnet_backends() -> Iterable[Backend]:
    return [Cuda()]
