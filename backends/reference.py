"""NumPy: the float64 oracle that every backend is judged by, its rounded baselines, and the smallest whole backend.

``float64`` is the oracle. ``float32`` sums in float32. The narrower precisions are emulated in float32: the operands
of convolutions and products, and every stored activation and its gradient, are rounded (``tf32``: operands truncated,
activations left alone; ``int8``: filters to 8 bits by output channel, activations by tensor), which is the error that
a device of that precision makes by right.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from portnet import philox
from portnet.contract import INT8, Array, Backend, Ceilings, Device, LayerTime, Mode, Session, Settings, Trace, Weights
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
    Recipe,
    ReLU,
    SpatialLRN,
)
from portnet.hookspecs import hookimpl
from portnet.host import processor
from portnet.parity import Resolve
from portnet_backends import timing


def _exact(x: Array) -> Array:
    return x


def _nothing() -> None:
    """What there is to wait for."""


def truncate_tf32(x: Array) -> Array:
    """Float32 values with the last 13 of 23 mantissa bits cleared."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def round_bfloat16(x: Array) -> Array:
    """Float32 values rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(x), rounded.view(np.float32), x)


def round_float16(x: Array) -> Array:
    """Float32 values rounded to the nearest float16, ties to even."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def round_uint8(x: Array) -> Array:
    """Float32 values rounded to one of 256 evenly spaced ones between the least and the largest, 0 among them."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = np.float32((high - low) / 255 or 1.0)
    zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 255) - zero).astype(np.float32) * scale


def round_int8(w: Array) -> Array:
    """Float32 filters rounded to one of 255 evenly spaced values, each output channel (axis 0) by its own largest."""
    largest = np.abs(w.reshape(len(w), -1)).max(axis=1).reshape(-1, *[1] * (w.ndim - 1))
    scale = np.where(largest, largest / 127, 1).astype(np.float32)
    return np.round(w / scale).astype(np.float32) * scale


@dataclass(frozen=True, kw_only=True)
class _Arithmetic:
    """`fused`: a ReLU takes the sum of the layer before it as it is, and not as it would be stored."""

    dtype: type
    operand: Callable[[Array], Array] = _exact
    store: Callable[[Array], Array] = _exact
    weight: Callable[[Array], Array] | None = None
    fused: bool = False


_ARITHMETICS = {
    "float64": _Arithmetic(dtype=np.float64),
    "float32": _Arithmetic(dtype=np.float32),
    "tf32": _Arithmetic(dtype=np.float32, operand=truncate_tf32),
    "bfloat16": _Arithmetic(dtype=np.float32, operand=round_bfloat16, store=round_bfloat16),
    "float16": _Arithmetic(dtype=np.float32, operand=round_float16, store=round_float16),
    # The baseline of a quantised file's gate; nothing trains in it. Ranges are those of the batch itself.
    INT8: _Arithmetic(dtype=np.float32, operand=round_uint8, store=round_uint8, weight=round_int8, fused=True),
}


class Reference(Backend):
    """The oracle. Slow by design; run it in float64 unless a baseline is wanted."""

    name: ClassVar[str] = "reference"
    vendor: ClassVar[str] = "any CPU"
    modes: ClassVar[tuple[Mode, ...]] = ("infer", "train")
    oracle: ClassVar[bool] = True
    """Its sessions have `resolve`, which the parity gate needs."""

    def probe(self) -> Device:
        return Device(
            name=f"NumPy on {processor()}",
            precisions=tuple(p for p in _ARITHMETICS if p != INT8),
            versions={"numpy": np.__version__},
            unified=True,
        )

    def open(self, graph: Graph, weights: Weights, settings: Settings) -> "ReferenceSession":
        if settings.precision != INT8:
            self.check(settings)
        return ReferenceSession(graph, weights, settings)

    def ceilings(self, precision: str) -> Ceilings:
        """NumPy's products and copies; those of the narrow precisions are float32's, in which they are emulated."""
        self.check(Settings(precision=precision))
        dtype = _ARITHMETICS[precision].dtype

        def product(n: int) -> timing.Work:
            rng = np.random.default_rng(n)
            a, b = (rng.random((n, n), np.float32).astype(dtype) - dtype(0.5) for _ in range(2))
            out = np.empty_like(a)
            return lambda: np.matmul(a, b, out=out)

        size = 2**28
        source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        copy = (lambda: np.copyto(target, source)), 2 * size
        return timing.ceilings(product, (1024, 2048, 4096), copy, _nothing, budget=2.5)


class ReferenceSession(Session):
    """Everything is computed at once, on the host, so `put`, `get` and `synchronize` have nothing to wait for."""

    def __init__(self, graph: Graph, weights: Weights, settings: Settings) -> None:
        self.graph, self.settings, self.recipe = graph, settings, graph.recipe
        self.arithmetic = _ARITHMETICS[settings.precision]
        # Row-major whatever the caller's order: `train_step` updates flat views, and a flattened column-major array is
        # a copy.
        self.parameters = {name: np.array(weights[name], self.arithmetic.dtype, order="C") for name in graph.parameters}
        # zeros, not zeros_like: no page is touched until the first update.
        self.velocity = {name: np.zeros(value.shape, value.dtype) for name, value in self.parameters.items()}
        self.resolve: Resolve | None = None

    def put(self, array: Array) -> Array:
        return np.array(array)

    def get(self, value: Array) -> Array:
        return np.array(value)

    def weights(self) -> dict[str, Array]:
        return {name: np.array(value) for name, value in self.parameters.items()}

    def latest_weights(self) -> Array:
        return np.array([value.flat[-1] for value in self.parameters.values()])

    def state(self) -> dict[str, Array]:
        velocity = {f"velocity.{name}": np.array(value) for name, value in self.velocity.items()}
        return {name: np.array(value) for name, value in self.parameters.items()} | velocity

    def restore(self, state: Mapping[str, Array]) -> None:
        for prefix, arrays in (("", self.parameters), ("velocity.", self.velocity)):
            for name, value in arrays.items():
                if prefix + name in state:
                    value[...] = state[prefix + name]

    def use(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def synchronize(self) -> None:
        """NumPy returns when the work is done."""

    def fallbacks(self, run: Callable[[], object]) -> dict[str, int]:
        """None: this is the host."""
        return {}

    def layer_times(self, images: Array, labels: Array | None = None) -> dict[str, LayerTime]:
        """Forward of every layer, in training with the masks of step 0 and ids 0, 1, ...; backward is not split."""
        masks = self.masks(np.arange(len(images)), step=0) if labels is not None else None
        found, x = {}, self.arithmetic.store(images.astype(self.arithmetic.dtype))
        for layer in self.graph.layers:

            def run(layer: Layer = layer, x: Array = x) -> Array:
                return self.arithmetic.store(self._layer(layer, x, masks))

            found[layer.name] = LayerTime(forward=timing.typical(run, _nothing, repeats=3))
            x = run()
        return found

    def infer(self, images: Array) -> Array:
        return self._forward(images, None)[-1]

    def masks(self, ids: Array, *, step: int) -> dict[str, npt.NDArray[np.bool_]]:
        return {
            s.layer.name: philox.keep_mask(self.settings.seed, i, ids, step, s.output[0], s.layer.p)
            for i, s in enumerate(self.graph.dropouts)
            if isinstance(s.layer, Dropout)
        }

    def trace(self, images: Array, labels: Array | None = None, masks: Mapping[str, Array] | None = None) -> Trace:
        values = self._forward(images, masks if labels is not None else None)
        layers = {layer.name: value for layer, value in zip(self.graph.layers, values[1:], strict=True)}
        if labels is None:
            return Trace(layers=layers, logits=values[-1])
        loss, gradients = self._backward(values, labels, masks or {})
        return Trace(layers=layers, logits=values[-1], loss=loss, gradients=gradients)

    def train_step(self, images: Array, labels: Array, ids: Array, *, step: int, learning_rate: float) -> Array:
        masks = self.masks(ids, step=step)
        loss, gradients = self._backward(self._forward(images, masks), labels, masks)
        for name, gradient in gradients.items():
            rate, decay = self.recipe.coefficients(name, learning_rate)
            flat = (a.reshape(-1) for a in (self.velocity[name], self.parameters[name], gradient))
            for v, w, g in zip(*(_chunks(a) for a in flat), strict=True):
                v *= self.recipe.momentum
                v -= decay * rate * w + rate * g
                w += v
        return np.asarray(loss)

    def _forward(self, images: Array, masks: Mapping[str, Array] | None) -> list[Array]:
        """The input and every layer's output."""
        values = [self.arithmetic.store(images.astype(self.arithmetic.dtype))]
        for layer, after in pairwise((*self.graph.layers, None)):
            y = self._layer(layer, values[-1], masks)
            values.append(y if self.arithmetic.fused and isinstance(after, ReLU) else self.arithmetic.store(y))
        return values

    def _layer(self, layer: Layer, x: Array, masks: Mapping[str, Array] | None) -> Array:
        match layer:
            case Pad():
                return np.pad(x, ((0, 0), (0, 0), (0, layer.bottom), (0, layer.right)))
            case Conv():
                w, b = self._operands(layer)
                return _conv(self.arithmetic.operand(x), w, layer) + b[:, None, None]
            case Linear():
                w, b = self._operands(layer)
                return self.arithmetic.operand(x) @ w.T + b
            case ReLU():
                return np.maximum(x, 0)
            case LRN():
                return x * _lrn_base(x, layer) ** -layer.beta
            case SpatialLRN():
                return x * _spatial_base(x, layer) ** -layer.beta
            case MaxPool():
                return _windows(x, layer).max(axis=0)
            case AdaptiveAvgPool():
                rows, columns = (_averages(layer, n, x.dtype) for n in x.shape[2:])
                return rows @ x @ columns.T
            case Flatten():
                return x.reshape(len(x), -1)
            case Dropout():
                if masks is None:
                    return x * x.dtype.type(layer.test_scale)
                return x * masks[layer.name] * x.dtype.type(layer.train_scale)
        raise TypeError(f"the reference has no layer {type(layer).__name__}")

    def _backward(
        self, values: list[Array], labels: Array, masks: Mapping[str, Array]
    ) -> tuple[float, dict[str, Array]]:
        """Mean softmax cross-entropy and its gradients."""
        logits = values[-1]
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        rows = np.arange(len(labels))
        loss = float(-log_p[rows, labels].mean())
        g = np.exp(log_p)
        g[rows, labels] -= 1
        g = self.arithmetic.store(g / len(labels))
        gradients: dict[str, Array] = {}
        first = next(i for i, layer in enumerate(self.graph.layers) if layer.parameters())
        for i in range(len(self.graph.layers) - 1, first - 1, -1):
            layer, x, y = self.graph.layers[i], values[i], values[i + 1]
            if isinstance(layer, Conv | Linear):
                w, _ = self._operands(layer)
                xo, go = self.arithmetic.operand(x), self.arithmetic.operand(g)
                if isinstance(layer, Conv):
                    dw, g = _conv_backward(xo, w, go, layer, needs_input=i > first)
                    db = go.sum(axis=(0, 2, 3))
                else:
                    dw, db, g = go.T @ xo, go.sum(axis=0), go @ w
                gradients[f"{layer.name}.weight"], gradients[f"{layer.name}.bias"] = dw, db
            else:
                before = self.graph.layers[i - 1].name if i else ""
                g = self._pointwise_backward(layer, x, y, g, masks, before)
            g = self.arithmetic.store(g)
        return loss, {name: gradients[name] for name in self.graph.parameters}

    def _pointwise_backward(
        self, layer: Layer, x: Array, y: Array, g: Array, masks: Mapping[str, Array], before: str
    ) -> Array:
        close = 16 * self.resolve.errors.get(before, 0.0) * float(np.sqrt(np.mean(x**2))) if self.resolve else 0.0
        side = self.resolve.side if self.resolve else 0
        match layer:
            case ReLU():
                return g * (x > (-close if side else close))
            case LRN():
                base = _lrn_base(x, layer)
                inner = _across(g * x * base ** (-layer.beta - 1), layer, adjoint=True)
                return g * base**-layer.beta - 2 * layer.alpha / layer.size * layer.beta * x * inner
            case SpatialLRN():
                base = _spatial_base(x, layer)
                # A sum over positions around is its own adjoint.
                inner = _around(g * x * base ** (-layer.beta - 1), layer.size)
                return g * base**-layer.beta - 2 * layer.alpha / layer.size**2 * layer.beta * x * inner
            case MaxPool():
                return _max_backward(x, y, g, layer, close if side else None)
            case AdaptiveAvgPool():
                rows, columns = (_averages(layer, n, x.dtype) for n in x.shape[2:])
                return rows.T @ g @ columns
            case Flatten():
                return g.reshape(x.shape)
            case Dropout():
                return g * masks[layer.name] * x.dtype.type(layer.train_scale)
            case Pad():
                return g[:, :, : x.shape[2], : x.shape[3]]
        raise TypeError(f"the reference has no gradient of {type(layer).__name__}")

    def _operands(self, layer: Layer) -> tuple[Array, Array]:
        w, b = (self.parameters[f"{layer.name}.{kind}"] for kind in ("weight", "bias"))
        if self.arithmetic.weight is not None:
            return self.arithmetic.weight(w), b
        return self.arithmetic.operand(w), self.arithmetic.operand(b)


