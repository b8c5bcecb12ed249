"""Which figures moved between two sets of records. All records here are simulated; no device made them."""

import json
from dataclasses import replace
from math import exp, log, sqrt
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from portnet import cli, difference, stats
from portnet.errors import InputError
from portnet.record import Record, Spec

SPEC = Spec(backend="cuda", mode="train", batch=128)


def simulated(
    *seconds: float,
    spec: Spec = SPEC,
    versions: str = "1",
    host: str = "simulated",
    device: str = "a simulated device",
    series: str = "",
    outcome: str = "works",
    probe: float = 0.01,
    first: int = 0,
    **more: object,
) -> list[Record]:
    """Simulated processes of one stack, whose median steps took so long; each with one block out of line."""
    timed = outcome in ("works", "partial") and spec.mode != "serve"
    return [
        Record(
            **{
                "spec": spec,
                "outcome": outcome,
                "reason": "" if outcome == "works" else f"simulated as {outcome}",
                "device": {"name": device, "versions": {"torch": versions}} if device else {},
                "environment": {"host": host, "versions": {"numpy": "2"}, "python": "3.11", "cold_caches": i == 0},
                "round": {
                    "series": series or f"simulated {versions}",
                    "number": first + i,
                    "rejected": False,
                    "probe": [probe * (1 + 0.001 * i)] * 3,
                },
                "samples": {spec.mode: {"batch": 128, "steps": 2, "seconds": [2 * s, 2 * s, 20 * s]}} if timed else {},
                "gates": {"parity": {"findings": [{"what": "infer() fc8", "error": 1e-7, "allowed": 1e-6}]}},
                **more,
            }
        )
        for i, s in enumerate(seconds)
    ]


def pair(old: list[Record], new: list[Record]) -> difference.Pair:
    found = difference.difference(old, new)
    assert (found.gone, found.new, found.mixed) == ((), (), ())
    (only,) = found.pairs
    return only


def figure(of: difference.Pair, name: str) -> difference.Change:
    return next(c for c in of.changes if c.name == name)


def speed(old: list[Record], new: list[Record]) -> difference.Change:
    return figure(pair(old, new), "speed")


# Welch's interval.


def test_welch_by_hand():
    # Logs -/+ 0.1 and -/+ 0.3 about 0 and log 2: variances 0.02 and 0.18 of two each.
    found = stats.welch([exp(-0.1), exp(0.1)], [2 * exp(-0.3), 2 * exp(0.3)])
    error = sqrt(0.01 + 0.09)
    freedom = 0.1**2 / (0.01**2 + 0.09**2)
    from scipy.stats import t

    reach = float(t.ppf(0.975, freedom)) * error
    assert (found.ratio, found.low, found.high) == pytest.approx((2, 2 * exp(-reach), 2 * exp(reach)))
    assert (found.rounds, found.verdict) == (0, "inconclusive")


@pytest.mark.parametrize("value", [1.23e9, 0.1, 7.7, 3e-5, 1e300])
@pytest.mark.parametrize("counts", [(2, 10), (3, 7), (10, 9)])
def test_equal_values_are_equivalent_however_their_logarithms_round(value, counts):
    found = stats.welch(*([value] * count for count in counts))
    assert (found.verdict, found.ratio) == ("equivalent", pytest.approx(1, rel=1e-12))


def test_welch_is_scipys():
    from scipy.stats import ttest_ind

    rng = np.random.default_rng(3)
    for sizes in ((5, 5), (3, 10), (10, 4)):
        a, b = (np.exp(s * rng.standard_normal(n)) for s, n in zip((0.02, 0.05), sizes, strict=True))
        ends = ttest_ind(np.log(b), np.log(a), equal_var=False).confidence_interval(0.95)
        found = stats.welch(a.tolist(), b.tolist())
        assert (log(found.low), log(found.high)) == pytest.approx(tuple(ends))


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([1.0, 1.01, 0.99], [2.0, 2.01, 1.99], "different"),
        ([1.0, 1.001, 0.999], [1.0, 1.001, 0.999], "equivalent"),
        ([1.0, 1.1, 0.9], [1.0, 1.1, 0.9], "inconclusive"),
        ([1.0, 1.0], [1.0, 1.0], "equivalent"),
        ([1.0, 1.0], [1.01, 1.01], "different"),
        ([1.0], [2.0, 2.0], "inconclusive"),
        ([1.0, 1.0], [2.0], "inconclusive"),
        ([1.0], [1.0], "inconclusive"),
    ],
)
def test_welchs_verdicts(a, b, verdict):
    found = stats.welch(a, b)
    assert (found.verdict, found.low is None) == (verdict, min(len(a), len(b)) == 1)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_time_is_refused(wrong):
    with pytest.raises(InputError, match=r"b\[1\] is"):
        stats.welch([1.0], [1.0, wrong])
    with pytest.raises(InputError, match="one number or more"):
        stats.welch([], [1.0])


