"""A against A: does the method call a difference where there is none, and do its intervals hold what they should?

    python benchmarks/a_against_a.py simulate [--runs 4000] [--seed 0]
    python benchmarks/a_against_a.py real [--runs 20] [--rounds 5] [--stack cpu]

`simulate` makes comparisons of processes whose times are drawn from a noise model, and puts them through
`portnet.stats.compare`. Of equal stacks, 3 to 7% may be called different; of stacks that are 7% apart, 93 to 97% of the
intervals must hold the true ratio. With fewer runs the bounds are wider, by what chance alone would do. Exit status 1
if any share is out of bounds.

`real` measures one stack against itself on this machine, in fresh processes side by side as every comparison is made,
and may call at most one in five comparisons different. The network is small (99 pixels, batch 4), so that 20 of them
fit half an hour.

A round is 60 slots of time, in which two processes take turns as in a measurement. Blocks have 5% of noise (standard
deviation), and every process has 1% of its own, from its memory layout for one: together what a shared
virtual machine shows. The models add what the machine does to both.
"""

import argparse
import sys
from collections.abc import Callable
from math import log, sqrt
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from portnet import launch, lockin, measurement, stats
from portnet.record import Record, Spec

BLOCKS = 30
BLOCK_NOISE = 0.05
PROCESS_NOISE = 0.01
RATIO = 1.07
"""B's time over A's, for coverage."""
FULL = 4000

Floats = NDArray[np.float64]
Machine = Callable[[np.random.Generator, int, int], Floats]
"""The logarithm of how slow the machine is, in every slot of so many rounds: (rounds, slots)."""


def quiet(_: np.random.Generator, rounds: int, slots: int) -> Floats:
    """Nothing that both processes share."""
    return np.zeros((rounds, slots))


def drifting(rng: np.random.Generator, rounds: int, slots: int) -> Floats:
    """A random walk of 1% a slot, which is 8% over a round."""
    return 0.01 * rng.standard_normal((rounds, slots)).cumsum(axis=1)


def flipping(rng: np.random.Generator, rounds: int, slots: int) -> Floats:
    """Two speeds 15% apart; the machine changes over after 10 slots on average, and starts at either."""
    changes = rng.random((rounds, slots)) < 0.1
    changes[:, 0] = rng.random(rounds) < 0.5
    return log(1.15) * (changes.cumsum(axis=1) % 2)


def stalling(rng: np.random.Generator, rounds: int, slots: int) -> Floats:
    """One slot in ten takes up to twice as long."""
    return np.log1p(rng.random((rounds, slots)) * (rng.random((rounds, slots)) < 0.1))


MACHINES: dict[str, Machine] = {"white": quiet, "drift": drifting, "flips": flipping, "stalls": stalling}


def times(rng: np.random.Generator, machine: Machine, rounds: int, ratio: float) -> tuple[Floats, Floats]:
    """The block times of A and of B in seconds, (rounds, BLOCKS) each."""
    slots = machine(rng, rounds, 2 * BLOCKS)
    second = np.ravel([(back, not back) for back in map(launch.backwards, range(BLOCKS))])
    a, b = (
        side + BLOCK_NOISE * rng.standard_normal((rounds, BLOCKS)) + PROCESS_NOISE * rng.standard_normal((rounds, 1))
        for side in (slots[:, second], slots[:, ~second])
    )
    return 0.1 * np.exp(a), 0.1 * ratio * np.exp(b)


def simulate(seed: int, machine: Machine, *, runs: int, rounds: int, ratio: float = 1.0) -> list[stats.Comparison]:
    """So many comparisons of as many rounds."""
    rng = np.random.default_rng(seed)
    a, b = (side.reshape(runs, rounds, BLOCKS).tolist() for side in times(rng, machine, runs * rounds, ratio))
    return [stats.compare(here, there) for here, there in zip(a, b, strict=True)]


def different(found: list[stats.Comparison]) -> float:
    """The share called different."""
    return sum(c.verdict == "different" for c in found) / len(found)


def covered(found: list[stats.Comparison], ratio: float) -> float:
    """The share of intervals that hold the ratio."""
    return sum(c.low is not None and c.high is not None and c.low <= ratio <= c.high for c in found) / len(found)


