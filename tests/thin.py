"""AlexNet with few outputs in its hidden linear layers, for tests in which NumPy is the device.

Those of 4096 outputs are most of a step there at 67 pixels, and what the harness does to a network does not hang on
them. As a plug-in of a measured process (test_launch.py) this module puts it in force.
"""

from dataclasses import replace

from portnet import workload
from portnet.graph import Graph, Linear
from portnet.hookspecs import hookimpl

HIDDEN = 64

_whole = workload.AlexNet.graph_of


def thin(graph: Graph) -> Graph:
    layers, features = [], None
    for layer in graph.layers:
        if isinstance(layer, Linear):
            out = layer.out_features if layer is graph.layers[-1] else HIDDEN
            layer = replace(layer, in_features=features or layer.in_features, out_features=out)
            features = out
        layers.append(layer)
    return replace(graph, layers=tuple(layers))


def graph_of(self: workload.AlexNet, size: int) -> Graph:
    """In place of `portnet.workload.AlexNet`'s."""
    return thin(_whole(self, size))


@hookimpl
def portnet_backends():
    """No backend: a process that looks for them measures the thin network from then on."""
    workload.AlexNet.graph_of = graph_of
    return []
