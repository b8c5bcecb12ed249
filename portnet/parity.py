"""The parity gate: is what a backend computes the network, up to honest rounding?

A backend is judged against the float64 reference, with the same weights, images and dropout masks. What it may be off
by is a multiple of the *baseline* error e: that of the reference itself when it rounds as a device of that precision
must. K is 16 for float32, 64 for float64 and 4 for narrower precisions (`factor`).

- Layers and logits: the worst output channel's error ``|d_c| / max(|r_c|, |r| / sqrt(C))`` is at most ``K e``.
- Gradients and updated weights, by their norms: at most ``4 e`` in narrow precisions; in float32 at most
  ``16 min(e, 4 e_logits) + 2 t``. Honest float32 takes ReLUs and pooling contests that lie within rounding the other
  way; t is how far apart two float64 gradients are in which all of those are resolved one way and the other.
- The loss is judged through the logits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Literal, Protocol, cast

import numpy as np

from portnet import philox, weights
from portnet.contract import Array, Backend, Session, Settings, Trace
from portnet.errors import PluginError
from portnet.graph import Graph

RATES = (1e-5, 1e-5, 1e-6)
"""Learning rates of the gated updates. They change, or a rate kept outside the velocity would not show."""

DECAY = 1e4
"""The gated updates' weight decay as a multiple of the recipe's. Parity weights give gradients so large that at the
recipe's own rate three updates diverge, and chaos hides mistakes; at a rate a thousandth of it nothing diverges, but
only a decay made larger in turn moves the weights by more than rounding."""


@dataclass(frozen=True, kw_only=True)
class Resolve:
    """Which way the oracle's backward pass takes contests too close to call.

    A ReLU input, or the lead of a pooling window's maximum over its runner-up, is too close within 16 times the
    relative error of the layer before it (`errors`) times the root mean square of the values. Side 0 closes such
    ReLUs and keeps the maximum, side 1 opens them and takes the runner-up.
    """

    errors: Mapping[str, float]
    side: Literal[0, 1]


class OracleSession(Protocol):
    """A session of the reference: float64 or one of its baselines."""

    resolve: Resolve | None

    def put(self, array: Array) -> Any: ...
    def weights(self) -> dict[str, Array]: ...
    def masks(self, ids: Any, *, step: int) -> dict[str, Any]: ...
    def trace(self, images: Array, labels: Array | None = None, masks: Mapping[str, Array] | None = None) -> Trace: ...
    def train_step(self, images: Any, labels: Any, ids: Any, *, step: int, learning_rate: float) -> Any: ...


class Oracle(Protocol):
    """The reference backend, as far as the gate needs it."""

    def __hash__(self) -> int: ...

    def open(self, graph: Graph, weights: Mapping[str, Array], settings: Settings) -> OracleSession: ...


def is_oracle(backend: Backend) -> bool:
    """Whether this is PortNet's reference: names are unique, so nothing else can pass for it."""
    return backend.name == "reference" and hasattr(backend, "oracle")


def oracle(backend: Backend) -> Oracle:
    """The reference backend as the oracle it is. Raises `PluginError` for any other."""
    if not is_oracle(backend):
        raise PluginError(f"backend {backend.name!r} of {type(backend).__module__} is not PortNet's reference")
    return cast("Oracle", backend)


