"""A processor's clock and temperature, as Linux shows them to anybody; nothing elsewhere.

By the kernel's documentation (docs.kernel.org/admin-guide/pm/cpufreq, driver-api/thermal/sysfs-api).
"""

from pathlib import Path
from typing import Any

# Types of thermal zones that are a processor's: x86, many Arm systems, Raspberry Pi.
_ZONES = ("x86_pkg_temp", "cpu", "soc")


def read(devices: Path = Path("/sys")) -> dict[str, Any]:
    """The mean clock of all cores in Hz and the hottest zone of the processor in degrees Celsius, where shown."""
    told: dict[str, Any] = {}
    clocks = _numbers(devices.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"))
    if clocks:
        told["core_clock"] = 1e3 * sum(clocks) / len(clocks)  # in kHz there
    zones = [zone.parent for zone in devices.glob("class/thermal/thermal_zone*/type") if _is_processor(zone)]
    if degrees := _numbers(zone / "temp" for zone in zones):
        told["temperature"] = max(degrees) / 1e3
    return told


def _is_processor(kind: Path) -> bool:
    try:
        return kind.read_text().strip().lower().startswith(_ZONES)
    except OSError:
        return False


def _numbers(paths: Any) -> list[float]:
    found = []
    for path in paths:
        try:
            found.append(float(path.read_text()))
        except (OSError, ValueError):  # not readable without privileges, or a core that is off
            continue
    return found
