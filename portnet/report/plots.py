"""Plots as SVG text, made to stand inside a page: text stays text, ink is `currentColor`, ids carry a prefix.

Matplotlib is imported inside functions: whoever only reads records or prints tables does not wait for it.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from portnet.report.table import spaced

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 460
"""Of a plot, in its own pixels: text of 12 of them stays readable when a phone scales it down."""
INK = "#010203"
"""Stands for `currentColor`, which Matplotlib has no word for."""
COLOURS = ("#1f7fc0", "#d55e00", "#009e73", "#bf62a0", "#917300", "#3b95c9")
"""After Okabe and Ito, who chose them for colour-blind readers; darkened to contrast 3:1 with white and near-black."""
DASHES = ((0, ()), (0, (4, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)), (0, (3, 3)))
WIDTHS = (5.0, 2.6, 1.4)
DRIFT = 0.12
"""Opacity of the area in which equals drift."""
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
POINTS = 600
"""Of a curve at most; there are fewer pixels."""
LEGEND_LINE = 17
"""Height of a line of a legend, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A stack's values by step. `style` numbers its colour and dashes, so that it looks alike in every plot."""

    label: str
    values: Sequence[float]
    style: int


@dataclass(frozen=True, kw_only=True)
class Bars:
    """A stack's images per second: median, least and most, or why there is none; `text` says it in words."""

    label: str
    rates: Mapping[str, tuple[float, float, float] | None]
    text: Mapping[str, str]


@contextmanager
def our_style() -> Iterator[None]:
    """Matplotlib as it comes, whatever the user's own settings are, and the same SVG from the same figures."""
    from matplotlib import style

    with style.context(["default", {"font.size": 12, "svg.fonttype": "none", "svg.hashsalt": "portnet"}]):
        yield


@our_style()
def losses(curves: Sequence[Curve], *, name: str) -> str:
    """The curves laid over each other; `name` goes before every id."""
    figure, axes = canvas(300, len(curves))
    for curve in curves:
        _draw(axes, curve, curve.values)
    _label_steps(axes, curves, "loss, nats")
    put_legend(figure, curves)
    told = "; ".join(f"{c.label}: {_loss(c.values[0])} to {_loss(c.values[-1])}" for c in curves if c.values)
    return to_svg(figure, name, "Loss before each training step", f"From the first step to the last. {told}.")


@our_style()
def distances(curves: Sequence[Curve], *, name: str, drift: Sequence[float] = ()) -> str:
    """How far each curve is from the reference, on a logarithmic axis; equal losses stand on a line of their own.

    `drift`: how far apart equals are by step, shown as the area below.
    """
    figure, axes = canvas(300, len(curves) + bool(drift))
    positive = [v for values in (drift, *(curve.values for curve in curves)) for v in values if 0 < v < math.inf]
    top = math.ceil(math.log10(max(positive, default=1e-6)) + 1e-9)
    bottom = min(math.floor(math.log10(min(positive, default=1e-7))), top - 1)
    zero = bottom - max(1.0, 0.15 * (top - bottom))
    height = top - zero
    if drift:
        levels = [math.log10(v) if 0 < v < math.inf else zero for v in drift]
        axes.fill_between(range(1, len(levels) + 1), levels, zero - height, color=INK, alpha=DRIFT, linewidth=0)
    for n, curve in enumerate(curves):
        _draw(axes, curve, [math.log10(v) if 0 < v < math.inf else math.nan for v in curve.values])
        equal = [step for step, v in enumerate(curve.values, 1) if v == 0]
        equal = [equal[i] for i in spaced(len(equal), POINTS)]
        # Side by side, or the last one would hide the others.
        level = zero + 0.08 * height * (0.5 - (n + 0.5) / len(curves))
        axes.plot(equal, [level] * len(equal), "|", color=look(curve)["color"], markersize=5)
    decades = range(bottom, top + 1, max(1, math.ceil((top - bottom) / 6)))
    axes.set_yticks([zero, *decades], ["equal", *(f"10{str(d).translate(SUPERSCRIPT)}" for d in decades)])
    axes.set_ylim(zero - 0.06 * height, top + 0.03 * height)
    _label_steps(axes, curves, "|loss - reference|, nats")
    put_legend(figure, curves, area="how far runs that begin one rounding apart drift" if drift else "")
    told = "; ".join(f"{c.label}: at most {max(c.values):.1e}" for c in curves if c.values)
    return to_svg(figure, name, "Distance of the loss from the reference's", f"Before each training step. {told}.")