def test_ends_beyond_all_floats():
    found = stats.welch([1e-200, 1e200], [1e-200, 1e200])
    assert found.verdict == "inconclusive"
    assert 0 <= found.low < 1 < found.high
    assert stats.interval([1e-200, 1e200]).high > 1e200


@pytest.mark.parametrize(
    ("sizes", "noise"),
    [((5, 5), (0.02, 0.02)), ((10, 10), (0.02, 0.02)), ((5, 10), (0.02, 0.05)), ((10, 5), (0.02, 0.05))],
)
def test_a_against_a(sizes, noise):
    """4,000 comparisons of equals: 3 to 7% are different, also where the sides scatter unequally."""
    rng = np.random.default_rng(7)
    sides = [np.exp(s * rng.standard_normal((4000, n))) for s, n in zip(noise, sizes, strict=True)]
    found = [stats.welch(a, b).verdict == "different" for a, b in zip(*map(np.ndarray.tolist, sides), strict=True)]
    assert 0.03 <= np.mean(found) <= 0.07


# Speed.


def test_a_slower_stack():
    old, new = simulated(1.0, 1.01, 0.99), simulated(1.25, 1.26, 1.24, versions="2")
    found = pair(old, new)
    change = figure(found, "speed")
    assert change.old.figure == pytest.approx(128, rel=1e-3)
    assert change.new.figure == pytest.approx(128 / 1.25, rel=1e-3)
    expected = stats.welch([1 / s for s in (1.0, 1.01, 0.99)], [1 / s for s in (1.25, 1.26, 1.24)])
    assert (change.ratio.ratio, change.ratio.low) == pytest.approx((expected.ratio, expected.low))
    assert (change.verdict, change.direction, change.side_by_side) == ("different", "worse", False)
    assert found.worse() == ["speed"]
    assert dict(found.versions) == {"torch": ("1", "2")}
    back = pair(new, old)
    assert (figure(back, "speed").direction, back.worse()) == ("better", [])


def test_equals():
    found = pair(simulated(1.0, 1.001, 0.999), simulated(1.001, 1.0, 0.999, versions="2"))
    assert (figure(found, "speed").verdict, found.worse()) == ("equivalent", [])


@pytest.mark.parametrize(("old", "new"), [((1.0,), (9.0, 9.1)), ((1.0, 1.1), (9.0,)), ((1.0,), (9.0,))])
def test_one_process_is_never_different(old, new):
    found = speed(simulated(*old), simulated(*new, versions="2"))
    assert (found.verdict, found.direction, found.worse()) == ("inconclusive", "", False)
    assert found.ratio.ratio == pytest.approx(1 / 9, rel=0.2)
    assert found.ratio.low is None


def test_certain_and_small_is_told_and_not_counted():
    old, new = simulated(1.0, 1.0001, 0.9999), simulated(1.01, 1.0101, 1.0099, versions="2")
    found = speed(old, new)
    assert (found.verdict, found.direction, found.worse()) == ("different", "worse", False)
    assert found.worse(margin=0.005)
    assert not found.worse(margin=0.01)
    # Different, and by 6% as it looks, but not with certainty by more than 2%.
    unsure = speed(simulated(1.0, 1.02, 0.98), simulated(1.06, 1.08, 1.04, versions="2"))
    assert (unsure.verdict, unsure.worse(), unsure.worse(margin=0.0)) == ("different", False, True)


def test_side_by_side_the_rounds_are_paired():
    """What the machine did to both cancels in a round: the difference is certain, though the processes scatter."""
    pace = (1.0, 1.2, 0.8, 1.1, 0.9)
    old = simulated(*pace, series="one")
    new = simulated(*(1.1 * p for p in pace), series="one", versions="2")
    beside = speed(old, new)
    assert (beside.side_by_side, beside.ratio.rounds, beside.verdict) == (True, 5, "different")
    assert (beside.ratio.ratio, beside.ratio.low) == pytest.approx((1 / 1.1, 1 / 1.1))
    apart = speed(old, simulated(*(1.1 * p for p in pace), series="two", versions="2"))
    assert (apart.side_by_side, apart.verdict) == (False, "inconclusive")


