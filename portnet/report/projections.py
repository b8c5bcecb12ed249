"""Projections as text and tables for the terminal."""

from collections.abc import Sequence

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from portnet.projection import IMAGES, Estimate, Projection, estimates, fastest
from portnet.record import Record
from portnet.report.table import plain, share

NOT_KNOWN = "not known"

FLOOR = (
    "Floor: each layer's FLOPs at the published dense peak or its least bytes at the published bandwidth, whichever "
    "takes longer, summed. Direct convolution, layer by layer through memory, is no faster; nothing of it was measured."
)
SCALING = (
    "{count} devices: perfect scaling is assumed. They share every layer's FLOPs and bytes evenly and exchange nothing."
)
IMPLIED = (
    "Implied: the floor over that time, which is the efficiency by the published peaks; and model FLOPs utilisation "
    "(MFU), the FLOPs alone at the peak over that time."
)
ESTIMATE = (
    "Estimate: the floor over an efficiency, and no measurement. Input, evaluation and checkpoints are not in it."
)


def one(
    own: Sequence[Projection],
    records: Sequence[Record] | None = None,
    *,
    efficiency: float | None = None,
    took: Sequence[float] = (),
) -> list[RenderableType]:
    """One device, a row for each precision; `records` is None where none were given. Strings are not to be wrapped."""
    first = own[0]
    many = f"{first.count} x " if first.count > 1 else ""
    title = f"{many}{first.device.name} ({first.device.vendor}, {first.device.year}): {work(first)}"
    # Of what was not asked for by name, only what is known has a row.
    shown = own if len(own) == 1 else [p for p in own if p.rate]
    table = _table()
    table.add_column("Precision")
    for column in ("Peak,\nTFLOP/s", "Floor of\na step", "Floor of\nthe run", "Bound by\nbandwidth"):
        table.add_column(column, justify="right")
    for p in shown:
        peak = f"{p.rate.value / 1e12:.4g} {p.rate.units}" if p.rate else NOT_KNOWN
        table.add_row(p.precision, peak, duration(p.step), duration(p.floor), share(p.moving))
    lines = [f"{NOT_KNOWN.capitalize()}: {why}." for why in dict.fromkeys([missing(own)]) if why]
    for p in own:
        lines += [implied(p, t) for t in took if p.floor is not None]
    found = [e for p in own for e in estimates(p, records or (), efficiency=efficiency)]
    lines += [estimated(e) for e in found]
    if records is not None and not any(e.measured for e in found):
        lines.append(f"The records hold no training of AlexNet on {first.device.name} whose efficiency is known.")
    notes = [FLOOR] if any(p.floor is not None for p in own) else []
    if first.count > 1:
        notes.append(SCALING.format(count=first.count))
    if took:
        notes.append(IMPLIED)
    if any((p.implied(t) or 0) > 1 for p in own for t in took):
        notes.append("Above 100%: the published peaks do not allow that time. Look at devices, epochs and precision.")
    if found:
        notes.append(ESTIMATE)
    parts: list[RenderableType] = [Text(plain(title))]
    parts += [table] if shown else []
    parts += [Text(plain("\n".join(part))) for part in (lines, notes) if part]
    # An address that is cut in two cannot be opened.
    return [*parts, *map(plain, _sources(own))]


