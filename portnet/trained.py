"""The trained network and the pictures on which accuracy and agreement are told, the same for every stack.

Trained once a machine and kept (see `portnet.cache`); whoever trains it, all stacks there get these weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from portnet import cache, images, parity, plugins, training, weights
from portnet.contract import Array, Backend, Device, Settings, Unavailable
from portnet.graph import Graph
from portnet.images import Splits

STEPS, BATCH = 210, 32
"""Of the training: five epochs of the digits."""
LARGEST = 1000
"""Pictures of the test split at most, evenly spaced."""
EQUALS = "cpu"
"""The backend that trains, and whose runs show how far equals drift; the reference where it is not here."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """`images` float32 ``(n, *graph.input)`` and `labels` int64 ``(n,)`` of the test split; `logits` float64
    ``(n, classes)``, the reference's."""

    graph: Graph
    weights: dict[str, npt.NDArray[np.float32]]
    images: Array
    labels: Array
    logits: Array

    @property
    def right(self) -> int:
        """How many pictures the reference ranks right."""
        return int((self.logits.argmax(axis=1) == self.labels).sum())


def trainer() -> tuple[Backend, Device]:
    """`EQUALS` and its device, or the reference and its own."""
    backend = plugins.backends()[EQUALS]
    try:
        return backend, plugins.probe(backend)
    except Unavailable:
        backend = plugins.backends()["reference"]
        return backend, plugins.probe(backend)


def trained(graph: Graph, data: Splits, name: str, *, seed: int, say: Callable[[str], None]) -> Trained:
    """The network trained on a data set of that name by its recipe, and what the float64 reference makes of it."""
    backend, device = trainer()
    batch = min(BATCH, len(data.train))

    def train() -> dict[str, Array]:
        session = backend.open(graph, weights.initial(graph, seed), Settings(seed=seed))
        training.fit(
            session,
            training.training_batches(data, graph, seed=seed, batch=batch, steps=STEPS),
            learning_rate=graph.recipe.learning_rate,
            on_step=lambda step, loss: say(f"training for the accuracy, step {step} of {STEPS}, loss {loss:.3f}"),
        )
        found = session.weights()
        session.close()
        return dict(found)

    test = data.test.some(LARGEST)
    shown = next(images.evaluation_batches(test, graph, batch=len(test)))
    sample = next(images.evaluation_batches(data.train.some(LARGEST), graph, batch=64)).images
    seen: dict[str, Array] = {"test": shown.images, "train": sample, "labels": data.train.labels, "ids": data.train.ids}
    key = repr((graph, name, seed, batch, STEPS, device, cache.sources(backend), weights.digest(seen)))
    values = cache.arrays("trained", key, train)

    def refer() -> dict[str, Array]:
        say("what the reference makes of the trained network")
        session = parity.oracle(plugins.backends()["reference"]).open(graph, values, Settings(precision="float64"))
        parts = (session.trace(shown.images[i : i + 16]).logits for i in range(0, len(shown.images), 16))
        return {"logits": np.concatenate(list(parts))}

    logits = cache.arrays("answers", key + weights.digest(values), refer)["logits"]
    return Trained(graph=graph, weights=values, images=shown.images, labels=shown.labels, logits=logits)