def half_width(found: list[stats.Comparison]) -> float:
    """The median of the intervals' half-widths, as a share of the ratio."""
    return float(np.median([log(c.high / c.low) / 2 for c in found if c.low is not None and c.high is not None]))


def slack(runs: int) -> float:
    """How far a share may be from its 5 or 95%: 2%, or three standard errors of so few runs."""
    return max(0.02, 3 * sqrt(0.05 * 0.95 / runs))


def report(runs: int, seed: int) -> bool:
    """Print a row for each noise model and number of rounds; whether all shares were within bounds."""
    start, passed, allowed = perf_counter(), True, slack(runs)
    print(f"{runs} comparisons each; different 5% and covered 95%, give or take {allowed:.1%}; seed {seed}")
    print(f"{'noise':8}{'rounds':>8}{'different':>12}{'covered':>10}{'half-width':>12}")
    for name, machine in MACHINES.items():
        for rounds in (10, 5):
            equal = simulate(seed, machine, runs=runs, rounds=rounds)
            share = different(equal)
            held = covered(simulate(seed + 1, machine, runs=runs, rounds=rounds, ratio=RATIO), RATIO)
            within = abs(share - 0.05) <= allowed and abs(held - 0.95) <= allowed
            passed = passed and within
            note = "" if within else "  out of bounds"
            print(f"{name:8}{rounds:8}{share:12.1%}{held:10.1%}{half_width(equal):12.1%}{note}", flush=True)
    print(f"{'passed' if passed else 'FAILED'} in {perf_counter() - start:.0f} s")
    return passed


ALLOWED_REAL = 0.2


def real(runs: int, rounds: int, stack: str) -> bool:
    """Compare a stack with itself, `runs` times; whether few enough were called different."""
    spec = Spec(**measurement.parse_stack(stack), image_size=99, batch=4, quick=True)
    verdicts, reruns = [], 0
    for run in range(runs):
        sides: tuple[list[Record], list[Record]] = ([], [])
        for records in launch.series([spec, spec], rounds=rounds):
            for side, record in zip(sides, records, strict=True):
                side.append(record)
        # As every comparison is made; but the two are one stack by name, and would be one figure.
        one, other = (lockin.figures(side)[0] for side in sides)
        reruns += one.rejected
        seen = lockin.compare(one, other)
        if seen is None:
            void = next(f for f in (one, other) if f.rate is None)
            if void.outcome not in ("unsteady", "not measured"):
                raise SystemExit(f"{spec.stack}: {void.outcome}: {void.reason}")
            verdicts.append("void")
            print(f"{run + 1:3d}  not compared, {void.outcome}: {void.reason}", flush=True)
            continue
        verdicts.append(seen.verdict)
        print(
            f"{run + 1:3d}  {seen.ratio:.4f}  95% interval {seen.low:.4f} to {seen.high:.4f}  {seen.verdict}",
            flush=True,
        )
    different = verdicts.count("different")
    print(
        f"{different} of {runs} called different (allowed {int(ALLOWED_REAL * runs)}); "
        f"{verdicts.count('void')} not compared; {reruns} rounds run again"
    )
    return different <= ALLOWED_REAL * runs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A against A: is the method right about itself?")
    commands = parser.add_subparsers(dest="command", required=True)
    simulated = commands.add_parser("simulate", help="comparisons drawn from noise models")
    simulated.add_argument("--runs", type=int, default=FULL, help="comparisons of each kind (default: %(default)s)")
    simulated.add_argument("--seed", type=int, default=0)
    measured = commands.add_parser("real", help="a stack measured against itself, here")
    measured.add_argument("--runs", type=int, default=20, help="comparisons (default: %(default)s)")
    measured.add_argument("--rounds", type=int, default=5)
    measured.add_argument("--stack", default="cpu")
    chosen = parser.parse_args(arguments)
    if chosen.runs < 1:
        parser.error(f"--runs is {chosen.runs}; expected 1 or more")
    if chosen.command == "real":
        return 0 if real(chosen.runs, chosen.rounds, chosen.stack) else 1
    return 0 if report(chosen.runs, chosen.seed) else 1


if __name__ == "__main__":
    sys.exit(main())
