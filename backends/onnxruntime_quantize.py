"""Static quantisation by ONNX Runtime's own tools."""

import logging
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from portnet.contract import Array

if TYPE_CHECKING:
    import onnx

OPERATORS = ["Conv", "Gemm", "MatMul", "Relu", "MaxPool", "Flatten"]
"""The others stay in float32: LRN has no form in integers, and what prepares pictures is to be exact."""


class _Batches:
    """As ONNX Runtime's CalibrationDataReader."""

    def __init__(self, name: str, batches: Iterable[Array]) -> None:
        self.name, self.batches = name, iter(batches)

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self.batches, None)
        return None if batch is None else {self.name: batch}


def quantise(content: bytes, batches: Iterable[Array], *, reduce_range: bool) -> "onnx.ModelProto":
    """Filters by output channel to int8, activations by tensor to uint8, over the range that the batches reach.

    As QuantizeLinear and DequantizeLinear around operators (QDQ), which every provider reads.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    model = onnx.load_from_string(content)
    root = logging.getLogger()
    level = root.level
    # Its advice to optimise the model first, which would rename what is in it.
    root.setLevel(logging.ERROR)
    try:
        with TemporaryDirectory() as folder:
            path = Path(folder, "quantised.onnx")
            quantize_static(
                model,
                path,
                _Batches(model.graph.input[0].name, batches),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=OPERATORS,
                per_channel=True,
                reduce_range=reduce_range,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            return onnx.load(path)
    finally:
        root.setLevel(level)
