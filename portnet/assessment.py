"""What a lock-in report shows, as data; `portnet.assess.assess` makes it from records.

A platform is a backend on a device. Closed division is held against closed; ``docs/lockin.md`` tells every figure in
words. What was not measured is a `Value` that says why, never a zero.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portnet.devices import DeviceData
from portnet.errors import InputError
from portnet.lockin import Figure
from portnet.record import Record

USUAL = "caffe, 227 pixels, 10 classes, digits"
"""The work that is measured unless another is asked for."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """A figure with its 95% interval and the SHA-256 of the records behind it; or None, and `why`.

    `note` says what must be known beside it: ``quick``, ``one process``, ``not side by side``.
    """

    figure: float | None = None
    low: float | None = None
    high: float | None = None
    why: str = "not measured"
    note: str = ""
    records: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Platform:
    """A backend on a device. `name` is the backend's, with the device's where the backend was measured on several.

    `absent`: why there is nothing of it, where its device was not there; that says nothing of its software.
    """

    name: str
    backend: str
    device: str
    vendor: str
    published: DeviceData | None
    software: Mapping[str, str]
    dates: tuple[str, ...]
    absent: str = ""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The work and the precision in which platforms are compared."""

    mode: str
    precision: str
    batch: int
    work: str
    """The model, its size and its data, as in ``caffe, 227 pixels, 10 classes, digits``."""

    @property
    def label(self) -> str:
        """Mode, precision and batch, and the work unless it is the usual one."""
        label = f"{self.mode}, {self.precision}, batch {self.batch}"
        return label if self.work == USUAL else f"{label}, {self.work}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One stack's figures on one problem, on its platform.

    `rate` is images/s. `relative` is the rate as a multiple of home's best closed stack on this problem. `efficiency`
    is the floor by the ceilings measured in the same process over the time taken, `published` the floor by the
    device's published peaks over it, and `of_published` the measured matrix product over the published peak.
    `application` is the rate as a share of the best stack's on the same platform and problem. `best`: whether it is the
    closed stack that stands for the platform on the problem.
    """

    platform: str
    problem: Problem
    figure: Figure
    closed: bool
    best: bool
    rate: Value
    relative: Value
    efficiency: Value
    published: Value
    of_published: Value
    application: Value

    @property
    def stack(self) -> str:
        return self.figure.spec.stack


@dataclass(frozen=True, kw_only=True)
class Against:
    """One platform against home on one problem: its best closed stack against home's.

    `throughput` and `efficiency` are multiples of home's; `published` the same by the published peaks.
    """

    platform: str
    problem: Problem
    here: str
    home: str
    throughput: Value
    efficiency: Value
    published: Value


@dataclass(frozen=True, kw_only=True)
class Portability:
    """Performance portability of one problem over the platform set: over all of it, and over those that support it.

    By the efficiency that `by` names: ``measured ceiling``, ``published peak`` or ``application``. `cascade` holds the
    platforms by falling efficiency.
    """

    problem: Problem
    by: str
    whole: Value
    supported: Value
    efficiencies: Mapping[str, Value]
    cascade: Sequence[tuple[str, float, float]]
    """Platform, its efficiency, and PP over it and all before it."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What works: one feature on one platform."""

    outcome: str
    reason: str = ""
    records: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """The outcome table: ``cells[feature][platform]``, and the share of home's working features that each retains."""

    cells: Mapping[str, Mapping[str, Cell]]
    retained: Mapping[str, Value]


