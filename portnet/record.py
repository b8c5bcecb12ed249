"""What one measurement asked for and found: one JSON file, named by the SHA-256 of its content.

Files from many machines are merged by putting them into one folder, or by naming several; what is there twice counts
once. A damaged one is named and refused, and the others are used. The hash finds damage, not forgery: whoever writes
another content can write its hash too. ``docs/records.md`` tells the fields, ``docs/record.schema.json`` their form.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import cache
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

RUNGS = ("unfold", "direct")
"""Of `Spec.without`: what is left where the library is taken away, PortNet's own convolutions."""

MODES = ("train", "infer", "serve", "scale")
"""``serve`` asks what a serving user does: latency at batch 1, a sweep over batches, memory, the bus. ``scale``: how
training goes in several processes, beside one."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What to measure: one stack, in one mode, on one piece of work.

    `without` names library layers that are taken away. `model` is ``package:factory`` for a user's own module, or
    empty for AlexNet, of which `preset`, `image_size` and `classes` say which one. The training curve is run at
    `curve_size` pixels, `curve_batch` images a step for `curve_steps` steps, and held against `perturbed` runs of
    equals; the gate, the clock and the timing at `image_size` and `batch`. `blocks` are timed in a process; 0 stops at
    the gates. `quick` says that fewer samples were asked for than a figure to be quoted needs. `strict` refuses a stack
    of which a part would run elsewhere than on the device, where its backend can tell beforehand. `parallel` is how
    `processes` share the network (``data``, ``towers``), of mode ``scale`` alone; `batch` is then each one's with
    ``data``, and of both together with ``towers``.
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
    strict: bool = False
    parallel: str = ""
    processes: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "without", tuple(self.without))  # JSON knows lists only

    @property
    def stack(self) -> str:
        """Backend, engine and precision, and what sets it apart from the plainest of that name."""
        name = f"{self.backend}/{self.engine}/{self.precision}"
        name += "/channels-last" if self.channels_last else ""
        name += "" if self.formulation == "portable" else f" ({self.formulation})"
        return name + "".join(f" {taken(layer)}" for layer in self.without)


def taken(layer: str) -> str:
    """Which layer is missing; of a rung below the libraries, what it comes down to."""
    return f"as {layer}" if layer in RUNGS else f"without {layer}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement: one process's work on one spec.

    - `device` and `environment` say on what it was made and with which versions; `watch` what else went on there
      meanwhile, and `round` where the process stood among others: the `series` it was run in, its `number`, the
      stacks `beside` it, the `probe` of the host before each block in seconds, and whether the round was `rejected`
      because that probe differed between the sides.
    - `effective` holds the settings that were in force, after library layers were taken away, and the SHA-256 of the
      weights that were timed.
    - `gates` holds each gate's figures: ``parity`` the relative errors (1e300 for one that is not finite) and what
      was allowed, tensor by tensor; ``curve`` the loss beside the envelope of equals; ``clock`` its times in
      seconds; ``fallbacks`` operations by name; ``trend`` the drift of the blocks.
    - `training` holds the loss before each step, in nats, and in `perturbed` the losses of equals that began one
      rounding away. `weights` is the SHA-256 of the curve's initial weights.
    - `answers` tells of test pictures, answered with trained weights (`weights`, their SHA-256) at `pixels` a side: of
      `count` how many were `right`, and `right_by_reference`; on how many the highest logit is the float64 reference's
      (`agree`); and the logits' worst relative `error` over classes.
    - `samples` holds, for the mode, the seconds of every timed block, its steps, and the images in a step (`batch`);
      and in `warm_up` the seconds of the blocks before them. `times` are the seconds to the first step, and of whole
      steps with their input.
    - `ceilings` are FLOP/s and bytes/s; `layers` each layer's least work, floor and times in seconds; `serving` what a
      serving user asks.
    - `scaling` tells of several processes: the library of their `collectives`; whether they share `one_device`; by
      number of processes the timed blocks of each round (`rounds`); what a step sends by operation (`traffic`, bytes of
      all processes together) and the seconds of each operation alone, by its bytes (`operations`).
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
    answers: Mapping[str, Any] = field(default_factory=dict)
    samples: Mapping[str, Any] = field(default_factory=dict)
    times: Mapping[str, Any] = field(default_factory=dict)
    ceilings: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)
    serving: Mapping[str, Any] = field(default_factory=dict)
    scaling: Mapping[str, Any] = field(default_factory=dict)
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
        """Write the record into a folder, which is made if need be; returns its path.

        Once this returns, the file is there whole; whenever the process dies before, it is there whole or not at all.
        Raises `RecordError`, also for what `read` would refuse.
        """
        folder, text = Path(folder), self.to_json()
        try:
            _checked(json.loads(text))
        except (ValueError, TypeError) as error:
            raise RecordError(f"the record of {self.spec.stack} could not be read again: {error}") from error
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordError(f"cannot make the folder {folder}: {error}") from error
        content = text.encode()
        return write_atomically(folder / f"{hashlib.sha256(content).hexdigest()}.json", content, RecordError)


class Refused(RecordError):
    """A file that is not used: its `path`, and the `kind` of trouble.

    ``missing``, ``unreadable``, ``foreign`` (not named by a SHA-256), ``damaged`` (its content has another SHA-256 than
    its name), ``unknown schema``, or ``malformed`` (whole, but not in the form of its schema).
    """

    def __init__(self, path: Path, kind: str, message: str):
        super().__init__(message)
        self.path, self.kind = path, kind


@dataclass(frozen=True, kw_only=True)
class Found:
    """A record and every file that holds it."""

    record: Record
    paths: tuple[Path, ...]


def read(path: str | os.PathLike[str]) -> Record:
    """The record in a file. Raises `Refused` where its content is not what its name says, or of another form."""
    path = Path(path)
    try:
        if not path.is_file():  # reading a pipe could take for ever
            raise OSError("it is no regular file")
        content = path.read_bytes()
    except OSError as error:
        raise Refused(path, "unreadable", f"cannot read {path}: {error}") from error
    if not re.fullmatch("[0-9a-f]{64}", path.stem):
        raise Refused(path, "foreign", f"{path} is foreign: a record's name is the SHA-256 of its content, then .json")
    if hashlib.sha256(content).hexdigest() != path.stem:
        told = f"{path} is damaged: its content does not have the SHA-256 that its name says; copy it again"
        raise Refused(path, "damaged", told)
    try:
        held = json.loads(content)
        schema = held["schema"]
        if schema == SCHEMA:
            return _checked(held)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(path, "malformed", f"{path} is no record: {type(error).__name__}: {error}") from error
    raise Refused(path, "unknown schema", f"{path} is of schema {schema!r:.80}; this version reads {SCHEMA}")


def search(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Found], list[Refused]]:
    """Every record in the given files and folders, in the order of their names, and the files that were refused.

    In folders (not those inside them) every ``*.json`` counts whose name does not begin with a dot. Equal records are
    one, wherever they lie.
    """
    found: dict[str, Found] = {}
    refused, seen = [], set()
    for given in map(Path, paths):
        try:
            if not given.exists():
                raise Refused(given, "missing", f"no file or folder {given}")
            inside = sorted(given.iterdir()) if given.is_dir() else [given]
        except Refused as error:
            refused.append(error)
            continue
        except OSError as error:
            refused.append(Refused(given, "unreadable", f"cannot read {given}: {error}"))
            continue
        for path in inside:
            # Hidden files are none of ours: macOS puts "._name" beside a name on other systems' disks.
            if path != given and (path.suffix != ".json" or path.name.startswith(".")):
                continue
            if (real := os.path.realpath(path)) in seen:
                continue
            seen.add(real)
            try:
                record = read(path)
            except Refused as error:
                refused.append(error)
                continue
            earlier = found.get(record.digest)
            found[record.digest] = Found(record=record, paths=(*(earlier.paths if earlier else ()), path))
    return list(found.values()), refused


def read_all(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Record], Sequence[RecordError]]:
    """Every record in the given files and folders, in the order of their names, and what was wrong with the others."""
    found, refused = search(paths)
    return [f.record for f in found], refused


# The form of a record, as JSON Schema has it. It is both published and what `_checked` goes by.

_Form = Mapping[str, Any]

_LARGEST = 1e300
"""Beyond it a sum or a square of two numbers would be no number."""
_DEPTH = 8
"""How deep that may be nested whose form is not laid down: vendors' versions, telemetry."""
_ANY = {"$ref": f"#/$defs/any{_DEPTH}"}


