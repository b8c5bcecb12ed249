"""A module of the user's own as the workload, and which workload a spec names.

A factory, named ``package:factory``, returns a `Model`. It is measured behind the gates of `portnet.measurement`: on
torch's devices as it stands, and for inference on ONNX Runtime's as torch exports it.

Parity is judged against the same module in float64 on the processor: same weights, same batch. Precisions are those of
people's own programs: weights stay in float32 (float64 for float64), bfloat16 and float16 are `torch.autocast`'s, and
outputs are widened before the loss. What a stack may be off by, for each tensor:

- The *baseline* e is the largest error of `RUNS` runs of the module on the processor in that precision, from the same
  weights and inputs and from ones moved by one rounding of that precision, every other one in channels-last layout,
  whose kernels add up otherwise: torch's plain ones take float64 for some sums. (For tf32, float32 in which the
  factors of products and convolutions are cut to its 10 bits.) Of one run alone a small tensor may show no error by
  luck; for the same reason no gradient's or update's e is below the median one's, and the loss's not below the
  outputs'.
- At the larger batch that is timed, e is no smaller than what the processor makes there in float32.
- Outputs and the loss: ``K e``, K being 16 for float32, 64 for float64 and 4 for narrower, as for AlexNet.
- Gradients and updates: in float32 and float64 also ``2 t``. A foreign module cannot be told which way to take a ReLU
  or a maximum that is too close to call, as the reference is for AlexNet. In its place t is how far float64 gradients
  move when weights and inputs are moved by 16 roundings: the largest of `RUNS`, in which contests that honest rounding
  may turn are turned some way.

The processor's own kernels are below both sides on the backend `cpu`: what they get wrong in float64 too is not seen.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import numpy as np

from portnet import cache, plugins, weights
from portnet.calibration import TakesExports
from portnet.clock import Inputs
from portnet.contract import INT8, Array, Backend, Session, Settings, Unsupported, Weights
from portnet.errors import InputError
from portnet.graph import Cost
from portnet.host import processor
from portnet.parity import Finding, Verdict, channel_error, factor
from portnet.record import Spec
from portnet.workload import COARSER, AlexNet, Say, Workload

if TYPE_CHECKING:
    from torch import Tensor, nn

RUNS = 4
GATED = 8
"""Items of the gate's batch. Fewer would be singular for batch normalisation: of two values it keeps the sign alone."""
RATES = (1.0, 1.0, 0.1)
"""The gated updates' learning rates as multiples of the model's. They change, or a rate kept outside the velocity would
not show."""
TINY = 1e-6
"""A gradient smaller than this, as a share of all gradients together, is judged as if it were that large: some are zero
but for rounding, such as that of a bias before a batch normalisation."""
DIVERGED = 1e300
"""The loss of a training that has none any more."""

Values = dict[str, Array]
"""What the gate compares, by name."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A module, batches for it, and how it is trained: what a factory returns.

    - `module`: float32, on the processor, with its initial weights. It takes one tensor ``(n, ...)`` and returns one,
      ``(n, channels, ...)``. While the factory runs torch's generator is seeded with the spec's seed.
    - `batch`: ``batch(n, seed)`` gives inputs and targets, arrays or tensors on the processor: inputs float32 or int64
      of at least two dimensions ``(n, ...)``, targets float32 or int64 ``(n, ...)``; a seed's batch is always the same.
    - `loss`: ``loss(outputs, targets)`` gives one number. Where it is the mean over the batch, the gate on a large
      batch repeats a small one, which spares the float64 reference most of its work.
    - The update rule is ``v = momentum v - weight_decay lr w - lr g; w = w + v``, for all parameters that require
      gradients.

    Nothing may be drawn at random in training, such as by dropout, for devices draw differently: such a module is
    refused.
    """

    module: "nn.Module"
    batch: Callable[[int, int], tuple[Any, Any]]
    loss: "Callable[[Tensor, Tensor], Tensor]"
    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0


class Torch(Protocol):
    """What is needed of torch on the processor, which the core does not import."""

    def build(self, factory: Callable[[], object], seed: int) -> Model: ...
    def check(self, model: Model, inputs: Array, targets: Array) -> None: ...
    def weights(self, model: Model) -> Values: ...
    def baseline(self, model: Model, weights: Weights, precision: str, *, channels_last: bool = False) -> Session: ...
    def flops(self, model: Model, inputs: Array, targets: Array, *, training: bool) -> int: ...
    def export(self, model: Model, inputs: Array) -> bytes: ...
    def freeze(self, module: object, example: object) -> "Frozen": ...


