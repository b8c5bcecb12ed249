"""A record comes back as it was written, or is refused by name."""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from portnet import clock, contract, files, record, stats, watch
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

EVERYTHING = replace(
    FULL,
    spec=replace(FULL.spec, mode="train", without=("cudnn",)),
    effective=asdict(contract.Settings()) | {"environment": {"X": "1"}},
    round={"series": "a", "number": 0, "reruns": 0, "beside": ["b"], "probe": [1e-3], "rejected": False},
    gates={
        **FULL.gates,
        "curve": {"passed": True, "share": 0.1, "step": 3, "runs": 1},
        "clock": {
            "train": asdict(
                clock.Clock(
                    steps=2, blocks=(0.2,), idle=(1e-4,), last=(0.0,), right=True, longer=(4.0,), unseen=(1.0,),
                    events=(1.0,), share=0.5,
                )
            )
        },
        "fallbacks": {"known": True, "operations": {"aten::x": 2}},
        "warm_up": {"steady_from": None, "blocks": 20},
        "trend": asdict(stats.Trend(change=-0.01, low=None, high=0.01)) | {"unsteady": False},
    },
    samples={"train": {"batch": 32, "steps": 3, "seconds": [0.1, 0.25], "warm_up": [0.2]}},
    times={"first_step": 2.5, "end_to_end": [0.1, 0.2], "energy_images": 64},
    ceilings=asdict(contract.Ceilings(flops=1e12, bandwidth=None, samples={"flops": (1e12, 9e11)}))
    | {"after": asdict(contract.Ceilings(flops=1e12, bandwidth=1e11))},
    layers={"conv1": {"flops": 1e9, "bytes": 10, "floor": None, **asdict(contract.LayerTime(forward=1e-3))}},
    serving={
        "latencies": [1e-3, 2e-3], **asdict(stats.percentiles([1e-3, 2e-3])), "largest_batch": None,
        "bus": {"to_device": 1e10, "to_host": None, "samples": {"to_device": [1e10]}},
        "sweep": {"1": {"steps": 3, "seconds": [0.1], "peak_memory": None}},
    },
    watch=watch.Watch().summary() | {"busy_before": 0.1},
)  # fmt: skip
"""With every part that a measurement may fill."""


def held(**changed: object) -> bytes:
    """The JSON of `FULL` with fields replaced; of `spec`'s those named `spec.x`."""
    content = json.loads(FULL.to_json())
    for name, value in changed.items():
        if name.startswith("spec_"):
            content["spec"][name.removeprefix("spec_")] = value
        else:
            content[name] = value
    return json.dumps(content).encode()


def timed(**changed: object) -> bytes:
    """The same with samples of which a part is replaced."""
    return held(samples={"infer": {"batch": 1, "steps": 1, "seconds": [1.0], **changed}})


def finding(**changed: object) -> bytes:
    """The same with a finding of the parity gate of which a part is replaced."""
    return held(gates={"parity": {"findings": [{"what": "x", "error": 1.0, "allowed": 1.0, **changed}]}})


