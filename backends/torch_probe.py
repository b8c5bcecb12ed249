"""What can be learnt about a torch device and a session on it: ceilings, single layers, fallbacks, events, memory."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from portnet.contract import Array, Ceilings, LayerTime
from portnet_backends import timing
from portnet_backends.torch_modes import compiled, compiles, fp32_precision, has_onednn, onednn_linear
from portnet_backends.torch_session import DTYPES

if TYPE_CHECKING:
    from portnet_backends.torch_session import TorchSession

_TILE = 1024


def ceilings(device: torch.device, wait: Callable[[], None], precision: str) -> Ceilings:
    """The device's best square product in `precision` and best copy, as `portnet.contract.Ceilings` has them.

    Takes 3 to 4 s on a processor and about 1 s elsewhere. Products are of dense random matrices in the dtype that a
    session of that precision computes in, float16 ones summed in float32; at most half of the free memory is used.
    A processor's product in float32 is the better of PyTorch's own, by oneMKL, and oneDNN's, which computes its
    convolutions: on processors of AMD's oneMKL's is slower by a fifth, and honest networks ran above it.
    """
    host, dtype, free = device.type == "cpu", DTYPES[precision], _free_memory(device)
    # Bytes. Larger than any cache: the largest known are 256 MiB on a GPU, and shared by all cores on a processor.
    largest = 2**28 if host else 2**30
    room = free // 2 if free is not None else 4 * largest

    def product(n: int, by: Callable[[Tensor, Tensor, Tensor], object] = _product) -> timing.Work | None:
        if 3 * n * n * dtype.itemsize > room:
            return None
        # On the host and by a generator of its own, so that no global one moves; not zeros, which draw less power.
        tile = torch.rand(_TILE, _TILE, generator=torch.Generator().manual_seed(n)) - 0.5
        a = tile.to(device=device, dtype=dtype).repeat(n // _TILE, n // _TILE)
        b, out = a.clone(), torch.empty_like(a)
        return lambda: by(a, b, out)

    size = min(largest, 2 ** ((room // 2).bit_length() - 1)) if room else 0
    copy = None
    if size >= 2**20:
        source = torch.ones(size // 4, dtype=torch.int32, device=device)
        target = torch.zeros_like(source)
        copy = (lambda: target.copy_(source)), 2 * size
    sizes = (1024, 2048, 4096) if host else (1024, 2048, 4096, 8192, 16384)
    with torch.inference_mode(), fp32_precision("tf32" if precision == "tf32" else "ieee"), _wide_sums():
        found = timing.ceilings(product, sizes, copy, wait, budget=2.5 if host else 1.0)
        if host and dtype == torch.float32 and has_onednn():
            other = timing.ceilings(lambda n: product(n, _onednn_product), sizes, None, wait, budget=1.0)
            samples = {f"onednn_{name}": rates for name, rates in other.samples.items()}
            best = max((c.flops for c in (found, other) if c.flops), default=None)
            found = replace(found, flops=best, samples={**found.samples, **samples})
    return found


def _product(a: Tensor, b: Tensor, out: Tensor) -> object:
    return torch.mm(a, b, out=out)


def _onednn_product(a: Tensor, b: Tensor, _: Tensor) -> object:
    return onednn_linear(a, b)


@contextmanager
def _wide_sums() -> Iterator[None]:
    """float16 products summed in float32, which is torch's default."""
    holder, name = torch.backends.cuda.matmul, "allow_fp16_accumulation"
    before = getattr(holder, name, None) if torch.cuda.is_available() else None
    try:
        if before:
            setattr(holder, name, False)
        yield
    finally:
        if before:
            setattr(holder, name, before)


def _free_memory(device: torch.device) -> int | None:
    """Bytes free on the device; None where it does not tell."""
    if device.type == "cpu":
        names = ("SC_AVPHYS_PAGES", "SC_PAGE_SIZE")
        if not set(names) <= set(getattr(os, "sysconf_names", ())):
            return None
        pages, size = (os.sysconf(name) for name in names)
        return pages * size
    module = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        return int(module.mem_get_info()[0])
    if hasattr(module, "recommended_max_memory"):
        return int(module.recommended_max_memory()) - int(module.driver_allocated_memory())
    return None


