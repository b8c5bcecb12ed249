"""Figures as words, and as tables for the terminal."""

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from portnet.lockin import WORK, Row, same_work, spread, void
from portnet.record import Record, Spec

NOT_MEASURED = "not measured"
THE_REFERENCE = "the reference"

SIDE_BY_SIDE = 5
"""Stacks whose losses fit beside each other in 80 columns."""
STYLES = {"works": "green", "partial": "yellow", "not available": "dim", "not measured": "dim"}
"""Of an outcome's word; every other outcome is a failure's."""


def everything(rows: Sequence[Row]) -> list[Table]:
    """All there is to print, in order."""
    return [summary(rows), losses(rows)] if any(row.losses for row in rows) else [summary(rows)]


def summary(rows: Sequence[Row]) -> Table:
    """Outcome, speed, gate and loss of each stack; below it the stacks that have no full row, and why.

    Two lines a stack: so its figures fit 80 columns.
    """
    table = _table()
    table.leading = 1
    table.add_column("Stack,\ndevice", overflow="fold")
    table.add_column("Outcome", width=9)
    table.add_column("Images/s\ntraining", justify="right", width=8)
    table.add_column("Images/s\ninference", justify="right", width=9)
    table.add_column("Gate used,\nlogit error", justify="right", width=11)
    table.add_column("Loss,\ndistance", justify="right", width=13)
    for label, row in zip(labels(rows), rows, strict=True):
        if row.record.outcome != "not available":
            table.add_row(
                Text(f"{_broken(label, 26)}\n").append(device(row.record), style="dim"),
                Text(row.record.outcome, style=STYLES.get(row.record.outcome, "red")),
                Text(speed(row, "train").replace(" quick", "\nquick")),
                Text(speed(row, "infer").replace(" quick", "\nquick")),
                Text(gate(row) if row.parity is None else f"{gate(row)}\n{error(row.logits)}"),
                Text(f"{course(row)}\n{distance(row)}" if row.losses else NOT_MEASURED),
            )
    table.caption = _notes(rows)
    table.caption_style, table.caption_justify = "", "left"
    return table


def losses(rows: Sequence[Row], at_most: int = 12) -> Table:
    """The loss before each step, a column for each stack that trained, at evenly spaced steps with both ends.

    More stacks than fit side by side have a row each, and half as many steps.
    """
    named = [(label, row.losses) for label, row in zip(labels(rows), rows, strict=True) if row.losses]
    tall = len(named) > SIDE_BY_SIDE
    steps = spaced(max((len(values) for _, values in named), default=0), at_most // 2 if tall else at_most)
    table = _table()
    if tall:
        table.add_column("Loss before step", overflow="fold")
        for step in steps:
            table.add_column(str(step + 1), justify="right", min_width=8)
        for label, values in named:
            table.add_row(Text(label), *(Text(_loss(values, step)) for step in steps))
        return table
    table.add_column("Loss\nbefore step", justify="right", width=11)
    for label, _ in named:
        table.add_column(Text(label.replace("/", "/\n").replace(" (", "\n(")), justify="right", overflow="fold")
    for step in steps:
        table.add_row(Text(str(step + 1)), *(Text(_loss(values, step)) for _, values in named))
    return table


def _loss(values: Sequence[float], step: int) -> str:
    return f"{values[step]:.4f}" if step < len(values) else NOT_MEASURED


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)


def spaced(count: int, at_most: int) -> list[int]:
    """At most that many of the indices below `count`, evenly spaced, the first and the last among them."""
    few = min(count, max(at_most, 2))
    return [round(i * (count - 1) / (few - 1)) for i in range(few)] if few > 1 else list(range(few))


def labels(rows: Sequence[Row]) -> list[str]:
    """A name for each row: its stack, and as much more as tells it from others of the same stack."""
    names = [plain(row.spec.stack) for row in rows]
    varied = [k for k in WORK if len({getattr(row.spec, k) for row in rows}) > 1]

    def own_work(record: Record) -> str:
        return plain(", ".join(f"{k.replace('_', ' ')} {getattr(record.spec, k)}" for k in varied))

    tells: list[Callable[[Record], str]] = [own_work, device, lambda record: record.digest[:8]]
    for tell in tells:
        told = [tell(row.record) for row in rows]
        names = [
            f"{name}, {own}" if {t for n, t in zip(names, told, strict=True) if n == name} != {own} else name
            for name, own in zip(names, told, strict=True)
        ]
    return names


