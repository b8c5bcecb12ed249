"""A graph as a plain ``nn.Module``, and its session on one torch device."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.sgd import sgd

from portnet.contract import Array, LayerTime, Session, Settings, Trace, Weights
from portnet.errors import InputError
from portnet.graph import (
    Dropout,
    Graph,
    Recipe,
)
from portnet.host import instruction_sets
from portnet_backends import torch_philox
from portnet_backends.amx import no_amx
from portnet_backends.torch_layers import BlockConv, MaxPool2d, layer_module
from portnet_backends.torch_modes import captures, choose_kernels, compiled, compiles, fp32_precision, without
from portnet_backends.torch_norms import LocalResponseNorm, lying_like
from portnet_backends.torch_rows import Row, rows

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Network(nn.Module):
    """The graph's chain as an ``nn.Module`` whose parameters have the graph's names; takes and gives NCHW tensors.

    `formulation` and `engine` are the backend's; see `LocalResponseNorm` and, for `in_rows`, `Row` for what engine
    ``regions`` makes of it.
    """

    def __init__(
        self, graph: Graph, formulation: str = "portable", engine: str = "eager", *, in_rows: bool = False
    ) -> None:
        super().__init__()
        for step in graph.steps:
            self.add_module(step.layer.name, layer_module(step.layer, step.input[0], formulation, engine))
        self._left_to_the_next = set()
        self._rows: dict[str, Row] = {}
        if engine == "regions" and formulation == "portable":
            self._rows = dict(rows(graph)) if in_rows else {}
            self._join()

    def _join(self) -> None:
        """Have layers take over what the one before them does, where one loop does both, or does less."""
        ends = {row.last for row in self._rows.values()}  # the two images are parted behind it
        for (name, layer), (_, following) in pairwise([("", None), *self.named_children()]):
            if isinstance(following, BlockConv):
                following.looped = True
            if isinstance(layer, nn.ZeroPad2d) and isinstance(following, BlockConv):
                _, right, _, bottom = layer.padding
                following.beyond = (right, bottom)
            elif (
                isinstance(layer, nn.ReLU) and isinstance(following, LocalResponseNorm | MaxPool2d) and name not in ends
            ):
                following.rectifies = True
            else:
                continue
            self._left_to_the_next.add(name)

    @property
    def takes_pixels(self) -> bool:
        """Whether images may come in any precision and layout."""
        first = next(layer for name, layer in self.named_children() if name not in self._left_to_the_next)
        return isinstance(first, BlockConv) and first.looped

    def forward(
        self, x: Tensor, masks: Mapping[str, Tensor] | None = None, record: dict[str, Tensor] | None = None
    ) -> Tensor:
        row: Row | None = None
        for name, layer in self.named_children():
            left = name in self._left_to_the_next
            if left and record is None:
                continue
            if name in self._rows and len(x) % 2 == 0:
                row = self._rows[name]
                x = row.join(x)
            y = layer(x, masks[name]) if masks is not None and name in masks else layer(x)
            if row and isinstance(layer, nn.Conv2d):
                y = row.clear(y)
            if record is not None:
                record[name] = row.part(y) if row else y
            if row and name == row.last:
                row, y = None, row.part(y)
            x = x if left else y
        return x


VELOCITY, LOSS_SCALE = "velocity.", "loss_scale"
"""How `Session.state` names the velocities, and the loss's scale in float16."""
GROWTH = 2000.0
"""Steps without an overflow after which float16's loss is scaled by twice as much."""


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
    are functions of tensors alone, run as they are (``eager``), each through torch's compiler (``compile``), captured
    as one device graph for inference and one for a training step (``graph``), or both (``compile-graph``). In float16
    the loss is scaled for the backward pass, and a step whose gradients overflow is left out.
    """

    capture = staticmethod(device_capture)
    _takes_pixels = False
    _narrow_update = False
    """Whether gradients go into the update in bfloat16, as they come, and the next step's weights come out of it."""

    def __init__(
        self, device_type: str, wait: Callable[[], None], graph: Graph, weights: Weights, settings: Settings
    ) -> None:
        self._begin(device_type, wait, settings)
        self.graph = graph
        self.stock = settings.formulation == "stock"
        # Made without values, so that torch neither draws 61 million of its own nor moves its generator.
        with torch.device("meta"):
            self.module = self._network()
        owned = self._owned(weights)
        state = {name: torch.tensor(owned[name], dtype=torch.float32) for name, _ in self.module.named_parameters()}
        self.module.load_state_dict(state, assign=True)
        self.module.to(self._wide)
        self.module.to(self.device, memory_format=self._layout)  # type: ignore[call-overload]
        self.parameters = dict(self.module.named_parameters())
        self._takes_pixels = isinstance(self.module, Network) and self.module.takes_pixels
        self.velocity: dict[str, Tensor] = {}
        self.recipe = graph.recipe
        # The factor on the loss, without which small gradients would vanish; the steps since it last changed; and after
        # how many without an overflow it is doubled.
        float16 = self.dtype == torch.float16
        self.loss_scale = torch.tensor([1.0, 0.0, 1.0], device=self.device) if float16 else None
        # Elsewhere the rate stays on the device, and compilers fuse the update themselves.
        plainly = settings.engine in ("eager", "regions") and settings.precision in ("float32", "bfloat16")
        self._at_once = self.device.type == "cpu" and plainly
        self._narrow_update = settings.engine == "regions" and self.dtype == torch.bfloat16 and not self.stock
        whole = ("_forward", "_losses", "_draw", "_update") if compiles(settings.engine) else ()
        for name in ("_update",) if self._narrow_update else whole:
            setattr(self, name, compiled(getattr(self, name)))
        if captures(settings.engine):
            self._infer = Captured(self._inferred, capture=self.capture)

    def _begin(self, device_type: str, wait: Callable[[], None], settings: Settings) -> None:
        """What sessions of any module begin with."""
        from portnet_backends import torch_probe

        self.settings, self._wait, self.device = settings, wait, torch.device(device_type)
        torch_probe.forget_peak(self.device)
        choose_kernels()
        self.dtype = DTYPES[settings.precision]
        self.narrow = self.dtype in (torch.bfloat16, torch.float16)
        self._wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self._layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        self._casts: dict[str, Tensor] = {}
        self._cast_from: tuple[int, ...] = ()
        self._infer: Callable[..., Tensor] = self._inferred
        self._train: Callable[..., Tensor] = self._trained

    # What a session that shares the network with others does in its own way; see `torch_parallel`.

    def _network(self) -> nn.Module:
        # Without AMX two images in a row make a step 1 to 2% longer.
        in_rows = not no_amx(instruction_sets(), self.settings.precision)
        return Network(self.graph, self.settings.formulation, self.settings.engine, in_rows=in_rows)

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
        self._cast()
        with torch.inference_mode(), self._as_set():
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
        self._cast_from = self._versions() if self._narrow_update else ()
        return loss

    def _start_training(self) -> None:
        """Make what training alone needs: a session that infers must not pay for it in memory."""
        self.velocity = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self._capture_training()

    def _capture_training(self) -> None:
        """Under graph capture, a captured step of its own for each recipe: the coefficients are part of it."""
        if captures(self.settings.engine):
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

    def _versions(self) -> tuple[int, ...]:
        return tuple(p._version for p in self.parameters.values())

    @torch.no_grad()
    def _cast(self) -> None:
        """Renew the operands of inference, in the memory that they have: a captured graph reads it.

        The module is the user's too, who may have changed its weights in place.
        """
        versions = self._versions()
        if self._cast_from == versions:
            return
        self._cast_from = versions
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
        dtype = images.dtype if self.narrow and self.stock else self.dtype
        if not self._takes_pixels:
            images = images.to(dtype, memory_format=self._layout if images.dim() == 4 else torch.preserve_format)
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
        self,
        parameters: dict[str, Tensor],
        velocity: dict[str, Tensor],
        gradients: dict[str, Tensor],
        rate: Tensor,
        casts: Mapping[str, Tensor],
    ) -> None:
        """One step of the recipe, in place; `casts` are to become the new weights, in their own precision."""
        momentum: float | Tensor = self.recipe.momentum
        moved: Tensor | None = None
        if self._at_once and momentum and not casts:
            self._update_at_once(parameters, velocity, gradients, float(rate))
            return
        if self.loss_scale is not None:
            gradients, rate, momentum, moved = self._check_overflow(gradients, rate, self.loss_scale)
        for name, gradient in gradients.items():
            scale, decay = self.recipe.coefficients(name, 1.0)
            v, w = velocity[name], parameters[name]
            wide = gradient.to(v.dtype)
            v.mul_(momentum).addcmul_(w, rate, value=-decay * scale).addcmul_(wide, rate, value=-scale)
            w.add_(v) if moved is None else w.addcmul_(v, moved)
            if name in casts:
                casts[name].copy_(w)

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
                [lying_like(parameters[name], gradients[name]) for name in names],
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
            self._update(self.parameters, self.velocity, gradients, rate, self._casts if self._narrow_update else {})
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
        parameters = self.parameters
        if self._narrow_update:
            self._cast()
            parameters = {name: value.detach().requires_grad_() for name, value in self._casts.items()}
        logits, loss = self._losses(parameters, images, labels, masks)
        gradients = torch.autograd.grad(self._scaled(loss), list(parameters.values()))
        # Sums over parts of a batch are wide.
        if self._narrow_update and self.settings.accumulate > 1:
            gradients = tuple(g.to(self._wide) for g in gradients)
        return logits, loss, self._unscaled(list(gradients))

    def _scaled(self, loss: Tensor) -> Tensor:
        """The loss of one part as its share of the batch's, at the scale of float16's."""
        share = loss / self.settings.accumulate if self.settings.accumulate > 1 else loss
        return share if self.loss_scale is None else share * self.loss_scale[0]

    def _unscaled(self, gradients: list[Tensor]) -> list[Tensor]:
        return gradients if self.loss_scale is None else [g / self.loss_scale[0] for g in gradients]
