"""The answer, on simulated records of four vendors with known ones."""

from dataclasses import replace

import pytest
import simulated

from portnet import assess as assess_room
from portnet import lockin
from portnet import portability as portability_of
from portnet.assess import LATENCY, assess, results
from portnet.assessment import USUAL, Prices
from portnet.errors import InputError
from portnet.record import Record, read

PLATFORMS = ("cuda", "rocm", "mps", "xpu", "tpu")
MADE = simulated.four_vendors()
with simulated.published():
    SEEN = assess(MADE, platforms=PLATFORMS)


@pytest.fixture(autouse=True)
def published():
    with simulated.published():
        yield


def against(seen, platform, mode, precision="bfloat16"):
    return next(
        a for a in seen.against if (a.platform, a.problem.mode, a.problem.precision) == (platform, mode, precision)
    )


def verdict(seen, platform):
    return next(v for v in seen.verdicts if v.platform == platform)


def portability(seen, mode, by, precision="bfloat16"):
    return next(p for p in seen.portability if (p.problem.mode, p.by, p.problem.precision) == (mode, by, precision))


def test_the_simulated_records_are_records_and_say_that_they_are_simulated(tmp_path):
    for one in MADE:
        assert read(one.write(tmp_path)) == one
        assert one.device["name"].startswith("Simulated")


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_the_planted_lock_in_is_found(mode):
    """rocm reaches less than half of what cuda does of a chip that is as fast; the figure's interval holds that."""
    seen = against(SEEN, "rocm", mode)
    for value in (seen.throughput, seen.efficiency):
        assert value.low < simulated.SHARE < value.high
        assert value.high / value.low < 1.1
        assert "not side by side" in value.note


def slowed(record, times):
    """The record, each of its blocks that many times as long."""
    samples = {m: {**t, "seconds": [times * s for s in t["seconds"]]} for m, t in record.samples.items()}
    return replace(record, samples=samples)


@pytest.mark.parametrize(("times", "word"), [(1.0, "high"), (0.65, "moderate"), (0.5, "low")])
def test_the_verdict_follows_what_the_software_reaches_of_its_chip(times, word):
    """rocm is planted at 0.4375 of what cuda reaches; the thresholds are 0.5 and 0.8."""
    made = [slowed(r, times) if r.spec.backend == "rocm" else r for r in MADE]
    assert verdict(assess(made), "rocm").word == word


def test_what_was_not_measured_could_be_worse_than_what_was():
    made = [slowed(r, 0.5) if r.spec.backend == "rocm" else r for r in MADE]
    made = [r for r in made if (r.spec.backend, r.spec.mode) != ("rocm", "train")]
    assert verdict(assess(made), "rocm").word == "not measured"
    # But no better than what is known to be bad.
    assert verdict(assess(made + simulated.failed(simulated.spec("rocm"), "wrong", "x")), "rocm").word == "high"


def test_best_stack_is_held_against_best_stack():
    compiled = [simulated.spec(b, engine="compile") for b in ("cuda", "rocm")]
    made = [*simulated.records(compiled[0], slower=0.9), *simulated.records(compiled[1], slower=2.0)]
    seen = against(assess([*MADE, *made]), "rocm", "infer")
    assert (seen.here, seen.home) == ("rocm/eager/bfloat16", "cuda/compile/bfloat16")
    assert seen.throughput.figure == pytest.approx(simulated.SHARE * 0.9, rel=0.02)


def test_a_slower_chip_is_no_lock_in():
    """mps has a twentieth of the rate, and reaches three quarters of what cuda does of its own chip."""
    seen = against(SEEN, "mps", "infer")
    assert seen.throughput.figure == pytest.approx(0.05 * 0.75, rel=0.02)
    assert seen.efficiency.figure == pytest.approx(0.75, rel=0.02)
    assert verdict(SEEN, "mps").word != "high"


def test_the_planted_fallback_is_found():
    cell = SEEN.outcomes.cells["infer: eager, bfloat16"]["mps"]
    assert cell.outcome == "partial"
    assert "aten::local_response_norm" in cell.reason
    retained = SEEN.outcomes.retained["mps"]
    assert retained.figure == pytest.approx(5 / 7)
    assert "2 more were not tried there" in SEEN.outcomes.retained["xpu"].note


def test_the_planted_wrong_stack_is_found_and_its_speed_is_void():
    (entry,) = [e for e in SEEN.entries if e.figure.outcome == "wrong"]
    assert not entry.best
    assert (entry.platform, entry.rate.figure, entry.efficiency.figure) == ("xpu", None, None)
    assert entry.rate.why.startswith("wrong: norm1")
    assert verdict(SEEN, "xpu").word == "high"
    assert "wrong" in verdict(SEEN, "xpu").deciding[0][0]


