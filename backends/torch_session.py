"""A graph as a plain ``nn.Module``, and its session on one torch device."""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, wraps
from inspect import signature
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.optim.sgd import sgd

from portnet.contract import Array, LayerTime, Session, Settings, Trace, Unsupported, Weights
from portnet.errors import InputError, PortNetError
from portnet.graph import (
    LRN,
    AdaptiveAvgPool,
    Conv,
    Dropout,
    Flatten,
    Graph,
    Layer,
    Linear,
    MaxPool,
    Pad,
    Recipe,
    ReLU,
    SpatialLRN,
)
from portnet_backends import torch_philox

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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

    `stock` uses torch's own function, `traced` the form for compilers.
    """

    def __init__(self, layer: LRN, channels: int, *, stock: bool, traced: bool = False) -> None:
        super().__init__()
        self.layer, self.stock, self.traced = layer, stock, traced
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
        if self.traced or torch.compiler.is_compiling():
            return _sum_across_channels(x, self.layer, self.band.dtype)
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
    """

    def forward(self, x: Tensor) -> Tensor:
        (k, _), (stride, _), (padding, _) = self.kernel_size, self.stride, self.padding
        before, blocks = int(padding), -(-k // stride)

        def after(size: int) -> int:
            return ((size + 2 * before - k) // stride + blocks) * stride - size - before

        x = F.pad(x, (before, after(x.shape[3]), before, after(x.shape[2])))
        beyond = blocks * stride - k
        filters = F.pad(self.weight, (0, beyond, 0, beyond))
        return F.conv2d(F.pixel_unshuffle(x, stride), F.pixel_unshuffle(filters, stride), self.bias)


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
    return _compiled(_direct)


CONVOLUTIONS: dict[str, type[nn.Conv2d]] = {"unfold": UnfoldConv, "direct": DirectConv}


def layer_module(layer: Layer, channels: int, formulation: str, *, traced: bool) -> nn.Module:
    match layer:
        case Pad():
            return nn.ZeroPad2d((0, layer.right, 0, layer.bottom))
        case Conv():
            in_blocks = formulation == "portable" and layer.stride > 1 and layer.groups == 1
            return CONVOLUTIONS.get(formulation, BlockConv if in_blocks else nn.Conv2d)(
                layer.in_channels, layer.out_channels, layer.kernel, layer.stride, layer.padding, groups=layer.groups
            )
        case Linear():
            return nn.Linear(layer.in_features, layer.out_features)
        case ReLU():
            return nn.ReLU()
        case LRN():
            return LocalResponseNorm(layer, channels, stock=formulation == "stock", traced=traced)
        case SpatialLRN():
            return SpatialResponseNorm(layer, stock=formulation == "stock", traced=traced)
        case MaxPool():
            return nn.MaxPool2d(layer.kernel, layer.stride)
        case AdaptiveAvgPool():
            return nn.AdaptiveAvgPool2d(layer.size)
        case Flatten():
            return nn.Flatten()
        case Dropout():
            return MaskedDropout(layer)
    raise TypeError(f"PortNet's torch module has no layer {type(layer).__name__}")


class Network(nn.Module):
    """The graph's chain as an ``nn.Module`` whose parameters have the graph's names; takes and gives NCHW tensors.

    `formulation` is one of the backend's; `traced` avoids what compilers cannot trace.
    """

    def __init__(self, graph: Graph, formulation: str = "portable", *, traced: bool = False) -> None:
        super().__init__()
        for step in graph.steps:
            self.add_module(step.layer.name, layer_module(step.layer, step.input[0], formulation, traced=traced))

    def forward(
        self, x: Tensor, masks: Mapping[str, Tensor] | None = None, record: dict[str, Tensor] | None = None
    ) -> Tensor:
        for name, layer in self.named_children():
            x = layer(x, masks[name]) if masks is not None and name in masks else layer(x)
            if record is not None:
                record[name] = x
        return x


@contextmanager
def fp32_precision(mode: str) -> Iterator[None]:
    """Float32 products and convolutions computed as ``ieee`` float32 or in ``tf32``, whatever the process's settings.

    torch's defaults differ between the two, and either may have been changed by somebody else.
    """
    if hasattr(torch.backends, "fp32_precision"):
        holders = [
            torch.backends.cuda.matmul,
            torch.backends.cudnn.conv,  # type: ignore[attr-defined]
            torch.backends.mkldnn.matmul,
            torch.backends.mkldnn.conv,
        ]
        name, value = "fp32_precision", mode
    else:  # torch 2.8
        holders, name, value = [torch.backends.cuda.matmul, torch.backends.cudnn], "allow_tf32", mode == "tf32"
    before = [getattr(holder, name) for holder in holders]
    try:
        for holder in holders:
            setattr(holder, name, value)
        yield
    finally:
        for holder, was in zip(holders, before, strict=True):
            setattr(holder, name, was)


@contextmanager
def without(names: Collection[str]) -> Iterator[None]:
    """The libraries of `names` switched off in torch: ``onednn``, ``cudnn``, or ``miopen``, which torch calls cudnn."""
    holders: list[Any] = [torch.backends.mkldnn] if "onednn" in names else []
    if {"cudnn", "miopen"} & set(names):
        holders.append(torch.backends.cudnn)
    before = [holder.enabled for holder in holders]
    try:
        for holder in holders:
            holder.enabled = False
        yield
    finally:
        for holder, was in zip(holders, before, strict=True):
            holder.enabled = was


VELOCITY, LOSS_SCALE = "velocity.", "loss_scale"
"""How `Session.state` names the velocities, and the loss's scale in float16."""
GROWTH = 2000.0
"""Steps without an overflow after which float16's loss is scaled by twice as much."""

# What torch says of itself while compiling: that TF32 would be faster than the float32 asked for, and of its own
# modules and how they look at tensors.
CHATTER = (
    "TensorFloat32 tensor cores .* available but not enabled",
    ".*torch.jit.script_method. is deprecated",
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled by torch as one graph for each of its shapes, or `Unsupported`: never run as it stands."""
    # All sessions, and all layers of the direct formulation, add to one function's count of compilations.
    limit = {"recompile_limit": 1024} if "recompile_limit" in signature(torch.compile).parameters else {}
    compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False, **limit)

    @wraps(function)
    def run(*inputs: Any) -> Any:
        if torch._dynamo.config.disable:
            raise Unsupported("torch.compile is switched off (TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE)")
        with warnings.catch_warnings():
            for message in CHATTER:
                warnings.filterwarnings("ignore", message)
            try:
                try:
                    return compiled(*inputs)
                except torch._dynamo.exc.FailOnRecompileLimitHit:
                    # An older torch, which has that limit for the process alone; setting it takes a millisecond, too
                    # much to do at each call.
                    with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
                        return compiled(*inputs)
            except torch._dynamo.exc.TorchDynamoException as error:
                cause = getattr(error, "inner_exception", error)
                first = str(cause).strip().partition("\n")[0]
                # A failure to be counted, and nothing that was refused.
                raise PortNetError(f"torch.compile failed: {type(cause).__name__}: {first}") from error

    return run


def device_capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture `run` as a CUDA or HIP graph: what replays it, and the tensor that each replay overwrites.

    The recipe is PyTorch's (notes/cuda, "CUDA Graphs"): three runs on a side stream first, so that libraries choose
    and allocate before the capture. It captures on the stream of those runs, to which hipBLASLt binds its handles.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        output = run()
    return graph.replay, output


def _lying_like(other: Tensor, x: Tensor) -> Tensor:
    """`x` in the layout of `other`, as torch's fused operators need it, which go through memory and not by index."""
    return x if x.stride() == other.stride() else torch.empty_like(other).copy_(x)


class Captured:
    """`function` of tensors captured once for each of its inputs' shapes, and replayed.

    A replay reads the memory that the capture read: inputs are copied there, and the result is copied out, or the
    next replay would overwrite it. `state` is what `function` changes in place; the runs before the capture must not.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        state: Sequence[Tensor] = (),
        capture: Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]] = device_capture,
    ) -> None:
        self._function, self._state, self._capture = function, state, capture
        self._captures: dict[Any, tuple[list[Tensor], Callable[[], None], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        key = tuple((t.shape, t.dtype) for t in inputs)
        if key not in self._captures:
            static = [t.clone() for t in inputs]
            before = [t.detach().clone() for t in self._state]
            replay, output = self._capture(lambda: self._function(*static))
            with torch.no_grad():
                for t, was in zip(self._state, before, strict=True):
                    t.copy_(was)
            self._captures[key] = static, replay, output
        static, replay, output = self._captures[key]
        for buffer, value in zip(static, inputs, strict=True):
            buffer.copy_(value)
        replay()
        return output.clone()


class TorchSession(Session):
    """A network on a torch device.

    Weights are kept in float32 (float64 for float64). In bfloat16 and float16 the portable formulation casts them at
    each use; the stock one leaves that to autocast. The work is defined once: forward pass, loss, masks and update
    are functions of tensors alone, run as they are (``eager``), each through torch's compiler (``compile``), or
    captured as one device graph for inference and one for a training step (``graph``). In float16 the loss is scaled
    for the backward pass, and a step whose gradients overflow is left out.
    """

    capture = staticmethod(device_capture)

    def __init__(
        self, device_type: str, wait: Callable[[], None], graph: Graph, weights: Weights, settings: Settings
    ) -> None:
        self.graph, self.settings, self._wait = graph, settings, wait
        self.device = torch.device(device_type)
        from portnet_backends import torch_probe

        torch_probe.forget_peak(self.device)
        self.dtype = DTYPES[settings.precision]
        self.stock = settings.formulation == "stock"
        self.narrow = self.dtype in (torch.bfloat16, torch.float16)
        self._layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        # Made without values, so that torch neither draws 61 million of its own nor moves its generator.
        with torch.device("meta"):
            self.module = self._network()
        owned = self._owned(weights)
        state = {name: torch.tensor(owned[name], dtype=torch.float32) for name, _ in self.module.named_parameters()}
        self.module.load_state_dict(state, assign=True)
        self._wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.module.to(self._wide)
        self.module.to(self.device, memory_format=self._layout)  # type: ignore[call-overload]
        self.parameters = dict(self.module.named_parameters())
        self.velocity: dict[str, Tensor] = {}
        self.recipe = graph.recipe
        # The factor on the loss, without which small gradients would vanish; the steps since it last changed; and after
        # how many without an overflow it is doubled.
        float16 = self.dtype == torch.float16
        self.loss_scale = torch.tensor([1.0, 0.0, 1.0], device=self.device) if float16 else None
        # Elsewhere the rate stays on the device, and compilers fuse the update themselves.
        self._at_once = (
            self.device.type == "cpu" and settings.engine == "eager" and settings.precision in ("float32", "bfloat16")
        )
        self._casts: dict[str, Tensor] = {}
        self._cast_from: tuple[int, ...] = ()
        self._infer: Callable[..., Tensor] = self._inferred
        self._train: Callable[..., Tensor] = self._trained
        if settings.engine == "compile":
            for name in ("_forward", "_losses", "_draw", "_update"):
                setattr(self, name, _compiled(getattr(self, name)))
        elif settings.engine == "graph":
            self._infer = Captured(self._inferred, capture=self.capture)

    # What a session that shares the network with others does in its own way; see `torch_parallel`.

    def _network(self) -> nn.Module:
        return Network(self.graph, self.settings.formulation, traced=self.settings.engine == "compile")

    def _owned(self, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        """Of the whole network's arrays, by parameter, those that this process holds."""
        return arrays

    def _agreed(self, finite: Tensor) -> Tensor:
        """Whether the gradients are finite in every process that must take the same step."""
        return finite

    def put(self, array: Array) -> Tensor:
        return torch.tensor(array, device=self.device)

    def get(self, value: Tensor) -> Array:
        wide = value.float() if self.narrow and value.is_floating_point() else value
        return wide.detach().cpu().numpy().copy()

    def weights(self) -> dict[str, Array]:
        return self._whole({name: p.detach() for name, p in self.parameters.items()})

    def _whole(self, arrays: Mapping[str, Tensor]) -> dict[str, Array]:
        """The whole network's arrays on the host, from what this process and those it shares with hold."""
        return {name: value.cpu().numpy().copy() for name, value in arrays.items()}

    def put_pixels(self, pixels: Array, shift: Array, scale: Array) -> Tensor:
        # Moved about as bytes, which are a quarter of the floats.
        made = self._copied(pixels).permute(0, 3, 1, 2).contiguous(memory_format=self._layout).float()
        # As two operations, each rounded once: fused, they would round differently from device to device.
        return made.add_(self._copied(shift)[:, :, None, None]).div_(self._copied(scale)[:, None, None])

    def _copied(self, array: Array) -> Tensor:
        """On the device, perhaps not yet: from page-locked memory, the copy does not wait for the work before it."""
        host = torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())
        if self.device.type in ("cuda", "xpu"):
            return host.pin_memory().to(self.device, non_blocking=True)
        return host.to(self.device)

    def state(self) -> dict[str, Array]:
        found = self.weights()
        found |= {VELOCITY + name: value for name, value in self._whole(self.velocity).items()}
        if self.loss_scale is not None:
            found[LOSS_SCALE] = self.loss_scale.cpu().numpy().copy()
        return found

    def restore(self, state: Mapping[str, Array]) -> None:
        if not self.velocity:
            self._start_training()
        whole = {name: value for name, value in state.items() if name in self.graph.parameters}
        moving = {name: state[VELOCITY + name] for name in whole if VELOCITY + name in state}
        with torch.no_grad():
            for targets, arrays in ((self.parameters, whole), (self.velocity, moving)):
                for name, value in self._owned(arrays).items():
                    targets[name].copy_(torch.tensor(value))
            if self.loss_scale is not None and LOSS_SCALE in state:
                self.loss_scale.copy_(torch.tensor(state[LOSS_SCALE]))
        self._cast_from = ()

    def use(self, recipe: Recipe) -> None:
        if recipe != self.recipe:
            self.recipe = recipe
            if self.velocity:
                self._capture_training()

    def synchronize(self) -> None:
        self._wait()

    def peak_memory(self) -> int | None:
        from portnet_backends import torch_probe

        return torch_probe.peak_memory(self.device)

    def fallbacks(self, run: Callable[[], object]) -> dict[str, int]:
        from portnet_backends import torch_probe

        return torch_probe.fallbacks(self.device, self._wait, run)

    def device_seconds(self, run: Callable[[], object]) -> float | None:
        from portnet_backends import torch_probe

        return torch_probe.device_seconds(self.device, self._wait, run)

    def layer_times(self, images: Array, labels: Array | None = None) -> Mapping[str, LayerTime]:
        from portnet_backends import torch_probe

        return torch_probe.layer_times(self, images, training=labels is not None)

    def infer(self, images: Tensor) -> Tensor:
        with torch.inference_mode(), self._as_set():
            # The module is the user's too, who may have changed its weights in place.
            versions = tuple(p._version for p in self.parameters.values())
            if self._cast_from != versions:
                self._cast()
                self._cast_from = versions
            self.module.eval()
            return self._infer(images)

    def masks(self, ids: Array, *, step: int) -> dict[str, npt.NDArray[np.bool_]]:
        with self._as_set():
            drawn = self._draw(self.put(ids), self._scalar(step, torch.int64))
        return {name: mask.cpu().numpy().copy() for name, mask in drawn.items()}

    def trace(self, images: Array, labels: Array | None = None, masks: Mapping[str, Array] | None = None) -> Trace:
        """Layers come from a pass of their own, run as it stands; the rest as the engine gives it.

        (Of a captured step only the gradients that it does not show are run as they stand.)
        """
        record: dict[str, Tensor] = {}
        on_device, kept = self.put(images), {k: self.put(m) for k, m in (masks or {}).items()}
        self.module.train(labels is not None)
        with torch.no_grad(), self._as_set():
            self._pass(self._operands(self.parameters), on_device, kept if labels is not None else None, record)
        if labels is None:
            return Trace(layers={k: self.get(v) for k, v in record.items()}, logits=self.get(self.infer(on_device)))
        with self._as_set():
            logits, loss, gradients = self._backward(on_device, self.put(labels), kept)
        return Trace(
            layers={k: self.get(v) for k, v in record.items()},
            logits=self.get(logits),
            loss=float(self.get(loss)),
            gradients={k: self.get(g) for k, g in gradients.items()},
        )

    def train_step(self, images: Tensor, labels: Tensor, ids: Tensor, *, step: int, learning_rate: float) -> Tensor:
        if not self.velocity:
            self._start_training()
        with self._as_set():
            at, rate = self._scalar(step, torch.int64), self._scalar(learning_rate, self._wide)
            loss = self._train(images, labels, ids, at, rate)
        # Neither a replay nor compiled code need count the versions of what they change.
        self._cast_from = ()
        return loss

    def _start_training(self) -> None:
        """Make what training alone needs: a session that infers must not pay for it in memory."""
        self.velocity = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self._capture_training()

    def _capture_training(self) -> None:
        """Under graph capture, a captured step of its own for each recipe: the coefficients are part of it."""
        if self.settings.engine == "graph":
            state = [*self.parameters.values(), *self.velocity.values()]
            state += [self.loss_scale] if self.loss_scale is not None else []
            self._train = Captured(self._trained, state, capture=self.capture)

    def latest_weights(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1)[-1:] for p in self.parameters.values()])

    @contextmanager
    def _as_set(self) -> Iterator[None]:
        """torch as the settings ask for it, around all that computes."""
        with fp32_precision("tf32" if self.settings.precision == "tf32" else "ieee"), without(self.settings.without):
            yield

    def _scalar(self, value: float, dtype: torch.dtype) -> Tensor:
        # Filled on the device: a copy from the host would wait for it.
        return torch.full((), value, dtype=dtype, device=self.device)

    def _operands(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters as the forward pass is to use them."""
        if self.narrow and not self.stock:
            return {name: p.to(self.dtype) for name, p in parameters.items()}
        return dict(parameters)

    def _cast(self) -> None:
        """Renew the operands of inference, in the memory that they have: a captured graph reads it."""
        operands = self._operands(self.parameters)
        for name, value in operands.items():
            if name in self._casts and self._casts[name] is not value:
                self._casts[name].copy_(value)
            else:
                self._casts[name] = value

    # The work, of tensors alone.

    def _pass(
        self,
        operands: dict[str, Tensor],
        images: Tensor,
        masks: Mapping[str, Tensor] | None = None,
        record: dict[str, Tensor] | None = None,
    ) -> Tensor:
        autocast = torch.autocast(self.device.type, self.dtype) if self.narrow and self.stock else nullcontext()
        images = images if self.narrow and self.stock else images.to(self.dtype)
        if images.dim() == 4:
            images = images.contiguous(memory_format=self._layout)
        with autocast:
            return torch.func.functional_call(self.module, operands, (images, masks, record))  # type: ignore[no-any-return]

    def _forward(self, operands: dict[str, Tensor], images: Tensor) -> Tensor:
        return self._pass(operands, images)

    def _losses(
        self, parameters: dict[str, Tensor], images: Tensor, labels: Tensor, masks: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The logits and their mean cross-entropy."""
        logits = self._pass(self._operands(parameters), images, masks)
        return logits, F.cross_entropy(logits.float() if self.narrow else logits, labels)

    def _draw(self, ids: Tensor, step: Tensor) -> dict[str, Tensor]:
        return {
            s.layer.name: torch_philox.keep_mask(self.settings.seed, i, ids, step, s.output[0], s.layer.p)
            for i, s in enumerate(self.graph.dropouts)
            if isinstance(s.layer, Dropout)
        }

    def _update(
        self, parameters: dict[str, Tensor], velocity: dict[str, Tensor], gradients: dict[str, Tensor], rate: Tensor
    ) -> None:
        momentum: float | Tensor = self.recipe.momentum
        moved: Tensor | None = None
        if self._at_once and momentum:
            self._update_at_once(parameters, velocity, gradients, float(rate))
            return
        if self.loss_scale is not None:
            gradients, rate, momentum, moved = self._check_overflow(gradients, rate, self.loss_scale)
        for name, gradient in gradients.items():
            scale, decay = self.recipe.coefficients(name, 1.0)
            v, w = velocity[name], parameters[name]
            v.mul_(momentum).addcmul_(w, rate, value=-decay * scale).addcmul_(gradient, rate, value=-scale)
            w.add_(v) if moved is None else w.addcmul_(v, moved)

    def _update_at_once(
        self, parameters: dict[str, Tensor], velocity: dict[str, Tensor], gradients: dict[str, Tensor], rate: float
    ) -> None:
        """The same in one pass over memory instead of four, by torch's fused SGD; the gradients are overwritten.

        Its own rule is ``v = m v + (g / s + d w); w = w - r v``, which is 2012's for ``s = -1 / rate``,
        ``d = -rate decay`` and ``r = -1``.
        """
        alike: dict[tuple[float, float], list[str]] = defaultdict(list)
        for name in gradients:
            alike[self.recipe.coefficients(name, rate)].append(name)
        for (at, decay), names in alike.items():
            sgd(
                [parameters[name] for name in names],
                [_lying_like(parameters[name], gradients[name]) for name in names],
                [velocity[name] for name in names],
                fused=True,
                grad_scale=torch.tensor(-1 / at if at else -math.inf),
                weight_decay=-at * decay,
                momentum=self.recipe.momentum,
                lr=-1.0,
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )

    def _check_overflow(
        self, gradients: dict[str, Tensor], rate: Tensor, loss_scale: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """What makes an update of gradients, of which some may have overflowed, none at all then; and the next scale.

        The rule is the usual one (Micikevicius et al., "Mixed Precision Training", ICLR 2018, section 3.2): half the
        scale after an overflow, twice after `GROWTH` steps without. But it starts at 1, and is doubled at every step
        until the first overflow: no step is lost to a scale that was too large to begin with. Nothing waits for the
        device to tell.
        """
        finite = self._agreed(torch.stack([torch.isfinite(g).all() for g in gradients.values()]).all())
        scale, good, patience = loss_scale
        good = torch.where(finite, good + 1, 0.0)
        grows = good == patience
        loss_scale.copy_(
            torch.stack(
                [
                    torch.where(finite, torch.where(grows, scale * 2, scale), scale / 2).clamp(1.0, 2.0**24),
                    torch.where(grows, 0.0, good),
                    torch.where(finite, patience, GROWTH),
                ]
            )
        )
        kept = {name: torch.where(finite, g, 0.0) for name, g in gradients.items()}
        momentum = torch.where(finite, self.recipe.momentum, 1.0)
        return kept, torch.where(finite, rate, 0.0), momentum, finite.to(rate.dtype)

    # The work as the engine issues it.

    def _inferred(self, images: Tensor) -> Tensor:
        return self._forward(self._casts, images)

    def _trained(self, images: Tensor, labels: Tensor, ids: Tensor, step: Tensor, rate: Tensor) -> Tensor:
        _, loss, gradients = self._backward(images, labels, self._draw(ids, step))
        with torch.no_grad():
            self._update(self.parameters, self.velocity, gradients, rate)
        return loss

    def _backward(
        self, images: Tensor, labels: Tensor, masks: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The logits, their mean loss, and its gradients; a part of the batch after the other."""
        self.module.train()
        parts = self.settings.accumulate
        if len(images) % parts:
            raise InputError(f"a batch of {len(images)} cannot be taken in {parts} equal parts")
        size = len(images) // parts
        total: list[Tensor] = []
        told: list[tuple[Tensor, Tensor]] = []
        for i in range(0, len(images), size):
            part = slice(i, i + size)
            kept = {name: mask[part] for name, mask in masks.items()}
            logits, loss, gradients = self._losses_of(images[part], labels[part], kept, last=i + size == len(images))
            total = [a.add_(b) for a, b in zip(total, gradients, strict=True)] if total else gradients
            told.append((logits.detach(), loss.detach()))
        found = dict(zip(self.parameters, total, strict=True))
        if parts == 1:
            return *told[0], found
        return torch.cat([logits for logits, _ in told]), torch.stack([loss for _, loss in told]).mean(), found

    def _losses_of(
        self, images: Tensor, labels: Tensor, masks: dict[str, Tensor], *, last: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits and loss of one part of a batch, and its share of the gradients; `last` says that no other follows."""
        logits, loss = self._losses(self.parameters, images, labels, masks)
        gradients = torch.autograd.grad(self._scaled(loss), list(self.parameters.values()))
        return logits, loss, self._unscaled(list(gradients))

    def _scaled(self, loss: Tensor) -> Tensor:
        """The loss of one part as its share of the batch's, at the scale of float16's."""
        share = loss / self.settings.accumulate if self.settings.accumulate > 1 else loss
        return share if self.loss_scale is None else share * self.loss_scale[0]

    def _unscaled(self, gradients: list[Tensor]) -> list[Tensor]:
        return gradients if self.loss_scale is None else [g / self.loss_scale[0] for g in gradients]
