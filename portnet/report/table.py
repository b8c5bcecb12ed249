"""Figures as words, and as tables for the terminal."""

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from portnet.contract import Backend, Settings
from portnet.lockin import ABSENT, COUNTED, WORK, Figure, Row, compare, crowd, figures, same_work, spread, void
from portnet.record import Record, Spec

NOT_MEASURED = "not measured"
THE_REFERENCE = "the reference"

SIDE_BY_SIDE = 5
"""Stacks whose losses fit beside each other in 80 columns."""
STYLES = {"works": "green", "partial": "yellow", "not available": "dim", "not measured": "dim"}
"""Of an outcome's word; every other outcome is a failure's."""


def everything(rows: Sequence[Row]) -> list[Table]:
    """All there is to print, in order."""
    found = [summary(rows)]
    if any(row.losses for row in rows):
        found.append(losses(rows))
    if any(row.record.answers for row in rows):
        found.append(answers(rows))
    return found


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
                Text(f"{_broken(label, 25)}\n").append(device(row.record), style="dim"),
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


ANSWERS = ("Stack", "Top-1", "As the reference", "Logit error", "Images/s", "File, MB")
"""Columns of what stacks make of test pictures with trained weights."""


def answered(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each stack that answered, under the headings of `ANSWERS`."""
    lines: list[tuple[str, ...]] = []
    several = len(_networks(rows)) > 1
    for label, row in zip(labels(rows), rows, strict=True):
        if not (seen := row.record.answers):
            continue
        label += f", weights {plain(seen['weights'])[:8]}" if several else ""
        size = row.record.effective.get("file")
        lines.append(
            (
                label,
                f"{seen['right'] / seen['count']:.1%}",
                f"{seen['agree']} of {seen['count']}",
                error(seen["error"]),
                speed(row, "infer"),
                f"{size / 1e6:.1f}" if isinstance(size, int) else "no file",
            )
        )
    return lines


def answers_told(rows: Sequence[Row]) -> str:
    """What `answered` is about, in sentences."""
    told = [
        f"Weights {plain(weights)[:8]} (their SHA-256) on {count} test pictures at {pixels} pixels, of which the "
        f"float64 reference ranks {right} right."
        for weights, pixels, count, right in _networks(rows)
    ]
    if len(told) > 1:
        told.append("Accuracies of different weights are not to be compared.")
    timed = sorted({row.spec.image_size for row in rows if row.record.answers})
    return (
        f"{' '.join(told)} As the reference: how often its first class is the reference's. Images/s and the file are "
        f"of the network that was timed, at {' or '.join(map(str, timed))} pixels and with initial weights."
    )


def _networks(rows: Sequence[Row]) -> list[tuple[str, int, int, int]]:
    """What was answered with: weights, pixels, pictures, and how many of those the reference has right."""
    keys = ("weights", "pixels", "count", "right_by_reference")
    return list(dict.fromkeys(tuple(row.record.answers[k] for k in keys) for row in rows if row.record.answers))


def answers(rows: Sequence[Row]) -> Table:
    """Accuracy, agreement with the reference, speed and file of each stack that infers."""
    table = _table()
    table.leading = 1
    for name in ANSWERS:
        table.add_column(name.replace(", ", ",\n").replace("As the ", "As the\n"), overflow="fold",
                         justify="left" if name == "Stack" else "right")  # fmt: skip
    for label, *cells in answered(rows):
        table.add_row(Text(_broken(label, 25)), *(Text(cell.replace(" quick", "\nquick")) for cell in cells))
    table.caption = Text(f"\n{answers_told(rows)}")
    table.caption_style, table.caption_justify = "", "left"
    return table


def measured(records: Sequence[Record]) -> list[Table]:
    """All there is to print of measurements: a line for each stack and mode, then layers, then serving."""
    found = figures(records)
    timed = [f for f in found if f.spec.mode != "serve"]
    tables = [_figures(timed)] if timed else []
    # Layers of one stack's two modes are read; those of ten are scrolled past, and stand in the records.
    tables += [layers(f) for f in timed if f.efficiency is not None][:2]
    return tables + [serving(f) for f in found if f.spec.mode == "serve"]


def _figures(found: Sequence[Figure]) -> Table:
    table = _table()
    table.leading = 1
    table.add_column("Stack,\nmode, batch", overflow="fold")
    table.add_column("Outcome", width=9)
    table.add_column("Images/s,\n95% interval", justify="right", width=15)
    table.add_column("Efficiency,\nby published", justify="right", width=12)
    table.add_column("Time as a multiple\nof the first's", justify="right", width=18)
    for figure in found:
        first = next(f for f in found if (f.spec.mode, f.spec.batch) == (figure.spec.mode, figure.spec.batch))
        spec = figure.spec
        table.add_row(
            Text(f"{plain(spec.stack)}\n").append(f"{spec.mode}, batch {spec.batch}", style="dim"),
            Text(figure.outcome, style=STYLES.get(figure.outcome, "red")),
            Text(interval(figure)),
            Text("\n".join(share(x.figure if x else None) for x in (figure.efficiency, figure.published))),
            Text("" if first is figure else versus(first, figure)),
        )
    notes = [f"{plain(f.spec.stack)}, {f.spec.mode}: {f.outcome}. {plain(f.reason)}" for f in found if f.reason]
    notes += [f"{plain(f.spec.stack)}, {f.spec.mode}: {text}" for f in found if (text := crowded(f.records))]
    if rejected := sum(f.rejected for f in found):
        notes.append(f"{rejected} processes belong to rounds that were run again, since the host's speed had changed.")
    if uneven := sum(bool(r.round.get("uneven")) and not r.round.get("rejected") for f in found for r in f.records):
        notes.append(f"{uneven} processes belong to rounds that stand although the host's speed differed in them.")
    notes.append(
        "Efficiency: the floor by the matrix product and the copy measured in the same process, over the time taken; "
        "below it the same by the rates that the device's vendor publishes."
    )
    table.caption = Text("\n".join(["", *notes]))
    table.caption_style, table.caption_justify = "", "left"
    return table


def interval(figure: Figure) -> str:
    """Images per second, and the 95% interval over processes."""
    if figure.rate is None:
        tried = figure.outcome not in (*COUNTED, *ABSENT)
        return f"void: {figure.outcome}" if tried else NOT_MEASURED
    text = rate(figure.rate.figure) + (" quick" if figure.spec.quick else "")
    if figure.rate.low is None or figure.rate.high is None:
        return f"{text}\none process"
    return f"{text}\n{rate(figure.rate.low)} to {rate(figure.rate.high)}"


def crowded(records: Sequence[Record]) -> str:
    """That others kept the machine busy, in a sentence; empty where they did not."""
    if (seen := crowd(records)) is None:
        return ""
    return f"other processes kept up to {seen[0]:.1f} of {seen[1]} processors busy: not to be relied on."


def share(value: float | None) -> str:
    """A share as a percentage."""
    return "not known" if value is None else f"{value:.0%}"


def versus(one: Figure, other: Figure) -> str:
    """How many times as long the other takes, its interval, and what that says."""
    seen = compare(one, other)
    if seen is None:
        return NOT_MEASURED
    if seen.low is None or seen.high is None:
        return f"{seen.ratio:.3g}\none round"
    return f"{seen.ratio:.3g} ({seen.low:.3g}, {seen.high:.3g})\n{seen.verdict}"


def ablation(records: Sequence[Record], whole: Spec, backend: Backend) -> Table:
    """The ladder: what each layer of the vendor's software is worth, by the time without it.

    Efficiencies are by the ceiling of the whole stack.
    """
    found = figures(records)
    base = next((f for f in found if f.spec.stack == whole.stack), None)
    titles = {
        layer.name: layer
        for layer in backend.library_layers(
            Settings(precision=whole.precision, formulation=whole.formulation, engine=whole.engine)
        )
    }
    table = _table()
    table.leading = 1
    table.add_column("Taken away", overflow="fold")
    table.add_column("Time as a multiple\nof the whole stack's", justify="right", width=22)
    table.add_column("Efficiency", justify="right", width=10)
    table.add_column("Images/s,\n95% interval", justify="right", width=15)
    for figure in found:
        layer = titles.get(figure.spec.without[0]) if figure.spec.without else None
        name = Text(layer.name if layer else f"nothing: {plain(figure.spec.stack)}")
        if layer:
            name.append(f"\n{plain(layer.title)}{'; ' if layer.note else ''}{plain(layer.note)}", style="dim")
        efficiency = None
        if base and base.floor is not None and figure.rate:
            efficiency = base.floor * figure.rate.figure / figure.spec.batch
        table.add_row(
            name,
            Text("1" if figure is base else versus(base, figure) if base else NOT_MEASURED),
            Text(share(efficiency)),
            Text(interval(figure)),
        )
    table.title = Text(f"{whole.stack}, {whole.mode}, batch {whole.batch}")
    table.title_justify = "left"
    return table


def layers(figure: Figure) -> Table:
    """Each layer's floor beside what it takes on its own, in milliseconds."""
    record = figure.detailed
    table = _table()
    for name in ("Layer", "GFLOP", "MB", "Floor, ms", "Alone, ms", "Floor / alone"):
        table.add_column(name, justify="left" if name == "Layer" else "right")
    for name, seen in record.layers.items():
        alone = (seen["forward"] or 0) + (seen["backward"] or 0) if seen["forward"] is not None else None
        if not seen["floor"]:
            continue
        table.add_row(
            Text(plain(name)),
            f"{seen['flops'] / 1e9:.3g}",
            f"{seen['bytes'] / 1e6:.3g}",
            f"{1e3 * seen['floor']:.3g}",
            f"{1e3 * alone:.3g}" if alone is not None else NOT_MEASURED,
            f"{seen['floor'] / alone:.0%}" if alone else "",
        )
    ceilings = record.ceilings
    table.title = Text(
        f"{record.spec.stack}, {record.spec.mode}, batch {record.spec.batch}: ceilings "
        f"{ceilings['flops'] / 1e12:.3g} TFLOP/s, {ceilings['bandwidth'] / 1e9:.3g} GB/s"
    )
    table.title_justify = "left"
    return table


def serving(figure: Figure) -> Table:
    """Latency at batch 1, and throughput by batch."""
    found = figure.records[0].serving
    table = _table()
    table.title_justify = "left"
    quick = ", quick" if figure.spec.quick else ""
    table.title = Text(f"{plain(figure.spec.stack)}, serve{quick}: {figure.outcome}. {plain(figure.reason)}")
    table.add_column("Serving")
    table.add_column("", justify="right")
    for name in ("p50", "p90", "p99"):
        value = found.get(name)
        table.add_row(f"{name} latency at batch 1", NOT_MEASURED if value is None else f"{1e3 * value:.3g} ms")
    for batch, seen in sorted(found.get("sweep", {}).items(), key=lambda item: int(item[0])):
        seconds = sorted(seen["seconds"])[len(seen["seconds"]) // 2]
        table.add_row(f"batch {plain(batch)}", f"{rate(seen['steps'] * int(batch) / seconds)} images/s")
    largest = found.get("largest_batch")
    table.add_row("largest batch that fits", NOT_MEASURED if largest is None else str(largest))
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
