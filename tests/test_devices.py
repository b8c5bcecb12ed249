"""Published figures: complete, sourced, of the right size, and given to no device that is not the very one."""

import tomllib
from importlib import resources
from pathlib import Path

import pytest

from portnet import devices as module
from portnet.contract import PRECISIONS
from portnet.devices import GIGABYTE, DeviceData, Figure, devices, find, parse
from portnet.errors import InputError, UnknownName

TERA, GIGA = 1e12, 1e9

every_device = pytest.mark.parametrize("device", devices(), ids=lambda device: device.name)


def figures(device: DeviceData) -> list[Figure]:
    bandwidth = [] if device.bandwidth is None else [device.bandwidth]
    return [*device.rates.values(), *bandwidth, *device.per_core_per_cycle.values()]


def named(name: str) -> DeviceData:
    return next(device for device in devices() if device.name == name)


@every_device
def test_every_entry_and_every_figure_has_a_source(device: DeviceData) -> None:
    for source in (device.source, *(figure.source for figure in figures(device))):
        assert source.title
        assert source.checked
        assert source.url.startswith(("https://", "http://"))


def test_no_source_is_left_over() -> None:
    used = {source.url for d in devices() for source in (d.source, *(figure.source for figure in figures(d)))}
    held = tomllib.loads(resources.files("portnet").joinpath("devices.toml").read_text())
    assert {source["url"] for source in held["sources"].values()} == used


@every_device
def test_figures_are_of_the_right_size(device: DeviceData) -> None:
    assert device.vendor in {"NVIDIA", "AMD", "Apple", "Intel", "Google"}
    assert 2010 <= device.year <= 2026
    assert device.names
    for precision, rate in device.rates.items():
        lowest = 0.5 if precision == "float64" else 1
        assert lowest * TERA <= rate.value <= 5000 * TERA, precision
    assert device.bandwidth is None or 50 * GIGA <= device.bandwidth.value <= 10_000 * GIGA
    assert all(1 * GIGABYTE <= size <= 512 * GIGABYTE for size in device.memory)
    assert all(16 <= figure.value <= 4096 for figure in device.per_core_per_cycle.values())


@every_device
def test_narrower_is_never_slower(device: DeviceData) -> None:
    rates = [device.rates[p].value for p in ("float64", "float32", "tf32", "bfloat16", "float16") if p in device.rates]
    assert rates == sorted(rates)


@every_device
def test_bfloat16_is_twice_tf32(device: DeviceData) -> None:
    """True of every matrix unit that has both; a sparse figure taken for a dense one breaks it."""
    if {"tf32", "bfloat16"} <= device.rates.keys():
        assert device.rates["bfloat16"].value == pytest.approx(2 * device.rates["tf32"].value, rel=0.03)


@every_device
def test_operations_per_byte_are_of_the_usual_order(device: DeviceData) -> None:
    """Bandwidths in other units than the rates, or of another number of chips, fall out of this."""
    if device.rates and device.bandwidth is not None:
        best = max(rate.value for rate in device.rates.values())
        assert 5 < best / device.bandwidth.value < 600


@every_device
def test_units_are_told_where_they_differ(device: DeviceData) -> None:
    assert all(rate.units in {"matrix", "vector"} for rate in device.rates.values())
    if device.vendor == "NVIDIA":
        assert device.rates["float32"].units == "vector", "no tensor core computes in float32"
    assert all(figure.units == "matrix" for precision, figure in device.rates.items() if precision == "bfloat16")


