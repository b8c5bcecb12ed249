"""The plots of the lock-in report, as SVG text made as in `portnet.report.plots`.

Every axis is linear in what it is handed: logarithms are taken here, so that ticks are text of ours.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from portnet.report.plots import (
    COLOURS,
    INK,
    SUPERSCRIPT,
    WIDTH,
    Curve,
    canvas,
    look,
    one_line,
    our_style,
    put_keys,
    put_text,
    to_svg,
)
from portnet.report.values import duration, si

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

MARKERS = ("o", "s", "D", "^", "v", "P")
ROW = 38
"""Height in pixels of a bar with its heading above it."""
LETTER = 6.3
"""Width in pixels of a letter, about."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A named figure with its interval, if it has one; None is not measured, as `text` says."""

    label: str
    figure: float | None
    low: float | None = None
    high: float | None = None
    text: str
    style: int = 0
    start: float = 1.0
    """Where a bar of `waterfall` begins."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A named point; `style` numbers its colour and marker."""

    label: str
    x: float
    y: float
    style: int = 0


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """A bar made of parts, each in the unit of the plot; `text` is their sum in words."""

    label: str
    parts: Mapping[str, float]
    text: str


@our_style()
def cascade(steps: Sequence[Bar], pp: Sequence[float], missing: Sequence[str], *, name: str) -> str:
    """Efficiencies by platform, falling, with PP over each platform and all before it.

    `pp` belongs to the first of `steps`; `missing` names the platforms that were not measured.
    """
    from matplotlib.lines import Line2D

    figure, axes = canvas(300, 2)
    count = len(steps) + len(missing)
    for n, step in enumerate(steps):
        value = min(step.figure or 0.0, 1.2)
        axes.bar(n, value, width=0.62, color=COLOURS[0])
        if step.low is not None and step.high is not None:
            _whisker(axes, n, min(step.low, 1.2), min(step.high, 1.2), across=False)
    known = [min(value, 1.2) for value in pp]
    axes.plot(range(len(known)), known, marker="o", markersize=6, linewidth=2.4, color=COLOURS[1], zorder=3)
    axes.axhline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6)
    axes.set_ylim(0, max([1.12, *(min(s.high or s.figure or 0.0, 1.2) + 0.1 for s in steps)]))
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1], ["0", "20%", "40%", "60%", "80%", "100%"])
    axes.set_xlim(-0.6, max(count, 1) - 0.4)
    widest = WIDTH / max(count, 1) / LETTER * 0.85
    names = [f"{_short(s.label, widest)}\n{_short(s.text, widest)}" for s in steps]
    names += [f"{_short(label, widest)}\n{_short('not measured', widest)}" for label in missing]
    axes.set_xticks(range(count), names, parse_math=False)
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("architectural efficiency", color=INK)
    line = Line2D([], [], color=COLOURS[1], marker="o", markersize=6, linewidth=2.4)
    put_keys(figure, [_patch(0), line], ["efficiency on that platform", "PP over it and all platforms to its left"])
    told = [f"{s.label}: {s.text}, PP {value:.3g}" for s, value in zip(steps, pp, strict=False)]
    told += [f"{label}: not measured" for label in missing]
    return to_svg(figure, name, "Efficiency by platform, and performance portability", "; ".join(told) + ".")


@our_style()
def navigation(points: Sequence[Point], *, name: str) -> str:
    """Performance portability against code convergence; the ideal, one code that is efficient everywhere, is (1, 1)."""
    from matplotlib.lines import Line2D

    figure, axes = canvas(300, len(points))
    axes.plot([1], [1], marker="*", markersize=17, color=INK, linestyle="none", clip_on=False, zorder=3)
    put_text(axes, 0.955, 1.0, "ideal", ha="right", va="center")
    for point in points:
        axes.plot([point.x], [point.y], markersize=10, linestyle="none", clip_on=False, zorder=4, **_mark(point.style))
    axes.set_xlim(0, 1.04)
    axes.set_ylim(0, 1.06)
    shares = [0, 0.2, 0.4, 0.6, 0.8, 1]
    axes.set_xticks(shares, [f"{x:g}" for x in shares])
    axes.set_yticks(shares, [f"{x:g}" for x in shares])
    axes.set_xlabel("code convergence", color=INK)
    axes.set_ylabel("performance portability, PP", color=INK)
    handles = [Line2D([], [], markersize=9, linestyle="none", **_mark(point.style)) for point in points]
    put_keys(figure, handles, [point.label for point in points])
    told = "; ".join(f"{p.label}: convergence {p.x:.3g}, PP {p.y:.3g}" for p in points)
    return to_svg(figure, name, "Navigation chart: code convergence and performance portability", f"{told}.")


