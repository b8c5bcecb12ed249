"""What people read: the tables, the plots and the page."""

import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from rich.table import Table

from portnet import lockin
from portnet.errors import RecordError
from portnet.record import Record, Spec
from portnet.report import page, plots, table

HOSTILE = "<script>alert(1)</script>&\"'$x_1$[bold]{{ 7*7 }}\x1b[31m\x00\ud800\N{RIGHT-TO-LEFT OVERRIDE}"
DEVICE = {"vendor": "a vendor", "name": "Some Processor 9000", "memory": 8 << 30, "versions": {"driver": "1.2"}}
ENVIRONMENT = {"date": "2026-01-02T03:04:05+00:00", "system": "Linux", "versions": {"numpy": "2.0"}}


def measured(backend: str, *losses: float, **changed: object) -> Record:
    spec = {"precision": "float64"} if backend == "reference" else {}
    seconds = [0.5, 0.25, 1.0]
    return replace(
        Record(
            spec=Spec(backend=backend, **{"quick": True, **spec}),
            outcome="works",
            device=DEVICE,
            environment=ENVIRONMENT,
            weights="ab" * 32,
            gates={"parity": {"findings": [{"what": "infer() fc8", "error": 2e-7, "allowed": 8e-7}]}},
            training={"losses": list(losses)} if losses else {},
            samples={
                "train": {"batch": 8, "steps": 3, "seconds": seconds},
                "infer": {"batch": 8, "steps": 300, "seconds": seconds},
            },
        ),
        **changed,
    )