class Frozen(Protocol):
    """A copy of a module, in evaluation mode on the processor, for export."""

    @property
    def example(self) -> tuple[Array, ...]:
        """Inputs for it."""

    @property
    def drew(self) -> bool:
        """Whether any run drew at random; each from a seed of its own."""

    def run(self, inputs: tuple[Array, ...]) -> list[Array]:
        """Its outputs. Raises `InputError` where it fails on these inputs."""

    def layers(self) -> Values:
        """What submodules give on the example, by their names."""

    def export(self, outputs: int, *, dynamic: bool) -> "FrozenExport":
        """With the batch open or not. Raises `Unavailable`, `Unsupported` and `InputError`."""


class FrozenExport(Protocol):
    """A serialised ONNX model, the names of its inputs and outputs, and the value that holds a submodule's output."""

    @property
    def content(self) -> bytes: ...
    @property
    def inputs(self) -> list[str]: ...
    @property
    def outputs(self) -> list[str]: ...
    @property
    def layers(self) -> Mapping[str, str]: ...


@runtime_checkable
class TakesModules(Protocol):
    """A backend that runs a user's module."""

    def open_module(self, model: Model, weights: Weights, settings: Settings) -> Session: ...


def find(name: str) -> Callable[[], object]:
    """The factory called ``package:factory``, from the working directory or what is installed.

    Raises `InputError` where there is none; does not call it.
    """
    package, _, attribute = name.partition(":")
    if not package or not attribute:
        raise InputError(f"a model is named package:factory, such as my_models.resnet:small; got {name!r}")
    here = os.getcwd()
    if here not in sys.path:  # a console script does not look there, python -m does
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise InputError(
            f"no module {error.name!r} for the model {name!r}: expected {package} to be installed or in {here}"
        ) from error
    except Exception as error:
        raise InputError(
            f"importing {package} for the model {name!r} raised {type(error).__name__}: {error}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"{package} has no {attribute!r}: the model {name!r} must name a function in it")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{name!r} must be a function that returns a portnet.Model, got {type(found).__name__}")
    return cast("Callable[[], object]", found)


def on_torch() -> Torch:
    """Torch on the processor. Raises `Unavailable` without it."""
    backend: Any = plugins.backends()["cpu"]
    plugins.probe(backend)
    return cast("Torch", backend.own_models())


def load(name: str, seed: int) -> Model:
    """The model that the factory of that name makes, tried on a batch of its own. Raises `InputError`."""
    factory, torch = find(name), on_torch()
    try:
        model = torch.build(factory, seed)
    except InputError as error:
        raise InputError(f"the factory {name!r}: {error}") from error
    except Exception as error:
        raise InputError(f"the factory {name!r} raised {type(error).__name__}: {error}") from error
    inputs, targets = draw(model, 2, seed)
    if any(not np.array_equal(a, b) for a, b in zip((inputs, targets), draw(model, 2, seed), strict=True)):
        raise InputError(f"the model {name!r}: batch(2, {seed}) gave two different batches; a seed must decide it")
    torch.check(model, inputs, targets)
    return model


def draw(model: Model, n: int, seed: int) -> tuple[Array, Array]:
    """A batch of `n` as arrays. Raises `InputError` where it is not as `Model` asks."""
    try:
        inputs, targets = (np.asarray(a) for a in model.batch(n, seed))
    except Exception as error:
        raise InputError(
            f"Model.batch({n}, {seed}) must give inputs and targets; it raised {type(error).__name__}: {error}"
        ) from error
    for name, array, dimensions in (("inputs", inputs, 2), ("targets", targets, 1)):
        if array.dtype not in (np.float32, np.int64) or array.ndim < dimensions or len(array) != n:
            raise InputError(
                f"Model.batch({n}, {seed}) must give float32 or int64 {name} of {n} items and at least {dimensions} "
                f"dimension{'s' * (dimensions > 1)}, got {array.dtype} {array.shape}"
            )
    return inputs, targets


