"""Groups set apart by zeros: the logits may not change, and no LRN that can be joined is left in groups."""

from dataclasses import replace

import numpy as np
import pytest

from portnet import alexnet, plugins, weights
from portnet.contract import Settings
from portnet.graph import LRN, Conv, Dropout, Flatten, Graph, Linear, MaxPool, ReLU
from portnet_backends.onnx_groups import apart

CONV1 = Conv(name="conv1", in_channels=4, out_channels=12, kernel=3, groups=2)
NORM1 = LRN(name="norm1", alpha=2.0, k=1.0, groups=2)
POOL1 = MaxPool(name="pool1", kernel=2, stride=2)
CONV2 = Conv(name="conv2", in_channels=12, out_channels=8, kernel=2, groups=2)
HEAD = (Flatten(name="flatten"), Linear(name="fc", in_features=8 * 4, out_features=5))


def graph(*layers):
    return Graph(preset="groups", input=(4, 8, 8), layers=(*layers, *HEAD))


def logits(graph, values):
    images = np.random.default_rng(0).standard_normal((3, *graph.input)).astype(np.float32)
    return plugins.backends()["reference"].open(graph, values, Settings(precision="float64")).trace(images).logits


@pytest.mark.parametrize(
    "before",
    [
        graph(CONV1, ReLU(name="relu1"), NORM1, POOL1, CONV2),
        graph(CONV1, NORM1, replace(NORM1, name="again", size=7), POOL1, replace(CONV2, groups=1)),
        graph(replace(CONV1, groups=1), replace(NORM1, groups=3, size=9), POOL1, replace(CONV2, groups=1)),
        # The first of two is set apart, and the second behind it.
        graph(
            replace(CONV1, padding=1),
            NORM1,
            replace(CONV2, name="conv0", out_channels=12),
            replace(NORM1, name="norm2"),
            MaxPool(name="pool0", kernel=3, stride=2),
            CONV2,
        ),
        alexnet.graph("paper2012", image_size=67, classes=10),
    ],
    ids=["grouped", "dense", "three", "twice", "paper2012"],
)
def test_logits_stay_and_groups_go(before):
    values = weights.parity(before, 0)
    after, wider = apart(before, values)
    assert {x.groups for x in before.layers if isinstance(x, LRN)} != {1}
    assert {x.groups for x in after.layers if isinstance(x, LRN)} == {1}
    assert [x.name for x in after.layers] == [x.name for x in before.layers]
    np.testing.assert_allclose(logits(after, wider), logits(before, values), rtol=1e-11, atol=1e-11)


def test_alexnets_channels_stay_multiples_of_16():
    after, _ = apart(*(lambda g: (g, weights.parity(g, 0)))(alexnet.graph("paper2012")))
    assert [x.out_channels for x in after.layers if isinstance(x, Conv)] == [112, 272, 384, 384, 256]


@pytest.mark.parametrize(
    "kept",
    [
        graph(CONV1, replace(NORM1, groups=1), POOL1, CONV2),
        graph(CONV1, NORM1, replace(NORM1, name="norm2", groups=1), POOL1, CONV2),
        graph(CONV1, NORM1, POOL1, replace(CONV2, groups=4)),
        graph(replace(CONV1, groups=4), NORM1, POOL1, CONV2),
        graph(CONV1, NORM1, Dropout(name="drop", p=0.5), POOL1, CONV2),
        Graph(
            preset="groups",
            input=(4, 8, 8),
            layers=(CONV1, NORM1, POOL1, HEAD[0], replace(HEAD[1], in_features=12 * 9)),
        ),
    ],
    ids=["one group", "two kinds", "four after", "four before", "something between", "no convolution after"],
)
def test_what_cannot_be_set_apart_is_left(kept):
    values = weights.parity(kept, 0)
    after, same = apart(kept, values)
    assert after == kept
    assert same.keys() == values.keys()
    assert all(same[name] is values[name] for name in values)