REFERENCE = measured("reference", 2.3, 1.5, 0.75, gates={"parity": {"oracle": True, "findings": []}})
CPU = measured("cpu", 2.3, 1.50001, 0.7505)
INFERS = measured("onnxruntime", samples={"infer": CPU.samples["infer"]})
LONG = measured("onnxruntime-openvino", samples={"infer": CPU.samples["infer"]})
WRONG = measured("cpu", spec=replace(CPU.spec, precision="bfloat16"), outcome="wrong", reason="norm1 is off")
ABSENT = Record(
    spec=Spec(backend="cuda"), outcome="not available", reason="torch has no CUDA", remedy="install one that has"
)
ALL = (REFERENCE, CPU, INFERS, WRONG, ABSENT)

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """A page taken apart. Fails where an element is not closed, or another one is."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self._cell: list[str] | None = None
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self._cell = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("th", "td") and self._cell is not None:
            self.rows[-1].append(" ".join("".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._cell is not None:
            self._cell.append(data)

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]

    def outcomes(self) -> dict[str, list[str]]:
        """The first table: what stands behind each stack."""
        end = next(n for n, row in enumerate(self.rows[1:], 1) if row[0] in ("Step", "Stack"))
        return {row[0]: row[1:] for row in self.rows[1:end]}


def taken_apart(records: Sequence[Record], problems: Sequence[str] = ()) -> Page:
    return Page(page.render(records, problems))


def printed(what: Table, width: int = 80) -> str:
    file = StringIO()
    Console(file=file, width=width).print(what)
    return file.getvalue()


def test_page_is_well_formed_and_reads_in_order() -> None:
    found = taken_apart(ALL)
    assert Counter(tag for tag, _ in found.elements if tag in ("html", "head", "body", "main", "h1", "title")) >= (
        Counter({"html": 1, "head": 1, "body": 1, "main": 1, "h1": 1, "title": 1})
    )
    text = " ".join("".join(found.text).split())
    order = [
        "PortNet: 4 stacks compared",
        "caffe at 227 × 227 pixels, batch 16",
        "digits",
        "seed 0",
        "1 more is not",
        "Outcomes",
    ]
    order += ["quick", "no statement about other hardware", "Loss and speed", "Loss by step", "torch has no CUDA"]
    order += ["Remedy: install one that has", "Some Processor 9000", "8.0 GiB", "2026-01-02T03:04:05", CPU.digest]
    at = 0
    for part in order:
        assert part in text[at:], part
        at = text.index(part, at)


def test_outcome_table() -> None:
    found = taken_apart(ALL).outcomes()
    device = "Some Processor 9000"
    assert found == {
        f"reference/eager/float64{device}": [
            "works", "48 quick", "4,800 quick", "the reference", "the reference", "2.30 to 0.75", "the reference",
        ],
        f"cpu/eager/float32{device}": [
            "works", "48 quick", "4,800 quick", "25%", "2.0e-07", "2.30 to 0.75", "5.0e-04",
        ],
        f"onnxruntime/eager/float32{device}": [
            "works", "not measured", "4,800 quick", "25%", "2.0e-07", "not measured", "not measured",
        ],
        f"cpu/eager/bfloat16{device}": [
            "wrong", "void: wrong", "void: wrong", "25%", "2.0e-07", "not measured", "not measured",
        ],
        "cuda/eager/float32": ["not available", "not measured: torch has no CUDA"],
    }  # fmt: skip


def test_figures_to_be_quoted_are_not_called_quick() -> None:
    found = taken_apart([replace(CPU, spec=replace(CPU.spec, quick=False))])
    assert next(iter(found.outcomes().values()))[1:3] == ["48", "4,800"]
    assert "quick" not in "".join(found.text).partition("Outcomes")[2].partition("Loss and speed")[0]


def test_page_loads_nothing() -> None:
    found = taken_apart(ALL)
    assert not found.all("script", "iframe", "img", "object", "embed", "base", "image", "audio", "video", "form")
    for _, attributes in found.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                assert value == "data:," or (value or "").startswith("#")
            for inner in re.findall(r"url\(([^)]*)\)", value or ""):
                assert inner.startswith("#")
    style = page.render(ALL).partition("<style>")[2].partition("</style>")[0]
    assert "@import" not in style
    assert "url(" not in style
    (policy,) = (m["content"] for m in found.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_ids_are_unique_and_references_lead_somewhere() -> None:
    # Two kinds of work: the same plots twice on one page.
    other = [replace(r, spec=replace(r.spec, batch=64)) for r in (REFERENCE, CPU)]
    found = taken_apart([*ALL, *other])
    ids = Counter(str(attributes["id"]) for _, attributes in found.elements if "id" in attributes)
    assert len(found.all("svg")) == 6
    assert max(ids.values()) == 1
    for _, attributes in found.elements:
        for name, value in attributes.items():
            if name in ("aria-labelledby", "href") and value != "data:,":
                assert all(reference.lstrip("#") in ids for reference in (value or "").split())
            for inner in re.findall(r"url\(#([^)]*)\)", value or ""):
                assert inner in ids


def test_page_can_be_heard_and_tabbed_through() -> None:
    found = taken_apart(ALL)
    assert found.all("html")[0]["lang"] == "en-GB"
    assert all("scope" in th for th in found.all("th"))
    assert len(found.all("caption")) + 2 == len(found.all("table")), "device and environment are named by their region"
    for svg in found.all("svg"):
        assert svg["role"] == "img"
        assert svg["aria-labelledby"]
    scrolled = [d for d in found.all("div") if d.get("class", "").startswith("scroll")]
    assert all(d["tabindex"] == "0" and d["role"] == "region" and d["aria-label"] for d in scrolled)
    assert len(scrolled) == len(found.all("table"))


def test_hostile_records_are_only_text() -> None:
    spec = Spec(backend=HOSTILE, precision=HOSTILE, preset=HOSTILE, data=HOSTILE)
    hostile = replace(
        CPU, spec=spec, outcome="partial", reason=HOSTILE, remedy=HOSTILE, weights=HOSTILE,
        device={HOSTILE: HOSTILE, "name": HOSTILE}, environment={"date": HOSTILE, HOSTILE: {HOSTILE: [HOSTILE]}},
        gates={"parity": {"findings": [{"what": HOSTILE, "error": 1.0, "allowed": 2.0}]}},
    )  # fmt: skip
    absent = replace(hostile, outcome="not available", samples={}, training={})
    oracle = replace(hostile, spec=replace(spec, backend="reference", precision="float64"))
    text = page.render([hostile, absent, oracle], [HOSTILE, RecordError(HOSTILE)])
    found = Page(text)
    assert not found.all("script")
    assert len(found.all("svg")) == 3
    assert "<script>alert(1)</script>" in "".join(found.text)
    assert "{{ 7*7 }}" in "".join(found.text)
    for bad in "\x1b\x00\ud800\N{RIGHT-TO-LEFT OVERRIDE}":
        assert bad not in text
    rows = lockin.rows([hostile, absent, oracle])
    for told in (printed(table.summary(rows)), printed(table.losses(rows))):
        assert "\x1b" not in told
    wide = printed(table.summary(rows), 2000)
    assert "$x_1$[bold]{{ 7*7 }}" in wide


def test_page_can_be_written_whatever_it_holds(tmp_path: Path) -> None:
    path = page.write([replace(CPU, reason=HOSTILE)], tmp_path / "page.html")
    assert path.read_text(encoding="utf-8") == page.render([replace(CPU, reason=HOSTILE)])
    with pytest.raises(RecordError, match="no folder"):
        page.write([CPU], tmp_path / "none" / "page.html")


def test_no_records() -> None:
    found = taken_apart([])
    text = "".join(found.text)
    assert "nothing to compare" in text
    assert "portnet compare" in text
    assert not found.all("svg", "table")
    assert "0 stacks" in found.text[found.text.index("PortNet: 0 stacks compared")]


def test_records_that_could_not_be_used_are_named() -> None:
    for records in ([], ALL):
        text = "".join(taken_apart(records, ["x.json is damaged", RecordError("y.json is no record")]).text)
        assert "x.json is damaged" in text
        assert "y.json is no record" in text
    assert "could not be used" not in "".join(taken_apart(ALL).text)


def test_what_was_measured_comes_first() -> None:
    assert list(taken_apart([ABSENT, CPU]).outcomes())[-1] == "cuda/eager/float32"


def test_nothing_but_absent_backends() -> None:
    found = taken_apart([ABSENT])
    assert not found.all("svg")
    assert "install one that has" in "".join(found.text)


def test_equal_records_give_an_equal_page() -> None:
    assert page.render(ALL) == page.render(ALL)


def test_different_work_is_not_laid_over_each_other() -> None:
    bigger = replace(CPU, spec=replace(CPU.spec, batch=64))
    text = page.render([REFERENCE, CPU, bigger])
    assert "Not all stacks were given the same work" in text
    assert len(Page(text).all("svg")) == 6, "each kind of work has its own loss, distance and speed"
    assert "Not all stacks were given the same work" not in page.render(ALL)
    assert "Not all stacks were given the same work" in printed(table.summary(lockin.rows([CPU, bigger])), 200)


def test_the_reference_has_no_distance_from_itself() -> None:
    by_step = [row for row in taken_apart(ALL).rows if row[0] in ("Step", "2")]
    assert by_step[2:4] == [["Step", "cpu/eager/float32"], ["2", "1.00e-05"]]
    assert by_step[:2] == [["Step", "reference/eager/float64", "cpu/eager/float32"], ["2", "1.5", "1.50001"]]
    assert len(taken_apart([REFERENCE]).all("svg")) == 2


def test_how_far_equals_drift_is_told() -> None:
    perturbed = replace(CPU, training={**CPU.training, "perturbed": [[2.3, 1.50001, 0.7625]]})
    for told in (page.render([REFERENCE, perturbed]), printed(table.summary(lockin.rows([REFERENCE, perturbed])))):
        assert "one rounding apart" in told
        assert "1.2e-02" in told
    for told in (page.render([REFERENCE, CPU]), printed(table.summary(lockin.rows([REFERENCE, CPU])))):
        assert "one rounding apart" not in told


def test_names_tell_records_apart() -> None:
    def named(*records: Record) -> list[str]:
        return table.labels(lockin.rows(records))

    elsewhere = replace(CPU, device={"name": "Other"})
    assert named(CPU, ABSENT) == ["cpu/eager/float32", "cuda/eager/float32"]
    assert named(CPU, elsewhere, ABSENT) == [
        "cpu/eager/float32, Some Processor 9000", "cpu/eager/float32, Other", "cuda/eager/float32",
    ]  # fmt: skip
    again = replace(CPU, environment={"date": "later"})
    assert named(CPU, again) == [f"cpu/eager/float32, {r.digest[:8]}" for r in (CPU, again)]
    bigger = replace(CPU, spec=replace(CPU.spec, batch=64))
    assert named(CPU, bigger) == ["cpu/eager/float32, batch 16", "cpu/eager/float32, batch 64"]
    assert named(CPU, ABSENT, replace(bigger, spec=replace(bigger.spec, seed=1)))[1:] == [
        "cuda/eager/float32", "cpu/eager/float32, seed 1, batch 64",
    ]  # fmt: skip
    assert len(set(named(CPU, again, bigger, elsewhere))) == 4


GIVEN = {"weights": "cd" * 32, "pixels": 99, "count": 360, "right": 342, "right_by_reference": 343, "agree": 359}
ANSWERED = replace(INFERS, answers={**GIVEN, "error": 1.2e-7}, effective={"file": 227_640_164})
PLAIN = replace(CPU, answers={**GIVEN, "right": 343, "agree": 360, "error": 3e-7})


def test_answers_stand_side_by_side() -> None:
    rows = lockin.rows([REFERENCE, PLAIN, ANSWERED, ABSENT])
    assert table.answered(rows) == [
        ("cpu/eager/float32", "95.3%", "360 of 360", "3.0e-07", "4,800 quick", "no file"),
        ("onnxruntime/eager/float32", "95.0%", "359 of 360", "1.2e-07", "4,800 quick", "227.6"),
    ]
    told = table.answers_told(rows)
    assert "Weights cdcdcdcd (their SHA-256) on 360 test pictures at 99 pixels" in told
    assert "the float64 reference ranks 343 right" in told
    assert "of the network that was timed, at 227 pixels and with initial weights" in told
    shown = Page(page.render([REFERENCE, PLAIN, ANSWERED, ABSENT]))
    assert ["onnxruntime/eager/float32", "95.0%", "359 of 360", "1.2e-07", "4,800 quick", "227.6"] in shown.rows
    assert table.answered(lockin.rows([REFERENCE, CPU])) == []
    assert "Trained weights, test pictures" not in page.render([REFERENCE, CPU])


def test_answers_of_other_weights_are_not_held_together() -> None:
    other = replace(ANSWERED, answers={**GIVEN, "weights": "ef" * 32, "error": 0.0})
    told = table.answers_told(lockin.rows([PLAIN, other]))
    assert "Weights cdcdcdcd" in told
    assert "Weights efefefef" in told
    assert "Accuracies of different weights are not to be compared" in told
    assert "of the network that was timed" in told
    assert [line[0] for line in table.answered(lockin.rows([PLAIN, other]))] == [
        "cpu/eager/float32, weights cdcdcdcd",
        "onnxruntime/eager/float32, weights efefefef",
    ]


def test_answers_of_training_and_inference_meet_in_one_row() -> None:
    train = replace(CPU, spec=replace(CPU.spec, mode="train"))
    infer = replace(PLAIN, spec=replace(CPU.spec, mode="infer"), training={})
    for given in ([train, infer], [infer, train]):
        (merged,) = lockin.merge(given)
        assert merged.answers == PLAIN.answers
        assert merged.training == CPU.training


def test_answers_fit_80_columns() -> None:
    long = replace(LONG, answers=ANSWERED.answers, effective=ANSWERED.effective)
    text = printed(table.answers(lockin.rows([PLAIN, ANSWERED, long])), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "onnxruntime-openvino" in text


def test_summary_fits_80_columns() -> None:
    text = printed(table.summary(lockin.rows(ALL)))
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text, "no colours into a pipe"
    assert "…" not in text
    for part in (
        "onnxruntime/eager/float32",
        "48",
        "4,800",
        "quick",
        "2.30 to 0.75",
        "5.0e-04",
        "25%",
        "the reference",
    ):
        assert part in text
    body, _, below = text.partition("Images/s: the median")
    assert "cuda" not in body
    for part in ("cuda/eager/float32: not available", "torch has no CUDA; install one that has"):
        assert part in below
    assert "cpu/eager/bfloat16: wrong" in below


def test_void_and_not_measured_are_words() -> None:
    (row,) = lockin.rows([WRONG])
    assert [table.speed(row, mode) for mode in ("train", "infer")] == ["void: wrong"] * 2
    (row,) = lockin.rows([replace(CPU, outcome="failed", samples={}, gates={}, training={})])
    words = [table.speed(row, "train"), table.speed(row, "infer"), table.gate(row), table.logits(row)]
    words += [table.course(row), table.distance(row)]
    assert words == ["not measured"] * 6
    for text in (printed(table.summary([row]), 200), "".join(taken_apart([row.record]).text)):
        figures = text.partition("failed")[2].partition("Images/s: the median")[0].partition("What the columns")[0]
        assert "not measured" in figures
        assert not re.search(r"\b0\b", figures)


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.0, "0%"), (0.004, "0.4%"), (0.364, "36%"), (9.99, "999%"), (834.2, "834 times"), (2e9, "over 1e6 times")],
)
def test_share_of_the_gate_in_words(value: float, told: str) -> None:
    assert table.gate(replace(lockin.rows([CPU])[0], parity=value)) == told


@pytest.mark.parametrize("value", [math.inf, 1e306])
def test_a_tensor_that_is_not_finite(value: float) -> None:
    assert table.gate(replace(lockin.rows([CPU])[0], parity=value)) == "not finite"
    assert table.logits(replace(lockin.rows([CPU])[0], logits=1e300)) == "not finite"


def test_losses_by_step() -> None:
    long = replace(CPU, training={"losses": [float(n) for n in range(80)]})
    text = printed(table.losses(lockin.rows([long, INFERS])))
    steps = [line.split() for line in text.splitlines() if re.match(r" *\d", line)]
    assert len(steps) == 12
    assert steps[0] == ["1", "0.0000"]
    assert steps[-1] == ["80", "79.0000"]
    assert "onnxruntime" not in text
    gaps = {int(b[0]) - int(a[0]) for a, b in pairwise(steps)}
    assert gaps <= {7, 8}


def test_losses_of_many_stacks_fit_80_columns() -> None:
    names = ("onnxruntime", "accelerator", "cuda", "rocm", "xpu", "mps", "cpu")
    records = [measured(name, *[12.5 - n / 10 for n in range(60)]) for name in names]
    for count in range(1, len(records) + 1):
        text = printed(table.losses(lockin.rows(records[:count])))
        assert max(map(len, text.splitlines())) <= 80
        assert len(re.findall(r"\b12\.5000\b", text)) == count, "no figure is broken in two"
        assert len(re.findall(r"\b6\.6000\b", text)) == count
        assert "…" not in text


def test_a_training_that_stopped_early() -> None:
    early = replace(CPU, outcome="timeout", training={"losses": [2.3]})
    assert "not" in printed(table.losses(lockin.rows([REFERENCE, early]))).splitlines()[-2]
    assert "not measured" in [row[2] for row in taken_apart([REFERENCE, early]).rows if row[0] == "3"]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 11, 12, 13, 80])
@pytest.mark.parametrize("at_most", [2, 3, 12])
def test_spaced(count: int, at_most: int) -> None:
    found = table.spaced(count, at_most)
    assert found == sorted(set(found))
    assert len(found) == min(count, at_most)
    assert found[:1] + found[-1:] == ([0, count - 1] if count else [])


def test_everything_without_training() -> None:
    assert len(table.everything(lockin.rows(ALL))) == 2
    assert len(table.everything(lockin.rows([INFERS, ABSENT]))) == 1
    assert printed(table.everything([])[0])


def curves(*values: Sequence[float]) -> list[plots.Curve]:
    return [plots.Curve(label=f"stack {n}", values=v, style=n) for n, v in enumerate(values)]


def heights(svg: str) -> list[list[float]]:
    """The drawn curves' heights from the top, curve by curve, as they stand in the file."""
    (axes,) = [e for e in ElementTree.fromstring(svg).iter() if e.get("id", "").endswith("-axes_1")]
    drawn = [e.get("d", "") for e in axes.iter() if re.search("fill: none.* stroke: #", e.get("style", ""))]
    return [[float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)] for path in drawn]


