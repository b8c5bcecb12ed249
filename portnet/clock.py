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


def steps_for(session: Session, run: Run, seconds: float) -> int:
    """How many steps take at least `seconds`, timed up to the arrival of the last value, whatever `synchronize` does."""
    steps, taken = 1, 0.0
    session.get(run(1))
    while True:
        start = perf_counter()
        session.get(run(steps))
        taken = perf_counter() - start
        if taken >= seconds or steps >= 1 << 20:
            return steps
        steps = max(2 * steps, min(16 * steps, int(1.2 * steps * seconds / max(taken, 1e-6))))


def fetch_test(
    session: Session, run: Run, right: Callable[[Array], bool], *, seconds: float = 0.2, repeats: int = 7
) -> Clock:
    """Fetch a value right after `synchronize`, and one long since finished; `right` judges the former."""
    steps = steps_for(session, run, seconds)
    blocks, idle, last, correct = [], [], [], True
    for _ in range(repeats):
        settled, later = run(1), run(1)
        session.get(later)
        sleep(0.01)
        idle.append(_timed(session, settled)[0])
        start = perf_counter()
        value = run(steps)
        session.synchronize()
        blocks.append(perf_counter() - start)
        taken, fetched = _timed(session, value)
        last.append(taken)
        # A dishonest block is as long as the work it hid, or 2% of it would be nothing.
        blocks[-1] += taken
        correct = correct and right(fetched)
    return Clock(steps=steps, blocks=tuple(blocks), idle=tuple(idle), last=tuple(last), right=correct)


def _timed(session: Session, value: Any) -> tuple[float, Array]:
    start = perf_counter()
    fetched = session.get(value)
    return perf_counter() - start, fetched
