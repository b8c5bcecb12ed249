"""What each process of a group does in tests/test_parallel.py; rank 0 leaves what it found in a file.

torchrun --nproc-per-node N parallel_worker.py WAY OUT CASE...
"""

import atexit
import json
import os
import sys

import numpy as np
import psutil
from thin import thin

import portnet
from portnet import parity, plugins, weights
from portnet.contract import Settings

STEPS, RATE, BATCH = 5, 1e-4, 8


def network(preset):
    """A preset at 67 pixels with few outputs, so that a step takes a moment."""
    return thin(portnet.graph(preset, image_size=67, classes=10))


def opened(graph, way, precision="float32", formulation="portable", accumulate=1, start=None):
    settings = Settings(parallel=way, precision=precision, formulation=formulation, accumulate=accumulate, seed=3)
    return plugins.backends()["cpu"].open(graph, start or weights.parity(graph), settings)


def batch(session, case):
    place, count = session.place, len(case.labels)
    part = slice(place.part * count // place.parts, (place.part + 1) * count // place.parts)
    return [session.put(a[part]) for a in (case.images, case.labels, case.ids)]


def steps(session, case, first, count):
    images, labels, ids = batch(session, case)
    return [
        float(session.get(session.train_step(images, labels, ids, step=step, learning_rate=RATE)))
        for step in range(first, first + count)
    ]


def everything(case_of):
    """One case: gradients, five steps, and what a session that is restored from there does next."""
    way, (preset, precision, formulation, accumulate) = case_of
    graph = network(preset)
    case, found = parity.Case(graph, batch=BATCH), {}
    session = opened(graph, way, precision, formulation, int(accumulate))
    if way != "data":
        masks = opened(graph, "", precision).masks(np.asarray(case.ids), step=0)
        trace = session.trace(case.images, case.labels, masks)
        found |= {f"gradient {name}": value for name, value in trace.gradients.items()}
        found |= {"logits": trace.logits, "loss": trace.loss}
    found["losses"] = steps(session, case, 0, STEPS)
    found["traffic"] = json.dumps({k: [t.calls, t.bytes] for k, t in session.traffic().items()})
    found["inference"] = session.get(session.infer(session.put(case.images)))
    state = session.state()
    found |= {f"state {name}": value for name, value in state.items()}
    other = opened(graph, way, precision, formulation, int(accumulate), start=weights.initial(graph, 9))
    other.restore(state)
    next_losses = [steps(s, case, STEPS, 2) for s in (session, other)]
    states = [s.state() for s in (session, other)]
    found["resumed"] = next_losses[0] == next_losses[1] and all(
        np.array_equal(states[0][name], states[1][name]) for name in states[0]
    )
    if way == "towers":  # and the whole network goes on from the towers' state
        alone = opened(graph, "", precision, formulation, start=weights.initial(graph, 9))
        alone.restore(state)
        found["elsewhere"] = max(float(np.abs(alone.state()[name] - value).max()) for name, value in state.items())
    found["total"] = session.total(np.array([1.0, session.place.rank]))
    return found, session


def full_size():
    """What crosses in one step of the network at its full size."""
    graph = portnet.graph("paper2012")
    case = parity.Case(graph, batch=2)
    session = opened(graph, "towers", start=weights.initial(graph))
    steps(session, case, 0, 1)
    return {"traffic": json.dumps({k: [t.calls, t.bytes] for k, t in session.traffic().items()})}, session


def ended(before):
    """No thread is left of the group's, which could abort the process while the interpreter is finalized."""
    if (left := psutil.Process().num_threads()) > before:
        print(f"{left} threads at exit, {before} before the group was entered", file=sys.stderr, flush=True)
        os._exit(3)


def main(way, out, *cases):
    global session  # to the end, as in a script
    found = {}
    for name in cases:
        if name == "full size":
            results, session = full_size()
        else:
            results, session = everything((way, name.split("/")))
        found |= {f"{name}: {key}": value for key, value in results.items()}
    if session.place.rank == 0:
        np.savez(out, **found)


if __name__ == "__main__":
    atexit.register(ended, psutil.Process().num_threads())  # the first to be registered is the last to be called
    main(*sys.argv[1:])
