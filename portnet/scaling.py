"""How training goes in several processes beside one: how fast, what crosses between them, whether it is the same.

`measure` starts groups of processes, by the backend's own launcher, in rounds, and one process alone in each round.
Each first trains a small network, whose weights must be those of one process; then it times steps of the real one,
counts what a step sends, and times the collective operations alone. The processes run this file as a module.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from portnet import alexnet, images, launch, measurement, plugins, shards, weights
from portnet.contract import Backend, Settings
from portnet.errors import InputError, PortNetError, Unavailable, Unsupported, out_of_memory
from portnet.graph import Graph
from portnet.record import Record, Spec
from portnet.workload import Say, effective

TOGETHER = 3
"""Steps after which the small network's weights are compared."""
ALLOWED = {"float64": 1e-8, "float32": 1e-3, "tf32": 0.2, "bfloat16": 0.2, "float16": 0.2}
"""By how much an update may differ from one process's, as a share of its norm. The order of sums is another, and in
narrow precisions so is the rounding of each part; a gradient that was not averaged, or a mask of other images, makes a
whole."""
SIZES = (2**16, 2**20, 2**24, 2**26)
"""Bytes on which collective operations are timed alone."""
REPEATS = 10
WEIGHTS = "weights.safetensors"
BLOCK = 0.1
"""Seconds that a timed block takes at least."""


def counts(spec: Spec) -> list[int]:
    """The numbers of processes to time: 1, and doubling up to the spec's."""
    found = [1]
    while found[-1] * 2 < spec.processes:
        found.append(found[-1] * 2)
    return [*found, spec.processes]


def measure(spec: Spec, *, rounds: int = 3, timeout: float = 600.0, say: Say = lambda _: None) -> Record:
    """The record of a spec of mode ``scale``. What goes wrong in the processes is its outcome.

    `timeout` is in seconds, for one group. Raises `InputError` for a spec that asks for no group, `UnknownName`,
    `Unsupported` and `Unavailable` for what the backend does not do here.
    """
    if spec.mode != "scale" or spec.processes < 2 or not spec.parallel:
        raise InputError("to see how training scales, give a way (data, towers) and at least 2 processes")
    if spec.parallel == "towers":
        from portnet import towers

        towers.split(_small(spec))
        if spec.processes != towers.DEVICES:
            raise InputError(f"two towers take {towers.DEVICES} processes, not {spec.processes}")
    backend = plugins.backends()[spec.backend]
    settings = _settings(backend, spec, spec.processes)
    device = backend.check(settings, plugins.probe(backend))
    scaling: dict[str, Any] = {"collectives": backend.collectives, "one_device": backend.one_device}
    found: dict[str, Any] = {
        "environment": measurement.environment(),
        "device": {"vendor": backend.vendor, "note": backend.note, **asdict(device)},
        "effective": asdict(settings),
    }
    gates: dict[str, Any] = {}
    timed: dict[int, list[dict[str, Any]]] = {n: [] for n in counts(spec)}
    steps = 0
    for round_ in range(rounds):
        order = counts(spec) if round_ % 2 == 0 else counts(spec)[::-1]
        for n in order:
            say(f"round {round_ + 1}, {n} process{'es' * (n > 1)}")
            with tempfile.TemporaryDirectory(prefix="portnet-") as folder:
                told = _run(backend, spec, n, steps, Path(folder), timeout)
                if told["outcome"] != "works":
                    failure = {k: told[k] for k in ("outcome", "reason", "remedy") if k in told}
                    failure["reason"] = f"{n} processes: {failure['reason']}"
                    return Record(spec=spec, gates=gates, scaling=scaling, **found, **failure)
                if n == 1:
                    steps = told["steps"]
                    alone = load_file(Path(folder) / WEIGHTS)
                elif "agreement" not in gates and n == spec.processes:
                    gates["agreement"] = _agreement(spec, alone, load_file(Path(folder) / WEIGHTS))
                    if not gates["agreement"]["passed"]:
                        reason = "{what} after {steps} steps: {error:.3g} of its change away from one process's".format(
                            steps=TOGETHER, **gates["agreement"]
                        )
                        return Record(spec=spec, outcome="wrong", reason=reason, gates=gates, scaling=scaling, **found)
            timed[n].append({"batch": told["batch"], "steps": steps, "seconds": told["seconds"]})
            if n == spec.processes:
                scaling |= {"traffic": told["traffic"], "operations": told["operations"]}
    scaling["rounds"] = {str(n): blocks for n, blocks in timed.items()}
    return Record(spec=spec, outcome="works", gates=gates, scaling=scaling, **found)


def _settings(backend: Backend, spec: Spec, processes: int) -> Settings:
    settings, _ = effective(backend, spec)
    return replace(settings, parallel=spec.parallel if processes > 1 else "")  # type: ignore[arg-type]


def _small(spec: Spec) -> Graph:
    return alexnet.graph(spec.preset, image_size=spec.curve_size, classes=spec.classes)