@our_style()
def roofline(flops: float, bandwidth: float, layers: Sequence[Point], *, name: str, of: str) -> str:
    """A device's measured roof, and each layer below it by its FLOP a byte (x) and FLOP/s (y), both above 0."""
    figure, axes = canvas(310, 0)
    ridge = math.log10(flops) - math.log10(bandwidth)
    places = [(math.log10(p.x), math.log10(p.y), p) for p in layers if _positive(p.x) and _positive(p.y)]
    left = min([ridge - 1, *(x for x, _, _ in places)]) - 0.35
    right = max([ridge + 1, *(x for x, _, _ in places)]) + 0.35
    top = math.log10(flops)
    bottom = min([top - 2, *(y for _, y, _ in places)]) - 0.35
    roof = [(left, left + math.log10(bandwidth)), (ridge, top), (right, top)]
    axes.plot([x for x, _ in roof], [y for _, y in roof], color=INK, linewidth=2.2)
    for x, y, point in places:
        axes.plot([x], [y], markersize=7, linestyle="none", zorder=3, **_mark(point.style))
    axes.set_xlim(left, right)
    highest = max([top, *(y for _, y, _ in places)])
    axes.set_ylim(bottom, highest + 0.16 * (highest - bottom))
    _log_ticks(axes.xaxis, left, right, _power)
    _log_ticks(axes.yaxis, bottom, top, lambda y: _trim(si(10**y, "").strip()))
    axes.set_xlabel("FLOP a byte", color=INK)
    axes.set_ylabel("FLOP/s", color=INK)
    # The axes take about as much of the plot.
    pixel = ((right - left) / (WIDTH - 75), (axes.get_ylim()[1] - bottom) / 255)
    put_text(axes, right - 4 * pixel[0], top + 4 * pixel[1], si(flops, "FLOP/s"), ha="right", va="bottom")
    x = left + 0.55 * (ridge - left)
    y = x + math.log10(bandwidth)
    put_text(axes, x - 6 * pixel[0], y + 4 * pixel[1], si(bandwidth, "B/s"), ha="right", va="bottom")
    # What names keep off: the roof and what is written on it.
    written = [(right - 100 * pixel[0], right, top, top + 20 * pixel[1])]
    written.append((x - 75 * pixel[0], x, y, y + 20 * pixel[1]))
    taken = list(written)
    for (x0, y0), (x1, y1) in pairwise(roof):
        for i in range(61):
            x, y = x0 + (x1 - x0) * i / 60, y0 + (y1 - y0) * i / 60
            taken.append((x - 2 * pixel[0], x + 2 * pixel[0], y - 2 * pixel[1], y + 2 * pixel[1]))
    _put_names(axes, [(x, y, point.label) for x, y, point in places], taken, written, pixel)
    told = "; ".join(f"{p.label}: {p.x:.3g} FLOP a byte, {p.y:.3g} FLOP/s" for p in layers)
    about = f"Roof: {flops:.3g} FLOP/s and {bandwidth:.3g} bytes/s. {told}."
    return to_svg(figure, name, f"Roofline of {one_line(of)}", about)


