"""What is measured: a model, batches for it, and what proves that a session computes it.

AlexNet from its graph is the built-in one. `measurement` assumes nothing but what stands in `Workload`.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from statistics import mean, stdev
from typing import Any

import numpy as np

from portnet import alexnet, cache, calibration, images, parity, plugins, shards, stats, trained, training, weights
from portnet.clock import Inputs
from portnet.contract import INT8, Array, Backend, Session, Settings, Unsupported
from portnet.errors import PortNetError
from portnet.graph import ITEMSIZE, Cost, Graph
from portnet.parity import Verdict
from portnet.record import Spec

Say = Callable[[str], None]
"""Told what the measurement is doing, one short line at a time."""

PARITY_BATCH = 2
DIFFERENT = 16
"""How many different images the batch that is timed is made of."""
ANSWERED = 40
"""Test pictures that are answered at a time; 360 digits are nine times as many."""
LARGEST_ERROR = 1e300
"""What stands for an error that is not finite: JSON has no infinity."""
BELIEVED = 0.9999
"""The probability with which an equal's loss lies inside the envelope at a step."""

EARLIER = 5
"""Steps by which a run may part from its equals before they part from each other.

Runs part by leaps, where a rectifier or a maximum falls otherwise, some at this step and some at the next ones: at step
13 of one training six runs of 21 were 1e-4 from the others, and those within 2e-5. And equals, which all round alike,
part later than what rounds in another order.
"""

COARSER = {"bfloat16": 2.0**15, "float16": 2.0**12, "tf32": 2.0**12}
"""A rounding to that precision as a multiple of a step between float32 neighbours."""


class Workload(ABC):
    """A model with a batch maker and a loss."""

    @property
    @abstractmethod
    def learning_rate(self) -> float:
        """Of the first steps of training."""

    @abstractmethod
    def open(self, backend: Backend, settings: Settings) -> Session:
        """The model with its initial weights on the device."""

    def prepare(self) -> str:
        """Make what `open` hands to a backend, so that it is not taken for the backend's own time.

        Gives the SHA-256 of the weights, or nothing where they are made by `open`.
        """
        return ""

    @abstractmethod
    def verdict(self, backend: Backend, settings: Settings) -> Verdict:
        """The parity gate, on fresh sessions."""

    @abstractmethod
    def batches(self, batch: int) -> Iterator[Inputs]:
        """Host batches of that size without end, made as training makes them."""

    def verdict_at(self, backend: Backend, settings: Settings, batch: int) -> Verdict | None:
        """The gate on inference at that batch size; None where there is no such gate."""
        return None

    def costs(self, batch: int, *, training: bool, precision: str) -> Mapping[str, Cost]:
        """The least work of each layer; empty where it is not known."""
        return {}

    def curve(self, backend: Backend, settings: Settings, say: Say) -> dict[str, Any]:
        """The same training: the stack's losses, those of equals, and the digest of the weights; empty if there is
        none."""
        return {}

    def answers(self, backend: Backend, settings: Settings, say: Say) -> dict[str, Any]:
        """What the stack makes of test pictures with trained weights; empty if there are none. See `Record.answers`."""
        return {}


