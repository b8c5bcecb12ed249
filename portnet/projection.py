"""How long training on ImageNet takes a device at the least, by what its vendor publishes: the moat over time.

Pure functions. The floor of a step is the roofline of the graph (S. Williams et al., "Roofline", CACM 2009), layer by
layer: the FLOPs at the published dense peak or the least bytes at the published bandwidth, whichever takes longer,
summed. A floor is what no run goes below; an estimate is a floor over an efficiency that somebody measured or assumes.
What is not published is None, and nothing stands in for it.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache
from math import isfinite
from typing import Any

from portnet import alexnet, devices, lockin, stats
from portnet.devices import PRECISIONS, DeviceData
from portnet.errors import InputError
from portnet.graph import ITEMSIZE, Cost
from portnet.record import Record

IMAGES = 1_281_167
"""Training images of ILSVRC-2012 [O. Russakovsky et al., "ImageNet large scale visual recognition challenge", 2015]."""
EPOCHS = 90
"""The paper's "roughly 90 cycles through the training set" [Krizhevsky, Sutskever, Hinton, NIPS 2012]."""
MOST = 10**6
"""Epochs and devices beyond this are a slip of the finger."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, kw_only=True)
class Work:
    """Training of a preset on ImageNet; forward, backward and update. Raises `InputError` for what is no training."""

    preset: str = "paper2012"
    batch: int = 128
    epochs: int = EPOCHS

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= IMAGES:
            raise InputError(f"a batch of {self.batch}; expected 1 to {IMAGES:,}, the images of an epoch")
        if not 1 <= self.epochs <= MOST:
            raise InputError(f"{self.epochs} epochs; expected 1 to {MOST:,}")
        alexnet.graph(self.preset)  # for its error

    @property
    def steps(self) -> int:
        """Full batches; what is left of an epoch is dropped, as `portnet train` does."""
        return self.epochs * (IMAGES // self.batch)

    def costs(self, precision: str) -> list[Cost]:
        """The least FLOPs and bytes of each layer in one step."""
        return _costs(self.preset, self.batch, ITEMSIZE[precision])


@dataclass(frozen=True, kw_only=True)
class Projection:
    """`work` on `count` equal devices in one precision; all times in seconds.

    Several devices share every layer's FLOPs and bytes evenly and exchange nothing: perfect scaling, which no run has.
    """

    device: DeviceData
    count: int
    precision: str
    work: Work

    @property
    def rate(self) -> devices.Figure | None:
        """The published dense peak of one device, and whether matrix or vector units reach it."""
        return self.device.rates.get(self.precision)

    @property
    def step(self) -> float | None:
        """The floor of one step."""
        return sum(max(terms) for terms in self._layers) / self.count if self._layers else None

    @property
    def floor(self) -> float | None:
        """The floor of the whole run."""
        return None if self.step is None else self.step * self.work.steps

    @property
    def arithmetic(self) -> float | None:
        """The run's FLOPs at the peak and nothing else; what model FLOPs utilisation is the share of."""
        return sum(flops for flops, _ in self._layers) / self.count * self.work.steps if self._layers else None

    @property
    def moving(self) -> float | None:
        """The share of the floor that lies in layers bound by the bandwidth."""
        return sum(b for f, b in self._layers if b > f) / self.count / self.step if self.step else None

    def estimate(self, efficiency: float) -> float | None:
        """The run's time at that share of the floor's speed. Raises `InputError` unless it is above 0, and finite."""
        if not (isfinite(efficiency) and efficiency > 0):
            raise InputError(f"an efficiency of {efficiency}; expected a share such as 0.5")
        return None if self.floor is None else self.floor / efficiency

    def implied(self, took: float) -> float | None:
        """The architectural efficiency of a run that took so long, by the published peaks: floor over time."""
        return None if self.floor is None else self.floor / took

    def utilisation(self, took: float) -> float | None:
        """Model FLOPs utilisation of that run [A. Chowdhery et al., "PaLM", 2022]: its FLOPs over peak times time."""
        return None if self.arithmetic is None else self.arithmetic / took

    @property
    def _layers(self) -> list[tuple[float, float]]:
        """Seconds of each layer on one device: its FLOPs at the peak, its bytes at the bandwidth."""
        if self.rate is None or self.device.bandwidth is None:
            return []
        rate, bandwidth = self.rate.value, self.device.bandwidth.value
        return [(cost.flops / rate, cost.bytes / bandwidth) for cost in self.work.costs(self.precision)]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What records say of a stack that trains on a device.

    `published` is its efficiency by the published peaks, of which a projection is made; `ceiling` that by the ceilings
    measured in the same process, None where they were not measured. `like` says whether preset, image size and
    batch are those of the projection: where they are not, the efficiency is carried over to other work.
    """

    figure: lockin.Figure
    published: stats.Interval
    like: bool

    @property
    def ceiling(self) -> stats.Interval | None:
        return self.figure.efficiency


def project(name: str, work: Work, *, precision: str | None = None, count: int = 1) -> list[Projection]:
    """The device's floors, one for each precision, or for the one that is asked for. Raises `InputError`."""
    return of(named(name), work, precision=precision, count=count)


