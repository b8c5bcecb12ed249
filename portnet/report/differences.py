"""What moved between two sets of records, as tables for the terminal."""

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from portnet.difference import Change, Difference, Mixed, Pair
from portnet.lockin import COUNTED, Figure
from portnet.report.table import NOT_MEASURED, STYLES, plain
from portnet.stats import Interval

APART = (
    "Not side by side: the two sets took no turns, so the interval is Welch's over processes. What befell a whole set, "
    "such as another day on a shared machine, is not in it."
)


def everything(found: Difference, margin: float) -> list[RenderableType]:
    """All there is to print, what got worse first."""
    parts: list[RenderableType] = []
    for pair in sorted(found.pairs, key=lambda pair: not pair.worse(margin)):
        parts += [*_pair(pair, margin), Text()]
    parts += [_mixed(m) for m in found.mixed]
    parts += [Text(f"Gone, in OLD only: {_named(f)}, {plain(f.outcome)}") for f in found.gone]
    for f in found.new:
        reason = f". {plain(f.reason)}" if f.reason else ""
        style = "red" if f in found.failures else ""
        parts.append(Text(f"New, in NEW only: {_named(f)}, {plain(f.outcome)}{reason}", style=style))
    notes = []
    if any(c.ratio and not c.side_by_side for p in found.pairs for c in p.changes):
        notes.append(APART)
    if any(p.old.spec.quick or p.new.spec.quick for p in found.pairs):
        notes.append("quick: fewer samples than a figure to be quoted needs.")
    if notes:
        parts.append(Text("\n".join(notes)))
    return [*parts, _summary(found, margin)]


def value(interval: Interval | None, unit: str, outcome: str = "works") -> str:
    """A figure with its 95% interval over processes, or why there is none."""
    if interval is None:
        return NOT_MEASURED if outcome in (*COUNTED, NOT_MEASURED) else plain(f"void: {outcome}")
    scale, shown = _SCALES.get(unit, (1.0, unit))
    if interval.low is None or interval.high is None:
        return f"{_digits(interval.figure * scale)}{shown}"
    low, high = (_digits(end * scale) for end in (interval.low, interval.high))
    return f"{_digits(interval.figure * scale)}{shown}\n({low}, {high})"


_SCALES = {
    "s": (1e3, " ms"),
    "bytes": (2**-20, " MiB"),
    "of the measured ceilings": (100.0, "%"),
    "of the allowance": (100.0, "%"),
    "images/s": (1.0, "/s"),
    "images": (1.0, ""),
    "nats": (1.0, " nats"),
}


def _pair(pair: Pair, margin: float) -> list[RenderableType]:
    title = Text(f"{_named(pair.new)}: ")
    outcome = plain(pair.new.outcome)
    if pair.old.outcome != pair.new.outcome:
        title.append(plain(pair.old.outcome), style=STYLES.get(pair.old.outcome, "red")).append(" to ")
    title.append(outcome, style=STYLES.get(outcome, "red"))
    lines = [_between(pair)]
    for name, figure in (("OLD", pair.old), ("NEW", pair.new)):
        if figure.reason and pair.old.reason != pair.new.reason:
            lines.append(f"{name}: {figure.reason}")
    if pair.host is not None:
        lines.append(
            f"The host's own probe took {pair.host:.2f} times as long in NEW: intervals reach over what that may do."
        )
    if not pair.changes:
        return [title.append(", and no figure in either"), Text(plain("\n".join(lines[1:] or lines)))]
    parts: list[RenderableType] = [title, Text(plain("\n".join(lines)))]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, leading=1)
    table.add_column("Figure", overflow="fold")
    for column in ("OLD", "NEW", "NEW / OLD"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("Moved", no_wrap=True)
    for change in sorted(pair.changes, key=lambda change: not change.worse(margin)):
        table.add_row(
            change.name,
            value(change.old, change.unit, pair.old.outcome),
            value(change.new, change.unit, pair.new.outcome),
            _ratio(change),
            _moved(change, margin),
        )
    return [*parts, table]


def _between(pair: Pair) -> str:
    """How many processes, and what else differs between the sets."""
    parts = [f"OLD {_processes(pair.old)}, NEW {_processes(pair.new)}"]
    parts += [f"{name} {was} to {now}" for name, (was, now) in pair.versions.items() if name != "host"]
    if "host" in pair.versions:
        parts.append("on another machine")
    return (
        "; ".join(parts if pair.versions else [*parts, "no recorded version differs, and the machine is the same"])
        + "."
    )


def _processes(figure: Figure) -> str:
    count = len(figure.records)
    return f"{count} {'process' if count == 1 else 'processes'}{' quick' * figure.spec.quick}"


def _ratio(change: Change) -> str:
    ratio = change.ratio
    if ratio is None:
        return ""
    if ratio.low is None or ratio.high is None:
        return f"{_share(ratio.ratio)}\none process"
    return f"{_share(ratio.ratio)}\n({_share(ratio.low)}, {_share(ratio.high)})"


def _moved(change: Change, margin: float) -> Text:
    words = change.verdict + (f", {change.direction}" if change.direction else "")
    if change.beyond:
        words += ", beyond the gate"
    text = Text(words, style="red" if change.worse(margin) else "green" if change.direction == "better" else "")
    if change.direction == "worse" and not change.worse(margin):
        text.append("\nnot counted" if not change.counts else f"\nby no more than {margin:.3g}")
    if change.ratio and not change.side_by_side:
        text.append("\nnot side by side")
    return text


def _mixed(mixed: Mixed) -> Text:
    return Text(f"Not compared: {_named(mixed.old[0])}: {plain(mixed.reason)}")


def _named(figure: Figure) -> str:
    """What stays the same in a pair."""
    spec = figure.spec
    device = next((r.device["name"] for r in figure.records if r.device.get("name")), "no device")
    network = spec.model or f"{spec.preset} at {spec.image_size}"
    return plain(f"{spec.stack}, {spec.mode}, batch {spec.batch}, {network}, on {device}").replace("\n", " ")


def _summary(found: Difference, margin: float) -> Text:
    worse = [(pair.new, ", ".join(names)) for pair in found.pairs if (names := pair.worse(margin))]
    worse += [(figure, f"new, and {plain(figure.outcome)}") for figure in found.failures]
    compared = f"{len(found.pairs)} {'pair' if len(found.pairs) == 1 else 'pairs'} compared"
    if not worse:
        unsure = sum(c.counts and c.verdict == "inconclusive" for pair in found.pairs for c in pair.changes)
        open_ = f" {unsure} of the figures that count {'is' if unsure == 1 else 'are'} inconclusive." if unsure else ""
        return Text(f"{compared}: nothing is known to have moved for the worse by more than {margin:.3g}.{open_}")
    told = "; ".join(f"{_named(figure)}: {what}" for figure, what in worse)
    return Text(f"{compared}, {len(worse)} worse. {told}", style="red")


def _share(ratio: float) -> str:
    return f"{ratio:.3f}" if 0.1 <= ratio < 100 else f"{ratio:.3g}"


def _digits(number: float) -> str:
    if number > 1e100:
        return "not finite"
    return f"{number:,.0f}" if 1000 <= number < 1e7 else f"{number:.3g}"
