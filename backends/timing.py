"""Work timed in blocks, and ceilings made of it, for whatever device: a backend brings the work and its own wait."""

from collections.abc import Callable, Iterable
from statistics import median
from time import perf_counter

from portnet.contract import Ceilings

Work = Callable[[], object]


def blocks(work: Work, wait: Work, *, seconds: float, repeats: int, budget: float = float("inf")) -> list[float]:
    """Seconds that `work` takes, once per block; a block lasts `seconds` at least and ends in `wait`.

    Warming up runs it once, and then ever longer blocks until one is long enough; that one is the first to count.
    There are `repeats`, or fewer where they would exceed `budget`, in seconds, which covers the warming up too.
    """

    def block(times: int) -> float:
        begin = perf_counter()
        for _ in range(times):
            work()
        wait()
        return perf_counter() - begin

    start, times = perf_counter(), 1
    wait()
    block(1)
    while (taken := block(times)) < seconds:
        times = max(2 * times, min(16 * times, int(1.2 * times * seconds / max(taken, 1e-9))))
    found = [taken / times]
    while len(found) < repeats and perf_counter() - start + taken < budget:
        taken = block(times)
        found.append(taken / times)
    return found


def typical(work: Work, wait: Work, *, seconds: float = 0.02, repeats: int = 5) -> float:
    """The median of `blocks`."""
    return median(blocks(work, wait, seconds=seconds, repeats=repeats))


def ceilings(
    product: Callable[[int], Work | None],
    sizes: Iterable[int],
    copy: tuple[Work, int] | None,
    wait: Work,
    *,
    budget: float,
    seconds: float = 0.05,
    repeats: int = 5,
) -> Ceilings:
    """The best rates of square products and of one copy, in about `budget` seconds.

    `product(n)` makes the work of one n x n by n x n product, counted as 2 n^3 FLOPs, or None where it does not fit;
    `sizes` ascend, and the first to be too long for the time left ends them. `copy` is the work of one large copy and
    the bytes that it reads and writes. The samples are called ``matmul_<n>`` (FLOP/s) and ``copy_<bytes>`` (bytes/s).
    """
    samples: dict[str, tuple[float, ...]] = {}
    start, bandwidth, flops = perf_counter(), None, 0.0
    if copy is not None:
        work, size = copy
        samples[f"copy_{size}"] = rates = tuple(
            size / t for t in blocks(work, wait, seconds=seconds, repeats=repeats, budget=budget / 4)
        )
        bandwidth = max(rates)
    for n in sizes:
        left = budget - (perf_counter() - start)
        # One warms up and one counts at least.
        if flops and 2 * max(2 * n**3 / flops, seconds) > left:
            break
        if (work_of_n := product(n)) is None:
            break
        samples[f"matmul_{n}"] = rates = tuple(
            2 * n**3 / t for t in blocks(work_of_n, wait, seconds=seconds, repeats=repeats, budget=left)
        )
        flops = max(flops, *rates)
    return Ceilings(flops=flops or None, bandwidth=bandwidth, samples=samples)
