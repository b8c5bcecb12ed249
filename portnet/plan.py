"""What to measure, in which order, and as much of it as fits: from stacks to series of processes to records."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from math import inf
from typing import Any

from portnet import alexnet, launch, measurement, own_model, parity, plugins, workload
from portnet.contract import INT8, Backend, Device, Settings
from portnet.errors import InputError, PortNetError, Unavailable
from portnet.record import MODES, Record, Spec

QUICK: dict[str, Any] = {"quick": True, "blocks": 10, "perturbed": 5}
"""What quick measurements do less of."""
NO_TIME = "no time was left"
"""Why a record says `not measured` whose turn did not come within the time that was given."""
TOGETHER = 4
"""Stacks that are alive at once; more would leave each too little memory."""

Say = Callable[[Spec, str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Groups of specs, each measured side by side, most telling group first; and why others were left out."""

    groups: tuple[tuple[Spec, ...], ...]
    left_out: tuple[tuple[str, Unavailable], ...] = field(default=())


def measure(
    *stacks: str,
    modes: Sequence[str] = (),
    batches: Sequence[int] = (16,),
    rounds: int = 10,
    seconds: float = inf,
    timeout: float = 600.0,
    out: str | os.PathLike[str] | None = None,
    say: Say = lambda spec, line: None,
    **options: Any,
) -> list[Record]:
    """Measure stacks side by side, each in fresh processes; one record a process, in the order they were made.

    A stack is ``backend[/engine][/precision][/channels-last]``, such as ``cuda/compile/bfloat16``. `modes`: ``train``,
    ``infer`` and ``serve``; the first two, as far as the backend goes, by default. `batches`: images a step. `rounds`
    of fresh processes, 10 for figures to be quoted; none begins that would not end within `seconds`. `options` are
    further fields of `portnet.record.Spec`. With `out`, every record is written to that folder as soon as it is made.
    Raises `InputError` for what makes no sense, before anything is measured; what goes wrong later is an outcome.
    """
    plan = of_stacks(stacks, modes=modes, batches=batches, **options)
    made = []
    for record in carry_out(plan, rounds=rounds, seconds=seconds, timeout=timeout, say=say):
        if out is not None:
            record.write(out)
        made.append(record)
    return made


def of_stacks(
    stacks: Sequence[str], *, modes: Sequence[str] = (), batches: Sequence[int] = (16,), **options: Any
) -> Plan:
    """Stacks as asked for by name: side by side, mode by mode."""
    if not stacks:
        raise InputError("name at least one stack, such as cpu/eager/float32")
    groups: list[tuple[Spec, ...]] = []
    found = [measurement.parse_stack(stack) for stack in stacks]
    for mode in modes or ("train", "infer"):
        for batch in batches if mode != "serve" else (1,):
            # Asked for by name, a mode that the backend has not is told as such; by default it is left out.
            specs = [_spec(f, mode=mode, batch=batch, **options) for f in found if modes or _does(f["backend"], mode)]
            groups += _chunks(specs)
    return Plan(groups=tuple(groups))