def _chunks(flat: Array) -> list[Array]:
    """Views of up to 2^16 elements, whose temporaries stay in cache."""
    return [flat[i : i + 65536] for i in range(0, flat.size, 65536)]


def _columns(x: Array, layer: Conv) -> Array:
    """One image ``(C, H, W)`` as ``(groups, C / groups * kernel^2, positions)``."""
    p = layer.padding
    x = np.pad(x, ((0, 0), (p, p), (p, p)))
    view = np.lib.stride_tricks.sliding_window_view(x, (layer.kernel, layer.kernel), axis=(1, 2))
    view = view[:, :: layer.stride, :: layer.stride].transpose(0, 3, 4, 1, 2)
    return np.ascontiguousarray(view).reshape(layer.groups, layer.fan_in, -1)


def _conv(x: Array, w: Array, layer: Conv) -> Array:
    _, h, wide = layer.output(x.shape[1:])
    kernels = w.reshape(layer.groups, -1, layer.fan_in)
    return np.stack([(kernels @ _columns(image, layer)).reshape(-1, h, wide) for image in x])


def _conv_backward(x: Array, w: Array, g: Array, layer: Conv, *, needs_input: bool) -> tuple[Array, Array]:
    n, c, h, wide = x.shape
    p, s, k = layer.padding, layer.stride, layer.kernel
    gh, gw = g.shape[2:]
    kernels = w.reshape(layer.groups, -1, layer.fan_in)
    dw = np.zeros_like(kernels)
    dx = np.zeros((n, c, h + 2 * p, wide + 2 * p), x.dtype)
    for i in range(n):
        gi = g[i].reshape(layer.groups, -1, gh * gw)
        dw += gi @ _columns(x[i], layer).transpose(0, 2, 1)
        if needs_input:
            patches = (kernels.transpose(0, 2, 1) @ gi).reshape(c, k, k, gh, gw)
            for a in range(k):
                for b in range(k):
                    dx[i, :, a : a + s * gh : s, b : b + s * gw : s] += patches[:, a, b]
    return dw.reshape(w.shape), dx[:, :, p : p + h, p : p + wide]


