"""Fresh processes side by side: whatever becomes of one, the others are measured, and nothing outlives its parent."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from fakes_measured import FAKES
from test_measurement import SMALL

from portnet import launch, lockin, plugins, record
from portnet.record import Record

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def plugin(tmp_path_factory, monkeypatch):
    """The fakes as a stranger's plug-in that every process finds."""
    folder = tmp_path_factory.mktemp("site")
    info = folder / "portnet_fakes-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: portnet-fakes\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[portnet]\nfakes = fakes_measured\nthin = thin\n")
    path = os.pathsep.join(map(str, (folder, TESTS, *filter(None, [os.environ.get("PYTHONPATH")]))))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.delenv("PORTNET_DISABLE_PLUGINS", raising=False)
    return path


def spec(name, **changes):
    return replace(SMALL, backend=name, **changes)


def test_a_probe_that_hangs_or_crashes_takes_nobody_along():
    names = ["fake-probe-raises", "fake-probe-hangs", "fake-honest", "fake-probe-crashes", "fake-emulates", "reference"]
    known = {**FAKES, **plugins.backends()}
    found = launch.probes([known[name] for name in names], timeout=10)
    assert set(found) == set(names)
    assert found["fake-honest"] == plugins.probe(known["fake-honest"])
    assert found["fake-emulates"].emulated == ("float32",)
    assert found["reference"] == plugins.probe(known["reference"])
    assert {n: found[n].reason for n in names if "probe" in n} == {
        "fake-probe-raises": "the probe of fake-probe-raises raised ZeroDivisionError: division by zero",
        "fake-probe-hangs": "its probe gave no answer within 10 s",
        "fake-probe-crashes": "its probe ended its process with signal 11 (SIGSEGV)",
    }


def test_whatever_becomes_of_one_process_the_others_are_measured():
    names = ["fake-honest", "fake-crashing", "fake-broken", "fake-killed", "fake-hanging", "fake-fallback"]
    said = []
    rounds = list(
        launch.series([spec(n) for n in names], rounds=2, timeout=25, say=lambda s, line: said.append((s.stack, line)))
    )
    first = {r.spec.backend: r for r in rounds[0]}
    assert {n: r.outcome for n, r in first.items()} == {
        "fake-honest": "works",
        "fake-crashing": "failed",
        "fake-broken": "failed",
        "fake-killed": "failed",
        "fake-hanging": "timeout",
        "fake-fallback": "partial",
    }
    assert "signal 11 (SIGSEGV)" in first["fake-crashing"].reason
    assert "signal 9 (SIGKILL)" in first["fake-killed"].reason
    assert first["fake-hanging"].reason == "no sign of life for 25 s"
    # What cannot be timed is not started again.
    backends = [[r.spec.backend for r in made] for made in rounds if made[0].round["number"] == 1]
    assert backends
    assert all(found == ["fake-honest", "fake-fallback"] for found in backends)
    honest = first["fake-honest"]
    assert honest.round["beside"] == ["fake-fallback/eager/float32"]
    assert len(honest.round["probe"]) == SMALL.blocks
    assert len({r.round["series"] for made in rounds for r in made}) == 1
    assert ("fake-honest/eager/float32", "parity against the float64 reference") in said
    # Layers and curves are for the first round alone; gates are for every one.
    again = next(r for r in rounds[-1] if r.spec.backend == "fake-honest")
    assert again.gates["parity"]["findings"] == honest.gates["parity"]["findings"]
    found = lockin.figures([r for made in rounds for r in made])
    assert next(f for f in found if f.spec.backend == "fake-honest").outcome == "works"
    assert lockin.compare(*[f for f in found if f.rate]).rounds >= 1


def test_what_the_system_kills_for_memory_is_out_of_memory(monkeypatch):
    """The kernel's own counter tells; here a fake one that rises."""
    counts = iter(range(100))
    monkeypatch.setattr(launch, "_memory_kills", lambda: next(counts))
    made = launch.run(spec("fake-killed"), timeout=60)
    assert made.outcome == "out of memory"