def test_losses_are_drawn_to_scale() -> None:
    svg = plots.losses(curves([2.0, 1.0, 0.0], [2.0, 1.5, 1.0]), name="x")
    one, two = heights(svg)
    assert one[0] == two[0]
    assert one[1] == pytest.approx((one[0] + one[2]) / 2)
    assert two[2] == pytest.approx(one[1])
    texts = [t.text for t in ElementTree.fromstring(svg).iter() if t.tag.endswith("}text")]
    assert {"stack 0", "stack 1", "loss, nats"} <= set(texts), "text is text"


def test_distances_are_logarithmic_and_zeros_have_a_place() -> None:
    svg = plots.distances(curves([1e-1, 1e-3, 1e-2, 0.0, 0.0], [0.0, 1e-2]), name="x")
    one, two = heights(svg)[:2]
    assert len(one) == 3, "zero has no logarithm"
    assert one[1] - one[0] == pytest.approx(2 * (one[2] - one[0]))
    assert two[-1] == pytest.approx(one[2])
    assert "equal" in svg
    assert "10⁻³" in svg
    without = plots.distances(curves([1e-1, 1e-3, 1e-2, math.nan, math.nan], [math.nan, 1e-2]), name="x")
    assert svg.count("<use") == without.count("<use") + 3, "a mark for each zero"


