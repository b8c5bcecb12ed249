"""The networks as data: counts, shapes and costs against tables written by hand."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest

from portnet import alexnet
from portnet.errors import InputError, UnknownName
from portnet.graph import (
    LRN,
    AdaptiveAvgPool,
    Constant,
    Conv,
    Cost,
    Dropout,
    Flatten,
    Graph,
    Linear,
    MaxPool,
    Normal,
    Normalisation,
    Pad,
    Recipe,
    ReLU,
    SpatialLRN,
    Step,
    Uniform,
)

# Layer by layer: output, parameters, multiply-accumulates for one image. The paper's rows are the 2012 paper's figures;
# chm145 (the code released by the Computer History Museum) and Caffe have the same.
PAPER = {
    "conv1": ((96, 55, 55), 34_944, 105_415_200),
    "conv2": ((256, 27, 27), 307_456, 223_948_800),
    "conv3": ((384, 13, 13), 885_120, 149_520_384),
    "conv4": ((384, 13, 13), 663_936, 112_140_288),
    "conv5": ((256, 13, 13), 442_624, 74_760_192),
    "fc6": ((4096,), 37_752_832, 37_748_736),
    "fc7": ((4096,), 16_781_312, 16_777_216),
    "fc8": ((1000,), 4_097_000, 4_096_000),
}
# Parameters as torchvision's own layers have them.
TORCHVISION = {
    "conv1": ((64, 55, 55), 23_296, 70_276_800),
    "conv2": ((192, 27, 27), 307_392, 223_948_800),
    "conv3": ((384, 13, 13), 663_936, 112_140_288),
    "conv4": ((256, 13, 13), 884_992, 149_520_384),
    "conv5": ((256, 13, 13), 590_080, 99_680_256),
    "fc6": ((4096,), 37_752_832, 37_748_736),
    "fc7": ((4096,), 16_781_312, 16_777_216),
    "fc8": ((1000,), 4_097_000, 4_096_000),
}
TABLES = {"paper2012": PAPER, "chm145": PAPER, "caffe": PAPER, "torchvision": TORCHVISION}
TOTALS = {
    "paper2012": (60_965_224, 724_406_816),
    "chm145": (60_965_224, 724_406_816),
    "caffe": (60_965_224, 724_406_816),
    "torchvision": (61_100_840, 714_188_480),
}

every_preset = pytest.mark.parametrize("preset", sorted(alexnet.PRESETS))


def steps(graph):
    return {step.layer.name: step for step in graph.steps}


def chain(*layers, shape=(3, 8, 8)):
    return Graph(preset="test", input=shape, layers=layers)


@every_preset
def test_totals(preset):
    graph = alexnet.graph(preset)
    assert (graph.parameter_count, graph.macs) == TOTALS[preset]
    assert graph.cost(1).flops == 2 * graph.macs
    assert (graph.classes, graph.output) == (1000, (1000,))


@every_preset
def test_layer_by_layer(preset):
    found = {
        name: (step.output, step.parameter_count, step.macs)
        for name, step in steps(alexnet.graph(preset)).items()
        if step.parameter_count
    }
    assert found == TABLES[preset]
    assert list(found) == list(TABLES[preset])


@pytest.mark.parametrize(
    ("preset", "image_size", "sides"),
    [
        ("paper2012", 224, (55, 27, 13, 6)),
        ("paper2012", 227, (55, 27, 13, 6)),
        ("chm145", 224, (55, 27, 13, 6)),
        ("chm145", 227, (55, 27, 13, 6)),
        ("caffe", 227, (55, 27, 13, 6)),
        ("caffe", 224, (54, 26, 12, 5)),  # what 224 gives without the zeros that the 2012 code read outside
        ("torchvision", 224, (55, 27, 13, 6)),
        ("torchvision", 227, (56, 27, 13, 6)),
    ],
)
def test_shapes_at_224_and_227(preset, image_size, sides):
    found = steps(alexnet.graph(preset, image_size=image_size))
    channels = (64, 64, 192, 256) if preset == "torchvision" else (96, 96, 256, 256)
    shapes = tuple((c, side, side) for c, side in zip(channels, sides, strict=True))
    assert tuple(found[name].output for name in ("conv1", "pool1", "pool2", "pool5")) == shapes
    assert found["flatten"].output == (256 * sides[-1] ** 2,)
    assert found["fc6"].layer.in_features == 256 * sides[-1] ** 2


@pytest.mark.parametrize("preset", ["paper2012", "chm145"])
@pytest.mark.parametrize(("image_size", "zeros"), [(224, 3), (225, 2), (226, 1), (227, 0), (228, 3)])
def test_the_paper_reads_zeros_outside_on_the_right_and_at_the_bottom(preset, image_size, zeros):
    graph = alexnet.graph(preset, image_size=image_size)
    first = graph.layers[0]
    if zeros:
        assert first == Pad(name="pad", right=zeros, bottom=zeros)
    else:
        assert first.name == "conv1"
    side = steps(graph)["conv1"].output[1]
    assert side == 1 + -(-(image_size - 11) // 4)


def test_the_number_of_neurons():
    """659,272 are the outputs of the convolutions and products; neither the input nor the pooled maps count."""
    graph = alexnet.graph("paper2012")
    outputs = {name: step.output for name, step in steps(graph).items() if step.parameter_count}
    maps = 55 * 55 * 96 + 27 * 27 * 256 + 13 * 13 * (384 + 384 + 256)
    assert sum(_size(shape) for shape in outputs.values()) == maps + 4096 + 4096 + 1000 == 659_272


def _size(shape):
    size = 1
    for length in shape:
        size *= length
    return size


@pytest.mark.parametrize(
    ("preset", "smallest"), [("paper2012", 64), ("chm145", 64), ("caffe", 67), ("torchvision", 63)]
)
def test_the_smallest_image(preset, smallest):
    graph = alexnet.graph(preset, image_size=smallest)
    assert steps(graph)["pool5"].output == (256, 1, 1)
    with pytest.raises(InputError, match=r"image is too small: pool5 needs at least 3 pixels a side and gets 2"):
        alexnet.graph(preset, image_size=smallest - 1)


@every_preset
@pytest.mark.parametrize("image_size", [0, 1, 6, 10])
def test_images_of_next_to_nothing(preset, image_size):
    with pytest.raises(InputError, match=r"too small: (conv|pool)\d needs"):
        alexnet.graph(preset, image_size=image_size)


def test_torchvision_pools_any_image_to_six_by_six():
    for image_size in (63, 224, 300):
        assert steps(alexnet.graph("torchvision", image_size=image_size))["avgpool"].output == (256, 6, 6)


def test_towers():
    """Groups: convolutions that see one tower, and normalisation that stays inside it."""

    def groups(preset):
        return {layer.name: layer.groups for layer in alexnet.graph(preset).layers if isinstance(layer, Conv | LRN)}

    convolutions = {"conv1": 1, "conv2": 2, "conv3": 1, "conv4": 2, "conv5": 2}
    assert groups("paper2012") == groups("chm145") == convolutions | {"norm1": 2, "norm2": 2}
    assert groups("caffe") == convolutions | {"norm1": 1, "norm2": 1}
    assert groups("torchvision") == dict.fromkeys(convolutions, 1)


def test_normalisation_constants():
    def constants(preset):
        layers = alexnet.graph(preset).layers
        return {(v.size, v.alpha, v.beta, v.k) for v in layers if isinstance(v, LRN)}

    assert constants("paper2012") == {(5, 5e-4, 0.75, 2.0)}  # 1e-4 by the paper's formula, which does not divide by 5
    assert constants("chm145") == {(5, 1e-4, 0.75, 2.0)}  # the code did divide
    assert constants("caffe") == {(5, 1e-4, 0.75, 1.0)}
    assert constants("torchvision") == set()


def test_normalisation_within_maps_is_of_the_released_code_alone():
    found = {
        preset: [layer for layer in alexnet.graph(preset).layers if isinstance(layer, SpatialLRN)] for preset in TABLES
    }
    # The code's scale, 0.001 / 25, is alpha over the area.
    only = SpatialLRN(name="mapnorm2", size=5, alpha=0.001, beta=0.75, k=1.0)
    assert found == {"paper2012": [], "chm145": [only], "caffe": [], "torchvision": []}


def test_order_of_layers():
    def names(preset):
        return " ".join(layer.name for layer in alexnet.graph(preset).layers)

    features = "conv1 relu1 norm1 pool1 conv2 relu2 norm2 pool2 conv3 relu3 conv4 relu4 conv5 relu5 pool5 flatten"
    classifier = "fc6 relu6 drop6 fc7 relu7 drop7 fc8"
    assert names("paper2012") == f"pad {features} {classifier}"
    assert names("chm145") == (
        "pad conv1 norm1 pool1 relu1 conv2 relu2 norm2 mapnorm2 pool2 conv3 relu3 conv4 relu4 conv5 pool5 relu5 "
        f"flatten {classifier}"
    )
    assert names("caffe") == f"{features} {classifier}"
    assert names("torchvision") == (
        "conv1 relu1 pool1 conv2 relu2 pool2 conv3 relu3 conv4 relu4 conv5 relu5 pool5 avgpool flatten "
        "drop6 fc6 relu6 drop7 fc7 relu7 fc8"
    )


def test_dropout_scales():
    assert (Dropout(name="d", p=0.2).train_scale, Dropout(name="d", p=0.2).test_scale) == (1.0, 0.8)
    inverted = Dropout(name="d", p=0.2, inverted=True)
    assert (inverted.train_scale, inverted.test_scale) == (1.25, 1.0)
    kinds = {preset: {step.layer.inverted for step in alexnet.graph(preset).dropouts} for preset in TABLES}
    assert kinds == {"paper2012": {False}, "chm145": {False}, "caffe": {True}, "torchvision": {True}}
    assert [step.layer.name for step in alexnet.graph("paper2012").dropouts] == ["drop6", "drop7"]


def test_recipes():
    def coefficients(preset):
        recipe = alexnet.graph(preset).recipe
        return recipe.momentum, recipe.coefficients("fc6.weight", 0.1), recipe.coefficients("fc6.bias", 0.1)

    assert coefficients("paper2012") == (0.9, (0.1, 5e-4), (0.1, 0.0))
    assert coefficients("chm145") == (0.9, (0.1, 5e-4), (0.2, 0.0))
    assert coefficients("caffe") == (0.9, (0.1, 5e-4), (0.2, 0.0))
    assert coefficients("torchvision") == (0.9, (0.1, 1e-4), (0.1, 1e-4))
    assert Recipe(bias_decay=0.5).coefficients("conv1.bias", 1.0) == (1.0, 2.5e-4)
    # Only the last part of the name says that it is a bias.
    assert Recipe().coefficients("bias.weight", 1.0) == (1.0, 5e-4)


def test_means():
    for preset in ("paper2012", "chm145", "caffe"):
        assert alexnet.graph(preset).normalisation == Normalisation(mean=(127.305, 119.715, 104.913))
    theirs = alexnet.graph("torchvision").normalisation
    assert theirs.mean == pytest.approx((123.675, 116.28, 103.53))
    assert theirs.scale == pytest.approx((58.395, 57.12, 57.375))


# What a batch costs, by hand: x, y and w are the numbers in the input, the output and the parameters.


def test_cost_of_a_convolution():
    conv = Conv(name="conv", in_channels=2, out_channels=3, kernel=3, padding=1)
    step = Step(layer=conv, input=(2, 4, 4), output=(3, 4, 4))
    x, y, w = 5 * 2 * 16, 5 * 3 * 16, 3 * 2 * 9 + 3
    macs = 5 * 3 * 16 * 2 * 9
    assert step.cost(5, training=False) == Cost(macs=macs, bytes=4 * (x + y + w)) == Cost(macs=4320, bytes=1828)
    # Backward: gradient of the weights (reads y's gradient and x, writes w's); gradient of x (reads w, writes x's);
    # update (reads w, its gradient and velocity, writes w and velocity).
    numbers = (x + y + w) + (y + x + w) + (w + x) + 5 * w
    assert step.cost(5, training=True) == Cost(macs=3 * macs, bytes=4 * numbers) == Cost(macs=12960, bytes=5664)
    first = step.cost(5, training=True, first=True)
    assert first == Cost(macs=2 * macs, bytes=4 * (numbers - w - x)) == Cost(macs=8640, bytes=4796)
    # Narrow numbers halve all but the update, whose weights are kept wide.
    assert (
        step.cost(5, training=True, itemsize=2)
        == Cost(macs=12960, bytes=2832 + 2 * 5 * w)
        == Cost(macs=12960, bytes=3402)
    )
    assert first.flops == 17280


def test_groups_divide_the_work():
    whole, halves = (Conv(name="c", in_channels=4, out_channels=6, kernel=3, groups=g) for g in (1, 2))
    assert whole.macs((4, 5, 5)) == 2 * halves.macs((4, 5, 5)) == 6 * 9 * 4 * 9
    assert (whole.fan_in, halves.fan_in) == (36, 18)
    assert halves.parameters() == {"weight": (6, 2, 3, 3), "bias": (6,)}


def test_cost_of_a_product():
    step = Step(layer=Linear(name="fc", in_features=7, out_features=3), input=(7,), output=(3,))
    x, y, w = 2 * 7, 2 * 3, 7 * 3 + 3
    assert step.cost(2, training=False) == Cost(macs=42, bytes=4 * (x + y + w))
    assert step.cost(2, training=True) == Cost(macs=126, bytes=4 * (2 * (x + y + w) + (x + w) + 5 * w))


@pytest.mark.parametrize(
    ("layer", "after"),
    [
        (MaxPool(name="p"), (2, 3, 3)),
        (LRN(name="n", alpha=1.0, k=1.0), (2, 7, 7)),
        (SpatialLRN(name="n", alpha=1.0), (2, 7, 7)),
        (AdaptiveAvgPool(name="a", size=2), (2, 2, 2)),
    ],
)
def test_cost_of_layers_bound_by_memory(layer, after):
    step = Step(layer=layer, input=(2, 7, 7), output=after)
    x, y = 3 * _size((2, 7, 7)), 3 * _size(after)
    assert step.cost(3, training=False) == Cost(macs=0, bytes=4 * (x + y))
    assert step.cost(3, training=True) == Cost(macs=0, bytes=4 * (x + y + y + x + x))


@pytest.mark.parametrize(
    "layer", [ReLU(name="r"), Dropout(name="d"), Flatten(name="f"), Pad(name="p", right=1, bottom=1)]
)
def test_layers_that_fold_into_a_neighbour_cost_nothing(layer):
    step = Step(layer=layer, input=(2, 4, 4), output=layer.output((2, 4, 4)))
    for training in (False, True):
        assert step.cost(3, training=training) == Cost(macs=0, bytes=0)


@every_preset
def test_cost_of_a_training_step(preset):
    """Only the first convolution owes no gradient of its input."""
    graph = alexnet.graph(preset)
    conv1 = TABLES[preset]["conv1"][2]
    assert graph.cost(128, training=True).macs == 128 * (3 * TOTALS[preset][1] - conv1)
    narrow, wide = (graph.cost(128, training=True, itemsize=size).bytes for size in (2, 4))
    assert 2 * narrow - wide == 5 * 4 * graph.parameter_count  # the update stays wide
    by_layer = graph.costs(2, training=True)
    assert list(by_layer) == [layer.name for layer in graph.layers]
    assert sum(by_layer.values(), Cost(macs=0, bytes=0)) == graph.cost(2, training=True)


def test_default_cost_is_one_image_forward():
    graph = chain(Flatten(name="flat"), Linear(name="fc", in_features=192, out_features=2))
    assert graph.cost() == Cost(macs=384, bytes=4 * (192 + 2 + 386))


# Options.


def test_options_are_recorded():
    graph = alexnet.graph("paper2012", classes=10, mean=[1, 2, 3])
    assert graph.options == (
        ("bias", 1.0),
        ("classes", 10),
        ("dropout", 0.5),
        ("image_size", 224),
        ("mean", (1.0, 2.0, 3.0)),
    )
    assert alexnet.graph(graph.preset, **dict(graph.options)) == graph
    assert graph.normalisation.mean == (1.0, 2.0, 3.0)
    assert "mean" not in dict(alexnet.graph("paper2012").options)


def test_mean_keeps_the_scale():
    graph = alexnet.graph("torchvision", mean=(0, 255, 1.5))
    assert graph.normalisation == Normalisation(
        mean=(0.0, 255.0, 1.5), scale=alexnet.graph("torchvision").normalisation.scale
    )


def test_bias_and_dropout_reach_the_layers():
    ones = {"conv2", "conv4", "conv5", "fc6", "fc7"}
    for preset in ("paper2012", "chm145"):
        layers = {layer.name: layer for layer in alexnet.graph(preset, bias=0.25, dropout=0).layers}
        for name in PAPER:
            assert layers[name].bias_init == Constant(value=0.25 if name in ones else 0.0)
        assert (layers["drop6"].p, layers["drop7"].p) == (0, 0)
    layers = {layer.name: layer for layer in alexnet.graph("caffe", bias=1).layers}
    assert {name for name in PAPER if layers[name].bias_init.value == 1} == ones
    layers = {layer.name: layer for layer in alexnet.graph("torchvision", dropout=0.1).layers}
    assert (layers["drop6"].p, layers["drop7"].p) == (0.1, 0.1)


@pytest.mark.parametrize(
    ("preset", "near"), [("paper", "paper2012"), ("torch-vision", "torchvision"), ("Caffe", "caffe")]
)
def test_an_unknown_preset_names_the_nearest(preset, near):
    with pytest.raises(UnknownName, match=rf"unknown preset '{preset}'; did you mean {near}"):
        alexnet.graph(preset)


def test_an_unknown_preset_like_none_lists_all():
    with pytest.raises(UnknownName, match=r"known: caffe, .*paper2012, torchvision"):
        alexnet.graph("resnet")


@pytest.mark.parametrize(
    ("preset", "options", "near"),
    [
        ("paper2012", {"clases": 10}, "did you mean classes"),
        ("caffe", {"means": 1}, "did you mean mean"),
        ("torchvision", {"bias": 1.0}, "unknown option of preset torchvision 'bias'"),
        ("paper2012", {"groups": 1}, "known: bias, classes, dropout, image_size, mean"),
    ],
)
def test_an_unknown_option(preset, options, near):
    with pytest.raises(UnknownName, match=near):
        alexnet.graph(preset, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"classes": 10.0},
        {"classes": "10"},
        {"classes": True},
        {"classes": 0},
        {"classes": -1},
        {"classes": None},
        {"image_size": 224.0},
        {"image_size": -224},
        {"dropout": 1},
        {"dropout": 1.5},
        {"dropout": -0.1},
        {"dropout": float("nan")},
        {"dropout": "0.5"},
        {"bias": True},
        {"bias": -1.0},
        {"bias": float("nan")},
        {"bias": float("inf")},
        {"mean": 127},
        {"mean": ("red", 2, 3)},
        {"mean": (1, 2)},
        {"mean": (1, 2, 3, 4)},
        {"mean": (1, 2, 256)},
        {"mean": (-1, 2, 3)},
        {"mean": (float("nan"), 2, 3)},
    ],
    ids=str,
)
def test_an_option_that_does_not_fit(options):
    (name,) = options
    with pytest.raises(InputError, match=name):
        alexnet.graph("paper2012", **options)


# Graphs.


def test_layers_and_graphs_are_frozen_and_named():
    layers = [
        Pad(name="a", right=1, bottom=1),
        Conv(name="a", in_channels=1, out_channels=1, kernel=1),
        Linear(name="a", in_features=1, out_features=1),
        ReLU(name="a"),
        LRN(name="a", alpha=1.0, k=1.0),
        SpatialLRN(name="a", alpha=1.0),
        MaxPool(name="a"),
        AdaptiveAvgPool(name="a", size=1),
        Flatten(name="a"),
        Dropout(name="a"),
    ]
    others = [
        Normal(std=1.0),
        Uniform(bound=1.0),
        Constant(value=1.0),
        Recipe(),
        Normalisation(mean=(0.0, 0.0, 0.0)),
        Cost(macs=1, bytes=1),
        Step(layer=layers[3], input=(1,), output=(1,)),
        alexnet.graph("paper2012"),
    ]
    for value in [*layers, *others]:
        with pytest.raises(FrozenInstanceError):
            setattr(value, fields(value)[0].name, None)
        with pytest.raises(TypeError):
            type(value)(*[None] * len(fields(value)))
        assert hash(value) == hash(replace(value))


def test_names_are_unique():
    with pytest.raises(InputError, match=r"unique.*'a', 'b', 'a'"):
        chain(ReLU(name="a"), ReLU(name="b"), MaxPool(name="a"))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([Conv(name="c", in_channels=4, out_channels=1, kernel=1)], "c expects 4 channels, got 3"),
        ([Conv(name="c", in_channels=3, out_channels=1, kernel=9)], "c needs at least 9 pixels a side and gets 8"),
        ([Conv(name="c", in_channels=3, out_channels=1, kernel=13, padding=2)], "at least 9 pixels a side and gets 8"),
        ([MaxPool(name="p", kernel=9)], "p needs at least 9 pixels a side and gets 8"),
        ([Linear(name="fc", in_features=192, out_features=1)], r"fc expects 192 features, got shape \(3, 8, 8\)"),
        ([Flatten(name="f"), Linear(name="fc", in_features=3, out_features=1)], r"fc expects 3 features.*192"),
        ([Flatten(name="f"), MaxPool(name="p")], r"p needs an input of \(channels, height, width\), got \(192,\)"),
        ([LRN(name="n", alpha=1.0, k=1.0, groups=2)], "n cannot split 3 channels into 2 equal groups"),
        ([SpatialLRN(name="n", alpha=1.0, size=4)], "n needs an odd neighbourhood, got 4"),
        ([Flatten(name="f"), SpatialLRN(name="n", alpha=1.0)], r"n needs an input of \(channels, height, width\)"),
        ([Dropout(name="d", p=1.0)], "d: the dropout probability"),
    ],
)
def test_layers_that_do_not_fit(layers, message):
    with pytest.raises(InputError, match=message):
        chain(*layers)


def test_height_and_width_are_kept_apart():
    graph = chain(
        Pad(name="pad", right=2, bottom=0),
        Conv(name="conv", in_channels=3, out_channels=2, kernel=3, stride=2),
        MaxPool(name="pool", kernel=2, stride=1),
        shape=(3, 5, 9),
    )
    assert [step.output for step in graph.steps] == [(3, 5, 11), (2, 2, 5), (2, 1, 4)]
    assert [step.input for step in graph.steps] == [(3, 5, 9), (3, 5, 11), (2, 2, 5)]


def test_windows_of_adaptive_pooling():
    pool = AdaptiveAvgPool(name="a", size=3)
    assert pool.windows(3) == [(0, 1), (1, 2), (2, 3)]
    assert pool.windows(4) == [(0, 2), (1, 3), (2, 4)]
    assert pool.windows(7) == [(0, 3), (2, 5), (4, 7)]
    assert pool.windows(2) == [(0, 1), (0, 2), (1, 2)]


def test_parameters_by_name_in_order():
    graph = chain(
        Conv(name="one", in_channels=3, out_channels=2, kernel=3),
        Flatten(name="flat"),
        Linear(name="two", in_features=72, out_features=4),
    )
    assert list(graph.parameters.items()) == [
        ("one.weight", (2, 3, 3, 3)),
        ("one.bias", (2,)),
        ("two.weight", (4, 72)),
        ("two.bias", (4,)),
    ]


def test_summary():
    graph = chain(
        Conv(name="conv", in_channels=3, out_channels=16, kernel=3),
        ReLU(name="relu"),
        Flatten(name="flat"),
        Linear(name="fc", in_features=576, out_features=10),
    )
    assert graph.summary() == "\n".join(
        [
            "layer           output  parameters    MACs",
            "------------------------------------------",
            "input           3x8x8",
            "conv (Conv)     16x6x6         448  15,552",
            "relu (ReLU)     16x6x6",
            "flat (Flatten)  576",
            "fc (Linear)     10           5,770   5,760",
            "------------------------------------------",
            "total (test)                 6,218  21,312",
        ]
    )


@every_preset
def test_summary_of_a_preset(preset):
    lines = alexnet.graph(preset).summary().splitlines()
    parameters, macs = TOTALS[preset]
    assert lines[-1].split() == ["total", f"({preset})", f"{parameters:,}", f"{macs:,}"]
    for name, (output, count, work) in TABLES[preset].items():
        assert [name, "x".join(map(str, output)), f"{count:,}", f"{work:,}"] in [
            [words[0], *words[2:]] for words in map(str.split, lines) if len(words) == 5
        ]
