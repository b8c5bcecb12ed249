"""AMD GPUs, through PyTorch built for ROCm, which calls them "cuda"."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from portnet.contract import Backend, Device, LibraryLayer, Settings, Unavailable
from portnet.hookspecs import hookimpl
from portnet_backends.torch_device import INDEX, TorchBackend, versions, wrong_build

if TYPE_CHECKING:
    from types import ModuleType


class Rocm(TorchBackend):
    name: ClassVar[str] = "rocm"
    vendor: ClassVar[str] = "AMD"
    priority: ClassVar[int] = 50
    note: ClassVar[str] = "not yet verified on hardware"
    engines: ClassVar[tuple[str, ...]] = ("eager", "compile", "graph", "compile-graph")
    type: ClassVar[str] = "cuda"
    collectives: ClassVar[str] = "nccl"

    def libraries(self, settings: Settings) -> tuple[LibraryLayer, ...]:
        wide = settings.precision in ("float32", "float64")
        return (
            LibraryLayer(
                name="matrix-cores",
                title="narrow formats of the matrix cores: strict float32 remains",
                replace={"precision": "float32"},
                note="the matrix cores of AMD Instinct compute float32 too, and go on doing so",
                missing=f"{settings.precision} is no narrow format" if wide else "",
            ),
            # ROCm's torch hears torch.backends.cudnn and means MIOpen (its source: "disable CuDNN/MIOpen").
            LibraryLayer(name="miopen", title="MIOpen: PyTorch's own fallback remains, a loop over images on BLAS"),
        )

    def find(self, torch: "ModuleType") -> Device:
        from portnet_backends import rocm_telemetry

        if not torch.version.hip:
            raise wrong_build(torch, "ROCm", f"{INDEX}/rocm7.2")
        if not torch.cuda.is_available():
            raise Unavailable(
                "PyTorch finds no ROCm device", "check rocminfo, and that you belong to the groups render and video"
            )
        properties = torch.cuda.get_device_properties(0)
        narrow = ("bfloat16", "float16") if torch.cuda.is_bf16_supported() else ("float16",)
        return Device(
            name=properties.name,
            precisions=("float64", "float32", *narrow),
            memory=properties.total_memory,
            versions=versions(
                torch,
                hip=torch.version.hip,
                miopen=torch.backends.cudnn.version(),
                architecture=getattr(properties, "gcnArchName", None),
                driver=rocm_telemetry.driver(),
            ),
            unified=bool(getattr(properties, "is_integrated", False)),
        )

    def synchronize(self) -> None:
        import torch

        torch.cuda.synchronize()

    def telemetry(self) -> Mapping[str, Any]:
        from portnet_backends import rocm_telemetry

        return rocm_telemetry.read()


@hookimpl
def portnet_backends() -> Iterable[Backend]:
    return [Rocm()]
