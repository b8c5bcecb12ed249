"""The plots of the lock-in report: to scale, with their own ids, in the page's ink, and of anything at all."""

import math
import re
from xml.etree import ElementTree

import pytest

from portnet.report import lockin_plots, plots
from portnet.report.lockin_plots import Bar, Point, Stacked

HOSTILE = "$x_1$ <b>\x00_"


def drawn() -> dict[str, str]:
    bars = [Bar(label="a", figure=0.5, low=0.4, high=0.6, text="50%"), Bar(label="b", figure=0.25, text="25%")]
    none = Bar(label="c", figure=None, text="not measured")
    return {
        "cascade": lockin_plots.cascade(bars, [0.5, 0.33], ["c"], name="x"),
        "navigation": lockin_plots.navigation([Point(label="a", x=0.5, y=0.25)], name="x"),
        "roofline": lockin_plots.roofline(1e14, 1e12, [Point(label="conv1", x=10, y=5e12)], name="x", of="a"),
        "waterfall": lockin_plots.waterfall([Bar(label="a", figure=4.0, text="4×"), none], name="x", of="a"),
        "stacked": lockin_plots.stacked(
            [Stacked(label="a", parts={"p": 1.0, "q": 3.0}, text="4 s")], name="x", title="t", unit="u"
        ),
        "sweep": lockin_plots.sweep([("a", [(1, 0.001, 1000.0), (8, 0.004, 2000.0)])], 0.1, name="x"),
        "grouped": lockin_plots.grouped([("g", [*bars, none])], name="x", title="t", unit="u", marks=(0.8,), whole=1.0),
    }


def texts(svg: str) -> list[str]:
    return [t.text or "" for t in ElementTree.fromstring(svg).iter() if t.tag.endswith("}text")]


def boxes(svg: str) -> list[tuple[float, float, float, float]]:
    """Left, right, top and bottom of each filled rectangle in a colour of ours."""
    found = []
    for path, style in re.findall(r'<path d="(M [^"]*z)[^"]*"[^>]*style="([^"]*)"', svg):
        if any(f"fill: {colour}" in style for colour in plots.COLOURS):
            at = [float(n) for n in re.findall(r"-?\d+\.?\d*", path)]
            found.append((min(at[::2]), max(at[::2]), min(at[1::2]), max(at[1::2])))
    return found


def marks(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: #', svg)]


@pytest.mark.parametrize("name", list(drawn()))
def test_plots_take_the_pages_ink_and_their_own_ids(name: str) -> None:
    svg = drawn()[name]
    root = ElementTree.fromstring(svg)
    assert all(i.startswith("x-") for i in (e.get("id") for e in root.iter()) if i)
    assert not [c for c in re.findall(r"(?:fill|stroke): (#\w+)", svg) if c not in plots.COLOURS]
    assert "currentColor" in svg
    assert root.get("role") == "img"
    assert [e.tag.rpartition("}")[2] for e in root][:2] == ["title", "desc"]
    assert drawn()[name] == svg, "equal figures give an equal plot"


def test_bars_are_to_scale() -> None:
    high, low = boxes(drawn()["cascade"])[:2]
    assert high[3] - high[2] == pytest.approx(2 * (low[3] - low[2]), rel=1e-3)
    one, two = boxes(drawn()["grouped"])[:2]
    assert one[1] - one[0] == pytest.approx(2 * (two[1] - two[0]), rel=1e-3)
    for name in ("grouped", "stacked"):
        upright = re.findall(r'<path d="M ([\d.]+) [\d.]+\s+L \1 [^>]*stroke-linecap: square', drawn()[name])
        spine = min(map(float, upright))
        assert boxes(drawn()[name])[0][0] == pytest.approx(spine, abs=0.01), "from the axis on, which is at zero"
        assert next(t for t in texts(drawn()[name]) if re.fullmatch(r"[\d.]+", t)) in ("0", "0.0")
    first, second = boxes(drawn()["stacked"])[:2]
    assert second[1] - second[0] == pytest.approx(3 * (first[1] - first[0]), rel=1e-3)
    assert second[0] == pytest.approx(first[1], abs=0.01), "one after the other"


def test_what_is_not_measured_has_no_bar_and_says_so() -> None:
    for name in ("waterfall", "grouped"):
        assert "not measured" in texts(drawn()[name])
    assert len(boxes(drawn()["waterfall"])) == 1
    assert len(boxes(drawn()["grouped"])) == 2
    assert "not measured" in texts(drawn()["cascade"])


def test_the_waterfall_is_logarithmic_and_steps_down() -> None:
    rungs = [
        Bar(label="a", figure=2.0, text=""),
        Bar(label="a, b", figure=8.0, text="", start=2.0),
        Bar(label="c", figure=4.0, text=""),
    ]
    two, eight, four = boxes(lockin_plots.waterfall(rungs, name="x", of="s"))
    assert eight[0] == pytest.approx(two[1], abs=0.01), "begins where what is below it ended"
    assert eight[1] - eight[0] == pytest.approx(2 * (two[1] - two[0]), rel=1e-3)
    assert four[0] == pytest.approx(two[0], abs=0.01)
    assert four[1] - four[0] == pytest.approx(2 * (two[1] - two[0]), rel=1e-3)


def test_the_roofline_puts_layers_where_they_belong() -> None:
    """A layer at half of the flat roof lies log10(2) below it, and one decade is as far anywhere."""
    layers = [Point(label="half", x=1000, y=5e13), Point(label="tenth", x=10, y=1e12), Point(label="on", x=10, y=1e13)]
    svg = lockin_plots.roofline(1e14, 1e12, layers, name="x", of="s")
    (_, half), (tenth_x, tenth), (on_x, on) = marks(svg)
    path = re.search(r'<path d="(M [^"]*)"[^>]*style="fill: none; stroke: currentColor; stroke-width: 2.2', svg)[1]
    (_, _), (ridge_x, ridge), (_, top) = [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)]
    decade = tenth - on
    assert ridge == pytest.approx(top)
    assert half - top == pytest.approx(math.log10(2) * decade, rel=1e-3)
    assert on - ridge == pytest.approx(decade, rel=1e-3), "the roof at 10 FLOP a byte is a tenth of the flat one"
    assert tenth_x == on_x
    assert {"half", "tenth", "on", "100 TFLOP/s", "1.00 TB/s"} <= set(texts(svg))
    assert ridge_x > on_x


