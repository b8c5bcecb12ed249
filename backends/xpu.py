"""Intel GPUs, through PyTorch's XPU device."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from portnet.contract import Backend, Device, Unavailable
from portnet.hookspecs import hookimpl
from portnet_backends.torch_device import INDEX, TorchBackend, versions, wrong_build

if TYPE_CHECKING:
    from types import ModuleType


class Xpu(TorchBackend):
    name: ClassVar[str] = "xpu"
    vendor: ClassVar[str] = "Intel"
    priority: ClassVar[int] = 40
    note: ClassVar[str] = "not yet verified on hardware"
    type: ClassVar[str] = "xpu"
    collectives: ClassVar[str] = "xccl"

    def find(self, torch: "ModuleType") -> Device:
        if not torch.xpu._is_compiled():
            raise wrong_build(torch, "XPU", f"{INDEX}/xpu")
        if not torch.xpu.is_available():
            raise Unavailable("PyTorch finds no XPU device", "check sycl-ls and the driver for Intel GPUs")
        properties = torch.xpu.get_device_properties(0)
        return Device(
            name=properties.name,
            # Many client GPUs have no float64 units.
            precisions=(*(("float64",) if properties.has_fp64 else ()), "float32", "bfloat16", "float16"),
            memory=properties.total_memory,
            versions=versions(torch, driver=properties.driver_version, platform=properties.platform_name),
            unified=bool(getattr(properties, "is_integrated_gpu", False)),
        )

    def synchronize(self) -> None:
        import torch

        torch.xpu.synchronize()


@hookimpl
def portnet_backends() -> Iterable[Backend]:
    return [Xpu()]
