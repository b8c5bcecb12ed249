"""What drivers tell of a card, from fakes of NVML, AMD SMI and /sys: no such card is here."""

import os
from types import SimpleNamespace

import pytest
import torch

from portnet.watch import TELEMETRY
from portnet_backends import cpu_telemetry, cuda_telemetry, rocm_telemetry
from portnet_backends.cpu import Cpu
from portnet_backends.cuda import Cuda
from portnet_backends.rocm import Rocm

UUID = "8f5d1a3c-0000-1111-2222-333344445555"


@pytest.fixture(autouse=True)
def _ask_anew():
    for module in (cuda_telemetry, rocm_telemetry):
        module._device.cache_clear()
    yield
    for module in (cuda_telemetry, rocm_telemetry):
        module._device.cache_clear()


class FakeNvmlError(Exception):
    pass


def fake_nvml(*, reasons=0, pids=(), missing=(), old=False, uuid=f"GPU-{UUID}", place="00000000:41:00.0", library=True):
    """pynvml with two cards, of which the second in NVML's order is torch's first."""

    def init():
        if not library:
            raise FakeNvmlError("NVML Shared Library Not Found")

    def find(wanted):
        def by(name):
            if name != wanted:
                raise FakeNvmlError("Not Found")
            return "card"

        return by

    def tell(name, value):
        def ask(handle, *which):
            assert handle == "card"
            if name in missing:
                raise FakeNvmlError("Not Supported")
            return value[which[0]] if which else value

        return ask

    offered = {
        "nvmlDeviceGetClockInfo": {1: 1980, 2: 2619},
        "nvmlDeviceGetTemperature": {0: 41},
        "nvmlDeviceGetPowerUsage": 75_500,
        "nvmlDeviceGetEnforcedPowerLimit": 700_000,
        "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=37, memory=5),
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=100, free=58, used=42),
        "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=pid) for pid in pids],
        "nvmlDeviceGetCurrentClocksThrottleReasons" if old else "nvmlDeviceGetCurrentClocksEventReasons": reasons,
    }
    return SimpleNamespace(
        NVMLError=FakeNvmlError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=init,
        nvmlSystemGetDriverVersion=lambda: "580.65.06",
        nvmlDeviceGetHandleByUUID=find(uuid),
        nvmlDeviceGetHandleByPciBusId=find(place),
        **{name: tell(name, value) for name, value in offered.items()},
    )


class FakeSmiError(Exception):
    pass


def fake_smi(*, violations=None, pids=(), edge=True, power=None, place="0000:c1:00.0", activity=12):
    """amdsmi with one card."""

    def find(wanted):
        if wanted != place:
            raise FakeSmiError("not found")
        return "card"

    def temperature(handle, sensor, metric):
        assert (handle, metric) == ("card", "current")
        if sensor == "edge" and not edge:
            raise FakeSmiError("not supported")
        return {"edge": 39, "hotspot": 52, "vram": 44}[sensor]

    def violation(handle):
        if violations is None:
            raise FakeSmiError("not supported")
        return violations

    return SimpleNamespace(
        AmdSmiException=FakeSmiError,
        AmdSmiInitFlags=SimpleNamespace(INIT_AMD_GPUS=2),
        AmdSmiClkType=SimpleNamespace(GFX="gfx", MEM="mem"),
        AmdSmiTemperatureType=SimpleNamespace(EDGE="edge", HOTSPOT="hotspot", VRAM="vram"),
        AmdSmiTemperatureMetric=SimpleNamespace(CURRENT="current"),
        amdsmi_init=lambda flags: None,
        amdsmi_get_processor_handle_from_bdf=find,
        amdsmi_get_clock_info=lambda handle, kind: {"clk": {"gfx": 2100, "mem": 1300}[kind], "max_clk": 9999},
        amdsmi_get_temp_metric=temperature,
        amdsmi_get_power_info=lambda handle: power or {"current_socket_power": 310, "average_socket_power": "N/A"},
        amdsmi_get_gpu_activity=lambda handle: {"gfx_activity": activity},
        amdsmi_get_gpu_vram_usage=lambda handle: {"vram_total": 192_000, "vram_used": 3},
        amdsmi_get_gpu_process_list=lambda handle: [{"pid": pid} for pid in pids],
        amdsmi_get_violation_status=violation,
        amdsmi_get_gpu_driver_info=lambda handle: {"driver_name": "amdgpu", "driver_version": "6.14.5"},
    )


def install(monkeypatch, name, module, **properties):
    """A fake module, or None for one that cannot be imported, and the properties of torch's device 0."""
    monkeypatch.setitem(__import__("sys").modules, name, module)

    def properties_of(index):
        assert index == 0
        return SimpleNamespace(**properties)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties_of)


PLACE = {"pci_domain_id": 0, "pci_bus_id": 0x41, "pci_device_id": 0}
AMD_PLACE = PLACE | {"pci_bus_id": 0xC1}


# NVIDIA.


def test_nvml(monkeypatch):
    install(monkeypatch, "pynvml", fake_nvml(pids=[os.getpid(), 11, 12]), uuid=UUID)
    told = Cuda().telemetry()
    assert told == {
        "core_clock": 1980e6,
        "memory_clock": 2619e6,
        "temperature": 41,
        "power": 75.5,
        "power_limit": 700.0,
        "utilization": 0.37,
        "memory_used": 42,
        "foreign_processes": 2,
        "throttling": [],
    }
    assert told.keys() <= TELEMETRY.keys()


def test_nvml_names_the_reasons_in_force_and_not_idling(monkeypatch):
    install(monkeypatch, "pynvml", fake_nvml(reasons=0x1 | 0x4 | 0x40), uuid=UUID)
    assert Cuda().telemetry()["throttling"] == ["software power cap", "hardware thermal slowdown"]


