"""Simulated records of four vendors with known answers. No device made them, and they are never shipped as results.

Every device's name begins with ``Simulated``. What is planted: cuda reaches 80% of its chip and rocm 35% of one that is
as fast (lock-in by software); mps falls back on an operation (`partial`); xpu is `wrong` in bfloat16 and has no
training; nobody measured the platform ``tpu``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import exp
from typing import Any
from unittest import mock

import numpy as np

from portnet import devices, lockin
from portnet.own_model import workload
from portnet.record import Record, Spec

ROUNDS = 6
CEILINGS = {"flops": 4e14, "bandwidth": 4e12}
EFFICIENCY = {"cuda": 0.8, "rocm": 0.35, "mps": 0.6, "xpu": 0.5}
SHARE = EFFICIENCY["rocm"] / EFFICIENCY["cuda"]
"""Of what the software reaches at home; where rocm takes that share of its time, it does what cuda does."""
SPEED = {"cuda": 1.0, "rocm": 1.0, "mps": 0.05, "xpu": 0.25}
"""Of the chip: its ceilings as a multiple of `CEILINGS`."""
VENDORS = {"cuda": "Vendor A", "rocm": "Vendor B", "mps": "Vendor C", "xpu": "Vendor D"}
WITHOUT = {"cudnn": 12.0, "graph": 1.25}
"""How many times as long a step takes on cuda without that layer."""
FALLBACK = "3 operations ran elsewhere than on the device: aten::local_response_norm (3)"


PEAK = 0.9
"""What the simulated matrix products and copies reach of the simulated published peaks."""


@contextmanager
def published() -> Iterator[None]:
    """While it lasts, peaks of the simulated devices are known as if their vendors had published them."""
    source = devices.Source(title="simulated", url="", checked="itself")

    def rate(what: str, backend: str) -> devices.Figure:
        value = CEILINGS[what] * SPEED[backend] / PEAK
        return devices.Figure(value=value, published=value, source=source)

    made = tuple(
        devices.DeviceData(
            name=f"Simulated {b.upper()} 1",
            vendor=VENDORS[b],
            year=2026,
            names=(f"Simulated {b.upper()} 1",),
            source=source,
            rates={p: rate("flops", b) for p in ("float32", "bfloat16")},
            bandwidth=rate("bandwidth", b),
        )
        for b in SPEED
    )
    table = (*devices.devices(), *made)
    with mock.patch.object(devices, "devices", return_value=table):
        yield


def spec(backend: str, **more: Any) -> Spec:
    return Spec(**{"backend": backend, "precision": "bfloat16", "batch": 128, "mode": "infer", **more})


def floor(of: Spec) -> tuple[dict[str, Any], dict[str, float], float]:
    """The layers, the ceilings and the floor in seconds of a simulated device."""
    costs = workload(of).costs(of.batch, training=of.mode == "train", precision=of.precision)
    layers = {
        name: {"flops": c.flops, "bytes": c.bytes, "floor": None, "forward": None, "backward": None}
        for name, c in costs.items()
    }
    ceilings = {k: v * SPEED[of.backend] for k, v in CEILINGS.items()}
    least = lockin.floor(layers, ceilings)
    assert least is not None
    return layers, ceilings, least


def records(
    of: Spec, *, slower: float = 1.0, seed: int = 0, rounds: int = ROUNDS, series: str = "", **more: Any
) -> list[Record]:
    """The processes of one stack, `slower` times as slow as its planted efficiency; ``more`` are fields of `Record`."""
    rng = np.random.default_rng([seed, *map(ord, of.stack + of.mode)])
    layers, ceilings, least = floor(of)
    step = least / EFFICIENCY[of.backend] * slower
    alone = {
        n: {**x, "floor": lockin.floor({n: x}, ceilings), "forward": 2e-5, "backward": None} for n, x in layers.items()
    }
    made = []
    for number in range(rounds):
        own = 0.01 * rng.standard_normal()
        seconds = [step * 10 * exp(own + 0.02 * x) for x in rng.standard_normal(30)]
        made.append(
            Record(
                **{
                    "spec": of,
                    "outcome": "works",
                    "device": {
                        "name": f"Simulated {of.backend.upper()} 1",
                        "vendor": VENDORS[of.backend],
                        "memory": 64 << 30,
                        "unified": False,
                        "versions": {"torch": "0.0.simulated"},
                    },
                    "environment": {
                        "date": "2026-01-02T03:04:05+00:00",
                        "host": "simulated",
                        "versions": {},
                        "cold_caches": number == 0,
                    },
                    "round": {
                        "series": series or f"simulated-{of.stack}-{of.mode}",
                        "number": number,
                        "beside": [],
                        "probe": [],
                        "rejected": False,
                    },
                    "samples": {of.mode: {"batch": of.batch, "steps": 10, "seconds": seconds}},
                    "times": {"start": 1.0, "probe": 0.5, "open": 2.0, "first_step": 0.5, "total": 4.0}
                    | ({"end_to_end": [0.01]} if number == 0 else {}),
                    "ceilings": {} if of.without else ceilings,
                    "layers": {} if of.without else alone if number == 0 else layers,
                    "gates": {
                        "parity": {
                            "passed": True,
                            "oracle": False,
                            "findings": [{"what": "infer() fc8", "error": 1e-3, "allowed": 4e-3}],
                        },
                        "fallbacks": {"known": True, "operations": {}},
                    },
                    "watch": {"device_peak_memory": 1 << 30},
                    **more,
                }
            )
        )
    return made  # fmt: skip


def failed(of: Spec, outcome: str, reason: str) -> list[Record]:
    return [replace(r, outcome=outcome, reason=reason, samples={}) for r in records(of, rounds=1)]


def serving(backend: str) -> list[Record]:
    of = spec(backend, mode="serve", batch=1)
    sweep = {
        str(b): {"steps": 1, "seconds": [(0.001 + 0.0001 * b) / SPEED[backend]] * 3, "peak_memory": b << 20}
        for b in (1, 16, 256, 1024)
    }
    seen = {"latencies": [0.001] * 300, "p50": 0.001, "p90": 0.0012, "p99": 0.002, "sweep": sweep,
            "largest_batch": 4096, "bus": {"to_device": 5e10, "to_host": 4e10}}  # fmt: skip
    return [replace(r, samples={}, layers={}, serving=seen) for r in records(of, rounds=1)]


def four_vendors() -> list[Record]:
    """Everything that is planted."""
    made: list[Record] = []
    for backend in ("cuda", "rocm"):
        made += [*records(spec(backend, mode="train")), *records(spec(backend)), *serving(backend)]
    for one in (*records(spec("mps", mode="train")), *records(spec("mps"))):
        fallbacks = {"fallbacks": {"known": True, "operations": {"aten::local_response_norm": 3}}}
        made.append(replace(one, outcome="partial", reason=FALLBACK, gates={**one.gates, **fallbacks}))
    made += failed(spec("xpu"), "wrong", "norm1 is 40 times as far from the reference as allowed")
    made += records(spec("xpu", precision="float32"))
    made += records(spec("cuda", precision="float32"))
    made += records(spec("rocm", precision="float32"))
    made += [*records(spec("mps", precision="float32")), *serving("mps")]
    for layer, slower in WITHOUT.items():
        made += records(spec("cuda", without=(layer,)), slower=slower, series="simulated-ladder")
    made += records(spec("cuda"), seed=1, series="simulated-ladder")
    return made


def without(made: Sequence[Record], backend: str) -> list[Record]:
    return [r for r in made if r.spec.backend != backend]