def test_the_planted_missing_one_is_not_measured():
    assert SEEN.missing == ("tpu",)
    seen = portability(assess(MADE, platforms=("cuda", "rocm", "tpu")), "infer", "measured ceiling")
    assert (seen.whole.figure, seen.whole.why) == (None, "not measured: tpu")
    assert seen.efficiencies["tpu"].why == "not measured"
    # What is known to be unsupported decides it, whatever else is not known.
    assert portability(SEEN, "infer", "measured ceiling").whole.figure == 0


def test_portability_is_zero_where_one_is_unsupported_and_of_the_others_beside():
    seen = portability(assess(MADE, platforms=("cuda", "rocm", "mps", "xpu")), "infer", "measured ceiling")
    assert seen.whole.figure == 0
    # The harmonic mean of what was planted.
    assert seen.supported.figure == pytest.approx(3 / (1 / 0.8 + 1 / 0.35 + 1 / 0.6), rel=0.01)
    seen = portability(assess(MADE, platforms=("cuda", "rocm")), "infer", "measured ceiling")
    assert seen.whole.figure == pytest.approx(2 / (1 / 0.8 + 1 / 0.35), rel=0.01)
    assert 1.005 < seen.whole.high / seen.whole.low < 1.05
    assert [c[0] for c in seen.cascade] == ["cuda", "rocm"]


@pytest.mark.parametrize("gone", ["cuda", "rocm", "mps"])
def test_without_its_records_a_figure_is_not_measured_and_never_zero(gone):
    seen = assess(simulated.without(MADE, gone), platforms=PLATFORMS)
    assert gone in seen.missing
    if gone == "cuda":
        assert seen.home is None
        assert (seen.verdicts, seen.against) == ([], [])
        assert {e.relative.why for e in seen.entries if e.rate.figure} == {"cuda was not measured"}
        assert all(v.figure is None for v in seen.outcomes.retained.values())
    else:
        assert not [a for a in seen.against if a.platform == gone]
    value = portability(seen, "infer", "measured ceiling").efficiencies[gone]
    assert (value.figure, value.why) == (None, "not measured")


def test_a_platform_that_was_never_reached_is_not_unsupported():
    """That a device is not there says nothing of what its software can do."""
    absent = Record(spec=simulated.spec("xpu", mode="train"), outcome="not available", reason="no device")
    made = [*simulated.without(MADE, "xpu"), absent, replace(absent, spec=simulated.spec("xpu"))]
    seen = assess(made, platforms=("cuda", "xpu"))
    assert portability(seen, "infer", "measured ceiling").whole.figure is None
    assert seen.outcomes.retained["xpu"].figure is None
    assert verdict(seen, "xpu").word == "not measured"


def test_the_ablation_is_by_the_rounds_shared_with_the_whole_stack():
    seen = {s.layer: s.slowdown for s in SEEN.ablation}
    for layer, planted in simulated.WITHOUT.items():
        assert seen[layer].low < planted < seen[layer].high
    apart = [replace(r, round={**r.round, "series": "another"}) if r.spec.without else r for r in MADE]
    assert {s.slowdown.figure for s in assess(apart).ablation} == {None}
    libraries = next(layer for layer in SEEN.stack if layer.name == "libraries")
    assert libraries.values["cuda"].note.startswith("without cudnn")
    assert libraries.values["rocm"].figure is None


def test_the_open_division_is_not_held_against_the_closed_one():
    fast = simulated.records(simulated.spec("rocm", division="open", engine="graph"), slower=0.5)
    seen = assess([*MADE, *fast])
    entry = next(e for e in seen.entries if not e.closed)
    assert (entry.relative.figure, entry.application.figure) == (None, 1.0)
    assert against(seen, "rocm", "infer").throughput.figure == pytest.approx(simulated.SHARE, rel=0.02)
    # But on its own platform it is the best there is.
    closed = next(e for e in seen.entries if e.platform == "rocm" and e.closed and e.problem == entry.problem)
    assert closed.application.figure == pytest.approx(0.5, rel=0.02)


def test_several_devices_of_a_backend_are_several_platforms():
    other = [
        replace(r, device={**r.device, "name": "Simulated CUDA 2"}, round={**r.round, "series": "another"})
        for r in simulated.records(simulated.spec("cuda"), slower=2.0)
    ]
    # Which of them would be left decides everything; no count of records may.
    with pytest.raises(InputError, match="cuda on Simulated CUDA 1, cuda on Simulated CUDA 2"):
        assess([*MADE, *other])
    seen = assess([*MADE, *other], home="cuda on Simulated CUDA 2")
    assert [p.name for p in seen.platforms][:1] == ["cuda on Simulated CUDA 1"]
    assert seen.home == "cuda on Simulated CUDA 2"
    # By that name it is known where there is one of them, too.
    assert assess(MADE, home="cuda on Simulated CUDA 1").home == "cuda"
    # What was lost before its device was known is no platform of its own.
    lost = Record(spec=simulated.spec("cuda", engine="graph"), outcome="failed", reason="it broke")
    seen = assess([*MADE, *other, lost], home="cuda on Simulated CUDA 1")
    assert len([p for p in seen.platforms if p.backend == "cuda"]) == 2
    assert any("on a device that was not found out" in p for p in seen.problems)


