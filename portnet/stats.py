"""From times to figures with intervals. Pure functions; all work on logarithms, since what disturbs a time scales it.

Times are in seconds, positive and finite; anything else raises `InputError`.

Sources: T. Kalibera and R. Jones, "Rigorous benchmarking in reasonable time", ISMM 2013 (intervals over processes, not
over blocks); T. Hoefler and R. Belli, "Scientific benchmarking of parallel computing systems", SC 2015; E. Barrett et
al., "Virtual machine warmup blows hot and cold", OOPSLA 2017 (steady state by change points).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log, sqrt
from statistics import median
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from portnet.errors import InputError

Verdict = Literal["different", "equivalent", "inconclusive"]

CONFIDENCE = 0.95
MARGIN = 1.02
"""Two stacks within this factor of each other are equivalent."""
PROBE_MARGIN = 1.1
"""The two sides of a round were not timed on the same machine if its probe's medians are further apart."""
TREND = 0.01
"""A stack's own trend up to this size is let pass."""
ENOUGH = 10
"""The fewest blocks from which a steady state, or a trend, is told from chance."""
PATIENCE = 60
"""Warm-up blocks after which a caller should wait for `steady` no longer, and leave the judgement to `trend`."""

PENALTY = 5.0
"""What a change point must save, in units of log(n) and of the noise's variance.

With `EVIDENCE`, chosen by simulation (tests/test_stats.py has a part of it), so that a machine that flips between two
speeds is seldom taken for a trend, nor a trend for a staircase. At 2, Schwarz's criterion, 13% of ramps of 10% under 2%
of noise were taken for staircases with as little as 4 of evidence asked.
"""
EVIDENCE = 12.0
"""By how much a trend must improve the penalised log-likelihood ratio; on white noise 4 would do for 95%."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A geometric mean over `count` processes and its 95% interval, in the figure's unit; no ends from one process."""

    figure: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """B's time over A's: above 1, B is the slower. With its 95% interval over rounds, which one round cannot give.

    `rounds` in which both were timed side by side: 0 is a comparison by `welch`, of processes that never were.
    """

    ratio: float
    low: float | None
    high: float | None
    rounds: int
    verdict: Verdict

    @property
    def small(self) -> bool:
        """Whether the whole interval lies within 2% of 1: the pair is `equivalent`, or `different` by less than 2%."""
        return self.low is not None and self.high is not None and _within(self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Trend:
    """The relative change of the time of a block from the first to the last: 0.1 is 10% slower at the end.

    The interval holds it in at least 95 of 100 processes. It has no ends from fewer than `ENOUGH` blocks.
    """

    change: float
    low: float | None
    high: float | None

    @property
    def unsteady(self) -> bool:
        """Whether the trend is significant and above 1% in size."""
        if self.low is None or self.high is None:
            return False
        return abs(self.change) > TREND and not self.low <= 0 <= self.high


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """Latencies, in the unit they came in; None where there were too few for that percentile."""

    p50: float
    p90: float | None
    p99: float | None


def compare(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> Comparison:
    """Compare two stacks over rounds; `a[i]` and `b[i]` are the times of the blocks of the two processes of round i.

    The ratio is the geometric mean over rounds of the ratios of the process medians, b's over a's. Its interval is the
    paired t interval on their logarithms: rounds are independent of each other, the blocks of a process are not.

    `different`: the interval excludes 1. `equivalent`: it includes 1 and lies within 2% of it. Otherwise, and always
    from a single round, `inconclusive`. A difference that is certain and below 2% is `different` and `small`: called
    equivalent, it would be hidden, and the share of equal stacks called different would no longer be 5%.
    """
    if len(a) != len(b) or not a:
        raise InputError(f"{len(a)} rounds of A and {len(b)} of B; a comparison needs both sides of one round at least")
    ratios = [
        _median(there, f"b[{i}]") / _median(here, f"a[{i}]") for i, (here, there) in enumerate(zip(a, b, strict=True))
    ]
    found = interval(ratios)
    verdict = judge(found.low, found.high)
    return Comparison(ratio=found.figure, low=found.low, high=found.high, rounds=found.count, verdict=verdict)


def welch(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Compare two stacks that were never timed side by side; `a` and `b` hold one number per process, its median.

    The ratio is that of the geometric means, b's over a's; its interval is Welch's t interval on the logarithms, with
    Satterthwaite's degrees of freedom [B. L. Welch, "The generalization of 'Student's' problem when several different
    population variances are involved", Biometrika 34, 1947]: the sides may scatter unequally. It is wider than that of
    `compare`, for nothing that the machine did to both cancels; and it knows nothing of what befell one side as a
    whole, such as another day on a shared machine.

    Verdicts as `compare`'s; `inconclusive`, and without an interval, where one of the sides is a single process.
    """
    here, there = np.log(_times(a, "a")), np.log(_times(b, "b"))
    centre = float(there.mean() - here.mean())
    low = high = None
    if len(here) > 1 and len(there) > 1:
        shares = [float(side.var(ddof=1)) / len(side) for side in (here, there)]
        error = sum(shares)
        # Equal values are equal: their logarithms' mean is one of them only to within rounding.
        half = 1e-12
        if error > half**2:
            freedom = error**2 / sum(s**2 / (len(side) - 1) for s, side in zip(shares, (here, there), strict=True))
            half = _student(freedom) * sqrt(error)
        low, high = _exp(centre - half), _exp(centre + half)
    return Comparison(ratio=_exp(centre), low=low, high=high, rounds=0, verdict=judge(low, high))


def judge(low: float | None, high: float | None) -> Verdict:
    """What the interval of a ratio says: `different` if it excludes 1, `equivalent` if it lies within 2% of it."""
    if low is None or high is None:
        return "inconclusive"
    if not low <= 1 <= high:
        return "different"
    return "equivalent" if _within(low, high) else "inconclusive"


def interval(medians: Sequence[float]) -> Interval:
    """The geometric mean of one number per process (its median, say), and the t interval on the logarithms.

    For what has no partner. Processes that did not alternate carry the whole machine's variation from one to the next.
    """
    logs = np.log(_times(medians, "medians"))
    mean, count = float(logs.mean()), len(logs)
    if count < 2:
        return Interval(figure=exp(mean), low=None, high=None, count=count)
    half = _student(count - 1) * float(logs.std(ddof=1)) / sqrt(count)
    return Interval(figure=exp(mean), low=_exp(mean - half), high=_exp(mean + half), count=count)


def steady(samples: Sequence[float]) -> int | None:
    """The index from which a series of block times is steady, or None if it is not yet. Made to be asked again.

    The series is cut into stretches of one level by optimal partitioning (B. Jackson et al., "An algorithm for optimal
    partitioning of data on an interval", 2005; PELT, which Barrett et al. use, is its pruned form) of the logarithms,
    with a noise level that neither spikes nor jumps raise. It is steady from the first stretch whose level is that of
    the last one, to within 1% or twice the levels' own standard error, once `ENOUGH` blocks have come since.

    So what warmed up never comes back, while a machine that flips between two speeds, or stalls for a block, has been
    steady ever since it was first at its present speed: it does not hold up the measurement. A series that keeps
    drifting can stay None: stop asking after `PATIENCE` blocks.
    """
    logs = np.log(_times(samples, "samples"))
    if len(logs) < ENOUGH:
        return None
    noise = _noise(logs)
    starts = _stretches(logs[None], np.array([PENALTY * log(len(logs)) * noise**2])).pop()
    ends = (*starts[1:], len(logs))
    levels = [float(logs[start:end].mean()) for start, end in zip(starts, ends, strict=True)]
    last = ends[-1] - starts[-1]
    for start, end, level in zip(starts, ends, levels, strict=True):
        if abs(level - levels[-1]) <= max(0.01, 2 * noise * sqrt(1 / (end - start) + 1 / last)):
            return start if len(logs) - start >= ENOUGH else None
    raise AssertionError("the last stretch has its own level")


def trend(seconds: Sequence[float], beside: Sequence[float] | None = None) -> Trend:
    """The stack's own trend over its timed blocks.

    `beside`: the times of a fixed probe measured next to each block; a partner's will do if it has no trend itself.
    What the machine does to both cancels in the ratio of the two. But a machine may touch the stack less than the
    probe, or not at all, and the ratio then shows the probe's trend: where the trend as timed rules out the trend of
    the ratio, the interval reaches over both.

    The model is a straight line plus shifts of level, on logarithms: a machine that flips between two speeds shifts,
    a stack that slows down slopes. Every division into stretches that is best for some slope is fitted, the interval
    being the slopes that any of them allows by `EVIDENCE`; where shifts explain the times as well as a slope does, it
    includes zero. Hence a single lasting step of the stack itself is not called a trend, and a machine that keeps
    drifting in one direction is, unless `beside` shows it.

    Of processes on a machine that flips, up to 3% are still called unsteady (simulated): of twenty, one often is. Over
    several processes a stack's trend is better told by `interval` of each one's 1 + change.
    """
    times = _times(seconds, "seconds")
    timed = _trend(np.log(times))
    if beside is None:
        return timed
    probe = _times(beside, "beside")
    if len(probe) != len(times):
        raise InputError(f"{len(times)} blocks and {len(probe)} times beside them; give one for each block")
    ratio = _trend(np.log(times / probe))
    if ratio.low is None or ratio.high is None or timed.low is None or timed.high is None:
        return ratio
    if timed.low <= ratio.change <= timed.high:
        return ratio
    return replace(ratio, low=min(ratio.low, timed.low), high=max(ratio.high, timed.high))


def percentiles(latencies: Sequence[float]) -> Percentiles:
    """p50, p90 and p99 as MLPerf's LoadGen takes them: of n latencies in ascending order, the one of index floor(p n).

    The index counts from 0 (`sample_latencies[sample_count * percentile]` in loadgen/results.cc), so it is always a
    latency that was seen: nearest rank, the higher of two where p n is whole. Below 1 / (1 - p) latencies that is the
    longest whatever p is, and says nothing of it: p90 takes at least 10 of them, p99 at least 100.
    """
    ascending = np.sort(_times(latencies, "latencies"))
    count = len(ascending)

    def at(percent: int) -> float | None:
        # In whole numbers: 0.29 * 100 is below 29.
        return float(ascending[count * percent // 100]) if count * (100 - percent) >= 100 else None

    return Percentiles(p50=float(ascending[count // 2]), p90=at(90), p99=at(99))


def same_machine(probe_a: Sequence[float], probe_b: Sequence[float]) -> bool:
    """Whether the probe's medians on the two sides of a round lie within 10%; if not, the round must be run again."""
    a, b = _median(probe_a, "probe_a"), _median(probe_b, "probe_b")
    return max(a, b) <= PROBE_MARGIN * min(a, b)


def _times(values: Sequence[float], what: str) -> NDArray[np.float64]:
    times = np.asarray(values, dtype=np.float64)
    if times.ndim != 1 or not len(times):
        raise InputError(f"{what} is of shape {times.shape}; expected one number or more in a row")
    wrong = ~(np.isfinite(times) & (times > 0))
    if wrong.any():
        at = int(wrong.argmax())
        raise InputError(f"{what}[{at}] is {times[at]}; expected a positive, finite number: look at how it was timed")
    return times


def _exp(x: float) -> float:
    """As far as there are floats: two values a hundred orders of magnitude apart have an interval beyond them."""
    return exp(min(x, 700.0))


def _median(values: Sequence[float], what: str) -> float:
    return float(median(_times(values, what).tolist()))


def _within(low: float, high: float) -> bool:
    return low >= 1 / MARGIN and high <= MARGIN


def prediction(count: int, probability: float) -> float:
    """Within how many standard deviations of the mean of `count` values one more lies with that probability.

    For normal values: ``t sqrt(1 + 1/n)``, with Student's t of n - 1 degrees of freedom. Raises `InputError` below 2.
    """
    if count < 2:
        raise InputError(f"a prediction needs at least 2 values, got {count}")
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, (1 + probability) / 2)) * sqrt(1 + 1 / count)


def _student(freedom: float) -> float:
    """How many standard errors a two-sided interval reaches."""
    # Here, since it takes longer to import than all the rest of the core.
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))