def nested(depth: int) -> object:
    """Lists inside one another."""
    return [nested(depth - 1)] if depth else 1


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
    for path in (damaged, truncated):
        assert f"{path} is damaged" in told
    for path in (empty, renamed):
        assert f"{path} is foreign" in told
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
        pytest.param(b"7", "is no record", id="a number"),
        pytest.param(b"\xff\xfe", "is no record", id="not text"),
        pytest.param(b"[" * 100_000, "is no record", id="deep"),
        pytest.param(held(schema="portnet.record/99"), "is of schema 'portnet.record/99'", id="schema of the future"),
        pytest.param(held(schema=["x"]), "is of schema ['x']", id="schema is a list"),
        pytest.param(held(extra=1), "a record has no field 'extra'", id="unknown field"),
        pytest.param(held(spec_extra=1), "spec has no field 'extra'", id="unknown field of the spec"),
        pytest.param(held(outcome="splendid"), "unknown outcome 'splendid'", id="unknown outcome"),
        pytest.param(held(outcome=["works"]), "unknown outcome", id="outcome is a list"),
        pytest.param(held(spec=None), "spec must be object", id="no spec"),
        pytest.param(held(spec={}), "spec must have backend", id="no backend"),
        pytest.param(held(spec_mode="learn"), "unknown spec.mode 'learn'; one of train, infer, serve", id="mode"),
        pytest.param(held(spec_division="half"), "unknown spec.division 'half'", id="division"),
        pytest.param(held(spec_batch="16"), "spec.batch must be integer, got '16'", id="batch is text"),
        pytest.param(held(spec_batch=True), "spec.batch must be integer, got True", id="batch is true"),
        pytest.param(held(spec_batch=-1), "spec.batch must be from 0", id="batch is negative"),
        pytest.param(held(spec_batch=16.0), "spec.batch must be integer, got 16.0", id="batch is a float"),
        pytest.param(held(spec_quick=1), "spec.quick must be boolean, got 1", id="quick is a number"),
        pytest.param(held(spec_without="cudnn"), "spec.without must be array", id="without is text"),
        pytest.param(held(reason=None), "reason must be string", id="no reason"),
        pytest.param(held(device=[]), "device must be object", id="device is a list"),
        pytest.param(held(device={"name": 7}), "device.name must be string", id="device's name is a number"),
        pytest.param(held(device={"x": nested(9)}), "must be string or number or boolean or null", id="nested"),
        pytest.param(held(effective={"x": 1e301}), "effective.x must be from -1e+300", id="an enormous number"),
        pytest.param(held(effective={"x": -(10**301)}), "effective.x must be from -1e+300", id="enormous and negative"),
        pytest.param(held(watch={"x": float("nan")}), "watch.x must be from", id="NaN anywhere"),
        pytest.param(held(device={"x": float("inf")}), "device.x must be from", id="infinity anywhere"),
        pytest.param(held(training={"losses": 3.0}), "must be array, got 3.0", id="one loss"),
        pytest.param(held(training={"losses": ["2.3"]}), "training.losses[0] must be number, got '2.3'", id="loss"),
        pytest.param(held(training={"losses": [True]}), "training.losses[0] must be number, got True", id="true loss"),
        pytest.param(held(training={"losses": [1.0, float("nan")]}), "training.losses[1] must be from", id="NaN loss"),
        pytest.param(held(training={"losses": [10**400]}), "training.losses[0] must be from", id="loss beyond floats"),
        pytest.param(held(training={"losses": [1.0], "perturbed": [[]]}), "as long as the losses", id="a short run"),
        pytest.param(held(training={"perturbed": [[1.0]]}), "as long as the losses, 0", id="a run, and no losses"),
        pytest.param(timed(seconds=None), "samples.infer.seconds must be array", id="no seconds"),
        pytest.param(held(samples={"infer": {}}), "samples.infer must have batch, steps, seconds", id="nothing timed"),
        pytest.param(timed(seconds=[]), "samples.infer.seconds must hold 1 or more", id="no blocks"),
        pytest.param(timed(seconds=[1.0, 0.0]), "samples.infer.seconds[1] must be from 1e-09", id="no time"),
        pytest.param(timed(seconds=[-1.0]), "samples.infer.seconds[0] must be from 1e-09", id="negative time"),
        pytest.param(timed(batch=0), "samples.infer.batch must be from 1", id="no images"),
        pytest.param(timed(batch=1.5), "samples.infer.batch must be integer", id="half an image"),
        pytest.param(timed(steps=2**60), "samples.infer.steps must be from 1", id="more steps than floats count"),
        pytest.param(timed(warm_up=[0.0]), "samples.infer.warm_up[0] must be from", id="no time of a warm-up"),
        pytest.param(held(gates={"parity": []}), "gates.parity must be object", id="parity is a list"),
        pytest.param(finding(what=1), "gates.parity.findings[0].what must be string", id="unnamed tensor"),
        pytest.param(finding(error=None), "gates.parity.findings[0].error must be number", id="no error"),
        pytest.param(finding(allowed=-1.0), "gates.parity.findings[0].allowed must be from 0", id="below nothing"),
        pytest.param(held(gates={"clock": {"infer": {"right": 1}}}), "clock.infer.right must be boolean", id="clock"),
        pytest.param(held(ceilings={"flops": 0}), "ceilings.flops must be from", id="a ceiling of nothing"),
        pytest.param(held(ceilings={"samples": {"x": [-1]}}), "ceilings.samples.x[0] must be from", id="a rate"),
        pytest.param(held(ceilings={"after": {"flops": "1"}}), "ceilings.after.flops must be", id="a later ceiling"),
        pytest.param(
            held(layers={"conv1": {"flops": 1, "bytes": 1, "forward": -1e-3}}),
            "layers.conv1.forward must be from 0",
            id="a layer",
        ),
        pytest.param(held(serving={"latencies": [0]}), "serving.latencies[0] must be from", id="no latency"),
        pytest.param(held(serving={"sweep": {"1": {}}}), "serving.sweep.1 must have steps, seconds", id="a sweep"),
        pytest.param(held(times={"first_step": -1}), "times.first_step must be from 0", id="a negative time"),
        pytest.param(held(times={"end_to_end": [1, -1]}), "times.end_to_end[1] must be from 0", id="one of several"),
        pytest.param(held(round={"number": -1}), "round.number must be from 0", id="a round before the first"),
        pytest.param(held(round={"rejected": 0}), "round.rejected must be boolean", id="rejected is a number"),
        pytest.param(held(round={"probe": [0]}), "round.probe[0] must be from", id="a probe of no time"),
        pytest.param(held(watch={"blocks": 1.5}), "watch.blocks must be integer", id="half a block"),
    ],
)
def test_what_is_no_record_is_refused_by_name(tmp_path: Path, content: bytes, told: str) -> None:
    path = stored(tmp_path, content)
    with pytest.raises(RecordError) as caught:
        record.read(path)
    assert str(path) in str(caught.value)
    assert told in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 300, "whatever the file holds"