def of(device: DeviceData, work: Work, *, precision: str | None = None, count: int = 1) -> list[Projection]:
    """The same for a device of the table."""
    if not 1 <= count <= MOST:
        raise InputError(f"{count} devices; expected 1 to {MOST:,}")
    chosen = PRECISIONS if precision is None else (precision,)
    return [Projection(device=device, count=count, precision=p, work=work) for p in chosen]


def over_time(work: Work, *, precision: str | None = None, count: int = 1) -> list[list[Projection]]:
    """Every device of the table, in the order of year and name."""
    ordered = sorted(devices.devices(), key=lambda device: (device.year, device.name))
    return [of(device, work, precision=precision, count=count) for device in ordered]


def fastest(projections: Sequence[Projection]) -> Projection | None:
    """The one of the lowest floor, the first where several have it; None where no floor is known."""
    known = [p for p in projections if p.floor is not None]
    return min(known, key=lambda p: p.floor or 0, default=None)


def named(name: str) -> DeviceData:
    """The device of that name, in whatever case: the table's or a driver's, or words that stand in one name only.

    Raises `InputError` with near names where there is none, or more than one: a variant has other rates.
    """
    table = devices.devices()
    words = _words(name)
    for device in table:
        if _words(device.name) == words:
            return device
    if claimed := [device for device in table if device.claims(name)]:
        return claimed[0]
    fitting = [device for device in table if words and set(words) <= set(_words(device.name))]
    if len(fitting) == 1:
        return fitting[0]
    near = [d.name for d in fitting] or _near(name)
    told = f"did you mean {' or '.join(near)}? " if near else ""
    more = "more than one device has that name" if fitting else "not known"
    raise InputError(f"device {name!r:.80}: {more}; {told}'portnet project --all' lists every device that is known")


