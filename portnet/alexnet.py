"""AlexNet, top to bottom.

Sources: [P] Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks",
NIPS 2012; [C] the 2012 source released by the Computer History Museum; [2] cuda-convnet2; [K] BVLC Caffe,
models/bvlc_alexnet; [V] torchvision, models/alexnet.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf, prod, sqrt

from portnet.errors import InputError, UnknownName
from portnet.graph import (
    LRN,
    AdaptiveAvgPool,
    Constant,
    Conv,
    Dropout,
    Flatten,
    Graph,
    Layer,
    Linear,
    MaxPool,
    Milestones,
    Normal,
    Normalisation,
    Pad,
    Plateau,
    Recipe,
    ReLU,
    Shape,
    SpatialLRN,
    Uniform,
)

# Channel means of ImageNet's pictures on the 0-255 scale [2].
IMAGENET_MEAN = (127.305, 119.715, 104.913)

# As logged in the 2012 code's run [C]: 0.001 at epoch 25, 1e-4 at 51, "smaller" from 67, for which a tenth stands here.
LOGGED = Milestones(at=(25, 51, 67))


def paper2012(*, image_size: int = 224, classes: int = 1000, dropout: float = 0.5, bias: float = 1.0) -> Graph:
    """The paper's formulae [P]: two towers, merged into one network with grouped convolutions and per-tower LRN.

    The grid of conv1 is ``1 + ceil((image_size - 11) / 4)`` with zeros read outside: 224 and 227 both give 55.
    LRN's alpha is the paper's 1e-4 times 5, since the libraries' convention divides by the window.
    """
    pad = (11 - image_size) % 4
    towers, k, alpha = 2, 2.0, 5e-4
    gauss, zero, one = Normal(std=0.01), Constant(value=0.0), Constant(value=bias)
    return _graph(
        "paper2012",
        image_size,
        [
            *([Pad(name="pad", right=pad, bottom=pad)] if pad else []),
            Conv(name="conv1", in_channels=3, out_channels=96, kernel=11, stride=4, weight_init=gauss, bias_init=zero),
            ReLU(name="relu1"),
            LRN(name="norm1", alpha=alpha, k=k, groups=towers),
            MaxPool(name="pool1"),
            Conv(name="conv2", in_channels=96, out_channels=256, kernel=5, padding=2, groups=2, bias_init=one),
            ReLU(name="relu2"),
            LRN(name="norm2", alpha=alpha, k=k, groups=towers),
            MaxPool(name="pool2"),
            Conv(name="conv3", in_channels=256, out_channels=384, kernel=3, padding=1, bias_init=zero),
            ReLU(name="relu3"),
            Conv(name="conv4", in_channels=384, out_channels=384, kernel=3, padding=1, groups=2, bias_init=one),
            ReLU(name="relu4"),
            Conv(name="conv5", in_channels=384, out_channels=256, kernel=3, padding=1, groups=2, bias_init=one),
            ReLU(name="relu5"),
            MaxPool(name="pool5"),
            Flatten(name="flatten"),
        ],
        lambda features: [
            Linear(name="fc6", in_features=features, out_features=4096, bias_init=one),
            ReLU(name="relu6"),
            Dropout(name="drop6", p=dropout),
            Linear(name="fc7", in_features=4096, out_features=4096, bias_init=one),
            ReLU(name="relu7"),
            Dropout(name="drop7", p=dropout),
            Linear(name="fc8", in_features=4096, out_features=classes, bias_init=zero),
        ],
        Recipe(learning_rate=0.01, momentum=0.9, weight_decay=5e-4, batch=128, epochs=90, schedule=Plateau()),
        Normalisation(mean=IMAGENET_MEAN),
    )


def chm145(*, image_size: int = 224, classes: int = 1000, dropout: float = 0.5, bias: float = 1.0) -> Graph:
    """What the released 2012 code ran [C], ``layers-145.cfg``: as the paper's network, but for what follows.

    In layer 1 the pool comes before the ReLU, and so it does in layer 5; layer 2 is normalised once more, within each
    map; LRN divides alpha by its window; conv3 to conv5 start at a deviation of 0.03; biases learn twice as fast.
    """
    pad = (11 - image_size) % 4
    towers, k, alpha = 2, 2.0, 1e-4
    wide, zero, one = Normal(std=0.03), Constant(value=0.0), Constant(value=bias)
    return _graph(
        "chm145",
        image_size,
        [
            *([Pad(name="pad", right=pad, bottom=pad)] if pad else []),
            Conv(name="conv1", in_channels=3, out_channels=96, kernel=11, stride=4, bias_init=zero),
            LRN(name="norm1", alpha=alpha, k=k, groups=towers),
            MaxPool(name="pool1"),
            ReLU(name="relu1"),
            Conv(name="conv2", in_channels=96, out_channels=256, kernel=5, padding=2, groups=2, bias_init=one),
            ReLU(name="relu2"),
            LRN(name="norm2", alpha=alpha, k=k, groups=towers),
            SpatialLRN(name="mapnorm2", alpha=0.001),
            MaxPool(name="pool2"),
            Conv(
                name="conv3",
                in_channels=256,
                out_channels=384,
                kernel=3,
                padding=1,
                weight_init=wide,
                bias_init=zero,
            ),
            ReLU(name="relu3"),
            Conv(
                name="conv4",
                in_channels=384,
                out_channels=384,
                kernel=3,
                padding=1,
                groups=2,
                weight_init=wide,
                bias_init=one,
            ),
            ReLU(name="relu4"),
            Conv(
                name="conv5",
                in_channels=384,
                out_channels=256,
                kernel=3,
                padding=1,
                groups=2,
                weight_init=wide,
                bias_init=one,
            ),
            MaxPool(name="pool5"),
            ReLU(name="relu5"),
            Flatten(name="flatten"),
        ],
        lambda features: [
            Linear(name="fc6", in_features=features, out_features=4096, bias_init=one),
            ReLU(name="relu6"),
            Dropout(name="drop6", p=dropout),
            Linear(name="fc7", in_features=4096, out_features=4096, bias_init=one),
            ReLU(name="relu7"),
            Dropout(name="drop7", p=dropout),
            Linear(name="fc8", in_features=4096, out_features=classes, bias_init=zero),
        ],
        # The log says that conv1 was frozen near the end, and that the rate was "smaller" from epoch 67: one reading.
        Recipe(
            learning_rate=0.01,
            momentum=0.9,
            weight_decay=5e-4,
            bias_rate=2.0,
            batch=128,
            epochs=90,
            schedule=LOGGED,
            freeze=("conv1",),
            freeze_from=67,
        ),
        Normalisation(mean=IMAGENET_MEAN),
    )


def caffe(*, image_size: int = 227, classes: int = 1000, dropout: float = 0.5, bias: float = 0.1) -> Graph:
    """bvlc_alexnet [K]: LRN over all channels with k=1, milder biases, inverted dropout, bias rate doubled."""
    one = Constant(value=bias)
    return _graph(
        "caffe",
        image_size,
        [
            Conv(name="conv1", in_channels=3, out_channels=96, kernel=11, stride=4),
            ReLU(name="relu1"),
            LRN(name="norm1", alpha=1e-4, k=1.0),
            MaxPool(name="pool1"),
            Conv(name="conv2", in_channels=96, out_channels=256, kernel=5, padding=2, groups=2, bias_init=one),
            ReLU(name="relu2"),
            LRN(name="norm2", alpha=1e-4, k=1.0),
            MaxPool(name="pool2"),
            Conv(name="conv3", in_channels=256, out_channels=384, kernel=3, padding=1),
            ReLU(name="relu3"),
            Conv(name="conv4", in_channels=384, out_channels=384, kernel=3, padding=1, groups=2, bias_init=one),
            ReLU(name="relu4"),
            Conv(name="conv5", in_channels=384, out_channels=256, kernel=3, padding=1, groups=2, bias_init=one),
            ReLU(name="relu5"),
            MaxPool(name="pool5"),
            Flatten(name="flatten"),
        ],
        lambda features: [
            Linear(name="fc6", in_features=features, out_features=4096, weight_init=Normal(std=0.005), bias_init=one),
            ReLU(name="relu6"),
            Dropout(name="drop6", p=dropout, inverted=True),
            Linear(name="fc7", in_features=4096, out_features=4096, weight_init=Normal(std=0.005), bias_init=one),
            ReLU(name="relu7"),
            Dropout(name="drop7", p=dropout, inverted=True),
            Linear(name="fc8", in_features=4096, out_features=classes),
        ],
        # solver.prototxt [K]: a tenth every 100,000 of 450,000 steps of 256, which is 90 epochs of ImageNet.
        Recipe(
            learning_rate=0.01,
            momentum=0.9,
            weight_decay=5e-4,
            bias_rate=2.0,
            batch=256,
            epochs=90,
            schedule=Milestones(at=(100_000, 200_000, 300_000, 400_000), unit="step"),
        ),
        Normalisation(mean=IMAGENET_MEAN),
    )


def torchvision(*, image_size: int = 224, classes: int = 1000, dropout: float = 0.5) -> Graph:
    """The widths of "One weird trick" [V]: one tower, no LRN, dropout before fc6 and fc7, images in [0, 1]."""

    def conv(name: str, cin: int, cout: int, kernel: int, stride: int = 1, padding: int = 1) -> Conv:
        default = Uniform(bound=1 / sqrt(cin * kernel**2))  # PyTorch's: Kaiming uniform with a = sqrt(5)
        return Conv(
            name=name,
            in_channels=cin,
            out_channels=cout,
            kernel=kernel,
            stride=stride,
            padding=padding,
            weight_init=default,
            bias_init=default,
        )

    def linear(name: str, fin: int, fout: int) -> Linear:
        default = Uniform(bound=1 / sqrt(fin))
        return Linear(name=name, in_features=fin, out_features=fout, weight_init=default, bias_init=default)

    return _graph(
        "torchvision",
        image_size,
        [
            conv("conv1", 3, 64, 11, stride=4, padding=2),
            ReLU(name="relu1"),
            MaxPool(name="pool1"),
            conv("conv2", 64, 192, 5, padding=2),
            ReLU(name="relu2"),
            MaxPool(name="pool2"),
            conv("conv3", 192, 384, 3),
            ReLU(name="relu3"),
            conv("conv4", 384, 256, 3),
            ReLU(name="relu4"),
            conv("conv5", 256, 256, 3),
            ReLU(name="relu5"),
            MaxPool(name="pool5"),
            AdaptiveAvgPool(name="avgpool", size=6),
            Flatten(name="flatten"),
        ],
        lambda features: [
            Dropout(name="drop6", p=dropout, inverted=True),
            linear("fc6", features, 4096),
            ReLU(name="relu6"),
            Dropout(name="drop7", p=dropout, inverted=True),
            linear("fc7", 4096, 4096),
            ReLU(name="relu7"),
            linear("fc8", 4096, classes),
        ],
        # torchvision's references/classification: decay 1e-4 on every parameter, biases included; a tenth of the rate
        # every 30 of 90 epochs; 32 pictures on each of 8 devices.
        Recipe(
            learning_rate=0.01,
            momentum=0.9,
            weight_decay=1e-4,
            bias_decay=1.0,
            batch=256,
            epochs=90,
            schedule=Milestones(at=(31, 61)),
        ),
        Normalisation(mean=(0.485 * 255, 0.456 * 255, 0.406 * 255), scale=(0.229 * 255, 0.224 * 255, 0.225 * 255)),
    )


SCHEDULES: dict[str, Plateau | Milestones | None] = {"plateau": Plateau(), "logged": LOGGED, "constant": None}
"""Schedules of the learning rate to put in place of a preset's own."""

