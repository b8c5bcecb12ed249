"""Records as one self-contained page: no scripts, and nothing that it would load."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from portnet.errors import RecordError
from portnet.files import write_atomically
from portnet.lockin import Row, drift, rows, same_work, spread
from portnet.record import Record
from portnet.report import plots, table

MODES = {"training": "train", "inference": "infer"}


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table of text. Each row begins with its heading."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot with the data behind it."""

    svg: Markup
    caption: str
    data: Grid


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A device or an environment, and the stacks that were measured on it."""

    title: str
    dates: Sequence[str]
    stacks: Sequence[str]
    data: Grid


@dataclass(frozen=True, kw_only=True)
class Work:
    """The stacks that were given the same work, which alone can be compared."""

    told: str
    plots: Sequence[Plot]
    losses: Grid | None


def render(records: Sequence[Record], problems: Sequence[Exception | str] = ()) -> str:
    """The page. `problems` are the records that could not be used, each in a sentence of its own."""
    figures = rows(records)
    # What was measured comes first.
    named = sorted(zip(table.labels(figures), figures, strict=True), key=lambda pair: _absent(pair[1].record))
    absent = sum(map(_absent, records))
    present = len(records) - absent
    return template("compare.html.jinja").render(
        title=f"PortNet: {present} stack{'s' * (present != 1)} compared",
        absent=absent,
        works=_works(named),
        start=_start(records),
        named=named,
        explained=[(label, row.record) for label, row in named if row.record.reason or row.record.remedy],
        table=table,
        answers=_answers(figures),
        spread=None if (drifted := spread(records)) is None else table.error(drifted),
        quick=any(row.spec.quick for row in figures),
        devices=shared([(label, row.record.device) for label, row in named]),
        environments=shared([(label, row.record.environment) for label, row in named]),
        problems=[str(problem) for problem in problems],
    )


def write(records: Sequence[Record], path: str | os.PathLike[str], problems: Sequence[Exception | str] = ()) -> Path:
    """Write the page to a file, whole or not at all; returns its path. Raises `RecordError`."""
    return write_atomically(path, render(records, problems).encode(), RecordError)


def _answers(figures: Sequence[Row]) -> Grid | None:
    lines = table.answered(figures)
    return Grid(caption=table.answers_told(figures), columns=table.ANSWERS, rows=lines) if lines else None


def _absent(record: Record) -> bool:
    return record.outcome == "not available"


def _works(named: Sequence[tuple[str, Row]]) -> list[Work]:
    works = []
    for n, group in enumerate(same_work([row.record for _, row in named]), 1):
        own = [(label, row) for label, row in named if any(row.record is record for record in group)]
        works.append(
            Work(told=table.work(group[0].spec), plots=[*curves(own, n), *_speeds(own, n)], losses=_sampled(own))
        )
    return works


def curves(named: Sequence[tuple[str, Row]], n: int) -> list[Plot]:
    """The loss of every stack that trained, and how far it is from the reference's."""
    trained = [(label, row) for label, row in named if row.losses]
    # The reference comes first, to be drawn below the others.
    trained.sort(key=lambda pair: pair[1].reference is not pair[1].record)
    made = []
    losses = [plots.Curve(label=label, values=row.losses, style=i) for i, (label, row) in enumerate(trained)]
    if losses:
        made.append(
            Plot(
                svg=Markup(plots.losses(losses, name=f"losses-{n}")),
                caption="The loss before each training step. Where stacks agree, their curves lie on one another.",
                data=_by_step("Loss before each training step, in nats", losses, "{:.6g}"),
            )
        )
    distances = [
        plots.Curve(label=label, values=row.distances, style=i)
        for i, (label, row) in enumerate(trained)
        if row.distances and row.reference is not row.record
    ]
    if distances:
        drifted = drift([row.record for _, row in named])
        ours = [plots.Curve(label="runs one rounding apart", values=drifted, style=0)] if drifted else []
        made.append(
            Plot(
                svg=Markup(plots.distances(distances, name=f"distances-{n}", drift=drifted)),
                caption="How far each loss is from the float64 reference's. A step at which it equals the reference's "
                "in every bit has a mark at the bottom.",
                data=_by_step("Distance of the loss from the reference's, in nats", [*distances, *ours], "{:.2e}"),
            )
        )
    return made


