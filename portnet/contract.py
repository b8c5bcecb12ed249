"""What a backend must do, and what it may.

A backend is a way to reach a device; a session is one network opened on it. The least is an inference-only backend:
`probe` and `open`, and a session with `put`, `get`, `infer`, `weights` and `synchronize`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from portnet.errors import Unavailable, Unsupported
from portnet.graph import Graph, Recipe

__all__ = [
    "INT8",
    "PRECISIONS",
    "Array",
    "Backend",
    "Ceilings",
    "Device",
    "LayerTime",
    "LibraryLayer",
    "Mode",
    "Parallel",
    "Place",
    "Session",
    "Settings",
    "Trace",
    "Traffic",
    "Unavailable",
    "Unsupported",
    "Weights",
    "normalised",
]

Array = npt.NDArray[Any]
Weights = Mapping[str, npt.NDArray[np.float32]]
Mode = Literal["infer", "train"]
Parallel = Literal["", "data", "towers"]
"""How several processes train one network: each a part of every batch, or (two) half of every layer, as in 2012."""

PRECISIONS = ("float64", "float32", "tf32", "bfloat16", "float16")
INT8 = "int8"
"""The precision of a network that was calibrated on pictures beforehand: inference of a file, by 8-bit integers."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a probe found. `memory` is in bytes; `versions` names drivers, runtimes and libraries.

    `unified`: host and device share one memory, so that `put` and `get` cross no bus. `emulated`: those of `precisions`
    that its libraries have no kernels for, which may take a hundred times as long; `measure --all` leaves them out.
    """

    name: str
    precisions: tuple[str, ...]
    memory: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    unified: bool = False
    emulated: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a session is to compute.

    `precision`: ``float32`` means float32, with no TF32 anywhere; see `PRECISIONS`. `formulation`: ``portable``
    (PortNet's own, the same on every vendor), ``stock`` (the framework's operators, as people write them), or a rung
    below the vendor's libraries: ``unfold`` (every convolution as one batched unfold and one matrix product) or
    ``direct`` (as the plain sum of its definition). `seed` keys the dropout masks. `engine`: how the work is issued,
    one of `Backend.engines`. `channels_last`: activations and filters lie in NHWC order on the device. `without`:
    names of `Backend.library_layers` that the session itself must switch off. `strict`: refuse to open where a part
    would be computed elsewhere than on the device. `accumulate`: in how many equal parts a training step takes its
    batch, one after the other, before its one update: the same step in less memory. `parallel`: how this process
    shares the network with the others of its group, of which `Session.place` tells.
    """

    precision: str = "float32"
    formulation: str = "portable"
    seed: int = 0
    engine: str = "eager"
    channels_last: bool = False
    without: tuple[str, ...] = ()
    strict: bool = False
    accumulate: int = 1
    parallel: Parallel = ""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process stands in the group that trains one network together.

    It is number `rank` of `size`, and takes part number `part` of the `parts` equal ones into which each batch is cut.
    """

    rank: int = 0
    size: int = 1
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What a collective operation moved: how often it was called, and the bytes of payload that crossed between
    processes, all directions together, counted once."""

    calls: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One pass laid open, on the host.

    `layers` holds every layer's output by name, as far as the session can tell them (batch first); `logits` has shape
    ``(batch, classes)``; `loss` is the mean cross-entropy in nats and `gradients` its gradients by parameter, both
    only where labels were given.
    """

    layers: Mapping[str, Array]
    logits: Array
    loss: float | None = None
    gradients: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The best that a device was seen to do in one precision, with nothing of PortNet's network in the way.

    `flops`: FLOP/s of a large matrix product; `bandwidth`: bytes/s, read plus written, of a large copy on the device;
    each the best of several. None is what could not be measured. `samples` holds every rate measured, by its name.
    """

    flops: float | None
    bandwidth: float | None
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Seconds of one layer run on its own: forward, and backward where it was asked for and there is one."""

    forward: float
    backward: float | None = None


@dataclass(frozen=True, kw_only=True)
class LibraryLayer:
    """A part of the vendor's software that can be taken away, to see what it is worth.

    `environment` is set for the whole process before it starts; `replace` gives fields of `Settings` their values
    (another engine, a rung below the library). Where both are empty, the session does it, as told by
    `Settings.without`. `missing` says why there is nothing to take away here, given the device, or is empty.
    """

    name: str
    title: str
    environment: Mapping[str, str] = field(default_factory=dict)
    replace: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    missing: str = ""


def normalised(pixels: Array, shift: Array, scale: Array) -> npt.NDArray[np.float32]:
    """Pixels as a network takes them: ``(pixel + shift) / scale``, each operation rounded once to float32.

    `pixels` is uint8 ``(n, S, S, 3)``, `shift` float32 ``(n, 3)``, `scale` float32 ``(3,)``; the result
    ``(n, 3, S, S)``.
    """
    out = np.empty((len(pixels), 3, *pixels.shape[1:3]), np.float32)
    np.add(pixels.transpose(0, 3, 1, 2), shift[:, :, None, None], out=out, dtype=np.float32)
    out /= scale[:, None, None]
    return out


class Session(ABC):
    """One network on one device. What `put`, `infer` and `train_step` return lives there, perhaps unfinished."""

    place: Place = Place()
    """This process's place in its group; alone unless `Settings.parallel` says otherwise."""

    @abstractmethod
    def put(self, array: Array) -> Any:
        """Copy a host array to the device, dtype and shape unchanged (float32 images, int64 labels and ids)."""

    def put_pixels(self, pixels: Array, shift: Array, scale: Array) -> Any:
        """`normalised` pixels on the device, bit for bit; it may compute them itself, from a quarter of the bytes.

        The copy may still be under way when this returns; the arrays must not be written to before `synchronize`.
        """
        return self.put(normalised(pixels, shift, scale))

    @abstractmethod
    def get(self, value: Any) -> Array:
        """Copy a device value back to the host, waiting for it to be computed."""

    @abstractmethod
    def infer(self, images: Any) -> Any:
        """Logits ``(batch, classes)`` on the device for float32 images ``(batch, channels, height, width)`` on it."""

    @abstractmethod
    def weights(self) -> dict[str, npt.NDArray[np.float32]]:
        """Copies of all parameters on the host, under the graph's names and in its shapes."""

    @abstractmethod
    def synchronize(self) -> None:
        """Return only when all work issued so far is finished.

        There is no default on purpose: one that does nothing would time launches instead of work.
        """

    def train_step(self, images: Any, labels: Any, ids: Any, *, step: int, learning_rate: float) -> Any:
        """One update by the graph's recipe; returns the loss before it, on the device.

        `labels` and `ids` (the images' numbers in their data set, which key the dropout masks) are int64 ``(batch,)``
        on the device; `step` counts updates from 0.
        """
        raise Unsupported(f"{type(self).__name__} does not train")

    def use(self, recipe: Recipe) -> None:
        """Train by this recipe from the next step on, in place of the graph's: to freeze a layer, for instance."""
        raise Unsupported(f"{type(self).__name__} does not train")

    def state(self) -> dict[str, Array]:
        """Copies on the host of all that training carries from step to step, so that `restore` resumes bit for bit.

        Weights stand under the graph's names, velocities under ``velocity.`` and those; a session may add arrays of its
        own under other names. In their own precision (float64 for float64). Where several processes hold the network,
        all of them must call this; it is whole in the process of rank 0, and may be empty in the others.
        """
        raise Unsupported(f"{type(self).__name__} does not train")

    def restore(self, state: Mapping[str, Array]) -> None:
        """Go on from `state`, of this or another backend. Unknown names are ignored; velocities may be absent."""
        raise Unsupported(f"{type(self).__name__} does not train")

    def total(self, values: Array) -> Array:
        """The sum of float64 `values` over the processes that saw different parts of the data; all must call it."""
        return values

    def traffic(self) -> Mapping[str, Traffic]:
        """What went between the processes since this was last asked, by the collective operation's name."""
        return {}

    def collective_seconds(self, size: int, repeats: int) -> Mapping[str, Sequence[float]]:
        """Seconds of each collective operation that training uses, alone, on `size` bytes; all processes must call it.

        `size` is nccl-tests': of what each process holds to be reduced (``all_reduce``), of all that is gathered or
        scattered (``all_gather``, ``reduce_scatter``), of the message (``send_recv``). From when the last process has
        begun until all have finished.
        """
        return {}

    def masks(self, ids: Any, *, step: int) -> dict[str, npt.NDArray[np.bool_]]:
        """The dropout masks that `train_step` draws, by layer: bool ``(batch, features)`` on the host, True is kept."""
        raise Unsupported(f"{type(self).__name__} does not train")

    def trace(self, images: Array, labels: Array | None = None, masks: Mapping[str, Array] | None = None) -> Trace:
        """One pass over host arrays, laid open: inference without `labels`, otherwise training with these masks.

        The default knows the logits alone and cannot train.
        """
        if labels is not None:
            raise Unsupported(f"{type(self).__name__} does not train")
        return Trace(layers={}, logits=self.get(self.infer(self.put(images))))

    def peak_memory(self) -> int | None:
        """Most bytes of device memory that were taken at once since `open`; None where the device does not tell."""
        return None

    def fallbacks(self, run: Callable[[], object]) -> Mapping[str, int] | None:
        """Which operations of `run` were computed elsewhere than on the device, and how often each.

        Empty when all of them stayed there; None where this cannot be told.
        """
        return None

    def options(self) -> Mapping[str, Any]:
        """What the vendor's runtime says is in force, in its own words, for the record; empty if it is mute."""
        return {}

    def file_size(self) -> int | None:
        """Bytes of the model file that it runs; None where it runs none."""
        return None

    def latest_weights(self) -> Any | None:
        """Some element of every parameter as one small device value that all updates so far went into.

        It tells the harness, cheaply, whether an update was finished. None where there is no cheap way; it then runs
        an inference, and where the time of that varies by more than `portnet.clock.WAIT` of a block, a session that
        waits can look as if it did not.
        """
        return None

    def device_seconds(self, run: Callable[[], object]) -> float | None:
        """What `run` takes by the device's own events; None where it has none."""
        return None

    def layer_times(self, images: Array, labels: Array | None = None) -> Mapping[str, LayerTime]:
        """Each layer on its own, on the input that it gets in the network; with `labels` backward too.

        What layers overlap, fuse or keep in caches is lost by that: the sum is no time of the network. Without those
        whose work is part of another's; empty where layers cannot be run singly.
        """
        return {}

    def close(self) -> None:  # noqa: B027 (nothing to give back is the usual case)
        """Give the device's memory back. The session is not used after it."""