def work(spec: Spec) -> str:
    """What a stack was given to do."""
    return plain(
        f"{spec.preset} at {spec.image_size} × {spec.image_size} pixels, batch {spec.batch}; training curve of "
        f"{spec.curve_steps} steps of {spec.curve_batch} images of {spec.data} at {spec.curve_size} × "
        f"{spec.curve_size}, {spec.classes} classes; seed {spec.seed}"
    )


def device(record: Record) -> str:
    """The device's name."""
    missing = "no device" if record.outcome == "not available" else "unknown device"
    return plain(record.device.get("name") or missing)


def speed(row: Row, mode: str) -> str:
    """Images per second of that mode, or why there is no figure."""
    rates = row.train if mode == "train" else row.infer
    if rates is not None:
        return f"{rate(rates[0])} quick" if row.spec.quick else rate(rates[0])
    return f"void: {row.record.outcome}" if void(row.record, mode) else NOT_MEASURED


def rate(value: float) -> str:
    """Images per second, to about three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def gate(row: Row) -> str:
    """The share of the parity gate's allowance that was used."""
    if row.parity is None:
        return THE_REFERENCE if row.record.gates.get("parity", {}).get("oracle") else NOT_MEASURED
    if row.parity >= 10:
        return (
            "not finite" if row.parity > 1e100 else f"{row.parity:,.0f} times" if row.parity < 1e6 else "over 1e6 times"
        )
    return f"{100 * row.parity:.0f}%" if row.parity >= 0.01 or not row.parity else f"{100 * row.parity:.1g}%"


def logits(row: Row) -> str:
    """The logits' relative error."""
    return gate(row) if row.logits is None else error(row.logits)


def error(value: float | None) -> str:
    """A relative error, or a distance in nats."""
    if value is None:
        return NOT_MEASURED
    return "not finite" if value > 1e100 else f"{value:.1e}" if value else "0"


def course(row: Row) -> str:
    """The loss, from the first step to the last."""
    if row.first_loss is None or row.last_loss is None:
        return NOT_MEASURED
    return f"{row.first_loss:.2f} to {row.last_loss:.2f}"


def distance(row: Row) -> str:
    """The largest distance of the loss from the reference's."""
    return THE_REFERENCE if row.reference is row.record else error(row.loss_distance)


def plain(text: Any) -> str:
    """The text without control and formatting characters: a record can come from anyone, a terminal obeys them."""

    def shown(c: str) -> str:
        return c if c.isprintable() or c == "\n" else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}"

    return "".join(map(shown, str(text)))


def _broken(label: str, width: int) -> str:
    """The label, broken after its last slash if it is wider: a precision cut in two is hard to read."""
    start, slash, end = label.rpartition("/")
    return f"{start}{slash}\n{end}" if len(label.partition(" ")[0]) > width else label


def _notes(rows: Sequence[Row]) -> Text:
    """What the columns mean, and why rows are short or missing."""
    notes = [
        "Images/s: the median over timed blocks. Gate used: the largest share of the parity gate's allowance that any "
        "tensor took. Logit error: relative, against the float64 reference. Loss: before the first step and the last. "
        "Distance: the largest, at any step, of the loss from the reference's, in nats.",
    ]
    drifted = spread([row.record for row in rows])
    if drifted is not None:
        apart = f"Runs that begin one rounding apart drift by up to {error(drifted)}"
        notes.append(f"{apart}: a distance like that is no difference.")
    if any(row.spec.quick for row in rows):
        notes.append("quick: fewer samples than a figure to be quoted needs.")
    if len(same_work([row.record for row in rows])) > 1:
        notes.append("Not all stacks were given the same work: compare only those that were.")
    found = Text("\n" + "\n".join(notes))
    for label, row in zip(labels(rows), rows, strict=True):
        if row.record.reason or row.record.outcome == "not available":
            found.append(f"\n{label}: {row.record.outcome}. ", style="bold")
            found.append("; ".join(plain(text) for text in (row.record.reason, row.record.remedy) if text))
    return found
