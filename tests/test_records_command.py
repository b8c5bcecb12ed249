"""What `portnet records` lists, refuses and says of it; and that no record speaks to the terminal."""

import hashlib
import json
import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from portnet import cli
from portnet.record import Record, Spec

TIMED = Record(
    spec=Spec(backend="cpu", engine="compile", batch=32),
    outcome="works",
    device={"name": "a processor"},
    environment={"date": "2026-01-02T03:04:05+00:00"},
    round={"series": "s", "number": 0, "reruns": 0, "rejected": False},
    samples={"infer": {"batch": 32, "steps": 4, "seconds": [0.5, 0.125, 0.25]}},
)
HOSTILE = "[red]\x1b[2J\x1b]0;owned\x07[/red]\u202egnp.exe\u2066\u200b\r\n\x85\u2028\ud800\x7f :smile: " + "x" * 5000


def records(*arguments: object, status: int = 0) -> str:
    """What the command prints on standard output."""
    environment = {"COLUMNS": "100", "FORCE_COLOR": None, "TTY_COMPATIBLE": None}
    ran = CliRunner().invoke(cli.main, ["records", *map(str, arguments)], env=environment)
    assert ran.exit_code == status, (ran.stdout, ran.stderr, ran.exception)
    assert ran.exception is None or isinstance(ran.exception, SystemExit)
    return ran.stdout if status < 2 else ran.stderr


def damaged(folder: Path) -> Path:
    path = replace(TIMED, reason="flipped").write(folder)
    path.write_bytes(path.read_bytes().replace(b"flipped", b"flopped"))
    return path


def test_a_list_of_records(tmp_path: Path) -> None:
    TIMED.write(tmp_path)
    told = records(tmp_path)
    for word in (TIMED.digest[:12], "cpu/compile/float32", "a processor", "infer", "32", "works", "round 1", "62.5"):
        assert word in told, word
    assert "2026-01-02" in told
    assert "quick" not in told
    assert TIMED.digest[:13] not in told
    assert told.splitlines()[-1] == "1 record in 1 series of 1 round"


def test_as_json(tmp_path: Path) -> None:
    one, two = TIMED.write(tmp_path / "one"), TIMED.write(tmp_path / "two")
    bad = damaged(tmp_path / "one")
    (left := tmp_path / "two" / f".{one.name}.abc.tmp").touch()
    told = json.loads(records(tmp_path / "one", tmp_path / "two", tmp_path / "two", "--json", status=1))
    (listed,) = told.pop("records")
    assert listed == {
        "digest": TIMED.digest,
        "stack": "cpu/compile/float32",
        "mode": "infer",
        "batch": 32,
        "outcome": "works",
        "quick": False,
        "device": "a processor",
        "date": "2026-01-02T03:04:05+00:00",
        "round": {"series": "s", "number": 0, "reruns": 0, "rejected": False},
        "blocks": 3,
        "step": 0.0625,
        "paths": [str(one), str(two)],
    }
    assert told["refused"] == [{"path": str(bad), "kind": "damaged", "message": told["refused"][0]["message"]}]
    assert told["unfinished"] == [str(left)]
    assert {k: told[k] for k in ("duplicates", "series", "rounds", "rejected")} == {
        "duplicates": 1, "series": 1, "rounds": 1, "rejected": 0,
    }  # fmt: skip


def test_what_is_refused_is_named_and_the_others_are_listed(tmp_path: Path) -> None:
    TIMED.write(tmp_path)
    bad = damaged(tmp_path)
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "compare.html").write_text("not looked at")
    told = records(tmp_path, status=1)
    assert TIMED.digest[:12] in told
    assert f"Refused (damaged): {bad} is damaged" in told
    assert f"Refused (foreign): {tmp_path / 'notes.json'}" in told
    assert "compare.html" not in told


def test_a_temporary_file_is_named_and_no_failure(tmp_path: Path) -> None:
    (tmp_path / ".x.json.abc.tmp").touch()
    told = records(tmp_path)
    assert told.startswith("0 records\n")
    assert f"Unfinished: {tmp_path / '.x.json.abc.tmp'}" in told