def _across(x: Array, layer: LRN, *, adjoint: bool = False) -> Array:
    """Sums over the `size` channels around each, within each group; the adjoint mirrors windows of even size."""
    n, c, h, w = x.shape
    grouped = x.reshape(n, layer.groups, c // layer.groups, h, w)
    below = (layer.size - adjoint) // 2
    padded = np.pad(grouped, ((0, 0), (0, 0), (below, layer.size - 1 - below), (0, 0), (0, 0)))
    total = np.zeros_like(grouped)
    for i in range(layer.size):
        total += padded[:, :, i : i + c // layer.groups]
    return total.reshape(x.shape)


def _lrn_base(x: Array, layer: LRN) -> Array:
    return layer.k + layer.alpha / layer.size * _across(x * x, layer)


def _around(x: Array, size: int) -> Array:
    """Sums over the `size` x `size` positions around each, zeros outside."""
    for axis in (2, 3):
        ends = [(size // 2, size // 2) if a == axis else (0, 0) for a in range(4)]
        x = np.lib.stride_tricks.sliding_window_view(np.pad(x, ends), size, axis=axis).sum(axis=-1)
    return x


def _spatial_base(x: Array, layer: SpatialLRN) -> Array:
    return layer.k + layer.alpha / layer.size**2 * _around(x * x, layer.size)


def _windows(x: Array, layer: MaxPool) -> Array:
    """Each position of the window as a plane, row-major: ``(kernel^2, n, c, oh, ow)``."""
    view = np.lib.stride_tricks.sliding_window_view(x, (layer.kernel, layer.kernel), axis=(2, 3))
    view = view[:, :, :: layer.stride, :: layer.stride]
    return np.moveaxis(view.reshape(*view.shape[:4], -1), -1, 0)


def _max_backward(x: Array, y: Array, g: Array, layer: MaxPool, close: float | None) -> Array:
    planes = _windows(x, layer)
    winner = planes.argmax(axis=0)
    if close is not None:
        second = np.where(np.arange(len(planes))[:, None, None, None, None] == winner, -np.inf, planes)
        runner_up = second.argmax(axis=0)
        winner = np.where(y - second.max(axis=0) <= close, runner_up, winner)
    dx = np.zeros_like(x)
    oh, ow, s = g.shape[2], g.shape[3], layer.stride
    for i in range(layer.kernel**2):
        a, b = divmod(i, layer.kernel)
        dx[:, :, a : a + s * oh : s, b : b + s * ow : s] += np.where(winner == i, g, 0)
    return dx


def _averages(layer: AdaptiveAvgPool, length: int, dtype: npt.DTypeLike) -> Array:
    """The matrix ``(size, length)`` whose rows average the windows."""
    matrix = np.zeros((layer.size, length), dtype)
    for row, (start, end) in zip(matrix, layer.windows(length), strict=True):
        row[start:end] = 1 / (end - start)
    return matrix


@hookimpl
def portnet_backends() -> Iterable[Backend]:
    return [Reference()]