def _noise(logs: NDArray[np.float64]) -> float:
    """The noise from block to block: from the smaller three quarters of the differences, so that jumps do not count."""
    steps = np.sort(np.abs(np.diff(logs)))
    kept = steps[: max(1, round(0.75 * len(steps)))]
    # 0.61: the root mean square of the smaller three quarters of a normal sample of unit variance. At 0.3% of noise,
    # a shift is found that is no longer worth waiting for.
    return max(float(np.sqrt(np.mean(kept**2) / 2)) / 0.61, 0.003)


def _stretches(rows: NDArray[np.float64], penalties: NDArray[np.float64]) -> set[tuple[int, ...]]:
    """Where stretches of constant level start, for each row of (k, n): least squares plus its penalty a stretch."""
    k, n = rows.shape
    sums, squares = np.zeros((2, k, n + 1))
    rows.cumsum(axis=1, out=sums[:, 1:])
    (rows**2).cumsum(axis=1, out=squares[:, 1:])
    best, back = np.zeros((k, n + 1)), np.zeros((k, n + 1), dtype=int)
    for end in range(1, n + 1):
        spread = squares[:, end : end + 1] - squares[:, :end]
        spread -= (sums[:, end : end + 1] - sums[:, :end]) ** 2 / (end - np.arange(end))
        cost = best[:, :end] + spread + penalties[:, None]
        back[:, end] = cost.argmin(axis=1)
        best[:, end] = cost.min(axis=1)
    found = set()
    for came_from in back.tolist():
        starts, end = [], n
        while end:
            end = came_from[end]
            starts.append(end)
        found.add(tuple(reversed(starts)))
    return found


