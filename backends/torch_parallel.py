"""One network trained by several processes: each with a part of every batch, or as two towers.

All through torch.distributed. torchrun starts the processes and tells each its place in the environment; the collective
operations are the device's own (NCCL, RCCL under NCCL's name, oneCCL, Gloo on processors).
"""

import atexit
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from inspect import signature
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

# Before any group is entered: its functions' default arguments would hold that group for ever. See `_leave`.
import torch.distributed.nn
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from portnet import towers
from portnet.contract import Array, Place, Settings, Trace, Traffic, Weights
from portnet.errors import InputError, Unavailable, Unsupported
from portnet.graph import Dropout, Graph
from portnet_backends import torch_philox
from portnet_backends.torch_layers import layer_module
from portnet_backends.torch_session import TorchSession

PLACES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def join(device_type: str, collectives: str) -> None:
    """Enter the group that torchrun started this process in, once. Raises `Unavailable`."""
    if not dist.is_available() or not dist.is_backend_available(collectives):
        raise Unavailable(
            f"PyTorch {torch.__version__} has no {collectives} for collective operations",
            "install a build of PyTorch that has, or train in one process",
        )
    if missing := [name for name in PLACES if name not in os.environ]:
        raise Unavailable(
            f"this process belongs to no group: {', '.join(missing)} not set",
            "start it by torchrun, or by portnet train --parallel, which does that",
        )
    if dist.is_initialized():
        return
    local = int(os.environ["LOCAL_RANK"])
    device = None
    if device_type != "cpu":
        count = torch.accelerator.device_count()
        if local >= count:
            raise Unavailable(f"process {local} of this machine has no device: torch finds {count}", "start fewer")
        torch.accelerator.set_device_index(local)
        device = torch.device(device_type, local)
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun's store outlives a restart (seen with torch 2.13), and in it the addresses of processes that are gone:
    # Gloo would wait for them.
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(collectives, store=store, rank=rank, world_size=size, device_id=device)
    atexit.register(_leave)


_training: "weakref.WeakSet[DataSession]" = weakref.WeakSet()


def _leave() -> None:
    """Leave the group so that its threads end.

    Gloo's may still hold tensors of Python's when a collective operation has returned, and one that drops them while
    the interpreter is finalized aborts the process (pytorch/pytorch#179291). They end with the last reference to the
    group, which DistributedDataParallel has too.
    """
    if dist.is_initialized():
        for session in _training:
            session._parallel = None
        dist.destroy_process_group()


