"""An assessment for programs (JSON, CSV), for documents (Markdown) and for the terminal.

``docs/report.md`` tells the fields of JSON and the columns of CSV. Both are stable: a field that changes its meaning
changes the schema's number.
"""

import csv as csv_module
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from math import isfinite
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from portnet.assessment import Assessment, Entry, Platform, Value, Verdict
from portnet.lockin import Figure
from portnet.report import values
from portnet.report.table import STYLES, plain
from portnet.report.values import NOT_MEASURED

SCHEMA = "portnet.report/1"

VERDICTS = {"high": "red", "moderate": "yellow", "low": "green", NOT_MEASURED: "dim"}
"""Each verdict's colour, the worst first."""
ROWS = 24
"""Of a table in the terminal at most."""
_FIGURES = ("rate", "relative", "efficiency", "published", "of_published", "application")
COLUMNS = (
    *("platform", "device", "vendor", "stack", "division", "mode", "precision", "batch", "work"),
    *("outcome", "reason", "quick"),
    *(f"{name}{end}" for name in _FIGURES for end in ("", "_low", "_high", "_note")),
    "records",
)
"""Of the CSV: one row a stack and problem."""


def to_json(assessment: Assessment, *, indent: int | None = 1) -> str:
    """The assessment as one JSON object of schema `SCHEMA`; every number is finite, and what is none is null."""
    seen = assessment
    told = {
        "schema": SCHEMA,
        "home": seen.home,
        "wanted": seen.wanted,
        "quick": seen.quick,
        "latency": seen.latency,
        "currency": seen.currency,
        "platforms": seen.platforms,
        "missing": seen.missing,
        "verdicts": [
            {
                "platform": v.platform,
                "verdict": v.word,
                "sentence": v.sentence,
                "deciding": [{"what": what, "value": value} for what, value in v.deciding],
            }
            for v in seen.verdicts
        ],
        "stack": seen.stack,
        "entries": seen.entries,
        "against": seen.against,
        "portability": seen.portability,
        "outcomes": seen.outcomes,
        "ablation": seen.ablation,
        "numerics": seen.numerics,
        "serving": seen.serving,
        "scaling": seen.scaling,
        "costs": seen.costs,
        "divergence": seen.divergence,
        "records": sorted({record.digest for record in seen.records}),
        "problems": [str(problem) for problem in seen.problems],
    }
    return json.dumps(_simple(told), indent=indent, allow_nan=False, sort_keys=False) + "\n"


def _simple(value: Any) -> Any:
    """What JSON holds: dataclasses by their fields, numbers that are none as null."""
    match value:
        case Value():
            known = value.figure is not None and isfinite(value.figure)
            told = {f: _simple(getattr(value, f)) if known else None for f in ("figure", "low", "high")}
            return {**told, "why": None if known else value.why, "note": value.note, "records": list(value.records)}
        case Entry():
            spec = value.figure.spec
            told = {
                f.name: _simple(getattr(value, f.name)) for f in fields(value) if f.name not in ("figure", "closed")
            }
            return {
                "stack": value.stack,
                "division": spec.division,
                "outcome": value.figure.outcome,
                "reason": value.figure.reason,
                "processes": len(value.figure.records),
                "rejected": value.figure.rejected,
                "quick": spec.quick,
                **told,
            }
        case Platform():
            told = {f.name: _simple(getattr(value, f.name)) for f in fields(value) if f.name != "published"}
            return {**told, "published": value.published.name if value.published else None}
        case Figure():
            raise TypeError("a figure is told by its entry")
        case bool() | int() | str() | None:
            return value
        case float():
            return value if isfinite(value) else None
        case Mapping():
            return {str(k): _simple(v) for k, v in value.items()}
        case Iterable():
            return [_simple(v) for v in value]
    if is_dataclass(value):
        return {f.name: _simple(getattr(value, f.name)) for f in fields(value)}
    return str(value)


