"""What a serving user asks: latency at batch 1, throughput by batch, the bus, memory, the largest batch that fits."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from portnet import clock, stats
from portnet.contract import Array, Backend, Session, Settings
from portnet.errors import out_of_memory
from portnet.watch import Watch, available_memory
from portnet.workload import Say, Workload

BLOCK = 0.1
"""Seconds that a timed block takes at least."""
LATENCIES = 300
SWEEP = tuple(2**i for i in range(11))
"""Batch sizes, as far as memory goes."""
SWEEP_SECONDS = 0.5


class Wrong(Exception):
    """What was computed is not the network."""


def serve(
    work: Workload,
    backend: Backend,
    settings: Settings,
    session: Session,
    *,
    quick: bool,
    unified: bool,
    limited: bool,
    watch: Watch,
    say: Say,
) -> dict[str, Any]:
    """`Record.serving`. Closes `session`, which served one image at a time, before larger batches are tried.

    `unified`: the device computes in the host's memory. `limited`: how much memory it has is known. The largest batch
    is looked for where it has its own. Raises `Wrong` where a batch is not answered as the network answers it.
    """
    one = next(work.batches(1))[0]
    say("latency at batch 1")
    with closing(session):
        with watch:
            latencies = _latencies(session, one, 100 if quick else LATENCIES)
        bus = _bus(session, unified=unified)
    found: dict[str, Any] = {"latencies": latencies, **asdict(stats.percentiles(latencies)), "bus": bus}
    found |= {"sweep": {}, "largest_batch": None}
    for batch in SWEEP[: 6 if quick else None]:
        say(f"batch {batch}")
        needed = sum(cost.bytes for cost in work.costs(batch, training=False, precision=settings.precision).values())
        if unified and needed > available_memory() / 2:
            # Where the host's memory is the device's, what does not fit takes the whole machine down.
            found["stopped"] = f"batch {batch} might need {needed:.0f} of {available_memory()} bytes that are free"
            break
        try:
            found["sweep"][str(batch)] = _at_batch(work, backend, settings, batch)
        except Exception as error:
            if not out_of_memory(error):
                raise
            found["stopped"] = f"batch {batch} is out of memory"
            break
    if limited and not unified:

        def fits(batch: int) -> bool:
            say(f"does batch {batch} fit")
            return _fits(work, backend, settings, batch)

        found["largest_batch"] = _largest(fits, max(map(int, found["sweep"]), default=1))
    return found


def _latencies(session: Session, one: Array, count: int) -> list[float]:
    """Seconds from each image's issue to its result; the images differ."""
    for _ in range(10):
        session.get(session.infer(session.put(one)))
    latencies: list[float] = []
    for i in range(count):
        image = np.roll(one, i, axis=-1)
        began = perf_counter()
        session.get(session.infer(session.put(image)))
        latencies.append(perf_counter() - began)
        if sum(latencies) > 60:
            break
    return latencies


def _at_batch(work: Workload, backend: Backend, settings: Settings, batch: int) -> dict[str, Any]:
    verdict = work.verdict_at(backend, settings, batch)
    if verdict is not None and not verdict.passed:
        raise Wrong(f"batch {batch}: {verdict}")
    with closing(work.open(backend, settings)) as session:
        pair = list(islice(work.batches(batch), 2))
        timed = clock.Work(session, "infer", pair[0], pair[1])
        steps, _ = clock.steps_for(timed, BLOCK)
        timed.block(steps)
        seconds = [timed.block(steps)]
        while sum(seconds) < SWEEP_SECONDS or len(seconds) < 3:
            seconds.append(timed.block(steps))
        if not timed.is_right(session.get(timed.run(steps))):
            raise Wrong(f"batch {batch}: after the timed blocks, a known batch no longer gave its value")
        answers = []
        for images, _, _ in (pair[0], pair[1], pair[0]):
            began = perf_counter()
            session.get(session.infer(session.put(images)))
            answers.append(perf_counter() - began)
        return {"steps": steps, "seconds": seconds, "latencies": answers, "peak_memory": session.peak_memory()}


def _fits(work: Workload, backend: Backend, settings: Settings, batch: int) -> bool:
    with closing(work.open(backend, settings)) as session:
        try:
            images = next(work.batches(16))[0]
            session.get(session.infer(session.put(images.repeat(-(-batch // 16), axis=0)[:batch])))
        except Exception as error:
            if not out_of_memory(error):
                raise
            return False
        return True


def _largest(fits: Callable[[int], bool], known: int) -> int:
    """The largest batch that fits, to within 1/16, given one that does; by doubling, then halving the gap."""
    top = known * 2
    while top <= 1 << 17 and fits(top):
        known, top = top, top * 2
    while top - known > max(1, known // 16):
        middle = (known + top) // 2
        known, top = (middle, top) if fits(middle) else (known, middle)
    return known


def _bus(session: Session, *, unified: bool) -> dict[str, Any]:
    """Bytes/s from host to device and back, for 64 MiB of float32; None where they share their memory."""
    if unified:
        return {"to_device": None, "to_host": None, "reason": "host and device share their memory"}
    host = np.zeros(1 << 24, np.float32)
    rates: dict[str, list[float]] = {"to_device": [], "to_host": []}
    for _ in range(6):
        session.synchronize()
        began = perf_counter()
        there = session.put(host)
        session.synchronize()
        rates["to_device"].append(host.nbytes / (perf_counter() - began))
        began = perf_counter()
        session.get(there)
        rates["to_host"].append(host.nbytes / (perf_counter() - began))
    return {k: median(v[1:]) for k, v in rates.items()} | {"samples": rates}
