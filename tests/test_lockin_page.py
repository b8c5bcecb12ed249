"""The lock-in page as text: what it says, what it was computed from, and that no record can do it harm."""

import base64
import hashlib
import html as html_module
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import reported
import simulated
from reported import BACKENDS, HOSTILE, assessed
from test_report import Page, contrast

from portnet import reporting
from portnet.assess import assess
from portnet.errors import InputError
from portnet.record import SCHEMA, Record
from portnet.report import lockin_page, plots, values

HTML = lockin_page.render(assessed())


def text_of(html: str) -> str:
    """What a reader sees, without the script and the style."""
    html = re.sub(r"<(script|style|title)\b.*?</\1>", " ", html, flags=re.S)
    return " ".join("".join(Page(html).text).split())


def section(html: str, name: str) -> str:
    return re.search(rf'<section id="{name}".*?</section>', html, flags=re.S)[0]


def rows(html: str) -> dict[str, list[str]]:
    """The rows of a part of the page by their headings, of which each begins with another."""
    return {row[0]: row[1:] for row in Page(html).rows}


def card(platform: str) -> str:
    """The verdict on a platform."""
    cards = re.findall(r'<article class="card .*?</article>', HTML, flags=re.S)
    return next(c for c in cards if f"<span>{platform}</span>" in c)


def test_the_page_reads_in_order() -> None:
    found = re.findall(r"<h2 [^>]*>(.*?)</h2>", HTML)
    assert found == [
        "The verdict",
        "The stack, layer by layer",
        "What works",
        "Speed and efficiency",
        "Serving: latency, throughput, memory",
        "Several devices: training in one process and in more",
        "Cost",
        "Every stack",
        "Performance portability",
        "Roofline, layer by layer",
        "Numbers: how far from the reference",
        "What each library is worth",
        "Time to the first step",
        "Measurements, records and environments",
        "What was left out",
    ]
    levels = [int(level) for level in re.findall(r"<h(\d)\b", HTML)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), "no level is left out"


def test_the_first_screen_answers_with_the_deciding_figures() -> None:
    text = text_of(HTML)
    words = {v.platform: v.word for v in assessed().verdicts} | {"tpu": "not measured"}
    answer = re.search(r"Lock-in to CUDA is (.*?)\.", text)[1]
    told = {part.partition(" against ")[0]: part.partition(" against ")[2] for part in answer.split("; ")}
    for platform, word in words.items():
        assert platform in re.split(", | and ", told[word])
    told = text_of(card("rocm"))
    value = next(a for a in assessed().against if (a.platform, a.problem.mode) == ("rocm", "train")).efficiency
    assert f"{value.figure:.3f}×" in told
    assert f"{value.low:.3f} to {value.high:.3f}×" in told
    assert words["rocm"] in told
    assert "high lock-in" in text_of(card("xpu"))
    assert "not side by side" in told
    assert "tpu: not measured." in text
    assert "wrong: norm1 is 40 times as far" in text_of(section(HTML, "verdict"))


def test_the_bars_are_to_scale() -> None:
    bars = re.findall(r'<i style="width: ([\d.]+)%"></i>', section(HTML, "verdict"))
    seen = [v.figure for one in sorted(assessed().verdicts, key=lambda v: v.platform) for _, v in one.deciding]
    assert [float(b) for b in bars] == pytest.approx([80 * f for f in seen if f is not None], abs=0.01)


def test_every_layer_has_a_figure_or_says_not_measured() -> None:
    found = rows(section(HTML, "stack"))
    layers = ["application", "framework", "libraries", "runtime", "interconnect", "silicon"]
    assert [next(name for name in found if name.startswith(layer)) for layer in layers] == list(found)[1:]
    assert all(cells[-1] == "not measured" for name, cells in found.items() if name != "Layer"), "of tpu"
    libraries = next(cells for name, cells in found.items() if name.startswith("libraries"))
    assert libraries[0].startswith("12.1×")
    assert libraries[1:] == ["not measured"] * 4


