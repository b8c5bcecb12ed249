"""Local response normalisation as torch modules, in words for a device's library or for torch's compiler."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from portnet.graph import LRN, SpatialLRN
from portnet_backends.torch_modes import compiled, fp32_precision

CACHED = 2**20
"""Values of LRN that a processor computes in one go: so few that those in between stay in its caches."""
LOOPED = 2**21
"""The same for compiled loops, which have one array in between where the operations have several."""


class _AcrossChannels(torch.autograd.Function):
    """LRN as products with a banded matrix; only the input and d^-1/2 are kept for the backward pass.

    With ``d = k + B x^2`` and ``f = d^-beta``: ``y = x f`` and
    ``dx = g f - 2 beta x B^T (g x f / d)``, where B holds alpha / size in its band, (groups, width, width). Sums of
    squares stay in float32 (float64 for float64), also where products may use TF32: their cancellation-free sums are
    LRN's whole meaning. A processor takes some images after the others, other devices all at once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, band: Tensor, beta: float, k: float) -> Tensor:
        y, root = torch.empty_like(x), torch.empty_like(x, dtype=band.dtype)
        for part in _parts(x):
            wide = x[part].to(band.dtype)
            torch.rsqrt(_banded(wide * wide, band).add_(k), out=root[part])
            y[part] = _factor(root[part], beta).mul_(wide)
        ctx.save_for_backward(x, root, band)
        ctx.beta = beta
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        x, root, band = ctx.saved_tensors
        dx = torch.empty_like(x)
        for part in _parts(x):
            wide, below = x[part].to(band.dtype), root[part]
            outer = _factor(below, ctx.beta).mul_(g[part])
            across = _banded((outer * wide).mul_(below).mul_(below), band.mT)
            dx[part] = outer.addcmul_(wide, across, value=-2 * ctx.beta)
        return dx, None, None, None