def test_without_an_instruction_set_a_processor_is_the_same_one():
    """Its name tells what it can do; the ladder is of one device all the same."""
    ladder = [r for r in MADE if r.round["series"] == "simulated-ladder"]
    renamed = [replace(r, device={**r.device, "name": "Simulated, less"}) if r.spec.without else r for r in ladder]
    seen = assess(renamed)
    assert [p.name for p in seen.platforms] == ["cuda"]
    assert {s.slowdown.figure is None for s in seen.ablation} == {False}


def test_figures_are_those_of_the_process_that_has_them_in_whatever_order_they_are_read():
    one, other = assess(MADE[::-1]), SEEN
    assert one.outcomes.retained.keys() == other.outcomes.retained.keys()
    for platform, value in other.outcomes.retained.items():
        assert one.outcomes.retained[platform].figure == value.figure
    runtime = [next(x for x in seen.stack if x.name == "runtime").values["cuda"].note for seen in (one, other)]
    assert all(note.startswith("cuda/eager/bfloat16, empty caches") for note in runtime)


def test_side_by_side_where_it_was():
    """Two stacks of one series are compared by their rounds, whose shared drift cancels."""
    drift = [1.0, 1.5, 1.0, 0.7, 1.3, 1.0]

    def made(backend):
        return [
            slowed(r, d) for r, d in zip(simulated.records(simulated.spec(backend), series="one"), drift, strict=True)
        ]

    seen = against(assess([*made("cuda"), *made("rocm")]), "rocm", "infer")
    assert (seen.throughput.note, seen.throughput.figure) == ("side by side", pytest.approx(simulated.SHARE, rel=0.02))
    assert seen.throughput.high / seen.throughput.low < 1.1
    assert seen.efficiency.high / seen.efficiency.low > 1.5


def test_costs_are_by_the_users_prices_and_under_the_bound(tmp_path):
    path = tmp_path / "prices.toml"
    path.write_text('currency = "EUR"\n[hour]\n"Simulated CUDA 1" = 3.6\nmps = 0.36\n')
    seen = assess(MADE, prices=Prices.read(path), latency=0.03)
    cost = next(c for c in seen.costs if c.stack == "cuda/eager/bfloat16")
    # 0.001 EUR a second; at batch 256, of which an answer takes 26.6 ms, 9,624 images a second.
    assert cost.million.figure == pytest.approx(0.001 / (256 / 0.0266) * 1e6)
    assert "batch 256" in cost.million.note
    rate = next(e.rate for e in seen.entries if e.stack == cost.stack and e.problem.mode == "train")
    assert cost.training.figure == pytest.approx(1_281_167 * 90 / rate.figure * 0.001)
    assert cost.training.low == pytest.approx(1_281_167 * 90 / rate.high * 0.001)
    rocm = next(c for c in seen.costs if c.stack == "rocm/eager/bfloat16")
    assert (rocm.million.figure, rocm.million.why) == (None, "no price of rocm was given")
    for bound, why in ((1e-6, "a single image takes up to 0.002 s"), (2e-3, "no batch")):
        made = [
            replace(r, serving={**r.serving, "sweep": {"256": r.serving["sweep"]["256"]}}) if r.serving else r
            for r in MADE
        ]
        assert why in next(c for c in assess(made, latency=bound).costs if c.platform == "cuda").million.why
    assert assess(MADE).latency == LATENCY


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "currency = 1\nhour = 3",
        '[hour]\na = "x"',
        'currency = "EUR"\n[hour]\na = -1',
        'currency = "EUR"\n[hour]\na = nan',
    ],
)
def test_prices_that_make_no_sense_are_refused(tmp_path, text):
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"prices\.toml"):
        Prices.read(path)
    with pytest.raises(InputError, match="cannot be read"):
        Prices.read(tmp_path / "none.toml")