def test_a_point_without_neighbours_is_seen() -> None:
    one, none = (plots.losses(curves([1.0, second, 3.0]), name="x").count("<use") for second in (math.nan, 2.0))
    assert one == none + 2


@pytest.mark.parametrize(
    "values",
    [
        [],
        [[]],
        [[0.0, 0.0]],
        [[0.0]],
        [[1e-300, 1e300]],
        [[1e-7]],
        [[5e-324]],
        [[math.inf, 1.0, math.nan]],
        [[1.0] * 9],
    ],
)
@pytest.mark.parametrize("drift", [[], [0.0, 0.0], [0.0, 1e-3, math.inf]])
def test_any_curve_can_be_drawn(values: list[list[float]], drift: list[float]) -> None:
    ElementTree.fromstring(plots.losses(curves(*values), name="a"))
    svg = plots.distances(curves(*values), name="a", drift=drift)
    ElementTree.fromstring(svg)
    assert ("one rounding apart" in svg) == bool(drift)
    assert not re.search(r"\bnan\b|\binf\b", " ".join(re.findall(r' d="([^"]*)"', svg)))


def test_bars_are_to_scale_and_say_what_is_missing() -> None:
    bars = plots.Bars(
        label="one", rates={"training": (50.0, 40.0, 60.0), "inference": (100.0, 90.0, 120.0)},
        text={"training": "50 quick", "inference": "100 quick"},
    )  # fmt: skip
    void = plots.Bars(
        label="two", rates={"training": None, "inference": None}, text={"training": "void: wrong", "inference": "-"}
    )
    svg = plots.throughput([bars, void], name="x")
    boxes = re.findall(r'<path d="M (\S+) \S+ +L (\S+) \S+ +L \S+ \S+ +L \S+ \S+ +z[^>]*style="fill: #', svg)
    (start, half), (_, whole) = [(float(a), float(b)) for a, b in boxes]
    assert whole - start == pytest.approx(2 * (half - start))
    texts = [t.text for t in ElementTree.fromstring(svg).iter() if t.tag.endswith("}text")]
    assert {"one", "two", "training", "inference", "50 quick", "100 quick", "void: wrong"} <= set(texts)
    ElementTree.fromstring(plots.throughput([void], name="x"))


