"""The report as JSON, CSV, Markdown and terminal text, and the command that writes them."""

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import reported
from click.testing import CliRunner, Result
from reported import HOSTILE, assessed
from rich.console import Console

from portnet import assessment, cli, reporting
from portnet.assess import assess
from portnet.assessment import Value
from portnet.errors import InputError
from portnet.report import formats

TOLD = json.loads(formats.to_json(assessed()))


WORDS = {v.platform: v.word for v in assessed().verdicts}
AGAINST = next(a for a in assessed().against if (a.platform, a.problem.mode) == ("rocm", "train")).throughput
TIMES, ENDS = f"{AGAINST.figure:.3f}×", f"{AGAINST.low:.3f} to {AGAINST.high:.3f}×"
ANSWER = formats.answer(assessed())


def numbers(held: Any) -> Iterator[float]:
    if isinstance(held, dict):
        held = list(held.values())
    if isinstance(held, list):
        for x in held:
            yield from numbers(x)
    elif isinstance(held, float):
        yield held


def test_json_holds_every_figure_with_its_records() -> None:
    entry = next(e for e in TOLD["entries"] if (e["stack"], e["problem"]["mode"]) == ("rocm/eager/bfloat16", "train"))
    ours = next(e for e in assessed().entries if e.stack == entry["stack"] and e.problem.mode == "train")
    assert entry["relative"] == {
        "figure": ours.relative.figure,
        "low": ours.relative.low,
        "high": ours.relative.high,
        "why": None,
        "note": "not side by side",
        "records": list(ours.relative.records),
    }
    known = set(TOLD["records"])
    assert known == {r.digest for r in assessed().records}
    assert set(entry["relative"]["records"]) <= known
    wrong = next(e for e in TOLD["entries"] if e["outcome"] == "wrong")
    assert wrong["rate"]["figure"] is None
    assert wrong["rate"]["why"].startswith("wrong: norm1")
    assert TOLD["outcomes"]["cells"]["infer: eager, bfloat16"]["mps"]["outcome"] == "partial"
    assert TOLD["missing"] == ["tpu"]
    assert {v["platform"]: v["verdict"] for v in TOLD["verdicts"]} == WORDS


def test_the_answer_groups_platforms_by_their_verdicts_the_worst_first() -> None:
    order = [part.partition(" against ")[0] for part in ANSWER.split("; ")]
    assert order == [word for word in formats.VERDICTS if word in {*WORDS.values(), "not measured"}]
    for platform, word in {**WORDS, "tpu": "not measured"}.items():
        part = next(p for p in ANSWER.split("; ") if p.startswith(f"{word} against"))
        assert platform in re.split(r"[, ]+", part)


def test_json_leaves_no_field_of_an_assessment_out() -> None:
    """Were a field added to what a report shows, this says that JSON lacks it."""
    assert set(TOLD) - {"schema", "quick"} == {f.name for f in fields(assessment.Assessment)}
    assert TOLD["schema"] == "portnet.report/1"
    entry = {f.name for f in fields(assessment.Entry)} - {"figure", "closed"}
    assert entry <= set(TOLD["entries"][0])
    for name, of in (("serving", assessment.Serving), ("costs", assessment.Cost), ("numerics", assessment.Numerics)):
        assert set(TOLD[name][0]) == {f.name for f in fields(of)}


def test_json_documents_its_fields() -> None:
    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    for name in TOLD:
        assert f"`{name}`" in text, name
    for name in formats.COLUMNS:
        base = re.sub("_(low|high|note)$", "", name)
        assert f"`{base}`" in text, base


def test_json_has_no_number_that_is_none() -> None:
    entry = replace(assessed().entries[0], rate=Value(figure=math.nan, low=-math.inf, high=math.inf, records=("ab",)))
    text = formats.to_json(replace(assessed(), entries=[entry], latency=math.inf))
    assert not re.search(r"\b(NaN|Infinity)\b", text)
    held = json.loads(text)
    rate = held["entries"][0]["rate"]
    assert (rate["figure"], rate["low"], rate["high"], rate["records"]) == (None, None, None, ["ab"])
    assert rate["why"]
    assert held["latency"] is None
    assert all(map(math.isfinite, numbers(held)))


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO(text), strict=True))


def test_csv_has_a_row_for_each_stack_and_problem() -> None:
    found = read_csv(formats.csv(assessed()))
    assert tuple(found[0]) == formats.COLUMNS
    assert len(found) == len(assessed().entries)
    for row, entry in zip(found, assessed().entries, strict=True):
        assert row["stack"] == entry.stack
        assert row["outcome"] == entry.figure.outcome
        assert row["records"].split() == [r.digest for r in entry.figure.records]
        if entry.rate.figure is None:
            assert row["rate"] == row["rate_low"] == "", "never zero"
            assert row["rate_note"] == entry.rate.why
        else:
            assert float(row["rate"]) == entry.rate.figure
            assert float(row["rate_high"]) == entry.rate.high


