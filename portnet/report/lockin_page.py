"""An assessment as one self-contained page, for who decides and for who digs; nothing that it would load.

Its one script sorts, filters and saves plots; without it the page only lacks that. The policy in the page's head lets
no other script run, whatever a record holds.
"""

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TypeVar

from markupsafe import Markup

from portnet import lockin
from portnet.assess import REACHED, RETAINED, cold_start
from portnet.assessment import (
    USUAL,
    Against,
    Assessment,
    Cost,
    Entry,
    Numerics,
    Portability,
    Problem,
    Scaling,
    Serving,
    Share,
    Value,
    Verdict,
)
from portnet.errors import RecordError
from portnet.files import write_atomically
from portnet.lockin import Figure
from portnet.record import Record, taken
from portnet.report import formats, lockin_plots, page, table, values
from portnet.report.page import Grid, Plot
from portnet.report.values import Told

Row = TypeVar("Row", Verdict, Serving, Cost, Numerics, Share, Against, Scaling)

LONGEST = 1500
"""Letters of one text of a record that are shown."""
FEW_PLATFORMS, FEW_STACKS, FEW_GROUPS, FEW_ENVIRONMENTS = 4, 8, 8, 12
"""How many are drawn or told at most where there could be hundreds; the page says what it left out."""
STEPS = 200
"""Training steps whose losses stand in the data of a plot."""
UNTOLD = (values.NOT_MEASURED,)
"""What a figure's `why` says where nothing was tried."""
PHASES = {"start": "start of the process", "probe": "probe", "open": "load and compile", "first_step": "first step"}
SIGNS = {"works": "✓", "partial": "◐", "not available": "–", "not measured": "–"}
"""Beside an outcome's word; every other outcome is a failure's, ✕."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A figure as the page shows it: in words, with the numbers of the measurements that it was computed from."""

    told: Told
    sources: Sequence[int] = ()
    title: str = ""
    sort: float | None = None


@dataclass(frozen=True, kw_only=True)
class Deciding:
    """A figure that decided: its share of home's in percent of a bar's width, or None."""

    what: str
    shown: Shown
    bar: Mapping[str, float] | None


@dataclass(frozen=True, kw_only=True)
class Card:
    """One platform's verdict: the deciding figures under the problem that each is of."""

    platform: str
    device: str
    word: str
    sentence: str
    groups: Sequence[tuple[str, Sequence[Deciding]]]