class _Group:
    """The collective operations of a session, counted while a training step is under way.

    Bytes are of all processes and directions together, so that every process counts the same.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.counting = False
        self._calls: dict[str, int] = {}
        self._bytes: dict[str, int] = {}

    @contextmanager
    def counted(self) -> Iterator[None]:
        self.counting = True
        try:
            yield
        finally:
            self.counting = False

    def count(self, name: str, size: int) -> None:
        if self.counting:
            self._calls[name] = self._calls.get(name, 0) + 1
            self._bytes[name] = self._bytes.get(name, 0) + size

    def traffic(self) -> dict[str, Traffic]:
        """Since it was last asked."""
        found = {name: Traffic(calls=calls, bytes=self._bytes[name]) for name, calls in self._calls.items()}
        self._calls, self._bytes = {}, {}
        return found

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every process's `x`, in their order."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x)
        self.count("all_gather", self.size * (self.size - 1) * _bytes(x))
        return parts

    def reduce_scatter(self, parts: list[Tensor]) -> Tensor:
        """The sum of every process's part for this one."""
        out = torch.empty_like(parts[self.rank])
        dist.reduce_scatter(out, parts)
        self.count("reduce_scatter", self.size * (self.size - 1) * _bytes(out))
        return out

    def send(self, x: Tensor, to: int) -> None:
        dist.send(x, to)
        self.count("send_recv", _bytes(x))

    def receive(self, like: Tensor, source: int) -> Tensor:
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(out, source)
        self.count("send_recv", _bytes(out))
        return out

    def seconds(
        self, names: Sequence[str], size: int, repeats: int, device: torch.device, wait: Callable[[], None]
    ) -> dict[str, list[float]]:
        """How long operations on `size` bytes take; see `Session.collective_seconds`."""
        each = max(1, size // 4 // self.size)
        whole, part = (torch.zeros(n, device=device) for n in (each * self.size, each))
        parts = list(whole.chunk(self.size))

        def send_recv() -> None:
            if self.rank < 2:
                dist.send(whole, 1) if self.rank == 0 else dist.recv(whole, 0)

        run: dict[str, Callable[[], object]] = {
            "all_reduce": lambda: dist.all_reduce(whole),
            "all_gather": lambda: dist.all_gather(parts, part),
            "reduce_scatter": lambda: dist.reduce_scatter(part, parts),
            "send_recv": send_recv,
        }
        found: dict[str, list[float]] = {name: [] for name in names}
        for name in names:
            for repeat in range(repeats + 1):
                wait()
                dist.barrier()
                began = perf_counter()
                run[name]()
                wait()
                # The last process to finish; the first time, connections are made.
                slowest = torch.tensor([perf_counter() - began], dtype=torch.float64, device=device)
                dist.all_reduce(slowest, dist.ReduceOp.MAX)
                if repeat:
                    found[name].append(float(slowest))
        return found

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """`x` of every process as one, in place."""
        dist.all_reduce(x, op)
        self.count("all_reduce", ring(_bytes(x), self.size))
        return x


def ring(size: int, processes: int) -> int:
    """Bytes that all processes of a ring send together to reduce `size` bytes everywhere: the least there is.

    Each sends `size` / N in 2 (N - 1) steps (Patarasuk, Yuan, J. Parallel Distrib. Comput. 69, 2009). What a library
    takes on a given machine may be another way.
    """
    return 2 * (processes - 1) * size


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _reduced(group: _Group, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    group.count("all_reduce", ring(_bytes(bucket.buffer()), group.size))
    return allreduce_hook(dist.group.WORLD, bucket)


class DataSession(TorchSession):
    """Every process holds the whole network and takes its part of each batch; gradients are averaged.

    That is torch's DistributedDataParallel; the update is the session's own, alike in all processes.
    """

    def __init__(
        self, device_type: str, wait: Callable[[], None], graph: Graph, weights: Weights, settings: Settings
    ) -> None:
        super().__init__(device_type, wait, graph, weights, settings)
        self.group = _Group()
        self.place = Place(rank=self.group.rank, size=self.group.size, part=self.group.rank, parts=self.group.size)
        self._parallel: DistributedDataParallel | None = None

    def _start_training(self) -> None:
        super()._start_training()
        # The network's buffers are constants, alike everywhere.
        renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
        how = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        self._parallel = DistributedDataParallel(_Losses(self), gradient_as_bucket_view=True, **how)
        # Not a method: what the hook refers to is kept alive through C++, where no collection of garbage sees it.
        self._parallel.register_comm_hook(self.group, _reduced)
        _training.add(self)
        self._settled = False

    def train_step(self, images: Tensor, labels: Tensor, ids: Tensor, *, step: int, learning_rate: float) -> Tensor:
        with self.group.counted():
            loss = super().train_step(images, labels, ids, step=step, learning_rate=learning_rate)
            return self.group.all_reduce(loss.clone()) / self.group.size

    def _backward(
        self, images: Tensor, labels: Tensor, masks: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if self._parallel is None:
            self._start_training()
        if not self._settled:
            # torch sorts its buckets of gradients anew after the first backward pass, and with them the order of sums:
            # a run that is resumed must not differ from one that goes on.
            self._settled = True
            counting, self.group.counting = self.group.counting, False
            self._backward(images, labels, masks)
            self.group.counting = counting
        for p in self.parameters.values():
            p.grad = None
        return super()._backward(images, labels, masks)

    def _losses_of(
        self, images: Tensor, labels: Tensor, masks: dict[str, Tensor], *, last: bool
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        assert self._parallel is not None, "training has begun"
        with nullcontext() if last else self._parallel.no_sync():
            logits, loss = self._parallel(images, labels, masks)
            self._scaled(loss).backward()
        return logits, loss, self._unscaled([p.grad for p in self.parameters.values()]) if last else []

    def collective_seconds(self, size: int, repeats: int) -> Mapping[str, Sequence[float]]:
        return self.group.seconds(("all_reduce",), size, repeats, self.device, self.synchronize)

    def total(self, values: Array) -> Array:
        summed = self.group.all_reduce(torch.tensor(values, dtype=torch.float64, device=self.device))
        found: Array = summed.cpu().numpy()
        return found

    def traffic(self) -> Mapping[str, Traffic]:
        return self.group.traffic()


class _Losses(nn.Module):
    """The session's loss as a module, which is what DistributedDataParallel takes."""

    def __init__(self, session: DataSession) -> None:
        super().__init__()
        self.network = session.module
        self._of = session._losses
        self._parameters_of = session.parameters

    def forward(self, images: Tensor, labels: Tensor, masks: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self._of(self._parameters_of, images, labels, masks)


class TowerSession(TorchSession):
    """Two processes, each with half of every layer; see `portnet.towers`.

    Process 0 has the last layer and the loss. `infer`, `weights` and `state` give both the whole; so do `trace`'s
    gradients, but it shows no layers, and logits and loss in process 0 alone. The loss that `train_step` returns in
    process 1 is 0.
    """

    def __init__(
        self, device_type: str, wait: Callable[[], None], graph: Graph, weights: Weights, settings: Settings
    ) -> None:
        self.towers = towers.split(graph)
        self.group = _Group()
        if self.group.size != towers.DEVICES:
            raise InputError(f"two towers take {towers.DEVICES} processes, and this group has {self.group.size}")
        self.place = Place(rank=self.group.rank, size=self.group.size)
        super().__init__(device_type, wait, graph, weights, settings)

    def _network(self) -> nn.Module:
        return TowerNetwork(self.towers, self.group, self.settings.formulation)

    def _owned(self, arrays: Mapping[str, Array]) -> Mapping[str, Array]:
        return self.towers.take(arrays, self.group.rank)

    def _whole(self, arrays: Mapping[str, Tensor]) -> dict[str, Array]:
        whole: dict[str, Array] = {}
        for name in self.graph.parameters if arrays else ():
            if name in arrays and self.towers.rows(name, 1) is not None:
                found = torch.cat(self.group.all_gather(arrays[name].contiguous()))
            else:
                shape = self.graph.parameters[name]
                found = arrays[name] if name in arrays else torch.empty(shape, dtype=self._wide, device=self.device)
                found = found.contiguous()
                dist.broadcast(found, 0)
            whole[name] = found.cpu().numpy().copy()
        return whole

    def _agreed(self, finite: Tensor) -> Tensor:
        return self.group.all_reduce(finite.int(), dist.ReduceOp.MIN).bool()

    def train_step(self, images: Tensor, labels: Tensor, ids: Tensor, *, step: int, learning_rate: float) -> Tensor:
        with self.group.counted():
            return super().train_step(images, labels, ids, step=step, learning_rate=learning_rate)

    def infer(self, images: Tensor) -> Tensor:
        logits = super().infer(images)
        if self.group.rank:
            logits = torch.empty((len(images), self.graph.classes), dtype=logits.dtype, device=self.device)
        dist.broadcast(logits := logits.contiguous(), 0)
        return logits

    def trace(self, images: Array, labels: Array | None = None, masks: Mapping[str, Array] | None = None) -> Trace:
        if labels is None:
            return Trace(layers={}, logits=self.get(self.infer(self.put(images))))
        owned = {name: self.put(self._half(mask)) for name, mask in (masks or {}).items()}
        with self._as_set():
            logits, loss, gradients = self._backward(self.put(images), self.put(labels), owned)
        return Trace(layers={}, logits=self.get(logits), loss=float(self.get(loss)), gradients=self._whole(gradients))

    def collective_seconds(self, size: int, repeats: int) -> Mapping[str, Sequence[float]]:
        names = ("all_gather", "reduce_scatter", "send_recv")
        return self.group.seconds(names, size, repeats, self.device, self.synchronize)

    def masks(self, ids: Array, *, step: int) -> dict[str, Array]:
        raise Unsupported("a tower draws its half of the dropout masks alone")

    def _draw(self, ids: Tensor, step: Tensor) -> dict[str, Tensor]:
        # All bits of a mask are drawn, and half of them taken: a mask is a few bits beside the layer's work.
        return {
            s.layer.name: self._half(torch_philox.keep_mask(self.settings.seed, i, ids, step, s.output[0], s.layer.p))
            for i, s in enumerate(self.graph.dropouts)
            if isinstance(s.layer, Dropout)
        }

    def _half(self, mask: Any) -> Any:
        half = mask.shape[1] // towers.DEVICES
        return mask[:, self.group.rank * half : (self.group.rank + 1) * half]

    def _losses(
        self, parameters: dict[str, Tensor], images: Tensor, labels: Tensor, masks: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        if self.group.rank == 0:
            return super()._losses(parameters, images, labels, masks)
        sent = self._pass(self._operands(parameters), images, masks)
        return sent.detach(), sent.sum()

    def traffic(self) -> Mapping[str, Traffic]:
        return self.group.traffic()


class TowerNetwork(nn.Module):
    """One tower's layers, under their names, with the exchanges between them.

    In process 1 it gives, in place of logits, zeros of shape ``(batch, 1)`` from which the gradients flow back.
    """

    def __init__(self, cut: towers.Towers, group: _Group, formulation: str) -> None:
        super().__init__()
        self._group = group
        self._exchanges = {exchange.before: exchange for exchange in cut.exchanges}
        channels = {step.layer.name: step.input[0] // towers.DEVICES for step in cut.graph.steps}
        for layer in cut.layers(group.rank):
            self.add_module(layer.name, layer_module(layer, channels[layer.name], formulation))

    def forward(
        self, x: Tensor, masks: Mapping[str, Tensor] | None = None, record: dict[str, Tensor] | None = None
    ) -> Tensor:
        for name, layer in self.named_children():
            x = self._met(name, x)
            x = layer(x, masks[name]) if masks is not None and name in masks else layer(x)
        return x if self._group.rank == 0 else self._met(self._last, x)

    @property
    def _last(self) -> str:
        return next(name for name, exchange in self._exchanges.items() if exchange.one_way)

    def _met(self, name: str, x: Tensor) -> Tensor:
        """`x` with the other tower's half, where this is a place for it."""
        exchange = self._exchanges.get(name)
        if exchange is None:
            return x
        meet = _OneWay if exchange.one_way else _Gather
        return meet.apply(x, self._group)  # type: ignore[no-any-return, no-untyped-call]


class _Gather(torch.autograd.Function):
    """Both towers' halves, side by side, in both; going back, the sum of both towers' gradients of this one's half."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: _Group) -> Tensor:
        ctx.group = group
        return torch.cat(group.all_gather(x.contiguous()), dim=1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.group.reduce_scatter([part.contiguous() for part in g.chunk(ctx.group.size, dim=1)]), None


class _OneWay(torch.autograd.Function):
    """Both towers' halves, side by side, in process 0; going back, its gradient of the other's half."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: _Group) -> Tensor:
        ctx.group = group
        if group.rank == 0:
            return torch.cat([x, group.receive(x, 1)], dim=1)
        ctx.save_for_backward(x)
        group.send(x.contiguous(), 0)
        return x.new_zeros(len(x), 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        if ctx.group.rank == 0:
            mine, others = g.chunk(2, dim=1)
            ctx.group.send(others.contiguous(), 1)
            return mine, None
        (x,) = ctx.saved_tensors
        return ctx.group.receive(x, 0), None


SESSIONS: dict[str, type[TorchSession]] = {"data": DataSession, "towers": TowerSession}
