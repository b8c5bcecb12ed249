"""What a backend must do, and what it may.

A backend is a way to reach a device; a session is one network opened on it. The least is an inference-only backend:
`probe` and `open`, and a session with `put`, `get`, `infer`, `weights` and `synchronize`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from portnet.errors import Unavailable, Unsupported
from portnet.graph import Graph

__all__ = [
    "PRECISIONS",
    "Array",
    "Backend",
    "Device",
    "Mode",
    "Session",
    "Settings",
    "Trace",
    "Unavailable",
    "Unsupported",
    "Weights",
]

Array = npt.NDArray[Any]
Weights = Mapping[str, npt.NDArray[np.float32]]
Mode = Literal["infer", "train"]

PRECISIONS = ("float64", "float32", "tf32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a probe found. `memory` is in bytes; `versions` names drivers, runtimes and libraries."""

    name: str
    precisions: tuple[str, ...]
    memory: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a session is to compute.

    `precision`: ``float32`` means float32, with no TF32 anywhere; see `PRECISIONS`. `formulation`: ``portable``
    (PortNet's own, the same on every vendor) or ``stock`` (the framework's operators, as people write them). `seed`
    keys the dropout masks.
    """

    precision: str = "float32"
    formulation: str = "portable"
    seed: int = 0


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


class Session(ABC):
    """One network on one device. What `put`, `infer` and `train_step` return lives there, perhaps unfinished."""

    @abstractmethod
    def put(self, array: Array) -> Any:
        """Copy a host array to the device, dtype and shape unchanged (float32 images, int64 labels and ids)."""

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

    def close(self) -> None:  # noqa: B027 (nothing to give back is the usual case)
        """Give the device's memory back. The session is not used after it."""


class Backend(ABC):
    """A way to reach a device. Making one is free; only `probe` and `open` may load the vendor's software."""

    name: ClassVar[str]
    vendor: ClassVar[str]
    modes: ClassVar[tuple[Mode, ...]] = ("infer",)
    formulations: ClassVar[tuple[str, ...]] = ("portable",)
    priority: ClassVar[int] = 0
    """Where ``auto`` ranks it, highest first; 0 is never chosen unasked."""
    note: ClassVar[str] = ""
    """What a user should know before believing it, shown wherever backends are listed."""

    @abstractmethod
    def probe(self) -> Device:
        """Find the device, cheaply. Raises `Unavailable` with the reason and the remedy."""

    @abstractmethod
    def open(self, graph: Graph, weights: Weights, settings: Settings) -> Session:
        """The network with these weights on the device. Raises `Unavailable`, or `Unsupported` for the settings."""

    def check(self, settings: Settings) -> Device:
        """The device, if it can be had and does what `settings` ask; a first line for `open`."""
        device = self.probe()
        if settings.precision not in device.precisions:
            raise Unsupported(
                f"{self.name} does not compute in {settings.precision!r} on {device.name}; "
                f"it offers {', '.join(device.precisions)}"
            )
        if settings.formulation not in self.formulations:
            raise Unsupported(
                f"{self.name} has no formulation {settings.formulation!r}; it offers {', '.join(self.formulations)}"
            )
        return device