def test_the_inverse_interval_of_times():
    old = simulated(1.0, 1.0, 1.0, series="one")
    found = speed(old, simulated(1.5, 1.51, 1.49, series="one", versions="2")).ratio
    times = stats.compare([[1.0]] * 3, [[1.5], [1.51], [1.49]])
    assert (found.ratio, found.low, found.high) == pytest.approx((1 / times.ratio, 1 / times.high, 1 / times.low))


def test_the_hosts_own_change_widens_the_interval():
    """Two speeds 20% apart, and a probe that took 25% longer: it may all be the machine."""
    old, slower = simulated(1.0, 1.001, 0.999), (1.2, 1.201, 1.199)
    found = pair(old, simulated(*slower, versions="2", probe=0.0125))
    assert found.host == pytest.approx(1.25)
    assert (figure(found, "speed").verdict, found.worse()) == ("inconclusive", [])
    # Of a factor of two it explains a part.
    assert pair(old, simulated(2.0, 2.001, 1.999, versions="2", probe=0.0125)).worse() == ["speed"]
    # Nor does a slower host make a stack that kept its speed a better one.
    kept = pair(old, simulated(1.0, 1.001, 0.999, versions="2", probe=0.0125))
    assert figure(kept, "speed").verdict == "inconclusive"
    # Up to 10% it is let pass, as within a round; and without a probe nothing is known.
    assert pair(old, simulated(*slower, versions="2", probe=0.0105)).host is None
    unknown = [replace(r, round={**r.round, "probe": []}) for r in simulated(*slower, versions="2")]
    assert pair(old, unknown).worse() == ["speed"]


# Outcomes.


@pytest.mark.parametrize(
    ("was", "now", "worse"),
    [
        ("works", "works", False),
        ("works", "partial", True),
        ("partial", "works", False),
        ("partial", "partial", False),
        *(("works", bad, True) for bad in ("wrong", "dishonest clock", "unsteady", "failed", "timeout")),
        ("works", "out of memory", True),
        ("works", "not available", True),
        ("works", "not measured", False),
        ("partial", "wrong", True),
        ("failed", "wrong", False),
        ("wrong", "works", False),
    ],
)
def test_outcomes(was, now, worse):
    def of(outcome: str, versions: str) -> list[Record]:
        fallen = {"fallbacks": {"operations": {"aten::lrn": 1}}} if outcome == "partial" else {}
        return simulated(1.0, 1.0, outcome=outcome, versions=versions, gates=fallen)

    found = pair(of(was, "1"), of(now, "2"))
    assert (found.old.outcome, found.new.outcome) == (was, now)
    assert found.worse() == ["outcome"] * worse
    counted = {"works", "partial"}
    names = [c.name for c in found.changes]
    assert ("speed" in names) == bool({was, now} & counted)
    if was in counted and now not in counted:
        assert figure(found, "speed").verdict == "gone"
    if now in counted and was not in counted:
        assert figure(found, "speed").verdict == "new"


def test_a_process_that_was_lost_is_a_failure():
    new = simulated(1.0, 1.0, versions="2") + simulated(1.0, versions="2", outcome="timeout", device="", first=2)
    assert pair(simulated(1.0, 1.0), new).worse() == ["outcome"]


def test_a_device_that_is_not_there_any_more():
    found = pair(simulated(1.0, 1.0), simulated(1.0, outcome="not available", device="", versions="2"))
    assert (found.device, found.worse()) == ("a simulated device", ["outcome"])
    found = pair(simulated(1.0, outcome="not available", device="", versions="2"), simulated(1.0, 1.0))
    assert (found.device, found.worse()) == ("a simulated device", [])


def test_a_device_that_is_lost_where_there_were_two_is_not_overlooked():
    old = simulated(1.0, 1.0) + simulated(1.0, 1.0, device="another simulated device")
    found = difference.difference(old, simulated(1.0, outcome="not available", device="", versions="2"))
    assert (found.pairs, found.gone, found.new) == ((), (), ())
    assert "2 figures of it in OLD and 1 in NEW" in found.mixed[0].reason


