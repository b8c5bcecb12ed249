"""A backend for PortNet: the exported network on ONNX's reference evaluator, in plain NumPy, for inference.

`onnx` is imported inside functions only: listing backends must not load a vendor's software.
"""

from platform import machine

import numpy as np

from portnet.contract import Backend, Device, Session, Unavailable
from portnet.hookspecs import hookimpl
from portnet.onnx_export import lower


class OnnxReference(Backend):
    name = "onnx-reference"
    vendor = "ONNX"

    def probe(self):
        try:
            import onnx
        except ImportError as error:
            raise Unavailable(f"onnx cannot be imported ({error})", "pip install onnx") from error
        return Device(name=f"NumPy on {machine()}", precisions=("float32",), versions={"onnx": onnx.__version__})

    def open(self, graph, weights, settings):
        self.check(settings)
        return OnnxReferenceSession(graph, weights)


class OnnxReferenceSession(Session):
    def __init__(self, graph, weights):
        from onnx.reference import ReferenceEvaluator

        self._weights = {name: np.array(weights[name]) for name in graph.parameters}
        self._evaluator = ReferenceEvaluator(lower(graph, self._weights), new_ops=[_lrn()])

    def put(self, array):
        return array.copy()

    def get(self, value):
        return value.copy()

    def infer(self, images):
        return self._evaluator.run(None, {"images": images})[0]

    def weights(self):
        return {name: value.copy() for name, value in self._weights.items()}

    def synchronize(self):
        """Nothing is ever outstanding: everything above returns when its work is done."""


def _lrn():
    """LRN for the evaluator, whose own (onnx 1.23) fills as many channels as the batch has images, and no more."""
    from onnx.reference.op_run import OpRun

    class LRN(OpRun):
        op_domain = ""

        def _run(self, x, alpha, beta, bias, size):
            squares = np.pad(x * x, ((0, 0), ((size - 1) // 2, size // 2), (0, 0), (0, 0)))
            sums = np.lib.stride_tricks.sliding_window_view(squares, size, axis=1).sum(-1)
            return ((x / (bias + alpha / size * sums) ** beta).astype(x.dtype),)

    return LRN


@hookimpl
def portnet_backends():
    return [OnnxReference()]
