"""What PortNet's torch session does, written directly against torch for one device and without PortNet.

Channels-last; bfloat16 copies of float32 weights; LRN as a 1x1 convolution with a banded matrix, some images at a time;
the first convolution on blocks of pixels; dropout by Philox's bits; the update of 2012 by torch's fused SGD. With
`regions`, LRN with the ReLU before it and in bfloat16 the update are loops of torch's compiler, so are the blocks of
pixels, which in bfloat16 move four at a time; a ReLU comes behind the maxima of a pool; and in bfloat16 on AMX
the last three convolutions take two images of an even batch in a row, 13 + 1 + 13 wide. Its time beside that of
PortNet's channels-last stack of the same engine is what the portable contract costs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch_plain import load
from turns import Asked, Opened, serve

RATE = 1e-12
DROPOUT = 256
"""PortNet's Philox stream of the first dropout layer."""


@contextmanager
def ieee() -> Iterator[None]:
    before = torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.mkldnn.conv.fp32_precision = before


def some(x: torch.Tensor) -> list[slice]:
    size = max(1, 2**20 // x[0].numel())
    return [slice(i, i + size) for i in range(0, len(x), size)]


class Lrn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, band: torch.Tensor) -> torch.Tensor:
        y, root = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32)
        with ieee():
            for part in some(x):
                wide = x[part].float()
                torch.rsqrt(F.conv2d(wide * wide, band, groups=2).add_(2.0), out=root[part])
                y[part] = root[part].sqrt().mul_(root[part]).mul_(wide)
        ctx.save_for_backward(x, root, band)
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, root, band = ctx.saved_tensors
        dx = torch.empty_like(x)
        with ieee():
            for part in some(x):
                wide, below = x[part].float(), root[part]
                outer = below.sqrt().mul_(below).mul_(g[part])
                # The band is symmetric: it is its own transpose.
                across = F.conv2d((outer * wide).mul_(below).mul_(below), band, groups=2)
                dx[part] = outer.addcmul_(wide, across, value=-1.5)
        return dx, None