def test_csv_holds_no_formula() -> None:
    made = [replace(r, device={**r.device, "name": f"=1+1 {r.spec.backend}"}) for r in reported.four_vendors()]
    found = read_csv(formats.csv(assess(made)))
    cells = [cell for row in found for cell in row.values()]
    assert any(cell.startswith("'=1+1") for cell in cells)
    assert not [cell for cell in cells if cell.startswith(("=", "+", "@"))]
    assert len(read_csv(formats.csv(assess(reported.hostile())))) == len(assess(reported.hostile()).entries)


def test_markdown_holds_the_verdict_and_the_tables() -> None:
    text = formats.markdown(assessed())
    assert f"Lock-in to CUDA: {ANSWER}." in text
    assert "### xpu: high lock-in" in text
    heads = re.findall(r"^## (.*)$", text, flags=re.M)
    assert heads[:3] == ["The verdict", "The stack, layer by layer", "What works"]
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
    assert "0.437× (0.428 to 0.445×)" in text
    assert all(r.digest in text for r in assessed().records)


def test_markdown_of_hostile_records_holds_neither_html_nor_links() -> None:
    text = formats.markdown(assess(reported.hostile(), problems=[HOSTILE]))
    assert "<" not in text
    assert not re.search(r"(?<!\\)\[x\]?(?<!\\)\]\(", text)
    assert "\x1b" not in text
    rows = {len(re.findall(r"(?<!\\)\|", x)) for x in text.partition("## Every stack")[2].splitlines()[2:8]}
    assert len(rows) == 1


def printed(seen: assessment.Assessment, width: int = 80) -> str:
    file = StringIO()
    console = Console(file=file, width=width)
    for one in formats.summary(seen):
        console.print(one, highlight=False, markup=False)
    return file.getvalue()


def test_the_terminal_shows_verdicts_figures_and_pp() -> None:
    text = printed(assessed())
    assert max(map(len, text.splitlines())) <= 80
    assert f"Lock-in to CUDA: {ANSWER}" in " ".join(text.split())
    rocm = text[text.index("rocm") :]
    assert re.search(rf"{WORDS['rocm']} +100% +0\.437× +0\.437×", rocm)
    assert "0.428 to 0.445×" in text
    assert re.search(r"infer, bfloat16, batch 128 +0 +0\.52\d", text)
    assert "not measured" in text
    assert "quick" not in text


def test_the_terminal_says_quick_and_what_is_missing() -> None:
    made = [replace(r, spec=replace(r.spec, quick=True)) for r in reported.four_vendors()]
    text = printed(assess(made))
    assert "fewer samples" in text
    assert text.count("quick") > 5
    text = printed(reported.without_home())
    assert "CUDA was not measured" in text
    assert "mps/compile/bfloat16" in text


def test_the_terminal_obeys_no_record() -> None:
    text = printed(assess(reported.hostile()), 200)
    assert "\x1b" not in text
    assert "\N{RIGHT-TO-LEFT OVERRIDE}" not in text
    assert "<script>" in text


# The command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for record in reported.four_vendors():
        record.write(tmp_path / "records")
    return tmp_path / "records"


def run(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "80"}).invoke(cli.main, ["report", *map(str, arguments)])


