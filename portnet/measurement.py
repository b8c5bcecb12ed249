"""One measurement: probe, gates, time. Run in a process of its own by `portnet.launch`.

A figure counts only behind its gates; what fails one has an outcome and no figure. The process that starts this one
says when a block is timed, so that several can take turns on one machine.
"""

import hashlib
import math
import os
import platform
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from portnet import clock, parity, plugins, stats
from portnet.contract import PRECISIONS, Backend, Ceilings, Session, Settings
from portnet.errors import InputError, PortNetError, Unavailable, UnknownName, Unsupported
from portnet.graph import Cost
from portnet.own_model import workload
from portnet.record import Record, Spec
from portnet.watch import Energy, Watch, available_memory, busy_before
from portnet.workload import Say, curve_verdict, effective

BLOCK = 0.1
"""Seconds that a timed block takes at least."""
SLOW = 1.0
"""A block that takes longer than this, in seconds, has its clock examined fewer times."""
WARM_UP = 60.0
"""Seconds after which a stack that is not steady yet is timed all the same; its trend then tells."""
LATENCIES = 300
SWEEP = tuple(2**i for i in range(11))
"""Batch sizes of a serving user's sweep, as far as memory goes."""
SWEEP_SECONDS = 0.5


def parse_stack(stack: str) -> dict[str, Any]:
    """The fields of `Spec` in ``backend[/engine][/precision][/channels-last]``, in any order after the backend.

    A formulation other than ``portable`` can stand among them too. Raises `UnknownName` for a backend or a part that
    there is none of, and `InputError` for two of a kind.
    """
    name, *parts = stack.split("/")
    backend = plugins.backends()[name]
    found: dict[str, Any] = {"backend": name}
    kinds = {"engine": backend.engines, "precision": PRECISIONS, "formulation": backend.formulations}
    for part in parts:
        kind = next((k for k, names in kinds.items() if part in names), None)
        if part == "channels-last":
            kind, value = "channels_last", True
        elif kind is None:
            raise UnknownName(f"part of the stack {stack}:", part, [*sum(kinds.values(), ()), "channels-last"])
        else:
            value = part  # type: ignore[assignment]
        if kind in found:
            raise InputError(f"the stack {stack!r} names its {kind.replace('_', ' ')} twice")
        found[kind] = value
    if parity.is_oracle(backend):
        found.setdefault("precision", "float64")
    return found


class _Wrong(Exception):
    """What was computed is not the network."""