class Norm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        i = torch.arange(channels // 2)
        band = ((i[None, :] - i[:, None]).abs() <= 2).float() * 1e-4
        self.register_buffer("band", band.repeat(2, 1)[:, :, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Lrn.apply(x, self.band)


def places(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def near(x: torch.Tensor) -> list[torch.Tensor]:
    """(places, channels) one, two and no channels away, as memory has them."""
    return [x.as_strided(x.shape, x.stride(), x.storage_offset() + s) for s in (-2, -1, 0, 1, 2)]


def ends(x: torch.Tensor) -> torch.Tensor:
    """The first and the last place, between zeros."""
    zeros = x.new_zeros(2, x.shape[1] + 4)
    zeros[:, 2:-2] = x[:: len(x) - 1]
    return zeros[:, 2:-2]


def inside(channels: int) -> torch.Tensor:
    at = torch.arange(channels) % (channels // 2)
    return torch.stack([((at + s >= 0) & (at + s < channels // 2)).float() for s in (-2, -1, 0, 1, 2)])


@partial(torch.compile, dynamic=False)
def normed(y: torch.Tensor, root: torch.Tensor, x: list[torch.Tensor], mask: torch.Tensor) -> None:
    wide = [each.float().relu() for each in x]
    below = torch.rsqrt(sum((m * w) ** 2 for m, w in zip(mask, wide, strict=True)) * 1e-4 + 2.0).sqrt()
    root.copy_(below)
    y.copy_(below**3 * wide[2])


@partial(torch.compile, dynamic=False)
def gradient(
    dx: torch.Tensor, x: list[torch.Tensor], g: list[torch.Tensor], root: list[torch.Tensor], mask: torch.Tensor
) -> None:
    outer = [a.float() * r**3 for a, r in zip(g, root, strict=True)]
    total = sum(m * a * r**4 * w.float().relu() for m, a, r, w in zip(mask, outer, root, x, strict=True))
    dx.copy_(torch.where(x[2] > 0, outer[2] - 1.5e-4 * x[2].float() * total, 0))


class LrnLoops(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y, root, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32), inside(x.shape[1])
        xs, ys, roots = places(x), places(y), places(root)
        normed(ys[1:-1], roots[1:-1], near(xs[1:-1]), mask)
        normed(ys[:: len(ys) - 1], roots[:: len(ys) - 1], near(ends(xs)), mask)
        ctx.save_for_backward(x, root)
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        x, root = ctx.saved_tensors
        dx, mask = torch.empty_like(x), inside(x.shape[1])
        xs, gs, roots, dxs = places(x), places(g), places(root), places(dx)
        gradient(dxs[1:-1], near(xs[1:-1]), near(gs[1:-1]), near(roots[1:-1]), mask)
        gradient(dxs[:: len(xs) - 1], near(ends(xs)), near(ends(gs)), near(ends(roots)), mask)
        return dx


class NormLoops(nn.Module):
    """LRN of what a ReLU gives of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return LrnLoops.apply(x)


@partial(torch.compile, dynamic=False)
def update(
    w: list[torch.Tensor],
    v: list[torch.Tensor],
    g: list[torch.Tensor],
    casts: list[torch.Tensor],
    decays: list[float],
) -> None:
    for weight, velocity, narrow, cast, decay in zip(w, v, g, casts, decays, strict=True):
        velocity.mul_(0.9).sub_(RATE * (narrow.float() + decay * weight))
        weight.add_(velocity)
        cast.copy_(weight)


def blocks(x: torch.Tensor, before: int, dtype: torch.dtype) -> torch.Tensor:
    """228 x 228 pixels as 57 x 57 blocks, channels-last."""
    after = 228 - x.shape[3] - before
    x = F.pixel_unshuffle(F.pad(x.to(dtype), (before, after, before, after)), 4)
    return x.contiguous(memory_format=torch.channels_last)


def words(x: torch.Tensor, before: int, dtype: torch.dtype) -> torch.Tensor:
    """The same for 16 bits, where the four pixels of a block's row move as one integer."""
    padded = torch.zeros(len(x), 3, 228, 228, dtype=dtype)
    padded[:, :, before : before + x.shape[2], before : before + x.shape[3]] = x
    moved = padded.view(torch.int64).unflatten(2, (57, 4)).permute(0, 2, 4, 1, 3).contiguous()
    return moved.view(dtype).flatten(3).permute(0, 3, 1, 2)


class First(nn.Conv2d):
    """The first convolution on blocks of 4 x 4 pixels: to 228 x 228 pixels belong 57 x 57 blocks of 48 channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(x, int(self.padding[0]), self.weight.dtype)
        return F.conv2d(x, F.pixel_unshuffle(F.pad(self.weight, (0, 1, 0, 1)), 4), self.bias)


class Halves(torch.autograd.Function):
    """The halves of a batch side by side with a zero between them, or one behind the other again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, joins: bool) -> torch.Tensor:
        ctx.joins = joins
        if not joins:
            return torch.cat([x[..., :13], x[..., 14:]])
        first, second = x.chunk(2)
        return torch.cat([first, torch.zeros_like(first[..., :1]), second], dim=3)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        return Halves.apply(g, not ctx.joins), None


class Cleared(torch.autograd.Function):
    """Zeros between two images. The gradient there may pass: the ReLU that follows has stopped it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x[..., 13] = 0
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g


class Rows(nn.Module):
    """Convolutions of 3x3 with their ReLUs, on two images in a row."""

    def __init__(self, convolutions: list[nn.Module]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = Halves.apply(x, True)
        for convolution in self.convolutions:
            x = F.relu(Cleared.apply(convolution(x)))
        return Halves.apply(x, False)


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
    regions = asked.options.get("regions", False)
    parts, dropped, channels = [], [], 3
    for layer in load(asked):
        channels = getattr(layer, "out_channels", channels)
        if type(layer).__name__ == "Norm":
            layer = Norm(channels)
            if regions:
                assert isinstance(parts.pop(), nn.ReLU)
                layer = NormLoops()
        elif isinstance(layer, nn.Conv2d) and layer.stride == (4, 4):
            first = First(3, channels, 11, 4, layer.padding)
            looped = words if dtype == torch.bfloat16 else torch.compile(blocks, dynamic=False)
            first.blocks = looped if regions else blocks
            first.load_state_dict(layer.state_dict())
            layer = first
        elif isinstance(layer, nn.Dropout):
            dropped.append(layer := Dropped())
        elif isinstance(layer, nn.AdaptiveAvgPool2d) or (regions and isinstance(layer, nn.ZeroPad2d)):
            continue  # of 6x6 to 6x6; the zeros are blocks' already
        parts.append(layer)
    if regions and dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        third = [i for i, layer in enumerate(parts) if isinstance(layer, nn.Conv2d)][2]
        parts[third : third + 6] = [Rows(parts[third : third + 6 : 2])]
    for i, layer in enumerate(parts[1:] if regions else []):
        if isinstance(layer, nn.MaxPool2d) and isinstance(parts[i], nn.ReLU):
            # The maxima, and not the values four times as many, go through the ReLU.
            parts[i : i + 2] = [layer, nn.ReLU(inplace=True)]
    model = nn.Sequential(*parts).to(memory_format=torch.channels_last)
    weights = dict(model.named_parameters())
    velocity = {name: torch.zeros_like(w) for name, w in weights.items()}
    images, labels = torch.from_numpy(asked.images), torch.from_numpy(asked.labels)
    ids = torch.arange(len(images))
    widths = {"paper2012": (4096, 4096), "torchvision": (9216, 4096)}[asked.preset]
    decays = [5e-4 if name.endswith("weight") else 0.0 for name in weights]
    done = 0

    def cast() -> dict[str, torch.Tensor]:
        return {name: w.to(dtype) for name, w in weights.items()}

    def forward(operands: dict[str, torch.Tensor]) -> torch.Tensor:
        x = images if regions else images.to(dtype, memory_format=torch.channels_last)
        return torch.func.functional_call(model, operands, (x,)).float()

    def train(count: int) -> None:
        nonlocal done
        model.train()
        for _ in range(count):
            for i, layer in enumerate(dropped):
                layer.mask = philox(ids, done, DROPOUT + i, widths[i])
            if narrow:
                leaves = {name: c.requires_grad_() for name, c in narrow.items()}
                gradients = torch.autograd.grad(F.cross_entropy(forward(leaves), labels), list(leaves.values()))
                with torch.no_grad():
                    update(
                        *(list(x.values()) for x in (weights, velocity)), list(gradients), list(leaves.values()), decays
                    )
                done += 1
                continue
            gradients = torch.autograd.grad(F.cross_entropy(forward(cast()), labels), list(weights.values()))
            with torch.no_grad():
                for kind, decay in (("weight", 5e-4), ("bias", 0.0)):
                    torch._fused_sgd_(
                        [w for name, w in weights.items() if name.endswith(kind)],
                        [g for name, g in zip(weights, gradients, strict=True) if name.endswith(kind)],
                        [v for name, v in velocity.items() if name.endswith(kind)],
                        # v = 0.9 v - rate (g + decay w); w = w + v
                        grad_scale=torch.tensor(-1 / RATE),
                        weight_decay=-RATE * decay,
                        momentum=0.9,
                        lr=-1.0,
                        dampening=0.0,
                        nesterov=False,
                        maximize=False,
                        is_first_step=False,
                    )
            done += 1

    model.eval()
    with torch.no_grad():
        narrow = cast() if regions and asked.precision == "bfloat16" else {}
        logits = forward(cast()).numpy()

    def reached() -> dict[str, np.ndarray]:
        return {name: w.detach().numpy() for name, w in zip(asked.weights, weights.values(), strict=True)}

    return Opened(logits=logits, steps=train, weights=reached)


if __name__ == "__main__":
    serve(open_)