def test_a_round_on_an_uneven_machine_is_run_again(monkeypatch):
    def made(stack, probe):
        return Record(spec=spec(stack), outcome="works", round={"probe": [probe] * 3}), True

    tries = []

    def round_(specs, place, timeout, say, *, first):
        tries.append(place)
        uneven = len(tries) == 1
        return [made("fake-honest", 1.0), made("fake-fallback", 1.2 if uneven else 1.05)]

    monkeypatch.setattr(launch, "_round", round_)
    rounds = list(launch.series([spec("fake-honest"), spec("fake-fallback")], rounds=2))
    assert [[r.round["rejected"] for r in one] for one in rounds] == [[True, True], [False, False], [False, False]]
    assert [(p["number"], p["reruns"]) for p in tries] == [(0, 0), (0, 1), (1, 0)]
    # One that stays uneven stands after so many tries, and is not tried for ever.
    tries.clear()
    monkeypatch.setattr(launch, "_round", lambda *a, first: [made("fake-honest", 1.0), made("fake-fallback", 1.2)])
    assert len(list(launch.series([spec("fake-honest"), spec("fake-fallback")], rounds=1))) == 1 + launch.RERUNS


def test_a_spec_that_a_crowd_kept_from_being_timed_is_tried_again(monkeypatch):
    """It says nothing of the stack; a failure is not tried again."""
    tries = []

    def round_(specs, place, timeout, say, *, first):
        tries.append([s.backend for s in specs])
        outcomes = {"fake-honest": "not measured" if len(tries) == 1 else "works", "fake-broken": "failed"}
        return [(Record(spec=s, outcome=outcomes[s.backend]), outcomes[s.backend] == "works") for s in specs]

    monkeypatch.setattr(launch, "_round", round_)
    made = list(launch.series([spec("fake-honest"), spec("fake-broken")], rounds=3))
    assert [[r.outcome for r in one] for one in made] == [["not measured", "failed"], ["works"], ["works"]]
    assert tries == [["fake-honest", "fake-broken"], ["fake-honest"], ["fake-honest"]]


def test_records_come_in_the_order_of_the_specs_whichever_began(monkeypatch):
    """Of two equal stacks nothing else tells the sides apart."""
    began = []

    def round_(specs, place, timeout, say, *, first):
        began.append([s.seed for s in specs])
        return [(Record(spec=s, outcome="works"), True) for s in specs]

    monkeypatch.setattr(launch, "_round", round_)
    pair = [replace(SMALL, seed=1), replace(SMALL, seed=2)]
    assert [[r.spec.seed for r in one] for one in launch.series(pair, rounds=3)] == [[1, 2]] * 3
    assert began == [[1, 2], [2, 1], [1, 2]]


def test_the_turns_balance_what_comes_regularly():
    """Slots of a level, a slope, a curve, and of anything that comes every fourth one, fall on both sides alike."""
    turns = [back for turn in range(32) for back in (launch.backwards(turn), not launch.backwards(turn))]
    side = [1 if back else -1 for back in turns]
    for shape in (lambda i: 1, lambda i: i, lambda i: i * i, *(lambda i, k=k: i % 4 == k for k in range(4))):
        assert sum(s * shape(i) for i, s in enumerate(side)) == 0


def test_no_round_begins_that_would_end_too_late(monkeypatch):
    began = time.monotonic()
    monkeypatch.setattr(
        launch, "_round", lambda *a, first: (time.sleep(0.2), [(Record(spec=SMALL, outcome="works"), True)])[1]
    )
    rounds = list(launch.series([SMALL], rounds=100, deadline=began + 1))
    assert 2 <= len(rounds) <= 5
    assert time.monotonic() - began < 1.1
    assert not list(launch.series([SMALL], rounds=1, deadline=began))


def _descendants(pid):
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_when_the_parent_ends_nothing_is_left_running_and_every_record_is_whole(tmp_path, how):
    """Two kills here; ``benchmarks/kill_records.py`` does many."""
    command = [sys.executable, "-m", "portnet.cli", "measure", "fake-honest", "fake-fallback", "--mode", "infer"]
    command += ["--image-size", "67", "--preset", "paper2012", "--batch", "4", "--quick", "--rounds", "50"]
    rng = random.Random(how)
    with subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell has its background jobs, and all that they start, ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        # Until the first records are there, and then in the middle of something.
        deadline = time.monotonic() + 300
        while len(list(tmp_path.glob("out/*.json"))) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(rng.uniform(0.5, 3))
        children = _descendants(process.pid)
        process.send_signal(how)
        process.wait(timeout=30)
        said = process.stderr.read()
    _, left = psutil.wait_procs(children, timeout=15)
    assert not left
    found, problems = record.read_all([tmp_path / "out"])
    assert len(found) >= 2, said
    assert not problems
