"""A user's own module: its session on a torch device, and what the gate needs of it on the processor.

Loaded by `open_module` and `own_models` of `torch_device` only.
"""

import copy
import importlib.util
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from portnet.contract import Array, LayerTime, Session, Settings, Trace, Unavailable, Unsupported, Weights
from portnet.errors import InputError
from portnet.onnx_export import _LARGEST, BATCH, INPUT, OUTPUT
from portnet.own_model import Model
from portnet_backends.torch_modes import captures, compiled, compiles, fp32_precision
from portnet_backends.torch_session import Captured, TorchSession

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
        self._begin(device_type, wait, settings)
        self.model = model
        self.stock = True
        self.module = copy.deepcopy(model.module)
        with torch.no_grad():
            for name, value in _state(self.module).items():
                value.copy_(torch.tensor(weights[name]))
        self.module.to(self._wide)
        self.module.to(self.device, memory_format=self._layout)  # type: ignore[call-overload]
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.velocity = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        if compiles(settings.engine):
            for name in ("_forward", "_losses", "_update"):
                setattr(self, name, compiled(getattr(self, name)))
        if captures(settings.engine):
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
        self,
        parameters: dict[str, Tensor],
        velocity: dict[str, Tensor],
        gradients: dict[str, Tensor],
        rate: Tensor,
        casts: Mapping[str, Tensor],
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
    """The module in evaluation mode as a serialised ONNX model, for batches of any size. Raises as `Frozen.export`."""
    return _export(copy.deepcopy(model.module).eval(), (torch.tensor(inputs),), [OUTPUT], dynamic=True).content


def freeze(module: object, example: object) -> "Frozen":
    """A copy of a module, and inputs for it; see `Frozen`."""
    return Frozen(module, example)


