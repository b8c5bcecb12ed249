"""From the records of many machines to the answer: what would leaving CUDA cost? Pure functions.

A platform is a backend on a device. Closed division is held against closed, best stack against best stack; figures of
different machines were not timed side by side, and carry the wider interval.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, hypot, inf, log
from statistics import median
from typing import Any, TypeGuard

from portnet import devices, lockin, portability, stats
from portnet.assessment import (
    Against,
    Assessment,
    Cell,
    Cost,
    Entry,
    Layer,
    Numerics,
    Outcomes,
    Platform,
    Portability,
    Prices,
    Problem,
    Scaling,
    Serving,
    Share,
    Value,
    Verdict,
)
from portnet.errors import InputError
from portnet.lockin import ABSENT, COUNTED, Figure
from portnet.projection import EPOCHS, IMAGES
from portnet.record import RUNGS, Record, Spec, taken

LATENCY = 0.1
"""Seconds that an answer may take where no other bound is asked for."""
RETAINED = (0.9, 0.6)
"""Shares of what works at home: from the first on leaving costs little, below the second much."""
REACHED = (0.8, 0.5)
"""The same for architectural efficiency as a share of home's."""
MISSING = "missing"
"""Of what a platform has not, while its device is there: a feature, a mode, an engine, a precision."""
UNSUPPORTED = ("wrong", "failed", "out of memory", "timeout", MISSING)
"""Outcomes of a stack that was there and did not do it. After any other its efficiency is not known."""
REPEATS = "runs repeat bit for bit"
TOGETHER = "distributed training"
UNTRIED = (f"train: {REPEATS}", f"infer: {REPEATS}", "fused optimiser", TOGETHER)
"""Features that have a row even where no record tells of them."""
NONE = Value()


def assess(
    records: Sequence[Record],
    *,
    platforms: Sequence[str] = (),
    home: str = "cuda",
    prices: Prices | None = None,
    latency: float = LATENCY,
    divergence: Mapping[str, Any] | None = None,
    problems: Sequence[str] = (),
) -> Assessment:
    """Everything that a report shows of those records.

    `platforms`: the set to be judged, by backend or by full name; all that have records by default. `home`: the one
    that would be left. `latency`: the bound in seconds that an answer must keep to be counted in costs. `divergence`:
    what ``portnet divergence --json`` wrote. Raises `InputError` where there is no record.
    """
    if not records:
        raise InputError("there is no record to report on; 'portnet compare' and 'portnet measure' make some")
    usable, lost = _usable(records)
    if not usable:
        raise InputError(f"no record can be used: {lost[0]}")
    return _Assessing(usable, platforms, home, prices, latency).done(divergence or {}, [*problems, *lost])


def results(seen: Assessment) -> list[portability.Result]:
    """The closed stacks as the P3 Analysis Library knows them: images/s, of which higher is better.

    The application is the stack without its backend, which is the platform's. What failed there is unsupported, what
    was not measured is left out; quick figures are, too, where there are others.
    """
    chosen: dict[tuple[str, str, str], tuple[tuple[bool, float], portability.Value]] = {}
    for entry in seen.entries:
        figure, of = entry.figure, entry.problem
        problem = f"{of.mode}, {of.precision}, batch {of.batch}, {of.work}"
        fom: portability.Value | None = entry.rate.figure
        if _outcome(figure) in UNSUPPORTED:
            fom = portability.UNSUPPORTED
        if fom is None or not entry.closed:
            continue
        where = problem, entry.stack.partition("/")[2], entry.platform
        if where not in chosen or chosen[where][0] < _telling(figure):
            chosen[where] = _telling(figure), fom
    return [
        portability.Result(problem=problem, application=application, platform=platform, fom=fom)
        for (problem, application, platform), (_, fom) in chosen.items()
    ]


