"""Fake backends that try to fool the harness, each in one way. Named as fakes; none is a device.

Importable as a plug-in, so that measured processes find them too: see `plugin` in test_launch.py.
"""

import os
import signal
import time
from dataclasses import replace

import numpy as np

from portnet.contract import Backend, Ceilings, Device
from portnet.hookspecs import hookimpl
from portnet_backends.reference import ReferenceSession


class FakeHonest(ReferenceSession):
    """Float32 NumPy, with nothing to hide."""


class FakeNoSynchronize(FakeHonest):
    """Its work is done when it is fetched, and `synchronize` does nothing."""

    def infer(self, images):
        return [lambda: ReferenceSession.infer(self, images)]

    def get(self, value):
        if isinstance(value, list):
            value[:] = [value[0]()] if callable(value[0]) else value
            return np.array(value[0])
        return np.array(value)


class FakeSleepingSynchronize(FakeNoSynchronize):
    """Its `synchronize` takes its time, and still waits for nothing."""

    def synchronize(self):
        time.sleep(0.02)


class FakeOtherUnits(FakeHonest):
    """Its own events count milliseconds and call them seconds."""

    def device_seconds(self, run):
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)


class FakeFallback(FakeHonest):
    """Says that it computed something elsewhere, as a framework's profiler would."""

    def fallbacks(self, run):
        run()
        return {"aten::local_response_norm": 2}


class FakeRemembers(FakeHonest):
    """Computes what it has not seen before, and hands out the rest from memory: the last `kept` answers."""

    kept = 10**6

    def infer(self, images):
        memory = self.__dict__.setdefault("memory", {})
        key = images.tobytes()
        if key not in memory:
            memory[key] = super().infer(images)
            while len(memory) > self.kept:
                memory.pop(next(iter(memory)))
        return memory[key]


class FakeRemembersTheLast(FakeRemembers):
    """Remembers one answer only."""

    kept = 1


class FakeSlowing(FakeHonest):
    """Every step takes 2% longer than the one before: far beyond what a busy machine hides.

    It sleeps for longer than it computes, since a machine with other work lengthens what is computed.
    """

    steps = 0

    def infer(self, images):
        self.steps += 1
        time.sleep(0.04 * 1.02**self.steps)
        return super().infer(images)


class FakeTooFast(FakeRemembers):
    """Remembers every answer, of images that it is told of beforehand: only the ceiling gives it away."""

    def put(self, array):
        put = super().put(array)
        if put.ndim == 4 and len(put) > 1:
            FakeRemembers.infer(self, put)
        return put


class FakeWandering(FakeHonest):
    """Rounds as it happens to, as sums whose order hangs on threads do: no two sessions give the same bits."""

    def infer(self, images):
        found = super().infer(images)
        return found * (1 + np.float32(2**-20) * np.random.default_rng().random(found.shape, np.float32))

    def train_step(self, images, labels, ids, *, step, learning_rate):
        loss = super().train_step(images, labels, ids, step=step, learning_rate=learning_rate)
        bias = self.parameters["conv1.bias"]
        bias += np.float32(1e-9) * np.random.default_rng().random(bias.shape, np.float32)
        return loss


class FakeRepeats(FakeHonest):
    """Computes two images and repeats their logits."""

    def infer(self, images):
        return np.resize(super().infer(images[:2]), (len(images), 10))


class FakeCrashing(FakeHonest):
    def infer(self, images):
        os.kill(os.getpid(), signal.SIGSEGV)


class FakeHanging(FakeHonest):
    def infer(self, images):
        time.sleep(3600)


class FakeKilled(FakeHonest):
    """Ends as by the system's out-of-memory killer."""

    def infer(self, images):
        os.kill(os.getpid(), signal.SIGKILL)


class FakeOutOfMemory(FakeHonest):
    def infer(self, images):
        raise MemoryError("cannot allocate 1 TiB")


class FakeBroken(FakeHonest):
    def infer(self, images):
        raise RuntimeError("it broke")


def merged_lrn(graph):
    """A wrong layer: the alpha of LRN without the 5."""
    return replace(graph, layers=tuple(replace(x, alpha=x.alpha / 5) if x.name == "norm1" else x for x in graph.layers))


class FakeDevice(Backend):
    vendor = "nobody"
    modes = ("infer", "train")

    def __init__(self, name, session=FakeHonest, tamper=lambda graph: graph, flops=None):
        self.name, self.session, self.tamper, self.flops = name, session, tamper, flops  # type: ignore[misc]

    def probe(self):
        return Device(name="a fake", precisions=("float32",), unified=True)

    def open(self, graph, weights, settings):
        self.check(settings)
        return self.session(self.tamper(graph), weights, settings)

    def ceilings(self, precision):
        return Ceilings(flops=self.flops, bandwidth=1e11, samples={}) if self.flops else None


class FakeProbe(FakeDevice):
    """Its driver hangs, crashes or complains when it is asked for the device, and prints what nobody asked for."""

    def __init__(self, name, probe):
        super().__init__(name)
        self.asked = probe

    def probe(self):
        print('{"name": "fake-honest", "device": null}')
        return self.asked()


class FakeEmulates(FakeDevice):
    def probe(self):
        return replace(super().probe(), emulated=("float32",))


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


FAKES = {
    "fake-honest": FakeDevice("fake-honest"),
    "fake-no-synchronize": FakeDevice("fake-no-synchronize", FakeNoSynchronize),
    "fake-sleeping-synchronize": FakeDevice("fake-sleeping-synchronize", FakeSleepingSynchronize),
    "fake-other-units": FakeDevice("fake-other-units", FakeOtherUnits),
    "fake-wrong-layer": FakeDevice("fake-wrong-layer", tamper=merged_lrn),
    "fake-fallback": FakeDevice("fake-fallback", FakeFallback),
    "fake-remembers": FakeDevice("fake-remembers", FakeRemembers),
    "fake-remembers-the-last": FakeDevice("fake-remembers-the-last", FakeRemembersTheLast),
    "fake-too-fast": FakeDevice("fake-too-fast", FakeTooFast, flops=1e12),
    "fake-wandering": FakeDevice("fake-wandering", FakeWandering),
    "fake-repeats": FakeDevice("fake-repeats", FakeRepeats),
    "fake-slowing": FakeDevice("fake-slowing", FakeSlowing),
    "fake-emulates": FakeEmulates("fake-emulates"),
    "fake-crashing": FakeDevice("fake-crashing", FakeCrashing),
    "fake-hanging": FakeDevice("fake-hanging", FakeHanging),
    "fake-killed": FakeDevice("fake-killed", FakeKilled),
    "fake-out-of-memory": FakeDevice("fake-out-of-memory", FakeOutOfMemory),
    "fake-broken": FakeDevice("fake-broken", FakeBroken),
    "fake-probe-hangs": FakeProbe("fake-probe-hangs", lambda: time.sleep(3600)),
    "fake-probe-crashes": FakeProbe("fake-probe-crashes", crash),
    "fake-probe-raises": FakeProbe("fake-probe-raises", lambda: 1 / 0),
}


@hookimpl
def portnet_backends():
    return FAKES.values()