class Frozen:
    """A module's copy in evaluation mode on the processor, and an example of its inputs; the module stays as it is.

    `example` are the inputs as arrays. What the caller's torch is set to (its generator, autocast, how products of
    float32 are made) neither counts here nor is it changed. Raises `InputError` for what is no module, cannot be copied
    or has parameters narrower than float32 or without values, and for inputs that are no tensors or NumPy arrays.
    """

    def __init__(self, module: object, example: object) -> None:
        if not isinstance(module, nn.Module):
            raise InputError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError("module must be no TorchScript; give the module that it was made from")
        module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
        for name, value in module.named_parameters():
            if nn.parameter.is_lazy(value) or value.is_meta:
                raise InputError(f"the module's {name} has no values yet; load them, or run the module once")
            if value.dtype not in (torch.float32, torch.float64) and (value.is_floating_point() or value.is_complex()):
                raise InputError(f"the module's {name} is {value.dtype}; export it in float32: module.float()")
        self.example = tuple(_array(value) for value in (example if isinstance(example, tuple) else (example,)))
        if not self.example:
            raise InputError("example must hold the module's inputs, got an empty tuple")
        try:
            self.module: nn.Module = copy.deepcopy(module).to("cpu").eval()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise InputError(f"the module cannot be copied to the processor: {_first_line(error)}") from error
        self.drew = False
        """Whether any run moved torch's generator, which is seeded otherwise for each."""
        self._runs = 0

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """What the module gives: its tensors in the order of ``torch.utils._pytree``.

        Raises `InputError` where it fails, or gives anything but tensors of dtypes that NumPy has.
        """
        with _plain(), fp32_precision("ieee"):
            torch.default_generator.manual_seed(self._runs)
            self._runs, before = self._runs + 1, torch.get_rng_state()
            try:
                given = tree_leaves(self.module(*(torch.tensor(a, device="cpu") for a in inputs)))
            except Exception as error:  # a foreign module's
                told = ", ".join(f"{a.dtype} {a.shape}" for a in inputs)
                remedy = "example must be of the number, dtypes (NumPy's own is float64) and shapes that forward takes"
                if inputs is not self.example:
                    remedy = "if it works for one size of the batch alone, pass dynamic_batch=False"
                raise InputError(f"the module fails on {told}: {_first_line(error)}; {remedy}") from error
            self.drew |= not torch.equal(before, torch.get_rng_state())
        for value in given:
            if not isinstance(value, Tensor):
                raise InputError(f"the module must return tensors, got {type(value).__name__}")
        if not given:
            raise InputError("the module must return tensors, got none")
        return [_array(value) for value in given]

    def layers(self) -> dict[str, Array]:
        """What each submodule gives on the example, if it is called once and gives one tensor; by its name."""
        seen: dict[str, list[object]] = defaultdict(list)

        def note(name: str, _module: object, _inputs: object, value: object) -> None:
            # A copy, for the next layer may work in place.
            seen[name].append(value.clone() if isinstance(value, Tensor) else value)

        hooks = [m.register_forward_hook(partial(note, name)) for name, m in self.module.named_modules() if name]
        try:
            self.run(self.example)
        finally:
            for hook in hooks:
                hook.remove()
        return {
            name: _array(value)
            for name, (value, *more) in seen.items()
            if not more and isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float64)
        }

    def export(self, outputs: int, *, dynamic: bool) -> "Exported":
        """The module as torch exports it. With `dynamic` its inputs' first axis is open, and called as PortNet's is.

        One input or output is called as PortNet's own; several (`outputs`) are numbered. Raises `Unavailable` without
        onnxscript, which torch's exporter is written in, `Unsupported` where it fails, and `InputError` for what one
        file cannot hold.
        """
        inputs = tuple(torch.tensor(a, device="cpu") for a in self.example)
        if dynamic and len(inputs[0]) == 1:
            # What is of one item torch takes for fixed.
            inputs = tuple(torch.cat([value, value]) for value in inputs)
        names = [OUTPUT] if outputs == 1 else [f"output_{i}" for i in range(outputs)]
        for name in (INPUT, OUTPUT):
            if name in self.module.state_dict():
                raise InputError(f"a parameter cannot be called {name!r} in ONNX, where that names an end; rename it")
        try:
            with _plain():
                return _export(self.module, inputs, names, dynamic=dynamic)
        except Unsupported as error:
            if not dynamic:
                raise
            raise Unsupported(
                f"{error}; if the open batch is what it stumbles over, pass dynamic_batch=False"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A serialised ONNX model, and by submodule its value that holds what the submodule gives, as far as that is sure.

    The exporter calls a value after the node of torch's graph that it comes from. A submodule's is the only one that
    its nodes hand to others; of submodules that end in the same node the innermost is named. What the exporter fused
    into something else, such as a convolution before a batch normalisation, has no such value.
    """

    content: bytes
    inputs: list[str]
    outputs: list[str]
    layers: Mapping[str, str]


def _export(module: nn.Module, inputs: tuple[Tensor, ...], outputs: list[str], *, dynamic: bool) -> Exported:
    if importlib.util.find_spec("onnxscript") is None:
        raise Unavailable("torch.onnx.export needs onnxscript", "pip install 'portnet[model]'")
    names = [INPUT] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))]
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")
        try:
            program: Any = torch.onnx.export(
                module,
                inputs,
                dynamo=True,
                verbose=False,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=_dynamic(module, len(inputs)) if dynamic else None,
            )
            size = sum(v.const_value.nbytes for v in program.model.graph.initializers.values())
            if size > _LARGEST:
                raise InputError(
                    f"the module's weights take {size / 2**30:.2g} GiB, and one ONNX file holds less than 2; make it "
                    "smaller, or call torch.onnx.export, which writes several files"
                )
            model = program.model_proto
        # Its own errors have no common base; the last line of what it says is the cause.
        except Exception as error:
            if isinstance(error, InputError):
                raise
            raise Unsupported(f"torch.onnx.export failed: {_first_line(error.__cause__ or error)}") from error
    for value in model.graph.input if dynamic else ():
        if value.type.tensor_type.shape.dim[0].dim_param != BATCH:
            raise Unsupported(
                f"torch.onnx.export fixed the batch at {len(inputs[0])}: the module works for that size alone"
            )
    layers = _layer_values(program, outputs, {name for node in model.graph.node for name in node.output})
    for graph in (model.graph, *model.functions):
        _strip(graph)
    content = bytes(model.SerializeToString(deterministic=True))
    return Exported(content=content, inputs=names, outputs=outputs, layers=layers)


def _dynamic(module: nn.Module, inputs: int) -> tuple[Any, ...]:
    """The inputs' first axes as torch asks for it, by `forward`'s parameters: those of ``*args`` as a tuple."""
    batch = ({0: torch.export.Dim(BATCH)},) * inputs
    kinds = [p.kind for p in signature(module.forward).parameters.values()]
    if Parameter.VAR_POSITIONAL in kinds:
        plain = min(kinds.index(Parameter.VAR_POSITIONAL), inputs)
        return (*batch[:plain], batch[plain:])
    return batch


def _layer_values(program: Any, outputs: list[str], there: set[str]) -> dict[str, str]:
    # The file's outputs have names of their own.
    renamed = dict(zip(program.exported_program.graph_signature.user_outputs, outputs, strict=False))
    given: dict[tuple[str, str], list[str]] = defaultdict(list)
    for node in program.exported_program.graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            for call, (name, *_) in (node.meta.get("nn_module_stack") or {}).items():
                if any(call not in (user.meta.get("nn_module_stack") or {}) for user in node.users):
                    given[call, name].append(renamed.get(node.name, node.name))
    innermost: dict[str, str] = {}
    for (_, name), values in given.items():
        if name and len(values) == 1 and values[0] in there:
            innermost[values[0]] = max(innermost.get(values[0], ""), name, key=lambda n: n.count(".") + bool(n))
    return {name: value for value, name in innermost.items()}


def _strip(graph: Any) -> None:
    """Take out where on this machine each operator's source stands, which the exporter writes into the file."""
    for node in graph.node:
        kept = [p for p in node.metadata_props if not p.key.endswith("stack_trace")]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        for attribute in node.attribute:
            _strip(attribute.g)


@contextmanager
def _plain() -> Iterator[None]:
    """A module as it stands, whatever its caller is about; the caller's generator is put back."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Loggers that tell errors only: they warn of what no module need have, such as torchvision's operators."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _array(value: object) -> Array:
    """A copy on the host. Raises `InputError` for what is no dense tensor or array of booleans, integers or floats."""
    if isinstance(value, Tensor):
        try:
            value = value.detach().cpu().numpy()
        except (TypeError, RuntimeError) as error:  # bfloat16, sparse, without values
            raise InputError(f"tensors must be dense and of a dtype that NumPy has: {_first_line(error)}") from error
    if not isinstance(value, np.ndarray):
        raise InputError(f"inputs must be tensors or NumPy arrays (several as a tuple), got {type(value).__name__}")
    if value.dtype.kind not in "biuf" or value.dtype.itemsize > 8:
        raise InputError(f"tensors must be booleans, integers or floats, got {value.dtype}")
    return np.array(value, value.dtype.newbyteorder("="), order="C")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def open_module(
    device_type: str, wait: Callable[[], None], model: Model, weights: Weights, settings: Settings
) -> Session:
    """The module on a device. Raises `Unsupported` for what only PortNet's own network can do."""
    if settings.formulation != "portable":
        raise Unsupported(f"formulation {settings.formulation!r} is of PortNet's own network; a module runs as it is")
    return OwnSession(device_type, wait, model, weights, settings)
