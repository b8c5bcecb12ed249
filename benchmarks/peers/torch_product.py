"""A product of two square matrices by torch: what the device does at its best, in the same minutes as the others."""

import torch
from turns import Asked, Opened, serve


def open_(asked: Asked) -> Opened:
    size, device = asked.options["size"], torch.device(asked.options["device"])
    dtype = torch.bfloat16 if asked.precision == "bfloat16" else torch.float32
    a, b = (torch.rand(size, size).sub_(0.5).to(device, dtype) for _ in range(2))
    out = torch.empty_like(a)

    def steps(count: int) -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)
        if device.type != "cpu":
            torch.accelerator.synchronize()

    return Opened(logits=None, steps=steps)


if __name__ == "__main__":
    serve(open_)
