"""Whatever device torch itself reports: Gaudi's hpu, Ascend's npu, mtia, musa and others that register with torch.

Vendors' packages register when torch is imported (its entry-point group ``torch.backends``).
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from portnet.contract import Backend, Device, Unavailable
from portnet.hookspecs import hookimpl
from portnet_backends.torch_device import TorchBackend, versions

if TYPE_CHECKING:
    from types import ModuleType

CLAIMED = {"cuda": "cuda or rocm", "xpu": "xpu", "mps": "mps"}


class Accelerator(TorchBackend):
    name: ClassVar[str] = "accelerator"
    vendor: ClassVar[str] = "any that torch reports"
    priority: ClassVar[int] = 20
    note: ClassVar[str] = "not yet verified on hardware"
    # Whether torch's own compiler knows the device is the vendor's matter, and so is the layout.
    engines: ClassVar[tuple[str, ...]] = ("eager",)
    formulations: ClassVar[tuple[str, ...]] = ("portable", "stock", "unfold")
    layouts: ClassVar[tuple[bool, ...]] = (False,)

    def find(self, torch: "ModuleType") -> Device:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if found is None:
            raise Unavailable(
                "torch reports no accelerator", "install the vendor's package that registers its device with torch"
            )
        if found.type in CLAIMED:
            raise Unavailable(
                f"torch's accelerator is {found.type}, which has a backend of its own",
                f"use backend {CLAIMED[found.type]}",
            )
        return Device(
            name=f"{found.type} device",
            precisions=("float32", "bfloat16"),
            versions=versions(torch, type=found.type),
        )

    def device_type(self) -> str:
        import torch

        found = torch.accelerator.current_accelerator()
        assert found is not None, "open() probes first"
        return found.type

    def synchronize(self) -> None:
        import torch

        torch.accelerator.synchronize()


@hookimpl
def portnet_backends() -> Iterable[Backend]:
    return [Accelerator()]
