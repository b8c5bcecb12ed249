"""One measurement: probe, gate, train, time. Run in a process of its own by `portnet.launch`.

This is the quick form: one process, few blocks. A figure counts only behind its gates; what fails one has an outcome
and no figure.
"""

import os
import platform
import traceback
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from portnet import alexnet, clock, images, parity, plugins, training, weights
from portnet.contract import Backend, Device, Session, Settings
from portnet.errors import PortNetError, Unavailable, Unsupported
from portnet.graph import Graph
from portnet.record import Record, Spec

Say = Callable[[str], None]
"""Told what the measurement is doing, one short line at a time."""

BLOCKS = 7
"""Timed blocks of a mode, each followed by a fetch."""
SLOW = 1.0
"""A step that takes longer than this, in seconds, is timed in three blocks only."""
PARITY_BATCH = 2


def measure(spec: Spec, say: Say = lambda _: None) -> Record:
    """Measure one stack; every way it can go wrong is an outcome in the record that comes back."""
    record = Record(spec=spec, outcome="not measured", environment=environment())
    try:
        backend = plugins.backends()[spec.backend]
        say("probing")
        device = plugins.probe(backend)
        record = replace(record, device=_device(backend, device))
        backend.check(Settings(precision=spec.precision, formulation=spec.formulation, seed=spec.seed))
        return _measure(record, backend, say)
    except Unavailable as error:
        return replace(record, outcome="not available", reason=error.reason, remedy=error.remedy)
    except Unsupported as error:
        return replace(record, outcome="not available", reason=str(error), remedy="ask for another precision")
    except PortNetError as error:
        return replace(record, outcome="failed", reason=f"{type(error).__name__}: {error}")
    except MemoryError as error:
        return replace(record, outcome="out of memory", reason=str(error) or "MemoryError")
    except Exception as error:
        # Frameworks have their own names for it: torch.OutOfMemoryError, XPU's and ONNX Runtime's.
        outcome = "out of memory" if "outofmemory" in type(error).__name__.lower() else "failed"
        return replace(record, outcome=outcome, reason="".join(traceback.format_exception_only(error)).strip())


def specs(backend: Backend, spec: Spec) -> list[Spec]:
    """What to measure on a backend: `spec` in each of its formulations; the oracle in float64."""
    precision = "float64" if parity.is_oracle(backend) else spec.precision
    return [
        replace(spec, backend=backend.name, precision=precision, formulation=formulation)
        for formulation in backend.formulations
    ]


def environment() -> dict[str, Any]:
    """Versions, the machine's kind and the time."""
    found = {}
    for name in ("portnet", "numpy", "torch", "onnx", "onnxruntime"):
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
        "versions": found,
    }


def _device(backend: Backend, device: Device) -> dict[str, Any]:
    return {"vendor": backend.vendor, "note": backend.note, **asdict(device)}


def _measure(record: Record, backend: Backend, say: Say) -> Record:
    spec, trains = record.spec, "train" in backend.modes
    data = images.load(spec.data)
    options: dict[str, Any] = {"classes": spec.classes, "mean": data.train.mean}
    graph = alexnet.graph(spec.preset, image_size=spec.image_size, **options)
    gates: dict[str, Any] = {}

    if parity.is_oracle(backend) and spec.precision == "float64":
        gates["parity"] = {"passed": True, "oracle": True, "findings": []}
    else:
        say("parity against the float64 reference")
        verdict = _verdict(graph, backend, spec, train=trains)
        gates["parity"] = {
            "passed": verdict.passed,
            "batch": PARITY_BATCH,
            # JSON has no infinity: what is missing or not finite counts as wrong by more than anything else.
            "findings": [
                {"what": f.what, "error": f.error if f.error < 1e300 else 1e300, "allowed": f.allowed}
                for f in verdict.findings
            ],
        }
        if not verdict.passed:
            return replace(record, gates=gates, outcome="wrong", reason=str(verdict))
    record = replace(record, gates=gates)

    settings = Settings(precision=spec.precision, formulation=spec.formulation, seed=spec.seed)
    if trains:
        record = _train(record, alexnet.graph(spec.preset, image_size=spec.curve_size, **options), backend, data, say)

    say("timing")
    # Of one size, which the test split's may not be.
    batch, other = (
        next(images.training_batches(data.train, graph, seed=spec.seed, epoch=epoch, batch=spec.batch))
        for epoch in (0, 1)
    )
    session = backend.open(graph, weights.initial(graph, spec.seed), settings)
    samples: dict[str, Any] = {}
    seen: dict[str, clock.Clock] = {}
    for mode in backend.modes:
        say(f"timing ({mode})")
        seen[mode] = _clock(session, mode, batch, other)
        samples[mode] = {"batch": spec.batch, "steps": seen[mode].steps, "seconds": list(seen[mode].blocks)}
    session.close()
    gates["clock"] = {mode: asdict(c) for mode, c in seen.items()}
    record = replace(record, gates=gates, samples=samples)
    lies = [f"{mode}: {c}" for mode, c in seen.items() if not c.honest]
    if lies:
        return replace(record, outcome="dishonest clock", reason="; ".join(lies), samples={})
    return replace(record, outcome="works")


def _verdict(graph: Graph, backend: Backend, spec: Spec, *, train: bool) -> parity.Verdict:
    case = parity.Case(graph, batch=PARITY_BATCH, seed=spec.seed)
    oracle = parity.oracle(plugins.backends()["reference"])
    expected = parity.expect(case, oracle, spec.precision, train=train)
    session = backend.open(case.gated, case.weights, case.settings(spec.precision, spec.formulation))
    verdict = parity.judge(expected, session, train=train)
    session.close()
    # What is timed runs at another batch size, for which a library may choose another algorithm.
    session = backend.open(case.gated, case.weights, case.settings(spec.precision, spec.formulation))
    tiled = parity.judge_tiled(expected, session, -(-spec.batch // PARITY_BATCH), train=train)
    session.close()
    verdict = parity.join([("", verdict), (f"batch {spec.batch}:", tiled)])
    # The expectation holds the gradients of 60 million parameters several times over.
    parity.expect.cache_clear()
    return verdict


def _train(record: Record, graph: Graph, backend: Backend, data: images.Splits, say: Say) -> Record:
    spec = record.spec
    start = weights.initial(graph, spec.seed)

    def curve(values: dict[str, Any], label: str) -> list[float]:
        settings = Settings(precision=spec.precision, formulation=spec.formulation, seed=spec.seed)
        session = backend.open(graph, values, settings)
        losses = training.fit(
            session,
            training.training_batches(data, graph, seed=spec.seed, batch=spec.curve_batch, steps=spec.curve_steps),
            learning_rate=graph.recipe.learning_rate,
            on_step=lambda step, loss: say(f"{label}, step {step} of {spec.curve_steps}, loss {loss:.3f}"),
        )
        session.close()
        return losses

    losses = curve(start, "training")
    perturbed = [
        curve(weights.perturbed(start, run), f"training from one rounding away, run {run + 1} of {spec.perturbed}")
        for run in range(spec.perturbed)
    ]
    return replace(record, training={"losses": losses, "perturbed": perturbed}, weights=weights.digest(start))


def _clock(session: Session, mode: str, batch: images.Batch, other: images.Batch) -> clock.Clock:
    run, right = clock.work(session, mode, *((b.images, b.labels, b.ids) for b in (batch, other)))
    return clock.fetch_test(session, run, right, repeats=BLOCKS, slow=SLOW)