@pytest.mark.parametrize(
    ("outcome", "worse"),
    [
        *((failure, True) for failure in ("failed", "wrong", "timeout")),
        *((other, False) for other in ("works", "partial", "not available", "not measured")),
    ],
)
def test_a_failure_of_what_is_new_is_worse(outcome, worse):
    spec = replace(SPEC, batch=64)
    new = simulated(1.0, 1.0, versions="2") + simulated(1.0, spec=spec, outcome=outcome, versions="2")
    found = difference.difference(simulated(1.0, 1.0), new)
    assert (len(found.new), len(found.failures), found.worse()) == (1, worse, worse)
    # What failed before, and is not tried any more, is gone.
    assert not difference.difference(new, simulated(1.0, 1.0)).worse()


# Other figures.


def serving(p99: float, *, rate: float = 1.0, memory: object = 1 << 20, batches: tuple[int, ...] = (1, 16)) -> dict:
    sweep = {str(b): {"steps": 2, "seconds": [2 * b / rate] * 3, "peak_memory": memory} for b in batches}
    return {"p50": 0.001, "p90": 0.0015, "p99": p99, "sweep": sweep, "largest_batch": 512, "latencies": [0.001]}


def served(values: list[dict], versions: str = "1") -> list[Record]:
    spec = replace(SPEC, mode="serve", batch=1)
    return [
        simulated(1.0, spec=spec, versions=versions, first=i, serving=value)[0] for i, value in enumerate(values)
    ]  # fmt: skip


def test_serving():
    old = served([serving(0.002), serving(0.00201), serving(0.00199)])
    new = served([serving(0.003), serving(0.00301), serving(0.00299)], "2")
    found = pair(old, new)
    assert found.worse() == ["p99 latency at batch 1"]
    assert figure(found, "p50 latency at batch 1").verdict == "equivalent"
    assert figure(found, "speed at batch 16").old.figure == pytest.approx(1)
    assert [c.name for c in found.changes if "batch" in c.name and "latency" not in c.name] == [
        "speed at batch 1", "speed at batch 16", "peak memory at batch 16", "largest batch that fits",
    ]  # fmt: skip
    assert pair(served([serving(0.002, rate=1.0)] * 2), served([serving(0.002, rate=0.5)] * 2, "2")).worse() == [
        "speed at batch 1", "speed at batch 16",
    ]  # fmt: skip


def test_a_latency_that_is_certainly_worse_but_perhaps_by_little_does_not_count():
    old = served([serving(p99) for p99 in (0.002, 0.00204, 0.00196)])
    change = figure(
        pair(old, served([serving(p99) for p99 in (0.00212, 0.00216, 0.00208)], "2")), "p99 latency at batch 1"
    )
    assert (change.verdict, change.direction) == ("different", "worse")
    assert (change.worse(), change.worse(margin=0.0)) == (False, True)


def test_the_times_of_an_unsteady_stack_are_void():
    """Its samples stay in the record, since they are what shows it."""
    timed = simulated(2.0, 2.0)[0].samples
    found = pair(simulated(1.0, 1.0), simulated(2.0, 2.0, outcome="unsteady", versions="2", samples=timed))
    assert (figure(found, "speed").verdict, figure(found, "speed").new, found.worse()) == ("gone", None, ["outcome"])


def test_peak_memory_is_of_the_largest_batch_in_both():
    old = served([serving(0.002, memory=1 << 20)] * 2)
    new = served([serving(0.002, memory=2 << 20, batches=(1, 16, 64))] * 2, "2")
    found = pair(old, new)
    assert found.worse() == ["peak memory at batch 16"]
    assert figure(found, "speed at batch 64").verdict == "new"
    back = pair(new, old)
    assert figure(back, "peak memory at batch 16").direction == "better"
    assert figure(back, "speed at batch 64").verdict == "gone"


def test_percentiles_from_too_few_latencies_are_not_measured():
    old, new = served([serving(0.002)] * 2), served([{**serving(0.002), "p99": None}] * 2, "2")
    found = pair(old, new)
    assert (figure(found, "p99 latency at batch 1").verdict, found.worse()) == ("gone", [])
    assert "p99 latency at batch 1" not in [c.name for c in pair(new, [*new]).changes]


def test_memory_of_the_device_counts_and_of_the_process_does_not():
    old = simulated(1.0, 1.0, watch={"device_peak_memory": 1 << 20, "peak_memory": 1 << 30})
    new = simulated(1.0, 1.0, versions="2", watch={"device_peak_memory": 2 << 20, "peak_memory": 2 << 30})
    found = pair(old, new)
    assert (figure(found, "peak memory").direction, figure(found, "peak memory of the process").direction) == (
        "worse", "worse",
    )  # fmt: skip
    assert found.worse() == ["peak memory"]