def test_the_outcome_matrix() -> None:
    found = rows(section(HTML, "outcomes"))
    assert found["Feature"] == ["cuda home", "mps", "rocm", "xpu", "tpu"]
    words = [re.sub(r"reason \d+$", "", cell.split(" ", 1)[1]) for cell in found["Inference: eager, bfloat16"]]
    assert words == ["works", "partial", "works", "wrong", "not measured"]
    text = text_of(section(HTML, "outcomes"))
    assert "aten::local_response_norm" in text
    assert "norm1 is 40 times as far from the reference as allowed" in text
    for number in re.findall(r'href="#why-(\d+)"', HTML):
        assert f'id="why-{number}"' in HTML


def test_every_figure_has_an_interval_or_says_why_not() -> None:
    """In the tables whose figures have intervals, each measured cell is followed by one or by a reason."""
    cells = re.findall(r"<td[^>]*>\s*(<span class=\"value\".*?)</td>", HTML, flags=re.S)
    assert len(cells) > 80
    numbers = section(HTML, "numbers")
    for cell in cells:
        told = re.findall(r"<small[^>]*>(.*?)</small>", html_module.unescape(cell))
        if cell in numbers:
            assert "A maximum has no interval" in numbers
        else:
            assert told, cell
            assert any(re.search(r"\d to |no interval|home's best|unsupported", t) for t in told), told


def test_figures_name_the_measurements_behind_them() -> None:
    targets = set(re.findall(r'<tr id="m(\d+)">', HTML))
    cited = set(re.findall(r'href="#m(\d+)"', HTML))
    assert cited
    assert cited <= targets
    listed = re.findall(r"<code>([0-9a-f]{64})</code>", section(HTML, "measurements"))
    assert sorted(listed) == sorted({r.digest for r in assessed().records})
    # The number leads to the stack that the figure is of.
    head = re.search(r"<th scope=\"row\">rocm/<wbr>eager/<wbr>bfloat16.*?href=\"#m(\d+)\"", section(HTML, "stacks"))
    row = re.search(rf'<tr id="m{head[1]}">.*?</tr>', HTML, flags=re.S)[0]
    assert "rocm/<wbr>eager/<wbr>bfloat16" in row
    entry = next(e for e in assessed().entries if e.stack == "rocm/eager/bfloat16" and e.problem.mode == "train")
    assert all(digest in row for digest in entry.rate.records)
    # And a figure's numbers to exactly the records that it was computed from.
    value = next(a for a in assessed().against if (a.platform, a.problem.mode) == ("rocm", "train")).throughput
    cell = card("rocm")[card("rocm").index("Throughput") :].partition("</dd>")[0]
    told = []
    for number in re.findall(r'href="#m(\d+)"', cell):
        told += re.findall("<code>(.*?)</code>", re.search(rf'<tr id="m{number}">.*?</tr>', HTML, flags=re.S)[0])
    assert sorted(told) == sorted(value.records)
    title = re.search(r'title="computed from 6 records: ([^"]*)"', HTML)[1]
    assert all(any(d.startswith(short) for d in listed) for short in title.split(", "))


def test_quick_stands_at_every_quick_figure() -> None:
    made = [replace(r, spec=replace(r.spec, quick=True)) for r in reported.four_vendors()]
    html = lockin_page.render(assess(made, prices=reported.PRICES))
    measured = re.findall(r'<span class="value"[^>]*>[^<]*</span>([^\n]*)', html)
    assert len(measured) > 80
    # A zero for what is unsupported is known however few samples there were.
    assert all('<b class="quick">' in after for after in measured if "unsupported" not in after)
    assert 'class="quick">quick</b> Figures with this mark' in html
    assert "quick</b>" not in HTML
    for name in ("against", "rates", "latency"):
        labels = "".join(re.findall(rf"<svg[^>]*{name}-title.*?</svg>", html, flags=re.S))
        assert labels.count("quick") > 2, name