class Measurement:
    """One spec on its way through the gates: `prepare`, then a `block` at a time, then `finish`.

    What goes wrong is an outcome of the record that `finish` returns; nothing raises. `detail` asks for what need be
    measured only once in a series: the training curve, the layers, whole steps with their input.
    """

    def __init__(self, spec: Spec, say: Say = lambda _: None, *, detail: bool = True) -> None:
        self.spec, self.say, self.detail = spec, say, detail
        self.record = Record(spec=spec, outcome="not measured", environment=environment())
        self.ready = False
        self.seconds: list[float] = []
        self.energy: Energy | None = None
        self.backend: Backend
        self.settings: Settings
        self.session: Session | None = None

    @contextmanager
    def _outcome(self) -> Iterator[None]:
        """Whatever goes wrong inside becomes the record's outcome."""
        try:
            yield
        except Unavailable as error:
            self._fail("not available", error.reason, error.remedy)
        except Unsupported as error:
            self._fail("not available", str(error), "ask for another stack; 'portnet backends' lists what there is")
        except PortNetError as error:
            self._fail("failed", f"{type(error).__name__}: {error}")
        except _Wrong as error:
            self._fail("wrong", str(error))
        except Exception as error:
            reason = "".join(traceback.format_exception_only(error)).strip()
            self._fail("out of memory" if _out_of_memory(error) else "failed", reason)

    def _fail(self, outcome: str, reason: str, remedy: str = "") -> None:
        # A figure measured before the failure would look like a result.
        self.record = replace(self.record, outcome=outcome, reason=reason, remedy=remedy, samples={}, serving={})
        self.ready = False

    def _add(self, **fields: Any) -> None:
        self.record = replace(self.record, **fields)

    def _gate(self, name: str, found: Mapping[str, Any]) -> None:
        self._add(gates={**self.record.gates, name: found})

    def prepare(self) -> bool:
        """Everything before the timed blocks. False where there is nothing to time, and `finish` says why."""
        with self._outcome():
            self.ready = self._prepare()
        return self.ready

    def _prepare(self) -> bool:
        spec, say = self.spec, self.say
        # Python and what it imports, up to here.
        self.started = time.time() - psutil.Process().create_time()
        busy = busy_before()
        say("probe")
        self.backend = plugins.backends()[spec.backend]
        began = perf_counter()
        device = plugins.probe(self.backend)
        probed = perf_counter() - began
        self._add(device={"vendor": self.backend.vendor, "note": self.backend.note, **asdict(device)})
        if spec.mode == "train" and "train" not in self.backend.modes:
            raise Unsupported(f"{spec.backend} does not train")
        self.settings, environment = effective(self.backend, spec)
        if missing := {k: v for k, v in environment.items() if os.environ.get(k) != v}:
            raise Unsupported(f"this process was started without {missing}, which takes {spec.without} away")
        self._add(effective={**asdict(self.settings), "environment": environment})
        self.backend.check(self.settings)
        self.workload = workload(spec)
        batches = self.workload.batches(spec.batch if spec.mode != "serve" else 1)
        self.inputs = [next(batches), next(batches)]
        self._first_step(probed)
        if not (self._parity() and self._curve()):
            return False
        self.watch = Watch(self.backend.telemetry)
        self.busy = busy
        self.fallen: dict[str, int] = {}
        if not spec.blocks:
            return True
        say("ceilings")
        # What is taken away is taken from the ceilings too, which then are none.
        self.ceilings = None if spec.without else self.backend.ceilings(self.settings.precision)
        if self.ceilings is not None:
            self._add(ceilings=asdict(self.ceilings))
        self.session = self.workload.open(self.backend, self.settings)
        self._fallbacks(self.session)
        if not self._clock(self.session):
            return False
        if spec.mode == "serve":
            assert self.session is not None
            self._serve(self.session)
            return True
        self._warm_up()
        return True

    def _first_step(self, probed: float) -> None:
        """Time to the first result: loading, opening, compiling and tuning included.

        Whether caches of compiled code were empty, as in the first process of a series, stands in the environment.
        """
        self.say("first step")
        # Initial weights are PortNet's to draw, and not the stack's.
        self._add(effective={**self.record.effective, "weights": self.workload.prepare()})
        began = perf_counter()
        session = self.workload.open(self.backend, self.settings)
        opened = perf_counter() - began
        began = perf_counter()
        images, labels, ids = (session.put(a) for a in self.inputs[0])
        if self.spec.mode == "train":
            session.get(session.train_step(images, labels, ids, step=0, learning_rate=clock.STILL))
        else:
            session.get(session.infer(images))
        stepped = perf_counter() - began
        session.close()
        total = self.started + probed + opened + stepped
        times = {"start": self.started, "probe": probed, "open": opened, "first_step": stepped, "total": total}
        self._add(times=times)

    def _parity(self) -> bool:
        self.say("parity against the float64 reference")
        verdict = self.workload.verdict(self.backend, self.settings)
        oracle = parity.is_oracle(self.backend) and self.settings.precision == "float64"
        self._gate(
            "parity",
            {
                "passed": oracle or verdict.passed,
                "oracle": oracle,
                # JSON has no infinity: what is missing or not finite counts as wrong by more than anything else.
                "findings": [
                    {"what": f.what, "error": f.error if f.error < 1e300 else 1e300, "allowed": f.allowed}
                    for f in verdict.findings
                ],
            },
        )
        if not (oracle or verdict.passed):
            self._fail("wrong", str(verdict))
            return False
        return True

    def _curve(self) -> bool:
        if not (self.detail and self.spec.mode == "train"):
            return True
        found = self.workload.curve(self.backend, self.settings, self.say)
        if not found:
            return True
        self._add(training={k: found[k] for k in ("losses", "perturbed")}, weights=found["weights"])
        if found["perturbed"]:
            seen = curve_verdict(found)
            self._gate("curve", seen)
            if not seen["passed"]:
                self._fail(
                    "wrong",
                    f"at step {seen['step']} of the same training the loss is {seen['share']:.1f} times as far from "
                    f"those of {seen['runs']} equals as one more of them would be",
                )
                return False
        return True

    def _costs(self, batch: int) -> Mapping[str, Cost]:
        training = self.spec.mode == "train"
        return self.workload.costs(batch, training=training, precision=self.settings.precision)

    def _clock(self, session: Session) -> bool:
        mode = "train" if self.spec.mode == "train" else "infer"
        self.say("honest clock")
        self.work = clock.Work(session, mode, *self.inputs)
        flops = sum(cost.flops for cost in self._costs(len(self.inputs[0][0])).values())
        ceiling = self.ceilings.flops / flops if self.ceilings and self.ceilings.flops and flops else None
        # Of a slow stack's steps there are few either way.
        repeats, slow, seconds = (3, 1, BLOCK) if self.spec.quick else (7, 3, 2 * BLOCK)
        seen = clock.examine(self.work, seconds=seconds, repeats=repeats, slow=SLOW, slow_repeats=slow, ceiling=ceiling)
        if seen.share is not None and seen.share > clock.CEILING:
            # The device may have been held up while its ceiling was measured: the best rate seen is the ceiling.
            again = self.backend.ceilings(self.settings.precision)
            if again is not None and again.flops and self.ceilings and self.ceilings.flops:
                best = max(again.flops, self.ceilings.flops)
                seen = replace(seen, share=seen.share * self.ceilings.flops / best)
                self._add(ceilings={**self.record.ceilings, "flops": best, "again": asdict(again)})
        self._gate("clock", {mode: {**asdict(seen), "honest": seen.honest}})
        if not seen.honest:
            self._fail("dishonest clock", f"{mode}: {seen}")
            return False
        # Its steps moved the weights, and the blocks' values are judged by those of the first.
        session.close()
        session = self.session = self.workload.open(self.backend, self.settings)
        self.work = clock.Work(session, mode, *self.inputs)
        self.steps = max(1, clock.steps_for(self.work, BLOCK)[0])
        return True

    def _fallbacks(self, session: Session) -> None:
        self.say("fallbacks")
        images, labels, ids = (session.put(a) for a in self.inputs[0])

        def run() -> None:
            if self.spec.mode == "train":
                session.get(session.train_step(images, labels, ids, step=0, learning_rate=clock.STILL))
            else:
                session.get(session.infer(images))

        found = session.fallbacks(run)
        self.fallen = dict(found or {})
        self._gate("fallbacks", {"known": found is not None, "operations": self.fallen})

    def _warm_up(self) -> None:
        self.say("warm-up")
        warm: list[float] = []
        began = perf_counter()
        start = None
        patience, longest = (20, WARM_UP / 10) if self.spec.quick else (stats.PATIENCE, WARM_UP)
        while start is None and len(warm) < patience and perf_counter() - began < longest:
            warm.append(self.work.block(self.steps))
            start = stats.steady(warm)
        # Warm steps are faster: as many of them as fill a block.
        self.steps = max(self.steps, math.ceil(self.steps * 1.05 * BLOCK / min(warm)))
        self.warm = warm
        self._gate("warm_up", {"steady_from": start, "blocks": len(warm)})

    def block(self, *, counted: bool = True) -> float | None:
        """Time one block of at least `BLOCK` seconds; None where there is none to time (any more).

        One that is not `counted` warms up again, after others had their turn at the machine.
        """
        if not self.ready or self.spec.mode == "serve" or not self.spec.blocks:
            return None
        with self._outcome():
            if not counted:
                return self.work.block(self.steps)
            with self.watch:
                seconds = self.work.block(self.steps)
            self.seconds.append(seconds)
        return self.seconds[-1] if self.ready else None

    def finish(self, beside: Sequence[float] = (), round_: Mapping[str, Any] | None = None) -> Record:
        """The record. `beside`: the host's probe before each block, in seconds; `round_`: see `Record.round`."""
        self._add(round=dict(round_ or {}))
        if self.ready:
            with self._outcome():
                self._finish(list(beside))
        if self.session is not None:
            with self._outcome():
                self.session.close()
        return self.record

    def _finish(self, beside: list[float]) -> None:
        session = self.session
        if session is not None:
            if not self.seconds:
                self._fail("not measured", "no block was timed")
                return
            value = session.get(self.work.run(self.steps))
            if not self.work.is_right(value):
                self._fail("wrong", "after the timed blocks, a step on a known batch no longer gave its value")
                return
            if self.ceilings is not None and not self.spec.quick:
                # Once more: a device that heated up or was slowed down had another ceiling at the end.
                again = self.backend.ceilings(self.settings.precision)
                self._add(ceilings={**self.record.ceilings, "after": asdict(again) if again else None})
            mode = self.spec.mode
            timed: dict[str, Any] = {"batch": self.spec.batch, "steps": self.steps, "seconds": self.seconds}
            self._add(samples={mode: {**timed, "warm_up": self.warm}})
            # The host's probe tells what the host did to work that is done on it, and nothing of an accelerator.
            known = self.record.device.get("unified") and len(beside) == len(self.seconds)
            trend = stats.trend(self.seconds, beside if known else None)
            self._gate("trend", {**asdict(trend), "unsteady": trend.unsteady})
            whole = self.detail and not self.spec.quick
            self._layers(session, timed=whole)
            if whole:
                self._end_to_end(session)
                self._energy(session)
            if trend.unsteady:
                self._watched(session)
                # The samples stay: they are what shows it.
                self._add(
                    outcome="unsteady",
                    reason=f"over {len(self.seconds)} blocks its time changed by {trend.change:+.1%}, 95% interval "
                    f"{trend.low:+.1%} to {trend.high:+.1%}",
                )
                return
        self._watched(session)
        if self.fallen:
            total = sum(self.fallen.values())
            names = ", ".join(f"{n} ({c})" for n, c in sorted(self.fallen.items(), key=lambda i: -i[1])[:5])
            self._add(outcome="partial", reason=f"{total} operations ran elsewhere than on the device: {names}")
        else:
            self._add(outcome="works")

    def _watched(self, session: Session | None) -> None:
        watch = self.watch.summary() | {"busy_before": self.busy}
        watch["device_peak_memory"] = session.peak_memory() if session else None
        if self.energy is not None:
            watch["energy"] = self.energy.summary()
        self._add(watch=watch)

    def _layers(self, session: Session, *, timed: bool) -> None:
        """Each layer's least work, its floor under the ceilings, and where `timed` what it takes on its own."""
        self.say("layers")
        images, labels, _ = self.inputs[0]
        times = session.layer_times(images, labels if self.spec.mode == "train" else None) if timed else {}
        costs = self._costs(len(images))
        found = {}
        for name, cost in costs.items():
            seen = times.get(name)
            found[name] = {
                "flops": cost.flops,
                "bytes": cost.bytes,
                "floor": floor(cost, self.ceilings),
                "forward": seen.forward if seen else None,
                "backward": seen.backward if seen else None,
            }
        self._add(layers=found)

    def _end_to_end(self, session: Session) -> None:
        """Seconds of whole steps: pictures read, cut and normalised, copied to the device, and the result fetched."""
        self.say("end to end")
        fetched: list[float] = []
        began = perf_counter()
        for i, batch in enumerate(islice(self.workload.batches(self.spec.batch), 12)):
            images, labels, ids = (session.put(a) for a in batch)
            if self.spec.mode == "train":
                session.get(session.train_step(images, labels, ids, step=i, learning_rate=clock.STILL))
            else:
                session.get(session.infer(images))
            fetched.append(perf_counter() - began)
            began = perf_counter()
            if sum(fetched) > 10 and len(fetched) > 3:
                break
        # The first batch also opens what the data comes from.
        self._add(times={**self.record.times, "end_to_end": fetched[1:]})

    def _energy(self, session: Session) -> None:
        self.energy = Energy(of="cpu" if self.record.device.get("unified") else "gpu")
        if self.energy.summary()["reason"]:
            return
        self.say("energy")
        session.synchronize()
        with self.energy:
            began, steps = perf_counter(), 0
            while perf_counter() - began < 5:
                self.work.run(self.steps)
                session.synchronize()
                steps += self.steps
        self._add(times={**self.record.times, "energy_images": steps * self.spec.batch})

    def _serve(self, session: Session) -> None:
        """Latency at batch 1, throughput by batch, the bus, memory, and the largest batch that fits."""
        one = self.inputs[0][0]
        self.say("latency at batch 1")
        for _ in range(10):
            session.get(session.infer(session.put(one)))
        count = 100 if self.spec.quick else LATENCIES
        latencies = []
        with self.watch:
            for i in range(count):
                image = np.roll(one, i, axis=-1)
                began = perf_counter()
                session.get(session.infer(session.put(image)))
                latencies.append(perf_counter() - began)
                if sum(latencies) > 60:
                    break
        found: dict[str, Any] = {"latencies": latencies, **asdict(stats.percentiles(latencies))}
        found["bus"] = self._bus(session, one)
        session.close()
        found["sweep"] = {}
        found["largest_batch"] = None
        self._add(serving=found)
        for batch in SWEEP[: 6 if self.spec.quick else None]:
            self.say(f"batch {batch}")
            needed = batch * self._needed(batch)
            if self.record.device.get("unified") and needed > available_memory() / 2:
                # Where the host's memory is the device's, what does not fit takes the whole machine down.
                found["stopped"] = f"batch {batch} might need {needed:.0f} of {available_memory()} bytes that are free"
                break
            try:
                found["sweep"][str(batch)] = self._at_batch(batch)
            except Exception as error:
                if not _out_of_memory(error):
                    raise
                found["stopped"] = f"batch {batch} is out of memory"
                break
        if self.record.device.get("memory"):
            found["largest_batch"] = self._largest(max(map(int, found["sweep"]), default=1))
        self._add(serving=found)
        self.session = None

    def _needed(self, batch: int) -> float:
        return sum(cost.bytes for cost in self._costs(batch).values()) / batch

    def _at_batch(self, batch: int) -> dict[str, Any]:
        verdict = self.workload.verdict_at(self.backend, self.settings, batch)
        if verdict is not None and not verdict.passed:
            raise _Wrong(f"batch {batch}: {verdict}")
        session = self.workload.open(self.backend, self.settings)
        try:
            pair = list(islice(self.workload.batches(batch), 2))
            work = clock.Work(session, "infer", pair[0], pair[1])
            steps, _ = clock.steps_for(work, BLOCK)
            work.block(steps)
            seconds = [work.block(steps)]
            while sum(seconds) < SWEEP_SECONDS or len(seconds) < 3:
                seconds.append(work.block(steps))
            if not work.is_right(session.get(work.run(steps))):
                raise _Wrong(f"batch {batch}: after the timed blocks, a known batch no longer gave its value")
            return {"steps": steps, "seconds": seconds, "peak_memory": session.peak_memory()}
        finally:
            session.close()

    def _largest(self, fits: int) -> int:
        """The largest batch that one inference fits, to within 1/16; found by doubling, then halving the gap."""

        def tried(batch: int) -> bool:
            self.say(f"does batch {batch} fit")
            session = self.workload.open(self.backend, self.settings)
            try:
                images = next(self.workload.batches(16))[0]
                session.get(session.infer(session.put(images.repeat(-(-batch // 16), axis=0)[:batch])))
                return True
            except Exception as error:
                if not _out_of_memory(error):
                    raise
                return False
            finally:
                session.close()

        top = fits * 2
        while top <= 1 << 17 and tried(top):
            fits, top = top, top * 2
        while top - fits > max(1, fits // 16):
            middle = (fits + top) // 2
            fits, top = (middle, top) if tried(middle) else (fits, middle)
        return fits

    def _bus(self, session: Session, one: Any) -> dict[str, Any]:
        """Bytes/s from host to device and back, for 64 MiB of float32; None where they share their memory."""
        if self.record.device.get("unified"):
            return {"to_device": None, "to_host": None, "reason": "host and device share their memory"}
        host = np.zeros(1 << 24, np.float32)
        rates: dict[str, list[float]] = {"to_device": [], "to_host": []}
        for _ in range(6):
            session.synchronize()
            began = perf_counter()
            there = session.put(host)
            session.synchronize()
            rates["to_device"].append(host.nbytes / (perf_counter() - began))
            began = perf_counter()
            session.get(there)
            rates["to_host"].append(host.nbytes / (perf_counter() - began))
        return {k: median(v[1:]) for k, v in rates.items()} | {"samples": rates}


def measure(spec: Spec, say: Say = lambda _: None) -> Record:
    """Measure one spec in this process, on its own; every way it can go wrong is an outcome of the record."""
    measurement = Measurement(spec, say)
    if measurement.prepare():
        for _ in range(spec.blocks):
            measurement.block()
    return measurement.finish()


def floor(cost: Cost, ceilings: Ceilings | None) -> float | None:
    """Seconds below which a device with these ceilings cannot do that work; None where one is not known."""
    if ceilings is None or not ceilings.flops or not ceilings.bandwidth:
        return None
    return max(cost.flops / ceilings.flops, cost.bytes / ceilings.bandwidth)


def environment() -> dict[str, Any]:
    """Versions, the machine's kind and the time."""
    found = {}
    for name in ("portnet", "numpy", "scipy", "torch", "onnx", "onnxruntime", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "allocator": os.environ.get("GLIBC_TUNABLES", ""),
        "cold_caches": os.environ.get("PORTNET_COLD") == "1",
        # Tells machines apart and names none.
        "host": hashlib.sha256(f"portnet {platform.node()} {uuid.getnode()}".encode()).hexdigest()[:12],
        "versions": found,
    }


_MEMORY = ("out of memory", "can't allocate memory", "failed to allocate memory")


def _out_of_memory(error: BaseException) -> bool:
    """Frameworks have their own names for it: torch.OutOfMemoryError, XPU's, ONNX Runtime's, and torch's on a CPU."""
    name, text = type(error).__name__.lower(), str(error).lower()
    return (
        isinstance(error, MemoryError) or "outofmemory" in name or "out of memory" in text or "can't allocate" in text
    )