@pytest.mark.parametrize("odd", ["much", True, None, {"a": 1}, [1]])
def test_what_is_no_number_is_not_measured(odd):
    old = simulated(1.0, 1.0, watch={"device_peak_memory": odd, "peak_memory": odd})
    assert [c.name for c in pair(old, simulated(1.0, 1.0, versions="2")).changes] == ["speed", "parity gate used"]


def test_odd_places_and_batches_break_nothing():
    odd = {"steps": 1, "seconds": [1.0]}
    serves = [{**serving(0.002), "sweep": {"9" * 5000: odd, "٣": odd, "x": odd}}] * 2
    assert "speed" not in " ".join(c.name for c in pair(served(serves), served(serves, "2")).changes)
    placeless = [replace(r, round={"number": 1}) for r in simulated(1.0, 1.0)]
    assert figure(pair(placeless[:1], simulated(1.0, versions="2")), "speed").verdict == "inconclusive"


def test_efficiency_is_told_and_does_not_count():
    layers = {"conv": {"flops": 100, "bytes": 1, "floor": None, "forward": None, "backward": None}}
    old = simulated(1.0, 1.0, layers=layers, ceilings={"flops": 200.0, "bandwidth": 100.0})
    new = simulated(1.0, 1.0, layers=layers, ceilings={"flops": 400.0, "bandwidth": 100.0}, versions="2")
    found = pair(old, new)
    change = figure(found, "efficiency")
    assert (change.old.figure, change.new.figure) == (pytest.approx(0.5), pytest.approx(0.25))
    assert (change.direction, change.unit, found.worse()) == ("worse", "of the measured ceilings", [])


def test_first_steps_from_cold_and_warm_caches_are_kept_apart():
    old = simulated(1.0, 1.0, 1.0, times={"total": 4.0})
    new = simulated(1.0, 1.0, 1.0, times={"total": 8.0}, versions="2")
    found = pair(old, new)
    cold, warm = (figure(found, f"time to the first step, {x} caches") for x in ("cold", "warm"))
    assert (cold.old.count, cold.verdict) == (1, "inconclusive")
    assert (warm.old.count, warm.verdict, warm.direction, warm.worse()) == (2, "different", "worse", False)


def gate(error: float) -> dict:
    return {"parity": {"findings": [{"what": "infer() fc8", "error": error, "allowed": 1e-6}]}}


def test_the_share_of_the_gate():
    # Ever so much more of the allowance is no failure; beyond it is, and its speed is void besides.
    found = pair(simulated(1.0, 1.0, gates=gate(1e-7)), simulated(1.0, 1.0, gates=gate(9e-7), versions="2"))
    assert (figure(found, "parity gate used").direction, found.worse()) == ("worse", [])
    found = pair(
        simulated(1.0, 1.0, gates=gate(1e-7)), simulated(1.0, 1.0, gates=gate(2e-6), versions="2", outcome="wrong")
    )
    assert found.worse() == ["outcome", "parity gate used"]
    assert figure(found, "parity gate used").new.figure == pytest.approx(2)
    both = (simulated(1.0, gates=gate(2e-6), outcome="wrong", versions=v) for v in "12")
    assert pair(*both).worse() == [], "it was as wrong before"
    back = pair(simulated(1.0, gates=gate(2e-6), outcome="wrong"), simulated(1.0, gates=gate(1e-7), versions="2"))
    assert back.worse() == []


def test_beyond_the_gate_in_one_process_of_many_is_beyond():
    new = [
        *simulated(1.0, 1.0, versions="2"),
        *simulated(1.0, gates=gate(1.5e-6), versions="2", outcome="wrong", first=2),
    ]
    assert pair(simulated(1.0, 1.0), new).worse() == ["outcome", "parity gate used"]


def test_nothing_allowed_and_nothing_wrong():
    """A share of 0 has no logarithm, and one of nothing allowed is not finite."""
    zero = {"parity": {"findings": [{"what": "x", "error": 0.0, "allowed": 0.0}]}}
    none = {"parity": {"findings": [{"what": "x", "error": 1.0, "allowed": 0.0}]}}
    found = pair(simulated(1.0, 1.0, gates=zero), simulated(1.0, 1.0, gates=zero, versions="2"))
    change = figure(found, "parity gate used")
    assert (change.old.figure, change.ratio, change.verdict) == (0, None, "inconclusive")
    found = difference.difference(simulated(1.0, gates=zero), simulated(1.0, gates=none, versions="2", outcome="wrong"))
    assert found.worse()
    json.dumps(difference.told(found), allow_nan=False)


