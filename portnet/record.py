"""What one measurement asked for and found: one JSON file, named by the SHA-256 of its content.

Files from many machines are merged by putting them into one folder. A damaged one is named and refused, and the
others are used. The hash finds damage, not forgery.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from portnet.errors import RecordError
from portnet.files import write_atomically

SCHEMA = "portnet.record/2"

OUTCOMES = (
    "works",
    "partial",
    "wrong",
    "dishonest clock",
    "unsteady",
    "failed",
    "timeout",
    "out of memory",
    "not available",
    "not measured",
)
"""``partial``: parts ran on another device. ``wrong``: outside the parity gate, so its speed is void."""


DIVISIONS = ("closed", "open")
"""MLPerf's words. ``closed``: the same code on every vendor's hardware; ``open``: tuned for one."""

MODES = ("train", "infer", "serve")
"""``serve`` asks what a serving user does: latency at batch 1, a sweep over batches, memory, the bus."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What to measure: one stack, in one mode, on one piece of work.

    `without` names library layers that are taken away. `model` is ``package:factory`` for a user's own module, or
    empty for AlexNet, of which `preset`, `image_size` and `classes` say which one. The training curve is run at
    `curve_size` pixels, `curve_batch` images a step for `curve_steps` steps, and held against `perturbed` runs of
    equals; the gate, the clock and the timing at `image_size` and `batch`. `blocks` are timed in a process. `quick`
    says that fewer samples were asked for than a figure to be quoted needs.
    """

    backend: str
    precision: str = "float32"
    engine: str = "eager"
    formulation: str = "portable"
    channels_last: bool = False
    without: tuple[str, ...] = ()
    mode: str = "infer"
    division: str = "closed"
    model: str = ""
    preset: str = "caffe"
    image_size: int = 227
    classes: int = 10
    batch: int = 16
    data: str = "digits"
    curve_size: int = 99
    curve_batch: int = 16
    curve_steps: int = 60
    perturbed: int = 8
    seed: int = 0
    blocks: int = 30
    quick: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "without", tuple(self.without))  # JSON knows lists only

    @property
    def stack(self) -> str:
        """Backend, engine and precision, and what sets it apart from the plainest of that name."""
        name = f"{self.backend}/{self.engine}/{self.precision}"
        name += "/channels-last" if self.channels_last else ""
        name += "" if self.formulation == "portable" else f" ({self.formulation})"
        return name + "".join(f" without {layer}" for layer in self.without)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement: one process's work on one spec.

    - `device` and `environment` say on what it was made and with which versions; `watch` what else went on there
      meanwhile, and `round` where the process stood among others: the `series` it was run in, its `number`, the
      stacks `beside` it, the `probe` of the host before each block in seconds, and whether the round was `rejected`
      because that probe differed between the sides.
    - `effective` holds the settings that were in force, after library layers were taken away.
    - `gates` holds each gate's figures: ``parity`` the relative errors (1e300 for one that is not finite) and what
      was allowed, tensor by tensor; ``curve`` the loss beside the envelope of equals; ``clock`` its times in
      seconds; ``fallbacks`` operations by name; ``trend`` the drift of the blocks.
    - `training` holds the loss before each step, in nats, and in `perturbed` the losses of equals that began one
      rounding away. `weights` is the SHA-256 of the curve's initial weights.
    - `samples` holds, for the mode, the seconds of every timed block, its steps, and the images in a step; and of the
      warm-up before them. `times` are the seconds to the first step, and of whole steps with their input.
    - `ceilings` are FLOP/s and bytes/s; `layers` each layer's least work, floor and times in seconds; `serving` what a
      serving user asks.
    """

    spec: Spec
    outcome: str
    reason: str = ""
    remedy: str = ""
    effective: Mapping[str, Any] = field(default_factory=dict)
    device: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    round: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""
    gates: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, Any] = field(default_factory=dict)
    times: Mapping[str, Any] = field(default_factory=dict)
    ceilings: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)
    serving: Mapping[str, Any] = field(default_factory=dict)
    watch: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise RecordError(f"unknown outcome {self.outcome!r}; one of {', '.join(OUTCOMES)}")

    def to_json(self) -> str:
        """The record as JSON with sorted keys; equal records give equal text. Raises `RecordError` for a NaN."""
        try:
            return json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True, indent=1, allow_nan=False) + "\n"
        except ValueError as error:
            raise RecordError(f"the record of {self.spec.stack} holds a number that is not finite: {error}") from error

    @property
    def digest(self) -> str:
        """SHA-256 of the JSON: the stem of the file's name."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write the record into a folder, which is made if need be; returns its path. Raises `RecordError`."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordError(f"cannot make the folder {folder}: {error}") from error
        return write_atomically(folder / f"{self.digest}.json", self.to_json().encode(), RecordError)


def read(path: str | os.PathLike[str]) -> Record:
    """The record in a file. Raises `RecordError` where its content is not what its name says, or of another schema."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error}") from error
    if hashlib.sha256(content).hexdigest() != path.stem:
        raise RecordError(f"{path} is damaged: its content does not have the SHA-256 that its name says")
    try:
        held = json.loads(content)
        schema = held.pop("schema")
        if schema == SCHEMA:
            return _checked(Record(**{**held, "spec": Spec(**held["spec"])}))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, RecordError) as error:
        raise RecordError(f"{path} is no record: {type(error).__name__}: {error}") from error
    raise RecordError(f"{path} is of schema {schema!r}; this version reads {SCHEMA}")


def _checked(record: Record) -> Record:
    """The record; raises `TypeError` or `ValueError` where what figures are made from has another form than ours."""
    spec = Spec(backend="")
    for f in fields(Spec):
        _same_type(f"spec.{f.name}", getattr(record.spec, f.name), getattr(spec, f.name))
    empty = Record(spec=spec, outcome="not measured")
    for f in fields(Record)[1:]:
        _same_type(f.name, getattr(record, f.name), getattr(empty, f.name))
    losses, perturbed = record.training.get("losses", []), record.training.get("perturbed", [])
    for curve in (losses, *perturbed):
        _same_type("a curve in training", curve, [])
        _finite("a curve in training", curve)
        if len(curve) != len(losses):
            raise ValueError(f"curves in training must be equally long, got {len(curve)} and {len(losses)} steps")
    for mode, timed in record.samples.items():
        _same_type(f"samples.{mode}.seconds", timed["seconds"], [])
        _finite(f"samples.{mode}", measured := [timed["steps"], timed["batch"], *timed["seconds"]])
        if len(measured) < 3 or min(measured) <= 0:
            raise ValueError(f"samples.{mode} must hold positive steps, batch and seconds")
    for finding in record.gates.get("parity", {}).get("findings", []):
        _same_type("the name of a tensor in gates.parity", finding["what"], "")
        _finite(finding["what"], [finding["error"], finding["allowed"]])
    record.to_json()
    return record


def _same_type(name: str, value: object, example: object) -> None:
    if type(value) is not type(example):
        raise TypeError(f"{name} must be {type(example).__name__}, got {value!r:.80}")


def _finite(name: str, values: Sequence[object]) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} must hold finite numbers, got {value!r:.80}")


def read_all(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Record], Sequence[RecordError]]:
    """Every record in the given files and folders, in the order of their names, and what was wrong with the others."""
    records, problems = {}, []
    for given in map(Path, paths):
        if not given.exists():
            problems.append(RecordError(f"no file or folder {given}"))
        for path in sorted(given.glob("*.json")) if given.is_dir() else [given] if given.exists() else []:
            try:
                records[path.stem] = read(path)
            except RecordError as error:
                problems.append(error)
    return list(records.values()), problems