@dataclass(frozen=True)
class Case:
    """One problem for a backend: a network, and a batch that only `seed` decides."""

    graph: Graph
    batch: int = 4
    seed: int = 0

    @cached_property
    def gated(self) -> Graph:
        """The graph with the decay of the gated updates (`DECAY`): what sessions are opened on."""
        recipe = replace(self.graph.recipe, weight_decay=DECAY * self.graph.recipe.weight_decay)
        return replace(self.graph, recipe=recipe)

    @cached_property
    def weights(self) -> dict[str, Any]:
        """Parity weights, at which mistakes show."""
        return weights.parity(self.graph, self.seed)

    @cached_property
    def pixels(self) -> Array:
        """Random ones: uint8 ``(batch, *graph.input)``."""
        drawn = philox.words(self.seed, philox.Stream.PARITY, 1000 + self.ids, 0, int(np.prod(self.graph.input)))
        return (drawn >> 24).astype(np.uint8).reshape(self.batch, *self.graph.input)

    @cached_property
    def images(self) -> Array:
        """The pixels, normalised: float32 ``(batch, *graph.input)``."""
        norm = self.graph.normalisation
        mean, scale = (np.array(v)[:, None, None] for v in (norm.mean, norm.scale))
        return np.asarray((self.pixels - mean) / scale, np.float32)

    @cached_property
    def labels(self) -> Array:
        """int64 ``(batch,)``."""
        drawn = philox.words(self.seed, philox.Stream.PARITY, 2000 + self.ids, 0, 1)[:, 0]
        return (drawn % self.graph.classes).astype(np.int64)

    @cached_property
    def ids(self) -> Array:
        """int64 ``(batch,)``, apart from each other and not in order, so that masks keyed by position would show."""
        return np.arange(self.batch, dtype=np.int64) * 1009 % 499 + 7

    def settings(self, precision: str, formulation: str = "portable") -> Settings:
        """The settings under which the case is run."""
        return Settings(precision=precision, formulation=formulation, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One tensor's relative error beside what is allowed."""

    what: str
    error: float
    allowed: float

    @property
    def share(self) -> float:
        """Error as a share of what is allowed; the gate is shut above 1, and to NaN."""
        if not np.isfinite(self.error):
            return float("inf")
        return self.error / self.allowed if self.allowed else float("inf") * (self.error > 0) if self.error else 0.0


@dataclass(frozen=True)
class Verdict:
    """What the gate found, tensor by tensor."""

    findings: tuple[Finding, ...] = field(default=())

    @property
    def worst(self) -> Finding:
        """The finding with the largest share of what is allowed."""
        return max(self.findings, key=lambda f: f.share)

    @property
    def passed(self) -> bool:
        """Whether every tensor lies within its allowance, and there was any."""
        return bool(self.findings) and self.worst.share <= 1

    def __str__(self) -> str:
        if not self.findings:
            return "nothing was compared"
        f = self.worst
        return (
            f"{len(self.findings)} tensors, the worst {f.what}: error {f.error:.2g}, "
            f"allowed {f.allowed:.2g} ({f.share:.2g} of it)"
        )


@dataclass(frozen=True, kw_only=True)
class Gated:
    """A reference tensor's figures: its value, and the error allowed."""

    exact: Array
    allowed: float


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a backend must give for a case in one precision, and how closely."""

    case: Case
    precision: str
    infer: Mapping[str, Gated]
    train: Mapping[str, Gated]
    gradients: Mapping[str, Gated]
    updates: Mapping[str, Gated]
    loss: float


def channel_error(value: Array, exact: Array) -> float:
    """The worst output channel's relative error; channels are axis 1."""
    if value.shape != exact.shape:
        return float("inf")
    axes = tuple(i for i in range(exact.ndim) if i != 1)
    difference = np.sqrt(np.sum((value.astype(np.float64) - exact) ** 2, axis=axes))
    own = np.sqrt(np.sum(exact.astype(np.float64) ** 2, axis=axes))
    floor = np.sqrt(np.sum(own**2) / len(own))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(difference == 0, 0.0, difference / np.maximum(own, floor))
    return float(np.max(ratio))


def norm_error(value: Array, exact: Array) -> float:
    """``|value - exact| / |exact|``."""
    if value.shape != exact.shape:
        return float("inf")
    difference, norm = (float(np.linalg.norm(a)) for a in (value.astype(np.float64) - exact, exact))
    return 0.0 if difference == 0 else difference / norm if norm else float("inf")


def factor(precision: str) -> int:
    """K: how many baseline errors a backend may be off by.

    More in float64, where the reference is no more exact than the device, and the baseline is float32's error scaled:
    16 of those were too few by a fifth between two honest libraries (NumPy's and PyTorch's on an AMD EPYC). What is to
    be found there is float32 in the place of float64, which is 10^6 times as far off and more.
    """
    return {"float64": 64, "float32": 16}.get(precision, 4)


@lru_cache(maxsize=4)
def expect(case: Case, oracle: Oracle, precision: str, *, train: bool = True) -> Expected:
    """Run the reference on a case: exact, in the baseline's precision, and with close contests resolved both ways."""
    # The reference has no wider sums than float64's: its own rounding is float32's, scaled.
    scale = 2.0**-29 if precision == "float64" else 1.0
    baseline = "float32" if precision == "float64" else precision
    wide = precision in ("float64", "float32")
    k = factor(precision)

    def open_(precision: str) -> OracleSession:
        return oracle.open(case.gated, case.weights, case.settings(precision))

    def layers(exact: Trace, rounded: Trace) -> tuple[dict[str, Gated], dict[str, float]]:
        errors = {n: scale * channel_error(rounded.layers[n], v) for n, v in exact.layers.items()}
        return {n: Gated(exact=v, allowed=k * errors[n]) for n, v in exact.layers.items()}, errors

    exact, rounded = open_("float64"), open_(baseline)
    infer, _ = layers(exact.trace(case.images), rounded.trace(case.images))
    if not train:
        return Expected(case=case, precision=precision, infer=infer, train={}, gradients={}, updates={}, loss=0.0)
    masks = exact.masks(case.ids, step=0)
    truth = exact.trace(case.images, case.labels, masks)
    base = rounded.trace(case.images, case.labels, masks)
    trained, errors = layers(truth, base)
    logits = errors[case.graph.layers[-1].name]

    def allow(e: float, one: Array, other: Array, exact: Array) -> float:
        if not wide:
            return k * e
        return k * min(e, 4 * logits) + 2 * norm_error_between(one, other, exact)

    def both(run: Any) -> list[Any]:
        if not wide:
            return [run(None)] * 2
        return [run(Resolve(errors=errors, side=side)) for side in (0, 1)]

    def gradients(resolve: Resolve | None) -> Mapping[str, Array]:
        exact.resolve = resolve
        return exact.trace(case.images, case.labels, masks).gradients if resolve else truth.gradients

    def updated(session: OracleSession, resolve: Resolve | None) -> tuple[dict[str, Array], tuple[float, ...]]:
        session.resolve = resolve
        return update(session, case)

    one, other = both(gradients)
    gated_gradients = {
        n: Gated(exact=g, allowed=allow(scale * norm_error(base.gradients[n], g), one[n], other[n], g))
        for n, g in truth.gradients.items()
    }
    w, _ = updated(open_("float64"), None)
    w_base, _ = updated(rounded, None)
    w_one, w_other = both(lambda r: updated(open_("float64"), r)[0] if r else w)
    updates = {
        n: Gated(exact=v, allowed=allow(scale * norm_error(w_base[n], v), w_one[n], w_other[n], v))
        for n, v in w.items()
    }
    return Expected(
        case=case,
        precision=precision,
        infer=infer,
        train=trained,
        gradients=gated_gradients,
        updates=updates,
        loss=float(truth.loss or 0.0),
    )


@dataclass(frozen=True, kw_only=True)
class Batched:
    """The logits of many different images, and the loss of training on all of them, with what they may be off by."""

    case: Case
    logits: Gated
    loss: float | None
    allowed_loss: float


def expect_batch(case: Case, oracle: Oracle, precision: str, *, train: bool) -> Batched:
    """What a batch of different images must give, each image by its own content."""
    scale = 2.0**-29 if precision == "float64" else 1.0
    k = factor(precision)
    exact, rounded = (
        oracle.open(case.gated, case.weights, case.settings(p))
        for p in ("float64", "float32" if precision == "float64" else precision)
    )
    truth = exact.trace(case.images).logits
    logits = Gated(exact=truth, allowed=k * scale * channel_error(rounded.trace(case.images).logits, truth))
    if not train:
        return Batched(case=case, logits=logits, loss=None, allowed_loss=0.0)
    masks = exact.masks(case.ids, step=0)
    trained = exact.trace(case.images, case.labels, masks)
    base = rounded.trace(case.images, case.labels, masks)
    rounding = 2.0**-50 if precision == "float64" else 2.0**-21
    off = k * scale * channel_error(base.logits, trained.logits) * float(np.linalg.norm(trained.logits))
    return Batched(
        case=case, logits=logits, loss=trained.loss, allowed_loss=2 * off + rounding * abs(trained.loss or 0.0)
    )


def judge_batch(expected: Batched, session: Session, batch: int) -> Verdict:
    """The gate on a batch of that very size, in which the case's images take turns in an order of their own.

    Training is judged by its loss, the mean over all of them. The session must be fresh.
    """
    case = expected.case
    # No image stands where it would if the batch were dealt in stretches or repeated from its beginning.
    index = (np.arange(batch) * 7 + np.arange(batch) // case.batch) % case.batch
    images = session.put(case.images[index])
    exact = expected.logits.exact[index]
    error = channel_error(session.get(session.infer(images)), exact)
    findings = [Finding(what="infer() of different images", error=error, allowed=expected.logits.allowed)]
    if expected.loss is not None and batch % case.batch == 0:
        labels, ids = session.put(case.labels[index]), session.put(case.ids[index])
        loss = float(session.get(session.train_step(images, labels, ids, step=0, learning_rate=RATES[0])))
        error = abs(loss - expected.loss) if np.isfinite(loss) else float("inf")
        findings.append(Finding(what="loss of different images", error=error, allowed=expected.allowed_loss))
    return Verdict(tuple(findings))


def norm_error_between(one: Array, other: Array, exact: Array) -> float:
    """``|one - other| / |exact|``."""
    norm = float(np.linalg.norm(exact))
    return float(np.linalg.norm(one - other)) / norm if norm else 0.0


def update(session: Any, case: Case) -> tuple[dict[str, Array], tuple[float, ...]]:
    """Weights after the gated updates (`RATES`), and the losses before each."""
    images, labels, ids = (session.put(a) for a in (case.images, case.labels, case.ids))
    losses = [session.train_step(images, labels, ids, step=step, learning_rate=rate) for step, rate in enumerate(RATES)]
    values = tuple(float(session.get(loss)) for loss in losses)
    return session.weights(), values


def judge_layers(expected: Mapping[str, Gated], trace: Trace, last: str) -> Verdict:
    """The gate on every layer output that the session can show, and on its logits."""
    shown = {**trace.layers, last: trace.logits}
    return Verdict(
        tuple(
            Finding(what=name, error=channel_error(shown[name], gated.exact), allowed=gated.allowed)
            for name, gated in expected.items()
            if name in shown
        )
    )


def judge_norms(expected: Mapping[str, Gated], values: Mapping[str, Array]) -> Verdict:
    """The gate on gradients or updated weights; one that is missing is infinitely wrong."""
    return Verdict(
        tuple(
            Finding(
                what=name,
                error=norm_error(values[name], gated.exact) if name in values else float("inf"),
                allowed=gated.allowed,
            )
            for name, gated in expected.items()
        )
    )


def join(verdicts: Iterable[tuple[str, Verdict]]) -> Verdict:
    """Several verdicts as one, each finding named after what it was part of."""
    return Verdict(
        tuple(
            Finding(what=f"{label} {f.what}".strip(), error=f.error, allowed=f.allowed)
            for label, verdict in verdicts
            for f in verdict.findings
        )
    )


def judge(expected: Expected, session: Session, *, train: bool) -> Verdict:
    """The whole gate on one open session, which must be fresh: inference, then a training pass, then the updates."""
    case = expected.case
    last = case.graph.layers[-1].name
    # `infer` is what is timed, `trace` what tells where an error arises: both are judged.
    logits = session.get(session.infer(session.put(case.images)))
    verdicts = [
        ("inference", judge_layers(expected.infer, session.trace(case.images), last)),
        ("infer()", judge_layers(expected.infer, Trace(layers={}, logits=logits), last)),
    ]
    if train:
        masks = session.masks(case.ids, step=0)
        trace = session.trace(case.images, case.labels, masks)
        verdicts += [
            ("training", judge_layers(expected.train, trace, last)),
            ("gradient", judge_norms(expected.gradients, trace.gradients)),
        ]
        updated, losses = update(session, case)
        verdicts += [
            ("updated", judge_norms(expected.updates, updated)),
            ("loss", judge_loss(expected, {"of trace()": trace.loss, "of train_step()": losses[0]})),
        ]
    return join(verdicts)


def judge_loss(expected: Expected, losses: Mapping[str, float | None]) -> Verdict:
    """The gate on losses before the first update: off by no more than their logits may be.

    Cross-entropy moves by at most twice the largest change of a logit.
    """
    logits = expected.train[expected.case.graph.layers[-1].name]
    rounding = 2.0**-50 if expected.precision == "float64" else 2.0**-21
    allowed = 2 * logits.allowed * float(np.linalg.norm(logits.exact)) + rounding * abs(expected.loss)
    return Verdict(
        tuple(
            Finding(what=name, error=float("inf") if loss is None else abs(loss - expected.loss), allowed=allowed)
            for name, loss in losses.items()
        )
    )


def judge_tiled(expected: Expected, session: Session, count: int, *, train: bool) -> Verdict:
    """The gate at a larger batch: the case's images `count` times over, with the same ids and so the same masks.

    The logits repeat and the mean gradient stays, and with it the weights after the updates. The session must be
    fresh.
    """
    case = expected.case
    last = case.graph.layers[-1].name
    tiled = Case(case.graph, case.batch, case.seed)
    for name in ("images", "labels", "ids"):
        tiled.__dict__[name] = np.concatenate([getattr(case, name)] * count)
    exact = np.concatenate([expected.infer[last].exact] * count)
    logits = session.get(session.infer(session.put(tiled.images)))
    found = [Finding(what=last, error=channel_error(logits, exact), allowed=expected.infer[last].allowed)]
    verdicts = [("infer()", Verdict(tuple(found)))]
    if train:
        updated, losses = update(session, tiled)
        verdicts += [
            ("updated", judge_norms(expected.updates, updated)),
            ("loss", judge_loss(expected, {"of train_step()": losses[0]})),
        ]
    return join(verdicts)
