"""A user's own module: its session on a torch device, and what the gate needs of it on the processor.

Loaded by `open_module` and `own_models` of `torch_device` only.
"""

import copy
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from portnet.contract import Array, LayerTime, Session, Settings, Trace, Unavailable, Unsupported, Weights
from portnet.errors import InputError
from portnet.onnx_export import INPUT, OUTPUT
from portnet.own_model import Model
from portnet_backends.torch_session import DTYPES, Captured, TorchSession, _compiled

_SAMPLE = 64
"""How many elements of each parameter `latest_weights` shows at most."""


class OwnSession(TorchSession):
    """A user's module on a torch device; `portnet.own_model` says how its precisions are meant.

    Takes what `TorchSession` defines of tensors alone (forward pass, loss, update) and how an engine issues it; what
    differs is the module, its loss, and that nothing is drawn at random. `weights` gives parameters and floating-point
    buffers.
    """

    def __init__(
        self, device_type: str, wait: Callable[[], None], model: Model, weights: Weights, settings: Settings
    ) -> None:
        from portnet_backends import torch_probe

        self.model, self.settings, self._wait = model, settings, wait
        self.device = torch.device(device_type)
        torch_probe.forget_peak(self.device)
        self.dtype = DTYPES[settings.precision]
        self.narrow = self.dtype in (torch.bfloat16, torch.float16)
        self.stock = True
        self._layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        self._wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.module = copy.deepcopy(model.module)
        with torch.no_grad():
            for name, value in _state(self.module).items():
                value.copy_(torch.tensor(weights[name]))
        self.module.to(self._wide)
        self.module.to(self.device, memory_format=self._layout)  # type: ignore[call-overload]
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.velocity = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self._casts: dict[str, Tensor] = {}
        self._cast_from: tuple[int, ...] = ()
        self._infer: Callable[..., Tensor] = self._inferred
        self._train: Callable[..., Tensor] = self._trained
        if settings.engine == "compile":
            for name in ("_forward", "_losses", "_update"):
                setattr(self, name, _compiled(getattr(self, name)))
        elif settings.engine == "graph":
            self._infer = Captured(self._inferred, capture=self.capture)
            changed = [*self.parameters.values(), *self.velocity.values(), *self.module.buffers()]
            self._train = Captured(self._trained, changed, capture=self.capture)

    def weights(self) -> dict[str, Array]:
        return _host(self.module)

    def latest_weights(self) -> Tensor:
        # The velocity too: at the rate of a timed step it moves by more than its rounding, weights may not.
        kept = [*self.parameters.values(), *self.velocity.values()]
        with torch.no_grad():
            return torch.cat([v.reshape(-1)[:: max(1, v.numel() // _SAMPLE)][:_SAMPLE] for v in kept])

    def masks(self, ids: Any, *, step: int) -> dict[str, Any]:
        return {}

    def layer_times(self, images: Array, labels: Array | None = None) -> Mapping[str, LayerTime]:
        return {}

    def trace(self, images: Array, labels: Array | None = None, masks: Mapping[str, Array] | None = None) -> Trace:
        if labels is None:
            return Trace(layers={}, logits=self.get(self.infer(self.put(images))))
        with self._as_set():
            outputs, loss, gradients = self._backward(self.put(images), self.put(labels), {})
        shown = {name: self.get(g) for name, g in gradients.items()}
        return Trace(layers={}, logits=self.get(outputs), loss=float(self.get(loss)), gradients=shown)

    # The work, of tensors alone.

    def _pass(self, operands: dict[str, Tensor], images: Tensor, *_: Any) -> Tensor:
        x = images.to(self._wide) if images.is_floating_point() else images
        if x.dim() == 4:
            x = x.contiguous(memory_format=self._layout)
        with torch.autocast(self.device.type, self.dtype) if self.narrow else nullcontext():
            return torch.func.functional_call(self.module, operands, (x,))  # type: ignore[no-any-return]

    def _losses(
        self, parameters: dict[str, Tensor], images: Tensor, labels: Tensor, masks: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        outputs = self._pass(parameters, images)
        targets = labels.to(self._wide) if labels.is_floating_point() else labels
        return outputs, self.model.loss(outputs.to(self._wide), targets)

    def _draw(self, ids: Tensor, step: Tensor) -> dict[str, Tensor]:
        return {}

    def _update(
        self, parameters: dict[str, Tensor], velocity: dict[str, Tensor], gradients: dict[str, Tensor], rate: Tensor
    ) -> None:
        momentum, decay = self.model.momentum, self.model.weight_decay
        for name, gradient in gradients.items():
            v, w = velocity[name], parameters[name]
            v.mul_(momentum).addcmul_(w, rate, value=-decay).addcmul_(gradient, rate, value=-1)
            w.add_(v)

    def _backward(
        self, images: Tensor, labels: Tensor, masks: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        self.module.train()
        outputs, loss = self._losses(self.parameters, images, labels, masks)
        found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True, materialize_grads=True)
        return outputs.detach(), loss.detach(), dict(zip(self.parameters, found, strict=True))


def _state(module: nn.Module) -> dict[str, Tensor]:
    """What a session starts from: parameters and floating-point buffers, each once."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: value for name, value in named if value.is_floating_point()}


def _host(module: nn.Module) -> dict[str, Array]:
    return {name: value.detach().cpu().numpy().copy() for name, value in _state(module).items()}


# What `portnet.own_model` asks for.


def build(factory: Callable[[], object], seed: int) -> Model:
    """What `factory` makes, with torch's generator for the processor seeded. Raises `InputError` if it is no model."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        model = factory()
    finally:
        torch.set_rng_state(before)
    if not isinstance(model, Model):
        raise InputError(f"it must return a portnet.Model, got {type(model).__name__}")
    if not isinstance(model.module, nn.Module):
        raise InputError(f"Model.module must be a torch.nn.Module, got {type(model.module).__name__}")
    for name, value in _state(model.module).items():
        if value.dtype != torch.float32 or value.device.type != "cpu":
            raise InputError(
                f"the module's {name} must be float32 on the processor, got {value.dtype} on {value.device}; PortNet "
                "moves and casts it"
            )
    return model


def weights(model: Model) -> dict[str, Array]:
    """Parameters and floating-point buffers, float32."""
    return _host(model.module)


def check(model: Model, inputs: Array, targets: Array) -> None:
    """Raises `InputError` unless the module gives one tensor, batch first, and the loss one number."""
    with torch.no_grad():
        try:
            outputs = copy.deepcopy(model.module).eval()(torch.tensor(inputs))
            if not isinstance(outputs, Tensor) or outputs.dim() < 2 or len(outputs) != len(inputs):
                got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
                raise InputError(f"the module must return one tensor (n, channels, ...), n = {len(inputs)}; got {got}")
            loss = model.loss(outputs, torch.tensor(targets))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"the module or its loss fails on inputs {inputs.dtype} {inputs.shape} and targets {targets.dtype} "
                f"{targets.shape} of its own batch: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise InputError(f"the loss must be one number (a tensor of shape ()), got {loss!r:.80}")


def baseline(model: Model, weights: Weights, precision: str, *, channels_last: bool = False) -> OwnSession:
    """The module on the processor as it stands: float64 the reference, otherwise what the precision costs there."""
    kind = _Tf32 if precision == "tf32" else OwnSession
    return kind("cpu", lambda: None, model, weights, Settings(precision=precision, channels_last=channels_last))


class _Tf32(OwnSession):
    """TF32 in float32: the operands of products and convolutions lose their 13 last bits, as tensor cores drop them."""

    @contextmanager
    def _as_set(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(super()._as_set())
            stack.enter_context(_Truncating())
            yield


class _Truncating(TorchDispatchMode):
    # Where an operator's factors stand among its arguments.
    FACTORS = {  # noqa: RUF012
        torch.ops.aten.mm: (0, 1),
        torch.ops.aten.bmm: (0, 1),
        torch.ops.aten.addmm: (1, 2),
        torch.ops.aten.baddbmm: (1, 2),
        torch.ops.aten.convolution: (0, 1),
        torch.ops.aten.convolution_backward: (0, 1, 2),
    }

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, at = kwargs or {}, self.FACTORS.get(function.overloadpacket)
        if at is None:
            # In inference mode linear and matmul arrive whole.
            with self:
                parts = function.decompose(*args, **kwargs)
            return function(*args, **kwargs) if parts is NotImplemented else parts
        return function(*(_truncated(a) if i in at else a for i, a in enumerate(args)), **kwargs)


def _truncated(value: Tensor) -> Tensor:
    return (value.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def flops(model: Model, inputs: Array, targets: Array, *, training: bool) -> int:
    """FLOPs of products, convolutions and attention of one pass, two per multiply-accumulate, as torch counts them."""
    session = baseline(model, weights(model), "float32")
    with FlopCounterMode(display=False) as counter:
        if training:
            session.trace(inputs, targets)
        else:
            session.module.eval()
            with torch.no_grad():
                session._forward(session.parameters, session.put(inputs))
    return int(counter.get_total_flops())


def export(model: Model, inputs: Array) -> bytes:
    """The module in evaluation mode as a serialised ONNX model, for batches of any size.

    Raises `Unavailable` without onnxscript, which torch's exporter is written in, and `Unsupported` where it fails.
    """
    if importlib.util.find_spec("onnxscript") is None:
        raise Unavailable("torch.onnx.export needs onnxscript", "pip install 'portnet[model]'")
    module = copy.deepcopy(model.module).eval()
    said = logging.getLogger("torch.onnx")
    level = said.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said.setLevel(logging.ERROR)  # it warns that torchvision is missing, whose operators no module need have
        try:
            program = torch.onnx.export(
                module,
                (torch.tensor(inputs),),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            )
            assert program is not None
            return bytes(program.model_proto.SerializeToString())
        # Its own errors have no common base; the last line of what it says is the cause.
        except Exception as error:
            cause = error.__cause__ or error
            first = str(cause).strip().partition("\n")[0]
            raise Unsupported(f"torch.onnx.export failed: {type(cause).__name__}: {first}") from error
        finally:
            said.setLevel(level)


def open_module(
    device_type: str, wait: Callable[[], None], model: Model, weights: Weights, settings: Settings
) -> Session:
    """The module on a device. Raises `Unsupported` for what only PortNet's own network can do."""
    if settings.formulation != "portable":
        raise Unsupported(f"formulation {settings.formulation!r} is of PortNet's own network; a module runs as it is")
    return OwnSession(device_type, wait, model, weights, settings)
