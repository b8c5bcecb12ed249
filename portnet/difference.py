"""Which figures moved between two sets of records: before and after another driver, another library, another commit.

Pure functions. What is compared is the same stack in the same mode on the same work and device; versions may differ,
which is mostly the reason to compare. Two sets are seldom timed side by side: then nothing that the machine did to both
cancels, and the interval over processes is the wider one of `stats.welch`.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import isfinite
from statistics import median
from typing import Any, Literal

from portnet import lockin, stats
from portnet.errors import InputError
from portnet.lockin import COUNTED, Figure, Row
from portnet.record import Record, Spec
from portnet.stats import Comparison, Interval

MARGIN = stats.MARGIN - 1
"""By more than this share a figure has to be worse, with certainty, to count."""

Better = Literal["higher", "lower"]
Verdict = Literal["different", "equivalent", "inconclusive", "gone", "new"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One figure of a pair, over processes; None on a side where it was not measured, or is void.

    `ratio` is NEW's over OLD's, in the figure's own sense: of images/s, below 1 is slower. `counts` says whether it is
    for the worse where it moved that way; what does not count is told, since it explains or depends on more than the
    stack. `beyond` a gate's allowance of 1 counts whatever the interval is.
    """

    name: str
    unit: str
    better: Better
    old: Interval | None
    new: Interval | None
    ratio: Comparison | None = None
    counts: bool = True
    beyond: bool = False

    @property
    def verdict(self) -> Verdict:
        if self.new is None:
            return "gone"
        if self.old is None:
            return "new"
        return self.ratio.verdict if self.ratio else "inconclusive"

    @property
    def side_by_side(self) -> bool:
        return self.ratio is not None and self.ratio.rounds > 0

    @property
    def direction(self) -> Literal["better", "worse", ""]:
        """Which way it moved; empty unless it is `different`."""
        if self.verdict != "different" or self.ratio is None:
            return ""
        return "better" if (self.ratio.ratio > 1) == (self.better == "higher") else "worse"

    def worse(self, margin: float = MARGIN) -> bool:
        """Whether it counts as having got worse: with certainty by more than `margin`, or beyond its gate."""
        if self.beyond:
            return True
        if not self.counts or self.direction != "worse" or self.ratio is None:
            return False
        if self.ratio.low is None or self.ratio.high is None:
            return False
        return self.ratio.high < 1 / (1 + margin) if self.better == "higher" else self.ratio.low > 1 + margin


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One stack's figures in both sets. `versions`: what differs between them, by name, as (OLD, NEW).

    `host`: the times of the host's probe in NEW over those in OLD, where they are further apart than the two sides of a
    round may be; intervals then reach over what that alone would do.
    """

    old: Figure
    new: Figure
    versions: Mapping[str, tuple[str, str]]
    host: float | None
    changes: tuple[Change, ...]

    @property
    def spec(self) -> Spec:
        return self.new.spec

    @property
    def device(self) -> str:
        return _device(self.old) or _device(self.new)

    @property
    def outcome_worse(self) -> bool:
        """Whether NEW's outcome is of a worse kind: `works`, then `partial`, then whatever has no figure.

        A round that was not to be used is `not measured`: that is not worse, and its figures are gone.
        """
        return self.new.outcome != "not measured" and _rank(self.new.outcome) > _rank(self.old.outcome)

    def worse(self, margin: float = MARGIN) -> list[str]:
        """What has got worse, by name."""
        return ["outcome"] * self.outcome_worse + [c.name for c in self.changes if c.worse(margin)]


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Figures that could not be paired, and why: which of them should stand for its set is the user's to say."""

    old: tuple[Figure, ...]
    new: tuple[Figure, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two sets of records. `gone` is in OLD only, `new` in NEW only: neither is zero, and of both only a new failure is
    worse."""

    pairs: tuple[Pair, ...]
    gone: tuple[Figure, ...]
    new: tuple[Figure, ...]
    mixed: tuple[Mixed, ...]

    @property
    def failures(self) -> tuple[Figure, ...]:
        """What is in NEW only, was tried there, and has no figure."""
        absent = ("not available", "not measured")
        return tuple(f for f in self.new if f.outcome not in (*COUNTED, *absent))

    def worse(self, margin: float = MARGIN) -> bool:
        return bool(self.failures) or any(pair.worse(margin) for pair in self.pairs)


def difference(old: Sequence[Record], new: Sequence[Record]) -> Difference:
    """Compare two sets. Raises `InputError` where they have nothing in common: no pair would be no good news."""
    for name, records in (("OLD", old), ("NEW", new)):
        if not records:
            raise InputError(f"{name} holds no record that can be read; name a folder that 'portnet measure' wrote to")
    before, after = lockin.figures(old), lockin.figures(new)
    matched, mixed = _matched(before, after)
    taken = {id(f) for one, other in matched for f in (one, other)}
    taken |= {id(f) for m in mixed for f in (*m.old, *m.new)}
    gone = tuple(f for f in before if id(f) not in taken)
    fresh = tuple(f for f in after if id(f) not in taken)
    if not matched and not mixed:
        raise InputError(
            "nothing is in both: no stack in the same mode, on the same work and device; "
            f"OLD has {_told(before)}, and NEW {_told(after)}"
        )
    # By the record itself: one that is in both sets may have a reference in one of them only.
    rows = {id(row.record): row for records in (old, new) for row in lockin.rows(records)}
    pairs = []
    for one, other in matched:
        shared = {r.digest for r in one.records} & {r.digest for r in other.records}
        if shared and not len(shared) == len(one.records) == len(other.records):
            told = f"{len(shared)} of its records are in both sets: name sets that have none in common"
            mixed.append(Mixed(old=(one,), new=(other,), reason=told))
            continue
        pairs.append(_pair(one, other, rows))
    return Difference(pairs=tuple(pairs), gone=gone, new=fresh, mixed=tuple(mixed))


def _matched(before: Sequence[Figure], after: Sequence[Figure]) -> tuple[list[tuple[Figure, Figure]], list[Mixed]]:
    """Figures of the same stack, mode, work and device, in the order of OLD: the likest first, and never by guess."""

    def work(figure: Figure) -> Spec:
        return replace(figure.spec, blocks=0, perturbed=0)

    # Of several with the same key on a side none is taken, but what is left of them may be one under the next key.
    keys: list[Callable[[Figure], object]] = [
        lambda f: (work(f), _device(f), repr(_software(f))),
        lambda f: (work(f), _device(f)),
        lambda f: (replace(work(f), quick=False), _device(f)),
    ]
    found: list[tuple[Figure, Figure]] = []
    left = [list(before), list(after)]

    def take(key: Callable[[Figure], object], usable: Callable[[Figure, Figure], bool] = lambda a, b: True) -> None:
        sides: list[dict[object, list[Figure]]] = [{}, {}]
        for side, figures in zip(sides, left, strict=True):
            for figure in figures:
                side.setdefault(key(figure), []).append(figure)
        for name, ones in sides[0].items():
            others = sides[1].get(name, [])
            if len(ones) == len(others) == 1 and usable(ones[0], others[0]):
                found.append((ones[0], others[0]))
                left[0].remove(ones[0])
                left[1].remove(others[0])

    for key in keys:
        take(key)

    def nameless(figure: Figure) -> Spec:
        return replace(work(figure), quick=False)

    # A device that is not there any more, or not yet, has no name.
    take(nameless, lambda a, b: not (_device(a) and _device(b)))
    mixed: list[Mixed] = []

    def mix(key: Callable[[Figure], object], usable: Callable[[Sequence[Figure]], bool]) -> None:
        for name in dict.fromkeys(map(key, left[0])):
            ones, others = (tuple(f for f in side if key(f) == name) for side in left)
            if others and usable((*ones, *others)):
                told = f"{len(ones)} figures of it in OLD and {len(others)} in NEW: name the records of one each"
                mixed.append(Mixed(old=ones, new=others, reason=told))
                for side in left:
                    side[:] = [f for f in side if key(f) != name]

    mix(keys[-1], lambda figures: True)
    mix(nameless, lambda figures: not all(map(_device, figures)))
    order = {id(f): i for i, f in enumerate(before)}
    return sorted(found, key=lambda pair: order[id(pair[0])]), mixed


def _pair(old: Figure, new: Figure, rows: Mapping[int, Row]) -> Pair:
    was, now = _software(old), _software(new)
    versions = {
        name: (was.get(name, "none"), now.get(name, "none"))
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name)
    }
    probes = [[median(r.round["probe"]) for r in f.records if r.round.get("probe")] for f in (old, new)]
    host = None
    if all(probes) and not stats.same_machine(probes[0], probes[1]):
        host = median(probes[1]) / median(probes[0])
    return Pair(old=old, new=new, versions=versions, host=host, changes=tuple(_changes(old, new, rows, host)))


def _changes(old: Figure, new: Figure, rows: Mapping[int, Row], host: float | None) -> Iterator[Change]:
    mode = new.spec.mode

    def change(
        name: str,
        unit: str,
        better: Better,
        value: Callable[[Record], Any],
        *,
        timed: bool = True,
        counts: bool = True,
        gate: bool = False,
    ) -> Iterator[Change]:
        """One figure, of every process that has it. `timed`: the host's speed can change it. `gate`: it is what a gate
        is judged by, of which 1 is allowed, and so not void where the outcome voids the others."""
        sides = [
            [float(v) for r in f.records if _number(v := value(r))] if gate or f.outcome in COUNTED else []
            for f in (old, new)
        ]
        if not any(sides):
            return
        beyond = gate and max(sides[1], default=0.0) > 1 >= max(sides[0], default=0.0)
        ratio = _compared(*sides) if all(sides) else None
        if ratio and timed and host:
            ratio = _widened(ratio, host if better == "lower" else 1 / host)
        one, other = (_interval(side) if side else None for side in sides)
        yield Change(name=name, unit=unit, better=better, old=one, new=other, ratio=ratio, counts=counts, beyond=beyond)

    def speed(record: Record) -> float | None:
        timed = record.samples.get(mode)
        return timed["batch"] * timed["steps"] / median(timed["seconds"]) if timed else None

    for found in change("speed", "images/s", "higher", speed):
        beside = lockin.compare(old, new) if found.ratio else None
        yield replace(found, ratio=_inverse(beside)) if beside else found
    for percent in ("p50", "p90", "p99"):
        yield from change(f"{percent} latency at batch 1", "s", "lower", partial(_served, name=percent))
    for batch in _batches(old, new):
        yield from change(f"speed at batch {batch}", "images/s", "higher", partial(_swept, batch=batch))
    # The best that the two sets have in common: more memory for a larger batch is no change.
    common = [b for b in _batches(old) if b in _batches(new)]
    memory = common[-1] if common else None
    where = f" at batch {memory}" if memory else ""
    yield from change(f"peak memory{where}", "bytes", "lower", lambda r: _memory(r, memory), timed=False)
    yield from change(
        "peak memory of the process", "bytes", "lower", lambda r: r.watch.get("peak_memory"), timed=False, counts=False
    )
    yield from change(
        "largest batch that fits", "images", "higher", partial(_served, name="largest_batch"), timed=False,
        counts=False,
    )  # fmt: skip
    yield from change("efficiency", "of the measured ceilings", "higher", _efficiency, timed=False, counts=False)
    for cold in (True, False):
        kept = "cold" if cold else "warm"
        yield from change(
            f"time to the first step, {kept} caches", "s", "lower", partial(_first, cold=cold), counts=False
        )

    def parity(record: Record) -> float | None:
        share = rows[id(record)].parity
        return None if share is None else min(share, _NOT_FINITE)

    def curve(record: Record) -> Any:
        return record.gates.get("curve", {}).get("share")

    for name, share in (("parity gate used", parity), ("training curve's gate used", curve)):
        yield from change(name, "of the allowance", "lower", share, timed=False, counts=False, gate=True)
    yield from change("loss distance", "nats", "lower", lambda r: rows[id(r)].loss_distance, timed=False, counts=False)


_NOT_FINITE = 1e300
"""What a record holds for an error that is not finite."""


def _number(value: object) -> bool:
    """What a vendor's session counts, such as memory, can be anything in a record."""
    return type(value) in (int, float)


def _compared(old: Sequence[float], new: Sequence[float]) -> Comparison | None:
    """NEW over OLD; None where a value has no logarithm, and so the two no ratio."""
    if not all(isfinite(v) and v > 0 for v in (*old, *new)):
        return None
    return stats.welch(old, new)


def _interval(values: Sequence[float]) -> Interval:
    if all(isfinite(v) and v > 0 for v in values):
        return stats.interval(values)
    return Interval(figure=median(values), low=None, high=None, count=len(values))


def _inverse(found: Comparison) -> Comparison:
    """Of rates instead of times."""
    low, high = (None if end is None else 1 / end for end in (found.high, found.low))
    return replace(found, ratio=1 / found.ratio, low=low, high=high)


def _widened(found: Comparison, host: float) -> Comparison:
    """The interval, reaching also over what is left when the host's change is taken out: the host may have touched the
    stack as much as its probe, or not at all."""
    if found.low is None or found.high is None:
        return found
    low, high = min(found.low, found.low / host), max(found.high, found.high / host)
    return replace(found, low=low, high=high, verdict=stats.judge(low, high))


def _efficiency(record: Record) -> float | None:
    timed = record.samples.get(record.spec.mode)
    least = lockin.floor(record.layers, lockin.best(record.ceilings)) if timed else None
    return least / (median(timed["seconds"]) / timed["steps"]) if timed and least else None


def _batches(*figures: Figure) -> list[int]:
    return sorted(
        {
            int(b)
            for f in figures
            for r in f.records
            for b in r.serving.get("sweep", {})
            if re.fullmatch("[0-9]{1,9}", b)
        }
    )


def _served(record: Record, name: str) -> Any:
    return record.serving.get(name)


def _swept(record: Record, batch: int) -> float | None:
    seen = record.serving.get("sweep", {}).get(str(batch))
    return batch * seen["steps"] / median(seen["seconds"]) if seen else None


def _memory(record: Record, batch: int | None) -> Any:
    if batch is None:
        return record.watch.get("device_peak_memory")
    return record.serving.get("sweep", {}).get(str(batch), {}).get("peak_memory")


def _first(record: Record, cold: bool) -> Any:
    return record.times.get("total") if bool(record.environment.get("cold_caches")) == cold else None


def _rank(outcome: str) -> int:
    return COUNTED.index(outcome) if outcome in COUNTED else len(COUNTED)


def _device(figure: Figure) -> str:
    return next((str(name) for r in figure.records if (name := r.device.get("name"))), "")


def _software(figure: Figure) -> dict[str, str]:
    """All that a record knows of the system around a stack, by name."""
    first = next((r for r in figure.records if r.device), figure.records[0])
    found: dict[str, Any] = {k: first.environment[k] for k in _ENVIRONMENT if k in first.environment}
    for held in (first.environment.get("versions"), first.device.get("versions")):
        found |= held if isinstance(held, dict) else {}
    return {str(name): str(value) for name, value in found.items()}


_ENVIRONMENT = ("python", "system", "release", "machine", "processors", "allocator", "host")


def _size(spec: Spec) -> str:
    return f"{spec.model or spec.preset} at {spec.image_size} pixels, batch {spec.batch}"


def _told(figures: Sequence[Figure]) -> str:
    # Quoted, as a record can come from anyone and this goes to a terminal.
    names = [
        repr(f"{f.spec.stack}, {f.spec.mode}, {_size(f.spec)}, on {_device(f) or 'no device'}"[:200]) for f in figures
    ]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def told(found: Difference, margin: float = MARGIN) -> dict[str, Any]:
    """All of it as one JSON-ready mapping; what was not measured is null."""
    return {
        "worse": found.worse(margin),
        "margin": margin,
        "pairs": [
            {
                **_named(pair.new),
                "device": pair.device,
                "outcome": [pair.old.outcome, pair.new.outcome],
                "reason": [pair.old.reason, pair.new.reason],
                "quick": [pair.old.spec.quick, pair.new.spec.quick],
                "versions": {name: list(both) for name, both in pair.versions.items()},
                "host": pair.host,
                "records": [[r.digest for r in f.records] for f in (pair.old, pair.new)],
                "figures": [
                    {
                        "name": c.name,
                        "unit": c.unit,
                        "better": c.better,
                        "old": asdict(c.old) if c.old else None,
                        "new": asdict(c.new) if c.new else None,
                        "ratio": c.ratio.ratio if c.ratio else None,
                        "low": c.ratio.low if c.ratio else None,
                        "high": c.ratio.high if c.ratio else None,
                        "side_by_side": c.side_by_side,
                        "verdict": c.verdict,
                        "direction": c.direction or None,
                        "worse": c.worse(margin),
                    }
                    for c in pair.changes
                ],
                "worse": pair.worse(margin),
            }
            for pair in found.pairs
        ],
        "gone": list(map(_named, found.gone)),
        "new": list(map(_named, found.new)),
        "failures": list(map(_named, found.failures)),
        "mixed": [
            {
                **_named(m.old[0]),
                "reason": m.reason,
                "versions": [list(map(_software, m.old)), list(map(_software, m.new))],
            }
            for m in found.mixed
        ],
    }


def _named(figure: Figure) -> dict[str, Any]:
    spec = figure.spec
    work = {key: getattr(spec, key) for key in lockin.WORK}
    return {"stack": spec.stack, "mode": spec.mode, "work": work, "device": _device(figure), "outcome": figure.outcome}