class OwnModel(Workload):
    """The model that `spec` names.

    Raises `InputError` for a factory or a model that is not as asked, `Unavailable` without torch.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.model = load(spec.model, spec.seed)
        self.torch = on_torch()
        self.start = self.torch.weights(self.model)

    def batch(self, n: int, number: int) -> Inputs:
        """The batch of that number; 0 is the gate's. Seeds of neighbours have nothing in common."""
        seed = int(np.random.SeedSequence([self.spec.seed, number]).generate_state(1)[0])
        return *draw(self.model, n, seed), np.arange(n, dtype=np.int64)

    def batches(self, batch: int) -> Iterator[Inputs]:
        number = 0
        while True:
            number += 1
            yield self.batch(batch, number)

    @property
    def learning_rate(self) -> float:
        return self.model.learning_rate

    def open(self, backend: Backend, settings: Settings) -> Session:
        return self._open(backend, self.start, settings)

    def _open(self, backend: Backend, start: Weights, settings: Settings) -> Session:
        if settings.precision == INT8:
            raise Unsupported("int8 is of PortNet's own network, and of files that 'portnet quantize' makes")
        if isinstance(backend, TakesModules):
            return backend.open_module(self.model, start, settings)
        if isinstance(backend, TakesExports):
            return backend.open_exported(self._exported, start, settings)
        raise Unsupported(f"{backend.name} runs PortNet's own network only, no module of a user's own")

    @cached_property
    def _exported(self) -> bytes:
        return self.torch.export(self.model, self.batch(2, 0)[0])

    def costs(self, batch: int, *, training: bool, precision: str) -> Mapping[str, Cost]:
        """One entry, ``model``: FLOPs as torch counts them, and the bytes that pass through memory at any rate.

        Those are the inputs and the weights, read once; in training weights and velocity, read and written. What
        activations add is not known: the floor is as low as that.
        """
        inputs, targets, _ = self.batch(min(batch, GATED), 0)
        counted = self._flops(len(inputs), training) * batch // len(inputs)
        held = sum(value.nbytes for value in self.start.values())
        moved = held * (4 if training else 1) + (inputs.nbytes + targets.nbytes * training) * batch // len(inputs)
        return {"model": Cost(macs=counted // 2, bytes=moved)}

    def _flops(self, n: int, training: bool) -> int:
        key = f"flops of {n}, {training}"
        if key not in self.__dict__:
            inputs, targets, _ = self.batch(n, 0)
            self.__dict__[key] = self.torch.flops(self.model, inputs, targets, training=training)
        found: int = self.__dict__[key]
        return found

    # The gate.

    def verdict(self, backend: Backend, settings: Settings) -> Verdict:
        """Raises `InputError` for a module that draws at random."""
        train = self.spec.mode == "train"
        timed = 1 if self.spec.mode == "serve" else self.spec.batch
        case = self.batch(min(timed, GATED), 0)
        exact = self._run(self._reference(), case, train)
        # What is timed runs at another batch size, for which a library may choose another algorithm.
        count, repeating = -(-timed // len(case[0])), set(exact)
        if count > 1:
            repeating = self._repeating(case, exact, train)
            if any(name not in repeating and not name.startswith("update") for name in exact):
                case, count = self.batch(timed, 0), 1
                exact = self._run(self._reference(), case, train)
        allowances = self._allowances(case, exact, settings.precision, train, count)
        findings = []
        for times, allowed in zip((1, count) if count > 1 else (1,), allowances, strict=False):
            label = "" if times == 1 else f"batch {times * len(case[0])}: "
            session = self.open(backend, settings)
            found = self._run(session, _tiled(case, times), train)
            session.close()
            judged = {n: v for n, v in _repeated(exact, times).items() if times == 1 or n in repeating}
            findings += [
                Finding(what=label + n, error=e, allowed=allowed[n]) for n, e in _errors(found, judged).items()
            ]
        return Verdict(tuple(findings))

    def _reference(
        self, precision: str = "float64", start: Weights | None = None, *, channels_last: bool = False
    ) -> Session:
        return self.torch.baseline(self.model, start or self.start, precision, channels_last=channels_last)

    def _run(self, session: Session, case: Inputs, train: bool) -> Values:
        """Everything the gate looks at, from a fresh session."""
        inputs, targets, _ = case
        on_device = tuple(session.put(a) for a in case)
        found = {"infer() outputs": session.get(session.infer(on_device[0]))}
        if not train:
            return found
        before = session.weights()
        trace = session.trace(inputs, targets, {})
        found["training outputs"] = trace.logits
        found["loss of trace()"] = np.asarray(trace.loss)
        found |= {f"gradient {name}": g for name, g in trace.gradients.items()}
        for step, rate in enumerate(RATES):
            loss = session.train_step(*on_device, step=step, learning_rate=rate * self.model.learning_rate)
            found[f"loss of train_step() {step}"] = np.asarray(session.get(loss))
        # Their change, beside which weights would hide an update that is wrong.
        found |= {f"update {n}": w.astype(np.float64) - before[n] for n, w in session.weights().items()}
        return found

    def _repeating(self, case: Inputs, exact: Values, train: bool) -> set[str]:
        """What the batch twice over leaves as it is: all, for a loss that is a mean over the batch, but the variances
        that batch normalisation keeps, in which n - 1 counts."""
        twice = self._run(self._reference(), _tiled(case, 2), train)
        errors = _errors(twice, _repeated(exact, 2))
        return {name for name, error in errors.items() if error < 1e-9}

    def _allowances(
        self, case: Inputs, exact: Values, precision: str, train: bool, count: int
    ) -> list[dict[str, float]]:
        """By tensor, for the case and for `count` times its batch.

        Kept on this machine by the hash of the reference's results, since the module's code has none.
        """
        own = (sys.modules[__name__], weights, inspect.getmodule(type(self._reference())))
        sources = [inspect.getsource(m) for m in own if m is not None]
        key = repr((_digest(exact), precision, train, count, sources, version("torch"), processor()))
        make = partial(self._allow, case, exact, precision, train, count)
        found: list[dict[str, float]] = cache.text("own", key, make)
        return found

    def _allow(self, case: Inputs, exact: Values, precision: str, train: bool, count: int) -> list[dict[str, float]]:
        again = _errors(self._run(self._reference(), case, train), exact)
        if max(again.values()) > 1e-9:
            worst = max(again, key=lambda n: again[n])
            raise InputError(
                f"the model {self.spec.model!r} gives something else on the same batch ({worst}: by {again[worst]:.2g}"
                "): draw nothing at random in training (set dropout's p to 0), or no device can be held to a reference"
            )
        wide = precision in ("float64", "float32")
        rounding = 2.0**-29 if precision == "float64" else 1.0
        base = "float32" if precision == "float64" else precision
        e: dict[str, float] = dict.fromkeys(exact, 0.0)
        for run in range(RUNS):
            start, moved = self._moved(case, run, COARSER.get(precision, 1.0)) if run else (self.start, case)
            session = self._reference(base, start, channels_last=run % 2 == 1)
            found = _errors(self._run(session, moved, train), exact)
            e = {n: max(e[n], rounding * found[n]) for n in exact}
        for kind in ("gradient", "update"):
            # Fixed buffers and frozen parameters change in none, and are to stay so.
            of = [n for n in exact if n.startswith(kind) and e[n] > 0]
            e |= {n: max(e[n], median(e[m] for m in of)) for n in of}
        e |= {n: max(e[n], e["training outputs"]) for n in exact if n.startswith("loss")}
        k, t = factor(precision), dict.fromkeys(exact, 0.0)
        for run in range(RUNS if wide and train else 0):
            start, moved = self._moved(case, RUNS + run, 16.0)
            found = _errors(self._run(self._reference("float64", start), moved, train), exact)
            t |= {n: max(t[n], rounding * found[n]) for n in exact if n.startswith(("gradient", "update"))}
        larger = dict(e)
        # Sums over a larger batch round more, if they are made one after the other in float32.
        for channels_last in (False, True) if wide and count > 1 else ():
            session = self._reference(base, channels_last=channels_last)
            found = _errors(self._run(session, _tiled(case, count), train), _repeated(exact, count))
            larger = {n: max(larger[n], rounding * found[n]) for n in exact}
        return [{n: k * of[n] + 2 * t[n] for n in exact} for of in (e, larger)]

    def _moved(self, case: Inputs, run: int, roundings: float) -> tuple[Weights, Inputs]:
        """Weights and inputs moved by that many float32 roundings, up or down by run."""
        inputs, targets, ids = case
        start: dict[str, Any] = dict(self.start)
        if inputs.dtype == np.float32:
            start[""] = inputs  # no parameter is called so
        moved: dict[str, Any] = {
            n: start[n] + (w - start[n]) * np.float32(roundings) for n, w in weights.perturbed(start, run).items()
        }
        return moved, (moved.pop("", inputs), targets, ids)

    # The same training.

    def curve(self, backend: Backend, settings: Settings, say: Say) -> dict[str, Any]:
        return {
            "losses": self._fit(self.open(backend, settings), "training", say),
            "perturbed": self._equals(settings, say),
            "weights": weights.digest(self.start),
        }

    def _fit(self, session: Session, label: str, say: Say) -> list[float]:
        losses = []
        for step in range(self.spec.curve_steps):
            on_device = (session.put(a) for a in self.batch(self.spec.curve_batch, 1 + step))
            loss = session.train_step(*on_device, step=step, learning_rate=self.model.learning_rate)
            losses.append(float(session.get(loss)))
            if not np.isfinite(losses[-1]):
                # As wrong as a finite number can be: records hold no other.
                losses += [DIVERGED] * (self.spec.curve_steps - len(losses) + 1)
                del losses[step]
                break
            say(f"{label}, step {step + 1} of {self.spec.curve_steps}, loss {losses[-1]:.3f}")
        session.close()
        return losses

    def _equals(self, settings: Settings, say: Say) -> list[list[float]]:
        """Runs of the processor in that precision, from the same weights and from ones a rounding away."""
        spec, precision = self.spec, settings.precision

        def make() -> list[list[float]]:
            runs = []
            for run in range(spec.perturbed):
                moved = self._moved(self.batch(1, 0), run, COARSER.get(precision, 1.0))[0] if run else self.start
                label = f"how far equals drift, run {run + 1} of {spec.perturbed}"
                runs.append(self._fit(self._reference(precision, moved), label, say))
                if DIVERGED in runs[-1]:
                    raise InputError(
                        f"the model {spec.model!r} diverges in {spec.curve_steps} steps of {spec.curve_batch} on the "
                        f"processor too: lower its learning rate, {self.model.learning_rate:g}"
                    )
            return runs

        if not spec.perturbed:
            return []
        # The model's code decides the losses: a few steps of the first run stand for it.
        first = self._run(self._reference(), self.batch(2, 0), True)
        key = repr((_digest(first), _digest(self.start), precision, spec.seed, spec.curve_batch, version("torch")))
        key += repr((spec.curve_steps, spec.perturbed, self.model.learning_rate, self.model.momentum, processor()))
        found: list[list[float]] = cache.text("own-equals", key, make)
        return found


def _digest(values: Weights) -> str:
    with np.errstate(over="ignore"):  # a model that diverges
        return weights.digest(values)


def _tiled(case: Inputs, count: int) -> Inputs:
    inputs, targets, ids = (np.concatenate([a] * count) for a in case)
    return inputs, targets, ids


def _repeated(exact: Values, count: int) -> Values:
    """What a batch several times over must give: its outputs as often, and the rest as it is."""
    return {name: np.concatenate([v] * count) if name.endswith("outputs") else v for name, v in exact.items()}


def _errors(found: Values, exact: Values) -> dict[str, float]:
    """The relative error of each: of outputs the worst channel's, otherwise by the norms."""
    floors = {
        kind: TINY * float(np.sqrt(sum(np.sum(np.square(v)) for n, v in exact.items() if n.startswith(kind))))
        for kind in ("gradient", "update")
    }
    errors = {}
    for name, value in exact.items():
        if name not in found or found[name].shape != value.shape:
            errors[name] = float("inf")
        elif name.endswith("outputs"):
            errors[name] = channel_error(found[name], value)
        else:
            difference = float(np.linalg.norm(found[name].astype(np.float64) - value))
            size = max(float(np.linalg.norm(value)), floors.get(name.partition(" ")[0], 0.0))
            errors[name] = 0.0 if difference == 0 else difference / size if size else float("inf")
    return errors


def workload(spec: Spec) -> Workload:
    """The workload that a spec names."""
    return OwnModel(spec) if spec.model else AlexNet(spec)