class _Assessing:
    """The steps of one assessment, and what they share."""

    def __init__(
        self, records: Sequence[Record], wanted: Sequence[str], home: str, prices: Prices | None, latency: float
    ) -> None:
        self.wanted, self.prices, self.latency = home, prices, latency
        self.records = records
        self.digests = {id(r): r.digest for r in self.records}
        found = [f for f in lockin.figures(self.records) if f.spec.backend != lockin.ORACLE]
        names = _names(found)
        self.nowhere = [f for n, f in zip(names, found, strict=True) if n is None]
        known = [(n, f) for n, f in zip(names, found, strict=True) if n is not None]
        self.devices = {n: _device(f) for n, f in reversed(known) if _device(f)}
        every = list(dict.fromkeys(n for n, _ in known))
        at_home = [n for n in every if self._asked(n, [home]) and any(n == m and _present(f) for m, f in known)]
        if len(at_home) > 1:
            raise InputError(
                f"{home!r} is several platforms here; name the one that would be left: {', '.join(at_home)}"
            )
        self.home = at_home[0] if at_home else None
        # What would be left is held against, whether it was asked for or not.
        chosen = [n for n in every if not wanted or n == self.home or self._asked(n, wanted)]
        self.named = wanted
        self.missing = tuple(w for w in wanted if not any(self._asked(n, [w]) for n in every))
        self.known = [(n, f) for n, f in known if n in chosen]
        self.placed = [(n, f) for n, f in self.known if f.spec.mode != "scale"]
        self.platforms = [self._platform(n) for n in chosen]
        self.several = len({_work(f.spec) for _, f in self.placed}) > 1
        self.current = _current(self.placed)
        self.tried: dict[tuple[str, Problem], list[Figure]] = {}
        for n, f in filter(_whole, self.current):
            self.tried.setdefault((n, _problem(f.spec)), []).append(f)

    def _asked(self, name: str, wanted: Iterable[str]) -> bool:
        """By its own name, its backend's, or backend and device, whatever of it its name shows."""
        backend = name.split(" on ")[0]
        return any(w in (name, backend, f"{backend} on {self.devices.get(name, '')}") for w in wanted)

    def done(self, divergence: Mapping[str, Any], problems: Sequence[str]) -> Assessment:
        self.entries = self._entries()
        self.against = self._against()
        self.outcomes = self._outcomes()
        ablation = self._ablation()
        self.serving = self._serving()
        return Assessment(
            home=self.home,
            wanted=self.wanted,
            platforms=self.platforms,
            missing=self.missing,
            verdicts=[self._verdict(p.name) for p in self.platforms if p.name != self.home] if self.home else [],
            stack=self._stack(ablation, self.serving, divergence),
            entries=self.entries,
            against=self.against,
            portability=self._portability(),
            outcomes=self.outcomes,
            ablation=ablation,
            numerics=self._numerics(),
            serving=self.serving,
            scaling=self._scaling(),
            costs=self._costs(),
            currency=self.prices.currency if self.prices else "",
            latency=self.latency,
            divergence=divergence,
            records=self.records,
            problems=[*problems, *map(self._homeless, self.nowhere)],
        )

    def _homeless(self, figure: Figure) -> str:
        return (
            f"{figure.spec.stack}, {figure.spec.mode}: {figure.outcome}, on a device that was not found out, where "
            "several are known"
        )

    # Platforms

    def _platform(self, name: str) -> Platform:
        figures = [f for n, f in self.known if n == name]
        own = [r for f in figures for r in f.records]
        device = next((r.device for r in own if r.device), {})
        return Platform(
            name=name,
            backend=own[0].spec.backend,
            device=str(device.get("name", "")),
            vendor=str(device.get("vendor", "")),
            published=devices.find(str(device.get("name", "")), device.get("memory")),
            software=_software(own),
            dates=tuple(sorted({str(r.environment.get("date", ""))[:10] for r in own} - {""})),
            absent="" if any(_outcome(f) != "not available" for f in figures) else figures[0].reason or "no device",
        )

    # Figures of one stack

    def _value(self, figure: Figure, seen: stats.Interval | float | None, why: str = "") -> Value:
        digests = tuple(self.digests[id(r)] for r in figure.records)
        if seen is None:
            return Value(why=why or _why(figure), records=digests)
        notes = _marks(figure)
        if isinstance(seen, stats.Interval):
            notes += ["one process"] if seen.low is None else []
            return Value(figure=seen.figure, low=seen.low, high=seen.high, note=", ".join(notes), records=digests)
        return Value(figure=seen, note=", ".join(notes), records=digests)

    def _entries(self) -> list[Entry]:
        made = []
        for name, figure in filter(_whole, self.placed):
            problem, spec = _problem(figure.spec), figure.spec
            at_home = self._best(self.home, problem) if spec.division == "closed" else None
            known = "" if figure.rate is None else "the ceilings or the layers' work were not measured"
            lacking = "" if figure.rate is None else "the device's published peak is not known"
            made.append(
                Entry(
                    platform=name,
                    problem=problem,
                    figure=figure,
                    closed=spec.division == "closed",
                    best=figure is self._best(name, problem),
                    rate=self._value(figure, figure.rate),
                    relative=self._relative(figure, at_home),
                    efficiency=self._value(figure, figure.efficiency, known),
                    published=self._value(figure, figure.published, lacking),
                    of_published=self._value(figure, figure.of_published, lacking),
                    application=self._application(name, problem, figure),
                )
            )
        return made

    def _application(self, platform: str, problem: Problem, figure: Figure) -> Value:
        """Its rate as a share of the fastest's there, of either division."""
        timed = [f for f in self.tried.get((platform, problem), []) if f.rate]
        fastest = max(timed, key=lambda f: f.rate.figure if f.rate else 0.0, default=None)
        if figure.rate is None or fastest is None or fastest.rate is None:
            return self._value(figure, None)
        return self._noted(Value(figure=figure.rate.figure / fastest.rate.figure), figure, fastest)

    def _best(self, platform: str | None, problem: Problem) -> Figure | None:
        """The platform's fastest closed stack on that problem: by its newest software, and not by quick figures where
        there are others."""
        found = [f for f in self.tried.get((platform or "", problem), []) if f.spec.division == "closed" and f.rate]
        found = [f for f in found if not f.spec.quick] or found
        newest = max((_date(f) for f in found), default="")
        software = next((_software(f.records) for f in found if _date(f) == newest), {})
        found = [f for f in found if _software(f.records) == software]
        return max(found, key=lambda f: f.rate.figure if f.rate else 0.0, default=None)

    def _closed(self, platform: str, problem: Problem) -> list[Figure]:
        """What was tried of it in the closed division; that another machine has no such device is no try."""
        found = [f for f in self.tried.get((platform, problem), []) if f.spec.division == "closed"]
        return [f for f in found if _present(f)]

    # Against home

    def _relative(self, here: Figure, home: Figure | None) -> Value:
        if here.rate is None or home is None:
            why = _why(here) if here.rate is None else self._no_home()
            return Value(why=why, records=tuple(self.digests[id(r)] for r in here.records))
        if here is home:
            return self._value(here, 1.0)
        if (side := lockin.compare(home, here)) is not None and side.rounds > 1:
            low, high = (1 / x if x else None for x in (side.high, side.low))
            seen = Value(figure=1 / side.ratio, low=low, high=high, note="side by side")
            return self._noted(seen, here, home)
        assert home.rate is not None
        return self._noted(_quotient(here.rate, home.rate), here, home)

    def _noted(self, seen: Value, *figures: Figure) -> Value:
        notes = [seen.note, *dict.fromkeys(mark for f in figures for mark in _marks(f))]
        notes.append("one process" if seen.low is None and any(len(f.records) == 1 for f in figures) else "")
        digests = tuple(dict.fromkeys(self.digests[id(r)] for f in figures for r in f.records))
        return replace(seen, note=", ".join(n for n in notes if n), records=digests)

    def _no_home(self) -> str:
        return f"{self.wanted} was not measured" + (" on this problem" if self.home else "")

    def _against(self) -> list[Against]:
        if self.home is None:
            return []
        made = []
        for problem in self._problems():
            home = self._best(self.home, problem)
            for platform in self.platforms:
                here = self._best(platform.name, problem)
                tried = next(iter(self.tried.get((platform.name, problem), [])), None)
                if platform.name == self.home or (home is None and tried is None):
                    continue
                if here is None or home is None:
                    none = self._value(tried, None) if here is None and tried else Value(why=self._no_home())
                    if here is None and tried is None:
                        none = NONE
                    throughput = efficiency = published = none
                else:
                    throughput = self._relative(here, home)
                    efficiency = self._over(here, home, "efficiency")
                    published = self._over(here, home, "published")
                made.append(
                    Against(
                        platform=platform.name,
                        problem=problem,
                        here=here.spec.stack if here else "",
                        home=home.spec.stack if home else "",
                        throughput=throughput,
                        efficiency=efficiency,
                        published=published,
                    )
                )
        return made

    def _over(self, here: Figure, home: Figure, what: str) -> Value:
        a, b = getattr(here, what), getattr(home, what)
        if a is None or b is None:
            lacking = here.spec.backend if a is None else home.spec.backend
            kind = "its ceilings were not measured" if what == "efficiency" else "its published peak is not known"
            return Value(why=f"{lacking}: {kind}")
        for figure, share in ((here, a), (home, b)):
            if share.figure > portability.MOST:
                return Value(why=f"{figure.spec.stack} reaches {share.figure:.3g} of its ceiling, which so is none")
        return self._noted(_quotient(a, b), here, home)

    def _problems(self) -> list[Problem]:
        return list(dict.fromkeys(problem for _, problem in self.tried))

    # Portability

    def _portability(self) -> list[Portability]:
        made = []
        for problem in self._problems():
            for by, kind in (("measured ceiling", "efficiency"), ("published peak", "published"), ("application", "")):
                # The set that was named, without home unless home was: what else stands in the report is not in PP.
                chosen = [p.name for p in self.platforms if not self.named or self._asked(p.name, self.named)]
                values = {name: self._efficiency(name, problem, kind) for name in chosen}
                values |= dict.fromkeys(self.missing, NONE)
                if all(v.figure is None for v in values.values()):
                    continue
                made.append(_portable(problem, by, values, named=bool(self.named)))
        return made

    def _efficiency(self, platform: str, problem: Problem, kind: str) -> Value:
        """Of the fastest stack; 0 where the platform was tried and does not do it, None where that is not known."""
        tried, best = self._closed(platform, problem), self._best(platform, problem)
        if _unsupported(tried):
            digests = tuple(self.digests[id(r)] for f in tried for r in f.records)
            return Value(figure=0.0, note=f"unsupported: {_outcome(tried[0])}", records=digests)
        if best is None or best.rate is None:
            return Value(why=_why(tried[0]) if tried else "not measured")
        if not kind:
            return self._application(platform, problem, best)
        lacking = "published peak is not known" if kind == "published" else "ceilings were not measured"
        return self._value(best, getattr(best, kind), f"the {lacking}")

    # Outcomes

    def _outcomes(self) -> Outcomes:
        cells: dict[str, dict[str, Cell]] = {}

        def add(feature: str, name: str, outcome: str, figure: Figure) -> None:
            digests = tuple(self.digests[id(r)] for r in figure.records)
            row = cells.setdefault(feature, {})
            # The better of several batches, but not of two answers, of which one is wrong. That all stacks fail at
            # some batch, the verdict says.
            if name not in row or _PLACE[outcome] < _PLACE[row[name].outcome]:
                row[name] = Cell(outcome=outcome, reason=figure.reason, records=digests)

        for name, figure in self.current:
            if figure.spec.without or figure.spec.division != "closed":
                continue
            # Another work is another feature: one that is wrong must not hide behind one that is right.
            work = f" ({_work(figure.spec)})" if self.several else ""
            for feature, outcome in _features(figure):
                add(feature + work, name, outcome, figure)
        for name, figure in self.known:
            if figure.spec.mode == "scale":
                feature = f"{TOGETHER}: {figure.spec.parallel}, {figure.spec.processes} processes"
                add(feature, name, _outcome(figure), figure)
        cells |= {feature: {} for feature in UNTRIED if not any(known.startswith(feature) for known in cells)}
        return Outcomes(cells=cells, retained={p.name: self._retained(cells, p.name) for p in self.platforms})

    def _retained(self, cells: Mapping[str, Mapping[str, Cell]], platform: str) -> Value:
        if self.home is None:
            return Value(why=self._no_home())
        home = self.home
        works = [row for row in cells.values() if home in row and row[home].outcome == "works"]
        known = [row for row in works if platform in row and row[platform].outcome not in ABSENT]
        if not known:
            return NONE
        kept = [row for row in known if row[platform].outcome == "works"]
        note, untried = f"{len(kept)} of {len(known)} features", len(works) - len(known)
        if untried:
            most = len(kept) + untried
            note += f"; {untried} more were not tried there: {len(kept)} to {most} of {len(works)} in all"
        digests = tuple(d for row in known for d in row[platform].records)
        return Value(figure=len(kept) / len(known), note=note, records=tuple(dict.fromkeys(digests)))

    # Layers of the stack

    def _ablation(self) -> list[Share]:
        made = []
        for name, figure in self.placed:
            if not figure.spec.without:
                continue
            whole = replace(figure.spec, without=())
            bases = [f for n, f in self.placed if n == name and _plain(f.spec) == _plain(whole)]
            # Several where software differs: the one that ran beside it.
            sides = [(side, f) for f in bases if (side := lockin.compare(f, figure)) is not None]
            side, base = max(sides, key=lambda one: one[0].rounds, default=(None, figure))
            if side is None:
                slower = self._value(figure, None, "" if figure.rate is None else "not measured beside the whole stack")
            else:
                slower = self._noted(Value(figure=side.ratio, low=side.low, high=side.high), figure, base)
            made.append(
                Share(
                    platform=name,
                    problem=_problem(figure.spec),
                    stack=whole.stack,
                    layer=", ".join(figure.spec.without),
                    slowdown=slower,
                )
            )
        return made

    def _stack(
        self, ablation: Sequence[Share], serving: Sequence[Serving], divergence: Mapping[str, Any]
    ) -> list[Layer]:
        """Application, framework, libraries, runtime, interconnect, silicon: one figure of each for each platform."""
        names = [p.name for p in self.platforms]

        own = divergence.get("platforms", {})
        lines = {
            p.name: Value(figure=float(own[p.backend]["own"]), note=f"of {own[p.backend]['lines']} that run")
            for p in self.platforms
            if own.get(p.backend, {}).get("own") is not None
        }
        worth: dict[str, Value] = {}
        for share in ablation:
            seen = share.slowdown
            # A rung below the libraries is no library that helps.
            if share.layer in RUNGS:
                continue
            if seen.figure is not None and seen.figure > (worth.get(share.platform, NONE).figure or 0):
                note = f"{taken(share.layer)}: {share.problem.label}"
                worth[share.platform] = replace(seen, note=", ".join(n for n in (note, seen.note) if n))
        start: dict[str, Value] = {}
        works = [(n, f) for n, f in filter(_whole, self.current) if f.outcome in COUNTED]
        for name, figure in works:
            cold = cold_start(figure)
            if cold is not None and cold.times["total"] < (start[name].figure or 0 if name in start else inf):
                work = f"{_work(figure.spec)}, " if self.several else ""
                note = f"{figure.spec.stack}, {work}empty caches"
                start[name] = _also(self._value(figure, float(cold.times["total"])), note)
        bus = {s.platform: s.to_device for s in serving[::-1] if s.to_device.figure is not None}
        bus = {s.platform: s.to_device for s in serving} | bus
        rates: dict[str, Value] = {}
        for name, figure in works:
            flops = max((f for r in figure.records if (f := lockin.best(r.ceilings).get("flops"))), default=None)
            if flops and flops > (rates.get(name, NONE).figure or 0):
                rates[name] = _also(self._value(figure, flops), figure.spec.precision)
        told = (
            ("application", "lines of PortNet that only this backend runs", "lines", lines),
            ("framework", "share of what works at home that works here", "share", self.outcomes.retained),
            ("libraries", "time without the library that helps most", "times", worth),
            ("runtime", "time to the first step", "s", start),
            ("interconnect", "from host to device", "bytes/s", bus),
            ("silicon", "best matrix product measured", "FLOP/s", rates),
        )
        return [
            Layer(name=name, question=question, unit=unit, values={n: seen.get(n, NONE) for n in names})
            for name, question, unit, seen in told
        ]

    # Numbers, serving, money

    def _numerics(self) -> list[Numerics]:
        made = []
        rows = {id(row.record): row for row in lockin.rows(self.records)}
        for name, figure in filter(_whole, self.current):
            own = [rows[id(r)] for r in figure.records]
            gated = [row for row in own if row.parity is not None]
            worst = max(gated, key=lambda row: row.parity or 0, default=None)
            logits = max((row.logits for row in own if row.logits is not None), default=None)
            loss = next((row.loss_distance for row in own if row.loss_distance is not None), None)
            findings = worst.record.gates["parity"]["findings"] if worst else []
            made.append(
                Numerics(
                    platform=name,
                    stack=figure.spec.stack,
                    problem=_problem(figure.spec),
                    gate=self._value(figure, worst.parity if worst else None, "the gate was not reached"),
                    logits=self._value(figure, logits, "the gate was not reached"),
                    loss=self._value(figure, loss, "no float64 reference of the same training"),
                    worst=str(max(findings, key=lockin.share)["what"]) if findings else "",
                    repeats=self._repeats(figure),
                )
            )
        return made

    def _repeats(self, figure: Figure) -> Value:
        found = _repetitions(figure)
        if not found:
            return self._value(figure, None, "not measured in quick records" if figure.spec.quick else "not measured")
        seen = self._value(figure, float(all(one["equal"] for one in found)))
        differing = list(dict.fromkeys(name for one in found for name in one.get("differing", ())))
        return _also(seen, f"{len(differing)} tensors differ, {differing[0]} among them") if differing else seen

    def _scaling(self) -> list[Scaling]:
        made = []
        for name, figure in self.known:
            spec = figure.spec
            if spec.mode != "scale":
                continue
            records = [r for r in figure.records if r.scaling.get("rounds")]
            told = records[0].scaling if records else figure.records[0].scaling
            counts = sorted({int(n) for r in records for n in r.scaling["rounds"]} - {1}) or [spec.processes]
            for n in counts:
                pairs = [
                    (lockin.timed_rate(one), lockin.timed_rate(several))
                    for r in records
                    for one, several in zip(*(r.scaling["rounds"].get(str(k), ()) for k in (1, n)), strict=True)
                ]
                seen = [
                    self._value(figure, stats.interval(values) if pairs else None)
                    for values in ([a for a, _ in pairs], [b for _, b in pairs], [b / a / n for a, b in pairs])
                ]
                # What is sent was counted, and timed, with the most processes.
                last = n == spec.processes and bool(pairs)
                sent = sum(each["bytes"] for each in told.get("traffic", {}).values())
                bus = [
                    (operation, self._value(figure, max(lockin.bus_bandwidth(operation, n, t) for t in timed)))
                    for operation, timed in (told.get("operations", {}) if last else {}).items()
                ]
                made.append(
                    Scaling(
                        platform=name,
                        stack=spec.stack,
                        work=_work(spec),
                        way=spec.parallel,
                        processes=n,
                        batch=spec.batch,
                        collectives=str(told.get("collectives", "")),
                        one_device=bool(told.get("one_device")),
                        outcome=_outcome(figure),
                        reason=figure.reason,
                        alone=seen[0],
                        together=seen[1],
                        efficiency=seen[2],
                        sent=self._value(figure, float(sent) if last else None, f"counted with {spec.processes}"),
                        bus=bus,
                    )
                )
        return made

    def _serving(self) -> list[Serving]:
        made = []
        self.most: dict[int, Value] = {}
        for name, figure in self.current:
            if figure.spec.mode != "serve" or figure.spec.without:
                continue
            seen = [r.serving for r in figure.records if r.serving] if figure.outcome in COUNTED else []

            def middle(key: str, seen: Sequence[Mapping[str, Any]] = seen, figure: Figure = figure) -> Value:
                known = [float(s[key]) for s in seen if _number(s.get(key))]
                lacking = "looked for in a device's own memory only" if key == "largest_batch" else "too few samples"
                why = lacking if seen and key in seen[0] else _why(figure)
                return self._value(figure, stats.interval(known) if known else None, why)

            sweep = _sweep(s.get("sweep", {}) for s in seen)
            bus = seen[0].get("bus", {}) if seen else {}
            memory = [float(m) for s in seen for b in s.get("sweep", {}).values() if _number(m := b.get("peak_memory"))]
            self.most[id(figure)] = self._most(figure, seen, sweep)
            unshared = str(bus.get("reason") or _why(figure))
            ways = [float(w) if _number(w := bus.get(way)) else None for way in ("to_device", "to_host")]
            made.append(
                Serving(
                    platform=name,
                    stack=figure.spec.stack,
                    work=_work(figure.spec),
                    p50=middle("p50"),
                    p90=middle("p90"),
                    p99=middle("p99"),
                    most=self.most[id(figure)],
                    sweep=[
                        (b, x.device.figure, b / x.device.figure, x.answer.figure if x.answer else None)
                        for b, x in sweep
                    ],
                    peak_memory=self._value(figure, max(memory, default=None), "the device does not tell"),
                    largest_batch=middle("largest_batch"),
                    to_device=self._value(figure, ways[0], unshared),
                    to_host=self._value(figure, ways[1], unshared),
                )
            )
        return made

    def _most(self, figure: Figure, seen: Sequence[Mapping[str, Any]], sweep: Sequence[tuple[int, "_Batch"]]) -> Value:
        singles = (next((float(s[k]) for k in ("p99", "p90", "p50") if _number(s.get(k))), 0.0) for s in seen)
        single = max(singles, default=0.0)
        if single > self.latency:
            return self._value(
                figure, None, f"a single image takes up to {single:.3g} s, the bound is {self.latency:g} s"
            )
        kept = [(b, x) for b, x in sweep if x.longest <= self.latency]
        if not kept:
            return self._value(figure, None, f"no batch was answered within {self.latency:g} s" if sweep else "")
        batch, best = max(kept, key=lambda one: one[0] / (one[1].answer or one[1].device).figure)
        seconds = best.answer or best.device
        low, high = (batch / x if x else None for x in (seconds.high, seconds.low))
        note = f"batch {batch}" + ("" if best.answer else ", pictures on the device already")
        return self._noted(Value(figure=batch / seconds.figure, low=low, high=high, note=note), figure)

    def _costs(self) -> list[Cost]:
        made = []
        modes = [f.spec.mode for _, f in self.current for r in f.records if _energy(r) is not None]
        # Joules of an inference beside those of a training step would say nothing: the mode that most have.
        metered = max(("train", "infer"), key=modes.count)
        for platform in self.platforms:
            price = self.prices.of(platform) if self.prices else None
            unpriced = "no prices were given" if self.prices is None else f"no price of {platform.name} was given"
            own = self._tried(platform.name)
            for stack, work in dict.fromkeys((f.spec.stack, _work(f.spec)) for f in own):
                of: dict[str, Figure] = {}
                for f in own:
                    if (f.spec.stack, _work(f.spec)) == (stack, work) and f.outcome in COUNTED:
                        mode = f.spec.mode
                        of[mode] = max(of.get(mode, f), f, key=_telling)
                joules, sensor = self._joules(of.get(metered), metered)
                made.append(
                    Cost(
                        platform=platform.name,
                        stack=stack,
                        work=work,
                        million=self._million(self.most.get(id(of.get("serve")), NONE), price, unpriced),
                        training=self._training(of.get("train"), price, unpriced),
                        joules=joules,
                        sensor=sensor,
                    )
                )
        return made

    def _million(self, served: Value, price: float | None, unpriced: str) -> Value:
        if served.figure is None:
            return served if served.records else replace(served, why="serving was not measured")
        if price is None:
            return Value(why=unpriced, records=served.records)
        cost = price / 3600 * 1e6
        low, high = (cost / x if x else None for x in (served.high, served.low))
        return replace(served, figure=cost / served.figure, low=low, high=high)

    def _training(self, trained: Figure | None, price: float | None, unpriced: str) -> Value:
        if trained is None or trained.rate is None:
            return Value(why="training was not measured")
        if trained.spec.model:
            return self._value(trained, None, "a model of your own has a training run of its own")
        if price is None:
            return self._value(trained, None, unpriced)
        rate, images, spec = trained.rate, IMAGES * EPOCHS * price / 3600, trained.spec
        low, high = (images / x if x else None for x in (rate.high, rate.low))
        note = f"batch {spec.batch}, {spec.classes} classes, {spec.image_size} pixels"
        return self._noted(Value(figure=images / rate.figure, low=low, high=high, note=note), trained)

    def _joules(self, figure: Figure | None, mode: str) -> tuple[Value, str]:
        if figure is None:
            return Value(why="training was not measured" if mode == "train" else "inference was not measured"), ""
        for record in figure.records:
            if (seen := _energy(record)) is not None:
                energy = record.watch["energy"]
                value = _also(self._value(figure, seen), f"{figure.spec.mode}, an image")
                return value, f"{energy.get('sensor')} ({energy.get('class')})"
        told = [r.watch.get("energy") for r in figure.records]
        reasons = [str(one["reason"]) for one in told if isinstance(one, dict) and one.get("reason")]
        if figure.spec.quick:
            reasons.append("not measured in quick records")
        return Value(why=next(iter(reasons), "no sensor")), ""

    # The verdict

    def _verdict(self, platform: str) -> Verdict:
        retained, works = self.outcomes.retained[platform], self._at_home()
        deciding = [("share of home's features retained", retained)]
        words = [self._kept(platform, works)]
        for mode in ("train", "infer"):
            failing = self._failing(platform, mode)
            if failing is not None:
                deciding.append((f"{mode}: no stack does it", self._value(failing, None)))
                words.append("high")
                continue
            lost = self._lost(platform, mode)
            if lost:
                problem, figure = lost[0]
                more = f" (nor {len(lost) - 1} more like it)" if len(lost) > 1 else ""
                deciding.append((f"{problem.label}{more}: no stack does it", self._value(figure, None)))
                words.append("moderate")
            shared = [a for a in self.against if a.platform == platform and a.problem.mode == mode and a.home]
            known = [a for a in shared if a.throughput.figure is not None]
            if not known:
                deciding.append((f"{mode}: throughput", NONE))
                words.append("not measured")
                continue
            # The worst decides, so that no other problem can be measured besides until the answer is another.
            worst = max(known, key=lambda a: (max(map(_WORDS.index, _reached(a))), -(a.efficiency.figure or 0)))
            label = worst.problem.label
            label += f" (the worst of {len(known)})" if len(known) > 1 else ""
            deciding += [
                # Throughput is there to be seen: it mixes the chip, which is bought, with the software, which binds.
                (f"{label}: throughput as a multiple of home's", worst.throughput),
                (f"{label}: architectural efficiency as a multiple of home's", worst.efficiency),
                (f"{label}: the same by published peaks", worst.published),
            ]
            words += _reached(worst)
        for outcome in ("wrong", "dishonest clock"):
            bad = [f for f in self._tried(platform) if f.outcome == outcome and not self._bad_at_home(f)]
            if bad:
                words.append("high")
                number = f"{len(bad)} stacks are" if len(bad) > 1 else "a stack is"
                deciding.insert(0, (f"{number} {outcome}", self._value(bad[0], None)))
        word = max(words, key=_WORDS.index)
        sentence = _SENTENCES[word]
        if word == "not measured" and "moderate" in words:
            sentence = f"{_SENTENCES['moderate']} Whether it is worse cannot be told: something was not measured."
        return Verdict(platform=platform, word=word, sentence=sentence, deciding=deciding)

    def _lost(self, platform: str, mode: str) -> list[tuple[Problem, Figure]]:
        """The problems that home does and on which all of the platform's stacks fail, with one of them."""
        found = []
        for problem in self._problems():
            tried = self._closed(platform, problem)
            if problem.mode == mode and self._best(self.home, problem) and _unsupported(tried):
                found.append((problem, tried[0]))
        return found

    def _tried(self, platform: str | None) -> list[Figure]:
        """Its closed stacks, nothing taken away, serving among them."""
        return [f for n, f in self.current if n == platform and not f.spec.without and f.spec.division == "closed"]

    def _bad_at_home(self, figure: Figure) -> bool:
        same = replace(_plain(figure.spec), backend="")
        return any(
            f.outcome == figure.outcome and replace(_plain(f.spec), backend="") == same for f in self._tried(self.home)
        )

    def _at_home(self) -> list[Mapping[str, Cell]]:
        home = self.home or ""
        return [row for row in self.outcomes.cells.values() if home in row and row[home].outcome == "works"]

    def _kept(self, platform: str, works: Sequence[Mapping[str, Cell]]) -> str:
        """The word for what is retained: what was not tried there could be kept or lost, and must not matter."""
        seen = [row[platform].outcome if platform in row else "not measured" for row in works]
        least = sum(outcome == "works" for outcome in seen)
        most = least + sum(outcome in ABSENT for outcome in seen)
        words = {_banded(share / len(works), RETAINED) for share in (least, most)} if works else set()
        return words.pop() if len(words) == 1 else "not measured"

    def _failing(self, platform: str, mode: str) -> Figure | None:
        """One of its stacks, where home does that mode and all of them that were tried fail."""
        if not any(f.rate for f in self._tried(self.home) if f.spec.mode == mode):
            return None
        tried = [f for f in self._tried(platform) if f.spec.mode == mode and _present(f)]
        return tried[0] if _unsupported(tried) else None


