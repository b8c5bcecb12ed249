"""From records to figures. Pure functions; every figure says what it was computed from by standing in its row."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import inf
from statistics import median
from typing import Any

from portnet import devices, stats
from portnet.record import OUTCOMES, Record, Spec

ORACLE = "reference"
"""The backend whose float64 records the others' losses are compared with."""

COUNTED = ("works", "partial")
"""The outcomes whose speed counts."""
GATED = ("wrong", "dishonest clock", "unsteady")
"""The outcomes of a failed gate: the speed is void."""

CROWDED = 0.25
"""Of the processors: above it, what others kept busy is told beside a figure, and no clock is called dishonest. An
honest one looked so at 0.75, and there is no figure either way."""
ABSENT = ("not available", "not measured")
"""The outcomes of what was not tried."""

TRAINING = ("model", "preset", "classes", "data", "curve_size", "curve_batch", "curve_steps", "seed")
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


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What the processes of one stack, in one mode, on one piece of work and one device came to.

    `records`: the processes; those of rejected rounds, of which there are `rejected` more, are not among them unless
    there are no others. `outcome`: of all of them. `rate`: images per second, with its interval over processes.
    `floor`: seconds a step that the device cannot go below by the ceilings measured in the same process, with nothing
    of the vendor's software taken away; over the time a step took, it is the architectural `efficiency`. `published`:
    the same by the peaks that the device's vendor publishes. `of_published`: the share of the published dense peak that
    the measured matrix product reached. None is what was not measured, is not known, or is void.
    """

    records: tuple[Record, ...]
    rejected: int
    outcome: str
    reason: str
    rate: stats.Interval | None
    floor: float | None
    efficiency: stats.Interval | None
    published: stats.Interval | None
    of_published: float | None

    @property
    def spec(self) -> Spec:
        return self.records[0].spec

    @property
    def detailed(self) -> Record:
        """The process that also timed layers and whole steps, the first of its series; or else any that knows layers.

        Records that were read from a folder come in the order of their hashes.
        """
        timed = (r for r in self.records if any(x.get("forward") is not None for x in r.layers.values()))
        return next(timed, next((r for r in self.records if r.layers), self.records[0]))


def figures(records: Sequence[Record]) -> list[Figure]:
    """One for each stack, mode, piece of work and device, in the order of their first records."""
    return [_figure(group) for group in _groups(records, lambda spec: replace(spec, blocks=0, perturbed=0))]


def timed_rate(timed: Mapping[str, Any]) -> float:
    """Images per second of the blocks of one round, an entry of ``rounds`` in `portnet.record.Record.scaling`."""
    return float(timed["batch"] * timed["steps"] / median(timed["seconds"]))


BUS: Mapping[str, Callable[[int], float]] = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "send_recv": lambda n: 1.0,
}
"""What of an operation's bytes crosses the busiest link of n processes."""


def bus_bandwidth(operation: str, processes: int, timed: Mapping[str, Any]) -> float:
    """Bytes per second of a collective operation, as nccl-tests defines bus bandwidth (doc/PERFORMANCE.md there).

    That is its bytes by the time they take, times what of them crosses the busiest link: so that it can be held against
    a link's own, whatever the operation and the number of processes. `timed` is one entry of ``operations`` in
    `portnet.record.Record.scaling`.
    """
    return float(BUS[operation](processes) * timed["bytes"] / median(timed["seconds"]))


def _groups(records: Sequence[Record], same: Any) -> Iterator[list[Record]]:
    found: dict[tuple[object, ...], list[Record]] = {}
    places: dict[object, object] = {}

    def place(record: Record) -> str:
        versions = (record.device.get("versions"), record.environment.get("versions"))
        return repr((record.device.get("name"), record.environment.get("host"), versions))

    for record in records:
        if record.device:
            places.setdefault((same(record.spec), record.round.get("series")), place(record))
    for record in records:
        # One whose process was lost has no device; it belongs to those of its series that had.
        where = place(record) if record.device else places.get((same(record.spec), record.round.get("series")), "")
        found.setdefault((same(record.spec), where), []).append(record)
    yield from found.values()