def everything(
    names: Sequence[str] = (), *, modes: Sequence[str] = (), batches: Sequence[int] = (16,), **options: Any
) -> Plan:
    """Every stack that is available here, the most telling first.

    The best backend's plainest stack, then its faster ones, then the other backends' plainest, then the rest; what
    serving users ask; larger batches last. A backend of `names` is asked for; the others are left out with the reason.
    """
    registry = plugins.backends()
    chosen = [registry[name] for name in names] or sorted(registry.values(), key=lambda b: -b.priority)
    ranked: list[tuple[int, int, dict[str, Any]]] = []
    here, left_out = _probed(chosen)
    for place, backend in enumerate(chosen):
        if backend.name in here:
            device = here[backend.name]
            ranked += [(rank + 10 * (place > 0), place, fields_) for rank, fields_ in _stacks(backend, device)]
            why = f"{device.name} has no kernels for it, and may take a hundred times as long"
            slow = Unavailable(why, "name the stack to measure it anyway")
            left_out += [(f"{backend.name}/{precision}", slow) for precision in device.emulated]
    stacks = [f for _, _, f in sorted(ranked, key=lambda r: r[:2])]
    groups: list[tuple[Spec, ...]] = []
    for batch in batches:
        for chunk in (stacks[i : i + TOGETHER] for i in range(0, len(stacks), TOGETHER)):
            for mode in modes or ("infer", "train"):
                if mode != "serve":
                    groups += _chunks(
                        [_spec(f, mode=mode, batch=batch, **options) for f in chunk if _does(f["backend"], mode)]
                    )
    serving: list[tuple[Spec, ...]] = []
    if not modes or "serve" in modes:
        serving = [(_spec(f, mode="serve", batch=1, **options),) for f in stacks if f["engine"] == "eager"]
    groups = [*groups[:2], *serving[:1], *groups[2:], *serving[1:]]
    return Plan(groups=tuple(groups), left_out=tuple(left_out))


def ladder(stack: str, *, mode: str, batch: int = 16, layers: Sequence[str] = (), **options: Any) -> Plan:
    """A stack whole, and with each of its library layers taken away, side by side; layers that are not there are named.

    `layers`: only these. Raises `InputError` for one that the backend does not have.
    """
    found = measurement.parse_stack(stack)
    whole = _spec(found, mode=mode, batch=batch, **options)
    backend = plugins.backends()[whole.backend]
    known = {layer.name: layer for layer in backend.library_layers(workload.effective(backend, whole)[0])}
    if unknown := [name for name in layers if name not in known]:
        raise InputError(f"{stack} has no layer {', '.join(unknown)} to take away; it has {', '.join(known) or 'none'}")
    specs: list[Spec] = []
    left_out = []
    for name in layers or known:
        if known[name].missing:
            left_out.append((name, Unavailable(known[name].missing, "")))
        else:
            specs.append(replace(whole, without=(name,)))
    # Few enough at a time, the whole stack among each.
    few = TOGETHER - 1
    groups = tuple((whole, *specs[i : i + few]) for i in range(0, max(1, len(specs)), few))
    return Plan(groups=groups, left_out=tuple(left_out))


def quick(names: Sequence[str] = (), *, precision: str = "float32", **options: Any) -> Plan:
    """One round of few blocks of every backend's plainest stacks: what `portnet compare` does."""
    registry = plugins.backends()
    chosen = [registry[name] for name in names] or list(registry.values())
    here, left_out = _probed(chosen)
    specs: list[Spec] = []
    for backend in (b for b in chosen if b.name in here):
        own = "float64" if parity.is_oracle(backend) else precision
        specs += [
            _spec({"backend": backend.name, "precision": own, "formulation": formulation}, **{"quick": True, **options})
            for formulation in backend.formulations
            if formulation in ("portable", "stock")
        ]
        # What a provider makes of fewer bits is asked of it in the same breath.
        if precision == "float32" and INT8 in here[backend.name].precisions and not options.get("model"):
            specs.append(_spec({"backend": backend.name, "precision": INT8}, **{"quick": True, **options}))
    # Nobody asks how fast the reference is, which is slow: its losses are what the others' are held against.
    specs = [replace(s, blocks=0) if parity.is_oracle(registry[s.backend]) else s for s in specs]
    modes = [[replace(s, mode=mode) for s in specs if _does(s.backend, mode)] for mode in ("train", "infer")]
    groups = [g for m in modes for g in _chunks([s for s in m if s.blocks or s.mode == "train"])]
    return Plan(groups=tuple(groups), left_out=tuple(left_out))


