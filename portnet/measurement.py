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
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from time import perf_counter
from typing import Any

import psutil

from portnet import clock, lockin, parity, plugins, stats
from portnet.contract import INT8, PRECISIONS, Array, Backend, Session, Settings
from portnet.errors import InputError, PortNetError, Unavailable, UnknownName, Unsupported, out_of_memory
from portnet.graph import Cost
from portnet.own_model import workload
from portnet.record import Record, Spec
from portnet.serving import Wrong, serve
from portnet.watch import Energy, Watch, busy_before
from portnet.workload import Say, curve_verdict, effective

BLOCK = 0.1
"""Seconds that a timed block takes at least."""
SLOW = 1.0
"""A block that takes longer than this, in seconds, has its clock examined fewer times."""
WARM_UP = 60.0
"""Seconds after which a stack that is not steady yet is timed all the same; its trend then tells."""


def parse_stack(stack: str) -> dict[str, Any]:
    """The fields of `Spec` in ``backend[/engine][/precision][/channels-last]``, in any order after the backend.

    A formulation other than ``portable`` can stand among them too. Raises `UnknownName` for a backend or a part that
    there is none of, and `InputError` for two of a kind.
    """
    name, *parts = stack.split("/")
    backend = plugins.backends()[name]
    found: dict[str, Any] = {"backend": name}
    kinds = {"engine": backend.engines, "precision": (*PRECISIONS, INT8), "formulation": backend.formulations}
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
        except Wrong as error:
            self._fail("wrong", str(error))
        except Exception as error:
            reason = "".join(traceback.format_exception_only(error)).strip()
            self._fail("out of memory" if out_of_memory(error) else "failed", reason)

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
        if self.detail and spec.mode == "infer" and not spec.without:
            self.say("trained weights on test pictures")
            self._add(answers=self.workload.answers(self.backend, self.settings, self.say))
        if self.detail and not spec.quick:
            self._repeats()
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
            session, self.session = self.session, None
            found = serve(
                self.workload,
                self.backend,
                self.settings,
                session,
                quick=spec.quick,
                unified=device.unified,
                limited=device.memory is not None,
                watch=self.watch,
                say=say,
            )
            self._add(serving=found)
        else:
            self._warm_up()
        return True

    def _first_step(self, probed: float) -> None:
        """Time to the first result: loading, opening, compiling and tuning included.

        Whether caches of compiled code were empty, as in the first process of a series, stands in the environment.
        """
        self.say("first step")
        # Initial weights are PortNet's to draw, and not the stack's.
        began = perf_counter()
        self._add(effective={**self.record.effective, "weights": self.workload.prepare()})
        prepared = perf_counter() - began
        began = perf_counter()
        session = self.workload.open(self.backend, self.settings)
        opened = perf_counter() - began
        began = perf_counter()
        self._step(session, self.inputs[0])
        stepped = perf_counter() - began
        self._add(effective={**self.record.effective, "options": dict(session.options()), "file": session.file_size()})
        session.close()
        total = self.started + probed + opened + stepped
        times = {"start": self.started, "probe": probed, "open": opened, "first_step": stepped, "total": total}
        times["prepare"] = prepared
        self._add(times=times)

    def _step(self, session: Session, batch: clock.Inputs) -> None:
        """One step of the mode, from the host's arrays to the result fetched."""
        images, labels, ids = (session.put(a) for a in batch)
        if self.spec.mode == "train":
            session.get(session.train_step(images, labels, ids, step=0, learning_rate=clock.STILL))
        else:
            session.get(session.infer(images))

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
        meanwhile = Watch()
        with meanwhile:
            seen = clock.examine(
                self.work, seconds=seconds, repeats=repeats, slow=SLOW, slow_repeats=slow, ceiling=ceiling
            )
        if seen.share is not None and seen.share > clock.CEILING:
            # The device may have been held up while its ceiling was measured: the best rate seen is the ceiling.
            again = self.backend.ceilings(self.settings.precision)
            if again is not None and again.flops and self.ceilings and self.ceilings.flops:
                best = max(again.flops, self.ceilings.flops)
                seen = replace(seen, share=seen.share * self.ceilings.flops / best)
                self._add(ceilings={**self.record.ceilings, "flops": best, "again": asdict(again)})
        busy = meanwhile.summary()["foreign_cpu"]
        self._gate("clock", {mode: {**asdict(seen), "honest": seen.honest, "foreign_cpu": busy}})
        # What load can do: delay. It gives no other value, and no rate above the ceiling.
        delayed = seen.right and (seen.share is None or seen.share <= clock.CEILING)
        if not seen.honest and delayed and (busy.get("foreign") or 0) > lockin.CROWDED * busy["of"]:
            load = f"others kept {busy['foreign']:.1f} of {busy['of']} processors busy"
            self._fail("not measured", f"{load} while the clock was examined, which then told nothing: {mode}: {seen}")
            return False
        if not seen.honest:
            self._fail("dishonest clock", f"{mode}: {seen}")
            return False
        # Its steps moved the weights, and the blocks' values are judged by those of the first.
        session.close()
        session = self.session = self.workload.open(self.backend, self.settings)
        self.work = clock.Work(session, mode, *self.inputs)
        self.steps = max(1, clock.steps_for(self.work, BLOCK)[0])
        return True

    def _repeats(self) -> None:
        """Whether the same work gives the same bits twice, on a fresh session each time."""
        self.say("does it repeat bit for bit")
        once, again = self._trial(), self._trial()
        differing = [name for name, value in once.items() if value.tobytes() != again[name].tobytes()]
        self._gate("repeats", {"equal": not differing, "compared": len(once), "differing": differing})

    def _trial(self) -> dict[str, Array]:
        """What three steps leave: the logits of each, or the losses of updates at the recipe's rate and the weights.

        At the rate of timed steps the weights would hide gradients that differ.
        """
        found = {}
        with closing(self.workload.open(self.backend, self.settings)) as session:
            for step in range(3):
                images, labels, ids = (session.put(a) for a in self.inputs[step % 2])
                if self.spec.mode == "train":
                    rate = self.workload.learning_rate
                    value = session.train_step(images, labels, ids, step=step, learning_rate=rate)
                else:
                    value = session.infer(images)
                found[f"step {step}"] = session.get(value)
            if self.spec.mode == "train":
                found |= session.weights()
        return found

    def _fallbacks(self, session: Session) -> None:
        self.say("fallbacks")
        found = session.fallbacks(lambda: self._step(session, self.inputs[0]))
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
        if self.session is not None and not self._timed(self.session, beside):
            return
        self._watched()
        if self.fallen:
            total = sum(self.fallen.values())
            names = ", ".join(f"{n} ({c})" for n, c in sorted(self.fallen.items(), key=lambda i: -i[1])[:5])
            self._add(outcome="partial", reason=f"{total} operations ran elsewhere than on the device: {names}")
        else:
            self._add(outcome="works")

    def _timed(self, session: Session, beside: list[float]) -> bool:
        """What the timed blocks come to. False where that is an outcome already."""
        if not self.seconds:
            self._fail("not measured", "no block was timed")
            return False
        value = session.get(self.work.run(self.steps))
        if not self.work.is_right(value):
            self._fail("wrong", "after the timed blocks, a step on a known batch no longer gave its value")
            return False
        if self.ceilings is not None and not self.spec.quick:
            # Once more: a device that heated up or was slowed down had another ceiling at the end.
            again = self.backend.ceilings(self.settings.precision)
            self._add(ceilings={**self.record.ceilings, "after": asdict(again) if again else None})
        timed: dict[str, Any] = {"batch": self.spec.batch, "steps": self.steps, "seconds": self.seconds}
        self._add(samples={self.spec.mode: {**timed, "warm_up": self.warm}})
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
            self._watched()
            # The samples stay: they are what shows it.
            self._add(
                outcome="unsteady",
                reason=f"over {len(self.seconds)} blocks its time changed by {trend.change:+.1%}, 95% interval "
                f"{trend.low:+.1%} to {trend.high:+.1%}",
            )
        return not trend.unsteady

    def _watched(self) -> None:
        watch = self.watch.summary() | {"busy_before": self.busy}
        watch["device_peak_memory"] = self.session.peak_memory() if self.session else None
        if self.energy is not None:
            watch["energy"] = self.energy.summary()
        self._add(watch=watch)

    def _layers(self, session: Session, *, timed: bool) -> None:
        """Each layer's least work, its floor under the ceilings, and where `timed` what it takes on its own."""
        self.say("layers")
        images, labels, _ = self.inputs[0]
        times = session.layer_times(images, labels if self.spec.mode == "train" else None) if timed else {}
        found = {}
        for name, cost in self._costs(len(images)).items():
            seen = times.get(name)
            work = {"flops": cost.flops, "bytes": cost.bytes}
            found[name] = {
                **work,
                "floor": lockin.floor({name: work}, self.record.ceilings),
                "forward": seen.forward if seen else None,
                "backward": seen.backward if seen else None,
            }
        self._add(layers=found)

    def _end_to_end(self, session: Session) -> None:
        """Seconds of whole steps: pictures read, cut and normalised, copied to the device, and the result fetched."""
        self.say("end to end")
        fetched: list[float] = []
        began = perf_counter()
        for batch in islice(self.workload.batches(self.spec.batch), 12):
            self._step(session, batch)
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


def measure(spec: Spec, say: Say = lambda _: None) -> Record:
    """Measure one spec in this process, on its own; every way it can go wrong is an outcome of the record."""
    measurement = Measurement(spec, say)
    if measurement.prepare():
        for _ in range(spec.blocks):
            measurement.block()
    return measurement.finish()


def environment() -> dict[str, Any]:
    """The core's versions, the machine's kind and the time; a backend's versions stand with its device."""
    found = {}
    for name in ("portnet", "numpy", "scipy"):
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
