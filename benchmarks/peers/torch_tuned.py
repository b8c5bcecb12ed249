"""What PortNet's torch session does, written directly against torch for one device and without PortNet.

bfloat16 copies of float32 weights, LRN as a 1x1 convolution with a banded matrix, dropout by Philox's bits, the update
of 2012 in four passes. Its time beside PortNet's is what the portable contract costs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch_plain import load
from turns import Asked, Opened, serve

RATE = 1e-12


@contextmanager
def ieee() -> Iterator[None]:
    before = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.mkldnn.conv.fp32_precision = before


class Lrn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, band: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        with ieee():
            root = F.conv2d(wide * wide, band, groups=2).add_(2.0).rsqrt_()
        ctx.save_for_backward(x, root, band)
        return root.sqrt().mul_(root).mul_(wide).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, root, band = ctx.saved_tensors
        wide = x.float()
        outer = root.sqrt().mul_(root).mul_(g)
        with ieee():
            # The band is symmetric: it is its own transpose.
            across = F.conv2d((outer * wide).mul_(root).mul_(root), band, groups=2)
        return outer.addcmul_(wide, across, value=-1.5).to(x.dtype), None


class Norm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        i = torch.arange(channels // 2)
        band = ((i[None, :] - i[:, None]).abs() <= 2).float() * 1e-4
        self.register_buffer("band", band.repeat(2, 1)[:, :, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Lrn.apply(x, self.band)


class Dropped(nn.Module):
    mask: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask * 2 if self.training else x


def mulhilo(a: torch.Tensor, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    low = a * (m & 0xFFFF)
    high = a * (m >> 16) + (low >> 16)
    return high >> 16, (high << 16 | low & 0xFFFF) & 0xFFFFFFFF


def philox(ids: torch.Tensor, step: int, stream: int, count: int) -> torch.Tensor:
    """A mask of fair bits, (len(ids), count): Philox4x32-10, 128 bits to a block."""
    block = torch.arange(-(-count // 128))[None, :].expand(len(ids), -1)
    c = [block, ids[:, None].expand_as(block), torch.full_like(block, step), torch.full_like(block, stream)]
    key = [0, 0]
    for _ in range(10):
        (h0, l0), (h1, l1) = mulhilo(c[0], 0xD2511F53), mulhilo(c[2], 0xCD9E8D57)
        c = [h1 ^ c[1] ^ key[0], l1, h0 ^ c[3] ^ key[1], l0]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    words = torch.stack(c, dim=-1).flatten(1)
    return (words[:, :, None] >> torch.arange(32) & 1).flatten(1)[:, :count].bool()


def open_(asked: Asked) -> Opened:
    dtype = torch.bfloat16 if asked.precision == "bfloat16" else torch.float32
    if asked.options["device"] != "cpu":
        raise SystemExit("torch_tuned is written for the CPU alone")
    parts, dropped, channels = [], [], 3
    for layer in load(asked):
        channels = getattr(layer, "out_channels", channels)
        if type(layer).__name__ == "Norm":
            layer = Norm(channels)
        elif isinstance(layer, nn.Dropout):
            dropped.append(layer := Dropped())
        parts.append(layer)
    model = nn.Sequential(*parts)
    weights = dict(model.named_parameters())
    velocity = {name: torch.zeros_like(w) for name, w in weights.items()}
    images, labels = torch.from_numpy(asked.images), torch.from_numpy(asked.labels)
    ids = torch.arange(len(images))
    widths = {"paper2012": (4096, 4096), "torchvision": (9216, 4096)}[asked.preset]
    done = 0

    def forward() -> torch.Tensor:
        operands = {name: w.to(dtype) for name, w in weights.items()}
        return torch.func.functional_call(model, operands, (images.to(dtype),)).float()

    def train(count: int) -> None:
        nonlocal done
        model.train()
        for _ in range(count):
            for i, layer in enumerate(dropped):
                layer.mask = philox(ids, done, i, widths[i])
            gradients = torch.autograd.grad(F.cross_entropy(forward(), labels), list(weights.values()))
            with torch.no_grad():
                for (name, w), g in zip(weights.items(), gradients, strict=True):
                    decay = 5e-4 if name.endswith("weight") else 0.0
                    v = velocity[name].mul_(0.9).add_(w, alpha=-decay * RATE).add_(g, alpha=-RATE)
                    w.add_(v)
            done += 1

    model.eval()
    with torch.no_grad():
        logits = forward().numpy()
    return Opened(logits=logits, steps=train)


if __name__ == "__main__":
    serve(open_)
