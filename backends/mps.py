"""Apple's GPUs, through PyTorch's Metal Performance Shaders device."""

from collections.abc import Iterable
from platform import mac_ver
from typing import TYPE_CHECKING, ClassVar

from portnet.contract import Backend, Device, Unavailable
from portnet.hookspecs import hookimpl
from portnet_backends.torch_device import TorchBackend, versions

if TYPE_CHECKING:
    from types import ModuleType


class Mps(TorchBackend):
    name: ClassVar[str] = "mps"
    vendor: ClassVar[str] = "Apple"
    priority: ClassVar[int] = 30
    note: ClassVar[str] = "not yet verified on hardware"
    type: ClassVar[str] = "mps"

    def find(self, torch: "ModuleType") -> Device:
        if not torch.backends.mps.is_built():
            raise Unavailable(
                f"PyTorch {torch.__version__} was built without MPS",
                "on a Mac with Apple silicon: pip install torch with an arm64 Python",
            )
        if not torch.backends.mps.is_available():
            raise Unavailable("PyTorch finds no MPS device", "MPS needs Apple silicon and macOS 14 or newer")
        return Device(
            name="Apple GPU",
            # Metal has no float64.
            precisions=("float32", "bfloat16", "float16"),
            memory=torch.mps.recommended_max_memory(),
            versions=versions(torch, macos=mac_ver()[0]),
            unified=True,
        )

    def synchronize(self) -> None:
        import torch

        torch.mps.synchronize()


@hookimpl
def portnet_backends() -> Iterable[Backend]:
    return [Mps()]