@dataclass(frozen=True, kw_only=True)
class Cells:
    """A row of a table: its heading, a line below that, its cells, and what the filters go by."""

    heading: str
    below: str = ""
    cells: Sequence[Shown | str] = ()
    source: int | None = None
    outcome: str = ""
    bar: float | None = None
    """In percent of a bar's width."""
    marks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table in groups of rows. Columns without a single figure are left out; `absent` names them and says why."""

    columns: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Cells]]]
    absent: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """One measurement: the processes of a stack, and the SHA-256 of their records."""

    number: int
    stack: str
    problem: str
    device: str
    date: str
    outcome: str
    reason: str
    rejected: int
    digests: Sequence[str]


def render(assessment: Assessment, *, references: Collection[str] = ()) -> str:
    """The page. `references` are the SHA-256 of records that PortNet ships, which is said beside their platforms."""
    return _Page(assessment, references).rendered()


def write(assessment: Assessment, path: str | os.PathLike[str], *, references: Collection[str] = ()) -> Path:
    """Write the page to a file, whole or not at all; returns its path. Raises `RecordError`."""
    return write_atomically(path, render(assessment, references=references).encode(), RecordError)


class _Page:
    """The steps of making one page, and what they share."""

    def __init__(self, assessment: Assessment, references: Collection[str]) -> None:
        self.seen, self.references = assessment, references
        self.digests = {id(r): r.digest for r in assessment.records}
        self.quick = {self.digests[id(r)] for r in assessment.records if r.spec.quick}
        # By name, as files named by a hash come in no order.
        self.measured = sorted(
            lockin.figures(assessment.records),
            key=lambda f: (
                f.outcome == "not available",
                f.spec.backend != assessment.wanted,
                f.spec.stack,
                f.spec.mode != "train",
                f.spec.mode,
            ),
        )
        self.number = {self.digests[id(r)]: n for n, figure in enumerate(self.measured, 1) for r in figure.records}
        self.platform_of = {d: e.platform for e in assessment.entries for d in self._digests(e.figure)}
        self.left: list[str] = []
        self.home = assessment.home
        order = sorted(assessment.platforms, key=lambda p: (p.name != assessment.home, p.name))
        # A device that is not there says nothing of its software: it is named once, and has no column.
        self.names = [p.name for p in order if not p.absent]
        self.gone = {p.name: p.absent for p in order if p.absent}
        self.entries = sorted(
            (e for e in assessment.entries if e.platform in self.names),
            key=lambda e: (self.names.index(e.platform), e.problem.mode != "train", e.problem.precision, e.stack),
        )
        self.by_work: dict[tuple[str, Problem], list[Entry]] = {}
        for entry in self.entries:
            self.by_work.setdefault((entry.platform, entry.problem), []).append(entry)
        # Those that most platforms did come first; training before inference.
        count = Counter(problem for _, problem in self.by_work)
        self.problems = sorted(count, key=lambda p: (-count[p], p.mode != "train", p.precision, p.batch, p.work))
        self.every = [*self.names, *assessment.missing]

    def rendered(self) -> str:
        seen = self.seen
        script = resources.files("portnet.report").joinpath("report.js").read_text(encoding="utf-8")
        plots_of = {
            "against": self._against_plot(),
            "rates": self._rates_plot(),
            "latency": self._latency_plot(),
            "sweep": self._sweep_plot(),
            "cascade": self._cascade_plot(),
            "navigation": self._navigation_plot(),
            "rooflines": self._rooflines(),
            "losses": self._losses(),
            "waterfalls": self._waterfalls(),
            "start": self._start_plot(),
        }
        # A text that never ends is cut, too.
        return page.template("report.html.jinja", lambda value: _short(table.plain(value))).render(
            home=self.home,
            home_name=values.named(self.home or seen.wanted),
            wanted_name=values.named(seen.wanted),
            home_platform=next((p for p in seen.platforms if p.name == self.home), None),
            answer=formats.answer(seen),
            cards=[self._card(v) for v in sorted(self._kept(seen.verdicts), key=self._place)],
            missing=[m for m in seen.missing if m != seen.wanted],
            gone=self.gone,
            names=self.names,
            every=self.every,
            platforms={p.name: p for p in seen.platforms},
            shipped={p.name for p in seen.platforms if self._shipped(p.name)},
            retained_bounds=RETAINED,
            reached_bounds=REACHED,
            works=list(dict.fromkeys(e.problem.work for e in self.entries)),
            own_model=any(r.spec.model for r in seen.records),
            chips=self._chips() if self.home is None else [],
            stack=self._stack(),
            outcomes=self._outcomes(),
            reasons=self._reasons,
            retained={n: self._shown(v, "share", "a count") for n, v in seen.outcomes.retained.items()},
            signs=SIGNS,
            speed=self._speed(),
            open_only=self._open_division(),
            serving=self._serving(),
            bound=values.duration(seen.latency),
            scaling=self._scaling(),
            costs=self._costs(),
            currency=seen.currency,
            stacks=self._stacks(),
            modes=sorted({e.problem.mode for e in self.entries}),
            mode_names=values.MODES,
            precisions=sorted({e.problem.precision for e in self.entries}),
            portability=self._portability(),
            divergence=self._divergence(),
            numerics=self._numerics(),
            drift=None if (found := lockin.spread(seen.records)) is None else table.error(found),
            ablation=self._ablation(),
            plots=plots_of,
            quick=bool(self.quick),
            dates=sorted({d for p in seen.platforms for d in p.dates}),
            sources=self._sources(),
            rejected=[r for r in seen.records if self.digests[id(r)] not in self.number],
            digests=self.digests,
            devices=self._shared("device"),
            environments=self._shared("environment"),
            problems=[str(p) for p in seen.problems],
            left=self.left,
            count=len(seen.records),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            table=table,
        )

    # Values

    def _digests(self, figure: Figure) -> list[str]:
        return [self.digests[id(r)] for r in figure.records]

    def _shown(self, value: Value, kind: str, certain: str = "") -> Shown:
        told = values.tell(value, kind, quick=self.quick, certain=certain, currency=self.seen.currency)
        sources = sorted({self.number[d] for d in value.records if d in self.number})
        few = ", ".join(d[:8] for d in value.records[:12])
        more = f" and {len(value.records) - 12} more" if len(value.records) > 12 else ""
        count = len(value.records)
        title = f"computed from {count} record{'s' * (count != 1)}: {few}{more}" if count else ""
        return Shown(told=told, sources=sources, title=title, sort=value.figure if told.measured else None)

    def _row(self, *cells: Shown | str) -> list[Shown | str]:
        """The cells, each reason for a missing figure told once."""
        told: set[str] = set()
        row: list[Shown | str] = []
        for cell in cells:
            if not isinstance(cell, str) and not cell.told.measured:
                if cell.told.note in told:
                    cell = replace(cell, told=replace(cell.told, note=""))
                told.add(cell.told.note)
            row.append(cell)
        return row

    def _device(self, platform: str) -> str:
        found = next((p for p in self.seen.platforms if p.name == platform), None)
        return found.device if found else ""

    def _shipped(self, platform: str) -> bool:
        own = [d for d, name in self.platform_of.items() if name == platform]
        return bool(own) and all(d in self.references for d in own)

    # The first screen

    def _card(self, verdict: Verdict) -> Card:
        groups: dict[str, list[Deciding]] = {}
        for text, value in verdict.deciding:
            head, colon, what = text.partition(": ")
            group = _problem_words(head) if colon else ""
            multiple = not head.startswith("share")
            what = (what or head).removesuffix(" as a multiple of home's").removeprefix("share of home's ")
            shown = self._shown(value, "multiple" if multiple else "share", "" if multiple else "a count")
            groups.setdefault(group, []).append(
                Deciding(what=what[:1].upper() + what[1:], shown=shown, bar=_bar(value))
            )
        return Card(
            platform=verdict.platform,
            device=self._device(verdict.platform),
            word=verdict.word,
            sentence=verdict.sentence,
            groups=list(groups.items()),
        )

    def _chips(self) -> Sequence[tuple[str, Sequence[tuple[str, Sequence[Cells]]]]]:
        """What can be compared without home: the stacks on each chip, on the work that most of them did."""
        groups: dict[tuple[str, str], list[Entry]] = {}
        for entry in self.entries:
            groups.setdefault(_chip(entry.figure), []).append(entry)
        found = []
        for (name, _), own in groups.items():
            tables = []
            for mode in ("train", "infer"):
                timed = [e for e in own if e.problem.mode == mode and e.rate.figure is not None]
                if not timed:
                    continue
                # The one on which most backends can be compared, and then most stacks.
                backends = {p: len({e.platform for e in timed if e.problem == p}) for p in (e.problem for e in timed)}
                problem = max(backends, key=lambda p: (backends[p], sum(e.problem == p for e in timed)))
                self._leave(len(backends) - 1, f"problems of {values.MODES[mode]} on {name} on the first screen")
                # Of several measurements of a stack, the one of most processes.
                best: dict[str, Entry] = {}
                for entry in sorted((e for e in own if e.problem == problem), key=lambda e: len(e.figure.records)):
                    best[entry.stack] = entry
                of = sorted(best.values(), key=lambda e: -(e.rate.figure or 0))
                self._leave(len(of) - FEW_STACKS, f"stacks on {name} in {values.MODES[mode]}")
                tables.append((_problem_words(problem.label), [self._chip_row(e, of[0]) for e in of[:FEW_STACKS]]))
            if tables:
                found.append((name, tables))
        self._leave(len(found) - FEW_PLATFORMS, "chips on the first screen")
        return found[:FEW_PLATFORMS]

    def _chip_row(self, entry: Entry, best: Entry) -> Cells:
        side = None if entry is best else lockin.compare(best.figure, entry.figure)
        if entry is best and entry.rate.figure is not None:
            against: Shown | str = "the fastest"
        elif side is None:
            why = "not timed side by side" if entry.rate.figure is not None else entry.rate.why
            against = self._shown(Value(why=why), "multiple")
        else:
            low, high = (1 / x if x else None for x in (side.high, side.low))
            note = side.verdict + ("" if low else ", one process")
            records = tuple(dict.fromkeys((*entry.rate.records, *best.rate.records)))
            against = self._shown(
                Value(figure=1 / side.ratio, low=low, high=high, note=note, records=records), "multiple"
            )
        return Cells(
            heading=entry.stack,
            source=self._source(entry.figure),
            outcome=entry.figure.outcome,
            bar=100 * entry.rate.figure / best.rate.figure if entry.rate.figure and best.rate.figure else None,
            cells=self._row(self._shown(entry.rate, "rate"), against, self._shown(entry.efficiency, "share")),
        )

    def _kept(self, rows: Sequence[Row]) -> list[Row]:
        """Those of platforms that are there."""
        return [row for row in rows if row.platform in self.names]

    def _place(self, row: Verdict | Serving | Cost | Numerics | Share | Scaling) -> tuple[int, str]:
        return self.names.index(row.platform), getattr(row, "stack", "")

    def _source(self, figure: Figure) -> int | None:
        return self.number.get(self.digests[id(figure.records[0])])

    def _leave(self, count: int, what: str) -> None:
        if count > 0:
            self.left.append(f"{count} more {what}")

    # The tables

    def _stack(self) -> list[Cells]:
        kinds = {"lines": "lines", "share": "share", "times": "multiple", "s": "seconds"}
        certain = {
            "lines": "a count",
            "share": "a count",
            "s": "one process",
            "bytes/s": "one process",
            "FLOP/s": "best of all processes",
        }
        return [
            Cells(
                heading=layer.name,
                below=layer.question,
                cells=[
                    self._shown(
                        layer.values.get(n, Value()), kinds.get(layer.unit, layer.unit), certain.get(layer.unit, "")
                    )
                    for n in self.every
                ],
            )
            for layer in self.seen.stack
        ]

    def _outcomes(self) -> Sequence[tuple[str, Sequence[tuple[str, str, int]]]]:
        """Each feature with its outcome, the outcome's sign's word and the number of its reason, by platform."""
        self._reasons: list[tuple[str, str, str, str]] = []
        order = ("train:", "infer:", "serve:")
        cells = self.seen.outcomes.cells

        def place(feature: str) -> tuple[bool, int, str]:
            start = next((n for n, mode in enumerate(order) if feature.startswith(mode)), len(order))
            return not cells[feature], start, feature

        rows = []
        for feature in sorted(cells, key=place):
            row = []
            for name in self.every:
                cell = cells[feature].get(name)
                outcome, reason = (cell.outcome, cell.reason) if cell else ("not measured", "")
                number = 0
                if reason and outcome != "works":
                    self._reasons.append((feature, name, outcome, reason))
                    number = len(self._reasons)
                row.append((outcome, _class(outcome), number))
            head, colon, rest = feature.partition(": ")
            rows.append((f"{values.MODES.get(head, head)}{colon}{rest}", row))
        return rows

    def _speed(self) -> Sheet | None:
        """The best closed stack of each platform, problem by problem."""
        columns = (
            "Images/s",
            "Multiple of home's",
            "Efficiency by measured ceiling",
            "This as a multiple of home's",
            "Efficiency by published peak",
            "That as a multiple of home's",
            "Measured matrix product / published peak",
        )
        against = {(a.platform, a.problem): a for a in self.seen.against}
        found = []
        for problem in self.problems:
            rows = []
            for name in self.names:
                entry = self._best(name, problem)
                if entry is None:
                    continue
                held = against.get((name, problem))
                home = "home" if name == self.home else None
                rows.append(
                    Cells(
                        heading=name,
                        below=entry.stack,
                        source=self._source(entry.figure),
                        outcome=entry.figure.outcome,
                        cells=self._row(
                            self._shown(entry.rate, "rate"),
                            home or self._shown(held.throughput if held else entry.relative, "multiple"),
                            self._shown(entry.efficiency, "share"),
                            home or self._shown(held.efficiency if held else Value(), "multiple"),
                            self._shown(entry.published, "share"),
                            home or self._shown(held.published if held else Value(), "multiple"),
                            self._shown(entry.of_published, "share", "one ceiling"),
                        ),
                    )
                )
            if rows:
                found.append((_problem_words(problem.label) + self._work(problem), rows))
        return _sheet(columns, found)

    def _best(self, platform: str, problem: Problem) -> Entry | None:
        """The closed stack that stands for the platform; where none has a figure, the first."""
        own = [e for e in self.by_work.get((platform, problem), ()) if e.closed]
        return next((e for e in own if e.best), next(iter(own), None))

    def _work(self, problem: Problem) -> str:
        several = len({e.problem.work for e in self.entries}) > 1
        return f": {problem.work}" if several and problem.work not in problem.label else ""

    def _open_division(self) -> tuple[Sequence[str], Sequence[str]]:
        """Platforms with an open stack, and those without, which is PortNet's own gap."""
        have = sorted({e.platform for e in self.entries if not e.closed})
        return have, [n for n in self.names if n not in have] if have else []

    def _serving(self) -> list[Cells]:
        return [
            Cells(
                heading=s.stack,
                below=", ".join(_apart(s)),
                cells=self._row(
                    *(self._shown(v, "seconds") for v in (s.p50, s.p90, s.p99)),
                    self._shown(s.most, "rate"),
                    self._shown(s.peak_memory, "bytes", "the largest seen"),
                    self._shown(s.largest_batch, "count", "to within 1/16"),
                    *(self._shown(v, "bytes/s", "one process") for v in (s.to_device, s.to_host)),
                ),
            )
            for s in sorted(self._kept(self.seen.serving), key=self._place)
        ]

    def _scaling(self) -> list[tuple[Cells, str, str]]:
        """Each group with what it is and what its figures are."""
        made = []
        for s in sorted(self._kept(self.seen.scaling), key=self._place):
            bus = [
                f"{operation} {values.tell(v, 'bytes/s', quick=self.quick, currency='').text}" for operation, v in s.bus
            ]
            cells = self._row(
                *(self._shown(v, "rate") for v in (s.alone, s.together)),
                self._shown(s.efficiency, "share"),
                self._shown(s.sent, "bytes", "a count"),
                ", ".join(bus) or "–",
            )
            made.append((Cells(heading=s.stack, below=", ".join(_apart(s)), cells=cells), s.group, s.kind))
        return made

    def _costs(self) -> Sheet | None:
        rows = [
            Cells(
                heading=c.stack,
                below=", ".join(_apart(c)),
                cells=self._row(
                    self._shown(c.million, "money", "one process"),
                    self._shown(c.training, "money"),
                    self._shown(c.joules, "joules", "one process"),
                    c.sensor or "–",
                ),
            )
            for c in sorted(self._kept(self.seen.costs), key=self._place)
        ]
        return _sheet(("A million inferences", "A training run", "Energy an image", "Sensor"), [("", rows)])

    def _stacks(self) -> Sheet | None:
        several = len({e.problem.work for e in self.entries}) > 1
        columns = (
            "Images/s",
            "Multiple of home's",
            "Efficiency by measured ceiling",
            "Efficiency by published peak",
            "Share of the platform's best",
        )
        rows = [
            Cells(
                heading=e.stack,
                below=", ".join(
                    x for x in (self._device(e.platform) or e.platform, e.problem.work if several else "") if x
                ),
                source=self._source(e.figure),
                outcome=e.figure.outcome,
                marks={
                    "mode": e.problem.mode,
                    "precision": e.problem.precision,
                    "batch": str(e.problem.batch),
                    "division": "closed" if e.closed else "open",
                },
                cells=self._row(
                    self._shown(e.rate, "rate"),
                    self._relative(e),
                    self._shown(e.efficiency, "share"),
                    self._shown(e.published, "share"),
                    self._shown(e.application, "share", "of two figures"),
                ),
            )
            for e in self.entries
        ]
        return _sheet(columns, [("", rows)])

    def _relative(self, entry: Entry) -> Shown:
        shown = self._shown(entry.relative, "multiple")
        if entry.platform == self.home and entry.relative.figure == 1 and entry.relative.low is None:
            return replace(shown, told=replace(shown.told, interval="home's best"))
        return shown

    def _portability(self) -> list[Cells]:
        return [
            Cells(
                heading=_problem_words(p.problem.label) + self._work(p.problem),
                below=f"by {p.by}",
                cells=self._row(
                    self._shown(p.whole, "plain"),
                    self._shown(p.supported, "plain"),
                    *(
                        self._shown(p.efficiencies[n], "share", "of two figures")
                        if n in p.efficiencies
                        else "not in the set"
                        for n in self.every
                    ),
                ),
            )
            for p in sorted(
                (p for p in self.seen.portability if p.problem in self.problems),
                key=lambda p: self.problems.index(p.problem),
            )
        ]

    def _divergence(self) -> Mapping[str, object] | None:
        found = self.seen.divergence
        platforms = found.get("platforms")
        if not isinstance(platforms, Mapping) or not platforms:
            return None
        rows = [
            [name, *(_whole(x.get(k)) for k in ("lines", "own", "shared"))]
            for name, x in platforms.items()
            if isinstance(x, Mapping)
        ]
        pairs = [x for x in found.get("distances", ()) if isinstance(x, Mapping)]
        return {
            "convergence": _plain_number(found.get("convergence")),
            "divergence": _plain_number(found.get("divergence")),
            "lines": Grid(
                caption="Lines inside functions that ran on each backend",
                columns=("Backend", "Lines", "Its own", "Shared"),
                rows=rows,
            ),
            "pairs": Grid(
                caption="Distance of each pair",
                columns=("Pair", "Distance"),
                rows=[[f"{x.get('a')}, {x.get('b')}", _plain_number(x.get("distance"))] for x in pairs],
            ),
            "notes": [str(x) for x in found.get("notes", ())],
        }

    def _numerics(self) -> list[Cells]:
        return [
            Cells(
                heading=n.stack,
                below=", ".join(
                    [*([n.platform] if n.platform not in n.stack else []), _problem_words(n.problem.label)]
                ),
                cells=self._row(
                    self._shown(n.gate, "share", "-"),
                    n.worst or "–",
                    self._shown(n.logits, "error", "-"),
                    self._shown(n.loss, "error", "-"),
                    self._shown(n.repeats, "truth", "-"),
                ),
            )
            for n in sorted(self._kept(self.seen.numerics), key=self._place)
        ]

    def _ablation(self) -> list[Cells]:
        return [
            Cells(
                heading=_taken(s.layer.split(", ")),
                below=f"{s.stack}, {_problem_words(s.problem.label)}"
                + (f", {s.platform}" if s.platform not in s.stack else ""),
                cells=(self._shown(s.slowdown, "multiple"),),
            )
            for s in sorted(self._kept(self.seen.ablation), key=self._place)
        ]

    def _sources(self) -> list[Source]:
        made = []
        for number, figure in enumerate(self.measured, 1):
            spec, first = figure.spec, figure.records[0]
            device = next((table.device(r) for r in figure.records if r.device), "")
            dates = sorted({str(r.environment.get("date", ""))[:10] for r in figure.records} - {""})
            made.append(
                Source(
                    number=number,
                    stack=spec.stack,
                    problem=f"{values.MODES[spec.mode]}, batch {spec.batch}"
                    + (", open division" if spec.division == "open" else ""),
                    device=device,
                    date=dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else "",
                    outcome=figure.outcome,
                    reason=figure.reason or first.reason,
                    rejected=figure.rejected,
                    digests=self._digests(figure),
                )
            )
        return made

    def _shared(self, what: str) -> list[page.Shared]:
        told = []
        for number, figure in enumerate(self.measured, 1):
            told += [(f"[{number}]", getattr(r, what)) for r in figure.records]
        found = page.shared(told)
        self._leave(len(found) - FEW_ENVIRONMENTS, f"{what}s; every record holds its own")
        return found[:FEW_ENVIRONMENTS]

    # The plots

    def _against_plot(self) -> Plot | None:
        told = [
            a
            for a in self._kept(self.seen.against)
            if a.throughput.figure is not None or a.throughput.why not in UNTOLD
        ]
        order = self.problems
        told.sort(key=lambda a: (self.names.index(a.platform), a.problem.mode != "train", order.index(a.problem)))
        self._leave(len(told) - FEW_GROUPS, "comparisons with home in the plot; the table below it has them")
        groups, data = [], []
        for a in told[:FEW_GROUPS]:
            bars: list[lockin_plots.Bar] = []
            for label, value in (("throughput", a.throughput), ("efficiency", a.efficiency)):
                shown = self._shown(value, "multiple")
                bars.append(_as_bar(label, value, shown, style=len(bars)))
                data.append([a.platform, _problem_words(a.problem.label), label, shown.told.line])
            groups.append((f"{a.platform}: {_problem_words(a.problem.label)}", bars))
        if not groups:
            return None
        return Plot(
            svg=Markup(
                lockin_plots.grouped(
                    groups,
                    name="against",
                    title="Throughput and efficiency against home",
                    unit="as a multiple of home's",
                    marks=REACHED,
                    whole=1.0,
                    most=4.0,
                )
            ),
            caption="Each platform's best closed stack as a multiple of home's best: throughput, which mixes chip and "
            "software, and architectural efficiency, which is the software's part. Whiskers are 95% intervals; dotted "
            "lines are the verdict's thresholds.",
            data=Grid(caption="Multiples of home's", columns=("Platform", "Problem", "Figure", "Value"), rows=data),
        )

    def _rates_plot(self) -> Plot | None:
        """Images/s of each platform's best closed stack, in the problem of each mode that most platforms did."""
        chosen = []
        for mode in ("train", "infer"):
            known = [e for e in self.entries if e.closed and e.problem.mode == mode and e.rate.figure is not None]
            if problem := _most(problem for _, problem in dict.fromkeys((e.platform, e.problem) for e in known)):
                chosen.append(problem)
        groups, data = [], []
        for name in self.names:
            bars: list[lockin_plots.Bar] = []
            for problem in chosen:
                entry = self._best(name, problem)
                value = entry.rate if entry else Value()
                shown = self._shown(value, "rate")
                bars.append(_as_bar(values.MODES[problem.mode], value, shown, style=len(bars)))
                data.append([name, _problem_words(problem.label), entry.stack if entry else "", shown.told.line])
            if any(bar.figure is not None for bar in bars):
                groups.append((name, bars))
        self._leave(len(groups) - FEW_GROUPS, "platforms in the plot of images per second")
        if not groups:
            return None
        of = values.listed([_problem_words(problem.label) for problem in chosen])
        return Plot(
            svg=Markup(
                lockin_plots.grouped(
                    groups[:FEW_GROUPS], name="rates", title="Images per second", unit="images per second"
                )
            ),
            caption=f"Images per second of each platform's best closed stack: {of}. Whiskers are 95% intervals.",
            data=Grid(caption="Images per second", columns=("Platform", "Problem", "Stack", "Images/s"), rows=data),
        )

    def _latency_plot(self) -> Plot | None:
        served = [s for s in self.seen.serving if s.p50.figure is not None]
        self._leave(len(served) - FEW_STACKS, "stacks in the plot of latency")
        if not served:
            return None
        groups, data = [], []
        for s in served[:FEW_STACKS]:
            bars: list[lockin_plots.Bar] = []
            for label, value in (("p50", s.p50), ("p90", s.p90), ("p99", s.p99)):
                shown = self._shown(value, "seconds")
                scaled = replace(value, **{k: 1e3 * v for k in ("figure", "low", "high") if (v := getattr(value, k))})
                bars.append(
                    replace(_as_bar(label, scaled, shown, style=len(bars)), text=_as_bar(label, value, shown).text)
                )
                data.append([s.stack, s.platform, label, shown.told.line])
            groups.append((", ".join([s.stack, *_apart(s)]), bars))
        return Plot(
            svg=Markup(
                lockin_plots.grouped(groups, name="latency", title="Latency of single images", unit="milliseconds")
            ),
            caption="Latency of single images, from issue to result: p50, p90 and p99.",
            data=Grid(caption="Latency", columns=("Stack", "Platform", "Percentile", "Latency"), rows=data),
        )

    def _sweep_plot(self) -> Plot | None:
        served = [s for s in self.seen.serving if s.sweep]
        self._leave(len(served) - FEW_STACKS, "stacks in the plot of throughput against latency")
        if not served:
            return None
        named = [(", ".join([s.stack, *_apart(s)]), s.sweep) for s in served[:FEW_STACKS]]
        # Whole answers, as costs count them, where they were measured.
        drawn = [
            (label, [(batch, answer or seconds, batch / (answer or seconds)) for batch, seconds, _, answer in points])
            for label, points in named
        ]
        return Plot(
            svg=Markup(lockin_plots.sweep(drawn, self.seen.latency, name="sweep")),
            caption="Images per second against the time of a whole answer, from batch to batch: pictures to the "
            "device, logits back, one after the other. What is right of "
            f"{values.duration(self.seen.latency)} does not count in costs.",
            data=Grid(
                caption="Throughput by batch",
                columns=("Stack", "Batch", "A whole answer", "On the device alone", "Images/s of that"),
                rows=[
                    [
                        label,
                        str(batch),
                        values.duration(answer) if answer else values.NOT_MEASURED,
                        values.duration(seconds),
                        values.number(rate, "rate"),
                    ]
                    for label, points in named
                    for batch, seconds, rate, answer in points
                ],
            ),
        )

    def _telling(self) -> Portability | None:
        """The problem whose efficiencies are known on most platforms, by the measured ceiling where there is one."""
        by = [p for p in self.seen.portability if p.by == "measured ceiling"] or [
            p for p in self.seen.portability if p.by == "published peak"
        ]
        return max(by, key=lambda p: sum(v.figure is not None for v in p.efficiencies.values()), default=None)

    def _cascade_plot(self) -> Plot | None:
        found = self._telling()
        if found is None or not found.cascade:
            return None
        self._leave(
            sum(p.by == found.by for p in self.seen.portability) - 1, "problems' cascades; the table has their figures"
        )
        steps, rows = [], []
        for name, _, pp in found.cascade:
            value = found.efficiencies[name]
            shown = self._shown(value, "share")
            text = value.note.removeprefix("unsupported: ") if value.figure == 0 else shown.told.text
            bar = _as_bar(name, value, shown)
            steps.append(lockin_plots.Bar(label=name, figure=bar.figure, low=bar.low, high=bar.high, text=text))
            rows.append([name, shown.told.line, values.number(pp, "plain")])
        missing = [n for n, v in found.efficiencies.items() if v.figure is None and n not in self.gone]
        rows += [[n, self._shown(found.efficiencies[n], "share").told.line, values.NOT_MEASURED] for n in missing]
        pps = [pp for _, _, pp in found.cascade]
        return Plot(
            svg=Markup(lockin_plots.cascade(steps, pps, missing, name="cascade")),
            caption=f"Cascade of {_problem_words(found.problem.label)}: efficiency by {found.by} on each platform, "
            "falling, and PP over that platform and all to its left.",
            data=Grid(caption="Cascade", columns=("Platform", "Efficiency", "PP up to here"), rows=rows),
        )

    def _navigation_plot(self) -> Plot | None:
        convergence = self.seen.divergence.get("convergence")
        found = self._telling()
        if not isinstance(convergence, int | float) or not 0 <= convergence <= 1 or found is None:
            return None
        points: list[lockin_plots.Point] = []
        rows = []
        for label, value in (("all platforms", found.whole), ("the supported ones alone", found.supported)):
            shown = self._shown(value, "plain")
            rows.append([label, values.digits(convergence), shown.told.line])
            if value.figure is not None:
                points.append(
                    lockin_plots.Point(label=f"PP over {label}", x=convergence, y=value.figure, style=len(points))
                )
        if not points:
            return None
        return Plot(
            svg=Markup(lockin_plots.navigation(points, name="navigation")),
            caption=f"Navigation chart of {_problem_words(found.problem.label)}: at (1, 1) one and the same code is "
            "efficient on every platform.",
            data=Grid(caption="Navigation chart", columns=("Platforms", "Code convergence", "PP"), rows=rows),
        )

    def _rooflines(self) -> list[Plot]:
        timed = [e for e in self.entries if e.rate.figure is not None and _layers(e.figure.detailed)]
        problem = _most([e.problem for e in timed])
        best: dict[str, Entry] = {}
        for entry in timed:
            if entry.problem == problem and entry.closed:
                other = best.get(entry.platform)
                if other is None or (entry.rate.figure or 0) > (other.rate.figure or 0):
                    best[entry.platform] = entry
        chosen = [best[n] for n in self.names if n in best]
        self._leave(len({(e.stack, e.problem) for e in timed}) - len(chosen[:FEW_PLATFORMS]), "stacks' rooflines")
        made = []
        for n, entry in enumerate(chosen[:FEW_PLATFORMS], 1):
            record = entry.figure.detailed
            ceilings = lockin.best(record.ceilings)
            flops, bandwidth = ceilings["flops"], ceilings["bandwidth"]
            assert flops
            assert bandwidth
            points, rows = [], []
            for name, work, seconds in _layers(record):
                intensity, rate = work["flops"] / work["bytes"], work["flops"] / seconds
                points.append(lockin_plots.Point(label=name, x=intensity, y=rate))
                share = work["floor"] / seconds if work.get("floor") else None
                rows.append(
                    [
                        name,
                        values.si(work["flops"], "FLOP"),
                        values.size(work["bytes"]),
                        values.digits(intensity),
                        values.duration(seconds),
                        values.si(rate, "FLOP/s"),
                        values.number(share, "share") if share is not None else values.NOT_MEASURED,
                    ]
                )
            of = f"{entry.stack}, {_problem_words(entry.problem.label)}"
            above = any(p.y > 1.05 * min(flops, bandwidth * p.x) for p in points)
            quick = ", quick" if record.spec.quick else ""
            made.append(
                Plot(
                    svg=Markup(lockin_plots.roofline(flops, bandwidth, points, name=f"roofline-{n}", of=of)),
                    caption=f"{of}{quick}: each layer timed on its own, under the roof measured in the same process "
                    f"(one process, so no interval; measurement {self._source(entry.figure)})."
                    + (" To a layer above it, what was measured is no ceiling." if above else ""),
                    data=Grid(
                        caption=f"Layers of {of}",
                        columns=("Layer", "Work", "Least bytes", "FLOP a byte", "Time alone", "Rate", "Floor / time"),
                        rows=rows,
                    ),
                )
            )
        return made

    def _losses(self) -> list[Plot]:
        groups: dict[tuple[object, ...], list[tuple[str, lockin.Row]]] = {}
        rows = {id(row.record): row for row in lockin.rows([r for r in self.seen.records if r.training.get("losses")])}
        for figure in self.measured:
            row = next((rows[id(r)] for r in figure.records if id(r) in rows), None)
            if row is not None:
                key = (*(getattr(row.spec, k) for k in lockin.TRAINING), row.record.weights)
                groups.setdefault(key, []).append((table.plain(row.spec.stack), row))
        if not groups:
            return []
        chosen = max(groups.values(), key=len)
        self._leave(len(groups) - 1, "kinds of training whose losses are not drawn")
        # The reference first, and every stack once.
        chosen.sort(key=lambda pair: pair[1].reference is not pair[1].record)
        once = list({label: (label, row) for label, row in reversed(chosen)}.values())[::-1]
        self._leave(len(once) - FEW_STACKS, "stacks' loss curves")
        return [_thinned(plot) for plot in page.curves(once[:FEW_STACKS], 1)]

    def _waterfalls(self) -> list[Plot]:
        groups: dict[tuple[str, str, Problem], list[tuple[frozenset[str], Value]]] = {}
        for share in self.seen.ablation:
            layers = frozenset(share.layer.split(", "))
            groups.setdefault((share.platform, share.stack, share.problem), []).append((layers, share.slowdown))
        ranked = sorted(groups, key=lambda k: (k[0] != self.home, -len(groups[k])))
        self._leave(len(ranked) - 2, "ablations' waterfalls; the table has their figures")
        made = []
        for n, key in enumerate(ranked[:2], 1):
            rungs, data = [], []
            for layers, value in sorted(groups[key], key=lambda pair: (len(pair[0]), pair[1].figure or 0))[:12]:
                below = [v.figure for other, v in groups[key] if other < layers and v.figure]
                shown = self._shown(value, "multiple")
                label = _taken(layers)
                bar = _as_bar(label, value, shown)
                rungs.append(
                    lockin_plots.Bar(
                        label=label,
                        figure=bar.figure,
                        low=bar.low,
                        high=bar.high,
                        text=bar.text,
                        start=max(below, default=1.0),
                    )
                )
                data.append([label, shown.told.line])
            of = f"{key[1]}, {_problem_words(key[2].label)}"
            made.append(
                Plot(
                    svg=Markup(lockin_plots.waterfall(rungs, name=f"ablation-{n}", of=of)),
                    caption=f"{of}: how many times as long a step takes with each layer of the vendor's software taken "
                    "away. Whiskers are 95% intervals; the axis is logarithmic.",
                    data=Grid(caption="Without each layer", columns=("Taken away", "Time of a step"), rows=data),
                )
            )
        return made

    def _start_plot(self) -> Plot | None:
        quickest: dict[str, tuple[Record, Entry]] = {}
        for entry in self.entries:
            cold = cold_start(entry.figure) if entry.figure.outcome in lockin.COUNTED else None
            known = quickest.get(entry.platform)
            if cold and (known is None or cold.times["total"] < known[0].times["total"]):
                quickest[entry.platform] = (cold, entry)
        if not quickest:
            return None
        ranked = [quickest[n] for n in self.names if n in quickest]
        self._leave(len(ranked) - FEW_GROUPS, "platforms' times to the first step")
        bars, rows = [], []
        for record, entry in ranked[:FEW_GROUPS]:
            parts = {
                word: float(record.times[k])
                for k, word in PHASES.items()
                if isinstance(record.times.get(k), int | float)
            }
            total = values.duration(record.times["total"]) + (" quick" if record.spec.quick else "")
            bars.append(lockin_plots.Stacked(label=entry.stack, parts=parts, text=total))
            rows.append(
                [
                    f"{entry.stack}, {values.MODES[entry.problem.mode]}",
                    *(values.duration(parts[w]) if w in parts else values.NOT_MEASURED for w in PHASES.values()),
                    total,
                    self.digests[id(record)][:8],
                ]
            )
        return Plot(
            svg=Markup(
                lockin_plots.stacked(
                    bars, name="start", title="Time to the first step", unit="seconds to the first result"
                )
            ),
            caption="From the start of the process to the first result, with empty caches of compiled code: of the "
            "stacks that work the quickest on each platform. One process each, so no interval.",
            data=Grid(
                caption="Time to the first step",
                columns=("Stack", *(w[:1].upper() + w[1:] for w in PHASES.values()), "Together", "Record"),
                rows=rows,
            ),
        )


