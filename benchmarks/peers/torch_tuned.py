"""What PortNet's torch session does, written directly against torch for one device and without PortNet.

Channels-last; bfloat16 copies of float32 weights; LRN as a 1x1 convolution with a banded matrix, some images at a time;
the first convolution on blocks of pixels; dropout by Philox's bits; the update of 2012 by torch's fused SGD. With
`regions`, LRN with the ReLU before it, the blocks of pixels, and in bfloat16 the update, are loops of torch's compiler,
and the last three convolutions take two images of an even batch in a row, 13 + 1 + 13 wide. Its time beside that of
PortNet's channels-last stack of the same engine is what the portable contract costs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
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


def padded(x: torch.Tensor) -> torch.Tensor:
    """Zeros for the sums of one part, 4 images of 2 groups of channels; `window` sees two more on each side."""
    return torch.zeros(x[:4, 0].numel(), 2, x.shape[1] // 2 + 4)


def quarters(x: torch.Tensor) -> list[torch.Tensor]:
    """4 images each, as (position, group, channel)."""
    return list(x.permute(0, 2, 3, 1).flatten(0, 2).unflatten(1, (2, -1)).split(4 * x[0, 0].numel()))


def window(sums: torch.Tensor) -> torch.Tensor:
    return sums[..., :-4] + sums[..., 1:-3] + sums[..., 2:-2] + sums[..., 3:-1] + sums[..., 4:]


@partial(torch.compile, dynamic=False)
def squares(sums: torch.Tensor, x: torch.Tensor) -> None:
    sums[..., 2:-2].copy_(x.float().relu() ** 2)


@partial(torch.compile, dynamic=False)
def normed(y: torch.Tensor, root: torch.Tensor, sums: torch.Tensor, x: torch.Tensor) -> None:
    below = torch.rsqrt(window(sums) * 1e-4 + 2.0)
    root.copy_(below)
    y.copy_(below.sqrt() * below * x.float().relu())


@partial(torch.compile, dynamic=False)
def products(sums: torch.Tensor, x: torch.Tensor, g: torch.Tensor, root: torch.Tensor) -> None:
    sums[..., 2:-2].copy_(root.sqrt() * root**3 * g.float() * x.float().relu())


@partial(torch.compile, dynamic=False)
def gradient(dx: torch.Tensor, sums: torch.Tensor, x: torch.Tensor, g: torch.Tensor, root: torch.Tensor) -> None:
    found = root.sqrt() * root * g.float() - 1.5e-4 * x.float() * window(sums)
    dx.copy_(torch.where(x > 0, found, 0))


class LrnLoops(torch.autograd.Function):
    """Of fewer than 4 images, or of a number that 4 divides."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y, root, sums = torch.empty_like(x), torch.empty_like(x, dtype=torch.float32), padded(x)
        for xs, ys, roots in zip(quarters(x), quarters(y), quarters(root), strict=True):
            squares(sums, xs)
            normed(ys, roots, sums, xs)
        ctx.save_for_backward(x, root)
        return y

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        x, root = ctx.saved_tensors
        dx, sums = torch.empty_like(x), padded(x)
        for xs, gs, roots, dxs in zip(quarters(x), quarters(g), quarters(root), quarters(dx), strict=True):
            products(sums, xs, gs, roots)
            gradient(dxs, sums, xs, gs, roots)
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
    after = 228 - x.shape[3] - before
    x = F.pixel_unshuffle(F.pad(x.to(dtype), (before, after, before, after)), 4)
    return x.contiguous(memory_format=torch.channels_last)


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
            first.blocks = torch.compile(blocks, dynamic=False) if regions else blocks
            first.load_state_dict(layer.state_dict())
            layer = first
        elif isinstance(layer, nn.Dropout):
            dropped.append(layer := Dropped())
        elif isinstance(layer, nn.AdaptiveAvgPool2d) or (regions and isinstance(layer, nn.ZeroPad2d)):
            continue  # of 6x6 to 6x6; the zeros are blocks' already
        parts.append(layer)
    if regions and dtype == torch.bfloat16:
        third = [i for i, layer in enumerate(parts) if isinstance(layer, nn.Conv2d)][2]
        parts[third : third + 6] = [Rows(parts[third : third + 6 : 2])]
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
                layer.mask = philox(ids, done, i, widths[i])
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
    return Opened(logits=logits, steps=train)


if __name__ == "__main__":
    serve(open_)