@pytest.mark.parametrize("gone", BACKENDS)
def test_what_is_taken_away_is_not_measured_and_never_zero(gone: str) -> None:
    made = [r for r in reported.four_vendors() if r.spec.backend != gone]
    html = lockin_page.render(assess(made, platforms=reported.PLATFORMS, prices=reported.PRICES))
    for name in ("stack", "portability"):
        table = Page(section(html, name)).rows
        head = next(row for row in table if row[0] in ("Layer", "Problem") and gone in row)
        column = head.index(gone)
        cells = [row[column] for row in table[table.index(head) + 1 :] if len(row) == len(head)]
        assert cells
        assert set(cells) == {"not measured"}
    if gone == "cuda":
        assert "CUDA was not measured" in text_of(html)
        assert "0×" not in text_of(section(html, "stacks"))


def test_without_home_the_page_compares_the_stacks_on_one_chip() -> None:
    html = lockin_page.render(reported.without_home())
    text = text_of(html)
    assert "CUDA was not measured, so what leaving it would cost cannot be told" in text
    first = section(html, "verdict")
    assert "The stacks on one chip" in first
    assert "<h3>Simulated chip</h3>" in first
    train, infer = (Page(table).rows for table in re.findall(r"<table>.*?</table>", first, flags=re.S))
    for table in (train, infer):
        stacks = [row[0] for row in table[1:]]
        assert stacks[0].startswith("mps/compile/bfloat16")
        assert table[1][3] == "the fastest"
        share = float(re.match(r"([\d.]+)×", table[2][3])[1])
        assert share == pytest.approx(0.7, rel=0.03), "by the rounds that both were in"
        assert "different" in table[2][3]
        assert re.search(r"[\d.]+ to [\d.]+×", table[2][3])
    assert 'class="card' not in html.partition("</style>")[2]


def test_stacks_that_were_never_side_by_side_have_no_ratio() -> None:
    made = [r for r in reported.four_vendors() if r.spec.backend in ("mps", "rocm")]
    made = [replace(r, device={**r.device, "name": "one"}) for r in made]
    first = section(lockin_page.render(assess(made)), "verdict")
    assert "not timed side by side" in text_of(first)


def test_a_device_that_is_not_there_is_named_once_and_has_no_column() -> None:
    absent = [
        Record(spec=simulated.spec("xpu", mode=mode), outcome="not available", reason="built without XPU")
        for mode in ("train", "infer")
    ]
    made = [r for r in reported.four_vendors() if r.spec.backend != "xpu"]
    html = lockin_page.render(assess([*made, *absent]))
    assert "xpu: not available where the records were made" in text_of(section(html, "verdict"))
    assert "built without XPU" in text_of(section(html, "verdict"))
    for name in ("stack", "outcomes", "speed", "stacks", "numbers", "cost"):
        assert "xpu" not in text_of(section(html, name)), name
    assert "not measured: xpu" not in text_of(section(html, "speed"))
    assert "xpu/eager/bfloat16" in text_of(section(html, "measurements"))


def test_home_alone_has_nothing_to_be_left_for() -> None:
    made = [r for r in reported.four_vendors() if r.spec.backend == "cuda"]
    assert "there is no platform to leave it for" in text_of(lockin_page.render(assess(made)))


def test_what_is_not_there_is_said_in_each_place() -> None:
    made = simulated.records(simulated.spec("cuda"), rounds=1)
    made = [replace(r, layers={}, ceilings={}, times={}, gates={}) for r in made]
    text = text_of(lockin_page.render(assess(made)))
    for part in (
        "no record is of serving",
        "Navigation chart, not measured: code divergence was not given",
        "no record holds single layers’ times",
        "Loss curves, not measured",
        "no record is of a stack with a layer taken away",
        "no record holds the time from the start",
        "Nothing that was given was left out",
    ):
        assert part in text, part


def test_pp_of_an_unsupported_platform_is_zero_and_says_so() -> None:
    table = Page(section(HTML, "portability")).rows
    row = next(r for r in table if r[0].startswith("inference, bfloat16") and "measured ceiling" in r[0])
    assert row[1].startswith("0")
    assert "unsupported: xpu" in row[1]
    assert row[2].startswith("0.52")
    train = next(r for r in table if r[0].startswith("training, bfloat16") and "measured ceiling" in r[0])
    assert train[1] == "not measured xpu, tpu"