def _sheet(columns: Sequence[str], groups: Sequence[tuple[str, Sequence[Cells]]]) -> Sheet | None:
    rows = [row for _, own in groups for row in own]
    if not rows:
        return None
    seen = [[row.cells[n] for row in rows] for n in range(len(columns))]
    kept = [n for n, cells in enumerate(seen) if any(not isinstance(c, str) and c.told.measured for c in cells)]
    why: dict[str, list[str]] = {}
    for n, cells in enumerate(seen):
        # Multiples of what is not there go with it.
        if n not in kept and not columns[n].startswith(("This ", "That ", "Sensor")):
            notes = dict.fromkeys(c.told.note for c in cells if not isinstance(c, str) and c.told.text != "void")
            name = columns[n][:1].lower() + columns[n][1:]
            why.setdefault(" and ".join(note for note in notes if note), []).append(name)
    absent = "; ".join(f"{values.listed(names)}{f' ({note})' if note else ''}" for note, names in why.items())
    return Sheet(
        columns=[columns[n] for n in kept],
        groups=[(title, [replace(row, cells=[row.cells[n] for n in kept]) for row in own]) for title, own in groups],
        absent=absent,
    )


def _taken(layers: Iterable[str]) -> str:
    """What is left out, or which rung below the libraries is left."""
    return ", ".join(map(taken, sorted(layers)))


