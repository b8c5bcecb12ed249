"""Backends that are fakes, for testing what must catch them."""

import threading
from dataclasses import replace
from queue import Queue

import numpy as np

from portnet.contract import Backend, Device
from portnet_backends.reference import ReferenceSession


class FakeFuture:
    """A value that a worker thread computes later."""

    def __init__(self):
        self.done = threading.Event()
        self.value = None

    def wait(self):
        self.done.wait()
        if isinstance(self.value, Exception):
            raise self.value
        return self.value


class FakeAsyncSession(ReferenceSession):
    """Float32 NumPy behind a queue, as a device's stream is. `waits` says whether `synchronize` does its duty."""

    waits = True

    def __init__(self, *args):
        super().__init__(*args)
        self.queue = Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self):
        while True:
            future, function = self.queue.get()
            try:
                future.value = function()
            except Exception as error:
                future.value = error
            future.done.set()

    def _issue(self, function):
        future = FakeFuture()
        self.queue.put((future, function))
        return future

    def put(self, array):
        copy = np.array(array)
        return self._issue(lambda: copy)

    def get(self, value):
        return np.array(value.wait())

    def infer(self, images):
        return self._issue(lambda: ReferenceSession.infer(self, images.wait()))

    def train_step(self, images, labels, ids, *, step, learning_rate):
        return self._issue(
            lambda: ReferenceSession.train_step(
                self, images.wait(), labels.wait(), ids.wait(), step=step, learning_rate=learning_rate
            )
        )

    def weights(self):
        return self._issue(lambda: ReferenceSession.weights(self)).wait()

    def latest_weights(self):
        return self._issue(lambda: ReferenceSession.latest_weights(self))

    def synchronize(self):
        if self.waits:
            self._issue(lambda: None).wait()


class FakeNoOpSession(FakeAsyncSession):
    """Its `synchronize` does nothing."""

    waits = False


class FakeStaleSession(FakeAsyncSession):
    """Its `synchronize` does nothing, and its `get` hides that: it hands out the last finished value instead."""

    waits = False
    latest = None

    def get(self, value):
        if value.done.is_set() or self.latest is None:
            self.latest = np.array(value.wait())
        return self.latest


class FakeBackend(Backend):
    """A reference whose sessions are of another class, or computed from a graph that was tampered with."""

    name = "fake"
    vendor = "nobody"
    modes = ("infer", "train")

    def __init__(self, session=ReferenceSession, tamper=lambda graph: graph, precision="float32"):
        self.session, self.tamper, self.precision = session, tamper, precision

    def probe(self):
        return Device(name="a fake", precisions=(self.precision,))

    def open(self, graph, weights, settings):
        self.check(settings)
        return self.session(self.tamper(graph), weights, settings)


def change(name, **fields):
    """A tampering: the layer of that name with other fields."""
    return lambda graph: replace(
        graph, layers=tuple(replace(x, **fields) if x.name == name else x for x in graph.layers)
    )


def change_recipe(**fields):
    """A tampering: another update rule."""
    return lambda graph: replace(graph, recipe=replace(graph.recipe, **fields))
