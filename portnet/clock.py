"""The honest clock: does a session's `synchronize` really wait?

A backend that queues its work can return at once; what is timed then is the launching. Once synchronised, fetching a
value that depends on the last step must take no longer than fetching an idle one, and it must be the right value.
That launches scale with the steps too is why scaling alone proves nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np

from portnet.contract import Array, Session

Run = Callable[[int], Any]
"""Issues that many steps, waits for nothing, and returns the device value that the last of them gives."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """What the fetch test saw, in seconds: every block of `steps` steps, and both kinds of fetch after it."""

    steps: int
    blocks: tuple[float, ...]
    idle: tuple[float, ...]
    last: tuple[float, ...]
    right: bool

    @property
    def allowed(self) -> float:
        """The longest that fetching the last value may take: an idle fetch plus 2% of the block."""
        return median(self.idle) + 0.02 * median(self.blocks)

    @property
    def honest(self) -> bool:
        """Whether the work was done when `synchronize` said so, and gave the right value."""
        return self.right and median(self.last) <= self.allowed

    def __str__(self) -> str:
        if not self.right:
            return "after synchronize, the value fetched was not the one that the last step gives"
        return (
            f"after blocks of {self.steps} steps in {1e3 * median(self.blocks):.1f} ms, fetching the last value took "
            f"{1e3 * median(self.last):.2f} ms; allowed {1e3 * self.allowed:.2f} ms"
        )


def work(
    session: Session, mode: str, first: tuple[Array, Array, Array], last: tuple[Array, Array, Array]
) -> tuple[Run, Callable[[Array], bool]]:
    """Steps of a mode that end in the one batch and in the other by turns, so that a stale value is a wrong one.

    Batches are images, labels and ids. Returns what issues steps, and what judges the value that the latest of them
    gives. Training runs at a rate so small that no weight moves, which leaves the right loss where it is; at none at
    all the velocity would be zeros, on which a device may be faster than on numbers.
    """
    batches = [tuple(session.put(array) for array in batch) for batch in (first, last)]

    def step(batch: tuple[Any, ...]) -> Any:
        images, labels, ids = batch
        if mode == "infer":
            return session.infer(images)
        return session.train_step(images, labels, ids, step=0, learning_rate=1e-12)

    expected = [session.get(step(batch)) for batch in batches]
    turn = 0

    def run(steps: int) -> Any:
        nonlocal turn
        turn = 1 - turn
        for _ in range(steps - 1):
            step(batches[1 - turn])
        return step(batches[turn])

    # Measured by how far the two lie apart, which is nothing where a session gives the one for the other.
    apart = np.linalg.norm(expected[0] - expected[1])

    def is_right(value: Array) -> bool:
        return bool(apart > 0 and np.linalg.norm(value - expected[turn]) <= apart / 4)

    return run, is_right


def steps_for(session: Session, run: Run, seconds: float) -> tuple[int, float]:
    """How many steps take at least `seconds`, and what they took, up to the arrival of the last value.

    Whatever `synchronize` does has no say in it.
    """
    steps, again = 1, False
    settled = run(1)
    session.get(run(1))
    while True:
        # Less the fetch itself: a slow one is not work.
        fetching = _timed(session, settled)[0]
        start = perf_counter()
        session.get(run(steps))
        taken = perf_counter() - start - fetching
        if (taken >= seconds and again) or steps >= 1 << 20:
            return steps, taken
        # Once more before it is believed: the first run of a size may have compiled or tuned something.
        again = taken >= seconds
        if not again:
            steps = max(2 * steps, min(16 * steps, int(1.2 * steps * seconds / max(taken, 1e-6))))


def fetch_test(
    session: Session,
    run: Run,
    right: Callable[[Array], bool],
    *,
    seconds: float = 0.2,
    repeats: int = 7,
    slow: float = float("inf"),
) -> Clock:
    """Fetch a value right after `synchronize`, and one long since finished; `right` judges the former.

    A block takes `seconds` at least. There are `repeats` of them, or three where a block takes more than `slow`.
    """
    steps, taken = steps_for(session, run, seconds)
    repeats = min(3, repeats) if taken > slow else repeats
    blocks, idle, last, correct = [], [], [], True
    settled = run(1)
    session.get(run(1))
    sleep(0.01)
    for _ in range(repeats):
        idle.append(_timed(session, settled)[0])
        start = perf_counter()
        value = run(steps)
        session.synchronize()
        blocks.append(perf_counter() - start)
        taken, fetched = _timed(session, value)
        last.append(taken)
        correct = correct and right(fetched)
    return Clock(steps=steps, blocks=tuple(blocks), idle=tuple(idle), last=tuple(last), right=correct)


def _timed(session: Session, value: Any) -> tuple[float, Array]:
    start = perf_counter()
    fetched = session.get(value)
    return perf_counter() - start, fetched