def test_series_rounds_and_duplicates_are_counted(tmp_path: Path) -> None:
    for series, number, reruns, rejected in (
        ("a", 0, 0, True), ("a", 0, 1, False), ("a", 1, 0, False), ("b", 0, 0, False),
        ("b", 7, 0, True),
    ):  # fmt: skip
        for batch in (1, 2):  # two stacks of a round
            place = {"series": series, "number": number, "reruns": reruns, "rejected": rejected}
            replace(TIMED, spec=replace(TIMED.spec, batch=batch), round=place).write(tmp_path / "one")
    replace(TIMED, round={}).write(tmp_path / "one")
    replace(TIMED, round={}).write(tmp_path / "two")
    told = records(tmp_path / "one", tmp_path / "two")
    assert told.splitlines()[-1] == "11 records in 2 series of 3 rounds and 2 rejected, 1 duplicate"
    assert (told.count("round 1"), told.count("round 2")) == (4, 2)
    assert len(re.findall("rejected( |$)", told, re.MULTILINE)) == 4


@pytest.mark.parametrize(
    ("changed", "told", "step"),
    [
        pytest.param({}, "62.5", 0.0625, id="timed"),
        pytest.param({"spec": replace(TIMED.spec, quick=True)}, "62.5 quick", 0.0625, id="quick"),
        pytest.param({"outcome": "wrong"}, "void", None, id="outside a gate"),
        pytest.param({"outcome": "unsteady"}, "void", None, id="unsteady"),
        pytest.param({"samples": {}}, "not measured", None, id="not timed"),
        pytest.param({"spec": replace(TIMED.spec, mode="train")}, "not measured", None, id="another mode's"),
    ],
)
def test_a_speed_counts_behind_its_gates_only(
    tmp_path: Path, changed: dict[str, object], told: str, step: float | None
) -> None:
    replace(TIMED, **changed).write(tmp_path)  # type: ignore[arg-type]
    assert told in records(tmp_path)
    assert ("62.5" in records(tmp_path)) == (step is not None)
    assert json.loads(records(tmp_path, "--json"))["records"][0]["step"] == step


def test_no_record_speaks_to_the_terminal(tmp_path: Path) -> None:
    replace(
        TIMED,
        spec=replace(TIMED.spec, backend=HOSTILE, precision=HOSTILE, formulation=HOSTILE),
        device={"name": HOSTILE},
        environment={"date": HOSTILE},
        round={"series": HOSTILE, "number": 2**53},
    ).write(tmp_path)
    # In a message: by a field's name, by its value, and in the name of a file.
    for content in ({"schema": HOSTILE}, {"schema": "portnet.record/2", HOSTILE: 1}):
        data = json.dumps(content).encode()
        (tmp_path / f"{hashlib.sha256(data).hexdigest()}.json").write_bytes(data)
    (tmp_path / "a\x1b[2J\u202e\nRefused [red]b.json").touch()
    (tmp_path / ".a\x1b[2J\u202e\nUnfinished: [red]b.tmp").touch()
    told = records(tmp_path, status=1)
    spoken = {c for c in told if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert not spoken, [hex(ord(c)) for c in spoken]
    assert "[red]" in told, "markup is text"
    assert ":smile:" in re.sub(r"\s", "", told) or "…" in told
    assert len(re.findall("^Refused ", told, re.MULTILINE)) == 3
    assert len(re.findall("^Unfinished: ", told, re.MULTILINE)) == 1
    assert len(told) < 8000, "however long the names are"
    assert records(tmp_path, "--json", status=1).isascii()


def test_mistakes(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "missing' does not exist" in records(tmp_path / "missing", status=2)
    assert "is a file" in records(tmp_path / "file", status=2)
    assert "Missing argument" in records(status=2)


def test_an_empty_folder(tmp_path: Path) -> None:
    assert records(tmp_path) == "0 records\n"
