"""What would leaving CUDA cost? One network, measured identically on every vendor's hardware."""

from portnet.alexnet import graph
from portnet.plugins import backends

__all__ = ["__version__", "backends", "graph"]

__version__ = "0.1.0"
