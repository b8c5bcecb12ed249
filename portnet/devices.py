"""What vendors publish about their devices: dense peak rates by precision, memory and its bandwidth.

The figures stand in devices.toml, each with its source. What is not published is None, never a guess; a name that is
not known word for word is no device's, since a variant (a laptop's, a cloud's, a slice of a GPU) has other rates.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any

from portnet.errors import InputError, UnknownName

PRECISIONS = ("float64", "float32", "tf32", "bfloat16", "float16")
UNITS = ("matrix", "vector")

GIGABYTE = 2**30
"""What memory is sold by: drivers report 143,771 MiB of an H200's 141 GB."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A vendor's document. `checked` is the public text that the figures were read in, "itself" for the document."""

    title: str
    url: str
    checked: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One published figure: `value` for one device and dense operands, `published` as the source prints it.

    `units` is the part of the chip that reaches it, ``matrix`` or ``vector``, and empty for a bandwidth. `sparse` says
    that the source counts with 2:4 structured sparsity. `derived` says how it follows from published figures.
    """

    value: float
    published: float
    source: Source
    units: str = ""
    sparse: bool = False
    derived: str = ""


@dataclass(frozen=True, kw_only=True)
class DeviceData:
    """One device as its driver shows it.

    `rates` holds FLOP/s by precision, `bandwidth` is bytes/s and `memory` bytes, one for each model that is sold under
    these names; what is not known is absent. Of a package that appears as `parts` devices, all are one part's share.
    `per_core_per_cycle` holds the FLOP per core and cycle of a processor: no peak, which its cores and clock decide.
    `names` are what drivers report, and may hold the wildcards of `fnmatch`.
    """

    name: str
    vendor: str
    year: int
    names: tuple[str, ...]
    source: Source
    rates: Mapping[str, Figure] = field(default_factory=dict)
    bandwidth: Figure | None = None
    memory: tuple[float, ...] = ()
    parts: int = 1
    per_core_per_cycle: Mapping[str, Figure] = field(default_factory=dict)

    def peak(self, precision: str) -> float | None:
        """The published dense peak in FLOP/s, or None where none is known. Raises `UnknownName` for a precision."""
        if precision not in PRECISIONS:
            raise UnknownName("precision", precision, PRECISIONS)
        return self.rates[precision].value if precision in self.rates else None

    def claims(self, name: str) -> bool:
        """Whether a driver's name is this device's: the whole name, in whatever case."""
        return any(fnmatchcase(_plain(name), _plain(own)) for own in self.names)

    def holds(self, memory: float) -> bool:
        """Whether the bytes that a driver reports can be a whole such device's: error correction takes up to 1/16 of
        it and drivers a little more; a partition is at most half."""
        return not self.memory or any(0.85 * own < memory < 1.05 * own for own in self.memory)


def devices() -> tuple[DeviceData, ...]:
    """Every device of devices.toml, in the order of the file."""
    return _devices()


def find(name: str, memory: float | None = None) -> DeviceData | None:
    """The device of a name that PyTorch or a driver reports, or None where it is not known.

    `memory`, in bytes, tells a partition, or a package shown as one device instead of several, from the device itself:
    where it does not fit, the answer is None. What PortNet appends to a processor's name after a comma is ignored.
    """
    name = name.split(",")[0]
    for device in devices():
        if device.claims(name):
            return device if memory is None or device.holds(memory) else None
    return None


def parse(text: str) -> tuple[DeviceData, ...]:
    """The devices that a TOML text describes. Raises `InputError` where it is incomplete or contradicts itself."""
    try:
        held = tomllib.loads(text)
        sources = {key: Source(**fields) for key, fields in held["sources"].items()}
        found = tuple(_device(fields, sources) for fields in held["device"])
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the table of devices cannot be read: {type(error).__name__}: {error}") from error
    for device in found:
        for name in device.names:
            others = [other for other in found if other is not device]
            owners = [other.name for other in others if name in other.names or other.claims(name)]
            if owners:
                raise InputError(f"the name {name!r} is claimed by {device.name} and by {', '.join(owners)}")
    return found


@cache
def _devices() -> tuple[DeviceData, ...]:
    return parse(resources.files("portnet").joinpath("devices.toml").read_text(encoding="utf-8"))


def _device(fields: Mapping[str, Any], sources: Mapping[str, Source]) -> DeviceData:
    parts = fields.get("parts", 1)
    rates, cycle = fields.get("rates", {}), fields.get("per_core_per_cycle", {})
    for precision in (*rates, *cycle):
        if precision not in PRECISIONS:
            raise UnknownName(f"precision of {fields['name']}", precision, PRECISIONS)
    bandwidth = fields.get("bandwidth")
    made = {
        "source": sources[fields["source"]],
        "names": tuple(fields["names"]),
        "rates": {precision: _figure(rate, parts, sources, UNITS) for precision, rate in rates.items()},
        "per_core_per_cycle": {precision: _figure(rate, 1, sources, UNITS) for precision, rate in cycle.items()},
        "bandwidth": None if bandwidth is None else _figure(bandwidth, parts, sources, ("",)),
        "memory": tuple(size * GIGABYTE / parts for size in fields.get("memory", [])),
    }
    return DeviceData(**{**fields, **made})


def _figure(fields: Mapping[str, Any], parts: int, sources: Mapping[str, Source], units: tuple[str, ...]) -> Figure:
    published = fields["value"]
    if fields.get("units", "") not in units:
        raise InputError(f"units must be one of {units}, got {fields.get('units')!r} in {fields}")
    value = published / parts / (2 if fields.get("sparse") else 1)
    return Figure(**{**fields, "value": value, "published": published, "source": sources[fields["source"]]})


def _plain(name: str) -> str:
    return " ".join(name.split()).casefold()
