"""Training in several processes beside one: the record, its figures, and what is no figure."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from portnet import assess, lockin, record, scaling, weights
from portnet.cli import main
from portnet.errors import InputError, Unsupported
from portnet.record import Record, Spec
from portnet.report import formats, lockin_page

SPEC = Spec(
    backend="cpu", mode="scale", parallel="towers", processes=2, preset="paper2012", image_size=67, curve_size=67,
    batch=4, blocks=2, quick=True,
)  # fmt: skip


def test_towers_end_to_end(tmp_path):
    """The bytes are the specification's 60,030,976 at batch 128 in float32, where maps have the paper's size."""
    found = scaling.measure(SPEC, rounds=1, timeout=300)
    assert found.outcome == "works", found.reason
    assert 0 < found.gates["agreement"]["error"] < found.gates["agreement"]["allowed"]
    told = found.scaling
    assert (told["collectives"], told["one_device"]) == ("gloo", True)
    assert {n: len(rounds) for n, rounds in told["rounds"].items()} == {"1": 1, "2": 1}
    assert all(len(t["seconds"]) == 2 and t["batch"] == 4 for rounds in told["rounds"].values() for t in rounds)
    # Before fc7 and back, 2048 floats of each image both ways; before fc8 one way.
    assert told["traffic"]["send_recv"] == {"calls": 2, "bytes": 2 * 4 * 2048 * 4}
    assert told["traffic"]["all_gather"]["calls"] == told["traffic"]["reduce_scatter"]["calls"] == 3
    assert set(told["operations"]) == {"all_gather", "reduce_scatter", "send_recv"}
    for timed in told["operations"].values():
        assert [t["bytes"] for t in timed] == list(scaling.SIZES)
        assert all(len(t["seconds"]) == scaling.REPEATS for t in timed)
    assert record.read(found.write(tmp_path)).digest == found.digest


def test_what_is_no_group():
    for wrong in (replace(SPEC, mode="train"), replace(SPEC, processes=1), replace(SPEC, parallel="")):
        with pytest.raises(InputError, match="give a way"):
            scaling.measure(wrong)
    with pytest.raises(InputError, match="two towers take 2 processes, not 4"):
        scaling.measure(replace(SPEC, processes=4))
    with pytest.raises(InputError, match="torchvision"):
        scaling.measure(replace(SPEC, preset="torchvision"))
    with pytest.raises(Unsupported, match=r"no collective operations"):
        scaling.measure(replace(SPEC, backend="reference", precision="float64"))


@pytest.mark.parametrize(
    ("processes", "expected"), [(2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (8, [1, 2, 4, 8]), (6, [1, 2, 4, 6])]
)
def test_the_numbers_of_processes(processes, expected):
    assert scaling.counts(replace(SPEC, processes=processes)) == expected


# The same network.


def trained(by=1.0):
    start = weights.initial(scaling._small(SPEC), SPEC.seed)
    rng = np.random.default_rng(1)
    return {name: (w + by * rng.standard_normal(w.shape) * 1e-3).astype(np.float32) for name, w in start.items()}


def test_agreement():
    assert scaling._agreement(SPEC, trained(), trained())["error"] == 0
    double = scaling._agreement(SPEC, trained(), trained(by=2))
    assert not double["passed"]
    assert double["error"] == pytest.approx(1, rel=0.05)
    lost = trained()
    lost["fc7.weight"] = lost["fc7.weight"] * np.float32(np.nan)
    assert scaling._agreement(SPEC, trained(), lost) == {
        "passed": False, "what": "fc7.weight", "error": 1e300, "allowed": 1e-3,
    }  # fmt: skip


def test_another_network_is_wrong_and_has_no_figure(monkeypatch):
    def run(backend, spec, n, steps, folder, timeout):
        save_file(trained(by=n), folder / scaling.WEIGHTS)
        return {"outcome": "works", "batch": 4, "steps": 1, "seconds": [0.1], "traffic": {}, "operations": {}}

    monkeypatch.setattr(scaling, "_run", run)
    found = scaling.measure(SPEC, rounds=2)
    assert found.outcome == "wrong"
    assert "of its change away from one process's" in found.reason
    assert "rounds" not in found.scaling


# Processes that fail.


def group(code):
    """A backend whose launcher runs that code, with what it was to run as arguments."""
    return SimpleNamespace(launcher=lambda n, restarts: [sys.executable, "-c", code], one_device=True)


@pytest.mark.parametrize(
    ("code", "outcome", "reason"),
    [
        ("print('no such device'); raise SystemExit(3)", "failed", "exit status 3: no such device"),
        ("raise SystemExit(1)", "failed", "exit status 1: it said nothing"),
        ("import time; time.sleep(60)", "timeout", "not done after 2 s"),
        (
            "import json, sys; open(sys.argv[-1] + '/1.json', 'w').write(json.dumps("
            "{'outcome': 'not available', 'reason': 'process 1 has no device'}))",
            "not available",
            "process 1 has no device",
        ),
        # The first has an answer, but another process was lost.
        (
            "import sys; open(sys.argv[-1] + '/0.json', 'w').write('{\"outcome\": \"works\"}'); sys.exit(9)",
            "failed",
            "exit status 9",
        ),
    ],
)
def test_a_group_that_fails(tmp_path, code, outcome, reason):
    told = scaling._run(group(code), SPEC, 2, 1, tmp_path, timeout=2 if "sleep" in code else 60)
    assert told["outcome"] == outcome
    assert reason in told["reason"]


# Figures.


def of(way="data", processes=4, one=(10.0, 11.0), several=(20.0, 33.0), **changes):
    """Two rounds of a process alone and of a group, by images per second."""

    def timed(rates, n):
        return [{"batch": 8 * n, "steps": 2, "seconds": [8 * n * 2 / rate] * 3} for rate in rates]

    told = {
        "collectives": "nccl", "one_device": False, "traffic": {"all_reduce": {"calls": 3, "bytes": 4000}},
        "rounds": {"1": timed(one, 1), str(processes): timed(several, processes)},
        "operations": {
            "all_reduce": [{"bytes": 1000, "seconds": [1e-3]}, {"bytes": 8000, "seconds": [2e-3, 4e-3, 3e-3]}]
        },
    }  # fmt: skip
    made = Record(
        spec=Spec(backend="cuda", mode="scale", parallel=way, processes=processes, batch=8),
        outcome="works",
        device={"name": "Some Device", "vendor": "Some Vendor", "memory": 2**30},
        environment={"date": "2026-11-27T10:00:00+00:00", "host": "a"},
        scaling=told,
    )
    return replace(made, **changes)


def test_bus_bandwidth_is_nccl_tests():
    """Its doc/PERFORMANCE.md: algorithm bandwidth times 2 (n - 1) / n, (n - 1) / n, (n - 1) / n and 1."""
    timed = {"bytes": 8_000_000, "seconds": [1e-3, 2e-3, 100.0]}
    for operation, factor in (("all_reduce", 1.75), ("all_gather", 0.875), ("reduce_scatter", 0.875), ("send_recv", 1)):
        assert lockin.bus_bandwidth(operation, 8, timed) == pytest.approx(factor * 4e9)


def test_efficiency_is_of_each_round():
    (row,) = assess.assess([of()]).scaling
    assert (row.platform, row.way, row.processes, row.batch, row.outcome) == ("cuda", "data", 4, 8, "works")
    assert row.alone.figure == pytest.approx((10 * 11) ** 0.5)
    assert row.together.figure == pytest.approx((20 * 33) ** 0.5)
    assert row.efficiency.figure == pytest.approx((20 / 40 * 33 / 44) ** 0.5)
    assert row.efficiency.low < 0.5 < 0.75 < row.efficiency.high
    assert row.sent.figure == 4000
    assert [(name, value.figure) for name, value in row.bus] == [("all_reduce", pytest.approx(1.5 * 8000 / 3e-3))]


def test_what_works_has_a_row_for_each_group():
    failed = of(outcome="failed", reason="2 processes: no route to host", scaling={"collectives": "nccl"},
                spec=replace(of().spec, processes=8))  # fmt: skip
    seen = assess.assess([of(), failed])
    cells = {name: row["cuda"].outcome for name, row in seen.outcomes.cells.items() if "distributed" in name}
    assert cells == {
        "distributed training: data, 4 processes": "works", "distributed training: data, 8 processes": "failed",
    }  # fmt: skip
    lost = next(row for row in seen.scaling if row.processes == 8)
    assert lost.efficiency.figure is None
    assert lost.outcome == "failed"
    plain = assess.assess([replace(of(), spec=Spec(backend="cuda"), scaling={}, outcome="failed")])
    assert plain.outcomes.cells["distributed training"] == {}
    assert not plain.scaling


def test_a_shared_device_is_a_functional_check():
    for shared, text in ((True, "nccl: a functional check"), (False, "nccl")):
        seen = assess.assess([of(scaling={**of().scaling, "one_device": shared})])
        told = json.loads(formats.to_json(seen))["scaling"]
        assert [row["one_device"] for row in told] == [shared]
        for made in (formats.markdown(seen), lockin_page.render(seen)):
            assert text in made
            assert ("nccl: a functional check" in made) is shared
            assert "4 processes, data, batch 8 each" in made


def test_the_command(monkeypatch, tmp_path):
    runner = CliRunner()
    asked = ["scale", "cuda/bfloat16", "--processes", "4", "--batch", "8", "--out", str(tmp_path)]
    monkeypatch.setattr(scaling, "measure", lambda spec, **_: of(spec=spec, gates={"agreement": {
        "passed": True, "what": "fc8.bias", "error": 1e-5, "allowed": 1e-3}}))  # fmt: skip
    told = runner.invoke(main, asked)
    assert told.exit_code == 0, told.output
    assert "4 processes: 26.5 images/s; efficiency 0.62 (0.50 to 0.75)" in told.stdout
    assert "all_reduce: 3 calls and 4,000 bytes a step" in told.stdout
    assert "functional check" not in told.stdout
    monkeypatch.undo()
    refused = runner.invoke(main, ["scale", "reference", "--out", str(tmp_path)])
    assert refused.exit_code == 1
    assert "not available" in refused.stdout
    assert runner.invoke(main, ["scale", "cpu", "--parallel", "towers", "--processes", "3"]).exit_code == 2
    assert runner.invoke(main, ["scale", "cpu", "--processes", "1"]).exit_code == 2