def test_energy_is_told_with_its_sensors_class():
    energy = {"joules": 10.0, "sensor": "NVML", "class": "counter"}
    made = [
        replace(r, watch={**r.watch, "energy": energy}, times={**r.times, "energy_images": 1000})
        if (r.spec.backend, r.spec.mode, r.round["number"]) == ("cuda", "train", 0)
        else r
        for r in MADE
    ]
    costs = {c.stack: c for c in assess(made).costs}
    assert costs["cuda/eager/bfloat16"].joules.figure == pytest.approx(0.01)
    assert costs["cuda/eager/bfloat16"].sensor == "NVML (counter)"
    assert costs["rocm/eager/bfloat16"].joules.why == "no sensor"
    # Not there, and why; or there, in the other mode.
    without = [
        replace(r, watch={**r.watch, "energy": {"reason": "Zeus is not installed"}}) if r.spec.backend == "rocm" else r
        for r in made
    ]
    costs = {c.stack: c for c in assess(without).costs}
    assert costs["rocm/eager/bfloat16"].joules.why == "Zeus is not installed"
    assert costs["cuda/eager/float32"].joules.why == "training was not measured"


def test_the_application_layer_is_by_the_lines_that_ran():
    told = {"platforms": {"cuda": {"lines": 900, "own": 40}, "rocm": {"lines": 880, "own": None}}}
    layer = assess(MADE, divergence=told).stack[0]
    assert (layer.values["cuda"].figure, layer.values["cuda"].note) == (40, "of 900 that run")
    assert layer.values["rocm"].figure is None
    assert SEEN.stack[0].values["cuda"].figure is None


def test_every_figure_names_the_records_behind_it():
    known = {r.digest for r in MADE}
    values = [v for e in SEEN.entries for v in (e.rate, e.relative, e.efficiency)]
    values += [v for a in SEEN.against for v in (a.throughput, a.efficiency)]
    values += [s.slowdown for s in SEEN.ablation] + [v for n in SEEN.numerics for v in (n.gate, n.logits)]
    for value in values:
        if value.figure is not None:
            assert value.records
            assert set(value.records) <= known


def test_numbers_are_told_by_the_gate_and_the_worst_tensor():
    seen = next(n for n in SEEN.numerics if n.stack == "cuda/eager/bfloat16")
    assert (seen.gate.figure, seen.logits.figure, seen.worst) == (pytest.approx(0.25), 1e-3, "infer() fc8")
    assert seen.loss.why == "no float64 reference of the same training"
    assert seen.repeats.figure is None


def test_whether_runs_repeat_bit_for_bit_is_told_and_counts_as_a_feature():
    lost = ["conv1.weight", "fc6.bias"]
    told = {"cuda": {"equal": True, "differing": []}, "rocm": {"equal": False, "differing": lost}}

    def with_gate(r):
        gate = told.get(r.spec.backend) if r.spec.mode == "train" and r.round["number"] == 0 else None
        return replace(r, gates={**r.gates, "repeats": gate}) if gate else r

    seen = assess([with_gate(r) for r in MADE])
    rows = {n.platform: n.repeats for n in seen.numerics if n.problem.mode == "train"}
    assert (rows["cuda"].figure, rows["rocm"].figure, rows["mps"].figure) == (1, 0, None)
    assert rows["rocm"].note == "2 tensors differ, conv1.weight among them"
    row = seen.outcomes.cells["train: runs repeat bit for bit"]
    assert {name: cell.outcome for name, cell in row.items()} == {"cuda": "works", "rocm": "missing"}
    assert seen.outcomes.cells["infer: runs repeat bit for bit"] == {}
    before, after = (x.outcomes.retained["rocm"].note.partition(" of ")[0::2] for x in (SEEN, seen))
    assert int(after[0]) == int(before[0]), "what rocm lost is not kept"
    assert after[1].startswith(str(int(before[1].split()[0]) + 1)), "and is counted"


def test_the_reference_is_no_platform():
    oracle = simulated.spec("cuda", precision="float64")
    made = [replace(r, spec=replace(oracle, backend=lockin.ORACLE)) for r in simulated.records(oracle, rounds=1)]
    assert lockin.ORACLE not in [p.name for p in assess([*MADE, *made]).platforms]


def rocm(times, **more):
    """Two vendors of which rocm takes that many times as long as was planted; at its share it does what cuda does."""
    made = [r for r in MADE if r.spec.backend in ("cuda", "rocm")]
    return [replace(slowed(r, times), **more) if r.spec.backend == "rocm" else r for r in made]


def test_a_poor_matrix_library_is_no_low_lock_in():
    """By ceilings that its own library measured it looks efficient; by what its vendor publishes it does not."""
    known = {"cuda": "NVIDIA H200", "rocm": "AMD Instinct MI300X"}
    made = [replace(r, device={**r.device, "name": known[r.spec.backend], "memory": None}) for r in rocm(1.0)]
    made = [
        replace(r, ceilings={k: v * simulated.SHARE for k, v in r.ceilings.items()}) if r.spec.backend == "rocm" else r
        for r in made
    ]
    seen = assess(made)
    assert against(seen, "rocm", "infer").efficiency.figure == pytest.approx(1, rel=0.02)
    assert against(seen, "rocm", "infer").published.figure < 0.5
    assert verdict(seen, "rocm").word == "high"