def _apart(row: Serving | Cost | Scaling) -> list[str]:
    """What tells it from others of its stack's name."""
    return [*([row.platform] if row.platform not in row.stack else []), *([row.work] if row.work != USUAL else [])]


def _chip(figure: Figure) -> tuple[str, str]:
    """The chip's name and its machine's.

    Backends name one in their own ways: ``ONNX Runtime on Some Processor``, ``Some Processor, AVX2, 2 threads``.
    """
    record = next((r for r in figure.records if r.device), figure.records[0])
    name = table.device(record).rpartition(" on ")[2].partition(",")[0]
    return name, str(record.environment.get("host", ""))


def _bar(value: Value) -> Mapping[str, float] | None:
    """Where a figure and its interval stand on a bar on which home is at 80%."""
    if value.figure is None:
        return None

    def place(share: float) -> float:
        return round(min(max(80 * share, 0.0), 100.0), 2)

    low, high = (value.low, value.high) if value.low is not None and value.high is not None else (0.0, 0.0)
    return {"at": place(value.figure), "low": place(low), "wide": round(place(high) - place(low), 2)}


def _as_bar(label: str, value: Value, shown: Shown, style: int = 0) -> lockin_plots.Bar:
    told = shown.told
    text = told.text + (" quick" if told.quick else "")
    if told.measured and value.low is not None:
        text += f" ({told.interval})"
    return lockin_plots.Bar(
        label=label,
        figure=value.figure if told.measured else None,
        low=value.low if told.measured else None,
        high=value.high if told.measured else None,
        text=f"void: {told.note.partition(':')[0]}" if told.text == "void" else text,
        style=style,
    )


