"""A product of two square matrices by torch: what the device does at its best, in the same minutes as the others.

A processor's is by oneMKL or oneDNN, whichever is faster here.
"""

import timeit

import torch
from turns import Asked, Opened, serve


def open_(asked: Asked) -> Opened:
    size, device = asked.options["size"], torch.device(asked.options["device"])
    dtype = torch.bfloat16 if asked.precision == "bfloat16" else torch.float32
    a, b = (torch.rand(size, size).sub_(0.5).to(device, dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, b, out=out)

    def onednn() -> None:
        torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    fastest = product
    if device.type == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        # By turns, so that a slow moment meets both.
        taken = [[timeit.timeit(work, number=1) for work in (product, onednn)] for _ in range(6)]
        best = [min(times) for times in zip(*taken, strict=True)]
        fastest = onednn if best[1] < best[0] else product

    def steps(count: int) -> None:
        for _ in range(count):
            fastest()
        if device.type != "cpu":
            torch.accelerator.synchronize()

    return Opened(logits=None, steps=steps)


if __name__ == "__main__":
    serve(open_)