def test_without_a_published_peak_no_lock_in_is_low():
    """A matrix library that reaches a tenth of its chip looks as good as any by its own ceilings."""
    made = [
        replace(r, device={**r.device, "name": "Simulated, unpublished"}) if mine(r) else r
        for r in rocm(simulated.SHARE)
    ]
    seen = verdict(assess(made), "rocm")
    assert seen.word == "not measured"
    assert [v.why for what, v in seen.deciding if "published" in what] == ["rocm: its published peak is not known"] * 2
    # What is known speaks all the same.
    assert verdict(assess([slowed(r, 1.5) if mine(r) else r for r in made]), "rocm").sentence.startswith("Some of what")
    assert verdict(assess([slowed(r, 4.0) if mine(r) else r for r in made]), "rocm").word == "high"


def test_a_batch_at_which_all_fails_is_lost():
    """Though the same stack works at another: no cell of the outcomes shows it."""
    big = [r for b in ("cuda", "rocm") for r in simulated.records(simulated.spec(b, batch=512))]
    well = [slowed(r, simulated.SHARE) if mine(r) else r for r in big]
    assert verdict(assess([*rocm(simulated.SHARE), *well]), "rocm").word == "low"
    broken = simulated.failed(simulated.spec("rocm", batch=512), "failed", "illegal memory access")
    seen = assess([*rocm(simulated.SHARE), *(r for r in big if not mine(r)), *broken])
    assert verdict(seen, "rocm").word == "moderate"
    assert ("infer, bfloat16, batch 512: no stack does it", "failed: illegal memory access") in [
        (what, v.why) for what, v in verdict(seen, "rocm").deciding
    ]


def later(records, **more):
    """The same by newer software, in a series of its own."""
    return [
        replace(
            r,
            device={**r.device, "versions": {"torch": "new"}},
            environment={**r.environment, "date": "2026-06-02T03:04:05+00:00"},
            round={**r.round, "series": f"new {r.round['series']}"},
            **more,
        )
        for r in records
    ]


def test_what_newer_software_did_takes_the_place_of_what_older_did():
    made = rocm(simulated.SHARE)
    ours = [r for r in made if mine(r) and r.spec.mode != "serve" and r.spec.precision == "bfloat16"]
    # It broke: what the older did before is no comfort.
    broken = later(ours, outcome="failed", reason="it broke", samples={})
    seen = assess([*made, *broken])
    assert verdict(seen, "rocm").word == "high"
    assert seen.outcomes.cells["train: eager, bfloat16"]["rocm"].outcome == "failed"
    # It was mended: what was wrong before is no reproach. Both stand in the table of stacks.
    wrong = [replace(r, outcome="wrong", reason="x", samples={}) for r in ours]
    others = [r for r in made if r not in ours]
    seen = assess([*others, *wrong, *later(ours)])
    assert verdict(seen, "rocm").word == "low"
    assert {e.figure.outcome for e in seen.entries if e.platform == "rocm"} == {"wrong", "works"}
    # Nothing was tried: that is no news.
    absent = later(ours, outcome="not available", reason="no device")
    absent = [replace(r, device={}) for r in absent]
    assert verdict(assess([*made, *absent]), "rocm").word == "low"


def test_performance_portability_is_over_the_set_that_was_named():
    """Home stands beside it, and is not in it."""
    seen = portability(assess(MADE, platforms=("rocm", "mps")), "infer", "measured ceiling")
    assert set(seen.efficiencies) == {"rocm", "mps"}
    assert seen.whole.figure == pytest.approx(2 / (1 / 0.35 + 1 / 0.6), rel=0.01)
    assert "named beforehand" not in seen.whole.note
    assert "named beforehand" in portability(assess(rocm(1.0)), "infer", "measured ceiling").whole.note


def test_application_efficiency_names_the_stack_that_it_is_a_share_of():
    fast = [
        replace(r, spec=replace(r.spec, engine="compile", quick=True))
        for r in simulated.records(simulated.spec("rocm"), slower=0.5, rounds=1)
    ]
    seen = assess([*MADE, *fast])
    entry = next(e for e in seen.entries if e.stack == "rocm/eager/bfloat16" and e.problem.mode == "infer")
    assert entry.application.figure == pytest.approx(0.5, rel=0.03)
    assert fast[0].digest in entry.application.records
    assert "quick" in entry.application.note
    value = portability(seen, "infer", "application").efficiencies["rocm"]
    assert (fast[0].digest in value.records, "quick" in value.note) == (True, True)