def _figure(group: Sequence[Record]) -> Figure:
    mode = group[0].spec.mode
    # Failures stay, whatever became of their round.
    kept = tuple(r for r in group if not r.round.get("rejected") or r.outcome not in (*COUNTED, "unsteady"))
    if not kept:
        return Figure(
            records=tuple(group),
            rejected=0,
            outcome="not measured",
            reason="every round was rejected, for the host's speed had changed",
            rate=None,
            floor=None,
            efficiency=None,
            published=None,
            of_published=None,
        )
    outcome, reason = _joint(kept, mode)
    timed = [r for r in kept if r.samples.get(mode)] if outcome in COUNTED else []
    seconds = [median(r.samples[mode]["seconds"]) / r.samples[mode]["steps"] for r in timed]
    layers = next((r.layers for r in kept if r.layers), {})
    floors = [floor(layers, best(r.ceilings)) for r in timed]
    shares = [f / s for f, s in zip(floors, seconds, strict=True) if f is not None]
    # One whose process was lost knows of no device.
    first = next((r for r in kept if r.device), kept[0])
    device = devices.find(first.device.get("name") or "", first.device.get("memory"))
    peak = device.peak(first.effective.get("precision", first.spec.precision)) if device else None
    rates = [f for r in timed if (f := best(r.ceilings).get("flops"))]
    bandwidth = device.bandwidth.value if device and device.bandwidth else None
    least = floor(layers, {"flops": peak, "bandwidth": bandwidth})
    return Figure(
        records=kept,
        rejected=len(group) - len(kept),
        outcome=outcome,
        reason=reason,
        rate=stats.interval([r.samples[mode]["batch"] / s for r, s in zip(timed, seconds, strict=True)])
        if timed
        else None,
        floor=median(f for f in floors if f is not None) if shares else None,
        efficiency=stats.interval(shares) if shares else None,
        published=stats.interval([least / s for s in seconds]) if least and seconds else None,
        of_published=median(rates) / peak if rates and peak else None,
    )


def floor(layers: Mapping[str, Any], ceilings: Mapping[str, Any]) -> float | None:
    """Seconds: each layer's least FLOPs or bytes at the ceiling's rate, whichever takes longer, summed."""
    flops, bandwidth = ceilings.get("flops"), ceilings.get("bandwidth")
    if not (layers and flops and bandwidth):
        return None
    return sum(max(float(x["flops"] / flops), float(x["bytes"] / bandwidth)) for x in layers.values())


def best(ceilings: Mapping[str, Any]) -> dict[str, float | None]:
    """The better of the rates at both ends of a process: what held the device up then is no ceiling."""
    ends = [ceilings, ceilings.get("after") or {}]
    return {k: max((e[k] for e in ends if e.get(k)), default=None) for k in ("flops", "bandwidth")}


def _joint(records: Sequence[Record], mode: str) -> tuple[str, str]:
    """The outcome of several processes: the worst. That it is unsteady is told by all of them together."""
    # What came to no trial, as on a machine that was crowded for a while, says nothing against the others; a device
    # that was there for few of them does.
    records = [r for r in records if r.outcome != "not measured"] or records
    bad = [r for r in records if r.outcome not in (*COUNTED, "unsteady")]
    if 2 * sum(r.outcome in ABSENT for r in bad) < len(records):
        bad = [r for r in bad if r.outcome not in ABSENT]
        records = [r for r in records if r.outcome not in ABSENT]
    if bad:
        worst = min(bad, key=lambda r: _SEVERITY.index(r.outcome))
        return worst.outcome, worst.reason
    changes = [1 + t["change"] for r in records if (t := r.gates.get("trend")) and t.get("low") is not None]
    if len(changes) > 1:
        drifts = stats.interval(changes)
        own = sum(r.outcome == "unsteady" for r in records)
        together = drifts.low is not None and drifts.high is not None and (drifts.low > 1.01 or drifts.high < 0.99)
        if together or 2 * own > len(records):
            return (
                "unsteady",
                f"over its blocks the time changed by {drifts.figure - 1:+.1%} in {len(changes)} processes",
            )
    elif any(r.outcome == "unsteady" for r in records):
        return "unsteady", next(r.reason for r in records if r.outcome == "unsteady")
    for record in records:
        if fallen := record.gates.get("fallbacks", {}).get("operations"):
            return "partial", f"operations ran elsewhere than on the device: {', '.join(sorted(fallen))}"
    return "works", ""


