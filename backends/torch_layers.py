"""A graph's layers as torch modules: convolutions by blocks, by unfolding and by definition, pooling, dropout."""

from collections.abc import Callable
from functools import cache, reduce
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from portnet.graph import (
    LRN,
    AdaptiveAvgPool,
    Conv,
    Dropout,
    Flatten,
    Layer,
    Linear,
    MaxPool,
    Pad,
    ReLU,
    SpatialLRN,
)
from portnet.host import processor
from portnet_backends.torch_modes import compiled, compiles, has_onednn, onednn_linear
from portnet_backends.torch_norms import LocalResponseNorm, SpatialResponseNorm


class MaskedDropout(nn.Module):
    """Dropout by a given mask; without one, in training, by torch's own generator. See `portnet.graph.Dropout`."""

    def __init__(self, layer: Dropout) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.training:
            return x * self.layer.test_scale if self.layer.test_scale != 1 else x
        if mask is None:
            mask = torch.rand(x.shape, device=x.device) >= self.layer.p
        kept = x * mask
        return kept * self.layer.train_scale if self.layer.train_scale != 1 else kept

    def extra_repr(self) -> str:
        return repr(self.layer)


class BlockConv(nn.Conv2d):
    """A convolution with a stride as one of stride 1, on blocks of stride x stride pixels as channels (space to depth).

    Its sums are the same, with zeros where the filter's last block goes beyond it. AlexNet's first convolution, 11x11
    with stride 4 on 3 channels, becomes 3x3 on 48, and channels are what libraries fill their vectors and tiles with.

    `beyond`: zeros to add on the right and at the bottom, which a `Pad` layer before it would. With `looped`, pixels of
    any precision become blocks in one loop of torch's compiler, or are moved four at a time.
    """

    beyond = (0, 0)
    looped = False

    def forward(self, x: Tensor) -> Tensor:
        (k, _), (stride, _), (padding, _) = self.kernel_size, self.stride, self.padding
        before, blocks = int(padding), -(-k // stride)

        def after(size: int, beyond: int) -> int:
            return ((size + beyond + 2 * before - k) // stride + blocks) * stride - size - before

        pad = (before, after(x.shape[3], self.beyond[0]), before, after(x.shape[2], self.beyond[1]))
        rest = blocks * stride - k
        filters = F.pad(self.weight, (0, rest, 0, rest))
        in_blocks = _blocks
        if self.looped:
            nhwc = filters.is_contiguous(memory_format=torch.channels_last)
            whole = nhwc and stride * filters.element_size() == torch.int64.itemsize and not x.requires_grad
            in_blocks = _blocks_of_words if whole else _compiled_blocks()
        return F.conv2d(in_blocks(x, filters, pad, stride), F.pixel_unshuffle(filters, stride), self.bias)


def _blocks(x: Tensor, filters: Tensor, pad: tuple[int, ...], stride: int) -> Tensor:
    """Padded pixels as blocks, in the filters' precision and layout."""
    nhwc = filters.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    return F.pixel_unshuffle(F.pad(x.to(filters.dtype), pad), stride).contiguous(memory_format=layout)


@cache
def _compiled_blocks() -> Callable[..., Tensor]:
    return compiled(_blocks)


def _blocks_of_words(x: Tensor, filters: Tensor, pad: tuple[int, ...], stride: int) -> Tensor:
    """The same in channels-last layout, where `stride` pixels are 8 bytes: each moves as one integer."""
    left, right, top, bottom = pad
    n, channels, height, width = x.shape
    padded = filters.new_zeros(n, channels, top + height + bottom, left + width + right)
    kept = x[:, :, : height + bottom, : width + right]  # what no filter reaches is left out
    padded[:, :, top : top + kept.shape[2], left : left + kept.shape[3]].copy_(kept)
    words = padded.view(torch.int64).unflatten(2, (-1, stride)).permute(0, 2, 4, 1, 3).contiguous()
    return words.view(filters.dtype).flatten(3).permute(0, 3, 1, 2)


class UnfoldConv(nn.Conv2d):
    """A convolution as one batched unfold and one matrix product a group: what stands below a convolution library."""

    def forward(self, x: Tensor) -> Tensor:
        (k, _), (stride, _), (padding, _) = self.kernel_size, self.stride, self.padding
        height, width = ((n + 2 * int(padding) - k) // stride + 1 for n in x.shape[2:])
        columns = F.unfold(x, k, padding=int(padding), stride=stride).unflatten(1, (self.groups, -1))
        columns = columns.permute(1, 2, 0, 3).flatten(2)  # group, filter's element, image and position
        filters = self.weight.flatten(1).unflatten(0, (self.groups, -1))
        # The bias goes into the product's wide sum, as a convolution's does: added later, it would round twice.
        y = torch.baddbmm(self._bias().view(self.groups, -1, 1), filters, columns)
        return y.flatten(0, 1).unflatten(1, (len(x), height, width)).transpose(0, 1).contiguous()

    def _bias(self) -> Tensor:
        assert self.bias is not None, "every convolution of a graph has one"
        return self.bias[:, None, None]


class DirectConv(UnfoldConv):
    """A convolution as its definition says: products of filter and window, summed, in float32 or wider.

    Written as a broadcast product and a sum, of which torch's compiler makes one loop nest for each of output, filter
    gradient and input gradient, with no library's call; uncompiled it would hold every product in memory. Where the
    session is not compiled anyway, each convolution is, by itself.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._definition(x, self.weight, self._bias())
        return _compiled_direct()(self, x, self.weight, self._bias())

    def _definition(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        (k, _), (stride, _), (padding, _) = self.kernel_size, self.stride, self.padding
        wide = torch.promote_types(x.dtype, torch.float32)
        windows = F.pad(x, (int(padding),) * 4).unfold(2, k, stride).unfold(3, k, stride)
        # image, group, output channel, input channel, row, column, filter's row, filter's column
        windows = windows.unflatten(1, (self.groups, 1, -1)).to(wide)
        filters = weight.unflatten(0, (self.groups, -1))[None, :, :, :, None, None].to(wide)
        return ((windows * filters).sum(dim=(3, 6, 7)).flatten(1, 2) + bias).to(x.dtype)


def _direct(module: DirectConv, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return module._definition(x, weight, bias)


@cache
def _compiled_direct() -> Callable[..., Tensor]:
    return compiled(_direct)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """torch's, which averages single values too where there is nothing to pool, as in AlexNet at 224 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        size = self.output_size
        return x if x.shape[2:] == (size, size) else super().forward(x)


class DnnLinear(nn.Linear):
    """torch's, which float32 goes through by oneDNN where oneMKL, to which PyTorch gives it, is slower.

    That is on processors with AVX2 alone and on AMD's. fc6 took one of the latter with AVX-512 31 ms by oneMKL and 16
    by oneDNN with 32 rows, 7 and 3 with one; with 128 rows 65 and 48, the gradient of the input 76 and 50, that of the
    weight 97 and 98.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != torch.float32 or not (_onemkl_is_slower() and has_onednn()):
            return super().forward(x)
        return _DnnLinear.apply(x, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]


class _DnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return onednn_linear(g, weight.T) if ctx.needs_input_grad[0] else None, g.T @ x, g.sum(0)


@cache
def _onemkl_is_slower() -> bool:
    known = torch.cpu._is_avx2_supported()
    return known and (not torch.cpu._is_avx512_supported() or processor().startswith("AMD"))


class MaxPool2d(nn.MaxPool2d):
    """torch's, which also notes where each maximum was; without a backward pass to come, one loop over channels.

    With `rectifies` its maxima, and not the values four times as many, go through the ReLU that stands before it.
    """

    rectifies = False

    def forward(self, x: Tensor) -> Tensor:
        if (x.requires_grad and torch.is_grad_enabled()) or not x.is_contiguous(memory_format=torch.channels_last):
            y = super().forward(x)
            return F.relu(y, inplace=True) if self.rectifies else y
        maxima = _compiled_maxima()(x.permute(0, 2, 3, 1), self.kernel_size, self.stride, self.rectifies)
        return maxima.permute(0, 3, 1, 2)


def _maxima(x: Tensor, kernel: int, stride: int, rectifies: bool) -> Tensor:
    """Of (N, H, W, C), as (N, H', W', C)."""
    height, width = ((size - kernel) // stride * stride + 1 for size in x.shape[1:3])
    places = product(range(kernel), repeat=2)
    y = reduce(torch.maximum, [x[:, r : r + height : stride, c : c + width : stride] for r, c in places])
    return y.relu() if rectifies else y


@cache
def _compiled_maxima() -> Callable[..., Tensor]:
    return compiled(_maxima)


CONVOLUTIONS: dict[str, type[nn.Conv2d]] = {"unfold": UnfoldConv, "direct": DirectConv}


def layer_module(layer: Layer, channels: int, formulation: str, engine: str = "eager") -> nn.Module:
    own = engine == "regions" and formulation == "portable"
    match layer:
        case Pad():
            return nn.ZeroPad2d((0, layer.right, 0, layer.bottom))
        case Conv():
            in_blocks = formulation == "portable" and layer.stride > 1 and layer.groups == 1
            return CONVOLUTIONS.get(formulation, BlockConv if in_blocks else nn.Conv2d)(
                layer.in_channels, layer.out_channels, layer.kernel, layer.stride, layer.padding, groups=layer.groups
            )
        case Linear():
            return (DnnLinear if own else nn.Linear)(layer.in_features, layer.out_features)
        case ReLU():
            return nn.ReLU()
        case LRN():
            return LocalResponseNorm(layer, channels, stock=formulation == "stock", engine=engine)
        case SpatialLRN():
            return SpatialResponseNorm(layer, stock=formulation == "stock", traced=compiles(engine))
        case MaxPool():
            return (MaxPool2d if own else nn.MaxPool2d)(layer.kernel, layer.stride)
        case AdaptiveAvgPool():
            return (nn.AdaptiveAvgPool2d if formulation == "stock" else AdaptiveAvgPool2d)(layer.size)
        case Flatten():
            return nn.Flatten()
        case Dropout():
            return MaskedDropout(layer)
    raise TypeError(f"PortNet's torch module has no layer {type(layer).__name__}")