@dataclass(frozen=True, kw_only=True)
class Share:
    """One library layer taken away: how many times as long a step takes without it."""

    platform: str
    problem: Problem
    stack: str
    layer: str
    slowdown: Value


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """How far a stack's numbers are from the float64 reference's.

    `gate`: the largest share of the parity gate's allowance. `logits`: their relative error. `loss`: the largest
    distance of the loss from the reference's in the same training, in nats. `worst`: the tensor that used most of the
    gate. `repeats`: 1 if the same steps give the same bits twice, 0 if not.
    """

    platform: str
    stack: str
    problem: Problem
    gate: Value
    logits: Value
    loss: Value
    worst: str
    repeats: Value


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What a serving user asks: latencies in seconds at batch 1, images/s by batch, bytes, bytes/s.

    `most`: the most images/s of the batches that are answered within the latency bound, a whole answer after the other:
    pictures to the device, logits back, and nothing of that at once. Costs are by it.
    """

    platform: str
    stack: str
    work: str
    p50: Value
    p90: Value
    p99: Value
    most: Value
    sweep: Sequence[tuple[int, float, float, float | None]]
    """Batch; seconds a batch, pictures on the device already, and images/s by that; seconds of a whole answer."""
    peak_memory: Value
    largest_batch: Value
    to_device: Value
    to_host: Value


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Training in several `processes` beside one: images/s, and of `efficiency` 1 is that many times one's rate.

    `way`: ``data``, the same batch for each, or ``towers``, the same batch for both together. `sent`: bytes that leave
    all processes together in a step. `bus`: of each collective operation alone, the best bus bandwidth in bytes/s, as
    nccl-tests defines it. Where the processes share `one_device`, all this is a functional check, and says nothing of
    an interconnect.
    """

    platform: str
    stack: str
    work: str
    way: str
    processes: int
    batch: int
    collectives: str
    one_device: bool
    outcome: str
    reason: str
    alone: Value
    together: Value
    efficiency: Value
    sent: Value
    bus: Sequence[tuple[str, Value]]

    @property
    def group(self) -> str:
        return f"{self.processes} processes, {self.way}, batch {self.batch}" + (" each" if self.way == "data" else "")

    @property
    def kind(self) -> str:
        """Its collective library, and whether it is a check and no figure."""
        return self.collectives + (": a functional check" if self.one_device else "")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Money, in the prices' currency, and joules.

    `million`: a million inferences, by `Serving.most`.
    `training`: 90 epochs of ImageNet's 1,281,167 images at the rate of training that was measured.
    """

    platform: str
    stack: str
    work: str
    million: Value
    training: Value
    joules: Value
    sensor: str


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of the stack as people argue about it, with a figure for each platform."""

    name: str
    question: str
    unit: str
    values: Mapping[str, Value]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of one platform: ``low``, ``moderate`` or ``high`` lock-in, or ``not measured``, and the figures that decided."""

    platform: str
    word: str
    sentence: str
    deciding: Sequence[tuple[str, Value]]


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What an hour of a device costs, by the platform's, the device's or the backend's name."""

    currency: str
    hour: Mapping[str, float]

    @classmethod
    def read(cls, path: Path) -> "Prices":
        """From a TOML file: ``currency``, and a table ``hour``. Raises `InputError` for what it cannot be."""
        try:
            held = tomllib.loads(path.read_text(encoding="utf-8"))
            hour = {str(k): float(v) for k, v in held["hour"].items()}
            currency = str(held["currency"])
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f'{path} holds no prices ({type(error).__name__}: {error}); expected: currency = "EUR", and below '
                '[hour] lines such as "NVIDIA H200" = 3.5'
            ) from error
        if wrong := [k for k, v in hour.items() if not 0 <= v < 1e6]:
            raise InputError(f"{path}: the price of {wrong[0]!r} is {hour[wrong[0]]}; expected 0 or more an hour")
        return cls(currency=currency, hour=hour)

    def of(self, platform: Platform) -> float | None:
        """The price of an hour there, or None."""
        return next((self.hour[n] for n in (platform.name, platform.device, platform.backend) if n in self.hour), None)


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """Everything a report shows. `home` is the platform that would be left; None where it was not measured."""

    home: str | None
    wanted: str
    platforms: Sequence[Platform]
    missing: Sequence[str]
    """Platforms that were asked for and have no record."""
    verdicts: Sequence[Verdict]
    stack: Sequence[Layer]
    entries: Sequence[Entry]
    against: Sequence[Against]
    portability: Sequence[Portability]
    outcomes: Outcomes
    ablation: Sequence[Share]
    numerics: Sequence[Numerics]
    serving: Sequence[Serving]
    scaling: Sequence[Scaling]
    costs: Sequence[Cost]
    currency: str
    latency: float
    divergence: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[Record] = ()
    problems: Sequence[str] = ()

    @property
    def quick(self) -> bool:
        """Whether any figure comes from quick measurements, which are not to be quoted."""
        return any(r.spec.quick for r in self.records)
