"""What the harness itself costs: microseconds a step around a session that does nothing, as a share of a real step.

    python benchmarks/harness_cost.py [STACK]

The session's calls return at once, so that what is timed is PortNet's own loop. Beside it the shortest step that this
machine is measured with: STACK (cpu by default), inference at batch 1. Exit status 1 above 1%.
"""

import sys
from statistics import median

import numpy as np

from portnet import clock, measurement, plugins, workload
from portnet.contract import Session
from portnet.record import Spec

ALLOWED = 0.01


class DoesNothing(Session):
    """Gives what it was given, at once."""

    def put(self, array):
        return array

    def get(self, value):
        return np.asarray(value)

    def infer(self, images):
        return images

    def train_step(self, images, labels, ids, *, step, learning_rate):
        return images

    def weights(self):
        return {}

    def synchronize(self):
        return


def per_step(session, mode, inputs, steps, blocks=101):
    """Seconds a step, the median over blocks of as many steps as the shortest has: waiting and clocks included."""
    work = clock.Work(session, mode, *inputs)
    return median(work.block(steps) for _ in range(blocks)) / steps


def shortest_step(stack):
    """Seconds of one inference at batch 1, and how many make a block."""
    spec = Spec(**measurement.parse_stack(stack), batch=1)
    backend = plugins.backends()[spec.backend]
    load = workload.AlexNet(spec)
    session = load.open(backend, workload.effective(backend, spec)[0])
    batches = load.batches(1)
    work = clock.Work(session, "infer", next(batches), next(batches))
    steps, _ = clock.steps_for(work, measurement.BLOCK)
    return min(work.block(steps) for _ in range(11)) / steps, steps


def main(stack="cpu"):
    rng = np.random.default_rng(0)
    inputs = [(rng.standard_normal((1, 3, 8, 8), np.float32), np.zeros(1, int), np.zeros(1, int)) for _ in range(2)]
    shortest, steps = shortest_step(stack)
    print(f"shortest step ({stack}, inference at batch 1): {1e6 * shortest:.0f} µs, {steps} to a block")
    worst = 0.0
    for mode in ("infer", "train"):
        cost = per_step(DoesNothing(), mode, inputs, steps)
        worst = max(worst, cost / shortest)
        print(f"harness, {mode}: {1e6 * cost:.2f} µs a step, {cost / shortest:.4%} of it (allowed {ALLOWED:.0%})")
    return int(worst > ALLOWED)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