def _run(backend: Backend, spec: Spec, n: int, steps: int, folder: Path, timeout: float) -> dict[str, Any]:
    """Run `n` processes; what the first of them tells, or how they failed."""
    starter = backend.launcher(n, 0) if n > 1 else [sys.executable]
    command = [*starter, "-m", "portnet.scaling", json.dumps(asdict(spec)), str(steps), str(folder)]
    environment = {**os.environ, "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", launch.TUNABLES)}
    if backend.one_device:
        # They share it; torchrun would give each one thread, and the one alone has them all.
        environment |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // n))}
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command, stdout=errors, stderr=errors, env=environment, start_new_session=os.name == "posix"
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            return {"outcome": "timeout", "reason": f"not done after {timeout:.0f} s"}
        finally:
            _end(process)
        for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem)):
            told: dict[str, Any] = json.loads(path.read_text())
            if told["outcome"] != "works" or (path.stem == "0" and process.returncode == 0):
                return told
        errors.seek(0)
        last = ([line.strip() for line in errors if line.strip()] or ["it said nothing"])[-1]
    return {"outcome": "failed", "reason": f"exit status {process.returncode}: {last[:300]}"}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the launcher and what it started."""
    if process.poll() is None:
        process.terminate()  # which it hands on
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _agreement(spec: Spec, alone: Mapping[str, Any], together: Mapping[str, Any]) -> dict[str, Any]:
    """How far the updates of the group are from those of one process."""
    start = weights.initial(_small(spec), spec.seed)

    def error(name: str) -> float:
        off = float(np.linalg.norm(together[name].astype(np.float64) - alone[name]))
        found = off / float(np.linalg.norm(alone[name].astype(np.float64) - start[name]))
        return found if np.isfinite(found) else 1e300

    errors = {name: error(name) for name in start}
    worst = max(errors, key=lambda name: errors[name])
    allowed = ALLOWED[spec.precision]
    return {"passed": errors[worst] <= allowed, "what": worst, "error": errors[worst], "allowed": allowed}


# In the processes.


def _work(spec: Spec, steps: int, folder: Path, rank: int, size: int) -> dict[str, Any]:
    backend = plugins.backends()[spec.backend]
    settings = _settings(backend, spec, size)
    data = shards.load(spec.data).train
    graph = _small(spec)
    session = backend.open(graph, weights.initial(graph, spec.seed), settings)
    batches = images.training_batches(
        data, graph, seed=spec.seed, epoch=0, batch=2 * spec.processes, steps=TOGETHER, place=session.place
    )
    for step, b in enumerate(batches):
        pixels = session.put_pixels(b.pixels, b.shift, b.scale)
        session.train_step(pixels, session.put(b.labels), session.put(b.ids), step=step, learning_rate=0.01)
    trained = session.weights()
    if rank == 0:
        save_file(trained, folder / WEIGHTS)
    session.close()

    graph = alexnet.graph(spec.preset, image_size=spec.image_size, classes=spec.classes)
    session = backend.open(graph, weights.initial(graph, spec.seed), settings)
    first = next(images.training_batches(data, graph, seed=spec.seed, epoch=0, batch=min(spec.batch, 16)))
    take = np.resize(np.arange(len(first.labels)), spec.batch)
    pixels = session.put(first.images[take])
    labels = session.put(first.labels[take])
    ids = session.put(np.arange(spec.batch) + session.place.part * spec.batch)
    done = 0

    def run(count: int) -> float:
        nonlocal done
        began = perf_counter()
        for _ in range(count):
            session.train_step(pixels, labels, ids, step=done, learning_rate=0.0)
            done += 1
        session.synchronize()
        session.get(session.latest_weights())
        return perf_counter() - began

    run(2)
    session.traffic()
    once = run(1)
    traffic = {name: asdict(each) for name, each in session.traffic().items()}
    steps = steps or max(1, ceil(BLOCK / once))
    run(steps)
    seconds = [run(steps) for _ in range(spec.blocks)]
    operations: dict[str, list[dict[str, Any]]] = {}
    for count in SIZES if size > 1 else ():
        for name, found in session.collective_seconds(count, REPEATS).items():
            operations.setdefault(name, []).append({"bytes": count, "seconds": list(found)})
    whole = spec.batch * session.place.parts
    session.close()
    return {"batch": whole, "steps": steps, "seconds": seconds, "traffic": traffic, "operations": operations}


def main(arguments: Sequence[str]) -> int:
    spec, steps, folder = Spec(**json.loads(arguments[0])), int(arguments[1]), Path(arguments[2])
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    told: dict[str, Any] = {"outcome": "works"}
    try:
        told |= _work(spec, steps, folder, rank, size)
    except Unavailable as error:
        told = {"outcome": "not available", "reason": error.reason, "remedy": error.remedy}
    except Unsupported as error:
        told = {"outcome": "not available", "reason": str(error)}
    except Exception as error:
        outcome = "out of memory" if out_of_memory(error) else "failed"
        told = {"outcome": outcome, "reason": str(error) if isinstance(error, PortNetError) else repr(error)[:300]}
    (folder / f"{rank}.json").write_text(json.dumps(told))
    return int(told["outcome"] != "works")


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