def test_a_record_without_the_newer_optional_fields_is_read(tmp_path: Path) -> None:
    content = json.loads(FULL.to_json())
    del content["samples"], content["spec"]["division"]
    assert record.read(stored(tmp_path, json.dumps(content).encode())) == replace(FULL, samples={})


def test_what_is_not_laid_down_is_kept(tmp_path: Path) -> None:
    content = json.loads(FULL.to_json())
    content["samples"]["infer"]["later"] = content["device"]["x"] = nested(8)
    content["gates"]["another"] = {"figure": -1.5}
    found = record.read(stored(tmp_path, json.dumps(content).encode()))
    assert found.samples["infer"]["later"] == found.device["x"] == nested(8)
    assert found.gates["another"] == {"figure": -1.5}


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    for changed, told in (
        ({"samples": {"infer": {"batch": 1, "steps": 1, "seconds": [-1.0]}}}, "samples.infer.seconds"),
        ({"training": {"losses": [], "perturbed": [[1.0]]}}, "as long as the losses"),
        ({"device": {"x": nested(9)}}, "device.x"),
    ):
        with pytest.raises(RecordError, match=rf"cpu/eager/float32 \(stock\) could not be read again: .*{told}"):
            replace(FULL, **changed).write(tmp_path)
    assert not list(tmp_path.iterdir())


# The published form.


