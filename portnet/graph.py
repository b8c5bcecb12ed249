"""Networks as data: a chain of layers with their shapes, parameters, multiply-accumulates and bytes.

Every consumer (the torch module, the ONNX file, the NumPy oracle, the cost model) reads this; nothing is traced.
Shapes are of one image, without the batch: ``(channels, height, width)``, or ``(features,)`` after `Flatten`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Literal

from portnet.errors import InputError

Shape = tuple[int, ...]

ITEMSIZE = {"float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Bytes of a stored activation or operand, by precision."""


@dataclass(frozen=True, kw_only=True)
class Normal:
    """Initial values drawn from N(0, std^2)."""

    std: float


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Initial values drawn evenly from (-bound, bound)."""

    bound: float


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Every initial value the same."""

    value: float


Init = Normal | Uniform | Constant


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One step of the chain. `name` is unique in its graph and prefixes the layer's parameters."""

    name: str

    def output(self, shape: Shape) -> Shape:
        """The shape after this layer, given the shape before it."""
        return shape

    def parameters(self) -> dict[str, Shape]:
        """Shapes of the layer's own parameters, in torch's layout."""
        return {}

    def macs(self, shape: Shape) -> int:
        """Multiply-accumulates of one forward pass over one image of `shape`; biases and pointwise work not counted."""
        return 0

    @property
    def moves(self) -> bool:
        """Whether the layer must move its input and output through memory.

        False for what folds into a neighbour at no cost in traffic (ReLU, dropout, padding, flattening).
        """
        return False


def _spatial(layer: Layer, shape: Shape) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise InputError(f"{layer.name} needs an input of (channels, height, width), got {shape}")
    return shape[0], shape[1], shape[2]


def _window(layer: Layer, size: int, kernel: int, stride: int, padding: int = 0) -> int:
    """Output length of a window moved over `size` positions, rounded down as torch does."""
    length = (size + 2 * padding - kernel) // stride + 1
    if length < 1:
        raise InputError(
            f"the image is too small: {layer.name} needs at least {kernel - 2 * padding} pixels a side and gets {size}"
        )
    return length


@dataclass(frozen=True, kw_only=True)
class Pad(Layer):
    """Zeros added on the right and at the bottom, as many as the 2012 code read outside the image."""

    right: int
    bottom: int

    def output(self, shape: Shape) -> Shape:
        c, h, w = _spatial(self, shape)
        return c, h + self.bottom, w + self.right