def test_a_rung_below_the_libraries_is_no_library():
    rung = simulated.records(simulated.spec("cuda", without=("direct",)), slower=300.0, series="simulated-ladder")
    seen = assess([*MADE, *rung])
    assert next(s for s in seen.ablation if s.layer == "direct").slowdown.figure == pytest.approx(300, rel=0.05)
    assert next(x for x in seen.stack if x.name == "libraries").values["cuda"].note.startswith("without cudnn")


def test_the_ablation_names_the_whole_stack_too():
    for share in SEEN.ablation:
        specs = {r.spec.without for r in MADE if r.digest in share.slowdown.records}
        assert specs == {(), (share.layer,)}


def test_a_lost_process_takes_no_figure_of_the_others():
    """In whatever order their files are read."""
    prices = Prices(currency="EUR", hour={"cuda": 1.0})
    served = [replace(simulated.serving("cuda")[0], round={"series": "s", "number": n}) for n in range(3)]
    lost = replace(served[0], outcome="not measured", reason="crowded", serving={}, device={})
    for made in ([lost, *served[1:]], [*served[1:], lost]):
        (cost,) = [c for c in assess(made, home="cuda", prices=prices).costs if c.stack == "cuda/eager/bfloat16"]
        assert cost.million.figure is not None


def test_costs_count_whole_answers():
    """A device that has its pictures already is quicker than one that has to be given them."""
    prices = Prices(currency="EUR", hour={"cuda": 3.6})

    def cost(answer):
        (r,) = simulated.serving("cuda")
        timed = {"steps": 1, "seconds": [0.001] * 3, "latencies": [answer] * 3}
        made = replace(r, serving={**r.serving, "sweep": {"64": timed}})
        seen = assess([made], prices=prices)
        assert seen.serving[0].sweep == [pytest.approx((64, 0.001, 64000, answer))]
        return seen.costs[0].million

    assert cost(0.01).figure == pytest.approx(0.001 / (64 / 0.01) * 1e6)
    assert cost(0.01).note.startswith("batch 64")
    assert cost(0.2).why == "no batch was answered within 0.1 s"


def test_unlike_work_is_told_apart():
    small = [replace(r, spec=replace(r.spec, image_size=67)) for r in simulated.serving("cuda")]
    seen = assess([*MADE, *small])
    assert len({s.work for s in seen.serving if s.platform == "cuda"}) == 2
    (big,) = [n for n in SEEN.numerics if n.stack == "cuda/eager/bfloat16" and n.problem.mode == "train"]
    assert big.problem.batch == 128
    # What is tuned for one vendor costs what it costs, in a row of nobody.
    opened = simulated.records(simulated.spec("cuda", mode="train", division="open"), slower=0.1)
    prices = Prices(currency="EUR", hour={"cuda": 1.0})
    assert assess([*MADE, *opened], prices=prices).costs[0].training == assess(MADE, prices=prices).costs[0].training


def test_an_efficiency_above_its_ceiling_judges_nothing():
    made = [replace(r, ceilings={k: v / 10 for k, v in r.ceilings.items()}) for r in rocm(simulated.SHARE)]
    seen = against(assess(made), "rocm", "infer").efficiency
    assert (seen.figure, "which so is none" in seen.why) == (None, True)
    assert verdict(assess(made), "rocm").word == "not measured"


@pytest.mark.parametrize("outcome", ["failed", "timeout", "out of memory"])
def test_a_mode_that_fails_is_high_lock_in(outcome):
    made = [r for r in rocm(simulated.SHARE) if (r.spec.backend, r.spec.mode) != ("rocm", "train")]
    seen = verdict(
        assess([*made, *simulated.failed(simulated.spec("rocm", mode="train"), outcome, "it broke")]), "rocm"
    )
    assert seen.word == "high"
    assert [v.why for name, v in seen.deciding if "no stack does it" in name] == [f"{outcome}: it broke"]


def test_what_a_backend_does_not_offer_on_a_device_that_is_there_is_lost():
    """`not available` with a device is the software's; without one it says nothing of it."""
    made = [r for r in rocm(simulated.SHARE) if (r.spec.backend, r.spec.mode) != ("rocm", "train")]
    lacks = simulated.failed(simulated.spec("rocm", mode="train"), "not available", "rocm does not train")
    seen = assess([*made, *lacks])
    assert seen.outcomes.cells["train: eager, bfloat16"]["rocm"].outcome == "missing"
    assert seen.outcomes.retained["rocm"].figure < 1
    assert verdict(seen, "rocm").word == "high"
    assert portability(seen, "train", "measured ceiling").whole.figure == 0
    absent = [replace(r, device={}) for r in lacks]
    assert verdict(assess([*made, *absent]), "rocm").word == "not measured"


