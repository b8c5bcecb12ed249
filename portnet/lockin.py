"""From records to figures. Pure functions; every figure says what it was computed from by standing in its row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import inf
from statistics import median
from typing import Any

from portnet.record import Record, Spec

ORACLE = "reference"
"""The backend whose float64 records the others' losses are compared with."""

COUNTED = ("works", "partial")
"""The outcomes whose speed counts."""
GATED = ("wrong", "dishonest clock", "unsteady")
"""The outcomes of a failed gate: the speed is void."""

TRAINING = ("preset", "classes", "data", "curve_size", "curve_batch", "curve_steps", "seed")
"""What must agree between two specs for their loss curves to be held against each other."""
WORK = (*TRAINING, "image_size", "batch")
"""What must agree between two specs for their speeds to be."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stack's figures; None where they were not measured, or void because a gate was not passed.

    `train` and `infer`: images per second, the median over blocks, with the least and the most beside it. `parity`:
    the largest share of the gate's allowance that any tensor used. `logits`: the logits' relative error against the
    float64 reference. `reference`: the record whose losses this one's are held against; it can be `record` itself.
    """

    record: Record
    reference: Record | None
    train: tuple[float, float, float] | None
    infer: tuple[float, float, float] | None
    parity: float | None
    logits: float | None

    @property
    def spec(self) -> Spec:
        return self.record.spec

    @property
    def losses(self) -> Sequence[float]:
        """The loss before each step, in nats; empty where training was not measured."""
        return self.record.training.get("losses") or ()

    @property
    def first_loss(self) -> float | None:
        return self.losses[0] if self.losses else None

    @property
    def last_loss(self) -> float | None:
        return self.losses[-1] if self.losses else None

    @property
    def distances(self) -> Sequence[float]:
        """|loss - the reference's loss| before each step; empty without a reference."""
        if self.reference is None:
            return ()
        return [abs(a - b) for a, b in zip(self.losses, self.reference.training["losses"], strict=True)]

    @property
    def loss_distance(self) -> float | None:
        """The largest of `distances`."""
        return max(self.distances, default=None)


def drift(records: Sequence[Record]) -> list[float]:
    """How far equals drift, by step: the largest loss difference of a run from its siblings begun one rounding away.

    From stacks that passed their gates; empty where no perturbed run was made.
    """
    differences = [
        [abs(a - b) for a, b in zip(record.training["losses"], run, strict=True)]
        for record in records
        if record.outcome in COUNTED
        for run in record.training.get("perturbed", ())
    ]
    return [max(step) for step in zip_longest(*differences, fillvalue=0.0)]


def spread(records: Sequence[Record]) -> float | None:
    """The largest of `drift`."""
    return max(drift(records), default=None)


def rows(records: Sequence[Record]) -> list[Row]:
    """A row for every record, in their order."""
    return [_row(record, records) for record in records]


def throughput(record: Record, mode: str) -> tuple[float, float, float] | None:
    """Images per second of that mode: median, least and most over blocks. None unless the outcome lets it count."""
    timed = record.samples.get(mode)
    if record.outcome not in COUNTED or not timed:
        return None
    rates = [timed["steps"] * timed["batch"] / seconds for seconds in timed["seconds"]]
    return median(rates), min(rates), max(rates)


def void(record: Record, mode: str) -> bool:
    """Whether the outcome took the speed of that mode away, rather than that it was never measured."""
    return record.outcome in GATED or (record.outcome not in COUNTED and bool(record.samples.get(mode)))


def same_work(records: Sequence[Record]) -> list[list[Record]]:
    """The records in groups that were given the same work, in the order of each group's first."""
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(getattr(record.spec, k) for k in WORK), []).append(record)
    return list(groups.values())


def _reference(record: Record, records: Sequence[Record]) -> Record | None:
    """The float64 record of the same weights and the same training, as far as `record`'s went."""
    length = len(record.training.get("losses") or ())
    for other in records:
        if (
            other.spec.backend == ORACLE
            and other.spec.precision == "float64"
            and 0 < length == len(other.training.get("losses") or ())
            and _same_training(other, record)
        ):
            return other
    return None


def _same_training(one: Record, other: Record) -> bool:
    same = all(getattr(one.spec, k) == getattr(other.spec, k) for k in TRAINING)
    return same and one.weights == other.weights != ""


def _share(finding: Mapping[str, Any]) -> float:
    """A tensor's error as a share of its allowance, as the gate itself counts it."""
    error, allowed = float(finding["error"]), float(finding["allowed"])
    if not error:
        return 0.0
    return error / allowed if allowed else inf


def _row(record: Record, records: Sequence[Record]) -> Row:
    findings = record.gates.get("parity", {}).get("findings", [])
    return Row(
        record=record,
        reference=_reference(record, records),
        train=throughput(record, "train"),
        infer=throughput(record, "infer"),
        parity=max(map(_share, findings), default=None),
        logits=max((f["error"] for f in findings if f["what"].startswith("infer()")), default=None),
    )