@our_style()
def throughput(stacks: Sequence[Bars], *, name: str) -> str:
    """A bar for each mode of each stack, from zero to the median, with a whisker from the least to the most."""
    modes = list(dict.fromkeys(mode for stack in stacks for mode in stack.rates))
    slot = len(modes) + 1.3
    figure, axes = canvas(round(len(stacks) * slot * 19 + 50), 0)
    most = max((r[2] for stack in stacks for r in stack.rates.values() if r is not None), default=1.0)
    ticks = []
    for n, stack in enumerate(stacks):
        put_text(axes, 0, n * slot, stack.label, weight="bold", va="center")
        for m, mode in enumerate(modes, 1):
            y, rates = n * slot + 0.95 * m, stack.rates.get(mode)
            ticks.append((y, mode))
            end = 0.0
            if rates is not None:
                middle, least, end = rates
                axes.barh(y, middle, height=0.66, color=COLOURS[(m - 1) % len(COLOURS)])
                axes.plot([least, end], [y, y], color=INK, linewidth=1.2)
                for x in (least, end):
                    axes.plot([x, x], [y - 0.2, y + 0.2], color=INK, linewidth=1.2)
            put_text(axes, end + 0.015 * most, y, stack.text.get(mode, ""), va="center")
    axes.set_ylim(len(stacks) * slot - 0.6, -0.7)
    axes.set_xlim(0, 1.32 * most)
    axes.set_yticks([y for y, _ in ticks], [mode for _, mode in ticks])
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("images per second", color=INK)
    told = "; ".join(f"{s.label}: " + ", ".join(f"{mode} {s.text.get(mode, '')}" for mode in modes) for s in stacks)
    return to_svg(figure, name, "Images per second", f"Median over timed blocks. {told}.")


def canvas(height: float, legend: int) -> tuple["Figure", "Axes"]:
    """Empty axes of that many pixels and a legend of that many lines, in the page's ink."""
    from matplotlib.figure import Figure

    pixel = 1 / 72
    figure = Figure(figsize=(WIDTH * pixel, (height + LEGEND_LINE * legend) * pixel), layout="constrained")
    axes = figure.subplots()
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=11)
    axes.grid(color=INK, alpha=0.14, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def look(curve: Curve) -> dict[str, Any]:
    """The first one broad and unbroken, each later one narrower and dashed: where they coincide, all are seen."""
    n = curve.style
    return {
        "color": COLOURS[n % len(COLOURS)],
        "linestyle": DASHES[n % len(DASHES)],
        "linewidth": WIDTHS[min(n, len(WIDTHS) - 1)],
    }


def _draw(axes: "Axes", curve: Curve, values: Sequence[float]) -> None:
    known = [math.isfinite(v) for v in values]
    # A point with no neighbour has no line to be seen by.
    lone = [i for i, here in enumerate(known) if here and not any(known[max(i - 1, 0) : i] + known[i + 1 : i + 2])]
    points = [v if here else math.nan for v, here in zip(values, known, strict=True)]
    steps = spaced(len(points), POINTS)
    lone = [n for n, step in enumerate(steps) if step in lone] if lone else []
    axes.plot(
        [s + 1 for s in steps], [points[s] for s in steps], marker="o", markersize=4, markevery=lone, **look(curve)
    )


def _loss(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}"


def _label_steps(axes: "Axes", curves: Sequence[Curve], quantity: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("before training step", color=INK)
    axes.set_ylabel(quantity, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    axes.set_xlim(0.5, 1.02 * max([1, *(len(curve.values) for curve in curves)]) + 0.5)


def put_text(axes: "Axes", x: float, y: float, text: str, **how: Any) -> None:
    """Write a text as it stands."""
    # Names come from records: what is between two dollar signs in one is no formula.
    axes.text(x, y, one_line(text), color=INK, parse_math=False, fontsize=11, in_layout=False, **how)


def put_legend(figure: "Figure", curves: Sequence[Curve], area: str = "") -> None:
    """A legend below the axes, a line for each curve and one for the area."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = [curve.label for curve in curves]
    handles: list[Artist] = [Line2D([], [], **look(curve)) for curve in curves]
    if area:
        names.append(area)
        handles.append(Patch(color=INK, alpha=DRIFT, linewidth=0))
    put_keys(figure, handles, names)


def put_keys(figure: "Figure", handles: Sequence["Artist"], names: Sequence[str]) -> None:
    """A legend below the axes of those handles, their names as they stand."""
    # Set afterwards: Matplotlib leaves out labels that begin with an underscore.
    legend = figure.legend(
        handles, ["-"] * len(handles), loc="outside lower left", frameon=False, labelcolor=INK, fontsize=11,
        handlelength=3.2, labelspacing=0.35, borderpad=0.1,
    )  # fmt: skip
    for text, shown in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(one_line(shown))


def one_line(text: str, longest: int = 56) -> str:
    """The text on one line, without what XML cannot hold."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def to_svg(figure: "Figure", name: str, title: str, description: str) -> str:
    """The figure as SVG to stand in a page, `name` before every id, read out as the title and the description."""
    drawn = io.BytesIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with warnings.catch_warnings():
        # Letters that Matplotlib's font lacks, the reader's browser has.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(drawn, format="svg", metadata=nothing)
    root = ElementTree.fromstring(drawn.getvalue())
    for parent in list(root.iter()):
        for child in [c for c in parent if c.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: _mended(key, value, name) for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update(attributes)
    about = [ElementTree.Element(tag, {"id": f"{name}-{tag}"}) for tag in ("title", "desc")]
    about[0].text, about[1].text = title, " ".join(one_line(description, 10_000).split())
    root[:0] = about
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
        "font-family": "system-ui, sans-serif",
        "stroke-linejoin": "round",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _mended(key: str, value: str, name: str) -> str:
    """An attribute's value: ids of this plot alone, the page's own ink and font."""
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href"):
        return value.replace("#", f"#{name}-", 1)
    value = value.replace("url(#", f"url(#{name}-").replace(INK, "currentColor")
    return re.sub("'DejaVu Sans'.* sans-serif", "system-ui, sans-serif", value)
