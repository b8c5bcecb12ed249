"""An NVIDIA GPU's clocks, temperature, power, throttling and load, through NVML.

By NVML's API reference (docs.nvidia.com/deploy/nvml-api) and the package nvidia-ml-py, whose module is pynvml.
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

KERNEL_MODULE = Path("/proc/driver/nvidia/version")
"""Its first line, as in ``NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 2023``."""

# The bits of nvmlDeviceGetCurrentClocksEventReasons (NVML's header, "NvmlClocksEventReasons"), less idling.
REASONS = {
    0x002: "applications' clocks",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clock",
}


def read() -> dict[str, Any]:
    """What NVML tells of torch's device 0 now, under the keys of `portnet.watch.TELEMETRY`; empty without NVML."""
    found = _device()
    if found is None:
        return {}
    nvml, handle = found

    def events() -> int:
        # Called throttle reasons before the driver 535.
        name = "nvmlDeviceGetCurrentClocksEventReasons"
        ask = getattr(nvml, name, None) or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        return int(ask(handle))

    readings: dict[str, Callable[[], Any]] = {
        "core_clock": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6,
        "memory_clock": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM) * 1e6,
        "temperature": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "power": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "power_limit": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
        "utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        "memory_used": lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).used),
        "foreign_processes": lambda: _foreign([p.pid for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]),
        "throttling": lambda: [name for bit, name in REASONS.items() if events() & bit],
    }
    told = {}
    for key, ask in readings.items():
        try:
            told[key] = ask()
        except (nvml.NVMLError, AttributeError):  # not offered by this card or driver
            continue
    return told


def driver() -> str | None:
    """The version of NVIDIA's driver, by NVML or by its kernel module's own word; None where neither tells."""
    if (found := _device()) is not None:
        nvml, _ = found
        with suppress(nvml.NVMLError):
            return str(nvml.nvmlSystemGetDriverVersion())
    try:
        told = re.search(r"\d+\.\d+(\.\d+)?", KERNEL_MODULE.read_text(encoding="utf-8").splitlines()[0])
    except (OSError, IndexError):
        return None
    return told[0] if told else None


def _foreign(pids: list[int]) -> int:
    """How many of the processes on the card are others than this one, which has work on it.

    In a container NVML tells the host's numbers, among which ours cannot be found: then one of them is ours.
    """
    others = len(set(pids) - {os.getpid()})
    return others if os.getpid() in pids else max(0, others - 1)


@cache
def _device() -> tuple[Any, Any] | None:
    """NVML and its handle of torch's device 0.

    NVML counts cards otherwise than torch (CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER), so they are matched by UUID, or
    else by place on the bus.
    """
    try:
        import pynvml
    except (ImportError, OSError):
        return None
    import torch

    properties: Any = torch.cuda.get_device_properties(0)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    if uuid := str(getattr(properties, "uuid", "")):
        for name in (uuid, f"GPU-{uuid}", f"MIG-{uuid}"):
            try:
                return pynvml, pynvml.nvmlDeviceGetHandleByUUID(name)
            except pynvml.NVMLError:
                continue
    if hasattr(properties, "pci_bus_id"):
        place = f"{properties.pci_domain_id:08x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
        try:
            return pynvml, pynvml.nvmlDeviceGetHandleByPciBusId(place)
        except pynvml.NVMLError:
            pass
    return None
