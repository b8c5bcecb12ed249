"""The honest clock: does a session's `synchronize` really wait, and does it do the work each time?

A backend that queues its work can return at once; what is timed then is the launching. Once synchronised, fetching a
value that the last step went into must take no longer than fetching it later, and it must be the right value. That
launches scale with the steps too is why scaling alone proves nothing. A backend that remembers results by their inputs
is slower on inputs that it has not seen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import inf
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np

from portnet.contract import Array, Session

Inputs = tuple[Array, Array, Array]
"""Images, labels and ids."""

STILL = 1e-12
"""The learning rate of timed steps: all the work of an update, and no weight moves, so that the loss stays known. At
none at all the velocity would be zeros, on which a device may be faster than on numbers."""
MOVING = 1e-6
"""The learning rate of the step whose arrival in the weights is looked for."""

WAIT = 0.02
"""How much longer than an idle fetch the last one may take, as a share of the block."""
SCALING = (3.0, 5.0)
"""How many times as long four times the steps may take."""
CEILING = 1.05
"""The largest share of the measured ceiling that is believed."""
EVENTS = 0.02
"""How far the device's own events may be from the host's clock, as a share."""
UNSEEN = 2.0
"""How many times as long new inputs may take as inputs seen before."""


class Work:
    """Steps of a mode on one session: what is issued, what is fetched, and what is right.

    Steps end in the one of two known batches and in the other by turns, so that a stale value is a wrong one, and begin
    with one that no step has seen before (`renew`), so that a remembered one is of no use.
    """

    def __init__(self, session: Session, mode: str, first: Inputs, last: Inputs) -> None:
        self.session, self.mode = session, mode
        self._host = first
        self._known = [self._put(batch) for batch in (first, last)]
        self._turn = self._renewed = 0
        # Before any weight moves: the logits, or the losses, that the known batches give.
        self._expected = [session.get(self._step(batch)) for batch in self._known]
        self._apart = float(np.linalg.norm(self._expected[0] - self._expected[1]))
        self._probe = session.put(first[0][:1])
        self._new = self._known[0]
        self.renew()

    def _put(self, batch: Inputs) -> tuple[Any, ...]:
        return tuple(self.session.put(array) for array in batch)

    def renew(self) -> None:
        """Put the images once more, moved sideways by another distance: pixels that no step has seen."""
        self._renewed += 1
        down, right = divmod(self._renewed, self._host[0].shape[-1])
        images = np.roll(self._host[0], (down, right), axis=(-2, -1))
        self._new = (self.session.put(images), *self._known[0][1:])

    def _step(self, batch: tuple[Any, ...], rate: float = STILL) -> Any:
        images, labels, ids = batch
        if self.mode == "infer":
            return self.session.infer(images)
        return self.session.train_step(images, labels, ids, step=0, learning_rate=rate)

    def run(self, steps: int, *, moving: bool = False) -> Any:
        """Issue that many steps, wait for nothing, and return the device value of the last of them.

        With `moving`, the last update is large enough to be seen in the weights.
        """
        self._turn = 1 - self._turn
        known = self._known[self._turn], self._known[1 - self._turn]
        for i in range(steps - 1):
            self._step(known[i % 2] if i else self._new)
        return self._step(known[0], MOVING if moving else STILL)

    def run_unseen(self, batches: Sequence[tuple[Any, ...]]) -> Any:
        """One step on each of these device batches."""
        for batch in batches:
            value = self._step(batch)
        return value

    def unseen(self, count: int) -> list[tuple[Any, ...]]:
        """That many device batches which no step has seen."""
        found = []
        for _ in range(count):
            self.renew()
            found.append(self._new)
        return found

    def seen(self, count: int) -> list[tuple[Any, ...]]:
        """As many that every step sees."""
        turns = cycle(self._known)
        return [next(turns) for _ in range(count)]

    def block(self, steps: int) -> float:
        """Seconds of `steps` steps on inputs of which the first are new, waiting included."""
        self.renew()
        self.session.synchronize()
        start = perf_counter()
        if steps == 1:
            self._step(self._new)
        else:
            self.run(steps)
        self.session.synchronize()
        return perf_counter() - start

    def fetch(self, value: Any) -> Array:
        """What the last step left, on the host: its logits, or for training some of the weights that it updated."""
        if self.mode == "infer":
            return self.session.get(value)
        latest = self.session.latest_weights()
        return self.session.get(self.session.infer(self._probe) if latest is None else latest)

    def is_right(self, value: Array) -> bool:
        """Whether these are the logits, or the loss, of the batch that the latest `run` ended in; before updates."""
        return bool(self._apart > 0 and np.linalg.norm(value - self._expected[self._turn]) <= self._apart / 4)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """What the tests of the clock saw, in seconds.

    `blocks` of `steps` steps; the same fetch right after `synchronize` (`last`) and after another fetch (`idle`);
    whether the value fetched was `right`; `longer`: how many times as long four times the steps took; `unseen`: how
    many times as long new inputs took as inputs seen before; `events`: device time over host time; `share`: the work
    done as a share of what the ceiling allows. The last two are empty or None where they cannot be known.
    """

    steps: int
    blocks: tuple[float, ...]
    idle: tuple[float, ...]
    last: tuple[float, ...]
    right: bool
    longer: tuple[float, ...] = ()
    unseen: tuple[float, ...] = ()
    events: tuple[float, ...] = ()
    share: float | None = None

    @property
    def allowed(self) -> float:
        """The longest that fetching the last value may take: an idle fetch plus `WAIT` of the block."""
        return median(self.idle) + WAIT * median(self.blocks) if self.blocks else inf

    @property
    def lies(self) -> list[str]:
        """Which tests were failed, and by how much."""
        found = []
        if not self.right:
            found.append("after synchronize, the value fetched was not the one that the last step gives")
        if self.last and median(self.last) > self.allowed:
            found.append(
                f"after blocks of {self.steps} steps in {1e3 * median(self.blocks):.1f} ms, fetching the last value "
                f"took {1e3 * median(self.last):.2f} ms; allowed {1e3 * self.allowed:.2f} ms"
            )
        found += _lies(self.longer, self.unseen, self.events)
        if self.share is not None and self.share > CEILING:
            found.append(f"the rate is {self.share:.2f} of the ceiling measured here; believed up to {CEILING:g}")
        return found

    @property
    def honest(self) -> bool:
        """Whether the work was done, each time, when `synchronize` said so."""
        return not self.lies

    def __str__(self) -> str:
        return "; ".join(self.lies) or "honest"


def _lies(longer: Sequence[float], unseen: Sequence[float], events: Sequence[float]) -> list[str]:
    found = []
    if longer and not SCALING[0] <= median(longer) <= SCALING[1]:
        found.append(
            f"four times the steps took {median(longer):.2f} times as long; allowed {SCALING[0]:g} to {SCALING[1]:g}"
        )
    if unseen and median(unseen) > UNSEEN:
        found.append(f"inputs not seen before took {median(unseen):.1f} times as long; allowed {UNSEEN:g}")
    if events and abs(median(events) - 1) > EVENTS:
        found.append(f"the device's events say {median(events):.3f} of the host's time; allowed 1 ± {EVENTS}")
    return found


def steps_for(work: Work, seconds: float) -> tuple[int, float]:
    """How many steps take at least `seconds`, and what they took, up to the arrival of the last value.

    Whatever `synchronize` does has no say in it.
    """
    steps, again = 1, False
    settled = work.run(1)
    work.fetch(settled)
    work.fetch(work.run(1))
    while True:
        # Less the fetch itself: a slow one is not work.
        fetching = _timed(lambda: work.fetch(settled))[0]
        start = perf_counter()
        work.fetch(work.run(steps))
        taken = perf_counter() - start - fetching
        if (taken >= seconds and again) or steps >= 1 << 16:
            return steps, taken
        # Once more before it is believed: the first run of a size may have compiled or tuned something.
        again = taken >= seconds
        if not again:
            steps = max(2 * steps, min(16 * steps, int(1.2 * steps * seconds / max(taken, 1e-6))))


def examine(
    work: Work,
    *,
    seconds: float = 0.2,
    repeats: int = 7,
    slow: float = inf,
    slow_repeats: int = 3,
    ceiling: float | None = None,
) -> Clock:
    """Every test of the clock. A block takes `seconds` at least.

    There are `repeats` of each measurement, or `slow_repeats` where a block takes more than `slow` seconds. `ceiling`:
    the steps a second that the device cannot exceed. Moves the weights.
    """
    session = work.session
    # First, since the fetch test moves the weights of a session that trains, and since it makes no sense to time what
    # gives other values.
    if not all(work.is_right(session.get(work.run(1))) for _ in range(4)):
        return Clock(steps=1, blocks=(), idle=(), last=(), right=False)
    steps, taken = steps_for(work, seconds)
    repeats = min(slow_repeats, repeats) if taken > slow else repeats
    right = True
    longer: list[float] = []
    unseen: list[float] = []
    events: list[float] = []
    # A busy machine can delay anything; what looks wrong is looked at four times as often, and all of it counts.
    for turn in range(4 * repeats):
        if turn == repeats and not _lies(longer, unseen, events):
            break
        one = _block(work, lambda: work.run(steps))
        longer.append(_block(work, lambda: work.run(4 * steps)) / one)
        fresh, known = work.unseen(2), work.seen(2)
        session.synchronize()
        new = _block(work, lambda batches=fresh: work.run_unseen(batches))  # type: ignore[misc]
        unseen.append(new / _block(work, lambda batches=known: work.run_unseen(batches)))  # type: ignore[misc]
        start = perf_counter()
        device = session.device_seconds(lambda: work.run(steps))
        if device is not None:
            session.synchronize()
            events.append(device / (perf_counter() - start))
    blocks: list[float] = []
    idle: list[float] = []
    last: list[float] = []
    before = work.fetch(work.run(1, moving=True))
    for turn in range(4 * repeats):
        if turn == repeats and median(last) <= median(idle) + WAIT * median(blocks):
            break
        for times, finished in ((idle, True), (last, False)):
            start = perf_counter()
            value = work.run(steps, moving=True)
            session.synchronize()
            blocks.append(perf_counter() - start)
            if finished:
                work.fetch(value)  # whatever `synchronize` did, this waits
            spent, fetched = _timed(lambda value=value: work.fetch(value))  # type: ignore[misc]
            times.append(spent)
            if not finished:
                # What the same fetch gives once the device has had time to finish, whatever it said.
                sleep(taken)
                settled = work.fetch(value)
                apart = float(np.linalg.norm(settled - before))
                right = right and apart > 0 and float(np.linalg.norm(settled - fetched)) <= apart / 4
            before = fetched
    share = None if ceiling is None else steps / median(blocks) / ceiling
    return Clock(
        steps=steps,
        blocks=tuple(blocks),
        idle=tuple(idle),
        last=tuple(last),
        right=right,
        longer=tuple(longer),
        unseen=tuple(unseen),
        events=tuple(events),
        share=share,
    )


def _block(work: Work, run: Callable[[], Any]) -> float:
    start = perf_counter()
    run()
    work.session.synchronize()
    return perf_counter() - start


def _timed(fetch: Callable[[], Array]) -> tuple[float, Array]:
    start = perf_counter()
    fetched = fetch()
    return perf_counter() - start, fetched