def test_plots_take_the_pages_ink_and_font_and_their_own_ids() -> None:
    for svg in (
        plots.losses(curves([1.0, 2.0]), name="mine"),
        plots.distances(curves([1.0, 0.0]), name="mine", drift=[1.0]),
        plots.throughput([plots.Bars(label="a", rates={"m": (1.0, 1.0, 1.0)}, text={"m": "1"})], name="mine"),
    ):
        root = ElementTree.fromstring(svg)
        assert all(i.startswith("mine-") for i in (e.get("id") for e in root.iter()) if i)
        assert plots.INK not in svg
        assert "DejaVu" not in svg
        assert "<style" not in svg
        assert "metadata" not in svg
        assert "currentColor" in svg
        dark = [c for c in re.findall(r"(?:fill|stroke): (#\w+)", svg) if c not in plots.COLOURS]
        assert not dark, "ink of its own would vanish on a dark page"
        assert root.get("role") == "img"
        assert [e.tag.rpartition("}")[2] for e in root][:2] == ["title", "desc"]


def test_labels_are_not_formulas_and_not_left_out() -> None:
    labels = ["$\\frac{1}{2}$", "_hidden", "a\nb", "x" * 200, "日本語"]
    svg = plots.losses([plots.Curve(label=x, values=[1.0, 2.0], style=0) for x in labels], name="x")
    texts = [t.text for t in ElementTree.fromstring(svg).iter() if t.tag.endswith("}text")]
    assert {"$\\frac{1}{2}$", "_hidden", "a b", "x" * 55 + "…", "日本語"} <= set(texts)