def _number(low: float = -_LARGEST, high: float = _LARGEST, *, kind: str = "number", null: bool = False) -> _Form:
    return {"type": [kind, "null"] if null else kind, "minimum": low, "maximum": high}


def _list(items: _Form, at_least: int = 0) -> _Form:
    return {"type": "array", "items": items, "minItems": at_least}


def _map(values: _Form) -> _Form:
    return {"type": "object", "additionalProperties": values}


def _object(required: Sequence[str] = (), **properties: _Form) -> _Form:
    """Of these properties, and any others: what a later version adds is kept, and no figure is made from it."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": _ANY}


_TEXT, _TRUTH = {"type": "string"}, {"type": "boolean"}
_COUNT = _number(0, 2**53, kind="integer")
_POSITIVE_COUNT = _number(1, 2**53, kind="integer")
_SIZE, _MAYBE_SIZE = _number(0), _number(0, null=True)
_DURATION = _number(1e-9, 1e12)
"""Seconds of work. No clock resolves less than a nanosecond, and a rate made from it stays finite."""
_SPENT = _number(0, 1e12)
"""Seconds that may be none, as those of a fetch may."""
_MAYBE_RATE = _number(1e-9, 1e30, null=True)

_CLOCK = _object(
    steps=_POSITIVE_COUNT, blocks=_list(_SPENT), idle=_list(_SPENT), last=_list(_SPENT), right=_TRUTH,
    longer=_list(_SIZE), unseen=_list(_SIZE), events=_list(_SIZE), share=_MAYBE_SIZE, honest=_TRUTH,
)  # fmt: skip
_TIMED = _object(
    ("batch", "steps", "seconds"),
    batch=_POSITIVE_COUNT, steps=_POSITIVE_COUNT, seconds=_list(_DURATION, 1), warm_up=_list(_DURATION),
)  # fmt: skip
_CEILINGS = _object(flops=_MAYBE_RATE, bandwidth=_MAYBE_RATE, samples=_map(_list(_number(1e-9, 1e30))))

_FORMS: Mapping[str, _Form] = {
    "device": _object(name=_TEXT, vendor=_TEXT, memory=_number(0, 2**63, kind="integer", null=True)),
    "environment": _object(date=_TEXT),
    "round": _object(
        series=_TEXT, number=_COUNT, reruns=_COUNT, beside=_list(_TEXT), probe=_list(_DURATION), rejected=_TRUTH
    ),
    "gates": _object(
        parity=_object(
            passed=_TRUTH, oracle=_TRUTH,
            findings=_list(_object(("what", "error", "allowed"), what=_TEXT, error=_SIZE, allowed=_SIZE)),
        ),
        curve=_object(passed=_TRUTH, share=_SIZE, step=_COUNT, runs=_COUNT),
        clock=_map(_CLOCK),
        fallbacks=_object(known=_TRUTH, operations=_map(_COUNT)),
        agreement=_object(("passed", "error", "allowed"), passed=_TRUTH, what=_TEXT, error=_SIZE, allowed=_SIZE),
        repeats=_object(("equal",), equal=_TRUTH, compared=_COUNT, differing=_list(_TEXT)),
        warm_up=_object(steady_from=_number(0, 2**53, kind="integer", null=True), blocks=_COUNT),
        trend=_object(change=_number(), low=_number(null=True), high=_number(null=True), unsteady=_TRUTH),
    ),
    "training": _object(losses=_list(_number()), perturbed=_list(_list(_number()))),
    "answers": _object(
        weights=_TEXT, pixels=_POSITIVE_COUNT, count=_POSITIVE_COUNT, right=_COUNT, right_by_reference=_COUNT,
        agree=_COUNT, error=_SIZE,
    ),
    "samples": _map(_TIMED),
    "times": _map({**_MAYBE_SIZE, "type": ["number", "array", "null"], "items": _SPENT}),
    "ceilings": {
        **_CEILINGS,
        "properties": {**_CEILINGS["properties"], "after": {**_CEILINGS, "type": ["object", "null"]}},
    },
    "layers": _map(
        _object(
            ("flops", "bytes"), flops=_SIZE, bytes=_SIZE, floor=_MAYBE_SIZE, forward=_MAYBE_SIZE, backward=_MAYBE_SIZE
        )
    ),
    "serving": _object(
        latencies=_list(_DURATION), p50=_MAYBE_SIZE, p90=_MAYBE_SIZE, p99=_MAYBE_SIZE,
        bus=_object(to_device=_MAYBE_RATE, to_host=_MAYBE_RATE),
        sweep=_map(
            _object(
                ("steps", "seconds"), steps=_POSITIVE_COUNT, seconds=_list(_DURATION, 1), latencies=_list(_DURATION),
                peak_memory=_MAYBE_SIZE,
            )
        ),
        largest_batch=_number(0, 2**53, kind="integer", null=True),
    ),
    "scaling": _object(
        collectives=_TEXT, one_device=_TRUTH, rounds=_map(_list(_TIMED)),
        traffic=_map(_object(("calls", "bytes"), calls=_COUNT, bytes=_COUNT)),
        operations=_map(_list(_object(("bytes", "seconds"), bytes=_POSITIVE_COUNT, seconds=_list(_DURATION, 1)))),
    ),
    "watch": _object(blocks=_COUNT, seconds=_SPENT),
}  # fmt: skip
"""Of the fields that are mappings; `effective` has none."""

_TYPES: Mapping[Any, _Form] = {
    str: _TEXT,
    bool: _TRUTH,
    int: _number(0, 2**64 - 1, kind="integer"),
    tuple[str, ...]: _list(_TEXT),
    Mapping[str, Any]: _object(),
}


def json_schema() -> dict[str, Any]:
    """The form of a record as a JSON Schema of draft 2020-12; ``docs/record.schema.json`` holds it.

    What it cannot say is that the curves in ``training`` are equally long, and that an integer has no decimal point.
    """
    anything = {"type": ["object", "array", "string", "number", "boolean", "null"], "minimum": -_LARGEST,
                "maximum": _LARGEST}  # fmt: skip
    levels: dict[str, Any] = {"any0": {**anything, "type": ["string", "number", "boolean", "null"]}}
    for depth in range(1, _DEPTH + 1):
        inner = {"$ref": f"#/$defs/any{depth - 1}"}
        levels[f"any{depth}"] = {**anything, "items": inner, "additionalProperties": inner}
    spec = {"mode": {"enum": list(MODES)}, "division": {"enum": list(DIVISIONS)}}
    record = {"schema": {"const": SCHEMA}, "spec": _dataclass(Spec, spec), "outcome": {"enum": list(OUTCOMES)}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A record of PortNet: what one measurement asked for and found",
        **_dataclass(Record, {**_FORMS, **record}, required=("schema",)),
        "$defs": levels,
    }


def _dataclass(of: type[Spec] | type[Record], forms: Mapping[str, _Form], required: Sequence[str] = ()) -> _Form:
    """Of a dataclass's fields and no others; those that have no default are required."""
    needed = [f.name for f in fields(of) if f.default is MISSING and f.default_factory is MISSING]
    return {
        "type": "object",
        "properties": {**forms, **{f.name: forms.get(f.name) or _TYPES[f.type] for f in fields(of)}},
        "required": [*required, *needed],
        "additionalProperties": False,
    }