def paths(value: object, above: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Where every value inside stands."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(p for key, v in inner for p in paths(v, (*above, key)))]


def changed(content: object, path: tuple[object, ...], value: object) -> object:
    """A copy with another value there, or none for `...`."""
    if not path:
        return value
    copy = content.copy()  # type: ignore[attr-defined]
    if value is ... and len(path) == 1:
        del copy[path[0]]
    else:
        inner = copy.get(path[0]) if isinstance(copy, dict) else copy[path[0]]
        copy[path[0]] = changed(inner, path[1:], value)
    return copy


def accepts(content: object) -> bool:
    try:
        record._checked(content)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return False
    return True


def test_the_published_schema_is_the_one_that_records_are_held_against() -> None:
    Draft202012Validator.check_schema(record.json_schema())
    published = Path(__file__).parents[1] / "docs" / "record.schema.json"
    expected = json.dumps(record.json_schema(), indent=1) + "\n"
    assert published.read_text() == expected, "python -m portnet.record > docs/record.schema.json"


@pytest.mark.parametrize("made", [EVERYTHING, FULL, Record(spec=Spec(backend="x"), outcome="works")])
def test_records_have_the_published_form(made: Record, tmp_path: Path) -> None:
    Draft202012Validator(record.json_schema()).validate(json.loads(made.write(tmp_path).read_text()))


def test_every_field_is_in_the_schema_with_its_type_and_no_other() -> None:
    form = record.json_schema()
    assert form["properties"].keys() == {"schema", *(f.name for f in fields(Record))}
    assert form["properties"]["spec"]["properties"].keys() == {f.name for f in fields(Spec)}
    assert set(form["required"]) == {"schema", "spec", "outcome"}
    assert form["properties"]["spec"]["required"] == ["backend"]
    assert form["properties"]["spec"]["properties"]["batch"]["type"] == "integer"
    assert not form["additionalProperties"]
    assert not form["properties"]["spec"]["additionalProperties"]


VALUES = (..., None, True, -1, 0, 2, 0.5, 2**60, 1e301, -1e301, "x", [], [-1.5], {}, {"x": "y"}, nested(8), nested(9))


def test_reading_refuses_what_the_schema_refuses_and_nothing_else() -> None:
    """Every part of a full record in turn is replaced by values of every kind, or left out."""
    content = json.loads(EVERYTHING.to_json())
    # The one thing that the schema cannot say.
    content["training"]["perturbed"] = []
    validator = Draft202012Validator(record.json_schema())
    chance, seen = random.Random(0), Counter[bool]()
    everywhere = [(*p, *extra) for p in paths(content) for extra in ((), ("extra",))]
    for path in everywhere:
        for value in chance.sample(VALUES, 2):
            try:
                other = changed(content, path, value)
            except (TypeError, AttributeError, KeyError):
                continue  # nothing can be put there
            assert accepts(other) == validator.is_valid(other), (path, value)
            seen[accepts(other)] += 1
    assert min(seen.values()) > 100, seen


# Damage.

SMALL = Record(spec=Spec(backend="cpu"), outcome="works")


def test_every_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    path = SMALL.write(tmp_path)
    content = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for at, byte in enumerate(content):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
                with pytest.raises(record.Refused) as caught:
                    record.read(path)
                assert (caught.value.path, caught.value.kind) == (path, "damaged")
                assert str(path) in str(caught.value)
            os.pwrite(file.fileno(), content[at : at + 1], at)
    assert record.read(path) == SMALL


def test_every_flipped_bit_of_the_name_is_found(tmp_path: Path) -> None:
    path = SMALL.write(tmp_path)
    for at, c in enumerate(path.stem):
        for bit in range(7):
            name = f"{path.stem[:at]}{chr(ord(c) ^ 1 << bit)}{path.stem[at + 1 :]}.json"
            if "/" in name or "\0" in name:
                continue  # no name
            renamed = path.rename(tmp_path / name)
            assert record.search([renamed])[1][0].kind in ("damaged", "foreign")
            renamed.rename(path)


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = SMALL.write(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content + b"\n")
    for length in (len(content) + 1, *reversed(range(len(content)))):
        os.truncate(path, length)
        with pytest.raises(record.Refused, match="is damaged"):
            record.read(path)


def test_two_records_that_swapped_their_names_are_both_refused(tmp_path: Path) -> None:
    one, two = SMALL.write(tmp_path), FULL.write(tmp_path)
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    found, refused = record.search([tmp_path])
    assert not found
    assert {(r.path, r.kind) for r in refused} == {(one, "damaged"), (two, "damaged")}


def test_a_forged_record_is_not_found(tmp_path: Path) -> None:
    """What the hash does not do; whoever reads this as a lack wants signatures."""
    forged = FULL.to_json().replace("0.25", "0.20").encode()
    assert record.read(stored(tmp_path, forged)).samples["infer"]["seconds"] == [0.1, 0.2]


# Many files.


def test_folders_are_merged_and_what_is_there_twice_counts_once(tmp_path: Path) -> None:
    shared = [r.write(tmp_path / folder) for folder in ("one", "two") for r in (SMALL, FULL)]
    alone = replace(FULL, reason="alone").write(tmp_path / "two")
    # The same content in other words: an editor's, or another program's.
    again = stored(tmp_path / "two", json.dumps(json.loads(SMALL.to_json())).encode())
    found, refused = record.search([tmp_path / "one", tmp_path / "two", tmp_path / "one", alone])
    assert not refused
    assert {f.record.digest: {*f.paths} for f in found} == {
        SMALL.digest: {shared[0], shared[2], again},
        FULL.digest: {shared[1], shared[3]},
        alone.stem: {alone},
    }
    for path in shared[:2]:
        path.rename(tmp_path / "two" / path.name)
    assert record.read_all([tmp_path / "two"])[0] == [f.record for f in record.search([tmp_path / "two"])[0]]
    assert len(record.read_all([tmp_path / "two"])[0]) == 3


def test_the_kinds_of_what_is_refused(tmp_path: Path) -> None:
    flipped = SMALL.write(tmp_path)
    flipped.write_bytes(flipped.read_bytes()[1:])
    expected = {
        flipped: "damaged",
        stored(tmp_path, b"{}"): "malformed",
        stored(tmp_path, held(schema="portnet.record/1")): "unknown schema",
        tmp_path / "package.json": "foreign",
        tmp_path / "folder.json": "unreadable",
        tmp_path / "broken.json": "unreadable",
        tmp_path / "loop.json": "unreadable",
        tmp_path / "missing": "missing",
    }
    (tmp_path / "package.json").write_text("{}")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "broken.json").symlink_to("nowhere")
    (tmp_path / "loop.json").symlink_to("loop.json")
    for other in (".hidden.json", f"._{flipped.name}", f".{flipped.name}.x.tmp", "compare.html"):
        (tmp_path / other).touch()
    found, refused = record.search([tmp_path, tmp_path / "missing"])
    assert not found
    assert {r.path: r.kind for r in refused} == expected


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names on this system")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    assert record.search([tmp_path])[1][0].kind == "unreadable"


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", denied)
    ((refused,), found) = record.search([tmp_path])[::-1]
    assert not found
    assert (refused.path, refused.kind) == (tmp_path, "unreadable")


# Kills.


def test_killed_writers_leave_whole_records_or_none() -> None:
    """benchmarks/kill_records.py does 1,000."""
    script = Path(__file__).parents[1] / "benchmarks" / "kill_records.py"
    command = [sys.executable, str(script), "--kills", "50", "--size", "1000000"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (ran.returncode, ran.stdout.splitlines()[-1], ran.stderr) == (0, "passed", ""), ran.stdout


def test_temporary_files_are_told_apart_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def replaced(*_: object) -> None:
        seen.extend(files.unfinished(tmp_path))
        raise OSError("the disk is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", replaced)
        with pytest.raises(RecordError, match="the disk is gone"):
            SMALL.write(tmp_path)
    assert len(seen) == 1
    assert seen[0].name.startswith(f".{SMALL.digest}.json.")
    left = seen[0]
    left.write_text("half")
    SMALL.write(tmp_path)
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "scratch.tmp").touch()
    assert files.unfinished(tmp_path) == [left]
    assert record.read_all([tmp_path]) == ([SMALL], [])


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