def layer_times(
    session: "TorchSession", images: Array, *, training: bool, seconds: float = 0.02, repeats: int = 5
) -> dict[str, LayerTime]:
    """Each layer of the session's module on the very input that it gets in the network; see `Session.layer_times`.

    One pass, in training by the masks of step 0 and ids 0, 1, ..., gives the inputs. Each layer is then run alone in
    blocks of `seconds`, under the session's precision, formulation, layout and switched-off libraries: compiled by
    itself where the engine compiles all of it, else eagerly. Casts of its weights count where a step makes them, so in
    training but not in inference. Backward starts from a random gradient and computes what the network needs: of the
    weights, and of the input behind the first layer that has any. The update is no layer's and not in it. A layer that
    is not run, because the next one does its work too (engine ``regions``), has no times; they are in the next one's.
    """
    masks = {}
    if training:
        kept = session.masks(torch.arange(len(images)).numpy(), step=0)
        masks = {name: session.put(mask) for name, mask in kept.items()}
    found, behind_weights = {}, False
    with session._as_set():
        session.module.train(training)
        inputs = _inputs(session, images, masks if training else None)
        for name, layer in session.module.named_children():
            x = inputs.pop(name, None)
            if x is None:
                continue
            found[name] = _layer_time(
                session, layer, x, masks.get(name), training, behind_weights, seconds=seconds, repeats=repeats
            )
            behind_weights = behind_weights or any(True for _ in layer.parameters())
    return found


def _inputs(session: "TorchSession", images: Array, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """What each layer gets, by its name."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
        for name, layer in session.module.named_children()
    ]
    try:
        with torch.no_grad():
            session._pass(session._operands(session.parameters), session.put(images), masks)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _layer_time(
    session: "TorchSession",
    layer: nn.Module,
    x: Tensor,
    mask: Tensor | None,
    training: bool,
    behind_weights: bool,
    *,
    seconds: float,
    repeats: int,
) -> LayerTime:
    parameters: dict[str, Tensor] = dict(layer.named_parameters())
    given = (x,) if mask is None else (x, mask)
    autocast = session.narrow and session.stock
    recast = parameters and session.narrow and not session.stock

    def forward(operands: dict[str, Tensor], *inputs: Tensor) -> Any:
        # Without its cache, which would cast once for all repetitions.
        with torch.autocast(session.device.type, session.dtype, cache_enabled=False) if autocast else nullcontext():
            if not recast:
                return layer(*inputs)
            return torch.func.functional_call(layer, session._operands(operands) if training else operands, inputs)

    run = compiled(forward) if compiles(session.settings.engine) else forward
    wait = session.synchronize
    if not training:
        with torch.inference_mode():
            operands = session._operands(parameters)
            return LayerTime(
                forward=timing.typical(lambda: run(operands, *given), wait, seconds=seconds, repeats=repeats)
            )
    from torch._functorch import config

    # A compiled backward pass may otherwise reuse what the next repetition needs.
    with config.patch(donated_buffer=False):
        leaf = x.detach().requires_grad_(behind_weights)
        given = (leaf, *given[1:])
        took = timing.typical(lambda: run(parameters, *given), wait, seconds=seconds, repeats=repeats)
        wanted = [*parameters.values(), *([leaf] if behind_weights else [])]
        if not wanted:
            return LayerTime(forward=took)
        y = run(parameters, *given)
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        gradient = torch.empty_like(y, requires_grad=False).copy_(noise)
        back = timing.typical(
            lambda: torch.autograd.grad(y, wanted, gradient, retain_graph=True), wait, seconds=seconds, repeats=repeats
        )
    return LayerTime(forward=took, backward=back)


def fallbacks(device: torch.device, wait: Callable[[], None], run: Callable[[], object]) -> dict[str, int]:
    """The operators of `run` that were computed on the host, by the name of the outermost, and how often each.

    Wherever torch falls back (``at::native::cpu_fallback``, which MPS, XPU and devices that register with torch use)
    it moves the operands by ``aten::_to_cpu``, which the profiler shows inside the operator. A vendor that falls back
    by other means is not seen. Nothing can fall back from the host itself.
    """
    if device.type == "cpu":
        return {}
    # Its profiler reports its starts and stops on standard error otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
        wait()
    return fallen(recorded.events())


def fallen(events: Any) -> dict[str, int]:
    """`fallbacks` from the profiler's events, which know their `name` and `cpu_parent`."""
    tops: dict[int, str] = {}
    for event in events:
        above, top = event.cpu_parent if event.name == "aten::_to_cpu" else None, None
        while above is not None:
            top, above = (above if above.name.startswith("aten::") else top), above.cpu_parent
        if top is not None:
            # One operator may move its operands in several goes: it counts once.
            tops[id(top)] = top.name.removeprefix("aten::")
    return dict(Counter(tops.values()))


def device_seconds(device: torch.device, wait: Callable[[], None], run: Callable[[], object]) -> float | None:
    """What `run` takes between two events on the device's current stream; None where it has no events."""
    event = getattr(torch.get_device_module(device), "Event", None)
    if device.type == "cpu" or event is None:
        return None
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    run()
    end.record()
    wait()
    return float(start.elapsed_time(end)) / 1e3


def forget_peak(device: torch.device) -> None:
    """Let `peak_memory` count from now on."""
    if device.type != "cpu":
        getattr(torch.get_device_module(device), "reset_peak_memory_stats", lambda: None)()


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that tensors took at once; None where only the present amount is known (MPS), or none (the host)."""
    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    return int(module.max_memory_allocated()) if hasattr(module, "max_memory_allocated") else None
