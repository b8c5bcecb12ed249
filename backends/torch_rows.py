"""Two images side by side in one row, where a processor's convolutions would leave half of a tile empty."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from portnet.graph import Conv, Graph, ReLU, Step

TILE = 32
"""Products of bfloat16 that AMX sums at once (Intel 64 and IA-32 manual, TDPBF16PS: 16 pairs a row)."""


@dataclass(frozen=True)
class Row:
    """Some convolutions and the ReLUs behind them, to `last`, on images of `width` with `gap` zeros between two.

    oneDNN sums a filter's gradient over a row of outputs at a time. AlexNet's have 13, which fill less than half of a
    tile, and two of them with the zero between, 27, take no longer. What a convolution leaves in the gap is cleared; a
    ReLU then keeps its gradient at zero.
    """

    last: str
    width: int
    gap: int

    def join(self, x: Tensor) -> Tensor:
        """(N, C, H, W) as (N/2, C, H, 2 W + gap): the first half of the batch beside the second."""
        return _Halves.apply(x, self, True)  # type: ignore[no-any-return, no-untyped-call]

    def part(self, x: Tensor) -> Tensor:
        """What `join` joined."""
        return _Halves.apply(x, self, False)  # type: ignore[no-any-return, no-untyped-call]

    def clear(self, x: Tensor) -> Tensor:
        """Zeros in the gap, in place. The gradient there passes as it is: a ReLU must come next, which stops it."""
        return _Cleared.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]


class _Halves(torch.autograd.Function):
    """`Row.join` or `Row.part`: the gradient of either is the other's result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Row, joins: bool) -> Tensor:
        ctx.row, ctx.joins = row, joins
        if not joins:
            return torch.cat([x[..., : row.width], x[..., -row.width :]])
        n, channels, height, _ = x.shape
        between = x.new_zeros(n // 2, height, row.gap, channels).permute(0, 3, 1, 2)
        return torch.cat([x[: n // 2], between, x[n // 2 :]], dim=3)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _Halves.apply(g, ctx.row, not ctx.joins), None, None


class _Cleared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, row: Row) -> Tensor:
        x[..., row.width : -row.width] = 0
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(_: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


def rows(graph: Graph) -> Iterator[tuple[str, Row]]:
    """The runs of convolutions that keep the width, each with a ReLU behind it, of which two rows fit a tile.

    Each by the name of its first layer.
    """
    steps = graph.steps
    at = 0
    while at < len(steps):
        end = at
        while end + 1 < len(steps) and _fits(steps[end]) and isinstance(steps[end + 1].layer, ReLU):
            end += 2
        if end > at:
            gap = max(s.layer.padding for s in steps[at:end] if isinstance(s.layer, Conv))
            yield steps[at].layer.name, Row(steps[end - 1].layer.name, steps[at].input[2], gap)
        at = max(end, at + 1)


def _fits(step: Step) -> bool:
    layer = step.layer
    if not isinstance(layer, Conv):
        return False
    keeps_width = (layer.stride, 2 * layer.padding) == (1, layer.kernel - 1)
    return keeps_width and 2 * step.input[2] + layer.padding <= TILE
