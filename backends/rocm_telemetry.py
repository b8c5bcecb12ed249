"""An AMD GPU's clocks, temperature, power, throttling and load, through AMD SMI.

By AMD's reference (rocm.docs.amd.com/projects/amdsmi, "AMD SMI Python API") and the package amdsmi.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

KERNEL_MODULE = Path("/sys/module/amdgpu/version")

# Fields of amdsmi_get_violation_status that say why clocks are held down; not low utilisation, which is idling.
REASONS = {
    "active_prochot_thrm": "processor hot",
    "active_ppt_pwr": "package power",
    "active_socket_thrm": "socket temperature",
    "active_vr_thrm": "voltage regulator temperature",
    "active_hbm_thrm": "memory temperature",
    "active_gfx_clk_below_host_limit": "clock below the host's limit",
}


def read() -> dict[str, Any]:
    """What AMD SMI tells of torch's device 0 now, under the keys of `portnet.watch.TELEMETRY`; empty without it."""
    found = _device()
    if found is None:
        return {}
    smi, handle = found

    def temperature(*sensors: Any) -> Any:
        for sensor in sensors:  # data centre cards have no edge sensor
            try:
                return smi.amdsmi_get_temp_metric(handle, sensor, smi.AmdSmiTemperatureMetric.CURRENT)
            except smi.AmdSmiException:
                continue
        return None

    def power() -> Any:
        told = smi.amdsmi_get_power_info(handle)
        # Older cards tell an average only, newer ones the present power only.
        known = (told.get(k) for k in ("current_socket_power", "average_socket_power"))
        return next((float(watt) for watt in known if _is_number(watt)), None)

    def throttling() -> list[str]:
        told = smi.amdsmi_get_violation_status(handle)
        return [name for field, name in REASONS.items() if told.get(field) is True]

    def scaled(value: Any, factor: float) -> Any:
        return value * factor if _is_number(value) else None

    sensor, clock = smi.AmdSmiTemperatureType, smi.AmdSmiClkType
    readings: dict[str, Callable[[], Any]] = {
        "core_clock": lambda: scaled(smi.amdsmi_get_clock_info(handle, clock.GFX)["clk"], 1e6),
        "memory_clock": lambda: scaled(smi.amdsmi_get_clock_info(handle, clock.MEM)["clk"], 1e6),
        "temperature": lambda: temperature(sensor.EDGE, sensor.HOTSPOT),
        "memory_temperature": lambda: temperature(sensor.VRAM),
        "power": power,
        "utilization": lambda: scaled(smi.amdsmi_get_gpu_activity(handle)["gfx_activity"], 0.01),
        "memory_used": lambda: scaled(smi.amdsmi_get_gpu_vram_usage(handle)["vram_used"], 2**20),
        "foreign_processes": lambda: len({p["pid"] for p in smi.amdsmi_get_gpu_process_list(handle)} - {os.getpid()}),
        "throttling": throttling,
    }
    told = {}
    for key, ask in readings.items():
        try:
            value = ask()
        except (smi.AmdSmiException, AttributeError, KeyError):  # not offered by this card or driver
            continue
        if value is not None:
            told[key] = value
    return told


def driver() -> str | None:
    """The version of AMD's driver, by AMD SMI or by the kernel module; None for the one that came with the kernel."""
    if (found := _device()) is not None:
        smi, handle = found
        with suppress(smi.AmdSmiException, KeyError):
            return str(smi.amdsmi_get_gpu_driver_info(handle)["driver_version"])
    try:
        return KERNEL_MODULE.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _is_number(value: Any) -> bool:
    """What AMD SMI cannot tell it calls "N/A"."""
    return isinstance(value, int | float) and not isinstance(value, bool)


@cache
def _device() -> tuple[Any, Any] | None:
    """AMD SMI and its handle of torch's device 0, matched by place on the bus (HIP_VISIBLE_DEVICES reorders)."""
    try:
        import amdsmi
    except (ImportError, OSError, KeyError):  # the last where the module finds no library
        return None
    import torch

    properties: Any = torch.cuda.get_device_properties(0)
    if not hasattr(properties, "pci_bus_id"):
        return None
    place = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    try:
        amdsmi.amdsmi_init(amdsmi.AmdSmiInitFlags.INIT_AMD_GPUS)
        return amdsmi, amdsmi.amdsmi_get_processor_handle_from_bdf(place)
    except amdsmi.AmdSmiException:
        return None
