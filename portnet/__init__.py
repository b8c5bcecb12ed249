"""What would leaving CUDA cost? One network, measured identically on every vendor's hardware.

::

    import portnet

    net = portnet.AlexNet(backend="cuda")
    logits = net(images)
"""

from typing import TYPE_CHECKING, Any

from portnet.alexnet import graph
from portnet.plugins import backends

if TYPE_CHECKING:
    from portnet.errors import OnnxFileError, PortNetError
    from portnet.images import preprocess
    from portnet.model import AlexNet, open_onnx
    from portnet.module_export import export_onnx
    from portnet.own_model import Model
    from portnet.plan import measure
    from portnet.quantization import quantize
    from portnet.shards import load as load_data

__all__ = [
    "AlexNet",
    "Model",
    "OnnxFileError",
    "PortNetError",
    "__version__",
    "backends",
    "export_onnx",
    "graph",
    "load_data",
    "measure",
    "open_onnx",
    "preprocess",
    "quantize",
]

__version__ = "0.1.0"

# Loaded when first used: listing backends needs none of them.
_LAZY = {
    "AlexNet": ("portnet.model", "AlexNet"),
    "Model": ("portnet.own_model", "Model"),
    "OnnxFileError": ("portnet.errors", "OnnxFileError"),
    "PortNetError": ("portnet.errors", "PortNetError"),
    "export_onnx": ("portnet.module_export", "export_onnx"),
    "load_data": ("portnet.shards", "load"),
    "measure": ("portnet.plan", "measure"),
    "open_onnx": ("portnet.model", "open_onnx"),
    "preprocess": ("portnet.images", "preprocess"),
    "quantize": ("portnet.quantization", "quantize"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'portnet' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _LAZY[name]
    value = globals()[name] = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