_KINDS: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def _checked(held: Mapping[str, Any]) -> Record:
    """The record in what a file held; raises `TypeError` or `ValueError` where that has another form than ours."""
    form = _schema()
    _check("", held, form, form["$defs"])
    training = held.get("training", {})
    steps = len(training.get("losses", ()))
    if any(len(run) != steps for run in training.get("perturbed", ())):
        raise ValueError(f"training.perturbed: its curves must be as long as the losses, {steps} steps")
    content = {k: v for k, v in held.items() if k != "schema"}
    return Record(**{**content, "spec": Spec(**held["spec"])})


@cache
def _schema() -> dict[str, Any]:
    return json_schema()


def _check(name: str, value: Any, form: _Form, defs: Mapping[str, _Form]) -> None:
    """Hold a value from JSON against the part of JSON Schema that `json_schema` uses; `name` is where it stands."""
    if "$ref" in form:
        form = defs[form["$ref"].removeprefix("#/$defs/")]
    if "enum" in form or "const" in form:
        allowed = form.get("enum") or [form["const"]]
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r:.80}; one of {', '.join(allowed)}")
        return
    kinds = [form["type"]] if isinstance(form["type"], str) else form["type"]
    if type(value) not in [t for kind in kinds for t in _KINDS[kind]]:
        raise TypeError(f"{name or 'a record'} must be {' or '.join(kinds)}, got {value!r:.80}")
    if isinstance(value, dict):
        if missing := [key for key in form.get("required", ()) if key not in value]:
            raise ValueError(f"{name or 'a record'} must have {', '.join(missing)}")
        known, others = form.get("properties", {}), form["additionalProperties"]
        for key, inner in value.items():
            if key not in known and others is False:
                raise ValueError(f"{name or 'a record'} has no field {key!r:.80}; another version's?")
            _check(f"{name}.{key:.80}".removeprefix("."), inner, known.get(key, others), defs)
    elif isinstance(value, list):
        if len(value) < form.get("minItems", 0):
            raise ValueError(f"{name} must hold {form['minItems']} or more, got {len(value)}")
        for i, item in enumerate(value):
            _check(f"{name}[{i}]", item, form["items"], defs)
    # A NaN is neither above nor below.
    elif type(value) in (int, float) and not form["minimum"] <= value <= form["maximum"]:
        raise ValueError(f"{name} must be from {form['minimum']:g} to {form['maximum']:g}, got {value!r:.80}")


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1))