def _trend(logs: NDArray[np.float64]) -> Trend:
    n = len(logs)
    if n < 2:
        return Trend(change=0.0, low=None, high=None)
    place = np.linspace(-0.5, 0.5, n)
    candidates: set[tuple[int, ...]] = {(0,)}
    if n >= ENOUGH:
        # Slopes from none to far beyond any that the times could have.
        reach = 3 * float(np.quantile(logs, 0.9) - np.quantile(logs, 0.1)) + 0.001
        levelled = logs - np.linspace(-reach, reach, 21)[:, None] * place
        found = _stretches(levelled, np.full(len(levelled), PENALTY * log(n) * _noise(logs) ** 2))
        # With ever more stretches any series could be fitted, and its noise called nothing.
        candidates |= {starts for starts in found if len(starts) <= n // 3}
    rest, slope, leverage, changes = np.array([_fit(logs, place, starts) for starts in candidates]).T
    # Noise below 0.1% is the clock's.
    rest += n * 1e-6
    cost = n * np.log(rest) + PENALTY * log(n) * changes
    best = float(slope[cost.argmin()])
    if n < ENOUGH:
        return Trend(change=float(np.expm1(best)), low=None, high=None)
    # A candidate allows the slopes at which its cost is within EVIDENCE of the least.
    room = np.exp((cost.min() + EVIDENCE - PENALTY * log(n) * changes) / n) - rest
    half = np.sqrt(np.maximum(room, 0) / leverage)
    low, high = (slope - half)[room >= 0].min(), (slope + half)[room >= 0].max()
    return Trend(change=float(np.expm1(best)), low=float(np.expm1(low)), high=float(np.expm1(high)))


def _fit(
    logs: NDArray[np.float64], place: NDArray[np.float64], starts: tuple[int, ...]
) -> tuple[float, float, float, int]:
    """One slope for all stretches, each at its own level: the squares left, the slope, its leverage, the changes."""
    lengths = np.diff((*starts, len(logs)))
    x, y = (v - np.repeat(np.add.reduceat(v, starts) / lengths, lengths) for v in (place, logs))
    leverage = float(x @ x)
    slope = float(x @ y) / leverage
    return float(((y - slope * x) ** 2).sum()), slope, leverage, len(starts) - 1
