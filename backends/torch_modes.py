"""torch's process-wide switches, set for a while, and its compiler."""

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from portnet.contract import Unsupported
from portnet.errors import PortNetError


def compiles(engine: str) -> bool:
    """Whether an engine's work goes through torch's compiler whole."""
    return engine in ("compile", "compile-graph")


def captures(engine: str) -> bool:
    """Whether an engine replays a device graph of its work."""
    return engine in ("graph", "compile-graph")


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


def has_onednn() -> bool:
    """Whether torch computes by oneDNN on the host now: built in, and not switched off."""
    mkldnn = torch.backends.mkldnn
    return mkldnn.is_available() and mkldnn.enabled and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` by oneDNN, as torch's compiler has it called; without autograd."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


# torch's functions of one tensor that a processor computes by oneMKL's vector mathematics where it can.
VECTOR_MATHEMATICS = (
    *("acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "expm1"),
    *("log", "log10", "log1p", "log2", "sin", "sqrt", "tan", "tanh"),
)


@cache
def choose_kernels() -> None:
    """Have oneMKL choose its kernels once for this process, while one thread computes.

    It chooses at the first call of a function. Where several threads make it, one of them may take a kernel of lower
    accuracy for its whole part: 3 in 100 processes had half of their first square roots off by up to 3e-4
    (pytorch/pytorch#188792; oneMKL 2024.2, AVX-512), and ended in other bits than the rest.
    """
    for dtype in (torch.float32, torch.float64):
        for name in VECTOR_MATHEMATICS:
            getattr(torch, name)(torch.full((1,), 0.5, dtype=dtype, device="cpu"))


# What torch says of itself while compiling: that TF32 would be faster than the float32 asked for, and of its own
# modules and how they look at tensors.
CHATTER = (
    "TensorFloat32 tensor cores .* available but not enabled",
    ".*torch.jit.script_method. is deprecated",
    "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed",
)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled by torch as one graph for each of its shapes, or `Unsupported`: never run as it stands."""
    # All sessions, and all layers of the direct formulation, add to one function's count of compilations.
    limit = {"recompile_limit": 1024} if "recompile_limit" in signature(torch.compile).parameters else {}
    through: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False, **limit)

    @wraps(function)
    def run(*inputs: Any) -> Any:
        if torch._dynamo.config.disable:
            raise Unsupported("torch.compile is switched off (TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE)")
        with warnings.catch_warnings():
            for message in CHATTER:
                warnings.filterwarnings("ignore", message)
            try:
                try:
                    return through(*inputs)
                except torch._dynamo.exc.FailOnRecompileLimitHit:
                    # An older torch, which has that limit for the process alone; setting it takes a millisecond, too
                    # much to do at each call.
                    with torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):
                        return through(*inputs)
            except torch._dynamo.exc.TorchDynamoException as error:
                cause = getattr(error, "inner_exception", error)
                first = str(cause).strip().partition("\n")[0]
                # A failure to be counted, and nothing that was refused.
                raise PortNetError(f"torch.compile failed: {type(cause).__name__}: {first}") from error

    return run