def test_no_further_problem_makes_the_verdict_better():
    """Neither one on which the platform does well, nor a smaller network, of which more images pass in a second."""
    # Bad at inference alone.
    made = [
        slowed(r, 1.2 / simulated.SHARE) if mine(r) and r.spec.mode == "infer" else r for r in rocm(simulated.SHARE)
    ]
    assert verdict(assess(made), "rocm").word == "high"
    for more in ({"batch": 1}, {"image_size": 67}, {"precision": "float32", "batch": 1}):
        well = [
            r
            for b in ("cuda", "rocm")
            for r in simulated.records(simulated.spec(b, **more), slower=0.5 if b == "rocm" else 1.0)
        ]
        assert verdict(assess([*made, *well]), "rocm").word == "high"


def test_leaving_out_failures_makes_no_verdict_better():
    made = [r for r in rocm(simulated.SHARE) if r.spec.mode != "serve" or r.spec.backend == "cuda"]
    assert verdict(assess(made), "rocm").word == "not measured"
    assert verdict(assess(rocm(simulated.SHARE)), "rocm").word == "low"


def test_wrong_is_not_hidden_by_another_work_another_division_or_another_mode():
    made = rocm(simulated.SHARE)
    for more in ({"image_size": 67}, {"mode": "serve", "batch": 16}):
        wrong = simulated.failed(simulated.spec("rocm", **more), "wrong", "x")
        assert verdict(assess([*made, *wrong]), "rocm").word == "high"
    # What is tuned for one vendor is held against nobody's.
    opened = simulated.failed(simulated.spec("rocm", division="open"), "wrong", "x")
    assert verdict(assess([*made, *opened]), "rocm").word == "low"
    at_home = simulated.failed(simulated.spec("cuda", engine="graph"), "wrong", "x")
    both = [*at_home, *simulated.failed(simulated.spec("rocm", engine="graph"), "wrong", "x")]
    assert verdict(assess([*made, *both]), "rocm").word == "low"


@pytest.mark.parametrize(("spread", "word"), [(1.0, "low"), (1.2, "moderate"), (4.0, "not measured")])
def test_the_whole_interval_decides(spread, word):
    """At about 0.85 of what home reaches, with processes further and further apart."""
    made = [slowed(r, 1.18 * spread ** (r.round["number"] % 2 - 0.5)) if mine(r) else r for r in rocm(simulated.SHARE)]
    assert verdict(assess(made), "rocm").word == word


def mine(record):
    return record.spec.backend == "rocm"


def test_a_verdict_needs_an_interval():
    made = [r for r in rocm(simulated.SHARE) if r.round["number"] == 0]
    assert verdict(assess(made), "rocm").word == "not measured"


def test_quick_figures_do_not_displace_others_and_partial_is_said():
    quick = [
        replace(slowed(r, 0.1), spec=replace(r.spec, quick=True))
        for r in rocm(simulated.SHARE)
        if r.spec.backend == "rocm"
    ]
    seen = assess([*rocm(simulated.SHARE), *quick])
    assert against(seen, "rocm", "infer").throughput.figure == pytest.approx(1, rel=0.02)
    assert seen.quick
    assert "partial" in against(SEEN, "mps", "infer").throughput.note


def test_home_is_held_against_whether_it_was_asked_for_or_not():
    assert assess(MADE, platforms=("rocm",)).home == "cuda"
    assert [v.platform for v in assess(MADE, platforms=("rocm",)).verdicts] == ["rocm"]


def test_the_newest_software_is_the_platforms():
    old = [
        replace(
            slowed(r, 0.1),
            device={**r.device, "versions": {"torch": "old"}},
            environment={**r.environment, "date": "2020-01-02T03:04:05+00:00"},
            round={**r.round, "series": f"old {r.round['series']}"},
        )
        for r in rocm(simulated.SHARE)
        if r.spec.backend == "rocm"
    ]
    for made in ([*rocm(simulated.SHARE), *old], [*old, *rocm(simulated.SHARE)]):
        seen = assess(made)
        assert against(seen, "rocm", "infer").throughput.figure == pytest.approx(1, rel=0.02)
        assert next(p for p in seen.platforms if p.backend == "rocm").software == {"torch": "0.0.simulated"}


def test_costs_do_not_depend_on_the_order_of_records():
    prices = Prices(currency="EUR", hour={"cuda": 1.0})
    small = simulated.records(simulated.spec("cuda", mode="train", batch=1))
    one, other = (assess(made, prices=prices).costs[0] for made in ([*MADE, *small], [*small, *MADE]))
    assert one.training == other.training
    assert "batch 128, 10 classes, 227 pixels" in one.training.note


