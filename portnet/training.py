"""The training loop and the evaluation, on any session."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf, isfinite, log
from typing import Any, TypeAlias

import numpy as np

from portnet import images, philox
from portnet.contract import Array, Place, Session
from portnet.errors import InputError, PortNetError
from portnet.graph import Graph
from portnet.images import Batch, DataSet, PixelBatch, Splits
from portnet.loading import Loader

Data: TypeAlias = "Splits | DataSet | tuple[Array, Array]"
"""A data set (its training split for `fit`, its test split for `evaluate`), or prepared images with their labels."""


class Diverged(PortNetError):
    """The loss became infinite or NaN."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How well a network classifies `count` pictures: shares in [0, 1], and the mean cross-entropy in nats."""

    top1: float
    top5: float
    loss: float
    count: int


def check_images(graph: Graph, value: Any, *, wide: bool = False) -> Array:
    """`value` as the images a session takes: float32 ``(n, *graph.input)``, finite. Raises `InputError`.

    `wide` admits float64, for sessions that compute in it.
    """
    shape = f"(n, {', '.join(map(str, graph.input))})"
    array = _array(value, f"images must be float32 {shape}")
    if array.dtype != np.float32 and not (wide and array.dtype == np.float64):
        raise InputError(
            f"images must be float32 {shape}, normalised, got dtype {array.dtype}; "
            "portnet.preprocess makes them from uint8 pictures"
        )
    if array.ndim != 4 or array.shape[1:] != graph.input or not len(array):
        raise InputError(f"images must have shape {shape} with n of at least 1, got {array.shape}")
    if not np.isfinite(array).all():
        raise InputError("images hold NaN or infinity")
    # torch takes no array that runs backwards, such as a mirrored one.
    return np.ascontiguousarray(array)


