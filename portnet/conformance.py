"""What every backend must pass, PortNet's own or a stranger's: ``portnet check NAME``, or in pytest::

    @pytest.mark.parametrize("check", conformance.checks("mybackend"), ids=str)
    def test_conformance(check):
        check()

Each check judges by measurement against the float64 reference; see `portnet.parity` for the gate.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from portnet import alexnet, clock, parity, philox, plugins
from portnet.contract import PRECISIONS, Backend, Session, Settings, Unsupported
from portnet.errors import PortNetError
from portnet.graph import (
    LRN,
    AdaptiveAvgPool,
    Conv,
    Dropout,
    Flatten,
    Graph,
    Layer,
    Linear,
    MaxPool,
    Pad,
    ReLU,
    SpatialLRN,
)


class ConformanceError(PortNetError, AssertionError):
    """A backend does not do what the contract says."""


@dataclass(frozen=True)
class Check:
    """One property of a backend. Calling it returns what was seen, or raises `ConformanceError`."""

    name: str
    run: Callable[[], str]

    def __call__(self) -> str:
        try:
            return self.run()
        except ConformanceError:
            raise
        except Exception as error:
            raise ConformanceError(f"{type(error).__name__}: {error}") from error

    def __str__(self) -> str:
        return self.name


LAYERS: Mapping[str, tuple[Layer, ...]] = {
    "conv strided, padded": (Conv(name="x", in_channels=32, out_channels=24, kernel=5, stride=2, padding=2),),
    "conv in two groups": (Conv(name="x", in_channels=32, out_channels=24, kernel=3, groups=2),),
    "relu": (ReLU(name="x"),),
    "lrn over all channels": (LRN(name="x", alpha=1e-4, k=1.0),),
    "lrn per tower": (LRN(name="x", alpha=5e-4, k=2.0, groups=2),),
    "lrn within maps": (SpatialLRN(name="x", alpha=1e-3),),
    "max pool, overlapping": (MaxPool(name="x"),),
    "max pool, rounded down": (MaxPool(name="x", kernel=2, stride=3),),
    "adaptive average pool": (AdaptiveAvgPool(name="x", size=6),),
    "pad right and bottom": (
        Pad(name="x", right=3, bottom=2),
        Conv(name="y", in_channels=32, out_channels=24, kernel=3, stride=3),
    ),
    "linear": (Flatten(name="x"), Linear(name="y", in_features=5408, out_features=50)),
    "dropout": (Flatten(name="x"), Dropout(name="y")),
    "dropout, inverted, p=0.3": (Flatten(name="x"), Dropout(name="y", p=0.3, inverted=True)),
}
"""Layer kinds that a backend must know, each checked alone between a convolution and a product.