def _parts(x: Tensor) -> list[slice]:
    size = max(1, CACHED // max(1, x[:1].numel()) if x.device.type == "cpu" else len(x))
    return [slice(i, i + size) for i in range(0, len(x), size)]


def _banded(x: Tensor, band: Tensor) -> Tensor:
    """In each group of channels ``band`` times them, as a library does it faster: a product, or a 1x1 convolution."""
    with fp32_precision("ieee"):
        if x.is_contiguous():
            return torch.matmul(band, x.unflatten(1, band.shape[:2]).flatten(3)).view(x.shape)
        return F.conv2d(x, band.flatten(0, 1)[:, :, None, None], groups=len(band))


def _factor(root: Tensor, beta: float) -> Tensor:
    """``d^-beta`` of ``d^-1/2``; for AlexNet's own 3/4 without a power, which takes longer than all else of LRN."""
    return root.sqrt().mul_(root) if beta == 0.75 else root.pow(2 * beta)


def lying_like(other: Tensor, x: Tensor) -> Tensor:
    """`x` in the layout of `other`, as fused operators need it, which go through memory and not by index."""
    return x if x.stride() == other.stride() else torch.empty_like(other).copy_(x)


class _Fused(torch.autograd.Function):
    """The same on a processor in four loops of torch's compiler, where the product takes some twenty operations.

    A loop writes what is summed into a buffer with zeros around each group of channels, the next one sums slices of it.
    As one, its loads would be masked, and it would take four times as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: LRN, wide: torch.dtype, rectifies: bool) -> Tensor:
        x = _either_layout(x)
        y = torch.empty_like(x)
        root = torch.empty_like(x, dtype=wide) if ctx.needs_input_grad[0] else None
        loops, scale = _loops(), layer.alpha / layer.size
        buffer, parts = _padded(x, layer, wide)
        outputs = parts(y)
        kept = [None] * len(outputs) if root is None else parts(root)
        for xs, ys, roots in zip(parts(x), outputs, kept, strict=True):
            loops["squares"](buffer, xs, layer.size // 2, rectifies)
            loops["normed"](ys, roots, buffer, xs, layer.size, scale, layer.k, layer.beta, rectifies)
        ctx.save_for_backward(x, root)
        ctx.layer, ctx.rectifies = layer, rectifies
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        x, root = ctx.saved_tensors
        layer: LRN = ctx.layer
        dx = torch.empty_like(x)
        loops, scale = _loops(), -2 * layer.beta * layer.alpha / layer.size
        buffer, parts = _padded(x, layer, root.dtype)
        # The adjoint's window lies the other way around its channel.
        before = layer.size - 1 - layer.size // 2
        for xs, gs, roots, dxs in zip(*(parts(t) for t in (x, lying_like(x, g), root, dx)), strict=True):
            loops["products"](buffer, xs, gs, roots, before, layer.beta, ctx.rectifies)
            loops["gradient"](dxs, buffer, xs, gs, roots, layer.size, scale, layer.beta, ctx.rectifies)
        return dx, None, None, None


def _either_layout(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous(memory_format=torch.channels_last)


def _padded(x: Tensor, layer: LRN, wide: torch.dtype) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
    """A buffer for one part of `x`, and what views such a tensor as parts of one shape, channels of a group in dim 2.

    The last part overlaps the one before where the number does not come out even: its values are computed twice,
    which is less than a compilation for another shape.
    """

    def rows(t: Tensor) -> Tensor:
        if t.is_contiguous():
            return t.unflatten(1, (layer.groups, -1)).flatten(3)
        return t.permute(0, 2, 3, 1).flatten(0, 2).unflatten(1, (layer.groups, -1))

    whole = rows(x)
    most = max(1, LOOPED // max(1, whole[:1].numel()))
    count = -(-len(whole) // most)
    size = -(-len(whole) // max(1, count))
    shape = list(whole.shape)
    shape[0], shape[2] = size, shape[2] + layer.size - 1

    def parts(t: Tensor) -> list[Tensor]:
        viewed = rows(t)
        return [viewed[start : start + size] for start in (min(i * size, len(whole) - size) for i in range(count))]

    return x.new_zeros(shape, dtype=wide), parts


def _squares(buffer: Tensor, x: Tensor, before: int, rectifies: bool) -> None:
    wide = x.to(buffer.dtype)
    if rectifies:
        wide = wide.relu()
    buffer.narrow(2, before, x.shape[2]).copy_(wide * wide)


def _window(buffer: Tensor, size: int) -> Tensor:
    total = buffer.narrow(2, 0, buffer.shape[2] - size + 1)
    for shift in range(1, size):
        total = total + buffer.narrow(2, shift, total.shape[2])
    return total


def _normed(
    y: Tensor,
    root: Tensor | None,
    buffer: Tensor,
    x: Tensor,
    size: int,
    scale: float,
    k: float,
    beta: float,
    rectifies: bool,
) -> None:
    wide = x.relu() if rectifies else x
    below = torch.rsqrt(_window(buffer, size) * scale + k)
    if root is not None:
        root.copy_(below)
    y.copy_(_factor(below, beta) * wide.to(buffer.dtype))


def _products(buffer: Tensor, x: Tensor, g: Tensor, root: Tensor, before: int, beta: float, rectifies: bool) -> None:
    outer, wide = _factor(root, beta) * g.to(root.dtype), x.relu() if rectifies else x
    buffer.narrow(2, before, x.shape[2]).copy_(outer * wide.to(root.dtype) * root * root)


def _gradient(
    dx: Tensor,
    buffer: Tensor,
    x: Tensor,
    g: Tensor,
    root: Tensor,
    size: int,
    scale: float,
    beta: float,
    rectifies: bool,
) -> None:
    found = _factor(root, beta) * g.to(root.dtype) + scale * x.to(root.dtype) * _window(buffer, size)
    dx.copy_(torch.where(x > 0, found, 0) if rectifies else found)


@cache
def _loops() -> dict[str, Callable[..., Any]]:
    return {f.__name__[1:]: compiled(f) for f in (_squares, _normed, _products, _gradient)}


def _sum_across_channels(x: Tensor, layer: LRN, wide: torch.dtype) -> Tensor:
    """LRN in words that a compiler fuses: the squares' sum as `size` shifted slices, in `wide`, with no product.

    `_AcrossChannels` cannot be traced, for it sets torch's precision, and its convolution would be no loop to fuse.
    """
    wide_x = x.to(wide)
    squares = (wide_x * wide_x).unflatten(1, (layer.groups, -1))
    before = layer.size // 2
    padded = F.pad(squares, (0, 0, 0, 0, before, layer.size - 1 - before))
    total = padded[:, :, : squares.shape[2]]
    for shift in range(1, layer.size):
        total = total + padded[:, :, shift : shift + squares.shape[2]]
    factor = (total.flatten(1, 2) * (layer.alpha / layer.size) + layer.k) ** -layer.beta
    return (wide_x * factor).to(x.dtype)


class LocalResponseNorm(nn.Module):
    """LRN within each of `groups` runs of channels; see `portnet.graph.LRN` for the formula.

    `stock` uses torch's own function; `engine` compile takes the form for compilers, regions compiled loops, which may
    rectify what they read: a ReLU before them is then done, whether it was run or not.
    """

    def __init__(self, layer: LRN, channels: int, *, stock: bool, engine: str = "eager") -> None:
        super().__init__()
        self.layer, self.stock, self.engine = layer, stock, engine
        self.rectifies = False
        width = channels // layer.groups
        # On the host and in float64 whatever the defaults, to be cast once when the module moves to its device.
        channel = torch.arange(width, device="cpu")
        offset = channel[None, :] - channel[:, None] + layer.size // 2
        band = ((offset >= 0) & (offset < layer.size)).double() * (layer.alpha / layer.size)
        self.register_buffer("band", band.repeat(layer.groups, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stock:
            towers = x.chunk(self.layer.groups, dim=1)
            normed = [
                F.local_response_norm(t, self.layer.size, self.layer.alpha, self.layer.beta, self.layer.k)
                for t in towers
            ]
            return normed[0] if len(normed) == 1 else torch.cat(normed, dim=1)
        if self.engine == "compile" or torch.compiler.is_compiling():
            return _sum_across_channels(x, self.layer, self.band.dtype)
        if self.engine == "regions":
            return _Fused.apply(x, self.layer, self.band.dtype, self.rectifies)  # type: ignore[no-any-return, no-untyped-call]
        return _AcrossChannels.apply(x, self.band, self.layer.beta, self.layer.k)  # type: ignore[no-any-return, no-untyped-call]

    def extra_repr(self) -> str:
        return repr(self.layer)


class _WithinMaps(torch.autograd.Function):
    """LRN within maps; like `_AcrossChannels`, with averages over positions around in place of the band."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: SpatialLRN) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        factor = _around(wide * wide, layer).mul_(layer.alpha).add_(layer.k).pow_(-layer.beta)
        ctx.save_for_backward(x, factor)
        ctx.layer = layer
        return (wide * factor).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        x, factor = ctx.saved_tensors
        layer = ctx.layer
        wide, g = x.to(factor.dtype), g.to(factor.dtype)
        outer = g * factor
        # An average over positions around is its own adjoint.
        around = _around(outer * wide * factor.pow(1 / layer.beta), layer)
        return (outer - (2 * layer.beta * layer.alpha) * wide * around).to(x.dtype), None


def _around(x: Tensor, layer: SpatialLRN) -> Tensor:
    """Averages over the positions around each, zeros outside counted."""
    return F.avg_pool2d(x, layer.size, stride=1, padding=layer.size // 2)


class SpatialResponseNorm(nn.Module):
    """LRN within each map; see `portnet.graph.SpatialLRN` for the formula.

    `stock` computes in whatever precision it is given, `traced` is for compilers.
    """

    def __init__(self, layer: SpatialLRN, *, stock: bool, traced: bool = False) -> None:
        super().__init__()
        self.layer, self.stock, self.traced = layer, stock, traced

    def forward(self, x: Tensor) -> Tensor:
        if not (self.stock or self.traced):
            return _WithinMaps.apply(x, self.layer)  # type: ignore[no-any-return, no-untyped-call]
        wide = x if self.stock else x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (self.layer.k + self.layer.alpha * _around(wide * wide, self.layer)) ** -self.layer.beta).to(
            x.dtype
        )

    def extra_repr(self) -> str:
        return repr(self.layer)