def test_throughput_within_the_bound_counts_what_an_answer_took() -> None:
    def most(longest: float, p99: float = 0.002) -> str:
        made = []
        for record in reported.four_vendors():
            if record.serving:
                sweep = {b: {**t, "latencies": [longest * int(b) ** 0.9]} for b, t in record.serving["sweep"].items()}
                record = replace(record, serving={**record.serving, "p99": p99, "sweep": sweep})
            made.append(record)
        html = section(lockin_page.render(assess(made)), "serving")
        return next(row[4] for row in Page(html).rows if row[0].startswith("cuda/eager"))

    assert "batch 256" in most(0.0003)
    assert "batch 16" in most(0.003)
    assert most(1.0).startswith("not measured")
    assert most(0.0003, p99=0.2).startswith("not measured"), "as a single image is answered too late"


def test_a_device_that_is_there_and_offers_nothing_is_no_absent_one() -> None:
    """Its software is lost, which its card says; an absent device says nothing of its software."""
    ours = [r for r in reported.four_vendors() if r.spec.backend in ("cuda", "reference")]
    lacks = [
        *simulated.failed(simulated.spec("xpu", mode="train"), "not available", "xpu does not train"),
        *simulated.failed(simulated.spec("xpu", mode="serve", batch=1), "wrong", "norm1 is too far off"),
    ]
    for made in ([*ours, lacks[0]], [*ours, lacks[1]]):
        html = lockin_page.render(assess(made))
        assert "high lock-in" in section(html, "verdict")
        assert "says nothing of its software" not in html
    html = lockin_page.render(assess([*ours, replace(lacks[0], device={})]))
    assert "xpu: not available</b> where the records were made, which says nothing of its software. xpu: xpu" in html
    html = lockin_page.render(assess([*ours, replace(lacks[0], device={}, outcome="not measured")]))
    assert "says nothing of its software" not in html


def test_the_first_screen_compares_backends_before_stacks_of_one() -> None:
    """On one chip: two backends in float32, and more stacks, of one backend, in bfloat16."""
    made = []
    for backend, how in (
        ("mps", {"precision": "float32"}),
        ("xpu", {"precision": "float32"}),
        *(("mps", {"engine": engine}) for engine in ("eager", "compile", "graph")),
    ):
        timed = simulated.records(simulated.spec(backend, **how), series="chip")
        made += [replace(r, device={**r.device, "name": "Simulated chip"}) for r in timed]
    html = lockin_page.render(assess(made))
    first = section(html, "verdict")
    assert "xpu/" in first
    assert "inference, float32, batch 128" in first.lower()
    assert "1 more problems of inference on Simulated chip on the first screen" in html


def test_the_first_step_is_of_a_stack_that_works_with_empty_caches() -> None:
    quick = {"start": 0.1, "probe": 0.1, "open": 0.1, "first_step": 0.1, "total": 0.4}
    wrong = simulated.failed(simulated.spec("cuda", engine="compile"), "wrong", "x")
    warm = simulated.records(simulated.spec("cuda", engine="graph"), rounds=1)
    made = [*reported.four_vendors(), replace(wrong[0], times=quick)]
    made.append(replace(warm[0], times=quick, environment={**warm[0].environment, "cold_caches": False}))
    row = next(r for r in Page(section(lockin_page.render(assess(made)), "start")).rows if r[0].startswith("cuda"))
    assert row[0].startswith("cuda/eager/bfloat16")
    assert "4.00 s" in row


def test_every_plot_has_its_data_and_saves() -> None:
    figures = re.findall(r"<figure>.*?</figure>", HTML, flags=re.S)
    names = []
    for figure in figures:
        assert figure.count("<svg") == 1
        assert "<details>" in figure
        assert len(Page(figure).rows) > 1
        assert re.findall(r'data-save="(\w+)"', figure) == ["svg", "png"]
        names += re.findall(r'data-save="svg" data-name="([\w-]+)"', figure)
    assert len(set(names)) == len(names)
    wanted = {"against-home", "throughput", "latency", "sweep", "cascade", "navigation", "roofline-1", "losses-1"}
    assert wanted | {"losses-2", "ablation-1", "first-step"} <= set(names)