def test_the_training_curve():
    curve = {"curve": {"passed": True, "share": 0.5, "step": 3, "runs": 8}}
    old = simulated(1.0, 1.0, gates=curve)
    new = simulated(1.0, 1.0, gates={"curve": {**curve["curve"], "share": 1.5}}, outcome="wrong", versions="2")
    assert pair(old, new).worse() == ["outcome", "training curve's gate used"]


def test_the_loss_distance_is_by_each_sets_own_reference():
    oracle = Record(
        spec=Spec(backend="reference", precision="float64", mode="train", batch=128), outcome="works",
        device={"name": "NumPy"}, weights="ab" * 32, training={"losses": [2.0, 1.0]},
    )  # fmt: skip

    def of(last: float, versions: str) -> list[Record]:
        return [oracle, *simulated(1.0, versions=versions, weights="ab" * 32, training={"losses": [2.0, last]})]

    found = difference.difference(of(1.25, "1"), of(1.5, "2"))
    change = next(c for p in found.pairs for c in p.changes if c.name == "loss distance" and p.spec.backend == "cuda")
    assert (change.old.figure, change.new.figure, change.verdict) == (0.25, 0.5, "inconclusive")
    drifted = difference.difference(of(1.25, "1") + of(1.26, "1"), of(1.5, "2") + of(1.51, "2"))
    change = next(c for p in drifted.pairs for c in p.changes if c.name == "loss distance" and p.spec.backend == "cuda")
    assert (change.verdict, change.direction, drifted.worse()) == ("different", "worse", False)
    alone = simulated(1.0, weights="ab" * 32, training={"losses": [2.0, 1.25]})
    assert "loss distance" not in [c.name for c in pair(alone, alone).changes]


# What belongs together.


def test_gone_and_new_are_neither_zero_nor_worse():
    other, third = replace(SPEC, precision="bfloat16"), replace(SPEC, batch=64)
    old = simulated(1.0, 1.0) + simulated(1.0, 1.0, spec=other)
    new = simulated(1.0, 1.0, versions="2") + simulated(1.0, 1.0, spec=third, versions="2")
    found = difference.difference(old, new)
    assert [f.spec.precision for f in found.gone] == ["bfloat16"]
    assert [f.spec.batch for f in found.new] == [64]
    assert (len(found.pairs), found.worse()) == (1, False)