def every(
    projections: Sequence[Sequence[Projection]],
    records: Sequence[Record] = (),
    *,
    efficiency: float | None = None,
) -> list[RenderableType]:
    """A row for each device: the floor of float32 and of its fastest precision, or of the one that was asked for."""
    first = projections[0][0]
    many = f"{first.count} of each device: " if first.count > 1 else ""
    single = len(projections[0]) == 1
    found = [[e for p in own for e in estimates(p, records, efficiency=efficiency)] for own in projections]
    table = _table()
    table.add_column("Year")
    table.add_column("Device", overflow="fold")
    table.add_column(f"{first.precision if single else 'float32'}", justify="right")
    if not single:
        table.add_column("Fastest", justify="right")
    table.add_column("Peak of", overflow="fold")
    if any(found):
        table.add_column("Estimate", justify="right", overflow="fold")
    for own, made in zip(projections, found, strict=True):
        quickest = fastest(own)
        plainest = own[0] if single else next(p for p in own if p.precision == "float32")
        rate = quickest.rate if quickest else None
        row = [str(own[0].device.year), own[0].device.name, duration(plainest.floor)]
        row += [] if single else [duration(quickest.floor if quickest else None)]
        row.append(f"{quickest.precision}, {rate.units}" if quickest and rate else missing(own))
        if any(found):
            best = min(made, key=lambda e: e.seconds, default=None)
            other = f" ({best.projection.precision})" if best and best.projection is not quickest else ""
            row.append(f"{duration(best.seconds)}{other}" if best else "")
        table.add_row(*map(plain, row))
    notes = [FLOOR, "Peak of: the precision of the fastest floor, and the units whose published peak that is."]
    if first.count > 1:
        notes.append(SCALING.format(count=first.count))
    notes += [estimated(e) for made in found for e in made if e.measured]
    if efficiency is not None:
        notes.append(f"Estimates at an assumed efficiency of {efficiency:.0%} of the published peaks.")
    if any(found):
        notes.append(ESTIMATE)
    return [Text(f"{many}{work(first)}"), table, Text(plain("\n".join(notes)))]


def missing(own: Sequence[Projection]) -> str:
    """What is not published of the device, of these precisions; empty where nothing lacks."""
    lacking = [p.precision for p in own if p.rate is None]
    peak = "no peak" if len(lacking) == len(own) > 1 else f"no {', '.join(lacking)} peak"
    parts = [peak] * bool(lacking) + ["no bandwidth"] * (own[0].device.bandwidth is None)
    return f"{' and '.join(parts)} published" if parts else ""


def implied(projection: Projection, took: float) -> str:
    """What a run that took so long says, in words."""
    share, used = projection.implied(took), projection.utilisation(took)
    return f"Implied by {duration(took)} in {projection.precision}: efficiency {percent(share)}, MFU {percent(used)}."


def work(projection: Projection) -> str:
    """What is trained, in words."""
    own = projection.work
    epochs = f"{own.epochs} epoch{'s' * (own.epochs != 1)} of ImageNet's {IMAGES:,} images"
    return f"{epochs}, {own.preset}, {own.steps:,} steps of batch {own.batch}"


def estimated(estimate: Estimate) -> str:
    """One estimate, with the efficiency it is made of and that one's denominator."""
    p, took = estimate.projection, duration(estimate.seconds)
    if estimate.low is not None and estimate.high is not None:
        took += f" (95% interval {duration(estimate.low)} to {duration(estimate.high)})"
    text = f"Estimate in {p.precision}: {took}, at "
    if (one := estimate.measured) is None:
        return f"{text}an assumed efficiency of {estimate.efficiency:.0%} of the published peaks."
    spec = one.figure.spec
    text += f"the {estimate.efficiency:.0%} of the published peaks that {spec.stack} reached on {p.device.name}"
    text += f" ({one.ceiling.figure:.0%} of the ceilings measured there)" if one.ceiling else ""
    quick = " quick" if spec.quick else ""
    count = f"{one.published.count} {'process' if one.published.count == 1 else 'processes'}"
    text += f",{quick} with {spec.preset} at batch {spec.batch} in {count}"
    text += "" if one.like else ": carried over to other work, on which it may be another"
    return f"{text}."


def duration(value: float | None) -> str:
    """Seconds to three digits, in the unit that suits them."""
    if value is None:
        return NOT_KNOWN
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if value >= size:
            return f"{_digits(value / size)} {unit}"
    return f"{_digits(1e6 * value)} µs"


def percent(value: float | None) -> str:
    """A share to a tenth of a percent."""
    return NOT_KNOWN if value is None else f"{value:.1%}"


def _digits(value: float) -> str:
    # Never an exponent: 12,000 d and not 1.2e+04 d.
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _sources(own: Sequence[Projection]) -> list[str]:
    device = own[0].device
    used = {f"{p.precision} peak": p.rate.source for p in own if p.rate}
    if device.bandwidth:
        used["bandwidth"] = device.bandwidth.source
    told: dict[str, list[str]] = {}
    for what, source in used.items():
        told.setdefault(f"{source.title}, {source.url}", []).append(what)
    return [f"Source of {', '.join(what)}: {source}" for source, what in told.items()]


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