def test_one_command_gives_the_page_and_a_summary(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    done = run(folder, "--platforms", "cuda, rocm,tpu", "-o", out)
    assert done.exit_code == 0, done.output
    assert f"{WORDS['rocm']} against rocm" in done.output
    assert str(out) in done.output
    page = out.read_text(encoding="utf-8")
    assert "What would leaving CUDA cost?" in page
    assert "tpu: not measured" in page
    assert ">mps<" not in page


@pytest.mark.parametrize(
    ("name", "form", "starts"),
    [("r.md", None, "# What"), ("r.json", None, "{"), ("r.csv", None, "platform,"), ("r.txt", "json", "{")],
)
def test_formats_by_suffix_and_by_name(folder: Path, tmp_path: Path, name: str, form: str | None, starts: str) -> None:
    done = run(folder, "-o", tmp_path / name, *(("--format", form) if form else ()))
    assert done.exit_code == 0, done.output
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(starts)


def test_without_a_file_a_format_goes_to_the_terminal_alone(folder: Path) -> None:
    done = run(folder, "--format", "json")
    assert json.loads(done.stdout)["home"] == "cuda"
    assert run(folder).stdout.startswith("Lock-in to CUDA")


def test_prices_latency_home_and_divergence_reach_the_report(folder: Path, tmp_path: Path) -> None:
    prices, lines = tmp_path / "prices.toml", tmp_path / "lines.json"
    prices.write_text('currency = "EUR"\n[hour]\ncuda = 3.6\n')
    lines.write_text(json.dumps(reported.DIVERGENCE))
    done = run(
        folder, "--prices", prices, "--latency", "30ms", "--home", "rocm", "--divergence", lines, "--format", "json"
    )
    held = json.loads(done.stdout)
    assert (held["home"], held["latency"], held["currency"]) == ("rocm", 0.03, "EUR")
    assert held["divergence"]["convergence"] == 0.88
    application = next(layer for layer in held["stack"] if layer["name"] == "application")
    assert application["values"]["rocm"]["figure"] == 133
    cost = next(c for c in held["costs"] if c["stack"] == "cuda/eager/bfloat16")
    assert cost["million"]["note"].startswith("batch 256")


def test_a_refused_record_is_named_and_the_others_are_used(folder: Path, tmp_path: Path) -> None:
    (folder / "hello.json").write_text("{}")
    done = run(folder, "-o", tmp_path / "r.html")
    assert done.exit_code == 1
    assert "hello.json is foreign" in done.stderr
    assert "hello.json is foreign" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "no records were named"),
        (("--latency", "3"), "no time"),
        (("--latency", "0ms"), "no time"),
        (("--latency", "-1s"), "no time"),
        (("--platforms", "cuda,,rocm"), "empty name"),
        (("--reference", "nvidia-h200"), "none so far"),
        (("-o", "r.txt"), "give --format"),
        (("--home", "cuda", "nowhere"), "does not exist"),
    ],
)
def test_mistakes_exit_with_2(folder: Path, arguments: tuple[str, ...], told: str) -> None:
    given = (folder, *arguments) if arguments and arguments[0] != "--reference" else arguments
    done = run(*given)
    assert done.exit_code == 2
    assert told in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"platforms": []}',
        '{"platforms": {"cuda": 3}}',
        '{"platforms": {"cuda": {"lines": "x", "own": 1}}}',
        '{"platforms": {"cuda": {"lines": NaN, "own": 1}}}',
        '{"platforms": {"cuda": {"lines": 1, "own": -1}}}',
        '{"platforms": {}, "convergence": NaN}',
        '{"platforms": {}, "convergence": 2}',
        '{"platforms": {}, "distances": [{"distance": "x"}]}',
    ],
)
def test_a_divergence_that_makes_no_sense_is_refused(folder: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "lines.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"lines\.json"):
        reporting.report([folder], divergence=path)


def test_lines_of_one_backend_alone_are_not_its_own(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    told = {"platforms": {"cuda": {"lines": 10, "own": None, "shared": None}}, "divergence": None, "convergence": None}
    path.write_text(json.dumps({**told, "notes": ["not measured: of one backend"]}))
    seen = reporting.report([folder], divergence=path).assessment
    assert next(layer for layer in seen.stack if layer.name == "application").values["cuda"].figure is None


def test_shipped_records_are_taken_by_their_devices_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "results" / "simulated-cuda"
    shipped.mkdir(parents=True)
    for record in reported.four_vendors():
        if record.spec.backend == "cuda":
            path = record.write(shipped)
            (folder / path.name).unlink()
    monkeypatch.setattr(reporting, "RESULTS", tmp_path / "results")
    assert reporting.report([folder]).assessment.home is None
    seen = reporting.report([folder], references=["simulated-cuda"])
    assert seen.assessment.home == "cuda"
    assert "reference records that PortNet ships" in reporting.written(seen, "html")
    with pytest.raises(InputError, match="those of simulated-cuda"):
        reporting.report([folder], references=["other"])


def test_no_record_at_all_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "hello.json").write_text("{}")
    with pytest.raises(InputError, match="no record could be read"):
        reporting.report([tmp_path])


def test_a_name_that_nothing_has_is_told_with_its_like(tmp_path: Path) -> None:
    reported.four_vendors()[0].write(tmp_path)
    for option, name, like in (("--platforms", "rocmm", "rocm"), ("--home", "cudda", "cuda")):
        done = CliRunner().invoke(cli.main, ["report", str(tmp_path), option, name])
        assert (
            f"'{name}' was asked for, and no backend and no record has that name; did you mean {like}?" in done.stderr
        )
    done = CliRunner().invoke(cli.main, ["report", str(tmp_path), "-o", str(tmp_path / "none" / "x.html")])
    assert (done.exit_code, "there is no folder" in done.stderr) == (2, True)