def check_labels(graph: Graph, value: Any, count: int) -> Array:
    """`value` as the labels a session takes: int64 ``(count,)`` in ``[0, classes)``. Raises `InputError`."""
    array = _array(value, f"labels must be integers of shape ({count},)")
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise InputError(f"labels must be integers of shape ({count},), got {array.dtype} of shape {array.shape}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < graph.classes:
        raise InputError(
            f"labels must lie in [0, {graph.classes}), the network's classes, "
            f"got {int(array.min())} to {int(array.max())}"
        )
    return array.astype(np.int64)


def _array(value: Any, expected: str) -> Array:
    try:
        return np.asarray(value)
    # What NumPy raises for ragged lists, and torch for tensors that NumPy has no counterpart of.
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{expected}, got what is no array ({error})") from None


def _check_data(data: Any) -> None:
    if not (isinstance(data, DataSet | Splits) or (isinstance(data, tuple) and len(data) == 2)):
        raise InputError(
            "data must be a data set, as portnet.load_data gives it, or a pair (images, labels), "
            f"got {type(data).__name__}{f' of {len(data)}' if isinstance(data, tuple) else ''}"
        )


def check_at_least_1(name: str, value: Any) -> None:
    """Raises `InputError` unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{name} must be an integer of at least 1, got {value!r}")


def training_batches(
    data: Data,
    graph: Graph,
    *,
    seed: int,
    batch: int,
    epochs: int | None = None,
    steps: int | None = None,
    start: int = 0,
) -> Iterator[Batch | PixelBatch]:
    """Augmented batches of an epoch after another, from the epoch that step `start` falls in.

    Ends after `epochs`, or after `steps` batches; one of them must be given.
    """
    for name, value in (("epochs", epochs), ("steps", steps), ("batch", batch)):
        if value is not None:
            check_at_least_1(name, value)
    if (epochs is None) == (steps is None):
        raise InputError("give either epochs or steps")
    one_epoch = _epochs(data, graph, seed, batch)
    per_epoch = one_epoch[0]
    total = steps if steps is not None else per_epoch * (epochs or 0)
    for n in range(start, start + total):
        if n == start or n % per_epoch == 0:
            current = one_epoch[1](n // per_epoch)
            for _ in range(n % per_epoch):
                next(current)
        yield next(current)


def _epochs(
    data: Data, graph: Graph, seed: int, batch: int
) -> tuple[int, Callable[[int], Iterator[Batch | PixelBatch]]]:
    """Batches in an epoch, and a function from an epoch's number to them."""
    _check_data(data)
    if isinstance(data, tuple):
        pictures = check_images(graph, data[0])
        labels = check_labels(graph, data[1], len(pictures))
        count = len(pictures)

        def epoch(number: int) -> Iterator[Batch | PixelBatch]:
            order = philox.order(seed, number, count)
            for i in range(0, count - batch + 1, batch):
                ids = order[i : i + batch]
                yield Batch(images=pictures[ids], labels=labels[ids], ids=ids)

    else:
        split = data.train if isinstance(data, Splits) else data
        count = len(split)

        def epoch(number: int) -> Iterator[Batch | PixelBatch]:
            return images.training_batches(split, graph, seed=seed, epoch=number, batch=batch)

    if count < batch:
        raise InputError(f"a batch of {batch} needs at least as many images to train on, got {count}")
    return count // batch, epoch


def fit(
    session: Session,
    batches: Iterator[Batch | PixelBatch],
    *,
    learning_rate: float | Callable[[int], float],
    start: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train on each batch in turn; the loss before each step.

    `start` is the number of steps taken before; `learning_rate` may depend on the step's number, from 0. Losses are
    fetched one step late, so that a device is kept busy. Raises `Diverged` where a loss is no finite number, and
    `InputError` for a learning rate that is none.
    """
    rate = learning_rate if callable(learning_rate) else lambda _: learning_rate
    if not 0 <= rate(start) < inf:
        raise InputError(f"the learning rate must be a finite number of at least 0, got {rate(start)}")
    losses: list[float] = []

    def fetch(value: Any) -> None:
        loss = float(session.get(value))
        if not isfinite(loss):
            raise Diverged(f"the loss became {loss} at step {start + len(losses)}; try a lower learning rate")
        losses.append(loss)
        if on_step:
            on_step(len(losses), loss)

    waiting: list[Any] = []
    for step, batch in enumerate(batches, start):
        numbers = session.put(batch.labels), session.put(batch.ids)
        waiting.append(session.train_step(_put(session, batch), *numbers, step=step, learning_rate=rate(step)))
        if len(waiting) > 1:
            fetch(waiting.pop(0))
    for value in waiting:
        fetch(value)
    return losses


def _put(session: Session, batch: Batch | PixelBatch) -> Any:
    """A batch's images on the device, which makes them of the pixels itself where there are some."""
    if isinstance(batch, PixelBatch):
        return session.put_pixels(batch.pixels, batch.shift, batch.scale)
    return session.put(batch.images)


def evaluate(
    session: Session,
    graph: Graph,
    data: Data,
    *,
    batch: int = 64,
    views: int = 1,
    workers: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Classify every picture once, or by the mean of the softmax over the paper's ten views (`views` = 10).

    `workers` processes decode. Of a session that shares its batches with others, all must call this. A class counts as
    ranked below those of the same probability. Raises `InputError` for unfit or no data.
    """
    _check_data(data)
    check_at_least_1("batch", batch)
    if views not in (1, 10):
        raise InputError(f"views must be 1 (centre) or 10 (corners, centre and their mirrors), got {views}")
    if views == 10 and (isinstance(data, tuple) or _test_split(data).whole):
        raise InputError("ten views need pictures that suit cropping, not prepared images or a set scaled whole")
    right1 = right5 = count = 0
    loss = 0.0
    for batch_ in _evaluation_batches(graph, data, max(1, batch // views), views, workers, session.place):
        labels = batch_.labels
        logits = session.get(session.infer(_put(session, batch_))).astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinite logits give NaN, which is a miss
            shifted = logits - logits.max(axis=1, keepdims=True)
            # Logarithms throughout: probabilities below 1e-308 would all be 0, and tie.
            log_softmax = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
            log_p = np.logaddexp.reduce(log_softmax.reshape(len(labels), views, -1), axis=1) - log(views)
        own = log_p[np.arange(len(labels)), labels]
        loss -= float(own.sum())
        # So that a tie is not a hit by luck; NaN is above nothing and beaten by nothing.
        above = (log_p >= own[:, None]).sum(axis=1)
        right1 += int((above == 1).sum())
        right5 += int(((above >= 1) & (above <= 5)).sum())
        count += len(labels)
        if on_batch:
            on_batch(count)
    right1, right5, loss, count = session.total(np.array([right1, right5, loss, count], np.float64)).tolist()
    if not count:
        raise InputError("there is nothing to evaluate on: the data set is empty")
    return Evaluation(top1=right1 / count, top5=right5 / count, loss=loss / count, count=round(count))


def _test_split(data: "Splits | DataSet") -> DataSet:
    return data.test if isinstance(data, Splits) else data


def _evaluation_batches(
    graph: Graph, data: Data, batch: int, views: int, workers: int, place: Place
) -> Iterator[Batch | PixelBatch]:
    if not isinstance(data, tuple):
        with Loader(_test_split(data), workers=workers) as loader:
            yield from loader.evaluation_batches(graph, batch=batch, views=views, place=place)
        return
    pictures = check_images(graph, data[0])
    labels = check_labels(graph, data[1], len(pictures))
    for i in range(batch * place.part, len(pictures), batch * place.parts):
        ids = np.arange(i, min(i + batch, len(pictures)))
        yield Batch(images=pictures[ids], labels=labels[ids], ids=ids)