def measured(records: Sequence[Record], device: DeviceData, work: Work, precision: str) -> list[Measured]:
    """What the records hold of AlexNet's training on that device in that precision, with nothing taken away.

    Void and missing speeds are left out, and so is a user's own model: its efficiency is not AlexNet's.
    """
    found = []
    for figure in lockin.figures(records):
        spec, first = figure.spec, figure.records[0]
        if spec.mode != "train" or spec.without or spec.model or figure.published is None:
            continue
        if first.effective.get("precision", spec.precision) != precision:
            continue
        if devices.find(first.device.get("name") or "", first.device.get("memory")) is not device:
            continue
        # Fewer classes are let pass: ten instead of a thousand spare fc8's 0.6% of the work.
        size = alexnet.graph(work.preset).input[1]
        like = (spec.preset, spec.image_size, spec.batch) == (work.preset, size, work.batch)
        found.append(Measured(figure=figure, published=figure.published, like=like))
    return found


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A floor over an efficiency by the published peaks: `seconds`, with ends where the efficiency has an interval.

    `measured` is None where the efficiency is assumed. No estimate is a measurement: input, checkpoints and evaluation
    are not in it, nor what several devices have to exchange.
    """

    projection: Projection
    measured: Measured | None
    efficiency: float
    seconds: float
    low: float | None = None
    high: float | None = None


def estimates(
    projection: Projection, records: Sequence[Record] = (), *, efficiency: float | None = None
) -> list[Estimate]:
    """From an assumed efficiency and from what was measured, as far as there is a floor."""
    found = []
    if efficiency is not None and (assumed := projection.estimate(efficiency)) is not None:
        found.append(Estimate(projection=projection, measured=None, efficiency=efficiency, seconds=assumed))
    for one in measured(records, projection.device, projection.work, projection.precision):
        share = one.published
        took = projection.estimate(share.figure)
        if took is None:
            continue
        # The most efficient is the quickest.
        low = projection.estimate(share.high) if share.high else None
        high = projection.estimate(share.low) if share.low else None
        found.append(
            Estimate(projection=projection, measured=one, efficiency=share.figure, seconds=took, low=low, high=high)
        )
    return found


def told(
    projections: Sequence[Sequence[Projection]],
    records: Sequence[Record] = (),
    *,
    efficiency: float | None = None,
    took: Sequence[float] = (),
) -> dict[str, Any]:
    """All of it as one JSON-ready mapping; `projections` are a device's each. None is what is not known."""
    first = projections[0][0]
    work, scaled = asdict(first.work), None if first.count == 1 else "perfect scaling assumed: nothing is exchanged"
    return {
        "work": {**work, "images": IMAGES, "steps": first.work.steps},
        "count": first.count,
        "scaling": scaled,
        "devices": [
            {
                "name": own[0].device.name,
                "vendor": own[0].device.vendor,
                "year": own[0].device.year,
                "bandwidth": asdict(own[0].device.bandwidth) if own[0].device.bandwidth else None,
                "projections": [
                    {
                        "precision": p.precision,
                        "peak": asdict(p.rate) if p.rate else None,
                        "step": p.step,
                        "floor": p.floor,
                        "arithmetic": p.arithmetic,
                        "moving": p.moving,
                        "estimates": [_estimated(e) for e in estimates(p, records, efficiency=efficiency)],
                        "implied": [
                            {"took": t, "efficiency": p.implied(t), "utilisation": p.utilisation(t)} for t in took
                        ],
                    }
                    for p in own
                ],
            }
            for own in projections
        ],
    }


def _estimated(estimate: Estimate) -> dict[str, Any]:
    ends = {"low": estimate.low, "high": estimate.high}
    held = {"seconds": estimate.seconds, **ends, "efficiency": estimate.efficiency, "of": "published peaks"}
    if (one := estimate.measured) is None:
        return {"efficiency_is": "assumed", **held}
    spec = one.figure.spec
    return {
        "efficiency_is": "measured",
        **held,
        "efficiency_of_ceilings": one.ceiling.figure if one.ceiling else None,
        "stack": spec.stack,
        "preset": spec.preset,
        "batch": spec.batch,
        "carried_over": not one.like,
        "quick": spec.quick,
        "processes": one.published.count,
        "records": [record.digest for record in one.figure.records],
    }


def seconds(text: str) -> float:
    """``5d``, ``5.5d``, ``120h``, ``90m`` or ``30s`` in seconds. Raises `InputError`."""
    parts = re.fullmatch(r"(\d+\.?\d*|\.\d+)([smhd])", text.strip(), re.ASCII)
    value = float(parts[1]) * _UNITS[parts[2]] if parts else 0.0
    if not 0 < value < 1e12:
        raise InputError(f"{text!r:.40} is no time; expected one such as 5d, 5.5d, 120h or 90m")
    return value


@cache
def _costs(preset: str, batch: int, itemsize: int) -> list[Cost]:
    return list(alexnet.graph(preset).costs(batch, training=True, itemsize=itemsize).values())


def _words(name: str) -> list[str]:
    return re.findall(r"[^\s,]+", name.casefold())


def _near(name: str) -> list[str]:
    """Names with a similar word in them, the most similar first."""
    known = {device.name.casefold(): device.name for device in devices.devices()}
    found = get_close_matches(name.casefold(), known, n=3, cutoff=0.6)
    for word in _words(name):
        found += [key for key in known if any(get_close_matches(word, _words(key), n=1, cutoff=0.75))]
    return [known[key] for key in dict.fromkeys(found)][:4]