def test_the_names_of_layers_do_not_lie_on_one_another() -> None:
    layers = [Point(label=f"conv{n}", x=100 * 1.15**n, y=1e13 * 1.02**n) for n in range(5)]
    svg = lockin_plots.roofline(1e14, 1e12, layers, name="x", of="s")
    found = re.findall(r'<text[^>]*transform="translate\(([\d.]+) ([\d.]+)\)[^>]*>(conv\d)<', svg) or [
        (x, y, t) for x, y, t in re.findall(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>(conv\d)<', svg)
    ]
    assert {name for _, _, name in found} == {f"conv{n}" for n in range(5)}
    places = [(float(x), float(y)) for x, y, _ in found]
    for i, (x, y) in enumerate(places):
        for a, b in places[:i]:
            assert abs(y - b) > 9 or abs(x - a) > 30


def ideal(svg: str) -> tuple[float, float]:
    (at,) = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: currentColor[^"]*linejoin', svg)
    return float(at[0]), float(at[1])


def test_the_navigation_chart_has_its_ideal_at_one_one() -> None:
    def chart(x: float, y: float) -> str:
        return lockin_plots.navigation([Point(label="a", x=x, y=y)], name="x")

    assert marks(chart(1.0, 1.0))[0] == ideal(chart(1.0, 1.0))
    (zero, bottom), (half, quarter) = marks(chart(0.0, 0.0))[0], marks(chart(0.5, 0.25))[0]
    right, top = ideal(chart(0.5, 0.25))
    assert half - zero == pytest.approx((right - zero) / 2, rel=1e-4)
    assert bottom - quarter == pytest.approx((bottom - top) / 4, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-300, 1e-9, 1.0, 1e9, 1e300, math.inf, math.nan])
def test_anything_can_be_drawn(value: float) -> None:
    bar = Bar(label=HOSTILE, figure=value, low=value, high=value, text=HOSTILE)
    sane = value if math.isfinite(value) else None
    known = Bar(label=HOSTILE, figure=sane, low=sane, high=sane, text=HOSTILE)
    point = Point(label=HOSTILE, x=value, y=value)
    made = [
        lockin_plots.cascade([known], [sane or 0.0], [HOSTILE], name="x"),
        lockin_plots.roofline(1e14, 1e12, [point], name="x", of=HOSTILE),
        lockin_plots.waterfall([bar], name="x", of=HOSTILE),
        lockin_plots.stacked(
            [Stacked(label=HOSTILE, parts={HOSTILE: sane or 0.0}, text=HOSTILE)], name="x", title="t", unit="u"
        ),
        lockin_plots.sweep([(HOSTILE, [(1, value, value)])], 0.1, name="x"),
        lockin_plots.grouped([(HOSTILE, [known])], name="x", title="t", unit="u", whole=1.0, most=4.0),
    ]
    for svg in made:
        ElementTree.fromstring(svg)
        assert not re.search(r"\bnan\b|\binf\b", " ".join(re.findall(r' (?:d|x|y)="([^"]*)"', svg)))


def test_nothing_at_all_can_be_drawn() -> None:
    for svg in (
        lockin_plots.cascade([], [], [], name="x"),
        lockin_plots.navigation([], name="x"),
        lockin_plots.roofline(1.0, 1.0, [], name="x", of=""),
        lockin_plots.waterfall([], name="x", of=""),
        lockin_plots.stacked([], name="x", title="", unit=""),
        lockin_plots.sweep([], 0.1, name="x"),
        lockin_plots.grouped([], name="x", title="", unit=""),
    ):
        ElementTree.fromstring(svg)


def test_labels_are_not_formulas() -> None:
    for svg in (
        lockin_plots.cascade([Bar(label="$\\frac{1}{2}$", figure=0.5, text="$x_1$")], [0.5], ["$y$"], name="x"),
        lockin_plots.grouped(
            [("$g$", [Bar(label="$\\frac{1}{2}$", figure=0.5, text="$x_1$")])], name="x", title="t", unit="u"
        ),
    ):
        assert {"$\\frac{1}{2}$", "$x_1$"} <= {part for text in texts(svg) for part in text.split("\n")}
