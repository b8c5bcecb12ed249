"""Pictures at speed: read by worker processes, some batches ahead of the training that takes them.

What is made of a picture is settled beforehand (`portnet.images.Order`); workers only carry it out, so that any number
of them makes the same batches in the same order. No torch is loaded in them, and pixels come back in shared memory.
"""

import multiprocessing
import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, suppress
from hashlib import sha256
from multiprocessing.connection import Connection, wait
from multiprocessing.shared_memory import SharedMemory
from queue import Full, Queue
from threading import Event, Thread
from typing import Any

import numpy as np

from portnet import images
from portnet.errors import InputError, PictureError, PortNetError
from portnet.graph import Graph
from portnet.images import U8, DataSet, Order, PixelBatch

Read = Callable[[int], U8]
Source = Callable[[], U8]

AHEAD = 3
"""How many batches are under way at a time; as many are ready."""
GROUP = 8
"""Pictures a worker takes at a time: a batch is spread over all of them."""


class Loader:
    """A data set's batches, read by `workers` processes, or by none but this one (0) when they are asked for.

    The processes stay over all epochs; `close`, or the end of a ``with`` block, ends them. A program that gives workers
    must be importable (``if __name__ == "__main__":`` around what it does), as for all of Python's multiprocessing.

    Raises `InputError` where the data set's `read` cannot be sent to another process; what `read` raises comes up from
    the batch that it belongs to, and `PortNetError` where a worker was killed.
    """

    def __init__(self, data: DataSet, *, workers: int = 0) -> None:
        self._data = data
        self._workers: list[_Worker] = []
        if not workers:
            return
        # A million paths are sent one by one, with the pictures, and not to every worker.
        self._sourced = len(data) > 0 and images.source(data.read, 0) is not None
        try:
            read = b"" if self._sourced else pickle.dumps(data.read)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"how {data.name} reads its pictures cannot be sent to worker processes ({error}); make `read` a "
                "function of a module or an object of a class, or take no workers"
            ) from None
        # Never a plain fork: this process runs torch's threads.
        method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(["portnet.loading"])
        try:
            for _ in range(workers):
                self._workers.append(_Worker(context, read))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. What they had not handed over is lost."""
        for worker in self._workers:
            worker.end()
        self._workers = []

    def training_batches(self, graph: Graph, **how: Any) -> Iterator[PixelBatch]:
        """One epoch of augmented batches; see `portnet.images.training_orders` for the arguments and errors."""
        return self._read(images.training_orders(self._data, graph, **how))

    def evaluation_batches(self, graph: Graph, **how: Any) -> Iterator[PixelBatch]:
        """Every picture once; see `portnet.images.evaluation_orders` for the arguments and errors."""
        return self._read(images.evaluation_orders(self._data, graph, **how))

    def _read(self, orders: Iterable[Order]) -> Iterator[PixelBatch]:
        return self._ahead(orders) if self._workers else images.read_batches(self._data, orders)

    def _ahead(self, orders: Iterable[Order]) -> Iterator[PixelBatch]:
        """The batches, which a thread of their own keeps coming while whoever takes them computes."""
        ready: Queue[PixelBatch | Exception | None] = Queue(AHEAD)
        stop = Event()

        def hand(item: PixelBatch | Exception | None) -> None:
            while not stop.is_set():
                with suppress(Full):
                    ready.put(item, timeout=0.1)
                    return

        def feed() -> None:
            try:
                with closing(self._batches(orders)) as batches:
                    for batch in batches:
                        hand(batch)
                        if stop.is_set():
                            return
                hand(None)
            except Exception as error:  # it is the taker's
                hand(error)

        thread = Thread(target=feed, name="portnet-loading", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _batches(self, orders: Iterable[Order]) -> Generator[PixelBatch]:
        """Hand out groups of pictures to idle workers, and batches in their order."""
        coming = iter(orders)
        batches: deque[_Batch] = deque()
        idle = deque(self._workers)
        try:
            while True:
                while len(batches) < AHEAD and (order := next(coming, None)) is not None:
                    batches.append(_Batch(order))
                for batch in batches:
                    while batch.groups and idle:
                        self._give(idle.popleft(), batch, batch.groups.popleft())
                if not batches:
                    return
                while batches[0].left:
                    for worker in self._finished():
                        worker.take()
                        idle.append(worker)
                    for batch in batches:
                        while batch.groups and idle:
                            self._give(idle.popleft(), batch, batch.groups.popleft())
                done = batches.popleft()
                yield done.order.batch(done.pixels)
        finally:
            # Left in the middle: what is under way must not be taken for the next epoch's.
            for worker in self._workers:
                with suppress(PortNetError, PictureError):
                    if worker.busy:
                        worker.take()

    def _give(self, worker: "_Worker", batch: "_Batch", group: range) -> None:
        order, read = batch.order.part(group), self._data.read
        sources = [images.source(read, int(i)) for i in order.places] if self._sourced else None
        worker.give(batch, group, (self._data.name, order, sources))

    def _finished(self) -> list["_Worker"]:
        """At least one worker that has something to hand over, or has died."""
        busy = {worker.pipe: worker for worker in self._workers if worker.busy}
        return [busy[ready] for ready in wait(list(busy))]


class _Batch:
    """A batch that is being made: its pixels so far, the groups nobody has taken, how many pictures are missing."""

    def __init__(self, order: Order) -> None:
        self.order, self.pixels = order, order.empty()
        self.left = len(self.pixels)
        self.groups = deque(range(i, min(i + GROUP, self.left)) for i in range(0, self.left, GROUP))


class _Worker:
    """A process, the pipe to it, and the memory shared with it, which holds one group of pictures at a time."""

    def __init__(self, context: Any, data: bytes) -> None:
        self.memory: SharedMemory | None = None
        self.work: tuple[_Batch, range] | None = None
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, data), daemon=True)
        self.process.start()
        theirs.close()

    @property
    def busy(self) -> bool:
        return self.work is not None

    def give(self, batch: _Batch, group: range, message: object) -> None:
        size = batch.pixels[group.start : group.stop].nbytes
        if self.memory is None or self.memory.size < size:
            self._free()
            self.memory = SharedMemory(create=True, size=size)
        self.work = batch, group
        with suppress(OSError):  # it has died; `take` says so
            self.pipe.send((self.memory.name, message))

    def take(self) -> None:
        """Wait for its group, and copy it to where it belongs."""
        assert self.work is not None, "only what was given can be taken"
        (batch, group), self.work = self.work, None
        try:
            failure = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            raise PortNetError(
                f"a worker process that reads pictures has ended ({_ending(code)}); was memory short? Begin again, "
                "from the last checkpoint where there is one, with fewer workers"
            ) from None
        if failure is not None:
            raise failure
        assert self.memory is not None, "it was given memory"
        target = batch.pixels[group.start : group.stop]
        target[...] = np.ndarray(target.shape, np.uint8, self.memory.buf)
        batch.left -= len(group)

    def end(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()
        self._free()

    def _free(self) -> None:
        if self.memory is not None:
            self.memory.close()
            self.memory.unlink()
            self.memory = None


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit status {code}"


def _serve(pipe: Connection, pickled: bytes) -> None:
    """What a worker does: read groups of pictures into the memory that it is told, until the pipe is closed."""
    # Ctrl-C goes to all processes of a terminal; the one that trains decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    read = pickle.loads(pickled) if pickled else None
    name, memory = "", None
    while True:
        try:
            told, message = pipe.recv()
        except (EOFError, OSError):  # closed, or the process that trains is no more
            return
        if told != name:
            if memory is not None:
                memory.close()
            name, memory = told, _attach(told)
        view = memory.buf if memory is not None else None
        assert view is not None, "a group comes with its memory"
        try:
            _fill(read, message, view)
            pipe.send(None)
        except BrokenPipeError:
            return
        except Exception as error:  # whatever a user's own `read` raises
            pipe.send(_sendable(error))


def _fill(read: Read | None, message: tuple[str, Order, list[Source] | None], memory: memoryview) -> None:
    name, order, sources = message
    pixels: U8 = np.ndarray(order.shape, np.uint8, memory)
    for i, place in enumerate(order.places.tolist()):
        if sources is not None:
            picture = sources[i]()
        else:
            assert read is not None, "what reads comes with the worker, or with the pictures"
            picture = read(place)
        order.fill(i, images.check_picture(picture, f"what {name} reads at {place}"), pixels[i])


def _attach(name: str) -> SharedMemory:
    if sys.version_info >= (3, 13):
        return SharedMemory(name=name, track=False)
    return SharedMemory(name=name)


def _sendable(error: Exception) -> Exception:
    """The error, or if it cannot be sent one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return PortNetError(f"{type(error).__name__}: {error}")
    return error


def digest(
    loader: Loader,
    graph: Graph,
    *,
    seed: int,
    batch: int,
    batches: int,
    on_batch: Callable[[], None] = lambda: None,
) -> tuple[str, int]:
    """SHA-256 of the first `batches` training batches, over as many epochs as it takes, and how many those are.

    Of each batch count its pixels, what is added to and what divides them, labels and ids.
    """
    sha, done, epoch = sha256(), 0, 0
    while done < batches:
        for each in loader.training_batches(graph, seed=seed, epoch=epoch, batch=batch, steps=batches - done):
            for value in (each.pixels, each.shift, each.scale, each.labels, each.ids):
                sha.update(np.ascontiguousarray(value).data)
            done += 1
            on_batch()
        epoch += 1
    return sha.hexdigest(), done


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