def _problem_words(label: str) -> str:
    mode, comma, rest = label.partition(",")
    return values.MODES.get(mode, mode) + comma + rest


def _most(problems: Iterable[Problem]) -> Problem | None:
    """The one that occurs most often; of several the first."""
    count = Counter(problems)
    return max(count, key=lambda p: count[p], default=None)


def _layers(record: Record) -> list[tuple[str, Mapping[str, float], float]]:
    """The layers that were timed on their own and do arithmetic, with the seconds that each takes."""
    ceilings = lockin.best(record.ceilings)
    if not (ceilings["flops"] and ceilings["bandwidth"]):
        return []
    found = []
    for name, work in record.layers.items():
        parts = [work.get("forward")] + ([work.get("backward")] if record.spec.mode == "train" else [])
        seconds = sum(x for x in parts if x)
        if parts[0] and seconds > 0 and work.get("flops") and work.get("bytes"):
            found.append((name, work, seconds))
    return found


def _thinned(plot: Plot) -> Plot:
    """The plot with at most `STEPS` of its data's rows."""
    rows = plot.data.rows
    if len(rows) <= STEPS:
        return plot
    kept = [rows[i] for i in table.spaced(len(rows), STEPS)]
    caption = f"{plot.data.caption}; {STEPS} of {len(rows):,} steps"
    return Plot(svg=plot.svg, caption=plot.caption, data=Grid(caption=caption, columns=plot.data.columns, rows=kept))


def _class(outcome: str) -> str:
    known = {"works": "works", "partial": "partial", "not available": "absent", "not measured": "absent"}
    return known.get(outcome, "bad")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text) - LONGEST:,} letters more)"


def _whole(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else values.NOT_MEASURED


def _plain_number(value: object) -> str:
    return values.digits(value) if isinstance(value, int | float) else values.NOT_MEASURED