def csv(assessment: Assessment) -> str:
    """One row a stack and problem, with `COLUMNS`. What was not measured is an empty cell whose note says why.

    A text that a spreadsheet would take for a formula has an apostrophe before it.
    """
    platforms = {p.name: p for p in assessment.platforms}
    text = io.StringIO()
    writer = csv_module.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for entry in assessment.entries:
        platform, problem = platforms[entry.platform], entry.problem
        row: list[Any] = [
            *(_cell(x) for x in (entry.platform, platform.device, platform.vendor, entry.stack)),
            entry.figure.spec.division,
            problem.mode,
            _cell(problem.precision),
            problem.batch,
            _cell(problem.work),
            entry.figure.outcome,
            _cell(entry.figure.reason),
            "yes" if entry.figure.spec.quick else "no",
        ]
        for name in _FIGURES:
            value: Value = getattr(entry, name)
            known = value.figure is not None and isfinite(value.figure)
            row += [repr(x) if known and x is not None else "" for x in (value.figure, value.low, value.high)]
            row.append(_cell(value.note if known else value.why))
        row.append(" ".join(r.digest for r in entry.figure.records))
        writer.writerow(row)
    return text.getvalue()


def _cell(text: str) -> str:
    text = plain(text).replace("\r", " ").replace("\n", " ")
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") else text


def markdown(assessment: Assessment) -> str:
    """The report as a document: what decides first, then the tables; the plots are on the page alone."""
    return "\n".join(_Markdown(assessment).lines()) + "\n"


