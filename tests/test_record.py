"""A record comes back as it was written, or is refused by name."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from portnet import files, record
from portnet.errors import InputError, RecordError
from portnet.record import Record, Spec

FULL = Record(
    spec=Spec(backend="cpu", formulation="stock", batch=32),
    outcome="partial",
    reason="LRN ran on the CPU – „host“",
    device={"name": "a device", "precisions": ["float32"], "memory": None},
    environment={"date": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2.8"}},
    weights="ab" * 32,
    gates={"parity": {"passed": True, "findings": [{"what": "infer() fc8", "error": 1e-7, "allowed": 1e-6}]}},
    training={"losses": [2.5, 0.1 + 0.2], "perturbed": [[2.5, 0.3]]},
    samples={"infer": {"batch": 32, "steps": 3, "seconds": [0.1, 0.25]}},
)


def held(**changed: object) -> bytes:
    """The JSON of `FULL` with fields replaced; of `spec`'s those named `spec.x`."""
    content = json.loads(FULL.to_json())
    for name, value in changed.items():
        if name.startswith("spec_"):
            content["spec"][name.removeprefix("spec_")] = value
        else:
            content[name] = value
    return json.dumps(content).encode()


def stored(folder: Path, content: bytes) -> Path:
    """A file that is named as a record of that content would be."""
    path = folder / f"{hashlib.sha256(content).hexdigest()}.json"
    path.write_bytes(content)
    return path


def test_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = FULL.write(tmp_path / "new" / "folder")
    assert path.name == f"{FULL.digest}.json"
    assert path.stem == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record.read(path) == FULL
    assert FULL.write(path.parent) == path, "equal records are one file"
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_equal_records_have_one_name_and_others_another() -> None:
    assert replace(FULL, device=dict(reversed(FULL.device.items()))).digest == FULL.digest
    assert replace(FULL, reason="").digest != FULL.digest


def test_stack_names_the_formulation_only_where_it_is_not_ours() -> None:
    assert Spec(backend="cuda", engine="compile", precision="tf32").stack == "cuda/compile/tf32"
    assert FULL.spec.stack == "cpu/eager/float32 (stock)"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_not_written(tmp_path: Path, value: float) -> None:
    for field in ("training", "gates", "samples", "device"):
        with pytest.raises(RecordError, match=r"cpu/eager/float32 \(stock\).*not finite"):
            replace(FULL, **{field: {"deep": [{"down": value}]}}).write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_outcome() -> None:
    with pytest.raises(RecordError, match="unknown outcome 'splendid'; one of works, partial"):
        Record(spec=FULL.spec, outcome="splendid")