class AlexNet(Workload):
    """The graph of `spec`, on its data."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    @cached_property
    def data(self) -> images.Splits:
        return shards.load(self.spec.data)

    def graph_of(self, size: int) -> Graph:
        """The network for images of that many pixels a side."""
        return alexnet.graph(self.spec.preset, image_size=size, classes=self.spec.classes, mean=self.data.train.mean)

    @cached_property
    def graph(self) -> Graph:
        return self.graph_of(self.spec.image_size)

    @cached_property
    def start(self) -> dict[str, Any]:
        return weights.initial(self.graph, self.spec.seed)

    @property
    def learning_rate(self) -> float:
        return self.graph.recipe.learning_rate

    def prepare(self) -> str:
        if self.spec.precision == INT8:
            calibration.calibrated(self.graph, self.start, self._pictures(self.graph))
        return weights.digest(self.start)

    def open(self, backend: Backend, settings: Settings) -> Session:
        return calibration.opened(backend, self.graph, self.start, settings, lambda: self._pictures(self.graph))

    def _pictures(self, graph: Graph) -> Array:
        return calibration.pictures(self.data.train, graph)

    def verdict(self, backend: Backend, settings: Settings) -> Verdict:
        train, batch = self.spec.mode == "train", self.spec.batch
        return _gate(self.graph, backend, settings, batch=1 if self.spec.mode == "serve" else batch, train=train)

    def verdict_at(self, backend: Backend, settings: Settings, batch: int) -> Verdict | None:
        if parity.is_oracle(backend) and settings.precision == "float64":
            return None
        return _batched(self.graph, backend, settings, batch=batch, train=False)

    def batches(self, batch: int) -> Iterator[Inputs]:
        epoch = 0
        while True:
            if batch > len(self.data.train):
                yield self._tiled(batch, epoch)
            else:
                for b in images.training_batches(
                    self.data.train, self.graph, seed=self.spec.seed, epoch=epoch, batch=batch
                ):
                    yield b.images, b.labels, b.ids
            epoch += 1

    def _tiled(self, batch: int, epoch: int) -> Inputs:
        """More images than the data set has: all of it several times over."""
        count = len(self.data.train)
        b = next(images.training_batches(self.data.train, self.graph, seed=self.spec.seed, epoch=epoch, batch=count))
        index = np.arange(batch) % count
        return b.images[index], b.labels[index], b.ids[index]

    def costs(self, batch: int, *, training: bool, precision: str) -> Mapping[str, Cost]:
        return self.graph.costs(batch, training=training, itemsize=ITEMSIZE[precision])

    def curve(self, backend: Backend, settings: Settings, say: Say) -> dict[str, Any]:
        spec = self.spec
        graph = self.graph_of(spec.curve_size)
        start = weights.initial(graph, spec.seed)
        return {
            "losses": self._fit(graph, backend, settings, start, "training", say),
            "perturbed": self._equals(graph, settings, start, say),
            "weights": weights.digest(start),
        }

    def answers(self, backend: Backend, settings: Settings, say: Say) -> dict[str, Any]:
        network = self.graph_of(self.spec.curve_size)
        try:
            seen = trained.trained(network, self.data, self.spec.data, seed=self.spec.seed, say=say)
        except training.Diverged as error:
            # Of the data, and no fault of the stack's.
            say(f"no answers: {error}")
            return {}
        session = calibration.opened(backend, seen.graph, seen.weights, settings, lambda: self._pictures(seen.graph))
        count, size = len(seen.images), min(ANSWERED, len(seen.images))
        # Batches of one size: the last takes some of the first pictures again.
        chunks = (np.take(seen.images, range(i, i + size), axis=0, mode="wrap") for i in range(0, count, size))
        logits = np.concatenate([session.get(session.infer(session.put(chunk))) for chunk in chunks])[:count]
        session.close()
        best = logits.argmax(axis=1)
        return {
            "weights": weights.digest(seen.weights),
            "pixels": seen.graph.input[1],
            "count": count,
            "right": int((best == seen.labels).sum()),
            "right_by_reference": seen.right,
            "agree": int((best == seen.logits.argmax(axis=1)).sum()),
            "error": min(parity.channel_error(logits, seen.logits), LARGEST_ERROR),
        }

    def _fit(
        self, graph: Graph, backend: Backend, settings: Settings, start: Mapping[str, Any], label: str, say: Say
    ) -> list[float]:
        spec = self.spec
        session = backend.open(graph, start, settings)
        losses = training.fit(
            session,
            training.training_batches(self.data, graph, seed=spec.seed, batch=spec.curve_batch, steps=spec.curve_steps),
            learning_rate=graph.recipe.learning_rate,
            on_step=lambda step, loss: say(f"{label}, step {step} of {spec.curve_steps}, loss {loss:.3f}"),
        )
        session.close()
        return losses

    def _equals(self, graph: Graph, settings: Settings, start: Mapping[str, Any], say: Say) -> list[list[float]]:
        """Runs of an equal from weights one rounding away; made once per machine."""
        spec = self.spec
        count = spec.perturbed
        if not count:
            return []
        backend, device = trained.trainer()
        precision = settings.precision if settings.precision in device.precisions else "float32"
        plain = Settings(precision=precision, seed=spec.seed)
        coarser = COARSER.get(settings.precision, 1.0)

        def make() -> list[list[float]]:
            verdict = _gate(graph, backend, plain, batch=spec.curve_batch, train=True)
            if not verdict.passed:
                raise PortNetError(f"{backend.name}, which shows how far equals drift, is wrong: {verdict}")
            runs = []
            for run in range(count):
                label = f"how far equals drift, run {run + 1} of {count}"
                moved = {
                    n: start[n] + (w - start[n]) * np.float32(coarser) for n, w in weights.perturbed(start, run).items()
                }
                runs.append(self._fit(graph, backend, plain, moved if run else start, label, say))
            return runs

        first = next(images.training_batches(self.data.train, graph, seed=spec.seed, epoch=0, batch=spec.curve_batch))
        limits = sorted({k for layer in backend.library_layers(plain) for k in layer.environment})
        asked = (graph, plain, spec.data, spec.curve_batch, spec.curve_steps, count, coarser)
        here = (device, [(k, os.environ.get(k)) for k in limits], cache.sources(backend))
        key = repr((*asked, weights.digest({"first": first.images}), *here))
        found: list[list[float]] = cache.text("equals", key, make)
        return found


def _gate(graph: Graph, backend: Backend, settings: Settings, *, batch: int, train: bool) -> Verdict:
    if parity.is_oracle(backend) and settings.precision == "float64":
        return Verdict()
    case = parity.Case(graph, batch=PARITY_BATCH, seed=settings.seed)
    verdicts = []
    if settings.precision == INT8:
        # The network that is quantised, layer by layer: its int8 gate is coarse, and sees logits alone.
        wide = replace(settings, precision="float32")
        with closing(plugins.backends()[plugins.RUNNER].open(case.gated, case.weights, wide)) as session:
            found = parity.judge(cache.expect(case, "float32", train=False), session, train=False)
            verdicts.append(("as float32:", found))
    expected = cache.expect(case, settings.precision, train=train)
    session = calibration.opened(backend, case.gated, case.weights, settings, lambda: case.images)
    verdicts.append(("", parity.judge(expected, session, train=train)))
    session.close()
    # What is timed runs at another batch size, for which a library may choose another algorithm.
    if train:
        session = backend.open(case.gated, case.weights, settings)
        tiled = parity.judge_tiled(expected, session, -(-batch // PARITY_BATCH), train=train)
        session.close()
        verdicts.append((f"batch {-(-batch // PARITY_BATCH) * PARITY_BATCH}:", tiled))
    verdicts.append((f"batch {batch}:", _batched(graph, backend, settings, batch=batch, train=train)))
    return parity.join(verdicts)


def _batched(graph: Graph, backend: Backend, settings: Settings, *, batch: int, train: bool) -> Verdict:
    case = parity.Case(graph, batch=DIFFERENT, seed=settings.seed)
    session = calibration.opened(backend, case.gated, case.weights, settings, lambda: case.images)
    verdict = parity.judge_batch(cache.expect_batch(case, settings.precision, train=train), session, batch)
    session.close()
    return verdict


def effective(backend: Backend, spec: Spec) -> tuple[Settings, dict[str, str]]:
    """The settings in force once the spec's library layers are taken away, and the process's environment for them.

    Raises `Unsupported` for a layer that the backend does not have, or that is not there to be taken away.
    """
    settings = Settings(
        precision=spec.precision,
        formulation=spec.formulation,
        seed=spec.seed,
        engine=spec.engine,
        channels_last=spec.channels_last,
        strict=spec.strict,
    )
    known = {layer.name: layer for layer in backend.library_layers(settings)}
    environment: dict[str, str] = {}
    by_session = []
    for name in spec.without:
        if name not in known:
            raise Unsupported(f"{backend.name} has no layer {name!r} to take away; it has {', '.join(known) or 'none'}")
        layer = known[name]
        if layer.missing:
            raise Unsupported(f"{name!r} cannot be taken away: {layer.missing}")
        environment |= layer.environment
        settings = replace(settings, **layer.replace)
        if not layer.environment and not layer.replace:
            by_session.append(name)
    return replace(settings, without=tuple(by_session)), environment


def curve_verdict(training: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the losses lie among those of equals: at each step inside the interval in which one more of them would.

    That is Student's prediction interval, ``mean ± t s sqrt(1 + 1/n)``, at `BELIEVED`; s is the largest standard
    deviation until `EARLIER` steps later, since runs that have drifted apart do not come together again. `share` is of
    what is allowed.
    """
    losses, equals = training["losses"], training["perturbed"]
    limit = stats.prediction(len(equals), BELIEVED)
    # Where equals agree to the last bit there is the rounding of the loss itself.
    widths = list(accumulate((max(stdev(at), 1e-6 * mean(at)) for at in zip(*equals, strict=True)), max))
    worst, at = 0.0, 0
    for step, (loss, *others) in enumerate(zip(losses, *equals, strict=True)):
        width = widths[min(step + EARLIER, len(widths) - 1)]
        share = abs(loss - mean(others)) / (limit * width)
        if share > worst:
            worst, at = share, step
    return {"passed": worst <= 1, "share": worst, "step": at, "runs": len(equals)}