class _Markdown:
    """The steps of one document."""

    def __init__(self, assessment: Assessment) -> None:
        self.seen = assessment
        self.quick = {r.digest for r in assessment.records if r.spec.quick}
        self.names = [*(p.name for p in assessment.platforms), *assessment.missing]

    def lines(self) -> list[str]:
        seen = self.seen
        made = [f"# What would leaving {_md(values.named(seen.wanted))} cost?", ""]
        made += [_md(line) for line in headline(seen)] + [""]
        if seen.verdicts:
            made += ["## The verdict", ""]
            for verdict in seen.verdicts:
                made += [f"### {_md(verdict.platform)}: {_md(_lock_in(verdict))}", "", _md(verdict.sentence), ""]
                made += [
                    f"- {_md(what)}: {self.told(value, 'share' if what.startswith('share') else 'multiple')}"
                    for what, value in verdict.deciding
                ]
                made.append("")
        kinds = {"lines": "lines", "share": "share", "times": "multiple", "s": "seconds"}
        made += self.table(
            "The stack, layer by layer",
            ("Layer", "Question", *self.names),
            [
                [
                    layer.name,
                    layer.question,
                    *(self.told(layer.values.get(n, Value()), kinds.get(layer.unit, layer.unit)) for n in self.names),
                ]
                for layer in seen.stack
            ],
            ready=2,
        )
        cells = seen.outcomes.cells
        made += self.table(
            "What works",
            ("Feature", *self.names),
            [[f, *(row[n].outcome if n in row else NOT_MEASURED for n in self.names)] for f, row in cells.items()],
        )
        made += self.table(
            "Every stack",
            (
                *("Platform", "Stack", "Division", "Problem", "Outcome"),
                *("Images/s", "Multiple of home's", "Efficiency by measured ceiling", "Efficiency by published peak"),
            ),
            [
                [
                    e.platform,
                    e.stack,
                    e.figure.spec.division,
                    e.problem.label,
                    e.figure.outcome,
                    self.told(e.rate, "rate"),
                    self.told(e.relative, "multiple"),
                    self.told(e.efficiency, "share"),
                    self.told(e.published, "share"),
                ]
                for e in seen.entries
            ],
            ready=5,
        )
        made += self.table(
            "Performance portability",
            ("Problem", "By", "PP, all platforms", "PP, the supported ones"),
            [
                [p.problem.label, p.by, self.told(p.whole, "plain"), self.told(p.supported, "plain")]
                for p in seen.portability
            ],
            ready=2,
        )
        made += self.table(
            "Serving",
            ("Stack", "Platform", "Work", "p50", "p90", "p99", "Images/s in time", "Peak memory", "Largest batch"),
            [
                [
                    s.stack,
                    s.platform,
                    s.work,
                    *(self.told(v, "seconds") for v in (s.p50, s.p90, s.p99)),
                    self.told(s.most, "rate"),
                    self.told(s.peak_memory, "bytes"),
                    self.told(s.largest_batch, "count"),
                ]
                for s in seen.serving
            ],
            ready=3,
        )
        made += self.table(
            "Several devices",
            (
                *("Stack", "Platform", "Group", "Collectives", "Outcome"),
                *("Images/s, one", "Images/s, together", "Efficiency", "Sent in a step", "Bus bandwidth"),
            ),
            [
                [
                    s.stack,
                    s.platform,
                    s.group,
                    s.kind,
                    s.outcome,
                    *(self.told(v, "rate") for v in (s.alone, s.together)),
                    self.told(s.efficiency, "share"),
                    self.told(s.sent, "bytes"),
                    ", ".join(f"{operation} {self.told(v, 'bytes/s')}" for operation, v in s.bus) or "–",
                ]
                for s in seen.scaling
            ],
            ready=5,
        )
        made += self.table(
            "Cost",
            ("Stack", "Platform", "A million inferences", "A training run", "Energy an image"),
            [
                [
                    c.stack,
                    c.platform,
                    self.told(c.million, "money"),
                    self.told(c.training, "money"),
                    self.told(c.joules, "joules"),
                ]
                for c in seen.costs
            ],
            ready=2,
        )
        made += self.table(
            "What each library is worth",
            ("Stack", "Platform", "Taken away", "Times as long"),
            [[s.stack, s.platform, s.layer, self.told(s.slowdown, "multiple")] for s in seen.ablation],
            ready=3,
        )
        made += self.table(
            "Numbers",
            (
                "Stack",
                "Platform",
                "Problem",
                "Gate used",
                "Logits' error",
                "Loss distance, nats",
                "Repeats bit for bit",
            ),
            [
                [
                    n.stack,
                    n.platform,
                    _md(n.problem.label),
                    self.told(n.gate, "share"),
                    self.told(n.logits, "error"),
                    self.told(n.loss, "error"),
                    self.told(n.repeats, "truth"),
                ]
                for n in seen.numerics
            ],
            ready=3,
        )
        made += ["## Records", ""]
        made += [f"- `{digest}`" for digest in sorted({r.digest for r in seen.records})] + [""]
        if seen.problems:
            made += ["## What was left out", ""] + [f"- {_md(str(p))}" for p in seen.problems] + [""]
        return made[:-1]

    def told(self, value: Value, kind: str) -> str:
        return _md(values.tell(value, kind, quick=self.quick, currency=self.seen.currency).line)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, ready: int = 1000
    ) -> list[str]:
        """A section with a table. Cells from the `ready`-th on are Markdown already."""
        made = [f"## {title}", ""]
        if not rows:
            return [*made, NOT_MEASURED, ""]
        made += [f"| {' | '.join(_md(c) for c in columns)} |", f"|{' --- |' * len(columns)}"]
        for row in rows:
            made.append(f"| {' | '.join(c if n >= ready else _md(c) for n, c in enumerate(row))} |")
        return [*made, ""]


