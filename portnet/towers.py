"""A network cut into two towers, as in 2012: each device owns half of every layer, and they meet at four places.

Device r owns the r-th half of the output channels of every convolution and of the rows of every linear layer; device 0
also owns the last layer and the loss. The halves are disjoint, so that no gradient is summed over devices. What crosses
is activations: before a layer that sees both towers their halves are gathered, and going back, the adjoint of that:
each device sends the other the gradient of what it had got. (Krizhevsky, Sutskever, Hinton, NIPS 2012, figure 2.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from portnet.contract import Array
from portnet.errors import InputError
from portnet.graph import LRN, Conv, Graph, Layer, Linear, Shape

DEVICES = 2


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A place where the towers meet: before the layer of that name.

    `half` is the shape of what one device holds of one image; `one_way` says that only device 0 gets the other's.
    """

    before: str
    half: Shape
    one_way: bool

    def bytes(self, batch: int, itemsize: int = 4) -> int:
        """Of a whole training step, forward and backward, in all directions together."""
        return prod(self.half) * batch * itemsize * (2 if self.one_way else 4)


@dataclass(frozen=True, kw_only=True)
class Towers:
    """The cut: the places where the towers meet, and whose the rows of every parameter are."""

    graph: Graph
    exchanges: tuple[Exchange, ...]
    last: str
    """The layer that device 0 owns alone."""

    def layers(self, device: int) -> tuple[Layer, ...]:
        """The layers as a device has them, in order."""
        *shared, last = self.graph.layers
        return (*map(_half, shared), *([last] if device == 0 else []))

    def rows(self, parameter: str, device: int) -> slice | None:
        """Which rows of a parameter a device owns, if any."""
        if parameter.rpartition(".")[0] == self.last:
            return slice(None) if device == 0 else None
        half = self.graph.parameters[parameter][0] // DEVICES
        return slice(device * half, (device + 1) * half)

    def take(self, arrays: Mapping[str, Array], device: int) -> dict[str, Array]:
        """What a device owns of the whole network's `arrays`, which are named as its parameters."""
        rows = {name: self.rows(name, device) for name in arrays}
        return {name: arrays[name][owned] for name, owned in rows.items() if owned is not None}

    def join(self, halves: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        """The whole network's arrays from those of both devices; the inverse of `take`."""
        first, second = halves
        return {
            name: np.concatenate([value, second[name]]) if name in second else np.asarray(value)
            for name, value in first.items()
        }

    def parameter_count(self, device: int) -> int:
        """Weights and biases that a device owns."""
        return sum(prod(shape) for layer in self.layers(device) for shape in layer.parameters().values())

    def bytes(self, batch: int, itemsize: int = 4) -> int:
        """What crosses between the devices in one training step of `batch` images, in all directions together."""
        return sum(exchange.bytes(batch, itemsize) for exchange in self.exchanges)


def split(graph: Graph) -> Towers:
    """The two towers of a network. Raises `InputError` for one that has none, with the reason."""
    convolutions = [layer for layer in graph.layers if isinstance(layer, Conv)]
    if not any(layer.groups == DEVICES for layer in convolutions):
        raise InputError(f"preset {graph.preset} has no towers: none of its convolutions has two groups; {_WITH}")
    last = graph.layers[-1]
    if not isinstance(last, Linear):
        raise InputError(f"preset {graph.preset} has no towers: its last layer is not linear; {_WITH}")
    exchanges, whole = [], True  # so far, both devices hold all of the image
    for step in graph.steps:
        layer = step.layer
        if isinstance(layer, LRN) and not whole and layer.groups != DEVICES:
            raise InputError(
                f"preset {graph.preset} has no towers: {layer.name} normalises over the channels of both; {_WITH}"
            )
        if not layer.parameters():
            continue
        rows = next(iter(layer.parameters().values()))[0]
        if rows % DEVICES and layer is not last:
            raise InputError(f"preset {graph.preset} has no towers: {layer.name} has an odd number of outputs; {_WITH}")
        if isinstance(layer, Conv) and layer.groups not in (1, DEVICES):
            raise InputError(f"preset {graph.preset} has no towers: {layer.name} has {layer.groups} groups; {_WITH}")
        sees_both = not isinstance(layer, Conv) or layer.groups == 1
        if sees_both and not whole:
            half = (step.input[0] // DEVICES, *step.input[1:])
            exchanges.append(Exchange(before=layer.name, half=half, one_way=layer is last))
        whole = False
    return Towers(graph=graph, exchanges=tuple(exchanges), last=last.name)


_WITH = "those of 2012 have, paper2012 and chm145"


def _half(layer: Layer) -> Layer:
    """Half of a layer's outputs: of a grouped convolution from this tower's inputs, of others from all."""
    match layer:
        case Conv():
            inputs = layer.in_channels // layer.groups
            return replace(layer, in_channels=inputs, out_channels=layer.out_channels // DEVICES, groups=1)
        case Linear():
            return replace(layer, out_features=layer.out_features // DEVICES)
        case LRN():
            return replace(layer, groups=layer.groups // DEVICES)
    return layer