def carry_out(
    plan: Plan, *, rounds: int, seconds: float = inf, timeout: float = 600.0, say: Say = lambda spec, line: None
) -> Iterator[Record]:
    """Measure a plan: a round of every group, then the next round of each, until all are done or the time is up.

    A group's first round is begun only if the longest round so far would end in time; a group that had none leaves
    records that say `not measured`.
    """
    deadline = time.monotonic() + seconds
    waiting = [
        (group, launch.series(group, rounds=rounds, timeout=timeout, say=say, deadline=deadline))
        for group in plan.groups
    ]
    longest = 0.0
    first = True
    while waiting:
        going = []
        for group, one in waiting:
            began = time.monotonic()
            if first and began + longest > deadline:
                for spec in group:
                    yield Record(
                        spec=spec,
                        outcome="not measured",
                        reason=NO_TIME,
                        environment=measurement.environment(),
                    )
                continue
            with suppress(StopIteration):
                yield from next(one)
                going.append((group, one))
            longest = max(longest, time.monotonic() - began) if seconds < inf else 0.0
        waiting, first = going, False


def _probed(chosen: Sequence[Backend]) -> tuple[dict[str, Device], list[tuple[str, Unavailable]]]:
    """The devices that are here by their backends' names, and why others are not."""
    found = launch.probes(chosen)
    here = {name: device for name, device in found.items() if isinstance(device, Device)}
    return here, [(name, why) for name, why in found.items() if isinstance(why, Unavailable)]


def _spec(found: dict[str, Any], **options: Any) -> Spec:
    names = {f.name for f in fields(Spec)}
    if unknown := sorted(options.keys() - names):
        raise InputError(f"a measurement has no option {', '.join(unknown)}; it has {', '.join(sorted(names))}")
    given = {k: v for k, v in options.items() if v is not None}
    if given.get("quick"):
        given = QUICK | given
    if given.get("mode", "infer") not in MODES:
        raise InputError(f"mode must be one of {', '.join(MODES)}, got {given['mode']!r}")
    if given.get("batch", 1) < 1 or given.get("blocks", 1) < 0:
        raise InputError("batch must be at least 1, and blocks at least 0")
    if given.get("model"):
        own_model.find(given["model"])
    else:
        size = {"image_size": given["image_size"]} if "image_size" in given else {}
        given["image_size"] = alexnet.graph(given.get("preset", "caffe"), classes=10, **size).input[1]
    return Spec(**{**given, **found})


def _does(name: str, mode: str) -> bool:
    return ("train" if mode == "train" else "infer") in plugins.backends()[name].modes


def _chunks(specs: Sequence[Spec]) -> list[tuple[Spec, ...]]:
    return [tuple(specs[i : i + TOGETHER]) for i in range(0, len(specs), TOGETHER)]


def _stacks(backend: Backend, device: Device) -> Iterator[tuple[int, dict[str, Any]]]:
    """A backend's stacks, and how much each tells: 0 most."""
    if parity.is_oracle(backend):
        yield 5, {"backend": backend.name, "engine": "eager", "precision": "float64"}
        return
    ranks = {("eager", "float32"): 0, ("eager", "bfloat16"): 1} | {(e, "bfloat16"): 2 for e in backend.engines[1:]}
    native = [p for p in device.precisions if p not in device.emulated]
    fastest = (backend.engines[-1], "bfloat16" if "bfloat16" in native else "float32")
    for engine in backend.engines:
        for precision in native:
            if precision == "float64":
                continue
            plain = {"backend": backend.name, "engine": engine, "precision": precision}
            with suppress(PortNetError):
                backend.check(Settings(engine=engine, precision=precision), device)
                yield ranks.get((engine, precision), 4), plain
                if engine == "eager" and "stock" in backend.formulations and precision != "float16":
                    yield 3, {**plain, "formulation": "stock"}
                if True in backend.layouts and (engine == "eager" or (engine, precision) == fastest):
                    yield 4 if engine == "eager" else 1, {**plain, "channels_last": True}
