"""The host's processor, through PyTorch."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from portnet.contract import Backend, Device, LibraryLayer, Settings
from portnet.hookspecs import hookimpl
from portnet.host import instruction_sets, processor
from portnet_backends.amx import no_amx
from portnet_backends.torch_device import TorchBackend, versions

if TYPE_CHECKING:
    from types import ModuleType


class Cpu(TorchBackend):
    name: ClassVar[str] = "cpu"
    vendor: ClassVar[str] = "any CPU"
    priority: ClassVar[int] = 10
    type: ClassVar[str] = "cpu"
    engines: ClassVar[tuple[str, ...]] = (*TorchBackend.engines, "regions")
    collectives: ClassVar[str] = "gloo"
    one_device: ClassVar[bool] = True

    def libraries(self, settings: Settings) -> tuple[LibraryLayer, ...]:
        flags, precision = instruction_sets(), settings.precision
        without_amx = "AVX512_CORE_FP16" if "avx512_fp16" in flags else "AVX512_CORE_BF16"
        # PyTorch's oneDNN has no path for these precisions on a processor with AVX2 alone.
        below = f"below AVX-512 oneDNN takes no {precision}, and PyTorch's own fallback computes it"
        return (
            LibraryLayer(
                name="amx",
                title="AMX",
                # oneDNN, "CPU Dispatcher Control"; without it, AMX would be taken wherever the processor has it.
                environment={"ONEDNN_MAX_CPU_ISA": without_amx},
                missing=no_amx(flags, precision),
            ),
            LibraryLayer(
                name="avx512",
                title="AVX-512 (and AMX): AVX2 remains",
                # PyTorch's kernels and compiler, oneDNN, and oneMKL ("Instruction Set-Specific Dispatching"; on Intel's
                # processors only).
                environment={
                    "ATEN_CPU_CAPABILITY": "avx2",
                    "ONEDNN_MAX_CPU_ISA": "AVX2",
                    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
                },
                note=below if precision in ("bfloat16", "float16") else "",
                missing="" if "avx512f" in flags else "the processor has no AVX-512, or does not say",
            ),
            LibraryLayer(name="onednn", title="oneDNN: PyTorch's own fallback remains"),
        )

    def find(self, torch: "ModuleType") -> Device:
        return Device(
            name=f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
            precisions=("float64", "float32", "bfloat16", "float16"),
            versions=versions(torch),
            unified=True,
            emulated=emulated(torch),
        )

    def synchronize(self) -> None:
        """PyTorch's CPU operators return when their work is done."""

    def telemetry(self) -> Mapping[str, Any]:
        from portnet_backends import cpu_telemetry

        return cpu_telemetry.read()


def emulated(torch: "ModuleType") -> tuple[str, ...]:
    """The precisions that oneDNN has no kernels for on this processor, as far as this torch tells."""
    names = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
    told = {precision: getattr(torch.ops.mkldnn, name, None) for precision, name in names.items()}
    return tuple(precision for precision, has in told.items() if has and not has())


@hookimpl
def portnet_backends() -> Iterable[Backend]:
    return [Cpu()]