def _speeds(named: Sequence[tuple[str, Row]], n: int) -> list[Plot]:
    """Images per second of every stack whose device is there."""
    present = [(label, row) for label, row in named if not _absent(row.record)]
    if not present:
        return []
    bars, data = [], []
    for label, row in present:
        rates = {"training": row.train, "inference": row.infer}
        bars.append(
            plots.Bars(label=label, rates=rates, text={word: table.speed(row, mode) for word, mode in MODES.items()})
        )
        for word, mode in MODES.items():
            measured = rates[word]
            cells = [table.speed(row, mode), *["-"] * 5]
            if measured is not None:
                timed = row.record.samples[mode]
                counts = (len(timed["seconds"]), timed["steps"], timed["batch"])
                cells = [cells[0], *map(table.rate, measured[1:]), *map(str, counts)]
            data.append([label, word, *cells])
    columns = ("Stack", "Mode", "Median", "Least", "Most", "Blocks", "Steps a block", "Images a step")
    return [
        Plot(
            svg=Markup(plots.throughput(bars, name=f"throughput-{n}")),
            caption="Images per second: the median over timed blocks, with a whisker from the slowest to the fastest.",
            data=Grid(caption="Images per second", columns=columns, rows=data),
        )
    ]


def _sampled(named: Sequence[tuple[str, Row]], at_most: int = 12) -> Grid | None:
    trained = [plots.Curve(label=label, values=row.losses, style=0) for label, row in named if row.losses]
    if not trained:
        return None
    every = _by_step("Loss before a training step, in nats", trained, "{:.4f}")
    chosen = [every.rows[step] for step in table.spaced(len(every.rows), at_most)]
    return Grid(caption=every.caption, columns=every.columns, rows=chosen)


def _by_step(caption: str, curves: Sequence[plots.Curve], form: str) -> Grid:
    steps = range(max(len(curve.values) for curve in curves))
    cells = [
        [form.format(curve.values[step]) if step < len(curve.values) else table.NOT_MEASURED for curve in curves]
        for step in steps
    ]
    return Grid(
        caption=caption,
        columns=("Step", *(curve.label for curve in curves)),
        rows=[(str(step + 1), *line) for step, line in zip(steps, cells, strict=True)],
    )


def _start(records: Sequence[Record]) -> str:
    """Whether training began at the same weights."""
    weights = {record.weights for record in records if record.weights}
    if len(weights) == 1:
        return f"Training began at the same weights, SHA-256 {weights.pop()[:16]}."
    return (
        "Training began at different weights: its losses are held against a reference of the same ones only."
        if (weights)
        else ""
    )


def shared(told: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Shared]:
    """Equal descriptions once, each with the stacks that it is of and the dates it was found at."""
    groups: dict[tuple[tuple[str, str], ...], list[tuple[str, str]]] = {}
    for label, mapping in told:
        items = tuple((name, value) for name, value in _flat(mapping) if name != "date")
        if items:
            groups.setdefault(items, []).append((label, str(mapping.get("date", ""))))
    return [
        Shared(
            title=", ".join(value for name, value in items if name in ("name", "system", "machine")) or "unnamed",
            dates=sorted({date for _, date in found if date}),
            stacks=list(dict.fromkeys(label for label, _ in found)),
            data=Grid(caption="", columns=("Property", "Value"), rows=items),
        )
        for items, found in groups.items()
    ]


def _flat(mapping: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Every value with its name, those of inner mappings after the outer's; without the empty ones."""
    found = []
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{above}{name}: ")
        elif isinstance(value, list | tuple):
            found.append((f"{above}{name}", ", ".join(map(str, value))))
        elif name == "memory" and isinstance(value, int):
            found.append((f"{above}{name}", f"{value / 2**30:.1f} GiB"))
        else:
            found.append((f"{above}{name}", "" if value is None else str(value)))
    return [(name, value) for name, value in found if value]


def template(name: str, plain: Callable[[object], str] = table.plain) -> Template:
    """A page's template. Records come from anyone: `plain` lets nothing through that cannot be shown.

    ``breakable`` is a filter for texts that may be broken after their slashes.
    """
    environment = Environment(
        loader=PackageLoader("portnet", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else plain(value),
    )
    environment.filters["breakable"] = lambda text: Markup("/<wbr>").join(plain(text).split("/"))
    return environment.get_template(name)