_WORDS = ("low", "moderate", "not measured", "high")
"""From the best to the worst: what is missing could be worse than all that is known, but not than what is high."""
_SENTENCES = {
    "low": "What works at home works here, and the software gets about as close to its chip's ceiling.",
    "moderate": "Some of what works at home is lost here, or the software leaves more of its chip unused.",
    "high": "Much of what works at home is missing or wrong here, or the software leaves much of its chip unused.",
    "not measured": "Nothing that is known speaks against it, but something that decides was not measured.",
}
_OUTCOMES = (
    *("wrong", "dishonest clock", "works", "partial", "unsteady"),
    *("out of memory", "timeout", "failed", MISSING, *ABSENT),
)
_PLACE = {outcome: place for place, outcome in enumerate(_OUTCOMES)}
"""Which of several outcomes stands for a feature: the first of these."""


def _reached(against: Against) -> list[str]:
    """The words for the efficiency, by both denominators: a poor matrix library would look good by the measured one."""
    return [_ranged(value, REACHED) for value in (against.efficiency, against.published)]


def _ranged(value: Value, bounds: tuple[float, float]) -> str:
    """The word for a figure with its interval: the best only if all of it is, and none if it could be any."""
    if value.figure is None or value.low is None or value.high is None:
        return "not measured"
    least, most = _banded(value.low, bounds), _banded(value.high, bounds)
    if (least, most) == ("high", "low"):
        return "not measured"
    return most if most == "high" else "low" if least == "low" else "moderate"