def test_plots_do_not_depend_on_the_users_settings() -> None:
    import matplotlib

    plain = plots.losses(curves([1.0, 2.0]), name="x")
    with matplotlib.rc_context({"text.color": "red", "font.family": "monospace", "axes.grid": True, "font.size": 30}):
        assert plots.losses(curves([1.0, 2.0]), name="x") == plain
        assert matplotlib.rcParams["font.size"] == 30, "and leave them as they are"


def test_more_stacks_than_colours_still_differ() -> None:
    styles = [plots.look(curve) for curve in curves(*[[1.0, 2.0]] * 30)]
    assert len({(s["color"], s["linestyle"]) for s in styles}) == 30


def test_reading_records_and_printing_tables_loads_no_matplotlib_and_no_pyplot_ever() -> None:
    code = (
        "import sys; from portnet.report import page, plots, table; assert 'matplotlib' not in sys.modules;"
        "plots.losses([plots.Curve(label='a', values=[1.0], style=0)], name='x');"
        "assert 'matplotlib.pyplot' not in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def contrast(one: str, other: str) -> float:
    """Contrast as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    blocks = re.findall(r":root \{([^}]*)\}", page.render([]))
    themes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in blocks]
    assert len(themes) == 3, "light, dark, print"
    for theme in themes:
        for name in ("ink", "faint", "good", "fair", "bad", "link"):
            assert contrast(theme[name], theme["paper"]) >= 4.5, name
            assert contrast(theme[name], theme["tint"]) >= 4.5, name
        for colour in plots.COLOURS:
            assert contrast(colour, theme["paper"]) >= 3, colour