def test_ids_are_unique_and_labels_point_at_something() -> None:
    page = Page(HTML)
    ids = Counter(a["id"] for _, a in page.elements if a.get("id"))
    assert not [i for i, n in ids.items() if n > 1]
    for _, attributes in page.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= set(ids)
        href = attributes.get("href") or ""
        assert not href.startswith("#") or href[1:] in ids, href


def test_nothing_is_loaded_and_one_script_may_run() -> None:
    page = Page(HTML)
    policy = page.all("meta")[3]["content"]
    (script,) = re.findall(r"<script>(.*?)</script>", HTML, flags=re.S)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe-inline'" not in policy.replace("style-src 'unsafe-inline'", "")
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "object", "embed", "base", "img")
        assert not [a for a in attributes if a.startswith("on")]
        assert not attributes.get("src")
        href = attributes.get("href") or attributes.get("xlink:href") or "#"
        assert href.startswith(("#", "data:,")), href
    assert not re.findall(r"url\((?!#)", HTML)
    assert not re.findall("https?:", HTML.replace("http://www.w3.org/2000/svg", ""))


def test_equal_assessments_give_an_equal_page(tmp_path: Path) -> None:
    assert lockin_page.render(assessed()) == HTML
    path = lockin_page.write(assessed(), tmp_path / "report.html")
    assert path.read_text(encoding="utf-8") == HTML


def test_contrast() -> None:
    blocks = re.findall(r":root \{([^}]*)\}", HTML)
    themes = [dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in blocks]
    assert len(themes) == 3, "light, dark, print"
    for theme in themes:
        for name in ("ink", "faint", "good", "fair", "bad", "link"):
            assert contrast(theme[name], theme["paper"]) >= 4.5, name
            assert contrast(theme[name], theme["tint"]) >= 4.5, name
        assert contrast(theme["mark"], theme["paper"]) >= 3
        for colour in plots.COLOURS:
            assert contrast(colour, theme["paper"]) >= 3, colour


# Hostile records


def test_markup_in_records_stays_text() -> None:
    page = Page(lockin_page.render(assess(reported.hostile())))
    ours = Page(HTML)
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in ours.elements}
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    text = "".join(page.text)
    assert HOSTILE[:40] in text
    assert "{{ 7*7 }}" in text, "no template of its own"
    assert not [c for c in text if c in "\x1b\x00\ud800\N{RIGHT-TO-LEFT OVERRIDE}"]


def test_hostile_problems_and_divergence_stay_text() -> None:
    lines = {"platforms": {HOSTILE: {"lines": 1, "own": 1, "shared": 0}}, "convergence": 0.5, "notes": [HOSTILE]}
    made = replace(assessed(), problems=[HOSTILE], divergence=lines, missing=(HOSTILE,), currency=HOSTILE)
    page = Page(lockin_page.render(made))
    assert len(page.all("script")) == 1
    assert not page.all("img")


def test_enormous_and_tiny_numbers() -> None:
    made = []
    for record in reported.four_vendors():
        seconds = [1e-9] if record.spec.backend == "cuda" else [1e12]
        timed = {m: {"batch": 2**53, "steps": 2**53, "seconds": seconds} for m in record.samples}
        layers = {n: {**x, "flops": 1e300, "bytes": 1e-300, "forward": 1e300} for n, x in record.layers.items()}
        made.append(
            replace(
                record,
                samples=timed,
                layers=layers,
                times=dict.fromkeys(record.times, 1e300),
                ceilings={"flops": 1e30, "bandwidth": 1e-9} if record.ceilings else {},
                training={"losses": [1e300, -1e300, 0.0]} if record.training else {},
                device={**record.device, "memory": 2**63 - 1},
            )
        )
    html = lockin_page.render(assess(made, prices=reported.PRICES))
    page = Page(html)
    assert not re.search(r"\bnan\b|\binf\b", " ".join(re.findall(r' (?:d|x|y|points|style)="([^"]*)"', html)))
    assert max(len(word) for word in " ".join(page.text).split() if re.fullmatch(r"[\d,.e+×%-]+", word)) < 40