@our_style()
def waterfall(rungs: Sequence[Bar], *, name: str, of: str) -> str:
    """How many times as long a step takes with each part taken away; a bar begins where the part below it ended."""
    figure, axes = canvas(ROW * (len(rungs) + 1) + 46, 0)
    ends = [r.high or r.figure for r in rungs if r.figure is not None]
    starts = [r.figure for r in rungs if r.figure is not None and r.figure < 1]
    right = max([math.log10(2), *(math.log10(e) for e in ends if e and _positive(e))])
    left = min([0.0, *(math.log10(s) for s in starts if _positive(s))])
    pad, edge = 0.02 * (right - left), right
    put_text(axes, left, 0, "the whole stack", weight="bold", va="center")
    axes.plot([0, 0], [0.3, len(rungs) + 1], color=INK, linewidth=1.2)
    put_text(axes, pad, 0.5, "1×", va="center")
    for n, rung in enumerate(rungs, 1):
        put_text(axes, left, n, rung.label, weight="bold", va="center")
        end = 0.0
        if rung.figure is not None and _positive(rung.figure):
            start, end = math.log10(rung.start), math.log10(rung.figure)
            axes.barh(n + 0.48, end - start, left=start, height=0.42, color=COLOURS[0 if end >= start else 2])
            if rung.low and rung.high:
                _whisker(axes, n + 0.48, math.log10(rung.low), math.log10(rung.high))
                end = max(end, math.log10(rung.high))
        put_text(axes, max(end, 0.0) + pad, n + 0.5, rung.text, va="center")
        taken = LETTER * len(one_line(rung.text)) / (WIDTH - 25)
        edge = max(edge, left + (max(end, 0.0) + pad - left) / max(1 - taken, 0.2))
    axes.set_ylim(len(rungs) + 1, -0.5)
    axes.set_xlim(left - pad, edge)
    axes.set_yticks([])
    _log_ticks(axes.xaxis, left, right, lambda x: f"{10**x:.6g}×", fine=True)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("time of a step, as a multiple of the whole stack's", color=INK)
    told = "; ".join(f"{r.label}: {r.text}" for r in rungs)
    return to_svg(figure, name, f"What each layer of {one_line(of)} is worth", f"{told}.")


@our_style()
def stacked(bars: Sequence[Stacked], *, name: str, title: str, unit: str) -> str:
    """A bar for each, its parts one after the other from zero."""
    kinds = list(dict.fromkeys(part for bar in bars for part in bar.parts))
    figure, axes = canvas(ROW * len(bars) + 46, len(kinds))
    most = max([sum(bar.parts.values()) for bar in bars], default=0.0) or 1.0
    right = 1.02 * most
    for n, bar in enumerate(bars):
        put_text(axes, 0, n, bar.label, weight="bold", va="center")
        at = 0.0
        for k, kind in enumerate(kinds):
            value = bar.parts.get(kind, 0.0)
            axes.barh(n + 0.46, value, left=at, height=0.42, color=COLOURS[k % len(COLOURS)])
            at += value
        put_text(axes, at + 0.015 * most, n + 0.48, bar.text, va="center")
        right = max(right, (at + 0.015 * most) / max(1 - LETTER * len(one_line(bar.text)) / (WIDTH - 25), 0.2))
    axes.set_ylim(len(bars), -0.5)
    axes.set_xlim(0, right)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(unit, color=INK)
    put_keys(figure, [_patch(k) for k, _ in enumerate(kinds)], kinds)
    told = "; ".join(f"{b.label}: {b.text}, " + ", ".join(f"{k} {v:.3g}" for k, v in b.parts.items()) for b in bars)
    return to_svg(figure, name, title, f"{told}.")