_SEVERITY = ("wrong", "dishonest clock", "failed", "out of memory", "timeout", "not available", "not measured")
assert {*_SEVERITY, *COUNTED, "unsteady"} == set(OUTCOMES)


def compare(a: Figure, b: Figure) -> stats.Comparison | None:
    """How many times as long `b` takes as `a`, over the rounds in which both were timed side by side.

    None where either has no figure, or they never were.
    """
    if a.rate is None or b.rate is None:
        return None

    def rounds(figure: Figure) -> dict[tuple[str, int], list[float]]:
        mode = figure.spec.mode
        return {
            (r.round["series"], r.round["number"]): [s / r.samples[mode]["steps"] for s in r.samples[mode]["seconds"]]
            for r in figure.records
            if {"series", "number"} <= r.round.keys() and r.samples.get(mode)
        }

    one, other = rounds(a), rounds(b)
    both = sorted(one.keys() & other.keys())
    return stats.compare([one[k] for k in both], [other[k] for k in both]) if both else None


def crowd(records: Sequence[Record]) -> tuple[float, int] | None:
    """The most processors that others kept busy while one of these was timed, and of how many; None where few were."""
    seen = [r.watch["foreign_cpu"] for r in records if isinstance(r.watch.get("foreign_cpu"), dict)]
    busy = [(float(s["foreign"]), int(s["of"])) for s in seen if s.get("foreign") and s.get("of")]
    return max((b for b in busy if b[0] > CROWDED * b[1]), default=None)


def merge(records: Sequence[Record]) -> list[Record]:
    """The modes and rounds of a stack as one record, to be shown in one row; it is no measurement of its own."""
    merged = []
    for group in _groups(records, lambda spec: replace(spec, mode="", blocks=0, perturbed=0)):
        if len(group) == 1:
            merged.append(group[0])
            continue
        parts = figures(group)
        bad = [p for p in parts if p.outcome not in COUNTED]
        chosen = bad[0] if bad else next((p for p in parts if p.outcome == "partial"), parts[0])
        trained = next((r for r in group if r.training), group[0])
        findings = [f for p in parts for f in p.records[0].gates.get("parity", {}).get("findings", [])]
        samples: dict[str, Any] = {}
        for part in parts:
            for r in part.records:
                for mode, timed in r.samples.items():
                    into = samples.setdefault(mode, {**timed, "seconds": []})
                    into["seconds"] += [s * into["steps"] / timed["steps"] for s in timed["seconds"]]
        gates = {**trained.gates, "parity": {**trained.gates.get("parity", {}), "findings": findings}}
        merged.append(
            replace(
                trained,
                outcome=chosen.outcome,
                reason=chosen.reason,
                remedy=chosen.records[0].remedy,
                gates=gates if findings or trained.gates else {},
                answers=next((r.answers for r in group if r.answers), {}),
                samples=samples,
            )
        )
    return merged


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


def share(finding: Mapping[str, Any]) -> float:
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
        parity=max(map(share, findings), default=None),
        logits=max((f["error"] for f in findings if f["what"].startswith("infer()")), default=None),
    )