def _banded(share: float, bounds: tuple[float, float]) -> str:
    return "low" if share >= bounds[0] else "high" if share < bounds[1] else "moderate"


def _usable(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Those that can be computed with, and a sentence for each other: records come from anyone."""
    kept, lost = [], []
    for record in records:
        number = record.round.get("number")
        twin = replace(record, round={**record.round, "number": number + 1 if isinstance(number, int) else 1})
        try:
            prices = Prices(currency="", hour={record.spec.backend: 1.0})
            _Assessing([record, twin], (), record.spec.backend, prices, LATENCY).done({}, ())
            lockin.drift([record])
        except Exception as error:
            lost.append(f"{record.digest}.json ({record.spec.stack}): {type(error).__name__}: {error}"[:500])
        else:
            kept.append(record)
    return kept, lost


def _outcome(figure: Figure) -> str:
    """`MISSING` for what the backend does not offer although its device is there."""
    if figure.outcome == "not available" and _device(figure):
        return MISSING
    return figure.outcome


def _device(figure: Figure) -> str:
    return next((str(r.device.get("name", "")) for r in figure.records if r.device), "")


def _present(figure: Figure) -> bool:
    return _outcome(figure) not in ABSENT


def _unsupported(tried: Sequence[Figure]) -> bool:
    """Whether it was tried, and none of them did it."""
    return bool(tried) and all(_outcome(f) in UNSUPPORTED for f in tried)


def _whole(placed: tuple[str, Figure]) -> bool:
    """Of a stack with nothing taken away, in training or inference."""
    return not placed[1].spec.without and placed[1].spec.mode != "serve"


def _current(placed: Sequence[tuple[str, Figure]]) -> list[tuple[str, Figure]]:
    """Without what the same stack did on the same work by older software: neither its speed nor its failures count."""
    newest: dict[tuple[str, Spec], Figure] = {}
    for name, figure in placed:
        at = name, _plain(figure.spec)
        # What was not tried, or died before it told of its software, takes nobody's place.
        if _present(figure) and _software(figure.records) and (at not in newest or _date(figure) > _date(newest[at])):
            newest[at] = figure

    def superseded(name: str, figure: Figure) -> bool:
        last = newest.get((name, _plain(figure.spec)), figure)
        return _software(figure.records) != _software(last.records) and _date(figure) < _date(last)

    return [(n, f) for n, f in placed if not superseded(n, f)]


def cold_start(figure: Figure) -> Record | None:
    """The process that was quickest to its first result, caches of compiled code being empty; None where none was."""
    known = [r for r in figure.records if r.environment.get("cold_caches") and _number(r.times.get("total"))]
    return min(known, key=lambda r: r.times["total"], default=None)


def _software(records: Iterable[Record]) -> dict[str, str]:
    """The versions that the newest record tells."""
    newest = max((r for r in records if r.device), key=lambda r: str(r.environment.get("date", "")), default=None)
    versions = newest.device.get("versions") if newest else None
    return {str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {}


def _date(figure: Figure) -> str:
    return max(str(r.environment.get("date", "")) for r in figure.records)


def _telling(figure: Figure) -> tuple[bool, float]:
    """Of several batches of a stack: a full measurement before a quick one, then the faster."""
    return not figure.spec.quick, figure.rate.figure if figure.rate else 0.0


def _marks(figure: Figure) -> list[str]:
    """What must be said beside its figures."""
    marks = ["quick"] if figure.spec.quick else []
    marks += ["partial"] if figure.outcome == "partial" else []
    marks += ["on a machine that others kept busy"] if lockin.crowd(figure.records) else []
    return marks + (["several series"] if len({r.round.get("series") for r in figure.records}) > 1 else [])


def _also(value: Value, note: str) -> Value:
    return replace(value, note=", ".join(n for n in (note, value.note) if n))


def _number(value: object) -> TypeGuard[float]:
    """Above zero and finite; what a vendor's session counts can be anything in a record."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e300


def _energy(record: Record) -> float | None:
    """Joules an image."""
    energy, images = record.watch.get("energy"), record.times.get("energy_images")
    if not isinstance(energy, dict) or not _number(energy.get("joules")) or not _number(images):
        return None
    return float(energy["joules"]) / float(images)


def _names(found: Sequence[Figure]) -> list[str | None]:
    """Each figure's platform; None where its device was not found out and several are known."""
    # Without an instruction set a processor goes by another name: it counts as the whole stack's device.
    whole = {
        (r.spec.backend, r.round.get("series")): str(r.device.get("name", ""))
        for f in found
        for r in f.records
        if r.device and not r.spec.without
    }

    def place(figure: Figure) -> tuple[str, str]:
        backend, name = figure.spec.backend, _device(figure)
        series = figure.records[0].round.get("series")
        return backend, whole.get((backend, series), name) if figure.spec.without else name

    places = list(map(place, found))
    known: dict[str, list[str]] = {}
    for backend, device in places:
        if device and device not in known.setdefault(backend, []):
            known[backend].append(device)
    names: list[str | None] = []
    for backend, device in places:
        if len(known.get(backend, [])) < 2:
            names.append(backend)
        else:
            names.append(f"{backend} on {device}" if device else None)
    return names


def _problem(spec: Spec) -> Problem:
    return Problem(mode=spec.mode, precision=spec.precision, batch=spec.batch, work=_work(spec))


def _work(spec: Spec) -> str:
    return f"{spec.model or spec.preset}, {spec.image_size} pixels, {spec.classes} classes, {spec.data}"


def _plain(spec: Spec) -> Spec:
    return replace(spec, blocks=0, perturbed=0)


def _features(figure: Figure) -> list[tuple[str, str]]:
    """What the figure shows to work: its stack in its mode, and what a report counts beside it."""
    spec, record = figure.spec, figure.detailed
    stack = f"{spec.engine}, {spec.precision}" + (", channels-last" if spec.channels_last else "")
    stack += "" if spec.formulation == "portable" else f", {spec.formulation}"
    found = [(f"{spec.mode}: {stack}", _outcome(figure))]
    if figure.outcome in COUNTED and spec.mode != "serve":
        told = {
            "profiler: operations that ran elsewhere are counted": record.gates.get("fallbacks", {}).get("known"),
            "memory statistics": record.watch.get("device_peak_memory") is not None if record.watch else None,
        }
        if seen := _repetitions(figure):
            told[f"{spec.mode}: {REPEATS}"] = all(one["equal"] for one in seen)
        # The first process of a series tries that, unless it is quick.
        if any(r.times.get("end_to_end") for r in figure.records):
            told["profiler: layers can be timed singly"] = any(x.get("forward") for x in record.layers.values())
        found += [(name, "works" if seen else MISSING) for name, seen in told.items() if seen is not None]
    return found


def _repetitions(figure: Figure) -> list[Mapping[str, Any]]:
    return [r.gates["repeats"] for r in figure.records if "repeats" in r.gates]


def _why(figure: Figure) -> str:
    """Why a figure has no speed."""
    if figure.outcome in COUNTED:
        return "not measured"
    return f"{figure.outcome}: {figure.reason}" if figure.reason else figure.outcome


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Seconds of a batch over processes: on the `device`, pictures there already; of a whole `answer`, where that was
    measured; and the `longest` of all answers."""

    device: stats.Interval
    answer: stats.Interval | None
    longest: float


def _sweep(sweeps: Iterable[Mapping[str, Any]]) -> list[tuple[int, _Batch]]:
    """The batches that every process did."""
    every = list(sweeps)
    found = []
    for batch in sorted(map(int, set.intersection(*map(set, every)))) if every else ():
        timed = [s[str(batch)] for s in every]
        device = [median(t["seconds"]) / t["steps"] for t in timed]
        answers = [t["latencies"] for t in timed if t.get("latencies")]
        if batch > 0 and all(map(_number, device)):
            whole = stats.interval([median(a) for a in answers]) if len(answers) == len(timed) else None
            longest = max([*device, *(x for a in answers for x in a)])
            found.append((batch, _Batch(device=stats.interval(device), answer=whole, longest=longest)))
    return found


def _quotient(a: stats.Interval, b: stats.Interval) -> Value:
    """a over b of processes that did not run side by side: half-widths on logarithms add as their squares do.

    Each has its own Student's t, so that the interval is a little wider than Welch's.
    """
    ratio = a.figure / b.figure
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Value(figure=ratio, note="not side by side")
    # As far as there are floats.
    half = min(hypot(log(a.high / a.low) / 2, log(b.high / b.low) / 2), 600.0)
    return Value(figure=ratio, low=ratio * exp(-half), high=ratio * exp(half), note="not side by side")


def _portable(problem: Problem, by: str, values: Mapping[str, Value], *, named: bool) -> Portability:
    """PP of those efficiencies, in which 0 is a platform that does not support the work.

    `named`: the set was, and is not whatever has records.
    """
    too_much = {n: v for n, v in values.items() if (v.figure or 0) > portability.MOST}
    values = dict(values) | {
        n: replace(v, figure=None, low=None, high=None, why=f"{v.figure:.3g} of its {by}, which so is none")
        for n, v in too_much.items()
    }
    known: dict[str, portability.Value | None] = {
        n: portability.UNSUPPORTED if v.figure == 0 else v.figure for n, v in values.items()
    }
    seen = portability.pp(known, list(values))
    supported = _harmonic({n: values[n] for n in seen.supported}, seen.pp_supported)
    if seen.pp is not None and seen.pp == seen.pp_supported:
        whole = supported
    elif seen.pp is not None:
        whole = Value(figure=seen.pp, note=f"unsupported: {', '.join(seen.unsupported)}")
    else:
        whole = Value(why=f"not measured: {', '.join(seen.not_measured)}")
    if whole.figure is not None and not named:
        whole = _also(whole, "platforms not named beforehand")
    return Portability(
        problem=problem,
        by=by,
        whole=whole,
        supported=supported,
        efficiencies=values,
        cascade=[
            (step.platform, 0.0 if isinstance(step.efficiency, str) else step.efficiency, step.pp)
            for step in portability.cascade(known, list(values))
            if step.efficiency is not None and step.pp is not None
        ],
    )


def _harmonic(values: Mapping[str, Value], mean: float | None) -> Value:
    """Their harmonic mean with its interval: half-widths on logarithms add by squares, weighted as the mean does."""
    if mean is None:
        return NONE
    of = f"of {', '.join(values)}"
    digests = tuple(d for v in values.values() for d in v.records)
    if any(v.low is None for v in values.values()):
        return Value(figure=mean, note=f"{of}; no interval", records=digests)
    total = sum(1 / (v.figure or 1) for v in values.values())
    halves = [log((v.high or 1) / (v.low or 1)) / 2 / (v.figure or 1) / total for v in values.values()]
    half = min(hypot(*halves), 600.0)
    return Value(figure=mean, low=mean * exp(-half), high=mean * exp(half), note=of, records=digests)