def _md(text: str) -> str:
    """The text on one line, in which nothing is Markdown or HTML."""
    escaped = "".join(f"\\{c}" if c in "\\`*_[]|#!~" else c for c in " ".join(plain(text).split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def headline(assessment: Assessment) -> list[str]:
    """What a reader must know before any figure, in sentences."""
    seen = assessment
    name = values.named(seen.wanted)
    made = []
    if seen.home is None:
        made.append(f"{name} was not measured, so what leaving it would cost cannot be told from these records.")
    elif seen.verdicts:
        made.append(f"Lock-in to {values.named(seen.home)}: {answer(seen)}.")
    else:
        made.append(f"Only {name} was measured: there is no platform to leave it for.")
    if seen.missing:
        made.append(f"Asked for and not measured: {', '.join(seen.missing)}.")
    if seen.quick:
        made.append("quick: such figures come from fewer samples than a figure to be quoted needs.")
    if seen.problems:
        made.append(f"Left out: {len(seen.problems)}.")
    return made


def answer(assessment: Assessment) -> str:
    """The verdicts in a sentence."""
    groups: dict[str, list[str]] = {}
    for verdict in assessment.verdicts:
        groups.setdefault(verdict.word, []).append(verdict.platform)
    for name in assessment.missing:
        groups.setdefault(NOT_MEASURED, []).append(name)
    return "; ".join(f"{word} against {values.listed(groups[word])}" for word in VERDICTS if word in groups)


def _lock_in(verdict: Verdict) -> str:
    return verdict.word if verdict.word == NOT_MEASURED else f"{verdict.word} lock-in"


def summary(assessment: Assessment) -> list[RenderableType]:
    """What decides, for the terminal; strings are not to be wrapped."""
    seen = assessment
    quick = {r.digest for r in seen.records if r.spec.quick}

    def told(value: Value, kind: str) -> str:
        seen = values.tell(value, kind, quick=quick)
        return seen.text + (" quick" if seen.quick else "") + (f"\n{seen.interval}" if value.low is not None else "")

    made: list[RenderableType] = [Text(plain(line)) for line in headline(seen)]
    if seen.verdicts:
        table = _table(
            "Platform,\ndevice",
            "Lock-in",
            "Features\nretained",
            *("Efficiency,\n×home: " + m for m in ("train", "infer")),
        )
        devices = {p.name: p.device for p in seen.platforms}
        for verdict in seen.verdicts:
            cells = [Text(told(seen.outcomes.retained.get(verdict.platform, Value()), "share"))]
            for mode in ("train", "infer"):
                found = [v for what, v in verdict.deciding if what.startswith(mode) and "efficiency" in what]
                cells.append(Text(told(found[0] if found else Value(), "multiple")))
            name = Text(plain(verdict.platform)).append(f"\n{plain(devices.get(verdict.platform, ''))}", style="dim")
            table.add_row(name, Text(verdict.word, style=VERDICTS.get(verdict.word, "")), *cells)
        made += ["", table]
    rows = [a for a in seen.against if a.throughput.figure is not None]
    rows.sort(key=lambda a: (a.platform, a.problem.mode != "train", a.problem.precision, a.problem.batch))
    if rows:
        table = _table("Platform,\nproblem", "Throughput,\n×home", "Efficiency,\n×home", "By published,\n×home")
        for a in rows[:ROWS]:
            name = Text(plain(a.platform)).append(f"\n{plain(a.problem.label)}", style="dim")
            table.add_row(name, *(Text(told(v, "multiple")) for v in (a.throughput, a.efficiency, a.published)))
        made += ["", table, *_more(len(rows))]
    if seen.home is None and (timed := [e for e in seen.entries if e.rate.figure is not None or e.figure.reason]):
        table = _table("Stack,\nproblem", "Outcome", "Images/s", "Efficiency", "Share of the\nplatform's best")
        for e in sorted(timed, key=lambda e: (e.problem.label, -(e.rate.figure or 0)))[:ROWS]:
            name = Text(plain(e.stack)).append(f"\n{plain(e.problem.label)}", style="dim")
            outcome = Text(e.figure.outcome, style=STYLES.get(e.figure.outcome, "red"))
            figures = ((e.rate, "rate"), (e.efficiency, "share"), (e.application, "share"))
            table.add_row(name, outcome, *(Text(told(v, kind)) for v, kind in figures))
        made += ["", table, *_more(len(timed))]
    held = [p for p in seen.portability if p.by == "measured ceiling"]
    if held:
        table = _table(
            "Performance portability,\nby measured ceilings", "PP, all\nplatforms", "PP, the\nsupported ones"
        )
        for p in held[:ROWS]:
            table.add_row(Text(plain(p.problem.label)), Text(told(p.whole, "plain")), Text(told(p.supported, "plain")))
        made += ["", table, *_more(len(held))]
    return made


def _more(count: int) -> list[str]:
    return [f"and {count - ROWS} more; the page and the other formats hold all"] if count > ROWS else []


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, leading=1)
    table.add_column(first, overflow="fold")
    for column in others:
        table.add_column(column, justify="right" if column not in ("Lock-in", "Outcome") else "left")
    return table
