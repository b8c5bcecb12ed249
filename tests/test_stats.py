"""Figures and intervals worked out by hand, and rates by simulation with a fixed seed."""

import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from math import exp, inf, log, nan, sqrt
from pathlib import Path

import numpy as np
import pytest

from portnet import stats
from portnet.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = 30


def rounds(*ratios):
    """Both sides of rounds whose process medians have these ratios; their means have not."""
    return [[1.0, 2.0, 30.0]] * len(ratios), [[r, 2 * r, 2.5 * r] for r in ratios]


# Comparisons.


def test_a_comparison_by_hand():
    # Logs of the ratios: log 2 -/+ 0.1. Their standard error is 0.1, and Student's t for one degree is tan(0.475 pi).
    found = stats.compare(*rounds(2 * exp(-0.1), 2 * exp(0.1)))
    reach = 0.1 * np.tan(0.475 * np.pi)
    assert found.ratio == pytest.approx(2)
    assert found.low == pytest.approx(2 * exp(-reach))
    assert found.high == pytest.approx(2 * exp(reach))
    assert (found.rounds, found.verdict) == (2, "inconclusive")


def test_three_rounds():
    # Two degrees of freedom: t = (2p - 1) / sqrt(2 p (1 - p)) at p = 0.975.
    found = stats.compare(*rounds(exp(0.09), exp(0.1), exp(0.11)))
    reach = 0.95 / sqrt(2 * 0.975 * 0.025) * 0.01 / sqrt(3)
    assert (log(found.ratio), log(found.low), log(found.high)) == pytest.approx((0.1, 0.1 - reach, 0.1 + reach))
    assert found.verdict == "different"


def test_the_other_way_round_is_the_inverse():
    a, b = rounds(1.2, 1.3, 1.25)
    one, other = stats.compare(a, b), stats.compare(b, a)
    assert other.ratio == pytest.approx(1 / one.ratio)
    assert (other.low, other.high) == pytest.approx((1 / one.high, 1 / one.low))


@pytest.mark.parametrize(
    ("ratios", "verdict", "small"),
    [
        pytest.param((0.5, 0.51, 0.49), "different", False, id="faster"),
        pytest.param((1.5, 1.51, 1.49), "different", False, id="slower"),
        pytest.param((0.999, 1.001, 1.0), "equivalent", True, id="equal"),
        pytest.param((1.009, 1.010, 1.011), "different", True, id="certain and small"),
        pytest.param((0.9, 1.1, 1.0), "inconclusive", False, id="wide"),
        # Half-width 0.0248 about 1: it leaves the margin at both ends.
        pytest.param((0.99, 1.01, 1.0), "inconclusive", False, id="just too wide"),
        # From 0.984 to 1.021 and the inverse: within the margin at one end only.
        pytest.param((0.9935, 1.0100, 1.0040), "inconclusive", False, id="too high"),
        pytest.param((1 / 0.9935, 1 / 1.0100, 1 / 1.0040), "inconclusive", False, id="too low"),
        pytest.param((1.0, 1.0), "equivalent", True, id="the same to the bit"),
        pytest.param((3.0,), "inconclusive", False, id="one round"),
    ],
)
def test_verdicts(ratios, verdict, small):
    found = stats.compare(*rounds(*ratios))
    assert (found.verdict, found.small) == (verdict, small)


def test_one_round_has_no_interval():
    found = stats.compare(*rounds(3.0))
    assert (found.ratio, found.low, found.high, found.rounds) == (pytest.approx(3), None, None, 1)


@pytest.mark.parametrize("wrong", [0.0, -1.0, nan, inf])
def test_what_is_no_time_is_refused(wrong):
    with pytest.raises(InputError, match=r"b\[1\]\[2\] is"):
        stats.compare([[1.0], [1.0]], [[1.0], [1.0, 1.0, wrong]])
    for function in (stats.interval, stats.steady, stats.trend, stats.percentiles):
        with pytest.raises(InputError, match=r"\[1\] is .*expected a positive, finite number"):
            function([1.0, wrong])
    with pytest.raises(InputError, match=r"beside\[0\]"):
        stats.trend([1.0], [wrong])
    with pytest.raises(InputError, match=r"probe_b\[0\]"):
        stats.same_machine([1.0], [wrong])


