"""The host's processor, through PyTorch."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from portnet.contract import Backend, Device
from portnet.hookspecs import hookimpl
from portnet.host import processor
from portnet_backends.torch_device import TorchBackend, versions

if TYPE_CHECKING:
    from types import ModuleType


class Cpu(TorchBackend):
    name: ClassVar[str] = "cpu"
    vendor: ClassVar[str] = "any CPU"
    priority: ClassVar[int] = 10
    type: ClassVar[str] = "cpu"

    def find(self, torch: "ModuleType") -> Device:
        return Device(
            name=f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
            precisions=("float64", "float32", "bfloat16", "float16"),
            versions=versions(torch),
            unified=True,
        )

    def synchronize(self) -> None:
        """PyTorch's CPU operators return when their work is done."""

    def telemetry(self) -> Mapping[str, Any]:
        from portnet_backends import cpu_telemetry

        return cpu_telemetry.read()


@hookimpl
def portnet_backends() -> Iterable[Backend]:
    return [Cpu()]