PRESETS: dict[str, Callable[..., Graph]] = {f.__name__: f for f in (paper2012, chm145, caffe, torchvision)}


def graph(preset: str = "paper2012", *, mean: Sequence[float] | None = None, **options: float) -> Graph:
    """The network of that preset.

    Options: `classes` (length of the logits), `image_size` (pixels a side; any that leaves at least 1x1 after the
    last pool), `dropout` (probability in [0, 1)), `bias` (where the paper starts biases at 1; not for torchvision),
    `mean` (three channel means on the 0-255 scale to subtract, by default ImageNet's).

    Raises `UnknownName` for an unknown preset and `InputError` for an option that does not fit.
    """
    if preset not in PRESETS:
        raise UnknownName("preset", preset, PRESETS)
    defaults: dict[str, float] = PRESETS[preset].__kwdefaults__ or {}
    for name, value in options.items():
        if name not in defaults:
            raise UnknownName(f"option of preset {preset}", name, [*defaults, "mean"])
        wanted = int if isinstance(defaults[name], int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted) or not 0 <= value < inf:
            kind = "a positive integer" if wanted is int else "a number of at least 0"
            raise InputError(f"{name} must be {kind}, got {value!r}")
    if options.get("classes", 1) < 1:
        raise InputError(f"classes must be a positive integer, got {options['classes']!r}")
    built = PRESETS[preset](**options)
    recorded: dict[str, object] = {**defaults, **options}
    normalisation = built.normalisation
    if mean is not None:
        try:
            channels = tuple(float(m) for m in mean)
        except (TypeError, ValueError):
            channels = ()
        if len(channels) != 3 or not all(0 <= m <= 255 for m in channels):
            raise InputError(f"mean must be three numbers on the 0-255 scale, got {mean!r}")
        recorded["mean"] = channels
        normalisation = replace(normalisation, mean=channels)
    return replace(built, options=tuple(sorted(recorded.items())), normalisation=normalisation)


def _graph(
    preset: str,
    image_size: int,
    features: list[Layer],
    classifier: Callable[[int], list[Layer]],
    recipe: Recipe,
    normalisation: Normalisation,
) -> Graph:
    shape: Shape = (3, image_size, image_size)
    for layer in features:
        shape = layer.output(shape)
    return Graph(
        preset=preset,
        input=(3, image_size, image_size),
        layers=(*features, *classifier(prod(shape))),
        recipe=recipe,
        normalisation=normalisation,
    )
