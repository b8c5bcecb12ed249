"""From records to figures. Pure functions; every figure says what it was computed from by standing in its row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from portnet.record import Record, Spec

ORACLE = "reference"
"""The backend whose float64 records the others' losses are compared with."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One stack's figures; None where they were not measured, or void because a gate was not passed.

    `train` and `infer`: images per second, the median over blocks, with the least and the most beside it. `parity`:
    the largest share of the gate's allowance that any tensor used. `logits`: the logits' relative error against the
    float64 reference. `loss_distance`: the largest difference of the loss, over steps, from the reference's curve.
    """

    record: Record
    train: tuple[float, float, float] | None
    infer: tuple[float, float, float] | None
    parity: float | None
    logits: float | None
    first_loss: float | None
    last_loss: float | None
    loss_distance: float | None

    @property
    def spec(self) -> Spec:
        return self.record.spec


def rows(records: Sequence[Record]) -> list[Row]:
    """A row for every record, in their order."""
    return [_row(record, _oracle(record, records)) for record in records]


def throughput(record: Record, mode: str) -> tuple[float, float, float] | None:
    """Images per second of that mode: median, least and most over blocks. None unless the outcome lets it count."""
    timed = record.samples.get(mode)
    if record.outcome not in ("works", "partial") or not timed:
        return None
    rates = [timed["steps"] * timed["batch"] / seconds for seconds in timed["seconds"]]
    return median(rates), min(rates), max(rates)


def _oracle(record: Record, records: Sequence[Record]) -> Mapping[str, object]:
    """The curve that `record`'s can be held against: float64's of the same weights and training."""
    for other in records:
        if (
            other.spec.backend == ORACLE
            and other.spec.precision == "float64"
            and other.training
            and _same_training(other, record)
        ):
            return other.training
    return {}


def _same_training(one: Record, other: Record) -> bool:
    keys = ("preset", "classes", "data", "curve_size", "curve_batch", "curve_steps", "seed")
    return one.weights == other.weights and all(getattr(one.spec, k) == getattr(other.spec, k) for k in keys)


def _row(record: Record, oracle: Mapping[str, object]) -> Row:
    losses = record.training.get("losses") or []
    exact = oracle.get("losses")
    distance = None
    if isinstance(exact, list) and losses:
        distance = max(abs(a - b) for a, b in zip(losses, exact, strict=True))
    findings = record.gates.get("parity", {}).get("findings", [])
    logits = [f["error"] for f in findings if f["what"].startswith("infer()")]
    return Row(
        record=record,
        train=throughput(record, "train"),
        infer=throughput(record, "infer"),
        parity=max((f["error"] / f["allowed"] for f in findings if f["allowed"]), default=None),
        logits=max(logits, default=None),
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        loss_distance=distance,
    )
