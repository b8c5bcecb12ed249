"""Groups of channels with zeros between them, so that one LRN may look across all of them."""

from dataclasses import replace
from itertools import takewhile

import numpy as np

from portnet.contract import Array, Weights
from portnet.graph import LRN, Conv, Graph, MaxPool, ReLU

MULTIPLE = 16
"""Channels that runtimes' layouts keep together (oneDNN's nChw16c): others are padded to it in every layer."""


def apart(graph: Graph, weights: Weights) -> tuple[Graph, Weights]:
    """A graph and its weights of the same logits, in which LRN has one group wherever that can be had.

    ONNX knows no groups in LRN; lowered by reshaping, a layer of them is copied before and after it. The convolution
    before it can as well give channels of zeros behind each group, as many as a window reaches, and the next one ignore
    them: ReLU, pooling and LRN leave zeros as they are. The layers' values then have more channels.
    """
    layers, found = list(graph.layers), dict(weights)
    for i, conv in enumerate(layers):
        between = list(takewhile(lambda x: isinstance(x, ReLU | MaxPool | LRN), layers[i + 1 :]))
        after = next(iter(layers[i + 1 + len(between) :]), None)
        norms = [x for x in between if isinstance(x, LRN)]
        groups = {x.groups for x in norms}
        if not (isinstance(conv, Conv) and isinstance(after, Conv) and len(groups) == 1 and groups != {1}):
            continue
        (count,) = groups
        if not {conv.groups, after.groups} <= {1, count}:
            continue
        width, reach = conv.out_channels // count, max(x.size // 2 for x in norms)
        zeros = next(z for z in range(reach, reach + MULTIPLE) if count * (width + z) % MULTIPLE == 0)
        wider = count * (width + zeros)
        layers[i] = replace(conv, out_channels=wider)
        for name in (f"{conv.name}.weight", f"{conv.name}.bias"):
            found[name] = _with_zeros(found[name], 0, count, zeros)
        for k, layer in enumerate(between, i + 1):
            layers[k] = replace(layer, groups=1) if isinstance(layer, LRN) else layer
        layers[i + 1 + len(between)] = replace(after, in_channels=wider)
        # A filter of a convolution that has the groups too sees one of them alone.
        name = f"{after.name}.weight"
        found[name] = _with_zeros(found[name], 1, count // after.groups, zeros)
    return replace(graph, layers=tuple(layers)), found


def _with_zeros(array: Array, axis: int, groups: int, zeros: int) -> Array:
    """`array` with so many zeros behind each of `groups` equal runs of an axis."""
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    runs = array.reshape(*before, groups, -1, *after)
    return np.pad(runs, [(0, zeros if i == axis + 1 else 0) for i in range(runs.ndim)]).reshape(*before, -1, *after)