Wide enough that no tensor is a handful of numbers, in which the baseline may be right by luck.
"""

WAITED = 16
"""Images of the steps whose end is waited for."""


def checks(
    backend: str | Backend, *, precisions: Sequence[str] = ("float32",), image_size: int | None = None
) -> list[Check]:
    """Every check of a backend, which is probed now. Raises `Unavailable` if it cannot be used here.

    Layer kinds are checked in every precision that the device has, whole presets in `precisions` (those it has) and
    at `image_size` (full size by default).
    """
    backend = plugins.backends()[backend] if isinstance(backend, str) else backend
    device = plugins.probe(backend)
    return list(_checks(backend, device.precisions, precisions, image_size))


def layer_graph(kind: str) -> Graph:
    """The small network in which a layer kind is checked."""
    layers: tuple[Layer, ...] = (Conv(name="stem", in_channels=3, out_channels=32, kernel=3, padding=1), *LAYERS[kind])
    shape = Graph(preset=kind, input=(3, 13, 13), layers=layers).output
    if len(shape) > 1:
        layers += (Flatten(name="flatten"),)
    features = int(np.prod(shape))
    return Graph(
        preset=f"layer kind {kind}",
        input=(3, 13, 13),
        layers=(*layers, Linear(name="out", in_features=features, out_features=50)),
    )


def _checks(
    backend: Backend, offered: Sequence[str], precisions: Sequence[str], image_size: int | None
) -> Iterator[Check]:
    trains = "train" in backend.modes
    plain = "float32" if "float32" in offered else offered[0]

    yield Check("refuses what it cannot do", lambda: _refuses(backend, offered))
    yield Check("keeps the weights it is given", lambda: _keeps(backend, plain))
    yield Check("puts and gets", lambda: _transfers(backend, plain))
    yield Check("infers any batch", lambda: _any_batch(backend, plain))
    if trains:
        yield Check("dropout masks, bit for bit", lambda: _masks(backend, plain))
    for mode in backend.modes:
        yield Check(f"synchronize waits ({mode})", lambda mode=mode: _waits(backend, plain, mode))  # type: ignore[misc]
    for precision in (p for p in offered if p in PRECISIONS):
        for kind in LAYERS:
            # "direct" is compiled anew for every layer, shape and precision, which takes minutes: once is enough here,
            # since a measurement gates what it times at full size anyway.
            for formulation in [f for f in backend.formulations if f != "direct" or precision == plain]:
                yield Check(
                    f"{kind}, {precision}, {formulation}",
                    lambda a=precision, b=formulation, c=kind: _parity(backend, parity.Case(layer_graph(c)), a, b),  # type: ignore[misc]
                )
    options: dict[str, Any] = {"image_size": image_size} if image_size else {}
    for preset in alexnet.PRESETS:
        graph = alexnet.graph(preset, **options)
        for precision in [p for p in precisions if p in offered]:
            for formulation in [f for f in backend.formulations if f != "direct"]:
                yield Check(
                    f"{preset}, {precision}, {formulation}",
                    lambda a=precision, b=formulation, c=graph: _parity(backend, parity.Case(c), a, b),  # type: ignore[misc]
                )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConformanceError(message)


def _small(batch: int = 4) -> parity.Case:
    return parity.Case(alexnet.graph("paper2012", image_size=67, classes=10), batch=batch)


def _open(backend: Backend, case: parity.Case, precision: str, formulation: str = "portable") -> Session:
    return backend.open(case.gated, case.weights, case.settings(precision, formulation))


def _parity(backend: Backend, case: parity.Case, precision: str, formulation: str) -> str:
    train = "train" in backend.modes
    expected = parity.expect(case, parity.oracle(plugins.backends()["reference"]), precision, train=train)
    try:
        session = _open(backend, case, precision, formulation)
    except Unsupported as error:
        # What people write may not work in a precision. That the portable formulation does is the contract.
        _require(formulation != "portable", f"refused: {error}")
        return f"refused: {error}"
    verdict = parity.judge(expected, session, train=train)
    session.close()
    _require(verdict.passed, str(verdict))
    return str(verdict)


def _refuses(backend: Backend, offered: Sequence[str]) -> str:
    case = _small()
    refused = [Settings(precision="float13"), Settings(precision=offered[0], formulation="unheard-of")]
    refused += [Settings(precision=p) for p in PRECISIONS if p not in offered]
    for settings in refused:
        try:
            backend.open(case.graph, case.weights, settings)
        except Unsupported:
            continue
        raise ConformanceError(f"open() accepted {settings}; it must raise Unsupported")
    if "train" not in backend.modes:
        session = _open(backend, case, offered[0])
        for call in (
            lambda: session.trace(case.images, case.labels, {}),
            lambda: session.train_step(case.images, case.labels, case.ids, step=0, learning_rate=0.0),
        ):
            try:
                call()
            except Unsupported:
                continue
            raise ConformanceError("a backend whose modes lack 'train' trained; it must raise Unsupported")
    return f"{len(refused)} settings refused"


def _keeps(backend: Backend, precision: str) -> str:
    case = _small()
    given = {name: value.copy() for name, value in case.weights.items()}
    session, other = _open(backend, case, precision), _open(backend, _small(), precision)
    for _ in range(2):
        held = session.weights()
        _require(list(held) == list(given), f"weights() names {list(held)[:3]}, expected {list(given)[:3]} and so on")
        for name, value in given.items():
            _require(np.array_equal(held[name], value), f"weights()[{name!r}] is not what open() was given")
        # Neither what was handed out, nor what was handed in, nor inference may reach the session's own.
        for name in held:
            held[name][...] = 0
        session.get(session.infer(session.put(case.images)))
    for value in case.weights.values():
        value[...] = 0
    _require(
        np.array_equal(session.weights()["conv1.weight"], given["conv1.weight"]), "open() kept the caller's arrays"
    )
    if "train" in backend.modes:
        parity.update(session, case)
        _require(
            not np.array_equal(session.weights()["conv1.weight"], given["conv1.weight"]), "training changed no weight"
        )
        same = np.array_equal(other.weights()["conv1.weight"], given["conv1.weight"])
        _require(same, "training one session changed another")
    return f"{len(given)} arrays, bit for bit"


def _transfers(backend: Backend, precision: str) -> str:
    session = _open(backend, _small(), precision)
    for array in (np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 7, np.array([0, 7, 2**40], np.int64)):
        sent = array.copy()
        on_device = session.put(sent)
        sent[...] = 0
        back = session.get(on_device)
        _require(
            isinstance(back, np.ndarray) and back.shape == array.shape and np.array_equal(back, array),
            f"get(put(x)) is not x for {array.dtype} of shape {array.shape}",
        )
    return "float32 and int64"


def _any_batch(backend: Backend, precision: str) -> str:
    case = _small(8)
    session = _open(backend, case, precision)
    whole = session.get(session.infer(session.put(case.images)))
    _require(whole.shape == (8, 10), f"infer() of 8 images gave shape {whole.shape}, expected (8, 10)")
    for size in (1, 3):
        part = session.get(session.infer(session.put(case.images[:size])))
        error = parity.norm_error(part, whole[:size])
        _require(error <= _SAME, f"{size} images alone give other logits than among 8: relative error {error:.2g}")
    return "1, 3 and 8 images"


_SAME = 1e-3  # far above any precision's differences in order of summation, far below another image's logits


def _masks(backend: Backend, precision: str) -> str:
    graph = Graph(
        preset="masks",
        input=(300,),
        layers=(
            Dropout(name="even"),
            Dropout(name="third", p=0.3, inverted=True),
            Dropout(name="none", p=0.0),
            Linear(name="out", in_features=300, out_features=5),
        ),
    )
    case, count = parity.Case(graph), 0
    ids = np.array([5, 0, 2**32 - 1, 128, 5], np.int64)
    for seed in (0, 2**63 + 12345):
        session = backend.open(graph, case.weights, Settings(precision=precision, seed=seed))
        for step in (0, 1, 2**20):
            drawn = session.masks(ids, step=step)
            for i, s in enumerate(graph.dropouts):
                assert isinstance(s.layer, Dropout)
                right = philox.keep_mask(seed, i, ids, step, 300, s.layer.p)
                given = drawn.get(s.layer.name)
                _require(
                    given is not None and np.array_equal(given, right),
                    f"the mask of {s.layer.name} (p={s.layer.p}) at seed {seed}, step {step} is not Philox's",
                )
                count += right.size
    return f"{count:,} bits"


def _waits(backend: Backend, precision: str, mode: str) -> str:
    case, other = _small(WAITED), parity.Case(_small().graph, batch=WAITED, seed=1)
    session = _open(backend, case, precision)
    work = clock.Work(session, mode, *((c.images, c.labels, c.ids) for c in (case, other)))
    seen = clock.examine(work, seconds=0.1, repeats=3)
    session.close()
    _require(seen.honest, str(seen))
    return str(seen)
