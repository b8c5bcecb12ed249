"""Local response normalisation as torch modules, in words for a device's library or for torch's compiler."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from portnet.graph import LRN, SpatialLRN
from portnet_backends.torch_modes import compiled, compiles, fp32_precision

CACHED = 2**20
"""Values of LRN that a processor computes in one go: so few that those in between stay in its caches."""


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
    """The same on a processor as one loop of torch's compiler each way, where the product takes some twenty operations.

    The loop reads the values some channels away wherever they lie in memory. Beyond a group's ends those are another
    group's or another position's, and count zero times: a condition would take the loop three times as long. Next to a
    value that is not finite they may so become NaN, in another image too.

    Kept for the backward pass are the input and d^-1/4, whose powers are products for AlexNet's own beta of 3/4.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: LRN, wide: torch.dtype, rectifies: bool) -> Tensor:
        x = _either_layout(x)
        y = torch.empty_like(x)
        root = torch.empty_like(x, dtype=wide) if ctx.needs_input_grad[0] else None
        shifts, inside = _neighbours(layer, x.shape[1], wide)
        for (ys, roots), (near,) in _parts_with_neighbours([y, root], [x], shifts):
            _loops()["normed"](ys, roots, near, inside, layer.alpha / layer.size, layer.k, layer.beta, rectifies)
        ctx.save_for_backward(x, root)
        ctx.layer, ctx.rectifies = layer, rectifies
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        x, root = ctx.saved_tensors
        layer: LRN = ctx.layer
        dx = torch.empty_like(x)
        shifts, inside = _neighbours(layer, x.shape[1], root.dtype, adjoint=True)
        scale = -2 * layer.beta * layer.alpha / layer.size
        for (dxs,), near in _parts_with_neighbours([dx], [x, lying_like(x, g), root], shifts):
            _loops()["gradient"](dxs, *near, inside, scale, layer.beta, ctx.rectifies)
        return dx, None, None, None


def _either_layout(x: Tensor) -> Tensor:
    return x if x.is_contiguous() else x.contiguous(memory_format=torch.channels_last)


@cache
@torch.inference_mode(False)
def _neighbours(layer: LRN, channels: int, wide: torch.dtype, *, adjoint: bool = False) -> tuple[list[int], Tensor]:
    """How many channels away those of a window are, the middle first, and where they are in the group: 0 or 1.

    Shape (window, channels, 1). The `adjoint`'s window lies the other way around its channel.
    """
    width = channels // layer.groups
    away = sorted((i - layer.size // 2 for i in range(layer.size)), key=abs)
    shifts = [-s if adjoint else s for s in away if abs(s) < width]
    channel = torch.arange(channels, device="cpu") % width
    inside = torch.stack([(channel + s >= 0) & (channel + s < width) for s in shifts])
    return shifts, inside[:, :, None].to(wide)


def _parts_with_neighbours(
    outputs: list[Tensor | None], inputs: list[Tensor], shifts: list[int]
) -> Iterator[tuple[list[Tensor | None], list[list[Tensor]]]]:
    """Tensors of one layout in two parts of (runs, channels, positions), each input once for each shift of channels.

    The first and the last run of channels, with no memory before or behind them, are copied between zeros.
    """
    runs = [_runs(t) for t in inputs]
    count, channels, positions = runs[0].shape
    reach = max(map(abs, shifts)) * positions

    def apart(ends: Tensor) -> Tensor:
        apart = channels * positions + reach
        zeros = ends.new_zeros(reach + len(ends) * apart)
        return zeros.as_strided(ends.shape, (apart, positions, 1), reach).copy_(ends)

    def part(within: slice, of: Callable[[Tensor], Tensor]) -> tuple[list[Tensor | None], list[list[Tensor]]]:
        parts = [of(t[within]) for t in runs]
        near = [[t.as_strided(t.shape, t.stride(), t.storage_offset() + s * positions) for s in shifts] for t in parts]
        return [t if t is None else _runs(t)[within] for t in outputs], near

    if count > 2:
        yield part(slice(1, -1), lambda t: t)
    if count:
        yield part(slice(None, None, max(1, count - 1)), apart)


def _runs(x: Tensor) -> Tensor:
    """(runs, channels, positions): a run is an image, or in channels-last layout a position."""
    return x.flatten(2) if x.is_contiguous() else x.permute(0, 2, 3, 1).flatten(0, 2)[:, :, None]


def _normed(
    y: Tensor,
    root: Tensor | None,
    near: list[Tensor],
    inside: Tensor,
    scale: float,
    k: float,
    beta: float,
    rectifies: bool,
) -> None:
    middle, *others = (_wide(x, inside, rectifies) for x in near)
    total = middle * middle
    for other, there in zip(others, inside[1:], strict=True):
        total = total + (there * other) ** 2
    found = torch.rsqrt(total * scale + k).sqrt()
    if root is not None:
        root.copy_(found)
    y.copy_(_to_the_beta(found, beta) * middle)


def _gradient(
    dx: Tensor,
    near: list[Tensor],
    near_g: list[Tensor],
    near_root: list[Tensor],
    inside: Tensor,
    scale: float,
    beta: float,
    rectifies: bool,
) -> None:
    middle, *others = (
        (g.to(root.dtype) * _to_the_beta(root, beta), _wide(x, inside, rectifies), root)
        for x, g, root in zip(near, near_g, near_root, strict=True)
    )
    outer, x, root = middle
    total = outer * x * (root * root) ** 2
    for (outers, xs, roots), there in zip(others, inside[1:], strict=True):
        total = total + there * (outers * xs * (roots * roots) ** 2)
    found = outer + scale * x * total
    dx.copy_(torch.where(x > 0, found, 0) if rectifies else found)


def _wide(x: Tensor, like: Tensor, rectifies: bool) -> Tensor:
    return (x.relu() if rectifies else x).to(like.dtype)


def _to_the_beta(root: Tensor, beta: float) -> Tensor:
    """``d^-beta`` of ``d^-1/4``."""
    return root * root * root if beta == 0.75 else root.pow(4 * beta)


@cache
def _loops() -> dict[str, Callable[..., Any]]:
    return {f.__name__[1:]: compiled(f) for f in (_normed, _gradient)}


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
        if compiles(self.engine) or torch.compiler.is_compiling():
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