@pytest.mark.parametrize(
    ("name", "precision", "units", "per_clock", "clock"),
    [
        ("GeForce GTX 580", "float32", 16, 64, 1.544),
        ("Tesla K40", "float32", 15, 384, 0.875),
        ("Tesla P100 SXM2", "float32", 56, 128, 1.480),
        ("Tesla V100 SXM2", "float16", 80, 1024, 1.530),
        ("Tesla V100 PCIe", "float16", 80, 1024, 1.370),
        ("T4", "float16", 40, 1024, 1.590),
        ("A10", "float16", 72, 1024, 1.695),
        ("A100 SXM 80GB", "bfloat16", 108, 2048, 1.410),
        ("A100 SXM 80GB", "float64", 108, 128, 1.410),
        ("GeForce RTX 3090", "float16", 82, 512, 1.695),
        ("GeForce RTX 4090", "float16", 128, 512, 2.520),
        ("GeForce RTX 5090", "float16", 170, 512, 2.407),
        ("L4", "bfloat16", 58, 1024, 2.040),
        ("L40S", "bfloat16", 142, 1024, 2.520),
        ("H100 PCIe", "bfloat16", 114, 4096, 1.620),
        ("H100 SXM", "bfloat16", 132, 4096, 1.830),
        ("H200 SXM", "tf32", 132, 2048, 1.830),
        ("Instinct MI210", "float16", 104, 1024, 1.700),
        ("Instinct MI250X, one die", "float16", 110, 1024, 1.700),
        ("Instinct MI250X, one die", "float64", 110, 256, 1.700),
        ("Instinct MI300X", "float16", 304, 2048, 2.100),
        ("Instinct MI355X", "float16", 256, 4096, 2.400),
        ("Radeon RX 7900 XTX", "float32", 96, 256, 2.500),
        ("Data Center GPU Max 1550, one stack", "bfloat16", 64, 4096, 1.600),
        ("TPU v5e", "bfloat16", 4, 2 * 128 * 128, 1.500),
    ],
)
def test_rates_follow_from_the_chip(name: str, precision: str, units: int, per_clock: int, clock: float) -> None:
    """Multiprocessors x dense FLOP per clock x GHz, counted from the architecture: it knows neither sparsity nor
    packages, and so finds a figure that is doubled by one of them or is another model's."""
    assert named(name).peak(precision) == pytest.approx(units * per_clock * clock * GIGA, rel=0.02)


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA GH200 480GB", "GH200 96GB"),
        ("NVIDIA GH200 144G HBM3e", "GH200 144GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("A100-SXM4-40GB", "A100 SXM 40GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090"),
        ("GeForce GTX 580", "GeForce GTX 580"),
        ("Tesla V100-SXM2-32GB", "Tesla V100 SXM2"),
        ("Tesla V100-PCIE-16GB", "Tesla V100 PCIe"),
        ("AMD Instinct MI300X", "Instinct MI300X"),
        ("AMD Instinct MI250X", "Instinct MI250X, one die"),
        ("Apple M4", "M4"),
        ("Apple M4 Pro", "M4 Pro"),
        ("Apple M2, DEFAULT, 8 threads", "M2"),
        ("Intel(R) Data Center GPU Max 1550", "Data Center GPU Max 1550, one stack"),
        ("Intel(R) Arc(TM) B580 Graphics", "Arc B580"),
        ("Intel(R) Xeon(R) Platinum 8480+", "Xeon Scalable, 4th generation"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz, AVX512, 8 threads", "Xeon Scalable, 4th generation"),
        ("INTEL(R) XEON(R) GOLD 6430", "Xeon Scalable, 4th generation"),
        ("TPU v5 lite", "TPU v5e"),
        ("  nvidia  geforce rtx 5090 ", "GeForce RTX 5090"),
    ],
)
def test_what_drivers_report_is_found(reported: str, name: str) -> None:
    found = find(reported)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    "reported",
    [
        "",
        "a device",
        "Apple GPU",
        "NVIDIA",
        "NVIDIA H100",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H800",
        "NVIDIA H20",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA A100-SXM4-64GB",
        "NVIDIA A10G",
        "NVIDIA A10-24Q",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA GeForce RTX 5090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "GeForce GTX 580M",
        "RTX 4090",
        "Tesla V100S-PCIE-32GB",
        "Tesla V100-SXM3-32GB",
        "Tesla T40",
        "AMD Instinct MI250X / MI250",
        "AMD Instinct MI250",
        "AMD Instinct MI300A",
        "AMD Instinct MI300X VF",
        "AMD Radeon RX 7900 XT",
        "Apple M5",
        "Apple M44",
        "Intel(R) Data Center GPU Max 1100",
        "Intel(R) Arc(TM) A770M Graphics",
        "Intel(R) Xeon(R) Processor",
        "Intel(R) Xeon(R) Platinum 8380 CPU @ 2.30GHz",
        "Intel(R) Xeon(R) Gold 6154 CPU @ 3.00GHz",
        "INTEL(R) XEON(R) PLATINUM 8592+",
        "Intel(R) Xeon(R) Platinum 84",
        "AMD EPYC 9654 96-Core Processor",
        "TPU v5 lite pod",
    ],
)
def test_a_near_miss_is_nobody(reported: str) -> None:
    assert find(reported) is None


def test_h100_pcie_has_none_of_sxms_figures() -> None:
    sxm, pcie = find("NVIDIA H100 80GB HBM3"), find("NVIDIA H100 PCIe")
    assert sxm is not None
    assert pcie is not None
    assert all(pcie.rates[precision].value < rate.value for precision, rate in sxm.rates.items())


def test_sparse_figures_are_halved_and_dense_ones_are_not() -> None:
    h200, a100 = named("H200 SXM").rates["bfloat16"], named("A100 SXM 80GB").rates["bfloat16"]
    assert (h200.published, h200.value, h200.sparse) == (1979 * TERA, 989.5 * TERA, True)
    assert (a100.published, a100.value, a100.sparse) == (312 * TERA, 312 * TERA, False)
    assert not named("H200 SXM").rates["float32"].sparse, "vectors have no sparsity"
    assert not any(rate.sparse for device in devices() for rate in device.rates.values() if rate.units == "vector")