def test_sides_that_do_not_fit_are_refused():
    for a, b in (([], []), ([[1.0]], []), ([[1.0]], [[1.0], [1.0]])):
        with pytest.raises(InputError, match=r"rounds of A and . of B"):
            stats.compare(a, b)
    with pytest.raises(InputError, match=r"a\[0\] is of shape \(0,\)"):
        stats.compare([[]], [[1.0]])
    with pytest.raises(InputError, match=r"give one for each block"):
        stats.trend([1.0, 1.0], [1.0])


def test_interval():
    found = stats.interval([4.0, 9.0])
    reach = log(1.5) * np.tan(0.475 * np.pi)
    assert found.figure == pytest.approx(6), "the geometric mean"
    assert (found.low, found.high) == pytest.approx((6 * exp(-reach), 6 * exp(reach)))
    assert found.count == 2
    assert stats.interval([4.0]) == stats.Interval(figure=pytest.approx(4), low=None, high=None, count=1)


def a_against_a():
    spec = spec_from_file_location("a_against_a", ROOT / "benchmarks" / "a_against_a.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("machine", ["white", "drift", "flips", "stalls"])
@pytest.mark.parametrize("count", [5, 10])
def test_a_against_a(machine, count):
    """Three standard errors of 300 runs; benchmarks/a_against_a.py does 4,000 and allows 2%."""
    bench = a_against_a()
    found = bench.simulate(1, bench.MACHINES[machine], runs=300, rounds=count)
    assert abs(bench.different(found) - 0.05) <= bench.slack(300) < 0.04
    found = bench.simulate(2, bench.MACHINES[machine], runs=300, rounds=count, ratio=bench.RATIO)
    assert abs(bench.covered(found, bench.RATIO) - 0.95) <= bench.slack(300)


def test_the_benchmark_fails_out_of_bounds(monkeypatch, capsys):
    bench = a_against_a()
    assert bench.main(["simulate", "--runs", "50"]) == 0
    assert "passed" in capsys.readouterr().out
    # Intervals of half the confidence.
    monkeypatch.setattr(stats, "CONFIDENCE", 0.5)
    assert bench.main(["simulate", "--runs", "50"]) == 1
    assert "out of bounds" in capsys.readouterr().out


# Noise, as logarithms of block times.


def white(rng, size, count=BLOCKS):
    return size * rng.standard_normal(count)


def flips(rng, chance=0.1, count=BLOCKS):
    """Two speeds 15% apart."""
    return log(1.15) * (((rng.random() < 0.5) + (rng.random(count) < chance).cumsum()) % 2)


def walk(rng, size=0.02, count=BLOCKS):
    return white(rng, size, count).cumsum()


def ramp(change, count=BLOCKS):
    return np.linspace(0, log(1 + change), count)


def test_the_noise_is_what_it_says():
    made = flips(np.random.default_rng(0), count=1000)
    assert sorted({round(exp(x), 6) for x in made}) == [1.0, 1.15]
    assert 50 < sum(x != y for x, y in pairwise(made)) < 150


# Steady state.


def waits(make, count=100):
    """For how many blocks a caller warms up, and the index that it is then told; in order."""
    rng, blocks, starts = np.random.default_rng(4), [], []
    for _ in range(count):
        times = np.exp(make(rng))
        for seen in range(1, len(times) + 1):
            start = stats.steady(times[:seen])
            if start is not None:
                blocks.append(seen)
                starts.append(start)
                break
        else:
            blocks.append(inf)
    return sorted(blocks), sorted(starts)


def test_steady_from_the_start():
    assert stats.steady([1.0] * (stats.ENOUGH - 1)) is None
    assert stats.steady([1.0] * stats.ENOUGH) == 0
    blocks, starts = waits(lambda rng: white(rng, 0.05))
    assert blocks[95] == stats.ENOUGH
    assert starts[95] == 0


@pytest.mark.parametrize("slow", [1.5, 100.0])
@pytest.mark.parametrize("first", [1, 3])
def test_what_warms_up_is_left_out(first, slow):
    def make(rng):
        return white(rng, 0.03, 60) + log(slow) * (np.arange(60) < first)

    blocks, starts = waits(make)
    assert starts[5] == starts[95] == first
    assert blocks[95] == first + stats.ENOUGH


def test_a_slow_warm_up():
    # 20% too slow at first, and e times less of that every 10 blocks; at block 14 it is 5%.
    blocks, starts = waits(lambda rng: white(rng, 0.005, 60) + 0.2 * np.exp(-np.arange(60) / 10))
    assert starts[10] >= 8
    assert 15 <= blocks[10] <= blocks[95] <= 35


def test_a_step_that_stays_is_waited_for():
    times = np.exp(white(np.random.default_rng(0), 0.01, 40) - 0.1 * (np.arange(40) >= 7))
    assert stats.steady(times[:12]) is None
    assert stats.steady(times[:16]) is None
    assert stats.steady(times[:17]) == 7
    assert stats.steady(times) == 7


@pytest.mark.parametrize("chance", [0.03, 0.1, 0.3])
@pytest.mark.parametrize("noise", [0.001, 0.02])
def test_a_machine_that_flips_is_not_waited_for(chance, noise):
    blocks, _ = waits(lambda rng: white(rng, noise, 60) + flips(rng, chance, 60))
    assert blocks[50] <= 12
    assert blocks[95] <= 20


def test_stalls_are_not_waited_for():
    blocks, _ = waits(lambda rng: white(rng, 0.02, 60) + 0.7 * (rng.random(60) < 0.1))
    assert blocks[95] <= 12


def test_the_present_speed_counts_since_it_was_first_seen():
    fast, slow = [1.0, 1.001, 0.999, 1.0], [1.15, 1.151, 1.149, 1.15]
    assert stats.steady([9.0, *fast, *slow, *fast]) == 1
    assert stats.steady([9.0, *fast, *slow]) is None


def test_what_gets_ever_slower_is_not_steady():
    assert stats.steady(np.exp(0.03 * np.arange(stats.PATIENCE))) is None


# Trends.


def unsteady(make, count=150):
    """The share called unsteady."""
    rng = np.random.default_rng(5)
    found = [stats.trend(*(np.exp(x) for x in make(rng))) for _ in range(count)]
    return sum(t.unsteady for t in found) / count


def probed(rng, noise, *, machine=0.02, own=0.0):
    """The stack's blocks and the probe's, each with noise of its own, on a machine that drifts."""
    shared = walk(rng, machine)
    return shared + white(rng, noise) + own, shared + white(rng, noise)


HONEST = {
    "white 3%": lambda rng: [white(rng, 0.03)],
    "white 0.2%": lambda rng: [white(rng, 0.002)],
    "stalls": lambda rng: [white(rng, 0.03) + 0.7 * (rng.random(BLOCKS) < 0.1)],
    "flips, seldom": lambda rng: [white(rng, 0.02) + flips(rng, 0.03)],
    "flips": lambda rng: [white(rng, 0.02) + flips(rng)],
    "flips, often": lambda rng: [white(rng, 0.02) + flips(rng, 0.3)],
    "flips in noise": lambda rng: [white(rng, 0.05) + flips(rng)],
    "shared drift": lambda rng: probed(rng, 0.02),
    "shared and steady drift": lambda rng: (white(rng, 0.02) + ramp(0.2), white(rng, 0.02) + ramp(0.2)),
    "half shared": lambda rng: (white(rng, 0.02) + ramp(0.1), white(rng, 0.02) + ramp(0.2)),
    "the probe's alone": lambda rng: (white(rng, 0.02), white(rng, 0.02) + ramp(0.2)),
}


@pytest.mark.parametrize("make", HONEST.values(), ids=HONEST)
def test_honest_stacks_are_seldom_unsteady(make):
    assert unsteady(make) <= 0.05


def test_why_the_probe_is_needed():
    assert unsteady(lambda rng: probed(rng, 0.02)[:1]) > 0.2


@pytest.mark.parametrize("change", [0.1, -0.1])
def test_a_stack_that_slows_is_caught(change):
    assert unsteady(lambda rng: [white(rng, 0.02) + ramp(change)]) >= 0.95
    assert unsteady(lambda rng: probed(rng, 0.01, machine=0.01, own=ramp(change))) >= 0.8


def test_small_trends_pass():
    times = np.exp(ramp(0.008))
    found = stats.trend(times)
    assert 0 < found.low < found.change < found.high < 0.012
    assert not found.unsteady
    assert stats.trend(np.exp(ramp(0.02))).unsteady


def test_a_trend_and_its_interval():
    rng = np.random.default_rng(6)
    found = [stats.trend(np.exp(white(rng, 0.02) + ramp(0.1))) for _ in range(100)]
    assert np.mean([t.change for t in found]) == pytest.approx(0.1, abs=0.01)
    assert sum(t.low <= 0.1 <= t.high for t in found) >= 95
    found = [stats.trend(np.exp(white(rng, 0.02) + ramp(0.1) + flips(rng))) for _ in range(100)]
    assert sum(t.low <= 0.1 <= t.high for t in found) >= 95, "on a machine that flips"


def test_the_trend_is_relative_to_what_is_beside():
    machine = np.random.default_rng(7).uniform(-0.1, 0.1, BLOCKS)
    found = stats.trend(np.exp(machine + ramp(0.1)), np.exp(machine))
    assert (found.low, found.high) == (pytest.approx(0.1, abs=0.01), pytest.approx(0.1, abs=0.01))
    assert found.unsteady
    assert not stats.trend(np.exp(machine + ramp(0.1))).unsteady


def test_the_interval_reaches_over_both_where_they_disagree():
    found = stats.trend(np.exp(ramp(0.32)), np.exp(ramp(0.1)))
    assert found.low == pytest.approx(0.2, abs=0.01)
    assert found.change == pytest.approx(0.2)
    assert found.high == pytest.approx(0.32, abs=0.01)
    assert found.unsteady


def test_too_few_blocks_for_an_interval():
    found = stats.trend(np.exp(ramp(0.5, count=stats.ENOUGH - 1)))
    assert (found.change, found.low, found.high, found.unsteady) == (pytest.approx(0.5), None, None, False)
    assert stats.trend([1.0]) == stats.Trend(change=0.0, low=None, high=None)
    assert stats.trend([1.0] * 7, [2.0] * 7).change == pytest.approx(0)


# Latencies and probes.


def test_percentiles_as_loadgen_takes_them():
    # sample_latencies[sample_count * percentile], in order: of 1 to 200, those of index 100, 180 and 198.
    shuffled = np.random.default_rng(0).permutation(np.arange(1.0, 201.0))
    assert stats.percentiles(shuffled) == stats.Percentiles(p50=101.0, p90=181.0, p99=199.0)
    assert stats.percentiles([*range(1, 101)]) == stats.Percentiles(p50=51.0, p90=91.0, p99=100.0)
    assert stats.percentiles([3.0, 1.0, 2.0]).p50 == 2.0


@pytest.mark.parametrize(("count", "p90", "p99"), [(1, None, None), (9, None, None), (10, 10, None), (99, 90, None)])
def test_percentiles_of_too_few(count, p90, p99):
    found = stats.percentiles([*range(1, count + 1)])
    assert (found.p90, found.p99) == (p90, p99)


def test_same_machine():
    assert stats.same_machine([1.0, 1.0, 9.0], [1.09, 0.1, 1.09]), "medians, not means"
    assert not stats.same_machine([1.0], [1.11])
    assert not stats.same_machine([1.11], [1.0])
    assert stats.same_machine([1.11], [1.02])


def test_importing_it_does_not_load_scipy():
    code = "import sys, portnet.stats; print('scipy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
