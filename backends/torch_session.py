"""A graph as a plain ``nn.Module``, and its session on one torch device."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from portnet.contract import Array, LayerTime, Session, Settings, Trace, Weights
from portnet.graph import LRN, AdaptiveAvgPool, Conv, Dropout, Flatten, Graph, Layer, Linear, MaxPool, Pad, ReLU
from portnet_backends import torch_philox

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class _AcrossChannels(torch.autograd.Function):
    """LRN as one 1x1 convolution with a banded matrix; only the input and the factor are kept for the backward pass.

    With ``d = k + B x^2`` and ``f = d^-beta``: ``y = x f`` and
    ``dx = g f - 2 beta x B^T (g x f / d)``, where B holds alpha / size in its band. Sums of squares stay in float32
    (float64 for float64), also where products may use TF32: their cancellation-free sums are LRN's whole meaning.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, band: Tensor, groups: int, beta: float, k: float) -> Tensor:
        wide = x.to(band.dtype)
        with fp32_precision("ieee"):
            factor = F.conv2d(wide * wide, band, groups=groups).add_(k).pow_(-beta)
        ctx.save_for_backward(x, factor, band)
        ctx.groups, ctx.beta = groups, beta
        return (wide * factor).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, factor, band = ctx.saved_tensors
        wide, g = x.to(band.dtype), g.to(band.dtype)
        outer = g * factor
        inner = outer * wide * factor.pow(1 / ctx.beta)
        with fp32_precision("ieee"):
            # The transposed convolution applies B^T.
            across = F.conv_transpose2d(inner, band, groups=ctx.groups)
        return (outer - (2 * ctx.beta) * wide * across).to(x.dtype), None, None, None, None