def test_a_text_without_end_is_cut_and_that_is_said() -> None:
    long = "x" * 100_000
    made = [replace(r, device={**r.device, "name": long}, reason=long) for r in reported.four_vendors()]
    html = lockin_page.render(assess(made))
    assert "letters more)" in html
    assert len(html) < 3_000_000


def test_thousands_of_samples_do_not_make_the_page_longer() -> None:
    def page(samples: int, steps: int) -> str:
        made = [
            replace(
                r,
                samples={m: {**t, "seconds": [1.0] * samples} for m, t in r.samples.items()},
                training={"losses": [n * 37 % 11 / 10 for n in range(steps)]} if r.training else {},
            )
            for r in reported.four_vendors()
        ]
        return lockin_page.render(assess(made))

    short, long = page(30, 60), page(5000, 5000)
    assert len(long) < len(short) + 300_000
    assert "200 of 5,000 steps" in long


def test_records_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    folder, other = tmp_path / "records", tmp_path / "copy"
    for record in reported.four_vendors():
        record.write(folder)
    twice = reported.four_vendors()[1].write(other)

    def put(text: str) -> Path:
        path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        path.write_text(text)
        return path

    nan = put(reported.four_vendors()[1].to_json().replace('"probe": 0.5', '"probe": NaN'))
    unknown = put('{"schema": "portnet.record/99"}')
    (folder / "hello.json").write_text("{}")
    damaged = folder / f"{'0' * 64}.json"
    damaged.write_text("{}")
    seen = reporting.report([folder, other])
    assert seen.refused == 4
    assert len(seen.assessment.records) == len(reported.four_vendors()), "what is there twice counts once"
    html = reporting.written(seen, "html")
    text = text_of(section(html, "left-out"))
    for path, why in ((nan, "got nan"), (unknown, "portnet.record/99"), (damaged, "damaged"), (twice, "counts once")):
        assert path.name in text
        assert why in text
    assert "hello.json is foreign" in text
    assert "Left out: 5" in text_of(html)
    assert SCHEMA in text


def test_five_hundred_records_make_a_page_of_bounded_size() -> None:
    seen = assess(reported.many(500))
    html = lockin_page.render(seen)
    assert len(html) < 4_000_000
    assert 5 <= html.count("<svg") <= 20
    assert len(re.findall("<tr data-mode=", html)) == len(seen.entries) == 500
    assert "To stay readable, this page does not show" in html


def test_reference_records_are_labelled() -> None:
    shipped = frozenset(r.digest for r in reported.four_vendors() if r.spec.backend == "cuda")
    assert "reference records that PortNet ships" in lockin_page.render(assessed(), references=shipped)
    assert "reference records that PortNet ships" not in HTML


# Words


@pytest.mark.parametrize(
    ("value", "kind", "told"),
    [
        (0.49943, "multiple", "0.499×"),
        (12.135, "multiple", "12.1×"),
        (0.6, "share", "60.0%"),
        (1.0, "share", "100%"),
        (182451.07, "rate", "182,451"),
        (1e25, "rate", "1.00e+25"),
        (4e14, "FLOP/s", "400 TFLOP/s"),
        (999.6e12, "FLOP/s", "1.00 PFLOP/s"),
        (999.4e12, "FLOP/s", "999 TFLOP/s"),
        (5e10, "bytes/s", "50.0 GB/s"),
        (1 << 30, "bytes", "1.00 GiB"),
        (0.0012, "seconds", "1.20 ms"),
        (0.0, "seconds", "0 s"),
        (4095.999999, "count", "4,096"),
        (1e-3, "error", "1.0e-03"),
        (0.25, "joules", "250 mJ"),
        (float("inf"), "multiple", "not finite"),
    ],
)
def test_numbers_in_words(value: float, kind: str, told: str) -> None:
    assert values.number(value, kind) == told


def test_money_has_its_currency_once() -> None:
    told = values.tell(values.Value(figure=2.0, low=1.98, high=2.03), "money", currency="EUR")
    assert told.line == "EUR 2.00 (1.98 to 2.03)"


def test_references_of_no_device_are_refused() -> None:
    with pytest.raises(InputError, match="there are none so far"):
        reporting.report([], references=["nvidia-h200"])