def test_damaged_records_are_named_and_the_others_used(tmp_path: Path) -> None:
    good = [replace(FULL, reason=str(n)) for n in range(3)]
    for r in good:
        r.write(tmp_path)
    damaged = replace(FULL, reason="flipped").write(tmp_path)
    damaged.write_bytes(damaged.read_bytes().replace(b"flipped", b"flopped"))
    truncated = replace(FULL, reason="truncated").write(tmp_path)
    truncated.write_bytes(truncated.read_bytes()[:-40])
    empty = tmp_path / "empty.json"
    empty.touch()
    renamed = FULL.write(tmp_path).rename(tmp_path / "mine.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "notes.txt").write_text("not looked at")

    records, problems = record.read_all([tmp_path, tmp_path / "missing"])

    assert sorted(r.reason for r in records) == ["0", "1", "2"]
    assert [r.digest for r in records] == sorted(r.digest for r in good)
    told = "\n".join(map(str, problems))
    for path in (damaged, truncated, empty, renamed):
        assert f"{path} is damaged" in told
    assert f"cannot read {tmp_path / 'folder.json'}" in told
    assert f"no file or folder {tmp_path / 'missing'}" in told
    assert len(problems) == 6


def test_one_record_in_two_folders_counts_once(tmp_path: Path) -> None:
    one, two = FULL.write(tmp_path / "one"), FULL.write(tmp_path / "two")
    records, problems = record.read_all([tmp_path / "one", two, one])
    assert records == [FULL]
    assert not problems


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(b"[]", "is no record", id="a list"),
        pytest.param(b"{}", "is no record", id="no schema"),
        pytest.param(b"\xff\xfe", "is no record", id="not text"),
        pytest.param(b"[" * 100_000, "is no record", id="deep"),
        pytest.param(held(schema="portnet.record/99"), "is of schema 'portnet.record/99'", id="schema of the future"),
        pytest.param(held(extra=1), "unexpected keyword argument 'extra'", id="unknown field"),
        pytest.param(held(outcome="splendid"), "unknown outcome 'splendid'", id="unknown outcome"),
        pytest.param(held(outcome=["works"]), "unknown outcome", id="outcome is a list"),
        pytest.param(held(spec=None), "is no record", id="no spec"),
        pytest.param(held(spec_batch="16"), "spec.batch must be int, got '16'", id="batch is text"),
        pytest.param(held(spec_batch=True), "spec.batch must be int, got True", id="batch is true"),
        pytest.param(held(spec_quick=1), "spec.quick must be bool, got 1", id="quick is a number"),
        pytest.param(held(reason=None), "reason must be str", id="no reason"),
        pytest.param(held(device=[]), "device must be dict", id="device is a list"),
        pytest.param(held(training={"losses": 3.0}), "must be list, got 3.0", id="one loss"),
        pytest.param(held(training={"losses": ["2.3"]}), "finite numbers, got '2.3'", id="loss is text"),
        pytest.param(held(training={"losses": [True]}), "finite numbers, got True", id="loss is true"),
        pytest.param(held(training={"losses": [float("nan")]}), "finite numbers, got nan", id="loss is NaN"),
        pytest.param(held(training={"losses": [10**400]}), "is no record: OverflowError", id="loss beyond floats"),
        pytest.param(held(training={"losses": [1.0], "perturbed": [[]]}), "equally long", id="a short perturbed run"),
        pytest.param(held(device={"x": float("inf")}), "not finite", id="infinity anywhere"),
        pytest.param(held(samples={"infer": {}}), "KeyError: 'seconds'", id="no seconds"),
        pytest.param(held(samples={"infer": {"batch": 1, "steps": 1, "seconds": []}}), "positive", id="no blocks"),
        pytest.param(held(samples={"infer": {"batch": 1, "steps": 1, "seconds": [0]}}), "positive", id="no time"),
        pytest.param(held(samples={"infer": {"batch": 0, "steps": 1, "seconds": [1]}}), "positive", id="no images"),
        pytest.param(held(gates={"parity": []}), "is no record", id="parity is a list"),
        pytest.param(held(gates={"parity": {"findings": [{"what": 1}]}}), "name of a tensor", id="unnamed tensor"),
        pytest.param(
            held(gates={"parity": {"findings": [{"what": "x", "error": None, "allowed": 1}]}}),
            "x must hold finite numbers",
            id="no error",
        ),
    ],
)
def test_what_is_no_record_is_refused_by_name(tmp_path: Path, content: bytes, told: str) -> None:
    path = stored(tmp_path, content)
    with pytest.raises(RecordError) as caught:
        record.read(path)
    assert str(path) in str(caught.value)
    assert told in str(caught.value)


def test_a_record_without_the_newer_optional_fields_is_read(tmp_path: Path) -> None:
    content = json.loads(FULL.to_json())
    del content["samples"], content["spec"]["division"]
    assert record.read(stored(tmp_path, json.dumps(content).encode())) == replace(FULL, samples={})


def test_the_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match="cannot make the folder"):
        FULL.write(tmp_path / "file")


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    assert files.write_atomically(path, b"first", InputError) == path

    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", fails)
        with pytest.raises(InputError, match=r"cannot write .*page.html: no space left on device"):
            files.write_atomically(path, b"second", InputError)
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"], "nothing half-written is left behind"


def test_whoever_has_a_file_open_keeps_what_it_held(tmp_path: Path) -> None:
    path = files.write_atomically(tmp_path / "page.html", b"first", InputError)
    with path.open("rb") as reader:
        files.write_atomically(path, b"second", InputError)
        assert reader.read() == b"first"
    assert path.read_bytes() == b"second"


def test_where_a_file_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is a folder"):
        files.write_atomically(tmp_path, b"", InputError)
    with pytest.raises(InputError, match="no folder"):
        files.write_atomically(tmp_path / "none" / "file", b"", InputError)