@pytest.mark.parametrize(
    "other",
    [
        {"precision": "bfloat16"}, {"engine": "compile"}, {"mode": "infer"}, {"batch": 64}, {"preset": "paper2012"},
        {"image_size": 99}, {"seed": 1}, {"without": ("cudnn",)}, {"formulation": "stock"}, {"model": "a:b"},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_other_work_is_no_pair(other):
    with pytest.raises(InputError, match=r"nothing is in both: .*OLD has 'cuda/eager/float32, train, caffe at "):
        difference.difference(simulated(1.0, 1.0), simulated(1.0, 1.0, spec=replace(SPEC, **other)))


def test_another_device_is_no_pair():
    with pytest.raises(InputError, match="nothing is in both"):
        difference.difference(simulated(1.0), simulated(1.0, device="another simulated device"))


def test_how_many_blocks_and_equals_there_were_does_not_matter():
    found = pair(simulated(1.0), simulated(1.0, spec=replace(SPEC, blocks=5, perturbed=2), versions="2"))
    assert found.worse() == []
    quick = pair(simulated(1.0), simulated(1.0, spec=replace(SPEC, quick=True), versions="2"))
    assert (quick.old.spec.quick, quick.new.spec.quick) == (False, True)


def test_the_same_versions_first_then_what_is_left():
    old = simulated(1.0, 1.0, versions="1") + simulated(2.0, 2.0, versions="2")
    new = simulated(2.0, 2.0, versions="2", series="again") + simulated(3.0, 3.0, versions="3")
    found = difference.difference(old, new)
    assert [dict(p.versions) for p in found.pairs] == [{"torch": ("1", "3")}, {}]
    assert [p.worse() for p in found.pairs] == [["speed"], []]


def test_another_machine_is_told():
    found = pair(simulated(1.0), simulated(1.0, host="another"))
    assert dict(found.versions) == {"host": ("simulated", "another")}


def test_it_is_not_guessed_which_of_several_is_meant():
    old = simulated(1.0, versions="1") + simulated(1.0, versions="2")
    found = difference.difference(old, simulated(1.0, versions="3"))
    assert (found.pairs, found.gone, found.new) == ((), (), ())
    (mixed,) = found.mixed
    assert (len(mixed.old), len(mixed.new)) == (2, 1)
    assert "2 figures of it in OLD and 1 in NEW" in mixed.reason


def test_records_that_are_in_both_sets_show_no_change():
    old = simulated(1.0, 1.1, 0.9, series="one")
    same = pair(old, old)
    assert (figure(same, "speed").ratio.ratio, same.worse()) == (1, [])
    grown = old + simulated(9.0, 9.0, 9.0, series="two")
    found = difference.difference(old, grown)
    assert (found.pairs, len(found.mixed)) == ((), 1)
    assert "3 of its records are in both sets" in found.mixed[0].reason


def test_an_empty_set():
    with pytest.raises(InputError, match="OLD holds no record"):
        difference.difference([], simulated(1.0))
    with pytest.raises(InputError, match="NEW holds no record"):
        difference.difference(simulated(1.0), [])


# The command.


def diff(*arguments: object, status: int = 0) -> str:
    """What the command prints: on standard output, or on standard error where it is the user's mistake."""
    environment = {"COLUMNS": "100", "FORCE_COLOR": None, "TTY_COMPATIBLE": None}
    ran = CliRunner().invoke(cli.main, ["diff", *map(str, arguments)], env=environment)
    assert ran.exit_code == status, (ran.stdout, ran.stderr, ran.exception)
    assert ran.exception is None or isinstance(ran.exception, SystemExit)
    return " ".join((ran.stdout if status < 2 else ran.output).split())


def folders(tmp_path: Path, old: list[Record], new: list[Record]) -> tuple[Path, Path]:
    for name, records in (("old", old), ("new", new)):
        for record in records:
            record.write(tmp_path / name)
    return tmp_path / "old", tmp_path / "new"


def test_nothing_moved(tmp_path):
    told = diff(*folders(tmp_path, simulated(1.0, 1.001, 0.999), simulated(1.0, 1.001, 0.998, versions="2")))
    assert "cuda/eager/float32, train, batch 128, caffe at 227, on a simulated device: works" in told
    assert "OLD 3 processes, NEW 3 processes; torch 1 to 2." in told
    assert "equivalent" in told
    assert "1 pair compared: nothing is known to have moved for the worse by more than 0.02." in told


def test_something_got_worse(tmp_path):
    sides = folders(tmp_path, simulated(1.0, 1.01, 0.99), simulated(1.25, 1.26, 1.24, versions="2", host="another"))
    told = diff(*sides, status=1)
    assert "different, worse" in told
    assert "not side by side" in told.lower()
    assert "on another machine" in told
    assert (
        "1 pair compared, 1 worse. cuda/eager/float32, train, batch 128, caffe at 227, on a simulated device: speed"
        in told
    )
    assert "nothing is known to have moved for the worse" in diff(*sides, "--margin", "0.5")
    assert "different, better" in diff(*reversed(sides))


def test_what_is_in_one_set_only_is_named(tmp_path):
    old = simulated(1.0, 1.0) + simulated(1.0, 1.0, spec=replace(SPEC, precision="bfloat16"))
    new = simulated(1.0, 1.0, versions="2") + simulated(1.0, 1.0, spec=replace(SPEC, batch=64), versions="2")
    told = diff(*folders(tmp_path, old, new))
    assert "Gone, in OLD only: cuda/eager/bfloat16, train, batch 128" in told
    assert "New, in NEW only: cuda/eager/float32, train, batch 64" in told
    assert " 0/s" not in told


def test_a_new_failure(tmp_path):
    new = simulated(1.0, 1.0, versions="2") + simulated(
        1.0, spec=replace(SPEC, batch=64), outcome="failed", versions="2"
    )
    told = diff(*folders(tmp_path, simulated(1.0, 1.0), new), status=1)
    assert "batch 64, caffe at 227, on a simulated device, failed. simulated as failed" in told
    assert "1 pair compared, 1 worse." in told
    assert told.endswith("batch 64, caffe at 227, on a simulated device: new, and failed")


def test_a_void_figure_is_no_zero(tmp_path):
    new = simulated(1.0, outcome="wrong", versions="2")
    told = diff(*folders(tmp_path, simulated(1.0, 1.0), new), status=1)
    assert "works to wrong" in told
    assert "NEW: simulated as wrong" in told
    assert "speed 128/s void: wrong gone (128, 128)" in told


def test_quick_and_single_processes_say_so(tmp_path):
    spec = replace(SPEC, quick=True)
    told = diff(*folders(tmp_path, simulated(1.0, spec=spec), simulated(2.0, spec=spec, versions="2")))
    assert "OLD 1 process quick, NEW 1 process quick" in told
    assert "speed 128/s 64/s 0.500 inconclusive one process not side by side" in told
    assert "quick: fewer samples" in told
    assert told.endswith("1 of the figures that count is inconclusive.")


def test_a_host_that_changed_says_so(tmp_path):
    told = diff(*folders(tmp_path, simulated(1.0, 1.0), simulated(1.2, 1.2, versions="2", probe=0.0125)))
    assert "The host's own probe took 1.25 times as long in NEW" in told


def test_files_can_be_named(tmp_path):
    old, new = folders(tmp_path, simulated(1.0), simulated(1.0, versions="2"))
    assert "1 pair compared" in diff(next(old.iterdir()), next(new.iterdir()))


def test_as_json(tmp_path):
    old, new = simulated(1.0, 1.01, 0.99), simulated(1.25, 1.26, 1.24, versions="2")
    told = json.loads(diff(*folders(tmp_path, old, new), "--json", status=1))
    assert (told["worse"], told["margin"], told["gone"], told["new"], told["mixed"], told["refused"]) == (
        True, 0.02, [], [], [], [],
    )  # fmt: skip
    (found,) = told["pairs"]
    assert (found["stack"], found["mode"], found["work"]["batch"]) == ("cuda/eager/float32", "train", 128)
    assert (found["outcome"], found["worse"]) == (["works", "works"], ["speed"])
    assert found["versions"] == {"torch": ["1", "2"]}
    assert [len(side) for side in found["records"]] == [3, 3]
    (moved,) = [f for f in found["figures"] if f["worse"]]
    assert {k: moved[k] for k in ("name", "unit", "better", "verdict", "direction", "side_by_side")} == {
        "name": "speed", "unit": "images/s", "better": "higher", "verdict": "different", "direction": "worse",
        "side_by_side": False,
    }  # fmt: skip
    assert moved["low"] < moved["ratio"] < moved["high"] < 1
    assert moved["old"]["count"] == 3


def test_what_cannot_be_compared_is_no_success(tmp_path):
    several = simulated(1.0, versions="1") + simulated(1.0, versions="2")
    told = diff(*folders(tmp_path, several, simulated(1.0, versions="3")), status=2)
    assert "Not compared: cuda/eager/float32" in told
    assert "name the records of one each" in told


def test_a_damaged_record_is_named_and_the_others_are_compared(tmp_path):
    old, new = folders(tmp_path, simulated(1.0, 1.0), simulated(1.0, 1.0, 2.0, versions="2"))
    path = next(new.iterdir())
    path.write_bytes(path.read_bytes() + b" ")
    told = diff(old, new, status=2)
    assert f"refused: {path} is damaged" in told
    assert "1 pair compared" in told
    assert json.loads(CliRunner().invoke(cli.main, ["diff", str(old), str(new), "--json"]).stdout)["refused"]
    # Worse comes first: what got worse did, whatever else could not be read.
    slow = folders(tmp_path / "slow", simulated(1.0, 1.01), simulated(9.0, 9.01, versions="2"))
    (slow[1] / "notes.json").write_text("{}")
    assert "1 worse" in diff(*slow, status=1)


def test_mistakes(tmp_path):
    old, new = folders(tmp_path, simulated(1.0), simulated(1.0, device="another"))
    assert "nothing is in both" in diff(old, new, status=2)
    (tmp_path / "empty").mkdir()
    assert "OLD holds no record" in diff(tmp_path / "empty", new, status=2)
    assert "does not exist" in diff(old, tmp_path / "missing", status=2)
    assert "Missing argument" in diff(old, status=2)
    assert "--margin" in diff(old, new, "--margin", "-1", status=2)


def test_no_record_speaks_to_the_terminal(tmp_path):
    hostile = "\x1b[2J\u202e[red]\n"
    spec = replace(SPEC, backend=hostile)
    old = simulated(1.0, spec=spec, device=hostile, versions=hostile)
    new = simulated(1.0, spec=spec, device=hostile, outcome="failed")
    sides = folders(tmp_path, old, new)
    for told in (diff(*sides, status=1), diff(sides[0], folders(tmp_path / "x", old, simulated(1.0))[1], status=2)):
        assert "\x1b" not in told
        assert "\u202e" not in told
        assert "[red]" in told, "markup is text"