@dataclass(frozen=True, kw_only=True)
class Conv(Layer):
    """2-D cross-correlation with bias; square kernel, zero padding on all sides."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    weight_init: Init = field(default_factory=lambda: Normal(std=0.01))
    bias_init: Init = field(default_factory=lambda: Constant(value=0.0))

    def output(self, shape: Shape) -> Shape:
        c, h, w = _spatial(self, shape)
        if c != self.in_channels:
            raise InputError(f"{self.name} expects {self.in_channels} channels, got {c}")
        return (
            self.out_channels,
            _window(self, h, self.kernel, self.stride, self.padding),
            _window(self, w, self.kernel, self.stride, self.padding),
        )

    @property
    def fan_in(self) -> int:
        """Inputs that each output sums over."""
        return self.in_channels // self.groups * self.kernel**2

    def parameters(self) -> dict[str, Shape]:
        return {
            "weight": (self.out_channels, self.in_channels // self.groups, self.kernel, self.kernel),
            "bias": (self.out_channels,),
        }

    def macs(self, shape: Shape) -> int:
        return prod(self.output(shape)) * self.fan_in

    @property
    def moves(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Linear(Layer):
    """Matrix product with bias: ``y = x W^T + b``."""

    in_features: int
    out_features: int
    weight_init: Init = field(default_factory=lambda: Normal(std=0.01))
    bias_init: Init = field(default_factory=lambda: Constant(value=0.0))

    def output(self, shape: Shape) -> Shape:
        if shape != (self.in_features,):
            raise InputError(f"{self.name} expects {self.in_features} features, got shape {shape}")
        return (self.out_features,)

    @property
    def fan_in(self) -> int:
        """Inputs that each output sums over."""
        return self.in_features

    def parameters(self) -> dict[str, Shape]:
        return {"weight": (self.out_features, self.in_features), "bias": (self.out_features,)}

    def macs(self, shape: Shape) -> int:
        return self.in_features * self.out_features

    @property
    def moves(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class ReLU(Layer):
    """``max(x, 0)``."""


@dataclass(frozen=True, kw_only=True)
class LRN(Layer):
    """Local response normalisation across channels, separately in each of `groups` equal runs of channels.

    ``y = x / (k + alpha / size * sum(x^2 over size channels around))^beta``, the convention of PyTorch, Caffe and
    ONNX. The paper's formula does not divide by `size`: its alpha is multiplied by `size` to stand here.
    """

    size: int = 5
    alpha: float
    beta: float = 0.75
    k: float
    groups: int = 1

    def output(self, shape: Shape) -> Shape:
        c, _, _ = _spatial(self, shape)
        if c % self.groups:
            raise InputError(f"{self.name} cannot split {c} channels into {self.groups} equal groups")
        return shape

    @property
    def moves(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class SpatialLRN(Layer):
    """Response normalisation within each map: over the `size` x `size` positions around, in the same channel.

    ``y = x / (k + alpha / size^2 * sum(x^2 over the positions around, 0 outside))^beta``: cuda-convnet's ``rnorm``,
    which Caffe calls LRN within channels. `size` is odd.
    """

    size: int = 5
    alpha: float
    beta: float = 0.75
    k: float = 1.0

    def output(self, shape: Shape) -> Shape:
        _spatial(self, shape)
        if self.size % 2 == 0:
            raise InputError(f"{self.name} needs an odd neighbourhood, got {self.size}")
        return shape

    @property
    def moves(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class MaxPool(Layer):
    """Maximum over square windows; sizes are rounded down. Ties go to the first position in row-major order."""

    kernel: int = 3
    stride: int = 2

    def output(self, shape: Shape) -> Shape:
        c, h, w = _spatial(self, shape)
        return c, _window(self, h, self.kernel, self.stride), _window(self, w, self.kernel, self.stride)

    @property
    def moves(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class AdaptiveAvgPool(Layer):
    """Means over windows that divide any image into ``size x size``, as torch's AdaptiveAvgPool2d does."""

    size: int

    def output(self, shape: Shape) -> Shape:
        c, _, _ = _spatial(self, shape)
        return c, self.size, self.size

    def windows(self, length: int) -> list[tuple[int, int]]:
        """The half-open interval of `length` positions that each output averages."""
        return [(i * length // self.size, -(-(i + 1) * length // self.size)) for i in range(self.size)]

    @property
    def moves(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Flatten(Layer):
    """``(channels, height, width)`` to ``(channels * height * width,)``, row-major."""

    def output(self, shape: Shape) -> Shape:
        return (prod(shape),)


@dataclass(frozen=True, kw_only=True)
class Dropout(Layer):
    """Zero each element with probability `p` in training.

    `inverted` (Caffe, torchvision) divides what is kept by ``1 - p`` in training and does nothing at test; otherwise
    (paper, 2012 code) training only masks, and the test multiplies by ``1 - p``.
    """

    p: float = 0.5
    inverted: bool = False

    def output(self, shape: Shape) -> Shape:
        if not 0 <= self.p < 1:
            raise InputError(f"{self.name}: the dropout probability must lie in [0, 1), got {self.p}")
        return shape

    @property
    def train_scale(self) -> float:
        """Factor on what is kept in training."""
        return 1 / (1 - self.p) if self.inverted else 1.0

    @property
    def test_scale(self) -> float:
        """Factor on everything at test."""
        return 1.0 if self.inverted else 1 - self.p


@dataclass(frozen=True, kw_only=True)
class Plateau:
    """The learning rate times `factor` each time that validation has not improved for `patience` epochs.

    At most `times` times. The paper says no more than when "the validation error rate stopped improving" at the
    current rate, and that it happened three times; the patience is ours.
    """

    factor: float = 0.1
    times: int = 3
    patience: int = 5


@dataclass(frozen=True, kw_only=True)
class Milestones:
    """The learning rate times `factor` at each place of `at`, counted in `unit`.

    An ``epoch`` is the number, from 1, of the first that is trained at the new rate; a ``step`` how many updates come
    before it.
    """

    at: tuple[int, ...]
    factor: float = 0.1
    unit: Literal["epoch", "step"] = "epoch"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained: the update rule, the schedule, the size of a batch, how many epochs.

    The update is ``v = momentum v - weight_decay lr w - lr g; w = w + v``: the learning rate is inside the velocity
    (torch's SGD keeps it outside). `bias_rate` multiplies the learning rate of biases and `bias_decay` their weight
    decay. The rate of the layers in `frozen` is 0, and from epoch `freeze_from` (counted from 1) on that of the layers
    in `freeze`. Without a `schedule` the rate stays as it is.
    """

    learning_rate: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    bias_rate: float = 1.0
    bias_decay: float = 0.0
    batch: int = 128
    epochs: int = 90
    schedule: Plateau | Milestones | None = None
    frozen: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    freeze_from: int | None = None

    def coefficients(self, parameter: str, learning_rate: float) -> tuple[float, float]:
        """The learning rate and the weight decay of the parameter of that name (``conv1.bias``)."""
        layer, _, kind = parameter.rpartition(".")
        if layer in self.frozen:
            learning_rate = 0.0
        if kind == "bias":
            return learning_rate * self.bias_rate, self.weight_decay * self.bias_decay
        return learning_rate, self.weight_decay

    def in_epoch(self, epoch: int) -> "Recipe":
        """The recipe as it stands in an epoch, counted from 0: with what is frozen there in `frozen`."""
        if self.freeze_from is None or epoch + 1 < self.freeze_from:
            return self
        return replace(self, frozen=tuple(dict.fromkeys((*self.frozen, *self.freeze))))


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """From RGB pixels on the 0-255 scale to the network's input: ``(pixel - mean) / scale``, per channel."""

    mean: tuple[float, float, float]
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one layer, or one network, must do at the least for a batch.

    `macs` counts multiply-accumulates of convolutions and products; `bytes` what has to pass through memory if each
    tensor is read once by each pass that needs it and written once.
    """

    macs: int
    bytes: int

    @property
    def flops(self) -> int:
        """Two per multiply-accumulate. Pointwise layers have none counted: bytes bound them."""
        return 2 * self.macs

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(macs=self.macs + other.macs, bytes=self.bytes + other.bytes)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A layer where it stands: with the shapes of one image before and after it."""

    layer: Layer
    input: Shape
    output: Shape

    @property
    def parameter_count(self) -> int:
        return sum(prod(s) for s in self.layer.parameters().values())

    @property
    def macs(self) -> int:
        """Forward multiply-accumulates for one image."""
        return self.layer.macs(self.input)

    def cost(self, batch: int, *, training: bool, first: bool = False, itemsize: int = 4) -> Cost:
        """The least this layer costs for `batch` images, forward or (`training`) forward, backward and update.

        Backward reads the output's gradient and the input, and writes the input's gradient; layers with weights
        read them again and write their gradient; the update reads weights, gradient and velocity and writes two of
        them, in four bytes a number at least, which is how narrow precisions are trained. The `first` layer with
        weights owes no gradient of its input.
        """
        x, y, w = batch * prod(self.input), batch * prod(self.output), self.parameter_count
        macs, moved = batch * self.macs, (x + y + w) * self.layer.moves
        if training:
            needs_input_gradient = not first
            macs *= 2 + needs_input_gradient
            moved += ((y + x + w) + needs_input_gradient * (x + w)) * self.layer.moves
        updated = 5 * w * training * self.layer.moves
        return Cost(macs=macs, bytes=moved * itemsize + updated * max(itemsize, 4))


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A network: an input shape, a chain of layers, and what training it needs to know.

    Raises `InputError` where layers do not fit together or share a name.
    """

    preset: str
    options: tuple[tuple[str, object], ...] = ()
    input: Shape
    layers: tuple[Layer, ...]
    recipe: Recipe = field(default_factory=Recipe)
    normalisation: Normalisation = field(default_factory=lambda: Normalisation(mean=(0.0, 0.0, 0.0)))

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise InputError(f"layer names must be unique, got {names}")
        _ = self.steps

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """The layers with their shapes, in order."""
        steps, shape = [], self.input
        for layer in self.layers:
            after = layer.output(shape)
            steps.append(Step(layer=layer, input=shape, output=after))
            shape = after
        return tuple(steps)

    @property
    def output(self) -> Shape:
        """Shape of the network's output for one image."""
        return self.steps[-1].output

    @property
    def classes(self) -> int:
        """Length of the logits."""
        return self.output[0]

    @cached_property
    def parameters(self) -> Mapping[str, Shape]:
        """Every parameter's shape, by name (``conv1.weight``), in order."""
        return {f"{layer.name}.{k}": shape for layer in self.layers for k, shape in layer.parameters().items()}

    @property
    def parameter_count(self) -> int:
        """Number of weights and biases."""
        return sum(step.parameter_count for step in self.steps)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one forward pass over one image."""
        return sum(step.macs for step in self.steps)

    @property
    def dropouts(self) -> tuple[Step, ...]:
        """The dropout layers, in order; a layer's place here names its stream of random numbers."""
        return tuple(step for step in self.steps if isinstance(step.layer, Dropout))

    def costs(self, batch: int = 1, *, training: bool = False, itemsize: int = 4) -> dict[str, Cost]:
        """The least cost of every layer for `batch` images of `itemsize` bytes a number; see `Step.cost`."""
        first = next((s.layer.name for s in self.steps if s.parameter_count), None)
        return {
            s.layer.name: s.cost(batch, training=training, first=s.layer.name == first, itemsize=itemsize)
            for s in self.steps
        }

    def cost(self, batch: int = 1, *, training: bool = False, itemsize: int = 4) -> Cost:
        """The sum of `costs`."""
        return sum(self.costs(batch, training=training, itemsize=itemsize).values(), Cost(macs=0, bytes=0))

    def summary(self) -> str:
        """A table of layers, output shapes, parameters and multiply-accumulates for one image."""
        rows = [("layer", "output", "parameters", "MACs"), ("input", "x".join(map(str, self.input)), "", "")]
        for s in self.steps:
            size = "x".join(map(str, s.output))
            rows.append(
                (
                    f"{s.layer.name} ({type(s.layer).__name__})",
                    size,
                    f"{s.parameter_count:,}" if s.parameter_count else "",
                    f"{s.macs:,}" if s.macs else "",
                )
            )
        rows.append((f"total ({self.preset})", "", f"{self.parameter_count:,}", f"{self.macs:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in rows
        ]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