def test_a_package_of_two_is_divided() -> None:
    die = find("AMD Instinct MI250X")
    assert die is not None
    assert die.bandwidth is not None
    assert (die.bandwidth.value, die.bandwidth.published) == (1600 * GIGA, 3200 * GIGA)
    assert die.memory == (64 * GIGABYTE,)
    assert die.peak("float16") == 191.5 * TERA


@pytest.mark.parametrize(
    ("reported", "gigabytes", "whole"),
    [
        ("NVIDIA H200", 139.8, True),
        ("NVIDIA H100 PCIe", 39.5, False),
        ("Tesla T4", 14.6, True),
        ("Tesla V100-SXM2-32GB", 31.7, True),
        ("AMD Instinct MI300X", 192, True),
        ("AMD Instinct MI300X", 48, False),
        ("AMD Instinct MI250X", 63.98, True),
        ("Intel(R) Data Center GPU Max 1550", 63.98, True),
        ("Intel(R) Data Center GPU Max 1550", 128, False),
        ("Apple M4", 16, True),
    ],
)
def test_memory_tells_a_part_from_the_whole(reported: str, gigabytes: float, whole: bool) -> None:
    assert (find(reported, memory=gigabytes * GIGABYTE) is not None) is whole


def test_what_is_not_published_is_none() -> None:
    m4, xeon, v100 = find("Apple M4 Max"), find("Intel(R) Xeon(R) Platinum 8480+"), named("Tesla V100 SXM2")
    assert m4 is not None
    assert xeon is not None
    assert (m4.bandwidth, m4.rates, m4.memory) == (None, {}, ())
    assert v100.peak("bfloat16") is None
    assert xeon.per_core_per_cycle["bfloat16"].value == 1024
    assert [xeon.peak(precision) for precision in module.PRECISIONS] == [None] * 5, "a core's cycle is no peak"


def test_an_unknown_precision_is_a_mistake() -> None:
    assert set(module.PRECISIONS) == set(PRECISIONS)
    with pytest.raises(UnknownName, match="unknown precision 'fp16'"):
        named("T4").peak("fp16")


def test_wildcards_stand_only_where_there_is_no_peak() -> None:
    assert [d.name for d in devices() if d.rates and any(set("*?[") & set(name) for name in d.names)] == []


def test_every_name_finds_its_own_entry() -> None:
    literal = [(name, device) for device in devices() for name in device.names if "*" not in name]
    assert all(find(name) is device for name, device in literal)
    assert len({device.name for device in devices()}) == len(devices())


SOURCES = '[sources.a]\ntitle = "t"\nurl = "https://u"\nchecked = "itself"\n'


def entry(name: str, names: str, more: str = "") -> str:
    return f'[[device]]\nname = "{name}"\nvendor = "V"\nyear = 2020\nnames = {names}\nsource = "a"\n{more}\n'


@pytest.mark.parametrize("other", ['["x", "One"]', '["on?"]', '["ONE"]', '[" one"]'])
def test_a_name_is_claimed_once(other: str) -> None:
    with pytest.raises(InputError, match=r"claimed by (first|second) and by (first|second)"):
        parse(SOURCES + entry("first", '["One"]') + entry("second", other))
    with pytest.raises(InputError, match="claimed"):
        parse(SOURCES + entry("first", '["on[0-9]"]') + entry("second", '["on[0-9]"]'))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x =", "cannot be read"),
        ("", "cannot be read: KeyError: 'sources'"),
        (SOURCES + entry("d", '["d"]').replace('"a"', '"b"'), "KeyError: 'b'"),
        (SOURCES + entry("d", '["d"]').replace("year = 2020\n", ""), "year"),
        (SOURCES + entry("d", '["d"]', 'rates.float32 = { value = 1e12, units = "vector" }'), "KeyError: 'source'"),
        (SOURCES + entry("d", '["d"]', 'rates.float32 = { value = "1", units = "vector", source = "a" }'), "TypeError"),
        (SOURCES + entry("d", '["d"]', 'rates.fp32 = { value = 1, units = "vector", source = "a" }'), "precision of d"),
        (SOURCES + entry("d", '["d"]', 'rates.float32 = { value = 1, source = "a" }'), "units must be one of"),
        (SOURCES + entry("d", '["d"]', 'bandwidth = { value = 1, units = "vector", source = "a" }'), "units must be"),
        (SOURCES + entry("d", '["d"]', "colour = 1"), "colour"),
    ],
)
def test_an_incomplete_table_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(text)


def test_the_table_is_part_of_the_package() -> None:
    assert resources.files("portnet").joinpath("devices.toml").is_file()
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert "*.toml" in project["tool"]["setuptools"]["package-data"]["portnet"]
