"""An exported file, run by ONNX Runtime or by OpenVINO as their users run one."""

import numpy as np
from turns import Asked, Opened, serve


def open_(asked: Asked) -> Opened:
    path = asked.options["file"]
    if asked.options["runtime"] == "openvino":
        import openvino

        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}}
        hints["INFERENCE_PRECISION_HINT"] = hints["INFERENCE_PRECISION_HINT"][asked.precision]
        request = openvino.Core().compile_model(path, "CPU", hints).create_infer_request()

        def run() -> np.ndarray:
            return next(iter(request.infer([asked.images], share_inputs=True).values()))
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (name,) = (i.name for i in session.get_inputs())

        def run() -> np.ndarray:
            return session.run(None, {name: asked.images})[0]

    def infer(count: int) -> None:
        for _ in range(count):
            run()

    return Opened(logits=run(), steps=infer)


if __name__ == "__main__":
    serve(open_)