class Backend(ABC):
    """A way to reach a device. Making one is free; only `probe` and `open` may load the vendor's software."""

    name: str
    """One of a kind; of the class, or where several share one, set by its constructor. So are `vendor` and `note`."""
    vendor: str
    modes: ClassVar[tuple[Mode, ...]] = ("infer",)
    formulations: ClassVar[tuple[str, ...]] = ("portable",)
    engines: ClassVar[tuple[str, ...]] = ("eager",)
    """Which values of `Settings.engine` it takes, the last being the one expected to be fastest."""
    layouts: ClassVar[tuple[bool, ...]] = (False,)
    """Which values of `Settings.channels_last` it takes."""
    caches: ClassVar[tuple[str, ...]] = ()
    """Environment variables that name folders in which the vendor's software keeps compiled code."""
    priority: ClassVar[int] = 0
    """Where ``auto`` ranks it, highest first; 0 is never chosen unasked."""
    note: str = ""
    """What a user should know before believing it, shown wherever backends are listed."""
    accumulates: ClassVar[bool] = False
    """Whether it takes `Settings.accumulate` above 1."""
    parallel: ClassVar[tuple[Parallel, ...]] = ()
    """The values of `Settings.parallel` that it takes, besides none."""
    collectives: ClassVar[str] = ""
    """The library behind its collective operations, by its usual name; empty where `parallel` is."""
    one_device: ClassVar[bool] = False
    """Whether several processes of one machine share one device, as they do a processor."""
    strict: ClassVar[bool] = False
    """Whether it can tell beforehand that a part would be computed elsewhere, and refuse (`Settings.strict`)."""

    @abstractmethod
    def probe(self) -> Device:
        """Find the device, cheaply. Raises `Unavailable` with the reason and the remedy."""

    @abstractmethod
    def open(self, graph: Graph, weights: Weights, settings: Settings) -> Session:
        """The network with these weights on the device. Raises `Unavailable`, or `Unsupported` for the settings."""

    def ceilings(self, precision: str) -> Ceilings | None:
        """Measure the device's ceilings now, in this process; None where the backend has no way to."""
        return None

    def library_layers(self, settings: Settings) -> tuple[LibraryLayer, ...]:
        """The parts of the vendor's software that can be taken away from a stack with these settings.

        From the most special to the most general. Must load no vendor's software, since it is asked before the
        process that does.
        """
        return ()

    def launcher(self, processes: int, restarts: int) -> list[str]:
        """The command that starts a Python module (``-m name``, to follow) in that many processes of one group here.

        It starts them anew where one is lost, up to `restarts` times. Raises `Unsupported`.
        """
        raise Unsupported(f"{self.name} has no collective operations, so that several processes cannot train together")

    def telemetry(self) -> Mapping[str, Any]:
        """The device's state now, where its vendor offers it; the keys are those of `portnet.watch`.

        Cheap, and called while a measurement is under way.
        """
        return {}

    def check(self, settings: Settings, device: Device | None = None) -> Device:
        """The device, if it can be had and does what `settings` ask; a first line for `open`.

        `device`: what the probe found, where that is known already.
        """
        device = device or self.probe()
        if settings.precision not in device.precisions:
            raise Unsupported(
                f"{self.name} does not compute in {settings.precision!r} on {device.name}; "
                f"it offers {', '.join(device.precisions)}"
            )
        if settings.formulation not in self.formulations:
            raise Unsupported(
                f"{self.name} has no formulation {settings.formulation!r}; it offers {', '.join(self.formulations)}"
            )
        if settings.engine not in self.engines:
            raise Unsupported(f"{self.name} has no engine {settings.engine!r}; it offers {', '.join(self.engines)}")
        if settings.channels_last not in self.layouts:
            raise Unsupported(f"{self.name} has no choice of layout; leave channels-last out")
        if settings.strict and not self.strict:
            raise Unsupported(f"{self.name} cannot tell beforehand what would run elsewhere; leave strict out")
        if settings.accumulate != 1 and not self.accumulates:
            raise Unsupported(f"{self.name} takes each batch whole; leave accumulation out")
        if settings.parallel and settings.parallel not in self.parallel:
            offered = f"it offers {', '.join(self.parallel)}" if self.parallel else "it has no collective operations"
            raise Unsupported(f"{self.name} does not train in parallel by {settings.parallel!r}; {offered}")
        known = [layer.name for layer in self.library_layers(settings)]
        if unknown := set(settings.without) - set(known):
            raise Unsupported(
                f"{self.name} cannot take away {', '.join(sorted(unknown))}; it can: {', '.join(known) or 'nothing'}"
            )
        return device