def test_nvml_of_an_older_driver(monkeypatch):
    install(monkeypatch, "pynvml", fake_nvml(reasons=0x1 | 0x8, old=True), uuid=UUID)
    assert Cuda().telemetry()["throttling"] == ["hardware slowdown"]


def test_what_a_card_does_not_offer_is_absent(monkeypatch):
    missing = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetUtilizationRates")
    install(monkeypatch, "pynvml", fake_nvml(missing=missing), uuid=UUID)
    told = Cuda().telemetry()
    assert {"power", "utilization"}.isdisjoint(told)
    assert told["temperature"] == 41


@pytest.mark.parametrize(
    ("properties", "more"),
    [
        ({"uuid": UUID}, {"place": "elsewhere"}),
        ({"uuid": UUID}, {"uuid": f"MIG-{UUID}", "place": "elsewhere"}),
        ({"uuid": "00000000-dead", **PLACE}, {}),
        (PLACE, {"uuid": "none"}),
    ],
)
def test_the_card_is_torchs(monkeypatch, properties, more):
    """By UUID or place, never by number."""
    install(monkeypatch, "pynvml", fake_nvml(**more), **properties)
    assert Cuda().telemetry()["temperature"] == 41


def test_another_card_is_not_taken_for_it(monkeypatch):
    install(monkeypatch, "pynvml", fake_nvml(), uuid="00000000-dead", **(PLACE | {"pci_bus_id": 0x42}))
    assert Cuda().telemetry() == {}


@pytest.mark.parametrize(("pids", "foreign"), [([], 0), ([0], 0), ([0, 7], 1), ([5, 7], 1), ([7], 0)])
def test_foreign_processes(pids, foreign):
    """0 stands for this process. Where it is missing the numbers are a host's, and one is still this process's."""
    assert cuda_telemetry._foreign([pid or os.getpid() for pid in pids]) == foreign


def test_without_nvml(monkeypatch):
    install(monkeypatch, "pynvml", None, uuid=UUID)
    assert Cuda().telemetry() == {}
    cuda_telemetry._device.cache_clear()
    install(monkeypatch, "pynvml", fake_nvml(library=False), uuid=UUID)
    assert Cuda().telemetry() == {}


# AMD.


def test_amd_smi(monkeypatch):
    status = {"active_ppt_pwr": True, "active_hbm_thrm": False, "active_vr_thrm": "N/A", "active_low_utilization": True}
    install(monkeypatch, "amdsmi", fake_smi(violations=status, pids=[os.getpid(), 9]), **AMD_PLACE)
    told = Rocm().telemetry()
    assert told == {
        "core_clock": 2100e6,
        "memory_clock": 1300e6,
        "temperature": 39,
        "memory_temperature": 44,
        "power": 310.0,
        "utilization": pytest.approx(0.12),
        "memory_used": 3 * 2**20,
        "foreign_processes": 1,
        "throttling": ["package power"],
    }
    assert told.keys() <= TELEMETRY.keys()


def test_amd_smi_of_a_data_centre_card_and_of_an_old_one(monkeypatch):
    power = {"current_socket_power": "N/A", "average_socket_power": 98}
    install(monkeypatch, "amdsmi", fake_smi(edge=False, power=power, activity="N/A"), **AMD_PLACE)
    told = Rocm().telemetry()
    assert (told["temperature"], told["power"]) == (52, 98.0)
    assert {"utilization", "throttling"}.isdisjoint(told)


def test_without_amd_smi(monkeypatch):
    install(monkeypatch, "amdsmi", None, **AMD_PLACE)
    assert Rocm().telemetry() == {}
    rocm_telemetry._device.cache_clear()
    install(monkeypatch, "amdsmi", fake_smi(), **PLACE)
    assert Rocm().telemetry() == {}


# Drivers.


def test_the_drivers_version(monkeypatch, tmp_path):
    """By the vendor's library, or else by the kernel module's file; unknown where there is neither."""
    file = tmp_path / "version"
    for telemetry, library, fake, place in (
        (cuda_telemetry, "pynvml", fake_nvml(), {"uuid": UUID}),
        (rocm_telemetry, "amdsmi", fake_smi(), AMD_PLACE),
    ):
        monkeypatch.setattr(telemetry, "KERNEL_MODULE", file)
        install(monkeypatch, library, fake, **place)
        assert telemetry.driver() in ("580.65.06", "6.14.5")
        telemetry._device.cache_clear()
        install(monkeypatch, library, None, **place)
        assert telemetry.driver() is None
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\nGCC version: 12.3.0"
    )
    assert cuda_telemetry.driver() == "570.124.06"
    file.write_text("6.12.12\n")
    assert rocm_telemetry.driver() == "6.12.12"


# The processor.


def test_a_fake_sys(tmp_path):
    def write(path, text):
        tmp_path.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
        tmp_path.joinpath(path).write_text(text)

    assert cpu_telemetry.read(tmp_path) == {}
    for core, clock in enumerate(("3000000", "1000000", "<unknown>")):
        write(f"devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", clock)
    for zone, (kind, temperature) in enumerate((("acpitz", "90000"), ("x86_pkg_temp", "51000"), ("cpu-1", "53500"))):
        write(f"class/thermal/thermal_zone{zone}/type", f"{kind}\n")
        write(f"class/thermal/thermal_zone{zone}/temp", f"{temperature}\n")
    assert cpu_telemetry.read(tmp_path) == {"core_clock": 2e9, "temperature": 53.5}


def test_this_processor():
    told = Cpu().telemetry()
    assert told.keys() <= {"core_clock", "temperature"}
    assert all(value > 0 for value in told.values())