@our_style()
def sweep(stacks: Sequence[tuple[str, Sequence[tuple[int, float, float]]]], bound: float, *, name: str) -> str:
    """Images/s (y) against the seconds that a batch takes (x), from batch to batch, and the latency bound."""
    from matplotlib.lines import Line2D

    figure, axes = canvas(300, len(stacks))
    curves = [Curve(label=label, values=[], style=n) for n, (label, _) in enumerate(stacks)]
    xs, ys = [math.log10(bound)], []
    for curve, (_, points) in zip(curves, stacks, strict=True):
        known = [(b, math.log10(s), math.log10(r)) for b, s, r in points if _positive(s) and _positive(r)]
        axes.plot(
            [x for _, x, _ in known], [y for _, _, y in known], markersize=6, **look(curve), **_shape(curve.style)
        )
        xs += [x for _, x, _ in known]
        ys += [y for _, _, y in known]
    low, high = min(ys, default=0.0), max(ys, default=1.0)
    room = max(0.08 * (high - low), 0.15)
    axes.set_ylim(low - room, high + 2 * room)
    axes.set_xlim(min(xs) - 0.15, max(xs) + 0.25)
    axes.axvline(math.log10(bound), color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    put_text(axes, math.log10(bound), high + 1.35 * room, f"bound, {duration(bound)} ", ha="right", va="center")
    _log_ticks(axes.xaxis, min(xs) - 0.15, max(xs) + 0.25, lambda x: _trim(duration(10**x)))
    _log_ticks(axes.yaxis, low - room, high + room, lambda y: f"{10**y:,.0f}" if y < 7 else _power(y), fine=True)
    axes.set_xlabel("time that a batch takes", color=INK)
    axes.set_ylabel("images per second", color=INK)
    handles = [Line2D([], [], markersize=6, **look(curve), **_shape(curve.style)) for curve in curves]
    put_keys(figure, handles, [curve.label for curve in curves])
    told = "; ".join(
        f"{label}: " + ", ".join(f"batch {b} {r:.3g} images/s in {duration(s)}" for b, s, r in points)
        for label, points in stacks
    )
    return to_svg(figure, name, "Throughput against latency, by batch", f"{told}.")


@our_style()
def grouped(
    groups: Sequence[tuple[str, Sequence[Bar]]],
    *,
    name: str,
    title: str,
    unit: str,
    marks: Sequence[float] = (),
    whole: float | None = None,
    most: float = math.inf,
) -> str:
    """Bars from zero with their intervals, under the heading of their group.

    `whole` is a line to be held against, `marks` are fainter ones. Bars end at `most`, whatever they stand for.
    """
    from matplotlib.ticker import StrMethodFormatter

    height = sum(len(bars) + 1.3 for _, bars in groups)
    figure, axes = canvas(round(height * 19 + 50), 0)
    known = [b.high or b.figure or 0.0 for _, bars in groups for b in bars if b.figure is not None]
    most = min(max([whole or 0.0, *known], default=0.0) or 1.0, most)
    labels = [one_line(bar.label, 24) for _, bars in groups for bar in bars]
    room = WIDTH - 30 - LETTER * max(map(len, labels), default=0)
    right = 1.05 * most
    ticks, top = [], 0.0
    for heading, bars in groups:
        put_text(axes, 0, top, heading, weight="bold", va="center")
        for m, bar in enumerate(bars, 1):
            y, end = top + 0.95 * m, 0.0
            ticks.append(y)
            if bar.figure is not None:
                end = min(bar.figure, most)
                axes.barh(y, end, height=0.66, color=COLOURS[bar.style % len(COLOURS)])
                if bar.low is not None and bar.high is not None and bar.low < most:
                    end = max(end, min(bar.high, most))
                    _whisker(axes, y, bar.low, min(bar.high, most))
            put_text(axes, end + 0.015 * most, y, bar.text, va="center")
            right = max(right, (end + 0.015 * most) / max(1 - LETTER * len(one_line(bar.text)) / room, 0.2))
        top += len(bars) + 1.3
    for mark in marks:
        axes.axvline(mark, color=INK, linewidth=0.9, linestyle=(0, (1.5, 2.5)), alpha=0.45, zorder=0.9)
    if whole is not None:
        axes.axvline(whole, color=INK, linewidth=1.3, zorder=0.9)
    axes.set_ylim(top - 0.6, -0.7)
    axes.set_xlim(0, right)
    axes.set_yticks(ticks, labels, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    axes.set_xlabel(unit, color=INK)
    told = "; ".join(f"{heading}: " + ", ".join(f"{b.label} {b.text}" for b in bars) for heading, bars in groups)
    return to_svg(figure, name, title, f"{told}.")


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _power(exponent: float) -> str:
    """10 to that power, in figures where they are few."""
    if -3 <= exponent < 5:
        return f"{10**exponent:g}"
    if abs(exponent - round(exponent)) < 1e-9:
        return f"10{str(round(exponent)).translate(SUPERSCRIPT)}"
    return f"{10**exponent:.2g}"


def _trim(text: str) -> str:
    """A tick's text without the zeros after its point."""
    return re.sub(r"\.0+(?= |$)", "", text)


def _log_ticks(axis: "Axis", low: float, high: float, form: Callable[[float], str], *, fine: bool = False) -> None:
    """Ticks at whole decades, or between them too where there are few; the axis holds logarithms."""
    decades = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1, max(1, math.ceil((high - low) / 7)))
    ticks = [float(d) for d in decades]
    if fine and len(ticks) < 4:
        near = range(math.floor(low) - 1, math.floor(high) + 2)
        steps = (1, 2, 5) if high - low > 0.8 else (1, 1.5, 2, 3, 5, 7)
        ticks = [d + math.log10(m) for d in near for m in steps]
        ticks = [t for t in ticks if low - 1e-9 <= t <= high + 1e-9]
    axis.set_ticks(ticks, [form(t) for t in ticks])


def _whisker(axes: "Axes", at: float, low: float, high: float, *, across: bool = True) -> None:
    lines: Iterator[tuple[list[float], list[float]]] = iter(
        [([low, high], [at, at]), *(([end, end], [at - 0.13, at + 0.13]) for end in (low, high))]
    )
    for along, side in lines:
        axes.plot(*((along, side) if across else (side, along)), color=INK, linewidth=1.2, zorder=4)


def _mark(style: int) -> dict[str, Any]:
    return {"color": COLOURS[style % len(COLOURS)], "marker": MARKERS[style % len(MARKERS)]}


def _shape(style: int) -> dict[str, Any]:
    return {"marker": MARKERS[style % len(MARKERS)]}


def _patch(style: int) -> "Artist":
    from matplotlib.patches import Patch

    return Patch(color=COLOURS[style % len(COLOURS)], linewidth=0)


Box = tuple[float, float, float, float]
"""Left, right, bottom, top."""


@dataclass(frozen=True, kw_only=True)
class _Name:
    """A point's name where it is to stand, and the line that leads to it."""

    label: str
    left: float
    middle: float
    line: tuple[tuple[float, float], tuple[float, float]] | None


def _put_names(
    axes: "Axes",
    places: Sequence[tuple[float, float, str]],
    taken: Sequence[Box],
    written: Sequence[Box],
    pixel: tuple[float, float],
) -> None:
    """Each point's name beside it, in the order that leaves the fewest without a place."""
    points = [(x - 5 * pixel[0], x + 5 * pixel[0], y - 5 * pixel[1], y + 5 * pixel[1]) for x, y, _ in places]
    limits = (*axes.get_xlim(), *axes.get_ylim())
    orders = [list(places), sorted(places), sorted(places)[::-1], sorted(places, key=lambda place: -place[1])]
    for name in max((_arranged(order, [*taken, *points], written, limits, pixel) for order in orders), key=len):
        if name.line:
            (x0, y0), (x1, y1) = name.line
            axes.plot([x0, x1], [y0, y1], color=INK, linewidth=0.7, alpha=0.6)
        put_text(axes, name.left, name.middle, name.label, va="center")


def _arranged(
    places: Sequence[tuple[float, float, str]],
    taken: Sequence[Box],
    written: Sequence[Box],
    limits: Box,
    pixel: tuple[float, float],
) -> list[_Name]:
    """The names that have a place: the nearest free one, with a line to it from further off.

    Names keep off `taken` and off one another, and lines off names and off what is `written`.
    """
    dx, dy = pixel
    full, names, found = list(taken), list(written), []
    near = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
    far = [(across, up) for up in (2, -2, 3, -3, -4, -5) for across in (0, 1, -1)]
    for x, y, label in places:
        wide, tall = LETTER * len(label) * dx, 13 * dy
        for across, up in near + far:
            left = x + across * 8 * dx - (wide if across < 0 else wide / 2 if across == 0 else 0)
            low = y - tall / 2 + up * (13 if across == 0 or abs(up) > 1 else 9) * dy
            box = (left, left + wide, low, low + tall)
            inside = limits[0] < box[0] and box[1] < limits[1] and limits[2] < box[2] and box[3] < limits[3]
            if not inside or any(_meet(box, other) for other in full):
                continue
            line = None
            if abs(up) > 1:
                end = (x + across * 8 * dx, low if up > 0 else low + tall)
                line = ((x, y), end)
                steps = [(x + (end[0] - x) * i / 12, y + (end[1] - y) * i / 12) for i in range(13)]
                trail = [(a - dx, a + dx, b - dy, b + dy) for a, b in steps[3:-1]]
                if any(_meet(own, other) for own in trail for other in names):
                    continue
                full += trail
            full.append(box)
            names.append(box)
            found.append(_Name(label=label, left=left, middle=low + tall / 2, line=line))
            break
    return found


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def _short(text: str, letters: float) -> str:
    """The text on at most two lines of about that many letters."""
    width = max(int(letters), 3)
    text = one_line(text)
    if len(text) <= width:
        return text
    cut = text.rfind(" ", 0, width + 1)
    first, rest = (text[:cut], text[cut + 1 :]) if cut > 0 else (text[:width], text[width:])
    return f"{first}\n{rest if len(rest) <= width else rest[: width - 1] + '…'}"