class LocalResponseNorm(nn.Module):
    """LRN within each of `groups` runs of channels; see `portnet.graph.LRN` for the formula."""

    def __init__(self, layer: LRN, channels: int, *, stock: bool) -> None:
        super().__init__()
        self.layer, self.stock = layer, stock
        width = channels // layer.groups
        # On the host and in float64 whatever the defaults, to be cast once when the module moves to its device.
        channel = torch.arange(width, device="cpu")
        offset = channel[None, :] - channel[:, None] + layer.size // 2
        band = ((offset >= 0) & (offset < layer.size)).double() * (layer.alpha / layer.size)
        self.register_buffer("band", band.repeat(layer.groups, 1)[:, :, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stock:
            towers = x.chunk(self.layer.groups, dim=1)
            normed = [
                F.local_response_norm(t, self.layer.size, self.layer.alpha, self.layer.beta, self.layer.k)
                for t in towers
            ]
            return normed[0] if len(normed) == 1 else torch.cat(normed, dim=1)
        return _AcrossChannels.apply(x, self.band, self.layer.groups, self.layer.beta, self.layer.k)  # type: ignore[no-any-return, no-untyped-call]

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


def _module(layer: Layer, channels: int, *, stock: bool) -> nn.Module:
    match layer:
        case Pad():
            return nn.ZeroPad2d((0, layer.right, 0, layer.bottom))
        case Conv():
            return nn.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel, layer.stride, layer.padding, groups=layer.groups
            )
        case Linear():
            return nn.Linear(layer.in_features, layer.out_features)
        case ReLU():
            return nn.ReLU()
        case LRN():
            return LocalResponseNorm(layer, channels, stock=stock)
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
    """The graph's chain as an ``nn.Module`` whose parameters have the graph's names; takes and gives NCHW tensors."""

    def __init__(self, graph: Graph, *, stock: bool = False) -> None:
        super().__init__()
        for step in graph.steps:
            self.add_module(step.layer.name, _module(step.layer, step.input[0], stock=stock))

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


class TorchSession(Session):
    """A network on a torch device.

    Weights are kept in float32 (float64 for float64). In bfloat16 and float16 the portable formulation casts them at
    each use; the stock one leaves that to autocast.
    """

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
        # Made without values, so that torch neither draws 61 million of its own nor moves its generator.
        with torch.device("meta"):
            self.module = Network(graph, stock=self.stock)
        state = {name: torch.tensor(weights[name], dtype=torch.float32) for name in graph.parameters}
        self.module.load_state_dict(state, assign=True)
        self.module.to(torch.float64 if self.dtype == torch.float64 else torch.float32).to(self.device)
        self.parameters = dict(self.module.named_parameters())
        self.velocity = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self._casts: dict[str, Tensor] = {}
        self._cast_from: tuple[int, ...] = ()

    def put(self, array: Array) -> Tensor:
        return torch.tensor(array, device=self.device)

    def get(self, value: Tensor) -> Array:
        wide = value.float() if self.narrow and value.is_floating_point() else value
        return wide.detach().cpu().numpy().copy()

    def weights(self) -> dict[str, Array]:
        return {name: p.detach().cpu().numpy().copy() for name, p in self.parameters.items()}

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

    def latest_weights(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1)[-1:] for p in self.parameters.values()])

    def infer(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            # The module is the user's too, who may have changed its weights in place.
            versions = tuple(p._version for p in self.parameters.values())
            if self._cast_from != versions:
                self._casts, self._cast_from = self._operands(), versions
            self.module.eval()
            return self._forward(images, self._casts)

    def masks(self, ids: Array, *, step: int) -> dict[str, npt.NDArray[np.bool_]]:
        return {name: mask.cpu().numpy().copy() for name, mask in self._masks(self.put(ids), step).items()}

    def trace(self, images: Array, labels: Array | None = None, masks: Mapping[str, Array] | None = None) -> Trace:
        record: dict[str, Tensor] = {}
        if labels is None:
            with torch.inference_mode():
                self.module.eval()
                logits = self._forward(self.put(images), self._operands(), record=record)
            return Trace(layers={k: self.get(v) for k, v in record.items()}, logits=self.get(logits))
        on_device = {k: self.put(m) for k, m in (masks or {}).items()}
        logits, loss, gradients = self._backward(self.put(images), self.put(labels), on_device, record)
        return Trace(
            layers={k: self.get(v) for k, v in record.items()},
            logits=self.get(logits),
            loss=float(self.get(loss)),
            gradients={k: self.get(g) for k, g in gradients.items()},
        )

    def train_step(self, images: Tensor, labels: Tensor, ids: Tensor, *, step: int, learning_rate: float) -> Tensor:
        _, loss, gradients = self._backward(images, labels, self._masks(ids, step))
        with torch.no_grad():
            for name, gradient in gradients.items():
                rate, decay = self.graph.recipe.coefficients(name, learning_rate)
                v, w = self.velocity[name], self.parameters[name]
                v.mul_(self.graph.recipe.momentum).add_(w, alpha=-decay * rate).add_(gradient, alpha=-rate)
                w.add_(v)
        return loss

    def _masks(self, ids: Tensor, step: int) -> dict[str, Tensor]:
        return {
            s.layer.name: torch_philox.keep_mask(self.settings.seed, i, ids, step, s.output[0], s.layer.p)
            for i, s in enumerate(self.graph.dropouts)
            if isinstance(s.layer, Dropout)
        }

    def _operands(self) -> dict[str, Tensor]:
        """The parameters as the forward pass is to use them."""
        if self.narrow and not self.stock:
            return {name: p.to(self.dtype) for name, p in self.parameters.items()}
        return self.parameters

    def _forward(
        self,
        images: Tensor,
        operands: dict[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
        record: dict[str, Tensor] | None = None,
    ) -> Tensor:
        autocast = torch.autocast(self.device.type, self.dtype) if self.narrow and self.stock else nullcontext()
        images = images if self.narrow and self.stock else images.to(self.dtype)
        with fp32_precision("tf32" if self.settings.precision == "tf32" else "ieee"), autocast:
            return torch.func.functional_call(self.module, operands, (images, masks, record))  # type: ignore[no-any-return]

    def _backward(
        self, images: Tensor, labels: Tensor, masks: Mapping[str, Tensor], record: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        self.module.train()
        logits = self._forward(images, self._operands(), masks, record)
        loss = F.cross_entropy(logits.float() if self.narrow else logits, labels)
        with fp32_precision("tf32" if self.settings.precision == "tf32" else "ieee"):
            gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        return logits.detach(), loss.detach(), dict(zip(self.parameters, gradients, strict=True))