def test_what_others_did_meanwhile_is_said_beside_the_figure():
    busy = {"foreign_cpu": {"foreign": 1.5, "of": 2}}
    made = [replace(r, watch={**r.watch, **busy}) for r in rocm(simulated.SHARE)]
    assert "others kept busy" in assess(made).entries[0].rate.note
    assert "others kept busy" not in SEEN.entries[0].rate.note


def test_work_that_is_not_the_usual_one_is_named():
    assert assess_room._work(simulated.Spec(backend="")) == USUAL
    seen = assess(simulated.records(simulated.spec("cuda", image_size=67)))
    assert seen.entries[0].problem.label == "infer, bfloat16, batch 128, caffe, 67 pixels, 10 classes, digits"
    assert SEEN.entries[0].problem.label == "train, bfloat16, batch 128"


def test_a_machine_that_was_crowded_for_a_while_voids_no_series():
    made = rocm(simulated.SHARE)
    i = next(i for i, r in enumerate(made) if r.spec.backend == "rocm")
    made[i] = replace(made[i], outcome="not measured", reason="others kept 1.5 of 2 processors busy", samples={})
    assert against(assess(made), "rocm", made[i].spec.mode).throughput.figure == pytest.approx(1, rel=0.02)
    # Not even where all but one process met it: the figure is then of one.
    all_but_one = [
        replace(r, outcome="not measured", reason="crowded", samples={}) if mine(r) and r.round["number"] else r
        for r in made
    ]
    seen = against(assess(all_but_one), "rocm", "infer").throughput
    assert (seen.figure, seen.low) == (pytest.approx(1, rel=0.05), None)


@pytest.mark.parametrize(
    "broken",
    [
        {"layers": {"a": {"forward": 1}}},
        {"layers": {"a": {"flops": 0, "bytes": 0}}},
        {"layers": {"a": {"flops": 1e300, "bytes": 1e300}}, "ceilings": {"flops": 1e-9, "bandwidth": 1e-9}},
        {"gates": {"trend": {"change": -5, "low": -6, "high": -4}}},
        {"serving": {"sweep": {"x": {"steps": 1, "seconds": [1.0]}}}, "spec": simulated.spec("rocm", mode="serve")},
        {"device": {"name": "Simulated ROCM 1", "versions": ["torch"]}},
        {"round": {}},
        {"round": {"number": 0}},
        {"round": {"series": "simulated-ladder"}},
        {"watch": {"energy": [1]}},
        {"times": {"total": [1.0]}},
        {"training": {"perturbed": [[1.0]]}},
    ],
)
def test_a_record_that_makes_no_sense_spoils_no_report(broken):
    """It is left out and named, or does no harm; the others' figures stand."""
    odd = replace(simulated.records(simulated.spec("rocm", engine="compile"), rounds=1)[0], **broken)
    seen = assess([*MADE, odd], platforms=("cuda", "rocm"))
    assert against(seen, "rocm", "infer").efficiency.figure is not None
    assert all(odd.digest in p for p in seen.problems)
    # And with its like on the other side.
    twin = replace(odd, spec=replace(odd.spec, backend="cuda"), device={**odd.device, "name": "Simulated CUDA 1"})
    assert against(assess([*MADE, odd, twin], platforms=("cuda", "rocm")), "rocm", "infer").efficiency.figure


def test_results_are_what_the_p3_analysis_library_reads():
    """PP of its rows is PP of the report; what failed is unsupported, and what is open or not measured is left out."""
    opened = simulated.records(simulated.spec("rocm", division="open", engine="graph"))
    found = results(assess([*MADE, *opened]))
    assert portability_of.read_performance(portability_of.performance_csv(found)) == found
    rows = {(r.problem.split(", c")[0], r.platform): r for r in found}
    assert {r.application for r in found} == {"eager/bfloat16", "eager/float32"}
    rate = next(e.rate.figure for e in SEEN.entries if e.platform == "rocm" and e.problem.mode == "train")
    assert rows["train, bfloat16, batch 128", "rocm"].fom == rate
    assert rows["infer, bfloat16, batch 128", "xpu"].fom == portability_of.UNSUPPORTED
    assert ("train, bfloat16, batch 128", "xpu") not in rows
    # Of a stack's full and quick records the full ones count.
    quick = [replace(slowed(r, 0.1), spec=replace(r.spec, quick=True)) for r in MADE if r.spec.mode != "serve"]
    assert results(assess([*MADE, *quick])) == results(assess(MADE))


def test_of_nothing_there_is_no_report():
    with pytest.raises(InputError, match="no record"):
        assess([])
